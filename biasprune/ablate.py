"""The one primitive: masks on heads and MLP units, and the export of a pruned checkpoint.

A head is removed by zeroing its slice of the *input* of the attention output projection. That
works with every attention kernel, with key/value caches and with grouped queries, since nothing
inside attention is touched. (Masking the projection's output would mask nothing that belongs to
one head.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from biasprune.lm import LM, Anatomy, weight_of
from biasprune.lm import anatomy as anatomy_of


def head_mask(anatomy: Anatomy, heads: Iterable[int]) -> Tensor:
    """The mask that removes some heads.

    Parameters
    ----------
    heads
        Flat indices, layer · n_heads + head.

    Returns
    -------
    Tensor
        float32, (layers, heads): 0 where a head is removed, else 1.

    Raises
    ------
    ValueError
        If an index is not an integer in 0 … layers · heads − 1.
    """
    mask = torch.ones(anatomy.n_flat)
    for h in heads:
        # True would count as head 1: what is meant is a mask
        if isinstance(h, bool) or not isinstance(h, int | np.integer) or not 0 <= h < anatomy.n_flat:
            raise ValueError(f"head {h!r} is not a flat index in 0 … {anatomy.n_flat - 1}.")
        mask[h] = 0
    return mask.view(anatomy.n_layers, anatomy.n_heads)


def head_masks(anatomy: Anatomy, sets: Iterable[Iterable[int]]) -> Tensor:
    """Masks of several head sets, stacked: (sets, layers, heads)."""
    if not (masks := [head_mask(anatomy, s) for s in sets]):
        raise ValueError("no sets of heads: give at least one; an empty set removes nothing.")
    return torch.stack(masks)


def _check(mask: Tensor, layers: int, width: int, what: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask of {what} is {type(mask).__name__}: give a torch tensor, as head_mask makes.")
    if mask.dim() not in (2, 3) or tuple(mask.shape[-2:]) != (layers, width):
        raise ValueError(
            f"mask of {what} has shape {tuple(mask.shape)}; expected ({layers}, {width}) or "
            f"(rows, {layers}, {width})."
        )
    if not mask.isfinite().all():
        raise ValueError(f"mask of {what} holds NaN or infinity.")
    return mask if mask.dim() == 3 else mask[None]


def _hook(mask: Tensor) -> Callable:
    """A pre-hook that multiplies a projection's input (B, T, width) by mask (1 or B, width)."""
    scale = mask[:, None]

    def pre_hook(module: nn.Module, args: tuple) -> tuple:
        nonlocal scale
        x = args[0]
        rows = len(scale)
        flattened = x.dim() == 2 and rows > 1 and len(x) % rows == 0  # OPT's MLPs: (B · T, width)
        if rows not in (1, len(x)) and not flattened:
            raise ValueError(f"mask has {rows} rows, but the batch has {len(x)}.")
        # moved once, to wherever this layer computes; not as an inference tensor, which a later backward
        # pass inside the same block couldn't use
        with torch.inference_mode(False):
            scale = scale.to(x.device, x.dtype)
        split = x.view(rows, -1, x.shape[-1]) if flattened else x
        return ((split * scale).view(x.shape), *args[1:])

    return pre_hook


