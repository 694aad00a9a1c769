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
# # Where to fight bias in a classifier: in the pre-trained model, or in the fine-tuning data?
#
# **Paper.** Baksi, Singh & Joshi, *Downstream bias mitigation is all you need*, 2024 (arXiv 2408.00612); protocol after Steed et al.,
# *Upstream Mitigation Is Not All You Need*, ACL 2022. Neither publishes levels or results, so this is a reproduction of claims: every level below is a parameter.
#
# **Claims.** C1: interventions on the pre-trained model barely change the bias of what is fine-tuned from it. C2: the fine-tuning data matters more.
# C3a (Baksi et al.): even slight changes of how often women and an occupation occur together matter. C3b (Steed et al., the opposite): such changes do nothing once
# the model is pre-trained. C4: pre-training matters all the same.
#
# **What is done here.** Interventions on the model with the data as they are, and on the data with the plain model; with those of `crossed`, both; several seeds of each. Bias is the gap between women's and men's true positive rates per
# occupation, accuracy stands beside it, and every effect is paired by seed with the plain pre-trained model.
#
# **Cost.** With the defaults (a tiny model, generated biographies): about a minute on two CPU cores, 1 GB. `params/smollm2.yaml`, the default of `make reproduce`:
# about 9 minutes on one core with AMX (several times as long without), on BOLD's sentences, 2 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** Texts are about people's occupations and gender. First names and pronouns stand for groups of people, women and men only, as in the studies they come from.

# %% tags=["parameters"]
classifier: str = "tiny-bert"  # minilm (packaged encoder), a packaged decoder, small model, folder, or hub id
class_data: list = ["biographies"]  # biographies, bold, LabHC/bias_in_bios, or a folder with its files
class_train: dict = {"biographies": 600}  # training texts, at most, equally many per class; others 1000
bios_specific: float = 0.3  # how often generated biographies name what only this occupation does
class_test: int = 900  # test texts, at most (biographies, bold: in pairs, as a woman and a man)
bold_words: int = 0  # sentences of bold are cut after so many words; 0 leaves them whole
class_dev: int = 150  # texts that choose the epoch, at most
upstreams: list = ["pretrained", "randomized", "perturbed", "debiased"]  # interventions on the model
perturb_scales: list = [0.5]  # noise of "perturbed", in standard deviations of each matrix
data_changes: list = ["scrubbed", "rebalanced"]  # interventions on the data, on the plain model
strengths: list = [0.25, 1.0]  # λ, how far every class' share of women moves towards one half
slight: float = 0.25  # changes up to this λ count as slight
crossed: list = ["randomized"]  # interventions on the model that are combined with every λ
class_seeds: list = [0, 1]  # of the head, of the order, and of what is drawn
class_epochs: int = 3  # paper's protocol: 10
class_rate: float = 2e-3  # learning rate (protocol: 5e-5)
class_batch: int = 32  # texts per step (protocol: 64)
class_length: int = 96  # longest text in tokens (protocol: 128)
class_bf16: bool = False  # mixed precision, where the device computes in bfloat16
least_texts: int = 10  # classes with fewer test texts of either group are left out, and named
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import warnings
from functools import cache
from pathlib import Path

import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import classify, downstream, figures, lm, mitigation, progress, record

warnings.filterwarnings("ignore", message=".*IProgress.*")
warnings.filterwarnings("ignore", message=".*pin_memory.*")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
class_bf16 = class_bf16 and lm.has_bfloat16()
config = {name: globals()[name] for name in ["classifier", "class_data", "class_train", "class_test", "class_dev", "bold_words", "bios_specific", "upstreams", "perturb_scales", "data_changes", "strengths", "slight", "crossed", "class_seeds", "class_epochs", "class_rate", "class_batch", "class_length", "class_bf16", "least_texts"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"05_downstream_mitigation-{classifier}")
sizes = {d: {"train": class_train.get(d, 1000), "dev": class_dev, "test": class_test} for d in class_data}
tables = {
    (d, seed): downstream.load(d, seed=seed, words=bold_words, specific=bios_specific, **sizes[d])
    for d in class_data
    for seed in class_seeds
}
inputs = {f"{d}, seed {seed}": record.frame_sha256(t) for (d, seed), t in tables.items()}
run = record.Run(folder, {**config, "inputs": inputs}, notebook="05_downstream_mitigation")
described = classify.describe(classifier)
run.note(provenance={**record.provenance(), "device": described["device"], "model": described}, data=inputs)
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "layers", "parameters", "device", "commit"]
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 Texts
# `biographies`: our generator, 15 occupations of Bias in Bios with their published share of women, texts that several occupations share. `bold`: Wikipedia sentences about
# 14 fields of work; each stands after a gendered opening of ours, since the sentences hardly mention people. There the shares of women are set by us. Texts for testing stand in both
# genders, the same but for names and pronouns: half women, whatever the shares in training, so that what a classifier makes of gender shows with few texts.
#
# `best`: what a classifier makes of the test texts that knows the generator and learns the shares of women from training texts. Its gap is the true effect of the data. Since half of the
# test texts are women's, going by gender costs accuracy here, as it wouldn't where the shares are those of training: accuracies below are of this kind.

