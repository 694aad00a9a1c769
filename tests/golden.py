"""Golden tables: the smoke run of every notebook, compared between two versions of the code.

    python tests/golden.py freeze FOLDER [--commit C]   every notebook at its defaults into FOLDER/NOTEBOOK
    python tests/golden.py compare OLD NEW              exit status 1 if tables differ in a way not explained below

One thread and float32 throughout. Numbers are equal within 1e-5, relative or absolute, texts exactly. The rows of a
table must have the same order.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5
# (notebook, table, column or "rows", "missing", "columns") → why it differs; * stands for any text
EXPLAINED: dict[tuple[str, str, str], str] = {}


def freeze(folder: Path, tree: Path) -> None:
    """Run the notebooks of a tree at their defaults."""
    variables = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for notebook in sorted((tree / "notebooks").glob("[0-9]*.ipynb")):
        out = folder.absolute() / notebook.stem
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "papermill", str(notebook), f"{out}.ipynb", "-p", "out", str(out)]
        command += ["--no-progress-bar", "--cwd", str(folder)]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1:] if done.returncode else ["done"]
        print(f"{notebook.stem}: {' '.join(last)}", flush=True)


def equal(old: pd.Series, new: pd.Series) -> tuple[bool, str]:
    """Whether two columns agree, and how far they are apart."""
    if pd.api.types.is_numeric_dtype(old) and pd.api.types.is_numeric_dtype(new):
        a, b = old.to_numpy(dtype=float, na_value=np.nan), new.to_numpy(dtype=float, na_value=np.nan)
        close = np.isclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        far = np.nanmax(np.abs(a - b), initial=0.0, where=~close)
        return bool(close.all()), f"{(~close).sum()} of {len(a)} numbers, by up to {far:.3g}"
    other = [str(a) != str(b) for a, b in zip(old, new, strict=True)]  # lists of numbers, too
    return not any(other), f"{sum(other)} of {len(old)} values, first: {old[other].iloc[:1].tolist()}"


def differences(old: Path, new: Path) -> dict[str, str]:
    """What differs between two stored tables: column, "columns", "rows" or "missing" → how."""
    if not new.is_file():
        return {"missing": "there is no such table"}
    one, other = pd.read_parquet(old), pd.read_parquet(new)
    found = {}
    if list(one) != list(other):
        gone, added = [c for c in one if c not in other], [c for c in other if c not in one]
        found["columns"] = f"gone: {gone}, new: {added}" if gone or added else "in another order"
    if len(one) != len(other):
        return {**found, "rows": f"{len(one)} → {len(other)}"}
    compared = {c: equal(one[c], other[c]) for c in one if c in other}
    return found | {column: how for column, (same, how) in compared.items() if not same}


def compare(old: Path, new: Path) -> int:
    """Print every table's state; the number of differences without an explanation."""
    unexplained = 0
    for path in sorted(old.glob("*/*.parquet")):
        notebook, table = path.parent.name, path.stem
        found = differences(path, new / notebook / path.name)
        if not found:
            print(f"equal      {notebook}/{table}")
        for what, how in found.items():
            names = (notebook, table, what)
            why = [w for key, w in EXPLAINED.items() if all(map(fnmatch, names, key))]
            unexplained += not why
            print(f"{'explained ' if why else 'DIFFERS   '} {notebook}/{table}, {what}: {how}", *why[:1], sep="  # ")
    for path in sorted(new.glob("*/*.parquet")):
        if not (old / path.parent.name / path.name).is_file():
            print(f"new        {path.parent.name}/{path.stem}")
    return unexplained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    freezing = commands.add_parser("freeze")
    freezing.add_argument("folder", type=Path)
    freezing.add_argument("--commit", help="of this repository; by default the files as they are")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        sys.exit(compare(given.old, given.new) > 0)
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.commit:
        return freeze(given.folder, ROOT)
    with tempfile.TemporaryDirectory() as tree:
        archive = subprocess.run(["git", "-C", ROOT, "archive", given.commit], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
        freeze(given.folder, Path(tree))


if __name__ == "__main__":
    main()
