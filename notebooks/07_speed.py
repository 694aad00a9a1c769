# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How fast, how exact, how reliable: scoring every attention head
#
# **What this is.** Head scores are the cost and the weak point of pruning for fairness (Zayed et al., AAAI 2024): the
# published procedure removes one head at a time, generates, judges, and measures perplexity. This notebook measures
# what replaces it here, side by side in one run on one machine: time, memory, agreement, standard error, reliability.
#
# **Claims of this companion.** (1) `exact` gives the loop's own tokens at least 2 – 3 times sooner; (2) `importance`
# reaches the same standard error at least 15 times sooner, `adaptive` at least 50 times. Each is checked at the end, and shown as
# missed where it is. Section 7 asks whether the same heads would come out again, with coupled and with independent noise.
#
# **Cost.** With the defaults (a tiny model): under a minute on two CPU cores, 1 GB. `params/smollm2.yaml`, the default of `make reproduce`:
# about 10 minutes on two cores with AMX (several times as long without), 4 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** Prompts name social groups. No text is shown here.

# %% tags=["parameters"]
model: str = "planted"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
axis: str = "invented_group"  # see 01_fasp_heads
prompts_source: str = "models/planted/prompts.csv"  # biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # toxicity, sentiment, a Hugging Face classifier, …
corpus_name: str = "corpora/generated"  # sotu, bold, wikitext-2, or a text file
top_k: int = 50  # sampling, as in the paper
temperature: float = 1.0
max_prompt_tokens: int = 22  # prompts are cut to this length, as in the paper
speed_dtypes: list = ["float32"]  # number formats to time; the last one serves for precision and reliability
speed_work: list = [[14, 8], [7, 8]]  # prompts × new tokens to time
speed_layers: int = 2  # layers to time, evenly over the depth; all heads are projected from them
speed_naive_heads: int = 1  # heads per timed layer for the loops
speed_window: int = 64  # tokens per perplexity window
speed_tokens: int = 512  # tokens of text for perplexity
speed_shapes: dict = {"gpt2, 4 of 12 layers": {"n_layer": 4}}  # random weights of GPT-2's shape with changes
speed_shape_work: list = [7, 4]  # prompts × new tokens for those
weight_examples: int = 8  # examples for the scores of weights
weight_at_once: list = [1, 4]  # layers whose scores are held together
weight_shape: dict = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}  # memory is worked out for this Llama shape (the 8B model of "Breaking Down Bias")  # fmt: skip
precision_layers: int = 2  # layers whose heads are compared for standard errors and reliability
precision_prompts: int = 28  # prompts for the loop and exact
adaptive_prompts: int = 84  # prompts for adaptive, and for importance as reference
adaptive_first: int = 2  # prompts of each group in the first round
precision_seeds: list = [0, 1]  # sampling seeds for reliability
wanted_reliability: float = 0.8  # how many prompts would this take?
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from IPython.display import Markdown, display

from biasprune import (
    figures,
    headscores,
    judge,
    lm,
    measure,
    prompts,
    published,
    record,
    reliability,
    speed,
    weightscores,
)

