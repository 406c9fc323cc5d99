"""One table of precision, recall and F1 for everything that has true positives to count.

`classification_report` (classes of one label) and `entity_report` (types of entities) both reduce
to three vectors: true positives, predicted, gold. This file turns them into a `Report`, and a
report into the text that scikit-learn and seqeval print or the dict that they return. A ratio
with a zero denominator is 0, as their `zero_division=0`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fw.errors import FwError

_AVERAGES = ("micro avg", "macro avg", "weighted avg")
_COLUMNS = ("precision", "recall", "f1-score", "support")


@dataclass(frozen=True)
class Row:
    """The scores of one class, type or average; support is the number of gold items."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Report:
    """Scores per class or type and their three averages.

    Attributes:
        rows: one per class or type.
        micro: scores of the pooled counts.
        macro: plain mean over the rows.
        weighted: mean over the rows, weighted by support.
        accuracy: fraction of items that are right, where every item has exactly one prediction
            (all three micro scores equal it then); None for entities.
    """

    rows: tuple[Row, ...]
    micro: Row
    macro: Row
    weighted: Row
    accuracy: float | None = None


def summarise(
    names: Sequence[str],
    true_positives: np.ndarray,
    predicted: np.ndarray,
    gold: np.ndarray,
    *,
    single_label: bool,
) -> Report:
    """Make a report from three vectors of counts.

    precision = tp / predicted, recall = tp / gold, F1 = 2 tp / (predicted + gold).

    Args:
        names: N row names, in the order of the counts.
        true_positives: int64[N].
        predicted: int64[N].
        gold: int64[N].
        single_label: every item has one label and one prediction, so the micro average is the
            accuracy.

    Returns:
        The report; all averages of zero rows are 0.

    Raises:
        ValueError: the lengths differ.

    >>> summarise(["A"], np.array([1]), np.array([2]), np.array([1]), single_label=False).rows[0]
    Row(name='A', precision=0.5, recall=1.0, f1=0.6666666666666666, support=1)
    """
    counts = np.stack([true_positives, predicted, gold], axis=-1).astype(np.int64)
    if counts.shape != (len(names), 3):
        raise ValueError(
            f"summarise: counts for {counts.shape[0]} rows, names for {len(names)}; "
            "expected one name a row"
        )
    scores = _scores(counts)
    support = counts[:, 2]
    pooled = counts.sum(axis=0)
    total = int(pooled[2])
    micro = _row(_AVERAGES[0], _scores(pooled), total)
    macro = scores.mean(axis=0) if len(names) else np.zeros(3)
    weighted = support @ scores / total if total else np.zeros(3)
    return Report(
        rows=tuple(map(_row, names, scores, support)),
        micro=micro,
        macro=_row(_AVERAGES[1], macro, total),
        weighted=_row(_AVERAGES[2], weighted, total),
        accuracy=micro.precision if single_label else None,
    )


def to_text(report: Report, *, digits: int = 2) -> str:
    """Print a report as scikit-learn and seqeval do, character for character.

    Args:
        report: from `classification_report` or `entity_report`.
        digits: decimals of the scores.

    Returns:
        Lines, the last one ended by a newline.

    >>> counts = np.array([1]), np.array([2]), np.array([1])
    >>> print(to_text(summarise(["PER"], *counts, single_label=False)))
                  precision    recall  f1-score   support
    <BLANKLINE>
             PER       0.50      1.00      0.67         1
    <BLANKLINE>
       micro avg       0.50      1.00      0.67         1
       macro avg       0.50      1.00      0.67         1
    weighted avg       0.50      1.00      0.67         1
    <BLANKLINE>
    """
    width = max(len(name) for name in (*_AVERAGES, *(row.name for row in report.rows)))

    def line(name: str, *cells: str) -> str:
        return f"{name:>{width}} " + "".join(f" {cell:>9}" for cell in cells)

    def scored(row: Row) -> str:
        scores = (row.precision, row.recall, row.f1)
        return line(row.name, *(f"{score:.{digits}f}" for score in scores), str(row.support))

    if report.accuracy is None:
        pooled = scored(report.micro)
    else:
        pooled = line(
            "accuracy", "", "", f"{report.accuracy:.{digits}f}", str(report.micro.support)
        )
    body = [*map(scored, report.rows), "", pooled, scored(report.macro), scored(report.weighted)]
    return "\n".join([line("", *_COLUMNS), "", *body, ""])


def to_dict(report: Report) -> dict[str, dict[str, float | int] | float]:
    """Convert a report to the dict that scikit-learn and seqeval return; it is ready for JSON.

    Args:
        report: from `classification_report` or `entity_report`.

    Returns:
        Row name to {"precision", "recall", "f1-score", "support"}; "accuracy" to a number where
        there is one, "micro avg" to scores where there is none; "macro avg"; "weighted avg".

    Raises:
        FwError: two rows have one name, or a row has the name of an average.

    >>> counts = np.array([1]), np.array([2]), np.array([1])
    >>> to_dict(summarise(["PER"], *counts, single_label=True))["accuracy"]
    0.5
    """
    averages = [report.macro, report.weighted]
    if report.accuracy is None:
        averages.insert(0, report.micro)
    rows = [*report.rows, *averages]
    names = [row.name for row in rows] + ["accuracy"] * (report.accuracy is not None)
    if clash := sorted({name for name in names if names.count(name) > 1}):
        raise FwError(f"report: {clash} would name two entries of the dict; rename these labels")
    entries: dict[str, dict[str, float | int] | float] = {
        row.name: dict(zip(_COLUMNS, (row.precision, row.recall, row.f1, row.support), strict=True))
        for row in rows
    }
    if report.accuracy is not None:
        entries["accuracy"] = report.accuracy
    return entries


def _scores(counts: np.ndarray) -> np.ndarray:
    """Map counts [..., (tp, predicted, gold)] to scores [..., (precision, recall, F1)]."""
    tp, predicted, gold = (counts[..., i].astype(np.float64) for i in range(3))
    above = np.stack([tp, tp, 2 * tp], axis=-1)
    below = np.stack([predicted, gold, predicted + gold], axis=-1)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _row(name: str, scores: np.ndarray, support: int) -> Row:
    precision, recall, f1 = map(float, scores)
    return Row(name, precision, recall, f1, int(support))
