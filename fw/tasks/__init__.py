"""Tasks: what is minimised, what is counted and how the counts read, as values of functions."""

from fw.tasks.by_name import make_task
from fw.tasks.image_classification import image_classification, mixed_cross_entropy
from fw.tasks.language_modelling import causal_lm, masked_lm, word_loss
from fw.tasks.multi_label_classification import (
    multi_label_classification,
    sigmoid_cross_entropy,
)
from fw.tasks.question_answering import question_answering, span_loss
from fw.tasks.ranking import ranking
from fw.tasks.regression import regression, squared_error
from fw.tasks.retrieval import retrieval, sampled_softmax
from fw.tasks.segmentation import pixel_loss, segmentation, soft_dice
from fw.tasks.sequence_classification import sequence_classification
from fw.tasks.tabular_classification import tabular_classification
from fw.tasks.tabular_regression import tabular_regression
from fw.tasks.task import CATALOGUE, Summary, Task, cross_entropy
from fw.tasks.token_classification import token_classification

__all__ = [
    "CATALOGUE",
    "Summary",
    "Task",
    "causal_lm",
    "cross_entropy",
    "image_classification",
    "make_task",
    "masked_lm",
    "mixed_cross_entropy",
    "multi_label_classification",
    "pixel_loss",
    "question_answering",
    "ranking",
    "regression",
    "retrieval",
    "sampled_softmax",
    "segmentation",
    "sequence_classification",
    "sigmoid_cross_entropy",
    "soft_dice",
    "span_loss",
    "squared_error",
    "tabular_classification",
    "tabular_regression",
    "token_classification",
    "word_loss",
]
