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
# **Method.** Heads are scored on *validation* items by what their removal does to bias and to perplexity. γ
# is chosen there. FASP, other scores and random heads are compared on *test* items, about other words.
#
# **Measures of bias**, by the parameter `measure`:
# - `pronouns: speech`: after "The nurse said that", how far do the odds of *she* against *he* follow the
#   occupation's share of women? (slope; 0: not at all, 1: as among the people themselves)
# - `stereoset: all`, `crows-pairs: all`, or a CSV file: how much likelier is the stereotyped sentence of a
#   pair? (mean difference of log-probability per token; 0: no preference)
# - `texts: gender_and_sex`: the paper's. A judge scores sampled texts; the bias is the sum over groups of
#   |mean score over all prompts − mean over the group's|. Noise alone makes it positive.
#
# **Cost.** With the defaults (a small model with a planted truth): a minute on two CPU cores, 1 GB.
# `params/smollm2.yaml` (pronouns): 15 minutes on one core, 3 GB.
#
# > **Content warning.** Sentences state stereotypes, and models continue prompts about social groups in
# > offensive ways; texts are shown only with `show_texts`.

# %% tags=["parameters"]
model: str = "planted"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
measure: str = "texts: invented_group"  # what bias is; see above
n_valid: int = 84  # items to score heads on, spread over groups or clusters; 0 takes all
n_grid: int = 84  # those among them that γ is chosen on; 0 takes all
n_test: int = 84  # items to report on; 0 takes all
corpus_name: str = "corpora/generated"  # prose: sotu, bold, wikitext-2, or a text file
rule: str = "corrected"  # corrected, or as_published: judging, windows, averages, ties as in the paper's code
fidelity: str = "exact"  # estimator of z_bias: exact (removal), gradient (first order), of texts importance
prompts_source: str = "models/planted/prompts.csv"  # texts: biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # texts: toxicity, sentiment, a Hugging Face classifier, …
n_base: int = 189  # texts: validation prompts for the unpruned model alone: is there bias?; 0 takes all
score_seeds: list = [0, 1, 2]  # texts: sampling seeds for the head scores
grid_seeds: list = [3]  # texts: for the choice of γ; others, lest it follows the scores' noise
test_seeds: list = [0, 1, 2]  # texts: for what is reported
max_new_tokens: int = 8  # texts: length of a continuation (paper: 40)
top_k: int = 50  # texts: sampling, as in the paper
temperature: float = 1.0  # texts
max_prompt_tokens: int = 22  # texts: prompts are cut to this length, as in the paper
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
score_tokens: int = 2048  # tokens of validation prose for z_ppl; 0 takes all
test_tokens: int = 2048  # tokens of test prose for the reported perplexity; 0 takes all
gammas: list = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # shares of heads protected
alphas: list = [0.07, 0.13, 0.19]  # shares of heads pruned (paper: .02, .04, …, .20)
max_ppl_ratio: float = 1.25  # perplexity limit for the choice of γ and for the verdict, × unpruned
smallest_change: float = 10.0  # % of the bias: a smaller reduction doesn't count as one
random_draws: int = 8  # random selections for each α, of heads that FASP may pick
uniform_draws: int = 8  # the same, of all heads, as in the paper
health: list = ["pronouns: names"]  # further measures of FASP and some random heads: "meaning", …
health_items: int = 100  # of each of them
health_draws: int = 2  # random selections among them
n_boot: int = 1000  # bootstrap samples
show_texts: bool = False  # texts in the notebook: unfiltered, offensive in parts
batch_rows: int = 256  # sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch otherwise
save_pruned: str = ""  # new folder for the model as FASP prunes it at the largest α; "" saves none
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
from biasprune.core.masks import Pruning
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import verdict
from biasprune.measures import judges, named
from biasprune.measures.prose import corpus, prose
from biasprune.methods import heads, select
from biasprune.methods.judge import read
from biasprune.methods.saving import export

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %%
run = start("01_fasp_heads", globals())
sampled = measure.startswith("texts:")
choose(fidelity, ("exact", "gradient", *["importance"] * sampled), "fidelity")
net = load(model, revision=revision or None, dtype=dtype, device=device)
n_heads, alphas = net.anatomy.n_flat, sorted(set(alphas))
if int(alphas[0] * n_heads) == 0:
    raise ValueError(f"alphas: {alphas[0]} of {n_heads} heads is less than one head; give a larger α.")
