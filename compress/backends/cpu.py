"""CPUs: YNNPACK has int8 × int8 → int32 products, and nothing else that is narrow.

What it takes fast (jax 0.12): the contracted axis last in the activations, two rows at least. It
has no products of float8, which are computed in float32, where they are exact, nor convolutions of
integers, which become products of windows.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.backends import Conv, Dims


def int_dot(q: jax.Array, codes: jax.Array, dims: Dims) -> jax.Array:
    """int8 × int8 → int32; one row is made two, for a single one is three times slower than f32."""
    ((contract, contract_w), (batch, batch_w)) = dims
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.int32)
    free = [d for d in range(q.ndim) if d not in (*contract, *batch)]
    if math.prod(q.shape[d] for d in free) != 1:
        return dot(q, codes, dims)
    out = jax.eval_shape(lambda a, b: dot(a, b, dims), q, codes)
    row = lax.transpose(q, (*batch, *free, *contract))
    inner = [q.shape[d] for d in contract]
    row = row.reshape(*(q.shape[d] for d in batch), 1, *inner)
    two = jnp.concatenate([row, jnp.zeros_like(row)], axis=len(batch))
    lead = tuple(range(len(batch)))
    inner_axes = tuple(range(len(batch) + 1, two.ndim))
    y = dot(two, codes, ((inner_axes, contract_w), (lead, batch_w)))
    return lax.slice_in_dim(y, 0, 1, axis=len(batch)).reshape(out.shape)


def float8_dot(q: jax.Array, codes: jax.Array, dims: Dims) -> jax.Array:
    """float8 × float8 → float32, in float32."""
    return lax.dot_general(q.astype(jnp.float32), codes.astype(jnp.float32), dims)


def int_conv(q: jax.Array, codes: jax.Array, how: Conv) -> jax.Array:
    """A product of windows with the kernel; groups and dilated inputs in float32."""
    d = how.dimension_numbers
    plain = how.feature_group_count == how.batch_group_count == 1
    if not plain or any(n != 1 for n in how.lhs_dilation):
        y = lax.conv_general_dilated(
            q.astype(jnp.float32),
            codes.astype(jnp.float32),
            **how._asdict(),
            precision=lax.Precision.HIGHEST,
        )
        return jnp.round(y)  # sums of whole numbers
    x = lax.transpose(q, (d.lhs_spec[0], *d.lhs_spec[2:], d.lhs_spec[1]))
    w = lax.transpose(codes, (*d.rhs_spec[2:], d.rhs_spec[1], d.rhs_spec[0]))
    x = lax.pad(x, np.int8(0), [(0, 0, 0), *[(*p, 0) for p in how.padding], (0, 0, 0)])
    window = w.shape[:-2]
    spans = [
        [slice(i * far, size - (n - 1 - i) * far, step) for i in range(n)]
        for n, far, step, size in zip(
            window, how.rhs_dilation, how.window_strides, x.shape[1:-1], strict=True
        )
    ]
    seen = jnp.concatenate([x[:, *place] for place in itertools.product(*spans)], -1)
    rows = seen.reshape(-1, seen.shape[-1])
    y = int_dot(rows, w.reshape(-1, w.shape[-1]), (((1,), (0,)), ((), ())))
    y = y.reshape(*seen.shape[:-1], -1)
    out = (d.out_spec[0], *d.out_spec[2:], d.out_spec[1])
    return lax.transpose(y, np.argsort(out)).astype(jnp.float32)
