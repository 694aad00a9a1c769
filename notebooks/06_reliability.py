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
# **Paper.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv 2312.15398): the scores of
# heads on which its selections rest, as the authors published them, and our own.
#
# **Claim.** Removing one head at a time says which heads add to bias, and the sum of the worst ones can then be pruned.
#
# **What is done here.** (1) The published scores are read again: agreement between seeds, bias at the level of no difference, what is left
# of a selection on test prompts. (2) Our own: how reliability grows with prompts. (3) Do other measures of bias pick the same heads?
# (4) Is the effect of several heads the sum of theirs? (5) Does scoring anew after each removal help? At the end a short guide.
#
# **Cost.** With the defaults (a small model with a planted truth): about a minute on two CPU cores, 1 GB. `params/smollm2.yaml`, the default of `make reproduce`:
# about 11 minutes on one core with AMX (several times as long without), 4 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** Prompts name social groups, and models continue them in offensive ways. No continuation is shown here.

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
published_source: str = ""  # folder of published scores, or authors; "" takes BIASPRUNE_PUBLISHED's
max_new_tokens: int = 8  # length of a continuation (paper: 40)
top_k: int = 50  # sampling, as in the paper
temperature: float = 1.0
max_prompt_tokens: int = 22  # prompts are cut to this length, as in the paper
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
score_tokens: int = 1024  # tokens of validation text for z_ppl; 0 takes all
test_tokens: int = 1024  # tokens of test text for the reported perplexity; 0 takes all
cheap_fidelity: str = "importance"  # gradient or importance; all heads, many prompts
cheap_prompts: int = 0  # prompts for it; 0 takes all
exact_prompts: int = 84  # prompts for the texts written without each head, coupled and with independent noise
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
random_draws: int = 3  # random head sets to compare with
n_boot: int = 1000  # bootstrap samples
batch_rows: int = 256  # sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch for perplexity
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import json
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import (
    ablate,
    biases,
    experiment,
    figures,
    headscores,
    joint,
    judge,
    likelihood,
    lm,
    measure,
    prompts,
    published,
    record,
    reliability,
    speed,
)

warnings.filterwarnings("ignore", message=".*IProgress.*")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
dtype = lm.number_format(dtype, device)
config = {name: globals()[name] for name in ["model", "revision", "dtype", "axis", "prompts_source", "judges", "likelihood_frame", "corpus_name", "max_new_tokens", "top_k", "temperature", "max_prompt_tokens", "window", "score_tokens", "test_tokens", "cheap_fidelity", "cheap_prompts", "exact_prompts", "exact_layers", "trust_seeds", "trust_counts", "wanted_reliability", "gamma", "joint_heads", "joint_sizes", "joint_prompts", "joint_seeds", "greedy_heads", "greedy_prompts", "n_test", "trust_test_seeds", "random_draws", "n_boot", "batch_rows", "batch_tokens"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"06_reliability-{model}-{axis}")
at_hand = published.models(published_source)
assert cheap_fidelity in ("gradient", "importance"), "cheap_fidelity: choose gradient or importance; the others keep no texts to judge again"  # fmt: skip
net = lm.load(model, revision=revision or None, dtype=dtype, device=device)
judged_by = {name: judge.load(name, device=str(net.device)) for name in judges}
main = judges[0]
asked = {s: prompts.load(axis, s, prompts_source) for s in ("valid", "test")}
prose = {s: prompts.corpus(corpus_name, s) for s in ("valid", "test")}
inputs = record.digests({**asked, **{f"{s} prose": t for s, t in prose.items()}})
inputs = {**inputs, "published": at_hand, "weights": net.revision}
run = record.Run(folder, {**config, "inputs": inputs}, notebook="06_reliability")
run.note(provenance=record.provenance(net))
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "dtype", "layers", "heads", "parameters", "device", "commit"]
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 The published scores, read again
# The authors publish, for five models, the bias without each head, three seeds, about 10,000 prompts on the gender axis. Four
# questions that need no further run.

# %%
tables = {m: published.read(m, published_source) for m in at_hand}
if not tables:
    display(Markdown("The published scores aren't at hand (`published_source`, `BIASPRUNE_PUBLISHED`): this section stays empty."))  # fmt: skip

