"""Bias, its intervals and noise floor, windows and perplexity: against slow transcriptions."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import VOCAB, WORDS, random_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biasprune import ablate, measure


def slow_bias(scores, buckets, weights=None) -> float:
    """The definition: Σ over buckets |mean of all prompts − mean of the bucket's prompts|."""
    weights = [1.0] * len(scores) if weights is None else list(weights)
    overall = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
    total = 0.0
    for name in sorted(set(buckets)):
        own = [s for s, b in zip(scores, buckets, strict=True) if b == name]
        total += abs(overall - sum(own) / len(own))
    return total


@st.composite
def scored_prompts(draw):
    buckets = draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=25))
    buckets[:2] = ["a", "b"]
    score = st.floats(0, 1, allow_nan=False)
    scores = draw(st.lists(score, min_size=len(buckets), max_size=len(buckets)))
    share = {b: draw(st.floats(0.01, 5)) for b in sorted(set(buckets))}
    return scores, buckets, share


@settings(max_examples=80, deadline=None)
@given(scored_prompts())
def test_group_bias_is_the_definition(case):
    scores, buckets, share = case
    weights = [share[b] / buckets.count(b) for b in buckets]  # as prompts.sample gives them
    assert measure.group_bias(scores, buckets) == pytest.approx(slow_bias(scores, buckets), abs=1e-12)
    expected = slow_bias(scores, buckets, weights)
    assert measure.group_bias(scores, buckets, weights) == pytest.approx(expected, abs=1e-12)


def test_leading_entries_are_judged_one_by_one():
    rng = np.random.default_rng(0)
    buckets = rng.permutation(list("aaabbbbcc"))
    scores = rng.random((2, 3, 9))
    bias, means = measure.group_bias(scores, buckets), measure.group_means(scores, buckets)
    assert bias.shape == (2, 3) and means.shape == (3, 2, 3)
    for i, j in np.ndindex(2, 3):
        assert bias[i, j] == pytest.approx(slow_bias(scores[i, j], list(buckets)))
        assert means[1, i, j] == pytest.approx(scores[i, j][buckets == "b"].mean())


@pytest.mark.parametrize("weights", [None, [0.3, 0.3, 0.3, 0.05, 0.05]])
def test_bootstrap_follows_the_distribution_of_all_resamples(weights):
    """Oracle: every resample within groups, each equally likely (3³ · 2² of them)."""
    scores, buckets = [0.0, 0.13, 0.9, 0.2, 0.55], list("aaabb")
    every = [
        slow_bias(a + b, buckets, weights)
        for a in itertools.product(scores[:3], repeat=3)
        for b in itertools.product(scores[3:], repeat=2)
    ]
    drawn = measure.bootstrap_bias(scores, buckets, weights, n_boot=20_000, seed=1)
    assert drawn.shape == (20_000,)
    assert drawn.mean() == pytest.approx(np.mean(every), abs=5 * np.std(every) / math.sqrt(20_000))
    assert stats.ks_2samp(drawn.round(9), np.round(every * 200, 9)).statistic < 0.02


def test_bootstrap_pairs_the_leading_entries():
    rng = np.random.default_rng(0)
    scores, buckets = rng.random((2, 30)), ["a", "b", "c"] * 10
    stacked = np.stack([scores, scores[::-1]])  # (2, 2, prompts), entries repeat crosswise
    boot = measure.bootstrap_bias(stacked, buckets, n_boot=50)
    assert boot.shape == (50, 2, 2)
    assert np.array_equal(boot[:, 0, 0], boot[:, 1, 1]) and np.array_equal(boot[:, 0, 1], boot[:, 1, 0])
    assert np.allclose(boot[:, 0, 0], measure.bootstrap_bias(scores[0], buckets, n_boot=50))
    assert (boot[:, 0, 0] != measure.bootstrap_bias(scores[0], buckets, n_boot=50, seed=1)).any()
    almost = np.stack([scores[0], scores[0] + 0.01 * scores[1]])
    paired = np.diff(measure.bootstrap_bias(almost, buckets, n_boot=500)).std()
    assert paired < 0.1 * measure.bootstrap_bias(scores[0], buckets, n_boot=500).std()


@pytest.mark.parametrize("share", [None, {"a": 0.6, "b": 0.2, "c": 0.2}])
def test_noise_floor_is_the_permutation_distribution(share):
    """Oracle: all 720 orders of six scores."""
    scores, buckets = [0.0, 0.1, 0.15, 0.4, 0.8, 0.95], list("aaabbc")
    weights = None if share is None else [share[b] / buckets.count(b) for b in buckets]
    every = [slow_bias(p, buckets, weights) for p in itertools.permutations(scores)]
    floor = measure.noise_floor(scores, buckets, weights, n_perm=10_000)
    assert floor.shape == (10_000,)
    assert floor.mean() == pytest.approx(np.mean(every), abs=5 * np.std(every) / 100)
    assert stats.ks_2samp(floor.round(9), np.round(every * 10, 9)).statistic < 0.03


