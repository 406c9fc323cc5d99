"""One training step: a pure function of state and batch, compiled once, its state donated.

The step knows the model's record, a task's loss and an optax transformation. It is the same
function on every mesh; where things lie is said by the shardings of its arguments. Of a model's
tables it sees the rows that a batch has and no others: see `fw.models.table`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fw import precision as precision_
from fw.errors import FwError
from fw.exchange import APART, WithExchange
from fw.model import FROZEN, ROWS, Batch, Model, Variables
from fw.optimizer import gradient_norm
from fw.table_optimizer import Optimizer, WithTables, at, join, nest, optimizer_shardings, split
from sharding import Rules, constrain, scope, shardings, tables
from sharding.layout import is_names

log = logging.getLogger(__name__)

Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """All that training carries from step to step.

    Attributes:
      step: i32, how many steps have been taken.
      variables: the model's, float32 master weights.
      optimizer: optax's state.
    """

    step: Any
    variables: Variables
    optimizer: Any


def initial_state(variables: Variables, tx: Optimizer, mesh: Mesh) -> TrainState:
    """The state before the first step; moments are born where their parameters lie."""
    params = variables["params"]
    lie = optimizer_shardings(tx, params, jax.tree.map(lambda x: x.sharding, params), mesh)
    zero = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(zero, variables, jax.jit(tx.init, out_shardings=lie)(params))


def abstract_state(model: Model, tx: Optimizer, mesh: Mesh, rules: Rules) -> TrainState:
    """The shapes, dtypes and shardings of the state: what a step can be compiled for.

    Args:
      model: the record.
      tx: the optimiser.
      mesh, rules: where the state will lie. The devices may be those of a topology that is not
        here, as `jax.experimental.topologies` describes it.

    Returns:
      The state, with `jax.ShapeDtypeStruct`s in place of arrays.

    >>> from fw.optimizer import AdamW, optimizer
    >>> from sharding import make_mesh, rules
    >>> axes = {"params": {"w": ("embed", "mlp")}, "state": {}}
    >>> init = lambda key: {"params": {"w": jnp.ones((2, 3))}, "state": {}}
    >>> model = Model(None, init, lambda variables, batch: (None, variables), axes)
    >>> state = abstract_state(model, optimizer(AdamW(), 10), make_mesh("data=1"), rules())
    >>> w = state.variables["params"]["w"]
    >>> w.shape, tuple(w.sharding.spec)
    ((2, 3), ('fsdp', 'tensor'))
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    variables = shardings(model.axes, shapes, mesh, rules)
    params = shapes["params"]
    lie = TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        variables=variables,
        optimizer=optimizer_shardings(tx, params, variables["params"], mesh),
    )
    whole = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(tx.init, params))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), whole, lie
    )


