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
# **Papers.** Zayed et al., *Fairness-Aware Structured Pruning in Transformers*, AAAI 2024 (arXiv 2312.15398); Ma et al., *Breaking Down
# Bias: On The Limits of Generalizable Pruning Strategies*, FAccT 2025 (arXiv 2502.07771); Baksi et al., *Downstream bias mitigation is all
# you need*, 2024 (arXiv 2408.00612). And the claims of this companion itself, about speed, reliability and known truths.
#
# **What is done here.** Every claim of `data/claims.csv` is looked up in the run records of the other notebooks: the published figure, ours with its
# interval, the model, the command that makes it again, the minutes it took, and a verdict. Nothing is computed anew and no result is typed.
# A claim that no run tells about says so, and why.
#
# **Cost.** Seconds, no model.
#
# > **Content warning.** The claims are about bias against social groups. No text written by a model is shown here.

# %% tags=["parameters"]
reports: str = ""  # folder of run records; "" takes the repository's reports
out: str = ""  # output folder; "" makes one below runs/ in the working directory

# %%
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display

from biasprune import figures, ledger, record

# %% [markdown]
# ## Provenance
# The runs that the ledger is made of.

# %%
source = Path(reports) if reports else record.ROOT / "reports"
folder = Path(out) if out else Path("runs") / "00_overview"
known = ledger.claims()
seen = {f: facts for f, facts in ledger.runs(source).items() if facts["notebook"] in set(known["notebook"])}
inputs = {f"{f.parent.name}/{f.name}": facts["key"] for f, facts in seen.items()}
config = {"runs": inputs, "claims": record.frame_sha256(known)}
run = record.Run(folder, config, notebook="00_overview")
run.note(provenance={**record.provenance(), "model": {"name": f"{len(seen)} runs", "dtype": "–"}})
display(Markdown(f"{len(known)} claims, {len(seen)} finished runs; this notebook at commit {record.commit()[:10]}."))  # fmt: skip
pd.DataFrame([
    {"run": name, "model": facts["provenance"]["model"]["name"], "minutes": facts["results"]["minutes"], "commit": facts["provenance"]["commit"][:10], "device": facts["provenance"]["device"]}
    for name, facts in zip(inputs, seen.values(), strict=True)
]).style.hide(axis="index").format(precision=1)  # fmt: skip

# %% [markdown]
# ## 1 The ledger
# One row per claim and run; *case* tells rows of one run apart. *ours*: the figure that `what` in table `ledger` names, with its interval in brackets. "undecided": the interval holds
# both answers, or there was nothing to judge, as where the unpruned model shows no bias. "reproduced" of one of the companion's own claims means that the run shows it. Claims that begin with
# "Implied" claims are what a paper rests on without saying so. Small models that this project trained tell only about its own claims.

# %%
table = run.frame("ledger", lambda: ledger.build(source, known))


# %%
def figure_of(row: pd.Series) -> str:
    ends = f" ({row['low']:.3g} – {row['high']:.3g})" if pd.notna(row["low"]) else ""
    return "–" if pd.isna(row["ours"]) else f"{row['ours']:.3g}{ends}"


def shown(own: pd.DataFrame) -> pd.DataFrame:
    run_with = own[["model", "about", "parameters"]].agg(lambda r: ", ".join(filter(None, r)), axis=1)
    columns = own.assign(ours=own.apply(figure_of, axis=1), run=run_with)
    return columns[
        ["id", "claim", "published", "case", "ours", "verdict", "why", "run", "minutes", "command"]
    ]


# %%
wrapped = {"white-space": "normal", "text-align": "left", "vertical-align": "top"}
for paper, own in table.groupby("paper", sort=False):
    display(Markdown(f"### {paper}"))
    display(shown(own).style.hide(axis="index").format(precision=1, na_rep="–").set_properties(**wrapped))

# %% [markdown]
# ## 2 Verdicts by paper and run

# %%
figure = figures.verdicts(table, ledger.VERDICTS)
figures.save(figure, folder / "figures", "verdicts")

# %%
counts = table.groupby(["paper", "verdict"], sort=False).size().unstack(fill_value=0)
counts = counts.reindex(columns=list(ledger.VERDICTS), fill_value=0).reset_index()
summary = run.frame("summary", lambda: counts)
summary.style.hide(axis="index")

# %% [markdown]
# ## 3 In one sentence

# %%
told = table[table["verdict"] != ledger.NOT_RUN]
parts = [
    f"{paper}: {own['id'].nunique()} of {table.loc[table['paper'] == paper, 'id'].nunique()} claims have a run ("
    + ", ".join(f"{n} {v}" for v, n in own["verdict"].value_counts().items()) + ")"
    for paper, own in told.groupby("paper", sort=False)
]  # fmt: skip
without = [p for p in table["paper"].unique() if p not in set(told["paper"])]
sentence = "Verdicts over claims, runs and cases. " + "; ".join([*parts, *(f"{p}: no run yet" for p in without)]) + "."  # fmt: skip
display(Markdown(sentence))

# %%
run.finish(
    sentence=sentence,
    about="all claims",
    minutes=round(sum(run.record["seconds"].values()) / 60, 1),
    tables={"summary": "Verdicts over claims, runs and cases; the whole ledger is in claims.csv"},
    figures={"verdicts": "Verdicts by paper and parameter file"},
)
sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