# %%
texts = run.frame("texts", lambda: pd.DataFrame([
    {"data": d, "split": s, "texts": len(own), "classes": own["label"].nunique(), "women": (own["group"] == "female").mean(), "example": own["text"].iloc[0]}
    for d in class_data for s, own in tables[d, class_seeds[0]].groupby("split", sort=False)
]))  # fmt: skip
display(texts.style.hide(axis="index").format(precision=2))


def best(strength: float) -> dict:
    how = {"specific": bios_specific}
    train, test = downstream.biographies(3000, 0, **how), downstream.biographies(3000, 1, paired=True, **how)
    train = downstream.co_occurrence(train, strength, 0)
    found = test[["label", "group", "pair"]].assign(predicted=downstream.bayes(test, train, **how))
    row = mitigation.outcome(found, mitigation.women(train), classify.Setting(strength=strength), 0)
    return {"λ": strength, **{k: row[k] for k in ("accuracy", "rms", "excess", "r")}}


if "biographies" in class_data:
    possible = run.frame("best", lambda: pd.DataFrame([best(x) for x in sorted({0.0, *strengths})]))
    display(possible.style.hide(axis="index").format(precision=3, na_rep="–"))

# %% [markdown]
# ## 2 The grid
# Every cell fine-tunes the whole model; a cell that is done is never computed again, and one that was stopped goes on after its last epoch. Seeds also draw the texts (from the
# generator, or which of BOLD's pages and sentences, and their openings), so that intervals over seeds hold the sampling of training and test texts.

# %%
grid = mitigation.settings(upstreams, data_changes, strengths, perturb_scales, crossed)
recipe = classify.Recipe(epochs=class_epochs, learning_rate=class_rate, batch=class_batch, length=class_length, bf16=class_bf16)  # fmt: skip
todo = [(d, at, seed) for d in class_data for seed in class_seeds for at in grid]


def one(data: str, at: classify.Setting, seed: int) -> pd.DataFrame:
    train, dev, test = mitigation.prepared(tables[data, seed], at, seed)
    where = folder / "checkpoint" / run.key[:16] / record.slug(f"{data}-{at.name}-{seed}")
    return classify.cell(classifier, at, train, dev, test, recipe, seed=seed, folder=where)


done = {
    (d, at.name, seed): run.frame(record.slug(f"cell-{d}-{at.name}-{seed}"), lambda d=d, at=at, seed=seed: one(d, at, seed))
    for d, at, seed in progress.bar(todo, desc="cells")
}  # fmt: skip
display(
    Markdown(
        f"{len(done)} cells: {len(grid)} settings × {len(class_seeds)} seeds × {len(class_data)} sets of texts."
    )
)


# %%
shares = {k: mitigation.women(t[t["split"] == "train"]) for k, t in tables.items()}
cells = run.frame("cells", lambda: pd.DataFrame([
    {"data_name": d, **mitigation.outcome(done[d, at.name, seed], shares[d, seed], at, seed, least_texts)} for d, at, seed in todo
]))  # fmt: skip
left_out = sorted({c for x in cells["left_out"] for c in x.split(", ") if c})
display(Markdown(f"Left out, with fewer than {least_texts} test texts of women or men: {', '.join(left_out) or 'no class'}."))  # fmt: skip

# %% [markdown]
# ## 3 What every intervention does
# `excess`: mean over classes of the squared gap TPR(women) − TPR(men), less what drawing the test texts adds to it; 0 on average where there is no gap, however few the texts
# (its root is on the scale of the gaps). `rms`
# in table `cells` is the usual root mean square, about its floor where there is no gap. `effect`: against the plain pre-trained model with the data as they are, paired by seed, 95 % over
# seeds. `needed`: seeds that would tell an effect of this size from none. "rebalanced" repeats texts of the rarer gender (more texts, same classes); "scrubbed" texts are scrubbed for
# testing too, since the classifier would never see others: a woman's and a man's are then the same text, so their gap is 0 by construction, whatever the classifier, and C2 leaves it out.
# "random for" a way of pruning removes as many parts of the same layers at random: what it changes, any damage of this size does.

