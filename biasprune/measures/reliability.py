"""How far effects can be trusted: what comes out again in other items, and in other measures.

A correlation or an overlap of effects means nothing without its ceiling: two noisy measurements can't agree better than
each agrees with a repetition of itself. Needs neither torch nor a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from biasprune.core.stats import Readings

Statistic = Callable[[np.ndarray], np.ndarray]


class Halves:
    """z of every pruning in random halves of the clusters, for one or several measures of the same prunings.

    A cluster that measures share lies in the same half for all, so that shared noise doesn't look like agreement.
    """

    def __init__(self, readings: Mapping[str, Readings]) -> None:
        self.readings = readings
        kinds: dict[str, list[tuple[str, str]]] = {}
        for name, r in readings.items():
            groups = r.items["group"].astype(str) if "group" in r.items else [""] * len(r.items)
            for cluster, group in dict.fromkeys(zip(r.items["cluster"], groups, strict=True)):
                kinds.setdefault(cluster, []).append((name, group))
        # clusters of the same groups of the same measures are halved, and put into blocks, among themselves
        self.stratum = pd.factorize(np.array([str(sorted(k)) for k in kinds.values()], dtype=object))[0]
        self.place = {name: pd.Index(kinds).get_indexer(r.items["cluster"]) for name, r in readings.items()}

    def ranked(self, rng: np.random.Generator) -> np.ndarray:
        """A random rank within its stratum for every cluster; strata begin at a random number."""
        order = np.lexsort((rng.random(len(self.stratum)), self.stratum))
        sizes = np.bincount(self.stratum)
        rank = np.argsort(order) - (np.cumsum(sizes) - sizes)[self.stratum]
        return rank + rng.integers(1000, size=len(sizes))[self.stratum]

    def z(self, n_splits: int, seed: Sequence[int] = (0,), keep: np.ndarray | None = None) -> np.ndarray:
        """(splits, measures, 2, prunings − 1); ``keep`` (clusters,) leaves some out."""
        rng = np.random.default_rng(seed)
        keep = np.ones(len(self.stratum), dtype=bool) if keep is None else keep
        sides = np.stack([self.ranked(rng) % 2 for _ in range(n_splits)])
        out = []
        for name, r in self.readings.items():
            counts = np.stack([(sides == side) & keep for side in (0, 1)], 1)[..., self.place[name]]
            bias = r.bias(counts.reshape(-1, counts.shape[-1]).astype(float)).reshape(n_splits, 2, -1)
            if np.isnan(bias).any():
                raise ValueError(f"{name}: a group has too few clusters to halve: take more items.")
            out.append(bias[..., :1] - bias[..., 1:])
        return np.stack(out, 1)


def across_halves(
    readings: Mapping[str, Readings], statistic: Statistic, *, n_splits: int = 100, n_blocks: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of z in random halves (splits, measures, 2, prunings − 1), and half the width of its 95 % interval.

    The interval is over clusters: a jackknife over blocks of them, with Student's t (Tukey 1958).
    """
    halves = Halves(readings)
    return np.asarray(statistic(halves.z(n_splits))), _reach(halves, statistic, n_splits, n_blocks)


