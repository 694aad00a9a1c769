"""The grid of interventions, and what each does to a bias: column excess of cells, one row per setting and seed.

Claims of Baksi et al. 2024 (arXiv 2408.00612) and, against one of them, of Steed et al., ACL 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from biasprune.core.data import choose
from biasprune.core.stats import over_seeds
from biasprune.downstream.classify import PRUNED, RANDOM, UPSTREAM, Setting

PLAIN = "pretrained, none"
Names, Numbers = Sequence[str], Sequence[float]


def grid(
    upstreams: Names, data: Names, strengths: Numbers, scales: Numbers, crossed: Names, seeds: Sequence[int]
) -> list[tuple[Setting, int]]:
    """Settings × seeds: all interventions on the model, and with the plain model all on the data.

    ``strengths`` are λ of "co-occurrence", ``scales`` the noise of "perturbed", ``crossed`` further interventions on
    the model that are combined with all strengths.
    """
    for name in [*upstreams, *crossed]:
        choose(name, UPSTREAM, "intervention on the model")
    for name in data:
        choose(name, ("scrubbed", "rebalanced"), "intervention on the data")
    if "pretrained" not in upstreams or len(set(seeds)) < 2:
        raise ValueError("effects are differences to 'pretrained' over seeds: give it, and two seeds or more.")
    settings = []
    for u in upstreams:
        for scale in scales if u == "perturbed" else [PRUNED.get(u.removeprefix(RANDOM), 0.0)]:
            settings.append(Setting(u, scale=scale))
            settings += [Setting(u, d) for d in data if u == "pretrained"]
            settings += [Setting(u, "co-occurrence", x, scale) for x in strengths if u in ("pretrained", *crossed)]
    return [(at, seed) for seed in seeds for at in settings]


def by_seed(cells: pd.DataFrame, value: str = "excess") -> pd.DataFrame:
    """Excess, or another column: seeds × settings in the grid's order."""
    return cells.pivot(index="seed", columns="setting", values=value)[list(cells["setting"].unique())]


def intervals(each: pd.DataFrame) -> pd.DataFrame:
    """Of every column over seeds (rows): effect (mean), low, high (95 %, Student's t), sd, needed, seeds.

    needed: so many seeds would tell an effect of this size from 0 in four of five experiments.
    """
    rows = []
    for name in each:
        (mean, low, high), sd = over_seeds(each[name]), float(each[name].std())
        needed = max(3.0, float(np.ceil(((1.96 + 0.84) * sd / abs(mean)) ** 2 + 1))) if mean else np.inf
        rows.append((name, mean, low, high, sd, needed, len(each)))
    return pd.DataFrame(rows, columns=[each.columns.name, "effect", "low", "high", "sd", "needed", "seeds"])


def relative(each: pd.DataFrame, start: pd.Series) -> pd.DataFrame:
    """Columns over seeds as shares of the mean ``start``: their means are ratios of means.

    Linearised (delta method), so that an interval over seeds holds the noise of the start, too. NaN without a start.
    """
    mean = start.mean() if start.mean() > 1e-6 else np.nan
    return each.mean() / mean + (each - np.outer(start, each.mean() / mean)) / mean


def against(cells: pd.DataFrame, control: str = "") -> pd.DataFrame:
    """Every setting less the plain model, or less the setting with ``control`` (``RANDOM``) before its name.

    setting, accuracy, excess (means), control_accuracy, ``intervals`` of the differences by seed, and of them as
    shares of the plain model's bias: share, share_low, share_high.
    """
    wide, means = by_seed(cells), cells.groupby("setting")[["accuracy", "excess"]].mean()
    other = {s: control + s if control else PLAIN for s in wide}
    each = pd.DataFrame({s: wide[s] - wide[c] for s, c in other.items() if c in wide}, index=wide.index)
    each, names = each.rename_axis(columns="setting"), ["share", "share_low", "share_high"]
    shares = intervals(relative(each, wide[PLAIN]))[["effect", "low", "high"]].set_axis(names, axis=1)
    table = intervals(each).join(shares).join(means, on="setting")
    return table.assign(control_accuracy=table["setting"].map(other).map(means["accuracy"]))


def slopes(cells: pd.DataFrame, most: float = np.inf) -> pd.DataFrame:
    """Change of bias per λ over [0, most] ("none" is λ = 0): seeds × interventions on the model with two λ or more."""
    rows = cells[cells["data"].isin(["none", "co-occurrence"]) & cells["strength"].between(0, most)]
    rows = rows[rows.groupby("upstream")["strength"].transform("nunique") > 1]
    fits = {k: np.polyfit(r["strength"], r["excess"], 1)[0] for k, r in rows.groupby(["seed", "upstream"], sort=False)}
    index = pd.MultiIndex.from_tuples(fits, names=["seed", "upstream"])
    return pd.Series(list(fits.values()), index=index, dtype=float).unstack(sort=False)


def relative_slopes(cells: pd.DataFrame, most: float = np.inf) -> pd.DataFrame:
    """``slopes`` as shares of the bias that each intervention on the model has with the data as they are."""
    each, plain = slopes(cells, most), cells[cells["data"] == "none"]
    starts = plain.groupby(["seed", "upstream"])["excess"].mean().unstack().loc[each.index]
    return each.apply(lambda column: relative(column.to_frame(), starts[column.name])[column.name])


def best_lowered(cells: pd.DataFrame, settings: Names) -> pd.DataFrame:
    """What the best of some settings does in each seed, the best by the mean of the other seeds.

    Columns: lowered, as a share of the plain model's bias; accuracy, less that of the plain model.
    """
    wide, right = by_seed(cells), by_seed(cells, "accuracy")
    lowered = -wide[list(settings)].sub(wide[PLAIN], axis=0)
    best = ((lowered.sum() - lowered) / (len(lowered) - 1)).idxmax(axis=1)
    rows = {s: (lowered.loc[s, b], right.loc[s, b] - right.loc[s, PLAIN]) for s, b in best.items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["lowered", "accuracy"])
    return table.assign(lowered=relative(table[["lowered"]], wide[PLAIN]))
