"""Next words against the whole softmax, slopes against finite differences, planted circuits, and fine-tuning."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_lm

from biasprune.core.data import user_path
from biasprune.core.likelihood import check_unembedding
from biasprune.core.masks import Pruning, masked, scaled
from biasprune.core.model import LM, load
from biasprune.core.stats import mean_bias
from biasprune.measures import choices as ch
from biasprune.measures import prompts, toxicity
from biasprune.methods import parts, tuning

PROMPTS = ["my friend is", "the old neighbour was very", "a tall friend who was", "my young friend is"]
TONES = "awful", "rude", "kind", "gentle"
WORDS = {"single": [" kind", " awful"], "several": [" kind", " awful and rude"]}


def of_words(words: list[str]) -> ch.Choices:
    table = pd.DataFrame({"item": PROMPTS, "cluster": PROMPTS, "text": PROMPTS, "a": words[0], "b": words[1]})
    return ch.choices("words", table, mean_bias)


@torch.no_grad()
def log_p(lm: LM, prompt: str, rest: str) -> float:
    """Log-probability of what follows a prompt, by the whole softmax of one text in float64."""
    start, ids = (lm.tokenizer(t)["input_ids"] for t in (prompt, prompt + rest))
    assert ids[: len(start)] == start and len(ids) > len(start)
    each = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(each[i - 1, ids[i]]) for i in range(len(start), len(ids)))


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_log_odds_of_every_architecture(arch_lm, words):
    measure = of_words(words)
    prepared = measure.prepare(arch_lm, measure.rows)
    assert ("token_a" in prepared) == (words == WORDS["single"]), "one pass for both words where it will do"
    prunings = [Pruning(), Pruning(heads={1}), Pruning(heads={5, 6}, units={3})]
    frame = measure.read(arch_lm, prunings)
    slow = []
    for pruning in prunings:
        with masked(arch_lm, pruning):
            slow += [log_p(arch_lm, p, words[0]) - log_p(arch_lm, p, words[1]) for p in PROMPTS]
    assert frame["value"].to_numpy() == pytest.approx(np.array(slow), abs=2e-3)
    assert frame["item"].tolist() == PROMPTS * 3 and frame["value"].std() > 0.1


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_log_odds_of_pronouns(name):
    lm = load(name, device="cpu")
    measure = ch.pronouns("welcome", "judge")
    measure = measure.where(np.arange(len(measure.items)) % 23 == 0)
    frame = measure.read(lm, [Pruning()])
    slow = [log_p(lm, r.text, r.a) - log_p(lm, r.text, r.b) for r in measure.items.itertuples()]
    assert frame["value"].tolist() == pytest.approx(slow, abs=1e-4)


@pytest.mark.parametrize("what", [*WORDS, "tone"])
@pytest.mark.parametrize("kind", ["heads", "units"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_slopes_by_finite_differences(name, kind, what, words):
    lm, measure, step = random_lm(name), toned(words) if what == "tone" else of_words(WORDS[what]), 0.01
    got = measure.slopes(lm, kind)
    n = lm.anatomy.n_heads if kind == "heads" else lm.anatomy.n_units
    assert got.shape == (len(PROMPTS), lm.anatomy.n_layers, n)
    for part in np.abs(got).sum(0).ravel().argsort()[-3:]:
        ends = []
        for scale in (1 - step, 1 + step):
            mask = torch.ones(1, lm.anatomy.n_layers, n)
            mask.view(-1)[part] = scale
            with scaled(lm, **{kind: mask}):
                ends.append(measure.read(lm, [Pruning()])["value"].to_numpy())
        slope = (ends[1] - ends[0]) / (2 * step)
        assert got.reshape(len(PROMPTS), -1)[:, part] == pytest.approx(slope, abs=1e-3 + 0.03 * np.abs(slope).max())
        assert np.abs(slope).max() > 0.01, "too flat to be a test"


def test_share_slope_is_least_squares():
    rng = np.random.default_rng(0)
    share, y, counts = rng.random(20), rng.normal(size=(3, 20)), rng.integers(0, 4, (5, 1, 20)).astype(float)
    share[:2] = 0.0, 1.0
    items, kept = pd.DataFrame({"share": share}), np.clip(share, 0.02, 0.98)
    x = np.log(kept / (1 - kept))
    assert ch.share_slope(y, items, np.ones((1, 20))) == pytest.approx([np.polyfit(x, row, 1)[0] for row in y])
    got = ch.share_slope(y, items, counts)
    for drawn, count in zip(got, counts[:, 0].astype(int), strict=True):
        again = np.repeat(np.arange(20), count)
        assert drawn == pytest.approx([np.polyfit(x[again], row[again], 1)[0] for row in y])
    assert ch.share_slope(x[None] - 3, items, np.ones((1, 20))) == pytest.approx(1), "a liking of one word is no bias"


def test_sides_of_the_pronouns_share_nothing():
    select, judge = ch.pronouns("speech", "select").items, [ch.pronouns(c, "judge").items for c in ch.CONTEXTS]
    assert len(select) == 3 * 29 == len(judge[0]) and select["item"].is_unique
    for items in judge:
        assert not set(select["cluster"]) & set(items["cluster"]) and not set(select["text"]) & set(items["text"])
        assert not items["text"].str.contains(r"\ba [aeiou]|\{").any() and items["share"].between(0, 1).all()
    for items in (select, *judge[:4]):
        said = items["text"].str.contains(r"\b(?:she|he|her|his|him|woman|man)\b", case=False)
        assert not said.any() and items["share"].min() < 0.05 and items["share"].max() > 0.9
        assert ((items["share"] > 0.5) == (items["stereotype"] == "a")).all()
    assert set(judge[4]["share"]) == {0.0, 1.0} and len(ch.pronouns("speech").items) == 6 * 29
    halves = [ch.pronouns("story", side, every=True).items for side in ("select", "judge")]
    assert [len(h) for h in halves] == [3 * 29] * 2 and not set(halves[0]["cluster"]) & set(halves[1]["cluster"])
    with pytest.raises(ValueError, match="context 'prayer' is unknown: choose one of speech"):
        ch.pronouns("prayer")
    with pytest.raises(ValueError, match="sentences of context story, side select: the table has no rows"):
        ch.pronouns("story", "select")


HEAD = {  # head 1 of layer 0: its output and value weights
    "transformer.h.0.attn.c_proj.weight": (slice(16, 32), slice(None)),
    "transformer.h.0.attn.c_attn.weight": (slice(None), slice(144, 160)),
}
UNITS = {  # units 40 and 41 of layer 2
    "transformer.h.2.mlp.c_proj.weight": (slice(40, 42), slice(None)),
    "transformer.h.2.mlp.c_fc.weight": (slice(None), slice(40, 42)),
}


def plant(measure: ch.Choices, places: dict[str, tuple], steps: int = 24) -> LM:
    """tiny-gpt2, some of whose weights are trained until its pronouns follow the occupations."""
    lm = load("tiny-gpt2", device="cpu")
    check_unembedding(lm)
    rows, weights = measure.prepare(lm, measure.rows), dict(lm.model.named_parameters())
    women = measure.items.set_index("item")["share"][rows["item"]].to_numpy() > 0.5
    sign = torch.tensor(np.where(women, 1.0, -1.0) * rows["weight"])
    optimiser = torch.optim.Adam([weights[name].requires_grad_(True) for name in places], lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.enable_grad():
            for which, ids in measure._per_row(lm, rows, 4096)[0]:
                (-(sign[which] * ch.log_odds(lm, ids, rows.iloc[which.numpy()])).sum()).backward()
        for name, place in places.items():
            weights[name].grad.zero_()[place] = weights[name].grad[place].clone()
        optimiser.step()
    lm.model.requires_grad_(False)
    return lm


@pytest.mark.parametrize(("kind", "places", "planted_parts"), [("heads", HEAD, [1]), ("units", UNITS, [552, 553])])
def test_planted_parts_are_found_and_random_ones_do_nothing(kind, places, planted_parts):
    measure = ch.pronouns("speech", "select")
    measure = measure.where(measure.items["cluster"].isin(sorted(set(measure.items["cluster"]))[::4]).to_numpy())
    lm = plant(measure, places)
    harm = np.zeros((4, 4 if kind == "heads" else 256))
    share = len(planted_parts) / harm.size

    def method(harm: np.ndarray) -> parts.Method:
        if kind == "heads":
            return parts.fasp(0.25, share, harm)
        return parts.by_slope(kind, share, protect=4 / harm.size, harm=harm)

    harm.ravel()[[0, 5, 9, 15]] = 1
    chosen = method(harm)(lm, measure)
    assert sorted(getattr(chosen, kind)) == planted_parts
    controls = [parts.matched(method(harm), seed)(lm, measure) for seed in range(8)]
    controls = [c for c in dict.fromkeys(controls) if c != chosen]
    start, left, *random = measure.readings(measure.read(lm, [Pruning(), chosen, *controls])).bias()
    assert start > 0.3 and abs(left) < 0.2 * start and len(random) > 1 and min(random) > 0.7 * start
    harm.ravel()[planted_parts] = 2  # what prose needs stays
    assert not getattr(method(harm)(lm, measure), kind) & set(planted_parts)


@pytest.fixture
def words(tmp_path) -> str:
    """w20 has both tones and doesn't count."""
    path = tmp_path / "words.csv"
    path.write_text("word,tone\nawful,unkind\nrude,unkind\nw20,unkind\nkind,kind\ngentle,kind\nw20,kind\n")
    return str(path)


