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
# changes the fine-tuning data. Each has its own measure, model and texts; nobody has run them side by side.
#
# **What is done here.** One model, one measure, the same sentences for all three. Given sentences such as "The nurse said that", how far does the probability of *she* against *he*
# follow an occupation's share of women? Each way may use the sentences of one context, *speech*, about one half of 60 occupations. It is judged by other sentences of that
# context, and by other contexts (*possession*: her or his; *welcome*: her or him; *story*), about the other half. In *names* the first name tells the gender: there a
# pronoun that follows is right, and should stay. Beside each way stands its control: as many heads or neurons at random, as many texts with shares as observed.
#
# **Claims.** Each way lowers the bias, more than its control. Its effect fades in other contexts (second paper). The data does more than the model's parts (third paper).
#
# **Cost.** With the defaults (a tiny model): about a minute on two CPU cores, 1 GB. `params/smollm2.yaml`: see the table of runs in `reports/`.
#
# > **Content warning.** Sentences are about occupations and gender, women and men only, as in the studies they come from.

# %% tags=["parameters"]
model: str = "tiny-llama"  # packaged or small model, local folder, or hub id
revision: str = ""  # of a hub id
dtype: str = "float32"  # float32, bfloat16, float16
device: str = "auto"  # auto, cpu, cuda, cuda:1, …
ways: dict = {"fasp": [0.1, 0.2], "neurons": [0.1], "neuron slopes": [0.02, 0.05]}  # shares to try
tune_epochs: int = 2  # fine-tuning, on all texts
tune_rate: float = 1e-3  # learning rate
tune_batch: int = 16  # texts per step
yard_seeds: list = [0, 1]  # of fine-tuning, and of controls
corpus_name: str = "corpora/everyday"  # sotu, bold, wikitext-2, or a text file: what else the parts do
score_tokens: int = 1024  # of prose, to protect by and to choose a share by
test_tokens: int = 2048  # of prose, for perplexity
window: int = 128  # tokens per window of prose
most_damage: float = 1.1  # highest perplexity, × unchanged, when a share is chosen
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

from biasprune import figures, lm, measure, progress, prompts, pronouns, record, weightscores, yardstick

warnings.filterwarnings("ignore", message=".*IProgress.*")
warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pd.set_option("display.precision", 3, "display.max_colwidth", 110)

# %% [markdown]
# ## Provenance

# %%
config = {name: globals()[name] for name in ["model", "revision", "dtype", "ways", "tune_epochs", "tune_rate", "tune_batch", "yard_seeds", "corpus_name", "score_tokens", "test_tokens", "window", "most_damage", "n_boot"]}  # fmt: skip
folder = Path(out) if out else Path("runs") / record.slug(f"08_one_yardstick-{model}")
net = lm.load(model, revision=revision or None, dtype=dtype, device=device)
table = yardstick.prompts()
inputs = {"prompts": record.frame_sha256(table), "weights": net.revision}
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
# ## 2 Three ways, and the share that each may take
# `fasp`: heads that add most to the bias to first order, of those that matter less for prose. `neurons`: the published set difference, neurons that matter for the expected pronoun and
# neither for the other one nor for prose. `neuron slopes`: as `fasp`, for neurons. Every share is tried on the sentences that select; the one that leaves least bias there is taken, among those that keep
# the perplexity of other prose within the limit. `fine-tuning data`: the model learns the same sentences, each once with *she* and once with *he*.

# %%
text = {s: prompts.corpus(corpus_name, s) for s in ("valid", "test")}
cuts = {"valid": score_tokens, "test": test_tokens}
prose = {s: measure.windows(net, text[s], length=window, max_tokens=cuts[s]) for s in cuts}
selecting = table[table["side"] == "select"].reset_index(drop=True)
METHODS = {"fasp": "heads, FASP", "neurons": "neurons, set difference", "neuron slopes": "neurons, slope"}


@cache
def pruning(method: str, share: float):
    given = weightscores.prose(prose["valid"]), yardstick.stereotypes(net, selecting)
    return pronouns.pruning(net, method, share, *given)


def tuned(balanced: bool, seed: int):
    texts = yardstick.tuning_texts(selecting, balanced=balanced, seed=seed)
    how = {"epochs": tune_epochs, "rate": tune_rate, "batch": tune_batch, "seed": seed}
    return yardstick.tuned(net, texts, **how)


