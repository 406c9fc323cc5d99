"""What a student can learn of a teacher: how far its answers, states and attention are apart.

Every lesson is a function of what both computed for the same batch. Answers give a sum over labels;
states and attention, that are of no unit, a mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fw.errors import FwError
from fw.labels import IGNORE, TAUGHT
from fw.model import Batch
from fw.models.layers import segment_bias
from sharding import constrain

_TINY = np.float32(1e-30)

MOST_LOGITS = 2**24
"""Numbers of words' logits that are there at once."""

Soft = Callable[[jax.Array, jax.Array, Batch, float], jax.Array]
"""`(student's outputs, teacher's, batch, temperature) -> sum`, over labels that count."""


def divergence(logits: jax.Array, taught: jax.Array, batch: Batch, temperature: float) -> jax.Array:
    """T² · Σ KL(softmax(taught / T) ‖ softmax(logits / T)) where labels count.

    T² keeps the gradients as large as those of labels, whatever T is.

    Args:
      logits: [..., C], of the student.
      taught: [..., C], of the teacher.
      batch: holds `labels` i32[...], `IGNORE` where there is none; or `taught`.
      temperature: T.

    Source: Hinton et al. 2015, arXiv:1503.02531.

    >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    >>> batch = {"labels": jnp.array([0, IGNORE])}
    >>> f"{divergence(logits, logits[::-1], batch, temperature=1.0):.4f}"
    '0.3681'
    """
    t = jnp.asarray(temperature, logits.dtype)
    apart = _kl(taught.astype(logits.dtype) / t, logits / t)
    return _summed(apart * (t * t), batch.get(TAUGHT, batch["labels"] != IGNORE))


def binary_divergence(
    logits: jax.Array, taught: jax.Array, batch: Batch, temperature: float
) -> jax.Array:
    """`divergence` of labels that are each by itself: σ(x / T) beside 1 - σ(x / T).

    Args:
      logits, taught: [..., C], or [...] where there is one.
      batch: holds `labels` like them, `IGNORE` where there is none.
      temperature: T.

    >>> logits = jnp.log(jnp.array([[1.0, 9.0]]))
    >>> f"{binary_divergence(logits, 0 * logits, {'labels': jnp.array([[1, 0]])}, 1.0):.4f}"
    '0.5108'
    """
    t = jnp.asarray(temperature, logits.dtype)
    x, y = logits / t, taught.astype(logits.dtype) / t
    p = jax.nn.sigmoid(y)
    # log σ(y) - log σ(x) where it is true, and the same of 1 - σ, which is σ(-x).
    apart = p * (jax.nn.softplus(-x) - jax.nn.softplus(-y))
    apart += (1 - p) * (jax.nn.softplus(x) - jax.nn.softplus(y))
    return _summed(apart * (t * t), batch["labels"] != IGNORE)


def difference(
    numbers: jax.Array, taught: jax.Array, batch: Batch, temperature: float
) -> jax.Array:
    """Σ (student - teacher)² of numbers that count; a temperature is not for them.

    Args:
      numbers, taught: [..., C].
      batch: holds `labels` like them, NaN where there is none.
      temperature: unheeded.

    >>> difference(jnp.ones((1, 1)), jnp.zeros((1, 1)), {"labels": jnp.zeros((1, 1))}, 2.0)
    Array(1., dtype=float32)
    """
    apart = jnp.square(numbers - taught.astype(numbers.dtype))
    return _summed(apart, ~jnp.isnan(batch["labels"]))