# %%
effects = run.frame("effects", lambda: pd.concat([mitigation.against(own).assign(data_name=d) for d, own in cells.groupby("data_name", sort=False)]))  # fmt: skip
display(effects.drop(columns="sd").style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"], na_rep="–"))  # fmt: skip
chance = run.frame("beyond_random", lambda: pd.concat([mitigation.beyond_random(own).assign(data_name=d) for d, own in cells.groupby("data_name", sort=False)]))  # fmt: skip
if len(chance):
    display(chance.style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"]).set_caption("Pruning less as many parts of the same layers at random (change of excess, paired by seed)"))  # fmt: skip
figure = figures.interventions(effects)
figures.save(figure, folder / "figures", "interventions")

# %% [markdown]
# ## 4 Slight changes of co-occurrence
# Bias against λ, how far the training share of women of every class is moved towards one half; the number of texts of every class stays, so that with few
# texts some of the rarer gender are repeated.

# %%
slope = run.frame("slopes", lambda: pd.concat([mitigation.slopes(own, most=slight).assign(data_name=d) for d, own in cells.groupby("data_name", sort=False)]))  # fmt: skip
figure = figures.bias_against_strength(cells, slight)
if figure:
    figures.save(figure, folder / "figures", "co_occurrence")
slope.style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"], na_rep="–")


# %% [markdown]
# ## 5 What explains the gaps?
# gap of a class ~ bias of the model before fine-tuning (see its name below: how much nearer the class' sentence lies to sentences about women, or a ranking of pronouns) + share of women in training + interventions + class; errors
# clustered by class. `partial_r2`: how much of what all else leaves a term explains. Read it with care: an intervention on the model that shrinks all gaps, of either sign, has
# no mean effect on a signed gap, while a changed share has; so the verdicts don't rest on it.


# %%
@cache  # what is done to the data comes later
def before(d: str, upstream: str, scale: float, seed: int) -> pd.Series:
    labels = sorted(tables[d, seed]["label"].unique())
    return classify.before(classifier, classify.Setting(upstream=upstream, scale=scale), labels, seed)


def gaps_of(d: str, at: classify.Setting, seed: int) -> pd.DataFrame:
    found, _ = classify.rates(done[d, at.name, seed], least_texts)
    train, _, _ = mitigation.prepared(tables[d, seed], at, seed)
    own = found[["label", "gap"]].assign(share=found["label"].map(mitigation.women(train)), intrinsic=found["label"].map(before(d, at.upstream, at.scale, seed)))  # fmt: skip
    return own.assign(data_name=d, upstream=at.upstream, data=at.data, setting=at.name, seed=seed)


gaps = run.frame("gaps", lambda: pd.concat([gaps_of(*c) for c in todo], ignore_index=True))
explained = run.frame("attribution", lambda: pd.concat([mitigation.attribution(own).assign(data_name=d) for d, own in gaps.groupby("data_name", sort=False)]))  # fmt: skip
display(Markdown(f"Before fine-tuning: {before(class_data[0], 'pretrained', 0.0, class_seeds[0]).name}."))
explained.style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# ## 6 Beside the published figures
# Full Bias in Bios, from the sources that the table names. Ours are smaller and other texts, half women for testing: what compares is the direction and size of the *changes*.

# %%
theirs = pd.read_csv(downstream.published())
plain = cells[cells["setting"] == "pretrained, none"].groupby("data_name", sort=False)[["accuracy", "rms", "rms_floor"]].mean().reset_index()  # fmt: skip
ours = plain.rename(columns={"data_name": "what"}).assign(what=lambda t: f"{classifier}, " + t["what"], source="this run")  # fmt: skip
pd.concat([theirs, ours]).style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# ## 7 Verdict
# "Barely", and "do nothing", is within ± a quarter of the plain model's excess, which is about an eighth of the gaps' size; "do nothing" is refuted, and "matter"
# reproduced, by any change that can be told from 0. `needed`: seeds that would bring one of the two verdicts, whichever is nearer.

# %%
classes = {d: tables[d, class_seeds[0]]["label"].nunique() for d in class_data}
verdicts = run.frame("verdicts", lambda: pd.concat([
    mitigation.judged(*(t[t["data_name"] == d].drop(columns="data_name") for t in (effects, slope, cells)), classes=classes[d], slight=slight, by_construction=("scrubbed",) if "pair" in tables[d, class_seeds[0]] else ()).assign(data_name=d)
    for d in class_data
], ignore_index=True))  # fmt: skip
verdicts.style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"], na_rep="–")

# %%
sentence = f"{classifier}. {mitigation.sentence(verdicts)}"
display(Markdown(sentence))

# %%
run.finish(
    sentence=sentence,
    about=", ".join(class_data),
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "verdicts": "Claims",
        "effects": "Every intervention against the plain pre-trained model, paired by seed",
        "beyond_random": "Pruning less as many parts of the same layers at random, paired by seed",
        "slopes": "Change of bias per λ, slight changes only",
        "attribution": "What explains the gaps",
        "texts": "Texts",
    },
    figures={
        "interventions": "Change of bias and accuracy by intervention",
        **({"co_occurrence": "Bias against how far shares are moved towards one half"} if figure else {}),
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