warnings.filterwarnings("ignore", message=".*IProgress.*")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
speed_dtypes = list(dict.fromkeys(lm.number_format(d, device) for d in speed_dtypes))
config = {name: globals()[name] for name in ["model", "revision", "axis", "prompts_source", "judge_name", "corpus_name", "top_k", "temperature", "max_prompt_tokens", "speed_dtypes", "speed_work", "speed_layers", "speed_naive_heads", "speed_window", "speed_tokens", "speed_shapes", "speed_shape_work", "weight_examples", "weight_at_once", "weight_shape", "precision_layers", "precision_prompts", "adaptive_prompts", "adaptive_first", "precision_seeds", "wanted_reliability"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"07_speed-{model}")
nets = {d: lm.load(model, revision=revision or None, dtype=d, device=device) for d in speed_dtypes}
net = nets[speed_dtypes[-1]]
judged_by = judge.load(judge_name, device=str(net.device))
table = prompts.load(axis, "valid", prompts_source)
text = prompts.corpus(corpus_name, "valid")
inputs = {**record.digests({"prompts": table, "prose": text}), "weights": net.revision, "device": record.device_name(net.device)}  # fmt: skip
run = record.Run(folder, {**config, "inputs": inputs}, notebook="07_speed")
run.note(provenance=record.provenance(net))
sampling = {"top_k": top_k, "temperature": temperature, "max_prompt_tokens": max_prompt_tokens}
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "layers", "heads", "parameters", "device", "commit"]
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 Time for the same samples: z_bias
# Two loops stand for the published procedure, both with `transformers.generate`: as anyone writes it, and repaired. (Asking a model
# for the last position's logits alone makes torch copy the unembedding matrix for every row on a CPU, which can take most of the
# time. The repair avoids that, so `ratio_repaired` says what the methods here gain by themselves.) `naive` is this companion's own
# loop, which serves as oracle: the same noise, one head at a time, every text judged.
#
# Some layers are measured, all heads are projected from them. Ratios are of mean times; their range is over the layers, since a
# head of a late layer costs less to check than one of an early layer.


# %%
def timed_work(d: str, n: int, steps: int) -> pd.DataFrame:
    some = prompts.sample(table, n, seed=0)
    times = speed.bias_times(
        nets[d], some, judged_by, layers=speed_layers, naive_heads=speed_naive_heads,
        max_new_tokens=steps, progress=f"{d}, {n} × {steps}", **sampling,
    )  # fmt: skip
    return times.assign(dtype=d, work=f"z_bias, {n} prompts × {steps} tokens")


times = run.frame(
    "bias_times", lambda: pd.concat([timed_work(d, n, s) for d in speed_dtypes for n, s in speed_work])
)
losses = run.frame("ppl_times", lambda: pd.concat([
    speed.perplexity_times(
        nets[d], measure.windows(nets[d], text, length=speed_window, max_tokens=speed_tokens),
        layers=speed_layers, naive_heads=speed_naive_heads,
    ).assign(dtype=d, work=f"z_ppl, {speed_tokens} tokens in windows of {speed_window}")
    for d in speed_dtypes
]))  # fmt: skip
n_heads = net.anatomy.n_flat


def summed(times: pd.DataFrame, naive: str, heads: int = n_heads) -> pd.DataFrame:
    parts = [
        speed.summary(own, heads, naive).assign(dtype=d, work=w)
        for (d, w), own in times.groupby(["dtype", "work"], sort=False)
    ]
    return pd.concat(parts, ignore_index=True)


bias_speed = summed(times, speed.GENERATE)
from_repaired = {"ratio": "ratio_repaired", "ratio_low": "repaired_low", "ratio_high": "repaired_high"}
bias_speed = bias_speed.join(summed(times, speed.REPAIRED)[list(from_repaired)].rename(columns=from_repaired))
ppl_speed = summed(losses, "naive")
columns = ["dtype", "work", "fidelity", "seconds", "peak_mib", "ratio", "ratio_low", "ratio_high"]
display(bias_speed[[*columns, "ratio_repaired", "same_texts"]].style.hide(axis="index").format(precision=1).format(precision=3, subset="same_texts").set_caption(f"z_bias of {n_heads} heads: seconds, and times faster than the loop"))  # fmt: skip
ppl_speed[[*columns, "difference"]].style.hide(axis="index").format(precision=1).format("{:.1e}", subset="difference").set_caption(f"z_ppl of {n_heads} heads")  # fmt: skip

# %% [markdown]
# `same_texts` is the share of texts that `exact` writes, token for token, as the one-by-one oracle does. In float32 it must be 1. In bfloat16
# two next tokens are often equally likely to the last bit, and the batch decides which one rounding prefers; that is noise, not bias.
# `difference` is the largest relative difference of a perplexity.

# %%
figure = figures.speed_ratios(bias_speed[bias_speed["fidelity"] != speed.GENERATE])
figures.save(figure, folder / "figures", "speed_ratios")

