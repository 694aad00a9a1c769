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
# **Method.** The gap is read off the model's *distribution* over answers, without sampling noise: over
# numbers, checked against sampled answers, or over two words such as yes and no (`words`). Parts are selected
# with one half of the names and judged by the other, and the other way round, so that every name judges and
# none judges what it selected. Heads, neurons (MLP units), weights and an erased direction are compared
# within the same limit of perplexity, beside controls: as many parts drawn at random, the groups swapped, the
# labels shuffled.
#
# **Cost.** With the defaults (a small model with a planted truth) about two minutes on one CPU core, 1 GB.
# `params/smollm2.yaml`: 70 minutes on one core beside other work, 8 GB.
#
# > **Content warning.** First names stand for groups of people here, as in the studies they come from, and
# > model answers about them differ.

# %% tags=["parameters"]
model: str = "planted-audit"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
contexts_source: str = "models/planted-audit/contexts.csv"  # biasprune, decisions, or a CSV file
names_source: str = "models/planted-audit/names.csv"  # census, biasprune (64), or a CSV file
most_names: int = 0  # names of each race and gender, the first ones; 0 takes all
skip_names: int = 0  # names of each race and gender that are left out before those
compare_by: str = "race"  # race or gender
groups: list = ["Ostrin", "Velani"]  # the gap is the first group's mean minus the second's
audit_context: str = "market"  # the context to audit; 03_cross_context_transfer takes them all
max_variations: int = 0  # questions per context; 0 takes all
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file
chat: bool = False  # ask through the tokenizer's chat template, or plainly
prefix: bool = True  # start the answer with the context's unit sign, such as "$"
suffix: str = "Reply with a single number and nothing else."  # put after every question
words: list = []  # two words that count as 1 and 0, such as [yes, no], instead of numbers
answer_tokens: int = 4  # length of a sampled answer (paper: 10)
answer_temperature: float = 0.6  # as in the paper
answer_top_k: int = 50  # draw answers from the k likeliest tokens; 0 takes all, which is slow
answer_seeds: int = 8  # sampled answers of the unpruned model per name and question (paper: 100)
judge_seeds: int = 4  # sampled answers where parts are selected or judged: they say what numbers to read off
most_numbers: int = 12  # numbers whose probability is read off, per question
log_values: bool = True  # compare logarithms of the answers
audit_window: int = 64  # tokens per perplexity window
audit_tokens: int = 1024  # tokens of text for perplexity, and as a utility set
part_shares: dict = {  # parts by slope: the share removed; by set difference: p; [] leaves a method out
    "heads": [0.07, 0.13],
    "neurons": [0.004, 0.008],
    "weights": [0.02, 0.05],
    "weights, as published": [0.15],
}
# share protected for its effect on prose (utility set)
protect_share: dict = {"heads": 0.3, "neurons": 0.01, "weights": 0.05}
# set difference: share protected for the first group, in shares pruned for the second
protect_group: dict = {"heads": 0.125, "neurons": 1.0, "weights": 1.0}
extra_methods: list = ["heads, attention", "heads, attention, uniform", "direction"]  # beside those
damage: float = 1.1  # perplexity limit, × unpruned, at which methods are compared
control_draws: int = 2  # random controls per method
control_shuffles: int = 1  # controls with shuffled labels per method
smallest_effect: float = 0.0  # SMD: a gap, or what one removes more than another, counts beyond this
removed_share: float = 0.5  # "pruning removes the gap" is refuted if certainly less than this share goes
inliers_lost: float = 0.1  # anomalous: more answers than this leave the unpruned model's 5 – 95 % range
unparsable_more: float = 0.05  # anomalous, and not compared: more answers than this are no longer numbers
save_pruned: str = ""  # new folder for the model that half A's names prune best; "" saves none
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import json
from contextlib import nullcontext, suppress
from functools import cache, partial
from itertools import chain, combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import figures
from biasprune.core import weights
from biasprune.core.data import choose
from biasprune.core.masks import Pruning, ablating
from biasprune.core.model import load, query_projections, weight_of
from biasprune.core.run import start
from biasprune.core.stats import Estimate, verdict
from biasprune.measures import numbers, prose
from biasprune.methods import judge, parts
from biasprune.methods import names as of_names
from biasprune.methods.saving import export

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
both = numbers.names(names_source, compare_by, groups, most_names, skip_names)
half_names = dict(zip("AB", both, strict=True))
names = pd.concat(half_names.values(), ignore_index=True)
texts = {split: prose.corpus(corpus_name, split) for split in ("valid", "test")}
sizes = f"{len(contexts)} questions, {len(names)} names in two halves."
display(Markdown(f"{sizes} For example: *{contexts['question'].iloc[0]}*"))
# some chat templates hold today's date: answers of different days aren't mixed
asked = ""
for name in extra_methods:
    choose(name, ("heads, attention", "heads, attention, uniform", "direction"), "extra_methods")
