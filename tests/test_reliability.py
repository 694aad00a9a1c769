"""Reliability, correlations and additivity of effects: against simulations with known truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from biasprune.core.masks import Pruning, masked
from biasprune.core.model import load
from biasprune.core.stats import Readings, group_gap, mean_bias
from biasprune.measures import judges, prompts, reliability
from biasprune.measures.toxicity import toxicity

HEADS = 40


def items(n: int, name: str = "item", groups: str = "ab", per_cluster: int = 1) -> pd.DataFrame:
    clusters = n // per_cluster
    group = np.resize(list(groups), clusters).repeat(per_cluster)
    names = np.array([f"{name} {i}" for i in range(clusters)]).repeat(per_cluster)
    table = pd.DataFrame({"item": [f"{name} {i}" for i in range(n)], "cluster": names, "group": group})
    return table.assign(share=1 / len(groups))


def readings(theta: np.ndarray, noise: np.ndarray, table: pd.DataFrame, of_whole: np.ndarray | float = 0) -> Readings:
    """Removing head h takes theta[h] off group a's gap of .5; noise (heads, items) is that of the pruned models."""
    in_a = (table["group"] == "a").to_numpy()
    base = np.where(in_a, 0.6, 0.1)
    values = np.concatenate([(base + of_whole)[None], base - theta[:, None] * in_a + noise])
    prunings = ["", *map(str, range(len(theta)))]
    weights = np.ones((1, len(table)))
    return Readings(prunings=prunings, values=values, weights=weights, items=table, bias_of=group_gap)


def two_measures(rng, r: float, n: int = 200, shared: bool = False) -> tuple[dict[str, Readings], float]:
    """Effects that correlate at r over heads, and what their correlation is in this draw of heads."""
    theta = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=HEADS).T * 0.02
    noise = rng.normal(0, 0.1, (2, HEADS, n))
    if shared:  # the same items, and so the same noise
        noise[1] = noise[0]
    names = ("same", "same") if shared else ("x", "y")
    pair = {k: readings(t, e, items(n, p)) for k, t, e, p in zip("xy", theta, noise, names, strict=True)}
    return pair, float(np.corrcoef(*theta)[0, 1])


# ---- halves ------------------------------------------------------------------------------------------


def sides(halves: reliability.Halves, name: str, seed: int = 0) -> np.ndarray:
    """Which half every item of a measure lies in, as ``Halves.z`` draws it."""
    return (halves.ranked(np.random.default_rng(seed)) % 2)[halves.place[name]]


def test_halves_never_split_a_cluster_and_keep_groups_balanced():
    table = items(120, groups="abc", per_cluster=4)
    halves = reliability.Halves({"": readings(np.zeros(3), np.zeros((3, 120)), table)})
    for seed in range(5):
        table["side"] = sides(halves, "", seed)
        assert (table.groupby("cluster")["side"].nunique() == 1).all()
        assert (table.groupby("group")["side"].mean() == 0.5).all()
    assert (sides(halves, "", 0) != sides(halves, "", 1)).any()


def test_a_shared_cluster_lies_in_the_same_half_of_all_measures():
    """One measure has further items; the groups' names need not be the same."""
    one, other = items(40, "word"), items(60, "word").sample(frac=1, random_state=0, ignore_index=True)
    other["group"] = other["group"].map({"a": "x", "b": "y"})
    both = {k: readings(np.zeros(3), np.zeros((3, len(t))), t) for k, t in (("1", one), ("2", other))}
    halves = reliability.Halves(both)
    of = [dict(zip(t["cluster"], sides(halves, k), strict=True)) for k, t in (("1", one), ("2", other))]
    assert all(of[1][cluster] == side for cluster, side in of[0].items())


def test_z_in_halves_is_the_definition():
    """Importance weights, three groups of unequal size and share."""
    rng = np.random.default_rng(0)
    table = items(40).assign(group=["a"] * 20 + ["b"] * 12 + ["c"] * 8)
    table["share"] = table["group"].map({"a": 0.5, "b": 0.2, "c": 0.3})
    values, weights = rng.random((6, 40)), rng.random((6, 40)) + 0.5
    names = ["", *"01234"]
    one = Readings(prunings=names, values=values, weights=weights, items=table, bias_of=group_gap)
    halves = reliability.Halves({"": one})
    got, side = halves.z(1, (3,))[0, 0], sides(halves, "", 3)
    for half in (0, 1):
        means = []
        for group in "abc":
            inside = (side == half) & (table["group"] == group).to_numpy()
            means.append((values * weights)[:, inside].sum(1) / weights[:, inside].sum(1))
        bias = np.abs(np.stack(means) - np.array([0.5, 0.2, 0.3]) @ np.stack(means)).sum(0)
        assert got[half] == pytest.approx(bias[0] - bias[1:])


