"""Scores in, set of heads out; see ``biasprune.methods.select``."""

from biasprune.methods.select import fasp, lowest, random

__all__ = ["fasp", "lowest", "random"]
