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
# # Pruning attention heads for fairness (FASP)
#
# **Paper.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv 2312.15398):
# the method, experiments 1 and 2, head positions, examples.
#
# **Claim.** Some attention heads add to social bias, others matter for language modelling. Protect the share
# γ that matters most, prune the share α that adds most bias: bias falls, perplexity hardly moves. No other
# pruning score does both. The paper reports 8 – 39.5 % less gender bias, by model.
#
# **Method.** Every head is removed in turn on *validation* prompts, and scored by what that does to bias and
# to perplexity. γ is chosen there. FASP, other scores and random heads are compared on *test* prompts.
#
# **Bias.** A judge scores continuations from 0 to 1. Bias = Σ over groups of people of |mean score over all
# prompts − mean over the group's|. Noise alone makes it positive; a permutation null says how much.
#
# **Cost.** With the defaults (a small model with a planted truth): a minute on two CPU cores, 1 GB.
# `params/smollm2.yaml`: about 10 minutes on one core with AMX (several times as long without), 3 GB.
#
# > **Content warning.** Models continue prompts about social groups in offensive ways; see `show_texts`.

# %% tags=["parameters"]
model: str = "planted"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
axis: str = "invented_group"  # gender_and_sex, race_ethnicity, nationality, religion, sexual_orientation
prompts_source: str = "models/planted/prompts.csv"  # biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # toxicity, sentiment, a Hugging Face classifier, …
corpus_name: str = "corpora/generated"  # sotu, bold, wikitext-2, or a text file
rule: str = "corrected"  # corrected, or as_published: judging, windows, averages, ties as in the paper's code
fidelity: str = "exact"  # estimator of head scores: exact (removal), importance or gradient; see 07_speed
n_valid: int = 84  # prompts to score heads and to choose γ on, equally many per group; 0 takes all
n_test: int = 84  # prompts to report on; 0 takes all
n_base: int = 189  # validation prompts for the unpruned model alone: is there bias at all?; 0 takes all
score_seeds: list = [0, 1, 2]  # sampling seeds for the head scores
grid_seeds: list = [3]  # for the choice of γ; others than for the scores, lest it follows their noise
test_seeds: list = [0, 1, 2]  # for what is reported
max_new_tokens: int = 8  # length of a continuation (paper: 40)
top_k: int = 50  # sampling, as in the paper
temperature: float = 1.0
max_prompt_tokens: int = 22  # prompts are cut to this length, as in the paper
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
score_tokens: int = 2048  # tokens of validation text for z_ppl; 0 takes all
test_tokens: int = 2048  # tokens of test text for the reported perplexity; 0 takes all
gammas: list = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # shares of heads protected
alphas: list = [0.0, 0.07, 0.13, 0.19]  # shares of heads pruned (paper: 0, .02, …, .20)
max_ppl_ratio: float = 1.25  # perplexity limit for the choice of γ and for the verdict, × unpruned
smallest_change: float = 10.0  # % of the bias: a smaller reduction doesn't count as one
random_draws: int = 8  # random selections of each kind, averaged
n_boot: int = 1000  # bootstrap samples
show_texts: bool = False  # continuations in the notebook: unfiltered, offensive in parts
save_pruned: str = ""  # new folder for FASP's pruned model at the largest α; "" saves none
batch_rows: int = 256  # sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch for perplexity
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from IPython.display import Markdown, display

from biasprune import figures
from biasprune.core.data import choose
from biasprune.core.masks import Pruning, export
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import verdict
from biasprune.measures import judges, prompts
from biasprune.measures.prose import corpus, prose
from biasprune.measures.toxicity import toxicity
from biasprune.methods import heads, select
from biasprune.methods.judge import read

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %%
run = start("01_fasp_heads", globals())
choose(fidelity, ("exact", "importance", "gradient"), "fidelity")
if save_pruned and Path(save_pruned).exists():
    raise FileExistsError(f"save_pruned: {save_pruned} is there already; give a new folder.")
net = load(model, revision=revision or None, dtype=dtype, device=device)
n_heads, alphas = net.anatomy.n_flat, sorted({0.0, *alphas})  # α = 0 is the unpruned model
if int(alphas[-1] * n_heads) == 0:
    raise ValueError(f"alphas: {alphas[-1]} of {n_heads} heads is less than one head; give a larger α.")
