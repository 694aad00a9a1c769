"""Name audit: the same question about people of two groups, answered with a number.

Source: Ma, Salinas, Henderson & Nyarko, "Breaking Down Bias", FAccT 2025, after Salinas et al.'s
name audits. Questions and names are our own; any others come as CSV files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from biasprune import check
from biasprune.decode import sample
from biasprune.gaps import check_groups
from biasprune.lm import LM
from biasprune.prompts import read_csv, user_path

_COLUMNS = {
    "contexts": ("context", "variation", "question", "unit", "prefix"),
    "names": ("name", "race", "gender", "source"),
}
_NUMBER = r"(\d{1,3}(?:,\d{3})++(?:\.\d++)?+|\d++(?:\.\d++)?+|\.\d++)"
_SCALE = r"(?:\s?(k|thousand|mn?|million|bn?|billion)(?![a-z]))?+"
_FIRST = re.compile(
    rf"{_NUMBER}{_SCALE}(?:\s*%)?(?:\s*(?:-|–|—|to|and)\s*(?:US)?\$?\s?{_NUMBER}{_SCALE})?", re.IGNORECASE
)
_TIMES = {"": 1.0, "k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6}
_TIMES |= {"b": 1e9, "bn": 1e9, "billion": 1e9}


def load(what: str, source: str | Path = "biasprune") -> pd.DataFrame:
    """The table of "contexts" or "names": ours, or a CSV file (also one in data/) with the same columns.

    ``source`` of names and ``prefix`` and ``unit`` of contexts may be missing in a file. ``template`` is
    read as question and ``first_name`` as name, as the lists of "Breaking Down Bias" call them; a
    question's ``{variation}`` is filled in.

    Raises
    ------
    ValueError
        No such file, missing columns, a question without ``{name}``, or a name in two groups.
    """
    check.choice(what, list(_COLUMNS), "table")
    path = user_path(f"audit/{what}.csv" if source == "biasprune" else source)
    if not path.is_file():
        raise ValueError(f"No such file of {what}: {path}.")
    table = read_csv(path).rename(columns={"template": "question", "first_name": "name"})
    optional = {"source", "prefix", "unit"}
    if missing := [c for c in _COLUMNS[what] if c not in table and c not in optional]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}.")
    for c in optional & set(_COLUMNS[what]) - set(table):
        table[c] = ""
    if what == "contexts":
        filled = zip(table["question"], table["variation"], strict=True)
        table["question"] = [q.replace("{variation}", v) for q, v in filled]
    if (
        what == "contexts"
        and (bad := table["question"][~table["question"].str.contains("{name}", regex=False)]).size
    ):
        raise ValueError(f"{path}: a question without {{name}}: {bad.iloc[0]!r}.")
    if what == "names" and table["name"].duplicated().any():
        raise ValueError(
            f"{path}: the name {table['name'][table['name'].duplicated()].iloc[0]!r} stands there twice."
        )
    return table[list(_COLUMNS[what])]


def chosen(contexts: pd.DataFrame, names: Sequence[str] = (), most: int = 0) -> pd.DataFrame:
    """Some contexts (all if none is named), and at most so many questions of each (0: all).

    Raises
    ------
    ValueError
        If a context is unknown, or there are no contexts.
    """
    check.columns(contexts, ["context"], "contexts")
    check.count(most, "most", 0)
    known = list(contexts["context"].unique())
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"unknown context {unknown[0]!r}; there are: {', '.join(known)}.")
    some = contexts[contexts["context"].isin(list(names) or known)]
    return (some.groupby("context", sort=False).head(most) if most else some).reset_index(drop=True)


def halves(
    names: pd.DataFrame, by: str, groups: tuple[str, str] | list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Names of two groups to select with and to judge by: every other one of each race and gender.

    Raises
    ------
    ValueError
        If either half has fewer than two names of a group.
    """
    names = names[names[by].isin(groups)] if by in names else names
    check_groups(names, by, groups)
    check.columns(names, ["race", "gender"], "names")
    number = names.groupby(["race", "gender"], sort=False).cumcount()
    both = tuple(names[number % 2 == k].reset_index(drop=True) for k in (0, 1))
    for half in both:
        check_groups(half, by, groups)
    return both


