"""Optimisers of embedding tables: each changes the rows that a batch has, and reads no others.

A dense optimiser has moments to decay and weights to decay for every row in every step; these leave
the rows of absent ids, and what they remember of them, as they are. `with_tables` puts one beside
optax's for the other parameters; `fw.step` applies both. Tables have no weight decay, and their
gradients are not clipped: only those of the other parameters are, by their own norm.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fw.errors import FwError
from fw.exchange import WithExchange
from fw.model import Model
from fw.optimizer import AdamW, learning_rate, state_shardings
from sharding.parallel.tables import row_mean

type Rate = float | Callable[[Any], Any]
"""A learning rate, or one by step, from 0."""


class RowOptimizer(NamedTuple):
    """An optimiser of rows, each for itself.

    Attributes:
      init: `init(table [count, size]) -> state`, a dict of arrays [count] or [count, size].
      update: `update(rows [n, size], their state, gradients [n, size], step) -> (rows, state)`.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rowwise_adagrad(rate: Rate, *, epsilon: float = 1e-8) -> RowOptimizer:
    """Adagrad with one accumulator a row (Naumov et al. 2019, arXiv:1906.00091; as in FBGEMM).

    a ← a + mean(g²), w ← w - rate · g / (√a + ε).

    Args:
      rate: the learning rate.
      epsilon: ε.

    >>> adagrad = rowwise_adagrad(0.1)
    >>> row = jnp.ones((1, 2))
    >>> adagrad.update(row, adagrad.init(row), jnp.array([[3.0, 4.0]]), 0)[1]["sum"]
    Array([12.5], dtype=float32)
    """

    def update(rows, state, grads, step):
        total = state["sum"] + row_mean(jnp.square(grads))
        factor = _at(rate, step, rows.dtype) / (jnp.sqrt(total) + epsilon)
        return rows - factor[:, None] * grads, {"sum": total}

    return RowOptimizer(lambda table: {"sum": jnp.zeros(table.shape[:1], table.dtype)}, update)


def lazy_adam(
    rate: Rate, *, b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8
) -> RowOptimizer:
    """Adam (arXiv:1412.6980) whose moments of a row decay only when a batch has it.

    As TensorFlow's LazyAdam: m ← b₁m + (1 - b₁)g, v ← b₂v + (1 - b₂)g², with the steps of the whole
    run, t, w ← w - rate · m̂ / (√v̂ + ε), m̂ = m / (1 - b₁ᵗ), v̂ = v / (1 - b₂ᵗ).

    Args:
      rate: the learning rate.
      b1, b2: what a moment keeps.
      epsilon: ε.
    """

    def update(rows, state, grads, step):
        mean = b1 * state["mean"] + (1 - b1) * grads
        square = b2 * state["square"] + (1 - b2) * jnp.square(grads)
        t = jnp.asarray(step + 1, rows.dtype)
        scale = jnp.sqrt(square / _one_less(b2, t)) + epsilon
        rows = rows - _at(rate, step, rows.dtype) * (mean / _one_less(b1, t)) / scale
        return rows, {"mean": mean, "square": square}

    return RowOptimizer(lambda t: {"mean": jnp.zeros_like(t), "square": jnp.zeros_like(t)}, update)


def _one_less(b: float, t: jax.Array) -> jax.Array:
    """1 - bᵗ. In float32 the first 1 - 0.999 would have an error of 5e-5."""
    return -jnp.expm1(t * (math.log(b) if b else -math.inf))


def sgd(rate: Rate) -> RowOptimizer:
    """w ← w - rate · g.

    Args:
      rate: the learning rate.
    """

    def update(rows, state, grads, step):
        return rows - _at(rate, step, rows.dtype) * grads, state

    return RowOptimizer(lambda _: {}, update)