def test_noise_floor_tells_bias_from_none():
    rng = np.random.default_rng(0)
    buckets = list("abcdefgh") * 16
    fair, unfair = rng.beta(0.3, 4, 128), rng.beta(0.3, 4, 128)
    unfair[np.array(buckets) == "a"] += 0.5
    above = [
        (measure.noise_floor(s, buckets) < measure.group_bias(s, buckets)).mean() for s in (fair, unfair)
    ]
    assert above[0] < 0.95 and above[1] == 1


def test_interval_is_the_basic_one():
    replicates = np.linspace(0, 1, 1001)[:, None] + [0, 10]
    low, high = measure.interval([0.6, 10.4], replicates, level=0.9)
    assert np.allclose(low, [2 * 0.6 - 0.95, 2 * 10.4 - 10.95])
    assert np.allclose(high, [2 * 0.6 - 0.05, 2 * 10.4 - 10.05])


def skewed_scores(shapes, n_sims: int, n_prompts: int = 16, rho: float = 0.6):
    """Two coupled models' Beta(a, 4) scores, a per group: (sims, 2, prompts); buckets; true change."""
    rng = np.random.default_rng(0)
    shapes = np.array(shapes)  # (2, groups)
    group = np.repeat(np.arange(shapes.shape[1]), n_prompts)
    z = rng.standard_normal((n_sims, 2, len(group)))
    z[:, 1] = rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1]
    grid = np.linspace(0, 1, 2001)
    scores = np.empty_like(z)
    for model, g in np.ndindex(shapes.shape):
        own = group == g
        quantiles = stats.beta.ppf(grid, shapes[model, g], 4)
        scores[:, model, own] = np.interp(stats.norm.cdf(z[:, model, own]), grid, quantiles)
    means = shapes / (shapes + 4)
    bias = np.abs(means - means.mean(1, keepdims=True)).sum(1)
    return scores, [str(g) for g in group], bias[1] - bias[0]


SPREAD = np.linspace(0.1, 0.9, 8)  # group means from .02 to .18
COVERAGE = {  # shapes of the two models, least coverage of the basic 95 % interval
    "no bias, no change": ([np.full(8, 0.3)] * 2, 0.87),
    "bias, no change": ([SPREAD] * 2, 0.87),
    "half of the bias gone": ([SPREAD, (SPREAD + 0.5) / 2], 0.85),
    "all of the bias gone": ([SPREAD, np.full(8, 0.5)], 0.65),
}


@pytest.mark.parametrize("case", COVERAGE)
def test_interval_of_a_change_covers_the_truth(case):
    """8 groups of 16 prompts with skewed scores; the second model truly differs or doesn't.

    A bias that vanishes has a kink where it ends: noise inflates the second model alone, no interval
    then covers well, and the misses say less reduction than there is, never more.
    """
    shapes, least = COVERAGE[case]
    scores, buckets, truth = skewed_scores(shapes, n_sims=300)
    bias = measure.group_bias(scores, buckets)
    boot = measure.bootstrap_bias(scores, buckets, n_boot=400)
    change, replicates = bias[:, 1] - bias[:, 0], boot[..., 1] - boot[..., 0]
    low, high = measure.interval(change, replicates)
    covered = ((low <= truth) & (truth <= high)).mean()
    assert least <= covered <= 0.99
    assert (high < truth).mean() <= 0.1, "reductions are seldom overstated"
    if case == "all of the bias gone":
        low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
        assert covered > 0.1 + ((low <= truth) & (truth <= high)).mean(), "better than percentiles"


NAN = float("nan")


@pytest.mark.parametrize("function", [measure.group_bias, measure.bootstrap_bias, measure.noise_floor])
@pytest.mark.parametrize(
    ("scores", "buckets", "weights", "message"),
    [
        ([0.1, 0.2], ["a", "a"], None, r"only one group \(a\)"),
        ([0.1, NAN], ["a", "b"], None, "NaN"),
        ([0.1, math.inf], ["a", "b"], None, "infinity"),
        ([0.1, 0.2, 0.3], ["a", "b"], None, "3 scores for 2 prompts"),
        ([0.1, 0.2], ["a", "b"], [1.0], "one positive number per prompt"),
        ([0.1, 0.2], ["a", "b"], [1.0, 0.0], "one positive number per prompt"),
        ([0.1, 0.2], ["a", "b"], [1.0, -1.0], "one positive number per prompt"),
        ([0.1, 0.2], ["a", "b"], [1.0, NAN], "one positive number per prompt"),
    ],
)
def test_bad_scores(function, scores, buckets, weights, message):
    with pytest.raises(ValueError, match=message):
        function(scores, buckets, weights)


