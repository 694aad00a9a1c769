"""Scores of every attention head: z_bias and z_ppl, and the scores of FASP's baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biasprune.core.masks import Pruning
from biasprune.core.model import LM, query_projections, weight_of
from biasprune.core.stats import Estimate, Readings, mean, redrawn_mean
from biasprune.measures.base import Measure
from biasprune.measures.prose import Prose


def single_heads(lm: LM, layers: Sequence[int] | None = None) -> list[Pruning]:
    """Every head of some layers (None: all) by itself."""
    n = lm.anatomy.n_heads
    layers = range(lm.anatomy.n_layers) if layers is None else layers
    return [Pruning(frozenset([layer * n + h])) for layer in layers for h in range(n)]


def head_scores(lm: LM, bias: Readings, ppl: Readings, *, n_boot: int = 1000) -> pd.DataFrame:
    """What the removal of every head does to bias and to perplexity.

    bias, ppl: Readings of any measure, and of ``measures.prose``, without each head and unpruned: by removal (``read``
        with ``single_heads``), by importance (``Sampled.weighed``), or to first order (``first_order``).
    Returns: flat, layer, head; bias (its size), ppl (unpruned); bias_without, ppl_without; z_bias = bias − bias_without
        (positive: the head adds bias); z_ppl = ppl_without − ppl (positive: it matters for language modelling);
        z_bias_se, z_ppl_se (bootstrap over clusters, and over windows). Source: Zayed et al., AAAI 2024; the published
        procedure stores bias_without and ppl_without.
    """
    names = [name for name in bias.prunings if name]
    flat, table = np.array([int(n) for n in names]), {}
    for what, readings, sign in (("bias", bias[["", *names]], 1), ("ppl", ppl[["", *names]], -1)):
        points, draws = np.abs(readings.bias()), np.abs(readings.draws(n_boot))
        table |= {what: points[0], f"{what}_without": points[1:], f"z_{what}": sign * (points[0] - points[1:])}
        table |= {f"z_{what}_se": (draws[:, :1] - draws[:, 1:]).std(0, ddof=1)}
    where = {"flat": flat, "layer": flat // lm.anatomy.n_heads, "head": flat % lm.anatomy.n_heads}
    return pd.DataFrame({**where, **table})


def compare(
    chosen: pd.DataFrame,
    frame: pd.DataFrame,
    measures: Mapping[str, Measure],
    by: Sequence[str] = ("method", "gamma", "alpha"),
    *,
    n_boot: int = 1000,
) -> tuple[pd.DataFrame, dict[tuple, Estimate]]:
    """Bias, its change, and the model's health for every method and share of heads pruned, with 95 % intervals.

    chosen: The columns ``by``, draw, and pruning (text). Rows that share ``by`` and draw are averaged; draws are a
        sample of random selections, drawn anew in every bootstrap draw.
    frame, measures: Of ``judge.read``: "bias", "perplexity" and others, of these prunings and the unpruned model.
    Returns: table: the columns ``by``; pruned (heads); every measure with _low and _high; change (of the size of the
        bias, in % of the unpruned model's); ppl_ratio (to the unpruned model); floor (mean size of the bias under the
        permutation null); of texts score (mean of the judge), distinct and empty (shares). changes: ``by`` → the
        change's Estimate.
    """
    readings = {name: m.readings(frame[frame["judged_by"] == name]) for name, m in measures.items()}
    estimates = {name: r.estimates(n_boot) for name, r in readings.items()}
    floor = np.abs(readings["bias"].null(200, cluster="cluster")).mean(0)
    health = pd.DataFrame({"floor": floor}, index=readings["bias"].prunings)
    if "text" in frame:
        texts = frame[frame["judged_by"] == "bias"].groupby("pruning", sort=False)
        health = health.join(texts.agg(score=("value", "mean"), distinct=("text", lambda t: t.nunique() / len(t))))
        health["empty"] = texts["text"].agg(lambda t: (t.str.strip() == "").mean())
    estimates["size"] = {p: e.map(np.abs) for p, e in estimates["bias"].items()}
    # of the logarithm, lest the mean of a few random draws reach below 0
    estimates["perplexity"] = {p: e.map(np.log) for p, e in estimates["perplexity"].items()}
    rows, changes = [], {}
    for key, part in chosen.groupby(list(by), sort=False):
        draws = [of_draw for _, of_draw in part.groupby("draw")["pruning"]]
        of = {name: redrawn_mean([mean(e[p] for p in d) for d in draws]) for name, e in estimates.items()}
        # in % of the measured bias: divided by a bias drawn anew, a clear change of a small bias would look unclear
        changes[key] = (of.pop("size") - estimates["size"][""]) * (100 / estimates["size"][""].point)
        row = dict(zip(by, key, strict=True)) | {"pruned": part["pruning"].str.split().str.len().mean()}
        row |= changes[key].row("change")
        log_ppl = of.pop("perplexity")
        cost = log_ppl.row("ppl") | (log_ppl - estimates["perplexity"][""]).row("ppl_ratio")
        row |= {k: np.exp(v) for k, v in cost.items()}
        for name, one in of.items():
            row |= one.row(name)
        rows.append(row | dict(health.loc[part["pruning"]].mean()))
    table = pd.DataFrame(rows)  # a basic interval can reach beyond what there is
    return table.assign(change_low=table["change_low"].clip(-100)), changes


# ---- scores that need no generation: FASP's baselines ------------------------------------------------


def _rows_per_head(lm: LM, query: str) -> list[Tensor]:
    """The q, k and v parameters of a layer, each as (heads, anything)."""
    a, fused, parts = lm.anatomy, list(lm.model.get_submodule(query).parameters()), []
    if query.endswith("c_attn"):  # GPT-2: q, k, v
        return [rows for p in fused for rows in p.t().reshape(3, a.n_heads, -1)]
    if query.endswith("query_key_value"):  # GPT-NeoX: heads · (q, k, v)
        return [p.reshape(a.n_heads, -1) for p in fused]
    for letter, heads in (("q", a.n_heads), ("k", a.n_kv_heads), ("v", a.n_kv_heads)):
        for p in lm.model.get_submodule(query.removesuffix("q_proj") + f"{letter}_proj").parameters():
            # heads of a group share their keys and values
            parts.append(p.reshape(heads, -1).repeat_interleave(a.n_heads // heads, 0))
    return parts


@torch.no_grad()
def magnitude(lm: LM) -> np.ndarray:
    """L2 norm of each head's q, k, v rows (with bias) and output columns, over the largest: (N,).

    Source: baseline "magnitude" of Zayed et al., AAAI 2024.
    """
    a, norms = lm.anatomy, []
    for query, out in zip(query_projections(lm), a.out_projs, strict=True):
        columns = weight_of(lm.model.get_submodule(out)).T.reshape(a.n_heads, -1)
        parts = [*_rows_per_head(lm, query), columns]
        norms.append(sum(p.float().square().sum(1) for p in parts).sqrt().cpu())
    flat = torch.cat(norms).double().numpy()
    return flat / flat.max()


def mask_gradient(lm: LM, prose: Prose) -> np.ndarray:
    """Σ over windows of |∂loss/∂mask| at mask = 1, L2-normalised per layer, over the largest: (N,).

    On windows "as_published" every window adds to the gradient of those before, which the authors' code never resets.

    Source: baseline "gradient" of Zayed et al., AAAI 2024, after Michel et al., NeurIPS 2019.
    """
    slopes = prose.slopes(lm)
    slopes = slopes.cumsum(0) if prose.cut.rule == "as_published" else slopes
    total = np.abs(slopes).sum(0)  # (layers, heads)
    flat = (total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-30)).ravel()
    return flat / flat.max()
