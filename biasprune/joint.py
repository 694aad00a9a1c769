"""Removing several heads at once: is the effect the sum of theirs, and does scoring anew after each help?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from biasprune import measure
from biasprune.ablate import Pruning, head_mask
from biasprune.experiment import set_key
from biasprune.lm import LM
from biasprune.progress import bar
from biasprune.reliability import half_scores

BLOCKS = 10  # of prompts, for the jackknife


def additivity(
    sets: Sequence[Sequence[int]], scores: np.ndarray, prompts: pd.DataFrame, *, n_boot: int = 1000
) -> pd.DataFrame:
    """The effect of every set of heads beside the sum of its heads' own effects.

    Parameters
    ----------
    sets
        Head sets: the empty one, single heads, and larger ones of these heads.
    scores
        (sets, prompts) mean score of every prompt without these heads.
    prompts
        Columns bucket and weight.

    Returns
    -------
    DataFrame
        heads (as text), size, predicted (sum of z_bias), joint (z_bias of the set), excess (joint −
        predicted), low, high (95 % of excess, paired bootstrap over prompts), for sets of two and more.

    Raises
    ------
    ValueError
        If the empty set or a single head of a set is missing.
    """
    keys = [tuple(sorted(s)) for s in sets]
    where = {k: i for i, k in enumerate(keys)}
    missing = [h for k in keys for h in k if (h,) not in where]
    if () not in where or missing:
        what = f"head {missing[0]} by itself" if missing else "the empty set"
        raise ValueError(f"{what} is missing among the sets, so nothing can be added up.")
    weights = prompts["weight"].to_numpy()
    bias = measure.group_bias(scores, prompts["bucket"], weights)
    drawn = measure.bootstrap_bias(scores, prompts["bucket"], weights, n_boot=n_boot)
    z, z_drawn = bias[where[()]] - bias, drawn[:, [where[()]]] - drawn
    rows = []
    for k in dict.fromkeys(k for k in keys if len(k) > 1):
        single = [where[(h,)] for h in k]
        joint, predicted = z[where[k]], z[single].sum()
        replicates = z_drawn[:, where[k]] - z_drawn[:, single].sum(1)
        low, high = measure.interval(joint - predicted, replicates)
        row = {"heads": set_key(k), "size": len(k), "predicted": predicted, "joint": joint}
        rows.append({**row, "excess": joint - predicted, "low": float(low), "high": float(high)})
    return pd.DataFrame(rows)


def slope(
    sets: Sequence[Sequence[int]], scores: np.ndarray, prompts: pd.DataFrame, *, n_boot: int = 1000
) -> dict[str, float]:
    """Joint effects per sum of single effects, through 0: 1 if effects add up. Arguments as ``additivity``.

    Joint effects in one half of the prompts are held against sums in the other half, averaged over halvings:
    on the same prompts, a sum of k effects has the noise of the unpruned model k times, and the slope would
    lie below 1 wherever effects are small.

    Returns
    -------
    dict
        sets, slope, low, high (95 %, jackknife over blocks of prompts; NaN where sums in one half have
        nothing to do with those in the other), effect, effect_low, effect_high (z_bias of the largest set:
        without an effect there is nothing to add up).

    Raises
    ------
    ValueError
        A group with fewer than four prompts.
    """
    keys = [tuple(sorted(s)) for s in sets]
    where = {k: i for i, k in enumerate(keys)}
    own = [k for k in dict.fromkeys(keys) if len(k) > 1]
    bucket, weights = prompts["bucket"].to_numpy(), prompts["weight"].to_numpy()
    if few := [g for g, n in prompts["bucket"].value_counts().items() if n < 4]:
        raise ValueError(f"group {few[0]!r} has fewer than four prompts: draw more.")
    by = prompts.reset_index(drop=True).sample(frac=1, random_state=0).groupby("bucket")
    block = ((by.cumcount() + by.ngroup()) % BLOCKS).sort_index().to_numpy()
    singles = [[where[(h,)] for h in k] for k in own]

    def ratio(keep: np.ndarray) -> float:
        some = np.concatenate([scores[[where[()]]], scores])[:, keep]
        z = half_scores(some, bucket[keep], weights[keep], n_splits=100)  # (splits, 2, sets)
        joint = z[..., [where[k] for k in own]]
        predicted = np.stack([z[..., s].sum(-1) for s in singles], -1)
        across = (predicted[:, 0] * predicted[:, 1]).mean()
        return float((joint * predicted[:, ::-1]).mean() / across) if across > 0 else np.nan

    found = ratio(np.ones(len(block), dtype=bool))
    left = [ratio(block != b) for b in range(BLOCKS)]
    reach = float(measure.jackknife_reach(left))
    z = measure.group_bias(scores, bucket, weights)
    drawn = measure.bootstrap_bias(scores, bucket, weights, n_boot=n_boot)
    z, drawn = z[where[()]] - z, drawn[:, [where[()]]] - drawn
    largest = where[max(own, key=len)]
    effect_low, effect_high = measure.interval(z[largest], drawn[:, largest])
    return {
        "sets": len(own),
        "slope": found,
        "low": found - reach,
        "high": found + reach,
        "effect": float(z[largest]),
        "effect_low": float(effect_low),
        "effect_high": float(effect_high),
    }


def greedy(
    lm: LM,
    score: Callable[[], np.ndarray],
    n: int,
    *,
    protected: Sequence[int] = (),
    progress: str | None = None,
) -> list[int]:
    """Heads in the order in which they are removed, all scored again after each removal.

    Parameters
    ----------
    score
        Gives z_bias of every head (heads,) of the model as it then is.
    n
        How many heads to remove.
    protected
        Flat indices that are never removed, such as those with the highest z_ppl.

    Raises
    ------
    ValueError
        If fewer than n heads aren't protected, or scores of another shape, or NaN among them.
    """
    free = np.ones(lm.anatomy.n_flat, dtype=bool)
    free[list(protected)] = False
    if not 0 < n <= free.sum():
        raise ValueError(f"can't remove {n} heads: {free.sum()} of {len(free)} aren't protected.")
    removed: list[int] = []
    for _ in bar(range(n), desc=progress, unit="head"):
        with Pruning(heads=head_mask(lm.anatomy, removed) == 0).applied(lm):
            z = np.asarray(score(), dtype=float)
        if z.shape != free.shape or np.isnan(z).any():
            raise ValueError(
                f"scores {z.shape}, or NaN among them; expected one for each of {len(free)} heads."
            )
        best = int(np.where(free, z, -np.inf).argmax())
        removed.append(best)
        free[best] = False
    return removed
