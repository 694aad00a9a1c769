"""Prunings and masks: equal to zeroed weights on every architecture, gone afterwards, exported whole."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from conftest import ARCHITECTURES, EXPERTS, random_lm, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from biasprune.core import masks, model
from biasprune.core.likelihood import mask_gradients, token_log_probs
from biasprune.core.masks import Pruning, ablating, masked, scaled
from biasprune.core.model import weight_of
from biasprune.methods import saving
from biasprune.methods.saving import export

IDS = torch.tensor([[2, 5, 7, 9, 11, 3], [4, 6, 8, 2, 10, 12], [3, 3, 5, 20, 30, 40]])


def logits(lm: model.LM, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(ids).logits


def zero_inputs(lm: model.LM, name: str, inputs: slice) -> None:
    """Slow oracle: the projection's weights themselves lose some inputs."""
    with torch.no_grad():
        model.weight_of(lm.model.get_submodule(name))[:, inputs] = 0


def removed_by_hand(lm: model.LM, heads: list[int], units: list[int]) -> None:
    a = lm.anatomy
    for h in heads:
        start = h % a.n_heads * a.head_dim
        zero_inputs(lm, a.out_projs[h // a.n_heads], slice(start, start + a.head_dim))
    for u in units:
        zero_inputs(lm, a.down_projs[u // a.n_units], slice(u % a.n_units, u % a.n_units + 1))


def test_masked_equals_zeroed_columns_and_leaves(arch_lm):
    clean, unit = logits(arch_lm), arch_lm.anatomy.n_units + 7
    pruning = Pruning({1, 6}, units={unit})
    with masked(arch_lm, pruning):
        by_mask = logits(arch_lm)
    assert torch.equal(logits(arch_lm), clean), "the model must leave as it came"
    removed_by_hand(arch_lm, [1, 6], [unit])
    by_weights = logits(arch_lm)
    torch.testing.assert_close(by_mask, by_weights, atol=1e-5, rtol=1e-5)
    assert (by_weights - clean).abs().max() > 1e-3, "the parts matter, so the test can fail"


def test_units_alone_equal_zeroed_columns(arch_lm):
    unit = arch_lm.anatomy.n_units + 7
    clean = logits(arch_lm)
    with masked(arch_lm, Pruning(units={unit})):
        by_mask = logits(arch_lm)
    removed_by_hand(arch_lm, [], [unit])
    torch.testing.assert_close(by_mask, logits(arch_lm), atol=1e-5, rtol=1e-5)
    assert not torch.equal(by_mask, clean)


@pytest.mark.parametrize("name", EXPERTS)
def test_heads_beside_experts(name):
    """Pruned heads equal zeroed columns, row by row; first-order effects are the differences; units are refused."""
    lm = random_lm(name)
    prunings, ids, end = [Pruning({0, 5}), Pruning()], IDS[[0, 0]], partial(token_log_probs, counted=IDS[[0, 0]] > -1)
    with masked(lm, prunings):
        by_mask = logits(lm, ids)
    torch.testing.assert_close(by_mask[1:], logits(lm, IDS[:1]), atol=1e-5, rtol=1e-5)
    slopes = mask_gradients(lm, [(torch.arange(2), ids)], lambda n, x: end(lm, x).sum(1), 2)[0, 0, 0]
    step, sums = 1e-3, []
    for size in (1 + step, 1 - step):
        mask = torch.ones(1, 3, 4)
        mask[0, 0, 0] = size
        with torch.no_grad(), scaled(lm, heads=mask):
            sums.append(end(lm, ids).sum(1)[0].item())
    assert slopes == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=0.05, abs=0.02)
    with pytest.raises(ValueError, match="MLP units can't be pruned .*heads can"):
        mask_gradients(lm, [(torch.arange(2), ids)], lambda n, x: end(lm, x).sum(1), 2, "units")
    removed_by_hand(lm, [0, 5], [])
    torch.testing.assert_close(by_mask[:1], logits(lm, IDS[:1]), atol=1e-5, rtol=1e-5)


def test_rows_carry_their_own_pruning(arch_lm):
    prunings = [Pruning({0}), Pruning(), Pruning({arch_lm.anatomy.n_flat - 1}, units={3})]
    rows = torch.tensor([2, 0, 2])
    with masked(arch_lm, prunings, rows):
        together = logits(arch_lm)
    for i, which in enumerate(rows):
        with masked(arch_lm, prunings[which]):
            alone = logits(arch_lm, IDS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_masks_leave_after_an_exception(tiny):
    clean = logits(tiny)
    name = tiny.anatomy.out_projs[0]
    with pytest.raises(RuntimeError), masked(tiny, Pruning({0}, weights={name: torch.arange(9)})):
        raise RuntimeError
    assert torch.equal(logits(tiny), clean)


def test_single_weights(arch_lm):
    """A unit's column of the down projection is the unit; values come back to the last bit."""
    a, state = arch_lm.anatomy, {k: v.clone() for k, v in arch_lm.model.state_dict().items()}
    name = a.down_projs[1]
    rows, columns = model.weight_of(arch_lm.model.get_submodule(name)).shape
    column = torch.arange(rows) * columns + 4
    with masked(arch_lm, Pruning(weights={name: column})):
        by_weights = logits(arch_lm)
    with masked(arch_lm, Pruning(units={a.n_units + 4})):
        torch.testing.assert_close(by_weights, logits(arch_lm), atol=1e-5, rtol=1e-5)
    for key, value in arch_lm.model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: masked(lm, Pruning({12})), "part 12 is outside the model"),
        (lambda lm: masked(lm, Pruning({-1})), "part -1 is outside"),
        (lambda lm: masked(lm, [Pruning({0}), Pruning({1})]), "prunings for 2 rows, but the batch has 3"),
        (lambda lm: masked(lm, [Pruning(), Pruning(weights={"x": torch.arange(2)})]), "can't share a batch"),
    ],
)
def test_wrong_prunings(tiny, call, message):
    with pytest.raises(ValueError, match=message), call(tiny):
        logits(tiny)


SETS = st.frozensets(st.integers(0, 9), max_size=6)


@given(a=SETS, b=SETS, u=SETS, v=SETS, w=SETS, x=SETS)
def test_prunings_are_sets_with_a_text_form(a, b, u, v, w, x):
    def made(heads, units, weights):
        return Pruning(heads, units, {"m": torch.tensor(sorted(weights), dtype=torch.int64)} if weights else {})

    one, other = made(a, u, w), made(b, v, x)
    assert one & other == made(a & b, u & v, w & x)
    assert one | other == made(a | b, u | v, w | x)
    assert one - other == made(a - b, u - v, w - x)
    assert len(one) == len(a) + len(u) + len(w)
    assert (one == other) == ((a, u, w) == (b, v, x))
    assert len({one, made(a, u, w)}) == 1
    assert Pruning.parse(str(made(a, u, ()))) == made(a, u, ())


def test_the_text_form():
    assert str(Pruning()) == "" and str(Pruning({17, 3}, {9})) == "3 17 u9"
    text = str(Pruning(weights={"m": torch.tensor([1, 5])}))
    assert text.startswith("w:") and text.endswith(":2")
    with pytest.raises(ValueError, match="select them again"):
        Pruning.parse(text)


def test_a_matched_control_has_as_many_parts_of_every_layer(tiny):
    a, name = tiny.anatomy, tiny.anatomy.out_projs[0]
    pruning = Pruning({0, 1, 9}, {3, 50, 51, 140}, {name: torch.arange(0, 1024, 3)})
    drawn, again, other = (pruning.like(tiny, seed) for seed in (0, 0, 1))
    assert drawn == again != other
    for parts, n in (("heads", a.n_heads), ("units", a.n_units)):
        layers = [sorted(p // n for p in getattr(x, parts)) for x in (pruning, drawn)]
        assert layers[0] == layers[1]
    assert len(drawn.weights[name].unique()) == len(pruning.weights[name])
    everything = Pruning(weights={name: torch.arange(1024)})
    assert everything.like(tiny, 0) == everything


def test_export_loads_in_plain_transformers(arch_lm, tmp_path):
    name = arch_lm.anatomy.down_projs[0]
    pruning = Pruning({2, 5}, {7}, {name: torch.tensor([3, 40, 41])})
    with masked(arch_lm, pruning):
        expected = logits(arch_lm)
    clean = logits(arch_lm)
    folder = export(arch_lm, pruning, tmp_path / "pruned")
    assert torch.equal(logits(arch_lm), clean)
    again = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.load(folder, device="cpu")), expected, atol=1e-5, rtol=1e-5)


def in_every_layer(n_layers: int, n: int, parts: list[int]) -> frozenset[int]:
    return frozenset(layer * n + part for layer in range(n_layers) for part in parts)


def stored(folder) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("what", ["units", "heads", "both, and some more"])
def test_an_export_is_smaller_where_layers_lose_as_much(arch_lm, tmp_path, what):
    """Parameters that go are those of the parts; logits are the masked model's; single weights move along."""
    a, config = arch_lm.anatomy, arch_lm.model.config
    group = a.n_heads // a.n_kv_heads  # query heads of a key/value group
    units = in_every_layer(a.n_layers, a.n_units, [0, 7, 8]) if what != "heads" else frozenset()
    gone = 2 // group  # two heads of every layer, of another group or other groups in the last one
    heads = in_every_layer(a.n_layers - 1, a.n_heads, [0, 1]) | {a.n_flat - 1, a.n_flat - 2}
    heads = heads if what != "units" else frozenset()
    pruning = Pruning(heads, units)
    if what.startswith("both"):  # beyond what every layer loses; those weights are zero
        name = a.down_projs[0]
        pruning |= Pruning({2}, {20}, {name: torch.tensor([0, 9, 40, 41, 60])})
    with masked(arch_lm, pruning):
        expected = logits(arch_lm)
    clean = logits(arch_lm)
    folder = export(arch_lm, pruning, tmp_path / "smaller")
    assert torch.equal(logits(arch_lm), clean), "the model must leave as it came"
    again, info = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    small, lost = model.load(folder, device="cpu").anatomy, 0
    if units:
        assert small.n_units == a.n_units - 3
        matrices = arch_lm.model.get_submodule(a.down_projs[0].rpartition(".")[0]).named_children()
        up = [m for n, m in matrices if n in saving.UP_PROJ]
        assert up, "an MLP has a first matrix"
        lost += 3 * a.n_layers * sum(config.hidden_size + (m.bias is not None) for m in up)
        lost += 3 * a.n_layers * config.hidden_size
    if heads and a.q_projs[0].endswith("self_attn.q_proj") and config.model_type != "opt":
        assert (small.n_heads, small.n_kv_heads, small.head_dim) == (2, a.n_kv_heads - gone, a.head_dim)
        attention, per_head = arch_lm.model.get_submodule(a.q_projs[0].removesuffix(".q_proj")), 0
        for letter, heads_gone in (("q", 2), ("k", gone), ("v", gone)):
            biased = getattr(attention, f"{letter}_proj").bias is not None
            per_head += heads_gone * a.head_dim * (config.hidden_size + biased)
        lost += a.n_layers * (per_head + 2 * a.head_dim * config.hidden_size)
    elif heads:
        assert small.n_heads == a.n_heads, "its config derives the size of a head from their number"
    whole = sum(p.numel() for p in arch_lm.model.parameters())
    assert sum(p.numel() for p in again.parameters()) == whole - lost
    assert stored(folder) == whole - lost
    facts = json.loads((folder / "biasprune.json").read_text())
    assert (facts["before"], facts["after"]) == (whole, whole - lost)
    assert f"| {whole - lost:,} |" in (folder / "README.md").read_text()


def test_fewer_groups_go_where_the_config_wants_it(tmp_path):
    """Llama refuses 3 heads for a hidden size of 32: of five groups that every layer loses four go, one is zeroed."""
    config = copy.deepcopy(ARCHITECTURES["llama"])
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = 4
    torch.manual_seed(0)
    lm = model.wrap(tf.AutoModelForCausalLM.from_config(config), word_tokenizer())
    pruning = Pruning(in_every_layer(3, 8, [0, 2, 4, 5, 6]))
    with masked(lm, pruning):
        expected = logits(lm)
    small = model.load(export(lm, pruning, tmp_path / "x"), device="cpu")
    assert small.anatomy.n_heads == 4
    torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_export_beside_experts(name, tmp_path):
    """OLMoE scales queries by all heads' norm: without some of them the others would change, so these are zeroed."""
    lm = random_lm(name)
    pruning = Pruning(in_every_layer(3, 4, [0, 1]))
    with masked(lm, pruning):
        expected = logits(lm)
    small = model.load(export(lm, pruning, tmp_path / "x"), device="cpu")
    assert small.anatomy.n_heads == (4 if name == "olmoe" else 2)
    torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=1e-5)


