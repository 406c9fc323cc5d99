"""What a task is: a loss and counts for the mesh, a summary for the reader.

A task is data: the model's head it wants, its labels, and a few functions. Counts add up over
batches, devices and processes; only `summarise` looks at the whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw.labels import IGNORE
from fw.model import Batch

CATALOGUE = "catalogue"
"""The entry of a batch of evaluation that holds what `Task.index` made of all items."""


@dataclass(frozen=True)
class Summary:
    """What was counted, read.

    Attributes:
      metric: the name of the figure that checkpoints are chosen by, and the larger the better.
      figures: JSON-ready: that figure and all others, reports and matrices included.
      text: the same for a terminal.
    """

    metric: str
    figures: Mapping[str, Any]
    text: str

    @property
    def value(self) -> float:
        """The figure named by `metric`."""
        return float(self.figures[self.metric])


@dataclass(frozen=True)
class Task:
    """A task as pure functions.

    Attributes:
      name: which head the model has, as in `fw.data.TASKS`.
      labels: names of the classes, by id.
      loss: `(logits, batch) -> (sum, weight)`, scalars in the dtype of the logits.
      count: `(logits, batch) -> tree` of additive arrays, for `fw.metrics.merge`.
      summarise: `counts -> Summary`, on the host.
      metric: the figure of the summary that checkpoints are chosen by.
      judge: `(rows, logits of all rows) -> tree` of further counts, for what the device cannot
        count: ranks, spellings. On the host; None for most tasks. The rows are those of
        `fw.data.Packed` or `fw.data.rows.Rows`.
      kept: `logits -> array`, what `judge` needs of them, on the mesh; None for all of them.
      index: `(outputs of rows of a catalogue, those rows) -> tree` of what every batch is to be
        ranked among, [rows, ...] each: `count` finds that of all rows as `batch[CATALOGUE]`. Once
        an evaluation, on the mesh; None for most tasks.
    """

    name: str
    labels: tuple[str, ...]
    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    count: Callable[[Any, Batch], Any]
    summarise: Callable[[Any], Summary]
    metric: str
    judge: Callable[[Any, np.ndarray], Any] | None = None
    index: Callable[[Any, Batch], Any] | None = None
    kept: Callable[[Any], Any] | None = None


def cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """-Σ log softmax(logits)[label] over the labels that count, and how many those are.

    Args:
      logits: [..., C].
      batch: holds `labels` i32[...], `IGNORE` where there is none.

    >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> total, weight = cross_entropy(logits, {"labels": jnp.array([1, IGNORE])})
    >>> f"{total:.4f} over {weight:.0f}"
    '0.2877 over 1'
    """
    labels = batch["labels"]
    counted = labels != IGNORE
    index = jnp.where(counted, labels, 0)[..., None]
    picked = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    zero = jnp.zeros((), logits.dtype)
    return jnp.sum(jnp.where(counted, losses, zero)), jnp.sum(counted, dtype=logits.dtype)
