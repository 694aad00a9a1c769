"""Runs: parameters are checked first, tables are computed once, kept whole or not at all, never taken from another."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy
from conftest import random_lm

from biasprune.core import model, parameters, provenance, run
from biasprune.core.parameters import check_parameters, parameters_of

TABLE = pd.DataFrame({"prompt": ["a", "b"]})


class Maker:
    """Makes a table and counts how often."""

    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> pd.DataFrame:
        self.calls += 1
        return pd.DataFrame({"head": [0, 1], "score": [self.value, 2.0]})


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BIASPRUNE_NOTEBOOKS", str(tmp_path / "notebooks"))
    return toy.make(tmp_path / "notebooks")


@pytest.fixture
def cell(notebooks, tmp_path) -> dict:
    """What the notebook's globals() are after its parameters cell."""
    defaults = {name: default for name, (_, default) in parameters_of(notebooks / "01_toy.ipynb").items()}
    return {**defaults, "out": str(tmp_path / "run"), "In": ["", toy.PARAMETERS, "import pandas as pd\nx = 3"]}


def begun(folder: Path, config: dict | None = None, **inputs) -> run.Run:
    made = run.Run(folder, config or {"model": "tiny", "gamma": 0.3}, "01_toy")
    made.inputs(**(inputs or {"prompts": TABLE}))
    return made


def stored(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.startswith((".lock", ".writing"))}


# ---- parameters --------------------------------------------------------------------------------------

DECLARED = {"n_valid": ("int", 84), "gammas": ("list", [0.3]), "seeds": ("list", [0]), "kinds": ("dict", {})}
DECLARED |= {"axis": ("str", "a"), "show_texts": ("bool", False), "rate": ("float", 0.1), "mixed": ("list", [1, "a"])}
REFUSED = [
    ({"n_vaild": 28}, "x: there is no parameter n_vaild (did you mean n_valid?)."),
    ({"n_vaild": 28, "zzz": 1}, "n_vaild (did you mean n_valid?), zzz. Known: axis, gammas"),
    ({"show_texts": "no"}, "x: show_texts takes bool, not 'no' (str); write True or False."),
    ({"show_texts": 1}, "takes bool, not 1 (int)"),
    ({"gammas": "[0.3]"}, "x: gammas takes list, not '[0.3]' (str); papermill takes lists by -y"),
    ({"gammas": [0.3, "0.5"]}, "x: gammas, item 2 takes float, not '0.5' (str)"),
    ({"seeds": [0.5]}, "seeds, item 1 takes int, not 0.5 (float)"),
    ({"n_valid": True}, "takes int, not True (bool)"),
    ({"axis": 3}, "axis takes str, not 3 (int); papermill takes a text as it is by -r"),
    ({"axis": None}, "takes str, not None (NoneType)"),
    ({"rate": "1e-3"}, "takes float, not '1e-3' (str); YAML wants a point: 1.0e-3"),
    ({"kinds": []}, "takes dict, not [] (list)"),
]


@pytest.mark.parametrize("values, message", REFUSED)
def test_a_slip_is_one_clear_error(values, message):
    with pytest.raises(ValueError) as caught:
        check_parameters(values, DECLARED, "x")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_int_will_do_for_a_float():
    values = check_parameters({"rate": 1, "gammas": [1, 0.5], "mixed": ["b", 2.0]}, DECLARED, "x")
    assert json.dumps(values) == '{"rate": 1.0, "gammas": [1.0, 0.5], "mixed": ["b", 2.0]}'


SLIPS = [
    ("# Parameters\nsede = 3\n", "01_toy: there is no parameter sede (did you mean seed?)"),  # papermill's cell
    ('# Parameters\nseed = float("nan")\nflga = True\n', "flga (did you mean flag?)"),
    ("sede = 3", "there is no parameter sede"),  # in Jupyter, a cell between
    (toy.PARAMETERS.replace("seed: int", "sede: int"), "there is no parameter sede"),  # or the cell itself
]