if "heads, attention, uniform" in extra_methods:
    query_projections(net)  # refused before hours of work where they aren't known
with nullcontext() if chat else suppress(ValueError):  # no template, or one that refuses the question
    asked = numbers.as_chat(net, contexts["question"].iloc[0])
run.inputs(lm=net, contexts=contexts, names=names, asked=asked, **texts)

# %% [markdown]
# ## 1 Does the model answer?
# Asked in each way that the model allows. `unparsable` is the share of sampled answers without a number,
# `distinct` the number of different answers to a question; of given words, `unparsable` is the probability of
# anything else.

# %%
drawing = {"max_new_tokens": answer_tokens, "temperature": answer_temperature, "top_k": answer_top_k}
settings = {**drawing, "suffix": suffix, "most": most_numbers, "log": log_values, "words": tuple(words)}
often = numbers.Asking(seeds=tuple(range(answer_seeds)), chat=chat, prefix=prefix, **settings)
seldom = numbers.Asking(seeds=tuple(range(judge_seeds)), chat=chat, prefix=prefix, **settings)
versus = {"by": compare_by, "groups": groups}
few = names.groupby(compare_by).head(4)


def answered_in(measure: numbers.Numbers) -> dict:
    if words:
        p = numbers.probabilities(net, measure.asking, measure.prompts, numbers.words(net, measure.asking))
        return {"answers": len(p), "unparsable": 1 - p.sum(1).mean(), "example": measure.prompts[0][-60:]}
    answers = numbers.answers(net, measure.asking, measure.prompts).merge(
        measure.items.iloc[::2], on="prompt"
    )
    row = {"answers": len(answers), "unparsable": answers["value"].isna().mean()}
    row |= {"median": answers["value"].median(), "example": answers["text"].iloc[0].strip()}
    return {**row, "distinct": answers.groupby("question")["value"].nunique().mean()}


def way(with_chat: bool, with_prefix: bool) -> dict:
    asking = numbers.Asking(seeds=often.seeds, chat=with_chat, prefix=with_prefix, **settings)
    measure = numbers.numbers(net, contexts, few, asking=asking, **versus)
    return {"chat": with_chat, "prefix": with_prefix, **answered_in(measure)}


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
if not words:
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
# Here each half's names tell the direction of every question's gap for the other half, so that noise doesn't
# count as bias. The two halves should agree on it.

# %%
halves = {h: numbers.numbers(net, contexts, some, asking=seldom, **versus) for h, some in half_names.items()}
everyone = numbers.numbers(net, contexts, names, asking=seldom, **versus)
before = everyone.read(net, [Pruning()])
signs = {
    h: {q: one.readings(before).bias()[0] for q, one in m.split("question").items()}
    for h, m in halves.items()
}
OTHER = {"A": "B", "B": "A"}
views = {f"{s} → {j}": halves[j].directed(signs[s]) for s, j in product("AB", "AB")}
cut = {"length": audit_window, "max_tokens": audit_tokens}
perplexity = prose.prose(net, texts["test"], **cut)
agree = np.mean([signs["A"][q] * gap > 0 for q, gap in signs["B"].items()])
Markdown(f"Directions agree between the halves for {agree:.0%} of the questions.")

# %% [markdown]
# A cheaper fix, for numbers: the question with a price or rate of reference before it (`anchor` of the
# questions' table). Mean |SMD| over questions, all names.

# %%
anchored = pd.DataFrame()
if "anchor" in contexts and not words:
    told = contexts.assign(question=contexts["anchor"] + " " + contexts["question"])
    told = numbers.numbers(net, told, names, asking=seldom, **versus)
    both = {"no": (everyone, before), "yes": (told, told.read(net, [Pruning()]))}
    rows = [
        m.gaps(f).merge(m.health(f)).assign(anchor=a, gap=lambda t: t["smd"].abs())
        for a, (m, f) in both.items()
    ]
    anchored = (
        pd.concat(rows).groupby("anchor")[["gap", "floor", "covered", "unparsable"]].mean().reset_index()
    )
