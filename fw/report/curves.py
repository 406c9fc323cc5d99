"""What the records of `metrics.jsonl` become: figures of the whole run and curves over the steps."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any
from xml.etree.ElementTree import Element

from fw.report.svg import Point, Series, chart, columns, thin
from fw.report.text import number, percent

Records = Sequence[Mapping[str, Any]]

_POINTS = 400  # about one a pixel
_WINDOW = 20  # the smoothed line averages over about this part of the run
UNITS = {"loss": "nats"}
FRACTIONS = ("accuracy", "precision", "recall", "f1", "macro_f1", "micro_f1", "weighted_f1")


def curves(records: Records) -> Element | None:
    """Draw what was logged over the steps; what was not is left out.

    Args:
        records: of kind "train" and "eval", as in `fw.run`.

    Returns:
        Charts beside each other, None if there is nothing to draw.
    """
    train = [record for record in records if record.get("kind") == "train"]
    charts = [
        _loss(train, records),
        _metric(records),
        _one(train, "tokens_per_second", "Throughput", "real tokens/s", from_zero=True),
        _one(train, "learning_rate", "Learning rate", "learning rate", from_zero=True),
        _one(train, "grad_norm", "Gradient norm", "gradient norm (L2)", from_zero=True),
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


def smooth(points: Sequence[Point], window: float) -> list[Point]:
    """Average exponentially, without the bias of the start (Kingma & Ba, arXiv:1412.6980, §3).

    sₜ = β sₜ₋₁ + (1 - β) yₜ and ŷₜ = sₜ / (1 - βᵗ), with β = 1 - 1/window.

    Args:
        points: (x, y); gaps stay gaps and do not count.
        window: about how many points are averaged, from 1.

    Returns:
        The smoothed points.

    >>> smooth([(0, 1.0), (1, 3.0), (2, None)], 2)
    [(0, 1.0), (1, 2.3333333333333335), (2, None)]
    """
    decay = 1 - 1 / max(window, 1.0)
    total, weight, out = 0.0, 0.0, []
    for x, y in points:
        if y is not None:
            total = decay * total + (1 - decay) * y
            weight = decay * weight + (1 - decay)
        out.append((x, None if y is None else total / weight))
    return out


def _loss(train: Records, records: Records) -> Element | None:
    raw = _points(train, "train", "loss")
    series = []
    if any(y is not None for _, y in raw):
        window = len(raw) / _WINDOW
        if window > 2:
            series = [
                Series("train", thin(raw, _POINTS), "faint"),
                Series("smoothed", thin(smooth(raw, window), _POINTS)),
            ]
        else:
            series = [Series("train", raw)]
    for split in _splits(records):
        dots = _points(_of(records, split), "eval", "loss")
        if any(y is not None for _, y in dots):
            series.append(Series(split, thin(dots, _POINTS), "dots", "b"))
    return chart("Loss", series, x="step", y="loss (nats)") if series else None


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


def _one(train: Records, key: str, title: str, unit: str, *, from_zero: bool) -> Element | None:
    points = thin(_points(train, "train", key), _POINTS)
    if all(y is None for _, y in points):
        return None
    return chart(title, [Series(title.lower(), points)], x="step", y=unit, from_zero=from_zero)


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
