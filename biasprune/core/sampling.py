"""Sampling with common random numbers: every batch row has its own pruning, and all see the same noise.

A token is the maximum of log-probabilities and Gumbel noise, which samples exactly from the softmax. The noise is a
function of (prompt, seed, step, token) alone: two prunings with the same seed differ only where their own probabilities
do, and but for rounding the result doesn't depend on the batch, the order or the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from biasprune.core.data import bar
from biasprune.core.masks import Pruning, keep_masks, scaled
from biasprune.core.model import LM, encode, equal_lengths, in_halves

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit integer
_BLOCK = 64


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch has only the arithmetic one)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014): int64 in, well-mixed int64 out."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def gumbel(keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of keys (rows,), as of ``stream_keys``, and token ids (rows, k): (rows, k) float32."""
    keys_of_step = _mix(keys + torch.tensor(step + 1, device=keys.device) * _GOLDEN)  # wraps around
    bits = _shift(_mix(keys_of_step[:, None] + tokens * _GOLDEN), 11)
    return -torch.log(-torch.log((bits.to(torch.float64) + 0.5) * 2.0**-53)).float()


def stream_keys(prompts: Sequence[str], seed: int, stream: int = 0) -> Tensor:
    """One noise stream per prompt: (prompts,) int64 from the prompt's text, seed and stream."""
    text = [hashlib.blake2b(p.encode(), digest_size=8).digest() for p in prompts]
    key = torch.from_numpy(np.frombuffer(b"".join(text), dtype=np.int64).copy())
    salt = torch.tensor([seed, stream], dtype=torch.int64)
    return _mix(_mix(key + _mix(salt[:1] * _GOLDEN + 1)) + _mix(salt[1:] * _GOLDEN + 2))


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, (rows, vocabulary) → values and tokens (rows, k), in any order; 0 takes all.

    They lie in the k blocks with the largest maxima, so most of the vocabulary is read once and never sorted.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // _BLOCK)
    if k == 0:
        return logits, torch.arange(vocabulary, device=logits.device).expand_as(logits)
    if k >= blocks // 4:
        return logits.topk(min(k, vocabulary))
    if vocabulary % _BLOCK:
        logits = F.pad(logits, (0, -vocabulary % _BLOCK), value=-torch.inf)
    split = logits.view(rows, blocks, _BLOCK)
    best = split.amax(-1).topk(k, sorted=False).indices
    inside = split.gather(1, best[..., None].expand(-1, -1, _BLOCK)).view(rows, -1)
    tokens = (best[..., None] * _BLOCK + torch.arange(_BLOCK, device=best.device)).view(rows, -1)
    values, where = inside.topk(k)
    return values, tokens.gather(1, where)


