"""A tree as SVG: a row for every array, with its cuts, its bytes and a bar in their colours."""

from xml.etree.ElementTree import Element

from sharding.visualize.facts import Grid, Leaf
from sharding.visualize.svg import (
    CHARACTER,
    LINE,
    PAD,
    canvas,
    colour,
    hatched,
    line,
    tag,
    words_at,
)
from sharding.visualize.table import Row, Table
from sharding.visualize.words import columns, said, size

_ROW = 24.0
_GAP = 20.0  # between columns
_QUIET = ("dtype", "total")
_MARK = "replicated"
_BAR = 150.0
_GLYPH = (30.0, 16.0)
_FINEST = 8  # cuts that are drawn of a row's small grid
_LONGEST = 64  # characters of a path


def table(tree: Table) -> str:
    """Draw a tree: a row for every array, with its cuts, its bytes and a bar.

    Args:
        tree: its leaves.

    Returns:
        An <svg>.

    >>> "no arrays" in table(Table(()))
    True
    """
    if not tree.leaves:
        return canvas("no arrays", 160, 60, [tag("text", "no arrays", x=PAD, y=34)])
    lines, shown = tree.summary, _columns(tree)
    lefts = [PAD + _GLYPH[0] + 14]
    for name, cells, _ in shown:
        lefts.append(lefts[-1] + CHARACTER * max(map(columns, (name, *cells))) + _GAP)
    bar_at = lefts[-1] - _GAP / 2
    right = bar_at + _BAR
    if any(row.marked for row in tree.rows):
        right += 10 + CHARACTER * len(_MARK)
    right = max(right, PAD + 1.4 * CHARACTER * max(map(len, (lines[0], tree.title))))
    parts = [
        tag("text", lines[0], x=PAD, y=PAD + 12, class_="title"),
        tag("text", tree.title, x=PAD, y=PAD + 32, class_="quiet"),
        *(tag("text", text, x=PAD, y=PAD + 50, class_="quiet") for text in lines[1:]),
    ]
    top = PAD + 14.0 + LINE * len(lines)
    legend = _legend(tree, top + 20)
    top += 36 if legend else 14
    # The x of every cell: its left edge, or its right one for numbers.
    places = [
        end - _GAP if anchor == "end" else left
        for (_, _, anchor), left, end in zip(shown, lefts, lefts[1:], strict=False)
    ]
    for (name, _, anchor), x in zip(shown, places, strict=True):
        parts.append(tag("text", name, x=x, y=top + 14, class_=f"quiet {anchor}"))
    top += 22
    most = max(row.per_device for row in tree.rows)
    for k, row in enumerate(tree.rows):
        y = top + _ROW * k
        group = tag("g", tag("title", _full(row)), line(PAD, y, right, y, "rule"))
        group.extend(_glyph(row.leaf, PAD, y + (_ROW - _GLYPH[1]) / 2))
        for (name, cells, anchor), x in zip(shown, places, strict=True):
            if name == "sharding":
                group.append(words_at(row.leaf.words, row.leaf, x, y + 16))
            else:
                shade = " quiet" if name in _QUIET else ""
                group.append(tag("text", cells[k], x=x, y=y + 16, class_=anchor + shade))
        group.extend(_bar(row, bar_at, y + 6, most))
        parts.append(group)
    bottom = top + _ROW * len(tree.rows) + 12
    return canvas(f"{tree.title}; {lines[0]}", right + PAD, bottom, [*parts, *legend])


def _columns(tree: Table) -> list[tuple[str, list[str], str]]:
    """Name, cells and anchor of every column."""
    rows = tree.rows
    return [
        ("array", [_shorten(row.path) + _times(row) for row in rows], "start"),
        ("shape", ["×".join(map(str, row.leaf.shape)) or "scalar" for row in rows], "start"),
        ("dtype", [row.leaf.dtype for row in rows], "start"),
        ("sharding", [said(row.leaf.words) for row in rows], "start"),
        ("total", [size(row.total) for row in rows], "end"),
        ("per device", [size(row.per_device) for row in rows], "end"),
    ]


def _legend(tree: Table, y: float) -> list[Element]:
    """A colour for every mesh axis that cuts, and the hatching of what none does."""
    entries: list[tuple[str, str | None, Leaf]] = []
    for axis in tree.cutting:
        leaf = next(one for one in tree.leaves if any(axis in over for over in one.over))
        entries.append((f"cut over {axis}", axis, leaf))
    if tree.devices > 1 and any(leaf.replicated for leaf in tree.leaves):
        entries.append(("whole on every device", None, tree.leaves[0]))
    parts, x = [], float(PAD)
    for text, axis, leaf in entries:
        if axis is None:
            parts += hatched(x, y - 9, 16, 10)
        else:
            class_ = f"fill {colour(axis, leaf)}"
            parts.append(tag("rect", x=x, y=y - 9, width=16.0, height=10.0, rx=2.0, class_=class_))
        parts.append(tag("text", text, x=x + 22, y=y, class_="quiet"))
        x += 22 + CHARACTER * len(text) + 18
    return parts


def _glyph(leaf: Leaf, x: float, y: float) -> list[Element]:
    """The array as a small sheet, its cuts, and what one device holds of it."""
    width, height = _GLYPH
    box = {"x": x, "y": y, "width": width, "height": height, "rx": 1.5}
    if leaf.replicated:
        return [*hatched(x, y, width, height), tag("rect", class_="box", **box)]
    cells = Grid(leaf)
    down, across = (min(cells.ways(way), _FINEST) for way in (0, 1))
    parts = [tag("rect", class_="soft", **box)]
    parts.append(tag("rect", x=x, y=y, width=width / across, height=height / down, class_="fill n"))
    for way, count in ((0, down), (1, across)):
        axis = cells.axes[way]
        over = () if axis is None else leaf.over[axis]
        class_ = f"line {colour(over[-1], leaf)}" if over else "line n"
        for k in range(1, count):
            at = k / count
            if way:
                parts.append(line(x + width * at, y, x + width * at, y + height, class_))
            else:
                parts.append(line(x, y + height * at, x + width, y + height * at, class_))
    return [*parts, tag("rect", class_="box", **box)]


def _bar(row: Row, x: float, y: float, most: int) -> list[Element]:
    """The bytes on a device, in equal parts of the colours that cut the array."""
    length = max(_BAR * row.per_device / max(most, 1), 1.0)
    axes = [axis for over in row.leaf.over for axis in over]
    if row.leaf.replicated:
        parts = hatched(x, y, length, 12)
    elif not axes:
        parts = [tag("rect", x=x, y=y, width=length, height=12.0, class_="fill n")]
    else:
        each = length / len(axes)
        parts = [
            tag(
                "rect",
                x=x + each * k,
                y=y,
                width=each,
                height=12.0,
                class_=f"fill {colour(axis, row.leaf)}",
            )
            for k, axis in enumerate(axes)
        ]
    if row.marked:
        parts.append(tag("text", _MARK, x=x + length + 8, y=y + 10, class_="warn strong"))
    return parts


def _times(row: Row) -> str:
    return f" ×{row.count}" if row.count > 1 else ""


def _full(row: Row) -> str:
    leaf = row.leaf
    copies = f", copies along {', '.join(leaf.copies)}" if leaf.copies else ""
    block = "×".join(map(str, leaf.block)) or "scalar"
    return f"{row.path}{_times(row)}: {said(leaf.words)}, blocks of {block}{copies}"


def _shorten(path: str) -> str:
    """A path with the room of its column: its end says most."""
    return path if len(path) <= _LONGEST else f"…{path[1 - _LONGEST :]}"
