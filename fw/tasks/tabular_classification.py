"""A class for each row of a table; of two classes, how well and how truly the second is scored.

Two classes are judged as credit risk is: AUC, average precision, KS, calibration, and what follows
above one half. More are judged by macro-F1, as texts are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import metrics
from fw.data.rows import Rows
from fw.labels import IGNORE
from fw.model import Batch
from fw.tasks.task import Summary, Task, cross_entropy

_POINTS = 200  # of a curve: about one for two pixels


def tabular_classification(labels: tuple[str, ...]) -> Task:
    """The task over class names; of two, the second is the positive one."""

    def count(logits: jax.Array, batch: Batch) -> dict[str, Any]:
        predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        total, weight = cross_entropy(logits, batch)
        return {
            "loss": metrics.Mean(total, weight),
            "confusion": metrics.confusion(batch["labels"], predicted, len(labels)),
        }

    def judge(rows: Rows, logits: np.ndarray) -> dict[str, Any]:
        gold = np.asarray(rows.arrays["labels"])
        own = logits[: len(gold)].astype(np.float64)
        margin = own[:, 1] - own[:, 0]  # its sigmoid is the second one's softmax
        return {"pairs": metrics.Sample(np.stack([gold, margin], -1)[gold != IGNORE])}

    def summarise(counts: dict[str, Any]) -> Summary:
        report = metrics.classification_report(counts["confusion"], labels)
        text = metrics.to_text(report, digits=4)
        figures: dict[str, Any] = {
            "macro_f1": report.macro.f1,
            "accuracy": report.accuracy,
            "loss": metrics.mean_value(counts["loss"]),
            "report": metrics.to_dict(report),
            "confusion": {
                "labels": list(labels),
                "counts": np.asarray(counts["confusion"]).tolist(),
            },
        }
        if "pairs" not in counts:
            return Summary("macro_f1", figures, text)
        risk = _risk(counts["pairs"].values, labels)
        shown = {name: value for name, value in risk.items() if isinstance(value, float)}
        lines = [f"{name.replace('_', ' '):27}{value:10.4f}" for name, value in shown.items()]
        return Summary("auc", {**risk, **figures}, "\n".join([*lines, "", text]))

    two = len(labels) == 2
    metric = "auc" if two else "macro_f1"
    name = "tabular_classification"
    return Task(name, labels, cross_entropy, count, summarise, metric, judge if two else None)


def _risk(pairs: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    """The figures of two classes, and for the report the curves that they are of."""
    gold, margin = pairs.T
    figures: dict[str, Any] = metrics.binary_report(gold, margin, labels)
    figures["class_1"] = labels[1]
    false, true, least = metrics.roc_curve(gold, margin)
    kept = np.unique(np.linspace(0, len(least) - 1, _POINTS).round().astype(int))
    figures["curves"] = {
        "reliability": metrics.reliability(gold, metrics.sigmoid(margin)).round(6).tolist(),
        "roc": np.stack([false, true, metrics.sigmoid(least)], -1)[kept].round(6).tolist(),
    }
    return figures
