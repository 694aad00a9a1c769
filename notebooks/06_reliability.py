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
# # How much can head scores be trusted?
#
# **Paper.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv 2312.15398):
# the scores of heads on which its selections rest, as the authors published them, and our own. **Claim.**
# Removing one head at a time says which heads add to bias, and the worst ones can then be pruned.
#
# **Cost.** With the defaults (a small model with a planted truth) two minutes on two CPU cores, 1 GB.
# `params/smollm2.yaml`: about 11 minutes on one core with AMX (several times as long without), 4 GB.
#
# > **Content warning.** Prompts name social groups. No text that a model wrote is shown here.

# %% tags=["parameters"]
model: str = "planted"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
axis: str = "invented_group"  # gender_and_sex, race_ethnicity, nationality, religion, sexual_orientation
prompts_source: str = "models/planted/prompts.csv"  # biasprune, holistic_bias, or a CSV file
judges: list = ["sentiment", "toxicity"]  # readers of what is written; the first is the main one
likelihood_frame: str = ""  # put after a prompt, to look at the next word; " They are" after whole sentences
corpus_name: str = "corpora/generated"  # sotu, bold, wikitext-2, or a text file
published_source: str = ""  # folder of the published scores; "" takes BIASPRUNE_PUBLISHED's
max_new_tokens: int = 8  # length of a continuation (paper: 40)
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
score_tokens: int = 1024  # tokens of validation text for z_ppl; 0 takes all
test_tokens: int = 1024  # tokens of test text for the reported perplexity; 0 takes all
cheap_fidelity: str = "importance"  # or gradient: effects of all heads from the unpruned model's texts
cheap_prompts: int = 0  # prompts for it; 0 takes all
exact_prompts: int = 84  # prompts for texts written without each head, with common and independent noise
exact_layers: int = 2  # layers whose heads are scored so, evenly spread; 0 takes all
trust_seeds: list = [0, 1]  # sampling seeds of sections 2 and 3
trust_counts: list = [28, 56, 112, 224, 448, 896, 1792]  # numbers of prompts to show the reliability at
wanted_reliability: float = 0.8  # how many prompts does it take?
gamma: float = 0.3  # share of heads protected for language modelling
joint_heads: int = 5  # heads with the highest z_bias whose pairs are removed together
joint_sizes: list = [3, 4, 5]  # growing sets of them
joint_prompts: int = 84  # validation prompts for that; 0 takes all
joint_seeds: list = [2, 3, 4, 5]  # sampling seeds
greedy_heads: int = 3  # heads removed one after the other, all scored again each time
greedy_prompts: int = 84  # prompts for each scoring
n_test: int = 0  # prompts to report on; 0 takes all
trust_test_seeds: list = [0, 1, 2]  # sampling seeds for what is reported
p_bias: float = 0.05  # there is bias if shuffled groups give as much with a lower probability
weak: float = 0.3  # other measures find other heads if all correlations certainly lie below this
additive: list = [0.8, 1.25]  # effects add up if joint ÷ sum certainly lies in this range
kept_share: float = 0.8  # a selection is as good on test prompts if this share of its advantage is left
batch_rows: int = 256  # sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch for importance and gradients
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display
from statsmodels.stats.multitest import multipletests

from biasprune import figures
from biasprune.core.data import choose
from biasprune.core.masks import Pruning, masked
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import mean, verdict
from biasprune.measures import choices, prompts, prose, reliability, toxicity
from biasprune.measures.judges import load as load_judge
from biasprune.methods import heads, judge, parts
from biasprune.papers import claims, published

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %%
run = start("06_reliability", globals())
choose(cheap_fidelity, ("importance", "gradient"), "cheap_fidelity")
known = published.scores(published_source)
net = load(model, revision=revision or None, dtype=dtype, device=device)
readers, main = {name: load_judge(name, device=str(net.device)) for name in judges}, judges[0]
sentences = {f"prompts, {s}": prompts.load(axis, s, prompts_source) for s in ("valid", "test")}
texts = {f"prose, {s}": prose.corpus(corpus_name, s) for s in ("valid", "test")}
run.inputs(lm=net, **sentences, **texts, **known)

# %% [markdown]
# ## 1 The published scores, read again
# The authors publish, for five models, the bias without each head, three seeds, about 10,000 prompts on the
# gender axis. Seeds: mean Spearman correlation between them; `mean_r`: reliability of their mean. Floor: what
# no difference between groups would give, with the published mean toxicity (95 % stay below `floor_95`).
# Curse: mean bias without heads that FASP picks on validation prompts (γ = .3, α = .2), and without all
# candidates; `left`: share of this advantage on test prompts. Regimes: two kinds of runs by mean toxicity;
# `explained`: share of the variance that the best cut explains (.64 for a normal distribution).

