"""The names of any model's axes: by its parameters' paths, or as the model itself tells them.

Everything in this package begins with a tuple of names a parameter. `names` makes that tree for
anybody's model: patterns over paths name what does not name itself; Flax's own metadata is read
where there is some. It never guesses, and it imports no Flax: boxes are known by what they offer.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from sharding.errors import ShardingError
from sharding.layout import check_rank, is_names
from sharding.rules import Names

Patterns = Mapping[str, Names | None] | Sequence[tuple[str, Names | None]]
"""Names by glob over paths; None for "never cut, whatever the rank"."""

# `axes` is what this house's models say; the others are Flax NNX's, the newest first.
_METADATA = ("axes", "out_sharding", "sharding_names", "sharding")
_SHOWN = 3  # leaves or patterns named in an error


def names(tree: Any, patterns: Patterns | None = None) -> Any:
    """The logical names of every axis of every parameter.

    A leaf's names are those of the first pattern that matches its path; if none does, those of
    the box around it: Flax linen's `Partitioned` and `LogicallyPartitioned`, or the metadata
    `axes`, `out_sharding` (once `sharding`) of an NNX `Variable`. A leaf with neither is an error.
    Scalars, random keys among them, have no axes and need nothing.

    A pattern is matched against whole paths, joined by "/" as `paths` does. A box does not count:
    a linen or NNX parameter's path ends at its own name.

    | in a pattern | stands for |
    | --- | --- |
    | `*`, `?` | any characters, one character, within a segment |
    | `**` | any characters, across segments; `**/kernel` is also `kernel` |
    | `{query,key}` | either |

    Equinox modules hold functions and flags beside their arrays. What is neither array nor number
    has no place on a device, and becomes None here, as `eqx.filter(model, eqx.is_array)` has it:
    name and shard what that returns.

    Args:
        tree: parameters, or their shapes: dicts, lists, dataclasses, linen variables, an NNX
            module or state, an Equinox module.
        patterns: names by pattern, first match wins. None instead of names: an axis of the
            array, however many it has, is never cut.

    Returns:
        A tree like `tree`, boxes included, with a tuple of names a leaf; for `shardings`.

    Raises:
        ShardingError: a leaf without names; a pattern that matches nothing, or only what earlier
            ones match; a number of names that is not the leaf's rank; anything but names.

    >>> import numpy as np
    >>> params = {"layers": [{"kernel": np.ones((4, 8)), "bias": np.ones(8)}], "steps": 0}
    >>> names(params, {"**/kernel": ("embed", "mlp"), "**/bias": ("mlp",)})
    {'layers': [{'bias': ('mlp',), 'kernel': ('embed', 'mlp')}], 'steps': ()}
    >>> names(params, {"**/kernel": ("embed", "mlp"), "**/bais": ("mlp",)})
    Traceback (most recent call last):
    ...
    sharding.errors.ShardingError: pattern '**/bais' matches no array: the nearest paths are ...
    """
    found = list(_leaves(tree))
    arrays = {path: leaf for path, leaf, _ in found if leaf is not None}
    by_pattern = _by_pattern(arrays, _checked(patterns))
    result: list[Names | None] = []
    nameless: list[str] = []
    for path, leaf, box in found:
        if leaf is None:
            result.append(None)
        elif path in by_pattern:
            result.append(by_pattern[path])
        elif (own := _own(box, path)) is not None or not leaf:
            result.append(own or ())
            check_rank(own or (), leaf, path)
        else:
            nameless.append(path)
    if nameless:
        raise ShardingError(_without_names(nameless, patterns))
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_is_empty), result)


def unboxed(tree: Any) -> Any:
    """The tree without Flax's boxes: each gives way to what is in it, untouched.

    Unlike `flax.linen.unbox`, it constrains nothing, so it takes a tree of names or of shardings
    as well as one of arrays.

    Args:
        tree: linen variables, or an NNX state; other trees come back as they are.

    Returns:
        The same tree of plain leaves.

    >>> unboxed({"kernel": 1})
    {'kernel': 1}
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_box)
    return structure.unflatten([_inside(leaf) if _is_box(leaf) else leaf for leaf in leaves])


def _is_box(node: Any) -> bool:
    """A linen box or an NNX variable, by what it offers."""
    variable = callable(getattr(node, "get_metadata", None))
    return variable or (hasattr(node, "names") and callable(getattr(node, "unbox", None)))


def _inside(box: Any) -> Any:
    children = jax.tree.leaves(box, is_leaf=lambda node: node is not box)
    return children[0] if len(children) == 1 else box


def _is_array(leaf: Any) -> bool:
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(
        leaf, int | float | complex
    )


def _is_empty(node: Any) -> bool:
    """A tuple without arrays: it would read as a tuple of names, `()` or `(None, None)`."""
    return type(node) is tuple and not any(map(_is_array, jax.tree.leaves(node)))


