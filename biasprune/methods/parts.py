"""Methods: from a model and the measure to select with, to what is removed. Controls are methods, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import and_

import numpy as np
import torch

from biasprune.core import weights
from biasprune.core.masks import Pruning, masked
from biasprune.core.model import LM
from biasprune.measures.base import Measure
from biasprune.methods import select

Method = Callable[[LM, Measure], Pruning]


def of_parts(parts: str, chosen: np.ndarray | torch.Tensor | Sequence[int]) -> Pruning:
    """A pruning from flat indices of heads or units, or from a bool array (layers, parts)."""
    chosen = np.asarray(chosen)
    flat = chosen.ravel().nonzero()[0] if chosen.dtype == bool else chosen
    return Pruning(**{parts: frozenset(flat.tolist())})


@lru_cache(maxsize=32)
def effects(lm: LM, measure: Measure, parts: str) -> np.ndarray:
    """``Measure.effects`` of the model as it is, kept, since every share and control asks again: (layers, parts)."""
    return measure.effects(lm, parts).reshape(lm.anatomy.n_layers, -1)


def fasp(gamma: float, alpha: float, harm: np.ndarray) -> Method:
    """FASP's rule: the share α of heads that adds most to the bias, outside the share γ that matters most for prose.

    ``harm`` (layers, heads) says what matters for prose, such as z_ppl or ``core.weights.part_snip``.
    """

    def method(lm: LM, measure: Measure) -> Pruning:
        bias_without = -effects(lm, measure, "heads").ravel()
        return of_parts("heads", select.fasp(bias_without, harm.ravel(), gamma=gamma, alpha=alpha))

    return method


def by_slope(parts: str, share: float, *, protect: float, harm: np.ndarray) -> Method:
    """The share of heads or units that adds most to the bias to first order; only what adds to it.

    The share ``protect`` with the most ``harm`` (layers, parts) to prose stays.
    """

    def method(lm: LM, measure: Measure) -> Pruning:
        slope = torch.from_numpy(effects(lm, measure, parts))
        free = ~weights.top_share(torch.from_numpy(harm), protect) & (slope > 0)
        return of_parts(parts, weights.top_share(slope.masked_fill(~free, -torch.inf), share) & free)

    return method


@lru_cache(maxsize=8)  # every share asks again
def _examples(lm: LM, measure: Measure) -> tuple[weights.Examples, weights.Examples]:
    return measure.examples(lm)


@lru_cache(maxsize=32)  # every share and control asks for the prose again
def _score(lm: LM, of: weights.Examples, parts: str, score: str) -> np.ndarray:
    if score == "wanda":
        return weights.part_wanda(lm, weights.input_norms(lm, of), parts)
    return weights.part_snip(lm, of, parts)


def by_difference(
    parts: str, share: float, *, group: float, protect: float, prose: weights.Examples, score: str = "snip"
) -> Method:
    """What scores high on the texts whose behaviour is to go, and neither on those to stay nor on prose.

    parts: "heads" (chosen from the whole model), "units" (from every layer) or "weights" (from every matrix, by Wanda
        from every output row).
    group, protect: Shares protected for the texts to stay (in shares pruned) and for the prose.
    score: "snip" or "wanda".
    Source: Wei et al., ICML 2024; Ma et al., FAccT 2025.
    """

    def method(lm: LM, measure: Measure) -> Pruning:
        sets = [*_examples(lm, measure), prose]
        # of few heads at least one: a share of less than one would protect nothing
        least = 1.0 / lm.anatomy.n_flat + 1e-9 if parts == "heads" else 0.0
        q = (max(least, group * share), protect)
        if parts == "weights":
            return weights.weight_difference(lm, sets, [(share, q)], score=score, per_row=score == "wanda")[0]
        first, *others = (torch.from_numpy(_score(lm, x, parts, score)) for x in sets)
        return of_parts(parts, weights.set_difference(first, others, share, q, per_row=parts == "units"))

    return method


def as_published(share: float, column: str) -> Method:
    """Weights as in the public notebook of "Breaking Down Bias" (commit 1eac22b).

    Wanda over prompt and answer with every layer scored on the embeddings: the top share of every whole matrix for one
    group minus the other's, without prose; pruned in place, one value of ``column`` (a question) after the other.
    The notebook's share is .15.
    """

    def method(lm: LM, measure: Measure) -> Pruning:
        pruning, how = Pruning(), {"score": "wanda", "rule": "as_published"}
        for one in measure.split(column).values():
            sets = [x.with_prompts() for x in _examples(lm, one)]
            with masked(lm, pruning):
                (more,) = weights.weight_difference(lm, sets, [(share, (share,))], **how)
            pruning = pruning | more
        return pruning

    return method


def common(method: Method, column: str) -> Method:
    """What a method selects for every value of a column, such as all questions of a context: the intersection."""
    return lambda lm, measure: reduce(and_, (method(lm, one) for one in measure.split(column).values()))


def matched(method: Method, seed: int) -> Method:
    """A control: as many parts of the same layers or matrices as a method selects, at random."""
    return lambda lm, measure: method(lm, measure).like(lm, seed)


def relabelled(method: Method, seed: int | None = None) -> Method:
    """A control: the method with the groups swapped, or with a seed the clusters' labels shuffled."""
    return lambda lm, measure: method(lm, measure.relabelled(seed))
