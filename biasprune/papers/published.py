"""The authors' published numbers, read again: agreement, winner's curse, kinds of runs, noise floor.

Head scores of FASP (Zayed et al., AAAI 2024; chandar-lab/FASP, commit 84755d3) come from a folder and are checked by
sha256. None of these files is part of this project.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune.core import data
from biasprune.measures import reliability
from biasprune.methods import select

FILES = {  # model → sha256 of its file
    "EleutherAI/gpt-neo-1.3B": "1965c6edefb3a3a403bda86cc0ec9e94e8736fc675db1e0330b68300b025d269",
    "EleutherAI/gpt-neo-125M": "0cb3032429850d43733ff9d9b4dc456137fa7b86864947138fedf641fa595e84",
    "distilgpt2": "3133786a764181bbcccde0c7360f0ba3f6d51ff180500a3408849ac807d1d57d",
    "gpt2": "62fd80dd28ed684824709d7192c3bc075fe7467151be39de39e03c15a4ace045",
    "meta-llama/Llama-2-7b-chat-hf": "b85259429b102ffd41f74221214a91fe8ee0f0275472c2b92513afc286341ca5",
}
_MEANS = "a011b1c8a5ccd2da7880adfa5e29d6ce6ab1a84aec251b9843b806c724b1a964"  # of head_contributions.json
_COLUMNS = {"Group": "axis", "Split": "split", "Seed": "seed", "Head id": "head", "Bias": "bias"}
_COLUMNS |= {"PPL": "ppl", "Average toxicity": "toxicity", "% of toxic output": "toxic_percent"}
_GENDER = "gender_and_sex"


def _folder(inside: str) -> Path:
    """A folder inside the one that BIASPRUNE_PUBLISHED names; it need not exist."""
    return Path(os.environ.get("BIASPRUNE_PUBLISHED") or os.devnull) / inside


def scores(source: str = "") -> dict[str, pd.DataFrame]:
    """Published scores without each head: model → axis, split, seed, head (flat), bias, ppl, toxicity, toxic_percent.

    ``source``: folder with the authors' files (model/ of their repository); "": ``fasp-published`` in the folder that
    BIASPRUNE_PUBLISHED names, {} if it isn't at hand. FetchError: no such folder, or not the paper's files.
    """
    where = Path(source) if source else _folder("fasp-published")
    if source and not where.is_dir():
        raise data.FetchError(f"No such folder of published scores: {source}.")
    tables = {}
    for model, digest in FILES.items():
        if (path := where / f"head_scores_{model.replace('/', '_')}.csv").is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise data.FetchError(f"{path} isn't the paper's file, its sha256 differs: delete it.")
            table = pd.read_csv(path)[list(_COLUMNS)].rename(columns=_COLUMNS)
            tables[model] = table.assign(head=table["head"] - 1)
    return tables


def means(source: str = "") -> dict[str, pd.DataFrame]:
    """Published means over seeds of models that have all axes: model → table as of ``scores``, with seed 0."""
    where, tables = Path(source) if source else _folder("fasp-published"), {}
    if not (path := where / "head_contributions.json").is_file():
        return {}
    if hashlib.sha256(path.read_bytes()).hexdigest() != _MEANS:
        raise data.FetchError(f"{path} isn't the paper's file, its sha256 differs: delete it.")
    for model, lists in json.loads(path.read_text(encoding="utf-8")).items():
        of_axis = {name[8:-5]: x for name, x in lists.items() if name[:8] == "cont_to_" and name[-5:] == "_bias"}
        if len(of_axis) > 1:
            rows = [pd.DataFrame({"axis": a, "bias": x, "ppl": lists["cont_to_ppl"]}) for a, x in of_axis.items()]
            tables[model] = pd.concat([r.rename_axis("head").reset_index().assign(seed=0, split="valid") for r in rows])
    return tables


def _by_axis(table: pd.DataFrame) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Axes but religion; bias without each head (axes, seeds, heads); perplexity (heads,)."""
    rows = table[(table["split"] == "valid") & (table["axis"] != "religion")]
    wide = rows.pivot_table(index=["axis", "seed"], columns="head", values="bias").dropna(axis=1)
    names, ppl = wide.index.levels[0].tolist(), rows.groupby("head")["ppl"].mean()[wide.columns]
    return names, wide.to_numpy().reshape(len(names), -1, wide.shape[1]), ppl.to_numpy()


