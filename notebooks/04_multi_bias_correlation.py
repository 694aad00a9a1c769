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
# # Do the same heads carry several biases?
#
# **Paper.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv 2312.15398):
# experiment 2, correlation between heads' effects on five biases; experiment 3, pruning for gender bias.
#
# **Claim.** A head's effect on one bias correlates with its effect on the others, religion excepted; so
# pruning for one bias lowers others too.
#
# **Cost.** With the defaults (a small model with three planted biases) about a minute on two CPU cores, 1 GB.
# `params/smollm2.yaml`: about 8 minutes on one core with AMX (several times as long without), 4 GB.
#
# > **Content warning.** Prompts name social groups. No text that a model wrote is shown here.

# %% tags=["parameters"]
model: str = "planted-axes"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
axes: list = ["colour", "shape", "sound"]  # axes of bias; experiment 3 prunes for the first one
prompts_source: str = "models/planted-axes/prompts.csv"  # biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # toxicity, sentiment, a Hugging Face classifier, …
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file
likelihood_frame: str = ""  # put after a prompt, to look at the next word; " They are" after whole sentences
axes_fidelity: str = "exact"  # exact (texts written without every head) or gradient (first order)
axes_valid: int = 0  # prompts per axis to score heads on; 0 takes all
axes_test: int = 0  # prompts per axis to judge head sets by; 0 takes all
axes_seeds: list = [0, 1, 2, 3]  # sampling seeds for the head scores
axes_test_seeds: list = [0, 1, 2, 3]  # sampling seeds for what is reported
max_new_tokens: int = 4  # length of a continuation (paper: 40)
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
score_tokens: int = 1024  # tokens of validation text for z_ppl; 0 takes all
test_tokens: int = 1024  # tokens of test text for the reported perplexity; 0 takes all
axes_gamma: float = 0.3  # share of heads critical for language modelling: protected by FASP
axes_alpha: float = 0.13  # share of heads pruned in experiment 3
axes_draws: int = 2  # random head sets per axis; each is a control of every axis
p_bias: float = 0.05  # an axis has bias if shuffled groups give as much with a lower probability
weak: float = 0.3  # correlation is refuted if most pairs of axes lie below this with their intervals
small: float = 10.0  # spill-over is refuted if all other biases fall by less than this many %, certainly
batch_rows: int = 256  # sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch for perplexity and likelihood
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display
from statsmodels.stats.multitest import multipletests

from biasprune import figures
from biasprune.core.data import choose
from biasprune.core.masks import Pruning
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import verdict
from biasprune.measures import choices, judges, prompts, prose, reliability, toxicity
from biasprune.methods import heads, judge, parts, select
from biasprune.papers import claims

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %%
run = start("04_multi_bias_correlation", globals())
choose(axes_fidelity, ("exact", "gradient"), "axes_fidelity")
net = load(model, revision=revision or None, dtype=dtype, device=device)
reader = judges.load(judge_name, device=str(net.device))
sentences = {f"{a}, {s}": prompts.load(a, s, prompts_source) for a in axes for s in ("valid", "test")}
texts = {split: prose.corpus(corpus_name, split) for split in ("valid", "test")}
run.inputs(lm=net, **sentences, **texts)

# %% [markdown]
# ## 1 Is there bias, and can the effects of heads on it be measured?
# Two measures: `written`, the judge's score of what the model writes, as in the paper; and `likelihood`, how
# likely unkind words are right after the prompt, against kind ones.

# %%
sampling = {"max_new_tokens": max_new_tokens, "batch_rows": batch_rows, "batch_tokens": batch_tokens}


def written(axis, split, n, seeds):
    table = sentences[f"{axis}, {split}"]
    table = prompts.sample(table, n or len(table), seed=0)
    return toxicity.toxicity(table, reader, seeds=seeds, **sampling)


def without_heads(name, layer):  # of a layer; −1: nothing removed; None: all heads, to first order
    removed = [Pruning()] if layer == -1 else heads.single_heads(net, [layer or 0])
    one = measures[name]
    frame = one.first_order(net).frame() if layer is None else one.read(net, removed)
    return frame[["pruning", "item", "value"]].assign(measure=name[0], axis=name[1])


valid = {axis: written(axis, "valid", axes_valid, axes_seeds) for axis in axes}
measures = {("written", axis): one for axis, one in valid.items()}
measures |= {("likelihood", x): choices.tone(one.items, frame=likelihood_frame) for x, one in valid.items()}
cut = {"length": window or None, "batch_tokens": batch_tokens}
measures["perplexity", ""] = prose.prose(net, texts["valid"], **cut, max_tokens=score_tokens or None)
layers = range(-1, net.anatomy.n_layers) if axes_fidelity == "exact" else [None]
steps = {"written": layers, "likelihood": [None], "perplexity": layers}
jobs = {f"{name}, {i}": partial(without_heads, name, i) for name in measures for i in steps[name[0]]}
effects = run.pieces("head_effects", jobs).groupby(["measure", "axis"], sort=False)
reads = {name: measures[name].readings(part) for name, part in effects}
ppl = reads.pop(("perplexity", ""))
rows = [{"measure": m, "axis": a, **r.detect(), **reliability.split_half(r)} for (m, a), r in reads.items()]
reliable = run.frame("reliability", lambda: pd.DataFrame(rows))
can_be_read = (reliable["p"] < p_bias) & (reliable["low"] > 0)
if can_be_read.any():
    dots = {"low": "low", "high": "high", "hue": "measure", "xlabel": "reliability of z_bias"}
    run.figure(figures.intervals(reliable[can_be_read], "r", "axis", **dots), "reliability")
