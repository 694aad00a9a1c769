"""Selecting parts against a gap between names, and what is left of it for other questions and names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from biasprune import answers, audit, gaps, measure, weightscores
from biasprune.ablate import Pruning
from biasprune.lm import LM
from biasprune.progress import bar

# method → granularity, and how it selects
METHODS = {
    "heads, set difference": ("head", "difference"),
    "heads, slope": ("head", "slope"),
    "neurons, set difference": ("neuron", "difference"),
    "neurons, slope": ("neuron", "slope"),
    "weights, set difference": ("weight", "difference"),
    "weights, Wanda": ("weight", "wanda"),
    "weights, as published": ("weight", "as published"),
}


def granularity(method: str) -> str:
    """ "heads", "neurons" or "weights"."""
    return method.split(",")[0]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A model, what it answered unpruned, and how it is compared.

    Attributes
    ----------
    sampled
        The unpruned model's answers, of ``audit.ask``.
    numbers
        Of ``answers.candidates``.
    utility
        Prose whose most important parts no selection removes, but for "as published".
    windows
        Other prose, for perplexity.
    protect
        Share of parts protected for the utility set, by granularity.
    q
        Set difference: the share protected for the first group, × the share pruned for the second. The
        second-hand account of the paper has 40 heads minus 5, and equal shares (.15) or nearly so (.40
        and .35) of weights.
    most, drawing
        How many numbers a pruned model's distribution is read off for, per question, and how its answers
        are sampled (options of ``audit.ask``).
    by, groups, log, temperature
        As in ``gaps.gaps`` and ``answers.distribution``. Parts are removed that serve the second group.
    """

    lm: LM
    sampled: pd.DataFrame
    numbers: Mapping[tuple[str, str], answers.Numbers]
    utility: weightscores.Examples
    windows: measure.Windows
    by: str = "race"
    groups: tuple[str, str] = ("white", "black")
    log: bool = True
    temperature: float = 0.6
    protect: Mapping[str, float] = field(
        default_factory=lambda: {"heads": 0.3, "neurons": 0.01, "weights": 0.05}
    )
    most: int = 24
    drawing: Mapping = field(default_factory=lambda: {"seeds": (0, 1), "max_new_tokens": 10, "top_k": 50})
    q: Mapping[str, float] = field(default_factory=lambda: {"heads": 0.125, "neurons": 1.0, "weights": 1.0})
    _kept: dict = field(default_factory=dict, repr=False, compare=False)

    def select(self, method: str, asked: pd.DataFrame, shares: Sequence[float]) -> list[Pruning]:
        """What a method removes, from the questions and labels of ``asked``, for every share.

        Parameters
        ----------
        method
            One of ``METHODS``. "set difference": the top share by SNIP on the second group's answers,
            minus the top ``q`` × share on the first's. "Wanda": the same by Wanda, per output row.
            "slope": the share that adds most to the gap to first order, as FASP: of what isn't
            protected. All of them leave out what matters most for the utility set. "as published":
            Wanda without a utility set, every layer scored on the embeddings, pruned in place one
            question after the other (Ma et al.'s public notebook).

        Raises
        ------
        ValueError
            Unknown method, a share outside 0 … 1, a group without numeric answers.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are: {', '.join(METHODS)}.")
        what, how = METHODS[method]
        if how == "slope":
            return self._by_slope(what, asked, shares)
        if how == "as published":
            return [self._in_place(asked, p) for p in shares]
        bias, protect = self._sets(asked)
        options = {"score": "wanda", "per_row": True} if how == "wanda" else {}
        parts = granularity(method)
        # of few heads at least one: a share of less than one would protect nothing
        least = 1.0 / self.lm.anatomy.n_flat + 1e-9 if parts == "heads" else 0.0
        pairs = [(p, (max(least, self.q[parts] * p), self.protect[parts])) for p in shares]
        protect = [*protect, self.utility]
        return weightscores.set_differences(self.lm, bias, protect, pairs, granularity=what, **options)

    def _sets(self, asked: pd.DataFrame) -> tuple[weightscores.Examples, list[weightscores.Examples]]:
        own = [answers.own_answers(self.lm, asked, self.sampled, self.by, g) for g in reversed(self.groups)]
        return own[0], own[1:]

    def _read(self, asked: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """Slopes of heads and units, and moments of the unpruned model; kept, since controls ask again."""
        found = []
        for key, one in asked.groupby(gaps.QUESTION, sort=False):
            name = ("slopes", key, tuple(one["prompt"]))
            if name not in self._kept:
                reading = {"temperature": self.temperature}
                made = answers.slopes(self.lm, one, self.numbers, log=self.log, **reading)
                dist = answers.distribution(self.lm, one, self.numbers, **reading)
                self._kept[name] = (*made, gaps.moments(dist, log=self.log))
            heads, units, each = self._kept[name]
            # the labels of this call, which may be a control's
            found.append((heads, units, each.assign(**{self.by: one[self.by].to_numpy()})))
        heads, units, each = zip(*found, strict=True)
        return np.concatenate(heads), np.concatenate(units), pd.concat(each, ignore_index=True)

    def _harm(self, parts: str) -> torch.Tensor:
        if parts not in self._kept:
            self._kept[parts] = torch.from_numpy(weightscores.part_snip(self.lm, self.utility, parts))
        return self._kept[parts]

    def _by_slope(self, what: str, asked: pd.DataFrame, shares: Sequence[float]) -> list[Pruning]:
        parts = weightscores.GRANULARITIES[what]
        asked = pd.concat([g for _, g in asked.groupby(gaps.QUESTION, sort=False)], ignore_index=True)
        heads, units, each = self._read(asked)
        of = heads if parts == "heads" else units
        slope = gaps.slope_of_gap(of, asked, each, by=self.by, groups=self.groups)
        share = self.protect["heads" if parts == "heads" else "neurons"]
        free = ~weightscores.top_share(self._harm(parts), share) & torch.from_numpy(slope > 0)
        own = torch.from_numpy(slope).masked_fill(~free, -torch.inf)
        made = [Pruning(**{parts: weightscores.top_share(own, p) & free}) for p in shares]
        for pruning, p in zip(made, shares, strict=True):
            weightscores.check_size(self.lm, pruning, f"{what}, slope: top {p}")
        return made

    def _in_place(self, asked: pd.DataFrame, share: float) -> Pruning:
        so_far = Pruning()
        for _, one in asked.groupby(gaps.QUESTION, sort=False):
            bias, protect = self._sets(one)
            with so_far.applied(self.lm):
                (more,) = weightscores.set_differences(
                    self.lm,
                    bias,
                    protect,
                    [(share, share)],
                    granularity="weight",
                    score="wanda",
                    per_row=True,
                    rule="as_published",
                )
            so_far = so_far | more
        return so_far

    def controls(
        self, method: str, asked: pd.DataFrame, share: float, own: Pruning, draws: int, shuffles: int = 1
    ) -> dict[str, Pruning]:
        """Prunings that have nothing to do with these groups: "random 0", "swapped 0", "shuffled 0", …

        Random: as many parts of the same layers or matrices. The groups swapped (a slope has no direction
        to swap, so it has no such control), or the names' labels shuffled: selected anew with the same
        share, which may come to other numbers of parts.

        Raises
        ------
        ValueError
            Without a random draw there is nothing to compare with.
        """
        if draws < 1:
            raise ValueError(f"{draws} random draws: a selection needs at least one to be compared with.")
        made = {f"random {k}": own.random(self.lm, k) for k in range(draws)}
        if METHODS[method][1] != "slope":
            (made["swapped 0"],) = self.select(method, audit.relabelled(asked, self.by, self.groups), [share])
        for k in range(shuffles):
            shuffled = audit.relabelled(asked, self.by, self.groups, seed=k)
            (made[f"shuffled {k}"],) = self.select(method, shuffled, [share])
        return made

    def evaluate(
        self, prunings: Mapping[str, Pruning], asked: pd.DataFrame, *, progress: str | None = None
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Every pruned model's expected answers, and its health.

        A pruned model may answer with other numbers, so each is asked for its own first.

        Parameters
        ----------
        prunings
            Name → what is removed; "" is the unpruned model by custom.

        Returns
        -------
        (each, health)
            each: column pruning, then as ``gaps.moments``; questions without two different numbers among
            the answers have NaN. health: pruning, parts (number removed), ppl, and per context and
            variation of the sampled answers smd, unparsable, distinct and inliers, as in ``gaps.gaps``.
        """
        each, health = [], []
        versus = {"by": self.by, "groups": self.groups, "log": self.log}
        for name, pruning in bar(prunings.items(), desc=progress):
            with pruning.applied(self.lm):
                said = audit.ask(self.lm, asked, temperature=self.temperature, **self.drawing)
                numbers = answers.candidates(self.lm, said, most=self.most, log=self.log, strict=False)
                known = [k in numbers for k in zip(asked["context"], asked["variation"], strict=True)]
                dist = asked[~np.array(known)].drop(columns="prompt").assign(value=np.nan, p=0.0)
                if any(known):
                    some = asked[known].reset_index(drop=True)
                    read = answers.distribution(self.lm, some, numbers, temperature=self.temperature)
                    dist = pd.concat([read, dist], ignore_index=True)
                ppl = float(measure.perplexity(measure.nll(self.lm, self.windows), self.windows)[0])
            each.append(gaps.moments(dist, log=self.log).assign(pruning=name))
            with warnings.catch_warnings():  # a dead model has no gap: its health says so
                warnings.filterwarnings("ignore", message=".*no gap can be measured")
                own = gaps.gaps(said, reference=self.sampled, n_boot=2, **versus)
            own = own[[*gaps.QUESTION, "smd", "unparsable", "distinct", "inliers"]]
            health.append(own.assign(pruning=name, parts=len(pruning), ppl=ppl))
        return pd.concat(each, ignore_index=True), pd.concat(health, ignore_index=True)

    def questions(self, asked: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
        """(context, variation) → its rows."""
        return dict(list(asked.groupby(gaps.QUESTION, sort=False)))

    def levels(
        self, method: str, share: float, label: str, train: pd.DataFrame, test: pd.DataFrame
    ) -> dict[tuple[str, str], tuple[Pruning, pd.DataFrame]]:
        """What a method removes at every level of generality, and the questions to judge it by.

        Parameters
        ----------
        label
            "own", or a control: "swapped", "shuffled 0", "random 0", … (the last draws as many parts as
            the method removes).
        train, test
            Questions about the names to select with and about the others.

        Returns
        -------
        dict
            (level, what it was selected on) → (pruning, questions). Levels: "same question"; "other
            questions of the context", what they have in common; "whole context", what its questions
            have in common, judged by all contexts' questions.
        """
        kind, _, seed = label.partition(" ")
        chosen, by_question = {}, self.questions(test)
        for key, asked in self.questions(train).items():
            if kind in ("swapped", "shuffled"):
                number = int(seed) if kind == "shuffled" else None
                asked = audit.relabelled(asked, self.by, self.groups, seed=number)
            (chosen[key],) = self.select(method, asked, [share])
        contexts: dict[str, list[tuple[str, str]]] = {}
        for key in chosen:
            contexts.setdefault(key[0], []).append(key)
        made = {}
        for context, keys in contexts.items():
            for key in keys:
                on = f"{context}: {key[1]}"
                made["same question", on] = chosen[key], by_question[key]
                if others := [chosen[k] for k in keys if k != key]:
                    made["other questions of the context", on] = common(others), by_question[key]
            made["whole context", context] = common([chosen[k] for k in keys]), test
        if kind == "random":
            made = {k: (own.random(self.lm, int(seed)), of) for k, (own, of) in made.items()}
        return made

    def judge_levels(
        self, method: str, share: float, label: str, train: pd.DataFrame, test: pd.DataFrame
    ) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
        """``levels``, evaluated: as ``evaluate``, with columns method, label, level, selected_for.

        A whole context is told apart into "the whole context itself" and "another context".
        """
        tables: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
        made = self.levels(method, share, label, train, test)
        for (level, on), (pruning, asked) in bar(made.items(), desc=f"{method}, {label}"):
            for out, table in zip(tables, self.evaluate({on: pruning}, asked), strict=True):
                own = np.where(table["context"] == on, LEVELS[2], LEVELS[3])
                table = table.rename(columns={"pruning": "selected_for"})
                table = table.assign(level=own if level == "whole context" else level)
                out.append(table.assign(method=method, label=label))
        return pd.concat(tables[0], ignore_index=True), pd.concat(tables[1], ignore_index=True)


LEVELS = ("same question", "other questions of the context", "the whole context itself", "another context")


def common(prunings: Sequence[Pruning]) -> Pruning:
    """What all of them remove: the generalised model of "Breaking Down Bias"."""
    return reduce(lambda a, b: a & b, prunings)


def published_heads() -> pd.DataFrame:
    """The published effect of head pruning on Llama-3-8B-Instruct; empty if it isn't at hand.

    ``BIASPRUNE_PUBLISHED`` names a folder with ``audit/official_fig_smd_by_product.csv``: mean |SMD| by
    product, read off the figures of the authors' notebook (Crabtain959/bias_localization, commit
    1eac22b), which is older than the paper.

    Returns
    -------
    DataFrame
        pruned, products, mean_smd, low, high (95 % over products, bootstrap).
    """
    path = Path(os.environ.get("BIASPRUNE_PUBLISHED") or "/nonexistent")
    path = path / "audit" / "official_fig_smd_by_product.csv"
    rows = []
    if path.is_file():
        table, rng = pd.read_csv(path), np.random.default_rng(0)
        for column, label in (
            ("original", "nothing"),
            ("pruned34_own", "34 heads of the product's own"),
            ("pruned40_own", "40 heads of the product's own"),
            ("common40", "the 40 heads chosen for most products"),
        ):
            own = table[column].dropna().abs().to_numpy()
            drawn = rng.choice(own, (2000, len(own))).mean(1)
            low, high = np.quantile(drawn, [0.025, 0.975])
            rows.append(
                {"pruned": label, "products": len(own), "mean_smd": own.mean(), "low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=["pruned", "products", "mean_smd", "low", "high"])


def beside_controls(
    effects: gaps.Effects, table: pd.DataFrame, chosen: Mapping[str, str], health: pd.DataFrame
) -> pd.DataFrame:
    """Methods within one perplexity limit, and how much more each removes than its controls.

    Parameters
    ----------
    effects
        Of all prunings and controls, with a label "pruning"; controls are named "method; control 0".
    table
        A row per pruning, as the sweep found it.
    chosen
        Method → its pruning at the chosen threshold.
    health
        Of ``Audit.evaluate``, of all of them and of the unpruned model, "".

    Returns
    -------
    DataFrame
        method, the columns of ``table``, and for each control against_… with low and high, and its
        mean …_parts and …_ppl_ratio.
    """
    rows, of = [], health.groupby("pruning")[["parts", "ppl"]].mean()
    for method, key in chosen.items():
        row = {**table.set_index("pruning").loc[key].to_dict(), "pruning": key, "method": method}
        for control in ("random", "swapped", "shuffled"):
            if others := [k for k in of.index if k.startswith(f"{method}; {control}")]:
                theirs = [effects.rows(pruning=k) for k in others]
                found = effects.more(effects.rows(pruning=key), theirs)
                names = [f"against_{control}{end}" for end in ("", "_low", "_high")]
                row |= dict(zip(names, found, strict=True))
                row[f"{control}_parts"] = of.loc[others, "parts"].mean()
                row[f"{control}_ppl_ratio"] = of.loc[others, "ppl"].mean() / of.loc["", "ppl"]
        rows.append(row)
    return pd.DataFrame(rows)


def fading(effects: gaps.Effects, by_level: pd.DataFrame) -> pd.DataFrame:
    """Does the effect of pruning fade from the same question to another context? A row per method.

    Parameters
    ----------
    effects
        With labels method, label and level, see ``Audit.judge_levels``.
    by_level
        ``effects.mean(["method", "label", "level"])``.

    Returns
    -------
    DataFrame
        method; same_question (SMD removed) with low, high; more_than_random with its interval;
        own_context and another_context, by what the context's questions have in common; lost (same
        question − another context) with its interval, which is the paper's claim; lost_between (own −
        another context, the same pruning) with its interval; verdict on the claim. There is something to
        transfer only if a fix works where it was made, beyond noise and random pruning.

    Raises
    ------
    ValueError
        If there is no random control.
    """
    own = by_level[by_level["label"] == "own"].set_index(["method", "level"])["removed"]
    random = [k for k in by_level["label"].unique() if k.startswith("random")]
    if not random:
        raise ValueError("no random control: set at least one draw.")
    rows = []
    for method in own.index.unique("method"):

        def of(level: str, label: str = "own", method: str = method) -> np.ndarray:
            return effects.rows(method=method, label=label, level=level)

        at = by_level[(by_level["method"] == method) & (by_level["label"] == "own")].set_index("level")
        row = {"method": method, "same_question": own[method, LEVELS[0]]}
        row |= {"low": at.loc[LEVELS[0], "removed_low"], "high": at.loc[LEVELS[0], "removed_high"]}
        chance = effects.more(of(LEVELS[0]), [of(LEVELS[0], k) for k in random])
        row |= dict(zip(("more_than_random", "random_low", "random_high"), chance, strict=True))
        verdict = "undecided: one context"
        if LEVELS[3] in at.index:
            row |= {"own_context": own[method, LEVELS[2]], "another_context": own[method, LEVELS[3]]}
            for name, level in (("lost", LEVELS[0]), ("lost_between", LEVELS[2])):
                lost = effects.more(of(level), [of(LEVELS[3])])
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), lost, strict=True))
            low, high = row["lost_low"], row["lost_high"]
            verdict = "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"
        works = row["low"] > 0 and row["random_low"] > 0
        rows.append({**row, "verdict": verdict if works else "undecided: no fix to transfer"})
    return pd.DataFrame(rows)


