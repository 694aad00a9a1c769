"""Teacher-forced passes that begin at the first pruned layer.

Removing parts of a layer changes nothing below it, so one clean pass serves many prunings: each starts from the clean
input of its first pruned layer. Notebook 07 measures what that saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from biasprune.core.masks import Pruning, masked
from biasprune.core.model import LM

Start = Callable[[Tensor, Tensor], AbstractContextManager[None]]  # of pairs' pruning and row numbers


def first_layer(lm: LM, pruning: Pruning) -> int:
    """The layer at which a pruned pass may start: the last one where nothing is removed."""
    a = lm.anatomy
    layers = [h // a.n_heads for h in pruning.heads] + [u // max(1, a.n_units) for u in pruning.units]
    return 0 if pruning.weights else min([*layers, a.n_layers - 1])  # parts that aren't there: ``masked`` refuses them


@contextmanager
def _resumed(lm: LM, layer: int, hidden: Tensor, returns_tuple: bool) -> Iterator[None]:
    """Skip the layers below one, whose input is ``hidden``; all around the layers is still the model's own."""
    skipped = [lm.model.get_submodule(name) for name in lm.anatomy.layers[:layer]]

    def forward(*args: object, **kwargs: object) -> Tensor | tuple:
        return (hidden,) if returns_tuple else hidden

    before = [m.__dict__.get("forward") for m in skipped]
    try:
        for module in skipped:
            module.forward = forward
        yield
    finally:
        for module, own in zip(skipped, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:  # accelerate's
                module.forward = own


@dataclass
class _CleanPass:
    """What an unpruned pass over some rows leaves for pruned ones to start from."""

    lm: LM
    inputs: dict[int, Tensor] = field(default_factory=dict)  # layer → (rows, tokens, width)
    returns_tuple: bool = False  # whether this architecture's layers do
    hands_on: bool = False  # more than hidden states, such as what the next layer may attend to

    def keep(self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        """A forward hook of that layer."""
        self.inputs[layer] = args[0] if args else kwargs["hidden_states"]
        self.returns_tuple = isinstance(output, tuple | list)
        self.hands_on = self.returns_tuple and any(isinstance(more, Tensor) for more in output[1:])

    @contextmanager
    def start(self, layer: int, prunings: Sequence[Pruning], pruning: Tensor, row: Tensor) -> Iterator[None]:
        """Run the model from a layer on, on these rows, each under the pruning of its number."""
        with ExitStack() as stack:
            if layer:
                hidden = self.inputs[layer][row.to(self.inputs[layer].device)]
                stack.enter_context(_resumed(self.lm, layer, hidden, self.returns_tuple))
            used, place = pruning.unique(return_inverse=True)
            stack.enter_context(masked(self.lm, [prunings[i] for i in used.tolist()], place))
            yield


def passes(lm: LM, prunings: Sequence[Pruning], ids: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Start]]:
    """Every pair of a pruning and a row of ids (rows, tokens), in batches of ``rows`` that begin at one layer.

    Yields the pairs' pruning and row numbers, and how to ``Start``. For passes without a key/value cache.
    """
    starts = [first_layer(lm, p) if len(prunings) > 2 else 0 for p in prunings]  # two don't pay for a clean pass
    clean = _CleanPass(lm)
    with ExitStack() as hooks:
        for layer in set(starts) - {0}:
            module = lm.model.get_submodule(lm.anatomy.layers[layer])
            hooks.enter_context(module.register_forward_hook(partial(clean.keep, layer), with_kwargs=True))
        if any(starts):
            lm.model.base_model(ids, use_cache=False)
    starts = [0] * len(starts) if clean.hands_on else starts
    for layer in sorted(set(starts)):
        here = torch.tensor([i for i, start in enumerate(starts) if start == layer])
        pairs = torch.cartesian_prod(here, torch.arange(len(ids)))
        # prunings of single weights can't share a batch
        size = len(ids) if any(prunings[i].weights for i in here.tolist()) else max(1, rows)
        for pair in pairs.split(size):
            yield pair[:, 0], pair[:, 1], partial(clean.start, layer, prunings)