# %% [markdown]
# ## 2 Where the time goes, and what is left
# The same work again for the heads of the middle layer, watched: seconds per head inside the layers, the unembedding and the judge;
# `rest` is drawing tokens, losses, copying caches, and Python. What is done once for all heads is left out.


# %%
def watched(d: str, n: int, steps: int) -> pd.DataFrame:
    some = prompts.sample(table, n, seed=0)["prompt"]
    windows = measure.windows(nets[d], text, length=speed_window, max_tokens=speed_tokens)
    how = {"naive_heads": speed_naive_heads, "max_new_tokens": steps, **sampling}
    spent = speed.profile(nets[d], some, judged_by, windows, **how)
    bias, loss = f"z_bias, {n} prompts × {steps} tokens", f"z_ppl, {speed_tokens} tokens"
    return spent.assign(dtype=d, work=np.where(spent["score"] == "z_bias", bias, loss))


parts = run.frame(
    "profile",
    lambda: (
        pd.concat([watched(d, n, s) for d in speed_dtypes for n, s in speed_work])
        .drop_duplicates(["dtype", "work", "fidelity"])
        .drop(columns="score")
    ),
)
parts["per_head"] = parts[list(speed.PARTS)].sum(axis=1)
parts[["dtype", "work", "fidelity", "per_head", *speed.PARTS]].style.hide(axis="index").format(
    precision=3
).set_caption("Seconds per head of the middle layer")

# %%
figure = figures.time_parts(parts, speed.PARTS)
figures.save(figure, folder / "figures", "time_parts")

# %% [markdown]
# Resuming at the head's layer takes away half of the time in the layers, and nothing else: the unembedding and the loss read the last
# layer. The most that it can gain for z_ppl is therefore

# %%
loop = parts[(parts["fidelity"] == "naive")]
limit = loop["per_head"] / (loop["per_head"] - loop["layers"] / 2)
run.frame("limit", lambda: loop[["dtype", "work"]].assign(limit=limit))
loop[["dtype", "work"]].assign(limit=limit).style.hide(axis="index").format(precision=2)

# %% [markdown]
# times the loop, on average over layers, whatever the code. (With a larger model the vocabulary weighs less, and the limit nears 2.) For
# z_bias `exact` pays for one pass over prompt and text from the head's layer on, all tokens at once, and then writes what changed,
# token by token; both run at the speed of the matrix products. What it saves are the layers below the head, the tokens that stay
# the same, and texts that were judged before.

# %% [markdown]
# ## 3 Other shapes, and how cost grows
# Random weights of GPT-2's shapes, with the vocabulary of the model above: the text is senseless, and few tokens change when a head
# goes, which flatters `exact`; the other times are those of the shape. Costs grow with heads (number of passes), prompts and
# tokens (length of each).


# %%
def shape(changes: dict) -> lm.LM:
    torch.manual_seed(0)
    made = transformers.GPT2Config(vocab_size=len(net.tokenizer), **changes)
    body = transformers.GPT2LMHeadModel(made).to(net.device, net.dtype)
    return lm.wrap(body, net.tokenizer, name="random weights")


def timed_shape(name: str, changes: dict) -> pd.DataFrame:
    n, steps = speed_shape_work
    body, some = shape(changes), prompts.sample(table, n, seed=0)
    options = {"layers": 2, "naive_heads": 1, "max_new_tokens": steps, **sampling}
    times = speed.bias_times(body, some, judged_by, progress=name, **options)
    own = speed.summary(times, body.anatomy.n_flat)
    return own.assign(shape=name, heads=body.anatomy.n_flat, work=f"z_bias, {n} prompts × {steps} tokens")


shapes = run.frame("shapes", lambda: pd.concat([timed_shape(k, v) for k, v in speed_shapes.items()]))
shapes[["shape", "heads", "work", "fidelity", "seconds", "ratio", "ratio_low", "ratio_high"]].style.hide(
    axis="index"
).format(precision=1)

# %% [markdown]
# **Against the machine.** The share of what a large matrix product reaches here: 2 × parameters × tokens operations, prompts and new
# tokens both counted, over the time that `exact` took. Tokens that replay didn't have to compute count as computed, so this is
# the share that a loop would need to be as fast.

