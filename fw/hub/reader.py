"""From the tensors of the files to a parameter's parts on this process's devices.

A device's part may be a few columns of every tensor of a stack, turned about. So the buffers of all
parts are filled together: a few rows of a tensor at a time, no wider than the devices here need
them, go to every part that has a share in them. Each byte is read once, and what a thread holds
beside the parts are these rows.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest

import numpy as np

from fw.errors import FwError
from fw.hub.files import AnyTensor, Tensors
from fw.models.names import Name
from fw.tensors import PLAIN

Slices = tuple[slice, ...]
Parts = Mapping[Slices, np.ndarray]
Share = tuple[Slices, np.ndarray]
"""What a part has of a tensor, by the tensor's axes, and the buffer for it, with these axes."""

_BYTES = 2**22
"""Of the rows that are read at a time, at most."""

_TURNED = 128
"""Rows that are turned at a time: of so many, the processor's cache holds what it writes to."""

_THREADS = min(16, os.cpu_count() or 1)


def reader(names: Sequence[Name], tensors: Tensors) -> Callable[[Parts], None]:
    """A function for `sharding.fill` that reads a parameter from the files.

    Args:
      names: of the parameter, or of all entries of a stacked one.
      tensors: of the files, by the names' names.

    Returns:
      A function that fills the parts; it raises FwError if a file cannot be read, or the names do
      not make up the whole parameter.
    """

    def read(parts: Parts) -> None:
        if () in parts:
            parts[()][...] = _number(tensors[names[0].tensor], parts[()].dtype)
            return
        shares = [list(_shares(name, parts)) for name in names]
        given = sum(into.size for own in shares for _, into in own)
        if given != (wanted := sum(part.size for part in parts.values())):
            raise FwError(f"{names[0].path}: its tensors have {given} of {wanted} numbers")
        tasks = [
            task
            for name, own in zip(names, shares, strict=True)
            for task in _tasks(name, tensors[name.tensor], own)
        ]
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda task: task(), tasks):
                pass  # or it raises

    return read


def _tasks(name: Name, tensor: AnyTensor, shares: list[Share]) -> Iterator[Callable[[], None]]:
    """What fills the shares of a tensor, some rows each."""
    itemsize = np.dtype(PLAIN[tensor.dtype]).itemsize
    step = max(1, _BYTES // max(1, math.prod(tensor.shape[1:]) * itemsize))
    if name.transposed:
        step = min(step, _TURNED)
    part, count = name.part
    above = part * (tensor.shape[0] // count)
    for run in _runs(shares):
        rows = run[0][0][0]
        for start in range(rows.start, rows.stop, step):
            some = slice(start, min(start + step, rows.stop))
            yield partial(_copy, tensor, above, some, run, name.transposed)


def _number(tensor: AnyTensor, dtype: np.dtype) -> np.ndarray:
    """A tensor without axes, which files have in 64 bits where models have 32."""
    found = tensor.read(())
    if dtype.kind == "i" and not np.iinfo(dtype).min <= found <= np.iinfo(dtype).max:
        raise FwError(f"{tensor.file}: tensor {tensor.name!r}: {found} does not fit {dtype}")
    return found.astype(dtype)


def _shares(name: Name, parts: Parts) -> Iterator[Share]:
    for index, buffer in parts.items():
        axes = list(zip_longest(index, name.entry))
        at = tuple(slice(None) if i is None else i - s.start for s, i in axes)
        if all(i is None or s.start <= i < s.stop for s, i in axes):
            own, into = tuple(s for s, i in axes if i is None), buffer[at]
            order = name.order(len(own))
            yield tuple(own[i] for i in order), into.transpose(order)


def _runs(shares: list[Share]) -> list[list[Share]]:
    """Shares of the same rows and of columns that adjoin lie together."""
    runs: list[list[Share]] = []
    for share in sorted(shares, key=lambda share: [(s.start, s.stop) for s in share[0]]):
        rows, *columns = share[0]
        before = runs[-1][-1][0] if runs else ()
        if before and before[0] == rows and (not columns or columns[0].start <= before[1].stop):
            runs[-1].append(share)
        else:
            runs.append([share])
    return runs


def _copy(tensor: AnyTensor, above: int, rows: slice, run: list[Share], turned: bool) -> None:
    """Reads rows of a tensor, counted from the first of the parameter's, into a run of shares."""
    (top, *left), right = run[0][0], run[-1][0][1:]
    columns = [slice(s.start, t.stop) for s, t in zip(left[:1], right[:1], strict=True)]
    deeper = [slice(0, n) for n in tensor.shape[2:]]
    found = tensor.read((slice(above + rows.start, above + rows.stop), *columns, *deeper))
    to = slice(rows.start - top.start, rows.stop - top.start)
    for (_, *own), into in run:
        for at, first in enumerate(columns):
            own[at] = slice(own[at].start - first.start, own[at].stop - first.start)
        share = found[:, *own]
        into[to] = _spread(share, into.dtype) if turned and share.ndim == 2 else share


def _spread(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy whose rows do not all begin at the same place of the processor's cache.

    As rows of a power of two bytes do: then no two elements of a column can be held there at once.
    """
    line = 64 // dtype.itemsize
    found = np.empty((*rows.shape[:-1], rows.shape[-1] + line), dtype)[..., :-line]
    found[...] = rows
    return found