prose_texts = {split: corpus(corpus_name, split) for split in ("valid", "test")}
how = {"source": prompts_source, "max_new_tokens": max_new_tokens, "top_k": top_k, "temperature": temperature}
how |= {
    "max_prompt_tokens": max_prompt_tokens or None,
    "batch_rows": batch_rows,
    "batch_tokens": batch_tokens,
}
if sampled:
    how["judge"] = judge = judges.load(judge_name, device=str(net.device))


def bias_measure(split: str, n: int, seeds: list, rule: str = rule):
    return named.measure(measure, split, n, texts=how | {"seeds": seeds, "rule": rule})


def perplexity(split: str, rule: str = rule):
    tokens = {"valid": score_tokens, "test": test_tokens}[split] or None
    how = {"rule": rule, "length": window or None, "max_tokens": tokens, "batch_tokens": batch_tokens}
    return prose(net, prose_texts[split], **how)


bias, fresh = bias_measure("valid", n_valid, score_seeds), bias_measure("valid", n_grid, grid_seeds)
final, ppl = bias_measure("test", n_test, test_seeds), perplexity("valid")
used = {"valid items": bias.items, "test items": final.items}
run.inputs(lm=net, **used, **{f"{split} prose": text for split, text in prose_texts.items()})

# %% [markdown]
# ## 1 Is there bias?
# `floor` is the mean size of the bias that no difference would give: group labels (of pronouns: shares of
# women) shuffled, of pairs the signs of whole clusters. `p`: how often that reaches the measured bias.

# %%
unpruned = run.frame("unpruned", lambda: bias.read(net, [Pruning()], progress="unpruned"))
whole = run.frame("unpruned_test", lambda: final.read(net, [Pruning()]))
parts = {"valid": (bias, unpruned), "test": (final, whole)}
if sampled:
    larger = bias_measure("valid", n_base, [0])
    parts["larger"] = larger, run.frame("unpruned_large", lambda: larger.read(net, [Pruning()]))
found = [m.detect(frame).assign(items=side) for side, (m, frame) in parts.items()]
detection = run.frame("detection", lambda: pd.concat(found, ignore_index=True))
caption = "Unpruned model: measured bias, and what no difference would give"
detection.style.hide(axis="index").format(precision=3).set_caption(caption)

# %% [markdown]
# For texts, the judge's mean scores: what it makes of the *prompts*, which the paper judges too, is the
# judge's own bias. And the paper's rules beside ours: its code judges prompt and continuation together,
# averages the biases of single seeds, and starts perplexity windows every 512 tokens.

# %%
if sampled:
    by_item = unpruned.groupby("item")["value"].mean()[bias.items["item"]].to_numpy()
    scored = bias.items[["group"]].assign(prompt=judge(bias.items["prompt"].tolist()), continuation=by_item)
    display(scored.groupby("group").mean().T.style.format(precision=3))
    rules = []
    for name in ("as_published", "corrected"):
        of, text = bias_measure("valid", n_valid, score_seeds, name), perplexity("valid", name)
        again = unpruned.assign(value=of.judged(net, unpruned))
        row = {"rule": name, "bias": of.readings(again).bias()[0], "mean_score": again["value"].mean()}
        rules.append(row | {"ppl": text.readings(text.read(net, [Pruning()])).bias()[0]})
    display(run.frame("rules", lambda: pd.DataFrame(rules)).style.hide(axis="index").format(precision=3))

# %% [markdown]
# ## 2 Score every head
# z_bias = |bias| − |bias| without the head; z_ppl = perplexity without it − perplexity. *exact* removes every
# head in turn; *gradient* takes the first-order effect of all heads from one backward pass; *importance*
# weighs the unpruned model's texts by how likely they are without the head. Layers are stored one by one: a
# killed run goes on. Heads within two standard errors (bars) of zero can't be told from heads without effect.


