"""What each JAX primitive does with an `Int8`: the mathematics of compressed inference.

`dot_general` multiplies in int8, `gather` looks rows up as floats, and the structural primitives
(transpose, slice, reshape, concatenate, cast) move values and scales together and stay compressed.
Whatever is not here is refused by `Int8.default`. Importing this file registers the rules with
quax, once for the process; `compress.interpreter` does so.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.extend.core.primitives import sharding_constraint_p, stop_gradient_p
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from compress.arrays import Int8, absmax_int8, dense, describe

Dims = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def int8_dot(x: jax.Array, values: jax.Array, dims: Dims) -> jax.Array:
    """`lax.dot_general(x, values)` with the floats on the left quantised per row to int8.

    s_m = max_k |x_mk| / 127,   y_mn = s_m · Σ_k round(x_mk / s_m) · values_kn

    The sum is exact in int32 up to K = 2¹⁷ terms (127² · 2¹⁷ < 2³¹). Its derivative with respect
    to `x` is that of the product itself: rounding counts as the identity (straight-through).

    Args:
        x: float32.
        values: int8.
        dims: dimension numbers of `lax.dot_general`, with one contracted axis.

    Returns:
        float32, the shape of `lax.dot_general(x, values, dims)`.

    Source: dynamic quantisation as in LLM.int8(), https://arxiv.org/abs/2208.07339.

    >>> x = jnp.array([[1.0, -2.0]])
    >>> int8_dot(x, jnp.array([[1], [1]], jnp.int8), (((1,), (0,)), ((), ())))
    Array([[-0.992126]], dtype=float32)
    """
    ((contract, _), (batch, batch_w)) = dims
    q, scale = absmax_int8(x, contract[0])
    free_w = values.ndim - 1 - len(batch_w)
    scale = _arrange(scale, contract, batch, trailing=free_w)
    return _int32_dot(q, values, dims).astype(jnp.float32) * scale


@int8_dot.defjvp
def _int8_dot_jvp(dims: Dims, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, values = primals
    dx, _ = tangents
    return int8_dot(x, values, dims), lax.dot_general(dx, values.astype(jnp.float32), dims)


def _int32_dot(q: jax.Array, values: jax.Array, dims: Dims) -> jax.Array:
    """int8 × int8 → int32."""
    ((contract, contract_w), (batch, batch_w)) = dims
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.int32)
    free = [d for d in range(q.ndim) if d not in (*contract, *batch)]
    if math.prod(q.shape[d] for d in free) != 1:
        return dot(q, values, dims)
    # XLA:CPU has no fast int8 product for a single row (three times slower than float32); two
    # rows have one.
    out = jax.eval_shape(lambda a, b: dot(a, b, dims), q, values)
    row = lax.transpose(q, (*batch, *free, *contract))
    row = row.reshape(*(q.shape[d] for d in batch), 1, q.shape[contract[0]])
    two = jnp.concatenate([row, jnp.zeros_like(row)], axis=-2)
    lead = tuple(range(len(batch)))
    y = dot(two, values, (((two.ndim - 1,), contract_w), (lead, batch_w)))
    return lax.slice_in_dim(y, 0, 1, axis=len(batch)).reshape(out.shape)


def _arrange(
    scale: jax.Array, contract: Sequence[int], batch: Sequence[int], *, leading=0, trailing=0
) -> jax.Array:
    """Bring an operand's scales (contracted axis of size 1) to the axes of the product.

    The axes of the product are (batch, free axes of the left, free axes of the right); the other
    operand's are of size 1 here: `leading` of them before this one's, `trailing` after.
    """
    free = [d for d in range(scale.ndim) if d not in (*contract, *batch)]
    shape = [scale.shape[d] for d in (*batch, *free)]
    shape[len(batch) : len(batch)] = [1] * leading
    return lax.transpose(scale, (*batch, *free, *contract)).reshape(*shape, *[1] * trailing)


@quax.register(lax.dot_general_p)
def _dot(
    x: ArrayLike,
    w: Int8,
    *,
    dimension_numbers: Any,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    **_: Any,
) -> jax.Array:
    x = jnp.asarray(x)
    contract, contract_w, batch, batch_w = (tuple(d) for pair in dimension_numbers for d in pair)
    dims = ((contract, contract_w), (batch, batch_w))
    shared = w.ndim + w.axis
    if not jnp.issubdtype(x.dtype, jnp.floating) or out_sharding is not None:
        raise NotImplementedError(
            f"dot_general of {describe(w)}: the other operand must be floating and out_sharding "
            f"unset; got {x.dtype} and out_sharding={out_sharding}"
        )
    dtype = preferred_element_type or jnp.result_type(x.dtype, w.as_dtype)
    x = x.astype(jnp.float32)
    if contract_w == (shared,):
        y = int8_dot(x, w.values, dims)
        free = x.ndim - 1 - len(batch)
        scale = jnp.expand_dims(w.scale, w.axis)
        return (y * _arrange(scale, contract_w, batch_w, leading=free)).astype(dtype)
    if len(contract_w) == 1 and w.ndim == 2 + len(batch_w) and shared not in batch_w:
        # The scales run along the contracted axis: they belong to the other operand.
        scale = lax.transpose(jnp.expand_dims(w.scale, w.axis), (*batch_w, *contract_w, shared))
        scale = lax.squeeze(scale, [scale.ndim - 1])
        scale = lax.expand_dims(
            lax.transpose(scale, np.argsort((*batch, *contract))),
            [d for d in range(x.ndim) if d not in (*batch, *contract)],
        )
        return int8_dot(x * scale, w.values, dims).astype(dtype)
    raise NotImplementedError(
        f"dot_general of {describe(w)} over its axes {contract_w} with batch axes {batch_w}: "
        "the product must contract exactly one axis, and the scales must lie along the others or "
        "along that one; leave this leaf out of the selection ('keep')"
    )


@quax.register(lax.dot_general_p)
def _dot_swapped(w: Int8, x: ArrayLike, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    (contract_w, contract), (batch_w, batch) = dimension_numbers
    swapped = ((contract, contract_w), (batch, batch_w))
    y = _dot(x, w, dimension_numbers=swapped, **params)
    lead, free_w = len(batch_w), w.ndim - len(batch_w) - len(contract_w)
    order = (*range(lead), *range(y.ndim - free_w, y.ndim), *range(lead, y.ndim - free_w))
    return lax.transpose(y, order)


@quax.register(lax.gather_p)
def _gather(
    w: Int8,
    indices: ArrayLike,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    mode: Any,
    fill_value: Any,
    **params: Any,
) -> jax.Array:
    """Look slices up and return floats: the values' gather times the same gather of the scales."""
    d, shared = dimension_numbers, w.ndim + w.axis
    if shared in d.start_index_map and mode != lax.GatherScatterMode.FILL_OR_DROP:
        # A whole axis can only start at 0: `vmap` of a dynamic slice asks for it all the same.
        column = d.start_index_map.index(shared)
        indices = jnp.delete(jnp.asarray(indices), column, axis=-1, assume_unique_indices=True)
        d = d._replace(start_index_map=_drop(d.start_index_map, column))
    kept = [
        i for i in range(w.ndim) if i not in (*d.collapsed_slice_dims, *d.operand_batching_dims)
    ]
    if shared not in kept or slice_sizes[shared] != w.shape[shared] or shared in d.start_index_map:
        raise NotImplementedError(
            f"gather of {describe(w)} indexes the axis its scales share; quantise it as a 'table' "
            "(one scale per row) or leave it out of the selection ('keep')"
        )
    where = d.offset_dims[kept.index(shared)]
    gather = functools.partial(lax.gather_p.bind, mode=mode, **params)
    # Out of bounds the values are 1 and the scale is the fill value, whatever it is.
    values = gather(
        w.values, indices, dimension_numbers=d, slice_sizes=tuple(slice_sizes), fill_value=1
    )
    scale = gather(
        w.scale,
        indices,
        dimension_numbers=d._replace(
            offset_dims=_without(d.offset_dims, where),
            collapsed_slice_dims=_without(d.collapsed_slice_dims, shared),
            start_index_map=_without(d.start_index_map, shared),
            operand_batching_dims=_without(d.operand_batching_dims, shared),
        ),
        slice_sizes=_drop(slice_sizes, shared),
        fill_value=np.nan if fill_value is None else fill_value,
    )
    return dense(Int8(values, scale, axis=where - values.ndim, as_dtype=w.as_dtype))


