"""Measures by name, as notebooks' parameters give them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from biasprune.core.data import half, need, read_csv
from biasprune.measures import judges, pairs, prompts
from biasprune.measures.base import Measure
from biasprune.measures.choices import choices, pronouns, share_slope, tone
from biasprune.measures.toxicity import items, toxicity

KINDS = ("pronouns", "occupations", "stereoset", "crows-pairs", "winobias", "meaning", "texts", "tone")


def measure(spec: str, side: str = "all", n: int = 0, *, texts: Mapping[str, Any] | None = None) -> Measure:
    """A measure by text, "KIND: AXIS", on the clusters of one side ("valid", "test", "all"), at most n items (0: all).

    "pronouns: speech" (a context, or all; "occupations: speech": with the same sentences on either side), "stereoset:
    race" (an axis, or all), "crows-pairs: all", "winobias: gender", "meaning: all" (StereoSet's language-modelling
    score), "FILE.csv: AXIS" with more and less (``pairs``), or item, cluster, share, text, a and b (``choices``). After
    prompts about groups "texts: race_ethnicity" (sampled texts; "texts by sentiment: …" for another judge) and "tone:
    race_ethnicity" (next words): with ``texts``, which has the source of the prompts, frame (for tone), and arguments
    of ``toxicity``.
    """
    kind, axis = map(str.strip, spec.rsplit(":", 1)) if ":" in spec else (spec, "all")
    if kind.partition(" by ")[0] not in KINDS and not kind.endswith(".csv"):
        raise ValueError(f"measure {spec!r}: give {', '.join(KINDS)} or a CSV file, and its axis after a colon.")
    if kind in ("pronouns", "occupations"):
        half_of = {"valid": "select", "test": "judge", "all": ""}
        return pronouns(axis, half_of[side], every=kind == "occupations")
    if kind.startswith(("texts", "tone")):
        how = dict(texts or {})
        table, frame = prompts.load(axis, side, how.pop("source")), how.pop("frame", "")
        table = prompts.sample(table, n or len(table), seed=0)
        if kind == "tone":
            return tone(items(table), frame=frame)
        if by := kind.partition(" by ")[2]:
            how["judge"] = judges.load(by)
        return toxicity(table, **how)
    if kind.endswith(".csv") and "a" in (own := read_csv(kind)):
        need(own, ["item", "cluster", "share"], kind)
        table = own.assign(share=pd.to_numeric(own["share"], errors="coerce"))
        if not table["share"].between(0, 1).all() or table["share"].nunique() < 2:
            raise ValueError(f"{kind}: share needs numbers between 0 and 1, and two different ones.")
        make = partial(choices, spec, bias=share_slope)
    elif kind == "meaning":
        table, make = pairs.sentences("stereoset", axis), pairs.meaning
    else:
        table, make = pairs.sentences(kind, axis), partial(pairs.pairs, spec)
    table = pairs.subset(table[table["cluster"].map(half).eq(side) | (side == "all")], n)
    if table["cluster"].nunique() < 2:
        raise ValueError(f"measure {spec!r}, {side}: an interval needs two clusters, but {len(table)} items have one.")
    return make(table)
