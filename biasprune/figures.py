"""Tidy frame in, seaborn figure out. One style for all figures, readable in greyscale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc={"figure.dpi": 110})


def save(figure: Figure, folder: str | Path, name: str) -> None:
    """Write ``name.png`` and ``name.pdf``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("pdf", "png"):
        # no creation date: the same data give the same bytes
        metadata = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
        figure.savefig(folder / f"{name}.{suffix}", dpi=160, bbox_inches="tight", metadata=metadata)


def head_scores(scores: pd.DataFrame, n: int = 5) -> Figure:
    """z_bias against z_ppl of every head, with standard errors; the n largest z_bias named."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    axis.errorbar(
        scores["z_ppl"],
        scores["z_bias"],
        xerr=scores["z_ppl_se"],
        yerr=scores["z_bias_se"],
        fmt="o",
        markersize=3.5,
        elinewidth=0.4,
        ecolor="lightgrey",
        alpha=0.6,
    )
    named = scores.nlargest(n, "z_bias").sort_values("z_ppl")
    for i, row in enumerate(named.itertuples()):  # along the top, since they often lie close together
        axis.annotate(
            f"{row.layer}.{row.head}",
            (row.z_ppl, row.z_bias),
            xytext=((i + 1) / (n + 1), 0.95),
            textcoords="axes fraction",
            fontsize=9,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": "black", "lw": 0.6},
        )
    axis.axhline(0, color="black", lw=0.8)
    axis.axvline(0, color="black", lw=0.8)
    typical = max(float(scores["z_ppl"].abs().median()), 1e-6)
    axis.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(typical)), linscale=1)
    axis.set_xlabel("z_ppl: perplexity without the head − with it (symmetric log scale)")
    axis.set_ylabel("z_bias: bias with the head − without it")
    axis.set_title(f"Effect of removing each of {len(scores)} heads (± 1 standard error; layer.head)")
    return figure


def change_against_alpha(table: pd.DataFrame, max_ppl_ratio: float | None = None) -> Figure:
    """Change of bias (%) with 95 % intervals and perplexity ratio against α, one panel per method.

    FASP's line stands in every panel for comparison. The dotted line is the noise floor: the change
    that would be measured if the groups didn't differ at all.
    """
    unpruned = table.loc[table["alpha"] == 0, "bias"].iloc[0]
    methods = list(dict.fromkeys(table["method"]))
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    figure, axes = plt.subplots(
        2, len(methods), figsize=(2.6 * len(methods), 5.6), sharex=True, sharey="row", squeeze=False
    )
    fasp = table[table["method"] == "FASP"]
    for column, method in enumerate(methods):
        part = table[table["method"] == method]
        top, bottom = axes[:, column]
        style = {"color": colours[method], "marker": MARKERS[column % len(MARKERS)], "ms": 4}
        top.fill_between(
            part["alpha"], part["change_low"], part["change_high"], color=colours[method], alpha=0.25
        )
        if method != "FASP":
            top.plot(fasp["alpha"], fasp["change"], color="grey", ls="--", lw=1.2)
            bottom.plot(fasp["alpha"], fasp["ppl_ratio"], color="grey", ls="--", lw=1.2)
        top.plot(part["alpha"], part["change"], **style)
        bottom.plot(part["alpha"], part["ppl_ratio"], **style)
        top.plot(part["alpha"], 100 * (part["floor"] / unpruned - 1), color="black", ls=":", lw=1.4)
        top.axhline(0, color="black", lw=0.8)
        bottom.axhline(1, color="black", lw=0.8)
        if max_ppl_ratio:
            bottom.axhline(max_ppl_ratio, color="black", lw=0.8, ls=":")
        bottom.set_yscale("log")
        top.set_title(method, fontsize=11)
        bottom.set_xlabel("share of heads\npruned (α)")
    axes[0, 0].set_ylabel("change of bias (%)\nband: 95 % interval")
    axes[1, 0].set_ylabel("perplexity ÷ unpruned\n(log scale)")
    axes[1, 0].yaxis.set_major_locator(FixedLocator([0.5, 0.8, 1, 1.25, 2, 3, 5, 10, 30, 100, 1000]))
    axes[1, 0].yaxis.set_minor_locator(NullLocator())
    axes[1, 0].yaxis.set_major_formatter(plt.FormatStrFormatter("%g"))
    figure.suptitle("Test prompts, every method against α (dashed grey: FASP; dotted: noise floor)", y=0.99)
    figure.tight_layout()
    return figure


def gamma_alpha(grid: pd.DataFrame, chosen: float) -> Figure:
    """Change of bias and perplexity ratio of FASP over γ × α; the chosen γ is framed."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.55 * grid["gamma"].nunique() + 1.9))
    shown = grid[grid["pruned"] > 0]
    for axis, value, title, cmap, centre, form in (
        (axes[0], "change", "change of bias (%), validation prompts", "RdBu_r", 0, ".0f"),
        (axes[1], "ppl_ratio", "perplexity ÷ unpruned", "viridis_r", None, ".2f"),
    ):
        cells = shown.pivot(index="gamma", columns="alpha", values=value)
        sns.heatmap(cells, ax=axis, annot=True, fmt=form, cmap=cmap, center=centre, annot_kws={"size": 8})
        row = list(cells.index).index(chosen)
        axis.add_patch(
            plt.Rectangle((0, row), cells.shape[1], 1, fill=False, ec="black", lw=2.5, clip_on=False)
        )
        axis.set_xticklabels([f"{a:.2g}" for a in cells.columns], rotation=0)
        axis.set_xlabel("share of heads pruned (α)")
        axis.set_ylabel("share of heads protected (γ)")
        axis.set_title(f"{title} (frame: chosen γ)", fontsize=11)
    figure.tight_layout()
    return figure


