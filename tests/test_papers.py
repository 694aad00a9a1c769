"""Published scores: figures computed and not typed, simulations with a known answer. Claims: a made-up folder."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import papermill
import pytest
import yaml

from biasprune.core import data, parameters
from biasprune.measures import reliability
from biasprune.papers import claims
from biasprune.papers import published as pub

# ---- published scores --------------------------------------------------------------------------------


@pytest.fixture
def tables(published, monkeypatch) -> dict[str, pd.DataFrame]:
    monkeypatch.setenv("BIASPRUNE_PUBLISHED", str(published))
    return {model.split("/")[-1]: table for model, table in pub.scores().items()}


def test_seeds_agree_as_worked_out_independently(tables):
    """To two decimals, from the same files."""
    agree = {m: pub.seeds(t) for m, t in tables.items()}
    expected = {"gpt2": 0.22, "distilgpt2": 0.16, "gpt-neo-125M": 0.44, "gpt-neo-1.3B": 0.01}
    assert {m: round(a["r"], 2) for m, a in agree.items()} == {**expected, "Llama-2-7b-chat-hf": 0.01}
    for a in agree.values():
        assert a["mean_r"] == pytest.approx(reliability.spearman_brown(a["r"], 3)) and a["seeds"] == 3
        assert a["overlap_low"] <= a["overlap"] <= a["overlap_high"]
    for m in ("gpt2", "gpt-neo-1.3B", "Llama-2-7b-chat-hf"):
        assert agree[m]["overlap"] == pytest.approx(agree[m]["chance"], abs=0.06)


def test_the_published_winners_curse(tables):
    curse = pub.winners_curse(tables["gpt2"]).set_index("split")[["picked", "candidates"]]
    assert curse.loc["valid"].tolist() == pytest.approx([0.389, 0.410], abs=1e-3)
    assert curse.loc["test"].tolist() == pytest.approx([0.383, 0.386], abs=1e-3)
    with_test_scores = {m for m, t in tables.items() if len(pub.winners_curse(t))}
    assert with_test_scores == {"gpt2", "distilgpt2"}, "the others have no, or few, test scores"


def test_the_published_regimes(tables):
    two = pub.regimes(tables["gpt-neo-1.3B"])
    assert (round(two["toxicity_low"], 2), round(two["toxicity_high"], 2)) == (0.14, 0.52)
    assert round(two["r_bias"], 2) == -0.98 and two["explained"] > 0.99
    assert two["ppl_low"] == pytest.approx(two["ppl_high"], rel=0.01)
    assert pub.regimes(tables["gpt2"])["explained"] < 0.9


def test_the_published_religion_bias_is_at_its_floor(tables):
    religion = [8437, 174]  # prompts of the two groups
    with_religion = [t for t in tables.values() if (t["axis"] == "religion").any()]
    assert len(with_religion) >= 3
    for table in with_religion:
        floors = pub.noise_floors(table, "religion", religion)
        assert (floors["bias"] <= floors["floor_95"]).all()
    gender = [4076, 2219, 1941, 644, 638, 343, 282, 25]
    kinds = pub.noise_floors(tables["gpt-neo-1.3B"], "gender_and_sex", gender)["kind"]
    assert kinds.tolist() == ["low toxicity", "high toxicity"]
    with pytest.raises(ValueError, match="published scores of religion: the table has no rows"):
        pub.noise_floors(tables["gpt-neo-1.3B"], "religion", religion)


def test_the_published_effect_on_llama3(tables):
    heads = pub.llama3_heads().set_index("pruned")
    assert heads.loc["nothing", "mean_smd"] == pytest.approx(0.557, abs=1e-3)
    assert heads["mean_smd"].iloc[1:].round(3).tolist() == [0.158, 0.114, 0.263]
    assert (heads["low"] < heads["mean_smd"]).all() and (heads["mean_smd"] < heads["high"]).all()


def frame(bias: np.ndarray, toxicity: np.ndarray, split: str = "valid") -> pd.DataFrame:
    """(seeds, heads) as the published tables have it."""
    n_seeds, n_heads = bias.shape
    table = pd.DataFrame({"seed": np.repeat(range(n_seeds), n_heads), "head": [*range(n_heads)] * n_seeds})
    table = table.assign(axis="gender_and_sex", split=split, bias=bias.ravel(), toxicity=toxicity.ravel())
    return table.assign(ppl=30.0, toxic_percent=8.0)


def test_axes_and_spill_of_the_published_scores(tables):
    """Worked out independently: all six pairs positive on three models, -.18 to .30 on GPT-Neo 1.3B."""
    means = {model.split("/")[-1]: table for model, table in pub.means().items()}
    assert set(means) == {"distilgpt2", "gpt2", "gpt-neo-125M", "gpt-neo-1.3B"}
    for name in ("distilgpt2", "gpt2", "gpt-neo-125M"):
        pairs, free = pub.axes(tables[name]), pub.axes(tables[name], critical=0.3)
        assert len(pairs) == 6 and pairs["r"].between(0.54, 0.72).all() and (pairs["low"] > 0).all()
        assert pairs["disattenuated"].between(0.87, 1.05).all() and free["r"].max() < pairs["r"].min()
        own = tables[name].groupby(["axis", "head"])["bias"].mean().unstack("axis")
        assert own["gender_and_sex"].corr(means[name].query("axis == 'gender_and_sex'").set_index("head")["bias"]) > 0.9
    pairs = pub.axes(means["gpt-neo-1.3B"])
    assert pairs["r"].min() == pytest.approx(-0.18, abs=0.01) and pairs["r"].max() == pytest.approx(0.30, abs=0.01)
    assert pairs["disattenuated"].isna().all(), "one mean can't be held against another seed"


def simulated_axes(shared: float, seed: int = 0) -> pd.DataFrame:
    """Scores of 200 heads on two axes, three seeds; the effects share this much, each seed adds noise."""
    rng, rows = np.random.default_rng(seed), []
    common, ppl = rng.normal(size=200), rng.uniform(20, 40, size=200)
    for axis in ("gender_and_sex", "race_ethnicity"):
        effect = np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal(size=200)
        for k in range(3):
            one = {"axis": axis, "split": "valid", "seed": k, "head": range(200), "ppl": ppl}
            rows.append(pd.DataFrame({**one, "bias": effect + rng.normal(size=200)}))
    return pd.concat(rows, ignore_index=True)


def test_axes_finds_a_planted_correlation_and_spill_what_it_does():
    related, alone = (simulated_axes(shared) for shared in (0.8, 0.0))
    found, none = pub.axes(related).iloc[0], pub.axes(alone).iloc[0]
    assert found["r"] == pytest.approx(0.4, abs=0.1) and found["disattenuated"] == pytest.approx(0.8, abs=0.15)
    assert found["low"] > 0.2 and none["low"] < 0 < none["high"]
    (_, lower), (_, nothing) = (pub.spill(t).set_index("axis").iterrows() for t in (related, alone))
    assert lower[1]["low"] > 0 and lower[1]["lower"] < lower[1]["own"] and nothing[1]["low"] < 0 < nothing[1]["high"]


def test_winners_curse_of_pure_noise():
    rng = np.random.default_rng(0)
    parts = [frame(rng.normal(1, 0.1, (3, 400)), np.zeros((3, 400)), split=s) for s in ("valid", "test")]
    curse = pub.winners_curse(pd.concat(parts)).set_index("split")
    assert curse["difference"]["valid"] < -0.05 and abs(curse["difference"]["test"]) < 0.02
    assert curse["low"]["test"] < 0.2 and curse["high"]["test"] < 0.6


def test_regimes_of_two_points_and_of_none():
    rng = np.random.default_rng(0)
    side = rng.random((3, 200)) < 0.4
    two = pub.regimes(frame(1 - 0.5 * side, 0.1 + 0.4 * side + rng.normal(0, 0.01, side.shape)))
    assert two["explained"] > 0.99 and two["r_bias"] == pytest.approx(-1) and two["runs"] == 600
    assert two["share_high"] == pytest.approx(side.mean())
    one = pub.regimes(frame(rng.normal(size=(3, 400)), rng.normal(0.3, 0.05, (3, 400))))
    assert one["explained"] == pytest.approx(2 / np.pi, abs=0.05) and abs(one["r_bias"]) < 0.1


def test_the_noise_floor_falls_with_the_root_of_the_prompts():
    table = frame(np.full((1, 200), 0.2), np.random.default_rng(0).normal(0.1, 0.01, (1, 200)))
    few, many = (pub.noise_floors(table, "gender_and_sex", [n] * 3).iloc[0] for n in (50, 5000))
    assert few["floor"] / many["floor"] == pytest.approx(10, rel=0.2)
    assert few["floor"] < few["floor_95"] and few["bias"] == pytest.approx(0.2)
    assert (few["groups"], few["prompts"]) == (3, 150)


def test_without_the_authors_files(tmp_path, monkeypatch):
    monkeypatch.delenv("BIASPRUNE_PUBLISHED", raising=False)
    assert pub.scores() == {} and pub.llama3_heads().empty
    with pytest.raises(data.FetchError, match="No such folder"):
        pub.scores(str(tmp_path / "none"))
    (tmp_path / "head_scores_gpt2.csv").write_text("Group,Bias\n")
    with pytest.raises(data.FetchError, match="head_scores_gpt2.csv isn't the paper's file"):
        pub.scores(str(tmp_path))


def test_published_scores_need_no_torch():
    code = "import sys; from biasprune.papers import published; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- claims ------------------------------------------------------------------------------------------

KNOWN = pd.DataFrame(
    [
        {"id": "A", "paper": "P", "claim": "it is so", "params": "big", "not_run": "needs a GPU"},
        {"id": "A gpt2", "paper": "P", "claim": "of GPT-2, too", "params": "gpt2", "only_model": "gpt2"},
        {"id": "P1", "paper": "P", "claim": "of the files", "only_model": "published scores"},
        {"id": "Z", "paper": "biasprune", "claim": "ours"},
    ],
    columns=["id", "paper", "claim", "published", "what", "notebook", "params", "only_model", "not_run"],
).fillna({"published": "19 %", "what": "change in %", "notebook": "05_x"})


def verdict(id: str, verdict: str = "reproduced", **fields) -> dict:
    """A row of a notebook's table verdicts."""
    row = {"id": id, "case": "", "claim": "in the notebook's words", "ours": 0.5, "low": 0.2, "high": 0.8}
    return {**row, "what": "", "verdict": verdict, "why": "clear", **fields}


