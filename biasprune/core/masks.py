"""What is removed from a model, and how: one form of a pruning, one context manager.

A head is removed by zeroing its slice of the *input* of the attention output projection. Nothing inside attention is
touched, so this works with every attention kernel, cache and grouped queries. MLP units are removed at the input of the
down projection, single weights in their matrix. ``ablating`` puts something else than zero in their place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from biasprune.core.data import choose
from biasprune.core.model import LM, Anatomy, anatomy, query_projections, unit_projections, weight_of


@dataclass(frozen=True, eq=False)
class Pruning:
    """Heads, MLP units and single weights to remove. Hashable; ``&``, ``|`` and ``-`` as for sets."""

    heads: frozenset[int] = frozenset()  # flat indices, layer · n_heads + head
    units: frozenset[int] = frozenset()  # flat indices, layer · n_units + unit
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # module → sorted flat indices into (out, in), int64

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", frozenset(map(int, self.heads)))
        object.__setattr__(self, "units", frozenset(map(int, self.units)))

    @cached_property
    def text(self) -> str:
        """ "" for nothing, "3 17" for heads, "u5 u9" for units, "w:digest:number" for weights."""
        parts = [str(h) for h in sorted(self.heads)] + [f"u{u}" for u in sorted(self.units)]
        if n := sum(map(len, self.weights.values())):
            digest = hashlib.sha256()
            for name, index in sorted(self.weights.items()):
                digest.update(name.encode() + index.numpy().tobytes())
            parts.append(f"w:{digest.hexdigest()[:16]}:{n}")
        return " ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Pruning:
        """The inverse of ``text``, for heads and units; a digest of weights can't be turned back."""
        if "w:" in text:
            raise ValueError(f"{text!r} stands for single weights: select them again.")
        words = text.split()
        heads, units = [w for w in words if w[0] != "u"], [w[1:] for w in words if w[0] == "u"]
        return cls(frozenset(map(int, heads)), frozenset(map(int, units)))

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pruning) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __len__(self) -> int:
        """Number of heads, units and weights removed."""
        return len(self.heads) + len(self.units) + sum(map(len, self.weights.values()))

    def __and__(self, other: Pruning) -> Pruning:
        common = {n: i[torch.isin(i, other.weights[n])] for n, i in self.weights.items() if n in other.weights}
        return Pruning(self.heads & other.heads, self.units & other.units, common)

    def __or__(self, other: Pruning) -> Pruning:
        both = (self.weights, other.weights)
        either = {n: torch.cat([w[n] for w in both if n in w]).unique() for n in {**both[0], **both[1]}}
        return Pruning(self.heads | other.heads, self.units | other.units, either)

    def __sub__(self, other: Pruning) -> Pruning:
        rest = {n: i[~torch.isin(i, other.weights[n])] if n in other.weights else i for n, i in self.weights.items()}
        return Pruning(self.heads - other.heads, self.units - other.units, rest)

    def like(self, lm: LM, seed: int) -> Pruning:
        """A matched control: as many parts of every layer, or weights of every matrix, drawn uniformly."""
        generator = torch.Generator().manual_seed(seed)

        def shuffled(parts: frozenset[int], n: int) -> frozenset[int]:
            if not parts:
                return parts
            drawn = [row[torch.randperm(n, generator=generator)] for row in _removed(parts, lm.anatomy.n_layers, n)]
            return frozenset(torch.cat(drawn).nonzero()[:, 0].tolist())

        heads, units = shuffled(self.heads, lm.anatomy.n_heads), shuffled(self.units, lm.anatomy.n_units)
        weights = {}
        for name, index in self.weights.items():
            n, size = len(index), weight_of(lm.model.get_submodule(name)).numel()
            drawn = torch.randint(size, (n + n // 8 + 64,), generator=generator).unique()
            while len(drawn) < n:  # a large share of the matrix
                drawn = torch.cat([drawn, torch.randint(size, (n,), generator=generator)]).unique()
            weights[name] = drawn[torch.randperm(len(drawn), generator=generator)[:n]].sort().values
        return Pruning(heads, units, weights)


def _removed(parts: frozenset[int], layers: int, n: int) -> Tensor:
    """Flat indices → bool (layers, n), True where removed."""
    if outside := [p for p in parts if not 0 <= p < layers * n]:
        raise ValueError(f"part {outside[0]} is outside the model: it has {layers * n} of its kind, from 0 on.")
    return torch.isin(torch.arange(layers * n), torch.tensor(sorted(parts), dtype=torch.int64)).view(layers, n)


def _hook(mask: Tensor, mean: Tensor | None = None, *, output: bool = False) -> Callable:
    """Multiply a projection's input or output (batch rows, tokens, width) by mask (rows, width); ``mean`` fills up."""
    scale, fill = mask[:, None], None if mean is None else (1 - mask[:, None]) * mean.to(mask)

    def apply(x: Tensor) -> Tensor:
        nonlocal scale, fill
        # with fewer masks each is for as many rows in turn: of one prompt's continuations, or OPT's flattened tokens
        if len(x) % len(scale):
            raise ValueError(f"prunings for {len(scale)} rows, but the batch has {len(x)}.")
        # moved once, to where this layer computes; as an inference tensor a later backward pass couldn't use it
        with torch.inference_mode(False):
            scale, fill = scale.to(x.device, x.dtype), None if fill is None else fill.to(x.device, x.dtype)
        scaled = x.reshape(len(scale), -1, x.shape[-1]) * scale
        return (scaled if fill is None else scaled + fill).view(x.shape)

    if output:
        return lambda module, args, out: apply(out)
    return lambda module, args: (apply(args[0]), *args[1:])


def scales(a: Anatomy, heads: Tensor | None, units: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Projections that masks (rows, layers, parts) change, and what their input is multiplied by (rows, width)."""
    for mask, width, modules in ((heads, a.head_dim, a.out_projs), (units, 1, a.down_projs)):
        for i, name in enumerate(modules if mask is not None else ()):
            layer = mask[:, i]
            if layer.requires_grad or not bool((layer == 1).all()):
                yield name, layer.repeat_interleave(width, dim=-1)


def _query_scales(lm: LM, heads: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Query projections, and what their output is multiplied by: without a query, attention is uniform."""
    if heads.requires_grad:
        raise ValueError("uniform ablation has no first-order effects: remove the heads one by one (exact).")
    for i, name in enumerate(query_projections(lm)):
        mask = heads[:, i].repeat_interleave(lm.anatomy.head_dim, dim=-1)
        if name.endswith("c_attn"):  # GPT-2: q, k, v
            mask = torch.cat([mask, torch.ones_like(mask).repeat(1, 2)], -1)
        elif name.endswith("query_key_value"):  # GPT-NeoX: heads · (q, k, v)
            q = mask.unflatten(-1, (-1, 1, lm.anatomy.head_dim))
            mask = torch.cat([q, torch.ones_like(q).repeat(1, 1, 2, 1)], 2).flatten(1)
        if not bool((mask == 1).all()):
            yield name, mask


@contextmanager
def scaled(lm: LM, heads: Tensor | None = None, units: Tensor | None = None) -> Iterator[None]:
    """Run the model with parts multiplied by masks (rows or 1, layers, parts), which may require gradients."""
    if units is not None:
        unit_projections(lm)
    with ExitStack() as hooks:
        if lm.uniform and heads is not None:
            for name, scale in _query_scales(lm, heads):
                hooks.enter_context(lm.model.get_submodule(name).register_forward_hook(_hook(scale, output=True)))
            heads = None
        for at, scale in scales(lm.anatomy, heads, units):
            hooks.enter_context(lm.model.get_submodule(at).register_forward_pre_hook(_hook(scale, lm.means.get(at))))
        yield


@torch.no_grad()
def ablating(lm: LM, how: str, ids: Tensor) -> LM:
    """The same model, in which removed parts are replaced by ``how``; for weights nothing changes.

    "zero"; "mean": by their mean over a text's tokens ids (rows, tokens); "uniform": heads by their mean value over the
    tokens that they may attend to, since they lose their queries, and MLP units by zero.
    """
    choose(how, ("zero", "mean", "uniform"), "ablation")
    if how == "uniform":
        query_projections(lm)
    means: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in (*lm.anatomy.out_projs, *lm.anatomy.down_projs) if how == "mean" else ():

            def keep(module: nn.Module, args: tuple, name: str = name) -> None:
                means[name] = means.get(name, 0.0) + args[0].flatten(0, -2).float().sum(0) / ids.numel()

            hooks.enter_context(lm.model.get_submodule(name).register_forward_pre_hook(keep))
        for rows in ids.split(8) if how == "mean" else ():
            lm.model.base_model(rows.to(lm.device), use_cache=False)
    return replace(lm, means=means, uniform=how == "uniform")


@contextmanager
def without_weights(lm: LM, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with single weights at zero."""
    kept: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []
    try:
        with torch.no_grad():
            for name, index in weights.items():
                weight = weight_of(lm.model.get_submodule(name))
                place = torch.unravel_index(index.to(weight.device), weight.shape)
                kept.append((weight, place, weight[place]))
                weight[place] = 0
        yield
    finally:
        with torch.no_grad():
            for weight, place, values in kept:
                weight[place] = values


def keep_masks(a: Anatomy, prunings: Sequence[Pruning], rows: Tensor | None = None) -> dict[str, Tensor | None]:
    """Masks of several prunings, 1 where a part stays: heads and units (rows, layers, parts), None where all stay."""
    masks: dict[str, Tensor | None] = {"heads": None, "units": None}
    for what, n in (("heads", a.n_heads), ("units", a.n_units)):
        if any(gone := [getattr(p, what) for p in prunings]):
            mask = torch.stack([~_removed(parts, a.n_layers, n) for parts in gone]).float()
            masks[what] = mask if rows is None else mask[rows]
    return masks


@contextmanager
def masked(lm: LM, prunings: Pruning | Sequence[Pruning], rows: Tensor | None = None) -> Iterator[None]:
    """Run the model pruned, inside the ``with`` block only; it leaves as it came, also after an exception.

    One pruning serves all rows of a batch; of several, ``rows`` (batch rows,) says which each row has, None in order.
    ValueError: a part outside the model, rows that don't fit the batch, or single weights that differ by row.
    """
    prunings = [prunings] if isinstance(prunings, Pruning) else list(prunings)
    if any(p.weights for p in prunings) and len(set(prunings)) > 1:
        raise ValueError("prunings of single weights can't share a batch: run them one at a time.")
    with scaled(lm, **keep_masks(lm.anatomy, prunings, rows)), without_weights(lm, prunings[0].weights):
        yield


@torch.no_grad()
def cut(model: nn.Module, pruning: Pruning) -> None:
    """Remove heads and units from a model for good: what reads them becomes zero, and they get no gradient."""
    a = anatomy(model)
    for name, scale in scales(a, **keep_masks(a, [pruning])):
        module = model.get_submodule(name)
        weight_of(module).mul_(scale.to(module.weight))
        module.register_forward_pre_hook(_hook(scale))
