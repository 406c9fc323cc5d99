"""The devices as a grid with named axes.

A mesh made here always has every axis of `AXES`, of size 1 where it was not asked for, so a rule
may name any of them and the same program runs on one device or on thousands. `rules` maps the axes
of arrays to these; `place` puts the arrays there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sharding.errors import ShardingError, nearest

AXES: tuple[str, ...] = (
    "data",  # copies of the model, each with its own rows of the batch; gradients are summed
    "fsdp",  # rows of the batch too, but parameters are cut over it and gathered where used
    "tensor",  # every matrix product is cut: the most traffic, so it is the innermost axis
)
"""The mesh axes, from the least communication to the most."""

REST = -1


def make_mesh(spec: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh that `spec` describes.

    With one process, a spec for fewer devices than there are takes the first of them. With
    several, it must use them all: a process without a device in the mesh could not take part.

    Args:
        spec: sizes by axis, `{"data": 2, "tensor": 4}` or `"data=2,tensor=4"`. An axis left out has
            size 1; at most one size may be -1, all the devices that the others leave.
        devices: the `jax.Device`s to use, `jax.devices()` by default.

    Returns:
        A mesh with the axes `AXES`, all of type `AxisType.Auto`, laid out by `jax.make_mesh`
        along the machine's network.

    Raises:
        ShardingError: an unknown axis, a size that is not a positive integer or -1, too few
            devices, or a number of devices that the sizes do not divide.

    >>> dict(make_mesh("data=1,tensor=1").shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    sizes = _sizes(spec)
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ShardingError("no devices to make a mesh of")
    known = math.prod(size for size in sizes.values() if size != REST)
    if REST in sizes.values():
        if len(devices) % known:
            raise ShardingError(
                f"mesh {_join(sizes)}: {len(devices)} devices cannot be divided by {known}; "
                f"the other sizes must multiply to a divisor of {len(devices)}"
            )
        sizes = {a: len(devices) // known if n == REST else n for a, n in sizes.items()}
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
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[:needed])


def format_mesh(mesh: Mesh) -> str:
    """The spec of a mesh: `make_mesh(format_mesh(mesh))` has the same shape.

    Args:
        mesh: any mesh.

    Returns:
        All its axes and sizes, as `"data=2,fsdp=2,tensor=1"`.

    >>> format_mesh(make_mesh({"data": 1}))
    'data=1,fsdp=1,tensor=1'
    """
    return _join(mesh.shape)


def _join(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _sizes(spec: str | Mapping[str, int]) -> dict[str, int]:
    """Every axis with its size (-1 for the rest), checked."""
    given = _parse(spec) if isinstance(spec, str) else dict(spec)
    if not given:
        raise ShardingError("empty mesh: name at least one axis; data=-1 uses every device")
    for axis, size in given.items():
        if axis not in AXES:
            raise ShardingError(f"unknown mesh axis {axis!r}: {nearest(axis, AXES)}")
        if type(size) is not int or (size < 1 and size != REST):
            raise ShardingError(
                f"mesh axis {axis!r} has size {size!r}; expected an integer from 1, or -1 once"
            )
    sizes = dict.fromkeys(AXES, 1) | given
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
