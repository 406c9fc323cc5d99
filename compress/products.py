"""Products with quantised arrays: dots in any orientation, and convolutions.

    y = (x · codes) · scale                              activations stay floats
    y = s · (round(x / s) · codes) · scale               activations are rounded on the way

s is found anew for every row (for every image of a convolution), or in calibration. A product takes
the rounded path if its sum has one scale: if the codes' scales do not change along what is summed
over, or change along nothing else and can move to the activations. Otherwise it is computed with
the floats that the codes stand for.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.arrays import Quantized, describe
from compress.backends import Conv, Dims, dispatch
from compress.blocks import spread
from compress.formats import FLOAT, FORMATS, bounds, decode, encode, halves
from compress.hadamard import rotate
from compress.scheme import TINY

MOST_TERMS = 2**31 // 127**2
"""Products of int8 that an int32 can sum; longer sums are computed with floats."""


def rounded(
    x: jax.Array, scale: jax.Array | None, axes: Sequence[int], kind: str
) -> tuple[jax.Array, jax.Array]:
    """Activations as codes, and the scale: given, or the largest magnitude over axes.

    Args:
        x: float32.
        scale: float32, to broadcast to x, or None.
        axes: what a dynamic scale is shared over.
        kind: "int8" or "e4m3".

    Returns:
        Codes, and float32 scales with the axes kept at size 1. A dynamic row of zeros has zeros;
        one that holds NaN or infinity has such a scale, so it is not lost.

    >>> rounded(jnp.array([[1.0, -0.5, 0.0]]), None, (1,), "int8")[0]
    Array([[127, -64,   0]], dtype=int8)
    """
    low, high = bounds(FORMATS[kind])
    if scale is None:
        end = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True, initial=TINY)
        # No clipping: |x| ≤ end bounds the code.
        q, scale = x * (np.float32(high) / end), end * np.float32(1 / high)
    else:
        q = jnp.clip(x * (1 / scale), low, high)
    if kind != "int8":
        return q.astype(FORMATS[kind].storage), scale
    q = lax.round(q, lax.RoundingMethod.TO_NEAREST_EVEN)
    # By way of int32: XLA:CPU converts float32 to int8 at once with more instructions.
    return q.astype(jnp.int32).astype(jnp.int8), scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def rounded_dot(
    x: jax.Array, codes: jax.Array, scale: jax.Array | None, dims: Dims, kind: str
) -> tuple[jax.Array, jax.Array]:
    """`lax.dot_general(x, codes)` with x rounded on the way, and the row sums of rounded x.

    s_m = max_k |x_mk| / 127,   y_mn = s_m · Σ_k round(x_mk / s_m) · codes_kn

    Sums of int8 are exact up to `MOST_TERMS`. The derivative is that of the product itself:
    rounding counts as the identity (straight-through), clipping as what it is. Codes have none:
    that of float8, which JAX takes for floats, is 0.

    Args:
        x: float32.
        codes: int8, or float8.
        scale: a static scale, to broadcast to x, or None.
        dims: dimension numbers of `lax.dot_general`.
        kind: "int8" or "e4m3".

    Returns:
        float32 [batch, free of x, free of codes], and [batch, free of x, 1 …].

    Source: dynamic quantisation as in LLM.int8(), https://arxiv.org/abs/2208.07339.

    >>> x = jnp.array([[1.0, -2.0]])
    >>> rounded_dot(x, jnp.array([[1], [1]], jnp.int8), None, (((1,), (0,)), ((), ())), "int8")[0]
    Array([[-0.992126]], dtype=float32)
    """
    ((contract, _), (batch, batch_w)) = dims
    q, scale = rounded(x, scale, contract, kind)
    trailing = codes.ndim - len(batch_w) - len(contract)
    name = "int_dot" if kind == "int8" else "float8_dot"
    y = dispatch(name, q, codes, dims=dims).astype(jnp.float32)
    if scale.ndim:
        scale = jnp.broadcast_to(scale, [1 if d in contract else n for d, n in enumerate(x.shape)])
        scale = _rows(scale, contract, batch, trailing)
    total = jnp.sum(q.astype(jnp.float32), axis=tuple(contract), keepdims=True)
    return y * scale, _rows(total, contract, batch, trailing) * scale


@rounded_dot.defjvp
def _rounded_dot_jvp(dims: Dims, kind: str, primals: tuple, tangents: tuple) -> tuple:
    x, codes, scale = primals
    dx = tangents[0]
    if scale is not None:
        dx = jnp.where(jnp.abs(x) <= scale * np.float32(bounds(FORMATS[kind])[1]), dx, 0)
    ((contract, _), (batch, batch_w)) = dims
    trailing = codes.ndim - len(batch_w) - len(contract)
    total = jnp.sum(dx, axis=tuple(contract), keepdims=True)
    moved = lax.dot_general(dx, codes.astype(jnp.float32), dims)
    return rounded_dot(x, codes, scale, dims, kind), (
        moved,
        _rows(total, contract, batch, trailing),
    )


def _rows(part: jax.Array, contract: Sequence[int], batch: Sequence[int], trailing: int):
    """A part of x (contracted axes of size 1) with the axes of the product."""
    free = [d for d in range(part.ndim) if d not in (*contract, *batch)]
    shape = [part.shape[d] for d in (*batch, *free)]
    return lax.transpose(part, (*batch, *free, *contract)).reshape(*shape, *[1] * trailing)


def _columns(part: jax.Array, contract: Sequence[int], batch: Sequence[int], leading: int):
    """A part of w (contracted axes of size 1) with the axes of the product."""
    free = [d for d in range(part.ndim) if d not in (*contract, *batch)]
    shape = [part.shape[d] for d in (*batch, *free)]
    shape[len(batch) : len(batch)] = [1] * leading
    return lax.transpose(part, (*batch, *free, *contract)).reshape(shape)


def _along_x(part: jax.Array, dims: Dims, ndim: int) -> jax.Array:
    """A part of w (free axes of size 1) with the axes of x."""
    ((contract, contract_w), (batch, batch_w)) = dims
    where = dict(zip((*contract, *batch), (*contract_w, *batch_w), strict=True))
    mine = [where[d] for d in range(ndim) if d in where]
    rest = [d for d in range(part.ndim) if d not in mine]
    shape = [part.shape[where[d]] if d in where else 1 for d in range(ndim)]
    return lax.transpose(part, (*mine, *rest)).reshape(shape)


def _shared(part: jax.Array | None, axes: Sequence[int]) -> bool:
    """Whether a part has one entry along each of the axes."""
    return part is None or all(part.shape[d] == 1 for d in axes)


def dot(
    x: jax.Array, w: Quantized, dims: Dims, *, dtype: Any = None, precision: Any = None
) -> jax.Array:
    """`lax.dot_general(x, w)`.

    Args:
        x: floats.
        w: of any orientation.
        dims: dimension numbers.
        dtype: of the result; None for what x and w promote to.
        precision: of products of floats.

    Returns:
        [batch, free of x, free of w].
    """
    ((contract, contract_w), (batch, batch_w)) = dims
    dtype = dtype or jnp.result_type(x.dtype, w.as_dtype)
    free_w = [d for d in range(w.ndim) if d not in (*contract_w, *batch_w)]
    leading = x.ndim - len(contract) - len(batch)
    wide = functools.partial(
        lax.dot_general,
        dimension_numbers=dims,
        precision=precision,
        preferred_element_type=np.promote_types(x.dtype, np.float32),
    )
    turned = None
    if w.hadamard is not None:
        axis = w.ndim + w.hadamard[0]
        turned = contract[contract_w.index(axis)] if axis in contract_w else None
    apart = w.hadamard is not None and turned is None
    if apart or not _shared(w.input_scale, free_w):  # not the axis it was prepared for
        return wide(x, w.dense().astype(x.dtype)).astype(dtype)
    if w.input_scale is not None:
        x = (x * _along_x(w.input_scale, dims, x.ndim)).astype(x.dtype)
    if w.hadamard is not None:
        assert turned is not None
        x = rotate(x, turned, w.hadamard[1])

    if w.pack is not None and w.ndim + w.pack in contract_w and w.activations == FLOAT:
        return _dot_of_halves(x, w, dims, dtype, precision)
    scale = w.multiplier()
    on_columns = _shared(scale, contract_w) and _shared(w.zero, contract_w)
    on_rows = w.zero is None and scale is not None and _shared(scale, free_w)
    on_rows &= scale is not None and all(scale.shape[d] in (1, w.shape[d]) for d in contract_w)
    fits = math.prod(x.shape[d] for d in contract) <= MOST_TERMS
    if scale is not None and w.activations != FLOAT and fits and (on_columns or on_rows):
        x = x.astype(jnp.float32)
        if not on_columns:
            x = x * _along_x(scale, dims, x.ndim)
        # A static scale was found for activations without the scales that move to them.
        static = w.act_scale if on_columns else None
        static = None if static is None else _along_x(static, dims, x.ndim)
        y, total = rounded_dot(x, w.codes(), static, dims, w.activations)
        if w.zero is not None:
            y = y - total * _columns(_full(w.zero, w, contract_w), contract_w, batch_w, leading)
        if on_columns:
            y = y * _columns(_full(scale, w, contract_w), contract_w, batch_w, leading)
        return y.astype(dtype)
    if scale is not None and on_columns and w.zero is None:
        y = wide(x, _as_floats(w, x.dtype))
        return (y * _columns(_full(scale, w, contract_w), contract_w, batch_w, leading)).astype(
            dtype
        )
    return wide(x, w.prepared().astype(x.dtype)).astype(dtype)


def _dot_of_halves(x: jax.Array, w: Quantized, dims: Dims, dtype: Any, precision: Any) -> jax.Array:
    """x·w = x_even·w_even + x_odd·w_odd along the packed axis of w.

    Codes of half a byte become floats where they lie, inside of what multiplies them; to bring
    both halves in order first, compilers write the whole array down, in floats at that.
    """
    ((contract, contract_w), _) = dims
    axis = contract[contract_w.index(w.ndim + (w.pack or 0))]
    format = FORMATS[w.format]
    # By way of pairs: the derivative of a slice with strides takes the TPU's compiler minutes.
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    total = None
    for start, codes in enumerate(halves(w.values, format)):
        # Groups are of even size: over half of the elements they are as many.
        half = dataclasses.replace(
            w, values=codes, pack=None, input_scale=None, hadamard=None, act_scale=None
        )
        part = lax.index_in_dim(pairs, start, axis + 1, keepdims=False)
        y = dot(part, half, dims, dtype=np.promote_types(x.dtype, np.float32), precision=precision)
        total = y if total is None else total + y
    assert total is not None
    return total.astype(dtype)


def _full(part: jax.Array, w: Quantized, contract: Sequence[int]) -> jax.Array:
    """A part whose groups, if any are left outside of the sum, are spread."""
    return spread(part, [1 if d in contract else n for d, n in enumerate(w.shape)])


def _as_floats(w: Quantized, dtype: Any) -> jax.Array:
    """The codes' own values, without scales, as products of floats take them."""
    return decode(w.codes(), FORMATS[w.format]).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def rounded_conv(
    x: jax.Array, codes: jax.Array, scale: jax.Array | None, how: Conv, kind: str
) -> jax.Array:
    """`lax.conv_general_dilated(x, codes)` with x rounded on the way, one scale for each image.

    Args:
        x: float32.
        codes: int8.
        scale: a static scale, to broadcast to x, or None.
        how: the rest of the convolution.
        kind: "int8".

    Returns:
        float32. The derivative is that of the convolution itself.
    """
    images = how.dimension_numbers.lhs_spec[0]
    axes = [d for d in range(x.ndim) if d != images]
    q, scale = rounded(x, scale, axes, kind)
    y = dispatch("int_conv", q, codes, how=how)
    per_image = jnp.broadcast_to(scale.reshape(-1), (x.shape[images],))
    where = how.dimension_numbers.out_spec[0]
    return y * lax.expand_dims(per_image, [d for d in range(y.ndim) if d != where])


