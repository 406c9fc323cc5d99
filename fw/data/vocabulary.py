"""The vocabulary of a recommender: what its ids and features are as numbers, fitted on train only.

A name that training did not know is hashed into one of a few spare rows; so is one that it saw too
seldom (see `LEAST`), which is how the spare rows learn. `recommend` makes rows and answers with it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fw.data.cells import BOUND, LEAST, is_cell
from fw.data.interactions import KINDS, NUMBERS, Interactions, Table, is_positive
from fw.errors import FwError
from fw.json_files import read_json, write_json
from fw.tensors import read_tensors, replace_tensors

FILE, TENSORS = "vocabulary.json", "vocabulary.safetensors"
NONE = -1
"""An id that is not there: the rest of a bag, a feature without a value."""

WIDEST = 2**16
"""The most names that a bag or a history holds: arrays are as wide as a vocabulary says."""


@dataclass(frozen=True)
class Column:
    """How one column becomes numbers.

    Attributes:
        name: "user", "item", or a feature's after whose it is: "user.age", "event.hour".
        kind: of `fw.data.interactions.KINDS`.
        tokens: the known names, by id.
        spare: rows for all others, after the known.
        width: the most that a bag of a `token_seq` holds; 1 for a token, 0 for a number.
        mean, scale: a number x becomes (x - mean) / scale, at most `BOUND`; one that is not there
            0.

    >>> column = Column("item", "token", ("tea", "milk"), spare=3)
    >>> column.rows, column.encode(["milk", "", "beer"]).tolist()
    (5, [1, -1, 2])
    """

    name: str
    kind: str
    tokens: tuple[str, ...] = ()
    spare: int = 0
    width: int = 1
    mean: float = 0.0
    scale: float = 1.0

    @property
    def rows(self) -> int:
        """Of the table that the ids are for; 0 for a number."""
        return len(self.tokens) + self.spare

    @cached_property
    def _places(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def id(self, token: str) -> int:
        """The row of a name; `NONE` for none."""
        if not token:
            return NONE
        found = self._places.get(token)
        if found is None:
            digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8)
            return len(self.tokens) + int.from_bytes(digest.digest(), "big") % self.spare
        return found

    def encode(self, values: Iterable[Any]) -> np.ndarray:
        """Int32 [n] of tokens, int32 [n, width] of bags, float32 [n] of numbers."""
        if self.kind == "float":
            numbers = (np.fromiter(values, np.float64) - self.mean) / self.scale
            return np.nan_to_num(numbers).clip(-BOUND, BOUND).astype(np.float32)
        if self.kind == "token":
            return np.fromiter(map(self.id, values), np.int32)
        return bags([[self.id(token) for token in tokens] for tokens in values], self.width)


def fit_column(
    name: str, kind: str, values: Sequence[Any] | np.ndarray, *, spare: int, min_count: int = LEAST
) -> Column:
    """The column of these values of training.

    Args:
        name, kind, spare: as in `Column`.
        values: as in a `Table`.
        min_count: how often a name must come to get a row of its own.
    """
    if kind == "float":
        numbers = np.asarray(values, np.float64)
        numbers = numbers[~np.isnan(numbers)]
        mean, scale = (float(numbers.mean()), float(numbers.std())) if numbers.size else (0.0, 1.0)
        return Column(name, kind, width=0, mean=mean, scale=scale or 1.0)
    bag = kind == "token_seq"
    counts = Counter(token for value in values for token in (value if bag else (value,)) if token)
    tokens = sorted(token for token, count in counts.items() if count >= min_count)
    width = max(map(len, values), default=1) if bag else 1
    return Column(name, kind, tuple(tokens), spare, min(max(width, 1), WIDEST))


def bags(lists: Sequence[Sequence[int]] | Sequence[np.ndarray], width: int) -> np.ndarray:
    """Int32 [n, width]: the first of each list, filled up with `NONE`.

    >>> bags([[4], [1, 2, 3]], 2).tolist()
    [[4, -1], [1, 2]]
    """
    out = np.full((len(lists), width), NONE, np.int32)
    for row, found in zip(out, lists, strict=True):
        row[: min(len(found), width)] = found[:width]
    return out


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """All columns of a recommender, and what it knows of the users and items of its training.

    Attributes:
        columns: "user" and "item" first.
        history: how many of a user's last items are a feature of the user; 0 for none.
        users: those of training, and of the table of users if there was one.
        items: the catalogue: those of training, and of the table of items if there was one.
        arrays: "NAME" [users, ...] of "user" and "user.*", [items, ...] of "item" and "item.*";
            "taken" int32, the places in `items` of what each user took (not of what he refused),
            in order of time, and "begins" int32 [users + 1], where each user's begin; "log_q"
            float32 [items], the logarithm of an item's share of the events.
    """

    columns: tuple[Column, ...]
    history: int
    users: tuple[str, ...]
    items: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]

    @cached_property
    def user_places(self) -> dict[str, int]:
        """The place in `users` by name."""
        return {name: i for i, name in enumerate(self.users)}

    @cached_property
    def item_places(self) -> dict[str, int]:
        """The place in `items` by name."""
        return {name: i for i, name in enumerate(self.items)}

    def of(self, owner: str) -> tuple[Column, ...]:
        """The columns of "user", "item" or "event"."""
        return tuple(c for c in self.columns if c.name.partition(".")[0] == owner)

    def encode(
        self, owner: str, names: Sequence[str], table: Table | None
    ) -> dict[str, np.ndarray]:
        """The arrays of users or items, features as the table says, `NONE` and 0 where it does not.

        Args:
            owner: "user" or "item".
            names: n of them.
            table: None if nothing is known of any.

        Returns:
            [n, ...] by the names of columns.
        """
        keys = [] if table is None else table.columns[owner].tolist()
        at = {key: i for i, key in enumerate(keys)}
        places = [at.get(name) for name in names]
        found = {}
        for column in self.of(owner):
            if column.name == owner:
                found[owner] = column.encode(names)
                continue
            empty: Any = {"float": math.nan, "token": "", "token_seq": ()}[column.kind]
            feature = column.name.partition(".")[2]
            values = None if table is None else table.columns.get(feature)
            found[column.name] = column.encode(
                empty if place is None or values is None else values[place] for place in places
            )
        return found

    def save(self, folder: str | Path) -> None:
        """Write `vocabulary.json` and `vocabulary.safetensors`, which `load` reads."""
        value = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arrays"}
        value["columns"] = [asdict(column) for column in self.columns]
        replace_tensors(Path(folder) / TENSORS, self.arrays)
        write_json(Path(folder) / FILE, value)


def fit_vocabulary(
    train: Interactions,
    *,
    features: Sequence[str] | None = None,
    history: int = 50,
    spare: int = 16,
    min_count: int = LEAST,
    threshold: float | None = None,
) -> Vocabulary:
    """Learn names, means and deviations from the events of training and from nothing else.

    Args:
        train: its tables of users and items may have others, too: these get places, but no name
            and no number of theirs is learnt from.
        features: the columns to use, such as "user.age"; None for all.
        history: as in `Vocabulary`, at most `WIDEST`.
        spare: rows of each table for unknown names.
        min_count: how often a user, an item or a feature must come to get a row of its own.
        threshold: says which items were taken and which refused: see
            `fw.data.interactions.is_positive`.

    Raises:
        FwError: no such feature, or numbers out of range.
    """
    if spare < 1 or min_count < 1 or not 0 <= history <= WIDEST:
        raise FwError(
            f"vocabulary: expected spare and min_count from 1 and history from 0 to {WIDEST}; "
            f"got {spare}, {min_count}, {history}"
        )
    events, tables = train.events, {"user": train.users, "item": train.items}
    columns, known = [], {}
    for owner, table in tables.items():
        taken = events.columns[owner]
        columns.append(fit_column(owner, "token", taken, spare=spare, min_count=min_count))
        known[owner] = sorted({*taken, *(() if table is None else table.columns[owner])})
    for owner, table in (*tables.items(), ("event", events)):
        if table is None:
            continue
        seen = table
        if owner != "event":
            names = {*events.columns[owner]}
            seen = table.take(np.array([name in names for name in table.columns[owner]]))
        for name, kind in table.kinds.items():
            full = f"{owner}.{name}"
            if name in ("user", "item", *(NUMBERS if owner == "event" else ())):
                continue
            if features is None or full in features:
                values = seen.columns[name]
                columns.append(fit_column(full, kind, values, spare=spare, min_count=min_count))
    if odd := {*(features or ())} - {column.name for column in columns}:
        names = ", ".join(column.name for column in columns[2:]) or "none"
        raise FwError(f"features: no column {sorted(odd)[0]!r}; there are: {names}")
    bare = Vocabulary(tuple(columns), history, tuple(known["user"]), tuple(known["item"]), {})
    arrays = {}
    for owner, table in tables.items():
        arrays |= bare.encode(owner, known[owner], table)
    user = np.array([bare.user_places[name] for name in events.columns["user"]], np.int64)
    item = np.array([bare.item_places[name] for name in events.columns["item"]], np.int32)
    counts = np.bincount(item, minlength=len(bare.items))
    share = np.maximum(counts, 1) / max(len(item), 1)
    took = is_positive(events, threshold)
    by_user = np.bincount(user[took], minlength=len(bare.users))
    arrays |= {
        "taken": item[took][np.lexsort((train.order[took], user[took]))],
        "begins": np.append(0, np.cumsum(by_user)).astype(np.int32),
        "log_q": np.log(share).astype(np.float32),
    }
    return Vocabulary(bare.columns, history, bare.users, bare.items, arrays)


def load(folder: str | Path) -> Vocabulary:
    """Read what `Vocabulary.save` wrote.

    Raises:
        FwError: a file is not there, or says what no vocabulary says.
    """
    path = Path(folder) / FILE
    value = read_json(path)
    try:
        columns = tuple(
            Column(**{**column, "tokens": tuple(column["tokens"])}) for column in value["columns"]
        )
        users, items, history = tuple(value["users"]), tuple(value["items"]), value["history"]
        checked = _is_count(history, WIDEST) and _are_names(users) and _are_names(items)
        checked &= [column.name for column in columns[:2]] == ["user", "item"]
        checked &= len({column.name for column in columns}) == len(columns)
        checked &= all(map(_is_column, columns))
    except (KeyError, TypeError, AttributeError) as error:
        raise FwError(f"{path}: is no vocabulary: {error!r}") from error
    if not checked:
        raise FwError(f"{path}: is no vocabulary: a column, name or number is not one")
    found = Vocabulary(columns, history, users, items, read_tensors(Path(folder) / TENSORS))
    _check_arrays(found, Path(folder) / TENSORS)
    return found


def _is_count(value: Any, most: int = 2**31 - 1) -> bool:
    return type(value) is int and 0 <= value <= most


def _are_names(values: tuple[Any, ...]) -> bool:
    return all(isinstance(v, str) and v for v in values) and len(set(values)) == len(values)


def _is_column(column: Column) -> bool:
    owner, dot, feature = column.name.partition(".")
    named = column.name in ("user", "item") or (
        owner in ("user", "item", "event") and bool(dot and feature)
    )
    numbers = all(type(x) in (int, float) and is_cell(x) for x in (column.mean, column.scale))
    whole = all(map(_is_count, (column.spare, column.rows))) and _is_count(column.width, WIDEST)
    sized = column.kind == "float" or (whole and column.spare > 0 and column.width > 0)
    return (
        named and numbers and whole and sized and column.scale > 0
        and column.kind in KINDS and _are_names(column.tokens)
    )  # fmt: skip


def _check_arrays(found: Vocabulary, path: Path) -> None:
    """Shapes, dtypes and ranges: ids index tables, and places the catalogue."""
    want: dict[str, tuple[tuple[int, ...], Any, int]] = {}
    for owner, names in (("user", found.users), ("item", found.items)):
        for c in found.of(owner):
            shape = (len(names), c.width) if c.kind == "token_seq" else (len(names),)
            want[c.name] = (shape, np.float32 if c.kind == "float" else np.int32, c.rows)
    taken = found.arrays.get("taken", np.zeros(0))
    want["taken"] = ((taken.size,), np.int32, len(found.items))
    want["begins"] = ((len(found.users) + 1,), np.int32, taken.size + 1)
    want["log_q"] = ((len(found.items),), np.float32, 0)
    if odd := set(want) ^ set(found.arrays):
        raise FwError(f"{path}: expected {', '.join(want)}; differs in {', '.join(sorted(odd))}")
    for name, (shape, dtype, limit) in want.items():
        array = found.arrays[name]
        least = 0 if name in ("taken", "begins", "user", "item") else NONE
        fits = array.shape == shape and array.dtype == dtype
        if fits and dtype == np.int32 and array.size:
            fits = least <= array.min() and array.max() < limit
        elif fits:
            fits = bool(np.isfinite(array).all())
        if not fits:
            raise FwError(f"{path}: {name!r} is not {np.dtype(dtype)} {shape} within its range")
    for column, names in zip(found.columns, (found.users, found.items), strict=False):
        if not np.array_equal(found.arrays[column.name], column.encode(names)):
            raise FwError(f"{path}: {column.name!r} has other ids than {FILE}")
    begins = found.arrays["begins"]
    if begins[0] != 0 or begins[-1] != taken.size or (np.diff(begins) < 0).any():
        raise FwError(f"{path}: 'begins' does not part 'taken'")
