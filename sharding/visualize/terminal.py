"""Pictures as text: boxes and bars of Unicode, in colour where the caller says so.

One colour stands for one mesh axis, wherever it is named or cuts something.
"""

from collections.abc import Sequence

from sharding.visualize.facts import Grid, Leaf, heading, hue, summary
from sharding.visualize.table import Row, Table
from sharding.visualize.words import Word, columns, ranges, said, size

# Of the 256 of a terminal, such as can be read on black and on white; by `hue`.
_COLOURS = (33, 135, 172, 35, 37, 168)
_WIDTH = 12  # characters of a bar
_ROWS, _PLANES = 12, 3  # that are drawn of a grid
_COLUMNS, _ROOM = (8, 6, 4), 100  # as many as have room in so many characters
_LONGEST = 24  # characters of the devices of a block
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def grid(leaf: Leaf, *, colour: bool) -> str:
    """Draw one array as a grid of its blocks.

    Args:
        leaf: the array.
        colour: whether to use colour codes.

    Returns:
        Lines without a newline at the end.

    >>> import jax
    >>> from sharding import make_mesh
    >>> where = jax.NamedSharding(make_mesh("data=1"), jax.P("data"))
    >>> print(grid(Leaf("", (4, 2), "float32", 4, where), colour=False))
    float32[4, 2]: P()
    mesh data=1: 1 device
    <BLANKLINE>
    ┌─────┐
    │  0  │
    └─────┘
    <BLANKLINE>
    whole on 1 device
    32 B on each device, 32 B in all
    """
    cells = Grid(leaf)
    title, mesh = heading(leaf)
    lines = [f"{_bold(title, colour)}: {_paint(leaf.words, leaf, colour)}", mesh]
    planes, more = cells.planes(_PLANES)
    for plane in planes:
        lines += ["", *([cells.plane_text(plane)] if plane else []), *_box(cells, plane, colour)]
    if more:
        lines += ["", f"… and {more} more, cut alike"]
    return "\n".join([*lines, "", *summary(leaf)])


def _box(cells: Grid, plane: tuple[int, ...], colour: bool) -> list[str]:
    rows = cells.shown(0, _ROWS)
    for most in _COLUMNS:
        across = cells.shown(1, most)
        texts = [[_held(cells, i, j, plane) for j in across] for i in rows]
        tops = [cells.span_text(1, j) for j in across]
        width = 4 + max(len(text) for line in (tops, *texts) for text in line)
        room = (width + 1) * len(across) + 1
        if room <= _ROOM:
            break
    sides = [cells.span_text(0, i) for i in rows]
    corner = cells.label(0)
    margin = max(map(len, (said(corner), *sides)))
    indent = " " * (margin + 1 if margin else 0)
    lines = []
    if cells.axes[1] is not None:
        label = cells.label(1)
        before = " " * (len(indent) + max(0, (room - len(said(label))) // 2))
        lines.append(before + _paint(label, cells.leaf, colour))
    if margin or any(tops):
        start = " " * (margin - len(said(corner))) + _paint(corner, cells.leaf, colour)
        heads = " ".join(top.center(width) for top in tops)
        lines.append(f"{start}{' ' * (len(indent) - margin + 1)}{heads}".rstrip())
    line = "─" * width
    rule = [indent + a + b.join([line] * len(across)) + c for a, b, c in ("┌┬┐", "├┼┤", "└┴┘")]
    lines.append(rule[0])
    for k, (side, row) in enumerate(zip(sides, texts, strict=True)):
        body = "│".join(text.center(width) for text in row)
        lines += [rule[1]] if k else []
        lines.append(f"{side.rjust(margin)}{' ' * (len(indent) - margin)}│{body}│")
    return [*lines, rule[2]]


def _held(cells: Grid, row: int | None, column: int | None, plane: tuple[int, ...]) -> str:
    if row is None or column is None:
        return "…"
    return ranges(cells.devices(row, column, plane), longest=_LONGEST)


def table(tree: Table, *, colour: bool) -> str:
    """Draw a tree as one line for every array, or for every set of equal ones.

    Args:
        tree: its leaves.
        colour: whether to use colour codes.

    Returns:
        Lines without a newline at the end.

    >>> print(table(Table(()), colour=False))
    no arrays
    """
    if not tree.leaves:
        return "no arrays"
    most = max(row.per_device for row in tree.rows)
    head = ("array", "shape", "dtype", "sharding", "total", "per device")
    body = [
        (
            row.path + (f" ×{row.count}" if row.count > 1 else ""),
            "×".join(map(str, row.leaf.shape)) or "scalar",
            row.leaf.dtype,
            said(row.leaf.words),
            size(row.total),
            size(row.per_device),
        )
        for row in tree.rows
    ]
    widths = [max(map(columns, column)) for column in zip(head, *body, strict=True)]
    lines = [_line(head, widths), "  ".join("─" * width for width in widths)]
    for row, cells in zip(tree.rows, body, strict=True):
        painted = [*cells]
        painted[3] = _paint(row.leaf.words, row.leaf, colour)
        note = " replicated" if row.marked else ""
        end = f"  {_bar(row, most, colour)}{_bold(note, colour)}"
        lines.append((_line(cells, widths, painted) + end).rstrip())
    return "\n".join([_bold(tree.title, colour), "", *lines, "", *tree.summary])


def _line(cells: Sequence[str], widths: Sequence[int], painted: Sequence[str] = ()) -> str:
    """Texts to the left, sizes to the right; `painted` holds the same cells with their colours."""
    padded = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        blank, text = " " * (width - columns(cell)), (painted or cells)[i]
        padded.append(blank + text if i > 3 else text + blank)
    return "  ".join(padded)


def _bar(row: Row, most: int, colour: bool) -> str:
    """A bar of the bytes on a device: solid if the array is cut, shaded if it is whole there."""
    eighths = -(-8 * _WIDTH * row.per_device // max(most, 1))
    if row.leaf.replicated:
        return "░" * -(-eighths // 8)
    text = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    axes = [axis for over in row.leaf.over for axis in over]
    if not axes:
        return text
    # As many parts as mesh axes cut the array, each in its axis's colour.
    ends = [round(len(text) * (k + 1) / len(axes)) for k in range(len(axes))]
    parts = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return _paint([*zip(parts, axes, strict=True)], row.leaf, colour)


def _paint(words: Sequence[Word], leaf: Leaf, colour: bool) -> str:
    return "".join(
        f"\x1b[38;5;{_COLOURS[hue(axis, leaf.mesh) % len(_COLOURS)]}m{text}\x1b[0m"
        if colour and axis and leaf.mesh and text
        else text
        for text, axis in words
    )


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour and text else text
