"""Windows, losses and perplexity: against recipes and plain loops, for heads and units of every architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCAB, WORDS, random_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from biasprune.core import resume
from biasprune.core.masks import Pruning, masked
from biasprune.core.perplexity import Windows, windows
from biasprune.measures.prose import Prose, prose


def words(n: int) -> str:
    return " ".join(np.random.default_rng(0).choice(WORDS, n))


def with_context(context: int):
    lm = random_lm("gpt2")
    lm.model.config.n_positions = context
    return lm


def targets(w: Windows) -> list[list[int]]:
    """Token ids predicted by every window."""
    return [ids[a:b].tolist() for ids, a, b in zip(w.ids, w.first, w.last, strict=True)]


SMALL, LARGE = with_context(64), with_context(4096)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 300), length=st.integers(2, 64))
def test_corrected_windows_predict_every_token_once(n, length):
    w = windows(SMALL, words(n), length=length)
    assert sum(targets(w), []) == SMALL.tokenizer(words(n))["input_ids"][1:], "in order, none twice, none left out"
    assert w.ids.shape[1] <= length and (w.counts > 0).all() and w.counts.sum() == w.counted.sum()


def recipe(n: int, length: int) -> list[tuple[int, list[int]]]:
    """Transformers' recipe for fixed-length models, stride 512: (begin, positions predicted) of every window."""
    out, prev_end = [], 0
    for begin in range(0, n, 512):
        end = min(begin + length, n)
        labels = list(range(begin, end))
        labels[: prev_end - end] = [-100] * len(labels[: prev_end - end])
        if predicted := [p for p in labels[1:] if p != -100]:  # the loss shifts: the first is never predicted
            out.append((begin, predicted))
        prev_end = end
        if end == n:
            break
    return out


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 2600), length=st.sampled_from([64, 256, 511, 512, 513, 700, 1024]))
def test_published_windows_are_the_recipes(n, length):
    ids, expected = np.array(LARGE.tokenizer(words(n))["input_ids"]), recipe(n, length)
    w = windows(LARGE, words(n), rule="as_published", length=length)
    assert targets(w) == [ids[p].tolist() for _, p in expected]
    rows = [ids[begin : begin + last].tolist() for (begin, _), last in zip(expected, w.last, strict=True)]
    assert [row[:last].tolist() for row, last in zip(w.ids, w.last, strict=True)] == rows


def test_published_windows_of_gpt2_skip_every_other_block():
    lm, text = with_context(1024), words(2048)
    ids, w = lm.tokenizer(text)["input_ids"], windows(lm, text, rule="as_published")
    assert w.ids.shape == (4, 256) and targets(w) == [ids[b + 1 : b + 256] for b in (0, 512, 1024, 1536)]
    assert windows(lm, text).counts.sum() == 2047 and windows(lm, text, max_tokens=37).counts.sum() == 36
    for options in ({"rule": "published"}, {"length": 1025}, {"max_tokens": 1}):
        with pytest.raises(ValueError, match="choose one of corrected|choose 2 to 1024|fewer than two tokens"):
            windows(lm, text, **options)


def test_windows_start_with_the_tokenizers_first_token(tiny):
    text, begin = words(30), TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    plain = tiny.tokenizer(text)["input_ids"]
    tiny.tokenizer.backend_tokenizer.post_processor = begin
    w = windows(tiny, text, length=8)
    assert (w.ids[:, 0] == 0).all() and sum(targets(w), []) == plain
    published = windows(tiny, text, length=8, rule="as_published")
    assert published.ids[0, :8].tolist() == [0, *plain[:7]], "as published: the text's start alone"


def slow_nll(lm, w: Windows, pruning: Pruning) -> list[float]:
    """A plain loop: one window, unpadded, one token at a time."""
    out = []
    for ids, first, last in zip(w.ids, w.first, w.last, strict=True):
        with torch.no_grad(), masked(lm, pruning):
            logp = torch.log_softmax(lm.model(ids[None, :last]).logits[0].double(), -1)
        out.append(-sum(float(logp[t - 1, ids[t]]) for t in range(first, last)) / (last - first))
    return out


def prunings(lm) -> list[Pruning]:
    a = lm.anatomy  # nothing; heads and units of the first, a middle and the last layer; both
    heads = [Pruning(heads=frozenset(h)) for h in ([1], [a.n_heads + 2, a.n_flat - 1], [a.n_flat - 1])]
    units = [Pruning(units=frozenset(range(i, i + a.n_units // 2))) for i in (0, a.n_units, 2 * a.n_units)]
    return [Pruning(), *heads, *units, heads[1] | units[1]]


def losses(lm, measure: Prose, many: list[Pruning]) -> np.ndarray:
    return measure.readings(measure.read(lm, many)).values


def test_losses_equal_the_plain_loop_and_whole_passes(arch_lm, monkeypatch):
    """Resumed at the first pruned layer, run from the bottom, or one by one: the same, for heads and for units."""
    measure, many = prose(arch_lm, words(50), length=16), prunings(arch_lm)
    got, expected = losses(arch_lm, measure, many), np.array([slow_nll(arch_lm, measure.cut, p) for p in many])
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert (np.abs(expected[1:] - expected[0]).max(1) > 1e-4).all(), "all matter, so the test can fail"
    assert len({resume.first_layer(arch_lm, p) for p in many}) > 2, "they begin at several layers"
    monkeypatch.setattr(resume, "first_layer", lambda lm, pruning: 0)
    np.testing.assert_allclose(losses(arch_lm, measure, many), got, atol=1e-5)
    np.testing.assert_array_equal(slow_nll(arch_lm, measure.cut, Pruning()), expected[0])  # it leaves as it came


def test_windows_that_begin_with_context_and_any_batch(tiny):
    cut = Windows(ids=torch.arange(24).view(2, 12) % VOCAB, first=np.array([1, 7]), last=np.array([12, 10]), rule="")
    many, two = prunings(tiny)[:3], prose(tiny, words(20), length=12)
    for batch_tokens in (1, 16, 50, 10_000):
        measure = replace(two, cut=cut, items=two.items.iloc[:2], batch_tokens=batch_tokens)
        np.testing.assert_allclose(losses(tiny, measure, many), [slow_nll(tiny, cut, p) for p in many], atol=2e-5)


@pytest.mark.parametrize(("rule", "weight"), [("corrected", [15, 15, 9]), ("as_published", [1])])
def test_perplexity_weighs_tokens_or_windows(tiny, rule, weight):
    measure, many = prose(tiny, words(40), rule=rule, length=16), prunings(tiny)[:2]
    read, nll = measure.readings(measure.read(tiny, many)), [slow_nll(tiny, measure.cut, p) for p in many]
    assert read.bias() == pytest.approx(np.exp([np.average(row, weights=weight) for row in nll]), rel=1e-4)
    counts = np.random.default_rng(0).multinomial(len(weight), [1 / len(weight)] * len(weight), size=5)
    for drawn, got in zip(counts * weight, read.bias(counts.astype(float)), strict=True):  # as the bootstrap draws
        assert got == pytest.approx(np.exp(nll @ drawn / drawn.sum()), rel=1e-4)
