"""The files of a model folder: tensors known by their headers and read slice by slice.

`families` says what the files mean, `folder` brings them onto the mesh. Files come from anywhere:
names and paths in them are checked here, and what a file of tensors says of itself in `header`.
"""

import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np

from fw.data.files import read_text
from fw.errors import FwError
from fw.gguf import GgufTensor, gguf_file, write_tokenizer
from fw.hub.header import MOST_BYTES, check_file, parse_json, read_header, shown_name
from fw.tensors import PLAIN

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""All files that a tokenizer of transformers may consist of."""

_PAGE = 4096
"""Bytes that a disk's cache brings at least, so that reading less of them saves nothing."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in an open file.

    Attributes:
      name: in the file.
      file: which one.
      shape: as in the file.
      dtype: as safetensors spells it: "F32", "BF16", "I64" …
      opened: descriptor of the open file.
      start: where the tensor begins in it.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    opened: int = field(repr=False)
    start: int = field(repr=False)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part, and only that part, from the file; gaps of less than a page as well.

        Args:
          index: a slice of step 1 an axis; () for a tensor without axes.

        Raises:
          FwError: the file cannot be read, or holds what NumPy has no dtype for.
        """
        if self.dtype not in PLAIN:
            raise FwError(f"{self.file}: tensor {self.name!r}: cannot read {self.dtype}")
        if not self.shape:
            return replace(self, shape=(1,)).read((slice(0, 1),)).reshape(())
        dtype, (first, *rest) = np.dtype(PLAIN[self.dtype]), index
        start, stop, _ = first.indices(self.shape[0])
        shape, row = self.shape[1:], math.prod(self.shape[1:]) * dtype.itemsize
        place, pieces = self.start + start * row, 1
        if rest and row:
            left, right, _ = rest[0].indices(shape[0])
            if row - row // shape[0] * (right - left) >= _PAGE:
                place, pieces = place + row // shape[0] * left, stop - start
                shape, rest = (right - left, *shape[1:]), [slice(None), *rest[1:]]
        found = np.empty((stop - start, *shape), dtype)
        flat = memoryview(found.reshape(-1).view(np.uint8))
        size = flat.nbytes // max(1, pieces)
        with _errors(self.file):
            for piece in range(pieces):
                _fill(flat[piece * size :][:size], self.opened, place + piece * row)
        return found[:, *rest]


@dataclass(frozen=True)
class Turned:
    """A tensor whose axes lie in another order in the file.

    Attributes:
      dense: as it lies there.
      order: for each axis of `dense`, which one of the tensor's it is.
    """

    dense: Tensor
    order: tuple[int, ...]

    @property
    def name(self) -> str:
        """In the file."""
        return self.dense.name

    @property
    def file(self) -> Path:
        """Which one."""
        return self.dense.file

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return self.dense.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.dense.shape[self.order.index(i)] for i in range(len(self.order)))

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """As `Tensor.read`."""
        found = self.dense.read(tuple(index[i] for i in self.order))
        return found.transpose([self.order.index(i) for i in range(len(self.order))])


AnyTensor = Tensor | Turned | GgufTensor
Tensors = Mapping[str, AnyTensor]


def largest(tensors: Iterable[AnyTensor]) -> int:
    """The largest size that a folder's tensors bear out: that of an axis, or their number."""
    tensors = tuple(tensors)
    # An empty tensor may state any size for its other axes, for it takes no room in the file.
    sizes = (size for tensor in tensors if 0 not in tensor.shape for size in tensor.shape)
    return max([1, len(tensors), *sizes])


