"""Any number of labels a text: each label is a yes or no of its own, and pooled in the averages.

`fw.metrics.classification` counts what has exactly one label. `THRESHOLD` is the one place that
says from which probability a label is given.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fw.labels import IGNORE
from fw.metrics.report import Report, summarise

THRESHOLD = 0.5
"""A label is given where its probability is larger."""


def label_counts(labels: jax.Array, predictions: jax.Array) -> jax.Array:
    """Count for every label the texts that have it and get it, get it, and have it.

    Args:
        labels: i32[..., C], 1 where a text has a label, 0 where not, `IGNORE` where none counts.
        predictions: bool[..., C].

    Returns:
        i32[3, C]: true positives, predicted, gold; additive.

    >>> label_counts(jnp.array([[1, 0], [IGNORE, IGNORE]]), jnp.array([[True, True]] * 2)).tolist()
    [[1, 0], [1, 1], [1, 0]]
    """
    gold, found = labels == 1, predictions & (labels != IGNORE)
    axes = tuple(range(labels.ndim - 1))
    each = (jnp.sum(x, axes, dtype=jnp.int32) for x in (gold & found, found, gold))
    return jnp.stack(list(each))


def multi_label_report(counts: np.ndarray | jax.Array, names: Sequence[str]) -> Report:
    """Score `label_counts` per label and on average.

    Equal to scikit-learn's `classification_report` of indicators with `zero_division=0`, but for
    its average over samples.

    Args:
        counts: int[3, C], merged over batches.
        names: C names.

    Returns:
        The report, without accuracy.

    Raises:
        ValueError: another number of names.

    >>> multi_label_report(np.array([[1, 0], [1, 1], [1, 0]]), ["late", "broken"]).micro.precision
    0.5
    """
    return summarise(list(names), *np.asarray(counts), single_label=False)