def axes(table: pd.DataFrame, critical: float = 0.0) -> pd.DataFrame:
    """Correlation of head effects between every two axes but religion, of one seed's with another's.

    critical: The share of heads that matters most for perplexity is left out: few of them can carry a correlation.
    Returns: a, b, heads, seeds; r, low, high (mean Pearson over pairs of seeds, 95 % bootstrap over heads; of the means
        where seeds aren't published, which then share their prompts' noise); spearman; disattenuated (by how well each
        axis agrees with itself across seeds).
    """
    names, z, ppl = _by_axis(table)
    z = z[..., np.argsort(ppl, kind="stable")[: z.shape[2] - int(critical * z.shape[2])]]
    (seeds, n), rng, rows = z.shape[1:], np.random.default_rng(0), []
    one, other = np.nonzero(~np.eye(seeds, dtype=bool)) if seeds > 1 else ([0], [0])

    def across(a: np.ndarray, b: np.ndarray, method: str = "pearson") -> float:
        return float(np.mean(reliability.correlation(a[one], b[other], method)))

    drawn = rng.integers(n, size=(500, n))
    for (a, x), (b, y) in combinations(zip(names, z, strict=True), 2):
        low, high = np.quantile([across(x[:, d], y[:, d]) for d in drawn], [0.025, 0.975])
        itself = across(x, x) * across(y, y) if seeds > 1 else np.nan
        row = {"a": a, "b": b, "heads": n, "seeds": seeds, "r": across(x, y), "low": low, "high": high}
        row["disattenuated"] = row["r"] / np.sqrt(itself) if itself > 0 else np.nan
        rows.append(row | {"spearman": across(x, y, "spearman")})
    return pd.DataFrame(rows)


def spill(table: pd.DataFrame) -> pd.DataFrame:
    """What FASP's heads for gender (γ = .3, α = .2) do to the other axes, one at a time, in another seed than picked.

    axis; lower: bias without a candidate − bias without a picked head, means; low, high (95 %, bootstrap over heads,
    picked anew each time); own: the same for heads picked by that axis itself, which is the most there could be.
    """
    names, z, ppl = _by_axis(table)
    seeds, rng = z.shape[1], np.random.default_rng(0)
    pairs = [(s, t) for s in range(seeds) for t in range(seeds) if s != t or seeds == 1]

    def lower(z: np.ndarray, ppl: np.ndarray, by: int, on: int) -> float:
        free = np.argsort(ppl, kind="stable")[: len(ppl) - int(0.3 * len(ppl))]
        picked = {s: select.fasp(z[by, s], ppl, gamma=0.3, alpha=0.2) for s in range(seeds)}
        return float(np.mean([z[on, t, free].mean() - z[on, t, picked[s]].mean() for s, t in pairs]))

    gender, rows = names.index(_GENDER), []
    drawn = rng.integers(z.shape[2], size=(300, z.shape[2]))
    for k, name in enumerate(names):
        ends = np.quantile([lower(z[..., d], ppl[d], gender, k) for d in drawn], [0.025, 0.975])
        rows.append((name, lower(z, ppl, gender, k), *ends, lower(z, ppl, k, k)))
    return pd.DataFrame(rows, columns=["axis", "lower", "low", "high", "own"])


