"""How well an image is cut into regions: pixel by pixel, and region by region.

Pixels are counted in a confusion matrix (`fw.metrics.classification`), which is all that Dice, IoU
and pixel error need. A membrane that is broken by one pixel joins two cells and hardly changes any
of them; the Rand error sees it, for it asks of pairs of pixels whether they are in one region. It
needs connected components, so it is computed on the host, an image at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fw.errors import FwError
from fw.labels import IGNORE


@dataclass(frozen=True)
class Overlap:
    """How far predicted and true pixels of a class are the same, |A ∩ B| over their size.

    Attributes:
        name: of the class.
        iou: |A ∩ B| / |A ∪ B|, the Jaccard index.
        dice: 2 |A ∩ B| / (|A| + |B|), which is F1.
        pixels: that have the label.
    """

    name: str
    iou: float
    dice: float
    pixels: int


def segmentation_report(counts: Any, names: Sequence[str]) -> dict[str, Any]:
    """Score a confusion matrix of pixels.

    Equal to scikit-learn's `jaccard_score`, `f1_score` and 1 - `accuracy_score`. Means are over the
    classes that are labelled or predicted anywhere, one weight each.

    Args:
        counts: int[C, C] from `confusion`, merged over batches.
        names: C class names.

    Returns:
        "mean_iou", "mean_dice", "pixel_error", and "classes", an `Overlap` each.

    Raises:
        FwError: no pixel was counted.
        ValueError: the matrix is not C × C for C names.

    >>> found = segmentation_report(np.array([[1, 0], [1, 2]]), ["membrane", "cell"])
    >>> round(found["mean_iou"], 3), found["pixel_error"], found["classes"][1].dice
    (0.583, 0.25, 0.8)
    """
    matrix = np.asarray(counts).astype(np.int64)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(
            f"segmentation_report: {len(names)} names for counts of shape {matrix.shape}; "
            "expected a square matrix, one row a name"
        )
    if not matrix.sum():
        raise FwError("segmentation: no pixel has a label; there is nothing to score")
    same, gold, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    classes = [
        Overlap(
            names[int(i)],
            float(same[i] / (gold[i] + predicted[i] - same[i])),
            float(2 * same[i] / (gold[i] + predicted[i])),
            int(gold[i]),
        )
        for i in np.flatnonzero(gold + predicted)
    ]
    return {
        "mean_iou": float(np.mean([one.iou for one in classes])),
        "mean_dice": float(np.mean([one.dice for one in classes])),
        "pixel_error": float(1 - same.sum() / matrix.sum()),
        "classes": classes,
    }


def regions(classes: np.ndarray) -> np.ndarray:
    """Number the connected regions of an image of classes, from 1; class 0 and `IGNORE` are 0.

    Pixels are neighbours if they share a side and a class.

    Args:
        classes: int[H, W].

    Returns:
        int[H, W].

    >>> regions(np.array([[1, 0, 1], [1, 2, 2]])).tolist()
    [[1, 0, 2], [1, 3, 3]]
    """
    from scipy import ndimage  # a dependency of jax, and slow to import

    found, count = np.zeros(classes.shape, np.int64), 0
    for one in np.unique(classes[classes > 0]):
        numbered, more = ndimage.label(classes == one)  # pyright: ignore[reportGeneralTypeIssues]
        found += np.where(numbered, numbered + count, 0)
        count += more
    return found


def rand_error(labels: np.ndarray, predicted: np.ndarray) -> float | None:
    """One minus the F-score of pairs of pixels that are in one region: the adapted Rand error.

    Of all pairs of pixels of the true foreground: T are in one true region, S in one predicted
    region, and P in both. precision = P / S, recall = P / T, and the error is
    1 - 2 P / (S + T). A pixel that is predicted to be background is a region of its own. As in the
    ISBI 2012 challenge of electron microscopy, but without a search for the best threshold.

    Source: Arganda-Carreras et al. 2015, doi:10.3389/fnana.2015.00142.

    Args:
        labels: int[H, W] classes; 0, what lies between regions, is left out, and so is `IGNORE`.
        predicted: int[H, W] classes; only 0 is background.

    Returns:
        In 0 … 1; None where no two pixels are of one true region.

    Raises:
        ValueError: the shapes differ.

    >>> rand_error(np.array([[1, 0, 1, 1]]), np.array([[1, 1, 1, 1]]))
    0.5
    """
    if labels.shape != predicted.shape:
        raise ValueError(
            f"rand_error: labels {labels.shape} and predictions {predicted.shape} must have one "
            "shape"
        )
    counted = labels != IGNORE
    true = regions(labels)
    found = regions(np.where(counted, predicted, 0))[true > 0]
    true = true[true > 0]
    both = np.unique(np.stack([true, found])[:, found > 0], axis=1, return_counts=True)[1]
    joined, own, other = (_pairs(n) for n in (both, np.bincount(true), np.bincount(found)[1:]))
    return 1 - 2 * joined / (own + other) if own else None


def _pairs(sizes: np.ndarray) -> int:
    return int((sizes.astype(np.int64) * (sizes - 1)).sum())  # twice; it cancels
