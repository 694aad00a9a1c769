"""Loading, anatomy, masks, export."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import ARCHITECTURES, random_lm, word_tokenizer

from biasprune import ablate, fetch, lm
from biasprune.headscores import magnitude_l2

IDS = torch.tensor([[2, 5, 7, 9, 11, 3], [4, 6, 8, 2, 10, 12], [3, 3, 5, 20, 30, 40]])


def logits(model: lm.LM, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.model(ids).logits


def zero_columns(model: lm.LM, layer: int, head: int) -> None:
    """Slow oracle: the projection's weights themselves lose the head."""
    module = model.model.get_submodule(model.anatomy.out_projs[layer])
    own = slice(head * model.anatomy.head_dim, (head + 1) * model.anatomy.head_dim)
    with torch.no_grad():
        if isinstance(module, tf.pytorch_utils.Conv1D):
            module.weight[own] = 0
        else:
            module.weight[:, own] = 0


def test_anatomy(arch_lm):
    a = arch_lm.anatomy
    config = arch_lm.model.config
    assert (a.n_layers, a.n_heads) == (config.num_hidden_layers, config.num_attention_heads)
    assert a.n_flat == a.n_layers * a.n_heads
    assert len(a.out_projs) == len(a.down_projs) == a.n_layers
    assert a.n_units in (48, 128)


def test_mask_equals_zeroed_columns(arch_lm):
    clean = logits(arch_lm)
    mask = ablate.head_mask(arch_lm.anatomy, [1, 6])
    with ablate.masked(arch_lm, mask):
        by_mask = logits(arch_lm)
    assert torch.equal(logits(arch_lm), clean), "the model must leave as it came"
    zero_columns(arch_lm, 0, 1)
    zero_columns(arch_lm, 1, 2)
    by_weights = logits(arch_lm)
    torch.testing.assert_close(by_mask, by_weights, atol=1e-5, rtol=1e-5)
    assert (by_weights - clean).abs().max() > 1e-3, "the heads matter, so the test can fail"


def test_rows_carry_their_own_mask(arch_lm):
    a = arch_lm.anatomy
    masks = ablate.head_masks(a, [[0], [5], [a.n_flat - 1]])
    with ablate.masked(arch_lm, masks):
        together = logits(arch_lm)
    for i in range(3):
        with ablate.masked(arch_lm, masks[i]):
            alone = logits(arch_lm, IDS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_resuming_equals_a_full_pass(arch_lm, layer):
    clean = logits(arch_lm)
    with ablate.recorded(arch_lm, [layer]) as kept:
        logits(arch_lm)
    rows = torch.tensor([2, 0, 2, 1])  # other rows and another order than in the clean pass
    masks = ablate.head_masks(arch_lm.anatomy, [[layer * 4 + h] for h in range(4)])
    with ablate.masked(arch_lm, masks):
        whole = logits(arch_lm, IDS[rows])
    visited = []
    below = arch_lm.model.get_submodule(arch_lm.anatomy.out_projs[layer - 1])
    handle = below.register_forward_hook(lambda *args: visited.append(1))
    with (
        ablate.resumed(arch_lm, layer, kept.hidden[layer][rows], kept.returns_tuple),
        ablate.masked(arch_lm, masks),
    ):
        part = logits(arch_lm, IDS[rows])
    assert not visited, "the layers below are not computed"
    handle.remove()
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(arch_lm), clean), "the model must leave as it came"


def test_unit_mask_equals_zeroed_rows(arch_lm):
    a = arch_lm.anatomy
    units = torch.ones(a.n_layers, a.n_units)
    units[1, 7] = 0
    with ablate.masked(arch_lm, units=units):
        by_mask = logits(arch_lm)
    module = arch_lm.model.get_submodule(a.down_projs[1])
    with torch.no_grad():
        if isinstance(module, tf.pytorch_utils.Conv1D):
            module.weight[7] = 0
        else:
            module.weight[:, 7] = 0
    torch.testing.assert_close(by_mask, logits(arch_lm), atol=1e-5, rtol=1e-5)


def test_masks_leave_after_an_exception(tiny):
    clean = logits(tiny)
    with pytest.raises(RuntimeError), ablate.masked(tiny, ablate.head_mask(tiny.anatomy, [0])):
        raise RuntimeError
    assert torch.equal(logits(tiny), clean)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 4), "expected"), ((3, 5), "expected"), ((4,), "expected"), ((2, 3, 4), "rows")],
)
def test_wrong_masks(tiny, shape, message):
    mask = torch.zeros(shape)
    with pytest.raises(ValueError, match=message), ablate.masked(tiny, mask):
        logits(tiny)


def test_nan_mask(tiny):
    with pytest.raises(ValueError, match="NaN"), ablate.masked(tiny, torch.full((3, 4), float("nan"))):
        pass


@pytest.mark.parametrize("head", [-1, 12, 1.5, "1", None])
def test_wrong_heads(tiny, head):
    with pytest.raises(ValueError, match="flat index in 0 … 11"):
        ablate.head_mask(tiny.anatomy, [head])


def test_export_loads_in_plain_transformers(arch_lm, tmp_path):
    heads = [2, 5]
    with ablate.masked(arch_lm, ablate.head_mask(arch_lm.anatomy, heads)):
        expected = logits(arch_lm)
    clean = logits(arch_lm)
    folder = ablate.export(arch_lm, heads, tmp_path / "pruned")
    assert torch.equal(logits(arch_lm), clean)
    again = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(lm.load(folder, device="cpu")), expected, atol=1e-5, rtol=1e-5)


def test_export_never_overwrites(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="new folder"):
        ablate.export(tiny, [0], tmp_path / "full")


