"""A number for each row of a table, by least squares, judged in the unit of the target."""

from typing import Any

import jax
import numpy as np

from fw import metrics
from fw.data.rows import Rows
from fw.model import Batch
from fw.tasks.regression import squared_error
from fw.tasks.task import Summary, Task


def tabular_regression(labels: tuple[str, ...], spread: float = 1.0) -> Task:
    """The task over the target's name.

    Args:
      labels: one.
      spread: `Columns.spread`, the target's units in one of what is learnt.
    """

    def count(outputs: jax.Array, batch: Batch) -> dict[str, Any]:
        return {"loss": metrics.Mean(*squared_error(outputs, batch))}

    def judge(rows: Rows, outputs: np.ndarray) -> dict[str, Any]:
        gold = np.asarray(rows.arrays["labels"])
        pairs = np.concatenate([gold, outputs[: len(gold)]], -1).astype(np.float64)
        return {"pairs": metrics.Sample(pairs[~np.isnan(gold[:, 0])])}

    def summarise(counts: dict[str, Any]) -> Summary:
        report = metrics.regression_report(*(counts["pairs"].values * spread).T)
        order = ("r2", "rmse", "mae", "pearson", "spearman")
        figures = {name: report[name] for name in order}
        figures["loss"] = metrics.mean_value(counts["loss"])
        lines = [f"{name:10}{value:14.6g}" for name, value in figures.items()]
        return Summary("r2", figures, "\n".join(lines))

    return Task("tabular_regression", labels, squared_error, count, summarise, "r2", judge)
