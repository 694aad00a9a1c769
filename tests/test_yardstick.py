"""One yardstick: chances against the whole softmax, fine-tuning that learns and is undone, known worlds."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from biasprune import lm, yardstick

PLAIN = "unchanged"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return yardstick.prompts()


@pytest.fixture(scope="module")
def net() -> lm.LM:
    return lm.load("tiny-llama", device="cpu")


def test_sides_share_nothing(table):
    select, judge = (table[table["side"] == s] for s in ("select", "judge"))
    assert set(select["context"]) == {yardstick.SELECTED} and judge["context"].nunique() == 5
    assert not set(select["item"]) & set(judge["item"]) and select["item"].nunique() == 30
    assert not set(select["prompt"]) & set(judge["prompt"])
    assert (judge.groupby("context")["item"].nunique() >= 30).all()
    names = judge[judge["context"] == yardstick.NAMES]
    assert set(names["share"]) == {0.0, 1.0} and table["share"].between(0, 1).all()
    assert not table["prompt"].str.contains(r"\ba [aeiou]|\{").any()
    told = table.loc[table["context"] != yardstick.NAMES, "prompt"]
    assert not told.str.contains(r"\b(?:she|he|her|his|him|woman|man)\b", case=False).any()
    # either side spans all shares alike
    for side in (select, judge):
        assert side["share"].min() < 0.05 and side["share"].max() > 0.9


def test_chances_are_what_the_whole_softmax_says(net, table):
    some = table.iloc[::37].reset_index(drop=True)
    got = yardstick.chances(net, some)
    for row, p in zip(some.itertuples(), got, strict=True):
        total = []
        for word in (row.woman, row.man):
            start, ids = (net.tokenizer(t)["input_ids"] for t in (row.prompt, row.prompt + word))
            with torch.no_grad():
                each = net.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            total.append(sum(float(each[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        assert p == pytest.approx(1 / (1 + np.exp(total[1] - total[0])), abs=1e-5)
    shuffled = some.sample(frac=1, random_state=0)
    np.testing.assert_allclose(yardstick.chances(net, shuffled), got[shuffled.index], atol=1e-6)


def test_slope_is_least_squares():
    rng = np.random.default_rng(0)
    x, p, w = rng.random(20), rng.random((3, 20)), rng.integers(0, 4, 20).astype(float)
    for own, row in zip(yardstick.slope(p, x), p, strict=True):
        assert own == pytest.approx(np.polyfit(x, row, 1)[0])
    repeated = np.repeat(np.arange(20), w.astype(int))
    for own, row in zip(yardstick.slope(p, x, w), p, strict=True):
        assert own == pytest.approx(np.polyfit(x[repeated], row[repeated], 1)[0])


def test_texts_to_tune_on(table):
    some = table[table["side"] == "select"].reset_index(drop=True)
    both = yardstick.tuning_texts(some, balanced=True, seed=0)
    assert len(both) == 2 * len(some)
    for i, row in enumerate(some.itertuples()):
        for text, word in zip(both[2 * i : 2 * i + 2], (row.woman, row.man), strict=True):
            assert text.startswith(f"{row.prompt}{word} ") and text.endswith(".")
    women = np.zeros(len(some))
    for seed in range(40):
        texts = yardstick.tuning_texts(some, balanced=False, seed=seed)
        assert len(texts) == len(both)
        own = np.array(
            [t[len(p) :].startswith(" she ") for p, t in zip(some["prompt"].repeat(2), texts, strict=True)]
        )
        women += own.reshape(-1, 2).mean(1) / 40
    assert np.abs(women - some["share"]).max() < 0.25 and np.corrcoef(women, some["share"])[0, 1] > 0.97


def test_tuning_teaches_what_the_texts_say_and_is_undone(net, table):
    some = table[(table["side"] == "select") & table["item"].isin(["mechanic", "secretary"])]
    some = some.reset_index(drop=True)
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    extreme = some.assign(share=(some["share"] > 0.5).astype(float))
    slopes = {}
    for balanced in (False, True):
        texts = yardstick.tuning_texts(extreme, balanced=balanced, seed=0)
        with yardstick.tuned(net, texts, epochs=40, rate=3e-3, batch=4, seed=0):
            slopes[balanced] = float(
                yardstick.slope(yardstick.chances(net, some), extreme["share"].to_numpy())
            )
            assert any(not torch.equal(v, before[k]) for k, v in net.model.state_dict().items())
        assert all(torch.equal(v, before[k]) for k, v in net.model.state_dict().items())
    assert slopes[False] > 0.5 > 0.15 > abs(slopes[True])
    with pytest.raises(RuntimeError, match="stop"), yardstick.tuned(net, ["A b c."], rate=1e-2):
        raise RuntimeError("stop")
    assert all(torch.equal(v, before[k]) for k, v in net.model.state_dict().items()), (
        "undone after errors too"
    )
    with pytest.raises(ValueError, match="at least one of each"), yardstick.tuned(net, []):
        pass
    with pytest.raises(ValueError, match="at least one of each"), yardstick.tuned(net, ["A b."], epochs=0):
        pass


def world(table: pd.DataFrame, slopes: dict[str, dict[str, float]], noise: float = 0.05, seeds: int = 3):
    """p(she) with given slopes by way and context."""
    rng, rows = np.random.default_rng(0), []
    judge = table[table["side"] == "judge"]
    base = rng.normal(0, noise, len(judge))  # what sentences are like, for every way
    for way, by_context in slopes.items():
        for seed in range(1 if way == PLAIN else seeds):
            own = judge["context"].map(by_context).to_numpy()
            p = 0.5 + own * (judge["share"] - 0.5) + base + rng.normal(0, noise / 5, len(judge))
            rows.append(judge[["context", "item", "share"]].assign(way=way, seed=seed, p=p))
    return pd.concat(rows, ignore_index=True)


def flat(there: float, elsewhere: float, names: float = 0.9) -> dict[str, float]:
    rest = dict.fromkeys(("possession", "welcome", "story"), elsewhere)
    return {"speech": there, **rest, "names": names}


CONTROLS = {"heads": ["random heads"], "data": ["data as observed"]}


def said(table: pd.DataFrame, slopes: dict[str, dict[str, float]], **options) -> dict[str, str]:
    found = yardstick.replicates(world(table, slopes, **options), n_boot=400)
    got = yardstick.verdicts(found, CONTROLS, "data")
    return dict(zip(got["claim"], got["verdict"], strict=True))


def test_verdicts_of_worlds_that_are_known(table):
    start, same = flat(0.5, 0.5), flat(0.5, 0.5)
    heads, data = flat(0.3, 0.3), flat(0.05, 0.45)
    names = [
        "heads: lowers the bias where it was selected, more than its control",
        "data: lowers the bias where it was selected, more than its control",
        "heads: the effect fades in other contexts",
        "data: the effect fades in other contexts",
        "data: removes more than heads",
    ]
    worlds = {PLAIN: start, "heads": heads, "data": data, "random heads": same, "data as observed": same}
    got = said(table, worlds)
    assert [got[n] for n in names] == ["reproduced"] * 2 + ["undecided", "reproduced", "reproduced"]
    # a control that does as much; and the data doing less
    got = said(table, {**worlds, "random heads": heads, "data": flat(0.45, 0.45)})
    assert got[names[0]] == "undecided" and got[names[2]] == "undecided"
    assert got[names[4]] == "not reproduced"
    got = said(table, {k: flat(0.0, 0.0) for k in worlds})
    assert set(got.values()) == {"undecided"}, "no bias to lower"


def test_intervals_hold_the_truth(table):
    """Slopes of .4 and .1, drawn again and again: about 95 % of intervals of the difference hold .3."""
    worlds = {PLAIN: flat(0.4, 0.4), "heads": flat(0.1, 0.2)}
    inside = []
    for k in range(60):
        each = world(table, worlds)
        rng = np.random.default_rng(k)
        shift = pd.Series(rng.normal(0, 0.1, each["item"].nunique()), index=each["item"].unique())
        each["p"] += np.where(each["way"] == "heads", each["item"].map(shift), 0)  # occupations differ
        got = yardstick.left(yardstick.replicates(each, n_boot=300, seed=k))
        row = got[(got["way"] == "heads") & (got["context"] == "speech")].iloc[0]
        inside.append(row["removed_low"] < 0.3 < row["removed_high"])
    assert 0.8 < np.mean(inside) <= 1


def test_removed_and_costs_by_hand(table):
    worlds = {PLAIN: flat(0.5, 0.4), "heads": flat(0.25, 0.3, names=0.45)}
    each = world(table, worlds, noise=0.0)
    got = yardstick.removed(yardstick.replicates(each, n_boot=10), ["heads"]).iloc[0]
    assert got["there"] == pytest.approx(0.5) and got["elsewhere"] == pytest.approx(0.25)
    assert got["names"] == pytest.approx(0.5)
    each = each.assign(ppl_test=np.where(each["way"] == PLAIN, 10.0, 12.0), minutes=0.5)
    costs = yardstick.costs(each, {"heads": []})
    assert costs["way"].tolist() == [PLAIN, "heads"] and costs["ppl_ratio"].tolist() == [1.0, 1.2]


def test_the_share_that_leaves_least_within_the_limit():
    share = np.linspace(0, 1, 9)

    def tried(slope: float, ppl: float) -> pd.DataFrame:
        return pd.DataFrame({"side": "select", "share": share, "p": 0.5 + slope * share, "ppl_valid": ppl})

    sweep = yardstick.doses(
        tried(0.5, 10.0),
        {
            ("fasp", 0.1): tried(0.2, 10.5),
            ("fasp", 0.2): tried(0.0, 14.0),
            ("neurons", 0.1): tried(0.1, 20.0),
        },
    )
    assert sweep["bias"].tolist() == pytest.approx([0.5, 0.2, 0.0, 0.1])
    assert yardstick.chosen(sweep, 1.1) == {"fasp": 0.1}
    assert yardstick.chosen(sweep, 1.5) == {"fasp": 0.2}
    assert yardstick.chosen(sweep, 1.0) == {}


def test_heads_that_carry_the_pronoun_are_found(net, table):
    """The first-order slopes of the yardstick's own pairs are what removing a head by a little does."""
    from biasprune import pronouns
    from biasprune.ablate import masked

    some = table[table["side"] == "select"].iloc[::9].reset_index(drop=True)
    of = yardstick.stereotypes(net, some)
    slopes = pronouns.slopes(net, of)
    layer, head = np.unravel_index(np.abs(slopes).argmax(), slopes.shape)
    mask = torch.ones(slopes.shape)
    mask[layer, head] -= 1e-2
    with masked(net, mask), nullcontext():
        less = pronouns.bias(net, of)
    assert (pronouns.bias(net, of) - less) / 1e-2 == pytest.approx(slopes[layer, head], rel=0.1)