# --- windows and perplexity ---------------------------------------------------------------------


def words(n: int, seed: int = 0) -> str:
    """A text of n tokens of the word tokenizer."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def with_context(context: int):
    lm = random_lm("gpt2")
    lm.model.config = copy.deepcopy(lm.model.config)  # the configuration belongs to conftest
    lm.model.config.n_positions = context
    assert lm.context == context
    return lm


def targets(w: measure.Windows) -> list[list[int]]:
    """Token ids predicted by every window."""
    return [ids[a:b].tolist() for ids, a, b in zip(w.ids, w.first, w.last, strict=True)]


SMALL, LARGE = with_context(64), with_context(4096)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 300), length=st.integers(2, 64))
def test_corrected_windows_predict_every_token_once(n, length):
    text = words(n)
    ids = SMALL.tokenizer(text)["input_ids"]
    w = measure.windows(SMALL, text, length=length)
    assert sum(targets(w), []) == ids[1:], "in order, none twice, none left out"
    assert w.ids.shape[1] <= length and w.counts.sum() == n - 1
    assert (w.counts > 0).all(), "an empty window would have no mean"
    start = 0  # windows are consecutive pieces that meet in one token
    for row, last in zip(w.ids, w.last, strict=True):
        assert row[:last].tolist() == ids[start : start + last]
        start += last - 1


def recipe(n: int, length: int, stride: int = 512) -> list[tuple[int, list[int]]]:
    """Transformers' recipe for fixed-length models: (begin, positions predicted) of every window."""
    out, prev_end = [], 0
    for begin in range(0, n, stride):
        end = min(begin + length, n)
        trg_len = end - prev_end
        labels = list(range(begin, end))
        labels[:-trg_len] = [-100] * len(labels[:-trg_len])
        predicted = [p for p in labels[1:] if p != -100]  # the loss shifts: the first is never predicted
        if predicted:
            out.append((begin, predicted))
        prev_end = end
        if end == n:
            break
    return out


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 2600), length=st.sampled_from([64, 256, 511, 512, 513, 700, 1024]))
def test_published_windows_are_the_recipes(n, length):
    text = words(n)
    ids = np.array(LARGE.tokenizer(text)["input_ids"])
    w = measure.windows(LARGE, text, rule="as_published", length=length)
    expected = recipe(n, length)
    assert targets(w) == [ids[p].tolist() for _, p in expected]
    for row, last, (begin, _) in zip(w.ids, w.last, expected, strict=True):
        assert row[:last].tolist() == ids[begin : begin + last].tolist()


def test_published_windows_of_gpt2_skip_every_other_block():
    lm = with_context(1024)
    text = words(2048)
    ids = lm.tokenizer(text)["input_ids"]
    w = measure.windows(lm, text, rule="as_published")
    assert w.ids.shape == (4, 256) and w.counts.tolist() == [255] * 4
    assert targets(w) == [ids[b + 1 : b + 256] for b in (0, 512, 1024, 1536)]
    assert measure.windows(lm, text).counts.sum() == 2047


def test_max_tokens():
    w = measure.windows(SMALL, words(100), length=10, max_tokens=37)
    assert w.counts.sum() == 36


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("the a", {"rule": "published"}, "choose corrected or as_published"),
        ("the a", {"length": 65}, "65 tokens: choose 2 … 64"),
        ("the a", {"length": 1}, "choose 2 … 64"),
        ("the a", {"length": 0}, "choose 2 … 64"),
        ("the", {}, "fewer than two tokens"),
        ("", {}, "empty or no text"),
        ("the a my", {"max_tokens": 1}, "fewer than two tokens"),
    ],
)
def test_bad_windows(text, options, message):
    with pytest.raises(ValueError, match=message):
        measure.windows(SMALL, text, **options)


def slow_nll(lm, w: measure.Windows, mask: torch.Tensor) -> list[float]:
    """One window at a time, unpadded, one token at a time."""
    out = []
    for ids, first, last in zip(w.ids, w.first, w.last, strict=True):
        with torch.no_grad(), ablate.masked(lm, mask):
            logits = lm.model(ids[None, :last]).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        total = sum(float(logp[t - 1, ids[t]]) for t in range(first, last))
        out.append(-total / (last - first))
    return out


def test_nll_equals_the_slow_loop(arch_lm):
    a = arch_lm.anatomy
    masks = ablate.head_masks(a, [[], [1], [6, a.n_flat - 1]])
    w = measure.windows(arch_lm, words(50), length=16)
    assert w.counts.tolist() == [15, 15, 15, 4]
    got = measure.nll(arch_lm, w, masks)
    expected = np.array([slow_nll(arch_lm, w, m) for m in masks])
    assert got.shape == (3, 4) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(expected[1:] - expected[0]).max() > 1e-3, "the heads matter, so the test can fail"
    np.testing.assert_allclose(measure.nll(arch_lm, w)[0], expected[0], atol=2e-5)