@pytest.fixture
def add_run(tmp_path, monkeypatch):
    """Makes runs' folders as ``Run`` leaves them, below tmp_path; claims are KNOWN's."""
    monkeypatch.setattr(claims, "known", lambda: KNOWN.fillna(""))
    monkeypatch.setattr(claims, "command", lambda *given: " ".join(map(str, given)))

    def add(name: str, *rows: dict, model: str = "org/Tiny-1", notebook: str = "05_x", **facts) -> None:
        folder = tmp_path / name / notebook
        folder.mkdir(parents=True)
        source = {"commit": "0123456789abcdef+changes", "model": {"name": model}}
        record = {"form": 2, "status": "done", "notebook": notebook, "config": {}, "provenance": source}
        record |= {"results": {"minutes": 1.5, "about": "gender"}, **facts}
        (folder / "run.json").write_text(json.dumps(record))
        if rows:
            pd.DataFrame(rows).to_parquet(folder / "verdicts.parquet")

    return add


def test_verdicts_of_a_made_up_folder(tmp_path, add_run):
    add_run("one", verdict("A", case="a"), verdict("A", "too uncertain", case="b", what="share"), verdict(""))
    add_run("two", verdict("A", "not reproduced", ours=np.nan, low=np.nan, high=np.nan), model="Other")
    add_run("three", verdict("Z"), status="running")
    add_run("four", verdict("Z"), form=1)
    add_run("all", notebook="00_overview")
    table = claims.build(tmp_path)
    assert list(table) == claims.COLUMNS
    rows = table[["id", "case", "ours", "low", "high", "what", "verdict", "model", "parameters"]]
    rows = rows.astype(object).where(rows.notna(), None).to_numpy().tolist()
    assert rows[:3] == [
        ["A", "a", 0.5, 0.2, 0.8, "change in %", "reproduced", "org/Tiny-1", "one"],
        ["A", "b", 0.5, 0.2, 0.8, "share", "too uncertain", "org/Tiny-1", "one"],
        ["A", "", None, None, None, "change in %", "not reproduced", "Other", "two"],
    ]
    assert [row[0] for row in rows[3:]] == ["A gpt2", "P1", "Z"], "one row for each claim without a run"
    assert pd.read_csv(io.StringIO(claims.write(tmp_path).to_csv()))["id"].tolist() == table["id"].tolist()
    first, absent = table.iloc[0], table.iloc[3]
    assert (first["claim"], first["published"], first["about"]) == ("it is so", "19 %", "gender")
    assert (first["commit"], first["minutes"]) == ("0123456789+changes", 1.5)
    assert (first["command"], absent["command"]) == ("05_x one {}", "05_x gpt2")
    assert (absent["verdict"], absent["model"]) == ("not run here", "gpt2")
    assert absent[["ours", "low", "high", "minutes"]].isna().all()


