"""Reliability against simulations with known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from biasprune import reliability as rel


def simulated(rng, *, heads=120, prompts=80, seeds=3, signal=0.02, between=0.1, within=0.2):
    """Scores (1 + heads, seeds, prompts): group b scores higher where a head's effect is larger."""
    effect = np.concatenate([[0], rng.normal(0, signal, heads)])
    buckets = np.array(["a", "b"] * (prompts // 2))
    values = 0.5 + np.where(buckets == "b", 0.15, 0) - effect[:, None, None] * (buckets == "b")
    values = values + rng.normal(0, between, (1 + heads, 1, prompts))
    return values + rng.normal(0, within, (1 + heads, seeds, prompts)), buckets, effect[1:]


def z_of(values, buckets):
    means = np.stack([values[..., buckets == g].mean(-1) for g in ("a", "b")])
    gap = np.abs(means - means.mean(0)).sum(0)
    return gap[:1] - gap[1:]


def test_agreement_is_the_mean_of_scipys():
    x = np.random.default_rng(0).normal(size=(4, 30)) + np.linspace(0, 3, 30)
    for method, by in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        expected = np.mean([by(x[i], x[j]).statistic for i in range(4) for j in range(i)])
        got = rel.agreement(x, method=method)
        assert got["r"] == pytest.approx(expected) and got["low"] < got["r"] < got["high"]


def test_split_half_estimates_the_reliability():
    """Truth: correlation with an independent repetition of the whole measurement, many times."""
    rng, got, truth = np.random.default_rng(1), [], []
    for _ in range(12):
        values, buckets, effect = simulated(rng)
        halves = rel.half_scores(values.mean(1), buckets, n_splits=20)
        one = rel.split_half(halves, method="pearson")
        got.append(one["r"])
        truth.append(np.corrcoef(z_of(values.mean(1), buckets), effect)[0, 1] ** 2)
        assert one["low"] < one["r"] < one["high"]
    assert np.mean(got) == pytest.approx(np.mean(truth), abs=0.05)
    assert 0.2 < np.mean(truth) < 0.9


def test_halves_keep_the_groups_apart():
    values, buckets, _ = simulated(np.random.default_rng(2), heads=5, prompts=12)
    halves = rel.half_scores(values.mean(1), buckets, n_splits=1)
    assert halves.shape == (1, 2, 5) and (halves[0, 0] != halves[0, 1]).all()
    with pytest.raises(ValueError, match="single prompt can't be halved: c"):
        rel.half_scores(values.mean(1), ["a", "b"] * 5 + ["a", "c"])


def test_needed_prompts_give_the_wanted_reliability():
    """Simulate as many prompts as it says: the reliability comes out."""
    rng, wanted = np.random.default_rng(3), 0.8
    counts = {1: [], 6: []}
    for _ in range(10):
        values, buckets, _ = simulated(rng)
        halves = rel.half_scores(values.mean(1), buckets, n_splits=20)
        table = rel.needed(
            halves, z_of(values.swapaxes(0, 1)[..., :].swapaxes(0, 1), buckets).T, 80, wanted, (1, 6)
        )
        for row in table.itertuples():
            counts[row.seeds].append(row.prompts)
    assert np.median(counts[6]) < np.median(counts[1])
    for seeds, found in counts.items():
        prompts = int(np.median(found)) // 2 * 2
        reached = []
        for _ in range(6):
            values, buckets, effect = simulated(rng, prompts=prompts, seeds=seeds)
            reached.append(np.corrcoef(z_of(values.mean(1), buckets), effect)[0, 1] ** 2)
        assert np.mean(reached) == pytest.approx(wanted, abs=0.06)


def test_no_signal_needs_no_end_of_prompts():
    halves = np.random.default_rng(0).normal(size=(1, 2, 400))
    halves[:, 1] = -halves[:, 0] + 0.1 * halves[:, 1]
    assert np.isinf(rel.needed(halves, halves[0], 10, 0.5)["prompts"]).all()


def test_disattenuation_recovers_the_correlation():
    rng = np.random.default_rng(4)
    true = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 4000).T
    seen = true + rng.normal(0, 0.8, true.shape)
    reliability = 1 / (1 + 0.64)
    r = np.corrcoef(seen)[0, 1]
    assert r < 0.45
    assert rel.disattenuated(r, reliability, reliability) == pytest.approx(0.6, abs=0.05)
    assert np.isnan(rel.disattenuated(0.3, -0.1, 0.5))


def test_top_overlap_against_simulated_chance():
    rng = np.random.default_rng(5)
    drawn = [rel.top_overlap(rng.normal(size=50), rng.normal(size=50), 10) for _ in range(600)]
    assert np.mean([d["overlap"] for d in drawn]) == pytest.approx(drawn[0]["chance"], abs=0.02)
    assert np.mean([d["p"] < 0.05 for d in drawn]) <= 0.07
    x = np.arange(50.0)
    assert rel.top_overlap(x, x, 10)["overlap"] == 1 and rel.top_overlap(x, -x, 10)["overlap"] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rel.agreement(np.ones((1, 9))), "≥ 2 repetitions"),
        (lambda: rel.agreement([[1, 2, np.nan], [1, 2, 3]]), "NaN"),
        (lambda: rel.agreement(np.eye(3), method="kendall"), "choose spearman or pearson"),
        (lambda: rel.top_overlap([1, 2, 3], [1, 2, 3], 4), "k = 4: choose 1 … 3"),
        (lambda: rel.needed(np.ones((1, 2, 3)), np.ones((1, 3)), 9, 1.0), "between 0 and 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_projected_from_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(20, 2, 40))
    line = rel.row("noise", noise, noise[0], 64, 0.8)
    assert np.isnan([line["at_published_budget"], line["needed_1_seed"], line["needed_10_seeds"]]).all()
    signal = rng.normal(size=40) + 0.5 * noise
    line = rel.row("signal", signal, signal.mean(1)[:2], 64, 0.8)
    assert line["heads"] == 40 and line["split_half_low"] > 0.5 and line["at_published_budget"] > 0.99
    assert 0 < line["needed_1_seed"] < 64


def test_growth_follows_spearman_and_brown():
    """Reliability with fewer prompts is what stepping down from all of them predicts."""
    rng = np.random.default_rng(0)
    n, heads = 800, 200
    bucket = np.array(["a", "b"] * (n // 2))
    theta = rng.normal(0, 0.02, heads)
    base = np.where(bucket == "a", 0.7, 0.1)
    values = base - theta[:, None] * (bucket == "a") + rng.normal(0, 0.3, (heads, n))
    values = np.concatenate([base[None], values])
    got = rel.growth(values, bucket, counts=[50, 200, 3000]).set_index("prompts")["r"]
    assert list(got.index) == [50, 200, 800]  # never more than there are
    for count in (50, 200):
        assert got[count] == pytest.approx(float(rel.spearman_brown(got[800], count / 800)), abs=0.08)
    uneven = np.array(["a"] * 700 + ["b"] * 99 + ["c"])
    with pytest.raises(ValueError, match="single prompt can't be halved: c"):
        rel.growth(values, uneven, counts=[100])
