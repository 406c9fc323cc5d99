"""How the mesh cuts arrays, for those who write their communication out by hand.

`Cuts` knows the scope that surrounds the trace; `whole` and `vary` are for the parts inside of its
`shard_map`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from sharding import context
from sharding.layout import fit
from sharding.mesh import AXES, platform
from sharding.rules import Names, Rules, mesh_axes


@dataclass(frozen=True)
class Cuts:
    """Where arrays lie in the scope that surrounds the trace."""

    mesh: Mesh
    rules: Rules

    @classmethod
    def current(cls) -> "Cuts | None":
        """In any scope; None outside."""
        found = context.current()
        return None if found is None else cls(*found)

    @classmethod
    def differentiated(cls) -> "Cuts | None":
        """In a scope for differentiation; None elsewhere."""
        found = context.differentiated()
        return None if found is None else cls(*found)

    def flown(self, names: Names, shape: tuple[int, ...], path: str) -> PartitionSpec:
        """The cuts of an activation."""
        return self._spec(names, shape, path, activation=True)

    def stored(self, names: Names, shape: tuple[int, ...], path: str) -> PartitionSpec:
        """The cuts of a parameter."""
        return self._spec(names, shape, path, activation=False)

    def _spec(self, names, shape, path, *, activation) -> PartitionSpec:
        found = fit(names, shape, self.mesh, self.rules, activation=activation, path=path).spec
        long = [tuple(a for a in mesh_axes(e) if self.mesh.shape[a] > 1) for e in found]
        return PartitionSpec(*[axes or None for axes in long])

    @staticmethod
    def of(*specs: PartitionSpec) -> set[str]:
        """The mesh axes that cut any of these."""
        return {axis for spec in specs for entry in spec for axis in mesh_axes(entry)}

    def size(self, axes: Iterable[str]) -> int:
        """How many parts these mesh axes make."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def shard_map(self, body, in_specs, out_specs, axes: set[str]):
        """`body` for each device's part along `axes`."""
        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={*axes, *context.mapped()},
        )


def whole(x: jax.Array, axes: tuple[str, ...], place: int) -> jax.Array:
    """The parts of x along an axis, gathered."""
    gather = partial(lax.all_gather, axis_name=axes, axis=place, tiled=True)
    return summable(gather, x) if axes else x


def vary(x: jax.Array, spec: PartitionSpec, axes: set[str]) -> jax.Array:
    """Lets x differ over all axes before its first use.

    On the way back, sums over axes then come last: when the gradients of one input are added up,
    and those of kernels are in parts.
    """
    missing = tuple(a for a in AXES if a in axes and all(a not in mesh_axes(e) for e in spec))
    return summable(partial(lax.pcast, axis_name=missing, to="varying"), x) if missing else x


def summable(send: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`send(x)`, which sums over devices, there or on the way back; on CPUs in float32 at least.

    XLA's compiler for CPUs aborts where bfloat16 is summed within a function that has axes of its
    own beside some that it has not (hlo_instruction.cc: "Invalid binary instruction opcode copy").
    """
    here = context.current()
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    if narrow and here is not None and platform(here[0]) == "cpu":
        return send(x.astype(jnp.float32)).astype(x.dtype)
    return send(x)
