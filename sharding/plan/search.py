"""Every layout that a step could have on a machine, and the few that are worth a compiler's time.

A candidate is a mesh and a variant, a way to write the step: what it computes again, into how many
microbatches it cuts the batch, what its optimiser keeps. Thousands are estimated; those that could
fit go to the compiler, the fastest first, no two alike as long as others wait.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharding.errors import ShardingError
from sharding.mesh import AXES
from sharding.plan.analytic import Estimate, estimate
from sharding.plan.hardware import Hardware
from sharding.plan.survey import Survey

ROOM = 1.3
"""How many times the memory an estimate may exceed before the compiler is not asked: estimates know
neither what the compiler fuses nor what it fragments."""
LONGEST = {"tensor": 64, "sequence": 64, "pipe": 64, "expert": 256}
"""The most parts along an axis that are tried."""

_INNER = ("tensor", "sequence", "pipe", "expert")

Build = Callable[[Any], tuple[Callable[..., Any], Sequence[Any]]]
"""Makes a step for a mesh, abstract or not: a function, and its arguments as they lie there."""


@dataclass(frozen=True)
class Variant:
    """One way to write a step.

    Attributes:
        build: makes the step for a mesh: a function, and its arguments with shardings of the mesh.
        choices: what distinguishes it, for people and for whoever trains by the plan.
        staged: microbatches for each stage of a pipeline.
        kinds: what whole arguments are, by number, where their paths do not say; see `kind_of`.
        flops: that this way needs, where it needs less than others.
        whole: mesh axes that it cannot be cut over.
    """

    build: Build
    choices: Mapping[str, str] = field(default_factory=dict)
    staged: int = 2
    kinds: Mapping[int, str] = field(default_factory=dict)
    flops: float | None = None
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A layout.

    Attributes:
        mesh: its spec, as for `make_mesh`.
        sizes: of all axes.
        variant: how the step is written.
        estimate: what it should take.
    """

    mesh: str
    sizes: Mapping[str, int]
    variant: Variant
    estimate: Estimate

    def __str__(self) -> str:
        """The mesh and the choices."""
        return " ".join([self.mesh, *(f"{k}={v}" for k, v in self.variant.choices.items())])


def spec_of(sizes: Mapping[str, int], machine: Hardware) -> str:
    """The spec of a mesh; several slices are the outermost part of `data`.

    >>> from sharding.plan.hardware import hardware
    >>> spec_of({"data": 4, "fsdp": 32}, hardware("2*v5e:8x8"))
    'dcn.data=2,data=2,fsdp=32'
    """
    parts = {axis: sizes.get(axis, 1) for axis in AXES}
    outer = ""
    if machine.slices > 1 and machine.chip.platform != "cpu":
        parts["data"] //= machine.slices
        outer = f"dcn.data={machine.slices},"
    text = ",".join(f"{axis}={n}" for axis, n in parts.items() if n > 1)
    return (outer + text).rstrip(",") or "data=1"


def meshes(found: Survey, machine: Hardware, whole: Sequence[str] = ()) -> Iterator[dict[str, int]]:
    """Sizes of all meshes that the step's arrays can be cut over, but for axes that stay whole.

    Raises:
        ShardingError: there are none; what stands against the last way to cut.
    """
    devices = machine.devices
    useful = {a for arg in found.arguments for cut in arg.cuts for a in cut}
    useful |= {a for cuts in found.said.values() for cut in cuts for a in cut}
    inner = {a for a in useful if a not in found.batch}
    # `expert` cuts rows like `fsdp` does; it is of use where there are experts besides.
    shared = {
        a
        for arg in found.arguments
        for cut in arg.cuts
        if len(arg.shape) > 2
        for a in cut
        if a == "expert" and cut == ("expert",)
    }
    axes = [a for a in AXES if a in inner | shared | ({*found.batch} - {"expert"})]
    axes = [a for a in axes if a not in whole]
    shapes = divided(found)
    any_fits = False
    for sizes in _factors(devices, axes):
        full = dict.fromkeys(AXES, 1) | sizes
        if machine.chip.dims and full["data"] % machine.slices:
            continue
        if any(n > LONGEST.get(a, devices) for a, n in full.items()):
            continue
        if against(shapes, full) is None:
            any_fits = True
            yield full
    if not any_fits:
        full = dict.fromkeys(AXES, 1) | {axes[0] if axes else "data": devices}
        why = against(shapes, full) or "no axis of the step is cut by a mesh axis"
        raise ShardingError(f"no mesh of {devices} devices cuts this step: {why}")


def divided(found: Survey) -> list[tuple[tuple[int, ...], Any]]:
    """The shapes that a mesh must divide, with their cuts.

    Not what an optimiser keeps: what of that does not divide lies whole.
    """
    own = [a for a in found.arguments if a.kind != "optimizer"]
    return [*((a.shape, a.cuts) for a in own), *found.said.items()]


