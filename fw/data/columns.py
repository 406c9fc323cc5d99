"""Columns: what a table's cells are as numbers, the same for training rows and for those to answer.

`fit_columns` learns them, from training rows alone; here they are kept, saved and used. Entries
come from `table`; the arrays go to `fw.models.mlp` and `fw.models.ft_transformer`. A run's model
folder and its artifact hold the columns, so that answers read a row as training did.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fw.data.cells import (
    WANTED,
    Cell,
    as_cell,
    as_number,
    as_text,
    is_cell,
    number_table,
)
from fw.data.files import OnBadRow, refuse
from fw.data.rows import Rows
from fw.data.scaling import TRANSFORMS, scaled
from fw.data.table import Entry
from fw.errors import FwError
from fw.json_files import plain, read_json, write_json
from fw.labels import IGNORE
from fw.metrics.probabilities import one_label
from fw.tensors import read_tensors, replace_tensors

FILE, TENSORS = "columns.json", "columns.safetensors"
"""What `Columns.save` writes."""

UNSEEN, ABSENT, RESERVED = 0, 1, 2
"""Rows of a category's table: one for values not in train, one for missing ones; then its own."""

LARGEST = 100_000_000
"""Bytes of a file that is read back."""

CLASSES, NUMBER = "tabular_classification", "tabular_regression"
TASKS = (CLASSES, NUMBER)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of a table, as `fit_columns` found them.

    Attributes:
        task: one of `TASKS`.
        target: the column that is to be predicted.
        classes: the target's values by id; none for a number.
        mean, spread: of a target that is a number, which is learnt as (y - mean) / spread.
        numbers: the columns of numbers.
        categories: the other columns, and for each its values from row `RESERVED` on.
        dropped: columns that are there and not read.
        missing: cells that count as missing.
        transform: "quantile", by ranks to a normal distribution, or "standard", to mean 0 and
            deviation 1.
        medians: f64[N], which stand where a number is missing.
        scales: f64[N, Q] the quantiles of each column; f64[N, 2] its mean and deviation.
    """

    task: str
    target: str
    classes: tuple[str, ...]
    mean: float
    spread: float
    numbers: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    transform: str
    medians: np.ndarray
    scales: np.ndarray

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """The rows of each category's table."""
        return tuple(RESERVED + len(values) for values in self.categories.values())

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a model's outputs: of the classes, or of the target."""
        return self.classes or (self.target,)

    def encode(self, entries: Sequence[Entry], *, on_bad_row: OnBadRow = None) -> Rows:
        """The rows of a data set, with what is to be predicted.

        Args:
            entries: of a file.
            on_bad_row: gets the message of each row left out; None raises instead.

        Returns:
            What `inputs` says, and `labels`: i32[R], a class, or f32[R, 1], (y - mean) / spread.

        Raises:
            FwError: a column that was not there in training, or none of an entry's where one was;
                no value of the target in any; a cell that is no number in a column of numbers, a
                target that is missing, no number, or a class that train does not have; no entry
                left.
        """
        present = set[str]().union(*(entry.cells for entry in entries))
        if entries and (lost := [name for name in self.names if name not in present]):
            raise FwError(
                f"{entries[0].source}: no row has a column {lost[0]!r}, from which the model "
                "learnt; is it another table?"
            )
        if entries and all(as_text(e.cells.get(self.target)) in self.missing for e in entries):
            file = entries[0].source.rpartition(":")[0]
            raise FwError(
                f"{file}: no row has a value in {self.target!r}, the target, with which answers "
                "are compared; add the column, or leave the file out and answer it with: fw predict"
            )
        kept = [entry.cells for entry in self.fitting(entries, on_bad_row)]
        if entries and not kept:
            why = self._row_fault(entries[0].cells)
            raise FwError(f"{entries[0].source}: {why}; no other row of the file is a good one")
        arrays, labels = self._arrays(kept), [self._label(row[self.target]) for row in kept]
        if self.classes:
            arrays["labels"] = np.array(labels, np.int32)
        else:
            arrays["labels"] = np.array(labels, np.float32).reshape(-1, 1)
        empty = dict.fromkeys(arrays, 0) | {"labels": IGNORE if self.classes else math.nan}
        return Rows(arrays, empty)

    def fitting(self, entries: Sequence[Entry], on_bad_row: OnBadRow = None) -> list[Entry]:
        """The entries that `encode` can read; the others are refused as it says."""
        kept = []
        for entry in entries:
            if why := self._row_fault(entry.cells):
                refuse(f"{entry.source}: {why}", on_bad_row)
            else:
                kept.append(entry)
        return kept

    def inputs(self, items: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The arrays that a model takes for rows that are to be answered.

        Args:
            items: values by column, as JSON has them; an absent one is missing. The target and
                dropped columns may be there, and are not read.

        Returns:
            `numbers` f32[R, N], transformed, the median's where one is missing; `missing`
            f32[R, N], 1 there and 0 elsewhere; `categories` i32[R, K], rows of each category's
            table. Without columns of a kind, not its arrays.

        Raises:
            FwError: an item, with its number from 1, that is no mapping, has a column that training
                did not have, or a value of another kind.

        >>> from fw.data.fit_columns import fit_columns
        >>> entries = [Entry({"age": str(20.5 + i), "job": "ab"[i % 2], "good": "yn"[i % 2]})
        ...            for i in range(40)]
        >>> columns = fit_columns(entries, "good")
        >>> found = columns.inputs([{"age": 40, "job": "b"}, {"age": None, "job": "cook"}])
        >>> found["numbers"].round(1).tolist(), found["categories"].tolist()
        ([[0.0], [0.0]], [[3], [0]])
        """
        for number, item in enumerate(items, 1):
            if why := self.problem(item):
                raise FwError(f"row {number}: {why}")
        return self._arrays([_cells(item) for item in items])

    def problem(self, item: Any) -> str:
        """Why `inputs` refuses an item; nothing if it does not."""
        if not isinstance(item, Mapping):
            return f"expected values by column; got {type(item).__name__}"
        if odd := [name for name, value in item.items() if not is_cell(value)]:
            return f"{odd[0]!r}: expected {WANTED}; got {type(item[odd[0]]).__name__}"
        return self._fault(_cells(item))

    def answers(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """What a model says of rows.

        Args:
            outputs: [R, C] logits, or [R, 1] numbers as learnt.

        Returns:
            {"label", "score", "scores"} for each, or {"number"} in the target's unit.
        """
        if not self.classes:
            return [{"number": float(x) * self.spread + self.mean} for x in outputs[:, 0]]
        return [one_label(logits, self.classes) for logits in outputs]

    def save(self, folder: str | Path) -> None:
        """Write `FILE` and `TENSORS`; `FwError` if they cannot be."""
        told = {name: getattr(self, name) for name in _TOLD}
        arrays = {"medians": self.medians, "scales": self.scales}
        replace_tensors(Path(folder) / TENSORS, arrays)
        write_json(Path(folder) / FILE, told)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (*self.numbers, *self.categories)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset((*self.names, *self.dropped, self.target))

    @cached_property
    def _ids(self) -> dict[str, dict[str, int]]:
        """The rows of each category's table by value."""
        gone = dict.fromkeys(self.missing, ABSENT)
        return {
            name: {as_text(value): RESERVED + at for at, value in enumerate(values)} | gone
            for name, values in self.categories.items()
        }

    @cached_property
    def _class_ids(self) -> dict[str, int]:
        return {as_text(name): at for at, name in enumerate(self.classes)}

    def _fault(self, cells: Mapping[str, Cell]) -> str:
        """What is wrong with a row, its target apart; nothing if it is fine."""
        if odd := [name for name in cells if name not in self._known]:
            return f"there is no column {odd[0]!r}; expected {', '.join(self.names)}"
        for name in self.numbers:
            cell = cells.get(name)
            if as_text(cell) not in self.missing and as_number(cell) is None:
                return f"{name!r}: expected a number; got {cell!r}"
        return ""

    def _row_fault(self, cells: Mapping[str, Cell]) -> str:
        return self._fault(cells) or self._target_fault(cells)

    def _target_fault(self, cells: Mapping[str, Cell]) -> str:
        cell = cells.get(self.target)
        if as_text(cell) in self.missing:
            return f"{self.target!r}: expected what is to be predicted; it is missing"
        if self.classes and as_text(cell) not in self._class_ids:
            return f"{self.target!r}: expected {', '.join(self.classes)}; got {cell!r}"
        if not self.classes and as_number(cell) is None:
            return f"{self.target!r}: expected a number; got {cell!r}"
        return ""

    def _label(self, cell: Cell) -> float:
        if self.classes:
            return self._class_ids[as_text(cell)]
        return (float(cell or 0) - self.mean) / self.spread  # `_target_fault` saw that it is one

    def _arrays(self, rows: Sequence[Mapping[str, Cell]]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        if self.numbers:
            table = number_table(rows, self.numbers, self.missing)
            absent = np.isnan(table)
            filled = np.where(absent, self.medians, table)
            numbers = scaled(filled, self.scales, self.transform)
            arrays["numbers"] = numbers.astype(np.float32)
            arrays["missing"] = absent.astype(np.float32)
        if self.categories:
            ids = np.empty((len(rows), len(self.categories)), np.int32)
            for i, (name, known) in enumerate(self._ids.items()):
                ids[:, i] = [known.get(as_text(row.get(name)), UNSEEN) for row in rows]
            arrays["categories"] = ids
        return arrays


def _cells(item: Mapping[str, Any]) -> dict[str, Cell]:
    return {name: as_cell(value) for name, value in item.items()}


_TOLD = [
    *("task", "target", "classes", "mean", "spread", "numbers", "categories"),
    *("dropped", "missing", "transform"),
]


def load(folder: str | Path) -> Columns:
    """Read the columns that `Columns.save` wrote.

    Raises:
        FwError: a file is not there, too large, or says what no table can be.
    """
    path, tensors = Path(folder) / FILE, Path(folder) / TENSORS
    _check_size(path)
    told = read_json(path)

    def texts(value: Any) -> bool:
        listed = isinstance(value, list) and all(isinstance(text, str) for text in value)
        return listed and len(set(value)) == len(value)

    def finite(value: object) -> bool:
        return isinstance(value, float | int) and is_cell(value) and not isinstance(value, bool)

    if not isinstance(told, dict) or set(told) != set(_TOLD):
        raise FwError(f"{path}: expected an object with {', '.join(_TOLD)}; restore the file")
    vocabularies = told["categories"]
    good = {
        "task": told["task"] in TASKS,
        "target": isinstance(told["target"], str),
        "classes": texts(told["classes"])
        and (len(told["classes"]) > 1) == (told["task"] == CLASSES),
        "mean": finite(told["mean"]),
        "spread": finite(told["spread"]) and told["spread"] > 0,
        "numbers": texts(told["numbers"]),
        "categories": isinstance(vocabularies, dict) and all(map(texts, vocabularies.values())),
        "dropped": texts(told["dropped"]),
        "missing": texts(told["missing"]),
        "transform": told["transform"] in TRANSFORMS,
    }
    if bad := [name for name, fine in good.items() if not fine]:
        shown = json.dumps(plain(told[bad[0]], bad[0]))[:200]
        raise FwError(f"{path}: {bad[0]!r} cannot be {shown}; restore the file")
    told = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
    told["categories"] = {name: tuple(values) for name, values in vocabularies.items()}
    count = len(told["numbers"])
    medians, scales = np.zeros(0), np.zeros((0, 2))
    if count:
        _check_size(tensors)
        arrays = read_tensors(tensors)
        medians, scales = (arrays.get(name, np.zeros(0)) for name in ("medians", "scales"))
        fine = medians.shape == (count,) and scales.ndim == 2 and scales.shape[0] == count
        if fine and told["transform"] == "standard":
            fine = scales.shape[1] == 2 and bool((scales[:, 1] > 0).all())
        elif fine:
            fine = scales.shape[1] > 1 and bool((np.diff(scales) >= 0).all())
        kinds = {medians.dtype, scales.dtype} == {np.dtype(np.float64)}
        if not (fine and kinds and np.isfinite(medians).all() and np.isfinite(scales).all()):
            want = f"medians f64[{count}] and {told['transform']} scales f64[{count}, Q]"
            raise FwError(f"{tensors}: expected {want}; restore the file")
    made: dict[str, Any] = {**told, "medians": medians, "scales": scales}
    return Columns(**made)


def _check_size(path: Path) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None or size > LARGEST:
        found = "nothing" if size is None else f"{size} bytes"
        raise FwError(f"{path}: expected a file of at most {LARGEST} bytes; found {found}")
