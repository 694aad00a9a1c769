"""A pruned model to take home: a folder that plain transformers loads, smaller where the architecture allows."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from biasprune.core.data import data_dir, new_folder
from biasprune.core.masks import Pruning, keep_masks, scales, without_weights
from biasprune.core.model import LM, packaged, weight_of
from biasprune.core.provenance import commit

UP_PROJ = ("gate_proj", "up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h")  # matrices whose outputs are MLP units
N_UNITS = ("intermediate_size", "ffn_dim", "n_inner")  # what configs call the number of MLP units


def _kept(lm: LM, what: str, kept: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors, and sizes of the config, with these (layers, kept) key/value groups ("heads") or "units" alone."""
    a, tensors, n = lm.anatomy, {}, kept.shape[1]
    lasts, last, widths = a.down_projs, 1, dict.fromkeys(UP_PROJ, 1)
    sizes = {name: n for name in N_UNITS if getattr(lm.model.config, name, "") in (None, a.n_units)}
    if what == "heads":
        lasts, last = a.out_projs, a.n_heads // a.n_kv_heads * a.head_dim
        widths = {"q_proj": last, "k_proj": a.head_dim, "v_proj": a.head_dim}
        sizes = {"num_attention_heads": n * last // a.head_dim, "num_key_value_heads": n, "head_dim": a.head_dim}
    for layer, index in zip(lasts, kept, strict=True):
        parent, _, end = layer.rpartition(".")
        for name, module in lm.model.get_submodule(parent).named_children():
            if width := last if name == end else widths.get(name):
                rows = (index[:, None] * width + torch.arange(width)).flatten()
                side = int((name == end) != isinstance(module, Conv1D))  # Linear is (out, in), Conv1D (in, out)
                tensors[f"{parent}.{name}.weight"] = module.weight.cpu().index_select(side, rows)
                if module.bias is not None and name != end:
                    tensors[f"{parent}.{name}.bias"] = module.bias.cpu()[rows]
            elif what == "heads" and any(p.numel() > a.head_dim for p in module.parameters()):
                return {}, {}  # OLMoE scales queries by the norm over all heads, GPT-2 keeps q, k and v in one
    return tensors, sizes


def _shrunk(lm: LM, pruning: Pruning) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors without what every layer loses as much of, and sizes of the config that go with them."""
    a, config, tensors, sizes = lm.anatomy, lm.model.config.to_dict(), lm.model.state_dict(), {}
    for what, mask in keep_masks(a, [pruning]).items():
        n, step = (a.n_kv_heads, -1) if what == "heads" else (a.n_units, -a.n_units - 1)
        gone = torch.zeros(1, 1) if mask is None else (mask[0] == 0).view(a.n_layers, n, -1).all(2).int()
        # Llama wants a hidden size that is a multiple of the number of heads: then fewer groups may do
        for less in range(min(int(gone.sum(1).min()), n - 1), 0, step):
            changed, new = _kept(lm, what, gone.argsort(dim=1, stable=True)[:, : n - less].sort(dim=1).values)
            with suppress(Exception), torch.device("meta"):  # every architecture refuses sizes in its own way
                plain = type(lm.model.config).from_dict(config | sizes | new)
                shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(plain).state_dict().items()}
                if changed and shapes == {name: t.shape for name, t in (tensors | changed).items()}:
                    tensors, sizes = tensors | changed, sizes | new
                    break
    return tensors, sizes


def _card(lm: LM, pruning: Pruning, measured: pd.DataFrame | None, facts: dict) -> str:
    """The text of data/model_card.md, filled in."""

    def table(frame: pd.DataFrame) -> str:
        cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in frame.to_numpy(object)]
        return "\n".join(f"| {' | '.join(row)} |" for row in [list(frame), ["---"] * frame.shape[1], *cells])

    lost = pd.DataFrame({"layer": range(lm.anatomy.n_layers)})
    for what, mask in keep_masks(lm.anatomy, [pruning]).items():
        lost[what] = 0 if mask is None else (mask[0] == 0).sum(1).numpy()
    single = [(name, len(index)) for name, index in pruning.weights.items()]
    lost["weights"] = [sum(n for name, n in single if name.startswith(f"{root}.")) for root in lm.anatomy.layers]
    known = {"licence": "see the base model", "note": "–", "commit": commit(), "dtype": lm.model.dtype}
    known |= packaged().loc[[facts["base"]]].iloc[0].to_dict() if facts["base"] in packaged().index else {}
    known["stored"] = ", ".join(f"{name} {n}" for name, n in facts["sizes"].items()) or "as the base model's"
    known["lost"] = table(lost[lost.drop(columns="layer").any(axis=1)])
    known["measured"] = "Nothing was measured with this export." if measured is None else table(measured)
    return (data_dir() / "model_card.md").read_text(encoding="utf-8").format(**{**known, **facts})


def export(
    lm: LM, pruning: Pruning, folder: str | Path, *, method: str = "not told", measured: pd.DataFrame | None = None
) -> Path:
    """Save a pruned model and its card (README.md), whole or not at all; plain transformers loads it.

    As many MLP units or whole key/value groups as every layer loses are gone, where the config can say so; everything
    else is zero in weights of the same shape. FileExistsError: a folder that isn't empty.

    measured: For the card: the columns measure, before, after, and others such as an interval.
    """
    folder = new_folder(folder)
    if lm.means or lm.uniform:
        raise ValueError("only parts that are removed by zeroing can be exported (ablation: zero).")
    zero = {}  # heads and units as the weights that read them
    for name, scale in scales(lm.anatomy, **keep_masks(lm.anatomy, [pruning])):
        zero[name] = (scale.expand(len(weight_of(lm.model.get_submodule(name))), -1) == 0).flatten().nonzero()[:, 0]
    zero = (Pruning(weights=zero) | Pruning(weights=pruning.weights)).weights
    base = Path(lm.name).name if Path(lm.name).is_dir() else lm.name  # no folders of this machine
    facts = {"base": base, "revision": lm.revision or "unknown", "pruning": pruning.text, "parts": len(pruning)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pruned-", ignore_cleanup_errors=True) as scratch:
        with without_weights(lm, zero):
            tensors, sizes = _shrunk(lm, pruning)
            lost = sum(t.numel() - tensors[name].numel() for name, t in lm.model.state_dict().items())
            lm.model.save_pretrained(scratch, state_dict=tensors)
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | sizes, indent=2) + "\n")
        lm.tokenizer.save_pretrained(scratch)
        facts |= {"before": (n := lm.model.num_parameters()), "after": n - lost, "sizes": sizes, "method": method}
        (Path(scratch) / "biasprune.json").write_text(json.dumps(facts, indent=1))
        (Path(scratch) / "README.md").write_text(_card(lm, pruning, measured, facts), encoding="utf-8")
        os.chmod(scratch, 0o755)
        return Path(scratch).replace(folder)
