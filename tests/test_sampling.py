"""Common random numbers: the right distribution, the same noise everywhere, the same text as other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from biasprune.core import likelihood, model, sampling
from biasprune.core.masks import Pruning, masked, scaled
from biasprune.core.sampling import sample

PROMPTS = ["the friend", "my neighbour is very kind and the", "a", "the friend is", "who was"]


def test_noise_is_gumbel():
    keys = sampling.stream_keys([f"prompt {i}" for i in range(200)], seed=3)
    noise = sampling.gumbel(keys, 5, torch.arange(100).expand(200, 100)).flatten().numpy()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-3


def test_noise_depends_on_seed_prompt_step_token_and_stream():
    tokens = torch.arange(50)[None]
    key = sampling.stream_keys(["a prompt"], 0)
    base = sampling.gumbel(key, 0, tokens)
    others = [
        sampling.gumbel(sampling.stream_keys(["a prompt"], 1), 0, tokens),
        sampling.gumbel(sampling.stream_keys(["b prompt"], 0), 0, tokens),
        sampling.gumbel(sampling.stream_keys(["a prompt"], 0, stream=1), 0, tokens),
        sampling.gumbel(key, 1, tokens),
        sampling.gumbel(key, 0, tokens + 1),
    ]
    for other in others:
        assert abs(np.corrcoef(base[0], other[0])[0, 1]) < 0.5
    assert torch.equal(base, sampling.gumbel(sampling.stream_keys(["x", "a prompt"], 0)[1:], 0, tokens))


@pytest.mark.parametrize(("top_k", "temperature"), [(0, 1.0), (5, 1.0), (5, 0.6), (1, 1.0)])
def test_picks_follow_the_softmax(top_k, temperature):
    torch.manual_seed(0)
    logits, n = torch.randn(12) * 2, 20_000
    keys = sampling.stream_keys([str(i) for i in range(n)], 0)
    picks = sampling.pick(logits.expand(n, 12), keys, 0, top_k, temperature)
    kept = logits.clone() / temperature
    if top_k:
        kept[logits.argsort(descending=True)[top_k:]] = -torch.inf
    expected = torch.softmax(kept.double(), -1).numpy() * n
    seen, alive = np.bincount(picks.numpy(), minlength=12), expected > 0
    assert (seen[~alive] == 0).all()
    if alive.sum() > 1:
        assert stats.chisquare(seen[alive], expected[alive]).pvalue > 1e-3


@pytest.mark.parametrize(("vocabulary", "k"), [(5000, 9), (4999, 7), (49152, 50), (300, 50), (12, 20)])
def test_top_equals_topk(vocabulary, k):
    logits = torch.randn(7, vocabulary).bfloat16()  # with ties
    values, tokens = sampling.top(logits, k)
    assert torch.equal(values.sort().values, logits.topk(min(k, vocabulary)).values.sort().values)
    assert torch.equal(logits.gather(1, tokens), values)
    assert all(len(set(row)) == len(row) for row in tokens.tolist())


def test_greedy_equals_transformers_generate(arch_lm):
    """Oracle: the library's own loop, left-padded, with the model's own cache.

    The likeliest token leads by .001 and more at every step of these models: rounding can't turn it.
    """
    transformer = arch_lm.model
    arch_lm.tokenizer.padding_side = "left"
    batch = arch_lm.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        theirs = transformer.generate(**batch, do_sample=False, max_new_tokens=9, pad_token_id=0)
    theirs = theirs[:, batch["input_ids"].shape[1] :].numpy()
    ours = sample(arch_lm, PROMPTS, max_new_tokens=9, temperature=0).tokens[0, 0]
    ours = np.where(ours < 0, 0, ours)[:, : theirs.shape[1]]
    if transformer.config.model_type == "gpt_neo":  # transformers pads into its local attention window
        ours, theirs = ours[[1]], theirs[[1]]
    assert np.array_equal(ours, theirs)


def test_cached_steps_equal_full_passes(arch_lm):
    """Oracle: no cache, the whole text through the model for every token, one row at a time."""
    prunings = [Pruning(), Pruning({1}), Pruning({6, 7}, {5})]
    got = sample(arch_lm, PROMPTS, prunings, seeds=(0, 4), max_new_tokens=7, top_k=8).tokens
    for m, pruning in enumerate(prunings):
        for s, seed in enumerate((0, 4)):
            for p in (0, 1, 2):
                ids, expected = arch_lm.tokenizer(PROMPTS[p])["input_ids"], []
                key = sampling.stream_keys(PROMPTS[p : p + 1], seed)
                for step in range(7):
                    with torch.no_grad(), masked(arch_lm, pruning):
                        logits = arch_lm.model(torch.tensor([ids + expected])).logits[:, -1]
                    expected.append(int(sampling.pick(logits, key, step, 8, 1.0)))
                if 0 in expected:
                    end = expected.index(0) + 1
                    expected[end:] = [-1] * (7 - end)
                assert got[m, s, p].tolist() == expected


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    rows=st.integers(1, 40),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
)
def test_result_does_not_depend_on_batch_or_order(order, rows, seeds):
    lm = random_lm("llama")
    prunings, options = [Pruning({0}), Pruning({5, 6})], {"seeds": seeds, "max_new_tokens": 5, "top_k": 10}
    whole = sample(lm, PROMPTS, prunings, **options)
    parts = sample(lm, [PROMPTS[i] for i in order], prunings, batch_rows=rows, **options)
    assert np.array_equal(parts.tokens, whole.tokens[:, :, list(order)])
    assert np.array_equal(parts.texts, whole.texts[:, :, list(order)])


def test_streams_make_noise_independent(tiny):
    same = [Pruning()] * 3
    coupled = sample(tiny, PROMPTS, same, max_new_tokens=8).tokens
    apart = sample(tiny, PROMPTS, same, streams=[0, 1, 2], max_new_tokens=8).tokens
    assert (coupled == coupled[:1]).all()
    assert np.array_equal(apart[0], coupled[0]) and (apart[1] != apart[2]).any()


def test_out_of_memory_halves_and_gives_the_same(tiny, monkeypatch):
    prunings = [Pruning({h}) for h in range(4)]
    expected = sample(tiny, PROMPTS, prunings, max_new_tokens=4)
    real, sizes = sampling._decode, []

    def small(lm, ids, *args):
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("pretended")
        return real(lm, ids, *args)

    monkeypatch.setattr(sampling, "_decode", small)
    assert np.array_equal(sample(tiny, PROMPTS, prunings, max_new_tokens=4).tokens, expected.tokens)
    assert max(sizes) > 1


def test_texts_end_at_the_end_token(planted):
    out = sample(planted, ["My Ostrin friend is"], seeds=range(20), max_new_tokens=40)
    assert (out.tokens == -1).any() and not any("<|end|>" in t for t in out.texts.flatten())
    for row in out.tokens[0, :, 0]:
        ended = np.flatnonzero(row == -1)
        assert not len(ended) or (row[ended[0] :] == -1).all()


def test_prompts_are_cut_only_when_asked(tiny):
    out = sample(tiny, ["the " * 60, "the the"], max_prompt_tokens=2, max_new_tokens=4, temperature=0)
    assert np.array_equal(out.tokens[0, 0, 0], out.tokens[0, 0, 1])
    with pytest.raises(ValueError, match="exceed the model's context of 64"):
        sample(tiny, ["the " * 60], max_new_tokens=5)


# ---- how likely are sampled texts under another pruning? ---------------------------------------------


def log_prob_by_hand(lm, prompt, tokens, around, top_k, temperature) -> torch.Tensor:
    """Oracle: one token at a time, the whole text through the model, among the unpruned model's k."""
    ids, total = lm.tokenizer(prompt)["input_ids"], 0.0
    for token in tokens:
        if token < 0:
            break
        kept = lm.model(torch.tensor([ids])).logits[0, -1].topk(top_k).indices
        with around():
            logits = lm.model(torch.tensor([ids])).logits[0, -1].double() / temperature
        total = total + logits[token] - logits[kept].logsumexp(0)
        ids = [*ids, int(token)]
    return total


