"""Windows of prose, as published or corrected, and their losses; measures/prose.py makes perplexity of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biasprune.core.data import RULES, choose
from biasprune.core.likelihood import token_log_probs
from biasprune.core.model import LM, encode


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A text cut into windows: the targets of a window are its tokens first … last − 1."""

    ids: Tensor  # (windows, length), the last window padded on the right
    first: np.ndarray  # (windows,)
    last: np.ndarray  # (windows,)
    rule: str

    @property
    def counts(self) -> np.ndarray:
        """Number of predicted tokens per window."""
        return self.last - self.first

    @property
    def counted(self) -> Tensor:
        """Which tokens are targets: bool (windows, length)."""
        position = np.arange(self.ids.shape[1])
        return torch.from_numpy((self.first[:, None] <= position) & (position < self.last[:, None]))


def windows(
    lm: LM, text: str, *, rule: str = "corrected", length: int | None = None, max_tokens: int | None = None
) -> Windows:
    """Cut a text, or its first ``max_tokens``, into windows of ``length`` tokens (None: a quarter of the context).

    "corrected": windows meet in one token, so that every token but the first is predicted exactly once; where the
    tokenizer starts texts with a token of its own (Gemma, Llama), every window starts with it. "as_published": stride
    512 whatever the length: a model with a 1024-token context skips every other block of 256.
    """
    choose(rule, RULES, "rule")
    length = lm.context // 4 if length is None else length
    if not 2 <= length <= lm.context:
        raise ValueError(f"windows of {length} tokens: choose 2 to {lm.context}, the model's context.")
    ids = torch.tensor(encode(lm, [text], max_tokens)[0])
    if len(ids) < 2:
        raise ValueError("the text for perplexity has fewer than two tokens.")
    if rule == "as_published":
        rows, first, seen = [], [], 0
        for begin in range(0, len(ids), 512):
            end = min(begin + length, len(ids))
            if end > max(seen, begin + 1):
                rows.append(ids[begin:end])
                first.append(max(seen - begin, 1))
            seen = end
    elif n_first := len(lm.first_tokens):
        # a model that was trained with a first token reads badly without it, in every window
        rows = [torch.cat([ids[:n_first], part]) for part in ids[n_first:].split(length - n_first)]
        first = [n_first] * len(rows)
    else:
        rows = [ids[begin : begin + length] for begin in range(0, len(ids) - 1, length - 1)]
        first = [1] * len(rows)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Windows(ids=padded, first=np.array(first), last=np.array([len(r) for r in rows]), rule=rule)


def mean_nll(lm: LM, ids: Tensor, counted: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) of the counted tokens of every row: (rows, tokens) → (rows,)."""
    return -token_log_probs(lm, ids, counted).sum(1) / counted.sum(1).to(ids.device)