# %%
ids = [len(x) for x in net.tokenizer(list(table["prompt"]))["input_ids"]]
size = sum(p.numel() for p in net.model.parameters())
roof = pd.DataFrame([
    {"dtype": d, "work": f"z_bias, {n} prompts × {s} tokens", "peak": speed.matmul_peak(net.device, getattr(torch, d)),
     "operations": 2.0 * size * n * (np.mean(ids) + s) * n_heads}
    for d in speed_dtypes for n, s in speed_work
]).merge(bias_speed[bias_speed["fidelity"] == "exact"][["dtype", "work", "seconds"]])  # fmt: skip
roof["share"] = roof["operations"] / roof["seconds"] / roof["peak"]
roof.style.hide(axis="index").format(precision=2).format("{:.2e}", subset=["peak", "operations"])

# %% [markdown]
# ## 4 Scores of single weights
# SNIP, Σ over examples |W · ∂L/∂W|, of every weight (see 02_neuron_pruning): the loop that the published code writes runs one backward pass per
# example and holds the scores of all layers; here a batch's examples come from one backward pass, some layers at a time. `difference`: the largest,
# relative to a matrix's largest score. `estimate_mib` is worked out from the shape alone; beside what was measured it says how far the
# estimate for a larger shape can be trusted. (On a CPU the peak also depends on what ran before.)


# %%
def weighed() -> pd.DataFrame:
    some = list(prompts.sample(table, weight_examples, seed=0)["prompt"])
    own = weightscores.examples(nets[speed_dtypes[0]], some, [" " + text[:200]] * len(some))
    return speed.weight_times(nets[speed_dtypes[0]], own, weight_at_once).assign(dtype=speed_dtypes[0])


weights = run.frame("weights", weighed)
columns = ["dtype", "method", "seconds", "ratio", "peak_mib", "estimate_mib", "difference"]
display(weights[columns].style.hide(axis="index").format(precision=1, na_rep="–").format("{:.1e}", na_rep="–", subset="difference"))  # fmt: skip

# %%
with torch.device("meta"):
    shape_8b = transformers.LlamaForCausalLM(transformers.LlamaConfig(**weight_shape)).to(torch.bfloat16)
needs = [
    {"layers at once": n, **weightscores.memory(shape_8b, lm.anatomy(shape_8b), at_once=n)}
    for n in (1, 2, 4, weight_shape["num_hidden_layers"])
]
needs = run.frame("weight_memory", lambda: pd.DataFrame(needs).assign(total=lambda t: t.drop(columns="layers at once").sum(axis=1)))  # fmt: skip
needs.style.hide(axis="index").format(precision=1).set_caption("Worked out, not measured: GiB for SNIP scores of a Llama of 8B parameters in bfloat16, three sets of examples side by side")  # fmt: skip

# %% [markdown]
# ## 5 Time to the same standard error
# What a user waits for is not samples but a standard error of z_bias. The loop draws fresh noise for every head, so a head's
# effect carries the noise of two runs. With coupled noise most texts stay as they are; importance weights also take away what is
# left of the sampling noise in each; `adaptive` spends first-order effects on many prompts and weights on few.
#
# Standard errors are bootstrap ones over prompts. Time × squared standard error wouldn't depend on the number of prompts if
# standard errors fell with its root; `importance` on few and on more prompts shows how far that holds. `adaptive` stops where its
# standard errors look small, which flatters it. Intervals of the gain are over heads alone,
# so they leave out what other prompts or another run would change.

# %%
heads = [h for layer in speed.layers_of(net, precision_layers) for h in layer]
small, large = (prompts.sample(table, n, seed=0) for n in (precision_prompts, adaptive_prompts))
windows = measure.windows(net, text, length=2, max_tokens=2)  # z_ppl was timed by itself
steps = speed_work[0][1]
options = {"heads": heads, "max_new_tokens": steps, "first": adaptive_first, "progress": False, **sampling}
plans = {
    "loop, independent noise": (small, {"fidelity": "exact", "coupled": False}),
    "exact": (small, {"fidelity": "exact"}),
    "importance": (small, {"fidelity": "importance"}),
    "gradient": (small, {"fidelity": "gradient"}),
    "adaptive": (large, {"fidelity": "adaptive"}),
    "importance, more prompts": (large, {"fidelity": "importance"}),
}


