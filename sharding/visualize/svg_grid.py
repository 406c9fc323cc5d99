"""One array as SVG: a grid of its blocks, the cuts in the colours of the mesh axes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from xml.etree.ElementTree import Element

from sharding.visualize.facts import Grid, Leaf, heading, summary
from sharding.visualize.svg import CHARACTER, LINE, PAD, canvas, colour, line, tag, words_at
from sharding.visualize.words import ranges, said

_ROWS, _COLUMNS, _PLANES = 16, 10, 4  # that are drawn of a grid
_CHIP, _LONGEST, _BOLD = 22, 18, 1.15  # a chip's height; characters as text; width of bold ones
_CHIPS = 8  # devices of a block that are drawn one by one
_SIDE, _FLATTEST = 280.0, 2.2  # the side of a square array; how far from square one is drawn


def grid(leaf: Leaf) -> str:
    """Draw one array as a grid of its blocks, each with chips for its devices.

    Args:
        leaf: the array.

    Returns:
        An <svg>.

    >>> import jax
    >>> from sharding import make_mesh
    >>> where = jax.NamedSharding(make_mesh("data=1"), jax.P("data"))
    >>> grid(Leaf("x<y", (4, 2), "float32", 4, where)).startswith("<svg xmlns=")
    True
    """
    cells = Grid(leaf)
    title, mesh = heading(leaf)
    parts = [
        tag("text", title, x=PAD, y=PAD + 12, class_="title"),
        words_at(leaf.words, leaf, PAD, PAD + 34),
        tag("text", mesh, x=PAD, y=PAD + 52, class_="quiet"),
    ]
    text = [said(leaf.words), mesh, *summary(leaf)]
    right, top = PAD + CHARACTER * max(1.4 * len(title), *map(len, text)), PAD + 70.0
    planes, more = cells.planes(_PLANES)
    for plane in planes:
        if plane:
            parts.append(tag("text", cells.plane_text(plane), x=PAD, y=top + 8, class_="strong"))
            top += LINE
        sheet = _sheet(cells, top)
        parts += _plane(sheet, plane)
        right, top = max(right, sheet.right), sheet.bottom + 14
    if more:
        left_out = f"… and {more} more, cut alike"
        parts.append(tag("text", left_out, x=PAD, y=top + 8, class_="quiet"))
        top += LINE + 8
    for said_last in summary(leaf):
        parts.append(tag("text", said_last, x=PAD, y=top + 10, class_="quiet"))
        top += LINE
    return canvas(f"{title}: {said(leaf.words)}", right + PAD, top + PAD - 4, parts)


@dataclass(frozen=True)
class _Sheet:
    """Where a grid stands on the picture.

    Attributes:
        cells: what it shows.
        rows: that are drawn, None for a gap.
        columns: that are drawn.
        left: of the first block.
        top: of the first block.
        width: of each block.
        height: of each block.
        chip: the width of a device's chip; None where devices are text.
        across: chips in a line.
    """

    cells: Grid
    rows: Sequence[int | None]
    columns: Sequence[int | None]
    left: float
    top: float
    width: float
    height: float
    chip: float | None
    across: int

    @property
    def right(self) -> float:
        return self.left + self.width * len(self.columns)

    @property
    def bottom(self) -> float:
        return self.top + self.height * len(self.rows)


def _sheet(cells: Grid, top: float) -> _Sheet:
    """Blocks with room for their devices, and as a whole about as wide and high as the array."""
    rows, columns = cells.shown(0, _ROWS), cells.shown(1, _COLUMNS)
    held = cells.leaf.blocks.values()
    each = max(map(len, held))
    spans = [cells.span_text(1, j) for j in columns]
    least, low = 10 + CHARACTER * max(map(len, spans)), 44.0
    across, chip = min(each, 4 if each > 2 else 2), None
    if each <= _CHIPS:
        chip = 10 + CHARACTER * max(len(str(device)) for ids in held for device in ids)
        least, low = max(least, across * (chip + 4) + 12), 12 + _CHIP * -(-each // across)
    else:
        least = max(least, 24 + CHARACTER * _LONGEST)
    side = _SIDE if len(rows) * len(columns) > 1 else _SIDE / 2
    ratio = min(max(_ratio(cells), 1 / _FLATTEST), _FLATTEST) ** 0.5
    labels = [cells.span_text(0, i) for i in rows]
    margin = max(_BOLD * len(said(cells.label(0))), *map(len, labels))
    above = 2 * LINE if cells.axes[1] is not None else LINE if margin else 0
    return _Sheet(
        cells,
        rows,
        columns,
        PAD + (10 + CHARACTER * margin if margin else 0),
        top + above,
        max(least, side * ratio / len(columns)),
        max(low, side / ratio / len(rows)),
        chip,
        across,
    )


def _ratio(cells: Grid) -> float:
    """How much wider than high the array is along the axes that are drawn."""
    shape = cells.leaf.shape
    down, across = cells.axes
    if down is None and across is None:
        return 1.0
    whole = [n for axis, n in enumerate(shape) if axis not in cells.leaf.cut]
    other = whole[-1] if whole else max(shape[-1] // 4, 1)
    wide, tall = (other if axis is None else shape[axis] for axis in (across, down))
    return max(wide, 1) / max(tall, 1)


def _plane(sheet: _Sheet, plane: tuple[int, ...]) -> Iterable[Element]:
    """The blocks of two axes, their labels, and the cuts between them."""
    cells, leaf = sheet.cells, sheet.cells.leaf
    if cells.axes[1] is not None:
        middle = (sheet.left + sheet.right) / 2
        yield words_at(cells.label(1), leaf, middle, sheet.top - 28, "mid")
    yield words_at(cells.label(0), leaf, sheet.left - 10, sheet.top - 10, "end")
    box = {"x": sheet.left, "y": sheet.top, "rx": 3.0}
    box |= {"width": sheet.right - sheet.left, "height": sheet.bottom - sheet.top}
    yield tag("rect", class_="soft", **box)
    for c, j in enumerate(sheet.columns):
        x = sheet.left + sheet.width * (c + 0.5)
        yield tag("text", cells.span_text(1, j), x=x, y=sheet.top - 10, class_="quiet mid")
    for r, i in enumerate(sheet.rows):
        y = sheet.top + sheet.height * (r + 0.5)
        yield tag("text", cells.span_text(0, i), x=sheet.left - 10, y=y + 4, class_="quiet end")
        for c, j in enumerate(sheet.columns):
            x = sheet.left + sheet.width * (c + 0.5)
            if i is None or j is None:
                yield tag("text", "⋯", x=x, y=y + 4, class_="quiet mid")
            else:
                yield _block(cells.devices(i, j, plane), x, y, sheet)
    yield from _cuts(sheet)
    yield tag("rect", class_="box", **box)


def _block(ids: tuple[int, ...], x: float, y: float, sheet: _Sheet) -> Element:
    """The devices that hold a block: a chip for each if they are few, else ranges."""
    group = tag("g", tag("title", f"device {ranges(ids)}"))
    if sheet.chip is None:
        text = ranges(ids, longest=_LONGEST)
        group.append(tag("text", text, x=x, y=y + 4, class_="mid"))
        return group
    rows = [*batched(ids, sheet.across)]
    for r, row in enumerate(rows):
        level = y + _CHIP * (r - (len(rows) - 1) / 2)
        for c, device in enumerate(row):
            at = x + (sheet.chip + 4) * (c - (len(row) - 1) / 2)
            box = {"x": at - sheet.chip / 2, "y": level - 9, "width": sheet.chip, "height": 18.0}
            group.append(tag("rect", rx=5.0, class_="card", **box))
            group.append(tag("text", str(device), x=at, y=level + 4, class_="mid"))
    return group


def _cuts(sheet: _Sheet) -> Iterable[Element]:
    """The lines between blocks, in the colour of the mesh axis that cuts there."""
    for way, shown in ((0, sheet.rows), (1, sheet.columns)):
        for k in range(1, len(shown)):
            first, last = shown[k - 1], shown[k]
            if last is None:  # of the cuts in a gap the outermost is drawn
                places = range((first or 0) + 1, sheet.cells.ways(way) - 1)
            else:
                places = range(last, last + 1)
            class_ = _class(sheet.cells, way, places)
            if way:
                x = sheet.left + sheet.width * k
                yield line(x, sheet.top, x, sheet.bottom, class_)
            else:
                y = sheet.top + sheet.height * k
                yield line(sheet.left, y, sheet.right, y, class_)


def _class(cells: Grid, way: int, places: range) -> str:
    """The style of the outermost cut before some rows or columns: thick if others are within."""
    axis, leaf = cells.axes[way], cells.leaf
    if axis is None or leaf.mesh is None or not leaf.over[axis]:
        return "line n"
    *outer, last = leaf.over[axis]
    inner = leaf.ways[axis]
    for name in outer:
        inner //= leaf.mesh.shape[name]
        if any(at % inner == 0 for at in places):
            return f"line outer {colour(name, leaf)}"
    return f"line {colour(last, leaf)}"
