"""A class for each pixel, scored by the mean IoU: a thin class weighs as much as a large one.

Nine pixels of ten may be one class, and accuracy is high without a single right one of the others.
IoU and Dice order the results of one class alike; of the two, the mean of IoU falls more with the
class that is worst, and it is what benchmarks print. Rand error has no sum, and waits for the whole
logits of a data set on the host.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import metrics
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task, cross_entropy

METRIC = "mean_iou"


def segmentation(labels: tuple[str, ...], *, dice: float = 0.0) -> Task:
    """The task over class names; the first one is what lies between regions.

    Args:
      labels: names of the classes, by id.
      dice: how much of `soft_dice` is added to the cross-entropy that is minimised.
    """

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return {
            "loss": metrics.Mean(*pixel_loss(logits, batch, dice)),
            "confusion": metrics.confusion(batch["labels"], predicted, len(labels)),
        }

    def kept(logits: jax.Array) -> jax.Array:
        few = len(labels) <= 256
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8 if few else jnp.int32)

    def judge(rows: Any, classes: np.ndarray) -> dict[str, Any]:
        gold = rows.arrays["labels"]
        found = [
            metrics.rand_error(np.asarray(gold[np.array([i])])[0], classes[i].astype(np.int32))
            for i in range(rows.rows)
        ]
        errors = [error for error in found if error is not None]
        return {"rand_error": metrics.Mean(np.array(sum(errors)), np.array(len(errors)))}

    def summarise(counts: dict[str, Any]) -> Summary:
        report = metrics.segmentation_report(counts["confusion"], labels)
        classes = report.pop("classes")
        figures = report | {"loss": metrics.mean_value(counts["loss"])}
        if counts["rand_error"].weight > 0:  # else no image has a region of two pixels
            figures["rand_error"] = metrics.mean_value(counts["rand_error"])
        width = max(len(one.name) for one in classes)
        lines = [f"{'':{width}}{'IoU':>10}{'Dice':>10}{'pixels':>12}"]
        lines += [
            f"{one.name:{width}}{one.iou:10.4f}{one.dice:10.4f}{one.pixels:12}" for one in classes
        ]
        lines.append("  ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in figures.items()))
        figures["classes"] = [asdict(one) for one in classes]
        figures["confusion"] = {
            "labels": list(labels),
            "counts": np.asarray(counts["confusion"]).tolist(),
        }
        return Summary(METRIC, figures, "\n".join(lines))

    loss: Callable[..., Any] = partial(pixel_loss, dice=dice)
    return Task("segmentation", labels, loss, count, summarise, METRIC, judge, kept=kept)


def pixel_loss(logits: jax.Array, batch: Batch, dice: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the pixels that count, and `dice` times `soft_dice`; and their number.

    >>> logits = jnp.zeros((1, 1, 2, 2))
    >>> total, weight = pixel_loss(logits, {"labels": jnp.array([[[1, IGNORE]]])})
    >>> f"{total:.4f} over {weight:.0f}"
    '0.6931 over 1'
    """
    total, weight = cross_entropy(logits, batch)
    if not dice:
        return total, weight
    return total + soft_dice(logits, batch) * jnp.asarray(dice, total.dtype), weight


def soft_dice(logits: jax.Array, batch: Batch) -> jax.Array:
    """Σ over images of its pixels · (1 - mean over classes of 2 Σ p y + 1 / (Σ p + Σ y + 1)).

    p are probabilities, y is 1 for the label, and sums are over the pixels of an image that count:
    each image has a loss of its own, so that a batch may be cut anywhere between two. Classes weigh
    the same, however few their pixels (Milletari et al. 2016, arXiv:1606.04797).

    Args:
      logits: [B, H, W, C].
      batch: holds `labels` i32[B, H, W], `IGNORE` where a pixel does not count.

    >>> labels = jnp.array([[[0, 1]]])
    >>> float(soft_dice(100 * jax.nn.one_hot(labels, 2), {"labels": labels})) < 1e-6
    True
    """
    labels = batch["labels"]
    counted = (labels != IGNORE).astype(logits.dtype)[..., None]
    p = jax.nn.softmax(logits, axis=-1) * counted
    y = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)  # IGNORE has none
    both, either = jnp.sum(p * y, (1, 2)), jnp.sum(p + y, (1, 2))
    share = jnp.mean((2 * both + 1) / (either + 1), -1)
    return jnp.sum(jnp.sum(counted, (1, 2, 3)) * (1 - share))