@quax.register(lax.convert_element_type_p)
def _cast(w: Int8, *, new_dtype: Any, **_: Any) -> Int8:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise NotImplementedError(f"{describe(w)} can be cast to a floating dtype, not {new_dtype}")
    return Int8(w.values, w.scale, axis=w.axis, as_dtype=np.dtype(new_dtype))


@quax.register(stop_gradient_p)
def _stop_gradient(w: Int8) -> Int8:
    return w


@quax.register(sharding_constraint_p)
def _constrain(w: Int8, *, sharding: Any, **_: Any) -> Int8:
    """Scales lie with their values: cut alike, but for the axis that shares one."""
    if not isinstance(sharding, NamedSharding):
        raise NotImplementedError(
            f"sharding constraint of {describe(w)}: expected a NamedSharding, got {sharding}"
        )
    shared = w.ndim + w.axis
    entries = (*sharding.spec, *[None] * (w.ndim - len(sharding.spec)))
    scales = NamedSharding(sharding.mesh, PartitionSpec(*_drop(entries, shared)))
    values = lax.with_sharding_constraint(w.values, sharding)
    return _rebuild(w, values, lax.with_sharding_constraint(w.scale, scales), shared)


@quax.register(lax.transpose_p)
def _transpose(w: Int8, *, permutation: Sequence[int]) -> Int8:
    shared = w.ndim + w.axis
    values = lax.transpose(w.values, permutation)
    scale = lax.transpose(w.scale, _without(permutation, shared))
    return _rebuild(w, values, scale, tuple(permutation).index(shared))


