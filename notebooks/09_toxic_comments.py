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
# # Toxic comments: fight bias in the pre-trained model, or in the fine-tuning data?
#
# **Paper.** Baksi, Singh & Joshi, *Downstream bias mitigation is all you need*, 2024 (arXiv 2408.00612), its second task; notebook 05 has the first, occupations. Neither levels nor
# results are published, so this is a reproduction of claims: every level below is a parameter. Measures of Dixon et al., AIES 2018, and Borkan et al., WWW 2019.
#
# **Claims.** As in 05. C1: interventions on the pre-trained model barely change the bias of what is fine-tuned from it. C2: the fine-tuning data matters more.
# C3a (Baksi et al.): even slight changes of how often a group and toxicity occur together matter. C3b (Steed et al., ACL 2022, the opposite): such changes do nothing once
# the model is pre-trained. C4: pre-training matters all the same.
#
# **What is done here.** Interventions on the model with the data as they are, and on the data with the plain model; with the levels of `crossed` also both; several seeds of each. "debiased" takes
# out the direction in which sentences differ that name other groups. Bias is how much rates of false alarms and of misses differ between the groups
# that comments are about; beside it stand phrases that differ in the group they name and in nothing else. Every effect is paired by seed with the plain pre-trained model. Seeds split one set of comments anew.
#
# **Cost.** With the defaults (a tiny model, a few hundred comments): less than a minute on a CPU core, 1 GB. `params/smollm2.yaml`, the default of `make reproduce`:
# about 8 minutes on one core with AMX (several times as long without), 2 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** The comments, which people wrote, and half of the phrases, which are ours, insult groups of people or stereotype them. None is shown here.

# %% tags=["parameters"]
classifier: str = "tiny-bert"  # minilm (packaged encoder), a packaged decoder, small model, folder, or hub id
comments: str = "reddit"  # RedditBias; or a folder, file or hub id of other comments, see toxicity.wikipedia
comments_train: int = 300  # training comments, at most; equally many toxic and other ones
comments_dev: int = 100  # comments that choose the epoch, at most
comments_test: int = 300  # test comments, at most; the phrases come on top
comments_least: int = 10  # groups with fewer test comments of either label are joined, and named
upstreams: list = ["pretrained", "randomized", "debiased"]  # interventions on the model
perturb_scales: list = [0.5]  # noise of "perturbed", in standard deviations of each matrix
data_changes: list = ["scrubbed", "rebalanced"]  # interventions on the data, on the plain model
strengths: list = [0.25, 1.0]  # λ, how far every group's share of toxic comments moves towards that of all
slight: float = 0.25  # changes up to this λ count as slight
crossed: list = ["randomized"]  # interventions on the model that are combined with every λ
class_seeds: list = [0, 1]  # of the head, of the order, and of what is drawn
class_epochs: int = 3  # paper's protocol: 10
class_rate: float = 2e-3  # learning rate (protocol: 5e-5)
class_batch: int = 32  # texts per step (protocol: 64)
class_length: int = 48  # longest text in tokens (protocol: 128)
class_bf16: bool = False  # mixed precision, where the device computes in bfloat16
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import warnings
from pathlib import Path

import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import classify, figures, lm, mitigation, progress, record, toxicity

warnings.filterwarnings("ignore", message=".*IProgress.*")
warnings.filterwarnings("ignore", message=".*pin_memory.*")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
class_bf16 = class_bf16 and lm.has_bfloat16()
config = {name: globals()[name] for name in ["classifier", "comments", "comments_train", "comments_dev", "comments_test", "comments_least", "upstreams", "perturb_scales", "data_changes", "strengths", "slight", "crossed", "class_seeds", "class_epochs", "class_rate", "class_batch", "class_length", "class_bf16"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"09_toxic_comments-{classifier}")
sizes = {"train": comments_train, "dev": comments_dev, "test": comments_test, "least": comments_least}
tables = {seed: toxicity.load(comments, seed=seed, **sizes) for seed in class_seeds}
name = comments if comments == "reddit" else Path(comments).name
inputs = {f"{name}, seed {seed}": record.frame_sha256(t) for seed, t in tables.items()}
run = record.Run(folder, {**config, "inputs": inputs}, notebook="09_toxic_comments")
described = classify.describe(classifier)
run.note(provenance={**record.provenance(), "device": described["device"], "model": described}, data=inputs)
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "layers", "parameters", "device", "commit"]
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 Texts
# `reddit` (RedditBias, Barikeri et al., ACL 2021): comments about five groups. What we call toxic there was annotated as **biased against the group**, which is mostly a stereotype and
# seldom an insult. A classifier that learns this has not learned what an insult is: of our phrases, half of which are plain insults, it may understand nothing. The phrases are meant
# for classifiers trained on Wikipedia comments, which take the parameter `comments` (a folder with the Talk Labels or Jigsaw's train.csv, or a hub id). Section 3 computes whether
# figures on phrases can be read in this run.
#
# Groups differ in how many of the comments about them are toxic (`toxic`): a classifier can learn the group instead of the text. That is what the interventions on the data change.

