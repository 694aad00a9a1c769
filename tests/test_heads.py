"""Head scores: by removal as a plain loop, by importance and to first order as the enumerated truth; FASP on both."""

from __future__ import annotations

import copy
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, random_lm, word_judge

from biasprune.core import sampling, stats
from biasprune.core.data import data_dir
from biasprune.core.masks import Pruning, masked, scaled
from biasprune.core.model import encode, weight_of
from biasprune.measures import judges, pairs, prompts
from biasprune.measures.prose import corpus, prose
from biasprune.measures.toxicity import toxicity
from biasprune.methods import heads, judge, select

STARTS = "the friend|my neighbour is very kind and the|a very old friend is"
STARTS += "|the friend is|a neighbour who was|my friend is"
PROMPTS = pd.DataFrame({"prompt": STARTS.split("|"), "group": list("aabbcc")})
UNPRUNED = Pruning()


def measure(table=PROMPTS, reader=word_judge, **options):
    return toxicity(table, judges.load(reader), **{"seeds": (0, 1), "max_new_tokens": 6, **options})


def text(lm, length=12, **options):
    rng = np.random.default_rng(0)
    return prose(lm, " ".join(f"w{i}" for i in rng.integers(0, 40, 60)), length=length, **options)


def gap(scores, groups, share=None) -> float:
    """Oracle: Σ over groups of |mean over all − mean over the group|."""
    scores, groups = np.asarray(scores), np.asarray(groups)
    share = share or {g: (groups == g).mean() for g in set(groups)}
    means = {g: scores[groups == g].mean() for g in share}
    return sum(abs(sum(share[g] * means[g] for g in share) - m) for m in means.values())