# %%
if known:
    sizes = {a: prompts.holistic_bias(a, "valid")["group"].value_counts().tolist() for a in prompts.AXES}
    of, floors = known.items(), published.noise_floors
    make = {"seeds": lambda: [pd.DataFrame([{"model": m, **published.seeds(t)}]) for m, t in of]}
    on = [(m, t, a) for m, t in of for a in t["axis"].unique()]
    make["floor"] = lambda: [floors(t, a, sizes[a]).assign(model=m, axis=a) for m, t, a in on]
    make["curse"] = lambda: [published.winners_curse(t).assign(model=m) for m, t in of]
    make["regimes"] = lambda: [pd.DataFrame([{"model": m, **published.regimes(t)}]) for m, t in of]
    authors = {x: run.frame(f"published_{x}", lambda f=f: pd.concat(f())) for x, f in make.items()}
    display(*(t.set_index("model").style.format(precision=2, na_rep="–") for t in authors.values()))
else:
    display(Markdown("The published scores aren't at hand (`published_source`, `BIASPRUNE_PUBLISHED`)."))

# %% [markdown]
# ## 2 Our own scores: how reliability grows with prompts
# Split half: correlation of head effects in two halves of the prompts, stepped up to all of them. Effects of
# all heads come from the unpruned model's texts; those of some from texts written without each head, with
# common random numbers, or independent noise as published. Lines with other heads don't compare. Reliability
# that *falls* with more prompts is a warning: without bias, a head that makes all texts vary more raises the
# noise everywhere.

# %%
sampling = {"max_new_tokens": max_new_tokens, "batch_rows": batch_rows, "batch_tokens": batch_tokens}
single, n_heads, depth = heads.single_heads(net), net.anatomy.n_flat, net.anatomy.n_layers
layers = np.unique(np.linspace(0, depth, 2 * (exact_layers or depth) + 1)[1::2].astype(int))
exact_heads, weighs = heads.single_heads(net, layers.tolist()), cheap_fidelity == "importance"


def asked(split, n, seeds, **options):
    table = sentences[f"prompts, {split}"]
    table = prompts.sample(table, n or len(table), seed=0)
    return toxicity.toxicity(table, readers[main], seeds=seeds, **sampling, **options)


def without_heads(one, names):  # readings without every head, of the same texts, by several judges
    whole = one.read(net, [Pruning()])
    frame = one.weighed(net, [Pruning(), *single], whole) if weighs else whole
    by = {name: frame.assign(value=readers[name](frame["text"].tolist())) for name in names}
    if weighs:
        return {name: one.readings(part) for name, part in by.items()}
    slopes = one.gradients(net, whole)
    return {name: one.first_order(net, whole=part, gradients=slopes) for name, part in by.items()}


def by_all_measures():
    every = {**without_heads(many, judges), "likelihood": likelihood.first_order(net)}
    return pd.concat([one.frame().assign(measure=name) for name, one in every.items()])


def read_by(name, prunings, by):  # measure → readings under these prunings
    frame = run.frame(name, lambda: judge.read(net, prunings, by)[["judged_by", "pruning", "item", "value"]])
    return {x: by[x].readings(part) for x, part in frame.groupby("judged_by", sort=False)}


many, few = asked("valid", cheap_prompts, trust_seeds), asked("valid", exact_prompts, trust_seeds)
likelihood = choices.tone(many.items, frame=likelihood_frame)
effects = run.frame("head_effects", by_all_measures).groupby("measure", sort=False)
reads = {name: many.readings(frame.dropna(axis="columns", how="all")) for name, frame in effects}
by = {"common": few, "independent": asked("valid", exact_prompts, trust_seeds, coupled=False)}
written = read_by("written", [Pruning(), *exact_heads], by)


def grown(name, one):
    rows = []
    for n in sorted({min(n, len(one.items)) for n in [*trust_counts, len(one.items)]}):
        kept = [one.items["item"].isin(prompts.sample(one.items, n, seed=i)["item"]) for i in range(10)]
        halves = [reliability.Halves({"": one.where(keep.to_numpy())}) for keep in kept]
        z = np.concatenate([x.z(10, np.random.default_rng(i))[:, 0] for i, x in enumerate(halves)])
        rows.append({"scores": f"{name}, {z.shape[-1]} heads", "prompts": n, **reliability.stepped_up(z)})
    return pd.DataFrame(rows)