def _scales(a: Anatomy, heads: Tensor | None, units: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Projections that a mask changes, and what their input is multiplied by (rows, width)."""
    for mask, width, repeat, modules, what in (
        (heads, a.n_heads, a.head_dim, a.out_projs, "heads"),
        (units, a.n_units, 1, a.down_projs, "units"),
    ):
        if mask is None:
            continue
        mask = _check(mask, a.n_layers, width, what)
        for i, name in enumerate(modules):
            layer = mask[:, i]
            if layer.requires_grad or not bool((layer == 1).all()):
                yield name, layer.repeat_interleave(repeat, dim=-1)


@contextmanager
def masked(lm: LM, heads: Tensor | None = None, units: Tensor | None = None) -> Iterator[None]:
    """Run the model with heads or MLP units scaled; inside the ``with`` block only.

    The model leaves as it came, also after an exception. Masks may require gradients. Masks on the
    CPU are looked at without making a GPU wait.

    Parameters
    ----------
    heads
        (layers, heads) for every row alike, or (rows, layers, heads), one mask per batch row.
    units
        (layers, units) or (rows, layers, units): MLP units, scaled at the down projection's input.

    Raises
    ------
    ValueError
        If a mask's shape doesn't fit the model, holds NaN, or its rows don't fit the batch.
    """
    handles = []
    try:
        for name, scale in _scales(lm.anatomy, heads, units):
            module = lm.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(_hook(scale)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def zeroed(lm: LM, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with single weights set to zero; inside the ``with`` block only.

    Parameters
    ----------
    weights
        Module name → what is removed: bool (out, in), or flat indices into (out, in). The removed
        values and their indices (8 bytes each) are kept aside, on the model's device.

    Raises
    ------
    ValueError
        No such module; a mask's shape isn't that of the module's weight as (out, in); an index lies outside.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def at(weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return index // weight.shape[1], index % weight.shape[1]

    known = dict(lm.model.named_modules())
    try:
        with torch.no_grad():
            for name, removed in weights.items():
                if not isinstance(getattr(known.get(name), "weight", None), Tensor):
                    raise ValueError(f"no module {name!r} with a weight in {type(lm.model).__name__}.")
                if removed.is_floating_point():
                    raise ValueError(
                        f"{name}: give a bool mask or whole-number indices, not {removed.dtype}."
                    )
                weight = weight_of(known[name])
                if removed.dtype == torch.bool:
                    if removed.shape != weight.shape:
                        raise ValueError(
                            f"{name}: mask {tuple(removed.shape)} for a weight {tuple(weight.shape)}."
                        )
                    removed = removed.flatten().nonzero()[:, 0]
                if len(removed) and not 0 <= int(removed.min()) <= int(removed.max()) < weight.numel():
                    raise ValueError(f"{name}: an index outside a weight {tuple(weight.shape)}.")
                removed = removed.to(weight.device)
                kept.append((weight, removed, weight[at(weight, removed)]))
                weight[at(weight, removed)] = 0
        yield
    finally:
        with torch.no_grad():
            for weight, removed, values in kept:
                weight[at(weight, removed)] = values


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is removed from a model: heads, MLP units, or single weights.

    Attributes
    ----------
    heads, units
        bool (layers, heads) and (layers, units), True where removed; None for none.
    weights
        Module name → flat indices into the weight as (out, in), sorted.
    """

    heads: Tensor | None = None
    units: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def applied(self, lm: LM) -> Iterator[None]:
        """Run the model pruned; inside the ``with`` block only."""
        heads, units = (None if x is None else (~x).float() for x in (self.heads, self.units))
        with masked(lm, heads, units), zeroed(lm, self.weights):
            yield

    def __len__(self) -> int:
        """Number of heads, units and weights removed."""
        masks = sum(int(x.sum()) for x in (self.heads, self.units) if x is not None)
        return masks + sum(len(i) for i in self.weights.values())

    def __and__(self, other: Pruning) -> Pruning:
        """What both remove."""
        heads, units = (
            None if x is None or y is None else x & y
            for x, y in ((self.heads, other.heads), (self.units, other.units))
        )
        common = self.weights.keys() & other.weights.keys()
        both = {
            n: (i := self.weights[n])[torch.isin(i, other.weights[n])] for n in self.weights if n in common
        }
        return Pruning(heads=heads, units=units, weights=both)

    def __or__(self, other: Pruning) -> Pruning:
        """What either removes."""
        heads, units = (
            y if x is None else x if y is None else x | y
            for x, y in ((self.heads, other.heads), (self.units, other.units))
        )
        all_ = {
            n: [w[n] for w in (self.weights, other.weights) if n in w]
            for n in {**self.weights, **other.weights}
        }
        return Pruning(heads=heads, units=units, weights={n: torch.cat(i).unique() for n, i in all_.items()})

    def random(self, lm: LM | None, seed: int) -> Pruning:
        """A control: as many removed from every layer or matrix, drawn uniformly.

        ``lm`` is asked for the sizes of matrices, where single weights are removed; else it may be None.
        """
        generator = torch.Generator().manual_seed(seed)

        def shuffled(mask: Tensor | None) -> Tensor | None:
            if mask is None:
                return None
            return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in mask])

        drawn = {}
        for name, removed in self.weights.items():
            n, size = len(removed), weight_of(lm.model.get_submodule(name)).numel()
            few = torch.randint(size, (n + n // 8 + 64,), generator=generator).unique()
            while len(few) < n:  # a large share: draw until there are enough
                few = torch.cat([few, torch.randint(size, (n,), generator=generator)]).unique()
            drawn[name] = few[torch.randperm(len(few), generator=generator)[:n]].sort().values
        return Pruning(heads=shuffled(self.heads), units=shuffled(self.units), weights=drawn)


@torch.no_grad()
def cut(model: nn.Module, pruning: Pruning) -> None:
    """Remove heads and units for good, also while the model is trained on. Changes the model.

    Their weights in the output projections become zero, so that a checkpoint is pruned for plain
    transformers too. What goes into them is zeroed by a hook, so that they get no gradient.

    Parameters
    ----------
    model
        A decoder with any head, such as a classifier's.

    Raises
    ------
    ValueError
        If the model isn't a decoder of a known architecture, masks don't fit it, or single weights are
        to be removed.
    """
    if pruning.weights:
        raise ValueError("single weights can't be cut for good: give heads or units.")
    heads, units = (None if x is None else (~x).float() for x in (pruning.heads, pruning.units))
    for name, scale in _scales(anatomy_of(model), heads, units):
        module = model.get_submodule(name)
        weight = weight_of(module)
        weight *= scale.to(weight)
        module.register_forward_pre_hook(_hook(scale))


def first_masked_layer(masks: Tensor) -> list[int]:
    """The layer at which each pass may start: (masks, layers, heads) → one layer per mask.

    The last layer for a mask of ones; 0 for all where fewer than three masks would share the clean
    pass, which then costs more than it saves.
    """
    if len(masks) < 3:
        return [0] * len(masks)
    touched = (masks != 1).any(-1)  # (masks, layers)
    return torch.where(touched.any(1), touched.int().argmax(1), masks.shape[1] - 1).tolist()


@dataclass
class CleanPass:
    """What an unmodified forward pass leaves for later passes to start from.

    Attributes
    ----------
    hidden
        Layer → its input (rows, tokens, width), for the layers that were asked for.
    returns_tuple
        Whether this architecture's layers return a tuple.
    last
        Output of the last norm (rows, tokens, width), if it was asked for.
    """

    hidden: dict[int, Tensor]
    returns_tuple: bool = False
    last: Tensor | None = None


@contextmanager
def recorded(lm: LM, layers: Iterable[int]) -> Iterator[CleanPass]:
    """Keep the inputs of some layers during the next forward pass, to ``resumed`` from."""
    clean = CleanPass({})
    handles = []

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            clean.hidden[layer] = args[0] if args else kwargs["hidden_states"]
            clean.returns_tuple = isinstance(output, tuple)

        return hook

    try:
        for layer in set(layers):
            module = lm.model.get_submodule(lm.anatomy.layers[layer])
            handles.append(module.register_forward_hook(keep(layer), with_kwargs=True))
        yield clean
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(lm: LM, layer: int, hidden: Tensor, returns_tuple: bool) -> Iterator[None]:
    """Start forward passes at a layer: those below it cost nothing and ``hidden`` is its input.

    Ablating a head changes nothing below its layer, so such a pass gives what a full one would.
    Everything around the layers (masks, positions, norms, unembedding) is still the model's own.
    For passes without a key/value cache; ``hidden`` is (rows, tokens, width).
    """
    skipped = [lm.model.get_submodule(name) for name in lm.anatomy.layers[:layer]]

    def skip(module: nn.Module) -> Callable:
        def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple:
            out = hidden if module is skipped[-1] else hidden_states
            return (out,) if returns_tuple else out

        return forward

    before = [m.__dict__.get("forward") for m in skipped]
    try:
        for module in skipped:
            module.forward = skip(module)
        yield
    finally:
        for module, own in zip(skipped, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:  # accelerate had put its own there
                module.forward = own


@dataclass(frozen=True)
class Start:
    """Where a masked pass over some rows begins: after the layers that its masks leave alone."""

    lm: LM
    layer: int
    clean: CleanPass

    @contextmanager
    def __call__(self, masks: Tensor, rows: Tensor) -> Iterator[None]:
        """Run the model on these rows of the clean pass under masks (rows, layers, heads)."""
        with ExitStack() as stack:
            if self.layer:
                hidden = self.clean.hidden[self.layer]
                start = hidden[rows.to(hidden.device)]
                stack.enter_context(resumed(self.lm, self.layer, start, self.clean.returns_tuple))
            stack.enter_context(masked(self.lm, masks))
            yield


def passes(
    lm: LM,
    masks: Tensor,
    ids: Tensor,
    rows: int,
    *,
    cache: transformers.DynamicCache | None = None,
    last: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Start]]:
    """Every pair of a mask and a row of ids, in batches that begin at one layer.

    One clean pass over ids (rows, tokens) serves all masks (masks, layers, heads); into ``cache`` go
    its keys and values, with ``last`` its last hidden state into ``Start.clean``. Yields the pairs'
    mask and row numbers, and where to ``Start``.
    """
    a = lm.anatomy
    if masks.dim() != 3 or tuple(masks.shape[1:]) != (a.n_layers, a.n_heads):
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}; expected (masks, {a.n_layers}, {a.n_heads})."
        )
    start = first_masked_layer(masks)
    with recorded(lm, set(start) - {0}) as clean:
        if last or any(start):
            out = lm.model.base_model(ids, past_key_values=cache, use_cache=cache is not None)
            clean.last = out.last_hidden_state if last else None
    for layer in sorted(set(start)):
        here = torch.tensor([i for i, s in enumerate(start) if s == layer])
        for pair in torch.cartesian_prod(here, torch.arange(len(ids))).split(max(1, rows)):
            yield pair[:, 0], pair[:, 1], Start(lm, layer, clean)


