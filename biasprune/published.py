"""The published head scores of FASP, read again: agreement, winner's curse, regimes, noise floor.

The authors keep them in their repository (chandar-lab/FASP, commit 84755d3, folder model/).
``BIASPRUNE_PUBLISHED`` names a folder with ``fasp-published/head_scores_*.csv``; nothing of it is part of
this project.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune import measure, select
from biasprune.reliability import agreement, top_overlap

_COLUMNS = {
    "Group": "axis",
    "Split": "split",
    "Seed": "seed",
    "Head id": "head",
    "Bias": "bias",
    "PPL": "ppl",
    "Average toxicity": "toxicity",
    "% of toxic output": "toxic_percent",
}


def models() -> list[str]:
    """Names of the models whose scores are at hand; empty without ``BIASPRUNE_PUBLISHED``."""
    folder = Path(os.environ.get("BIASPRUNE_PUBLISHED") or "/nonexistent") / "fasp-published"
    stems = (p.stem.removeprefix("head_scores_") for p in sorted(folder.glob("head_scores_*.csv")))
    return [s.replace("_", "/", 1) for s in stems]


def read(model: str) -> pd.DataFrame:
    """Scores of one model with each head removed, a row per axis, split, seed and head.

    Returns
    -------
    DataFrame
        axis, split, seed, head (flat index from 0), bias, ppl, toxicity (mean), toxic_percent.

    Raises
    ------
    ValueError
        If the scores aren't at hand.
    """
    if model not in models():
        raise ValueError(
            f"no published scores of {model!r}; at hand: {', '.join(models()) or 'none'}. "
            "BIASPRUNE_PUBLISHED names a folder with fasp-published/head_scores_*.csv."
        )
    folder = Path(os.environ["BIASPRUNE_PUBLISHED"]) / "fasp-published"
    table = pd.read_csv(folder / f"head_scores_{model.replace('/', '_', 1)}.csv")
    table = table[list(_COLUMNS)].rename(columns=_COLUMNS)
    return table.assign(head=table["head"] - 1)


def wide(table: pd.DataFrame, axis: str, split: str = "valid", value: str = "bias") -> pd.DataFrame:
    """(heads, seeds) of one axis and split; heads that lack a seed are left out."""
    own = table[(table["axis"] == axis) & (table["split"] == split)]
    return own.pivot_table(index="head", columns="seed", values=value).dropna()


def seeds(table: pd.DataFrame, axis: str = "gender_and_sex", share: float = 0.2) -> dict[str, float]:
    """Do the same heads come out again with another seed?

    Returns
    -------
    dict
        heads, r, low, high (mean Spearman over pairs of seeds, 95 % over heads), overlap (mean share of
        common heads among the top ``share``), chance.
    """
    scores = wide(table, axis).to_numpy().T
    k = int(share * scores.shape[1])
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
    # z_bias is the bias without any head less the bias without this one: the order turns around
    common = [top_overlap(-scores[i], -scores[j], k) for i, j in pairs]
    found = agreement(scores)
    return {
        "heads": scores.shape[1],
        **{c: found[c] for c in ("r", "low", "high")},
        "overlap": float(np.mean([c["overlap"] for c in common])),
        "chance": k / scores.shape[1],
    }


def winners_curse(
    table: pd.DataFrame, axis: str = "gender_and_sex", *, gamma: float = 0.3, alpha: float = 0.2
) -> pd.DataFrame:
    """Bias without a head, of the heads that FASP picks on validation and of all it could pick.

    What is picked for a low value among noisy ones looks lower there than it is.

    Returns
    -------
    DataFrame
        split, picked, candidates (mean bias over heads and seeds), difference.
    """
    own = table[table["axis"] == axis]
    mean = own.groupby(["split", "head"])[["bias", "ppl"]].mean()  # over the seeds that a head has
    bias = {s: mean.loc[s, "bias"] for s in ("valid", "test")}
    ppl = mean.loc["valid", "ppl"]
    n = len(ppl)
    kept = ppl.sort_values(kind="stable").index[: n - int(gamma * n)]
    where = select.fasp(bias["valid"].to_numpy(), ppl.to_numpy(), gamma=gamma, alpha=alpha)
    picked = bias["valid"].index[where]
    rows = []
    for split, values in bias.items():
        means = [values[values.index.isin(some)].mean() for some in (picked, kept)]
        rows.append({"split": split, "picked": means[0], "candidates": means[1]})
    return pd.DataFrame(rows).assign(difference=lambda t: t["picked"] - t["candidates"])


def regimes(table: pd.DataFrame, axis: str = "gender_and_sex") -> dict[str, float]:
    """Do the runs fall into two groups by their mean toxicity?

    The runs are cut where the spread inside the two sides is smallest. ``explained`` is the share of the
    variance that the cut explains: 1 for two points, .75 for a uniform and .64 for a normal distribution.

    Returns
    -------
    dict
        runs, explained, share_high, toxicity_low, toxicity_high (means of the two sides), ppl_low,
        ppl_high (medians), r_bias (correlation of bias with the side).
    """
    own = table[(table["axis"] == axis) & (table["split"] == "valid")]
    values = np.sort(own["toxicity"].to_numpy())
    n, total = np.arange(1, len(values)), values.cumsum()
    between = n * (len(values) - n) * (total[:-1] / n - (total[-1] - total[:-1]) / (len(values) - n)) ** 2
    best = int(between.argmax())
    high = (own["toxicity"] > values[best : best + 2].mean()).to_numpy()
    side = own.groupby(high).agg({"toxicity": "mean", "ppl": "median"})
    return {
        "runs": len(own),
        "explained": float(between[best] / len(values) ** 2 / values.var()),
        "share_high": float(high.mean()),
        **{
            f"{c}_{name}": float(side.loc[k, c]) for c in side for k, name in ((False, "low"), (True, "high"))
        },
        "r_bias": float(np.corrcoef(own["bias"], high)[0, 1]),
    }


def noise_floor(
    table: pd.DataFrame, axis: str, buckets: Mapping[str, int], *, n_sim: int = 300, seed: int = 0
) -> dict[str, float]:
    """The bias that no difference between the groups would give, at the published number of prompts.

    Scores of all prompts come from one distribution with the published mean and share of toxic texts:
    uniform below and above the threshold of one half, which has about the spread of toxicity scores.

    Parameters
    ----------
    buckets
        Number of prompts of every group.

    Returns
    -------
    dict
        bias (published, mean over heads and seeds), floor (mean), floor_95, groups, prompts.
    """
    own = table[(table["axis"] == axis) & (table["split"] == "valid")]
    labels = np.repeat(list(buckets), list(buckets.values()))
    toxic, mean = own["toxic_percent"].mean() / 100, own["toxicity"].mean()
    below = max(1e-3, (mean - 0.75 * toxic) / (1 - toxic))  # mean of what isn't toxic
    rng = np.random.default_rng(seed)
    is_toxic = rng.random((n_sim, len(labels))) < toxic
    low = rng.beta(1, max(1e-3, 0.5 / below - 1), is_toxic.shape) / 2
    drawn = measure.group_bias(np.where(is_toxic, 0.5 + rng.random(is_toxic.shape) / 2, low), labels)
    return {
        "bias": float(own["bias"].mean()),
        "floor": float(drawn.mean()),
        "floor_95": float(np.quantile(drawn, 0.95)),
        "groups": len(buckets),
        "prompts": len(labels),
    }
