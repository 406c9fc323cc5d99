"""Attention between one part of the queries and one part of the keys: arithmetic, no communication.

`ring` brings the parts together. Of each pair there is what it adds to a running softmax (Milakov &
Gimelshein 2018, arXiv:1805.02867), and its gradients, from weights that are computed again (Dao et
al. 2022, arXiv:2205.14135).

Shapes: queries [batch, key heads, group, part, head_dim], a group being those that share keys; keys
and values [batch, key heads, part, head_dim]; weights [..., group, queries, keys]. Queries are
scaled already. Sums are in float32 or wider.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.noise import dropout_mask


class Place(NamedTuple):
    """Where a pair lies in the whole: which part its queries are, and which its keys.

    `same` says that they are one part, if that is known while tracing.
    """

    queries: Any
    keys: Any
    same: bool


class State(NamedTuple):
    """A running softmax: the highest score, Σ e^(score - highest), and Σ of it · value."""

    highest: jax.Array
    total: jax.Array
    out: jax.Array


@dataclass(frozen=True)
class Pairs:
    """What all pairs of one attention have in common.

    Attributes:
        parts: how many the length is cut into.
        causal: whether a token sees only itself and those before it.
        rate: of the dropout of weights.
        precision: of dots of float32, as `jax.lax.dot` takes it.
        window: how many places away a token sees, itself not counted; None for all.
    """

    parts: int
    causal: bool
    rate: float
    precision: str
    window: int | None = None

    def start(self, q: jax.Array) -> State:
        """The state before any pair. The first one must be of the same part.

        In it every token sees itself. So its highest score is a real one from there on, and a pair
        in which it sees nothing adds nothing, nor divides zero by zero.
        """
        zero = jnp.zeros(q.shape, wide(q.dtype))
        return State(zero[..., 0] - jnp.inf, zero[..., 0], zero)

    def add(self, state: State, place: Place, q, mine, keys, key) -> State:
        """The state after one pair more.

        Args:
            state: before.
            place: of the pair.
            q: queries.
            mine: segments of the queries [batch, part]; None if texts are whole rows.
            keys: (keys, values, their segments).
            key: of the dropout; None for none.
        """
        k, v, theirs = keys

        def seen() -> State:
            scores = self._scores(place, q, k, mine, theirs)
            highest = jnp.maximum(state.highest, scores.max(-1))
            weights = jnp.exp(scores - highest[..., None])
            fade = jnp.exp(state.highest - highest)
            more = self._dot("bkglm,bkmd->bkgld", self._drop(key, place, weights), v)
            total = state.total * fade + weights.sum(-1)
            return State(highest, total, state.out * fade[..., None] + more)

        return self._if_any(place, q.shape[-2], seen, state)

    def gradients(self, place: Place, queries, keys, key):
        """What one pair adds to the gradients.

        Args:
            place: of the pair.
            queries: (queries, gradient of the output, log Σ e^score, Σ output · its gradient,
                segments).
            keys: (keys, values, segments).
            key: of the dropout.

        Returns:
            (of the queries,), (of the keys, of the values).
        """
        q, dout, norm, share, mine = queries
        k, v, theirs = keys

        def seen():
            weights = jnp.exp(self._scores(place, q, k, mine, theirs) - norm[..., None])
            dweights = self._drop(key, place, self._dot("bkgld,bkmd->bkglm", dout, v))
            dscores = weights * (dweights - share[..., None])
            dq = self._dot("bkglm,bkmd->bkgld", dscores, k)
            dk = self._dot("bkglm,bkgld->bkmd", dscores, q)
            dv = self._dot("bkglm,bkgld->bkmd", self._drop(key, place, weights), dout)
            return (dq,), (dk, dv)

        zero = jnp.zeros(q.shape, norm.dtype), jnp.zeros(k.shape, norm.dtype)
        return self._if_any(place, q.shape[-2], seen, (zero[:1], zero[1:] * 2))

    def _if_any(self, place, size, seen, otherwise):
        """`otherwise` for a pair in which nobody sees anything: too late for all, or too far."""
        if place.same or (not self.causal and self.window is None):
            return seen()
        anything = place.keys < place.queries if self.causal else place.keys == place.keys
        if self.window is not None:
            parts = jnp.abs(place.queries - place.keys)
            anything &= (parts - 1) * size < self.window
        return lax.cond(anything, seen, lambda: otherwise)

    def _scores(self, place, q, k, mine, theirs):
        """Those of keys out of sight are so low that no exponential brings them back."""
        scores = self._dot("bkgld,bkmd->bkglm", q, k)
        low = jnp.asarray(jnp.finfo(scores.dtype).min / 2, scores.dtype)
        if mine is not None:
            together = mine[:, None, None, :, None] == theirs[:, None, None, None, :]
            scores = jnp.where(together, scores, low)
        order = np.arange(q.shape[-2], dtype=np.int32)
        if self.causal and place.same:
            scores = jnp.where(order[:, None] >= order, scores, low)
        if self.window is not None:
            between = (place.queries - place.keys) * len(order) if not place.same else 0
            away = jnp.abs(order[:, None] - order + between)
            scores = jnp.where(away <= self.window, scores, low)
        return scores

    def _drop(self, key, place, weights):
        """Dropout by the weights' position in all of them, [batch, heads, length, length]."""
        if key is None:
            return weights
        *outer, rows, columns = weights.shape
        whole = (*outer, rows * self.parts, columns * self.parts)
        start = (0, 0, 0, place.queries * rows, place.keys * columns)
        shape, dtype = weights.shape, weights.dtype
        return weights * dropout_mask(key, self.rate, shape, dtype, start=start, whole=whole)

    def _dot(self, spec, a, b):
        """Operands in the dtype of `b`."""
        sums = wide(b.dtype)

        def dot(a, b):
            precision = self.precision if b.dtype == sums else None
            return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=sums)

        a = a.astype(b.dtype)
        if b.dtype == sums:
            return dot(a, b)
        # On a CPU some batched dots of bfloat16 do not run (DotThunk: UNIMPLEMENTED). The numbers
        # are the same: products of two bfloat16 are exact in float32.
        return lax.platform_dependent(
            a, b, cpu=lambda a, b: dot(a.astype(sums), b.astype(sums)), default=dot
        )


def wide(dtype: Any) -> np.dtype:
    """The dtype of sums: float32, or `dtype` if it is wider.

    >>> wide(jnp.bfloat16), wide(np.float64)
    (dtype('float32'), dtype('float64'))
    """
    return np.promote_types(dtype, np.float32)


def by_group(x: jax.Array, key_heads: int) -> jax.Array:
    """Queries as this file takes them.

    Args:
        x: [batch, part, heads, head_dim].
        key_heads: a divisor of heads.

    >>> by_group(jnp.zeros((1, 5, 6, 2)), 3).shape
    (1, 3, 2, 5, 2)
    """
    batch, part, heads, size = x.shape
    shared = x.reshape(batch, part, key_heads, heads // key_heads, size)
    return jnp.transpose(shared, (0, 2, 3, 1, 4))


def by_token(x: jax.Array) -> jax.Array:
    """The inverse of `by_group`.

    >>> by_token(jnp.zeros((1, 3, 2, 5, 2))).shape
    (1, 5, 6, 2)
    """
    batch, key_heads, group, part, size = x.shape
    return jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(batch, part, key_heads * group, size)