@pytest.mark.parametrize("source, message", SLIPS)
def test_a_name_that_no_notebook_declares_is_refused(cell, source, message):
    with pytest.raises(ValueError, match="there is no parameter") as caught:
        run.start("01_toy", {**cell, "sede": 3, "flga": True, "In": [*cell["In"], source]})
    assert message in str(caught.value) and not Path(cell["out"]).exists()


def test_a_slip_that_is_saved_in_the_parameters_cell_is_refused(cell, notebooks):
    slip = toy.PARAMETERS.replace("wait: float", "wiat: float")
    toy.write_notebook(notebooks / "01_toy.ipynb", slip + toy.WORK)
    cell["wiat"] = cell.pop("wait")
    with pytest.raises(ValueError, match=r"there is no parameter wait \(did you mean wiat\?\)"):
        run.start("01_toy", {**cell, "In": ["", slip]})


def test_what_else_the_kernel_has_seen_is_no_parameter(cell):
    """Magics, work, names of other notebooks in a shared parameter file, a name that was deleted again."""
    seen = ["%load_ext autoreload", "y = len('a')", "x, y = 1, 2", "# Parameters\nspecial = True\nseed = 3", "sede = 3"]
    started = run.start("01_toy", {**cell, "special": True, "seed": 3, "In": seen, "x": 1})
    assert started.record["config"]["seed"] == 3 and started.inputs().loc["set, not used here", "value"] == "special"


def test_start_checks_types_and_names_the_folder(cell, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="01_toy: flag takes bool, not 'no'"):
        run.start("01_toy", {**cell, "flag": "no"})
    monkeypatch.chdir(tmp_path)
    started = run.start("01_toy", {**cell, "model": "org/m", "out": ""})
    assert started.folder == Path("runs/01_toy-org--m") and "out" not in started.record["config"]


def test_a_folder_that_is_taken_is_refused_at_the_start(cell, tmp_path):
    """A new folder for the pruned model, or an empty one; it decides no table, so tables stay when it is added."""
    (tmp_path / "empty").mkdir()
    started = run.start("01_toy", {**cell, "save_pruned": str(tmp_path / "empty")})
    started.inputs(prompts=TABLE)
    with pytest.raises(FileExistsError, match="isn't an empty folder; give a new folder"):
        run.start("01_toy", {**cell, "out": str(tmp_path / "x"), "save_pruned": str(started.folder)})
    assert not (tmp_path / "x").exists()
    other = run.start("01_toy", {**cell, "out": str(tmp_path / "y")})
    other.inputs(prompts=TABLE)
    assert other.key == started.key


# ---- tables ------------------------------------------------------------------------------------------


def test_a_table_is_computed_once_for_the_same_inputs(tmp_path, notebooks, monkeypatch):
    make = Maker()
    with pytest.raises(RuntimeError, match="inputs.* comes before the first table"):
        run.Run(tmp_path / "r", {}).frame("scores", make)
    first = begun(tmp_path / "r").frame("scores", make)
    pd.testing.assert_frame_equal(begun(tmp_path / "r").frame("scores", make), first)
    shown = {"show_texts": True, "device": "cpu"}  # decide no table
    begun(tmp_path / "r", {"gamma": 0.3, "model": "tiny", **shown}).frame("scores", make)
    assert make.calls == 1 and files(tmp_path / "r") == {"run.json", "scores.parquet"}
    changes = [{"config": {"gamma": 0.4}}, {"prompts": TABLE[::-1]}, {"prompts": "a text"}, {"other": TABLE}]
    for i, change in enumerate([*changes, {"model": {"name": "m"}, "prompts": TABLE}], 2):
        begun(tmp_path / "r", **change).frame("scores", make)
        assert make.calls == i, change
    toy.write_notebook(notebooks / "01_toy.ipynb", toy.PARAMETERS + toy.WORK + "\n# %%\n1 + 1\n")
    begun(tmp_path / "r").frame("scores", make)
    monkeypatch.setattr(run, "code_sha256", lambda: "other code")
    begun(tmp_path / "r").frame("scores", make)
    assert make.calls == 8


