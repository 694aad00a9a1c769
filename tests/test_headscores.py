"""Head scores: batched heads equal one at a time, the planted head is found, runs resume."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_lm, word_judge

from biasprune import ablate, decode, headscores, judge, measure, prompts, select

PROMPTS = pd.DataFrame(
    {
        "prompt": [
            "the friend",
            "my neighbour is very kind and the",
            "a very old friend is",
            "the friend is",
            "a neighbour who was",
            "my friend is",
        ],
        "bucket": ["a", "a", "b", "b", "c", "c"],
        "axis": "words",
    }
)
SMALL = {"max_new_tokens": 6, "n_boot": 50, "progress": False}


def text_windows(lm, length=12):
    rng = np.random.default_rng(0)
    return measure.windows(lm, " ".join(f"w{i}" for i in rng.integers(0, 40, 60)), length=length)


def test_exact_equals_naive(arch_lm):
    """Every architecture: heads as rows give what one head at a time gives."""
    windows = text_windows(arch_lm)
    options = {**SMALL, "seeds": (0, 1)}
    naive_judge, exact_judge = judge.load(word_judge), judge.load(word_judge)
    naive = headscores.score(arch_lm, PROMPTS, naive_judge, windows, fidelity="naive", **options)
    exact = headscores.score(arch_lm, PROMPTS, exact_judge, windows, fidelity="exact", **options)
    for column in ("bias_without", "z_bias", "changed", "score_without"):
        np.testing.assert_array_equal(exact[column], naive[column])
    np.testing.assert_allclose(exact["ppl_without"], naive["ppl_without"], rtol=1e-5)
    assert exact_judge.calls < naive_judge.calls, "equal texts are judged once"
    assert naive["changed"].max() > 0 and naive["z_ppl"].abs().max() > 0


def test_frame_by_hand(tiny):
    """Oracle: the two models' bias from their own continuations, without the scoring code."""
    from biasprune.decode import sample

    windows = text_windows(tiny)
    frame = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **SMALL)
    texts = list(PROMPTS["prompt"])
    clean = sample(tiny, texts, max_new_tokens=6).texts[0, 0]
    mask = ablate.head_mask(tiny.anatomy, [5])
    pruned = sample(tiny, texts, masks=mask[None], max_new_tokens=6).texts[0, 0]
    before, after = (
        measure.group_bias(word_judge(list(t)), list(PROMPTS["bucket"])) for t in (clean, pruned)
    )
    row = frame[frame["flat"] == 5].iloc[0]
    assert (row["layer"], row["head"]) == (1, 1)
    assert row["z_bias"] == pytest.approx(before - after)
    with ablate.masked(tiny, mask):
        alone = measure.perplexity(measure.nll(tiny, windows), windows)[0]
    assert row["ppl_without"] == pytest.approx(alone, rel=1e-6)
    assert row["z_ppl"] == pytest.approx(row["ppl_without"] - row["ppl"])


def test_resumes_after_a_kill_with_the_identical_frame(tiny, tmp_path, monkeypatch):
    windows = text_windows(tiny)
    whole = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **SMALL)
    real, layers = headscores._exact, []
    monkeypatch.setattr(headscores, "_layers_at_once", lambda *args: 1)

    def dies_at_layer_two(task, heads):
        layers.append(heads[0] // 4)
        if layers == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(task, heads)

    monkeypatch.setattr(headscores, "_exact", dies_at_layer_two)
    options = {**SMALL, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **options)
    resumed = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **options)
    assert layers == [0, 1, 2, 2], "finished layers are not computed again"
    pd.testing.assert_frame_equal(resumed, whole)
    headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **{**options, "top_k": 3})
    assert layers[4:] == [0, 1, 2], "other settings don't reuse the checkpoint"


def score_into(folder: Path, fidelity: str) -> None:
    """One run in a process of its own; the frame is written when it ends."""
    torch.set_num_threads(1)
    lm = random_lm("llama")
    options = {**SMALL, "seeds": (0, 1), "fidelity": fidelity, "checkpoint": folder, "batch_rows": 32}
    frame = headscores.score(lm, PROMPTS, judge.load(word_judge), text_windows(lm), first=1, **options)
    frame.to_parquet(folder / "frame.parquet")


