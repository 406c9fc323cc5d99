"""What a teacher says of all rows of a data set, asked once and kept in a file."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fw.data import eval_batches
from fw.data.rows import AnyRows
from fw.errors import FwError
from fw.evaluate import Forward
from fw.tensors import read_tensors, replace_tensors
from sharding import Rules, constrain, put, scope
from sharding.processes.cluster import beat

FILE = "teacher.safetensors"
"""A run's file of them."""

_CHUNK = 4096
"""Rows that are hashed at a time."""


def ask(
    forward: Forward, variables: Any, rows: AnyRows, *, size: int, mesh: Mesh, rules: Rules,
    say: Callable[[int, int, float], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """A model's outputs for every row.

    Args:
      forward: `forward(variables, batch) -> outputs`.
      variables: where loading put them.
      rows: R of them.
      size: rows in a batch.
      mesh, rules: where batches go.
      say: is told rows done, all rows, and seconds that are left.

    Returns:
      float32 [R, ...], in the host's memory.
    """

    @jax.jit
    def call(variables: Any, batch: Any) -> jax.Array:
        outputs = forward(variables, batch)
        return constrain(outputs, *[None] * outputs.ndim)  # every process reads all of them

    found, began = [], 0.0
    with scope(mesh, rules):
        for batch in eval_batches(rows.arrays, size, empty=rows.empty):
            beat()
            found.append(np.asarray(call(variables, put(batch, mesh, rules)), np.float32))
            done, now = min(len(found) * size, rows.rows), time.perf_counter()
            if began == 0:  # the first batch compiles
                began, first = now, done
            elif say is not None:
                say(done, rows.rows, (now - began) / (done - first) * (rows.rows - done))
    return np.concatenate(found)[: rows.rows]


def rows_digest(rows: AnyRows) -> bytes:
    """32 bytes that tell rows from others: of names, dtypes, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=32)
    for name, values in sorted(rows.arrays.items()):
        digest.update(f"{name} {np.dtype(values.dtype).str} {tuple(values.shape)}".encode())
        for start in range(0, len(values), _CHUNK):
            part = values[np.arange(start, min(start + _CHUNK, len(values)))]
            digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


def write(path: Path, outputs: np.ndarray, rows: AnyRows, labels: Sequence[str]) -> None:
    """Keeps a teacher's outputs, and what they are of; whole or not at all. One process writes."""
    names = json.dumps(list(labels)).encode()
    arrays = {"outputs": outputs, "rows": np.frombuffer(rows_digest(rows), np.uint8)}
    replace_tensors(path, {**arrays, "labels": np.frombuffer(names, np.uint8)})


def keep(folder: Path, outputs: np.ndarray | None, rows: AnyRows, labels: Sequence[str]) -> None:
    """Writes `FILE` in a run, if it is not there and there is something to write."""
    if outputs is not None and not (folder / FILE).exists():
        write(folder / FILE, outputs, rows, labels)


def read(path: Path, rows: AnyRows, labels: Sequence[str]) -> np.ndarray:
    """The outputs in such a file.

    Args:
      path: the file.
      rows: of the training data.
      labels: its classes.

    Raises:
      FwError: no such file, or of other rows or classes.
    """
    if not path.is_file():
        raise FwError(f"{path}: there is no such file; --teacher-offline makes one in its run")
    try:
        tensors = read_tensors(path)
    except OSError as error:
        raise FwError(f"{path}: cannot be read: {error.strerror}") from error
    if {*tensors} != {"outputs", "rows", "labels"} or tensors["outputs"].ndim < 1:
        raise FwError(f"{path}: holds no teacher's answers; --teacher-offline makes such a file")
    own = tensors["labels"].tobytes()
    if own != json.dumps(list(labels)).encode():
        shown = own[:200].decode(errors="replace")
        raise FwError(f"{path}: its classes are {shown}, those of the data {list(labels)}")
    if len(tensors["outputs"]) != rows.rows or tensors["rows"].tobytes() != rows_digest(rows):
        raise FwError(
            f"{path}: its {len(tensors['outputs'])} rows are not the {rows.rows} of this run; the "
            "data, the tokenizer, length, packing and texts of a row are those it was made with"
        )
    return tensors["outputs"]
