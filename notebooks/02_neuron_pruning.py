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
# **Paper.** Ma, Salinas, Henderson & Nyarko, *Breaking Down Bias: On The Limits of Generalizable Pruning Strategies*, FAccT 2025
# (arXiv 2502.07771): the audit, head against neuron pruning, anomalous behaviour.
#
# **Claim.** Asked for a number about a person, such as a first offer, an instruct model answers differently for names that signal different
# groups. Removing what matters for one group's answers and not for the other's shrinks the gap; single weights (the paper's
# "neurons") do so better than attention heads, without much anomalous behaviour.
#
# **What is done here.** The gap is read off the model's *distribution* over numeric answers, without sampling noise, and checked against
# sampled answers. Parts are selected with one half of the names and judged by the other half. Heads, neurons (MLP units) and weights
# are compared within the same limit of perplexity. Three controls stand beside every method: as many parts drawn at random, the groups
# swapped, the labels shuffled.
#
# **Cost.** With the defaults (a small model with a planted truth): about a minute on two CPU cores, 1 GB. `params/smollm2.yaml`, the default of `make reproduce`:
# about 12 minutes on one core with AMX (several times as long without), 5 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** First names stand for groups of people here, as in the studies they come from, and model answers about them differ.

# %% tags=["parameters"]
model: str = "planted-audit"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
contexts_source: str = "models/planted-audit/contexts.csv"  # biasprune, or a CSV file
names_source: str = "models/planted-audit/names.csv"  # biasprune, or a CSV file
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
answer_seeds: int = 8  # sampled answers per name and question (paper: 100)
judge_seeds: int = 4  # sampled answers of pruned models, which say what numbers they come to
most_numbers: int = 12  # numbers whose probability is read off, per question
log_values: bool = True  # compare logarithms of the answers
audit_window: int = 64  # tokens per perplexity window
audit_tokens: int = 1024  # tokens of text for perplexity, and as a utility set
part_shares: dict = {"heads": [0.07, 0.13, 0.19], "neurons": [0.002, 0.004, 0.008, 0.02], "weights": [0.02, 0.05, 0.1]}  # parts by slope: the share removed; by set difference: p  # fmt: skip
protect_share: dict = {"heads": 0.3, "neurons": 0.01, "weights": 0.05}  # share of parts protected for their effect on prose (utility set)  # fmt: skip
protect_group: dict = {"heads": 0.125, "neurons": 1.0, "weights": 1.0}  # set difference: the share protected for the first group, in shares pruned for the second  # fmt: skip
damage: float = 1.1  # perplexity limit, × unpruned, at which methods are compared
control_draws: int = 3  # random controls per method
control_shuffles: int = 1  # controls with shuffled labels per method
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import functools
import itertools
import json
import warnings
from pathlib import Path

import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import (
    ablate,
    answers,
    audit,
    figures,
    gaps,
    lm,
    measure,
    prompts,
    record,
    transfer,
    weightscores,
)

warnings.filterwarnings("ignore", message=".*IProgress.*")
warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
dtype = lm.number_format(dtype, device)
config = {name: globals()[name] for name in ["model", "revision", "dtype", "contexts_source", "names_source", "compare_by", "groups", "audit_context", "max_variations", "corpus_name", "chat", "prefix", "suffix", "answer_tokens", "answer_temperature", "answer_top_k", "answer_seeds", "judge_seeds", "most_numbers", "log_values", "audit_window", "audit_tokens", "part_shares", "protect_share", "protect_group", "damage", "control_draws", "control_shuffles"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"02_neuron_pruning-{model}-{compare_by}")
net = lm.load(model, revision=revision or None, dtype=dtype, device=device)
contexts, names = audit.load("contexts", contexts_source), audit.load("names", names_source)
contexts = audit.chosen(contexts, [audit_context], max_variations)
train_names, test_names = audit.halves(names, compare_by, groups)
names = pd.concat([train_names, test_names], ignore_index=True)
# results are kept for these tables and weights, not for their names alone
inputs = {
    "contexts": record.frame_sha256(contexts),
    "names": record.frame_sha256(names),
    "weights": net.revision,
}
run = record.Run(folder, {**config, "inputs": inputs}, notebook="02_neuron_pruning")
run.note(provenance=record.provenance(net), data=inputs)
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "dtype", "layers", "heads", "parameters", "device", "commit"]
display(Markdown(
    f"{len(contexts)} questions, {len(train_names)} names to select with, {len(test_names)} others to judge by. For example: *{contexts['question'].iloc[0]}*"
))  # fmt: skip
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 Does the model answer with numbers?
# Sampled answers, asked in each way that the model allows. `unparsable` is the share without a number, `distinct` the number of different
# answers to a question.

