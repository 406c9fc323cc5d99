"""The words that are hidden, from both sides (Devlin et al. 2019); scored by their likelihood."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fw import metrics
from fw.errors import FwError
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task, cross_entropy


def masked_lm(labels: tuple[str, ...] = ()) -> Task:
    """The task over a vocabulary; it has no labels.

    Raises:
      FwError: labels.
    """
    if labels:
        raise FwError(f"masked_lm has no labels; got {', '.join(labels)}")

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        right = jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch["labels"]
        return {
            "loss": metrics.Mean(*cross_entropy(logits, batch)),
            "hits": metrics.mean(right.astype(jnp.float32), batch["labels"] != IGNORE),
        }

    def summarise(counts: dict[str, Any]) -> Summary:
        loss = metrics.mean_value(counts["loss"])
        figures = {
            "log_likelihood": -loss,
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": metrics.mean_value(counts["hits"]),
            "tokens": float(counts["loss"].weight),
        }
        text = "  ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in figures.items())
        return Summary("log_likelihood", figures, text)

    return Task("masked_lm", labels, cross_entropy, count, summarise, "log_likelihood")
