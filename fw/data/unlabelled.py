"""Texts that nobody labelled, for a teacher to label."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fw.data.files import OnBadRow, json_lines, read_text, refuse, separated_rows
from fw.data.pack import Packed
from fw.data.readers import cells_of
from fw.data.records import Labelled, Tagged
from fw.data.vader import is_vader, read_vader
from fw.errors import FwError
from fw.labels import IGNORE, TAUGHT

UNLABELLED = "unlabelled"
"""The label of such texts until they are rows."""

TASKS = ("token_classification", "sequence_classification")

_WORD = re.compile(r"https?://\S+|[@#]?\w+(?:['’]\w+)*|[^\w\s]")
_COLUMNS, _TABLES, _LINES = (".conll", ".iob", ".iob2", ".bio", ".annotated"), (".csv", ".tsv"), (
    ".jsonl", ".ndjson"
)  # fmt: skip
_TEXTS = (".txt", ".md")


def words_of(text: str) -> tuple[str, ...]:
    """A text in words as data sets of entities have them: punctuation by itself.

    >>> words_of("@ada isn't at http://a.b/c, #today!")
    ('@ada', "isn't", 'at', 'http://a.b/c,', '#today', '!')
    """
    return tuple(_WORD.findall(text))


def read_unlabelled(
    path: str | Path, task: str, *, column: str = "text", on_bad_row: OnBadRow = None
) -> list[Any]:
    """Reads texts; labels that the files have are not heeded.

    Args:
      path: CoNLL columns (`.conll`, …), of which the first has the words; a table with a column of
        texts, JSON lines with "text" or "tokens", a text a line (`.txt`, `.md`); or a folder of
        these, or of `read_vader`.
      task: one of `TASKS`.
      column: of a table's texts.
      on_bad_row: gets the message of each row left out; None raises instead.

    Returns:
      Records of the task, whose labels are `UNLABELLED`.

    Raises:
      FwError: nothing to read, or a bad row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "some.txt")
    ...     _ = path.write_text("Ada wrote.\\n\\n")
    ...     read_unlabelled(path, "token_classification")[0].words
    ('Ada', 'wrote', '.')
    """
    if task not in TASKS:
        raise FwError(f"unlabelled texts are for {', '.join(TASKS)}, not {task}")
    path = Path(path)
    if is_vader(path):
        found = [r.text for r in read_vader(path, "sequence_classification", on_bad_row=on_bad_row)]
    else:
        every = sorted(path.rglob("*")) if path.is_dir() else [path]
        known = (*_COLUMNS, *_TABLES, *_LINES, *_TEXTS)
        files = [file for file in every if file.suffix.lower() in known and file.is_file()]
        found = [text for file in files for text in _texts(file, column, on_bad_row)]
        if not found:
            raise FwError(f"{path}: expected texts in a file {' '.join(known)}; found none")
    if task == "sequence_classification":
        texts = (" ".join(t) if isinstance(t, tuple) else t for t in found)
        return [Labelled(text, UNLABELLED) for text in texts if text.strip()]
    split = (t if isinstance(t, tuple) else words_of(t) for t in found)
    return [Tagged(words, (UNLABELLED,) * len(words)) for words in split if words]


def _texts(file: Path, column: str, bad: OnBadRow) -> Iterator[str | tuple[str, ...]]:
    suffix = file.suffix.lower()
    if suffix in _COLUMNS:
        yield from _columns(file, bad)
    elif suffix in _TABLES:
        rows = separated_rows(file, bad)
        _, header = next(rows, (1, []))
        if column not in header:
            raise FwError(f"{file}: expected a column {column!r} of texts; found {header}")
        for line, row in rows:
            if len(row) == len(header):
                yield row[header.index(column)]
            else:
                refuse(f"{file}:{line}: expected {len(header)} cells; got {len(row)}", bad)
    elif suffix in _LINES:
        for number, row in json_lines(file, bad):
            text = row.get("tokens", row.get(column)) if isinstance(row, dict) else None
            if isinstance(text, list) and all(isinstance(word, str) and word for word in text):
                yield tuple(text)
            elif isinstance(text, str):
                yield text
            else:
                refuse(f'{file}:{number}: expected {{"{column}": …}} or {{"tokens": […]}}', bad)
    else:
        yield from (line for line in read_text(file).split("\n") if line.strip())


def _columns(file: Path, bad: OnBadRow) -> Iterator[tuple[str, ...]]:
    words: list[str] = []
    for number, line in enumerate([*read_text(file).split("\n"), ""], 1):
        cells = cells_of(line)
        if cells and not cells[0]:
            refuse(f"{file}:{number}: expected a word in the first column; got {line!r}", bad)
        elif cells:
            words.append(cells[0])
        elif words:
            yield tuple(words)
            words = []


def heard(rows: Packed, labels: Sequence[str]) -> Packed:
    """Rows of texts of which some are unlabelled, as training takes them.

    Args:
      rows: whose labels are ids of `labels` and, next after these, of `UNLABELLED`.
      labels: the classes.

    Returns:
      Rows that say in `TAUGHT` where a teacher is heard; there is no label where there was none.
    """
    own = rows.arrays["labels"]
    none = np.where(own == len(labels), IGNORE, own).astype(own.dtype)
    arrays = {**rows.arrays, "labels": none, TAUGHT: own != IGNORE}
    return replace(rows, arrays=arrays, empty={**rows.empty, TAUGHT: False})
