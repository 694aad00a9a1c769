"""The ledger of claims: a made-up reports folder worked out by hand, and the committed one."""

from __future__ import annotations

import json
import shlex

import pandas as pd
import papermill
import pytest
import yaml

from biasprune import batch, ledger
from biasprune.record import ROOT

REPORTS = ROOT / "reports"


def add_run(reports, name, notebook, tables, model="org/Tiny-1", status="done", config=None, **results):
    """A run's folder as ``record.Run`` leaves it."""
    folder = reports / name / notebook
    folder.mkdir(parents=True)
    source = {"commit": "0123456789abcdef", "device": "a device", "model": {"name": model}}
    facts = {
        "notebook": notebook,
        "status": status,
        "key": name,
        "provenance": source,
        "config": config or {},
    }
    (folder / "run.json").write_text(json.dumps({**facts, "results": {"minutes": 1.5, **results}}))
    for table, rows in tables.items():
        pd.DataFrame(rows).to_parquet(folder / f"{table}.parquet")
    return folder


def claim(**fields):
    """A claim on table ``verdicts`` of notebook 05, by the beginning of the claim's name."""
    base = dict.fromkeys(ledger.CLAIM_COLUMNS, "")
    base |= {"id": "A", "paper": "P", "claim": "it is so", "published": "19 %", "notebook": "05_x"}
    base |= {"table": "verdicts", "row": "claim.str.startswith('C1')", "by": "data_name", "what": "change"}
    base |= {"ours": "ours", "low": "low", "high": "high", "verdict": "verdict", "why": "why"}
    base |= {"params": "big", "not_run": "needs a GPU"}
    assert set(fields) <= set(base)
    return pd.DataFrame([{**base, **fields}])


VERDICTS = [  # as 05 writes them: several claims, each on two sets of texts
    {"claim": "C1: barely", "ours": 0.1, "low": -0.1, "high": 0.3, "verdict": "undecided", "why": "wide"},
    {"claim": "C2: more", "ours": 0.5, "low": 0.2, "high": 0.8, "verdict": "reproduced", "why": "clear"},
    {"claim": "C1: barely", "ours": 0.0, "low": -0.01, "high": 0.01, "verdict": "reproduced", "why": "in"},
]
VERDICTS = [{**v, "needed": 3.0, "data_name": d} for v, d in zip(VERDICTS, "aab", strict=True)]
PLAIN = [{k: v for k, v in VERDICTS[0].items() if k not in ("needed", "data_name")}]  # without sets of texts


def test_ledger_of_a_made_up_folder(tmp_path, monkeypatch):
    add_run(tmp_path, "one", "05_x", {"verdicts": VERDICTS})
    add_run(tmp_path, "two", "05_x", {"verdicts": PLAIN}, model="Other")
    add_run(tmp_path, "three", "05_x", {}, status="running")
    add_run(tmp_path, "one", "06_y", {})
    monkeypatch.setattr(ledger, "command_of", lambda *given: " ".join(map(str, given)))
    known = pd.concat([claim(), claim(id="B", notebook="07_z")])
    table = ledger.build(tmp_path, known)
    assert list(table) == ledger.COLUMNS
    rows = table[["id", "case", "ours", "low", "high", "verdict", "why", "model", "parameters"]].to_numpy()
    assert rows[:3].tolist() == [
        ["A", "a", 0.1, -0.1, 0.3, "undecided", "wide", "org/Tiny-1", "one"],
        ["A", "b", 0.0, -0.01, 0.01, "reproduced", "in", "org/Tiny-1", "one"],
        ["A", "", 0.1, -0.1, 0.3, "undecided", "wide", "Other", "two"],
    ]
    assert table["minutes"].tolist()[:3] == [1.5] * 3 and set(table["commit"][:3]) == {"0123456789"}
    last = table.iloc[3]
    assert (last["id"], last["verdict"], last["why"]) == ("B", "not run here", "needs a GPU")
    assert table["command"].tolist() == ["one 05_x {}", "one 05_x {}", "two 05_x {}", "big 07_z"]
    assert last[["ours", "low", "high", "minutes"]].isna().all() and len(table) == 4


