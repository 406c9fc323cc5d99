"""A table for the terminal: columns that line up, whatever the labels hold."""

import unicodedata
from collections.abc import Sequence

from fw.report.text import MISSING, clean, number


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> str:
    """Align rows under their columns; the first column to the left, the others to the right.

    Args:
        rows: cells: text as it is, integers in full, floats with four digits, None as a dash.
            `fw.report.size`, `seconds` and `percent` make text with units.
        columns: one name a column, with the unit where the cells have none.

    Returns:
        Lines without a newline at the end.

    Raises:
        ValueError: a row has not one cell a column.

    >>> print(table([["f32", 90_900_000, 0.7126], ["int8", 23_100_000, None]],
    ...             ["variant", "bytes", "macro-F1"]))
    variant     bytes  macro-F1
    ───────  ────────  ────────
    f32      90900000    0.7126
    int8     23100000         –
    """
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"table: row {i} has {len(row)} cells for {len(columns)} columns")
    texts = [[_cell(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(_width, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["─" * width for width in widths])
    return "\n".join(_line(row, widths) for row in texts)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    blanks = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
    cells = [cell + blanks[i] if i == 0 else blanks[i] + cell for i, cell in enumerate(row)]
    return "  ".join(cells).rstrip()


def _cell(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return number(value)
    return " ".join(clean(str(value)).split())


def _width(text: str) -> int:
    """The columns that a terminal gives to a text: two for wide characters, none for marks."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
