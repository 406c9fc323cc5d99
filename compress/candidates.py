"""What a search is over: candidates for each of the leaves that rules match.

Figures of leaves and candidates are tables, which are data, with None where a candidate does not
fit a leaf. `compress.sensitivity` and `compress.measure` fill them, `compress.search` reads them.
"""

import dataclasses
import difflib
import glob
from collections.abc import Mapping, Sequence
from typing import Any

from compress.arrays import Quantized
from compress.nearest import Quantize
from compress.scheme import Scheme, as_scheme
from compress.transform import KEEP, match, plain

Candidates = Mapping[str, Any] | Sequence[Any]
"""Name -> scheme, its format's name or "keep"; a sequence is named by what it holds."""

Pairs = tuple[tuple[str, Any], ...]
"""(name, scheme or "keep")."""

Figures = tuple[tuple[float | None, ...], ...]
"""[leaf][candidate], None where the candidate does not fit the leaf."""


def as_candidates(candidates: Candidates) -> Pairs:
    """Pairs of name and scheme, checked.

    Raises:
        ValueError: there are none, two have one name, or one's scheme is none.

    >>> [name for name, _ in as_candidates(["int8", Scheme("int4", per=64), "keep"])]
    ['int8', 'int4 per 64', 'keep']
    """
    if isinstance(candidates, str | Scheme):
        candidates = [candidates]
    named = isinstance(candidates, Mapping)
    found = []
    for name, option in candidates.items() if named else ((str(c), c) for c in candidates):
        try:
            found.append((name, option if option == KEEP else as_scheme(option)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"candidate {name!r}: {error}") from None
    if not found:
        raise ValueError("no candidates: give one scheme at least, such as {'int8': 'int8'}")
    names = [name for name, _ in found]
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise ValueError(f"candidate {twice[0]!r} is there twice; give it another name")
    return tuple(found)


def matched(leaves: Sequence[tuple[str, Any]], rules: str | Sequence[str]) -> list[int]:
    """Which of the leaves match one of the patterns, in the tree's order.

    Raises:
        ValueError: a pattern matches none.

    >>> matched([("a/kernel", 0), ("a/bias", 0), ("b/kernel", 0)], "**/kernel")
    [0, 2]
    """
    patterns = [rules] if isinstance(rules, str) else list(rules)
    paths = [path for path, _ in leaves]
    for pattern in patterns:
        if not any(match(pattern, path) for path in paths):
            word = pattern.replace("**/", "").replace("*", "")
            near = difflib.get_close_matches(word, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"rule {pattern!r} matches no path; nearest are "
                f"{', '.join(near) or 'none: the tree is empty'}"
            )
    if not patterns:
        raise ValueError("no rules: give one pattern of paths at least, such as '**/kernel'")
    return [i for i, path in enumerate(paths) if any(match(p, path) for p in patterns)]


def fitting(leaves: Sequence[tuple[str, Any]], candidates: Pairs) -> list[list[bool]]:
    """Whether a candidate fits, for each leaf and candidate.

    Raises:
        ValueError: a candidate fits no leaf, or a leaf has no candidate that fits.
    """
    why = [[_unfit(path, leaf, option) for _, option in candidates] for path, leaf in leaves]
    for (name, _), reasons in zip(candidates, zip(*why, strict=True), strict=True):
        if all(reasons):
            raise ValueError(f"candidate {name!r} fits no leaf: {leaves[0][0]}: {reasons[0]}")
    for (path, _), reasons in zip(leaves, why, strict=True):
        if all(reasons):
            raise ValueError(
                f"{path}: no candidate fits: {candidates[0][0]}: {reasons[0]}; leave it out of the "
                "rules, or add 'keep' to the candidates"
            )
    return [[not reason for reason in reasons] for reasons in why]


def _unfit(path: str, leaf: Any, option: Any) -> str:
    if option == KEEP:
        return ""
    one = _alone(option)
    return one.unfit(leaf, one.resolve(path, leaf, option))


def _alone(scheme: Scheme) -> Quantize:
    """A transform of whatever leaf: the same for all, so that it is compiled once."""
    return Quantize((("**", scheme),))


def compressed(path: str, leaf: Any, scheme: Scheme, stats: Mapping[str, Any] | None) -> Quantized:
    """One leaf by one candidate, as `compress.quantize` has it.

    Raises:
        ValueError: it holds NaN, or its candidate needs statistics that are not there.

    >>> import jax.numpy as jnp
    >>> compressed("dense/kernel", jnp.eye(2), Scheme("int8"), None).values.dtype.name
    'int8'
    """
    tree = leaf
    for key in reversed(path.split("/")):
        tree = {key: tree}
    tree, _ = _alone(scheme)(tree, stats)
    for key in path.split("/"):
        tree = tree[key]
    return tree


def exactly(path: str) -> str:
    """The pattern that matches this path alone.

    >>> match(exactly("blocks[0]/*"), "blocks[0]/*"), match(exactly("a*"), "ab")
    (True, False)
    """
    return glob.escape(path)


def fields_of(value: Any) -> dict[str, Any]:
    """A table as JSON has it."""
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    pairs = [[name, plain(option)] for name, option in value.candidates]
    return {**{name: _lists(field) for name, field in fields.items()}, "candidates": pairs}


def of_fields[T](kind: type[T], fields: Mapping[str, Any]) -> T:
    """The table of such fields."""
    made = {name: _tuples(field) for name, field in fields.items()}
    return kind(**{**made, "candidates": as_candidates(dict(fields["candidates"]))})


def _lists(x: Any) -> Any:
    return [_lists(y) for y in x] if isinstance(x, tuple) else x


def _tuples(x: Any) -> Any:
    return tuple(_tuples(y) for y in x) if isinstance(x, list | tuple) else x


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right.

    >>> print(table(["leaf", "bytes"], [["a/kernel", "64"]]))
    leaf      bytes
    a/kernel     64
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
        for cells in lines
    )