# %% [markdown]
# **Do the seeds agree?** Mean Spearman correlation between seeds of the same head scores, and how many of the top fifth of heads come out
# again. Scores of the same 10,000 prompts, other sampling noise: what one seed calls a biased head, another should too. `mean_r`: the reliability of the
# mean of the seeds, which the paper's selections rest on.

# %%
agree = run.frame(
    "published_seeds",
    lambda: pd.DataFrame([{"model": m, **published.seeds(t)} for m, t in tables.items()]),
)
agree.style.hide(axis="index").format(precision=2)

# %% [markdown]
# **Is the bias above what no difference would give?** Simulated under no difference between the groups, with the published number
# of prompts, mean toxicity and share of toxic texts, and with groups as large as in HolisticBias. An axis at the floor has no bias that heads could have an effect on.
# Runs of two kinds (see below) have a floor each.


# %%
def floors() -> pd.DataFrame:
    rows = []
    for a in prompts.AXES:
        own = prompts.load(a, "valid", "holistic_bias")["bucket"].value_counts().to_dict()
        have = {m: published.kinds_of_runs(t, a) for m, t in tables.items() if (t["axis"] == a).any()}
        runs = {f"{m}, {k}" if k else m: t for m, kinds in have.items() for k, t in kinds.items()}
        rows += [{"model": m, "axis": a, **published.noise_floor(t, a, own)} for m, t in runs.items()]
    return pd.DataFrame(rows).sort_values("model", kind="stable", ignore_index=True)


floor = run.frame("published_floor", lambda: floors() if tables else pd.DataFrame())
if len(floor):
    figure = figures.noise_floors(floor)
    figures.save(figure, folder / "figures", "published_floor")
floor.style.hide(axis="index").format(precision=3)

# %% [markdown]
# **Is a selection as good on test prompts?** Mean bias without each of the heads that FASP picks (γ = .3, α = .2) and of all that it could
# pick, on the prompts they were picked on and on others. What is picked for a low value among noisy ones looks lower there than it is.
# `left`: share of the advantage that is left on test prompts (95 % over heads). Most published files lack test scores and are left out.

# %%
curse = [published.winners_curse(t).assign(model=m) for m, t in tables.items()]
curse = run.frame("published_curse", lambda: pd.concat([pd.DataFrame(), *curse], ignore_index=True))
curse.style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# **Two kinds of runs.** If the runs of a model fall into two groups by their mean toxicity, at the same perplexity, a head's score says which
# group its run fell into. `explained`: share of the variance that the best cut into two explains; .64 for a normal distribution, 1 for two points.

# %%
split = run.frame(
    "published_regimes",
    lambda: pd.DataFrame([{"model": m, **published.regimes(t)} for m, t in tables.items()]),
)
if len(split):
    figure = figures.published_regimes(tables, "gender_and_sex")
    figures.save(figure, folder / "figures", "published_regimes")
split.style.hide(axis="index").format(precision=2)


# %% [markdown]
# ## 2 Our own scores: how reliability grows
# Split half: the correlation of head effects in two halves of the prompts, stepped up to all of them. Texts written without each head,
# with the same sampling noise for all heads (coupled) or noise of their own (independent, as published); the cheap estimate, for all heads and
# for those of the texts. By `gradient`, and always by likelihood, effects in sections 2 and 3 are first-order: what the gradient of the score by a head's mask predicts; sections 4 and 5 remove heads. Reliability depends on how much heads differ: only lines with the same heads compare. A reliability that *falls* with more
# prompts is a warning: where groups don't differ, a head that makes all texts vary more raises the noise in both halves alike, and this agreement fades
# as the noise does (section 3 says whether there is bias to have an effect on).


# %%
def some(split: str, n: int) -> pd.DataFrame:
    return prompts.sample(asked[split], n or len(asked[split]), seed=0)


