"""Wanda and SNIP against one example and one weight matrix at a time; set differences; zeroed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from biasprune import ablate
from biasprune import weightscores as ws

PROMPTS = ["the friend is", "my neighbour", "a very old friend who was"]
RESPONSES = ["kind and gentle", "rude", "awful . the"]


def SETS(lm):
    """One example to prune for, two to protect."""
    return ws.examples(lm, PROMPTS[:1], RESPONSES[:1]), [
        ws.examples(lm, PROMPTS[i:], RESPONSES[i:]) for i in (1, 2)
    ]


def alone(lm, i):
    """One example without padding: ids (1, tokens), and which tokens are the response's."""
    start = lm.tokenizer(PROMPTS[i])["input_ids"]
    answer = lm.tokenizer(RESPONSES[i])["input_ids"]
    counted = torch.tensor([[False] * len(start) + [True] * len(answer)])
    return torch.tensor([start + answer]), counted


def inputs_of(lm, ids) -> dict[str, torch.Tensor]:
    """Oracle: what goes into every matrix, by plain hooks on one example."""
    seen, handles = {}, []
    for layer in range(lm.anatomy.n_layers):
        for name, module in ws.linears(lm, layer).items():

            def keep(module, args, name=name):
                seen[name] = args[0].detach().reshape(ids.shape[1], -1).double()

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        lm.model(ids)
    for h in handles:
        h.remove()
    return seen


def test_input_norms_and_wanda(arch_lm):
    """Every architecture, against the published formula."""
    of = ws.examples(arch_lm, PROMPTS, RESPONSES)
    got = ws.input_norms(arch_lm, of, batch_tokens=16)
    expected = {}
    for i in range(3):
        ids, counted = alone(arch_lm, i)
        for name, x in inputs_of(arch_lm, ids).items():
            expected[name] = expected.get(name, 0) + x[counted[0]].square().sum(0) / 3
    assert got.keys() == expected.keys() and len(got) >= 4 * arch_lm.anatomy.n_layers
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    name, score = next(iter(ws.wanda(arch_lm, got, 1).items()))
    weight = ws.weight_of(arch_lm.model.get_submodule(name)).detach().double()
    torch.testing.assert_close(score.double(), weight.abs() * expected[name].sqrt(), rtol=1e-3, atol=1e-5)


def test_as_published_scores_every_layer_on_the_embeddings(arch_lm):
    """Oracle: the public notebook's loop, layer by layer, never passing the outputs on."""
    of = ws.examples(arch_lm, PROMPTS[:1], RESPONSES[:1])
    corrected = ws.input_norms(arch_lm, of)
    published = ws.input_norms(arch_lm, of, rule="as_published")
    first, second = (set(ws.linears(arch_lm, layer)) for layer in (0, 1))
    for name in first:
        torch.testing.assert_close(published[name], corrected[name])
    assert any(not torch.allclose(published[n], corrected[n], rtol=1e-2) for n in second)
    with ablate.recorded(arch_lm, [0]) as clean, torch.no_grad():
        arch_lm.model(of.ids)
    x = clean.hidden[0].double()
    layer = arch_lm.model.get_submodule(arch_lm.anatomy.layers[1])
    name = next(iter(ws.linears(arch_lm, 1)))
    if "attn" in name and "o_proj" not in name and hasattr(layer, "input_layernorm"):
        with torch.no_grad():
            expected = layer.input_layernorm(x.float()).double()[of.counted].square().sum(0)
        torch.testing.assert_close(published[name], expected, rtol=1e-3, atol=1e-5)


def per_example_snip(lm) -> dict[str, torch.Tensor]:
    """Oracle: one example, one backward pass, gradients of the weights themselves."""
    total = {}
    for i in range(3):
        ids, counted = alone(lm, i)
        lm.model.requires_grad_(True)
        lm.model.zero_grad()
        logits = lm.model(ids).logits[0, :-1]
        F.cross_entropy(logits[counted[0, 1:]], ids[0, 1:][counted[0, 1:]]).backward()
        for layer in range(lm.anatomy.n_layers):
            for name, m in ws.linears(lm, layer).items():
                grad = m.weight.grad.T if isinstance(m, Conv1D) else m.weight.grad
                total[name] = total.get(name, 0) + (ws.weight_of(m).detach() * grad).abs()
        lm.model.zero_grad()
        lm.model.requires_grad_(False)
    return total


@pytest.mark.parametrize(("at_once", "tokens"), [(1, 2048), (2, 12)])
def test_snip(arch_lm, at_once, tokens):
    expected = per_example_snip(arch_lm)
    of = ws.examples(arch_lm, PROMPTS, RESPONSES)
    got, order = {}, []
    for layer, scores in ws.snip(arch_lm, of, at_once=at_once, batch_tokens=tokens):
        order.append(layer)
        got |= scores
    assert order == list(range(arch_lm.anatomy.n_layers)) and got.keys() == expected.keys()
    for name in got:
        scale = float(expected[name].max())
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=1e-4 * scale)
    assert not any(p.requires_grad or p.grad is not None for p in arch_lm.model.parameters())


