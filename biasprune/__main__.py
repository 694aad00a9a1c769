"""Run the notebooks in batch.

``biasprune run GRID.yaml`` does a grid of runs (see ``biasprune.batch``),
``python -m biasprune run --params smollm2 --out reports`` every notebook with a parameter file, and
``python -m biasprune crate --out reports --target FILE.zip`` writes the results as an RO-Crate.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections import Counter
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pandas as pd

from biasprune import batch, crate, ledger, record

SHOWN = ("00_overview", "08_one_yardstick")  # whose sentence and first figure the README has


def run(names: list[str], out: Path, only: list[str], workers: int = 1) -> int:
    """Run notebooks with parameter files and write the report; the number of failures."""
    grid = batch.Grid(notebooks=only or list(batch.notebooks()), params=names, out=out, workers=workers)
    return batch.run(grid) + report(out)


def _table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; numbers to three digits."""

    def cell(x: object) -> str:
        if not isinstance(x, float | np.floating):
            return str(x)
        if not np.isfinite(x):
            return "–" if np.isnan(x) else "∞"
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"

    rows = [list(frame.columns), ["---"] * frame.shape[1]]
    rows += [[cell(x) for x in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def _verdicts(out: Path) -> tuple[str, str, str]:
    """Write ``out/claims.csv``; its verdicts counted and the papers' claims as Markdown; what went wrong."""
    try:
        table = ledger.write(out)
    except ledger.LedgerError as e:
        return f"There is no ledger of claims for these runs: {e}", "", str(e)
    counts = table.groupby(["paper", "verdict"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(ledger.VERDICTS), fill_value=0)
    counts.insert(0, "claims", table.groupby("paper", sort=False)["id"].nunique())
    text = "Verdicts over claims, runs and cases; biasprune: our own claims. Figures and commands are in"
    counted = f"{text} [claims.csv](claims.csv).\n\n{_table(counts.reset_index())}"
    return counted, _claims(table[table["paper"] != ledger.OURS]), ""


def _claims(table: pd.DataFrame) -> str:
    """The ledger's claims, as Markdown: what is published, and what every run found."""

    def found(row: pd.Series) -> str:
        run = ", ".join(x for x in (row["parameters"], str(row["case"])) if x)
        ends = f" ({row['low']:.3g} to {row['high']:.3g})" if pd.notna(row["low"]) else ""
        number = f" {row['ours']:.3g}{ends}" if pd.notna(row["ours"]) else ""
        return f"**{row['verdict']}**{number}" + (f", {run}" if run else "")

    rows = []
    for number, own in table.groupby("id", sort=False):
        known = own[own["verdict"] != ledger.NOT_RUN]
        here = "<br>".join(found(row) for _, row in (known if len(known) else own[:1]).iterrows())
        one = own.iloc[0]
        rows.append({"claim": f"{number}: {one['claim']}", "published": one["published"], "here": here})
        rows[-1]["in"] = one["what"] if len(known) else ""
    return _table(pd.DataFrame(rows).replace(r"\|", r"\\|", regex=True))


def _longest(seconds: dict[str, float]) -> str:
    """The three steps of a run that take most of its time, in percent; "a--b--1", "a--b--2" are one step."""
    steps: Counter[str] = Counter()
    for name, spent in seconds.items():
        parts = name.split("--")
        named = takewhile(lambda p: not any(c.isdigit() for c in p), parts)
        steps[" ".join(named) or parts[0]] += spent
    whole = sum(steps.values())
    return ", ".join(f"{name} {v / whole:.0%}" for name, v in steps.most_common(3) if v > 0)


def report(out: Path) -> int:
    """Write ``out/README.md`` from the run records below ``out``, and the README's block of results.

    The block in the README has the papers' claims, the runs, and the results of ``SHOWN``. Verdicts on the
    claims go to ``out/claims.csv``; 1 is returned if claims and records don't fit, otherwise 0.

    A notebook's record names what it is about, and the tables and figures to show, under ``results``.
    Tables ``speed`` of all runs are put together in ``out/speed.csv``.
    """
    sections, short, rows, speed = [], [], [], []
    # the overview first
    for path in sorted(out.glob("*/*/run.json"), key=lambda p: (p.parent.name != batch.OVERVIEW, p)):
        facts = json.loads(path.read_text())
        if facts["status"] != "done":
            continue
        source = facts["provenance"]
        model = source.get("model", {"name": "–", "dtype": "–"})
        folder = path.parent.relative_to(out).as_posix()
        rows.append(
            {
                "notebook": f"[{facts['notebook']}]({folder}.ipynb)",
                "parameters": path.parent.parent.name,
                "model": model["name"],
                "about": facts["results"].get("about") or facts["config"].get("axis", ""),
                "minutes": facts["results"]["minutes"],
                "peak MiB": facts["peak_memory_mib"],
                "device": source["device"],
                "dtype": model["dtype"],
                "commit": source["commit"][:10]
                + ("+changes" if source["commit"].endswith("+changes") else ""),
                "longest steps": _longest(facts.get("seconds", {})),
            }
        )
        results = facts["results"]
        parts = [f"## {facts['notebook']}: {model['name']}, {path.parent.parent.name}", results["sentence"]]
        figures = [f"![{c}]({folder}/figures/{f}.png)" for f, c in results["figures"].items()]
        if facts["notebook"] in SHOWN:
            named = f"**{facts['notebook']}** ({path.parent.parent.name})"
            short += [f"{named}. {results['sentence']}", *figures[:1]]
        for name, caption in results["tables"].items():
            table = pd.read_parquet(path.parent / f"{name}.parquet")
            if len(table):
                parts += [f"{caption}:", _table(table)]
        sections.append("\n\n".join([*parts, *figures]) + "\n")
        if (path.parent / "speed.parquet").exists():
            speed.append(pd.read_parquet(path.parent / "speed.parquet").assign(run=path.parent.parent.name))
    head = (
        "Written by `python -m biasprune run`; don't edit. Every figure and number comes from the run "
        "records here. Minutes are those of the computations, on as many threads as column device says; "
        "loading the model comes on top."
    )
    if not rows:
        print(f"No finished run below {out}: no report written.", file=sys.stderr)
        return 0
    if speed:
        record.write_text(out / "speed.csv", pd.concat(speed).to_csv(index=False, float_format="%.4g"))
    verdicts, claims, problem = _verdicts(out)
    if problem:
        print(f"No ledger of claims, {out / 'claims.csv'} isn't written: {problem}", file=sys.stderr)
    runs = pd.DataFrame(rows)
    text = f"# Reports\n\n{head}\n\n{verdicts}\n\n{_table(runs)}\n\n" + "\n".join(sections)
    record.write_text(out / "README.md", text)
    readme = record.ROOT / "README.md"
    if out.resolve() == (record.ROOT / "reports").resolve() and readme.exists():
        short = [verdicts, claims, _table(runs.drop(columns="longest steps")), *short]
        links = re.sub(r"\]\((?!http)", "](reports/", "\n\n".join(short))
        start, end = "<!-- results -->", "<!-- end of results -->"
        block = re.compile(f"{start}.*{end}", re.DOTALL)
        text = readme.read_text()
        record.write_text(readme, block.sub(lambda _: f"{start}\n{links}\n{end}", text))
    return int(problem != "")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda given, _: sys.exit(128 + given))
    parser = argparse.ArgumentParser(prog="biasprune", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="execute notebooks: a grid of runs, or with parameter files")
    runner.add_argument("grid", nargs="?", help="YAML file of a grid, or a name in notebooks/grids")
    runner.add_argument("--dry-run", action="store_true", help="list the grid's runs, and start nothing")
    runner.add_argument("--submit", choices=["slurm", "local"], help="the grid through submitit")
    runner.add_argument("--params", nargs="+", help="names in notebooks/params, or YAML files")
    runner.add_argument("--notebook", nargs="*", help="with --params, notebooks to run; all by default")
    runner.add_argument("--workers", type=int, help="so many runs at a time, benchmarks excepted")
    runner.add_argument("--out", type=Path, help="folder for the results, instead of reports or the grid's")
    reporter = commands.add_parser("report", help="write the report from run records again")
    reporter.add_argument("--out", type=Path, default=Path("reports"))
    crater = commands.add_parser("crate", help="write finished runs as an RO-Crate, for an archive")
    crater.add_argument("--out", type=Path, default=Path("reports"), help="folder with the results")
    crater.add_argument("--target", type=Path, required=True, help="a .zip file, or an empty folder")
    args = parser.parse_args()
    if args.command == "report":
        sys.exit(report(args.out))
    if args.command == "crate":
        try:
            print(crate.write(args.out, args.target))
        except (ImportError, OSError, ValueError) as e:
            sys.exit(str(e))
        return
    if args.workers is not None and args.workers < 1:
        runner.error("--workers must be at least 1")
    if args.params and not (args.grid or args.dry_run or args.submit):
        out = args.out or Path("reports")
        sys.exit(run(args.params, out, args.notebook or [], args.workers or 1) > 0)
    if not args.grid or args.params or args.notebook:
        runner.error("give a grid, with --dry-run or --submit if wanted, or --params with --notebook")
    grid = batch.read_grid(args.grid)
    grid = replace(grid, out=args.out or grid.out, workers=args.workers or grid.workers)
    failed = batch.run(grid, dry=args.dry_run, submit=args.submit or "")
    if not args.dry_run:
        failed += report(grid.out)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
