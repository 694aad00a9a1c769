"""Scores in, set of heads out: FASP and its baselines. Plain arrays, no model.

Heads are numbered flat: layer · heads + head. N is their number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from biasprune import check

RULES = ("corrected", "as_published")


def _scores(values: ArrayLike, what: str) -> np.ndarray:
    array = check.numbers(values, what)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{what}: expected a flat, non-empty list of head scores, got {array.shape}.")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array))
        raise ValueError(
            f"{what}: {bad.size} of {array.size} scores are NaN or infinite (first: head {bad[0]}). "
            "Score those heads again or leave the run out."
        )
    return array


def _rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}: choose one of {', '.join(RULES)}.")


def _cut(scores: np.ndarray, heads: np.ndarray, k: int, rule: str) -> list[int]:
    """The k heads of lowest score; ``as_published`` adds all that tie with the last one."""
    if k == 0:
        return []
    if rule == "as_published":
        threshold = np.sort(scores[heads])[k - 1]
        return sorted(int(h) for h in heads[scores[heads] <= threshold])
    order = np.argsort(scores[heads], kind="stable")  # stable: ties go to the lower flat index
    return sorted(int(h) for h in heads[order[:k]])


def fasp(
    bias_without: ArrayLike,
    ppl_without: ArrayLike,
    *,
    gamma: float,
    alpha: float,
    rule: str = "corrected",
) -> list[int]:
    """Fairness-Aware Structured Pruning: protect the critical heads, prune the biasing ones.

    Protects the int(γN) heads without which perplexity is highest; among the others prunes the
    int(αN) without which bias is lowest.

    Parameters
    ----------
    bias_without, ppl_without
        (N,) bias and perplexity of the model without each head. Any decreasing function of
        z_bias and increasing function of z_ppl does: only the order counts.
    gamma, alpha
        Shares of heads protected and pruned.
    rule
        "corrected" prunes exactly int(αN) heads, ties broken by flat index. "as_published" cuts by
        threshold with ≤ in both steps, so that ties prune more (perplexities were rounded to three
        decimals).

    Returns
    -------
    list[int]
        Flat indices, sorted.

    Raises
    ------
    ValueError
        α > 1 − γ, a share outside [0, 1], empty, unequally long or non-finite scores.

    Source
    ------
    Zayed et al., AAAI 2024, section "Fairness-aware structured pruning"; the rule "as_published"
    after the authors' code (chandar-lab/FASP, commit 84755d3).
    """
    _rule(rule)
    bias, ppl = _scores(bias_without, "bias_without"), _scores(ppl_without, "ppl_without")
    if bias.size != ppl.size:
        raise ValueError(f"{bias.size} bias scores, but {ppl.size} perplexities.")
    gamma, alpha = check.share(gamma, "gamma"), check.share(alpha, "alpha")
    if alpha > 1 - gamma + 1e-9:
        raise ValueError(
            f"alpha = {alpha} > 1 − gamma = {1 - gamma:.4g}: more heads to prune than are left "
            "after protecting. Lower alpha or gamma."
        )
    n, k = bias.size, int(alpha * bias.size)
    candidates = np.array(_cut(ppl, np.arange(n), n - int(n * gamma), rule), dtype=int)
    return _cut(bias, candidates, k, rule)


def lowest(scores: ArrayLike, *, alpha: float, rule: str = "corrected") -> list[int]:
    """The int(αN) lowest-scoring heads of the whole model, sorted by flat index.

    Every score-based baseline of FASP is this with its own score: magnitude, mask gradient, z_ppl
    (performance alone), −z_bias (fairness alone).

    Raises
    ------
    ValueError
        A share outside [0, 1], empty or non-finite scores, unknown rule.
    """
    _rule(rule)
    values = _scores(scores, "scores")
    k = int(check.share(alpha, "alpha") * values.size)
    return _cut(values, np.arange(values.size), k, rule)


def random(n: int, *, alpha: float, seed: int) -> list[int]:
    """int(αn) heads drawn uniformly without replacement, sorted.

    The draws of one seed are nested: a larger α keeps the heads of a smaller one, as score-based
    methods do.

    Raises
    ------
    ValueError
        A share outside [0, 1], or numbers of heads or seeds that aren't whole numbers from 0 on.
    """
    k = int(check.share(alpha, "alpha") * check.count(n, "n", 0))
    check.count(seed, "seed", 0)
    return sorted(int(h) for h in np.random.default_rng(seed).permutation(n)[:k])