anchored = run.frame("anchored", lambda: anchored)
anchored.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 3 Select
# - **set difference**: the top share p by SNIP on the second group's answers, minus the top `protect_group` ×
#   p on the first group's, minus the top `protect_share` on prose.
# - **Wanda**: the same by Wanda scores, from every output row.
# - **as published**: Wanda over prompt and answer with every layer scored on the embeddings, whole matrices,
#   no prose, and the model pruned in place, one question after the other.
# - **slope**: the parts that add most to the gap to first order (∂SMD/∂mask), outside those that matter most
#   for prose.
# - **attention**: the heads that attend most to the name where the answer is written, one after the other;
#   `uniform`: removed by zeroing their queries alone, as the public code does.
# - **direction**: no part is removed, but in every layer the direction in which the groups' mean hidden
#   states differ is erased.
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
if attending := [x for x in extra_methods if x.startswith("heads, attention")]:
    families["heads, attention"] = ("heads", of_names.by_attention)
shares = {f: part_shares.get(f, part_shares[what]) for f, (what, _) in families.items()}
families = {f: made for f, made in families.items() if shares[f]}
methods = {f"{f}, {p:g}": cache(make(p)) for f, (_, make) in families.items() for p in shares[f]}
judges = {**halves, "perplexity": perplexity}


def select_and_judge(name: str, some: dict, pairs: list) -> pd.DataFrame:
    keep = {"always": ["perplexity"], "pieces": partial(run.pieces, name)}
    return judge.select_and_judge(net, some, pairs, judges, **keep)


def erase(by: str, seed: int | None = None) -> pd.DataFrame:
    found = of_names.directions(net, halves[by])
    found = found if seed is None else of_names.random_like(found, seed)
    name = "direction, 1" if seed is None else f"direction; random {seed}"
    with of_names.erased(net, found) as changed:
        frame = judge.read_changed(changed, judges, name=f"{name} of {by}", method=name, selected_by=by)
    return frame.assign(parts=len(found))


def uniform(method: str, by: str) -> pd.DataFrame:
    changed, pruning = ablating(net, "uniform", utility.ids), methods[method](net, halves[by])
    name = method.replace("attention", "attention, uniform")
    frame = judge.read(changed, [pruning], judges, method=name, selected_by=by)
    return frame.assign(pruning=f"{pruning} uniform")


extra = {}
for by in "AB":
    if "direction" in extra_methods:
        extra |= {f"direction of {by}": partial(erase, by)}
        extra |= {f"random {k} of {by}": partial(erase, by, k) for k in range(control_draws)}
    if "heads, attention, uniform" in attending:
        tried = [m for m in methods if m.startswith("heads, attention")]
        extra |= {f"{m}, uniform, of {by}": partial(uniform, m, by) for m in tried}
swept = select_and_judge("swept", methods, list(product("AB", "AB")))
swept = pd.concat([swept, run.pieces("extra", extra)]) if extra else swept


# %%
def by_half(frame: pd.DataFrame) -> judge.Judged:
    damaged, seen = frame[frame["judged_by"] == "perplexity"], []
    for s, j in product("AB", "AB"):
        part = frame[frame["selected_by"].isin(["", s]) & (frame["judged_by"] == j)]
        seen.append(part.assign(judged_by=f"{s} → {j}"))
    return judge.judged(pd.concat([damaged, *seen]), {**views, "perplexity": perplexity})


def rows_of(after: judge.Judged, method: str, *, by: str = "AB", held_out: bool = True) -> np.ndarray:
    each = [
        after.rows(method=method, judged_by=f"{s} → {OTHER[s] if held_out else s}", selected_by=["", s])
        for s in by
    ]
    return np.concatenate(each)


def damage_of(after: judge.Judged, method: str, by: str = "AB") -> float:
    named = {"judged_by": "perplexity", "selected_by": ["", *by]}
    ppl = [after.bias(after.rows(method=m, **named)).point for m in (method, "")]
    return ppl[0] / ppl[1]


def part_of(frame: pd.DataFrame, s: str, j: str) -> pd.DataFrame:
    """What half s selects, judged by half j."""
    return frame[frame["selected_by"].isin(["", s]) & (frame["judged_by"] == j)]