judge = judges.load(judge_name, device=str(net.device))
tables = {split: prompts.load(axis, split, prompts_source) for split in ("valid", "test")}
texts = {split: corpus(corpus_name, split) for split in ("valid", "test")}
hashed = {f"{s} prompts": tables[s] for s in tables} | {f"{s} prose": texts[s] for s in texts}
run.inputs(lm=net, **hashed)

# %% [markdown]
# ## 1 Is there bias?
# Prompts are drawn equally per group, and weighted by its share of the axis. Two permutation nulls say what
# bias no difference between groups would give. Labels shuffled among *prompts*: does the model treat these
# prompts differently? Among *descriptors*, where groups have several: would other words for the groups show
# it, too? `floor` is the null's mean; the larger sample is of the unpruned model alone. Then the judge's mean
# scores: differences between *prompts*, which the paper judges too, are the judge's own bias.


# %%
def measures(split: str, n: int, seeds: list, tokens: int, rule: str = rule) -> dict:
    drawn = prompts.sample(tables[split], n or len(tables[split]), seed=0)
    how = {"seeds": seeds, "max_new_tokens": max_new_tokens, "top_k": top_k, "temperature": temperature}
    how |= {"max_prompt_tokens": max_prompt_tokens or None, "batch_rows": batch_rows}
    cut = {"length": window or None, "max_tokens": tokens or None}
    ppl = prose(net, texts[split], rule=rule, batch_tokens=batch_tokens, **cut)
    return {"bias": toxicity(drawn, judge, rule=rule, batch_tokens=batch_tokens, **how), "perplexity": ppl}


valid = measures("valid", n_valid, score_seeds, score_tokens)
bias, ppl = valid.values()
more = measures("valid", n_base, [0], score_tokens)["bias"]
larger = run.frame("unpruned_large", lambda: more.read(net, [Pruning()], progress="unpruned"))
unpruned = run.frame("unpruned", lambda: bias.read(net, [Pruning()]))
detection = [more.detect(larger).assign(prompts="larger"), bias.detect(unpruned).assign(prompts="valid")]
caption = "Unpruned model: measured bias, and what no difference between the groups would give"
display(pd.concat(detection).style.hide(axis="index").format(precision=3).set_caption(caption))
by_item = unpruned.groupby("item")["value"].mean()[bias.items["item"]].to_numpy()
by_group = bias.items[["group"]].assign(prompt=judge(bias.items["prompt"].tolist()), continuation=by_item)
by_group.groupby("group").mean().T.style.format(precision=3)

# %% [markdown]
# **As published against corrected.** The paper's code judges prompt and continuation together, averages the
# biases of single seeds, and starts perplexity windows every 512 tokens whatever their length. The same
# continuations and the same prose, measured both ways:

# %%
rules = []
for name in ("as_published", "corrected"):
    rule_bias, rule_ppl = measures("valid", n_valid, score_seeds, score_tokens, name).values()
    again = unpruned.assign(value=rule_bias.judged(net, unpruned))
    means = {"mean_score": again["value"].mean(), "above_half": (again["value"] > 0.5).mean()}
    loss = rule_ppl.readings(rule_ppl.read(net, [Pruning()])).bias()[0]
    rules.append({"rule": name, "bias": rule_bias.readings(again).bias()[0], **means, "ppl": loss})
    rules[-1]["tokens"] = rule_ppl.cut.counts.sum()
run.frame("rules", lambda: pd.DataFrame(rules)).style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 2 Score every head
# z_bias = bias − bias without the head; z_ppl = perplexity without it − perplexity. All heads see the same
# sampling noise (common random numbers), so most texts stay as they are. By `importance` no text is written
# anew: the unpruned model's are weighed by how likely they are without the head, and `ess` is the share of
# the sample that this leaves. `gradient` is the first-order effect. Layers are stored one by one: a killed
# run goes on. Heads within two standard errors (bars) of zero can't be told from heads without effect.


# %%
def removed(single: list[Pruning]) -> pd.DataFrame:
    if fidelity == "exact":
        return read(net, single, valid).drop(columns=["text", "tokens"])
    weighed = bias.weighed(net, single, unpruned).drop(columns="text").assign(judged_by="bias")
    return pd.concat([weighed, ppl.read(net, single).assign(judged_by="perplexity")])


if fidelity == "gradient":
    effects = bias.first_order(net, whole=unpruned), ppl.first_order(net)
