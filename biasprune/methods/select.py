"""Scores in, set of heads out: FASP and its baselines, without torch. Flat numbers of heads: layer · heads + head."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from biasprune.core.data import RULES, choose


def _scores(values: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{what}: give a flat list of finite head scores, one for each head.")
    return array


def _share(value: float, what: str) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{what} = {value} isn't a share between 0 and 1.")
    return float(value)


def _cut(scores: np.ndarray, heads: np.ndarray, k: int, rule: str) -> list[int]:
    """The k heads of lowest score; ``as_published`` adds all that tie with the last one."""
    choose(rule, RULES, "rule")
    chosen = heads[np.argsort(scores[heads], kind="stable")[:k]]  # stable: ties go to the lower flat index
    if rule == "as_published" and k:
        chosen = heads[scores[heads] <= scores[chosen[-1]]]
    return sorted(chosen.tolist())


def fasp(
    bias_without: ArrayLike, ppl_without: ArrayLike, *, gamma: float, alpha: float, rule: str = "corrected"
) -> list[int]:
    """Fairness-Aware Structured Pruning: protect the critical heads, prune the biasing ones; flat indices, sorted.

    Protects the int(γN) heads without which perplexity is highest; among the others prunes the int(αN) without which
    bias is lowest.

    bias_without, ppl_without: (N,) of the model without each head; only their order counts.
    gamma, alpha: Shares of heads protected and pruned.
    rule: "corrected" prunes exactly int(αN) heads, ties broken by flat index. "as_published" rounds perplexities to
        three decimals and cuts by threshold with ≤ in both steps, so that ties prune more.
    ValueError: α > 1 − γ, a share outside [0, 1], or scores that aren't finite or don't match.
    Source: Zayed et al., AAAI 2024; "as_published" after the authors' code (chandar-lab/FASP, commit 84755d3).
    """
    bias, ppl = _scores(bias_without, "bias_without"), _scores(ppl_without, "ppl_without")
    if bias.size != ppl.size:
        raise ValueError(f"{bias.size} bias scores, but {ppl.size} perplexities.")
    if _share(alpha, "alpha") > 1 - _share(gamma, "gamma") + 1e-9:
        raise ValueError(
            f"alpha = {alpha} > 1 − gamma = {1 - gamma:.4g}: more heads to prune than are left after protecting. "
            "Lower alpha or gamma."
        )
    n = bias.size
    ppl = ppl.round(3) if rule == "as_published" else ppl
    candidates = np.array(_cut(ppl, np.arange(n), n - int(n * gamma), rule), dtype=int)
    return _cut(bias, candidates, int(alpha * n), rule)


def lowest(scores: ArrayLike, *, alpha: float, rule: str = "corrected") -> list[int]:
    """The int(αN) lowest-scoring heads, sorted: each of FASP's baselines with its own score (z_ppl, −z_bias, …)."""
    values = _scores(scores, "scores")
    return _cut(values, np.arange(values.size), int(_share(alpha, "alpha") * values.size), rule)


def random(heads: ArrayLike, k: int, *, seed: int) -> list[int]:
    """k of some heads, drawn without replacement, sorted. Draws of one seed are nested: more heads keep the fewer."""
    order = np.random.default_rng(seed).permutation(np.asarray(heads))
    return sorted(order[:k].tolist())
