"""A batch as microbatches, and where their rows lie; `pipeline` and `in_turn` go through them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.context import current
from sharding.errors import ShardingError
from sharding.layout import paths
from sharding.parallel.stages import divisors
from sharding.rules import BATCH, mesh_axes


def split(x: jax.Array, count: int) -> jax.Array:
    """[batch, ...] → [count, batch / count, ...]; row i goes to microbatch i mod count."""
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def merge(x: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def rows_axes() -> tuple[str, ...] | None:
    """The mesh axes that cut rows in this scope."""
    place = current()
    return place and (mesh_axes(place[1].table[BATCH]) or None)


def pin(tree: Any, *axes: Any) -> Any:
    """Cut the first axes of every leaf so; what its other axes do is the layers' affair."""
    place = current()
    if place is None:
        return tree

    def pin(x):
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(axes))
        return lax.with_sharding_constraint(x, NamedSharding(place[0], PartitionSpec(*axes, *free)))

    return jax.tree.map(pin, tree)


def same_size(tree: Any, axis: int, what: str) -> int:
    """The size that all leaves have along `axis`."""
    leaves = dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))
    sizes = {path: jnp.shape(leaf)[axis : axis + 1] for path, leaf in leaves.items()}
    if not sizes:
        raise ShardingError(f"pipeline: no array that tells the number of {what}")
    first, expected = next(iter(sizes.items()))
    for path, size in sizes.items():
        if not size or size != expected:
            raise ShardingError(
                f"pipeline: axis {axis} is that of {what}; {path!r} is {jnp.shape(leaves[path])}, "
                f"but {first!r} is {jnp.shape(leaves[first])}"
            )
    return expected[0]


def check_rows(rows: int, microbatches: int) -> None:
    """Refuses rows that microbatches, or the devices that cut these, do not divide."""
    if microbatches < 1 or rows % microbatches:
        raise ShardingError(
            f"pipeline: {rows} rows do not divide into microbatches={microbatches}; "
            f"{divisors(rows)} would do"
        )
    place = current()
    ways = 1
    for axis in rows_axes() or ():
        ways *= place[0].shape[axis] if place else 1
    if rows // microbatches % ways:
        raise ShardingError(
            f"pipeline: {rows} rows in {microbatches} microbatches leave {rows // microbatches} "
            f"for each, which the {ways} devices that cut rows do not divide; use a multiple of "
            f"{microbatches * ways} rows, or microbatches = {divisors(rows // ways) or 'none'}"
        )
