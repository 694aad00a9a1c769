"""Scores of single weights and of MLP units: Wanda and SNIP, and the set difference of two scores.

Wanda (Sun et al., ICLR 2024): |W_ij| · ‖x_j‖. SNIP (Lee et al., ICLR 2019; per example as in Wei et
al., ICML 2024): Σ over examples |W_ij · ∂L/∂W_ij|. "Breaking Down Bias" (Ma et al., FAccT 2025)
prunes what scores high on one group's answers and not on the other's.

Scores are made one layer at a time, so that never more than one layer's are in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from biasprune import check
from biasprune.ablate import Pruning, masked, recorded, resumed
from biasprune.lm import LM, Anatomy, weight_of
from biasprune.measure import Windows, mean_nll
from biasprune.progress import bar


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Texts that a score is computed on.

    Attributes
    ----------
    ids
        (examples, tokens), padded on the right.
    counted
        (examples, tokens) bool: the tokens whose inputs (Wanda) and whose losses (SNIP) count.
    """

    ids: Tensor
    counted: Tensor


def examples(lm: LM, prompts: Sequence[str], responses: Sequence[str], *, whole: bool = False) -> Examples:
    """Prompts with responses; only the responses' tokens count, or with ``whole`` all but the first.

    Raises
    ------
    ValueError
        No example, an empty response, no texts, unequal numbers, or a text longer than the context.
    """
    check.texts(prompts, "prompts")
    check.texts(responses, "responses")
    if len(prompts) == 0 or len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} responses: give equally many, at least one."
        )
    return from_ids(
        lm,
        [lm.tokenizer(p)["input_ids"] for p in prompts],
        [lm.tokenizer(r, add_special_tokens=False)["input_ids"] for r in responses],
        whole=whole,
    )


def from_ids(
    lm: LM, prompts: Sequence[list[int]], responses: Sequence[list[int]], *, whole: bool = False
) -> Examples:
    """``examples`` from token ids, such as a model's own answers as it wrote them."""
    rows, counted = [], []
    for i, (start, answer) in enumerate(zip(prompts, responses, strict=True)):
        if not answer:
            raise ValueError(f"response {i} is empty.")
        if len(start) + len(answer) > lm.context:
            raise ValueError(
                f"example {i} has {len(start) + len(answer)} tokens; the context is {lm.context}."
            )
        rows.append(torch.tensor(start + answer))
        first = 1 if whole else max(1, len(start))
        counted.append(torch.arange(len(rows[-1])) >= first)
    pad = torch.nn.utils.rnn.pad_sequence
    return Examples(ids=pad(rows, batch_first=True), counted=pad(counted, batch_first=True))


def prose(windows: Windows) -> Examples:
    """A text's windows as examples, such as a utility set."""
    return Examples(ids=windows.ids, counted=windows.counted)


def linears(lm: LM, layer: int) -> dict[str, nn.Module]:
    """The weight matrices of a layer by name, relative to the model."""
    root = lm.anatomy.layers[layer]
    found = lm.model.get_submodule(root).named_modules()
    return {f"{root}.{name}": m for name, m in found if isinstance(m, nn.Linear | Conv1D)}


