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
# # Can head scores be trusted?
#
# **Paper.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv 2312.15398),
# picks heads by their effect on one bias, measured once.
#
# **Questions.** What it takes for granted: that scores come out again with other seeds (F4) and other items
# (F6), that heads picked on validation prompts are as good on others (F5), that other measures would pick
# them, too (F7), that effects of single heads add up (F8). And what would be better: other ways of picking
# several heads (R3), common random numbers (R4), another kind of removal (R5).
#
# **Cost.** With the defaults (a small model with a planted truth) two minutes on two CPU cores, 1 GB.
# `params/smollm2.yaml`: 36 minutes on one core beside other work, 5 GB.
#
# > **Content warning.** Sentences state stereotypes, and models continue prompts about social groups in
# > offensive ways; none is shown here.

# %% tags=["parameters"]
model: str = "planted"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
trust_measures: list = [  # measures whose reliability is shown; see 01 and biasprune/measures/named.py
    "texts: invented_group",
    "texts by toxicity: invented_group",
    "tone: invented_group",
]
trust_items: int = 0  # items of each, of validation and test clusters; 0 takes all
trust_prompts: int = 0  # the same for texts and tone, which cost more; 0 takes all
trust_counts: list = [56, 112, 224, 448, 896, 1792]  # numbers of items to show the reliability at
same_bias: list = ["texts: invented_group", "tone: invented_group"]  # of one bias; the first is the main one
prompts_source: str = "models/planted/prompts.csv"  # texts: biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # texts: toxicity, sentiment, a Hugging Face classifier, …
likelihood_frame: str = ""  # tone: put after a prompt; " They are" after whole sentences
trust_seeds: list = [0, 1]  # texts: sampling seeds
max_new_tokens: int = 8  # texts: length of a continuation (paper: 40)
noise_axis: str = "invented_group"  # texts written with common and with independent noise; "" for none
noise_prompts: int = 84  # prompts for that
noise_layers: int = 2  # layers whose heads are removed for it, evenly spread
corpus_name: str = "corpora/generated"  # prose: sotu, bold, wikitext-2, or a text file
published_source: str = ""  # folder of the published scores; "" takes BIASPRUNE_PUBLISHED's
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
harm_tokens: int = 4096  # tokens of prose that say which heads matter for it; 0 takes all
test_tokens: int = 1024  # tokens of test prose for the reported perplexity; 0 takes all
wanted_reliability: float = 0.8  # how many items does it take?
gamma: float = 0.1  # share of heads protected for language modelling
joint_heads: int = 5  # heads with the highest z_bias whose pairs are removed together
joint_sizes: list = [3, 4, 5]  # growing sets of them
greedy_heads: int = 3  # heads picked in one shot, one after the other, and by annealing
annealing_steps: int = 60  # sets that simulated annealing tries
ablations: list = ["mean", "uniform"]  # other kinds of removal than zeroing; [] for none
p_bias: float = 0.05  # there is bias if the permutation null gives as much with a lower probability
weak: float = 0.3  # other measures find other heads if all correlations certainly lie below this
additive: list = [0.8, 1.25]  # effects add up if joint ÷ sum certainly lies in this range
kept_share: float = 0.8  # a selection is as good on test prompts if this share of its advantage is left
batch_rows: int = 256  # texts: sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch otherwise
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import time
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display
from statsmodels.stats.multitest import multipletests

from biasprune import figures
from biasprune.core import weights
from biasprune.core.masks import Pruning, ablating, masked
from biasprune.core.model import load, query_projections
from biasprune.core.run import start
from biasprune.core.stats import mean, verdict
from biasprune.measures import judges, named, pairs, prompts, prose, reliability
from biasprune.methods import heads, judge, parts, select
from biasprune.papers import claims, published

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# %%
run = start("06_reliability", globals())
known = published.scores(published_source)
net = load(model, revision=revision or None, dtype=dtype, device=device)
n_heads, single = net.anatomy.n_flat, heads.single_heads(net)
if "uniform" in ablations:
    query_projections(net)  # refused before hours of work where they aren't known
texts = {"source": prompts_source, "seeds": trust_seeds, "max_new_tokens": max_new_tokens}
texts |= {"batch_rows": batch_rows, "frame": likelihood_frame}
if noise_axis or any(x.startswith("texts:") for x in [*trust_measures, *same_bias]):
    texts["judge"] = judges.load(judge_name, device=str(net.device))