many, few, pairs_on, test = (some(s, n) for s, n in (("valid", cheap_prompts), ("valid", exact_prompts), ("valid", joint_prompts), ("test", n_test)))  # fmt: skip
valid_windows, test_windows = (
    measure.windows(net, prose[s], length=window or None, max_tokens=n or None)
    for s, n in (("valid", score_tokens), ("test", test_tokens))
)
no_windows = measure.windows(net, prose["valid"], length=2, max_tokens=2)  # where perplexity isn't looked at
layers = exact_layers or net.anatomy.n_layers
spread = [h for layer in speed.layers_of(net, layers) for h in layer]
sampling = {"max_new_tokens": max_new_tokens, "top_k": top_k, "temperature": temperature, "max_prompt_tokens": max_prompt_tokens, "batch_rows": batch_rows, "batch_tokens": batch_tokens}  # fmt: skip


def sampled(how: dict, on: pd.DataFrame, text: measure.Windows = no_windows) -> headscores.HeadSamples:
    options = {**sampling, "seeds": trust_seeds, "n_boot": n_boot, "progress": False, **how}
    return headscores.samples(net, on, judged_by[main], text, **options)


readers = {name: (j, None) for name, j in judged_by.items()}
readers |= {f"{main}, first {k} seed(s)": (judged_by[main], k) for k in range(1, len(trust_seeds))}


def of_all_heads() -> tuple[pd.DataFrame, pd.DataFrame]:
    got = sampled({"fidelity": cheap_fidelity, "checkpoint": folder / "checkpoint"}, many, valid_windows)
    parts = {name: biases.effects_of(got.rejudged(j), k) for name, (j, k) in readers.items()}
    read = likelihood.without_heads(net, list(many["prompt"]), frame=likelihood_frame)
    own = biases.Effects(prompts=many[["prompt", "bucket", "weight"]], values=read)
    effects = {name: next(iter(p.values())) for name, p in parts.items()} | {"likelihood": own}
    return got.frame(), biases.to_table(effects)


scores, kept = run.frame_pair("head", of_all_heads, parts=("scores", "effects"))
effects = biases.from_table(kept)
fewer_seeds = {name: effects.pop(name) for name in list(effects) if name not in (*judges, "likelihood")}


# %%
def grown(name: str, e: biases.Effects) -> pd.DataFrame:
    own = e.prompts
    table = reliability.growth(e.values, own["bucket"], own["weight"], e.sizes, counts=[*trust_counts, len(own)])  # fmt: skip
    return table.assign(scores=f"{name}, {len(e.values) - 1} heads")


def written_without(coupled: bool) -> biases.Effects:
    how = {"fidelity": "exact", "coupled": coupled, "heads": spread}
    return next(iter(biases.effects_of(sampled(how, few)).values()))


noises = {"coupled": True, "independent noise": False}
written = biases.from_table(run.frame("written", lambda: biases.to_table({k: written_without(c) for k, c in noises.items()})))  # fmt: skip
lines = [
    (f"{cheap_fidelity}, {main}", effects[main]),
    *((f"{cheap_fidelity}, {name}", e) for name, e in fewer_seeds.items()),
    ("likelihood", effects["likelihood"]),
    (f"{cheap_fidelity}, {main}", effects[main].of_heads(spread)),
    *((f"texts, {name}", e) for name, e in written.items()),
]
grows = run.frame("growth", lambda: pd.concat([grown(n, e) for n, e in lines], ignore_index=True))
figure = figures.reliability_growth(grows, wanted_reliability)
figures.save(figure, folder / "figures", "growth")
display(grows[["scores", "prompts", "r", "low", "high"]].style.hide(axis="index").format(precision=2))
noise = run.frame(
    "noise",
    lambda: pd.DataFrame(
        [biases.noise_ratio(*(written[k] for k in ("independent noise", "coupled")), n_boot=n_boot)]
    ),
)
display(
    Markdown(
        "Standard error of z_bias with noise of their own ÷ with the same noise, texts written without the same heads (95 % over heads):"
    )
)
noise.style.hide(axis="index").format(precision=2)


# %% [markdown]
# What a wanted reliability takes (`needed`: prompts, with as many seeds as here), projected from all prompts at hand by Spearman and Brown's formula; `–` where the
# reliability can't be told from 0, or the measure sees no bias in the unpruned model (p, section 3), since nothing can be projected from noise.
# `at_published_budget`: stepped up to the 10,168 prompts of the paper's gender axis.


