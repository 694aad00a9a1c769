"""Effects on gaps against plain arithmetic and simulations; parsing and single gaps are in test_audit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from biasprune import audit, gaps


def distributions(shift: dict[str, float], names=12, between=0.2, seed=0, **labels) -> pd.DataFrame:
    """Simulated distributions: three answers per name; group white's middle lies higher by ``shift``."""
    rng = np.random.default_rng(seed)
    rows = []
    for variation, of in shift.items():
        for i in range(2 * names):
            race = ("white", "black")[i % 2]
            middle = 3 + rng.normal(0, between) + of * (race == "white")
            for step, p in ((-0.5, 0.2), (0, 0.5), (0.5, 0.2)):
                rows.append(["c", variation, f"n{i}", race, "f", np.exp(middle + step), p])
    columns = ["context", "variation", "name", "race", "gender", "value", "p"]
    return pd.DataFrame(rows, columns=columns).assign(**labels)


def test_moments_by_hand():
    table = pd.DataFrame(
        {
            "context": "c",
            "variation": "v",
            "name": ["a", "a", "a", "b"],
            "race": "white",
            "gender": "f",
            "value": [1.0, 4.0, np.nan, 0.0],
        }
    )
    got = gaps.moments(table, log=False).set_index("name")
    assert got.loc["a", ["n", "mean", "square", "off"]].tolist() == [2, 2.5, 8.5, pytest.approx(1 / 3)]
    assert got.loc["b", ["n", "mean", "off"]].tolist() == [1, 0, 0]
    logged = gaps.moments(table, log=True).set_index("name")
    assert logged.loc["b", "off"] == 1 and np.isnan(logged.loc["b", "mean"])
    weighed = gaps.moments(table.assign(p=[0.3, 0.1, 0.0, 0.9]), log=False).set_index("name")
    assert weighed.loc["a", "mean"] == pytest.approx(0.7 / 0.4) and weighed.loc["a", "off"] == pytest.approx(
        0.6
    )


def test_gap_of_a_distribution_is_that_of_endless_answers():
    dist = distributions({"v": 0.4})
    rng = np.random.default_rng(1)
    drawn = [
        g.iloc[rng.choice(len(g), 4000, p=g["p"] / g["p"].sum())] for _, g in dist.groupby("name", sort=False)
    ]
    sampled = pd.concat(drawn, ignore_index=True).drop(columns="p").assign(kind="number", mask=0)
    one, other = (gaps.gaps(t, log=True).iloc[0] for t in (dist, sampled))
    for what in ("smd", "emd", "low", "high"):
        assert one[what] == pytest.approx(other[what], abs=0.06)
    assert one["unparsable"] == pytest.approx(0.1) and other["unparsable"] == 0
    assert one["median_white"] == pytest.approx(other["median_white"], rel=0.2)
    assert 1 < one["distinct"] <= len(dist)


def test_effects_are_the_difference_of_gaps():
    before, after = (gaps.moments(distributions(s)) for s in ({"u": 0.6, "v": -0.5}, {"u": 0.1, "v": -0.4}))
    signs = gaps.directions(before)
    assert signs.loc[("c", "u")] == 1 and signs.loc[("c", "v")] == -1
    both = gaps.effects(after.assign(pruning="x"), before, signs=signs, n_boot=200)
    smd = {k: gaps.gaps(distributions(s), log=True).set_index("variation")["smd"] for k, s in
           (("before", {"u": 0.6, "v": -0.5}), ("after", {"u": 0.1, "v": -0.4}))}  # fmt: skip
    expected = signs.to_numpy() * (smd["before"] - smd["after"]).to_numpy()
    np.testing.assert_allclose(both.table["removed"], expected)
    row = both.mean(["pruning"]).iloc[0]
    assert row["removed"] == pytest.approx(expected.mean()) and row["questions"] == 2
    assert row["gap"] == pytest.approx(smd["after"].abs().mean()) and row["floor"] > 0
    assert row["removed_low"] < row["removed"] < row["removed_high"]
    nothing = gaps.effects(before.assign(pruning="x"), before, signs=signs).mean(["pruning"]).iloc[0]
    assert nothing["removed"] == nothing["removed_low"] == nothing["removed_high"] == 0


def test_paired_intervals_cover_the_truth_and_are_narrower():
    hits, narrow, n = 0, 0, 120
    for seed in range(n):
        before = gaps.moments(distributions({"v": 0.5}, between=0.3, seed=seed))
        # same names, half of the shift gone, a little noise of their own
        rng = np.random.default_rng(seed + 1000)
        moved = before.assign(
            mean=before["mean"] - 0.25 * (before["race"] == "white") + rng.normal(0, 0.05, len(before))
        )
        moved["square"] = before["square"] - before["mean"] ** 2 + moved["mean"] ** 2
        row = gaps.effects(moved.assign(pruning="x"), before, n_boot=300, seed=seed).mean(["pruning"]).iloc[0]
        truth = 0.25 / np.sqrt(0.09 + 2 * 0.2 / 0.9 * 0.25)
        hits += row["removed_low"] <= truth <= row["removed_high"]
        narrow += (row["removed_high"] - row["removed_low"]) < (row["directed_high"] - row["directed_low"])
    assert hits / n > 0.85 and narrow / n > 0.9


