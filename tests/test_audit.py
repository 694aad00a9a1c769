"""Name audit: parsing, gaps against plain definitions and simulations, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import random_lm
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from biasprune import ablate, audit, decode, gaps
from biasprune import lm as lm_module


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("$1,500", 1500, "number"),
        ("about 12.5 hours", 12.5, "number"),
        ("$100-$150", 125, "range"),
        ("between 20 and 30 dollars", 25, "range"),
        ("10 – 20%", 15, "range"),
        ("5 to 10 thousand", 7500, "range"),
        ("50k", 50_000, "number"),
        ("$1.2 million", 1_200_000, "number"),
        ("1,2", 1, "number"),
        ("$1.2M", 1_200_000, "number"),
        ("$2bn", 2e9, "number"),
        ("150,000USD", 150_000, "number"),
        ("75.5kg", 75.5, "number"),
        ("120,000km", 120_000, "number"),
        ("$100k to $150k", 125_000, "range"),
        (".5", 0.5, "number"),
        ("30 to 10", 30, "number"),
        ("200. I would start at 150", 200, "number"),
        ("none", float("nan"), "unparsable"),
        ("", float("nan"), "unparsable"),
    ],
)
def test_parse(text, value, kind):
    got = audit.parse(text)
    assert got[1] == kind
    assert got[0] == pytest.approx(value, nan_ok=True)


@given(st.integers(0, 10**9), st.sampled_from(["${:,}", "{}", "I'd say {:,} dollars.", "{:.2f}"]))
def test_written_numbers_are_read(number, form):
    assert audit.parse(form.format(number)) == (number, "number")


@given(st.text())
def test_any_text_parses(text):
    value, kind = audit.parse(text)
    assert (kind == "unparsable") == np.isnan(value) and not value < 0


def answers(shift=0.5, names=16, per_name=20, between=0.3, seed=0, **more) -> pd.DataFrame:
    """Simulated: group white answers higher by ``shift``; names differ among themselves."""
    rng = np.random.default_rng(seed)
    who = pd.DataFrame({"name": [f"n{i}" for i in range(2 * names)], "race": ["white", "black"] * names})
    level = rng.normal(0, between, 2 * names) + np.where(who["race"] == "white", shift, 0)
    table = who.loc[who.index.repeat(per_name)].reset_index(drop=True)
    table["value"] = 10 + np.repeat(level, per_name) + rng.normal(0, 1, len(table))
    return table.assign(
        **{"context": "c", "variation": "v", "gender": "f", "mask": 0, "kind": "number", **more}
    )


def test_gap_is_the_definition():
    table = answers()
    row = gaps.gaps(table).iloc[0]
    w, b = (table["value"][table["race"] == g] for g in ("white", "black"))
    spread = np.sqrt((w.var() + b.var()) / 2)
    assert row["smd"] == pytest.approx((w.mean() - b.mean()) / spread)
    assert row["emd"] == pytest.approx(stats.wasserstein_distance(w, b) / spread)
    assert row["median_white"] == w.median() and row["answers"] == len(table) and row["unparsable"] == 0
    swapped = gaps.gaps(table, groups=("black", "white")).iloc[0]
    assert swapped["smd"] == pytest.approx(-row["smd"])


def test_intervals_cover_the_truth_over_names():
    """The names are the sample: answers of one name hang together, and the interval must know it."""
    hits = wide = 0
    for seed in range(150):
        row = gaps.gaps(answers(shift=0.4, seed=seed), n_boot=300).iloc[0]
        truth = 0.4 / np.sqrt(1 + 0.3**2)
        hits += row["low"] <= truth <= row["high"]
        wide += row["high"] - row["low"]
    assert hits / 150 > 0.87
    alone = 2 * 1.96 * np.sqrt(2 / 320)  # if all answers were independent
    assert wide / 150 > 1.3 * alone


def test_winsorised_and_log_gaps():
    table = answers()
    table.loc[0, "value"] = 1e6
    assert abs(gaps.gaps(table).iloc[0]["smd"]) < 0.2 < gaps.gaps(table, winsorise=0.05).iloc[0]["smd"]
    table.loc[1, "value"] = 0.0
    assert gaps.gaps(table, log=True).iloc[0]["unparsable"] == pytest.approx(1 / len(table))


def test_health_of_the_answers():
    table = answers()
    table.loc[:63, ["value", "kind"]] = [np.nan, "unparsable"]
    table.loc[64:127, "kind"] = "range"
    moved = table.assign(value=table["value"] + 100)
    row = gaps.gaps(moved, reference=table).iloc[0]
    assert (
        row["unparsable"] == pytest.approx(0.1)
        and row["ranges"] == pytest.approx(0.1)
        and row["inliers"] == 0
    )
    assert gaps.gaps(table, reference=table).iloc[0]["inliers"] == pytest.approx(0.9, abs=0.01)


def test_nothing_to_say_is_nan_with_a_warning():
    for broken in (answers(value=5.0), answers(value=np.nan, kind="unparsable")):
        with pytest.warns(UserWarning, match="c, v: no gap can be measured"):
            row = gaps.gaps(broken).iloc[0]
        assert np.isnan(row["smd"]) and np.isnan(row["low"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gaps.gaps(answers())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaps.gaps(answers(race="white")), "group 'black' of 'race' has fewer than two names"),
        (lambda: gaps.gaps(answers(), groups=("a", "b")), "there are: white, black"),
        (lambda: gaps.gaps(answers().assign(mask=lambda t: t.index % 2)), "several masks are mixed"),
        (lambda: gaps.gaps(answers(), winsorise=0.5), "share from 0 to below .5"),
        (lambda: audit.load("names", "/nowhere.csv"), "No such file of names"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_of_ones_own(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("context,variation,question\na,b,Who is it?\n")
    with pytest.raises(ValueError, match="without {name}"):
        audit.load("contexts", file)
    file.write_text("context,variation\na,b\n")
    with pytest.raises(ValueError, match="lacks the columns question"):
        audit.load("contexts", file)
    file.write_text("name,race,gender\nNa,white,female\nNa,black,female\n")
    with pytest.raises(ValueError, match="'Na' stands there twice"):
        audit.load("names", file)
    file.write_text("context,variation,question\na,b,What does {name} earn?\n")
    assert audit.load("contexts", file).iloc[0]["prefix"] == ""


def test_the_papers_lists_are_read(published):
    contexts, names = (
        audit.load(w, published / "audit" / f)
        for w, f in (("contexts", "paper_prompts_19.csv"), ("names", "paper_names_64.csv"))
    )
    assert len(contexts) == 19 and contexts["question"].str.contains("{name}", regex=False).all()
    assert not contexts["question"].str.contains("{variation}", regex=False).any()
    assert len(names) == 64 and (names.groupby(["race", "gender"]).size() == 16).all()


def test_own_tables():
    contexts, names = audit.load("contexts"), audit.load("names")
    assert set(contexts["context"]) == {"purchase", "service", "activity", "finance", "hiring"}
    assert (contexts.groupby("context").size() >= 3).all() and not contexts.duplicated().any()
    assert (names.groupby(["race", "gender"]).size() == 16).all() and (names["source"] != "").all()


def test_questions_and_answers():
    lm = random_lm("llama")
    contexts = pd.DataFrame(
        {"context": ["c"], "variation": ["v"], "question": ["the {name} is"], "unit": [""], "prefix": ["a"]}
    )
    names = pd.DataFrame({"name": ["friend", "neighbour"], "race": ["x", "y"], "gender": "f", "source": ""})
    with pytest.raises(ValueError, match="has no chat template: set chat=False"):
        audit.questions(lm, contexts, names)
    asked = audit.questions(lm, contexts, names, chat=False, suffix="very")
    assert asked["prompt"].tolist() == [
        f"Question: the {n} is very\nAnswer: a" for n in ("friend", "neighbour")
    ]
    masks = ablate.head_masks(lm.anatomy, [[], [3]])
    got = audit.ask(lm, asked, masks=masks, seeds=(0, 5), max_new_tokens=4)
    whole = decode.sample(
        lm, list(asked["prompt"]), masks=masks, seeds=(0, 5), max_new_tokens=4, temperature=0.6, top_k=50
    ).texts
    for r in got.itertuples():
        text = whole[r.mask, (0, 5).index(r.seed), ["friend", "neighbour"].index(r.name)]
        assert r.text == text and r.kind in (audit.parse(text)[1], "cut")
        assert (r.tokens != "") == (r.kind == "number") == np.isfinite(r.value)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}me:{% endif %}"
    )
    chat = audit.questions(lm, contexts, names, suffix="", prefix=False)
    assert chat["prompt"].iloc[0] == "<the friend is>me:"


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("150,", True),
        ("50,000 - $", True),
        ("15", True),
        ("15\n", False),
        ("15 dollars", False),
        ("none", False),
    ],
)
def test_numbers_that_the_last_token_may_have_cut(text, cut):
    assert audit._cut(text) == cut


def test_cut_answers_are_no_numbers():
    """The planted model writes its number and a line break: one token less cuts it."""
    lm = lm_module.load("planted-audit", device="cpu")
    contexts, names = (audit.load(w, f"models/planted-audit/{w}.csv") for w in ("contexts", "names"))
    asked = audit.questions(lm, contexts.head(1), names.head(2), chat=False)
    whole, short = (audit.ask(lm, asked, seeds=range(2), max_new_tokens=n) for n in (4, 1))
    assert (whole["kind"] == "number").all() and (whole["tokens"] != "").all()
    assert (short["kind"] == "cut").all() and short["value"].isna().all() and (short["tokens"] == "").all()
    ways = audit.ways(lm, contexts.head(1), names.head(2), "", seeds=range(2), max_new_tokens=4)
    assert len(ways) == 2 and not ways["chat"].any() and (ways["answers"] == 4).all()
