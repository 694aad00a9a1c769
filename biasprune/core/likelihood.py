"""What a model says of given texts: log-probabilities of tokens, and the first-order effect of every part.

Logits are computed in float32 from the last hidden states, and only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from biasprune.core.data import bar
from biasprune.core.masks import Pruning, scaled
from biasprune.core.model import LM, encode, equal_lengths, in_halves
from biasprune.core.resume import Start, passes
from biasprune.core.sampling import top

Batches = Iterable[tuple[Tensor, Tensor]]  # row numbers (n,), token ids (n, tokens)
Objective = Callable[[Tensor, Tensor], Tensor]  # (row numbers, ids on the device) → (n,), differentiable
_POSITIONS = 1024  # logits of so many positions are held at once
_CHECKED: WeakSet[LM] = WeakSet()


def check_unembedding(lm: LM) -> None:
    """Logits must be what the unembedding makes of the last hidden state. Asked once per model, before masks."""
    if lm in _CHECKED:
        return
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]], device=lm.device)
        hidden, logits = getattr(lm.model.base_model(ids), "last_hidden_state", None), lm.model(ids).logits
        ours = None if hidden is None else unembed(lm, hidden)
        if ours is None or not torch.allclose(ours, logits.to(ours), rtol=0.02, atol=0.02):
            how = "changes its logits after the unembedding: add that to unembed, or take fidelity 'exact'."
            raise ValueError(f"{type(lm.model).__name__} {how}")
    _CHECKED.add(lm)


def unembed(lm: LM, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logits (…, vocabulary or k), float32, of hidden states (…, width): of all tokens, or of tokens (k,) or (…, k)."""
    head, config = lm.model.get_output_embeddings(), lm.model.config.get_text_config()
    hidden = hidden.to(head.weight.device)  # with a model on several devices they may be apart
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if tokens is None:
        # flat, since torch copies the unembedding once per row for a view with gaps
        logits = head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1).to(wide)
    else:
        # wide, since rounding to 16 bits would be the largest error of a log-ratio
        tokens, hidden = tokens.to(head.weight.device), hidden.to(wide)
        rows = F.embedding(tokens, head.weight).to(wide)
        logits = hidden @ rows.T if tokens.dim() == 1 else (rows @ hidden[..., None])[..., 0]
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias[tokens].to(wide)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # of Cohere, Granite
    logits = logits if scale == 1 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # of Gemma 2
    return logits if cap is None else cap * torch.tanh(logits / cap)


def token_log_probs(lm: LM, ids: Tensor, counted: Tensor) -> Tensor:
    """Log-probability of every row's counted tokens, 0 elsewhere and for its first: (rows, tokens) float32."""
    hidden = lm.model.base_model(ids, use_cache=False).last_hidden_state
    row, before = counted[:, 1:].to(ids.device).nonzero(as_tuple=True)
    losses = [
        F.cross_entropy(unembed(lm, hidden[r, b]), ids[r, b + 1].to(hidden.device), reduction="none")
        for r, b in zip(row.split(_POSITIONS), before.split(_POSITIONS), strict=True)
    ]
    out = torch.zeros(ids.shape, dtype=losses[0].dtype, device=ids.device)
    return out.index_put((row, before + 1), -torch.cat(losses).to(ids.device))


