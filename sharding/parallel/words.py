"""The loss of a language model without its logits: [rows, vocabulary] never exists.

For a vocabulary of 128 thousand words, the logits of a batch are the largest array of a step by
far. Here a few hundred tokens at a time meet the table of words; what is kept of each is its loss.
The backward pass computes the logits of a chunk again (Chen et al. 2016, arXiv:1604.06174). A table
that is cut along its words stays where it is, as in Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053); one that is cut along `embed` is gathered once, not once a chunk.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.errors import ShardingError
from sharding.parallel.cuts import Cuts, vary, whole
from sharding.parallel.linear import ROWS
from sharding.rules import Names, mesh_axes

CHUNK = 512
"""Tokens of a device whose logits exist at a time."""


def word_losses(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    names: Names = ("vocab", "embed"),
    rows: Names = ROWS,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(x · tableᵀ + bias)[target] of every token, and whether the target was likeliest.

    Communication is written out on any mesh of a `scope`, for differentiation or not.

    Args:
        x: [B, L, D], floating.
        table: [V, D].
        targets: int [B, L], below V; negative for tokens that do not count.
        bias: [V], or None.
        names: the logical axes of the table.
        rows: those of B and L.
        chunk: tokens of a device whose logits exist at a time.

    Returns:
        losses [B, L] in the dtype of x, and hits, bool [B, L]: 0 and False for what does not count.

    Raises:
        ShardingError: shapes that do not fit, or that the mesh does not divide.

    >>> x, table = jnp.eye(3)[None], 2 * jnp.eye(3)
    >>> losses, hits = word_losses(x, table, jnp.array([[0, 1, -1]]))
    >>> hits, [f"{loss:.3f}" for loss in losses[0]]
    (Array([[ True,  True, False]], dtype=bool), ['0.240', '0.240', '0.000'])
    """
    if x.shape[:-1] != targets.shape or x.ndim != 3 or table.shape[1:] != x.shape[-1:]:
        raise ShardingError(
            f"word_losses: expected x [B, L, D], targets [B, L] and a table [V, D], got "
            f"{x.shape}, {targets.shape} and {table.shape}"
        )
    bias = jnp.zeros(table.shape[:1], x.dtype) if bias is None else bias
    cuts = Cuts.current()
    if cuts is None:
        return _losses(x, table, targets, bias, (), chunk)
    where_x = cuts.flown((*rows, names[1]), x.shape, "word_losses: x")
    where_t = cuts.flown(rows, targets.shape, "word_losses: targets")
    stored = cuts.stored(names, table.shape, "word_losses: table")
    where_b = cuts.stored(names[:1], bias.shape, "word_losses: bias")
    if mesh_axes(where_x[-1]):
        raise ShardingError(
            f"word_losses: the mesh cuts x along {names[1]!r}, which is summed over"
        )
    words = mesh_axes(stored[0])
    axes = cuts.of(where_x, stored)
    if not axes:
        return _losses(x, table, targets, bias, (), chunk)

    def body(x, table, targets, bias):
        x, table = _settled(vary(x, where_x, axes), vary(table, stored, axes))
        table = whole(table, mesh_axes(stored[1]), 1)
        bias = vary(bias, where_b, axes)
        return _losses(x, table, targets, bias, words, chunk)

    specs = (where_x, stored, where_t, where_b)
    mapped = cuts.shard_map(body, specs, (where_t, where_t), axes)
    return mapped(x, table, targets, bias)


@jax.custom_vjp
def _settled(x, table):
    """On the way back, the table's gradient is in parts before that of x goes on.

    Left alone, a TPU's compiler keeps the whole of it, and the whole table, until the last layer.
    """
    return x, table


_settled.defvjp(lambda x, table: ((x, table), None), lambda _, g: lax.optimization_barrier(g))


def _losses(x, table, targets, bias, words: tuple[str, ...], chunk: int):
    """The same on one device, whose table holds the words of one index along the axes `words`."""
    rows, length, size = x.shape
    count = rows * length
    chunk = min(chunk, max(count, 1))
    room = -count % chunk
    x = jnp.pad(x.reshape(count, size), ((0, room), (0, 0)))
    targets = jnp.pad(targets.reshape(count), (0, room), constant_values=-1)
    kernel = table.T  # once, for its dots are row-major then

    wide = np.promote_types(x.dtype, np.float32)

    def of_chunk(part):
        x, target = part
        logits = jnp.matmul(x, kernel, preferred_element_type=wide) + bias.astype(wide)
        top = jnp.max(lax.stop_gradient(logits), axis=-1)
        top = lax.pmax(top, words) if words else top
        total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        first = lax.axis_index(words) * len(bias) if words else 0
        mine = (target >= first) & (target < first + len(bias))
        place = jnp.where(mine, target - first, 0)
        zero = jnp.zeros((), logits.dtype)
        own = jnp.where(mine, jnp.take_along_axis(logits, place[:, None], -1)[:, 0], zero)
        if words:
            total, own = lax.psum((total, own), words)
        counted = target >= 0
        losses = jnp.where(counted, jnp.log(total) + top - own, zero)
        return losses, counted & (own >= top)

    parts = x.reshape(-1, chunk, size), targets.reshape(-1, chunk)
    losses, hits = lax.map(jax.checkpoint(of_chunk), parts)
    return tuple(y.reshape(-1)[:count].reshape(rows, length) for y in (losses, hits))