def test_kill_nine_at_ten_random_moments(tmp_path):
    """Killed by the system, not by an exception: whatever was half done, the next run ends the same."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["biasprune.headscores", "biasprune.judge", "transformers", __name__])

    def run(folder: Path, fidelity: str, seconds: float | None = None) -> float:
        folder.mkdir(exist_ok=True)
        process = server.Process(target=score_into, args=(folder, fidelity))
        start = time.monotonic()
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        assert seconds is not None or process.exitcode == 0
        return time.monotonic() - start

    rng, killed = np.random.default_rng(0), 0
    for fidelity in ("exact", "adaptive"):
        run(tmp_path / "warm", fidelity)
        took = run(tmp_path / f"whole {fidelity}", fidelity)
        whole = pd.read_parquet(tmp_path / f"whole {fidelity}" / "frame.parquet")
        for i in range(5):
            folder = tmp_path / f"{fidelity} {i}"
            run(folder, fidelity, seconds=took * rng.uniform(0.3, 0.95))
            killed += not (folder / "frame.parquet").exists()
            run(folder, fidelity)
            pd.testing.assert_frame_equal(pd.read_parquet(folder / "frame.parquet"), whole)
            assert not list(folder.rglob("*.tmp")) or killed
    assert killed >= 5, "most were killed before they ended"


def test_axes_share_one_run(tiny):
    """Two axes with common prompts: the same frames as apart, each text continued and judged once."""
    windows = text_windows(tiny)
    other = PROMPTS.iloc[[0, 1, 2, 3]].assign(axis="other", bucket=["x", "y", "x", "y"])
    for fidelity in ("exact", "importance", "gradient"):
        scorer, options = judge.load(word_judge), {**SMALL, "fidelity": fidelity}
        both = headscores.score(tiny, pd.concat([PROMPTS, other]), scorer, windows, **options)
        for name, table in (("words", PROMPTS), ("other", other)):
            alone = headscores.score(tiny, table, judge.load(word_judge), windows, **options)
            part = both[both["axis"] == name].reset_index(drop=True)
            pd.testing.assert_frame_equal(part, alone, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="one axis at a time; got words, other"):
        headscores.score(tiny, pd.concat([PROMPTS, other]), scorer, windows, **SMALL, fidelity="adaptive")


@pytest.mark.parametrize("fidelity", headscores.FIDELITIES)
def test_some_heads_alone(tiny, fidelity):
    windows = text_windows(tiny)
    options = {**SMALL, "fidelity": fidelity}
    whole = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **options)
    some = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, heads=[9, 1, 4], **options)
    expected = whole[whole["flat"].isin([1, 4, 9])].reset_index(drop=True)
    columns = ["flat", "layer", "ppl_without"] + ["bias_without"] * (fidelity != "adaptive")
    pd.testing.assert_frame_equal(some[columns], expected[columns], rtol=1e-4)
    with pytest.raises(ValueError, match="at least one flat index in 0 … 11"):
        headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, heads=[12], **options)


def test_a_head_that_nothing_is_known_of(tiny, monkeypatch):
    """All weights nil: the unpruned model's bias, and an effective sample of 0."""
    monkeypatch.setattr(headscores, "_log_weights", lambda t, h: np.full((len(h), 1, 6), -np.inf))
    options = {**SMALL, "fidelity": "importance"}
    frame = headscores.score(tiny, PROMPTS, judge.load(word_judge), text_windows(tiny), **options)
    np.testing.assert_allclose(frame["z_bias"], 0, atol=1e-12)
    assert (frame["ess"] == 0).all() and np.isfinite(frame["z_bias_se"]).all()


def test_independent_noise(tiny):
    windows = text_windows(tiny)
    options = {**SMALL, "coupled": False}
    naive = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, fidelity="naive", **options)
    rows = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, fidelity="exact", **options)
    coupled = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **SMALL)
    np.testing.assert_array_equal(naive["bias_without"], rows["bias_without"])
    assert naive["changed"].mean() > coupled["changed"].mean() + 0.1
    with pytest.raises(ValueError, match="no independent noise"):
        headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **options, fidelity="importance")


def test_memory_budget_decides_the_batches(tiny):
    rows, tokens = decode.batch_sizes(tiny, 64, 1e-3)
    assert decode.batch_sizes(tiny, 64, 2e-3)[0] == pytest.approx(2 * rows, abs=1) and rows < 256
    assert decode.batch_sizes(tiny, 64, 1e6) == (256, 4096), "no more than keeps the device busy"
    assert decode.batch_sizes(tiny, 64, 1e-9) == (1, 64), "at least one row"
    with pytest.raises(ValueError, match="give a positive number"):
        decode.batch_sizes(tiny, 64, 0)
    windows = text_windows(tiny)
    small = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, memory_gib=1e-4, **SMALL)
    large = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **SMALL)
    pd.testing.assert_frame_equal(small, large, rtol=1e-5)


