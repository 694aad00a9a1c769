"""The workflow: what a configuration means, what is refused in all ways of running, skipping, kills, the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import golden
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import toy
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import notebook_runs as workflow
from biasprune import __main__ as command
from biasprune.core import parameters, run
from biasprune.papers import claims

SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(parameters.ROOT / "Snakefile"), "--cores", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working directory with toy notebooks."""
    folder = tmp_path_factory.mktemp("work")
    toy.make(folder / "notebooks")
    return folder


@pytest.fixture(autouse=True)
def at_work(work, monkeypatch) -> None:
    monkeypatch.setenv("BIASPRUNE_NOTEBOOKS", str(work / "notebooks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(work)


def snakemake(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*SNAKEMAKE, *words], capture_output=True, text=True)


def configured(path: str, **config) -> list[str]:
    Path(path).write_text(yaml.safe_dump(config))
    return ["--configfile", path]


# ---- what a configuration means ----------------------------------------------------------------------


def test_every_combination_and_each_notebook_gets_what_it_declares():
    grid = {"seed": [0, 1], "flag": [False, True], "seeds": [[3, 4]]}
    given = {"params": ["one", "two"], "notebooks": ["01_toy", "02_other"], "set": {"rate": 2}, "grid": grid}
    runs = workflow.plan(given)
    assert len(runs) == 2 * 2 * 2 + 2 * 2  # 02_other doesn't declare ``flag``: not repeated for its values
    assert runs["one__seed-1__flag-True__seeds-3-4", "01_toy"] == {
        **{"model": "gpt", "rate": 2.0, "seed": 1, "flag": True, "seeds": [3, 4]}
    }
    assert runs["two__seed-0__seeds-3-4", "02_other"] == {"model": "llama", "rate": 2.0, "seed": 0, "seeds": [3, 4]}
    assert list(workflow.plan({"notebooks": ["01_toy"]})) == [("defaults", "01_toy")]
    assert workflow.plan({"out": "x"})["all", "00_overview"] == {"reports": "x"}
    odd = workflow.plan({"notebooks": ["01_toy"], "grid": {"model": ["a/b", "a--b", "x" * 50, "x" * 51]}})
    assert len(odd) == 4 and all(re.fullmatch(r"[\w.-]{1,60}", label) for label, _ in odd)


REFUSED = [
    ({"notebook": ["01_toy"]}, "configuration: there is no parameter notebook (did you mean notebooks?)"),
    ({"notebooks": ["01_tooy"]}, "notebook '01_tooy' is unknown: choose one of 00_overview, 01_toy"),
    ({"params": ["on"]}, "parameter file 'on' is unknown: choose one of one, two"),
    ({"params": ["broken.yaml"]}, 'in "broken.yaml", line 1'),
    ({"set": {"sede": 1}}, "01_toy: there is no parameter sede (did you mean seed?)"),
    ({"params": ["typo.yaml"]}, "typo.yaml, 01_toy: there is no parameter sede (did you mean seed?)"),
    ({"set": {"special": True}, "notebooks": ["01_toy"]}, "these notebooks have no parameter special"),
    ({"grid": {"seed": 1}}, "grid: seed takes list, not 1 (int)"),
    ({"grid": {"seeds": [1]}}, "seeds takes list, not 1 (int)"),
    ({"params": ["one", "elsewhere/one.yaml"]}, "two runs would be called one/01_toy"),
]


@pytest.mark.parametrize("config, message", REFUSED)
def test_what_there_is_not_is_refused(config, message):
    Path("elsewhere").mkdir(exist_ok=True)
    for path, text in {"broken": "a: [1", "typo": "sede: 1", "elsewhere/one": "model: other"}.items():
        Path(f"{path}.yaml").write_text(text)
    with pytest.raises((ValueError, yaml.YAMLError)) as caught:
        workflow.plan(config)
    assert message in str(caught.value)


def test_what_a_run_is_made_from(work, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("BIASPRUNE_DATA", str(tmp_path / "data"))
    digests = []

    def changed() -> bool:
        workflow._contents.cache_clear()  # a command of its own
        digests.append(workflow.made_from("01_toy", {"model": str(tmp_path / "my.csv"), "seed": 1}))
        return digests[-1] not in digests[:-1]

    assert changed() and not changed()
    for path in ("my.csv", "data/prompts.csv", "data/models/a.json"):
        run.write_text(tmp_path / path, "a")
        assert changed(), path
    os.utime(tmp_path / "my.csv", (1, 1))
    run.write_text(tmp_path / "data" / "claims.csv", "read by the overview alone")
    notebook = work / "notebooks" / "01_toy.ipynb"
    before = notebook.read_text()
    notebook.write_text(before.replace('"execution_count": null', '"execution_count": 3'))
    assert not changed()
    notebook.write_text(before.replace("Seed {seed}", "The seed {seed}"))
    assert changed()
    notebook.write_text(before)
    monkeypatch.setattr(workflow, "code_sha256", lambda: "other code")
    assert changed() and workflow.made_from("02_other", {}) != workflow.made_from("01_toy", {})


def test_everything_shipped_fits_the_parameters_cells(monkeypatch):
    monkeypatch.delenv("BIASPRUNE_NOTEBOOKS")
    files = [p.stem for p in parameters.notebooks_dir().glob("params/*.yaml")]
    runs = workflow.plan({"params": files})
    notebooks = {notebook for _, notebook in runs}
    assert len(runs) == len(files) * (len(notebooks) - 1) + 1
    assert {workflow.OVERVIEW, *workflow.BENCHMARKS} <= notebooks
    for path in parameters.notebooks_dir().glob("grids/*.yaml"):
        assert workflow.plan(yaml.safe_load(path.read_text()))


# ---- three ways of running ---------------------------------------------------------------------------

SLIPS = {"sede 3": "no parameter sede (did you mean seed?)", "flag no": "flag takes bool, not 'no'"}
SLIPS["seeds [0]"] = "seeds takes list, not '[0]' (str)"


def test_papermill_refuses_slips_before_any_work():
    papermill = [sys.executable, "-m", "papermill", "notebooks/01_toy.ipynb"]
    started = {
        slip: subprocess.Popen(
            [*papermill, f"{i}.ipynb", "-p", *slip.split(), "-p", "out", f"papermill/{i}/x"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, slip in enumerate(SLIPS)
    }
    for slip, process in started.items():
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1 and SLIPS[slip] in said.strip().splitlines()[-1]
    assert not Path("papermill").exists()


def test_jupyter_refuses_slips_before_any_work():
    for slip, message in {"sede = 3": "no parameter sede", "flag = 'no'": "flag takes bool"}.items():
        node = nbformat.read("notebooks/01_toy.ipynb", as_version=4)
        node.cells.insert(1, nbformat.v4.new_code_cell(slip))
        with pytest.raises(CellExecutionError, match=message):
            NotebookClient(node, kernel_name="python3").execute()
    assert not Path("runs").exists()


def test_the_workflow_refuses_slips_before_any_job():
    done = snakemake(*configured("slip.yaml", params=["one"], set={"sede": 3}, out="slip"))
    assert done.returncode == 1 and "01_toy: there is no parameter sede (did you mean seed?)" in done.stderr
    assert not Path("slip").exists()


# ---- runs --------------------------------------------------------------------------------------------


def test_a_killed_workflow_goes_on_to_the_same_result_and_then_has_nothing_to_do(work):
    config = {"params": ["one"], "notebooks": ["00_overview", "01_toy"], "set": {"wait": 0.5, "seed": 3}, "out": "kill"}
    given = configured("kill.yaml", **config)
    killed = subprocess.Popen([*SNAKEMAKE, *given], stderr=subprocess.DEVNULL)
    while len(list(Path("kill").glob("one/01_toy/pieces-*/*.parquet"))) < 2:
        time.sleep(0.05)
    below = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    assert killed.wait(20) == -9
    done = snakemake(*given)
    assert done.returncode == 0, done.stderr
    assert below and not psutil.wait_procs(below, timeout=0)[1]  # nobody was left behind
    log = Path("kill/log.txt").read_text().splitlines()
    assert len(set(log)) == 6 and len(log) <= 7  # the piece that it was about is made again, at most
    pieces = pd.read_parquet("kill/one/01_toy/pieces.parquet")
    assert pieces["x"].tolist() == [x for i in range(6) for x in np.random.default_rng([3, i]).normal(size=3)]
    assert "Seed 3." in Path("kill/README.md").read_text() and Path("kill/claims.csv").is_file()
    executed = Path("kill/one/01_toy.ipynb").read_text()
    assert json.loads(executed)["cells"][1]["source"] == "**Result.** Seed 3.", "the result first"
    assert str(work) not in executed and "start_time" not in executed and 'out = \\"kill/one/01_toy' in executed
    shutil.rmtree(".snakemake")  # as after a copy: other dates, nothing that Snakemake has noted
    for path in Path("kill").rglob("*"):
        os.utime(path, (1e9 + (".done" in path.name and "all" in path.parts),) * 2)
    other = configured("other.yaml", **config | {"set": {"seed": 4}})
    before, after = (snakemake(*words, "--dry-run").stdout for words in (given, other))
    assert "rule all:" in before and "rule 01_toy--one:" not in before and "rule 00_overview--all:" not in before
    assert "rule 01_toy--one:" in after and "rule 00_overview--all:" in after


def test_others_go_on_where_one_fails_and_benchmarks_have_all_cores():
    given = configured("fail.yaml", notebooks=["01_toy", "07_speed"], grid={"seed": [99, 1]}, out="fail")
    done = snakemake(*given)
    assert done.returncode == 1 and "AssertionError: no seed: 99" in done.stdout + done.stderr
    made = {p.parent.name: "no seed: 99" in p.read_text() for p in Path("fail").glob("*/01_toy.ipynb")}
    assert len(made) == 2 and made["seed-1"] is False and True in made.values()  # the failed notebook is kept
    assert {p.parts[-3] for p in Path("fail").glob("*/*/.done-*")} == {"seed-1"}
    threads = {p.stem: re.search(r"seed-1/\w+ (\d)", p.read_text())[1] for p in Path("fail/seed-1").glob("*.ipynb")}
    assert threads == {"01_toy": "1", "07_speed": "2"}


def test_a_finished_run_starts_from_nothing_and_a_stopped_one_goes_on(monkeypatch):
    """Committed results are never taken for this machine's."""
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: None)
    monkeypatch.setattr(workflow, "_result_first", lambda *_: None)
    for status, left in (("done", [".done-new"]), ("running", [".done-new", "run.json", "x.parquet"])):
        folder = Path("made") / "a" / status
        for name in ("x.parquet", ".done-old"):
            run.write_text(folder / name, "x")
        run.write_text(folder / "run.json", json.dumps({"status": status}))
        workflow.execute(Path("x.ipynb"), folder, {}, folder / ".done-new")
        assert sorted(p.name for p in folder.iterdir()) == left


def test_paths_of_the_machine_are_taken_out():
    source = 'reports = "/some/out"\nout = "/some/out/all/00_overview"\nx = "/some/out-2"'
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata={"papermill": {"a": 1}})
    node.cells[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="warning")]
    nbformat.write(node, "x.ipynb")
    workflow._without_traces(Path("x.ipynb"), Path("/some/out/all/00_overview"))
    read = nbformat.read("x.ipynb", as_version=4)
    assert read.cells[0].source == 'reports = "out"\nout = "out/all/00_overview"\nx = "/some/out-2"'
    assert not read.cells[0].outputs and not read.metadata


# ---- report and golden tables ------------------------------------------------------------------------


def test_the_report(tmp_path, monkeypatch, capsys):
    out = tmp_path / "reports"
    run.write_text(out / "old" / "01_toy" / "run.json", '{"status": "done"}')
    command.report(out)
    said = capsys.readouterr().err
    assert "1 records of another version of biasprune are left out" in said and "no report is written" in said
    assert not (out / "README.md").exists()
    table = pd.DataFrame({"x|y": [1234.5, 0.12345, np.nan]})
    for label, notebook, name in (("a", "01_toy", "sums"), ("z", "00_overview", "sums"), ("a", "07_speed", "speed")):
        made = run.Run(out / label / notebook, {"axis": "gender"}, notebook)
        made.inputs(model={"name": label, "dtype": "float32"})
        made.frame(name, lambda: table)
        made.figure(plt.figure(), "f")
        made.finish(f"{notebook} says.", tables={"sums": "Sums"}, figures={"f": "A"})
    monkeypatch.setattr(sys, "argv", ["biasprune", "report", "--out", str(out)])
    command.main()
    text = (out / "README.md").read_text()
    assert text.index("## 00_overview: z, z") < text.index("## 01_toy: a, a") < text.index("## 07_speed")
    assert "| x\\|y |\n| --- |\n| 1,234 |\n| 0.123 |\n| – |" in text and "![A](a/01_toy/figures/f.png)" in text
    assert list(pd.read_csv(out / "speed.csv")["run"]) == ["a"] * 3
    assert set(pd.read_csv(out / "claims.csv")["verdict"]) == {claims.NOT_RUN}


def test_the_readme_says_what_the_reports_say(monkeypatch):
    """Neither the repository's README nor its reports are touched here: the report is written to a copy."""
    monkeypatch.delenv("BIASPRUNE_NOTEBOOKS")
    records = run.finished(parameters.ROOT / "reports")
    if not records:
        pytest.skip("the committed reports are of another version")
    shutil.copytree(parameters.ROOT / "reports", "reports")
    command.report(Path("reports"))
    for name in ("README.md", "claims.csv"):
        assert Path("reports", name).read_text() == (parameters.ROOT / "reports" / name).read_text(), name


def test_golden_tables_tell_what_differs(tmp_path, capsys, monkeypatch):
    frame = pd.DataFrame({"x": [1.0, np.nan, 1e6], "t": ["a", "b", "c"], "l": [[1], [2], []]})
    others = {"same": frame.assign(x=frame["x"] * (1 + 1e-6)), "x": frame.assign(x=frame["x"] + 0.5)}
    others |= {"t": frame.assign(t="a"), "rows": frame.iloc[:2], "columns": frame.drop(columns="l"), "gone": None}
    for side in ("old", "new"):
        (tmp_path / side / "01_toy").mkdir(parents=True)
        for name, other in others.items():
            table = frame if side == "old" else other
            if table is not None:
                table.to_parquet(tmp_path / side / "01_toy" / f"{name}.parquet")
    assert golden.compare(tmp_path / "old", tmp_path / "new") == 5
    said = capsys.readouterr().out
    for part in ("equal      01_toy/same", "x, x: 1 of 3 numbers, by up to 0.5", "t, t: 2 of 3", "gone, missing"):
        assert part in said
    assert "rows, rows: 3 → 2" in said and "columns, columns: gone: ['l'], new: []" in said
    monkeypatch.setattr(golden, "EXPLAINED", {("01_toy", "*", "*"): "as meant"})
    assert golden.compare(tmp_path / "old", tmp_path / "new") == 0 and "# as meant" in capsys.readouterr().out
