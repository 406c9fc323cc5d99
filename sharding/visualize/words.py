"""Facts as short text: sizes, ranges of devices, and which words speak of a mesh axis."""

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby

Word = tuple[str, str | None]
"""A piece of text and the mesh axis it speaks of, for the colour."""

_DECADES = ("", "k", "M", "G", "T", "P")


def ranges(numbers: Iterable[int], *, dash: str = "-", longest: int | None = None) -> str:
    """Integers as text, runs of three or more as ranges.

    Args:
        numbers: in any order.
        dash: between the ends of a range.
        longest: from how many characters the middle gives way to "…" and the count.

    Returns:
        The text.

    >>> ranges([0, 1, 2, 3, 8, 10]), ranges([0, 2, 4, 6]), ranges(range(6), dash="..")
    ('0-3,8,10', '0,2,4,6', '0..5')
    >>> ranges(range(0, 256, 4), longest=16)
    '0,4,8,…,252 (64)'
    """
    ordered = sorted(numbers)
    parts: list[str] = []
    for _, group in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts += [f"{run[0]}{dash}{run[-1]}"] if len(run) > 2 else map(str, run)
    text = ",".join(parts)
    if longest is None or len(text) <= longest:
        return text
    tail = f",…,{parts[-1]} ({len(ordered)})"
    kept = [parts.pop(0)]
    while parts and len(",".join([*kept, parts[0]])) + len(tail) <= longest:
        kept.append(parts.pop(0))
    return ",".join(kept) + tail


def size(amount: float) -> str:
    """Bytes in decimal units.

    >>> size(22_900_000), size(999), size(12_340)
    ('22.9 MB', '999 B', '12.3 kB')
    """
    decade = 0
    while amount >= 999.5 and decade < len(_DECADES) - 1:
        amount, decade = amount / 1000, decade + 1
    return f"{amount:.3g} {_DECADES[decade]}B"


def said(words: Sequence[Word]) -> str:
    """Words as text.

    >>> said([("embed→", None), ("fsdp", "fsdp")])
    'embed→fsdp'
    """
    return "".join(text for text, _ in words)


def count(devices: int) -> str:
    """A number of devices.

    >>> count(1), count(8)
    ('1 device', '8 devices')
    """
    return f"{devices} device{'s' * (devices != 1)}"


def mesh_text(spec: str, devices: int) -> str:
    """A mesh by its spec, "" for none, and its devices.

    >>> mesh_text("data=2", 2)
    'mesh data=2: 2 devices'
    """
    return f"mesh {spec}: {count(devices)}" if spec else count(devices)


def joined(axes: Sequence[str], between: str, quote: str) -> list[Word]:
    """Mesh axes as words.

    >>> joined(("data", "fsdp"), "+", "")
    [('data', 'data'), ('+', None), ('fsdp', 'fsdp')]
    """
    words: list[Word] = []
    for axis in axes:
        words += [(between, None)] if words else []
        words.append((f"{quote}{axis}{quote}", axis))
    return words


def columns(text: str) -> int:
    """The columns that a terminal gives to a text: two for wide characters, none for marks.

    >>> columns("kernel"), columns("核")
    (6, 2)
    """
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