# %%
texts = run.frame("texts", lambda: pd.concat(tables, names=["seed"]).groupby(["part", "split", "group"], sort=False)["label"]
    .agg(texts=lambda x: len(x) / len(tables), toxic=lambda x: (x == "toxic").mean()).reset_index())  # fmt: skip
display(texts[texts["part"] == "comments"].drop(columns="part").style.hide(axis="index").format(precision=2, thousands=",", subset=["toxic"]).format("{:,.0f}", subset=["texts"]))  # fmt: skip
joined = f"“{toxicity.REST}”: comments that name no term, or one with fewer than {comments_least} test comments of either label."  # fmt: skip
Markdown(joined if (texts["group"] == toxicity.REST).any() else "Every group has enough comments.")

# %% [markdown]
# ## 2 The grid
# Every cell fine-tunes the whole model and classifies the test comments and the phrases; a cell that is done is never computed again, and one that was stopped goes on after its last
# epoch. Seeds also draw the comments, so that intervals over seeds hold the sampling of training and test comments.

# %%
grid = mitigation.settings(upstreams, data_changes, strengths, perturb_scales, crossed)
recipe = classify.Recipe(epochs=class_epochs, learning_rate=class_rate, batch=class_batch, length=class_length, bf16=class_bf16)  # fmt: skip
todo = [(at, seed) for seed in class_seeds for at in grid]


def one(at: classify.Setting, seed: int) -> pd.DataFrame:
    data = mitigation.prepared(tables[seed], at, seed, toxicity)
    where = folder / "checkpoint" / run.key[:16] / record.slug(f"{at.name}-{seed}")
    options = {"score": "toxic", "contrasts": toxicity.contrasts()}
    return classify.cell(classifier, at, *data, recipe, seed=seed, folder=where, **options)


done = {
    (at.name, seed): run.frame(record.slug(f"cell-{at.name}-{seed}"), lambda at=at, seed=seed: one(at, seed))
    for at, seed in progress.bar(todo, desc="cells")
}
display(Markdown(f"{len(done)} cells: {len(grid)} settings × {len(class_seeds)} seeds."))


# %%
def outcomes(part: str) -> pd.DataFrame:
    own = {k: t[t["part"] == part] for k, t in done.items()}
    rows = [mitigation.outcome_toxicity(own[at.name, seed], at, seed, paired=part == "phrases") for at, seed in todo]  # fmt: skip
    return pd.DataFrame(rows).assign(data_name=f"{name}: {part}")


cells = run.frame("cells", lambda: outcomes("comments"))
phrases = run.frame("phrases", lambda: outcomes("phrases"))

# %% [markdown]
# ## 3 What the plain classifier does
# Means over seeds. `fpr` of comments that aren't toxic, the share called toxic; `fnr` of toxic ones, the share called other. `fped` = Σ |FPR − FPR of a group|, `fned` the
# same of FNR (Dixon et al.): never below 0, so `fped_floor` and `fned_floor` say what chance alone gives. `excess`: mean over groups of (rate − mean rate)², less its sampling
# variance, mean of both rates; 0 on average where groups don't differ. `p`: of as large an excess where groups are permuted. `p_auc`: of as large an AUC where scores say nothing.
#
# Comments about different groups are different texts, and some are harder than others: part of their excess may be no bias. Phrases are the same for every term.
#
# `auc` by group (Borkan et al.): `subgroup` of its texts alone; `bpsn` low if its other texts draw false alarms; `bnsp` low if insults of it are missed.

# %%
measures = ["accuracy", "auc", "p_auc", "fpr", "fnr", "fped", "fped_floor", "fned", "fned_floor", "excess", "p"]  # fmt: skip
plain = {t["data_name"].iloc[0]: t[t["setting"] == "pretrained, none"] for t in (cells, phrases)}
levels = run.frame("plain", lambda: pd.DataFrame({k: t[measures].mean() for k, t in plain.items()}).T.rename_axis("texts").reset_index())  # fmt: skip
display(levels.style.hide(axis="index").format(precision=3))


def groups(part: str) -> pd.DataFrame:
    own = [done["pretrained, none", s].query("part == @part") for s in class_seeds]
    return pd.concat(map(toxicity.by_term, own)).groupby("term").mean().reset_index()


for part in ("comments", "phrases"):
    display(run.frame(f"groups-{part}", lambda part=part: groups(part)).style.hide(axis="index").format(precision=2).format("{:,.0f}", subset=["n"]))  # fmt: skip

# %% [markdown]
# **Can the phrases be read?** A classifier that can't tell toxic phrases from others may still react to terms, but that says nothing about bias in telling toxic texts. So we ask for the same as of settings in the verdict (half of the margin over chance that it has on its own comments), and that phrases are told apart at all
# (p of the AUC, over templates, median over seeds).

