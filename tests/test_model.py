"""Loading, anatomy, and the one way from texts to token ids."""

from __future__ import annotations

import copy
import json
import tempfile

import pytest
import torch
import transformers as tf
from conftest import ARCHITECTURES, random_lm, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from biasprune.core import data, model

IDS = torch.tensor([[2, 5, 7, 9, 11, 3]])


def logits(lm: model.LM, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(ids).logits


def test_anatomy(arch_lm):
    a, config = arch_lm.anatomy, arch_lm.model.config
    assert (a.n_layers, a.n_heads) == (config.num_hidden_layers, config.num_attention_heads)
    assert a.n_flat == a.n_layers * a.n_heads and a.n_units in (48, 128)
    assert len(a.out_projs) == len(a.down_projs) == a.n_layers


def test_unknown_architecture_names_what_was_looked_for():
    mamba = tf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=16)
    with pytest.raises(ValueError, match=r"MambaForCausalLM: no .* was found; looked for .*core/model.py"):
        model.anatomy(tf.AutoModelForCausalLM.from_config(mamba))


def test_heads_that_do_not_fit_are_refused():
    llama = tf.AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES["llama"]))
    llama.config.head_dim = 12
    with pytest.raises(ValueError, match="takes 32 inputs"):
        model.anatomy(llama)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "planted"])
def test_small_models_load_and_are_small(name, data):
    assert model.load(name, device="cpu").revision.startswith("sha256:")
    assert sum(f.stat().st_size for f in (data / "models" / name).iterdir()) <= 3 * 2**20


def test_unknown_models(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"No such model folder.*smollm2-135m"):
        model.load("./nowhere")
    with pytest.raises(ValueError, match=r"no config.json"):
        model.load(tmp_path)

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"could not be had from the Hugging Face hub.*local folder"):
        model.load("openai-community/gpt2")


def test_hub_id_is_pinned_to_the_commit_it_resolves_to(monkeypatch, tmp_path):
    """The hub is replaced by a folder laid out as its cache is; the code from there on is the real one."""
    source, asked = random_lm("gpt2"), {}
    commit = tmp_path / "snapshots" / "0123abcd"
    source.model.save_pretrained(commit)
    word_tokenizer().save_pretrained(commit)

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = model.load("somebody/model", revision="main", device="cpu")
    assert loaded.revision == "0123abcd"
    assert asked["revision"] == "main" and "*.py" not in asked["patterns"] and "*.jinja" in asked["patterns"]
    torch.testing.assert_close(logits(loaded), logits(source))


def test_only_safetensors(tmp_path):
    source = random_lm("gpt2")
    source.model.config.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    torch.save(source.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could not be loaded"):
        model.load(tmp_path)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_folder_that_lacks_weights_or_has_others_is_refused(data):
    """transformers only warns, and runs on random numbers."""
    source = random_lm(data.draw(st.sampled_from(["gpt2", "llama", "opt"])))
    with tempfile.TemporaryDirectory() as folder:
        source.model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        torch.testing.assert_close(logits(model.load(folder, device="cpu")), logits(source))
        weights = load_file(f"{folder}/model.safetensors")
        dropped = data.draw(st.sets(st.sampled_from(sorted(weights)), max_size=4))
        weights = {name: w for name, w in weights.items() if name not in dropped}
        if not dropped or data.draw(st.booleans()):
            weights["adapter.weight"] = torch.ones(2)
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="isn't a whole .*missing" if dropped else "unexpected: adapter.weight"):
            model.load(folder, device="cpu")


QUANTISED = [{"quantization_config": {"quant_method": m, "bits": 4}} for m in ("gptq", "awq", "hqq")]
CHANGES = [{"hidden_size": "many"}, {"num_attention_heads": 0}, {"vocab_size": 7}, {"num_hidden_layers": 9}]


@pytest.mark.parametrize("change", [*QUANTISED, *CHANGES, {"model_type": "nonsense"}])
def test_a_config_that_the_weights_do_not_go_with_is_refused(tmp_path, change):
    """Also a quantised checkpoint whose package isn't there, which transformers tells by an ImportError."""
    random_lm("llama").model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="could not be loaded|isn't a whole"):
        model.load(tmp_path, device="cpu")


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", "bf16", None])
def test_the_fast_number_format(monkeypatch, unit):
    """Where the processor emulates bfloat16, float32 is several times faster."""
    units = {"avx2": True, "avx512_bf16": False} | ({unit: True} if unit else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    expected = "bfloat16" if unit else "float32"
    assert model.number_format("fast", "cpu") == expected and model.has_bfloat16("cpu") == bool(unit)
    assert model.load("tiny-llama", dtype="fast", device="cpu").model.dtype == getattr(torch, expected)
    assert model.number_format("bfloat16", "cpu") == "bfloat16" and model.number_format("auto") == "auto"
    with pytest.raises(ValueError, match="choose one of float32, bfloat16, float16, fast, auto"):
        model.number_format("int8")


def test_packaged_model_reads_english():
    """The real default model, from the package index or the cache."""
    try:
        lm = model.load("smollm2-135m", device="cpu")
    except data.FetchError as e:
        pytest.skip(str(e))
    assert (lm.anatomy.n_layers, lm.anatomy.n_heads, lm.anatomy.n_kv_heads) == (30, 9, 3)
    ids = torch.tensor(model.encode(lm, ["The capital of France is"]))
    assert lm.tokenizer.decode(logits(lm, ids)[0, -1].argmax()).strip() == "Paris"


def with_specials(template: str) -> model.LM:
    """A model whose tokenizer adds tokens of its own: 0 is both the first and the last one here."""
    lm = random_lm("llama")
    backend = lm.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<end>", 0)])
    return lm


@pytest.mark.parametrize("template", ["$A", "<end> $A", "$A <end>", "<end> $A <end>"])
def test_special_tokens_stand_before_a_text_and_never_behind_it(template):
    lm = with_specials(template)
    first = [0] if template.startswith("<end>") else []
    bare = lm.tokenizer("the friend is", add_special_tokens=False)["input_ids"]
    assert model.encode(lm, ["the friend is"]) == [first + bare]
    assert model.encode(lm, ["the friend is"], 2) == [(first + bare)[:2]]
    assert model.encode(lm, ["the friend is"], special=False) == [bare]


@pytest.mark.parametrize(
    ("texts", "message"), [("the friend", "single text"), (["fine", " "], "text 1 is empty"), ([3], "no text: 3")]
)
def test_what_is_no_text_is_refused(tiny, texts, message):
    with pytest.raises(ValueError, match=message):
        model.encode(tiny, texts)


def test_batches_of_equal_length_hold_every_text_once(tiny):
    ids = model.encode(tiny, ["the friend", "a", "who was", "my old friend", "the"] * 3)
    seen = []
    for numbers, batch in model.equal_lengths(ids, 4):
        assert batch.numel() <= 4 or len(batch) == 1
        assert [ids[i] for i in numbers] == batch.tolist()
        seen += numbers.tolist()
    assert sorted(seen) == list(range(15))
