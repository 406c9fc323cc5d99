"""Numbers for each text, by least squares; scored by Pearson's correlation, which has no unit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import metrics
from fw.data.pack import Packed
from fw.model import Batch
from fw.tasks.task import Summary, Task

_FIGURES = ("pearson", "spearman", "mse", "mae")


def regression(labels: tuple[str, ...]) -> Task:
    """The task over the names of the numbers."""

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        return {"loss": metrics.Mean(*squared_error(logits, batch))}

    def judge(rows: Packed, logits: np.ndarray) -> dict[str, Any]:
        gold = rows.arrays["labels"]
        counted = ~np.isnan(gold).any(-1)
        pairs = np.stack([gold, logits[: len(gold)]], -1)[counted]
        return {"pairs": metrics.Sample(pairs.astype(np.float64))}

    def summarise(counts: dict[str, Any]) -> Summary:
        pairs = counts["pairs"].values
        by_name = {name: metrics.regression_report(*pairs[:, i].T) for i, name in enumerate(labels)}
        means = {f: float(np.mean([one[f] for one in by_name.values()])) for f in _FIGURES}
        width = max(map(len, (*labels, "mean")))
        rows = by_name if len(labels) == 1 else {**by_name, "mean": means}
        lines = [f"{'':{width}}" + "".join(f"{f:>10}" for f in _FIGURES)]
        lines += [
            f"{name:{width}}" + "".join(f"{one[f]:10.4f}" for f in _FIGURES)
            for name, one in rows.items()
        ]
        figures = {**means, "numbers": by_name}
        return Summary("pearson", figures, "\n".join(lines))

    return Task("regression", labels, squared_error, count, summarise, "pearson", judge)


def squared_error(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Σ (x - y)² over the numbers that count, and how many those are.

    Args:
      logits: x [..., C].
      batch: holds `labels` y f32[..., C], NaN where there is none.

    >>> batch = {"labels": jnp.array([[1.0], [jnp.nan]])}
    >>> total, weight = squared_error(jnp.array([[3.0], [7.0]]), batch)
    >>> f"{total:.0f} over {weight:.0f}"
    '4 over 1'
    """
    labels = batch["labels"].astype(logits.dtype)
    counted = ~jnp.isnan(labels)
    # Chosen before the subtraction: the gradient of NaN would not be hidden after it.
    errors = logits - jnp.where(counted, labels, logits)
    return jnp.sum(jnp.square(errors)), jnp.sum(counted, dtype=logits.dtype)
