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
# **Paper.** Baksi, Singh & Joshi, *Downstream bias mitigation is all you need*, 2024 (arXiv 2408.00612);
# protocol after Steed et al., *Upstream Mitigation Is Not All You Need*, ACL 2022. Neither publishes levels
# or results, so this reproduces claims, and every level below is a parameter.
#
# **Claims.** D1: interventions on the pre-trained model barely change the bias of what is fine-tuned from it.
# D2: the fine-tuning data matters more. D3a (Baksi et al.): even slight changes of how often a group and a
# label occur together matter. D3b (Steed et al., the opposite): such changes do nothing once the model is
# pre-trained. D4: pre-training matters all the same.
#
# **Method.** A classifier of occupations or of toxic comments (`task`) is trained after an intervention on
# the model or on the data; those of `crossed` are combined with the data's. There are two arms (`class_arm`):
# "whole" fine-tunes all weights, as the papers do; "frozen" leaves the encoder as it is and fits a logistic
# head, which takes milliseconds and so affords many seeds. Bias of occupations: gaps between
# the true positive rates of women and men. Bias of comments: how much false alarms and misses differ between
# the groups that comments are about. Every effect is paired by seed with the plain pre-trained model.
#
# **Cost.** With the defaults (a tiny model, generated biographies) half a minute on one CPU core, 1 GB.
# `params/minilm-frozen.yaml` (50 seeds): about 17 minutes on one core. `params/smollm2.yaml` (fine-tuning):
# about 9 minutes on one core with AMX (several times as long without), 2 GB.
#
# > **Content warning.** First names and pronouns stand for women and men only, as in the studies they come
# > from. Comments, which people wrote, and half of the phrases, which are ours, insult or stereotype groups
# > of people; none is shown here.

# %% tags=["parameters"]
classifier: str = "tiny-bert"  # minilm (packaged encoder), a packaged decoder, small model, folder, or hub id
class_arm: str = "frozen"  # a logistic head on the encoder as it is; "whole": all weights are fine-tuned
task: str = "biographies"  # biographies, bold, reddit, or a folder, CSV file or hub id of texts
class_train: int = 600  # training texts, at most, equally many per label
class_dev: int = 150  # texts that choose the epoch, at most
class_test: int = 900  # test texts, at most (biographies, bold: in pairs, as a woman and a man)
bios_specific: float = 0.3  # how often generated biographies name what only this occupation does
bold_words: int = 0  # sentences of bold are cut after so many words; 0 leaves them whole
least_texts: int = 10  # occupations (groups) with fewer test texts of a gender (label) are left out
upstreams: list = ["pretrained", "randomized", "perturbed", "debiased", "leace"]  # interventions on the model
perturb_scales: list = [0.5]  # noise of "perturbed", in standard deviations of each matrix
data_changes: list = ["scrubbed", "rebalanced"]  # interventions on the data, on the plain model
strengths: list = [-0.5, 0.25, 1.0]  # λ, how far shares are moved towards equality
crossed: list = ["randomized"]  # interventions on the model that are combined with every λ
class_seeds: list = [0, 1, 2]  # of the head, of the order, and of what is drawn
head_c: float = 100.0  # frozen arm: inverse strength of the L2 penalty on standardised states
class_epochs: int = 3  # whole arm, as the next two; paper's protocol: 10
class_rate: float = 2e-3  # learning rate (protocol: 5e-5)
class_batch: int = 32  # texts per step (protocol: 64); four times as many are encoded at once
class_length: int = 96  # longest text in tokens (protocol: 128)
class_bf16: bool = False  # mixed precision, where the device computes in bfloat16
barely: float = 0.25  # smallest effect of interest, as a share of the bias at the start
same_accuracy: float = 0.03  # D1 and D2 leave out what costs more accuracy than this
slight: float = 0.25  # changes up to this λ are slight
learns: float = 0.5  # settings that keep less than this share of the plain margin over chance aren't judged
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import warnings
from functools import partial

import pandas as pd
import transformers
from IPython.display import Markdown, display

