"""Readers of the usual formats, which say exactly which line is wrong.

Each gives a list of records. A bad row raises `FwError` with file, line, what was expected and
what came, unless the caller passes `on_bad_row`, which then gets that message while the row is left
out: `bad = []; read_conll(path, on_bad_row=bad.append)` skips and counts. `splits` picks the
reader.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fw.data.files import OnBadRow, json_lines, read_text, refuse, separated_rows
from fw.data.records import Tagged, iob1_to_bio, opens_with_i
from fw.data.targets import SEPARATOR, WANTED, WANTED_JSON, make_record, read_cell
from fw.errors import FwError

SCHEMES = ("auto", "iob1", "bio")
_TAG = re.compile(r"O|[BI]-\S+")


def read_conll(
    path: str | Path, *, scheme: str = "auto", on_bad_row: OnBadRow = None
) -> list[Tagged]:
    """Read columns: a word a line, its tag in the last column, a blank line between sentences.

    Columns are parted by tabs where a line has one, else by spaces. `-DOCSTART-` lines end a
    sentence and are left out.

    Args:
        path: the file, UTF-8.
        scheme: "iob1", "bio", or "auto": IOB1 if an entity opens with I-, BIO if one opens with
            a B- that IOB1 would not need; a file that has both must be declared.
        on_bad_row: gets the message of each sentence left out; None raises instead.

    Returns:
        the sentences in the order of the file, tags in BIO, `source` the line of the first word.

    Raises:
        FwError: the file cannot be read, or has a bad row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.conll")
    ...     _ = path.write_text("Ada I-PER\\nwrote O\\n")
    ...     read_conll(path)[0].tags
    ('B-PER', 'O')
    """
    sentences: list[_Sentence] = []
    rows: list[tuple[str, str, int]] = []
    problem, columns, columns_line = "", 0, 0
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        if cells := cells_of(row := line.rstrip(" \t\r")):
            rows.append((cells[0], cells[-1], number))
            if len(cells) < 2 or not cells[0]:
                fault = f"expected a word and a tag, parted by a tab or spaces; got {row!r}"
            elif columns and len(cells) != columns:
                fault = f"expected {columns} columns as in line {columns_line}; got {row!r}"
            elif not _TAG.fullmatch(cells[-1]):
                fault = f"expected O, B-type or I-type in the last column; got {cells[-1]!r}"
            else:
                columns, columns_line = len(cells), columns_line or number
                continue
            problem = problem or f"{path}:{number}: {fault}"
        elif rows:
            if problem:
                refuse(problem, on_bad_row)
            else:
                sentences.append(_Sentence(*zip(*rows, strict=True)))
            rows, problem = [], ""
    return _in_bio(path, sentences, scheme, on_bad_row)


def cells_of(line: str) -> list[str]:
    """The cells of a line of CoNLL columns; none where a sentence ends.

    >>> cells_of("Ada NNP B-PER"), cells_of("-DOCSTART- O")
    (['Ada', 'NNP', 'B-PER'], [])
    """
    row = line.rstrip(" \t\r")
    if not row or row.startswith("-DOCSTART-"):
        return []
    # Not str.split(): a word may be, or hold, a no-break space.
    return re.split(" *\t *" if "\t" in row else " +", row.lstrip(" "))


def read_table(
    path: str | Path,
    task: str = "sequence_classification",
    *,
    columns: tuple[str, ...] | None = None,
    separator: str = SEPARATOR,
    on_bad_row: OnBadRow = None,
) -> list[Any]:
    """Read texts and what is said of them from CSV (RFC 4180) or tab-separated values (`.tsv`).

    A `.tsv` has no quoting: a quotation mark is a character like any other, as in GLUE's files
    and in IANA's text/tab-separated-values.

    Args:
        path: the file, UTF-8, with a header.
        task: one of `fw.labels.PROBLEMS`.
        columns: the names of the text's and the label's column, for "regression" of one column for
            each number. None takes "text" and "label", or "text" and the other one of two.
        separator: stands between the labels of a "multi_label_classification"; a text without
            labels has an empty cell.
        on_bad_row: gets the message of each row left out; None raises instead.

    Returns:
        the texts in the order of the file.

    Raises:
        FwError: the file cannot be read, lacks a column, or has a bad row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.csv")
    ...     _ = path.write_text('text,intent\\n"Hello, you",greeting\\n')
    ...     read_table(path)[0].text
    'Hello, you'
    """
    rows = separated_rows(path, on_bad_row)
    _, header = next(rows, (1, []))
    text_at, *places = _find_columns(path, header, columns)

    records = []
    for line, row in rows:
        if len(row) != len(header):
            refuse(f"{path}:{line}: expected {len(header)} cells; got {len(row)}", on_bad_row)
            continue
        values = {header[i]: read_cell(task, row[i], separator) for i in places}
        record = make_record(task, row[text_at], values, f"{path}:{line}")
        if record is None:
            refuse(f"{path}:{line}: expected a text and {WANTED[task]}; got {row}", on_bad_row)
        else:
            records.append(record)
    return records


def read_json_lines(
    path: str | Path,
    task: str,
    *,
    columns: tuple[str, ...] | None = None,
    scheme: str = "auto",
    on_bad_row: OnBadRow = None,
) -> list[Any]:
    """Read one JSON object a line: `{"tokens": [...], "tags": [...]}` or `{"text":, "label":}`.

    Args:
        path: the file, UTF-8.
        task: "token_classification", or one of `fw.labels.PROBLEMS`: then "label" is a text or
            whole number, a list of those, or a number.
        columns: other names for the keys; for "regression" one for each number.
        scheme: of the tags, as in `read_conll`.
        on_bad_row: gets the message of each line left out; None raises instead.

    Returns:
        the records in the order of the file; a label that is a whole number becomes its digits.

    Raises:
        FwError: the file cannot be read, or has a bad line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.jsonl")
    ...     _ = path.write_text('{"text": "Hello", "label": 1}\\n')
    ...     read_json_lines(path, "sequence_classification")[0].label
    '1'
    """
    tagged = task == "token_classification"
    one, *others = columns or (("tokens", "tags") if tagged else ("text", "label"))
    expected = (
        f'{{"{one}": [words], "{others[0]}": [tags]}}, one tag (O, B-type, I-type) for each word'
        if tagged
        else f'{{"{one}": a text, ' + ", ".join(f'"{n}": {WANTED_JSON[task]}' for n in others) + "}"
    )
    sentences: list[_Sentence] = []
    records: list[Any] = []
    for number, found in json_lines(path, on_bad_row):
        row = found if isinstance(found, dict) else {}
        first, values, where = row.get(one), {n: row.get(n) for n in others}, f"{path}:{number}"
        if tagged and (pair := _tagged_words(first, values[others[0]])):
            sentences.append(_Sentence(*pair, (number,) * len(pair[0])))
        elif not tagged and (record := make_record(task, first, values, where)):
            records.append(record)
        else:
            refuse(f"{where}: expected {expected}; got {json.dumps(found)[:200]}", on_bad_row)
    return _in_bio(path, sentences, scheme, on_bad_row) if tagged else records


@dataclass(frozen=True)
class _Sentence:
    """Words and tags as they stand in the file, and the line of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    lines: tuple[int, ...]


