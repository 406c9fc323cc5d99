"""Adapters apart from their base: taken off, put on, and several on one base.

An `Adapter` is what a `LoRA` leaf has beside its base; a mapping of them by path, with the leaves
that were trained whole, is all that training made. It is what goes into files, and one base serves
any number of them: `stack_adapters` lays them side by side, `choose` says which each row takes.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress.adapters import LoRA, Trained
from compress.arrays import Quantized, describe, is_compressed, sharding_of
from compress.transform import named_leaves


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "scaling", "magnitude"],
    meta_fields=["turned"],
)
@dataclass(frozen=True)
class Adapter:
    """A low-rank change of one kernel [*stack, in, out].

    Attributes:
        a: A [*stack, in, r].
        b: B [*stack, r, out].
        scaling: s, a number or float32 [*stack, 1, 1]; layers with 0 are not adapted, nor do they
            take m.
        magnitude: m, float32 [*stack, 1, out], or None.
        turned: the leaf is [*stack, out, in], such as a table of words that gives their scores.
    """

    a: jax.Array | np.ndarray
    b: jax.Array | np.ndarray
    scaling: jax.Array | np.ndarray | float = 1.0
    magnitude: jax.Array | np.ndarray | None = None
    turned: bool = False


Adapters = Mapping[str, Any]
"""By path an `Adapter`, or an array that takes the place of a leaf."""


def detach(params: Any) -> tuple[Any, dict[str, Any]]:
    """Take adapters off: the tree as it was before `lora`, and what training made.

    Args:
        params: with `LoRA` and `Trained` leaves, one adapter each.

    Returns:
        The base, in which leaves trained whole are as trained, for no others are there; and by path
        an `Adapter`, or the array of a leaf trained whole. `attach` puts them on again.

    Raises:
        ValueError: a leaf holds several adapters.

    >>> from compress.trainable import lora
    >>> params, _ = lora({"w": 2})({"w": jnp.eye(4)})
    >>> base, adapters = detach(params)
    >>> type(base["w"]).__name__, adapters["w"].a.shape
    ('ArrayImpl', (4, 2))
    """
    leaves, treedef = named_leaves(params)
    base, adapters = [], {}
    for path, leaf in leaves:
        if isinstance(leaf, LoRA):
            if leaf.adapters > 1:
                raise ValueError(
                    f"{path}: {describe(leaf)} holds {leaf.adapters} adapters, not one"
                )
            base.append(leaf.base)
            a, b, scaling = (leaf.kernel(x) for x in (leaf.a, leaf.b, leaf.scaling))
            magnitude = None if leaf.magnitude is None else leaf.kernel(leaf.magnitude)
            adapters[path] = Adapter(a, b, scaling, magnitude, turned=leaf.input > leaf.output)
        elif isinstance(leaf, Trained):
            base.append(leaf.array)
            adapters[path] = leaf.array
        else:
            base.append(leaf)
    return jax.tree.unflatten(treedef, base), adapters


def attach(base: Any, adapters: Adapters) -> Any:
    """Put adapters on a tree; the reverse of `detach`.

    Args:
        base: floats, or quantised below an `Adapter`; not adapted yet. Where a kernel lies on a
            mesh, its adapter is laid beside it.
        adapters: by path.

    Returns:
        The tree with `LoRA` and `Trained` leaves.

    Raises:
        ValueError: a path is not in the tree, an adapter does not fit its leaf, or the leaf is
            neither floats nor `Quantized`.

    >>> adapter = Adapter(jnp.ones((3, 1)), jnp.ones((1, 2)), 0.5)
    >>> attach({"w": jnp.zeros((3, 2))}, {"w": adapter})["w"].dense()[0]
    Array([0.5, 0.5], dtype=float32)
    """
    leaves, treedef = named_leaves(base)
    if strange := [path for path in adapters if path not in dict(leaves)]:
        raise ValueError(f"{strange[0]}: the adapter has it, but the tree has no such leaf")
    new = [_attached(path, leaf, adapters[path]) if path in adapters else leaf
           for path, leaf in leaves]  # fmt: skip
    return jax.tree.unflatten(treedef, new)


def _attached(path: str, leaf: Any, adapter: Any) -> Any:
    if isinstance(leaf, LoRA | Trained):
        raise ValueError(f"{path}: is adapted already; detach or merge it before")
    codes = is_compressed(leaf)
    if (codes and not isinstance(leaf, Quantized)) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        what = describe(leaf) if codes else f"{leaf.dtype}{list(leaf.shape)}"
        raise ValueError(f"{path}: is {what}; adapters go on floats, or on a Quantized array")
    where = sharding_of(leaf)
    shape = tuple(leaf.shape)
    if not isinstance(adapter, Adapter):
        if tuple(adapter.shape) != shape or codes:
            what = describe(leaf) if codes else f"an array of {list(shape)}"
            raise ValueError(f"{path}: {list(adapter.shape)} cannot take the place of {what}")
        array = jnp.asarray(adapter, leaf.dtype)
        return Trained(array if where is None else jax.device_put(array, where))
    *stack, n_in, n_out = shape if len(shape) > 1 else (0, 0)
    if adapter.turned:
        n_in, n_out = n_out, n_in
    rank = adapter.a.shape[-1]
    expected = {"a": (*stack, n_in, rank), "b": (*stack, rank, n_out)}
    if adapter.magnitude is not None:
        expected["magnitude"] = (*stack, 1, n_out)
    for name, want in expected.items():
        if (got := tuple(getattr(adapter, name).shape)) != want:
            raise ValueError(f"{path}: {name} of the adapter is {list(got)}, expected {list(want)}")
    scaling = jnp.broadcast_to(jnp.asarray(adapter.scaling, jnp.float32), (*stack, 1, 1))
    magnitude = None if adapter.magnitude is None else jnp.asarray(adapter.magnitude, jnp.float32)
    new = LoRA(leaf, jnp.asarray(adapter.a), jnp.asarray(adapter.b), scaling, magnitude)
    if adapter.turned:
        a, b, magnitude = (None if x is None else jnp.swapaxes(x, -1, -2)
                           for x in (new.a, new.b, magnitude))  # fmt: skip
        new = LoRA(leaf, a, b, scaling, magnitude, input=-1, output=-2)  # type: ignore[arg-type] # leaf is an array, checked above
    if where is None:
        return new
    return dataclasses.replace(jax.device_put(new, new.place(where)), base=leaf)


# --- several on one base ----------------------------------------------------------------------


def stack_adapters(trees: Sequence[Any]) -> Any:
    """One tree whose kernels hold the adapters of several, for batches in which rows choose.

    Ranks may differ (the smaller ones are filled up with zeros), and so may the adapted leaves. The
    scalings go into B. Magnitudes become m / n, once and for all.

    Args:
        trees: of one base, each with its adapter; number i becomes adapter i. Leaves that are not
            low-rank must be the same in all, for a plain array cannot be chosen by row.

    Returns:
        The tree; `choose` says what rows take.

    Raises:
        ValueError: there is no tree, or the trees have different bases.

    Source: many adapters on one base, https://arxiv.org/abs/2311.03285.

    >>> from compress.trainable import lora
    >>> a, b = (lora({"w": r}, seed=r)({"w": jnp.eye(4)})[0] for r in (1, 2))
    >>> stack_adapters([a, b])["w"].a.shape
    (4, 4)
    """
    if not trees:
        raise ValueError("stack_adapters: expected one tree or more, got none")
    columns = [named_leaves(tree)[0] for tree in trees]
    treedef = named_leaves(trees[0])[1]
    if any([p for p, _ in c] != [p for p, _ in columns[0]] for c in columns):
        raise ValueError("the trees have different paths; stack adapters of one base")
    new = []
    for row in zip(*columns, strict=True):
        path, leaves = row[0][0], [leaf for _, leaf in row]
        bases = [x.base if isinstance(x, LoRA) else x for x in leaves]
        if not all(_same(bases[0], base) for base in bases):
            raise ValueError(
                f"{path}: is not the same in all trees; only low-rank changes are chosen by row"
            )
        several = next((x for x in leaves if isinstance(x, LoRA) and x.adapters > 1), None)
        if several is not None:
            raise ValueError(f"{path}: {describe(several)} is stacked already")
        joined = len(leaves) > 1 and any(isinstance(x, LoRA) for x in leaves)
        new.append(_stacked(leaves) if joined else leaves[0])
    return jax.tree.unflatten(treedef, new)


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    (one, kind), (two, other) = jax.tree.flatten(x), jax.tree.flatten(y)
    return kind == other and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(jnp.array_equal(a, b)))
        for a, b in zip(one, two, strict=True)
    )


def _stacked(leaves: Sequence[Any]) -> LoRA:
    first = next(x for x in leaves if isinstance(x, LoRA))
    ranks, columns = first.output, first.input
    rank = max(x.a.shape[ranks] for x in leaves if isinstance(x, LoRA))
    magnitudes = any(isinstance(x, LoRA) and x.magnitude is not None for x in leaves)

    def side(x: Any, name: str, axis: int) -> jax.Array:
        if not isinstance(x, LoRA):
            return jnp.zeros_like(side(first, name, axis))
        array = x.a if name == "a" else x.scaled().astype(x.b.dtype)
        wide = [(0, 0)] * array.ndim
        wide[axis] = (0, rank - array.shape[axis])
        return jnp.pad(array, wide)

    def gain(x: Any) -> jax.Array:
        found = x.gain() if isinstance(x, LoRA) else None
        whole = list(first.shape)
        whole[columns] = 1
        return jnp.ones(whole, jnp.float32) if found is None else found

    new = dataclasses.replace(
        first,
        a=jnp.concatenate([side(x, "a", ranks) for x in leaves], ranks),
        b=jnp.concatenate([side(x, "b", columns) for x in leaves], columns),
        scaling=jnp.ones_like(first.scaling),
        magnitude=jnp.concatenate([gain(x) for x in leaves], columns) if magnitudes else None,
        ids=None,
        adapters=len(leaves),
    )
    where = sharding_of(first)
    if where is None:
        return new
    return dataclasses.replace(jax.device_put(new, new.place(where)), base=first.base)


def choose(params: Any, ids: Any) -> Any:
    """Say which adapter each row of a batch takes.

    A product with such a leaf takes the first axis of its activations that it does not sum over for
    that of rows, and fetches for each row A and B of its own.

    Args:
        params: as `stack_adapters` made it, or with one adapter.
        ids: int32 [batch], -1 for none: those rows meet the base alone. Traced ones that name no
            adapter give rows of NaN.

    Returns:
        The same tree with the choice in every `LoRA` leaf, for a function under `compress.apply`.

    Raises:
        ValueError: the tree has no `LoRA` leaf, ids are no such array, or name an adapter that is
            not there.

    >>> from compress import apply
    >>> from compress.trainable import lora
    >>> trees = [lora({"w": 1}, seed=seed)({"w": jnp.eye(2)})[0] for seed in range(3)]
    >>> params = choose(stack_adapters(trees), jnp.array([2, -1]))
    >>> apply(lambda p, x: x @ p["w"])(params, jnp.ones((2, 2))).shape
    (2, 2)
    """
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: expected integers of shape [batch], got {ids.dtype}{ids.shape}")
    leaves, treedef = named_leaves(params)
    counts = [leaf.adapters for _, leaf in leaves if isinstance(leaf, LoRA)]
    if not counts:
        raise ValueError("no leaf of the tree has adapters; compress.lora gives it some")
    if not isinstance(ids, Tracer) and bool(jnp.any((ids < -1) | (ids >= min(counts)))):
        raise ValueError(f"ids: expected numbers from -1 to {min(counts) - 1}, got {ids}")

    def chosen(leaf: Any) -> Any:
        if not isinstance(leaf, LoRA):
            return leaf
        shape = list(leaf.scaling.shape)
        shape[leaf.output] = ids.shape[0]
        along = ids.astype(jnp.int32).reshape((1, -1) if leaf.output == -1 else (-1, 1))
        return dataclasses.replace(leaf, ids=jnp.broadcast_to(along, shape))

    return jax.tree.unflatten(treedef, [chosen(leaf) for _, leaf in leaves])
