"""The published head scores of FASP, read again: agreement, winner's curse, regimes, noise floor.

The authors keep them in their repository (chandar-lab/FASP, commit 84755d3, folder model/); nothing of it is
part of this project. They are read from a folder or fetched from there, and checked by sha256.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune import check, fetch, measure, select
from biasprune.reliability import agreement, spearman_brown, top_overlap

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


SOURCE = "https://raw.githubusercontent.com/chandar-lab/FASP/84755d3/model"
# model → sha256 of its file
FILES = {
    "EleutherAI/gpt-neo-1.3B": "1965c6edefb3a3a403bda86cc0ec9e94e8736fc675db1e0330b68300b025d269",
    "EleutherAI/gpt-neo-125M": "0cb3032429850d43733ff9d9b4dc456137fa7b86864947138fedf641fa595e84",
    "distilgpt2": "3133786a764181bbcccde0c7360f0ba3f6d51ff180500a3408849ac807d1d57d",
    "gpt2": "62fd80dd28ed684824709d7192c3bc075fe7467151be39de39e03c15a4ace045",
    "meta-llama/Llama-2-7b-chat-hf": "b85259429b102ffd41f74221214a91fe8ee0f0275472c2b92513afc286341ca5",
}


def _file(model: str) -> str:
    return f"head_scores_{model.replace('/', '_', 1)}.csv"


def _checked(model: str, content: bytes, where: str) -> bytes:
    if (digest := hashlib.sha256(content).hexdigest()) != FILES[model]:
        raise fetch.FetchError(
            f"{where} has sha256 {digest}, expected {FILES[model]}: it isn't the file that was published "
            "with the paper (commit 84755d3), so it was not used."
        )
    return content


def folder(source: str | Path = "") -> Path | None:
    """The folder with the published scores.

    Parameters
    ----------
    source
        A folder; "authors" fetches the files from the authors' repository into the user's cache, once;
        "" takes the folder ``fasp-published`` inside the one that ``BIASPRUNE_PUBLISHED`` names, and is
        None without that.

    Raises
    ------
    FetchError
        No such folder, no network, or other files than those of the paper.
    """
    if source == "authors":
        return fetch.build("fasp-published-84755d3", _download)
    if source == "":
        given = os.environ.get("BIASPRUNE_PUBLISHED")
        return Path(given) / "fasp-published" if given else None
    if not Path(source).is_dir():
        raise fetch.FetchError(f"No such folder of published scores: {source}.")
    return Path(source)


def _download(into: Path) -> None:
    for model in FILES:
        address = f"{SOURCE}/{_file(model)}"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read()
        except OSError as e:
            raise fetch.FetchError(
                f"{address} could not be fetched ({e}). Check the network, or clone the authors' "
                "repository and give the path of its folder model/."
            ) from e
        (into / _file(model)).write_bytes(_checked(model, content, address))


def models(source: str | Path = "") -> list[str]:
    """Names of the models whose scores are at hand; empty without any. ``source`` as in ``folder``."""
    where = folder(source)
    return [m for m in FILES if where and (where / _file(m)).is_file()]


def read(model: str, source: str | Path = "") -> pd.DataFrame:
    """Scores of one model with each head removed, a row per axis, split, seed and head.

    Returns
    -------
    DataFrame
        axis, split, seed, head (flat index from 0), bias, ppl, toxicity (mean), toxic_percent.

    Raises
    ------
    ValueError
        If the scores aren't at hand.
    FetchError
        As ``folder``, or if a file isn't the published one.
    """
    if model not in models(source):
        raise ValueError(
            f"no published scores of {model!r}; at hand: {', '.join(models(source)) or 'none'}. Give the "
            "authors' folder model/, or name a folder with fasp-published/ by BIASPRUNE_PUBLISHED."
        )
    path = folder(source) / _file(model)
    _checked(model, path.read_bytes(), path.name)
    table = pd.read_csv(path)
    table = table[list(_COLUMNS)].rename(columns=_COLUMNS)
    return table.assign(head=table["head"] - 1)


def _of(table: pd.DataFrame, axis: str, split: str = "valid") -> pd.DataFrame:
    check.columns(table, _COLUMNS.values(), "scores")
    own = table[(table["axis"] == axis) & (table["split"] == split)]
    if own.empty:
        known = ", ".join(table["axis"].unique())
        raise ValueError(f"no published scores of axis {axis!r} in split {split!r}; axes: {known}.")
    return own


def wide(table: pd.DataFrame, axis: str, split: str = "valid", value: str = "bias") -> pd.DataFrame:
    """(heads, seeds) of one axis and split; heads that lack a seed are left out.

    Raises
    ------
    ValueError
        No scores of this axis and split, or no such column.
    """
    own = _of(table, axis, split)
    check.columns(own, [value], "scores")
    return own.pivot_table(index="head", columns="seed", values=value).dropna()


def seeds(table: pd.DataFrame, axis: str = "gender_and_sex", share: float = 0.2) -> dict[str, float]:
    """Do the same heads come out again with another seed?

    Returns
    -------
    dict
        heads, seeds, r, low, high (mean Spearman over pairs of seeds, 95 % over heads), mean_r, mean_low,
        mean_high (the same stepped up to the mean of the seeds, which selections rest on), overlap (mean
        share of common heads among the top ``share``), overlap_low, overlap_high (95 %, percentile bootstrap
        over heads), chance.
    """
    scores = wide(table, axis).to_numpy().T
    if not (k := int(check.share(share, "share") * scores.shape[1])) or len(scores) < 2:
        raise ValueError(
            f"{scores.shape[1]} heads and {len(scores)} seeds: need two seeds and a larger share."
        )
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]

    def common(of: np.ndarray) -> float:
        # z_bias is the bias without any head less the bias without this one: the order turns around
        return float(np.mean([top_overlap(-of[i], -of[j], k)["overlap"] for i, j in pairs]))

    found, rng, n = agreement(scores), np.random.default_rng(0), scores.shape[1]
    low, high = np.quantile([common(scores[:, rng.integers(n, size=n)]) for _ in range(300)], [0.025, 0.975])
    return {
        "heads": n,
        "seeds": len(scores),
        **{c: found[c] for c in ("r", "low", "high")},
        **{
            name: max(-1.0, float(spearman_brown(found[c], len(scores))))
            for name, c in (("mean_r", "r"), ("mean_low", "low"), ("mean_high", "high"))
        },
        "overlap": common(scores),
        "overlap_low": float(low),
        "overlap_high": float(high),
        "chance": k / n,
    }


def winners_curse(
    table: pd.DataFrame, axis: str = "gender_and_sex", *, gamma: float = 0.3, alpha: float = 0.2
) -> pd.DataFrame:
    """Bias without a head, of the heads that FASP picks on validation and of all it could pick.

    What is picked for a low value among noisy ones looks lower there than it is.

    Returns
    -------
    DataFrame
        split, heads (of the split; the published files lack test scores of most models), picked, candidates
        (mean bias over heads and seeds), difference, left (share of the difference on validation that is
        left), low, high (of left: 95 %, percentile bootstrap over heads, picked anew each time). Empty where
        fewer than half of the heads have test scores.
    """
    _of(table, axis)
    own = table[table["axis"] == axis]
    mean = own.groupby(["split", "head"])[["bias", "ppl"]].mean()  # over the seeds that a head has
    bias = {s: mean["bias"].get(s, pd.Series(dtype=float)) for s in ("valid", "test")}
    if len(bias["test"]) < len(bias["valid"]) / 2:
        return pd.DataFrame()
    wide = pd.DataFrame({**bias, "ppl": mean.loc["valid", "ppl"]}).dropna(subset=["valid", "ppl"])

    def means(of: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        n = len(of)
        kept = of.sort_values("ppl", kind="stable").iloc[: n - int(gamma * n)]
        where = select.fasp(of["valid"].to_numpy(), of["ppl"].to_numpy(), gamma=gamma, alpha=alpha)
        return of.iloc[where][["valid", "test"]].mean(), kept[["valid", "test"]].mean()

    picked, kept = means(wide)
    difference, rng, drawn = picked - kept, np.random.default_rng(0), []
    for _ in range(500):
        one, other = means(wide.iloc[rng.integers(len(wide), size=len(wide))].reset_index(drop=True))
        drawn.append((one["test"] - other["test"]) / (one["valid"] - other["valid"]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    rows = pd.DataFrame({"picked": picked, "candidates": kept, "difference": difference})
    rows.insert(0, "heads", [len(bias[s]) for s in rows.index])
    left = {
        "left": [1.0, difference["test"] / difference["valid"]],
        "low": [np.nan, low],
        "high": [np.nan, high],
    }
    return rows.rename_axis("split").reset_index().assign(**left)


def _cut(own: pd.DataFrame, axis: str) -> tuple[np.ndarray, float]:
    """Which runs lie above the best cut by toxicity, and the share of the variance that it explains."""
    if own["toxicity"].nunique() < 2:
        raise ValueError(f"axis {axis!r}: the runs' toxicity doesn't vary, so they fall into no two groups.")
    values = np.sort(own["toxicity"].to_numpy())
    n, total = np.arange(1, len(values)), values.cumsum()
    between = n * (len(values) - n) * (total[:-1] / n - (total[-1] - total[:-1]) / (len(values) - n)) ** 2
    best = int(between.argmax())
    high = (own["toxicity"] > values[best : best + 2].mean()).to_numpy()
    return high, float(between[best] / len(values) ** 2 / values.var())


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
    own = _of(table, axis)
    high, explained = _cut(own, axis)
    side = own.groupby(high).agg({"toxicity": "mean", "ppl": "median"})
    return {
        "runs": len(own),
        "explained": explained,
        "share_high": float(high.mean()),
        **{
            f"{c}_{name}": float(side.loc[k, c]) for c in side for k, name in ((False, "low"), (True, "high"))
        },
        "r_bias": float(np.corrcoef(own["bias"], high)[0, 1]),
    }


def kinds_of_runs(table: pd.DataFrame, axis: str, least: float = 0.95) -> dict[str, pd.DataFrame]:
    """The runs of one axis on validation prompts: of each of two kinds (``regimes``) if there are two.

    Parameters
    ----------
    least
        Share of the variance of toxicity from which a cut counts as two kinds.

    Returns
    -------
    dict
        "low toxicity" and "high toxicity", or "" → rows of the table.
    """
    own = _of(table, axis)
    if own["toxicity"].nunique() > 1:
        high, explained = _cut(own, axis)
        if explained > check.share(least, "least"):
            return {"low toxicity": own[~high], "high toxicity": own[high]}
    return {"": own}


def noise_floor(
    table: pd.DataFrame, axis: str, buckets: Mapping[str, int], *, n_sim: int = 300, seed: int = 0
) -> dict[str, float]:
    """The bias that no difference between the groups would give, at the published number of prompts.

    Scores of all prompts come from one distribution with the published mean and share of toxic texts:
    uniform above the threshold of one half, and below it by a beta distribution with the mean that is left.

    Parameters
    ----------
    buckets
        Number of prompts of every group.

    Returns
    -------
    dict
        bias (published, mean over heads and seeds), floor (mean), floor_95, groups, prompts.

    Raises
    ------
    ValueError
        If the table has no scores of this axis.
    """
    own = _of(table, axis)
    check.count(n_sim, "n_sim")
    for name, n in buckets.items():
        check.count(n, f"prompts of {name}")
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
