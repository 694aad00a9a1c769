"""Probabilities of numeric answers against one answer at a time, against sampling; slopes by differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_lm

from biasprune import ablate, answers, audit, gaps
from biasprune import lm as lm_module

KEY = ("c", "v")
ASKED = pd.DataFrame(
    {
        "context": "c",
        "variation": "v",
        "name": ["n0", "n1", "n2", "n3"],
        "race": ["white", "black"] * 2,
        "gender": "f",
        "prompt": ["the friend", "my neighbour is", "a w3", "a w9"],
    }
)
# one begins another, one leads on from a third
NUMBERS = {
    KEY: answers.Numbers(
        tokens=[(5,), (5, 6), (7, 8, 9), (10, 4), (10,)], values=np.array([1.0, 16.0, 0.0, 4.0, 2.0])
    )
}


def one_by_one(
    lm, prompt: str, numbers: answers.Numbers, temperature: float, stops: list[int]
) -> list[float]:
    """Oracle: token by token, every answer by itself, nothing cached; longer answers first."""
    start, found = lm.tokenizer(prompt)["input_ids"], {}

    def following(answer: tuple[int, ...]) -> torch.Tensor:
        logits = lm.model(torch.tensor([start + list(answer)])).logits[0, -1]
        return (logits.double() / temperature).softmax(-1)

    for answer in sorted(numbers.tokens, key=len, reverse=True):
        p = np.prod([float(following(answer[:i])[token]) for i, token in enumerate(answer)])
        p *= 1 - float(following(answer)[stops].sum())
        longer = [o for o in found if o[: len(answer)] == answer and o[len(answer)] not in stops]
        found[answer] = p - sum(found[o] for o in longer)
    return [found[answer] for answer in numbers.tokens]


@torch.no_grad()
def test_distribution_is_the_definition(arch_lm):
    heads = torch.zeros(arch_lm.anatomy.n_layers, 4).bool()
    heads[:, 2] = True
    masks = ablate.Pruning(heads=heads)
    comma = [i for t, i in arch_lm.tokenizer.get_vocab().items() if t[0] == ","]
    for pruning in (ablate.Pruning(), masks):
        with pruning.applied(arch_lm):
            got = answers.distribution(arch_lm, ASKED, NUMBERS, temperature=1.5, batch_tokens=24)
            expected = [one_by_one(arch_lm, p, NUMBERS[KEY], 1.5, comma) for p in ASKED["prompt"]]
        assert got["name"].tolist() == np.repeat(ASKED["name"], 5).tolist()
        np.testing.assert_allclose(got["p"].to_numpy().reshape(4, 5), expected, rtol=2e-3, atol=1e-7)
        assert (got.groupby("name")["p"].sum() < 1).all()
        assert got["value"].tolist() == NUMBERS[KEY].values.tolist() * 4


@torch.no_grad()
def test_digits_carry_a_number_on():
    lm = lm_module.load("planted-audit", device="cpu")
    digits = [i for t, i in lm.tokenizer.get_vocab().items() if t[0] in "0123456789," or t in "kK"]
    assert sorted(digits) == answers._carries(lm).tolist() and len(digits) >= 10
    four, zero = (lm.tokenizer.get_vocab()[t] for t in "40")
    numbers = {KEY: answers.Numbers(tokens=[(four,), (four, zero)], values=np.array([4.0, 40.0]))}
    got = answers.distribution(lm, ASKED.head(1), numbers)
    expected = one_by_one(lm, ASKED["prompt"][0], numbers[KEY], 0.6, digits)
    np.testing.assert_allclose(got["p"], expected, rtol=1e-4, atol=1e-9)


def test_candidates_and_agreement_with_sampling():
    lm = lm_module.load("planted-audit", device="cpu")
    contexts, names = (audit.load(w, f"models/planted-audit/{w}.csv") for w in ("contexts", "names"))
    asked = audit.questions(lm, contexts.head(1), names.groupby("race").head(2), chat=False)
    sampled = audit.ask(lm, asked, seeds=range(600), max_new_tokens=6)
    key = (contexts["context"][0], contexts["variation"][0])
    numbers = answers.candidates(lm, sampled, most=6)
    counts = sampled["tokens"].value_counts()
    assert [" ".join(map(str, t)) for t in numbers[key].tokens] == counts.drop("", errors="ignore").head(
        6
    ).index.tolist()
    got = answers.distribution(lm, asked, numbers)
    for r in got.itertuples():
        share = (sampled.loc[sampled["name"] == r.name, "value"] == r.value).mean()
        assert share == pytest.approx(r.p, abs=4.5 * np.sqrt(0.25 / 600))
    whole = gaps.moments(got)
    assert (whole["off"] == 1 - got.groupby("name", sort=False)["p"].sum().to_numpy()).all()
    assert (whole["off"].between(0, 0.2)).all(), "six numbers are most of what this model answers"


def expected_log(lm, heads=None, units=None) -> np.ndarray:
    with torch.no_grad(), ablate.masked(lm, heads, units):
        got = answers.distribution(lm, ASKED, NUMBERS, temperature=1.0)
    of = got[got["value"] > 0]
    return np.array([np.average(np.log(g["value"]), weights=g["p"]) for _, g in of.groupby("name")])


def test_slopes_by_finite_differences(arch_lm):
    heads, units = answers.slopes(arch_lm, ASKED, NUMBERS, temperature=1.0, batch_tokens=24)
    rng, step = np.random.default_rng(0), 1e-2
    for array, what in ((heads, "heads"), (units, "units")):
        scale = np.abs(array).max()
        for _ in range(3):
            layer, part = rng.integers(array.shape[1]), rng.integers(array.shape[2])
            ends = []
            for sign in (1, -1):
                mask = torch.ones(array.shape[1:])
                mask[layer, part] += sign * step
                ends.append(expected_log(arch_lm, **{what: mask}))
            np.testing.assert_allclose(
                array[:, layer, part], (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=0.01 * scale
            )


def test_slope_of_gap_is_that_of_the_gap():
    """Against the SMD itself, its spread held fixed, when a mask moves a little."""
    lm = random_lm("gpt2")
    dist = answers.distribution(lm, ASKED, NUMBERS, temperature=1.0)
    each = gaps.moments(dist)
    heads, _ = answers.slopes(lm, ASKED, NUMBERS, temperature=1.0)
    slope = gaps.slope_of_gap(heads, ASKED, each)
    table = gaps.gaps(dist, log=True, n_boot=10)
    white, black = (each[each["race"] == g] for g in ("white", "black"))
    spread = (white["mean"].mean() - black["mean"].mean()) / table["smd"][0]
    at = np.unravel_index(np.abs(slope).argmax(), slope.shape)
    mask = torch.ones(3, 4)
    mask[at] += 1e-2
    moved = expected_log(lm, mask) - expected_log(lm)
    expected = np.sign(table["smd"][0]) * (moved[[0, 2]].mean() - moved[[1, 3]].mean()) / 1e-2 / spread
    assert slope[at] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: answers.distribution(lm, ASKED, NUMBERS, temperature=0), "temperature 0"),
        (lambda lm: answers.distribution(lm, ASKED, {}), "c, v: no candidate answers"),
        (
            lambda lm: answers.distribution(lm, ASKED.assign(prompt="a " * 63), NUMBERS),
            "longer than the model's context",
        ),
        (
            lambda lm: answers.candidates(lm, ASKED.assign(tokens="", text="no idea", value=np.nan)),
            "c, v: 0 different numbers among 4 answers, such as 'no idea'",
        ),
    ],
)
def test_bad_input(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_carriers_of_any_tokenizer():
    """Byte-level and SentencePiece names of tokens."""

    class Names:
        def __len__(self) -> int:
            return 12

        def convert_ids_to_tokens(self, ids) -> list[str]:
            return ["5", "50", "Ġ5", "▁5", ",", ",000", ".", "k", "Ġk", "Ġthousand", "▁Million", "km"]

    lm = random_lm("llama")
    fake = lm_module.LM(
        model=lm.model, tokenizer=Names(), anatomy=lm.anatomy, name="x", folder=None, origin=""
    )
    assert answers._carries(fake).tolist() == [0, 1, 4, 5, 7, 9, 10]


def test_half_precision_is_mended_where_it_matters():
    """Logits are rounded to steps of 1/16 and more in bfloat16; probabilities must not be."""
    lm = random_lm("llama")
    head = lm.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(30 / float(head.weight.norm(dim=1).mean()))
        hidden = torch.randn(64, head.weight.shape[1])
        hidden = hidden.bfloat16().float()
        head.weight.copy_(head.weight.bfloat16().float())
        exact = (head(hidden) / 0.6).logsumexp(-1)
        half = lm_module.LM(**{**lm.__dict__, "model": lm.model.bfloat16()})
        rough = (half.model.get_output_embeddings()(hidden.bfloat16()).float() / 0.6).logsumexp(-1)
        mended = answers._normaliser(half, hidden.bfloat16(), 0.6)
    assert (mended - exact).abs().max() < 0.01 < (rough - exact).abs().max()
