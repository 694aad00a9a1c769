"""The planted neurons are found, and transfer where they are shared; controls; verdicts."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from biasprune import ablate, answers, audit, gaps, measure, prompts, transfer, weightscores
from biasprune import lm as lm_module

GROUPS = ("Ostrin", "Velani")
VERSUS = {"by": "race", "groups": GROUPS}


@pytest.fixture(scope="module")
def planted_audit(request):
    """The planted model's audit, questions about names to select with, and about others."""
    net = lm_module.load("planted-audit", device="cpu")
    contexts, names = (audit.load(w, f"models/planted-audit/{w}.csv") for w in ("contexts", "names"))
    train, test = (
        audit.questions(net, audit.chosen(contexts, [], 2), n, chat=False)
        for n in audit.halves(names, *VERSUS.values())
    )
    sampled = audit.ask(net, pd.concat([train, test], ignore_index=True), seeds=range(4), max_new_tokens=4)
    windows = [
        measure.windows(net, prompts.corpus("corpora/everyday", s), length=64, max_tokens=512)
        for s in ("valid", "test")
    ]
    own = transfer.Audit(
        lm=net,
        sampled=sampled,
        numbers=answers.candidates(net, sampled, most=12),
        utility=weightscores.prose(windows[0]),
        windows=windows[1],
        most=12,
        drawing={"seeds": range(4), "max_new_tokens": 4},
        **VERSUS,
    )
    each = gaps.moments(answers.distribution(net, test, own.numbers))
    return own, train, test, each


def circuits() -> dict[str, set[tuple[int, int]]]:
    truth = json.loads((prompts.user_path("models/planted-audit") / "truth.json").read_text())
    return {c: {(a, b) for a, b in units} for c, units in truth["circuits"].items()}


def removed(own, each, prunings: dict, asked: pd.DataFrame) -> pd.Series:
    got, _ = own.evaluate(prunings, asked)
    return gaps.effects(got, each, **VERSUS).mean(["pruning"]).set_index("pruning")["removed"]


def of(table: pd.DataFrame, context: str) -> pd.DataFrame:
    return table[table["context"] == context].reset_index(drop=True)


def test_the_planted_neurons_are_found_and_controls_dont_find_them(planted_audit):
    own, train, test, each = planted_audit
    for context, units in circuits().items():
        (found,) = own.select("neurons, slope", of(train, context), [0.004])
        chosen = {tuple(x) for x in found.units.nonzero().tolist()}
        controls = {f"random {k}": found.random(own.lm, k) for k in range(5)}
        got = removed(own, each, {"own": found, **controls}, of(test, context))
        start = each.loc[each["context"] == context]
        whole = gaps.effects(start.assign(pruning=""), each, **VERSUS).mean(["pruning"])["directed"][0]
        assert len(chosen) == 4 and got["own"] > 0.8 * whole, "what carries the gap is gone"
        assert chosen & units
        assert got.drop("own").abs().max() < 0.2 * whole


def test_a_fix_transfers_where_the_circuit_is_shared_and_not_elsewhere(planted_audit):
    own, train, test, each = planted_audit
    moments, health = own.judge_levels("neurons, slope", 0.006, "own", train, test)
    effects = gaps.effects(moments, each, **VERSUS)
    at = effects.mean(["level", "selected_for", "context"])
    at = at[at["level"].isin(transfer.LEVELS[2:])].set_index(["selected_for", "context"])
    assert len(at) == 9
    known = circuits()
    for pair in at.index:
        shared = known[pair[0]] == known[pair[1]]
        whole = at.loc[pair, "removed"] + at.loc[pair, "directed"]
        assert (at.loc[pair, "removed"] > 0.8 * whole) == shared
        assert shared or abs(at.loc[pair, "removed"]) < 0.2 * whole
    assert set(moments["level"]) == set(transfer.LEVELS)
    assert (health["ppl"] > 1).all() and (health["parts"] > 0).all()
    random = own.judge_levels("neurons, slope", 0.006, "random 0", train, test)[0]
    both = gaps.effects(pd.concat([moments, random]), each, **VERSUS)
    table = transfer.fading(both, both.mean(["method", "label", "level"])).iloc[0]
    assert table["verdict"] == "reproduced" and table["lost_low"] > 0 and table["random_low"] > 0


