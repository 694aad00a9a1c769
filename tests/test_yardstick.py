"""One yardstick: chances against the whole softmax, fine-tuning that learns and is undone, known worlds."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from biasprune import lm, pronouns, yardstick
from biasprune.ablate import Pruning, masked

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
    assert not set(select["item"]) & set(judge["item"]) and select["item"].nunique() == 29
    assert not set(select["prompt"]) & set(judge["prompt"])
    assert (judge.groupby("context")["item"].nunique() >= 29).all()
    names = judge[judge["context"] == yardstick.NAMES]
    assert set(names["share"]) == {0.0, 1.0} and table["share"].between(0, 1).all()
    assert not table["prompt"].str.contains(r"\ba [aeiou]|\{").any()
    told = table.loc[table["context"] != yardstick.NAMES, "prompt"]
    assert not told.str.contains(r"\b(?:she|he|her|his|him|woman|man)\b", case=False).any()
    # either side spans all shares alike
    for side in (select, judge):
        assert side["share"].min() < 0.05 and side["share"].max() > 0.9


def test_log_odds_are_what_the_whole_softmax_says(net, table):
    some = table.iloc[::37].reset_index(drop=True)
    got = yardstick.log_odds(net, some)
    for row, y in zip(some.itertuples(), got, strict=True):
        total = []
        for word in (row.woman, row.man):
            start, ids = (net.tokenizer(t)["input_ids"] for t in (row.prompt, row.prompt + word))
            with torch.no_grad():
                each = net.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            total.append(sum(float(each[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        assert y == pytest.approx(total[0] - total[1], abs=1e-5)
    shuffled = some.sample(frac=1, random_state=0)
    np.testing.assert_allclose(yardstick.log_odds(net, shuffled), got[shuffled.index], atol=1e-5)


def test_slope_is_least_squares():
    rng = np.random.default_rng(0)
    share, y, w = rng.random(20), rng.normal(size=(3, 20)), rng.integers(0, 4, 20).astype(float)
    share[:2] = 0.0, 1.0
    kept = np.clip(share, 0.02, 0.98)
    x = np.log(kept / (1 - kept))
    for own, row in zip(yardstick.slope(y, share), y, strict=True):
        assert own == pytest.approx(np.polyfit(x, row, 1)[0])
    repeated = np.repeat(np.arange(20), w.astype(int))
    for own, row in zip(yardstick.slope(y, share, w), y, strict=True):
        assert own == pytest.approx(np.polyfit(x[repeated], row[repeated], 1)[0])
    # as the share, but for a liking of one pronoun: 1
    assert yardstick.slope(x - 3, share) == pytest.approx(1)
    with pytest.raises(ValueError, match="all shares of women are alike"):
        yardstick.slope(y[0], np.full(20, 0.5))


def test_texts_to_tune_on(table):
    some = table[table["side"] == "select"].reset_index(drop=True)
    both = yardstick.tuning_texts(some, seed=0)
    assert len(both) == 2 * len(some)
    for i, row in enumerate(some.itertuples()):
        for text, word in zip(both[2 * i : 2 * i + 2], (row.woman, row.man), strict=True):
            assert text.startswith(f"{row.prompt}{word} ") and text.endswith(".")
    chance, women = np.random.default_rng(1).random(len(some)), np.zeros(len(some))
    for seed in range(40):
        texts = yardstick.tuning_texts(some, seed=seed, chance=chance)
        assert len(texts) == len(both)
        pairs = zip(some["prompt"].repeat(2), texts, strict=True)
        own = np.array([t[len(p) :].startswith(" she ") for p, t in pairs])
        women += own.reshape(-1, 2).mean(1) / 40
    assert np.abs(women - chance).max() < 0.25 and np.corrcoef(women, chance)[0, 1] > 0.97


def test_tuning_teaches_what_the_texts_say_to_a_copy(net, table):
    some = table[(table["side"] == "select") & table["item"].isin(["mechanic", "secretary"])]
    some = some.reset_index(drop=True)
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    chance, slopes = (some["share"] > 0.5).astype(float).to_numpy(), {}
    for name, own in (("stereotyped", chance), ("balanced", None)):
        texts = yardstick.tuning_texts(some, seed=0, chance=own)
        copy = yardstick.tuned(net, texts, epochs=40, rate=3e-3, batch=4, seed=0)
        slopes[name] = float(yardstick.slope(yardstick.log_odds(copy, some), some["share"].to_numpy()))
        assert all(torch.equal(v, before[k]) for k, v in net.model.state_dict().items())
    assert slopes["stereotyped"] > 0.8 > 0.2 > abs(slopes["balanced"])
    with pytest.raises(ValueError, match="texts = 0"):
        yardstick.tuned(net, [])
    with pytest.raises(ValueError, match="epochs = 0"):
        yardstick.tuned(net, ["A b."], epochs=0)
    with pytest.raises(ValueError, match="batch = 0"):
        yardstick.tuned(net, ["A b."], batch=0)


def test_tuning_a_bfloat16_model_keeps_small_steps():
    net = lm.load("tiny-gpt2", dtype="bfloat16", device="cpu")
    texts = [f"The mechanic said that she has {k} cats." for k in range(40)]
    one, again, other = (yardstick.tuned(net, texts, rate=1e-5, seed=s) for s in (0, 0, 1))
    start = net.model.state_dict()
    for k, v in one.model.state_dict().items():
        assert v.dtype == torch.float32 and torch.equal(v, again.model.state_dict()[k]), (
            "one seed, one result"
        )
        assert (v - start[k].float()).abs().max() < 1e-4
    moved = [(v != start[k].float()).float().mean() for k, v in one.model.state_dict().items() if v.dim() > 1]
    assert np.mean(moved) > 0.2, "steps smaller than bfloat16 can hold aren't lost"
    assert any(not torch.equal(v, other.model.state_dict()[k]) for k, v in one.model.state_dict().items())


def world(
    table: pd.DataFrame,
    slopes: dict[str, dict[str, float]],
    noise: float = 0.2,
    seeds: int = 3,
    jump: float = 0.0,
):
    """Log-odds with given slopes by way and context."""
    rng, rows = np.random.default_rng(0), []
    judge = table[table["side"] == "judge"]
    base = rng.normal(0, noise, len(judge))  # what sentences are like, for every way
    for way, by_context in slopes.items():
        for seed in range(1 if way == PLAIN else seeds):
            own = judge["context"].map(by_context).to_numpy()
            kept = judge["share"].clip(0.02, 0.98)
            y = own * np.log(kept / (1 - kept)) + base + rng.normal(0, noise / 5, len(judge)) - 1
            y = y + (0 if way == PLAIN else rng.normal(0, jump) * np.log(kept / (1 - kept)))
            rows.append(judge[["context", "item", "share"]].assign(way=way, seed=seed, y=y))
    return pd.concat(rows, ignore_index=True)


def flat(there: float, elsewhere: float, names: float = 0.9) -> dict[str, float]:
    rest = dict.fromkeys(("possession", "welcome", "story"), elsewhere)
    return {"speech": there, **rest, "names": names}


DATA = yardstick.DATA
CONTROLS = {"heads": "random heads", DATA: "own pronouns"}


def said(
    table: pd.DataFrame, slopes: dict[str, dict[str, float]], damaged=(), dropped=(), **options
) -> list[str]:
    """Verdicts: heads lower, data lower, heads fade, data fade, data more than heads."""
    found = yardstick.replicates(world(table, slopes, **options), n_boot=400)
    return yardstick.verdicts(found, CONTROLS, damaged, dropped)["verdict"].tolist()


YES, NO, OPEN = "reproduced", "not reproduced", "undecided"


def test_verdicts_of_worlds_that_are_known(table):
    same = flat(0.5, 0.5)
    worlds = {
        PLAIN: same,
        "heads": flat(0.3, 0.3),
        DATA: flat(0.05, 0.45),
        "random heads": same,
        "own pronouns": same,
    }
    assert said(table, worlds) == [YES, YES, OPEN, YES, YES]
    # a control that does as much; and the data doing less
    got = said(table, {**worlds, "random heads": flat(0.3, 0.3), DATA: flat(0.45, 0.45)})
    assert got[0] == OPEN and got[2] == OPEN and got[4] == NO
    # less harm than the control is no good
    got = said(
        table, {**worlds, "heads": flat(0.7, 0.7), "random heads": flat(0.9, 0.9), DATA: flat(0.6, 0.6)}
    )
    assert got == [NO, NO, OPEN, OPEN, OPEN]
    # turned round is no less a bias
    got = said(table, {**worlds, "heads": flat(0.0, 0.0), DATA: flat(-0.6, 0.5)})
    assert got[0] == YES and got[1] == got[4] == NO
    # a wrecked model has no bias left, and nothing is said about it
    got = said(table, {**worlds, DATA: flat(0.0, 0.0)}, damaged=[DATA])
    assert got[1] == got[3] == got[4] == OPEN and got[0] == YES
    assert said(table, {k: flat(0.0, 0.0) for k in worlds}) == [OPEN] * 5, "no bias to lower"
    found = yardstick.replicates(world(table, worlds), n_boot=100)
    dropped = yardstick.verdicts(found, CONTROLS, (), ["neurons"]).iloc[2]
    assert dropped["claim"].startswith("neurons: lowers") and dropped["verdict"] == OPEN
    alone = yardstick.verdicts(found, {"heads": "random heads"}, (), [DATA])  # no dose of the data is able
    assert alone["verdict"].tolist() == [YES, OPEN, OPEN]
    assert not alone["claim"].str.contains("removes more").any()


def test_seeds_that_differ_widen_the_interval(table):
    """Slopes that jump by .2 from seed to seed: three seeds don't tell .4 from .5."""
    worlds = {PLAIN: flat(0.5, 0.5), "heads": flat(0.4, 0.4)}
    widths = []
    for jump in (0.0, 0.2):
        got = yardstick.left(each := world(table, worlds, jump=jump), yardstick.replicates(each, n_boot=400))
        row = got[(got["way"] == "heads") & (got["context"] == "speech")].iloc[0]
        widths.append(row["removed_high"] - row["removed_low"])
    assert widths[0] < 0.05 and widths[1] > 0.3


