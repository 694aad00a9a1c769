"""The ledger of claims: what the papers and this companion claim, beside what the run records say.

``data/claims.csv`` has a row per claim and says where in a run record our figure stands; the figures and
verdicts themselves are read from the records below reports/ and never typed. Its columns, all text:

    id, paper, claim     the claim in our words; paper "… (implied)": the paper rests on it without saying so
    published            the published figure and its place
    notebook             whose run records tell
    table, row           table of the record, and a pandas query for its row; "" takes the table's only row,
                         or no table at all
    by                   column that tells several rows of one run apart, such as dtype; "" for one row
    ours, low, high      columns of the row, or results.<key> of run.json; "" for none
    what                 what ours, low and high are
    verdict              a column, results.<key>, or a condition on the row: true is "reproduced", else not;
                         of two with ";" between, the second is "not reproduced", neither "undecided"
    why                  a column or results.<key>
    only_model           count runs of this model alone, by the last part of its name in lower case; the
                         claim without a model ("F1" of "F1 gpt2") leaves them out
    only_config          count runs with these values in their configuration alone, as JSON
    model                what to show as model where the figure isn't about the run's own
    params               parameter file that a reader would run, if nothing is found
    not_run              why there may be no run
    if_absent            why a run may lack the table or row; "" makes that an error

Runs of the small models in data/models say nothing about the papers' claims, only about our own.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pyarrow import ArrowInvalid

from biasprune import batch, fetch, record

NOT_RUN, OURS = "not run here", "biasprune"
VERDICTS = ("reproduced", "partly reproduced", "not reproduced", "undecided", NOT_RUN)
# the notebooks' words; "not found" is an interval that holds 0, which doesn't contradict a claim
_SAID = {
    **{v: v for v in VERDICTS[:4]},
    **{"found": "reproduced", "holds": "reproduced", "reached": "reproduced"},
    **{"True": "reproduced", "False": "not reproduced"},
    **{"doesn't hold": "not reproduced", "missed": "not reproduced", "not found": "undecided"},
}
CLAIM_COLUMNS = [
    *("id", "paper", "claim", "published", "notebook", "table", "row", "by", "ours", "low", "high"),
    *("what", "verdict", "why", "only_model", "only_config", "model", "params", "not_run", "if_absent"),
]
COLUMNS = [
    *("id", "paper", "claim", "published", "case", "ours", "low", "high", "what", "verdict", "why"),
    *("model", "about", "parameters", "notebook", "commit", "minutes", "command"),
]


class LedgerError(ValueError):
    """A claim and a run record don't fit. The message names both, and what was looked for."""


def claims(path: Path | None = None) -> pd.DataFrame:
    """The claims of ``data/claims.csv``, or of another file with its columns; empty fields are "".

    Raises
    ------
    LedgerError
        Missing columns, or two claims of one id.
    """
    path = path or fetch.data_dir() / "claims.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := [c for c in CLAIM_COLUMNS if c not in table]:
        raise LedgerError(f"{path.name} lacks the columns {', '.join(missing)}.")
    if (twice := table["id"][table["id"].duplicated()]).size:
        raise LedgerError(f"{path.name}: two claims have the id {twice.iloc[0]!r}.")
    return table[CLAIM_COLUMNS]