def test_a_model_that_answers_nothing_has_no_gap(planted_audit):
    """All units of the last layer but one gone: no numbers, so NaN and health, not 0."""
    own, _, test, each = planted_audit
    dead = ablate.Pruning(units=torch.ones(4, 256).bool(), heads=torch.ones(4, 4).bool())
    moments, health = own.evaluate({"dead": dead}, of(test, "market"))
    assert (health["unparsable"] > 0.9).all() and (health["ppl"] > 100).all()
    assert (moments["n"] == 0).all() and (moments["off"] == 1).all()
    got = gaps.effects(moments, each, **VERSUS).mean(["pruning"]).iloc[0]
    assert np.isnan(got["gap"]) and np.isnan(got["removed_low"])


def test_levels_by_hand(planted_audit):
    """What questions have in common, which questions judge it, and what controls are."""
    own, train, test, _ = planted_audit
    made = own.levels("heads, slope", 0.2, "own", train, test)
    first, second = ("market: lamp", "market: chair")
    same, other = made["same question", first], made["other questions of the context", first]
    assert set(same[1]["variation"]) == set(other[1]["variation"]) == {"lamp"}
    assert torch.equal(other[0].heads, made["same question", second][0].heads)
    both = made["whole context", "market"]
    assert torch.equal(both[0].heads, same[0].heads & other[0].heads)
    assert set(both[1]["context"]) == {"market", "repair", "pastime"}
    random = own.levels("heads, slope", 0.2, "random 3", train, test)
    assert torch.equal(random["same question", first][0].heads.sum(1), same[0].heads.sum(1))
    assert len(random["whole context", "market"][1]) == len(test)


def test_controls(planted_audit):
    own, train, _, _ = planted_audit
    asked = of(train, "market")
    (made,) = own.select("neurons, set difference", asked, [0.05])
    controls = own.controls("neurons, set difference", asked, 0.05, made, 2, 2)
    assert list(controls) == ["random 0", "random 1", "swapped 0", "shuffled 0", "shuffled 1"]
    swapped = transfer.Audit(**{**own.__dict__, "groups": GROUPS[::-1], "_kept": {}})
    (expected,) = swapped.select("neurons, set difference", asked, [0.05])
    assert torch.equal(controls["swapped 0"].units, expected.units)
    assert "swapped 0" not in own.controls(
        "heads, slope", asked, 0.2, own.select("heads, slope", asked, [0.2])[0], 1
    )


def test_slopes_are_kept_and_labels_are_not(planted_audit):
    own, train, _, _ = planted_audit
    asked = of(train, "repair")
    fresh = transfer.Audit(**{**own.__dict__, "_kept": {}})
    relabelled = audit.relabelled(asked, "race", GROUPS, seed=5)
    own.select("neurons, slope", asked, [0.01])
    for labels in (relabelled, asked):
        one, other = (x.select("neurons, slope", labels, [0.01])[0] for x in (own, fresh))
        assert torch.equal(one.units, other.units)


def test_as_published_prunes_in_place(planted_audit):
    """One question after the other, each on what the last has left."""
    own, train, _, _ = planted_audit
    asked = of(train, "market")
    (made,) = own.select("weights, as published", asked, [0.1])
    first, second = (g for _, g in asked.groupby("variation", sort=False))
    (one,) = own.select("weights, as published", first, [0.1])
    assert len(made & one) == len(one) < len(made)
    with one.applied(own.lm):
        (more,) = own.select("weights, as published", second, [0.1])
    assert len(one | more) == len(made) == len(made & (one | more))


