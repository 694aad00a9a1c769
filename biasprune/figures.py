"""Four figures: a tidy frame in, a matplotlib figure out, readable in greyscale and on a phone.

A figure is 5.2 inches wide, so that its texts of 10 points have 10 pixels on a screen of 380. Rows, groups and panels
come in the table's order. Rows without a value aren't drawn; it is a ValueError if no row has one.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

WIDTH = 5.2  # inches
MARKERS, DASHES = "os^DvPX*", ("-", "--", "-.", ":")
SIZES = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
sns.set_theme(style="whitegrid", palette="colorblind", rc={"figure.dpi": 110, **dict.fromkeys(SIZES, 10)})


def save(figure: Figure, folder: str | Path, name: str) -> None:
    """Write ``name.png`` and ``name.pdf`` without dates, so that the same data give the same bytes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for suffix, date in (("png", "Software"), ("pdf", "CreationDate")):
        figure.savefig(Path(folder) / f"{name}.{suffix}", dpi=160, metadata={date: None})


def _with_values(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    rows = table[np.isfinite(table[list(columns)].astype(float)).all(axis=1)]
    if rows.empty:
        raise ValueError(f"nothing to draw: no row of the table has a number in {' and '.join(columns)}.")
    return rows


def _panels(rows: pd.DataFrame, panel: str | None, height: float, across: int = 2, **shared: bool) -> tuple:
    """A figure, and pairs of an axis, ``height`` inches high, and the rows of one value of ``panel``."""
    parts = {"": rows} if panel is None else {str(n): rows[rows[panel] == n] for n in rows[panel].unique()}
    across = min(across, len(parts))
    down = -(-len(parts) // across)
    size = (WIDTH, down * (height + 0.4) + 0.7)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", **shared)
    for unused in axes.flat[len(parts) :]:
        unused.set_axis_off()
    for axis, name in zip(axes.flat, parts, strict=False):
        axis.tick_params(labelbottom=True)
        axis.set_title(fill(name, 60 // across), loc="left", weight="bold")
    return figure, list(zip(axes.flat, parts.values(), strict=False))


def _groups(rows: pd.DataFrame, part: pd.DataFrame, hue: str | None) -> list[tuple[int, dict, pd.DataFrame]]:
    """Of every value of ``hue`` its number, colour and label, the same in all panels, and its rows in one of them."""
    if hue is None:
        return [(0, {"color": "black"}, part)]
    names = rows[hue].unique()
    styles = zip(names, sns.color_palette("colorblind", len(names)), strict=True)
    groups = [(i, {"color": c, "label": str(n)}, part[part[hue] == n]) for i, (n, c) in enumerate(styles)]
    return [group for group in groups if len(group[2])]


def _finish(figure: Figure, xlabel: str, ylabel: str = "") -> Figure:
    """Axis labels, and one legend above all panels."""
    figure.supxlabel(fill(xlabel, 60), fontsize=10)
    figure.supylabel(fill(ylabel, 36), fontsize=10)
    entries: dict[str, object] = {}
    for axis in figure.axes:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if entries:
        texts, columns = [fill(x, 60) for x in entries], max(1, min(3, len(entries), 48 // max(map(len, entries))))
        figure.legend(entries.values(), texts, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _log(axis: Axes, which: str, values: pd.Series) -> None:
    """A log scale with plain numbers; symmetric where values reach 0, linear where they differ less than 3-fold."""
    line, scale = getattr(axis, f"{which}axis"), getattr(axis, f"set_{which}scale")
    if (values <= 0).any():
        scale("symlog", linthresh=10 ** np.floor(np.log10(max(values.abs().median(), 1e-9))))
    elif values.max() > 3 * values.min():
        scale("log")
        line.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 40 * values.min() else (1,)))
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(StrMethodFormatter("{x:g}"))


def intervals(
    table: pd.DataFrame,
    value: str,
    label: str,
    *,
    low: str,
    high: str,
    hue: str | None = None,
    panel: str | None = None,
    hollow: str | None = None,
    reference: float | None = 0.0,
    xlabel: str = "",
) -> Figure:
    """A row per label with a dot and its interval; hollow where the bool column ``hollow`` is True, as for controls."""
    rows = _with_values(table, value)
    labels, n_hues = [str(x) for x in rows[label].unique()], 1 if hue is None else rows[hue].nunique()
    row_height = 0.24 + 0.14 * (n_hues - 1) + 0.1 * any(len(x) > 24 for x in labels)
    figure, parts = _panels(rows, panel, row_height * len(labels), sharex=True, sharey=True)
    for axis, part in parts:
        for i, style, one in _groups(rows, part, hue):
            colour = style["color"]
            y = np.array([labels.index(str(x)) for x in one[label]]) + 0.7 * ((i + 0.5) / n_hues - 0.5)
            axis.hlines(y, one[low], one[high], color=colour, lw=1.6, zorder=2)
            empty = np.zeros(len(one), dtype=bool) if hollow is None else one[hollow].to_numpy(dtype=bool)
            look = {"s": 38, "marker": MARKERS[i % 8], "edgecolors": [colour], "linewidths": 1.4, "zorder": 3}
            for chosen, inside, name in ((~empty, colour, style.get("label")), (empty, "white", hollow)):
                if chosen.any():
                    axis.scatter(one[value][chosen], y[chosen], color=[inside], label=name, **look)
        if reference is not None:
            axis.axvline(reference, color="black", lw=0.9, zorder=1)
        axis.set_yticks(range(len(labels)), [fill(x, 24) for x in labels])
        axis.set_ylim(len(labels) - 0.4, -0.6)
    return _finish(figure, xlabel)


def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    low: str | None = None,
    high: str | None = None,
    panel: str | None = None,
    xlabel: str = "",
    ylabel: str = "",
    logx: bool = False,
    logy: bool = False,
    reference: float | None = None,
) -> Figure:
    """A line per value of ``hue``, with a band from ``low`` to ``high``; ``reference`` is a dotted horizontal."""
    rows = _with_values(table, x, y)
    figure, parts = _panels(rows, panel, 2.4 if panel is None else 2.0, sharex=True, sharey=True)
    for axis, part in parts:
        for i, style, one in _groups(rows, part.sort_values(x), hue):
            axis.plot(one[x], one[y], MARKERS[i % 8] + DASHES[i % 4], ms=5, lw=1.6, **style)
            if low is not None:
                axis.fill_between(one[x], one[low], one[high], color=style["color"], alpha=0.15, lw=0.6)
        if reference is not None:
            axis.axhline(reference, color="black", lw=1, ls=":")
        if logx:
            _log(axis, "x", rows[x])
        if logy:
            _log(axis, "y", rows[y])
    return _finish(figure, xlabel, ylabel)


def heat_map(
    table: pd.DataFrame,
    row: str,
    column: str,
    value: str,
    *,
    text: str | None = None,
    bold: str | None = None,
    panel: str | None = None,
    label: str = "",
    limit: float | None = None,
) -> Figure:
    """Cells that say the column ``text``, or their value; bold where the bool column ``bold`` is True.

    Hatched without a value. With ``limit``, colours go from −limit to limit.
    """
    rows, table = _with_values(table, value), table.reset_index(drop=True)
    low, high = (-limit, limit) if limit is not None else (rows[value].min(), rows[value].max())
    style = {"cmap": "cividis" if limit is None else "PuOr", "vmin": low, "vmax": high, "linewidths": 0.6}
    texts = table[value].map("{:.2g}".format).replace("nan", "–") if text is None else table[text].astype(str)
    across, height = 2 if table[column].nunique() <= 4 else 1, 0.3 + 0.17 * texts.str.count("\n").max()
    named = table[column].astype(str).str.replace(" ", "\n")  # lines of its labels
    words, panels = named.str.split("\n").explode().str.len().max(), 1 if panel is None else table[panel].nunique()
    upright = 0.08 * words * min(across, panels) * named.nunique() < 3.4  # inches that cells have side by side
    below = 0.17 * (1 + named.str.count("\n").max()) if upright else 0.08 * words
    figure, parts = _panels(table, panel, height * table[row].nunique() + 0.3 + below, across, sharey=True)
    longest = max(1, texts.str.split("\n").explode().str.len().max())
    size = np.clip(470 / min(across, len(parts)) / table[column].nunique() / longest, 5, 10)  # fits into a cell
    for axis, part in parts:
        cells = part.pivot(index=row, columns=column, values=value).astype(float)
        cells = cells.reindex(index=table[row].unique(), columns=part[column].unique())
        labels = cells.columns.astype(str).str.replace(" ", "\n")
        axis.patch.set(hatch="////", edgecolor="lightgrey")
        sns.heatmap(cells.set_axis(labels, axis=1), ax=axis, mask=cells.isna().to_numpy(), cbar=False, **style)
        for i, cell in part.iterrows():
            x, y = cells.columns.get_loc(cell[column]) + 0.5, cells.index.get_loc(cell[row]) + 0.5
            light = np.dot(axis.collections[0].to_rgba(cell[value])[:3], (0.3, 0.59, 0.11))
            ink = "white" if np.isfinite(cell[value]) and light < 0.5 else "black"
            weight = "bold" if bold is not None and cell[bold] else "normal"
            axis.text(x, y, texts[i], ha="center", va="center", fontsize=size, color=ink, weight=weight)
        axis.label_outer(remove_inner_ticks=False)
        axis.tick_params(axis="y", rotation=0)
        axis.tick_params(axis="x", rotation=0 if upright else 90)
        axis.grid(visible=False)
    figure.colorbar(axis.collections[0], ax=list(figure.axes), location="bottom", aspect=40, label=label)
    return figure


def scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    xerr: str | None = None,
    yerr: str | None = None,
    panel: str | None = None,
    identity: bool = False,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """A point per row with error bars of ± ``xerr`` and ± ``yerr``; ``identity`` draws y = x."""
    rows = _with_values(table, x, y)
    figure, parts = _panels(rows, panel, 3.2 if panel is None else 2.2, sharex=True, sharey=True)
    for axis, part in parts:
        axis.axhline(0, color="grey", lw=0.8, zorder=0)
        axis.scatter(part[x], part[y], s=26, marker="o", alpha=0.75, color="black", ec="white", lw=0.4)
        errors = {k: part[c] for k, c in (("xerr", xerr), ("yerr", yerr)) if c is not None}
        axis.errorbar(part[x], part[y], fmt="none", ecolor="black", elinewidth=0.8, alpha=0.6, **errors)
        if identity:
            axis.axline((0, 0), slope=1, color="black", lw=0.9, ls=":")
    return _finish(figure, xlabel, ylabel)
