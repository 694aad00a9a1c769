"""The downstream grid: settings × seeds, what every intervention does, and the claims of the two papers.

Claims of Baksi et al. 2024 (arXiv 2408.00612) and, against one of them, of Steed et al., ACL 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy import stats

from biasprune import check, downstream, toxicity
from biasprune.classify import PRUNED, RANDOM, UPSTREAM, Setting, rates, summary

PLAIN = "pretrained, none"
MODEL, DATA = "model (intrinsic, upstream)", "data (share, data)"


def settings(
    upstreams: Sequence[str],
    data: Sequence[str],
    strengths: Sequence[float],
    scales: Sequence[float],
    crossed: Sequence[str] = ("randomized",),
) -> list[Setting]:
    """Every intervention on the model with the data as they are, and the plain model with all data.

    Parameters
    ----------
    data
        "scrubbed", "rebalanced".
    strengths
        λ of "co-occurrence".
    scales
        Of "perturbed".
    crossed
        Further interventions on the model that are combined with all ``strengths``.

    Raises
    ------
    ValueError
        An unknown intervention, or no "pretrained" to compare with.
    """
    known = {"scrubbed", "rebalanced"}
    if "pretrained" not in upstreams:
        raise ValueError("the grid needs upstream 'pretrained', which all others are compared with.")
    if unknown := [u for u in [*upstreams, *crossed] if u not in UPSTREAM]:
        raise ValueError(f"unknown intervention {unknown[0]!r}; there are: {', '.join(UPSTREAM)}.")
    if unknown := [d for d in data if d not in known]:
        raise ValueError(f"unknown data intervention {unknown[0]!r}; there are: {', '.join(sorted(known))}.")
    found = []
    for u in upstreams:
        for scale in scales if u == "perturbed" else [0.0]:
            found.append(Setting(upstream=u, scale=scale))
            if u == "pretrained":
                found += [Setting(data=d) for d in data]
            if u == "pretrained" or u in crossed:
                found += [
                    Setting(upstream=u, data="co-occurrence", strength=x, scale=scale) for x in strengths
                ]
    return found


def prepared(
    table: pd.DataFrame, at: Setting, seed: int, task: ModuleType = downstream
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Train, dev and test of a cell: only training rows are drawn anew; scrubbing concerns all.

    ``task`` is the module that changes data: ``downstream``, or ``toxicity``.
    """
    table = task.scrubbed(table) if at.data == "scrubbed" else table
    train, dev, test = (table[table["split"] == s].reset_index(drop=True) for s in ("train", "dev", "test"))
    if at.data == "rebalanced":
        train = task.rebalanced(train, seed, how="oversample")  # no class loses texts
    if at.data == "co-occurrence":
        train = task.co_occurrence(train, at.strength, seed)
    return train, dev, test


def women(table: pd.DataFrame) -> pd.Series:
    """Share of women in every class: label → share."""
    return (table["group"] == "female").groupby(table["label"]).mean()


def outcome(predicted: pd.DataFrame, share: pd.Series, at: Setting, seed: int, least: int = 30) -> dict:
    """One row of the table of cells, from a cell's predictions: what ``against`` and ``slopes`` take.

    ``share`` of women per class, ``least`` as in ``classify.rates``; left_out names the classes left out.
    """
    found, left_out = rates(predicted, least)
    accuracy = float((predicted["predicted"] == predicted["label"]).mean())
    rest = {"accuracy": accuracy, **summary(found, share), "left_out": ", ".join(left_out)}
    return {**_which(at, seed), **rest}


def outcome_toxicity(predicted: pd.DataFrame, at: Setting, seed: int, *, paired: bool = False) -> dict:
    """As ``outcome``, from predictions on comments, or (``paired``) on identity phrases."""
    return {**_which(at, seed), **toxicity.summary(predicted, paired=paired)}


def _which(at: Setting, seed: int) -> dict:
    return {
        "setting": at.name,
        "upstream": at.upstream,
        "data": at.data,
        "strength": at.strength,
        "seed": seed,
    }


