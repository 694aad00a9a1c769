"""Bad input gets one clear error: what is shared of finding it. Needs no torch.

All raise ValueError, with what was given and what would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def numbers(values: ArrayLike, what: str) -> np.ndarray:
    """Values as float64; NaN stays."""
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{what}: expected numbers ({e}).") from e


def number(value: Any, what: str, low: float = -np.inf, high: float = np.inf) -> float:
    """A finite number from low to high."""
    if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(value):
        raise ValueError(f"{what} = {value!r} is not a number.")
    if not low <= value <= high:
        raise ValueError(f"{what} = {value} is outside {low:g} … {high:g}.")
    return float(value)


def share(value: Any, what: str) -> float:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{what} = {value} is not a share between 0 and 1.")
    return float(value)


def count(value: Any, what: str, least: int = 1) -> int:
    """A whole number from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{what} = {value!r}: give a whole number from {least} on.")
    return int(value)


def texts(values: Any, what: str) -> None:
    """A list of texts: one string alone would be read letter by letter."""
    if isinstance(values, str):
        raise ValueError(f"{what}: give a list of texts, not the single text {values[:40]!r}.")
    if bad := [i for i, t in enumerate(values) if not isinstance(t, str)]:
        raise ValueError(f"{what}: item {bad[0]} is no text but {type(list(values)[bad[0]]).__name__}.")


def columns(table: Any, wanted: Iterable[str], what: str, *, rows: bool = True) -> None:
    """A table with these columns and, with ``rows``, at least one row."""
    if missing := [c for c in wanted if c not in table]:
        raise ValueError(f"{what} lack the columns {', '.join(missing)}; there are {list(table)}.")
    if rows and not len(table):
        raise ValueError(f"no {what}: the table has no rows.")


def choice(value: Any, known: Sequence[str], what: str) -> None:
    """One of some names."""
    if value not in known:
        raise ValueError(f"{what} {value!r}: choose {', '.join(known[:-1])} or {known[-1]}.")
