"""Methods find what was planted and their controls don't; the one loop of selecting and judging."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_lm

from biasprune.core import model, weights
from biasprune.core.masks import Pruning
from biasprune.core.stats import Estimate
from biasprune.measures.choices import choices, share_slope
from biasprune.measures.prose import prose
from biasprune.methods import judge, parts
from biasprune.methods.heads import single_heads

PLANTED = 6  # the head that decides which word comes next


def word_choices(side: int = 0) -> object:
    """Log-odds of w20 against w21 after short texts, by an invented share."""
    words = ["the friend", "my neighbour", "a friend", "the old friend", "my young neighbour", "who"]
    rows = [(f"{w} {x}", w, f"{w} {x}", " w20", " w21") for w in words for x in ("is", "was")[side : side + 1]]
    table = pd.DataFrame(rows, columns=["item", "cluster", "text", "a", "b"])
    table["share"] = np.linspace(0.1, 0.9, len(table))
    table["stereotype"] = np.where(table["share"] > 0.5, "a", "b")
    return choices(f"choices {side}", table, share_slope)


@pytest.fixture
def lm() -> model.LM:
    """Random weights; one head's output counts, the other heads' and the MLPs' hardly do."""
    lm = random_lm("llama", seed=4)
    a = lm.anatomy
    with torch.no_grad():
        for layer, (out, down) in enumerate(zip(a.out_projs, a.down_projs, strict=True)):
            lm.model.get_submodule(down).weight.mul_(0.02)
            columns = lm.model.get_submodule(out).weight.view(32, a.n_heads, a.head_dim)
            for head in range(a.n_heads):
                columns[:, head] *= 1.0 if layer * a.n_heads + head == PLANTED else 0.02
    return lm


def prose_of(lm) -> object:
    return prose(lm, "the friend is kind . my neighbour was rude and old . " * 12, length=16)


def harm(lm, what: str = "heads") -> np.ndarray:
    return weights.part_snip(lm, weights.prose(prose_of(lm).cut), what)


def oriented(lm, measure):
    """The measure whose bias the planted head adds to, rather than hides."""
    r = measure.readings(measure.read(lm, [Pruning(), Pruning({PLANTED})]))
    if abs(r.bias()[0]) > abs(r.bias()[1]) and r.bias()[0] > 0:
        return measure
    swapped = measure.items.assign(share=1 - measure.items["share"])
    return choices(measure.name, swapped, share_slope)


def test_slopes_rank_heads_as_removal_does(lm):
    measure = word_choices()
    removed = measure.readings(measure.read(lm, [Pruning(), *single_heads(lm)])).z()
    first_order = measure.effects(lm)
    assert np.abs(first_order).argmax() == np.abs(removed).argmax() == PLANTED
    assert np.sign(first_order[PLANTED]) == np.sign(removed[PLANTED])


