"""The curves of two classes and a score: what the figures of `fw.metrics.binary_report` are of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from fw.errors import FwError
from fw.report.svg import Point, Series, chart, columns
from fw.report.text import percent

_DIAGONAL: list[Point] = [(0.0, 0.0), (1.0, 1.0)]


def risk(entry: Mapping[str, Any], name: str, path: Path, where: str) -> Element:
    """Draw reliability, ROC, and the classes' shares by score, whose widest gap is KS.

    Args:
        entry: "reliability" [k, 3], as `fw.metrics.reliability` gives it, and "roc" [d, 3], false
            and true positive rate and the least score of each point.
        name: of class 1.
        path: the file, for errors.
        where: the place in it, for errors.

    Raises:
        FwError: a part is not such a table of numbers.
    """
    for part in ("reliability", "roc"):
        table = entry.get(part)
        if not (isinstance(table, list) and table and all(map(_is_row, table))):
            raise FwError(f"{path}: '{where}/{part}': expected rows of three numbers from 0")
    bins = [(said, share) for said, share, _ in entry["reliability"]]
    roc: list[Point] = [(false, true) for false, true, _ in entry["roc"]]
    # From the largest score down; an axis wants it from the least up.
    others, own = ([(row[2], row[i]) for row in reversed(entry["roc"])] for i in (0, 1))
    even = Series("even", _DIAGONAL, "faint")
    drawn = (
        ("Reliability", [even, Series("share", bins, "dots", "b")], "said", f"{name} in truth"),
        ("ROC", [even, Series("roc", roc)], "false positive rate", "true positive rate"),
        (
            "Share at or above a score",
            [Series(name, own), Series("others", others, "line", "b")],
            f"score of {name}",
            "share of the class",
        ),
    )
    return columns(chart(t, s, x=x, y=y, from_zero=True, show=percent) for t, s, x, y in drawn)


def _is_row(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    return all(isinstance(x, int | float) and x >= 0 for x in row)
