"""Run records as a research object: an RO-Crate that says which notebook made which file, from what.

One action per finished run, as the Process Run Crate profile has it
(https://w3id.org/ro/wfrun/process/0.5): the notebook is its instrument, parameters, model and commit are what
went in, and run.json, tables, figures and the executed notebook came out.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from biasprune import ledger, record

if TYPE_CHECKING:
    from rocrate.model.entity import Entity
    from rocrate.rocrate import ROCrate

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_CONTEXT = "https://w3id.org/ro/terms/workflow-run/context"
_FORMATS = {
    **{".json": "application/json", ".csv": "text/csv", ".md": "text/markdown", ".png": "image/png"},
    **{".pdf": "application/pdf", ".ipynb": "application/x-ipynb+json"},
    ".parquet": "application/vnd.apache.parquet",
}
_WHOLE = ("README.md", "claims.csv", "speed.csv")  # written from all runs
_NOTE = (
    "Content warning: executed notebooks quote prompts that name social groups, some of them from "
    "HolisticBias (CC BY-SA 4.0), and what models wrote, which can be offensive."
)
_KEPT_BACK = ("_texts", "_losses", "_effects")  # raw texts and scores: large, not part of the repository


def write(reports: Path, target: Path) -> Path:
    """Write the finished runs below ``reports`` as an RO-Crate.

    Raw continuations and scores (tables ``*_texts``, ``*_losses``, ``*_effects``) stay out, as they do in the
    repository. Files come with size and sha256.

    Parameters
    ----------
    target
        A folder that is empty or not there yet, or a path that ends in .zip.

    Returns
    -------
    Path
        ``target``.

    Raises
    ------
    ImportError
        The library rocrate isn't installed.
    ledger.LedgerError
        No such folder of reports, or a broken run.json.
    ValueError
        No finished run, or a target folder with something in it.
    """
    try:
        from rocrate.rocrate import ROCrate
    except ImportError as e:
        raise ImportError("an RO-Crate is written by the library rocrate: pip install rocrate") from e
    reports, target = Path(reports), Path(target)
    runs = ledger.runs(reports)
    if not runs:
        raise ValueError(f"{reports} has no finished run: nothing to export.")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} isn't empty; give another folder, or remove it first.")
    crate = ROCrate(version="1.1")  # the version that the profile extends
    crate.metadata.extra_contexts.append(_CONTEXT)
    _describe(crate, runs)
    actions = [_action(crate, reports, folder, facts) for folder, facts in runs.items()]
    crate.root_dataset["mentions"] = actions
    for name in _WHOLE:
        if (reports / name).is_file():
            _file(crate, reports / name, reports)
    if target.suffix == ".zip":
        target.parent.mkdir(parents=True, exist_ok=True)
        crate.write_zip(target)
    else:
        crate.write(target)
    return target


def _add(crate: ROCrate, name: str, kind: str | list[str], /, **properties: Any) -> Entity:
    """A contextual entity; what has the same name is the same."""
    from rocrate.model.contextentity import ContextEntity

    there = crate.dereference(name)
    return there or crate.add(ContextEntity(crate, name, properties={"@type": kind, **properties}))


def _describe(crate: ROCrate, runs: dict[Path, dict]) -> None:
    """Title, licence, authors and the papers to cite, from CITATION.cff."""
    cited = yaml.safe_load((record.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    root = crate.root_dataset
    crate.name, crate.keywords = cited["title"], cited["keywords"]
    crate.description = f"{cited['abstract'].strip()} {_NOTE}"
    crate.datePublished = max(facts["started"] for facts in runs.values())
    spdx = f"https://spdx.org/licenses/{cited['license']}"
    root["license"] = _add(crate, spdx, "CreativeWork", name=cited["license"])
    root["author"] = [
        _add(crate, "#" + record.slug(a["name"]), "Organization", **a) for a in cited["authors"]
    ]
    root["conformsTo"] = _add(crate, PROFILE, "CreativeWork", name="Process Run Crate", version="0.5")
    root["citation"] = [
        _add(
            crate,
            paper["url"],
            "ScholarlyArticle",
            name=paper["title"],
            author=[f"{a['given-names']} {a['family-names']}" for a in paper["authors"]],
            datePublished=str(paper["year"]),
        )
        for paper in cited["references"]
    ]


def _file(crate: ROCrate, path: Path, reports: Path) -> Entity:
    content = path.read_bytes()
    about = {
        "name": path.name,
        "encodingFormat": _FORMATS.get(path.suffix, "application/octet-stream"),
        "contentSize": str(len(content)),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return crate.add_file(path, path.relative_to(reports).as_posix(), properties=about)


def _action(crate: ROCrate, reports: Path, folder: Path, facts: dict) -> Entity:
    """One run: its notebook, what went in, what came out, when, on which device."""
    source, run, notebook = facts["provenance"], folder.relative_to(reports).as_posix(), facts["notebook"]
    tool = _add(
        crate,
        f"#{notebook}@{source['commit']}",
        ["SoftwareApplication", "SoftwareSourceCode"],
        name=f"notebooks/{notebook}.ipynb",
        programmingLanguage="Python",
        softwareVersion=source["commit"],
    )
    model = source["model"]
    given = {**facts["config"], "device": source["device"], "packages": source.get("packages", {})}
    given |= {f"data: {name}": digest for name, digest in facts.get("data", {}).items()}
    inputs = [
        _add(crate, f"#{run}/{record.slug(name)}", "PropertyValue", name=name, value=_text(value))
        for name, value in given.items()
    ]
    revision = model.get("revision", "")
    same = f"#model-{record.slug(model['name'])}-{record.slug(revision)}"
    inputs.append(_add(crate, same, "CreativeWork", name=model["name"], version=revision))
    paths = [folder / "run.json", *sorted(folder.glob("*.parquet")), *sorted(folder.glob("figures/*.p*"))]
    paths = [p for p in paths if not p.stem.endswith(_KEPT_BACK)]
    executed = folder.with_suffix(".ipynb")
    paths += [executed] if executed.is_file() else []
    ended = datetime.fromisoformat(facts["started"]) + timedelta(seconds=facts.get("wall_seconds", 0))
    return crate.add_action(
        tool,
        f"#run-{run}",
        object=inputs,
        result=[_file(crate, p, reports) for p in paths],
        properties={
            "name": f"{notebook} with {folder.parent.name}: {model['name']}",
            "description": f"{ledger.command_of(folder.parent.name, notebook, facts['config'])}. "
            f"{facts['results'].get('sentence', '')}",
            "startTime": facts["started"],
            "endTime": ended.isoformat(),
            "actionStatus": "http://schema.org/CompletedActionStatus",
        },
    )


def _text(value: object) -> str:
    """A parameter's value as text, as in a parameter file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
