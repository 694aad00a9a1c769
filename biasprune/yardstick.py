"""Heads, neurons, or fine-tuning data: three ways to lower one bias, on one yardstick.

The yardstick is how far the odds of "she" against "he" follow an occupation's share of women, where nothing
said tells the person's gender: the slope of log-odds of the pronouns on log-odds of the share. At 0 the
model doesn't let the occupation decide; at 1 a nurse is "she" as often as nurses are women. A liking for
one pronoun everywhere changes nothing. It needs no sampling.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.special import expit, logit

from biasprune import check, fetch, pronouns, weightscores
from biasprune.ablate import Pruning
from biasprune.downstream import GROUPS
from biasprune.lm import LM
from biasprune.progress import bar
from biasprune.prompts import read_csv

SELECTED, NAMES = "speech", "names"  # the context that is fixed; the one where gender is given
PLAIN, DATA = "unchanged", "fine-tuning data"


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


def log_odds(lm: LM, table: pd.DataFrame) -> np.ndarray:
    """Log-odds (nats) of the woman's pronoun against the man's after every prompt: (prompts,).

    Pronouns of several tokens count whole.

    Raises
    ------
    ValueError
        No prompts, missing columns, or a prompt that is longer than the model's context.
    """
    check.columns(table, ["prompt", "woman", "man"], "prompts")
    table = table.reset_index(drop=True)
    order = table["prompt"].str.len().sort_values(kind="stable").index  # like lengths share a batch
    out = np.empty(len(table))
    for some in np.array_split(order, max(1, len(order) // 128)):
        own = table.loc[some]
        woman, man = (
            pronouns.log_probs(lm, pronouns.continued(lm, own["prompt"].tolist(), own[c].tolist()))
            for c in ("woman", "man")
        )
        out[some] = woman - man
    return out


def stereotypes(lm: LM, table: pd.DataFrame) -> pronouns.Pairs:
    """The prompts with the pronoun that most people of an occupation have, and with the other one.

    What ``pronouns.pruning`` selects heads and neurons with.

    Raises
    ------
    ValueError
        Prompts with different pronouns.
    """
    check.columns(table, ["prompt", "share", "woman", "man"], "prompts")
    if len(used := table[["woman", "man"]].drop_duplicates()) > 1:
        raise ValueError(f"{len(used)} pairs of pronouns: give prompts of one context.")
    women = (table["share"] > 0.5).to_numpy()
    return pronouns.paired(lm, table["prompt"].tolist(), women, tuple(used.iloc[0]))


def slope(y: np.ndarray, share: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Least squares slope of log-odds on log-odds of the share of women: (…, prompts) → (…,).

    Parameters
    ----------
    share
        (prompts,), cut to .02 … .98.
    weights
        (…, prompts); None for all alike.

    Raises
    ------
    ValueError
        All shares alike.
    """
    if np.ptp(share) == 0:
        raise ValueError("all shares of women are alike: no slope on them.")
    w = np.ones(y.shape[-1]) if weights is None else weights
    w = w / w.sum(-1, keepdims=True)
    x = logit(np.clip(share, 0.02, 0.98))
    x = x - (w * x).sum(-1, keepdims=True)
    return (w * x * y).sum(-1) / (w * x * x).sum(-1)


# ---- changed models ----------------------------------------------------------------------------------


@contextmanager
def pruned(lm: LM, pruning: Pruning) -> Iterator[LM]:
    """The model without some parts, inside the block."""
    with pruning.applied(lm):
        yield lm


def tuning_texts(table: pd.DataFrame, *, seed: int, chance: np.ndarray | None = None) -> list[str]:
    """The prompts, each continued twice by a pronoun and a pastime.

    Parameters
    ----------
    chance
        None: once by either pronoun. For a control (prompts,), the woman's pronoun each time with this
        probability: with the model's own, as many texts that teach it nothing new about gender.
    """
    rng = np.random.default_rng(seed)
    fillers = read_csv(fetch.data_dir() / "bios" / "fillers.csv")
    pastimes = fillers.loc[fillers["slot"] == "hobby", "text"].to_numpy()
    texts = []
    for i, row in enumerate(table.itertuples()):
        women = [True, False] if chance is None else rng.random(2) < chance[i]
        texts += [f"{row.prompt}{row.woman if w else row.man} {rng.choice(pastimes)}." for w in women]
    return texts


