"""Wanda and SNIP against one example and one weight matrix at a time; set differences by their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from biasprune.core import weights as ws
from biasprune.core.masks import scaled
from biasprune.core.model import encode, weight_of

PROMPTS = ["the friend is", "my neighbour", "a very old friend who was"]
RESPONSES = ["kind and gentle", "rude", "awful . the"]


def examples(lm, which=slice(None)) -> ws.Examples:
    return ws.examples(encode(lm, PROMPTS[which]), encode(lm, RESPONSES[which], special=False))


def alone(lm, i):
    """One example without padding: ids (1, tokens), and which tokens are the response's."""
    start, answer = (lm.tokenizer(t[i])["input_ids"] for t in (PROMPTS, RESPONSES))
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
    got, expected = ws.input_norms(arch_lm, examples(arch_lm), batch_tokens=16), {}
    for i in range(3):
        ids, counted = alone(arch_lm, i)
        for name, x in inputs_of(arch_lm, ids).items():
            expected[name] = expected.get(name, 0) + x[counted[0]].square().sum(0) / 3
    assert got.keys() == expected.keys() and len(got) >= 4 * arch_lm.anatomy.n_layers
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    name, score = next(iter(ws.wanda(arch_lm, got, 1).items()))
    weight = weight_of(arch_lm.model.get_submodule(name)).detach().double()
    torch.testing.assert_close(score.double(), weight.abs() * expected[name].sqrt(), rtol=1e-3, atol=1e-5)


def test_as_published_scores_every_layer_on_the_embeddings(arch_lm):
    """Oracle: the layer itself, called with the embeddings, as the public notebook's loop does."""
    of = examples(arch_lm, slice(1))
    corrected, published = (ws.input_norms(arch_lm, of, rule=r) for r in ("corrected", "as_published"))
    first, second = (set(ws.linears(arch_lm, layer)) for layer in (0, 1))
    for name in first:
        torch.testing.assert_close(published[name], corrected[name])
    assert any(not torch.allclose(published[n], corrected[n], rtol=1e-2) for n in second)
    layer = arch_lm.model.get_submodule(arch_lm.anatomy.layers[1])
    name = next(iter(ws.linears(arch_lm, 1)))
    if hasattr(layer, "input_layernorm") and "q_proj" in name:
        seen = []
        block = arch_lm.model.get_submodule(arch_lm.anatomy.layers[0])
        keep = lambda m, a, k: seen.append(a[0] if a else k["hidden_states"])  # noqa: E731
        handle = block.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            arch_lm.model(of.ids)
            expected = layer.input_layernorm(seen[0]).double()[of.counted].square().sum(0)
        handle.remove()
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
                total[name] = total.get(name, 0) + (weight_of(m).detach() * grad).abs()
        lm.model.zero_grad()
        lm.model.requires_grad_(False)
    return total


@pytest.mark.parametrize(("at_once", "tokens"), [(1, 2048), (2, 12)])
def test_snip(arch_lm, at_once, tokens):
    expected = per_example_snip(arch_lm)
    layers = list(ws.snip(arch_lm, examples(arch_lm), at_once=at_once, batch_tokens=tokens))
    got = {name: score for layer in layers for name, score in layer.items()}
    assert len(layers) == arch_lm.anatomy.n_layers and got.keys() == expected.keys()
    for name in got:
        scale = float(expected[name].max())
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=1e-4 * scale)
    assert not any(p.requires_grad or p.grad is not None for p in arch_lm.model.parameters())


@pytest.mark.parametrize("parts", ["units", "heads"])
def test_part_snip(arch_lm, parts):
    """A batch's is that of its examples, and those are finite differences."""
    of, a = examples(arch_lm), arch_lm.anatomy
    together, apart = (ws.part_snip(arch_lm, of, parts, batch_tokens=n) for n in (2048, 1))
    np.testing.assert_allclose(together, apart, rtol=1e-2, atol=1e-4 * apart.max())
    n, (layer, part) = together.shape[1], np.unravel_index(together.argmax(), together.shape)
    total = 0.0
    for i in range(3):
        ids, counted = alone(arch_lm, i)
        losses = []
        for step in (1e-2, -1e-2):
            mask = torch.ones(1, a.n_layers, n)
            mask[0, layer, part] += step
            with torch.no_grad(), scaled(arch_lm, **{parts: mask}):
                losses.append(float(ws.mean_nll(arch_lm, ids, counted)))
        total += abs(losses[0] - losses[1]) / 2e-2
    assert together[layer, part] == pytest.approx(total, rel=0.05, abs=1e-3)


def test_part_wanda_is_that_of_the_parts_columns(tiny):
    norms, a = ws.input_norms(tiny, examples(tiny)), tiny.anatomy
    head, unit = slice(a.head_dim, 2 * a.head_dim), slice(5, 6)
    for parts, name, columns, place in (
        ("heads", a.out_projs[2], head, (2, 1)),
        ("units", a.down_projs[1], unit, (1, 5)),
    ):
        weight = tiny.model.get_submodule(name).weight[:, columns].double()
        expected = (weight.square() * norms[name][columns]).sum().sqrt()
        assert ws.part_wanda(tiny, norms, parts)[place] == pytest.approx(float(expected))


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
    assert torch.equal(ws.set_difference(a, [b], p, [q]), whole & ~ws.top_share(b, q))
    assert not ws.set_difference(a, [a], p, [p]).any(), "nothing is left of a score minus itself"


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="a share of 1.5 isn't between 0 and 1"):
        ws.top_share(torch.ones(2, 2), 1.5)


@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_weight_differences_are_the_definition(tiny, score):
    """Several thresholds from one pass, against scores and cuts made by hand."""
    sets, shares = [examples(tiny, slice(i, i + 1)) for i in range(3)], [(0.5, (0.2, 0.1)), (0.3, (0.3, 0.3))]
    got = ws.weight_difference(tiny, sets, shares, score=score)
    if score == "snip":
        scores = [{n: s for layer in ws.snip(tiny, x) for n, s in layer.items()} for x in sets]
    else:
        norms = [ws.input_norms(tiny, x) for x in sets]
        scores = [{k: v for i in range(3) for k, v in ws.wanda(tiny, n, i).items()} for n in norms]
    for pruning, (p, q) in zip(got, shares, strict=True):
        assert pruning.weights.keys() == scores[0].keys()
        for name, index in pruning.weights.items():
            ranked = [np.argsort(-s[name].flatten().numpy(), kind="stable") for s in scores]
            top = [set(r[: int(k * len(r))].tolist()) for r, k in zip(ranked, (p, *q), strict=True)]
            assert set(index.tolist()) == top[0] - top[1] - top[2]
