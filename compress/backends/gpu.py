"""GPUs: cuBLASLt has int8 × int8 → int32 and float8 products; cuDNN convolves floats.

Conversions of int4 to bfloat16 are fused into the product that reads them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from compress.backends import Conv, Dims
from compress.formats import FORMATS, unpack


def int_dot(q: jax.Array, codes: jax.Array, dims: Dims) -> jax.Array:
    """int8 × int8 → int32."""
    return lax.dot_general(q, codes, dims, preferred_element_type=jnp.int32)


def float8_dot(q: jax.Array, codes: jax.Array, dims: Dims) -> jax.Array:
    """float8 × float8 → float32."""
    return lax.dot_general(q, codes, dims, preferred_element_type=jnp.float32)


def unpack_int4(packed: jax.Array, axis: int) -> jax.Array:
    """Shifts, which fuse."""
    return unpack(packed, axis, FORMATS["int4"])


def int_conv(q: jax.Array, codes: jax.Array, how: Conv) -> jax.Array:
    """In bfloat16, which int8 fits, summed in float32: exact up to 1,040 products of a window."""
    return lax.conv_general_dilated(
        q.astype(jnp.bfloat16),
        codes.astype(jnp.bfloat16),
        **how._asdict(),
        preferred_element_type=jnp.float32,
    )
