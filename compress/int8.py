"""Quantise: the selected leaves of a parameter tree become `Int8` arrays, everywhere it can live.

A transform of `compress.transform` whose one-leaf mathematics is `compress.arrays.int8`. Works on
host arrays, under `jit` and `eval_shape`, and on sharded trees: every scale is a maximum, which no
order of evaluation changes, so that quantise-then-shard and shard-then-quantise agree bit for bit.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from compress.arrays import Int8, dense, int8, is_compressed
from compress.transform import Record, leafwise, match, named_leaves

AXES = {"kernel": -2, "stack": -2, "table": -1}
"""Role of a leaf -> the axis that shares one scale."""

DEFAULT_SELECT = {
    "**/layers/kernel": "stack",
    "**/layers/[!0-9]*/**/kernel": "stack",
    "**/kernel": "kernel",
}
"""Every floating leaf whose path ends in "kernel": of one layer, or of a stack named layers."""


def quantize(
    params: Any, *, select: Mapping[str, str] | None = None
) -> tuple[Any, tuple[Record, ...]]:
    """Replace the selected floating leaves by int8 values with float32 scales.

    s = max |w| / 127,  q = round(w / s),  along the axis that the leaf's role names:

    - "kernel": [in, out], as in `x @ w`; one scale per output.
    - "stack": [..., in, out], kernels stacked for `lax.scan` or `vmap`; one per kernel and output.
    - "table": [rows, features], as in `jnp.take(w, ids, axis=0)`; one scale per row.
    - "keep": stays as it is.

    A leaf that a rule matches but whose shape or dtype its role does not fit (a convolution's
    kernel, integers) is kept, and its record says why.

    Args:
        params: any pytree of arrays; concrete, traced or sharded.
        select: glob pattern on "/"-joined paths -> role, first match wins; see
            `compress.transform.match`. None for what `DEFAULT_SELECT` finds.

    Returns:
        The tree with `Int8` leaves (no float copy is kept), and one record per leaf.

    Raises:
        ValueError: a rule selects nothing, a role is unknown, a leaf holds NaN or infinity.

    >>> params = {"dense": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}
    >>> small, report = quantize(params)
    >>> small["dense"]["kernel"].values.dtype.name
    'int8'
    >>> [(r.path, r.bytes_before, r.bytes_after, r.applied) for r in report]
    [('dense/bias', 12, 12, 'kept: no rule'), ('dense/kernel', 36, 21, 'int8 kernel')]
    """
    unfit = {role: partial(_unfit, role) for role in AXES}
    if select is None:  # of which any may find nothing, but not all
        first = [
            next((p for p in DEFAULT_SELECT if match(p, path)), None)
            for path, _ in named_leaves(params)[0]
        ]
        select = {p: r for p, r in DEFAULT_SELECT.items() if p in first} or DEFAULT_SELECT
    return leafwise(params, select, unfit=unfit, leaf_fn=_quantize_leaf)


def dequantize(params: Any) -> Any:
    """The tree with every `Int8` leaf as the floats it stands for, in the original dtype.

    >>> dequantize(quantize({"kernel": jnp.eye(2)})[0])["kernel"]
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    return jax.tree.map(
        lambda x: _dense(x) if is_compressed(x) else x, params, is_leaf=is_compressed
    )


def specs(params: Any, specs: Any) -> Any:
    """Where a compressed tree's arrays live, from where the original leaves lived.

    The values keep the original leaf's spec; the scale's is the same without the axis it shares,
    so each device holds exactly the scales of its own values.

    Args:
        params: the compressed tree, or its `jax.eval_shape`.
        specs: the tree of `PartitionSpec` or `NamedSharding` of the original leaves.

    Returns:
        A tree of the compressed tree's structure, for `jax.device_put`, `jit` or `shard_map`.

    Raises:
        TypeError: a compressed leaf's spec is neither of the two.

    >>> small, _ = quantize({"kernel": jnp.eye(2)})
    >>> spec = specs(small, {"kernel": PartitionSpec("fsdp", "tensor")})["kernel"]
    >>> tuple(spec.values), tuple(spec.scale)
    (('fsdp', 'tensor'), ('tensor',))
    """
    return jax.tree_util.tree_map_with_path(_leaf_specs, params, specs, is_leaf=is_compressed)


def _unfit(role: str, leaf: Any) -> str:
    if is_compressed(leaf):
        return "it is compressed already"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{leaf.dtype} is not floating"
    ndim = len(leaf.shape)
    if (ndim < 3) if role == "stack" else (ndim != 2):
        return f"a {role!r} has {'3 axes or more' if role == 'stack' else '2 axes'}, not {ndim}"
    return "" if all(leaf.shape) else f"shape {tuple(leaf.shape)} is empty"


def _quantize_leaf(leaf: Any, role: str) -> tuple[Int8, str, jax.Array]:
    small, error = _quantize(leaf, AXES[role])
    return small, f"int8 {role}", error


@partial(jax.jit, static_argnums=1)
def _quantize(w: jax.Array, axis: int) -> tuple[Int8, jax.Array]:
    small = int8(w, axis)
    w = w.astype(jnp.float32)
    scale = jnp.expand_dims(small.scale, axis)
    norm = jnp.linalg.norm(w)
    error = jnp.linalg.norm(w - small.values.astype(jnp.float32) * scale)
    return small, error / jnp.where(norm == 0, np.float32(1), norm)


_dense = jax.jit(dense)


def _leaf_specs(path: Any, leaf: Any, spec: Any) -> Any:
    if not is_compressed(leaf):
        return spec
    if isinstance(spec, NamedSharding):
        small = _drop_axis(spec.spec, leaf)
        scale: Any = NamedSharding(spec.mesh, small, memory_kind=spec.memory_kind)
    elif isinstance(spec, PartitionSpec):
        scale = _drop_axis(spec, leaf)
    else:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise TypeError(
            f"{name}: expected a PartitionSpec or NamedSharding of the original leaf, "
            f"got {type(spec).__name__}"
        )
    # A tree of specs has the arrays' structure, but its fields hold no arrays: hence the ignore.
    return Int8(spec, scale, axis=leaf.axis, as_dtype=leaf.as_dtype)  # pyright: ignore[reportArgumentType]


def _drop_axis(spec: PartitionSpec, leaf: Int8) -> PartitionSpec:
    ndim = len(leaf.values.shape)
    entries = [*spec, *[None] * (ndim - len(spec))]
    del entries[leaf.axis]
    return PartitionSpec(*entries)
