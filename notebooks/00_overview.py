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
# # Overview: what three papers claim, and what our runs say
#
# **Papers.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv
# 2312.15398); Ma et al., *Breaking Down Bias: On The Limits of Generalizable Pruning Strategies*, FAccT
# 2025 (arXiv 2502.07771); Baksi et al., *Downstream bias mitigation is all you need*, 2024 (arXiv
# 2408.00612). This companion's own claims, about speed, reliability and known truths, stand under
# "biasprune".
#
# **Method.** Every notebook writes a table of verdicts on the claims of `data/claims.csv`. They are put
# together here. Nothing is computed anew, and no result is typed.
#
# **Cost.** Seconds, no model.
#
# > **Content warning.** The claims are about bias against social groups. No text written by a model is shown
# > here.

# %% tags=["parameters"]
reports: str = ""  # folder of run records; "" takes the repository's reports
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display

from biasprune import figures
from biasprune.core.parameters import ROOT
from biasprune.core.run import start
from biasprune.papers import claims

# %%
run = start("00_overview", globals())
source = Path(reports) if reports else ROOT / "reports"
table = claims.build(source)
with_run = table[table["verdict"] != claims.NOT_RUN]
n_runs = len(with_run.drop_duplicates(["parameters", "notebook"]))
run.inputs(model={"name": f"{n_runs} runs"}, claims=table)

# %% [markdown]
# ## 1 Verdicts by paper
# A verdict on a claim by one run, and by one case within it, counts once. *No bias to test*: the unpruned
# model shows none. *Too uncertain*: the interval holds both answers. *Not run here*: no run has a verdict
# on the claim.

# %%
counts = table.groupby(["paper", "verdict"], sort=False).size().unstack(fill_value=0)
counts = counts.reindex(columns=list(claims.VERDICTS), fill_value=0).reset_index()
counts = run.frame("summary", lambda: counts)
long = counts.melt("paper", var_name="verdict", value_name="n")
run.figure(figures.heat_map(long, "paper", "verdict", "n", label="claims × runs × cases"), "verdicts")
counts.style.hide(axis="index")

# %%
parts = [
    f"{paper}: {with_run.loc[with_run['paper'] == paper, 'id'].nunique()} of {rows['id'].nunique()} claims"
    for paper, rows in table.groupby("paper", sort=False)
]
sentence = f"Claims with a verdict from one of {n_runs} runs: {'; '.join(parts)}."
older = sum('"form"' not in path.read_text("utf-8") for path in source.glob("*/*/run.json"))
if older:
    sentence += f" {older} records are of the project's first version and aren't read"
    sentence += " (of those in `reports/`, `first-version-claims.csv` keeps the verdicts)."
display(Markdown(sentence))

# %% [markdown]
# ## 2 Every claim
# One row per claim, its runs below each other. *ours* is the quantity in column *ours is*, with its
# interval in brackets. A claim that is *(implied)* is what a paper rests on without saying so. Small models
# that this project trained count only for the companion's own claims. `claims.csv`, beside the runs, has
# the commit, the minutes and the command of every run, too.


# %%
def ours(row: pd.Series) -> str:
    ends = f" ({row['low']:.3g} – {row['high']:.3g})" if pd.notna(row["low"]) else ""
    return "–" if pd.isna(row["ours"]) else f"{row['ours']:.3g}{ends}"


shown = table.assign(ours=table.apply(ours, axis=1)).rename(columns={"what": "ours is"})
facts = shown[["model", "about", "parameters", "case"]]
shown["run"] = facts.agg(lambda row: ", ".join(filter(None, row)), axis=1)
of_claim = ["id", "claim", "published", "ours is"]
# runs of a claim stand below its first one
shown[of_claim] = shown[of_claim].mask(shown.duplicated(["id", "ours is"]), "")
wrapped = {"white-space": "normal", "text-align": "left", "vertical-align": "top"}
for paper, rows in shown.groupby("paper", sort=False):
    display(Markdown(f"### {paper}"))
    rows = rows[[*of_claim, "run", "ours", "verdict", "why"]]
    display(rows.style.hide(axis="index").set_properties(**wrapped))

# %%
run.frame("claims", lambda: table)
run.finish(
    sentence,
    about="all claims",
    tables={"summary": "Verdicts over claims, runs and cases; all of them are in claims.csv"},
    figures={"verdicts": "Verdicts by paper"},
)
