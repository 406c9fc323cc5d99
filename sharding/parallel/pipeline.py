"""A stack of equal layers cut over `pipe`: stages that work on different microbatches at once.

The batch is cut into microbatches, by a number that belongs to the program and not to the mesh.
With one stage, all of them go through the layers together. With more, each stage holds its own
layers; at every tick it applies them to one microbatch and hands it on (GPipe, Huang et al. 2018,
arXiv:1811.06965). With `rounds`, a microbatch goes round the stages more than once, and they wait
less (`stages`). A layer sees the same either way.

It is one program over all stages, as in GSPMD (Xu et al. 2021, arXiv:2105.04663, section 3.3):
arrays with a leading axis of stages, cut over `pipe`; a `vmap` over it; a shift along it, which
compiles to a send to the neighbour. Input and output lie cut over the stages, too, and move by one
stage a tick, towards the first stage and back to their place.

    tick       0  1  2  3  4
    stage 0    a  b  c  d  .     2 stages, 4 microbatches, 1 round
    stage 1    .  a  b  c  d
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.context import batching, current, differentiated, scope
from sharding.errors import ShardingError
from sharding.layout import paths
from sharding.parallel import stages as along
from sharding.parallel.stages import Schedule, divisors
from sharding.rules import BATCH, mesh_axes, rules

PIPE = "pipe"
LAYERS = "layers"
"""The logical axis that the rules send to `pipe`; the first of stacked parameters."""

REMAT = (None, "layer", "stage")

type Layer = Callable[[Any, Any, Any, Any], Any]
"""`layer(params, x, extra, key) -> x`, or `(x, aux)`: one layer of one microbatch."""


def bubble(stages: int, microbatches: int, rounds: int = 1) -> float:
    """The share of its time in which a stage waits: (S - 1) / (R M + S - 1).

    A stage works for R M ticks, one a microbatch and round, and the last stage begins S - 1 ticks
    after the first. A tick is 1 / (R S) of the layers, so R rounds make the wait R times shorter.

    Args:
        stages: S.
        microbatches: M.
        rounds: R.

    Returns:
        A fraction of all ticks, in the forward pass as in the backward pass.

    >>> bubble(4, 8), bubble(4, 8, rounds=3)
    (0.2727272727272727, 0.1111111111111111)
    """
    return (stages - 1) / (rounds * microbatches + stages - 1)


def pipeline(
    layer: Layer,
    params: Any,
    x: Any,
    *,
    extra: Any = None,
    key: jax.Array | None = None,
    microbatches: int = 8,
    rounds: int = 1,
    remat: str | None = None,
    has_aux: bool = False,
) -> Any:
    """Apply a stack of layers to a batch, microbatch by microbatch.

    Row i belongs to microbatch i mod M, so rows that are cut over devices need not move. Inside a
    `scope` whose mesh has `pipe` > 1 and whose rules send "layers" there, the layers are cut into
    stages. The result is the same on every mesh, dropout masks included.

    In a forward pass each device sends R M + S microbatches of `x` to the next stage, and M + S to
    move input and output; a backward pass sends as many back. Parameters do not move along `pipe`.
    What `fsdp` cuts is gathered once a step, where a layer takes it by `linear` or `experts`; its
    gradient is reduced and scattered once a tick.
    Where the rules also cut "batch" over `pipe`, rows are cut so before and after the stack, and
    what surrounds it is not computed by every stage again.

    Args:
        layer: `layer(params, x, extra, key) -> x`, of one layer and one microbatch. If it calls
            `jax.shard_map` with `axis_names`, those of `sharding.context.mapped()` are among them.
        params: a tree of arrays [layers, ...], whose names begin with "layers". With `rounds` > 1
            [rounds, layers / rounds, ...], whose names begin with None, "layers": every round's
            layers are cut over the stages, so that none has to move.
        x: a tree of arrays [batch, ...], which travels through the layers.
        extra: a tree of arrays [batch, ...] that every layer reads, such as segments and
            positions. It lies on every stage and does not travel.
        key: of dropout. A layer is given `fold_in(fold_in(key, layer), microbatch)`, or None.
        microbatches: M, a number of the program; the number of stages divides it.
        rounds: R, how often a microbatch goes round the stages.
        remat: what the backward pass computes again: None, each "layer" from its input, or each
            "stage" from its input (each layer, where there is one stage).
        has_aux: whether `layer` returns `(x, aux)`, with a tree of arrays such as the loss that
            balances experts.

    Returns:
        `x` after the last layer; with `has_aux` also `aux`, summed over the layers and averaged
        over the microbatches.

    Raises:
        ShardingError: layers, stages, microbatches and rows that do not divide; arrays that
            disagree about their number of layers or rows; another `remat`.

    >>> layer = lambda w, x, extra, key: jnp.tanh(x @ w)
    >>> w, x = jnp.ones((4, 3, 3)), jnp.ones((8, 3))
    >>> pipeline(layer, w, x, microbatches=4).shape
    (8, 3)
    """
    if remat not in REMAT:
        raise ShardingError(f"pipeline: remat {remat!r} is unknown; choose one of {REMAT}")
    layers = _layers(params, rounds)
    schedule = Schedule(stage_count(), microbatches, rounds, layers)
    rows = _same_size({"x": x, "extra": extra}, 0, "rows")
    if schedule.stages > 1:
        schedule.check()
    with _without_pipe(schedule.stages):
        _check_rows(rows, microbatches)
        x, extra = jax.tree.map(partial(_split, count=microbatches), (x, extra))
        run = _together if schedule.stages == 1 else _staged
        x, aux = run(_one(layer, key, has_aux), params, x, extra, schedule, remat)
        x = jax.tree.map(_merge, x)
    return (x, jax.tree.map(lambda a: a / microbatches, aux)) if has_aux else x


def _one(layer: Layer, key: jax.Array | None, has_aux: bool) -> Callable:
    """`layer` with its key made of its number and the microbatch's, and always an aux."""

    def one(params, x, extra, microbatch, index):
        fold = jax.random.fold_in
        own = None if key is None else fold(fold(key, index), microbatch)
        out = layer(params, x, extra, own)
        return out if has_aux else (out, ())

    return one


