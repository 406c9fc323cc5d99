"""Who took what: interactions of users with items, read, and parted so that nothing leaks.

Files are RecBole's atomic ones (Zhao et al. 2021, arXiv:2011.01731): tab-separated, a header of
`name:kind`, the suffixes `.inter`, `.user` and `.item`; or CSV and TSV with the same columns. A
table stays a table of columns here; `vocabulary` makes numbers of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fw.data.cells import IN_BOUND, as_bounded
from fw.data.files import TABBED, OnBadRow, refuse, separated_rows
from fw.data.splits import SPLITS, split_by_hash
from fw.errors import FwError

KINDS = ("token", "token_seq", "float")
"""Of a column: one name of many, several of them parted by spaces, a number."""

NUMBERS = ("rating", "timestamp", "label")
"""The numbers that an interaction may have and that are no features of it; a user's or an item's
columns of these names are features."""

_EVENT = {"user": "token", "item": "token", **dict.fromkeys(NUMBERS, "float")}
_NAMES = {"user_id": "user", "item_id": "item"}
_FILES = {
    "events": ("*.inter", "interactions.csv", "interactions.tsv"),
    "users": ("*.user", "users.csv", "users.tsv"),
    "items": ("*.item", "items.csv", "items.tsv"),
}


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of one length.

    Attributes:
        kinds: one of `KINDS` by name.
        columns: [R] each by name: strings, "" where there is none; tuples of strings; float64, NaN
            where there is none.
    """

    kinds: Mapping[str, str]
    columns: Mapping[str, np.ndarray]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.columns.values())))

    def take(self, places: np.ndarray) -> "Table":
        """Some of the rows, by place or by truth."""
        return Table(self.kinds, {name: values[places] for name, values in self.columns.items()})


@dataclass(frozen=True, eq=False)
class Interactions:
    """Users, items, and who took what.

    Attributes:
        events: "user" and "item", perhaps "rating", "timestamp" and "label" (1 or 0), and features
            of the event.
        order: int64 [events], the place of each among all in time; of equal times, in the file.
        users: "user" and features; None if nothing is known of them.
        items: "item" and features; None if nothing is known of them.
    """

    events: Table
    order: np.ndarray
    users: Table | None = None
    items: Table | None = None

    def take(self, places: np.ndarray) -> "Interactions":
        """Some of the events, by place or by truth; users and items stay."""
        return Interactions(self.events.take(places), self.order[places], self.users, self.items)


def concatenate(parts: Sequence[Interactions]) -> Interactions:
    """The events of several parts of one data set."""
    columns = {
        name: np.concatenate([part.events.columns[name] for part in parts])
        for name in parts[0].events.columns
    }
    order = np.concatenate([part.order for part in parts])
    first = parts[0]
    return Interactions(Table(first.events.kinds, columns), order, first.users, first.items)


def load_interactions(path: str | Path, *, on_bad_row: OnBadRow = None) -> Interactions:
    """Read a folder of atomic files, one of `interactions`, `users`, `items` (CSV, TSV), or a file.

    Args:
        path: of users and items the folder may have files or not.
        on_bad_row: gets the message of each row left out; None raises instead.

    Raises:
        FwError: nothing there, two files for one thing, a column missing, or a bad row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "clicks.csv")
    ...     _ = path.write_text("user,item,label,hour\\nada,tea,1,9\\nbob,tea,0,17\\n")
    ...     events = load_interactions(path).events
    >>> events.kinds["hour"], events.columns["user"].tolist(), events.columns["label"].tolist()
    ('float', ['ada', 'bob'], [1.0, 0.0])
    """
    path = Path(path)
    files = {"events": path}
    if path.is_dir():
        found = {what: _one(path, what, patterns) for what, patterns in _FILES.items()}
        files = {what: file for what, file in found.items() if file is not None}
        if "events" not in files:
            raise FwError(f"{path}: expected a file {' or '.join(_FILES['events'])}; found none")
    events = _read(files["events"], _EVENT, on_bad_row)
    users = _read(files["users"], {"user": "token"}, on_bad_row) if "users" in files else None
    items = _read(files["items"], {"item": "token"}, on_bad_row) if "items" in files else None
    times = events.columns.get("timestamp", np.zeros(events.rows))
    order = np.empty(events.rows, np.int64)
    order[np.argsort(times, kind="stable")] = np.arange(events.rows)
    return Interactions(events, order, users, items)


def is_positive(events: Table, threshold: float | None) -> np.ndarray:
    """Bool [R]: what the `label` says; else a rating of at least the threshold; else all.

    Raises:
        FwError: a threshold without ratings.
    """
    if "label" in events.columns:
        return events.columns["label"] == 1
    if threshold is None:
        return np.ones(events.rows, np.bool_)
    if "rating" not in events.columns:
        raise FwError("interactions: a threshold wants a column 'rating', or 'label' in its place")
    return events.columns["rating"] >= threshold