def _in_bio(
    path: str | Path, sentences: list[_Sentence], scheme: str, on_bad_row: OnBadRow
) -> list[Tagged]:
    """Settle the file's scheme and convert; on declared BIO, an entity that opens with I- is bad.

    Source: conlleval, which takes such an I- for the start of an entity, as "iob1" does here.
    """
    if scheme not in SCHEMES:
        raise FwError(f"scheme: expected one of {', '.join(SCHEMES)}; got {scheme!r}")
    opening_i = opening_b = 0
    for sentence in sentences:
        for line, before, tag in zip(
            sentence.lines, ("O", *sentence.tags), sentence.tags, strict=False
        ):
            if opens_with_i(before, tag):
                opening_i = opening_i or line
            elif tag.startswith("B-") and before[2:] != tag[2:]:
                opening_b = opening_b or line
    if scheme == "auto" and opening_i and opening_b:
        raise FwError(
            f"{path}:{opening_i}: an entity opens with I- as in IOB1, but one opens with B- as in "
            f"BIO at line {opening_b}; declare scheme='iob1' to take such an I- for a B-, or "
            "scheme='bio' to refuse it"
        )
    records = []
    for sentence in sentences:
        tags = iob1_to_bio(sentence.tags)
        if scheme == "bio" and tags != sentence.tags:
            at = next(i for i, tag in enumerate(tags) if tag != sentence.tags[i])
            refuse(
                f"{path}:{sentence.lines[at]}: expected B-{tags[at][2:]} to open an entity in "
                f"BIO; got {sentence.tags[at]}",
                on_bad_row,
            )
            continue
        records.append(Tagged(sentence.words, tags, source=f"{path}:{sentence.lines[0]}"))
    return records


def _find_columns(
    path: str | Path, header: list[str], columns: tuple[str, ...] | None
) -> list[int]:
    names = columns or ("text", "label")
    if columns is None and "label" not in header and len(header) == 2 and "text" in header:
        names = ("text", header[1 - header.index("text")])
    for name in names:
        if header.count(name) != 1:
            raise FwError(
                f"{path}:1: expected one column named {name!r}; got {', '.join(header) or 'none'}; "
                "name the text's and the label's column with `columns`"
            )
    return [header.index(name) for name in names]


def _tagged_words(words: object, tags: object) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    if (
        isinstance(words, list)
        and isinstance(tags, list)
        and len(words) == len(tags) > 0
        and all(isinstance(word, str) and word for word in words)
        and all(isinstance(tag, str) and _TAG.fullmatch(tag) for tag in tags)
    ):
        return tuple(words), tuple(tags)
    return None