def against(cells: pd.DataFrame, value: str = "excess") -> pd.DataFrame:
    """Every setting's difference to the plain pre-trained model, paired by seed.

    Parameters
    ----------
    cells
        One row per setting and seed: setting, seed, accuracy, and ``value``.

    Returns
    -------
    DataFrame
        setting, seeds, accuracy, value (means), effect, low, high (95 %, Student's t over seeds), sd (of the
        effect over seeds), needed (seeds that would tell an effect of this size from 0; infinite for none).

    Raises
    ------
    ValueError
        With a single seed there is no interval; missing columns, seeds, or plain pre-trained model.
    """
    check.columns(cells, ["setting", "seed", "accuracy", value], "cells")
    if PLAIN not in set(cells["setting"]):
        raise ValueError(f"no cells of the plain model ({PLAIN!r}) to compare with.")
    wide = cells.pivot(index="seed", columns="setting", values=value)
    n = len(wide)
    if n < 2:
        raise ValueError("one seed gives no interval: take three or more.")
    if wide.isna().any(axis=None):
        raise ValueError(
            f"every setting needs every seed, and a number for it: {wide.isna().any().idxmax()}."
        )
    base, rows = wide[PLAIN], []
    for name in dict.fromkeys(cells["setting"]):
        effect = wide[name] - base
        mean, (low, high, sd) = effect.mean(), _interval(effect)
        accuracy = cells.loc[cells["setting"] == name, "accuracy"].mean()
        rows.append(
            {
                "setting": name,
                "seeds": n,
                "accuracy": accuracy,
                value: wide[name].mean(),
                "effect": mean,
                "low": low,
                "high": high,
                "sd": sd,
                "needed": np.nan if name == PLAIN else seeds_needed(mean, sd),
            }
        )
    return pd.DataFrame(rows)


def beyond_random(cells: pd.DataFrame, value: str = "excess") -> pd.DataFrame:
    """How much more pruning changes the bias than removing as many parts of the same layers at random.

    Parameters
    ----------
    cells
        As ``against``; a setting's control is the one with "random for" before its name.

    Returns
    -------
    DataFrame
        setting, seeds, accuracy, control_accuracy (means), effect (on ``value``, less the control's), low,
        high (95 %, Student's t over seeds), needed (seeds that would tell it from 0). No control, no row.
    """
    wide = cells.pivot(index="seed", columns="setting", values=value)
    accuracy, rows = cells.groupby("setting")["accuracy"].mean(), []
    for name in dict.fromkeys(cells["setting"]):
        if (control := RANDOM + name) in wide:
            each = wide[name] - wide[control]
            low, high, sd = _interval(each)
            own = [name, len(each), accuracy[name], accuracy[control], each.mean(), low, high]
            rows.append([*own, seeds_needed(each.mean(), sd)])
    columns = ["setting", "seeds", "accuracy", "control_accuracy", "effect", "low", "high", "needed"]
    return pd.DataFrame(rows, columns=columns)


def seeds_needed(effect: float, sd: float) -> float:
    """How many seeds tell an effect from 0 in four of five experiments (95 % intervals)."""
    if effect == 0:
        return np.inf
    return float(max(3, np.ceil(((1.96 + 0.84) * sd / abs(effect)) ** 2 + 1)))


def slopes(cells: pd.DataFrame, value: str = "excess", most: float = 0.25) -> pd.DataFrame:
    """Change of bias per unit of λ over [0, ``most``], one slope per seed.

    Parameters
    ----------
    cells
        As ``against``, with columns upstream, data and strength; "none" counts as λ = 0.

    Returns
    -------
    DataFrame
        upstream, slope (mean over seeds), low, high (95 %, Student's t), sd (over seeds), seeds, needed
        (seeds that would tell a slope of this size from 0).
    """
    own = cells[cells["data"].isin(["none", "co-occurrence"]) & cells["strength"].between(0, most)]
    rows = []
    for upstream, part in own.groupby("upstream", sort=False):
        if part["strength"].nunique() < 2:
            continue
        each = _slopes_by_seed(part, upstream, value)
        low, high, sd = _interval(each)
        row = {"upstream": upstream, "slope": each.mean(), "low": low, "high": high, "sd": sd}
        rows.append({**row, "seeds": len(each), "needed": seeds_needed(each.mean(), sd)})
    return pd.DataFrame(rows, columns=["upstream", "slope", "low", "high", "sd", "seeds", "needed"])