def make_step(
    model: Model,
    loss: Loss,
    tx: Optimizer,
    *,
    mesh: Mesh,
    rules: Rules,
    precision: str | precision_.Policy = "f32",
    accumulate: int = 1,
    seed: int = 0,
    compiler_options: Mapping[str, bool | str] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `(state, batch) -> (state, metrics)`, or `(state, batch, frozen)`.

    Args:
      model: the record.
      loss: `loss(outputs, batch) -> (sum, weight)`; the step minimises sum / weight over the
        whole batch, whatever the number of microbatches or devices.
      tx: the optimiser; for a model with tables, of `fw.table_optimizer.with_tables`; with its
        gradients exchanged in fewer bytes, of `fw.exchange.with_exchange`.
      mesh, rules: where activations go.
      precision: of the dots; see `fw.precision`.
      accumulate: microbatches a step; their gradients are summed before the one update. A model
        with state, such as a batch norm's averages, is computed in one piece all the same: each
        row's output depends on all rows. `remat` in its config saves memory instead.
      seed: of dropout; its key is a function of (seed, step, microbatch).
      compiler_options: of `jax.jit`, such as `sharding.plan.options_of` has for the mesh; not for a
        step within another jitted function.

    Returns:
      The jitted step. Its state is donated: the argument is gone afterwards; the frozen collection
      of a model that has one (`fw.adaptation`) is not, and stays as it is. Metrics, all f32
      scalars but `tokens`: `loss`, `grad_norm` (`gradient_norm`, before clipping; with tables, also
      of the rows as they were fetched), `tokens` (i32, those not padding; 0 where the batch has no
      `segment_ids`).

    Raises:
      FwError: a model with tables, and an optimiser that would change all of their rows; a model
        with state, and an exchange of gradients.
    """
    own = tx.tables if isinstance(tx, WithTables) else ()
    if {*own} != {*model.tables}:
        raise FwError(
            f"the model has the tables {sorted(model.tables)}, but the optimiser is for "
            f"{sorted(own)}; make it with fw.table_optimizer.with_tables"
        )

    if stateful(model) and isinstance(tx, WithExchange):
        raise FwError(APART)
    if accumulate > 1 and stateful(model):
        log.warning("the batch is not cut into %s: the model's state is of all of it", accumulate)
        accumulate = 1

    gradients = _gradients(model, loss, precision, accumulate)

    def step(state: TrainState, batch: Batch, frozen: Any = None):
        # While tracing: `constrain` in the model means this mesh.
        with scope(mesh, rules, differentiate=True):
            return _step(state, batch, frozen)

    def _step(state: TrainState, batch: Batch, frozen: Any):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        params, fixed = split(state.variables["params"], own)
        ids = {path: model.tables[path](batch) for path in own}
        rows = {
            path: tables.fetch(at(fixed, path), ids[path], names=at(model.axes["params"], path))
            for path in own
        }
        given = (params, rows), (fixed, frozen), state.variables["state"], batch, key
        if isinstance(tx, WithExchange):
            value, extra, average, kept = tx.gradients(
                gradients, given, state.optimizer["exchange"], mesh, rules, lie.variables["params"]
            )
            grads = average, {}
        else:
            value, _, extra, grads = gradients(*given)
            kept = None
        metrics = {
            "loss": value,
            "grad_norm": gradient_norm(grads),
            "tokens": jnp.sum(batch.get("segment_ids", jnp.zeros((), jnp.int32)) > 0),
        }
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an i32 power
            params, moments = _updated(model, tx, state, ids, grads, kept)
        return TrainState(state.step + 1, {"params": params, "state": extra}, moments), metrics

    # The state stays where it lies: left alone, the compiler may lay the new one out otherwise.
    lie = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh, rules))
    everywhere = NamedSharding(mesh, PartitionSpec())
    options = None if compiler_options is None else dict(compiler_options)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(lie, everywhere), compiler_options=options
    )


def stateful(model: Model) -> bool:
    """Whether a model has a state, as of a batch norm: its rows depend on each other."""
    return bool(jax.tree.leaves(model.axes.get("state"), is_leaf=is_names))


def _gradients(
    model: Model, loss: Loss, precision: str | precision_.Policy, accumulate: int
) -> Callable[..., Any]:
    """`(learnt, fixed, state, batch, key) -> (loss, weight, state, gradients)`; a mean loss."""

    def total(learnt, fixed, state, batch, key):
        apply = precision_.apply(model.apply, precision)
        params, rows = learnt
        whole, frozen = fixed
        variables = {"params": join(params, whole), "state": state}
        if frozen is not None:
            variables[FROZEN] = frozen
        given = {**batch, ROWS: rows} if rows else batch
        outputs, variables = apply(variables, given, key=key, train=True)
        value, weight = loss(outputs, batch)
        return value, (weight, variables["state"])

    def mean(learnt, fixed, state, batch, key):
        value, (weight, state) = total(learnt, fixed, state, batch, key)
        return value / _at_least_one(weight), (weight, state)

    def gradients(learnt, fixed, state, batch, key):
        """Of the mean loss by parameters and rows, not by what is fixed, tables and frozen."""
        if accumulate == 1:  # divided before the backward pass: after it, all gradients are
            (value, (weight, state)), grads = jax.value_and_grad(mean, has_aux=True)(
                learnt, fixed, state, batch, key
            )
            return value, weight, state, grads

        params, rows = learnt

        def micro(carry, xs):
            value, weight, state, grads = carry
            part, own, index = xs
            part, own = jax.tree.map(_rows_first, (part, own))
            (v, (w, state)), (g, of_rows) = jax.value_and_grad(total, has_aux=True)(
                (params, own), fixed, state, part, jax.random.fold_in(key, index)
            )
            return (value + v, weight + w, state, jax.tree.map(jnp.add, grads, g)), of_rows

        zero = jnp.zeros((), jax.tree.leaves(learnt)[0].dtype)
        start = (zero, zero, state, jax.tree.map(jnp.zeros_like, params))
        parts = jax.tree.map(lambda x: _microbatches(x, accumulate), (dict(batch), rows))
        (value, weight, state, grads), of_rows = jax.lax.scan(
            micro, start, (*parts, jnp.arange(accumulate))
        )
        grads = grads, jax.tree.map(_together, of_rows)
        over = _at_least_one(weight)
        return value / over, weight, state, jax.tree.map(lambda g: g / over, grads)

    return gradients


def _updated(
    model: Model, tx: Optimizer, state: TrainState, ids: Mapping[str, jax.Array], grads: Any,
    kept: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The parameters and the optimiser's state after gradients (of parameters, of rows by path).

    What an exchange keeps of them is part of the state.
    """
    params, moments = state.variables["params"], state.optimizer
    if isinstance(tx, WithExchange):
        updates, dense = tx.dense.update(grads[0], moments["dense"], params)
        return optax.apply_updates(params, updates), {"dense": dense, "exchange": kept}
    if not isinstance(tx, WithTables):
        updates, moments = tx.update(grads[0], moments, params)
        return optax.apply_updates(params, updates), moments
    dense, fixed = split(params, tx.tables)
    updates, kept = tx.dense.update(grads[0], moments["dense"], dense)

    def rule(rows: jax.Array, known: Any, grads: jax.Array, /) -> tuple[jax.Array, Any]:
        return tx.rows.update(rows, known, grads, state.step)

    new = {}
    for path in tx.tables:
        table, known = at(fixed, path), at(moments["tables"], path)
        names = at(model.axes["params"], path)
        new[path] = tables.update(table, known, ids[path], grads[1][path], rule, names=names)
    params = join(optax.apply_updates(dense, updates), nest({p: t for p, (t, _) in new.items()}))
    return params, {"dense": kept, "tables": nest({p: known for p, (_, known) in new.items()})}


def _at_least_one(weight: jax.Array) -> jax.Array:
    """A batch without a label has loss 0, not NaN."""
    return jnp.maximum(weight, jnp.ones((), weight.dtype))


def _rows_first(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def _together(x: jax.Array) -> jax.Array:
    """[count, B / count, ...] → [B, ...], the inverse of `_microbatches`."""
    return _rows_first(jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]))


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] → [count, B / count, ...]; row i goes to microbatch i mod count.

    Strided, so that each device's rows are spread over all microbatches and none moves.
    """
    if x.shape[0] % count:
        raise FwError(
            f"a batch of {x.shape[0]} rows does not divide into {count} microbatches; "
            "choose --accumulate so that it does"
        )
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
