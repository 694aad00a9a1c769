"""How far head scores can be trusted: agreement between halves and seeds, and what it would take.

A correlation or an overlap of head scores means nothing without its ceiling: two measurements that
are noisy can't agree better than each agrees with a repetition of itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from biasprune import measure


def _correlation(x: np.ndarray, y: np.ndarray, method: str) -> np.ndarray:
    """Row by row: (…, heads), (…, heads) → (…). NaN where one doesn't vary."""
    if method == "spearman":
        x, y = stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1)
    elif method != "pearson":
        raise ValueError(f"method {method!r}: choose spearman or pearson.")
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def _checked(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 3:
        raise ValueError(f"scores have shape {scores.shape}; need (≥ 2 repetitions, ≥ 3 heads).")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity; leave those heads out.")
    return scores


def _pairs(scores: np.ndarray, method: str) -> float:
    a, b = np.triu_indices(len(scores), 1)
    return float(np.mean(_correlation(scores[a], scores[b], method)))


def agreement(
    scores: ArrayLike, *, method: str = "spearman", n_boot: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Mean correlation between repetitions of the same head scores, such as seeds.

    Parameters
    ----------
    scores
        (repetitions, heads).

    Returns
    -------
    dict
        r, low, high (95 %, percentile bootstrap over heads: the interval says how well r is known for
        heads like these, repetitions being as they are), repetitions.

    Raises
    ------
    ValueError
        Fewer than two repetitions or three heads, or NaN.
    """
    scores = _checked(scores)
    rng = np.random.default_rng(seed)
    drawn = [
        _pairs(scores[:, rng.integers(scores.shape[1], size=scores.shape[1])], method) for _ in range(n_boot)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"r": _pairs(scores, method), "low": low, "high": high, "repetitions": len(scores)}


def spearman_brown(r: ArrayLike, factor: float) -> np.ndarray:
    """Reliability of a measurement ``factor`` times as long, from that of the one at hand.

    Source: Spearman 1910, Brown 1910.
    """
    r = np.asarray(r, dtype=float)
    return factor * r / (1 + (factor - 1) * r)


def _prepared(
    values: ArrayLike, buckets: Sequence[str], sizes: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Values and sizes as arrays, groups' names by prompt, and the prompts of every group."""
    values = np.asarray(values, dtype=float)
    sizes = np.ones_like(values) if sizes is None else np.asarray(sizes, dtype=float)
    names = np.asarray(buckets, dtype=str)
    return values, sizes, names, [np.flatnonzero(names == g) for g in np.unique(names)]


def half_scores(
    values: ArrayLike,
    buckets: Sequence[str],
    weights: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
    *,
    n_splits: int = 50,
    seed: int = 0,
) -> np.ndarray:
    """z_bias of every head in random halves of the prompts, halved within groups.

    Parameters
    ----------
    values, sizes
        (1 + heads, prompts), row 0 the unpruned model, as in ``headscores.samples``.

    Returns
    -------
    ndarray
        (splits, 2, heads).

    Raises
    ------
    ValueError
        If a group has fewer than two prompts.
    """
    values, sizes, names, groups = _prepared(values, buckets, sizes)
    if small := [names[g[0]] for g in groups if len(g) < 2]:
        raise ValueError(f"groups with a single prompt can't be halved: {', '.join(small)}.")
    rng = np.random.default_rng(seed)
    out = np.empty((n_splits, 2, len(values) - 1))
    for i in range(n_splits):
        order = [rng.permutation(g) for g in groups]
        halves = [[o[: len(o) // 2] for o in order], [o[len(o) // 2 :] for o in order]]
        for h, parts in enumerate(halves):
            means = np.stack([values[:, p].sum(1) / sizes[:, p].sum(1) for p in parts])
            bias = measure.gap(means, names, weights)  # in the order of these names
            out[i, h] = bias[0] - bias[1:]
    return out


def split_half(halves: np.ndarray, *, method: str = "spearman", n_boot: int = 200, seed: int = 0) -> dict:
    """Reliability of the whole measurement from its halves, (splits, 2, heads) by ``half_scores``.

    Returns
    -------
    dict
        half (mean correlation of the halves), r (Spearman–Brown for the whole), low, high (95 %,
        percentile bootstrap over heads).
    """

    def both(h: np.ndarray) -> float:
        return float(np.nanmean(_correlation(h[:, 0], h[:, 1], method)))

    rng = np.random.default_rng(seed)
    n = halves.shape[-1]
    drawn = [both(halves[..., rng.integers(n, size=n)]) for _ in range(n_boot)]
    half = both(halves)
    ends = [np.quantile(drawn, 0.025), half, np.quantile(drawn, 0.975)]
    # stepping up makes no sense of negative correlations, which say that there is no signal
    low, whole, high = np.maximum(spearman_brown(ends, 2), -1)
    return {"half": half, "r": float(whole), "low": float(low), "high": float(high)}


def growth(
    values: ArrayLike,
    buckets: Sequence[str],
    weights: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
    *,
    counts: Sequence[int],
    n_draws: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Split-half reliability of z_bias for smaller numbers of prompts, drawn from those at hand.

    Parameters
    ----------
    values, sizes
        As in ``half_scores``.
    counts
        Numbers of prompts, drawn in proportion to the groups (two per group at least); from the number at
        hand on, one row for all of them.
    n_draws
        Draws of so many prompts that are averaged.

    Returns
    -------
    DataFrame
        prompts, r, low, high (of ``split_half``: 95 % over heads).

    Raises
    ------
    ValueError
        If a group has fewer than two prompts.
    """
    values, sizes, names, groups = _prepared(values, buckets, sizes)
    n = values.shape[1]
    weights = np.full(n, 1 / n) if weights is None else np.asarray(weights, dtype=float)
    rng, rows = np.random.default_rng(seed), []
    for count in sorted({min(c, n) for c in counts}):
        each = [min(len(g), max(2, round(count * len(g) / n))) for g in groups]
        halves = []
        for draw in range(n_draws):
            some = np.concatenate([rng.permutation(g)[:k] for g, k in zip(groups, each, strict=True)])
            # a group's share in the axis mean stays
            scale = np.concatenate([np.full(k, len(g) / k) for g, k in zip(groups, each, strict=True)])
            own = weights[some] * scale
            halves.append(
                half_scores(values[:, some], names[some], own, sizes[:, some], n_splits=10, seed=draw)
            )
        found = split_half(np.concatenate(halves))
        rows.append({"prompts": sum(each), **{k: found[k] for k in ("r", "low", "high")}})
    return pd.DataFrame(rows).drop_duplicates("prompts", ignore_index=True)


def disattenuated(r: float, reliability_x: float, reliability_y: float) -> float:
    """Correlation between what two noisy measurements measure: r / √(reliabilities). May exceed 1.

    NaN where a reliability is not positive: nothing can be said then.

    Source: Spearman 1904.
    """
    if min(reliability_x, reliability_y) <= 0:
        return float("nan")
    return float(r / np.sqrt(reliability_x * reliability_y))


def top_overlap(x: ArrayLike, y: ArrayLike, k: int) -> dict[str, float]:
    """Share of the k highest heads of x that are among the k highest of y, against chance.

    Returns
    -------
    dict
        overlap, chance (k / heads), chance_high (95th percentile of the overlap of random sets), p (of
        as large an overlap by chance, hypergeometric).

    Raises
    ------
    ValueError
        If k isn't between 1 and the number of heads.
    """
    x, y = _checked([x, y])
    n = len(x)
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: choose 1 … {n}.")
    common = len(set(np.argsort(-x, kind="stable")[:k]) & set(np.argsort(-y, kind="stable")[:k]))
    chance = stats.hypergeom(n, k, k)
    return {
        "overlap": common / k,
        "chance": k / n,
        "chance_high": float(chance.ppf(0.95)) / k,
        "p": float(chance.sf(common - 1)),
    }


def needed(
    halves: np.ndarray, per_seed: np.ndarray, n_prompts: int, wanted: float, seeds: Sequence[int] = (1, 3, 10)
) -> pd.DataFrame:
    """How many prompts a wanted reliability takes, for several numbers of seeds.

    Stepped up from ``split_half``. The noise of a head score has a part that more prompts and more seeds
    lower (sampling) and a part that only more prompts lower (which prompts were drawn); the two are told
    apart by variances over heads, averaged over splits.

    Parameters
    ----------
    halves
        (splits, 2, heads) z_bias in halves of the prompts, all seeds together.
    per_seed
        (seeds, heads) z_bias of each seed on all prompts; one row if there was one seed.
    n_prompts
        Number of prompts of the measurement at hand.
    wanted
        Reliability as of ``split_half`` (Spearman), between 0 and 1.

    Returns
    -------
    DataFrame
        seeds, prompts (in all, rounded up; infinite if the measurement shows no signal at all, NaN for
        other numbers of seeds than one if there was one).

    Raises
    ------
    ValueError
        If ``wanted`` isn't between 0 and 1.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"wanted reliability {wanted}: choose a number between 0 and 1.")
    centred = halves - halves.mean(-1, keepdims=True)
    r = split_half(halves, n_boot=1)["r"]
    noise = float(((centred[:, 0] - centred[:, 1]) ** 2).mean()) / 4  # of the mean of both halves
    n_seeds = len(per_seed)
    sampling = np.nan  # one seed: the two parts can't be told apart
    if n_seeds > 1:
        apart = per_seed - per_seed.mean(0)
        apart = apart - apart.mean(1, keepdims=True)
        sampling = min(noise, float((apart**2).sum(0).mean()) / (n_seeds - 1) / n_seeds)
    rows = []
    for s in seeds:
        again = 1.0 if s == n_seeds else 1 - (1 - n_seeds / s) * sampling / noise
        # Spearman–Brown, solved for the length
        need = np.ceil(n_prompts * again * (1 - r) / r * wanted / (1 - wanted)) if r > 0 else np.inf
        rows.append({"seeds": s, "prompts": need})
    return pd.DataFrame(rows)


def row(
    name: str, halves: np.ndarray, per_seed: np.ndarray, n_prompts: int, wanted: float, budget: int = 10168
) -> dict[str, float | str]:
    """One line of a reliability table: split half, seeds, what is needed; arguments as ``needed``.

    ``budget`` is a number of prompts to which the split-half reliability is stepped up (default: the
    paper's gender axis). Projections are NaN where the reliability can't be told from 0: they would
    be projections of noise.
    """
    half = split_half(halves)
    need = needed(halves, per_seed, n_prompts, wanted, (1, 10)).set_index("seeds")["prompts"]
    line: dict[str, float | str] = {"scores": name, "heads": halves.shape[-1], "prompts": n_prompts}
    line |= {"seeds": len(per_seed)}
    line |= {f"split_half{k}": half[v] for k, v in (("", "r"), ("_low", "low"), ("_high", "high"))}
    if len(per_seed) > 1:
        seeds = agreement(per_seed)
        line |= {"seeds_r": seeds["r"], "seeds_low": seeds["low"], "seeds_high": seeds["high"]}
    told = half["low"] > 0
    line["at_published_budget"] = float(spearman_brown(half["r"], budget / n_prompts)) if told else np.nan
    return line | {f"needed_{k}_seed{'s' * (k > 1)}": need[k] if told else np.nan for k in (1, 10)}
