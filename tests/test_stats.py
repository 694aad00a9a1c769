"""Bias, estimates, bootstrap and permutation nulls: against slow transcriptions and simulations with known truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biasprune.core.stats import (
    VERDICTS,
    Estimate,
    Readings,
    group_gap,
    mean,
    over_seeds,
    redrawn_mean,
    resampled,
    shuffled,
    verdict,
)


def slow_gap(values, groups, share=None) -> float:
    """The definition: Σ over groups |mean of all − mean of the group's|, with the groups' shares in the whole mean."""
    of = {g: [v for v, x in zip(values, groups, strict=True) if x == g] for g in sorted(set(groups))}
    means = {g: sum(v) / len(v) for g, v in of.items()}
    share = {g: len(v) / len(values) for g, v in of.items()} if share is None else share
    overall = sum(share[g] * means[g] for g in of) / sum(share[g] for g in of)
    return sum(abs(overall - m) for m in means.values())


def items(groups, share=None, cluster=None) -> pd.DataFrame:
    groups = list(groups)
    share = {g: groups.count(g) / len(groups) for g in groups} if share is None else share
    names = [f"item {i}" for i in range(len(groups))]
    table = pd.DataFrame({"item": names, "cluster": names if cluster is None else cluster, "group": groups})
    return table.assign(share=table["group"].map(share))


def readings(values, table, bias=group_gap, weights=None) -> Readings:
    values = np.atleast_2d(values)
    weights = np.ones((1, values.shape[1])) if weights is None else weights
    names = ["", *map(str, range(len(values) - 1))]
    return Readings(prunings=names, values=values, weights=weights, items=table, bias_of=bias)


@st.composite
def scored_items(draw):
    groups = draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=25))
    groups[:2] = ["a", "b"]
    value = st.floats(0, 1, allow_nan=False)
    values = draw(st.lists(value, min_size=len(groups), max_size=len(groups)))
    return values, groups, {g: draw(st.floats(0.01, 5)) for g in sorted(set(groups))}


@settings(max_examples=60, deadline=None)
@given(scored_items())
def test_group_gap_is_the_definition(case):
    values, groups, share = case
    assert readings(values, items(groups)).bias()[0] == pytest.approx(slow_gap(values, groups), abs=1e-12)
    got = readings(values, items(groups, share)).bias()[0]
    assert got == pytest.approx(slow_gap(values, groups, share), abs=1e-12)


def test_weights_of_items_count_within_their_group():
    """Self-normalised importance weights, one set for every pruning: a group's mean is Σ weight · value / Σ weight."""
    rng = np.random.default_rng(0)
    groups, values, weights = np.array(list("aaabbbbcc")), rng.random((3, 9)), rng.random((3, 9)) + 0.1
    got = readings(values, items(groups), weights=weights).bias()
    for row, weight, bias in zip(values, weights, got, strict=True):
        means = [np.average(row[groups == g], weights=weight[groups == g]) for g in "abc"]
        assert bias == pytest.approx(np.abs(means - np.dot([3, 4, 2], means) / 9).sum())


def test_readings_keep_items_by_key():
    """Whatever the order of rows, and with further items, an item's value is its own; seeds are averaged."""
    rng = np.random.default_rng(0)
    table = items("aabbc")
    rows = itertools.product(["", "3 17", "u5"], [0, 1], [*table["item"], "of another measure"])
    frame = pd.DataFrame(rows, columns=["pruning", "seed", "item"]).assign(value=rng.random(36), weight=rng.random(36))
    for weighed in (False, True):
        whole = frame if weighed else frame.drop(columns="weight")
        mixed = pd.concat([whole.iloc[:1], whole.iloc[1:].sample(frac=1, random_state=0)])
        one, other = (Readings.of(f, table, group_gap) for f in (whole, mixed))
        assert one.prunings == ["", "3 17", "u5"] and one.values.shape == (3, 5)
        assert np.allclose(other[one.prunings].values, one.values) and np.allclose(other.bias()[0], one.bias()[0])
        part = frame[(frame["pruning"] == "u5") & (frame["item"] == "item 2")]
        expected = np.average(part["value"], weights=part["weight"] if weighed else None)
        assert one.values[2, 2] == pytest.approx(expected)
        again = Readings.of(one.frame(), table, group_gap)
        assert np.allclose(again.values, one.values) and np.allclose(again.bias(), one.bias())


def test_first_order_readings_subtract_slopes():
    table, slopes = items("ab"), np.arange(12.0).reshape(2, 2, 3)
    one = readings([[1.0, 2.0]], table).without_parts(slopes, "units")
    assert one.prunings == ["", "u0", "u1", "u2", "u3", "u4", "u5"]
    assert one.values[2].tolist() == [0.0, -5.0] and one.z()[1] == pytest.approx(1 - 5)