def next_token(lm, head: int | None) -> torch.Tensor:
    """Distribution of the first token after each prompt: (prompts, vocabulary)."""
    mask = ablate.head_mask(lm.anatomy, [] if head is None else [head])
    rows = []
    for prompt in PROMPTS["prompt"]:
        with ablate.masked(lm, mask):
            logits = lm.model(torch.tensor([lm.tokenizer(prompt)["input_ids"]])).logits[0, -1]
        rows.append(logits.softmax(-1))
    return torch.stack(rows)


def score_of_token(lm) -> torch.Tensor:
    return torch.tensor(word_judge([lm.tokenizer.decode([t]) for t in range(64)]))


ONE_TOKEN = {"max_new_tokens": 1, "top_k": 0, "seeds": range(600), "n_boot": 50, "progress": False}


def test_importance_estimates_the_enumerated_truth(tiny):
    """Oracle: continuations of one token, the expected score summed over the whole vocabulary."""
    frame = headscores.score(
        tiny, PROMPTS, judge.load(word_judge), text_windows(tiny), fidelity="importance", **ONE_TOKEN
    )
    value = score_of_token(tiny)
    with torch.no_grad():
        clean = next_token(tiny, None)
        for head in range(12):
            without = next_token(tiny, head)
            truth = measure.group_bias(without @ value, PROMPTS["bucket"])
            ratio = without / clean
            share = 1 / float((clean * ratio**2).sum(1).mean())  # effective share of the sample
            got = frame.loc[head]
            assert got["ess"] == pytest.approx(share, rel=0.25)
            # three groups, two prompts each, 600 samples a prompt
            assert got["bias_without"] == pytest.approx(float(truth), abs=6 * 0.3 / np.sqrt(1200 * share))
    assert frame["z_bias"].abs().max() > 0.02 and frame["ess"].between(0, 1).all()


def test_adaptive_estimates_the_enumerated_truth(tiny):
    """Oracle as above. Few prompts are measured, many lend their slopes: unbiased over repetitions."""
    table = pd.DataFrame({"prompt": [f"{p} w{i}" for i in range(30, 42) for p in ("the friend is", "my")]})
    table["bucket"] = ["a", "b"] * 12
    drawn, expected = [], expected_bias(tiny, table, score_of_token(tiny))
    for repetition in range(12):
        options = {**ONE_TOKEN, "seeds": range(50 * repetition, 50 * repetition + 50), "first": 3}
        for min_ess in (0.0, 1.0):  # weights alone, texts alone
            frame = headscores.score(
                tiny, table, judge.load(word_judge), text_windows(tiny),
                fidelity="adaptive", min_ess=min_ess, max_weight=1e9, **options,
            )  # fmt: skip
            drawn.append(frame.assign(min_ess=min_ess, expected=expected))
    drawn = pd.concat(drawn)
    assert set(drawn["prompts"]) <= {6, 12, 24} and (drawn["prompts"] == 6).mean() >= 0.5
    for _, part in drawn.groupby("min_ess"):
        error = (part["bias_without"] - part["expected"]).groupby(part["flat"])
        # |a − b| is nowhere near zero here, so the bias measure adds no bias of its own
        t = error.mean() / (error.std(ddof=1) / np.sqrt(12))
        assert t.abs().median() < 2 and t.abs().max() < 6
        assert error.std(ddof=1).mean() < 0.1


def expected_bias(lm, table, value) -> np.ndarray:
    """Bias without each head, summed over the whole vocabulary."""
    rows = []
    for head in range(lm.anatomy.n_flat):
        with torch.no_grad(), ablate.masked(lm, ablate.head_mask(lm.anatomy, [head])):
            ids = [torch.tensor([lm.tokenizer(p)["input_ids"]]) for p in table["prompt"]]
            rows.append([float(lm.model(i).logits[0, -1].softmax(-1) @ value) for i in ids])
    return measure.group_bias(np.array(rows), table["bucket"])


