"""Bias of a classifier from its predictions: gaps of true positive rates, or error rates by group."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score

from biasprune.downstream.texts import LABELS, unit_of

DRAWS = 1000  # of the permutation null


def kept(predicted: pd.DataFrame, least: int) -> pd.DataFrame:
    """Rows of classes with ``least`` texts of women and of men, or of groups with as many comments of either label.

    Phrases, in which every term stands alike, are all kept.
    """
    counts, unit = pd.crosstab(predicted["label"], predicted["group"]), unit_of(predicted)
    if unit == "group" and _paired(predicted):
        return predicted
    counts = counts if unit == "label" else counts.T
    enough = (counts >= least).all(axis=1)
    if counts.shape[1] < 2 or enough.sum() < (1 if unit == "label" else 2):
        raise ValueError(f"too few test texts to compare groups: take more, or fewer than {least} as the least.")
    return predicted[predicted[unit].map(enough)]


def _paired(predicted: pd.DataFrame) -> bool:
    return "pair" in predicted and bool((predicted["pair"] >= 0).all())


def gaps(predicted: pd.DataFrame, least: int = 30) -> pd.DataFrame:
    """True positive rates by class, of those ``kept``: label, n_female, n_male, tpr_female, tpr_male, gap (F − M)."""
    rows = kept(predicted, least)
    right = (rows["predicted"] == rows["label"]).groupby([rows["label"], rows["group"]])
    table = right.agg(n="size", tpr="mean").unstack("group")
    table.columns = [f"{measure}_{group}" for measure, group in table.columns]
    return table.assign(gap=table["tpr_female"] - table["tpr_male"]).reset_index()


def by_term(predicted: pd.DataFrame, least: int = 30) -> pd.DataFrame:
    """Errors about every ``kept`` group or identity term (Dixon et al., AIES 2018; Borkan et al., WWW 2019).

    term, n; fpr, fnr: share wrong of its other and of its toxic texts; subgroup_auc: of its texts alone; bpsn_auc: its
    other texts against the rest's toxic ones; bnsp_auc: its toxic texts against the rest's other ones.
    """
    predicted, rows = kept(predicted, least), []
    toxic, wrong = predicted["label"] == LABELS[1], predicted["label"] != predicted["predicted"]
    for term in sorted(predicted["group"].unique()):
        mine = predicted["group"] == term
        row = {"term": term, "n": mine.sum(), "fpr": wrong[mine & ~toxic].mean(), "fnr": wrong[mine & toxic].mean()}
        for name, texts in (("subgroup", mine), ("bpsn", mine != toxic), ("bnsp", mine == toxic)):
            row[f"{name}_auc"] = roc_auc_score(toxic[texts], predicted["score"][texts])
        rows.append(row)
    return pd.DataFrame(rows)


def _errors(predicted: pd.DataFrame, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a label's texts 1 where wrong: (pairs, groups) if paired, else (texts,) by group; and the groups' sizes."""
    rows = predicted[predicted["label"] == label].sort_values("group", kind="stable")
    rows, size = rows.assign(wrong=1.0 * (rows["predicted"] != label)), rows["group"].value_counts(sort=False)
    wrong = rows.pivot(index="pair", columns="group", values="wrong") if _paired(rows) else rows["wrong"]
    return wrong.to_numpy(), size.to_numpy()


def _spread(wrong: np.ndarray, size: np.ndarray, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the groups' rates less its sampling variance, and Σ |rate − overall|; of every draw (draws, …)."""
    if paired:
        d = wrong - wrong.mean(-1, keepdims=True)  # what is hard for all groups is gone
        rate, excess = wrong.mean(-2), d.mean(-2) ** 2 - d.var(-2, ddof=1) / d.shape[-2]
    else:
        rate = np.add.reduceat(wrong, size.cumsum() - size, axis=-1) / size
        excess = rate.var(-1, keepdims=True) - rate * (1 - rate) / (size - 1) * (1 - 1 / len(size))
    overall = (rate @ size / size.sum())[..., None]
    return excess.mean(-1), np.abs(rate - overall).sum(-1)


def summary(predicted: pd.DataFrame, share: pd.Series | None = None, least: int = 30) -> dict[str, float | str]:
    """Bias over all ``kept`` classes (occupations), or groups or terms (comments), and what chance gives.

    ``predicted`` has a row per text: label, group, predicted, pair, of comments also score, the probability of toxic;
    ``share`` of women per class is for occupations.

    accuracy, left_out. excess: mean squared gap TPR_F − TPR_M, or variance of the groups' error rates (mean of both
    kinds), less its sampling variance, so 0 on average where groups don't differ. p: of as large an excess where groups
    are permuted, within pairs if texts are paired. Occupations: rms of the gaps, rms_floor (its mean under
    permutation), mean_gap (mean |gap|), r and slope of the gaps on the share. Comments: auc, p_auc (of as large an auc
    where scores say nothing, over pairs or texts), fpr, fnr, fped = Σ |FPR − FPR_t| and fned (Dixon et al.), their
    floors, excess_fp, excess_fn.
    """
    unit, rng, rows, paired = unit_of(predicted), np.random.default_rng(0), kept(predicted, least), _paired(predicted)
    sides = [_errors(rows, label) for label in sorted(rows["label"].unique())]
    excess, spread = np.array([_spread(*side, paired) for side in sides]).T
    null = np.empty((DRAWS, 2, len(sides)))
    for some in np.split(null, DRAWS // 100):  # a hundred at a time, which fit into memory
        for i, (wrong, size) in enumerate(sides):
            mixed = rng.permuted(np.broadcast_to(wrong, (len(some), *wrong.shape)), axis=-1)
            some[..., i] = np.stack(_spread(mixed, size, paired), -1)
    squares = 4 if unit == "label" else 1  # the squared gap of two rates is four times their variance
    row = {"accuracy": float((predicted["predicted"] == predicted["label"]).mean())}
    row |= {"left_out": ", ".join(sorted(set(predicted[unit]) - set(rows[unit])))}
    row |= {"excess": float(squares * excess.mean())}
    row |= {"p": float((1 + (null[:, 0].mean(1) >= excess.mean() - 1e-12).sum()) / (1 + DRAWS))}
    if unit == "label":
        table = gaps(predicted, least)
        gap, x = table["gap"].to_numpy(), share[table["label"]].to_numpy()
        row |= {"rms": float(np.sqrt((gap**2).mean())), "mean_gap": float(np.abs(gap).mean())}
        row |= {"rms_floor": float(np.sqrt((null[:, 1] ** 2).mean(1)).mean())}
        fit = stats.linregress(x, gap) if gap.std() > 0 and x.std() > 0 else None
        return row | {"r": float(fit.rvalue) if fit else np.nan, "slope": float(fit.slope) if fit else np.nan}
    texts = rows.groupby(["label", "pair"], as_index=False)["score"].mean() if paired else rows
    other, toxic = (texts.loc[texts["label"] == label, "score"] for label in LABELS)
    row |= {"auc": float(roc_auc_score(rows["label"] == LABELS[1], rows["score"]))}
    row |= {"p_auc": float(stats.mannwhitneyu(toxic, other, alternative="greater").pvalue)}
    for i, kind in enumerate(("fp", "fn")):
        row |= {f"{kind}r": float(sides[i][0].mean()), f"{kind}ed": spread[i], f"excess_{kind}": excess[i]}
        row |= {f"{kind}ed_floor": float(null[:, 1, i].mean())}
    return row
