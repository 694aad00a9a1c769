"""Sets of heads: sums by hand, and greedy removal of what is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from biasprune import headscores, joint, judge, lm, measure, prompts
from biasprune.ablate import head_mask, masked

TABLE = pd.DataFrame({"bucket": list("ab") * 20, "weight": 1 / 40})
HIGH = (TABLE["bucket"] == "a").to_numpy()
SETS = [[], [0], [1], [2], [0, 1], [1, 2], [0, 1, 2]]


def scores(gap_of) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.02, 40)  # the same for all sets, as coupled noise is
    return np.stack([0.2 + gap_of(s) * HIGH + noise for s in SETS])


def test_effects_that_add_up():
    got = joint.additivity(SETS, scores(lambda s: 0.6 - 0.1 * len(s)), TABLE).set_index("heads")
    assert list(got.index) == ["0 1", "1 2", "0 1 2"] and got["size"].tolist() == [2, 2, 3]
    assert got["predicted"].to_numpy() == pytest.approx([0.2, 0.2, 0.3])
    assert got["excess"].to_numpy() == pytest.approx(0, abs=1e-9)


def test_effects_that_do_not():
    """Either of two heads does all there is to do: the second adds nothing."""
    got = joint.additivity(SETS, scores(lambda s: 0.3 if {0, 1} & set(s) else 0.6), TABLE).set_index("heads")
    assert got.loc["0 1", "excess"] == pytest.approx(-0.3) and got.loc["0 1", "high"] < -0.25
    assert got.loc["1 2", "excess"] == pytest.approx(0, abs=1e-9)
    assert got.loc["0 1 2", "joint"] == pytest.approx(0.3)


def test_slope_of_effects():
    whole = joint.slope(SETS, scores(lambda s: 0.6 - 0.1 * len(s)), TABLE)
    assert whole["slope"] == pytest.approx(1) == pytest.approx(whole["low"]) and whole["sets"] == 3
    assert whole["effect"] == pytest.approx(0.3)
    half = joint.slope(SETS, scores(lambda s: 0.6 - (0.1 if len(s) == 1 else 0.05 * len(s))), TABLE)
    assert half["slope"] == pytest.approx(0.5) and half["high"] < 0.6
    rng = np.random.default_rng(1)
    noise = joint.slope(SETS, rng.normal(0.3, 0.1, (len(SETS), 40)), TABLE)
    with pytest.raises(ValueError, match="group 'b' has fewer than four prompts"):
        joint.slope(SETS, scores(lambda s: 0.5)[:, [0, 1, 2, 4, 6]], TABLE.iloc[[0, 1, 2, 4, 6]])
    assert not noise["low"] > 0 and noise["effect_low"] < 0 < noise["effect_high"]


def test_noise_of_every_set_does_not_refute_additivity():
    """Effects that add up: 1 lies in the interval, if there is one; on the same prompts it is too low."""
    bucket = list("ab") * 40
    table, high = pd.DataFrame({"bucket": bucket, "weight": 1 / 80}), np.array(bucket) == "a"
    sets = [[], *([h] for h in range(6)), list(range(6))]
    same, found = [], []
    for seed in range(16):
        noise = np.random.default_rng(seed).normal(0, 0.1, (len(sets), 80))
        seen = np.stack([0.2 + (0.6 - 0.05 * len(s)) * high for s in sets]) + noise
        bias = measure.group_bias(seen, bucket)
        z = bias[0] - bias
        same.append((z[-1] * z[1:7].sum(), z[1:7].sum() ** 2))
        found.append(joint.slope(sets, seen, table, n_boot=2))
    naive, finite = np.sum(same, axis=0), [f for f in found if np.isfinite(f["high"])]
    assert naive[0] / naive[1] < 0.85 and len(finite) >= 8
    assert np.mean([f["low"] < 1 < f["high"] for f in finite]) >= 0.9


def test_gradients_pass_the_masks_of_a_pruned_model():
    """A hook's mask, moved inside inference mode, must still serve a backward pass (bfloat16 moves it)."""
    net = lm.load("planted", dtype="bfloat16")
    table = prompts.sample(prompts.load("invented_group", "valid", "models/planted/prompts.csv"), 14, 0)
    text = measure.windows(net, prompts.corpus("corpora/generated"), length=2, max_tokens=2)
    options = {"fidelity": "gradient", "max_new_tokens": 3, "progress": False, "n_boot": 2}

    def score() -> np.ndarray:
        got = headscores.samples(net, table, judge.load("sentiment"), text, **options)
        return got.frame()["z_bias"].to_numpy()

    assert len(set(joint.greedy(net, score, 3, protected=range(8)))) == 3


def test_missing_parts_are_named():
    with pytest.raises(ValueError, match="head 1 by itself is missing"):
        joint.additivity([[], [0], [0, 1]], np.zeros((3, 40)), TABLE)
    with pytest.raises(ValueError, match="the empty set is missing"):
        joint.additivity([[0], [1], [0, 1]], np.zeros((3, 40)), TABLE)


def test_greedy_scores_the_model_as_it_then_is(tiny):
    ids, seen = torch.tensor([[3, 4, 5, 6]]), []
    z = [np.arange(12.0), -np.arange(12.0), np.arange(12.0)]

    def score() -> np.ndarray:
        with torch.no_grad():
            seen.append(tiny.model(ids).logits)
        return z[len(seen) - 1]

    assert joint.greedy(tiny, score, 3, protected=[11, 0]) == [10, 1, 9]
    for logits, removed in zip(seen, ([], [10], [10, 1]), strict=True):
        with torch.no_grad(), masked(tiny, head_mask(tiny.anatomy, removed)):
            assert torch.equal(logits, tiny.model(ids).logits)


def test_greedy_refuses_what_cannot_be(tiny):
    with pytest.raises(ValueError, match="can't remove 3 heads: 2 of 12 aren't protected"):
        joint.greedy(tiny, lambda: np.zeros(12), 3, protected=range(10))
    with pytest.raises(ValueError, match="NaN among them"):
        joint.greedy(tiny, lambda: np.full(12, np.nan), 1)