def in_halves(run: Callable[..., None], *index: Tensor) -> None:
    """``run(*index)``; if that runs out of memory, again on the first and the second half."""
    try:
        run(*index)
        return
    except torch.OutOfMemoryError:
        if len(index[0]) == 1:
            raise
    # retried outside the handler, which would keep the failed batch alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(index[0]) // 2
    in_halves(run, *(i[:middle] for i in index))
    in_halves(run, *(i[middle:] for i in index))


def export(lm: LM, heads: Iterable[int], folder: str | Path) -> Path:
    """Save a checkpoint with heads pruned, that plain transformers loads.

    The heads' columns of the output projections are zero in the saved copy; shapes stay as they
    are, since grouped queries leave no way to cut a single query head out of a stock architecture.
    ``biasprune.json`` in the folder lists the heads. The model in memory isn't changed.

    Raises
    ------
    ValueError
        If a head index is out of range.
    FileExistsError
        If the folder exists and isn't empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} isn't empty; give a new folder.")
    pruned = sorted({int(h) for h in heads})
    mask = head_mask(lm.anatomy, pruned)
    state = lm.model.state_dict()
    for name, row in zip(lm.anatomy.out_projs, mask, strict=True):
        if bool((row == 1).all()):
            continue
        weight = state[f"{name}.weight"]
        scale = row.repeat_interleave(lm.anatomy.head_dim).to(weight)
        conv = isinstance(lm.model.get_submodule(name), transformers.pytorch_utils.Conv1D)
        state[f"{name}.weight"] = weight * (scale[:, None] if conv else scale)
    lm.model.save_pretrained(folder, state_dict=state)
    lm.tokenizer.save_pretrained(folder)
    record = {"base": lm.name, "revision": lm.revision, "pruned_heads": pruned}
    (folder / "biasprune.json").write_text(json.dumps(record, indent=1))
    return folder