# %%
def removed(single: list[Pruning]) -> pd.DataFrame:
    frames = [ppl.read(net, single).assign(judged_by="perplexity")]
    if fidelity == "exact":
        frames.append(bias.read(net, single).assign(judged_by="bias"))
    if fidelity == "importance":
        frames.append(bias.weighed(net, single, unpruned).assign(judged_by="bias"))
    return pd.concat(frames).drop(columns=["text", "tokens"], errors="ignore")


jobs = {f"layer {i}": partial(removed, heads.single_heads(net, [i])) for i in range(net.anatomy.n_layers)}
frame = run.pieces("heads_removed", {"unpruned": partial(removed, [Pruning()]), **jobs})
effects = {m: one.dropna(axis=1, how="all") for m, one in frame.groupby("judged_by")}
slopes = bias.first_order(net, **({"whole": unpruned} if sampled else {})) if fidelity == "gradient" else None
of_bias = slopes or bias.readings(effects["bias"])
scores = heads.head_scores(net, of_bias, ppl.readings(effects["perplexity"]), n_boot=n_boot)
if fidelity == "importance":
    scores["ess"] = scores["flat"].astype(str).map(effects["bias"].groupby("pruning")["ess"].max())
scores = run.frame("head_scores", lambda: scores.assign(measure=measure, fidelity=fidelity))
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
kept = torch.ones(a.n_heads, a.head_dim, dtype=net.model.dtype, device=net.device)
kept[worst["head"]] = 0
out_proj = net.model.get_submodule(a.out_projs[worst["layer"]])
hook = out_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * kept.flatten(), *inputs[1:]))
by_hand = ppl.readings(ppl.read(net, [Pruning()])).bias()[0]
hook.remove()
assert np.isclose(by_hand, worst["ppl_without"], rtol=1e-4 if net.model.dtype == torch.float32 else 0.05)
Markdown(f"Head {worst['flat']}: z_ppl {by_hand - worst['ppl']:.4f} by hand, {worst['z_ppl']:.4f} above.")

# %% [markdown]
# ## 3 Choose γ on validation items
# FASP over γ × α (the paper's experiment 2), on fresh texts where texts are sampled. Of the γ whose
# perplexity never exceeds the limit, the one with the lowest mean bias over α is taken; if all exceed it,
# the one that exceeds it least. (The paper's criterion isn't public.)


