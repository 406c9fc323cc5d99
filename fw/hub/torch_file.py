"""Tensors of torch's own files, `.pth`, found without running the pickle that they are.

A pickle is a program that may call anything. Here it is read as a list of instructions: those that
a state dict of tensors needs are followed, with symbols in the place of torch's functions, and any
other is refused. What is left says where each tensor's bytes lie, and they are read from there.
Both layouts are known: a zip archive, and the older one, pickles followed by the bytes.
"""

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from reprlib import repr as shown
from typing import Any, BinaryIO

from fw.errors import FwError
from fw.hub.files import Tensor, Turned
from fw.hub.header import BITS, MOST_AXES, MOST_BYTES, check_file, shown_name

SUFFIX = ".pth"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""With which the older layout begins."""

MOST_STEPS = 2_000_000
"""Instructions of a pickle; a tensor takes about forty."""

_STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"


@dataclass(frozen=True)
class _Symbol:
    """A name that a pickle would import."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A run of numbers: its key, safetensors' name of its dtype, and how many."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor: a part of a storage without gaps, its axes in any order."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    order: tuple[int, ...]


class _Mark:
    """Where a tuple, or the items of a dict, begin on the stack."""


def torch_file(place: Path) -> Path | None:
    """The `.pth` that a path is, or that a folder without a `config.json` holds.

    Raises:
      FwError: the folder holds several.
    """
    if place.suffix == SUFFIX and place.is_file():
        return place
    if not place.is_dir() or (place / "config.json").exists():
        return None
    found = [file for file in place.iterdir() if file.suffix == SUFFIX]
    if len(found) > 1:
        raise FwError(f"{place}: holds {len(found)} {SUFFIX} files; keep one")
    return found[0] if found else None


@contextmanager
def open_torch(file: Path) -> Iterator[dict[str, Tensor | Turned]]:
    """Opens a state dict that `torch.save` wrote.

    Yields:
      Every tensor by name. They can be read until the context ends.

    Raises:
      FwError: a file that cannot be read or is no state dict of plain tensors: another layout,
        instructions that a state dict does not need, tensors that have gaps, or that lie outside
        of the file.
    """
    size = check_file(file)
    try:
        with file.open("rb") as opened:
            zipped = opened.read(4) == b"PK\x03\x04"
            views, places = (_zipped if zipped else _legacy)(file, opened)
            tensors = {name: _tensor(name, view, places, file, size, opened.fileno())
                       for name, view in views.items()}  # fmt: skip
            yield tensors
    except OSError as error:
        raise FwError(f"{file}: cannot be read: {error}") from error


Places = Mapping[str, tuple[int, int]]
"""Of each storage, where its bytes begin, and how many they are."""


def _tensor(
    name: str, view: _View, places: Places, file: Path, size: int, opened: int
) -> Tensor | Turned:
    """The tensor of a view, held against its storage and the file."""
    where, storage = f"{file}: tensor {shown_name(name)}", view.storage
    if storage.key not in places:
        raise FwError(f"{where}: its storage {shown(storage.key)} is not in the file")
    width = BITS[storage.dtype] // 8
    begin, room = places[storage.key]
    if storage.count * width > room or begin + room > size:
        raise FwError(f"{where}: its storage of {storage.count} numbers is longer than the file")
    if view.offset + math.prod(view.shape) > storage.count:
        raise FwError(f"{where}: shape {shown(view.shape)} is more than its storage holds")
    shape = tuple(view.shape[i] for i in view.order)
    dense = Tensor(name, file, shape, storage.dtype, opened, begin + view.offset * width)
    return dense if list(view.order) == sorted(view.order) else Turned(dense, view.order)


