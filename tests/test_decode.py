"""Coupled sampling: the right distribution, the same noise everywhere, the same text as other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biasprune import ablate, decode

PROMPTS = ["the friend", "my neighbour is very kind and the", "a", "the friend is", "who was"]


def test_noise_is_gumbel():
    keys = decode.stream_keys([f"prompt {i}" for i in range(200)], seed=3)
    noise = decode.gumbel(keys, 5, torch.arange(100).expand(200, 100)).flatten().numpy()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-3


def test_noise_depends_on_seed_prompt_step_token_and_stream():
    tokens = torch.arange(50)[None]
    key = decode.stream_keys(["a prompt"], 0)
    base = decode.gumbel(key, 0, tokens)
    others = [
        decode.gumbel(decode.stream_keys(["a prompt"], 1), 0, tokens),
        decode.gumbel(decode.stream_keys(["b prompt"], 0), 0, tokens),
        decode.gumbel(decode.stream_keys(["a prompt"], 0, stream=1), 0, tokens),
        decode.gumbel(key, 1, tokens),
        decode.gumbel(key, 0, tokens + 1),
    ]
    for other in others:
        assert abs(np.corrcoef(base[0], other[0])[0, 1]) < 0.5
    assert torch.equal(base, decode.gumbel(decode.stream_keys(["x", "a prompt"], 0)[1:], 0, tokens))


@pytest.mark.parametrize(("top_k", "temperature"), [(0, 1.0), (5, 1.0), (5, 0.6), (1, 1.0)])
def test_picks_follow_the_softmax(top_k, temperature):
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    n = 20_000
    keys = decode.stream_keys([str(i) for i in range(n)], 0)
    picks = decode.pick(logits.expand(n, 12), keys, 0, top_k, temperature)
    kept = logits.clone() / temperature
    if top_k:
        kept[logits.argsort(descending=True)[top_k:]] = -torch.inf
    expected = torch.softmax(kept.double(), -1).numpy() * n
    seen = np.bincount(picks.numpy(), minlength=12)
    alive = expected > 0
    assert (seen[~alive] == 0).all()
    if alive.sum() > 1:
        assert stats.chisquare(seen[alive], expected[alive]).pvalue > 1e-3


def test_greedy_equals_transformers_generate(arch_lm):
    """Oracle: the library's own loop, left-padded, with the model's own cache."""
    model = arch_lm.model
    arch_lm.tokenizer.padding_side = "left"
    batch = arch_lm.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        theirs = model.generate(**batch, do_sample=False, max_new_tokens=9, pad_token_id=0)
    theirs = theirs[:, batch["input_ids"].shape[1] :].numpy()
    ours = decode.sample(arch_lm, PROMPTS, max_new_tokens=9, temperature=0).tokens[0, 0]
    ours = np.where(ours < 0, 0, ours)[:, : theirs.shape[1]]
    if model.config.model_type == "gpt_neo":  # transformers pads into its local attention window
        ours, theirs = ours[[1]], theirs[[1]]
    assert np.array_equal(ours, theirs)


def test_cached_steps_equal_full_passes(arch_lm):
    """Oracle: no cache, the whole text through the model for every token, one row at a time."""
    masks = ablate.head_masks(arch_lm.anatomy, [[], [1], [6, 7]])
    got = decode.sample(arch_lm, PROMPTS, masks=masks, seeds=(0, 4), max_new_tokens=7, top_k=8).tokens
    for m, mask in enumerate(masks):
        for s, seed in enumerate((0, 4)):
            for p in (0, 1, 2):
                ids = arch_lm.tokenizer(PROMPTS[p])["input_ids"]
                key = decode.stream_keys(PROMPTS[p : p + 1], seed)
                expected = []
                for step in range(7):
                    with torch.no_grad(), ablate.masked(arch_lm, mask):
                        logits = arch_lm.model(torch.tensor([ids + expected])).logits[:, -1]
                    expected.append(int(decode.pick(logits, key, step, 8, 1.0)))
                if 0 in expected:
                    end = expected.index(0) + 1
                    expected[end:] = [-1] * (7 - end)
                assert got[m, s, p].tolist() == expected


def test_replay_equals_sampling(arch_lm):
    """Whatever the draft, good or senseless, the tokens are those that sampling without one gives."""
    masks = ablate.head_masks(arch_lm.anatomy, [[], [0], [5], [9], [2, 11]])
    for options in ({"top_k": 8}, {"top_k": 0, "temperature": 0.7}, {"temperature": 0}):
        options = {"seeds": (0, 3), "max_new_tokens": 7, **options}
        expected = decode.sample(arch_lm, PROMPTS, masks=masks, **options).tokens
        base = decode.sample(arch_lm, PROMPTS, **options).tokens[0]
        senseless = np.random.default_rng(0).integers(-1, 64, base.shape)
        padded = np.where(base < 0, 0, base)  # as transformers pads, with the end of the text
        for draft in (base, senseless, padded):
            got = decode.sample(arch_lm, PROMPTS, masks=masks, draft=draft, batch_rows=9, **options)
            np.testing.assert_array_equal(got.tokens, expected)
        assert (expected[1:] != base).any(-1).mean() > 0.1, "the heads matter"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_replay_of_drawn_shapes(data):
    from conftest import random_lm

    lm = random_lm(data.draw(st.sampled_from(["gpt2", "llama", "gemma3"])))
    words = st.lists(st.sampled_from(["the", "friend", "is", "very"]), min_size=1, max_size=12)
    prompts = data.draw(st.lists(words.map(" ".join), min_size=1, max_size=6))
    heads = data.draw(st.lists(st.sets(st.integers(0, 11), max_size=3), min_size=1, max_size=5))
    masks = ablate.head_masks(lm.anatomy, heads)
    seeds, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    options = {"seeds": range(seeds), "max_new_tokens": steps, "top_k": data.draw(st.integers(0, 64))}
    alone = [
        decode.sample(lm, [p], masks=masks[[i]], **options).tokens[0, :, 0]
        for i in range(len(masks))
        for p in prompts
    ]
    expected = np.stack(alone).reshape(len(masks), len(prompts), seeds, steps).swapaxes(1, 2)
    draft = decode.sample(lm, prompts, **options).tokens[0]
    rows = data.draw(st.integers(1, 40))
    got = decode.sample(lm, prompts, masks=masks, draft=draft, batch_rows=rows, batch_tokens=rows, **options)
    np.testing.assert_array_equal(got.tokens, expected)


@pytest.mark.parametrize(("vocabulary", "k"), [(5000, 9), (4999, 7), (49152, 50), (300, 50), (12, 20)])
def test_top_equals_topk(vocabulary, k):
    logits = torch.randn(7, vocabulary).bfloat16()  # with ties
    values, tokens = decode.top(logits, k)
    assert torch.equal(values.sort().values, logits.topk(min(k, vocabulary)).values.sort().values)
    assert torch.equal(logits.gather(1, tokens), values)
    assert all(len(set(row)) == len(row) for row in tokens.tolist())


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    rows=st.integers(1, 40),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
)
def test_result_does_not_depend_on_batch_or_order(order, rows, seeds):
    from conftest import random_lm

    lm = random_lm("llama")
    masks = ablate.head_masks(lm.anatomy, [[0], [5, 6]])
    options = {"masks": masks, "seeds": seeds, "max_new_tokens": 5, "top_k": 10}
    whole = decode.sample(lm, PROMPTS, **options)
    parts = decode.sample(lm, [PROMPTS[i] for i in order], batch_rows=rows, **options)
    assert np.array_equal(parts.tokens, whole.tokens[:, :, list(order)])
    assert np.array_equal(parts.texts, whole.texts[:, :, list(order)])


def test_streams_decouple(tiny):
    masks = ablate.head_masks(tiny.anatomy, [[], [], []])
    coupled = decode.sample(tiny, PROMPTS, masks=masks, max_new_tokens=8).tokens
    apart = decode.sample(tiny, PROMPTS, masks=masks, streams=[0, 1, 2], max_new_tokens=8).tokens
    assert (coupled == coupled[:1]).all()
    assert np.array_equal(apart[0], coupled[0]) and (apart[1] != apart[2]).any()


def test_out_of_memory_halves_and_gives_the_same(tiny, monkeypatch):
    expected = decode.sample(tiny, PROMPTS, masks=torch.ones(4, 3, 4), max_new_tokens=4)
    real, sizes = decode._decode, []

    def small(s, waiting):
        sizes.append(sum(len(w.sample) for w in waiting))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("pretended")
        real(s, waiting)

    monkeypatch.setattr(decode, "_decode", small)
    for draft in (None, np.zeros((1, 5, 4), dtype=int)):
        sizes.clear()
        got = decode.sample(tiny, PROMPTS, masks=torch.ones(4, 3, 4), max_new_tokens=4, draft=draft)
        assert np.array_equal(got.tokens, expected.tokens) and max(sizes) > 1

    def never(*args):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(decode, "_decode", never)
    with pytest.raises(torch.OutOfMemoryError):
        decode.sample(tiny, PROMPTS, max_new_tokens=4)


def test_texts_end_at_the_end_token(planted):
    out = decode.sample(planted, ["My Ostrin friend is"] * 1, seeds=range(20), max_new_tokens=40)
    assert (out.tokens == -1).any() and not any("<|end|>" in t for t in out.texts.flatten())
    for row in out.tokens[0, :, 0]:
        ended = np.flatnonzero(row == -1)
        assert not len(ended) or (row[ended[0] :] == -1).all()


def log_prob_by_hand(lm, prompt, tokens, mask, top_k, temperature) -> torch.Tensor:
    """Oracle: one token at a time, the whole text through the model, among the unpruned model's k."""
    ids, total = lm.tokenizer(prompt)["input_ids"], 0.0
    for token in tokens:
        if token < 0:
            break
        kept = lm.model(torch.tensor([ids])).logits[0, -1].topk(top_k).indices
        with ablate.masked(lm, mask):
            logits = lm.model(torch.tensor([ids])).logits[0, -1].double() / temperature
        total = total + logits[token] - logits[kept].logsumexp(0)
        ids = [*ids, int(token)]
    return total


