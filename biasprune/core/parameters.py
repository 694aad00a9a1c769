"""Parameters of a notebook: what its parameters cell declares, and one clear error for anything else.

The same check serves papermill, the workflow and Jupyter. It needs no torch.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_TYPES = {t.__name__: t for t in (str, int, float, bool, list, dict)}
_HINTS = {
    "str": "; papermill takes a text as it is by -r",
    "float": "; YAML wants a point: 1.0e-3",
    "bool": "; write True or False",
    "list": "; papermill takes lists by -y 'name: [value, …]'",
    "dict": "; papermill takes mappings by -y 'name: {key: value, …}'",
}


def notebooks_dir() -> Path:
    """The repository's folder of notebooks: $BIASPRUNE_NOTEBOOKS, or the one beside the package."""
    return Path(os.environ.get("BIASPRUNE_NOTEBOOKS") or ROOT / "notebooks")


def code_cells(notebook: Path, *, parameters: bool) -> list[str]:
    """Sources of a notebook's parameters cell, or of its other code cells."""
    code = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return ["".join(c["source"]) for c in code if ("parameters" in c["metadata"].get("tags", [])) == parameters]


def parameters_of(notebook: Path) -> dict[str, tuple[str, Any]]:
    """Name → (annotated type, default) of what a notebook's parameters cell declares."""
    body = [s for source in code_cells(notebook, parameters=True) for s in ast.parse(source).body]
    return {s.target.id: (s.annotation.id, ast.literal_eval(s.value)) for s in body if isinstance(s, ast.AnnAssign)}


def check_parameters(values: Mapping[str, Any], declared: Mapping[str, tuple[str, Any]], where: str) -> dict[str, Any]:
    """The values, if every name is declared and every value has its type. An int will do for a float.

    The items of a list must have the type that the default's items have, if that is one type; counts aren't negative,
    and what is called alpha, gamma or share lies in 0 … 1. Otherwise a ValueError names the nearest parameter, the type
    or the range.
    """
    if unknown := [name for name in values if name not in declared]:
        nearest = {name: difflib.get_close_matches(name, declared, n=1) for name in unknown}
        said = ", ".join(f"{name} (did you mean {near[0]}?)" if near else name for name, near in nearest.items())
        known = "" if all(nearest.values()) else f" Known: {', '.join(sorted(declared))}."
        raise ValueError(f"{where}: there is no parameter {said}.{known}")
    typed = {name: _typed(value, *declared[name], f"{where}: {name}") for name, value in values.items()}
    for name, value in typed.items():
        if type(value) is int and value < 0:
            raise ValueError(f"{where}: {name} = {value} is negative.")
        if re.search("alpha|gamma|share", name) and (bad := [x for x in _numbers(value) if not 0 <= x <= 1]):
            raise ValueError(f"{where}: {name} takes shares between 0 and 1, not {bad[0]}.")
    return typed


def _numbers(value: Any) -> list[float]:
    """All numbers inside lists and dicts."""
    if isinstance(value, list | dict):
        return [x for item in (value.values() if isinstance(value, dict) else value) for x in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def _typed(value: Any, kind: str, default: Any, where: str) -> Any:
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not _TYPES[kind]:
        raise ValueError(f"{where} takes {kind}, not {value!r} ({type(value).__name__}){_HINTS.get(kind, '')}.")
    if kind == "list" and len({type(item) for item in default}) == 1:
        item = type(default[0]).__name__
        return [_typed(x, item, default[0], f"{where}, item {i}") for i, x in enumerate(value, 1)]
    return value


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns, if it assigns literals and does nothing else or if papermill wrote it."""
    with suppress(SyntaxError, ValueError, AttributeError):  # a magic; no literal; no plain assignment
        body = ast.parse(source).body
        for statement in body if not source.startswith("# Parameters") else []:
            ast.literal_eval(statement.value)
        return [target.id for s in body for target in getattr(s, "targets", [getattr(s, "target", None)])]
    return []


def _undefined(sources: Iterable[str]) -> set[str]:
    """Names that cells read and none defines: what a parameter was called before a slip in the parameters cell."""
    read, defined = set(), {*dir(builtins), "display", "get_ipython"}
    with suppress(SyntaxError):
        for node in (node for source in sources for node in ast.walk(ast.parse(source))):
            match node:
                case ast.Name(id=name, ctx=ast.Load()):
                    read.add(name)
                case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ExceptHandler(name=name):
                    defined.add(name)
                case ast.alias(name=name, asname=short):
                    defined.add(short or name.split(".")[0])
        return read - defined
    return set()  # a magic may define anything


def checked(notebook: str, cell: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The declared parameters' values in a notebook's ``globals()``, and the names that are set for other notebooks.

    Papermill and people set parameters in a cell of their own. It is found in the kernel's history, so that a slip in
    a name isn't passed over. What another notebook declares may be set: one parameter file serves all of them.
    """
    path = notebooks_dir() / f"{notebook}.ipynb"
    declared, others = parameters_of(path), code_cells(path, parameters=False)
    names = {n for source in cell.get("In", []) if source not in others for n in _assigned(source) if n in cell}
    if extra := sorted(names - set(declared)):
        elsewhere = {n for other in notebooks_dir().glob("[0-9]*.ipynb") for n in parameters_of(other)}
        check_parameters({n: cell[n] for n in extra if n not in elsewhere}, declared, notebook)
    unset = _undefined([*code_cells(path, parameters=True), *others]) - set(cell)
    check_parameters(dict.fromkeys(unset), declared, notebook)
    return check_parameters({name: cell[name] for name in declared}, declared, notebook), extra
