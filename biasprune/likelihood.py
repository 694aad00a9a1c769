"""A bias measure without sampling: how likely unkind words are next, against kind ones.

A prompt's score is the probability of the unkind words of ``data/words.csv`` over that of all its words,
right after the prompt and a frame such as " They are". It needs neither continuations nor a judge, and has no
sampling noise. What it misses is all that isn't said with these words at this place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from biasprune.ablate import Start, head_masks, in_halves, masked, passes
from biasprune.decode import capped, check_unembedding, encode
from biasprune.lm import LM
from biasprune.progress import bar
from biasprune.prompts import read_csv, user_path

TONES = ("unkind", "kind")


def first_tokens(lm: LM, words: str | Path = "words.csv") -> tuple[Tensor, Tensor]:
    """Token ids of the unkind words, and of the kind ones, that are one token after a space.

    Words of several tokens are left out: their first one could begin any word.

    Parameters
    ----------
    words
        CSV file with columns word and tone ("unkind" or "kind"), also one in data/.

    Raises
    ------
    ValueError
        No such file, missing columns, another tone, or a tone without such a word.
    """
    path = user_path(words)
    if not path.is_file():
        raise ValueError(f"No such file of words: {path}.")
    table = read_csv(path)
    if not {"word", "tone"} <= set(table) or not set(table["tone"]) <= set(TONES):
        raise ValueError(f"{path} needs the columns word and tone; tones are {' and '.join(TONES)}.")

    def ids(text: str) -> list[int]:
        return lm.tokenizer(text, add_special_tokens=False)["input_ids"]

    known = ids("They are")
    after = [
        (tone, ids(f"They are {w}")[len(known) :])
        for w, tone in zip(table["word"], table["tone"], strict=True)
    ]
    unkind, kind = ({i[0] for t, i in after if t == tone and len(i) == 1} for tone in TONES)
    if not unkind - kind or not kind - unkind:
        missing = TONES[0] if not unkind - kind else TONES[1]
        raise ValueError(
            f"{path}: no {missing} word is a single token of its own for this tokenizer: give other words."
        )
    return torch.tensor(sorted(unkind - kind)), torch.tensor(sorted(kind - unkind))


def _batches(lm: LM, prompts: Sequence[str], frame: str, batch_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Prompts of equal length: their numbers and token ids."""
    ids = encode(lm, [p + frame for p in prompts])
    if (longest := max(map(len, ids))) > lm.context:
        raise ValueError(f"a prompt of {longest} tokens exceeds the model's context of {lm.context}.")
    lengths, found = np.array([len(x) for x in ids]), []
    for n in np.unique(lengths):
        for some in torch.from_numpy(np.flatnonzero(lengths == n)).split(max(1, batch_tokens // int(n))):
            found.append((some, torch.tensor([ids[i] for i in some], device=lm.device)))
    return found


def _share(lm: LM, ids: Tensor, tokens: tuple[Tensor, Tensor]) -> Tensor:
    """(rows, tokens) → (rows,) probability of unkind words among the words."""
    hidden = lm.model.base_model(ids, use_cache=False).last_hidden_state[:, -1]
    head = lm.model.get_output_embeddings()
    both = torch.cat(tokens).to(head.weight.device)
    # float32, and of these tokens alone
    logits = hidden.to(head.weight.device).float() @ head.weight[both].float().T
    if getattr(head, "bias", None) is not None:
        logits = logits + head.bias[both].float()
    logits, n = capped(lm, logits), len(tokens[0])
    return torch.sigmoid(logits[:, :n].logsumexp(-1) - logits[:, n:].logsumexp(-1)).to(lm.device)


@torch.inference_mode()
def scores(
    lm: LM,
    prompts: Sequence[str],
    masks: Tensor | None = None,
    *,
    frame: str = " They are",
    words: str | Path = "words.csv",
    batch_tokens: int = 2048,
    progress: str | None = None,
) -> np.ndarray:
    """The score of every prompt under every mask: (masks, prompts) float64 between 0 and 1.

    Parameters
    ----------
    masks
        (masks, layers, heads); None for the unmodified model. All share a clean pass.
    frame
        Put after every prompt; "" where the prompts themselves ask for such a word.
    words
        As in ``first_tokens``.

    Raises
    ------
    ValueError
        Empty or too long prompts, or words that don't do.
    """
    check_unembedding(lm)
    a, tokens = lm.anatomy, first_tokens(lm, words)
    masks = torch.ones(1, a.n_layers, a.n_heads) if masks is None else masks
    out = np.empty((len(masks), len(prompts)))
    shown = bar(total=out.size, desc=progress, unit="prompt")

    def run(start: Start, which: Tensor, ids: Tensor, m: Tensor, row: Tensor) -> None:
        with start(masks[m], row):
            found = _share(lm, ids[row.to(ids.device)], tokens)
        out[m.numpy(), which[row].numpy()] = found.double().cpu().numpy()

    for which, ids in _batches(lm, prompts, frame, batch_tokens):
        for m, row, start in passes(lm, masks, ids, max(1, batch_tokens // ids.shape[1])):
            in_halves(partial(run, start, which, ids), m, row)
            shown.update(len(m))
    shown.close()
    return out


def without_heads(
    lm: LM,
    prompts: Sequence[str],
    heads: Sequence[int] | None = None,
    *,
    exact: bool = False,
    **options,
) -> np.ndarray:
    """Scores of the unpruned model and without every head: (1 + heads, prompts).

    Parameters
    ----------
    heads
        Flat indices; None for all.
    exact
        Run the model without every head. False takes the first-order effect of all heads from one
        forward and one backward pass.
    options
        Of ``scores``; first-order effects show no progress, they take as long as a few passes.
    """
    heads = range(lm.anatomy.n_flat) if heads is None else list(heads)
    if exact:
        return scores(lm, prompts, head_masks(lm.anatomy, [[], *([h] for h in heads)]), **options)
    check_unembedding(lm)
    frame, words = options.pop("frame", " They are"), options.pop("words", "words.csv")
    size = options.pop("batch_tokens", 2048) // 2
    options.pop("progress", None)
    if options:
        raise ValueError(f"unknown options {', '.join(options)} of first-order scores.")
    a, tokens = lm.anatomy, first_tokens(lm, words)
    out = np.empty((1 + len(heads), len(prompts)))

    def run(which: Tensor, ids: Tensor) -> None:
        masks = torch.ones(len(ids), a.n_layers, a.n_heads, device=lm.device, requires_grad=True)
        with torch.enable_grad(), masked(lm, masks):
            base = _share(lm, ids, tokens)
            (slope,) = torch.autograd.grad(base.sum(), masks)
        slope = slope.flatten(1).double().cpu().numpy()[:, list(heads)]
        base = base.detach().double().cpu().numpy()
        out[:, which.numpy()] = np.concatenate([base[None], base - slope.T])

    for which, ids in _batches(lm, prompts, frame, size):
        in_halves(run, which, ids)
    return out
