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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.context import batching, current, differentiated, scope
from sharding.errors import ShardingError
from sharding.layout import paths
from sharding.parallel import stages as along
from sharding.parallel.linear import PRODUCT
from sharding.parallel.microbatches import check_rows, merge, pin, rows_axes, same_size, split
from sharding.parallel.stages import Schedule
from sharding.rules import BATCH, mesh_axes, rules

PIPE = "pipe"
LAYERS = "layers"
"""The logical axis that the rules send to `pipe`; the first of stacked parameters."""

REMAT = (None, "dots", "layer", "stage")
"""What the backward pass may compute again, from the least to the most."""

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
        remat: what the backward pass computes again: None; all but the products of `linear`,
            "dots"; each "layer" from its input; each "stage" from its input (each layer, where
            there is one stage).
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
    _check_remat(remat)
    layers = _layers(params, rounds)
    schedule = Schedule(stage_count(), microbatches, rounds, layers)
    rows = same_size({"x": x, "extra": extra}, 0, "rows")
    if schedule.stages > 1:
        schedule.check()
    one = _one(layer, key, has_aux)
    with _without_pipe(schedule.stages):
        check_rows(rows, microbatches)
        if schedule.stages == 1:
            lead = 1 if rounds == 1 else 2
            params = jax.tree.map(lambda p: p.reshape(layers, *p.shape[lead:]), params)

            def chain(many, *args):
                return _chain(many(one), remat)(params, *args, jnp.arange(layers))

            x, aux = _together(chain, x, extra, microbatches)
        else:
            x, extra = jax.tree.map(partial(split, count=microbatches), (x, extra))
            x, aux = _staged(one, params, x, extra, schedule, remat)
            x = jax.tree.map(merge, x)
    return (x, jax.tree.map(lambda a: a / microbatches, aux)) if has_aux else x


def in_turn(
    layers: Sequence[Layer],
    params: Sequence[Any],
    x: Any,
    *,
    extra: Any = None,
    key: jax.Array | None = None,
    microbatches: int = 8,
    remat: str | None = None,
    has_aux: bool = False,
) -> Any:
    """What `pipeline` computes, of layers whose parameters are apart: each is compiled.

    A CPU copies a layer's parameters out of a stack, and its gradients into one. A program of many
    layers takes long to compile, and cannot be cut into stages.

    Args:
        layers, params: a function and a tree of arrays for each layer.
        x, extra, key, microbatches, remat, has_aux: as in `pipeline`.

    Raises:
        ShardingError: as `pipeline`, and for a mesh with stages.

    >>> layer = lambda w, x, extra, key: jnp.tanh(x @ w)
    >>> in_turn([layer] * 2, [jnp.ones((3, 3))] * 2, jnp.ones((8, 3))).shape
    (8, 3)
    """
    _check_remat(remat)
    if (stages := stage_count()) > 1:
        raise ShardingError(
            f"in_turn: layers whose parameters are apart cannot be cut into pipe={stages} stages; "
            "stack them, or use a mesh without pipe"
        )
    check_rows(same_size({"x": x, "extra": extra}, 0, "rows"), microbatches)

    def chain(many, x, extra, microbatch):
        auxes = []
        for index, (layer, own) in enumerate(zip(layers, params, strict=True)):
            one = _again(many(_one(layer, key, has_aux)), remat)
            x, aux = one(own, x, extra, microbatch, jnp.int32(index))
            auxes.append(aux)
        return x, jax.tree.map(lambda *a: sum(a[1:], a[0]), *auxes)

    x, aux = _together(chain, x, extra, microbatches)
    return (x, jax.tree.map(lambda a: a / microbatches, aux)) if has_aux else x


def _one(layer: Layer, key: jax.Array | None, has_aux: bool) -> Callable:
    """`layer` with its key made of its number and the microbatch's, and always an aux."""

    def one(params, x, extra, microbatch, index):
        fold = jax.random.fold_in
        own = None if key is None else fold(fold(key, index), microbatch)
        out = layer(params, x, extra, own)
        return out if has_aux else (out, ())

    return one


