"""Two classes and a score: how well it orders them, and how true it is as a probability.

AUC, average precision and the KS statistic want the order of the whole sample, so pairs of label
and score are kept (`Sample`) and everything here is computed from them on the host in float64.
Ranking and credit risk share these figures; `classification` has what follows from the classes
alone.
"""

import math
from collections.abc import Sequence

import numpy as np

from fw.errors import FwError
from fw.metrics.classification import classification_report
from fw.metrics.multi_label import THRESHOLD
from fw.metrics.probabilities import sigmoid

BINS = 10
"""Of a reliability curve, if nothing else is said."""


def binary_report(
    labels: np.ndarray, logits: np.ndarray, names: Sequence[str] = ("0", "1")
) -> dict[str, float]:
    """Score the logit of class 1, whose probability is its sigmoid.

    Far out, different logits have one probability, so the order is that of the logits.

    Args:
        labels: [n], 0 or 1.
        logits: [n].
        names: of the classes, for the error.

    Returns:
        Of the order: "auc", "average_precision", "ks". Of the probabilities: "log_loss", "brier",
        and "calibration_error" with `BINS` bins of equal width, "calibration_error_by_count" with
        as many of equal count. Above `THRESHOLD`: "precision", "recall", "f1", "accuracy".

    Raises:
        FwError: all rows are of one class, or as `roc_curve`.
        ValueError: as `roc_curve`.

    >>> report = binary_report(np.array([0, 0, 1, 1]), np.array([-2.0, -0.3, -0.5, 50.0]))
    >>> round(report["auc"], 4), round(report["ks"], 4), report["recall"]
    (0.75, 0.5, 0.5)
    """
    y, x = _vectors(labels, logits)
    if y.min() == y.max():
        raise FwError(
            f"all {len(y)} rows are {names[int(y[0])]!r}: AUC compares rows of two classes; "
            "give some of both to judge by"
        )
    p = sigmoid(x)
    given, matrix = (p > THRESHOLD).astype(np.int64), np.zeros((2, 2), np.int64)
    np.add.at(matrix, (y.astype(np.int64), given), 1)
    scores = classification_report(matrix, ("0", "1"), absent=True)
    return {
        "auc": roc_auc(y, x),
        "average_precision": average_precision(y, x),
        "ks": ks_statistic(y, x),
        "log_loss": log_loss(y, p),
        "brier": float(np.mean((p - y) ** 2)),
        "calibration_error": calibration_error(reliability(y, p)),
        "calibration_error_by_count": calibration_error(reliability(y, p, by="count")),
        "precision": scores.rows[1].precision,
        "recall": scores.rows[1].recall,
        "f1": scores.rows[1].f1,
        "accuracy": float(scores.micro.precision),
    }


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of each class that has at least a score, for each score from the largest down.

    Args:
        labels: [n], 0 or 1.
        scores: [n], any finite numbers; larger where class 1 is likelier.

    Returns:
        False positive rate, true positive rate, and the score, [d + 1] each for d different scores:
        the first is (0, 0) at infinity. A rate is NaN where its class is absent.

    Raises:
        FwError: a score that is not finite.
        ValueError: none, or unequal numbers of them, or another label.

    >>> [x.tolist() for x in roc_curve(np.array([0, 1, 1]), np.array([0.5, 0.5, 0.9]))]
    [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0], [inf, 0.9, 0.5]]
    """
    hits, misses, values = _counts(labels, scores)
    with np.errstate(invalid="ignore"):
        return misses / misses[-1], hits / hits[-1], values


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a row of class 1 scores above one of class 0; equal scores count a half.

    Equal to scikit-learn's `roc_auc_score`; NaN where a class is absent.

    >>> roc_auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    false, true, _ = roc_curve(labels, scores)
    return float(np.trapezoid(true, false))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Σ (Rᵢ - Rᵢ₋₁) Pᵢ over the different scores, from the largest down: R recall, P precision.

    Equal to scikit-learn's `average_precision_score`; NaN where no row is of class 1.

    >>> average_precision(np.array([1, 0, 1]), np.array([0.9, 0.5, 0.1])).__round__(4)
    0.8333
    """
    hits, misses, _ = _counts(labels, scores)
    if not hits[-1]:
        return math.nan
    precision = hits[1:] / (hits + misses)[1:]
    return float(np.sum(np.diff(hits) / hits[-1] * precision))


