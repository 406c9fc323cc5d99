"""Which devices talk to each other in a collective, and along which axes of the mesh.

XLA prints groups of device numbers in many forms, and what a number means depends on the
instruction. Here they all become groups of positions in the mesh, and groups become axes: by
enumeration, for the names of axes that XLA prints may be invented (`axis_0`).
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sharding.errors import ShardingError
from sharding.mesh import format_mesh
from sharding.program.hlo import Instruction
from sharding.program.shapes import unreadable

Groups = tuple[tuple[int, ...], ...]
"""Groups of device numbers; the devices of one group exchange data."""

_REDUCING = ("all-reduce", "all-gather", "reduce-scatter")

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ORDER = re.compile(r"\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)")
_MESH = re.compile(r"mesh\[(.*?)\]")
_AXIS = re.compile(r"'([^']*)'(?:=(\d+)|:\((\d+)\)(\d+))?")


def replica_groups(instruction: Instruction, devices: int) -> Groups:
    """The groups of a collective, in any of the forms in which XLA prints them.

    They are lists `{{0,1},{2,3}}`; a reshaped, transposed range `[2,4]<=[4,2]T(1,0)`; or axes of a
    mesh `mesh['a'=2,'b'=4] {'a','b':(1)2}`, where `'b':(p)n` is the part of size n of axis `b`
    that has p parts before it, and `device_ids` may put the devices in another order. `{}` is one
    group of all.

    Args:
        instruction: a collective.
        devices: how many there are.

    Returns:
        The groups, as numbers that the collective's mode gives a meaning.

    Raises:
        ShardingError: another form.
    """
    text = instruction.attributes.get("replica_groups", "{}").strip()
    if text == "{}":
        return (tuple(range(devices)),)
    if re.fullmatch(r"\{\{[\d,{}\s]*\}\}", text):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", text))
    if found := _IOTA.fullmatch(text):
        shape, order = _numbers(found[1]), _iota(found[2], found[3])
        return tuple(map(tuple, order.reshape(shape[0], -1).tolist()))
    if text.startswith("mesh["):
        return _mesh_groups(text, instruction)
    raise unreadable(f"replica_groups={text}", instruction.line)


def _mesh_groups(text: str, instruction: Instruction) -> Groups:
    order_text, separator, axes_text = text.partition("{")
    if not separator:  # `mesh[...], device_ids=(...) {...}` holds a comma
        order_text, separator, axes_text = instruction.attributes.get("device_ids", "").partition(
            "{"
        )
    mesh, order = _MESH.match(text), _ORDER.search(order_text)
    sizes = {axis[1]: int(axis[2]) for axis in _AXIS.finditer(mesh[1])} if mesh else {}
    wanted = list(_AXIS.finditer(axes_text))
    if not separator or not sizes or any(axis[1] not in sizes for axis in wanted):
        raise unreadable(f"replica_groups={text}", instruction.line)
    # A range of one axis is (name, parts before it, parts before its end).
    ranges = [
        (axis[1], int(axis[3]), int(axis[3]) * int(axis[4]))
        if axis[3]
        else (axis[1], 1, sizes[axis[1]])
        for axis in wanted
    ]
    dims: list[int] = []
    pieces: list[tuple[str, int]] = []
    for name, size in sizes.items():
        cuts = sorted({1, size, *(cut for axis, *ends in ranges if axis == name for cut in ends)})
        for low, high in pairwise(cuts):
            dims.append(high // low)
            pieces.append((name, low))
    inside = [
        i
        for name, low, high in ranges
        for i, (axis, start) in enumerate(pieces)
        if axis == name and low <= start < high
    ]
    outside = [i for i in range(len(dims)) if i not in inside]
    ids = np.arange(math.prod(sizes.values()))
    if order is not None:
        ids = np.array(_numbers(order[3])) if order[3] else _iota(order[1], order[2])
    width = math.prod(dims[i] for i in inside)
    grid = ids.reshape(dims).transpose(outside + inside).reshape(-1, width)
    return tuple(map(tuple, grid.tolist()))


def pairs(instruction: Instruction) -> Groups:
    """The (source, target) pairs of a collective-permute, or of a send.

    Args:
        instruction: one of the two.

    Returns:
        Pairs of numbers.

    Raises:
        ShardingError: they are missing or not pairs.
    """
    text = instruction.attributes.get("source_target_pairs") or instruction.frontend(
        "_xla_send_recv_source_target_pairs"
    )
    if text is None or not re.fullmatch(r"\{(\{\d+,\d+\},?\s*)*\}", text):
        raise unreadable(f"source_target_pairs={text}", instruction.line)
    return tuple(_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", text))


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def members(instruction: Instruction, kind: str, partitions: int, replicas: int) -> Groups:
    """Who takes part in a collective, as numbers replica * partitions + partition.

    What the printed numbers are depends on `channel_id` and `use_global_device_ids`: partitions,
    replicas, or both in one. Programs of `jax.jit` have one replica.

    Args:
        instruction: a collective.
        kind: what it is, without `-start`.
        partitions: the parts that arrays are cut into.
        replicas: the copies of the program that run.

    Returns:
        The groups; for a collective-permute the pairs (source, target).

    Raises:
        ShardingError: a form that is unknown.
    """
    read = (
        (lambda _: pairs(instruction))
        if kind == "collective-permute"
        else (lambda count: replica_groups(instruction, count))
    )
    each = range(partitions)
    if instruction.attributes.get("channel_id") is None:
        return tuple(tuple(r * partitions + p for r in g) for g in read(replicas) for p in each)
    if kind not in _REDUCING:
        numbers = read(partitions)
        return tuple(tuple(r * partitions + p for p in g) for r in range(replicas) for g in numbers)
    if instruction.attributes.get("use_global_device_ids") == "true":
        return read(partitions * replicas)
    return tuple(tuple(r * partitions + p for r in g for p in each) for g in read(replicas))


def coordinates(mesh: Mesh, devices: Sequence[Any]) -> np.ndarray:
    """Where in the mesh the devices of a program stand.

    Args:
        mesh: the mesh that gives the axes.
        devices: the program's devices; partition i runs on the i-th. Of a mesh over several slices,
            those of one: each runs a copy of its own.

    Returns:
        [len(devices), rank of the mesh] positions.

    Raises:
        ShardingError: the mesh has other devices.
    """
    where = {device: place for place, device in np.ndenumerate(mesh.devices)}
    apart = {getattr(device, "slice_index", None) for device in where}
    one_slice = len(apart) > 1 and len({device.slice_index for device in devices}) == 1
    if set(where) != set(devices) and not (one_slice and set(devices) < set(where)):
        raise ShardingError(
            f"the mesh {format_mesh(mesh)} has {len(where)} devices, the program runs on "
            f"{len(devices)}, and they are not the same ones; pass mesh= the mesh it was "
            f"compiled for"
        )
    return np.array([where[device] for device in devices]).reshape(len(devices), -1)


def axes_of(
    groups: Groups, where: np.ndarray, names: Sequence[str], directed: bool = False
) -> tuple[tuple[str, ...], bool]:
    """The axes of the mesh along which the members of groups differ.

    Args:
        groups: positions in `where`.
        where: the place of every device in the mesh, as `coordinates` gives.
        names: the axes of the mesh.
        directed: the groups are (source, target) pairs, which need not span an axis.

    Returns:
        The smallest set of axes that holds every group, in the order of the mesh; and whether the
        groups are exactly the lines (planes …) of the mesh along them. Half an axis, or some of
        the devices, are not.

    >>> where = np.array([[i, j] for i in range(2) for j in range(4)])
    >>> axes_of(((0, 4), (1, 5), (2, 6), (3, 7)), where, ("data", "tensor"))
    (('data',), True)
    >>> axes_of(((0, 1), (2, 3), (4, 5), (6, 7)), where, ("data", "tensor"))
    (('tensor',), False)
    """
    sizes = where.max(axis=0) + 1
    varies = np.zeros(len(names), bool)
    for group in groups:
        varies |= np.ptp(where[list(group)], axis=0) > 0
    axes = tuple(name for name, moves in zip(names, varies, strict=True) if moves)
    if directed:
        return axes, True
    width = math.prod(sizes[varies].tolist())
    seen = [device for group in groups for device in group]
    whole = sorted(seen) == list(range(len(where))) and all(len(g) == width for g in groups)
    return axes, whole
