"""Rows of tables: the columns that were found in the training rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import numpy as np
from jax import export

from fw.data import columns as columns_
from fw.data.columns import Columns
from fw.data.files import OnBadRow
from fw.data.fit_columns import fit_columns
from fw.data.rows import Rows
from fw.data.splits import load_files
from fw.data.table import SUFFIXES, TARGET, Entry, read_entries
from fw.errors import FwError
from fw.options import parted, read_fields
from fw.processors.outputs import outputs, parse_json
from fw.processors.processor import Processor
from fw.processors.records import with_dev

if TYPE_CHECKING:
    from fw.export.load import Artifact
    from fw.recipe import Finetune
    from fw.tasks import Task

GOLDEN_ROWS = 8


@dataclass(frozen=True, eq=False)
class Table(Processor):
    """Rows of tables to numbers and categories.

    Attributes:
        columns: of the training rows.
    """

    columns: Columns

    default: ClassVar[str] = "ft_transformer"
    item: ClassVar[str] = "row"
    files: ClassVar[tuple[str, ...]] = (columns_.FILE, columns_.TENSORS)

    # --- learning ------------------------------------------------------------------------------

    @classmethod
    def read(cls, recipe: Finetune, dataset: Path) -> tuple[dict[str, list], tuple[str, ...]]:
        """Tables: files for train, dev and test, or one."""
        skipped: list[str] = []
        bad = skipped.append if recipe.skip_bad_rows else None
        records = load_files(
            dataset,
            lambda file: read_entries(file, on_bad_row=bad),
            SUFFIXES,
            "a table",
            alone=True,
        )
        return with_dev(records), tuple(skipped)

    @classmethod
    def fit(cls, recipe: Finetune, records: Mapping[str, list], source: Path | None) -> Self:
        """The columns of the training rows."""
        if source is not None:
            raise FwError(f"model {recipe.model!r} reads no tables; choose mlp or ft_transformer")
        names = ("drop", "numeric", "categorical", "classes")
        options: Any = {name: parted(getattr(recipe, name)) for name in names}
        target = recipe.target or TARGET
        options["on_bad_row"] = (lambda _: None) if recipe.skip_bad_rows else None  # `rows` tells
        return cls(fit_columns(records["train"], target, recipe.long_task, **options))

    def labels(self, records: Sequence[Entry]) -> tuple[str, ...]:
        """The classes, or the name of the number."""
        return self.columns.labels

    def task(self, recipe: Finetune, labels: tuple[str, ...]) -> Task:
        """Errors of a number are told in its own unit."""
        if self.columns.classes:
            return super().task(recipe, labels)
        from fw.tasks import tabular_regression

        return tabular_regression(labels, self.columns.spread)

    def rows(
        self,
        recipe: Finetune,
        records: Sequence,
        labels: tuple[str, ...],
        *,
        learn: bool,
        on_bad_row: OnBadRow = None,
    ) -> tuple[Rows, int]:
        """The same to learn from and to judge by."""
        return self.columns.encode(records, on_bad_row=on_bad_row), 0

    def config(self, recipe: Finetune, task: str, labels: tuple[str, ...]) -> Any:
        """An MLP or a feature-tokenising transformer for these columns."""
        from fw.models.ft_transformer import FTTransformerConfig
        from fw.models.mlp import MLPConfig

        kinds = {"mlp": MLPConfig, "ft_transformer": FTTransformerConfig}
        return read_fields(
            kinds[recipe.model], recipe.config, numbers=len(self.columns.numbers),
            categories=self.columns.cardinalities, num_labels=len(labels), task=task,
        )  # fmt: skip

    def summary(self, recipe: Finetune, rows: Any) -> str:
        """How many columns of each kind."""
        own = self.columns
        return f"{len(own.numbers)} columns of numbers, {len(own.categories)} of categories"

    # --- answering -----------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: Path, notes: Mapping[str, Any]) -> Self:
        """All is in its files."""
        return cls(columns_.load(folder))

    def save(self, folder: Path) -> None:
        """Writes its files."""
        self.columns.save(folder)

    def notes(self) -> dict[str, Any]:
        """The names of the columns."""
        own = self.columns
        return {"target": own.target, "numbers": own.numbers, "categories": [*own.categories]}

    def fits(self, config: Any, task: str) -> None:
        """Refuses a model of other columns."""
        own = self.columns
        want = (len(own.numbers), own.cardinalities)
        if task != own.task or (config.numbers, config.categories) != want:
            raise FwError(
                f"columns: {want[0]} of numbers and categories of {want[1]} values for {own.task}; "
                f"the model has {config.numbers} and {config.categories} for {task}"
            )

    def specs(self, task: str) -> dict[str, jax.ShapeDtypeStruct]:
        """`numbers` and `missing` f32[b, N], `categories` i32[b, K], those that there are."""
        (b,) = export.symbolic_shape("b")
        return {
            name: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)
            for name, x in self.golden(task, None).items()
        }

    def golden(self, task: str, examples: Sequence[Any] | None) -> dict[str, np.ndarray]:
        """Examples, or random values of every column."""
        if examples is not None:
            return self.columns.inputs(examples)
        rng, own = np.random.default_rng(0), self.columns
        batch: dict[str, np.ndarray] = {}
        if own.numbers:
            shape = (GOLDEN_ROWS, len(own.numbers))
            batch["numbers"] = rng.normal(size=shape).astype(np.float32)
            batch["missing"] = (rng.random(shape) < 0.1).astype(np.float32)
        if own.categories:
            ids = [rng.integers(0, n, GOLDEN_ROWS) for n in own.cardinalities]
            batch["categories"] = np.stack(ids, 1).astype(np.int32)
        return batch

    def problem(self, item: Any, task: str) -> str:
        """A column that is not there, a number that is none."""
        return self.columns.problem(item)

    def parse(self, line: str, where: str, task: str) -> Any:
        """A JSON object."""
        return parse_json(line, where)

    def from_json(self, value: Any, where: str, task: str) -> Any:
        """The object."""
        return value

    def from_file(self, path: Path) -> list[tuple[str, Any]] | None:
        """The rows of a table with a header."""
        if path.suffix.lower() not in (".csv", ".tsv"):
            return None
        return [(entry.source, dict(entry.cells)) for entry in read_entries(path)]

    def answer(
        self, artifact: Artifact, items: Sequence[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """{"row", "label", "score", "scores"}, or {"row", "number"}, for each."""
        found = outputs(artifact, self.columns.inputs(items), batch_size)
        for item, said in zip(items, self.columns.answers(found), strict=True):
            yield {"row": dict(item), **said}

    def say(self, answer: Mapping[str, Any]) -> str:
        """The answer, and the row it is for."""
        row = ", ".join(f"{name} {value}" for name, value in answer["row"].items())
        if "number" in answer:
            return f"{self.columns.target} {answer['number']:.4g}  {row}"
        return f"{answer['label']} {answer['score']:.2f}  {row}"
