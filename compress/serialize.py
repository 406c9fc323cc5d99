"""A compressed tree as a flat dict of named plain arrays, and back, exactly.

The form every tensor file understands (safetensors, npz): a plain leaf keeps its path as name, a
quantised one becomes a tensor for each of its parts,

    encoder/query/kernel:int8:float32:activations=int8    codes, and what they stand for
    encoder/query/kernel:scale                            float32 scales

and one of parts, plain or quantised, each of them under a name of its own,

    encoder/query/kernel:factored.a                       A
    encoder/query/kernel:factored.b:int8:float32          codes of B
    encoder/query/kernel:factored.b:scale

    encoder/query/kernel:packed=2,4.values                what stays of 2 of 4
    encoder/query/kernel:packed=2,4.index                 where it was

so a file needs no side channel, and a reader needs only `codes * scale` or `A @ B`: parts have the
array's rank. What comes back from a file is checked before it is used;
nothing in it is ever executed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.arrays import PARTS, Quantized, describe, is_compressed
from compress.factored import Factored
from compress.formats import FLOAT, FORMATS
from compress.packed import Packed, bits_of
from compress.transform import named_leaves

FACTORED, PACKED = "factored", "packed"
"""The forms of arrays of parts other than codes and scales."""

BESIDE = PARTS[1:]
"""Parts that come with codes."""

PLAIN = {"values", "scale", "zero", "outer"}
"""Parts of codes that were not prepared for what meets them, nor saw it."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that a compressed array may stand for."""

LARGEST = 4096
"""Rows of a Hadamard matrix, at most: it is made when the array is first used."""

STATIC = ("activations", "pack", "hadamard")
"""Static fields that a name spells where they are not usual, in this order."""


def to_arrays(tree: Any) -> dict[str, Any]:
    """Flatten a tree to named plain arrays.

    Args:
        tree: nested dicts (or any pytree) of arrays, `Quantized`, `Factored` and
            `Packed`; no key may hold ":" or "/".

    Returns:
        Names as above to the arrays themselves, not copied, in the tree's order.

    Raises:
        ValueError: a key holds ":" or "/", so that its name could not be read back.
        TypeError: a compressed leaf of another class, which goes into files of its own.

    >>> from compress import quantize
    >>> small, _ = quantize()({"dense": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}})
    >>> list(to_arrays(small))
    ['dense/bias', 'dense/kernel:int8:float32:activations=int8', 'dense/kernel:scale']
    """
    arrays: dict[str, Any] = {}
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    for (path, leaf), (name, _) in zip(pairs, named_leaves(tree)[0], strict=True):
        if not path:
            raise ValueError("expected a tree with names, such as a dict, and got one array")
        if ":" in name or name.count("/") != len(path) - 1:
            raise ValueError(f"{name!r}: a key holds ':' or '/'; rename it before saving")
        if isinstance(leaf, Quantized):
            arrays |= _coded(name, leaf)
        elif isinstance(leaf, Factored | Packed) and (leaf.input, leaf.output) == (-2, -1):
            kinds = {str(getattr(leaf, part).dtype) for part in leaf.coded}
            if len(kinds) > 1 or not kinds <= {*DTYPES}:
                expected = f"expected one of {', '.join(DTYPES)}"
                raise TypeError(f"{name}: parts of {' and '.join(sorted(kinds))}; {expected}")
            for part, array in _parts(leaf).items():
                coded = isinstance(array, Quantized)
                arrays |= _coded(f"{name}:{part}", array) if coded else {f"{name}:{part}": array}
        elif is_compressed(leaf):
            raise TypeError(
                f"{name}: a {type(leaf).__name__} is no plain array; merge it, or save its own"
            )
        else:
            arrays[name] = leaf
    return arrays


def _coded(name: str, leaf: Quantized) -> dict[str, Any]:
    return {
        f"{name}:{_form(leaf) if part == 'values' else part}": array for part, array in leaf.parts()
    }


def _parts(leaf: Factored | Packed) -> dict[str, Any]:
    if isinstance(leaf, Factored):
        return {f"{FACTORED}.a": leaf.a, f"{FACTORED}.b": leaf.b}
    form = f"{PACKED}={leaf.group[0]},{leaf.group[1]}"
    return {f"{form}.values": leaf.values, f"{form}.index": leaf.index}


def _form(leaf: Quantized) -> str:
    words = [leaf.format, str(leaf.as_dtype)]
    if leaf.activations != FLOAT:
        words.append(f"activations={leaf.activations}")
    if leaf.pack is not None:
        words.append(f"pack={leaf.pack}")
    if leaf.hadamard is not None:
        words.append(f"hadamard={leaf.hadamard[0]},{leaf.hadamard[1]}")
    return ":".join(words)


