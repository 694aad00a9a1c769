"""Group bias with intervals and noise floor, and perplexity by published and corrected windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from biasprune import check
from biasprune.ablate import Start, in_halves, passes
from biasprune.lm import LM
from biasprune.progress import bar


def _labels(buckets: Sequence) -> np.ndarray:
    """Labels that sort as what they are: numbers as numbers (10 after 2), all else as text."""
    labels = np.asarray(buckets)
    return labels if labels.dtype.kind in "iu" else labels.astype(str)


def _groups(buckets: Sequence[str], weights: ArrayLike | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Group index of each prompt (n,) and share of each group (groups,)."""
    if len(buckets) != n:
        raise ValueError(f"{n} scores for {len(buckets)} prompts.")
    if n == 0:
        raise ValueError("no prompts: there is nothing to compare.")
    if pd.isna(np.asarray(buckets, dtype=object)).any():
        raise ValueError("some prompts have no group: leave them out, or name their group.")
    names, index = np.unique(_labels(buckets), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"only one group ({', '.join(map(str, names))}): bias needs two or more to compare.")
    weights = np.full(n, 1 / n) if weights is None else check.numbers(weights, "weights")
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights <= 0).any():
        raise ValueError("weights must be one positive number per prompt.")
    for g, name in enumerate(names):
        if np.ptp(weights[index == g]) > 1e-9 * weights.max():
            raise ValueError(f"the prompts of group {name} have different weights; give them one.")
    share = np.bincount(index, weights=weights)
    return index, share / share.sum()


