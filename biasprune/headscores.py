"""Scores of every attention head: what its removal does to bias and to perplexity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from biasprune import measure, record
from biasprune.ablate import head_masks, masked
from biasprune.decode import Continuations, encode, log_prob, log_prob_gradient, sample
from biasprune.judge import Judge
from biasprune.lm import LM
from biasprune.progress import bar

FIDELITIES = ("naive", "exact", "importance", "gradient")


def judged_text(prompts: Sequence[str], texts: np.ndarray, rule: str = "corrected") -> np.ndarray:
    """What the judge reads, (…, prompts) → (…, prompts).

    "corrected": the continuation alone, since the prompt's descriptor itself moves most judges.
    "as_published": prompt + continuation, lower-cased, newlines to spaces.
    """
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
    prompts: pd.DataFrame
    judge: Judge
    windows: measure.Windows
    base: Continuations  # of the unpruned model
    base_scores: np.ndarray  # (seeds, prompts)
    rule: str
    sampling: dict
    batch_rows: int
    batch_tokens: int
    max_weight: float

    @property
    def texts(self) -> list[str]:
        return list(self.prompts["prompt"])

    def replay(self, batch_tokens: int) -> dict:
        """Options of ``log_prob`` and ``log_prob_gradient``."""
        keep = ("top_k", "temperature", "max_prompt_tokens")
        return {**{k: self.sampling[k] for k in keep}, "batch_tokens": batch_tokens}


# Each fidelity gives, for some heads: values and sizes (heads, seeds, prompts), whose ratio of sums
# is a group's mean score without the head; nll (heads, windows); changed and ess (heads,).


def _by_sampling(task: _Task, heads: Sequence[int], one_by_one: bool) -> dict[str, np.ndarray]:
    """Generate without each head, judge, and measure perplexity: "naive" and "exact"."""
    masks = head_masks(task.lm.anatomy, [[h] for h in heads])
    groups = masks.split(1 if one_by_one else len(masks))
    judge = task.judge.fresh if one_by_one else task.judge
    values, losses, changed = [], [], []
    for group in groups:
        written = sample(task.lm, task.texts, masks=group, batch_rows=task.batch_rows, **task.sampling)
        values.append(judge_continuations(task.texts, written, judge, task.rule))
        losses.append(measure.nll(task.lm, task.windows, group, batch_tokens=task.batch_tokens))
        changed.append((written.tokens != task.base.tokens).any(-1).mean((1, 2)))
    scores = np.concatenate(values)
    return {
        "values": scores,
        "sizes": np.ones_like(scores),
        "nll": np.concatenate(losses),
        "changed": np.concatenate(changed),
        "ess": np.ones(len(heads)),
    }


def _by_importance(task: _Task, heads: Sequence[int]) -> dict[str, np.ndarray]:
    """Weigh the unpruned model's continuations by how likely each is without the head."""
    a = task.lm.anatomy
    masks = head_masks(a, [[], *([h] for h in heads)])
    own, *without = log_prob(
        task.lm, task.texts, task.base.tokens[0], masks, **task.replay(task.batch_tokens)
    )
    weight = np.exp(np.minimum(np.stack(without) - own, np.log(task.max_weight)))
    total = weight.sum((1, 2))
    return {
        "values": weight * task.base_scores,
        "sizes": weight,
        "nll": measure.nll(task.lm, task.windows, masks[1:], batch_tokens=task.batch_tokens),
        "changed": np.full(len(heads), np.nan),
        "ess": total**2 / (weight**2).sum((1, 2)) / weight[0].size,
    }


