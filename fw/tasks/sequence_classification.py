"""A label for each text, scored by macro-F1: a rare class weighs as much as a common one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import metrics
from fw.model import Batch
from fw.tasks.task import Summary, Task, cross_entropy


def sequence_classification(labels: tuple[str, ...]) -> Task:
    """The task over class names."""

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        total, weight = cross_entropy(logits, batch)
        return {
            "loss": metrics.Mean(total, weight),
            "confusion": metrics.confusion(batch["labels"], predicted, len(labels)),
        }

    def summarise(counts: dict[str, Any]) -> Summary:
        report = metrics.classification_report(counts["confusion"], labels)
        figures = {
            "macro_f1": report.macro.f1,
            "accuracy": report.accuracy,
            "loss": metrics.mean_value(counts["loss"]),
            "report": metrics.to_dict(report),
            "confusion": {
                "labels": list(labels),
                "counts": np.asarray(counts["confusion"]).tolist(),
            },
        }
        return Summary("macro_f1", figures, metrics.to_text(report, digits=4))

    return Task("sequence_classification", labels, cross_entropy, count, summarise, "macro_f1")
