"""Files become pictures, uint8 [H, W, C], or an error names the file; a bad one may be left out.

Pillow decodes. What a file says of itself is checked before it is believed: its format is one of
`FORMATS`, its header's size at most `PIXELS`, whatever its name ends in. `preprocess` makes all of
one size; `Decoded` is the array of a data set that is larger than memory: it decodes the rows that
it is asked for, in threads, for Pillow lets go of the interpreter.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import batched
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fw.data.files import OnBadRow, refuse
from fw.errors import FwError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
"""What is decoded; of an animation the first picture."""

PIXELS = 2**26
"""Most pixels in a picture, 8192 × 8192: 200 MB as colours. A few bytes of a file can claim any
number of them."""

BYTES = 2**29
"""Most bytes in a file: no picture of so few pixels has more."""

BAD = 0.05
"""The share of a data set's pictures that may be bad where bad ones are left out."""

HELD = 2**31
"""Bytes of pictures kept in memory, by a data set and by the cache of a larger one."""

THREADS = min(16, os.cpu_count() or 1)

Source = str | os.PathLike[str] | bytes | np.ndarray
"""A path, a file's bytes, or pixels: uint8 [H, W] or [H, W, C]."""

MODES = {1: "L", 3: "RGB"}
"""Pillow's name for so many channels."""

_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_LOSSY = ("JPEG", "MPO")  # as Pillow calls a JPEG that holds several