def test_fields_of_run_json_and_conditions(tmp_path):
    tables = {"numbers": [{"name": "x", "value": 2.0}, {"name": "y", "value": 9.0}]}
    add_run(tmp_path, "one", "05_x", tables, verdict="partly reproduced", sentence="so it was", share=0.4)
    point = {"table": "numbers", "row": "name == 'y'", "by": "", "low": "", "high": ""}
    facts = {"ours": "results.share", "verdict": "results.verdict", "why": "results.sentence"}
    first = ledger.build(tmp_path, claim(**point, **facts)).iloc[0]
    assert (first["ours"], first["verdict"], first["why"]) == (0.4, "partly reproduced", "so it was")
    assert pd.isna(first["low"])
    above = {**point, "ours": "value", "why": ""}
    for condition, verdict in {"value > 8": "reproduced", "value > 9": "not reproduced"}.items():
        got = ledger.build(tmp_path, claim(**above, verdict=condition)).iloc[0]
        assert (got["ours"], got["verdict"]) == (9.0, verdict)
    none = {"table": "", "row": "", "ours": "", "why": "", "verdict": "finished"}
    assert ledger.build(tmp_path, claim(**{**point, **none}))["verdict"].tolist() == ["reproduced"]


def test_claims_about_one_model_and_about_something_else(tmp_path):
    add_run(tmp_path, "one", "05_x", {"verdicts": PLAIN})
    assert ledger.build(tmp_path, claim(only_model="tiny-1"))["verdict"].tolist() == ["undecided"]
    other = ledger.build(tmp_path, claim(only_model="gpt2")).iloc[0]
    assert (other["verdict"], other["model"]) == ("not run here", "gpt2")
    assert ledger.build(tmp_path, claim(model="published scores"))["model"].tolist() == ["published scores"]


def test_a_claim_with_two_conditions(tmp_path):
    for low, high, verdict in (
        (2.0, 3.0, "reproduced"),
        (1.0, 1.9, "not reproduced"),
        (1.0, 3.0, "undecided"),
    ):
        folder = add_run(
            tmp_path / verdict, "one", "05_x", {"verdicts": [{**PLAIN[0], "low": low, "high": high}]}
        )
        got = ledger.build(folder.parents[1], claim(verdict="low >= 2; high < 2"))
        assert got["verdict"].tolist() == [verdict]


def test_runs_that_a_claim_is_not_about(tmp_path):
    """Another configuration; a model with a claim of its own; for papers, our small models."""
    for name, model, axis in (
        ("a", "Big", "x"),
        ("b", "gpt2", "x"),
        ("c", "Big", "y"),
        ("d", "tiny-gpt2", "x"),
    ):
        add_run(tmp_path, name, "05_x", {"verdicts": PLAIN}, model=model, config={"axis": axis})
    own = claim(id="A gpt2", only_model="gpt2")
    known = pd.concat([claim(only_config='{"axis": "x"}'), own, claim(id="B", paper="biasprune")])
    table = ledger.build(tmp_path, known)
    found = table.groupby("id")["parameters"].agg("".join).to_dict()
    assert found == {"A": "a", "A gpt2": "b", "B": "abcd"}
    assert table["about"].tolist() == ["x", "x", "x", "x", "y", "x"]


def test_the_command_of_a_run_makes_it_again(tmp_path):
    """By its parameter file; a run of a grid by papermill, which takes the values as they stand."""
    file = batch.read_parameters("smollm2")
    used = {"model": file["model"], "ways": file["ways"], "most_damage": 1.1, "inputs": {"prompts": "0f"}}
    plain = ledger.command_of("smollm2", "08_one_yardstick", used)
    assert plain == "python -m biasprune run --params smollm2 --notebook 08_one_yardstick --out results"
    for other in (
        {"most_damage": 1.2},
        {"ways": {}},
    ):  # as by "set" of a grid, or before the file was changed
        assert ledger.command_of("smollm2", "08_one_yardstick", used | other).startswith("papermill")
    config = {"model": "it's", "ways": {"fasp": [0.1]}, "tune_rates": [3e-5], "inputs": {"prompts": "0f"}}
    words = shlex.split(ledger.command_of("smollm2__tune_seeds-3", "08_one_yardstick", config))
    assert words[:4] == ["papermill", "notebooks/08_one_yardstick.ipynb", "08_one_yardstick.ipynb", "-y"]
    assert yaml.safe_load(words[4]) == {k: v for k, v in config.items() if k != "inputs"}


