"""TPUs: the matrix unit takes int8, and from v5p on float8, in products and convolutions."""

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
    """int8 × int8 → int32 → float32."""
    y = lax.conv_general_dilated(q, codes, **how._asdict(), preferred_element_type=jnp.int32)
    return y.astype(jnp.float32)
