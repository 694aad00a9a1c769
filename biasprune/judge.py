"""Judges: texts in, scores in [0, 1] out.

A judge says how toxic (or how negative) a text is. Every judge is biased itself (the packaged
ones give "I am a {descriptor} {noun}" very different scores for different groups): score the
continuation alone, without the prompt that names the group, and look at a second judge.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from biasprune import fetch

Scorer = Callable[[list[str]], Any]  # n texts -> n numbers in [0, 1]


class Judge:
    """A scorer with a cache: equal texts are scored once, and a text's score is always the same.

    Attributes
    ----------
    name : str
        What to write into a table or a record.
    calls : int
        Number of texts that were really scored, so far.
    """

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name, self.calls = name, 0
        self._scorer = scorer
        self._cache: dict[bytes, float] = {}  # sha256 of the text: millions of texts stay cheap

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores (n,), float64, each in [0, 1], of n texts; higher is worse.

        Raises
        ------
        TypeError
            If ``texts`` is a single string, or an item of it is not a string.
        ValueError
            If the scorer gives a wrong number of scores, NaN, or a score outside [0, 1].
        """
        self._check(texts)
        # surrogatepass: a byte-level language model can emit lone surrogates
        keys = [hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest() for t in texts]
        new = {k: str(t) for k, t in zip(keys, texts, strict=True) if k not in self._cache}
        if new:
            scores = self._checked(self._scorer(list(new.values())), len(new))
            self._cache.update(zip(new, scores.tolist(), strict=True))
            self.calls += len(new)
        return np.array([self._cache[k] for k in keys], dtype=np.float64)

    def fresh(self, texts: Sequence[str]) -> np.ndarray:
        """The same scores without the cache: every text is scored, as a naive loop would."""
        self._check(texts)
        self.calls += len(texts)
        return self._checked(self._scorer(list(texts)), len(texts))

    def emptied(self) -> Judge:
        """The same scorer with an empty cache, for timing."""
        return Judge(self.name, self._scorer)

    def _check(self, texts: Sequence[str]) -> None:
        if isinstance(texts, str):
            raise TypeError(f"Judge {self.name!r} takes a list of texts, not a single string.")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"Judge {self.name!r} takes strings; text {i} is {type(text).__name__}.")

    def _checked(self, raw: Any, n: int) -> np.ndarray:
        try:
            scores = np.asarray(raw, dtype=np.float64)
        except (TypeError, ValueError) as e:
            raise ValueError(f"Judge {self.name!r} gave no list of numbers: {e}") from e
        if scores.shape != (n,):
            raise ValueError(f"Judge {self.name!r} gave scores of shape {scores.shape} for {n} texts.")
        bad = scores[~((scores >= 0) & (scores <= 1))]  # NaN fails both comparisons
        if bad.size:
            raise ValueError(f"Judge {self.name!r} gave {bad.size} scores outside [0, 1], such as {bad[0]}.")
        return scores


def load(name: str | Scorer, *, device: str = "cpu", batch_size: int = 64, label: str | None = None) -> Judge:
    """A judge by name.

    Parameters
    ----------
    name : str or callable
        - ``"toxicity"``, the project's default: the mean of the next two.
        - ``"tox-block"``, ``"toxic-comment-classifier"``: BiLSTMs trained on the Jigsaw comments,
          read out of the packages of that name (MIT). The raw probability: tox-block's optional
          min-max rescaling is left off.
        - ``"sentiment"``: negativity (1 - compound) / 2 by vaderSentiment; .5 is neutral.
        - otherwise a Hugging Face sequence classifier, hub id or local folder. Detoxify's models
          are on the hub as ``unitary/toxic-bert`` ("original") and
          ``unitary/unbiased-toxic-roberta`` ("unbiased", the judge of the FASP paper).
        - a function from n texts to n numbers in [0, 1].
    device : str
        Where a network runs.
    batch_size : int
        Texts per forward pass of a Hugging Face classifier.
    label : str, optional
        The class whose probability is the score. Default: ``toxicity``, ``toxic``, or the first
        that starts with "toxic". The packaged networks have those of ``LABELS``.

    A Hugging Face model's scores are sigmoids if its config says ``multi_label_classification``,
    if it has a single logit, or if it says nothing and has more than two classes of which one is
    toxic-like (Detoxify, Jigsaw); else a softmax. Long texts are cut to the model's length.

    Raises
    ------
    fetch.FetchError
        If a package or a model can't be had; the message says what to do.
    ValueError
        If the model has no such label, no trained classification head, or gives no probability.
    """
    if label and (callable(name) or name == "sentiment"):
        raise ValueError(f"A function and 'sentiment' have one score; label={label!r} can't be chosen.")
    if callable(name):
        return Judge(getattr(name, "__name__", type(name).__name__), name)
    name = str(name)  # a folder may come as a Path
    if name == "sentiment":
        scorer = _sentiment()
    elif name == "toxicity":
        nets = [_BiLSTM(n, device, label) for n in _PACKAGED]
        scorer = lambda texts: np.mean([net(texts) for net in nets], axis=0)  # noqa: E731
    elif name in _PACKAGED:
        scorer = _BiLSTM(name, device, label)
    else:
        scorer = _hugging_face(name, device, batch_size, label)
    return Judge(f"{name}:{label}" if label else name, scorer)


