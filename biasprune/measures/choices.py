"""Measures by the next word: the log-odds of one word against another, and of unkind words against kind ones.

They need neither sampling nor a judge, and cost one pass per text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix

import numpy as np
import pandas as pd
import torch
from scipy.special import logit
from torch import Tensor

from biasprune.core.data import choose, need, read_csv
from biasprune.core.likelihood import unembed
from biasprune.core.model import LM, encode
from biasprune.core.stats import Bias, group_gap, weighted_sum
from biasprune.core.weights import Examples, examples
from biasprune.measures.base import TextMeasure, endings

CONTEXTS = ("speech", "possession", "welcome", "story", "names")  # of the pronouns; "names" tell the gender


def continuations(lm: LM, prompts: Sequence[str], words: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of the words after them, tokenised together: some write a first word otherwise."""
    starts = encode(lm, prompts)
    whole = encode(lm, [p + w for p, w in zip(prompts, words, strict=True)])
    same = [len(commonprefix([s, w])) for s, w in zip(starts, whole, strict=True)]
    return [w[:n] for w, n in zip(whole, same, strict=True)], [w[n:] for w, n in zip(whole, same, strict=True)]


def _with_tokens(lm: LM, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the tokens of a and b after their text; where a word has several, a row for either word."""
    texts = rows["text"].tolist()
    starts, sides = encode(lm, texts), [continuations(lm, texts, rows[word].tolist()) for word in ("a", "b")]
    if all(len(r) == 1 and s == t for side in sides for s, r, t in zip(*side, starts, strict=True)):
        token_a, token_b = ([r[0] for r in rest] for _, rest in sides)
        return rows.assign(token_a=token_a, token_b=token_b)
    both = [
        rows.assign(text=rows["text"] + rows[word], weight=sign * rows["weight"], first=[len(s) for s in side[0]])
        for word, sign, side in zip("ab", (1, -1), sides, strict=True)
    ]
    return pd.concat(both, ignore_index=True)


def log_odds(lm: LM, ids: Tensor, rows: pd.DataFrame) -> Tensor:
    """log p(a) − log p(b) of the next word, or the log-probability of one of them where words have several tokens."""
    if "first" in rows:
        return endings(lm, ids, rows)
    tokens = torch.tensor(rows[["token_a", "token_b"]].to_numpy(), device=lm.device)
    logits = unembed(lm, lm.model.base_model(ids, use_cache=False).last_hidden_state[:, -1], tokens)
    return logits[:, 0] - logits[:, 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices(TextMeasure):
    """One-word log-odds after a text; items have the columns text, a, b, and stereotype ("a", "b") for ``examples``."""

    def examples(self, lm: LM) -> tuple[Examples, Examples]:
        texts, a, b = self.items["text"].tolist(), self.items["a"], self.items["b"]
        stereotyped = self.items["stereotype"] == "a"
        sides = (a.where(stereotyped, b), b.where(stereotyped, a))
        first, second = (examples(*continuations(lm, texts, words.tolist())) for words in sides)
        return first, second


def choices(name: str, table: pd.DataFrame, bias: Bias) -> Choices:
    """A measure from a table: item, cluster, text, a, b (next words), and what ``bias`` looks at."""
    need(table, ["item", "cluster", "text", "a", "b"], name)
    items = table.reset_index(drop=True)
    rows = items[["item", "text", "a", "b"]].assign(weight=1.0)
    return Choices(name=name, items=items, rows=rows, objective=log_odds, prepare=_with_tokens, bias=bias)


def share_slope(values: np.ndarray, items: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares slope of log-odds on log-odds of the column share (cut to .02 … .98).

    0: the share doesn't decide; 1: as among the people themselves. A liking for one word everywhere changes nothing.
    """
    x = logit(np.clip(items["share"].to_numpy(dtype=float), 0.02, 0.98))
    x = x - (weights * x).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weighted_sum(values, weights * x) / (weights * x * x).sum(-1)


def pronouns(context: str, side: str = "", *, every: bool = False) -> Choices:
    """Log-odds of she (her, …) against he after sentences about an occupation; bias: ``share_slope``.

    context: One of ``CONTEXTS``, or "all" but "names", in which a first name tells the gender, so that the slope there
        should stay.
    side: "select" or "judge": neither occupations nor sentences of one side are those of the other; "" for both.
    every: All sentences of the context, about one side's occupations.
    """
    choose(context, (*CONTEXTS, "all"), "context")
    frames, wanted = read_csv("pronouns/frames.csv"), CONTEXTS[:-1] if context == "all" else (context,)
    frames = frames[frames["context"].isin(wanted) & ((frames["side"] == side) | (side == "") | every)]
    need(frames, ["frame"], f"sentences of context {context}, side {side}")
    jobs, names = read_csv("pronouns/occupations.csv"), read_csv("audit/names.csv")
    rows = []
    for f in frames.itertuples():
        of_side = jobs[jobs["side"].eq(side) | (side == "")] if every else jobs[jobs["side"] == f.side]
        who, share = of_side["occupation"], of_side["share_women"]
        if context == "names":
            who, share = names["name"], names["gender"] == "female"
        for cluster, women in zip(who, share.astype(float), strict=True):
            text = re.sub(r"\ba (?=[aeiou])", "an ", f.frame.format(name=cluster, occupation=cluster))
            rows.append((text, f.side, cluster, women, text, f" {f.woman}", f" {f.man}"))
    table = pd.DataFrame(rows, columns=["item", "side", "cluster", "share", "text", "a", "b"])
    table["stereotype"] = np.where(table["share"] > 0.5, "a", "b")
    return choices(f"pronouns, {context}", table, share_slope)


@lru_cache(maxsize=8)  # asked for every batch
def _tone_tokens(lm: LM, words: str) -> tuple[Tensor, Tensor]:
    """Token ids of the unkind words, and of the kind ones, that are one token after a space."""
    table = read_csv(words)
    need(table, ["word", "tone"], words)
    start, rest = continuations(lm, ["They are"] * len(table), [f" {w}" for w in table["word"]])
    single = [(tone, r[0]) for tone, r in zip(table["tone"], rest, strict=True) if len(r) == 1]
    unkind, kind = ({token for t, token in single if t == tone} for tone in ("unkind", "kind"))
    if not unkind - kind or not kind - unkind:
        raise ValueError(f"{words}: needs unkind and kind words that are a single token for {lm.name}.")
    return torch.tensor(sorted(unkind - kind)), torch.tensor(sorted(kind - unkind))


def tone(prompts: pd.DataFrame, *, frame: str = " They are", words: str = "words.csv") -> TextMeasure:
    """Probability of unkind next words among unkind and kind ones, per prompt; bias: ``group_gap``.

    prompts: Items of ``measures.toxicity.items``: item, cluster, group, share, prompt.
    frame: Put after every prompt; "" where the prompts themselves ask for such a word.
    words: CSV file with columns word and tone ("unkind", "kind"); words of several tokens are left out.
    """

    def objective(lm: LM, ids: Tensor, rows: pd.DataFrame) -> Tensor:
        unkind, kind = _tone_tokens(lm, words)
        hidden = lm.model.base_model(ids, use_cache=False).last_hidden_state[:, -1]
        logits = unembed(lm, hidden, torch.cat([unkind, kind]))
        return torch.sigmoid(logits[:, : len(unkind)].logsumexp(-1) - logits[:, len(unkind) :].logsumexp(-1))

    rows = prompts[["item"]].assign(text=prompts["prompt"] + frame, weight=1.0)
    return TextMeasure(name="likelihood", items=prompts, rows=rows, objective=objective, bias=group_gap)