def plain_loop(lm, head: int | None, seed: int, prompt: str, steps: int) -> list[int]:
    """Oracle: one head, one prompt, one token at a time, without cache, batch or mask; the head's columns are zero."""
    model, a, ids, out = copy.deepcopy(lm.model), lm.anatomy, encode(lm, [prompt])[0], []
    if head is not None:
        first = head % a.n_heads * a.head_dim
        weight_of(model.get_submodule(a.out_projs[head // a.n_heads]))[:, first : first + a.head_dim] = 0
    for step in range(steps):
        logits = model(torch.tensor([ids + out])).logits[0, -1].float()
        noise = sampling.gumbel(sampling.stream_keys([prompt], seed), step, torch.arange(VOCAB)[None])[0]
        out.append(int((logits + noise).where(logits >= logits.topk(50).values[-1], -torch.inf).argmax()))
        if out[-1] == 0:
            break
    return out + [-1] * (steps - len(out))


@torch.no_grad()
def test_heads_as_rows_write_what_a_plain_loop_writes(arch_lm):
    """Every architecture, token for token; the unpruned model among them."""
    some = [None, 1, arch_lm.anatomy.n_flat - 2]
    prunings = [Pruning(frozenset([] if h is None else [h])) for h in some]
    frame = measure().read(arch_lm, prunings)
    expected = [plain_loop(arch_lm, h, s, p, 6) for h in some for s in (0, 1) for p in PROMPTS["prompt"]]
    assert frame["tokens"].tolist() == [" ".join(map(str, x)) for x in expected]
    assert frame["value"].tolist() == word_judge(frame["text"].tolist())
    assert frame["tokens"].nunique() > 12, "heads matter, so the test can fail"


def test_independent_noise(tiny):
    """As in the published procedure: a stream of its own for every head, so that nearly all texts change."""
    single = heads.single_heads(tiny)
    frame, shared = (measure(coupled=c).read(tiny, single)["text"] for c in (False, True))
    alone = sampling.sample(tiny, PROMPTS["prompt"], [single[7]], streams=[8], seeds=(0, 1), max_new_tokens=6)
    assert frame[84:96].tolist() == alone.texts.ravel().tolist()
    unpruned = measure().read(tiny, [UNPRUNED])["text"].tolist() * 12
    assert (frame != unpruned).mean() > (shared != unpruned).mean() + 0.1


@torch.no_grad()
def next_token(lm, pruning: Pruning) -> torch.Tensor:
    """Distribution of the first token after each prompt: (prompts, vocabulary)."""
    with masked(lm, pruning):
        return torch.cat([lm.model(torch.tensor([i])).logits[:, -1] for i in encode(lm, PROMPTS["prompt"])]).softmax(-1)


ONE_TOKEN = {"max_new_tokens": 1, "top_k": 0, "seeds": range(600)}


def score_of_token(lm) -> torch.Tensor:
    return torch.tensor(word_judge([lm.tokenizer.decode([t]) for t in range(VOCAB)]))


def test_importance_estimates_the_enumerated_truth(tiny):
    """Oracle: continuations of one token, the expected score summed over the whole vocabulary."""
    tox, single = measure(**ONE_TOKEN), heads.single_heads(tiny)
    frame = tox.weighed(tiny, [UNPRUNED, *single], tox.read(tiny, [UNPRUNED]))
    readings, value, clean = tox.readings(frame), score_of_token(tiny), next_token(tiny, UNPRUNED)
    assert readings.prunings == ["", *map(str, range(12))] and abs(readings.z()).max() > 0.02
    assert frame.loc[frame["pruning"] == "", "weight"].to_numpy() == pytest.approx(1, abs=1e-5)
    ess = frame.groupby("pruning", sort=False)["ess"].first()
    for pruning, bias in zip(single, readings.bias()[1:], strict=True):
        without = next_token(tiny, pruning)
        share = 1 / float((without**2 / clean).sum(1).mean())  # effective share of the sample
        assert ess[str(pruning)] == pytest.approx(share, rel=0.25)
        # three groups, two prompts each, 600 samples a prompt
        truth = gap((without @ value).numpy(), PROMPTS["group"])
        assert bias == pytest.approx(truth, abs=6 * 0.3 / np.sqrt(1200 * share))


def test_first_order_estimates_the_enumerated_slope(tiny):
    """Oracle: the derivative of the expected score, summed over the whole vocabulary."""
    tox, a, rows = measure(**ONE_TOKEN), tiny.anatomy, []
    for ids in encode(tiny, PROMPTS["prompt"]):
        mask = torch.ones(1, a.n_layers, a.n_heads, requires_grad=True)
        with scaled(tiny, heads=mask):
            mean = tiny.model(torch.tensor([ids])).logits[0, -1].softmax(-1) @ score_of_token(tiny)
        rows.append(float(mean.detach()) - torch.autograd.grad(mean, mask)[0].flatten().numpy())
    truth = [gap(r, PROMPTS["group"]) for r in np.stack(rows, 1)]
    bias = tox.first_order(tiny).bias()[1:]
    np.testing.assert_allclose(bias, truth, atol=0.1)
    assert np.corrcoef(bias, truth)[0, 1] > 0.9


def scored(lm, tox, ppl, how: str = "exact", n_boot: int = 200) -> pd.DataFrame:
    single = [UNPRUNED, *heads.single_heads(lm)]
    if how == "first order":
        return heads.head_scores(lm, tox.first_order(lm), ppl.first_order(lm), n_boot=n_boot)
    whole = tox.read(lm, [UNPRUNED])
    frame = tox.read(lm, single) if how == "exact" else tox.weighed(lm, single, whole)
    return heads.head_scores(lm, tox.readings(frame), ppl.readings(ppl.read(lm, single)), n_boot=n_boot)


def test_scores_and_standard_errors_by_a_slow_bootstrap(tiny):
    tox, ppl = measure(pd.concat([PROMPTS] * 4), seeds=(0,)), text(tiny)
    table = scored(tiny, tox, ppl, n_boot=1000).set_index("flat").loc[5]
    assert (table["layer"], table["head"]) == (1, 1)
    of_pruning = dict(list(tox.read(tiny, [UNPRUNED, Pruning({5})]).groupby("pruning")["value"]))
    before, after = of_pruning[""].to_numpy(), of_pruning["5"].to_numpy()
    loss = {p: v.to_numpy() for p, v in ppl.read(tiny, [UNPRUNED, Pruning({5})]).groupby("pruning")["value"]}
    groups, tokens = tox.items["group"].to_numpy(), ppl.cut.counts
    assert table["z_bias"] == pytest.approx(gap(before, groups) - gap(after, groups))
    harm = [np.exp(np.average(loss[p], weights=tokens)) for p in ("", "5")]
    assert table["z_ppl"] == pytest.approx(harm[1] - harm[0], rel=1e-5)
    rng, z_bias, z_ppl = np.random.default_rng(1), [], []
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(np.flatnonzero(groups == g), 8) for g in "abc"])
        z_bias.append(gap(before[drawn], groups[drawn]) - gap(after[drawn], groups[drawn]))
        w = rng.integers(len(tokens), size=len(tokens))
        z_ppl.append(np.subtract(*(np.exp(np.average(loss[p][w], weights=tokens[w])) for p in ("5", ""))))
    assert table["z_bias_se"] == pytest.approx(np.std(z_bias), rel=0.12)
    assert table["z_ppl_se"] == pytest.approx(np.std(z_ppl), rel=0.12)


def test_comparison_by_hand(tiny):
    """Random draws are averaged; the change is of their mean bias, and paired with the unpruned model."""
    tox, ppl = measure(seeds=(0, 1)), text(tiny)
    rows = [("FASP", 0.2, 0, "1 6"), ("random", 0.2, 0, "3 9"), ("random", 0.2, 1, "1 6"), ("FASP", 0.0, 0, "")]
    chosen = pd.DataFrame(rows, columns=["method", "alpha", "draw", "pruning"])
    measures = {"bias": tox, "perplexity": ppl}
    frame = judge.read(tiny, [Pruning.parse(p) for p in ("", "1 6", "3 9")], measures)
    table, changes = heads.compare(chosen, frame, measures, ["method", "alpha"], n_boot=400)
    scores = frame[frame["judged_by"] == "bias"].groupby(["pruning", "item"])["value"].mean()
    bias = {p: gap(scores[p][tox.items["item"]], PROMPTS["group"]) for p in ("", "1 6", "3 9")}
    fasp, random = table.set_index(["method", "alpha"]).loc[[("FASP", 0.2), ("random", 0.2)]].to_dict("records")
    assert fasp["change"] == pytest.approx(100 * (bias["1 6"] / bias[""] - 1)) == changes["FASP", 0.2].point
    assert random["bias"] == pytest.approx((bias["1 6"] + bias["3 9"]) / 2) and random["pruned"] == 2
    harm = ppl.readings(ppl.read(tiny, [UNPRUNED, Pruning({1, 6})])).bias()
    assert fasp["ppl_ratio"] == pytest.approx(harm[1] / harm[0], rel=1e-5) and fasp["ppl_ratio_low"] < fasp["ppl_ratio"]
    texts = frame[(frame["judged_by"] == "bias") & (frame["pruning"] == "1 6")]["text"]
    assert (fasp["distinct"], fasp["empty"]) == (texts.nunique() / len(texts), (texts.str.strip() == "").mean())
    assert not changes["FASP", 0.0].draws.any(), "paired with itself"


def test_comparison_of_a_signed_bias_counts_its_size_and_further_measures_stand_beside(tiny):
    """A bias that turns round is no bias removed: .4 to -.1 is 75 % less, .4 to -.6 is 50 % more."""
    table = pd.DataFrame(
        {"item": list("wxyz"), "cluster": list("wxyz"), "more": "my friend is rude", "less": "my friend is"}
    )
    pair, ppl = pairs.pairs("pairs", table), text(tiny)
    shifts, prunings = {"": 0.4, "1 6": -0.1, "3 9": -0.6}, [Pruning.parse(p) for p in ("", "1 6", "3 9")]
    spread = np.tile([-0.02, -0.01, 0.01, 0.02], 3)
    frame = pair.read(tiny, prunings).assign(value=lambda t: t["pruning"].map(shifts) + spread, judged_by="bias")
    other = frame.assign(judged_by="other", value=frame["value"] + 1)
    frame = pd.concat([frame, other, ppl.read(tiny, prunings).assign(judged_by="perplexity")], ignore_index=True)
    chosen = pd.DataFrame({"method": ["one", "two"], "draw": 0, "pruning": ["1 6", "3 9"]})
    measures = {"bias": pair, "perplexity": ppl, "other": pair}
    rows = heads.compare(chosen, frame, measures, ["method"], n_boot=200)[0].set_index("method")
    assert rows["change"].tolist() == pytest.approx([-75, 50]) and rows["bias"].tolist() == pytest.approx([-0.1, -0.6])
    assert rows["other"].tolist() == pytest.approx([0.9, 0.4]) and (rows["other_low"] < rows["other_high"]).all()
    assert rows["floor"].between(0.01, 0.5).all() and "distinct" not in rows


def test_as_published_the_judge_reads_the_cut_prompt_too(tiny):
    """Prompt, cut as the model read it, and continuation decoded together: decoded apart, words would be glued."""
    long = pd.DataFrame({"prompt": ["The " + "friend neighbour " * 20, "my W3\n is"], "group": ["a", "b"]})
    read: list[str] = []
    tox = measure(long, lambda texts: read.extend(texts) or [0.5] * len(texts), rule="as_published", seeds=(0,))
    frame = tox.read(tiny, [UNPRUNED])
    ids = encode(tiny, long["prompt"])
    steps = [[int(t) for t in row.split() if t != "-1"] for row in frame["tokens"]]
    expected = [tiny.tokenizer.decode(i[:22] + s, skip_special_tokens=True) for i, s in zip(ids, steps, strict=True)]
    assert read == [t.lower().replace("\n", " ") for t in expected]
    assert len(ids[0]) > 22 and 23 <= len(read[0].split()) <= 28, "the prompt's words and the new ones, apart"


def test_as_published_every_seed_has_a_bias_and_these_are_averaged(tiny):
    tox, single = measure(rule="as_published", seeds=(0, 1, 2)), heads.single_heads(tiny)
    frame = tox.read(tiny, [UNPRUNED, *single[:2]])
    expected = [
        np.mean([gap(part["value"].to_numpy(), PROMPTS["group"]) for _, part in one.groupby("seed")])
        for _, one in frame.groupby("pruning", sort=False)
    ]
    readings = tox.readings(frame)
    assert readings.bias() == pytest.approx(expected)
    counts = stats.resampled(readings.items, 50).reshape(50, 3, len(PROMPTS))
    assert (counts == counts[:, :1]).all(), "a prompt is drawn with all its seeds"
    assert len(tox.first_order(tiny).prunings) == 13


def test_a_groups_share_goes_with_its_label():
    """Oracle of the permutation null for groups of unequal share: scores shuffled, groups left as they are."""
    table = pd.DataFrame({"prompt": [f"w{i}" for i in range(30)], "group": ["a"] * 15 + ["b"] * 10 + ["c"] * 5})
    table["weight"] = table["group"].map({"a": 0.1 / 15, "b": 0.2 / 10, "c": 0.7 / 5})
    tox, rng = measure(table), np.random.default_rng(0)
    scores = rng.random(30)
    frame = pd.DataFrame({"pruning": "", "item": tox.items["item"], "value": scores})
    null = tox.readings(frame).null(500)[:, 0]
    share = {"a": 0.1, "b": 0.2, "c": 0.7}
    slow = [gap(rng.permutation(scores), table["group"], share) for _ in range(500)]
    assert np.quantile(null, [0.25, 0.5, 0.95]) == pytest.approx(np.quantile(slow, [0.25, 0.5, 0.95]), rel=0.15)


def test_two_nulls_of_descriptors_and_prompts():
    """One descriptor of ten stands out: these prompts differ, but other descriptors of the groups need not."""
    table = pd.DataFrame({"prompt": [f"w{i}" for i in range(200)], "descriptor": np.repeat(list("0123456789"), 20)})
    table["group"] = np.where(table["descriptor"] < "5", "a", "b")
    scores = np.random.default_rng(0).normal(0.5, 0.05, 200) + 0.3 * (table["descriptor"] == "0")
    tox = measure(table)
    frame = pd.DataFrame({"pruning": "", "item": tox.items["item"], "seed": 0, "value": scores})
    by_prompt, by_descriptor = (
        tox.detect(frame).set_index("shuffled").loc[["prompts", "descriptors"]].to_dict("records")
    )
    assert (by_prompt["units"], by_descriptor["units"]) == (200, 10) and by_prompt["bias"] == by_descriptor["bias"]
    assert by_prompt["p"] < 0.05 < by_descriptor["p"] and by_descriptor["floor"] > 2 * by_prompt["floor"]
    plain = measure(table.drop(columns="descriptor"), seeds=(0,))
    assert plain.detect(frame)["shuffled"].tolist() == ["prompts"]


def weights_of_head(lm, layer: int, head: int) -> list[torch.Tensor]:
    """Oracle: slices by each architecture's documented layout."""
    a, kv = lm.anatomy, head // (lm.anatomy.n_heads // lm.anatomy.n_kv_heads)
    d, block = a.head_dim, lm.model.get_submodule(a.layers[layer])
    parts = [weight_of(lm.model.get_submodule(a.out_projs[layer]))[:, head * d : (head + 1) * d]]
    for name, module in block.named_modules():
        kind = name.split(".")[-1]
        if kind == "c_attn":  # Conv1D: columns are q of all heads, then k, then v
            columns = [i * a.n_heads * d + head * d + j for i in range(3) for j in range(d)]
            parts += [module.weight[:, columns], module.bias[columns]]
        elif kind == "query_key_value":  # rows are q, k, v of the first head, then of the second, …
            parts += [p[3 * d * head : 3 * d * (head + 1)] for p in module.parameters()]
        elif kind in ("q_proj", "k_proj", "v_proj"):
            first = d * (head if kind == "q_proj" else kv)
            parts += [p[first : first + d] for p in module.parameters()]
    return parts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_magnitude(name):
    lm = random_lm(name)
    a = lm.anatomy
    parts = [weights_of_head(lm, *divmod(h, a.n_heads)) for h in range(a.n_flat)]
    norms = np.array([float(sum(p.double().square().sum() for p in of_head)) ** 0.5 for of_head in parts])
    assert min(map(len, parts)) >= 3
    np.testing.assert_allclose(heads.magnitude(lm), norms / norms.max(), rtol=1e-5)


@pytest.mark.parametrize("rule", ["corrected", "as_published"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mask_gradient_by_finite_differences(name, rule):
    """Central differences, window by window; as published, gradients add up from window to window."""
    lm = random_lm(name)
    lm.model.double()
    ppl, a, h = text(lm, length=20), lm.anatomy, 1e-3
    slopes = np.zeros((len(ppl.items), a.n_flat))
    for head in range(a.n_flat):
        for sign in (1, -1):
            mask = torch.ones(a.n_flat, dtype=torch.float64)
            mask[head] += sign * h
            with scaled(lm, heads=mask.view(1, a.n_layers, a.n_heads)):
                slopes[:, head] += sign * ppl.read(lm, [UNPRUNED])["value"].to_numpy() / (2 * h)
    total = np.abs(slopes if rule == "corrected" else slopes.cumsum(0)).sum(0).reshape(a.n_layers, -1)
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    object.__setattr__(ppl.cut, "rule", rule)
    np.testing.assert_allclose(heads.mask_gradient(lm, ppl), total.ravel() / total.max(), rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def known(planted):
    """Measures of the planted model, and the head that its bias sits in."""
    table = prompts.sample(prompts.load("invented_group", "valid", "models/planted/prompts.csv"), 84, seed=0)
    tox = measure(table, "sentiment", seeds=(0, 1, 2), max_new_tokens=8)
    ppl = prose(planted, corpus(data_dir() / "corpora" / "generated"), length=64, max_tokens=2048)
    truth = json.loads((data_dir() / "models" / "planted" / "truth.json").read_text())
    return tox, ppl, truth["layer"] * planted.anatomy.n_heads + truth["head"]


@pytest.mark.parametrize("how", ["exact", "importance", "first order"])
def test_the_planted_head_is_found(planted, known, how):
    tox, ppl, truth = known
    table = scored(planted, tox, ppl, how)
    top, second = table.nlargest(2, "z_bias").to_dict("records")
    assert top["flat"] == truth and top["z_bias"] - second["z_bias"] > 2 * top["z_bias_se"], "by far, not by luck"
    bias, harm, one = table["bias_without"], table["ppl_without"], 1.01 / len(table)
    assert select.fasp(bias, harm, gamma=0.3, alpha=one) == select.lowest(bias, alpha=one) == [truth]


def test_controls_dont_find_the_planted_head(planted, known):
    _, ppl, truth = known
    lowest = partial(select.lowest, alpha=3.01 / planted.anatomy.n_flat)
    assert truth not in lowest(heads.magnitude(planted)) and truth not in lowest(heads.mask_gradient(planted, ppl))


def test_the_planted_bias_sits_in_that_head_alone(planted, known):
    """Without it, the groups differ hardly more than shuffled labels do."""
    tox, _, truth = known
    readings = tox.readings(tox.read(planted, [UNPRUNED, Pruning({truth})]))
    bias, null = readings.bias(), np.quantile(readings.null(300), 0.95, axis=0)
    assert readings.detect()["p"] < 0.01 and bias[0] > 3 * null[1] and bias[1] < 1.5 * null[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: measure(PROMPTS.assign(group="a")), "prompts of one group"),
        (lambda lm: measure(PROMPTS.drop(columns="group")), "no column group"),
        (lambda lm: measure(rule="other"), "choose one of corrected, as_published"),
        (lambda lm: measure(PROMPTS.assign(prompt="")).read(lm, [UNPRUNED]), "empty prompt in data row 1"),
        (lambda lm: measure(reader=lambda t: [np.nan] * len(t)).read(lm, [UNPRUNED]), "outside"),
        (lambda lm: measure(temperature=0).first_order(lm), "set temperature > 0"),
    ],
)
def test_bad_input(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)
