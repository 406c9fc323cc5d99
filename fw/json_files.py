"""JSON on disk: a file is whole or not there, a value is in JSON's own types or refused.

`fw.run` keeps a run's files with these functions, and whatever else leaves a file uses them too.
JSON has no NaN: a number that is not finite is written as null. With several processes, all call
`write_text` and `write_json`, and only process 0 writes.
"""

import contextlib
import dataclasses
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fw.errors import FwError


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: beside its place, to the disk, then renamed.

    Args:
        path: replaced if it is there. Only process 0 writes.
        text: written as UTF-8.

    Raises:
        FwError: it cannot be written.
    """
    if is_writer():
        replace(Path(path), text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all (see `write_text`).

    Args:
        path: replaced if it is there. Only process 0 writes.
        value: mappings with string keys, sequences, strings, numbers; also NumPy and JAX values,
            paths and dataclasses. A number that is not finite becomes null.

    Raises:
        FwError: it cannot be written.
        TypeError: a value that JSON cannot hold, with its place.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(f"{folder}/a.json", {"f1": np.float32(0.5), "loss": math.nan})
    ...     read_json(f"{folder}/a.json")
    {'f1': 0.5, 'loss': None}
    """
    path = Path(path)
    data = dumps(plain(value, path.name), indent=1) + b"\n"
    if is_writer():
        replace(path, data)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        Its value.

    Raises:
        FwError: it is not there or not JSON (with the line).
    """
    path = Path(path)
    return loads(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Read a file; `FwError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FwError(f"{path}: cannot be read: {error.strerror}") from error


def replace(path: Path, data: bytes) -> None:
    """Write beside a path, to the disk, then rename; `FwError` if it cannot be written."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened to be synchronised
            entry = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(entry)
            finally:
                os.close(entry)
    except OSError as error:
        raise FwError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def loads(data: bytes, where: str | Path) -> Any:
    """Parse JSON from a file (a path) or one line of it ("path:line"); `FwError` if it is not."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if isinstance(where, Path) else where
        raise FwError(
            f"{place}: not JSON at column {error.colno}: {error.msg}; "
            "mend the line or restore the file"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a giant number, a deep nest
        raise FwError(f"{where}: not JSON: {error}; restore the file") from error


def dumps(value: Any, indent: int | None = None) -> bytes:
    """Print what `plain` returned as UTF-8; on one line unless it is indented."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    # A lone surrogate, from a file name that is not UTF-8, becomes JSON's own escape for it.
    return text.encode("utf-8", "backslashreplace")


def plain(value: Any, where: str) -> Any:
    """Convert a value to JSON's own types.

    Args:
        value: as for `write_json`.
        where: its place, for the error.

    Returns:
        None, bools, numbers, strings, lists, and dicts with string keys.

    Raises:
        TypeError: JSON cannot hold it.

    >>> plain({"mesh": (2, 1), "scale": np.float32(0.5)}, "config")
    {'mesh': [2, 1], 'scale': 0.5}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        array = np.asarray(value)
        exotic = array.dtype.kind not in "biufU"  # bfloat16 and its like
        return plain((array.astype(np.float64) if exotic else array).tolist(), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}/{i}") for i, item in enumerate(value)]
    kind = "a key that is not a string" if isinstance(value, Mapping) else type(value).__name__
    raise TypeError(f"{where}: JSON cannot hold {kind}; convert it first")


def is_writer() -> bool:
    """Say whether this process is the one that writes; initialises JAX's backend."""
    return jax.process_index() == 0