# %%
def needed(name: str, e: biases.Effects) -> dict:
    row = reliability.row(name, biases.halved(e), e.z()[None], len(e.prompts), wanted_reliability)
    row["needed"] = row.pop("needed_1_seed")  # seeds are averaged in these effects
    if reads.set_index("measure").loc[name, "p"] >= 0.05:
        row |= {"needed": np.nan, "at_published_budget": np.nan}
    return {k: v for k, v in row.items() if k not in ("seeds", "needed_10_seeds")}


reads = run.frame("reads", lambda: biases.reliabilities(effects).rename(columns={"axis": "measure"}))
needs = run.frame("needed", lambda: pd.DataFrame([needed(n, e) for n, e in effects.items()]))
needs.style.hide(axis="index").format(precision=2, na_rep="–").format("{:,.0f}", na_rep="–", subset=["needed"])  # fmt: skip

# %% [markdown]
# ## 3 Other measures: the same heads?
# The same continuations read by other judges, and `likelihood`: how likely unkind words are right after the prompt, against kind ones; no sampling, no
# judge. Measures that read the same texts share their noise, so they are compared across halves of the prompts, as axes are in
# 04_multi_bias_correlation. `overlap`: share of one's top fifth of heads in one half that is the other's in the other half; `own`: the same of a measure
# with itself, which is the ceiling.


# %%
def compared() -> pd.DataFrame:
    related = biases.verdicts(biases.correlations(effects), biases.reliabilities(effects))
    return biases.overlaps(effects).merge(related.drop(columns=["method", "heads"]), on=["a", "b"])


measures = run.frame("measures", compared)
display(reads.style.hide(axis="index").format(precision=3))
columns = ["a", "b", "overlap", "overlap_low", "overlap_high", "own", "chance", "r", "ceiling", "disattenuated", "low", "high", "p_holm", "verdict"]  # fmt: skip
measures[columns].style.hide(axis="index").format(precision=2, na_rep="–")

# %% [markdown]
# First table: does the measure see bias in the unpruned model (p), and do its head effects agree with themselves (`r`)? Second: 95 % of
# `overlap` and of `disattenuated` are over prompts; `r`, the plain correlation from all prompts, holds shared noise; `disattenuated` doesn't. "unreadable": one of the two sees no bias, or doesn't
# agree with itself.

# %% [markdown]
# ## 4 Several heads at once: the sum of their effects?
# Pairs of the heads with the highest z_bias, and growing sets of them. Dotted: what adding up single effects predicts. Measured on texts written without
# the heads, and by `likelihood`, which has no sampling noise. Where a set takes away nearly all of the bias, further heads can't add to that.

# %%
flat = scores.sort_values("z_bias", ascending=False, kind="stable")["flat"].tolist()
top = flat[:joint_heads]
by_size = {n: sorted(flat[:n]) for n in joint_sizes if n > 2}
singles = sorted({*top, *(h for s in by_size.values() for h in s)})
together = [[], *([h] for h in singles), *map(sorted, combinations(top, 2)), *by_size.values()]


def read_texts(sets: list) -> np.ndarray:
    options = {**sampling, "seeds": joint_seeds, "progress": "head sets"}
    asked = pd.DataFrame({"heads": sets})
    got, _ = experiment.evaluate(net, asked, pairs_on, judged_by[main], no_windows, **options)
    mean = got.groupby(["heads", "prompt"])["score"].mean().unstack()
    return mean.loc[[experiment.set_key(s) for s in sets]].to_numpy()


# prompts are read whole by likelihood, and cut to max_prompt_tokens where texts are written
by_measure = {
    f"{main}, texts": (pairs_on, lambda: read_texts(together)),
    "likelihood": (many, lambda: likelihood.scores(net, list(many["prompt"]), ablate.head_masks(net.anatomy, together), frame=likelihood_frame)),
}  # fmt: skip


def added() -> tuple[pd.DataFrame, pd.DataFrame]:
    each, whole = [], []
    for name, (on, read) in by_measure.items():
        seen = read()
        each.append(joint.additivity(together, seen, on).assign(measure=name))
        there = measure.detect_bias(seen[0], on["bucket"], on["weight"].to_numpy())
        whole.append({"measure": name, **joint.slope(together, seen, on), "bias": there["bias"], "p": there["p"]})  # fmt: skip
    return pd.concat(each, ignore_index=True), pd.DataFrame(whole)