def test_a_group_that_can_not_be_halved_is_named():
    one = readings(np.zeros(3), np.zeros((3, 5)), items(5).assign(group=list("aaaab")))
    with pytest.raises(ValueError, match="tone: a group has too few clusters to halve: take more items"):
        reliability.correlations({"tone": one, "other": one})


# ---- reliability -------------------------------------------------------------------------------------


def test_split_half_estimates_the_reliability():
    """Truth: squared correlation with the effects; and with fewer items what stepping down from all predicts."""
    rng, got, truth, few = np.random.default_rng(1), [], [], []
    for _ in range(12):
        theta, table = rng.normal(0, 0.02, 120), items(80)
        one = readings(theta, rng.normal(0, 0.1, (120, 80)), table)
        half = reliability.split_half(one, method="pearson", n_splits=20, n_boot=20)
        assert half["low"] < half["r"] < half["high"]
        assert half["r"] == pytest.approx(float(reliability.spearman_brown(half["half"], 2)))
        got.append(half["r"])
        truth.append(np.corrcoef(one.z(), theta)[0, 1] ** 2)
        part = one.where(np.arange(80) < 40)
        few.append(reliability.split_half(part, method="pearson", n_splits=20, n_boot=2)["half"])
    assert 0.2 < np.mean(truth) < 0.9 and np.mean(got) == pytest.approx(np.mean(truth), abs=0.05)
    quarter = float(reliability.spearman_brown(np.mean(got), 1 / 4))
    assert np.mean(few) == pytest.approx(quarter, abs=0.05)


def test_effects_of_nothing_are_not_reliable():
    rng = np.random.default_rng(2)
    lows = [
        reliability.split_half(readings(np.zeros(40), rng.normal(0, 0.1, (40, 60)), items(60)), n_splits=20)["low"]
        for _ in range(10)
    ]
    assert np.mean(np.array(lows) > 0) <= 0.1


def test_agreement_is_the_mean_of_scipys():
    x = np.random.default_rng(0).normal(size=(4, 30)) + np.linspace(0, 3, 30)
    for method, by in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        expected = np.mean([by(x[i], x[j]).statistic for i in range(4) for j in range(i)])
        got = reliability.agreement(x, method=method)
        assert got["r"] == pytest.approx(expected) and got["low"] < got["r"] < got["high"]


def test_top_overlap_against_simulated_chance():
    rng, x = np.random.default_rng(5), np.arange(50.0)
    drawn = [reliability.top_overlap(rng.normal(size=50), rng.normal(size=50), 10) for _ in range(600)]
    assert np.mean([d["overlap"] for d in drawn]) == pytest.approx(drawn[0]["chance"], abs=0.02)
    assert reliability.top_overlap(x, x, 10)["overlap"] == 1 and reliability.top_overlap(x, -x, 10)["overlap"] == 0


# ---- correlations between measures -------------------------------------------------------------------


def simulated(rng, r: float, **options) -> dict[str, float]:
    pair, truth = two_measures(rng, r, **options)
    return reliability.correlations(pair, method="pearson", n_splits=30, n_perm=200).iloc[0].to_dict() | {
        "truth": truth
    }


def test_disattenuated_interval_covers_the_planted_correlation():
    rng = np.random.default_rng(0)
    got = pd.DataFrame([simulated(rng, 0.8) for _ in range(16)])
    assert (got["disattenuated"] - got["truth"]).median() == pytest.approx(0, abs=0.08)
    assert got["r"].mean() < 0.6 < got["ceiling"].mean() + 0.15, "plain correlations are too low"
    assert (got["r"] < got["ceiling"] + 0.15).mean() > 0.9
    assert ((got["low"] <= got["truth"]) & (got["truth"] <= got["high"])).mean() >= 0.85
    assert (got["high"] - got["low"]).median() < 1 and (got["p"] < 0.05).mean() > 0.9


def test_shared_noise_is_no_correlation():
    rng = np.random.default_rng(1)
    got = pd.DataFrame([simulated(rng, 0.0, shared=True) for _ in range(16)])
    assert got["r"].mean() > 0.2, "plain correlations show the shared noise"
    assert abs(got["disattenuated"].median()) < 0.12 and (got["p"] < 0.05).mean() < 0.2
    assert ((got["low"] <= got["truth"]) & (got["truth"] <= got["high"])).mean() >= 0.85


def test_null_pairs_are_not_significant():
    rng = np.random.default_rng(2)
    p = [
        reliability.correlations(two_measures(rng, 0.0, n=60)[0], n_splits=10, n_perm=200)["p"].item()
        for _ in range(24)
    ]
    assert np.mean(np.array(p) < 0.05) <= 0.15


