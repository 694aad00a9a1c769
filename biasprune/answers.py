"""The model's distribution over numeric answers: a gap between names without sampling noise.

Sampled once, from the unpruned model over all names, the answers to a question name the numbers that
come into question. The probability of each is then read off for every name, so that names, and pruned
models, are compared by what they would answer on average, not by a few draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from biasprune import weightscores
from biasprune.ablate import in_halves, masked
from biasprune.audit import parse
from biasprune.decode import capped, check_unembedding, encode, top
from biasprune.lm import LM
from biasprune.progress import bar

Around = Callable[[int], AbstractContextManager]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Possible answers to one question.

    Attributes
    ----------
    tokens
        Token ids of each answer, up to the end of its number.
    values
        (answers,) what the numbers are.
    """

    tokens: list[tuple[int, ...]]
    values: np.ndarray


def candidates(
    lm: LM, answers: pd.DataFrame, *, most: int = 24, log: bool = True, strict: bool = True
) -> dict[tuple[str, str], Numbers]:
    """The numbers that were answered most often to every question, over all names.

    Parameters
    ----------
    answers
        Of ``audit.ask``, by the model whose distribution is wanted: a pruned one answers otherwise.
    most
        How many numbers to keep for each question. More cover more of what the model answers.
    log
        Whether logarithms are to be compared: zeros are then no candidates.
    strict
        False leaves questions without two different numbers out.

    Returns
    -------
    dict
        (context, variation) → its numbers, the most frequent first.

    Raises
    ------
    ValueError
        If a question has fewer than two different numbers among its answers, and ``strict`` is set.
    """
    found = {}
    for key, part in answers.groupby(["context", "variation"], sort=False):
        usable = (part["tokens"] != "") & ((part["value"] > 0) | (not log))
        counts = part.loc[usable, "tokens"].value_counts()
        kept = sorted(counts.index, key=lambda t: (-counts[t], t))[:most]
        tokens = [tuple(map(int, t.split())) for t in kept]
        values = np.array([parse(lm.tokenizer.decode(t, skip_special_tokens=True))[0] for t in tokens])
        if len(np.unique(values)) < 2:
            if not strict:
                continue
            shown = part["text"].iloc[0]
            raise ValueError(
                f"{', '.join(key)}: {len(np.unique(values))} different numbers among {len(part)} answers, "
                f"such as {shown!r}: ask otherwise (prefix, chat, suffix), more often, or another model."
            )
        found[key] = Numbers(tokens=tokens, values=values)
    return found


@dataclass(frozen=True)
class _Tree:
    """Answers of one question as rows of a batch; those that begin others share their row."""

    rows: Tensor  # (rows, steps), padded with 0
    row: Tensor  # (answers,) the row that holds it
    length: Tensor  # (answers,) number of tokens
    node: Tensor  # (rows, steps + 1) number of the text so far: rows that begin alike share it
    seen: Tensor  # (nodes, 2) a row and a step where each stands
    within: list[list[int]]  # per answer: longer ones that go on with no token of ``_carries``


def _tree(numbers: Numbers, carries: set[int]) -> _Tree:
    longest: list[tuple[int, ...]] = []
    for t in sorted(numbers.tokens, key=len, reverse=True):
        if not any(r[: len(t)] == t for r in longest):
            longest.append(t)
    row = [next(i for i, r in enumerate(longest) if r[: len(t)] == t) for t in numbers.tokens]
    within = [
        [
            i
            for i, o in enumerate(numbers.tokens)
            if len(o) > len(t) and o[: len(t)] == t and o[len(t)] not in carries
        ]
        for t in numbers.tokens
    ]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in longest], batch_first=True)
    nodes: dict[tuple[int, ...], int] = {}
    seen, node = [], torch.zeros(len(longest), padded.shape[1] + 1, dtype=torch.int64)
    for i, r in enumerate(longest):
        for step in range(len(r) + 1):
            if r[:step] not in nodes:
                nodes[r[:step]] = len(nodes)
                seen.append((i, step))
            node[i, step] = nodes[r[:step]]
    lengths = torch.tensor([len(t) for t in numbers.tokens])
    return _Tree(padded, torch.tensor(row), lengths, node, torch.tensor(seen), within)


_CARRIES: WeakKeyDictionary[LM, Tensor] = WeakKeyDictionary()
_SCALES = {"thousand", "million", "billion", "bn"}


def _carries(lm: LM) -> Tensor:
    """Tokens that make another number of the one before: digits, a comma, "k", "thousand", …

    A point isn't among them: "20." and "20.00" are 20, and "20.5" nearly so. The vocabulary is gone through
    once for every model.
    """
    if lm in _CARRIES:
        return _CARRIES[lm]
    vocabulary, found = lm.model.get_output_embeddings().weight.shape[0], []
    for i, t in enumerate(lm.tokenizer.convert_ids_to_tokens(range(len(lm.tokenizer)))):
        if t and i < vocabulary:
            word = t.lstrip("Ġ▁ ").lower()
            if t[0] in "0123456789," or t in ("k", "K") or word in _SCALES:
                found.append(i)
    _CARRIES[lm] = torch.tensor(found, device=lm.device, dtype=torch.int64)
    return _CARRIES[lm]


