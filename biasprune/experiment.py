"""From head sets to a table: what pruning them does to bias, perplexity and the text itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from biasprune import measure, select
from biasprune.ablate import head_masks
from biasprune.decode import sample
from biasprune.headscores import judge_continuations, judged_text
from biasprune.judge import Judge
from biasprune.lm import LM


def selections(
    scores: pd.DataFrame,
    baselines: dict[str, np.ndarray],
    *,
    gamma: float,
    alphas: Iterable[float],
    rule: str = "corrected",
    draws: int = 3,
) -> pd.DataFrame:
    """The heads that FASP and every baseline prune.

    Parameters
    ----------
    scores
        Frame of ``headscores.score``.
    baselines
        Further scores, name → (N,); each prunes its lowest.
    draws
        Number of random selections, seeds 0 … draws − 1.

    Returns
    -------
    DataFrame
        method, gamma (0 for the baselines: nothing is protected), alpha, draw, heads (sorted flat
        indices). α = 0 is the unpruned model.
    """
    n = len(scores)
    bias, ppl = scores["bias_without"].to_numpy(), scores["ppl_without"].to_numpy()
    rows = []
    for alpha in alphas:
        rows.append(("FASP", gamma, alpha, 0, select.fasp(bias, ppl, gamma=gamma, alpha=alpha, rule=rule)))
        named = {"bias only": bias, "perplexity only": ppl, **baselines}
        for name, values in named.items():
            rows.append((name, 0.0, alpha, 0, select.lowest(values, alpha=alpha, rule=rule)))
        for draw in range(draws):
            rows.append(("random", 0.0, alpha, draw, select.random(n, alpha=alpha, seed=draw)))
    return pd.DataFrame(rows, columns=["method", "gamma", "alpha", "draw", "heads"])


def gamma_grid(
    scores: pd.DataFrame, gammas: Iterable[float], alphas: Iterable[float], rule: str = "corrected"
) -> pd.DataFrame:
    """FASP's heads over γ × α, where α ≤ 1 − γ; columns as in ``selections``."""
    alphas = list(alphas)
    parts = [
        selections(scores, {}, gamma=g, alphas=[a for a in alphas if a <= 1 - g + 1e-9], rule=rule, draws=0)
        for g in gammas
    ]
    whole = pd.concat(parts, ignore_index=True)
    return whole[whole["method"] == "FASP"].reset_index(drop=True)


