"""Every block of docs/howtos.md runs by itself in an empty folder, and does what its recipe says."""

from __future__ import annotations

import re

import pytest
import transformers

from biasprune.record import ROOT

TEXT = (ROOT / "docs" / "howtos.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_one_block_per_recipe():
    assert [title for title, _ in BLOCKS] == re.findall(r"^## (.+)", TEXT, re.MULTILINE)
    assert len(BLOCKS) == 5 and TEXT.count("```") == 2 * len(BLOCKS)


def run(title: str, tmp_path, monkeypatch) -> dict:
    """The names that a recipe's block leaves behind."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "howto"}
    exec(compile(dict(BLOCKS)[title], f"howtos.md: {title}", "exec"), names)
    return names


def test_own_model(tmp_path, monkeypatch):
    made = run("Your own model", tmp_path, monkeypatch)
    assert len(made["heads"]) == int(0.1 * 16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "my-pruned-model") is not None


def test_own_prompts(tmp_path, monkeypatch, capsys):
    made = run("Your own prompts", tmp_path, monkeypatch)
    assert set(made["some"]["bucket"]) == {"left", "right"} and len(made["texts"]) == 24
    assert {"bias", "floor", "p"} <= set(made["found"]) and "floor" in capsys.readouterr().out


def test_own_judge(tmp_path, monkeypatch, capsys):
    made = run("Your own judge", tmp_path, monkeypatch)
    assert made["exclaims"](["Stop! It is rude.", "fine"]) == pytest.approx([0.5, 0.0])
    assert made["mine"].calls > 0 and len(made["scores"]) == 16
    assert "exclaims" in capsys.readouterr().out


def test_own_audit_context(tmp_path, monkeypatch):
    made = run("Your own context for the name audit", tmp_path, monkeypatch)
    row = made["found"].iloc[0]
    assert (row["context"], row["variation"]) == ("kitchen", "kettle")
    assert row["low"] <= row["smd"] <= row["high"] and row["unparsable"] < 0.9


def test_new_method(tmp_path, monkeypatch):
    made = run("A new pruning method", tmp_path, monkeypatch)
    table = made["table"][made["table"]["alpha"] > 0].set_index("method")
    assert {"mine", "FASP", "random"} <= set(table.index) and (table["pruned"] == 1).all()
    # the one head that carries the planted bias is found, and random heads aren't it
    assert table.loc["mine", "change"] < -50 and table.loc["mine", "change_high"] < 0
    assert table.loc["mine", "change"] < table.loc["random", "change"]
