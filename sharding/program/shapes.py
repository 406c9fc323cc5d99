"""The grammar that the lines of a compiled program share: shapes, brackets, commas and strings."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sharding.errors import ShardingError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_NUMBER = re.compile(r"[suf](\d+)(?:e\d+m\d+\w*)?")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[(\[{]|[)\]}]|,')
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Array:
    """The dtype and dimensions of one array on one device.

    >>> Array("bf16", (4, 8)).bytes
    64
    """

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The bytes of the elements, packed, without the padding of a layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            number = _NUMBER.fullmatch(self.dtype)
            if number is None:
                raise ShardingError(
                    f"HLO dtype {self.dtype!r} is unknown; add it to sharding.program.shapes._BITS"
                )
            bits = int(number[1])
        return (self.size * bits + 7) // 8


Shape = Array | tuple["Shape", ...]


def read_shape(text: str, line: int = 0) -> Shape:
    """Read a shape: layouts are left out.

    >>> read_shape("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/(s32[], u32[]{:S(2)}))")
    (Array(dtype='bf16', dims=(2, 3)), (Array(dtype='s32', dims=()), Array(dtype='u32', dims=())))
    """
    text = _COMMENT.sub("", text).strip()
    if text.startswith("("):
        return tuple(read_shape(part, line) for part in split(text[1:-1]))
    found = re.match(r"(\w+)\[((?:(?:<=)?\d+,?)*)\]", text)
    if found is None:
        raise ShardingError(f"HLO line {line}: cannot read the shape {text[:80]!r}")
    dims = found[2].replace("<=", "").split(",") if found[2] else []
    return Array(found[1], tuple(map(int, dims)))


def leaves(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, in order.

    >>> [array.dims for array in leaves(read_shape("((f32[2], f32[3]), f32[])"))]
    [(2,), (3,), ()]
    """
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


def close(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`; -1 if there is none."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
            if depth == 0:
                return token.end()
    return -1


def split(text: str) -> Iterator[str]:
    """The parts between commas that stand in no bracket and no string."""
    text = _COMMENT.sub("", text) if '"' not in text else text
    depth, start = 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif token[0] == "," and depth == 0:
            yield text[start : token.start()].strip()
            start = token.end()
    if text[start:].strip():
        yield text[start:].strip()


def unreadable(line: str, number: int) -> ShardingError:
    """The error for a piece of text on a line of the program."""
    return ShardingError(
        f"HLO line {number}: cannot read {line.strip()[:120]!r}; if this is what the compiler "
        f"printed, the reader in sharding.program.hlo has to learn it"
    )
