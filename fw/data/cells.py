"""Cells: one value of a table, as a text, as a number, or missing; and what a column of them holds.

`table` reads cells, `columns` makes arrays of them.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from fw.errors import FwError

Cell = str | int | float | None
"""None where JSON has null, or no such key."""

WANTED = "a text, a finite number, true, false or null"
"""What a cell may be, for messages."""

FEW = 8
"""Whole numbers of so many different values or less are categories: ratings, codes, yes and no."""

LEAST = 2
"""A value that fewer rows have is as one never seen, and teaches what to make of those."""

BOUND = 1e30
"""Numbers of users, items and events are nearer to 0: float32 holds them, float64 their squares."""

IN_BOUND = "a number within ±1e30"
"""What `as_bounded` takes, for messages."""

_MOSTLY = 0.9  # a share of values from which the others must be slips of the pen

_WHOLE = re.compile(r"(-?[0-9]+)\.0+")  # as pandas writes a column of whole numbers with gaps


def is_cell(value: object) -> bool:
    """Whether a value from JSON is one of a table.

    >>> is_cell("a"), is_cell(None), is_cell([1]), is_cell(math.inf)
    (True, True, False, False)
    """
    if isinstance(value, int | float):
        try:
            return math.isfinite(value)
        except OverflowError:  # an integer that no float holds
            return False
    return value is None or isinstance(value, str)


def as_cell(value: str | float | bool | None) -> Cell:
    """A value from JSON as a cell: true and false are two categories.

    >>> as_cell(True), as_cell(2), as_cell(None)
    ('true', 2, None)
    """
    return str(value).lower() if isinstance(value, bool) else value


def as_text(cell: Cell) -> str:
    """A cell as a category, however it is spelt.

    A whole number is its digits, from JSON or as a text; true and false are in small letters;
    nothing is the empty text.

    >>> as_text(1.0), as_text(" 1.0"), as_text("1.5"), as_text("True"), as_text(None)
    ('1', '1', '1.5', 'true', '')
    """
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = "" if cell is None else str(cell).strip()
    if whole := _WHOLE.fullmatch(text):
        return whole[1]
    return text.lower() if text.lower() in ("true", "false") else text


def as_number(cell: Cell) -> float | None:
    """The finite number that a cell is, or None.

    >>> as_number(" 1e3"), as_number("1_000"), as_number("inf")
    (1000.0, None, None)
    """
    if cell is None or (isinstance(cell, str) and "_" in cell):
        return None
    try:
        value = float(cell)
    except (ValueError, OverflowError):  # an integer that no float holds
        return None
    return value if math.isfinite(value) else None


def as_bounded(cell: Cell) -> float | None:
    """The number within `BOUND` that a cell is, or None.

    >>> as_bounded("2.5"), as_bounded(1e300), as_bounded(10**400)
    (2.5, None, None)
    """
    value = as_number(cell)
    return value if value is not None and abs(value) < BOUND else None


def number_table(
    rows: Sequence[Mapping[str, Cell]], names: Sequence[str], missing: Sequence[str]
) -> np.ndarray:
    """The numbers of some columns, [R, N] float64, NaN where missing."""
    gone = set(missing)
    table = np.empty((len(rows), len(names)))
    for i, name in enumerate(names):
        cells = (row.get(name) for row in rows)
        table[:, i] = [math.nan if as_text(c) in gone else as_number(c) for c in cells]
    return table


def holds_numbers(
    rows: Sequence[Mapping[str, Cell]], sources: Sequence[str], name: str, missing: Sequence[str]
) -> bool:
    """Whether a column is one of numbers, by the rule of `fw.data.fit_columns`.

    Args:
        rows: cells by column.
        sources: file and line of each row, for messages.
        name: of the column.
        missing: cells that do not count.

    Raises:
        FwError: of its different values most are numbers, but not all.

    >>> rows = [{"a": text} for text in ("1.5", "2", "?")]
    >>> holds_numbers(rows, ["", "", "x.csv:4"], "a", ["?"])
    True
    """
    first: dict[str, tuple[Cell, str]] = {}
    for row, source in zip(rows, sources, strict=True):
        cell = row.get(name)
        first.setdefault(as_text(cell), (cell, source))
    values = {text: as_number(cell) for text, (cell, _) in first.items() if text not in missing}
    others = [text for text, value in values.items() if value is None]
    if others and len(others) <= (1 - _MOSTLY) * len(values):
        raise FwError(
            f"{first[others[0]][1]}: {name!r} is {others[0]!r}, but a number in most rows; mend "
            "it, count it as missing, or say that the column is categorical"
        )
    found = {value for value in values.values() if value is not None}
    return bool(found) and not others and (len(found) > FEW or any(v % 1 for v in found))


def vocabulary(
    rows: Sequence[Mapping[str, Cell]], name: str, missing: Sequence[str], least: int
) -> tuple[str, ...]:
    """The values of a column that at least so many rows have, missing ones apart, sorted.

    >>> vocabulary([{"a": "x"}, {"a": "x"}, {"a": "y"}], "a", [""], least=2)
    ('x',)
    """
    counts: dict[str, int] = {}
    for row in rows:
        text = as_text(row.get(name))
        counts[text] = counts.get(text, 0) + 1
    return tuple(sorted(t for t, n in counts.items() if n >= least and t not in missing))
