"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): rotary positions, GeGLU, few global layers.

Norms come before (pre-norm), without biases. Every third layer sees the whole text, the others
`local_attention / 2` tokens to either side; each kind turns its positions at its own speed.

What enters the first layer is normalised already, and it has no norm of its own. So that all layers
are equal, and one stack, each ends with the norm of the next one's input, the last with the model's
last norm.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from reprlib import repr as shown
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax import lax

from fw.errors import FwError
from fw.labels import PROBLEMS
from fw.model import Batch, Model, from_nnx
from fw.models import heads, names
from fw.models.checks import one_of
from fw.models.layers import (
    HIDDEN,
    Dense,
    Embedding,
    LayerNorm,
    attention,
    denses,
    dropout,
    gelu,
    in_heads,
    rotary,
    rotate,
    turns,
    visible,
)
from fw.models.names import Name
from fw.models.postnorm import check
from fw.models.stack import Stack
from fw.taps import tap
from sharding import constrain


@dataclass(frozen=True)
class ModernBertConfig:
    """The fields of a ModernBERT `config.json` that change the computation, under their own names.

    And those that say what the model is for and how it is computed, as in `BertConfig`, `head_size`
    among them; for texts `classifier_pooling` says it, in ModernBERT's own `config.json`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_labels: int
    task: str
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_pooling: str = "cls"
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    initializer_range: float = 0.02
    hidden_activation: str = "gelu"
    classifier_activation: str = "gelu"
    head_size: int | None = None
    pooling: str = "mean"
    normalize: bool = True
    microbatches: int = 1
    remat: str | None = None
    scan: bool = True

    model_type: ClassVar[str] = "modernbert"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        rates = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")
        head = self.head_size
        check(self, size="hidden_size", heads_="num_attention_heads", rates=rates, head_size=head)
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(self, name) != "gelu":
                raise FwError(f"{name} {getattr(self, name)!r} is not supported; expected 'gelu'")
        one_of(self, classifier_pooling=heads.POOLINGS)

    @property
    def positions(self) -> int:
        """The tokens that a text may have."""
        return self.max_position_embeddings

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def is_global(self) -> np.ndarray:
        """Of each layer, whether it sees the whole text."""
        return np.arange(self.num_hidden_layers) % self.global_attn_every_n_layers == 0


class Attention(nnx.Module):
    """Self-attention with rotary positions, on the whole text or on a window of it."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        size, options = config.hidden_size, {"std": config.initializer_range, "rngs": rngs}
        options["bias"], wide = config.attention_bias, config.head * config.num_attention_heads
        self.query = Dense(size, wide, ("embed", "heads"), **options)
        self.key = Dense(size, wide, ("embed", "heads"), **options)
        self.value = Dense(size, wide, ("embed", "heads"), **options)
        self.out = Dense(wide, size, ("heads", "embed"), **options)
        self.size, self.rate = config.head, config.attention_dropout
        self.window = config.local_attention // 2

    def __call__(self, x: jax.Array, whole: Any, local: Any, key: jax.Array | None, is_global: Any):
        q, k, v = in_heads(x, [self.query, self.key, self.value], self.size)

        def among(window: int | None, seen: Any, turn: Any) -> jax.Array:
            turned = rotate(q, turn), rotate(k, turn)
            return attention(*turned, v, seen, window=window, rate=self.rate, key=key)

        ways = partial(among, None, *whole), partial(among, self.window, *local)
        if isinstance(is_global, jax.Array):  # of a stack: both are compiled, one is computed
            y = lax.cond(is_global, *ways)
        else:
            y = ways[not is_global]()
        return self.out(y.reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    """GeGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.intermediate_size
        options = {"std": config.initializer_range, "rngs": rngs, "bias": config.mlp_bias}
        self.up = Dense(size, inner, ("embed", "mlp"), **options)
        self.gate = Dense(size, inner, ("embed", "mlp"), **options)
        self.down = Dense(inner, size, ("mlp", "embed"), **options)
        self.rate = config.mlp_dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        up, gate = denses(x, [self.up, self.gate])
        hidden = constrain(gelu(up) * gate, "batch", "length", "mlp")
        return self.down(dropout(hidden, self.rate, key))


class Layer(nnx.Module):
    """Attention and MLP, each of the normalised input and added to it; then the next layer's norm.

    `whole` and `local` are what `attention` and `rotate` take of each kind of layer.
    """

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        norm = {"epsilon": config.norm_eps, "bias": config.norm_bias}
        self.attention = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, **norm)
        self.mlp = Mlp(config, rngs)
        self.next_norm = LayerNorm(config.hidden_size, **norm)

    def __call__(
        self,
        x: tuple[jax.Array, jax.Array],
        whole: Any,
        local: Any,
        key: jax.Array | None,
        *,
        is_global: Any,
    ) -> tuple[jax.Array, jax.Array]:
        keys = (None, None) if key is None else jax.random.split(key)
        total, normed = x
        total = total + self.attention(normed, whole, local, keys[0], is_global)
        total = total + self.mlp(self.mlp_norm(total), keys[1])
        total = tap(constrain(total, "batch", "length", "embed"), HIDDEN)
        return total, self.next_norm(total)


class ModernBert(nnx.Module):
    """Embedding, a stack of layers, and a head: the same for all tasks but for its last layer."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        norm = {"epsilon": config.norm_eps, "bias": config.norm_bias}
        self.config = config
        self.word = Embedding(config.vocab_size, size, ("vocab", "embed"), std=std, rngs=rngs)
        self.embedding_norm = LayerNorm(size, **norm)
        self.stack = Stack(
            lambda rngs: Layer(config, rngs),
            config.num_hidden_layers,
            microbatches=config.microbatches,
            remat=config.remat,
            scan=config.scan,
            rngs=rngs,
        )
        if config.task == "embedding":
            return
        bias = config.classifier_bias
        self.head = Dense(size, size, ("embed", "pooled"), std=std, rngs=rngs, bias=bias)
        self.head_norm = LayerNorm(size, **norm)
        if config.task == "masked_lm":
            zeros = jax.numpy.zeros(config.vocab_size)
            self.decoder_bias = nnx.Param(zeros, axes=("vocab",)) if config.decoder_bias else None
        else:
            labels = heads.SPAN if config.task == "question_answering" else config.num_labels
            self.classifier = Dense(size, labels, ("embed", "labels"), std=std, rngs=rngs)

    def __call__(self, batch: Batch, key: jax.Array | None) -> Any:
        config = self.config
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.embedding_norm(self.word(batch["input_ids"]))
        x = constrain(dropout(x, config.embedding_dropout, keys[0]), "batch", "length", "embed")
        window, size = config.local_attention // 2, config.head
        whole, local = (
            (
                visible(batch["segment_ids"], x.dtype, window=window),
                rotary(batch["position_ids"], turns(size, theta), x.dtype),
            )
            for window, theta in (
                (None, config.global_rope_theta),
                (window, config.local_rope_theta),
            )
        )
        kinds = {"is_global": config.is_global}
        _, x = self.stack((x, x), whole, local, key=keys[1], own=kinds)
        if config.task == "embedding":
            return heads.embed(x, batch, config.pooling, config.normalize)
        rows = ("batch", "length")
        if config.task in PROBLEMS:
            rows, mean = ("batch", None), config.classifier_pooling == "mean"
            x = heads.means(x, batch) if mean else heads.first_tokens(x, batch)
        x = self.head_norm(gelu(self.head(x, rows)))
        if config.task == "masked_lm":
            bias = None if self.decoder_bias is None else self.decoder_bias[...]
            return heads.words(x, self.word, batch, bias)
        return self.classifier(dropout(x, config.classifier_dropout, keys[-1]), rows)


def modernbert(config: ModernBertConfig) -> Model:
    """The model record of a ModernBERT; its batches and outputs are those of `bert`.

    >>> config = ModernBertConfig(30, 8, 2, 2, 16, num_labels=3, task="token_classification")
    >>> model = modernbert(config)
    >>> ids = jax.numpy.ones((2, 5), jax.numpy.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids}
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, batch)[0].shape
    (2, 5, 3)
    """
    return from_nnx(
        config,
        lambda rngs: ModernBert(config, rngs),
        lambda module, batch, key, _: module(batch, key),
    )


def hf_names(config: ModernBertConfig) -> Iterator[Name]:
    """How transformers calls the parameters; some of ours are parts of one tensor."""
    norm = {"bias": config.norm_bias}
    yield from names.table("word", "model.embeddings.tok_embeddings")
    yield from names.norm("embedding_norm", "model.embeddings.norm", **norm)
    for i in range(config.num_hidden_layers):
        theirs, after = f"model.layers.{i}", f"model.layers.{i + 1}.attn_norm"
        ours, at = names.of_layer(i, scan=config.scan)
        bias = {"bias": config.attention_bias, **at}
        for part, name in enumerate(("query", "key", "value")):
            path = f"{ours}/attention/{name}"
            yield from names.dense(path, f"{theirs}.attn.Wqkv", part=(part, 3), **bias)
        yield from names.dense(f"{ours}/attention/out", f"{theirs}.attn.Wo", **bias)
        yield from names.norm(f"{ours}/mlp_norm", f"{theirs}.mlp_norm", **norm, **at)
        bias = {"bias": config.mlp_bias, **at}
        for part, name in enumerate(("up", "gate")):
            yield from names.dense(f"{ours}/mlp/{name}", f"{theirs}.mlp.Wi", part=(part, 2), **bias)
        yield from names.dense(f"{ours}/mlp/down", f"{theirs}.mlp.Wo", **bias)
        after = after if i + 1 < config.num_hidden_layers else "model.final_norm"
        yield from names.norm(f"{ours}/next_norm", after, **norm, **at)
    if config.task == "embedding":
        return
    yield from names.dense("head", "head.dense", bias=config.classifier_bias)
    yield from names.norm("head_norm", "head.norm", **norm)
    if config.task != "masked_lm":
        yield from names.dense("classifier", "classifier")
    elif config.decoder_bias:
        yield Name("decoder_bias", "decoder.bias")


_FULL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {_FULL: "global_rope_theta", _LOCAL: "local_rope_theta"}


def read_config(source: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` of either generation of transformers, in the fields of the older one.

    Raises:
      FwError: layers whose kinds follow another rule, or rotary positions of another type.

    >>> found = read_config({"rope_parameters": {"full_attention": {"rope_theta": 8.0}}})
    >>> found["global_rope_theta"]
    8.0
    """
    found, rope = dict(source), source.get("rope_parameters") or {}
    for kind, field in _THETAS.items():
        turn = rope.get(kind, {}) if isinstance(rope, Mapping) else None
        if not isinstance(turn, Mapping):
            raise FwError(f"rope_parameters: expected an object for {kind}, got {shown(turn)}")
        if (name := turn.get("rope_type", "default")) != "default":
            raise FwError(
                f"rope_parameters: {kind}: rope_type {shown(name)} is not supported; expected "
                "'default'"
            )
        if "rope_theta" in turn:
            found[field] = turn["rope_theta"]
    types, every = source.get("layer_types"), source.get("global_attn_every_n_layers", 3)
    whole = isinstance(every, int) and every > 0
    if isinstance(types, list) and whole and types != _layer_types(len(types), every):
        raise FwError(
            f"layer_types: expected {_FULL!r} for one layer of {every}, as "
            f"global_attn_every_n_layers says, and {_LOCAL!r} for the others"
        )
    return found


def write_config(config: ModernBertConfig) -> dict[str, Any]:
    """The keys of a `config.json`, in the spelling of transformers 5."""
    found = asdict(config)
    return found | {
        "rope_parameters": {
            kind: {"rope_theta": found.pop(field), "rope_type": "default"}
            for kind, field in _THETAS.items()
        },
        "layer_types": _layer_types(config.num_hidden_layers, config.global_attn_every_n_layers),
    }


def _layer_types(layers: int, every: int) -> list[str]:
    return [_LOCAL if i % every else _FULL for i in range(layers)]
