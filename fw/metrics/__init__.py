"""Metrics: additive counts made on the mesh, summarised on the host.

| step | where | functions |
| --- | --- | --- |
| count | inside jit, on sharded arrays | `confusion`, `within_top`, `label_counts`, |
| | | `entity_counts`, `rank_means`, `mean` |
| add | on the host, in 64 bits | `merge` |
| summarise | on the host | `classification_report`, `multi_label_report`, `entity_report`, |
| | | `regression_report`, `binary_report`, `segmentation_report`, `rand_error`, `mean_value` |
| show | on the host | `to_text`, `to_dict` |
"""

from fw.labels import IGNORE
from fw.metrics.accumulate import Mean, Sample, mean, mean_value, merge
from fw.metrics.binary import (
    average_precision,
    binary_report,
    calibration_error,
    ks_statistic,
    log_loss,
    reliability,
    roc_auc,
    roc_curve,
)
from fw.metrics.classification import classification_report, confusion, within_top
from fw.metrics.entities import (
    Mode,
    Scheme,
    entity_counts,
    entity_report,
    entity_spans,
    entity_types,
)
from fw.metrics.multi_label import THRESHOLD, label_counts, multi_label_report
from fw.metrics.probabilities import one_label, sigmoid, softmax
from fw.metrics.ranking import rank_means, ranks
from fw.metrics.regression import regression_report
from fw.metrics.report import Report, Row, to_dict, to_text
from fw.metrics.segmentation import rand_error, segmentation_report
from fw.metrics.squad import squad_scores

__all__ = [
    "IGNORE",
    "THRESHOLD",
    "Mean",
    "Mode",
    "Report",
    "Row",
    "Sample",
    "Scheme",
    "average_precision",
    "binary_report",
    "calibration_error",
    "classification_report",
    "confusion",
    "entity_counts",
    "entity_report",
    "entity_spans",
    "entity_types",
    "ks_statistic",
    "label_counts",
    "log_loss",
    "mean",
    "mean_value",
    "merge",
    "multi_label_report",
    "one_label",
    "rand_error",
    "rank_means",
    "ranks",
    "regression_report",
    "reliability",
    "roc_auc",
    "roc_curve",
    "segmentation_report",
    "sigmoid",
    "softmax",
    "squad_scores",
    "to_dict",
    "to_text",
    "within_top",
]
