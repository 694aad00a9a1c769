"""Correlations between axes: recovered from noise, not made of shared noise; the planted model's truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from biasprune import biases, headscores, judge, lm, measure, prompts, reliability

HEADS = 40


def effects(theta: np.ndarray, noise: np.ndarray, name: str) -> biases.Effects:
    """Two groups; a head's z_bias is theta and the difference of the groups' mean noise.

    theta (heads,), noise (heads, prompts).
    """
    n = noise.shape[1]
    bucket = np.array(["a", "b"] * (n // 2))
    base = np.where(bucket == "a", 0.6, 0.1)
    without = base - theta[:, None] * (bucket == "a") + noise
    table = pd.DataFrame({"prompt": [f"{name} {i}" for i in range(n)], "bucket": bucket, "weight": 1 / n})
    return biases.Effects(prompts=table, values=np.concatenate([base[None], without]))


def two_axes(rng: np.random.Generator, r: float, n: int = 60, shared: bool = False) -> dict:
    theta = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=HEADS).T * 0.02
    noise = rng.normal(0, 0.1, (2, HEADS, n))
    if shared:  # the same prompts, and so the same noise
        noise[1] = noise[0]
    names = ("same", "same") if shared else ("x", "y")
    return {k: effects(t, e, p) for k, t, e, p in zip("xy", theta, noise, names, strict=True)}


def related(rng: np.random.Generator, r: float, **options) -> pd.Series:
    state = np.random.default_rng()
    state.bit_generator.state = rng.bit_generator.state  # the same draw once more, without noise
    truth = state.multivariate_normal([0, 0], [[1, r], [r, 1]], size=HEADS).T
    found = biases.correlations(two_axes(rng, r, **options), method="pearson", n_splits=30, n_perm=200)
    return (
        found.iloc[0]
        .copy()
        .pipe(lambda row: pd.concat([row, pd.Series({"truth": np.corrcoef(*truth)[0, 1]})]))
    )


def test_z_is_the_difference_of_bias():
    e = effects(np.array([0.1, 0.2, 0.0]), np.zeros((3, 10)), "x")
    assert e.z() == pytest.approx([0.1, 0.2, 0.0])
    assert e.of_heads([2, 0]).z() == pytest.approx([0.0, 0.1])
    assert e.of_heads(np.array([True, False, True])).z() == pytest.approx([0.1, 0.0])


def test_correlation_is_recovered_from_noise():
    rng = np.random.default_rng(0)
    got = pd.DataFrame([related(rng, 0.8, n=200) for _ in range(25)])
    assert (got["disattenuated"] - got["truth"]).median() == pytest.approx(0, abs=0.08)
    assert got["r"].mean() < 0.6, "plain correlations are too low"
    assert ((got["low"] <= got["truth"]) & (got["truth"] <= got["high"])).mean() >= 0.85
    assert (got["high"] - got["low"]).median() < 1
    assert (got["p"] < 0.05).mean() > 0.9


def test_shared_noise_is_no_correlation():
    rng = np.random.default_rng(1)
    got = pd.DataFrame([related(rng, 0.0, n=200, shared=True) for _ in range(25)])
    assert got["r"].mean() > 0.2, "plain correlations show the shared noise"
    assert abs(got["disattenuated"].median()) < 0.12
    assert (got["p"] < 0.05).mean() < 0.2
    assert ((got["low"] <= got["truth"]) & (got["truth"] <= got["high"])).mean() >= 0.85


def test_heads_that_only_add_noise_to_all_axes_are_no_relation():
    """Without bias, a head that makes scores vary more raises the noise of bias, on every axis."""
    rng, n = np.random.default_rng(10), 120
    more = rng.uniform(0.5, 2, HEADS)[:, None]
    pair = {}
    for k in "xy":
        noise = rng.normal(0, 0.2, (1, n))
        table = pd.DataFrame(
            {"prompt": [f"{k} {i}" for i in range(n)], "bucket": list("abcd") * 30, "weight": 1 / n}
        )
        pair[k] = biases.Effects(prompts=table, values=0.5 + noise * np.concatenate([[[1.0]], more]))
    table = biases.correlations(pair, n_splits=20, n_perm=200)
    assert table["disattenuated"].iloc[0] > 0.9, "such effects do agree with each other"
    assert biases.verdicts(table, biases.reliabilities(pair, n_splits=20))["verdict"].item() == "unreadable"


def test_sizes_unequal_groups_and_weights():
    """Halves of importance-weighted scores, three groups, against the definition."""
    rng, n = np.random.default_rng(11), 40
    bucket = np.array(["a"] * 20 + ["b"] * 12 + ["c"] * 8)
    weight = np.array([0.5 / 20] * 20 + [0.2 / 12] * 12 + [0.3 / 8] * 8)
    table = pd.DataFrame({"prompt": [f"p {i}" for i in range(n)], "bucket": bucket, "weight": weight})
    sizes = rng.random((6, n)) + 0.5
    e = biases.Effects(prompts=table, values=rng.random((6, n)) * sizes, sizes=sizes)
    halves = biases._Halves({"x": e})
    got, side = halves(np.random.default_rng(3))["x"], halves.ranked(np.random.default_rng(3)) % 2
    for h in (0, 1):
        own = side == h
        means = np.stack(
            [e.values[:, own & (bucket == g)].sum(1) / sizes[:, own & (bucket == g)].sum(1) for g in "abc"]
        )
        whole = np.array([0.5, 0.2, 0.3]) @ means
        bias = np.abs(means - whole).sum(0)
        assert got[h] == pytest.approx(bias[0] - bias[1:])
    assert e.z() == pytest.approx(_z(e)) and e.of_heads([1, 3]).z() == pytest.approx(_z(e)[[1, 3]])


def _z(e: biases.Effects) -> np.ndarray:
    bias = measure.group_bias(e.values, e.prompts["bucket"], e.prompts["weight"].to_numpy(), e.sizes)
    return bias[0] - bias[1:]


def test_without_signal_nothing_is_read():
    rng = np.random.default_rng(2)
    said = []
    for _ in range(10):
        pair = {k: effects(np.zeros(HEADS), rng.normal(0, 0.1, (HEADS, 60)), k) for k in "xy"}
        table = biases.correlations(pair, n_splits=20, n_perm=200)
        said += list(biases.verdicts(table, biases.reliabilities(pair, n_splits=20))["verdict"])
    assert said.count("unreadable") >= 8 and said.count("positive") <= 1


def test_spearman_and_pearson_of_noiseless_effects():
    theta = np.random.default_rng(3).normal(0.1, 0.02, (2, HEADS))
    pair = {k: effects(t, np.zeros((HEADS, 20)), k) for k, t in zip("xy", theta, strict=True)}
    for method in ("pearson", "spearman"):
        row = biases.correlations(pair, method=method, n_splits=4, n_perm=20).iloc[0]
        expected = pd.Series(theta[0]).corr(pd.Series(theta[1]), method=method)
        assert row["disattenuated"] == pytest.approx(expected) == pytest.approx(row["r"])
        assert row["low"] == pytest.approx(expected) == pytest.approx(row["high"])


def test_halves_agree_with_those_of_one_axis():
    """An axis by itself: the same reliability as ``reliability.half_scores`` gives, but for the draws."""
    pair = two_axes(np.random.default_rng(4), 0.5)
    halves, rng = biases._Halves(pair), np.random.default_rng(0)
    mine = np.stack([halves(rng)["x"] for _ in range(200)])
    own = pair["x"].prompts
    other = reliability.half_scores(pair["x"].values, own["bucket"], own["weight"], n_splits=200)
    a, b = (reliability.split_half(h, method="pearson", n_boot=2)["r"] for h in (mine, other))
    assert a == pytest.approx(b, abs=0.05)


def test_a_shared_prompt_lies_in_one_half():
    pair = two_axes(np.random.default_rng(5), 0.5, shared=True)
    halves = biases._Halves(pair)
    assert len(halves.stratum) == 60 and set(halves.stratum) == {0, 1}
    side = halves.ranked(np.random.default_rng(0)) % 2
    for stratum in (0, 1):  # halved within the groups
        assert np.bincount(side[halves.stratum == stratum]).tolist() == [15, 15]


def test_file_and_back():
    pair = two_axes(np.random.default_rng(6), 0.5, n=20)
    sizes = np.random.default_rng(7).random(pair["x"].values.shape) + 0.5
    pair["x"] = biases.Effects(prompts=pair["x"].prompts, values=pair["x"].values, sizes=sizes)
    again = biases.from_table(biases.to_table(pair))
    assert list(again) == list(pair) and again["y"].sizes is None
    for k in pair:
        assert (again[k].values == pair[k].values).all()
        assert again[k].z() == pytest.approx(pair[k].z())
    assert (again["x"].sizes == sizes).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"x": p["x"]}, "two or more axes"),
        (lambda p: {**p, "y": p["y"].of_heads([0, 1, 2])}, "the same three or more heads"),
        (lambda p: {k: e.of_heads([0, 1]) for k, e in p.items()}, "three or more heads"),
        (
            lambda p: {**p, "y": effects(np.zeros(HEADS), np.zeros((HEADS, 2)), "few")},
            "'y' has a group with too few",
        ),  # fmt: skip
    ],
)
def test_bad_input(change, message):
    pair = two_axes(np.random.default_rng(8), 0.5, n=20)
    with pytest.raises(ValueError, match=message):
        biases.correlations(change(pair), n_splits=2, n_perm=5)


def test_unknown_method():
    with pytest.raises(ValueError, match="choose spearman or pearson"):
        biases.correlations(two_axes(np.random.default_rng(9), 0.5), method="kendall")


def test_verdicts_by_hand():
    table = pd.DataFrame(
        {
            "a": ["x", "x", "y", "x"],
            "b": ["y", "z", "z", "w"],
            "p": [0.001, 0.02, 0.9, 0.001],
            "low": [0.3, -0.9, -0.5, 0.5],
            "high": [0.9, -0.2, 0.5, 0.9],
        }
    )
    known = pd.DataFrame(
        {"axis": list("xyzw"), "readable": [True, True, True, False], "r": [0.4, 0.9, 0.1, -0.1]}
    )
    got = biases.verdicts(table, known)
    assert got["ceiling"].tolist() == pytest.approx([0.6, 0.2, 0.3, np.nan], nan_ok=True)
    assert got["p_holm"].tolist() == pytest.approx([0.004, 0.04, 0.9, 0.004])
    assert got["verdict"].tolist() == ["positive", "negative", "undecided", "unreadable"]


def test_overlaps():
    theta = np.linspace(0, 0.1, HEADS)
    of = {"x": theta, "y": theta, "z": theta[::-1]}
    clean = {k: effects(t, np.zeros((HEADS, 20)), k) for k, t in of.items()}
    got = biases.overlaps(clean, share=0.3).set_index(["a", "b"])
    assert got.loc[("x", "y"), "overlap"] == 1 and got.loc[("x", "z"), "overlap"] == 0
    assert (got["own"] == 1).all() and (got["chance"] == 0.3).all()
    assert got.loc[("x", "y"), "overlap_low"] == 1 and got.loc[("x", "z"), "overlap_high"] == 0
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (HEADS, 60))  # the same texts, read twice: nothing to find but their noise
    same = {k: effects(np.zeros(HEADS), noise, "same") for k in "xy"}
    got = biases.overlaps(same).iloc[0]
    assert got["overlap"] == pytest.approx(got["chance"], abs=0.12) == pytest.approx(got["own"], abs=0.12)
    assert got["overlap_low"] < got["chance"] < got["overlap_high"]


def test_noise_of_two_ways_of_scoring():
    """Twice as much noise of the heads' own is twice the standard error."""
    own = np.random.default_rng(0).normal(0, 0.01, (HEADS, 200))
    once, twice = (effects(np.zeros(HEADS), k * own, "same") for k in (1, 2))
    got = biases.noise_ratio(twice, once, n_boot=300)
    assert got["ratio"] == pytest.approx(2, rel=0.15) and got["low"] < 2 < got["high"] < 2.6
    assert biases.noise_ratio(once, once, n_boot=50)["ratio"] == 1
    with pytest.raises(ValueError, match="other heads or prompts"):
        biases.noise_ratio(once, once.of_heads([0, 1]))


