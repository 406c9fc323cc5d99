"""Llama and what is built like it (Touvron et al. 2023, arXiv:2302.13971): Mistral, Qwen, Mixtral.

RMS norms before each sublayer, rotary positions, gated MLPs or experts, keys and values shared by
groups of heads. The families differ in a few switches, which their `config.json` or their name
tells. Layers are one scanned stack; rows may hold several texts, and a token sees those before it
in its own.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from reprlib import repr as shown
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models import names
from fw.models.cache import EMPTY, Cache, empty_cache
from fw.models.checks import one_of
from fw.models.experts import Experts, ExpertsConfig
from fw.models.heads import word_logits, words
from fw.models.layers import (
    HIDDEN,
    ROWS,
    Dense,
    Embedding,
    RMSNorm,
    Rows,
    attend,
    attention,
    between,
    denses,
    in_heads,
    rotary,
    rotate,
    swiglu,
    turns,
    visible,
)
from fw.models.names import Name
from fw.models.stack import Stack
from fw.taps import tap
from sharding import balance_loss, constrain

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
"""transformers' class by `model_type`."""

ROPES = ("default", "linear", "llama3")
_FREE: Any = {"unbounded": True}  # a number that no tensor bears out


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a `config.json` that change the computation, under their own names.

    `rope_type` and what follows it lie in `rope_parameters` there, or in `rope_scaling`. Three say
    how the model is used: `task`; `microbatches` and `remat`, as in `sharding.pipeline`; `scan`, as
    in `Stack`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_labels: int = 0
    task: str = "causal_lm"
    model_type: str = "llama"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = field(default=2048, metadata=_FREE)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = field(default=None, metadata=_FREE)
    rope_theta: float = 10_000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = field(default=8192, metadata=_FREE)
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    num_local_experts: int | None = None
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    microbatches: int = 1
    remat: str | None = None
    scan: bool = True

    def __post_init__(self):
        """Checks what the arithmetic relies on, and fills in what a `config.json` may leave out."""
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        one_of(self, model_type=ARCHITECTURES, task=("causal_lm",))
        one_of(self, rope_type=ROPES, hidden_act=("silu",))
        if self.num_attention_heads % self.key_heads:
            raise FwError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.key_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise FwError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and there is no head_dim"
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.size % 2:
            raise FwError(f"head_dim {self.size} is odd: rotary positions turn pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise FwError(f"sliding_window {self.sliding_window}: expected 1 or more, or none")
        if self.rope_theta <= 0 or self.rope_factor <= 0:
            raise FwError("rope_theta and factor: expected more than 0")
        if self.rope_type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise FwError(
                f"low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}: expected the first less than the second"
            )
        self._check_experts()

    def _check_experts(self):
        number, chosen = self.num_local_experts, self.num_experts_per_tok
        if (self.model_type == "mixtral") != (number is not None):
            raise FwError(
                f"num_local_experts {number} of a {self.model_type}: expected a number of experts "
                "for mixtral, and none for the others"
            )
        if number is not None and not 1 <= chosen <= number:
            raise FwError(f"num_experts_per_tok {chosen}: expected 1 to num_local_experts {number}")
        if number is not None and self.mlp_bias:
            raise FwError("mlp_bias: experts have no biases")

    @property
    def positions(self) -> int:
        """The tokens that a text may have."""
        return self.max_position_embeddings

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def size(self) -> int:
        """Of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 has them without saying so."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def out_bias(self) -> bool:
        """Whether attention's last layer has one."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def head_norms(self) -> bool:
        """Whether each head's query and key are normalised."""
        return self.model_type == "qwen3"

    @property
    def experts(self) -> ExpertsConfig | None:
        """What a layer has in place of an MLP: Mixtral's experts, none of which drops a token."""
        if self.num_local_experts is None:
            return None
        number, chosen = self.num_local_experts, self.num_experts_per_tok
        std = self.initializer_range
        return ExpertsConfig(number, chosen, self.hidden_size, self.intermediate_size, std=std)

    @property
    def window(self) -> int | None:
        """How many tokens back one sees, itself not counted; transformers counts it."""
        return None if self.sliding_window is None else self.sliding_window - 1


def speeds(config: LlamaConfig) -> np.ndarray:
    """Radians that each pair of a head's elements turns a position, [head_dim / 2].

    "linear" turns all slower by a factor (Chen et al. 2023, arXiv:2306.15595). "llama3" only those
    that turn less than once in the text that the model was first trained on, and those between
    `low_freq_factor` and `high_freq_factor` times in part (Llama team 2024, arXiv:2407.21783).

    >>> speeds(LlamaConfig(9, 8, 1, 2, 8, rope_type="linear", rope_factor=2.0))
    array([0.5  , 0.005])
    """
    fast = turns(config.size, config.rope_theta)
    if config.rope_type == "default":
        return fast
    slow = fast / config.rope_factor
    if config.rope_type == "linear":
        return slow
    times = config.original_max_position_embeddings * fast / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    share = np.clip((times - low) / (high - low), 0, 1)
    return (1 - share) * slow + share * fast


class Attention(nnx.Module):
    """Causal self-attention; neighbouring heads share keys and values."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        wide, narrow = (n * config.size for n in (config.num_attention_heads, config.key_heads))
        inputs = {"std": std, "rngs": rngs, "bias": config.qkv_bias}
        self.query = Dense(size, wide, ("embed", "heads"), **inputs)
        self.key = Dense(size, narrow, ("embed", "heads"), **inputs)
        self.value = Dense(size, narrow, ("embed", "heads"), **inputs)
        self.out = Dense(wide, size, ("heads", "embed"), std=std, rngs=rngs, bias=config.out_bias)
        if config.head_norms:
            norm = {"epsilon": config.rms_norm_eps, "axes": (None,)}
            self.query_norm = RMSNorm(config.size, **norm)
            self.key_norm = RMSNorm(config.size, **norm)
        self.config = config

    def __call__(self, x: jax.Array, seen: jax.Array, turn: Any, cache: Any = None) -> Any:
        config = self.config
        rows = between(x) if cache is None else ROWS
        q, k, v = in_heads(x, [self.query, self.key, self.value], config.size, rows)
        if config.head_norms:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, turn), rotate(k, turn)
        if cache is None:
            y = attention(q, k, v, seen, causal=True, window=config.window)
            return self.out(y.reshape(*x.shape[:2], -1), out=rows, head=config.size)
        read, layer = cache
        k, v, read = read.extend(layer, k, v)
        return self.out(attend(q, k, v, seen).reshape(*x.shape[:2], -1)), read


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.intermediate_size
        options = {"std": config.initializer_range, "rngs": rngs, "bias": config.mlp_bias}
        self.gate = Dense(size, inner, ("embed", "mlp"), **options)
        self.up = Dense(size, inner, ("embed", "mlp"), **options)
        self.down = Dense(inner, size, ("mlp", "embed"), **options)

    def __call__(self, x: jax.Array, rows: Rows = ROWS) -> jax.Array:
        gate, up = denses(x, [self.gate, self.up], rows, out=ROWS)
        return self.down(constrain(swiglu(gate, up), *ROWS, "mlp"), out=rows)


class Layer(nnx.Module):
    """Attention and MLP or experts, each of the normalised input and added to it.

    `real`, bool [B, L], keeps padding from experts; of these it returns the `Usage` besides, where
    there is no cache to return.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.mlp = Experts(config.experts, rngs) if config.experts else Mlp(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        seen: jax.Array,
        turn: Any,
        real: Any,
        key: Any = None,
        cache: Any = None,
    ) -> Any:
        rows = between(x) if cache is None else ROWS
        y = self.attention(self.attention_norm(x), seen, turn, cache)
        y, cache = (y, None) if cache is None else y
        x = x + y
        y = self.mlp_norm(x)
        aux = None
        if isinstance(self.mlp, Experts):
            y, aux = self.mlp(constrain(y, *ROWS, "embed"), real)
        else:
            y = self.mlp(y, rows)
        x = tap(constrain(x + y, *rows, "embed"), HIDDEN)
        if cache is not None:
            return x, cache
        return x if aux is None else (x, aux.usage)


class Llama(nnx.Module):
    """Embedding, a stack of layers, and the logits of the next word."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.word = Embedding(config.vocab_size, size, ("vocab", "embed"), std=std, rngs=rngs)
        self.stack = Stack(
            lambda rngs: Layer(config, rngs),
            config.num_hidden_layers,
            microbatches=config.microbatches,
            remat=config.remat,
            has_aux=config.experts is not None,
            scan=config.scan,
            rngs=rngs,
        )
        self.norm = RMSNorm(size, epsilon=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = Embedding(config.vocab_size, size, ("vocab", "embed"), std=std, rngs=rngs)
        self.config = config

    def __call__(self, batch: Batch) -> Any:
        config, positions = self.config, batch["position_ids"]
        table = self.word if config.tie_word_embeddings else self.head
        x = self.word(batch["input_ids"])
        x = constrain(x, *(between(x) if "cache" not in batch else ROWS), "embed")
        turn = rotary(jnp.maximum(positions, 0), speeds(config), x.dtype)
        if (cache := batch.get("cache")) is None:
            segments = batch["segment_ids"]
            seen = visible(segments, x.dtype, causal=True, window=config.window)
            if config.experts is None:
                return words(self.norm(self.stack(x, seen, turn, None)), table, batch)
            x, used = self.stack(x, seen, turn, segments > 0)
            found = words(self.norm(x), table, batch)
            if isinstance(found, dict):
                # transformers' loss is not divided by the experts a token, as ours is; and it takes
                # all layers for one, so `used` is summed over them first, not the losses.
                scale = config.router_aux_loss_coef * config.num_experts_per_tok
                found["aux"] = (scale * balance_loss(used)).astype(x.dtype)
            return found
        cache = cache.begin(positions)
        seen = cache.bias(positions, x.dtype, config.window)
        real = None if config.experts is None else positions != EMPTY
        x, cache = self.stack.extend(x, cache, seen, turn, real)
        x = self.norm(x[:, -batch["last"] :])
        return {"logits": word_logits(x, table), "cache": cache.end(positions.shape[1])}


def llama(config: LlamaConfig) -> Model:
    """The model record of a Llama.

    `apply` takes [B, L] `input_ids`, `segment_ids` and `position_ids`, and returns the logits of
    each token's successor, [B, L, vocab_size], or with `targets` what `words` does; a Mixtral adds
    the scalar `aux`, what transformers adds to the mean loss if told `output_router_logits`. With a
    `cache` instead of `segment_ids`, it goes on behind what that holds, and returns the `logits` of
    the `last` tokens and the `cache`.

    >>> model = llama(LlamaConfig(30, 8, 2, 2, 16, num_key_value_heads=1))
    >>> ids = jax.numpy.ones((2, 5), jax.numpy.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids}
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, batch)[0].shape
    (2, 5, 30)
    """

    def cache(batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        shape = (config.num_hidden_layers, batch, slots, config.key_heads, config.size)
        return empty_cache(*shape, dtype)

    made = from_nnx(
        config, lambda rngs: Llama(config, rngs), lambda module, batch, key, _: module(batch)
    )
    return dataclasses.replace(made, cache=cache)


def hf_names(config: LlamaConfig) -> Iterator[Name]:
    """How transformers calls the parameters; of a stacked one of ours, a tensor for each layer."""
    yield from names.table("word", "model.embed_tokens")
    for i in range(config.num_hidden_layers):
        theirs = f"model.layers.{i}"
        ours, at = names.of_layer(i, scan=config.scan)
        rms = {"bias": False, **at}
        yield from names.norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm", **rms)
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            lin = f"{theirs}.self_attn.{letter}"
            yield from names.dense(
                f"{ours}/attention/{name}", f"{lin}_proj", bias=config.qkv_bias, **at
            )
            if config.head_norms and name != "value":
                yield from names.norm(f"{ours}/attention/{name}_norm", f"{lin}_norm", **rms)
        out = f"{theirs}.self_attn.o_proj"
        yield from names.dense(f"{ours}/attention/out", out, bias=config.out_bias, **at)
        yield from names.norm(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm", **rms)
        if config.experts:
            yield from _expert_names(config, f"{ours}/mlp", theirs, at.get("entry", ()))
            continue
        for name in ("gate", "up", "down"):
            lin = f"{theirs}.mlp.{name}_proj"
            yield from names.dense(f"{ours}/mlp/{name}", lin, bias=config.mlp_bias, **at)
    yield from names.norm("norm", "model.norm", bias=False)
    if not config.tie_word_embeddings:
        yield from names.table("head", "lm_head")


def _expert_names(
    config: LlamaConfig, ours: str, theirs: str, at: tuple[int, ...]
) -> Iterator[Name]:
    """A tensor for each matrix of each expert; our `up` holds the gate, w1, and w3."""
    moe = f"{theirs}.block_sparse_moe"
    yield Name(f"{ours}/router", f"{moe}.gate.weight", True, at)
    for e in range(config.num_local_experts or 0):
        expert = f"{moe}.experts.{e}"
        yield Name(f"{ours}/up", f"{expert}.w1.weight", True, (*at, e, None, 0))
        yield Name(f"{ours}/up", f"{expert}.w3.weight", True, (*at, e, None, 1))
        yield Name(f"{ours}/down", f"{expert}.w2.weight", True, (*at, e))


_SCALING = {
    "factor": "rope_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
_KEYS = {"linear": ("factor",), "llama3": tuple(_SCALING), "default": ()}


_ASSUMED: dict[str, dict[str, Any]] = {
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
    "mixtral": {
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
}
"""What transformers takes for keys that a `config.json` lacks, where it is not `LlamaConfig`'s."""


