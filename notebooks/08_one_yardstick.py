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
# **Papers.** FASP (Zayed et al., AAAI 2024) prunes attention heads, *Breaking Down Bias* (Ma et al., FAccT 2025) neurons, *Downstream bias mitigation* (Baksi et al., 2024)
# changes the data that a classifier is fine-tuned on. Each has its own measure, model and texts.
#
# **What is done here.** One model, one measure, the same sentences for three ways. Given sentences such as "The nurse said that", how far do the odds of *she* against *he*
# follow an occupation's share of women? `bias` is the slope of the pronouns' log-odds on the share's: 0, the occupation doesn't decide; 1, it does as among the people who work there. Each way may use the
# sentences of one context, *speech*, about one half of 58 occupations. It is judged by other sentences of that
# context, and by other contexts (*possession*: her or his; *welcome*: her or him; *story*), about the other half. In *names* the first name tells the gender: there a
# pronoun that follows is right, and should stay. Beside each way stands its control: as many heads or neurons at random, or as many texts whose pronouns are the model's own.
#
# **Questions**, after the papers: Does each way lower the bias, more than its control? Does that fade in other contexts, as the second paper has it for its own? Does data do more
# than the model's parts? (The third paper says so of classifiers; here the language model itself learns from balanced texts.)
#
# **Cost.** With the defaults (a tiny model): about a minute on two CPU cores, 1 GB. Fine-tuning takes 16 bytes of memory per weight. `params/smollm2.yaml`, the default of `make reproduce`:
# about 13 minutes on one core with AMX (several times as long without), 5 GB; exactly: the table of runs in `reports/`.
#
# > **Content warning.** Sentences are about occupations and gender, women and men only, as in the studies they come from.

# %% tags=["parameters"]
model: str = "tiny-llama"  # packaged or small model, local folder, or hub id
revision: str = ""  # of a hub id
dtype: str = "float32"  # float32, bfloat16, float16, or fast: bfloat16 if the device has it
device: str = "auto"  # auto, cpu, cuda, cuda:1, …
ways: dict = {"fasp": [0.1], "neurons": [0.05], "neuron slopes": [0.02]}  # shares to try
tune_epochs: int = 3  # fine-tuning, on all texts
tune_rates: list = [2e-5, 5e-5]  # learning rates to try; tiny models need more
tune_batch: int = 32  # texts per step
tune_seeds: list = [0, 1]  # of fine-tuning
yard_draws: int = 4  # controls with random heads or neurons
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file: what else the parts do
score_tokens: int = 1024  # of prose, to protect by and to choose a dose by
test_tokens: int = 2048  # of prose, for perplexity
window: int = 128  # tokens per window of prose
most_damage: float = 1.1  # highest perplexity, × unchanged, when a dose is chosen
n_boot: int = 1000  # bootstrap over occupations and seeds
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
import time
import warnings
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pandas as pd
import transformers
from IPython.display import Markdown, display
from scipy.special import expit

from biasprune import figures, lm, measure, progress, prompts, pronouns, record, weightscores, yardstick

