"""Runs: tables are computed once, kept whole or not at all, and never taken from another run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_lm

import biasprune
from biasprune import lm as lm_module
from biasprune import record

CONFIG = {"model": "tiny", "gamma": 0.3, "seeds": [0, 1], "folder": Path("x")}


class Maker:
    """Makes a table and counts how often."""

    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> pd.DataFrame:
        self.calls += 1
        return pd.DataFrame({"head": [0, 1], "score": [self.value, 2.0]})


def stored_run(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_table_is_computed_once(tmp_path):
    make = Maker()
    run = record.Run(tmp_path, CONFIG)
    first = run.frame("scores", make)
    pd.testing.assert_frame_equal(run.frame("scores", make), first)
    again = record.Run(tmp_path, dict(reversed(CONFIG.items())))  # the same, in another order
    pd.testing.assert_frame_equal(again.frame("scores", make), first)
    assert make.calls == 1
    assert files(tmp_path) == {"run.json", "scores.parquet"}


def test_another_configuration_is_computed_anew(tmp_path):
    record.Run(tmp_path, CONFIG).frame("scores", Maker(1.0))
    make = Maker(7.0)
    changed = record.Run(tmp_path, {**CONFIG, "gamma": 0.4}).frame("scores", make)
    assert make.calls == 1 and changed["score"][0] == 7
    assert pd.read_parquet(tmp_path / "scores.parquet")["score"][0] == 7
    back = Maker(9.0)
    assert record.Run(tmp_path, CONFIG).frame("scores", back)["score"][0] == 9 and back.calls == 1


def test_other_code_is_computed_anew(tmp_path, monkeypatch):
    record.Run(tmp_path, CONFIG).frame("scores", Maker(1.0))
    monkeypatch.setattr(record, "code_sha256", lambda: "other")
    make = Maker(7.0)
    assert record.Run(tmp_path, CONFIG).frame("scores", make)["score"][0] == 7 and make.calls == 1


def test_code_digest_reads_the_source(tmp_path, monkeypatch):
    package = tmp_path / "biasprune"
    package.mkdir()
    digests = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (package / "record.py").write_text(text)
        monkeypatch.setattr(record, "__file__", str(package / "record.py"))
        digests.append(record.code_sha256.__wrapped__())
    assert digests[0] == digests[2] != digests[1]


def test_values_and_types_survive(tmp_path):
    frame = pd.DataFrame(
        {
            "int": np.array([1, -2, 3], dtype=np.int32),
            "single": np.array([0.1, np.nan, 1e-30], dtype=np.float32),
            "double": [0.1, np.inf, 1 / 3],
            "text": ["é\n", "", "naïve"],
            "flag": [True, False, True],
            "kind": pd.Categorical(["a", "b", "a"]),
            "when": pd.to_datetime(["2020-01-01", "2021-01-01", "2022-01-01"]),
            "heads": [[1, 2], [], [3]],
        }
    ).set_index(pd.Index([5, 6, 7]))
    fresh = record.Run(tmp_path, {}).frame("all", lambda: frame)
    loaded = record.Run(tmp_path, {}).frame("all", Maker())
    pd.testing.assert_frame_equal(loaded, fresh)
    scalars = frame.drop(columns="heads").reset_index(drop=True)
    pd.testing.assert_frame_equal(loaded.drop(columns="heads"), scalars)
    assert [list(h) for h in loaded["heads"]] == [[1, 2], [], [3]]


@pytest.mark.parametrize("metadata", [None, {b"key": b"another"}, {b"pandas": b"{}"}])
def test_a_table_of_another_hand_is_replaced(tmp_path, metadata):
    table = pa.table({"score": [5.0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "scores.parquet")
    make = Maker(7.0)
    assert record.Run(tmp_path, CONFIG).frame("scores", make)["score"][0] == 7 and make.calls == 1


def test_a_broken_table_is_replaced(tmp_path):
    """As a full disk or an interrupted copy leaves it."""
    record.Run(tmp_path, CONFIG).frame("scores", Maker(1.0))
    path = tmp_path / "scores.parquet"
    path.write_bytes(path.read_bytes()[:100])
    make = Maker(7.0)
    assert record.Run(tmp_path, CONFIG).frame("scores", make)["score"][0] == 7 and make.calls == 1


def test_run_json_from_start_to_end(tmp_path):
    run = record.Run(tmp_path / "a" / "b", CONFIG)
    known = stored_run(run.folder)
    assert known["status"] == "running"
    assert known["config"] == {"model": "tiny", "gamma": 0.3, "seeds": [0, 1], "folder": "x"}
    run.frame("scores", Maker())
    run.note(provenance={"device": "cpu"})
    known = stored_run(run.folder)
    assert known["status"] == "running" and known["provenance"] == {"device": "cpu"}
    assert known["seconds"]["scores"] >= 0
    run.finish(bias=0.25)
    known = stored_run(run.folder)
    assert known["status"] == "done" and known["results"] == {"bias": 0.25}
    assert known["wall_seconds"] >= 0 and known["peak_memory_mib"] > 10
    assert known["provenance"] == {"device": "cpu"} and known["config"]["gamma"] == 0.3


def test_seconds_are_those_of_the_computation(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 103.5, 1000.0, 1001.0, 1002.0])
    monkeypatch.setattr(record.time, "time", lambda: next(clock))
    record.Run(tmp_path, {}).frame("scores", Maker())
    assert stored_run(tmp_path)["seconds"] == {"scores": 3.5}
    record.Run(tmp_path, {}).frame("scores", Maker())
    assert stored_run(tmp_path)["seconds"] == {"scores": 3.5}, "a resumed run keeps the cost"


def test_an_exception_leaves_earlier_tables_and_no_scratch(tmp_path, monkeypatch):
    run, make = record.Run(tmp_path, CONFIG), Maker()
    run.frame("first", make)

    def fails() -> pd.DataFrame:
        raise RuntimeError("the judge died")

    with pytest.raises(RuntimeError, match="the judge died"):
        run.frame("second", fails)

    def half_written(table, path) -> None:
        Path(path).write_bytes(b"PAR1 and no more")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(record.pq, "write_table", half_written)
        with pytest.raises(OSError, match="No space left"):
            run.frame("second", Maker())
    assert files(tmp_path) == {"run.json", "first.parquet"}
    record.Run(tmp_path, CONFIG).frame("first", make)
    assert make.calls == 1


KILLED = """
import os, signal, sys
from pathlib import Path
import pandas as pd
from biasprune import record

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half_written_then_killed(table, path):
    Path(path).write_bytes(b"PAR1 and no more")
    kill()

