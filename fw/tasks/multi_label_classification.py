"""Any number of labels for each text, scored by macro-F1: a rare label weighs as much as any."""

from typing import Any

import jax
import jax.numpy as jnp

from fw import metrics
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task


def multi_label_classification(labels: tuple[str, ...]) -> Task:
    """The task over label names."""

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        total, weight = sigmoid_cross_entropy(logits, batch)
        given = jax.nn.sigmoid(logits) > jnp.asarray(metrics.THRESHOLD, logits.dtype)
        right = jnp.all(given == (batch["labels"] == 1), -1).astype(jnp.float32)
        return {
            "loss": metrics.Mean(total, weight),
            "labels": metrics.label_counts(batch["labels"], given),
            "exact": metrics.mean(right, jnp.all(batch["labels"] != IGNORE, -1)),
        }

    def summarise(counts: dict[str, Any]) -> Summary:
        report = metrics.multi_label_report(counts["labels"], labels)
        figures = {
            "macro_f1": report.macro.f1,
            "micro_f1": report.micro.f1,
            "exact_match": metrics.mean_value(counts["exact"]),
            "loss": metrics.mean_value(counts["loss"]),
            "report": metrics.to_dict(report),
        }
        text = metrics.to_text(report, digits=4)
        return Summary("macro_f1", figures, f"{text}\nexact match {figures['exact_match']:.4f}")

    return Task(
        "multi_label_classification", labels, sigmoid_cross_entropy, count, summarise, "macro_f1"
    )


def sigmoid_cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """-Σ y log σ(x) + (1 - y) log(1 - σ(x)) over the labels that count, and how many those are.

    Args:
      logits: x [..., C].
      batch: holds `labels` y i32[..., C] of 0 and 1, `IGNORE` where there is none.

    >>> batch = {"labels": jnp.array([[1, 0], [IGNORE, IGNORE]])}
    >>> total, weight = sigmoid_cross_entropy(jnp.zeros((2, 2)), batch)
    >>> f"{total:.4f} over {weight:.0f}"
    '1.3863 over 2'
    """
    counted, y = batch["labels"] != IGNORE, (batch["labels"] == 1).astype(logits.dtype)
    losses = jax.nn.softplus(logits) - logits * y
    zero = jnp.zeros((), logits.dtype)
    return jnp.sum(jnp.where(counted, losses, zero)), jnp.sum(counted, dtype=logits.dtype)
