"""A compressed array is a pytree that stands for an ordinary one.

`Int8` carries int8 values and float32 scales and claims the shape and dtype of the array it
replaced, so it fits wherever that array did: in a parameter tree, under `jit`, `scan`, `vmap` and
`device_put`. The mathematics on one array is here; `compress.int8` walks the trees and
`compress.rules` says what each JAX primitive does with it.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.extend.core import jaxpr_as_fun

LIMIT = 127
"""Largest magnitude of a value: −128 is left out, so that the range is symmetric."""

TINY = 1e-30
"""Smallest absolute maximum a scale is made from: keeps 127 / absmax finite, and zeros zero."""


class Int8(quax.ArrayValue):
    """An array as int8 values and one float32 scale per slice along `axis`.

    w[..., i, ...] ≈ values[..., i, ...] · scale[..., ...]   (i runs along `axis`)

    `axis` counts from the end, so it still points at the same axis when `scan` or `vmap` takes the
    leading one away. Int8 values come from `compress.quantize`; there is no arithmetic on them
    outside `compress.apply`.

    Attributes:
        values: int8, the shape of the original array.
        scale: float32, that shape without `axis`.
        axis: the axis that shares one scale, negative: −2 for a kernel [..., in, out] (one scale
            per output), −1 for a table [rows, features] (one scale per row).
        as_dtype: the floating dtype this array stands for.

    >>> w = Int8(jnp.ones((4, 2), jnp.int8), jnp.full(2, 0.5), axis=-2, as_dtype=np.dtype("f4"))
    >>> w.shape, w.dtype.name
    ((4, 2), 'float32')
    """

    values: jax.Array
    scale: jax.Array
    axis: int = field(metadata={"static": True})
    as_dtype: np.dtype = field(metadata={"static": True})

    def aval(self) -> Any:
        """What JAX sees: the type of the values, sharding included, with the original dtype."""
        return jax.typeof(self.values).update(dtype=self.as_dtype)

    def materialise(self) -> NoReturn:
        """Refuse: an `Int8` becomes floats only where `compress.dequantize` is written.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{describe(self)} would be turned into floats silently; "
            "call compress.dequantize on it before the function, or leave it out of the selection"
        )

    @staticmethod
    def default(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """Refuse every primitive without a rule in `compress.rules`.

        A primitive that only calls a program (it has a `call_jaxpr`, as those that `grad` of a
        checkpointed scan leaves behind) is interpreted primitive by primitive instead.

        Raises:
            NotImplementedError: it names the primitive, the array and what to do.
        """
        if "call_jaxpr" in params:
            return quax.quaxify(jaxpr_as_fun(params["call_jaxpr"]))(*values)
        leaf = next(v for v in values if isinstance(v, Int8))
        raise NotImplementedError(
            f"no rule for the primitive '{primitive}' on {describe(leaf)}; compressed arrays can "
            "be multiplied (dot_general), looked up (gather), transposed, sliced, reshaped and "
            "cast. Either leave this leaf uncompressed (select={'its/path': 'keep', ...}) or pass "
            "compress.dequantize(leaf) to the function"
        ) from None


def describe(array: Int8) -> str:
    """An `Int8` in an error message: its dtype, shape and scaled axis.

    >>> describe(int8(jnp.ones((4, 2)), -2))
    'Int8(float32[4, 2], axis=-2)'
    """
    return f"Int8({array.as_dtype}{list(array.values.shape)}, axis={array.axis})"


def absmax_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Symmetric int8 with one scale per slice along an axis.

    s = max |x| / 127,  q = round(x / s), halves to even

    No clipping: |x| ≤ max |x| bounds |q| by 127. A slice that holds an infinity or a NaN has such
    a scale, so it is not lost either.

    Args:
        x: floats, any shape.
        axis: the axis over which the maximum is taken.

    Returns:
        The int8 values, and the float32 scales with `axis` kept at size 1.

    >>> q, s = absmax_int8(jnp.array([[1.0, -0.5, 0.0]]), 1)
    >>> q, s * 127
    (Array([[127, -64,   0]], dtype=int8), Array([[1.]], dtype=float32))
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=TINY)
    q = lax.round(x * (LIMIT / absmax), lax.RoundingMethod.TO_NEAREST_EVEN)
    # By way of int32: XLA:CPU converts float32 to int8 with more instructions than in two steps.
    return q.astype(jnp.int32).astype(jnp.int8), absmax * np.float32(1 / LIMIT)


def int8(x: jax.Array, axis: int) -> Int8:
    """Compress one array.

    Args:
        x: floats of two axes or more.
        axis: the axis that shares one scale, negative; see `Int8`.

    Returns:
        The compressed array; its relative error is about 0.5 % for normally distributed weights.

    >>> int8(jnp.eye(3), -2).scale * 127
    Array([1., 1., 1.], dtype=float32)
    """
    values, scale = absmax_int8(x, axis)
    return Int8(values, jnp.squeeze(scale, axis), axis=axis, as_dtype=np.dtype(x.dtype))


def dense(array: Int8) -> jax.Array:
    """The floats an `Int8` stands for, in its own dtype.

    >>> dense(int8(jnp.eye(2), -2))
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    scale = jnp.expand_dims(array.scale, array.axis)
    return (array.values.astype(jnp.float32) * scale).astype(array.as_dtype)


def is_compressed(x: object) -> bool:
    """Whether a tree walk should stop at `x`: the `is_leaf` of every walk over parameters."""
    return isinstance(x, Int8)