# %%
drawing = {"seeds": range(answer_seeds), "max_new_tokens": answer_tokens, "temperature": answer_temperature, "top_k": answer_top_k}  # fmt: skip
few = train_names.groupby(compare_by).head(4)
choice = run.frame("ways_to_ask", lambda: audit.ways(net, contexts, few, suffix, **drawing))
used = (choice["chat"] == chat) & (choice["prefix"] == prefix)
choice.assign(used_below=used).style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 2 Is there a gap?
# SMD: difference of the groups' means over the pooled standard deviation of answers, for the logarithm of the answer where
# `log_values` is set; intervals draw names, which are the sample. The paper samples answers. Here the candidates come from sampled answers over all
# names, and each name's probability of every candidate is then read off: the SMD that infinitely many answers would give, among these numbers.

# %%
ask = {"suffix": suffix, "chat": chat, "prefix": prefix}
asked_train, asked_test = (audit.questions(net, contexts, some, **ask) for some in (train_names, test_names))
asked_all = pd.concat([asked_train, asked_test], ignore_index=True)
sampled = run.frame("sampled", lambda: audit.ask(net, asked_all, progress="answers", **drawing))
numbers = answers.candidates(net, sampled, most=most_numbers, log=log_values)
reading = {"temperature": answer_temperature}
dist = run.frame(
    "distribution",
    lambda: answers.distribution(net, asked_all, numbers, progress="distribution", **reading),
)
versus = {"by": compare_by, "groups": tuple(groups)}
found = run.frame("gaps", lambda: pd.concat([
    gaps.gaps(sampled, log=log_values, **versus).assign(measured="sampled"),
    gaps.gaps(dist, log=log_values, **versus).assign(measured="distribution"),
], ignore_index=True))  # fmt: skip
columns = ["measured", *gaps.QUESTION, "smd", "low", "high", "emd", *[f"median_{g}" for g in groups], "unparsable", "distinct"]  # fmt: skip
display(
    found[columns]
    .style.hide(axis="index")
    .format(precision=2)
    .set_caption("Gap of the unpruned model, all names")
)
figure = figures.smd_by_question(found, groups)
figures.save(figure, folder / "figures", "gaps")

# %%
sides = {b: names[b].value_counts().loc[lambda c: c >= 2].index[:2] for b in ("race", "gender")}
both = [(b, tuple(sorted(g))) for b, g in sides.items() if len(g) == 2]
every = gaps.moments(dist, log=log_values).assign(pruning="")
overview = run.frame("overview", lambda: pd.concat([
    gaps.effects(every, every.drop(columns="pruning"), by=b, groups=g, signs=gaps.directions(every.drop(columns="pruning"), by=b, groups=g) ** 2)
    .mean(["context"])[["context", "questions", "gap", "floor", "directed", "directed_low", "directed_high"]]
    .assign(comparison=f"{g[0]} − {g[1]}")
    for b, g in both
]))  # fmt: skip
overview.style.hide(axis="index").format(precision=3).set_caption("Mean over questions, all names, by race and by gender: mean |SMD| beside what shuffled labels give, and the mean SMD (directed) with its interval")  # fmt: skip

