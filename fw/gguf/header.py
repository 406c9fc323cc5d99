"""What a GGUF file says of itself, parsed by the `gguf` package once its counts are checked.

The package would loop over any count that a broken or hostile header gives; here each must first
fit the file.
"""

import os
import struct
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import gguf

from fw.errors import FwError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _AXES = 8, 9, 4


def parse(path: Path) -> tuple[dict[str, Any], list[gguf.ReaderTensor]]:
    """The metadata of a file by name, and its tensors, mapped, not read.

    Raises:
      FwError: it cannot be read, is cut off, or is no such file.

    >>> parse(Path("nowhere.gguf"))
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere.gguf: cannot be read: No such file or directory
    """
    _check_counts(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: f.contents() for name, f in reader.fields.items()}
    except OSError as error:
        raise FwError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise FwError(f"{path}: broken, or no GGUF file: {error}") from error
    for tensor in reader.tensors:
        if 0 in tensor.shape:
            raise FwError(f"{path}: tensor {shown(tensor.name)} is empty")
    return fields, reader.tensors


def _check_counts(path: Path) -> None:
    """Walks the header: whatever it counts must lie in the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _Walk(file, size).header()
    except OSError as error:
        raise FwError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, ValueError) as error:
        raise FwError(f"{path}: broken, or no GGUF file: {error}") from error


class _Walk:
    """Steps over a header without keeping any of it."""

    def __init__(self, file: Any, size: int):
        self.file, self.size = file, size

    def number(self, form: str) -> int:
        width = struct.calcsize(f"<{form}")
        return struct.unpack(f"<{form}", self.file.read(width))[0]

    def skip(self, count: int, width: int = 1) -> None:
        left = self.size - self.file.tell()
        if count * width > left:
            raise ValueError(f"{count} items of {width} bytes, {left} bytes are left")
        self.file.seek(count * width, os.SEEK_CUR)

    def value(self, kind: int) -> None:
        if kind in _SCALARS:
            self.skip(1, _SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                self.skip(count, _SCALARS[inner])
            elif inner == _STRING:
                for _ in range(count):  # each takes 8 bytes, so the file ends the loop
                    self.skip(self.number("Q"))
            else:
                raise ValueError(f"an array of arrays, or of type {inner}")
        else:
            raise ValueError(f"a value of type {kind}")

    def header(self) -> None:
        if self.file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"version {version}; expected 2 or 3, little-endian")
        tensors, pairs = self.number("Q"), self.number("Q")
        for _ in range(pairs):
            self.skip(self.number("Q"))
            self.value(self.number("I"))
        for _ in range(tensors):
            self.skip(self.number("Q"))
            axes = self.number("I")
            if not 1 <= axes <= _AXES:
                raise ValueError(f"a tensor of {axes} axes")
            elements = 1
            for _ in range(axes):
                elements *= self.number("Q")
            self.number("I")
            offset = self.number("Q")
            # No format takes less than one bit a number.
            if offset > self.size or elements > 8 * self.size:
                raise ValueError(f"a tensor of {elements} numbers at {offset}")