@pytest.mark.parametrize("share", [None, {"a": 0.9, "b": 0.1}])
def test_bootstrap_follows_the_distribution_of_all_resamples(share):
    """Oracle: every resample within groups, each equally likely (3³ · 2² of them)."""
    values, groups = [0.0, 0.13, 0.9, 0.2, 0.55], list("aaabb")
    every = [
        slow_gap(a + b, groups, share)
        for a in itertools.product(values[:3], repeat=3)
        for b in itertools.product(values[3:], repeat=2)
    ]
    drawn = readings(values, items(groups, share)).draws(20_000, seed=1)[:, 0]
    assert drawn.mean() == pytest.approx(np.mean(every), abs=5 * np.std(every) / math.sqrt(20_000))
    assert stats.ks_2samp(drawn.round(9), np.round(every * 200, 9)).statistic < 0.02


def test_clusters_are_drawn_whole_and_within_groups():
    table = items("aaaabbbbb", cluster=list("pppqrrsss"))
    counts = resampled(table, 50)
    for _, part in table.groupby("cluster"):
        assert (counts[:, part.index] == counts[:, part.index[:1]]).all()
    clusters = counts[:, table.drop_duplicates("cluster").index]
    assert (clusters[:, :2].sum(1) == 2).all() and (clusters[:, 2:].sum(1) == 2).all()
    values, share = np.random.default_rng(0).random(9), {"a": 4, "b": 5}
    drawn = [[np.repeat(x, n) for x in (values, list("aaaabbbbb"))] for n in counts.astype(int)]
    assert np.allclose(readings(values, table).bias(counts)[:, 0], [slow_gap(*one, share) for one in drawn])
    crossed = resampled(table.assign(cluster=list("pqrpqrpqr")), 50)  # clusters across groups: drawn from all
    assert len(np.unique(crossed.sum(1))) == 1 and (crossed[:, 0] == crossed[:, 3]).all()


def test_estimates_of_one_bootstrap_are_paired():
    rng = np.random.default_rng(0)
    first, noise = rng.random((2, 30))
    one = readings([first, first + 0.01 * noise], items("abc" * 10)).estimates(500)
    assert (one["0"] - one[""]).draws.std() < 0.1 * one[""].draws.std()
    assert (one["0"] - one["0"]).interval() == (0, 0) and (one[""] / one[""] * 3.0).interval() == (3, 3)
    both = mean(one.values())
    assert both.point == pytest.approx((one[""].point + one["0"].point) / 2)
    assert np.allclose((both + both - one[""] - one["0"]).draws, 0)
    assert np.array_equal(one[""].map(np.abs).draws, np.abs(one[""].draws))
    again = readings(first, items("abc" * 10)).estimates(500)[""]
    assert np.allclose(again.draws, one[""].draws), "the same draws for the same items, whatever else is read"


def test_interval_is_the_basic_one():
    one = Estimate(0.6, np.linspace(0, 1, 1001))
    assert one.interval(0.9) == pytest.approx((2 * 0.6 - 0.95, 2 * 0.6 - 0.05))
    assert one.interval(0.9, basic=False) == pytest.approx((0.05, 0.95))
    assert one.row("x")["x_low"] == pytest.approx(2 * 0.6 - 0.975)
    assert np.isnan((one / Estimate(0.0, np.zeros(1001))).interval()).all(), "nothing to divide by"


def test_random_controls_are_drawn_along():
    """A mean of few controls is less certain than each control's own draws say."""
    rng = np.random.default_rng(0)
    controls = [Estimate(x, x + 0.1 * rng.normal(size=4000)) for x in rng.normal(size=20)]
    kept, drawn = mean(controls), redrawn_mean(controls)
    assert kept.point == pytest.approx(drawn.point) == pytest.approx(drawn.draws.mean(), abs=0.03)
    spread = np.std([c.point for c in controls], ddof=1) / math.sqrt(20) * stats.t.ppf(0.975, 19) / 1.96
    assert kept.draws.std() < 0.05 and drawn.draws.std() == pytest.approx(spread, rel=0.1)


def test_few_controls_or_seeds_cover_the_truth():
    """k seeds that scatter around the truth: about 95 % of intervals hold it, also with three seeds."""
    rng, inside = np.random.default_rng(0), []
    for k in range(300):
        seeds = [Estimate(x, x + 0.1 * rng.normal(size=400)) for x in rng.normal(0.4, 0.2, 3)]
        low, high = redrawn_mean(seeds, seed=k).interval(basic=False)
        inside.append(low < 0.4 < high)
    assert 0.9 < np.mean(inside) <= 1
    one = Estimate(0.3, rng.normal(size=50))
    assert np.array_equal(redrawn_mean([one]).draws, one.draws), "a single seed is as it is"
    assert redrawn_mean([one] * 4).draws == pytest.approx(one.draws)