def _at(rate: Rate, step: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(rate(step) if callable(rate) else rate, dtype)


BY_NAME: Mapping[str, Callable[..., RowOptimizer]] = {
    "rowwise_adagrad": rowwise_adagrad,
    "lazy_adam": lazy_adam,
    "sgd": sgd,
}


@dataclass(frozen=True)
class TableOptions:
    """The options of a run that has tables.

    Attributes:
      table_optimizer: rowwise_adagrad (one number a row is remembered), lazy_adam (two for each
        number) or sgd.
      table_learning_rate: at its peak; it rises and falls as that of the other parameters.
    """

    table_optimizer: str = "rowwise_adagrad"
    table_learning_rate: float = 0.05

    def __post_init__(self):
        """Checks them."""
        if self.table_optimizer not in BY_NAME:
            known = ", ".join(BY_NAME)
            raise FwError(
                f"table_optimizer {self.table_optimizer!r} is unknown; choose one of {known}"
            )
        if not self.table_learning_rate >= 0:
            raise FwError(f"table_learning_rate is {self.table_learning_rate}; expected 0 or more")


def row_optimizer(options: TableOptions, config: AdamW, steps: int) -> RowOptimizer:
    """What the options of a run say, on the schedule of its other parameters.

    Args:
      options: of the tables.
      config: of the other parameters.
      steps: of the run.
    """
    own: Any = {field.name: getattr(config, field.name) for field in fields(AdamW)}
    peak = AdamW(**own | {"learning_rate": options.table_learning_rate})
    return BY_NAME[options.table_optimizer](learning_rate(peak, steps))


class WithTables(NamedTuple):
    """Two optimisers; made by `with_tables`, and taken by `fw.step` in place of optax's.

    Attributes:
      dense: of all parameters but tables.
      rows: of the tables.
      tables: their paths.
    """

    dense: optax.GradientTransformation
    rows: RowOptimizer
    tables: tuple[str, ...]

    def init(self, params: Any) -> dict[str, Any]:
        """The state of both: {"dense": optax's, "tables": like params, with states for tables}."""
        dense = self.dense.init(split(params, self.tables)[0])
        tables = {path: self.rows.init(at(params, path)) for path in self.tables}
        return {"dense": dense, "tables": nest(tables)}


type Optimizer = optax.GradientTransformation | WithTables | WithExchange


def with_tables(tx: optax.GradientTransformation, model: Model, rows: RowOptimizer) -> Optimizer:
    """The optimiser of a model with tables; `tx` itself for a model without.

    Args:
      tx: of all other parameters.
      model: whose tables.
      rows: of the tables.
    """
    return WithTables(tx, rows, tuple(sorted(model.tables))) if model.tables else tx


def optimizer_shardings(tx: Optimizer, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Where the state lies: what is remembered of a row lies with it; see `state_shardings`.

    Args:
      tx: the optimiser.
      params: the parameters, or their shapes.
      shardings: a `NamedSharding` for each.
      mesh: of the counters.
    """
    if isinstance(tx, WithExchange):
        return tx.shardings(params, shardings, mesh)
    if not isinstance(tx, WithTables):
        return state_shardings(tx, params, shardings, mesh)

    def lie(path: str) -> Any:
        where = at(shardings, path)
        state = jax.eval_shape(tx.rows.init, at(params, path))
        return jax.tree.map(
            lambda x: NamedSharding(where.mesh, PartitionSpec(*where.spec[: x.ndim])), state
        )

    dense, dense_lie = (split(tree, tx.tables)[0] for tree in (params, shardings))
    return {
        "dense": state_shardings(tx.dense, dense, dense_lie, mesh),
        "tables": nest({path: lie(path) for path in tx.tables}),
    }


def at(tree: Any, path: str) -> Any:
    """The part of nested dicts at a path.

    >>> at({"a": {"b": 1}}, "a/b")
    1
    """
    for key in path.split("/"):
        tree = tree[key]
    return tree


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of what is given by path.

    >>> nest({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    found: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split("/")
        inner = found
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[name] = value
    return found


def split(tree: Any, paths: tuple[str, ...]) -> tuple[Any, Any]:
    """Nested dicts without what is at the paths, and with nothing else.

    >>> split({"a": {"b": 1, "c": 2}, "d": {"e": 3}}, ("a/b", "d/e"))
    ({'a': {'c': 2}}, {'a': {'b': 1}, 'd': {'e': 3}})
    """

    def without(tree: Any, place: str) -> Any:
        kept = {}
        for key, value in tree.items():
            path = f"{place}{key}"
            if isinstance(value, dict):
                rest = without(value, f"{path}/")
                if rest or not value:  # not what held nothing but tables
                    kept[key] = rest
            elif path not in paths:
                kept[key] = value
        return kept

    return without(tree, ""), nest({path: at(tree, path) for path in paths})


def join(dense: Any, tables: Any) -> Any:
    """The inverse of `split`.

    >>> join({"a": {"c": 2}}, {"a": {"b": 1}, "d": {"e": 3}})
    {'a': {'c': 2, 'b': 1}, 'd': {'e': 3}}
    """
    if not (isinstance(dense, dict) and isinstance(tables, dict)):
        return tables
    return {**dense, **{k: join(dense[k], v) if k in dense else v for k, v in tables.items()}}
