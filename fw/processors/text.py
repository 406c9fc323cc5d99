"""Texts: a tokenizer and the length of a row. `answers`, `ask` and `words` have what it says.

The tasks' own readers and encoders are in `fw.data.FORMATS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fw.data import FORMATS, Packed, label_names, load_tokenizer, pack
from fw.data.files import OnBadRow
from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.labels import PROBLEMS
from fw.processors import answers
from fw.processors.processor import Change, Processor
from fw.processors.records import read_splits

if TYPE_CHECKING:
    from fw.export.load import Artifact
    from fw.recipe import Finetune

TOKENIZER = "tokenizer.json"
GOLDEN_ROWS = 4


@dataclass(frozen=True, eq=False)
class Text(Processor):
    """Texts to rows of tokens.

    Attributes:
        tokenizer: from `fw.data.load_tokenizer`.
        length: the most tokens in a row, special tokens included.
    """

    tokenizer: Tokenizer
    length: int

    default: ClassVar[str] = "all-MiniLM-L6-v2"
    item: ClassVar[str] = "text"
    files: ClassVar[tuple[str, ...]] = (TOKENIZER,)

    @classmethod
    def of(cls, path: str | Path, length: int) -> Self:
        """With the tokenizer of a model folder, or a `tokenizer.json`.

        Raises:
            FwError: neither is there.
        """
        path = Path(path)
        if not path.is_dir() and path.name != TOKENIZER:
            raise FwError(f"{path}: expected a model folder or a {TOKENIZER}")
        return cls(load_tokenizer(path if path.is_dir() else path.parent), length)

    # --- learning ------------------------------------------------------------------------------

    @classmethod
    def read(cls, recipe: Finetune, dataset: Path) -> tuple[dict[str, list], tuple[str, ...]]:
        """By the readers of `FORMATS`."""
        return read_splits(
            dataset, recipe.long_task, scheme=recipe.scheme, columns=recipe.names,
            separator=recipe.separator, skip=recipe.skip_bad_rows,
        )  # fmt: skip

    @classmethod
    def fit(cls, recipe: Finetune, records: Mapping[str, list], source: Path | None) -> Self:
        """The tokenizer is the model's."""
        if source is None:
            raise FwError(f"model {recipe.model!r} has no tokenizer; give a pretrained model")
        return cls(load_tokenizer(source), recipe.length)

    def labels(self, records: Sequence) -> tuple[str, ...]:
        """Every label that the records use."""
        return label_names(records)

    def rows(
        self,
        recipe: Finetune,
        records: Sequence,
        labels: tuple[str, ...],
        *,
        learn: bool,
        on_bad_row: OnBadRow = None,
    ) -> tuple[Packed, int]:
        """Packed rows, and how many tokens were cut off.

        Rows to learn from are changed anew in every batch where the task wants it; those to judge
        by once and for all, whatever the run's seed.
        """
        form = FORMATS[recipe.long_task]
        pieces = form.encode(self.tokenizer, records, labels, max_length=self.length)
        rows = pack(pieces, self.length, max_texts=recipe.texts or None, packed=recipe.packed)
        if not learn and form.change is not None and rows.rows:
            arrays = form.change(self.tokenizer, 0)(rows.arrays, np.arange(rows.rows))
            rows = replace(rows, arrays=arrays)
        return rows, pieces.cut

    def change(self, recipe: Finetune, rows: Packed) -> Change | None:
        """Words are hidden where that is the task."""
        change = FORMATS[recipe.long_task].change
        return change and change(self.tokenizer, recipe.seed)

    def config(self, recipe: Finetune, task: str, labels: tuple[str, ...]) -> Any:
        """There is none: texts want a pretrained model."""
        raise FwError(f"model {recipe.model!r} reads no texts; give a pretrained model")

    def check(self, recipe: Finetune, rows: Mapping[str, Any], config: Any) -> None:
        """Refuses ids and positions that the model has no row for; a lookup would take another."""
        positions = getattr(config, "positions", self.length)
        if self.length > positions:
            raise FwError(
                f"length is {self.length}, but {recipe.model} has {positions} positions; "
                f"choose {positions} or less"
            )
        every = rows.values()
        types = max(int(r.arrays.get("token_type_ids", np.zeros(1)).max()) for r in every)
        if types >= getattr(config, "type_vocab_size", types + 1):
            raise FwError(
                f"{recipe.model}: its tokenizer tells {types + 1} types of texts apart, but the "
                f"model knows {config.type_vocab_size}; is it another model's tokenizer?"
            )
        largest = max(int(r.arrays["input_ids"].max()) for r in every)
        change = FORMATS[recipe.long_task].change
        if change is not None:
            largest = max(largest, change(self.tokenizer, 0).words - 1)
        if largest >= getattr(config, "vocab_size", largest + 1):
            raise FwError(
                f"{recipe.model}: its tokenizer gives the id {largest}, but the model's vocabulary "
                f"ends at {config.vocab_size - 1}; is it another model's tokenizer?"
            )

    def summary(self, recipe: Finetune, rows: Any) -> str:
        """How full the rows are."""
        return f"{rows.rows} rows of {self.length} tokens, {rows.efficiency:.1%} real"

    # --- answering -----------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: Path, notes: Mapping[str, Any]) -> Self:
        """The length is in the notes, and of an artifact the ids of two pieces."""
        where = f"{folder}: the processor's notes"
        length = notes.get("length")
        if type(length) is not int or length < 1:
            raise FwError(f"{where}: 'length': expected a number above 0")
        own = load_tokenizer(folder)
        if "pad" in notes:
            ids = {name: notes.get(name) for name in ("pad", "unknown")}
            if type(ids["pad"]) is not int or type(ids["unknown"]) not in (int, type(None)):
                raise FwError(f"{where}: expected ids of 'pad' and 'unknown'")
            own = replace(own, **ids)
        return cls(own, length)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`."""
        (folder / TOKENIZER).write_text(self.tokenizer.fast.to_str(), encoding="utf-8")

    def notes(self) -> dict[str, Any]:
        """The length of a row, and ids that `tokenizer.json` does not tell."""
        own = self.tokenizer
        return {"length": self.length, "pad": own.pad, "unknown": own.unknown}

    def fits(self, config: Any, task: str) -> None:
        """Refuses a length that the model lacks, and ids beyond its vocabulary."""
        special = len(self.tokenizer.prefix) + len(self.tokenizer.suffix)
        most = getattr(config, "positions", math.inf)
        if not special < self.length <= most:
            raise FwError(
                f"length: expected more than the {special} special tokens and at most the model's "
                f"{most} positions; got {self.length}"
            )
        rows, largest = getattr(config, "vocab_size", math.inf), largest_id(self.tokenizer)
        if largest >= rows:
            raise FwError(
                f"tokenizer: has ids up to {largest}, but the model's vocabulary ends at "
                f"{rows - 1}; is it another model's?"
            )

    def specs(self, task: str) -> dict[str, jax.ShapeDtypeStruct]:
        """int32 [b, t] and, for whole texts, `first` [b, s]."""
        scope = export.SymbolicScope([f"t <= {self.length}"])
        b, t, s = export.symbolic_shape("b, t, s", scope=scope)
        shapes: dict[str, Any] = dict.fromkeys(("input_ids", "segment_ids", "position_ids"), (b, t))
        if task in PROBLEMS:
            shapes["first"] = (b, s)
        if task == "question_answering":
            shapes["token_type_ids"] = (b, t)
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}

    def golden(self, task: str, examples: Sequence[Any] | None) -> dict[str, np.ndarray]:
        """A few rows.

        Raises:
            FwError: none of the examples has a word, or the task takes no texts.
        """
        own = self.tokenizer
        if examples is not None and task in ("question_answering", "masked_lm", "causal_lm"):
            raise FwError(f"examples: expected None for {task}")
        if examples is not None:
            items = [i for i in answers.read_items(own, examples) if i.spans]
            if not items:
                raise FwError("examples: expected a text with a word at least; got none")
            row = answers.row_length(max(item.pieces for item in items), self.length)
            rows = answers.inputs(answers.pack_items(own, items, task, row))
            return {name: np.ascontiguousarray(x[:GOLDEN_ROWS]) for name, x in rows.items()}
        # Two texts a row and padding after them, which is what the function will meet.
        row = answers.row_length(0, self.length)
        half = row // 2
        positions = np.arange(row, dtype=np.int32)
        segments = np.where(positions < half, 1, np.where(positions < row - row // 8, 2, 0))
        ids = np.random.default_rng(0).integers(0, largest_id(own) + 1, (GOLDEN_ROWS, row))
        batch = {
            "input_ids": np.where(segments > 0, ids, own.pad),
            "segment_ids": np.tile(segments, (GOLDEN_ROWS, 1)),
            "position_ids": np.tile(
                np.where(segments == 2, positions - half, positions), (GOLDEN_ROWS, 1)
            ),
        }
        if task in PROBLEMS:
            batch["first"] = np.tile([0, half], (GOLDEN_ROWS, 1))
        if task == "question_answering":
            batch["token_type_ids"] = np.zeros_like(ids)
        return {name: x.astype(np.int32) for name, x in batch.items()}

    def problem(self, item: Any, task: str) -> str:
        """As `fw.processors.answers.problem`."""
        return answers.problem(item, task)

    def parse(self, line: str, where: str, task: str) -> Any:
        """The line itself."""
        return line

    def from_json(self, value: Any, where: str, task: str) -> Any:
        """The text of {"text": …}, the words of {"tokens": […]}; a question as it is."""
        if task == "question_answering":
            return value
        if not isinstance(value, dict) or ("text" in value) == ("tokens" in value):
            got = json.dumps(value)[:200]
            raise FwError(f'{where}: expected {{"text": …}} or {{"tokens": […]}}; got {got}')
        if "tokens" in value and not isinstance(value["tokens"], list):
            raise FwError(f"{where}: 'tokens': expected a list of words")
        if "text" in value and not isinstance(value["text"], str):
            raise FwError(f"{where}: 'text': expected a text; got {type(value['text']).__name__}")
        return value.get("text", value.get("tokens"))

    def answer(
        self, artifact: Artifact, items: Sequence[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """As `fw.processors.answers.answer`."""
        return answers.answer(self, artifact, items, batch_size)

    def say(self, answer: Mapping[str, Any]) -> str:
        """As `fw.processors.answers.say`."""
        return answers.say(answer)


def largest_id(tokenizer: Tokenizer) -> int:
    """The largest id that text can become; the empty piece, a file's last line, never comes up."""
    return max(i for piece, i in tokenizer.fast.get_vocab().items() if piece)
