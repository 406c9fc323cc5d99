"""The moments of an optimiser in a byte each, with a float32 scale for a block of neighbours.

    signed      m ≈ s · e4m3(code)                 s: the block's largest |m| / 448
    positive    v ≈ s · 2^(32 · (code − 255)/255)  s: the block's largest v

A mean has both signs and moves by a tenth in a step: a float8 does for it. A mean of squares moves
by a thousandth, far less than the distance of its codes, and would stand still if rounded to
nearest; so it goes up or down by chance, and is right in the mean. It has no code for 0, by whose
root Adam would divide: what is below the least code is that.
"""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.arrays import Compressed, place_part
from compress.blocks import blocked, spread, within

BLOCK, LEAST = 256, 32
"""Neighbours that share a scale: at most, and at least."""

SMALL = 4096
"""Arrays of fewer numbers, or of one axis, stay float32: they are few and matter most."""

OCTAVES = 32
"""Powers of two that the codes of a mean of squares span; a root of it spans half as many."""

LARGEST, LITTLE = np.float32(448), np.float32(2.0**-100)
"""Of e4m3; and the least block's largest that is not taken for 0."""


class Moment(Compressed):
    """A moment of a parameter, in codes.

    Attributes:
        values: uint8, of the parameter's shape: bits of an e4m3, or a power of two.
        scale: float32, of its rank, one entry for every block.
        positive: whether it is a mean of squares.
    """

    values: jax.Array
    scale: jax.Array
    positive: bool = field(default=False, metadata={"static": True})

    def aval(self) -> Any:
        """See `quax.Value`."""
        return jax.typeof(self.values).update(dtype=np.dtype("float32"))

    def dense(self) -> jax.Array:
        """See `Compressed.dense`."""
        if self.positive:
            unit = _power(self.values.astype(jnp.float32))
        else:
            eight = jax.lax.bitcast_convert_type(self.values, jnp.float8_e4m3fn)
            unit = eight.astype(jnp.float32)
        return unit * spread(self.scale, self.values.shape)

    def place(self, spec: Any) -> "Moment":
        """See `Compressed.place`."""
        shape = self.aval().shape
        values = place_part(self.values, shape, spec, "values")
        return Moment(values, place_part(self.scale, shape, spec), self.positive)


def block_of(shape: Sequence[int], *, stacked: bool = False) -> tuple[int, int] | None:
    """The axis of a parameter that is cut in blocks, negative, and their size; None if none is.

    That of the largest blocks, the last of equals. Layers have the same, stacked or apart.

    Args:
        shape: of the parameter.
        stacked: whether its first axis is that of layers.

    >>> block_of((30522, 384)), block_of((384, 77)), block_of((384,))
    ((-1, 192), (-2, 192), None)
    >>> block_of((12, 384), stacked=True), block_of((12, 384, 1536), stacked=True)
    (None, (-1, 256))
    """
    own = shape[1:] if stacked else shape
    if len(own) < 2 or math.prod(own) < SMALL:
        return None
    sizes = [max(n for n in range(1, min(size, BLOCK) + 1) if size % n == 0) for size in own]
    best = max(sizes)
    if best < LEAST:
        return None
    return max(k for k, n in enumerate(sizes) if n == best) - len(own), best


def coded(
    x: jax.Array, *, noise: jax.Array | None = None, stacked: bool = False
) -> jax.Array | Moment:
    """A moment in codes, or as it is where no block fits.

    Args:
        x: float32, of the parameter's shape.
        noise: float32 in [0, 1) of x's shape, by which a mean of squares is rounded; None for one
            of both signs, rounded to nearest.
        stacked: whether its first axis is that of layers.

    >>> x = jnp.linspace(-1, 1, 4096).reshape(16, 256)
    >>> float(jnp.abs(coded(x).dense() - x).max()) < 0.04
    True
    """
    at = block_of(x.shape, stacked=stacked)
    if at is None:
        return x
    parts = list(x.shape)
    parts[at[0]] //= at[1]
    top = jnp.max(jnp.abs(blocked(x, parts)), axis=within(x.ndim))
    # What is smaller is nothing: its reciprocal would be infinite.
    top = jnp.where(top < LITTLE, np.float32(0), top)
    over = jnp.where(top == 0, np.float32(1), top)
    if noise is not None:
        unit = x * spread(1 / over, x.shape)
        return Moment(_power_code(unit, noise), top, True)
    unit = x * spread(LARGEST / over, x.shape)
    eight = unit.astype(jnp.float8_e4m3fn)
    return Moment(jax.lax.bitcast_convert_type(eight, jnp.uint8), top / LARGEST)


def start(shape: Sequence[int], *, positive: bool, stacked: bool = False) -> jax.Array | Moment:
    """A moment of zeros, in the form that `coded` gives it.

    >>> start((64, 64), positive=True).scale.shape
    (64, 1)
    """
    at = block_of(shape, stacked=stacked)
    if at is None:
        return jnp.zeros(shape, jnp.float32)
    parts = list(shape)
    parts[at[0]] //= at[1]
    return Moment(jnp.zeros(shape, jnp.uint8), jnp.zeros(parts, jnp.float32), positive)


def _power(code: jax.Array) -> jax.Array:
    return jnp.exp2((code - np.float32(255)) * np.float32(OCTAVES / 255))


def _power_code(unit: jax.Array, noise: jax.Array) -> jax.Array:
    """uint8 codes of what is in (0, 1]: one of both neighbours, by chance."""
    log = jnp.log2(jnp.maximum(unit, np.float32(2.0**-OCTAVES)))
    low = jnp.clip(jnp.floor(log * np.float32(255 / OCTAVES)) + np.float32(255), 0, 254)
    below, above = _power(low), _power(low + 1)
    # Where between them it lies, so that the mean of what is chosen is what was given.
    part = (unit - below) / (above - below)
    up = part > noise
    return (low + up.astype(jnp.float32)).astype(jnp.uint8)


def chance(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Float32 in [0, 1), the same on every mesh: a hash of a number's place and of a seed.

    Cheap enough for every number in every step; for rounding, not for dropout.

    Args:
        shape: of what is wanted.
        seed: uint32.

    Source: Wellons 2018, the hash `lowbias32`, https://nullprogram.com/blog/2018/07/31/.

    >>> x = chance((1000,), jnp.uint32(1))
    >>> bool(x.min() >= 0), bool(x.max() < 1), round(float(x.mean()), 1)
    (True, True, 0.5)
    """
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = np.uint32(stride % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    x = place ^ (seed * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = x ^ (x >> np.uint32(16))
    return (x >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
