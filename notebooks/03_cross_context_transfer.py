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
# # How far a fix transfers: from one context to the next
#
# **Paper.** Ma, Salinas, Henderson & Nyarko, *Breaking Down Bias: On The Limits of Generalizable Pruning Strategies*, FAccT 2025
# (arXiv 2502.07771): generalised pruning, within and across contexts.
#
# **Claim.** Pruning that is made for one question works for it. The more general a fix is meant to be, the less it does: less
# for other questions of the context, least in other contexts.
#
# **What is done here.** Parts are selected for every question, with one half of the names, and judged by the other half, at three levels:
# on the same question; what the context's *other* questions have in common; what all questions of *another* context have in
# common. The last gives a matrix, context by context, for heads, neurons and weights. Controls of the same size stand beside each.
#
# **Cost.** With the defaults (a small model with a planted truth): about a minute on two CPU cores, 1 GB. `params/smollm2.yaml`, the default of `make reproduce`:
# about 10 minutes on one core with AMX (several times as long without), 4 GB; exactly: the table of runs in `reports/`.
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
transfer_contexts: list = []  # contexts to compare; [] takes all
transfer_variations: int = 0  # questions per context; 0 takes all
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
transfer_methods: dict = {"heads, slope": 0.13, "neurons, slope": 0.006, "weights, Wanda": 0.2}  # methods of 02_neuron_pruning, and the share that each removes  # fmt: skip
protect_share: dict = {"heads": 0.3, "neurons": 0.01, "weights": 0.05}  # share of parts protected for their effect on prose (utility set)  # fmt: skip
protect_group: dict = {"heads": 0.125, "neurons": 1.0, "weights": 1.0}  # set difference: the share protected for the first group, in shares pruned for the second  # fmt: skip
transfer_draws: int = 1  # random and shuffled controls per selection
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
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
config = {name: globals()[name] for name in ["model", "revision", "dtype", "contexts_source", "names_source", "compare_by", "groups", "transfer_contexts", "transfer_variations", "corpus_name", "chat", "prefix", "suffix", "answer_tokens", "answer_temperature", "answer_top_k", "answer_seeds", "judge_seeds", "most_numbers", "log_values", "audit_window", "audit_tokens", "transfer_methods", "protect_share", "protect_group", "transfer_draws"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"03_cross_context_transfer-{model}-{compare_by}")
net = lm.load(model, revision=revision or None, dtype=dtype, device=device)
contexts, names = audit.load("contexts", contexts_source), audit.load("names", names_source)
contexts = audit.chosen(contexts, transfer_contexts, transfer_variations)
train_names, test_names = audit.halves(names, compare_by, groups)
names = pd.concat([train_names, test_names], ignore_index=True)
# results are kept for these tables and weights, not for their names alone
inputs = {
    "contexts": record.frame_sha256(contexts),
    "names": record.frame_sha256(names),
    "weights": net.revision,
}
run = record.Run(folder, {**config, "inputs": inputs}, notebook="03_cross_context_transfer")
run.note(provenance=record.provenance(net), data=inputs)
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "dtype", "layers", "heads", "parameters", "device", "commit"]
display(Markdown(
    f"{len(contexts)} questions in {contexts['context'].nunique()} contexts, {len(train_names)} names to select with, {len(test_names)} others to judge by."
))  # fmt: skip
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 Where is there a gap?
# Read off the model's distribution over numeric answers (see 02_neuron_pruning). The direction of each question's gap comes from the names that
# selections are made with; `directed` is the mean SMD in that direction among the other names. Without a gap there is nothing to transfer.

