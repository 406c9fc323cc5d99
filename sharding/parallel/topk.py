"""The best items of a whole catalogue for each query, exactly, where the items are.

Items that are cut by rows, as `tables` are, stay: queries go to all devices, each keeps the k best
of its own items, and the k best of those come back to who asked. Scores exist for some thousand
items at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding import context
from sharding.errors import ShardingError
from sharding.parallel.cuts import Cuts
from sharding.parallel.tables import BY_ROWS
from sharding.rules import Names, mesh_axes

CHUNK = 4096
"""Items of a device whose scores exist at a time."""


def top_k(
    queries: jax.Array,
    items: jax.Array,
    k: int,
    *,
    count: int | None = None,
    exclude: jax.Array | None = None,
    names: Names = BY_ROWS,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The k items with the largest query · item, best first; of equal ones the lower id.

    Each device gets the queries of all, B D, and the ids to leave out, and sends k scores and ids a
    query: k B (n - 1) / n each.

    Args:
        queries: [B, D], floating; products are computed in its dtype, not less.
        items: [N, D] of that dtype, item i in row i. One whose product is NaN is left out.
        k: how many, up to `count`.
        count: of the items; rows behind them are none. None for N.
        exclude: int32 [B, M], ids that a query is not given, such as what a user has seen;
            negative for none.
        names: the logical axes of items: cut by rows, over axes that cut the batch, or whole.
        chunk: items of a device whose scores exist at a time.

    Returns:
        scores [B, k] and ids int32 [B, k]; -inf and -1 where no item is left.

    Raises:
        ShardingError: shapes or dtypes that do not fit, or items cut otherwise.

    >>> items = jnp.array([[1.0], [3.0], [3.0], [2.0]])
    >>> scores, ids = top_k(jnp.array([[1.0], [-1.0]]), items, 2)
    >>> ids
    Array([[1, 2],
           [0, 3]], dtype=int32)
    >>> top_k(jnp.array([[1.0]]), items, 2, exclude=jnp.array([[2, -1]], jnp.int32))[1]
    Array([[1, 3]], dtype=int32)
    """
    count = items.shape[0] if count is None else count
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise ShardingError(
            f"top_k: expected queries [B, D] and items [N, D], got {queries.shape} and "
            f"{items.shape}"
        )
    if queries.dtype != items.dtype or not jnp.issubdtype(queries.dtype, jnp.floating):
        raise ShardingError(
            "top_k: expected queries and items of one floating dtype, got "
            f"{queries.dtype} and {items.dtype}; cast one of them"
        )
    if not 1 <= k <= count <= items.shape[0]:
        raise ShardingError(
            f"top_k: k={k} of {count} items in {items.shape[0]} rows; expected k from 1 to items, "
            "and not more of them than rows"
        )
    if exclude is None:
        exclude = jnp.full((queries.shape[0], 1), -1, jnp.int32)
    if exclude.ndim != 2 or exclude.shape[0] != queries.shape[0] or exclude.dtype != jnp.int32:
        raise ShardingError(
            f"top_k: expected ids to exclude int32 [{queries.shape[0]}, M], got "
            f"{exclude.dtype}{list(exclude.shape)}"
        )
    cuts = Cuts.current()
    if cuts is None:
        return _named(*_best(queries, items, exclude, k, 0, count, chunk))
    stored = cuts.stored(names, items.shape, "top_k: items")
    asked = cuts.flown(("batch", None), queries.shape, "top_k: queries")
    rows, columns, batch = map(mesh_axes, (*stored, asked[0]))
    if columns or {*rows} - {*batch}:
        raise ShardingError(
            f"top_k: the mesh cuts items {names} as {tuple(stored)}; they are cut by rows, over "
            f"axes that cut the batch ({batch}), or whole"
        )

    def body(queries, items, exclude):
        if not rows:
            return _named(*_best(queries, items, exclude, k, 0, count, chunk))
        queries, exclude = lax.all_gather((queries, exclude), rows, tiled=True)
        first = lax.axis_index(rows) * items.shape[0]
        best = _best(queries, items, exclude, k, first, count, chunk)
        # Of all devices in the order of their items: equal scores stay in the order of ids.
        scores, ids = (
            lax.all_to_all(x, rows, split_axis=0, concat_axis=1, tiled=True) for x in best
        )
        return _named(*_largest(scores, ids, k))

    where = PartitionSpec(asked[0], None)
    mapped = jax.shard_map(
        body,
        mesh=cuts.mesh,
        in_specs=(where, stored, where),
        out_specs=(where, where),
        axis_names={*cuts.mesh.axis_names, *context.mapped()},
        check_vma=False,
    )
    return mapped(queries, items, exclude)


def _best(queries, items, exclude, k: int, first, count: int, chunk: int):
    """Scores and ids [B, k] of the best of these items, which begin at id `first`."""
    size = items.shape[0]
    if size < chunk:  # products of one shape on every mesh, and so of the same bits
        items = jnp.pad(items, ((0, chunk - size), (0, 0)))
    block, number = items.shape[0], queries.shape[0]
    queries_of = lax.broadcasted_iota(jnp.int32, exclude.shape, 0)
    place = lax.broadcasted_iota(jnp.int32, (chunk,), 0)
    none = jnp.array(-jnp.inf, queries.dtype)

    def turn(r, best):
        start = jnp.minimum(r * chunk, block - chunk)  # the last chunk begins in the one before
        part = lax.dynamic_slice_in_dim(items, start, chunk)
        scores = jnp.matmul(queries, part.T, precision=lax.Precision.HIGHEST)
        id_ = first + start + place
        here = (start + place >= r * chunk) & (id_ < jnp.minimum(count, first + size))
        scores = jnp.where(here & ~jnp.isnan(scores), scores, none)
        out = exclude - first - start
        out = jnp.where((exclude >= 0) & (out >= 0), out, chunk)
        scores = scores.at[queries_of, out].set(none, mode="drop")
        ids = jnp.broadcast_to(id_, scores.shape)
        # What is best so far has lower ids, and comes first.
        scores = jnp.concatenate([best[0], scores], 1)
        return _largest(scores, jnp.concatenate([best[1], ids], 1), k)

    start = jnp.full((number, k), none), jnp.full((number, k), -1, jnp.int32)
    return lax.fori_loop(0, -(-block // chunk), turn, start)


def _largest(scores, ids, k: int):
    """The k largest of each row; of equal ones those that come first, as `lax.top_k` promises."""
    scores, place = lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, place, axis=1)


def _named(scores, ids):
    return scores, jnp.where(scores == -jnp.inf, -1, ids)
