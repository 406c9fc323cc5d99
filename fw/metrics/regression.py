"""Numbers against numbers: errors, which add up, and correlations, which want the whole sample.

Pearson's could be had from sums, but in 32 bits they lose it where the mean is large beside the
deviation; Spearman's is one of ranks and has no sum. So the pairs themselves are kept (`Sample`),
and everything here is computed from them on the host in float64.
"""

import numpy as np


def regression_report(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Score predicted numbers.

    Args:
        labels: [n].
        predictions: [n].

    Returns:
        "mse", "rmse", "mae", "r2" (1 - Σ (x - y)² / Σ (y - ȳ)²; where all labels are one number,
        1 if all predictions are it, too, and 0 otherwise), "pearson" and "spearman".

    Raises:
        ValueError: none, or unequal numbers of them.

    >>> found = regression_report(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 8.0]))
    >>> {name: round(value, 3) for name, value in found.items()}
    {'mse': 10.0, 'rmse': 3.162, 'mae': 2.667, 'r2': -14.0, 'pearson': 0.982, 'spearman': 1.0}
    """
    if labels.shape != predictions.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(
            f"regression_report: labels {labels.shape} and predictions {predictions.shape} must "
            "be one vector each, of one length, not empty"
        )
    y, x = labels.astype(np.float64), predictions.astype(np.float64)
    mse, variance = float(np.mean((x - y) ** 2)), float(np.var(y))
    return {
        "mse": mse,
        "rmse": mse**0.5,
        "mae": float(np.mean(np.abs(x - y))),
        "r2": 1 - mse / variance if variance > 0 else float(mse == 0),
        "pearson": pearson(y, x),
        "spearman": pearson(ranks(y), ranks(x)),
    }


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two vectors; 0 where one of them is constant and there is none.

    r = Σ (aᵢ - ā)(bᵢ - b̄) / √(Σ (aᵢ - ā)² Σ (bᵢ - b̄)²)

    >>> pearson(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    0.0
    """
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def ranks(values: np.ndarray) -> np.ndarray:
    """The ranks from 1; equal values share the mean of theirs, as Spearman's correlation wants.

    >>> ranks(np.array([5.0, 1.0, 5.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