def from_arrays(arrays: Mapping[str, Any], like: Any = None) -> Any:
    """Rebuild the tree that `to_arrays` flattened.

    Args:
        arrays: names to arrays, on the host or on devices.
        like: a tree with the containers to fill, compressed or not (`jax.eval_shape` will do);
            without it, nested dicts with string keys.

    Returns:
        The tree. Every array is the one given, bit for bit.

    Raises:
        ValueError: a name is malformed, a part or its values are missing, shapes or dtypes do not
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
    """Join arrays with their parts; path -> leaf."""
    whole: dict[str, Any] = {}
    parted: dict[str, dict[str, dict[str, Any]]] = {}
    for name, array in arrays.items():
        path, _, form = name.partition(":")
        kind, dot, part = form.partition(".")
        if dot and ":" not in kind:
            parted.setdefault(path, {}).setdefault(kind, {})[part] = array
        else:
            whole[name] = array
    leaves = _joined(whole)
    for path, kinds in parted.items():
        kind, parts = next(iter(kinds.items()))
        if path in leaves or len(kinds) > 1:
            raise ValueError(f"{path}: given twice, one time as '{path}:{kind}.…'")
        try:
            leaves[path] = _of_parts(kind, _joined(parts))
        except ValueError as error:
            raise ValueError(f"{path}:{kind}: {error}") from None
    return leaves


def _joined(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Join codes with their scales; path -> leaf."""
    parts: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        path, *form = name.split(":")
        if len(form) == 1 and form[0] in BESIDE:
            parts.setdefault(path, {})[form[0]] = array
    leaves: dict[str, Any] = {}
    for name, array in arrays.items():
        path, *form = name.split(":")
        if len(form) == 1 and form[0] in BESIDE:
            continue
        if path in leaves:
            raise ValueError(f"{path}: given twice, the second time as {name!r}")
        leaves[path] = _quantized(name, array, parts.pop(path, {})) if form else array
    if parts:
        raise ValueError(f"scales without values: {', '.join(sorted(parts))}")
    return leaves


def _of_parts(kind: str, parts: Mapping[str, Any]) -> Factored | Packed:
    word, _, group = kind.partition("=")
    numbers = group.split(",")
    if kind == FACTORED and set(parts) == {"a", "b"}:
        return _factored(**parts)
    if (
        word == PACKED
        and set(parts) == {"values", "index"}
        and len(numbers) == 2
        and all(map(_whole, numbers))
    ):
        return _packed((int(numbers[0]), int(numbers[1])), **parts)
    raise ValueError(
        f"parts {', '.join(sorted(parts))}: expected '<path>:{FACTORED}.a' and "
        f"'<path>:{FACTORED}.b', or '<path>:{PACKED}=N,M.values' and '<path>:{PACKED}=N,M.index'"
    )


def _factored(a: Any, b: Any) -> Factored:
    ndim = a.ndim
    fits = ndim >= 2 and b.ndim == ndim and a.shape[-1] == b.shape[-2] and all(a.shape + b.shape)
    one = fits and [m in (1, n) for n, m in zip(a.shape[:-2], b.shape[:-2], strict=True)]
    if not fits or not all(one or ()) or str(a.dtype) not in DTYPES or a.dtype != b.dtype:
        raise ValueError(
            f"factors {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}: expected "
            f"[..., in, r] and [..., r, out] of one dtype of {', '.join(DTYPES)}"
        )
    return Factored(a, b)


