"""What goes into a compiled program: the path of every argument, and how much a device holds."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from sharding.errors import ShardingError
from sharding.layout import paths
from sharding.program.hlo import Program
from sharding.program.shapes import Array, leaves
from sharding.rules import mesh_axes


@dataclass(frozen=True)
class Parameter:
    """One argument of a program.

    Attributes:
        path: where it stands in the arguments, as `params/layers/0/up/kernel`.
        dtype: the elements' dtype on the device.
        shape: the whole shape.
        spec: the mesh axes that cut each axis.
        bytes: the whole array's.
        device_bytes: what one device holds of it.
        copied: the mesh axes, longer than 1, along which devices hold the same part.
        donated: whether its memory is used for the outputs.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    spec: tuple[tuple[str, ...], ...]
    bytes: int
    device_bytes: int
    copied: tuple[str, ...]
    donated: bool


def _arrays(program: Program) -> list[tuple[str, Array]]:
    """Name and shape, on a device, of every array that goes in."""
    found = []
    for _, it in sorted(program.parameters[program.entry].items()):
        name = it.metadata.get("op_name", "")
        found += [(name, array) for array in leaves(it.shape)]
    return found


def arguments(
    compiled: jax.stages.Compiled,
    program: Program,
    mesh: Mesh | None,
) -> list[tuple[str, Parameter | None]]:
    """The arrays that go into a program, in its order.

    Args:
        compiled: the program, as JAX knows it.
        program: its text.
        mesh: where it runs; None on one device.

    Returns:
        Path and description of each; constants that JAX passes along have no description.

    Raises:
        ShardingError: the text has fewer than JAX does.
    """
    arrays = _arrays(program)
    infos = jax.tree.leaves(compiled.args_info)
    where = jax.tree.structure(compiled.args_info).flatten_up_to(compiled.input_shardings)
    # Arguments that the program does not use have no sharding and no parameter.
    rows = zip(paths(compiled.args_info), infos, where, strict=True)
    used = [row for row in rows if row[2] is not None]
    constants = len(arrays) - len(used)
    if constants < 0:
        raise ShardingError(
            f"inspect: the program has {len(arrays)} parameters for {len(used)} arguments"
        )
    found: list[tuple[str, Parameter | None]] = [(f"constant {n}", None) for n in range(constants)]
    for (position, info, sharding), (name, array) in zip(used, arrays[constants:], strict=True):
        path = _path(name) or position
        shape = tuple(info.shape)
        parts = math.prod(shape) // max(1, math.prod(sharding.shard_shape(shape)))
        spec = _spec(sharding, len(shape))
        cut = {axis for axes in spec for axis in axes}
        sizes = {} if mesh is None else dict(mesh.shape)
        known = isinstance(sharding, NamedSharding) or parts == 1
        copied = tuple(a for a, n in sizes.items() if known and n > 1 and a not in cut)
        one = Parameter(
            path=path,
            dtype=array.dtype,
            shape=shape,
            spec=spec,
            bytes=array.bytes * parts,
            device_bytes=array.bytes,
            copied=copied,
            donated=bool(info.donated),
        )
        found.append((path, one))
    return found


def _spec(sharding: Any, rank: int) -> tuple[tuple[str, ...], ...]:
    entries = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return tuple(map(mesh_axes, entries)) + ((),) * (rank - len(entries))


def _path(name: str) -> str:
    """The path of a name as JAX writes it.

    >>> _path("state.params['layers'][0].kernel")
    'state/params/layers/0/kernel'
    """
    keys = re.findall(r"\[<flat index (\d+)>\]|\['([^']*)'\]|\[([^\]]*)\]|\.?([^.\[]+)", name)
    return "/".join("".join(key) for key in keys)
