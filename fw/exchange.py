"""Training steps whose gradients are averaged over `data` by `sharding.parallel.averages`.

    tx = with_exchange(tx, "int8", mesh)
    step = make_step(model, loss, tx, mesh=mesh, rules=rules)       # as with any other tx

Each part of the batch along `data` has gradients of its own, of which what an exchange keeps from
step to step is part of the optimiser's state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fw.errors import FwError
from fw.optimizer import state_shardings
from sharding import Rules, scope
from sharding.parallel.averages import WORKERS, Exchange, exchange, workers

APART = (
    "the model has state, such as a batch norm's averages, which is of the whole batch; an "
    "exchange of gradients has each worker's rows apart: train it with --exchange float32"
)


class WithExchange(NamedTuple):
    """An optimiser and how its gradients are averaged; `fw.step` takes it in place of optax's.

    Attributes:
      dense: of the averages.
      exchange: of the gradients.
      workers: how many average.
    """

    dense: optax.GradientTransformation
    exchange: Exchange
    workers: int

    def init(self, params: Any) -> dict[str, Any]:
        """The state of both: {"dense": optax's, "exchange": what was not sent yet}."""
        kept = self.exchange.init(params, self.workers)
        return {"dense": self.dense.init(params), "exchange": kept}

    def shardings(self, params: Any, where: Any, mesh: Mesh) -> dict[str, Any]:
        """Where that lies, from where the parameters do."""
        return {
            "dense": state_shardings(self.dense, params, where, mesh),
            "exchange": self.exchange.lie(params, where),
        }

    def gradients(
        self, fn: Callable[..., Any], given: Any, kept: Any, mesh: Mesh, rules: Rules, where: Any
    ) -> tuple[jax.Array, Any, Any, Any]:
        """The loss, the model's state, the average of gradients, and what is kept of them now.

        Args:
          fn: `(learnt, fixed, state, batch, key) -> (loss, weight, state, (gradients, _))`, of the
            mean loss over rows of the batch.
          given: its arguments, of the whole batch.
          kept: of the step before.
          mesh, rules: where activations go.
          where: shardings of the parameters.
        """
        learnt, fixed, state, batch, key = given
        parts = jax.tree.map(lambda x: split_rows(x, self.workers), dict(batch))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.workers))
        each = jax.vmap(fn, in_axes=(None, None, None, 0, 0), spmd_axis_name=WORKERS)
        own = rules.without(WORKERS)
        with scope(mesh, own, differentiate=True, mapped=(WORKERS,)):
            losses, weights, states, (grads, _) = each(learnt, fixed, state, parts, keys)
        # A worker's mean counts as much as its rows do.
        share = weights / jnp.maximum(jnp.sum(weights), jnp.ones((), weights.dtype))
        times = share * jnp.asarray(self.workers, share.dtype)
        grads = jax.tree.map(lambda g: g * times.reshape(-1, *[1] * (g.ndim - 1)), grads)
        average, kept = self.exchange(grads, kept, where)
        return jnp.sum(losses * share), states, average, kept


def with_exchange(tx: Any, name: str, mesh: Mesh) -> Any:
    """An optimiser whose gradients are averaged as a name says; `tx` itself for "float32".

    Args:
      tx: optax's.
      name: "float32", "int8" or "powersgd:RANK".
      mesh: whose axis `data` they are averaged over.

    Raises:
      FwError: the model has tables, whose rows are exchanged already.
      sharding.ShardingError: a name that says nothing.
    """
    if name == "float32":
        return tx
    how = exchange(name)
    if not isinstance(tx, optax.GradientTransformation):
        raise FwError(
            f"exchange {name!r}: the model has tables, of which a batch's rows travel and no "
            "others; leave it out (--exchange float32)"
        )
    return WithExchange(tx, how, workers(mesh))


def split_rows(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] → [count, B / count, ...], each worker's own rows, which lie there.

    Raises:
      FwError: a batch that workers do not divide.
    """
    if x.shape[0] % count:
        raise FwError(f"a batch of {x.shape[0]} rows does not divide into {count} workers")
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])