def against(shapes: Sequence[tuple[tuple[int, ...], Any]], sizes: Mapping[str, int]) -> str | None:
    """What a mesh cannot cut; None if it can cut everything."""
    for shape, cuts in shapes:
        for size, cut in zip(shape, cuts, strict=False):
            parts = math.prod(sizes.get(a, 1) for a in cut)
            if parts > 1 and size % parts:
                over = ",".join(a for a in cut if sizes.get(a, 1) > 1)
                return f"an axis of {size} does not divide into {parts} parts ({over})"
    return None


def _factors(devices: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    if not axes:
        if devices == 1:
            yield {}
        return
    head, *rest = axes
    for size in range(1, devices + 1):
        if devices % size == 0:
            for others in _factors(devices // size, rest):
                yield {head: size, **others}


def candidates(surveys: Sequence[tuple[Variant, Survey]], machine: Hardware) -> list[Candidate]:
    """All layouts of all variants with what they should take, the fastest that could fit first.

    Raises:
        ShardingError: no mesh cuts the step, or nothing could fit, however it is cut.
    """
    found = []
    for variant, one in surveys:
        for sizes in meshes(one, machine, variant.whole):
            took = estimate(one, sizes, machine, microbatches=variant.staged * sizes["pipe"])
            found.append(Candidate(spec_of(sizes, machine), sizes, variant, took))
    could = [c for c in found if c.estimate.peak <= ROOM * machine.chip.memory]
    if not could:
        least = min(found, key=lambda c: c.estimate.peak)
        kinds = ", ".join(f"{k} {v / 2**30:.1f}" for k, v in least.estimate.held.items() if v)
        raise ShardingError(
            f"no layout fits {machine}: the least is {least.estimate.peak / 2**30:.1f} GiB a "
            f"device of {machine.chip.memory / 2**30:.1f}, by {least} ({kinds} GiB); take more "
            "devices, fewer or shorter rows, 8-bit moments or adapters"
        )
    return sorted(could, key=lambda c: (c.estimate.seconds, c.estimate.peak))


def kind(one: Candidate) -> tuple[Any, ...]:
    """What layouts have in common whose estimates err alike: ways to cut, and to write the step."""
    parts = (one.sizes.get(a, 1) > 1 for a in _INNER)
    return *parts, *(v for k, v in one.variant.choices.items() if k != "accumulate")


def shortlist(every: Sequence[Candidate], count: int, memory: int) -> list[Candidate]:
    """The few that may be compiled: fast, likely to fit, and unlike each other.

    Of the meshes that cut products, lengths and layers alike, at most two are taken with each way
    to write the step, microbatches aside.
    """
    chosen: list[Candidate] = []
    often: dict[Any, int] = {}
    for one in sorted(every, key=lambda one: _place(one, memory)):
        key = kind(one), *(one.sizes.get(a, 1) for a in _INNER)
        if often.get(key, 0) < 2:
            often[key] = often.get(key, 0) + 1
            chosen.append(one)
        if len(chosen) == count:
            break
    return chosen


def promising(
    waiting: Sequence[Candidate], count: int, learnt: Mapping[Any, tuple[float, float]], memory: int
) -> list[Candidate]:
    """Which to compile next, of as many kinds as there are.

    The first is cut over as few axes as can be: its estimate errs least, and others are measured
    by it until their own kind is known.

    Args:
        waiting: those that could be.
        count: how many.
        learnt: by `kind`, how many times an estimate's seconds and bytes were exceeded.
        memory: of a device.
    """
    usual = min((slower for slower, _ in learnt.values()), default=1.0)

    def place(one: Candidate) -> tuple[int, tuple[bool, float, float]]:
        slower, larger = learnt.get(kind(one), (usual, 1.0))
        axes = 0 if learnt else sum(kind(one)[: len(_INNER)])
        return axes, _place(one, memory, slower, larger)

    ranked = sorted(waiting, key=place)
    first = {kind(one): one for one in reversed(ranked)}
    unlike = [one for one in ranked if first[kind(one)] is one]
    return [*unlike, *(one for one in ranked if one not in unlike)][:count]


def _place(
    one: Candidate, memory: int, slower: float = 1.0, larger: float = 1.0
) -> tuple[bool, float, float]:
    """Where a candidate stands in the queue for the compiler.

    What should not fit waits behind what should, unless it may and is a tenth faster. Seconds that
    should be hidden count a tenth: some never are.
    """
    own = one.estimate
    risk = slower * (own.seconds + 0.1 * sum(own.sent.values()))
    peak = larger * own.peak
    return peak > ROOM * memory, risk * (1.1 if peak > memory else 1.0), peak