# %%
ask = {"suffix": suffix, "chat": chat, "prefix": prefix}
asked_train, asked_test = (audit.questions(net, contexts, some, **ask) for some in (train_names, test_names))
asked_all = pd.concat([asked_train, asked_test], ignore_index=True)
drawing = {
    "seeds": range(answer_seeds),
    "max_new_tokens": answer_tokens,
    "temperature": answer_temperature,
    "top_k": answer_top_k,
}
sampled = run.frame("sampled", lambda: audit.ask(net, asked_all, progress="answers", **drawing))
numbers = answers.candidates(net, sampled, most=most_numbers, log=log_values)
dist = run.frame(
    "distribution",
    lambda: answers.distribution(
        net, asked_all, numbers, temperature=answer_temperature, progress="distribution"
    ),
)
versus = {"by": compare_by, "groups": tuple(groups)}
each_train, each_test = (
    gaps.moments(dist[dist["name"].isin(some["name"])], log=log_values) for some in (train_names, test_names)
)
signs = gaps.directions(each_train, **versus)
start = run.frame(
    "start",
    lambda: (
        gaps.effects(each_test.assign(pruning=""), each_test, signs=signs, **versus)
        .mean(["context"])
        .drop(columns=["removed", "removed_low", "removed_high"])
    ),
)
start.style.hide(axis="index").format(precision=3).set_caption("Unpruned model, names to judge by")

# %% [markdown]
# ## 2 Select for every question, and what questions have in common

# %%
text_valid, text_test = (prompts.corpus(corpus_name, s) for s in ("valid", "test"))
cut = {"length": audit_window, "max_tokens": audit_tokens}
valid_windows, test_windows = (measure.windows(net, t, **cut) for t in (text_valid, text_test))
own = transfer.Audit(
    lm=net, sampled=sampled, numbers=numbers, utility=weightscores.prose(valid_windows), windows=test_windows,
    log=log_values, temperature=answer_temperature, protect=protect_share, q=protect_group, most=most_numbers,
    drawing={"seeds": range(judge_seeds), "max_new_tokens": answer_tokens, "top_k": answer_top_k}, **versus,
)  # fmt: skip
labels = ["own", *(f"{c} {k}" for k in range(transfer_draws) for c in ("random", "shuffled")), "swapped"]
jobs = [
    (m, k) for m in transfer_methods for k in labels if k != "swapped" or transfer.METHODS[m][1] != "slope"
]