def judged(way: str, seed: int, make) -> pd.DataFrame:
    start = time.perf_counter()
    with make() as _:
        own = {"way": way, "seed": seed, "minutes": (time.perf_counter() - start) / 60}
        own |= {f"ppl_{s}": float(measure.perplexity(measure.nll(net, w), w)[0]) for s, w in prose.items()}
        return table.drop(columns=["prompt", "woman", "man"]).assign(p=yardstick.chances(net, table), **own)


def stored(way: str, seed: int, make) -> pd.DataFrame:
    return run.frame(record.slug(f"{way} {seed}".replace(",", "")), lambda: judged(way, seed, make))


plain = stored("unchanged", 0, nullcontext)
doses = {(m, s): f"{METHODS[m]}, {s:g}" for m, shares in ways.items() for s in shares}
tried = {k: stored(name, 0, lambda k=k: pruning(*k).applied(net)) for k, name in progress.bar(doses.items(), desc="shares")}  # fmt: skip
sweep = run.frame("sweep", lambda: yardstick.doses(plain, tried))
display(sweep.style.hide(axis="index").format(precision=3).format("{:g}", subset=["share"]))
chosen = yardstick.chosen(sweep, most_damage)
display(Markdown("Taken: " + (", ".join(f"{METHODS[m]} {s:g}" for m, s in chosen.items()) or "none keeps the perplexity within the limit") + "."))  # fmt: skip

# %% [markdown]
# ## 3 Bias left

# %%
parts, controls = [plain], {}
for method, share in chosen.items():
    name = METHODS[method]
    parts.append(tried[method, share].assign(way=name))
    parts += [stored(f"random, for {name}", k, lambda m=method, s=share, k=k: pruning(m, s).random(net, k).applied(net)) for k in yard_seeds]  # fmt: skip
    controls[name] = [f"random, for {name}"]
for way, balanced in (("fine-tuning data", True), ("the same data as observed", False)):
    parts += [stored(way, k, lambda b=balanced, k=k: tuned(b, k)) for k in progress.bar(yard_seeds, desc=way)]
controls["fine-tuning data"] = ["the same data as observed"]
each = pd.concat(parts, ignore_index=True)
found = yardstick.replicates(each[each["side"] == "judge"], n_boot=n_boot)
left = run.frame("left", lambda: yardstick.left(found))
costs = run.frame("costs", lambda: yardstick.costs(each, controls))
display(left.style.hide(axis="index").format(precision=3))
display(costs.style.hide(axis="index").format(precision=2))
contexts = list(dict.fromkeys(left["context"]))
figure = figures.ways(left, costs, contexts, "unchanged")
figures.save(figure, folder / "figures", "ways")

# %% [markdown]
# ## 4 Verdict
# Shares of the unchanged model's bias. A context without bias of the unchanged model says nothing, and is left out; so is *names*, which stands in the figure: a way that lowers the slope there has also
# unlearned what it should know.

# %%
verdicts = run.frame("verdicts", lambda: yardstick.verdicts(found, controls, "fine-tuning data"))
display(verdicts.style.hide(axis="index").format(precision=2, na_rep="–"))
gone = yardstick.removed(found, list(controls))
summary = "; ".join(f"{r.way}: {r.there:.0%} where selected, {r.elsewhere:.0%} elsewhere, {r.names:.0%} of what names say (perplexity × {costs.set_index('way').loc[r.way, 'ppl_ratio']:.2f})" for r in gone.itertuples())  # fmt: skip
sentence = f"{model}. Bias removed: {summary}. " + "; ".join(f"{r.claim}: **{r.verdict}**" for r in verdicts.itertuples()) + "."  # fmt: skip
display(Markdown(sentence))

# %%
run.finish(
    about="pronouns and occupations",
    sentence=sentence,
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={
        "verdicts": "Claims (ours: share of the unchanged model's bias; 95 % over occupations and seeds)",
        "left": "Slope of p(she) on the share of women, and how much less than unchanged (95 %)",
        "costs": "What it costs",
        "sweep": "Shares tried on the sentences that select",
    },
    figures={
        "ways": "Bias left by every way in every context, and perplexity; hollow: controls. In names, the slope should stay"
    },
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
