"""One run, one folder: run.json and parquet frames, written atomically, resumable.

Figures and tables read only these files.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from biasprune.lm import LM

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas", "scipy", "seaborn", "papermill")


def notebooks_dir() -> Path:
    """The repository's folder of notebooks: $BIASPRUNE_NOTEBOOKS, or the one beside the package."""
    return Path(os.environ.get("BIASPRUNE_NOTEBOOKS") or ROOT / "notebooks")


def slug(name: str) -> str:
    """A name that is safe as a folder's: 'meta-llama/Llama-2-7b' → 'meta-llama--Llama-2-7b'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip("-.") or "run"


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A scratch path that replaces ``path`` when the block ends well, and never otherwise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".writing-", suffix=".tmp", dir=path.parent)
    except OSError as e:
        raise OSError(f"{path} can't be written ({e.strerror}); choose a writable output folder.") from e
    os.close(handle)
    try:
        yield Path(scratch)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError as e:  # a full disk, above all
        raise OSError(
            f"{path} could not be written ({e.strerror or e}); what was there before is left as it was."
        ) from e
    finally:
        Path(scratch).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with _atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def stored_arrays(path: Path | None, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from an .npz file, or from ``make()`` and then stored there. None stores nothing."""
    if path is None:
        return make()
    try:
        with np.load(path) as stored:
            return {k: stored[k] for k in stored.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):  # none yet, or broken
        # opened before the work: a folder that can't be written fails now, not hours later
        with _atomic(path) as scratch, scratch.open("wb") as f:
            arrays = make()
            np.savez_compressed(f, **arrays)
        return arrays


@cache
def code_sha256() -> str:
    """Digest of the package's own source, so that results of other code are never taken for ours."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The repository's commit, with '+changes' when tracked code differs from it."""
    if _git("rev-parse", "--show-toplevel") != str(ROOT):
        return "unknown"  # no repository, or one that merely contains the installed package
    changed = _git("status", "--porcelain", "--", "biasprune", "notebooks", "data")
    return _git("rev-parse", "HEAD") + ("+changes" if changed else "")


def device_name(device: torch.device | str = "cpu") -> str:
    """Name of the accelerator, or of the processor with its number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} threads"


def provenance(lm: LM | None = None) -> dict[str, Any]:
    """What a result depends on besides its parameters: code, versions, machine, model."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    known = {
        "commit": commit(),
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "device": device_name(lm.device if lm else "cpu"),
    }
    if lm:
        known["model"] = {
            "name": lm.name,
            "class": type(lm.model).__name__,
            "revision": lm.revision,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "attention": lm.model.config._attn_implementation,
            "layers": lm.anatomy.n_layers,
            "heads": lm.anatomy.n_heads,
            "parameters": sum(p.numel() for p in lm.model.parameters()),
        }
    return known


def frame_sha256(frame: pd.DataFrame) -> str:
    """Digest of a frame's content, for the record of the data that went in."""
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()


def digests(inputs: Mapping[str, pd.DataFrame | str]) -> dict[str, str]:
    """Digest of every table or text that goes into a run, by name: part of its configuration, so that results
    are never taken for those of other data."""
    return {
        k: frame_sha256(v) if isinstance(v, pd.DataFrame) else hashlib.sha256(v.encode()).hexdigest()
        for k, v in inputs.items()
    }


def peak_memory_mib() -> float:
    """Peak resident memory of this process, or peak GPU memory if a GPU was used, in MiB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measured(call: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[Any, float, float]:
    """Result of a call, its seconds, and the peak of memory over what was in use before, in MiB.

    On a GPU the allocator's peak; on a CPU the resident memory, looked at every 10 ms. Memory that earlier
    work has freed is given back first (with glibc; elsewhere it hides part of the peak).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    device, process = torch.device(device), psutil.Process()
    gpu, running = device.type == "cuda", threading.Event()
    before = process.memory_info().rss
    peak = [before]

    def watch() -> None:
        while not running.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    if gpu:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        watcher.start()
    start = time.perf_counter()
    try:
        result = call()
        if gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    finally:
        running.set()
    if gpu:
        peak = [torch.cuda.max_memory_allocated(device)]
    return result, seconds, max(0, peak[0] - before) / 2**20


def _plain(value: Any) -> Any:
    """What json can't write itself, in a form that is the same in every process."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} can't be part of a run's record: {value!r}")


def _stored_table(path: Path, key: str) -> pa.Table | None:
    """The table if it is whole and belongs to this configuration."""
    try:
        table = pq.read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid):  # none yet, or broken
        return None
    return table if (table.schema.metadata or {}).get(b"key") == key.encode() else None


class Run:
    """A folder with a run's resolved configuration, results and record.

    ``frame`` computes a table once: a run that was stopped and is started again with the same
    configuration and code takes finished tables from the folder. Tables of another configuration
    are computed anew and replaced.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any], notebook: str = "") -> None:
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config, default=_plain))
        script = notebooks_dir() / f"{notebook}.py"  # its code decides results too
        code = code_sha256() + (script.read_text() if script.is_file() else "")
        self.key = hashlib.sha256((json.dumps(self.config, sort_keys=True) + code).encode()).hexdigest()
        self.started = time.time()
        self.record: dict[str, Any] = {
            "notebook": notebook,
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": self.config,
            "key": self.key,
        }
        self._seconds: dict[str, float] = {}
        self._write()

    def _write(self) -> None:
        write_text(self.folder / "run.json", json.dumps(self.record, indent=1) + "\n")

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record.update(json.loads(json.dumps(facts, default=_plain)))
        self._write()

    def frame(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table ``name.parquet``, from the folder or from ``make()``."""
        path = self.folder / f"{name}.parquet"
        stored = _stored_table(path, self.key)
        if stored is not None:
            self._seconds[name] = float(stored.schema.metadata[b"seconds"])
        else:
            start = time.time()
            table = pa.Table.from_pandas(make(), preserve_index=False)
            self._seconds[name] = round(time.time() - start, 2)
            extra = {b"key": self.key.encode(), b"seconds": str(self._seconds[name]).encode()}
            stored = table.replace_schema_metadata({**(table.schema.metadata or {}), **extra})
            with _atomic(path) as scratch:
                pq.write_table(stored, scratch)
        self.note(seconds=self._seconds)
        return stored.to_pandas()

    def frame_pair(
        self,
        name: str,
        make: Callable[[], tuple[pd.DataFrame, pd.DataFrame]],
        parts: tuple[str, str] = ("texts", "losses"),
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Two tables that come from one computation, stored as ``name_texts`` and ``name_losses``."""
        made: list[tuple[pd.DataFrame, pd.DataFrame]] = []

        def part(i: int) -> pd.DataFrame:
            if not made:
                made.append(make())
            return made[0][i]

        one, other = (self.frame(f"{name}_{p}", lambda i=i: part(i)) for i, p in enumerate(parts))
        return one, other

    def finish(self, **results: Any) -> None:
        """Mark the run as done, with its results, wall time (this process) and peak memory."""
        self.note(
            status="done",
            results=results,
            wall_seconds=round(time.time() - self.started, 1),
            peak_memory_mib=round(peak_memory_mib()),
        )
