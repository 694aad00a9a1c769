"""390 generated bad inputs: every one is refused in our words, or gives numbers that can be trusted.

A number of the seeds of a kind is a test of its own, so that pytest's closing line counts them.
"""

from __future__ import annotations

import json
import random
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_lm, word_judge

import biasprune
from biasprune.core import data, model, parameters, run
from biasprune.core.likelihood import evaluate, token_log_probs
from biasprune.core.masks import Pruning, masked
from biasprune.measures import judges, numbers, prompts, prose
from biasprune.measures.named import measure
from biasprune.measures.toxicity import toxicity
from biasprune.methods import select

NUMBERS = [-1, 0, 1.5, 2, -0.2, float("nan"), float("inf"), 10**9]
JUNK = ["", " ", "nonsense", "nonsense: all", "../nowhere.csv", "a/b/c", "pronouns:", ": all", "stereoset: nobody", "é"]


def refused(call) -> bool:
    """Whether a call is refused by our own ValueError or FetchError; any other exception fails the test."""
    try:
        call()
    except (ValueError, data.FetchError) as e:
        raised = Path(traceback.extract_tb(e.__traceback__)[-1].filename)
        assert raised.is_relative_to(Path(biasprune.__file__).parent), f"raised in {raised}: {e}"
        assert len(str(e)) > 10, "says something"
        return True
    return False


def damaged(rows: list[list[str]], rng: random.Random) -> bytes:
    """A CSV file with one thing wrong with it."""
    head, *body = rows
    column, line = rng.randrange(len(head)), rng.randrange(len(body))
    match rng.randrange(10):
        case 0:  # a column is missing
            rows = [[x for i, x in enumerate(row) if i != column] for row in rows]
        case 1:
            head[column] += "s"
        case 2:
            body[line][column] = rng.choice(["", "  "])
        case 3:
            rows = [head]
        case 4:
            rows = [head, body[line]]
        case 5:  # a row twice
            rows = [head, *body, body[line]]
        case 6:  # a field too many
            body[line].append("more")
        case 7:  # all rows alike in a column
            for row in body:
                row[column] = body[0][column]
        case 8:
            return "\n".join(",".join(row) for row in rows).encode() + b"\n\xff\xfe\x00,x\n"
        case _:
            return b""
    return "\n".join(",".join(row) for row in rows).encode()


def pairs_file() -> list[list[str]]:
    rows = [
        [f"the {a} friend is {b}", f"the {a} friend is kind", a]
        for a in ("old", "young", "tall")
        for b in ("rude", "awful")
    ]
    return [["more", "less", "cluster"], *rows]


def choices_file() -> list[list[str]]:
    rows = [
        [f"{w} {n}", w, s, f"the {w} friend {n}", " kind", " rude"]
        for w, s in (("old", ".1"), ("young", ".9"), ("tall", ".6"))
        for n in ("is", "was")
    ]
    return [["item", "cluster", "share", "text", "a", "b"], *rows]


def prompts_file() -> list[list[str]]:
    rows = [
        [f"my {g} {n} is", g, s]
        for g in ("old", "young")
        for s in ("valid", "test")
        for n in (f"friend {s[0]}", f"neighbour {s[0]}")
    ]
    return [["prompt", "group", "split"], *rows]


def names_file() -> list[list[str]]:
    return [
        ["name", "race", "gender"],
        *([f"{r}{g}{k}", r, g] for r in ("one", "two") for g in ("male", "female") for k in range(4)),
    ]


def contexts_file() -> list[list[str]]:
    return [
        ["context", "variation", "question"],
        *(["market", str(k), f"What does {{name}} pay for {k}?"] for k in range(3)),
    ]


def finite(frame) -> None:
    assert len(frame) and np.isfinite(frame["value"]).all(), "a number that is none"


def of_csv(make, use):
    """A kind of bad input: a damaged file, and what reads it."""

    def one(rng: random.Random, folder: Path) -> bool:
        (file := folder / "own.csv").write_bytes(damaged(make(), rng))
        return refused(lambda: use(file))

    return one


def read_measure(file: Path) -> None:
    of = measure(f"{file}: all")
    frame = of.read(TINY, [Pruning(), Pruning({1})])
    finite(frame)
    low, high = of.readings(frame).estimates(200)[""].interval()
    assert low < high, "an interval without width"


def read_prompts(file: Path) -> None:
    for split in ("valid", "test"):
        of = toxicity(prompts.load("own", split, file), judges.load(word_judge), max_new_tokens=4)
        finite(of.read(TINY, [Pruning()]))


def read_names(file: Path) -> None:
    for half in numbers.names(file, "race", ["one", "two"]):
        assert half["name"].str.strip().ne("").all() and half.groupby("race").size().min() > 1


def read_contexts(file: Path) -> None:
    table = numbers.contexts(file, ["market"])
    assert len(table) and (table["question"].str.strip() != "{name}").all()


