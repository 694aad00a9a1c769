"""Numbers with their uncertainty: estimates, readings of a measure under many prunings, nulls, verdicts.

What a measure reads has one shape, (prunings, items), with a cluster for every item. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partialmethod

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

Bias = Callable[[np.ndarray, pd.DataFrame, np.ndarray], np.ndarray]
VERDICTS = ("reproduced", "not reproduced", "no bias to test", "too uncertain")


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap draws (draws,); estimates from the same draws are paired."""

    point: float
    draws: np.ndarray

    def _with(self, operation: np.ufunc, other: Estimate | float) -> Estimate:
        point, draws = (other.point, other.draws) if isinstance(other, Estimate) else (other, other)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(float(operation(self.point, point)), operation(self.draws, draws))

    __add__, __sub__ = partialmethod(_with, np.add), partialmethod(_with, np.subtract)
    __mul__, __truediv__ = partialmethod(_with, np.multiply), partialmethod(_with, np.divide)

    def map(self, function: Callable) -> Estimate:
        """The estimate of a function of the number, such as its absolute value."""
        return Estimate(float(function(self.point)), function(self.draws))

    def interval(self, level: float = 0.95, basic: bool = True) -> tuple[float, float]:
        """Bootstrap interval (low, high), of the draws that have a value; NaN without any.

        Basic: 2 · point − quantiles. Noise inflates a sum of absolute values, and once more in the bootstrap, which
        percentiles (``basic=False``) count twice. Where nearly all of a bias goes, it covers less than its level.
        """
        draws = self.draws[np.isfinite(self.draws)]
        if not np.isfinite(self.point) or not len(draws):
            return float("nan"), float("nan")
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist()
        return (2 * self.point - high, 2 * self.point - low) if basic else (low, high)

    def row(self, name: str, basic: bool = True) -> dict[str, float]:
        """For a table: name, name_low and name_high (95 %)."""
        low, high = self.interval(basic=basic)
        return {name: self.point, f"{name}_low": low, f"{name}_high": high}


def mean(estimates: Iterable[Estimate]) -> Estimate:
    """The mean of paired estimates."""
    estimates = list(estimates)
    return Estimate(float(np.mean([e.point for e in estimates])), np.mean([e.draws for e in estimates], axis=0))


def redrawn_mean(estimates: Sequence[Estimate], seed: int = 0) -> Estimate:
    """The mean of a sample, such as random controls or seeds of fine-tuning, that every bootstrap draw draws again.

    k of them drawn again vary less than k new ones would, by √((k − 1) / k) and Student's t, by which their deviations
    are stretched; a single one stays as it is. With the same ``seed``, means of different measures are paired.
    """
    draws, k, whole = np.stack([e.draws for e in estimates]), len(estimates), mean(estimates)
    again = np.random.default_rng(seed).integers(k, size=draws.shape)
    deviation = np.take_along_axis(draws, again, 0).mean(0) - whole.draws
    stretch = np.sqrt(k / (k - 1)) * stats.t.ppf(0.975, k - 1) / 1.96 if k > 1 else 0.0
    return Estimate(whole.point, whole.draws + stretch * deviation)


def over_seeds(values: ArrayLike) -> tuple[float, float, float]:
    """Mean over seeds, with its 95 % interval by Student's t."""
    values = np.asarray(values, dtype=float)
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - reach), float(values.mean() + reach)


def verdict(*, reproduced: bool, refuted: bool, biased: bool = True) -> str:
    """The one rule: without bias nothing is tested; an interval that holds both answers is too uncertain."""
    answer = "reproduced" if reproduced else "not reproduced" if refuted else "too uncertain"
    return answer if biased else "no bias to test"


