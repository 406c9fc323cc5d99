"""GPUs: cuBLASLt has int8 × int8 → int32 and float8 products; cuDNN convolves floats."""

import jax
import jax.numpy as jnp
from jax import lax

from compress.backends import Conv, Dims


def int_dot(q: jax.Array, codes: jax.Array, dims: Dims) -> jax.Array:
    """int8 × int8 → int32."""
    return lax.dot_general(q, codes, dims, preferred_element_type=jnp.int32)


def float8_dot(q: jax.Array, codes: jax.Array, dims: Dims) -> jax.Array:
    """float8 × float8 → float32."""
    return lax.dot_general(q, codes, dims, preferred_element_type=jnp.float32)


def int_conv(q: jax.Array, codes: jax.Array, how: Conv) -> jax.Array:
    """In float32, whose passes of TF32 hold int8 exactly: sums are exact up to 1,040 products.

    XLA makes float32 of bfloat16 operands, too, where sums are to be float32 (jax 0.12).
    """
    return lax.conv_general_dilated(
        q.astype(jnp.float32), codes.astype(jnp.float32), **how._asdict()
    )
