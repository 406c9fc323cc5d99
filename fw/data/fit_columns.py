"""A table's training rows say what its columns are: of numbers or of categories, and how scaled.

What is learnt is a `Columns`, which is all that other rows meet.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from fw.data.cells import LEAST, as_text, holds_numbers, number_table, vocabulary
from fw.data.columns import CLASSES, NUMBER, TASKS, Columns
from fw.data.files import OnBadRow
from fw.data.scaling import TRANSFORMS, learn_scales
from fw.data.table import Entry
from fw.errors import FwError

MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "?")
"""Cells that are missing, once spaces around them are gone, unless other ones are stated."""


def fit_columns(
    entries: Sequence[Entry],
    target: str,
    task: str = CLASSES,
    *,
    drop: Iterable[str] = (),
    numeric: Iterable[str] = (),
    categorical: Iterable[str] = (),
    classes: Iterable[str] = (),
    transform: str = TRANSFORMS[0],
    missing: Iterable[str] = MISSING,
    least: int = LEAST,
    on_bad_row: OnBadRow = None,
) -> Columns:
    """Learn the columns of a table from its training rows.

    A column holds numbers if every cell that is not missing is a finite number, and one of them is
    not whole or there are more than `FEW` different ones; else it holds categories. A column of
    which nine in ten different values are numbers, but not all, is refused: it is one or the other
    only for who knows it.

    Args:
        entries: the training rows and no others.
        target: the column to predict.
        task: "tabular_classification" or "tabular_regression".
        drop: columns to leave out, such as numbers of rows.
        numeric: columns of numbers, whatever the rule says.
        categorical: columns of categories, whatever the rule says.
        classes: the target's values in the order of their ids, of two the positive one last; none
            for all in alphabetical order.
        transform: of numbers, "quantile" (Gorishniy et al. 2021, arXiv:2106.11959; without their
            noise, so that a row is the same each time) or "standard".
        missing: cells that count as missing, beside empty ones.
        least: how many rows must have a category for it to get a row of its own: see
            `fw.data.cells.LEAST`.
        on_bad_row: gets the message of each row left out; None raises instead.

    Raises:
        FwError: no rows; a column that is not there, has no value in any row, or mixes numbers and
            others; a target that is missing, or no number, or has fewer than two values.

    >>> rows = [{"age": "41", "job": "clerk", "good": "yes"}, {"age": "?", "job": "", "good": "no"}]
    >>> columns = fit_columns([Entry(row) for row in rows], "good", numeric=["age"], least=1)
    >>> columns.numbers, columns.categories, columns.classes
    (('age',), {'job': ('clerk',)}, ('no', 'yes'))
    """
    drop, numeric, categorical = tuple(drop), tuple(numeric), tuple(categorical)
    missing = tuple(dict.fromkeys(map(as_text, ["", *missing])))
    if task not in TASKS or transform not in TRANSFORMS:
        known = f"{', '.join(TASKS)}, and of {', '.join(TRANSFORMS)}"
        raise FwError(f"task {task!r} with transform {transform!r}: expected one of {known}")
    names = tuple(dict.fromkeys(name for entry in entries for name in entry.cells))
    for name in (target, *drop, *numeric, *categorical):
        if name not in names:
            there = ", ".join(names) or "no rows at all"
            raise FwError(f"there is no column {name!r} to learn from; expected one of {there}")
    read = [name for name in names if name not in (target, *drop)]
    if not read:
        raise FwError(f"there is no column beside {target!r} to learn from")
    rows, sources = [entry.cells for entry in entries], [entry.source for entry in entries]
    numbers = tuple(
        name
        for name in read
        if name in numeric
        or (name not in categorical and holds_numbers(rows, sources, name, missing))
    )
    others = [name for name in read if name not in numbers]
    found = {as_text(row.get(target)) for row in rows} - {*missing}
    names = (tuple(map(as_text, classes)) or tuple(sorted(found))) if task == CLASSES else ()
    if task == CLASSES and not 1 < len(names) == len(set(names)):
        shown = ", ".join(names) or "none"
        raise FwError(f"{target!r}: expected two classes or more to tell apart; got {shown}")
    columns = Columns(
        task, target, names, 0.0, 1.0, numbers, dict.fromkeys(others, ()), drop, missing,
        transform, np.zeros(len(numbers)), np.zeros((len(numbers), 2)),
    )  # fmt: skip
    kept = columns.fitting(entries, on_bad_row)
    rows = [entry.cells for entry in kept]
    if not rows:
        raise FwError("there are no rows to learn from")
    for name in read:
        if all(as_text(row.get(name)) in missing for row in rows):
            raise FwError(f"{name!r}: no row has a value; leave the column out: --drop {name}")

    vocabularies = {name: vocabulary(rows, name, missing, least) for name in others}
    columns = replace(columns, categories=vocabularies)
    if task == NUMBER:
        y = number_table(rows, [target], missing)
        if not np.std(y) > 0:
            raise FwError(f"{target!r}: expected numbers that differ; every row has {y[0, 0]:g}")
        columns = replace(columns, mean=float(np.mean(y)), spread=float(np.std(y)))
    if numbers:
        table = number_table(rows, numbers, missing)
        scales = learn_scales(table, transform)
        columns = replace(columns, medians=np.nanmedian(table, 0), scales=scales)
    return columns