def _leaves(tree: Any) -> Iterator[tuple[str, tuple[int, ...] | None, Any]]:
    """Path, shape (None for what is no array) and box (None outside one) of every leaf."""

    def stop(node: Any) -> bool:
        return _is_box(node) or _is_empty(node)

    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        inside = [((), node)]
        if _is_box(node):
            inside = jax.tree_util.tree_leaves_with_path(node, is_leaf=_is_empty)
        for more, leaf in inside:
            # The first key inside a box is its attribute `value`, which is no part of the name.
            path = jax.tree_util.keystr((*keys, *more[1:]), simple=True, separator="/")
            shape = tuple(getattr(leaf, "shape", ())) if _is_array(leaf) else None
            yield path, shape, node if more else None


def _by_pattern(
    arrays: Mapping[str, tuple[int, ...]], patterns: Sequence[tuple[str, Names | None]]
) -> dict[str, Names]:
    """The names of the leaves that a pattern matches, every pattern checked to be of use."""
    found: dict[str, Names] = {}
    winners: dict[str, str] = {}
    for pattern, axes in patterns:
        regex = re.compile(_regex(pattern))
        # A scalar has no axes to name, so only a pattern without names may mean it.
        matched = [p for p, shape in arrays.items() if (shape or not axes) and regex.fullmatch(p)]
        if not matched:
            raise ShardingError(
                f"pattern {pattern!r} matches no array: the nearest paths are "
                f"{_nearest(pattern, arrays)}"
            )
        fresh = [path for path in matched if path not in found]
        if not fresh:
            before = sorted({winners[path] for path in matched})
            raise ShardingError(
                f"pattern {pattern!r} is never used: {', '.join(map(repr, before))} before it "
                f"{'match' if len(before) > 1 else 'matches'} all it would. Move it up, or remove "
                f"it"
            )
        for path in fresh:
            chosen = (None,) * len(arrays[path]) if axes is None else axes
            check_rank(chosen, arrays[path], f"{path} (pattern {pattern!r})")
            found[path], winners[path] = chosen, pattern
    return found


def _checked(patterns: Patterns | None) -> list[tuple[str, Names | None]]:
    if patterns is None:
        return []
    pairs = list(patterns.items()) if isinstance(patterns, Mapping) else list(patterns)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ShardingError(f"expected pairs of a pattern and its names, got {pair!r}")
        pattern, axes = pair
        if axes is not None and not is_names(axes):
            raise ShardingError(
                f"pattern {pattern!r}: expected a tuple of axis names, as ('embed', 'mlp'), or "
                f"None for axes that are never cut, got {axes!r}"
            )
    return pairs


_GLOB = {
    "**/": "(?:.*/)?",
    "**": ".*",
    "*": "[^/]*",
    "?": "[^/]",
    "{": "(?:",
    ",": "|",
    "}": ")",
}


def _regex(pattern: str) -> str:
    """The regular expression of a glob.

    >>> _regex("**/{query,key}/*")
    '(?:.*/)?(?:query|key)/[^/]*'
    """
    depth, parts = 0, []
    for token in re.findall(r"\*\*/|\*\*|.", pattern, re.DOTALL):
        depth += (token == "{") - (token == "}")
        if depth not in (0, 1):
            break
        literal = token == "," and not depth
        parts.append(re.escape(token) if literal else _GLOB.get(token, re.escape(token)))
    if depth:
        raise ShardingError(
            f"pattern {pattern!r}: its braces do not match, or nest; write {{a,b}} for a or b"
        )
    return "".join(parts)


def _own(box: Any, path: str) -> Names | None:
    """The names that a box gives; None if it gives none."""
    if box is None:
        return None
    if callable(getattr(box, "get_metadata", None)):
        metadata = box.get_metadata()
        key = next((key for key in _METADATA if metadata.get(key) is not None), None)
        given = metadata.get(key)
    else:
        key, given = "names", box.names
    if given is None:
        return None
    plain = tuple(given) if isinstance(given, list | tuple | PartitionSpec) else given
    if not is_names(plain):
        raise ShardingError(
            f"{path}: its metadata {key!r} is {given!r}; expected a tuple of axis names, as "
            f"('embed', 'mlp'), None for an axis that is never cut. Give a pattern instead"
        )
    return plain


def _without_names(nameless: Sequence[str], patterns: Patterns | None) -> str:
    more = f" (and {len(nameless) - 1} more)" if len(nameless) > 1 else ""
    if patterns:
        keys = [pattern for pattern, _ in _checked(patterns)]
        return (
            f"{nameless[0]}{more}: no pattern matches it, and it does not name its axes: the "
            f"nearest patterns are {_nearest(nameless[0], keys)}"
        )
    example = f"{{{'**/' + nameless[0].rpartition('/')[2]!r}: (…)}}"
    return (
        f"{nameless[0]}{more}: it does not name its axes; give patterns, as names(tree, {example})"
    )


def _nearest(text: str, known: Iterable[str]) -> str:
    """The few of `known` that are most like `text`."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(text, known, n=_SHOWN, cutoff=0)
    more = f" (of {len(known)})" if len(known) > len(close) else ""
    return (", ".join(map(repr, close)) or "none") + more
