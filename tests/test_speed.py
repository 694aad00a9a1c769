"""The benchmark measures what it says: the loop's own samples, projections, gains. No test asserts a time."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import random_lm, word_judge

from biasprune import ablate, decode, judge, measure, record, speed, weightscores
from biasprune import lm as lm_module

PROMPTS = pd.DataFrame(
    {"prompt": ["the friend", "my neighbour is very kind", "a w3", "my w4"], "bucket": list("abab")}
)


@pytest.mark.parametrize("repaired", [False, True])
def test_the_loop_gives_what_sampling_gives(tiny, repaired):
    """Greedy, so that no noise is left to differ."""
    options = {"max_new_tokens": 5, "max_prompt_tokens": None}
    texts = list(PROMPTS["prompt"])
    masks = ablate.head_masks(tiny.anatomy, [[3], [7]])
    got = speed.generate_loop(
        tiny, texts, [3, 7], judge.load(word_judge), top_k=1, repaired=repaired, **options
    )
    ours = decode.sample(tiny, texts, masks=masks, temperature=0, **options)
    goes_on = (ours.tokens[:, 0] != 0).all(-1)  # the loop forbids the end of the text
    assert goes_on.sum() >= 4
    expected = np.array([word_judge(list(row)) for row in ours.texts[:, 0]])
    np.testing.assert_allclose(got[goes_on], expected[goes_on])


def test_tables_have_every_fidelity_and_exact_agrees():
    lm = random_lm("gpt2")
    times = speed.bias_times(lm, PROMPTS, judge.load(word_judge), layers=2, naive_heads=1, max_new_tokens=4)
    table = speed.summary(times, lm.anatomy.n_flat).set_index("fidelity")
    assert list(table.index) == [speed.GENERATE, speed.REPAIRED, "naive", "exact", "importance", "gradient"]
    assert table.loc["exact", "same_texts"] == 1 and table.loc[speed.GENERATE, "ratio"] == 1
    assert (table[["seconds", "ratio"]] > 0).all().all()
    windows = measure.windows(lm, "the friend is kind and " * 8, length=12)
    losses = speed.perplexity_times(lm, windows, layers=2, naive_heads=2)
    assert speed.summary(losses, 12, "naive").set_index("fidelity").loc["exact", "difference"] < 1e-5


def test_summary_by_hand():
    times = pd.DataFrame(
        {
            "layer": [0, 1, 0, 1],
            "fidelity": ["loop", "loop", "fast", "fast"],
            "per_head": [2.0, 2.0, 0.5, 0.1],
            "once": [0.0, 0.0, 1.0, 1.0],
            "peak_mib": [1, 2, 3, 4],
        }
    )
    fast = speed.summary(times, 10, "loop").set_index("fidelity").loc["fast"]
    assert (fast["seconds"], fast["ratio_low"], fast["ratio_high"], fast["peak_mib"]) == (4, 20 / 6, 10, 4)
    assert fast["ratio"] == 20 / 4


def test_gain_doesnt_depend_on_the_number_of_prompts():
    """Twice the prompts: twice the time, half the squared error, the same gain."""
    loop = pd.DataFrame({"z_bias_se": np.linspace(1, 2, 20)})
    frames = {"loop": loop, "few": loop / 3, "many": loop / 3 / np.sqrt(2)}
    table = speed.precision(frames, {"loop": 100.0, "few": 10.0, "many": 20.0}, "loop").set_index("method")
    np.testing.assert_allclose(table.loc[["few", "many"], "gain"], 90)
    assert table.loc["loop", "gain"] == 1


def test_layers_lie_evenly(tiny):
    assert speed.layers_of(tiny, 1) == [[4, 5, 6, 7]]
    assert [x[0] for x in speed.layers_of(tiny, 3)] == [0, 4, 8]


def test_memory_is_measured():
    def take() -> int:
        held = np.ones(200 * 2**20 // 8)
        for _ in range(30):
            held += 1
        return len(held)

    result, seconds, peak = record.measured(take)
    assert result == 200 * 2**20 // 8 and seconds > 0 and 150 < peak < 400


def test_profile_accounts_for_all_time_and_sees_each_part():
    lm = random_lm("gpt2")
    windows = measure.windows(lm, "the friend is kind and " * 8, length=12)
    calls = []

    def slow_judge(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        time.sleep(0.05)
        return [0.5] * len(texts)

    table = speed.profile(
        lm, PROMPTS["prompt"], judge.load(slow_judge), windows, naive_heads=2, max_new_tokens=6
    ).set_index(["score", "fidelity"])
    loop, loss = table.loc[("z_bias", speed.REPAIRED)], table.loc[("z_ppl", "naive")]
    assert loop["judge"] >= 0.05 and calls[:2] == [4, 4]  # one call per head
    assert (loop[["layers", "layers, token by token", "unembedding, token by token"]] > 0).all()
    assert (table["rest"] > 0).all() and (table[list(speed.PARTS)] >= 0).all().all()
    assert loss["layers"] > 0 and loss["unembedding"] > 0
    assert loss[["layers, token by token", "unembedding, token by token", "judge"]].sum() == 0
    assert not lm.model.get_output_embeddings()._forward_hooks  # left as it came


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weight_times_compare_equal_scores(name):
    lm = random_lm(name)
    of = weightscores.examples(lm, ["the friend", "a w3 is"], ["kind and", "rude"])
    table = speed.weight_times(lm, of, [1, 3]).set_index("method")
    assert (table["difference"].dropna() < 1e-3).all() and len(table) == 4 and (table["seconds"] > 0).all()
    assert table["ratio"].iloc[0] == 1 and table["estimate_mib"].iloc[2] > table["estimate_mib"].iloc[1]
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_memory_by_hand():
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**shape, intermediate_size=128, vocab_size=1000)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    got = weightscores.memory(model, lm_module.anatomy(model), at_once=2, sets=3, batch_tokens=100)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128  # q and o, k and v, the MLP
    assert got["scores"] * 2**30 == 2 * layer * 4 * 3
    assert got["products"] * 2**30 == 4 * 64 * 128 * 4
    assert got["logits"] * 2**30 == 100 * 1000 * 12
    assert got["model"] * 2**30 == 2 * (3 * (layer + 2 * 64) + 64 + 2 * 1000 * 64)


def test_a_goal_is_reached_by_the_whole_range():
    goals, low, high = (
        pd.Series(x, dtype=float) for x in ([2, 2, 2, 2], [2.0, 1.5, 1.0, None], [3, 2.5, 1.9, 3])
    )
    assert speed.reached(goals, low, high).tolist() == ["reached", "undecided", "missed", "–"]