def toned(words: str, frame: str = "") -> ch.TextMeasure:
    items = toxicity.items(pd.DataFrame({"prompt": PROMPTS, "group": list("abab")}))
    return ch.tone(items, frame=frame, words=words)


def test_tone_of_every_architecture(arch_lm, words):
    prunings = [Pruning(), Pruning(heads={1}), Pruning(heads={5, 6})]
    got = toned(words, " and").read(arch_lm, prunings)["value"].to_numpy()
    slow = []
    for pruning in prunings:
        with masked(arch_lm, pruning):
            p = [np.exp([log_p(arch_lm, f"{x} and", f" {w}") for x in PROMPTS]) for w in TONES]
        slow.append((p[0] + p[1]) / sum(p))
    assert got == pytest.approx(np.concatenate(slow), abs=2e-4) and got.std() > 1e-3


def test_tone_finds_the_planted_head(planted):
    measure = ch.tone(toxicity.items(prompts.load("invented_group", "valid", "models/planted/prompts.csv")), frame="")
    z = measure.readings(measure.read(planted, [Pruning(), *[Pruning(heads={h}) for h in range(16)]])).z()
    truth = json.loads(user_path("models/planted/truth.json").read_text())
    head = truth["layer"] * planted.anatomy.n_heads + truth["head"]
    assert z.argmax() == head and z[head] > 2 * np.delete(z, head).max()


