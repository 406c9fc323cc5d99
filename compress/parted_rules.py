"""What each JAX primitive does with an array of parts (`compress.parted`).

Products are the array's own. What moves or cuts the whole does the same to every part. Whatever is
not here is refused by `Compressed.default`. Importing this file registers the rules with quax, once
for the process.
"""

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

from compress.arrays import Compressed, Quantized, describe
from compress.backends import Conv
from compress.factored import Factored
from compress.packed import Packed
from compress.parted import Parted
from compress.rules import operands, swapped


@quax.register(lax.dot_general_p)
def _dot(
    x: ArrayLike,
    w: Parted,
    *,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    **_: Any,
) -> jax.Array:
    x, dims = operands(x, w, dimension_numbers, out_sharding)
    return w.dot(x, dims, dtype=preferred_element_type, precision=precision)


@quax.register(lax.dot_general_p)
def _dot_swapped(
    w: Parted, x: ArrayLike, *, dimension_numbers: Any, precision: Any = None, **params: Any
) -> jax.Array:
    return swapped(_dot, w, x, dimension_numbers, precision, **params)


@quax.register(lax.dot_general_p)
def _dot_left(a: Parted, b: Compressed, **params: Any) -> jax.Array:
    """What is multiplied with a compressed array becomes floats, as an activation is."""
    return _dot_swapped(a, b.dense(), **params)


@quax.register(lax.dot_general_p)
def _dot_right(a: Quantized, b: Parted, **params: Any) -> jax.Array:
    return _dot(a.dense(), b, **params)


@quax.register(lax.gather_p)
def _gather(w: Parted, *_: Any, **__: Any) -> jax.Array:
    raise NotImplementedError(
        f"gather of {describe(w)}: it is for kernels, not for tables whose rows are looked up; "
        "leave this leaf out of the rules ('keep')"
    )


@quax.register(lax.conv_general_dilated_p)
def _conv(
    x: ArrayLike,
    w: Factored | Packed,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    **params: Any,
) -> jax.Array:
    how = Conv(**{name: params[name] for name in Conv._fields})
    return w.convolve(jnp.asarray(x), how, dtype=preferred_element_type, precision=precision)


def _by_rule(primitive: Any, **params: Any) -> Callable[[Any], Any]:
    """What a primitive does with a base, compressed or not."""
    return quax.quaxify(lambda base: primitive.bind(base, **params))


def _each(change: Callable[[Any, tuple[int, ...]], Any]) -> Callable[[Any, tuple[int, ...]], Any]:
    """What `Parted.map` does to a part, compressed or not."""
    return lambda part, axes: quax.quaxify(lambda part: change(part, axes))(part)


@quax.register(lax.convert_element_type_p)
def _cast(w: Parted, *, new_dtype: Any, **params: Any) -> Parted:
    """Scales and magnitudes stay float32."""
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise NotImplementedError(f"{describe(w)} can be cast to a floating dtype, not {new_dtype}")
    cast = _by_rule(lax.convert_element_type_p, new_dtype=new_dtype, **params)
    return w.cast(cast, new_dtype)


@quax.register(lax.copy_p)
def _same(w: Parted, **_: Any) -> Parted:
    return w


@quax.register(stop_gradient_p)
def _stop(w: Parted, **_: Any) -> Parted:
    return jax.tree.map(lax.stop_gradient, w)


@quax.register(sharding_constraint_p)
def _constrain(w: Parted, *, sharding: Any, **_: Any) -> Parted:
    if not isinstance(sharding, NamedSharding):
        raise NotImplementedError(
            f"sharding constraint of {describe(w)}: expected a NamedSharding, got {sharding}"
        )
    return lax.with_sharding_constraint(w, w.place(sharding))


@quax.register(lax.transpose_p)
def _transpose(w: Parted, *, permutation: Sequence[int]) -> Parted:
    where = [tuple(permutation).index(w.ndim + k) - w.ndim for k in w.ends()]
    return w.map(
        _by_rule(lax.transpose_p, permutation=permutation),
        _each(lambda part, _: lax.transpose(part, permutation)),
        input=where[0],
        output=where[1],
    )


