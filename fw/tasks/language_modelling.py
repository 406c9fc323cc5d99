"""The words of a text, the next ones or hidden ones, scored by their likelihood."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fw import metrics
from fw.errors import FwError
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task

METRIC = "log_likelihood"
"""Of a word, in nats, on average."""


def word_loss(outputs: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Σ -log p(target), and how many targets there are.

    Args:
      outputs: of a model that was given `targets`: `losses` [B, L]; a model of experts adds `aux`,
        a scalar that training adds to the mean loss, and so to the sum as often as it has targets.
      batch: holds `targets` int32 [B, L], `IGNORE` where a token does not count.

    >>> losses = jnp.array([[0.5, 0.25, 0.0]])
    >>> word_loss({"losses": losses}, {"targets": jnp.array([[3, 1, IGNORE]])})
    (Array(0.75, dtype=float32), Array(2., dtype=float32))
    """
    losses = outputs["losses"]
    weight = jnp.sum(batch["targets"] != IGNORE, dtype=losses.dtype)
    total = jnp.sum(losses)
    return (total + outputs["aux"] * weight if "aux" in outputs else total), weight


def causal_lm(labels: tuple[str, ...] = ()) -> Task:
    """The next token of every token, or of every one of an answer.

    Raises:
      FwError: labels; it has none.
    """
    return _words("causal_lm", labels)


def masked_lm(labels: tuple[str, ...] = ()) -> Task:
    """The tokens that are hidden, from both sides (Devlin et al. 2019, arXiv:1810.04805).

    Raises:
      FwError: labels; it has none.
    """
    return _words("masked_lm", labels)


def _words(name: str, labels: tuple[str, ...]) -> Task:
    if labels:
        raise FwError(f"{name} has no labels; got {', '.join(labels)}")

    def count(outputs: dict[str, jax.Array], batch: Batch) -> dict[str, Any]:
        hits = jnp.sum(outputs["hits"], dtype=jnp.float32)
        told = {"losses": outputs["losses"]}  # a likelihood has no aux
        total, weight = (x.astype(jnp.float32) for x in word_loss(told, batch))
        return {"loss": metrics.Mean(total, weight), "hits": metrics.Mean(hits, weight)}

    def summarise(counts: dict[str, Any]) -> Summary:
        loss = metrics.mean_value(counts["loss"])
        figures = {
            METRIC: -loss,
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": metrics.mean_value(counts["hits"]),
            "tokens": float(counts["loss"].weight),
        }
        text = "  ".join(f"{key.replace('_', ' ')} {v:.4f}" for key, v in figures.items())
        return Summary(METRIC, figures, text)

    return Task(name, (), word_loss, count, summarise, METRIC)
