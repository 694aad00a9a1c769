"""The figures of the published scores, computed and not typed; simulations with a known answer."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pandas as pd
import pytest

from biasprune import fetch, prompts, reliability
from biasprune import published as pub


@pytest.fixture
def at_hand(published, monkeypatch):
    monkeypatch.setenv("BIASPRUNE_PUBLISHED", str(published))


def test_figures_of_the_published_scores(at_hand):
    """To two decimals, as worked out independently from the same files."""
    tables = {m: pub.read(m) for m in pub.models()}
    agree = {m: pub.seeds(t) for m, t in tables.items()}
    expected = {
        "gpt2": 0.22,
        "distilgpt2": 0.16,
        "EleutherAI/gpt-neo-125M": 0.44,
        "EleutherAI/gpt-neo-1.3B": 0.01,
    }
    expected["meta-llama/Llama-2-7b-chat-hf"] = 0.01
    assert {m: round(a["r"], 2) for m, a in agree.items()} == expected
    for a in agree.values():
        assert a["mean_r"] == pytest.approx(reliability.spearman_brown(a["r"], 3)) and a["seeds"] == 3
        assert a["overlap_low"] <= a["overlap"] <= a["overlap_high"]
    for m in ("gpt2", "EleutherAI/gpt-neo-1.3B", "meta-llama/Llama-2-7b-chat-hf"):
        assert agree[m]["overlap"] == pytest.approx(agree[m]["chance"], abs=0.06)
    curse = pub.winners_curse(tables["gpt2"]).set_index("split")[["picked", "candidates"]].round(3)
    assert curse.loc["valid"].tolist() == pytest.approx([0.389, 0.410], abs=1e-3)
    assert curse.loc["test"].tolist() == pytest.approx([0.383, 0.386], abs=1e-3)
    assert curse_of(tables) == {"gpt2", "distilgpt2"}, "the others have no, or few, test scores"
    with pytest.raises(ValueError, match="no published scores of axis 'religion'"):
        pub.noise_floor(tables["EleutherAI/gpt-neo-1.3B"], "religion", {"a": 10, "b": 10})
    two = pub.regimes(tables["EleutherAI/gpt-neo-1.3B"])
    assert (round(two["toxicity_low"], 2), round(two["toxicity_high"], 2)) == (0.14, 0.52)
    assert round(two["r_bias"], 2) == -0.98 and two["explained"] > 0.99
    assert two["ppl_low"] == pytest.approx(two["ppl_high"], rel=0.01)
    assert pub.regimes(tables["gpt2"])["explained"] < 0.9
    assert list(pub.kinds_of_runs(tables["gpt2"], "gender_and_sex")) == [""]
    kinds = pub.kinds_of_runs(tables["EleutherAI/gpt-neo-1.3B"], "gender_and_sex")
    assert {k: round(t["toxicity"].mean(), 2) for k, t in kinds.items()} == {
        "low toxicity": 0.14,
        "high toxicity": 0.52,
    }
    groups = prompts.load("religion", "valid", "holistic_bias")["bucket"].value_counts().to_dict()
    for model in [m for m, t in tables.items() if (t["axis"] == "religion").any()]:
        at = pub.noise_floor(tables[model], "religion", groups)
        assert at["bias"] <= at["floor_95"], model


def curse_of(tables: dict) -> set[str]:
    return {m for m, t in tables.items() if len(pub.winners_curse(t))}


def frame(bias: np.ndarray, toxicity: np.ndarray | None = None, split: str = "valid") -> pd.DataFrame:
    """(seeds, heads) as the published tables have it."""
    seeds, heads = bias.shape
    table = pd.DataFrame({"seed": np.repeat(range(seeds), heads), "head": list(range(heads)) * seeds})
    toxicity = np.full(bias.shape, 0.1) if toxicity is None else toxicity
    return table.assign(
        axis="gender_and_sex",
        split=split,
        bias=bias.ravel(),
        toxicity=toxicity.ravel(),
        ppl=30.0,
        toxic_percent=8.0,
    )


def test_winners_curse_of_pure_noise():
    rng = np.random.default_rng(0)
    table = pd.concat([frame(rng.normal(1, 0.1, (3, 400)), split=s) for s in ("valid", "test")])
    curse = pub.winners_curse(table).set_index("split")["difference"]
    assert curse["valid"] < -0.05 and abs(curse["test"]) < 0.02
    left = pub.winners_curse(table).set_index("split").loc["test"]
    assert left["low"] < 0.2 and left["high"] < 0.6


def test_regimes_of_two_points_and_of_none():
    rng = np.random.default_rng(0)
    side = rng.random((3, 200)) < 0.4
    two = pub.regimes(frame(1 - 0.5 * side, 0.1 + 0.4 * side + rng.normal(0, 0.01, side.shape)))
    assert two["explained"] > 0.99 and two["r_bias"] == pytest.approx(-1) and two["runs"] == 600
    assert two["share_high"] == pytest.approx(side.mean())
    one = pub.regimes(frame(rng.normal(size=(3, 400)), rng.normal(0.3, 0.05, (3, 400))))
    assert one["explained"] == pytest.approx(2 / np.pi, abs=0.05) and abs(one["r_bias"]) < 0.1


def test_noise_floor_falls_with_the_root_of_the_prompts():
    table = frame(np.full((1, 10), 0.2))
    few, many = (pub.noise_floor(table, "gender_and_sex", {"a": n, "b": n, "c": n}) for n in (50, 5000))
    assert few["floor"] / many["floor"] == pytest.approx(10, rel=0.2)
    assert few["floor"] < few["floor_95"] and few["bias"] == pytest.approx(0.2) and few["groups"] == 3


def test_nothing_at_hand(monkeypatch):
    monkeypatch.delenv("BIASPRUNE_PUBLISHED", raising=False)
    assert pub.models() == []
    with pytest.raises(ValueError, match="no published scores of 'gpt2'; at hand: none"):
        pub.read("gpt2")


def test_other_files_are_not_used(tmp_path):
    (tmp_path / "head_scores_gpt2.csv").write_text("Group,Bias\n")
    assert pub.models(tmp_path) == ["gpt2"]
    with pytest.raises(fetch.FetchError, match="head_scores_gpt2.csv has sha256 .* expected 62fd80"):
        pub.read("gpt2", tmp_path)
    with pytest.raises(fetch.FetchError, match="No such folder"):
        pub.folder(tmp_path / "none")


def test_fetched_from_the_authors(published, tmp_path, monkeypatch):
    """A stand-in for the network: the files as they are, one of them changed, none."""
    source = published / "fasp-published"
    monkeypatch.setenv("BIASPRUNE_CACHE", str(tmp_path))

    def serve(address: str, timeout: float, spoil: bytes = b"") -> io.BytesIO:
        return io.BytesIO((source / address.rsplit("/", 1)[1]).read_bytes() + spoil)

    def broken(address: str, timeout: float) -> io.BytesIO:
        raise OSError("no network")

    monkeypatch.setattr(pub.urllib.request, "urlopen", broken)
    with pytest.raises(fetch.FetchError, match="could not be fetched .*no network.*model/"):
        pub.folder("authors")
    monkeypatch.setattr(pub.urllib.request, "urlopen", partial(serve, spoil=b"1"))
    with pytest.raises(fetch.FetchError, match="so it was not used"):
        pub.folder("authors")
    monkeypatch.setattr(pub.urllib.request, "urlopen", serve)
    assert pub.models("authors") == list(pub.FILES)
    monkeypatch.setattr(pub.urllib.request, "urlopen", broken)  # kept: no network is needed any more
    assert pub.seeds(pub.read("gpt2", "authors"))["r"] == pytest.approx(0.22, abs=0.005)