_EXACT = 32


def _logits(lm: LM, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Logits of some tokens in float32: hidden (…, width), tokens (…, k) or (k,) → (…, k)."""
    head = lm.model.get_output_embeddings()
    weight = head.weight[tokens].float()
    found = (hidden[..., None, :].float() * weight).sum(-1) if tokens.dim() > 1 else hidden.float() @ weight.T
    if getattr(head, "bias", None) is not None:
        found = found + head.bias[tokens].float()
    return capped(lm, found)


def _normaliser(lm: LM, hidden: Tensor, temperature: float) -> Tensor:
    """log Σ exp(logit / temperature) over the vocabulary, the largest logits in float32: (…,).

    Half precision rounds logits to steps of up to 1/8, which alone would move a probability by a tenth.
    """
    rough = capped(lm, lm.model.get_output_embeddings()(hidden)).float() / temperature
    whole = rough.logsumexp(-1)
    if hidden.dtype == torch.float32:
        return whole
    with torch.no_grad():
        largest = top(rough.flatten(0, -2), _EXACT)[1].view(*rough.shape[:-1], -1)
    # the share of the largest, as rounded and as exact
    rounded = (rough.gather(-1, largest).logsumexp(-1) - whole).exp()
    exact = ((_logits(lm, hidden, largest) / temperature).logsumexp(-1) - whole).exp()
    return whole + torch.log1p((exact - rounded).clamp(min=-1 + 1e-6))


def _probs(lm: LM, ids: Tensor, tree: _Tree, carries: Tensor, temperature: float, around: Around) -> Tensor:
    """Probability of every answer after equally long prompts (prompts, tokens): (prompts, answers) float32.

    An answer's probability is that of its tokens, times that of no token after them that carries the
    number on, less that of longer answers among the candidates. So all sum to at most 1. ``around(n)``
    is entered for passes with n rows per prompt.
    """
    cache, n = DynamicCache(), len(tree.rows)
    with around(1):
        first = lm.model.base_model(ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    for layer in cache.layers:
        layer.keys, layer.values = (x.repeat_interleave(n, 0) for x in (layer.keys, layer.values))
    rows = tree.rows.to(ids.device)
    with around(n):
        given = rows.repeat(len(ids), 1)
        hidden = lm.model.base_model(given, past_key_values=cache, use_cache=True).last_hidden_state
    hidden = torch.cat([first.repeat_interleave(n, 0), hidden], 1).unflatten(0, (len(ids), n))
    once = _normaliser(lm, hidden[:, tree.seen[:, 0], tree.seen[:, 1]], temperature)
    whole = once[:, tree.node.to(ids.device)]  # (prompts, rows, steps + 1)
    token = _logits(lm, hidden[:, :, :-1], rows[None, ..., None].expand(len(ids), -1, -1, -1))[..., 0]
    path = (token / temperature - whole[:, :, :-1]).cumsum(-1)
    row, at = tree.row.to(ids.device), tree.length.to(ids.device)
    p = path[:, row, at - 1].exp()
    if len(carries):
        on = (_logits(lm, hidden[:, row, at], carries) / temperature).logsumexp(-1) - whole[:, row, at]
        p = p * -torch.expm1(on.clamp(max=-1e-6))
    own: dict[int, Tensor] = {}
    for i in sorted(range(len(row)), key=lambda i: -int(tree.length[i])):
        longer = sum((own[j] for j in tree.within[i]), torch.zeros_like(p[:, i]))
        own[i] = (p[:, i] - longer).clamp(min=1e-30)
    return torch.stack([own[i] for i in range(len(row))], 1)


def _batches(
    lm: LM, asked: pd.DataFrame, numbers: Mapping[tuple[str, str], Numbers], batch_tokens: int
) -> Iterator[tuple[Numbers, _Tree, np.ndarray, Tensor]]:
    """Rows of ``asked`` with one question and one length: their numbers and token ids."""
    carries = set(_carries(lm).tolist())
    ids = encode(lm, list(asked["prompt"]))
    lengths = np.array([len(i) for i in ids])
    keys = list(zip(asked["context"], asked["variation"], strict=True))
    for key in dict.fromkeys(keys):
        if key not in numbers:
            raise ValueError(f"{', '.join(key)}: no candidate answers; call candidates with its answers.")
        tree = _tree(numbers[key], carries)
        here = np.array([k == key for k in keys])
        if lengths[here].max() + tree.rows.shape[1] > lm.context:
            raise ValueError(f"{', '.join(key)}: longer than the model's context of {lm.context} tokens.")
        for length in np.unique(lengths[here]):
            some = np.flatnonzero(here & (lengths == length))
            each = max(length, tree.rows.numel())
            for part in np.array_split(some, -(-len(some) // max(1, batch_tokens // each))):
                batch = torch.tensor([ids[i] for i in part], device=lm.device)
                yield numbers[key], tree, part, batch


@torch.inference_mode()
def distribution(
    lm: LM,
    asked: pd.DataFrame,
    numbers: Mapping[tuple[str, str], Numbers],
    *,
    temperature: float = 0.6,
    batch_tokens: int = 2048,
    progress: str | None = None,
) -> pd.DataFrame:
    """The probability of every candidate answer to every question about every name.

    Run it inside ``ablate.Pruning.applied`` for a pruned model.

    Parameters
    ----------
    asked
        Of ``audit.questions``.
    batch_tokens
        Tokens per batch; bounds the memory for logits (batch_tokens × vocabulary).

    Returns
    -------
    DataFrame
        context, variation, name, race, gender, value, p. Over a name's rows p sums to the share of its
        answers that are among the candidates; a range ("100-150") counts as its first number.

    Raises
    ------
    ValueError
        Temperature 0 or below, a question without candidates, or one too long for the context.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature {temperature}: greedy answers have no distribution; choose one above 0."
        )
    check_unembedding(lm)
    carries, found = _carries(lm), {}
    shown = bar(total=len(asked), desc=progress, unit="question")

    def run(of: Numbers, tree: _Tree, rows: Tensor, ids: Tensor) -> None:
        every = _probs(lm, ids, tree, carries, temperature, lambda _: nullcontext())
        for i, p in zip(rows.tolist(), every.cpu().double().numpy(), strict=True):
            found[i] = pd.DataFrame({"row": i, "value": of.values, "p": p})

    for of, tree, rows, ids in _batches(lm, asked, numbers, batch_tokens):
        in_halves(partial(run, of, tree), torch.from_numpy(rows), ids)
        shown.update(len(rows))
    shown.close()
    long = pd.concat([found[i] for i in range(len(asked))], ignore_index=True)
    who = asked.drop(columns="prompt").reset_index(drop=True)
    return who.loc[long.pop("row")].reset_index(drop=True).join(long)


