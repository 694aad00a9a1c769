"""Scores of every attention head: what its removal does to bias and to perplexity."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from biasprune import check, measure, record, select
from biasprune.ablate import head_masks, masked
from biasprune.decode import Continuations, batch_sizes, log_prob_gradient, log_ratio, sample
from biasprune.judge import Judge
from biasprune.lm import LM, weight_of
from biasprune.progress import bar

FIDELITIES = ("naive", "exact", "importance", "gradient", "adaptive")


def judged_text(prompts: Sequence[str], texts: np.ndarray, rule: str = "corrected") -> np.ndarray:
    """What the judge reads, (…, prompts) → (…, prompts).

    "corrected": the continuation alone, since the prompt's descriptor itself moves most judges.
    "as_published": prompt + continuation, lower-cased, newlines to spaces.
    """
    check.choice(rule, select.RULES, "rule")
    if rule == "corrected":
        return texts
    joined = np.broadcast_to(np.array(prompts, dtype=object), texts.shape) + texts
    flat = [t.lower().replace("\n", " ") for t in joined.reshape(-1)]
    return np.array(flat, dtype=object).reshape(texts.shape)


def judge_continuations(
    prompts: Sequence[str], written: Continuations, judge: Callable, rule: str = "corrected"
) -> np.ndarray:
    """The judge's score of every continuation: (masks, seeds, prompts) float64."""
    texts = judged_text(prompts, written.texts, rule)
    return np.asarray(judge(list(texts.reshape(-1)))).reshape(texts.shape)


@dataclass(frozen=True)
class _Task:
    """What every fidelity works on."""

    lm: LM
    heads: np.ndarray  # flat indices of the heads to score
    prompts: pd.DataFrame  # rows of all axes
    texts: list[str]  # the distinct prompts among them
    judge: Judge
    windows: measure.Windows
    base: Continuations  # of the unpruned model
    base_scores: np.ndarray  # (seeds, texts)
    base_nll: np.ndarray  # (1, windows)
    rule: str
    sampling: dict
    coupled: bool
    batch_rows: int
    batch_tokens: int
    max_weight: float
    n_boot: int

    def part(self, which: np.ndarray) -> _Task:
        """The same task on some of the texts."""
        base = Continuations(tokens=self.base.tokens[:, :, which], texts=self.base.texts[..., which])
        texts = [self.texts[i] for i in which]
        return replace(self, texts=texts, base=base, base_scores=self.base_scores[:, which])

    def replay(self, batch_tokens: int) -> dict:
        """Options of ``log_ratio`` and ``log_prob_gradient``."""
        keep = ("top_k", "temperature", "max_prompt_tokens")
        return {**{k: self.sampling[k] for k in keep}, "batch_tokens": batch_tokens}

    def nll(self, heads: Sequence[int]) -> np.ndarray:
        """Loss per window without each head: (heads, windows)."""
        masks = head_masks(self.lm.anatomy, [[int(h)] for h in heads])
        return measure.nll(self.lm, self.windows, masks, batch_tokens=self.batch_tokens)


# What the fidelities measure, (heads, seeds, texts) unless said otherwise. It holds for every axis:
# what an axis makes of it is ``_estimate``.


def _rewritten(task: _Task, heads: Sequence[int], one_by_one: bool = False) -> dict[str, np.ndarray]:
    """Texts written without each head, judged: "naive" one by one, "exact" all together."""
    judge = task.judge.fresh if one_by_one else task.judge
    draft = None if one_by_one or not task.coupled else task.base.tokens[0]
    options = {**task.sampling, "batch_rows": task.batch_rows, "batch_tokens": task.batch_tokens}
    scores, changed, written_as = [], [], []
    numbers = np.random.default_rng(0).integers(1, 2**62, task.base.tokens.shape[-1])
    for some in np.split(np.array(heads), len(heads) if one_by_one else 1):
        masks = head_masks(task.lm.anatomy, [[int(h)] for h in some])
        streams = [0 if task.coupled else int(h) + 1 for h in some]
        written = sample(task.lm, task.texts, masks=masks, streams=streams, draft=draft, **options)
        scores.append(judge_continuations(task.texts, written, judge, task.rule))
        changed.append((written.tokens != task.base.tokens).any(-1))
        written_as.append((written.tokens * numbers).sum(-1))  # equal for equal texts
    parts = {"scores": scores, "changed": changed, "written": written_as}
    return {name: np.concatenate(x) for name, x in parts.items()}