def test_claims_on_one_model_and_on_the_published_scores(tmp_path, add_run):
    """Our small models say nothing about the papers, but may read published scores."""
    add_run("a", verdict("A"), model="openai-community/gpt2")
    add_run("b", verdict("A"), verdict("P1"), verdict("Z"), model="tiny-gpt2")
    table = claims.build(tmp_path).set_index("id")
    assert table["parameters"].to_dict() == {"A": "", "A gpt2": "a", "P1": "b", "Z": "b"}
    assert table["model"].to_dict()["P1"] == "published scores"
    assert table.loc["A", "why"] == "needs a GPU"
    add_run("c", verdict("P1"), model="Other")  # the same published scores, read again
    add_run("d", verdict("P1", ours=0.7), model="Other")  # others
    table = claims.build(tmp_path)
    assert table.loc[table["id"] == "P1", "parameters"].tolist() == ["b", "d"]


def test_a_run_that_was_not_asked_is_no_gap(tmp_path, add_run):
    add_run("one", verdict("A", "not run here", why="no random parts"))
    assert claims.build(tmp_path).iloc[0]["why"] == "no random parts"
    add_run("two", verdict("A"))
    table = claims.build(tmp_path)
    assert table.loc[table["id"] == "A", "parameters"].tolist() == ["two"]