def ks_statistic(labels: np.ndarray, scores: np.ndarray) -> float:
    """How far apart the distributions of the two classes' scores are (Kolmogorov-Smirnov).

    max |F₁ - F₀|, equal to `scipy.stats.ks_2samp`'s statistic; NaN where a class is absent.

    >>> ks_statistic(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
    0.5
    """
    false, true, _ = roc_curve(labels, scores)
    return float(np.max(np.abs(true - false)))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """-mean log p(label) in nats; probabilities stay 2⁻⁵² from 0 and 1, as in scikit-learn.

    >>> round(log_loss(np.array([1, 0]), np.array([0.5, 0.5])), 4)
    0.6931
    """
    y, p = _checked(labels, probabilities)
    tiny = np.finfo(np.float64).eps
    return float(-np.mean(np.log(np.clip(np.where(y == 1, p, 1 - p), tiny, 1 - tiny))))


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS, by: str = "width"
) -> np.ndarray:
    """How often class 1 occurs where a probability is said, bin by bin.

    Args:
        labels: [n], 0 or 1.
        probabilities: [n], in 0…1.
        bins: at least one.
        by: "width", bins of equal width; "count", between quantiles, of as many rows each as equal
            probabilities allow.

    Returns:
        [k, 3]: mean probability, share of class 1 and number of rows of each bin that has any.

    Raises:
        ValueError: as above, no bins, or another `by`.

    >>> reliability(np.array([0, 1, 1]), np.array([0.1, 0.1, 0.75]), bins=2).tolist()
    [[0.1, 0.5, 2.0], [0.75, 1.0, 1.0]]
    """
    y, p = _checked(labels, probabilities)
    if bins < 1 or by not in ("width", "count"):
        raise ValueError(f"reliability: {bins} bins by {by!r}; expected 1 or more, width or count")
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    edges = inner if by == "width" else np.quantile(p, inner)
    which = np.searchsorted(edges, p)
    sums = np.stack([np.bincount(which, x, minlength=bins) for x in (p, y, np.ones_like(p))], -1)
    sums = sums[sums[:, 2] > 0]
    return sums / np.concatenate([sums[:, 2:]] * 2 + [np.ones((len(sums), 1))], -1)


def calibration_error(curve: np.ndarray) -> float:
    """Mean distance of probability and share over the rows (Guo et al. 2017, arXiv:1706.04599).

    Args:
        curve: of `reliability`, whose kind of bins is that of the error.

    >>> calibration_error(np.array([[0.1, 0.5, 2.0], [0.75, 1.0, 1.0]])).__round__(4)
    0.35
    """
    return float(np.average(np.abs(curve[:, 0] - curve[:, 1]), weights=curve[:, 2]))


def _counts(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of class 1, and of class 0, with at least each score, from infinity down."""
    y, x = _vectors(labels, scores)
    order = np.argsort(-x, kind="stable")
    y, x = y[order], x[order]
    last = np.flatnonzero(np.append(np.diff(x) != 0, True))  # of each run of equal scores
    hits = np.append(0, np.cumsum(y)[last])
    return hits, np.append(0, last + 1) - hits, np.append(np.inf, x[last])


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, p = _vectors(labels, probabilities)
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"probabilities in {p.min():g} … {p.max():g}; expected 0 … 1")
    return y, p


def _vectors(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if labels.shape != scores.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"labels {labels.shape} and scores {scores.shape} must be one vector each, of one "
            "length, not empty"
        )
    y, x = labels.astype(np.float64), scores.astype(np.float64)
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels: expected 0 and 1 alone; leave ignored rows out")
    if not np.isfinite(x).all():
        raise FwError(
            f"scores: {np.sum(~np.isfinite(x))} of {len(x)} are NaN or infinite, so the model has "
            "diverged; train it with a lower --learning-rate, with --clip 1 or --precision f32"
        )
    return y, x