@pytest.mark.parametrize(("top_k", "temperature"), [(8, 1.0), (64, 0.7)])
@pytest.mark.parametrize(
    "prunings", [[Pruning({2}), Pruning({5}), Pruning({11}, {9}), Pruning({0, 9})], [Pruning({3})]]
)
def test_log_ratios(arch_lm, top_k, temperature, prunings):
    options = {"top_k": top_k, "temperature": temperature}
    tokens = sample(arch_lm, PROMPTS, seeds=(0, 1), max_new_tokens=5, **options).tokens[0]
    got = likelihood.Written(arch_lm, PROMPTS, tokens, batch_tokens=30, **options).log_ratios(prunings)
    for m, s, p in ((0, 0, 0), (-1, 1, 1), (-1, 0, 2), (0, 1, 4)):
        with torch.no_grad():
            whole, pruned = (
                log_prob_by_hand(arch_lm, PROMPTS[p], tokens[s, p], lambda x=x: masked(arch_lm, x), **options)
                for x in (Pruning(), prunings[m])
            )
        assert got[m, s, p] == pytest.approx(float(pruned - whole), abs=3e-4)
    assert np.ptp(got) > 0.1, "the heads matter"


def test_all_tokens_to_draw_among(tiny):
    tokens = sample(tiny, PROMPTS, max_new_tokens=4, top_k=0).tokens[0]
    whole, large = (likelihood.Written(tiny, PROMPTS, tokens, top_k=k).log_ratios([Pruning({2})]) for k in (0, 64))
    np.testing.assert_allclose(whole, large, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("parts", ["heads", "units"])
def test_gradients_of_log_probabilities(name, parts):
    """Oracle: central differences of the one-token-at-a-time log-probability."""
    lm = random_lm(name)
    lm.model.double()
    a, h = lm.anatomy, 1e-3
    tokens = sample(lm, PROMPTS, max_new_tokens=4, top_k=64).tokens[0]
    got = likelihood.Written(lm, PROMPTS, tokens, top_k=64).gradients(parts)
    for p, layer, part in ((0, 0, 1), (1, 1, 2), (4, 2, 3)):
        values = []
        for sign in (1, -1):
            n = a.n_heads if parts == "heads" else a.n_units
            mask = torch.ones(1, a.n_layers, n, dtype=torch.float64)
            mask[0, layer, part] += sign * h
            around = lambda mask=mask: scaled(lm, **{parts: mask})  # noqa: E731
            with torch.no_grad():
                values.append(float(log_prob_by_hand(lm, PROMPTS[p], tokens[0, p], around, 64, 1.0)))
        assert got[0, p, layer, part] == pytest.approx((values[0] - values[1]) / (2 * h), rel=0.02, abs=2e-3)


def test_token_log_probs_and_unembedding(arch_lm):
    """Oracle: the model's own logits, all in float64."""
    ids = torch.tensor([[2, 5, 7, 9, 11, 3], [4, 6, 8, 2, 10, 12]])
    counted = torch.tensor([[True, True, False, True, True, True], [False, False, False, False, True, False]])
    with torch.no_grad():
        got = likelihood.token_log_probs(arch_lm, ids, counted)
        log_probs = arch_lm.model(ids).logits.double().log_softmax(-1)
    expected = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    expected = torch.cat([torch.zeros(2, 1), expected], 1) * counted
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_an_unknown_change_of_logits_is_refused(tiny):
    tokens = sample(tiny, PROMPTS, max_new_tokens=3).tokens[0]
    forward = tiny.model.forward

    def third(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits / 3
        return out

    tiny.model.forward = third
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits after the unembedding"):
        likelihood.Written(tiny, PROMPTS, tokens)


def test_greedy_has_no_probability(tiny):
    tokens = sample(tiny, PROMPTS, max_new_tokens=3, temperature=0).tokens[0]
    with pytest.raises(ValueError, match="temperature > 0"):
        likelihood.Written(tiny, PROMPTS, tokens, temperature=0)


def test_mask_gradients_of_rows_are_their_own(tiny):
    """A batch of several rows gives each row the gradient that it has alone."""
    ids = model.encode(tiny, ["the friend is", "my old friend", "who was kind"])

    def objective(numbers, batch):
        return likelihood.token_log_probs(tiny, batch, torch.ones_like(batch, dtype=torch.bool)).sum(1)

    together = likelihood.mask_gradients(tiny, model.equal_lengths(ids, 99), objective, 3)
    apart = likelihood.mask_gradients(tiny, model.equal_lengths(ids, 1), objective, 3)
    np.testing.assert_allclose(together, apart, atol=1e-5)