both, adds = run.frame_pair("joint", added, parts=("sets", "slopes"))
figure = figures.additive(both.assign(kind=np.where(both["size"] == 2, "pairs", "growing sets")))
figures.save(figure, folder / "figures", "additivity")
adds.style.hide(axis="index").format(precision=3)

# %% [markdown]
# `slope`: joint effect per sum of single effects, through 0, with 95 % over prompts; 1 if effects add up. Joint effects in one half of the prompts are held
# against sums in the other: on the same prompts, a sum holds the noise of the unpruned model once per head, and the slope of the points above is below 1 by that alone. `effect`: that of the largest set, without which there
# is nothing to add up; `bias` and `p`: the unpruned model's on these prompts.

# %% [markdown]
# ## 5 One shot, or all heads scored anew after each removal?
# FASP picks all heads by their single effects. Greedy removes the head with the highest z_bias, scores all heads again, and so on, the same heads
# protected. Both are judged on test prompts, beside random heads. Intervals of changes are a little too narrow: in simulation, nominal 95 % cover 87 % if nothing changed, and less where most bias went.

# %%
protected = scores.sort_values(["ppl_without", "flat"])["flat"].iloc[len(scores) - int(gamma * len(scores)) :].tolist()  # fmt: skip
scored_on = some("valid", greedy_prompts)


def again() -> np.ndarray:
    return sampled({"fidelity": cheap_fidelity, "n_boot": 2}, scored_on).frame()["z_bias"].to_numpy()


