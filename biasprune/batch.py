"""Grids of runs: notebooks × parameter files × values, each in a process of its own, finished ones skipped.

A grid is a YAML file; all but ``notebooks`` may be left out::

    notebooks: [01_fasp_heads, 06_reliability]   # names in the notebooks folder
    params: [smollm2, gemma3]                    # parameter files: names in notebooks/params, or paths
    grid: {axis: [religion, nationality], score_seeds: [[0], [1]]}   # lists of values; all combinations
    set: {n_boot: 500}                           # one value for all runs
    out: runs/my-grid
    devices: [cuda:0, cuda:1]                    # one run at a time on each; "cpu" hides the GPUs
    workers: 1                                   # so many at a time on each
    slurm: {timeout_min: 240, gpus_per_node: 1}  # with --submit: submitit's parameters

``set`` goes over a parameter file, ``grid`` over both. A parameter that only some of the notebooks know goes
to those. Everything is checked before anything starts. Relative paths are those of the working directory.

A run lies in ``out/PARAMS__NAME-VALUE__…/NOTEBOOK``, its executed notebook beside it. ``batch.json`` there
has a digest of what it was made from: parameters, code, the notebook's cells, the data folder, and files and
folders that parameters name. If all that is the same, the run is skipped. Models of a hub count by their
name: give ``revision`` to tell them apart.

``00_overview`` reads the records of all other runs: it is run once, after them, into ``out/all``. Benchmarks
(``BENCHMARKS``) are run one at a time on all cores, after what else there is to do. With several runs at a
time, each has its share of the cores; another number of threads can change the last digits of a result.

Beyond one machine, runs go to Slurm through submitit, without ``devices``. It fits since runs don't depend
on each other: no rules of files and dates as a workflow engine has, no scheduler of its own
that must stay alive. A grid is one job array of plain calls; what hits its time limit is queued again and
keeps its finished tables; and a local executor goes the same way without a cluster.
"""

from __future__ import annotations

import ast
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TextIO

import nbformat
import pandas as pd
import papermill
import torch
import yaml
from papermill.iorw import load_notebook_node

from biasprune import fetch, progress, record

STAMP = "batch.json"
OVERVIEW = "00_overview"
BENCHMARKS = ("07_speed",)
_PAPERMILL = [sys.executable, "-m", "papermill"]
_KINDS = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}


# ---------------------------------------------------------------------------- what is to be run


def notebooks() -> dict[str, Path]:
    """Name → path of every notebook.

    Raises
    ------
    SystemExit
        There are none: the package was installed without the repository.
    """
    folder = record.notebooks_dir()
    found = {p.stem: p for p in sorted(folder.glob("[0-9]*.ipynb"))}
    if not found:
        sys.exit(
            f"No notebooks in {folder}. They come with a clone of the repository, not with the package: "
            "install the clone by 'pip install -e', or set BIASPRUNE_NOTEBOOKS to its folder 'notebooks'."
        )
    return found


def parameters_of(notebook: Path) -> dict[str, str]:
    """Name → annotated type, for what a notebook's parameters cell defines."""
    return {k: v["inferred_type_name"] for k, v in papermill.inspect_notebook(str(notebook)).items()}


@cache
def defaults_of(notebook: Path) -> dict[str, Any]:
    """Name → value, for what a notebook's parameters cell defines."""
    found = papermill.inspect_notebook(str(notebook))
    return {k: ast.literal_eval(v["default"]) for k, v in found.items()}


