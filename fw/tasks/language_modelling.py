"""The next word of a text, scored by its likelihood."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fw import metrics
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task


def word_loss(outputs: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Σ -log p(target), and how many targets there are.

    Args:
      outputs: of a model that was given `targets`: `losses` [B, L].
      batch: holds `targets` int32 [B, L], `IGNORE` where a token does not count.

    >>> losses = jnp.array([[0.5, 0.25, 0.0]])
    >>> word_loss({"losses": losses}, {"targets": jnp.array([[3, 1, IGNORE]])})
    (Array(0.75, dtype=float32), Array(2., dtype=float32))
    """
    losses = outputs["losses"]
    return jnp.sum(losses), jnp.sum(batch["targets"] != IGNORE, dtype=losses.dtype)


def causal_lm(labels: tuple[str, ...] = ()) -> Task:
    """The next token of every token; it has no labels."""

    def count(outputs: dict[str, jax.Array], batch: Batch) -> dict[str, Any]:
        hits = jnp.sum(outputs["hits"], dtype=jnp.float32)
        total, weight = (x.astype(jnp.float32) for x in word_loss(outputs, batch))
        return {"loss": metrics.Mean(total, weight), "hits": metrics.Mean(hits, weight)}

    def summarise(counts: dict[str, Any]) -> Summary:
        loss, accuracy = (metrics.mean_value(counts[key]) for key in ("loss", "hits"))
        perplexity = math.exp(loss) if loss < 700 else math.inf
        figures = {"log_likelihood": -loss, "loss": loss, "perplexity": perplexity,
                   "accuracy": accuracy, "tokens": float(counts["loss"].weight)}  # fmt: skip
        text = f"loss {loss:.4f}, perplexity {perplexity:.3f}, accuracy {accuracy:.4f}"
        return Summary("log_likelihood", figures, text)

    return Task("causal_lm", labels, word_loss, count, summarise)
