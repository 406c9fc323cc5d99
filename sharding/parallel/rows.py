"""Rows of a matrix, moved to the experts that work on them, on one device.

Every move is a gather, and so is its derivative: `move` is told the way there and the way back, so
that autodiff has no need for a scatter. `grouped` brings the rows of each expert together in blocks
and computes only the blocks there are, not every expert on every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Fn = Callable[[Any, jax.Array], jax.Array]
"""One expert: `fn(its parameters, rows [n, in]) -> [n, out]`, each row for itself."""

Together = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""All experts: `fn(parameters [experts, ...], rows [n, in] in their order, how many each has)`."""


@dataclass(frozen=True)
class Expert:
    """One expert, and all of them at once for a platform that has products of uneven groups."""

    one: Fn
    together: Together

    def __call__(self, params: Any, rows: jax.Array) -> jax.Array:
        """As `one`."""
        return self.one(params, rows)


@jax.custom_vjp
def move(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """Move rows, each to at most as many places as it has copies.

    Args:
        x: [rows, size].
        there: int32 [places], for each place the copy that goes there; any number from
            rows · copies on for a place that stays empty. Copy c is of row c // copies.
        back: int32 [rows · copies], the inverse: for each copy its place, any number from
            `places` on if it goes nowhere.

    Returns:
        [places, size], zero in empty places.

    >>> x = jnp.array([[1.0], [2.0]])
    >>> move(x, jnp.array([1, 4, 2]), jnp.array([3, 0, 2, 3])).ravel()
    Array([1., 0., 2.], dtype=float32)
    """
    return _take(x, there // (back.shape[0] // x.shape[0]))


def _take(x, index):
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _move_bwd(saved, g):
    back, rows = saved
    return _take(g, back).reshape(rows.shape[0], -1, g.shape[-1]).sum(1), None, None


# An empty slice of x carries its number of rows: what is saved must be arrays.
move.defvjp(lambda x, there, back: (move(x, there, back), (back, x[:, :0])), _move_bwd)


def inverse(places: jax.Array, size: int) -> jax.Array:
    """Who goes to each place, from where each goes.

    Args:
        places: int32 [n], all different but those from `size` on, which are nowhere.
        size: the number of places.

    Returns:
        int32 [size], n for an empty place.

    >>> inverse(jnp.array([2, 9, 0]), 3)
    Array([2, 3, 0], dtype=int32)
    """
    n = places.shape[0]
    index = lax.broadcasted_iota(jnp.int32, (n,), 0)
    return jnp.full(size, n, jnp.int32).at[places].set(index, mode="drop")


def starts(ordered: jax.Array, number: int) -> jax.Array:
    """Where each value of 0 … number begins in an ascending array.

    >>> starts(jnp.array([0, 0, 2, 3]), 3)
    Array([0, 2, 2, 3], dtype=int32)
    """
    values = lax.broadcasted_iota(jnp.int32, (number + 1,), 0)
    # Not searchsorted: its loop of halvings takes longer than to compare all at once.
    return jnp.sum(ordered < values[:, None], 1, dtype=jnp.int32)


def sort(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ids in ascending order, and where each came from; equal ones keep their order.

    >>> [a.tolist() for a in sort(jnp.array([2, 0, 2, 1]))]
    [[0, 1, 2, 2], [1, 3, 0, 2]]
    """
    index = lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    ordered, source = lax.sort((ids, index), num_keys=1, is_stable=True)
    return ordered, source


def grouped(fn: Fn, params: Any, rows: jax.Array, ids: jax.Array) -> jax.Array:
    """Apply to each row the expert with its number.

    Rows are sorted by expert and cut into blocks of one expert each (as in MegaBlocks, Gale et al.
    2022, arXiv:2211.15841); the blocks are one batched product. A block holds half of what an
    expert gets on average, so about a quarter of it all is padding, and three times the experts'
    parameters are held for a while. `lax.ragged_dot` has neither, but on a CPU computes every
    expert on every row: an `Expert` says how to use it where it is fast. The backward pass keeps
    `rows` alone and calls `fn` again.

    Args:
        fn: one expert, or an `Expert`. It may not hold arrays that need gradients.
        params: a tree with leaves [experts, ...].
        rows: [n, in].
        ids: int32 [n], the expert of each row; the number of experts for none.

    Returns:
        [n, out], zero for a row without an expert.

    >>> fn = lambda scale, rows: rows * scale
    >>> grouped(fn, jnp.array([2.0, 3.0]), jnp.ones((4, 1)), jnp.array([1, 0, 2, 1])).ravel()
    Array([3., 2., 0., 3.], dtype=float32)
    """

    def forward(params, rows, ids):
        if isinstance(fn, Expert):
            return _in_order(fn.together, params, rows, ids)
        return _blockwise(fn, params, rows, ids)

    def backward(params, rows, ids, g):
        return jax.vjp(lambda params, rows: forward(params, rows, ids), params, rows)[1](g)

    once = _folded(forward, 0)
    call = jax.custom_vjp(once)
    call.defvjp(
        lambda *args: (once(*args), args),
        lambda saved, g: (*_folded(backward, 1)(*saved, g), None),
    )
    return call(params, rows, ids)


def _folded(half: Callable[..., Any], of_params: int) -> Callable[..., Any]:
    """`half(params, rows, ids, ...)`, which a `jax.vmap` calls once with all rows, not once each.

    Else experts that are picked for blocks would be held as often as there are microbatches.

    Args:
        half: returns an array of rows, or (like params, like rows) if `of_params`.
        of_params: how many of its results are like params.
    """
    call = custom_vmap(half)

    @call.def_vmap
    def _(size, batched, params, *rest):  # pyright: ignore[reportUnusedFunction]
        own = any(jax.tree.leaves(batched[0]))
        if own:  # experts of their own for each: [size, experts, ...] → [size · experts, ...]
            params = jax.tree.map(partial(_spread, size), batched[0], params)
            number = jax.tree.leaves(params)[0].shape[1]
            params = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), params)
        else:
            number = jax.tree.leaves(params)[0].shape[0]
        rows, ids, *g = map(partial(_spread, size), batched[1:], rest)
        if own:
            offset = number * lax.broadcasted_iota(jnp.int32, ids.shape, 0)
            ids = jnp.where(ids < number, ids + offset, number * size)
        out = _folded(half, of_params)(
            params, *(a.reshape(-1, *a.shape[2:]) for a in (rows, ids, *g))
        )
        if not of_params:
            return out.reshape(size, -1, *out.shape[1:]), True
        g_params, g_rows = out
        if own:
            g_params = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), g_params)
        # Where experts are shared, their gradient is the sum over all rows, and not mapped.
        mapped = (jax.tree.map(lambda _: own, g_params), True)
        return (g_params, g_rows.reshape(rows.shape)), mapped

    return call


def _spread(size: int, batched: bool, leaf: jax.Array) -> jax.Array:
    return leaf if batched else jnp.broadcast_to(leaf, (size, *leaf.shape))


def _in_order(together: Together, params: Any, rows: jax.Array, ids: jax.Array) -> jax.Array:
    n, number = rows.shape[0], jax.tree.leaves(params)[0].shape[0]
    ordered, source = sort(ids)
    # Rows without an expert stay away: they are in no group, and what becomes of these, and of
    # their gradients, is not said.
    there = jnp.where(ordered < number, source, n)
    back = inverse(there, n)
    out = together(params, move(rows, there, back), jnp.diff(starts(ordered, number)))
    return move(out, back, there)


def _blockwise(fn: Fn, params: Any, rows: jax.Array, ids: jax.Array) -> jax.Array:
    n, number = rows.shape[0], jax.tree.leaves(params)[0].shape[0]
    if number == 1:
        out = fn(jax.tree.map(lambda leaf: leaf[0], params), rows)
        return jnp.where((ids == 0)[:, None], out, jnp.zeros((), out.dtype))
    size = -(-n // (2 * number))
    size = size if size < 8 else -(-size // 8) * 8
    blocks = min(n, (n + number * (size - 1)) // size)
    ordered, source = sort(ids)
    first = starts(ordered, number)
    until = jnp.cumsum(-(-jnp.diff(first) // size), dtype=jnp.int32)  # in blocks
    index = lax.broadcasted_iota(jnp.int32, (n,), 0)
    which = jnp.sum(until <= index[:blocks, None], 1, dtype=jnp.int32)
    which = jnp.minimum(which, number - 1)  # blocks that nobody needs
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), until]) * size
    place = jnp.where(ordered < number, begin[ordered] + index - first[ordered], blocks * size)
    back = jnp.zeros(n, jnp.int32).at[source].set(place, unique_indices=True)
    there = inverse(back, blocks * size)
    picked = jax.tree.map(partial(jnp.take, indices=which, axis=0, indices_are_sorted=True), params)
    out = jax.vmap(fn)(picked, move(rows, there, back).reshape(blocks, size, -1))
    return move(out.reshape(blocks * size, -1), back, there)
