"""A layout's seconds and bytes from a `Survey`, within a millisecond: thousands become a few.

Computation is the longer of products at a share of the chip's rate and what they read and write;
collectives are those that the rules imply: parameters gathered over `fsdp` for each pass that reads
them and their gradients scattered, gradients summed over the other axes that cut rows, products
summed over `tensor`, activations sent on along `pipe`. It is also the second opinion beside the
compiler's timetable, and all there is where no compiler is installed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from sharding.mesh import AXES, arranged
from sharding.plan.hardware import Hardware
from sharding.plan.network import Way, seconds, way
from sharding.plan.schedule import MEMORY_SHARE
from sharding.plan.survey import Argument, Kept, Survey

PRODUCTS = 0.85
"""Of the peak rate, what large products reach."""
SPARE = 1.15
"""What alignment and fragments add to arrays that live for a time."""


FOR_A_TIME = ("activations", "temporaries")
"""Kinds of bytes that no argument of the step is."""
_KINDS = ("parameters", "frozen", "optimizer", "batch", *FOR_A_TIME)


@dataclass(frozen=True)
class Estimate:
    """What a step takes.

    Attributes:
        seconds: of it.
        compute: seconds of arithmetic.
        sent: seconds of collectives, by what they are for.
        exposed: of these, what nothing hides.
        held: bytes of a device by kind: parameters, frozen, optimizer, batch, activations,
            temporaries.
        largest: the largest arrays of a device, as (what, bytes).
    """

    seconds: float
    compute: float
    sent: Mapping[str, float]
    exposed: float
    held: Mapping[str, int]
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of a device, all kinds."""
        return sum(self.held.values())


def estimate(
    found: Survey, sizes: Mapping[str, int], machine: Hardware, *, microbatches: int = 1
) -> Estimate:
    """Of a step that lies on a mesh.

    Args:
        found: what it does.
        sizes: of the mesh's axes.
        machine: where it runs.
        microbatches: into which a pipeline cuts the batch.
    """
    compute = _compute(found, sizes, machine, microbatches)
    held, largest = _held(found, sizes)
    sent, hidden = _of_parameters(found, sizes, machine)
    exposed = max(0.0, hidden - machine.chip.hides * compute)
    more, waits = _of_activations(found, sizes, machine, microbatches)
    exposed += waits
    return Estimate(compute + exposed, compute, sent | more, exposed, held, largest)


def _compute(
    found: Survey, sizes: Mapping[str, int], machine: Hardware, microbatches: int
) -> float:
    chip, stages = machine.chip, sizes.get("pipe", 1)
    rate = chip.flops.get("bfloat16", 1.0)
    wait = (stages - 1) / (microbatches + stages - 1)
    work = found.dense / (PRODUCTS * rate) + found.batched / (chip.busy * rate)
    moved = 1.5 * found.moved / (MEMORY_SHARE * chip.hbm)
    # Rows of tables are of a batch, which not all axes cut.
    looked = found.looked / (MEMORY_SHARE * chip.hbm)
    looked /= math.prod(sizes.get(a, 1) for a in found.batch)
    return max(work, moved) / math.prod(sizes.values()) / (1 - wait) + looked


def _held(
    found: Survey, sizes: Mapping[str, int]
) -> tuple[dict[str, int], tuple[tuple[str, int], ...]]:
    """Bytes of a device by kind, and its largest arrays."""
    held: dict[str, int] = dict.fromkeys(_KINDS, 0)
    largest = []
    for argument in found.arguments:
        mine = share(argument, sizes)
        held[argument.kind] += mine
        largest.append((argument.path, mine))
    for one in found.kept:
        mine = _part(one, sizes)
        held["activations"] += int(SPARE * mine)
        largest.append((f"kept of every turn: {one.dtype}{list(one.shape)}", mine))
    held["temporaries"] += int(SPARE * sum(_part(one, sizes) for one in found.body))
    held["temporaries"] += _gathered(found, sizes)
    return held, tuple(sorted(largest, key=lambda item: -item[1])[:5])


