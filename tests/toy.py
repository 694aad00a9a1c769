"""A folder of toy notebooks in the repository's form, for the tests of runs and of the workflow."""

from __future__ import annotations

from pathlib import Path

import jupytext

PARAMETERS = """
# %% tags=["parameters"]
model: str = "toy"  # no meaning
seed: int = 0  # of the numbers
seeds: list = [0, 1]  # no meaning
rate: float = 0.5  # no meaning
flag: bool = False  # no meaning
kinds: dict = {}  # no meaning
show_texts: bool = False  # no meaning
save_pruned: str = ""  # no meaning
wait: float = 0.0  # seconds for each piece
out: str = ""  # folder
"""
WORK = """
# %%
import os
import time

import numpy as np
import pandas as pd

from biasprune.core.run import start

# %%
run = start("NAME", globals())
run.inputs(model={"name": model, "dtype": "float64"}, prompts=pd.DataFrame({"a": [1, 2]}))

# %%
def piece(number):
    time.sleep(wait)
    with open(run.folder.parents[1] / "log.txt", "a") as log:  # a line for each piece that is computed
        log.write(f"{run.folder} {number}\\n")
    return pd.DataFrame({"piece": number, "x": np.random.default_rng([abs(seed), number]).normal(size=3)})

pieces = run.pieces("pieces", {f"piece {i}": lambda i=i: piece(i) for i in range(6)})
sums = run.frame("sums", lambda: pieces.groupby("piece", as_index=False)["x"].sum())
assert seed != 99, f"no seed: {seed}"

# %%
print(run.folder, os.environ["OMP_NUM_THREADS"])
run.finish(f"Seed {seed}.", tables={"sums": "Sums"}, about="toys")
"""
OVERVIEW = """
# %% tags=["parameters"]
reports: str = ""  # folder
out: str = ""  # folder

# %%
import pandas as pd

from biasprune.core.run import finished, start

# %%
run = start("00_overview", globals())
records = {f"{f.parent.name}/{f.name}": r for f, r in finished(reports).items() if f.name != "00_overview"}
runs = run.inputs(model={"name": f"{len(records)} runs"}, keys=" ".join(r["key"] for r in records.values()))
run.frame("runs", lambda: pd.DataFrame({"run": list(records)}))
run.finish(f"{len(records)} runs.", tables={"runs": "Runs"})
"""


def write_notebook(path: Path, text: str) -> None:
    node = jupytext.reads(text.lstrip(), fmt="py:percent")
    node.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    jupytext.write(node, path, fmt="ipynb")


def make(folder: Path) -> Path:
    """00_overview, 01_toy, 02_other (``special`` instead of ``flag``), 07_speed; parameter files one and two."""
    (folder / "params").mkdir(parents=True)
    write_notebook(folder / "00_overview.ipynb", OVERVIEW)
    for name in ("01_toy", "02_other", "07_speed"):
        parameters = PARAMETERS.replace("flag", "special") if name == "02_other" else PARAMETERS
        write_notebook(folder / f"{name}.ipynb", parameters + WORK.replace("NAME", name))
    (folder / "params" / "one.yaml").write_text("model: gpt\nspecial: true\n")
    (folder / "params" / "two.yaml").write_text("model: llama\nrate: 1\n")
    return folder
