"""BERT (Devlin et al. 2018, arXiv:1810.04805) with heads for tokens and for whole texts.

The numbers are those of Hugging Face's BertForTokenClassification and
BertForSequenceClassification. Rows may hold several texts (`segment_ids`): attention and positions
restart at each, so packed and unpacked batches give the same outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models.layers import (
    Dense,
    Embedding,
    LayerNorm,
    attention,
    denses,
    dropout,
    embeddings,
    gelu,
    visible,
)
from sharding import constrain

TASKS = ("token_classification", "sequence_classification")


@dataclass(frozen=True)
class BertConfig:
    """The fields of a BERT `config.json` that change the computation, under their own names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_labels: int
    task: str
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    hidden_act: str = "gelu"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        if self.hidden_size % self.num_attention_heads:
            raise FwError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.task not in TASKS:
            raise FwError(f"task {self.task!r} is unknown to BERT; choose one of {TASKS}")
        if self.hidden_act != "gelu":
            raise FwError(f"hidden_act {self.hidden_act!r} is not supported; expected 'gelu'")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise FwError(f"{name} {rate} is no rate; expected 0 or more, and less than 1")

    @property
    def head_dropout(self) -> float:
        """The dropout before the classifier: its own rate where given, else the hidden one."""
        own = self.classifier_dropout
        return self.hidden_dropout_prob if own is None else own


class Embeddings(nnx.Module):
    """Word + position + type, normalised."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.word = Embedding(config.vocab_size, size, ("vocab", "embed"), std=std, rngs=rngs)
        self.position = Embedding(
            config.max_position_embeddings, size, ("positions", "embed"), std=std, rngs=rngs
        )
        self.type = Embedding(config.type_vocab_size, size, ("types", "embed"), std=std, rngs=rngs)
        self.norm = LayerNorm(size, epsilon=config.layer_norm_eps)

    def __call__(self, batch: Batch) -> jax.Array:
        types = batch.get("token_type_ids", jnp.zeros((), jnp.int32))
        ids = [batch["input_ids"], batch["position_ids"], types]
        x = embeddings([self.word, self.position, self.type], ids)
        return self.norm(x)


class Attention(nnx.Module):
    """Multi-head self-attention with its output projection."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.query = Dense(size, size, ("embed", "heads"), std=std, rngs=rngs)
        self.key = Dense(size, size, ("embed", "heads"), std=std, rngs=rngs)
        self.value = Dense(size, size, ("embed", "heads"), std=std, rngs=rngs)
        self.out = Dense(size, size, ("heads", "embed"), std=std, rngs=rngs)
        self.heads = config.num_attention_heads
        self.rate = config.attention_probs_dropout_prob

    def __call__(self, x: jax.Array, seen: jax.Array, key: jax.Array | None) -> jax.Array:
        split = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        q, k, v = (
            constrain(y.reshape(split), "batch", "length", "heads", None)
            for y in denses(x, [self.query, self.key, self.value])
        )
        return self.out(attention(q, k, v, seen, rate=self.rate, key=key).reshape(x.shape))


class Layer(nnx.Module):
    """Attention and MLP, each added to its input and normalised after (post-norm)."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        size, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.attention = Attention(config, rngs)
        self.attention_norm = LayerNorm(size, epsilon=config.layer_norm_eps)
        self.up = Dense(size, inner, ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Dense(inner, size, ("mlp", "embed"), std=std, rngs=rngs)
        self.norm = LayerNorm(size, epsilon=config.layer_norm_eps)
        self.rate = config.hidden_dropout_prob

    def __call__(self, x: jax.Array, seen: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        attended = self.attention(x, seen, keys[0])
        x = self.attention_norm(x + dropout(attended, self.rate, keys[1]))
        inner = constrain(gelu(self.up(x)), "batch", "length", "mlp")
        x = self.norm(x + dropout(self.down(inner), self.rate, keys[2]))
        return constrain(x, "batch", "length", "embed")


class Bert(nnx.Module):
    """The encoder and one classification head."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_hidden_layers)])
        if config.task == "sequence_classification":
            self.pooler = Dense(size, size, ("embed", "pooled"), std=std, rngs=rngs)
        self.classifier = Dense(size, config.num_labels, ("embed", "labels"), std=std, rngs=rngs)
        self.config = config

    def __call__(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        rates = self.config
        number = len(self.layers) + 2
        keys = (None,) * number if key is None else jax.random.split(key, number)
        x = dropout(self.embeddings(batch), rates.hidden_dropout_prob, keys[0])
        x = constrain(x, "batch", "length", "embed")
        seen = visible(batch["segment_ids"], x.dtype)
        for layer, layer_key in zip(self.layers, keys[1:-1], strict=True):
            x = layer(x, seen, layer_key)
        if rates.task == "sequence_classification":
            first = jnp.take_along_axis(x, batch["first"][..., None], axis=1)
            texts = ("batch", None)
            x = dropout(jnp.tanh(self.pooler(first, texts)), rates.head_dropout, keys[-1])
            return self.classifier(x, texts)
        return self.classifier(dropout(x, rates.head_dropout, keys[-1]))


def bert(config: BertConfig) -> Model:
    """The model record of a BERT.

    `apply` takes the batch of `fw.data` ([B, L] `input_ids`, `segment_ids`, `position_ids`,
    optionally `token_type_ids`; for whole texts also `first` [B, S]) and returns float logits:
    [B, L, num_labels] for tokens, [B, S, num_labels] for texts.

    >>> config = BertConfig(30, 8, 1, 2, 16, num_labels=3, task="token_classification")
    >>> model = bert(config)
    >>> ids = jnp.ones((2, 5), jnp.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids}
    >>> logits, _ = model.apply(model.init(jax.random.key(0)), batch)
    >>> logits.shape
    (2, 5, 3)
    """
    return from_nnx(
        config, lambda rngs: Bert(config, rngs), lambda module, batch, key, _: module(batch, key)
    )


def hf_names(config: BertConfig) -> Iterator[tuple[str, str, bool]]:
    """Pairs each parameter with its Hugging Face tensor: (our path, their name, transposed).

    torch keeps a linear layer's weight as [out, in]; ours is [in, out].
    """
    tables = {
        "word": "word_embeddings",
        "position": "position_embeddings",
        "type": "token_type_embeddings",
    }
    for ours, theirs in tables.items():
        yield f"embeddings/{ours}/embedding", f"bert.embeddings.{theirs}.weight", False
    modules = {"embeddings/norm": "bert.embeddings.LayerNorm"}
    inside = {
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }
    for i in range(config.num_hidden_layers):
        modules |= {f"layers/{i}/{a}": f"bert.encoder.layer.{i}.{b}" for a, b in inside.items()}
    if config.task == "sequence_classification":
        modules["pooler"] = "bert.pooler.dense"
    modules["classifier"] = "classifier"
    for ours, theirs in modules.items():
        norm = ours.endswith("norm")
        yield f"{ours}/{'scale' if norm else 'kernel'}", f"{theirs}.weight", not norm
        yield f"{ours}/bias", f"{theirs}.bias", False