@quax.register(lax.squeeze_p)
def _squeeze(w: Parted, *, dimensions: Sequence[int]) -> Parted:
    kept = [k for k in range(w.ndim) if k not in dimensions]
    core = tuple(w.ndim + k for k in w.ends())
    if not set(core) <= set(kept):
        raise NotImplementedError(f"squeeze of {describe(w)} removes its input or output axis")
    return w.map(
        _by_rule(lax.squeeze_p, dimensions=dimensions),
        _each(lambda part, _: lax.squeeze(part, dimensions)),
        input=kept.index(core[0]) - len(kept),
        output=kept.index(core[1]) - len(kept),
    )


@quax.register(lax.broadcast_in_dim_p)
def _broadcast(
    w: Parted, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **params: Any
) -> Parted:
    """New axes of size 1 and nothing else."""
    at = tuple(broadcast_dimensions)
    if int(np.prod(shape)) != w.size:
        raise NotImplementedError(f"{describe(w)} cannot be broadcast to {list(shape)}")

    def wider(part: jax.Array, _: Any) -> jax.Array:
        sizes = [1] * len(shape)
        for n, k in zip(part.shape, at, strict=True):
            sizes[k] = n
        return lax.broadcast_in_dim(part, sizes, at)

    base = _by_rule(
        lax.broadcast_in_dim_p, shape=shape, broadcast_dimensions=broadcast_dimensions, **params
    )
    places = [at[w.ndim + k] - len(shape) for k in w.ends()]
    return w.map(base, _each(wider), input=places[0], output=places[1])


@quax.register(lax.reshape_p)
def _reshape(w: Parted, *, new_sizes: Sequence[int], **params: Any) -> Parted:
    if {*w.ends()} != {-2, -1} or tuple(new_sizes[-2:]) != w.shape[-2:]:
        raise NotImplementedError(
            f"reshape of {describe(w)} to {list(new_sizes)}: only the axes before its input and "
            "output axis can be joined or split; leave this leaf out of the rules ('keep')"
        )

    def joined(part: jax.Array, _: Any) -> jax.Array:
        if part.shape[:-2] != w.shape[:-2]:
            raise NotImplementedError(
                f"reshape of {describe(w)} to {list(new_sizes)} joins axes of its window; leave "
                "this leaf out of the rules ('keep')"
            )
        return lax.reshape(part, (*new_sizes[:-2], *part.shape[-2:]))

    return w.map(_by_rule(lax.reshape_p, new_sizes=new_sizes, **params), _each(joined))


@quax.register(lax.slice_p)
def _slice(w: Parted, *, start_indices: Any, limit_indices: Any, strides: Any) -> Parted:
    steps = strides or [1] * w.ndim
    cuts = list(zip(start_indices, limit_indices, steps, strict=True))
    w.check_cut([len(range(*cut)) for cut in cuts])

    def cut(part: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        own = [c if k in axes else (0, part.shape[k], 1) for k, c in enumerate(cuts)]
        return lax.slice(part, *zip(*own, strict=True))

    base = _by_rule(
        lax.slice_p, start_indices=start_indices, limit_indices=limit_indices, strides=strides
    )
    return w.map(base, _each(cut))


@quax.register(lax.split_p)
def _split(w: Parted, *, sizes: Sequence[int], axis: int) -> list[Parted]:
    ends = np.cumsum(sizes).tolist()
    found = []
    for start, end in zip([0, *ends], ends, strict=False):
        first, last = [0] * w.ndim, list(w.shape)
        first[axis], last[axis] = start, end
        found.append(_slice(w, start_indices=tuple(first), limit_indices=tuple(last), strides=None))
    return found


@quax.register(lax.dynamic_slice_p)
def _dynamic_slice(w: Parted, *starts: ArrayLike, slice_sizes: Sequence[int]) -> Parted:
    w.check_cut(slice_sizes)

    def cut(part: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        own = [
            s if k in axes else jnp.zeros_like(s) for k, s in enumerate(map(jnp.asarray, starts))
        ]
        sizes = [n if k in axes else part.shape[k] for k, n in enumerate(slice_sizes)]
        return lax.dynamic_slice(part, own, sizes)

    base = quax.quaxify(lambda base: lax.dynamic_slice(base, starts, slice_sizes))
    return w.map(base, _each(cut))