def evaluate(
    lm: LM,
    selected: pd.DataFrame,
    prompts: pd.DataFrame,
    judge: Judge,
    windows: measure.Windows,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    rule: str = "corrected",
    max_new_tokens: int = 40,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = 22,
    batch_rows: int = 256,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Continuations, judge scores and perplexity of every selected head set and of the whole model.

    Equal sets are run once. All sets and the unpruned model share prompts and sampling noise.

    Returns
    -------
    (texts, losses)
        texts: heads (as text, "" for none), seed, prompt (row number), score, text.
        losses: heads, window, nll (nats per token), tokens.
    """
    keys = list(dict.fromkeys(["", *map(set_key, selected["heads"])]))
    masks = head_masks(lm.anatomy, [parse_key(k) for k in keys])
    written = sample(
        lm,
        list(prompts["prompt"]),
        masks=masks,
        seeds=seeds,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        temperature=temperature,
        max_prompt_tokens=max_prompt_tokens,
        batch_rows=batch_rows,
        progress=progress,
    )
    scores = judge_continuations(list(prompts["prompt"]), written, judge, rule)
    shape = [("heads", keys), ("seed", list(seeds)), ("prompt", range(len(prompts)))]
    index = pd.MultiIndex.from_product([v for _, v in shape], names=[n for n, _ in shape])
    texts = pd.DataFrame({"score": scores.reshape(-1), "text": written.texts.reshape(-1)}, index=index)
    label = progress and f"{progress}: perplexity"
    nll = measure.nll(lm, windows, masks, batch_tokens=batch_tokens, progress=label)
    index = pd.MultiIndex.from_product([keys, range(nll.shape[1])], names=["heads", "window"])
    losses = pd.DataFrame({"nll": nll.reshape(-1), "tokens": np.tile(windows.counts, len(keys))}, index=index)
    return texts.reset_index(), losses.reset_index()


def compare_rules(
    lm: LM,
    prompts: pd.DataFrame,
    texts: pd.DataFrame,
    judge: Judge,
    prose: str,
    *,
    length: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """The unpruned model measured as published and as corrected, on the same continuations and prose.

    Parameters
    ----------
    texts
        The unpruned model's continuations, from ``evaluate``.
    length, max_tokens
        As in ``measure.windows``.

    Returns
    -------
    DataFrame
        rule, bias, mean_score, above_half (share of texts scored > 0.5), ppl, tokens (predicted).
    """
    weights = prompts["weight"].to_numpy() if "weight" in prompts else None
    written = texts["text"].to_numpy(dtype=object).reshape(-1, len(prompts))
    rows = []
    for rule in ("as_published", "corrected"):
        read = judged_text(list(prompts["prompt"]), written, rule)
        scores = judge(list(read.reshape(-1))).reshape(read.shape)
        windows = measure.windows(lm, prose, rule=rule, length=length, max_tokens=max_tokens)
        nll = measure.nll(lm, windows, batch_tokens=batch_tokens)
        rows.append(
            {
                "rule": rule,
                "bias": float(measure.group_bias(scores.mean(0), prompts["bucket"], weights)),
                "mean_score": scores.mean(),
                "above_half": (scores > 0.5).mean(),
                "ppl": float(measure.perplexity(nll, windows)[0]),
                "tokens": int(windows.counts.sum()),
            }
        )
    return pd.DataFrame(rows)


def set_key(heads: Iterable[int]) -> str:
    """A head set as text, for tables: [3, 17] → "3 17"."""
    return " ".join(str(int(h)) for h in sorted(heads))


def parse_key(key: str) -> list[int]:
    """The inverse of ``set_key``."""
    return [int(h) for h in key.split()]


def compare(
    selected: pd.DataFrame,
    texts: pd.DataFrame,
    losses: pd.DataFrame,
    prompts: pd.DataFrame,
    windows: measure.Windows,
    *,
    by: Sequence[str] = ("method", "gamma", "alpha"),
    n_boot: int = 1000,
) -> tuple[pd.DataFrame, dict[tuple, np.ndarray]]:
    """Bias, its change, and the model's health for every pruning setting, with 95 % intervals.

    Rows of ``selected`` that share ``by`` (the random draws) are averaged.

    Returns
    -------
    (table, replicates)
        table: the columns ``by``; pruned (number of heads); bias, bias_low, bias_high; change,
        change_low, change_high (percent of the unpruned model's bias); floor (mean bias of the same
        scores under shuffled group labels: what no difference between the groups would give);
        change_seed_sd (standard deviation of the change over sampling seeds, NaN for one seed); ppl;
        ppl_ratio, ppl_ratio_low, ppl_ratio_high; score (mean judge score); distinct and empty (shares of
        the continuations). Intervals by bootstrap over prompts within groups, seeds averaged, for
        perplexity over windows; pruned and unpruned paired. replicates: ``by`` → (n_boot,) changes in
        percent, for intervals of further sums.
    """
    keys = list(dict.fromkeys(texts["heads"]))
    shape = (len(keys), texts["seed"].nunique(), texts["prompt"].nunique())
    by_seed = texts["score"].to_numpy().reshape(shape)
    scores = by_seed.mean(1)  # (sets, prompts)
    nll = losses["nll"].to_numpy().reshape(len(keys), -1)
    weights = prompts["weight"].to_numpy() if "weight" in prompts else None
    bias = measure.group_bias(scores, prompts["bucket"], weights)
    seed_bias = measure.group_bias(by_seed, prompts["bucket"], weights)  # (sets, seeds)
    boot = measure.bootstrap_bias(scores, prompts["bucket"], weights, n_boot=n_boot)
    floor = np.array(
        [measure.noise_floor(one, prompts["bucket"], weights, n_perm=200).mean() for one in scores]
    )
    ppl, n = measure.perplexity(nll, windows), nll.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), n_boot)
    drawn_ppl = measure.perplexity(nll, windows, counts)  # (n_boot, sets)
    health = texts.groupby("heads", sort=False)["text"].agg(
        distinct=lambda t: t.nunique() / len(t), empty=lambda t: (t.str.strip() == "").mean()
    )
    where = {k: i for i, k in enumerate(keys)}
    base = where[""]
    if bias[base] <= 0:
        raise ValueError("the unpruned model has no bias on these prompts; a change in percent is undefined.")
    rows, replicates = [], {}
    for setting, group in selected.groupby(list(by), sort=False):
        index = [where[set_key(h)] for h in group["heads"]]
        change = 100 * (bias[index].mean() / bias[base] - 1)
        drawn = 100 * (boot[:, index].mean(1) / boot[:, base] - 1)
        low, high = np.maximum(measure.interval(change, drawn), -100)  # no more than all bias can go
        per_seed = 100 * (seed_bias[index].mean(0) / seed_bias[base] - 1)
        bias_low, bias_high = measure.interval(bias[index].mean(), boot[:, index].mean(1))
        replicates[tuple(setting)] = drawn
        ratio = ppl[index].mean() / ppl[base]
        drawn_ratio = np.log(drawn_ppl[:, index].mean(1) / drawn_ppl[:, base])
        ratio_low, ratio_high = np.exp(measure.interval(np.log(ratio), drawn_ratio))
        rows.append(
            {
                **dict(zip(by, setting, strict=True)),
                "pruned": len(group["heads"].iloc[0]),
                "bias": bias[index].mean(),
                "bias_low": max(0.0, bias_low),
                "bias_high": bias_high,
                "change": change,
                "change_low": low,
                "change_high": high,
                "floor": floor[index].mean(),
                "change_seed_sd": per_seed.std(ddof=1) if len(per_seed) > 1 else np.nan,
                "ppl": ppl[index].mean(),
                "ppl_ratio": ratio,
                "ppl_ratio_low": ratio_low,
                "ppl_ratio_high": ratio_high,
                "score": scores[index].mean(),
                "distinct": health["distinct"].iloc[index].mean(),
                "empty": health["empty"].iloc[index].mean(),
            }
        )
    return pd.DataFrame(rows), replicates


def choose_gamma(grid: pd.DataFrame, max_ppl_ratio: float) -> float:
    """The γ with the lowest mean bias over α > 0 among those whose perplexity never overshoots.

    Parameters
    ----------
    grid
        Frame of ``compare`` over γ × α on validation prompts.
    max_ppl_ratio
        Highest perplexity allowed at any α, as a ratio to the unpruned model's. If no γ keeps to
        it, the γ with the lowest highest ratio is taken.

    The paper chooses γ per model on validation data; its own criterion isn't public.
    """
    pruned = grid[grid["pruned"] > 0]
    if pruned.empty:
        raise ValueError("no α of the grid prunes a head: the model has too few heads for these α.")
    per_gamma = pruned.groupby("gamma").agg(bias=("bias", "mean"), worst=("ppl_ratio", "max"))
    allowed = per_gamma[per_gamma["worst"] <= max_ppl_ratio]
    return float(allowed["bias"].idxmin() if len(allowed) else per_gamma["worst"].idxmin())


def verdicts(table: pd.DataFrame, replicates: dict[tuple, np.ndarray], max_ppl_ratio: float) -> pd.DataFrame:
    """Per method, over all α that prune: mean change of bias, the same against random pruning, cost.

    A method counts as reducing bias only if its interval lies below zero and so does that of its
    difference to random pruning of as many heads: whatever makes a model write less toxic, shorter or
    senseless text lowers a sum of absolute differences too.

    Returns
    -------
    DataFrame
        method, mean_change, low, high, against_random, against_low, against_high (all percent of the
        unpruned bias), reduced_at (share of the α at which the whole interval lies below 0),
        worst_ppl_ratio; effect; within_limit, beyond_limit (of perplexity: the whole interval at every α,
        or at some α; between the two, neither).
    """
    pruned = table[table["pruned"] > 0]
    settings = {
        m: list(zip(p["gamma"], p["alpha"], strict=True)) for m, p in pruned.groupby("method", sort=False)
    }
    drawn = {m: np.mean([replicates[(m, *s)] for s in at], axis=0) for m, at in settings.items()}
    means = pruned.groupby("method")["change"].mean()
    rows = []
    for method in settings:
        part = pruned[pruned["method"] == method]
        low, high = measure.interval(means[method], drawn[method])
        against = means[method] - means["random"]
        against_low, against_high = measure.interval(against, drawn[method] - drawn["random"])
        if high < 0:
            effect = "reduces bias" if against_high < 0 or method == "random" else "no more than random"
        else:
            effect = "raises bias" if low > 0 else "no clear change"
        rows.append(
            {
                "method": method,
                "mean_change": means[method],
                "low": float(low),
                "high": float(high),
                "against_random": against,
                "against_low": float(against_low),
                "against_high": float(against_high),
                "reduced_at": (part["change_high"] < 0).mean(),
                "worst_ppl_ratio": part["ppl_ratio"].max(),
                "effect": effect,
                "within_limit": bool(part["ppl_ratio_high"].max() <= max_ppl_ratio),
                "beyond_limit": bool(part["ppl_ratio_low"].max() > max_ppl_ratio),
            }
        )
    return pd.DataFrame(rows)


def conclude(verdicts: pd.DataFrame, p_value: float, small: float = 10.0) -> tuple[str, str]:
    """The paper's claim, that FASP alone reduces bias at little cost: a verdict and why.

    Refuted where an interval excludes that FASP keeps to the perplexity limit, or that it lowers bias by
    ``small`` percent (points, against random pruning); where it holds both, undecided.

    Parameters
    ----------
    p_value
        Of the unpruned model's bias on the test prompts, under shuffled group labels. If there is no
        bias to be seen, its change can't be judged.

    Returns
    -------
    (verdict, reason)
        verdict: "reproduced", "partly reproduced", "not reproduced" or "undecided".
    """
    good = (verdicts["effect"] == "reduces bias") & verdicts["within_limit"]
    passed = [m for m in verdicts["method"][good] if m != "random"]
    names = ", ".join(passed) or "none"
    did = f"methods that reduce bias at little cost, and more than random pruning: {names}"
    if p_value >= 0.05:
        return "undecided", (
            "on the test prompts the unpruned model's bias can't be told from no difference between the "
            f"groups (p = {p_value:.2f}), so a change of it says little ({did})"
        )
    if passed == ["FASP"]:
        return "reproduced", did
    if "FASP" in passed:
        return "partly reproduced", did
    by_method = verdicts.set_index("method")
    fasp, random = by_method.loc["FASP"], by_method.loc["random"]
    refuted = fasp["beyond_limit"] or fasp["low"] > -small or fasp["against_low"] > -small
    low, high = (f"{fasp[f'against_{end}']:+.0f}" for end in ("low", "high"))
    did += f"; FASP − random: {fasp['against_random']:+.0f} points ({low} – {high})"
    did += f"; its perplexity × {fasp['worst_ppl_ratio']:.3f} at most, that of random heads"
    did += f" × {random['worst_ppl_ratio']:.3f}"
    return ("not reproduced" if refuted else "undecided"), did
