"""Many biases: do the same heads carry them? Effects of heads on several axes, or by several measures.

Two axes that share prompts share the noise of those prompts, and a correlation between two noisy
measurements can't exceed what each has with itself. So axes are compared across halves: one in one half of
the prompts with the other in the other half; a prompt that stands in both axes is in the same half of both.
Divided by how well each axis agrees with itself across the same halves, that estimates the correlation of
what is measured (Spearman 1904).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from biasprune import experiment, measure
from biasprune.headscores import HeadSamples
from biasprune.reliability import split_half, top_overlap


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What every head does to one axis, prompt by prompt.

    Attributes
    ----------
    prompts
        Columns prompt, bucket and weight.
    values, sizes
        (1 + heads, prompts), row 0 the unpruned model; a group's mean is Σ values / Σ sizes. Sizes
        default to 1.
    """

    prompts: pd.DataFrame
    values: np.ndarray
    sizes: np.ndarray | None = None

    def z(self) -> np.ndarray:
        """z_bias of every head from all prompts: (heads,)."""
        bias = measure.group_bias(
            self.values, self.prompts["bucket"], self.prompts["weight"].to_numpy(), self.sizes
        )
        return bias[0] - bias[1:]

    def of_heads(self, keep: ArrayLike) -> Effects:
        """The same for some heads (indices, or a bool per head)."""
        rows = np.concatenate([[0], 1 + np.arange(len(self.values) - 1)[keep]])
        sizes = None if self.sizes is None else self.sizes[rows]
        return replace(self, values=self.values[rows], sizes=sizes)


def effects_of(samples: HeadSamples, seeds: int | None = None) -> dict[str, Effects]:
    """Axis → effects of what ``headscores.samples`` measured, averaged over (the first so many) seeds."""
    found = {}
    for axis, own in samples.axes.items():
        values, sizes = (x[:, :seeds].mean(1) for x in samples.arrays(axis))
        own = own if "weight" in own else own.assign(weight=1 / len(own))
        own = own[["prompt", "bucket", "weight"]].reset_index(drop=True)
        found[axis] = Effects(prompts=own, values=values, sizes=None if (sizes == 1).all() else sizes)
    return found


def to_table(effects: Mapping[str, Effects]) -> pd.DataFrame:
    """One row per axis and prompt, for a file: axis, prompt, bucket, weight, v0, v1, …, s0, s1, …"""
    parts = []
    for axis, e in effects.items():
        sizes = np.ones_like(e.values) if e.sizes is None else e.sizes
        wide = {f"{c}{i}": row for c, x in (("v", e.values), ("s", sizes)) for i, row in enumerate(x)}
        parts.append(pd.concat([e.prompts.assign(axis=axis), pd.DataFrame(wide)], axis=1))
    return pd.concat(parts, ignore_index=True)


def from_table(table: pd.DataFrame) -> dict[str, Effects]:
    """The inverse of ``to_table``."""
    found = {}
    for axis, own in table.groupby("axis", sort=False):
        own = own.reset_index(drop=True)
        values, sizes = (own.filter(regex=rf"^{c}\d+$").to_numpy().T for c in "vs")
        sizes = None if (sizes == 1).all() else sizes
        found[str(axis)] = Effects(prompts=own[["prompt", "bucket", "weight"]], values=values, sizes=sizes)
    return found


