"""A compressed tree as a flat dict of named plain arrays, and back, exactly.

The form every tensor file understands (safetensors, npz): a plain leaf keeps its path as name, a
compressed one becomes two tensors,

    encoder/query/kernel:int8:-2:float32    int8 values, the shared axis and the original dtype
    encoder/query/kernel:scale              float32 scales

so a file needs no side channel, and a reader needs only `values * expand_dims(scale, axis)`. What
comes back from a file is checked before it is used; nothing in it is ever executed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.arrays import Int8, is_compressed
from compress.transform import named_leaves

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that a compressed array may stand for."""


def to_arrays(tree: Any) -> dict[str, Any]:
    """Flatten a tree to named plain arrays.

    Args:
        tree: nested dicts (or any pytree) of arrays and `Int8`; no key may hold ":" or "/".

    Returns:
        Names as above to the arrays themselves, not copied, in the tree's order.

    Raises:
        ValueError: a key holds ":" or "/", so that its name could not be read back.

    >>> from compress import quantize
    >>> small, _ = quantize({"dense": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}})
    >>> list(to_arrays(small))
    ['dense/bias', 'dense/kernel:int8:-2:float32', 'dense/kernel:scale']
    """
    arrays: dict[str, Any] = {}
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    for (path, leaf), (name, _) in zip(pairs, named_leaves(tree)[0], strict=True):
        if ":" in name or name.count("/") != len(path) - 1:
            raise ValueError(f"{name!r}: a key holds ':' or '/'; rename it before saving")
        if is_compressed(leaf):
            arrays[f"{name}:int8:{leaf.axis}:{leaf.as_dtype}"] = leaf.values
            arrays[f"{name}:scale"] = leaf.scale
        else:
            arrays[name] = leaf
    return arrays


def from_arrays(arrays: Mapping[str, Any], like: Any = None) -> Any:
    """Rebuild the tree that `to_arrays` flattened.

    Args:
        arrays: names to arrays, on the host or on devices.
        like: a tree with the containers to fill, compressed or not (`jax.eval_shape` will do);
            without it, nested dicts with string keys.

    Returns:
        The tree. Every array is the one given, bit for bit.

    Raises:
        ValueError: a name is malformed, a scale or its values are missing, shapes or dtypes do not
            fit each other or `like`, or the paths are not those of `like`.

    >>> tree = {"layer": {"kernel": np.ones((2, 3), np.float32)}}
    >>> from_arrays(to_arrays(tree))["layer"]["kernel"].shape
    (2, 3)
    """
    leaves = _leaves(arrays)
    if like is None:
        return _nest(leaves)
    named, treedef = named_leaves(like)
    missing, extra = _difference([n for n, _ in named], leaves), _difference(leaves, dict(named))
    if missing or extra:
        raise ValueError(
            "the arrays do not fill the tree: "
            f"missing {missing or 'none'}, unknown {extra or 'none'}"
        )
    for name, want in named:
        got = leaves[name]
        if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            raise ValueError(
                f"{name}: expected {want.dtype}{list(want.shape)}, got {got.dtype}{list(got.shape)}"
            )
    return jax.tree_util.tree_unflatten(treedef, [leaves[name] for name, _ in named])


def _leaves(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Join values with their scales; path -> leaf."""
    scales = {n.removesuffix(":scale"): a for n, a in arrays.items() if n.endswith(":scale")}
    leaves: dict[str, Any] = {}
    for name, array in arrays.items():
        if name.endswith(":scale"):
            continue
        path, *form = name.split(":")
        if path in leaves:
            raise ValueError(f"{path}: given twice, the second time as {name!r}")
        leaves[path] = _int8(name, array, scales.pop(path, None)) if form else array
    if scales:
        raise ValueError(f"scales without values: {', '.join(sorted(scales))}")
    return leaves


def _int8(name: str, values: Any, scale: Any) -> Int8:
    path, kind, *form = name.split(":")
    if kind != "int8" or len(form) != 2 or form[0] not in ("-1", "-2") or form[1] not in DTYPES:
        raise ValueError(
            f"{name!r}: expected '<path>', '<path>:scale' or '<path>:int8:<-1 or -2>:<dtype>' "
            f"with a dtype of {', '.join(DTYPES)}"
        )
    if scale is None:
        raise ValueError(f"{name!r}: its scales '{path}:scale' are missing")
    axis = int(form[0])
    if values.ndim < 2 or values.dtype != np.int8 or scale.dtype != np.float32:
        raise ValueError(
            f"{path}: expected int8 values of two axes or more and float32 scales, got "
            f"{values.dtype}{list(values.shape)} and {scale.dtype}{list(scale.shape)}"
        )
    want = [n for i, n in enumerate(values.shape) if i != values.ndim + axis]
    if list(scale.shape) != want:
        raise ValueError(f"{path}: scales of shape {list(scale.shape)}, expected {want}")
    return Int8(values, scale, axis=axis, as_dtype=jnp.dtype(form[1]))


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {key!r} is an array and a container at once")
        if last in node:
            raise ValueError(f"{path}: is an array and a container at once")
        node[last] = leaf
    return tree


def _difference(names: Any, others: Mapping[str, Any]) -> list[str]:
    return [n for n in names if n not in others]
