"""Time, memory and precision of the fidelities against the loop that everybody writes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
from torch import nn

from biasprune import headscores, measure, weightscores
from biasprune.ablate import head_mask, head_masks, masked
from biasprune.decode import log_ratio, sample
from biasprune.judge import Judge
from biasprune.lm import LM
from biasprune.progress import bar
from biasprune.record import measured

GENERATE = "naive: transformers.generate"
REPAIRED = "naive: generate, repaired"
NAIVE = {
    GENERATE: "one masked model.generate per head, all prompts left-padded in one batch, "
    "every row to the last token, every text judged",
    REPAIRED: "the same, but generate is told not to copy the unembedding matrix for every prompt",
}


@torch.inference_mode()
def generate_loop(
    lm: LM,
    prompts: Sequence[str],
    heads: Sequence[int],
    judge: Judge,
    *,
    max_new_tokens: int,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = 22,
    repaired: bool = False,
) -> np.ndarray:
    """Judge scores (heads, prompts) by the published procedure, as anyone would write it today.

    Noise is independent from head to head. All rows write ``max_new_tokens`` tokens.

    Parameters
    ----------
    repaired
        On a CPU, asking the prompt pass for one position's logits makes torch copy the unembedding once
        per row, which can take most of the time; this avoids it.
    """
    lm.tokenizer.padding_side = "left"
    options = {"truncation": max_prompt_tokens is not None, "max_length": max_prompt_tokens}
    batch = lm.tokenizer(list(prompts), return_tensors="pt", padding=True, **options)
    batch = {k: v.to(lm.device) for k, v in batch.items() if k != "token_type_ids"}
    extra = {"logits_to_keep": torch.tensor([-1], device=lm.device)} if repaired else {}
    length, scores = batch["input_ids"].shape[1], []
    for head in heads:
        with masked(lm, head_mask(lm.anatomy, [int(head)])):
            out = lm.model.generate(
                **batch, do_sample=True, top_k=top_k, temperature=temperature,
                max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens,
                pad_token_id=lm.tokenizer.pad_token_id, **extra,
            )  # fmt: skip
        texts = lm.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        scores.append(judge.fresh(texts))
    return np.stack(scores)


def layers_of(lm: LM, n: int) -> list[list[int]]:
    """The heads of n layers that lie evenly over the depth: what a pass costs depends on the layer."""
    depth, width = lm.anatomy.n_layers, lm.anatomy.n_heads
    layers = np.unique(((np.arange(n) + 0.5) * depth / n).astype(int))
    return [list(range(x * width, (x + 1) * width)) for x in layers]


def _some(heads: list[int], n: int) -> list[int]:
    """n of a layer's heads, evenly."""
    return heads[:: max(1, len(heads) // n)][:n]


def bias_times(
    lm: LM,
    prompts: pd.DataFrame,
    judge: Judge,
    *,
    layers: int,
    naive_heads: int,
    fidelities: Sequence[str] = ("naive", "exact", "importance", "gradient"),
    progress: str | None = None,
    **sampling: int | float | None,
) -> pd.DataFrame:
    """Seconds and memory of z_bias, per fidelity and layer, side by side in one run.

    Parameters
    ----------
    layers
        Layers to measure, see ``layers_of``; all their heads, but for the loops, which take
        ``naive_heads`` heads of each.

    Returns
    -------
    DataFrame
        layer, fidelity; per_head (seconds), once (seconds that don't depend on the number of heads),
        peak_mib (on a CPU it also depends on what ran before: freed memory is used again), same_texts
        (share of continuations that are, token for token, what "naive" writes with the same noise).
    """
    texts = list(prompts["prompt"])
    # two tokens of text: z_ppl is timed by itself
    windows = measure.windows(lm, texts[0], length=2, max_tokens=2)
    options = {"progress": False, "n_boot": 2, **sampling}
    loop = {
        k: sampling[k]
        for k in ("max_new_tokens", "top_k", "temperature", "max_prompt_tokens")
        if k in sampling
    }
    rows = []
    for repaired in (False, True):  # the first calls pay for what later ones find ready
        generate_loop(lm, texts, [0], judge.emptied(), repaired=repaired, **{**loop, "max_new_tokens": 2})
    for name in fidelities:
        short = {**options, "fidelity": name, "heads": [0], "max_new_tokens": 2}
        headscores.samples(lm, prompts, judge.emptied(), windows, **short)
    for heads in bar(layers_of(lm, layers), desc=progress):
        few = _some(heads, naive_heads)
        layer = heads[0] // lm.anatomy.n_heads
        for name in (GENERATE, REPAIRED):
            call = (texts, few, judge.emptied())
            _, seconds, peak = measured(
                lambda n=name, c=call: generate_loop(lm, *c, repaired=n == REPAIRED, **loop), lm.device
            )
            rows.append(
                {
                    "layer": layer,
                    "fidelity": name,
                    "per_head": seconds / len(few),
                    "once": 0.0,
                    "peak_mib": peak,
                }
            )
        oracle = None
        for name in fidelities:
            some = few if name == "naive" else heads
            got, _, peak = measured(
                lambda n=name, s=some: headscores.samples(
                    lm, prompts, judge.emptied(), windows, fidelity=n, heads=s, **options
                ),
                lm.device,
            )
            spent = got.seconds
            once = spent["unpruned"] + (spent["heads"] if name == "gradient" else 0.0)
            row = {"layer": layer, "fidelity": name, "once": once, "peak_mib": peak}
            row["per_head"] = 0.0 if name == "gradient" else spent["heads"] / len(some)
            if name == "naive":
                oracle = got.raw["written"]
            if name == "exact" and oracle is not None:
                row["same_texts"] = (got.raw["written"][[heads.index(h) for h in few]] == oracle).mean()
            rows.append(row)
    return pd.DataFrame(rows)


def perplexity_times(lm: LM, windows: measure.Windows, *, layers: int, naive_heads: int) -> pd.DataFrame:
    """Seconds and memory of z_ppl by the loop, with resume at the layer ("exact"), and by gradient.

    Columns as ``bias_times``; difference is the largest relative difference of a perplexity.
    """
    rows = []
    for heads in layers_of(lm, layers):
        few = _some(heads, naive_heads)
        layer = heads[0] // lm.anatomy.n_heads
        masks = head_masks(lm.anatomy, [[h] for h in heads])

        def loop(few: list[int] = few) -> np.ndarray:
            return np.concatenate([measure.nll(lm, windows, head_mask(lm.anatomy, [h])[None]) for h in few])

        one, seconds, peak = measured(loop, lm.device)
        rows.append(
            {
                "layer": layer,
                "fidelity": "naive",
                "per_head": seconds / len(few),
                "once": 0.0,
                "peak_mib": peak,
            }
        )
        all_, seconds, peak = measured(lambda m=masks: measure.nll(lm, windows, m), lm.device)
        ours, theirs = (measure.perplexity(x, windows) for x in (all_[[heads.index(h) for h in few]], one))
        row = {"layer": layer, "fidelity": "exact", "per_head": seconds / len(heads), "once": 0.0}
        rows.append({**row, "peak_mib": peak, "difference": float(np.abs(ours / theirs - 1).max())})
        _, seconds, peak = measured(
            lambda: headscores.mask_gradient_l2(lm, windows, progress=False), lm.device
        )
        rows.append(
            {"layer": layer, "fidelity": "gradient", "per_head": 0.0, "once": seconds, "peak_mib": peak}
        )
    return pd.DataFrame(rows)


PARTS = ("layers", "layers, token by token", "unembedding", "unembedding, token by token", "judge", "rest")


def _parts(lm: LM, judge: Judge, call: Callable[[Judge], None]) -> dict[str, float]:
    """Seconds that a call spends in each of ``PARTS``; on a GPU watching makes it slower.

    "layers" and "unembedding" are passes over whole sequences; "rest" is drawing tokens, losses, copying
    caches, and Python.
    """
    spent: Counter[str] = Counter()
    started: list[float] = []

    def now() -> float:
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        return time.perf_counter()

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        started.append(now())

    def after(part: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            one = x.dim() == 3 and x.shape[1] == 1
            spent[part + ", token by token" * one] += now() - started.pop()

        return hook

    def score(texts: Sequence[str]) -> np.ndarray:
        start = now()
        scores = judge.fresh(texts)
        spent["judge"] += now() - start
        return scores

    layers = [(lm.model.get_submodule(name), "layers") for name in lm.anatomy.layers]
    with ExitStack() as stack:
        for module, part in [*layers, (lm.model.get_output_embeddings(), "unembedding")]:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(part), with_kwargs=True).remove)
        start = now()
        call(Judge(judge.name, score))
        spent["rest"] = now() - start - sum(spent.values())
    return {part: spent[part] for part in PARTS}


@torch.inference_mode()
def profile(
    lm: LM,
    prompts: Sequence[str],
    judge: Judge,
    windows: measure.Windows,
    *,
    naive_heads: int,
    max_new_tokens: int,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = 22,
) -> pd.DataFrame:
    """Where the time goes for the heads of the middle layer, for the repaired loop and for what replaces it.

    Returns
    -------
    DataFrame
        score (z_bias or z_ppl), fidelity, and seconds per head in each of ``PARTS``. The unpruned
        model's texts are left out; the clean pass that a layer's heads share is not.
    """
    (heads,) = layers_of(lm, 1)
    few = _some(heads, naive_heads)
    texts, masks = list(prompts), head_masks(lm.anatomy, [[h] for h in heads])
    drawing = {"top_k": top_k, "temperature": temperature, "max_prompt_tokens": max_prompt_tokens}
    base = sample(lm, texts, max_new_tokens=max_new_tokens, **drawing)
    seen = list(base.texts.reshape(-1))

    def exact(judge: Judge) -> None:
        new = sample(lm, texts, masks=masks, draft=base.tokens[0], max_new_tokens=max_new_tokens, **drawing)
        judge(list(set(new.texts.reshape(-1)) - set(seen)))

    def loop(judge: Judge) -> None:
        generate_loop(lm, texts, few, judge, max_new_tokens=max_new_tokens, repaired=True, **drawing)

    def loss_loop(judge: Judge) -> None:
        for h in few:
            measure.nll(lm, windows, head_mask(lm.anatomy, [h])[None])

    calls = [
        ("z_bias", REPAIRED, loop, few),
        ("z_bias", "exact", exact, heads),
        ("z_bias", "importance", lambda _: log_ratio(lm, texts, base.tokens[0], masks, **drawing), heads),
        ("z_ppl", "naive", loss_loop, few),
        ("z_ppl", "exact", lambda _: measure.nll(lm, windows, masks), heads),
    ]
    rows = []
    for score, fidelity, call, of in calls:
        spent = _parts(lm, judge, call)
        rows.append({"score": score, "fidelity": fidelity, **{k: v / len(of) for k, v in spent.items()}})
    return pd.DataFrame(rows)


DIRECT = "one backward pass per example, scores of all layers held"


def weight_times(lm: LM, of: weightscores.Examples, at_once: Sequence[int]) -> pd.DataFrame:
    """Seconds and memory of SNIP scores of all weights, and of Wanda, against the direct loop.

    Parameters
    ----------
    at_once
        Numbers of layers whose scores are held together.

    Returns
    -------
    DataFrame
        method, seconds, peak_mib (over what was in use before), estimate_mib (of
        ``weightscores.memory``, the model left out), times faster than the loop, difference (largest,
        relative to a matrix's largest score; NaN for Wanda, which is another score).
    """
    names = [name for layer in range(lm.anatomy.n_layers) for name in weightscores.linears(lm, layer)]

    def direct() -> dict[str, torch.Tensor]:
        weights = {n: weightscores.weight_of(lm.model.get_submodule(n)) for n in names}
        scores = {n: torch.zeros(w.shape, device=w.device) for n, w in weights.items()}
        leaves = [lm.model.get_submodule(n).weight.requires_grad_() for n in names]
        try:
            for row in range(len(of.ids)):
                ids, counted = (x[row : row + 1].to(lm.device) for x in (of.ids, of.counted))
                with torch.enable_grad():
                    grads = torch.autograd.grad(measure.mean_nll(lm, ids, counted)[0], leaves)
                for n, leaf, grad in zip(names, leaves, grads, strict=True):
                    grad = grad if weights[n] is leaf else grad.T  # a Conv1D's
                    scores[n] += (weights[n].detach().float() * grad.float()).abs()
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        return scores

    def ours(n: int) -> float:
        worst = 0.0
        for _, named in weightscores.snip(lm, of, at_once=n):
            for name, score in named.items():
                apart = float((score - oracle[name]).abs().max() / oracle[name].max())
                worst = apart if not apart <= worst else worst  # NaN stays
        return worst

    def wanda() -> None:
        norms = weightscores.input_norms(lm, of)
        for layer in range(lm.anatomy.n_layers):
            weightscores.wanda(lm, norms, layer)

    oracle = direct()  # the first calls pay for what later ones find ready
    for n in at_once:
        ours(n)
    oracle, seconds, peak = measured(direct, lm.device)
    rows = [{"method": f"direct: {DIRECT}", "seconds": seconds, "peak_mib": peak}]
    sizes = {"sets": 1, "batch_tokens": min(2048, of.ids.numel())}
    for n in at_once:
        worst, seconds, peak = measured(lambda n=n: ours(n), lm.device)
        needed = weightscores.memory(lm.model, lm.anatomy, at_once=n, **sizes)
        row = {
            "method": f"snip, {n} layers at once",
            "seconds": seconds,
            "peak_mib": peak,
            "difference": worst,
        }
        rows.append({**row, "estimate_mib": 1024 * (sum(needed.values()) - needed["model"])})
    _, seconds, peak = measured(wanda, lm.device)
    table = pd.DataFrame([*rows, {"method": "wanda", "seconds": seconds, "peak_mib": peak}])
    return table.assign(ratio=table["seconds"].iloc[0] / table["seconds"])


def summary(times: pd.DataFrame, n_heads: int, naive: str = GENERATE) -> pd.DataFrame:
    """Seconds for all heads, and how many times faster than the loop: (fidelities) rows.

    Parameters
    ----------
    times
        Of ``bias_times`` or ``perplexity_times``: some layers, from which all are projected.

    Returns
    -------
    DataFrame
        fidelity, seconds (all heads, projected), peak_mib, ratio to the loop of mean times, ratio_low
        and ratio_high (lowest and highest over the measured layers), and what else was measured.
    """
    times = times.assign(seconds=times["per_head"] * n_heads + times["once"])
    wide = times.pivot(index="layer", columns="fidelity", values="seconds")
    rows = []
    for name in times["fidelity"].unique():
        own = times[times["fidelity"] == name]
        each = wide[naive] / wide[name]
        row = {"fidelity": name, "seconds": own["seconds"].mean(), "peak_mib": own["peak_mib"].max()}
        row |= {
            "ratio": wide[naive].mean() / wide[name].mean(),
            "ratio_low": each.min(),
            "ratio_high": each.max(),
        }
        for extra in ("same_texts", "difference"):
            if extra in own:
                row[extra] = own[extra].mean() if extra == "same_texts" else own[extra].max()
        rows.append(row)
    return pd.DataFrame(rows)


def reached(goals: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Per goal: "reached" if low does, "missed" if high doesn't, else "undecided"; "–" where not measured."""
    known = [low.isna() | high.isna(), low >= goals, high < goals]
    return np.select(known, ["–", "reached", "missed"], "undecided")


def precision(
    frames: dict[str, pd.DataFrame], seconds: dict[str, float], naive: str, *, n_boot: int = 2000
) -> pd.DataFrame:
    """Time to the same standard error of z_bias, against the loop with independent noise.

    As far as standard errors fall with the root of the number of prompts, time × squared standard error
    doesn't depend on it, and its ratio says how many times sooner a method reaches a wanted one.
    "adaptive" stops where its standard errors look small, which makes them look a little too small.

    Parameters
    ----------
    frames
        Head scores of each method, over the same heads.
    seconds
        Time of each method for all heads.

    Returns
    -------
    DataFrame
        method, seconds, se (root mean square over heads), gain, gain_low, gain_high (95 %, bootstrap
        over heads alone: neither over prompts nor over times), gain_median (median over heads).
    """
    rng = np.random.default_rng(0)
    squared = {k: f["z_bias_se"].to_numpy() ** 2 for k, f in frames.items()}
    n = len(squared[naive])
    draws = rng.integers(n, size=(n_boot, n))
    rows = []
    for name, of in squared.items():
        faster = seconds[naive] / seconds[name]
        boot = faster * squared[naive][draws].mean(1) / of[draws].mean(1)
        rows.append(
            {
                "method": name,
                "seconds": seconds[name],
                "se": np.sqrt(of.mean()),
                "gain": faster * squared[naive].mean() / of.mean(),
                "gain_low": np.quantile(boot, 0.025),
                "gain_high": np.quantile(boot, 0.975),
                "gain_median": faster * np.median(squared[naive] / np.where(of > 0, of, np.nan)),
            }
        )
    return pd.DataFrame(rows)


def matmul_peak(device: torch.device | str, dtype: torch.dtype, size: int = 2048) -> float:
    """Operations per second of a large matrix product here: the roof that a model can reach."""
    size = 8192 if torch.device(device).type == "cuda" else size
    x = torch.randn(size, size, device=device, dtype=dtype)
    x @ x
    best = min(measured(lambda: x @ x, device)[1] for _ in range(5))
    return 2 * size**3 / best
