"""python -m biasprune check MODEL: what a model can be used for, from its configuration and tokenizer, in seconds."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from biasprune.core import weights
from biasprune.core.model import LM, encode, locate, number_format, query_projections, unit_projections, wrap
from biasprune.measures.numbers import as_chat


def answer(use: Callable[[LM], str], lm: LM) -> str:
    """What a use says of a model, or "no: " and the reason that its own error gives."""
    try:
        return use(lm)
    except ValueError as e:
        return f"no: {e}"


def heads(lm: LM) -> str:
    a = lm.anatomy
    shared = f", each {a.n_heads // a.n_kv_heads} with one key and value" if a.n_kv_heads != a.n_heads else ""
    return f"{a.n_layers} layers × {a.n_heads} heads of {a.head_dim}{shared}"


def neurons(lm: LM) -> str:
    return f"{len(unit_projections(lm))} layers × {lm.anatomy.n_units} MLP units"


def single_weights(lm: LM) -> str:
    matrices = weights.linears(lm, lm.anatomy.n_layers - 1)
    size = sum(p.numel() for p in lm.model.get_submodule(lm.anatomy.layers[-1]).parameters())
    share = sum(m.weight.numel() for m in matrices.values()) / size
    return f"{len(matrices)} matrices a layer, {share:.0%} of its parameters"


def numbers(lm: LM) -> str:
    most = max(map(len, lm.tokenizer.batch_decode([[i] for i in encode(lm, ["1234567"], special=False)[0]])))
    return "digit by digit" if most == 1 else f"up to {most} digits a token"


def memory(lm: LM) -> str:
    gib = sum(p.numel() for p in lm.model.parameters()) * 4 / 2**30
    return f"weights {gib:.1f} GiB in float32, {gib / 2:.1f} in bfloat16; fast here: {number_format('fast')}"


USES: dict[str, Callable[[LM], str]] = {
    "heads": heads,
    "uniform ablation": lambda lm: query_projections(lm) and "heads can attend to all tokens alike",
    "neurons": neurons,
    "weights": single_weights,
    "chat": lambda lm: as_chat(lm, "Hello.") and "by its template",
    "numbers": numbers,
    "context": lambda lm: f"{lm.context} tokens",
    "memory": memory,
}


def capabilities(name: str, revision: str | None = None) -> pd.DataFrame:
    """What a model can be used for: use, answer; by packaged name, small-model name, local folder or hub id.

    Weights are neither read nor, from the hub, fetched. ValueError: what ``load`` would refuse, missing weights apart.
    """
    folder, _ = locate(name, revision, with_weights=False)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{name}: {folder} has no decoder's configuration and tokenizer: {e}") from e
    lm = wrap(model, tokenizer, name=name, folder=folder)
    return pd.DataFrame({"use": list(USES), "answer": [answer(use, lm) for use in USES.values()]})