run = record.Run(sys.argv[1], {"a": 1})
run.frame("first", lambda: pd.DataFrame({"x": [1, 2]}))
if sys.argv[2] == "writing":
    record.pq.write_table = half_written_then_killed
run.frame("second", kill if sys.argv[2] == "computing" else lambda: pd.DataFrame({"x": [3]}))
"""


def test_a_killed_run_resumes(tmp_path):
    started = {
        moment: subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / moment), moment],
            cwd=Path(biasprune.__file__).parents[1],
        )
        for moment in ("computing", "writing")
    }
    for moment, process in started.items():
        assert process.wait(60) == -signal.SIGKILL
        folder = tmp_path / moment
        assert stored_run(folder)["status"] == "running"
        assert {f for f in files(folder) if not f.startswith(".")} == {"run.json", "first.parquet"}
        first, second = Maker(), Maker(7.0)
        run = record.Run(folder, {"a": 1})
        assert run.frame("first", first)["x"].tolist() == [1, 2] and first.calls == 0
        assert run.frame("second", second)["score"][0] == 7 and second.calls == 1


def test_write_text_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    record.write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        record.write_text(path, "second \ud800")
    assert path.read_text() == "first" and files(path.parent) == {"a.txt"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "run"
    with pytest.raises(OSError, match="choose a writable output folder") as caught:
        record.Run(folder, CONFIG)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OSError, match="choose a writable output folder"):
        record.stored_arrays(folder / "a.npz", lambda: {"x": np.zeros(1)})


def test_arrays_are_made_once(tmp_path):
    calls = []

    def make() -> dict:
        calls.append(1)
        return {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "texts": np.array(["é", "b"])}

    path = tmp_path / "deep" / "arrays.npz"
    first, again = record.stored_arrays(path, make), record.stored_arrays(path, make)
    assert len(calls) == 1 and files(path.parent) == {"arrays.npz"}
    for name, value in make().items():
        assert np.array_equal(first[name], value) and np.array_equal(again[name], value)
        assert again[name].dtype == value.dtype
    calls.clear()
    record.stored_arrays(None, make)
    record.stored_arrays(None, make)
    assert len(calls) == 2


def test_failed_arrays_leave_nothing(tmp_path):
    def fails() -> dict:
        raise RuntimeError

    for make in (fails, lambda: {"x": iter(())}.items()):  # fails in making, fails in writing
        with pytest.raises((RuntimeError, TypeError)):
            record.stored_arrays(tmp_path / "a.npz", make)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-2-7b", "meta-llama--Llama-2-7b"),
        ("gpt2", "gpt2"),
        ("./models/my model", "models--my--model"),
        ("/abs/path/", "abs--path"),
        ("../..", "run"),
        ("", "run"),
        ("ä b", "b"),
    ],
)
def test_slug(name, expected):
    got = record.slug(name)
    assert got == expected
    assert "/" not in got and not got.startswith(".") and Path(got).name == got


def test_provenance(tmp_path, monkeypatch):
    source = random_lm("llama")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    loaded = lm_module.load(tmp_path / "model", dtype="bfloat16", device="cpu", attn_implementation="eager")
    known = json.loads(json.dumps(record.provenance(loaded)))
    assert known["commit"] == record.commit() and len(known["code_sha256"]) == 64
    assert known["packages"]["torch"].startswith("2.") and known["packages"]["numpy"] == np.__version__
    assert known["python"] == sys.version.split()[0] and "threads" in known["device"]
    model = known["model"]
    assert model["revision"].startswith("sha256:") and model["revision"] == loaded.revision
    assert (model["dtype"], model["attention"], model["class"]) == ("bfloat16", "eager", "LlamaForCausalLM")
    assert (model["layers"], model["heads"]) == (3, 4)
    assert model["parameters"] == sum(p.numel() for p in source.model.parameters())
    assert "model" not in record.provenance()


def git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == "unknown"
    (tmp_path / "biasprune").mkdir()
    (tmp_path / "biasprune" / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    sha = git(tmp_path, "rev-parse", "HEAD")
    assert record.commit() == sha
    (tmp_path / "elsewhere.txt").write_text("a note")
    assert record.commit() == sha
    (tmp_path / "biasprune" / "a.py").write_text("a = 2\n")
    assert record.commit() == f"{sha}+changes"
    monkeypatch.setenv("PATH", "")
    assert record.commit() == "unknown", "no git on this machine"


def test_frame_digest():
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert record.frame_sha256(frame) == record.frame_sha256(frame.set_index(pd.Index([4, 5])))
    assert record.frame_sha256(frame) != record.frame_sha256(frame[::-1])
    assert record.frame_sha256(frame) != record.frame_sha256(frame.rename(columns={"b": "c"}))


def test_digests_tell_data_apart():
    table = pd.DataFrame({"prompt": ["a", "b"]})
    one, other = record.digests({"p": table, "t": "prose"}), record.digests({"p": table[::-1], "t": "Prose"})
    assert one["p"] != other["p"] and one["t"] != other["t"]
    assert one == record.digests({"p": table.copy(), "t": "prose"}) and {len(v) for v in one.values()} == {64}
