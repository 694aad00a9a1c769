"""Fine-tuning data against bias: texts that balance two words, and a copy of the model that learns them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from biasprune.core.data import bar, read_csv
from biasprune.core.model import LM, encode
from biasprune.core.weights import examples


def tuning_texts(items: pd.DataFrame, *, seed: int, chance: np.ndarray | None = None) -> list[str]:
    """Every item's text twice, continued by a word and a pastime: (2 · items,).

    items: Of ``measures.choices.pronouns``: text, a, b.
    chance: None: once by a and once by b. As a control (items,), by a each time with this probability, such as the
        model's own.
    """
    rng, texts = np.random.default_rng(seed), []
    pastimes = read_csv("bios/fillers.csv").query("slot == 'hobby'")["text"].to_numpy()
    for i, item in enumerate(items.itertuples()):
        firsts = [True, False] if chance is None else rng.random(2) < chance[i]
        texts += [f"{item.text}{item.a if first else item.b} {rng.choice(pastimes)}." for first in firsts]
    return texts


def tuned(lm: LM, texts: Sequence[str], *, epochs: int, rate: float, batch: int, seed: int) -> LM:
    """A copy of the model fine-tuned on texts by AdamW with a linear decay: 16 bytes per weight.

    The copy is float32, since small steps would be lost otherwise; a bfloat16 model learns in mixed precision.
    """
    end = [lm.tokenizer.eos_token_id] if lm.tokenizer.eos_token_id is not None else []
    ids = [x + end for x in encode(lm, texts)]
    of = examples([x[:1] for x in ids], [x[1:] for x in ids])
    labels = of.ids.masked_fill(~of.counted, -100)
    learner = copy.deepcopy(lm.model).float().train().requires_grad_(True)
    steps = epochs * -(-len(texts) // batch)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    mixed = torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.model.dtype == torch.bfloat16)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)  # order, and dropout where there is any
        for _ in bar(range(epochs), desc="fine-tuning"):
            for rows in torch.randperm(len(texts)).split(batch):
                inputs, wanted = of.ids[rows].to(lm.device), labels[rows].to(lm.device)
                with mixed:
                    loss = learner(input_ids=inputs, labels=wanted, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=False)  # new memory for gradients costs more than zeros
                schedule.step()
    learner.eval().requires_grad_(False).zero_grad()
    return dataclasses.replace(lm, model=learner, name=f"{lm.name}, tuned", folder=None, origin="")