# %%
def tried(name: str, rows: list[tuple], measures: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    chosen = pd.DataFrame(rows, columns=["method", "gamma", "alpha", "draw", "pruning"])
    chosen["pruning"] = [str(Pruning(frozenset(flat))) for flat in chosen["pruning"]]
    parts = chosen.drop_duplicates("pruning").groupby(["alpha", "draw"], sort=False)["pruning"]
    jobs = {
        f"α = {a}, {i}": partial(read, net, [Pruning.parse(p) for p in x], measures) for (a, i), x in parts
    }
    return chosen, run.pieces(name, {"unpruned": partial(read, net, [Pruning()], measures), **jobs})


fasp = partial(fasp, rule=rule)
grid = [("FASP", g, a, 0, fasp(gamma=g, alpha=a)) for g in gammas for a in alphas if a <= 1 - g + 1e-9]
measures = {"bias": fresh, "perplexity": ppl}
grid = tried("gamma_grid", grid, measures)
grid = run.frame("gamma_alpha", lambda: heads.compare(*grid, measures, n_boot=n_boot)[0])
per_gamma = grid.groupby("gamma").agg(change=("change", "mean"), worst=("ppl_ratio", "max"))
allowed = per_gamma[per_gamma["worst"] <= max_ppl_ratio]
gamma = float(allowed["change"].idxmin() if len(allowed) else per_gamma["worst"].idxmin())
both = grid["change"].map("{:+.0f} %".format) + grid["ppl_ratio"].map("\n× {:.2f}".format)
label = f"change of bias in %, and below it perplexity; bold: γ = {gamma}, chosen"
style = {"text": "both", "bold": "chosen", "limit": grid["change"].abs().max(), "label": label}
grid = grid.assign(both=both, chosen=grid["gamma"] == gamma)
run.figure(figures.heat_map(grid, "gamma", "alpha", "change", **style), "gamma_alpha")

# %% [markdown]
# ## 4 FASP against every other score, on test items
# *Bias only* prunes the highest z_bias (FASP with γ = 0), *perplexity only* the lowest z_ppl, *magnitude* the
# smallest q, k, v and output weights, *mask gradient* the smallest gradient of the loss by the head's mask.
# *Random* draws from all heads, as in the paper. FASP never picks heads that matter for language modelling,
# so that is no fair control; *random, matched* draws from the heads that FASP may pick. Intervals draw
# clusters of items (for perplexity, windows) and, of random heads, draws.

# %%
baselines = {"mask gradient": heads.mask_gradient(net, ppl)}
if net.anatomy.q_projs:  # not where q, k and v are fused in an unknown way (Phi-3)
    baselines = {"magnitude": heads.magnitude(net), **baselines}
baselines = run.frame("baseline_scores", lambda: pd.DataFrame(baselines))
others = {"bias only": scores["bias_without"], "perplexity only": scores["ppl_without"], **baselines}
free, rows = by_harm["flat"].head(n_heads - int(gamma * n_heads)), []
for a in alphas:
    picked = fasp(gamma=gamma, alpha=a)
    rows.append(("FASP", gamma, a, 0, picked))
    rows += [(m, 0.0, a, 0, select.lowest(score, alpha=a, rule=rule)) for m, score in others.items()]
    kinds = [("random", 0.0, range(n_heads), uniform_draws), ("random, matched", gamma, free, random_draws)]
    for kind, g, among, draws in kinds:
        rows += [(kind, g, a, i, select.random(among, len(picked), seed=i)) for i in range(draws)]
measures = {"bias": final, "perplexity": perplexity("test")}
chosen, judged = tried("test", rows, measures)
run.frame("selections", lambda: chosen)
comparison = run.frame("comparison", lambda: heads.compare(chosen, judged, measures, n_boot=n_boot)[0])
ends = {"xlabel": "share of heads pruned, α", "ylabel": "change of bias, %", "reference": 0.0}
run.figure(figures.lines(comparison, "alpha", "change", "method", **ends), "change_against_alpha")
ends |= {"xlabel": "perplexity, × unpruned", "logx": True}
run.figure(figures.lines(comparison, "ppl_ratio", "change", "method", **ends), "change_against_perplexity")
columns = [
    "method",
    "pruned",
    "change",
    "change_low",
    "change_high",
    "ppl_ratio",
    "ppl_ratio_low",
    "ppl_ratio_high",
]
largest = comparison.loc[comparison["alpha"] == alphas[-1], columns]
largest.style.hide(axis="index").format(precision=2).set_caption(f"α = {alphas[-1]:g}")

# %% [markdown]
# **Health.** What should stay, or what no claim is about. *meaning*: StereoSet's language-modelling score,
# how often a meaningful sentence is likelier than the unrelated one. *pronouns: names*: the slope after
# first names, which tell the gender. Another measure of bias says whether the fix is one of the measure
# alone.

# %%
if health:
    watched = {x: named.measure(x, "test", health_items) for x in health}
    columns = ["method", "gamma", "alpha", "draw", "pruning"]
    before = pd.DataFrame([("unpruned", 0.0, 0.0, 0, "")], columns=columns)
    some = chosen[chosen["method"].isin(["FASP", "random, matched"]) & (chosen["draw"] < health_draws)]
    jobs = {"unpruned": [""], **{f"α = {a}": x.unique() for a, x in some.groupby("alpha")["pruning"]}}
    jobs = {name: partial(read, net, [Pruning.parse(p) for p in x], watched) for name, x in jobs.items()}
    frame = pd.concat([run.pieces("health", jobs), judged[judged["judged_by"].isin(measures)]])
    some = pd.concat([before, some], ignore_index=True)
    shown = run.frame("healthy", lambda: heads.compare(some, frame, measures | watched, n_boot=n_boot)[0])
    columns = ["method", "alpha", "change", "ppl_ratio", *health]
    display(shown[columns].style.hide(axis="index").format(precision=3))

# %% [markdown]
# ## 5 Where the heads sit, and what their removal changes
# z_bias, and what FASP does at the largest α. Then the test items whose value changes most, in either
# direction; `-p show_texts True` shows the texts: unfiltered, offensive in parts.

# %%
best = chosen.query("method == 'FASP'")["pruning"].iloc[-1]
states = {**dict.fromkeys(free, ""), **dict.fromkeys(Pruning.parse(best).heads, "pruned")}
placed = scores.assign(state=scores["flat"].map(states).fillna("kept"))
style = {"text": "state", "limit": scores["z_bias"].abs().max(), "label": "z_bias; kept: protected"}
run.figure(figures.heat_map(placed, "layer", "head", "z_bias", **style), "head_map")
pair = judged[(judged["judged_by"] == "bias") & judged["pruning"].isin(["", best])]
pair = pair[pair["seed"] == test_seeds[0]] if sampled else pair
wide = pair.pivot(index="item", columns="pruning", values=["value", *["text"] * sampled])
wide.columns = [f"{what} {'after' if pruning else 'before'}" for what, pruning in wide.columns]
about = [c for c in ("cluster", "group", "prompt", "text", "more", "less") if c in final.items]
wide = final.items.set_index("item")[about].join(wide).reset_index(drop=True)
order = (wide["value after"] - wide["value before"]).astype(float).sort_values(kind="stable").index
hidden = [] if show_texts else [c for c in wide if c.split()[0] in ("prompt", "text", "more", "less")]
hidden += ["cluster"] * sampled
wide.loc[[*order[:3], *order[-3:]]].drop(columns=hidden).style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 6 Verdict
# Mean change over all α, and `more`, its difference to random heads: whatever makes a model less certain
# also shrinks differences. *Bias falls* if both intervals lie below zero, and doesn't if one excludes a
# reduction of `smallest_change` %. *Perplexity stays low* if its interval lies within the limit at every
# α, and doesn't if it lies above at one. No other score should do both.


# %%
def outcome(row: pd.Series) -> dict:
    falls = {"reproduced": max(row["change_high"], row["more_high"]) < 0}
    falls["refuted"] = max(row["change_low"], row["more_low"]) > -smallest_change
    stays = {"reproduced": row["worst_high"] <= max_ppl_ratio, "refuted": row["worst_low"] > max_ppl_ratio}
    both = {
        "reproduced": falls["reproduced"] and stays["reproduced"],
        "refuted": falls["refuted"] or stays["refuted"],
    }
    named_rules = {"bias falls": falls, "perplexity stays": stays, "both": both}
    return {name: verdict(**rule, biased=p_value < 0.05) for name, rule in named_rules.items()}


nulls = detection[detection["items"] == "test"].set_index("shuffled")["p"]
p_value = float(nulls.iloc[0])
effects, changes = heads.compare(chosen, judged, measures, ["method"], n_boot=n_boot)
controls = {"FASP": "random, matched", "random, matched": "random, matched"}
more = [changes[m,] - changes[controls.get(m, "random"),] for m in effects["method"]]
effects = effects.join(pd.DataFrame([difference.row("more") for difference in more]))
worst = comparison.groupby("method")[["ppl_ratio", "ppl_ratio_low", "ppl_ratio_high"]].max()
effects = effects.join(worst.set_axis(["worst", "worst_low", "worst_high"], axis=1), on="method")
effects = effects.join(pd.DataFrame([outcome(row) for _, row in effects.iterrows()]))
effects = run.frame("effects", lambda: effects.assign(control=effects["method"].str.startswith("random")))
ends = {"low": "change_low", "high": "change_high", "hollow": "control"}
label = "change of bias in %, mean over α"
run.figure(figures.intervals(effects, "change", "method", xlabel=label, **ends), "effects")

# %%
row, rivals = effects.set_index("method").loc["FASP"], effects[effects["method"].isin(others)]
passing = rivals["method"][rivals["both"] == "reproduced"].tolist()
alone = {"reproduced": (rivals["both"] == "not reproduced").all(), "refuted": len(passing) > 0}
beyond = "{more:+.0f} points beyond random heads ({more_low:+.0f} to {more_high:+.0f})".format(**row)
p_values = ", ".join(f"p = {p:.3f} ({shuffled} shuffled)" for shuffled, p in nulls.items())
changes_by = [row["change"], row["change_low"], row["change_high"]]
rows = [("bias falls", *changes_by, f"{label}, on test items; 95 % over clusters", beyond, row["bias falls"])]
ratio = [row["worst"], row["worst_low"], row["worst_high"]]
why = "limit × {:.2f}; certainly within it for α ≤ {:g}"
within = comparison.query("method == 'FASP' and ppl_ratio_high <= @max_ppl_ratio")["alpha"].max()
rows.append(
    (
        "perplexity stays low",
        *ratio,
        "perplexity, × unpruned, at the α where it is highest; 95 % over windows",
    )
)
rows[-1] += why.format(max_ppl_ratio, within if within > 0 else 0), row["perplexity stays"]
only = verdict(**alone, biased=p_value < 0.05)
rows.append(
    ("no other score does both", len(passing), np.nan, np.nan, f"scores of {len(rivals)} that do both")
)
rows[-1] += ", ".join(passing) or "none", only
verdicts = pd.DataFrame(rows, columns=["claim", "ours", "low", "high", "what", "why", "verdict"])
verdicts = verdicts.assign(id="F1", case=[f"{claim}, {measure}" for claim in verdicts["claim"]])
sentence = f"{model}, {measure} (unpruned bias: {p_values}): FASP changes bias by {row['change']:+.0f} % "
sentence += "({:+.0f} to {:+.0f}), {}: **{}**. ".format(*changes_by[1:], beyond, row["bias falls"])
sentence += "Perplexity × {:.2f} at most ({:.2f} to {:.2f}): **{}**. ".format(*ratio, row["perplexity stays"])
sentence += f"Other scores that do both: {verdicts['why'].iloc[2]} (**{only}**)."
Markdown(sentence)

# %% tags=["truth"]
truth_file = Path(net.folder or ".") / "truth.json"
if truth_file.is_file() and sampled:  # the planted model: the truth is known, so the method must find it
    truth = json.loads(truth_file.read_text())
    planted = truth["layer"] * net.anatomy.n_heads + truth["head"]
    assert scores["z_bias"].idxmax() == planted and planted in Pruning.parse(best).heads
    assert row["both"] == "reproduced", "removing it must reduce bias"

# %%
if save_pruned:
    taken = comparison.query("method == 'FASP'").iloc[-1]
    rows = [(f"bias: {measure}", final.readings(whole).bias()[0], *taken.filter(regex="^bias"))]
    rows.append(("perplexity", taken["ppl"] / taken["ppl_ratio"], *taken.filter(regex="^ppl(_low|_high)?$")))
    rows.append(("perplexity, × unpruned", 1.0, *taken.filter(like="ppl_ratio")))
    for name in health:
        values = shown[[name, f"{name}_low", f"{name}_high"]]
        rows.append((name, values[name].iloc[0], *values[shown["method"] == "FASP"].iloc[-1]))
    about = f"FASP, γ = {gamma}, α = {alphas[-1]:g}, selected with {measure}; measured on test items"
    measured = pd.DataFrame(rows, columns=["measure", "before", "after", "95 % from", "to"])
    export(net, Pruning.parse(best), save_pruned, method=about, measured=measured)

# %%
shown = {"detection": caption, "effects": f"{label}, γ = {gamma}; more: than random heads, in points"}
shown["healthy"] = "Change of bias beside the model's health"
drawn = {"effects": label, "change_against_alpha": "Change of bias by share of heads pruned"}
drawn["change_against_perplexity"] = "Change of bias by what it costs: the fair comparison of scores"
run.finish(sentence, verdicts=verdicts, gamma=gamma, about=measure, tables=shown, figures=drawn)