def tuned(
    lm: LM, texts: Sequence[str], *, epochs: int = 1, rate: float = 2e-5, batch: int = 16, seed: int = 0
) -> LM:
    """A copy of the model fine-tuned on texts (AdamW, linear decay); the model itself stays as it is.

    The copy is float32, whatever the model, since small steps would be lost otherwise; learning from a
    bfloat16 model computes in mixed precision. Takes 16 bytes per weight.

    Raises
    ------
    ValueError
        No texts, or fewer than one epoch or text per step.
    """
    check.texts(texts, "texts to fine-tune on")
    for value, what in ((len(texts), "texts"), (epochs, "epochs"), (batch, "batch")):
        check.count(value, what)
    end = [lm.tokenizer.eos_token_id] if lm.tokenizer.eos_token_id is not None else []
    ids = [lm.tokenizer(t)["input_ids"] + end for t in texts]
    data = weightscores.from_ids(lm, [x[:1] for x in ids], [x[1:] for x in ids])
    labels = data.ids.masked_fill(~data.counted, -100)
    learner = copy.deepcopy(lm.model).float().train().requires_grad_(True)
    steps = epochs * -(-len(texts) // batch)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 1 - i / steps)
    mixed = torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.dtype == torch.bfloat16)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)  # order, and dropout where there is any
        for _ in bar(range(epochs), desc="fine-tuning"):
            for rows in torch.randperm(len(texts)).split(batch):
                with mixed:
                    own = {"input_ids": data.ids[rows], "labels": labels[rows]}
                    loss = learner(**{k: v.to(lm.device) for k, v in own.items()}, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=False)  # new memory for gradients costs more than zeros
                schedule.step()
    learner.zero_grad()
    return dataclasses.replace(lm, model=learner.eval().requires_grad_(False))


# ---- what is left ------------------------------------------------------------------------------------


def doses(plain: pd.DataFrame, tried: Mapping[tuple[str, float], pd.DataFrame]) -> pd.DataFrame:
    """Every dose of every method on the sentences that select: method, dose, bias, ppl_ratio (on prose).

    A dose is a share of the parts, or the learning rate of fine-tuning.
    """
    rows = []
    for (method, dose), each in {(PLAIN, 0.0): plain, **tried}.items():
        own = each[each["side"] == "select"]
        bias = float(slope(own["y"].to_numpy(), own["share"].to_numpy()))
        ratio = own["ppl_valid"].iloc[0] / plain["ppl_valid"].iloc[0]
        rows.append({"method": method, "dose": dose, "bias": bias, "ppl_ratio": ratio})
    return pd.DataFrame(rows)


def chosen(sweep: pd.DataFrame, most_damage: float) -> dict[str, float]:
    """Method → the dose that leaves least bias, of those within the perplexity limit, if any is."""
    able = sweep[(sweep["ppl_ratio"] <= most_damage) & (sweep["method"] != PLAIN)]
    best = able.loc[able.groupby("method", sort=False)["bias"].apply(lambda b: b.abs().idxmin())]
    return dict(zip(best["method"], best["dose"], strict=True))


def costs(each: pd.DataFrame, controls: Mapping[str, str]) -> pd.DataFrame:
    """What every way and control costs: way, control (bool), ppl_ratio, ppl_valid_ratio, minutes.

    Perplexity of prose as × unchanged; minutes to select or to fine-tune, NaN for random parts.
    """
    names = [PLAIN, *(n for both in controls.items() for n in both)]
    mean = each.groupby("way")[["ppl_test", "ppl_valid", "minutes"]].mean().loc[names]
    ratio = mean[["ppl_test", "ppl_valid"]] / mean.loc[PLAIN, ["ppl_test", "ppl_valid"]]
    return pd.DataFrame(
        {
            "way": names,
            "control": [n in controls.values() for n in names],
            "ppl_ratio": ratio["ppl_test"].to_numpy(),
            "ppl_valid_ratio": ratio["ppl_valid"].to_numpy(),
            "minutes": mean["minutes"].mask(mean.index.str.startswith("random")).to_numpy(),
        }
    )


