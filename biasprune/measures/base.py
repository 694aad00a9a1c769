"""What a measure is: items with a cluster each, a number per item under any pruning, and how items become a bias.

A new measure is a table of texts and one differentiable number per text (``TextMeasure``); values, first-order effects
of all parts, splits, selection and judging follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biasprune.core.likelihood import Batches, evaluate, mask_gradients, token_log_probs
from biasprune.core.masks import Pruning
from biasprune.core.model import LM, encode, equal_lengths
from biasprune.core.stats import Bias, Readings, mean_bias, with_labels
from biasprune.core.weights import Examples

Objective = Callable[[LM, Tensor, pd.DataFrame], Tensor]  # ids (rows, tokens), rows of a table → (rows,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure(ABC):
    """A measure of bias.

    name: What to write into a table.
    items: One row an item: item (unique text), cluster (what is drawn together: word, name, occupation), and what
        ``bias`` looks at, such as group and share.
    bias: (values (prunings, items), items, weights (…, prunings or 1, items)) → (…, prunings).
    """

    name: str
    items: pd.DataFrame
    bias: Bias = mean_bias

    def __post_init__(self) -> None:
        if len(twice := self.items["item"][self.items["item"].duplicated()]):
            raise ValueError(f"{self.name}: the item {twice.iloc[0]!r} comes twice; give it once.")

    @abstractmethod
    def read(self, lm: LM, prunings: Sequence[Pruning], progress: str | None = None) -> pd.DataFrame:
        """Every item under every pruning: pruning (text), item, value, and what else the measure knows."""

    @abstractmethod
    def slopes(self, lm: LM, parts: str = "heads") -> np.ndarray:
        """∂ value / ∂ mask of every head or MLP unit ("units"): (items, layers, parts).

        Removing a part lowers an item's value by about as much.
        """

    def examples(self, lm: LM) -> tuple[Examples, Examples]:
        """Texts whose behaviour is to go, and texts whose behaviour is to stay, for the set difference of scores."""
        raise ValueError(f"{self.name}: has no texts for a set difference; select by slope instead.")

    def where(self, keep: np.ndarray) -> Self:
        """The same measure on some of its items: bool (items,)."""
        return replace(self, items=self.items[keep].reset_index(drop=True))

    def split(self, column: str) -> dict[str, Self]:
        """The same measure on the items of every value of a column."""
        return {str(v): self.where((self.items[column] == v).to_numpy()) for v in self.items[column].unique()}

    def relabelled(self, seed: int | None = None) -> Self:
        """A control: the two groups' labels swapped, or with a seed shuffled among the clusters."""
        of = self.items.drop_duplicates("cluster").set_index("cluster")["group"]
        if seed is None:
            first, second = of.unique()
            labels = of.map({first: second, second: first})
        else:
            labels = pd.Series(np.random.default_rng(seed).permutation(of.to_numpy()), index=of.index)
        return replace(self, items=with_labels(self.items, "group", self.items["cluster"].map(labels)))

    def readings(self, frame: pd.DataFrame) -> Readings:
        """What ``read`` gave, as arrays with intervals, nulls and reliability."""
        return Readings.of(frame, self.items, self.bias)

    def detect(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The unpruned model's bias beside its permutation null: shuffled, units (how many), ``Readings.detect``."""
        row = {"shuffled": "clusters", "units": self.items["cluster"].nunique()}
        return pd.DataFrame([row | self.readings(frame).detect(cluster="cluster")])

    def first_order(self, lm: LM, parts: str = "heads") -> Readings:
        """Readings of the unpruned model and, to first order, without every part: one backward pass for all."""
        return self.readings(self.read(lm, [Pruning()])).without_parts(self.slopes(lm, parts), parts)

    def effects(self, lm: LM, parts: str = "heads") -> np.ndarray:
        """How much bias removing every part takes away, to first order: (layers · parts,)."""
        return self.first_order(lm, parts).z()


@dataclass(frozen=True, kw_only=True, eq=False)
class TextMeasure(Measure):
    """A measure by what the model says of given texts: an item's value is the weighted sum of its rows' numbers.

    rows: item, weight, text, and what ``objective`` needs.
    objective: One differentiable number per row of a batch.
    prepare: Makes of the rows what depends on the model, such as token ids of words.
    batch_tokens: Tokens per forward pass; a backward pass has a quarter.
    """

    rows: pd.DataFrame
    objective: Objective
    prepare: Callable[[LM, pd.DataFrame], pd.DataFrame] = lambda lm, rows: rows
    batch_tokens: int = 4096

    def where(self, keep: np.ndarray) -> Self:
        kept = set(self.items["item"][keep])
        rows = self.rows[self.rows["item"].isin(kept)].reset_index(drop=True)
        return replace(super().where(keep), rows=rows)

    def _summed(self, rows: pd.DataFrame, numbers: np.ndarray) -> np.ndarray:
        """Rows (rows, …) → items (items, …)."""
        out = np.zeros((len(self.items), *numbers.shape[1:]), dtype=numbers.dtype)
        place = pd.Index(self.items["item"]).get_indexer(rows["item"])
        weight = rows["weight"].to_numpy().astype(numbers.dtype)
        np.add.at(out, place, weight.reshape(-1, *[1] * (numbers.ndim - 1)) * numbers)
        return out

    def _per_row(self, lm: LM, rows: pd.DataFrame, batch_tokens: int) -> tuple[Batches, Callable, int]:
        ids = encode(lm, rows["text"].tolist())
        if (longest := max(map(len, ids))) > lm.context:
            raise ValueError(f"{self.name}: a text of {longest} tokens exceeds the model's context of {lm.context}.")
        batches = equal_lengths(ids, batch_tokens)
        return batches, lambda numbers, ids: self.objective(lm, ids, rows.iloc[numbers.numpy()]), len(rows)

    def read(self, lm: LM, prunings: Sequence[Pruning], progress: str | None = None) -> pd.DataFrame:
        rows = self.prepare(lm, self.rows)
        per_row = self._per_row(lm, rows, self.batch_tokens)
        numbers = evaluate(lm, prunings, *per_row, batch_tokens=self.batch_tokens, progress=progress)
        return tidy(prunings, self.items, self._summed(rows, numbers.T).T)

    def slopes(self, lm: LM, parts: str = "heads") -> np.ndarray:
        rows = self.prepare(lm, self.rows)
        return self._summed(rows, mask_gradients(lm, *self._per_row(lm, rows, self.batch_tokens // 4), parts))


def endings(lm: LM, ids: Tensor, rows: pd.DataFrame) -> Tensor:
    """Log-probability of what every text says from token number ``first`` on: (rows,)."""
    first = torch.tensor(rows["first"].to_numpy())[:, None]
    return token_log_probs(lm, ids, torch.arange(ids.shape[1]) >= first).sum(1)


def tidy(prunings: Sequence[Pruning], items: pd.DataFrame, values: np.ndarray, **more: np.ndarray) -> pd.DataFrame:
    """Arrays (prunings, …, items) as a frame: pruning, item, value and further columns."""
    repeats = values.size // len(prunings)
    table = pd.DataFrame({"pruning": np.repeat([str(p) for p in prunings], repeats)})
    table["item"] = np.tile(items["item"].to_numpy(dtype=object), values.size // len(items))
    return table.assign(value=values.ravel(), **{k: v.ravel() for k, v in more.items()})