def test_noiseless_effects_correlate_as_they_are():
    theta = np.random.default_rng(3).normal(0.1, 0.02, (2, HEADS))
    pair = {k: readings(t, np.zeros((HEADS, 20)), items(20, k)) for k, t in zip("xy", theta, strict=True)}
    for method in ("pearson", "spearman"):
        row = reliability.correlations(pair, method=method, n_splits=4, n_perm=20).iloc[0]
        expected = pd.Series(theta[0]).corr(pd.Series(theta[1]), method=method)
        assert row["disattenuated"] == pytest.approx(expected) == pytest.approx(row["r"])
        assert row["low"] == pytest.approx(expected) == pytest.approx(row["high"])
        assert row["ceiling"] == pytest.approx(1) and row["parts"] == HEADS


def test_the_jackknife_of_a_mean_is_its_interval():
    """One cluster a block: half the width of Student's interval."""
    x, table = np.random.default_rng(0).normal(size=(1, 12)), items(12).drop(columns="group")
    values, weights = np.concatenate([0 * x, x]), np.ones((1, 12))
    one = Readings(prunings=["", "0"], values=values, weights=weights, items=table, bias_of=mean_bias)
    whole, reach = reliability.across_halves({"": one}, np.mean, n_splits=400, n_blocks=12)
    low, high = stats.t.interval(0.95, 11, x.mean(), stats.sem(x[0]))
    assert float(whole) == pytest.approx(-x.mean()) and float(reach) == pytest.approx((high - low) / 2, rel=0.15)


# ---- several heads at once ---------------------------------------------------------------------------

SETS = [[0], [1], [2], [3], [4], [5], [0, 1], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def slope(z: np.ndarray) -> float:
    """As in notebook 06: joint effects in one half per sum of single effects in the other."""
    joint, members = z[:, 0, :, 6:], np.array([[h in s for h in range(6)] for s in SETS[6:]], dtype=float)
    summed = z[:, 0, :, :6] @ members.T
    return float((joint * summed[:, ::-1]).mean() / (summed[:, 0] * summed[:, 1]).mean())


def of_sets(effect, noise, of_whole) -> Readings:
    return readings(np.array([effect(s) for s in SETS]), noise, items(80), of_whole)


def test_additive_effects_have_slope_one():
    noise = np.random.default_rng(0).normal(0, 0.05, 80)  # the same for all, as with common random numbers
    same = of_sets(lambda s: 0.05 * len(s), noise, noise)
    whole, reach = reliability.across_halves({"": same}, slope)
    assert float(whole) == pytest.approx(1) and float(reach) == pytest.approx(0, abs=1e-9)
    bias = same.estimates(200)
    z = {name: bias[""] - left for name, left in bias.items()}
    excess = z["8"] - z["0"] - z["1"] - z["2"] - z["3"] - z["4"] - z["5"]
    assert excess.point == pytest.approx(0) and np.allclose(excess.draws, 0), "paired"
    other = of_sets(lambda s: 0.05 if len(s) == 1 else 0.03 * len(s), noise, noise)
    whole, reach = reliability.across_halves({"": other}, slope)
    assert float(whole) == pytest.approx(0.6) and float(whole + reach) < 0.7


def test_noise_of_every_set_does_not_refute_additivity():
    """On the same items a sum holds the unpruned model's noise once per head: a naive slope is too low."""
    rng, naive, covered = np.random.default_rng(0), [], []
    for _ in range(16):
        noise = rng.normal(0, 0.1, (len(SETS) + 1, 80))
        one = of_sets(lambda s: 0.05 * len(s), noise[1:], noise[0])
        z = one.z()
        naive.append((z[8] * z[:6].sum(), z[:6].sum() ** 2))
        whole, reach = reliability.across_halves({"": one}, slope, n_splits=40)
        covered.append(abs(whole - 1) <= reach)
    assert np.divide(*np.sum(naive, axis=0)) < 0.85 and np.mean(covered) >= 0.85


def test_all_heads_are_scored_anew_inside_a_pruned_model():
    """A hook's mask, moved inside inference mode, must still serve a backward pass (bfloat16 moves it)."""
    net = load("planted", dtype="bfloat16", device="cpu")
    table = prompts.sample(prompts.load("invented_group", "valid", "models/planted/prompts.csv"), 14, 0)
    measure = toxicity(table, judges.load("sentiment"), max_new_tokens=3)
    whole = measure.first_order(net)
    with masked(net, Pruning(frozenset([1]))):
        rest = measure.first_order(net)
    assert rest.prunings == whole.prunings and rest.z()[1] == pytest.approx(0, abs=1e-9), "it is removed already"
    assert not np.allclose(rest.values[0], whole.values[0])
    assert np.allclose(measure.first_order(net).values, whole.values), "the model leaves as it came"
