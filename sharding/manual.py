"""Functions that are written for one device's part of some mesh axes; XLA cuts the others.

`jax.shard_map` with `axis_names` is that, but for one thing: under `jax.vmap(spmd_axis_name=...)`,
with which a pipeline maps over its stages, it takes the mapped axis for one of its own and fails
(jax 0.12). Here a mapped axis becomes a leading axis that XLA cuts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec


def manual(
    fn: Callable[..., Any],
    mesh: Mesh,
    axes: Sequence[str],
    in_specs: Sequence[PartitionSpec],
    out_specs: Any,
    *,
    _mapped: tuple[tuple[bool | None, ...], ...] = (),
) -> Callable[..., Any]:
    """`fn` of whole arrays, where `fn` sees its device's parts.

    The result cannot be differentiated: it is for the two halves of a `jax.custom_vjp`.

    Args:
        fn: takes arrays or None, and may use collectives over `axes`.
        mesh: the devices.
        axes: the mesh axes that `fn` cuts by hand.
        in_specs: how each argument is cut over `axes`; the other mesh axes stay XLA's.
        out_specs: a tree like the result, how each array of it is cut.

    Returns:
        A function of global arrays. May be jitted, scanned, checkpointed, and mapped by `jax.vmap`
        with any `spmd_axis_name` that is not in `axes`.

    >>> from sharding import make_mesh
    >>> total = lambda x: jax.lax.psum(x.sum(), "sequence")
    >>> mesh, spec = make_mesh("sequence=-1"), jax.P("sequence")
    >>> int(manual(total, mesh, ["sequence"], [spec], jax.P())(jax.numpy.arange(16)))
    120
    """
    # One entry an enclosing vmap, the innermost first: which arguments it maps.
    part = fn
    for batched in _mapped:
        part = jax.vmap(part, in_axes=[0 if mapped else None for mapped in batched])

    def below(spec: PartitionSpec, mapped: int) -> PartitionSpec:
        return PartitionSpec(*[None] * mapped, *spec)

    counts = [sum(map(bool, level)) for level in zip(*_mapped, strict=True)]
    call = custom_vmap(
        jax.jit(
            jax.shard_map(
                part,
                mesh=mesh,
                in_specs=tuple(map(below, in_specs, counts or [0] * len(in_specs))),
                out_specs=jax.tree.map(lambda spec: below(spec, len(_mapped)), out_specs),
                axis_names=set(axes),
                check_vma=False,
            )
        )
    )

    @call.def_vmap
    def _(_size, batched, *args):  # pyright: ignore[reportUnusedFunction]
        levels = (*_mapped, tuple(batched))
        out = manual(fn, mesh, axes, in_specs, out_specs, _mapped=levels)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return call
