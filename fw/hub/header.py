"""What a safetensors file says of itself, checked.

The library does not say where a tensor begins, nor which of them is at fault where a header does
not fit its file, and of two of one name it takes the last. Here every number is held against the
size of the file, in memory of the order of the header, and an error names the tensor.
"""

import json
import math
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fw.errors import FwError

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Of an element of each dtype of the format."""

METADATA = "__metadata__"
MOST_BYTES = 100_000_000
"""Of a header, as the format limits it, and of any JSON file of a folder."""
MOST_PARTS = 1_000_000
"""Lists and objects in one of them: each costs many times its two characters."""
MOST_AXES = 64
"""Of a tensor, as in numpy."""

_short = reprlib.Repr(maxstring=200).repr


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor by its header: its bytes are those from `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def shown_name(name: str) -> str:
    r"""A name for a message: quoted, on one line, without control characters, and not too long.

    >>> print(shown_name("\x1b[2Ja\n"))
    '\x1b[2Ja\n'
    """
    return _short(name)


def check_file(path: Path, most: int | None = None) -> int:
    """The size of a file, which can then be opened without waiting for anyone.

    Args:
      path: followed if it is a link: downloaded folders are links into a store.
      most: bytes that it may have.

    Raises:
      FwError: it is not there, too large, or a folder, pipe or device.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise FwError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise FwError(f"{path}: cannot be read: expected a plain file, not a folder or device")
    if most is not None and found.st_size > most:
        raise FwError(f"{path}: expected at most {most} bytes, found {found.st_size}")
    return found.st_size


def parse_json(text: str, where: Path, expected: str = "a JSON object", **hooks: Any) -> Any:
    """Parses JSON from anywhere; `hooks` are those of `json.loads`.

    Raises:
      FwError: it is none, or has too many parts.

    >>> parse_json("[" * 9999, Path("config.json"))
    Traceback (most recent call last):
    ...
    fw.errors.FwError: config.json: expected a JSON object: maximum recursion depth exceeded ...
    """
    if text.count("[") + text.count("{") > MOST_PARTS:
        raise FwError(f"{where}: expected at most {MOST_PARTS} lists and objects")
    try:
        return json.loads(text, **hooks)
    except (ValueError, RecursionError) as error:
        raise FwError(f"{where}: expected {expected}: {error}") from error


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file; together they are all of its data.

    Raises:
      FwError: it cannot be read; a header that does not fit the format or the file.

    >>> import tempfile
    >>> header = b'{"x": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.safetensors")
    ...     _ = path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    ...     read_header(path)
    {'x': Entry(dtype='F16', shape=(2, 3), start=73, stop=85)}
    """
    size, broken = check_file(file), f"{file}: broken, or no safetensors file"
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise FwError(f"{broken}: a header of {length} bytes in a file of {size}")
            if length > MOST_BYTES:
                raise FwError(f"{broken}: expected at most {MOST_BYTES} bytes, found {length}")
            text = opened.read(length).decode()
    except OSError as error:
        raise FwError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FwError(f"{broken}: its header is not UTF-8 at byte {8 + error.start}") from error
    # An object becomes a tuple of pairs, so that none gets lost where two have one name.
    pairs = parse_json(text, file, object_pairs_hook=tuple, parse_constant=_no_constant)
    if not isinstance(pairs, tuple):
        raise FwError(f"{broken}: its header is no object")
    found: dict[str, Entry] = {}
    for name, value in pairs:
        if name == METADATA:
            _check_metadata(value, broken)
            continue
        where = f"{file}: tensor {shown_name(name)}"
        if name in found:
            raise FwError(f"{where}: the header has two of this name")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise FwError(f"{where}: expected a name in Unicode")
        found[name] = _entry(value, where, 8 + length, size)
    end, last = 8 + length, ""
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            after = f"after {shown_name(last)} " if last else ""
            raise FwError(
                f"{file}: tensor {shown_name(name)}: {after}expected to begin at byte {end}, "
                f"begins at {entry.start}"
            )
        end, last = entry.stop, name
    if end != size:
        raise FwError(
            f"{broken}: its tensors end at byte {end}, with {shown_name(last)}, of {size}"
        )
    return found


def _entry(value: Any, where: str, begin: int, size: int) -> Entry:
    """An entry of a header, of a file whose data begin there and which has so many bytes."""
    pairs = value if isinstance(value, tuple) else ()
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise FwError(f"{where}: the same key twice")
    dtype, shape = fields.get("dtype"), _sizes(fields.get("shape"))
    span = _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FwError(f"{where}: dtype is {reprlib.repr(dtype)}; expected one of {', '.join(BITS)}")
    if shape is None or len(shape) > MOST_AXES:
        found = reprlib.repr(fields.get("shape"))
        raise FwError(f"{where}: shape is {found}; expected a list of sizes")
    if span is None or len(span) != 2 or not span[0] <= span[1] <= size - begin:
        found = reprlib.repr(fields.get("data_offsets"))
        raise FwError(
            f"{where}: data_offsets are {found}; expected two in order within {size - begin} bytes"
        )
    # Empty or not, the product must be one that numpy can count.
    if math.prod(n or 1 for n in shape) * BITS[dtype] >= 2**63:
        raise FwError(f"{where}: shape {reprlib.repr(shape)} is too large")
    bits, given = math.prod(shape) * BITS[dtype], 8 * (span[1] - span[0])
    if bits != given:
        raise FwError(
            f"{where}: {dtype} of shape {tuple(shape)} takes {bits} bits; data_offsets {span} give "
            f"{given}"
        )
    return Entry(dtype, tuple(shape), begin + span[0], begin + span[1])


def _sizes(value: Any) -> list[int] | None:
    """A list of sizes, or None if it is none; true and 1.0 are no sizes."""
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value):
        return value
    return None


def _check_metadata(value: Any, broken: str) -> None:
    if value is not None and not (
        isinstance(value, tuple) and all(isinstance(text, str) for _, text in value)
    ):
        raise FwError(f"{broken}: expected texts in {METADATA}, found {reprlib.repr(value)}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