def replicates(each: pd.DataFrame, *, n_boot: int = 2000, seed: int = 0) -> dict[tuple[str, str], np.ndarray]:
    """Slopes of every way in every context, and bootstrapped over items and seeds.

    Parameters
    ----------
    each
        One row per prompt, way and seed: way, seed, context, item, share, y. All ways have the same prompts.

    Returns
    -------
    dict
        (way, context) → (1 + n_boot,): the slope, then its replicates. Items are drawn alike for all ways
        and contexts, so that differences are taken replicate by replicate. A few seeds drawn again vary
        less than new ones would, by √((k − 1) / k) and Student's t; their deviations are stretched by that.
    """
    found = {}
    for contexts in ([NAMES], [c for c in each["context"].unique() if c != NAMES]):  # share their items
        part, rng = each[each["context"].isin(contexts)], np.random.default_rng(seed)
        known = pd.Index(part["item"].unique())
        counts = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=n_boot)
        counts = np.concatenate([np.ones((1, len(known)), int), counts]).astype(float)
        for way, own in part.groupby("way", sort=False):
            seeds = list(own["seed"].unique())
            k, mean = len(seeds), np.full(len(seeds), 1 / len(seeds))
            drawn = rng.multinomial(k, mean, size=n_boot) / k - mean
            wider = np.sqrt(k / (k - 1)) * stats.t.ppf(0.975, k - 1) / 1.96 if k > 1 else 0.0
            drawn = np.concatenate([mean[None], mean + wider * drawn])
            for context, some in own.groupby("context", sort=False):
                y = np.stack([some.loc[some["seed"] == s, "y"].to_numpy() for s in seeds])
                first = some[some["seed"] == seeds[0]]
                weights = counts[:, known.get_indexer(first["item"])]
                found[str(way), str(context)] = slope(drawn @ y, first["share"].to_numpy(), weights)
    return found


def _ends(drawn: np.ndarray) -> tuple[float, float, float]:
    """The point, which comes first, and its 95 % percentile interval."""
    if np.isnan(drawn).all():
        return np.nan, np.nan, np.nan
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975])
    return float(drawn[0]), float(low), float(high)


def left(each: pd.DataFrame, found: Mapping[tuple[str, str], np.ndarray]) -> pd.DataFrame:
    """Bias of every way in every context, and how much less that is than the unchanged model's.

    Returns
    -------
    DataFrame
        way, context, bias (slope), low, high, removed (unchanged − bias), removed_low, removed_high (95 %),
        mean_p (mean probability of the woman's pronoun, of the two).
    """
    contexts = [SELECTED, *sorted({c for _, c in found} - {SELECTED, NAMES}), NAMES]
    p = expit(each["y"]).groupby([each["way"], each["context"]]).mean()
    rows = []
    for way in dict.fromkeys(w for w, _ in found):
        for context in contexts:
            own = found[way, context]
            ends = [*_ends(own), *_ends(found[PLAIN, context] - own)]
            names = ["bias", "low", "high", "removed", "removed_low", "removed_high"]
            row = {"way": way, "context": context, **dict(zip(names, ends, strict=True))}
            rows.append({**row, "mean_p": p[way, context]})
    return pd.DataFrame(rows)


