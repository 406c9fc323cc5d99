"""Seconds that a collective takes, by the links between those who take part.

Bytes come from the program, links from `chips`. On a torus a line of chips that closes into a ring
sends both ways at once, one that does not only one way; several axes work side by side (Jouppi et
al. 2023, arXiv:2304.01433). GPUs of a node reach each other alike, others through their network
cards; slices through the data centre's network. What goes over both goes first within, then across.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sharding.plan.hardware import Hardware

HOP = 1e-6
"""Seconds that a message takes to a torus' next chip (jax-ml.github.io/scaling-book)."""
ACROSS = 10e-6
"""Seconds that a message takes to another node or slice."""
DIE = 600e9
"""Bytes a second between the two devices of one chip."""


@dataclass(frozen=True)
class Way:
    """How the members of a group reach each other.

    Attributes:
        inside: how many are in one slice or node.
        rate: bytes a second that one of them sends there, all its links together.
        spread: by the name of links inside, axes of a torus, "die" or "node": for how many members
            one of them carries what goes from each to each.
        hops: links between the farthest, inside.
        outside: slices or nodes.
        rate_outside: bytes a second that one member sends there.
        link: bytes a second of one link inside.
    """

    inside: int
    rate: float
    spread: Mapping[str, float]
    hops: float
    outside: int
    rate_outside: float
    link: float


NETWORK = "network"
"""The name of what goes to other slices or nodes."""


def way(machine: Hardware, coords: np.ndarray) -> Way:
    """How the devices at some places reach each other.

    Args:
        machine: where they are.
        coords: int [members, 2 + axes], as in `Hardware.coords`.

    >>> from sharding.plan.hardware import hardware
    >>> pod = hardware("v5e:16x16")
    >>> found = way(pod, pod.coords)  # all of a pod: two axes that close, both ways
    >>> found.inside, found.rate
    (256, 180000000000.0)
    >>> way(pod, pod.coords[:4]).rate  # four neighbours on a line that does not
    45000000000.0
    """
    chip = machine.chip
    outer = len({*coords[:, 0].tolist()}) if chip.dims else len({*coords[:, 1].tolist()})
    first = coords[coords[:, 0 if chip.dims else 1] == coords[0, 0 if chip.dims else 1]]
    inside = len(first)
    rate_outside = chip.dcn * (min(inside, machine.shape[-1]) if not chip.dims else inside)
    rate_outside /= inside
    if chip.platform == "cpu" or chip.dims == 0:
        return Way(inside, chip.link, {"node": 1}, 1, outer, rate_outside, chip.link)
    rate, hops, spread = 0.0, 0.0, {}
    for axis, (size, closed) in enumerate(zip(machine.shape, machine.wrapped, strict=True)):
        places = np.unique(first[:, 1 + axis])
        if (extent := len(places)) == 1:
            continue
        apart = int(np.diff(places).min())  # others' traffic shares the links in between
        ring = extent == size and closed and size > 2
        rate += (2 if ring else 1) * chip.link / apart / chip.together
        spread["xyz"[axis]] = (extent / 8 if ring else extent / 4) * apart * chip.together
        hops += extent / 2 if ring else extent - 1
    if rate == 0:  # the devices of one chip
        return Way(inside, DIE, {"die": 1}, 1, outer, rate_outside, DIE)
    return Way(inside, rate, spread, hops, outer, rate_outside, chip.link)


def seconds(kind: str, route: Way, operand: int, result: int) -> float:
    """How long a collective takes that has the network to itself.

    Args:
        kind: as in `sharding.Collective`.
        route: between its members.
        operand, result: bytes on one device.

    >>> ring = Way(4, 100e9, {"x": 0.5}, hops=2, outside=1, rate_outside=1e9, link=50e9)
    >>> round(seconds("all-gather", ring, 10**9, 4 * 10**9), 3)
    0.03
    >>> round(seconds("all-reduce", ring, 10**9, 10**9), 3)
    0.015
    """
    links, outer = carried(kind, route, operand, result)
    inner = max(links.values(), default=0.0)
    n, m = route.inside, route.outside
    if kind in _ONE_TO_ONE:
        slow = route.link if m == 1 else min(route.link, route.rate_outside)
        return (inner + outer) / slow + (HOP if m == 1 else ACROSS)
    times = 2 if kind == "all-reduce" else 1
    late = times * (HOP * route.hops if n > 1 else 0) + times * (ACROSS if m > 1 else 0)
    return inner / route.link + outer / route.rate_outside + late


_ONE_TO_ONE = ("collective-permute", "collective-broadcast")


def carried(kind: str, route: Way, operand: int, result: int) -> tuple[dict[str, float], float]:
    """Bytes that a collective sends over each link inside, by its name, and a member outside.

    Args:
        kind, route, operand, result: as in `seconds`.

    >>> ring = Way(4, 100e9, {"x": 0.5}, hops=2, outside=1, rate_outside=1e9, link=50e9)
    >>> carried("all-gather", ring, 10**9, 4 * 10**9)  # three parts, half of each either way
    ({'x': 1500000000.0}, 0.0)
    """
    n, m = route.inside, route.outside

    def each(amount: float) -> dict[str, float]:
        return dict.fromkeys(route.spread, amount) if n > 1 else {}

    if kind in _ONE_TO_ONE:
        return (each(operand), 0.0) if m == 1 else ({}, operand)
    links = route.rate / route.link  # side by side
    if kind.endswith("all-to-all"):
        inner = each(operand * (n - 1) / n / links)
        if route.hops > 1:
            inner = {name: operand * spread for name, spread in route.spread.items()}
        return inner, operand * (m - 1) / m
    whole = result if kind == "all-gather" else operand
    times = 2 if kind == "all-reduce" else 1
    inner = each(times * whole * (n - 1) / n / links)
    return inner, times * whole / n * (m - 1) / m  # each member sends its part across