lines = [(main, reads[main]), ("likelihood", reads["likelihood"])]
lines += [(main, reads[main][["", *map(str, exact_heads)]])]
lines += [(f"rewritten, {noise} noise", one) for noise, one in written.items()]
grows = run.frame("growth", lambda: pd.concat([grown(*line) for line in lines], ignore_index=True))
style = {"low": "low", "high": "high", "logx": True, "reference": wanted_reliability, "ylabel": "reliability"}
run.figure(figures.lines(grows, "prompts", "r", "scores", **style, xlabel="prompts"), "growth")
common, independent = ((x[:, :1] - x[:, 1:]).var(0, ddof=1) for x in [r.draws() for r in written.values()])
drawn = np.random.default_rng(0).integers(len(common), size=(1000, len(common)))
low, high = np.quantile(np.sqrt(independent[drawn].mean(1) / common[drawn].mean(1)), [0.025, 0.975])
noise = {"ratio": np.sqrt(independent.mean() / common.mean()), "low": low, "high": high}
run.frame(
    "noise", lambda: pd.DataFrame([{"heads": len(common), "prompts": len(few.items), **noise}])
).style.set_caption("Standard error of z_bias, independent noise ÷ common random numbers (95 % over heads)")

# %% [markdown]
# ## 3 Other measures: the same heads?
# The same texts read by other judges, and `likelihood`: how likely unkind words are right after the prompt,
# against kind ones. A measure is read where there is bias in the unpruned model (p) and its effects agree
# with themselves (r). `needed`: prompts for the wanted reliability, by Spearman and Brown's formula. Measures
# of the same texts share noise, so one in one half of the prompts is held against the other in the other
# half. `overlap`: share of one's top fifth of heads in the other's; `overlap_itself`: the ceiling.