def test_conclusion_on_correlations():
    pairs = pd.DataFrame({"a": ["x", "x", "religion"], "b": ["y", "z", "x"], "high": [0.9, 0.9, 0.1]})

    def said(*verdicts: str, high: float = 0.9) -> str:
        return biases.conclude_correlation(pairs.assign(verdict=verdicts, high=high))[0]

    assert said("positive", "positive", "negative") == "reproduced"  # religion is excepted
    assert said("positive", "undecided", "positive") == "partly reproduced"
    assert said("undecided", "unreadable", "positive") == "undecided"
    assert said("undecided", "negative", "positive", high=0.2) == "not reproduced"
    assert said("unreadable", "unreadable", "positive", high=0.2) == "undecided"


def test_conclusion_on_spill_over():
    def said(own: tuple, other: tuple) -> str:
        rows = [
            {"selected_for": s, "judged_on": j, "p": p, "high": h, "against_low": low, "against_high": h}
            for s in ("x", "random")
            for j, (p, low, h) in (("x", own), ("y", other))
        ]
        table = pd.DataFrame(rows).assign(change=-20.0, against_random=-20.0, ppl_ratio=1.1)
        return biases.conclude_spill(table, "x")[0]

    lower, flat, wide = (0.01, -40, -10), (0.01, -5, 5), (0.01, -40, 20)
    assert said(lower, lower) == "reproduced"
    assert said(lower, flat) == "not reproduced" and said(lower, wide) == "undecided"
    assert said(flat, lower) == "undecided", "nothing can spill over"
    assert said(lower, (0.5, -40, -10)) == "undecided", "no bias to lower"


