"""Next-word scores against the whole softmax, first-order effects against finite differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from biasprune import likelihood as lk
from biasprune import lm, measure, prompts
from biasprune.ablate import head_masks, masked

PROMPTS = ["my friend is", "the old neighbour was very", "a tall friend who was", "my young friend is"]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text("word,tone\nawful,unkind\nrude,unkind\nw20,unkind\nkind,kind\ngentle,kind\nw20,kind\n")
    return path


def slow(net, prompt: str, mask) -> float:
    """The whole softmax of one prompt in float64; w20 has both tones and doesn't count."""
    ids = {w: net.tokenizer(w)["input_ids"][0] for w in ("awful", "rude", "kind", "gentle")}
    with torch.no_grad(), masked(net, mask):
        logits = net.model(torch.tensor([net.tokenizer(prompt)["input_ids"]])).logits[0, -1].double()
    p = logits.softmax(-1)
    unkind, kind = float(p[ids["awful"]] + p[ids["rude"]]), float(p[ids["kind"]] + p[ids["gentle"]])
    return unkind / (unkind + kind)


def test_scores_of_every_architecture(arch_lm, words):
    masks = head_masks(arch_lm.anatomy, [[], [1], [5, 6], [arch_lm.anatomy.n_flat - 1]])
    got = lk.scores(arch_lm, PROMPTS, masks, frame=" and", words=words, batch_tokens=12)
    expected = [[slow(arch_lm, p + " and", m) for p in PROMPTS] for m in masks]
    assert got == pytest.approx(np.array(expected), abs=2e-4)
    assert got.std() > 1e-3, "masks and prompts must matter for this to be a test"


def test_first_order_is_the_slope(tiny, words):
    step, heads = 3e-3, [0, 5, 11]
    got = lk.without_heads(tiny, PROMPTS, heads, frame="", words=words)
    assert got.shape == (4, 4)
    for i, h in enumerate(heads):
        ends = []
        for scale in (1 - step, 1 + step):
            mask = torch.ones(1, 3, 4)
            mask.view(-1)[h] = scale
            ends.append(lk.scores(tiny, PROMPTS, mask, frame="", words=words)[0])
        slope = (ends[1] - ends[0]) / (2 * step)
        assert got[0] - got[i + 1] == pytest.approx(slope, abs=1e-4 + 0.01 * np.abs(slope).max())
        assert np.abs(slope).max() > 0.005, "too flat to be a test"
    whole = lk.without_heads(tiny, PROMPTS, heads, exact=True, frame="", words=words)
    masks = head_masks(tiny.anatomy, [[], *([h] for h in heads)])
    assert (whole == lk.scores(tiny, PROMPTS, masks, frame="", words=words)).all()


def test_planted_head_is_found():
    net = lm.load("planted")
    table = prompts.load("invented_group", "valid", "models/planted/prompts.csv")
    values = lk.without_heads(net, list(table["prompt"]), exact=True, frame="")
    bias = measure.group_bias(values, table["bucket"])
    z = bias[0] - bias[1:]
    truth = pd.read_json(prompts.user_path("models/planted/truth.json"), typ="series")
    head = truth["layer"] * net.anatomy.n_heads + truth["head"]
    assert z.argmax() == head and z[head] > max(0.9 * bias[0], 2 * np.delete(z, head).max())


def test_words_that_do_not_do(tiny, tmp_path):
    with pytest.raises(ValueError, match="No such file of words"):
        lk.first_tokens(tiny, tmp_path / "none.csv")
    path = tmp_path / "bad.csv"
    path.write_text("word,tone\nawful,bad\n")
    with pytest.raises(ValueError, match="tones are unkind and kind"):
        lk.first_tokens(tiny, path)
    path.write_text("word,tone\nawful,unkind\nawful,kind\n")
    with pytest.raises(ValueError, match="is a single token of its own"):
        lk.first_tokens(tiny, path)


def test_bad_prompts(tiny, words):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        lk.scores(tiny, [" "], frame="", words=words)
    with pytest.raises(ValueError, match="exceeds the model's context"):
        lk.scores(tiny, ["my " * 70], words=words)
    with pytest.raises(ValueError, match="unknown options"):
        lk.without_heads(tiny, PROMPTS, words=words, nothing=1)


def test_packaged_words_begin_differently():
    net = lm.load("tiny-gpt2")
    unkind, kind = lk.first_tokens(net)
    assert len(unkind) >= 4 and len(kind) >= 4 and not set(unkind.tolist()) & set(kind.tolist())
