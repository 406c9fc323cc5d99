"""A tree of arrays as rows: repeated layers together, and what it all comes to on a device."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sharding.mesh import format_mesh
from sharding.visualize.facts import Leaf
from sharding.visualize.words import count, mesh_text, ranges, size

_MARKED = 0.01  # the share of a device's bytes from which a replicated leaf is marked


@dataclass(frozen=True)
class Row:
    """Leaves that differ in nothing but the numbers in their paths.

    Attributes:
        path: with the numbers as `{0..5}`.
        count: how many.
        leaf: one of them.
        marked: whether it is replicated and large.
    """

    path: str
    count: int
    leaf: Leaf
    marked: bool = False

    @property
    def total(self) -> int:
        """Bytes of all of them, once."""
        return self.count * self.leaf.total

    @property
    def per_device(self) -> int:
        """Bytes of all of them on each device."""
        return self.count * self.leaf.per_device


@dataclass(frozen=True)
class Table:
    """A tree of arrays.

    Attributes:
        leaves: every array, in the tree's order.
        by_bytes: the rows' order: the largest on a device first, else the tree's.
    """

    leaves: tuple[Leaf, ...]
    by_bytes: bool = False

    @cached_property
    def rows(self) -> list[Row]:
        """The leaves, repeated layers as one row."""
        least = _MARKED * self.per_device
        rows = [
            Row(path, len(like), like[0], like[0].replicated and _size(like) >= max(least, 1))
            for path, like in _collapse(self.leaves)
        ]
        return sorted(rows, key=lambda row: -row.per_device) if self.by_bytes else rows

    @cached_property
    def bytes_by_device(self) -> dict[int, int]:
        """The bytes of all leaves on each device, by its id."""
        # Leaves share few sets of devices, and a set may have thousands.
        by_set: dict[frozenset[Any], int] = {}
        for leaf in self.leaves:
            devices = frozenset(leaf.sharding.device_set)
            by_set[devices] = by_set.get(devices, 0) + leaf.per_device
        found: dict[int, int] = {}
        for devices, amount in by_set.items():
            for device in devices:
                found[device.id] = found.get(device.id, 0) + amount
        return dict(sorted(found.items()))

    @property
    def devices(self) -> int:
        """How many devices hold something."""
        return len(self.bytes_by_device)

    @property
    def per_device(self) -> int:
        """Bytes on the fullest device."""
        return max(self.bytes_by_device.values(), default=0)

    @property
    def total(self) -> int:
        """Bytes of all arrays, each once."""
        return sum(leaf.total for leaf in self.leaves)

    @property
    def even(self) -> float:
        """Bytes that a device would hold if nothing were repeated: total / devices."""
        return self.total / max(self.devices, 1)

    @property
    def replicated(self) -> int:
        """Bytes on each device of leaves that every device holds whole."""
        return sum(leaf.total for leaf in self.leaves if leaf.replicated)

    @property
    def meshes(self) -> str:
        """The spec of the mesh; several if the leaves lie on several."""
        found = dict.fromkeys(format_mesh(leaf.mesh) for leaf in self.leaves if leaf.mesh)
        return " and ".join(found)

    @property
    def cutting(self) -> list[str]:
        """The mesh axes that cut some leaf, in the order of the mesh."""
        used = {axis for leaf in self.leaves for axes in leaf.over for axis in axes}
        order = dict.fromkeys(a for leaf in self.leaves if leaf.mesh for a in leaf.mesh.axis_names)
        return [axis for axis in order if axis in used]

    @property
    def title(self) -> str:
        """The mesh and its devices."""
        return mesh_text(self.meshes, self.devices)

    @property
    def summary(self) -> list[str]:
        """What the leaves come to, in two lines."""
        least, most = min(self.bytes_by_device.values()), self.per_device
        each = size(most) if least == most else f"{size(least)} to {size(most)}"
        where = f"{'each of ' * (self.devices > 1)}{count(self.devices)}"
        lines = [f"{each} on {where}, {size(self.total)} in all"]
        if self.devices > 1 and self.even:
            lines.append(
                f"{most / self.even:.3g} × an even share ({size(self.even)}); "
                f"{size(self.replicated)} whole on every device"
            )
        return lines


def _size(leaves: Collection[Leaf]) -> int:
    return sum(leaf.per_device for leaf in leaves)


_Numbers = tuple[int, ...]
_Part = tuple[str, _Numbers]  # "layers_" and its numbers; () for a segment without one


def _collapse(leaves: Iterable[Leaf]) -> list[tuple[str, list[Leaf]]]:
    """Leaves that look alike and whose paths differ in numbers, in the order of the first."""
    groups = [([*map(_part, leaf.path.split("/"))], [leaf]) for leaf in leaves]
    deepest = max((len(parts) for parts, _ in groups), default=0)
    # One position after another, from the last: what merges is always a full grid of numbers.
    for at in reversed(range(deepest)):
        seen: dict[object, tuple[list[_Part], list[Leaf]]] = {}
        kept: list[tuple[list[_Part], list[Leaf]]] = []
        for group in groups:
            parts, like = group
            if at < len(parts) and parts[at][1]:
                rest = (*parts[:at], parts[at][0], *parts[at + 1 :])
                before, before_like = seen.setdefault((rest, like[0].look), group)
                if before is not parts:
                    before[at] = (before[at][0], (*before[at][1], *parts[at][1]))
                    before_like += like
                    continue
            kept.append(group)
        groups = kept
    return [("/".join(map(_text, parts)), like) for parts, like in groups]


def _part(segment: str) -> _Part:
    prefix, number = re.fullmatch(r"(.*?)(0|[1-9]\d*)?", segment, re.DOTALL).groups()  # pyright: ignore
    return (prefix, () if number is None else (int(number),))


def _text(part: _Part) -> str:
    prefix, numbers = part
    if len(numbers) > 1:
        return f"{prefix}{{{ranges(numbers, dash='..')}}}"
    return prefix + "".join(map(str, numbers))