def test_ways_alike_have_no_difference_in_any_replicate(table):
    each = world(table, {PLAIN: flat(0.5, 0.4)})
    found = yardstick.replicates(pd.concat([each, each.assign(way="heads")]), n_boot=50)
    for context in ("speech", "story", "names"):
        assert np.array_equal(found[PLAIN, context], found["heads", context])
    assert found[PLAIN, "speech"].std() > 0


def test_intervals_hold_the_truth(table):
    """Slopes of .4 and .1, drawn again and again: about 95 % of intervals of the difference hold .3."""
    worlds = {PLAIN: flat(0.4, 0.4), "heads": flat(0.1, 0.2)}
    inside, widths = [], []
    for k in range(60):
        each = world(table, worlds, seeds=1)
        rng = np.random.default_rng(k)
        shift = pd.Series(rng.normal(0, 0.3, each["item"].nunique()), index=each["item"].unique())
        each["y"] += np.where(each["way"] == "heads", each["item"].map(shift), 0)  # occupations differ
        got = yardstick.left(each, yardstick.replicates(each, n_boot=300, seed=k))
        row = got[(got["way"] == "heads") & (got["context"] == "speech")].iloc[0]
        inside.append(row["removed_low"] < 0.3 < row["removed_high"])
        widths.append(row["removed_high"] - row["removed_low"])
    assert 0.8 < np.mean(inside) <= 1 and np.mean(widths) < 0.25


