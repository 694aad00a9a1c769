"""Methods that look at the name: attention by hand, greedy order, and a direction that carries the planted gap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from biasprune.core import model
from biasprune.core.masks import Pruning, masked
from biasprune.measures import numbers as nb
from biasprune.measures.choices import pronouns
from biasprune.methods import names

GROUPS = ("Ostrin", "Velani")
ASKING = nb.Asking(seeds=(0, 1), max_new_tokens=4, chat=False, most=8)


@pytest.fixture(scope="module")
def audit():
    lm = model.load("planted-audit", device="cpu")
    contexts = nb.contexts("models/planted-audit/contexts.csv", ["market"], 2)
    halves = nb.names("models/planted-audit/names.csv", "race", GROUPS)
    return lm, *(nb.numbers(lm, contexts, half, by="race", groups=GROUPS, asking=ASKING) for half in halves)


@torch.no_grad()
def test_attention_by_hand(audit):
    lm, select, _ = audit
    pruning = Pruning(heads={1, 5})
    table, total = select.own_answers(lm).groupby(["question", "group"], sort=False).head(8), 0.0
    lm.model.set_attn_implementation("eager")
    for row in table.itertuples():
        name = lm.tokenizer(row.prompt, return_offsets_mapping=True)["offset_mapping"]
        start = row.prompt.rindex(row.cluster)
        inside = [i for i, (a, b) in enumerate(name) if b > start and a < start + len(row.cluster) and b > a]
        ids = torch.tensor([row.ids + row.answer])
        with masked(lm, pruning):
            layers = lm.model(ids, output_attentions=True).attentions
        asking = range(len(row.ids) - 1, ids.shape[1] - 1)
        total = total + np.array(
            [[[a[0, h, q, inside].sum() for q in asking] for h in range(a.shape[1])] for a in layers]
        )
    lm.model.set_attn_implementation("sdpa")
    expected = total.mean(-1) / len(table)
    got = names.attention_to_names(lm, select, pruning)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert lm.model.config._attn_implementation == "sdpa" and got.max() > 5 * np.median(got)


def test_greedy_scores_anew_after_every_head(audit):
    lm, select, _ = audit
    n, chosen = lm.anatomy.n_flat, []
    for _ in range(3):
        score = names.attention_to_names(lm, select, Pruning(heads=chosen)).ravel()
        chosen.append(max((h for h in range(n) if h not in chosen), key=lambda h: score[h]))
    assert names.by_attention(3.01 / n)(lm, select) == Pruning(heads=chosen)
    assert names.by_attention(0.0)(lm, select) == Pruning()


def test_the_direction_of_the_planted_gap_is_erased_and_random_ones_are_not(audit):
    lm, select, judge = audit
    whole = abs(judge.readings(judge.read(lm, [Pruning()])).bias()[0])

    def left(found: names.Directions) -> float:
        with names.erased(lm, found) as changed:
            return abs(judge.readings(judge.read(changed, [Pruning()])).bias()[0])

    found = names.directions(lm, select)
    assert left(found) < 0.1 * whole
    assert min(left(names.random_like(found, seed)) for seed in range(3)) > 0.5 * whole
    again = abs(judge.readings(judge.read(lm, [Pruning()])).bias()[0])
    assert again == pytest.approx(whole), "the model leaves as it came"


@torch.no_grad()
def test_erasing_by_its_formula(audit):
    lm, select, _ = audit
    found, ids = names.directions(lm, select), torch.tensor([[1, 2, 3, 4]])
    seen = []
    hook = lm.model.get_submodule(lm.anatomy.layers[-1]).ln_1.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with names.erased(lm, found):
        lm.model(ids)
    hook.remove()
    v, middle = found[-1]
    projected = (seen[0] - middle) @ v
    assert float(v.norm()) == pytest.approx(1, abs=1e-5) and projected.abs().max() < 1e-4


@torch.no_grad()
def test_the_direction_of_choices_is_between_stereotypes():
    lm, measure = model.load("tiny-llama", device="cpu"), pronouns("speech", "select")
    found = names.directions(lm, measure)
    ids, side = model.encode(lm, measure.items["text"].tolist()), measure.items["stereotype"].to_numpy()
    last = [[h[0, -1] for h in lm.model.model(torch.tensor([i]), output_hidden_states=True).hidden_states] for i in ids]
    assert not found[0][0].any(), "all sentences end with the same word"
    for layer, (v, middle) in list(enumerate(found))[1:]:
        a, b = (torch.stack([x[layer] for x, s in zip(last, side, strict=True) if s == g]).mean(0) for g in "ab")
        assert abs(float((a - b) / (a - b).norm() @ v)) == pytest.approx(1, abs=1e-3)
        assert torch.allclose(middle, (a + b) / 2, atol=1e-4)
