"""Products with orthonormal Hadamard matrices: they spread what is large over its neighbours.

    H₁ = [1],   H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]] / √2

H is symmetric and its own inverse, so that (x·H)·(H·w) = x·w for any x and w, while outliers of
single channels, which cost all others their precision, are shared out (QuaRot,
https://arxiv.org/abs/2404.00456). A size that is no power of two is cut into blocks that are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def matrix(size: int) -> np.ndarray:
    """The orthonormal Hadamard matrix of a power of two, float32.

    >>> matrix(4)[1] * 2
    array([ 1., -1.,  1., -1.], dtype=float32)
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of {size} rows: expected a power of two")
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return (h / np.sqrt(size)).astype(np.float32)


def largest_block(size: int, at_most: int = 128) -> int:
    """The largest power of two that divides a size, or what it may be at most.

    >>> largest_block(384), largest_block(96), largest_block(7)
    (128, 32, 1)
    """
    return min(size & -size, at_most)


def rotate(x: jax.Array, axis: int, block: int) -> jax.Array:
    """Multiply each block along an axis by the Hadamard matrix of its size.

    Args:
        x: floats; the size of the axis is a multiple of the block.
        axis: any.
        block: a power of two.

    >>> rotate(rotate(jnp.arange(4.0), 0, 4), 0, 4).round(5)
    Array([0., 1., 2., 3.], dtype=float32)
    """
    h = jnp.asarray(matrix(block), x.dtype)
    moved = jnp.moveaxis(x, axis, -1)
    parts = moved.reshape(*moved.shape[:-1], -1, block)
    turned = jnp.matmul(parts, h, precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(turned.reshape(moved.shape), -1, axis)