def runs(reports: Path) -> dict[Path, dict]:
    """Finished runs below ``reports``, folder → content of run.json, sorted by parameters and notebook.

    Raises
    ------
    LedgerError
        No such folder, or a run.json that isn't JSON.
    """
    if not Path(reports).is_dir():
        raise LedgerError(f"{reports} is no folder; give the one that the runner writes into (--out).")
    found = {}
    for path in sorted(Path(reports).glob("*/*/run.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            where = "/".join(path.parts[-3:])
            raise LedgerError(f"{where} is no JSON ({e}); run that notebook again.") from e
        if facts.get("status") == "done":
            found[path.parent] = facts
    return found


def build(reports: Path, known: pd.DataFrame | None = None) -> pd.DataFrame:
    """The ledger: one row per claim, run, and case within the run.

    Parameters
    ----------
    reports
        Folder with run records in <parameters>/<notebook>/.
    known
        Of ``claims``; by default the repository's.

    Returns
    -------
    DataFrame
        ``COLUMNS``: those of the claim; case (what tells rows of one run apart); ours, low, high (NaN for
        none); verdict (one of ``VERDICTS``) and why; model, about (axis or groups), parameters (the run's
        parameter file), notebook, commit; minutes of computation; command to run it again. A claim without a
        verdict from any run has a row "not run here" with the reason.

    Raises
    ------
    LedgerError
        A table, row or column that isn't there, several rows without ``by``, an unknown verdict.
    """
    known, done = claims() if known is None else known, runs(reports)
    every, rows = known.to_dict("records"), []
    apart = [c for c in every if c["only_model"]]
    for claim in every:
        own = [(folder, facts) for folder, facts in done.items() if _speaks(claim, facts, apart)]
        found = [row for folder, facts in own for row in _of_run(claim, folder, facts)]
        command = command_of(claim["params"], claim["notebook"]) if claim["params"] else ""
        told = [row for row in found if row["verdict"] != NOT_RUN]
        rows += told or found or [_row(claim, command=command, verdict=NOT_RUN, why=claim["not_run"])]
    return pd.DataFrame(rows, columns=COLUMNS)


def write(reports: Path) -> pd.DataFrame:
    """Build the ledger and write it to ``reports/claims.csv``, whole or not at all."""
    table = build(reports)
    record.write_text(Path(reports) / "claims.csv", table.to_csv(index=False, float_format="%.4g"))
    return table


def _short(facts: dict) -> str:
    """'openai-community/gpt2' → 'gpt2': the same model under a hub id and a folder's name."""
    return facts["provenance"]["model"]["name"].rstrip("/").split("/")[-1].lower()


def _speaks(claim: dict, facts: dict, apart: Sequence[dict] = ()) -> bool:
    """Whether a claim is about a run; ``apart``: the claims on one model."""
    if facts["notebook"] != claim["notebook"]:
        return False
    wanted, model = json.loads(claim["only_config"] or "{}"), _short(facts)
    if any(facts.get("config", {}).get(k) != v for k, v in wanted.items()):
        return False
    if claim["only_model"]:
        return model == claim["only_model"]
    small = (fetch.data_dir() / "models" / model).is_dir() and claim["paper"] != OURS and not claim["model"]
    return not small and not any(
        c["id"].split()[0] == claim["id"].split()[0] and _speaks(c, facts) for c in apart
    )


def command_of(parameters: str, notebook: str, config: dict | None = None) -> str:
    """What makes a run again: its parameter file or, if that has other values, papermill with all."""
    short = f"python -m biasprune run --params {parameters} --notebook {notebook} --out results"
    if config is None:
        return short
    folder = record.notebooks_dir()
    if not (path := folder / f"{notebook}.ipynb").is_file():
        return ""  # a notebook that is gone
    default = batch.defaults_of(path)
    values = {k: v for k, v in config.items() if k in default}
    if (folder / "params" / f"{parameters}.yaml").is_file():
        given = {**default, **batch.read_parameters(parameters)}
        if all(given[k] in (v, "fast") for k, v in values.items()):  # fast: resolved in the record
            return short
    # as YAML, since its floats need a point, which JSON leaves out of 3e-05
    given = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return f"papermill notebooks/{notebook}.ipynb {notebook}.ipynb -y {shlex.quote(given.strip())}"


def _row(claim: dict, **found: object) -> dict:
    row = {c: claim[c] for c in ("id", "paper", "claim", "published", "what", "notebook")}
    row |= {
        "case": "",
        "about": "",
        "model": claim["model"] or claim["only_model"],
        "parameters": "",
        "commit": "",
        "minutes": float("nan"),
    }
    row |= {"ours": float("nan"), "low": float("nan"), "high": float("nan")}
    return {**row, **found}


def _of_run(claim: dict, folder: Path, facts: dict) -> list[dict]:
    """A claim's rows in one run."""
    about = f"Claim {claim['id']}, run {folder.parent.name}/{folder.name}"
    source = facts["provenance"]
    base = {
        "model": claim["model"] or source["model"]["name"],
        "parameters": folder.parent.name,
        "about": facts["results"].get("about") or facts.get("config", {}).get("axis", ""),
        "command": command_of(folder.parent.name, facts["notebook"], facts.get("config", {})),
        "commit": source["commit"][:10] + ("+changes" if source["commit"].endswith("+changes") else ""),
        "minutes": facts["results"]["minutes"],
    }
    found = _selected(claim, folder, about)
    if found.empty:
        if not claim["if_absent"]:
            raise LedgerError(f"{about}: table {claim['table']!r} has no row for {claim['row']!r}.")
        return [_row(claim, **base, verdict=NOT_RUN, why=claim["if_absent"])]
    if len(found) > 1 and (claim["by"] not in found or found[claim["by"]].duplicated().any()):
        raise LedgerError(
            f"{about}: {len(found)} rows of table {claim['table']!r} fit {claim['row']!r}; "
            f"name the column that tells them apart in 'by' (now {claim['by']!r})."
        )
    rows = []
    for i, row in found.iterrows():
        values = {k: _value(claim, k, row, facts, about) for k in ("ours", "low", "high")}
        numbers = {k: float("nan") if v is None else float(v) for k, v in values.items()}
        verdict, why = _verdict(claim, found.loc[[i]], row, facts, about)
        case = str(row[claim["by"]]) if claim["by"] in row else ""
        rows.append(_row(claim, **base, **numbers, case=case, verdict=verdict, why=why))
    return rows


def _selected(claim: dict, folder: Path, about: str) -> pd.DataFrame:
    """The rows of a run's table that a claim is about; empty if the table or they are missing."""
    if not claim["table"]:
        return pd.DataFrame({"finished": [True]})  # that the run came to its end is all there is
    path = folder / f"{claim['table']}.parquet"
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        if claim["if_absent"]:
            return pd.DataFrame()
        raise LedgerError(f"{about}: there is no table {path.name}.") from None
    except (ArrowInvalid, OSError) as e:
        raise LedgerError(f"{about}: table {path.name} can't be read ({e}).") from e
    if table.empty or not claim["row"]:
        return table
    return _evaluated(lambda: table.query(claim["row"], engine="python"), claim["row"], table, about)


def _evaluated(call: Callable[[], Any], expression: str, table: pd.DataFrame, about: str) -> Any:
    """The result of a pandas expression, or an error that says which one and what columns there are."""
    try:
        return call()
    except (NameError, SyntaxError, KeyError, AttributeError, TypeError, ValueError) as e:
        raise LedgerError(f"{about}: {expression!r} doesn't fit the columns {list(table)} ({e}).") from e


def _value(claim: dict, key: str, row: pd.Series, facts: dict, about: str) -> object:
    """What a claim's field points at: a column of the row, results.<key>, or None for an empty field."""
    where = claim[key]
    if not where:
        return None
    source, name = (facts["results"], where[8:]) if where.startswith("results.") else (row, where)
    if name not in source:
        raise LedgerError(f"{about}: {key} is to be {where!r}, but there are only {list(source.keys())}.")
    return source[name]


def _verdict(claim: dict, found: pd.DataFrame, row: pd.Series, facts: dict, about: str) -> tuple[str, str]:
    where = claim["verdict"]
    why = _value(claim, "why", row, facts, about) or ""
    if where in row or where.startswith("results."):
        said = str(_value(claim, "verdict", row, facts, about))
        said, _, more = said.partition(": ")  # "undecided: no fix to transfer"
        if said not in _SAID:
            raise LedgerError(f"{about}: unknown verdict {said!r}; known are {', '.join(_SAID)}.")
        return _SAID[said], why or more
    ours = _value(claim, "ours", row, facts, about)
    if isinstance(ours, float) and pd.isna(ours):
        return "undecided", why
    for condition, said in zip(where.split(";"), ("reproduced", "not reproduced"), strict=False):
        true = _evaluated(lambda c=condition: found.eval(c.strip(), engine="python"), condition, found, about)
        if bool(pd.Series(true).all()):
            return said, why
    return ("undecided" if ";" in where else "not reproduced"), why