def test_magnitude_is_the_norm_of_the_heads_own_weights(arch_lm):
    """Oracle: zero everything but one head's weights by hand, per architecture's documented layout."""
    a, config = arch_lm.anatomy, arch_lm.model.config
    block = arch_lm.model.get_submodule(a.layers[1])
    head, d, group = 2, a.head_dim, a.n_heads // a.n_kv_heads
    own = slice(head * d, (head + 1) * d)
    shared = slice(head // group * d, (head // group + 1) * d)
    total = 0.0
    if config.model_type == "gpt2":
        w, b, hidden = block.attn.c_attn.weight, block.attn.c_attn.bias, a.n_heads * d
        for part in range(3):
            cols = slice(part * hidden + head * d, part * hidden + (head + 1) * d)
            total += float(w[:, cols].square().sum() + b[cols].square().sum())
        total += float(block.attn.c_proj.weight[own].square().sum())
    elif config.model_type == "gpt_neox":
        w, b = block.attention.query_key_value.weight, block.attention.query_key_value.bias
        rows = slice(head * 3 * d, (head + 1) * 3 * d)
        total += float(w[rows].square().sum() + b[rows].square().sum())
        total += float(block.attention.dense.weight[:, own].square().sum())
    else:
        attention = next(m for n, m in block.named_modules() if hasattr(m, "q_proj"))
        for part, rows in ((attention.q_proj, own), (attention.k_proj, shared), (attention.v_proj, shared)):
            total += float(part.weight[rows].square().sum())
            total += float(part.bias[rows].square().sum()) if part.bias is not None else 0.0
        total += float(arch_lm.model.get_submodule(a.out_projs[1]).weight[:, own].square().sum())
    scores = magnitude_l2(arch_lm)
    assert scores.shape == (a.n_flat,) and scores.max() == 1
    first = total**0.5 / scores[a.n_heads + head]  # the common divisor
    with torch.no_grad():
        arch_lm.model.get_submodule(a.out_projs[0]).weight.mul_(1000)  # layer 0 now holds the largest
    second = total**0.5 / magnitude_l2(arch_lm)[a.n_heads + head]
    assert first > 0 and second > 100 * first


def test_unknown_architecture_names_what_was_looked_for():
    mamba = tf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=VOCAB_SMALL)
    with pytest.raises(ValueError, match=r"MambaForCausalLM: no .* found; looked for .*biasprune/lm.py"):
        lm.anatomy(tf.AutoModelForCausalLM.from_config(mamba))


VOCAB_SMALL = 16


def test_heads_that_do_not_fit_are_refused():
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES["llama"]))
    model.config.head_dim = 12
    with pytest.raises(ValueError, match="takes 32 inputs"):
        lm.anatomy(model)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "planted"])
def test_small_models_load_and_are_small(name, data):
    model = lm.load(name, device="cpu")
    assert model.revision.startswith("sha256:")
    size = sum(f.stat().st_size for f in (data / "models" / name).iterdir())
    assert size <= 3 * 2**20


def test_unknown_models(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="No such model folder.*smollm2-135m"):
        lm.load("./nowhere")
    with pytest.raises(ValueError, match="no config.json"):
        lm.load(tmp_path)

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="could not be had from the Hugging Face hub.*local folder"):
        lm.load("openai-community/gpt2")


def test_hub_id_is_pinned_to_the_commit_it_resolves_to(monkeypatch, tmp_path):
    """The hub is replaced by a folder laid out as its cache is; the code from there on is the real one."""
    source = random_lm("gpt2")
    commit = tmp_path / "snapshots" / "0123abcd"
    source.model.save_pretrained(commit)
    word_tokenizer().save_pretrained(commit)
    asked = {}

    def download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = lm.load("somebody/model", revision="main", device="cpu")
    assert loaded.revision == "0123abcd"
    assert asked["revision"] == "main" and "*.py" not in asked["patterns"]
    torch.testing.assert_close(logits(loaded), logits(source))


def test_only_safetensors(tmp_path):
    source = random_lm("gpt2")
    source.model.config.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    torch.save(source.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could not be loaded"):
        lm.load(tmp_path)


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", "bf16", None])
def test_the_fast_number_format(monkeypatch, unit):
    """Where the processor emulates bfloat16, float32 is several times faster."""
    known = {"avx2": True, "avx512_bf16": False} | ({unit: True} if unit else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    expected = "bfloat16" if unit else "float32"
    assert lm.number_format("fast", "cpu") == expected and lm.has_bfloat16("cpu") == bool(unit)
    assert lm.load("tiny-llama", dtype="fast", device="cpu").dtype == getattr(torch, expected)
    assert lm.number_format("bfloat16", "cpu") == "bfloat16" and lm.number_format("auto", "cpu") == "auto"
    assert lm.number_format("fast", "mps") == "float32"
    with pytest.raises(ValueError, match="choose float32, bfloat16, float16, fast or auto"):
        lm.number_format("int8")


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="choose float32"):
        lm.load("planted", dtype="int8")


def test_packaged_model_reads_english():
    """The real default model, from the package index or the cache."""
    try:
        model = lm.load("smollm2-135m", device="cpu")
    except fetch.FetchError as e:
        pytest.skip(str(e))
    assert (model.anatomy.n_layers, model.anatomy.n_heads, model.anatomy.n_kv_heads) == (30, 9, 3)
    ids = torch.tensor([model.tokenizer("The capital of France is")["input_ids"]])
    assert model.tokenizer.decode(logits(model, ids)[0, -1].argmax()).strip() == "Paris"
    assert np.isfinite(magnitude_l2(model)).all()