@quax.register(lax.squeeze_p)
def _squeeze(w: Int8, *, dimensions: Sequence[int]) -> Int8:
    shape = [n for i, n in enumerate(w.shape) if i not in dimensions]
    return _reshape(w, new_sizes=shape)


@quax.register(lax.reshape_p)
def _reshape(w: Int8, *, new_sizes: Sequence[int], dimensions: Any = None, **_: Any) -> Int8:
    before, size = math.prod(w.shape[: w.axis]), w.shape[w.axis]
    for axis, n in enumerate(new_sizes):
        if dimensions is None and n == size and math.prod(new_sizes[:axis]) == before:
            scale = lax.reshape(w.scale, _drop(new_sizes, axis))
            return _rebuild(w, lax.reshape(w.values, tuple(new_sizes)), scale, axis)
    raise NotImplementedError(
        f"reshape of {describe(w)} to {list(new_sizes)} merges or splits the axis its scales "
        "share; leave this leaf out of the selection ('keep')"
    )


@quax.register(lax.slice_p)
def _slice(w: Int8, *, start_indices: Any, limit_indices: Any, strides: Any) -> Int8:
    shared = w.ndim + w.axis
    scale = lax.slice(
        w.scale,
        _drop(start_indices, shared),
        _drop(limit_indices, shared),
        None if strides is None else _drop(strides, shared),
    )
    values = lax.slice(w.values, start_indices, limit_indices, strides)
    return _rebuild(w, values, scale, shared)


@quax.register(lax.dynamic_slice_p)
def _dynamic_slice(w: Int8, *starts: ArrayLike, slice_sizes: Sequence[int]) -> Int8:
    shared = w.ndim + w.axis
    values = lax.dynamic_slice(w.values, starts, slice_sizes)
    scale = lax.dynamic_slice(w.scale, _drop(starts, shared), _drop(slice_sizes, shared))
    return _rebuild(w, values, scale, shared)


@quax.register(lax.concatenate_p)
def _concatenate(first: Int8, *others: Int8, dimension: int) -> Int8:
    """Along an axis that has scales of its own, such as that of layers."""
    ws, shared = (first, *others), len(first.values.shape) + first.axis
    if dimension == shared or len({(w.axis, w.as_dtype) for w in ws}) > 1:
        raise NotImplementedError(
            f"concatenation of {', '.join(map(describe, ws))} along axis {dimension}: expected "
            "arrays of one dtype and one scaled axis, joined along another"
        )
    values = lax.concatenate([w.values for w in ws], dimension)
    scale = lax.concatenate([w.scale for w in ws], dimension - (dimension > shared))
    return _rebuild(first, values, scale, shared)


def _rebuild(w: Int8, values: jax.Array, scale: jax.Array, axis: int) -> Int8:
    return Int8(values, scale, axis=axis - values.ndim, as_dtype=w.as_dtype)


def _drop(items: Sequence[Any], i: int) -> tuple[Any, ...]:
    return (*items[:i], *items[i + 1 :])


def _without(axes: Sequence[int], gone: int) -> tuple[int, ...]:
    """The numbers of the axes once the axis `gone` is no more."""
    return tuple(i - (i > gone) for i in axes if i != gone)