def _reach(halves: Halves, statistic: Statistic, n_splits: int, n_blocks: int = 20) -> np.ndarray:
    """Half the width of the interval of ``across_halves``."""
    block = halves.ranked(np.random.default_rng([0, 1])) % n_blocks
    splits, left = -(-n_splits // 2), []
    for b in range(n_blocks):  # the same halvings each time
        left.append(statistic(halves.z(splits, (0, 2), block != b)))
    error = np.sqrt((n_blocks - 1) ** 2 / n_blocks * np.var(left, axis=0, ddof=1))
    return stats.t.ppf(0.975, n_blocks - 1) * error


def correlation(x: np.ndarray, y: np.ndarray, method: str = "spearman") -> np.ndarray:
    """Row by row: (…, parts) twice → (…). NaN where one doesn't vary."""
    x, y = centred(x, method), centred(y, method)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def centred(z: np.ndarray, method: str) -> np.ndarray:
    """Effects less their mean over parts, ranked for Spearman: (…, parts)."""
    z = stats.rankdata(z, axis=-1) if method == "spearman" else z
    return z - z.mean(-1, keepdims=True)


def spearman_brown(r: ArrayLike, factor: float) -> np.ndarray:
    """Reliability of a measurement ``factor`` times as long as that of reliability r (Spearman 1910, Brown 1910)."""
    r = np.asarray(r, dtype=float)
    return factor * r / (1 + (factor - 1) * r)


def split_half(
    readings: Readings, *, method: str = "spearman", n_splits: int = 100, n_boot: int = 200
) -> dict[str, float]:
    """Reliability of z over parts: the correlation of halves, stepped up to all items; see ``stepped_up``."""
    z = Halves({"": readings}).z(n_splits)[:, 0]
    return stepped_up(z, method=method, n_boot=n_boot)


def stepped_up(z: np.ndarray, *, method: str = "spearman", n_boot: int = 200) -> dict[str, float]:
    """Reliability of the whole measurement from its halves, (splits, 2, parts).

    half (mean correlation of the halves), r (stepped up), low, high (95 %, percentile bootstrap over parts).
    """

    def both(z: np.ndarray) -> float:
        return float(np.nanmean(correlation(z[:, 0], z[:, 1], method)))

    rng, n = np.random.default_rng(0), z.shape[-1]
    drawn = [both(z[..., rng.integers(n, size=n)]) for _ in range(n_boot)]
    ends = [both(z), *np.quantile(drawn, [0.025, 0.975])]
    # stepping up makes no sense of negative correlations, which say that there is no signal
    r, low, high = np.maximum(spearman_brown(ends, 2), -1).tolist()
    return {"half": ends[0], "r": r, "low": low, "high": high}


def agreement(scores: ArrayLike, *, method: str = "spearman") -> dict[str, float]:
    """Mean correlation between repetitions of the same scores (repetitions, parts), such as seeds.

    r, low, high (95 %, percentile bootstrap over parts, the repetitions being as they are), repetitions.
    """
    scores = np.asarray(scores, dtype=float)
    a, b = np.triu_indices(len(scores), 1)
    rng, n = np.random.default_rng(0), scores.shape[1]

    def pairs(x: np.ndarray) -> float:
        return float(np.mean(correlation(x[a], x[b], method)))

    low, high = np.nanquantile([pairs(scores[:, rng.integers(n, size=n)]) for _ in range(1000)], [0.025, 0.975])
    return {"r": pairs(scores), "low": float(low), "high": float(high), "repetitions": len(scores)}


def top_overlap(x: ArrayLike, y: ArrayLike, k: int) -> dict[str, float]:
    """Share of the k highest parts of x that are among the k highest of y, and what chance gives (k / parts)."""
    x, y = np.asarray(x), np.asarray(y)
    common = set(np.argsort(-x, kind="stable")[:k]) & set(np.argsort(-y, kind="stable")[:k])
    return {"overlap": len(common) / k, "chance": k / len(x)}


def correlations(
    readings: Mapping[str, Readings], *, method: str = "spearman", n_splits: int = 100, n_perm: int = 2000
) -> pd.DataFrame:
    """Correlation over parts between every two measures, disattenuated, with its interval and its null.

    One measure in one half of the clusters is held against the other in the other half, so that noise that both share
    drops out; divided by how well each agrees with itself across the same halves (Spearman 1904).

    Returns: a, b, method, parts; r (from all items, shared noise included); ceiling (√ of the product of both
        reliabilities: r can't be expected to exceed it); disattenuated, low, high (95 %, jackknife over clusters; NaN
        where a measure doesn't agree with itself); null_95 (95 % of |disattenuated| where parts are permuted); p.
    """

    def covariances(z: np.ndarray) -> np.ndarray:
        z = centred(z, method)
        total = np.einsum("nah,nbh->ab", z[:, :, 0], z[:, :, 1])
        return (total + total.T) / (2 * len(z))

    def ratio(z: np.ndarray) -> np.ndarray:
        c = covariances(z)
        diagonal = np.where(np.diag(c) > 0, np.diag(c), np.nan)
        return c / np.sqrt(np.outer(diagonal, diagonal))

    halves = Halves(readings)
    z = halves.z(n_splits)
    whole, reach = ratio(z), _reach(halves, ratio, n_splits)
    itself = spearman_brown(np.nanmean(correlation(z[:, :, 0], z[:, :, 1], method), axis=0), 2).clip(0)
    z = centred(z, method)
    covariance, n, rng = covariances(z), z.shape[-1], np.random.default_rng([0, 3])
    orders = np.stack([rng.permutation(n) for _ in range(n_perm)])
    plain, rows = {name: r.z() for name, r in readings.items()}, []
    for (i, a), (j, b) in combinations(enumerate(readings), 2):
        # [h, k]: part h by one measure × part k by the other, never in the same half
        product = (z[:, i, 0].T @ z[:, j, 1] + z[:, i, 1].T @ z[:, j, 0]) / (2 * n_splits)
        null = np.abs(product[np.arange(n), orders].sum(1))
        scale = np.sqrt(covariance[i, i] * covariance[j, j]) if np.isfinite(whole[i, j]) else np.nan
        row = {"a": a, "b": b, "method": method, "parts": n, "r": float(correlation(plain[a], plain[b], method))}
        row |= {"ceiling": np.sqrt(itself[i] * itself[j]), "disattenuated": whole[i, j]}
        row |= {"low": whole[i, j] - reach[i, j], "high": whole[i, j] + reach[i, j]}
        p = (1 + (null >= abs(covariance[i, j])).sum()) / (1 + n_perm)
        rows.append({**row, "null_95": np.quantile(null, 0.95) / scale, "p": p})
    return pd.DataFrame(rows)
