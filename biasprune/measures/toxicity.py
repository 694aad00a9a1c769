"""FASP's measure: how a judge scores what the model writes after prompts about groups of people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from biasprune.core.data import RULES, choose, need
from biasprune.core.likelihood import Written
from biasprune.core.masks import Pruning
from biasprune.core.model import LM, encode
from biasprune.core.sampling import sample
from biasprune.core.stats import Readings, group_gap
from biasprune.measures.base import Measure, tidy
from biasprune.measures.judges import Judge

MAX_WEIGHT = 20.0  # importance weights are cut there


def items(prompts: pd.DataFrame) -> pd.DataFrame:
    """Prompts of one axis as items: item, cluster (the prompt), group, share (of the group in the axis mean), wording.

    Prompts have the columns prompt and group; weight where groups were sampled evenly (``prompts.sample``); and
    descriptor, if groups have several. wording is the group with the descriptor.
    """
    need(prompts, ["prompt", "group"], "prompts")
    if prompts["group"].nunique() < 2:
        raise ValueError(f"prompts of one group ({prompts['group'].iloc[0]}): bias needs two or more to compare.")
    table = prompts.reset_index(drop=True)
    again = table.groupby("prompt").cumcount()
    item = table["prompt"].where(again == 0, table["prompt"] + " (again " + again.astype(str) + ")")
    weight = table["weight"] if "weight" in table else pd.Series(1 / len(table), index=table.index)
    share = weight.groupby(table["group"]).transform("sum")
    wording = table["group"] + (": " + table["descriptor"] if "descriptor" in table else "")
    return table.assign(item=item, cluster=item, share=share, wording=wording)


def gap_by_seed(values: np.ndarray, items: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """``group_gap`` of every seed's items, averaged over seeds, as the published code does: larger for the noise."""
    seeds = [items["seed"].to_numpy() == s for s in items["seed"].unique()]
    return np.mean([group_gap(values[:, s], items[s], weights[..., s]) for s in seeds], axis=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled(Measure):
    """Scores of sampled continuations; an item's value is the mean over seeds.

    rule: "corrected": the judge reads the continuation alone, since the prompt's descriptor itself moves most judges.
        "as_published": the prompt, cut as the model read it, too, lower-cased, newlines to spaces.
    coupled: False: every head has sampling noise of its own, as in the published procedure.
    """

    judge: Judge
    seeds: Sequence[int] = (0,)
    rule: str = "corrected"
    coupled: bool = True
    max_new_tokens: int = 40
    top_k: int = 50
    temperature: float = 1.0
    max_prompt_tokens: int | None = 22
    batch_rows: int = 256
    batch_tokens: int = 4096

    def read(self, lm: LM, prunings: Sequence[Pruning], progress: str | None = None) -> pd.DataFrame:
        """pruning, item, seed, value (score), text, tokens (ids, −1 after the end, as text)."""
        streams = None if self.coupled else [1 + min(p.heads, default=-1) for p in prunings]
        names = ("seeds", "max_new_tokens", "top_k", "temperature", "max_prompt_tokens", "batch_rows")
        how = {name: getattr(self, name) for name in names}
        written = sample(lm, self.items["prompt"].tolist(), prunings, streams=streams, progress=progress, **how)
        texts = written.texts
        seed = np.broadcast_to(np.array(self.seeds)[:, None], texts.shape)
        tokens = np.array([" ".join(map(str, t)) for t in written.tokens.reshape(-1, self.max_new_tokens)], object)
        frame = tidy(prunings, self.items, np.zeros(texts.shape), seed=seed, text=texts, tokens=tokens)
        return frame.assign(value=self.judged(lm, frame))

    def readings(self, frame: pd.DataFrame) -> Readings:
        """Scores averaged over seeds; as published, every seed has a bias, and these are averaged."""
        if self.rule == "corrected":
            return super().readings(frame)
        of_seed = [self.items.assign(item=self.items["item"] + f" (seed {s})", seed=s) for s in self.seeds]
        seed = " (seed " + frame["seed"].astype(int).astype(str) + ")"
        return Readings.of(frame.assign(item=frame["item"] + seed), pd.concat(of_seed, ignore_index=True), gap_by_seed)

    def detect(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The unpruned model's bias beside two permutation nulls: shuffled, units (how many), and ``Readings.detect``.

        Labels shuffled among prompts answer for these prompts; among descriptors, for the groups in general. Where
        groups have one descriptor each, the second has no row.
        """
        readings, rows = self.readings(frame), []
        for shuffled, column in (("prompts", "cluster"), ("descriptors", "wording")):
            if (units := self.items[column].nunique()) > self.items["group"].nunique():
                rows.append({"shuffled": shuffled, "units": units, **readings.detect(cluster=column)})
        return pd.DataFrame(rows).assign(seeds=frame["seed"].nunique())

    def judged(self, lm: LM, frame: pd.DataFrame) -> np.ndarray:
        """The judge's score of every text of ``read``: (rows,)."""
        texts = frame["text"].tolist()
        if self.rule == "as_published":
            starts = encode(lm, self.items["prompt"].tolist(), self.max_prompt_tokens)
            start = dict(zip(self.items["item"], starts, strict=True))
            steps = [[int(t) for t in tokens.split() if t != "-1"] for tokens in frame["tokens"]]
            ids = [start[item] + step for item, step in zip(frame["item"], steps, strict=True)]
            texts = lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts = [t.lower().replace("\n", " ") for t in texts]
        return self.judge(texts)

    def _shaped(self, values: pd.Series) -> np.ndarray:
        """A column of ``read`` with nothing pruned as (seeds, items)."""
        return values.to_numpy().reshape(len(self.seeds), len(self.items))

    def _written(self, lm: LM, whole: pd.DataFrame) -> Written:
        """The unpruned model's texts, to be weighed."""
        shape = (len(self.seeds), len(self.items), -1)
        tokens = np.array([list(map(int, t.split())) for t in whole["tokens"]]).reshape(shape)
        options = {"top_k": self.top_k, "temperature": self.temperature, "batch_tokens": self.batch_tokens}
        prompts = self.items["prompt"].tolist()
        return Written(lm, prompts, tokens, max_prompt_tokens=self.max_prompt_tokens, **options)

    def weighed(self, lm: LM, prunings: Sequence[Pruning], whole: pd.DataFrame) -> pd.DataFrame:
        """``read`` by importance: the unpruned model's texts, weighted by how likely they are when pruned.

        Self-normalised within groups, weights cut at ``MAX_WEIGHT``. ``whole``: of ``read`` with nothing pruned. Adds
        weight, and ess: effective share of the sample; where it is small, the pruning changes the model too much.
        """
        log_weight = self._written(lm, whole).log_ratios(prunings)
        # The floor matters where no text of a group could have been written so: its mean is then the unpruned
        # model's, and ess says that nothing is known.
        weight = np.exp(np.clip(log_weight, -20, np.log(MAX_WEIGHT)))
        exact = np.exp(np.minimum(log_weight, np.log(MAX_WEIGHT)))
        ess = exact.sum((1, 2)) ** 2 / np.maximum((exact**2).sum((1, 2)), 1e-300) / exact[0].size
        values = np.broadcast_to(self._shaped(whole["value"]), weight.shape)
        more = np.array(self.seeds)[:, None], ess[:, None, None], self._shaped(whole["text"])
        seed, ess, text = (np.broadcast_to(x, weight.shape) for x in more)
        return tidy(prunings, self.items, values, weight=weight, seed=seed, ess=ess, text=text)

    def gradients(self, lm: LM, whole: pd.DataFrame, parts: str = "heads") -> np.ndarray:
        """∂ log p(text) / ∂ mask, one for all judges of the texts of ``whole``: (seeds, items, layers, parts)."""
        return self._written(lm, whole).gradients(parts)

    def slopes(
        self, lm: LM, parts: str = "heads", whole: pd.DataFrame | None = None, gradients: np.ndarray | None = None
    ) -> np.ndarray:
        """By the score-function gradient, Σ (score − its group's mean) · ∂ log p(text) / ∂ mask over texts."""
        whole = self.read(lm, [Pruning()]) if whole is None else whole
        gradients = self.gradients(lm, whole, parts) if gradients is None else gradients
        scores = self._shaped(whole["value"])
        centre = pd.Series(scores.mean(0)).groupby(self.items["group"].to_numpy()).transform("mean").to_numpy()
        return np.einsum("si,silp->ilp", scores - centre, gradients) / len(scores)

    def first_order(
        self, lm: LM, parts: str = "heads", whole: pd.DataFrame | None = None, gradients: np.ndarray | None = None
    ) -> Readings:
        whole = self.read(lm, [Pruning()]) if whole is None else whole
        base = Readings.of(whole, self.items, self.bias)  # slopes are means over seeds, by whatever rule
        return base.without_parts(self.slopes(lm, parts, whole, gradients), parts)


def toxicity(prompts: pd.DataFrame, judge: Judge, *, rule: str = "corrected", **sampling: object) -> Sampled:
    """Bias of what a model writes after prompts (of ``items``): Σ over groups of |axis mean − group mean| of scores.

    sampling: Further attributes of ``Sampled``: seeds, max_new_tokens, … Source: Zayed et al., AAAI 2024.
    """
    choose(rule, RULES, "rule")
    return Sampled(name=judge.name, items=items(prompts), bias=group_gap, judge=judge, rule=rule, **sampling)
