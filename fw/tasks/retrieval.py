"""The item that a user takes next, found among the whole catalogue.

Training contrasts each item with those of the other rows of the batch; evaluation ranks the target
among all items, whose vectors are computed once (`Task.index`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fw import metrics
from fw.data.vocabulary import NONE
from fw.errors import FwError
from fw.model import Batch
from fw.tasks.task import CATALOGUE, Summary, Task
from sharding import constrain

METRIC = "ndcg@10"


def sampled_softmax(outputs: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
    """-Σ log softmaxⱼ(u · vⱼ - log qⱼ)[own] over rows, and how many those are.

    The negatives of a row are the items of all others, of the whole batch on any mesh. A popular
    item is there more often than it should, which its probability q corrects (Yi et al. 2019,
    doi:10.1145/3298689.3346996); the row's own item, taken by another row, is none. With
    microbatches, they are those of a microbatch.

    Args:
      outputs: "user" u and "item" v, [B, D].
      batch: `target` i32[B], the item's place in the catalogue, -1 for an empty row; `log_q`
        f32[B].

    >>> outputs = {"user": jnp.eye(2), "item": jnp.eye(2)}
    >>> batch = {"target": jnp.array([3, 5]), "log_q": jnp.zeros(2)}
    >>> total, weight = sampled_softmax(outputs, batch)
    >>> f"{total:.4f} over {weight:.0f}"
    '0.6265 over 2'
    """
    user, target = outputs["user"], batch["target"]
    # Each device scores its own users with the items of all.
    items, theirs, log_q = (
        constrain(x, *[None] * x.ndim) for x in (outputs["item"], target, batch["log_q"])
    )
    # No policy of precision reaches what is outside of the model.
    logits = jnp.einsum("bd,cd->bc", user, items, precision=lax.Precision.HIGHEST)
    logits = logits - log_q.astype(user.dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
    same = (theirs == target[:, None]) | (theirs == NONE)
    hidden = jnp.asarray(jnp.finfo(logits.dtype).min, logits.dtype)
    logits = jnp.where(same & (row != column), hidden, logits)
    own = jnp.sum(user * outputs["item"], axis=1) - batch["log_q"].astype(user.dtype)
    counted = target != NONE
    losses = jax.nn.logsumexp(logits, axis=1) - own
    zero = jnp.zeros((), logits.dtype)
    return jnp.sum(jnp.where(counted, losses, zero)), jnp.sum(counted, dtype=logits.dtype)


def retrieval(labels: tuple[str, ...] = ()) -> Task:
    """The task; it has no labels.

    Raises:
      FwError: labels.
    """
    if labels:
        raise FwError(f"retrieval has no labels; got {', '.join(labels)}")

    def index(outputs: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        return {"item": outputs["item"], "ranked": batch["item"] != NONE}

    def count(outputs: dict[str, jax.Array], batch: Batch) -> dict[str, Any]:
        items, target = batch[CATALOGUE], batch["target"]
        # Each device scores all users of the batch with its own items.
        user = constrain(outputs["user"], None, None)
        scores = jnp.einsum("bd,vd->bv", user, items["item"], precision=lax.Precision.HIGHEST)
        scores = constrain(scores, None, "batch")
        ranks = metrics.ranks(scores, target, batch["seen"], items["ranked"])
        return metrics.rank_means(ranks, target != NONE)

    def summarise(counts: dict[str, Any]) -> Summary:
        figures = {name: metrics.mean_value(value) for name, value in counts.items()}
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        queries = float(counts["mrr"].weight)
        return Summary(METRIC, {**figures, "queries": queries}, f"{text}  queries {queries:.0f}")

    return Task("retrieval", labels, sampled_softmax, count, summarise, METRIC, index=index)