def read_config(source: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` of either generation of transformers, in the fields of `LlamaConfig`.

    Raises:
      FwError: layers of different kinds, or rotary positions of an unknown type.

    >>> found = read_config({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 8.0})
    >>> found["rope_type"], found["rope_factor"], found["rope_theta"]
    ('linear', 2.0, 8.0)
    """
    found = {**_ASSUMED.get(str(source.get("model_type")), {}), **source}
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise FwError("rope_parameters: expected an object")
    found["rope_type"] = kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise FwError(
            f"rope_type {shown(kind)} is not supported; expected one of {', '.join(_KEYS)}"
        )
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    for key in _KEYS[kind]:
        if key not in rope:
            raise FwError(f"rope_type {kind!r}: {key!r} is missing")
        found[_SCALING[key]] = rope[key]
    types = source.get("layer_types")
    kinds = {str(t) for t in types} if isinstance(types, list) else set()
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        raise FwError(f"layer_types: layers of different kinds are not supported: {shown(kinds)}")
    always = source.get("model_type") in ("mistral", "mixtral")
    slides = kinds == {"sliding_attention"} if kinds else always
    if not slides:
        found["sliding_window"] = None
        if source.get("use_sliding_window") and not kinds:
            raise FwError("use_sliding_window: only some layers slide, which is not supported")
    return found


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """The keys of a `config.json`, in the spelling of transformers 5."""
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "initializer_range", "hidden_act",
    )  # fmt: skip
    found = {name: getattr(config, name) for name in kept}
    found |= {"num_key_value_heads": config.key_heads, "head_dim": config.size}
    rope = {"rope_theta": config.rope_theta, "rope_type": config.rope_type}
    rope |= {key: getattr(config, _SCALING[key]) for key in _KEYS[config.rope_type]}
    found["rope_parameters"] = rope
    if config.model_type in ("llama", "qwen3"):
        found["attention_bias"] = config.attention_bias
    if config.model_type == "llama":
        found["mlp_bias"] = config.mlp_bias
    else:
        found["sliding_window"] = config.sliding_window
    if config.model_type == "mixtral":
        routed = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
        found |= {name: getattr(config, name) for name in routed}
    if config.model_type.startswith("qwen"):
        slides = config.sliding_window is not None
        kind = "sliding_attention" if slides else "full_attention"
        found["use_sliding_window"] = slides
        found["layer_types"] = [kind] * config.num_hidden_layers
    return found
