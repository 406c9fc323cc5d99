"""Tasks as data: which files say what there is to learn, and how that becomes pieces.

The one table to extend for a task of one's own; `splits` reads by it, and `fw.finetune` encodes.
The task's name is also that of the model's head, of `fw.tasks.make_task` and of an artifact.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fw.data.encode import Encoded, encode_tagged
from fw.data.encode_texts import encode_labelled, encode_multi_labelled, encode_rated
from fw.data.files import OnBadRow
from fw.data.language import encode_documents, read_documents
from fw.data.masking import Masking, encode_maskable, masking
from fw.data.questions import read_questions
from fw.data.readers import read_conll, read_json_lines, read_table
from fw.data.targets import SEPARATOR
from fw.data.tokenizer import Tokenizer
from fw.data.windows import encode_questions


@dataclass(frozen=True)
class Options:
    """How files are to be read.

    Args:
        columns: the names of input and target, for tables and JSON lines.
        scheme: of the tags: "auto", "iob1" or "bio".
        separator: between the labels in a table's cell.
        on_bad_row: gets the message of each row left out; None raises instead.
    """

    columns: tuple[str, ...] | None = None
    scheme: str = "auto"
    separator: str = SEPARATOR
    on_bad_row: OnBadRow = None


Read = Callable[[Path, str, Options], list]
"""`(path, task, options) -> records`."""


@dataclass(frozen=True)
class Format:
    """What a task learns from.

    Args:
        readers: who reads a file, by its suffix.
        encode: `(tokenizer, records, labels, max_length=…) -> Encoded`.
        change: `(tokenizer, seed)` makes the function that changes the rows of every batch, for
            `Batches`; None where they stay as they are.
    """

    readers: Mapping[str, Read]
    encode: Callable[..., Encoded]
    change: Callable[[Tokenizer, int], Masking] | None = None


def _conll(path: Path, _: str, o: Options) -> list:
    return read_conll(path, scheme=o.scheme, on_bad_row=o.on_bad_row)


def _table(path: Path, task: str, o: Options) -> list:
    return read_table(path, task, columns=o.columns, separator=o.separator, on_bad_row=o.on_bad_row)


def _lines(path: Path, task: str, o: Options) -> list:
    return read_json_lines(path, task, columns=o.columns, scheme=o.scheme, on_bad_row=o.on_bad_row)


def _questions(path: Path, _: str, o: Options) -> list:
    return read_questions(path, on_bad_row=o.on_bad_row)


def _documents(path: Path, _: str, o: Options) -> list:
    return read_documents(path, on_bad_row=o.on_bad_row)


def _by_suffix(readers: Mapping[Read, str]) -> dict[str, Read]:
    return {suffix: read for read, suffixes in readers.items() for suffix in suffixes.split()}


_COLUMNS = ".conll .txt .annotated .iob .iob2 .bio .tsv"
_DOCUMENTS = _by_suffix({_documents: ".txt .md .jsonl .ndjson"})
_TEXTS = _by_suffix({_table: ".csv .tsv", _lines: ".jsonl .ndjson"})

FORMATS: Mapping[str, Format] = {
    "token_classification": Format(
        _by_suffix({_conll: _COLUMNS, _lines: ".jsonl .ndjson"}), encode_tagged
    ),
    "sequence_classification": Format(_TEXTS, encode_labelled),
    "multi_label_classification": Format(_TEXTS, encode_multi_labelled),
    "regression": Format(_TEXTS, encode_rated),
    "question_answering": Format(
        _by_suffix({_questions: ".json .jsonl .ndjson"}), encode_questions
    ),
    "masked_lm": Format(_DOCUMENTS, encode_maskable, masking),
    "causal_lm": Format(_DOCUMENTS, encode_documents),
}
"""The tasks."""