def _packed(group: tuple[int, int], values: Any, index: Any) -> Packed:
    (n, m), ndim = group, values.ndim
    per = 8 // bits_of(m)
    fits = 0 < n < m <= 256 and ndim >= 2 and index.ndim == ndim and all(values.shape)
    if fits:
        wanted = (*values.shape[:-2], values.shape[-2] // per, values.shape[-1])
        fits = values.shape[-2] % n == 0 and values.shape[-2] % per == 0 and index.shape == wanted
    if not fits or str(values.dtype) not in DTYPES or str(index.dtype) != "uint8":
        raise ValueError(
            f"{values.dtype}{list(values.shape)} with places {index.dtype}{list(index.shape)}: "
            f"expected {n} of {m} of one of {', '.join(DTYPES)}, and uint8 of {per} places each"
        )
    prepared = isinstance(values, Quantized) and (
        values.hadamard or {name for name, _ in values.parts()} - PLAIN
    )
    if prepared:
        raise ValueError(f"{describe(values)}: expected codes with scales, and nothing else")
    return Packed(values, index, group)


def _quantized(name: str, values: Any, parts: Mapping[str, Any]) -> Quantized:
    path, *form = name.split(":")
    static = _static(name, form)
    kind, ndim = static["format"], values.ndim
    want = values.dtype if kind == FLOAT else _stored(kind)
    if ndim < 2 or values.dtype != want or (kind == FLOAT and str(values.dtype) not in DTYPES):
        raise ValueError(
            f"{path}: expected {want} values of two axes or more, got "
            f"{values.dtype}{list(values.shape)}"
        )
    for axis in (static["pack"], (static["hadamard"] or (None,))[0]):
        if axis is not None and not -ndim <= axis < 0:
            raise ValueError(f"{name!r}: axis {axis} of {ndim}")
    if (kind == FLOAT) == ("scale" in parts) or (
        kind == FLOAT and len(parts) == 0 and not static["hadamard"]
    ):
        raise ValueError(f"{name!r}: its scales '{path}:scale' are missing or not wanted")
    if (static["pack"] is not None) != (kind != FLOAT and FORMATS[kind].bits == 4):
        raise ValueError(f"{name!r}: codes of 4 bits are packed along an axis, others are not")
    if static["activations"] not in (FLOAT, FLOAT if kind == FLOAT else FORMATS[kind].activations):
        raise ValueError(f"{name!r}: {kind} has no activations in {static['activations']}")
    array = Quantized(values, **parts, **static)
    shape = array.shape
    axis, block = static["hadamard"] or (0, 1)
    if not 1 <= block <= LARGEST or block & (block - 1) or shape[axis] % block or not all(shape):
        raise ValueError(f"{name!r}: blocks of {block} do not divide {list(shape)}")
    for part, x in parts.items():
        dtype = _scale_dtype(kind) if part == "scale" else np.dtype("float32")
        if x.dtype != dtype or not _fits(part, x.shape, array):
            raise ValueError(
                f"{path}: {part} {x.dtype}{list(x.shape)}: expected {dtype}, of the values' rank, "
                f"and parts of {list(shape)} as {part} has them"
            )
    return array


def _fits(part: str, sizes: tuple[int, ...], array: Quantized) -> bool:
    """Whether the shape of a part is one that the transforms make."""
    shape = array.shape
    if len(sizes) != len(shape) or not all(
        s and n % s == 0 for s, n in zip(sizes, shape, strict=True)
    ):
        return False
    whole = all(s in (1, n) for s, n in zip(sizes, shape, strict=True))
    if part == "scale":
        # Of two codes in a byte, both are of one group.
        packed = array.pack
        return packed is None or sizes[packed] == 1 or shape[packed] // sizes[packed] % 2 == 0
    if part == "zero":
        integer = array.format != FLOAT and FORMATS[array.format].integer
        return integer and array.scale is not None and sizes == tuple(array.scale.shape)
    return whole


def _stored(kind: str) -> Any:
    row = FORMATS[kind]
    return jnp.dtype("uint8" if row.bits == 4 else row.storage)


def _scale_dtype(kind: str) -> Any:
    scales = FORMATS[kind].scales if kind != FLOAT else "float32"
    return jnp.dtype({"e8m0": "uint8", "e4m3": "float8_e4m3fn"}.get(scales, scales))


def _static(name: str, form: list[str]) -> dict[str, Any]:
    """The static fields that a name spells."""
    expected = (
        f"{name!r}: expected '<path>', '<path>:<part>' with a part of {', '.join(BESIDE)}, or "
        f"'<path>:<format>:<dtype>' and fields of {', '.join(STATIC)}, with a format of "
        f"{', '.join((*FORMATS, FLOAT))} and a dtype of {', '.join(DTYPES)}"
    )
    kinds = form[:2]
    if len(kinds) != 2 or kinds[0] not in (*FORMATS, FLOAT) or kinds[1] not in DTYPES:
        raise ValueError(expected)
    fields = dict.fromkeys(STATIC) | {"activations": FLOAT}
    for word in form[2:]:
        key, _, value = word.partition("=")
        numbers = value.split(",")
        if key == "activations" and value in ("int8", "e4m3"):
            fields[key] = value
        elif key == "pack" and _whole(value):
            fields[key] = int(value)
        elif key == "hadamard" and len(numbers) == 2 and all(map(_whole, numbers)):
            fields[key] = (int(numbers[0]), int(numbers[1]))
        else:
            raise ValueError(expected)
    return {"format": kinds[0], "as_dtype": jnp.dtype(kinds[1]), **fields}


def _whole(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 10


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