def test_unit_snip_of_a_batch_is_that_of_its_examples(arch_lm):
    of = ws.examples(arch_lm, PROMPTS, RESPONSES)
    together, apart = (ws.part_snip(arch_lm, of, batch_tokens=n) for n in (2048, 1))
    np.testing.assert_allclose(together, apart, rtol=1e-2, atol=1e-4 * apart.max())


def test_unit_scores(tiny):
    """SNIP of units by finite differences; Wanda of units by columns."""
    of = ws.examples(tiny, PROMPTS, RESPONSES)
    got = ws.part_snip(tiny, of, batch_tokens=20)
    for layer, unit in ((0, 3), (1, 7), (2, 40)):
        total = 0.0
        for i in range(3):
            ids, counted = alone(tiny, i)
            losses = []
            for step in (1e-2, -1e-2):
                mask = torch.ones(3, 48)
                mask[layer, unit] += step
                with torch.no_grad(), ablate.masked(tiny, units=mask):
                    losses.append(float(ws.mean_nll(tiny, ids, counted)))
            total += abs(losses[0] - losses[1]) / 2e-2
        assert got[layer, unit] == pytest.approx(total, rel=0.05, abs=1e-3)
    norms = ws.input_norms(tiny, of)
    name = tiny.anatomy.down_projs[1]
    column = tiny.model.get_submodule(name).weight[:, 5].double().norm()
    assert ws.part_wanda(tiny, norms)[1, 5] == pytest.approx(float(column * norms[name][5].sqrt()))