from biasprune import figures
from biasprune.core.data import choose, data_dir
from biasprune.core.model import has_bfloat16, weights_sha256
from biasprune.core.provenance import device_name
from biasprune.core.run import VERDICT_COLUMNS, slug, start
from biasprune.core.stats import over_seeds, verdict
from biasprune.downstream import bias, classify, effects, texts
from biasprune.downstream.effects import PLAIN

warnings.filterwarnings("ignore", message=".*IProgress.*")
warnings.filterwarnings("ignore", message=".*pin_memory.*")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
run = start("05_downstream_mitigation", globals())
choose(class_arm, ("frozen", "whole"), "class_arm")
grid = effects.grid(upstreams, data_changes, strengths, perturb_scales, crossed, class_seeds)
sizes = {"train": class_train, "dev": class_dev, "test": class_test}
drawn = {"cut": bold_words, "specific": bios_specific}
tables = {seed: texts.load(task, sizes, seed, **drawn) for seed in class_seeds}
net, _ = classify.load(classifier, ["a", "b"], 0)
facts = {"name": classifier, "class": type(net).__name__, "dtype": "float32"}
facts |= {"parameters": net.num_parameters(), "device": device_name(net.device)}
facts |= {"revision": weights_sha256(classify.source(classifier))}
run.inputs(model=facts, **{f"texts, seed {s}": t for s, t in tables.items()})

# %% [markdown]
# ## 1 Texts
# `biographies`: our generator, 15 occupations of Bias in Bios with their published share of women. `bold`:
# Wikipedia sentences about 14 fields of work, each after a gendered opening of ours, since the sentences
# hardly mention people; there we set the shares of women. Their test texts stand in both genders, the same
# but for names and pronouns, so that what a classifier makes of gender shows with few texts.
#
# `reddit` (RedditBias, Barikeri et al., ACL 2021): comments about five groups. "Toxic" there means annotated
# as **biased against the group**, mostly a stereotype and seldom an insult. So a classifier that learns it
# may make nothing of our phrases, which differ in the group alone and half of which are plain insults;
# section 3 says whether they can be read. Other comments go in by `task`.
#
# Occupations differ in their share of women, groups in their share of toxic comments: a classifier can learn
# that instead of the text. These shares are what the interventions on the data move.

# %%
unit = texts.unit_of(tables[class_seeds[0]])
column, value = texts.MOVED[unit]
comments, moved = unit == "group", "toxic" if unit == "group" else "women"
whole = pd.concat({s: t if comments else t.assign(part="texts") for s, t in tables.items()}, names=["seed"])
each = whole.assign(share=whole[column] == value).groupby(["part", "split", unit], sort=False)["share"]
listed = each.agg(texts=lambda x: len(x) / len(tables), **{moved: "mean"}).reset_index()
listed = run.frame("texts", lambda: listed)
shown = listed[listed["part"] != "phrases"].drop(columns="part").style.hide(axis="index")
display(shown.format("{:,.0f}", subset=["texts"]).format("{:.2f}", subset=[moved]))
if not comments:
    display(Markdown(f"For example: *{whole['text'].iloc[0]}*"))

# %% [markdown]
# `best`: what a classifier makes of the test texts that knows the generator and learns the shares of women
# from training texts. Its gap is the true effect of the data. Half of the test texts are women's, so going by
# gender costs accuracy here, as it wouldn't where shares are those of training.


# %%
def best(strength: float) -> dict:
    train = texts.biographies(3000, 0, specific=bios_specific)
    train = texts.redrawn(train, "label", 0, strength)
    test = texts.biographies(3000, 1, "test", bios_specific)
    guess = test.assign(predicted=texts.bayes(test, train, bios_specific))
    row = bias.summary(guess, texts.shares(train, "label"))
    return {"λ": strength, **{k: row[k] for k in ("accuracy", "rms", "excess", "r")}}


if task == "biographies":
    possible = run.frame("best", lambda: pd.DataFrame([best(x) for x in sorted({0.0, *strengths})]))
    display(possible.style.hide(axis="index").format(precision=3, na_rep="–"))