def attribution(gaps: pd.DataFrame) -> pd.DataFrame:
    """What explains a class' gap: the model before fine-tuning, or the data that it was fine-tuned on?

    gap ~ intrinsic + share of women in training + upstream + data + class, errors clustered by class.

    Parameters
    ----------
    gaps
        One row per setting, seed and class: gap, label, intrinsic (of the model before fine-tuning), share
        (of women in the class' training rows), upstream, data.

    Returns
    -------
    DataFrame
        term, coefficient (of intrinsic and share: gap per standard deviation), low, high (95 %), partial_r2
        (share of the gaps' variance left by all else that the term, or the block of terms, explains).
    """
    table = gaps.assign(
        intrinsic_z=(gaps["intrinsic"] - gaps["intrinsic"].mean()) / (gaps["intrinsic"].std() or 1.0),
        share_z=(gaps["share"] - gaps["share"].mean()) / (gaps["share"].std() or 1.0),
    )
    terms = {
        "intrinsic": "intrinsic_z",
        "share": "share_z",
        "upstream": "C(upstream)",
        "data": "C(data)",
    }
    terms = {k: v for k, v in terms.items() if k not in ("upstream", "data") or table[k].nunique() > 1}
    number = table["label"].astype("category").cat.codes

    def fit(names: list[str]) -> object:
        model = smf.ols("gap ~ " + " + ".join([*(terms[t] for t in names), "C(label)"]), table)
        return model.fit(cov_type="cluster", cov_kwds={"groups": number}, use_t=True)

    whole, rows = fit(list(terms)), []
    blocks = {**{t: [t] for t in terms}, MODEL: ["intrinsic", "upstream"], DATA: ["share", "data"]}
    for name, block in blocks.items():
        less = fit([t for t in terms if t not in block])
        row = {"term": name, "partial_r2": float(1 - whole.ssr / less.ssr)}
        if (column := f"{name}_z") in whole.params:
            low, high = whole.conf_int().loc[column]
            row |= {"coefficient": whole.params[column], "low": low, "high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def learned(effects: pd.DataFrame, classes: int) -> list[str]:
    """Settings whose accuracy keeps at least half of the plain model's margin over chance.

    Below that a classifier's gaps say little: at chance there are none.
    """
    chance = 1 / check.count(classes, "classes", 2)
    plain = effects.loc[effects["setting"] == PLAIN, "accuracy"].iloc[0]
    return list(effects["setting"][effects["accuracy"] - chance >= 0.5 * (plain - chance)])


_VERDICT = ["claim", "ours", "low", "high", "verdict", "needed", "biased", "why"]


def judged(
    effects: pd.DataFrame,
    slope: pd.DataFrame,
    cells: pd.DataFrame,
    *,
    classes: int,
    barely: float = 0.25,
    slight: float = 0.25,
    by_construction: Sequence[str] = (),
    value: str = "excess",
) -> pd.DataFrame:
    """The claims, from ``against``, ``slopes`` and the cells.

    Settings that don't learn (``learned``) are left out and named. Where the plain model has no bias to lower
    (p ≥ .05 in the median over seeds), everything is undecided.

    Parameters
    ----------
    classes
        Number of classes, for chance.
    barely
        Share of the plain model's bias: what lies within ± this share, interval and all, barely changes it.
        What lies beyond it refutes C1; pruning only if it also changes more than as many parts at random do,
        which the grid needs for that.
    slight
        λ up to which changes count as slight, as in ``slopes``.
    by_construction
        Data interventions that can't leave any bias, whatever the classifier, such as scrubbing where paired
        texts then are the same. C2 leaves them out: they would win in every world. Nor is it refuted where
        slight changes are all that was done to the data.

    Returns
    -------
    DataFrame
        claim, ours, low, high, verdict ("reproduced", "not reproduced", "undecided"), needed (seeds that
        would decide an undecided one, if the effect is of this size), biased (the plain model shows a bias to
        lower), why; no row for a claim that the grid has nothing to say about.
    """
    plain = effects[effects["setting"] == PLAIN].iloc[0]
    bound, rows, able = barely * plain[value], [], learned(effects, classes)
    p = cells.loc[cells["setting"] == PLAIN, "p"].median()
    biased = bool(p < 0.05 and bound > 0)
    wide = cells.pivot(index="seed", columns="setting", values=value)
    kinds = cells.drop_duplicates("setting").set_index("setting")
    lost = [s for s in kinds.index if s not in able]
    kinds = kinds.loc[[s for s in kinds.index if s in able]]
    control = kinds["upstream"].isin(["pretrained", "randomized"]) | kinds["upstream"].str.startswith(RANDOM)
    model = kinds.index[(kinds["data"] == "none") & ~control]
    data = kinds.index[(kinds["upstream"] == "pretrained") & ~kinds["data"].isin(["none", *by_construction])]
    rest = (f"; left out, hardly learns: {', '.join(lost)}" if lost else "") + (
        "" if biased else f"; the plain model shows no bias to lower (p = {p:.2f})"
    )

    def add(claim: str, ours: float, ends: tuple, good: bool, bad: bool, needed: float, why: str) -> None:
        verdict = (
            "undecided" if not biased else "reproduced" if good else "not reproduced" if bad else "undecided"
        )
        row = {"claim": claim, "ours": ours, "low": ends[0], "high": ends[1], "verdict": verdict}
        row["needed"] = needed if verdict == "undecided" and biased else np.nan
        rows.append({**row, "biased": biased, "why": why + rest})

    if len(model):
        own = effects.set_index("setting").loc[model]
        inside = (own["low"] > -bound) & (own["high"] < bound)
        room = (bound - own["effect"].abs()).abs().clip(lower=max(bound, 1e-9) / 4)
        listed = [f"{s} {r.effect:+.4f} (accuracy {r.accuracy:.2f})" for s, r in own.iterrows()]
        chance = beyond_random(cells, value).set_index("setting").reindex(model)  # NaN without a control
        whole = ~kinds.loc[model, "upstream"].isin(PRUNED)  # these aren't mere damage to some parts
        lower = (own["high"] < -bound) & (whole | (chance["high"] < 0))
        higher = (own["low"] > bound) & (whole | (chance["low"] > 0))
        if len(alone := model[~whole & chance["effect"].isna()]):
            listed.append(f"without random parts beside it, so no evidence against C1: {', '.join(alone)}")
        for s, r in chance.dropna(subset="effect").iterrows():
            listed.append(
                f"{s} {r.effect:+.4f} ({r.low:+.4f} – {r.high:+.4f}) beyond as many parts at random"
            )
        add(
            "C1: interventions on the model barely change the bias",
            own["effect"].mean(),
            (own["low"].min(), own["high"].max()),
            bool(inside.all()),
            bool((lower | higher).any()),
            max(seeds_needed(r, s) for r, s in zip(room, own["sd"], strict=True)),
            "; ".join(listed) + f"; plain {plain[value]:.4f} (accuracy {plain['accuracy']:.2f})",
        )
    if len(model) and len(data):
        each = _best(wide, data) - _best(wide, model)
        low, high, sd = _interval(each)
        changes = kinds.loc[data]
        weak = bool(((changes["data"] == "co-occurrence") & (changes["strength"] <= slight)).all())
        add(
            "C2: the best intervention on the data lowers bias more than the best on the model",
            each.mean(),
            (low, high),
            low > 0,
            high < 0 and not weak,
            np.nan if weak else seeds_needed(each.mean(), sd),
            "what the best one lowers, chosen by the other seeds: data − model"
            + (
                f"; left out, no bias by construction: {', '.join(by_construction)}"
                if by_construction
                else ""
            )
            + ("; slight changes of the data alone, which can't refute it" if weak else ""),
        )
    known = slope[(slope["upstream"].astype(str) + ", none").isin(able)].set_index("upstream")
    if "pretrained" not in known.index:
        return pd.DataFrame(rows, columns=_VERDICT)
    one = known.loc["pretrained"]
    moves = one["high"] < 0 or one["low"] > 0
    flat = slight * one["low"] > -bound and slight * one["high"] < bound and not moves
    why = f"change of {value} per λ"
    ends = (one["low"], one["high"])
    room = bound / slight - abs(one["slope"])  # to either verdict, whichever is nearer
    needed = min(one["needed"], seeds_needed(room, one["sd"]) if room > 0 else np.inf)
    add("C3a: slight changes of co-occurrence matter", one["slope"], ends, moves, flat, needed, why)
    other, last = "C3b: such changes do nothing once pre-trained", "C4: pre-training changes what the data do"
    if "randomized" not in known.index:
        lacking = "needs a randomized model that learns, with the same changes"
        add(other, one["slope"], ends, False, moves, np.nan, f"{why}; to be reproduced it {lacking}")
        add(last, np.nan, (np.nan, np.nan), False, False, np.nan, lacking)
        return pd.DataFrame(rows, columns=_VERDICT)
    two = known.loc["randomized"]
    why += f"; randomized {two['slope']:+.4f} ({two['low']:+.4f} – {two['high']:+.4f})"
    steep, most = two["high"] < 0 or two["low"] > 0, max(needed, two["needed"])
    add(other, one["slope"], ends, flat and steep, moves, most, why)
    own = cells[cells["data"].isin(["none", "co-occurrence"])]
    each = _slopes_by_seed(own, "pretrained", value) - _slopes_by_seed(own, "randomized", value)
    begin = cells[cells["data"] == "none"].groupby("upstream")[[value, "accuracy"]].mean()
    starts = {u: f"{r[value]:.3f} (accuracy {r['accuracy']:.2f})" for u, r in begin.iterrows()}
    low, high, sd = _interval(each)
    add(
        last,
        each.mean(),
        (low, high),
        low > 0 or high < 0,
        low > -bound and high < bound and low < 0 < high,
        seeds_needed(each.mean(), sd),
        f"slope of {value} on λ, pre-trained − randomized; they start from {starts['pretrained']} and "
        f"{starts['randomized']}",
    )
    return pd.DataFrame(rows, columns=_VERDICT)


def sentence(verdicts: pd.DataFrame) -> str:
    """The claims of ``judged``, with a column data_name, in words."""
    words = []
    for name, own in verdicts.groupby("data_name", sort=False):
        none = "" if own["biased"].all() else " (the plain model shows no bias to lower)"
        each = [
            f"{r.claim}: **{r.verdict}**"
            + (f" (about {r.needed:,.0f} seeds needed)" if np.isfinite(r.needed) else "")
            for r in own.itertuples()
        ]
        words.append(f"{name}{none}. {'; '.join(each)}.")
    return " ".join(words) or "No claim can be judged: there is no intervention, or none that learns."


def _best(wide: pd.DataFrame, arms: Sequence[str]) -> pd.Series:
    """What the best of some settings lowers in each seed, the best by the mean of the other seeds."""
    lowered = -wide[list(arms)].sub(wide[PLAIN], axis=0)
    others = (lowered.sum() - lowered) / (len(lowered) - 1)
    best = others.idxmax(axis=1)
    return pd.Series({seed: lowered.loc[seed, best[seed]] for seed in lowered.index})


def _interval(each: pd.Series) -> tuple[float, float, float]:
    """95 % (Student's t over seeds), and the standard deviation."""
    sd, n = float(each.std(ddof=1)), len(each)
    reach = float(stats.t.ppf(0.975, n - 1)) * sd / np.sqrt(n)
    return float(each.mean()) - reach, float(each.mean()) + reach, sd


def _slopes_by_seed(cells: pd.DataFrame, upstream: str, value: str) -> pd.Series:
    own = cells[(cells["upstream"] == upstream) & (cells["strength"] >= 0)]
    return pd.Series({seed: np.polyfit(s["strength"], s[value], 1)[0] for seed, s in own.groupby("seed")})