def _instead(name: str, known: Iterable[str]) -> str:
    """What to say about an unknown name: the nearest known one, and all of them if they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    said = f" Did you mean {near[0]}?" if near else ""
    return said + (f" Known: {', '.join(known)}." if len(known) < 40 or not near else "")


def _typed(value: Any, kind: str, where: str) -> Any:
    """The value, if it is of the kind; an int is made a float where one is wanted."""
    if kind == "float" and type(value) is int:
        return float(value)
    if kind not in _KINDS or type(value) is _KINDS[kind]:
        return value
    hint = ""
    if kind == "list" and where.startswith("grid"):
        hint = f"; a grid lists the values, each a list itself: [[{value}], …]"
    elif kind == "float" and re.fullmatch(r"[-+\d]+e[-+]?\d+", str(value)):
        hint = "; YAML wants a point in it: 1.0e-3"
    sys.exit(f"{where} takes {kind}, not {value!r} ({type(value).__name__}){hint}.")


def _mapping(name: str, kind: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of a YAML file: a path, or a name in notebooks/params or notebooks/grids."""
    folder = record.notebooks_dir() / ("params" if kind == "parameter file" else "grids")
    path = next((p for p in (Path(name), folder / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        known = [p.stem for p in folder.glob("*.yaml")]
        sys.exit(f"No {kind} {name!r}.{_instead(name, known)} Or give the path of a YAML file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        sys.exit(f"{path} isn't valid YAML in UTF-8: {e}")
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        sys.exit(f"{path} must map names to values.")
    return path, values


def read_parameters(name: str) -> dict[str, Any]:
    """A parameter file: a name in notebooks/params, or a path.

    Raises
    ------
    SystemExit
        No such file, or it isn't a mapping. The message says what there is.
    """
    return _mapping(name, "parameter file")[1]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to run; the module's text explains the keys."""

    notebooks: list[str]
    out: Path
    params: list[str] = field(default_factory=list)
    grid: dict[str, list] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    workers: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)


def read_grid(name: str) -> Grid:
    """A grid from a YAML file: a path, or a name in notebooks/grids.

    Raises
    ------
    SystemExit
        No such file; an unknown or missing key; a value of another kind. Names are checked by ``plan``.
    """
    path, given = _mapping(name, "grid")
    kinds = {"notebooks": "list", "params": "list", "grid": "dict", "set": "dict", "out": "str"}
    kinds |= {"devices": "list", "workers": "int", "slurm": "dict"}
    for key in given:
        if key not in kinds:
            sys.exit(f"{path}: unknown key {key}.{_instead(key, kinds)}")
        _typed(given[key], kinds[key], f"{path}: {key}")
    if not given.get("notebooks"):
        sys.exit(f"{path}: notebooks is missing.{_instead('', notebooks())}")
    if given.get("workers", 1) < 1:
        sys.exit(f"{path}: workers must be at least 1.")
    if odd := [d for d in given.get("devices", []) if not re.fullmatch(r"cpu|cuda:\d+", str(d))]:
        sys.exit(f"{path}: devices are cpu, cuda:0, cuda:1, …; not {odd[0]}.")
    for key, values in given.get("grid", {}).items():
        if not isinstance(values, list) or not values:
            sys.exit(f"{path}: grid takes a list of values for each parameter, not {key}: {values!r}.")
    return Grid(**{**given, "out": Path(given.get("out", f"runs/{path.stem}"))})


@cache
def _sha256(path: Path) -> str:
    """Digest of a file, or of every file below a folder with its name."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as f:
            digest.update(
                f"{file.relative_to(path.parent)}".encode() + hashlib.file_digest(f, "sha256").digest()
            )
    return digest.hexdigest()


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file has; nothing where there is none, or a broken one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True)
class Job:
    """One run: a notebook, what it gets, and where its results go."""

    notebook: Path
    values: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @cached_property
    def key(self) -> str:
        """Digest of what decides the result: parameters, code, notebook, data."""
        strings = {*_strings(self.values), os.environ.get("BIASPRUNE_PUBLISHED", "")}
        paths = {s: Path(s).expanduser() for s in sorted(strings) if s}
        named = {s: _sha256(p) for s, p in paths.items() if os.path.exists(p)}
        cells = [c.source for c in load_notebook_node(str(self.notebook)).cells]
        code = record.code_sha256()
        # claims are read by the overview alone, which is run each time
        data = [_sha256(p) for p in sorted(fetch.data_dir().iterdir()) if p.name != "claims.csv"]
        parts = [self.notebook.stem, cells, self.values, named, code, data]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def state(self) -> str:
        """'done' or 'failed' if the folder has just this run; '' if it is to be done."""
        stamp, facts = _json(self.folder / STAMP), _json(self.folder / "run.json")
        if stamp.get("key") != self.key:
            return ""
        # another run wrote into the folder, or the code was another one while this ran
        code = facts.get("provenance", {}).get("code_sha256", record.code_sha256())
        other = stamp["run"] != facts.get("key") or code != record.code_sha256()
        other |= facts.get("status", "done") != "done"
        return "" if stamp["status"] == "done" and other else stamp["status"]

    def stamp(self, error: str, start: float) -> None:
        """Note how the run ended: well, or with an error."""
        facts = {"key": self.key, "status": "failed" if error else "done", "error": error}
        facts |= {"minutes": round((time.time() - start) / 60, 2), "finished": time.time()}
        facts["run"] = _json(self.folder / "run.json").get("key")
        record.write_text(self.folder / STAMP, json.dumps(facts, indent=1) + "\n")


def _short(value: Any, length: int = 40) -> str:
    """A value as part of a folder's name; with a digest where that doesn't say it exactly."""
    parts = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    text = record.slug("-".join(parts))
    if text == "-".join(parts) and len(text) <= length:
        return text
    return f"{text[:length].strip('-.')}-{_digest(value)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def plan(grid: Grid) -> list[Job]:
    """The runs of a grid, each with the parameters that its notebook knows; without ``OVERVIEW``.

    Raises
    ------
    SystemExit
        A notebook, parameter file or parameter that there isn't, with the nearest one that there is; a value
        that isn't of the type in the notebook's parameters cell; a parameter given twice.
    """
    known = notebooks()
    for name in grid.notebooks:
        if str(name) not in known:
            sys.exit(f"No such notebook: {name}.{_instead(str(name), known)}")
    files = {str(name): read_parameters(str(name)) for name in grid.params} or {"": {}}
    all_kinds = {name: parameters_of(path) for name, path in known.items() if name != OVERVIEW}
    names = [name for name in dict.fromkeys(grid.notebooks) if name != OVERVIEW]
    _check_names(grid, files, all_kinds, names)
    wanted: dict[tuple, tuple[str, str, dict]] = {}
    for (file, fixed), notebook in itertools.product(files.items(), names):
        kinds = all_kinds[notebook]
        axes = {k: v for k, v in grid.grid.items() if k in kinds}
        for point in itertools.product(*axes.values()):
            values: dict[str, Any] = {}
            chosen = dict(zip(axes, point, strict=True))
            for where, source in (file, fixed), ("set", grid.set), ("grid", chosen):
                values |= {k: _typed(v, kinds[k], f"{where}: {k}") for k, v in source.items() if k in kinds}
            parts = [_short(Path(file).stem)] if file else []
            label = "__".join(parts + [f"{k}-{_short(values[k])}" for k in axes]) or "defaults"
            label = label if len(label) <= 150 else _short(label, 150)
            wanted[notebook, label.casefold(), _digest(values)] = notebook, label, values
    same = Counter(key[:2] for key in wanted)  # two parameter files of the same name, say
    jobs = []
    for key, (notebook, label, values) in wanted.items():
        name = f"{label}__{key[2]}" if same[key[:2]] > 1 else label
        jobs.append(Job(known[notebook], values, grid.out / name / notebook))
    return jobs


def _check_names(
    grid: Grid, files: dict[str, dict], kinds: dict[str, dict[str, str]], names: list[str]
) -> None:
    """Refuse parameters that no notebook knows, or that are given in two places.

    A parameter file may be for all notebooks; the grid's own parameters must be for one of ``names``.
    """
    anywhere, here = set().union(*kinds.values()), set().union(*(kinds[n] for n in names))
    given = [("grid", grid.grid, here), ("set", grid.set, here)]
    given += [(name, values, anywhere) for name, values in files.items()]
    for where, values, known in given:
        if unknown := sorted(set(values) - known):
            said = _instead(unknown[0], known)
            sys.exit(f"{where}: no notebook knows the parameters {', '.join(unknown)}.{said}")
        if "out" in values:
            sys.exit(f"{where}: out can't be set by parameters; each run has a folder of its own.")
        if grid.devices and values.get("device", "auto") != "auto":
            sys.exit(f"{where}: device and devices are both given; devices alone says where runs go.")
    if twice := sorted(set(grid.grid) & set(grid.set)):
        sys.exit(f"Both in grid and in set: {', '.join(twice)}.")


# ---------------------------------------------------------------------------- one run


def execute(
    notebook: Path,
    values: dict[str, Any],
    target: Path,
    *,
    stop: threading.Event | None = None,
    environment: dict[str, str] | None = None,
    label: str = "",
    keep: TextIO | None = None,
) -> str:
    """One notebook by papermill in a process of its own, its progress shown here; what went wrong, or ''.

    ``target`` is the notebook's output folder, beside which the executed notebook is put. ``stop``, set by
    another thread, stops it. The process inherits the open file ``keep``, and with it a lock.
    """
    target.mkdir(parents=True, exist_ok=True)
    if _json(target / "run.json").get("status") == "done":
        # computed anew, on this machine; what a run left behind that was stopped, is gone on with
        for old in [target / "run.json", *target.glob("*.parquet")]:
            old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        given, log = Path(scratch) / "parameters.yaml", Path(scratch) / "progress"
        given.write_text(yaml.safe_dump({**values, "out": target.as_posix()}))
        log.touch()
        executed = target.parent / notebook.name
        command = [*_PAPERMILL, str(notebook), str(executed), "-f", str(given)]
        command += ["--no-progress-bar", "--cwd", str(Path.cwd())]
        errors = Path(scratch) / "errors"
        variables = {**os.environ, **(environment or {}), progress.FILE: str(log)}
        inherited = [keep.fileno()] if keep else []
        for attempt in (1, 2):
            with errors.open("w") as e:
                process = subprocess.Popen(command, stderr=e, env=variables, pass_fds=inherited)
                try:
                    _show(process, log, stop or threading.Event(), label)
                finally:  # stopped: the notebook stops too, and its kernel with it
                    if process.poll() is None:
                        process.terminate()
                        process.wait()
            # the one failure that a second try mends: another process took the kernel's port
            if (
                process.returncode == 0
                or attempt == 2
                or "Address already in use" not in errors.read_text(errors="replace")
            ):
                break
        if executed.exists():
            _without_paths(executed, target)
        if process.returncode == 0:
            return ""
        killed = "\nkilled, perhaps for want of memory" if process.returncode == -9 else ""
        return (
            errors.read_text(errors="replace").strip() + killed
            or f"papermill ended with {process.returncode}"
        )


def _show(process: subprocess.Popen, log: Path, stop: threading.Event, label: str) -> None:
    """The last progress line, every few seconds on a terminal and twice a minute in a log file."""
    terminal = sys.stderr.isatty()
    width = shutil.get_terminal_size((102, 24)).columns - 2 if terminal else 160
    last = time.monotonic()
    while process.poll() is None and not stop.wait(0.5):
        if time.monotonic() - last > (2 if terminal else 30):
            last = time.monotonic()
            lines = [x for x in re.split(r"[\r\n]", log.read_text(errors="replace")) if x.strip()]
            if lines:
                text = f"  {label}{lines[-1]}"[:width]
                print(
                    f"\r{text:<{width}}" if terminal else text, end="" if terminal else "\n", file=sys.stderr
                )
                sys.stderr.flush()
    if terminal:
        print(f"\r{'':<{width}}\r", end="", file=sys.stderr)


def _without_paths(executed: Path, target: Path) -> None:
    """Take what names paths of this machine out of an executed notebook.

    Metadata, library warnings, and the folder that holds the output folders, which papermill writes into the
    parameters: of ``target`` the last three parts stay, and the last one of the folder of all runs.
    """
    node = nbformat.read(executed, as_version=4)
    for cell in node.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    for key in ("input_path", "output_path", "environment_variables"):
        node.metadata.get("papermill", {}).pop(key, None)
    shown = Path(*target.parts[-3:]).as_posix()
    text = nbformat.writes(node).replace(target.as_posix(), shown)
    if (out := target.absolute().parents[1]).name:
        alone = rf"(?:(?<![\w.-])|(?<=\\n)){re.escape(out.as_posix())}(?![\w-])"  # "/out", not "in/output"
        text = re.sub(alone, lambda _: out.name, text)
    record.write_text(executed, text + "\n")


@contextmanager
def _locked(job: Job, wait: bool) -> Iterator[TextIO | None]:
    """The job's open lock file; None if another process has it and ``wait`` is false.

    flock itself, since a process that inherits the file holds the lock too: where a runner is killed
    outright, the notebook that it leaves behind keeps its folder to itself until it ends.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        file = (job.folder / ".lock").open("a")
    except OSError as e:
        raise OSError(f"{job.folder} can't be written ({e.strerror}); choose another output folder.") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as e:
            raise OSError(f"{job.folder}: no locks there ({e.strerror}); choose another folder.") from e
        yield file if held else None


def perform(
    job: Job, lock: TextIO, since: float, stop: threading.Event, environment: dict[str, str], label: str = ""
) -> None:
    """Do a run whose lock is held, and stamp it.

    Nothing is done where the run is done already, or where another runner saw it fail after ``since``.
    """
    state = job.state()
    if state == "done" or (state == "failed" and _json(job.folder / STAMP)["finished"] > since):
        return
    print(f"{job.name} starts", file=sys.stderr)
    start = time.time()
    error = execute(
        job.notebook, job.values, job.folder, stop=stop, environment=environment, label=label, keep=lock
    )
    if error and stop.is_set():
        return
    job.stamp(error, start)
    minutes = (time.time() - start) / 60
    print(f"{job.name} {'FAILED' if error else 'done'} after {minutes:.1f} min", file=sys.stderr)


def overview(out: Path) -> int:
    """Run the notebook that reads all records below ``out``, into ``out/all``; the number of failures."""
    job = Job(notebooks()[OVERVIEW], {"reports": out.as_posix()}, out / "all" / OVERVIEW)
    print(f"{job.name} starts", file=sys.stderr)
    with _locked(job, wait=True) as lock:
        error = execute(job.notebook, job.values, job.folder, keep=lock)
    print(f"{error}\n{job.name} FAILED" if error else f"{job.name} done", file=sys.stderr)
    return int(error != "")


# ---------------------------------------------------------------------------- all runs


def _slots(grid: Grid) -> list[dict[str, str]]:
    """What the environment of each run at a time says: the device that it sees, and how many threads."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    slots = []
    for device in (grid.devices or [""]) * grid.workers:
        kind, _, index = device.partition(":")
        if kind == "cuda" and int(index) >= len(there):
            sys.exit(f"devices: there is no {device} here; {len(there)} GPUs are seen.")
        visible = {"": {}, "cpu": {"CUDA_VISIBLE_DEVICES": ""}}.get(device)
        slots.append({"CUDA_VISIBLE_DEVICES": there[int(index)]} if visible is None else visible)
    if len(slots) > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // len(slots)))}
        slots = [s | threads for s in slots]
    return slots


def _turns(grid: Grid, jobs: list[Job]) -> list[tuple[list[dict[str, str]], list[Job]]]:
    """Slots, and jobs for them, one after the other: nothing runs beside a benchmark."""
    slots = _slots(grid)
    timed = [job for job in jobs if job.notebook.stem in BENCHMARKS and len(slots) > 1]
    alone = _slots(replace(grid, devices=grid.devices[:1], workers=1))
    return [(slots, [job for job in jobs if job not in timed]), (alone, timed)]


def _here(slots: list[dict[str, str]], jobs: list[Job]) -> None:
    """Every job on this machine, a thread per slot. An exception, such as a signal's, stops all of them."""
    since, stop, taking = time.time(), threading.Event(), threading.Lock()
    waiting = list(jobs)

    def work(environment: dict[str, str]) -> None:
        while not stop.is_set():
            for job in list(waiting):
                with _locked(job, wait=False) as lock:
                    with taking:
                        if lock is None or job not in waiting:
                            continue
                        waiting.remove(job)
                    perform(job, lock, since, stop, environment, f"{job.name} " if len(jobs) > 1 else "")
                break
            else:  # what is left is being run by others
                if not waiting or stop.wait(1):
                    return

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            for done in as_completed([pool.submit(work, s) for s in slots]):
                done.result()
        except BaseException:
            stop.set()
            raise


@dataclass(frozen=True)
class _Submitted:
    """What submitit calls on the cluster's machine; called again where a time limit cuts it off."""

    job: Job
    since: float

    def __call__(self) -> None:
        with _locked(self.job, wait=True) as lock:
            perform(self.job, lock, self.since, threading.Event(), {})

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _executor(grid: Grid, cluster: str) -> Any:
    """submitit's executor with the grid's options."""
    if grid.devices:
        sys.exit(
            "devices are those of this machine; with --submit leave them out, and ask for GPUs by "
            "slurm: {gpus_per_node: 1}."
        )
    try:
        import submitit
    except ImportError:
        sys.exit("--submit needs submitit: pip install submitit, or biasprune[cluster].")
    try:
        executor = submitit.AutoExecutor(folder=grid.out / "submitit", cluster=cluster)
        executor.update_parameters(**{"name": "biasprune", "timeout_min": 720, **grid.slurm})
    except (NameError, AssertionError, RuntimeError) as e:
        sys.exit(f"slurm: {e}")
    return executor


def _elsewhere(executor: Any, jobs: list[Job]) -> None:
    """Every job through submitit, all at once; waits for them. A signal cancels them."""
    since = time.time()
    with executor.batch():
        handles = [executor.submit(_Submitted(job, since)) for job in jobs]
    print(f"{len(jobs)} runs submitted", file=sys.stderr)
    try:
        for job, handle in zip(jobs, handles, strict=True):
            problem = handle.exception()
            if problem is not None and _json(job.folder / STAMP).get("finished", 0) < since:
                job.stamp(f"{type(problem).__name__}: {problem}", since)
            print(f"{job.name}: {job.state()}", file=sys.stderr)
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise


def summary(jobs: list[Job], before: set[str]) -> pd.DataFrame:
    """One row per run: run, status, minutes, sentence, error (its last line).

    Status is 'done', 'done before' (a name in ``before``), 'failed', or 'to do'.
    """
    rows = []
    for job in jobs:
        state = job.state()
        stamp = _json(job.folder / STAMP) if state else {}
        facts = _json(job.folder / "run.json") if state == "done" else {}
        status = "done before" if state == "done" and job.name in before else state or "to do"
        sentence = facts.get("results", {}).get("sentence", "")
        error = (stamp.get("error") or "").strip().splitlines()
        rows.append([job.name, status, stamp.get("minutes"), sentence, error[-1] if error else ""])
    return pd.DataFrame(rows, columns=["run", "status", "minutes", "sentence", "error"])


def run(grid: Grid, *, dry: bool = False, submit: str = "") -> int:
    """Do what is missing of a grid; the number of runs that failed.

    ``dry`` only lists. ``submit`` is submitit's name of a cluster: slurm, local (processes on this machine,
    all at once). Otherwise runs are done here, one per device and worker. Stopped
    by a signal, it stops what runs; started again, it does what is missing. ``out/batch.csv`` has the
    summary. ``OVERVIEW`` comes last, here, and each time.

    Raises
    ------
    SystemExit
        Something in the grid that there isn't; see ``plan``.
    """
    jobs = plan(grid)
    states = {job.name: job.state() for job in jobs}
    before = {name for name, state in states.items() if state == "done"}
    missing = [job for job in jobs if job.name not in before]
    if jobs:
        print(f"{len(jobs)} runs, {len(before)} of them done before; results in {grid.out}", file=sys.stderr)
    if dry:
        says = {"done": "skipped: done before", "failed": "to do again: failed before", "": "to do"}
        for name, state in states.items():
            print(f"{name}: {says[state]}")
        if OVERVIEW in grid.notebooks:
            print(f"all/{OVERVIEW}: after all others")
        return 0
    means = _executor(grid, submit) if submit else _turns(grid, missing)
    record.write_text(grid.out / "batch.csv", summary(jobs, before).to_csv(index=False))
    try:
        if missing and submit:
            _elsewhere(means, missing)
        elif missing:
            for slots, some in means:
                _here(slots, some)
    finally:
        table = summary(jobs, before)
        record.write_text(grid.out / "batch.csv", table.to_csv(index=False))
        if jobs:
            print(table.drop(columns="error").to_string(index=False, max_colwidth=70, na_rep="–"))
    left = table[table["status"].isin(["failed", "to do"])]
    for row in left.itertuples():
        why = row.error or "the code was changed while it ran; start again"
        print(f"FAILED {row.run}: {why}\n  executed notebook: {grid.out / row.run}.ipynb", file=sys.stderr)
    return len(left) + (overview(grid.out) if OVERVIEW in grid.notebooks else 0)
