"""What stands between the things that people have and the arrays that a model takes.

Texts, images, rows of tables and users with their items each have a processor: a frozen record of
what was configured or learnt (a tokenizer, a resize, the categories of a column). One class for
each kind has both halves of its business: files become rows to learn from (`fw.finetune` calls
these), and things become answers (`fw.export` and `fw predict` call those). It is saved beside the
model, and in the artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import jax
import numpy as np

from fw.data.files import OnBadRow
from fw.data.rows import AnyRows

if TYPE_CHECKING:
    from fw.evaluate import Forward
    from fw.export.load import Artifact
    from fw.model import Model, Variables
    from fw.recipe import Finetune
    from fw.tasks import Task

Change = Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]]
"""What is done to the rows of a training step, given their places: see `fw.data.Batches`."""


class Processor(Protocol):
    """One kind of things. A class of it makes its values by `fit` or `load`.

    Attributes:
      default: the model of a recipe that names none.
      item: what one thing is called.
      files: what `save` writes, all of it.
    """

    default: ClassVar[str]
    item: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    # --- learning ------------------------------------------------------------------------------

    @classmethod
    def read(cls, recipe: Finetune, dataset: Path) -> tuple[dict[str, list], tuple[str, ...]]:
        """The records of a data set by split, none empty, and the messages of those left out."""
        ...

    @classmethod
    def fit(cls, recipe: Finetune, records: Mapping[str, list], source: Path | None) -> Self:
        """That of a pretrained model's folder, or one learnt from the training records alone."""
        ...

    def labels(self, records: Sequence) -> tuple[str, ...]:
        """The names of the classes or numbers, by id; none where there are none."""
        ...

    def task(self, recipe: Finetune, labels: tuple[str, ...]) -> Task:
        """What is minimised and counted."""
        from fw.tasks import make_task  # not for artifacts, which answer without it

        return make_task(recipe.long_task, labels)

    def rows(
        self,
        recipe: Finetune,
        records: Sequence,
        labels: tuple[str, ...],
        *,
        learn: bool,
        on_bad_row: OnBadRow = None,
    ) -> tuple[AnyRows, int]:
        """The rows of some records, to learn from or to judge by, and how many pieces were cut.

        `on_bad_row` gets the message of each record that shows to be bad only now; None raises.
        """
        ...

    def try_rows(
        self,
        recipe: Finetune,
        records: Sequence,
        labels: tuple[str, ...],
        on_bad_row: OnBadRow = None,
    ) -> int:
        """Refuses the records to test by before anything is learnt; how many pieces `rows` cuts."""
        return self.rows(recipe, records, labels, learn=False, on_bad_row=on_bad_row)[1]

    def change(self, recipe: Finetune, rows: AnyRows) -> Change | None:
        """What is done to the training rows anew in every step."""
        return None

    def config(self, recipe: Finetune, task: str, labels: tuple[str, ...]) -> Any:
        """The config of a new model of the kind that the recipe names."""
        ...

    def adapt(self, model: Model) -> Model:
        """The model as the rows want it."""
        return model

    def check(self, recipe: Finetune, rows: Mapping[str, AnyRows], config: Any) -> None:
        """Refuses rows that the model has no place for."""

    def summary(self, recipe: Finetune, rows: AnyRows) -> str:
        """The training rows in a few words."""
        ...

    # --- answering -----------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: Path, notes: Mapping[str, Any]) -> Self:
        """That of a run's model, given the run's options, or of an artifact, given `notes`."""
        ...

    def save(self, folder: Path) -> None:
        """Writes its files."""
        ...

    def notes(self) -> dict[str, Any]:
        """What the manifest of an artifact says of it."""
        ...

    def fits(self, config: Any, task: str) -> None:
        """Refuses a model that it does not go with."""
        ...

    def exported(
        self, model: Model, variables: Variables, forward: Forward
    ) -> tuple[Model, Variables]:
        """What goes into the artifact: as a rule, the model as `adapt` has it.

        `forward(variables, batch)` computes these variables, be they compressed.
        """
        return self.adapt(model), variables

    def specs(self, task: str) -> dict[str, jax.ShapeDtypeStruct]:
        """What the exported function takes; sizes may be symbolic."""
        ...

    def golden(self, task: str, examples: Sequence[Any] | None) -> dict[str, np.ndarray]:
        """A small batch of examples, or of random values if there are none."""
        ...

    def problem(self, item: Any, task: str) -> str:
        """What is wrong with a thing that is to be answered; nothing if it is fine."""
        ...

    def parse(self, line: str, where: str, task: str) -> Any:
        """The thing that a word of the command line or a line of a file spells."""
        ...

    def from_json(self, value: Any, where: str, task: str) -> Any:
        """The thing that a line of JSON is."""
        ...

    def from_file(self, path: Path) -> list[tuple[str, Any]] | None:
        """The things of a file of a format of their own, each behind its place; None: lines."""
        return None

    def answer(
        self, artifact: Artifact, items: Sequence[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """The answers to things, in their order."""
        ...

    def say(self, answer: Mapping[str, Any]) -> str:
        """An answer for people."""
        ...
