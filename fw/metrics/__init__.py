"""Metrics: additive counts made on the mesh, summarised on the host.

| step | where | functions |
| --- | --- | --- |
| count | inside jit, on sharded arrays | `confusion`, `entity_counts`, `mean` |
| add | on the host, in 64 bits | `merge` |
| summarise | on the host | `classification_report`, `entity_report`, `mean_value` |
| show | on the host | `to_text`, `to_dict` |
"""

from fw.labels import IGNORE
from fw.metrics.accumulate import Mean, mean, mean_value, merge
from fw.metrics.classification import classification_report, confusion
from fw.metrics.entities import (
    Mode,
    Scheme,
    entity_counts,
    entity_report,
    entity_spans,
    entity_types,
)
from fw.metrics.report import Report, Row, to_dict, to_text

__all__ = [
    "IGNORE",
    "Mean",
    "Mode",
    "Report",
    "Row",
    "Scheme",
    "classification_report",
    "confusion",
    "entity_counts",
    "entity_report",
    "entity_spans",
    "entity_types",
    "mean",
    "mean_value",
    "merge",
    "to_dict",
    "to_text",
]