def _chain(one: Callable, again: bool) -> Callable:
    """Layers one after another: `(params [n, ...], x, extra, microbatch, indices [n, ...])`."""

    def chain(params, x, extra, microbatch, indices):
        def step(x, entry):
            params, index = entry
            return one(params, x, extra, microbatch, index)

        # In a loop, no barrier need keep the compiler from sharing what is computed twice.
        step = jax.checkpoint(step, prevent_cse=False) if again else step
        x, aux = lax.scan(step, x, (params, indices))
        return x, jax.tree.map(partial(jnp.sum, axis=0), aux)

    return chain


def _together(
    one: Callable, params: Any, x: Any, extra: Any, schedule: Schedule, remat: str | None
) -> tuple[Any, Any]:
    """All microbatches [M, rows, ...] through all layers: one dot a layer, not one each."""
    lead = 1 if schedule.rounds == 1 else 2
    params = jax.tree.map(lambda p: p.reshape(schedule.layers, *p.shape[lead:]), params)
    x, extra = _pin((x, extra), None, _rows_axes())
    every = batching()(jax.vmap(one, (None, 0, 0, 0, None)))
    if schedule.microbatches == 1:
        every = _alone(one)
    chain = _chain(every, again=remat is not None)
    number = jnp.arange(schedule.microbatches)
    x, aux = chain(params, x, extra, number, jnp.arange(schedule.layers))
    return x, jax.tree.map(partial(jnp.sum, axis=0), aux)


