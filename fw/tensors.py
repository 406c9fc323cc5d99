"""Named host arrays in safetensors files, bfloat16 included, which its NumPy reader lacks.

Runs, artifacts and model folders keep their weights with these functions.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fw import json_files
from fw.errors import FwError

DTYPES = {
    "I64": np.int64,
    "F64": np.float64,
    "F32": np.float32,
    "I32": np.int32,
    "BF16": jnp.bfloat16,
    "F16": np.float16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""safetensors' names of the dtypes that such a file may hold, in the order in which it lays their
tensors out; its NumPy reader lacks bfloat16."""

PLAIN = {name: dtype for name, dtype in DTYPES.items() if not name.startswith("F8")}
"""Those of models from elsewhere, whose float8 has scales that no two families store alike."""

_CHUNK = 2**22
"""Bytes that are copied at a time to be written."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file, bfloat16 included, into host arrays.

    Args:
        path: the file.

    Raises:
        FwError: it is no such file, or holds a dtype that is not in `DTYPES`.
    """
    try:
        tensors = safetensors.deserialize(path.read_bytes())
        return {
            name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"])
            for name, t in tensors
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FwError(f"{path}: not tensors that can be read: {error!r}") from error


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as one safetensors file that transformers accepts.

    Args:
        path: the file.
        arrays: by name; their strides do not matter.

    Raises:
        FwError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.safetensors")
    ...     write_tensors(path, {"x": np.ones((2, 3), jnp.bfloat16).T})
    ...     read_tensors(path)["x"].shape
    (3, 2)
    """
    with tensor_file(path, arrays) as write:
        for name, array in arrays.items():
            write(name, array)


def replace_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as `write_tensors` does, whole or not at all: beside the path, then renamed.

    Args:
        path: replaced if it is there. Only process 0 writes.
        arrays: by name, bfloat16 apart; they are few, for their bytes are copied in memory.

    Raises:
        FwError: the file cannot be written.
    """
    if json_files.is_writer():
        data = safetensors.numpy.save(dict(arrays), metadata={"format": "pt"})
        json_files.replace(path, data)


@contextmanager
def tensor_file(path: Path, like: Mapping[str, Any]) -> Iterator[Callable[..., None]]:
    """A safetensors file that is written tensor by tensor, in any order.

    Byte for byte what the library makes of all of them at once.

    Args:
        path: the file.
        like: whatever has a shape and a dtype, by name.

    Yields:
        `write(name, array, part=0)`, to be called for every tensor; `array` may also be one of
        several equal parts of a tensor along its first axis, the `part`-th.

    Raises:
        FwError: the file cannot be written, or a dtype is not in `DTYPES`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.safetensors")
    ...     with tensor_file(path, {"x": np.zeros((2, 3))}) as write:
    ...         write("x", np.ones((1, 3)), 1)
    ...         write("x", np.zeros((1, 3)), 0)
    ...     read_tensors(path)["x"]
    array([[0., 0., 0.],
           [1., 1., 1.]])
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    ranks = list(DTYPES)
    if odd := [name for name, array in like.items() if array.dtype not in names]:
        raise FwError(f"{path}: cannot be written: {odd[0]!r} is {like[odd[0]].dtype}")
    order = sorted(like, key=lambda name: (ranks.index(names[np.dtype(like[name].dtype)]), name))
    # transformers refuses files without the format
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in order:
        shape, dtype = list(like[name].shape), np.dtype(like[name].dtype)
        places[name], end = end, end + math.prod(shape) * dtype.itemsize
        where = {"dtype": names[dtype], "shape": shape, "data_offsets": [places[name], end]}
        header[name] = where
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = end

    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            begin = file.tell()

            def write(name: str, array: np.ndarray, part: int = 0) -> None:
                nonlocal left
                file.seek(begin + places[name] + part * array.nbytes)
                left -= array.nbytes
                rows = np.atleast_1d(array)
                step = max(1, _CHUNK * len(rows) // max(array.nbytes, 1))
                for start in range(0, len(rows), step):
                    # Strides do not matter, and bfloat16 is no buffer.
                    chunk = np.ascontiguousarray(rows[start : start + step])
                    file.write(chunk.reshape(-1).view(np.uint8))

            yield write
            if left:
                raise FwError(f"{path}: {left} of {end} bytes were not given")
    except OSError as error:
        raise FwError(f"{path}: cannot be written: {error}") from error