def pick(logits: Tensor, keys: Tensor, step: int, top_k: int, temperature: float) -> Tensor:
    """Draw the next token of every row: (rows, vocabulary) → (rows,). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = top(logits, top_k)
    best = (values.float() / temperature + gumbel(keys, step, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0]


@dataclass(frozen=True)
class Continuations:
    """What the model wrote."""

    tokens: np.ndarray  # (prunings, seeds, prompts, steps) int64; −1 after the end-of-text token
    texts: np.ndarray  # (prunings, seeds, prompts) str: decoded, special tokens skipped


@torch.inference_mode()
def sample(
    lm: LM,
    prompts: Sequence[str],
    prunings: Sequence[Pruning] = (Pruning(),),
    *,
    seeds: Sequence[int] = (0,),
    streams: Sequence[int] | None = None,
    max_new_tokens: int = 40,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = None,
    special: bool = True,
    batch_rows: int = 256,
    progress: str | None = None,
) -> Continuations:
    """Continue every prompt, encoded with ``max_prompt_tokens`` and ``special``, under every pruning and seed.

    Prunings are of heads and units; ``batch_rows`` sequences share a batch. An integer of ``streams`` per pruning is
    mixed into its noise: different ones make it independent, as in the published procedure; None gives all the same
    (common random numbers). ValueError: an empty prompt, or one that with its continuation exceeds the context.
    """
    ids = encode(lm, prompts, max_prompt_tokens, special=special)
    longest = max(map(len, ids))
    if longest + max_new_tokens > lm.context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {lm.context}: "
            "shorten the prompt, or set max_prompt_tokens."
        )
    streams = [0] * len(prunings) if streams is None else list(streams)
    of_stream = {x: torch.stack([stream_keys(prompts, s, x) for s in seeds], 1) for x in set(streams)}
    keys = torch.stack([of_stream[x] for x in streams]).to(lm.device)  # (prunings, prompts, seeds)
    tokens = np.full((len(prunings), len(prompts), len(seeds), max_new_tokens), -1)
    shown = bar(total=tokens[..., 0].size, desc=progress, unit="text")

    def run(pruning: Tensor, prompt: Tensor) -> None:
        batch = torch.tensor([ids[i] for i in prompt.tolist()], device=lm.device)
        masks, key = keep_masks(lm.anatomy, prunings, pruning), keys[pruning, prompt].flatten()
        steps = _decode(lm, batch, key, masks, len(seeds), max_new_tokens, top_k, temperature)
        tokens[pruning.numpy(), prompt.numpy()] = steps.view(len(prompt), len(seeds), -1).cpu().numpy()
        shown.update(len(prompt) * len(seeds))

    for numbers, _ in equal_lengths(ids, len(prompts) * longest):  # one group per length: nothing is padded
        cells = torch.cartesian_prod(torch.arange(len(prunings)), numbers)
        for pruning, prompt in (c.T for c in cells.split(max(1, batch_rows // len(seeds)))):
            in_halves(run, pruning, prompt)
    shown.close()
    tokens = tokens.transpose(0, 2, 1, 3)
    return Continuations(tokens=tokens, texts=decode(lm, tokens))


def _decode(
    lm: LM, ids: Tensor, keys: Tensor, masks: dict, seeds: int, steps: int, top_k: int, temperature: float
) -> Tensor:
    """New tokens of prompts of equal length (rows, tokens), each for several seeds: (rows · seeds, steps)."""
    eos = lm.model.generation_config.eos_token_id
    ends = torch.tensor([eos] if isinstance(eos, int) else eos or [-1], device=lm.device)
    cache = DynamicCache()
    if ids.shape[1] > 1:
        # without the last token, since logits of one position make torch copy the unembedding once per row on a CPU
        with scaled(lm, **masks):
            lm.model.base_model(ids[:, :-1], past_key_values=cache, use_cache=True)
        if seeds > 1:
            cache.batch_repeat_interleave(seeds)
    token = ids[:, -1:].repeat_interleave(seeds, 0)
    masks = {k: m if m is None else m.repeat_interleave(seeds, 0) for k, m in masks.items()}
    out = torch.full((len(token), steps), -1, device=lm.device)
    done = torch.zeros(len(token), dtype=torch.bool, device=lm.device)
    with scaled(lm, **masks):
        for step in range(steps):
            logits = lm.model(token, past_key_values=cache, use_cache=True).logits[:, -1]
            token = pick(logits, keys, step, top_k, temperature)[:, None]
            out[:, step] = torch.where(done, -1, token[:, 0])
            done |= torch.isin(token[:, 0], ends)
            if step % 8 == 7 and bool(done.all()):  # seldom: this makes the CPU wait for the device
                break
    return out


def decode(lm: LM, tokens: np.ndarray) -> np.ndarray:
    """Texts of token arrays: (…, steps) int64, −1 after the end → (…) array of str."""
    unique, where = np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0, return_inverse=True)
    texts = lm.tokenizer.batch_decode([row[row >= 0] for row in unique], skip_special_tokens=True)
    return np.array(texts, dtype=object)[where.reshape(-1)].reshape(tokens.shape[:-1])
