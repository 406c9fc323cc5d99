"""What each JAX primitive does with a `Quantized` array.

Products and convolutions are those of `compress.products`, `gather` looks rows up as floats, and
the structural primitives (transpose, slice, reshape, concatenate, cast) do to every part what they
do to the values and stay compressed. Whatever is not here is refused by `Compressed.default`.
Importing this file registers the rules with quax, once for the process.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.extend.core.primitives import sharding_constraint_p, stop_gradient_p
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from compress import products
from compress.arrays import Compressed, Quantized, describe, place_part
from compress.backends import Conv, Dims
from compress.blocks import regroup


@quax.register(lax.dot_general_p)
def _dot(
    x: ArrayLike,
    w: Quantized,
    *,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    **_: Any,
) -> jax.Array:
    x, dims = operands(x, w, dimension_numbers, out_sharding)
    return products.dot(x, w, dims, dtype=preferred_element_type, precision=precision)


@quax.register(lax.dot_general_p)
def _dot_swapped(
    w: Quantized, x: ArrayLike, *, dimension_numbers: Any, precision: Any = None, **params: Any
) -> jax.Array:
    return swapped(_dot, w, x, dimension_numbers, precision, **params)


def operands(
    x: ArrayLike, w: Compressed, numbers: Any, out_sharding: Any
) -> tuple[jax.Array, Dims]:
    """The activations of a dot, and its dimension numbers as tuples.

    Raises:
        NotImplementedError: no compressed array has such a dot.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or out_sharding is not None:
        raise NotImplementedError(
            f"dot_general of {describe(w)}: the other operand must be floating and out_sharding "
            f"unset; got {x.dtype} and out_sharding={out_sharding}"
        )
    (contract, contract_w), (batch, batch_w) = ((tuple(a), tuple(b)) for a, b in numbers)
    return x, ((contract, contract_w), (batch, batch_w))


def swapped(
    dot: Callable[..., jax.Array], w: Any, x: Any, dims: Any, precision: Any, **params: Any
) -> jax.Array:
    """A dot whose compressed operand comes first, by one whose second operand it is."""
    (contract_w, contract), (batch_w, batch) = dims
    if isinstance(precision, tuple):
        precision = precision[::-1]
    turned = ((contract, contract_w), (batch, batch_w))
    y = dot(x, w, dimension_numbers=turned, precision=precision, **params)
    lead, free_w = len(batch_w), w.ndim - len(batch_w) - len(contract_w)
    order = (*range(lead), *range(y.ndim - free_w, y.ndim), *range(lead, y.ndim - free_w))
    return lax.transpose(y, order)


