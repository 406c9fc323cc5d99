"""How the mesh cuts arrays, for those who write their communication out by hand.

`Cuts` knows the scope that surrounds the trace; `whole` and `vary` are for the parts inside of its
`shard_map`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from sharding import context
from sharding.layout import fit
from sharding.mesh import AXES
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
    return lax.all_gather(x, axes, axis=place, tiled=True) if axes else x


def vary(x: jax.Array, spec: PartitionSpec, axes: set[str]) -> jax.Array:
    """Lets x differ over all axes before its first use.

    On the way back, sums over axes then come last: when the gradients of one input are added up,
    and those of kernels are in parts.
    """
    missing = tuple(a for a in AXES if a in axes and all(a not in mesh_axes(e) for e in spec))
    return lax.pcast(x, missing, to="varying") if missing else x