def _sentiment() -> Scorer:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    polarity = SentimentIntensityAnalyzer().polarity_scores  # compound in [-1, 1]
    return lambda texts: [(1 - polarity(t)["compound"]) / 2 for t in texts]


def _pick(labels: list[str], wanted: str | None, model: str) -> int:
    """Index of the wanted label, or of the one that means toxicity. ValueError if there is none."""
    low = [x.lower() for x in labels]
    if wanted is not None:
        found = [i for i, x in enumerate(low) if x == wanted.lower()]
    else:
        exact = [low.index(x) for x in ("toxicity", "toxic") if x in low]
        found = exact + [i for i, x in enumerate(low) if x.startswith("toxic")]  # not "non-toxic"
    if not found:
        what = f"no label {wanted!r}" if wanted is not None else "no label that means toxicity"
        raise ValueError(f"{model} has {what}; it has {labels}. Choose one with label=...")
    return found[0]


# --- Hugging Face classifiers ------------------------------------------------------------------


def _hugging_face(name: str, device: str, batch_size: int, label: str | None) -> Scorer:
    """Scorer of a sequence classifier: safetensors only, no code from the hub, float32."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,  # transformers 5 would keep a half-precision checkpoint as it is
            output_loading_info=True,
        )
    except Exception as e:  # the hub, config, tokenizer and safetensors all have errors of their own
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise fetch.FetchError(
            f"The judge {name!r} could not be loaded as a Hugging Face sequence classifier ({reason}). "
            "Give a local folder with its config, tokenizer and .safetensors weights, or take a packaged "
            f"judge: 'toxicity', 'sentiment', {', '.join(map(repr, _PACKAGED))}."
        ) from e
    if info["missing_keys"]:  # transformers would fill them with random numbers and only warn
        raise ValueError(f"{name} is no trained classifier: it lacks {sorted(info['missing_keys'])}.")
    config = model.config
    labels = [config.id2label[i] for i in range(config.num_labels)]
    column = _pick(labels, label, name)
    if config.problem_type == "regression":
        raise ValueError(f"{name} is a regression, no probability; wrap it in a function of your own.")
    toxic_like = any(x.lower().startswith("toxic") for x in labels)
    sigmoid = config.problem_type == "multi_label_classification" or len(labels) == 1
    sigmoid |= config.problem_type is None and len(labels) > 2 and toxic_like
    # RoBERTa's position table has padding_idx + 1 rows that no token uses
    tables = [m for k, m in model.named_modules() if k.endswith("position_embeddings")]
    tables = [m for m in tables if isinstance(m, torch.nn.Embedding)]
    rooms = [m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1) for m in tables]
    rooms.append(getattr(config, "max_position_embeddings", None) or 512)
    limit = min(tokenizer.model_max_length, *rooms)
    size = batch_size if tokenizer.pad_token is not None else 1
    model.to(device).eval()

    @torch.inference_mode()
    def score(texts: list[str]) -> np.ndarray:
        out = np.empty(len(texts))
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # like lengths: little padding
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = tokenizer(
                [texts[i] for i in rows],
                padding=size > 1,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            )
            logits = model(**batch.to(device)).logits.cpu().double()  # (rows, labels)
            probs = logits.sigmoid() if sigmoid else logits.softmax(-1)
            out[rows] = probs[:, column].numpy()
        return out

    return score


# --- the two packaged BiLSTMs ------------------------------------------------------------------

LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]  # Jigsaw, both nets
_MAXLEN = 100  # tokens; what both were trained with
_CHUNK = 512  # texts per pass: they are small, so a step costs little more than its launch
_FILTERED = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))  # by both tokenizers


class _Source(NamedTuple):
    h5: str  # the weights' path inside the wheel
    tokenizer: str  # the pickled vocabulary's
    hard_sigmoid: bool  # recurrent activation; else the sigmoid


_PACKAGED = {
    "tox-block": _Source(
        "tox_block/trained_models/lstm_model_0.1.2.h5",
        "tox_block/trained_models/encoder_0.1.2.pkl",
        hard_sigmoid=True,  # says the .h5, written by Keras 2.2.4-tf
    ),
    "toxic-comment-classifier": _Source(
        "toxic_classifier/model/model.weights.h5",
        "toxic_classifier/model/tokenizer.pickle",
        hard_sigmoid=False,  # weights only, of Keras 3, whose default is the sigmoid
    ),
}


class _Stub:
    """Stands in for the tokenizer classes: holds attributes, does nothing."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickled Keras Tokenizer, and refuses whatever else a pickle could name."""

    _ADMITTED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("builtins", "int"): int,
        ("keras_preprocessing.text", "Tokenizer"): _Stub,
        ("keras.src.legacy.preprocessing.text", "Tokenizer"): _Stub,
        ("tox_block.data_processing.preprocessors", "TokenSequencer"): _Stub,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"The pickle asks for {module}.{name}, which is not admitted.")
        return self._ADMITTED[module, name]


