"""Columns of numbers on a common scale, by constants that are learnt once: the arithmetic alone.

`columns` learns them from training rows, and keeps them.
"""

from statistics import NormalDist

import numpy as np

TRANSFORMS = ("quantile", "standard")

_QUANTILES = (10, 1000)  # at least and at most: a column's curve has one for every 30 rows
_EDGE = 1e-7  # how near a probability comes to 0 and 1, as in scikit-learn: ±5.2 deviations


def learn_scales(table: np.ndarray, transform: str) -> np.ndarray:
    """What `scaled` needs of each column.

    Args:
        table: [R, N], NaN where a number is missing, not a whole column of them.
        transform: one of `TRANSFORMS`.

    Returns:
        [N, Q] quantiles, as many as the rows can tell, or [N, 2] mean and deviation.
    """
    if transform == "standard":
        spread = np.nanstd(table, 0)
        return np.stack([np.nanmean(table, 0), np.where(spread > 0, spread, 1)], -1)
    least, most = _QUANTILES
    count = max(min(len(table) // 30, most), least)
    quantiles = np.nanpercentile(table, np.linspace(0, 100, count), axis=0).T
    # Rounding may turn two equal ones round.
    return np.ascontiguousarray(np.maximum.accumulate(quantiles, -1))


def scaled(table: np.ndarray, scales: np.ndarray, transform: str) -> np.ndarray:
    """Columns [R, N] on the scale of a standard normal distribution, or of mean 0 and deviation 1.

    >>> scaled(np.array([[1.0], [5.0]]), np.array([[3.0, 2.0]]), "standard").tolist()
    [[-1.0], [1.0]]
    """
    if transform == "standard":
        return (table - scales[:, 0]) / scales[:, 1]
    return np.stack([to_normal(x, q) for x, q in zip(table.T, scales, strict=True)], -1)


def to_normal(x: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """x by its place among quantiles, as a number of a standard normal distribution.

    Φ⁻¹(F(x)), F interpolated between quantiles, in the middle of those that are equal, but 0 and 1
    at the ends, and at least `_EDGE` from there; 0 where all quantiles are one number. Equal to
    scikit-learn's `QuantileTransformer(output_distribution="normal")`, that last case apart.

    Args:
        x: [R].
        quantiles: [Q] at equal distances from 0 to 1, not falling.

    >>> to_normal(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])).round(2)
    array([-5.2,  0. ,  5.2])
    """
    if quantiles[0] == quantiles[-1]:
        return np.zeros_like(x)
    places = np.linspace(0, 1, len(quantiles))
    below = np.interp(x, quantiles, places)  # of equal quantiles the last, so both ways round
    above = 1 - np.interp(-x, -quantiles[::-1], places)
    inverse = NormalDist().inv_cdf
    middle = (below + above) / 2
    middle = np.where(x <= quantiles[0], 0, np.where(x >= quantiles[-1], 1, middle))
    values, which = np.unique(middle, return_inverse=True)
    return np.array([inverse(p) for p in np.clip(values, _EDGE, 1 - _EDGE)])[which].reshape(x.shape)