def head_map(n_layers: int, n_heads: int, protected: list[int], pruned: list[int]) -> Figure:
    """Layer × head grid: protected, pruned, neither."""
    state = np.zeros(n_layers * n_heads)
    state[protected] = 1
    state[pruned] = 2
    colours = ["#eeeeee", "#9ecae1", "#b2182b"]
    figure, axis = plt.subplots(figsize=(min(11, 2.6 + 0.42 * n_layers), 1.5 + 0.3 * n_heads))
    sns.heatmap(
        pd.DataFrame(state.reshape(n_layers, n_heads).T),
        ax=axis,
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=2,
        cbar=False,
        linewidths=0.8,
        square=True,
    )
    for h in pruned:  # a mark as well as a colour, for greyscale
        axis.text(h // n_heads + 0.5, h % n_heads + 0.5, "×", ha="center", va="center", color="white")
    axis.set_xlabel("layer")
    axis.set_ylabel("head")
    axis.set_title(f"Heads protected ({len(protected)}), pruned ({len(pruned)}, ×), and left")
    labels = ["neither", "protected (perplexity)", "pruned (bias)"]
    patches = [Patch(fc=c, ec="grey", label=t) for c, t in zip(colours, labels, strict=True)]
    axis.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3, frameon=False)
    return figure


def group_scores(table: pd.DataFrame) -> Figure:
    """Mean judge score per group, prompts alone against continuations; columns bucket, what, score."""
    grid = sns.catplot(
        table,
        x="score",
        y="bucket",
        hue="what",
        kind="point",
        linestyle="none",
        dodge=0.35,
        markers=MARKERS[: table["what"].nunique()],
        height=0.35 * table["bucket"].nunique() + 2.0,
        aspect=1.6,
        seed=0,
    )
    grid.set_axis_labels("mean judge score (0 – 1), 95 % interval", "")
    grid.legend.set_title("")
    return grid.figure