def relabelled(
    table: pd.DataFrame, by: str, groups: tuple[str, str], seed: int | None = None
) -> pd.DataFrame:
    """A control: the groups' labels swapped, or with a seed shuffled among the names."""
    names = table[table[by].isin(groups)].drop_duplicates("name")
    if seed is None:
        other = names[by].map(dict(zip(groups, groups[::-1], strict=True)))
    else:
        other = np.random.default_rng(seed).permutation(names[by])
    return table.assign(
        **{by: table["name"].map(dict(zip(names["name"], other, strict=True))).fillna(table[by])}
    )


def parse(answer: str) -> tuple[float, str]:
    """The first number of an answer, and how it was read.

    Thousands separators and "k", "thousand", "m", "million", "bn" … are understood; a range gives its
    midpoint. (The published code keeps all digits, so that "$100-$150" becomes 100150.)

    Returns
    -------
    (value, kind)
        kind: "number", "range", or "unparsable" with value NaN, as is a number too large for a float.

    Raises
    ------
    ValueError
        If the answer is no text.
    """
    if not isinstance(answer, str):
        raise ValueError(f"the answer {answer!r} is {type(answer).__name__}, no text.")
    found = _FIRST.search(answer)
    if not found:
        return float("nan"), "unparsable"
    low, low_scale, high, high_scale = found.groups()
    scale = _TIMES[(low_scale or "").lower()]
    first = float(low.replace(",", "")) * scale
    if not math.isfinite(first):
        return float("nan"), "unparsable"
    if high is None:
        return first, "number"
    second = float(high.replace(",", "")) * _TIMES[(high_scale or "").lower()]
    if not low_scale and high_scale:  # "5 to 10 thousand"
        first *= _TIMES[high_scale.lower()]
    return ((first + second) / 2, "range") if first < second < math.inf else (first, "number")


def questions(
    lm: LM,
    contexts: pd.DataFrame,
    names: pd.DataFrame,
    *,
    suffix: str = "Reply with a single number and nothing else.",
    chat: bool = True,
    prefix: bool = True,
) -> pd.DataFrame:
    """Every question about every name, as the model reads it.

    Parameters
    ----------
    suffix
        Put after each question.
    chat
        Use the tokenizer's chat template; False asks a plain "Question: … Answer:".
    prefix
        Start the answer with the context's prefix, such as "$": small models then answer with a number
        far more often.

    Returns
    -------
    DataFrame
        context, variation, name, race, gender, prompt.

    Raises
    ------
    ValueError
        If ``chat`` is set and the tokenizer has no chat template; no contexts or names, or missing columns.
    """
    check.columns(contexts, ["context", "variation", "question", "prefix"], "contexts")
    check.columns(names, ["name", "race", "gender"], "names")
    if chat and not lm.tokenizer.chat_template:
        raise ValueError(f"{lm.name} has no chat template: set chat=False.")
    table = contexts.merge(names, how="cross")
    asked = [
        f"{q.replace('{name}', n)} {suffix}".strip()
        for q, n in zip(table["question"], table["name"], strict=True)
    ]
    if chat:
        asked = [
            lm.tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
            )
            for q in asked
        ]
        start = lm.tokenizer.bos_token or ""
        # the tokenizer will add its first token itself
        adds = start and lm.tokenizer("a")["input_ids"][0] == lm.tokenizer.bos_token_id
        asked = [q.removeprefix(start) if adds else q for q in asked]
    else:
        asked = [f"Question: {q}\nAnswer:" for q in asked]
    space = "" if chat else " "
    starts = [space + p if p and prefix else "" for p in table["prefix"]]
    table["prompt"] = [q + s for q, s in zip(asked, starts, strict=True)]
    return table[["context", "variation", "name", "race", "gender", "prompt"]]