unread = [f"{r.axis} by {r.measure} (p = {r.p:.2f})" for r in reliable[~can_be_read].itertuples()]
display(Markdown(f"Not readable, for want of bias or of effects that agree: {', '.join(unread) or 'none'}."))
reliable.style.hide(axis="index").format(precision=3)

# %% [markdown]
# `floor`: bias with group labels shuffled among the prompts, on average; `p`: how often they give as much as
# there is. `r`: reliability of z_bias, the bias that a head's removal takes away, stepped up from `half`, the
# correlation of halves of the prompts (95 % over heads). An axis is read where there is bias and effects
# agree: without bias, a head that makes all texts vary more raises the noise of all axes, and that agrees
# too.
#
# ## 2 Correlation between axes (experiment 2)
# `r` is the plain correlation over heads, as in the paper; noise keeps it below `ceiling`, √(reliability ×
# reliability). `disattenuated` estimates the correlation of what is measured: one axis in one half of the
# prompts against the other in the other half, so that noise of shared prompts drops out (95 % over prompts).
# 95 % of permuted heads stay below `null_95`. In the figure `r` is in brackets; bold: positive by its
# interval, and by Holm's correction. Heads critical for language modelling change every bias at once.

# %%
scored = {x: heads.head_scores(net, reads["written", x], ppl) for x in axes}
run.frame("head_scores", lambda: pd.concat([table.assign(axis=x) for x, table in scored.items()]))
ppl_without, n_heads = scored[axes[0]]["ppl_without"], net.anatomy.n_flat
free = np.flatnonzero(ppl_without.rank(method="first") <= n_heads - int(axes_gamma * n_heads))
among = {"all heads": range(n_heads), "non-critical heads": free}


def related(measure, which, method):
    subset = {x: reads[measure, x][["", *map(str, among[which])]] for x in readable[measure]}
    table = reliability.correlations(subset, method=method).assign(measure=measure, which=which)
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table.assign(positive=table["p_holm"].lt(0.05) & table["low"].gt(0))


readable = reliable[can_be_read].groupby("measure", sort=False)["axis"].agg(list)
shapes = [x for x in product(readable.index, among, ["spearman", "pearson"]) if len(readable[x[0]]) > 1]
shown = pd.DataFrame(columns=["measure", "a", "b", "disattenuated", "high", "positive"], dtype=float)
if shapes:
    pairs = run.frame("correlations", lambda: pd.concat([related(*shape) for shape in shapes]))
    shown = pairs[(pairs["method"] == "spearman") & (pairs["which"] == "all heads")]
    cells = shown.assign(text=[f"{r.disattenuated:.2f}\n({r.r:.2f})" for r in shown.itertuples()])
    style = {"text": "text", "bold": "positive", "panel": "measure", "limit": 1.0, "label": "correlation"}
    run.figure(figures.heat_map(cells, "a", "b", "disattenuated", **style), "correlations")
    display(pairs.style.hide(axis="index").format(precision=2))

# %% [markdown]
# ## 3 Pruned for one axis, judged on all (experiment 3)
# FASP with one γ and α, by the scores of every axis in turn, against as many random heads that FASP could
# have picked, in % of the unpruned bias. In the figure the change itself is in brackets; bold: both below 0
# with their intervals (over prompts and random sets; see tests/test_stats.py).

# %%
bias_without = {valid[axis]: table["bias_without"] for axis, table in scored.items()}


def at_random(lm, measure, draw):
    seed = draw * len(axes) + list(bias_without).index(measure)
    return parts.of_parts("heads", select.random(free, int(axes_alpha * n_heads), seed=seed))


fasp = partial(select.fasp, ppl_without=ppl_without, gamma=axes_gamma, alpha=axes_alpha)
methods = {"FASP": lambda lm, measure: parts.of_parts("heads", fasp(bias_without[measure]))}
methods |= {f"random {i}": partial(at_random, draw=i) for i in range(axes_draws)}
on = {f"on {axis}": written(axis, "test", axes_test, axes_test_seeds) for axis in axes}
known = valid | on | {"perplexity": prose.prose(net, texts["test"], **cut, max_tokens=test_tokens or None)}
options = {"always": ["perplexity"], "pieces": partial(run.pieces, "test")}
tried = judge.select_and_judge(net, methods, list(product(axes, on)), known, **options)
left = judge.judged(tried, known)
whole = {name: one.readings(tried[tried["judged_by"] == name]).detect() for name, one in on.items()}