else:
    jobs = {f"layer {i}": partial(removed, heads.single_heads(net, [i])) for i in range(net.anatomy.n_layers)}
    frame = run.pieces("heads_removed", {"unpruned": partial(removed, [Pruning()]), **jobs})
    effects = [m.readings(frame[frame["judged_by"] == name].dropna(axis=1)) for name, m in valid.items()]
scores = heads.head_scores(net, *effects, n_boot=n_boot).assign(axis=axis, fidelity=fidelity)
if fidelity == "importance":
    scores["ess"] = scores["flat"].astype(str).map(frame.groupby("pruning")["ess"].max())
scores = run.frame("head_scores", lambda: scores)
ends = {"xerr": "z_bias_se", "yerr": "z_ppl_se", "xlabel": "z_bias", "ylabel": "z_ppl"}
run.figure(figures.scatter(scores, "z_bias", "z_ppl", **ends), "head_scores")

# %% [markdown]
# **By hand.** FASP protects the heads without which perplexity is highest; of the others it prunes those
# without which bias is lowest. `select.fasp` is the same, with the paper's rounding and ties as an option. A
# head is removed by zeroing its slice of the *input* of the attention output projection; nothing inside
# attention is touched. Here for the head with the highest z_ppl:

# %%
gamma, alpha = gammas[0], min(alphas[-1], 1 - gammas[0])
by_harm = scores.sort_values(["ppl_without", "flat"])
protected = by_harm["flat"].tail(int(gamma * n_heads))
candidates = scores[~scores["flat"].isin(protected)]
pruned = candidates.sort_values(["bias_without", "flat"])["flat"].head(int(alpha * n_heads))
fasp = partial(select.fasp, scores["bias_without"], scores["ppl_without"])
assert sorted(pruned) == fasp(gamma=gamma, alpha=alpha)
display(Markdown(f"γ = {gamma}, α = {alpha}: protects heads {sorted(protected)}, prunes {sorted(pruned)}."))

# %%
a, worst = net.anatomy, by_harm.iloc[-1]
kept = torch.ones(a.n_heads, a.head_dim, dtype=net.dtype, device=net.device)
kept[worst["head"]] = 0
out_proj = net.model.get_submodule(a.out_projs[worst["layer"]])
hook = out_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * kept.flatten(), *inputs[1:]))
by_hand = ppl.readings(ppl.read(net, [Pruning()])).bias()[0]
hook.remove()
if fidelity != "gradient":  # a first-order effect is another number
    assert np.isclose(by_hand, worst["ppl_without"], rtol=1e-4 if net.dtype == torch.float32 else 0.05)
Markdown(f"Head {worst['flat']}: z_ppl {by_hand - worst['ppl']:.4f} by hand, {worst['z_ppl']:.4f} above.")

# %% [markdown]
# ## 3 Choose γ on validation prompts
# FASP over γ × α (the paper's experiment 2), with fresh sampling seeds. Of the γ whose perplexity never
# exceeds the limit, the one with the lowest mean bias over α is taken. (The paper's criterion isn't public.)


