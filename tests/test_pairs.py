"""Sentence pairs against the whole softmax, a planted pair bias, the packaged sets, files of one's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_lm

from biasprune.core.masks import Pruning, masked
from biasprune.core.model import LM, load
from biasprune.core.stats import mean_bias
from biasprune.measures import named, pairs
from biasprune.methods import parts

SENTENCES = [  # of equal length and of unequal, with a common beginning and without
    ("my friend is awful", "my friend is kind"),
    ("the old neighbour was very rude and old", "the old neighbour was gentle"),
    ("a tall friend", "the neighbour who was young"),
]
TABLE = pd.DataFrame(SENTENCES, columns=["more", "less"]).assign(item=list("xyz"), cluster=list("xxz"), unrelated="")


@torch.no_grad()
def log_p(lm: LM, text: str) -> tuple[float, int]:
    """Log-probability of a text after the token that ends texts, by the whole softmax in float64; its tokens."""
    ids = [lm.tokenizer.eos_token_id, *lm.tokenizer(text)["input_ids"]]
    each = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(each[i - 1, ids[i]]) for i in range(1, len(ids))), len(ids) - 1


@pytest.mark.parametrize("per_token", [True, False])
def test_pairs_of_every_architecture(arch_lm, per_token):
    measure = pairs.pairs("pairs", TABLE, per_token=per_token)
    prunings, slow = [Pruning(), Pruning(heads={1}), Pruning(heads={5, 6}, units={3})], []
    for pruning in prunings:
        with masked(arch_lm, pruning):
            sides = [[log_p(arch_lm, text) for text in pair] for pair in SENTENCES]
        slow += [np.subtract(*(p / (n if per_token else 1) for p, n in pair)) for pair in sides]
    frame = measure.read(arch_lm, prunings)
    assert frame["value"].to_numpy() == pytest.approx(np.array(slow), abs=2e-3) and frame["value"].std() > 0.02


def test_common_beginning_of_equally_long_sentences_costs_nothing():
    rows = pairs.pairs("pairs", TABLE).prepare(random_lm("llama"), pairs.pairs("pairs", TABLE).rows)
    assert rows["first"].tolist() == [4, 1, 1] * 2, "the first pair differs in its last word alone"


def test_a_tokenizer_that_begins_texts_itself_needs_no_further_token():
    lm = random_lm("llama")
    lm.tokenizer.bos_token = "<end>"
    lm.__dict__["first_tokens"] = [0]
    rows = pairs.pairs("pairs", TABLE).prepare(lm, pairs.pairs("pairs", TABLE).rows)
    assert rows["text"].iloc[0] == SENTENCES[0][0]


def test_preference_counts_ties_half():
    values = np.array([[0.3, -0.1, 0.0, 2.0]])
    assert pairs.preferred(values, pd.DataFrame(index=range(4)), np.ones((1, 4))) == pytest.approx([2.5 / 4])


def test_slopes_find_what_removal_finds(planted):
    table = pairs.sentences("stereoset", "gender").head(40)
    measure = pairs.pairs("pairs", table)
    heads = range(planted.anatomy.n_flat)
    removed = measure.readings(measure.read(planted, [Pruning(), *(Pruning(heads={h}) for h in heads)])).z()
    assert np.corrcoef(removed, measure.effects(planted))[0, 1] > 0.8


def test_stereoset_and_crows_pairs_as_published():
    table = pairs.sentences("stereoset")
    assert table["axis"].value_counts().to_dict() == {"race": 3938, "profession": 3208, "gender": 1026, "religion": 326}
    assert table["item"].is_unique and (table[["more", "less", "unrelated"]] != "").all(axis=None)
    crows = pairs.sentences("crows-pairs")
    assert len(crows) == 1508 and (crows["axis"] == "race color").sum() == 516 and crows["item"].is_unique
    assert len(pairs.sentences("crows-pairs", "disability")) == 60
    wino = pairs.sentences("winobias")
    assert len(wino) == 792 and wino["item"].is_unique and {"nurse", "developer"} < set(wino["cluster"])
    words = [[set(text.lower().split()) for text in wino[side]] for side in ("more", "less")]
    differ = [len(a ^ b) for a, b in zip(*words, strict=True)]
    assert differ.count(2) == 756 and min(differ) > 0, "one word differs, in the other pairs of the set more"


def test_sides_share_no_cluster_and_subsets_spread_over_clusters():
    for spec in ("stereoset: race", "crows-pairs: all", "pronouns: speech"):
        valid, test = (set(named.measure(spec, side).items["cluster"]) for side in ("valid", "test"))
        assert valid and test and not valid & test, spec
    few, more = (named.measure("stereoset: race", "valid", n).items for n in (60, 90))
    assert len(few) == 60 and few["cluster"].nunique() == 60 and set(few["item"]) < set(more["item"])
    assert len(named.measure("pronouns: all").items) == 435


def test_language_modelling_score_is_that_of_meaningful_sentences():
    lm, table = load("tiny-llama", device="cpu"), pairs.subset(pairs.sentences("stereoset", "gender"), 20)
    measure = pairs.meaning(table)
    readings = measure.readings(measure.read(lm, [Pruning()]))
    assert len(measure.items) == 40 and readings.bias()[0] == np.mean(readings.values[0] > 0)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    table = pd.DataFrame({"more": ["He is a pilot.", "She cries."], "less": ["She is a pilot.", "He cries."]})
    table.to_csv(path, index=False)
    measure = named.measure(str(path))
    assert measure.items["cluster"].is_unique and measure.read(load("tiny-gpt2"), [Pruning()])["value"].notna().all()
    words = pd.DataFrame({"item": ["a", "b"], "cluster": ["a", "b"], "share": [0.1, 0.9], "text": ["The a", "The b"]})
    words.assign(a=" she", b=" he").to_csv(path, index=False)
    assert named.measure(str(path)).read(load("tiny-gpt2"), [Pruning()])["value"].notna().all()


@pytest.mark.parametrize(
    "spec, table, message",
    [
        ("stereoset: colour", None, "axis of stereoset 'colour' is unknown"),
        ("pronouns: kitchen", None, "context 'kitchen' is unknown"),
        ("steroset: race", None, "give pronouns, occupations, stereoset, .* tone or a CSV file"),
        ("missing.csv", None, "There is no file"),
        ("mine.csv", {"more": ["A."], "lesser": ["B."]}, "no column less"),
        ("mine.csv", {"more": ["A."], "less": ["A."]}, "a pair of equal sentences: 'A.'"),
    ],
)
def test_bad_measures_are_refused(tmp_path, monkeypatch, spec, table, message):
    monkeypatch.chdir(tmp_path)
    if table:
        pd.DataFrame(table).to_csv("mine.csv", index=False)
    with pytest.raises(ValueError, match=message):
        named.measure(spec)


def test_null_of_signed_measures():
    """Signs of clusters, or the shares' labels: what no bias gives, and where there is one it is found."""
    rng, cluster = np.random.default_rng(0), np.repeat([f"c{i}" for i in range(40)], 5)
    items = pd.DataFrame({"item": [str(i) for i in range(200)], "cluster": cluster, "more": "a", "less": "b"})
    measure = replace(pairs.pairs("pairs", items), bias=mean_bias)
    for shift, biased in ((0.0, False), (1.0, True)):
        values = shift + np.repeat(rng.normal(size=40), 5) + 0.1 * rng.normal(size=200)
        frame = pd.DataFrame({"pruning": "", "item": items["item"], "value": values})
        found = measure.detect(frame).iloc[0]
        assert (found["p"] < 0.01) == biased and found["units"] == 40
        size = np.sqrt((values.reshape(40, 5).mean(1) ** 2).mean())
        assert found["floor_95"] == pytest.approx(1.96 * size / np.sqrt(40), rel=0.15)


def test_a_method_selects_by_pairs(planted):
    measure = pairs.pairs("pairs", pairs.sentences("stereoset", "gender").head(12))
    harm = np.arange(planted.anatomy.n_flat, dtype=float).reshape(planted.anatomy.n_layers, -1)
    assert len(parts.fasp(0.3, 0.2, harm)(planted, measure)) == int(0.2 * planted.anatomy.n_flat)