def test_removed_and_costs_by_hand(table):
    worlds = {PLAIN: flat(0.5, 0.4), "heads": flat(0.25, 0.3, names=0.45)}
    each = world(table, worlds, noise=0.0)
    got = yardstick.Removed(yardstick.replicates(each, n_boot=10))
    assert got.of("heads", "speech") == pytest.approx(np.full(11, 0.5))
    assert got.elsewhere("heads")[0] == pytest.approx(0.25)
    assert got.of("heads", "names")[0] == pytest.approx(0.5)
    none = yardstick.Removed(
        yardstick.replicates(world(table, {PLAIN: flat(0, 0), "heads": flat(0, 0)}), n_boot=50)
    )
    assert np.isnan(none.of("heads", "speech")).all() and np.isnan(none.elsewhere("heads")).all()
    each = each.assign(ppl_test=np.where(each["way"] == PLAIN, 10.0, 12.0), ppl_valid=10.0, minutes=0.5)
    more = each[each["way"] == "heads"].assign(way="random, for heads")
    costs = yardstick.costs(pd.concat([each, more]), {"heads": "random, for heads"})
    assert costs["way"].tolist() == [PLAIN, "heads", "random, for heads"]
    assert costs["ppl_ratio"].tolist() == pytest.approx([1.0, 1.2, 1.2])
    assert costs["minutes"].isna().tolist() == [False, False, True]
    assert costs["control"].tolist() == [False, False, True]