@pytest.mark.parametrize(("top_k", "temperature"), [(8, 1.0), (64, 0.7)])
@pytest.mark.parametrize("heads", [[[2], [5], [11], [0, 9]], [[3]]])
def test_log_ratio(arch_lm, top_k, temperature, heads):
    sampling = {"top_k": top_k, "temperature": temperature}
    tokens = decode.sample(arch_lm, PROMPTS, seeds=(0, 1), max_new_tokens=5, **sampling).tokens[0]
    masks = ablate.head_masks(arch_lm.anatomy, heads)
    got = decode.log_ratio(arch_lm, PROMPTS, tokens, masks, batch_tokens=30, **sampling)
    for m, s, p in ((0, 0, 0), (-1, 1, 1), (-1, 0, 2), (0, 1, 4)):
        with torch.no_grad():
            with_, without = (
                log_prob_by_hand(arch_lm, PROMPTS[p], tokens[s, p], mask, **sampling)
                for mask in (torch.ones_like(masks[m]), masks[m])
            )
        assert got[m, s, p] == pytest.approx(float(without - with_), abs=3e-4)
    assert np.ptp(got) > 0.1, "the heads matter"


def test_an_unknown_change_of_logits_is_refused(tiny):
    tokens = decode.sample(tiny, PROMPTS, max_new_tokens=3).tokens[0]
    forward = tiny.model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits / 3
        return out

    tiny.model.forward = scaled
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits after the unembedding"):
        decode.log_ratio(tiny, PROMPTS, tokens, torch.ones(1, 3, 4))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_log_prob_gradient(name):
    """Oracle: central differences of the one-token-at-a-time log-probability."""
    from conftest import random_lm

    lm = random_lm(name)
    lm.model.double()
    a, h = lm.anatomy, 1e-3
    tokens = decode.sample(lm, PROMPTS, max_new_tokens=4, top_k=64).tokens[0]
    got = decode.log_prob_gradient(lm, PROMPTS, tokens, top_k=64)
    for p, layer, head in ((0, 0, 1), (1, 1, 2), (4, 2, 3)):
        values = []
        for sign in (1, -1):
            mask = torch.ones(a.n_layers, a.n_heads, dtype=torch.float64)
            mask[layer, head] += sign * h
            with torch.no_grad():
                values.append(float(log_prob_by_hand(lm, PROMPTS[p], tokens[0, p], mask, 64, 1.0)))
        expected = (values[0] - values[1]) / (2 * h)
        assert got[0, p, layer, head] == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_greedy_has_no_probability(tiny):
    tokens = decode.sample(tiny, PROMPTS, max_new_tokens=3, temperature=0).tokens[0]
    for call in (lambda: decode.log_ratio(tiny, PROMPTS, tokens, torch.ones(1, 3, 4), temperature=0),
                 lambda: decode.log_prob_gradient(tiny, PROMPTS, tokens, temperature=0)):  # fmt: skip
        with pytest.raises(ValueError, match="temperature > 0"):
            call()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        (["fine", ""], {}, "prompt 1 is empty"),
        (["fine", None], {}, "prompt 1 is empty or no text"),
        (["the " * 60], {"max_new_tokens": 5}, "exceed the model's context of 64"),
        (["fine"], {"max_new_tokens": 64}, "exceed the model's context"),
        (["fine"], {"max_new_tokens": 0}, "max_new_tokens = 0: give a whole number from 1 on"),
        (["fine"], {"seeds": ()}, "no seeds: give at least one"),
        (["fine"], {"masks": torch.ones(1, 2, 4)}, "expected \\(masks, 3, 4\\)"),
        (["fine"], {"streams": [1, 2]}, "2 streams for 1 masks"),
        (["fine"], {"draft": np.zeros((1, 2, 40))}, "draft has shape .*expected \\(1, 1, 40\\)"),
    ],
)
def test_bad_input(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        decode.sample(tiny, prompts, **options)


def test_prompts_are_cut_only_when_asked(tiny):
    out = decode.sample(tiny, ["the " * 60, "the the"], max_prompt_tokens=2, max_new_tokens=4, temperature=0)
    assert np.array_equal(out.tokens[0, 0, 0], out.tokens[0, 0, 1])
