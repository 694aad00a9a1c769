"""From head sets to a table: equal sets once, paired changes, the choice of γ, verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import word_judge
from test_headscores import PROMPTS, text_windows

from biasprune import ablate, decode, experiment, judge, measure

SETS = pd.DataFrame(
    {
        "method": ["FASP", "FASP", "random", "random"],
        "gamma": 0.0,
        "alpha": [0.0, 0.2, 0.2, 0.2],
        "heads": [[], [1, 6], [6, 1], [3, 9]],
    }
)


@pytest.fixture
def evaluated(tiny):
    windows = text_windows(tiny)
    options = {"seeds": (0, 1), "max_new_tokens": 6}
    texts, losses = experiment.evaluate(tiny, SETS, PROMPTS, judge.load(word_judge), windows, **options)
    return texts, losses, windows


def test_evaluate_by_hand(tiny, evaluated):
    """Oracle: one head set at a time, straight from sampling and judging."""
    texts, losses, windows = evaluated
    assert list(dict.fromkeys(texts["heads"])) == ["", "1 6", "3 9"], "equal sets once, unpruned first"
    assert len(texts) == 3 * 2 * len(PROMPTS)
    for key in ("", "3 9"):
        mask = ablate.head_mask(tiny.anatomy, experiment.parse_key(key))[None]
        expected = decode.sample(tiny, list(PROMPTS["prompt"]), masks=mask, seeds=(0, 1), max_new_tokens=6)
        mine = texts[texts["heads"] == key]
        assert mine["text"].tolist() == expected.texts.reshape(-1).tolist()
        assert mine["score"].tolist() == word_judge(mine["text"].tolist())
        nll = measure.nll(tiny, windows, mask)[0]
        np.testing.assert_allclose(losses.loc[losses["heads"] == key, "nll"], nll, rtol=1e-5)


def test_compare_by_hand(evaluated):
    texts, losses, windows = evaluated
    table, replicates = experiment.compare(SETS, texts, losses, PROMPTS, windows, n_boot=200)
    by_prompt = texts.groupby(["heads", "prompt"])["score"].mean()
    bias = {
        k: float(measure.group_bias(by_prompt[k].to_numpy(), PROMPTS["bucket"])) for k in ("", "1 6", "3 9")
    }
    fasp, rand = table[table["alpha"] > 0].set_index("method").loc[["FASP", "random"]].to_dict("records")
    assert fasp["bias"] == pytest.approx(bias["1 6"])
    assert fasp["change"] == pytest.approx(100 * (bias["1 6"] / bias[""] - 1))
    assert rand["bias"] == pytest.approx((bias["1 6"] + bias["3 9"]) / 2), "random draws are averaged"
    assert rand["pruned"] == 2
    by_seed = texts.groupby(["heads", "seed", "prompt"])["score"].mean()
    changes = [
        float(measure.group_bias(by_seed["1 6"][s].to_numpy(), PROMPTS["bucket"]))
        / float(measure.group_bias(by_seed[""][s].to_numpy(), PROMPTS["bucket"]))
        for s in (0, 1)
    ]
    assert fasp["change_seed_sd"] == pytest.approx(100 * np.std(changes, ddof=1))
    unpruned = table[table["alpha"] == 0].iloc[0]
    assert unpruned["change"] == unpruned["change_low"] == unpruned["change_high"] == 0, "paired with itself"
    assert unpruned["ppl_ratio"] == 1
    own = texts[texts["heads"] == ""]["text"]
    assert unpruned["distinct"] == own.nunique() / len(own)
    assert replicates[("FASP", 0.0, 0.2)].shape == (200,)


def test_rules_by_hand(tiny, evaluated):
    texts, _, _ = evaluated
    own = texts[texts["heads"] == ""]
    prose = " ".join(f"w{i % 30}" for i in range(50))
    table = experiment.compare_rules(tiny, PROMPTS, own, judge.load(word_judge), prose, length=10)
    table = table.set_index("rule")
    joined = [f"{PROMPTS['prompt'][i]}{t}" for i, t in zip(own["prompt"], own["text"], strict=True)]
    assert table.loc["as_published", "mean_score"] == pytest.approx(np.mean(word_judge(joined)))
    assert table.loc["corrected", "mean_score"] == pytest.approx(own["score"].mean())
    expected = measure.group_bias(own.groupby("prompt")["score"].mean(), PROMPTS["bucket"])
    assert table.loc["corrected", "bias"] == pytest.approx(float(expected))
    assert table["tokens"].to_dict() == {"as_published": 9, "corrected": 49}


def test_a_model_without_bias_is_refused(evaluated):
    texts, losses, windows = evaluated
    with pytest.raises(ValueError, match="no bias on these prompts"):
        experiment.compare(SETS, texts.assign(score=0.5), losses, PROMPTS, windows)


def grid(rows):
    return pd.DataFrame(rows, columns=["gamma", "alpha", "pruned", "bias", "ppl_ratio"])


def test_choice_of_gamma():
    rows = [
        (0.2, 0.1, 1, 0.1, 1.5),
        (0.3, 0.1, 1, 0.2, 1.1),
        (0.4, 0.1, 1, 0.3, 1.0),
        (0.4, 0.0, 0, 0.0, 1.0),
    ]
    assert experiment.choose_gamma(grid(rows), 1.25) == 0.3
    assert experiment.choose_gamma(grid(rows), 2.0) == 0.2
    assert experiment.choose_gamma(grid(rows), 0.9) == 0.4, "none keeps to it: the mildest"
    with pytest.raises(ValueError, match="too few heads"):
        experiment.choose_gamma(grid(rows[3:]), 1.25)


def test_selections_and_grid():
    n = 50
    rng = np.random.default_rng(0)
    scores = pd.DataFrame({"bias_without": rng.random(n), "ppl_without": rng.random(n)})
    chosen = experiment.selections(
        scores, {"magnitude": rng.random(n)}, gamma=0.3, alphas=[0.0, 0.1, 0.2], draws=2
    )
    assert set(chosen["method"]) == {"FASP", "bias only", "perplexity only", "magnitude", "random"}
    assert (chosen["heads"].map(len) == (chosen["alpha"] * n).astype(int)).all()
    wide = experiment.gamma_grid(scores, [0.2, 0.9], [0.0, 0.1, 0.2])
    assert set(wide["method"]) == {"FASP"}
    assert set(zip(wide["gamma"], wide["alpha"], strict=True)) == {
        *((0.2, a) for a in (0.0, 0.1, 0.2)),
        *((0.9, a) for a in (0.0, 0.1)),
    }


def test_verdicts():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "method": ["good", "good", "costly", "idle", "chance", "worse", "random", "random"],
            "gamma": 0.0,
            "alpha": [0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2],
            "pruned": 3,
            "change": [-40.0, -50.0, -60.0, 1.0, -14.0, 30.0, -10.0, -12.0],
            "change_high": [-10.0, 5.0, -20.0, 20.0, 0.0, 40.0, 0.0, 0.0],
            "ppl_ratio": [1.1, 1.2, 3.0, 1.0, 1.0, 1.0, 1.0, 1.24],
        }
    )
    table["ppl_ratio_low"], table["ppl_ratio_high"] = table["ppl_ratio"] - 0.02, table["ppl_ratio"] + 0.02
    drawn = {(r.method, 0.0, r.alpha): rng.normal(r.change, 4, 2000) for r in table.itertuples()}
    out = experiment.verdicts(table, drawn, 1.25).set_index("method")
    assert out.loc["good", "mean_change"] == -45 and out.loc["good", "reduced_at"] == 0.5
    assert out.loc["good", "low"] < -45 < out.loc["good", "high"] < 0
    assert out.loc["good", "against_random"] == -34
    assert out["effect"].to_dict() == {
        "good": "reduces bias",
        "costly": "reduces bias",
        "idle": "no clear change",
        "chance": "no more than random",
        "worse": "raises bias",
        "random": "reduces bias",
    }
    assert out["within_limit"].to_dict() == {m: m not in ("costly", "random") for m in out.index}
    assert out["beyond_limit"].to_dict() == {m: m == "costly" for m in out.index}  # random: can't be told


def test_conclusions():
    yes, no = ("reduces bias", True), ("no more than random", True)

    def table(against=(-5, 30), change=(-40, -20), beyond=True, **effects):
        (low, high), (against_low, against_high) = change, against
        ends = {"low": low, "high": high, "against_low": against_low, "against_high": against_high}
        ends["worst_ppl_ratio"] = 1.255
        return pd.DataFrame(
            [
                {"method": m.replace("_", " "), "effect": e, "within_limit": w, "against_random": 0, **ends}
                | {"beyond_limit": beyond and not w}
                for m, (e, w) in ({"random": no} | effects).items()
            ]
        )

    costly, idle = ("reduces bias", False), ("no clear change", True)
    assert experiment.conclude(table(FASP=yes, random=no), 0.01)[0] == "reproduced"
    assert experiment.conclude(table(FASP=yes, bias_only=("reduces bias", False)), 0.01)[0] == "reproduced"
    assert experiment.conclude(table(FASP=yes, magnitude=yes), 0.01)[0] == "partly reproduced"
    assert experiment.conclude(table(FASP=no, magnitude=yes), 0.01)[0] == "not reproduced"
    assert experiment.conclude(table(FASP=costly, magnitude=yes), 0.01)[0] == "not reproduced"
    assert (
        experiment.conclude(table(FASP=idle, against=(-30, 5), change=(-9, 20)), 0.01)[0] == "not reproduced"
    )
    assert experiment.conclude(table(FASP=no, against=(-18, 31)), 0.01)[0] == "undecided"
    assert experiment.conclude(table(FASP=idle, against=(-30, 5), change=(-25, 5)), 0.01)[0] == "undecided"
    verdict, reason = experiment.conclude(table(FASP=costly), 0.01)
    assert verdict == "not reproduced" and "perplexity × 1.255 at most" in reason
    wide = (-40, 5)  # holds a clear effect and none: then perplexity alone can decide
    for beyond, expected in ((True, "not reproduced"), (False, "undecided")):
        assert experiment.conclude(table(FASP=costly, against=wide, beyond=beyond), 0.01)[0] == expected
    verdict, reason = experiment.conclude(table(FASP=yes, random=no), 0.12)
    assert verdict == "undecided" and "p = 0.12" in reason


def test_interval_of_the_perplexity_ratio(evaluated):
    """Oracle: the standard error of a weighted mean of paired differences between windows."""
    texts, losses, windows = evaluated
    table, _ = experiment.compare(SETS, texts, losses, PROMPTS, windows, n_boot=4000)
    wide = losses.pivot(index="window", columns="heads", values="nll")
    row = table[(table["method"] == "FASP") & (table["alpha"] == 0.2)].iloc[0]
    each, weight = (wide["1 6"] - wide[""]).to_numpy(), windows.counts / windows.counts.sum()
    error = np.sqrt((weight**2 * (each - weight @ each) ** 2).sum())
    assert np.log(row["ppl_ratio"]) == pytest.approx(weight @ each)
    reach = np.log(row["ppl_ratio_high"] / row["ppl_ratio_low"]) / 2
    assert reach == pytest.approx(1.96 * error, rel=0.15)
    assert row["ppl_ratio_low"] < row["ppl_ratio"] < row["ppl_ratio_high"]


def test_floor_is_that_of_shuffled_labels(evaluated):
    texts, losses, windows = evaluated
    table, _ = experiment.compare(SETS, texts, losses, PROMPTS, windows, n_boot=50)
    scores = texts[texts["heads"] == "1 6"].groupby("prompt")["score"].mean().to_numpy()
    expected = measure.noise_floor(scores, PROMPTS["bucket"], n_perm=5000).mean()
    got = table[(table["method"] == "FASP") & (table["alpha"] == 0.2)]["floor"].iloc[0]
    assert got == pytest.approx(expected, rel=0.15)