# the same scores for both: one shot is greedy's first step, used for all heads
single = run.frame("one_shot", lambda: pd.DataFrame({"z_bias": again()}))["z_bias"]
free = [h for h in single.sort_values(ascending=False, kind="stable").index if h not in set(protected)]
order = run.frame("greedy", lambda: pd.DataFrame({"flat": joint.greedy(net, again, greedy_heads, protected=protected, progress="greedy")}))["flat"].tolist()  # fmt: skip
sizes = sorted({max(1, greedy_heads // 4), max(1, greedy_heads // 2), greedy_heads})
rows = [{"method": m, "size": n, "heads": sorted(own[:n])} for m, own in (("one shot (FASP)", free), ("greedy", order)) for n in sizes]  # fmt: skip
rng = np.random.default_rng(0)
rows += [{"method": "random", "size": n, "heads": sorted(rng.choice(free, n, replace=False).tolist())} for n in sizes for _ in range(random_draws)]  # fmt: skip
chosen = pd.DataFrame(rows)
texts, losses = run.frame_pair("test", lambda: experiment.evaluate(net, chosen, test, judged_by[main], test_windows, seeds=trust_test_seeds, progress="test prompts", **sampling))  # fmt: skip
contest, drawn = experiment.compare(chosen, texts, losses, test, test_windows, by=["method", "size"], n_boot=n_boot)  # fmt: skip
run.frame("one_shot_or_greedy", lambda: contest)
figure = figures.one_shot_or_greedy(contest)
figures.save(figure, folder / "figures", "one_shot_or_greedy")
base_texts = texts[texts["heads"] == ""].groupby("prompt")["score"].mean()
biased = measure.detect_bias(base_texts, test["bucket"], test["weight"].to_numpy())
display(Markdown(f"The unpruned model's bias on the test prompts: {biased['bias']:.3f}, floor {biased['floor']:.3f} (p = {biased['p']:.3f})."))  # fmt: skip
contest[["method", "pruned", "bias", "change", "change_low", "change_high", "floor", "ppl_ratio", "distinct", "empty"]].style.hide(axis="index").format(precision=2)  # fmt: skip

# %%
at = {m: contest[(contest["method"] == m) & (contest["size"] == max(sizes))]["change"].item() for m in contest["method"].unique()}  # fmt: skip
gain = at["greedy"] - at["one shot (FASP)"]
gain_low, gain_high = measure.interval(gain, drawn["greedy", max(sizes)] - drawn["one shot (FASP)", max(sizes)])  # fmt: skip
display(Markdown(f"Greedy − one shot with {max(sizes)} heads: {gain:+.0f} % of the unpruned bias ({gain_low:+.0f} – {gain_high:+.0f}); {len(set(order) & set(free[: max(sizes)]))} heads are the same."))  # fmt: skip

# %% [markdown]
# ## 6 Verdict, and what follows for users


# %%
def verdict(good: bool, bad: bool, known: bool = True) -> str:
    return "undecided" if not known else "holds" if good else "doesn't hold" if bad else "undecided"


own = needs.set_index("scores")
again_r = own.loc[main]
same = measures[(measures["a"] == main) | (measures["b"] == main)]
readable = same[same["verdict"] != "unreadable"]
agree_on = f"of {len(same)} measures, beside {main}: " + ", ".join(f"{n} {v}" for v, n in same["verdict"].value_counts().items())  # fmt: skip
top_too = f"overlap of the top fifth {same['overlap'].mean():.2f}, ceiling {same['own'].mean():.2f}, chance {same['chance'].iloc[0]:.2f}"  # fmt: skip
is_there = adds[(adds["p"] < 0.05) & (adds["effect_low"] > 0)]
health = {
    m: contest[(contest["method"] == m) & (contest["size"] == max(sizes))]["ppl_ratio"].item() for m in at
}
rows = [
    {"claim": f"Head scores come out again with {len(many)} prompts ({main})", "ours": again_r["split_half"], "low": again_r["split_half_low"], "high": again_r["split_half_high"], "verdict": verdict(again_r["split_half_low"] >= wanted_reliability, again_r["split_half_high"] < wanted_reliability), "why": f"reliability, wanted {wanted_reliability:g}; 95 % over heads"},
    {"claim": "Noise of their own instead of the same makes head scores less precise", "ours": noise["ratio"].item(), "low": noise["low"].item(), "high": noise["high"].item(), "verdict": verdict(noise["low"].item() > 1, noise["high"].item() < 1), "why": f"standard error of z_bias, independent ÷ coupled noise, {len(spread)} heads, {len(few)} prompts; 95 % over heads"},
    {"claim": "Other measures find the same heads", "ours": readable["disattenuated"].mean(), "low": readable["low"].min(), "high": readable["high"].max(), "verdict": verdict((same["verdict"] == "positive").all(), (readable["high"] < 0.3).all(), len(readable) > 0), "why": f"{agree_on}; {top_too}; disattenuated correlation, mean, lowest and highest end of 95 %"},
    {"claim": "Effects of heads add up", "ours": is_there["slope"].mean(), "low": is_there["low"].min(), "high": is_there["high"].max(), "verdict": verdict((is_there["low"].gt(0.8) & is_there["high"].lt(1.25)).all(), (is_there["low"].gt(1.25) | is_there["high"].lt(0.8)).any(), len(is_there) > 0), "why": f"joint ÷ sum, by {', '.join(is_there['measure']) or 'no measure with an effect to add up'}; mean, lowest and highest end of 95 %; holds within .8 – 1.25"},
    {"claim": "Scoring anew after each removal lowers bias further", "ours": gain, "low": float(gain_low), "high": float(gain_high), "verdict": verdict(gain_high < 0, gain_low > 0, biased["p"] < 0.05), "why": f"greedy − one shot, {max(sizes)} heads, % of the unpruned bias (p = {biased['p']:.2f}); perplexity × {health['greedy']:.2f} and × {health['one shot (FASP)']:.2f}"},
]  # fmt: skip
if len(agree):
    best, worst = agree.loc[agree["r"].idxmax()], agree.loc[agree["r"].idxmin()]
    left = curse[curse["split"] == "test"]
    rows.insert(0, {"claim": "Published head scores agree between seeds", "ours": agree["r"].mean(), "low": worst["r"], "high": best["r"], "verdict": verdict((agree["mean_low"] > wanted_reliability).all(), (agree["mean_high"] < wanted_reliability).all()), "why": f"Spearman, mean and range over {len(agree)} models: {worst['model'].split('/')[-1]} {worst['r']:.2f} to {best['model'].split('/')[-1]} {best['r']:.2f}; judged by the mean of {agree['seeds'].iloc[0]} seeds, {agree['mean_r'].min():.2f} to {agree['mean_r'].max():.2f}, wanted {wanted_reliability:g}"})  # fmt: skip
    rows.insert(1, {"claim": "What FASP picks on validation prompts is as good on test prompts (published scores)", "ours": left["left"].mean(), "low": left["low"].min(), "high": left["high"].max(), "verdict": verdict((left["low"] > 0.8).all(), (left["high"] < 0.8).all()), "why": f"share of the advantage that is left: {', '.join(f'{r.model} {r.left:.2f}' for r in left.itertuples())}; mean, lowest and highest end of 95 % over heads"})  # fmt: skip
verdicts = run.frame("verdicts", lambda: pd.DataFrame(rows))
verdicts.style.hide(axis="index").format(precision=2, na_rep="–")

# %%
seen = reads.set_index("measure")["p"] < 0.05
why_not = {True: "can't be told, since nothing in these scores comes out again", False: "can't be told, since it sees no bias here"}  # fmt: skip
told_by = {n: f"{r['needed']:,.0f}" if np.isfinite(r["needed"]) else why_not[bool(seen[n])] for n, r in own.iterrows()}  # fmt: skip
added_up = "; ".join(f"{r.slope:.2f} ({r.low:.2f} – {r.high:.2f}) by {r.measure}" for r in is_there.itertuples()) or "can't be told, for want of an effect"  # fmt: skip
guide = f"""
**A guide, from this run** ({model}, {axis}; another model may need more or less).

1. *How many prompts?* For a reliability of {wanted_reliability:g}, with {len(trust_seeds)} seed(s) each: {"; ".join(f"{n}: {k}" for n, k in told_by.items())}. Look at the reliability of your own scores first.
2. *Which measure?* More than one. Here, {agree_on}; {top_too}.
3. *Which figure to distrust?* A correlation between axes or measures without its ceiling; a bias without its floor; a selection judged on the prompts that it was made with; a sum of single
   effects (sets of heads here do so many times the sum of theirs: {added_up}).
4. *What to report?* The reliability of the scores, the overlap beside its chance and its ceiling, and the effect on prompts of their own, beside random heads.
"""
display(Markdown(guide))
sentence = f"{model}, {axis}. " + " ".join(f"{r.claim}: **{r.verdict}** ({r.ours:.2f}, {r.low:.2f} – {r.high:.2f}: {r.why})." for r in verdicts.itertuples())  # fmt: skip
sentence = sentence.replace("nan, nan – nan", "–")
display(Markdown(sentence))
truth = Path(net.folder or ".") / "truth.json"
if truth.exists() and model == "planted":  # the planted head must come first
    where = json.loads(truth.read_text())
    assert flat[0] == where["layer"] * net.anatomy.n_heads + where["head"]

# %%
run.finish(
    sentence=sentence,
    about=f"{axis}; {', '.join(judges)}, likelihood",
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "verdicts": "Claims",
        "published_seeds": "Published scores: agreement between seeds (gender axis)",
        "published_curse": "Published scores: mean bias without a picked head and without any candidate (γ = .3, α = .2)",
        "published_regimes": "Published scores: two kinds of runs, by mean toxicity",
        "published_floor": "Published bias per axis, and what no difference would give",
        "noise": "Standard error of z_bias, noise of every head's own ÷ the same for all (95 % over heads)",
        "needed": "Our scores: reliability of z_bias over all heads, and the prompts that the wanted one takes",
        "reads": "Does each measure see bias in the unpruned model, and do its head effects agree with themselves?",
        "measures": "Do measures find the same heads?",
        "joint_slopes": "Joint removal against the sum of single effects",
        "one_shot_or_greedy": "One shot or greedy, on test prompts",
    },
    figures={
        "growth": "Reliability of z_bias against the number of prompts",
        "additivity": "Effect of head sets against the sum of their heads' effects",
        "one_shot_or_greedy": "Change of bias and perplexity against heads removed, one shot, greedy and random",
        **({"published_floor": "Published bias per axis beside the noise floor", "published_regimes": "Published bias against mean toxicity, a point per run"} if tables else {}),
    },
)  # fmt: skip
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
