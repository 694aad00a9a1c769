"""Sampling with common random numbers, every batch row with its own mask.

The noise that decides a token is a function of (seed, prompt, step, token) alone. Two runs with
the same seed differ only where the model's own probabilities do, so the effect of removing a head
is a paired difference; and but for rounding the result doesn't depend on the batch, the order or
the device.
Adding Gumbel noise to log-probabilities and taking the maximum samples exactly from the softmax.

Since few tokens change when a head goes, the unpruned model's continuation is a good draft: one
pass over it finds, for every head, the first token that differs (replay), and only what comes after
is decoded. Rows of different prompts, masks and lengths are decoded together, without padding: a
row joins the batch when the batch has reached its length.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from biasprune import check
from biasprune.ablate import Start, in_halves, masked, passes
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


def gumbel(keys: Tensor, step: int | Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, the same for the same (key, step, token) on every device.

    Parameters
    ----------
    keys
        (rows,) int64, see ``stream_keys``.
    step
        Number of the new token, one for all rows or (rows,) int64.
    tokens
        (rows, k) int64 token ids.

    Returns
    -------
    Tensor
        (rows, k) float32.
    """
    steps = torch.as_tensor(step, dtype=torch.int64, device=keys.device)
    at_step = _mix(keys + (steps + 1) * _GOLDEN)  # int64 wraps around, as it should
    bits = _shift(_mix(at_step[:, None] + tokens * _GOLDEN), 11)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform)).float()


def stream_keys(prompts: Sequence[str], seed: int, stream: int = 0) -> Tensor:
    """One noise stream per prompt: (prompts,) int64 from the prompt's text, seed and stream."""
    text = [hashlib.blake2b(p.encode(), digest_size=8).digest() for p in prompts]
    key = torch.from_numpy(np.frombuffer(b"".join(text), dtype=np.int64).copy())
    salt = torch.tensor([seed, stream], dtype=torch.int64)
    return _mix(_mix(key + _mix(salt[:1] * _GOLDEN + 1)) + _mix(salt[1:] * _GOLDEN + 2))


_BLOCK = 64


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, (rows, vocabulary) → values and tokens (rows, k), in any order.

    The k largest entries lie in the k blocks with the largest maxima, so most of the vocabulary is
    read once, for the maxima, and never sorted.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // _BLOCK)
    if not 0 < k < blocks // 4:
        return logits.topk(min(k or vocabulary, vocabulary))
    if vocabulary % _BLOCK:
        logits = F.pad(logits, (0, blocks * _BLOCK - vocabulary), value=-torch.inf)
    cut = logits.view(rows, blocks, _BLOCK)
    best = cut.amax(-1).topk(k, sorted=False).indices
    inside = cut.gather(1, best[..., None].expand(-1, -1, _BLOCK)).view(rows, -1)
    tokens = (best[..., None] * _BLOCK + torch.arange(_BLOCK, device=best.device)).view(rows, -1)
    values, where = inside.topk(k)
    return values, tokens.gather(1, where)