def test_verdicts_follow_from_the_intervals():
    rng = np.random.default_rng(0)
    names = [f"n{i}" for i in range(24)]
    who = pd.DataFrame({"name": names, "race": ["white", "black"] * 12, "gender": "f"})
    before = who.assign(context="c", variation="v", n=1.0, off=0.0)
    before["mean"] = 3 + 0.5 * (who["race"] == "white") + rng.normal(0, 0.1, 24)
    before["square"] = before["mean"] ** 2 + 0.04

    def shrunk(share: float, pruning: str) -> pd.DataFrame:
        one = before.assign(pruning=pruning, mean=before["mean"] - share * 0.5 * (who["race"] == "white"))
        return one.assign(square=one["mean"] ** 2 + 0.04)

    kept = {"heads, slope, 0.1": 0.3, "neurons, slope, 0.1": 0.9, "weights, Wanda, 0.1": 0.0}
    kept |= {"heads, slope; random 0": 0.0, "neurons, slope; random 0": 0.02, "weights, Wanda; random 0": 0.0}
    table = pd.concat([shrunk(share, pruning) for pruning, share in kept.items()])
    effects = gaps.effects(table, before)
    swept = effects.mean(["pruning"]).assign(ppl_ratio=1.0)
    chosen = {m: f"{m}, 0.1" for m in ("heads, slope", "neurons, slope", "weights, Wanda")}
    swept["removed_train"] = swept["removed"]
    of = pd.DataFrame({"pruning": [*kept, ""], "parts": 3, "ppl": 20.0})
    beside = transfer.beside_controls(effects, swept, chosen, of)
    assert (beside["random_ppl_ratio"] == 1).all() and "against_swapped" not in beside
    health = pd.DataFrame({"unparsable": 0.0, "inliers": 0.9}, index=["unpruned", *chosen])
    start = pd.Series({"directed": 2.0, "directed_low": 1.5, "directed_high": 2.5})
    got = transfer.verdicts(effects, beside, health, start, 1.1).set_index("claim")["verdict"]
    assert got.tolist() == ["found", "reproduced", "reproduced", "not reproduced", "reproduced"]
    none = transfer.verdicts(effects, beside, health, start.replace(1.5, -0.1), 1.1)["verdict"]
    assert none.tolist()[:4] == ["not found", "undecided", "undecided", "undecided"]
    harmed = transfer.verdicts(effects, beside.assign(ppl_ratio=2.0), health, start, 1.1)
    assert harmed["verdict"].tolist()[1:] == ["undecided"] * 4
    weak = beside[beside["method"] == "weights, Wanda"]
    assert transfer.verdicts(effects, weak, health, start, 1.1)["verdict"].iloc[1] == "not reproduced"
    other = beside.assign(removed_train=[0.5, 0.1, 0.0])
    assert (
        "heads, slope, best among the other names"
        in transfer.verdicts(effects, other, health, start, 1.1)["why"][1]
    )
    odd = health.assign(inliers=[0.9, 0.9, 0.2, 0.9])
    assert transfer.verdicts(effects, beside, odd, start, 1.1)["verdict"].iloc[-1] == "not reproduced"


def test_published_heads_by_hand(published, monkeypatch):
    monkeypatch.setenv("BIASPRUNE_PUBLISHED", str(published))
    table = transfer.published_heads().set_index("pruned")["mean_smd"]
    assert table.tolist() == pytest.approx([0.557, 0.158, 0.114, 0.263], abs=1e-3)
    monkeypatch.delenv("BIASPRUNE_PUBLISHED")
    assert transfer.published_heads().empty


def test_bad_input(planted_audit):
    own, train, _, _ = planted_audit
    with pytest.raises(ValueError, match="unknown method 'x'; there are: heads, set difference"):
        own.select("x", train, [0.1])
    with pytest.raises(ValueError, match="0 random draws"):
        own.controls("heads, slope", train, 0.1, ablate.Pruning(), 0)
    with pytest.raises(ValueError, match=r"share = 2 is not a share between 0 and 1"):
        own.select("neurons, slope", of(train, "market"), [2])
    alone = train.assign(race="Ostrin")
    with pytest.raises(ValueError, match="group 'Velani' of 'race' has fewer than two names"):
        own.select("neurons, slope", alone, [0.1])
    with pytest.raises(ValueError, match="group 'Velani' of 'race' has no numeric answer"):
        own.select("weights, Wanda", alone, [0.1])
    assert len(ablate.Pruning()) == 0