@pytest.mark.parametrize("name", ["fasp", "slope"])
def test_the_planted_head_is_found_and_controls_do_not_find_it(lm, name):
    measure, no_harm = oriented(lm, word_choices()), np.zeros((3, 4))
    method = {
        "fasp": parts.fasp(0.0, 0.09, no_harm),
        "slope": parts.by_slope("heads", 0.09, protect=0.0, harm=no_harm),
    }[name]
    assert method(lm, measure) == Pruning({PLANTED})
    controls = [parts.matched(method, seed)(lm, measure) for seed in range(8)]
    assert all(len(c) == 1 and {h // 4 for h in c.heads} == {PLANTED // 4} for c in controls)
    assert len(set(controls)) > 1


def test_what_matters_for_prose_is_protected(lm):
    measure, damage = oriented(lm, word_choices()), np.zeros((3, 4))
    damage[divmod(PLANTED, 4)] = 1.0
    for method in (parts.fasp(0.1, 0.09, damage), parts.by_slope("heads", 0.09, protect=0.1, harm=damage)):
        assert PLANTED not in method(lm, measure).heads


@pytest.mark.parametrize("what", ["heads", "units", "weights"])
@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_set_differences_by_their_definition(lm, what, score):
    measure, cut = word_choices(), weights.prose(prose_of(lm).cut)
    method = parts.by_difference(what, 0.5, group=0.4, protect=0.1, prose=cut, score=score)
    pruning = method(lm, measure)
    sets = [*measure.examples(lm), cut]
    if what == "weights":
        shares = [(0.5, (0.2, 0.1))]
        (expected,) = weights.weight_difference(lm, sets, shares, score=score, per_row=score == "wanda")
        assert pruning == expected and len(pruning) > 0
        return
    norms = [weights.input_norms(lm, x) for x in sets]
    first, *others = (
        weights.part_wanda(lm, n, what) if score == "wanda" else weights.part_snip(lm, x, what)
        for x, n in zip(sets, norms, strict=True)
    )
    chosen = np.zeros(first.shape, dtype=bool)
    rows = range(3) if what == "units" else [slice(None)]  # units layer by layer, heads of the whole model
    for row in rows:
        flat = first[row].ravel()
        kept = set(np.argsort(-flat, kind="stable")[: int(0.5 * flat.size)])
        for score_of, share in zip(others, (0.2, 0.1), strict=True):
            n = max(int(share * flat.size), 1 if what == "heads" and share == 0.2 else 0)
            kept -= set(np.argsort(-score_of[row].ravel(), kind="stable")[:n])
        chosen[row] = np.isin(np.arange(flat.size), list(kept)).reshape(first[row].shape)
    assert getattr(pruning, what) == set(np.flatnonzero(chosen.ravel()))


def test_common_intersects_over_the_values_of_a_column(lm):
    measure = word_choices()
    method = parts.by_slope("heads", 0.5, protect=0.0, harm=np.zeros((3, 4)))
    halves = measure.items.assign(half=["a", "b"] * (len(measure.items) // 2))
    measure = choices("halves", halves, lambda v, items, w: v.mean(-1) + 0 * w.sum(-1))
    expected = [method(lm, m).heads for m in measure.split("half").values()]
    assert parts.common(method, "half")(lm, measure).heads == expected[0] & expected[1]


def test_select_and_judge_is_the_loop_written_out(lm):
    measures = {"a": word_choices(0), "b": word_choices(1), "perplexity": prose_of(lm)}
    method = parts.fasp(0.0, 0.17, np.zeros((3, 4)))
    methods = {"fasp": method, "random": parts.matched(method, 0)}
    names = []

    def pieces(jobs):
        names.extend(jobs)
        return judge.in_memory(jobs)

    pairs = [("a", "a"), ("a", "b"), ("b", "a")]
    frame = judge.select_and_judge(lm, methods, pairs, measures, always=["perplexity"], pieces=pieces)
    assert names == ["unpruned", "fasp by a", "random by a", "fasp by b", "random by b"]
    judged = judge.judged(frame, measures, n_boot=50)
    assert set(map(tuple, judged.table.loc[judged.table["method"] == "fasp", ["selected_by", "judged_by"]].values)) == {
        *pairs,
        ("a", "perplexity"),
        ("b", "perplexity"),
    }
    for row, left, before in zip(judged.table.itertuples(), judged.left, judged.before, strict=True):
        measure = measures[row.judged_by]
        whole, pruned = (
            measure.readings(measure.read(lm, [p])).bias()[0] for p in (Pruning(), Pruning.parse(row.pruning))
        )
        assert row.bias == pytest.approx(pruned, abs=1e-5) and left.point == row.bias
        assert before.point == pytest.approx(whole, abs=1e-5)
        assert row.removed == pytest.approx(abs(whole) - abs(pruned), abs=1e-5)
        assert row.parts == len(Pruning.parse(row.pruning))


def test_removed_and_more_by_hand():
    """The mean comes first, then how much nearer to 0 it is; controls are drawn along."""
    left = [Estimate(x, np.array([x, x + 0.1])) for x in (0.4, -0.2, 1.0, 0.9)]
    before = [Estimate(x, np.array([x, x])) for x in (1.0, 0.6, 1.0, 1.0)]
    judged = judge.Judged(table=pd.DataFrame({"method": ["m", "m", "r", "r"]}), left=left, before=before)
    removed = judged.removed(judged.rows(method="m"))
    assert removed.point == pytest.approx(0.8 - 0.1) and removed.draws == pytest.approx([0.7, 0.8 - 0.2])
    assert judged.share(judged.rows(method="m")).point == pytest.approx(0.7 / 0.8)
    more = judged.more(judged.rows(method="m"), [np.array([2]), np.array([3])])
    assert more.point == pytest.approx(0.7 - 0.05)