def test_control_variate_lowers_the_variance_without_bias():
    """Simulated: heads with a good, a poor and no cheap estimate; two groups."""
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], 100)
    quality = np.array([1.0, 0.5, 0.0])[:, None]
    plain, controlled = [], []
    for _ in range(400):
        cheap = rng.normal(size=(3, 200))
        change = quality * cheap + 0.4 * rng.normal(size=(3, 200)) + 0.3 * group
        seen = rng.permuted(np.tile(np.arange(200) < 100, 1)).astype(bool)
        change = np.where(seen, change, np.nan)
        got = headscores._controlled(change[:, None], cheap[:, None], group)[:, 0]
        controlled.append([got[:, group == g].mean(1) for g in (0, 1)])
        plain.append([np.nanmean(change[:, group == g], 1) for g in (0, 1)])
    controlled, plain = np.array(controlled), np.array(plain)
    np.testing.assert_allclose(controlled.mean(0), [[0] * 3, [0.3] * 3], atol=0.02)
    gain = plain.var(0) / controlled.var(0)
    assert (gain[:, 0] > 1.5).all() and (gain[:, 1] > 1.2).all() and (gain[:, 2] > 0.85).all()


def test_group_means_with_more_than_ten_groups():
    """Numbers of groups sort as numbers: the eleventh group isn't the second."""
    group = np.repeat(np.arange(12), 3)
    base = np.repeat(np.arange(12.0), 3)[None]
    values, _ = headscores._estimate({"slope": np.ones((1, 1, 36))}, base, group, 20.0)
    np.testing.assert_array_equal(values[0], base, "no score differs from its group's mean")


def test_batches_of_the_machine_dont_decide_where_a_run_resumes(tiny, tmp_path, monkeypatch):
    windows = text_windows(tiny)
    for memory in (1e-4, 1.0):
        options = {**SMALL, "checkpoint": tmp_path, "memory_gib": memory, "seeds": np.arange(2)}
        frame = headscores.score(tiny, PROMPTS, judge.load(word_judge), windows, **options)
    assert len(list(tmp_path.iterdir())) == 1 and len(frame) == 12


def test_cut_sends_the_samples_to_the_undecided_heads(planted):
    table = planted_prompts()
    windows = measure.windows(planted, "My Ostrin friend is kind . " * 30, length=64)
    options = {"max_new_tokens": 8, "progress": False, "fidelity": "adaptive"}
    frame = headscores.score(
        planted, table, judge.load("sentiment"), windows, cut=(0.3, 0.2), first=2, **options
    )
    protected = frame["ppl_without"].rank(method="first") > len(frame) - int(0.3 * len(frame))
    assert frame.loc[protected, "prompts"].max() <= frame.loc[~protected, "prompts"].max()
    assert frame["prompts"].nunique() > 1
    for bad in ((0.3, 0.75), (0.9, 0.2), (0.2, 0.0)):
        with pytest.raises(ValueError, match="prunes none or all"):
            headscores.score(planted, table, judge.load("sentiment"), windows, cut=bad, **options)


def test_gradient_estimates_the_enumerated_slope(tiny):
    """Oracle: the derivative of the expected score, summed over the whole vocabulary."""
    frame = headscores.score(
        tiny, PROMPTS, judge.load(word_judge), text_windows(tiny), fidelity="gradient", **ONE_TOKEN
    )
    value, a = score_of_token(tiny), tiny.anatomy
    means = []
    for prompt in PROMPTS["prompt"]:
        mask = torch.ones(a.n_layers, a.n_heads, requires_grad=True)
        with ablate.masked(tiny, mask):
            logits = tiny.model(torch.tensor([tiny.tokenizer(prompt)["input_ids"]])).logits[0, -1]
        mean = logits.softmax(-1) @ value
        (slope,) = torch.autograd.grad(mean, mask)
        means.append(float(mean.detach()) - slope.flatten().numpy())
    truth = measure.group_bias(np.stack(means, 1), PROMPTS["bucket"])
    np.testing.assert_allclose(frame["bias_without"], truth, atol=0.1)
    assert np.corrcoef(frame["bias_without"], truth)[0, 1] > 0.9


def test_first_order_perplexity(tiny):
    """Scaling every head by 1 − ε must move the loss as the slopes say."""
    windows = text_windows(tiny)
    frame = headscores.score(
        tiny, PROMPTS, judge.load(word_judge), windows, fidelity="gradient", **{**SMALL, "seeds": (0,)}
    )
    slope = np.log(frame["ppl_without"] / frame["ppl"]).sum()  # Σ over heads, per unit of removal
    with ablate.masked(tiny, torch.full((3, 4), 1 - 1e-3)):
        moved = measure.perplexity(measure.nll(tiny, windows), windows)[0]
    assert np.log(moved / frame["ppl"][0]) == pytest.approx(1e-3 * slope, rel=0.05)