@rounded_conv.defjvp
def _rounded_conv_jvp(how: Conv, kind: str, primals: tuple, tangents: tuple) -> tuple:
    x, codes, scale = primals
    dx = tangents[0]
    if scale is not None:
        dx = jnp.where(jnp.abs(x) <= scale * np.float32(bounds(FORMATS[kind])[1]), dx, 0)
    moved = lax.conv_general_dilated(dx, codes.astype(jnp.float32), **how._asdict())
    return rounded_conv(x, codes, scale, how, kind), moved


def convolve(
    x: jax.Array, w: Quantized, how: Conv, *, dtype: Any = None, precision: Any = None
) -> jax.Array:
    """`lax.conv_general_dilated(x, w)` with a quantised kernel.

    Integers are convolved where the kernel has a scale for each output, no zero points and no
    groups of images; everything else is computed with the floats that it stands for.
    """
    d = how.dimension_numbers
    dtype = dtype or jnp.result_type(x.dtype, w.as_dtype)
    wide = functools.partial(
        lax.conv_general_dilated,
        **how._asdict(),
        precision=precision,
        preferred_element_type=np.promote_types(x.dtype, np.float32),
    )
    out, size_in, *spatial = d.rhs_spec
    alone = how.feature_group_count == how.batch_group_count == 1
    turned = w.hadamard is None or w.ndim + w.hadamard[0] == size_in
    if not (turned and alone and _shared(w.input_scale, (out, *spatial))) and (
        w.hadamard is not None or w.input_scale is not None
    ):
        return wide(x, w.dense().astype(x.dtype)).astype(dtype)
    if w.input_scale is not None:
        shape = [-1 if axis == d.lhs_spec[1] else 1 for axis in range(x.ndim)]
        x = (x * w.input_scale.reshape(shape)).astype(x.dtype)
    if w.hadamard is not None:
        x = rotate(x, d.lhs_spec[1], w.hadamard[1])
    scale = w.multiplier()
    if scale is None or w.zero is not None or not _shared(scale, (size_in, *spatial)):
        return wide(x, w.prepared().astype(x.dtype)).astype(dtype)
    columns = _full(scale, w, (size_in, *spatial))
    columns = jnp.broadcast_to(columns.reshape(-1), (w.shape[out],))
    columns = lax.expand_dims(columns, [a for a in range(x.ndim) if a != d.out_spec[1]])
    one = w.act_scale is None or w.act_scale.size == 1
    if w.activations == "int8" and how.batch_group_count == 1 and one:
        static = None if w.act_scale is None else w.act_scale.reshape(())
        y = rounded_conv(x.astype(jnp.float32), w.codes(), static, how, w.activations)
    else:
        y = wide(x, _as_floats(w, x.dtype))
    return (y * columns).astype(dtype)