warnings.filterwarnings("ignore", message=".*IProgress.*")
warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
dtype = lm.number_format(dtype, device)
config = {name: globals()[name] for name in ["model", "revision", "dtype", "ways", "tune_epochs", "tune_rates", "tune_batch", "tune_seeds", "yard_draws", "corpus_name", "score_tokens", "test_tokens", "window", "most_damage", "n_boot"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"08_one_yardstick-{model}")
net = lm.load(model, revision=revision or None, dtype=dtype, device=device)
table = yardstick.prompts()
selecting = table[table["side"] == "select"].reset_index(drop=True)
text = {s: prompts.corpus(corpus_name, s) for s in ("valid", "test")}
learned = yardstick.tuning_texts(selecting, seed=0)
inputs = {"prompts": table, "prose": pd.DataFrame({"text": text}), "texts": pd.DataFrame({"text": learned})}
inputs = {**{k: record.frame_sha256(t) for k, t in inputs.items()}, "weights": net.revision}
run = record.Run(folder, {**config, "inputs": inputs}, notebook="08_one_yardstick")
run.note(provenance=record.provenance(net), data=inputs)
facts = {**run.record["provenance"], **run.record["provenance"]["model"]}
shown = ["name", "class", "revision", "dtype", "layers", "heads", "parameters", "device", "commit"]
pd.DataFrame({"value": {k: str(facts[k]) for k in shown}})

# %% [markdown]
# ## 1 Sentences

# %%
examples = table.groupby(["context", "side"], sort=False).agg(
    sentences=("prompt", "size"), items=("item", "nunique"), example=("prompt", "first"), woman=("woman", "first"), man=("man", "first")
)  # fmt: skip
examples

# %% [markdown]
# ## 2 Three ways, and how much of each
# `fasp`: heads that add most to the bias to first order, of those that matter less for prose. `neurons`: the published set difference, neurons that matter for the expected pronoun and
# neither for the other one nor for prose. `neuron slopes`: as `fasp`, for neurons. `fine-tuning data`: the model learns the same sentences, each once with *she* and once with
# *he*. Every dose (share of the parts; learning rate) is tried on the sentences that select; the one that leaves least bias there is taken, among those that keep the perplexity of other prose within the limit.

# %%
cuts = {"valid": score_tokens, "test": test_tokens}
prose = {s: measure.windows(net, text[s], length=window, max_tokens=cuts[s]) for s in cuts}
METHODS = {"fasp": "heads, FASP", "neurons": "neurons, set difference", "neuron slopes": "neurons, slope"}


@cache
def pruning(method: str, share: float):
    given = weightscores.prose(prose["valid"]), yardstick.stereotypes(net, selecting)
    return pronouns.pruning(net, method, share, *given)


def tuned(rate: float, seed: int, chance=None):
    texts = yardstick.tuning_texts(selecting, seed=seed, chance=chance)
    how = {"epochs": tune_epochs, "rate": rate, "batch": tune_batch, "seed": seed}
    return nullcontext(yardstick.tuned(net, texts, **how))


def judged(way: str, seed: int, make) -> pd.DataFrame:
    start = time.perf_counter()
    with make() as own:
        rest = {"way": way, "seed": seed, "minutes": (time.perf_counter() - start) / 60}
        rest |= {f"ppl_{s}": float(measure.perplexity(measure.nll(own, w), w)[0]) for s, w in prose.items()}
        return table.drop(columns=["prompt", "woman", "man"]).assign(y=yardstick.log_odds(own, table), **rest)


def stored(way: str, seed: int, make) -> pd.DataFrame:
    return run.frame(record.slug(f"{way} {seed}".replace(",", "")), lambda: judged(way, seed, make))


plain = stored(yardstick.PLAIN, 0, lambda: nullcontext(net))
doses = {(m, s): f"{METHODS.get(m, m)}, {s:g}" for m, shares in ways.items() for s in shares}
tried = {k: stored(name, 0, lambda k=k: yardstick.pruned(net, pruning(*k))) for k, name in progress.bar(doses.items(), desc="shares")}  # fmt: skip
for rate in progress.bar(tune_rates, desc="learning rates"):
    name = f"{yardstick.DATA}, {rate:g}"
    tried[yardstick.DATA, rate] = stored(name, tune_seeds[0], lambda r=rate: tuned(r, tune_seeds[0]))
sweep = run.frame("sweep", lambda: yardstick.doses(plain, tried))
display(sweep.style.hide(axis="index").format(precision=3).format("{:g}", subset=["dose"]))
chosen = yardstick.chosen(sweep, most_damage)
dropped = [METHODS.get(m, m) for m in [*ways, yardstick.DATA] if m not in chosen]
display(Markdown("Taken: " + ", ".join(f"{METHODS.get(m, m)} {s:g}" for m, s in chosen.items()) + (f". No dose keeps within the limit: {', '.join(dropped)}." if dropped else ".")))  # fmt: skip

# %% [markdown]
# ## 3 Bias left

# %%
parts, controls = [plain], {}
for method, share in chosen.items():
    if method == yardstick.DATA:
        continue
    name = METHODS[method]
    parts.append(tried[method, share].assign(way=name))
    draws = progress.bar(range(yard_draws), desc=f"random, for {name}")
    parts += [stored(f"random, for {name}", k, lambda m=method, s=share, k=k: yardstick.pruned(net, pruning(m, s).random(net, k))) for k in draws]  # fmt: skip
    controls[name] = f"random, for {name}"
own_odds = expit(plain.loc[plain["side"] == "select", "y"].to_numpy())
if rate := chosen.get(yardstick.DATA):
    controls[yardstick.DATA] = "the model's own pronouns"
    parts.append(tried[yardstick.DATA, rate].assign(way=yardstick.DATA))
    todo = [(yardstick.DATA, k, None) for k in tune_seeds[1:]]
    todo += [(controls[yardstick.DATA], k, own_odds) for k in tune_seeds]
    parts += [stored(way, k, lambda k=k, c=chance: tuned(rate, k, c)) for way, k, chance in progress.bar(todo, desc="fine-tuning")]  # fmt: skip
each = pd.concat(parts, ignore_index=True)
judge = each[each["side"] == "judge"]
found = yardstick.replicates(judge, n_boot=n_boot)
left = run.frame("left", lambda: yardstick.left(judge, found))
costs = run.frame("costs", lambda: yardstick.costs(each, controls))
display(left.style.hide(axis="index").format(precision=3))
display(costs.style.hide(axis="index").format(precision=2, na_rep="–"))
contexts = list(dict.fromkeys(left["context"]))
figure = figures.ways(left, costs, contexts, yardstick.PLAIN)
figures.save(figure, folder / "figures", "ways")

# %% [markdown]
# ## 4 Verdict
# Shares of the unchanged model's bias, with 95 % intervals over occupations and seeds; a bias turned round counts as bias. A context in which the unchanged model shows none says nothing and is left out;
# so is *names*, which stands in the figure: a way that lowers the slope there has also unlearned what it should know.

# %%
damaged = costs.loc[costs["ppl_valid_ratio"] > most_damage, "way"].tolist()
verdicts = run.frame("verdicts", lambda: yardstick.verdicts(found, controls, damaged, dropped))
display(verdicts.style.hide(axis="index").format(precision=2, na_rep="–"))
removed, ratio = yardstick.Removed(found), costs.set_index("way")["ppl_ratio"]


def share_of(drawn) -> str:
    return "–" if pd.isna(drawn[0]) else f"{drawn[0]:.0%}"


told = [f"{w}: {share_of(removed.of(w, yardstick.SELECTED))} where selected, {share_of(removed.elsewhere(w))} elsewhere, {share_of(removed.of(w, yardstick.NAMES))} of what names tell (perplexity × {ratio[w]:.2f})" for w in controls]  # fmt: skip
start = "" if yardstick.SELECTED in removed.biased else "The unchanged model shows no bias there. "
sentence = f"{model}. {start}Bias removed by {'; '.join(told)}. " + "; ".join(f"{r.claim}: **{r.verdict}**" for r in verdicts.itertuples()) + "."  # fmt: skip
display(Markdown(sentence))

# %%
run.finish(
    about="pronouns and occupations",
    sentence=sentence,
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "verdicts": "Claims (ours: share of the unchanged model's bias; 95 % over occupations and seeds)",
        "left": "Bias (slope of log-odds), and how much less than unchanged (95 % over occupations and seeds)",
        "costs": "What it costs",
        "sweep": "Doses tried (share of the parts; learning rate of fine-tuning) on the sentences that select",
    },
    figures={
        "ways": "Bias left by every way in every context, and perplexity; hollow: controls. In names, the slope should stay"
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
