"""The batch runner: what a grid means, what is refused, what is done once, and what a stop leaves."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
import tomllib
from importlib import import_module
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from biasprune import __main__ as command
from biasprune import batch, record

TINY = """
# %% tags=["parameters"]
seed: int = 0  # of the numbers
word: str = "a"  # no meaning
shares: list = [0.1]  # no meaning
rate: float = 0.5  # no meaning
only: dict = {}  # another notebook's name for it: see below
flag: bool = False  # no meaning
wait: float = 0.0  # seconds
out: str = ""  # folder

# %%
import json
import random
import time
from pathlib import Path

time.sleep(wait)
assert seed >= 0, f"no seed: {seed}"
numbers = random.Random(seed)
folder = Path(out)
with open(folder.parents[1] / "log.txt", "a") as log:  # a line per execution
    log.write(f"{seed} {word}\\n")
(folder / "numbers.json").write_text(json.dumps([numbers.random() for _ in range(5)]))
facts = {"notebook": "01_tiny", "status": "done", "key": f"{seed} {word}", "config": {}, "peak_memory_mib": 0}
facts["results"] = {"sentence": f"Seed {seed}.", "minutes": 0.0, "tables": {}, "figures": {}}
facts["provenance"] = {"model": {"name": "", "dtype": ""}, "device": "", "commit": ""}
(folder / "run.json").write_text(json.dumps(facts))
"""


def write_notebook(path: Path, text: str) -> None:
    node = jupytext.reads(text.lstrip(), fmt="py:percent")
    node.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    jupytext.write(node, path, fmt="ipynb")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder of notebooks: 01_tiny, and 02_other, which knows ``special`` instead of ``only``."""
    folder = tmp_path / "notebooks"
    (folder / "params").mkdir(parents=True)
    write_notebook(folder / "01_tiny.ipynb", TINY)
    write_notebook(folder / "02_other.ipynb", TINY.replace("only: dict", "special: dict"))
    (folder / "params" / "one.yaml").write_text("word: b\nspecial: {k: 1}\n")
    (folder / "params" / "two.yaml").write_text("word: c\nrate: 1\n")
    monkeypatch.setenv("BIASPRUNE_NOTEBOOKS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(record.ROOT))
    return tmp_path


def grid_of(folder: Path, **keys) -> batch.Grid:
    """Through YAML, as a user gives it."""
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({"notebooks": ["01_tiny"], "out": str(folder / "out"), **keys}))
    return batch.read_grid(str(path))


def labels(grid: batch.Grid) -> list[str]:
    return [job.name for job in batch.plan(grid)]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[dict, dict]]:
    """Instead of papermill: what runs get and see, and a result of the notebook's form; 'fail' fails."""
    seen = []

    def execute(notebook, values, target, *, environment=None, **_):
        seen.append((values, environment))
        if values.get("word") == "fail":
            return "Traceback\nValueError: as wanted"
        target.with_name(notebook.name).write_text("{}")
        record.write_text(target / "run.json", json.dumps({"key": "k", "results": {"sentence": "So it is."}}))
        return ""

    monkeypatch.setattr(batch, "execute", execute)
    return seen


# ---------------------------------------------------------------------------- what a grid means


def test_a_grid_is_every_combination_and_each_notebook_gets_what_it_knows(tiny):
    grid = grid_of(
        tiny,
        notebooks=["01_tiny", "02_other"],
        params=["one", "two"],
        grid={"seed": [0, 1], "only": [{}, {"a": 1}], "shares": [[0.1, 0.2]]},
        set={"flag": True, "rate": 2},
    )
    jobs = batch.plan(grid)
    first = {(j.values["word"], j.values["seed"], str(j.values["only"])) for j in jobs if "only" in j.values}
    assert first == set(itertools.product("bc", [0, 1], ["{}", "{'a': 1}"]))
    assert len(jobs) == 2 * 2 * 2 + 2 * 2  # 02_other doesn't know ``only``: not repeated for its values
    other = [j for j in jobs if j.notebook.stem == "02_other"]
    assert [j.folder.relative_to(tiny / "out").as_posix() for j in other] == [
        "one__seed-0__shares-0.1-0.2/02_other",
        "one__seed-1__shares-0.1-0.2/02_other",
        "two__seed-0__shares-0.1-0.2/02_other",
        "two__seed-1__shares-0.1-0.2/02_other",
    ]
    assert other[0].values == {
        **{"word": "b", "special": {"k": 1}, "flag": True, "rate": 2.0, "seed": 0, "shares": [0.1, 0.2]}
    }
    assert type(other[0].values["rate"]) is float
    assert "special" not in jobs[0].values