def test_what_does_not_fit_is_named(tmp_path, add_run):
    add_run("one", verdict("A9"))
    with pytest.raises(ValueError, match="one/05_x, table verdicts: unknown id A9"):
        claims.build(tmp_path)
    add_run("one", verdict("A", "holds"), notebook="04_w")
    with pytest.raises(ValueError, match="one/04_w, table verdicts: unknown verdict holds"):
        claims.build(tmp_path)
    with pytest.raises(ValueError, match="no folder of run records"):
        claims.build(tmp_path / "none")


def test_the_command_of_a_run_makes_it_again():
    """By its parameter file, and by what differs from it or from the notebook's defaults."""
    file = yaml.safe_load((parameters.notebooks_dir() / "params" / "gpt2.yaml").read_text())
    used = {"model": file["model"], "gammas": file["gammas"], "inputs": {"prompts": "0f"}}
    plain = "papermill notebooks/01_fasp_heads.ipynb 01_fasp_heads.ipynb -f notebooks/params/gpt2.yaml"
    assert claims.command("01_fasp_heads", "gpt2") == plain
    assert claims.command("01_fasp_heads", "gpt2", used) == plain
    words = shlex.split(claims.command("01_fasp_heads", "gpt2", used | {"gammas": [3e-05]}))
    assert words[:5] == plain.split() and yaml.safe_load(words[6]) == {"gammas": [3e-05]}
    words = shlex.split(claims.command("01_fasp_heads", "none such", {"model": "it's"}))
    assert words[3] == "-y" and yaml.safe_load(words[4]) == {"model": "it's"}


def test_verdicts_in_words_have_an_item_per_claim():
    rows = [("Heads agree", "race", "reproduced", "r .9"), ("Effects add up", "", "too uncertain", "2 sets")]
    rows.append(("Heads agree", "tone", "no bias to test", "p .4"))
    verdicts = pd.DataFrame(rows, columns=["claim", "case", "verdict", "why"])
    first, second = claims.in_words(verdicts).split("\n")
    assert first == "- Heads agree: race: **reproduced** (r .9); tone: **no bias to test** (p .4)."
    assert second == "- Effects add up: **too uncertain** (2 sets)."


def test_the_claims_name_what_there_is():
    known = claims.known()
    papers = ["FASP", "FASP (implied)", "Breaking Down Bias", "Downstream mitigation", "Steed et al. 2022"]
    assert list(known["paper"].unique()) == [*papers, claims.OURS] and known["id"].is_unique
    assert set(known["notebook"]) <= {p.stem for p in parameters.notebooks_dir().glob("[0-9]*.py")}
    files = {p.stem for p in (parameters.notebooks_dir() / "params").glob("*.yaml")}
    assert set(known["params"]) <= files | {""}
    assert (known[["claim", "published", "what", "not_run"]] != "").all(axis=None)


@pytest.mark.parametrize("runs_there", [False, True])
def test_the_overview(tmp_path, add_run, runs_there):
    """With no record of this form, all claims say that they weren't run."""
    reports = tmp_path / "smollm2"
    reports.mkdir()
    if runs_there:
        add_run("smollm2", verdict("D1", "no bias to test"), verdict("D2"), notebook="05_downstream_mitigation")
    given = {"reports": str(tmp_path), "out": str(tmp_path / "out")}
    path = parameters.notebooks_dir() / "00_overview.ipynb"
    papermill.execute_notebook(str(path), str(tmp_path / "done.ipynb"), given, progress_bar=False)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "done"
    counts = pd.read_parquet(tmp_path / "out" / "summary.parquet").set_index("paper")
    wanted = [1, 1] if runs_there else [0, 0]
    assert counts.loc["Downstream mitigation", ["reproduced", "no bias to test"]].tolist() == wanted
    assert f"{2 * runs_there} of " in record["results"]["sentence"]
    assert (tmp_path / "out" / "figures" / "verdicts.png").exists()
