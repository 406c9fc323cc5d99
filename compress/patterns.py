"""Which entries of an array stay: the largest by a score, anywhere, in groups, or in blocks.

Scores are ordered by their bits, and the least that stays is found bit by bit, by counting: exact,
the same on every mesh, and with no sort. Every array of a stack is pruned by itself.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.blocks import blocked, spread, within
from compress.scheme import core, inputs


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be.

    Attributes:
        text: "" for anywhere; "2:4", of every four neighbours along the input axis two stay;
            "4x4", blocks of so many inputs and outputs stay or go whole.

    >>> Pattern("2:4").group, Pattern("16x1").block
    ((2, 4), (16, 1))
    """

    text: str = ""

    def __post_init__(self) -> None:
        """Check it."""
        fits = re.fullmatch(r"|[1-9]\d{0,4}[:x][1-9]\d{0,4}", self.text)
        if not fits or (self.group and not self.group[0] < self.group[1] <= 256):
            raise ValueError(
                f"pattern {self.text!r}: expected '' for anywhere, 'N:M' such as 2:4, M up to 256, "
                "or 'INxOUT' such as 16x16"
            )

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M), if N of M stay."""
        return self._sizes(":")

    @property
    def block(self) -> tuple[int, int] | None:
        """(inputs, outputs) of a block."""
        return self._sizes("x")

    def _sizes(self, mark: str) -> tuple[int, int] | None:
        if mark not in self.text:
            return None
        first, _, second = self.text.partition(mark)
        return int(first), int(second)

    def unfit(self, shape: Sequence[int], role: str) -> str:
        """Why an array cannot have it, in words, or "".

        >>> Pattern("2:4").unfit((6, 8), "kernel")
        'its input axis has 6 entries, which groups of 4 do not divide'
        """
        n_in, n_out = shape[inputs(role)[-1]], shape[_output(role)]
        if self.group and n_in % self.group[1]:
            return (
                f"its input axis has {n_in} entries, which groups of {self.group[1]} do not divide"
            )
        if self.block and (n_in % self.block[0] or n_out % self.block[1]):
            return f"blocks of {self.text} do not divide {n_in} inputs and {n_out} outputs"
        return ""


def _output(role: str) -> int:
    return -2 if role == "table" else -1


def keys(scores: jax.Array) -> jax.Array:
    """Scores as uint32 of the same order.

    >>> keys(jnp.array([-1.0, -0.5, 0.0, 2.0])).argsort()
    Array([0, 1, 2, 3], dtype=int32)
    """
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    top = np.uint32(2**31)
    return jnp.where(bits >= top, ~bits, bits | top)


def largest(order: jax.Array, stay: jax.Array | int, axes: Sequence[int]) -> jax.Array:
    """Which are the `stay` largest along axes; of equals the first.

    Args:
        order: uint32, as `keys` gives.
        stay: how many, 1 or more.
        axes: that are counted over, one after another.

    >>> largest(keys(jnp.array([3.0, 1.0, 1.0])), 2, (0,))
    Array([ True,  True, False], dtype=bool)
    """

    def bit(i: jax.Array, least: jax.Array) -> jax.Array:
        tried = least | (np.uint32(1) << (np.uint32(31) - i.astype(jnp.uint32)))
        enough = jnp.sum(order >= tried, axes, keepdims=True, dtype=jnp.int32) >= stay
        return jnp.where(enough, tried, least)

    own = sorted(axis % order.ndim for axis in axes)
    shape = [1 if k in own else n for k, n in enumerate(order.shape)]
    least = lax.fori_loop(0, 32, bit, jnp.zeros(shape, jnp.uint32))
    above, equal = order > least, order == least
    room = stay - jnp.sum(above, own, keepdims=True, dtype=jnp.int32)
    row = (*order.shape[: own[0]], -1, *order.shape[own[-1] + 1 :])
    turn = jnp.cumsum(equal.astype(jnp.int32).reshape(row), own[0]).reshape(order.shape)
    return above | (equal & (turn <= room))


def mask(
    scores: jax.Array,
    pattern: Pattern,
    sparsity: jax.Array | float,
    role: str,
    *,
    each_output: bool = False,
    alive: jax.Array | None = None,
) -> jax.Array:
    """Which entries of an array stay, bool.

    Args:
        scores: of the array's shape; of blocks, their sums count.
        pattern: where zeros may be.
        sparsity: the part that goes, 0 to 1; of N:M it is known.
        role: of the array, of `compress.scheme.ROLES`.
        each_output: the part goes of every output's inputs, not of all together.
        alive: bool, of the array's shape: what may stay at all; None for everything.

    >>> mask(jnp.array([[4.0], [1.0], [2.0], [3.0]]), Pattern("2:4"), 0.5, "kernel").ravel()
    Array([ True, False, False,  True], dtype=bool)
    """
    scores = scores.astype(jnp.float32)
    if alive is not None:  # a sum of a block's is of what lives in it
        dead = np.float32(0 if pattern.block else -np.inf)
        scores = jnp.where(alive, scores, dead)
    if pattern.group:
        n, m = pattern.group
        axis = scores.ndim + inputs(role)[-1]
        shape = (*scores.shape[:axis], -1, m, *scores.shape[axis + 1 :])
        order = keys(scores).reshape(shape)
        place = jnp.arange(m).reshape(-1, *[1] * (scores.ndim - axis - 1))

        # How many come before each: of equals the first stay.
        def before(k: int) -> jax.Array:
            other = lax.slice_in_dim(order, k, k + 1, axis=axis + 1)
            return (other > order) | ((other == order) & (k < place))

        ahead = jnp.zeros(order.shape, jnp.int32)
        for k in range(m):
            ahead = ahead + before(k).astype(jnp.int32)
        return (ahead < n).reshape(scores.shape)
    parts = list(scores.shape)
    if pattern.block:
        parts[inputs(role)[-1]] //= pattern.block[0]
        parts[_output(role)] //= pattern.block[1]
        scores = jnp.sum(blocked(scores, parts), within(len(parts)))
        if alive is not None:
            lives = jnp.any(blocked(alive, parts), within(len(parts)))
            scores = jnp.where(lives, scores, np.float32(-np.inf))
    axes = inputs(role) if each_output else tuple(range(-core(role), 0))
    count = math.prod(parts[k] for k in axes)
    stay = jnp.clip(jnp.round(count * (1 - jnp.asarray(sparsity, jnp.float32))), 1, count)
    kept = largest(keys(scores), stay.astype(jnp.int32), axes)
    return spread(kept, _whole(parts, pattern, role)) if pattern.block else kept


def _whole(parts: Sequence[int], pattern: Pattern, role: str) -> tuple[int, ...]:
    shape = list(parts)
    assert pattern.block is not None
    shape[inputs(role)[-1]] *= pattern.block[0]
    shape[_output(role)] *= pattern.block[1]
    return tuple(shape)