def pick(logits: Tensor, keys: Tensor, step: int | Tensor, top_k: int, temperature: float) -> Tensor:
    """Draw the next token of every row: (rows, vocabulary) → (rows,).

    ``top_k`` 0 keeps the whole vocabulary; ``temperature`` 0 takes the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        values, tokens = top(logits, top_k)
    else:  # all of them: nothing to sort
        values, tokens = logits, torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    best = (values.float() / temperature + gumbel(keys, step, tokens)).argmax(-1, keepdim=True)
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
        If there is no prompt, or one is empty or no text, or nothing of it would be kept.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts: give a list of texts, not the single text {prompts[:40]!r}.")
    if max_prompt_tokens is not None:
        check.count(max_prompt_tokens, "max_prompt_tokens")
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one.")
    for i, p in enumerate(prompts):
        if not isinstance(p, str) or not p.strip():
            raise ValueError(f"prompt {i} is empty or no text: {p!r}.")
    return [ids[:max_prompt_tokens] for ids in lm.tokenizer(list(prompts))["input_ids"]]


def batch_sizes(lm: LM, length: int, memory_gib: float | None = None) -> tuple[int, int]:
    """Rows per decoding batch and tokens per batch of a full pass that fit into memory.

    Never more than what keeps the device busy (256 rows, 4,096 tokens on a CPU; 2,048 and 65,536 on a
    GPU), so that machines with enough memory use the same batches.

    Parameters
    ----------
    length
        Tokens of a sequence, prompt and continuation.
    memory_gib
        The budget; None takes half of what is free.

    Raises
    ------
    ValueError
        If the budget isn't positive.
    """
    if memory_gib is not None and not memory_gib > 0:
        raise ValueError(
            f"memory_gib = {memory_gib}: give a positive number, or None for half of what is free."
        )
    gpu = lm.device.type == "cuda"
    if memory_gib is None:
        free = torch.cuda.mem_get_info(lm.device)[0] if gpu else psutil.virtual_memory().available
        memory_gib = free / 2 / 2**30
    a, bytes_each = lm.anatomy, lm.dtype.itemsize
    config = lm.model.config.get_text_config()
    past = 2 * a.n_layers * a.n_kv_heads * a.head_dim * bytes_each  # keys and values of a token
    logits = config.vocab_size * (bytes_each + 4)
    row = 3 * past * length + logits  # waiting, in the batch, and while the batch grows
    hidden = (a.n_layers * config.hidden_size + 4 * a.n_units) * bytes_each
    few = 50 * config.hidden_size * (bytes_each + 4)  # rows of the unembedding, for log-ratios
    token = past + logits + hidden + few
    most_rows, most_tokens = (2048, 65536) if gpu else (256, 4096)
    budget = memory_gib * 2**30
    return max(1, min(most_rows, int(budget / row))), max(length, min(most_tokens, int(budget / token)))


@dataclass(frozen=True)
class _Sampling:
    """How tokens are drawn, and where they go."""

    lm: LM
    masks: Tensor  # (masks, layers, heads), on the CPU
    out: Tensor  # (samples, steps) int64 on the device, filled row by row
    keys: Tensor  # (samples,) noise streams on the device
    top_k: int
    temperature: float

    @property
    def steps(self) -> int:
        return self.out.shape[1]

    def ends(self) -> Tensor:
        """The end-of-text tokens, on the device."""
        eos = self.lm.model.generation_config.eos_token_id
        return torch.tensor([eos] if isinstance(eos, int) else eos or [-1], device=self.lm.device)


@dataclass(frozen=True)
class _Waiting:
    """Rows of one length that are ready to be decoded. ``sample`` and ``mask`` are on the CPU."""

    past: list[tuple[Tensor, Tensor]]  # keys and values of each layer (rows, heads, tokens, width)
    length: int  # number of tokens in ``past``
    token: Tensor  # (rows,) the token that comes next, not in ``past`` yet
    step: int  # the new token that is to be drawn after it
    sample: Tensor  # (rows,) row of ``_Sampling.out``
    mask: Tensor  # (rows,)

    def part(self, rows: Tensor) -> _Waiting:
        past = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.past]
        token = self.token[rows.to(self.token.device)]
        return _Waiting(past, self.length, token, self.step, self.sample[rows], self.mask[rows])


def _past(layers: Sequence[Any], rows: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of some rows of a cache's layers, cut to a length."""
    return [tuple(kv[rows.to(kv.device), :, :length] for kv in (x.keys, x.values)) for x in layers]


def _join(cache: DynamicCache, pasts: list[list[tuple[Tensor, Tensor]]]) -> None:
    """Add rows to a cache of the same length."""
    for i, layer in enumerate(zip(*pasts, strict=True)):
        k, v = (list(x) for x in zip(*layer, strict=True))
        if i < len(cache.layers):
            own = cache.layers[i]
            own.keys, own.values = torch.cat([own.keys, *k]), torch.cat([own.values, *v])
        else:
            cache.update(torch.cat(k), torch.cat(v), i)