def test_the_card_has_the_numbers(tmp_path):
    lm = random_lm("gpt2")
    name = lm.anatomy.down_projs[2]
    measured = pd.DataFrame({"measure": ["bias"], "before": [0.5], "after": [0.123456], "95 %": ["0.1 to 0.2"]})
    pruning = Pruning({0, 1, 5}, {3}, {name: torch.arange(345)})
    card = (export(lm, pruning, tmp_path / "x", method="by hand", measured=measured) / "README.md").read_text()
    for row in ("0 | 2 | 1 | 0", "1 | 1 | 0 | 0", "2 | 0 | 0 | 345", "bias | 0.5 | 0.1235 | 0.1 to 0.2"):
        assert f"| {row} |" in card
    for fact in ("Base model | gpt2", "Method | by hand", "config | as the base model's", "licence | see the base"):
        assert f"{fact}" in card
    assert not re.search(r"[{}]", card)
    with mock.patch.object(saving, "packaged", lambda: model.packaged().rename(index={"smollm2-135m": "gpt2"})):
        card = (export(lm, pruning, tmp_path / "y") / "README.md").read_text()
    assert "licence | Apache-2.0" in card and "dequantised" in card and "Nothing was measured" in card


@pytest.mark.parametrize("at", ["weights", "tokenizer", "card"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_export_is_all_or_nothing(tiny, tmp_path, monkeypatch, at, error):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    monkeypatch.setattr(saving, "_shrunk", lambda *_: pytest.fail("the error comes before the work"))
    for taken in ("full", "full/x"):
        with pytest.raises(FileExistsError, match="new folder"):
            export(tiny, Pruning({0}), tmp_path / taken)
    monkeypatch.undo()

    def interrupted(*args, **kwargs):
        raise error(28, "No space left on device")

    where = {"weights": (tiny.model, "save_pretrained"), "tokenizer": (tiny.tokenizer, "save_pretrained")}
    monkeypatch.setattr(*where.get(at, (saving, "_card")), interrupted)
    clean = logits(tiny)
    with pytest.raises(error):
        export(tiny, Pruning({0}), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert torch.equal(logits(tiny), clean)


def test_cut_stays_through_training(arch_lm):
    """The classifier's way: parts are gone for good, and get no gradient."""
    pruning = Pruning({1, 6}, {7})
    with masked(arch_lm, pruning):
        expected = logits(arch_lm)
    masks.cut(arch_lm.model, pruning)
    torch.testing.assert_close(logits(arch_lm), expected, atol=1e-5, rtol=1e-5)
    arch_lm.model.requires_grad_(True)
    optimiser = torch.optim.SGD(arch_lm.model.parameters(), lr=0.1)
    arch_lm.model(IDS, labels=IDS).loss.backward()
    optimiser.step()
    a = arch_lm.anatomy
    columns = model.weight_of(arch_lm.model.get_submodule(a.out_projs[0]))[:, a.head_dim : 2 * a.head_dim]
    assert np.count_nonzero(columns.detach()) == 0


# ---- other kinds of removal --------------------------------------------------------------------------


@torch.no_grad()
def hidden(lm) -> torch.Tensor:
    return lm.model.base_model(IDS, use_cache=False).last_hidden_state


@pytest.mark.parametrize("what", [{"heads": {2, 5}}, {"units": {1, 60}}], ids=str)
def test_mean_ablation_by_hand(arch_lm, what):
    """Oracle: the projection's input is kept, averaged, and its removed columns are overwritten."""
    a, inputs = arch_lm.anatomy, {}
    modules, width = (a.out_projs, a.head_dim) if "heads" in what else (a.down_projs, 1)
    n = a.n_heads if "heads" in what else a.n_units
    keep = [
        arch_lm.model.get_submodule(m).register_forward_pre_hook(lambda _, x, m=m: inputs.setdefault(m, x[0]))
        for m in modules
    ]
    hidden(arch_lm)
    for handle in keep:
        handle.remove()
    means = {m: inputs[m].flatten(0, -2).mean(0) for m in modules}
    (parts,) = what.values()

    def overwrite(module, args, layer):
        x = args[0].clone()
        for part in (p - layer * n for p in parts if p // n == layer):
            x[..., part * width : (part + 1) * width] = means[modules[layer]][part * width : (part + 1) * width]
        return (x,)

    hooks = [
        arch_lm.model.get_submodule(m).register_forward_pre_hook(partial(overwrite, layer=i))
        for i, m in enumerate(modules)
    ]
    slow = hidden(arch_lm)
    for handle in hooks:
        handle.remove()
    with masked(ablating(arch_lm, "mean", IDS), Pruning(**what)):
        fast = hidden(arch_lm)
    assert torch.allclose(fast, slow, atol=1e-4) and not torch.allclose(fast, hidden(arch_lm), atol=1e-3)


def test_uniform_ablation_is_a_query_of_zeros(arch_lm):
    """Oracle: the rows of the query projection that belong to the head are set to zero in the weights."""
    a, head = arch_lm.anatomy, 5
    layer, h = divmod(head, a.n_heads)
    name = a.q_projs[layer]
    module = arch_lm.model.get_submodule(name)
    rows = torch.arange(h * a.head_dim, (h + 1) * a.head_dim)
    if name.endswith("query_key_value"):
        rows = rows + 2 * h * a.head_dim  # heads · (q, k, v)
    with masked(ablating(arch_lm, "uniform", IDS), Pruning(heads={head})):
        fast = hidden(arch_lm)
    whole, before = hidden(arch_lm), {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        weight_of(module)[rows] = 0
        if module.bias is not None:
            module.bias[rows] = 0
    slow = hidden(arch_lm)
    module.load_state_dict(before)
    assert torch.allclose(fast, slow, atol=1e-5) and not torch.allclose(fast, whole, atol=1e-3)
    assert torch.equal(hidden(arch_lm), whole), "the model is as it came"


def test_slopes_of_mean_ablation_by_finite_differences(tiny):
    other = ablating(tiny, "mean", IDS)
    loss = lambda: hidden(tiny).square().sum((1, 2))  # noqa: E731
    gradients = mask_gradients(
        other,
        [(torch.arange(3), IDS)],
        lambda n, ids: tiny.model.base_model(ids, use_cache=False).last_hidden_state.square().sum((1, 2)),
        3,
    )
    for head in (1, 6):
        ends = []
        for scale in (0.99, 1.01):
            mask = torch.ones(1, tiny.anatomy.n_layers, tiny.anatomy.n_heads)
            mask.view(-1)[head] = scale
            with scaled(other, heads=mask):
                ends.append(loss())
        slope = (ends[1] - ends[0]) / 0.02
        assert gradients.reshape(3, -1)[:, head] == pytest.approx(slope.numpy(), rel=0.05, abs=0.05)


def test_other_ablations_refuse_what_they_cant_do(tiny, tmp_path):
    with pytest.raises(ValueError, match="ablation 'nought' is unknown"):
        ablating(tiny, "nought", IDS)
    with pytest.raises(ValueError, match="removed by zeroing can be exported"):
        export(ablating(tiny, "mean", IDS), Pruning(heads={1}), tmp_path / "x")
    with pytest.raises(ValueError, match="uniform ablation has no first-order effects"):
        mask_gradients(ablating(tiny, "uniform", IDS), [(torch.arange(3), IDS)], lambda n, ids: ids.sum(1), 3)
    same = ablating(tiny, "zero", IDS)
    assert not same.means and not same.uniform and not (tmp_path / "x").exists()
