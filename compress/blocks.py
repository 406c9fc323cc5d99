"""Arrays that belong to blocks of another: scales, zero points and what else goes with an array.

A part of an array has its rank, and along each axis of size n one entry for all (size 1), one for
each (n), or one for every n / s in a row (s). Where parts have the array's rank, transposing,
slicing, scanning and sharding do to them what they do to the array.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Shape = Sequence[int]


def blocked(x: jax.Array, parts: Shape) -> jax.Array:
    """Each axis as two: the parts, and what lies within one.

    >>> blocked(jnp.ones((6, 4)), (3, 1)).shape
    (3, 2, 1, 4)
    """
    return x.reshape([k for n, s in zip(x.shape, parts, strict=True) for k in (s, n // s)])


def within(ndim: int) -> tuple[int, ...]:
    """The axes of `blocked` that run inside a block."""
    return tuple(range(1, 2 * ndim, 2))


def spread(part: jax.Array, shape: Shape) -> jax.Array:
    """A part as an array that broadcasts to a shape: entries of groups are repeated.

    >>> spread(jnp.array([[1.0], [2.0]]), (4, 3))[:, 0]
    Array([1., 1., 2., 2.], dtype=float32)
    """
    for axis, (s, n) in enumerate(zip(part.shape, shape, strict=True)):
        if s not in (1, n):
            part = jnp.repeat(part, n // s, axis=axis)
    return part


def regroup(sizes: Shape, old: Shape, new: Shape) -> tuple[int, ...] | None:
    """The sizes of a part after its array was reshaped, or None if it is no part any more.

    Args:
        sizes: of the part before.
        old: the array's shape before.
        new: and after.

    >>> regroup((1, 8), (32, 8), (32, 2, 4)), regroup((4, 1), (32, 8), (2, 16, 8))
    ((1, 2, 4), (2, 2, 1))
    >>> regroup((1, 8), (32, 8), (256,)) is None
    True
    """
    out: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # The shortest run of axes of either shape with the same product.
        first, second = [], []
        a = b = 1
        while not (first or second) or a != b:
            if a <= b and i < len(old):
                first.append((sizes[i], old[i]))
                a *= old[i]
                i += 1
            elif j < len(new):
                second.append(new[j])
                b *= new[j]
                j += 1
            else:
                return None
        # Axes of size 1 at the end belong to the run.
        while i < len(old) and old[i] == 1 and j == len(new):
            first.append((sizes[i], 1))
            i += 1
        while j < len(new) and new[j] == 1 and i == len(old):
            second.append(1)
            j += 1
        merged = _merge(first)
        split = None if merged is None else _split(merged, a, second)
        if split is None:
            return None
        out += split
    return tuple(out)


def _merge(axes: Sequence[tuple[int, int]]) -> int | None:
    """Entries along several axes (each … each, some, one … one) as entries of their product."""
    shared = False
    for s, n in axes:
        if shared and s != 1:
            return None
        shared |= s < n
    return math.prod(s for s, _ in axes)


def _split(entries: int, size: int, new: Shape) -> list[int] | None:
    """The reverse: entries along one axis as entries along several."""
    if not entries or not size:
        return None
    block, out = size // entries, []
    for n in reversed(new):
        if block % n == 0:
            out.append(1)
            block //= n
        elif n % block == 0:
            out.append(n // block)
            block = 1
        else:
            return None
    return out[::-1]
