"""What the records of `metrics.jsonl` become: curves over the steps, figures of the run."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any
from xml.etree.ElementTree import Element

from fw.report.svg import Point, Series, chart, columns, thin
from fw.report.text import number, percent

Records = Sequence[Mapping[str, Any]]

_POINTS = 400  # about one a pixel
_WINDOW = 20  # the smoothed line averages over one part in so many of the run
UNITS = {"loss": "nats"}
SQUARES = "squares"  # of the loss of numbers, whatever they measure
FRACTIONS = (
    *("accuracy", "precision", "recall", "f1", "macro_f1", "micro_f1", "weighted_f1"),
    "exact_match",
    *("auc", "average_precision", "ks", "calibration_error", "calibration_error_by_count"),
)


def curves(records: Records, unit: str = UNITS["loss"]) -> Element | None:
    """Draw what was logged over the steps; what was not is left out.

    Args:
        records: of kind "train" and "eval", as in `fw.run`.
        unit: of the loss.

    Returns:
        Charts beside each other, None if there is nothing to draw.
    """
    train = [record for record in records if record.get("kind") == "train"]
    charts = [
        _loss(train, records, unit),
        _metric(records),
        _one(train, "tokens_per_second", "Throughput", "real tokens/s"),
        _one(train, "examples_per_second", "Throughput", "examples/s"),
        _one(train, "learning_rate", "Learning rate", "learning rate"),
        _one(train, "grad_norm", "Gradient norm", "gradient norm (L2)"),
    ]
    drawn = [one for one in charts if one is not None]
    return columns(drawn) if drawn else None


def throughput(records: Records) -> float | None:
    """The median rate of the training records in real tokens a second."""
    rates = [y for _, y in _points(records, "train", "tokens_per_second") if y is not None]
    return median(rates) if rates else None


def not_finite(records: Records) -> int:
    """The number of training records whose loss is null: it was NaN or infinite."""
    return sum(r.get("kind") == "train" and "loss" in r and r["loss"] is None for r in records)


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """Average over a window centred on each point, so that the line does not lag.

    ŷᵢ = mean(yⱼ, |j - i| ≤ min(reach, i, n - 1 - i)): towards both ends the window narrows rather
    than leaning inwards.

    Args:
        points: (x, y); gaps stay gaps and do not count.
        reach: points to each side, from 0.

    Returns:
        The smoothed points.

    >>> smooth([(0, 1.0), (1, 5.0), (2, 3.0), (3, None)], 1)
    [(0, 1.0), (1, 3.0), (2, 4.0), (3, None)]
    """
    sums = list(accumulate((y or 0.0 for _, y in points), initial=0.0))
    counts = list(accumulate((y is not None for _, y in points), initial=0))
    out: list[Point] = []
    for i, (x, y) in enumerate(points):
        half = min(reach, i, len(points) - 1 - i)
        low, high = i - half, i + half + 1
        mean = None if y is None else (sums[high] - sums[low]) / (counts[high] - counts[low])
        out.append((x, mean))
    return out


def _loss(train: Records, records: Records, unit: str) -> Element | None:
    series = _lines("train", _points(train, "train", "loss"))
    for split in _splits(records):
        dots = _points(_of(records, split), "eval", "loss")
        if any(y is not None for _, y in dots):
            series.append(Series(split, thin(dots, _POINTS), "dots", "b"))
    return chart("Loss", series, x="step", y=f"loss ({unit})") if series else None


def _lines(name: str, raw: Sequence[Point]) -> list[Series]:
    """The points as they are, behind a smoothed line where there are enough of them."""
    if all(y is None for _, y in raw):
        return []
    reach = len(raw) // _WINDOW // 2
    if reach == 0:
        return [Series(name, raw)]
    smoothed = Series("smoothed", thin(smooth(raw, reach), _POINTS))
    return [Series(name, thin(raw, _POINTS), "faint"), smoothed]


def _metric(records: Records) -> Element | None:
    """The figure by which the best checkpoint is chosen."""
    series, names = [], []
    for split in _splits(records):
        dots = _points(_of(records, split), "eval", "value")
        if any(y is not None for _, y in dots):
            names += [str(r["metric"]) for r in _of(records, split) if r.get("metric")][:1]
            series.append(Series(split, thin(dots, _POINTS), "dots", "b"))
    if not series:
        return None
    name = names[0] if names else "metric"
    if name in FRACTIONS:
        series = [
            Series(s.name, [(x, _times_100(y)) for x, y in s.points], "dots", "b") for s in series
        ]
    show = (lambda y: percent(y / 100)) if name in FRACTIONS else number
    unit = f"{label(name)} (%)" if name in FRACTIONS else label(name)
    splits = ", ".join(s.name for s in series)
    return chart(f"{label(name)} on {splits}", series, x="step", y=f"{splits} {unit}", show=show)


def _one(train: Records, key: str, title: str, unit: str) -> Element | None:
    points = _points(train, "train", key)
    series = _lines("train", points)
    if not series:
        return None
    if key == "learning_rate":  # a schedule has no noise to average away, only corners to lose
        series = [Series("train", thin(points, _POINTS))]
    return chart(title, series, x="step", y=unit, from_zero=True)


def label(name: str) -> str:
    """The name of a figure for the eye.

    >>> label("macro_f1"), label("loss")
    ('macro-F1', 'loss')
    """
    return name.replace("_f1", "-F1").replace("_", " ") if name != "f1" else "F1"


def _points(records: Records, kind: str, key: str) -> list[Point]:
    """(step, value) in the order of the steps; None where it was not finite."""
    found = [
        (r["step"], value if isinstance(value, int | float) and math.isfinite(value) else None)
        for r in records
        if r.get("kind") == kind and isinstance(r.get("step"), int)
        for value in (r.get(key, ...),)
        if value is not ...
    ]
    return sorted(found, key=lambda point: point[0])


def _splits(records: Records) -> list[str]:
    return list(
        dict.fromkeys(str(r.get("split", "eval")) for r in records if r.get("kind") == "eval")
    )


def _of(records: Records, split: str) -> Records:
    return [r for r in records if str(r.get("split", "eval")) == split]


def _times_100(y: float | None) -> float | None:
    return None if y is None else 100 * y
