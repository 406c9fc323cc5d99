"""Where in a leaf's statistics belongs what was seen of a part of it.

A layer that was cut out of a stack, or an iteration of a scan over it, sees one entry; experts that
a router picked see some; `assembled` makes one array of them all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from compress.follow import Loop, Parts
from compress.observed import Observed, Stats, scatter


@dataclass(frozen=True)
class Place:
    """Where statistics belong.

    Attributes:
        path, shape: of the leaf.
        depth: how many of its first axes are the stack.
        dims: parts of these that the statistics' leading axes run along.
        fixed: parts of which they are one entry: a number, or that of an iteration.
    """

    path: str
    shape: tuple[int, ...]
    depth: int
    dims: tuple[Parts, ...] = ()
    fixed: tuple[tuple[Parts, int | Loop], ...] = ()


Found = dict[Place, Observed]


def add(found: Found, place: Place, seen: Observed) -> None:
    """Add what was seen at a place to what was seen there before."""
    if place in found:
        agree(place.path, found[place], seen)
    found[place] = found[place] + seen if place in found else seen


def agree(path: str, a: Observed, b: Observed) -> None:
    """Refuse statistics, or their shapes, of one leaf in two uses.

    Raises:
        ValueError: they are of other axes, or of a dot and a convolution.
    """
    if (a.kind, a.axes) == (b.kind, b.axes):
        return
    raise ValueError(
        f"{path}: met in a {a.kind} over its axes {a.axes} and in a {b.kind} over its axes "
        f"{b.axes}, which have different channels; observe a function that uses it one way, or "
        "hold it as two leaves"
    )


def spread(seen: Observed, index: Any, size: int, axis: int = 0) -> Observed:
    """Entries along a leading axis, or a single one, at their places in all of it."""

    def change(a: jax.Array, name: str) -> jax.Array:
        return jnp.moveaxis(scatter(jnp.moveaxis(a, axis, 0), index, size, name), 0, axis)

    def one(a: jax.Array, name: str) -> jax.Array:
        return scatter(a, index, size, name)

    return seen.map(change if jnp.ndim(index) else one)


def size_of(parts: Parts) -> int:
    """How many entries they have."""
    return math.prod(part.size for part in parts)


def assembled(found: Found) -> Stats:
    """Each leaf's statistics, from those of all places where it was used."""
    paths: dict[str, list[tuple[Place, Observed]]] = {}
    for place, seen in found.items():
        paths.setdefault(place.path, []).append((place, seen))
    stats = {}
    for path, items in paths.items():
        for _, seen in items:
            agree(path, items[0][1], seen)
        depth = max(place.depth for place, _ in items)
        parts = [_whole(place, seen, depth) for place, seen in items]
        stats[path] = stacked(parts, items[0][0].shape[:depth])
    return stats


def _whole(place: Place, seen: Observed, depth: int) -> tuple[tuple[Any, ...], Observed]:
    """An index of the stack, and statistics with the leaf's own axes there."""
    index: list[Any] = [slice(None)] * depth
    dims = list(place.dims)
    for parts, at in place.fixed:
        if len(parts) == 1 and parts[0].size == place.shape[parts[0].axis]:
            index[parts[0].axis] = at
        else:
            seen = spread(seen, at, size_of(parts))
            dims.insert(0, parts)
    factors = [part for parts in dims for part in parts]
    order = sorted(range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].inner))
    kept = [n if a < place.depth else 1 for a, n in enumerate(place.shape[:depth])]
    kept = [n for n, i in zip(kept, index, strict=True) if isinstance(i, slice)]

    def change(a: jax.Array, _: str) -> jax.Array:
        rest = a.shape[len(dims) :]
        a = a.reshape(*(part.size for part in factors), *rest)
        a = jnp.transpose(a, (*order, *range(len(order), a.ndim)))
        return a.reshape(*kept, *rest)

    return tuple(index), seen.map(change)


def stacked(parts: Sequence[tuple[tuple[Any, ...], Observed]], shape: tuple[int, ...]) -> Observed:
    """Statistics of a whole stack from those of its entries.

    Args:
        parts: an index of the stack, ints and slices, and what was seen there; what broadcasts is
            the same for all entries.
        shape: of the stack.

    >>> from compress.observed import measure
    >>> seen = measure(jnp.ones((5, 3)), channels=1)
    >>> stacked([((0,), seen), ((2,), seen)], (3,)).rows
    Array([5., 0., 5.], dtype=float32)
    """
    _, first = parts[0]
    total = first.map(lambda a, _: jnp.zeros((*shape, *a.shape[first.rows.ndim :]), a.dtype))
    for index, seen in parts:

        def add(a: jax.Array, name: str, index=index, seen=seen) -> jax.Array:
            at = a.at[index]
            return (at.max if name == "absmax" else at.add)(getattr(seen, name))

        total = total.map(add)
    return total