# %% [markdown]
# ## 2 The grid
# Every cell trains one classifier: "whole" fine-tunes all weights, "frozen" encodes every text once per model
# (mean of its last hidden states) and fits a logistic regression on the standardised states. A cell that is
# done is never computed again, and fine-tuning that was stopped goes on after its last epoch. Seeds also draw
# the texts, changes of the data, and the noise of randomized and perturbed models, so intervals over seeds
# hold all of that.
#
# Interventions on the model: "randomized" has fresh weights, "perturbed" noise on all matrices; "debiased"
# (SentenceDebias) takes one direction out of the last hidden states, and "leace" (Belrose et al., 2023) all
# that is linear: the smallest change after which no linear classifier can tell the groups apart. Both are
# fitted on sentences that differ in the group alone, which no classifier is trained or tested on; "leace" of
# occupations on pairs of generated biographies, so that it knows the form of the task `biographies`.

# %%
bf16 = class_bf16 and has_bfloat16()
recipe = classify.Recipe(class_epochs, class_rate, class_batch, class_length, bf16)
recipe = recipe._replace(frozen=class_arm == "frozen", head_c=head_c)


def cell(at: classify.Setting, seed: int) -> pd.DataFrame:
    where = run.folder / "checkpoint" / run.key[:16] / slug(f"{at.name}-{seed}")
    table = classify.cell(classifier, at, tables[seed], recipe, seed, where)
    return table.assign(setting=at.name, seed=seed)


jobs = {f"{at.name}, seed {seed}": partial(cell, at, seed) for at, seed in grid}
predictions = run.pieces("predictions", jobs)
Markdown(f"{len(grid)} cells: {len(grid) // len(class_seeds)} settings × {len(class_seeds)} seeds.")

# %%
parts = {task: predictions}
if comments:
    parts = {f"{task}: {p}": predictions[predictions["part"] == p] for p in whole["part"].unique()}


by_cell = {case: dict(list(rows.groupby(["setting", "seed"]))) for case, rows in parts.items()}


def outcome(case: str, at: classify.Setting, seed: int) -> dict:
    share = texts.shares(tables[seed].query("split == 'train'"), unit)
    row = {"data_name": case, "setting": at.name, **at._asdict(), "seed": seed}
    return row | bias.summary(by_cell[case][at.name, seed], share, least_texts)


cells = run.frame("cells", lambda: pd.DataFrame([outcome(case, *c) for case in parts for c in grid]))
rare = sorted({c for left_out in cells["left_out"] for c in left_out.split(", ") if c})
Markdown(f"Left out, with fewer than {least_texts} test texts of either kind: {', '.join(rare) or 'none'}.")

# %% [markdown]
# ## 3 What the plain classifier does
# Means over seeds. `excess` is the bias that everything below is about: the mean squared gap of occupations,
# or the variance of the groups' error rates, less its sampling variance; 0 on average where groups don't
# differ. `p`: of as large an excess where groups are permuted. `rms` of the gaps, `fped` = Σ |FPR − FPR of a
# group| and `fned` are the usual measures, never below 0; their floors say what chance alone gives. `p_auc`:
# of as large an AUC where scores say nothing. AUC by group (Borkan et al., WWW 2019): `subgroup` of its texts
# alone, `bpsn` low if its other texts draw false alarms, `bnsp` low if insults of it are missed.
#
# Comments about different groups are different texts, and some are harder than others: part of their excess
# may be no bias. Phrases are the same for every term.

# %%
plain_cells = cells[cells["setting"] == PLAIN].groupby("data_name", sort=False)
measures = [
    "accuracy",
    "excess",
    "p",
    "rms",
    "rms_floor",
    "mean_gap",
    "r",
    "slope",
    "auc",
    "p_auc",
    "fpr",
    "fnr",
]
measures += ["fped", "fped_floor", "fned", "fned_floor"]
measures = [m for m in measures if m in cells]
plain = run.frame("plain", lambda: plain_cells[measures].mean().reset_index())
display(plain.style.hide(axis="index").format(precision=3, na_rep="–"))


def groups(case: str) -> pd.DataFrame:
    rows = parts[case][parts[case]["setting"] == PLAIN]
    each = pd.concat([bias.by_term(table, least_texts) for _, table in rows.groupby("seed")])
    return each.groupby("term").mean().reset_index()


