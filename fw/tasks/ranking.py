"""Whether a user takes an item that is shown: a probability, by which what is shown is ordered."""

from typing import Any

import jax
import numpy as np

from fw import metrics
from fw.data.rows import Rows
from fw.errors import FwError
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.multi_label_classification import sigmoid_cross_entropy
from fw.tasks.task import Summary, Task

METRIC = "auc"
_FIGURES = ("auc", "log_loss", "calibration_error", "average_precision", "brier", "accuracy")


def ranking(labels: tuple[str, ...] = ()) -> Task:
    """The task over `labels` i32[B] of 1 and 0; the classes have no names.

    Raises:
      FwError: names.
    """
    if labels:
        raise FwError(f"ranking has no labels; got {', '.join(labels)}")

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        return {"loss": metrics.Mean(*sigmoid_cross_entropy(logits, batch))}

    def judge(rows: Rows, logits: np.ndarray) -> dict[str, Any]:
        gold = rows.arrays["labels"]
        pairs = np.stack([gold, logits[: len(gold)].astype(np.float64)], -1)
        return {"pairs": metrics.Sample(pairs[gold != IGNORE])}

    def summarise(counts: dict[str, Any]) -> Summary:
        gold, logits = counts["pairs"].values.T
        report = metrics.binary_report(gold, logits)
        figures = {name: report[name] for name in _FIGURES}
        figures |= {"loss": metrics.mean_value(counts["loss"]), "positive": float(gold.mean())}
        text = "  ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in figures.items())
        return Summary(METRIC, figures, f"{text}  rows {len(gold)}")

    return Task("ranking", labels, sigmoid_cross_entropy, count, summarise, METRIC, judge)