@given(st.data())
def test_top_share_and_difference(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    a, b = (torch.tensor(rng.permutation(rows * columns).reshape(rows, columns) * 1.0) for _ in "ab")
    p, q = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    whole = ws.top_share(a, p)
    assert whole.sum() == int(p * a.numel() + 1e-9)
    assert not whole.any() or whole.all() or a[whole].min() > a[~whole].max()
    by_row = ws.top_share(a, p, per_row=True)
    assert (by_row.sum(1) == int(p * columns + 1e-9)).all()
    assert torch.equal(ws.set_difference(a, [b], p, q), whole & ~ws.top_share(b, q))
    assert not ws.set_difference(a, [a], p, p).any(), "nothing is left of a score minus itself"


def test_zeroed_weights_come_back(arch_lm):
    before = {k: v.clone() for k, v in arch_lm.model.state_dict().items()}
    of = ws.examples(arch_lm, PROMPTS, RESPONSES)
    norms = ws.input_norms(arch_lm, of)
    chosen = {n: ws.top_share(s, 0.3) for n, s in ws.wanda(arch_lm, norms, 1).items()}
    with torch.no_grad():
        whole = arch_lm.model(of.ids).logits
        with pytest.raises(RuntimeError, match="on purpose"), ablate.zeroed(arch_lm, chosen):
            for name, mask in chosen.items():
                assert (ws.weight_of(arch_lm.model.get_submodule(name))[mask] == 0).all()
            assert not torch.allclose(arch_lm.model(of.ids).logits, whole)
            raise RuntimeError("on purpose")
    for k, v in arch_lm.model.state_dict().items():
        assert torch.equal(v, before[k])


def test_zeroed_columns_are_a_masked_unit(tiny):
    """A unit's column of the down projection is the unit."""
    name, ids = tiny.anatomy.down_projs[1], torch.tensor([[3, 5, 7, 9]])
    weight = torch.zeros_like(tiny.model.get_submodule(name).weight, dtype=torch.bool)
    weight[:, 4] = True
    units = torch.ones(3, 48)
    units[1, 4] = 0
    with torch.no_grad():
        with ablate.zeroed(tiny, {name: weight}):
            one = tiny.model(ids).logits
        with ablate.masked(tiny, units=units):
            other = tiny.model(ids).logits
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: ws.examples(lm, [], []), "0 prompts and 0 responses"),
        (lambda lm: ws.examples(lm, ["a"], [""]), "response 0 is empty"),
        (lambda lm: ws.examples(lm, ["a " * 70], ["a"]), "the context is 64"),
        (lambda lm: ws.input_norms(lm, ws.examples(lm, ["a"], ["a"]), rule="x"), "corrected or as_published"),
        (lambda lm: ws.top_share(torch.ones(2, 2), 1.5), "share = 1.5"),
        (lambda lm: ws.top_share(torch.tensor([float("nan")]), 0.5), "NaN"),
        (
            lambda lm: ablate.zeroed(lm, {lm.anatomy.out_projs[0]: torch.ones(1, 1).bool()}).__enter__(),
            "mask \\(1, 1\\)",
        ),
        (
            lambda lm: ablate.zeroed(lm, {lm.anatomy.out_projs[0]: torch.tensor([10**9])}).__enter__(),
            "index outside",
        ),
        (
            lambda lm: ws.set_differences(lm, *SETS(lm), [(0.1, 0.1)], granularity="unit"),
            "choose weight, neuron or head",
        ),
    ],
)
def test_bad_input(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_set_differences_are_the_definition(tiny, score):
    """Several thresholds from one pass; every granularity against scores and cuts made by hand."""
    bias, protect = SETS(tiny)
    sets, shares = [bias, *protect], [(0.5, 0.2), (0.3, 0.3)]
    got = ws.set_differences(tiny, bias, protect, shares, granularity="weight", score=score, at_once=2)
    if score == "snip":
        scores = [{n: s for _, named in ws.snip(tiny, x) for n, s in named.items()} for x in sets]
    else:
        norms = [ws.input_norms(tiny, x) for x in sets]
        scores = [{k: v for i in range(3) for k, v in ws.wanda(tiny, n, i).items()} for n in norms]
    for pruning, (p, q) in zip(got, shares, strict=True):
        assert pruning.weights.keys() == scores[0].keys()
        for name, index in pruning.weights.items():
            ranked = [np.argsort(-s[name].flatten().numpy(), kind="stable") for s in scores]
            top = [set(r[: int(k * len(r))].tolist()) for r, k in zip(ranked, (p, q, q), strict=True)]
            assert set(index.tolist()) == top[0] - top[1] - top[2]
    for granularity, what, layerwise in (("neuron", "units", True), ("head", "heads", False)):
        got = ws.set_differences(tiny, bias, protect, [(0.5, 0.2)], granularity=granularity, score=score)
        if score == "snip":
            own = [torch.from_numpy(ws.part_snip(tiny, x, what)) for x in sets]
        else:
            own = [torch.from_numpy(ws.part_wanda(tiny, n, what)) for n in norms]
        expected = ws.set_difference(own[0], own[1:], 0.5, 0.2, per_row=layerwise)
        assert torch.equal(getattr(got[0], what), expected) and got[0].weights == {}


def test_a_selection_of_nothing_says_so(tiny):
    with pytest.warns(UserWarning, match=r"neuron: top 0.0 minus top 0.1 selects nothing"):
        (empty,) = ws.set_differences(tiny, *SETS(tiny), [(0.0, 0.1)], granularity="neuron")
    assert len(empty) == 0
    for granularity in ws.GRANULARITIES:
        with pytest.warns(UserWarning, match=r"top 1.0 minus top 0.0 selects everything in some layer"):
            ws.set_differences(tiny, *SETS(tiny), [(1.0, 0.0)], granularity=granularity)


def test_wanda_of_a_head_is_that_of_its_columns(tiny):
    norms = ws.input_norms(tiny, ws.examples(tiny, PROMPTS, RESPONSES))
    name, a = tiny.anatomy.out_projs[2], tiny.anatomy
    own = slice(a.head_dim, 2 * a.head_dim)
    columns = tiny.model.get_submodule(name).weight[:, own].double()
    expected = (columns.square() * norms[name][own]).sum().sqrt()
    assert ws.part_wanda(tiny, norms, "heads")[2, 1] == pytest.approx(float(expected))


def test_prunings(tiny):
    """Applied and taken back, intersected, and drawn at random with as many per layer or matrix."""
    ids = torch.tensor([[3, 5, 7, 9]])
    bias, protect = SETS(tiny)
    made = [
        ws.set_differences(tiny, bias, protect[:1], [(0.5, 0.2), (0.3, 0.2)], granularity=g)
        for g in ws.GRANULARITIES
    ]
    with torch.no_grad():
        whole = tiny.model(ids).logits
        for large, small in made:
            with large.applied(tiny):
                assert not torch.allclose(tiny.model(ids).logits, whole)
            assert torch.equal(tiny.model(ids).logits, whole)
            both = large & small
            assert len(both) == len(small) and len(both & both) == len(both) > 0
            drawn, again, other = (large.random(tiny, s) for s in (0, 0, 1))
            assert len(drawn) == len(large) and len(drawn & again) == len(drawn) > len(drawn & other)
            for name, index in large.weights.items():
                assert len(drawn.weights[name].unique()) == len(index)
            for what in ("units", "heads"):
                if getattr(large, what) is not None:
                    assert torch.equal(getattr(drawn, what).sum(1), getattr(large, what).sum(1))
    weights, units = made[0][0], made[1][0]
    assert len(weights & units) == 0
    everything = ablate.Pruning(weights={tiny.anatomy.out_projs[0]: torch.arange(32 * 32)})
    assert len(everything.random(tiny, 0)) == 32 * 32
