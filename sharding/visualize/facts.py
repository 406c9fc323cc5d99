"""One array as it lies on its devices: blocks, devices, bytes. Only metadata is read.

`Leaf` knows what is where; `Grid` puts its blocks in rows and columns. `table` gathers leaves;
`terminal` and `svg` draw.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product

from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from sharding.mesh import format_mesh
from sharding.rules import Names, mesh_axes
from sharding.visualize.words import Word, count, joined, mesh_text, said, size

Index = tuple[tuple[int, int], ...]
"""Where a block lies in its array: start and stop an axis."""

_ON_CHIP = (None, "device", "unpinned_host")  # memory kinds; the last was the CPU's default


@dataclass(frozen=True)
class Leaf:
    """An array as it lies on its devices.

    Attributes:
        path: its path, "" for an array alone.
        shape: of the whole.
        dtype: as text.
        itemsize: bytes an element.
        sharding: where it lies.
        names: its axes' names, if the caller gave any.

    >>> import jax
    >>> from sharding import make_mesh
    >>> where = NamedSharding(make_mesh("data=1"), jax.P("data"))
    >>> Leaf("x", (4, 2), "float32", 4, where).blocks
    {((0, 4), (0, 2)): (0,)}
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    sharding: Sharding
    names: Names | None = None

    @cached_property
    def block(self) -> tuple[int, ...]:
        """The shape of what one device holds."""
        return self.sharding.shard_shape(self.shape)

    @property
    def total(self) -> int:
        """Bytes of the whole array, once."""
        return math.prod(self.shape) * self.itemsize

    @property
    def per_device(self) -> int:
        """Bytes on each of its devices."""
        return math.prod(self.block) * self.itemsize

    @property
    def mesh(self) -> Mesh | None:
        """The mesh it lies on; None where its sharding has none."""
        mesh = getattr(self.sharding, "mesh", None)
        return mesh if isinstance(mesh, Mesh) else None

    @cached_property
    def ways(self) -> tuple[int, ...]:
        """How many parts each axis is cut into."""
        return tuple(n // max(part, 1) or 1 for n, part in zip(self.shape, self.block, strict=True))

    @property
    def cut(self) -> list[int]:
        """The axes that are cut."""
        return [axis for axis, ways in enumerate(self.ways) if ways > 1]

    @cached_property
    def over(self) -> tuple[tuple[str, ...], ...]:
        """The mesh axes, longer than 1, that cut each axis; outermost first."""
        none = ((),) * len(self.shape)
        if not isinstance(self.sharding, NamedSharding):
            return none
        sizes = self.sharding.mesh.shape
        entries = [
            # An entry may be UNCONSTRAINED, which cuts nothing.
            tuple(a for a in mesh_axes(entry) if sizes[a] > 1)
            if isinstance(entry, str | tuple)
            else ()
            for entry in self.sharding.spec
        ]
        return (*entries, *none)[: len(self.shape)]

    @property
    def copies(self) -> tuple[str, ...]:
        """The mesh axes, longer than 1, along which every block is repeated."""
        if self.mesh is None:
            return ()
        used = {axis for axes in self.over for axis in axes}
        return tuple(a for a, size in self.mesh.shape.items() if size > 1 and a not in used)

    @property
    def replicated(self) -> bool:
        """Whether each of several devices holds all of it."""
        return self.sharding.num_devices > 1 and self.block == self.shape

    @property
    def blocks(self) -> dict[Index, tuple[int, ...]]:
        """The ids of the devices that hold each block, in the order of the blocks."""
        found: dict[Index, list[int]] = {}
        for device, slices in self.sharding.devices_indices_map(self.shape).items():
            spans = (part.indices(n)[:2] for part, n in zip(slices, self.shape, strict=True))
            found.setdefault(tuple(spans), []).append(device.id)
        return {index: tuple(sorted(ids)) for index, ids in sorted(found.items())}

    @property
    def words(self) -> list[Word]:
        """Its sharding in the caller's own names, else as a PartitionSpec.

        Mesh axes of length 1 cut nothing and are left out.
        """
        words: list[Word]
        if not isinstance(self.sharding, NamedSharding):
            alone = isinstance(self.sharding, SingleDeviceSharding)
            words = [("1 device" if alone else type(self.sharding).__name__, None)]
        elif self.names is not None:
            words = self._named() or [("scalar", None)]
        else:
            words = self._spec()
        kind = self.sharding.memory_kind
        return words if kind in _ON_CHIP else [*words, (f" in {kind}", None)]

    @property
    def look(self) -> object:
        """Equal for arrays that differ in their paths alone."""
        return self.shape, self.dtype, self.mesh or self.sharding, said(self.words)

    def _named(self) -> list[Word]:
        words: list[Word] = []
        for name, axes in zip(self.names or (), self.over, strict=True):
            words += [(", ", None)] if words else []
            words += [(name or "–", None), *([("→", None)] if axes else []), *joined(axes, "+", "")]
        return words

    def _spec(self) -> list[Word]:
        entries = list(self.over)
        while entries and not entries[-1]:
            entries.pop()
        words: list[Word] = [("P(", None)]
        for i, axes in enumerate(entries):
            words += [(", ", None)] if i else []
            if len(axes) > 1:
                words += [("(", None), *joined(axes, ", ", "'"), (")", None)]
            else:
                words += joined(axes, "", "'") or [("None", None)]
        return [*words, (")", None)]


@dataclass(frozen=True)
class Grid:
    """The blocks of one array in rows and columns, and planes if more than two axes are cut.

    >>> import jax
    >>> from sharding import make_mesh
    >>> cells = Grid(Leaf("", (4,), "int8", 1, NamedSharding(make_mesh("data=1"), jax.P())))
    >>> cells.axes, cells.devices(0, 0, ())
    ((None, None), (0,))
    """

    leaf: Leaf

    @property
    def axes(self) -> tuple[int | None, int | None]:
        """The axes of the array that go down and across."""
        cut = self.leaf.cut
        if len(cut) == 1:
            last = cut[0] == len(self.leaf.shape) - 1
            return (None, cut[0]) if last else (cut[0], None)
        return (cut[0], cut[1]) if cut else (None, None)

    @cached_property
    def _cells(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Devices by the number of the block along each cut axis."""
        cut, block = self.leaf.cut, self.leaf.block
        return {
            tuple(index[axis][0] // block[axis] for axis in cut): ids
            for index, ids in self.leaf.blocks.items()
        }

    def devices(self, row: int, column: int, plane: tuple[int, ...]) -> tuple[int, ...]:
        """The devices that hold a block."""
        pairs = zip(self.axes, (row, column), strict=True)
        return self._cells[*(at for axis, at in pairs if axis is not None), *plane]

    def ways(self, way: int) -> int:
        """How many rows (0) or columns (1) there are."""
        axis = self.axes[way]
        return 1 if axis is None else self.leaf.ways[axis]

    def shown(self, way: int, most: int) -> list[int | None]:
        """The rows or columns to draw; None for a gap before the last."""
        every = self.ways(way)
        return [*range(every)] if every <= most else [*range(most - 2), None, every - 1]

    def planes(self, most: int) -> tuple[list[tuple[int, ...]], int]:
        """The blocks along the axes beyond two, and how many are left out."""
        every = [range(self.leaf.ways[axis]) for axis in self.leaf.cut[2:]]
        return [*islice(product(*every), most)], max(0, math.prod(map(len, every)) - most)

    def span_text(self, way: int, at: int | None) -> str:
        """The elements of a row or column, "" where the axis is whole."""
        axis = self.axes[way]
        return "" if axis is None else "…" if at is None else self._span(axis, at)

    def label(self, way: int) -> list[Word]:
        """The axis that goes down or across, and what cuts it; no words where it is whole."""
        axis = self.axes[way]
        return [] if axis is None else self._axis(axis)

    def plane_text(self, plane: tuple[int, ...]) -> str:
        """Which plane this is."""
        pairs = zip(self.leaf.cut[2:], plane, strict=True)
        return ", ".join(f"{said(self._axis(axis))} {self._span(axis, at)}" for axis, at in pairs)

    def _span(self, axis: int, at: int) -> str:
        part = self.leaf.block[axis]
        return f"{at * part}:{(at + 1) * part}"

    def _axis(self, axis: int) -> list[Word]:
        name = self.leaf.names[axis] if self.leaf.names else None
        over = self.leaf.over[axis]
        arrow: list[Word] = [("→", None)] if over else []
        return [(name or f"axis {axis}", None), *arrow, *joined(over, "+", "")]


def heading(leaf: Leaf) -> tuple[str, str]:
    """An array's name and type, and the mesh it lies on."""
    kind = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
    spec = format_mesh(leaf.mesh) if leaf.mesh else ""
    return f"{leaf.path} {kind}".strip(), mesh_text(spec, leaf.sharding.num_devices)


def summary(leaf: Leaf) -> list[str]:
    """What an array's blocks come to, in two lines."""
    devices = leaf.sharding.num_devices
    blocks = math.prod(leaf.ways)
    each = devices // blocks
    along = f" (copies along {', '.join(leaf.copies)})" if leaf.copies else ""
    block = "×".join(map(str, leaf.block))
    where = f"each on {count(each)}{along}"
    if blocks == 1:
        where = f"whole on {'each of ' * (devices > 1)}{count(devices)}{along}"
    held = leaf.per_device * devices
    more = f"; with the copies, {size(held)}" if held > leaf.total else ""
    return [
        f"{blocks} blocks of {block}, {where}" if blocks > 1 else where,
        f"{size(leaf.per_device)} on each device, {size(leaf.total)} in all{more}",
    ]


def hue(axis: str, mesh: Mesh) -> int:
    """The number of a mesh axis, for its colour."""
    return mesh.axis_names.index(axis)