def _decode(s: _Sampling, waiting: Sequence[_Waiting]) -> None:
    """Draw all remaining tokens of some rows, of whatever lengths, in one batch without padding."""
    lm, device, ends = s.lm, s.lm.device, s.ends()
    by_length = defaultdict(list)
    for w in waiting:
        by_length[w.length].append(w)
    sample = mask = step = torch.empty(0, dtype=torch.int64)  # of the rows in the batch, on the CPU
    token = torch.empty(0, dtype=torch.int64, device=device)
    done = torch.empty(0, dtype=torch.bool, device=device)
    cache, length = DynamicCache(), 0
    with ExitStack() as hooks:
        while by_length or len(sample):
            length = length if len(sample) else min(by_length)
            joining = by_length.pop(length, [])
            keep = step < s.steps
            if length % 8 == 0 and len(keep):  # seldom: this makes the CPU wait for the device
                keep &= ~done.cpu()
            if joining or not bool(keep.all()):
                kept = keep.nonzero()[:, 0]
                if not len(kept):
                    cache = DynamicCache()
                elif len(kept) < len(keep):
                    for own in cache.layers:  # each on its own device
                        here = kept.to(own.keys.device)
                        own.keys, own.values = own.keys[here], own.values[here]
                sample = torch.cat([sample[kept], *(w.sample for w in joining)])
                mask = torch.cat([mask[kept], *(w.mask for w in joining)])
                step = torch.cat([step[kept], *(torch.full_like(w.sample, w.step) for w in joining)])
                token = torch.cat([token[kept.to(device)], *(w.token for w in joining)])
                done = torch.cat([done[kept.to(device)], *(torch.zeros_like(w.token) > 0 for w in joining)])
                for w in joining:  # a batch that failed may have left tokens behind
                    s.out[w.sample.to(device), w.step :] = -1
                _join(cache, [w.past for w in joining])
                if not len(sample):
                    continue
                hooks.close()
                hooks.enter_context(masked(lm, s.masks[mask]))
                where, keys, at = sample.to(device), s.keys[sample.to(device)], step.to(device)
            forward = lm.model(token[:, None], past_key_values=cache, use_cache=True)
            cache = forward.past_key_values
            token = pick(forward.logits[:, -1], keys, at, s.top_k, s.temperature)
            s.out[where, at] = torch.where(done, -1, token)
            done = done | torch.isin(token, ends)
            step, at, length = step + 1, at + 1, length + 1


def _in_batches(s: _Sampling, waiting: Sequence[_Waiting], rows: int) -> None:
    """``_decode``, so many rows at a time, and in halves where memory doesn't suffice."""
    group = torch.cat([torch.full_like(w.sample, i) for i, w in enumerate(waiting)])
    row = torch.cat([torch.arange(len(w.sample)) for w in waiting])

    def run(group: Tensor, row: Tensor) -> None:
        _decode(s, [waiting[i].part(row[group == i]) for i in group.unique().tolist()])

    for some in torch.arange(len(row)).split(rows):
        in_halves(run, group[some], row[some])


def _prompt_pass(s: _Sampling, ids: Tensor, sample: Tensor, mask: Tensor) -> _Waiting:
    """Rows (rows, length) of equally long prompts under their masks; sample (rows, seeds)."""
    seeds = sample.shape[1]
    past = []
    if ids.shape[1] > 1:
        # The last token goes in as the first decoding step: asking the prompt pass for one position's
        # logits makes torch copy the unembedding once per row.
        cache = DynamicCache()
        with masked(s.lm, s.masks[mask]):
            s.lm.model.base_model(ids[:, :-1], past_key_values=cache, use_cache=True)
        past = _past(cache.layers, torch.arange(len(ids)).repeat_interleave(seeds), ids.shape[1] - 1)
    token = ids[:, -1].repeat_interleave(seeds)
    return _Waiting(past, ids.shape[1] - 1, token, 0, sample.reshape(-1), mask.repeat_interleave(seeds))


