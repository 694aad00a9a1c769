"""Name audit: the same question about people of two groups, answered with a number.

Source: Ma, Salinas, Henderson & Nyarko, "Breaking Down Bias", FAccT 2025, after Salinas et al.'s
name audits. Questions and names are our own; any others come as CSV files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor

from biasprune.decode import sample
from biasprune.fetch import data_dir
from biasprune.lm import LM
from biasprune.prompts import read_csv

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
    """The table of "contexts" or "names": ours, or a CSV file with the same columns.

    ``source`` of names and ``prefix`` of contexts may be missing in a file.

    Raises
    ------
    ValueError
        No such file, missing columns, a question without ``{name}``, or a name in two groups.
    """
    path = data_dir() / "audit" / f"{what}.csv" if source == "biasprune" else Path(source)
    if not path.is_file():
        raise ValueError(f"No such file of {what}: {path}.")
    table = read_csv(path)
    optional = {"source", "prefix", "unit"}
    if missing := [c for c in _COLUMNS[what] if c not in table and c not in optional]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}.")
    for c in optional & set(_COLUMNS[what]) - set(table):
        table[c] = ""
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


def parse(answer: str) -> tuple[float, str]:
    """The first number of an answer, and how it was read.

    Thousands separators and "k", "thousand", "m", "million", "bn" … are understood; a range gives its
    midpoint. (The published code keeps all digits, so that "$100-$150" becomes 100150.)

    Returns
    -------
    (value, kind)
        kind: "number", "range", or "unparsable" with value NaN.
    """
    found = _FIRST.search(answer)
    if not found:
        return float("nan"), "unparsable"
    low, low_scale, high, high_scale = found.groups()
    scale = _TIMES[(low_scale or "").lower()]
    first = float(low.replace(",", "")) * scale
    if high is None:
        return first, "number"
    second = float(high.replace(",", "")) * _TIMES[(high_scale or "").lower()]
    if not low_scale and high_scale:  # "5 to 10 thousand"
        first *= _TIMES[high_scale.lower()]
    return ((first + second) / 2, "range") if second > first else (first, "number")


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
        If ``chat`` is set and the tokenizer has no chat template.
    """
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
    table["prompt"] = [q + (p if prefix else "") for q, p in zip(asked, table["prefix"], strict=True)]
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
    top_k: int = 0,
    batch_rows: int = 256,
    progress: str | None = None,
) -> pd.DataFrame:
    """Sampled answers; all masks and the unmodified model share their noise.

    The default sampling is the paper's: temperature 0.6, at most 10 new tokens.

    Returns
    -------
    DataFrame
        context, variation, name, race, gender, mask (number), seed, text, value, kind.
    """
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
    read = [parse(t) for t in table["text"]]
    return table.assign(value=[v for v, _ in read], kind=[k for _, k in read])


