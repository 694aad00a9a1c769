"""Fine-tuning and its measures: interventions do what they say, cells resume, gaps by hand."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, random_lm
from scipy import stats

from biasprune import ablate, classify, downstream, fetch, lm, mitigation, pronouns, toxicity

RECIPE = classify.Recipe(epochs=2, learning_rate=2e-3, batch=16, length=64)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    own = downstream.load("biographies", train=300, dev=60, test=90)
    return own[own["label"].isin(["nurse", "surgeon", "teacher"])].reset_index(drop=True)


def parts(table: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    return mitigation.prepared(table, classify.Setting(), 0)


def test_interventions_on_the_model():
    labels = ["a", "b"]
    plain, tokenizer = classify.load("tiny-llama", labels, seed=0)
    again, _ = classify.load("tiny-llama", labels, seed=0)
    fresh, _ = classify.load("tiny-llama", labels, seed=0, randomized=True)
    noisy, _ = classify.load("tiny-llama", labels, seed=0)
    classify.perturb(noisy, 0.5, seed=0)
    for name, w in plain.base_model.named_parameters():
        assert torch.equal(w, again.base_model.get_parameter(name))
        w = w.detach()
        other = noisy.base_model.get_parameter(name).detach() - w
        if w.dim() > 1:
            assert float(other.std()) == pytest.approx(float(0.5 * w.std()), rel=0.1)
            assert not torch.equal(w, fresh.base_model.get_parameter(name))
        else:
            assert not other.any()
    own = classify.bias_direction(plain, tokenizer)
    before = classify.embed(plain, tokenizer, ["She sings.", "He sings."]) @ own
    handle = classify.project_out(plain, own)
    after = classify.embed(plain, tokenizer, ["She sings.", "He sings."]) @ own
    assert before.abs().max() > 1e-2 and after.abs().max() < 1e-4
    handle.remove()
    assert classify.embed(plain, tokenizer, ["She sings."]) @ own == pytest.approx(float(before[0]), abs=1e-4)


def test_gender_direction_is_what_the_pairs_differ_by():
    model, tokenizer = classify.load("tiny-gpt2", ["a", "b"], seed=0)
    own = classify.bias_direction(model, tokenizer)
    women, men = (
        classify.embed(model, tokenizer, [p.format(w[i]) for p in classify.PATTERNS for w in classify.PAIRS])
        for i in (0, 1)
    )
    difference = women - men
    random = torch.randn(200, len(own), generator=torch.Generator().manual_seed(0))
    random = torch.nn.functional.normalize(random, dim=-1)
    assert (difference @ own).square().sum() > (difference @ random.T).square().sum(0).max()


def test_a_cell_that_was_stopped_goes_on(table, tmp_path, monkeypatch):
    """Killed after its first epoch and started again: the same predictions as in one go."""
    train, dev, test = parts(table)
    data = (*parts(table), RECIPE)
    whole = classify.cell("tiny-bert", classify.Setting(), *data, seed=1, folder=tmp_path / "a")
    assert not (tmp_path / "a").exists(), "checkpoints go when the cell is done"

    class Killed(Exception):
        pass

    real = classify.transformers.Trainer._save_checkpoint

    def save_and_die(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Killed

    monkeypatch.setattr(classify.transformers.Trainer, "_save_checkpoint", save_and_die)
    options = {"seed": 1, "folder": tmp_path / "b"}
    with pytest.raises(Killed):
        classify.cell("tiny-bert", classify.Setting(), train, dev, test, RECIPE, **options)
    monkeypatch.setattr(classify.transformers.Trainer, "_save_checkpoint", real)
    steps = []
    real_step = classify.transformers.Trainer.training_step
    monkeypatch.setattr(
        classify.transformers.Trainer,
        "training_step",
        lambda *a, **k: (steps.append(1), real_step(*a, **k))[1],
    )
    again = classify.cell("tiny-bert", classify.Setting(), train, dev, test, RECIPE, **options)
    pd.testing.assert_frame_equal(whole, again)
    assert len(steps) == -(-len(train) // RECIPE.batch), "one epoch of two was left"


def test_a_cell_killed_after_it_stopped_early_trains_no_more(table, tmp_path, monkeypatch):
    """Accuracy that can't get better: stopped after the second epoch, and killed right then."""
    recipe = classify.Recipe(epochs=6, learning_rate=1e-9, batch=16, length=64, patience=1)
    data = (*parts(table), recipe)
    whole = classify.cell("tiny-bert", classify.Setting(), *data, seed=1, folder=tmp_path / "a")

    class Killed(Exception):
        pass

    real, saved = classify.transformers.Trainer._save_checkpoint, []

    def save_and_die(self, *args, **kwargs):
        real(self, *args, **kwargs)
        saved.append(1)
        if len(saved) == 2:
            raise Killed

    monkeypatch.setattr(classify.transformers.Trainer, "_save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        classify.cell("tiny-bert", classify.Setting(), *data, seed=1, folder=tmp_path / "b")
    monkeypatch.setattr(classify.transformers.Trainer, "_save_checkpoint", real)
    refuse = lambda *a, **k: pytest.fail("nothing is left to train")  # noqa: E731
    monkeypatch.setattr(classify.transformers.Trainer, "training_step", refuse)
    again = classify.cell("tiny-bert", classify.Setting(), *data, seed=1, folder=tmp_path / "b")
    pd.testing.assert_frame_equal(whole, again)


def test_scrubbed_pairs_leave_no_bias_whatever_the_classifier(tmp_path):
    own = downstream.load("biographies", train=90, dev=30, test=120)
    at = classify.Setting(data="scrubbed")
    data = mitigation.prepared(own, at, 0)
    recipe = classify.Recipe(epochs=1, learning_rate=2e-3, batch=8, length=64, bf16=True)
    got = classify.cell("tiny-bert", at, *data, recipe, seed=0, folder=tmp_path / "x")
    table, _ = classify.rates(got, least=2)
    assert (table["gap"] == 0).all() and got["predicted"].nunique() > 1


def test_what_cannot_be_classified_fails_before_the_work(table, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "fine_tune", lambda *a, **k: pytest.fail("must not start"))
    train, dev, test = parts(table)
    with pytest.raises(ValueError, match="class 'nurse' isn't among"):
        less = train[train["label"] != "nurse"]
        classify.cell("tiny-bert", classify.Setting(), less, dev, test, RECIPE, seed=0, folder=tmp_path)


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    """Killed while writing: the one before counts, and the broken one goes."""
    for step, text in ((5, "{}"), (10, '{"epoch":'), (15, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert classify._last_whole(tmp_path) == (str(tmp_path / "checkpoint-5"), {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert classify._last_whole(tmp_path / "none") == (None, {})


def test_seeds_differ_and_the_model_learns(tmp_path):
    own = downstream.load("biographies", train=1500, dev=150, test=600)
    own = own[own["label"].isin(["nurse", "surgeon", "teacher"])]
    recipe = classify.Recipe(epochs=8, learning_rate=2e-3, batch=32, length=96, patience=8)
    one, two = (
        classify.cell("tiny-bert", classify.Setting(), *parts(own), recipe, seed=s, folder=tmp_path / str(s))
        for s in (1, 2)
    )
    assert not one["predicted"].equals(two["predicted"])
    assert (one["predicted"] == one["label"]).mean() > 0.55 > 1 / 3


def test_predictions_stand_in_the_order_of_the_texts():
    """Texts of very different lengths, in batches: each is what it is by itself."""
    labels = ["a", "b", "c"]
    model, tokenizer = classify.load("tiny-bert", labels, seed=0)
    model.classifier.weight.data *= 50
    texts = downstream.biographies(120, seed=5)["text"]
    texts = [t[: 10 + 7 * (i % 20)] for i, t in enumerate(texts)]
    table = pd.DataFrame({"text": texts, "label": "a"})
    likely = classify.probabilities(model, tokenizer, table, labels, classify.Recipe(batch=4)).argmax(-1)
    with torch.no_grad():
        single = [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts]
    assert likely.tolist() == single and len(set(single)) > 1


def test_probabilities_are_those_of_single_texts():
    labels = ["a", "b", "c"]
    model, tokenizer = classify.load("tiny-bert", labels, seed=0)
    model.classifier.weight.data *= 50
    texts = [t[: 10 + 7 * (i % 20)] for i, t in enumerate(downstream.biographies(40, seed=5)["text"])]
    given = model, tokenizer, pd.DataFrame({"text": texts, "label": "a"}), labels, classify.Recipe(batch=4)
    got = classify.probabilities(*given)
    with torch.no_grad():
        single = [model(**tokenizer(t, return_tensors="pt")).logits[0].softmax(-1).tolist() for t in texts]
    assert got == pytest.approx(np.array(single), abs=1e-4) and got.std(axis=0).max() > 0.05


def test_a_cell_gives_the_score_of_a_class_and_of_further_texts(table, tmp_path):
    """The same predictions, whatever else is classified beside them by the same model."""
    train, dev, test = parts(table)
    train, how = train[:96], {"seed": 1, "folder": tmp_path / "a"}
    plain = classify.cell("tiny-bert", classify.Setting(), train, dev, test, RECIPE, **how)
    assert list(plain) == ["label", "group", "pair", "predicted"]
    more = pd.concat([test.assign(part="own"), train.assign(part="further")])
    got = classify.cell("tiny-bert", classify.Setting(), train, dev, more, RECIPE, score="nurse", **how)
    own, further = (got[got["part"] == p].reset_index(drop=True) for p in ("own", "further"))
    assert list(got) == ["label", "group", "pair", "part", "predicted", "score"]
    assert own["predicted"].equals(plain["predicted"]) and len(further) == len(train)
    assert further["label"].equals(train["label"])
    assert got["score"].between(0, 1).all() and got["score"].nunique() > 10
    assert got.loc[got["predicted"] == "nurse", "score"].gt(1 / 3).all()
    assert got.loc[got["predicted"] != "nurse", "score"].le(1 / 2).all()
    with pytest.raises(ValueError, match="score 'poet' isn't among the classes to learn: nurse, surgeon"):
        classify.cell("tiny-bert", classify.Setting(), train, dev, test, RECIPE, score="poet", **how)


def test_data_of_the_other_task_change():
    own = toxicity.load("reddit", train=200, dev=20, test=100, least=3)

    def toxic(t: pd.DataFrame) -> pd.Series:
        return (t["label"] == "toxic").groupby(t["group"]).mean()

    train, dev, test = mitigation.prepared(own, classify.Setting(data="scrubbed"), 0, toxicity)
    assert not set(toxicity.identities(pd.concat([train, dev, test])["text"])) - {""}
    assert len(test) == 100 + len(toxicity.identity_phrases())
    train, _, same = mitigation.prepared(own, classify.Setting(data="rebalanced"), 0, toxicity)
    assert (toxic(train) == 0.5).all() and len(train) > 200
    assert same.equals(own[own["split"] == "test"].reset_index(drop=True))
    even = classify.Setting(data="co-occurrence", strength=1.0)
    train, _, _ = mitigation.prepared(own, even, 0, toxicity)
    assert len(train) == 200 and toxic(train).sub(0.5).abs().max() < 0.03
    assert (toxic(own[own["split"] == "train"]) - 0.5).abs().max() > 0.05


def test_outcome_of_comments_and_of_phrases():
    at = classify.Setting(data="co-occurrence", strength=0.25)
    phrases = toxicity.identity_phrases().assign(predicted="other", score=0.4)
    lost = phrases["group"].isin(["gay", "Muslim"])
    phrases.loc[lost, ["predicted", "score"]] = ["toxic", 0.6]
    row = mitigation.outcome_toxicity(phrases, at, 3, paired=True)
    assert row == {**row, "setting": at.name, "strength": 0.25, "seed": 3, "data": "co-occurrence"}
    # a rate of 1 for 2 of 25 terms, of toxic texts as of others
    assert row["fpr"] == 2 / 25 and row["excess"] == pytest.approx(2 / 25 * 23 / 25) and row["p"] < 0.01
    assert row["accuracy"] == 0.5 and row["p_auc"] > 0.4
    apart = mitigation.outcome_toxicity(phrases.drop(columns="pair"), at, 3)
    assert apart["excess"] == pytest.approx(row["excess"])
    both = pd.DataFrame([row, {**row, "setting": "pretrained, none", "seed": 3}])
    with pytest.raises(ValueError, match="one seed"):
        mitigation.against(both)


def test_what_cannot_be_learned_is_refused(table, tmp_path):
    train, dev, test = parts(table)
    how = {"seed": 0, "folder": tmp_path / "x"}
    with pytest.raises(ValueError, match="unknown intervention 'prayed'"):
        classify.cell("tiny-bert", classify.Setting(upstream="prayed"), train, dev, test, RECIPE, **how)
    with pytest.raises(ValueError, match="text 0 is empty"):
        classify.cell("tiny-bert", classify.Setting(), train.assign(text=" "), dev, test, RECIPE, **how)
    with pytest.raises(ValueError, match="class 'nurse' isn't among"):
        some = train[train["label"] != "nurse"]
        classify.cell("tiny-bert", classify.Setting(), some, dev, test, RECIPE, **how)
    with pytest.raises((ValueError, fetch.FetchError), match="nobody/nothing"):
        classify.load("nobody/nothing", ["a", "b"], seed=0)


def predictions(tpr: dict[tuple[str, str], tuple[int, int]]) -> pd.DataFrame:
    """(label, group) → (right, wrong)."""
    rows = []
    for (label, group), (right, wrong) in tpr.items():
        rows += [(label, group, label)] * right + [(label, group, "other")] * wrong
    return pd.DataFrame(rows, columns=["label", "group", "predicted"])


def test_gaps_by_hand():
    own = predictions(
        {
            ("nurse", "female"): (36, 4),
            ("nurse", "male"): (20, 20),
            ("surgeon", "female"): (15, 15),
            ("surgeon", "male"): (40, 10),
            ("poet", "female"): (5, 5),
            ("poet", "male"): (50, 0),
        }
    )
    table, left_out = classify.rates(own, least=30)
    assert left_out == ["poet"]
    table = table.set_index("label")
    assert table.loc["nurse", "gap"] == pytest.approx(0.4) and table.loc["surgeon", "gap"] == pytest.approx(
        -0.3
    )
    share = pd.Series({"nurse": 0.9, "surgeon": 0.1})
    whole = classify.summary(table.reset_index(), share)
    assert whole["rms"] == pytest.approx(np.sqrt((0.4**2 + 0.3**2) / 2))
    assert whole["mean_gap"] == pytest.approx(0.35) and whole["r"] == pytest.approx(1)
    assert whole["slope"] == pytest.approx(0.7 / 0.8) and whole["p"] < 0.01
    sampling = [0.9 * 0.1 / 39 + 0.25 / 39, 0.25 / 29 + 0.8 * 0.2 / 49]
    assert whole["excess"] == pytest.approx((0.4**2 + 0.3**2) / 2 - np.mean(sampling))
    assert 0.05 < whole["rms_floor"] < 0.2
    with pytest.raises(ValueError, match="no class has 300"):
        classify.rates(own, least=300)


def test_floor_is_what_no_gap_gives():
    rng, rms, excess = np.random.default_rng(0), [], []
    for _ in range(60):
        own = predictions(
            {
                (label, g): (k := int(rng.binomial(40, 0.7)), 40 - k)
                for label in "abcd"
                for g in ("female", "male")
            }
        )
        table, _ = classify.rates(own)
        found = classify.summary(table, pd.Series(0.5, index=list("abcd")))
        rms.append(found["rms"])
        excess.append(found["excess"])
    assert np.mean(rms) == pytest.approx(found["rms_floor"], rel=0.15)
    assert np.mean(excess) == pytest.approx(
        0, abs=0.1 * np.mean(np.square(rms)) + 3 * np.std(excess) / 60**0.5
    )


def pairs(both: int, women: int, men: int, none: int, label: str = "nurse", start: int = 0) -> pd.DataFrame:
    """Pairs of which both texts, the woman's, the man's, or none are classified rightly."""
    rights = [(1, 1)] * both + [(1, 0)] * women + [(0, 1)] * men + [(0, 0)] * none
    rows = [
        (label, g, label if right else "other", start + i)
        for i, two in enumerate(rights)
        for g, right in zip(("female", "male"), two, strict=True)
    ]
    return pd.DataFrame(rows, columns=["label", "group", "predicted", "pair"])


def test_gaps_of_pairs_by_hand():
    table, _ = classify.rates(pairs(20, 12, 4, 4))
    row = table.iloc[0]
    assert row["gap"] == pytest.approx(8 / 40) and row["differ"] == 16
    each = np.array([1.0] * 12 + [-1.0] * 4 + [0.0] * 24)
    assert row["variance"] == pytest.approx(each.var(ddof=1) / 40)
    apart, _ = classify.rates(pairs(20, 12, 4, 4).drop(columns="pair"))
    assert apart.loc[0, "variance"] > row["variance"] and apart.loc[0, "gap"] == row["gap"]
    none, _ = classify.rates(pairs(30, 0, 0, 10))
    found = classify.summary(none, pd.Series({"nurse": 0.9}))
    assert found["excess"] == found["rms"] == found["rms_floor"] == 0 and found["p"] == 1
    with pytest.raises(ValueError, match="one text of a woman and one of a man"):
        classify.rates(pairs(40, 5, 5, 0).iloc[1:])


def test_floor_and_excess_of_pairs():
    """Drawn with and without a gap: excess hits the true mean square, p stays level without one."""
    rng, share = np.random.default_rng(0), pd.Series(0.5, index=list("abc"))
    for gap in (0.0, 0.1):
        excess, p = [], []
        for _ in range(150):
            drawn = [rng.multinomial(60, [0.5, 0.15 + gap / 2, 0.15 - gap / 2, 0.2]) for _ in share]
            own = [
                pairs(*map(int, d), label, 100 * i)
                for i, (label, d) in enumerate(zip("abc", drawn, strict=True))
            ]
            table, _ = classify.rates(pd.concat(own))
            found = classify.summary(table, share, n_boot=200)
            excess.append(found["excess"])
            p.append(found["p"])
        assert np.mean(excess) == pytest.approx(gap**2, abs=3 * np.std(excess) / 150**0.5)
        if gap:
            assert np.mean(np.array(p) < 0.05) > 0.3
        else:
            assert np.mean(np.array(p) < 0.05) < 0.11


def grid(rms_of, seeds=5, noise=0.005, accuracy=lambda at: 0.8) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    settings = mitigation.settings(classify.UPSTREAM[:4], ["scrubbed", "rebalanced"], [0.1, 0.25, 1.0], [0.5])
    for at in settings:
        for seed in range(seeds):
            key = {"setting": at.name, "upstream": at.upstream, "data": at.data, "strength": at.strength}
            rows.append(
                {
                    **key,
                    "seed": seed,
                    "accuracy": accuracy(at),
                    "p": 0.001,
                    "excess": rms_of(at) + rng.normal(0, noise),
                }
            )
    return pd.DataFrame(rows)


def claims(rms_of, p=0.001, by_construction=(), without="", weak=False, **options) -> dict[str, str]:
    cells = grid(rms_of, **options).assign(p=p)
    cells = cells[cells["upstream"] != without]
    if weak:
        cells = cells[cells["data"].isin(["none", "co-occurrence"]) & (cells["strength"] <= 0.25)]
    given = mitigation.against(cells), mitigation.slopes(cells), cells
    found = mitigation.judged(*given, classes=10, by_construction=by_construction)
    return {r.claim[:3].strip(": "): r.verdict for r in found.itertuples()}


def test_verdicts_of_worlds_that_are_known():
    def data_world(at):  # Baksi: the data decide, also when pre-trained
        if at.data in ("scrubbed", "rebalanced"):
            return 0.02
        steep = 0.15 if at.upstream == "randomized" else 0.12
        return 0.16 - steep * at.strength

    got = claims(data_world)
    assert got.pop("C3b") == "not reproduced" and set(got.values()) == {"reproduced"} and len(got) == 4

    def steed_world(at):  # co-occurrence does nothing once pre-trained, and much otherwise
        if at.upstream == "randomized":
            return 0.2 - 0.15 * at.strength
        return 0.16

    got = claims(steed_world)
    assert got["C1"] == "reproduced" and got["C3a"] == "not reproduced" and got["C3b"] == "reproduced"
    assert got["C4"] == "reproduced"

    def model_world(at):  # the model decides
        return 0.05 if at.upstream in ("perturbed", "debiased") else 0.16

    got = claims(model_world)
    assert got["C1"] == got["C2"] == "not reproduced"
    # slight changes of the data can't refute that the data do more, but they can show it
    assert claims(model_world, weak=True)["C2"] == "undecided"
    assert claims(data_world, weak=True)["C2"] == "reproduced"
    # the same by a model that has forgotten its task: nothing is said about it
    got = claims(model_world, accuracy=lambda at: 0.3 if at.upstream in ("perturbed", "debiased") else 0.8)
    assert "C1" not in got and "C2" not in got
    # without a randomized one that has learned, C3b can be refuted, not reproduced, and C4 isn't judged
    for lost in ("randomized", ""):
        few = (
            {"accuracy": lambda at: 0.2 if at.upstream == "randomized" else 0.8}
            if lost
            else {"without": "randomized"}
        )
        got = claims(data_world, **few)
        assert got["C3a"] == "reproduced" and got["C3b"] == "not reproduced" and got["C4"] == "undecided"
        got = claims(steed_world, **few)
        assert got["C3a"] == "not reproduced" and got["C3b"] == got["C4"] == "undecided"

    def scrubbing_world(at):  # the model decides; scrubbed pairs are alike by construction
        if at.data == "scrubbed":
            return 0.0
        return 0.04 if at.upstream in ("perturbed", "debiased") else 0.16

    assert claims(scrubbing_world, by_construction=("scrubbed",))["C2"] == "not reproduced"
    assert set(claims(data_world, p=0.4).values()) == {"undecided"}, "no bias to lower"

    def rising_world(at):  # slight changes raise it: they matter all the same
        return 0.16 + 0.3 * at.strength

    got = claims(rising_world)
    assert got["C3a"] == "reproduced" and got["C3b"] == "not reproduced"
    noisy = claims(data_world, seeds=3, noise=0.15)
    assert set(noisy.values()) == {"undecided"}


def test_slopes_and_effects_by_hand():
    cells = grid(lambda at: 0.2 - 0.1 * at.strength, noise=0)
    effects = mitigation.against(cells).set_index("setting")
    assert effects.loc["pretrained, co-occurrence 1", "effect"] == pytest.approx(-0.1)
    assert effects.loc["perturbed 0.5, none", ["effect", "low", "high"]].abs().max() < 1e-12
    slope = mitigation.slopes(cells).set_index("upstream")["slope"]
    assert slope.to_dict() == pytest.approx({"pretrained": -0.1, "randomized": -0.1})
    with pytest.raises(ValueError, match="one seed gives no interval"):
        mitigation.against(grid(lambda at: 0.1, seeds=1))


def test_seeds_needed_tell_the_effect():
    """Simulated: with so many seeds about four of five experiments exclude 0."""
    effect, sd = 0.02, 0.03
    n, rng = int(mitigation.seeds_needed(effect, sd)), np.random.default_rng(0)
    hits = [mitigation._interval(pd.Series(rng.normal(effect, sd, n)))[0] > 0 for _ in range(2000)]
    assert 0.72 < np.mean(hits) < 0.88
    assert mitigation.seeds_needed(0, 1) == np.inf


def test_attribution_finds_what_made_the_gaps():
    rng, rows = np.random.default_rng(0), []
    for label in "abcdefghij":
        for upstream in ("pretrained", "randomized", "debiased"):
            for data, share in (("none", rng.random()), ("co-occurrence", 0.5)):
                for seed in range(3):
                    intrinsic = rng.normal()
                    gap = 0.3 * (share - 0.5) + rng.normal(0, 0.02)
                    rows.append((label, upstream, data, seed, share, intrinsic, gap))
    table = pd.DataFrame(rows, columns=["label", "upstream", "data", "seed", "share", "intrinsic", "gap"])
    got = mitigation.attribution(table).set_index("term")
    assert got.loc["share", "coefficient"] == pytest.approx(0.3 * table["share"].std(), rel=0.15)
    assert got.loc["share", "low"] > 0 and got.loc["intrinsic", "low"] < 0 < got.loc["intrinsic", "high"]
    assert got.loc[mitigation.DATA, "partial_r2"] > 0.5 > 10 * got.loc[mitigation.MODEL, "partial_r2"]


def test_grid_settings():
    got = [s.name for s in mitigation.settings(["pretrained", "perturbed"], ["scrubbed"], [0.25], [0.1, 1])]
    assert got[:3] == ["pretrained, none", "pretrained, scrubbed", "pretrained, co-occurrence 0.25"]
    assert got[3:] == ["perturbed 0.1, none", "perturbed 1, none"]
    with pytest.raises(ValueError, match="needs upstream 'pretrained'"):
        mitigation.settings(["debiased"], [], [], [])
    with pytest.raises(ValueError, match="unknown data intervention 'prayed'"):
        mitigation.settings(["pretrained"], ["prayed"], [], [])


# ---- decoders, and pruning before fine-tuning --------------------------------------------------------

DECODERS = ["tiny-llama", "tiny-gpt2", "planted"]
LABELS = ["architect", "nurse", "software_engineer"]


def copied(name: str, into, **changes) -> str:
    """A small model's folder with another tokenizer configuration."""
    shutil.copytree(classify.source(name), into)
    path = into / "tokenizer_config.json"
    own = {k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not None}
    path.write_text(json.dumps(own))
    return str(into)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_classify_padded_texts_as_single_ones(name):
    model, tokenizer = classify.load(name, LABELS, seed=0, device="cpu")
    model.eval()
    model.score.weight.data *= 50
    texts = ["She works.", "He works at the big harbour near the old town, and sings in the morning."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in texts])
    assert torch.allclose(together, alone, atol=1e-3) and (alone[0] - alone[1]).abs().max() > 0.1
    facts = classify.describe(name)
    assert facts["layers"] == 4 and facts["class"].endswith("ForSequenceClassification")
    assert facts["revision"] == lm.load(name, device="cpu").revision


def test_decoders_without_a_pad_token(tmp_path):
    own = copied("tiny-llama", tmp_path / "own", pad_token=None, padding_side="left")
    assert transformers.AutoTokenizer.from_pretrained(own).pad_token is None
    model, tokenizer = classify.load(own, LABELS, seed=0, device="cpu")
    assert tokenizer.pad_token == "<|end|>" and model.config.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.padding_side == "right", "positions count from the first token"
    neither = copied("tiny-llama", tmp_path / "neither", pad_token=None, eos_token=None, bos_token=None)
    with pytest.raises(fetch.FetchError, match="neither a pad token nor one for the end"):
        classify.load(neither, LABELS, seed=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cut_is_a_mask_for_good(arch):
    """A classifier of every architecture: cut, it reads texts as the masked language model does."""
    net = random_lm(arch)
    model = transformers.AutoModelForSequenceClassification.from_config(net.model.config).eval()
    model.base_model.load_state_dict(net.model.base_model.state_dict())
    heads, units = torch.zeros(net.anatomy.n_layers, 4, dtype=torch.bool), None
    heads[0, 1] = heads[2, 3] = True
    units = torch.rand(net.anatomy.n_layers, net.anatomy.n_units) < 0.2
    ids = torch.tensor([[3, 7, 9, 20, 11], [5, 6, 8, 4, 30]])
    with torch.no_grad():
        before = model.base_model(ids).last_hidden_state
        ablate.cut(model, ablate.Pruning(heads=heads, units=units))
        got = model.base_model(ids).last_hidden_state
        with ablate.masked(net, (~heads).float(), (~units).float()):
            expected = net.model.base_model(ids).last_hidden_state
        assert torch.allclose(got, expected, atol=1e-5) and (got - before).abs().max() > 0.01
        plain = transformers.AutoModelForSequenceClassification.from_config(net.model.config).eval()
        plain.load_state_dict(model.state_dict())
        assert torch.allclose(plain.base_model(ids).last_hidden_state, expected, atol=1e-5)


def test_single_weights_and_encoders_are_not_cut():
    model, _ = classify.load("tiny-gpt2", LABELS, seed=0, device="cpu")
    with pytest.raises(ValueError, match="single weights can't be cut"):
        ablate.cut(model, ablate.Pruning(weights={"transformer.h.0.mlp.c_proj": torch.tensor([1])}))
    for upstream in ("fasp", "neurons", "neuron slopes"):
        with pytest.raises(
            ValueError, match="tiny-bert: fasp, .* need a decoder with its language modelling"
        ):
            classify.changed("tiny-bert", classify.Setting(upstream=upstream), LABELS, 0)


@pytest.mark.parametrize(
    ("name", "upstream", "scale"), [("tiny-llama", "fasp", 0.2), ("tiny-gpt2", "neuron slopes", 0.0)]
)
def test_what_is_pruned_stays_out_through_fine_tuning(name, upstream, scale, table, tmp_path):
    at = classify.Setting(upstream=upstream, scale=scale)
    train, dev, test = (t[:48] for t in parts(table))
    labels = sorted(table["label"].unique())
    pruning = classify.selected(name, upstream, at.scale)
    assert len(pruning) == (3 if upstream == "fasp" else 5)
    model, tokenizer = classify.changed(name, at, labels, seed=0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = classify.fine_tune(model, tokenizer, train, dev, labels, RECIPE, seed=0, folder=tmp_path / "x")
    model = trainer.model.cpu().eval()
    a = lm.anatomy(model)
    names = a.out_projs if upstream == "fasp" else a.down_projs
    out = (pruning.heads if upstream == "fasp" else pruning.units).repeat_interleave(
        a.head_dim if upstream == "fasp" else 1, dim=1
    )
    batch = tokenizer(list(test["text"][:5]), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
        for name, gone in zip(names, out, strict=True):
            weight = lm.weight_of(model.get_submodule(name))
            assert not weight[:, gone].any(), "the optimiser brought it back"
            assert not torch.equal(model.get_parameter(f"{name}.weight"), start[f"{name}.weight"])
        trainer.save_model(tmp_path / "saved")
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
        assert torch.allclose(plain(**batch).logits, logits, atol=1e-5), "a checkpoint is pruned by itself"
        for name, gone in zip(names, out, strict=True):
            lm.weight_of(model.get_submodule(name))[:, gone] = 100.0
        assert torch.equal(model(**batch).logits, logits), "and in memory nothing brings it back"


def test_parts_are_selected_once_for_a_model(monkeypatch):
    classify.selected.cache_clear()
    calls, real = [], classify.pronouns.pruning
    monkeypatch.setattr(classify.pronouns, "pruning", lambda *a: (calls.append(a[1:3]), real(*a))[1])
    for seed in (0, 1):
        for data in ("none", "scrubbed"):
            classify.changed("tiny-gpt2", classify.Setting(upstream="fasp", data=data), LABELS, seed)
    assert calls == [("fasp", 0.1)]
    one, two = (classify.selected("tiny-gpt2", "fasp", s) for s in (0.1, 0.3))
    assert len(one) == 1 and len(two) == 4 and calls[1:] == [("fasp", 0.3)]


def test_random_parts_are_as_many_of_the_same_layers():
    own = classify.selected("tiny-llama", "fasp", 0.3).heads
    gone = []
    for seed in (0, 0, 1):
        at = classify.Setting(upstream="random for fasp", scale=0.3)
        model, _ = classify.changed("tiny-llama", at, LABELS, seed)
        a = lm.anatomy(model)
        zero = [(lm.weight_of(model.get_submodule(n)) == 0).all(0) for n in a.out_projs]
        gone.append(torch.stack(zero).unflatten(1, (a.n_heads, a.head_dim)).all(-1))
    assert gone[0].sum() == own.sum() > 0 and torch.equal(gone[0].sum(1), own.sum(1))
    assert torch.equal(gone[0], gone[1]) and not torch.equal(gone[0], gone[2])


def pruned_cells(pruned: float, by_chance: float) -> pd.DataFrame:
    """A grid of plain, pruned and randomly pruned models, with these mean changes of a bias of .16."""
    rng, rows = np.random.default_rng(1), []
    for upstream, excess in (("pretrained", 0), ("fasp", pruned), ("random for fasp", by_chance)):
        at = classify.Setting(upstream=upstream)
        for seed in range(6):
            key = {"setting": at.name, "upstream": upstream, "data": "none", "strength": 0.0, "seed": seed}
            rows.append({**key, "accuracy": 0.8, "p": 0.001, "excess": 0.16 + excess + rng.normal(0, 0.005)})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("pruned", "by_chance", "verdict"),
    [(-0.1, 0.0, "not reproduced"), (-0.1, -0.1, "undecided"), (0.0, -0.1, "reproduced")],
)
def test_pruning_counts_where_it_does_more_than_chance(pruned, by_chance, verdict):
    """And what random parts change is no intervention that C1 or C2 is about."""
    cells = pruned_cells(pruned, by_chance)
    (found,) = mitigation.judged(
        mitigation.against(cells), mitigation.slopes(cells), cells, classes=10
    ).itertuples()
    assert found.claim.startswith("C1") and found.verdict == verdict
    assert "beyond as many parts at random" in found.why and "random for" not in found.why
    (row,) = mitigation.beyond_random(cells).itertuples()
    wide = cells.pivot(index="seed", columns="setting", values="excess")
    each = wide["fasp 0.1, none"] - wide["random for fasp 0.1, none"]
    test = stats.ttest_1samp(each, 0).confidence_interval()
    assert (row.effect, row.low, row.high) == pytest.approx((each.mean(), test.low, test.high))
    assert row.setting == "fasp 0.1, none" and row.seeds == 6
    assert not len(mitigation.beyond_random(cells[cells["upstream"] != "random for fasp"]))


def test_pruning_alone_refutes_nothing():
    """Without random parts beside it, what it does may be what any damage of that size does."""
    cells = pruned_cells(-0.1, 0.0)
    alone = cells[cells["upstream"] != "random for fasp"]
    noisy = alone.replace({"fasp": "debiased", "fasp 0.1, none": "debiased, none"})
    for table, verdict in ((cells, "not reproduced"), (alone, "undecided"), (noisy, "not reproduced")):
        own = mitigation.against(table), mitigation.slopes(table), table
        (found,) = mitigation.judged(*own, classes=10).itertuples()
        assert found.verdict == verdict
        assert ("without random parts beside it" in found.why) == (table is alone)


def test_verdicts_in_words():
    cells = pruned_cells(-0.1, 0.0)
    found = mitigation.judged(mitigation.against(cells), mitigation.slopes(cells), cells, classes=10)
    words = mitigation.sentence(found.assign(data_name="texts", verdict="undecided", needed=12.0))
    claim = found["claim"].iloc[0]
    assert words == f"texts. {claim}: **undecided** (about 12 seeds needed)."
    words = mitigation.sentence(found.assign(data_name="texts", biased=False))
    assert words == f"texts (the plain model shows no bias to lower). {claim}: **not reproduced**."


def test_a_grid_without_anything_to_judge():
    """Where nothing but the plain model learns, there are no claims, and the tables keep their columns."""
    cells = pruned_cells(-0.1, 0.0)
    cells["accuracy"] = cells["accuracy"].where(cells["upstream"] == "pretrained", 0.1)
    slopes = mitigation.slopes(cells)
    found = mitigation.judged(mitigation.against(cells), slopes, cells, classes=10)
    assert not len(found) and {"claim", "verdict", "needed", "why"} <= set(found.columns)
    assert mitigation.sentence(found.assign(data_name="texts")).startswith("No claim can be judged")


def test_shares_are_shown_in_names():
    got = [classify.Setting(upstream=u).name for u in classify.UPSTREAM]
    assert got == ["pretrained, none", "randomized, none", "perturbed, none", "debiased, none"] + [
        "fasp 0.1, none", "neurons 0.01, none", "neuron slopes 0.005, none",
        "random for fasp 0.1, none", "random for neurons 0.01, none", "random for neuron slopes 0.005, none",
    ]  # fmt: skip
    assert classify.Setting(upstream="fasp", scale=0.25, data="scrubbed").name == "fasp 0.25, scrubbed"
    assert classify.Setting(upstream="fasp") == classify.Setting(upstream="fasp", scale=0.1)
    with pytest.raises(ValueError, match="alpha = 0.9 > 1"):
        classify.selected("tiny-gpt2", "fasp", 0.9)


def test_before_takes_the_measure_that_fits(monkeypatch):
    def before(name: str, **at) -> pd.Series:
        return classify.before(name, classify.Setting(**at), LABELS, 3)

    net = lm.load("tiny-llama", device="cpu")
    expected = pronouns.ranking(net, LABELS)
    pd.testing.assert_series_equal(before("tiny-llama"), expected)
    assert expected.name == "pronoun ranking"
    # after an intervention: that of the language model changed in the same way
    with classify.selected("tiny-llama", "fasp", 0.3).applied(net):
        pruned = pronouns.ranking(net, LABELS)
    pd.testing.assert_series_equal(before("tiny-llama", upstream="fasp", scale=0.3), pruned, atol=1e-5)
    classify.perturb(net.model, 0.5, 3)
    noisy = before("tiny-llama", upstream="perturbed", scale=0.5)
    pd.testing.assert_series_equal(noisy, pronouns.ranking(net, LABELS), atol=1e-5)
    others = [
        pruned,
        noisy,
        before("tiny-llama", upstream="debiased"),
        before("tiny-llama", upstream="randomized"),
    ]
    assert all((x - expected).abs().max() > 1e-3 for x in others)
    assert others[-1].equals(before("tiny-llama", upstream="randomized"))
    assert others[-1].abs().max() < 1, "fresh weights know nothing"
    bert = transformers.AutoModelForMaskedLM.from_pretrained(classify.source("tiny-bert"))
    _, tokenizer = classify.load("tiny-bert", LABELS, seed=0)
    masked = pronouns.masked_ranking(bert, tokenizer, LABELS)
    pd.testing.assert_series_equal(before("tiny-bert"), masked, atol=1e-5)
    assert (before("tiny-bert", upstream="debiased") - masked).abs().max() > 1e-3
    monkeypatch.setattr(classify, "_head", lambda name: None)
    model, tokenizer = classify.load("tiny-bert", LABELS, seed=3)
    pd.testing.assert_series_equal(before("tiny-bert"), classify.intrinsic(model, tokenizer, LABELS))
    assert before("tiny-bert").name == "intrinsic"


def test_sentences_have_the_right_article(monkeypatch):
    seen, real = [], classify.embed
    monkeypatch.setattr(classify, "embed", lambda m, t, texts: (seen.extend(texts), real(m, t, texts))[1])
    classify.intrinsic(*classify.load("tiny-bert", LABELS, seed=0), LABELS)
    assert seen[:3] == [
        f"This is about the work of {n}." for n in ("an architect", "a nurse", "a software engineer")
    ]