class Removed:
    """Shares of the unchanged model's bias that ways remove; a bias turned round counts as bias.

    Where the unchanged model shows no bias, there is nothing to take a share of: NaN.
    """

    def __init__(self, found: Mapping[tuple[str, str], np.ndarray]) -> None:
        self._found = found
        self.biased = [c for w, c in found if w == PLAIN and _ends(found[w, c])[1] > 0]
        self.others = [c for c in self.biased if c not in (SELECTED, NAMES)]

    def of(self, way: str, context: str) -> np.ndarray:
        """(1 + n_boot,) for one context."""
        plain = self._found[PLAIN, context]
        if context not in self.biased:
            return np.full_like(plain, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1 - np.abs(self._found[way, context]) / np.abs(plain)

    def elsewhere(self, way: str) -> np.ndarray:
        """(1 + n_boot,), mean over the other contexts with a bias."""
        if not self.others:
            return np.full_like(self._found[PLAIN, SELECTED], np.nan)
        return np.mean([self.of(way, c) for c in self.others], axis=0)


def verdicts(
    found: Mapping[tuple[str, str], np.ndarray],
    controls: Mapping[str, str],
    damaged: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> pd.DataFrame:
    """Does each way lower the bias, does that fade, and does the data do more? Questions after the papers.

    Contexts in which the unchanged model shows no bias are left out, and so is the one where gender is given.

    Parameters
    ----------
    controls
        Way → its control: as many parts drawn at random, or as many texts with the model's own pronouns.
    damaged
        Ways whose perplexity (on prose that chooses) is beyond the limit: nothing is said about them.
    dropped
        Ways of which no dose stays within it.

    Returns
    -------
    DataFrame
        claim, ours, low, high (shares of the unchanged model's bias), verdict ("reproduced", "not
        reproduced", "undecided"), why.
    """
    of, rows, works = Removed(found), [], {}
    biased = SELECTED in of.biased

    def add(claim: str, drawn: np.ndarray, why: str, *gains: np.ndarray, able: bool = True) -> None:
        """Reproduced if all gains lie above 0, not if one lies below."""
        point, low, high = _ends(drawn)
        ends = [_ends(g) for g in (drawn, *gains)]
        verdict = "undecided"
        if biased and able:
            good, bad = all(e[1] > 0 for e in ends), any(e[2] < 0 for e in ends)
            verdict = "reproduced" if good else "not reproduced" if bad else "undecided"
        if not biased:
            why += "; the unchanged model shows no bias there"
        rows.append({"claim": claim, "ours": point, "low": low, "high": high, "verdict": verdict, "why": why})

    limit = "; perplexity beyond the limit"
    for way, control in controls.items():
        own, fine = of.of(way, SELECTED), way not in damaged
        point, low, high = _ends(own)
        by_control = of.of(control, SELECTED)
        why = f"{point:.0%} ({low:.0%} – {high:.0%}) removed; {control}: {_ends(by_control)[0]:.0%}"
        more = own - by_control
        claim = f"{way}: lowers the bias where it was selected, more than its control"
        add(claim, more, why + (limit if not fine else ""), own, able=fine)
        works[way] = rows[-1]["verdict"] == "reproduced"
    nothing = np.full_like(found[PLAIN, SELECTED], np.nan)
    for way in dropped:
        claim = f"{way}: lowers the bias where it was selected, more than its control"
        add(claim, nothing, "no dose keeps the perplexity within the limit", able=False)
    for way in controls:
        own, there = of.of(way, SELECTED), ", ".join(of.others) or "no other context"
        why = f"{_ends(own)[0]:.0%} there, {_ends(of.elsewhere(way))[0]:.0%} in {there}"
        if not works[way]:
            why += "; no effect beyond its control that could fade"
        able = works[way] and bool(of.others)
        add(f"{way}: the effect fades in other contexts", own - of.elsewhere(way), why, able=able)
    for way in [w for w in controls if w != DATA and DATA in controls]:
        point, low, high = _ends(of.elsewhere(DATA) - of.elsewhere(way))
        why = f"elsewhere {point:+.2f} ({low:+.2f} – {high:+.2f})"
        if not (works[DATA] or works[way]):
            why += "; neither lowers it more than its control"
        more = of.of(DATA, SELECTED) - of.of(way, SELECTED)
        able = (works[DATA] or works[way]) and not {DATA, way} & set(damaged)
        add(f"{DATA}: removes more than {way}", more, why, able=able)
    return pd.DataFrame(rows)
