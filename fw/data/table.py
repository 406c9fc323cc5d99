"""Tables in files become entries: the cells of a row by the names of their columns.

CSV and tab-separated values with a header, JSON lines of objects, and scikit-learn's own CSV files,
whose first line has counts and class names in place of column names. A cell stays as the file has
it: what is a number, a category or missing is said by `columns`, which learns it from train alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fw.data.cells import WANTED, Cell, as_cell, is_cell
from fw.data.files import OnBadRow, json_lines, refuse, separated_rows
from fw.errors import FwError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")

TARGET = "target"
"""The column that scikit-learn's files have last, without a name."""


@dataclass(frozen=True)
class Entry:
    """A row of a table: its cells by column, and where it stands.

    >>> Entry({"age": "41", "job": "clerk"}).text
    '41\\tclerk'
    """

    cells: Mapping[str, Cell]
    source: str = ""

    @property
    def text(self) -> str:
        """All cells, by which `splits` keeps equal rows together."""
        return "\t".join("" if cell is None else str(cell) for cell in self.cells.values())


def read_entries(path: str | Path, *, on_bad_row: OnBadRow = None) -> list[Entry]:
    """Read a table.

    Args:
        path: `.csv` (RFC 4180) or `.tsv` (no quoting) with a header, or scikit-learn's CSV: rows,
            columns and class names in the first line, then numbers, the class's id the last of
            each; its columns are called x0, x1 … and "target". `.jsonl`, `.ndjson`: an object a
            line, whose values are texts, finite numbers, true, false (which become texts) or null.
        on_bad_row: gets the message of each row left out; None raises instead.

    Returns:
        the rows in the order of the file, `source` its file and line.

    Raises:
        FwError: another suffix, a file that cannot be read, columns without a name or two of one,
            or a bad row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.csv")
    ...     _ = path.write_text('age,job,good\\n41,"clerk, senior",yes\\n')
    ...     read_entries(path)[0].cells
    {'age': '41', 'job': 'clerk, senior', 'good': 'yes'}
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise FwError(f"{path}: expected a table, {' '.join(SUFFIXES)}")
    return (_objects if suffix in SUFFIXES[2:] else _separated)(path, on_bad_row)


def _separated(path: str | Path, on_bad_row: OnBadRow) -> list[Entry]:
    (line, header), *rows = [*separated_rows(path, on_bad_row)] or [(1, [])]
    names = [name.strip() for name in header]
    classes: list[str] = []
    if rows and _is_scikit_learn(names, rows[0][1]):
        count, *classes = int(names[1]), *names[2:]
        names = [*(f"x{i}" for i in range(count)), TARGET]
    for name in names or [""]:
        if not name or names.count(name) > 1:
            raise FwError(
                f"{path}:{line}: expected a header, a name of its own for each column; got "
                f"{names.count(name)} columns named {name!r}"
            )
    entries = []
    for number, cells in rows:
        where = f"{path}:{number}"
        if len(cells) != len(names):
            refuse(f"{where}: expected {len(names)} cells; got {len(cells)}", on_bad_row)
        elif classes and cells[-1].strip() not in map(str, range(len(classes))):
            want = f"the id of one of {len(classes)} classes in the last cell"
            refuse(f"{where}: expected {want}; got {cells[-1]!r}", on_bad_row)
        else:
            last = [classes[int(cells[-1])]] if classes else cells[-1:]
            entries.append(Entry(dict(zip(names, [*cells[:-1], *last], strict=True)), where))
    return entries


def _is_scikit_learn(header: list[str], first: list[str]) -> bool:
    """Whether a first line is "rows,columns,class,class …": the row after it has so many columns.

    >>> _is_scikit_learn(["569", "2", "malignant", "benign"], ["17.99", "10.38", "0"])
    True
    >>> _is_scikit_learn(["2025", "2026", "region", "value"], ["1", "2", "north", "4"])
    False
    """
    rows, columns, *classes = [*header, "", ""]
    counted = all(n.isascii() and n.isdigit() and len(n) < 10 for n in (rows, columns))
    return counted and len(classes) > 3 and len(first) == int(columns) + 1


def _objects(path: str | Path, on_bad_row: OnBadRow) -> list[Entry]:
    entries = []
    for number, found in json_lines(path, on_bad_row):
        where = f"{path}:{number}"
        if not (isinstance(found, dict) and found):
            refuse(f"{where}: expected an object; got {json.dumps(found)[:200]}", on_bad_row)
        elif odd := [name for name, value in found.items() if not is_cell(value)]:
            shown = json.dumps(found[odd[0]])[:200]
            refuse(f"{where}: {odd[0]!r}: expected {WANTED}; got {shown}", on_bad_row)
        else:
            entries.append(Entry({name: as_cell(value) for name, value in found.items()}, where))
    return entries
