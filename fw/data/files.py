"""Bytes become text or a clear error; a bad row is raised or reported. Every reader uses both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fw.errors import FwError

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
