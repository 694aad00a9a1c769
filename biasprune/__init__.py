"""Where does social bias sit in a language model, and does cutting it out work?

Three papers on one engine: ``lm`` loads a model, ``ablate`` masks parts of it, ``decode`` samples
from it, ``headscores`` scores every attention head, ``select`` picks the heads to prune;
``prompts``, ``judge`` and ``measure`` say what bias is; ``record`` and ``figures`` keep and show
the results.
"""

__version__ = "0.1.0"