def decode(source: Source, channels: int = 3) -> np.ndarray:
    """Read a picture, the right way up.

    It is turned as its EXIF data says, what is transparent is laid on white, and of grey in 16 bits
    the upper 8 are kept (Pillow's own conversion makes all but the darkest white).

    Args:
        source: a path, the bytes of a file, or pixels, which only change their channels.
        channels: 3 for colours, 1 for grey.

    Returns:
        uint8 [H, W, channels].

    Raises:
        FwError: a file that cannot be read, no picture, one of another format, a giant, or one that
            is cut off or corrupt.

    >>> file = BytesIO()
    >>> Image.new("L", (3, 2), 7).save(file, "PNG")
    >>> decode(file.getvalue()).shape
    (2, 3, 3)
    >>> decode(file.getvalue()[:50])
    Traceback (most recent call last):
    ...
    fw.errors.FwError: bytes: expected a whole picture; image file is truncated
    """
    if channels not in MODES:
        raise FwError(f"channels: expected 1 (grey) or 3 (colours); got {channels}")
    if isinstance(source, np.ndarray):
        return _pixels(source, channels)
    image = _open(source)
    if image.mode == "F":
        raise FwError(f"{name(source)}: expected a picture of 8 or 16 bits; got floating point")
    with _named(source):
        if image.mode in _DEEP:
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert(MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_labels(source: Source) -> np.ndarray:
    """Read a map that says the class of every pixel of a picture, by its number.

    Args:
        source: as for `decode`; grey of 8 or 16 bits, or a palette, whose indices are the classes.

    Returns:
        int32 [H, W].

    Raises:
        FwError: as for `decode`, or the picture has colours, or is a JPEG, which does not keep
            numbers.

    >>> file = BytesIO()
    >>> Image.fromarray(np.array([[0, 3]], np.uint8)).save(file, "PNG")
    >>> decode_labels(file.getvalue())
    array([[0, 3]], dtype=int32)
    """
    if isinstance(source, np.ndarray):
        return _pixels(source, 1)[..., 0].astype(np.int32)
    image = _open(source)
    if image.format in _LOSSY:
        raise FwError(
            f"{name(source)}: expected a map of classes; got a JPEG, which does not keep numbers; "
            "save maps as PNG"
        )
    if image.mode not in ("1", "L", "P", *_DEEP):
        raise FwError(
            f"{name(source)}: expected a map of classes, grey or with a palette; got mode "
            f"{image.mode}"
        )
    return np.asarray(image).astype(np.int32)


def in_threads[S, T](work: Callable[[S], T], items: Sequence[S], threads: int = 0) -> Iterator[T]:
    """`map`, in order, in as many threads as the process has cores; few results wait at a time.

    >>> list(in_threads(abs, [-1, 2], threads=2))
    [1, 2]
    """
    threads = min(threads or THREADS, len(items))
    if threads < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for chunk in batched(items, 8 * threads):
            yield from pool.map(work, chunk)


def read_all[S, T](
    sources: Sequence[S],
    make: Callable[[S], T],
    *,
    on_bad: OnBadRow = None,
    most: float = BAD,
) -> Iterator[tuple[int, T]]:
    """Make something of every picture, in threads, and leave bad ones out.

    Args:
        sources: of the pictures.
        make: of each, say `decode`; what it refuses is bad.
        on_bad: gets the message of each picture left out; None raises instead.
        most: the share of all that may be left out; of a few pictures always one.

    Yields:
        its place in `sources` and what was made, in order.

    Raises:
        FwError: a bad picture, or more than may be.

    >>> bad = []
    >>> [at for at, _ in read_all([b"", np.zeros((2, 2), np.uint8)], decode, on_bad=bad.append)]
    [1]
    """

    def attempt(source: S) -> T | FwError:
        try:
            return make(source)
        except FwError as error:
            return error

    bad = 0
    for at, made in enumerate(in_threads(attempt, sources)):
        if not isinstance(made, FwError):
            yield at, made
            continue
        refuse(str(made), on_bad)
        bad += 1
        if bad > max(1, most * len(sources)):
            raise FwError(
                f"{made}; {bad} of the first {at + 1} pictures are bad, and {most:.0%} of "
                f"{len(sources)} may be: is this the right folder?"
            )


@dataclass(frozen=True, eq=False)
class Decoded:
    """Pictures of one size as an array that reads them when it is indexed.

    The first that are read stay in memory, as many as fit: every epoch has these, in whatever
    order, where a cache of the last ones read would have hardly any.

    Attributes:
        sources: R of them.
        make: of a source, uint8 of `size`.
        size: H, W, C.
        held: bytes that may stay in memory.

    >>> pictures = Decoded([np.full((2, 2), i, np.uint8) for i in range(9)], decode, (2, 2, 3))
    >>> pictures.shape, pictures[np.array([8, 0])][:, 0, 0, 0]
    ((9, 2, 2, 3), array([8, 0], dtype=uint8))
    """

    sources: Sequence[Source]
    make: Callable[[Source], np.ndarray]
    size: tuple[int, int, int]
    held: int = HELD
    _kept: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """R, H, W, C."""
        return (len(self.sources), *self.size)

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.sources)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Read some.

        Args:
            rows: a number, a slice, or integers [B].

        Returns:
            uint8 [H, W, C] of a number, else [B, H, W, C].

        Raises:
            FwError: a file that was good when the data set was read is no longer.
        """
        chosen = np.arange(len(self))[rows]
        if chosen.ndim == 0:
            return self._read(int(chosen))
        out = np.empty((len(chosen), *self.size), np.uint8)
        for at, pixels in enumerate(in_threads(self._read, chosen.tolist())):
            out[at] = pixels
        return out

    def _read(self, row: int) -> np.ndarray:
        if row in self._kept:
            return self._kept[row]
        pixels = self.make(self.sources[row])
        if pixels.shape != self.size or pixels.dtype != np.uint8:
            raise FwError(
                f"{name(self.sources[row])}: expected uint8 {self.size} of a picture; got "
                f"{pixels.dtype} {pixels.shape}"
            )
        with self._lock:
            if (len(self._kept) + 1) * pixels.nbytes <= self.held:
                self._kept[row] = pixels
        return pixels


def _open(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """A decoded picture in its file's mode and with its format, the right way up."""
    data = source if isinstance(source, bytes) else _read(Path(source))
    with _named(source):
        image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > PIXELS:
            raise _giant(source, f"{image.width} × {image.height}")
        upright = ImageOps.exif_transpose(image)  # which decodes it
    upright.format = image.format
    return upright


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a device or a pipe would be read for ever
            raise FwError(f"{path}: expected a picture; there is no such file")
        if path.stat().st_size > BYTES:
            raise FwError(f"{path}: expected at most {BYTES} bytes; it has more")
        return path.read_bytes()
    except OSError as error:
        raise FwError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Whatever Pillow raises of a file, names it."""
    try:
        yield
    except (FwError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise FwError(
            f"{name(source)}: expected a picture ({', '.join(FORMATS)}); it is none, or damaged"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _giant(source, "more") from error
    # Decoders meet corrupt bytes with OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise FwError(f"{name(source)}: expected a whole picture; {text}") from error


def _giant(source: Source, size: str) -> FwError:
    return FwError(f"{name(source)}: expected at most {PIXELS} pixels; its header says {size}")


def name(source: Source) -> str:
    """What a message calls it."""
    kind = "pixels" if isinstance(source, np.ndarray) else "bytes"
    return kind if isinstance(source, np.ndarray | bytes) else str(source)


def _pixels(array: np.ndarray, channels: int) -> np.ndarray:
    """Pixels with other channels; grey as Pillow computes it."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise FwError(
            f"pixels: expected uint8 [H, W] or [H, W, C]; got {array.dtype} {array.shape}"
        )
    array = array.reshape(*array.shape[:2], -1)
    if array.shape[2] not in MODES:
        raise FwError(f"pixels: expected 1 or 3 channels; got {array.shape[2]}")
    if array.shape[0] * array.shape[1] > PIXELS:
        raise FwError(f"pixels: expected at most {PIXELS} of them; got {array.shape}")
    if array.shape[2] == channels:
        return array
    if channels == 3:
        return np.repeat(array, 3, axis=2)
    return np.array(Image.fromarray(array).convert("L"))[..., None]