def _alone(one: Callable) -> Callable:
    """What a map over one microbatch would be, for layers that a map is too much for."""

    def alone(params, *of_batch):
        *of_batch, index = of_batch
        out = one(params, *jax.tree.map(lambda a: a[0], of_batch), index)
        return jax.tree.map(lambda a: a[None], out)

    return alone


def _staged(
    one: Callable, params: Any, x: Any, extra: Any, schedule: Schedule, remat: str | None
) -> tuple[Any, Any]:
    """Microbatches [M, rows, ...] through the stages."""
    stages, rounds = schedule.stages, schedule.rounds
    groups, per_stage = schedule.groups, schedule.per_stage
    number = jnp.arange(stages)

    def cut(p):  # [layers, ...] or [rounds, layers / rounds, ...] → [stages, rounds, n, ...]
        p = p.reshape(rounds, stages, per_stage, *p.shape[1 if rounds == 1 else 2 :])
        return jnp.swapaxes(p, 0, 1)

    params = _pin(jax.tree.map(cut, params), PIPE)
    # A copy a stage: read where it lies, and its gradients are summed over stages once, at the end.
    extra = jax.tree.map(lambda e: jnp.broadcast_to(e, (stages, *e.shape)), extra)
    extra = _pin(extra, PIPE, None, _rows_axes())
    # The microbatches that wait or are done, [stages, groups, rows, ...].
    queue = jax.tree.map(lambda a: a.reshape(stages, groups, *a.shape[1:]), x)
    queue = _pin(queue, PIPE, None, _rows_axes())
    chain = _chain(batching()(jax.vmap(one, spmd_axis_name=PIPE)), again=remat == "layer")

    def stage(params, x, extra, tick):
        """One tick of all stages: x [stages, rows, ...]."""
        turn, microbatch, live = schedule.at(tick, number)
        params = jax.tree.map(lambda p: along.pick(p, turn), params)
        extra = jax.tree.map(lambda e: along.pick(e, microbatch), extra)
        params, x, extra = along.gate(live, (params, x, extra))
        # The loop is over the layers of a stage: their axis goes first.
        params = jax.tree.map(lambda p: jnp.swapaxes(p, 0, 1), params)
        indices = (turn * stages + number) * per_stage + jnp.arange(per_stage)[:, None]
        x, aux = chain(params, x, extra, microbatch, indices)
        return x, jax.tree.map(lambda a: along.where(live, a, jnp.zeros_like(a)), aux)

    if remat == "stage" or rounds > 1:
        policy = None if remat == "stage" else along.computed
        stage = jax.checkpoint(stage, prevent_cse=False, policy=policy)

    def hand_on(x, queue, tick):
        """Before `tick`: what the stages have computed goes to the next ones, the queue moves."""
        group, enters = schedule.enters(tick)
        row = jax.tree.map(lambda q: lax.dynamic_index_in_dim(q, group, 1, False), queue)
        given = jax.tree.map(along.right if rounds == 1 else along.around, x)
        left = partial(jax.tree.map, along.left)
        moved = left(row) if rounds == 1 else lax.cond(enters, left, lambda row: row, row)
        given = jax.tree.map(partial(along.where, enters & (number == 0)), row, given)
        row = jax.tree.map(partial(along.where, enters & (number == stages - 1)), x, moved)
        queue = jax.tree.map(
            lambda q, r: lax.dynamic_update_index_in_dim(q, r, group, 1), queue, row
        )
        return _pin(given, PIPE, _rows_axes()), _pin(queue, PIPE, None, _rows_axes())

    def advance(carry, tick):
        x, queue = carry
        x, aux = stage(params, x, extra, tick)
        return hand_on(_pin(x, PIPE, _rows_axes()), queue, tick + 1), aux

    # Stages that still wait compute on rows of the batch, too, rather than on zeros, which may
    # have no finite norm; nothing comes of it.
    first = jax.tree.map(lambda q: q[:, 0], queue)
    (_, queue), aux = lax.scan(advance, hand_on(first, queue, 0), jnp.arange(schedule.ticks))
    # Each group's output has taken the place of the next group's input, the last that of group 0.
    done = jax.tree.map(lambda q: jnp.roll(q, -1, 1).reshape(-1, *q.shape[2:]), queue)
    return done, jax.tree.map(partial(jnp.sum, axis=(0, 1)), aux)