def measure(x: str, side: str):
    return named.measure(
        x, side, trust_prompts if x.startswith(("texts", "tone")) else trust_items, texts=texts
    )


whole = {x: measure(x, "all") for x in dict.fromkeys([*trust_measures, *same_bias])}
test = {x: measure(x, "test") for x in same_bias}
main, valid = same_bias[0], measure(same_bias[0], "valid")
corpora = {f"{split} prose": prose.corpus(corpus_name, split) for split in ("valid", "test")}
sides = {"all": whole, "valid": {main: valid}, "test": test}
used = {f"{x}, {side}": m.items for side, of in sides.items() for x, m in of.items()}
run.inputs(lm=net, **used, **corpora, **known)

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
# ## 2 Reliability is a property of the measure
# First-order effects of all heads on each measure. Split half: correlation of head effects in two halves of
# the items' clusters, stepped up to all of them; the line grows with the number of items. `seconds`: what
# the effects cost. `needed`: items for the wanted reliability, by Spearman and Brown's formula. Reliability
# without bias (p) is a warning: a head that makes all texts vary more raises the noise everywhere.


# %%
def without_heads(one, x: str) -> pd.DataFrame:  # to first order
    begin = time.time()
    frame = one.first_order(net).frame()
    return frame.assign(measure=x, seconds=time.time() - begin)


def grown(name: str, one, counts: list) -> pd.DataFrame:
    rows = []
    for n in counts:
        kept = [
            one.items["item"].isin(pairs.subset(one.items, n, seed=i)["item"]).to_numpy() for i in range(10)
        ]
        halves = [reliability.Halves({"": one.where(keep)}) for keep in kept]
        z = np.concatenate([x.z(10, (i,))[:, 0] for i, x in enumerate(halves)])
        rows.append({"measure": name, "items": n, **reliability.stepped_up(z)})
    return pd.DataFrame(rows)


frame = run.pieces("head_effects", {x: partial(without_heads, one, x) for x, one in whole.items()})
parts_of = dict(list(frame.groupby("measure", sort=False)))
reads = {x: whole[x].readings(part.dropna(axis=1)) for x, part in parts_of.items()}
table = [{"measure": x, **r.detect(cluster="cluster"), **reliability.split_half(r)} for x, r in reads.items()]
table = pd.DataFrame(table).assign(seconds=[part["seconds"].iloc[0] for part in parts_of.values()])
odds = table["r"] / (1 - table["r"]) * (1 - wanted_reliability) / wanted_reliability
table["needed"] = np.ceil(table["n"] / odds).where(odds > 0)
by_measure = run.frame("measures", lambda: table).set_index("measure")
counts = {x: [n for n in trust_counts if n < len(reads[x].items)] for x in trust_measures}
to_grow = {x: [*counts[x], len(reads[x].items)] for x in trust_measures}
grows = run.frame("growth", lambda: pd.concat([grown(x, reads[x], n) for x, n in to_grow.items()]))
style = {"low": "low", "high": "high", "logx": True, "reference": wanted_reliability, "ylabel": "reliability"}
run.figure(figures.lines(grows, "items", "r", "measure", **style, xlabel="items"), "growth")
by_measure.style.format(precision=3, na_rep="–")

# %% [markdown]
# Sampled texts can share their noise between heads (common random numbers) or not, as in the paper's loop:

# %%
noise = pd.DataFrame()
if noise_axis:
    count = np.linspace(0, net.anatomy.n_layers - 1, noise_layers).round().astype(int)
    some = [Pruning(), *heads.single_heads(net, sorted(set(count)))]
    asked = partial(named.measure, f"texts: {noise_axis}", "valid", noise_prompts)
    by = {kind: asked(texts=texts | {"coupled": kind == "common"}) for kind in ("common", "independent")}
    written = run.frame("noise_texts", lambda: judge.read(net, some, by).drop(columns=["text", "tokens"]))
    draws = [by[kind].readings(part).draws() for kind, part in written.groupby("judged_by", sort=False)]
    common, independent = ((x[:, :1] - x[:, 1:]).var(0, ddof=1) for x in draws)
    drawn = np.random.default_rng(0).integers(len(common), size=(1000, len(common)))
    low, high = np.quantile(np.sqrt(independent[drawn].mean(1) / common[drawn].mean(1)), [0.025, 0.975])
    noise = {"ratio": np.sqrt(independent.mean() / common.mean()), "low": low, "high": high}
    noise = pd.DataFrame([{"heads": len(common), "prompts": len(by["common"].items), **noise}])
