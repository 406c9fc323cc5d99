"""A GGUF file's names become those of a `config.json` and of transformers' tensors.

So `fw.hub` reads such a file as it reads any other. The `gguf` package dequantises, the rows that
are asked for and no others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import gguf
import numpy as np

from fw.errors import FwError
from fw.gguf.header import parse
from fw.models.llama import ARCHITECTURES, LlamaConfig, speeds

SUFFIX = ".gguf"

_NAME = "general.architecture"
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
"""transformers' names; a `{}` stands for each expert of a stack of them."""
_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file, as `fw.hub.files.Tensor` is one of a safetensors file.

    Attributes:
      name: transformers'.
      file: which one.
      shape: as torch has it.
      dtype: "F32": whatever the file holds is dequantised as it is read.
      data: [rows, bytes] of the mapped file, or its numbers.
      kind: how the numbers are packed.
      heads: of a query or key whose rows llama.cpp keeps in another order; 0 for none.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray = field(repr=False)
    kind: gguf.GGMLQuantizationType
    heads: int = 0

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads and dequantises the rows of a part, and no others.

        Raises:
          FwError: the package cannot dequantise what the file holds.
        """
        first, *rest = index
        rows = range(*first.indices(self.shape[0]))
        if self.heads:  # pairs that rotary positions turn are neighbours there, halves apart here
            order = np.arange(self.shape[0]).reshape(self.heads, -1, 2)
            rows = np.swapaxes(order, 1, 2).reshape(-1)[rows.start : rows.stop : rows.step]
            data = self.data[rows]
        else:
            data = self.data[rows.start : rows.stop : rows.step]
        try:
            return gguf.dequantize(data, self.kind)[(slice(None), *rest)]
        except (NotImplementedError, ValueError) as error:
            raise FwError(
                f"{self.file}: tensor {self.name!r} is {self.kind.name}: {error or 'not supported'}"
            ) from error


@dataclass(frozen=True)
class Gguf:
    """An open file.

    Attributes:
      config: in the form of `config.json`.
      tensors: by transformers' names.
      fields: the file's metadata by its own names.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    fields: Mapping[str, Any] = field(repr=False)


def gguf_file(place: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder without `config.json` holds.

    Raises:
      FwError: the folder holds several.

    >>> gguf_file(Path("model.gguf"))
    PosixPath('model.gguf')
    """
    if place.suffix == SUFFIX:
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    found = sorted(place.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise FwError(f"{place}: holds several models: {names}; give the path of one")
    return found[0] if found else None


def open_gguf(path: Path) -> Gguf:
    """Opens a file of llama.cpp: a Llama, Mistral, Mixtral, Qwen2 or Qwen3.

    Raises:
      FwError: it cannot be read, is cut off, or holds another architecture.
    """
    fields, tensors = parse(path)
    config = _config(path, fields)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    found: dict[str, GgufTensor] = {}
    for tensor in tensors:
        if tensor.name == _FREQUENCIES:
            config["rope_scaling"] = _scaling(path, config, tensor)
            continue
        name, part = _name(path, tensor.name)
        swapped = 0
        if fields[_NAME] == "llama" and part in heads:
            swapped = config.get(heads[part], config.get("num_attention_heads"))
            if not isinstance(swapped, int) or swapped < 1 or tensor.shape[-1] % (2 * swapped):
                raise FwError(f"{path}: tensor {tensor.name!r} is not {shown(swapped)} heads")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if len(shape) != tensor.data.ndim or (len(shape) == 1 and tensor.data.dtype == np.uint8):
            raise FwError(f"{path}: tensor {tensor.name!r} {shape} is packed in a way unknown here")
        kind, data = tensor.tensor_type, tensor.data
        if "{}" in name:
            if len(shape) != 3:
                raise FwError(f"{path}: tensor {tensor.name!r} {shape} is no stack of experts")
            for number, own in enumerate(data):
                one = name.format(number)
                found[one] = GgufTensor(one, path, shape[1:], "F32", own, kind)
            continue
        found[name] = GgufTensor(name, path, shape, "F32", data, kind, swapped)
    if (table := found.get("model.embed_tokens.weight")) is not None:
        config["vocab_size"] = table.shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in found
    config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in found
    return Gguf(config, found, fields)


def _config(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    name = fields.get(_NAME)
    if name not in _ARCHITECTURES:
        raise FwError(
            f"{path}: {_NAME} is {shown(name)}; expected one of {', '.join(_ARCHITECTURES)}"
        )
    config: dict[str, Any] = {}
    for theirs, ours in _KEYS.items():
        value = fields.get(f"{name}.{theirs}")
        if isinstance(value, float):
            value = float(str(np.float32(value)))  # it was stored so: 1e-5, not 9.99999975e-06
        if value is not None:
            config[ours] = value
    if not config.get("num_local_experts"):  # 0 says that it has none
        config.pop("num_local_experts", None)
    model_type = name
    if name == "llama" and "num_local_experts" in config:
        model_type = "mixtral"
    elif name == "llama" and "sliding_window" in config:
        model_type = "mistral"
    config["model_type"] = model_type
    config["architectures"] = [ARCHITECTURES[model_type]]
    scaling = f"{name}.rope.scaling"
    kind = fields.get(f"{scaling}.type", "none")
    if kind == "linear":
        factor = fields.get(f"{scaling}.factor", 1.0)
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise FwError(f"{path}: {scaling}.type {shown(kind)} is not supported")
    for end in ("bos", "eos"):
        if isinstance(number := fields.get(f"tokenizer.ggml.{end}_token_id"), int):
            config[f"{end}_token_id"] = number
    return config


def _name(path: Path, name: str) -> tuple[str, str]:
    """transformers' name of a tensor, and llama.cpp's of its layer."""
    words = name.split(".")
    part, kind = ".".join(words[:-1]), words[-1]
    lead = ""
    if len(words) == 4 and words[0] == "blk" and words[1].isdecimal():
        part, lead = words[2], f"model.layers.{int(words[1])}."
    if part not in _TENSORS or kind not in ("weight", "bias"):
        raise FwError(f"{path}: tensor {shown(name)} is of no architecture that is known")
    return f"{lead}{_TENSORS[part]}.{kind}", part


def _scaling(path: Path, config: Mapping[str, Any], tensor: Any) -> dict[str, Any]:
    """Llama 3's scaling of rotary positions, of which the file has only the resulting factors."""
    theta = config.get("rope_theta", 10_000.0)
    if tensor.tensor_type.name != "F32" or not isinstance(theta, float) or theta <= 0:
        raise FwError(f"{path}: tensor {_FREQUENCIES!r}: expected F32, and a frequency base")
    factors = np.array(tensor.data, np.float64).reshape(-1)
    if not (np.isfinite(factors).all() and factors.min() > 0):
        raise FwError(f"{path}: tensor {_FREQUENCIES!r}: expected numbers above 0")
    found = {**_LLAMA3, "factor": float(factors.max())}
    size = 2 * len(factors)
    base = {"head_dim": size, "rope_theta": theta}
    rope = {("rope_factor" if k == "factor" else k): v for k, v in found.items()}
    plain, scaled = (speeds(LlamaConfig(1, size, 1, 1, 1, **base, **more)) for more in ({}, rope))
    if not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise FwError(f"{path}: tensor {_FREQUENCIES!r} holds other factors than those of Llama 3")
    return found