def test_the_dose_that_leaves_least_within_the_limit():
    share = np.linspace(0.1, 0.9, 9)
    x = np.log(share / (1 - share))

    def tried(slope: float, ppl: float) -> pd.DataFrame:
        return pd.DataFrame({"side": "select", "share": share, "y": slope * x, "ppl_valid": ppl})

    sweep = yardstick.doses(
        tried(0.5, 10.0),
        {
            ("fasp", 0.1): tried(0.2, 10.5),
            ("fasp", 0.2): tried(0.0, 14.0),
            ("neurons", 0.1): tried(0.1, 20.0),
            (DATA, 3e-5): tried(0.3, 10.9),
            (DATA, 1e-4): tried(0.1, 15.1),
        },
    )
    assert sweep["bias"].tolist() == pytest.approx([0.5, 0.2, 0.0, 0.1, 0.3, 0.1])
    assert yardstick.chosen(sweep, 1.1) == {"fasp": 0.1, DATA: 3e-5}
    assert yardstick.chosen(sweep, 1.5) == {"fasp": 0.2, DATA: 3e-5}
    assert yardstick.chosen(sweep, 1.0) == {}


def test_prompts_with_several_pronouns_are_refused(net, table):
    with pytest.raises(ValueError, match="pairs of pronouns: give prompts of one context"):
        yardstick.stereotypes(net, table)
    with pytest.raises(ValueError, match="prompts"):
        yardstick.log_odds(net, table.iloc[:0])


def test_pruned_inside_the_block_only(net, table):
    some = table.iloc[:6]
    whole = yardstick.log_odds(net, some)
    gone = Pruning(heads=torch.ones(4, 4, dtype=torch.bool))
    with yardstick.pruned(net, gone) as less:
        assert np.abs(yardstick.log_odds(less, some) - whole).max() > 1e-3
    np.testing.assert_allclose(yardstick.log_odds(net, some), whole)


def test_heads_that_carry_the_pronoun_are_found(net, table):
    """The first-order slopes of the yardstick's own pairs are what removing a head by a little does."""
    some = table[table["side"] == "select"].iloc[::9].reset_index(drop=True)
    of = yardstick.stereotypes(net, some)
    slopes = pronouns.slopes(net, of)
    layer, head = np.unravel_index(np.abs(slopes).argmax(), slopes.shape)
    mask = torch.ones(slopes.shape)
    mask[layer, head] -= 1e-2
    with masked(net, mask), nullcontext():
        less = pronouns.bias(net, of)
    assert (pronouns.bias(net, of) - less) / 1e-2 == pytest.approx(slopes[layer, head], rel=0.1)