@torch.inference_mode()
def evaluate(
    lm: LM,
    prunings: Sequence[Pruning],
    batches: Batches,
    objective: Objective,
    rows: int,
    *,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> np.ndarray:
    """The objective of every row of text, ``rows`` in all, under every pruning: (prunings, rows) float64."""
    check_unembedding(lm)
    out = np.empty((len(prunings), rows))
    shown = bar(total=out.size, desc=progress, unit="text")

    def run(start: Start, numbers: Tensor, ids: Tensor, pruning: Tensor, row: Tensor) -> None:
        with start(pruning, row):
            values = objective(numbers[row], ids[row.to(ids.device)])
        out[pruning.numpy(), numbers[row].numpy()] = values.double().cpu().numpy()
        shown.update(len(row))

    for numbers, ids in batches:
        ids = ids.to(lm.device)
        for pruning, row, start in passes(lm, prunings, ids, max(1, batch_tokens // ids.shape[1])):
            in_halves(partial(run, start, numbers, ids), pruning, row)
    shown.close()
    return out


def mask_gradients(lm: LM, batches: Batches, objective: Objective, rows: int, parts: str = "heads") -> np.ndarray:
    """∂ objective / ∂ mask of every head or MLP unit ("units") at mask = 1: (rows, layers, parts).

    To first order, removing a part changes the objective by minus its gradient. Arguments as of ``evaluate``.
    """
    check_unembedding(lm)
    n, number = (lm.anatomy.n_heads, np.float64) if parts == "heads" else (lm.anatomy.n_units, np.float32)
    out = np.zeros((rows, lm.anatomy.n_layers, n), dtype=number)

    def run(numbers: Tensor, ids: Tensor) -> None:
        mask = torch.ones(len(numbers), *out.shape[1:], device=lm.device, requires_grad=True)
        with torch.enable_grad(), scaled(lm, **{parts: mask}):
            (gradient,) = torch.autograd.grad(objective(numbers, ids.to(lm.device)).sum(), mask)
        out[numbers.numpy()] = gradient.double().cpu().numpy()

    for numbers, ids in batches:
        in_halves(run, numbers, ids)
    return out


class Written:
    """Continuations of the unpruned model, to be judged by how likely they are under other prunings.

    Tokens are (seeds, prompts, steps) of ``Continuations.tokens``. With top-k sampling, probabilities are among the
    unpruned model's k tokens: one that a pruning pushes out of the k, or into them, would have no ratio.
    """

    def __init__(
        self,
        lm: LM,
        prompts: Sequence[str],
        tokens: np.ndarray,
        *,
        top_k: int = 50,
        temperature: float = 1.0,
        max_prompt_tokens: int | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        if temperature == 0:
            raise ValueError("greedy continuations have no probability to compare: set temperature > 0.")
        check_unembedding(lm)
        self.lm, self.shape, self.top_k, self.temperature = lm, tokens.shape, top_k, temperature
        self.batch_tokens = batch_tokens
        self.steps = torch.from_numpy(tokens.reshape(-1, tokens.shape[-1]))
        starts = encode(lm, prompts, max_prompt_tokens) * tokens.shape[0]
        self.ids = [[*start, *step[:-1].clamp(min=0).tolist()] for start, step in zip(starts, self.steps, strict=True)]

    def _hidden(self, ids: Tensor) -> Tensor:
        return self.lm.model.base_model(ids, use_cache=False).last_hidden_state[:, -self.shape[-1] :]

    @torch.no_grad()
    def _among(self, hidden: Tensor) -> Tensor:
        """The tokens that top-k sampling draws among: (rows, steps, k)."""
        logits = self.lm.model.get_output_embeddings()(hidden.flatten(0, 1))
        return top(logits, self.top_k)[1].view(*hidden.shape[:2], -1).to(self.lm.device)

    def _log_prob(self, numbers: Tensor, hidden: Tensor, among: Tensor | None) -> Tensor:
        """Log-probability of rows, drawn among tokens (rows, steps, k) or all: (rows,)."""
        steps = self.steps[numbers].to(self.lm.device)
        chosen = steps.clamp(min=0)[..., None]
        if among is None:
            rivals = unembed(self.lm, hidden)
            of_chosen = rivals.gather(-1, chosen.to(rivals.device))[..., 0]
        else:
            logits = unembed(self.lm, hidden, torch.cat([chosen, among], -1))
            of_chosen, rivals = logits[..., 0], logits[..., 1:]
        log_prob = of_chosen / self.temperature - (rivals / self.temperature).logsumexp(-1)
        return torch.where(steps.to(log_prob.device) >= 0, log_prob, 0).sum(-1).to(self.lm.device)

    def log_ratios(self, prunings: Sequence[Pruning]) -> np.ndarray:
        """log p(text | pruning) − log p(text): (prunings, seeds, prompts) float64."""
        among: dict[int, Tensor] = {}  # row number → tokens to draw among (steps, k)

        def objective(numbers: Tensor, ids: Tensor) -> Tensor:
            hidden = self._hidden(ids)
            if self.top_k and int(numbers[0]) not in among:  # the unpruned model comes first
                among.update(zip(numbers.tolist(), self._among(hidden), strict=True))
            rivals = torch.stack([among[n] for n in numbers.tolist()]) if self.top_k else None
            return self._log_prob(numbers, hidden, rivals)

        def read(prunings: Sequence[Pruning]) -> np.ndarray:
            batches = equal_lengths(self.ids, self.batch_tokens)
            return evaluate(self.lm, prunings, batches, objective, len(self.ids), batch_tokens=self.batch_tokens)

        whole = read([Pruning()])
        return (read(prunings) - whole).reshape(len(prunings), *self.shape[:2])

    def gradients(self, parts: str = "heads") -> np.ndarray:
        """∂ log p(text) / ∂ mask at mask = 1: (seeds, prompts, layers, parts) float64."""

        def objective(numbers: Tensor, ids: Tensor) -> Tensor:
            hidden = self._hidden(ids)
            return self._log_prob(numbers, hidden, self._among(hidden) if self.top_k else None)

        batches = equal_lengths(self.ids, self.batch_tokens // 4)
        found = mask_gradients(self.lm, batches, objective, len(self.ids), parts)
        return found.reshape(*self.shape[:2], *found.shape[1:])
