"""Measures by name, as notebooks' parameters give them; sampled texts, which need a judge, are in ``toxicity``."""

from __future__ import annotations

from functools import partial

import pandas as pd

from biasprune.core.data import half, read_csv
from biasprune.measures import pairs
from biasprune.measures.base import TextMeasure
from biasprune.measures.choices import choices, pronouns, share_slope

KINDS = ("pronouns", "stereoset", "crows-pairs")


def measure(spec: str, side: str = "all", n: int = 0) -> TextMeasure:
    """A measure by text, "KIND: AXIS", on the clusters of one side ("valid", "test", "all"), at most n items (0: all).

    "pronouns: speech" (a context, or all), "stereoset: race" (an axis, or all), "crows-pairs: all", "FILE.csv: AXIS"; a
    file has the columns more and less (``pairs``), or item, cluster, share, text, a and b (``choices``).
    """
    kind, axis = map(str.strip, spec.rsplit(":", 1)) if ":" in spec else (spec, "all")
    if kind == "pronouns":
        return pronouns(axis, {"valid": "select", "test": "judge", "all": ""}[side])
    if kind not in KINDS and not kind.endswith(".csv"):
        raise ValueError(f"measure {spec!r}: give {', '.join(KINDS)} or a CSV file, and its axis after a colon.")
    table = read_csv(kind) if kind.endswith(".csv") else pd.DataFrame()
    make = pairs.pairs if "a" not in table else partial(choices, bias=share_slope)
    table = pairs.sentences(kind, axis) if "a" not in table else table.assign(share=table["share"].astype(float))
    return make(spec, pairs.subset(table[table["cluster"].map(half).eq(side) | (side == "all")], n))
