"""Sampling with common random numbers, every batch row with its own mask.

The noise that decides a token is a function of (seed, prompt, step, token) alone. Two runs with
the same seed differ only where the model's own probabilities do, so the effect of removing a head
is a paired difference; and the result doesn't depend on the batch, the order or the device.
Adding Gumbel noise to log-probabilities and taking the maximum samples exactly from the softmax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biasprune.ablate import first_masked_layer, masked, recorded, resumed
from biasprune.lm import LM
from biasprune.progress import bar

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit integer


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch has only the arithmetic one)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014): int64 in, well-mixed int64 out."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def gumbel(keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, the same for the same (key, step, token) on every device.

    Parameters
    ----------
    keys
        (rows,) int64, see ``stream_keys``.
    tokens
        (rows, k) int64 token ids.

    Returns
    -------
    Tensor
        (rows, k) float32.
    """
    wrapped = ((step + 1) * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)
    at_step = _mix(keys + wrapped)
    bits = _shift(_mix(at_step[:, None] + tokens * _GOLDEN), 11)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform)).float()


def stream_keys(prompts: Sequence[str], seed: int, stream: int = 0) -> Tensor:
    """One noise stream per prompt: (prompts,) int64 from the prompt's text, seed and stream."""
    text = [hashlib.blake2b(p.encode(), digest_size=8).digest() for p in prompts]
    key = torch.from_numpy(np.frombuffer(b"".join(text), dtype=np.int64).copy())
    salt = torch.tensor([seed, stream], dtype=torch.int64)
    return _mix(_mix(key + _mix(salt[:1] * _GOLDEN + 1)) + _mix(salt[1:] * _GOLDEN + 2))


