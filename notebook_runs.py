"""What the Snakefile calls: which runs a configuration asks for, what each is made from, one run by papermill."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from biasprune.core import data, run
from biasprune.core.parameters import check_parameters, code_cells, notebooks_dir, parameters_of
from biasprune.core.provenance import code_sha256

OVERVIEW = "00_overview"  # reads the records of all other runs
BENCHMARKS = ("07_speed",)  # run last, alone, on all cores


def values_in(name: str) -> dict[str, Any]:
    """A parameter file, by its path or its name in notebooks/params."""
    shipped = {path.stem: path for path in sorted(notebooks_dir().glob("params/*.yaml"))}
    if not Path(name).is_file():
        data.choose(name, shipped, "parameter file")
    with shipped.get(name, Path(name)).open(encoding="utf-8") as file:
        return yaml.safe_load(file)


def _short(value: Any) -> str:
    """A value as part of a folder's name, with a digest where the name doesn't say it exactly."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if text == (name := run.slug(text)[:40]) else f"{name}-{run.digest(value)[:8]}"


def plan(config: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(label, notebook) → parameters of every run that is asked for. The Snakefile explains the configuration.

    A parameter goes to the notebooks that declare it. The label is made of the parameter file and the grid's values.
    ValueError: a notebook, parameter file or parameter that there isn't, or a value of another type.
    """
    known = {path.stem: parameters_of(path) for path in sorted(notebooks_dir().glob("[0-9]*.ipynb"))}
    keys = {"params": [], "notebooks": list(known), "grid": {}, "set": {}, "out": "reports", "threads": 1}
    types = {key: (type(default).__name__, default) for key, default in keys.items()}
    asked = {**keys, **check_parameters(config, types, "configuration")}
    grid = check_parameters(asked["grid"], dict.fromkeys(asked["grid"], ("list", [])), "grid")
    files = {name: values_in(name) for name in asked["params"]} or {"": {}}
    anywhere, runs = {name for declared in known.values() for name in declared}, {}
    for file, notebook, point in product(files, asked["notebooks"], product(*grid.values())):
        data.choose(notebook, known, "notebook")
        if notebook == OVERVIEW:
            runs["all", OVERVIEW] = {"reports": asked["out"]}
            continue
        given = {**files[file], **asked["set"], **dict(zip(grid, point, strict=True))}
        given = {k: v for k, v in given.items() if k in known[notebook] or k not in anywhere}
        given = check_parameters(given, known[notebook], f"{file or 'configuration'}, {notebook}")
        parts = [Path(file).stem] * bool(file) + [f"{k}-{_short(given[k])}" for k in grid if k in given]
        if runs.setdefault(("__".join(parts) or "defaults", notebook), given) != given:
            raise ValueError(f"two runs would be called {'__'.join(parts)}/{notebook}: rename a parameter file.")
    if useless := sorted({*asked["set"], *grid} - {name for given in runs.values() for name in given}):
        raise ValueError(f"configuration: these notebooks have no parameter {', '.join(useless)}.")
    return runs


@cache
def _contents(path: Path) -> list[tuple[str, str]]:
    """Name and digest of a file, or of every file below a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(p.relative_to(path.parent).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def made_from(notebook: str, parameters: dict[str, Any]) -> str:
    """Digest of what decides a run's results: parameters, files that they name, code, notebook, data."""
    words = re.findall(r'"([^"]+)"', json.dumps(parameters, ensure_ascii=False)) if notebook != OVERVIEW else []
    paths = [Path(word).expanduser() for word in [*words, os.environ.get("BIASPRUNE_PUBLISHED", "")] if word]
    paths += [p for p in sorted(data.data_dir().iterdir()) if p.name != "claims.csv" or notebook == OVERVIEW]
    cells = [code_cells(notebooks_dir() / f"{notebook}.ipynb", parameters=kind) for kind in (True, False)]
    return run.digest([notebook, parameters, cells, code_sha256(), [_contents(p) for p in paths if p.exists()]])


def _without_traces(executed: Path, folder: Path) -> None:
    """Take times, warnings and paths of this machine out of an executed notebook.

    Of the output folder the last three parts stay, and of the folder of all runs the last one.
    """
    node = json.loads(executed.read_text(encoding="utf-8"))
    for part in [node, *node["cells"]]:
        for key in ("papermill", "execution"):
            part["metadata"].pop(key, None)
    for cell in node["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["id"] = "injected-parameters"  # instead of one drawn at random
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    text, out = json.dumps(node, indent=1, ensure_ascii=False), folder.absolute().parents[1]
    for end in ("/", '\\"'):
        text = text.replace(f"{out}{end}", f"{out.name}{end}")
    run.write_text(executed, text + "\n")


def _result_first(executed: Path, folder: Path) -> None:
    """Put a run's result and its first figure right below the title of its executed notebook."""
    results = json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]
    source = [f"**Result.** {results['sentence']}"]
    source += [f"![{caption}]({folder.name}/figures/{name}.png)" for name, caption in results["figures"].items()][:1]
    node = json.loads(executed.read_text(encoding="utf-8"))
    first, cell = node["cells"][0], {"cell_type": "markdown", "id": "result", "metadata": {"tags": ["result"]}}
    title, _, rest = "".join(first["source"]).partition("\n\n")
    below = [{**cell, "source": "\n\n".join(source)}]
    below += [{"cell_type": "markdown", "id": "about", "metadata": {}, "source": rest}] * bool(rest)
    node["cells"][:1] = [{**first, "source": title}, *below]
    run.write_text(executed, json.dumps(node, indent=1, ensure_ascii=False) + "\n")


def execute(notebook: Path, folder: Path, parameters: dict[str, Any], stamp: Path) -> None:
    """Run a notebook in ``folder``; its executed form is put beside that, also where it fails, ``stamp`` where not.

    What a killed run left in the folder is gone on with. Finished results are made anew.
    """
    import papermill
    from traitlets.config import Config

    executed, old = folder.parent / notebook.name, list(folder.glob(".done-*"))
    with suppress(OSError, ValueError):  # no record, or a damaged one
        if json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "done":
            old += [folder / "run.json", *folder.glob("*.parquet"), *folder.glob("figures/*")]
    for path in old:
        path.unlink()
    parameters = {**parameters, "out": folder.as_posix()}
    options = {"cwd": os.getcwd(), "progress_bar": False}
    with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
        # not by ports: of kernels that start together, two now and then pick the same one
        options["config"] = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        try:
            papermill.execute_notebook(notebook, executed, parameters, **options)
        finally:
            if executed.exists():
                _without_traces(executed, folder)
    _result_first(executed, folder)
    stamp.touch()


if __name__ == "__main__":
    if sys.platform == "linux":  # nobody who writes is left behind by a workflow that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    execute(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
