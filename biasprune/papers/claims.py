"""Claims of the three papers and of this companion, joined with the verdicts of finished runs.

``data/claims.csv`` has a row per claim: id; paper ("… (implied)": it rests on the claim without saying so); claim, in
our words; published (figure and its place); what (quantity and interval of our figure); notebook and params (parameter
file) that decide it; only_model (the one model it is about, last part of the name in lower case, or "published scores",
which any run may read); test (measure, threshold and split, fixed before the run); not_run (why there may be no run). A
verdict with id "" is on none of them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd
import yaml

from biasprune.core import data, parameters, run, stats

NOT_RUN, OURS, PUBLISHED = "not run here", "biasprune", "published scores"
VERDICTS = (*stats.VERDICTS, NOT_RUN)
COLUMNS = ["id", "paper", "claim", "published", "case", "ours", "low", "high", "what", "verdict", "why"]
COLUMNS += ["model", "about", "parameters", "notebook", "commit", "minutes", "command", "test"]


def known() -> pd.DataFrame:
    """The claims of ``data/claims.csv``; empty fields are ""."""
    return data.read_csv(data.data_dir() / "claims.csv")


def in_words(verdicts: pd.DataFrame) -> str:
    """A Markdown list with an item per claim: its cases with verdict and reason, as far as it has several.

    verdicts: columns claim, case, verdict, why.
    """
    said = verdicts["case"].where(verdicts["case"] == "", verdicts["case"] + ": ")
    said = (said + "**" + verdicts["verdict"] + "** (" + verdicts["why"] + ")").groupby(verdicts["claim"], sort=False)
    return "\n".join(f"- {claim}: {'; '.join(cases)}." for claim, cases in said)


def command(notebook: str, params: str, config: dict | None = None) -> str:
    """The shell command that makes a run again: its parameter file, and where its config differs from it."""
    folder, given = parameters.notebooks_dir(), {}
    words = ["papermill", f"notebooks/{notebook}.ipynb", f"{notebook}.ipynb"]
    if (file := folder / "params" / f"{params}.yaml").is_file():
        words += ["-f", f"notebooks/params/{params}.yaml"]
        given = yaml.safe_load(file.read_text("utf-8"))
    declared = parameters.parameters_of(folder / f"{notebook}.ipynb") if config else {}
    values = {name: given.get(name, default) for name, (_, default) in declared.items()}
    if differs := {k: config[k] for k in values if k in config and config[k] != values[k]}:
        # as YAML, whose floats have the point that JSON leaves out of 3e-05
        words += ["-y", yaml.safe_dump(differs, default_flow_style=True, width=10**9).strip()]
    return shlex.join(words)


def _verdicts(folder: Path, record: dict, claims: pd.DataFrame) -> list[dict]:
    """A run's verdicts with the ids of ``claims`` and the facts of the run."""
    model, name = record["provenance"]["model"]["name"], folder.parent.name
    short = model.rstrip("/").split("/")[-1].lower()
    # "F1" of a run of GPT-2 is claim "F1 gpt2"
    of_model = {i.split()[0]: i for i in claims["id"][claims["only_model"] == short]}
    table = pd.read_parquet(folder / "verdicts.parquet").query("id != ''").replace({"id": of_model})
    for column, allowed in (("id", claims["id"]), ("verdict", VERDICTS)):
        if unknown := sorted(set(table[column]) - set(allowed)):
            raise ValueError(f"{name}/{folder.name}, table verdicts: unknown {column} {', '.join(unknown)}.")
    published = table["id"].isin(claims["id"][claims["only_model"] == PUBLISHED])
    commit, _, changes = record["provenance"]["commit"].partition("+")
    facts = {"commit": commit[:10] + ("+changes" if changes else ""), "notebook": record["notebook"]}
    facts |= {"about": record["results"]["about"], "minutes": record["results"]["minutes"], "parameters": name}
    facts["command"] = command(record["notebook"], name, record["config"])
    table = table.assign(model=published.map({True: PUBLISHED, False: model}), **facts)
    if (data.data_dir() / "models" / short).is_dir():  # our small models say nothing about the papers
        table = table[published | table["id"].isin(claims["id"][claims["paper"] == OURS])]
    return table.to_dict("records")


def build(out: str | Path) -> pd.DataFrame:
    """One row per claim, run and case (of published scores: per case); "not run here" for a claim without a verdict.

    Columns: ``COLUMNS``. ours, low, high: of the quantity ``what`` (NaN: none); case tells rows of a run apart; about:
    its axis or groups; parameters: its parameter file; command: makes it again. ValueError: unknown id or verdict.
    """
    if not Path(out).is_dir():
        raise ValueError(f"{out} is no folder of run records.")
    claims, table = known(), []
    runs = [(folder, record) for folder, record in run.finished(out).items() if (folder / "verdicts.parquet").is_file()]
    rows = [row for folder, record in runs for row in _verdicts(folder, record, claims)]
    once = {(r["id"], r["case"], str(r["ours"])): r for r in reversed(rows)}
    # several runs may read the same published scores
    rows = [r for r in rows if r["model"] != PUBLISHED or r is once[r["id"], r["case"], str(r["ours"])]]
    for claim in claims.to_dict("records"):
        absent = {"verdict": NOT_RUN, "why": claim["not_run"], "model": claim["only_model"]}
        absent["command"] = command(claim["notebook"], claim["params"])
        found = [row for row in rows if row["id"] == claim["id"]]
        found = [row for row in found if row["verdict"] != NOT_RUN] or found or [absent]
        table += [{**claim, **row, "claim": claim["claim"], "what": row.get("what") or claim["what"]} for row in found]
    texts = [c for c in COLUMNS if c not in ("ours", "low", "high", "minutes")]
    return pd.DataFrame(table, columns=COLUMNS).fillna(dict.fromkeys(texts, ""))


def write(out: str | Path) -> pd.DataFrame:
    """Build the table and write it to out/claims.csv, whole or not at all."""
    table = build(out)
    run.write_text(Path(out) / "claims.csv", table.to_csv(index=False, float_format="%.4g"))
    return table