def span_divergence(
    logits: jax.Array, taught: jax.Array, batch: Batch, temperature: float
) -> jax.Array:
    """`divergence` of an answer's first and last piece, among the pieces of each text.

    Args:
      logits, taught: [B, L, 2].
      batch: holds `segment_ids` [B, L] and `labels` i32[B, S, 2], `IGNORE` where there is none.
      temperature: T.

    >>> logits = jnp.zeros((1, 3, 2)).at[0, 2].set(9.0)  # the third piece is another text's
    >>> batch = {"segment_ids": jnp.array([[1, 1, 2]]), "labels": jnp.array([[[0, 1]]])}
    >>> float(span_divergence(logits, 0 * logits, batch, 1.0))
    0.0
    """
    number = jnp.arange(1, batch["labels"].shape[1] + 1, dtype=batch["segment_ids"].dtype)
    own = batch["segment_ids"][:, None, None, :] == number[:, None, None]  # [B, S, 1, L]
    t = jnp.asarray(temperature, logits.dtype)
    bias = jnp.where(own, jnp.zeros((), t.dtype), _least(t.dtype))
    x, y = (jnp.swapaxes(z, 1, 2)[:, None].astype(t.dtype) / t + bias for z in (logits, taught))
    return _summed(_kl(y, x) * (t * t), batch["labels"] != IGNORE) / 2


class Words(NamedTuple):
    """What logits of words are made of.

    Attributes:
      x: [B, L, D].
      table: [vocab, D].
      bias: [vocab], or None.
    """

    x: jax.Array
    table: jax.Array
    bias: jax.Array | None