def test_folders_keep_their_names_when_a_grid_grows(tiny):
    one = labels(grid_of(tiny, params=["one"], grid={"seed": [0]}))
    more = labels(grid_of(tiny, params=["two", "one"], grid={"seed": [3, 0]}))
    assert one == ["one__seed-0/01_tiny"] and set(one) < set(more)
    assert labels(grid_of(tiny)) == ["defaults/01_tiny"]


def test_same_values_are_one_run_and_same_names_are_two(tiny):
    assert len(labels(grid_of(tiny, grid={"rate": [1, 1.0, 2]}))) == 2
    (tiny / "one.yaml").write_text("word: elsewhere\n")
    names = labels(grid_of(tiny, params=["one", str(tiny / "one.yaml")]))
    assert len(set(names)) == 2 and all(n.startswith("one__") for n in names)


words = st.text(max_size=60) | st.sampled_from(["a b", "a--b", "A b", "a.b", "a/b", "x" * 50, "x" * 51])


@given(values=st.lists(words, min_size=1, max_size=6, unique=True))
def test_different_values_never_share_a_folder(values):
    notebook = {"01_tiny": {"word": "str", "out": "str"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "notebooks", lambda: {"01_tiny": Path("01_tiny.ipynb")})
        patch.setattr(batch, "parameters_of", lambda path: notebook[path.stem])
        grid = batch.Grid(notebooks=["01_tiny"], out=Path("out"), grid={"word": values})
        jobs = batch.plan(grid)
    folders = [j.folder.as_posix().casefold() for j in jobs]  # where case doesn't tell files apart, too
    assert len(set(folders)) == len(values) == len(jobs)
    for folder in folders:
        assert all(len(part.encode()) < 255 and part not in {"", ".", ".."} for part in Path(folder).parts)
        assert Path(folder).parts[0] == "out" and len(Path(folder).parts) == 3


REFUSED = [
    ({"notebook": ["01_tiny"]}, "unknown key notebook. Did you mean notebooks?"),
    ({"notebooks": []}, "notebooks is missing. Known: 01_tiny, 02_other"),
    ({"notebooks": ["01_tinny"]}, "No such notebook: 01_tinny. Did you mean 01_tiny?"),
    ({"notebooks": "01_tiny"}, "notebooks takes list, not '01_tiny' \\(str\\)"),
    ({"params": ["on"]}, "No parameter file 'on'. Did you mean one?"),
    ({"grid": {"sed": [1]}}, "grid: no notebook knows the parameters sed. Did you mean seed?"),
    ({"set": {"sharess": [1]}}, "set: no notebook knows the parameters sharess. Did you mean shares?"),
    ({"set": {"special": {}}}, "no notebook knows the parameters special"),  # only one that isn't asked for
    ({"set": {"seed": "1"}}, "set: seed takes int, not '1' \\(str\\)"),
    ({"set": {"seed": 1.0}}, "set: seed takes int, not 1.0 \\(float\\)"),
    ({"set": {"seed": True}}, "set: seed takes int, not True \\(bool\\)"),
    ({"set": {"flag": 1}}, "set: flag takes bool, not 1 \\(int\\)"),
    ({"set": {"word": 1}}, "set: word takes str, not 1 \\(int\\)"),
    ({"set": {"word": None}}, "set: word takes str, not None"),
    ({"set": {"only": []}}, "set: only takes dict, not \\[\\] \\(list\\)"),
    ({"set": {"rate": "2e-3"}}, "rate takes float, not '2e-3' \\(str\\); YAML wants a point"),
    ({"grid": {"shares": [0.1]}}, "grid: shares takes list, not 0.1 .*each a list itself: \\[\\[0.1\\]"),
    ({"grid": {"seed": 1}}, "grid takes a list of values for each parameter, not seed: 1"),
    ({"grid": {"seed": []}}, "grid takes a list of values"),
    ({"grid": {"seed": [1]}, "set": {"seed": 1}}, "Both in grid and in set: seed"),
    ({"set": {"out": "x"}}, "out can't be set"),
    ({"workers": 0}, "workers must be at least 1"),
    ({"devices": ["gpu0"]}, "devices are cpu, cuda:0, cuda:1, …; not gpu0"),
    ({"devices": ["cuda:7"]}, "there is no cuda:7 here; 1 GPUs are seen"),
    ({"devices": ["cpu"], "slurm": {"gpus": 1}}, None),
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_what_there_is_not_is_refused_before_anything_starts(tiny, calls, monkeypatch, keys, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if message is None:  # the cluster's options matter only there
        assert batch.run(grid_of(tiny, **keys)) == 0
        return
    with pytest.raises(SystemExit, match=message):
        batch.run(grid_of(tiny, **keys))
    assert not calls and not (tiny / "out").exists()


def test_devices_with_a_cluster_are_refused(tiny):
    with pytest.raises(SystemExit, match="with --submit leave them out, and ask for GPUs by slurm"):
        batch.run(grid_of(tiny, grid={"seed": [0]}, devices=["cpu"]), submit="local")


def test_device_as_a_parameter_beside_devices_is_refused(tiny):
    write_notebook(tiny / "notebooks" / "01_tiny.ipynb", TINY.replace("word: str", "device: str"))
    with pytest.raises(SystemExit, match="grid: device and devices are both given"):
        batch.plan(grid_of(tiny, grid={"device": ["cuda:0"]}, devices=["cpu"]))
    assert len(batch.plan(grid_of(tiny, grid={"device": ["cuda:0"]}))) == 1


def test_broken_and_missing_files_are_named(tiny):
    with pytest.raises(SystemExit, match="No grid 'nowhere'"):
        batch.read_grid("nowhere")
    (tiny / "bad.yaml").write_text("notebooks: [01_tiny")
    with pytest.raises(SystemExit, match="bad.yaml isn't valid YAML"):
        batch.read_grid(str(tiny / "bad.yaml"))
    (tiny / "list.yaml").write_text("- a\n")
    with pytest.raises(SystemExit, match="list.yaml must map names to values"):
        batch.read_parameters(str(tiny / "list.yaml"))


def test_a_package_without_the_repository_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("BIASPRUNE_NOTEBOOKS", str(tmp_path))
    with pytest.raises(SystemExit, match="No notebooks in .*pip install -e.*BIASPRUNE_NOTEBOOKS"):
        batch.notebooks()


def test_a_run_rests_on_the_script_in_the_same_folder(tiny):
    before = record.Run(tiny / "run", {}, notebook="01_tiny").key
    (tiny / "notebooks" / "01_tiny.py").write_text(TINY)
    assert record.Run(tiny / "run", {}, notebook="01_tiny").key != before


def test_everything_shipped_fits_the_notebooks_annotations():
    files = [p.stem for p in (record.ROOT / "notebooks" / "params").glob("*.yaml")]
    jobs = batch.plan(batch.Grid(notebooks=list(batch.notebooks()), params=files, out=Path("out")))
    assert len(jobs) == len(files) * (len(batch.notebooks()) - 1) == len({j.name for j in jobs})
    assert batch.OVERVIEW in batch.notebooks() and batch.OVERVIEW not in {j.notebook.stem for j in jobs}
    grids = sorted((record.ROOT / "notebooks" / "grids").glob("*.yaml"))
    for path in grids:
        assert batch.plan(batch.read_grid(path.stem))
    example = batch.plan(batch.read_grid("example"))
    assert sorted(j.notebook.stem for j in example) == ["01_fasp_heads"] * 8 + ["06_reliability"] * 4


# ---------------------------------------------------------------------------- what is done, and done once


def test_what_is_finished_is_skipped_until_something_it_rests_on_changes(tiny, calls, monkeypatch):
    data = tiny / "prompts.csv"
    data.write_text("a\n")
    keys = {"grid": {"seed": [0, 1]}, "set": {"word": str(data)}}
    out = tiny / "out"

    def done(**more) -> int:
        batch._sha256.cache_clear()  # a command of its own
        before = len(calls)
        assert batch.run(grid_of(tiny, **{**keys, **more})) == 0
        return len(calls) - before

    assert done() == 2 and done() == 0
    table = pd.read_csv(out / "batch.csv")
    assert list(table) == ["run", "status", "minutes", "sentence", "error"]
    assert set(table["status"]) == {"done before"} and set(table["sentence"]) == {"So it is."}
    assert done(set={**keys["set"], "rate": 1.0}) == 2  # other parameters, in the same folders
    assert done() == 2
    assert done(grid={"seed": [0, 1, 2]}) == 1
    data.write_text("b\n")
    assert done() == 2
    monkeypatch.setattr(record, "code_sha256", lambda: "another")
    assert done() == 2
    write_notebook(tiny / "notebooks" / "01_tiny.ipynb", TINY + "\n# %%\n1 + 1\n")
    assert done() == 2
    monkeypatch.setenv("BIASPRUNE_DATA", str(tiny / "notebooks" / "params"))
    assert done() == 2
    (out / "seed-0__x").mkdir()
    next(out.glob("seed-0/*/run.json")).unlink()  # results are gone
    assert done() == 1
    next(out.glob("seed-1/*/run.json")).write_text(json.dumps({"key": "other"}))  # of another run
    assert done() == 1
    changed = {"key": "k", "provenance": {"code_sha256": "changed while it ran"}}
    next(out.glob("seed-1/*/run.json")).write_text(json.dumps(changed))
    assert done() == 1
    next(out.glob("seed-1/*/batch.json")).write_text("{")
    assert done() == 1 and done() == 0


def test_code_changed_while_a_run_lasted_is_no_success(tiny, monkeypatch, capsys):
    def execute(notebook, values, target, **_):
        record.write_text(target / "run.json", json.dumps({"provenance": {"code_sha256": "newer"}}))
        return ""

    monkeypatch.setattr(batch, "execute", execute)
    assert batch.run(grid_of(tiny)) == 1
    assert "FAILED defaults/01_tiny: the code was changed while it ran" in capsys.readouterr().err


def test_outputs_in_a_notebook_do_not_make_it_another(tiny, calls):
    batch.run(grid_of(tiny))
    path = tiny / "notebooks" / "01_tiny.ipynb"
    node = json.loads(path.read_text())
    node["cells"][-1]["execution_count"] = 3
    path.write_text(json.dumps(node))
    batch.run(grid_of(tiny))
    assert len(calls) == 1


def test_failures_are_counted_shown_and_tried_again(tiny, calls, capsys):
    grid = grid_of(tiny, grid={"word": ["a", "fail"]})
    assert batch.run(grid) == 1
    table = pd.read_csv(tiny / "out" / "batch.csv").set_index("run")
    assert table["status"].to_dict() == {"word-a/01_tiny": "done", "word-fail/01_tiny": "failed"}
    assert table.loc["word-fail/01_tiny", "error"] == "ValueError: as wanted"
    assert "FAILED word-fail/01_tiny: ValueError: as wanted" in capsys.readouterr().err
    assert batch.run(grid) == 1 and len(calls) == 3


def test_dry_run_starts_nothing_and_says_what_it_would(tiny, calls, capsys):
    keys = {"grid": {"word": ["a", "fail"]}}
    assert batch.run(grid_of(tiny, **keys), dry=True) == 0
    assert not calls and not (tiny / "out").exists()
    assert capsys.readouterr().out == "word-a/01_tiny: to do\nword-fail/01_tiny: to do\n"
    batch.run(grid_of(tiny, **keys))
    capsys.readouterr()
    batch.run(grid_of(tiny, grid={"word": ["a", "fail", "b"]}), dry=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "word-a/01_tiny: skipped: done before"
    assert said[1:] == ["word-fail/01_tiny: to do again: failed before", "word-b/01_tiny: to do"]
    assert len(calls) == 2


@pytest.fixture
def overview(tiny, monkeypatch) -> list[tuple[str, dict]]:
    """A notebook 00_overview beside the tiny ones; what would run is noted, and may fail."""
    text = TINY.split("# %%\n")[0].replace("seed: int = 0", 'reports: str = ""')
    write_notebook(tiny / "notebooks" / "00_overview.ipynb", text)
    seen = []

    def execute(notebook, values, target, **_):
        seen.append((target.relative_to(tiny / "out").as_posix(), values))
        return "ValueError: as wanted" if "fail" in [values.get("word"), os.environ.get("OVERVIEW")] else ""

    monkeypatch.setattr(batch, "execute", execute)
    return seen


def test_the_overview_comes_once_and_last(tiny, overview, capsys, monkeypatch):
    last = ("all/00_overview", {"reports": (tiny / "out").as_posix()})
    grid = grid_of(tiny, notebooks=["00_overview", "01_tiny"], params=["one", "two"], grid={"seed": [0, 1]})
    assert batch.run(grid, dry=True) == 0 and not overview
    assert capsys.readouterr().out.splitlines()[-1] == "all/00_overview: after all others"
    batch.run(grid)
    assert len(overview) == 5 and overview[-1] == last
    overview.clear()
    batch.run(grid_of(tiny, notebooks=["01_tiny"]))
    assert last not in overview
    # its failure counts, and that of a run doesn't keep it from running
    monkeypatch.setenv("OVERVIEW", "fail")
    assert batch.run(grid_of(tiny, notebooks=["00_overview"])) == 1
    monkeypatch.delenv("OVERVIEW")
    overview.clear()
    failing = grid_of(tiny, notebooks=["00_overview", "01_tiny"], set={"word": "fail"})
    assert batch.run(failing) == 1 and overview[-1] == last
    with pytest.raises(SystemExit, match="no notebook knows the parameters reports"):
        batch.plan(grid_of(tiny, notebooks=["00_overview", "01_tiny"], set={"reports": "x"}))


def test_the_overview_with_parameter_files(tiny, overview, monkeypatch):
    monkeypatch.setattr(command, "report", lambda out: 0)
    assert command.run(["one", "two"], tiny / "out", []) == 0
    runs = [name for name, _ in overview]
    assert runs == ["one/01_tiny", "one/02_other", "two/01_tiny", "two/02_other", "all/00_overview"]
    overview.clear()
    command.run(["one"], tiny / "out", ["01_tiny"])
    command.run(["one"], tiny / "out", ["00_overview"])
    assert [name for name, _ in overview] == ["all/00_overview"], "the other was done before"
    monkeypatch.setenv("OVERVIEW", "fail")
    assert command.run(["one"], tiny / "out", ["00_overview"]) == 1
    # claims and records that don't fit count, too
    monkeypatch.delenv("OVERVIEW")
    monkeypatch.setattr(command, "report", lambda out: 1)
    assert command.run(["one"], tiny / "out", ["01_tiny"]) == 1


def test_paths_of_the_machine_are_taken_out(tmp_path):
    node = nbformat.v4.new_notebook()
    source = "reports = '/some/out'\nout = '/some/out/all/00_overview'\n/some/out\nx/some/out /some/out-2"
    node.cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(node, tmp_path / "x.ipynb")
    batch._without_paths(tmp_path / "x.ipynb", Path("/some/out/all/00_overview"))
    shown = nbformat.read(tmp_path / "x.ipynb", as_version=4).cells[0].source
    wanted = "reports = 'out'\nout = 'out/all/00_overview'\nout\nx/some/out /some/out-2"
    assert shown == wanted


def test_one_run_at_a_time_on_each_device(tiny, monkeypatch):
    running, most, seen, lock = {}, {}, set(), threading.Lock()

    def execute(notebook, values, target, *, environment, **_):
        device = environment["CUDA_VISIBLE_DEVICES"]
        with lock:
            running[device] = running.get(device, 0) + 1
            most[device] = max(most.get(device, 0), running[device])
            seen.add(environment["OMP_NUM_THREADS"])
        time.sleep(0.05)
        with lock:
            running[device] -= 1
        return ""

    monkeypatch.setattr(batch, "execute", execute)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")  # what this process may use
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    keys = {"grid": {"seed": list(range(12))}, "devices": ["cuda:0", "cuda:1", "cpu"]}
    assert batch.run(grid_of(tiny, **keys)) == 0
    assert most == {"2": 1, "5": 1, "": 1}
    assert seen == {str(max(1, torch.get_num_threads() // 3))}
    most.clear()
    assert batch.run(grid_of(tiny, **{**keys, "workers": 2, "set": {"word": "x"}})) == 0
    assert most == {"2": 2, "5": 2, "": 2}


def test_nothing_runs_beside_a_benchmark(tiny, monkeypatch):
    """Benchmarks come last, one at a time with all threads, whatever their place in the grid."""
    began, running, lock = [], set(), threading.Lock()

    def execute(notebook, values, target, *, environment, **_):
        with lock:
            running.add(target)
            began.append((notebook.stem, len(running), environment.get("OMP_NUM_THREADS")))
        time.sleep(0.05)
        with lock:
            running.remove(target)
        return ""

    monkeypatch.setattr(batch, "execute", execute)
    monkeypatch.setattr(batch, "BENCHMARKS", ("01_tiny",))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    keys = {"notebooks": ["01_tiny", "02_other"], "grid": {"seed": [0, 1, 2, 3]}, "workers": 2}
    assert batch.run(grid_of(tiny, **keys)) == 0
    assert [name for name, *_ in began] == ["02_other"] * 4 + ["01_tiny"] * 4
    assert max(n for _, n, _ in began[:4]) == 2 and {t for *_, t in began[:4]} == {"4"}
    assert {n for _, n, _ in began[4:]} == {1} and {t for *_, t in began[4:]} == {None}
    began.clear()  # one at a time, all have the machine to themselves: the grid's order
    assert batch.run(grid_of(tiny, **{**keys, "workers": 1, "set": {"word": "x"}})) == 0
    assert [name for name, *_ in began] == ["01_tiny"] * 4 + ["02_other"] * 4


def test_benchmarks_are_notebooks():
    assert set(batch.BENCHMARKS) <= set(batch.notebooks())


def test_the_command_says_how_many_runs_at_a_time(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(batch, "run", lambda grid, **_: asked.append(grid.workers) or 0)
    monkeypatch.setattr(command, "report", lambda out: 0)
    grid_of(tiny, workers=3)
    for words, wanted in [
        (["--params", "one"], 1),
        (["--params", "one", "--workers", "2"], 2),
        ([str(tiny / "my.yaml")], 3),
        ([str(tiny / "my.yaml"), "--workers", "1"], 1),
    ]:
        monkeypatch.setattr(sys, "argv", ["biasprune", "run", *words])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 0 and asked.pop() == wanted


def test_no_runs_at_a_time_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["biasprune", "run", "--params", "one", "--workers", "0"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--workers must be at least 1" in capsys.readouterr().err


def test_without_devices_runs_see_what_the_runner_sees(tiny, calls, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    batch.run(grid_of(tiny))
    assert calls[0][1] == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's word on it holds
    batch.run(grid_of(tiny, grid={"seed": [1]}, devices=["cpu"], workers=2))
    assert calls[1][1] == {"CUDA_VISIBLE_DEVICES": ""}


def test_an_error_of_the_runner_itself_stops_it(tiny, monkeypatch):
    monkeypatch.setattr(batch, "execute", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.run(grid_of(tiny, grid={"seed": [0, 1, 2]}))
    assert set(pd.read_csv(tiny / "out" / "batch.csv")["status"]) == {"to do"}
    (tiny / "file").write_text("")
    with pytest.raises(OSError, match="choose a writable output folder"):
        batch.run(grid_of(tiny, out=str(tiny / "file" / "below")))


# ---------------------------------------------------------------------------- several runners


RUNNER = """
import sys, time
from pathlib import Path
from biasprune import batch
def execute(notebook, values, target, **_):
    with open(sys.argv[2], "a") as log:
        log.write(f"{target.parent.name}\\n")
    time.sleep(0.4)
    if values["seed"] == 3:
        return "ValueError: as wanted"
    (target / "run.json").write_text("{}")
    return ""
batch.execute = execute
(Path(sys.argv[2]).parent / f"ready{sys.argv[3]}").touch()
while len(list(Path(sys.argv[2]).parent.glob("ready*"))) < 2:
    time.sleep(0.01)
sys.exit(batch.run(batch.read_grid(sys.argv[1])))
"""


def test_two_runners_at_once_do_each_run_once(tiny):
    grid_of(tiny, grid={"seed": list(range(8))})
    log = tiny / "log.txt"
    arguments = [sys.executable, "-c", RUNNER, str(tiny / "my.yaml"), str(log)]
    runners = [subprocess.Popen([*arguments, str(i)], stdout=subprocess.PIPE, text=True) for i in (0, 1)]
    said = [r.communicate(timeout=60)[0] for r in runners]
    assert [r.returncode for r in runners] == [1, 1]  # a failure is one for both, and is not tried twice
    assert sorted(log.read_text().split()) == [f"seed-{i}" for i in range(8)]
    for text in said:  # both waited until everything was done
        assert text.count(" done ") == 7 and text.count(" failed ") == 1


def test_a_run_left_behind_keeps_its_folder(tiny):
    """A runner that is killed outright leaves papermill running: nobody else writes there until it ends."""
    [job] = batch.plan(grid_of(tiny))
    with batch._locked(job, wait=False) as lock:
        left = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    try:
        with batch._locked(job, wait=False) as lock:
            assert lock is None
    finally:
        left.kill()
        left.wait()
    with batch._locked(job, wait=False) as lock:
        assert lock is not None
        with batch._locked(job, wait=False) as other:  # within one process, too
            assert other is None


class Papermill:
    """A process that has ended: what it was given, its exit code and what it said, one of each per start."""

    def __init__(self, monkeypatch, *ends):
        self.ends, self.given, self.returncode = list(ends), [], 0
        monkeypatch.setattr(subprocess, "Popen", self)

    def __call__(self, command, **options):
        self.given.append(options)
        self.returncode, said = self.ends.pop(0)
        options["stderr"].write(said)
        return self

    def poll(self):
        return self.returncode


def test_papermill_inherits_the_lock_and_the_environment(tiny, monkeypatch):
    papermill = Papermill(monkeypatch, (0, "Input Notebook: …"))
    [job] = batch.plan(grid_of(tiny))
    with batch._locked(job, wait=True) as lock:
        batch.perform(job, lock, 0, threading.Event(), {"CUDA_VISIBLE_DEVICES": "4"})
        [given] = papermill.given
        assert given["pass_fds"] == [lock.fileno()] and given["env"]["CUDA_VISIBLE_DEVICES"] == "4"
    assert job.state() == "done"


def test_a_port_taken_is_tried_again_and_a_kill_is_named(tmp_path, monkeypatch):
    taken = "zmq.error.ZMQError: Address already in use"
    papermill = Papermill(
        monkeypatch, (1, taken), (0, ""), (1, taken), (1, taken), (-9, "Executing\n"), (3, "")
    )
    said = [batch.execute(Path("x.ipynb"), {}, tmp_path / "x") for _ in range(4)]
    assert said == ["", taken, "Executing\nkilled, perhaps for want of memory", "papermill ended with 3"]
    assert not papermill.ends


# papermill without a kernel, whose start takes seconds: notebook, executed notebook, -f, parameters
PLAIN = """
import json, sys, yaml
node = json.load(open(sys.argv[1]))
sources = ["".join(c["source"]) for c in node["cells"]]
names = {}
exec(sources[0], names)
names.update(yaml.safe_load(open(sys.argv[4])))
exec(sources[1], names)
json.dump(node, open(sys.argv[2], "w"))
"""
COMMAND = """
import sys
from biasprune import __main__ as command, batch
batch._PAPERMILL = [sys.executable, sys.argv.pop(1)]
command.main()
"""


def test_a_stopped_grid_goes_on_with_what_is_missing(tiny):
    """Twelve runs, stopped half-way, started again: each is done once, with the same results."""
    (tiny / "plain.py").write_text(PLAIN)
    keys = {"grid": {"seed": list(range(6)), "word": ["a", "b"]}, "workers": 2, "set": {"wait": 0.5}}
    grid = grid_of(tiny, **keys)
    start = [sys.executable, "-c", COMMAND, str(tiny / "plain.py"), "run", str(tiny / "my.yaml")]
    log, out = tiny / "out" / "log.txt", tiny / "out"

    def finished() -> dict[Path, str]:
        return {p: p.read_text() for p in sorted(out.glob("*/*/batch.json"))}

    first = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while len(finished()) < 4 and time.monotonic() - began < 60:
        time.sleep(0.05)
    children = psutil.Process(first.pid).children()
    first.terminate()
    assert first.wait(30) == 143
    assert not psutil.wait_procs(children, timeout=20)[1]
    kept = finished()
    assert 4 <= len(kept) < 12
    assert (pd.read_csv(out / "batch.csv")["status"] == "to do").sum() == 12 - len(kept)
    executed = len(log.read_text().splitlines())
    again = subprocess.run(start, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(log.read_text().splitlines()) == executed + 12 - len(kept)
    assert len(finished()) == 12 and finished().items() >= kept.items()
    table = pd.read_csv(out / "batch.csv")
    assert set(table["run"]) == set(labels(grid)) and len(table) == 12
    assert (table["status"] == "done before").sum() == len(kept)
    for job in batch.plan(grid):  # as if it had never been stopped
        numbers = random.Random(job.values["seed"])
        wanted = [numbers.random() for _ in range(5)]
        assert json.loads((job.folder / "numbers.json").read_text()) == wanted
        assert job.folder.with_suffix(".ipynb").is_file() and job.state() == "done"
    assert "Seed 5." in again.stdout and "# Reports" in (out / "README.md").read_text()


def test_a_failed_notebook_is_kept(tiny, capsys):
    assert batch.run(grid_of(tiny, set={"seed": -1})) == 1
    assert "no seed: -1" in (tiny / "out" / "defaults" / "01_tiny.ipynb").read_text()
    said = capsys.readouterr().err
    assert "FAILED defaults/01_tiny: AssertionError: no seed: -1\n" in said
    assert f"executed notebook: {tiny / 'out'}/defaults/01_tiny.ipynb" in said


# ---------------------------------------------------------------------------- a cluster


class Handle:
    """What submitit gives for a job."""

    def __init__(self, call, problem=None):
        self.call, self.problem, self.cancelled = call, problem, False

    def exception(self):
        if isinstance(self.problem, SystemExit):
            raise self.problem
        if self.problem is None:
            self.call()
        return self.problem

    def cancel(self):
        self.cancelled = True


class Executor:
    def __init__(self, problems):
        self.problems, self.handles = list(problems), []

    def batch(self):
        return threading.Lock()  # a context

    def submit(self, call):
        self.handles.append(Handle(call, self.problems.pop(0)))
        return self.handles[-1]


def test_a_job_that_dies_on_the_cluster_is_a_failure(tiny, calls, monkeypatch):
    executor = Executor([None, MemoryError("out of memory"), None])
    monkeypatch.setattr(batch, "_executor", lambda *_: executor)
    assert batch.run(grid_of(tiny, grid={"seed": [0, 1, 2]}), submit="slurm") == 1
    table = pd.read_csv(tiny / "out" / "batch.csv").set_index("run")
    assert table["status"].tolist() == ["done", "failed", "done"] and len(calls) == 2
    assert table["error"].iloc[1] == "MemoryError: out of memory"
    executor = Executor([TimeoutError("too long")])  # what it says now, and not what it said then
    assert batch.run(grid_of(tiny, grid={"seed": [0, 1, 2]}), submit="slurm") == 1
    assert pd.read_csv(tiny / "out" / "batch.csv")["error"].iloc[1] == "TimeoutError: too long"


def test_a_stopped_submission_cancels_its_jobs(tiny, calls, monkeypatch):
    executor = Executor([None, SystemExit(143), None])
    monkeypatch.setattr(batch, "_executor", lambda *_: executor)
    with pytest.raises(SystemExit):
        batch.run(grid_of(tiny, grid={"seed": [0, 1, 2]}), submit="slurm")
    assert all(h.cancelled for h in executor.handles) and len(calls) == 1


def test_without_submitit_the_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match="pip install submitit, or biasprune\\[cluster\\]"):
        batch.run(grid_of(tiny), submit="local")
    extras = tomllib.loads((record.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["cluster"][0].startswith("submitit")


def test_submitit_runs_a_grid_and_its_options_are_checked(tiny):
    submitit = pytest.importorskip("submitit")
    with pytest.raises(SystemExit, match="slurm: .*timeout_mins"):
        batch.run(grid_of(tiny, slurm={"timeout_mins": 3}), submit="local")
    with pytest.raises(SystemExit, match="slurm: .*srun"):
        batch.run(grid_of(tiny), submit="slurm")
    grid = grid_of(tiny, slurm={"timeout_min": 5, "slurm_partition": "gpu"})
    assert batch.run(grid, submit="local") == 0
    [job] = batch.plan(grid)
    assert job.state() == "done" and json.loads((job.folder / "numbers.json").read_text())
    again = batch._Submitted(job, 1.0).checkpoint()  # a time limit: queued again, as it is
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function == batch._Submitted(job, 1.0)


def test_submitit_in_this_process(tiny, calls):
    pytest.importorskip("submitit")
    assert batch.run(grid_of(tiny, grid={"seed": [0, 1]}), submit="debug") == 0
    assert len(calls) == 2


# ---------------------------------------------------------------------------- the command


def test_the_command_is_installed_and_says_how_it_is_used(tiny, calls, monkeypatch, capsys):
    scripts = tomllib.loads((record.ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["biasprune"].split(":")
    assert getattr(import_module(module), name) is command.main
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    grid_of(tiny)
    path = str(tiny / "my.yaml")
    for wrong in (
        [],
        [path, "--params", "one"],
        [path, "--notebook", "01_tiny"],
        ["--params", "one", "--dry-run"],
    ):
        monkeypatch.setattr(sys, "argv", ["biasprune", "run", *wrong])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        assert stopped.value.code == 2 and "give a grid" in capsys.readouterr().err
    assert not calls
    monkeypatch.setattr(sys, "argv", ["biasprune", "run", path, "--dry-run", "--out", str(tiny / "else")])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 0 and "defaults/01_tiny: to do" in capsys.readouterr().out


def test_papermill_alone_works_from_any_folder(tmp_path):
    """A parameter file is for all notebooks; papermill only warns of what one of them doesn't know."""
    values = {"model": "tiny-llama", "prompts_source": "biasprune", "axis": "religion", "n_valid": 20}
    values |= {"n_test": 20, "n_base": 0, "score_seeds": [0], "test_seeds": [0], "alphas": [0.0, 0.13]}
    values |= {"gammas": [0.3], "n_boot": 100, "score_tokens": 256, "test_tokens": 256, "axes": ["religion"]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    notebook = record.ROOT / "notebooks" / "01_fasp_heads.ipynb"
    papermill = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "-f", "small.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(record.ROOT)}
    done = subprocess.run(papermill, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unknown parameter" in done.stderr and "axes" in done.stderr
    [facts] = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/run.json")]
    assert facts["status"] == "done" and facts["config"]["axis"] == "religion"


def test_a_finished_run_starts_from_nothing_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    """Committed results, or those of other data, are never taken for this machine's."""
    monkeypatch.setattr(batch, "_PAPERMILL", [sys.executable, "-c", "pass"])
    for status, left in (("done", []), ("running", ["cells.parquet", "run.json"])):
        target = tmp_path / status
        target.mkdir()
        (target / "run.json").write_text(json.dumps({"status": status}))
        (target / "cells.parquet").write_text("x")
        assert batch.execute(Path("x.ipynb"), {}, target) == ""
        assert sorted(p.name for p in target.iterdir()) == left
