"""What data, losses, metrics, heads and folders agree on: a label left out, tasks of one head."""

IGNORE = -1
"""The label of a position that is not counted: special token, continuation piece, padding."""

TAUGHT = "taught"
"""The entry of a batch that says where a teacher is heard, bool like `labels`; where there is none,
it is wherever there is a label."""

PROBLEMS = {
    "sequence_classification": "single_label_classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}
"""The tasks of whole texts, which share a head, and the `problem_type` of each in transformers."""

OF_TEXTS = ("token_classification", *PROBLEMS)
"""The tasks of texts whose classes, or numbers, have names."""

LABELLED = (
    *OF_TEXTS,
    "image_classification",
    "segmentation",
    "tabular_classification",
    "tabular_regression",
)
"""The tasks of all kinds whose classes, or numbers, have names."""
