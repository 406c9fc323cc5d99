"""Bytes become text or a clear error; a bad row is raised or reported. Every reader uses both."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fw.errors import FwError

TABBED = (".tsv", ".inter", ".user", ".item")
"""Suffixes of tables whose cells are parted by tabs; the last three are RecBole's."""

OnBadRow = Callable[[str], Any] | None


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.

    Returns:
        its characters, line ends as they are.

    Raises:
        FwError: it is not there, or a byte is not UTF-8 (with the line).

    >>> read_text("nowhere.csv")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere.csv: cannot be read: No such file or directory
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FwError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FwError(
            f"{path}:{line}: expected UTF-8; got byte 0x{error.object[error.start]:02x}; "
            "convert the file, for instance with iconv -f latin1 -t utf-8"
        ) from error


def json_lines(path: str | Path, on_bad_row: OnBadRow) -> Iterator[tuple[int, Any]]:
    """The values of JSON lines, each with the number of its line; blank lines are left out.

    Args:
        path: the file, UTF-8.
        on_bad_row: gets the message of each line that is no JSON; None raises instead.

    Raises:
        FwError: the file cannot be read, or a line not.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
            if "\\u" in line:  # an escape may spell half a pair, which is no text
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            refuse(f"{where}: expected Unicode text; half a surrogate pair", on_bad_row)
        except (ValueError, RecursionError) as error:
            refuse(f"{where}: expected a JSON object; {error}", on_bad_row)
        else:
            yield number, value


def separated_rows(path: str | Path, on_bad_row: OnBadRow) -> Iterator[tuple[int, list[str]]]:
    """The rows of CSV (RFC 4180), or parted by tabs without quoting; blank ones are left out.

    Args:
        path: the file, UTF-8; by tabs if its suffix is in `TABBED`.
        on_bad_row: gets the message of each row that cannot be parted; None raises instead.

    Yields:
        each row's cells, with the line it begins on (a quoted cell may span lines).

    Raises:
        FwError: the file cannot be read, or a row not.
    """
    stream = io.StringIO(read_text(path), newline="")
    if Path(path).suffix.lower() in TABBED:
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(stream, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            refuse(f"{path}:{line}: expected a row of separated values; {error}", on_bad_row)
            continue
        if row:
            yield line, row


def refuse(message: str, on_bad_row: OnBadRow) -> None:
    """Raise the message of a bad row, or hand it to who wants to go on.

    >>> bad = []
    >>> refuse("a.csv:3: expected 2 cells; got 1", bad.append)
    >>> len(bad)
    1
    """
    if on_bad_row is None:
        raise FwError(message)
    on_bad_row(message)