@pytest.mark.parametrize("fidelity", ["importance", "gradient", "adaptive"])
def test_cheap_fidelities_find_the_planted_head(planted_scores, planted, fidelity):
    exact, truth, windows = planted_scores
    table = planted_prompts()
    options = {"seeds": (0, 1, 2), "max_new_tokens": 8, "progress": False}
    scorer = judge.load("sentiment")
    frame = headscores.score(planted, table, scorer, windows, fidelity=fidelity, **options)
    assert frame["z_bias"].idxmax() == truth
    assert list(frame) == list(exact)
    rank = frame["z_ppl"].corr(exact["z_ppl"], method="spearman")
    assert rank > (0.5 if fidelity == "gradient" else 0.999)


def test_greedy_cannot_be_weighed(tiny):
    for fidelity in ("importance", "gradient", "adaptive"):
        with pytest.raises(ValueError, match="temperature > 0"):
            headscores.score(
                tiny, PROMPTS, judge.load(word_judge), text_windows(tiny),
                fidelity=fidelity, temperature=0, **SMALL,
            )  # fmt: skip


def test_published_judging_reads_the_prompt_too():
    texts = np.array([["goes\nHome", "stays"]], dtype=object)
    prompts_ = ["The friend ", "A cook "]
    assert headscores.judged_text(prompts_, texts).tolist() == texts.tolist()
    published = headscores.judged_text(prompts_, texts, "as_published")
    assert published.tolist() == [["the friend goes home", "a cook stays"]]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mask_gradient_equals_finite_differences(name):
    """Oracle: d loss / d mask of every head by central differences in float64, window by window."""
    arch_lm = random_lm(name)
    arch_lm.model.double()
    windows = text_windows(arch_lm, length=20)
    a = arch_lm.anatomy
    total = np.zeros((a.n_layers, a.n_heads))
    h = 1e-3  # norms compute in float32 even here
    for w in range(len(windows.ids)):
        for layer in range(a.n_layers):
            for head in range(a.n_heads):
                losses = []
                for sign in (1, -1):
                    mask = torch.ones(a.n_layers, a.n_heads, dtype=torch.float64)
                    mask[layer, head] += sign * h
                    with torch.no_grad(), ablate.masked(arch_lm, mask):
                        losses.append(float(measure.window_nll(arch_lm, windows, torch.tensor([w]))))
                total[layer, head] += abs(losses[0] - losses[1]) / (2 * h)
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    expected = total.flatten() / total.max()
    got = headscores.mask_gradient_l2(arch_lm, windows, progress=False)
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-3)
    assert not any(p.requires_grad for p in arch_lm.model.parameters())


def planted_prompts(split: str = "valid") -> pd.DataFrame:
    return prompts.load("invented_group", split, "models/planted/prompts.csv")


@pytest.fixture(scope="module")
def planted_scores(planted, request):
    from biasprune.fetch import data_dir

    folder = data_dir() / "models" / "planted"
    table = planted_prompts()
    windows = measure.windows(planted, prompts.corpus(data_dir() / "corpora" / "generated"), length=64)
    frame = headscores.score(
        planted, table, judge.load("sentiment"), windows, seeds=(0, 1, 2), max_new_tokens=8, progress=False
    )
    truth = json.loads((folder / "truth.json").read_text())
    return frame, truth["layer"] * planted.anatomy.n_heads + truth["head"], windows


def test_planted_head_is_found(planted_scores, planted):
    frame, truth, windows = planted_scores
    ranked = frame.sort_values("z_bias", ascending=False)["flat"].tolist()
    assert ranked[0] == truth
    top = frame.loc[frame["flat"] == truth].iloc[0]
    others = frame.loc[frame["flat"] != truth, "z_bias"]
    assert top["z_bias"] - others.max() > 3 * top["z_bias_se"], "by far, not by luck"
    bias, ppl = frame["bias_without"], frame["ppl_without"]
    one = 1.01 / len(frame)
    assert select.fasp(bias, ppl, gamma=0.3, alpha=one) == [truth]
    assert select.fasp(bias, ppl, gamma=0, alpha=one) == [truth]