def weighted_sum(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums over items: values (prunings, items), weights (…, prunings or 1, items) → (…, prunings)."""
    if weights.shape[-2] == 1:  # the same for all prunings: a matrix product
        return weights[..., 0, :] @ values.T
    return (weights * values).sum(-1)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over items; shapes as of ``weighted_sum``."""
    return weighted_sum(values, weights) / weights.sum(-1)


def mean_bias(values: np.ndarray, items: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of the items' values."""
    return weighted_mean(values, weights)


def group_gap(values: np.ndarray, items: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """Σ over groups of |mean over all items − mean over the group's items|. Source: Zayed et al., AAAI 2024.

    items: Columns group, and share: the group's in the mean over all items, also where groups were sampled evenly.
    """
    index, names = pd.factorize(items["group"])
    share = items["share"].to_numpy()[np.unique(index, return_index=True)[1]]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.stack([weighted_mean(values[:, index == g], weights[..., index == g]) for g in range(len(names))])
    return np.abs(means - np.tensordot(share / share.sum(), means, axes=1)).sum(0)


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What a measure reads under several prunings."""

    prunings: list[str]  # their texts; "" is the unpruned model
    values: np.ndarray  # (prunings, items)
    weights: np.ndarray  # (prunings or 1, items): how much an item counts, such as importance weights
    items: pd.DataFrame  # columns item, cluster (what is drawn together, within a group if any), and what bias_of needs
    bias_of: Bias  # (values, items, weights (…, prunings or 1, items)) → (…, prunings)

    @classmethod
    def of(cls, frame: pd.DataFrame, items: pd.DataFrame, bias_of: Bias) -> Readings:
        """From a tidy frame: pruning, item, value and, if items count unequally, weight; seeds are averaged."""
        weight = frame.get("weight", 1.0)
        table = frame[["pruning", "item"]].assign(sum=frame["value"] * weight, weight=weight)
        both = table.groupby(["pruning", "item"], sort=False)[["sum", "weight"]].mean().unstack("item")
        both = both.reindex(prunings := table["pruning"].unique().tolist())
        sums, weights = (both[column][items["item"]].to_numpy() for column in ("sum", "weight"))
        counting = weights if "weight" in frame else np.ones((1, len(items)))
        return cls(prunings=prunings, values=sums / weights, weights=counting, items=items, bias_of=bias_of)

    def frame(self) -> pd.DataFrame:
        """The inverse of ``of``, for a file."""
        index = pd.MultiIndex.from_product([self.prunings, self.items["item"]], names=["pruning", "item"])
        weight = {"weight": self.weights.ravel()} if len(self.weights) > 1 else {}
        return pd.DataFrame({"value": self.values.ravel(), **weight}, index=index).reset_index()

    def __getitem__(self, prunings: Sequence[str]) -> Readings:
        """The readings of some prunings, in this order."""
        place = [self.prunings.index(p) for p in prunings]
        weights = self.weights if len(self.weights) == 1 else self.weights[place]
        return replace(self, prunings=list(prunings), values=self.values[place], weights=weights)

    def where(self, keep: np.ndarray) -> Readings:
        """The readings of some items: bool (items,)."""
        return replace(self, values=self.values[:, keep], weights=self.weights[:, keep], items=self.items[keep])

    def without_parts(self, slopes: np.ndarray, parts: str = "heads") -> Readings:
        """Of the unpruned model, these and to first order those without every part; slopes (items, layers, parts)."""
        removed = slopes.reshape(len(self.items), -1).T
        names = [str(i) if parts == "heads" else f"u{i}" for i in range(len(removed))]
        return replace(self, prunings=["", *names], values=np.concatenate([self.values, self.values - removed]))

    def bias(self, counts: np.ndarray | None = None) -> np.ndarray:
        """Bias of every pruning: (prunings,); with counts (draws, items), how often items count: (draws, prunings)."""
        if counts is None:
            return self.bias_of(self.values, self.items, self.weights)
        several = max(1, int(2e7 / self.weights.size))  # draws whose weights are held at once
        parts = np.array_split(counts, -(-len(counts) // several))
        return np.concatenate([self.bias_of(self.values, self.items, self.weights * c[:, None]) for c in parts])

    def z(self) -> np.ndarray:
        """How much bias every pruning removes; the first row is the unpruned model: (prunings − 1,)."""
        bias = self.bias()
        return bias[0] - bias[1:]

    def draws(self, n_boot: int = 1000, seed: int = 0) -> np.ndarray:
        """Bias in bootstrap samples of clusters, drawn within groups: (n_boot, prunings), paired."""
        return self.bias(resampled(self.items, n_boot, seed))

    def estimates(self, n_boot: int = 1000, seed: int = 0) -> dict[str, Estimate]:
        """Pruning → its bias; all share their bootstrap draws."""
        points, draws = self.bias(), self.draws(n_boot, seed)
        return {name: Estimate(float(p), d) for name, p, d in zip(self.prunings, points, draws.T, strict=True)}

    def null(self, n_perm: int = 1000, seed: int = 0, cluster: str = "item") -> np.ndarray:
        """Bias if there were none: (n_perm, prunings).

        Labels (group, else share) are shuffled among items or clusters; without labels, clusters' values change sign.
        """
        # among items it answers for these clusters (such as descriptors of a group), among clusters for the groups
        label = next((c for c in ("group", "share") if c in self.items), "")
        if label == "group" and self.items[cluster].is_unique:  # the same as shuffling values, which takes one call
            order = _orders(len(self.items), n_perm, seed)
            rows = zip(self.values, np.broadcast_to(self.weights, self.values.shape), strict=True)
            return np.stack([self.bias_of(value[order], self.items, weight[order]) for value, weight in rows], 1)
        if label:
            labels = shuffled(self.items, label, n_perm, seed, "cluster" if label == "share" else cluster)
            return np.stack(
                [self.bias_of(self.values, with_labels(self.items, label, x), self.weights) for x in labels]
            )
        place = pd.factorize(self.items["cluster"])[0]
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (n_perm, place.max() + 1))[:, place]
        return np.stack([self.bias_of(self.values * sign, self.items, self.weights) for sign in signs])

    def detect(self, n_perm: int = 1000, cluster: str = "item") -> dict[str, float]:
        """Bias of the first pruning (the unpruned model) beside the permutation null, whose mean size is the floor."""
        first = self[self.prunings[:1]]
        bias, null = float(first.bias()[0]), np.abs(first.null(n_perm, cluster=cluster)[:, 0])
        floor = float(null.mean())
        found = {"n": len(self.items), "bias": bias, "floor": floor, "floor_95": float(np.quantile(null, 0.95))}
        return found | {"excess": abs(bias) - floor, "p": float((1 + (null >= abs(bias)).sum()) / (1 + len(null)))}


def resampled(items: pd.DataFrame, n_boot: int, seed: int = 0) -> np.ndarray:
    """How often every item is drawn in bootstrap samples of clusters within groups: (n_boot, items)."""
    of = items[["cluster"]].assign(group=items["group"].astype(str) if "group" in items else "").drop_duplicates()
    if of["cluster"].duplicated().any():  # across groups: drawn from all
        of = of.drop_duplicates("cluster").assign(group="")
    rng, counts = np.random.default_rng(seed), {}
    for _, clusters in of.groupby("group")["cluster"]:
        drawn = rng.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=n_boot)
        counts |= dict(zip(clusters, drawn.T, strict=True))
    return np.stack([counts[c] for c in items["cluster"]], 1).astype(float)


def with_labels(items: pd.DataFrame, label: str, values: ArrayLike) -> pd.DataFrame:
    """Items with other labels in a column; a group's share goes with its label."""
    moved = items.assign(**{label: np.asarray(values, dtype=object)})
    if label == "group" and "share" in items:
        moved["share"] = moved["group"].map(items.drop_duplicates("group").set_index("group")["share"])
    return moved


def _orders(n: int, n_perm: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permuted(np.broadcast_to(np.arange(n), (n_perm, n)), axis=1)


def shuffled(items: pd.DataFrame, label: str, n_perm: int, seed: int = 0, cluster: str = "item") -> np.ndarray:
    """Labels shuffled among the values of a column, each of which has one label: (n_perm, items)."""
    place = pd.factorize(items[cluster])[0]
    of = items.drop_duplicates(cluster)[label].to_numpy(dtype=object)
    order = _orders(len(of), n_perm, seed)
    labels = np.empty(order.shape, dtype=object)
    np.put_along_axis(labels, order, np.broadcast_to(of, order.shape), axis=1)
    return labels[:, place]