def ask(
    lm: LM,
    asked: pd.DataFrame,
    *,
    masks: Tensor | None = None,
    seeds: Sequence[int] = range(8),
    draft: np.ndarray | None = None,
    max_new_tokens: int = 10,
    temperature: float = 0.6,
    top_k: int = 50,
    batch_rows: int = 256,
    progress: str | None = None,
) -> pd.DataFrame:
    """Sampled answers; all masks and the unmodified model share their noise.

    The default sampling is the paper's, as far as it is known: temperature 0.6, at most 10 new tokens, and
    the 50 likeliest tokens that transformers draws from unless told otherwise.

    Returns
    -------
    DataFrame
        context, variation, name, race, gender, mask (number), seed, text, value, kind ("number", "range",
        "unparsable", or "cut" with value NaN where the last token may have cut the number short), tokens
        (ids of the answer up to the end of its number, as text; "" but for numbers).
    """
    check.columns(asked, ["context", "variation", "name", "race", "gender", "prompt"], "questions")
    written = sample(
        lm,
        list(asked["prompt"]),
        masks=masks,
        seeds=seeds,
        draft=draft,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        batch_rows=batch_rows,
        progress=progress,
    )
    n_masks, n_seeds, n = written.texts.shape
    table = pd.concat([asked.drop(columns="prompt")] * (n_masks * n_seeds), ignore_index=True)
    table["mask"] = np.repeat(np.arange(n_masks), n_seeds * n)
    table["seed"] = np.tile(np.repeat(list(seeds), n), n_masks)
    table["text"] = written.texts.reshape(-1)
    ids = written.tokens.reshape(-1, written.tokens.shape[-1])
    unfinished = ids[:, -1] >= 0
    read = [
        (float("nan"), "cut") if more and _cut(t) else parse(t)
        for t, more in zip(table["text"], unfinished, strict=True)
    ]
    unique, where = np.unique(ids, axis=0, return_inverse=True)
    numbers = np.array([_number_tokens(lm, row[row >= 0]) for row in unique], dtype=object)
    kinds = np.array([k for _, k in read], dtype=object)
    tokens = np.where(kinds == "number", numbers[where.reshape(-1)], "")
    return table.assign(value=[v for v, _ in read], kind=kinds, tokens=tokens)


def _cut(answer: str) -> bool:
    """Whether nothing but the beginning of a range or of more digits follows the first number."""
    found = _FIRST.search(answer)
    return bool(found) and not answer[found.end() :].strip(" ,.-–—$")


def ways(lm: LM, contexts: pd.DataFrame, names: pd.DataFrame, suffix: str, **drawing) -> pd.DataFrame:
    """Does the model answer with numbers? Every way to ask: with and without chat template and prefix.

    Returns
    -------
    DataFrame
        chat, prefix, answers (number), unparsable, ranges (shares), distinct (values per question),
        median, example.
    """
    rows = []
    for chat in [True, False] if lm.tokenizer.chat_template else [False]:
        for prefix in (True, False):
            got = ask(lm, questions(lm, contexts, names, suffix=suffix, chat=chat, prefix=prefix), **drawing)
            row = {
                "chat": chat,
                "prefix": prefix,
                "answers": len(got),
                "unparsable": got["value"].isna().mean(),
            }
            row["ranges"] = (got["kind"] == "range").mean()
            row["distinct"] = got.groupby(["context", "variation"])["value"].nunique().mean()
            rows.append({**row, "median": got["value"].median(), "example": got["text"].iloc[0].strip()})
    return pd.DataFrame(rows)


def _number_tokens(lm: LM, ids: np.ndarray) -> str:
    """The fewest first tokens of an answer that give its number, as text; "" for none or a range."""
    value, kind = parse(lm.tokenizer.decode(ids, skip_special_tokens=True))
    if kind == "number":
        for n in range(1, len(ids) + 1):
            if parse(lm.tokenizer.decode(ids[:n], skip_special_tokens=True)) == (value, kind):
                return " ".join(map(str, ids[:n]))
    return ""
