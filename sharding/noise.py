"""Random bits that no mesh changes: a function of a key and of each element's global position.

XLA cuts such a function like any other, so an array of them needs no rule and no communication, and
whoever works on a part of an array by hand says where the part begins. The bits come from a 32-bit
integer hash of the position (`lowbias32` of C. Wellons, the key mixed in before and within), not
from threefry, in which a training step of MiniLM spends more time than in its dots
(scripts/bench/LOG.md). Good for dropout; not for secrets, nor where every bit must be perfect.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def positional_bits(
    key: jax.Array,
    shape: Sequence[int],
    *,
    start: Sequence[Any] | None = None,
    whole: Sequence[int] | None = None,
) -> jax.Array:
    """32 random bits an element.

    Args:
        key: a typed PRNG key.
        shape: of the array, or of one part of it.
        start: where the part begins in the array, an integer an axis, which may be traced; at the
            origin by default.
        whole: the shape of the array that this is a part of; `shape` by default.

    Returns:
        uint32 of `shape`: those of the array of shape `whole`, at the part's place.

    >>> key = jax.random.key(0)
    >>> array = positional_bits(key, (4, 6))
    >>> part = positional_bits(key, (2, 3), start=(2, 3), whole=(4, 6))
    >>> bool((part == array[2:, 3:]).all())
    True
    """
    whole = tuple(shape if whole is None else whole)
    seed = jax.random.key_data(key).reshape(-1)
    # Mixed first: `key(0)` and `key(1)` differ in one bit, and would have correlated bits.
    before = _hash(seed[0], seed[-1], seed[-1])
    within = _hash(seed[-1], before, before)
    for axes in _countable(whole):
        sizes = [n if axis in axes else 1 for axis, n in enumerate(shape)]
        position = jnp.zeros(sizes, jnp.uint32)
        stride = 1
        for axis in reversed(axes):
            step = jnp.uint32(stride % 2**32)
            position += lax.broadcasted_iota(jnp.uint32, sizes, axis) * step
            if start is not None:
                position += jnp.asarray(start[axis]).astype(jnp.uint32) * step
            stride *= whole[axis]
        before = _hash(position, before, within)
    return before


def dropout_mask(
    key: jax.Array,
    rate: float,
    shape: Sequence[int],
    dtype: jax.typing.DTypeLike,
    *,
    start: Sequence[Any] | None = None,
    whole: Sequence[int] | None = None,
) -> jax.Array:
    """What dropout multiplies by: 0 with probability `rate`, else 1 / (1 - rate).

    Args:
        key: a typed PRNG key.
        rate: in [0, 1).
        shape: of the array, or of one part of it.
        dtype: floating.
        start: as in `positional_bits`.
        whole: as in `positional_bits`.

    Returns:
        The mask, of `shape` and `dtype` (Srivastava et al. 2014, JMLR 15).

    >>> dropout_mask(jax.random.key(0), 0.5, (6,), jnp.float32)
    Array([0., 0., 2., 0., 2., 0.], dtype=float32)
    """
    bits = positional_bits(key, shape, start=start, whole=whole)
    keep = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, jnp.asarray(1 / (1 - rate), dtype), jnp.zeros((), dtype))


def _countable(shape: tuple[int, ...]) -> list[list[int]]:
    """The axes in groups, outermost first, whose positions 32 bits can count.

    There is one group but for the attention weights of long texts: [8, 16, 8192, 8192] has 2³³
    elements, and one count of them would begin again in the middle, with the same bits.
    """
    groups: list[list[int]] = [[]]
    count = 1
    for axis in reversed(range(len(shape))):
        if groups[0] and count * shape[axis] > 2**32:
            groups.insert(0, [])
            count = 1
        groups[0].insert(0, axis)
        count *= shape[axis]
    return groups


def _hash(x, before, within):
    x = x ^ before
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D) + within
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