def read_small(path: Path) -> str:
    """The text of a file beside the tensors.

    Raises:
      FwError: it is not there, too large for such a file, a pipe, say, or no UTF-8.
    """
    check_file(path, MOST_BYTES)
    return read_text(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      FwError: the file is not there, or holds something else.

    >>> read_json(Path("nowhere/config.json"))
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere/config.json: cannot be read: No such file or directory
    """
    found = parse_json(read_small(path), path)
    if not isinstance(found, dict):
        raise FwError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


@contextmanager
def open_tensors(folder: Path, weights: str = WEIGHTS) -> Iterator[dict[str, Tensor]]:
    """Opens the tensor files of a folder: one, or those that an index names.

    Args:
      folder: holds `weights`, or an index.
      weights: the name of the one file.

    Yields:
      Every tensor by name. They can be read until the context ends.

    Raises:
      FwError: no such file; a broken one; an index that does not fit its files.

    >>> import tempfile
    >>> from fw.tensors import write_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, WEIGHTS)
    ...     write_tensors(path, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)})
    ...     with open_tensors(Path(folder)) as tensors:
    ...         tensors["x"].shape, tensors["x"].read((slice(0, 1), slice(1, 3)))
    ((2, 3), array([[1., 2.]], dtype=float32))
    """
    places = {} if (folder / weights).is_file() else _read_index(folder)
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in [folder / name for name in sorted(set(places.values())) or [weights]]:
            header = read_header(file)
            opened = stack.enter_context(_open(file))
            for name, entry in header.items():
                if name in found:
                    where = found[name].file.name
                    raise FwError(f"{file}: tensor {shown_name(name)} is also in {where}")
                found[name] = Tensor(name, file, entry.shape, entry.dtype, opened, entry.start)
        for name, place in places.items():
            if name not in found or found[name].file.name != place:
                raise FwError(
                    f"{folder / INDEX}: expected tensor {shown_name(name)} in {place}; it is not"
                )
        yield found


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside the final one, which it becomes if the body succeeds.

    Raises:
      FwError: there is already something, or it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     with new_folder(Path(root, "model")) as part:
    ...         _ = (part / "a.txt").write_text("a")
    ...     [str(path.relative_to(root)) for path in Path(root).rglob("*")]
    ['model', 'model/a.txt']
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FwError(f"{folder}: exists already; choose another folder, or remove it first")
    part = folder.with_name(f"{folder.name}.part-{secrets.token_hex(4)}")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    except OSError as error:
        raise FwError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_tokenizer(source: Path, into: Path) -> None:
    """Copies the files of a tokenizer, those that there are, or writes those of a GGUF file."""
    if (file := gguf_file(source)) is not None:
        write_tokenizer(file, into)
        return
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, into / name)


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index of a folder; the names are those of plain files."""
    path = folder / INDEX
    if not path.is_file():
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        hint = f" (weights in pickles are not read: {', '.join(pickles)})" if pickles else ""
        raise FwError(f"{folder}: expected {WEIGHTS} or {INDEX}; found neither{hint}")
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FwError(f"{path}: expected 'weight_map', an object from tensors to files")
    user: dict[str, str] = {}  # of each file, a tensor in it
    for tensor, place in places.items():
        user.setdefault(place if isinstance(place, str) else "", tensor)
    for place, tensor in user.items():
        if not _is_plain(place):
            raise FwError(
                f"{path}: tensor {shown_name(tensor)}: expected the name of a .safetensors file, "
                f"got {shown(places[tensor])}"
            )
        try:
            there = (folder / place).is_file()
        except OSError:  # a name that no file can have: too long
            there = False
        if not there:
            raise FwError(
                f"{path}: tensor {shown_name(tensor)}: names {shown_name(place)}, which is not "
                f"in {folder}, or no plain file"
            )
    return places


def _is_plain(name: str) -> bool:
    """Whether it names a file of tensors beside its index: no folders at all, on any system."""
    tame = name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
    return tame and name.endswith(".safetensors")


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FwError(f"{file}: cannot be read: {error}") from error


@contextmanager
def _open(file: Path) -> Iterator[int]:
    with _errors(file):
        opened = os.open(file, os.O_RDONLY)
    try:
        yield opened
    finally:
        os.close(opened)


def _fill(buffer: memoryview, opened: int, place: int) -> None:
    """Reads from a place of a file; a read may bring less than it was asked for."""
    while buffer:
        count = os.preadv(opened, [buffer], place)
        if not count:
            raise OSError(f"it ends at byte {place}, in a tensor")
        buffer, place = buffer[count:], place + count