# %%
def tried(name: str, rows: list[tuple], measures: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    chosen = pd.DataFrame(rows, columns=["method", "gamma", "alpha", "draw", "pruning"])
    chosen["pruning"] = [str(Pruning(frozenset(flat))) for flat in chosen["pruning"]]
    parts = chosen.drop_duplicates("pruning").groupby("alpha")["pruning"]
    jobs = {f"α = {a}": partial(read, net, [Pruning.parse(p) for p in ps], measures) for a, ps in parts}
    return chosen, run.pieces(name, jobs)


fasp = partial(fasp, rule=rule)
pairs = [(g, a) for g in gammas for a in alphas if a <= 1 - g + 1e-9]
fresh = measures("valid", n_valid, grid_seeds, score_tokens)
grid = tried("gamma_grid", [("FASP", g, a, 0, fasp(gamma=g, alpha=a)) for g, a in pairs], fresh)
grid = run.frame("gamma_alpha", lambda: heads.compare(*grid, fresh, n_boot=n_boot)[0]).query("pruned > 0")
per_gamma = grid.groupby("gamma").agg(bias=("bias", "mean"), worst=("ppl_ratio", "max"))
allowed = per_gamma[per_gamma["worst"] <= max_ppl_ratio]
gamma = float(allowed["bias"].idxmin() if len(allowed) else per_gamma["worst"].idxmin())
both = grid["change"].map("{:+.0f} %".format) + grid["ppl_ratio"].map("\n× {:.2f}".format)
label = f"change of bias in %, and below it perplexity; bold: γ = {gamma}, chosen"
style = {"text": "both", "bold": "chosen", "limit": grid["change"].abs().max(), "label": label}
grid = grid.assign(both=both, chosen=grid["gamma"] == gamma)
run.figure(figures.heat_map(grid, "gamma", "alpha", "change", **style), "gamma_alpha")

# %% [markdown]
# ## 4 FASP against every other score, on test prompts
# *Bias only* prunes the highest z_bias (FASP with γ = 0), *perplexity only* the lowest z_ppl, *magnitude* the
# smallest q, k, v and output weights, *mask gradient* the smallest gradient of the loss by the head's mask.
# *Random* draws from all heads, as in the paper. FASP never picks heads that matter for language modelling,
# so that is no fair control; *random, matched* draws from the heads that FASP may pick. Intervals draw
# prompts (for perplexity, windows) and, of random heads, draws. A model that writes no sense can look
# unbiased: see `distinct` and `empty`.

# %%
baselines = {"magnitude": heads.magnitude(net), "mask gradient": heads.mask_gradient(net, ppl)}
baselines = run.frame("baseline_scores", lambda: pd.DataFrame(baselines))
others = {"bias only": scores["bias_without"], "perplexity only": scores["ppl_without"], **baselines}
free, rows = by_harm["flat"].head(n_heads - int(gamma * n_heads)), []
for a in alphas:
    rows.append(("FASP", gamma, a, 0, fasp(gamma=gamma, alpha=a)))
    matched = [select.random(free, len(rows[-1][-1]), seed=draw) for draw in range(random_draws)]
    anywhere = [select.random(range(n_heads), int(a * n_heads), seed=draw) for draw in range(random_draws)]
    rows += [(m, 0.0, a, 0, select.lowest(score, alpha=a, rule=rule)) for m, score in others.items()]
    rows += [("random", 0.0, a, draw, flat) for draw, flat in enumerate(anywhere)]
    rows += [("random, matched", gamma, a, draw, flat) for draw, flat in enumerate(matched)]
test = measures("test", n_test, test_seeds, test_tokens)
chosen, judged = tried("test", rows, test)
run.frame("selections", lambda: chosen)
comparison = run.frame("comparison", lambda: heads.compare(chosen, judged, test, n_boot=n_boot)[0])
written = judged[judged["judged_by"] == "bias"]
detection.append(test["bias"].detect(written[written["pruning"] == ""]).assign(prompts="test"))
detection = run.frame("detection", lambda: pd.concat(detection, ignore_index=True))
display(detection.style.hide(axis="index").format(precision=3).set_caption(caption))
ends = {"xlabel": "share of heads pruned, α", "ylabel": "change of bias, %", "reference": 0.0}
run.figure(figures.lines(comparison, "alpha", "change", "method", **ends), "change_against_alpha")
comparison.query("alpha == @alphas[-1]").style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 5 Where the heads sit, and what their removal changes
# z_bias, and what FASP does at the largest α. Then the test prompts whose score changes most, in either
# direction; `-p show_texts True` shows the texts: unfiltered model output, offensive in parts.

# %%
best = chosen.query("method == 'FASP'")["pruning"].iloc[-1]
states = {**dict.fromkeys(free, ""), **dict.fromkeys(Pruning.parse(best).heads, "pruned")}
placed = scores.assign(state=scores["flat"].map(states).fillna("kept"))
style = {"text": "state", "limit": scores["z_bias"].abs().max(), "label": "z_bias; kept: protected"}
run.figure(figures.heat_map(placed, "layer", "head", "z_bias", **style), "head_map")
pair = written[(written["seed"] == test_seeds[0]) & written["pruning"].isin(["", best])]
wide = pair.pivot(index="item", columns="pruning", values=["text", "value"])
wide.columns = [f"{what} {'after' if pruning else 'before'}" for what, pruning in wide.columns]
wide = test["bias"].items.set_index("item")[["group", "prompt"]].join(wide).reset_index(drop=True)
order = (wide["value after"] - wide["value before"]).astype(float).sort_values(kind="stable").index
hidden = [] if show_texts else ["prompt", "text before", "text after"]
wide.loc[[*order[:3], *order[-3:]]].drop(columns=hidden).style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 6 Verdict
# Mean change over all α that prune, and `more`, its difference to random heads: whatever makes a model write
# less lowers a sum of absolute differences. A method *passes* if both intervals lie below zero and that of
# perplexity within the limit at every α. It *fails* if an interval excludes a reduction of `smallest_change`
# %, or perplexity within the limit. The claim has two halves: FASP passes, no other score does.


# %%
def outcome(row: pd.Series) -> str:
    passes = max(row["change_high"], row["more_high"]) < 0 and row["worst_high"] <= max_ppl_ratio
    fails = max(row["change_low"], row["more_low"]) > -smallest_change or row["worst_low"] > max_ppl_ratio
    return verdict(reproduced=passes and not fails, refuted=fails, biased=p_value < 0.05)


nulls = detection[detection["prompts"] == "test"].set_index("shuffled")["p"]
p_value = nulls["prompts"]
effects, changes = heads.compare(chosen.query("pruning != ''"), judged, test, ["method"], n_boot=n_boot)
controls = {"FASP": "random, matched", "random, matched": "random, matched"}
more = [changes[m,] - changes[controls.get(m, "random"),] for m in effects["method"]]
effects = effects.join(pd.DataFrame([difference.row("more") for difference in more]))
worst = comparison.groupby("method")[["ppl_ratio", "ppl_ratio_low", "ppl_ratio_high"]].max()
effects = effects.join(worst.set_axis(["worst", "worst_low", "worst_high"], axis=1), on="method")
effects["verdict"] = effects.apply(outcome, axis=1)
effects = run.frame("effects", lambda: effects.assign(control=effects["method"].str.startswith("random")))
ends = {"low": "change_low", "high": "change_high", "hollow": "control"}
label = "change of bias in %, mean over α"
run.figure(figures.intervals(effects, "change", "method", xlabel=label, **ends), "effects")

# %%
row, rivals = effects.set_index("method").loc["FASP"], effects[effects["method"].isin(others)]
passing = rivals["method"][rivals["verdict"] == "reproduced"].tolist()
alone = {"reproduced": (rivals["verdict"] == "not reproduced").all(), "refuted": len(passing) > 0}
why = "against random heads {more:+.0f} points ({more_low:+.0f} to {more_high:+.0f}), ".format(**row)
why += f"perplexity × {row['worst']:.2f} at most, bias of the unpruned model "
why += ", ".join(f"p = {p:.3f} ({shuffled} shuffled)" for shuffled, p in nulls.items())
verdicts = pd.DataFrame({"id": "F1", "case": ["FASP", "other scores"], "ours": [row["change"], len(passing)]})
verdicts["claim"] = ["FASP reduces bias while perplexity stays low", "no other pruning score does so"]
verdicts["low"], verdicts["high"] = ([row[f"change_{end}"], np.nan] for end in ("low", "high"))
verdicts["what"] = [f"{label}, on test prompts; 95 % over prompts", f"scores of {len(rivals)} that do so"]
verdicts["verdict"] = [row["verdict"], verdict(**alone, biased=p_value < 0.05)]
verdicts["why"] = [why, ", ".join(passing) or "none"]
sentence = "FASP changes bias by {change:+.0f} % ({change_low:+.0f} to {change_high:+.0f}, {why}): {verdict}."
sentence = f"{model}, axis {axis}: {sentence.format(**row, why=why)} Others that do: {verdicts['why'][1]}."
Markdown(sentence)

# %% tags=["truth"]
truth_file = Path(net.folder or ".") / "truth.json"
if truth_file.is_file():  # the planted model: the truth is known, so the method must find it
    truth = json.loads(truth_file.read_text())
    planted = truth["layer"] * net.anatomy.n_heads + truth["head"]
    assert scores["z_bias"].idxmax() == planted and planted in Pruning.parse(best).heads
    assert row["verdict"] == "reproduced", "removing it must reduce bias"

# %%
if save_pruned:
    export(net, Pruning.parse(best), save_pruned)
shown = {"detection": caption, "effects": f"{label}, γ = {gamma}; more: than random heads, in points"}
drawn = {"effects": label, "change_against_alpha": "Change of bias by share of heads pruned"}
run.finish(sentence, verdicts=verdicts, gamma=gamma, tables=shown, figures=drawn)
