"""Selections: the definition, the published rule on the published scores, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biasprune.measures.prompts import AXES
from biasprune.methods import select

scores = st.lists(st.floats(-5, 5, allow_nan=False, width=16), min_size=2, max_size=40)


def by_definition(bias: list[float], ppl: list[float], gamma: float, alpha: float) -> list[int]:
    """Slow oracle: remove the most critical heads one by one, then take the most biasing one by one."""
    n = len(bias)
    candidates = list(range(n))
    for _ in range(int(n * gamma)):
        candidates.remove(max(candidates, key=lambda h: (ppl[h], h)))  # ties: the lower index stays
    pruned = []
    for _ in range(int(alpha * n)):
        worst = min(set(candidates) - set(pruned), key=lambda h: (bias[h], h))
        pruned.append(worst)
    return sorted(pruned)


@settings(max_examples=200)
@given(data=st.data(), bias=scores, gamma=st.floats(0, 1), share=st.floats(0, 1))
def test_corrected_is_the_definition(data, bias, gamma, share):
    ppl = data.draw(st.lists(st.integers(0, 5), min_size=len(bias), max_size=len(bias)))
    alpha = share * (1 - gamma)
    got = select.fasp(bias, ppl, gamma=gamma, alpha=alpha)
    assert got == by_definition(bias, ppl, gamma, alpha)
    assert len(got) == int(alpha * len(bias)) and all(type(h) is int for h in got)


def published_rule(bias: np.ndarray, ppl: np.ndarray, gamma: float, alpha: float) -> list[int]:
    """Oracle: the thresholds of the published code, written down from its description."""
    n = len(bias)
    n_keep, k = n - int(n * gamma), int(alpha * n)
    if k == 0:
        return []
    ppl = ppl.round(3)
    candidates = ppl <= np.sort(ppl)[n_keep - 1]
    cut = np.sort(bias[candidates])[k - 1]
    return [h for h in range(n) if candidates[h] and bias[h] <= cut]


@settings(max_examples=200)
@given(data=st.data(), n=st.integers(2, 40), gamma=st.floats(0, 0.9), share=st.floats(0, 1))
def test_as_published_is_the_published_thresholds_ties_included(data, n, gamma, share):
    few = st.lists(st.integers(0, 4), min_size=n, max_size=n)  # few values: many ties
    bias, ppl = np.array(data.draw(few), float), np.array(data.draw(few), float)
    alpha = share * (1 - gamma)
    got = select.fasp(bias, ppl, gamma=gamma, alpha=alpha, rule="as_published")
    assert got == published_rule(bias, ppl, gamma, alpha)
    assert len(got) >= int(alpha * n)


def test_published_scores_give_the_published_sets(published):
    """Every model of the paper with scores × axis × γ × α."""
    contributions = json.loads((published / "fasp-published" / "head_contributions.json").read_text())
    scored = {m: s for m, s in contributions.items() if "cont_to_ppl" in s}
    # a model that the paper doesn't show; one of its heads was never scored
    incomplete = scored.pop("facebook/opt-350m")
    with pytest.raises(ValueError, match="finite head scores"):
        select.fasp(incomplete["cont_to_gender_and_sex_bias"], incomplete["cont_to_ppl"], gamma=0.3, alpha=0.1)
    compared, with_ties = 0, 0
    for scores in scored.values():
        ppl = np.array(scores["cont_to_ppl"], dtype=float)
        for axis in AXES:
            if f"cont_to_{axis}_bias" not in scores:
                continue
            bias = np.array(scores[f"cont_to_{axis}_bias"], dtype=float)
            for gamma in (0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
                for alpha in np.arange(0, 0.21, 0.02):
                    got = select.fasp(bias, ppl, gamma=gamma, alpha=alpha, rule="as_published")
                    assert got == published_rule(bias, ppl, gamma, alpha)
                    compared += 1
                    with_ties += got != select.fasp(bias, ppl, gamma=gamma, alpha=alpha)
    assert len(scored) == 6 and compared == 22 * 7 * 11  # 4 models × 5 axes, 2 models × 1
    assert with_ties > 0, "ties occur, so the two rules can be told apart"


def test_monotone_scores_give_the_same_set():
    rng = np.random.default_rng(0)
    bias, ppl = rng.random(50), rng.random(50)
    one = select.fasp(bias, ppl, gamma=0.3, alpha=0.2)
    assert one == select.fasp(np.log(bias), 7 * ppl - 3, gamma=0.3, alpha=0.2)


def test_boundaries():
    bias, ppl = [3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]
    assert select.fasp(bias, ppl, gamma=0.25, alpha=0.25) == [1]
    assert select.fasp(bias, ppl, gamma=0, alpha=0.25) == [3]
    assert select.fasp(bias, ppl, gamma=1, alpha=0) == []
    assert select.fasp(bias, ppl, gamma=0, alpha=1) == [0, 1, 2, 3]
    assert select.fasp(bias, ppl, gamma=0.9, alpha=0.1) == []  # 1 − .9 isn't exactly .1 in floats


@pytest.mark.parametrize(
    ("bias", "ppl", "options", "message"),
    [
        ([1, 2], [1, 2], {"gamma": 0.5, "alpha": 0.6}, "alpha = 0.6 > 1 − gamma = 0.5"),
        ([1, 2], [1, 2], {"gamma": -0.1, "alpha": 0.6}, "gamma = -0.1 isn't a share"),
        ([1, 2], [1, 2], {"gamma": 0.1, "alpha": float("nan")}, "alpha = nan isn't a share"),
        ([], [], {"gamma": 0.1, "alpha": 0.1}, "bias_without: give a flat list of finite"),
        ([[1, 2]], [1, 2], {"gamma": 0.1, "alpha": 0.1}, "flat"),
        ([1, float("nan")], [1, 2], {"gamma": 0.1, "alpha": 0.1}, "bias_without: give a flat list of finite"),
        ([1, 2], [float("inf"), 2], {"gamma": 0.1, "alpha": 0.1}, "ppl_without: give a flat list of finite"),
        ([1, 2, 3], [1, 2], {"gamma": 0.1, "alpha": 0.1}, "3 bias scores, but 2"),
        ([1, 2], [1, 2], {"gamma": 0.1, "alpha": 0.1, "rule": "new"}, "choose one of corrected"),
    ],
)
def test_bad_input(bias, ppl, options, message):
    with pytest.raises(ValueError, match=message):
        select.fasp(bias, ppl, **options)


def test_lowest_and_random():
    assert select.lowest([5, 1, 1, 9], alpha=0.5) == [1, 2]
    assert select.lowest([5, 1, 1, 9], alpha=0.25) == [1]
    assert select.lowest([5, 1, 1, 9], alpha=0.25, rule="as_published") == [1, 2]
    assert select.lowest([5, 1], alpha=0) == []
    with pytest.raises(ValueError, match="finite"):
        select.lowest([5, float("nan")], alpha=0.5)
    sets = [select.random(range(40), k, seed=1) for k in (4, 8, 20)]
    assert [len(s) for s in sets] == [4, 8, 20]
    assert set(sets[0]) < set(sets[1]) < set(sets[2])
    assert sets[0] != select.random(range(40), 4, seed=2)
    assert set(select.random([3, 7, 11], 2, seed=0)) < {3, 7, 11}, "matched controls draw from some heads alone"
    hits = np.bincount([h for s in range(2000) for h in select.random(range(10), 2, seed=s)], minlength=10)
    assert abs(hits - 400).max() < 90  # uniform: 400 ± 4.5 standard deviations
