"""python -m biasprune check MODEL: what a model can be used for. report --out reports: what run records say.

The workflow calls report after the last run: README.md, claims.csv and speed.csv below reports.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune.check import capabilities
from biasprune.core import run
from biasprune.core.data import FetchError
from biasprune.papers import claims

HEAD = """# Reports

Written by `python -m biasprune report`; don't edit. Every figure and number comes from the run records here.
Minutes are those of the computations; loading the model comes on top."""


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown; numbers to three digits."""

    def cell(x: object) -> str:
        if isinstance(x, float | np.floating):
            return "–" if np.isnan(x) else f"{x:,.0f}" if 100 <= abs(x) < np.inf else f"{x:.3g}"
        return str(x).replace("|", "\\|")

    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def row(record: dict, where: str) -> dict[str, object]:
    """A run's line in the table of runs."""
    source, results, seconds = record["provenance"], record["results"], record["seconds"]
    known = {"notebook": f"[{record['notebook']}]({where}.ipynb)", "parameters": where.split("/")[0]}
    known |= {"model": source["model"]["name"], "about": results["about"], "minutes": results["minutes"]}
    known |= {"peak MiB": record["peak_memory_mib"], "device": source["device"], "dtype": source["model"]["dtype"]}
    known["commit"] = re.sub(r"^(\w{10})\w*", r"\1", source["commit"])
    steps = [f"{name} {s / sum(seconds.values()):.0%}" for name, s in Counter(seconds).most_common(3) if s]
    return {**known, "longest steps": ", ".join(steps)}


def report(out: Path) -> None:
    """Write the report of all finished runs below ``out``; nothing if there are none."""
    records = run.finished(out)
    if not records:
        print(f"{out} has no finished run: no report is written.", file=sys.stderr)
        return
    table = claims.write(out)
    counts = pd.crosstab(table["paper"], table["verdict"]).reindex(table["paper"].unique())
    counts = counts.reindex(columns=list(claims.VERDICTS), fill_value=0).reset_index()
    text = "Verdicts over claims, runs and cases; biasprune: our own claims. Figures and commands are in"
    sections, rows, speed, short = [], [], [], f"{text} [claims.csv](claims.csv).\n\n{markdown(counts)}"
    for folder, record in sorted(records.items(), key=lambda item: (item[1]["notebook"] != "00_overview", item[0])):
        results, where, label = record["results"], folder.relative_to(out).as_posix(), folder.parent.name
        rows.append(row(record, where))
        parts = [f"## {record['notebook']}: {record['provenance']['model']['name']}, {label}", results["sentence"]]
        tables = {caption: pd.read_parquet(folder / f"{name}.parquet") for name, caption in results["tables"].items()}
        parts += [f"{caption}:\n\n{markdown(table)}" for caption, table in tables.items() if len(table)]
        figures = [f"![{caption}]({where}/figures/{name}.png)" for name, caption in results["figures"].items()]
        sections.append("\n\n".join([*parts, *figures]))
        if (folder / "speed.parquet").is_file():
            speed.append(pd.read_parquet(folder / "speed.parquet").assign(run=label))
    if speed:
        run.write_text(out / "speed.csv", pd.concat(speed).to_csv(index=False, float_format="%.4g"))
    run.write_text(out / "README.md", "\n\n".join([HEAD, short, markdown(pd.DataFrame(rows)), *sections]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="biasprune", description=__doc__)
    commands = parser.add_subparsers(required=True)
    reporter = commands.add_parser("report", help="write the report from run records")
    reporter.add_argument("--out", type=Path, default=Path("reports"), help="folder of the run records")
    reporter.set_defaults(do=lambda asked: report(asked.out))
    checker = commands.add_parser("check", help="say what a model can be used for; its weights aren't read")
    checker.add_argument("model", help="packaged name, small model, local folder, or Hugging Face hub id")
    checker.add_argument("--revision", help="hub commit or tag")
    checker.set_defaults(do=lambda asked: print(markdown(capabilities(asked.model, asked.revision))))
    asked = parser.parse_args()
    try:
        asked.do(asked)
    except (ValueError, FetchError) as e:
        parser.exit(1, f"{e}\n")


if __name__ == "__main__":
    main()
