"""The encoder that BERT, RoBERTa and DistilBERT share: each sublayer's sum is normalised after.

Devlin et al. 2018 (arXiv:1810.04805) took it from the Transformer (Vaswani et al. 2017,
arXiv:1706.03762). A family adds its embeddings, its config and its names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.labels import PROBLEMS
from fw.model import Batch
from fw.models import checks, heads
from fw.models.layers import (
    HIDDEN,
    Dense,
    LayerNorm,
    attention,
    dropout,
    gelu,
    in_heads,
    visible,
)
from fw.models.stack import Stack
from fw.taps import tap
from sharding import constrain
from sharding.parallel.pipeline import REMAT


@dataclass(frozen=True)
class Shape:
    """The numbers of the layers.

    Attributes:
      size: of a token.
      layers: how many.
      heads: of attention.
      inner: size of the hidden layer of an MLP.
      epsilon: of the norms.
      std: of new parameters.
      dropout: of what is added.
      attention_dropout: of attention weights.
      microbatches, remat, scan: as in `Stack`.
      head_size: of a head; None for size / heads.
    """

    size: int
    layers: int
    heads: int
    inner: int
    epsilon: float
    std: float
    dropout: float
    attention_dropout: float
    microbatches: int
    remat: str | None
    scan: bool
    head_size: int | None = None

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.head_size or self.size // self.heads


@dataclass(frozen=True)
class Head:
    """What the encoder is for.

    Attributes:
      task: one of `fw.models.heads.TASKS`.
      labels: how many classes.
      dropout: before the classifier.
      pool_dropout: before the layer that sees a text's first token.
      activation: after that layer.
      pooling: of an embedding.
      normalize: an embedding to length 1.
    """

    task: str
    labels: int = 0
    dropout: float = 0.0
    pool_dropout: float = 0.0
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh
    pooling: str = "mean"
    normalize: bool = True


class Attention(nnx.Module):
    """Multi-head self-attention with its output projection; `bias` of queries, keys and values.

    How many heads there are is in the kernels, some of which may be gone.
    """

    def __init__(self, shape: Shape, rngs: nnx.Rngs, *, bias: bool = True):
        size, wide, std = shape.size, shape.heads * shape.head, shape.std
        into, how = ("embed", "heads"), {"std": std, "bias": bias, "rngs": rngs}
        self.query = Dense(size, wide, into, **how)
        self.key = Dense(size, wide, into, **how)
        self.value = Dense(size, wide, into, **how)
        self.out = Dense(wide, size, ("heads", "embed"), std=std, rngs=rngs)
        self.size = shape.head
        self.rate = shape.attention_dropout

    def __call__(self, x: jax.Array, seen: Any, key: jax.Array | None) -> jax.Array:
        q, k, v = in_heads(x, [self.query, self.key, self.value], self.size)
        y = attention(q, k, v, seen, rate=self.rate, key=key)
        return self.out(y.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
    """Attention and MLP, each added to its input and normalised after."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        size, inner, std = shape.size, shape.inner, shape.std
        self.attention = Attention(shape, rngs)
        self.attention_norm = LayerNorm(size, epsilon=shape.epsilon)
        self.up = Dense(size, inner, ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Dense(inner, size, ("mlp", "embed"), std=std, rngs=rngs)
        self.norm = LayerNorm(size, epsilon=shape.epsilon)
        self.rate = shape.dropout

    def __call__(self, x: jax.Array, seen: Any, key: jax.Array | None) -> jax.Array:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        attended = self.attention(x, seen, keys[0])
        x = self.attention_norm(x + dropout(attended, self.rate, keys[1]))
        inner = constrain(gelu(self.up(x)), "batch", "length", "mlp")
        x = self.norm(x + dropout(self.down(inner), self.rate, keys[2]))
        return tap(constrain(x, "batch", "length", "embed"), HIDDEN)


class Encoder(nnx.Module):
    """Embeddings, a stack of layers, and a head.

    `embeddings` is a module of the family with a table `word`, `embeddings(batch) -> [B, L, size]`.
    """

    def __init__(self, embeddings: Any, shape: Shape, head: Head, rngs: nnx.Rngs):
        size, std = shape.size, shape.std
        self.embeddings = embeddings
        self.stack = Stack(
            lambda rngs: Layer(shape, rngs),
            shape.layers,
            microbatches=shape.microbatches,
            remat=shape.remat,
            scan=shape.scan,
            rngs=rngs,
        )
        labels = heads.SPAN if head.task == "question_answering" else head.labels
        if head.task in PROBLEMS:
            self.pooler = Dense(size, size, ("embed", "pooled"), std=std, rngs=rngs)
        if head.task == "masked_lm":
            words = embeddings.word.embedding.shape[0]
            self.words = heads.WordHead(size, words, shape.epsilon, std=std, rngs=rngs)
        elif head.task != "embedding":
            self.classifier = Dense(size, labels, ("embed", "labels"), std=std, rngs=rngs)
        self.rate, self.head = shape.dropout, head

    def __call__(self, batch: Batch, key: jax.Array | None) -> Any:
        head = self.head
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = dropout(self.embeddings(batch), self.rate, keys[0])
        x = constrain(x, "batch", "length", "embed")
        seen = visible(batch["segment_ids"], x.dtype)
        x = self.stack(x, seen, key=keys[1])
        if head.task == "embedding":
            return heads.embed(x, batch, head.pooling, head.normalize)
        if head.task == "masked_lm":
            return self.words(x, self.embeddings.word, batch)
        if head.task in PROBLEMS:
            texts = ("batch", None)
            last = keys[-1]
            before = None if last is None else jax.random.fold_in(last, 1)
            x = dropout(heads.first_tokens(x, batch), head.pool_dropout, before)
            x = head.activation(self.pooler(x, texts))
            return self.classifier(dropout(x, head.dropout, last), texts)
        return self.classifier(dropout(x, head.dropout, keys[-1]))


def check(
    config: object, *, size: str, heads_: str, rates: tuple[str, ...], head_size: int | None = None
) -> None:
    """Raises FwError for a config that the arithmetic cannot follow; names are those of fields."""
    checks.at_least(config, 1, size, heads_)
    if head_size is not None:
        checks.at_least(config, 1, "head_size")
    width, number = getattr(config, size), getattr(config, heads_)
    if head_size is None and width % number:
        raise FwError(f"{size} {width} is not a multiple of {heads_} {number}")
    checks.one_of(config, task=heads.TASKS, pooling=heads.POOLINGS, remat=REMAT)
    checks.rates(config, *rates)