@quax.register(lax.dot_general_p)
def _dot_both(a: Quantized, b: Quantized, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    """The smaller becomes floats, as an activation is."""
    if a.size <= b.size:
        return _dot(a.dense(), b, dimension_numbers=dimension_numbers, **params)
    return _dot_swapped(a, b.dense(), dimension_numbers=dimension_numbers, **params)


@quax.register(lax.conv_general_dilated_p)
def _conv(
    x: ArrayLike,
    w: Quantized,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    **params: Any,
) -> jax.Array:
    how = Conv(**{name: params[name] for name in Conv._fields})
    x = jnp.asarray(x)
    return products.convolve(x, w, how, dtype=preferred_element_type, precision=precision)


@quax.register(lax.gather_p)
def _gather(
    w: Quantized,
    indices: ArrayLike,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    mode: Any,
    fill_value: Any,
    **params: Any,
) -> jax.Array:
    """Look slices up and return floats: every part is looked up alike, but where it is shared."""
    d = dimension_numbers
    indices = jnp.asarray(indices)
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    kept = [
        i for i in range(w.ndim) if i not in (*d.collapsed_slice_dims, *d.operand_batching_dims)
    ]
    whole = [i for i, n in enumerate(slice_sizes) if n == w.shape[i] and i in kept]
    for name, part in w.parts():
        for axis, (s, n) in enumerate(zip(part.shape, w.shape, strict=True)):
            shared = s == 1 and name != "values"
            if s != n and not shared and axis not in whole:
                raise NotImplementedError(
                    f"gather of {describe(w)} cuts the axis {axis}, along which neighbours share "
                    "a byte or a scale; quantise it as a 'table' or leave it out ('keep')"
                )
    if w.hadamard is not None and w.ndim + w.hadamard[0] not in whole:
        raise NotImplementedError(f"gather of {describe(w)} cuts the axis that was rotated")

    def look_up(name: str, part: jax.Array) -> jax.Array:
        sizes, columns, map_ = list(slice_sizes), list(range(indices.shape[-1])), d.start_index_map
        batched = dict(zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True))
        for axis, s in enumerate(part.shape):
            if s == w.shape[axis]:
                # `vmap` of a dynamic slice gives starts to whole axes, too, which clip to 0.
                if axis in whole and axis in map_ and not fills:
                    columns.remove(d.start_index_map.index(axis))
                    map_ = tuple(a for a in map_ if a != axis)
                continue
            sizes[axis] = s if axis in whole else 1
            if axis in map_:
                columns.remove(d.start_index_map.index(axis))
                map_ = tuple(a for a in map_ if a != axis)
            if axis in batched:
                part = jnp.broadcast_to(
                    part,
                    [
                        n if i == axis else k
                        for i, (k, n) in enumerate(zip(part.shape, w.shape, strict=True))
                    ],
                )
        chosen = indices[..., np.array(columns, np.int32)]
        numbers = d._replace(start_index_map=map_)
        # Beyond the end, codes and scales are anything: the mask says where.
        fill = 0 if fills else None
        return lax.gather_p.bind(
            part,
            chosen,
            dimension_numbers=numbers,
            slice_sizes=tuple(sizes),
            mode=mode,
            fill_value=fill,
            **params,
        )

    static: dict[str, Any] = {}
    out = {axis: d.offset_dims[kept.index(axis)] for axis in kept}
    ndim = len(d.offset_dims) + indices.ndim - 1
    if w.pack is not None:
        static["pack"] = out[w.ndim + w.pack] - ndim
    if w.hadamard is not None:
        static["hadamard"] = (out[w.ndim + w.hadamard[0]] - ndim, w.hadamard[1])
    found = w.map(look_up, **static).dense()
    if not fills:
        return found
    inside = lax.gather_p.bind(
        jnp.broadcast_to(np.int8(1), w.shape),
        indices,
        dimension_numbers=d,
        slice_sizes=tuple(slice_sizes),
        mode=mode,
        fill_value=0,
        **params,
    )
    fill = np.nan if fill_value is None else fill_value
    return jnp.where(inside == 1, found, jnp.asarray(fill, found.dtype))


@quax.register(lax.convert_element_type_p)
def _cast(w: Quantized, *, new_dtype: Any, **_: Any) -> Quantized:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise NotImplementedError(f"{describe(w)} can be cast to a floating dtype, not {new_dtype}")
    return w.map(lambda _, part: part, as_dtype=np.dtype(new_dtype))


@quax.register(stop_gradient_p)
@quax.register(lax.copy_p)
def _same(w: Quantized, **_: Any) -> Quantized:
    return w


@quax.register(sharding_constraint_p)
def _constrain(w: Quantized, *, sharding: Any, **_: Any) -> Quantized:
    """Scales lie with their values: cut alike, where they have entries of their own."""
    if not isinstance(sharding, NamedSharding):
        raise NotImplementedError(
            f"sharding constraint of {describe(w)}: expected a NamedSharding, got {sharding}"
        )
    shape = w.shape
    return w.map(
        lambda name, part: lax.with_sharding_constraint(
            part, place_part(part, shape, sharding, name)
        )
    )