def test_values_and_types_survive(tmp_path):
    columns = {"single": np.array([0.1, np.nan, 1e-30], dtype=np.float32), "double": [0.1, np.inf, 1 / 3]}
    columns |= {"text": ["é\n", "", "naïve"], "kind": pd.Categorical(["a", "b", "a"]), "heads": [[1, 2], [], [3]]}
    frame = pd.DataFrame(columns, index=[5, 6, 7])
    fresh, loaded = (begun(tmp_path).frame("all", lambda: frame) for _ in range(2))
    pd.testing.assert_frame_equal(loaded, fresh)
    scalars = frame.drop(columns="heads").reset_index(drop=True)
    pd.testing.assert_frame_equal(loaded.drop(columns="heads"), scalars)


def test_broken_and_foreign_tables_are_replaced(tmp_path):
    begun(tmp_path).frame("scores", Maker())
    path = tmp_path / "scores.parquet"
    path.write_bytes(path.read_bytes()[:100])
    assert begun(tmp_path).frame("scores", Maker(7.0))["score"][0] == 7
    pq.write_table(pa.table({"score": [5.0]}), path)
    assert begun(tmp_path).frame("scores", Maker(8.0))["score"][0] == 8


def test_the_record_from_start_to_end(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 103.5, *range(1000, 1020)])
    monkeypatch.setattr(run.time, "time", lambda: next(clock))
    begun(tmp_path).frame("scores", Maker())
    begun(tmp_path).frame("scores", Maker())
    assert stored(tmp_path)["seconds"] == {"scores": 3.5}  # a resumed run keeps the cost
    assert stored(tmp_path)["status"] == "running"
    made = begun(tmp_path, {"axis": "religion", "model": "tiny"})
    made.note(heads={3, 1}, mean=np.float32(0.5), folder=Path("x"))
    made.figure(plt.figure(), "map")
    verdict = dict.fromkeys(run.VERDICT_COLUMNS, "") | {"ours": 1.0, "id": "F1"}
    with pytest.raises(ValueError, match="verdicts: no column id"):
        made.finish("So it is.", verdicts=TABLE)
    captions = {"tables": {"scores": "of another run", "verdicts": "V"}, "figures": {"map": "M", "none": "N"}}
    assert made.finish("So it is.", verdicts=pd.DataFrame([verdict]), gamma=0.3, **captions) == sorted(
        p.name for p in tmp_path.glob("*.*") if p.name[0] != "."
    )
    record, results = stored(tmp_path), stored(tmp_path)["results"]
    assert (record["form"], record["status"], record["heads"], record["mean"]) == (2, "done", [1, 3], 0.5)
    assert (results["sentence"], results["about"], results["gamma"]) == ("So it is.", "religion", 0.3)
    assert (results["tables"], results["figures"]) == ({"verdicts": "V"}, {"map": "M"})  # those that there are
    assert record["peak_memory_mib"] > 10 and record["inputs"]["prompts"] == run.frame_sha256(TABLE)


KILLED = """
import os, signal, sys
import pandas as pd
from pathlib import Path
from biasprune.core import run

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def two():
    if sys.argv[2] == "computing":
        kill()
    Path.replace = kill  # the table's file is written, not yet renamed
    return pd.DataFrame({"x": ["two"]})

made = run.Run(sys.argv[1], {"model": "tiny", "gamma": 0.3}, "01_toy")
made.inputs(prompts=pd.DataFrame({"prompt": ["a", "b"]}))
made.pieces("all", {"one": lambda: pd.DataFrame({"x": ["one"]}), "two": two, "three": kill})
"""


