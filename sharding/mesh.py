"""The devices as a grid with named axes.

A mesh made here always has every axis of `AXES`, of size 1 where it was not asked for, so a rule
may name any of them and the same program runs on one device or on thousands. `rules` maps the axes
of arrays to these; `place` puts the arrays there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from sharding.errors import ShardingError, nearest

AXES: tuple[str, ...] = (
    "data",  # copies of the model, each with its own rows of the batch; gradients are summed
    "pipe",  # stages of a stack of layers, one after another; activations pass between neighbours
    "fsdp",  # rows of the batch too, but parameters are cut over it and gathered where used
    "expert",  # rows of the batch too; experts are cut over it, and tokens travel to theirs
    "sequence",  # every text is cut along its length; keys and values go round in a ring
    "tensor",  # every matrix product is cut: the most traffic, so it is the innermost axis
)
"""The mesh axes, from the least communication to the most."""

REST = -1
SLICES = "dcn."
"""The prefix of a size over slices: `dcn.data=2` cuts `data` over two pods, between which the
network is the data centre's (DCN) and not the chips' own."""


def make_mesh(spec: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh that `spec` describes.

    With one process, a spec for fewer devices than there are takes the first of them. With
    several, it must use them all: a process without a device in the mesh could not take part.

    Over several slices (TPU pods, or islands of fast network among GPU machines), `dcn.AXIS=n` says
    which axes are cut over slices and how often; the axis is then n times as long, slices
    outermost. Where devices do not tell their slice, they are n equal parts in order.

    Args:
        spec: sizes by axis, `{"data": 2, "tensor": 4}` or `"dcn.data=2,fsdp=4"`. An axis left out
            has size 1; at most one size may be -1, all the devices that the others leave.
        devices: the `jax.Device`s to use, `jax.devices()` by default.

    Returns:
        A mesh with the axes `AXES`, all of type `AxisType.Auto`, laid out by
        `mesh_utils.create_device_mesh` along the machine's network.

    Raises:
        ShardingError: an unknown axis, a size that is not a positive integer or -1, too few
            devices, a number of devices that the sizes do not divide, or sizes over slices that
            are not the slices there are.

    >>> dict(make_mesh("tensor=1").shape)
    {'data': 1, 'pipe': 1, 'fsdp': 1, 'expert': 1, 'sequence': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ShardingError("no devices to make a mesh of")
    sizes = _filled(spec, len(devices))
    needed = math.prod(sizes.values())
    if needed > len(devices):
        hint = (
            f"; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count={needed}, set before "
            f"jax is first used, makes as many"
            if devices[0].platform == "cpu"
            else ""
        )
        raise ShardingError(
            f"mesh {_join(sizes)} needs {needed} devices, but there are {len(devices)}{hint}"
        )
    processes = len({device.process_index for device in devices})
    if needed < len(devices) and processes > 1:
        raise ShardingError(
            f"mesh {_join(sizes)} uses {needed} of {len(devices)} devices, but {processes} "
            f"processes must use them all; let one axis be -1 to take the rest"
        )
    return Mesh(arranged(sizes, devices[:needed]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Which device stands where in a mesh of as many.

    Args:
        sizes: of every axis of `AXES`, and over slices where there are some.
        devices: whatever has the attributes of a `jax.Device`.

    Returns:
        An array of devices, slices the outermost part of each axis.
    """
    outer, inner = ([sizes.get(prefix + axis, 1) for axis in AXES] for prefix in (SLICES, ""))
    slices = _slices(list(devices), math.prod(outer), _join(sizes))
    grids = [_grid(inner, part) for part in slices]
    grid = np.array(grids).reshape(*outer, *inner)
    # [slices of axis 0, of axis 1 …, axis 0, axis 1 …] → each axis with its slices outermost.
    rank = len(AXES)
    grid = grid.transpose([k for axis in range(rank) for k in (axis, rank + axis)])
    return grid.reshape([a * b for a, b in zip(outer, inner, strict=True)])


