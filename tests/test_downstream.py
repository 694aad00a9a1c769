"""Texts with a class and a group: shares as published, interventions that move what they say, no more."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from biasprune import classify, downstream, fetch, mitigation


@pytest.fixture(scope="module")
def bios() -> pd.DataFrame:
    return downstream.biographies(6000, seed=0)


def test_biographies_have_the_published_shares(bios):
    share = bios.groupby("label")["group"].agg(lambda g: (g == "female").mean())
    expected = downstream.shares_of_women()
    assert set(share.index) == set(expected.index) and len(expected) >= 12
    assert bios["label"].value_counts().tolist() == [400] * 15
    assert (share - expected[share.index]).abs().max() <= 1 / 400
    few = downstream.biographies(450, seed=7).groupby(["label", "group"]).size().unstack(fill_value=0)
    assert few.min().min() >= 2, "of thirty biographies two or more of either gender"
    assert bios["text"].nunique() > 5900 and not bios["text"].str.contains(r"[{}]").any()


def test_pronouns_fit_the_group(bios):
    he = bios["text"].str.contains(r"\b(?:[Hh]e|[Hh]is|[Hh]im|Mr)\b", regex=True)
    she = bios["text"].str.contains(r"\b(?:[Ss]he|[Hh]er|Ms)\b", regex=True)
    women = bios["group"] == "female"
    assert not (he & women).any() and not (she & ~women).any()
    assert (he | she).mean() > 0.99, "hardly a frame without a gendered word"
    assert not set(bios[women]["name"]) & set(bios[~women]["name"])


def test_the_same_seed_gives_the_same_texts():
    one, two, other = (downstream.biographies(50, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert not one["text"].equals(other["text"])


def test_the_task_is_hard_and_gender_helps(bios):
    """The best classifier errs, and errs more if it may not use gender: that is what the grid is about."""
    test = downstream.biographies(6000, seed=1)
    right = (downstream.bayes(test, bios) == test["label"]).mean()
    blind = (downstream.bayes(test, bios.assign(group="female")) == test["label"]).mean()
    assert 0.7 < blind < right < 0.95


def test_bayes_by_loops(bios):
    """P(occupation) · P(both phrases | occupation) · P(gender | occupation), written out."""
    known = [o.split(";") for o in downstream._bios("phrases")["occupations"]]
    test = downstream.biographies(150, seed=3)
    guess = []
    for _, row in test.iterrows():
        best, found = -1.0, ""
        for label, own in bios.groupby("label"):
            women = (own["group"] == "female").mean()
            p = len(own) * (women if row["group"] == "female" else 1 - women)
            for i in map(int, row["phrases"].split()):
                alike = sum(label in k and (len(k) == 1) == (len(known[i]) == 1) for k in known)
                alone = len(known[i]) == 1
                p *= (0.3 if alone else 0.7) / alike if label in known[i] else 0.0
            best, found = max((best, found), (p, label), key=lambda x: x[0])
        guess.append(found)
    assert downstream.bayes(test, bios).tolist() == guess


def test_full_equality_takes_the_gap_of_the_best_classifier_away():
    """λ = 1: its gap vanishes within noise; between 0 and 1 it falls."""
    train, test = downstream.biographies(15_000, seed=4), downstream.biographies(15_000, seed=5)
    rms = []
    for strength in (0.0, 0.5, 1.0):
        guess = downstream.bayes(test, downstream.co_occurrence(train, strength, seed=0))
        tpr = (guess == test["label"]).groupby([test["label"], test["group"]]).mean().unstack()
        rms.append(float(np.sqrt(((tpr["female"] - tpr["male"]) ** 2).mean())))
    assert rms[0] > 0.1 and rms[0] >= rms[1] - 0.01 and rms[1] > 2 * rms[2] and rms[2] < 0.04


def test_scrubbing():
    texts = ["She said Ms. Lee hired him in MS.", "Her mother, Mrs. Brown, helped.", "Themes of the hero"]
    assert downstream.scrub(texts) == [
        "_ said _ Lee hired _ in MS.",
        "_ _, _ Brown, helped.",
        "Themes of the hero",
    ]
    assert downstream.scrub(["Anna and Anna Maria"], ["Anna", "Anna Maria"]) == ["_ and _"]
    assert downstream.scrub(["a she"], ["a"], gendered=False) == ["_ she"]
    with pytest.raises(ValueError, match="nothing to scrub"):
        downstream.scrub(["a"], gendered=False)


def test_scrubbed_biographies_say_nothing_about_gender(bios):
    clean = downstream.scrubbed(bios)
    assert clean.drop(columns="text").equals(bios.drop(columns="text"))
    words = clean["text"].str.lower().str.findall(r"[a-z]+").explode()
    women = clean["group"].loc[words.index] == "female"
    seen = words.groupby([words, women.to_numpy()]).size().unstack(fill_value=0)
    only = seen[(seen.min(axis=1) == 0) & (seen.sum(axis=1) > 60)]
    # what is left stands with both groups, but for words of occupations that are nearly all women's
    assert not set(only.index) & {"she", "he", "her", "his", "him", "ms", "mr"}
    assert not set(words) & {n.lower() for n in bios["name"].unique()}


def test_rebalanced(bios):
    for how in ("subsample", "oversample"):
        got = downstream.rebalanced(bios, seed=0, how=how)
        counts = got.groupby(["label", "group"]).size().unstack()
        assert (counts["female"] == counts["male"]).all()
        pick = min if how == "subsample" else max
        before = bios.groupby(["label", "group"]).size().unstack()
        assert counts["male"].tolist() == before.apply(pick, axis=1).tolist()
        assert set(got["text"]) <= set(bios["text"])
    fewer = downstream.rebalanced(bios, seed=0)
    assert fewer["text"].duplicated().sum() <= bios["text"].duplicated().sum(), "no row is drawn twice"


def test_co_occurrence_moves_shares_alone(bios):
    share = bios.groupby("label")["group"].agg(lambda g: (g == "female").mean())
    for strength in (-0.5, 0.0, 0.25, 1.0):
        got = downstream.co_occurrence(bios, strength, seed=1)
        assert got["label"].value_counts().to_dict() == bios["label"].value_counts().to_dict()
        new = got.groupby("label")["group"].agg(lambda g: (g == "female").mean())
        wanted = ((1 - strength) * share + strength * 0.5).clip(0, 1)
        assert (new - wanted).abs().max() < 0.5 / 400 + 1e-9
    same = downstream.co_occurrence(bios, 0.0, seed=1)
    assert sorted(same["text"]) == sorted(bios["text"]), "λ = 0 only shuffles"


def test_bad_data_input(bios):
    with pytest.raises(ValueError, match="λ = 1.5"):
        downstream.co_occurrence(bios, 1.5, seed=0)
    women = bios[(bios["group"] == "female") | (bios["label"] != "nurse")]
    with pytest.raises(ValueError, match="no row of one group"):
        downstream.co_occurrence(women, 0.5, seed=0)
    with pytest.raises(ValueError, match="class 'nurse' has no row of group 'male'"):
        downstream.rebalanced(women, seed=0)
    with pytest.raises(ValueError, match="subsample or oversample"):
        downstream.rebalanced(bios, seed=0, how="weigh")
    with pytest.raises(ValueError, match="n = 0: give a whole number from 1 on"):
        downstream.biographies(0, seed=0)
    with pytest.raises(ValueError, match="one text or more"):
        downstream.load("biographies", train=0, dev=1, test=2)


def test_texts_for_testing_stand_in_both_genders():
    table = downstream.load("biographies", train=30, dev=15, test=91)
    assert table["split"].value_counts().to_dict() == {"train": 30, "dev": 15, "test": 90}
    assert (table.loc[table["split"] != "test", "pair"] == -1).all()
    tested = table[table["split"] == "test"]
    names = pd.read_csv(fetch.data_dir() / "audit" / "names.csv")
    race = dict(zip(names["name"], names["race"], strict=True))
    for _, two in tested.groupby("pair"):
        assert sorted(two["group"]) == ["female", "male"]
        assert two["label"].nunique() == two["phrases"].nunique() == 1
        assert two["name"].map(race).nunique() == 1
    clean = downstream.scrubbed(tested)
    same = clean.groupby("pair")["text"].nunique()
    assert (same == 1).all(), "scrubbed, nothing tells them apart"
    assert tested.groupby("pair")["text"].nunique().eq(2).all()


def test_fields_of_bold():
    table = downstream.bold_fields()
    assert table["label"].nunique() == 14 and len(table) > 7000 and table["text"].is_unique
    trained = table[table["split"] != "test"]
    share = trained.groupby("label")["group"].agg(lambda g: (g == "female").mean())
    assert (share - downstream.shares_of_women("fields")[share.index]).abs().max() < 0.1
    assert set(table["split"]) == {"train", "dev", "test"}
    some = downstream.some(table, "train", 280)
    assert some["label"].value_counts().tolist() == [20] * 14
    assert some.groupby(["label", "group"]).size().unstack(fill_value=0).min().min() >= 1
    tested = downstream.some(table, "test", 280)
    assert tested["label"].value_counts().tolist() == [20] * 14
    assert set(tested.groupby("pair")["group"].agg(lambda g: tuple(sorted(g)))) == {("female", "male")}
    short = downstream.bold_fields(words=8)
    said = short["text"].str.split(". ", n=1).str[1].where(~short["text"].str.startswith("M"))
    said = said.dropna()  # after openings without a title, whose dot is the first
    known = short.loc[said.index].groupby(said)
    assert (
        (known["split"].nunique() == 1).all() and (known["label"].nunique() == 1).all() and len(said) > 5000
    )
    other = downstream.bold_fields(seed=1)
    assert set(other.loc[other["split"] == "test", "pair"]) != set(
        table.loc[table["split"] == "test", "pair"]
    )
    assert short["text"].str.split().str.len().max() <= 8 + 8 < table["text"].str.split().str.len().median()
    clean = downstream.scrubbed(table)
    assert clean["text"].str.startswith(("_", "This is what _", "It is _", "For years _")).mean() > 0.99


def test_bias_in_bios_as_files(tmp_path):
    rows = pd.DataFrame({"hard_text": ["He sings.", "She counts."], "profession": [3, 0], "gender": [0, 1]})
    for split, write in (("train", "csv"), ("dev", "csv"), ("test", "parquet")):
        getattr(rows, f"to_{write}")(tmp_path / f"{split}.{write}", index=False)
    got = downstream.bias_in_bios(tmp_path)
    assert got["group"].tolist() == ["male", "female"] * 3 and set(got["label"]) == {
        "accountant",
        "chiropractor",
    }
    rows.drop(columns="gender").to_csv(tmp_path / "dev.csv", index=False)
    with pytest.raises(ValueError, match="dev: lacks the columns gender"):
        downstream.bias_in_bios(tmp_path)
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(ValueError, match="has no dev.csv"):
        downstream.bias_in_bios(tmp_path)
    with pytest.raises(fetch.FetchError, match="could not be loaded from the Hugging Face hub"):
        downstream.bias_in_bios("nobody/nothing")


def test_measured_slope_agrees_with_the_truth():
    """The best classifier learns shares from few texts; its bias falls with λ as it does with very many."""

    def cells(n_train: int, n_test: int, seed: int) -> list[dict]:
        train = downstream.biographies(n_train, seed)
        test = downstream.biographies(n_test, 100 + seed, paired=True)
        rows = []
        for x in (0.0, 0.5, 1.0):
            own = downstream.co_occurrence(train, x, seed)
            found = test[["label", "group", "pair"]].assign(predicted=downstream.bayes(test, own))
            at = classify.Setting(data="co-occurrence", strength=x)
            rows.append(mitigation.outcome(found, mitigation.women(train), at, seed, least=10))
        return rows

    few = pd.DataFrame([row for seed in range(6) for row in cells(600, 600, seed)])
    measured = mitigation.slopes(few, most=1.0).iloc[0]
    many = pd.DataFrame(cells(3000, 3000, 50))
    truth = np.polyfit(many["strength"], many["excess"], 1)[0]
    assert measured["low"] < truth < measured["high"] < 0
    assert many.loc[many["strength"] == 1, "excess"].iloc[0] == pytest.approx(0, abs=1e-4)
