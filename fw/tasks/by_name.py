"""The tasks that there are, by the name that a model's head, the data and an artifact share."""

from collections.abc import Sequence

from fw.errors import FwError
from fw.tasks.image_classification import image_classification
from fw.tasks.language_modelling import causal_lm, masked_lm
from fw.tasks.multi_label_classification import multi_label_classification
from fw.tasks.question_answering import question_answering
from fw.tasks.ranking import ranking
from fw.tasks.regression import regression
from fw.tasks.retrieval import retrieval
from fw.tasks.segmentation import segmentation
from fw.tasks.sequence_classification import sequence_classification
from fw.tasks.tabular_classification import tabular_classification
from fw.tasks.tabular_regression import tabular_regression
from fw.tasks.task import Task
from fw.tasks.token_classification import token_classification

_EVERY = (
    token_classification,
    sequence_classification,
    multi_label_classification,
    regression,
    question_answering,
    masked_lm,
    causal_lm,
    tabular_classification,
    tabular_regression,
    segmentation,
    ranking,
    retrieval,
    image_classification,
)
_TASKS = {task.__name__: task for task in _EVERY}


def make_task(name: str, labels: Sequence[str]) -> Task:
    """The task of that name over these labels.

    Raises:
      FwError: another name, or labels that the task cannot have.

    >>> make_task("sequence_classification", ("no", "yes")).labels
    ('no', 'yes')
    """
    if name not in _TASKS:
        raise FwError(f"task {name!r} is unknown; choose one of {', '.join(_TASKS)}")
    return _TASKS[name](tuple(labels))