@pytest.mark.parametrize(
    ("said", "verdict", "why"),
    [
        ("found", "reproduced", ""),
        ("not found", "undecided", ""),
        ("doesn't hold", "not reproduced", ""),
        ("undecided: no fix to transfer", "undecided", "no fix to transfer"),
    ],
)
def test_the_notebooks_words(tmp_path, said, verdict, why):
    add_run(tmp_path, "one", "05_x", {"verdicts": [{**PLAIN[0], "verdict": said}]})
    row = ledger.build(tmp_path, claim(why="")).iloc[0]
    assert (row["verdict"], row["why"]) == (verdict, why)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"table": "gone"}, "there is no table gone.parquet"),
        ({"row": "claim.str.startswith('C9')"}, "has no row for"),
        ({"row": "method == 'FASP'"}, "doesn't fit the columns.*data_name"),
        ({"row": "claim =="}, "doesn't fit the columns"),
        ({"ours": "mean"}, "ours is to be 'mean', but there are only.*needed"),
        ({"why": "results.reason"}, "why is to be 'results.reason', but there are only.*minutes"),
        ({"by": ""}, "2 rows of table 'verdicts' fit .* 'by' \\(now ''\\)"),
        ({"by": "needed"}, "2 rows of table"),
        ({"verdict": "claim"}, "unknown verdict 'C1'"),
        ({"verdict": "ours > limit"}, "doesn't fit the columns"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, fields, message):
    add_run(tmp_path, "one", "05_x", {"verdicts": VERDICTS})
    with pytest.raises(ledger.LedgerError, match=f"(?s)Claim A, run one/05_x: .*{message}"):
        ledger.build(tmp_path, claim(**fields))


def test_what_may_be_absent(tmp_path):
    add_run(tmp_path, "one", "05_x", {"verdicts": VERDICTS, "empty": []})
    for where in ({"table": "gone"}, {"table": "empty"}, {"row": "claim.str.startswith('C9')"}):
        row = ledger.build(tmp_path, claim(**where, if_absent="not at hand")).iloc[0]
        assert (row["verdict"], row["why"], row["parameters"]) == ("not run here", "not at hand", "one")
    add_run(tmp_path, "two", "05_x", {"verdicts": [{**PLAIN[0], "claim": "C9: more"}]})
    nine = claim(row="claim.str.startswith('C9')", if_absent="not at hand")
    assert ledger.build(tmp_path, nine)["parameters"].tolist() == ["two"], "a run that wasn't asked is no gap"
    with pytest.raises(ledger.LedgerError, match="doesn't fit the columns"):  # a changed table stays an error
        ledger.build(tmp_path, claim(row="method == 'FASP'", if_absent="not at hand"))


def test_broken_records_and_files(tmp_path):
    folder = add_run(tmp_path, "one", "05_x", {"verdicts": PLAIN})
    (folder / "verdicts.parquet").write_text("no table")
    with pytest.raises(
        ledger.LedgerError, match="Claim A, run one/05_x: table verdicts.parquet can't be read"
    ):
        ledger.build(tmp_path, claim())
    (folder / "run.json").write_text("{")
    with pytest.raises(ledger.LedgerError, match="one/05_x/run.json is no JSON.*run that notebook again"):
        ledger.build(tmp_path, claim())
    with pytest.raises(ledger.LedgerError, match="is no folder"):
        ledger.build(tmp_path / "nowhere", claim())
    claim().drop(columns="why").to_csv(tmp_path / "few.csv", index=False)
    with pytest.raises(ledger.LedgerError, match="lacks the columns why"):
        ledger.claims(tmp_path / "few.csv")
    pd.concat([claim(), claim()]).to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(ledger.LedgerError, match="two claims have the id 'A'"):
        ledger.claims(tmp_path / "twice.csv")


