"""The repository agrees with itself: locks, notebooks, parameter files, README, runner."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from packaging.requirements import Requirement

from biasprune import __main__ as runner
from biasprune import batch, judge, lm, prompts
from biasprune.record import ROOT

PARAMS = sorted((ROOT / "notebooks" / "params").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_environment_agrees_with_the_locks():
    locked = {**pins("requirements.lock"), **pins("requirements-dev.lock")}
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    pinned = dict(p.split("==") for p in listed if "==" in p)
    wanted = {"jupyterlab", "papermill", "torch", "transformers", "seaborn", "pandas", "nbval", "jupytext"}
    assert wanted <= set(pinned)
    assert pinned == {name: locked[name] for name in pinned}


def test_locks_satisfy_the_ranges():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {**pins("requirements.lock"), **pins("requirements-dev.lock")}
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(locked[wanted.name.lower()]), line
    assert not set(pins("requirements.lock")) & set(pins("requirements-dev.lock"))


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_parameter_files_are_understood(path):
    values = batch.read_parameters(path.stem)
    known = set().union(*map(batch.parameters_of, NOTEBOOKS))
    assert set(values) <= known
    assert values.get("axis", "religion") in prompts.AXES
    local = {*lm.PACKAGED, *lm.small_models()}
    assert values["model"] in local or values["model"].count("/") == 1


def test_every_paper_and_packaged_model_has_a_parameter_file():
    models = {yaml.safe_load(p.read_text())["model"].split("/")[-1].lower() for p in PARAMS}
    paper = {"distilgpt2", "gpt2", "gpt-neo-125m", "gpt-neo-1.3b", "gpt-j-6b", "llama-2-7b-chat-hf"}
    paper.add("meta-llama-3-8b-instruct")
    assert paper | set(lm.PACKAGED) <= models


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_have_the_form(path):
    node = json.loads(path.read_text())
    cells = ["".join(c["source"]) for c in node["cells"]]
    assert cells[0].startswith("# ") and "Cost" in cells[0] and "Content warning" in cells[0]
    assert node["cells"][1]["metadata"]["tags"] == ["parameters"]
    for line in cells[1].splitlines():
        assert re.match(r"\w+: \w+ = .+  # .+", line) or re.match(r"temperature: ", line), line
    assert not any(c.get("outputs") for c in node["cells"]), "committed without outputs; see reports/"
    for cell in cells:
        for body in re.findall(r"^def .*?(?=^\S|\Z)", cell, re.MULTILINE | re.DOTALL):
            assert len(body.splitlines()) <= 10


def test_unknown_parameters_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "execute", lambda *args, **_: pytest.fail("must not start"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: planted\nn_promts: 3\n")
    with pytest.raises(SystemExit, match="no notebook knows the parameters n_promts"):
        runner.run([str(bad)], tmp_path, [])
    with pytest.raises(SystemExit, match="No parameter file 'nowhere'. Known: .*smollm2"):
        runner.run(["nowhere"], tmp_path, [])
    with pytest.raises(SystemExit, match="No such notebook: 99.*01_fasp_heads"):
        runner.run(["smollm2"], tmp_path, ["99"])


def test_runner_writes_report_and_leaves_no_paths(tmp_path):
    """The whole way by papermill, on a model with grouped queries and our own prompts."""
    values = {
        **yaml.safe_load((ROOT / "notebooks" / "params" / "tiny-llama.yaml").read_text()),
        **{"n_valid": 40, "n_test": 40, "test_seeds": [0], "alphas": [0.0, 0.13], "gammas": [0.3, 0.5]},
        **{"n_boot": 200, "score_tokens": 512, "test_tokens": 512, "rule": "as_published"},
    }
    given = tmp_path / "small.yaml"
    given.write_text(yaml.safe_dump(values))
    assert runner.run([str(given)], tmp_path / "out", ["01_fasp_heads", "00_overview"]) == 0
    folder = tmp_path / "out" / "small" / "01_fasp_heads"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["status"] == "done" and facts["config"]["model"] == "tiny-llama"
    assert facts["provenance"]["model"]["revision"].startswith("sha256:")
    assert len(pd.read_parquet(folder / "head_scores.parquet")) == 16
    assert {p.stem for p in (folder / "figures").glob("*.png")} >= {"change_against_alpha", "head_map"}
    assert "small/01_fasp_heads/figures" in (tmp_path / "out" / "README.md").read_text()
    report = (tmp_path / "out" / "README.md").read_text()
    assert "noise floor that shuffled group labels give:" in report and "nan" not in report
    executed = json.loads(folder.with_suffix(".ipynb").read_text())
    assert "input_path" not in executed["metadata"]["papermill"]
    assert str(tmp_path) not in folder.with_suffix(".ipynb").read_text()
    assert 'out = \\"out/small/01_fasp_heads' in folder.with_suffix(".ipynb").read_text()
    overview = (tmp_path / "out" / "all" / "00_overview.ipynb").read_text()
    assert 'reports = \\"out\\"' in overview and str(tmp_path) not in overview
    claims = pd.read_csv(tmp_path / "out" / "claims.csv")
    # of the papers' claims a small model of ours says nothing
    assert set(claims["verdict"]) == {"not run here"} and "[claims.csv](claims.csv)" in report
    assert report.index("## 00_overview") < report.index("## 01_fasp_heads")
    errors = [o for c in executed["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not errors


def test_a_stopped_run_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "biasprune", "run", "--params", "tiny-llama", "--out", str(tmp_path)]
    run = subprocess.Popen([*command, "--notebook", "01_fasp_heads"], cwd=ROOT, stderr=subprocess.DEVNULL)
    began, started = time.monotonic(), []
    while len(started) < 2 and time.monotonic() - began < 60:  # papermill, and the kernel
        time.sleep(0.2)
        started = psutil.Process(run.pid).children(recursive=True)
    assert len(started) >= 2
    run.terminate()
    assert run.wait(20) == 143
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


def test_a_failing_notebook_is_kept_and_counted(tmp_path):
    given = tmp_path / "broken.yaml"
    given.write_text("model: tiny-llama\naxis: no_such_axis\nprompts_source: biasprune\n")
    assert runner.run([str(given)], tmp_path, ["01_fasp_heads"]) == 1
    text = (tmp_path / "broken" / "01_fasp_heads.ipynb").read_text()
    assert "Unknown axis" in text and "gender_and_sex" in text


def test_readme_shows_what_the_reports_say(tmp_path):
    """The block in the README, and all that the report writes."""
    paths = [ROOT / "README.md", *(ROOT / "reports" / n for n in ("README.md", "claims.csv", "speed.csv"))]
    before = {p: p.read_text() for p in paths}
    assert "<!-- results -->" in before[ROOT / "README.md"]
    try:
        runner.report(ROOT / "reports")
        for path, text in before.items():
            assert path.read_text() == text, f"{path.name}; run: python -m biasprune report"
    finally:
        for path, text in before.items():
            path.write_text(text)


def test_the_report_without_a_ledger(tmp_path, capsys, monkeypatch):
    """Claims that don't fit the records: said, and counted; records without a model, and the order."""
    for name in ["a/01_fasp_heads", "z/00_overview"]:
        (tmp_path / name).mkdir(parents=True)
        facts = {
            "notebook": name[2:],
            "status": "done",
            "peak_memory_mib": 1,
            "config": {"axis": "gender_and_sex"},
        }
        facts["results"] = {"sentence": f"{name}.", "minutes": 1, "tables": {}, "figures": {}}
        facts["provenance"] = {"device": "", "commit": "", "model": {"name": "m", "dtype": "d"}}
        if "00" in name:
            del facts["provenance"]["model"]
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
    assert runner.report(tmp_path) == 1
    said, text = capsys.readouterr().err, (tmp_path / "README.md").read_text()
    assert "No ledger of claims" in said and "Claim F1, run a/01_fasp_heads: there is no table" in said
    assert "There is no ledger of claims for these runs" in text and "a/01_fasp_heads." in text
    assert text.index("## 00_overview: –, z") < text.index("## 01_fasp_heads: m, a")
    assert not (tmp_path / "claims.csv").exists()
    monkeypatch.setattr(runner.ledger, "write", lambda out: made)
    made = pd.DataFrame({"paper": ["P", "P", "Q"], "verdict": ["undecided", "reproduced", "not run here"]})
    made["id"] = ["1", "1", "2"]
    made = made.assign(claim="c", published="p", what="w", parameters="", case=["", "x", ""], high=2.0)
    made = made.assign(ours=[0.5, np.nan, 0.123456], low=[np.nan, 1.0, 0.1])
    assert runner.report(tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| P | 1 | 1 | 0 | 0 | 1 | 0 |\n| Q | 1 | 0 | 0 | 0 | 0 | 1 |" in text
    rows = runner._claims(made.assign(claim="|c|")).splitlines()
    assert rows[0] == "| claim | published | here | in |"
    assert rows[2] == "| 1: \\|c\\| | p | **undecided** 0.5<br>**reproduced**, x | w |"
    assert rows[3] == "| 2: \\|c\\| | p | **not run here** 0.123 (0.1 to 2) |  |"


def test_no_download_and_no_torch_setting_at_import():
    code = "import torch; n = torch.get_num_threads(); import biasprune.headscores, biasprune.experiment; "
    code += "import socket; assert torch.get_num_threads() == n"
    environment = {"PATH": "", "BIASPRUNE_CACHE": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_modules_load_at_first_use():
    code = "import sys, biasprune; assert 'torch' not in sys.modules; "
    code += "print(biasprune.select.fasp([3, 1, 2], [1, 1, 1], gamma=0, alpha=0.4)); "
    code += "assert 'torch' not in sys.modules; print(len(biasprune.prompts.AXES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[1]", "5"], done.stderr


def test_judges_of_the_parameter_files_are_known_or_hub_ids():
    for path in PARAMS:
        name = yaml.safe_load(path.read_text()).get("judge_name", "toxicity")
        assert name in {"toxicity", "sentiment"} or name.count("/") == 1
    assert judge.load("sentiment")(["This is awful and horrible."])[0] > 0.5


def test_reports_name_no_path_of_a_machine():
    for path in sorted((ROOT / "reports").rglob("*")):
        if path.suffix in {".ipynb", ".json", ".md", ".csv"}:
            assert not re.search(r'[" ](/[a-z]\w*){2,}', path.read_text()), path