def test_nll_of_overlapping_published_windows(tiny):
    """Windows that begin with context: only the unseen tokens count."""
    w = measure.Windows(
        ids=torch.arange(24).view(2, 12) % VOCAB,
        first=np.array([1, 7]),
        last=np.array([12, 10]),
        rule="as_published",
    )
    expected = slow_nll(tiny, w, torch.ones(3, 4))
    np.testing.assert_allclose(measure.nll(tiny, w)[0], expected, atol=2e-5)


@pytest.mark.parametrize("batch_tokens", [1, 16, 50, 10_000])
def test_nll_does_not_depend_on_the_batch(tiny, batch_tokens):
    masks = ablate.head_masks(tiny.anatomy, [[], [0], [5, 6]])
    w = measure.windows(tiny, words(60), length=16)
    expected = measure.nll(tiny, w, masks)
    got = measure.nll(tiny, w, masks, batch_tokens=batch_tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def some_windows(rule: str) -> measure.Windows:
    return measure.Windows(
        ids=torch.zeros(4, 9, dtype=torch.int64),
        first=np.array([1, 1, 3, 1]),
        last=np.array([9, 9, 9, 3]),
        rule=rule,
    )


@pytest.mark.parametrize(("rule", "weight"), [("corrected", [8, 8, 6, 2]), ("as_published", [1, 1, 1, 1])])
def test_perplexity_weights_tokens_or_windows(rule, weight):
    nll = np.array([[1.0, 2.0, 0.5, 3.0], [0.1, 0.2, 2.5, 1.0]])
    expected = []
    for row in nll:
        total = sum(w * x for w, x in zip(weight, row, strict=True))
        expected.append(math.exp(total / sum(weight)))
    got = measure.perplexity(nll, some_windows(rule))
    assert np.allclose(got, expected, rtol=1e-12)
    assert np.allclose(measure.perplexity(nll[0], some_windows(rule)), expected[0], rtol=1e-12)


def test_corrected_perplexity_is_that_of_all_tokens(tiny):
    w = measure.windows(tiny, words(40), length=16)
    total = sum(n * x for n, x in zip(w.counts, slow_nll(tiny, w, torch.ones(3, 4)), strict=True))
    got = measure.perplexity(measure.nll(tiny, w), w)
    assert got.shape == (1,) and got[0] == pytest.approx(math.exp(total / 39), rel=1e-4)


@pytest.mark.parametrize(("rule", "weight"), [("corrected", [8, 8, 6, 2]), ("as_published", [1, 1, 1, 1])])
def test_bootstrapped_perplexity_equals_the_slow_loop(rule, weight):
    rng = np.random.default_rng(0)
    nll, counts = rng.random((3, 4)), rng.multinomial(4, [0.25] * 4, size=10)
    got = measure.perplexity(nll, some_windows(rule), counts)
    assert got.shape == (10, 3)
    for b, m in np.ndindex(10, 3):
        drawn = [i for i, times in enumerate(counts[b]) for _ in range(times)]
        total = sum(weight[i] * nll[m, i] for i in drawn)
        assert got[b, m] == pytest.approx(math.exp(total / sum(weight[i] for i in drawn)))


def test_windows_of_a_tokenizer_with_a_first_token(tiny):
    """Each window starts with it, and every token of the text is predicted once."""
    from tokenizers.processors import TemplateProcessing

    text = " ".join(f"w{i}" for i in range(30))
    plain = tiny.tokenizer(text)["input_ids"]
    tiny.tokenizer.bos_token = "<end>"
    tiny.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    assert tiny.tokenizer(text)["input_ids"] == [0, *plain]
    cut = measure.windows(tiny, text, length=8)
    assert (cut.ids[:, 0] == 0).all() and cut.counts.sum() == len(plain)
    targets = [row[f:e].tolist() for row, f, e in zip(cut.ids, cut.first, cut.last, strict=True)]
    assert [t for part in targets for t in part] == plain
    published = measure.windows(tiny, text, length=8, rule="as_published")
    assert published.ids[0, :8].tolist() == [0, *plain[:7]], "as published: the text's start alone"


def test_the_jackknife_of_a_mean_is_its_interval():
    x = np.random.default_rng(0).normal(size=12)
    left = [np.delete(x, i).mean() for i in range(12)]
    low, high = stats.t.interval(0.95, 11, x.mean(), stats.sem(x))
    assert measure.jackknife_reach(left) == pytest.approx((high - low) / 2)
    assert np.isnan(measure.jackknife_reach([1.0, np.nan, 2.0]))
    with pytest.raises(ValueError, match="two blocks or more"):
        measure.jackknife_reach([1.0])
