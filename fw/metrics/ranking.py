"""Where the right item stands in a ranking of the whole catalogue.

Not in a sample of it: sampled metrics may order models otherwise (Krichene & Rendle 2020,
doi:10.1145/3394486.3403226). A rank is counted, not sorted for: it is the number of items that
score above the right one, so it is known exactly however far down, and a catalogue that is cut over
a mesh adds up its parts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fw.metrics.accumulate import Mean, mean

TOP = (10,)
"""The k of HR@k and NDCG@k, if nothing else is said."""


def ranks(
    scores: jax.Array, target: jax.Array, seen: jax.Array, ranked: jax.Array | None = None
) -> jax.Array:
    """The place of each query's target among all items but those already seen, from 0.

    Of equal scores, the item with the lower number comes first, as in `jax.lax.top_k`; NaN comes
    last. The target itself may be among the seen: it is ranked all the same.

    Args:
        scores: [B, V]; inside a `sharding.scope` the items may be cut over the mesh.
        target: i32[B]; what is no item of the catalogue stands last, at their number.
        seen: i32[B, S], each at most once; -1 for none.
        ranked: bool [V], what is an item; None for all.

    Returns:
        i32[B].

    >>> scores = jnp.array([[0.9, 0.5, 0.7, 0.5]])
    >>> [int(ranks(scores, jnp.array([t]), jnp.array([[0, -1]]))[0]) for t in (2, 1, 3, 4)]
    [0, 1, 2, 4]
    """
    lowest = jnp.asarray(-jnp.inf, scores.dtype)
    item = jax.lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
    is_item = jnp.ones_like(item, jnp.bool_) if ranked is None else ranked[None]
    scores = jnp.where(is_item & ~jnp.isnan(scores), scores, lowest)
    own = is_item & (item == target[:, None])
    # A maximum of one: to gather along an axis that is cut would bring the whole of it.
    score = jnp.max(jnp.where(own, scores, lowest), axis=1, keepdims=True)

    def ahead(scores: jax.Array, item: jax.Array) -> jax.Array:
        number = target[:, None]
        first = (scores > score) | ((scores == score) & (item < number))
        return jnp.sum(first & (item >= 0) & (item != number), axis=1, dtype=jnp.int32)

    theirs = jnp.take_along_axis(scores, jnp.maximum(seen, 0), axis=1)
    before = ahead(scores, jnp.where(is_item, item, -1)) - ahead(theirs, seen)
    return jnp.where(jnp.any(own, axis=1), before, jnp.sum(is_item, dtype=jnp.int32))


def rank_means(ranks: jax.Array, counted: jax.Array, top: Sequence[int] = TOP) -> dict[str, Mean]:
    """Additive HR@k, NDCG@k and MRR of queries with one right item.

    HR@k = mean [rank < k], NDCG@k = mean [rank < k] / log₂(rank + 2), MRR = mean 1 / (rank + 1).

    Args:
        ranks: i32[B], from 0.
        counted: bool [B].
        top: each k.

    >>> from fw.metrics import mean_value
    >>> found = rank_means(jnp.array([0, 2, 99]), jnp.array([True, True, True]))
    >>> {name: round(mean_value(value), 4) for name, value in found.items()}
    {'hr@10': 0.6667, 'ndcg@10': 0.5, 'mrr': 0.4478}
    """
    place = ranks.astype(jnp.float32)
    found = {}
    for k in top:
        inside = (ranks < k).astype(jnp.float32)
        found[f"hr@{k}"] = mean(inside, counted)
        found[f"ndcg@{k}"] = mean(inside / jnp.log2(place + 2), counted)
    return {**found, "mrr": mean(1 / (place + 1), counted)}
