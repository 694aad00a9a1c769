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

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from biasprune import weightscores
from biasprune.ablate import in_halves, masked
from biasprune.audit import parse
from biasprune.decode import encode
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


def candidates(lm: LM, answers: pd.DataFrame, *, most: int = 24) -> dict[tuple[str, str], Numbers]:
    """The numbers that were answered most often to every question, over all names.

    Parameters
    ----------
    answers
        Of ``audit.ask``, the unpruned model's.
    most
        How many numbers to keep for each question. More cover more of what the model answers.

    Returns
    -------
    dict
        (context, variation) → its numbers, the most frequent first.

    Raises
    ------
    ValueError
        If a question has fewer than two different numbers among its answers.
    """
    found = {}
    for key, part in answers.groupby(["context", "variation"], sort=False):
        counts = part.loc[part["tokens"] != "", "tokens"].value_counts()
        kept = sorted(counts.index, key=lambda t: (-counts[t], t))[:most]
        tokens = [tuple(map(int, t.split())) for t in kept]
        values = np.array([parse(lm.tokenizer.decode(t, skip_special_tokens=True))[0] for t in tokens])
        if len(np.unique(values)) < 2:
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
    goes_on: list[list[int]]  # per answer: tokens, digits aside, that lead on to longer answers


def _tree(numbers: Numbers, digits: set[int]) -> _Tree:
    longest: list[tuple[int, ...]] = []
    for t in sorted(numbers.tokens, key=len, reverse=True):
        if not any(r[: len(t)] == t for r in longest):
            longest.append(t)
    row = [next(i for i, r in enumerate(longest) if r[: len(t)] == t) for t in numbers.tokens]
    on = [
        sorted({o[len(t)] for o in longest if len(o) > len(t) and o[: len(t)] == t} - digits)
        for t in numbers.tokens
    ]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in longest], batch_first=True)
    return _Tree(padded, torch.tensor(row), torch.tensor([len(t) for t in numbers.tokens]), on)


def _digits(lm: LM) -> Tensor:
    """Tokens that begin with a digit: they would carry a number on."""
    names = lm.tokenizer.convert_ids_to_tokens(range(len(lm.tokenizer)))
    vocabulary = lm.model.get_output_embeddings().weight.shape[0]
    found = [i for i, t in enumerate(names) if t and t[0] in "0123456789" and i < vocabulary]
    return torch.tensor(found, device=lm.device, dtype=torch.int64)


def _log_probs(
    lm: LM, ids: Tensor, tree: _Tree, digits: Tensor, temperature: float, around: Around
) -> Tensor:
    """log p of every answer after equally long prompts (prompts, tokens): (prompts, answers) float32.

    An answer's probability is that of its tokens, times that of no token after them that carries the
    number on. So probabilities of all answers sum to at most 1. ``around(n)`` is entered for passes
    with n rows per prompt.
    """
    last = torch.tensor([-1], device=ids.device)
    cache, n = DynamicCache(), len(tree.rows)
    with around(1):
        first = lm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=last).logits[:, 0]
    first = (first.float() / temperature).log_softmax(-1)
    for layer in cache.layers:
        layer.keys, layer.values = (x.repeat_interleave(n, 0) for x in (layer.keys, layer.values))
    rows = tree.rows.to(ids.device)
    with around(n):
        logits = lm.model(rows.repeat(len(ids), 1), past_key_values=cache, use_cache=True).logits
    logits = (logits.float() / temperature).unflatten(0, (len(ids), n))  # (prompts, rows, steps, vocabulary)
    whole = logits.logsumexp(-1)
    step = logits[:, :, :-1].gather(-1, rows[None, :, 1:, None].expand(len(ids), -1, -1, -1))[..., 0]
    step = torch.cat([first[:, rows[:, 0]][..., None], step - whole[:, :, :-1]], -1).cumsum(-1)
    row, at = tree.row.to(ids.device), tree.length.to(ids.device) - 1
    stays = logits[..., digits].logsumexp(-1) - whole if len(digits) else torch.full_like(whole, -torch.inf)
    on = stays[:, row, at].exp()
    for i, tokens in enumerate(tree.goes_on):
        if tokens:
            more = (logits[:, row[i], at[i]][:, tokens] - whole[:, row[i], at[i], None]).exp().sum(-1)
            on = on + torch.nn.functional.one_hot(torch.tensor(i), len(row)).to(on) * more[:, None]
    return step[:, row, at] + torch.log1p(-on.clamp(max=1 - 1e-6))


def _batches(
    lm: LM, asked: pd.DataFrame, numbers: Mapping[tuple[str, str], Numbers], batch_tokens: int
) -> Iterator[tuple[Numbers, _Tree, np.ndarray, Tensor]]:
    """Rows of ``asked`` with one question and one length: their numbers and token ids."""
    digits = set(_digits(lm).tolist())
    ids = encode(lm, list(asked["prompt"]))
    lengths = np.array([len(i) for i in ids])
    keys = list(zip(asked["context"], asked["variation"], strict=True))
    for key in dict.fromkeys(keys):
        if key not in numbers:
            raise ValueError(f"{', '.join(key)}: no candidate answers; call candidates with its answers.")
        tree = _tree(numbers[key], digits)
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
    digits, found = _digits(lm), {}
    shown = bar(total=len(asked), desc=progress, unit="question")

    def run(of: Numbers, tree: _Tree, rows: Tensor, ids: Tensor) -> None:
        log_p = _log_probs(lm, ids, tree, digits, temperature, lambda _: nullcontext())
        for i, p in zip(rows.tolist(), log_p.exp().cpu().double().numpy(), strict=True):
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
    a, digits = lm.anatomy, _digits(lm)
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
            log_p = _log_probs(lm, ids, tree, digits, temperature, around)[:, torch.from_numpy(use)]
            expected = (log_p.softmax(-1) * value).sum()
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
    texts = [lm.tokenizer.decode([int(t) for t in tokens.split()]) for tokens in both["tokens"]]
    return weightscores.examples(lm, list(both["prompt"]), texts)