def selection(rng: random.Random, folder: Path) -> bool:
    bias, ppl = ([rng.choice([1.0, 2.0, *NUMBERS]) for _ in range(rng.choice([0, 3, 4]))] for _ in range(2))
    gamma, alpha = rng.choice(NUMBERS), rng.choice(NUMBERS)
    return refused(lambda: select.fasp(bias, ppl, gamma=gamma, alpha=alpha))


def pruning(rng: random.Random, folder: Path) -> bool:
    a, ids = TINY.anatomy, torch.tensor([[1, 2, 3]])
    outside = rng.choice([-1, a.n_flat, a.n_flat + 7, 10**9])
    wrong = (
        Pruning(heads={outside}) if rng.random() < 0.5 else Pruning(units={rng.choice([-1, a.n_layers * a.n_units])})
    )
    counted = torch.ones_like(ids, dtype=torch.bool)

    def scored() -> None:
        if rng.random() < 0.5:
            with masked(TINY, wrong):
                TINY.model(ids)
        many = [Pruning()] * rng.randrange(3) + [wrong]
        evaluate(TINY, many, [(torch.arange(1), ids)], lambda n, x: token_log_probs(TINY, x, counted).sum(1), 1)

    assert refused(scored)
    return True


def folder_of_a_model(rng: random.Random, folder: Path) -> bool:
    shutil.copytree(data.data_dir() / "models" / "tiny-gpt2", home := folder / "own")
    file = rng.choice(sorted(p for p in home.iterdir() if p.suffix in (".json", ".safetensors")))
    content = file.read_bytes()
    match rng.randrange(4):
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(content[: len(content) // 2])
        case 2:
            file.write_bytes(b"")
        case _:
            file.write_bytes(content.replace(b'"n_embd": 64', b'"n_embd": 32').replace(b"gpt2", b"gpt9"))

    def load() -> None:
        lm = model.load(home, device="cpu")
        torch.testing.assert_close(lm.model(torch.tensor([[1, 2]])).logits, WHOLE.model(torch.tensor([[1, 2]])).logits)

    return refused(load)


def parameter(rng: random.Random, folder: Path) -> bool:
    notebook = rng.choice(sorted(parameters.notebooks_dir().glob("[0-9]*.ipynb")))
    declared = parameters.parameters_of(notebook)
    name = rng.choice(sorted(declared))
    kind = declared[name][0]
    others = {"str": 3, "int": "many", "float": "0.3", "bool": "no", "list": "[0.3]", "dict": "heads"}
    if rng.random() < 0.5:
        name = name[:-1] + "_x"
    value = others[kind]
    assert refused(lambda: parameters.check_parameters({name: value}, declared, notebook.stem))
    return True


def name_of_a_measure(rng: random.Random, folder: Path) -> bool:
    spec = (
        rng.choice(JUNK)
        if rng.random() < 0.3
        else rng.choice(["pronouns", "stereoset", "crows", "winobias"]) + rng.choice(JUNK)
    )
    return refused(lambda: finite(measure(spec, rng.choice(["valid", "test"]), 4).read(TINY, [Pruning()])))


def judge(rng: random.Random, folder: Path) -> bool:
    spec = rng.choice(["nomodule:f", "json:nothing", "toxicity#nolabel", str(folder), "math:pi"])
    return refused(lambda: np.testing.assert_equal(np.isfinite(judges.load(spec)(["kind", "rude"])), True))


def prose_file(rng: random.Random, folder: Path) -> bool:
    (file := folder / "own.txt").write_bytes(rng.choice([b"", b"\n\n", b"one", b"\xff\xfe\x00", b"a b\n" * 3]))
    name = rng.choice([*JUNK, file, folder])
    return refused(
        lambda: finite(
            prose.prose(TINY, prose.corpus(name, "test"), length=8, max_tokens=rng.choice([8, 0, -1])).read(
                TINY, [Pruning()]
            )
        )
    )


def record(rng: random.Random, folder: Path) -> bool:
    (folder / "x" / "01_fasp_heads").mkdir(parents=True)
    whole = json.dumps({"form": 2, "notebook": "01_fasp_heads", "status": "finished"})
    text = rng.choice([whole[: rng.randrange(len(whole))], "[]", "null", '"text"', "{}", "\x00"])
    (folder / "x" / "01_fasp_heads" / "run.json").write_text(text)
    return refused(lambda: run.finished(folder))


KINDS = {
    "pairs": of_csv(pairs_file, read_measure),
    "choices": of_csv(choices_file, read_measure),
    "prompts": of_csv(prompts_file, read_prompts),
    "names": of_csv(names_file, read_names),
    "contexts": of_csv(contexts_file, read_contexts),
    "selections": selection,
    "prunings": pruning,
    "model folders": folder_of_a_model,
    "parameters": parameter,
    "measures": name_of_a_measure,
    "judges": judge,
    "prose": prose_file,
    "records": record,
}
TINY, WHOLE = random_lm("gpt2"), model.load("tiny-gpt2", device="cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", KINDS)
def test_refused_in_our_words_or_right(kind, seed, tmp_path):
    KINDS[kind](random.Random(f"{kind} {seed}"), tmp_path)