def pick(logits: Tensor, keys: Tensor, step: int, top_k: int, temperature: float) -> Tensor:
    """Draw the next token of every row: (rows, vocabulary) → (rows,).

    ``top_k`` 0 keeps the whole vocabulary; ``temperature`` 0 takes the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    best = (values / temperature + gumbel(keys, step, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0]


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """What the model wrote.

    Attributes
    ----------
    tokens
        (masks, seeds, prompts, steps) int64; −1 after the end-of-text token.
    texts
        (masks, seeds, prompts) array of str: decoded, special tokens skipped.
    """

    tokens: np.ndarray
    texts: np.ndarray


def encode(lm: LM, prompts: Sequence[str], max_prompt_tokens: int | None = None) -> list[list[int]]:
    """Token ids of every prompt, with the special tokens that the model's tokenizer adds.

    Raises
    ------
    ValueError
        If there is no prompt, or one is empty or no text.
    """
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one.")
    for i, p in enumerate(prompts):
        if not isinstance(p, str) or not p.strip():
            raise ValueError(f"prompt {i} is empty or no text: {p!r}.")
    return [ids[:max_prompt_tokens] for ids in lm.tokenizer(list(prompts))["input_ids"]]


def _generate(
    lm: LM, ids: Tensor, masks: Tensor, keys: Tensor, steps: int, top_k: int, temperature: float
) -> Tensor:
    """Sample for a batch of equally long prompts.

    ids (rows, length), masks (rows, layers, heads), keys (seeds, rows) → (seeds, rows, steps).
    All seeds share the pass over the prompt.
    """
    seeds, rows = keys.shape
    eos = lm.model.generation_config.eos_token_id
    eos = torch.tensor([eos] if isinstance(eos, int) else eos or [-1], device=lm.device)
    out = torch.full((rows * seeds, steps), -1, dtype=torch.int64, device=lm.device)
    done = torch.zeros(rows * seeds, dtype=torch.bool, device=lm.device)
    keys = keys.T.reshape(-1)  # row-major: the seeds of a row are neighbours
    cache = None
    if ids.shape[1] > 1:
        with masked(lm, masks):
            cache = lm.model.base_model(ids[:, :-1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(seeds)
    # The prompt's last token goes in as a first decoding step: asking the prompt pass for one
    # position's logits makes torch copy the unembedding once per row.
    token = ids[:, -1].repeat_interleave(seeds)
    with masked(lm, masks.repeat_interleave(seeds, 0)):
        for step in range(steps):
            forward = lm.model(token[:, None], past_key_values=cache, use_cache=True)
            cache = forward.past_key_values
            token = pick(forward.logits[:, -1], keys, step, top_k, temperature)
            out[:, step] = torch.where(done, -1, token)
            done |= torch.isin(token, eos)
            # Asking the device whether all are done stalls it, so ask seldom.
            if step % 8 == 7 and bool(done.all()):
                break
    return out.view(rows, seeds, steps).transpose(0, 1)


@torch.inference_mode()
def sample(
    lm: LM,
    prompts: Sequence[str],
    *,
    masks: Tensor | None = None,
    seeds: Sequence[int] = (0,),
    streams: Sequence[int] | None = None,
    max_new_tokens: int = 40,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = None,
    batch_rows: int = 256,
    progress: str | None = None,
) -> Continuations:
    """Continue every prompt under every mask and seed.

    Prompts of equal length share a batch, so nothing is padded. Runs out of memory: the batch is
    halved and tried again.

    Parameters
    ----------
    masks
        (masks, layers, heads); None for the unmodified model.
    streams
        One integer per mask, mixed into its noise. The default gives all masks the same noise
        (coupled); different integers make them independent, as in the published procedure.
    max_prompt_tokens
        Prompts are cut to this many tokens (FASP: 22). None doesn't cut.
    batch_rows
        Sequences per batch, masks × prompts × seeds.
    progress
        Label of a progress bar; None for none.

    Raises
    ------
    ValueError
        Empty prompts, prompt + continuation longer than the context, sampling settings out of
        range, or masks that don't fit the model.
    torch.OutOfMemoryError
        If a single row doesn't fit.
    """
    if max_new_tokens < 1 or top_k < 0 or temperature < 0 or batch_rows < 1 or len(seeds) == 0:
        raise ValueError(
            "need max_new_tokens ≥ 1, top_k ≥ 0, temperature ≥ 0, batch_rows ≥ 1 and a seed; got "
            f"{max_new_tokens}, {top_k}, {temperature}, {batch_rows}, {list(seeds)}."
        )
    a = lm.anatomy
    masks = torch.ones(1, a.n_layers, a.n_heads) if masks is None else masks
    if masks.dim() != 3 or tuple(masks.shape[1:]) != (a.n_layers, a.n_heads):
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}; expected (masks, {a.n_layers}, {a.n_heads})."
        )
    streams = [0] * len(masks) if streams is None else list(streams)
    if len(streams) != len(masks):
        raise ValueError(f"{len(streams)} streams for {len(masks)} masks.")
    ids = encode(lm, prompts, max_prompt_tokens)
    longest = max(map(len, ids))
    if longest + max_new_tokens > lm.context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context "
            f"of {lm.context}: shorten the prompt, or set max_prompt_tokens."
        )
    # keys (streams, seeds, prompts); masks usually share one stream
    distinct = {s: torch.stack([stream_keys(prompts, seed, s) for seed in seeds]) for s in set(streams)}
    shape = (len(masks), len(seeds), len(prompts))
    tokens = np.full((*shape, max_new_tokens), -1, dtype=np.int64)
    shown = bar(total=int(np.prod(shape)), desc=progress, unit="text")

    def run(jobs: list[tuple[int, int]]) -> None:
        m, p = (torch.tensor(x) for x in zip(*jobs, strict=True))
        keys = torch.stack([distinct[streams[i]][:, j] for i, j in jobs], dim=1)
        batch = torch.tensor([ids[j] for _, j in jobs], device=lm.device)
        try:
            out = _generate(
                lm, batch, masks[m].to(lm.device), keys.to(lm.device), max_new_tokens, top_k, temperature
            )
        except torch.OutOfMemoryError:
            if len(jobs) == 1:
                raise
            out = None  # retry outside the handler, which would keep the failed batch alive
        if out is None:
            torch.cuda.empty_cache()
            run(jobs[: len(jobs) // 2])
            run(jobs[len(jobs) // 2 :])
            return
        tokens[m.numpy(), :, p.numpy()] = out.transpose(0, 1).cpu().numpy()
        shown.update(len(jobs) * len(seeds))

    per_batch = max(1, batch_rows // len(seeds))
    for length in sorted({len(x) for x in ids}):
        same = [j for j, x in enumerate(ids) if len(x) == length]
        # masks outermost: neighbouring rows then touch few layers
        jobs = [(i, j) for i in range(len(masks)) for j in same]
        for start in range(0, len(jobs), per_batch):
            run(jobs[start : start + per_batch])
    shown.close()
    return Continuations(tokens=tokens, texts=decode(lm, tokens))


def _log_prob(lm: LM, ids: Tensor, steps: Tensor, top_k: int, temperature: float) -> Tensor:
    """Log-probability of sampling the last tokens of some rows: ids (rows, length) → (rows,).

    steps (rows, n): the n last tokens again, −1 where they don't count. Keeps gradients.
    """
    length, n = ids.shape[1], steps.shape[1]
    # as a tensor, not a number: indexing then copies only what is kept
    keep = torch.arange(length - n - 1, length - 1, device=ids.device)
    logits = lm.model(ids, use_cache=False, logits_to_keep=keep).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = logits.gather(-1, steps.clamp(min=0)[..., None])[..., 0]
    if top_k:
        logits = logits.topk(min(top_k, logits.shape[-1])).values
        chosen = chosen.masked_fill(chosen < logits[..., -1], -torch.inf)
    each = chosen - logits.logsumexp(-1)
    return torch.where(steps >= 0, each, 0).sum(-1)


def _batches(
    lm: LM, prompts: Sequence[str], tokens: np.ndarray, max_prompt_tokens: int | None, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Samples of equal prompt length: (index into seeds · prompts, ids, steps), all on the device."""
    encoded = encode(lm, prompts, max_prompt_tokens)
    flat = torch.from_numpy(tokens.reshape(-1, tokens.shape[-1]))
    for length in sorted({len(x) for x in encoded}):
        same = [j for j, x in enumerate(encoded) if len(x) == length]
        which = torch.tensor([s * len(prompts) + j for s in range(len(tokens)) for j in same])
        for index in which.split(max(1, batch_tokens // (length + flat.shape[1]))):
            start = torch.tensor([encoded[int(i) % len(prompts)] for i in index])
            steps = flat[index]
            ids = torch.cat([start, steps.clamp(min=0)], 1)
            yield index, ids.to(lm.device), steps.to(lm.device)


def _check_random(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError("greedy continuations have no probability to compare: set temperature > 0.")


@torch.inference_mode()
def log_prob(
    lm: LM,
    prompts: Sequence[str],
    tokens: np.ndarray,
    masks: Tensor,
    *,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Log-probability of given continuations under every mask, by one teacher-forced pass each.

    All masks share a clean pass; each starts at its first masked layer.

    Parameters
    ----------
    tokens
        (seeds, prompts, steps), from ``Continuations.tokens``.
    masks
        (masks, layers, heads).

    Returns
    -------
    ndarray
        (masks, seeds, prompts) float64, −inf where a token leaves the top k.

    Raises
    ------
    ValueError
        If temperature is 0.
    """
    _check_random(temperature)
    start = first_masked_layer(masks)
    out = np.empty((len(masks), tokens.shape[0] * tokens.shape[1]))
    for index, ids, steps in _batches(lm, prompts, tokens, max_prompt_tokens, batch_tokens):
        with recorded(lm, set(start) - {0}) as clean:
            if any(start):
                lm.model.base_model(ids, use_cache=False)
        rows = max(1, batch_tokens // ids.shape[1])
        for layer in sorted(set(start)):
            here = torch.tensor([i for i, s in enumerate(start) if s == layer])
            for job in torch.cartesian_prod(here, torch.arange(len(index))).split(rows):
                m, j = job.T
                on_device = j.to(lm.device)
                with ExitStack() as stack:
                    if layer:
                        hidden = clean.hidden[layer][on_device]
                        stack.enter_context(resumed(lm, layer, hidden, clean.returns_tuple))
                    stack.enter_context(masked(lm, masks[m]))
                    value = _log_prob(lm, ids[on_device], steps[on_device], top_k, temperature)
                out[m.numpy(), index[j].numpy()] = value.double().cpu().numpy()
    return out.reshape(len(masks), *tokens.shape[:2])


def log_prob_gradient(
    lm: LM,
    prompts: Sequence[str],
    tokens: np.ndarray,
    *,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = None,
    batch_tokens: int = 1024,
) -> np.ndarray:
    """∂ log-probability / ∂ mask of every head at mask = 1, for every continuation.

    One forward and one backward pass for all heads: (seeds, prompts, steps) tokens →
    (seeds, prompts, layers, heads) float64.

    Raises
    ------
    ValueError
        If temperature is 0.
    """
    _check_random(temperature)
    a = lm.anatomy
    out = np.empty((tokens.shape[0] * tokens.shape[1], a.n_layers, a.n_heads))
    for index, ids, steps in _batches(lm, prompts, tokens, max_prompt_tokens, batch_tokens):
        masks = torch.ones(len(ids), a.n_layers, a.n_heads, device=lm.device, requires_grad=True)
        with torch.enable_grad(), masked(lm, masks):
            total = _log_prob(lm, ids, steps, top_k, temperature).sum()
            (gradient,) = torch.autograd.grad(total, masks)
        out[index.numpy()] = gradient.double().cpu().numpy()
    return out.reshape(*tokens.shape[:2], a.n_layers, a.n_heads)


def decode(lm: LM, tokens: np.ndarray) -> np.ndarray:
    """Texts of token arrays: (…, steps) int64, −1 after the end → (…) array of str."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    unique, where = np.unique(flat, axis=0, return_inverse=True)
    texts = lm.tokenizer.batch_decode([row[row >= 0] for row in unique], skip_special_tokens=True)
    return np.array(texts, dtype=object)[where.reshape(-1)].reshape(tokens.shape[:-1])