def health_of(part: pd.DataFrame, j: str) -> pd.DataFrame:
    return halves[j].health(part).merge(part[["pruning", "method"]].drop_duplicates(), on="pruning")


def answered(frame: pd.DataFrame) -> pd.DataFrame:
    judged_by = {o: part_of(frame, s, o) for s, o in OTHER.items()}
    each = pd.concat([halves[o].gaps(p, n_perm=50).merge(health_of(p, o)) for o, p in judged_by.items()])
    each = each.assign(gap=lambda t: t["smd"].abs(), sampled_smd=lambda t: t["sampled_smd"].abs())
    wanted = ["gap", "floor", "covered", "unparsable", "distinct", "inliers", "sampled_smd"]
    return each.groupby("method")[wanted].mean()


def row(after: judge.Judged, method: str) -> dict:
    held, own = rows_of(after, method), rows_of(after, method, held_out=False)
    made = {"method": method, "parts": after.table["parts"][held].mean()}
    made |= {"ppl_ratio": damage_of(after, method), "removed_own": after.removed(own).point}
    return made | after.bias(held).row("directed") | after.removed(held).row("removed")


def rates(frame: pd.DataFrame) -> pd.DataFrame:
    after = by_half(frame)
    table = pd.DataFrame([row(after, m) for m in frame["method"].unique() if ";" not in m])
    return table.join(answered(frame), on="method")


after = by_half(swept)
sweep = run.frame("sweep", lambda: rates(swept))
sweep[["family", "share"]] = [m.rsplit(", ", 1) if m else ("unpruned", "0") for m in sweep["method"]]
shown = sweep.set_index(["family", "share"]).filter(regex="parts|ratio|gap|floor|^removed(?!_o)|cov|dist|inl")
shown.style.format(precision=3).format("{:,.0f}", subset="parts")

# %% [markdown]
# Names that didn't select. `gap` is the mean |SMD| over questions, as in the paper; noise alone gives
# `floor`.
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
# ## 4 Within one limit of damage, beside the controls
# For either half each method at the threshold that removes most among the names it was selected with, of
# those with a perplexity of at most `damage` × unpruned that still answer these names: at most
# `unparsable_more` more unparsable answers (the least harmful threshold if there is none).
# Controls: as many parts of the same layers, drawn at random; selected with the groups swapped (a slope has
# no direction to swap); selected with the names' labels shuffled. What a control removes too has nothing to
# do with these groups in particular: a slope under shuffled labels still points at whatever makes names
# differ, of which the groups' difference may be the largest part.

# %%
unparsable = {h: health_of(part_of(swept, h, h), h).groupby("method")["unparsable"].mean() for h in "AB"}
tried = pd.DataFrame(
    {
        **dict(zip(("family", "share"), m.rsplit(", ", 1), strict=True)),
        "method": m,
        "by": s,
        "ppl_ratio": damage_of(after, m, s),
        "parts": after.table["parts"][rows_of(after, m, by=s)].mean(),
        "removed_own": after.removed(rows_of(after, m, by=s, held_out=False)).point,
        "answers": unparsable[s][m] <= unparsable[s][""] + unparsable_more,
    }
    for m in swept["method"].unique()
    if m and ";" not in m
    for s in "AB"
)
tried["within"] = (tried["ppl_ratio"] <= damage) & (tried["parts"] > 0) & tried["removed_own"].notna()
tried["fair"] = tried["within"] & tried["answers"]
tried = tried.sort_values("removed_own", ascending=False, kind="stable")
able, strongest = tried[tried["fair"]], tried[tried["within"]].drop_duplicates("by").set_index("by")["method"]
order = pd.concat([able, tried.sort_values("ppl_ratio", kind="stable")])
chosen = order.drop_duplicates(["family", "by"]).set_index(["family", "by"]).sort_index()
kept_families = list(dict.fromkeys(tried["family"]))


half_of = {measure: half for half, measure in halves.items()}


def of_chosen(family: str, control, **seed: int):
    """A control of what was chosen for the half that selects."""
    return lambda lm, half: control(methods[chosen.loc[(family, half_of[half]), "method"]], **seed)(lm, half)


