"""Shared fixtures: tiny random models of every architecture, the shipped small models, a word judge."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from biasprune.core.data import data_dir
from biasprune.core.model import LM, load, wrap

transformer_logging = tf.utils.logging
transformer_logging.set_verbosity_error()
transformer_logging.disable_progress_bar()

WORDS = ["the", "a", "my", "friend", "neighbour", "is", "was", "kind", "awful", "rude", "gentle"]
WORDS += ["old", "young", "tall", "very", "and", ".", ",", "who"]
VOCAB = 64
_llama = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ARCHITECTURES = {
    "gpt2": tf.GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=64, **_ends),
    "gpt_neo": tf.GPTNeoConfig(
        num_layers=4,
        num_heads=4,
        hidden_size=32,
        window_size=8,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=64,
        **_ends,
    ),
    "gptj": tf.GPTJConfig(n_layer=3, n_head=4, n_embd=32, rotary_dim=4, n_positions=64, **_ends),
    "gpt_neox": tf.GPTNeoXConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=64,
        **_ends,
    ),
    "opt": tf.OPTConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        max_position_embeddings=64,
        **_ends,
    ),
    "llama": tf.LlamaConfig(**_llama, **_ends),
    "mistral": tf.MistralConfig(**_llama, head_dim=8, sliding_window=6, **_ends),
    "qwen2": tf.Qwen2Config(**_llama, **_ends),
    "qwen3": tf.Qwen3Config(**_llama, head_dim=16, **_ends),
    "gemma2": tf.Gemma2Config(**_llama, head_dim=16, sliding_window=6, **_ends),
    "gemma3": tf.Gemma3TextConfig(**_llama, head_dim=16, sliding_window=6, **_ends),
    "phi": tf.PhiConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=64,
        **_ends,
    ),
}
_experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {  # decoders whose MLPs are mixtures of experts: their heads can be pruned, their units not
    "mixtral": tf.MixtralConfig(**_llama, num_local_experts=4, num_experts_per_tok=2, **_ends),
    "qwen3_moe": tf.Qwen3MoeConfig(**_llama, head_dim=16, **_experts, **_ends),
    "olmoe": tf.OlmoeConfig(**_llama, num_experts=4, num_experts_per_tok=2, **_ends),
    "qwen3_moe, a dense layer": tf.Qwen3MoeConfig(**_llama, head_dim=16, mlp_only_layers=[1], **_experts, **_ends),
}


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per word: prompts of any wanted length, texts that can be read."""
    words = ["<end>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )


def random_lm(name: str, seed: int = 0) -> LM:
    """A tiny decoder with random weights, large enough in scale that heads matter."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy((ARCHITECTURES | EXPERTS)[name]))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(6)
            elif p.dim() == 1:
                p.add_(0.05 * torch.randn_like(p))
    return wrap(model, word_tokenizer(), name=name)


@pytest.fixture(params=ARCHITECTURES)
def arch_lm(request) -> LM:
    return random_lm(request.param)


@pytest.fixture
def tiny() -> LM:
    """Grouped queries, random weights."""
    return random_lm("llama")


@pytest.fixture(scope="session")
def planted() -> LM:
    return load("planted", device="cpu")


@pytest.fixture(scope="session")
def published() -> Path:
    """Folder of the papers' published results; see CONTRIBUTING.md for how to get them."""
    folder = os.environ.get("BIASPRUNE_PUBLISHED")
    if not folder:
        pytest.skip("BIASPRUNE_PUBLISHED names no folder with the published results")
    return Path(folder)


def word_judge(texts: list[str]) -> list[float]:
    """A substitute for tests alone: share of unkind words."""
    bad = {"awful", "rude", "w20", "w21", "w22", "w23"}
    return [sum(w in bad for w in t.split()) / max(1, len(t.split())) for t in texts]


@pytest.fixture
def data() -> Path:
    return data_dir()