def sizes_of(spec: str | Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of every axis of a mesh that takes all of some devices, wherever they are.

    Args:
        spec: as for `make_mesh`.
        devices: how many there are.

    Raises:
        ShardingError: as `make_mesh`, and for a mesh of fewer.

    >>> sizes_of("fsdp=-1,tensor=2", 8)["fsdp"]
    4
    """
    sizes = _filled(spec, devices)
    needed = math.prod(sizes.values())
    if needed != devices:
        raise ShardingError(
            f"mesh {_join(sizes)} has {needed} devices, but there are {devices}; let one axis be "
            "-1 to take the rest"
        )
    return {axis: sizes[axis] * sizes[SLICES + axis] for axis in AXES}


def _filled(spec: str | Mapping[str, int], devices: int) -> dict[str, int]:
    """Every axis with its size, within and over slices; -1 is what the others leave."""
    sizes = _sizes(spec)
    if REST not in sizes.values():
        return sizes
    known = math.prod(size for size in sizes.values() if size != REST)
    if devices % known:
        raise ShardingError(
            f"mesh {_join(sizes)}: {devices} devices cannot be divided by {known}; "
            f"the other sizes must multiply to a divisor of {devices}"
        )
    return {a: devices // known if n == REST else n for a, n in sizes.items()}


def platform(mesh: Mesh | AbstractMesh) -> str:
    """The platform of a mesh's devices: "cpu", "tpu", "gpu"; they need not be here.

    Raises:
        ShardingError: an abstract mesh that does not tell.

    >>> platform(make_mesh("data=1"))
    'cpu'
    """
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    if mesh.abstract_device is None:
        raise ShardingError(
            f"mesh {_join(mesh.shape)}: it is abstract and does not tell of which devices; make it "
            "with abstract_device=jax.sharding.AbstractDevice(kind, cores, platform)"
        )
    return mesh.abstract_device.platform


def _grid(sizes: list[int], devices: list[Any]) -> np.ndarray:
    """Along whole axes of the network where the sizes let it, else along parts of them."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # such as tensor=2 on a torus of 16 x 16
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices: list[Any], count: int, spec: str) -> list[list[Any]]:
    """The devices by slice; those that do not tell theirs in equal parts, in order."""
    by_slice: dict[Any, list[Any]] = {}
    if devices[0].platform == "tpu":
        for device in devices:
            by_slice.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(by_slice) <= 1:
        size = len(devices) // count
        return [devices[i : i + size] for i in range(0, len(devices), size)]
    if len(by_slice) != count or len({*map(len, by_slice.values())}) > 1:
        raise ShardingError(
            f"mesh {spec}: the devices lie in slices of {[*map(len, by_slice.values())]}, but its "
            f"{SLICES} sizes multiply to {count}; say {SLICES}AXIS={len(by_slice)} for the axis "
            f"that is cut over slices, data as a rule"
        )
    return [by_slice[key] for key in sorted(by_slice)]


def format_mesh(mesh: Mesh) -> str:
    """The spec of a mesh: `make_mesh(format_mesh(mesh))` has the same shape.

    Args:
        mesh: any mesh.

    Returns:
        The axes that are longer than 1, slices counted in, as `"data=2,tensor=4"`.

    >>> format_mesh(make_mesh("data=1,tensor=1"))
    'data=1'
    """
    return _join(mesh.shape)


def _join(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


def _sizes(spec: str | Mapping[str, int]) -> dict[str, int]:
    """Every axis with its size (-1 for the rest), checked."""
    given = _parse(spec) if isinstance(spec, str) else dict(spec)
    if not given:
        raise ShardingError("empty mesh: name at least one axis; data=-1 uses every device")
    every = (*(SLICES + axis for axis in AXES), *AXES)
    for axis, size in given.items():
        if axis not in every:
            raise ShardingError(f"unknown mesh axis {axis!r}: {nearest(axis, every)}")
        rest = size == REST and not axis.startswith(SLICES)
        if type(size) is not int or (size < 1 and not rest):
            once = "" if axis.startswith(SLICES) else ", or -1 once"
            raise ShardingError(
                f"mesh axis {axis!r} has size {size!r}; expected an integer from 1{once}"
            )
    sizes = dict.fromkeys(every, 1) | given
    if list(sizes.values()).count(REST) > 1:
        raise ShardingError(f"mesh {_join(sizes)}: only one axis can take the rest (-1)")
    return sizes


def _parse(spec: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        axis, _, size = (part.strip() for part in item.partition("="))
        if axis in sizes:
            raise ShardingError(f"mesh {spec!r} names axis {axis!r} twice")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ShardingError(
                f"mesh {spec!r}: cannot read {item!r}; expected axis=size, as in data=2,fsdp=4"
            ) from None
    return sizes
