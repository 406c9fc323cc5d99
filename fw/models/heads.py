"""What is made of an encoder's last hidden states: the heads, the same for all families.

| task | output | |
| --- | --- | --- |
| token_classification | [B, L, labels] | logits of every token |
| sequence_classification | [B, S, labels] | logits of every text of a row |
| multi_label_classification | [B, S, labels] | the same: a logit for each label by itself |
| regression | [B, S, labels] | the same: numbers |
| question_answering | [B, L, 2] | logits of every token as an answer's first and its last |
| masked_lm | [B, L, vocab] | logits of every token's word, or what `words` says of them |
| embedding | [B, S, size] | a vector for every text of a row |

B rows of L tokens hold at most S texts each; text s of a row is segment s + 1, and begins at
`batch["first"][:, s]`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fw.labels import OF_TEXTS
from fw.model import Batch
from fw.models.layers import Dense, Embedding, LayerNorm, gelu
from fw.taps import tap
from sharding import constrain, linear, word_losses
from sharding.context import differentiated

TASKS = (*OF_TEXTS, "question_answering", "masked_lm", "embedding")
SPAN = 2
"""Logits of a token in question answering: whether the answer begins, and ends, with it."""

POOLINGS = ("mean", "cls")

WORDS, TABLE, BIAS = "words", "word_table", "word_bias"
"""What logits of words would be made of, for `fw.taps` where there are targets."""


def first_tokens(x: jax.Array, batch: Batch) -> jax.Array:
    """The first token of every text: [B, L, D] → [B, S, D].

    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> first_tokens(x, {"first": jnp.array([[0, 2]])})[0, :, 0]
    Array([0., 2.], dtype=float32)
    """
    return jnp.take_along_axis(x, batch["first"][..., None], axis=1)


def means(x: jax.Array, batch: Batch) -> jax.Array:
    """The mean over the tokens of every text: [B, L, D] → [B, S, D], zero where there is no text.

    >>> x = jnp.arange(4.0).reshape(1, 4, 1)
    >>> means(x, {"first": jnp.array([[0, 2]]), "segment_ids": jnp.array([[1, 1, 2, 0]])})[0, :, 0]
    Array([0.5, 2. ], dtype=float32)
    """
    number = jnp.arange(1, batch["first"].shape[1] + 1, dtype=batch["segment_ids"].dtype)
    of_text = (batch["segment_ids"][:, None, :] == number[:, None]).astype(x.dtype)
    size = jnp.maximum(jnp.sum(of_text, -1, keepdims=True), jnp.ones((), x.dtype))
    return jnp.einsum("bsl,bld->bsd", of_text / size, x)


def embed(x: jax.Array, batch: Batch, pooling: str, normalize: bool) -> jax.Array:
    """A vector for every text (Reimers & Gurevych 2019, arXiv:1908.10084).

    Args:
      x: [B, L, D].
      batch: holds `first` and `segment_ids`.
      pooling: "mean" over a text's tokens, or "cls", its first.
      normalize: to length 1, as sentence-transformers does it.

    Returns:
      [B, S, D].

    >>> x = jnp.array([[[3.0, 4.0]]])
    >>> batch = {"first": jnp.array([[0]]), "segment_ids": jnp.array([[1]])}
    >>> embed(x, batch, "mean", True)
    Array([[[0.6, 0.8]]], dtype=float32)
    """
    y = means(x, batch) if pooling == "mean" else first_tokens(x, batch)
    if not normalize:
        return y
    length = jnp.sqrt(jnp.sum(jnp.square(y), -1, keepdims=True))
    return y / jnp.maximum(length, np.asarray(1e-12, y.dtype))


def word_logits(x: jax.Array, word: Embedding, bias: jax.Array | None = None) -> jax.Array:
    """x · tableᵀ: how well each word of the table fits, [..., D] → [..., vocab]."""
    # As an einsum where `linear` has nothing to say: transposed first, one row takes over three
    # times as long on a CPU.
    table = word.embedding[...]
    if differentiated() is None:
        y = jnp.einsum("...d,vd->...v", x, table)
    else:
        [y] = linear(x, [table.T], word.axes[::-1])
    y = y if bias is None else y + bias
    return constrain(y, "batch", "length", "vocab")


def words(
    x: jax.Array, word: Embedding, batch: Batch, bias: jax.Array | None = None
) -> jax.Array | dict[str, jax.Array]:
    """The words of a language model: their logits, or how well it knows those it is told.

    Args:
      x: [B, L, D].
      word: the table.
      batch: may hold `targets`, int32 [B, L], `IGNORE` where a token does not count.
      bias: [vocab].

    Returns:
      Logits [B, L, vocab]; with targets, {"losses": [B, L], "hits": bool [B, L]} of
      `sharding.word_losses`, and no logits anywhere.
    """
    if "targets" not in batch:
        return word_logits(x, word, bias)
    x, table = tap(x, WORDS), tap(word.embedding[...], TABLE)
    bias = None if bias is None else tap(bias, BIAS)
    losses, hits = word_losses(x, table, batch["targets"], bias, names=word.axes)
    return {"losses": losses, "hits": hits}


class WordHead(nnx.Module):
    """The masked language model's: dense, GELU, norm; then the embedding's own table, and a bias.

    The table is tied (Press & Wolf 2017, arXiv:1608.05859): it is given when the head is called.
    """

    def __init__(self, size: int, words: int, epsilon: float, *, std: float, rngs: nnx.Rngs):
        self.dense = Dense(size, size, ("embed", "pooled"), std=std, rngs=rngs)
        self.norm = LayerNorm(size, epsilon=epsilon)
        self.bias = nnx.Param(jnp.zeros(words), axes=("vocab",))

    def __call__(
        self, x: jax.Array, word: Embedding, batch: Batch
    ) -> jax.Array | dict[str, jax.Array]:
        return words(self.norm(gelu(self.dense(x))), word, batch, self.bias[...])