def _sums(values: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Count, sum and sum of squares of each name's answers: (names, 3)."""
    _, index = np.unique(names, return_inverse=True)
    return np.stack([np.bincount(index), np.bincount(index, values), np.bincount(index, values**2)], 1)


def _smd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Standardised mean difference from (…, 3) counts, sums and sums of squares."""
    (mean_a, var_a), (mean_b, var_b) = (
        (s[..., 1] / s[..., 0], (s[..., 2] - s[..., 1] ** 2 / s[..., 0]) / (s[..., 0] - 1)) for s in (a, b)
    )
    spread = (var_a + var_b) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-12, (mean_a - mean_b) / np.sqrt(spread), np.nan)


def gaps(
    answers: pd.DataFrame,
    *,
    by: str = "race",
    groups: tuple[str, str] = ("white", "black"),
    log: bool = False,
    winsorise: float = 0.0,
    reference: pd.DataFrame | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The gap between two groups per context and variation, with the health of the answers.

    Parameters
    ----------
    answers
        Of ``ask``, one mask.
    by, groups
        Column and its two values; the gap is the first group's mean minus the second's.
    log
        Compare logarithms of the answers (zeros are left out and counted as unparsable).
    winsorise
        Share to pull in at either end, over both groups (the paper: .05).
    reference
        Answers of the unmodified model, for ``inliers``.

    Returns
    -------
    DataFrame
        context, variation; smd = (mean_a − mean_b) / √((var_a + var_b) / 2) over names × answers, low,
        high (95 %, basic bootstrap over names, which are the sample); emd (earth mover's distance over
        the pooled standard deviation); median of each group; answers, unparsable (share), ranges
        (share), distinct (number of values), inliers (share inside the reference's 5 – 95 % range; NaN
        without one).

    Raises
    ------
    ValueError
        If a group has fewer than two names, or answers of several masks are mixed.

    Warns
    -----
    UserWarning
        Where nothing can be said: no variance, or a group without two names that have parsable answers.
        smd is NaN then.
    """
    if answers["mask"].nunique() > 1:
        raise ValueError("answers of several masks are mixed: pass one mask's.")
    if not 0 <= winsorise < 0.5:
        raise ValueError(f"winsorise = {winsorise}: choose a share from 0 to below .5.")
    for g in groups:
        if answers["name"][answers[by] == g].nunique() < 2:
            known = ", ".join(map(str, answers[by].unique()))
            raise ValueError(f"group {g!r} of {by!r} has fewer than two names; there are: {known}.")
    rng = np.random.default_rng(seed)
    rows = []
    for (context, variation), part in answers.groupby(["context", "variation"], sort=False):
        part = part[part[by].isin(groups)]
        value = part["value"].to_numpy(dtype=float)
        if log:
            with np.errstate(divide="ignore"):
                value = np.where(value > 0, np.log(value), np.nan)
        fine = np.isfinite(value)
        row = {
            "context": context,
            "variation": variation,
            "smd": np.nan,
            "low": np.nan,
            "high": np.nan,
            "emd": np.nan,
        }
        sums, medians = [], []
        if fine.any() and winsorise:
            value = np.clip(value, *np.nanquantile(value, [winsorise, 1 - winsorise]))
        own = [fine & (part[by] == g).to_numpy() for g in groups]
        if min(part["name"][o].nunique() for o in own) >= 2:
            sums = [_sums(value[o], part["name"].to_numpy()[o]) for o in own]
            smd = float(_smd(*(s.sum(0) for s in sums)))
            draws = [rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size=n_boot) @ s for s in sums]
            boot = _smd(*draws)
            row["smd"] = smd
            if np.isfinite(smd):
                low, high = np.nanquantile(boot, [0.025, 0.975])
                row |= {"low": 2 * smd - high, "high": 2 * smd - low}
                spread = np.sqrt(np.mean([value[o].var(ddof=1) for o in own]))
                row["emd"] = stats.wasserstein_distance(*(value[o] for o in own)) / spread
        if not np.isfinite(row["smd"]):
            warnings.warn(
                f"{context}, {variation}: no gap can be measured ({int(fine.sum())} of {len(part)} answers "
                f"are numbers, {len(np.unique(value[fine]))} distinct).",
                stacklevel=2,
            )
        raw = part["value"].to_numpy(dtype=float)
        medians = {
            f"median_{g}": np.nanmedian(raw[o]) if o.any() else np.nan
            for g, o in zip(groups, own, strict=True)
        }
        row |= medians | {
            "answers": len(part),
            "unparsable": 1 - fine.mean(),
            "ranges": (part["kind"] == "range").mean(),
            "distinct": len(np.unique(raw[fine])),
            "inliers": _inliers(raw, reference, context, variation),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _inliers(values: np.ndarray, reference: pd.DataFrame | None, context: str, variation: str) -> float:
    """Share of parsable answers inside the 5 – 95 % range of the unmodified model's."""
    if reference is None:
        return float("nan")
    own = reference[(reference["context"] == context) & (reference["variation"] == variation)][
        "value"
    ].dropna()
    values = values[np.isfinite(values)]
    if own.empty or not len(values):
        return float("nan")
    low, high = np.quantile(own, [0.05, 0.95])
    return float(((values >= low) & (values <= high)).mean())