def test_judged_on_all_by_hand():
    """Two axes; the pruned model's scores are known, so that every change is."""
    n = 40
    one = pd.DataFrame({"bucket": list("st") * (n // 2), "weight": 1 / n})
    table = pd.concat([one.assign(axis=a, prompt=[f"{a} {i}" for i in range(n)]) for a in ("one", "two")])
    table = table.reset_index(drop=True)
    gap = {"": (0.4, 0.4), "1": (0.1, 0.4), "2": (0.4, 0.4)}  # heads → gap of axis one and two
    high = (table["bucket"] == "s").to_numpy()
    rows = []
    for heads, by_axis in gap.items():
        own = np.where(table["axis"] == "one", *by_axis)
        score = 0.3 + own * high + np.random.default_rng(0).normal(0, 0.01, len(table))
        rows.append(pd.DataFrame({"heads": heads, "seed": 0, "prompt": table.index, "score": score}))
    losses = pd.DataFrame({"heads": list(gap), "window": 0, "nll": [2.0, 2.0, 3.0], "tokens": 10})
    windows = measure.Windows(ids=None, first=np.array([1]), last=np.array([11]), rule="corrected")
    selected = pd.DataFrame({"selected_for": ["one", "random"], "heads": [[1], [2]]})
    got = biases.judged_on_all(selected, pd.concat(rows).assign(text="x"), losses, table, windows, n_boot=200)
    got = got.set_index(["selected_for", "judged_on"])
    assert got.loc[("one", "one"), "change"] == pytest.approx(-75, abs=2)
    assert got.loc[("one", "two"), "change"] == pytest.approx(0, abs=2)
    assert got.loc[("one", "one"), "against_random"] == pytest.approx(-75, abs=3)
    assert got.loc[("one", "one"), "against_high"] < -70
    assert got.loc[("one", "two"), ["against_low", "against_high"]].abs().max() < 1e-9
    assert got.loc[("random", "one"), "ppl_ratio"] == pytest.approx(np.e)
    assert (got["p"] < 0.05).all()


def test_planted_biases_correlate_as_planted():
    """Two biases in the same heads, a third in others: .95, 0 and 0 over the 16 heads."""
    net = lm.load("planted-axes")
    source = "models/planted-axes/prompts.csv"
    axes = ["colour", "shape", "sound"]
    table = pd.concat([prompts.load(a, "all", source).assign(weight=1 / 144) for a in axes])
    text = measure.windows(net, prompts.corpus("corpora/everyday"), length=64, max_tokens=128)
    options = {"seeds": range(4), "max_new_tokens": 4, "progress": False}
    got = headscores.samples(net, table.reset_index(drop=True), judge.load("sentiment"), text, **options)
    found = biases.correlations(biases.effects_of(got), method="pearson", n_splits=40, n_perm=2000)
    found = found.set_index(["a", "b"])
    planted = {("colour", "shape"): 0.95, ("colour", "sound"): 0.0, ("shape", "sound"): 0.0}
    for pair, r in planted.items():
        assert found.loc[pair, "low"] <= r <= found.loc[pair, "high"], (pair, found.loc[pair])
        assert found.loc[pair, "disattenuated"] == pytest.approx(r, abs=0.25)
    said = biases.verdicts(found.reset_index(), biases.reliabilities(biases.effects_of(got), n_splits=20))
    assert said["verdict"].tolist() == ["positive", "undecided", "undecided"]