def _zipped(file: Path, opened: BinaryIO) -> tuple[dict[str, _View], Places]:
    """The views and places of an archive, whose members must lie there as they are."""
    broken = f"{file}: broken, or no archive of torch"
    places = {}
    try:
        with zipfile.ZipFile(opened) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickled = [name for name in members if name.endswith("/data.pkl")]
            if len(pickled) != 1 or members[pickled[0]].file_size > MOST_BYTES:
                raise FwError(f"{broken}: expected one data.pkl of at most {MOST_BYTES} bytes")
            root = pickled[0].removesuffix("data.pkl")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise FwError(f"{broken}: its members are compressed, as torch's are not")
            order = members.get(f"{root}byteorder")
            if order and (order.file_size > 9 or archive.read(order) != b"little"):
                raise FwError(f"{broken}: its numbers are not little-endian")
            found = _Reader(BytesIO(archive.read(pickled[0])), file).result()
        for name, info in members.items():
            if name.startswith(f"{root}data/"):
                # The local header's own lengths, which need not be those of the directory.
                head = os.pread(opened.fileno(), 30, info.header_offset)
                if len(head) != 30 or head[:4] != b"PK\x03\x04":
                    raise FwError(f"{broken}: {shown_name(name)} is not where the directory says")
                start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
                places[name.removeprefix(f"{root}data/")] = (start, info.file_size)
    except FwError:
        raise
    # RuntimeError: of a member that is encrypted; ValueError: of a name that is no UTF-8.
    except (
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        OverflowError,
        struct.error,
        EOFError,
    ) as error:
        raise FwError(f"{broken}: {error}") from error
    return _state_dict(found, file), places


def _legacy(file: Path, opened: BinaryIO) -> tuple[dict[str, _View], Places]:
    """The views and places of the older layout: five pickles, then each storage and its length."""
    opened.seek(0)
    magic, protocol, system = (_Reader(opened, file).result() for _ in range(3))
    if magic != MAGIC or protocol != PROTOCOL or not isinstance(system, dict):
        raise FwError(f"{file}: broken, or no file of torch")
    if system.get("little_endian") is not True:
        raise FwError(f"{file}: its numbers are not little-endian")
    reader = _Reader(opened, file)
    views, keys = _state_dict(reader.result(), file), _Reader(opened, file).result()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise FwError(f"{file}: expected a list of the storages' keys, got {shown(keys)}")
    places, size = {}, os.fstat(opened.fileno()).st_size
    for key in keys:
        stated, storage = opened.read(8), reader.storages.get(key)
        if storage is None or stated != storage.count.to_bytes(8, "little"):
            raise FwError(f"{file}: storage {shown(key)} is not as long as its tensors say")
        begin, room = opened.tell(), storage.count * BITS[storage.dtype] // 8
        if begin + room > size:
            raise FwError(f"{file}: storage {shown(key)} is longer than the file")
        places[key] = (begin, room)
        opened.seek(room, os.SEEK_CUR)
    return views, places


def _state_dict(found: Any, file: Path) -> dict[str, _View]:
    if not isinstance(found, dict) or not found:
        raise FwError(f"{file}: expected a state dict, got {shown(type(found).__name__)}")
    for name, view in found.items():
        if not isinstance(view, _View):
            kind = type(view).__name__.strip("_")
            raise FwError(f"{file}: {shown_name(name)}: expected a tensor, got {shown(kind)}")
    return found


def _whole(*numbers: Any) -> bool:
    return all(type(n) is int and 0 <= n < 2**62 for n in numbers)


