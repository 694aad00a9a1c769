"""Where does social bias sit in a language model, and does cutting it out work?

Three papers on one engine. ``core`` loads a model, masks parts of it, samples from it and scores texts, and knows no
measure. ``measures`` say what bias is, ``methods`` what is done against it, ``downstream`` fine-tunes classifiers,
``papers`` reads what was published and joins claims with verdicts. Notebooks tell the story.

Modules load at first use: ``import biasprune; biasprune.select.fasp(...)`` needs no torch.
"""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

__version__ = "0.1.0"
_MODULES = ("core", "measures", "methods", "downstream", "papers", "figures", "prompts", "select")


def __getattr__(name: str) -> _ModuleType:
    if name in _MODULES:
        return _import_module(f"biasprune.{name}")
    raise AttributeError(f"module 'biasprune' has no attribute {name!r}")