def _by_gradient(task: _Task) -> dict[str, np.ndarray]:
    """First-order effects of all heads: one forward and backward pass over texts, one over windows.

    The change of a mean score when a mask goes from 1 to 0 is −E[(score − mean) · ∂log p / ∂mask].
    """
    a = task.lm.anatomy
    gradient = log_prob_gradient(
        task.lm, task.texts, task.base.tokens[0], **task.replay(task.batch_tokens // 4)
    )
    per_head = np.moveaxis(gradient.reshape(*gradient.shape[:2], a.n_flat), -1, 0)  # (N, seeds, prompts)
    _, group = np.unique(task.prompts["bucket"].astype(str), return_inverse=True)
    means = measure.group_means(task.base_scores.mean(0), task.prompts["bucket"])
    values = task.base_scores - (task.base_scores - means[group]) * per_head
    own = measure.nll(task.lm, task.windows, batch_tokens=task.batch_tokens)
    slope = np.concatenate(list(_nll_gradients(task.lm, task.windows, task.batch_tokens // 4)))
    return {
        "values": values,
        "sizes": np.ones_like(values),
        "nll": own - slope.reshape(len(slope), -1).T,
        "changed": np.full(a.n_flat, np.nan),
        "ess": np.full(a.n_flat, np.nan),
    }


def _layers_at_once(lm: LM, prompts: pd.DataFrame, n_seeds: int, batch_rows: int) -> int:
    """Layers per checkpoint: enough that prompts of equal length fill a batch, at most four."""
    lengths = len({len(x) for x in encode(lm, list(prompts["prompt"]))})
    rows_per_layer = lm.anatomy.n_heads * len(prompts) * n_seeds / lengths
    return int(np.clip(batch_rows / rows_per_layer, 1, min(4, lm.anatomy.n_layers)))


def score(
    lm: LM,
    prompts: pd.DataFrame,
    judge: Judge,
    windows: measure.Windows,
    *,
    fidelity: str = "exact",
    rule: str = "corrected",
    seeds: Sequence[int] = (0,),
    max_new_tokens: int = 40,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = 22,
    batch_rows: int = 256,
    batch_tokens: int = 4096,
    max_weight: float = 20.0,
    n_boot: int = 1000,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score every head by removing it: z_bias and z_ppl with standard errors.

    Parameters
    ----------
    prompts
        One axis: columns prompt and bucket; weight if the axis mean isn't over prompts alike.
    fidelity
        "naive": one generation per head, every text judged; the oracle.
        "exact": heads as rows of one batch, equal texts judged once. Sees the same noise as
        "naive", so in float32 it gives the same tokens.
        "importance": no further generation; the unpruned model's continuations are weighed by how
        likely each would be without the head (self-normalised per group, weights cut at
        ``max_weight``). Look at ``ess``: where it is small, the head changes the model too much.
        "gradient": first-order effects of all heads from one forward and one backward pass.
    rule
        What the judge reads, see ``judged_text``.
    checkpoint
        Folder for the raw scores, written every one to four layers. A run that was stopped goes on
        after the last file, with the same result. Runs with other settings don't mix: the
        subfolder's name is a digest of everything that decides the result.

    Returns
    -------
    DataFrame
        One row per head: flat, layer, head, axis, fidelity; bias, ppl (unpruned model);
        bias_without, ppl_without; z_bias = bias − bias_without (positive: the head adds bias);
        z_ppl = ppl_without − ppl (positive: the head matters for language modelling); z_bias_se,
        z_ppl_se (bootstrap over prompts within groups, and over windows); score_without (mean
        judge score); changed (share of continuations that differ from the unpruned model's; NaN
        where none were generated); ess (effective share of the sample, by importance weights; 1
        where texts were generated, NaN for gradients).

    Raises
    ------
    ValueError
        Unknown fidelity or rule, fewer than two groups, empty or too long prompts.

    Source
    ------
    Zayed et al., AAAI 2024; the published procedure stores bias_without and ppl_without.
    """
    if fidelity not in FIDELITIES:
        raise ValueError(f"fidelity {fidelity!r}: choose one of {', '.join(FIDELITIES)}.")
    if rule not in ("corrected", "as_published"):
        raise ValueError(f"rule {rule!r}: choose corrected or as_published.")
    texts, buckets = list(prompts["prompt"]), list(prompts["bucket"])
    weights = prompts["weight"].to_numpy() if "weight" in prompts else None
    # fail on bad groups before the long work, not after
    measure.group_bias(np.zeros(len(texts)), buckets, weights)
    sampling = {
        "seeds": list(seeds),
        "max_new_tokens": max_new_tokens,
        "top_k": top_k,
        "temperature": temperature,
        "max_prompt_tokens": max_prompt_tokens,
    }
    base = sample(lm, texts, batch_rows=batch_rows, **sampling)
    base_scores = judge_continuations(texts, base, judge, rule)
    base_nll = measure.nll(lm, windows, batch_tokens=batch_tokens)

    settings = {
        "model": lm.revision or lm.name,
        "dtype": str(lm.dtype),
        "judge": judge.name,
        "prompts": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "windows": hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest(),
        "code": record.code_sha256(),
        **{"fidelity": fidelity, "rule": rule, "batch_rows": batch_rows, "batch_tokens": batch_tokens},
        "max_weight": max_weight,
        **sampling,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(checkpoint) / digest if checkpoint else None
    task = _Task(
        lm,
        prompts,
        judge,
        windows,
        base,
        base_scores[0],
        rule,
        sampling,
        batch_rows,
        batch_tokens,
        max_weight,
    )
    n = lm.anatomy.n_flat
    step = n if fidelity == "gradient" else lm.anatomy.n_heads
    step *= 1 if fidelity == "gradient" else _layers_at_once(lm, prompts, len(seeds), batch_rows)
    methods = {
        "naive": lambda heads: _by_sampling(task, heads, one_by_one=True),
        "exact": lambda heads: _by_sampling(task, heads, one_by_one=False),
        "importance": lambda heads: _by_importance(task, heads),
        "gradient": lambda heads: _by_gradient(task),
    }
    chunks = []
    for start in bar(range(0, n, step), desc="heads scored" if progress else None):
        heads = range(start, min(start + step, n))
        path = folder and folder / f"heads_{heads[0]:05d}-{heads[-1]:05d}.npz"
        chunks.append(record.stored_arrays(path, lambda heads=heads: methods[fidelity](heads)))
    whole = {key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]}
    return _frame(task, base_nll, whole, n_boot).assign(
        axis=prompts["axis"].iloc[0] if "axis" in prompts else "", fidelity=fidelity
    )


def _frame(task: _Task, base_nll: np.ndarray, of: dict[str, np.ndarray], n_boot: int) -> pd.DataFrame:
    """Tidy frame of scores; row 0 of the stacked arrays is the unpruned model."""
    buckets = list(task.prompts["bucket"])
    weights = task.prompts["weight"].to_numpy() if "weight" in task.prompts else None
    values = np.concatenate([task.base_scores[None], of["values"]]).mean(1)  # over seeds
    sizes = np.concatenate([np.ones_like(task.base_scores)[None], of["sizes"]]).mean(1)
    bias = measure.group_bias(values, buckets, weights, sizes)
    boot = measure.bootstrap_bias(values, buckets, weights, sizes, n_boot=n_boot)
    nll = np.concatenate([base_nll, of["nll"]])
    ppl = measure.perplexity(nll, task.windows)
    n = nll.shape[1]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_boot)
    ppl_boot = measure.perplexity(nll, task.windows, draws)
    anatomy = task.lm.anatomy
    flat = np.arange(anatomy.n_flat)
    return pd.DataFrame(
        {
            "flat": flat,
            "layer": flat // anatomy.n_heads,
            "head": flat % anatomy.n_heads,
            "bias": bias[0],
            "bias_without": bias[1:],
            "z_bias": bias[0] - bias[1:],
            "z_bias_se": (boot[:, :1] - boot[:, 1:]).std(0, ddof=1),
            "ppl": ppl[0],
            "ppl_without": ppl[1:],
            "z_ppl": ppl[1:] - ppl[0],
            "z_ppl_se": (ppl_boot[:, 1:] - ppl_boot[:, :1]).std(0, ddof=1),
            "score_without": values[1:].sum(-1) / sizes[1:].sum(-1),
            "changed": of["changed"],
            "ess": of["ess"],
        }
    )


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
        is_conv = type(module).__name__ == "Conv1D"
        columns = (module.weight if is_conv else module.weight.T).reshape(a.n_heads, -1)
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
