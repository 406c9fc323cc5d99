"""One training step: a pure function of state and batch, compiled once, its state donated.

The step knows the model's record, a task's loss and an optax transformation. It is the same
function on every mesh; where things lie is said by the shardings of its arguments.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fw import precision as precision_
from fw.errors import FwError
from fw.model import Batch, Model, Variables
from fw.optimizer import state_shardings
from sharding import Rules, constrain, scope, shardings
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


def initial_state(variables: Variables, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step; moments are born where their parameters lie."""
    params = variables["params"]
    lie = state_shardings(tx, params, jax.tree.map(lambda x: x.sharding, params), mesh)
    zero = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(zero, variables, jax.jit(tx.init, out_shardings=lie)(params))


def abstract_state(
    model: Model, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> TrainState:
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
        optimizer=state_shardings(tx, params, variables["params"], mesh),
    )
    whole = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(tx.init, params))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), whole, lie
    )


def make_step(
    model: Model,
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    rules: Rules,
    precision: str | precision_.Policy = "f32",
    accumulate: int = 1,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `(state, batch) -> (state, metrics)`.

    Args:
      model: the record.
      loss: `loss(outputs, batch) -> (sum, weight)`; the step minimises sum / weight over the
        whole batch, whatever the number of microbatches or devices.
      tx: the optimiser.
      mesh, rules: where activations go.
      precision: of the dots; see `fw.precision`.
      accumulate: microbatches a step; their gradients are summed before the one update. A model
        with state, such as a batch norm's averages, is computed in one piece all the same: each
        row's output depends on all rows. `remat` in its config saves memory instead.
      seed: of dropout; its key is a function of (seed, step, microbatch).

    Returns:
      The jitted step. Its state is donated: the argument is gone afterwards. Metrics, all f32
      scalars but `tokens`: `loss`, `grad_norm` (before clipping), `tokens` (i32, those not
      padding; 0 where the batch has no `segment_ids`).
    """

    if accumulate > 1 and jax.tree.leaves(model.axes.get("state"), is_leaf=is_names):
        log.warning("the batch is not cut into %s: the model's state is of all of it", accumulate)
        accumulate = 1

    def total(params, state, batch, key):
        apply = precision_.apply(model.apply, precision)
        variables = {"params": params, "state": state}
        outputs, variables = apply(variables, batch, key=key, train=True)
        value, weight = loss(outputs, batch)
        return value, (weight, variables["state"])

    def mean(params, state, batch, key):
        value, (weight, state) = total(params, state, batch, key)
        return value / _at_least_one(weight), state

    def gradients(params, state, batch, key):
        """Of the mean loss: (loss, state, gradients)."""
        if accumulate == 1:  # divided before the backward pass: after it, all gradients are
            (value, state), grads = jax.value_and_grad(mean, has_aux=True)(
                params, state, batch, key
            )
            return value, state, grads

        def micro(carry, xs):
            value, weight, state, grads = carry
            part, index = xs
            part = {k: constrain(x, "batch", *[None] * (x.ndim - 1)) for k, x in part.items()}
            (v, (w, state)), g = jax.value_and_grad(total, has_aux=True)(
                params, state, part, jax.random.fold_in(key, index)
            )
            return (value + v, weight + w, state, jax.tree.map(jnp.add, grads, g)), None

        zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
        start = (zero, zero, state, jax.tree.map(jnp.zeros_like, params))
        parts = jax.tree.map(lambda x: _microbatches(x, accumulate), dict(batch))
        (value, weight, state, grads), _ = jax.lax.scan(
            micro, start, (parts, jnp.arange(accumulate))
        )
        weight = _at_least_one(weight)
        return value / weight, state, jax.tree.map(lambda g: g / weight, grads)

    def step(state: TrainState, batch: Batch):
        # While tracing: `constrain` in the model means this mesh.
        with scope(mesh, rules, differentiate=True):
            return _step(state, batch)

    def _step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        params = state.variables["params"]
        value, extra, grads = gradients(params, state.variables["state"], batch, key)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "tokens": jnp.sum(batch.get("segment_ids", jnp.zeros((), jnp.int32)) > 0),
        }
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an i32 power
            updates, moments = tx.update(grads, state.optimizer, params)
        variables = {"params": optax.apply_updates(params, updates), "state": extra}
        return TrainState(state.step + 1, variables, moments), metrics

    # The state stays where it lies: left alone, the compiler may lay the new one out otherwise.
    lie = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh, rules))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(lie, everywhere))


def _at_least_one(weight: jax.Array) -> jax.Array:
    """A batch without a label has loss 0, not NaN."""
    return jnp.maximum(weight, jnp.ones((), weight.dtype))


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