# %%
rows = [{"measure": name, **one.detect(), **reliability.split_half(one)} for name, one in reads.items()]
by_measure = pd.DataFrame(rows).set_index("measure")
readable = (by_measure["p"] < p_bias) & (by_measure["low"] > 0)
odds = by_measure["r"] / (1 - by_measure["r"]) * (1 - wanted_reliability) / wanted_reliability
by_measure["needed"] = np.ceil(by_measure["n"] / odds).where(readable)
run.frame("reads", by_measure.reset_index)
display(by_measure.style.format(precision=3, na_rep="–"))
usable, n_top = {name: reads[name] for name in by_measure.index[readable]}, max(1, n_heads // 5)


def top_shares(z):  # (splits, measures, 2, heads) → (measures, measures)
    top = ((-z).argsort(-1).argsort(-1) < n_top).astype(float)
    shares = np.einsum("nah,nbh->ab", top[:, :, 0], top[:, :, 1]) / (n_top * len(z))
    return (shares + shares.T) / 2


def compared():
    table, (shares, reach) = reliability.correlations(usable), reliability.across_halves(usable, top_shares)
    i, j = (pd.Index(list(usable)).get_indexer(table[side]) for side in "ab")
    table["overlap"], table["overlap_itself"] = shares[i, j], (shares[i, i] + shares[j, j]) / 2
    table["overlap_low"] = (shares - reach)[i, j].clip(0)
    table["overlap_high"] = (shares + reach)[i, j].clip(max=1)
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table.assign(chance=n_top / n_heads, positive=table["p_holm"].lt(0.05) & table["low"].gt(0))


columns = ["a", "b", "disattenuated", "low", "high", "positive", "overlap", "overlap_itself"]
same = run.frame("measures", compared) if len(usable) > 1 else pd.DataFrame(columns=columns, dtype=float)
same.style.hide(axis="index").format(precision=2).set_caption("" if len(same) else "No two can be read.")

# %% [markdown]
# ## 4 Several heads at once: the sum of their effects?
# Pairs of the heads with the highest z_bias, and growing sets, removed together. `slope`: joint effect per
# sum of single effects (1: they add up), sums in one half of the prompts against joint effects in the other:
# on the same prompts a sum holds the unpruned model's noise once per head, which alone puts points of the
# figure below the diagonal. `effect`: of the largest set; without one there is nothing to add up.

# %%
prose_of = partial(prose.prose, net, length=window or None, batch_tokens=batch_tokens)
text = prose_of(texts["prose, valid"], max_tokens=score_tokens or None)
ppl = text.readings(text.read(net, [Pruning(), *single])) if weighs else text.first_order(net)
scores = run.frame("head_scores", lambda: heads.head_scores(net, reads[main], ppl))
order = scores.sort_values("z_bias", ascending=False, kind="stable")["flat"].tolist()
sets = [*combinations(order[:joint_heads], 2), *(order[:n] for n in joint_sizes if n > 2)]
sets = {str(parts.of_parts("heads", group)): list(map(str, group)) for group in sets}
alone = sorted({head for group in sets.values() for head in group}, key=int)
by = {f"{main}, texts": asked("valid", joint_prompts, joint_seeds), "likelihood": likelihood}
together = read_by("joint", [Pruning.parse(x) for x in ("", *alone, *sets)], by)
bias = {name: one.estimates() for name, one in together.items()}
z = {name: {x: e[""] - left for x, left in e.items()} for name, e in bias.items()}
members = np.array([[head in group for head in alone] for group in sets.values()], dtype=float)


def added(name, group):
    joint, summed = z[name][group], mean(z[name][head] for head in sets[group]) * len(sets[group])
    row = {"measure": name, "heads": group, "size": len(sets[group]), "predicted": summed.point}
    return {**row, "joint": joint.point, **(joint - summed).row("excess")}


def slope(halves):  # (splits, 1, 2, single heads and sets)
    joint, summed = halves[:, 0, :, len(alone) :], halves[:, 0, :, : len(alone)] @ members.T
    across = (summed[:, 0] * summed[:, 1]).mean()
    return (joint * summed[:, ::-1]).mean() / across if across > 0 else np.nan


def slope_of(name):
    ratio, reach = map(float, reliability.across_halves({"": together[name]}, slope))
    effect = z[name][max(sets, key=lambda x: len(sets[x]))].row("effect")
    ends = {"slope": ratio, "low": ratio - reach, "high": ratio + reach}
    return {"measure": name, **ends, **effect, **together[name].detect()}


both = run.frame("joint_sets", lambda: pd.DataFrame([added(name, group) for name in by for group in sets]))
style = {"panel": "measure", "identity": True, "xlabel": "sum of single effects", "ylabel": "joint effect"}
run.figure(figures.scatter(both, "predicted", "joint", **style), "additivity")
adds = run.frame("joint_slopes", lambda: pd.DataFrame(map(slope_of, by)))
adds.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 5 One shot, or all heads scored anew after each removal?
# FASP picks all heads by their single effects. Greedy removes the head with the highest z_bias, scores all
# again, and so on, the same heads protected. Both are judged on test prompts, in % of the unpruned bias.

# %%
protected = scores.sort_values(["ppl_without", "flat"])["flat"].tolist()[n_heads - int(gamma * n_heads) :]


def greedily():
    chosen, steps = [], []
    for step in range(greedy_heads):
        with masked(net, parts.of_parts("heads", chosen)):
            effect = without_heads(asked("valid", greedy_prompts, trust_seeds), [main])[main].z()
        effect[[*protected, *chosen]] = -np.inf  # these can't be picked
        steps.append(pd.DataFrame({"step": step, "flat": range(n_heads), "z_bias": effect}))
        chosen.append(int(effect.argmax()))
    return pd.concat(steps, ignore_index=True)


steps = run.frame("greedy", greedily)
first = steps[steps["step"] == 0].sort_values("z_bias", ascending=False, kind="stable")["flat"]
picked = steps.loc[steps.groupby("step")["z_bias"].idxmax(), "flat"]
ways = {"one shot": parts.of_parts("heads", first[:greedy_heads]), "greedy": parts.of_parts("heads", picked)}
by = {main: asked("test", n_test, trust_test_seeds)}
by["perplexity"] = prose_of(texts["prose, test"], max_tokens=test_tokens or None)
tested = read_by("test", [Pruning(), *ways.values()], by)
there, left = tested[main].detect(), {m: one.estimates() for m, one in tested.items()}
share = {(way, m): left[m][str(one)] / left[m][""] for way, one in ways.items() for m in by}
ppl = {way: share[way, "perplexity"].point for way in ways}
change = {way: (share[way, main] - 1.0) * 100 for way in ways}
gain = (change["greedy"] - change["one shot"]).row("gain")
contest = [{"method": x, "heads": str(ways[x]), **change[x].row("change"), "ppl_ratio": ppl[x]} for x in ways]
contest = run.frame("one_shot_or_greedy", lambda: pd.DataFrame(contest)).style.hide(axis="index")
contest.format(precision=2).set_caption(f"Unpruned bias {there['bias']:.3f} (p = {there['p']:.3f})")

# %% [markdown]
# ## 6 Verdict, and what follows for users
# Before you trust your own scores: look at their reliability and at the prompts `needed`; use a second
# measure; distrust a correlation without its ceiling, a bias without its floor, a selection judged on the
# prompts that it was made with, and a sum of single effects.


# %%
def conclude(claim, case, ends, good, bad, why, biased=True):
    word = verdict(biased=bool(biased), reproduced=bool(good), refuted=bool(bad))
    rows.append([claim, case, *ends, word, why])


rows, first, (least, most) = [], by_measure.loc[main], additive
enough = first["low"] >= wanted_reliability, first["high"] < wanted_reliability
why = f"{first['n']:.0f} prompts, wanted {wanted_reliability:g}"
conclude("F6", main, first[["r", "low", "high"]], *enough, why, first["p"] < p_bias)
pairs = same[(same["a"] == main) | (same["b"] == main)]
n, others = int(pairs["positive"].sum()), len(reads) - 1
ends = pairs["disattenuated"].mean(), pairs["low"].min(), pairs["high"].max()
enough = n == others, len(pairs) > 0 and pairs["high"].lt(weak).all()
why = f"{n} of {others} measures positive, {len(pairs)} readable"
conclude("F7", main, ends, *enough, why, by_measure["p"].lt(p_bias).sum() > 1)
clear = adds[(adds["p"] < p_bias) & (adds["effect_low"] > 0)]
ends = clear["slope"].mean(), clear["low"].min(), clear["high"].max()
good, bad = (clear["low"].gt(least) & clear["high"].lt(most), clear["low"].gt(most) | clear["high"].lt(least))
why = f"by {', '.join(clear['measure']) or 'none'}; adds up within {additive}"
conclude("F8", "", ends, good.all(), bad.any(), why, len(clear))
why = f"{greedy_heads} heads; perplexity × {ppl['greedy']:.2f} and × {ppl['one shot']:.2f}"
conclude("R3", "", gain.values(), gain["gain_high"] < 0, gain["gain_low"] > 0, why, there["p"] < p_bias)
conclude("R4", "", noise.values(), low > 1, high < 1, f"{len(common)} heads, {len(few.items)} prompts")
if known:
    agree, floors, curse, regimes = authors.values()
    enough = agree["mean_low"].gt(wanted_reliability).all(), agree["mean_high"].lt(wanted_reliability).all()
    why = f"reliability of the mean of seeds {agree['mean_r'].min():.2f} to {agree['mean_r'].max():.2f}"
    conclude("F4", "", agree["r"].agg(["mean", "min", "max"]), *enough, why)
    test = curse[curse["split"] == "test"]
    why = ", ".join(f"{t.model} {t.left:.2f}" for t in test.itertuples())
    ends = test["left"].mean(), test["low"].min(), test["high"].max()
    conclude("F5", "", ends, test["low"].gt(kept_share).all(), test["high"].lt(kept_share).all(), why)
    neo = regimes.set_index("model").loc["EleutherAI/gpt-neo-1.3B"]
    two, why = neo["explained"] > 0.95 and neo["r_bias"] < -0.9, f"explained {neo['explained']:.3f}"
    conclude("R1", "", [neo["r_bias"], np.nan, np.nan], two, not two, why)
    for t in floors[floors["axis"] == "religion"].itertuples():
        ends, above = [t.bias, t.floor, t.floor_95], t.bias > t.floor_95
        conclude("R2", t.model, ends, not above, above, f"{t.prompts} prompts")
verdicts = pd.DataFrame(rows, columns=["id", "case", "ours", "low", "high", "verdict", "why"])
verdicts = verdicts.join(claims.known().set_index("id")[["claim", "what"]], on="id")
texts = [f"{r.claim}: **{r.verdict}** ({r.why})." for r in verdicts.itertuples()]
sentence = f"{model}, {axis}. {' '.join(texts)}"
if model == "planted":
    place = pd.read_json(net.folder / "truth.json", typ="series")
    assert order[0] == place["layer"] * net.anatomy.n_heads + place["head"], "the planted head isn't first"
display(verdicts.drop(columns="what").style.hide(axis="index").format(precision=2, na_rep="–"))
tables = {"published_seeds": "Agreement of seeds", "published_floor": "Published bias and its floor"}
tables |= {"published_curse": "Selections on test prompts", "published_regimes": "Two kinds of runs"}
tables |= {"noise": "Independent noise ÷ common", "measures": "Do measures find the same heads?"}
tables |= {"reads": "Bias and reliability by measure", "joint_slopes": "Joint effect ÷ sum of single effects"}
tables |= {"one_shot_or_greedy": "One shot or greedy, on test prompts: change of bias in %"}
plots = {"growth": "Reliability against prompts", "additivity": "Joint effects against sums of single ones"}
run.finish(sentence, verdicts=verdicts, about=f"{axis}; {', '.join(reads)}", tables=tables, figures=plots)
