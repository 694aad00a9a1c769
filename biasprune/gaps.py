"""Gaps between two groups of names: standardised mean differences with intervals over names.

Answers come sampled (``audit.ask``) or as distributions (``answers.distribution``, with a column p);
both are reduced to moments per question and name. The names are the sample: intervals draw names, not
answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from biasprune import check, measure

QUESTION = ["context", "variation"]
_MOMENTS = ("name", "race", "gender", "n", "mean", "square", "off")


def _weighted(answers: pd.DataFrame, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values (logarithms, NaN for what can't be used) and weights of answers."""
    value = check.numbers(answers["value"], "answers")
    if "p" in answers and not (check.numbers(answers["p"], "p") >= 0).all():
        raise ValueError("some probabilities p are negative or NaN.")
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(value > 0, np.log(value), np.nan)
    return value, answers["p"].to_numpy() if "p" in answers else np.ones(len(value))


def moments(answers: pd.DataFrame, *, log: bool = True, winsorise: float = 0.0) -> pd.DataFrame:
    """What each name is answered on average, per question.

    Parameters
    ----------
    answers
        Of ``audit.ask`` (one mask) or ``answers.distribution``.
    log
        Of the logarithms of the answers: amounts differ by factors. Zeros count as unparsable then.
    winsorise
        Share to pull in at either end, over all answers to a question (the paper: .05; sampled only).

    Returns
    -------
    DataFrame
        context, variation, name, race, gender; n (usable answers, or their share of the probability);
        mean, square (means of value and squared value, NaN without usable answers); off (share of
        the answers, or of the probability, that isn't usable).

    Raises
    ------
    ValueError
        Answers of several masks, or a share outside [0, .5).
    """
    check.columns(answers, [*QUESTION, "name", "race", "gender", "value"], "answers")
    if "mask" in answers and answers["mask"].nunique() > 1:
        raise ValueError("answers of several masks are mixed: pass one mask's.")
    if not 0 <= check.number(winsorise, "winsorise") < 0.5:
        raise ValueError(f"winsorise = {winsorise}: choose a share from 0 to below .5.")
    value, weight = _weighted(answers, log)
    table = answers[[*QUESTION, "name", "race", "gender"]].assign(value=value)
    if winsorise:
        by = table.groupby(QUESTION, sort=False)["value"]
        low, high = (by.transform(lambda v, q=q: v.quantile(q)) for q in (winsorise, 1 - winsorise))
        table["value"] = table["value"].clip(low, high)
    fine = np.isfinite(table["value"])
    table = table.assign(
        n=np.where(fine, weight, 0.0),
        mean=np.where(fine, weight * table["value"], 0.0),
        square=np.where(fine, weight * table["value"] ** 2, 0.0),
        all=weight,
    ).drop(columns="value")
    out = table.groupby([*QUESTION, "name", "race", "gender"], sort=False, as_index=False).sum()
    whole = 1.0 if "p" in answers else out["all"]
    with np.errstate(invalid="ignore", divide="ignore"):
        out["mean"], out["square"] = out["mean"] / out["n"], out["square"] / out["n"]
    return out.assign(off=1 - out["n"] / whole).drop(columns="all")


def _smd(a: np.ndarray, b: np.ndarray, ddof: int) -> np.ndarray:
    """Standardised mean difference from (…, 3) sums of weights, values and squares; NaN without variance."""
    with np.errstate(invalid="ignore", divide="ignore"):
        (mean_a, var_a), (mean_b, var_b) = (
            (s[..., 1] / s[..., 0], (s[..., 2] - s[..., 1] ** 2 / s[..., 0]) / (s[..., 0] - ddof))
            for s in (a, b)
        )
        spread = (var_a + var_b) / 2
        return np.where(spread > 1e-12, (mean_a - mean_b) / np.sqrt(spread), np.nan)


def _sums(of: pd.DataFrame, sampled: bool) -> np.ndarray:
    """(names, 3): names weigh as many answers as they have, or equally where there is a distribution."""
    n = of["n"].to_numpy() if sampled else (of["n"] > 0).to_numpy().astype(float)
    return np.stack([n, *(np.nan_to_num(of[c].to_numpy()) * n for c in ("mean", "square"))], 1)


