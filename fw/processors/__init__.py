"""Processors by task: who reads a data set, and who turns things into answers.

| file | things |
| --- | --- |
| `processor` | what every kind has |
| `text` | texts; `answers`, `ask` and `words` are what is said of them |
| `table` | rows of tables |
| `image`, `segment` | images, with a class each or in every pixel |
| `events` | users and items |
| `outputs` | what all kinds have in common |
"""

from fw.data import columns
from fw.data.formats import FORMATS
from fw.errors import FwError
from fw.processors.events import Ranking, Retrieval
from fw.processors.image import Images
from fw.processors.processor import Change, Processor
from fw.processors.segment import Segments
from fw.processors.table import Table
from fw.processors.text import Text

PROCESSORS: dict[str, type[Processor]] = {
    **dict.fromkeys(FORMATS, Text),
    **dict.fromkeys(columns.TASKS, Table),
    "image_classification": Images,
    "segmentation": Segments,
    "ranking": Ranking,
    "retrieval": Retrieval,
}
"""By the task's name."""

TASKS = tuple(PROCESSORS)


def processor_of(task: str) -> type[Processor]:
    """The class for a task.

    Raises:
        FwError: another name.

    >>> processor_of("causal_lm").item
    'text'
    """
    if task not in PROCESSORS:
        raise FwError(f"task: expected one of {', '.join(TASKS)}; got {task!r}")
    return PROCESSORS[task]


__all__ = ["PROCESSORS", "TASKS", "Change", "Processor", "Table", "Text", "processor_of"]