class _Halves:
    """z_bias of several axes in random halves of the prompts, with some blocks of prompts left out."""

    def __init__(self, effects: Mapping[str, Effects]) -> None:
        self.effects = effects
        where: dict[str, set[tuple[str, str]]] = {}
        for axis, e in effects.items():
            for text, bucket in zip(e.prompts["prompt"], e.prompts["bucket"], strict=True):
                where.setdefault(text, set()).add((axis, str(bucket)))
        texts = pd.Index(where)
        kinds = {k: i for i, k in enumerate(dict.fromkeys(tuple(sorted(w)) for w in where.values()))}
        # texts of the same groups of the same axes; halved and blocked within these
        self.stratum = np.array([kinds[tuple(sorted(w))] for w in where.values()])
        self.text = {a: texts.get_indexer(e.prompts["prompt"]) for a, e in effects.items()}
        self.member, self.share = {}, {}
        for axis, e in effects.items():
            names, group = np.unique(e.prompts["bucket"].astype(str), return_inverse=True)
            self.member[axis] = group == np.arange(len(names))[:, None]  # (groups, prompts)
            share = self.member[axis] @ e.prompts["weight"].to_numpy()
            self.share[axis] = share / share.sum()

    def ranked(self, rng: np.random.Generator) -> np.ndarray:
        """A random rank within its stratum, for every text; strata begin at a random number."""
        order = np.lexsort((rng.random(len(self.stratum)), self.stratum))
        sizes = np.bincount(self.stratum)
        rank = np.empty(len(order), dtype=int)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return rank + rng.integers(1000, size=len(sizes))[self.stratum]

    def _sides(self, rng: np.random.Generator, use: dict[str, np.ndarray]) -> np.ndarray:
        """Half of every text, such that every group has prompts in both."""
        for _ in range(200):  # small groups: again, where one has all in one half
            side = self.ranked(rng) % 2
            count = {
                a: [self.member[a] @ (u & (side[self.text[a]] == h)) for h in (0, 1)] for a, u in use.items()
            }
            empty = [a for a, halves in count.items() if not np.min(halves)]
            if not empty:
                return side
        raise ValueError(f"axis {empty[0]!r} has a group with too few prompts to halve: draw more.")

    def __call__(self, rng: np.random.Generator, keep: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Axis → (2, heads)."""
        use = {a: np.ones(len(t), dtype=bool) if keep is None else keep[t] for a, t in self.text.items()}
        side, found = self._sides(rng, use), {}
        for axis, e in self.effects.items():
            bias = []
            for half in (0, 1):
                member = (self.member[axis] & (use[axis] & (side[self.text[axis]] == half))).astype(float)
                total = member.sum(1)[:, None] if e.sizes is None else member @ e.sizes.T
                means = member @ e.values.T / total  # (groups, 1 + heads)
                bias.append(np.abs(means - self.share[axis] @ means).sum(0))
            found[axis] = np.stack([b[0] - b[1:] for b in bias])
        return found


def _standard(z: np.ndarray, method: str) -> np.ndarray:
    """Centred heads, ranked for Spearman."""
    if method == "spearman":
        z = stats.rankdata(z, axis=-1)
    elif method != "pearson":
        raise ValueError(f"method {method!r}: choose spearman or pearson.")
    return z - z.mean(-1, keepdims=True)


def _splits(
    halves: _Halves, method: str, n: int, rng: np.random.Generator, keep: np.ndarray | None = None
) -> np.ndarray:
    """n random halvings: (n, axes, 2, heads), centred, ranked for Spearman."""
    return np.stack([_standard(np.stack(list(halves(rng, keep).values())), method) for _ in range(n)])


def _covariances(z: np.ndarray) -> np.ndarray:
    """(axes, axes) covariances over heads, across halves, averaged over halvings."""
    total = np.einsum("nah,nbh->ab", z[:, :, 0], z[:, :, 1])
    return (total + total.T) / (2 * len(z))


def _ratio(covariances: np.ndarray) -> np.ndarray:
    """Disattenuated correlations; NaN where an axis doesn't agree with itself."""
    own = np.diag(covariances)
    own = np.where(own > 0, own, np.nan)
    return covariances / np.sqrt(own[:, None] * own[None])


def correlations(
    effects: Mapping[str, Effects],
    *,
    method: str = "spearman",
    n_splits: int = 100,
    n_blocks: int = 20,
    n_perm: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation over heads between every two axes (or measures), with its ceiling and its null.

    Parameters
    ----------
    effects
        Axis → effects of the same heads.
    n_splits
        Random halvings of the prompts that are averaged.
    n_blocks
        Blocks of prompts for the jackknife.
    n_perm
        Permutations of the heads.

    Returns
    -------
    DataFrame
        a, b, method, heads; r: plain correlation, from all prompts, noise included (prompts that two
        axes share raise it); disattenuated: of what is measured, across halves; low, high: 95 %, by
        jackknife over prompts (heads are all the model has, so they aren't drawn anew); NaN where an axis
        doesn't agree with itself; null_95: 95 % of |disattenuated| if heads had nothing to do with each
        other; p: of as strong a relation among permuted heads (heads that share noise make it too small:
        look at the interval too).

    Raises
    ------
    ValueError
        Fewer than two axes or three heads, heads that differ in number, a group too small to halve.
    """
    sizes = {len(e.values) - 1 for e in effects.values()}
    if len(effects) < 2 or len(sizes) != 1 or min(sizes) < 3:
        raise ValueError(
            f"need two or more axes with the same three or more heads; got {len(effects)} with {sizes}."
        )
    if n_splits < 1 or n_blocks < 3 or n_perm < 1:
        raise ValueError(
            f"need n_splits ≥ 1, n_blocks ≥ 3, n_perm ≥ 1; got {n_splits}, {n_blocks}, {n_perm}."
        )
    halves, names = _Halves(effects), list(effects)
    plain = np.stack([_standard(e.z(), method) for e in effects.values()])
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (plain @ plain.T) / np.sqrt(np.outer((plain**2).sum(1), (plain**2).sum(1)))
    z = _splits(halves, method, n_splits, np.random.default_rng(seed))
    covariances, n = _covariances(z), plain.shape[1]
    whole = _ratio(covariances)
    rng = np.random.default_rng([seed, 1])
    block, few = halves.ranked(rng) % n_blocks, -(-n_splits // 2)
    left = []
    for b in range(n_blocks):  # the same halvings each time
        some = _splits(halves, method, few, np.random.default_rng([seed, 2]), keep=block != b)
        left.append(_ratio(_covariances(some)))
    reach = measure.jackknife_reach(left)
    orders = np.stack([rng.permutation(n) for _ in range(n_perm)])
    rows = []
    for i, j in combinations(range(len(names)), 2):
        # [h, k]: head h on one axis × head k on the other, never in the same half
        product = (z[:, i, 0].T @ z[:, j, 1] + z[:, i, 1].T @ z[:, j, 0]) / (2 * n_splits)
        null = product[np.arange(n), orders].sum(1)
        scale = np.sqrt(covariances[i, i] * covariances[j, j]) if np.isfinite(whole[i, j]) else np.nan
        rows.append(
            {
                "a": names[i],
                "b": names[j],
                "method": method,
                "heads": n,
                "r": r[i, j],
                "disattenuated": whole[i, j],
                "low": whole[i, j] - reach[i, j],
                "high": whole[i, j] + reach[i, j],
                "null_95": np.quantile(np.abs(null), 0.95) / scale,
                "p": (1 + (np.abs(null) >= abs(covariances[i, j])).sum()) / (1 + n_perm),
            }
        )
    return pd.DataFrame(rows)


def halved(effects: Effects, *, n_splits: int = 100, seed: int = 0) -> np.ndarray:
    """z_bias of every head in random halves of the prompts, equal prompts in the same: (splits, 2, heads)."""
    halves, rng = _Halves({"": effects}), np.random.default_rng(seed)
    return np.stack([halves(rng)[""] for _ in range(n_splits)])


def reliabilities(effects: Mapping[str, Effects], *, n_splits: int = 100, seed: int = 0) -> pd.DataFrame:
    """How well the head effects of every axis agree with themselves, and whether there is bias at all.

    Without bias, effects can agree with themselves all the same: a head that makes all texts vary more raises
    the noise that a sum of absolute differences is made of, on every axis.

    Returns
    -------
    DataFrame
        axis, prompts, groups; bias, floor, p (of the unpruned model: ``measure.detect_bias``); r, low, high
        (of ``reliability.split_half``: Spearman, for all prompts, 95 % over heads); readable: low above
        0, and p below .05.
    """
    rows = []
    for axis, e in effects.items():
        own, found = e.prompts, split_half(halved(e, n_splits=n_splits, seed=seed))
        there = measure.detect_bias(e.values[0], own["bucket"], own["weight"].to_numpy())
        row = {"axis": axis, "prompts": len(own), "groups": own["bucket"].nunique()}
        row |= {k: there[k] for k in ("bias", "floor", "p")} | {k: found[k] for k in ("r", "low", "high")}
        rows.append({**row, "readable": bool(found["low"] > 0 and there["p"] < 0.05)})
    return pd.DataFrame(rows)


def verdicts(related: pd.DataFrame, reliable: pd.DataFrame) -> pd.DataFrame:
    """``correlations`` with columns ceiling, p_holm, verdict: positive, negative, undecided, or unreadable.

    "unreadable": one of the two axes shows no bias, or its head effects don't agree with themselves.
    ``ceiling`` is √(reliability × reliability), which r can't be expected to exceed; NaN where one isn't
    positive. ``p_holm`` is p, corrected for the number of pairs (Holm).
    """
    known = set(reliable.loc[reliable["readable"], "axis"])
    order = related["p"].to_numpy().argsort(kind="stable")
    steps = related["p"].to_numpy()[order] * np.arange(len(related), 0, -1)
    holm = np.empty(len(related))
    holm[order] = np.minimum(np.maximum.accumulate(steps), 1)

    def one(row: pd.Series, p: float) -> str:
        if not {row["a"], row["b"]} <= known:
            return "unreadable"
        if p < 0.05 and row["low"] > 0:
            return "positive"
        return "negative" if p < 0.05 and row["high"] < 0 else "undecided"

    found = [one(row, p) for (_, row), p in zip(related.iterrows(), holm, strict=True)]
    r = reliable.set_index("axis")["r"].clip(lower=0).replace(0, np.nan)
    ceiling = np.sqrt(related["a"].map(r) * related["b"].map(r))
    return related.assign(ceiling=ceiling, p_holm=holm, verdict=found)


def judged_on_all(
    selected: pd.DataFrame,
    texts: pd.DataFrame,
    losses: pd.DataFrame,
    prompts: pd.DataFrame,
    windows: measure.Windows,
    *,
    n_boot: int = 1000,
) -> pd.DataFrame:
    """Head sets selected for one axis, judged on every axis (FASP's experiment 3).

    Parameters
    ----------
    selected
        Columns selected_for ("random" for the controls) and heads.
    texts, losses
        Of ``experiment.evaluate`` on ``prompts``, which hold all axes (column axis).

    Returns
    -------
    DataFrame
        selected_for, judged_on, pruned, change, low, high (percent of the unpruned model's bias),
        against_random, against_low, against_high (the same minus the mean of the random sets; the interval
        draws prompts and random sets), bias, floor (of the unpruned model), p (of its bias, under shuffled
        groups), ppl_ratio.

    Raises
    ------
    ValueError
        If the texts aren't those of these prompts, or no set is "random".
    """
    prompts = prompts.reset_index(drop=True)
    if set(texts["prompt"]) != set(prompts.index) or "random" not in set(selected["selected_for"]):
        raise ValueError("texts of other prompts than those given, or no random sets to compare with.")
    selected = selected.assign(draw=selected.groupby("selected_for").cumcount())
    rng, tables = np.random.default_rng(0), []
    for axis, own in prompts.groupby("axis", sort=False):
        some = texts[texts["prompt"].isin(own.index)]
        by = ["selected_for", "draw"]
        table, drawn = experiment.compare(selected, some, losses, own, windows, by=by, n_boot=n_boot)
        base = some[some["heads"] == ""].groupby("prompt")["score"].mean()
        found = measure.detect_bias(base, own["bucket"], own["weight"].to_numpy())
        draws = table.loc[table["selected_for"] == "random", "draw"]
        random = np.stack([drawn["random", d] for d in draws])
        again = rng.integers(len(draws), size=random.shape)  # which sets were drawn matters too
        random = np.take_along_axis(random, again, 0).mean(0)
        chance = table.loc[table["selected_for"] == "random", "change"].mean()
        for name, part in table.groupby("selected_for", sort=False):
            change = part["change"].mean()
            replicates = np.mean([drawn[name, d] for d in part["draw"]], axis=0)
            replicates = random if name == "random" else replicates
            low, high = np.maximum(measure.interval(change, replicates), -100)
            against_low, against_high = measure.interval(change - chance, replicates - random)
            tables.append(
                {
                    "selected_for": name,
                    "judged_on": axis,
                    "pruned": part["pruned"].iloc[0],
                    "change": change,
                    "low": float(low),
                    "high": float(high),
                    "against_random": change - chance,
                    "against_low": float(against_low),
                    "against_high": float(against_high),
                    **{k: found[k] for k in ("bias", "floor", "p")},
                    "ppl_ratio": part["ppl_ratio"].mean(),
                }
            )
    return pd.DataFrame(tables)


def noise_ratio(one: Effects, other: Effects, *, n_boot: int = 1000) -> dict[str, float]:
    """How many times as large the standard error of z_bias is by one way of scoring as by another.

    Standard errors by paired bootstrap over prompts, root mean square over heads.

    Parameters
    ----------
    one, other
        Of the same heads on the same prompts.

    Returns
    -------
    dict
        heads, prompts, ratio, low, high (95 %, percentile bootstrap over heads).

    Raises
    ------
    ValueError
        Other heads or prompts.
    """
    if one.values.shape != other.values.shape:
        raise ValueError(f"effects of other heads or prompts: {one.values.shape} and {other.values.shape}.")
    noise = []
    for e in (one, other):
        own = (e.prompts["bucket"], e.prompts["weight"].to_numpy())
        drawn = measure.bootstrap_bias(e.values, *own, e.sizes, n_boot=n_boot)
        noise.append((drawn[:, :1] - drawn[:, 1:]).var(0, ddof=1))
    heads = np.random.default_rng(0).integers(len(noise[0]), size=(n_boot, len(noise[0])))
    drawn = np.sqrt(noise[0][heads].mean(1) / noise[1][heads].mean(1))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "heads": len(noise[0]),
        "prompts": len(one.prompts),
        "ratio": float(np.sqrt(noise[0].mean() / noise[1].mean())),
        "low": float(low),
        "high": float(high),
    }


def overlaps(
    effects: Mapping[str, Effects],
    share: float = 0.2,
    *,
    n_splits: int = 100,
    n_blocks: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Are the same heads at the top, on other prompts? Mean over random halvings.

    Returns
    -------
    DataFrame
        a, b, overlap (share of a's top heads in one half that are b's in the other), overlap_low,
        overlap_high (95 %, jackknife over blocks of prompts), own (the same of a with itself and b with
        itself, averaged: the ceiling), chance.
    """
    halves, names = _Halves(effects), list(effects)
    n = len(next(iter(effects.values())).values) - 1
    k = max(1, int(share * n))

    def common(rng: np.random.Generator, times: int, keep: np.ndarray | None = None) -> np.ndarray:
        total = np.zeros((len(names), len(names)))
        for _ in range(times):
            z = np.stack(list(halves(rng, keep).values()))  # (axes, 2, heads)
            top = np.zeros(z.shape)  # ties in random order
            np.put_along_axis(top, np.lexsort((rng.random(z.shape), -z), axis=-1)[..., :k], 1, axis=-1)
            total += top[:, 0] @ top[:, 1].T / k
        return (total + total.T) / (2 * times)

    total = common(np.random.default_rng(seed), n_splits)
    block, few = halves.ranked(np.random.default_rng([seed, 1])) % n_blocks, -(-n_splits // 2)
    left = [common(np.random.default_rng([seed, 2]), few, block != b) for b in range(n_blocks)]
    reach = measure.jackknife_reach(left)
    chance = top_overlap(np.arange(n), np.arange(n), k)
    return pd.DataFrame(
        [
            {
                "a": names[i],
                "b": names[j],
                "overlap": total[i, j],
                "overlap_low": max(0.0, total[i, j] - reach[i, j]),
                "overlap_high": min(1.0, total[i, j] + reach[i, j]),
                "own": (total[i, i] + total[j, j]) / 2,
                "chance": chance["chance"],
            }
            for i, j in combinations(range(len(names)), 2)
        ]
    )


def counted(related: pd.DataFrame, apart: str = "religion") -> pd.DataFrame:
    """The pairs of axes that ``conclude_correlation`` counts: without one axis, if other pairs remain."""
    own = related[(related["a"] != apart) & (related["b"] != apart)]
    return own if len(own) else related


def conclude_correlation(
    related: pd.DataFrame, *, apart: str = "religion", small: float = 0.3
) -> tuple[str, str]:
    """FASP's claim that effects on the biases correlate positively, one axis excepted: a verdict and why.

    Parameters
    ----------
    related
        Of ``verdicts``, one method and set of heads.
    apart
        The axis that the paper excepts; left out if other pairs remain.
    small
        Where most readable intervals lie below this and no pair is positive: not reproduced.
    """
    own = counted(related, apart)
    said = own["verdict"].value_counts()
    tally = f"of {len(own)} pairs of axes" + f" without {apart}" * (len(own) < len(related))
    why = f"{tally}: " + ", ".join(f"{n} {v}" for v, n in said.items())
    readable = own[own["verdict"] != "unreadable"]
    if said.get("positive", 0):
        return ("reproduced" if said["positive"] == len(own) else "partly reproduced"), why
    if len(readable) and (readable["high"] < small).mean() > 0.5:
        return "not reproduced", why
    return "undecided", why


def conclude_spill(judged: pd.DataFrame, axis: str, *, small: float = 10.0) -> tuple[str, str]:
    """FASP's claim that pruning for one axis lowers the others' bias: a verdict and why.

    Parameters
    ----------
    judged
        Of ``judged_on_all``.
    small
        Percent: where no axis is lower and all intervals exclude a lowering by this much: not reproduced.
    """
    rows = judged[judged["selected_for"] == axis].set_index("judged_on")
    down = (rows["p"] < 0.05) & (rows["high"] < 0) & (rows["against_high"] < 0)
    own, others = rows.loc[axis], rows[(rows.index != axis) & (rows["p"] < 0.05)]
    ratio = judged.loc[judged["selected_for"] == "random", "ppl_ratio"].iloc[0]
    why = f"{axis} itself {own['change']:+.0f} % ({own['against_random']:+.0f} beyond random); "
    why += f"lower on {down[others.index].sum()} of {len(others)} other axes with bias; "
    why += f"perplexity × {own['ppl_ratio']:.2f}, random heads × {ratio:.2f}"
    if not down[axis] or not len(others):
        return "undecided", why
    if down[others.index].any():
        return ("reproduced" if down[others.index].all() else "partly reproduced"), why
    return ("not reproduced" if (others["against_low"] > -small).all() else "undecided"), why