def _convert(name: str, folder: Path) -> None:
    """Write a packaged net into ``folder`` as weights.safetensors and vocabulary.json."""
    import h5py

    with h5py.File(io.BytesIO(fetch.read(name, _PACKAGED[name].h5))) as h5:
        if "model_weights" in h5:  # Keras 2: every layer lists its arrays
            root = h5["model_weights"]
            arrays = {k: [v[n][()] for n in v.attrs["weight_names"]] for k, v in root.items()}
        else:  # Keras 3: arrays are numbered
            root = h5["layers"]
            arrays = {k: [x[()] for x in v["vars"].values()] for k, v in root.items()}
            cells = [root[f"bidirectional/{side}_layer/cell/vars"] for side in ("forward", "backward")]
            arrays["bidirectional"] = [x[()] for cell in cells for x in cell.values()]
    weights = {"embedding": arrays["embedding"][0]}
    for k, key in enumerate(["kernel", "recurrent", "bias"]):  # (2, ...): forward, backward
        weights[f"lstm.{key}"] = np.stack(arrays["bidirectional"][k::3])
    for layer in ("dense", "dense_1"):
        weights[f"{layer}.kernel"], weights[f"{layer}.bias"] = arrays[layer]
    save_file({k: torch.from_numpy(v) for k, v in weights.items()}, folder / "weights.safetensors")
    tokenizer = _PlainUnpickler(io.BytesIO(fetch.read(name, _PACKAGED[name].tokenizer))).load()
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # tox-block's lies inside its TokenSequencer
    vocabulary = {w: i for w, i in tokenizer.word_index.items() if i < tokenizer.num_words}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary), encoding="utf-8")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: with steps this small more threads wait for each other (2 to 50 times slower)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _BiLSTM:
    """Embedding, bidirectional LSTM, maximum over time, relu layer, sigmoid layer, as Keras has them.

    Keras pads a text in front to 100 tokens with index 0, which is *not* masked. So the forward
    LSTM starts with padding, the same for all texts: its states after k steps are computed once.
    The backward LSTM ends with padding, from a state that depends on the text: it must be run,
    as the maximum is taken over those steps too. In float64 (it costs little): a score depends on
    the batch by 1e-15 only.

    tox-block's package also has a remover of links, user names and stop words. Neither its
    shipped predictor nor the shipped net's training used it (the vocabulary's first words are
    the stop words), so it is left out here.
    """

    def __init__(self, name: str, device: str, label: str | None) -> None:
        folder = fetch.build(f"judges/{name}", lambda empty: _convert(name, empty))
        self.vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64  # mps has no double
        w = {k: v.to(device, dtype) for k, v in load_file(folder / "weights.safetensors").items()}
        units = w["lstm.recurrent"].shape[1]
        for key in ("lstm.kernel", "lstm.recurrent", "lstm.bias"):  # Keras' i, f, c, o -> i, f, o, c
            i, f, c, o = w[key].split(units, dim=-1)
            w[key] = torch.cat([i, f, o, c], dim=-1)
        w["lstm.bias"] = w["lstm.bias"][:, None]  # (2, 1, 4u)
        self.w, self.units, self.hard = w, units, _PACKAGED[name].hard_sigmoid
        self.column = _pick(LABELS, label, name)
        self.padding = torch.baddbmm(w["lstm.bias"], w["embedding"][:1].expand(2, 1, -1), w["lstm.kernel"])
        self.start = self._after_padding()

    def _step(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, side: slice) -> None:
        """One step, in place. x: gate inputs (s, m, 4u); h, c: states (s, m, u); s directions."""
        z = torch.baddbmm(x.expand(-1, h.shape[1], -1), h, self.w["lstm.recurrent"][side])
        gates, new = z.split([3 * self.units, self.units], dim=-1)
        # Keras 2 has this hard sigmoid; Keras 3 and torch have x / 6 + 1/2
        gates = (0.2 * gates + 0.5).clamp(0, 1) if self.hard else gates.sigmoid()
        i, f, o = gates.split(self.units, dim=-1)
        c.mul_(f).addcmul_(i, new.tanh())
        torch.mul(o, c.tanh(), out=h)

    @torch.inference_mode()
    @_one_thread()
    def _after_padding(self) -> torch.Tensor:
        """h, c and the maximum of h so far of the forward LSTM after k padding steps (3, 101, u)."""
        h, c = self.padding.new_zeros(2, 1, 1, self.units)
        best = torch.full_like(h, -torch.inf)
        states = [torch.cat([h, c, best])]
        for _ in range(_MAXLEN):
            self._step(self.padding[:1], h, c, slice(0, 1))
            best = best.maximum(h)
            states.append(torch.cat([h, c, best]))
        return torch.cat(states, dim=1)

    def tokens(self, text: str) -> list[int]:
        """The last 100 known words' indices. Unknown words are dropped; only spaces separate."""
        words = text.lower().translate(_FILTERED).split(" ")
        return [self.vocabulary[w] for w in words if w in self.vocabulary][-_MAXLEN:]

    @torch.inference_mode()
    def _run(self, ids: list[list[int]]) -> torch.Tensor:
        """Probabilities (n, 6) of token lists that are sorted by length, longest first."""
        w, n = self.w, len(ids)
        lengths = np.array([len(x) for x in ids])
        rows = np.zeros((2, lengths[0], n), dtype=np.int64)  # (forward or backward, step, text)
        for j, x in enumerate(ids):
            rows[0, : len(x), j], rows[1, : len(x), j] = x, x[::-1]
        steps = torch.from_numpy(rows).to(w["embedding"].device)
        state = self.padding.new_zeros(3, 2, n, self.units)  # h, c, maximum of h
        state[2, 1] = -torch.inf
        state[:, 0] = self.start[:, _MAXLEN - lengths]
        h, c, best = state
        for t in range(lengths[0]):  # both directions over the words
            m = int((lengths > t).sum())  # texts that still have one
            x = torch.baddbmm(w["lstm.bias"], w["embedding"][steps[:, t, :m]], w["lstm.kernel"])
            self._step(x, h[:, :m], c[:, :m], slice(0, 2))
            torch.maximum(best[:, :m], h[:, :m], out=best[:, :m])
        for t in range(_MAXLEN - lengths[-1]):  # the backward one over the padding
            k = n - int((_MAXLEN - lengths > t).sum())  # texts from here on still have some
            self._step(self.padding[1:], h[1:, k:], c[1:, k:], slice(1, 2))
            torch.maximum(best[1:, k:], h[1:, k:], out=best[1:, k:])
        pooled = torch.cat([best[0], best[1]], dim=-1)  # (n, 2u)
        dense = torch.addmm(w["dense.bias"], pooled, w["dense.kernel"]).relu()
        return torch.addmm(w["dense_1.bias"], dense, w["dense_1.kernel"]).sigmoid()

    @_one_thread()
    def __call__(self, texts: list[str]) -> np.ndarray:
        ids = [self.tokens(t) for t in texts]
        order = sorted(range(len(ids)), key=lambda j: -len(ids[j]))
        out = np.empty(len(ids))
        for first in range(0, len(order), _CHUNK):
            rows = order[first : first + _CHUNK]
            out[rows] = self._run([ids[j] for j in rows])[:, self.column].cpu().double().numpy()
        return out