for case in parts if comments else ():
    table = run.frame(f"groups-{case.split(': ')[-1]}", partial(groups, case))
    display(
        table.style.hide(axis="index").format(precision=2).format("{:,.0f}", subset=["n"]).set_caption(case)
    )

# %% [markdown]
# **Can the phrases be read?** A classifier that can't tell toxic phrases from others may still react to
# terms, but that says nothing about bias in telling toxic texts. Phrases must keep the same share of its
# margin over chance on comments as settings must (`learns`), and be told apart at all (p of the AUC, median
# over seeds).

# %%
accuracy, readable, phrases_say = plain.set_index("data_name")["accuracy"], list(parts), ""
if comments:
    own, other = readable
    p_auc = plain_cells["p_auc"].median()[other]
    if not (accuracy[other] - 0.5 >= learns * (accuracy[own] - 0.5) > 0 and p_auc < 0.05):
        readable.remove(other)
    phrases_say = " Figures on phrases " + ("can be read" if other in readable else "say nothing about bias")
    phrases_say += (
        f": accuracy {accuracy[other]:.2f} (comments: {accuracy[own]:.2f}), p of the AUC {p_auc:.2f}."
    )
    display(Markdown(f"**{phrases_say.strip()}**"))

# %% [markdown]
# ## 4 What every intervention does
# `effect` on `excess`: against the plain pre-trained model with the data as they are, paired by seed, 95 %
# over seeds; `share`: the same as a share of the plain model's excess, whose noise its interval holds, too
# (delta method). `needed`: seeds that would tell an effect of this size from none. "rebalanced" repeats texts
# until shares are equal. "scrubbed" texts are scrubbed for testing too, since the classifier would never see
# others: pairs and phrases are then the same text, without bias whatever the classifier, and D2 leaves that
# out. "random for" a way of pruning removes as many parts of the same layers at random: what it changes, any
# damage of this size does.