@quax.register(lax.transpose_p)
def _transpose(w: Quantized, *, permutation: Sequence[int]) -> Quantized:
    def moved(axis: int) -> int:
        return tuple(permutation).index(w.ndim + axis) - w.ndim

    return w.map(lambda _, part: lax.transpose(part, permutation), **_moved(w, moved))


def _moved(w: Quantized, where: Callable[[int], int]) -> dict[str, Any]:
    """The static fields that name an axis, with the numbers that axes have now."""
    return {
        "pack": None if w.pack is None else where(w.pack),
        "hadamard": None if w.hadamard is None else (where(w.hadamard[0]), w.hadamard[1]),
    }


@quax.register(lax.squeeze_p)
def _squeeze(w: Quantized, *, dimensions: Sequence[int]) -> Quantized:
    shape = [n for i, n in enumerate(w.shape) if i not in dimensions]
    return _reshape(w, new_sizes=shape)


@quax.register(lax.broadcast_in_dim_p)
def _broadcast(
    w: Quantized, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any
) -> Quantized:
    """New axes of size 1 and nothing else."""
    if math.prod(shape) != w.size or list(broadcast_dimensions) != sorted(broadcast_dimensions):
        raise NotImplementedError(f"{describe(w)} cannot be broadcast to {list(shape)}")
    return _reshape(w, new_sizes=shape)


@quax.register(lax.reshape_p)
def _reshape(
    w: Quantized, *, new_sizes: Sequence[int], dimensions: Any = None, **_: Any
) -> Quantized:
    if dimensions is not None:
        w = _transpose(w, permutation=dimensions)
    new = tuple(new_sizes)
    sizes = {name: regroup(part.shape, w.shape, new) for name, part in w.parts()}
    hadamard, fits = None, True
    if w.hadamard is not None:
        axis = w.ndim + w.hadamard[0]
        before, size = math.prod(w.shape[:axis]), w.shape[axis]
        at = [i for i, n in enumerate(new) if n == size and math.prod(new[:i]) == before]
        fits &= bool(at)
        hadamard = (at[0] - len(new), w.hadamard[1]) if at else None
    pack = None
    if w.pack is not None and sizes["values"] is not None:
        (axis,) = (i for i, (s, n) in enumerate(zip(sizes["values"], new, strict=True)) if s != n)
        pack = axis - len(new)
    if not fits or None in sizes.values():
        raise NotImplementedError(
            f"reshape of {describe(w)} to {list(new)} merges or splits an axis along which "
            "elements share a scale or a byte; leave this leaf out of the rules ('keep')"
        )
    return w.map(
        lambda name, part: lax.reshape(part, sizes[name]),  # type: ignore[arg-type] # none is None
        pack=pack,
        hadamard=hadamard,
    )