def judged(method: str, label: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    file = record.slug(f"{method} {label}".replace(",", "").replace(" ", "_"))
    return run.frame_pair(
        file,
        lambda: own.judge_levels(method, transfer_methods[method], label, asked_train, asked_test),
        ("moments", "health"),
    )


base, base_health = run.frame_pair(
    "unpruned", lambda: own.evaluate({"": ablate.Pruning()}, asked_test), ("moments", "health")
)
done = [judged(m, k) for m, k in jobs]
each, health = (pd.concat(x, ignore_index=True) for x in zip(*done, strict=True))
health["level"] = pd.Categorical(health["level"], transfer.LEVELS)
sizes = health.groupby(["method", "label", "level"], sort=False, observed=True)["parts"].agg(["mean", "min"])
sizes.unstack("level").style.format(precision=0, thousands=",", na_rep="–").set_caption(
    "Parts removed (mean, and fewest): what questions have in common gets less"
)

# %% [markdown]
# ## 3 Levels of generality
# SMD removed, in the direction known from the other names, averaged over all questions, with 95 % intervals over names; beside it what the controls
# remove. 0: nothing; the whole gap is `directed` above.

# %%
whole = gaps.effects(each, base.drop(columns="pruning"), signs=signs, **versus)
by_level = whole.mean(["method", "label", "level"])
health["ppl_ratio"] = health["ppl"] / base_health["ppl"].iloc[0]
well = health.groupby(["method", "label", "level"], observed=True)[
    ["ppl_ratio", "inliers", "distinct"]
].mean()
by_level = run.frame("levels", lambda: by_level.merge(well.reset_index(), on=["method", "label", "level"]))
columns = ["method", "label", "level", "questions", "removed", "removed_low", "removed_high", "gap", "floor", "off", "ppl_ratio", "inliers", "distinct"]  # fmt: skip
display(by_level[columns].style.hide(axis="index").format(precision=3, na_rep="–").set_caption("SMD removed by level; label: own, or a control"))  # fmt: skip
figure = figures.removed_by_level(by_level, transfer.LEVELS)
figures.save(figure, folder / "figures", "levels")

# %% [markdown]
# ## 4 The transfer matrix
# Selected for the row's context, judged in the column's: SMD removed. Bold: its 95 % interval over names lies above 0; in brackets what random
# parts of the same number remove.

# %%
crossed = whole.mean(["method", "label", "level", "selected_for", "context"]).rename(
    columns={"context": "judged_in"}
)
matrix = run.frame(
    "matrix", lambda: crossed[crossed["level"].isin(transfer.LEVELS[2:])].drop(columns="level")
)
figure = figures.transfer_matrix(matrix)
figures.save(figure, folder / "figures", "transfer_matrix")

# %% [markdown]
# ## 5 The published figures

# %%
published = run.frame("published", transfer.published_heads)
display(Markdown(
    "Mean |SMD| over products, Llama-3-8B-Instruct, heads pruned; read off the figures of the authors' public notebook, which is older than the paper and prunes by attention to the name."
    if len(published) else "The published figures aren't at hand (`BIASPRUNE_PUBLISHED` names no folder): this part is left out."
))  # fmt: skip
published.style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 6 Verdict
# "Transfer deteriorates" needs a fix that works where it was made, and does less elsewhere, both beyond noise. What a context's questions have in common
# removes fewer parts than a question's own selection, so some of `lost` is size; `lost_between` compares one pruning in its own and in
# other contexts.

# %%
verdicts = run.frame("verdicts", lambda: transfer.fading(whole, by_level))
display(verdicts.style.hide(axis="index").format(precision=2, na_rep="–"))
clear = start.loc[start["directed_low"] > 0, "context"].tolist()
sentence = f"{model}, {groups[0]} against {groups[1]}: a gap beyond noise in {len(clear)} of {len(start)} contexts ({', '.join(clear) or 'none'}). The effect of pruning fades from the same question to another context: " + "; ".join(f"{r.method}: **{r.verdict}**" for r in verdicts.itertuples()) + "."  # fmt: skip
display(Markdown(sentence))

# %% tags=["truth"]
truth_file = Path(net.folder or ".") / "truth.json"
planted = json.loads(truth_file.read_text()).get("circuits") if truth_file.is_file() else None
if planted and "neurons, slope" in transfer_methods:
    shared = {(a, b): planted[a] == planted[b] for a in planted for b in planted}
    cells = matrix[(matrix["method"] == "neurons, slope") & (matrix["label"] == "own")]
    alike = [shared[(r.selected_for, r.judged_in)] for r in cells.itertuples()]
    whole_gap = start.set_index("context")["directed"].loc[cells["judged_in"]].to_numpy()
    most = cells["removed"].to_numpy() > whole_gap / 2
    inside = sum(m for m, a in zip(most, alike, strict=True) if a)
    outside = sum(m for m, a in zip(most, alike, strict=True) if not a)
    display(Markdown(f"This model's contexts were trained to share a circuit or not. Neurons by slope remove most of the gap in {inside} of {sum(alike)} pairs that share one, and in {outside} of {len(alike) - sum(alike)} that don't."))  # fmt: skip
    assert inside == sum(alike) and outside == 0

# %%
run.finish(
    about=f"{contexts['context'].nunique()} contexts, {groups[0]} − {groups[1]}",
    sentence=sentence,
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "start": "Gap of the unpruned model by context, names to judge by",
        "verdicts": "SMD removed on the same question and in another context (95 % over names)",
        "published": "Published: mean |SMD| over products, Llama-3-8B-Instruct",
    },
    figures={
        "levels": "SMD removed by level of generality, per method, beside the controls",
        "transfer_matrix": "Transfer matrix: SMD removed, selected for one context and judged in another",
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
