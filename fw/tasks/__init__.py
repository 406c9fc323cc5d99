"""Tasks: what is minimised, what is counted and how the counts read, as values of functions."""

from fw.tasks.by_name import make_task
from fw.tasks.language_modelling import causal_lm, word_loss
from fw.tasks.sequence_classification import sequence_classification
from fw.tasks.task import Summary, Task, cross_entropy
from fw.tasks.token_classification import token_classification

__all__ = [
    "Summary",
    "Task",
    "causal_lm",
    "cross_entropy",
    "make_task",
    "sequence_classification",
    "token_classification",
    "word_loss",
]
