"""Machines that need not be here: what users write (`v5p:8x8x16`), checked, as devices and links.

A machine is slices or nodes of one kind of chip. Within a slice chips have neighbours on a torus;
GPUs of a node reach each other alike. `chips` knows the chip, `network` times what is sent.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from sharding.errors import ShardingError, nearest
from sharding.plan.chips import CHIPS, Chip, GiB

GPUS = 8
"""Of a node."""

_PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of a cube of 4 x 4 x 4
_CUBE = 4


@dataclass(frozen=True)
class Hardware:
    """Some slices of a shape, nodes of GPUs, or a CPU; made by `hardware`.

    Attributes:
        chip: what it is made of.
        shape: chips of a slice along the axes of its torus; (nodes, GPUs) of GPUs; (cores,).
        slices: how many there are; of a CPU, how many devices JAX makes of it.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        """As users write it."""
        if self.chip.platform == "cpu":
            return "cpu" if self.slices == 1 else f"{self.slices}*cpu"
        name = f"{self.chip.name}:{_join(self.shape)}"
        return name if self.slices == 1 else f"{self.slices}*{name}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * (1 if self.chip.platform == "cpu" else math.prod(self.shape))

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.together

    @cached_property
    def wrapped(self) -> tuple[bool, ...]:
        """Along which axes of a slice the last chip is the first one's neighbour.

        On a plane where it has all 16 chips of a pod's side; in space where it is made of whole
        cubes, whose faces optical switches connect.
        """
        if self.chip.dims == 2:
            return tuple(size == 16 for size in self.shape)
        whole = all(size % _CUBE == 0 for size in self.shape)
        return tuple(whole for _ in self.shape)

    @cached_property
    def coords(self) -> np.ndarray:
        """Where every device is: int [devices, 2 + axes], (slice, place..., device of a chip)."""
        if self.chip.dims == 0:
            shape = self.shape if self.chip.platform == "gpu" else (1, self.slices)
            return np.array([(0, *place, 0) for place in np.ndindex(*shape)])
        grid = [
            (s, *reversed(place), core)
            for s in range(self.slices)
            for place in np.ndindex(*reversed(self.shape))
            for core in range(self.chip.together)
        ]
        return np.array(grid)


def hardware(text: str) -> Hardware:
    """The machine that a text means.

    Args:
        text: `v5e:16x16`; `2*v5p:8x8x8`, two slices; `h100:4x8`, four nodes of eight; `cpu`, this
            machine.

    Returns:
        The machine.

    Raises:
        ShardingError: a chip that is not known, a shape that no slice has; with the nearest ones.

    >>> machine = hardware("2*v5p:4x4x8")
    >>> machine.chips, str(machine), machine.wrapped
    (256, '2*v5p:4x4x8', (True, True, True))
    >>> hardware("v5e:3x5")
    Traceback (most recent call last):
    ...
    sharding.errors.ShardingError: v5e has no slice of 3x5 (15 chips); the nearest are 4x4, 2x4
    """
    if one := re.fullmatch(r"(?:([1-9]\d*)\*)?cpu", text):
        return Hardware(this_cpu(), (_cores(),), int(one[1] or 1))
    found = re.fullmatch(r"(?:(\d+)\*)?([\w-]+?)(?::(\d+(?:x\d+)*))?", text)
    if found is None or found[2] not in CHIPS or found[3] is None:
        name = found[2] if found else text
        if found and name in CHIPS:
            shapes = ", ".join(f"{name}:{_join(s)}" for s in [*legal(CHIPS[name])][:8])
            raise ShardingError(f"hardware {text!r} says no shape; such as {shapes}")
        raise ShardingError(
            f"hardware {text!r} is unknown: {nearest(name, [*CHIPS, 'cpu'])}; expected CHIP:SHAPE, "
            "as in v5e:16x16, 2*v5p:8x8x8 (two slices) or h100:4x8 (four nodes of eight), or cpu"
        )
    chip, shape = CHIPS[found[2]], tuple(map(int, found[3].split("x")))
    slices = int(found[1] or 1)
    if slices < 1:
        raise ShardingError(f"hardware {text!r}: expected one slice or more")
    if chip.dims == 0:
        if len(shape) > 2 or 0 in shape or (len(shape) == 2 and not _node(*shape)):
            raise ShardingError(
                f"{chip.name}:{_join(shape)}: expected nodes x GPUs of a node, which has {GPUS}, "
                f"as in {chip.name}:4x{GPUS}, or {chip.name}:1x1, 1x2 and 1x4 of one"
            )
        nodes, each = shape if len(shape) == 2 else (1, *shape)
        if not _node(nodes, each):
            raise ShardingError(f"{chip.name}:{each}: a node has 1, 2, 4 or {GPUS} GPUs of yours")
        return Hardware(chip, (nodes * slices, each))
    known = [*legal(chip)]
    if shape not in known:
        size = math.prod(shape)
        near = sorted(known, key=lambda s: (abs(math.log(math.prod(s) / max(size, 1))), s))[:2]
        raise ShardingError(
            f"{chip.name} has no slice of {_join(shape)} ({size} chips); the nearest are "
            f"{', '.join(map(_join, near))}"
        )
    return Hardware(chip, shape, slices)


def legal(chip: Chip) -> Iterator[tuple[int, ...]]:
    """The shapes that slices of a TPU have, the smallest first.

    >>> [*legal(CHIPS["v5e"])][-1], len([*legal(CHIPS["v5p"])])
    ((16, 16), 52)
    """
    if chip.dims == 2:
        yield from _PLANE
    elif chip.dims == 3:
        sides = range(_CUBE, 25, _CUBE)
        cubes = [s for s in product(sides, sides, sides) if s == tuple(sorted(s))]
        cubes = [s for s in cubes if math.prod(s) <= chip.most]
        yield from (*_PARTS, *sorted(cubes, key=lambda s: (math.prod(s), s)))
    else:
        yield from ((1, 1), (1, 2), (1, 4), (1, GPUS), (2, GPUS), (4, GPUS))


def this_cpu() -> Chip:
    """This machine, as far as it tells: memory, cores, and rates by the kind of its cores."""
    cores = _cores()
    vector = _flags() & {"avx512_bf16", "avx512f", "avx2"}
    # f32 products and sums that one core of this class does a cycle, two units; XLA reaches half.
    lanes = 64 if {"avx512f", "avx512_bf16"} & vector else 32 if vector else 16
    rate = 0.5 * lanes * 3.0e9 * cores
    faster = 2 if "avx512_bf16" in vector else 1
    sources = {
        "memory": "this machine", "flops": f"{cores} cores, {lanes} a cycle, 3 GHz, half of it",
        "hbm": "a guess: 10 GB/s a core",
    }  # fmt: skip
    return Chip(
        "cpu", "cpu", "cpu", _memory(), {"float32": rate, "bfloat16": faster * rate},
        hbm=10e9 * cores, link=10e9, dcn=1e9, price=0.0, sources=sources,
    )  # fmt: skip


def _node(nodes: int, each: int) -> bool:
    return each == GPUS or (nodes == 1 and each in (1, 2, 4))


def _join(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 8 * GiB


def _flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()