@quax.register(lax.slice_p)
def _slice(w: Quantized, *, start_indices: Any, limit_indices: Any, strides: Any) -> Quantized:
    steps = strides or [1] * w.ndim

    def cut(name: str, part: jax.Array) -> jax.Array:
        first, last, step = [], [], []
        for axis, (s, n) in enumerate(zip(part.shape, w.shape, strict=True)):
            a, b, by = start_indices[axis], limit_indices[axis], steps[axis]
            if s == 1 and name != "values":
                a, b, by = 0, 1, 1
            elif s != n:
                block = n // s
                if by != 1 or a % block or b % block:
                    raise NotImplementedError(_uncut(w, axis, f"[{a}:{b}:{by}]"))
                a, b = a // block, b // block
            first.append(a)
            last.append(b)
            step.append(by)
        return lax.slice(part, first, last, step)

    ranges = zip(start_indices, limit_indices, steps, strict=True)
    _check_rotated(w, [-(-(b - a) // by) for a, b, by in ranges])
    return w.map(cut)


@quax.register(lax.split_p)
def _split(w: Quantized, *, sizes: Sequence[int], axis: int) -> list[Quantized]:
    out, start = [], 0
    for n in sizes:
        first, last = [0] * w.ndim, list(w.shape)
        first[axis], last[axis] = start, start + n
        out.append(_slice(w, start_indices=first, limit_indices=last, strides=None))
        start += n
    return out


@quax.register(lax.dynamic_slice_p)
def _dynamic_slice(w: Quantized, *starts: ArrayLike, slice_sizes: Sequence[int]) -> Quantized:
    def cut(name: str, part: jax.Array) -> jax.Array:
        at, sizes = [], []
        for axis, (s, n) in enumerate(zip(part.shape, w.shape, strict=True)):
            start, size = jnp.asarray(starts[axis]), slice_sizes[axis]
            if s != n:
                if size != n and (s != 1 or name == "values"):
                    raise NotImplementedError(_uncut(w, axis, f"a dynamic slice of {size}"))
                start, size = jnp.zeros_like(start), s
            at.append(start)
            sizes.append(size)
        return lax.dynamic_slice(part, at, sizes)

    _check_rotated(w, slice_sizes)
    return w.map(cut)


@quax.register(lax.dynamic_update_slice_p)
def _update(w: Quantized, new: ArrayLike, *starts: ArrayLike) -> Quantized:
    return products.update(w, jnp.asarray(new), starts)


@quax.register(lax.concatenate_p)
def _concatenate(first: Quantized, *others: Quantized, dimension: int) -> Quantized:
    """Along an axis that has scales of its own, such as that of layers."""
    ws = (first, *others)
    kinds = {jax.tree.structure(w) for w in ws}
    beside = {
        tuple(tuple(np.delete(part.shape, dimension).tolist()) for _, part in w.parts()) for w in ws
    }
    shared = any(part.shape[dimension] != w.shape[dimension] for w in ws for _, part in w.parts())
    if shared or len(kinds) > 1 or len(beside) > 1:
        raise NotImplementedError(
            f"concatenation of {', '.join(map(describe, ws))} along axis {dimension}: expected "
            "arrays of one kind and one size of groups, joined along an axis on which each has "
            "scales of its own"
        )
    return first.map(lambda name, _: lax.concatenate([getattr(w, name) for w in ws], dimension))


def _varying(part: jax.Array) -> frozenset[str]:
    """The mesh axes along which an array of a `shard_map` differs."""
    kind: Any = jax.typeof(part)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # 0.11


@quax.register(lax.all_gather_p)
def _all_gather(
    w: Quantized, *, all_gather_dimension: int, axis_name: Any, tiled: bool, **params: Any
) -> Quantized:
    """Devices' parts of an axis, one after another; what all of them share stays as it is.

    A part of one entry may be shared or a device's own: JAX knows whether it differs between them.
    """
    names = set(axis_name) if isinstance(axis_name, tuple) else {axis_name}
    dimension = all_gather_dimension
    if not tiled or not names <= _varying(w.values):
        raise NotImplementedError(
            f"all_gather of {describe(w)} over {sorted(names)}: expected parts of one array, with "
            "tiled=True, within a shard_map with check_vma=True"
        )

    def gathered(_: str, part: jax.Array) -> jax.Array:
        if not names <= _varying(part):
            return part
        return lax.all_gather_p.bind(
            part, axis_name=axis_name, all_gather_dimension=dimension, tiled=tiled, **params
        )

    return w.map(gathered)


def _check_rotated(w: Quantized, sizes: Sequence[int]) -> None:
    if w.hadamard is not None and sizes[w.hadamard[0]] != w.shape[w.hadamard[0]]:
        raise NotImplementedError(f"a slice of {describe(w)} cuts the axis that was rotated")


def _uncut(w: Quantized, axis: int, what: str) -> str:
    return (
        f"{what} of axis {axis} of {describe(w)} cuts a group that shares a scale or a byte; "
        "leave this leaf out of the rules ('keep')"
    )