def slopes(
    lm: LM,
    asked: pd.DataFrame,
    numbers: Mapping[tuple[str, str], Numbers],
    *,
    log: bool = True,
    temperature: float = 0.6,
    batch_tokens: int = 1024,
    progress: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """∂ expected answer / ∂ mask of every head and every MLP unit, for every question about every name.

    One forward and one backward pass for all of them. Removing a part changes the expected answer by
    minus its slope, to first order.

    Parameters
    ----------
    log
        Expect the logarithm of the answer (zeros are left out).

    Returns
    -------
    (heads, units)
        (questions, layers, heads) and (questions, layers, units) float32.
    """
    check_unembedding(lm)
    a, carries = lm.anatomy, _carries(lm)
    heads = np.empty((len(asked), a.n_layers, a.n_heads), dtype=np.float32)
    units = np.empty((len(asked), a.n_layers, a.n_units), dtype=np.float32)
    shown = bar(total=len(asked), desc=progress, unit="question")

    def run(of: Numbers, tree: _Tree, rows: Tensor, ids: Tensor) -> None:
        use = (of.values > 0) | (not log)
        value = torch.tensor(np.log(of.values[use]) if log else of.values[use], device=ids.device).float()
        of_heads, of_units = (
            torch.ones(len(ids), a.n_layers, n, device=ids.device, requires_grad=True)
            for n in (a.n_heads, a.n_units)
        )

        def around(n: int) -> AbstractContextManager:
            return masked(lm, *(m.repeat_interleave(n, 0) for m in (of_heads, of_units)))

        with torch.enable_grad():
            p = _probs(lm, ids, tree, carries, temperature, around)[:, torch.from_numpy(use)]
            expected = ((p * value).sum(1) / p.sum(1)).sum()
            got = torch.autograd.grad(expected, [of_heads, of_units])
        heads[rows.numpy()], units[rows.numpy()] = (g.float().cpu().numpy() for g in got)

    for of, tree, rows, ids in _batches(lm, asked, numbers, batch_tokens):
        in_halves(partial(run, of, tree), torch.from_numpy(rows), ids)
        shown.update(len(rows))
    shown.close()
    return heads, units


def own_answers(
    lm: LM, asked: pd.DataFrame, answers: pd.DataFrame, by: str, group: str, per_name: int = 1
) -> weightscores.Examples:
    """One group's questions with the model's own numeric answers, to score weights on.

    Parameters
    ----------
    answers
        Of ``audit.ask``, the unpruned model's, to these questions and possibly more.
    per_name
        Answers per question and name, at most.

    Raises
    ------
    ValueError
        If the group has no numeric answer.
    """
    index = ["context", "variation", "name"]
    own = asked.loc[asked[by] == group, [*index, "prompt"]]
    given = answers.loc[answers["tokens"] != "", [*index, "seed", "tokens"]]
    given = given.sort_values("seed", kind="stable").groupby(index, sort=False).head(per_name)
    both = own.merge(given, on=index)
    if both.empty:
        raise ValueError(f"group {group!r} of {by!r} has no numeric answer to these questions.")
    said = [[int(t) for t in tokens.split()] for tokens in both["tokens"]]
    return weightscores.from_ids(lm, encode(lm, list(both["prompt"])), said)