def _of_parameters(
    found: Survey, sizes: Mapping[str, int], machine: Hardware
) -> tuple[dict[str, float], float]:
    """Seconds that parameters and their gradients travel, and of these what can be hidden."""
    sent: dict[str, float] = {}
    hidden = 0.0

    def add(what: str, took: float) -> None:
        sent[what] = sent.get(what, 0.0) + took

    for number, uses in found.uses.items():
        argument = found.arguments[number]
        if argument.kind not in ("parameters", "frozen"):
            continue
        cut = [a for axes in argument.cuts for a in axes if sizes.get(a, 1) > 1]
        stored = tuple(a for a in cut if a in found.batch)  # gathered where it is read
        apart = math.prod(sizes[a] for a in cut if a not in found.batch)
        wide = 2 if argument.dtype == "float32" else 1  # it travels in half of them
        whole = argument.bytes // apart // wide
        turns, learns = _turns(found, argument), argument.kind == "parameters"
        if stored:
            n = math.prod(sizes[a] for a in stored)
            each = whole // turns
            route = _route(machine, tuple(sizes.items()), stored)
            gather = uses * turns * seconds("all-gather", route, each // n, each)
            add("gather parameters", gather)
            hidden += gather
            if learns:
                scatter = turns * seconds("reduce-scatter", route, each, each // n)
                add("scatter gradients", scatter)
                hidden += scatter
        rest = tuple(a for a in found.batch if sizes.get(a, 1) > 1 and a not in stored)
        if rest and learns:
            route = _route(machine, tuple(sizes.items()), rest)
            part = whole // max(1, math.prod(sizes[a] for a in stored))
            took = seconds("all-reduce", route, part, part)
            add("sum gradients", took)
            hidden += 0.5 * took
    return sent, hidden


def _of_activations(
    found: Survey, sizes: Mapping[str, int], machine: Hardware, microbatches: int
) -> tuple[dict[str, float], float]:
    """Seconds that activations travel, and of these what nothing hides."""
    sent: dict[str, float] = {}
    exposed = 0.0
    for axis, size, cuts, times in found.summed:
        if sizes.get(axis, 1) > 1:
            part = size // math.prod(sizes.get(a, 1) for a in cuts)
            route = _route(machine, tuple(sizes.items()), (axis,))
            took = times * seconds("all-reduce", route, part, part)
            sent["sum products"] = sent.get("sum products", 0.0) + took
            exposed += took
    for number, size in found.rows.items():
        argument = found.arguments[number]
        cut = tuple(a for a in argument.cuts[0] if a in found.batch and sizes.get(a, 1) > 1)
        if cut and argument.kind == "parameters":  # to who asks for them, and their gradients back
            part = size // math.prod(sizes.get(a, 1) for a in found.batch)
            route = _route(machine, tuple(sizes.items()), cut)
            took = 2 * seconds("all-to-all", route, part, part)
            sent["rows of tables"] = sent.get("rows of tables", 0.0) + took
            exposed += took
    stages, link = sizes.get("pipe", 1), machine.chip.link
    if stages > 1 and found.kept:
        part = max(_part(one, sizes) // max(one.shape[0], 1) for one in found.kept)
        took = 3 * (microbatches + stages) * part / microbatches / link
        sent["send activations on"] = took
        exposed += 0.3 * took
    if sizes.get("sequence", 1) > 1:  # keys and values, and their gradients, of every layer
        part = sum(_part(one, sizes) for one in found.body) // 2
        took = found.turns * part / link
        sent["keys and values round"] = took
        exposed += 0.3 * took
    return sent, exposed


def _turns(found: Survey, argument: Argument) -> int:
    """Of the loop that reads an argument part by part."""
    stacked = len(argument.shape) > 2 and argument.shape[0] == found.turns
    return found.turns if stacked else 1


def share(argument: Argument, sizes: Mapping[str, int]) -> int:
    """Bytes of an argument on one device."""
    cut = math.prod(sizes.get(a, 1) for axes in argument.cuts for a in axes)
    return int(argument.bytes) // cut


def _part(one: Kept, sizes: Mapping[str, int]) -> int:
    return int(one.bytes) // math.prod(sizes.get(a, 1) for a in one.cuts)


def _gathered(found: Survey, sizes: Mapping[str, int]) -> int:
    """Bytes of parameters that are whole at a time, and of their gradients before they are cut."""
    total = 0
    for number in found.uses:
        argument = found.arguments[number]
        stored = [a for axes in argument.cuts for a in axes if a in found.batch]
        if math.prod(sizes.get(a, 1) for a in stored) == 1:
            continue
        turns = _turns(found, argument)
        apart = math.prod(
            sizes.get(a, 1) for axes in argument.cuts for a in axes if a not in found.batch
        )
        total += 2 * (math.prod(argument.shape) // turns // apart)
    return total


@lru_cache(maxsize=4096)
def _route(machine: Hardware, sizes: tuple[tuple[str, int], ...], axes: tuple[str, ...]) -> Way:
    """The way between the devices that differ along some mesh axes."""
    grid = placed(machine, tuple(n for _, n in sizes))
    keep = tuple(slice(None) if a in axes else 0 for a in AXES)
    return way(machine, machine.coords[grid[keep].reshape(-1)])


@lru_cache(maxsize=4096)
def placed(machine: Hardware, shape: tuple[int, ...]) -> np.ndarray:
    """Which device stands where in a mesh of this shape, as `make_mesh` lays it out.

    Args:
        machine: whose devices.
        shape: sizes of all of `AXES`; slices are the outermost part of `data`.
    """
    devices = [
        SimpleNamespace(
            id=n, platform=machine.chip.platform, device_kind=machine.chip.kind, process_index=0,
            coords=[*map(int, place[1:-1]), 0][:3], core_on_chip=int(place[-1]),
            slice_index=int(place[0]),
        )
        for n, place in enumerate(machine.coords)
    ]  # fmt: skip
    sizes = dict(zip(AXES, shape, strict=True))
    if machine.slices > 1 and sizes["data"] % machine.slices == 0:
        sizes |= {"dcn.data": machine.slices, "data": sizes["data"] // machine.slices}
    return np.vectorize(lambda d: d.id, otypes=[int])(arranged(sizes, devices))
