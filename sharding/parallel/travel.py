"""Arrays that travel in fewer bits than they are computed in."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax


def moved(move: Callable[[jax.Array], jax.Array], x: jax.Array, dtype: Any) -> jax.Array:
    """`move(x)`, rounded to `dtype` before it travels: for what would be rounded afterwards.

    Args:
        move: a collective that moves elements and computes nothing, of any dtype.
        x: floating.
        dtype: in which x travels; None for its own.

    Returns:
        As `move` does, in the dtype of x.

    >>> moved(lambda x: x[::-1], np.float32([1, 1 + 2**-10]), "bfloat16")
    Array([1., 1.], dtype=float32)
    """
    if dtype is None or np.dtype(dtype).itemsize >= x.dtype.itemsize:
        return move(x)
    low = lax.convert_element_type(x, dtype)

    def bits(low: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(move(lax.bitcast_convert_type(low, np.uint16)), dtype)

    if low.dtype.itemsize == 2:  # XLA's CPU collectives widen bfloat16; bits are as wide as bits
        there = lax.platform_dependent(low, cpu=bits, default=move)
    else:
        there = move(low)
    return lax.convert_element_type(there, x.dtype)