def verdicts(
    effects: gaps.Effects, chosen: pd.DataFrame, anomalies: pd.DataFrame, start: pd.Series, damage: float
) -> pd.DataFrame:
    """The claims of "Breaking Down Bias" on pruning, judged within one perplexity limit.

    Parameters
    ----------
    effects
        With a label "pruning".
    chosen
        Per method: method, pruning, ppl_ratio, removed_train (among the names it was selected with),
        removed and against_random with their intervals (among the others).
    anomalies
        Mean health of sampled answers by method: unparsable, inliers; with a row "unpruned".
    start
        Of the unpruned model: directed with its interval.
    damage
        Highest perplexity, × unpruned.

    Returns
    -------
    DataFrame
        claim, ours, low, high, verdict, why.
    """
    fair = chosen[(chosen["ppl_ratio"] <= damage) & chosen["removed_train"].notna()]
    works = fair[(fair["removed_low"] > 0) & (fair["against_random_low"] > 0)]
    there = start["directed_low"] > 0
    around = f"{start['directed_low']:.2f} – {start['directed_high']:.2f}"
    rows = [
        {
            "claim": "The model's answers differ between the groups",
            "ours": start["directed"],
            "low": start["directed_low"],
            "high": start["directed_high"],
            "verdict": "found" if there else "not found",
            "why": f"mean SMD {start['directed']:.2f} ({around})",
        }
    ]
    # picked by the names that selections are made with, never by those they are judged by
    best = {p: g.loc[g["removed_train"].idxmax()] for p, g in fair.groupby(fair["method"].map(granularity))}
    row = {"claim": "Pruning removes the gap, more than random pruning does", "verdict": "undecided"}
    row["why"] = "no threshold keeps the perplexity within the limit"
    if len(fair):
        top = fair.loc[fair["removed_train"].idxmax()]
        row |= {"ours": top["removed"], "low": top["removed_low"], "high": top["removed_high"]}
        row["why"] = (
            f"{top['method']}, best among the other names: {top['removed']:.2f} ({top['removed_low']:.2f} – "
            f"{top['removed_high']:.2f}), {top['against_random']:.2f} more than random; of all methods these "
            f"work: {'; '.join(works['method']) or 'none'}"
        )
        if top["method"] in anomalies.index:
            told = anomalies.loc[top["method"]]
            row["why"] += (
                f"; perplexity × {top['ppl_ratio']:.2f}, of its sampled answers {told['inliers']:.2f} within "
                f"the unpruned range, {told['unparsable']:.2f} unparsable"
            )
        if there and top["method"] in set(works["method"]):
            row["verdict"] = "reproduced"
        elif there and top["removed_high"] < start["directed"] / 2:
            row["verdict"] = "not reproduced"
    rows.append(row)
    for fine in ("neurons", "weights"):
        row = {"claim": f"{fine.capitalize()} remove more than heads", "verdict": "undecided"}
        row["why"] = "no threshold keeps the perplexity within the limit"
        if fine in best and "heads" in best:
            own, other = (best[k] for k in (fine, "heads"))
            here, theirs = (effects.rows(pruning=x["pruning"]) for x in (own, other))
            more, low, high = effects.more(here, [theirs])
            row |= {"ours": more, "low": low, "high": high}
            row["why"] = f"{own['method']} − {other['method']}: {more:.2f} ({low:.2f} – {high:.2f})"
            if there:
                row["verdict"] = "reproduced" if low > 0 else "not reproduced" if high < 0 else "undecided"
        rows.append(row)
    row = {"claim": "Little anomalous behaviour", "verdict": "undecided"}
    row["why"] = "no method removes the gap, so there is nothing to pay for"
    if there and len(works):
        base, kept = anomalies.loc["unpruned"], anomalies.loc[works["method"]]
        fine = (kept["inliers"] >= base["inliers"] - 0.1) & (kept["unparsable"] <= base["unparsable"] + 0.05)
        # of the methods that work, the one that did best among the other names
        best_one = kept.loc[works.loc[works["removed_train"].idxmax(), "method"]]
        row |= {
            "ours": best_one["inliers"],
            "verdict": "reproduced" if fine[best_one.name] else "not reproduced",
        }
        each = (f"{m} {k['inliers']:.2f} and {k['unparsable']:.2f}" for m, k in kept.iterrows())
        row["why"] = (
            f"inliers and unparsable answers of the methods that remove it: {'; '.join(each)} (unpruned "
            f"{base['inliers']:.2f} and {base['unparsable']:.2f})"
        )
    columns = ["claim", "ours", "low", "high", "verdict", "why"]
    return pd.DataFrame([*rows, row]).reindex(columns=columns)