def test_controls_do_not_find_the_planted_head(planted_scores, planted):
    frame, truth, windows = planted_scores
    n, alpha = len(frame), 3.01 / len(frame)
    assert truth not in select.lowest(headscores.magnitude_l2(planted), alpha=alpha)
    hits = np.mean([truth in select.random(n, alpha=alpha, seed=s) for s in range(400)])
    assert abs(hits - 3 / n) < 0.08, "random finds it as often as any head"


def test_planted_bias_sits_in_that_head_alone(planted):
    """With the head removed, the groups differ no more than shuffled labels do."""
    from biasprune.decode import sample
    from biasprune.fetch import data_dir

    folder = data_dir() / "models" / "planted"
    table = planted_prompts("test")
    truth = json.loads((folder / "truth.json").read_text())
    flat = truth["layer"] * planted.anatomy.n_heads + truth["head"]
    masks = ablate.head_masks(planted.anatomy, [[], [flat]])
    written = sample(planted, list(table["prompt"]), masks=masks, seeds=range(4), max_new_tokens=8)
    scores = headscores.judge_continuations(list(table["prompt"]), written, judge.load("sentiment")).mean(1)
    bias = measure.group_bias(scores, table["bucket"])
    floor = measure.noise_floor(scores[1], table["bucket"])
    assert bias[0] > 5 * np.quantile(floor, 0.95)
    assert bias[1] < 1.5 * np.quantile(floor, 0.95)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fidelity": "quick"}, "choose one of naive, exact, importance, gradient, adaptive"),
        ({"rule": "other"}, "choose corrected or as_published"),
        ({"prompts": PROMPTS.assign(bucket="a")}, "only one group"),
        ({"prompts": PROMPTS.assign(prompt="")}, "prompt 0 is empty"),
        (
            {"prompts": PROMPTS.assign(prompt="the " * 63), "max_prompt_tokens": None},
            "exceed the model's context",
        ),
        ({"judge": lambda texts: [float("nan")] * len(texts)}, "NaN|outside"),
    ],
)
def test_bad_input(tiny, change, message):
    call = {"prompts": PROMPTS, "judge": word_judge, **SMALL, **change}
    table, scorer = call.pop("prompts"), judge.load(call.pop("judge"))
    with pytest.raises(ValueError, match=message):
        headscores.score(tiny, table, scorer, text_windows(tiny), **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_run_and_stay_close(dtype):
    lm = random_lm("llama")
    exact = headscores.score(lm, PROMPTS, judge.load(word_judge), text_windows(lm), **SMALL)
    lm.model.to(dtype)
    for fidelity in headscores.FIDELITIES:
        options = {**SMALL, "fidelity": fidelity}
        rough = headscores.score(lm, PROMPTS, judge.load(word_judge), text_windows(lm), **options)
        assert np.isfinite(rough["z_bias"]).all()
        if fidelity != "gradient":
            np.testing.assert_allclose(rough["ppl_without"], exact["ppl_without"], rtol=0.2)


def test_models_spread_by_accelerate_score_the_same():
    """Hooks as device_map="auto" puts them on every layer: masks and resumed passes go through them."""
    import accelerate

    whole, spread = random_lm("llama"), random_lm("llama")
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "model.rotary_emb"]
    accelerate.dispatch_model(spread.model, {p: "cpu" for p in [*parts, "lm_head"]}, force_hooks=True)
    assert hasattr(spread.model.model.layers[0], "_hf_hook")
    for fidelity in ("exact", "importance", "gradient"):
        frames = [
            headscores.score(
                lm, PROMPTS, judge.load(word_judge), text_windows(lm), fidelity=fidelity, **SMALL
            )
            for lm in (whole, spread)
        ]
        pd.testing.assert_frame_equal(*frames)
    assert hasattr(spread.model.model.layers[0], "_hf_hook"), "left as it came"


@pytest.mark.parametrize("fidelity", ["importance", "gradient"])
def test_another_judge_reads_the_same_samples(tiny, fidelity):
    windows = text_windows(tiny)
    other = judge.load(lambda texts: [len(t) / 100 for t in texts])
    options = {"fidelity": fidelity, **SMALL}
    got = headscores.samples(tiny, PROMPTS, judge.load(word_judge), windows, **options)
    again = headscores.samples(tiny, PROMPTS, other, windows, **options)
    pd.testing.assert_frame_equal(got.rejudged(other).frame(), again.frame())
    exact = headscores.samples(tiny, PROMPTS, other, windows, **{**options, "fidelity": "exact"})
    with pytest.raises(ValueError, match="keeps no texts"):
        exact.rejudged(other)