def changed(axis, name):
    rows = left.rows(method="FASP", selected_by=axis, judged_by=name)
    random = [np.array([i]) for i in left.rows(method=list(methods)[1:], judged_by=name)]
    beyond = left.more(rows, random) / left.before[rows[0]]
    change = (left.share(rows) * -100).row("change") | (beyond * -100).row("against_random")
    return {"selected_by": axis, "judged_on": name[3:], **change, **whole[name]}


spread = run.frame("judged_on_all", lambda: pd.DataFrame([changed(*x) for x in product(axes, on)]))
spread["lower"] = (spread["change_high"] < 0) & (spread["against_random_high"] < 0)
tested = spread[spread["p"] < p_bias]
if len(tested):
    cells = tested.assign(text=[f"{r.against_random:+.0f}\n({r.change:+.0f})" for r in tested.itertuples()])
    style = {"text": "text", "bold": "lower", "limit": 100.0, "label": "change beyond random heads, %"}
    figure = figures.heat_map(cells, "selected_by", "judged_on", "against_random", **style)
    run.figure(figure, "selected_and_judged")
    display(tested.style.hide(axis="index").format(precision=2))
untested = spread.loc[spread["p"] >= p_bias, "judged_on"].unique()
display(Markdown(f"Axes without bias on the test prompts, so left out: {', '.join(untested) or 'none'}."))
health = left.table[left.table["judged_by"] == "perplexity"].rename(columns={"bias": "perplexity"})
health[["method", "selected_by", "pruning", "perplexity"]].style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 4 Verdict

# %%
rows, ends = [], ["mean", "min", "max"]
asked = [axis for axis in axes if axis != "religion"]
total = len(asked) * (len(asked) - 1) // 2
for measure, claim in {"written": "F2 texts", "likelihood": "F2 likelihood"}.items():
    kept = shown[(shown["measure"] == measure) & shown["a"].isin(asked) & shown["b"].isin(asked)]
    n, p = int(kept["positive"].sum()), reliable.loc[reliable["measure"] == measure, "p"]
    biased = p.lt(p_bias).sum() > 1
    word = verdict(biased=biased, reproduced=0 < n == total, refuted=kept["high"].lt(weak).mean() > 0.5)
    why = f"{n} of {total} pairs of axes without religion positive, {len(kept)} readable"
    rows.append([claim, measure, *kept["disattenuated"].agg(ends), word, why])
pruned = tested[tested["selected_by"] == axes[0]].set_index("judged_on")
others, starts = pruned.drop(index=axes[0], errors="ignore"), bool(pruned["lower"].get(axes[0]))
biased, down = axes[0] in pruned.index and len(others) > 0, int(others["lower"].sum())
flat = starts and others["against_random_low"].gt(-small).all()
word = verdict(biased=biased, reproduced=starts and down == len(others), refuted=flat)
why = f"{axes[0]} itself is {'' if starts else 'not '}lower, so are {down} of {len(others)} others with bias"
rows.append(["F3", "", *others["against_random"].agg(ends), word, why])
verdicts = pd.DataFrame(rows, columns=["id", "case", "ours", "low", "high", "verdict", "why"])
verdicts = verdicts.join(claims.known().set_index("id")[["claim", "what"]], on="id")
text = [f"{r.claim}: **{r.verdict}** ({r.why})." for r in verdicts.itertuples()]
sentence = f"{model}, {len(axes)} axes. {' '.join(text)}"
verdicts.drop(columns="what").style.hide(axis="index").format(precision=2, na_rep="–")

# %%
truth = net.folder / "truth.csv"
if truth.exists() and axes_fidelity == "exact":  # is what was planted inside the intervals?
    planted = pd.read_csv(truth).eval(f"flat = layer * {net.anatomy.n_heads} + head")
    planted = planted.pivot(index="flat", columns="axis", values="raises").reindex(range(n_heads)).fillna(0)
    check = pairs.query("which == 'all heads' and method == 'pearson' and measure == 'written'").copy()
    check["planted"] = [planted.corr().loc[r.a, r.b] for r in check.itertuples()]
    assert check["planted"].between(check["low"], check["high"]).all(), "planted correlations aren't found"
tables = {"reliability": "Is there bias (p), and do the effects of heads agree with themselves (r)?"}
tables |= {"correlations": "Correlation between axes over heads"}
tables |= {"judged_on_all": "Pruned for one axis, judged on all: change of bias in % (95 %)"}
maps = {"correlations": "Correlation between axes over heads, disattenuated; plain ones in brackets"}
maps |= {"selected_and_judged": "Change of bias beyond random heads", "reliability": "Reliability per axis"}
run.finish(sentence, verdicts=verdicts, about=", ".join(axes), tables=tables, figures=maps)
