"""Every block of docs/howtos.md runs by itself in an empty folder, and does what its recipe says."""

from __future__ import annotations

import json
import re

import pytest
import transformers
import yaml

from biasprune.core.parameters import ROOT

TEXT = (ROOT / "docs" / "howtos.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


def run(title: str, tmp_path, monkeypatch) -> dict:
    """The names that a recipe's block leaves behind."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "howto"}
    exec(compile(BLOCKS[title], f"howtos.md: {title}", "exec"), names)
    return names


def test_one_block_per_recipe():
    assert list(BLOCKS) == re.findall(r"^## (.+)", TEXT, re.MULTILINE)
    assert len(BLOCKS) == 8 and TEXT.count("```python\n") == len(BLOCKS)


def test_own_model(tmp_path, monkeypatch):
    made = run("Your own model", tmp_path, monkeypatch)
    assert len(made["heads"]) == int(0.1 * 16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "my-pruned-model") is not None


def test_a_pruned_model_in_lm_eval(tmp_path, monkeypatch):
    """Two units of every layer are gone, and the task's files are what lm-eval reads (it isn't installed here)."""
    made = run("A pruned model in lm-eval", tmp_path, monkeypatch)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "my-pruned-model")
    assert small.config.intermediate_size == made["a"].n_units - 2
    card = (tmp_path / "my-pruned-model" / "README.md").read_text()
    assert f"| perplexity | {made['before']:.4g} | {made['after']:.4g} |" in card
    task = yaml.safe_load((tmp_path / "jobs.yaml").read_text())
    rows = [json.loads(line) for line in (tmp_path / task["dataset_kwargs"]["data_files"]["test"]).open()]
    assert {row[task["doc_to_target"]] for row in rows} == set(task["doc_to_choice"])


def test_own_prompts(tmp_path, monkeypatch):
    made = run("Your own prompts", tmp_path, monkeypatch)
    assert set(made["table"]["group"]) == {"left", "right"} and len(made["texts"]) == 24
    assert {"bias", "floor", "p"} <= set(made["detected"])


def test_own_judge(tmp_path, monkeypatch):
    made = run("Your own judge", tmp_path, monkeypatch)
    assert made["exclaims"](["Stop! It is rude.", "fine"]) == pytest.approx([0.5, 0.0])
    assert made["mine"].calls > 0 and len(made["effects"]) == 16


def test_own_audit_context(tmp_path, monkeypatch):
    made = run("Your own context for the name audit", tmp_path, monkeypatch)
    low, high = made["gap"].interval()
    assert low <= made["gap"].point <= high and 0 < made["covered"] <= 1


def test_a_new_measure(tmp_path, monkeypatch):
    """The planted how-to: differences of pairs, read from the model by hand, in under 40 lines of code."""
    made = run("A new measure", tmp_path, monkeypatch)
    import torch

    lm, row = made["lm"], made["table"].iloc[5]
    means = []
    for text in (row["more"], row["less"]):
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probs = lm.model(ids).logits[0, :-1].log_softmax(-1)
        means.append(float(log_probs.gather(1, ids[0, 1:, None]).mean()))
    assert made["readings"].values[0, 5] == pytest.approx(means[0] - means[1], abs=1e-5)
    code = BLOCKS["A new measure"].split("def sentence_log_prob")[1].split("jobs, habits")[0]
    assert len(code.strip().splitlines()) < 40


def test_your_own_sentence_pairs(tmp_path, monkeypatch):
    made = run("Your own sentence pairs", tmp_path, monkeypatch)
    assert len(made["measure"].items) == 18 and made["measure"].items["cluster"].nunique() == 6


def test_a_new_method(tmp_path, monkeypatch):
    made = run("A new method", tmp_path, monkeypatch)
    table = made["table"].set_index(["method", "judged_by"])
    assert set(table.index.get_level_values("method")) == {"", "entropy", "random"}
    assert (table.loc[["entropy", "random"], "parts"] == 3).all()
    assert made["lm"].model.config._attn_implementation == "sdpa", "the model leaves as it came"
    code = BLOCKS["A new method"].split("def by_attention_entropy")[1].split("\nlm = ")[0]
    assert len(code.strip().splitlines()) < 25