def _gap(means: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Sum over groups of |axis mean − group mean|; means (groups, …) → (…)."""
    overall = np.tensordot(share, means, axes=1)
    return np.abs(means - overall).sum(0)


def gap(means: np.ndarray, buckets: Sequence[str], weights: ArrayLike | None = None) -> np.ndarray:
    """Bias from group means (groups, …), in sorted order of names: (…). See ``group_bias``."""
    _, share = _groups(buckets, weights, len(buckets))
    return _gap(means, share)


def group_means(scores: ArrayLike, buckets: Sequence[str], sizes: ArrayLike | None = None) -> np.ndarray:
    """Mean score of every group, in sorted order of names: (…, prompts) → (groups, …).

    With ``sizes`` (…, prompts), the ratio Σ scores / Σ sizes: self-normalised importance weights
    come as scores = Σ weight · score and sizes = Σ weight of a prompt's samples.
    """
    scores = check.numbers(scores, "scores")
    if not scores.ndim or not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity, or no prompts: the judge failed on some text.")
    index, _ = _groups(buckets, None, scores.shape[-1])
    sizes = np.ones_like(scores) if sizes is None else check.numbers(sizes, "sizes")
    own = [index == g for g in range(index.max() + 1)]
    if sizes.shape != scores.shape or not all((sizes[..., g].sum(-1) > 0).all() for g in own):
        raise ValueError(f"sizes: give {scores.shape}, as scores, with a sum above 0 in every group.")
    return np.stack([scores[..., g].sum(-1) / sizes[..., g].sum(-1) for g in own])


def group_bias(
    scores: ArrayLike,
    buckets: Sequence[str],
    weights: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
) -> np.ndarray:
    """Bias on one axis: Σ over groups of |mean over all prompts − mean over the group's prompts|.

    Parameters
    ----------
    scores
        (…, prompts) toxicity or any other score of the continuations.
    buckets
        Group of each prompt.
    weights
        Weight of each prompt in the axis mean, the same for all prompts of a group; None weighs
        prompts equally, as published.
    sizes
        (…, prompts), see ``group_means``.

    Raises
    ------
    ValueError
        Fewer than two groups, NaN scores, or lengths that differ.

    Source
    ------
    Zayed et al., AAAI 2024, equation for bias; spec of the published code: a sum, not a mean.
    """
    return gap(group_means(scores, buckets, sizes), buckets, weights)


def bootstrap_bias(
    scores: ArrayLike,
    buckets: Sequence[str],
    weights: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Bias in bootstrap samples of prompts, drawn within groups: (…, prompts) → (n_boot, …).

    All leading entries (models, heads, pruning levels) see the same draws, so differences between
    them are paired.
    """
    check.count(n_boot, "n_boot")
    group_means(scores, buckets, sizes)  # validates
    scores = np.asarray(scores, dtype=float)
    index, share = _groups(buckets, weights, scores.shape[-1])
    rng = np.random.default_rng(seed)
    means = []
    for g in range(len(share)):
        n = int((index == g).sum())
        counts = rng.multinomial(n, np.full(n, 1 / n), size=n_boot).T
        drawn = scores[..., index == g] @ counts
        total = n if sizes is None else np.asarray(sizes)[..., index == g] @ counts
        means.append(np.moveaxis(drawn / total, -1, 0))
    return _gap(np.stack(means), share)


def noise_floor(
    scores: ArrayLike,
    buckets: Sequence[str],
    weights: ArrayLike | None = None,
    *,
    n_perm: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Bias when the group labels are shuffled: what no difference at all would give.

    (prompts,) → (n_perm,). A measured bias inside this range is no evidence of bias.
    """
    check.count(n_perm, "n_perm")
    scores = check.numbers(scores, "scores")
    if scores.ndim != 1:
        raise ValueError(f"noise_floor takes the scores of one model, (prompts,); got {scores.shape}.")
    group_means(scores, buckets)  # validates
    index, share = _groups(buckets, weights, scores.shape[-1])
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.broadcast_to(scores, (n_perm, scores.size)), axis=1)
    means = np.stack([shuffled[:, index == g].mean(-1) for g in range(len(share))])
    return _gap(means, share)


def detect_bias(
    scores: ArrayLike, buckets: Sequence[str], weights: ArrayLike | None = None
) -> dict[str, float]:
    """Is there bias at all? Measured bias of one model against its noise floor.

    (prompts,) → n, bias, floor (mean), floor_95 (95th percentile), excess (bias − floor), p (share of
    shuffled labellings with as much bias).
    """
    bias = float(group_bias(scores, buckets, weights))
    floor = noise_floor(scores, buckets, weights)
    return {
        "n": len(buckets),
        "bias": bias,
        "floor": float(floor.mean()),
        "floor_95": float(np.quantile(floor, 0.95)),
        "excess": bias - float(floor.mean()),
        "p": float((1 + (floor >= bias).sum()) / (1 + len(floor))),
    }


def interval(point: ArrayLike, replicates: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Basic bootstrap interval (low, high) of an estimate: 2·point − quantiles of the replicates.

    The basic form is used because bias is a sum of absolute values: noise inflates it, and inflates
    it once more in the bootstrap; percentile intervals would count that twice. It still covers less
    than its level: the simulation in tests/test_measure.py (8 groups × 16 prompts, nominal 95 %)
    asserts at least 87 % if nothing changed, 85 % if half of the bias went, and only 65 % if all of
    it went.
    """
    tail = (1 - check.share(level, "level")) / 2
    if not len(replicates):
        raise ValueError("no replicates: an interval needs draws.")
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    return 2 * np.asarray(point) - high, 2 * np.asarray(point) - low


def jackknife_reach(left: ArrayLike, level: float = 0.95) -> np.ndarray:
    """Half the width of an interval, from estimates that leave out one block each: (blocks, …) → (…).

    Student's t; NaN where an estimate is.

    Source: Tukey 1958.
    """
    left = check.numbers(left, "estimates")
    n = len(left)
    if n < 2:
        raise ValueError("an interval by jackknife needs two blocks or more.")
    error = np.sqrt((n - 1) ** 2 / n * np.var(left, axis=0, ddof=1))
    return stats.t.ppf(1 - (1 - check.share(level, "level")) / 2, n - 1) * error


# --- perplexity ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A text cut into windows for perplexity.

    Attributes
    ----------
    ids
        (windows, length) token ids, the last window padded on the right.
    first, last
        (windows,) the targets of a window are its tokens first … last − 1.
    rule
        "corrected" or "as_published".
    """

    ids: Tensor
    first: np.ndarray
    last: np.ndarray
    rule: str

    @property
    def counts(self) -> np.ndarray:
        """Number of predicted tokens per window."""
        return self.last - self.first

    @property
    def counted(self) -> Tensor:
        """Which tokens are targets: bool (windows, length)."""
        position = torch.arange(self.ids.shape[1])
        first, last = (torch.from_numpy(x)[:, None] for x in (self.first, self.last))
        return (position >= first) & (position < last)


def windows(
    lm: LM,
    text: str,
    *,
    rule: str = "corrected",
    length: int | None = None,
    max_tokens: int | None = None,
) -> Windows:
    """Cut a text into windows.

    Parameters
    ----------
    rule
        "corrected": windows meet in one token, so that every token but the first is predicted
        exactly once; where the tokenizer starts texts with a token of its own (Gemma, Llama), every
        window starts with it. "as_published": stride 512 whatever the length, so that a model with a
        1024-token context (length 256) skips every other 256-token block.
    length
        Tokens per window; None takes a quarter of the context, as published.
    max_tokens
        Use only the first tokens of the text; None uses all.

    Raises
    ------
    ValueError
        Unknown rule, a length over the context, or a text of fewer than two tokens.
    """
    if rule not in ("corrected", "as_published"):
        raise ValueError(f"rule {rule!r}: choose corrected or as_published.")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text for perplexity is empty or no text: {text!r}.")
    length = lm.context // 4 if length is None else check.count(length, "length", 0)
    if not 2 <= length <= lm.context:
        raise ValueError(f"windows of {length} tokens: choose 2 … {lm.context}, the model's context.")
    if max_tokens is not None and check.count(max_tokens, "max_tokens", 0) < 2:
        raise ValueError(f"max_tokens = {max_tokens}: fewer than two tokens; None takes the whole text.")
    ids = lm.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][:max_tokens]
    n = len(ids)
    if n < 2:
        raise ValueError("the text for perplexity has fewer than two tokens.")
    starts_with_bos = int(ids[0]) == lm.tokenizer.bos_token_id
    if rule == "corrected" and starts_with_bos:
        # a model that was trained with a first token reads badly without it, in every window
        rows = [torch.cat([ids[:1], part]) for part in ids[1:].split(length - 1)]
        first = [1] * len(rows)
    elif rule == "corrected":
        begins = range(0, n - 1, length - 1)
        rows, first = [ids[b : b + length] for b in begins], [1] * len(begins)
    else:
        rows, first, seen = [], [], 0
        for begin in range(0, n, 512):
            end = min(begin + length, n)
            if end > max(seen, begin + 1):
                rows.append(ids[begin:end])
                first.append(max(seen - begin, 1))
            seen = end
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Windows(ids=padded, first=np.array(first), last=np.array([len(r) for r in rows]), rule=rule)


def window_nll(lm: LM, windows: Windows, rows: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats per token) of some windows: (rows,) → (rows,).

    Keeps gradients if the caller has them on; masks are the caller's.
    """
    counted = windows.counted[rows]
    return mean_nll(lm, windows.ids[rows].to(lm.device), counted.to(lm.device))


def mean_nll(lm: LM, ids: Tensor, counted: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) of the counted tokens of every row: (rows, tokens) → (rows,).

    A row's first token is never predicted. Keeps gradients if the caller has them on.
    """
    wanted = counted[:, 1:]
    logits = lm.model(ids, use_cache=False).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    # row by row: a float32 copy of all logits at once would double the peak memory
    loss = torch.stack(
        [
            F.cross_entropy(row[:-1].to(wide), target[1:], reduction="none")
            for row, target in zip(logits, ids, strict=True)
        ]
    )
    return (loss * wanted).sum(1) / wanted.sum(1)


@torch.inference_mode()
def nll(
    lm: LM,
    windows: Windows,
    masks: Tensor | None = None,
    *,
    batch_tokens: int = 2048,
    progress: str | None = None,
) -> np.ndarray:
    """Mean negative log-likelihood (nats per token) of every window under every mask.

    Several masks share one clean pass; each then starts at its first masked layer.

    Parameters
    ----------
    masks
        (masks, layers, heads); None for the unmodified model.
    batch_tokens
        Tokens per batch; bounds the memory for logits (batch_tokens × vocabulary) and for the clean
        pass (batch_tokens × layers × width).

    Returns
    -------
    ndarray
        (masks, windows) float64.
    """
    a = lm.anatomy
    masks = torch.ones(1, a.n_layers, a.n_heads) if masks is None else masks
    n_windows, length = windows.ids.shape
    rows = max(1, batch_tokens // length)
    out = np.empty((len(masks), n_windows))
    shown = bar(total=out.size, desc=progress, unit="window")

    def run(start: Start, w: Tensor, m: Tensor, j: Tensor) -> None:
        with start(masks[m], j):
            loss = window_nll(lm, windows, w[j])
        out[m.numpy(), w[j].numpy()] = loss.double().cpu().numpy()

    for w in torch.arange(n_windows).split(rows):
        for m, j, start in passes(lm, masks, windows.ids[w].to(lm.device), rows):
            in_halves(partial(run, start, w), m, j)
            shown.update(len(m))
    shown.close()
    return out


def perplexity(nll: np.ndarray, windows: Windows, counts: np.ndarray | None = None) -> np.ndarray:
    """exp of the mean NLL over windows: (…, windows) → (…).

    Weighted by the number of tokens (corrected) or not (as published). ``counts`` (n_boot, windows)
    says how often each window is drawn, for bootstrap: (masks, windows) → (n_boot, masks).
    """
    if nll.shape[-1:] != (len(windows.counts),) or np.isnan(nll).any():
        raise ValueError(
            f"losses {nll.shape} for {len(windows.counts)} windows: one for each, none of them NaN."
        )
    weight = windows.counts if windows.rule == "corrected" else np.ones(len(windows.counts))
    if counts is None:
        return np.exp(nll @ (weight / weight.sum()))
    drawn = counts * weight
    return np.exp((drawn / drawn.sum(1, keepdims=True)) @ nll.T)