def test_words_that_do_not_do(tiny, tmp_path, words):
    (tmp_path / "bad.csv").write_text("word,tone\nawful,unkind\nawful,kind\n")
    with pytest.raises(ValueError, match="needs unkind and kind words that are a single token"):
        toned(str(tmp_path / "bad.csv")).read(tiny, [Pruning()])
    with pytest.raises(ValueError, match="a text of 145 tokens exceeds the model's context of 64"):
        toned(words, " my" * 140).read(tiny, [Pruning()])


def test_texts_to_tune_on():
    items = ch.pronouns("speech", "select").items
    both = tuning.tuning_texts(items, seed=0)
    for i, item in enumerate(items.itertuples()):
        for text, word in zip(both[2 * i : 2 * i + 2], (item.a, item.b), strict=True):
            assert text.startswith(f"{item.text}{word} ") and text.endswith(".")
    chance, women = np.random.default_rng(1).random(len(items)), np.zeros(len(items))
    for seed in range(40):
        texts = tuning.tuning_texts(items, seed=seed, chance=chance)
        first = [t[len(p) :].startswith(" she ") for p, t in zip(items["text"].repeat(2), texts, strict=True)]
        women += np.reshape(first, (-1, 2)).mean(1) / 40
    assert np.abs(women - chance).max() < 0.25 and np.corrcoef(women, chance)[0, 1] > 0.97


def test_a_copy_learns_what_the_texts_say():
    lm, measure = load("tiny-llama", device="cpu"), ch.pronouns("speech", "select")
    measure = measure.where(measure.items["cluster"].isin(["mechanic", "secretary"]).to_numpy())
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    slopes = []
    for chance in ((measure.items["share"] > 0.5).to_numpy(dtype=float), None):
        texts = tuning.tuning_texts(measure.items, seed=0, chance=chance)
        copy = tuning.tuned(lm, texts, epochs=40, rate=3e-3, batch=4, seed=0)
        slopes.append(measure.readings(measure.read(copy, [Pruning()])).bias()[0])
        assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert slopes[0] > 0.8 > 0.2 > abs(slopes[1]) and copy.model is not lm.model and copy.revision != lm.revision


def test_tuning_is_deterministic_and_keeps_small_steps_of_bfloat16():
    lm = load("tiny-gpt2", dtype="bfloat16", device="cpu")
    texts = [f"The mechanic said that she has {k} cats." for k in range(40)]
    how = {"epochs": 1, "rate": 1e-5, "batch": 16}
    one, again, other = (tuning.tuned(lm, texts, seed=s, **how).model.state_dict() for s in (0, 0, 1))
    start = lm.model.state_dict()
    assert all(torch.equal(v, again[k]) and v.dtype == torch.float32 for k, v in one.items())
    assert any(not torch.equal(v, other[k]) for k, v in one.items())
    moved = [(v != start[k].float()).float().mean() for k, v in one.items() if v.dim() > 1]
    assert np.mean(moved) > 0.2 and max((v - start[k].float()).abs().max() for k, v in one.items()) < 1e-4
