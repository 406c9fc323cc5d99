"""What outputs say, whatever they were made of: a few rows at a time, classes, numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fw.data.batches import eval_batches

if TYPE_CHECKING:
    from fw.export.load import Artifact


def outputs(
    artifact: Artifact,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    empty: Mapping[str, float] | None = None,
) -> np.ndarray:
    """The outputs of an artifact for some rows.

    Args:
        artifact: has the function.
        arrays: [R, ...] each, with at least one row.
        batch_size: the most rows computed at once.
        empty: what fills an empty row; zeros if nothing is said.

    Returns:
        [R, ...].
    """
    rows = len(next(iter(arrays.values())))
    # A power of two: things that come one by one share a few compiled programs.
    size = min(batch_size, 1 << (rows - 1).bit_length())
    batches = eval_batches(arrays, size, empty=dict.fromkeys(arrays, 0.0) | dict(empty or {}))
    return np.concatenate([artifact.logits(batch) for batch in batches])[:rows]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, in float64.

    >>> softmax(np.zeros((1, 4))).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True, initial=-1e30))
    return powers / powers.sum(axis=-1, keepdims=True)


def one_label(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """The likeliest of several classes.

    Args:
        logits: [C].
        labels: their names.

    >>> one_label(np.array([0.0, 0.0, -np.inf]), ("a", "b", "c"))
    {'label': 'a', 'score': 0.5, 'scores': {'a': 0.5, 'b': 0.5, 'c': 0.0}}
    """
    scores = softmax(logits)
    return {
        "label": labels[int(scores.argmax())],
        "score": float(scores.max()),
        "scores": dict(zip(labels, scores.tolist(), strict=True)),
    }