def _again(one: Callable, remat: str | None, **options: Any) -> Callable:
    """`one`, of which the backward pass computes again what `remat` says."""
    if remat is None:
        return one
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(PRODUCT) if remat == "dots" else None
    return jax.checkpoint(one, policy=policy, **options)


def _chain(one: Callable, remat: str | None) -> Callable:
    """Layers one after another: `(params [n, ...], x, extra, microbatch, indices [n, ...])`."""

    def chain(params, x, extra, microbatch, indices):
        def step(x, entry):
            params, index = entry
            return one(params, x, extra, microbatch, index)

        # In a loop, no barrier need keep the compiler from sharing what is computed twice.
        x, aux = lax.scan(_again(step, remat, prevent_cse=False), x, (params, indices))
        return x, jax.tree.map(partial(jnp.sum, axis=0), aux)

    return chain


def _together(chain: Callable, x: Any, extra: Any, microbatches: int) -> tuple[Any, Any]:
    """All microbatches through all layers: one dot a layer, not one each.

    `chain(many, x, extra, microbatch)`, where `many` makes a function of one microbatch, which is
    `(params, x, extra, microbatch, index)`, one of all.
    """
    if microbatches == 1:
        return chain(lambda one: one, x, extra, jnp.int32(0))
    x, extra = jax.tree.map(partial(split, count=microbatches), (x, extra))
    x, extra = pin((x, extra), None, rows_axes())
    number = jnp.arange(microbatches)

    def many(one: Callable) -> Callable:
        return batching()(jax.vmap(one, (None, 0, 0, 0, None)))

    x, aux = chain(many, x, extra, number)
    return jax.tree.map(merge, x), jax.tree.map(partial(jnp.sum, axis=0), aux)


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

    params = pin(jax.tree.map(cut, params), PIPE)
    # A copy a stage: read where it lies, and its gradients are summed over stages once, at the end.
    extra = jax.tree.map(lambda e: jnp.broadcast_to(e, (stages, *e.shape)), extra)
    extra = pin(extra, PIPE, None, rows_axes())
    # The microbatches that wait or are done, [stages, groups, rows, ...].
    queue = jax.tree.map(lambda a: a.reshape(stages, groups, *a.shape[1:]), x)
    queue = pin(queue, PIPE, None, rows_axes())
    every = batching()(jax.vmap(one, spmd_axis_name=PIPE))
    chain = _chain(every, None if remat == "stage" else remat)

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
        return pin(given, PIPE, rows_axes()), pin(queue, PIPE, None, rows_axes())

    def advance(carry, tick):
        x, queue = carry
        x, aux = stage(params, x, extra, tick)
        return hand_on(pin(x, PIPE, rows_axes()), queue, tick + 1), aux

    # Stages that still wait compute on rows of the batch, too, rather than on zeros, which may
    # have no finite norm; nothing comes of it.
    first = jax.tree.map(lambda q: q[:, 0], queue)
    (_, queue), aux = lax.scan(advance, hand_on(first, queue, 0), jnp.arange(schedule.ticks))
    # Each group's output has taken the place of the next group's input, the last that of group 0.
    done = jax.tree.map(lambda q: jnp.roll(q, -1, 1).reshape(-1, *q.shape[2:]), queue)
    return done, jax.tree.map(partial(jnp.sum, axis=(0, 1)), aux)


# --- the mesh and the layers ----------------------------------------------------------------------


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


def _layers(params: Any, rounds: int) -> int:
    """How many layers there are."""
    if rounds == 1:
        return same_size(params, 0, "layers")
    if same_size(params, 0, "rounds") != rounds:
        raise ShardingError(
            f"pipeline: with rounds={rounds} parameters are [{rounds}, layers / {rounds}, ...], "
            f"but the first axis of {paths(params)[0]!r} is {jax.tree.leaves(params)[0].shape[0]}"
        )
    return rounds * same_size(params, 1, "layers")


def _check_remat(remat: str | None) -> None:
    if remat not in REMAT:
        raise ShardingError(f"pipeline: remat {remat!r} is unknown; choose one of {REMAT}")