@pytest.mark.parametrize("moment", ["computing", "writing"])
def test_a_killed_run_goes_on_with_the_missing_piece(tmp_path, moment, notebooks):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "r"), moment], cwd=parameters.ROOT)
    assert killed.returncode == -signal.SIGKILL and stored(tmp_path / "r")["status"] == "running"
    calls: list[str] = []
    jobs = {n: lambda n=n: calls.append(n) or pd.DataFrame({"x": [n]}) for n in ("one", "two", "three")}
    table = begun(tmp_path / "r").pieces("all", jobs)
    assert calls == ["two", "three"] and table["x"].tolist() == ["one", "two", "three"]
    assert files(tmp_path / "r") == {"run.json", "all.parquet"}
    pd.testing.assert_frame_equal(begun(tmp_path / "r").pieces("all", jobs), table)
    assert calls == ["two", "three"]


def test_a_full_disk_leaves_earlier_tables_and_no_scratch(tmp_path, monkeypatch):
    made = begun(tmp_path)
    made.frame("first", Maker())

    def full(self, content) -> None:
        self.touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Path, "write_bytes", full)
        made.frame("second", Maker())
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "run.json", "first.parquet"}


# ---- folders and facts -------------------------------------------------------------------------------

HOLDS = """
import sys, time
from biasprune.core import run
made = run.Run(sys.argv[1], {})
print("locked", flush=True)
time.sleep(60)
"""


def test_two_processes_never_write_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.1)
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=parameters.ROOT) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match="another process writes there. Wait for it, or choose another out"):
            run.Run(tmp_path, {})
        other.kill()  # -9: the lock goes with it
    first = run.Run(tmp_path, {})
    assert run.Run(tmp_path, {}).folder == first.folder  # a cell that is run again in Jupyter
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file/run can't hold results .*: choose another out"):
        run.Run(tmp_path / "file" / "run", {})


def test_finished_runs_without_what_is_damaged_or_old(tmp_path, capsys):
    texts = {"a": '{"status": "do', "b": '{"status": "done"}', "c": '{"form": 2, "status": "running"}'}
    for label, text in texts.items():
        run.write_text(tmp_path / label / "01_toy" / "run.json", text)
    begun(tmp_path / "d" / "01_toy").finish("Done.")
    assert [f.parent.name for f in run.finished(tmp_path)] == ["d"]
    said = capsys.readouterr().err.splitlines()
    assert "a/01_toy/run.json is damaged" in said[0] and "1 records of another version" in said[1] and len(said) == 2


def test_slugs_are_safe():
    names = ["meta-llama/Llama-2-7b", "/abs/path/", "../..", "ä b"]
    assert [run.slug(name) for name in names] == ["meta-llama--Llama-2-7b", "abs--path", "run", "b"]


def test_provenance_of_a_model(tmp_path):
    source = random_lm("llama")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    lm = model.load(tmp_path / "model", dtype="bfloat16", device="cpu")
    made = begun(tmp_path / "run", lm=lm, prompts=TABLE)
    facts = stored(tmp_path / "run")["provenance"]
    assert facts["commit"] == provenance.commit() and "threads" in facts["device"]
    assert facts["model"]["revision"].startswith("sha256:") and facts["model"]["dtype"] == "bfloat16"
    assert facts["model"]["parameters"] == sum(p.numel() for p in source.model.parameters())
    table = made.inputs(lm=lm, prompts=TABLE)["value"]
    assert table["class"] == "LlamaForCausalLM" and table["sha256 of prompts"] == run.frame_sha256(TABLE)[:12]


def test_commit_says_whether_code_differs(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() == "unknown"
    run.write_text(tmp_path / "biasprune" / "a.py", "a = 1\n")
    git("init", "-q"), git("add", "."), git("commit", "-q", "-m", "first")
    run.write_text(tmp_path / "elsewhere.txt", "a note")
    assert provenance.commit() == git("rev-parse", "HEAD")
    run.write_text(tmp_path / "biasprune" / "a.py", "a = 2\n")
    assert provenance.commit() == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == "unknown"  # no git on this machine


def test_measured_tells_the_peak_of_a_call():
    result, seconds, peak = provenance.measured(lambda: len(np.ones(8 << 20)))
    assert result == 8 << 20 and seconds > 0
    if Path("/proc/self/clear_refs").exists():
        assert 60 < peak < 80 and provenance.measured(lambda: None)[2] < 2
