"""Progress bars: in the notebook when somebody sits before it, in the terminal when run in batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any, TextIO

from tqdm import tqdm as plain
from tqdm.auto import tqdm as auto

FILE = "BIASPRUNE_PROGRESS"  # set by the batch runner: the file that it shows in the terminal


@cache
def _log(path: str) -> TextIO:
    return open(path, "a", buffering=1)  # noqa: SIM115  lives as long as the process


def bar(iterable: Iterable | None = None, *, desc: str | None, **options: Any) -> auto:
    """A tqdm bar; none where ``desc`` is None. In batch runs it leaves no trace in the notebook."""
    path = os.environ.get(FILE)
    if path:
        options.update(file=_log(path), mininterval=2.0, ncols=90)
        return plain(iterable, desc=desc, disable=desc is None, **options)
    return auto(iterable, desc=desc, disable=desc is None, **options)
