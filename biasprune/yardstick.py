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
from scipy.special import expit

from biasprune import fetch, pronouns, weightscores
from biasprune.downstream import GROUPS
from biasprune.lm import LM
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


def chances(lm: LM, table: pd.DataFrame) -> np.ndarray:
    """How likely the woman's pronoun is after every prompt, of the two: (prompts,).

    Pronouns of several tokens count whole.

    Raises
    ------
    ValueError
        No prompts, or one that is longer than the model's context.
    """
    order = table["prompt"].str.len().sort_values(kind="stable").index  # like lengths share a batch
    out = pd.Series(np.nan, index=table.index)
    for some in np.array_split(order, max(1, len(order) // 128)):
        own = table.loc[some]
        woman, man = (
            pronouns.log_probs(lm, pronouns.continued(lm, own["prompt"].tolist(), own[c].tolist()))
            for c in ("woman", "man")
        )
        out[some] = expit(woman - man)
    return out.to_numpy()


def stereotypes(lm: LM, table: pd.DataFrame) -> pronouns.Pairs:
    """The prompts with the pronoun that most people of an occupation have, and with the other one.

    What ``pronouns.pruning`` selects heads and neurons with.
    """
    women = (table["share"] > 0.5).to_numpy()
    return pronouns.paired(
        lm, table["prompt"].tolist(), women, (table["woman"].iloc[0], table["man"].iloc[0])
    )


def slope(p: np.ndarray, share: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Least squares slope of p on the share of women: (…, prompts) → (…,), weighted by (…, prompts)."""
    w = np.ones(p.shape[-1]) if weights is None else weights
    w = w / w.sum(-1, keepdims=True)
    x = share - (w * share).sum(-1, keepdims=True)
    return (w * x * p).sum(-1) / (w * x * x).sum(-1)


# ---- fine-tuning data ------------------------------------------------------------------------------


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
    optimiser = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=0.0, fused=True)
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
                optimiser.zero_grad(set_to_none=False)  # new memory for gradients costs more than zeros
                schedule.step()
    try:
        lm.model.load_state_dict(learner.state_dict())
        del learner, optimiser
        yield
    finally:
        lm.model.load_state_dict(kept)


# ---- what is left ------------------------------------------------------------------------------------


def doses(plain: pd.DataFrame, tried: Mapping[tuple[str, float], pd.DataFrame]) -> pd.DataFrame:
    """Every share of every method on the sentences that select: method, share, bias, ppl_ratio (on prose)."""
    rows = []
    for (method, share), each in {("unchanged", 0.0): plain, **tried}.items():
        own = each[each["side"] == "select"]
        bias = float(slope(own["p"].to_numpy(), own["share"].to_numpy()))
        ratio = own["ppl_valid"].iloc[0] / plain["ppl_valid"].iloc[0]
        rows.append({"method": method, "share": share, "bias": bias, "ppl_ratio": ratio})
    return pd.DataFrame(rows)


def chosen(sweep: pd.DataFrame, most_damage: float) -> dict[str, float]:
    """Method → the share that leaves least bias, of those within the perplexity limit, if any is."""
    able = sweep[(sweep["ppl_ratio"] <= most_damage) & (sweep["method"] != "unchanged")]
    best = able.loc[able.groupby("method", sort=False)["bias"].apply(lambda b: b.abs().idxmin())]
    return dict(zip(best["method"], best["share"], strict=True))


def costs(
    each: pd.DataFrame, controls: Mapping[str, Sequence[str]], plain: str = "unchanged"
) -> pd.DataFrame:
    """What every way and control costs: way, control (bool), ppl_ratio, minutes (to select or tune)."""
    names = [plain, *(n for way, against in controls.items() for n in (way, *against))]
    mean = each.groupby("way")[["ppl_test", "minutes"]].mean().loc[names]
    return pd.DataFrame(
        {
            "way": names,
            "control": [n != plain and n not in controls for n in names],
            "ppl_ratio": (mean["ppl_test"] / mean.loc[plain, "ppl_test"]).to_numpy(),
            "minutes": mean["minutes"].to_numpy(),
        }
    )


def replicates(each: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> dict[tuple[str, str], np.ndarray]:
    """Slopes of every way in every context, and bootstrapped over items and seeds.

    Parameters
    ----------
    each
        One row per prompt, way and seed: way, seed, context, item, share, p. All ways have the same prompts.

    Returns
    -------
    dict
        (way, context) → (1 + n_boot,): the slope, then its replicates. Items are drawn alike for all ways
        and contexts, so that differences are taken replicate by replicate.
    """
    found = {}
    for items in ([NAMES], [c for c in each["context"].unique() if c != NAMES]):  # share their items
        part, rng = each[each["context"].isin(items)], np.random.default_rng(seed)
        known = pd.Index(part["item"].unique())
        counts = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=n_boot)
        counts = np.concatenate([np.ones((1, len(known)), int), counts]).astype(float)
        for way, own in part.groupby("way", sort=False):
            seeds = list(own["seed"].unique())
            drawn = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=n_boot)
            drawn = np.concatenate([np.ones((1, len(seeds)), int), drawn]) / len(seeds)
            for context, some in own.groupby("context", sort=False):
                p = np.stack([some.loc[some["seed"] == k, "p"].to_numpy() for k in seeds])
                first = some[some["seed"] == seeds[0]]
                weights = counts[:, known.get_indexer(first["item"])]
                found[str(way), str(context)] = slope(drawn @ p, first["share"].to_numpy(), weights)
    return found


def _ends(drawn: np.ndarray) -> tuple[float, float, float]:
    """The point, which comes first, and its 95 % percentile interval."""
    if np.isnan(drawn).all():
        return np.nan, np.nan, np.nan
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975])
    return float(drawn[0]), float(low), float(high)


def left(found: Mapping[tuple[str, str], np.ndarray], plain: str = "unchanged") -> pd.DataFrame:
    """Bias of every way in every context, and how much less that is than the unchanged model's.

    Returns
    -------
    DataFrame
        way, context, bias, low, high, removed, removed_low, removed_high (95 %).
    """
    contexts = [SELECTED, *sorted({c for _, c in found} - {SELECTED, NAMES}), NAMES]
    rows = []
    for way in dict.fromkeys(w for w, _ in found):
        for context in contexts:
            own = found[way, context]
            ends = [*_ends(own), *_ends(found[plain, context] - own)]
            names = ["bias", "low", "high", "removed", "removed_low", "removed_high"]
            rows.append({"way": way, "context": context, **dict(zip(names, ends, strict=True))})
    return pd.DataFrame(rows)


def _gone(found: Mapping[tuple[str, str], np.ndarray], way: str, context: str, plain: str) -> np.ndarray:
    """What a way takes from the unchanged model's bias, as a share of it."""
    return (found[plain, context] - found[way, context]) / found[plain, context][0]


def _others(found: Mapping[tuple[str, str], np.ndarray], plain: str) -> list[str]:
    """Contexts besides the one that was fixed, in which the unchanged model shows a bias."""
    other = dict.fromkeys(c for _, c in found if c not in (SELECTED, NAMES))
    return [c for c in other if _ends(found[plain, c])[1] > 0]


def removed(
    found: Mapping[tuple[str, str], np.ndarray], ways: Sequence[str], plain: str = "unchanged"
) -> pd.DataFrame:
    """Shares of the unchanged model's bias that ways remove: way, there, elsewhere, names (should stay)."""
    others = _others(found, plain)
    rows = []
    for way in ways:
        elsewhere = [_gone(found, way, c, plain)[0] for c in others]
        rows.append(
            {
                "way": way,
                "there": _gone(found, way, SELECTED, plain)[0],
                "elsewhere": np.mean(elsewhere) if elsewhere else np.nan,
                "names": _gone(found, way, NAMES, plain)[0],
            }
        )
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
        claim, ours, low, high (shares of the unchanged model's bias), verdict ("reproduced", "not
        reproduced", "undecided"), why.
    """
    others, biased = _others(found, plain), _ends(found[plain, SELECTED])[1] > 0
    nothing = np.full_like(found[plain, SELECTED], np.nan)
    rows, works = [], {}

    def gone(way: str) -> np.ndarray:
        return _gone(found, way, SELECTED, plain)

    def elsewhere(way: str) -> np.ndarray:
        return np.mean([_gone(found, way, c, plain) for c in others], axis=0) if others else nothing

    def add(claim: str, drawn: np.ndarray, why: str, able: bool = True) -> None:
        point, low, high = _ends(drawn)
        verdict = "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"
        if not biased:
            why += "; the unchanged model shows no bias there"
        row = {"claim": claim, "ours": point, "low": low, "high": high}
        rows.append({**row, "verdict": verdict if biased and able else "undecided", "why": why})

    for way, against in controls.items():
        more = gone(way) - np.mean([gone(c) for c in against], axis=0)
        works[way] = _ends(more)[1] > 0 and _ends(gone(way))[1] > 0
        point, low, high = _ends(gone(way))
        why = f"{point:.0%} ({low:.0%} – {high:.0%}) removed; ours: that of {', '.join(against)} taken off"
        add(f"{way}: lowers the bias where it was selected, more than its control", more, why)
    for way in controls:
        why = (
            f"{gone(way)[0]:.0%} there, {elsewhere(way)[0]:.0%} in {', '.join(others) or 'no other context'}"
        )
        if not works[way]:
            why += "; no effect beyond its control that could fade"
        add(f"{way}: the effect fades in other contexts", gone(way) - elsewhere(way), why, works[way])
    for way in controls:
        if way != data:
            point, low, high = _ends(elsewhere(data) - elsewhere(way))
            why = f"elsewhere {point:+.2f} ({low:+.2f} – {high:+.2f})"
            add(f"{data}: removes more than {way}", gone(data) - gone(way), why)
    return pd.DataFrame(rows)
