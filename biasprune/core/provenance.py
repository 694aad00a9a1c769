"""What a result depends on besides its parameters: code, versions, machine, model; and what a call costs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasprune.core.parameters import ROOT

if TYPE_CHECKING:  # torch is imported where it is needed: the workflow and reports go without
    import torch

    from biasprune.core.model import LM

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas", "scipy", "seaborn", "papermill")
_earlier_peaks = {True: 0.0, False: 0.0}  # MiB on a GPU and resident, before ``measured`` set the count back


@cache
def code_sha256() -> str:
    """Digest of the package's source: results of other code are never taken for this code's."""
    package, sha256 = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        sha256.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return sha256.hexdigest()


def commit() -> str:
    """The repository's commit, with '+changes' when code, notebooks or data differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    with suppress(OSError):
        if git("rev-parse", "--show-toplevel") == str(ROOT):  # not one that merely contains the package
            changed = git("status", "--porcelain", "--", "biasprune", "notebooks", "data")
            return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    return "unknown"


def device_name(device: torch.device | str = "cpu") -> str:
    """Name of the accelerator, or of the processor with its number of threads."""
    torch = sys.modules.get("torch")  # not loaded for this alone: the overview needs none
    if torch and torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    known = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    threads = torch.get_num_threads() if torch else os.cpu_count()
    return f"{known[1] if known else platform.machine()}, {threads} threads"


def provenance(lm: LM | None = None) -> dict[str, Any]:
    """What a result depends on besides its parameters: code, versions, machine, model."""
    facts = {"commit": commit(), "code_sha256": code_sha256(), "python": platform.python_version()}
    facts |= {"packages": {name: metadata.version(name) for name in _PACKAGES}, "platform": platform.platform()}
    facts["device"] = device_name(lm.device if lm else "cpu")
    if lm:
        name = {"name": lm.name, "class": type(lm.model).__name__, "revision": lm.revision}
        how = {"dtype": str(lm.model.dtype).removeprefix("torch."), "attention": lm.model.config._attn_implementation}
        shape = {"layers": lm.anatomy.n_layers, "heads": lm.anatomy.n_heads}
        shape["parameters"] = sum(p.numel() for p in lm.model.parameters())
        facts["model"] = name | how | shape
    return facts


def _peak_mib(gpu: bool) -> float:
    if gpu:
        sys.modules["torch"].cuda.synchronize()
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_memory_mib() -> float:
    """Peak of this process' memory: a GPU's, if it was used, or resident."""
    torch = sys.modules.get("torch")
    gpu = bool(torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated())
    return max(_earlier_peaks[gpu], _peak_mib(gpu))


def measured(call: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[Any, float, float]:
    """Result of a call, its seconds, and its peak of memory above what was in use before, in MiB.

    On Linux, memory that earlier work has freed is given back first; elsewhere it hides a part of the peak.
    """
    import torch

    gpu = torch.device(device).type == "cuda"
    _earlier_peaks[gpu] = max(_earlier_peaks[gpu], _peak_mib(gpu))
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory is counted from here
    before, begin = _peak_mib(gpu), time.perf_counter()
    result = call()
    after = _peak_mib(gpu)  # waits for a GPU
    return result, time.perf_counter() - begin, after - before
