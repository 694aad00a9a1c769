"""Run the notebooks in batch: ``python -m biasprune run --params smollm2 --out reports``."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import yaml
from papermill.iorw import load_notebook_node
from papermill.utils import find_first_tagged_cell_index

from biasprune import progress, record

NOTEBOOKS = record.ROOT / "notebooks"


def parameters_of(notebook: Path) -> set[str]:
    """Names that a notebook's parameters cell defines."""
    node = load_notebook_node(str(notebook))
    cell = node.cells[find_first_tagged_cell_index(node, "parameters")]
    return set(re.findall(r"^(\w+)\s*:", cell.source, re.MULTILINE))


def read_parameters(name: str) -> dict:
    """A parameter file: a name in notebooks/params, or a path.

    Raises
    ------
    SystemExit
        No such file, or it isn't a mapping. The message says what there is.
    """
    path = next((p for p in (Path(name), NOTEBOOKS / "params" / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in (NOTEBOOKS / "params").glob("*.yaml")))
        sys.exit(f"No parameter file {name!r}. Known: {known}; or give the path of a YAML file.")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        sys.exit(f"{path} must map parameter names to values.")
    return values


def execute(notebook: Path, values: dict, target: Path) -> int:
    """One notebook by papermill in a process of its own, its progress shown here; the exit code."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        given, log = Path(scratch) / "parameters.yaml", Path(scratch) / "progress"
        given.write_text(yaml.safe_dump(values))
        log.touch()
        executed = target.parent / notebook.name
        command = [sys.executable, "-m", "papermill", str(notebook), str(executed), "-f", str(given)]
        command += ["--no-progress-bar", "--cwd", str(Path.cwd())]
        errors = Path(scratch) / "errors"
        environment = {**os.environ, progress.FILE: str(log)}
        for attempt in (1, 2):
            with errors.open("w") as e:
                process = subprocess.Popen(command, stderr=e, env=environment)
                try:
                    _show(process, log)
                finally:  # stopped: the notebook stops too, and its kernel with it
                    if process.poll() is None:
                        process.terminate()
                        process.wait()
            # the one failure that a second try mends: another process took the kernel's port
            if process.returncode == 0 or "Address already in use" not in errors.read_text() or attempt == 2:
                break
        if process.returncode:
            print(errors.read_text(), file=sys.stderr)
        if executed.exists():
            _without_paths(executed, target)
    return process.returncode


def _show(process: subprocess.Popen, log: Path) -> None:
    """The last progress line, every few seconds on a terminal and twice a minute in a log file."""
    terminal = sys.stderr.isatty()
    last = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() - last > (2 if terminal else 30):
            last = time.monotonic()
            lines = [x for x in re.split(r"[\r\n]", log.read_text(errors="replace")) if x.strip()]
            if lines:
                print(
                    f"\r  {lines[-1][:100]:<100}", end="" if terminal else "\n", file=sys.stderr, flush=True
                )
    if terminal:
        print(f"\r{'':<102}\r", end="", file=sys.stderr)


def _without_paths(executed: Path, target: Path) -> None:
    """Take what names paths of this machine out of an executed notebook.

    Metadata, library warnings, and the folder that holds the output folder, which papermill writes into the
    parameters: of ``target`` the last three parts stay.
    """
    node = nbformat.read(executed, as_version=4)
    for cell in node.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    for key in ("input_path", "output_path", "environment_variables"):
        node.metadata.get("papermill", {}).pop(key, None)
    shown = Path(*target.parts[-3:]).as_posix()
    text = nbformat.writes(node).replace(target.as_posix(), shown)
    record.write_text(executed, text + "\n")


def run(names: list[str], out: Path, only: list[str]) -> int:
    """Run notebooks with parameter files and write the report; the number of failures."""
    notebooks = [n for n in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if not only or n.stem in only]
    if not notebooks:
        known = ", ".join(n.stem for n in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")))
        sys.exit(f"No such notebook: {', '.join(only)}. Known: {known}.")
    accepted = {n: parameters_of(n) for n in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
    jobs = []
    for name in names:  # everything is checked before anything starts
        values = read_parameters(name)
        if unknown := sorted(set(values) - set().union(*accepted.values())):
            sys.exit(f"{name}: no notebook knows the parameters {', '.join(unknown)}.")
        jobs += [(n, name, {k: v for k, v in values.items() if k in accepted[n]}) for n in notebooks]
    failed = 0
    for notebook, name, values in jobs:
        target = out / Path(name).stem / notebook.stem
        print(f"{notebook.stem} with {Path(name).stem} → {target}", file=sys.stderr)
        start = time.monotonic()
        code = execute(notebook, {**values, "out": target.as_posix()}, target)
        minutes = (time.monotonic() - start) / 60
        print(f"  {'FAILED' if code else 'done'} after {minutes:.1f} min", file=sys.stderr)
        failed += code != 0
    report(out)
    return failed


def _table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; numbers to three digits."""

    def cell(x: object) -> str:
        if not isinstance(x, float | np.floating):
            return str(x)
        if not np.isfinite(x):
            return "–" if np.isnan(x) else "∞"
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"

    rows = [list(frame.columns), ["---"] * frame.shape[1]]
    rows += [[cell(x) for x in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def report(out: Path) -> None:
    """Write ``out/README.md`` from the run records below ``out``, and the README's block of results.

    The block in the README has every run's sentence and its first figure only.

    A notebook's record names what it is about, and the tables and figures to show, under ``results``.
    Tables ``speed`` of all runs are put together in ``out/speed.csv``.
    """
    sections, short, rows, speed = [], [], [], []
    for path in sorted(out.glob("*/*/run.json")):
        facts = json.loads(path.read_text())
        if facts["status"] != "done":
            continue
        source, model = facts["provenance"], facts["provenance"]["model"]
        folder = path.parent.relative_to(out).as_posix()
        rows.append(
            {
                "notebook": f"[{facts['notebook']}]({folder}.ipynb)",
                "parameters": path.parent.parent.name,
                "model": model["name"],
                "about": facts["results"].get("about") or facts["config"].get("axis", ""),
                "minutes": facts["results"]["minutes"],
                "peak MiB": facts["peak_memory_mib"],
                "device": source["device"],
                "dtype": model["dtype"],
                "commit": source["commit"][:10]
                + ("+changes" if source["commit"].endswith("+changes") else ""),
            }
        )
        results = facts["results"]
        parts = [f"## {facts['notebook']}: {model['name']}, {path.parent.parent.name}", results["sentence"]]
        figures = [f"![{c}]({folder}/figures/{f}.png)" for f, c in results["figures"].items()]
        short += [f"**{facts['notebook']}** ({path.parent.parent.name}). {results['sentence']}", *figures[:1]]
        for name, caption in results["tables"].items():
            table = pd.read_parquet(path.parent / f"{name}.parquet")
            if len(table):
                parts += [f"{caption}:", _table(table)]
        sections.append("\n\n".join([*parts, *figures]) + "\n")
        if (path.parent / "speed.parquet").exists():
            speed.append(pd.read_parquet(path.parent / "speed.parquet").assign(run=path.parent.parent.name))
    head = (
        "Written by `python -m biasprune run`; don't edit. Every figure and number comes from the run "
        "records here. Minutes are those of the computations; loading the model comes on top."
    )
    if not rows:
        print(f"No finished run below {out}: no report written.", file=sys.stderr)
        return
    if speed:
        record.write_text(out / "speed.csv", pd.concat(speed).to_csv(index=False, float_format="%.4g"))
    table = _table(pd.DataFrame(rows))
    record.write_text(out / "README.md", f"# Reports\n\n{head}\n\n{table}\n\n" + "\n".join(sections))
    readme = record.ROOT / "README.md"
    if out.resolve() == (record.ROOT / "reports").resolve() and readme.exists():
        links = re.sub(r"\]\((?!http)", "](reports/", "\n\n".join([table, *short]))
        start, end = "<!-- results -->", "<!-- end of results -->"
        block = re.compile(f"{start}.*{end}", re.DOTALL)
        text = readme.read_text()
        record.write_text(readme, block.sub(lambda _: f"{start}\n{links}\n{end}", text))


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(prog="biasprune", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="execute notebooks with parameter files")
    runner.add_argument("--params", nargs="+", required=True, help="names in notebooks/params, or YAML files")
    runner.add_argument("--out", type=Path, default=Path("reports"), help="folder for the results")
    runner.add_argument("--notebook", nargs="*", default=[], help="notebooks to run; all by default")
    reporter = commands.add_parser("report", help="write the report from run records again")
    reporter.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    if args.command == "run":
        sys.exit(run(args.params, args.out, args.notebook) > 0)
    report(args.out)


if __name__ == "__main__":
    main()
