"""Classification is one confusion matrix: counted on the mesh, read on the host.

Texts, images and single tokens are counted alike, so the token-level report per tag is
`classification_report` of the same matrix with the tags for names. Entities, which are more than
their tokens, are counted in `fw.metrics.entities`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fw.labels import IGNORE
from fw.metrics.report import Report, summarise


def confusion(
    labels: jax.Array,
    predictions: jax.Array,
    num_classes: int,
    where: jax.Array | None = None,
) -> jax.Array:
    """Count how often each label met each prediction: Cᵢⱼ = #{n : labelₙ = i, predictionₙ = j}.

    Additive and exact, so any sharding of the inputs gives the same matrix. Safe under jit with
    `num_classes` static; on a mesh its axes must be of type Auto.

    Args:
        labels: i32[...], `IGNORE` where there is nothing to count.
        predictions: i32[...], the shape of `labels`, in 0…C-1 (an argmax over the logits).
        num_classes: C. A pair with an id beyond it is left out: under jit nothing can raise.
        where: bool[...], counts only where true; everywhere when None.

    Returns:
        i32[C, C], rows are labels, columns are predictions.

    Raises:
        ValueError: the shapes differ.

    >>> confusion(jnp.array([0, 1, 1, IGNORE]), jnp.array([0, 0, 1, 1]), 2).tolist()
    [[1, 0], [1, 1]]
    """
    where = jnp.ones(labels.shape, bool) if where is None else where
    if not labels.shape == predictions.shape == where.shape:
        raise ValueError(
            f"confusion: labels {labels.shape}, predictions {predictions.shape} and "
            f"where {where.shape} must have one shape"
        )
    where = where & (labels != IGNORE)
    # A scatter drops an index past the end but wraps a negative one, so both ids are checked.
    where &= (labels >= 0) & (labels < num_classes)
    where &= (predictions >= 0) & (predictions < num_classes)
    pair = jnp.where(where, labels * num_classes + predictions, 0)
    flat = jnp.zeros(num_classes * num_classes, jnp.int32).at[pair].add(where.astype(jnp.int32))
    return flat.reshape(num_classes, num_classes)


def within_top(logits: jax.Array, labels: jax.Array, count: int) -> jax.Array:
    """Whether each label is among the `count` classes with the largest logits.

    Equal to scikit-learn's `top_k_accuracy_score`: of equal logits, the class of the larger id
    comes first. A label whose logit is NaN is never among them.

    Args:
        logits: [..., C].
        labels: i32[...]; the answer for `IGNORE` means nothing.
        count: of classes.

    Returns:
        bool[...].

    >>> within_top(jnp.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), jnp.array([2, 2]), 2)
    Array([ True, False], dtype=bool)
    """
    labels = labels[..., None]
    own = jnp.take_along_axis(logits, jnp.maximum(labels, jnp.zeros((), labels.dtype)), axis=-1)
    later = jnp.arange(logits.shape[-1], dtype=labels.dtype) > labels
    before = ~(logits <= own) | ((logits == own) & later)
    return jnp.sum(before, axis=-1, dtype=jnp.int32) < count


def classification_report(
    counts: np.ndarray | jax.Array, names: Sequence[str], *, absent: bool = False
) -> Report:
    """Score a confusion matrix per class and on average.

    Equal to scikit-learn's `classification_report` with `zero_division=0`.

    Args:
        counts: int[C, C] from `confusion`, merged over batches.
        names: C class names.
        absent: keep the classes that were neither labelled nor predicted. They score 0 and pull
            the macro average down: scikit-learn with `labels=range(C)`. Without, as by its
            default, they are left out.

    Returns:
        The report, with accuracy; see `to_text` and `to_dict`.

    Raises:
        ValueError: the matrix is not C × C for C names.

    >>> report = classification_report(np.array([[1, 0], [1, 2]]), ["no", "yes"])
    >>> report.accuracy, report.rows[1].precision
    (0.75, 1.0)
    """
    matrix = np.asarray(counts).astype(np.int64)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(
            f"classification_report: {len(names)} names for counts of shape "
            f"{matrix.shape}; expected a square matrix, one row a name"
        )
    gold, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    kept = np.flatnonzero(gold + predicted) if not absent else np.arange(len(names))
    return summarise(
        [names[int(i)] for i in kept],
        matrix.diagonal()[kept],
        predicted[kept],
        gold[kept],
        single_label=True,
    )
