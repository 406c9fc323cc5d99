"""A transform maps a parameter tree to a smaller one and reports on every leaf it saw.

Leaves are addressed by path ("encoder/0/query/kernel") and chosen by glob rules: the first match
wins, and a rule that matches nothing is an error, so a misprint leaves nothing uncompressed in
silence. A transform is `leafwise` with the mathematics of one leaf (`compress.int8` is one), hence
a pure function `params -> (params, report)` whose output can be the next one's input.
"""

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.core import Tracer

from compress.arrays import is_compressed

KEEP = "keep"
"""The role of a leaf that no transform touches."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["error"],
    meta_fields=["path", "shape", "bytes_before", "bytes_after", "applied"],
)
@dataclass(frozen=True)
class Record:
    """What a transform did to one leaf; a pytree, so that `jit` and `eval_shape` can return it.

    Attributes:
        path: the leaf's path, its keys joined by "/".
        shape: shape of the array that the leaf stands for.
        bytes_before: size of the leaf that came in, in bytes.
        bytes_after: size of the leaf that went out, in bytes.
        applied: what was done, such as "int8 kernel", or "kept" and why.
        error: ‖w − w'‖ / ‖w‖ in the Frobenius norm, 0 for a kept leaf; a tracer under `jit`.
    """

    path: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    applied: str
    error: float | jax.Array


def match(pattern: str, path: str) -> bool:
    """Whether a path matches a glob: "**" is any number of keys, "*" and "?" stay within one.

    >>> match("**/kernel", "encoder/0/query/kernel"), match("**/kernel", "kernel")
    (True, True)
    >>> match("encoder/*/kernel", "encoder/0/query/kernel")
    False
    """
    return _match(pattern.split("/"), path.split("/"))


def _match(pattern: Sequence[str], keys: Sequence[str]) -> bool:
    if not pattern:
        return not keys
    if pattern[0] == "**":
        return _match(pattern[1:], keys) or (bool(keys) and _match(pattern, keys[1:]))
    return bool(keys) and fnmatchcase(keys[0], pattern[0]) and _match(pattern[1:], keys[1:])


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree with their paths, a compressed array being one leaf.

    Returns:
        Pairs (path, leaf) in the tree's order, and the tree's structure.

    >>> [path for path, _ in named_leaves({"layers": [{"kernel": 1.0}]})[0]]
    ['layers/0/kernel']
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in pairs], treedef


def leafwise(
    params: Any,
    select: Mapping[str, str],
    *,
    unfit: Mapping[str, Callable[[Any], str]],
    leaf_fn: Callable[[Any, str], tuple[Any, str, Any]],
) -> tuple[Any, tuple[Record, ...]]:
    """Transform the leaves that the rules select and report on all of them.

    Args:
        params: any pytree of arrays.
        select: glob pattern -> role, in order; the first pattern that matches a path decides. The
            role "keep" leaves a leaf alone, and so does matching no rule.
        unfit: role -> function of a leaf that says why the role cannot be applied to it, or "".
        leaf_fn: (leaf, role) -> (new leaf, what was applied, relative error).

    Returns:
        The new tree, and one record per leaf in the tree's order.

    Raises:
        ValueError: a rule names an unknown role or selects no leaf that its role fits; or the new
            leaf's error is not finite, because the leaf holds NaN or infinity.
    """
    for pattern, role in select.items():
        if role not in unfit and role != KEEP:
            raise ValueError(
                f"rule {pattern!r}: unknown role {role!r}; "
                f"expected one of {', '.join(map(repr, (*unfit, KEEP)))}"
            )
    leaves, treedef = named_leaves(params)
    rules = [next((p for p in select if match(p, path)), None) for path, _ in leaves]
    reasons = [
        _reason(leaf, select, rule, unfit) for rule, (_, leaf) in zip(rules, leaves, strict=True)
    ]
    for pattern, role in select.items():
        mine = [why for rule, why in zip(rules, reasons, strict=True) if rule == pattern]
        if (role == KEEP and mine) or "" in mine:
            continue
        raise ValueError(_nothing(pattern, role, [p for p, _ in leaves], mine))

    new_leaves, report = [], []
    for rule, why, (path, leaf) in zip(rules, reasons, leaves, strict=True):
        if rule is None or why:
            new, applied, error = leaf, f"kept: {why}", 0.0
        else:
            new, applied, error = leaf_fn(leaf, select[rule])
        if not isinstance(error, Tracer):
            error = float(error)
            if not math.isfinite(error):
                raise ValueError(f"{path}: holds NaN or infinity and cannot be compressed")
        new_leaves.append(new)
        report.append(Record(path, tuple(leaf.shape), _bytes(leaf), _bytes(new), applied, error))
    return jax.tree_util.tree_unflatten(treedef, new_leaves), tuple(report)


def _reason(
    leaf: Any, select: Mapping[str, str], rule: str | None, unfit: Mapping[str, Callable]
) -> str:
    if rule is None:
        return "no rule"
    if select[rule] == KEEP:
        return f"rule {rule!r}"
    return unfit[select[rule]](leaf)


def _nothing(pattern: str, role: str, paths: Sequence[str], mine: Sequence[str]) -> str:
    """The message for a rule that selected nothing."""
    if mine:
        why = f"matches {len(mine)} leaves, but none can be a {role!r}: {mine[0]}"
    elif any(match(pattern, path) for path in paths):
        why = "matches only leaves that an earlier rule takes; put it first or remove it"
    else:
        word = pattern.replace("**/", "").replace("*", "")
        near = difflib.get_close_matches(word, paths, n=3, cutoff=0.0)
        why = "matches no path; nearest are " + (", ".join(near) or "none: the tree is empty")
    return f"rule {pattern!r} {why}"


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree_util.tree_leaves(tree))
