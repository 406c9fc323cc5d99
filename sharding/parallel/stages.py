"""Which stage of a pipeline does what and when, and arrays that have an axis of stages.

The first axis of these arrays is the stages', cut over `pipe`. Everything here leaves a stage's
entry on its stage, but for the three shifts, each of which is one send to a neighbour, as is its
derivative. `pipeline` puts them together.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.errors import ShardingError


class Schedule(NamedTuple):
    """Which microbatch, round and layers a stage has at a tick.

    Microbatches go in groups of as many as there are stages, and a group goes all its rounds before
    the next one begins, as in Megatron-LM (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
    So the last stage hands a microbatch back to the first just when that is free for its next
    round, and none has to wait in memory.

    Attributes:
        stages: S.
        microbatches: M.
        rounds: R, how often a microbatch goes round the stages.
        layers: of all stages.
    """

    stages: int
    microbatches: int
    rounds: int
    layers: int

    @property
    def groups(self) -> int:
        """Also the number of microbatches whose input and output lie on one stage."""
        return self.microbatches // self.stages

    @property
    def per_stage(self) -> int:
        """Layers that a microbatch goes through in a tick."""
        return self.layers // (self.stages * self.rounds)

    @property
    def ticks(self) -> int:
        """Until the last stage is done: it begins S - 1 ticks after the first."""
        return self.rounds * self.microbatches + self.stages - 1

    def at(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """(round, microbatch, whether there is one): any in range if there is none."""
        since = tick - stage  # the first stage was then where this one is now
        group, within = jnp.divmod(since, self.rounds * self.stages)
        turn, member = jnp.divmod(within, self.stages)
        live = (since >= 0) & (since < self.rounds * self.microbatches)
        # Microbatch m's input lies on stage m // groups, and group g is the g-th of every stage.
        return turn, member * self.groups + group % self.groups, live

    def enters(self, tick: Any) -> tuple[Any, Any]:
        """(group, whether one of its microbatches enters the first stage at this tick).

        It is then, too, that one of the group before has left the last stage.
        """
        group, within = jnp.divmod(tick, self.rounds * self.stages)
        return group % self.groups, within < self.stages

    def check(self) -> None:
        """Raise ShardingError unless the stages divide the microbatches and, per round, layers."""
        stages, microbatches, rounds, layers = self
        if microbatches % stages:
            raise ShardingError(
                f"pipeline: {microbatches} microbatches do not divide into groups of pipe={stages} "
                f"stages; use a multiple of {stages}, or pipe = {divisors(microbatches)}"
            )
        if layers % (stages * rounds):
            raise ShardingError(
                f"pipeline: {layers} layers do not divide into rounds={rounds} x pipe={stages}; "
                f"use a multiple of {stages * rounds}, or pipe = {divisors(layers // rounds)}"
            )


def divisors(n: int) -> str:
    """The sizes that would do, for an error message.

    >>> divisors(6)
    '1, 2, 3, 6'
    """
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def pick(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """[stages, n, ...] → [stages, ...]: of every stage the entry that `index` [stages] says.

    >>> pick(jnp.array([[1, 2], [3, 4]]), jnp.array([1, 0]))
    Array([2, 3], dtype=int32)
    """
    if leaf.shape[1] == 1:
        return leaf[:, 0]
    return jax.vmap(partial(lax.dynamic_index_in_dim, axis=0, keepdims=False))(leaf, index)


def computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: keep all but what was only moved.

    That is picked again on the way back, such as the weights of a round, which would otherwise be
    kept once a tick.
    """
    moves = ("gather", "dynamic_slice", "slice", "squeeze", "reshape", "transpose")
    return primitive.name not in moves


def where(chosen: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.where` of whole stages.

    >>> where(jnp.array([True, False]), jnp.ones((2, 2)), jnp.zeros((2, 2)))
    Array([[1., 1.],
           [0., 0.]], dtype=float32)
    """
    return (_where_floats if jnp.issubdtype(a.dtype, jnp.inexact) else _where)(chosen, a, b)


def _where(chosen, a, b):
    return jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)


# By hand: for its backward pass, JAX would keep `chosen` as large as `a`, once a tick.
_where_floats = jax.custom_vjp(_where)
_where_floats.defvjp(
    lambda chosen, a, b: (_where(chosen, a, b), chosen),
    lambda chosen, g: (
        None,
        _where(chosen, g, jnp.zeros_like(g)),
        _where(chosen, jnp.zeros_like(g), g),
    ),
)


def gate(live: jax.Array, tree: Any) -> Any:
    """The same tree [stages, ...], with no gradient where a stage is not `live`.

    Nobody uses what such a stage computes, but zero times an infinite derivative is still NaN.

    >>> slope = jax.grad(lambda x: jnp.sum(jnp.sqrt(gate(jnp.array([True, False]), x))))
    >>> slope(jnp.array([4.0, 0.0]))
    Array([0.25, 0.  ], dtype=float32)
    """
    return jax.tree.map(
        lambda x: _gate(live, x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
    )


# Not `where(live, x, stop_gradient(x))`: that would be a new array, kept once a tick.
_gate = jax.custom_vjp(lambda live, x: x)
_gate.defvjp(
    lambda live, x: (x, live),
    lambda live, g: (None, _where(live, g, jnp.zeros_like(g))),
)


def right(x: jax.Array) -> jax.Array:
    """To the next stage; the first is given zeros.

    >>> right(jnp.array([1, 2, 3]))
    Array([0, 1, 2], dtype=int32)
    """
    return _shift(x, 1)


def left(x: jax.Array) -> jax.Array:
    """To the stage before; the last is given zeros.

    >>> left(jnp.array([1, 2, 3]))
    Array([2, 3, 0], dtype=int32)
    """
    return _shift(x, -1)


def _shift(x: jax.Array, by: int) -> jax.Array:
    # One pad, and not a pad and a slice: so its transpose is one send, too.
    rest = [(0, 0, 0)] * (x.ndim - 1)
    return lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0), *rest])


@jax.custom_vjp
def around(x: jax.Array) -> jax.Array:
    """To the next stage, and from the last to the first.

    >>> around(jnp.array([1.0, 2.0, 3.0]))
    Array([3., 1., 2.], dtype=float32)
    """
    return jnp.roll(x, 1, 0)


# By hand: the transpose of a roll, a sum of two pads, would be two sends.
around.defvjp(lambda x: (around(x), None), lambda _, g: (jnp.roll(g, -1, 0),))