def speed_ratios(table: pd.DataFrame) -> Figure:
    """Times faster than the loop, per fidelity and work; bars to the lowest and highest layer."""
    works = list(dict.fromkeys(zip(table["dtype"], table["work"], strict=True)))
    figure, axis = plt.subplots(figsize=(8.5, 0.45 * len(table) + 1.6))
    names = list(table["fidelity"].unique())
    for i, (work, marker) in enumerate(zip(works, MARKERS, strict=False)):
        own = table[(table["dtype"] == work[0]) & (table["work"] == work[1])]
        beside = 0.6 * (i / (len(works) - 1) - 0.5) if len(works) > 1 else 0.0
        y = np.array([names.index(f) for f in own["fidelity"]]) + beside
        bars = np.abs(own[["ratio_low", "ratio_high"]].to_numpy().T - own["ratio"].to_numpy())
        label = f"{work[1].removeprefix('z_bias, ')}, {work[0]}"
        axis.errorbar(own["ratio"], y, xerr=bars, fmt=marker, capsize=3, ms=7, label=label)
        for x, at in zip(own["ratio"], y, strict=True):
            text = f"{x:.0f}" if x >= 10 else f"{x:.1f}"
            axis.annotate(text, (x, at), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(plt.FormatStrFormatter("%g"))
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.margins(y=0.12)
    axis.invert_yaxis()
    axis.set_xlabel("times faster than transformers.generate, head by head (log scale)")
    axis.set_title("z_bias of all heads, same samples (bars: lowest and highest layer)")
    axis.legend(title="prompts × new tokens", loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def time_parts(table: pd.DataFrame, parts: Sequence[str]) -> Figure:
    """Where the time per head goes: stacked bars, in percent of the first fidelity of each work."""
    works = list(table.groupby(["dtype", "work"], sort=False))
    figure, axes = plt.subplots(
        len(works), 1, sharex=True, squeeze=False, figsize=(8.5, 0.35 * len(table) + 0.5 * len(works) + 1)
    )
    shades = sns.color_palette("cividis", len(parts))
    for axis, ((dtype, work), own) in zip(axes[:, 0], works, strict=True):
        left, whole = np.zeros(len(own)), own["per_head"].iloc[0]
        for part, shade, hatch in zip(parts, shades, ("", "//", "", "..", "", "xx"), strict=False):
            width = 100 * own[part].to_numpy() / whole
            axis.barh(
                own["fidelity"], width, left=left, color=shade, hatch=hatch, edgecolor="white", label=part
            )
            left += width
        for y, end in enumerate(left):
            axis.annotate(
                f"{end:.0f} %", (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.invert_yaxis()
        axis.set_title(f"{work}, {dtype}", fontsize=10, loc="left")
        axis.grid(visible=False, axis="y")
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.08, 1))
    axes[-1, 0].set_xlabel("time per head, percent of the loop's")
    return figure


def precision_against_time(table: pd.DataFrame) -> Figure:
    """Standard error of z_bias against seconds; lines join equal time × squared standard error."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    x = np.array([table["seconds"].min() / 3, table["seconds"].max() * 3])
    for i, r in enumerate(table.itertuples()):
        axis.plot(x, r.se * np.sqrt(r.seconds / x), color="lightgrey", lw=1, zorder=0)
        label = r.method if i == 0 else f"{r.method}: ×{r.gain:.0f} ({r.gain_low:.0f} – {r.gain_high:.0f})"
        axis.plot(r.seconds, r.se, MARKERS[i % len(MARKERS)], ms=9, ls="none", label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_formatter(plt.FormatStrFormatter("%g"))
        which.set_minor_formatter(plt.NullFormatter())
    axis.set_xlim(*x)
    axis.set_xlabel("seconds for all heads (log scale)")
    axis.set_ylabel("standard error of z_bias\n(root mean square over heads, log scale)")
    axis.set_title("Lower and further left is better; grey: standard errors that fall with √prompts")
    axis.legend(
        title="times sooner at equal standard error (95 %)", loc="upper left", bbox_to_anchor=(1.01, 1)
    )
    return figure


def smd_by_question(table: pd.DataFrame, groups: Sequence[str]) -> Figure:
    """SMD of every question with 95 % intervals, by how it was measured."""
    questions = list(dict.fromkeys(zip(table["context"], table["variation"], strict=True)))
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(questions) + 1.6))
    ways = list(table["measured"].unique())
    for i, way in enumerate(ways):
        own = table[table["measured"] == way].set_index(["context", "variation"]).loc[questions]
        y = np.arange(len(questions)) + 0.25 * (i - (len(ways) - 1) / 2)
        bars = np.stack([own["smd"] - own["low"], own["high"] - own["smd"]]).clip(0)
        axis.errorbar(own["smd"], y, xerr=bars, fmt=MARKERS[i], capsize=3, ms=6, label=way)
    axis.set_yticks(range(len(questions)), [f"{c}: {v}" for c, v in questions])
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel(f"SMD, {groups[0]} − {groups[1]} (95 % over names)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def gap_against_damage(table: pd.DataFrame, damage: float) -> Figure:
    """SMD removed against perplexity, one line per method, joined by number of parts."""
    figure, axis = plt.subplots(figsize=(8, 5))
    methods = [m for m in table["method"].unique() if m != "unpruned"]
    for i, method in enumerate(methods):
        own = table[table["method"] == method].sort_values("parts")
        bars = np.stack([own["removed"] - own["removed_low"], own["removed_high"] - own["removed"]]).clip(0)
        style = {"fmt": MARKERS[i % len(MARKERS)] + "-", "ms": 6, "lw": 1.2, "elinewidth": 0.6, "capsize": 2}
        axis.errorbar(own["ppl_ratio"], own["removed"], yerr=bars, label=method, **style)
    start = table.loc[table["method"] == "unpruned", "directed"].iloc[0]
    axis.axhline(start, color="black", ls=":", lw=1)
    axis.annotate(
        "the whole gap", (1, start), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
    )
    axis.axhline(0, color="black", lw=0.8)
    axis.axvline(damage, color="grey", ls="--", lw=1)
    far = table[table["ppl_ratio"] > 1.3 * damage]
    if len(far):  # a dead model would press all others against the axis
        shown = table.loc[table["ppl_ratio"] <= 1.3 * damage, "ppl_ratio"]
        axis.set_xlim(shown.min() - 0.02, max(damage, shown.max()) + 0.02)
        beyond = "; ".join(f"{r.method}, {r.share}: × {r.ppl_ratio:.2g}" for r in far.itertuples())
        axis.set_title(f"not shown: {beyond}", fontsize=8)
    axis.set_xlabel(f"perplexity, × unpruned (dashed: the limit of {damage:g})")
    axis.set_ylabel("SMD removed (95 % over names)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def removed_beside_controls(table: pd.DataFrame) -> Figure:
    """SMD removed by each method at equal damage, and what its controls remove."""
    figure, axis = plt.subplots(figsize=(7.5, 0.55 * len(table) + 1.6))
    y = np.arange(len(table))
    bars = np.stack([table["removed"] - table["removed_low"], table["removed_high"] - table["removed"]]).clip(
        0
    )
    axis.errorbar(
        table["removed"], y, xerr=bars, fmt="o", capsize=3, ms=8, color="black", label="method (95 %)"
    )
    for i, control in enumerate(("random", "swapped", "shuffled")):
        if f"against_{control}" in table:
            at = table["removed"] - table[f"against_{control}"]
            axis.plot(
                at, y + 0.14 * (i - 1), MARKERS[i + 1], ms=6, mfc="none", mew=1.5, label=f"control: {control}"
            )
    axis.set_yticks(y, table["method"])
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel("SMD removed, names to judge by")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _control(label: str) -> str:
    return label.split()[0]


def removed_by_level(table: pd.DataFrame, levels: Sequence[str]) -> Figure:
    """SMD removed at every level of generality, one panel per method, controls beside."""
    methods = list(table["method"].unique())
    figure, axes = plt.subplots(
        1, len(methods), sharey=True, squeeze=False, figsize=(3.1 * len(methods) + 1.2, 4.2)
    )
    for axis, method in zip(axes[0], methods, strict=True):
        for i, (control, own) in enumerate(
            table[table["method"] == method].groupby(table["label"].map(_control), sort=False)
        ):
            one = own.groupby("level")[["removed", "removed_low", "removed_high"]].mean()
            at = [levels.index(level) for level in one.index]
            x = np.array(at) + 0.12 * (i - 1)
            if control == "own":
                bars = np.stack([one["removed"] - one["removed_low"], one["removed_high"] - one["removed"]])
                axis.errorbar(
                    x,
                    one["removed"],
                    yerr=bars.clip(0),
                    fmt="o",
                    ms=7,
                    capsize=3,
                    color="black",
                    label="method (95 %)",
                )
            else:
                axis.plot(
                    x, one["removed"], MARKERS[i + 1], ms=6, mfc="none", mew=1.5, label=f"control: {control}"
                )
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(method, fontsize=10)
        axis.set_xticks(range(len(levels)), levels, fontsize=8, rotation=35, ha="right")
        axis.set_xlim(-0.5, len(levels) - 0.5)
    axes[0, 0].set_ylabel("SMD removed (mean over questions)")
    handles = {h.get_label(): h for a in axes[0] for h in a.get_legend_handles_labels()[0]}
    axes[0, -1].legend(
        *zip(*{k: (h, k) for k, h in handles.items()}.values(), strict=True),
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
    )
    figure.tight_layout()
    return figure


def transfer_matrix(table: pd.DataFrame) -> Figure:
    """SMD removed: selected for the row's context, judged in the column's; one panel per method.

    The scale reaches .1 at least: what is smaller is noise, and stays pale.
    """
    own = table[table["label"] == "own"]
    methods, contexts = list(own["method"].unique()), list(own["selected_for"].unique())
    random = table[table["label"].str.startswith("random")]
    limit = max(0.1, own["removed"].abs().max())
    columns = min(2, len(methods))
    lines = -(-len(methods) // columns)
    side = 0.95 * len(contexts) + 1.2
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=(columns * (side + 0.9), lines * side))
    for axis, method in zip(axes.flat, methods, strict=False):
        wide = own[own["method"] == method].pivot(index="selected_for", columns="judged_in", values="removed")
        wide = wide.loc[contexts, contexts]
        sns.heatmap(
            wide, ax=axis, cmap="PuOr", center=0, vmin=-limit, vmax=limit, cbar_kws={"label": "SMD removed"}
        )
        chance = random[random["method"] == method].groupby(["selected_for", "judged_in"])["removed"].mean()
        for r in own[own["method"] == method].itertuples():
            x, y = contexts.index(r.judged_in) + 0.5, contexts.index(r.selected_for) + 0.5
            dark = abs(r.removed) > 0.6 * limit
            weight = "bold" if r.removed_low > 0 else "normal"
            by_chance = chance.get((r.selected_for, r.judged_in), np.nan)
            text = f"{round(r.removed, 2) + 0:.2f}\n({round(by_chance, 2) + 0:.2f})"  # + 0: no "-0.00"
            axis.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=8,
                weight=weight,
                color="white" if dark else "black",
            )
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("judged in")
        axis.set_ylabel("selected for")
    for axis in list(axes.flat)[len(methods) :]:
        axis.axis("off")
    figure.suptitle("In brackets: as many parts at random. Bold: 95 % interval above 0", fontsize=9)
    figure.tight_layout()
    return figure


def _cells(
    axis: plt.Axes, wide: pd.DataFrame, texts: pd.DataFrame, bold: pd.DataFrame, limit: float, label: str
) -> None:
    """A diverging heat map whose cells say what they are, so that it can be read in greyscale."""
    sns.heatmap(
        wide,
        ax=axis,
        cmap="PuOr",
        center=0,
        vmin=-limit,
        vmax=limit,
        cbar_kws={"label": label},
        mask=wide.isna(),
    )
    for (y, row), (x, column) in product(enumerate(wide.index), enumerate(wide.columns)):
        value = wide.loc[row, column]
        dark = np.isfinite(value) and abs(value) > 0.6 * limit
        axis.text(
            x + 0.5,
            y + 0.5,
            texts.loc[row, column],
            ha="center",
            va="center",
            fontsize=8,
            weight="bold" if bold.loc[row, column] else "normal",
            color="white" if dark else "black",
        )
    axis.tick_params(axis="y", rotation=0)
    axis.grid(visible=False)


def correlation_maps(table: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Correlations between axes, one panel per set of heads; columns which, a, b, r, disattenuated, verdict.

    A cell has the disattenuated correlation, n/a where it can't be read, and below it the plain one; bold
    where it is told from 0.
    """
    panels = list(table.groupby("which", sort=False))
    side = 0.95 * len(names) + 1.6
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(len(panels) * (side + 1), side))
    for axis, (which, own) in zip(axes[0], panels, strict=True):
        wide, texts, bold = (
            pd.DataFrame(x, index=names[1:], columns=names[:-1]) for x in (np.nan, "", False)
        )
        for row in own.itertuples():
            a, b = sorted((row.a, row.b), key=list(names).index)
            readable = row.verdict != "unreadable" and np.isfinite(row.disattenuated)
            wide.loc[b, a] = np.clip(row.disattenuated, -1, 1) if readable else np.nan
            texts.loc[b, a] = f"{row.disattenuated:.2f}\n({row.r:.2f})" if readable else f"n/a\n({row.r:.2f})"
            bold.loc[b, a] = row.verdict in ("positive", "negative")
        _cells(axis, wide, texts, bold, 1, "correlation over heads, disattenuated")
        axis.set_title(which, fontsize=10)
    figure.tight_layout()
    return figure


def selected_and_judged(table: pd.DataFrame) -> Figure:
    """Change of bias (%) beyond random pruning: selected for the row's axis, judged on the column's."""
    own = table[table["selected_for"] != "random"]
    order = [list(own[c].unique()) for c in ("selected_for", "judged_on")]
    wide = own.pivot(index="selected_for", columns="judged_on", values="against_random").loc[*order]
    change = own.pivot(index="selected_for", columns="judged_on", values="change").loc[*order]
    own = own.assign(biased=own["p"] < 0.05)  # without bias there is nothing to change
    bold = own.assign(told=own["biased"] & ((own["against_high"] < 0) | (own["against_low"] > 0)))
    bold = bold.pivot(index="selected_for", columns="judged_on", values="told").loc[*order]
    biased = own.pivot(index="selected_for", columns="judged_on", values="biased").loc[*order].astype(bool)
    texts = wide.map("{:+.0f}".format) + change.map("\n({:+.0f})".format)
    wide, texts = wide.where(biased), texts.where(biased, "no bias")
    figure, axis = plt.subplots(figsize=(1.25 * wide.shape[1] + 2.6, 0.8 * wide.shape[0] + 1.6))
    _cells(
        axis,
        wide,
        texts,
        bold,
        max(1, np.abs(wide.fillna(0)).to_numpy().max()),
        "change of bias beyond random, %",
    )
    axis.set_xlabel("judged on")
    axis.set_ylabel("selected for")
    axis.set_title(
        "Bold: 95 % interval without 0. In brackets: against the unpruned model.\n"
        "no bias: that of the unpruned model is within its noise floor (p ≥ .05)",
        fontsize=9,
    )
    return figure


def reliability_of(table: pd.DataFrame) -> Figure:
    """Split-half reliability of head effects with 95 % intervals, one row per axis."""
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(table) + 1.4))
    y = np.arange(len(table))
    bars = np.stack([table["r"] - table["low"], table["high"] - table["r"]]).clip(0)
    axis.errorbar(table["r"], y, xerr=bars, fmt="o", ms=7, capsize=3, color="black")
    axis.set_yticks(y, [f"{r.axis} ({r.prompts} prompts)" for r in table.itertuples()])
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlim(min(-0.1, table["low"].min() - 0.05), 1.02)
    axis.set_xlabel("reliability of z_bias (split half, 95 % over heads)")
    return figure