noise = run.frame("noise", lambda: noise)
caption = "Standard error of z_bias, independent noise ÷ common random numbers (95 % over heads)"
noise.style.hide(axis="index").format(precision=2).set_caption(caption)

# %% [markdown]
# ## 3 Other measures of the same bias: the same heads?
# One measure in one half of the clusters against the other in the other half. `overlap`: share of one's top
# fifth of heads in the other's; `overlap_itself`: the ceiling.

# %%
same = by_measure.loc[same_bias]
usable = {x: reads[x] for x in same.index[(same["p"] < p_bias) & (same["low"] > 0)]}
n_top = max(1, n_heads // 5)


def top_shares(z):  # (splits, measures, 2, heads) → (measures, measures)
    top = ((-z).argsort(-1).argsort(-1) < n_top).astype(float)
    shares = np.einsum("nah,nbh->ab", top[:, :, 0], top[:, :, 1]) / (n_top * len(z))
    return (shares + shares.T) / 2


def compared() -> pd.DataFrame:
    table, (shares, reach) = reliability.correlations(usable), reliability.across_halves(usable, top_shares)
    i, j = (pd.Index(list(usable)).get_indexer(table[side]) for side in "ab")
    table["overlap"], table["overlap_itself"] = shares[i, j], (shares[i, i] + shares[j, j]) / 2
    table["overlap_low"], table["overlap_high"] = (
        (shares - reach)[i, j].clip(0),
        (shares + reach)[i, j].clip(max=1),
    )
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    return table.assign(chance=n_top / n_heads, positive=table["p_holm"].lt(0.05) & table["low"].gt(0))


columns = ["a", "b", "disattenuated", "low", "high", "positive", "overlap", "overlap_itself"]
agree = run.frame("agreement", compared) if len(usable) > 1 else pd.DataFrame(columns=columns, dtype=float)
agree.style.hide(axis="index").format(precision=2).set_caption("" if len(agree) else "No two can be read.")

# %% [markdown]
# ## 4 Held-out items, and several heads at once
# `left`: of the tenth of the heads with the highest z_bias on validation items, what share of their
# advantage over other heads that may be picked is left on test items (by removal; 95 % over clusters). Then
# the sum of effects: pairs of the heads with the highest z_bias, and growing sets, removed together.
# `slope`: joint effect per sum of single effects (1: they add up), sums in one half of the clusters against
# joint effects in the other: in the same items a sum holds the unpruned model's noise once per head.

# %%
n_picked = max(1, n_heads // 10)
cut = partial(prose.prose, net, length=window or None, batch_tokens=batch_tokens)
cut_valid = cut(corpora["valid prose"], max_tokens=harm_tokens or None).cut
harm = weights.part_snip(net, weights.prose(cut_valid), "heads").ravel()
harm = run.frame("harm", lambda: pd.DataFrame({"harm": harm}))["harm"].to_numpy()
free = np.argsort(harm, kind="stable")[: n_heads - int(gamma * n_heads)]
start_bias, z_main = (single_effects := valid.first_order(net)).bias()[0], single_effects.z()
order = [h for h in np.argsort(-z_main, kind="stable").tolist() if h in set(free)]
picks = order[:n_picked]
rest = select.random([h for h in free if h not in picks], 2 * n_picked, seed=0)


def advantage(one):
    frame = one.read(net, [Pruning(), *(Pruning(heads={h}) for h in [*picks, *rest])])
    left = {x: e.map(np.abs) for x, e in one.readings(frame).estimates().items()}
    return mean(left[str(h)] for h in rest) - mean(left[str(h)] for h in picks)


ahead, here = advantage(test[main]), advantage(valid).point
held_out = run.frame("held_out", lambda: pd.DataFrame([{"picked": n_picked, **(ahead / here).row("left")}]))
display(held_out.style.hide(axis="index").format(precision=2))
sets = [*combinations(order[:joint_heads], 2), *(order[:n] for n in joint_sizes if n > 2)]
sets = {str(parts.of_parts("heads", group)): list(map(str, group)) for group in sets}
alone = sorted({head for group in sets.values() for head in group}, key=int)
removed = [Pruning.parse(x) for x in ("", *alone, *sets)]
joint = run.frame("joint", lambda: valid.read(net, removed)[["pruning", "item", "value"]])
joint = valid.readings(joint)
bias = {x: e.map(np.abs) for x, e in joint.estimates().items()}
members = np.array([[head in group for head in alone] for group in sets.values()], dtype=float)


def added(group: str) -> dict:
    together, summed = bias[""] - bias[group], mean(bias[""] - bias[head] for head in sets[group])
    summed = summed * len(sets[group])
    row = {"heads": group, "size": len(sets[group]), "predicted": summed.point, "joint": together.point}
    return {**row, **(together - summed).row("excess")}


def slope(halves):  # (splits, 1, 2, single heads and sets)
    joint, summed = halves[:, 0, :, len(alone) :], halves[:, 0, :, : len(alone)] @ members.T
    across = (summed[:, 0] * summed[:, 1]).mean()
    return (joint * summed[:, ::-1]).mean() / across if across > 0 else np.nan


both = run.frame("joint_sets", lambda: pd.DataFrame(map(added, sets)))
style = {"identity": True, "xlabel": "sum of single effects", "ylabel": "joint effect"}
run.figure(figures.scatter(both, "predicted", "joint", **style), "additivity")
ratio, reach = map(float, reliability.across_halves({"": joint}, slope))
biggest = (bias[""] - bias[max(sets, key=lambda x: len(sets[x]))]).row("effect")
adds = {"measure": main, "slope": ratio, "low": ratio - reach, "high": ratio + reach, **biggest}
adds = run.frame("joint_slope", lambda: pd.DataFrame([adds]))
adds.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 5 One shot, one after the other, or a search?
# FASP picks all heads by their single effects. *Greedy* removes the head with the highest z_bias, scores all
# again, and so on. *Annealing* searches sets of the same size by removing them, a head swapped at a time, and
# takes worse sets with falling probability (as in *Attention Pruning*, arXiv 2503.15815). All pick on
# validation items among the heads that FASP doesn't protect, and are judged on test items.


# %%
def greedily() -> pd.DataFrame:
    chosen = []
    for _ in range(greedy_heads):
        with masked(net, parts.of_parts("heads", chosen)):
            left = np.abs(valid.first_order(net).bias())[1:]
        left[np.setdiff1d(range(n_heads), np.setdiff1d(free, chosen))] = np.inf
        chosen.append(int(left.argmin()))
    return pd.DataFrame({"flat": chosen})


def bias_left(chosen: set) -> float:
    one = valid.read(net, [parts.of_parts("heads", sorted(chosen))])
    return float(np.abs(valid.readings(one).bias()[0]))


def swapped(chosen: set) -> set:  # one head of the set for another that may be picked
    return {*rng.permutation(sorted(chosen))[1:].tolist(), int(rng.choice(np.setdiff1d(free, list(chosen))))}


def annealed() -> pd.DataFrame:
    now, steps = set(rng.choice(free, greedy_heads, replace=False).tolist()), []
    left = bias_left(now)
    for heat in 0.1 * abs(start_bias) * np.linspace(1, 0, annealing_steps, endpoint=False):
        other = swapped(now)
        if (new := bias_left(other)) < left or rng.random() < np.exp((left - new) / heat):
            now, left = other, new
        steps.append({"heads": " ".join(map(str, sorted(now))), "bias": left})
    return pd.DataFrame(steps)


rng = np.random.default_rng(0)
picked = run.frame("greedy", greedily)["flat"]
steps = run.frame("annealing", annealed)
ways = {"one shot": parts.of_parts("heads", order[:greedy_heads]), "greedy": parts.of_parts("heads", picked)}
ways["annealing"] = Pruning.parse(steps.loc[steps["bias"].idxmin(), "heads"])
by = {x: test[x] for x in same_bias} | {
    "perplexity": cut(corpora["test prose"], max_tokens=test_tokens or None)
}
tested = run.frame(
    "test",
    lambda: judge.read(net, [Pruning(), *ways.values()], by)[["judged_by", "pruning", "item", "value"]],
)
tested = {x: by[x].readings(part) for x, part in tested.groupby("judged_by", sort=False)}
there, left = tested[main].detect(cluster="cluster"), {x: r.estimates() for x, r in tested.items()}
sizes = {x: {p: e.map(np.abs) for p, e in of.items()} for x, of in left.items()}
ppl = {w: (sizes["perplexity"][str(p)] / sizes["perplexity"][""]).point for w, p in ways.items()}
change = {  # in % of the measured bias
    (w, x): (sizes[x][str(p)] - sizes[x][""]) * (100 / sizes[x][""].point)
    for w, p in ways.items()
    for x in same_bias
}
contest = [
    {"method": w, "judged_by": x, **c.row("change"), "ppl_ratio": ppl[w]} for (w, x), c in change.items()
]
contest = run.frame("one_shot_or_search", lambda: pd.DataFrame(contest))
gain = (change["greedy", main] - change["one shot", main]).row("gain")
caption = f"Change of bias on test items, %; unpruned bias {there['bias']:.3f} (p = {there['p']:.3f})"
contest.style.hide(axis="index").format(precision=2).set_caption(caption)

# %% [markdown]
# ## 6 Does it matter how a head is removed?
# FASP zeroes what a head puts out. Others replace it by its mean over prose, or make its attention uniform.
# Every head is removed in each way; `r`: Spearman correlation of z_bias with zeroing; `overlap`: share of the
# heads that FASP picks which it would also pick by zeroing.


# %%
def by_ablation(how: str) -> pd.DataFrame:
    other = ablating(net, how, cut_valid.ids[: len(cut_valid.ids) - 1])
    frame = valid.read(other, [Pruning(), *single], progress=how)
    return frame[["pruning", "item", "value"]].assign(ablation=how)


kinds, picks = pd.DataFrame(columns=["ablation", "r", "overlap", "chance"], dtype=float), {}
if ablations:
    frame = run.pieces("ablations", {how: partial(by_ablation, how) for how in ("zero", *ablations)})
    of = {how: np.abs(valid.readings(part).bias())[1:] for how, part in frame.groupby("ablation", sort=False)}
    picks = {how: set(select.fasp(left, harm, gamma=gamma, alpha=0.1)) for how, left in of.items()}
    rows = [{"ablation": how, "r": float(reliability.correlation(of[how], of["zero"]))} for how in ablations]
    kinds = pd.DataFrame(rows).assign(chance=len(picks["zero"]) / len(free))
    kinds["overlap"] = [len(picks[how] & picks["zero"]) / len(picks["zero"]) for how in ablations]
kinds = run.frame("ablation", lambda: kinds)
kinds.style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 7 Verdict, and what follows for users
# Before you trust your own scores: look at their reliability and at the items `needed`; use a second
# measure; distrust a correlation without its ceiling, a bias without its floor, a selection judged on the
# items that it was made with, and a sum of single effects.


# %%
def conclude(claim: str, case: str, ends, good, bad, why: str, biased=True) -> None:
    rows.append(
        [claim, case, *ends, verdict(reproduced=bool(good), refuted=bool(bad), biased=bool(biased)), why]
    )


rows, (least, most) = [], additive
for x, r in by_measure.loc[trust_measures].iterrows():
    good, bad = (
        r["low"] >= wanted_reliability - 0.1 and r["r"] >= wanted_reliability,
        r["high"] < wanted_reliability,
    )
    why = f"{r['n']:.0f} items, {r['seconds']:.0f} s; bias p = {r['p']:.3f}; wanted {wanted_reliability:g}"
    conclude("F6", x, r[["r", "low", "high"]], good, bad, why, r["p"] < p_bias)
mine = agree[(agree["a"] == main) | (agree["b"] == main)]
ends = mine["disattenuated"].mean(), mine["low"].min(), mine["high"].max()
why = f"{mine['positive'].sum():.0f} of {len(same_bias) - 1} measures positive, {len(mine)} readable"
good, bad = 0 < mine["positive"].sum() == len(same_bias) - 1, len(mine) and mine["high"].lt(weak).all()
conclude("F7", main, ends, good, bad, why, same["p"].lt(p_bias).sum() > 1)
r = held_out.iloc[0]
why, left_ends = f"{r['picked']:.0f} heads", r[["left", "left_low", "left_high"]]
conclude("F5 ours", main, left_ends, r["left_low"] > kept_share, r["left_high"] < kept_share, why)
a = adds.iloc[0]
why = f"{len(sets)} sets of 2 to {max(map(len, sets.values()))} heads; adds up within {additive}"
good, bad = a["low"] > least and a["high"] < most, a["low"] > most or a["high"] < least
conclude("F8", main, a[["slope", "low", "high"]], good, bad, why, a["effect_low"] > 0)
why = f"{greedy_heads} heads; perplexity × {ppl['greedy']:.2f} and × {ppl['one shot']:.2f}"
conclude("R3", main, gain.values(), gain["gain_high"] < 0, gain["gain_low"] >= 0, why, there["p"] < p_bias)
if len(noise):
    r = noise.iloc[0]
    why = f"{r['heads']:.0f} heads, {r['prompts']:.0f} prompts"
    conclude("R4", "", r[["ratio", "low", "high"]], r["low"] > 1, r["high"] < 1, why)
for r in kinds.itertuples():
    why = f"Spearman with zeroing {r.r:.2f}; chance overlap {r.chance:.2f}"
    conclude("R5", r.ablation, [r.overlap, np.nan, np.nan], r.overlap < 0.5, r.overlap >= 0.8, why)
if known:
    seeds, floors, curse, regimes = authors.values()
    good, bad = (
        seeds["mean_low"].gt(wanted_reliability).all(),
        seeds["mean_high"].lt(wanted_reliability).all(),
    )
    why = f"reliability of the mean of seeds {seeds['mean_r'].min():.2f} to {seeds['mean_r'].max():.2f}"
    conclude("F4", "", seeds["r"].agg(["mean", "min", "max"]), good, bad, why)
    for t in curse[curse["split"] == "test"].itertuples():
        why = f"{t.heads} heads scored on test prompts"
        conclude("F5", t.model, [t.left, t.low, t.high], t.low > kept_share, t.high < kept_share, why)
    neo = regimes.set_index("model").loc["EleutherAI/gpt-neo-1.3B"]
    two, why = neo["explained"] > 0.95 and neo["r_bias"] < -0.9, f"explained {neo['explained']:.3f}"
    conclude("R1", "", [neo["r_bias"], np.nan, np.nan], two, not two, why)
    for t in floors[floors["axis"] == "religion"].itertuples():
        above = t.bias > t.floor_95
        conclude("R2", t.model, [t.bias, t.floor, t.floor_95], not above, above, f"{t.prompts} prompts")
verdicts = pd.DataFrame(rows, columns=["id", "case", "ours", "low", "high", "verdict", "why"])
verdicts = verdicts.join(claims.known().set_index("id")[["claim", "what"]], on="id")
sentence = f"{model}:\n\n{claims.in_words(verdicts)}"
if model == "planted":
    place = pd.read_json(net.folder / "truth.json", typ="series")
    assert z_main.argmax() == place["layer"] * net.anatomy.n_heads + place["head"], (
        "the planted head isn't first"
    )
display(verdicts.drop(columns="what").style.hide(axis="index").format(precision=2, na_rep="–"))
tables = {
    "measures": "Bias and reliability of head effects by measure",
    "agreement": "Do measures find the same heads?",
}
tables |= {
    "joint_slope": "Joint effect ÷ sum of single effects",
    "one_shot_or_search": "Picked in three ways",
}
tables |= {
    "ablation": "Other kinds of removal against zeroing",
    "noise": "Independent noise ÷ common random numbers",
}
tables |= {"held_out": "Share of the picked heads' advantage that is left on test items"}
tables |= {"published_seeds": "Agreement of seeds", "published_curse": "Selections on test prompts"}
tables |= {"published_floor": "Published bias and its floor", "published_regimes": "Two kinds of runs"}
plots = {"growth": "Reliability against items", "additivity": "Joint effects against sums of single ones"}
run.finish(sentence, verdicts=verdicts, about=main, tables=tables, figures=plots)
