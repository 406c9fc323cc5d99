"""Stored parameters brought to where they are used, and their gradients back, in the fewest bytes.

A function that is written for one device's part of some axes (`jax.shard_map`) wants its parameters
gathered over these. Left to XLA, their gradients are summed whole before they are cut again, and a
gather within such a function loses what the other axes cut. Here both are collectives by hand over
all axes: one gather, and in the backward pass one reduction that scatters.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from sharding.context import mapped
from sharding.parallel.cuts import summable
from sharding.parallel.travel import moved
from sharding.rules import mesh_axes


def collect(
    params: Any,
    specs: Any,
    mesh: Mesh,
    axes: Sequence[str],
    kept: Sequence[str],
    operands: Any = None,
) -> tuple[Any, Any]:
    """Every device's own copy of its parameters, whole but for their first axis and XLA's axes.

    Args:
        params: a tree of arrays.
        specs: a tree of PartitionSpecs like it, how they are stored.
        mesh: where they are stored.
        axes: the mesh axes that the function which wants them cuts by hand.
        kept: those of `axes` that cut the first axis of every parameter, there too.
        operands: the dtype in which matrices travel, which have three axes at least; None for their
            own. Gradients do not.

    Returns:
        A tree of arrays [copies, ...], one copy a device, so that nothing has to be summed or moved
        at the function's door; and a tree of their specs, of `axes` only. Gradients are
        reduced in float32 at least.

    >>> from sharding import make_mesh
    >>> mesh = make_mesh("data=4,fsdp=2")
    >>> copies, spec = collect(
    ...     jax.numpy.ones((3, 6)), jax.P(None, "fsdp"), mesh, ["data", "fsdp"], [])
    >>> copies.shape, tuple(spec)
    ((8, 3, 6), (('data', 'fsdp'), None, None))
    """
    copied = tuple(axis for axis in axes if axis not in kept)

    def one(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        cut = [tuple(a for a in mesh_axes(entry) if mesh.shape[a] > 1) for entry in spec]
        cut += [()] * (leaf.ndim - len(cut))
        # Where an axis of the array is cut by hand and by XLA, both are gathered: to keep one of
        # them would change the order of its parts.
        dims = [(d, own) for d, own in enumerate(cut) if d and set(own) & set(axes)]
        gathered = dict(dims)
        left = [None if d in gathered else own or None for d, own in enumerate(cut)]
        low = operands if leaf.ndim > 2 else None
        wide = leaf.astype(np.promote_types(leaf.dtype, np.float32))
        return jax.shard_map(
            lambda part: _gather(part, dims, leaf.dtype, low)[None],
            mesh=mesh,
            in_specs=PartitionSpec(*[own or None for own in cut]),
            out_specs=PartitionSpec(copied or None, *left),
            axis_names={*axes, *mapped(), *(axis for own in cut for axis in own)},
            check_vma=False,
        )(wide)

    copies = jax.tree.map(one, params, specs)
    first = tuple(kept) or None
    doors = jax.tree.map(
        lambda leaf: PartitionSpec(copied or None, first, *[None] * (leaf.ndim - 1)), params
    )
    return copies, doors


def _gather(
    part: jax.Array, dims: Sequence[tuple[int, tuple[str, ...]]], dtype: Any, operands: Any
) -> jax.Array:
    """`part` in `dtype`, gathered; its gradient reduced and scattered in the dtype of `part`."""

    @jax.custom_vjp
    def gather(part):
        part = part.astype(dtype)
        for dim, axes in dims:
            whole = partial(lax.all_gather, axis_name=axes, axis=dim, tiled=True)
            part = moved(whole, part, operands)
        return part

    def backward(_, g):
        g = g.astype(part.dtype)
        for dim, axes in reversed(dims):
            # Flat behind: of a matrix in two parts, XLA:TPU would all-reduce the whole and cut it.
            flat = g.reshape(*g.shape[: dim + 1], -1)
            scatter = partial(lax.psum_scatter, axis_name=axes, scatter_dimension=dim, tiled=True)
            flat = summable(scatter, flat)
            g = flat.reshape(*flat.shape[: dim + 1], *g.shape[dim + 1 :])
        return (g,)

    gather.defvjp(lambda part: (gather(part), None), backward)
    return gather(part)
