"""Select with one measure, judge by others, beside matched controls: one function for all experiments.

Rows are methods and their controls, columns are measures; perplexity is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import pandas as pd

from biasprune.core.data import bar
from biasprune.core.masks import Pruning
from biasprune.core.model import LM
from biasprune.core.stats import Estimate, mean, redrawn_mean
from biasprune.measures.base import Measure
from biasprune.methods.parts import Method

Jobs = Mapping[str, Callable[[], pd.DataFrame]]
LABELS = ["method", "selected_by", "judged_by", "pruning", "parts"]


def in_memory(jobs: Jobs) -> pd.DataFrame:
    """Does the jobs and keeps nothing; ``Run.pieces`` stores each, so that a killed run goes on."""
    return pd.concat([job() for job in bar(jobs.values(), desc="judged")], ignore_index=True)


def read(lm: LM, prunings: Sequence[Pruning], measures: Mapping[str, Measure], **labels: str) -> pd.DataFrame:
    """Several measures under several prunings: judged_by, pruning, parts, item, value, and further labels."""
    frames = [m.read(lm, prunings).assign(judged_by=name) for name, m in measures.items()]
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(parts=frame["pruning"].map({str(p): len(p) for p in prunings}), **labels)


def read_changed(lm: LM, measures: Mapping[str, Measure], *, name: str, **labels: str) -> pd.DataFrame:
    """``read`` of a model that is changed otherwise than by pruning; its name stands where a pruning's text would."""
    return read(lm, [Pruning()], measures, **labels).assign(pruning=name)


def select_and_judge(
    lm: LM,
    methods: Mapping[str, Method],
    pairs: Sequence[tuple[str, str]],
    measures: Mapping[str, Measure],
    *,
    always: Sequence[str] = (),
    pieces: Callable[[Jobs], pd.DataFrame] = in_memory,
) -> pd.DataFrame:
    """Every method, selecting with one measure, judged by others; and the unpruned model.

    pairs: Names of the measure to select with and of a measure to judge by.
    always: Names of measures that judge every selection, such as perplexity.
    pieces: Does jobs by name and joins their tables, such as ``Run.pieces``.
    Returns: For ``judged``: method ("" unpruned), selected_by, and what ``read`` gives.
    """
    judges = {s: [judged_by for by, judged_by in pairs if by == s] for s, _ in pairs}
    used = {j: measures[j] for j in [*chain(*judges.values()), *always]}

    def select(method: str, selected_by: str) -> pd.DataFrame:
        by = {j: measures[j] for j in [*judges[selected_by], *always]}
        return read(lm, [methods[method](lm, measures[selected_by])], by, method=method, selected_by=selected_by)

    whole = partial(read, lm, [Pruning()], used, method="", selected_by="")
    jobs = {f"{m} by {s}": partial(select, m, s) for s in judges for m in methods}
    return pieces({"unpruned": whole, **jobs})


@dataclass(frozen=True)
class Judged:
    """What every selection leaves of every measure.

    table: A row per selection and measure: ``LABELS``, bias (left) and removed, with 95 % intervals over clusters.
        Removed is |bias before| − |bias left|: a bias turned round is no bias removed.
    left, before: The bias, row by row; rows of a measure, and of measures with the same clusters, are paired.
    """

    table: pd.DataFrame
    left: list[Estimate]
    before: list[Estimate]

    def rows(self, **labels: str | Sequence[str]) -> np.ndarray:
        """Which rows have these labels, or one of several: their numbers."""
        wanted = {k: [x] if isinstance(x, str) else list(x) for k, x in labels.items()}
        return self.table[list(wanted)].isin(wanted).all(axis=1).to_numpy().nonzero()[0]

    def bias(self, rows: np.ndarray) -> Estimate:
        """Mean bias left over some rows."""
        return mean(self.left[i] for i in rows)

    def removed(self, rows: np.ndarray) -> Estimate:
        """How much nearer to 0 the mean bias of some rows has come."""
        return mean(self.before[i] for i in rows).map(np.abs) - self.bias(rows).map(np.abs)

    def share(self, rows: np.ndarray) -> Estimate:
        """The removed share of the unpruned model's bias."""
        return self.removed(rows) / mean(self.before[i] for i in rows).map(np.abs)

    def more(self, rows: np.ndarray, controls: Sequence[np.ndarray]) -> Estimate:
        """How much more some rows remove than their controls; controls are a sample, and are drawn along."""
        return self.removed(rows) - redrawn_mean([self.removed(c) for c in controls])


def judged(frame: pd.DataFrame, measures: Mapping[str, Measure], *, n_boot: int = 1000) -> Judged:
    """Bias left and removed, from the tidy frame of ``select_and_judge`` or ``read``."""
    rows, left, before, labels = [], [], [], [c for c in LABELS if c in frame]
    for judged_by, part in frame.groupby("judged_by", sort=False):
        estimates = measures[str(judged_by)].readings(part).estimates(n_boot)
        for row in part[labels].drop_duplicates().to_dict("records"):
            left.append(estimates[row["pruning"]])
            before.append(estimates[""])
            removed = before[-1].map(np.abs) - left[-1].map(np.abs)
            rows.append({**row, **left[-1].row("bias"), **removed.row("removed")})
    return Judged(table=pd.DataFrame(rows), left=left, before=before)