class _Reader:
    """Follows the instructions of one pickle, as far as a state dict needs them."""

    def __init__(self, opened: BinaryIO | BytesIO, file: Path):
        self.opened, self.file = opened, file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def result(self) -> Any:
        """What the pickle makes."""
        plain: dict[str, Callable[[Any], Any]] = {
            "NONE": lambda _: None,
            "NEWTRUE": lambda _: True,
            "NEWFALSE": lambda _: False,
            "EMPTY_TUPLE": lambda _: (),
            "EMPTY_LIST": lambda _: [],
            "EMPTY_DICT": lambda _: {},
            "MARK": lambda _: _Mark,
            "GLOBAL": self._symbol,
            "BINPERSID": lambda _: self._storage(self.stack.pop()),
            "REDUCE": lambda _: self._call(*self._last(2)),
            "TUPLE": lambda _: tuple(self._marked()),
            "TUPLE1": lambda _: tuple(self._last(1)),
            "TUPLE2": lambda _: tuple(self._last(2)),
            "TUPLE3": lambda _: tuple(self._last(3)),
        }
        texts = ("BINUNICODE", "SHORT_BINUNICODE")
        numbers = ("BININT", "BININT1", "BININT2", "LONG1")
        try:
            for step, (code, argument, _) in enumerate(pickletools.genops(self.opened)):
                if step == MOST_STEPS:
                    raise self._needless(f"more than {MOST_STEPS} instructions")
                if code.name == "STOP":
                    return self.stack.pop()
                if code.name in plain:
                    self.stack.append(plain[code.name](argument))
                elif code.name in texts or code.name in numbers:
                    self.stack.append(argument)
                else:
                    self._change(code.name, argument)
        except FwError:
            raise
        # LookupError: of a stack or memo that lacks what an instruction takes; MemoryError: of a
        # text that states a length beyond all memory.
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
            raise FwError(f"{self.file}: broken, or no file of torch: {error!r}") from error
        raise FwError(f"{self.file}: broken, or no file of torch: its pickle has no end")

    def _change(self, code: str, argument: Any) -> None:
        """The instructions that leave nothing new on the stack."""
        match code:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "SETITEM":
                self._put(self._last(2))
            case "SETITEMS":
                self._put(self._marked())
            case "APPEND" | "APPENDS":
                items = self._last(1) if code == "APPEND" else self._marked()
                self._onto(list).extend(items)
            case "BUILD":  # the dict's own attributes: versions of its modules
                if not isinstance(self.stack.pop(), dict):
                    raise self._needless("BUILD of something else than a dict's attributes")
                self._onto(dict)
            case _:
                raise self._needless(f"the instruction {code}")

    def _needless(self, what: str) -> FwError:
        return FwError(
            f"{self.file}: its pickle has {what}, which a state dict of tensors does not need; it "
            "is not run"
        )

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        found = self.stack[-count:]
        del self.stack[-count:]
        if _Mark in found:
            raise ValueError("a mark where a value belongs")
        return found

    def _marked(self) -> list[Any]:
        found = []
        while (item := self.stack.pop()) is not _Mark:
            found.append(item)
        return found[::-1]

    def _onto(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"expected a {kind.__name__} on the stack")
        return self.stack[-1]

    def _put(self, items: list[Any]) -> None:
        into = self._onto(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in into:
                raise self._needless(f"the key {shown(key)}, no text or there twice,")
            into[key] = value

    def _symbol(self, name: str) -> _Symbol:
        module, _, own = name.partition(" ")
        stores = module == "torch" and own in _STORAGES
        if not stores and name not in (_DICT, _TENSOR, _PARAMETER):
            raise self._needless(f"the name {shown_name(name)}")
        return _Symbol(name)

    def _call(self, function: Any, arguments: Any) -> dict | _View:
        match function, arguments:
            case _Symbol(name=name), () if name == _DICT:
                return {}
            case _Symbol(name=name), (_View() as view, *_) if name == _PARAMETER:
                return view
            case _Symbol(name=name), (_Storage() as storage, offset, shape, strides, *_) if (
                name == _TENSOR and isinstance(shape, tuple) and isinstance(strides, tuple)
            ):
                return self._view(storage, offset, shape, strides)
        raise self._needless(f"a call of {shown(function)} with {shown(arguments)}")

    def _view(
        self, storage: _Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]
    ) -> _View:
        if not _whole(offset, *shape, *strides) or len(shape) > MOST_AXES:
            raise self._needless(f"a tensor of shape {shown(shape)}")
        if len(strides) != len(shape):
            raise self._needless(f"{len(strides)} strides for the shape {shown(shape)}")
        # From the slowest axis to the fastest; one of a single place may have any stride.
        order = sorted(range(len(shape)), key=lambda i: -strides[i])
        tight = 1
        for i in reversed([i for i in order if shape[i] != 1]):
            if strides[i] != tight and 0 not in shape:
                raise FwError(
                    f"{self.file}: a tensor of shape {shown(shape)} has strides {shown(strides)}, "
                    "which leave gaps; save tensor.contiguous()"
                )
            tight *= shape[i]
        return _View(storage, offset, shape, tuple(order))

    def _storage(self, told: Any) -> _Storage:
        match told:
            case ("storage", _Symbol(name=name), str(key), str(), count, *rest) if (
                rest in ([], [None]) and _whole(count) and name.startswith("torch ")
            ):
                found = _Storage(key, _STORAGES[name.removeprefix("torch ")], count)
                if self.storages.setdefault(key, found) != found:
                    raise self._needless(f"two storages {shown(key)}")
                return found
        raise self._needless(f"a storage {shown(told)}")