def _naive(task: _Task, heads: Sequence[int]) -> dict[str, np.ndarray]:
    losses = [task.nll([h]) for h in heads]
    return {**_rewritten(task, heads, one_by_one=True), "nll": np.concatenate(losses)}


def _exact(task: _Task, heads: Sequence[int]) -> dict[str, np.ndarray]:
    return {**_rewritten(task, heads), "nll": task.nll(heads)}


def _log_weights(task: _Task, heads: Sequence[int]) -> np.ndarray:
    """Log-ratio: how much likelier each of the unpruned model's texts is without the head."""
    masks = head_masks(task.lm.anatomy, [[int(h)] for h in heads])
    return log_ratio(task.lm, task.texts, task.base.tokens[0], masks, **task.replay(task.batch_tokens))


def _importance(task: _Task, heads: Sequence[int]) -> dict[str, np.ndarray]:
    return {"log_weight": _log_weights(task, heads), "nll": task.nll(heads)}


def _slopes(task: _Task) -> np.ndarray:
    """The same log-ratios to first order, of all heads, by one forward and one backward pass."""
    options = task.replay(task.batch_tokens // 4)
    gradient = log_prob_gradient(task.lm, task.texts, task.base.tokens[0], **options)
    return -np.moveaxis(gradient.reshape(*gradient.shape[:2], -1), -1, 0)[task.heads]


def _gradient(task: _Task, heads: Sequence[int]) -> dict[str, np.ndarray]:
    loss = np.concatenate(list(_nll_gradients(task.lm, task.windows, task.batch_tokens // 4)))
    return {"slope": _slopes(task), "nll": (task.base_nll - loss.reshape(len(loss), -1).T)[heads]}


def _weight(log_weight: np.ndarray, max_weight: float) -> np.ndarray:
    # The floor matters where no text of a group could have been written without the head: its mean is
    # then the unpruned model's, and ``ess`` says that nothing is known.
    return np.exp(np.clip(log_weight, -20, np.log(max_weight)))


def _ess(log_weight: np.ndarray, max_weight: float) -> np.ndarray:
    """Effective share of the measured samples, (heads, seeds, texts) → (heads,); NaN where none are."""
    weight = np.exp(np.minimum(log_weight, np.log(max_weight)))
    total, squares = np.nansum(weight, (1, 2)), np.nansum(weight**2, (1, 2))
    seen = np.where(np.isnan(weight).all((1, 2)), np.nan, np.isfinite(weight).sum((1, 2)))
    return total**2 / np.maximum(squares, 1e-300) / seen


def _rounds(groups: np.ndarray, first: int) -> list[np.ndarray]:
    """Texts in parts that double: ``first`` of every group, as many again, twice as many, …"""
    rng = np.random.default_rng(0)
    rank = np.empty(len(groups), dtype=int)
    for g in np.unique(groups):
        own = np.flatnonzero(groups == g)
        rank[own] = rng.permutation(len(own))
    edges = [0, first]
    while edges[-1] <= rank.max():
        edges.append(2 * edges[-1])
    return [np.flatnonzero((rank >= a) & (rank < b)) for a, b in pairwise(edges)]


def _adaptive(
    task: _Task,
    stored: Callable[[str, Callable[[], dict]], dict],
    first: int,
    min_ess: float,
    cut: tuple[float, float] | None,
) -> dict[str, np.ndarray]:
    """Slopes for all texts, weights for some of them, new texts for heads whose weights degenerate.

    After each round half of the heads go on to twice as many texts: those with the largest standard
    error or, with ``cut`` = (γ, α), those whose place in FASP's selection is least certain.
    """
    n = len(task.heads)
    shape = (n, *task.base_scores.shape)
    got = {name: np.full(shape, np.nan) for name in ("log_weight", "scores")}
    got["nll"] = stored("perplexity", lambda: {"nll": task.nll(task.heads)})["nll"]
    got["slope"] = stored("slopes", lambda: {"slope": _slopes(task)})["slope"]
    groups = task.prompts.drop_duplicates("prompt")["bucket"].astype(str).to_numpy()
    heads, rewrite, per_file = np.arange(n), np.zeros(n, dtype=bool), 4 * task.lm.anatomy.n_heads
    for number, which in enumerate(_rounds(groups, first)):
        if number:
            frame = _frame(task, task.prompts, got)
            order = frame["z_bias_se"] if cut is None else -_certainty(frame, *cut)
            heads = np.sort(order.loc[heads].nlargest(len(heads) // 2).index)
        if not len(heads):
            break
        part = task.part(which)

        def fill(name: str, some: np.ndarray, make: Callable, number: int = number, which=which) -> None:
            for chunk in np.split(some, range(per_file, len(some), per_file)):
                file = f"round_{number}_{name}_{chunk[0]:05d}-{chunk[-1]:05d}"
                got[name][np.ix_(chunk, range(shape[1]), which)] = stored(file, partial(make, chunk))[name]

        if not rewrite[heads].all():
            fill(
                "log_weight",
                heads[~rewrite[heads]],
                lambda c, t=part: {"log_weight": _log_weights(t, task.heads[c])},
            )
        if number == 0:
            rewrite = ~(_ess(got["log_weight"], task.max_weight) >= min_ess)
        if rewrite[heads].any():
            fill("scores", heads[rewrite[heads]], lambda c, t=part: _rewritten(t, task.heads[c]))
    return got


def _certainty(frame: pd.DataFrame, gamma: float, alpha: float) -> pd.Series:
    """Distance to FASP's cut in standard errors; infinite for heads that γ protects."""
    chosen = select.fasp(frame["bias_without"], frame["ppl_without"], gamma=gamma, alpha=alpha)
    kept = frame["ppl_without"].rank(method="first") <= len(frame) - int(gamma * len(frame))
    inside = frame.loc[chosen, "z_bias"].min()
    outside = frame.loc[kept & ~frame.index.isin(chosen), "z_bias"].max()
    distance = (frame["z_bias"] - (inside + outside) / 2).abs() / frame["z_bias_se"].clip(lower=1e-12)
    return distance.where(kept, np.inf)


def _estimate(
    of: dict[str, np.ndarray], base: np.ndarray, group: np.ndarray, max_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values and sizes (heads, seeds, prompts): a group's mean without a head is Σ values / Σ sizes.

    base (seeds, prompts) are the unpruned model's scores, group (prompts,) their group's number.
    """
    mean = measure.group_means(base.mean(0), group)[group]
    if "slope" not in of and "log_weight" in of:
        weight = _weight(of["log_weight"], max_weight)  # self-normalised
        return weight * base, weight
    if "slope" not in of:
        return of["scores"], np.ones_like(of["scores"])
    # As weights are 1 on average, (weight − 1) · (score − mean) has the same mean as the change of the
    # score; to first order weight − 1 is the slope.
    if "log_weight" not in of:
        return base + of["slope"] * (base - mean), np.ones_like(of["slope"])
    near, true = _weight(of["slope"], max_weight), _weight(of["log_weight"], max_weight)
    over = {"axis": (1, 2), "keepdims": True}
    average = near.mean(**over)
    more = np.where(np.isnan(true).all(**over), 0, true - near)
    change = (true / np.maximum(average + np.nanmean(more, **over), 0.2) - 1) * (base - mean)
    change = np.where(np.isnan(of["scores"]), change, of["scores"] - base)
    cheap = (near / average - 1) * (base - mean)
    values = base.mean(0) + _controlled(change, cheap, group)
    return values, np.ones_like(values)


_PRIOR = 8


def _controlled(change: np.ndarray, cheap: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Change measured on some prompts (NaN elsewhere), with its cheap estimate as control variate.

    Both (heads, seeds, prompts) → the same, without NaN. The coefficient that is used on a prompt was
    fitted on others (two folds), so the group means stay unbiased; where a head has few of them it
    leans on all heads' coefficient, as if that were known from ``_PRIOR`` prompts.
    """
    change, cheap = change.mean(1), cheap.mean(1)
    seen = np.isfinite(change)
    fold = np.empty(seen.shape, dtype=int)
    for g in range(group.max() + 1):  # both folds in every group
        fold[:, group == g] = np.cumsum(seen[:, group == g], 1) % 2
    slope = []
    for f in (0, 1):
        x, y = (np.where(seen & (fold != f), v, 0) for v in (cheap, change))
        xy, xx = (x * y).sum(1), (x**2).sum(1).clip(1e-30)
        lean = _PRIOR / np.maximum((x != 0).sum(1), 1)
        slope.append(((xy + lean * xx * xy.sum() / xx.sum()) / (xx + lean * xx)).clip(0, 1.5))
    own = np.where(fold == 0, slope[0][:, None], slope[1][:, None])
    rest = np.where(seen, change - own * cheap, 0)
    share = np.stack([seen[:, group == g].mean(1) for g in range(group.max() + 1)], 1)[:, group]
    return ((slope[0] + slope[1])[:, None] / 2 * cheap + rest / share)[:, None]


def _arrays(
    task: _Task, prompts: pd.DataFrame, of: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What was measured on one axis' prompts, and values and sizes with the unpruned model as row 0."""
    where = pd.Index(task.texts).get_indexer(prompts["prompt"])
    own = {k: v[..., where] for k, v in of.items() if v.ndim == 3}
    _, group = np.unique(prompts["bucket"].astype(str), return_inverse=True)
    base = task.base_scores[:, where]
    values, sizes = _estimate(own, base, group, task.max_weight)
    base = np.broadcast_to(base.mean(0), (1, *values.shape[1:])) if values.shape[1] == 1 else base[None]
    return own, np.concatenate([base, values]), np.concatenate([np.ones_like(base), sizes])


def _frame(task: _Task, prompts: pd.DataFrame, of: dict[str, np.ndarray]) -> pd.DataFrame:
    """Tidy frame of one axis."""
    own, values, sizes = _arrays(task, prompts, of)
    values, sizes = values.mean(1), sizes.mean(1)  # over seeds
    buckets, weights = _buckets(prompts)
    bias = measure.group_bias(values, buckets, weights, sizes)
    boot = measure.bootstrap_bias(values, buckets, weights, sizes, n_boot=task.n_boot)
    nll = np.concatenate([task.base_nll, of["nll"]])
    ppl = measure.perplexity(nll, task.windows)
    n = nll.shape[1]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=task.n_boot)
    ppl_boot = measure.perplexity(nll, task.windows, draws)
    flat = task.heads
    nothing = np.full(len(flat), np.nan)
    measured = next(own[k] for k in ("log_weight", "scores", "slope") if k in own)
    if "log_weight" in of and "scores" in of:  # adaptive: one or the other
        measured = np.where(np.isnan(own["scores"]), measured, own["scores"])
    ess = np.ones(len(flat)) if "scores" in of else nothing
    if "log_weight" in of:
        ess = _ess(own["log_weight"], task.max_weight)
    return pd.DataFrame(
        {
            "flat": flat,
            "layer": flat // task.lm.anatomy.n_heads,
            "head": flat % task.lm.anatomy.n_heads,
            "bias": bias[0],
            "bias_without": bias[1:],
            "z_bias": bias[0] - bias[1:],
            "z_bias_se": (boot[:, :1] - boot[:, 1:]).std(0, ddof=1),
            "ppl": ppl[0],
            "ppl_without": ppl[1:],
            "z_ppl": ppl[1:] - ppl[0],
            "z_ppl_se": (ppl_boot[:, 1:] - ppl_boot[:, :1]).std(0, ddof=1),
            "score_without": values[1:].sum(-1) / sizes[1:].sum(-1),
            "changed": own["changed"].mean((1, 2)) if "changed" in own else nothing,
            "ess": ess,
            "prompts": (~np.isnan(measured)).all(1).sum(1),
        }
    )


@dataclass(frozen=True)
class HeadSamples:
    """Scores of every prompt without every head: what the frame and its reliability are made of."""

    task: _Task
    axes: dict[str, pd.DataFrame]
    raw: dict[str, np.ndarray]
    fidelity: str
    seconds: dict[str, float]  # of the unpruned model, and of what was measured, by kind

    def frame(self) -> pd.DataFrame:
        """The tidy frame, see ``score``."""
        parts = [
            _frame(self.task, part, self.raw).assign(axis=name, fidelity=self.fidelity)
            for name, part in self.axes.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def arrays(self, axis: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values and sizes (1 + heads, seeds, prompts) of an axis; row 0 is the unpruned model.

        A group's mean score is Σ values / Σ sizes over its prompts. "adaptive" gives one entry for all
        seeds together.
        """
        _, values, sizes = _arrays(self.task, self.axes[axis or next(iter(self.axes))], self.raw)
        return values, sizes

    def rejudged(self, judge: Judge) -> HeadSamples:
        """The same samples read by another judge, without another run of the model.

        Raises
        ------
        ValueError
            If texts were written without heads ("naive", "exact", "adaptive"): they aren't kept.
        """
        if "scores" in self.raw:
            raise ValueError(
                f"fidelity {self.fidelity!r} keeps no texts: score again, or use importance or gradient."
            )
        scores = judge_continuations(self.task.texts, self.task.base, judge, self.task.rule)[0]
        return replace(self, task=replace(self.task, judge=judge, base_scores=scores))


def _buckets(prompts: pd.DataFrame) -> tuple[list[str], np.ndarray | None]:
    return list(prompts["bucket"]), prompts["weight"].to_numpy() if "weight" in prompts else None


def _axes(prompts: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The prompts of every axis, checked before the long work."""
    if "axis" not in prompts:
        prompts = prompts.assign(axis="")
    axes = {str(name): part for name, part in prompts.groupby("axis", sort=False)}
    for part in axes.values():
        measure.group_bias(np.zeros(len(part)), *_buckets(part))
    return axes


def _layers_at_once(lm: LM, texts: list[str], n_seeds: int, batch_rows: int) -> int:
    """Layers per checkpoint: enough to fill a batch, at most four."""
    return int(
        np.clip(batch_rows / (lm.anatomy.n_heads * len(texts) * n_seeds), 1, min(4, lm.anatomy.n_layers))
    )


def samples(
    lm: LM,
    prompts: pd.DataFrame,
    judge: Judge,
    windows: measure.Windows,
    *,
    fidelity: str = "exact",
    heads: Sequence[int] | None = None,
    rule: str = "corrected",
    seeds: Sequence[int] = (0,),
    coupled: bool = True,
    max_new_tokens: int = 40,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = 22,
    memory_gib: float | None = None,
    batch_rows: int | None = None,
    batch_tokens: int | None = None,
    max_weight: float = 20.0,
    first: int = 2,
    min_ess: float = 0.2,
    cut: tuple[float, float] | None = None,
    n_boot: int = 1000,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> HeadSamples:
    """Score every prompt without every head; ``score`` makes the frame of it.

    Parameters
    ----------
    prompts
        Columns prompt and bucket; weight if the axis mean isn't over prompts alike; axis if there are
        several. All axes share one run: a prompt that stands in two is continued once.
    fidelity
        "naive": one generation per head, every text judged; the oracle.
        "exact": heads as rows of one batch, what the unpruned model wrote as a draft, equal texts
        judged once. Sees the same noise as "naive", so in float32 it gives the same tokens.
        "importance": no further generation; the unpruned model's continuations are weighed by how
        likely each would be without the head (self-normalised per group, weights cut at
        ``max_weight``; with top-k sampling, among the unpruned model's k tokens). Look at ``ess``:
        where it is small, the head changes the model too much.
        "gradient": first-order effects of all heads from one forward and one backward pass.
        "adaptive": first-order effects on all prompts, corrected by importance weights on as many as
        are needed (a control variate); where the effective sample is below ``min_ess``, by texts
        written without the head. For many prompts: few heads are measured on all of them.
    heads
        Flat indices of the heads to score; None for all. Heads of a layer share most work.
    rule
        What the judge reads, see ``judged_text``.
    coupled
        False: every head has its own sampling noise, as in the published procedure ("naive" and
        "exact" only).
    memory_gib
        Memory for batches; by default half of what is free. Decides ``batch_rows`` and
        ``batch_tokens`` where they aren't given, see ``decode.batch_sizes``.
    first
        "adaptive": prompts of every group in the first round; doubled for half of the heads each round.
    cut
        "adaptive": FASP's (γ, α). Further rounds then go to the heads near that cut, instead of those
        with the largest standard error.
    checkpoint
        Folder for the raw scores, written every one to four layers. A run that was stopped goes on
        after the last file, with the same result. Runs with other settings don't mix: the
        subfolder's name is a digest of everything that decides the result.

    Raises
    ------
    ValueError
        Unknown fidelity or rule, fewer than two groups, empty or too long prompts; several axes with
        "adaptive", or ``coupled=False`` with a fidelity that needs coupling.
    """
    if fidelity not in FIDELITIES:
        raise ValueError(f"fidelity {fidelity!r}: choose one of {', '.join(FIDELITIES)}.")
    check.choice(rule, select.RULES, "rule")
    check.columns(prompts, ["prompt", "bucket"], "prompts")
    check.count(n_boot, "n_boot", 2)
    if not isinstance(judge, Judge):
        raise ValueError(f"judge is {type(judge).__name__}: make one by judge.load, of a function too.")
    if not coupled and fidelity not in ("naive", "exact"):
        raise ValueError(f"fidelity {fidelity!r} has no independent noise: set coupled=True.")
    if not (first >= 1 and 0 <= min_ess <= 1 and max_weight >= 1):
        raise ValueError(
            f"need first ≥ 1, 0 ≤ min_ess ≤ 1, max_weight ≥ 1; got {first}, {min_ess}, {max_weight}."
        )
    heads = np.arange(lm.anatomy.n_flat) if heads is None else np.unique(np.asarray(heads))
    if not len(heads) or heads.dtype.kind not in "iu" or heads[0] < 0 or heads[-1] >= lm.anatomy.n_flat:
        raise ValueError(f"heads: give at least one flat index in 0 … {lm.anatomy.n_flat - 1}.")
    if cut is not None:
        n, (gamma, alpha) = len(heads), cut
        if not (0 <= gamma < 1 and 1 <= int(alpha * n) < n - int(gamma * n)):
            raise ValueError(f"cut = (γ, α) = {cut} prunes none or all of the heads that it doesn't protect.")
    axes = _axes(prompts)
    if fidelity == "adaptive" and len(axes) > 1:
        raise ValueError(f"fidelity 'adaptive' takes one axis at a time; got {', '.join(axes)}.")
    texts = list(dict.fromkeys(prompts["prompt"]))
    rows, tokens = batch_sizes(lm, (max_prompt_tokens or lm.context) + max_new_tokens, memory_gib)
    given = {"batch_rows": batch_rows, "batch_tokens": batch_tokens}
    batch_rows, batch_tokens = batch_rows or rows, batch_tokens or tokens
    sampling = {
        "seeds": [int(s) for s in seeds],
        "max_new_tokens": max_new_tokens,
        "top_k": top_k,
        "temperature": temperature,
        "max_prompt_tokens": max_prompt_tokens,
    }
    began = time.perf_counter()
    base = sample(lm, texts, batch_rows=batch_rows, **sampling)
    task = _Task(
        lm=lm,
        heads=heads,
        prompts=prompts,
        texts=texts,
        judge=judge,
        windows=windows,
        base=base,
        base_scores=judge_continuations(texts, base, judge, rule)[0],
        base_nll=measure.nll(lm, windows, batch_tokens=batch_tokens),
        rule=rule,
        sampling=sampling,
        coupled=coupled,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
        max_weight=max_weight,
        n_boot=n_boot,
    )
    seconds = {"unpruned": time.perf_counter() - began}
    settings = {
        "model": lm.revision or lm.name,
        "dtype": str(lm.dtype),
        "judge": judge.name,
        "prompts": record.frame_sha256(prompts),
        "windows": hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest(),
        "code": record.code_sha256(),
        **{"fidelity": fidelity, "rule": rule, **given},
        "unpruned": hashlib.sha256(
            base.tokens.tobytes() + task.base_scores.tobytes() + task.base_nll.tobytes()
        ).hexdigest(),
        **{
            "coupled": coupled,
            "heads": heads.tolist(),
            "first": first,
            "min_ess": min_ess,
            "cut": cut,
            "n_boot": n_boot,
        },
        **{"max_weight": max_weight, **sampling},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def stored(name: str, make: Callable[[], dict]) -> dict:
        path = Path(checkpoint) / digest / f"{name}.npz" if checkpoint else None
        start, kind = time.perf_counter(), name.split("_")[0]
        arrays = record.stored_arrays(path, make)
        seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - start
        return arrays

    if fidelity == "adaptive":
        whole = _adaptive(task, stored, first, min_ess, cut)
    else:
        measured_by = {"naive": _naive, "exact": _exact, "importance": _importance, "gradient": _gradient}
        step = lm.anatomy.n_heads * _layers_at_once(lm, texts, len(seeds), batch_rows)
        step = len(heads) if fidelity == "gradient" else step
        chunks = []
        for start in bar(range(0, len(heads), step), desc="heads scored" if progress else None):
            some = heads[start : start + step]
            make = partial(measured_by[fidelity], task, some)
            chunks.append(stored(f"heads_{some[0]:05d}-{some[-1]:05d}", make))
        whole = {key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]}
    return HeadSamples(task, axes, whole, fidelity, seconds)


def score(
    lm: LM, prompts: pd.DataFrame, judge: Judge, windows: measure.Windows, **options: Any
) -> pd.DataFrame:
    """Score every head by removing it: z_bias and z_ppl with standard errors.

    Parameters and errors are those of ``samples``.

    Returns
    -------
    DataFrame
        One row per head and axis: flat, layer, head, axis, fidelity; bias, ppl (unpruned model);
        bias_without, ppl_without; z_bias = bias − bias_without (positive: the head adds bias);
        z_ppl = ppl_without − ppl (positive: the head matters for language modelling); z_bias_se,
        z_ppl_se (bootstrap over prompts within groups, and over windows); score_without (mean
        judge score); changed (share of continuations that differ from the unpruned model's; NaN
        where none were generated); ess (effective share of the sample, by importance weights; 1
        where texts were generated, NaN for gradients); prompts (how many the head was measured on).

    Source
    ------
    Zayed et al., AAAI 2024; the published procedure stores bias_without and ppl_without.
    """
    return samples(lm, prompts, judge, windows, **options).frame()


# --- scores that need no generation: FASP's baselines --------------------------------------------

_QKV = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
)


def _rows_per_head(lm: LM, layer: nn.Module) -> list[Tensor]:
    """The q, k and v parameters of a layer, each as (heads, anything)."""
    a = lm.anatomy
    group = a.n_heads // a.n_kv_heads
    parts: list[Tensor] = []
    for names in _QKV:
        try:
            modules = [layer.get_submodule(n) for n in names]
        except AttributeError:
            continue
        for module, heads in zip(modules, (a.n_heads, a.n_kv_heads, a.n_kv_heads), strict=True):
            for p in (module.weight, module.bias):
                if p is not None:  # heads of a group share their keys and values
                    rows = p.reshape(heads, -1)
                    parts.append(rows.repeat_interleave(a.n_heads // heads, 0) if group > 1 else rows)
        return parts
    try:  # GPT-2: one Conv1D, (in, 3 · heads · head_dim), ordered q, k, v
        fused = layer.get_submodule("attn.c_attn")
        for p in (fused.weight.T, fused.bias):
            parts += list(p.reshape(3, a.n_heads, -1))
        return parts
    except AttributeError:
        pass
    try:  # GPT-NeoX: one Linear, (heads · 3 · head_dim, in), q, k, v of a head together
        fused = layer.get_submodule("attention.query_key_value")
        return [p.reshape(a.n_heads, -1) for p in (fused.weight, fused.bias) if p is not None]
    except AttributeError:
        raise ValueError(
            f"{type(lm.model).__name__}: no query, key and value projections found; looked for "
            f"{_QKV}, attn.c_attn, attention.query_key_value."
        ) from None


def magnitude_l2(lm: LM) -> np.ndarray:
    """L2 norm of each head's q, k, v rows (with bias) and output columns, over the largest: (N,).

    With grouped queries, the shared key and value rows count for every head of the group.

    Source: baseline "magnitude" of Zayed et al., AAAI 2024.
    """
    a = lm.anatomy
    norms = []
    for block, out in zip(a.layers, a.out_projs, strict=True):
        module = lm.model.get_submodule(out)
        columns = weight_of(module).T.reshape(a.n_heads, -1)
        parts = [*_rows_per_head(lm, lm.model.get_submodule(block)), columns]
        norms.append(sum(p.float().square().sum(1) for p in parts).sqrt().cpu())
    flat = torch.cat(norms).double().numpy()
    return flat / flat.max()


def _nll_gradients(
    lm: LM, windows: measure.Windows, batch_tokens: int, desc: str | None = None
) -> Iterator[np.ndarray]:
    """∂ NLL of each window / ∂ mask of every head at mask = 1, in batches (windows, layers, heads)."""
    a = lm.anatomy
    rows = max(1, batch_tokens // windows.ids.shape[1])
    for chosen in bar(torch.arange(len(windows.ids)).split(rows), desc=desc):
        # one mask per row, so that windows keep their own gradients
        masks = torch.ones(len(chosen), a.n_layers, a.n_heads, device=lm.device, requires_grad=True)
        with torch.enable_grad(), masked(lm, masks):
            loss = measure.window_nll(lm, windows, chosen).sum()
            (gradient,) = torch.autograd.grad(loss, masks)
        yield gradient.double().cpu().numpy()


def mask_gradient_l2(
    lm: LM, windows: measure.Windows, *, batch_tokens: int = 1024, progress: bool = True
) -> np.ndarray:
    """Σ over windows of |∂loss/∂mask| at mask = 1, L2-normalised per layer, over the largest: (N,).

    Source: baseline "gradient" of Zayed et al., AAAI 2024, after Michel et al., NeurIPS 2019.
    """
    batches = _nll_gradients(lm, windows, batch_tokens, "mask gradients" if progress else None)
    total = sum(np.abs(g).sum(0) for g in batches)  # (layers, heads)
    total = total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-30)
    flat = total.flatten()
    return flat / flat.max()
