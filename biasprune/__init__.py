"""Where does social bias sit in a language model, and does cutting it out work?

Three papers on one engine: ``lm`` loads a model, ``ablate`` masks parts of it, ``decode`` samples
from it, ``headscores`` scores every attention head, ``select`` picks the heads to prune;
``prompts``, ``judge`` and ``measure`` say what bias is, ``reliability`` whether scores of heads would
come out again, ``published`` reads the paper's own scores, ``biases`` compares axes, ``joint`` removes
several heads at once, ``likelihood`` measures bias without sampling. ``audit`` asks the same question about
people of two groups, ``answers`` reads off the distribution of what it would answer, ``gaps`` compares
the groups, ``weightscores`` scores weights and neurons, ``transfer`` selects and judges. ``downstream`` has
texts to classify and changes of them, ``toxicity`` those about groups of people, ``classify`` fine-tunes,
``pronouns`` measures a model's bias before that and prunes against it, ``mitigation`` is the grid of both,
``yardstick`` puts heads, neurons and fine-tuning data side by side. ``experiment`` turns head sets into
tables, ``figures`` tables into figures, ``record`` keeps a run, ``batch`` runs many, ``ledger`` sets them
beside what the papers claim, ``crate`` exports them, ``speed`` is the benchmark, and ``check`` refuses bad
input.

The modules load at first use: ``import biasprune; biasprune.select.fasp(...)`` needs no torch.
"""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

__version__ = "0.1.0"
_MODULES = (
    *("ablate", "answers", "audit", "batch", "biases", "check", "classify", "crate", "decode"),
    *("downstream", "experiment", "fetch", "figures", "gaps", "headscores", "joint", "judge"),
    *("ledger", "likelihood", "lm", "measure", "mitigation", "progress", "prompts", "pronouns"),
    *("published", "record", "reliability", "select", "speed", "toxicity", "transfer"),
    *("weightscores", "yardstick"),
)


def __getattr__(name: str) -> _ModuleType:
    if name in _MODULES:
        return _import_module(f"biasprune.{name}")
    raise AttributeError(f"module 'biasprune' has no attribute {name!r}")