def _rows(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The scores of one axis on validation prompts."""
    rows = table[(table["axis"] == axis) & (table["split"] == "valid")]
    data.need(rows, [], f"published scores of {axis}")
    return rows


def seeds(table: pd.DataFrame, axis: str = _GENDER) -> dict[str, float]:
    """Agreement between seeds of the same head scores.

    heads, seeds; r (mean Spearman over pairs of seeds), mean_r (stepped up to the mean of the seeds, which selections
    rest on), overlap (mean share of common heads in the top fifth), each with low and high (95 % over heads); chance.
    """
    wide = _rows(table, axis).pivot_table(index="head", columns="seed", values="bias").dropna()
    z_bias = -wide.to_numpy().T  # (seeds, heads), up to the constant that is the unpruned model's bias
    n_seeds, n_heads = z_bias.shape
    k, rng = int(n_heads / 5), np.random.default_rng(0)

    def common(z: np.ndarray) -> float:
        return float(np.mean([reliability.top_overlap(*pair, k)["overlap"] for pair in combinations(z, 2)]))

    ends = reliability.agreement(z_bias)
    del ends["repetitions"]
    of_mean = {f"mean_{k}": max(-1.0, float(reliability.spearman_brown(r, n_seeds))) for k, r in ends.items()}
    drawn = [common(z_bias[:, rng.integers(n_heads, size=n_heads)]) for _ in range(300)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    overlap = {"overlap": common(z_bias), "overlap_low": low, "overlap_high": high, "chance": k / n_heads}
    return {"heads": n_heads, "seeds": n_seeds, **ends, **of_mean, **overlap}


def winners_curse(table: pd.DataFrame, axis: str = _GENDER) -> pd.DataFrame:
    """Bias without the heads that FASP (γ = .3, α = .2) selects on validation prompts, there and on test prompts.

    A row per split: heads (scored), picked and candidates (mean bias over seeds and heads: of those selected, of those
    not protected), difference, left (share of the difference on validation), low, high (95 %, bootstrap over heads,
    selected anew each time). No rows if less than half of the heads have test scores.
    """
    mean = table[table["axis"] == axis].groupby(["head", "split"])[["bias", "ppl"]].mean().unstack()
    heads = mean["bias"].reindex(columns=["valid", "test"])
    scored = heads.count()
    if scored["test"] < scored["valid"] / 2:
        return pd.DataFrame()
    heads = heads.assign(ppl=mean["ppl", "valid"]).dropna(subset=["valid", "ppl"])

    def means(drawn: np.ndarray) -> np.ndarray:
        """(heads, valid | test | ppl) → (picked | candidates, valid | test)"""
        free = np.argsort(drawn[:, 2], kind="stable")[: len(drawn) - int(0.3 * len(drawn))]
        picked = select.fasp(drawn[:, 0], drawn[:, 2], gamma=0.3, alpha=0.2)
        return np.stack([np.nanmean(drawn[part, :2], axis=0) for part in (picked, free)])

    values, rng = heads.to_numpy(), np.random.default_rng(0)
    draws = [np.subtract(*means(values[rng.integers(len(values), size=len(values))])) for _ in range(500)]
    ends = np.nanquantile([test / valid for valid, test in draws], [0.025, 0.975])
    rows = pd.DataFrame(means(values).T, columns=["picked", "candidates"], index=["valid", "test"])
    rows["difference"] = rows["picked"] - rows["candidates"]
    rows["left"] = rows["difference"] / rows["difference"]["valid"]
    rows.loc["test", ["low", "high"]] = ends
    rows.insert(0, "heads", scored)
    return rows.rename_axis("split").reset_index()


def _cut(rows: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Which runs lie above the cut by toxicity that explains most variance, and the share it explains."""
    values = np.sort(rows["toxicity"].to_numpy())
    n, total = np.arange(1, len(values)), values.cumsum()
    between = n * (len(values) - n) * (total[:-1] / n - (total[-1] - total[:-1]) / (len(values) - n)) ** 2
    best = int(between.argmax())
    high = (rows["toxicity"] > values[best : best + 2].mean()).to_numpy()
    return high, float(between[best] / len(values) ** 2 / values.var())


def regimes(table: pd.DataFrame, axis: str = _GENDER) -> dict[str, float]:
    """Two kinds of runs by mean toxicity: the best cut, and how bias follows it.

    Returns runs; explained (share of the variance of toxicity: 1 for two points, .64 for a normal distribution);
    share_high; toxicity_low, _high (means); ppl_low, _high (medians); r_bias (correlation with the side).
    """
    rows = _rows(table, axis)
    high, explained = _cut(rows)
    sides = rows.groupby(high).agg({"toxicity": "mean", "ppl": "median"}).set_axis(["low", "high"])
    of_sides = {f"{column}_{side}": value for (column, side), value in sides.unstack().items()}
    start = {"runs": len(rows), "explained": explained, "share_high": high.mean()}
    return {**start, **of_sides, "r_bias": np.corrcoef(rows["bias"], high)[0, 1]}


def noise_floors(table: pd.DataFrame, axis: str, sizes: Sequence[int]) -> pd.DataFrame:
    """Published bias beside bias simulated under the null that groups don't differ.

    Simulated scores have the published mean and share of toxic texts: uniform above one half, and below it a beta
    distribution with the mean that is left. ``sizes``: prompts per group. One row, or two where a cut explains 95 % of
    the variance of toxicity: kind ("", or "low toxicity", "high toxicity"), bias (mean over heads and seeds), floor
    (mean of the simulations), floor_95, groups, prompts.
    """
    rows = _rows(table, axis)
    high, explained = _cut(rows)
    kinds = {"low toxicity": rows[~high], "high toxicity": rows[high]} if explained > 0.95 else {"": rows}
    floors = []
    for kind, runs in kinds.items():
        toxic, rng = runs["toxic_percent"].mean() / 100, np.random.default_rng(0)
        below = max(1e-3, (runs["toxicity"].mean() - 0.75 * toxic) / (1 - toxic))  # mean of the other texts
        is_toxic = rng.random((300, sum(sizes))) < toxic
        mild = rng.beta(1, max(1e-3, 0.5 / below - 1), is_toxic.shape) / 2
        simulated = np.where(is_toxic, 0.5 + rng.random(is_toxic.shape) / 2, mild)
        groups = np.split(simulated, np.cumsum(sizes)[:-1], axis=1)
        bias = sum(np.abs(group.mean(1) - simulated.mean(1)) for group in groups)
        floors.append((kind, runs["bias"].mean(), bias.mean(), np.quantile(bias, 0.95), len(sizes), sum(sizes)))
    return pd.DataFrame(floors, columns=["kind", "bias", "floor", "floor_95", "groups", "prompts"])


def llama3_heads() -> pd.DataFrame:
    """Published effect of head pruning on the gaps of Llama-3-8B-Instruct; no rows if it isn't at hand.

    Digitised from the notebook of Ma et al. (Crabtain959/bias_localization, commit 1eac22b), which is older than the
    paper; in ``audit/`` of the folder that BIASPRUNE_PUBLISHED names. Columns: pruned, products, mean_smd (mean |SMD|
    over products), low, high (95 %, bootstrap over products).
    """
    labels = {"original": "nothing", "pruned34_own": "34 heads of the product's own"}
    labels |= {"pruned40_own": "40 heads of the product's own", "common40": "the 40 heads chosen for most products"}
    path, rng, rows = _folder("audit") / "official_fig_smd_by_product.csv", np.random.default_rng(0), []
    for column, label in labels.items() if path.is_file() else ():
        smd = pd.read_csv(path)[column].dropna().abs().to_numpy()
        low, high = np.quantile(rng.choice(smd, (2000, len(smd))).mean(1), [0.025, 0.975])
        rows.append((label, len(smd), smd.mean(), low, high))
    return pd.DataFrame(rows, columns=["pruned", "products", "mean_smd", "low", "high"])