def controls(family: str) -> dict:
    made = {f"{family}; random {k}": of_chosen(family, parts.matched, seed=k) for k in range(control_draws)}
    if not family.endswith(("slope", "attention")):
        made[f"{family}; swapped"] = of_chosen(family, parts.relabelled)
    shuffles = range(0 if family.endswith("attention") else control_shuffles)
    return made | {f"{family}; shuffled {k}": of_chosen(family, parts.relabelled, seed=k) for k in shuffles}


beside_them = dict(chain(*(controls(family).items() for family in families)))
controlled = select_and_judge("controls", beside_them, list(OTHER.items()))
everything = pd.concat([swept, controlled[controlled["method"] != ""]])
after = by_half(everything)


# %%
def held_out(picked: dict) -> np.ndarray:
    return np.concatenate([rows_of(after, chosen.loc[(f, s), "method"], by=s) for s, f in picked.items()])


def more_than(kind: str, family: str, held: np.ndarray) -> dict:
    of = f"{family.split(', uniform')[0]}; {kind}"
    if not (named := [m for m in everything["method"].unique() if m.startswith(of)]):
        return {}
    row = after.more(held, [rows_of(after, m) for m in named]).row(f"against_{kind}")
    return {**row, f"{kind}_ppl_ratio": np.mean([damage_of(after, m) for m in named])}


def whole_row(family: str) -> dict:
    held, made = held_out({s: family for s in "AB"}), chosen.loc[family]
    row = {"family": family, "share": " / ".join(dict.fromkeys(made["share"])), "fair": made["fair"].all()}
    row |= {"parts": made["parts"].mean(), "ppl_ratio": made["ppl_ratio"].mean()}
    row |= after.removed(held).row("removed") | after.share(held).row("share_removed")
    for kind in kinds:
        row |= more_than(kind, family, held)
    return row


kinds = ("random", "swapped", "shuffled")
beside = run.frame("beside", lambda: pd.DataFrame([whole_row(f) for f in kept_families]))
shapes, ends = {"removed": "removed"}, ["", "_low", "_high"]
shapes |= {f"more than {c}": f"against_{c}" for c in kinds if f"against_{c}" in beside}
drawn = {what: beside[["family", *(f"{c}{end}" for end in ends)]] for what, c in shapes.items()}
drawn = [t.set_axis(["method", "smd", "low", "high"], axis=1).assign(what=w) for w, t in drawn.items()]
dots = {"low": "low", "high": "high", "panel": "what", "xlabel": "SMD removed, names to judge by"}
run.figure(figures.intervals(pd.concat(drawn), "smd", "method", **dots), "beside_controls")
shown = beside.set_index(["family", "share"]).filter(regex="parts|ratio|^removed(?!_o)|share_|against")
shown.style.format(precision=3, na_rep="–").format("{:,.0f}", subset="parts")

# %% [markdown]
# ## 5 Anomalous behaviour
# Names that didn't select. Of sampled answers, `inliers` as in the paper: the share inside the unpruned
# model's 5 – 95 % range (of its own answers, about .9). `sampled_smd`: mean |SMD| of these few answers, as
# the paper measures it; of given words the gap in standard deviations of names. `strongest`: whatever removes
# most among the selecting names within the limit of perplexity alone.

# %%
picks = chosen.reset_index()[["family", "by", "method"]]
picks = pd.concat([picks, strongest.reset_index().assign(family="strongest")])
picks = picks.merge(everything.rename(columns={"selected_by": "by"}), on=["method", "by"])
picks = picks.assign(method=picks["family"]).rename(columns={"by": "selected_by"}).drop(columns="family")
anomalies = answered(pd.concat([everything[everything["method"] == ""], picks]))
anomalies = run.frame(
    "anomalies", lambda: anomalies.rename(index={"": "unpruned"}).reset_index(names="family")
)
anomalies.drop(columns=["gap", "floor"]).style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# ## 6 Do the selections hang together?
# Share of one selection that another one makes too, at the thresholds above with one half of the names,
# against what chance gives.

# %%
made = {family: methods[chosen.loc[(family, "A"), "method"]](net, halves["A"]) for family in families}
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
# An effect is there if its interval lies above `smallest_effect`, and isn't if it lies below. Thresholds and
# methods are picked by the names that selections are made with, for either half, among those within the
# limits of perplexity and of unparsable answers, never by the names that they are judged by. B4 asks what
# the strongest does to answers when perplexity alone limits it.