def reliability_growth(table: pd.DataFrame, wanted: float) -> Figure:
    """Reliability against the number of prompts, one line per way of scoring."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for i, (name, own) in enumerate(table.groupby("scores", sort=False)):
        x = own["prompts"] * 1.04 ** (i - 1)
        bars = np.stack([own["r"] - own["low"], own["high"] - own["r"]]).clip(0)
        axis.errorbar(
            x,
            own["r"],
            yerr=bars,
            fmt=MARKERS[i % len(MARKERS)] + "-",
            ms=6,
            lw=1.2,
            elinewidth=0.7,
            capsize=2,
            label=name,
        )
    axis.axhline(wanted, color="grey", ls="--", lw=1)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xscale("log")
    ticks: list[int] = []
    for n in sorted(table["prompts"].unique()):  # labels closer than a fifth would overlap
        if not ticks or n >= 1.2 * ticks[-1]:
            ticks.append(n)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(plt.FormatStrFormatter("%d"))
    axis.tick_params(axis="x", rotation=45)
    axis.set_ylim(-1.05, 1.05)
    axis.set_xlabel("prompts (log scale)")
    axis.set_ylabel("reliability of z_bias\n(split half, 95 % over heads)")
    axis.set_title(f"Dashed: the reliability that is wanted, {wanted:g}", fontsize=10)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def published_regimes(tables: Mapping[str, pd.DataFrame], axis_name: str) -> Figure:
    """Bias against mean toxicity of the published runs, one point per run without a head."""
    figure, axes = plt.subplots(1, len(tables), squeeze=False, sharey=True, figsize=(2.7 * len(tables), 3.4))
    for axis, (model, table) in zip(axes[0], tables.items(), strict=True):
        own = table[(table["axis"] == axis_name) & (table["split"] == "valid")]
        for i, (seed, part) in enumerate(own.groupby("seed")):
            axis.plot(
                part["toxicity"],
                part["bias"],
                MARKERS[i % len(MARKERS)],
                ms=3,
                alpha=0.5,
                label=f"seed {seed}",
            )
        axis.set_title(model.split("/")[-1], fontsize=10)
        axis.set_xlim(0, max(0.6, own["toxicity"].max() * 1.05))
        axis.set_xlabel("mean toxicity")
    axes[0, 0].set_ylabel("bias without one head")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    return figure


def noise_floors(table: pd.DataFrame) -> Figure:
    """Published bias per axis beside what no difference between the groups would give."""
    models = list(table["model"].unique())
    figure, axes = plt.subplots(
        1, len(models), squeeze=False, sharex=True, sharey=True, figsize=(2.7 * len(models), 3.2)
    )
    for axis, model in zip(axes[0], models, strict=True):
        # every panel has every axis, since all share one scale
        order = list(table["axis"].unique())
        own = table[table["model"] == model].set_index("axis").reindex(order).reset_index()
        y = np.arange(len(own))
        axis.barh(
            y,
            own["floor_95"],
            color="lightgrey",
            edgecolor="grey",
            hatch="//",
            label="no difference: 95 % below",
        )
        axis.plot(own["floor"], y, "|", ms=12, color="black", label="no difference: mean")
        axis.plot(own["bias"], y, "o", color="C3", label="published")
        axis.set_yticks(y, own["axis"])
        axis.set_title(model.split("/")[-1].replace(", ", ",\n"), fontsize=10)
        axis.set_xlabel("bias (log scale)")
        axis.set_xscale("log")
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    return figure


def additive(table: pd.DataFrame) -> Figure:
    """Joint effect of head sets against the sum of their heads' effects, one panel per measure."""
    panels = list(table.groupby("measure", sort=False))
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(4.8 * len(panels), 4.2))
    for axis, (name, own) in zip(axes[0], panels, strict=True):
        for i, (kind, part) in enumerate(own.groupby("kind", sort=False)):
            bars = np.stack([part["excess"] - part["low"], part["high"] - part["excess"]]).clip(0)
            axis.errorbar(
                part["predicted"],
                part["joint"],
                yerr=bars,
                fmt=MARKERS[i],
                ms=6,
                elinewidth=0.7,
                capsize=2,
                label=kind,
            )
            if kind == "growing sets":
                for row in part.itertuples():
                    axis.annotate(
                        str(row.size),
                        (row.predicted, row.joint),
                        (5, -9),
                        textcoords="offset points",
                        fontsize=8,
                    )
        ends = [
            min(own["predicted"].min(), own["joint"].min(), 0),
            max(own["predicted"].max(), own["joint"].max()),
        ]
        axis.plot(ends, ends, color="black", lw=0.8, ls=":")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("sum of the heads' own z_bias")
    axes[0, 0].set_ylabel("z_bias of the set (95 % of the difference)")
    axes[0, -1].legend(title="dotted: additive", loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    return figure


def verdicts(table: pd.DataFrame, order: Sequence[str]) -> Figure:
    """Number of verdicts in the ledger of claims (``ledger.build``): a panel per paper, a bar per run.

    Verdicts stack in the given order. Claims without any run share the last bar. Every panel has a scale of
    its own.
    """
    fills = dict(zip(order, ["#003f72", "#56b4e9", "#d55e00", "lightgrey", "white"], strict=True))
    run = table["parameters"].where(table["parameters"] != "", "no run")
    counts = table.groupby(["paper", run, "verdict"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(order), fill_value=0)
    counts = counts.sort_index(level=1, key=lambda names: names == "no run", sort_remaining=False)
    papers = list(table["paper"].unique())
    heights = [len(counts.loc[p]) for p in papers]
    figure, axes = plt.subplots(
        len(papers),
        1,
        squeeze=False,
        height_ratios=heights,
        figsize=(8, 0.42 * sum(heights) + 0.7 * len(papers)),
    )
    for axis, paper in zip(axes[:, 0], papers, strict=True):
        own = counts.loc[paper]
        left = np.zeros(len(own))
        for verdict in order:
            n = own[verdict].to_numpy()
            bars = axis.barh(own.index, n, left=left, color=fills[verdict], edgecolor="black", label=verdict)
            ink = "white" if verdict == order[0] else "black"
            said = [str(x) if x else "" for x in n]
            axis.bar_label(bars, said, label_type="center", fontsize=8, color=ink)
            left += n
        axis.set_title(paper, fontsize=10, loc="left")
        axis.invert_yaxis()
        axis.set_xlim(0, own.sum(axis=1).max() * 1.02)
        axis.locator_params(axis="x", integer=True)
        axis.grid(visible=False, axis="y")
    axes[-1, 0].set_xlabel("claims × cases, by parameter file of the run")
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    return figure


def one_shot_or_greedy(table: pd.DataFrame) -> Figure:
    """Change of bias (%) and perplexity against the number of heads removed, per way of choosing them."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(6.5, 5.4))
    for i, (method, own) in enumerate(table.groupby("method", sort=False)):
        bars = np.stack([own["change"] - own["change_low"], own["change_high"] - own["change"]]).clip(0)
        x = own["pruned"] + 0.06 * (i - 1)
        top.errorbar(x, own["change"], yerr=bars, fmt=MARKERS[i] + "-", ms=6, capsize=2, label=method)
        bottom.plot(x, own["ppl_ratio"], MARKERS[i] + "-", ms=6)
    top.axhline(0, color="black", lw=0.8)
    top.set_ylabel("change of bias, %\n(95 %, test prompts)")
    bottom.set_ylabel("perplexity, × unpruned")
    bottom.set_xlabel("heads removed")
    bottom.set_xticks(sorted(table["pruned"].unique()))
    top.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def interventions(
    table: pd.DataFrame,
    bias: str = "squared gap between women's and men's true positive rates, mean\nover classes",
) -> Figure:
    """Bias of every setting, with the 95 % interval of its difference to the plain model, and accuracy.

    ``bias`` says what column excess is, but for the sampling variance that is taken off.
    """
    panels = list(table.groupby("data_name", sort=False))
    height = 0.36 * table["setting"].nunique() + 1.5
    figure, axes = plt.subplots(
        len(panels), 2, squeeze=False, sharey="row", figsize=(11, height * len(panels)), width_ratios=(2, 1)
    )
    for (left, right), (name, own) in zip(axes, panels, strict=True):
        y, value = np.arange(len(own)), own["excess"]
        reach = np.stack([own["effect"] - own["low"], own["high"] - own["effect"]])
        left.errorbar(value, y, xerr=reach, fmt="o", ms=6, capsize=3, color="black")
        left.axvline(value.iloc[0], color="black", lw=0.8, ls=":")
        left.axvline(0, color="black", lw=0.8)
        left.set_yticks(y, own["setting"])
        left.set_title(f"{name} (dotted: plain model; bars without it differ from it)", fontsize=10)
        left.set_xlabel(f"{bias}, less sampling variance (95 % of the effect, over seeds)")
        left.locator_params(axis="x", nbins=6)
        right.plot(own["accuracy"], y, "s", color="black", ms=6)
        right.set_xlabel("accuracy")
        right.set_xlim(0, 1)
    axes[0, 0].invert_yaxis()
    for row in axes[1:]:
        row[0].invert_yaxis()
    figure.tight_layout()
    return figure


def bias_against_strength(
    cells: pd.DataFrame, slight: float, bias: str = "squared gap, mean over classes"
) -> Figure | None:
    """Bias (column excess; what it is) against λ, a line per intervention on the model, seeds as thin ones.

    None where no model has two levels of λ.
    """
    own = cells[cells["data"].isin(["none", "co-occurrence"])]
    own = own.groupby("upstream", sort=False).filter(lambda g: g["strength"].nunique() > 1)
    panels = list(own.groupby("data_name", sort=False))
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), squeeze=False, figsize=(5.2 * len(panels), 4.2))
    for axis, (name, part) in zip(axes[0], panels, strict=True):
        for i, (upstream, some) in enumerate(part.groupby("upstream", sort=False)):
            mean = some.groupby("strength")["excess"].mean()
            axis.plot(mean.index, mean, MARKERS[i] + "-", ms=7, label=upstream)
            for _, one in some.sort_values("strength").groupby("seed"):
                axis.plot(one["strength"], one["excess"], color=f"C{i}", lw=0.7, alpha=0.5)
        axis.axhline(0, color="black", lw=0.8)
        axis.axvspan(0, slight, color="grey", alpha=0.15, lw=0)
        axis.set_title(f"{name} (thin: each of {part['seed'].nunique()} seeds)", fontsize=10)
        axis.set_xlabel("λ: 0 as observed, 1 equal shares\n(grey: slight)")
    axes[0, 0].set_ylabel(f"{bias},\nless sampling variance")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    return figure


def ways(table: pd.DataFrame, costs: pd.DataFrame, contexts: Sequence[str], plain: str) -> Figure:
    """Bias left by every way in every context (95 %), and perplexity; controls are hollow.

    Parameters
    ----------
    table
        way, context, bias, low, high.
    costs
        way, ppl_ratio, control (bool), from top to bottom.
    """
    names, y = costs["way"].tolist(), np.arange(len(costs))
    figure, axes = plt.subplots(
        1, len(contexts) + 1, sharey=True, figsize=(2.6 * (len(contexts) + 1) + 1.5, 0.42 * len(y) + 1.8)
    )
    fill = ["white" if c else "black" for c in costs["control"]]
    for axis, context in zip(axes, contexts, strict=False):
        own = table[table["context"] == context].set_index("way").loc[names]
        axis.hlines(y, own["low"], own["high"], color="black", lw=1.4)
        axis.scatter(own["bias"], y, s=45, c=fill, edgecolors="black", zorder=3)
        axis.axvline(0, color="black", lw=0.8)
        axis.axvline(own.loc[plain, "bias"], color="black", lw=0.8, ls=":")
        axis.set_title(context, fontsize=11)
    axes[0].set_yticks(y, names)
    axes[0].invert_yaxis()
    axes[len(contexts) // 2].set_xlabel(
        "bias: slope of the pronouns' log-odds on the share's (0: none; dotted: unchanged model)"
    )
    axes[-1].scatter(costs["ppl_ratio"], y, s=45, marker="s", c=fill, edgecolors="black")
    axes[-1].axvline(1, color="black", lw=0.8, ls=":")
    axes[-1].set_title("perplexity", fontsize=11)
    axes[-1].set_xlabel("× unchanged")
    figure.tight_layout()
    return figure