def test_a_control_removes_nothing_and_more_says_so():
    before = gaps.moments(distributions({"u": 0.6, "v": 0.6}))
    real = gaps.moments(distributions({"u": 0.0, "v": 0.0})).assign(method="real")
    control = before.assign(method="control")
    both = gaps.effects(pd.concat([real, control]), before, signs=gaps.directions(before))
    point, low, high = both.more(both.rows(method="real"), [both.rows(method=["control"])])
    table = both.mean(["method"]).set_index("method")
    assert point == pytest.approx(table.loc["real", "removed"]) and low > 0
    assert both.rows(method="real", variation="u").sum() == 1
    with pytest.raises(ValueError, match="no pruning with"):
        both.rows(method="none")


def test_bad_input():
    before = gaps.moments(distributions({"v": 0.5}))
    other = before.assign(pruning="x")
    with pytest.raises(ValueError, match="wasn't asked this"):
        gaps.effects(other.assign(variation="w"), before)
    with pytest.raises(ValueError, match="not the same names"):
        gaps.effects(other.iloc[1:], before)
    with pytest.raises(ValueError, match="give two different ones"):
        gaps.effects(other, before, groups=("white", "white"))
    with pytest.raises(ValueError, match="no column 'age'"):
        gaps.effects(other, before, by="age")
    asked = before[["context", "variation", "name", "race", "gender"]]
    with pytest.raises(ValueError, match="no question's answers vary"):
        gaps.slope_of_gap(np.zeros((24, 2, 2)), asked, before.assign(mean=1.0, square=1.0))


LABELS = ("race", ("white", "black"))


def test_halves_and_labels_of_controls():
    names = audit.load("names")
    train, test = audit.halves(names, *LABELS)
    assert not set(train["name"]) & set(test["name"]) and len(train) == len(test) == 32
    assert (train.groupby(["race", "gender"]).size() == 8).all()
    groups = LABELS[1]
    swapped = audit.relabelled(names, "race", groups)
    assert (swapped["race"] != names["race"]).all()
    shuffled = [audit.relabelled(names, "race", groups, seed=s)["race"] for s in (0, 0, 1)]
    assert shuffled[0].equals(shuffled[1]) and not shuffled[0].equals(shuffled[2])
    assert shuffled[0].value_counts().to_dict() == {"white": 32, "black": 32}
    contexts = audit.load("contexts")
    assert (
        audit.chosen(contexts, ["service", "hiring"], 2)["context"].tolist()
        == ["service"] * 2 + ["hiring"] * 2
    )
    with pytest.raises(ValueError, match="unknown context 'none'; there are: purchase"):
        audit.chosen(contexts, ["none"])
    few = names.groupby("race").head(3)
    with pytest.raises(ValueError, match="group 'white' of 'race' has fewer than two names"):
        audit.halves(few, *LABELS)
    with pytest.raises(ValueError, match="group 'a' of 'race' has fewer than two names"):
        audit.halves(names, "race", ("a", "b"))


def test_no_variance_is_never_a_silent_zero():
    before = gaps.moments(distributions({"u": 0.5, "v": 0.5}))
    flat = before.assign(pruning="dead")
    dead = flat["variation"] == "v"
    flat.loc[dead, ["mean", "square"]] = [3.0, 9.0]
    both = gaps.effects(flat, before)
    row = both.mean(["pruning"]).iloc[0]
    assert row[["gap", "directed", "removed", "removed_low", "removed_high"]].isna().all()
    assert np.isnan(both.more(both.rows(variation="v"), [both.rows(variation="u")])).all()


def test_a_gap_turned_around_is_no_gap_removed():
    before, after = (gaps.moments(distributions({"v": x})) for x in (0.5, -0.6))
    both = gaps.effects(after.assign(pruning="x"), before)
    row = both.mean(["pruning"]).iloc[0]
    assert both.table["removed"][0] > 1 and row["directed"] < -0.5
    assert row["removed"] < 0 and row["removed"] == pytest.approx(
        abs(row["directed"] + both.table["removed"][0]) - abs(row["directed"])
    )


def test_controls_are_a_sample_too():
    """One of several random draws may be lucky: their spread widens the interval."""
    before = gaps.moments(distributions({"v": 0.6}))
    shifts = (0.0, 0.1, 0.5, 0.55)
    drawn = [gaps.moments(distributions({"v": x})).assign(pruning=f"r{i}") for i, x in enumerate(shifts)]
    alike = [drawn[2].assign(pruning=f"s{i}") for i in range(4)]
    both = gaps.effects(pd.concat([before.assign(pruning="own"), *drawn, *alike]), before)
    own = both.rows(pruning="own")
    wide, narrow = (both.more(own, [both.rows(pruning=f"{k}{i}") for i in range(4)]) for k in "rs")
    assert wide[2] - wide[1] > 1.5 * (narrow[2] - narrow[1])
    expected = both.mean(["pruning"]).set_index("pruning")["removed"]
    assert wide[0] == pytest.approx(expected["own"] - expected[["r0", "r1", "r2", "r3"]].mean())
