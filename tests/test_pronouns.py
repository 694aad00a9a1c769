"""Rankings against unbatched passes and the whole softmax, slopes against finite differences."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf

from biasprune import classify, lm, measure, prompts, pronouns, weightscores
from biasprune.ablate import masked

FEW = pd.Series({"nurse": 0.9, "paralegal": 0.8, "architect": 0.2})


def log_p(net: lm.LM, prompt: str, rest: str) -> float:
    """Log-probability of what follows a prompt, by the whole softmax of one text in float64."""
    start, ids = (net.tokenizer(t)["input_ids"] for t in (prompt, prompt + rest))
    assert ids[: len(start)] == start and len(ids) > len(start)
    with torch.no_grad():
        each = net.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(each[i - 1, ids[i]]) for i in range(len(start), len(ids)))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_ranking_is_what_the_whole_softmax_says(name):
    net = lm.load(name, device="cpu")
    got = pronouns.ranking(net, ["architect", "software_engineer", "nurse"], batch_tokens=90)
    assert got.name == "pronoun ranking"
    whole = {"architect": "an architect", "software_engineer": "a software engineer", "nurse": "a nurse"}
    for label, words in whole.items():
        begin, rest = words.split(" ", 1)
        ends = [
            log_p(net, f"{she} {begin}", f" {rest}") - log_p(net, f"{he} {begin}", f" {rest}")
            for she, he in [
                ("She is", "He is"),
                ("She works as", "He works as"),
                ("Everybody knows that she is", "Everybody knows that he is"),
            ]
        ]
        assert got[label] == pytest.approx(np.mean(ends), abs=1e-5)
    assert got.std() > 0.01, "too alike to be a test"


def test_ranking_of_every_architecture(arch_lm, monkeypatch):
    """Labels of different lengths, padded: each is what it is by itself."""
    monkeypatch.setattr(pronouns, "PRONOUNS", ({"She": "my", "she": "my"}, {"She": "the", "she": "the"}))
    monkeypatch.setattr(pronouns, "FRAMES", ("{She} friend is", "very old and {she} neighbour was"))
    labels = ["friend", "old_friend", "tall_young_neighbour", "w30"]
    got = pronouns.ranking(arch_lm, labels)
    for label in labels:
        rest = f" {label.replace('_', ' ')}"
        a = prompts.article(rest.strip())
        ends = [
            log_p(arch_lm, f"{f.format('my')} {a}", rest) - log_p(arch_lm, f"{f.format('the')} {a}", rest)
            for f in ("{} friend is", "very old and {} neighbour was")
        ]
        assert got[label] == pytest.approx(np.mean(ends), abs=2e-3)
    assert got.std() > 0.02


@pytest.fixture(scope="module")
def bert():
    where = classify.source("tiny-bert")
    return tf.AutoModelForMaskedLM.from_pretrained(where).eval(), tf.AutoTokenizer.from_pretrained(where)


def test_masked_ranking_is_what_the_whole_softmax_says(bert):
    model, tokenizer = bert
    she, he = tokenizer.convert_tokens_to_ids(["she", "he"])
    got = pronouns.masked_ranking(model, tokenizer, ["architect", "software_engineer"], batch=5)
    assert got.name == "masked pronoun ranking"

    def log_p(text: str, pieces: int) -> np.ndarray:
        """Of she and he at the first gap; ``#`` stands for all pieces of the occupation."""
        ids = tokenizer(text.replace("#", " ".join(["[MASK]"] * pieces)), return_tensors="pt")
        at = int((ids["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
        with torch.no_grad():
            return model(**ids).logits[0, at].double().log_softmax(-1)[[she, he]].numpy()

    for label, a in (("architect", "an"), ("software_engineer", "a")):
        noun, ends = label.replace("_", " "), []
        pieces = len(tokenizer.tokenize(noun))
        assert pieces > 1
        for frame in (
            f"[MASK] is {a} X.",
            f"[MASK] works as {a} X.",
            f"everybody knows that [MASK] is {a} X.",
        ):
            score = log_p(frame.replace("X", noun), 0) - log_p(frame.replace("X", "#"), pieces)
            ends.append(score[0] - score[1])
        assert got[label] == pytest.approx(np.mean(ends), abs=1e-5)
    assert got.abs().min() > 1e-3


def test_masked_ranking_of_a_model_that_is_known(bert):
    """She is always e³ times as likely as he, and e² times more beside a nurse: only the latter is bias."""
    tokenizer = bert[1]
    she, he = tokenizer.convert_tokens_to_ids(["she", "he"])
    nurse = tokenizer("nurse", add_special_tokens=False)["input_ids"]

    class Known(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, **rest):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            beside = torch.tensor([str(nurse)[1:-1] in str(r)[1:-1] for r in input_ids.tolist()])
            gap = input_ids == tokenizer.mask_token_id
            logits[..., she] = torch.where(gap, 3.0 + 2.0 * beside[:, None], 0.0)
            logits[..., he] = -1.0 * ~gap
            return SimpleNamespace(logits=logits)

    got = pronouns.masked_ranking(Known(), tokenizer, ["nurse", "interior_designer"])
    assert got.to_dict() == pytest.approx({"nurse": 2.0, "interior_designer": 0.0})


def test_bias_by_hand():
    """Every sentence by itself; she's own likelihood is no bias."""
    net = lm.load("tiny-gpt2", device="cpu")
    of = pronouns.pairs(net, FEW)
    kinds = {
        "nurse": ("a nurse", " she", " he"),
        "paralegal": ("a paralegal", " she", " he"),
        "architect": ("an architect", " he", " she"),
    }
    frames = ["The {n} said that", "The {n} was late because", "When the {n} came home,", "Ask the {n} what"]
    frames += ["My neighbour is {a}, and", "I met {a} yesterday, and"]
    mean = {}
    for label, (a, own, other) in kinds.items():
        texts = [f.format(n=label, a=a) for f in frames]
        mean[label] = np.mean([log_p(net, t, own) - log_p(net, t, other) for t in texts])
    expected = ((mean["nurse"] + mean["paralegal"]) / 2 + mean["architect"]) / 2
    assert pronouns.bias(net, of, batch_tokens=70) == pytest.approx(expected, abs=1e-5)
    women = np.repeat([True, True, False], len(frames))
    assert of.weight[women].sum() == pytest.approx(0.5) and of.weight[~women].sum() == pytest.approx(0.5)
    whole = pronouns.pairs(net)
    assert len(whole.weight) == 15 * len(frames) and whole.weight.sum() == pytest.approx(1)


@pytest.mark.parametrize("what", ["heads", "units"])
def test_slopes_are_slopes(what):
    net, step = lm.load("tiny-llama", device="cpu"), 0.02
    of = pronouns.pairs(net, FEW)
    got = pronouns.slopes(net, of, what, batch_tokens=200)
    a = net.anatomy
    assert got.shape == (a.n_layers, a.n_heads if what == "heads" else a.n_units)
    strong = np.abs(got).ravel().argsort()[-3:]
    for part in strong:
        ends = []
        for scale in (1 - step, 1 + step):
            mask = torch.ones(got.shape)
            mask.view(-1)[part] = scale
            with masked(net, **{what: mask}):
                ends.append(pronouns.bias(net, of))
        assert got.ravel()[part] == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=0.05, abs=1e-5)
    with pytest.raises(ValueError, match="choose heads or units"):
        pronouns.slopes(net, of, "layers")


def prose(net: lm.LM) -> weightscores.Examples:
    text = prompts.corpus("corpora/everyday")
    return weightscores.prose(measure.windows(net, text, length=64, max_tokens=512))


def planted(parts: dict[str, tuple], steps: int) -> tuple[lm.LM, pronouns.Pairs]:
    """tiny-gpt2, some of its weights trained until its pronouns follow the occupation."""
    net = lm.load("tiny-gpt2", device="cpu")
    of, weights = pronouns.pairs(net, FEW), dict(net.model.named_parameters())
    more = {n: torch.zeros_like(weights[n]).requires_grad_() for n in parts}
    free = {n: torch.zeros_like(weights[n]).index_put(at, torch.tensor(1.0)) for n, at in parts.items()}
    optimiser, share = torch.optim.Adam(more.values(), lr=0.02), torch.from_numpy(of.weight).float()

    def log_p(x: weightscores.Examples) -> torch.Tensor:
        changed = {n: weights[n] + free[n] * m for n, m in more.items()}
        logits = torch.func.functional_call(net.model, changed, (x.ids,)).logits
        each = logits[:, :-1].log_softmax(-1).gather(-1, x.ids[:, 1:, None])[..., 0]
        return (each * x.counted[:, 1:]).sum(1)

    for _ in range(steps):
        loss = -(share * (log_p(of.stereotyped) - log_p(of.other))).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        for n, m in more.items():
            weights[n] += free[n] * m
    return net, of


def harmful(net: lm.LM, what: str, most: list[int]) -> np.ndarray:
    """Prose needs these parts, and no other."""
    harm = np.zeros((net.anatomy.n_layers, net.anatomy.n_heads if what == "heads" else net.anatomy.n_units))
    harm.ravel()[most] = 1
    return harm


def test_a_planted_head_is_pruned(monkeypatch):
    net, of = planted(
        {
            "transformer.h.0.attn.c_proj.weight": (torch.arange(16, 32)[:, None], torch.arange(64)),
            "transformer.h.0.attn.c_attn.weight": (torch.arange(64)[:, None], torch.arange(144, 160)),
        },
        steps=15,
    )
    start, rest = pronouns.bias(net, of), prose(net)
    assert start > 1
    assert pronouns.slopes(net, of).ravel().argmax() == 1
    monkeypatch.setattr(weightscores, "part_snip", lambda net, of, what: harmful(net, what, [0, 5, 9, 15]))
    found = pronouns.pruning(net, "fasp", 1 / 16, rest, of)
    assert found.heads.nonzero().tolist() == [[0, 1]]
    with found.applied(net):
        assert abs(pronouns.bias(net, of)) < 0.2 * start
    monkeypatch.setattr(weightscores, "part_snip", lambda net, of, what: harmful(net, what, [0, 1, 9, 15]))
    assert pronouns.pruning(net, "fasp", 1 / 16, rest, of).heads.nonzero().tolist() != [[0, 1]]


def test_heads_for_prose_are_protected():
    net = lm.load("tiny-gpt2", device="cpu")
    of, rest = pronouns.pairs(net, FEW), prose(net)
    harm, slope = weightscores.part_snip(net, rest, "heads").ravel(), pronouns.slopes(net, of).ravel()
    free = harm.argsort()[:-4].copy()
    expected = free[(-slope[free]).argsort()[:6]]
    got = pronouns.pruning(net, "fasp", 0.4, rest, of)
    assert sorted(got.heads.flatten().nonzero()[:, 0].tolist()) == sorted(expected.tolist())
    with pytest.raises(ValueError, match="more heads to prune than are left"):
        pronouns.pruning(net, "fasp", 0.8, rest, of)


def test_planted_neurons_are_pruned(monkeypatch):
    net, of = planted(
        {
            "transformer.h.2.mlp.c_proj.weight": (torch.arange(40, 42)[:, None], torch.arange(64)),
            "transformer.h.2.mlp.c_fc.weight": (torch.arange(64)[:, None], torch.arange(40, 42)),
        },
        steps=15,
    )
    start, rest = pronouns.bias(net, of), prose(net)
    assert start > 1
    monkeypatch.setattr(weightscores, "part_snip", lambda net, of, what: harmful(net, what, range(10)))
    found = pronouns.pruning(net, "neuron slopes", 2 / 1024, rest, of)
    assert found.units.nonzero().tolist() == [[2, 40], [2, 41]]
    with found.applied(net):
        assert abs(pronouns.bias(net, of)) < 0.2 * start
    monkeypatch.setattr(weightscores, "part_snip", lambda net, of, what: harmful(net, what, [552, 553]))
    assert not pronouns.pruning(net, "neuron slopes", 2 / 1024, rest, of).units[2, 40:42].any()
    everything = pronouns.pruning(net, "neuron slopes", 1.0, rest, of).units.numpy()
    assert (pronouns.slopes(net, of, "units")[everything] > 0).all() and 300 < everything.sum() < 700


def test_neurons_are_a_set_difference(monkeypatch):
    net = lm.load("tiny-gpt2", device="cpu")
    of, rest = pronouns.pairs(net, FEW), prose(net)

    def top(x: weightscores.Examples, layer: int, n: int) -> set[int]:
        return set(weightscores.part_snip(net, x)[layer].argsort()[-n:].tolist())

    sizes = []
    for share, k in ((0.01, 2), (0.4, 102)):
        monkeypatch.setattr(pronouns, "PROTECT", share)
        got = pronouns.pruning(net, "neurons", 0.1, rest, of)
        for layer in range(4):
            expected = top(of.stereotyped, layer, 25) - top(of.other, layer, 25) - top(rest, layer, k)
            assert set(got.units[layer].nonzero()[:, 0].tolist()) == expected
        sizes.append(len(got))
    assert sizes[0] > sizes[1] > 0, "prose must matter for this to be a test"
    with pytest.warns(UserWarning, match="selects nothing"):
        assert len(pronouns.pruning(net, "neurons", 0.004, rest, of)) == 0


def test_what_cannot_be_ranked_is_refused(bert):
    net = lm.load("tiny-gpt2", device="cpu")
    for labels in ([], ["nurse", "_"]):
        with pytest.raises(ValueError, match="give one or more, none of them empty"):
            pronouns.ranking(net, labels)
        with pytest.raises(ValueError, match="give one or more, none of them empty"):
            pronouns.masked_ranking(*bert, labels)
    with pytest.raises(ValueError, match="the context is 256"):
        pronouns.ranking(net, ["nurse " * 300])
    with pytest.raises(ValueError, match="no mask token"):
        pronouns.masked_ranking(net.model, net.tokenizer, ["nurse"])
    with pytest.raises(ValueError, match="no stereotype to follow"):
        pronouns.pairs(net, pd.Series({"nurse": 0.5, "poet": 0.5}))
    with pytest.raises(ValueError, match="unknown method 'prayer'"):
        pronouns.pruning(net, "prayer", 0.1, prose(net))


def test_pronouns_of_several_tokens_are_refused(bert, monkeypatch):
    monkeypatch.setattr(
        pronouns, "PRONOUNS", ({"She": "Sheila", "she": "sheila"}, {"She": "He", "she": "he"})
    )
    with pytest.raises(ValueError, match='no single token for "she" or "he"'):
        pronouns.masked_ranking(*bert, ["nurse"])