# --- rows and the mesh ----------------------------------------------------------------------------


def _split(x: jax.Array, count: int) -> jax.Array:
    """[batch, ...] → [count, batch / count, ...]; row i goes to microbatch i mod count."""
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def _merge(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def stage_count() -> int:
    """How many stages there are: `pipe` of the scope's mesh, if its rules send "layers" there.

    >>> stage_count()
    1
    """
    place = current()
    if place is None:
        return 1
    mesh, table = place
    return mesh.shape.get(PIPE, 1) if PIPE in mesh_axes(table.table[LAYERS]) else 1


def _without_pipe(stages: int) -> AbstractContextManager:
    """Within the stages, `pipe` cuts layers, and rows no longer."""
    place = current()
    if place is None or stages == 1:
        return nullcontext()
    mesh, outside = place
    kept = tuple(axis for axis in mesh_axes(outside.table[BATCH]) if axis != PIPE)
    inside = rules(outside.preset, dict(outside.overrides) | {BATCH: kept or None})
    return scope(mesh, inside, differentiate=differentiated() is not None, mapped=(PIPE,))


def _rows_axes() -> tuple[str, ...] | None:
    place = current()
    return place and (mesh_axes(place[1].table[BATCH]) or None)


def _pin(tree: Any, *axes: Any) -> Any:
    """Cut the first axes of every leaf so; what its other axes do is the layers' affair."""
    place = current()
    if place is None:
        return tree

    def pin(x):
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(axes))
        return lax.with_sharding_constraint(x, NamedSharding(place[0], PartitionSpec(*axes, *free)))

    return jax.tree.map(pin, tree)


# --- checks ---------------------------------------------------------------------------------------


def _layers(params: Any, rounds: int) -> int:
    """How many layers there are."""
    if rounds == 1:
        return _same_size(params, 0, "layers")
    if _same_size(params, 0, "rounds") != rounds:
        raise ShardingError(
            f"pipeline: with rounds={rounds} parameters are [{rounds}, layers / {rounds}, ...], "
            f"but the first axis of {paths(params)[0]!r} is {jax.tree.leaves(params)[0].shape[0]}"
        )
    return rounds * _same_size(params, 1, "layers")


def _same_size(tree: Any, axis: int, what: str) -> int:
    """The size that all leaves have along `axis`."""
    leaves = dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))
    sizes = {path: jnp.shape(leaf)[axis : axis + 1] for path, leaf in leaves.items()}
    if not sizes:
        raise ShardingError(f"pipeline: no array that tells the number of {what}")
    first, expected = next(iter(sizes.items()))
    for path, size in sizes.items():
        if not size or size != expected:
            raise ShardingError(
                f"pipeline: axis {axis} is that of {what}; {path!r} is {jnp.shape(leaves[path])}, "
                f"but {first!r} is {jnp.shape(leaves[first])}"
            )
    return expected[0]


def _check_rows(rows: int, microbatches: int) -> None:
    if microbatches < 1 or rows % microbatches:
        raise ShardingError(
            f"pipeline: {rows} rows do not divide into microbatches={microbatches}; "
            f"{divisors(rows)} would do"
        )
    place = current()
    ways = 1
    for axis in _rows_axes() or ():
        ways *= place[0].shape[axis] if place else 1
    if rows // microbatches % ways:
        raise ShardingError(
            f"pipeline: {rows} rows in {microbatches} microbatches leave {rows // microbatches} "
            f"for each, which the {ways} devices that cut rows do not divide; use a multiple of "
            f"{microbatches * ways} rows, or microbatches = {divisors(rows // ways) or 'none'}"
        )
