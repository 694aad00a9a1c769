"""python -m biasprune check: what it promises is what the operations do, and it needs no weights."""

import pandas as pd
import pytest
from conftest import random_lm

from biasprune import __main__, check
from biasprune.core import model


def saved(lm, folder):
    """A folder with configuration and tokenizer, without weights."""
    lm.model.config.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def answers(folder) -> pd.Series:
    return check.capabilities(folder).set_index("use")["answer"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_says_of_a_configuration_what_the_loaded_model_does(kind, tmp_path):
    lm = random_lm(kind)
    said, a = answers(saved(lm, tmp_path)), lm.anatomy
    assert f"{a.n_layers} layers × {a.n_heads} heads of {a.head_dim}" in said["heads"]
    assert said["neurons"] == f"{a.n_layers} layers × {a.n_units} MLP units"
    assert said["context"] == f"{lm.context} tokens"
    assert said["chat"].startswith("no: ") and "chat to False" in said["chat"]
    with pytest.raises(ValueError, match="could not be loaded"):
        model.load(str(tmp_path))  # there are no weights
    assert len(model.query_projections(lm)) == a.n_layers and not said["uniform ablation"].startswith("no")


def test_a_template_and_digits_are_found(tmp_path):
    lm = random_lm("llama")
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert answers(saved(lm, tmp_path))["chat"] == "by its template"


def test_command_prints_a_table_or_one_error(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["biasprune", "check", saved(random_lm("gpt2"), tmp_path)])
    __main__.main()
    assert capsys.readouterr().out.startswith("| use | answer |")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for name, why in ((str(tmp_path), "no decoder's configuration"), ("./nowhere", "No such model folder")):
        monkeypatch.setattr("sys.argv", ["biasprune", "check", name])
        with pytest.raises(SystemExit) as stopped:
            __main__.main()
        assert stopped.value.code == 1 and why in capsys.readouterr().err


def test_from_the_hub_weights_are_not_fetched(monkeypatch, tmp_path):
    saved(random_lm("gpt2"), commit := tmp_path / "snapshots" / "0123abcd")

    def download(name, revision, allow_patterns, ignore_patterns):
        assert not any("safetensors" in p for p in allow_patterns)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert not answers("somebody/model")["heads"].startswith("no")
