"""Files that hold pictures as plain numbers: IDX, as MNIST and its like, and scikit-learn's digits.

What a header claims is held against the file's size before anything is allocated. `image_folders`
finds such files.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fw.data.records import Picture
from fw.errors import FwError

IDX = ("ubyte", "ubyte.gz", "idx", "idx.gz")
"""What the name of an IDX file ends in."""

DIGITS = "digits.csv.gz"
"""scikit-learn's table: 64 levels of 0 … 16 and the digit, a picture a line."""

_MOST = 1032  # deflate makes at most so much of a byte
_BYTES = 2**33  # of an array
_LINE = 1024  # characters of a table's line, which needs a quarter


def read_idx(path: str | Path) -> np.ndarray:
    """Read an array of bytes from an IDX file, compressed by gzip or not.

    Args:
        path: the file.

    Returns:
        uint8, of the file's shape.

    Raises:
        FwError: it cannot be read, is no IDX of bytes, or has more or fewer than it says.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    ...     read_idx(Path(folder, "a"))
    array([7, 9], dtype=uint8)

    Source: http://yann.lecun.com/exdb/mnist (the format's description).
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FwError(f"{path}: expected an IDX file; there is no such file")
        with path.open("rb") as raw:
            squeezed = raw.read(2) == b"\x1f\x8b"
        at_most = path.stat().st_size * (_MOST if squeezed else 1)
        with gzip.open(path) if squeezed else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise FwError(f"{path}: expected an IDX file of bytes; it begins with {magic!r}")
            sizes = file.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise FwError(f"{path}: expected {magic[3]} sizes; the file ends before")
            shape = struct.unpack(f">{magic[3]}I", sizes)
            total = math.prod(shape)
            if total > min(at_most, _BYTES):
                raise FwError(f"{path}: its header says {shape}, more than the file can hold")
            data = file.read(total)
            if len(data) < total or file.read(1):
                raise FwError(
                    f"{path}: expected {total} bytes, as its header says: {shape}; it has "
                    f"{'more' if len(data) == total else len(data)}"
                )
    except (OSError, EOFError, zlib.error) as error:
        raise FwError(f"{path}: cannot be read: {error}") from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_idx_pictures(images: str | Path, labels: str | Path) -> list[Picture]:
    """Read pictures and their classes from two IDX files.

    Args:
        images: bytes [R, H, W] or [R, H, W, C].
        labels: bytes [R].

    Raises:
        FwError: a file that `read_idx` refuses, or two that do not fit.
    """
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim not in (3, 4) or 0 in pixels.shape:
        raise FwError(f"{images}: expected pictures [R, H, W]; got {pixels.shape}")
    if classes.shape != pixels.shape[:1]:
        raise FwError(f"{labels}: expected {len(pixels)} labels; got {classes.shape}")
    return _pictures(images, pixels, classes)


def read_digits(path: str | Path) -> list[Picture]:
    """Read scikit-learn's digits, 8 × 8, their sixteen levels spread over 0 … 255.

    Raises:
        FwError: it cannot be read, or a line is not 64 levels and a digit.
    """
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = []
            for number, line in enumerate(iter(lambda: file.readline(_LINE), ""), 1):
                if len(line) == _LINE:
                    raise FwError(f"{path}:{number}: expected a line of under {_LINE} characters")
                cells = line.strip().split(",")
                if len(cells) != 65 or not all(c.isdigit() and len(c) < 4 for c in cells):
                    raise FwError(f"{path}:{number}: expected 64 levels and a digit")
                row = list(map(int, cells))
                if max(row[:64]) > 16 or row[64] > 9:
                    raise FwError(f"{path}:{number}: expected levels of 0 … 16 and a digit")
                rows.append(row)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise FwError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise FwError(f"{path}: expected at least one line; found none")
    table = np.array(rows)
    pixels = np.rint(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _pictures(path, pixels, table[:, 64])


def _pictures(
    path: str | Path, pixels: np.ndarray, classes: Sequence | np.ndarray
) -> list[Picture]:
    return [
        Picture(image, str(int(label)), f"{path}#{number}")
        for number, (image, label) in enumerate(zip(pixels, classes, strict=True), 1)
    ]
