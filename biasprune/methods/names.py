"""Methods that look at the name itself: heads by attention to it, and one direction erased from the hidden states."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from os.path import commonprefix

import numpy as np
import torch
from torch import Tensor

from biasprune.core.masks import Pruning, masked
from biasprune.core.model import LM, encode, equal_lengths
from biasprune.core.weights import fed
from biasprune.measures.choices import Choices
from biasprune.measures.numbers import Numbers
from biasprune.methods.parts import Method

Directions = Sequence[tuple[Tensor, Tensor]]  # per layer a unit vector, and the point between the groups: (width,) each
_NAMES = 8  # of either group, per question: attention and directions hardly differ between names


@lru_cache(maxsize=8)
def _asked(lm: LM, measure: Numbers) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Prompts with the model's own answers, as token ids; and where name, name's end and answer begin; their groups."""
    table = measure.own_answers(lm).groupby(["question", "group"], sort=False).head(_NAMES)
    places = []
    for row in table.itertuples():
        (*_, name) = re.finditer(rf"\b{re.escape(row.cluster)}\b", row.prompt)
        begins = encode(lm, [row.prompt[: name.start()], row.prompt[: name.end()]], special=not measure.asking.chat)
        places.append([*(len(commonprefix([b, row.ids])) for b in begins), len(row.ids)])
    ids = [p + a for p, a in zip(table["ids"], table["answer"], strict=True)]
    return ids, np.array(places), table["group"].to_numpy()


@torch.inference_mode()
def attention_to_names(lm: LM, measure: Numbers, pruning: Pruning) -> np.ndarray:
    """Attention to the name's tokens from where an answer's tokens are written, mean over prompts: (layers, heads).

    Of the model under a pruning, for eight names of either group per question, with the unpruned model's own answers.
    Source: the public notebook of Ma et al. (commit 1eac22b), which samples answers anew for every score.
    """
    ids, places, _ = _asked(lm, measure)  # before the pruning
    total, kind = np.zeros((lm.anatomy.n_layers, lm.anatomy.n_heads)), lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")  # others don't tell their weights
    try:
        for rows, batch in equal_lengths(ids, 1024):
            with masked(lm, pruning):
                found = lm.model.base_model(batch.to(lm.device), output_attentions=True, use_cache=False).attentions
            for k, (name, end, answer) in enumerate(places[rows.numpy()]):
                each = [a[k, :, answer - 1 : -1, name:end].float().sum(-1).mean(-1) for a in found]
                total += torch.stack(each).cpu().numpy()
    finally:
        lm.model.set_attn_implementation(kind)
    return total / len(ids)


@lru_cache(maxsize=512)
def _greedy(lm: LM, measure: Numbers, n: int) -> tuple[int, ...]:
    if not n:
        return ()
    before = _greedy(lm, measure, n - 1)
    score = attention_to_names(lm, measure, Pruning(frozenset(before))).ravel()
    score[list(before)] = -np.inf
    return (*before, int(score.argmax()))


def by_attention(share: float) -> Method:
    """The share of heads that attends most to the name, one after the other, each time scored anew (Ma et al.)."""
    return lambda lm, measure: Pruning(frozenset(_greedy(lm, measure, int(share * lm.anatomy.n_flat))))


@lru_cache(maxsize=8)  # random ones go through the same points
@torch.inference_mode()
def directions(lm: LM, measure: Numbers | Choices) -> Directions:
    """Per layer, the direction in which two groups' mean hidden states differ.

    After names from the name's last token on; of choices, those with either stereotype, at the last token.
    """
    if isinstance(measure, Numbers):
        ids, places, group = _asked(lm, measure)
        begins = places[:, 1] - 1
    else:
        ids, group = encode(lm, measure.items["text"].tolist()), measure.items["stereotype"].to_numpy()
        begins = [len(i) - 1 for i in ids]
    sums = {g: 0.0 for g in dict.fromkeys(group)}
    for rows, batch in equal_lengths(ids, 2048):
        hidden = lm.model.base_model(batch.to(lm.device), output_hidden_states=True, use_cache=False).hidden_states
        for k, row in enumerate(rows.tolist()):
            each = [h[k, begins[row] :].double().mean(0).cpu() for h in hidden[: lm.anatomy.n_layers]]
            sums[group[row]] = sums[group[row]] + torch.stack(each)
    a, b = (total / (group == g).sum() for g, total in sums.items())
    unit = torch.nn.functional.normalize(a - b, dim=-1)
    return list(zip(unit.float(), ((a + b) / 2).float(), strict=True))


def random_like(found: Directions, seed: int) -> Directions:
    """A control: as many directions at random, through the same points."""
    drawn = torch.randn(len(found), len(found[0][0]), generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(drawn, dim=-1)
    return [(v, middle) for v, (_, middle) in zip(unit, found, strict=True)]


@contextmanager
def erased(lm: LM, found: Directions) -> Iterator[LM]:
    """The model with its layers' inputs at one point of a direction: x − ((x − middle) · v) v, at every token.

    Source: affine concept editing (Marshall et al. 2024), for hiring decisions Karvonen & Marks 2025.
    """

    def change(v: Tensor, middle: Tensor, x: Tensor) -> Tensor:
        v, middle = v.to(x), middle.to(x)
        return x - ((x - middle) @ v)[..., None] * v

    with ExitStack() as hooks:
        for name, (v, middle) in zip(lm.anatomy.layers, found, strict=True):
            hook = partial(fed, partial(change, v, middle))
            hooks.enter_context(lm.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        yield replace(lm)  # another one, since answers are kept for every model