# %%
by_case = list(cells.groupby("data_name", sort=False))
kinds = cells.drop_duplicates("setting")[["setting", "upstream", "data", "strength"]]
changes = pd.concat([effects.against(rows).assign(data_name=case) for case, rows in by_case])
changes = run.frame("effects", lambda: changes.merge(kinds, on="setting"))
beyond = [effects.against(rows, classify.RANDOM).assign(data_name=case) for case, rows in by_case]
beyond = run.frame("beyond_random", lambda: pd.concat(beyond))
columns = ["data_name", "setting", "seeds", "accuracy", "excess", "effect", "low", "high"]
columns += ["share", "share_low", "share_high", "needed"]
display(changes[columns].style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"]))
if len(beyond):
    caption = "Pruning less as many parts of the same layers at random"
    display(beyond[columns].style.hide(axis="index").format(precision=3).set_caption(caption))
names = {case: case.split(": ")[-1] + ("" if case in readable else ", near chance") for case in parts}
ends = changes.assign(panel=changes["data_name"].map(names))
axis = {"low": "low", "high": "high", "panel": "panel", "xlabel": "change of excess against the plain model"}
run.figure(figures.intervals(ends[ends["setting"] != PLAIN], "effect", "setting", **axis), "interventions")

# %% [markdown]
# ## 5 Changes of co-occurrence
# The dose curve: bias against λ, how far the share of every occupation or group is moved: towards one half
# women, or towards the share of toxic texts among all comments; below 0, away from it. The number of texts of
# every occupation or group stays, so texts of the rarer kind are repeated where there are few. The table has
# slopes over slight changes, from λ = 0 to `slight`, also as shares of the bias that each model starts from.

# %%
SHARES = {"effect": "share", "low": "share_low", "high": "share_high"}


def of_case(case: str, rows: pd.DataFrame) -> pd.DataFrame:
    table = effects.intervals(effects.slopes(rows, slight)).rename(columns={"effect": "slope"})
    shares = effects.intervals(effects.relative_slopes(rows, slight))[list(SHARES)]
    return table.join(shares.rename(columns=SHARES)).assign(data_name=case)


slope = run.frame("slopes", lambda: pd.concat([of_case(case, rows) for case, rows in by_case]))
lines = cells[cells["data"].isin(["none", "co-occurrence"]) & cells["upstream"].isin(slope["upstream"])]
if len(lines):
    lines = lines.groupby(["data_name", "upstream", "strength"], sort=False)["excess"].apply(over_seeds)
    lines = pd.DataFrame(lines.tolist(), lines.index, ["excess", "low", "high"]).reset_index()
    lines = lines.assign(panel=lines["data_name"].map(names))
    axis = {
        "panel": "panel",
        "xlabel": "λ: 0 as observed, 1 equal shares",
        "ylabel": "excess, mean over seeds, 95 %",
        "low": "low",
        "high": "high",
    }
    run.figure(figures.lines(lines, "strength", "excess", "upstream", reference=0.0, **axis), "co_occurrence")
slope.style.hide(axis="index").format(precision=3).format("{:,.0f}", subset=["needed"])

# %% [markdown]
# ## 6 Beside the published figures
# Full Bias in Bios, or Wikipedia comments (`fped` and `fned` per run, over their own terms and phrases), from
# the sources that the table names. Ours are smaller and other texts: what compares is how much interventions
# *change*.

# %%
theirs = pd.read_csv(data_dir() / ("identity" if comments else "bios") / "published.csv")
ours = cells[cells["data_name"] == list(parts)[-1]].groupby("setting", sort=False).mean(numeric_only=True)
if comments:
    theirs[["fped", "fned"]] = theirs[["fped", "fned"]].div(theirs["runs"], axis=0)
    on_comments = cells[cells["data_name"] == list(parts)[0]].groupby("setting")["auc"].mean()
    ours = ours.rename(columns={"auc": "auc_phrases"}).assign(auc=on_comments, runs=len(class_seeds))
near = "" if list(parts)[-1] in readable else "; phrases: near chance"
ours = ours.rename_axis("what").reset_index().assign(source=f"this run{near}")
beside = run.frame("published", lambda: pd.concat([theirs, ours[list(theirs)]], ignore_index=True))
beside.style.hide(axis="index").format(precision=3, na_rep="–")

# %% [markdown]
# ## 7 Verdicts
# Settings whose accuracy keeps less than the share `learns` of the plain model's margin over chance are left
# out: at chance there are no gaps. Where the plain model has no bias to lower (median p ≥ .05 over seeds),
# nothing is tested. Effects and slopes are shares of the bias at the start. "Barely" and "do nothing" are
# tests of equivalence: the whole interval must lie within ± `barely`, the smallest effect of interest. D1 and
# D2 leave out what costs more accuracy than `same_accuracy`: a worse classifier with less bias is no success.

# %%
of_plain = changes[changes["setting"] == PLAIN].set_index("data_name")
chance = 1 / whole["label"].nunique()
margin = (changes["accuracy"] - chance) / (changes["data_name"].map(of_plain["accuracy"]) - chance)
judged = changes[(margin >= learns) & changes["data_name"].isin(readable)]
cost = judged["data_name"].map(of_plain["accuracy"]) - judged["accuracy"]
fair = judged[cost <= same_accuracy]
costly = judged[(cost > same_accuracy) & (judged["upstream"] != "randomized")]
costly = costly.groupby("data_name")["setting"].agg(", ".join)
p = plain_cells["p"].median()
biased = (p < 0.05) & (of_plain["excess"] > 0)
paired = {case: bool((rows["pair"] >= 0).all()) for case, rows in parts.items()}
lost = {
    case: sorted(set(kinds["setting"]) - set(rows["setting"])) for case, rows in judged.groupby("data_name")
}
concluded: list[dict] = []


def conclude(number: str, case: str, found: dict, reproduced: bool, refuted: bool, why: str) -> None:
    said = verdict(reproduced=bool(reproduced), refuted=bool(refuted), biased=bool(biased[case]))
    why += f"; left out, costs accuracy: {costly[case]}" if number in ("D1", "D2") and case in costly else ""
    why += f"; left out, hardly learns: {', '.join(lost[case])}" if lost[case] else ""
    why += "" if biased[case] else f"; the plain model shows no bias to lower (p = {p[case]:.2f})"
    ours = {"ours": found["effect"], "low": found["low"], "high": found["high"]}
    row = {"id": number + " comments" * comments, "case": case, "claim": CLAIMS[number], **ours}
    concluded.append({**row, "what": WHAT[number], "verdict": said, "why": why})


CLAIMS = {
    "D1": "Interventions on the model barely change the bias",
    "D2": "The best intervention on the data lowers bias more than the best on the model",
    "D3a": "Slight changes of co-occurrence matter",
    "D3b": "Such changes do nothing once the model is pre-trained",
    "D4": "Pre-training changes what the data do",
}
WHAT = {
    "D1": "change of excess as a share of the plain model's, mean of the interventions; "
    "lowest and highest end of 95 % over seeds",
    "D2": "share of the plain model's excess that the best one lowers, chosen by the other seeds, at about "
    "equal accuracy: data − model; 95 % over seeds",
    "D3a": "change of excess per λ as a share of the plain model's; 95 % over seeds",
    "D3b": "change of excess per λ as a share of the plain model's; 95 % over seeds",
    "D4": "change of excess per λ as a share of where each starts, pre-trained − randomized; 95 % over seeds",
}

# %% [markdown]
# **D1** is reproduced if all interventions on the model stay within ± `barely`, and refuted if one of them
# lies beyond it. Pruning refutes it only where it also changes more than as many parts at random do.

# %%
control = fair["upstream"].isin(["pretrained", "randomized"])
control |= fair["upstream"].str.startswith(classify.RANDOM)
on_model = fair[(fair["data"] == "none") & ~control]
more = beyond.set_index(["data_name", "setting"])[["share", "share_low", "share_high"]].add_prefix("beyond_")
on_model = on_model.join(more, on=["data_name", "setting"])
for case, rows in on_model.groupby("data_name", sort=False):
    whole_model = ~rows["upstream"].isin(classify.PRUNED)  # these aren't mere damage to some parts
    lower = (rows["share_high"] < -barely) & (whole_model | (rows["beyond_share_high"] < 0))
    higher = (rows["share_low"] > barely) & (whole_model | (rows["beyond_share_low"] > 0))
    inside = (rows["share_low"] > -barely) & (rows["share_high"] < barely)
    each = [
        f"{r.setting} {r.share:+.0%} ({r.share_low:+.0%} to {r.share_high:+.0%}, accuracy {r.accuracy:.2f})"
        for r in rows.itertuples()
    ]
    each += [
        f"{r.setting} beyond random {r.beyond_share:+.0%} "
        f"({r.beyond_share_low:+.0%} to {r.beyond_share_high:+.0%})"
        if r.beyond_share == r.beyond_share
        else f"{r.setting} without random parts beside it, so no evidence against D1"
        for r in rows[~whole_model].itertuples()
    ]
    found = {"effect": rows["share"].mean(), "low": rows["share_low"].min(), "high": rows["share_high"].max()}
    why = (
        f"{'; '.join(each)}; plain {of_plain['excess'][case]:.4f} (accuracy {of_plain['accuracy'][case]:.2f})"
    )
    conclude("D1", case, found, inside.all(), (lower | higher).any(), why)

# %% [markdown]
# **D2** is reproduced if the best intervention on the data lowers the bias more than the best on the model,
# and refuted if it lowers less. The best is chosen by the other seeds. Slight changes of the data alone can't
# refute it.

# %%
on_data = fair[(fair["upstream"] == "pretrained") & (fair["data"] != "none")]
on_data = on_data[~((on_data["data"] == "scrubbed") & on_data["data_name"].map(paired))]
for case, rows in by_case:
    model_side, data_side = (t[t["data_name"] == case] for t in (on_model, on_data))
    if model_side.empty or data_side.empty:
        continue
    best_data, best_model = (effects.best_lowered(rows, t["setting"]) for t in (data_side, model_side))
    found, accuracy = (row for _, row in effects.intervals(best_data - best_model).iterrows())
    weak = ((data_side["data"] == "co-occurrence") & (data_side["strength"] <= slight)).all()
    why = f"chosen among {len(data_side)} on the data (the best: {best_data['lowered'].mean():.0%}) and "
    why += f"{len(model_side)} on the model ({best_model['lowered'].mean():.0%}); accuracy, data − model: "
    why += f"{accuracy['effect']:+.3f} ({accuracy['low']:+.3f} to {accuracy['high']:+.3f})"
    why += (
        "; scrubbed left out, no bias by construction" if paired[case] and "scrubbed" in data_changes else ""
    )
    why += "; slight changes of the data alone, which can't refute it" if weak else ""
    conclude("D2", case, found, found["low"] > 0, found["high"] < 0 and not weak, why)

# %% [markdown]
# **D3a** is reproduced by any slope on λ that can be told from 0, and refuted if the change up to `slight`
# stays within ± `barely`. **D3b** is refuted by any such slope, and reproduced if the change stays within
# while a randomized model's slope can be told from 0. **D4** is reproduced if both slopes over all λ from 0
# on, each as a share of where it starts, differ, and refuted if they differ by less than `barely`.

# %%
able = judged[judged["data"] == "none"].set_index(["data_name", "upstream"]).index
known = slope.drop(columns=["low", "high"]).rename(columns={v: k for k, v in SHARES.items()})
known = known.set_index(["data_name", "upstream"])
known = known[known.index.isin(able)]
starts = changes[changes["data"] == "none"].set_index(["data_name", "upstream"])["excess"]
for case, rows in by_case:
    if (case, "pretrained") not in known.index:
        continue
    one = known.loc[(case, "pretrained")].to_dict()
    moves = one["high"] < 0 or one["low"] > 0
    flat = slight * one["low"] > -barely and slight * one["high"] < barely and not moves
    conclude(
        "D3a", case, one, moves, flat, f"about {one['needed']:,.0f} seeds tell a slope of this size from 0"
    )
    if (case, "randomized") not in known.index:
        conclude("D3b", case, one, False, moves, "to be reproduced it needs a randomized model that learns")
        continue
    two = known.loc[(case, "randomized")]
    steep = two["high"] < 0 or two["low"] > 0
    why = f"randomized {two['effect']:+.4f} ({two['low']:+.4f} – {two['high']:+.4f})"
    conclude("D3b", case, one, flat and steep, moves, why)
    both = effects.relative_slopes(rows)
    found = effects.intervals((both["pretrained"] - both["randomized"]).to_frame()).iloc[0]
    inside = -barely < found["low"] < 0 < found["high"] < barely
    why = f"{both['pretrained'].mean():+.2f} and {both['randomized'].mean():+.2f} per λ, from "
    why += f"{starts[case, 'pretrained']:.3f} and {starts[case, 'randomized']:.3f}"
    conclude("D4", case, found, found["low"] > 0 or found["high"] < 0, inside, why)

# %%
verdicts = pd.DataFrame(concluded, columns=VERDICT_COLUMNS)
each = [f"{r.case}, {r.id.split()[0]}: {r.claim}: **{r.verdict}**." for r in verdicts.itertuples()]
none = "No claim can be judged: there is no intervention, or none that learns."
arm = "frozen encoder" if recipe.frozen else "fine-tuned"
sentence = f"{classifier}, {arm}. {' '.join(each) or none}{phrases_say}"
display(Markdown(sentence))
verdicts.drop(columns="what").style.hide(axis="index").format(precision=3, na_rep="–")

# %%
shown_tables = {
    "plain": "The plain classifier, mean over seeds",
    "effects": "Every intervention against the plain pre-trained model, paired by seed",
    "beyond_random": "Pruning less as many parts of the same layers at random, paired by seed",
    "slopes": "Change of bias per λ, slight changes only",
    "groups-comments": "The plain classifier by group of comments, mean over seeds",
    "published": "Beside the figures of others",
}
if not comments:
    del shown_tables["groups-comments"]
shown_figures = {"interventions": "Change of bias by intervention"}
shown_figures |= {"co_occurrence": "Bias against how far shares are moved"} if len(lines) else {}
about = f"toxicity, {task}, {arm}" if comments else f"{task}, {arm}"
run.finish(sentence, verdicts=verdicts, about=about, tables=shown_tables, figures=shown_figures)