def one_plan(name: str) -> pd.DataFrame:
    some, how = plans[name]
    got = headscores.samples(net, some, judged_by.emptied(), windows, **options, **how)
    spent = {**got.seconds, "perplexity": 0.0}
    once = spent["unpruned"] + spent.get("slopes", 0.0) + (spent["heads"] if name == "gradient" else 0.0)
    each = (sum(spent.values()) - once) / len(heads)
    return got.frame().assign(method=name, seconds=once + each * n_heads)


precise = run.frame("precision_scores", lambda: pd.concat([one_plan(p) for p in plans], ignore_index=True))
frames = {name: part.reset_index(drop=True) for name, part in precise.groupby("method", sort=False)}
seconds = {name: float(part["seconds"].iloc[0]) for name, part in frames.items()}
per_text = times[times["dtype"] == speed_dtypes[-1]].groupby(["work", "fidelity"], sort=False)["per_head"]
work = f"z_bias, {speed_work[0][0]} prompts × {steps} tokens"
scale = precision_prompts / speed_work[0][0] * n_heads
gains = run.frame("precision", lambda: pd.concat([
    speed.precision(frames, {**seconds, "loop, independent noise": per_text.mean()[work, loop] * scale}, "loop, independent noise").assign(against=loop)
    for loop in speed.NAIVE
]))  # fmt: skip
counts = {name: f"{len(plans[name][0])} prompts" for name in plans}
gains.assign(prompts=gains["method"].map(counts)).style.hide(axis="index").format(precision=3).format(
    precision=1, subset=["seconds", "gain", "gain_low", "gain_high", "gain_median"]
).set_caption(f"Seconds for {n_heads} heads; gain: how many times sooner the same standard error is reached")

# %%
figure = figures.precision_against_time(gains[gains["against"] == speed.GENERATE])
figures.save(figure, folder / "figures", "precision_against_time")

# %% [markdown]
# The times of `loop` are those of the loops of section 1 on as many prompts; its scores were drawn with heads as rows and independent
# noise; the loop writes every row to the last token, the others stop at the end of the text. z_ppl isn't part of these times.
#
# ## 6 Are the cheap scores right?
# Rank correlation of z_bias with the importance estimate on more prompts, and overlap of the top fifth of heads, against chance.
# The reference has the few prompts among its own, and `adaptive` has all of its prompts, so agreement is somewhat flattered. Noise
# limits it: section 7 has the ceiling. Where `ess` is low, the head changes the model so much that weights know little of it;
# `adaptive` writes new texts for such heads. Standard errors don't contain a method's own bias: `gradient` is first-order, and
# `importance` knows only tokens that are among the unpruned model's k likeliest.


