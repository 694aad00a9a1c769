"""Scores of every attention head: what its removal does to bias and to perplexity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from biasprune import measure, record
from biasprune.ablate import head_masks, masked
from biasprune.decode import Continuations, encode, sample
from biasprune.judge import Judge
from biasprune.lm import LM
from biasprune.progress import bar

FIDELITIES = ("naive", "exact")


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


def _chunk_scores(
    lm: LM,
    prompts: pd.DataFrame,
    judge: Judge,
    windows: measure.Windows,
    heads: Sequence[int],
    *,
    fidelity: str,
    rule: str,
    sampling: dict,
    batch_rows: int,
    batch_tokens: int,
) -> dict[str, np.ndarray]:
    """Scores (heads, seeds, prompts), tokens and NLL (heads, windows) with each head removed."""
    masks = head_masks(lm.anatomy, [[h] for h in heads])
    texts = list(prompts["prompt"])
    if fidelity == "naive":  # one head at a time, every text judged again
        written = [sample(lm, texts, masks=m[None], batch_rows=batch_rows, **sampling) for m in masks]
        scores = [judge_continuations(texts, w, judge.fresh, rule) for w in written]
        losses = [measure.nll(lm, windows, m[None], batch_tokens=batch_tokens) for m in masks]
        tokens = np.concatenate([w.tokens for w in written])
        return {"scores": np.concatenate(scores), "tokens": tokens, "nll": np.concatenate(losses)}
    written = sample(lm, texts, masks=masks, batch_rows=batch_rows, **sampling)
    return {
        "scores": judge_continuations(texts, written, judge, rule),
        "tokens": written.tokens,
        "nll": measure.nll(lm, windows, masks, batch_tokens=batch_tokens),
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
        "naive": one generation per head, every text judged; the oracle. "exact": heads as rows
        of one batch, equal texts judged once. Both see the same noise, so in float32
        they give the same tokens.
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
        judge score); changed (share of continuations that differ from the unpruned model's).

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
        **sampling,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(checkpoint) / digest if checkpoint else None
    step = _layers_at_once(lm, prompts, len(seeds), batch_rows) * lm.anatomy.n_heads
    chunks = []
    for start in bar(range(0, lm.anatomy.n_flat, step), desc="heads scored" if progress else None):
        heads = range(start, min(start + step, lm.anatomy.n_flat))
        chunks.append(
            record.stored_arrays(
                folder and folder / f"heads_{heads[0]:05d}-{heads[-1]:05d}.npz",
                lambda heads=heads: _chunk_scores(
                    lm,
                    prompts,
                    judge,
                    windows,
                    heads,
                    fidelity=fidelity,
                    rule=rule,
                    sampling=sampling,
                    batch_rows=batch_rows,
                    batch_tokens=batch_tokens,
                ),
            )
        )
    scores, tokens, losses = (
        np.concatenate([one[key] for one in chunks]) for key in ("scores", "tokens", "nll")
    )
    return _frame(lm, prompts, base, base_scores, base_nll, scores, tokens, losses, windows, n_boot).assign(
        axis=prompts["axis"].iloc[0] if "axis" in prompts else "", fidelity=fidelity
    )


def _frame(
    lm: LM,
    prompts: pd.DataFrame,
    base: Continuations,
    base_scores: np.ndarray,
    base_nll: np.ndarray,
    scores: np.ndarray,
    tokens: np.ndarray,
    losses: np.ndarray,
    windows: measure.Windows,
    n_boot: int,
) -> pd.DataFrame:
    """Tidy frame of scores; row 0 of the stacked arrays is the unpruned model."""
    buckets = list(prompts["bucket"])
    weights = prompts["weight"].to_numpy() if "weight" in prompts else None
    judged = np.concatenate([base_scores, scores]).mean(1)  # over seeds
    bias = measure.group_bias(judged, buckets, weights)
    boot = measure.bootstrap_bias(judged, buckets, weights, n_boot=n_boot)
    nll = np.concatenate([base_nll, losses])
    ppl = measure.perplexity(nll, windows)
    n = nll.shape[1]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_boot)
    ppl_boot = measure.perplexity(nll, windows, draws)
    flat = np.arange(lm.anatomy.n_flat)
    return pd.DataFrame(
        {
            "flat": flat,
            "layer": flat // lm.anatomy.n_heads,
            "head": flat % lm.anatomy.n_heads,
            "bias": bias[0],
            "bias_without": bias[1:],
            "z_bias": bias[0] - bias[1:],
            "z_bias_se": (boot[:, :1] - boot[:, 1:]).std(0, ddof=1),
            "ppl": ppl[0],
            "ppl_without": ppl[1:],
            "z_ppl": ppl[1:] - ppl[0],
            "z_ppl_se": (ppl_boot[:, 1:] - ppl_boot[:, :1]).std(0, ddof=1),
            "score_without": judged[1:].mean(-1),
            "changed": (tokens != base.tokens).any(-1).mean((1, 2)),
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


def mask_gradient_l2(
    lm: LM, windows: measure.Windows, *, batch_tokens: int = 1024, progress: bool = True
) -> np.ndarray:
    """Σ over windows of |∂loss/∂mask| at mask = 1, L2-normalised per layer, over the largest: (N,).

    Source: baseline "gradient" of Zayed et al., AAAI 2024, after Michel et al., NeurIPS 2019.
    """
    a = lm.anatomy
    total = torch.zeros(a.n_layers, a.n_heads, dtype=torch.float64)
    rows = max(1, batch_tokens // windows.ids.shape[1])
    starts = range(0, len(windows.ids), rows)
    for start in bar(starts, desc="mask gradients" if progress else None):
        chosen = torch.arange(start, min(start + rows, len(windows.ids)))
        # one mask per row, so that the absolute value is taken window by window
        masks = torch.ones(len(chosen), a.n_layers, a.n_heads, device=lm.device, requires_grad=True)
        with torch.enable_grad(), masked(lm, masks):
            loss = measure.window_nll(lm, windows, chosen).sum()
            (gradient,) = torch.autograd.grad(loss, masks)
        total += gradient.abs().sum(0).double().cpu()
    total /= total.square().sum(1, keepdim=True).sqrt().clamp_min(1e-30)
    flat = total.flatten().numpy()
    return flat / flat.max()
