"""A label for each image: how often it is the likeliest, and among the five likeliest.

A batch may mix images (mixup, Zhang et al. 2017, arXiv:1710.09412; CutMix, Yun et al. 2019,
arXiv:1905.04899): then it holds the labels of both, and the share of the first.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import metrics
from fw.errors import FwError
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task, cross_entropy

TOP = 5
"""Classes among which a label may be; not counted where there are fewer."""

MOST_SHOWN = 100
"""Classes up to which the confusion matrix is one of the figures."""


def image_classification(labels: tuple[str, ...], smoothing: float = 0.0) -> Task:
    """The task over class names.

    Args:
      labels: by id.
      smoothing: of the loss in training, as in `mixed_cross_entropy`.

    Raises:
      FwError: a smoothing that is none.
    """
    if not 0 <= smoothing < 1:
        raise FwError(f"smoothing {smoothing}: expected 0 or more, and less than 1")

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        own, predicted = batch["labels"], jnp.argmax(logits, axis=-1).astype(jnp.int32)
        counts = {
            "loss": metrics.Mean(*cross_entropy(logits, batch)),
            "confusion": metrics.confusion(own, predicted, len(labels)),
        }
        if len(labels) >= TOP:
            hits = metrics.within_top(logits, own, TOP).astype(jnp.float32)
            counts["top_5"] = metrics.mean(hits, own != IGNORE)
        return counts

    def summarise(counts: dict[str, Any]) -> Summary:
        report = metrics.classification_report(counts["confusion"], labels)
        figures = {
            "accuracy": report.accuracy,
            "macro_f1": report.macro.f1,
            "loss": metrics.mean_value(counts["loss"]),
            "report": metrics.to_dict(report),
        }
        text = metrics.to_text(report, digits=4)
        if "top_5" in counts:
            figures["top_5_accuracy"] = metrics.mean_value(counts["top_5"])
            text += f"\ntop-5 accuracy {figures['top_5_accuracy']:.4f}"
        if len(labels) <= MOST_SHOWN:
            matrix = np.asarray(counts["confusion"]).tolist()
            figures["confusion"] = {"labels": list(labels), "counts": matrix}
        return Summary("accuracy", figures, text)

    loss = partial(mixed_cross_entropy, smoothing=smoothing)
    return Task("image_classification", labels, loss, count, summarise, "accuracy")


def mixed_cross_entropy(
    logits: jax.Array, batch: Batch, *, smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Σ share · CE(label) + (1 - share) · CE(other label), and how many images count.

    CE(y) = -Σₖ qₖ log softmax(logits)ₖ, where q gives `smoothing` to all classes alike and the rest
    to y (Szegedy et al. 2015, arXiv:1512.00567).

    Args:
      logits: [B, C].
      batch: holds `labels` i32[B], `IGNORE` where there is none; where images are mixed, also
        `other_labels` i32[B] and `share` f32[B].
      smoothing: from 0, none, to less than 1.

    >>> logits = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> batch = {"labels": jnp.array([0]), "other_labels": jnp.array([1])}
    >>> batch["share"] = jnp.array([0.5])
    >>> total, weight = mixed_cross_entropy(logits, batch)
    >>> f"{total:.4f} over {weight:.0f}"  # (-log 0.25 - log 0.75) / 2
    '0.8370 over 1'
    """
    labels, zero = batch["labels"], jnp.zeros((), logits.dtype)
    counted = labels != IGNORE

    def picked(own: jax.Array) -> jax.Array:
        index = jnp.where(own == IGNORE, jnp.zeros((), own.dtype), own)
        return jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0]

    hit = picked(labels)
    if "other_labels" in batch:
        others, share = batch["other_labels"], batch["share"].astype(logits.dtype)
        hit = share * hit + (1 - share) * picked(jnp.where(others == IGNORE, labels, others))
    if smoothing:
        even = np.asarray(smoothing, logits.dtype)
        hit = (1 - even) * hit + even * jnp.mean(logits, axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - hit
    return jnp.sum(jnp.where(counted, losses, zero)), jnp.sum(counted, dtype=logits.dtype)