# %% [markdown]
# `unparsable` of a distribution is the probability of anything but the candidates. The two halves of the names should agree on the direction of a gap;
# directions below are taken from the names that selections are made with, so that noise among the others doesn't count as bias.

# %%
each_train = gaps.moments(dist[dist["name"].isin(train_names["name"])], log=log_values)
signs = gaps.directions(each_train, **versus)
each_test = gaps.moments(dist[dist["name"].isin(test_names["name"])], log=log_values)
start = gaps.effects(each_test.assign(pruning=""), each_test, signs=signs, **versus).mean(["context"])
agree = float((gaps.directions(each_test, **versus) == signs).mean())
display(Markdown(f"Directions agree between the halves for {agree:.0%} of the questions."))
start[["context", "questions", "gap", "floor", "directed", "directed_low", "directed_high"]].style.hide(axis="index").format(precision=3).set_caption("Unpruned model, names to judge by: mean |SMD|, what shuffled labels give, and the mean SMD in the other names' direction")  # fmt: skip

# %% [markdown]
# ## 3 Select
# | method | removes |
# |---|---|
# | set difference | the top share p by SNIP on one group's answers, minus the top `protect_group` × p on the other group's, minus the top `protect_share` on prose |
# | Wanda | the same by Wanda scores, from every output row |
# | as published | Wanda with every layer scored on the embeddings, no prose, and models pruned in place one question after the other |
# | slope | the parts that add most to the gap to first order (∂SMD/∂mask), outside those that matter most for prose |
#
# Heads are chosen from the whole model, neurons from every layer by set difference and from the whole model by slope, weights from every
# matrix. Each is tried at several thresholds. The group whose answers are pruned for is the second one.

# %%
text_valid, text_test = (prompts.corpus(corpus_name, s) for s in ("valid", "test"))
cut = {"length": audit_window, "max_tokens": audit_tokens}
valid_windows, test_windows = (measure.windows(net, t, **cut) for t in (text_valid, text_test))
own = transfer.Audit(
    lm=net, sampled=sampled, numbers=numbers, utility=weightscores.prose(valid_windows), windows=test_windows,
    log=log_values, temperature=answer_temperature, protect=protect_share, q=protect_group, most=most_numbers,
    drawing={"seeds": range(judge_seeds), "max_new_tokens": answer_tokens, "top_k": answer_top_k}, **versus,
)  # fmt: skip


@functools.cache
def selected(name: str, *shares: float) -> list[ablate.Pruning]:
    return own.select(name, asked_train, shares)


