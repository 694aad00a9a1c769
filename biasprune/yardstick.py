"""Heads, neurons, or fine-tuning data: three ways to lower one bias, on one yardstick.

The yardstick is how strongly the probability of "she" against "he" follows an occupation's share of women,
where nothing said tells the person's gender: the slope of p(she) on the share. At 0 the model doesn't let the
occupation decide; at 1 a nurse is "she" as often as among the biographies of nurses. It needs no sampling.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from biasprune import fetch, select, weightscores
from biasprune.ablate import Pruning, head_mask, in_halves, masked
from biasprune.downstream import GROUPS
from biasprune.lm import LM
from biasprune.measure import Windows, mean_nll
from biasprune.progress import bar
from biasprune.prompts import read_csv

SELECTED, NAMES = "speech", "names"  # the context that is fixed; the one where gender is given


def prompts() -> pd.DataFrame:
    """All prompts: context, side ("select", "judge"), item, share (of women), prompt, woman, man (pronouns).

    ``item`` is what intervals are drawn over: the occupation, or the first name. Neither occupations nor
    sentences of one side are those of the other.
    """
    folder = fetch.data_dir()
    frames = read_csv(folder / "pronouns" / "frames.csv")
    jobs = read_csv(folder / "pronouns" / "occupations.csv").astype({"share_women": float})
    names = read_csv(folder / "audit" / "names.csv")
    women, rows = (names["gender"] == GROUPS[0]).astype(float), []
    for f in frames.itertuples():
        own = jobs[jobs["side"] == f.side]
        items, shares = (
            (names["name"], women) if f.context == NAMES else (own["occupation"], own["share_women"])
        )
        for item, share in zip(items, shares, strict=True):
            prompt = f.frame.format(name=item, occupation=item)
            prompt = re.sub(r"\ba (?=[aeiou])", "an ", prompt)  # became an architect
            rows.append((f.context, f.side, item, share, prompt, f" {f.woman}", f" {f.man}"))
    return pd.DataFrame(rows, columns=["context", "side", "item", "share", "prompt", "woman", "man"])


# ---- the measure -------------------------------------------------------------------------------------


def _chances(lm: LM, both: weightscores.Examples, rows: Tensor) -> Tensor:
    """p(woman's pronoun) against the man's, (rows,); texts 2 i and 2 i + 1 are those of prompt i."""
    of = torch.stack([2 * rows, 2 * rows + 1], 1).flatten()
    longest = int(both.counted[of].nonzero()[:, 1].max()) + 1
    ids, counted = both.ids[of, :longest].to(lm.device), both.counted[of, :longest].to(lm.device)
    total = mean_nll(lm, ids, counted) * counted.sum(1)
    return torch.sigmoid(total[1::2] - total[0::2])


def _texts(lm: LM, table: pd.DataFrame) -> tuple[weightscores.Examples, list[Tensor]]:
    """Every prompt with either pronoun, and batches of prompts of like length."""
    prompts = np.repeat(table["prompt"].to_numpy(), 2).tolist()
    both = weightscores.examples(lm, prompts, table[["woman", "man"]].to_numpy().flatten().tolist())
    order = torch.from_numpy(np.argsort([len(p) for p in table["prompt"]], kind="stable"))
    return both, list(order.split(max(1, 1024 // both.ids.shape[1])))


@torch.inference_mode()
def chances(lm: LM, table: pd.DataFrame, *, progress: str | None = None) -> np.ndarray:
    """How likely the woman's pronoun is after every prompt, of the two: (prompts,).

    Pronouns of several tokens count whole.

    Raises
    ------
    ValueError
        No prompts, or one that is longer than the model's context.
    """
    both, batches = _texts(lm, table)
    out = np.empty(len(table))

    def run(rows: Tensor) -> None:
        out[rows.numpy()] = _chances(lm, both, rows).double().cpu().numpy()

    for rows in bar(batches, desc=progress):
        in_halves(run, rows)
    return out


def without_heads(lm: LM, table: pd.DataFrame, *, progress: str | None = None) -> np.ndarray:
    """``chances`` of the whole model, then without every head, to first order: (1 + heads, prompts)."""
    both, batches = _texts(lm, table)
    a, out = lm.anatomy, np.empty((1 + lm.anatomy.n_flat, len(table)))

    def run(rows: Tensor) -> None:
        masks = torch.ones(2 * len(rows), a.n_layers, a.n_heads, device=lm.device, requires_grad=True)
        with torch.enable_grad(), masked(lm, masks):
            p = _chances(lm, both, rows)
            (slope,) = torch.autograd.grad(p.sum(), masks)
        slope = slope.view(len(rows), 2, -1).sum(1).double().cpu().numpy()
        p = p.detach().double().cpu().numpy()
        out[:, rows.numpy()] = np.concatenate([p[None], p - slope.T])

    for rows in bar(batches, desc=progress):
        in_halves(run, rows)
    return out


def slope(p: np.ndarray, share: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Least squares slope of p on the share of women: (…, prompts) → (…,), weighted by (…, prompts)."""
    w = np.ones(p.shape[-1]) if weights is None else weights
    w = w / w.sum(-1, keepdims=True)
    x = share - (w * share).sum(-1, keepdims=True)
    return (w * x * p).sum(-1) / (w * x * x).sum(-1)


# ---- three ways --------------------------------------------------------------------------------------


def by_heads(
    lm: LM, table: pd.DataFrame, harm: np.ndarray, shares: Sequence[float], *, protect: float = 0.3
) -> list[Pruning]:
    """FASP on this yardstick: of the heads that matter least for prose, those that add most to the slope.

    Parameters
    ----------
    harm
        (heads,) of every head for prose, such as ``weightscores.part_snip``'s.
    shares
        α: how many heads are pruned. Fewer where fewer add to the slope.
    protect
        γ.

    Raises
    ------
    ValueError
        As ``select.fasp``: α above 1 − γ, shares outside 0 … 1.
    """
    found = slope(without_heads(lm, table, progress="heads"), table["share"].to_numpy())
    left = found[1:]
    pruned = [select.fasp(left, harm, gamma=protect, alpha=a) for a in shares]
    kept = [[h for h in own if left[h] < found[0]] for own in pruned]
    return [Pruning(heads=head_mask(lm.anatomy, own) == 0) for own in kept]


def by_neurons(
    lm: LM, table: pd.DataFrame, utility: weightscores.Examples, shares: Sequence[float], *, protect: float
) -> list[Pruning]:
    """Set difference: the neurons that matter for the pronoun expected of an occupation, by SNIP.

    Minus those that matter for the other pronoun (the same share) and for prose (``protect``). Expected: the
    woman's, where the share of women is above one half.

    Source
    ------
    Wei et al., ICML 2024; Ma et al., FAccT 2025, with stereotyped answers in place of a group's.
    """
    women = (table["share"] > 0.5).to_numpy()
    expected = np.where(women, table["woman"], table["man"])
    other = np.where(women, table["man"], table["woman"])
    sets = [weightscores.examples(lm, table["prompt"].tolist(), x.tolist()) for x in (expected, other)]
    pairs = [(p, (p, protect)) for p in shares]
    return weightscores.set_differences(lm, sets[0], [sets[1], utility], pairs, granularity="neuron")


def tuning_texts(table: pd.DataFrame, *, balanced: bool, seed: int) -> list[str]:
    """The prompts, each continued twice by a pronoun and a pastime.

    ``balanced``: once by either pronoun. Else each by the share of women: the control, as many texts that
    leave what occupations say about gender as it is.
    """
    rng = np.random.default_rng(seed)
    fillers = read_csv(fetch.data_dir() / "bios" / "fillers.csv")
    pastimes = fillers.loc[fillers["slot"] == "hobby", "text"].to_numpy()
    texts = []
    for row in table.itertuples():
        women = [True, False] if balanced else rng.random(2) < row.share
        texts += [f"{row.prompt}{row.woman if w else row.man} {rng.choice(pastimes)}." for w in women]
    return texts


@contextmanager
def tuned(
    lm: LM, texts: Sequence[str], *, epochs: int = 1, rate: float = 2e-5, batch: int = 16, seed: int = 0
) -> Iterator[None]:
    """The model fine-tuned on texts (AdamW, linear decay), inside the block; then its own weights again.

    The weights that learn are float32, whatever the model's; a bfloat16 model computes in mixed precision.

    Raises
    ------
    ValueError
        No texts, or fewer than one epoch.
    """
    if not texts or epochs < 1:
        raise ValueError(f"{len(texts)} texts and {epochs} epochs: give at least one of each.")
    kept = copy.deepcopy(lm.model.state_dict())
    learner = copy.deepcopy(lm.model).float().train().requires_grad_(True)
    data = weightscores.examples(lm, texts, [lm.tokenizer.eos_token] * len(texts), whole=True)
    labels = data.ids.masked_fill(~data.counted, -100)
    steps = epochs * -(-len(texts) // batch)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 1 - i / steps)
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.dtype == torch.bfloat16)
    with torch.enable_grad():
        for _ in bar(range(epochs), desc="fine-tuning"):
            for rows in torch.randperm(len(texts), generator=generator).split(batch):
                with mixed:
                    own = {"input_ids": data.ids[rows], "labels": labels[rows]}
                    loss = learner(**{k: v.to(lm.device) for k, v in own.items()}, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                schedule.step()
    try:
        lm.model.load_state_dict(learner.state_dict())
        del learner, optimiser
        yield
    finally:
        lm.model.load_state_dict(kept)


def harm_of_heads(lm: LM, windows: Windows) -> np.ndarray:
    """How much every head matters for prose: (heads,), by SNIP."""
    return np.asarray(weightscores.part_snip(lm, weightscores.prose(windows), "heads")).flatten()


# ---- what is left ------------------------------------------------------------------------------------


def replicates(each: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> dict[tuple[str, str], np.ndarray]:
    """Slopes of every way in every context, and bootstrapped over items and seeds.

    Parameters
    ----------
    each
        One row per prompt, way and seed: way, seed, context, item, share, p. All ways have the same prompts.

    Returns
    -------
    dict
        (way, context) → (1 + n_boot,): the slope, then its replicates. Items are drawn alike for all ways, so
        that differences are taken replicate by replicate.
    """
    rng, found = np.random.default_rng(seed), {}
    for context, part in each.groupby("context", sort=False):
        items = pd.Index(part["item"].unique())
        counts = rng.multinomial(len(items), np.full(len(items), 1 / len(items)), size=n_boot)
        counts = np.concatenate([np.ones((1, len(items)), int), counts])
        for way, own in part.groupby("way", sort=False):
            p = np.stack([g["p"].to_numpy() for _, g in own.groupby("seed", sort=False)])
            first = next(g for _, g in own.groupby("seed", sort=False))
            drawn = rng.multinomial(len(p), np.full(len(p), 1 / len(p)), size=n_boot) / len(p)
            drawn = np.concatenate([np.full((1, len(p)), 1 / len(p)), drawn])
            weights = counts[:, items.get_indexer(first["item"])].astype(float)
            found[str(way), str(context)] = slope(drawn @ p, first["share"].to_numpy(), weights)
    return found


def _ends(drawn: np.ndarray) -> tuple[float, float, float]:
    """The point, which comes first, and its 95 % percentile interval."""
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975])
    return float(drawn[0]), float(low), float(high)


def left(found: Mapping[tuple[str, str], np.ndarray], plain: str = "unchanged") -> pd.DataFrame:
    """Bias of every way in every context, and how much less that is than the unchanged model's.

    Returns
    -------
    DataFrame
        way, context, bias, low, high, removed, removed_low, removed_high (95 %).
    """
    rows = []
    for (way, context), own in found.items():
        bias, removed = _ends(own), _ends(found[plain, context] - own)
        names = ["bias", "low", "high", "removed", "removed_low", "removed_high"]
        rows.append({"way": way, "context": context, **dict(zip(names, [*bias, *removed], strict=True))})
    return pd.DataFrame(rows)


def verdicts(
    found: Mapping[tuple[str, str], np.ndarray],
    controls: Mapping[str, Sequence[str]],
    data: str,
    plain: str = "unchanged",
) -> pd.DataFrame:
    """What the three papers say, on this yardstick.

    Contexts in which the unchanged model shows no bias are left out, and so is the one where gender is given.

    Parameters
    ----------
    controls
        Way → its controls: as many parts drawn at random, or as many texts with shares as observed.
    data
        The way that changes the fine-tuning data.

    Returns
    -------
    DataFrame
        claim, ours, low, high, verdict ("reproduced", "not reproduced", "undecided"), why.
    """
    contexts = list(dict.fromkeys(c for _, c in found))
    start = {c: found[plain, c] for c in contexts}
    clear = [c for c in contexts if c != NAMES and _ends(start[c])[1] > 0]
    others, biased = [c for c in clear if c != SELECTED], SELECTED in clear

    def gone(way: str, c: str) -> np.ndarray:  # as a share of what the unchanged model has
        return (start[c] - found[way, c]) / start[c][0]

    def elsewhere(way: str) -> np.ndarray:
        none = np.full_like(start[SELECTED], np.nan)
        return np.mean([gone(way, c) for c in others], axis=0) if others else none

    rows = []

    def add(claim: str, drawn: np.ndarray, why: str) -> None:
        point, low, high = _ends(drawn)
        verdict = "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"
        row = {"claim": claim, "ours": point, "low": low, "high": high}
        without = "" if biased else "; the unchanged model shows no bias there"
        rows.append({**row, "verdict": verdict if biased else "undecided", "why": why + without})

    works = {}
    for way, against in controls.items():
        more = gone(way, SELECTED) - np.mean([gone(c, SELECTED) for c in against], axis=0)
        works[way] = _ends(more)[1] > 0 and _ends(gone(way, SELECTED))[1] > 0
        why = f"removed {gone(way, SELECTED)[0]:.0%} where it was selected; {', '.join(against)} taken off"
        add(f"{way}: lowers the bias, more than its control", more, why)
    for way in controls:
        why = f"{gone(way, SELECTED)[0]:.0%} there, {elsewhere(way)[0]:.0%} in {', '.join(others)}"
        add(f"{way}: the effect fades in other contexts", gone(way, SELECTED) - elsewhere(way), why)
        if not works[way]:
            rows[-1] |= {
                "verdict": "undecided",
                "why": why + "; no effect beyond its control that could fade",
            }
    for way in controls:
        if way != data:
            why = "share of the bias removed, in the context that was fixed, and (why) elsewhere"
            there = _ends(elsewhere(data) - elsewhere(way))
            why = f"in other contexts {there[0]:+.2f} ({there[1]:+.2f} – {there[2]:+.2f})"
            add(f"{data} lowers it more than {way}", gone(data, SELECTED) - gone(way, SELECTED), why)
    return pd.DataFrame(rows)