def test_written_whole(tmp_path):
    add_run(tmp_path, "smollm2", "01_fasp_heads", {}, status="running")
    table = ledger.write(tmp_path)
    back = pd.read_csv(tmp_path / "claims.csv")
    assert list(back) == ledger.COLUMNS and back["id"].tolist() == table["id"].tolist()
    assert set(back["verdict"]) == {"not run here"} and set(back["id"]) == set(ledger.claims()["id"])


# ---- the repository's own claims and reports


def test_claims_name_what_there_is():
    known = ledger.claims()
    papers = {
        "FASP",
        "FASP (implied)",
        "Breaking Down Bias",
        "Downstream mitigation",
        "Steed et al. 2022",
        "biasprune",
    }
    assert papers == set(known["paper"])
    notebooks = {p.stem for p in (ROOT / "notebooks").glob("[0-9]*.py")}
    assert set(known["notebook"]) <= notebooks
    files = {p.stem for p in (ROOT / "notebooks" / "params").glob("*.yaml")}
    assert set(known["params"]) <= files | {""}
    for column in ("claim", "published", "what", "verdict", "not_run"):
        assert (known[column] != "").all(), column


def test_the_committed_reports_resolve():
    table = ledger.build(REPORTS)
    assert set(table["verdict"]) <= set(ledger.VERDICTS)
    assert set(table["id"]) == set(ledger.claims()["id"])
    assert table["why"][table["verdict"] == ledger.NOT_RUN].ne("").all()
    # one figure by hand per paper, read in the parquet tables of the default run
    at = table[table["parameters"] == "smollm2"].set_index("id")["verdict"]
    verdict = json.loads((REPORTS / "smollm2" / "01_fasp_heads" / "run.json").read_text())["results"][
        "verdict"
    ]
    assert at["F1"] == verdict
    path = REPORTS / "smollm2" / "02_neuron_pruning" / "verdicts.parquet"
    own = pd.read_parquet(path).set_index("claim")
    said = own.loc["Pruning removes the gap, more than random pruning does"]
    row = table[(table["parameters"] == "smollm2") & (table["id"] == "B2")].iloc[0]
    assert (row["ours"], row["low"], row["high"]) == (said["ours"], said["low"], said["high"])


def test_no_verdict_of_a_run_is_left_out():
    known = ledger.claims()
    for folder, facts in ledger.runs(REPORTS).items():
        path = folder / "verdicts.parquet"
        if not path.exists() or "claim" not in (table := pd.read_parquet(path)):
            continue
        own = known[(known["notebook"] == facts["notebook"]) & (known["table"] == "verdicts")]
        told = [i for row in own["row"] for i in table.query(row, engine="python").index]
        left = table[~table.index.isin(told)]
        if len(left):  # but where a run could measure nothing, or by a rule that is no more
            left = left[
                left["ours"].notna() & ~left["why"].str.contains("the worst has|neuron slopes .* plain")
            ]
        assert left.empty, f"{folder}: {left['claim'].tolist()}"


def test_the_overview_runs_on_a_small_folder(tmp_path):
    table = {"claim": ["C1: barely change", "C2: more"], "ours": [0.1, 0.2], "low": [0.0, 0.1]}
    table |= {"high": [0.2, 0.3], "verdict": ["undecided", "reproduced"], "why": ["", ""]}
    rows = [{**r, "data_name": "biographies"} for r in pd.DataFrame(table).to_dict("records")]
    add_run(tmp_path / "reports", "smollm2", "05_downstream_mitigation", {"verdicts": rows})
    given = {"reports": str(tmp_path / "reports"), "out": str(tmp_path / "out")}
    notebook = str(ROOT / "notebooks" / "00_overview.ipynb")
    papermill.execute_notebook(notebook, str(tmp_path / "done.ipynb"), given, progress_bar=False)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["status"] == "done" and str(tmp_path) not in json.dumps(facts)
    assert "Downstream mitigation: 2 of 8 claims have a run" in facts["results"]["sentence"]
    assert "FASP: no run yet" in facts["results"]["sentence"]
    summary = pd.read_parquet(tmp_path / "out" / "summary.parquet").set_index("paper")
    assert summary.loc["Downstream mitigation", ["reproduced", "undecided"]].tolist() == [1, 1]
    assert (tmp_path / "out" / "figures" / "verdicts.png").exists()
