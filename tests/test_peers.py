"""Peer: TransformerLens' own decoder (no transformers code) with the same weights, ablated at hook_z."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from conftest import random_lm

from biasprune.core.masks import Pruning, masked

pytest.importorskip("transformer_lens")

IDS = torch.tensor([[2, 5, 7, 9, 11, 3, 40, 8], [4, 6, 8, 2, 10, 12, 1, 63]])
HEADS = [[], [0], [1, 6], [4, 5, 6, 7], [3, 8, 11]]  # flat; the model, one, two layers, a whole layer, …


def _fields(lm) -> dict:
    """The decoder in TransformerLens' words."""
    config = lm.model.config
    shared = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_head": lm.anatomy.head_dim,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "architecture": "TransformerLensNative",
    }
    if config.model_type == "gpt2":
        eps = config.layer_norm_epsilon
        return shared | {"d_mlp": 4 * config.n_embd, "act_fn": "gelu_new", "normalization_type": "LN", "eps": eps}
    return shared | {
        "d_mlp": config.intermediate_size,
        "n_key_value_heads": config.num_key_value_heads,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": config.rms_norm_eps,
        "positional_embedding_type": "rotary",
        "rotary_base": config.rope_parameters["rope_theta"],
    }


def _gpt2_weights(w: dict, n_layers: int) -> dict:
    """Conv1D keeps (in, out); query, key and value lie side by side."""
    out = {"embed.weight": w["transformer.wte.weight"], "pos_embed.weight": w["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = w[f"transformer.ln_f.{kind}"]
        for i in range(n_layers):
            ours, theirs = f"transformer.h.{i}", f"blocks.{i}"
            for n in (1, 2):
                out[f"{theirs}.ln{n}.{kind}"] = w[f"{ours}.ln_{n}.{kind}"]
            q, k, v = w[f"{ours}.attn.c_attn.{kind}"].chunk(3, -1)
            parts = {"attn.q": q, "attn.k": k, "attn.v": v, "attn.o": w[f"{ours}.attn.c_proj.{kind}"]}
            parts |= {"mlp.in": w[f"{ours}.mlp.c_fc.{kind}"], "mlp.out": w[f"{ours}.mlp.c_proj.{kind}"]}
            out |= {f"{theirs}.{name}.{kind}": part.T if part.dim() == 2 else part for name, part in parts.items()}
    return out


def _llama_weights(w: dict, n_layers: int, d_head: int) -> dict:
    """The rotation pairs dimensions (i, i + d/2) in transformers, (2i, 2i + 1) in TransformerLens."""
    out = {"embed.weight": w["model.embed_tokens.weight"], "ln_final.weight": w["model.norm.weight"]}
    names = {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.in",
        "mlp.down_proj": "mlp.out",
        **{f"self_attn.{p}_proj": f"attn.{p}" for p in "qkvo"},
    }
    for i in range(n_layers):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                part = w.get(f"model.layers.{i}.{ours}.{kind}")
                if theirs[-2:] in (".q", ".k") and part is not None:
                    part = part.unflatten(0, (-1, 2, d_head // 2)).transpose(1, 2).flatten(0, 2)
                if part is not None:
                    out[f"blocks.{i}.{theirs}.{kind}"] = part
    return out


def lens(lm):
    """TransformerLens' decoder with the weights of ``lm``."""
    config = importlib.import_module("transformer_lens.config")
    native = importlib.import_module("transformer_lens.model_bridge.sources.native")
    peer = native.boot(config.TransformerBridgeConfig(**_fields(lm)))
    a, weights = lm.anatomy, lm.model.state_dict()
    converted = (
        _gpt2_weights(weights, a.n_layers)
        if lm.model.config.model_type == "gpt2"
        else _llama_weights(weights, a.n_layers, a.head_dim)
    )
    converted["unembed.weight"] = weights["lm_head.weight"]
    rest = {k: torch.zeros_like(v) for k, v in peer.state_dict().items() if k not in converted}
    assert all(k.endswith("bias") for k in rest), "every weight comes from our model; it has no such biases"
    peer.load_state_dict(converted | rest, strict=True)
    return peer.eval()


def _remove(z: torch.Tensor, hook, heads: list[int]) -> torch.Tensor:
    """z is (B, T, heads, head_dim)."""
    assert z.dim() == 4 and z.shape[2] == 4
    z = z.clone()
    for h in heads:
        z[:, :, h] = 0
    return z


def lens_logits(peer, heads: list[int], n_heads: int) -> torch.Tensor:
    hooks = []
    for layer in range(peer.cfg.n_layers):
        own = [h % n_heads for h in heads if h // n_heads == layer]
        if own:
            hooks.append((f"blocks.{layer}.attn.hook_z", functools.partial(_remove, heads=own)))
    with torch.no_grad():
        return peer.run_with_hooks(IDS, return_type="logits", fwd_hooks=hooks)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_masked_logits_equal_transformer_lens(name):
    """Random weights of conftest, matrices scaled by 6: logits of order 1, and heads that matter."""
    lm = random_lm(name)
    a = lm.anatomy
    assert a.n_kv_heads == (4 if name == "gpt2" else 2)
    peer = lens(lm)
    clean = None
    for heads in HEADS:
        with torch.no_grad(), masked(lm, Pruning(frozenset(heads))):
            ours = lm.model(IDS).logits
        theirs = lens_logits(peer, heads, a.n_heads)
        assert (ours - theirs).abs().max() <= 1e-5
        clean = ours if clean is None else clean
        effect = (ours - clean).abs().max()
        assert effect == 0 if not heads else effect > 0.02, "far above the tolerance, so the test can fail"
    assert 0.3 < clean.std() < 10