def test_seeds_get_students_interval():
    x = np.random.default_rng(0).normal(size=5)
    assert over_seeds(x) == pytest.approx((x.mean(), *stats.t.interval(0.95, 4, x.mean(), stats.sem(x))))


def skewed_scores(shapes, n_sims: int, n_items: int = 16, rho: float = 0.6):
    """Two coupled models' Beta(a, 4) scores, a per group: (sims, 2, items); groups; true change."""
    rng, shapes = np.random.default_rng(0), np.array(shapes)  # (2, groups)
    group = np.repeat(np.arange(shapes.shape[1]), n_items)
    z = rng.standard_normal((n_sims, 2, len(group)))
    z[:, 1] = rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1]
    grid, scores = np.linspace(0, 1, 2001), np.empty_like(z)
    for model, g in np.ndindex(shapes.shape):
        quantiles = stats.beta.ppf(grid, shapes[model, g], 4)
        scores[:, model, group == g] = np.interp(stats.norm.cdf(z[:, model, group == g]), grid, quantiles)
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
    """8 groups of 16 items with skewed scores; the second model truly differs or doesn't.

    A bias that vanishes has a kink where it ends: noise inflates the second model alone, no interval then covers
    well, and the misses say less reduction than there is, never more.
    """
    shapes, least = COVERAGE[case]
    scores, groups, truth = skewed_scores(shapes, n_sims=300)
    stacked = readings(scores.reshape(600, -1), items(groups))  # every simulation with the same draws
    bias, boot = stacked.bias().reshape(300, 2), stacked.draws(400).reshape(400, 300, 2)
    changes = [Estimate(b[1] - b[0], d[:, 1] - d[:, 0]) for b, d in zip(bias, boot.swapaxes(0, 1), strict=True)]
    low, high = np.array([change.interval() for change in changes]).T
    covered = ((low <= truth) & (truth <= high)).mean()
    assert least <= covered <= 0.99
    assert (high < truth).mean() <= 0.1, "reductions are seldom overstated"
    if case == "all of the bias gone":
        low, high = np.array([change.interval(basic=False) for change in changes]).T
        assert covered > 0.1 + ((low <= truth) & (truth <= high)).mean(), "better than percentiles"


@pytest.mark.parametrize("share", [None, {"a": 0.6, "b": 0.2, "c": 0.2}])
def test_null_is_the_permutation_distribution(share):
    """Oracle: all 720 orders of six values."""
    values, groups = [0.0, 0.1, 0.15, 0.4, 0.8, 0.95], list("aaabbc")
    every = [slow_gap(p, groups, share) for p in itertools.permutations(values)]
    null = readings(values, items(groups, share)).null(10_000)[:, 0]
    assert null.mean() == pytest.approx(np.mean(every), abs=5 * np.std(every) / 100)
    assert stats.ks_2samp(null.round(9), np.round(every * 10, 9)).statistic < 0.03


def test_clustered_null_keeps_clusters_whole_and_is_wider():
    """Descriptors that differ by themselves: shuffled among items their groups look biased, among clusters not."""
    rng, p = np.random.default_rng(0), {"item": [], "cluster": []}
    cluster = np.repeat([f"word {i}" for i in range(24)], 10)
    table = items(np.repeat(list("abcd"), 60), cluster=cluster)
    labels = shuffled(table, "group", 20, cluster="cluster").reshape(20, 24, 10)
    assert (labels == labels[..., :1]).all() and all(sorted(x) == sorted("abcd" * 6) for x in labels[..., 0])
    for _ in range(12):
        one = readings(np.repeat(rng.normal(size=24), 10) + 0.3 * rng.normal(size=240), table)
        assert one.null(30, cluster="cluster").mean() > 2 * one.null(30).mean()
        for kind, ps in p.items():
            ps.append(one.detect(60, cluster=kind)["p"])
    assert np.mean(np.array(p["item"]) < 0.05) > 0.5 and np.mean(np.array(p["cluster"]) < 0.05) < 0.2


def test_detection_tells_bias_from_none():
    rng, groups = np.random.default_rng(0), np.array(list("abcdefgh") * 16)
    fair, unfair = rng.beta(0.3, 4, (2, 128))
    unfair[groups == "a"] += 0.5
    none, bias = (readings(x, items(groups)).detect() for x in (fair, unfair))
    assert none["p"] > 0.05 and none["bias"] < none["floor_95"] and none["n"] == 128
    assert bias["p"] == pytest.approx(1 / 1001) and bias["excess"] > bias["floor"]
    mixed = readings([unfair, fair], items(groups))
    assert mixed.detect()["bias"] == pytest.approx(bias["bias"]), "of the unpruned model, the first row"


def test_the_four_verdicts():
    answers = [(True, False, True), (False, True, True), (False, False, True), (True, False, False)]
    words = [verdict(reproduced=yes, refuted=no, biased=biased) for yes, no, biased in answers]
    assert words == list(VERDICTS)[:2] + ["too uncertain", "no bias to test"]
