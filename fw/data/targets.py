"""What is said of a whole text, by task: one class, several, or numbers; checked value by value.

Tables and JSON lines say the same in other words, so `readers` bring both here: a cell becomes, by
`read_cell`, what JSON would have held, and `make_record` judges that.
"""

import math
from collections.abc import Mapping
from typing import Any

from fw.data.records import Labelled, MultiLabelled, Rated

SEPARATOR = ","
"""What stands between the labels in a cell, unless another one is stated."""

WANTED = {
    "sequence_classification": "a label",
    "multi_label_classification": "labels",
    "regression": "finite numbers",
}
"""What a row has beside its text, by task, for messages."""

WANTED_JSON = {
    "sequence_classification": "a text or a whole number",
    "multi_label_classification": "[texts or whole numbers]",
    "regression": "a finite number",
}


def read_cell(task: str, cell: str, separator: str) -> Any:
    """The value of a table's cell; what is no number is left as text.

    >>> read_cell("multi_label_classification", "late, broken", ",")
    ['late', 'broken']
    >>> read_cell("regression", "1e3", ",")
    1000.0
    """
    if task == "multi_label_classification":
        return [part.strip() for part in cell.split(separator)] if cell.strip() else []
    if task == "regression":
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell


def make_record(
    task: str, text: Any, values: Mapping[str, Any], source: str
) -> Labelled | MultiLabelled | Rated | None:
    """The record of a row, or None if a value is not what the task wants.

    Args:
        task: one of `fw.labels.PROBLEMS`.
        text: of the row.
        values: what is said of it, by column: one, for "regression" one or more.
        source: file and line.

    >>> make_record("regression", "fine", {"valence": 1.5}, "a.csv:2")
    Rated(text='fine', numbers={'valence': 1.5}, domain='', source='a.csv:2')
    >>> make_record("regression", "fine", {"valence": math.nan}, "a.csv:2")
    """
    if not (isinstance(text, str) and text.strip()):
        return None
    if task == "regression":
        if not all(type(v) in (int, float) and _is_finite(v) for v in values.values()):
            return None
        return Rated(text, {name: float(v) for name, v in values.items()}, source=source)
    (value,) = values.values()
    names = value if task == "multi_label_classification" else [value]
    if not (isinstance(names, list) and all(map(_is_label, names))):
        return None
    labels = tuple(dict.fromkeys(str(name).strip() for name in names))
    if task == "multi_label_classification":
        return MultiLabelled(text, labels, source=source)
    return Labelled(text, labels[0], source=source)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_label(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and bool(value.strip()))