# %%
gap, nothing = after.bias(rows_of(after, "")), Estimate(np.nan, np.array([np.nan]))
there, none = gap.interval()[0] > smallest_effect, "no threshold keeps within the limits"
works = beside[beside["fair"] & (beside["removed_low"] > smallest_effect)]
works = works[works["against_random_low"] > smallest_effect]
health = anomalies.set_index("family")


def effect(ours: Estimate, why: str, biased: bool = True) -> dict:
    low, high = ours.interval()
    said = verdict(reproduced=low > smallest_effect, refuted=high < smallest_effect, biased=biased)
    why = why if np.isnan(ours.point) else f"{why} {ours.point:.3f} ({low:.3f} – {high:.3f})"
    return {"ours": ours.point, "low": low, "high": high, "verdict": said, "why": why}


def best(kind: str = "") -> dict:
    """For either half, the family that removes most among its own names."""
    fair = able[able["family"].str.startswith(kind)].drop_duplicates("by").set_index("by")["family"]
    return fair.to_dict() if len(fair) == 2 else {}


def named(picked: dict | pd.Series) -> str:
    return " / ".join(dict.fromkeys(dict(picked).values()))


def removes(picked: dict) -> dict:
    if not picked:
        return effect(nothing, none, there)
    rows, good = held_out(picked), set(picked.values()) <= set(works["family"])
    row = effect(after.removed(rows), f"{named(picked)}, best among the selecting names:")
    share, ppl = after.share(rows), np.mean([chosen.loc[(f, s), "ppl_ratio"] for s, f in picked.items()])
    said = verdict(reproduced=good, refuted=share.interval()[1] < removed_share, biased=there)
    why = f"{row['why']}, {share.point:.0%} of the gap; perplexity × {ppl:.2f}; more than random: "
    return {**row, "verdict": said, "why": why + ("; ".join(works["family"]) or "none")}


def finer(kind: str) -> dict:
    fine, heads = best(kind), best("heads")
    if not (fine and heads):
        return effect(nothing, none, there)
    more = after.removed(held_out(fine)) - after.removed(held_out(heads))
    return effect(more, f"{named(fine)} − {named(heads)}:", there)


def as_usual(now: pd.Series, before: pd.Series) -> bool:
    inside = np.isnan(now["inliers"]) or now["inliers"] >= before["inliers"] - inliers_lost
    return bool(inside and now["unparsable"] <= before["unparsable"] + unparsable_more)


def anomalous() -> dict:
    rows = np.concatenate([rows_of(after, method, by=s) for s, method in strongest.items()])
    row, now = effect(after.removed(rows), f"{named(strongest)} removes"), health.loc["strongest"]
    usual, removes = as_usual(now, health.loc["unpruned"]), row["low"] > smallest_effect
    said = verdict(reproduced=removes and usual, refuted=removes and not usual, biased=there)
    why = f"{row['why']}; unparsable {now['unparsable']:.2f}"
    why += "" if words else f", inliers {now['inliers']:.2f}"
    ours = now["unparsable" if words else "inliers"]
    return {**effect(nothing, why), "ours": ours, "verdict": said}


verdicts = {
    "B1": effect(gap, "mean SMD"),
    "B2": removes(best()),
    "B3 neurons": finer("neurons"),
    "B3 weights": finer("weights"),
    "B4": anomalous() if len(strongest) == 2 else effect(nothing, none, there),
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
    "B4": (
        "Little anomalous behaviour",
        f"share of answers {'other than the given words' if words else 'in the unpruned 5 – 95 % range'}",
    ),
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
if save_pruned:
    taken = order[(order["by"] == "A") & (order["parts"] > 0) & order["family"].isin(families)].iloc[0]
    ends = [after.bias(rows_of(after, m, by="A")) for m in ("", taken["method"])]
    rows = [(f"SMD, {audit_context}, names of half B", ends[0].point, *ends[1].row("smd").values())]
    rows.append(("perplexity, × unpruned", 1.0, taken["ppl_ratio"], "–", "–"))
    way = f"{taken['method']}, selected with half A's names; limit of perplexity × {damage:g}"
    measured = pd.DataFrame(rows, columns=["measure", "before", "after", "95 % from", "to"])
    export(net, methods[taken["method"]](net, halves["A"]), save_pruned, method=way, measured=measured)

# %%
shown_tables = {
    "ways_to_ask": "Does the model answer? Ways to ask",
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