def _batches(of: Examples, batch_tokens: int) -> list[Tensor]:
    return list(torch.arange(len(of.ids)).split(max(1, batch_tokens // of.ids.shape[1])))


@torch.inference_mode()
def input_norms(
    lm: LM, of: Examples, *, rule: str = "corrected", batch_tokens: int = 4096, progress: str | None = None
) -> dict[str, Tensor]:
    """Mean over examples of Σ over counted tokens x_j², for every matrix: name → (in,) float64.

    Parameters
    ----------
    rule
        "corrected": every layer on its own input, one pass. "as_published": every layer on the
        embeddings, as in the authors' public notebook, where the layers' inputs are never passed on.

    Raises
    ------
    ValueError
        Unknown rule.
    """
    if rule not in ("corrected", "as_published"):
        raise ValueError(f"rule {rule!r}: choose corrected or as_published.")
    n = lm.anatomy.n_layers
    sums: dict[str, Tensor] = {}

    def watch(layers: Sequence[int], counted: Tensor, stack: ExitStack) -> None:
        for layer in layers:
            for name, module in linears(lm, layer).items():

                def hook(module: nn.Module, args: tuple, name: str = name) -> None:
                    # OPT flattens examples and tokens
                    x = args[0].reshape(*counted.shape, -1)[counted.to(args[0].device)].double()
                    sums[name] = sums.get(name, 0) + x.square().sum(0).cpu()

                handle = module.register_forward_pre_hook(hook)
                stack.callback(handle.remove)

    for rows in bar(_batches(of, batch_tokens), desc=progress):
        ids, counted = of.ids[rows].to(lm.device), of.counted[rows]
        if rule == "corrected":
            with ExitStack() as stack:
                watch(range(n), counted, stack)
                lm.model.base_model(ids, use_cache=False)
            continue
        with recorded(lm, [0]) as clean:
            lm.model.base_model(ids, use_cache=False)
        for layer in range(n):
            with ExitStack() as stack:
                watch([layer], counted, stack)
                if layer:
                    stack.enter_context(resumed(lm, layer, clean.hidden[0], clean.returns_tuple))
                lm.model.base_model(ids, use_cache=False)
    return {name: total / len(of.ids) for name, total in sums.items()}


def wanda(lm: LM, norms: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """|W_ij| · √norm_j of a layer's matrices: name → (out, in) float32, on the weights' device."""
    return {
        name: weight_of(m).float().abs() * norms[name].sqrt().to(m.weight.device, torch.float32)
        for name, m in linears(lm, layer).items()
    }


def snip(
    lm: LM, of: Examples, *, layers: Sequence[int] | None = None, at_once: int = 1, batch_tokens: int = 2048,
    progress: str | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:  # fmt: skip
    """Σ over examples |W_ij · ∂L/∂W_ij|, layer by layer: yields (layer, {name: (out, in) float32}).

    L is an example's mean loss over counted tokens. Gradients of single examples are products of what
    goes into a matrix and what comes back, for a whole batch from one backward pass.

    Parameters
    ----------
    at_once
        Layers whose scores are held together. More take more memory (4 bytes a weight) and fewer passes
        over the examples.
    """
    layers = list(range(lm.anatomy.n_layers) if layers is None else layers)
    groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
    jobs = [(g, rows) for g in range(len(groups)) for rows in _batches(of, batch_tokens)]
    scores: dict[str, Tensor] = {}
    for job, (g, rows) in enumerate(bar(jobs, desc=progress)):
        named = {name: m for layer in groups[g] for name, m in linears(lm, layer).items()}
        with torch.enable_grad(), ExitStack() as stack:
            # nothing before the first of these layers needs gradients
            first = lm.model.get_submodule(lm.anatomy.layers[min(groups[g])])
            stack.callback(first.register_forward_pre_hook(_wants_gradient, with_kwargs=True).remove)
            for name, module in named.items():
                stack.callback(module.register_forward_hook(_scorer(name, scores, len(rows))).remove)
            ids, counted = of.ids[rows].to(lm.device), of.counted[rows].to(lm.device)
            mean_nll(lm, ids, counted).sum().backward()
        if job + 1 == len(jobs) or jobs[job + 1][0] != g:
            for layer in groups[g]:
                yield layer, {name: scores.pop(name) for name in linears(lm, layer)}


def _wants_gradient(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _scorer(name: str, scores: dict[str, Tensor], n: int):  # noqa: ANN202  a torch hook
    """A forward hook that adds a module's scores when the gradient of its output comes back."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        x = args[0].detach()

        def back(gradient: Tensor) -> None:
            weight = weight_of(module).detach().float()
            total = scores.setdefault(name, torch.zeros_like(weight))
            # one example: (tokens, out) and (tokens, in); OPT flattens examples and tokens
            for g, i in zip(gradient.float().chunk(n), x.float().chunk(n), strict=True):
                total += (weight * (g.flatten(0, -2).T @ i.flatten(0, -2))).abs()

        output.register_hook(back)

    return hook


def _parts(lm: LM, what: str) -> tuple[int, int, tuple[str, ...]]:
    """Parts per layer, inputs of its last projection that make a part, and those projections."""
    a = lm.anatomy
    if what not in ("heads", "units"):
        raise ValueError(f"parts {what!r}: choose heads or units.")
    return (a.n_heads, a.head_dim, a.out_projs) if what == "heads" else (a.n_units, 1, a.down_projs)


def part_snip(
    lm: LM, of: Examples, what: str = "units", *, batch_tokens: int = 2048, progress: str | None = None
) -> np.ndarray:
    """Σ over examples |∂L/∂mask| of every MLP unit or head at mask = 1: (layers, parts) float64.

    The first-order effect of removing the part, as SNIP's is of removing a weight.
    """
    n, _, _ = _parts(lm, what)
    total = np.zeros((lm.anatomy.n_layers, n))
    for rows in bar(_batches(of, batch_tokens), desc=progress):
        masks = torch.ones(len(rows), lm.anatomy.n_layers, n, device=lm.device, requires_grad=True)
        with torch.enable_grad(), masked(lm, **{what: masks}):
            loss = mean_nll(lm, of.ids[rows].to(lm.device), of.counted[rows].to(lm.device)).sum()
            (gradient,) = torch.autograd.grad(loss, masks)
        total += gradient.double().abs().sum(0).cpu().numpy()
    return total


def part_wanda(lm: LM, norms: Mapping[str, Tensor], what: str = "units") -> np.ndarray:
    """Wanda of every MLP unit or head: (layers, parts) float64.

    √ Σ_j ‖column j of the last projection‖² · norm_j over the part's inputs j.
    """
    n, width, names = _parts(lm, what)
    rows = []
    for name in names:
        columns = weight_of(lm.model.get_submodule(name)).double().square().sum(0).cpu()
        rows.append((columns * norms[name]).view(n, width).sum(1).sqrt().numpy())
    return np.stack(rows)


def top_share(score: Tensor, share: float, per_row: bool = False) -> Tensor:
    """The int(share · n) highest of a matrix, or of every row: bool, of the same shape.

    Raises
    ------
    ValueError
        If the share isn't between 0 and 1, or the scores hold NaN.
    """
    check.share(share, "share")
    if score.isnan().any():
        raise ValueError("scores hold NaN.")
    flat = score if per_row else score.reshape(1, -1)
    k = int(share * flat.shape[1] + 1e-9)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen.scatter_(1, flat.topk(k, dim=1).indices, True)
    return chosen.view(score.shape)


def set_difference(
    bias: Tensor, protect: Sequence[Tensor], p: float, q: float | Sequence[float], per_row: bool = False
) -> Tensor:
    """Top p of the bias score, minus the top q of every score to protect: bool, of the same shape.

    Scores to protect: the other group's (published), and a utility set's (as in Wei et al.). ``q`` may
    be one share for each.
    """
    chosen = top_share(bias, p, per_row)
    shares = [q] * len(protect) if isinstance(q, int | float) else list(q)
    if len(shares) != len(protect):
        raise ValueError(f"{len(shares)} shares q for {len(protect)} scores to protect.")
    for score, share in zip(protect, shares, strict=True):
        chosen &= ~top_share(score, share, per_row)
    return chosen


def memory(
    model: nn.Module, anatomy: Anatomy, *, at_once: int, sets: int = 3, batch_tokens: int = 2048
) -> dict[str, float]:
    """What SNIP scores of all weights need, in GiB: an estimate from the model's shape.

    Parameters
    ----------
    model
        Weights aren't looked at: it may lie on the meta device.
    sets
        Sets of examples scored side by side: bias, the other group, a utility set.

    Returns
    -------
    dict
        model; scores (float32, of ``at_once`` layers); products (float32 copies of the largest matrix
        while one example is added); activations (kept for the backward pass) and logits of one batch.
    """
    config, width = model.config.get_text_config(), next(model.parameters()).element_size()
    layer = model.get_submodule(anatomy.layers[0])
    sizes = [m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    kept = anatomy.n_layers * (12 * config.hidden_size + 5 * anatomy.n_units) * width
    parts = {
        "model": sum(p.numel() for p in model.parameters()) * width,
        "scores": at_once * sum(sizes) * 4 * sets,
        "products": 4 * max(sizes) * 4,
        "activations": batch_tokens * kept,
        "logits": batch_tokens * config.vocab_size * (2 * width + 8),
    }
    return {name: size / 2**30 for name, size in parts.items()}


GRANULARITIES = {"weight": "weights", "neuron": "units", "head": "heads"}


def check_size(lm: LM, pruning: Pruning, what: str) -> None:
    """Warn of a selection of nothing, or of every part of a layer or every weight of a matrix."""
    masks = [x for x in (pruning.heads, pruning.units) if x is not None]
    whole = any(bool(x.all(1).any()) for x in masks) or any(
        len(i) == weight_of(lm.model.get_submodule(n)).numel() for n, i in pruning.weights.items()
    )
    if whole or not len(pruning):
        found = "everything in some layer" if whole else "nothing"
        warnings.warn(f"{what} selects {found}.", stacklevel=3)


def set_differences(
    lm: LM,
    bias: Examples,
    protect: Sequence[Examples],
    shares: Sequence[tuple[float, float | Sequence[float]]],
    *,
    granularity: str,
    score: str = "snip",
    rule: str = "corrected",
    per_row: bool = False,
    at_once: int | None = None,
    batch_tokens: int = 2048,
    progress: str | None = None,
) -> list[Pruning]:
    """What scores high on some examples and on none of the others, for several thresholds at once.

    Single weights are chosen from every matrix, neurons (MLP units) from every layer, heads from the
    whole model, which has few.

    Parameters
    ----------
    bias
        Answers about the group whose behaviour is to go.
    protect
        The other group's answers, and utility sets.
    shares
        Pairs (p, q): the top p on ``bias`` minus the top q on each to protect.
    granularity
        "weight", "neuron" or "head".
    score
        "snip" or "wanda".
    rule, per_row
        As in ``input_norms`` (Wanda) and ``top_share`` (weights).
    at_once
        Layers whose SNIP scores are held together, see ``snip``; None takes as many as 2 GiB hold.

    Raises
    ------
    ValueError
        Unknown granularity or score, or a share outside 0 … 1.

    Warns
    -----
    UserWarning
        Where shares select nothing (such a pruning removes nothing), or all of some layer or matrix.

    Source
    ------
    Wei et al., ICML 2024, section on set difference; Ma et al., FAccT 2025, with the groups as sets.
    """
    if granularity not in GRANULARITIES or score not in ("snip", "wanda"):
        raise ValueError(f"{granularity!r} by {score!r}: choose weight, neuron or head, by snip or wanda.")
    if not shares:
        raise ValueError("no shares: give one pair (p, q) or more.")
    for p, q in shares:  # before the long work
        for x in (p, *([q] if isinstance(q, int | float) else q)):
            check.share(x, "share")
    sets = [bias, *protect]
    norms = [input_norms(lm, x, rule=rule, progress=progress) for x in sets] if score == "wanda" else []
    found: list[dict[str, Tensor]] = [{} for _ in shares]
    if granularity == "weight":
        if norms:
            layers = range(lm.anatomy.n_layers)
            per_layer = ([wanda(lm, n, layer) for n in norms] for layer in layers)
        else:
            of_layer = [
                sum(weight_of(m).numel() for m in linears(lm, i).values()) for i in range(lm.anatomy.n_layers)
            ]
            at_once = at_once or max(1, 2**31 // (4 * max(of_layer) * len(sets)))
            makers = (
                snip(lm, x, at_once=at_once, batch_tokens=batch_tokens, progress=progress) for x in sets
            )
            per_layer = ([named for _, named in each] for each in zip(*makers, strict=True))
        for own, *others in per_layer:
            for name in own:
                for one, (p, q) in zip(found, shares, strict=True):
                    chosen = set_difference(own[name], [o[name] for o in others], p, q, per_row)
                    one[name] = chosen.flatten().nonzero()[:, 0].cpu()
        prunings = [Pruning(weights=one) for one in found]
    else:
        what = GRANULARITIES[granularity]
        scores = [part_wanda(lm, n, what) for n in norms] or [
            part_snip(lm, x, what, batch_tokens=batch_tokens, progress=progress) for x in sets
        ]
        own, *others = (torch.from_numpy(x) for x in scores)
        layerwise = granularity == "neuron"
        prunings = [
            Pruning(**{what: set_difference(own, others, p, q, per_row=layerwise)}) for p, q in shares
        ]
    for pruning, (p, q) in zip(prunings, shares, strict=True):
        check_size(lm, pruning, f"{granularity}: top {p} minus top {q}")
    return prunings
