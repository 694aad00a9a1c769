"""Scores of single weights and of MLP units and heads: Wanda and SNIP, and the set difference of two scores.

Wanda (Sun et al., ICLR 2024): |W_ij| · ‖x_j‖. SNIP (Lee et al., ICLR 2019; per example as in Wei et al., ICML 2024): Σ
over examples |W_ij · ∂L/∂W_ij|. Scores are made some layers at a time, so that few are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from biasprune.core.likelihood import mask_gradients
from biasprune.core.masks import Pruning
from biasprune.core.model import LM, unit_projections, weight_of
from biasprune.core.perplexity import Windows, mean_nll


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts that a score is computed on."""

    ids: Tensor  # (examples, tokens), padded on the right
    counted: Tensor  # the tokens whose inputs (Wanda) or losses (SNIP) count

    def batches(self, batch_tokens: int) -> tuple[Tensor, ...]:
        """Numbers of the examples of every batch."""
        return torch.arange(len(self.ids)).split(max(1, batch_tokens // self.ids.shape[1]))

    def with_prompts(self) -> Examples:
        """The same texts, of which every token up to the last counted one counts."""
        return Examples(self.ids, self.counted.flip(1).cummax(1).values.flip(1))


def examples(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Examples:
    """Prompts with responses, as token ids; the responses' tokens count."""
    rows = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
    counted = [torch.arange(len(row)) >= max(1, len(p)) for row, p in zip(rows, prompts, strict=True)]
    return Examples(*(nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, counted)))


def prose(windows: Windows) -> Examples:
    """A text's windows as examples."""
    return Examples(windows.ids, windows.counted)


def linears(lm: LM, layer: int) -> dict[str, nn.Module]:
    """The weight matrices of a layer by name, relative to the model."""
    root = lm.anatomy.layers[layer]
    modules = lm.model.get_submodule(root).named_modules()
    return {f"{root}.{name}": m for name, m in modules if isinstance(m, nn.Linear | Conv1D)}


def fed(change: Callable[[Tensor], Tensor], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A pre-hook that changes the hidden states that go into a layer."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


@torch.inference_mode()
def input_norms(lm: LM, of: Examples, *, rule: str = "corrected", batch_tokens: int = 4096) -> dict[str, Tensor]:
    """Mean over examples of Σ over counted tokens x_j², for every matrix: name → (in,) float64.

    "as_published": every layer on the embeddings, as in the authors' notebook, which never passes on layers' inputs.
    """
    sums: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}  # counted tokens, and the embeddings, of the batch at hand

    def watch(name: str, module: nn.Module, args: tuple) -> None:
        # OPT flattens examples and tokens
        x = args[0].reshape(*state["counted"].shape, -1)[state["counted"].to(args[0].device)].double()
        sums[name] = sums.get(name, 0) + x.square().sum(0).cpu()

    feed = partial(fed, lambda x: state.setdefault("embeddings", x))
    with ExitStack() as hooks:
        for i, layer in enumerate(lm.anatomy.layers):
            if rule == "as_published":
                module = lm.model.get_submodule(layer)
                hooks.enter_context(module.register_forward_pre_hook(feed, with_kwargs=True))
            for name, module in linears(lm, i).items():
                hooks.enter_context(module.register_forward_pre_hook(partial(watch, name)))
        for rows in of.batches(batch_tokens):
            state.clear()
            state["counted"] = of.counted[rows]
            lm.model.base_model(of.ids[rows].to(lm.device), use_cache=False)
    return {name: total / len(of.ids) for name, total in sums.items()}


def wanda(lm: LM, norms: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """|W_ij| · √norm_j of a layer's matrices: name → (out, in) float32, on the weights' device."""
    return {
        name: weight_of(m).float().abs() * norms[name].sqrt().to(m.weight.device, torch.float32)
        for name, m in linears(lm, layer).items()
    }


def snip(lm: LM, of: Examples, *, at_once: int = 1, batch_tokens: int = 2048) -> Iterator[dict[str, Tensor]]:
    """Σ over examples |W_ij · ∂L/∂W_ij|, layer by layer: yields {name: (out, in) float32}.

    L is an example's mean loss over counted tokens. Single examples' gradients come from one backward pass for a batch.
    More layers ``at_once`` take more memory (4 bytes a weight) and fewer passes.
    """
    begin = partial(fed, lambda x: x.detach().requires_grad_())
    for group in torch.arange(lm.anatomy.n_layers).split(at_once):
        of_layer = [linears(lm, layer) for layer in group.tolist()]
        scores: dict[str, Tensor] = {}
        for rows in of.batches(batch_tokens):
            with torch.enable_grad(), ExitStack() as hooks:
                # nothing before the first of these layers needs gradients
                first = lm.model.get_submodule(lm.anatomy.layers[group[0]])
                hooks.enter_context(first.register_forward_pre_hook(begin, with_kwargs=True))
                for name, module in (item for layer in of_layer for item in layer.items()):
                    hooks.enter_context(module.register_forward_hook(partial(_score, name, scores, len(rows))))
                mean_nll(lm, of.ids[rows].to(lm.device), of.counted[rows]).sum().backward()
        yield from ({name: scores.pop(name) for name in names} for names in of_layer)


def _score(name: str, scores: dict[str, Tensor], rows: int, module: nn.Module, args: tuple, output: Tensor) -> None:
    """A forward hook that adds a module's scores when the gradient of its output comes back."""
    inputs = args[0].detach()

    def add(gradient: Tensor) -> None:
        weight = weight_of(module).detach().float()
        total = scores.setdefault(name, torch.zeros_like(weight))
        # one example: (tokens, out) and (tokens, in); OPT flattens examples and tokens
        for g, i in zip(gradient.float().chunk(rows), inputs.float().chunk(rows), strict=True):
            total += (weight * (g.flatten(0, -2).T @ i.flatten(0, -2))).abs()

    output.register_hook(add)


def part_snip(lm: LM, of: Examples, parts: str = "units", *, batch_tokens: int = 2048) -> np.ndarray:
    """Σ over examples |∂L/∂mask| of every MLP unit or head at mask = 1, SNIP of a part: (layers, parts) float64."""

    def size(rows: Tensor) -> np.ndarray:  # batch by batch, since all examples' slopes may not fit
        batch, counted = [(torch.arange(len(rows)), of.ids[rows])], of.counted[rows]
        slopes = mask_gradients(lm, batch, lambda n, ids: mean_nll(lm, ids, counted[n]), len(rows), parts)
        return np.abs(slopes.astype(np.float64)).sum(0)

    return sum(map(size, of.batches(batch_tokens)))


def part_wanda(lm: LM, norms: Mapping[str, Tensor], parts: str = "units") -> np.ndarray:
    """Wanda of every MLP unit or head: √ Σ_j ‖column j of the last projection‖² · norm_j, (layers, parts)."""
    modules, width = (lm.anatomy.out_projs, lm.anatomy.head_dim) if parts == "heads" else (unit_projections(lm), 1)
    columns = [weight_of(lm.model.get_submodule(n)).double().square().sum(0).cpu() * norms[n] for n in modules]
    return torch.stack(columns).view(len(modules), -1, width).sum(-1).sqrt().numpy()


def top_share(score: Tensor, share: float, per_row: bool = False) -> Tensor:
    """The int(share · n) highest of a matrix, or of every row: bool, of the same shape."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} isn't between 0 and 1.")
    flat = score if per_row else score.reshape(1, -1)
    highest = flat.topk(int(share * flat.shape[1] + 1e-9), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, highest, True).view(score.shape)


def set_difference(
    bias: Tensor, protect: Sequence[Tensor], p: float, q: Sequence[float], per_row: bool = False
) -> Tensor:
    """Top p of the bias score, minus the top q of every score to protect (Wei et al., ICML 2024): bool."""
    chosen = top_share(bias, p, per_row)
    for score, share in zip(protect, q, strict=True):
        chosen &= ~top_share(score, share, per_row)
    return chosen


def weight_difference(
    lm: LM,
    sets: Sequence[Examples],
    shares: Sequence[tuple[float, Sequence[float]]],
    *,
    score: str = "snip",
    rule: str = "corrected",
    per_row: bool = False,
    batch_tokens: int = 2048,
) -> list[Pruning]:
    """Single weights that score high on the first set of examples and on none of the others, matrix by matrix.

    shares: Pairs (p, q): the top p on the first set minus the top q on each other. One pruning for each pair.
    score: "snip" or "wanda", of the rule of ``input_norms``.
    """
    layers = range(lm.anatomy.n_layers)
    if score == "wanda":
        norms = [input_norms(lm, x, rule=rule) for x in sets]
        per_layer = ([wanda(lm, n, layer) for n in norms] for layer in layers)
    else:
        largest = max(sum(m.weight.numel() for m in linears(lm, layer).values()) for layer in layers)
        at_once = max(1, 2**31 // (4 * largest * len(sets)))  # as many layers as 2 GiB hold
        per_layer = zip(*(snip(lm, x, at_once=at_once, batch_tokens=batch_tokens) for x in sets), strict=True)
    chosen: list[dict[str, Tensor]] = [{} for _ in shares]
    for first, *others in per_layer:
        for name in first:
            for one, (p, q) in zip(chosen, shares, strict=True):
                mask = set_difference(first[name], [o[name] for o in others], p, q, per_row)
                one[name] = mask.flatten().nonzero()[:, 0].cpu()
    return [Pruning(weights=weights) for weights in chosen]
