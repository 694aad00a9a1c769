"""Prompts per axis of bias; see ``biasprune.measures.prompts``."""

from biasprune.measures.prompts import holistic_bias, load, sample

__all__ = ["holistic_bias", "load", "sample"]
