"""From logits to probabilities on the host, in float64 and without overflow; and what they say."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(xᵢ) / Σ exp(xⱼ) along the last axis.

    >>> softmax(np.zeros((1, 4))).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    wide = np.asarray(logits, np.float64)  # a jax.Array would stay float32
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True, initial=-1e30))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)).

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    wide = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(wide))  # of -|x|: nothing overflows, and small ones keep their digits
    return np.where(wide < 0, small, 1) / (1 + small)


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
