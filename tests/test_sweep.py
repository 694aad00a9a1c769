"""Every causal language model that transformers can build small: pruned as by hand, or refused with a reason.

docs/architectures.md is what this file writes: python tests/test_sweep.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as tf
from conftest import VOCAB, word_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from biasprune.__main__ import markdown
from biasprune.check import answer, neurons
from biasprune.core import model
from biasprune.core.likelihood import check_unembedding, evaluate, token_log_probs
from biasprune.core.masks import Pruning, masked

IDS = torch.tensor([[2, 5, 7, 9, 11, 3]])
SMALL = {  # what architectures call the sizes of a decoder
    32: "hidden_size d_model n_embd word_embed_proj_dim",
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads",
    48: "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim",
    64: "max_position_embeddings n_positions",
    2: "num_key_value_heads num_experts_per_tok",
    8: "head_dim",
    24: "moe_intermediate_size",
    VOCAB: "vocab_size",
    0: "bos_token_id eos_token_id pad_token_id",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "rotary_dim", "logits_scaling"), 4)


# what some architectures need besides, or can't take (None)
MLA = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
MORE = [
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4, "head_dim": None},
    {"num_key_value_heads": 4, "head_dim": 4, **MLA, "moe_layer_freq": None},
    {"attention_types": [[["global"], 3]]},
    {"layer_types": ["full_attention"] * 3},
    {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 0},
]


def small(kind: str, more: dict) -> tf.PreTrainedConfig:
    """A configuration with the sizes above, of its text model where it has several."""
    config = tf.CONFIG_MAPPING[kind]()
    text = getattr(config, "text_config", None)
    known = set(vars(config if text is None else text)) | {"num_key_value_heads", "head_dim"}
    sizes = {name: size for name, size in (SIZES | more).items() if name in known and size is not None}
    return tf.CONFIG_MAPPING[kind](**(sizes if text is None else {"text_config": sizes}))


def built(kind: str) -> torch.nn.Module:
    """A tiny model with random weights; skips what needs more than the above, or can't run itself."""
    for more in MORE:
        try:
            with torch.device("meta"):
                shell = tf.AutoModelForCausalLM.from_config(small(kind, more))
            if sum(p.numel() for p in shell.parameters()) > 2e7:
                why = "too large"
                continue
            torch.manual_seed(0)
            net = tf.AutoModelForCausalLM.from_config(small(kind, more)).eval()
            with torch.no_grad():
                net(IDS)
            break
        except Exception as e:  # the architecture's own
            why = f"can't be built small: {type(e).__name__}"
    else:
        pytest.skip(why)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p.mul_(6)
    return net


TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
HEAD = f"""# Architectures

Written by `python tests/test_sweep.py`; don't edit. All {len(KINDS)} causal architectures of transformers
{tf.__version__}, with random weights and a few layers. Where heads can be pruned, a test compares the pruned model with
one whose weights were set to zero by hand. `python -m biasprune check MODEL` says the same of a model at hand.
Single weights are those of matrices of their own (`Linear`, `Conv1D`): those of experts that share one tensor stay.
"""


def row(kind: str) -> dict[str, str]:
    """A row of the table, of what isn't built, too."""
    try:
        return described(kind, built(kind))
    except pytest.skip.Exception as e:
        blank = dict.fromkeys(("heads", "neurons", "scored texts"), "")
        return {"architecture": kind, **blank, "why not": f"not tried: {e.msg}"}


def described(kind: str, net: torch.nn.Module) -> dict[str, str]:
    """What can be done with a model."""
    row = {"architecture": kind}
    try:
        lm = model.wrap(net, word_tokenizer())
    except ValueError as e:
        return row | {"heads": "no", "neurons": "no", "scored texts": "no", "why not": str(e).split(";")[0]}
    can = {"heads": "yes", "neurons": "no" if (units := answer(neurons, lm)).startswith("no: ") else "yes"}
    try:
        check_unembedding(lm)
        can["scored texts"] = "yes"
    except ValueError:
        can["scored texts"] = "no"
    return row | can | {"why not": units.removeprefix("no: ") if can["neurons"] == "no" else ""}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_as_by_hand_or_refused(kind):
    net = built(kind)
    line = markdown(pd.DataFrame([described(kind, net)])).splitlines()[-1]
    assert line in TABLE.read_text(encoding="utf-8")
    try:
        lm = model.wrap(net, word_tokenizer())
    except ValueError as e:
        assert type(net).__name__ in str(e)
        return
    gone = Pruning({0, lm.anatomy.n_flat - 1})
    clean = net(IDS).logits
    with masked(lm, gone):
        by_mask = net(IDS).logits
    every = torch.ones_like(IDS, dtype=torch.bool)
    scored = [gone, Pruning(), Pruning({1})]  # of more than two, passes begin at the first pruned layer
    try:
        of = evaluate(lm, scored, [(torch.arange(1), IDS)], lambda n, x: token_log_probs(lm, x, every).sum(1), 1)
    except ValueError as e:  # its texts can still be sampled
        assert type(net).__name__ in str(e)
        of = None
    for h in gone.heads:
        start = h % lm.anatomy.n_heads * lm.anatomy.head_dim
        projection = net.get_submodule(lm.anatomy.out_projs[h // lm.anatomy.n_heads])
        model.weight_of(projection)[:, start : start + lm.anatomy.head_dim] = 0
    by_hand = net(IDS).logits
    torch.testing.assert_close(by_mask, by_hand, atol=1e-4, rtol=1e-4)
    assert (by_hand - clean).abs().max() > 1e-4, "the heads matter, so the test can fail"
    if of is not None:
        log_probs = by_hand.float().log_softmax(-1)[0, :-1].gather(1, IDS[0, 1:, None])
        assert of[0, 0] == pytest.approx(log_probs.sum().item(), abs=1e-2)


if __name__ == "__main__":
    TABLE.write_text(f"{HEAD}\n{markdown(pd.DataFrame(map(row, KINDS)))}\n", encoding="utf-8")