def check_groups(names: pd.DataFrame, by: str, groups: Sequence[str]) -> None:
    """Two different groups with two names each, or a ValueError that says what there is."""
    check.columns(names, ["name"], "names", rows=False)
    if by not in names:
        raise ValueError(f"no column {by!r} to compare by; there are race and gender.")
    if len(groups) != 2 or groups[0] == groups[1]:
        raise ValueError(f"groups {list(groups)}: give two different ones.")
    for g in groups:
        if names["name"][names[by] == g].nunique() < 2:
            known = ", ".join(map(str, names[by].unique()))
            raise ValueError(f"group {g!r} of {by!r} has fewer than two names; there are: {known}.")


def gaps(
    answers: pd.DataFrame,
    *,
    by: str = "race",
    groups: tuple[str, str] = ("white", "black"),
    log: bool = False,
    winsorise: float = 0.0,
    reference: pd.DataFrame | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The gap between two groups per context and variation, with the health of the answers.

    Parameters
    ----------
    answers
        Of ``audit.ask`` (one mask) or ``answers.distribution``.
    by, groups
        Column and its two values; the gap is the first group's mean minus the second's.
    log, winsorise
        As in ``moments``.
    reference
        Answers of the unmodified model, for ``inliers``.

    Returns
    -------
    DataFrame
        context, variation; smd = (mean_a − mean_b) / √((var_a + var_b) / 2) over names × answers, low,
        high (95 %, basic bootstrap over names); emd (earth mover's distance over the pooled standard
        deviation); median of each group; answers (number of them, or of names × candidates), unparsable
        (share), ranges (share; NaN for distributions), distinct (number of values; for distributions
        the exponential of their entropy, which is the number of equally likely ones), inliers (share
        inside the reference's 5 – 95 % range; NaN without one).

    Raises
    ------
    ValueError
        If a group has fewer than two names, or as in ``moments``.

    Warns
    -----
    UserWarning
        Where nothing can be said: no variance, or a group without two names that have parsable answers.
        smd is NaN then.
    """
    sampled = "p" not in answers
    check.count(n_boot, "n_boot")
    each = moments(answers, log=log, winsorise=winsorise)
    check_groups(each, by, groups)
    rng = np.random.default_rng(seed)
    keep = answers[by].isin(groups)
    parts = dict(list(each.groupby(QUESTION, sort=False)))
    rows = []
    for key, part in answers[keep].groupby(QUESTION, sort=False):
        own = parts[key]
        value, weight = _weighted(part, log)
        fine = np.isfinite(value) & (weight > 0)
        of = [_sums(own[(own[by] == g) & (own["n"] > 0)], sampled) for g in groups]
        row = dict(zip(QUESTION, key, strict=True)) | dict.fromkeys(["smd", "low", "high", "emd"], np.nan)
        sides = [fine & (part[by] == g).to_numpy() for g in groups]
        if min(map(len, of)) >= 2:
            smd = float(_smd(*(s.sum(0) for s in of), int(sampled)))
            drawn = [rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size=n_boot) @ s for s in of]
            row["smd"] = smd
            row |= dict(zip(("low", "high"), _interval(smd, _smd(*drawn, int(sampled))), strict=True))
            if np.isfinite(smd):
                if winsorise:
                    value = np.clip(value, *np.nanquantile(value, [winsorise, 1 - winsorise]))
                row["emd"] = _distance([(value[s], weight[s]) for s in sides], int(sampled))
        if not np.isfinite(row["smd"]):
            warnings.warn(
                f"{', '.join(key)}: no gap can be measured ({int(fine.sum())} of {len(part)} answers "
                f"are numbers, {len(np.unique(value[fine]))} distinct).",
                stacklevel=2,
            )
        raw = part["value"].to_numpy(dtype=float)
        row |= {f"median_{g}": _quantile(raw[s], weight[s], 0.5) for g, s in zip(groups, sides, strict=True)}
        total = len(part) if sampled else part["name"].nunique()
        rows.append(
            row
            | {
                "answers": len(part),
                "unparsable": 1 - weight[fine].sum() / total,
                "ranges": (part["kind"] == "range").mean() if sampled else np.nan,
                "distinct": len(np.unique(raw[fine])) if sampled else _effective(raw[fine], weight[fine]),
                "inliers": _inliers(raw[fine], weight[fine], reference, key),
            }
        )
    return pd.DataFrame(rows)


def _interval(point: float, drawn: np.ndarray) -> tuple[float, float]:
    """``measure.interval`` of the replicates that have a value; NaN without any, or without a point."""
    drawn = drawn[np.isfinite(drawn)]
    if np.isnan(point) or not len(drawn):
        return np.nan, np.nan
    return tuple(float(x) for x in measure.interval(point, drawn))


def _distance(sides: list[tuple[np.ndarray, np.ndarray]], ddof: int) -> float:
    """Earth mover's distance over the pooled standard deviation."""
    (a, wa), (b, wb) = sides
    mean = [np.average(v, weights=w) for v, w in sides]
    var = [(w * (v - m) ** 2).sum() / (w.sum() - ddof) for (v, w), m in zip(sides, mean, strict=True)]
    return stats.wasserstein_distance(a, b, wa, wb) / np.sqrt(np.mean(var))


def _quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """Weighted quantile; the usual interpolated one where all weights are equal."""
    if not len(values):
        return np.nan
    if (weights == weights[0]).all():
        return float(np.quantile(values, q))
    order = np.argsort(values)
    share = weights[order].cumsum() / weights.sum()
    return float(values[order][min(len(values) - 1, np.searchsorted(share, q))])


def _effective(values: np.ndarray, weights: np.ndarray) -> float:
    """exp of the entropy: how many equally likely values there would be."""
    if not len(values):
        return 0.0
    _, index = np.unique(values, return_inverse=True)
    p = np.bincount(index, weights)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _inliers(values: np.ndarray, weights: np.ndarray, reference: pd.DataFrame | None, key: tuple) -> float:
    """Share of usable answers inside the 5 – 95 % range of the unmodified model's."""
    if reference is None or not len(values):
        return np.nan
    own = reference[(reference["context"] == key[0]) & (reference["variation"] == key[1])]
    theirs, weight = _weighted(own, log=False)
    fine = np.isfinite(theirs)
    if not fine.any():
        return np.nan
    low, high = (_quantile(theirs[fine], weight[fine], q) for q in (0.05, 0.95))
    inside = (values >= low) & (values <= high)
    return float(weights[inside].sum() / weights.sum())


# --- many models at once --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What prunings do to the gap, question by question, paired over names.

    Attributes
    ----------
    table
        A row per pruning and question: the labels it came with, context, variation, smd, floor (mean
        |SMD| under shuffled labels: what no difference gives), directed (sign · SMD), removed (directed
        of the unpruned model − directed), off (mean share of unusable answers).
    directed, removed
        (rows, n_boot) bootstrap replicates; the draws of names are the same for all rows.
    """

    table: pd.DataFrame
    directed: np.ndarray
    removed: np.ndarray

    def rows(self, **labels: str | Sequence[str]) -> np.ndarray:
        """Which rows have these labels (or one of several): bool (rows,).

        Raises
        ------
        ValueError
            If there is none.
        """
        check.columns(self.table, labels, "effects")
        keep = np.ones(len(self.table), dtype=bool)
        for column, wanted in labels.items():
            keep &= self.table[column].isin([wanted] if isinstance(wanted, str) else list(wanted)).to_numpy()
        if not keep.any():
            raise ValueError(f"no pruning with {labels}.")
        return keep

    def _removed(self, rows: np.ndarray) -> tuple[float, np.ndarray]:
        """How much nearer to 0 the mean directed gap of some rows has come, and its replicates.

        A gap turned around is no gap removed.
        """
        after, drawn = self.table["directed"].to_numpy()[rows].mean(), self.directed[rows].mean(0)
        before = after + self.table["removed"].to_numpy()[rows].mean()
        before_drawn = drawn + self.removed[rows].mean(0)
        return abs(before) - abs(after), np.abs(before_drawn) - np.abs(drawn)

    def mean(self, by: Sequence[str]) -> pd.DataFrame:
        """Averages over questions: a row for each value of the columns ``by``.

        Returns
        -------
        DataFrame
            by; questions; gap (mean |SMD|, as published), floor; directed, and removed: how much nearer to
            0 the mean directed gap has come, with 95 % intervals (_low, _high; basic bootstrap over
            names); off.
        """
        out = []
        for key, part in self.table.groupby(list(by), sort=False):
            at = self.table.index.get_indexer(part.index)
            row = dict(zip(by, key, strict=True)) | {"questions": len(part)}
            # a question without variance is NaN, and so is a mean that it belongs to: never a silent 0
            row |= {c: part[of].abs().mean(skipna=False) for c, of in (("gap", "smd"), ("floor", "floor"))}
            directed = part["directed"].mean(skipna=False), self.directed[at].mean(0)
            for name, (point, drawn) in (("directed", directed), ("removed", self._removed(at))):
                low, high = _interval(point, drawn)
                row |= {name: point, f"{name}_low": low, f"{name}_high": high}
            out.append({**row, "off": part["off"].mean()})
        return pd.DataFrame(out)

    def more(self, own: np.ndarray, others: Sequence[np.ndarray]) -> tuple[float, float, float]:
        """How much more some rows remove than others do on average: (point, low, high), 95 %.

        Parameters
        ----------
        own, others
            Rows, bool. Several others, such as random draws, are drawn along in the bootstrap: they
            are a sample too.
        """
        point, drawn = self._removed(own)
        found = [self._removed(o) for o in others]
        which = np.random.default_rng(0).integers(len(found), size=(drawn.shape[-1], len(found)))
        theirs = np.stack([d for _, d in found])[which, np.arange(drawn.shape[-1])[:, None]].mean(1)
        point -= float(np.mean([x for x, _ in found]))
        return point, *_interval(point, drawn - theirs)


def effects(
    evaluated: pd.DataFrame,
    unpruned: pd.DataFrame,
    *,
    by: str = "race",
    groups: tuple[str, str] = ("white", "black"),
    signs: pd.Series | None = None,
    sampled: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
) -> Effects:
    """What every pruning does to the gap of every question it was judged by.

    Parameters
    ----------
    evaluated
        Moments of pruned models: as ``moments``, and further columns that tell the prunings apart.
    unpruned
        Moments of the unpruned model, for the same names and at least the same questions.
    signs
        (context, variation) → +1 or −1: the direction of the gap, from *other* names than these, see
        ``directions``. None takes it from the unpruned model here, which counts noise as bias.
    sampled
        Whether the moments are of sampled answers.

    Raises
    ------
    ValueError
        A group of fewer than two names, or names or questions that differ from the unpruned model's.
    """
    check.count(n_boot, "n_boot")
    for table, what in ((evaluated, "evaluated"), (unpruned, "unpruned")):
        check.columns(table, [*QUESTION, *_MOMENTS], what)
    check_groups(unpruned, by, groups)
    kept = unpruned[unpruned[by].isin(groups)].drop_duplicates("name").sort_values("name")
    labels = [c for c in evaluated if c not in (*QUESTION, *_MOMENTS)]
    rng = np.random.default_rng(seed)
    member = np.stack([(kept[by] == g).to_numpy() for g in groups]).astype(float)  # (2, names)
    counts = member.sum(1).astype(int)
    draws = np.zeros((2, n_boot, len(kept)))
    for k in range(2):
        own = member[k] > 0
        draws[k][:, own] = rng.multinomial(counts[k], np.full(counts[k], 1 / counts[k]), size=n_boot)
    shuffled = np.stack([rng.permuted(member[0]) for _ in range(50)])
    shuffled = np.stack([shuffled, 1 - shuffled])  # (2, 50, names)

    def smds(part: pd.DataFrame, weights: np.ndarray, key: tuple) -> np.ndarray:
        own = part.set_index("name").reindex(kept["name"])
        if own["n"].isna().any() or len(part[part[by].isin(groups)]) != len(kept):
            raise ValueError(f"{', '.join(map(str, key))}: not the same names as the unpruned model's.")
        sums = _sums(own, sampled)
        return _smd(weights[0] @ sums, weights[1] @ sums, int(sampled))

    start = {}
    for key, part in unpruned.groupby(QUESTION, sort=False):
        point, drawn = (smds(part, w, key) for w in (member[:, None], draws))
        if signs is not None and key not in signs.index:
            raise ValueError(f"{', '.join(map(str, key))}: signs has no direction for this question.")
        sign = (1.0 if point[0] >= 0 else -1.0) if signs is None else float(signs.loc[key])
        start[key] = sign, sign * point[0], sign * drawn
    rows, directed, removed = [], [], []
    for key, part in evaluated.groupby([*labels, *QUESTION], sort=False):
        question = key[-2:]
        if question not in start:
            raise ValueError(f"{', '.join(question)}: the unpruned model wasn't asked this.")
        sign, before, before_drawn = start[question]
        point, drawn, floor = (smds(part, w, key) for w in (member[:, None], draws, shuffled))
        row = dict(zip([*labels, *QUESTION], key, strict=True))
        row |= {"smd": point[0], "floor": np.abs(floor).mean(), "directed": sign * point[0]}
        off = part.loc[part[by].isin(groups), "off"].mean()
        rows.append({**row, "removed": before - sign * point[0], "off": off})
        directed.append(sign * drawn)
        removed.append(before_drawn - sign * drawn)
    return Effects(table=pd.DataFrame(rows), directed=np.stack(directed), removed=np.stack(removed))


def directions(
    each: pd.DataFrame,
    *,
    by: str = "race",
    groups: tuple[str, str] = ("white", "black"),
    sampled: bool = False,
) -> pd.Series:
    """The sign of the gap of every question: (context, variation) → +1 or −1."""
    table = effects(each.assign(pruning=""), each, by=by, groups=groups, sampled=sampled, n_boot=2).table
    index = pd.MultiIndex.from_frame(table[QUESTION])
    return pd.Series(np.where(table["smd"] < 0, -1.0, 1.0), index=index)


def slope_of_gap(
    slopes: np.ndarray,
    asked: pd.DataFrame,
    each: pd.DataFrame,
    *,
    by: str = "race",
    groups: tuple[str, str] = ("white", "black"),
) -> np.ndarray:
    """How much every part adds to the gap, to first order: (questions, layers, parts) → (layers, parts).

    Mean over questions of sign · ∂SMD/∂mask, the spread of the answers held fixed. Positive: removing
    the part shrinks the gap by about as much.

    Parameters
    ----------
    slopes
        Of ``answers.slopes``.
    asked
        Its questions, in the same order.
    each
        Moments of the unpruned model's distributions for the same questions.
    """
    check_groups(asked, by, groups)
    total, n = np.zeros(slopes.shape[1:]), 0
    for key, part in each.groupby(QUESTION, sort=False):
        here = (asked["context"] == key[0]).to_numpy() & (asked["variation"] == key[1]).to_numpy()
        group = asked[by].to_numpy()
        sides = [part[part[by] == g] for g in groups]
        mean = [s["mean"].mean() for s in sides]
        spread = np.sqrt(np.mean([s["square"].mean() - m**2 for s, m in zip(sides, mean, strict=True)]))
        if not spread > 1e-6:
            continue
        sign = np.sign(mean[0] - mean[1])
        a, b = (slopes[here & (group == g)].mean(0, dtype=np.float64) for g in groups)
        total, n = total + sign * (a - b) / spread, n + 1
    if not n:
        raise ValueError("no question's answers vary: there is no gap to take a slope of.")
    return total / n