def word_divergence(ours: Words, theirs: Words, batch: Batch, temperature: float) -> jax.Array:
    """`divergence` of words; their logits are made some places of a text at a time.

    Args:
      ours, theirs: of the student and of the teacher; sizes D may differ.
      batch: holds `targets` int32 [B, L], `IGNORE` where a token does not count.
      temperature: T.

    Raises:
      FwError: other vocabularies.

    >>> x, table = jnp.ones((1, 2, 3)), jnp.arange(12.0).reshape(4, 3)
    >>> words, batch = Words(x, table, None), {"targets": jnp.array([[1, IGNORE]])}
    >>> float(word_divergence(words, words, batch, 1.0))
    0.0
    """
    sizes = [len(words.table) for words in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise FwError(f"the student knows {sizes[0]} words, the teacher {sizes[1]}; expected one")
    rows, length = batch["targets"].shape
    fits = [
        n for n in range(1, length + 1) if length % n == 0 and rows * n * sizes[0] <= MOST_LOGITS
    ]
    size = max(fits, default=1)

    def logits(words: Words, start: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(words.x, start, size, 1)
        y = jnp.einsum("bld,vd->blv", x, words.table)
        return constrain(y if words.bias is None else y + words.bias, "batch", "length", "vocab")

    @jax.checkpoint
    def part(start: jax.Array) -> jax.Array:
        here = {"labels": jax.lax.dynamic_slice_in_dim(batch["targets"], start, size, 1)}
        return divergence(logits(ours, start), logits(theirs, start), here, temperature)

    starts = jnp.arange(0, length, size, dtype=jnp.int32)
    return jnp.sum(jax.lax.map(part, starts))


def apart(
    ours: Sequence[jax.Array],
    theirs: Sequence[jax.Array],
    projections: Mapping[str, jax.Array],
    batch: Batch,
) -> jax.Array:
    """How far states are from the teacher's: the mean over layers of Σ |W h - h'|² / Σ |h'|².

    Relative, so that layers weigh the same whatever the size of their numbers. Layer i of n learns
    of layer `partner(i, n, m)` of m.

    Args:
      ours: h of the student's layers, [B, ..., size]; where a batch has `segment_ids` [B, L], of
        tokens, of which padding does not count.
      theirs: h' of the teacher's.
      projections: W [size, teacher's size], by the number of the layer.
      batch: the batch.

    Raises:
      FwError: states of other places, such as images' at another resolution.

    Source: Romero et al. 2015, arXiv:1412.6550; of every layer, Jiao et al. 2020, arXiv:1909.10351.
    """
    total = jnp.zeros((), ours[0].dtype)
    for i, x in enumerate(ours):
        y = theirs[partner(i, len(ours), len(theirs))].astype(x.dtype)
        if x.shape[:-1] != y.shape[:-1]:
            raise FwError(
                f"states of the student's layer {i} are {list(x.shape)}, of the teacher's "
                f"{list(y.shape)}; expected the same but for the last axis: leave teacher_hidden"
            )
        weight = _real(batch, x)
        square = jnp.square(x @ projections[str(i)].astype(x.dtype) - y)
        total += jnp.sum(square * weight) / jnp.maximum(jnp.sum(jnp.square(y) * weight), _TINY)
    return total / len(ours)


def partner(layer: int, count: int, of: int) -> int:
    """Which of a teacher's layers a student's layer learns of: the last one of the last, evenly.

    >>> [partner(i, 3, 6) for i in range(3)], [partner(i, 4, 2) for i in range(4)]
    ([1, 3, 5], [0, 0, 1, 1])
    """
    return -(-(layer + 1) * of // count) - 1


def relations(
    ours: Sequence[jax.Array], theirs: Sequence[jax.Array], batch: Batch, *, causal: bool = False
) -> jax.Array:
    """How far it is from the teacher's how tokens are related: KL, its mean over tokens and heads.

    Among queries, among keys and among values: softmax(x xᵀ / √d) of tokens in one text. Heads are
    formed anew, as many of both, so that models with other heads and sizes can be compared.

    Args:
      ours, theirs: queries, keys and values [B, L, heads, size] of one layer.
      batch: may hold `segment_ids` [B, L].
      causal: whether a token sees only those before it.

    Source: Wang et al. 2021, arXiv:2012.15828.

    >>> x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    >>> float(relations([x] * 3, [x] * 3, {})), float(relations([x] * 3, [-2 * x] * 3, {})) > 0.1
    (0.0, True)
    """
    total = jnp.zeros((), ours[0].dtype)
    for x, y in zip(ours, theirs, strict=True):
        segments = batch.get("segment_ids", jnp.ones(x.shape[:2], jnp.int32))
        bias = segment_bias(segments, x.dtype, causal=causal)
        count = _heads(math.prod(x.shape[2:]), math.prod(y.shape[2:]), y.shape[2])
        apart = _kl(*(_related(z.astype(x.dtype), count, bias) for z in (y, x)))
        weight = (segments > 0).astype(x.dtype)
        total += jnp.sum(apart * weight[:, None]) / (count * jnp.maximum(jnp.sum(weight), 1))
    return total / len(ours)


def _heads(width: int, other: int, most: int) -> int:
    """The most heads that both widths divide into."""
    return max(n for n in range(1, most + 1) if width % n == other % n == 0)


def _related(x: jax.Array, heads: int, bias: jax.Array) -> jax.Array:
    """Scores [B, heads, L, L] of tokens among themselves."""
    x = jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)
    return jnp.einsum("bhld,bhmd->bhlm", x, x) / np.asarray(math.sqrt(x.shape[-1]), x.dtype) + bias


def _kl(taught: jax.Array, said: jax.Array) -> jax.Array:
    """KL(softmax(taught) ‖ softmax(said)) over the last axis."""
    ours, theirs = (jax.nn.log_softmax(x, axis=-1) for x in (said, taught))
    return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def _summed(apart: jax.Array, counted: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(counted, apart, jnp.zeros((), apart.dtype)))


def _least(dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.asarray(jnp.finfo(dtype).min / 2, dtype)


def _real(batch: Batch, x: jax.Array) -> jax.Array:
    """1 where a state counts, which broadcasts to x."""
    segments = batch.get("segment_ids")
    if segments is None or segments.shape != x.shape[:2]:
        return jnp.ones((1,) * x.ndim, x.dtype)
    return (segments > 0).astype(x.dtype)[..., None]


SOFT: Mapping[str, Soft] = MappingProxyType(
    {
        **dict.fromkeys(("ner", "classify", "tabular", "image", "segment"), divergence),
        **dict.fromkeys(("multilabel", "rank"), binary_divergence),
        **dict.fromkeys(("regress", "estimate"), difference),
        "qa": span_divergence,
    }
)
"""By task, how far a teacher's answers are; those of "mlm" and "lm" are compared by
`word_divergence`, and to retrieve is not taught."""
