"""The RO-Crate of a made-up reports folder: written, read again, every file there with its digest."""

from __future__ import annotations

import hashlib
import json
import sys
from urllib.parse import unquote

import pandas as pd
import pytest

from biasprune import __main__ as command
from biasprune import crate, ledger
from biasprune.record import ROOT

rocrate = pytest.importorskip("rocrate.rocrate")
KEPT = [
    "tiny/01_fasp_heads/run.json",
    "tiny/01_fasp_heads/verdicts.parquet",
    "tiny/01_fasp_heads/figures/map.pdf",
    "tiny/01_fasp_heads/figures/map.png",
    "tiny/01_fasp_heads.ipynb",
]


@pytest.fixture
def reports(tmp_path):
    """Two finished runs on one commit, one unfinished, raw texts, and a table of all runs."""
    for name, notebook, status in [("tiny", "01_fasp_heads", "done"), ("my own", "01_fasp_heads", "done")]:
        folder = tmp_path / "reports" / name / notebook
        (folder / "figures").mkdir(parents=True)
        facts = {"notebook": notebook, "status": status, "started": "2026-01-02T03:04:05+00:00"}
        facts |= {"wall_seconds": 60.5, "config": {"axis": "religion", "alphas": [0.0, 0.1]}}
        facts |= {"results": {"sentence": "It was so.", "minutes": 1.0}, "data": {"test prompts": "ab12"}}
        source = {"commit": "c0ffee", "device": "a processor", "packages": {"torch": "2"}}
        model = {"name": "org/tiny", "revision": "sha256:1"}
        (folder / "run.json").write_text(json.dumps({**facts, "provenance": {**source, "model": model}}))
        pd.DataFrame({"a": [1]}).to_parquet(folder / "verdicts.parquet")
        pd.DataFrame({"text": ["raw"]}).to_parquet(folder / "test_texts.parquet")
        (folder / "figures" / "map.png").write_bytes(b"png")
        (folder / "figures" / "map.pdf").write_bytes(b"pdf")
        folder.with_suffix(".ipynb").write_text("{}")
    (tmp_path / "reports" / "tiny" / "02_neuron_pruning").mkdir()
    (tmp_path / "reports" / "tiny" / "02_neuron_pruning" / "run.json").write_text('{"status": "running"}')
    (tmp_path / "reports" / "claims.csv").write_text("id\n")
    return tmp_path / "reports"


@pytest.mark.parametrize("name", ["crate", "crate.zip"])
def test_written_and_read_again(reports, tmp_path, name):
    target = crate.write(reports, tmp_path / "made" / name)
    assert target.exists()
    read = rocrate.ROCrate(target)
    files = {unquote(e.id): e for e in read.data_entities if e.type == "File"}
    own = [k.replace("tiny/", "my own/") for k in KEPT]
    assert set(files) == {*KEPT, *own, "claims.csv"}, "no raw texts, nothing of an unfinished run"
    for path, entity in files.items():
        content = (read.source / path if name == "crate" else reports / path).read_bytes()
        assert entity["sha256"] == hashlib.sha256(content).hexdigest() and entity["contentSize"] == str(
            len(content)
        )
        assert entity["encodingFormat"] != "application/octet-stream"
    root = read.root_dataset
    assert root["conformsTo"].id == crate.PROFILE and root["license"].id == "https://spdx.org/licenses/MIT"
    assert [a["name"] for a in root["author"]] == ["biasprune contributors"]
    cited = [e.id for e in root["citation"]]
    assert cited == [f"https://arxiv.org/abs/{n}" for n in ("2312.15398", "2502.07771", "2408.00612")]
    assert "Content warning" in root["description"]


def test_what_a_run_says(reports, tmp_path):
    read = rocrate.ROCrate(crate.write(reports, tmp_path / "made"))
    actions = {e["name"]: e for e in read.root_dataset["mentions"]}
    action = actions["01_fasp_heads with tiny: org/tiny"]
    assert len(actions) == 2 and action.type == "CreateAction"
    assert (action["startTime"], action["endTime"]) == (
        "2026-01-02T03:04:05+00:00",
        "2026-01-02T03:05:05.500000+00:00",
    )
    # "tiny" is no parameter file, so the command has the values themselves
    assert action["description"].startswith("papermill notebooks/01_fasp_heads.ipynb")
    assert "axis: religion" in action["description"]
    tool = action["instrument"]
    assert (tool["name"], tool["softwareVersion"]) == ("notebooks/01_fasp_heads.ipynb", "c0ffee")
    assert (ROOT / tool["name"]).is_file()
    given = {e["name"]: e.get("value") for e in action["object"] if e.type == "PropertyValue"}
    assert given["axis"] == "religion" and json.loads(given["alphas"]) == [0.0, 0.1]
    assert (given["device"], given["data: test prompts"]) == ("a processor", "ab12")
    assert json.loads(given["packages"]) == {"torch": "2"}
    (model,) = [e for e in action["object"] if e.type == "CreativeWork"]
    assert (model["name"], model["version"]) == ("org/tiny", "sha256:1")
    assert {unquote(e.id) for e in action["result"]} == set(KEPT)
    # both runs share tool and model, and nothing else that went in
    other = actions["01_fasp_heads with my own: org/tiny"]
    shared = {e.id for e in other["object"]} & {e.id for e in action["object"]}
    assert shared == {model.id} and other["instrument"].id == tool.id
    graph = json.loads((tmp_path / "made" / "ro-crate-metadata.json").read_text())["@graph"]
    assert len({e["@id"] for e in graph}) == len(graph) and str(tmp_path) not in json.dumps(graph)


def test_bad_input(reports, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="isn't empty"):
        crate.write(reports, tmp_path / "full")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no finished run"):
        crate.write(tmp_path / "none", tmp_path / "made")
    with pytest.raises(ledger.LedgerError, match="is no folder"):
        crate.write(tmp_path / "nowhere", tmp_path / "made")
    monkeypatch.setitem(sys.modules, "rocrate.rocrate", None)
    with pytest.raises(ImportError, match="pip install rocrate"):
        crate.write(reports, tmp_path / "made")


def test_the_command(reports, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    target = tmp_path / "made" / "runs.zip"
    monkeypatch.setattr(sys, "argv", ["biasprune", "crate", "--out", str(reports), "--target", str(target)])
    command.main()
    assert len(rocrate.ROCrate(target).root_dataset["mentions"]) == 2
    assert capsys.readouterr().out.strip() == str(target)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], str(tmp_path / "nowhere"), *sys.argv[4:]])
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        command.main()
    monkeypatch.setattr(sys, "argv", sys.argv[:2])
    with pytest.raises(SystemExit):
        command.main()
    assert "--target" in capsys.readouterr().err


def test_the_committed_reports(tmp_path):
    read = rocrate.ROCrate(crate.write(ROOT / "reports", tmp_path / "made"))
    done = ledger.runs(ROOT / "reports")
    assert len(read.root_dataset["mentions"]) == len(done)
    assert all((tmp_path / "made" / unquote(e.id)).is_file() for e in read.data_entities if e.type == "File")