def evaluated(name: str, make, asked: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Selects and evaluates, or reads what an earlier run has stored."""
    file = record.slug(name.replace(",", "").replace(" ", "_"))
    return run.frame_pair(file, lambda: own.evaluate(make(), asked, progress=name), ("moments", "health"))


def sweep(name: str) -> dict[str, ablate.Pruning]:
    shares = part_shares[transfer.granularity(name)]
    return {f"{name}, {p}": made for p, made in zip(shares, selected(name, *shares), strict=True)}


def at_share(name: str) -> ablate.Pruning:
    """The method's selection at the threshold that was chosen for it."""
    shares = part_shares[transfer.granularity(name)]
    return selected(name, *shares)[shares.index(share_of[name])]


parts = [evaluated("unpruned", lambda: {"": ablate.Pruning()}, asked_all)]
parts += [evaluated(name, lambda n=name: sweep(n), asked_all) for name in transfer.METHODS]
each, health = (pd.concat(x, ignore_index=True) for x in zip(*parts, strict=True))
on_train, on_test = (each[each["name"].isin(some["name"])] for some in (train_names, test_names))
base_train, base_test = (t[t["pruning"] == ""].drop(columns="pruning") for t in (on_train, on_test))
table = gaps.effects(on_test, base_test, signs=signs, **versus).mean(["pruning"])
chosen_by = (
    gaps.effects(on_train, base_train, signs=signs, **versus)
    .mean(["pruning"])
    .set_index("pruning")["removed"]
)
of_pruning = health.groupby("pruning", sort=False)
table = table.merge(of_pruning[["parts", "ppl", "distinct", "inliers"]].mean(), on="pruning")  # fmt: skip
table["ppl_ratio"] = table["ppl"] / table.loc[table["pruning"] == "", "ppl"].iloc[0]
table["method"], table["share"] = zip(*(p.rsplit(", ", 1) if p else ("unpruned", "0") for p in table["pruning"]), strict=True)  # fmt: skip
run.frame("sweep", lambda: table)
columns = ["method", "share", "parts", "ppl_ratio", "gap", "floor", "removed", "removed_low", "removed_high", "off", "distinct", "inliers"]  # fmt: skip
table[columns].style.hide(axis="index").format(precision=3).format(precision=0, thousands=",", subset="parts").set_caption("Names to judge by")  # fmt: skip

# %% [markdown]
# `gap` is the mean |SMD| over questions, as in the paper; noise alone gives `floor`. `removed` is how much of the SMD is gone, in the direction
# known from the other names, with 95 % intervals over names (0: nothing; below 0: the gap grew). Each pruned model is read off for the numbers that it
# comes to itself. Beside it the health: `off`, the probability of anything but those numbers; of sampled answers `distinct`, different numbers per
# question, and `inliers`, the share inside the unpruned model's 5 – 95 % range; `ppl_ratio`, perplexity on prose.

# %%
figure = figures.gap_against_damage(table, damage)
figures.save(figure, folder / "figures", "gap_against_damage")

# %% [markdown]
# ## 4 Within one limit of perplexity, beside the controls
# Each method at the threshold that removes most among the names it was selected with, of those with a perplexity of at most `damage` × unpruned
# (the least harmful threshold if there is none). Controls:
# as many parts of the same layers, drawn at random; selected with the groups swapped (a slope has no direction to swap); selected with
# the names' labels shuffled. What a control removes too has nothing to do with these groups in particular: a slope under shuffled labels
# still points at whatever makes names differ, of which the groups' difference may be the largest part.

# %%
table["removed_train"] = table["pruning"].map(chosen_by)
share_of = {}
for m in transfer.METHODS:
    tried = table[table["method"] == m]
    fair = tried[(tried["ppl_ratio"] <= damage) & (tried["parts"] > 0) & tried["removed_train"].notna()]
    best = fair["removed_train"].idxmax() if len(fair) else tried["ppl_ratio"].idxmin()
    share_of[m] = float(table.loc[best, "share"])


def controls(name: str) -> dict[str, ablate.Pruning]:
    others = own.controls(name, asked_train, share_of[name], at_share(name), control_draws, control_shuffles)
    return {f"{name}; {control}": pruning for control, pruning in others.items()}


beside = [
    evaluated(f"controls of {name} at {share_of[name]}", lambda n=name: controls(n), asked_test)
    for name in transfer.METHODS
]
each_all = pd.concat([on_test, *(a for a, _ in beside)], ignore_index=True)
health_all = pd.concat([health, *(b for _, b in beside)], ignore_index=True)
whole = gaps.effects(each_all, base_test, signs=signs, **versus)


chosen = run.frame("equal_damage", lambda: transfer.beside_controls(
    whole, table, {m: f"{m}, {share_of[m]}" for m in transfer.METHODS}, health_all
))  # fmt: skip
slim = ["method", "share", "parts", "ppl_ratio", "removed", "removed_low", "removed_high", "against_random", "against_random_low", "against_random_high", "against_swapped", "against_shuffled", "random_ppl_ratio", "off"]  # fmt: skip
beside_table = run.frame("beside", lambda: chosen[slim])
display(beside_table.style.hide(axis="index").format(precision=3, na_rep="–").format(precision=0, thousands=",", subset="parts").set_caption("SMD removed, and how much more than by the controls"))  # fmt: skip
figure = figures.removed_beside_controls(chosen)
figures.save(figure, folder / "figures", "beside_controls")

# %% [markdown]
# ## 5 Anomalous behaviour: sampled answers after pruning
# What users would see, names to judge by. `inliers` as in the paper: the share of answers inside the unpruned model's 5 – 95 % range (of its own
# answers, about .9).

# %%
after = health_all.groupby("pruning", sort=False)[["unparsable", "distinct", "inliers", "ppl"]].mean()
after["mean_smd"] = health_all["smd"].abs().groupby(health_all["pruning"]).mean()
anomalies = (
    after.loc[["", *chosen["pruning"]]].set_axis(["unpruned", *chosen["method"]]).rename_axis("method")
)
run.frame("anomalies", lambda: anomalies.reset_index())
anomalies.style.format(precision=3).set_caption(
    "mean_smd: mean |SMD| of these few answers, as the paper measures it"
)

# %% [markdown]
# ## 6 Do the selections hang together?
# Share of one selection that another one makes too, at the thresholds above, against what chance gives.

# %%
made = {m: at_share(m) for m in transfer.METHODS}
counts = {"heads": net.anatomy.n_flat, "neurons": net.anatomy.n_layers * net.anatomy.n_units}
counts["weights"] = sum(
    lm.weight_of(m).numel()
    for i in range(net.anatomy.n_layers)
    for m in weightscores.linears(net, i).values()
)
rows = []
for a, b in itertools.combinations(transfer.METHODS, 2):
    if (what := transfer.granularity(a)) == transfer.granularity(b):
        x, y = len(made[a]), len(made[b])
        row = {"a": a, "b": b, "parts of a": x, "parts of b": y}
        row["common"] = len(made[a] & made[b]) / max(1, min(x, y))
        rows.append({**row, "chance": max(x, y) / counts[what]})
overlap = run.frame("overlap", lambda: pd.DataFrame(rows))
overlap.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 7 Verdict

# %%
verdicts = run.frame("verdicts", lambda: transfer.verdicts(whole, chosen, anomalies, start.iloc[0], damage))
display(verdicts.style.hide(axis="index").format(precision=2))
sentence = f"{model}, {audit_context}, {groups[0]} against {groups[1]}. " + " ".join(
    f"{r.claim}: **{r.verdict}** ({r.why})." for r in verdicts.itertuples()
)
display(Markdown(sentence))

# %% tags=["truth"]
truth_file = Path(net.folder or ".") / "truth.json"
planted = json.loads(truth_file.read_text()).get("circuits") if truth_file.is_file() else None
if planted:
    right = {(a, b) for a, b in planted[audit_context]}
    hits = {m: {tuple(x) for x in made[m].units.nonzero().tolist()} & right for m in transfer.METHODS if transfer.granularity(m) == "neurons"}  # fmt: skip
    display(Markdown(f"This model's gap was trained into {len(right)} units; found: " + ", ".join(f"{m} {len(h)}" for m, h in hits.items()) + "."))  # fmt: skip
    assert len(hits["neurons, slope"]) >= len(right) / 2, "the slope must find most of what was planted"

# %%
run.finish(
    about=f"{audit_context}, {groups[0]} − {groups[1]}",
    sentence=sentence,
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "ways_to_ask": "Does the model answer with numbers? Ways to ask",
        "overview": "Mean SMD over the questions of this context, all names (directed: with its sign; floor: mean |SMD| of shuffled labels)",
        "beside": f"SMD removed at the chosen thresholds, names to judge by, and how much more than the controls remove (95 %); with a ppl_ratio above {damage:g} it isn't judged",
        "anomalies": "Sampled answers after pruning",
        "verdicts": "Claims",
    },
    figures={
        "gap_against_damage": "SMD removed against perplexity, per method",
        "beside_controls": "SMD removed at the chosen thresholds, beside the controls",
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