def _replay(
    s: _Sampling, start: Start, clean: DynamicCache, ids: Tensor, draft: Tensor, sample: Tensor,
    mask: Tensor, row: Tensor,
) -> list[_Waiting]:  # fmt: skip
    """Check drafts by one pass; keep each up to its first wrong token, mend that, return the rest.

    ids (drafts, tokens): prompt and all but the last token of draft (drafts, steps). sample, mask and
    row (rows,) say which pairs are checked.
    """
    on_device, n = row.to(ids.device), s.steps
    length = ids.shape[1] - n + 1  # of the prompt
    cache = DynamicCache()
    # as a tensor, not a number: indexing then copies only what is kept
    keep = torch.arange(length - 1, ids.shape[1], device=ids.device)
    with start(s.masks[mask], row):
        logits = s.lm.model(ids[on_device], past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    steps = torch.arange(n, device=ids.device).repeat(len(row))
    keys = s.keys[sample.to(ids.device)].repeat_interleave(n)
    picks = pick(logits.flatten(0, 1), keys, steps, s.top_k, s.temperature).view(-1, n)
    given = draft[on_device]
    is_end = torch.isin(given, s.ends())
    before_end = is_end.cumsum(1) - is_end.int() == 0
    wrong = (picks != given) & before_end
    given = given.masked_fill(~before_end, -1)
    first = torch.where(wrong.any(1), wrong.int().argmax(1), n)
    at = torch.arange(n, device=ids.device)
    right = torch.where(at < first[:, None], given, torch.where(at == first[:, None], picks, -1))
    s.out[sample.to(ids.device)] = right
    mended = picks.gather(1, first.clamp(max=n - 1)[:, None])[:, 0]
    first = torch.where(torch.isin(mended, s.ends()), n, first).cpu()
    rest = []
    for t in first[first < n - 1].unique().tolist():
        here = (first == t).nonzero()[:, 0]
        below = _past(clean.layers[: start.layer], row[here], length + t)  # as in the unmodified model
        past = below + _past(cache.layers[start.layer :], here, length + t)
        token = mended[here.to(mended.device)]
        rest.append(_Waiting(past, length + t, token, t + 1, sample[here], mask[here]))
    return rest


def _check_drawing(top_k: int, temperature: float) -> None:
    check.count(top_k, "top_k", 0)
    check.number(temperature, "temperature", 0)


def _check_tokens(lm: LM, tokens: np.ndarray) -> None:
    vocabulary = lm.model.get_output_embeddings().weight.shape[0]
    if tokens.dtype.kind not in "iu" or tokens.size and not -1 <= tokens.min() <= tokens.max() < vocabulary:
        raise ValueError(f"tokens: give ids from 0 to {vocabulary - 1}, −1 after the end of a text.")


@torch.inference_mode()
def sample(
    lm: LM,
    prompts: Sequence[str],
    *,
    masks: Tensor | None = None,
    seeds: Sequence[int] = (0,),
    streams: Sequence[int] | None = None,
    draft: np.ndarray | None = None,
    max_new_tokens: int = 40,
    top_k: int = 50,
    temperature: float = 1.0,
    max_prompt_tokens: int | None = None,
    batch_rows: int = 256,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> Continuations:
    """Continue every prompt under every mask and seed.

    Nothing is padded. Runs out of memory: the batch is halved and tried again.

    Parameters
    ----------
    masks
        (masks, layers, heads); None for the unmodified model.
    streams
        One integer per mask, mixed into its noise. The default gives all masks the same noise
        (coupled); different integers make them independent, as in the published procedure.
    draft
        (seeds, prompts, steps) continuations to try first, such as ``Continuations.tokens[0]`` of the
        unmodified model with the same seeds. Changes the time it takes, never the result (but for
        rounding).
    max_prompt_tokens
        Prompts are cut to this many tokens (FASP: 22). None doesn't cut.
    batch_rows, batch_tokens
        Sequences per batch when decoding (a prompt's seeds stay together), and tokens per batch when
        checking drafts.
    progress
        Label of a progress bar; None for none.

    Raises
    ------
    ValueError
        Empty prompts, prompt + continuation longer than the context, sampling settings out of
        range, or masks or a draft that don't fit.
    torch.OutOfMemoryError
        If a single prompt with its seeds doesn't fit.
    """
    for value, what in ((max_new_tokens, "max_new_tokens"), (batch_rows, "batch_rows")):
        check.count(value, what)
    _check_drawing(top_k, temperature)
    for seed in seeds:
        check.count(seed, "seed", 0)
    if len(seeds) == 0:
        raise ValueError("no seeds: give at least one.")
    a = lm.anatomy
    masks = torch.ones(1, a.n_layers, a.n_heads) if masks is None else masks.cpu()
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
    shape = (len(masks), len(seeds), len(prompts))
    if draft is not None and draft.shape != (*shape[1:], max_new_tokens):
        raise ValueError(f"draft has shape {draft.shape}; expected {(*shape[1:], max_new_tokens)}.")
    if draft is not None:
        _check_tokens(lm, draft)
    distinct = {x: torch.stack([stream_keys(prompts, seed, x) for seed in seeds]) for x in set(streams)}
    s = _Sampling(
        lm,
        masks,
        torch.full((int(np.prod(shape)), max_new_tokens), -1, device=lm.device),
        torch.stack([distinct[x] for x in streams]).reshape(-1).to(lm.device),
        top_k,
        temperature,
    )
    number = torch.arange(int(np.prod(shape))).view(shape)  # of a sample: its row in s.out
    shown = bar(total=number.numel(), desc=progress, unit="text")
    if draft is None:
        # Rows of one length go through all steps together; within a length masks are outermost, so that
        # neighbouring rows touch few layers.
        length = torch.tensor([len(x) for x in ids])
        jobs = torch.cat(
            [
                torch.cartesian_prod(torch.arange(len(masks)), (length == n).nonzero()[:, 0])
                for n in length.unique()
            ]
        )

        def run(mask: Tensor, prompt: Tensor) -> None:
            lengths = torch.tensor([len(ids[j]) for j in prompt])
            waiting = []
            for length in lengths.unique():
                m, p = mask[lengths == length], prompt[lengths == length]
                batch = torch.tensor([ids[j] for j in p], device=lm.device)
                waiting.append(_prompt_pass(s, batch, number[m, :, p], m))
            _decode(s, waiting)
            shown.update(len(mask) * len(seeds))

        for mask, prompt in (job.T for job in jobs.split(max(1, batch_rows // len(seeds)))):
            in_halves(run, mask, prompt)
    else:
        waiting: list[_Waiting] = []

        def replay(
            start: Start,
            clean: DynamicCache,
            ids: Tensor,
            given: Tensor,
            of: Tensor,
            mask: Tensor,
            row: Tensor,
        ) -> None:
            waiting.extend(_replay(s, start, clean, ids, given, of[mask, row], mask, row))

        for index, batch, given in _batches(lm, prompts, draft, max_prompt_tokens, batch_tokens):
            clean = DynamicCache()
            of = number[:, index // len(prompts), index % len(prompts)]
            for mask, row, start in passes(lm, masks, batch, batch_tokens // batch.shape[1], cache=clean):
                in_halves(partial(replay, start, clean, batch, given, of), mask, row)
                shown.update(len(mask))
                if sum(len(w.sample) for w in waiting) >= batch_rows:
                    _in_batches(s, waiting, batch_rows)
                    waiting.clear()
        if waiting:
            _in_batches(s, waiting, batch_rows)
    shown.close()
    tokens = s.out.view(*shape, max_new_tokens).cpu().numpy()
    return Continuations(tokens=tokens, texts=decode(lm, tokens))


def _log_prob(
    lm: LM, hidden: Tensor, steps: Tensor, kept: Tensor | None, temperature: float, direct: bool
) -> Tensor:
    """Log-probability of steps (rows, n), −1 where they don't count, drawn among some tokens: (rows,).

    hidden (rows, n, width) is the output of the last norm, kept (rows, n, k) or None for all tokens.
    ``direct`` computes the few logits that matter, in float32: rounded to 16 bits they would be the
    largest error of a log-ratio, and the whole vocabulary a good part of the time. Keeps gradients.
    """
    head = lm.model.get_output_embeddings()
    # with a model on several devices the last norm and the unembedding may be apart
    hidden, steps = hidden.to(head.weight.device), steps.to(head.weight.device)
    kept = None if kept is None else kept.to(head.weight.device)
    chosen = steps.clamp(min=0)[..., None]
    if direct:
        tokens = torch.cat([chosen, kept], -1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = F.embedding(tokens, head.weight).to(wide)
        logits = (rows @ hidden.to(wide)[..., None])[..., 0]
        if head.bias is not None:
            logits = logits + head.bias[tokens].to(wide)
        logits = capped(lm, logits)
        of_chosen, among = logits[..., 0], logits[..., 1:]
    else:
        logits = capped(lm, head(hidden.flatten(0, 1))).view(*steps.shape, -1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        of_chosen = logits.gather(-1, chosen)[..., 0]
        among = logits if kept is None else logits.gather(-1, kept)
    each = of_chosen / temperature - (among / temperature).logsumexp(-1)
    return torch.where(steps >= 0, each, 0).sum(-1).to(lm.device)


def capped(lm: LM, logits: Tensor) -> Tensor:
    """What Gemma 2 does to logits after the unembedding."""
    cap = getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


_CHECKED: WeakSet[LM] = WeakSet()


def check_unembedding(lm: LM) -> None:
    """Logits must be what the unembedding makes of the last hidden state, and nothing else.

    Looked at once for every model.
    """
    if lm in _CHECKED:
        return
    ids = torch.tensor([[1, 2, 3]], device=lm.device)
    with torch.no_grad():
        head, hidden = lm.model.get_output_embeddings(), lm.model.base_model(ids).last_hidden_state
        ours = capped(lm, head(hidden.to(head.weight.device))).to(lm.device)
        if not torch.allclose(ours, lm.model(ids).logits.to(lm.device), rtol=0.02, atol=0.02):
            raise ValueError(
                f"{type(lm.model).__name__} changes its logits after the unembedding in a way that isn't "
                "known here: use fidelity='exact', or add it to capped in biasprune/decode.py."
            )
    _CHECKED.add(lm)


def _kept(lm: LM, hidden: Tensor, top_k: int) -> Tensor | None:
    """The tokens that top-k sampling draws among, (rows, n, k); None for all."""
    if top_k == 0:
        return None
    with torch.no_grad():
        # flat, since torch copies the unembedding once per row for a view with gaps
        head = lm.model.get_output_embeddings()
        logits = head(hidden.flatten(0, 1).to(head.weight.device))
    return top(logits, top_k)[1].view(*hidden.shape[:2], -1).to(lm.device)


def _batches(
    lm: LM, prompts: Sequence[str], tokens: np.ndarray, max_prompt_tokens: int | None, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Samples of equal prompt length: their index into seeds · prompts, ids of the prompt and all but
    the last token of the continuation, and the continuation; the last two on the device."""
    if tokens.ndim != 3 or tokens.shape[1] != len(prompts) or not tokens.size:
        raise ValueError(
            f"tokens have shape {tokens.shape}; expected (seeds, {len(prompts)} prompts, steps)."
        )
    _check_tokens(lm, tokens)
    encoded = encode(lm, prompts, max_prompt_tokens)
    flat = torch.from_numpy(tokens.reshape(-1, tokens.shape[-1]))
    for length in sorted({len(x) for x in encoded}):
        same = [j for j, x in enumerate(encoded) if len(x) == length]
        which = torch.tensor([s * len(prompts) + j for s in range(len(tokens)) for j in same])
        for index in which.split(max(1, batch_tokens // (length + flat.shape[1]))):
            start = torch.tensor([encoded[int(i) % len(prompts)] for i in index])
            steps = flat[index]
            ids = torch.cat([start, steps[:, :-1].clamp(min=0)], 1)
            yield index, ids.to(lm.device), steps.to(lm.device)


def _check_random(lm: LM, top_k: int, temperature: float) -> None:
    _check_drawing(top_k, temperature)
    if temperature == 0:
        raise ValueError("greedy continuations have no probability to compare: set temperature > 0.")
    check_unembedding(lm)


@torch.inference_mode()
def log_ratio(
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
    """How much likelier given continuations are under every mask: log p(text | mask) − log p(text).

    All masks share a clean pass; each starts at its first masked layer. With top-k sampling both are
    probabilities among the unpruned model's k tokens: a token that the mask pushes out of the k, or
    into them, would have no ratio.

    Parameters
    ----------
    tokens
        (seeds, prompts, steps), from ``Continuations.tokens`` of the unpruned model.
    masks
        (masks, layers, heads).

    Returns
    -------
    ndarray
        (masks, seeds, prompts) float64.

    Raises
    ------
    ValueError
        If temperature is 0.
    """
    _check_random(lm, top_k, temperature)
    out = np.empty((len(masks), tokens.shape[0] * tokens.shape[1]))
    n, direct = tokens.shape[-1], 0 < top_k < lm.model.get_output_embeddings().weight.shape[0] // 4

    def run(start: Start, clean: tuple, mask: Tensor, row: Tensor) -> None:
        index, ids, steps, kept, own = clean
        here = row.to(lm.device)
        with start(masks[mask], row):
            hidden = lm.model.base_model(ids[here], use_cache=False).last_hidden_state[:, -n:]
        among = None if kept is None else kept[here]
        value = _log_prob(lm, hidden, steps[here], among, temperature, direct) - own[here]
        out[mask.numpy(), index[row].numpy()] = value.double().cpu().numpy()

    for index, ids, steps in _batches(lm, prompts, tokens, max_prompt_tokens, batch_tokens):
        clean = None
        for mask, row, start in passes(lm, masks, ids, batch_tokens // ids.shape[1], last=True):
            if clean is None:
                hidden = start.clean.last[:, -n:]
                kept = _kept(lm, hidden, top_k)
                own = _log_prob(lm, hidden, steps, kept, temperature, direct)
                clean = (index, ids, steps, kept, own)
            in_halves(partial(run, start, clean), mask, row)
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

    The slope of ``log_ratio``, with the same tokens to draw among.

    One forward and one backward pass for all heads: (seeds, prompts, steps) tokens →
    (seeds, prompts, layers, heads) float64.

    Raises
    ------
    ValueError
        If temperature is 0.
    """
    _check_random(lm, top_k, temperature)
    a, n = lm.anatomy, tokens.shape[-1]
    direct = 0 < top_k < lm.model.get_output_embeddings().weight.shape[0] // 4
    out = np.empty((tokens.shape[0] * tokens.shape[1], a.n_layers, a.n_heads))
    for index, ids, steps in _batches(lm, prompts, tokens, max_prompt_tokens, batch_tokens):
        masks = torch.ones(len(ids), a.n_layers, a.n_heads, device=lm.device, requires_grad=True)
        with torch.enable_grad(), masked(lm, masks):
            hidden = lm.model.base_model(ids, use_cache=False).last_hidden_state[:, -n:]
            kept = _kept(lm, hidden, top_k)
            total = _log_prob(lm, hidden, steps, kept, temperature, direct).sum()
            (gradient,) = torch.autograd.grad(total, masks)
        out[index.numpy()] = gradient.double().cpu().numpy()
    return out.reshape(*tokens.shape[:2], a.n_layers, a.n_heads)


def decode(lm: LM, tokens: np.ndarray) -> np.ndarray:
    """Texts of token arrays: (…, steps) int64, −1 after the end → (…) array of str."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    unique, where = np.unique(flat, axis=0, return_inverse=True)
    texts = lm.tokenizer.batch_decode([row[row >= 0] for row in unique], skip_special_tokens=True)
    return np.array(texts, dtype=object)[where.reshape(-1)].reshape(tokens.shape[:-1])