# %%
def against(name: str) -> dict:
    reference, own = frames["importance, more prompts"]["z_bias"], frames[name]["z_bias"]
    both = reliability.agreement([own, reference], n_boot=500)
    overlap = reliability.top_overlap(own, reference, max(1, len(own) // 5))
    ess = frames[name]["ess"]
    return {"method": name, **both, **overlap, "ess_median": ess.median(), "ess_lowest": ess.min()}


cheap = run.frame(
    "agreement", lambda: pd.DataFrame([against(n) for n in frames if n != "importance, more prompts"])
)
display(
    cheap.drop(columns="repetitions")
    .style.hide(axis="index")
    .format(precision=2)
    .set_caption("Agreement with importance on more prompts")
)
exact_frame, weak = frames["exact"], frames["importance"]["ess"] < 0.5
apart = pd.DataFrame({
    "heads": ["ess ≥ .5", "ess < .5"],
    "n": [int((~weak).sum()), int(weak.sum())],
    "mean |importance − exact|": [(frames["importance"]["z_bias"] - exact_frame["z_bias"]).abs()[m].mean() for m in (~weak, weak)],
    "mean |gradient − exact|": [(frames["gradient"]["z_bias"] - exact_frame["z_bias"]).abs()[m].mean() for m in (~weak, weak)],
    "standard error of exact": [exact_frame["z_bias_se"][m].mean() for m in (~weak, weak)],
})  # fmt: skip
apart.style.hide(axis="index").format(precision=3).set_caption("Where they fail: by effective sample size")

# %% [markdown]
# ## 7 Reliability: coupled against independent noise, same prompts
# Would the same heads come out again? `split_half` compares halves of the prompts, stepped up to all of them (Spearman – Brown);
# `seeds` compares seeds on the same prompts. `needed` says how many prompts a wanted reliability would take, for one seed
# and for ten. A reliability near 0 means that this many prompts tell nothing about the order of heads; where the interval of
# `split_half` holds 0 there is nothing to project (–).
# `published budget` steps the reliability up to the 10,168 prompts of the paper's gender axis, as a projection.


# %%
def reliable(name: str, how: dict, some: pd.DataFrame = small) -> dict:
    own = {**options, **how, "seeds": precision_seeds}
    got = headscores.samples(net, some, judged_by.emptied(), windows, **own)
    values, sizes = got.arrays()
    bias = measure.group_bias(values.swapaxes(0, 1), some["bucket"], some["weight"], sizes.swapaxes(0, 1))
    halves = reliability.half_scores(values.mean(1), some["bucket"], some["weight"], sizes.mean(1))
    return reliability.row(name, halves, bias[:, :1] - bias[:, 1:], len(some), wanted_reliability)


ours = run.frame("reliability", lambda: pd.DataFrame([
    reliable("independent noise", {"fidelity": "exact", "coupled": False}),
    reliable("coupled noise (exact)", {"fidelity": "exact"}),
    reliable("coupled noise (importance)", {"fidelity": "importance"}),
    reliable("coupled noise (gradient)", {"fidelity": "gradient"}),
    reliable("coupled noise (importance)", {"fidelity": "importance"}, large),
    reliable("coupled noise (gradient)", {"fidelity": "gradient"}, large),
    reliable("coupled noise (gradient)", {"fidelity": "gradient", "heads": None}, large),
]))  # fmt: skip
ours.style.hide(axis="index").format(precision=2, na_rep="–").format(precision=0, thousands=",", na_rep="–", subset=["prompts", "needed_1_seed", "needed_10_seeds"])  # fmt: skip

# %%
theirs = run.frame("published", lambda: pd.DataFrame([
    {"scores": f"{m} (published)", **published.seeds(published.read(m))} for m in published.models()
]))  # fmt: skip
display(Markdown(
    "The published scores (independent noise, three seeds, about 10,000 prompts), read from the authors' repository: mean correlation between seeds of z_bias, gender axis."
    if len(theirs) else "The published scores aren't at hand (`BIASPRUNE_PUBLISHED` names no folder): this part is left out."
))  # fmt: skip
theirs.style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 8 Verdict
# A goal is reached if the lowest of the range reaches it, missed if the highest doesn't, and undecided between. `low` and `high` are the range over layers or, for standard errors, 95 % over heads.

# %%
most, few = speed_work[0], speed_work[-1]
goals = [
    (f"exact, z_bias, {most[0]} prompts: time for the same samples", "exact", most, 2),
    (f"importance, {most[0]} prompts: time for the same samples", "importance", most, 3),
    (f"gradient, {most[0]} prompts: time for all heads", "gradient", most, 100),
]
if few != most:
    goals.insert(1, (f"exact, z_bias, {few[0]} prompts: time for the same samples", "exact", few, 3))
    goals.insert(3, (f"importance, {few[0]} prompts: time for the same samples", "importance", few, 5))
rows = []
for claim, name, (n, s), goal in goals:
    at = bias_speed[
        (bias_speed["fidelity"] == name) & (bias_speed["work"] == f"z_bias, {n} prompts × {s} tokens")
    ]
    rows += [{"claim": claim, "dtype": r.dtype, "goal": goal, "measured": r.ratio, "low": r.ratio_low, "high": r.ratio_high, "against repaired loop": r.ratio_repaired, "repaired_low": r.repaired_low, "repaired_high": r.repaired_high} for r in at.itertuples()]  # fmt: skip
for r in ppl_speed[ppl_speed["fidelity"] == "exact"].itertuples():
    rows.append({"claim": "exact, z_ppl: time for the same windows", "dtype": r.dtype, "goal": 2, "measured": r.ratio, "low": r.ratio_low, "high": r.ratio_high})  # fmt: skip
for name, goal in (("importance", 15), ("adaptive", 50)):
    g, m = (gains[(gains["method"] == name) & (gains["against"] == k)].iloc[0] for k in speed.NAIVE)
    rows.append({"claim": f"{name}: time to the same standard error", "dtype": speed_dtypes[-1], "goal": goal, "measured": g["gain"], "low": g["gain_low"], "high": g["gain_high"], "against repaired loop": m["gain"], "repaired_low": m["gain_low"], "repaired_high": m["gain_high"]})  # fmt: skip
verdicts = pd.DataFrame(rows)
verdicts["verdict"] = speed.reached(verdicts["goal"], verdicts["low"], verdicts["high"])
verdicts["repaired"] = speed.reached(verdicts["goal"], verdicts["repaired_low"], verdicts["repaired_high"])
run.frame("verdicts", lambda: verdicts)
verdicts.style.hide(axis="index").format(precision=1, na_rep="–")

# %%
counts = {
    "transformers.generate as it is": verdicts["verdict"].value_counts(),
    "the repaired loop": verdicts["repaired"]
    .drop(verdicts.index[verdicts["repaired"] == "–"])
    .value_counts(),
}
told = [f"{c.get('reached', 0)} of {c.sum()} goals of speed reached against {loop}, {c.get('undecided', 0)} undecided" for loop, c in counts.items()]  # fmt: skip
sentence = f"{model} on {facts['device']}: {'; '.join(told)}."
display(Markdown(sentence))
float32 = bias_speed[(bias_speed["dtype"] == "float32") & (bias_speed["fidelity"] == "exact")]
assert (float32["same_texts"] == 1).all(), "in float32, exact must give the loop's own texts"
assert (ppl_speed["difference"].dropna()[ppl_speed["dtype"] == "float32"] < 1e-5).all()

# %%
rows = pd.concat([
    bias_speed.assign(model=model, naive=speed.NAIVE[speed.GENERATE], agreement=bias_speed["same_texts"], agreement_is="share of texts that are the oracle's"),
    ppl_speed.assign(model=model, naive="one masked pass over the windows per head", agreement=ppl_speed["difference"], agreement_is="largest relative difference of perplexity"),
    shapes.assign(model=shapes["shape"] + ", random weights", dtype=speed_dtypes[-1], naive=speed.NAIVE[speed.GENERATE], agreement=shapes["same_texts"], agreement_is="share of texts that are the oracle's"),
])  # fmt: skip
run.frame("speed", lambda: rows.assign(device=facts["device"])[["device", "model", "dtype", "work", "fidelity", "seconds", "peak_mib", "ratio", "ratio_low", "ratio_high", "ratio_repaired", "agreement", "agreement_is", "naive"]])  # fmt: skip
run.finish(
    sentence=sentence,
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "verdicts": "Goals and what was measured (times faster; low and high are over layers or, for standard errors, 95 % over heads)",
        "profile": "Where the time goes: seconds per head of the middle layer",
        "limit": "The most that resuming at the head's layer can gain for z_ppl, times the loop",
        "weights": "SNIP scores of all weights against the direct loop",
        "weight_memory": "Worked out, not measured: GiB for SNIP scores of a Llama of 8B parameters in bfloat16, by layers held at once",
        "reliability": "Reliability of z_bias, coupled against independent noise, same prompts",
        "published": "Agreement between the published seeds",
    },
    figures={
        "time_parts": "Where the time per head goes, in percent of the repaired loop's, per fidelity and work",
        "precision_against_time": "Standard error of z_bias against the time for all heads, per method",
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