def leave_last_out(data: Interactions) -> dict[str, Interactions]:
    """A user's last event is for the test, the one before for dev, all others for training.

    Users with fewer than three events only train.

    Returns:
        {"train": ..., "dev": ..., "test": ...}.

    Raises:
        FwError: events without a timestamp.
    """
    if "timestamp" not in data.events.columns:
        raise FwError("interactions: the last event wants a column 'timestamp'; split by hash")
    _, user = np.unique(data.events.columns["user"], return_inverse=True)
    by_user = np.lexsort((data.order, user))
    counts = np.bincount(user)
    from_last = np.empty(len(user), np.int64)
    from_last[by_user] = np.cumsum(counts)[user[by_user]] - 1 - np.arange(len(user))
    from_last[counts[user] < 3] = 2
    places = {"train": from_last > 1, "dev": from_last == 1, "test": from_last == 0}
    return {name: data.take(there) for name, there in places.items()}


def split_pairs(data: Interactions) -> dict[str, Interactions]:
    """Eight tenths of the pairs train, one is dev, one test, by a hash of user and item.

    What a user does with one item more than once is never in two splits.
    """
    pairs = zip(data.events.columns["user"], data.events.columns["item"], strict=True)
    split = np.array([split_by_hash(f"{user}\t{item}") for user, item in pairs])
    return {name: data.take(split == name) for name in SPLITS}


def _one(folder: Path, what: str, patterns: Sequence[str]) -> Path | None:
    found = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if len(found) > 1:
        names = " and ".join(file.name for file in found[:2])
        raise FwError(f"{folder}: expected one file of {what}; found {names}; keep one")
    return found[0] if found else None


def _read(path: Path, fixed: Mapping[str, str], on_bad_row: OnBadRow) -> Table:
    """A table, in which some kinds are fixed: their tokens are there, and one alone is a key."""
    if path.suffix.lower() not in (".csv", *TABBED):
        raise FwError(f"{path}: expected .csv {' '.join(TABBED)}")
    table = separated_rows(path, on_bad_row)
    _, header = next(table, (1, []))
    names, kinds = _header(path, header, fixed)
    keys = [name for name, kind in fixed.items() if kind == "token"]
    if missing := [key for key in keys if key not in names]:
        raise FwError(f"{path}:1: expected a column {missing[0]!r}; got {', '.join(header)}")
    seen: dict[str, int] = {}
    rows = []
    for line, row in table:
        if fault := _fault(row, names, kinds, fixed):
            refuse(f"{path}:{line}: {fault}", on_bad_row)
            continue
        one = row[names.index(keys[0])]
        if len(keys) == 1 and seen.setdefault(one, line) != line:
            refuse(f"{path}:{line}: {keys[0]} {one!r} is in line {seen[one]} already", on_bad_row)
            continue
        rows.append(row)
    if not rows:
        raise FwError(f"{path}: expected at least one row; found none")
    cells = dict(zip(names, zip(*rows, strict=True), strict=True))
    settled = {n: kind or _kind(cells[n]) for n, kind in zip(names, kinds, strict=True)}
    return Table(settled, {name: _column(cells[name], settled[name]) for name in names})


def _header(
    path: Path, header: list[str], fixed: Mapping[str, str]
) -> tuple[list[str], list[str | None]]:
    """Names and kinds of the columns, some `fixed`; None for a kind that the cells will tell."""
    names, kinds = [], []
    for cell in header:
        name, _, kind = cell.strip().partition(":")
        name = _NAMES.get(name, name)
        if kind not in ("", *KINDS):
            raise FwError(f"{path}:1: column {cell!r}: expected name:kind of {', '.join(KINDS)}")
        want = fixed.get(name)
        if want and kind not in ("", "token", want):
            raise FwError(f"{path}:1: column {cell!r}: expected {name}:{want}, which it is to be")
        names.append(name)
        kinds.append(want or kind or None)
    if len(set(names)) < len(names) or "" in names:
        raise FwError(f"{path}:1: expected different names of columns; got {', '.join(header)}")
    return names, kinds


def _fault(
    row: list[str], names: list[str], kinds: list[str | None], fixed: Mapping[str, str]
) -> str | None:
    if len(row) != len(names):
        return f"expected {len(names)} cells; got {len(row)}"
    for name, kind, cell in zip(names, kinds, row, strict=True):
        if fixed.get(name) == "token" and not cell:
            return f"expected a name in column {name!r}; got none"
        if kind == "float" and (cell or name in fixed) and as_bounded(cell) is None:
            return f"expected {IN_BOUND} in column {name!r}; got {cell!r}"
        if name == "label" and name in fixed and float(cell) not in (0, 1):
            return f"expected 1 or 0 in column 'label'; got {cell!r}"
    return None


def _kind(cells: Sequence[str]) -> str:
    """Numbers are what reads as such, within bounds, in every row that has something."""
    given = [cell for cell in cells if cell]
    return "float" if given and all(as_bounded(cell) is not None for cell in given) else "token"


def _column(cells: Sequence[str], kind: str) -> np.ndarray:
    if kind == "float":
        return np.array([float(cell) if cell else math.nan for cell in cells])
    column = np.empty(len(cells), object)
    column[:] = [tuple(cell.split()) for cell in cells] if kind == "token_seq" else cells
    return column
