"""One run, one folder: parameters, provenance, tables that are computed once, figures, and run.json.

Reports, claims and the overview read only these folders. A run that was killed goes on to the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from biasprune.core import data
from biasprune.core.parameters import checked, code_cells, notebooks_dir
from biasprune.core.provenance import code_sha256, peak_memory_mib, provenance

if TYPE_CHECKING:  # torch is imported where it is needed: the workflow and reports go without
    from matplotlib.figure import Figure

    from biasprune.core.model import LM

FORM = 2  # of run.json; records of another form aren't read
VERDICT_COLUMNS = ["id", "case", "claim", "ours", "low", "high", "what", "verdict", "why"]
LOCK_SECONDS = 10  # how long the kernel of a killed run may take to go
_NOT_IN_KEY = ("show_texts", "save_pruned", "device")  # they decide no table; the kind of device is in the key itself


def slug(name: str) -> str:
    """A name that is safe as a folder's: 'meta-llama/Llama-2-7b' → 'meta-llama--Llama-2-7b'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip("-.") or "run"


def write_text(path: Path, text: str | bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        scratch.write_bytes(text if isinstance(text, bytes) else text.encode())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """sha256 of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def frame_sha256(frame: pd.DataFrame) -> str:
    """sha256 of a table's content; its index doesn't count."""
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()


def finished(out: str | Path) -> dict[Path, dict]:
    """Finished runs in out/<parameters>/<notebook>: folder → content of run.json.

    What is damaged or of another form is left out and named on stderr.
    """
    records, others = {}, 0
    for path in sorted(Path(out).glob("*/*/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            done = record.get("status") == "done"
        except (ValueError, AttributeError) as e:
            print(f"{path} is damaged ({e}): run that notebook again.", file=sys.stderr)
            continue
        if record.get("form") != FORM:
            others += 1
        elif done:
            records[path.parent] = record
    if others:
        print(f"{out}: {others} records of another version of biasprune are left out.", file=sys.stderr)
    return records


def start(notebook: str, cell: Mapping[str, Any]) -> Run:
    """Begin a notebook's run before it loads anything: check its parameters, make and lock its folder.

    ``cell`` is the notebook's ``globals()``; its ``out`` names the folder, "" makes one below runs/ in the working
    directory. Raises ValueError for a parameter that no notebook declares or a value of another type, RuntimeError
    where another process writes into the folder, FileExistsError where ``save_pruned`` is no new folder.
    """
    config, ignored = checked(notebook, cell)
    if config.get("save_pruned"):
        data.new_folder(config["save_pruned"])
    about = [config[name] for name in ("model", "classifier", "axis", "compare_by") if name in config]
    folder = config.pop("out") or Path("runs") / slug("-".join([notebook, *about]))
    return Run(folder, config, notebook, ignored)


def _plain(value: Any) -> Any:
    """What JSON can't write itself: arrays and numbers of numpy, sets, paths."""
    others = sorted if isinstance(value, set | frozenset) else str
    return value.tolist() if hasattr(value, "tolist") else others(value)


class Run:
    """A folder with a run's parameters, inputs, tables, figures, and its record (run.json).

    ``inputs`` comes first. From then on every table is computed once: it is taken from the folder while parameters,
    inputs, the package's code and the notebook's cells are the same.
    """

    def __init__(self, folder: str | Path, config: dict, notebook: str = "", ignored: Iterable[str] = ()) -> None:
        self.folder, self.key, self._begin, self._drawn = Path(folder), "", time.time(), set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock", is_singleton=True, thread_local=False)  # ends with the process
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise RuntimeError(f"{folder}: another process writes there. Wait for it, or choose another out.") from None
        except OSError as e:
            raise OSError(f"{folder} can't hold results ({e.strerror}): choose another out.") from e
        self.record: dict[str, Any] = {"form": FORM, "notebook": notebook, "status": "running"}
        self.record["started"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.note(config=config, ignored=list(ignored), seconds={})

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record |= json.loads(json.dumps(facts, default=_plain))
        write_text(self.folder / "run.json", json.dumps(self.record, indent=1) + "\n")

    def inputs(self, *, lm: LM | None = None, model: dict | None = None, **inputs: pd.DataFrame | str) -> pd.DataFrame:
        """Note a decoder, or facts about another model (name, dtype, …), and digests of tables and texts; shown."""
        facts = provenance(lm)
        facts["model"] = facts.get("model") or {"name": "–", "dtype": "–", **(model or {})}
        facts["device"] = facts["model"].pop("device", facts["device"])
        digests = {k: frame_sha256(v) if isinstance(v, pd.DataFrame) else digest(v) for k, v in inputs.items()}
        notebook = notebooks_dir() / f"{self.record['notebook']}.ipynb"
        cells = code_cells(notebook, parameters=False) if notebook.is_file() else []
        config = {k: v for k, v in self.record["config"].items() if k not in _NOT_IN_KEY}
        kind = lm.device.type if lm else ""
        self.key = digest([config, digests, str(facts["model"]), kind, code_sha256(), cells])
        self.note(provenance=facts, inputs=digests, key=self.key)
        shown = {**facts["model"], **{k: facts[k] for k in ("device", "commit", "python")}, **facts["packages"]}
        shown |= {f"sha256 of {name}": sha256[:12] for name, sha256 in digests.items()}
        shown |= {"set, not used here": ", ".join(self.record["ignored"])} if self.record["ignored"] else {}
        return pd.DataFrame({"value": {name: str(value) for name, value in shown.items()}})

    def _table(self, name: str, make: Callable[[], pd.DataFrame]) -> tuple[pd.DataFrame, float]:
        """A table from the folder, or made and stored there; and its seconds, or what ``make`` says in attrs."""
        if not self.key:
            raise RuntimeError("run.inputs(…) comes before the first table: it says what the tables depend on.")
        path = self.folder / f"{name}.parquet"
        with suppress(OSError, pa.ArrowInvalid):  # none yet, or broken
            stored = pq.read_table(path)
            if (facts := stored.schema.metadata or {}).get(b"key") == self.key.encode():
                return stored.to_pandas(), float(facts[b"seconds"])
        begin, frame = time.time(), make()
        seconds = round(frame.attrs.pop("seconds", time.time() - begin), 2)
        made, buffer = pa.Table.from_pandas(frame, preserve_index=False), pa.BufferOutputStream()
        facts = {**made.schema.metadata, b"key": self.key.encode(), b"seconds": str(seconds).encode()}
        pq.write_table(made.replace_schema_metadata(facts), buffer)
        write_text(path, buffer.getvalue().to_pybytes())
        return made.to_pandas(), seconds

    def frame(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table name.parquet of the folder, or ``make()``, stored there. The index isn't kept."""
        table, seconds = self._table(name, make)
        self.note(seconds={**self.record["seconds"], name: seconds})
        return table

    def pieces(self, name: str, jobs: Mapping[str, Callable[[], pd.DataFrame]]) -> pd.DataFrame:
        """The tables of all jobs, one below the other, as table ``name``; a killed run goes on with the next job."""
        folder = f"pieces-{slug(name)}"

        def whole() -> pd.DataFrame:
            named = {f"{folder}/{digest(job)[:16]}": make for job, make in jobs.items()}
            parts = [self._table(piece, make) for piece, make in data.bar(named.items(), desc=name)]
            table = pd.concat([part for part, _ in parts], ignore_index=True)
            table.attrs["seconds"] = sum(seconds for _, seconds in parts)
            return table

        table = self.frame(name, whole)
        shutil.rmtree(self.folder / folder, ignore_errors=True)
        return table

    def figure(self, figure: Figure, name: str) -> None:
        """Save a figure as figures/name.png and .pdf."""
        from biasprune import figures

        figures.save(figure, self.folder / "figures", name)
        self._drawn.add(name)

    def finish(self, sentence: str, *, verdicts: pd.DataFrame | None = None, **results: Any) -> list[str]:
        """Mark the run as done, with its result in a sentence; the names of its files.

        ``verdicts`` has ``VERDICT_COLUMNS``. Among ``results``, about tells runs of a notebook apart (by default the
        axis); tables and figures (name → caption) are shown in a report, if this run made them.
        """
        if verdicts is not None:
            data.need(verdicts.replace("", "(none)"), VERDICT_COLUMNS, "verdicts")  # a case may be empty
            self.frame("verdicts", lambda: verdicts[VERDICT_COLUMNS])
        seconds = self.record["seconds"]
        results = {"sentence": sentence, "about": self.record["config"].get("axis", ""), **results}
        for kind, made in (("tables", seconds), ("figures", self._drawn)):
            results[kind] = {name: caption for name, caption in results.get(kind, {}).items() if name in made}
        results["minutes"] = round(sum(seconds.values()) / 60, 1)
        spent = {"wall_seconds": round(time.time() - self._begin, 1), "peak_memory_mib": round(peak_memory_mib())}
        self.note(status="done", results=results, **spent)
        return sorted(p.name for p in self.folder.iterdir() if p.is_file() and not p.name.startswith("."))