# %%
own, rest = plain.values()
margin = rest["accuracy"].mean() - 0.5
readable = bool(margin >= 0.5 * (own["accuracy"].mean() - 0.5) > 0 and rest["p_auc"].median() < 0.05)
found = f"on phrases: accuracy {margin + 0.5:.2f}, AUC {rest['auc'].mean():.2f} (p = {rest['p_auc'].median():.2f}); on comments: accuracy {own['accuracy'].mean():.2f}"  # fmt: skip
meaning = "Figures on phrases can be read" if readable else "The plain classifier is near chance on phrases, so figures on them say nothing about bias in telling toxic texts"  # fmt: skip
Markdown(f"**{meaning}** ({found}).")

# %% [markdown]
# ## 4 What every intervention does
# `effect` on `excess`: against the plain pre-trained model with the data as they are, paired by seed, 95 % over seeds. `needed`: seeds that would tell an effect of this size from none.
# "rebalanced" repeats comments until every group has as many toxic as other ones; "scrubbed" texts are scrubbed for testing too, since the classifier would never see others. Scrubbed
# phrases are the same for all terms, so their excess is 0 by construction, whatever the classifier.

# %%
effects = run.frame("effects", lambda: pd.concat([mitigation.against(t).assign(data_name=t["data_name"].iloc[0]) for t in (cells, phrases)]))  # fmt: skip
display(effects.drop(columns="sd").style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"], na_rep="–"))  # fmt: skip
titled = {rest["data_name"].iloc[0]: f"{name}: phrases" + ("" if readable else ", near chance")}
figure = figures.interventions(effects.replace({"data_name": titled}), "squared difference of a group's error rate to the mean rate,\nmean over groups")  # fmt: skip
figures.save(figure, folder / "figures", "interventions")

# %% [markdown]
# ## 5 Slight changes of co-occurrence
# Bias against λ, how far every group's training share of toxic comments is moved towards that of all; the number of comments about every group stays, and so does that of toxic ones.

# %%
slope = run.frame("slopes", lambda: pd.concat([mitigation.slopes(t, most=slight).assign(data_name=t["data_name"].iloc[0]) for t in (cells, phrases)]))  # fmt: skip
figure = figures.bias_against_strength(pd.concat([cells, phrases]).replace({"data_name": titled}), slight, "squared difference, mean over groups")  # fmt: skip
if figure:
    figures.save(figure, folder / "figures", "co_occurrence")
slope.style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"], na_rep="–")

# %% [markdown]
# ## 6 Beside the published figures
# Theirs: a network trained on Wikipedia comments; `fped` and `fned` are sums over their own terms, on their own phrases, here per run. Ours are sums over our 25 terms, on our
# phrases. Levels don't compare; what does is the share by which an intervention lowers them.

# %%
theirs = toxicity.published()
theirs = theirs.assign(fped=theirs["fped"] / theirs["runs"], fned=theirs["fned"] / theirs["runs"])
means = phrases.groupby("setting", sort=False)[["auc", "fped", "fned"]].mean().rename(columns={"auc": "auc_phrases"})  # fmt: skip
means = means.assign(auc=cells.groupby("setting")["auc"].mean(), runs=len(class_seeds), source="this run" if readable else "this run; phrases: near chance")  # fmt: skip
ours = means.rename_axis("what").reset_index()[list(theirs)]
beside = run.frame("published", lambda: pd.concat([theirs, ours], ignore_index=True))
beside.style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# ## 7 Verdict
# "Barely" is within ± a quarter of the plain model's excess; "do nothing" is refuted, and "matter" reproduced, by any change that can be told from 0. `needed`: seeds that would bring one of the two verdicts. On the comments. Differences between comments about different groups are a wider measure than those between phrases; on phrases the claims are judged only if they can be read.


# %%
def judged(part: pd.DataFrame) -> pd.DataFrame:
    d = part["data_name"].iloc[0]
    own = (t[t["data_name"] == d].drop(columns="data_name") for t in (effects, slope, part))
    same = ("scrubbed",) if part is phrases else ()
    return mitigation.judged(*own, classes=len(toxicity.LABELS), slight=slight, by_construction=same).assign(
        data_name=d
    )


verdicts = run.frame("verdicts", lambda: pd.concat([judged(t) for t in ([cells, phrases] if readable else [cells])], ignore_index=True))  # fmt: skip
verdicts.style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"], na_rep="–")

# %%
sentence = f"{classifier}. {mitigation.sentence(verdicts)}"
sentence += f" {meaning} ({found})."
display(Markdown(sentence))

# %%
run.finish(
    sentence=sentence,
    about=f"toxicity, {name}",
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "verdicts": "Claims",
        "effects": "Every intervention against the plain pre-trained model, paired by seed",
        "slopes": "Change of bias per λ, slight changes only",
        "plain": "The plain classifier, on comments and on phrases",
        "groups-comments": "The plain classifier by group of comments, mean over seeds",
        "published": "Beside the figures of Dixon et al., per run",
    },
    figures={
        "interventions": "Change of bias and accuracy by intervention",
        **(
            {"co_occurrence": "Bias against how far shares of toxic comments are moved towards that of all"}
            if figure
            else {}
        ),
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