def update(w: Quantized, new: jax.Array, starts: Sequence[Any]) -> Quantized:
    """`lax.dynamic_update_slice(w, new, starts)`: floats are rounded as the array's own were.

    Raises:
        NotImplementedError: a scale is shared with elements that stay, or the format is no int8
            or float8 with symmetric scales.
    """
    whole = w.format in ("int8", "e4m3", "e5m2") and w.zero is None and w.scale is not None
    axes = (
        () if w.scale is None else [d for d, s in enumerate(w.scale.shape) if s == 1 < w.shape[d]]
    )
    if (
        not whole
        or w.hadamard
        or w.input_scale is not None
        or w.scale is None
        or any(s not in (1, n) for s, n in zip(w.scale.shape, w.shape, strict=True))
        or any(new.shape[d] != w.shape[d] for d in axes)
    ):
        raise NotImplementedError(
            f"an update of {describe(w)} by {list(new.shape)}: expected whole blocks of one scale"
        )
    high = bounds(FORMATS[w.format])[1]
    end = jnp.max(jnp.abs(new.astype(jnp.float32)), axis=tuple(axes), keepdims=True, initial=TINY)
    codes = encode(new.astype(jnp.float32) * (np.float32(high) / end), FORMATS[w.format])
    scale = end * np.float32(1 / high)
    at = [0 if d in axes else s for d, s in enumerate(starts)]
    zero = jnp.zeros((), jnp.asarray(starts[0]).dtype)
    at = [zero if isinstance(s, int) else s for s in at]
    return dataclasses.replace(
        w,
        values=lax.dynamic_update_slice(w.values, codes, starts),
        scale=lax.dynamic_update_slice(w.scale, scale, at),
    )
