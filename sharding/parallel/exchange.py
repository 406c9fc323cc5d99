"""What one device does in a mixture of experts: its tokens go out, others' come in, all return.

`some` keeps to a capacity and `everything` drops nothing. Both are plain functions of one device's
arrays, with collectives over the axes they are told: none on a single device.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from sharding.parallel.routing import Priority, queue
from sharding.parallel.rows import Fn, grouped, inverse, move, sort, starts
from sharding.parallel.travel import moved

ROUNDS = 8
"""Rounds in which balanced choices would be sent; what is uneven is rounded up to a round."""

type Axes = Sequence[str]


def some(
    fn: Fn,
    params: Any,
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    number: int,
    over: Axes,
    along: Axes,
    *,
    most: int,
    group: int,
    priority: Priority,
    operands: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The experts' weighted sum, where each takes at most `most` tokens of a group.

    Args:
        fn: one expert.
        params: of this device's experts, leaves [experts / n, ...].
        x: this device's tokens, [batch, length, embed].
        experts: int32 [batch, length, k], of all devices' experts.
        weights: [batch, length, k].
        number: of experts on all devices.
        over: the mesh axes that cut the experts.
        along: the mesh axes that cut the length.
        most: places that an expert has for a group.
        group: tokens a group, of the whole length.
        priority: who comes first.
        operands: the dtype in which rows and their gradients travel to their experts.

    Returns:
        y like x, and bool [batch, length, k], whether each choice had a place.
    """
    batch, length, k = experts.shape
    if length % group == 0:
        lines, places = experts.reshape(-1, group, k), most
        place = queue(lines, weights.reshape(lines.shape), priority)
        kept = (place < most) & (lines < number)
    else:
        # Groups go across devices. Who has a place is found out from the whole rows' choices, a
        # few integers a token; this device then queues its own choices that have one.
        whole = partial(lax.all_gather, axis_name=tuple(along), axis=1, tiled=True)
        choices, weight = whole(experts), whole(lax.stop_gradient(weights))
        shape = (-1, group, k)
        place = queue(choices.reshape(shape), weight.reshape(shape), priority)
        start = lax.axis_index(tuple(along)) * length
        place = lax.dynamic_slice_in_dim(place.reshape(choices.shape), start, length, 1)
        kept = (place < most) & (experts < number)
        lines = jnp.where(kept, experts, number)
        place = queue(lines, weights, priority)
        touched = 1 if group % length == 0 else length // group + 2
        places = min(length, most * touched)
    groups = lines.shape[0]
    line = lax.broadcasted_iota(jnp.int32, lines.shape, 0)
    slots = number * groups * places
    back = jnp.where(kept, (lines * groups + line) * places + place, slots).reshape(-1)
    there = inverse(back, slots)
    rows = move(x.reshape(batch * length, -1), there, back).reshape(number, groups * places, -1)
    rows = _swap(rows, over, 0, 1, operands)  # [experts / n, n · groups · places, embed]
    rows = _swap(jax.vmap(fn)(params, rows), over, 1, 0, None, operands)
    out = move(rows.reshape(slots, -1), back, there)
    return _weighted(out, weights, x), kept.reshape(experts.shape)


def everything(
    fn: Fn,
    params: Any,
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    number: int,
    over: Axes,
    along: Axes,
    *,
    operands: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The experts' weighted sum, of every choice.

    What the even share of a pair of devices holds goes at once; the rest goes in a loop of as many
    rounds as the fullest pair needs. So nothing is sent that balance would not send but what is
    uneven, and no device holds room for the worst case, as `lax.ragged_all_to_all` would need
    (which, besides, no CPU runs).

    Args:
        fn: as for `some`; so are all arguments here.
        params: as for `some`.
        x: as for `some`.
        experts: as for `some`.
        weights: as for `some`.
        number: as for `some`.
        over: as for `some`.
        along: as for `some`.
        operands: as for `some`.

    Returns:
        As `some` does.
    """
    del along
    batch, length, k = experts.shape
    rows, flat = x.reshape(batch * length, -1), experts.reshape(-1)
    kept = experts < number
    if not over:
        out = grouped(fn, params, _copies(rows, k), flat)
        return _weighted(out, weights, x), kept
    devices, total = lax.axis_size(tuple(over)), flat.shape[0]
    own = number // devices
    ordered, source = sort(flat)
    first = starts(ordered, number)
    loads = lax.all_gather(jnp.diff(first), tuple(over)).reshape(devices, devices, own)
    even, late = -(-total // devices), -(-total // (devices * ROUNDS))
    here = lax.dynamic_index_in_dim(loads, lax.axis_index(tuple(over)), 1, keepdims=False)
    plan = _Plan(
        source=source,
        begin=first[::own],
        until=jnp.cumsum(here, axis=1, dtype=jnp.int32),
        rounds=_rounds(jnp.max(jnp.sum(loads, -1, dtype=jnp.int32)), even, late),
    )
    index = lax.broadcasted_iota(jnp.int32, (total,), 0)
    there = plan.copies(0, even).reshape(-1)
    to = jnp.minimum(ordered // own, devices)
    place = index - plan.begin[to]
    slot = jnp.where((ordered < number) & (place < even), to * even + place, devices * even)
    back = jnp.zeros(total, jnp.int32).at[source].set(slot, unique_indices=True)
    ship = partial(_ship, fn, over=over, operands=operands)
    out = ship(params, move(rows, there, back).reshape(devices, even, -1), plan.ids(0, even))
    out = move(out.reshape(devices * even, -1), back, there)
    # No token chooses an expert twice, so a pair never has more than this.
    if even < batch * length * min(k, own):
        out = _follow(ship, even, late, params, rows, out, plan)
    return _weighted(out, weights, x), kept


class _Plan(NamedTuple):
    """Who goes where: choices sorted by expert, which is by device too."""

    source: jax.Array  # [choices], the choice at each place of the order
    begin: jax.Array  # [n + 1], where each device's choices begin in the order
    until: jax.Array  # [n, experts / n], of what each device sends here, where each expert's ends
    rounds: jax.Array  # how many rounds follow

    def copies(self, start, size: int) -> jax.Array:
        """[n, size]: the choices in places start … of each device's; too large where none is."""
        place = self.begin[:-1, None] + start + _iota(size)
        inside = place < self.begin[1:, None]
        total = self.source.shape[0]
        return jnp.where(inside, self.source[jnp.minimum(place, total - 1)], total)

    def ids(self, start, size: int) -> jax.Array:
        """[n, size]: the experts, of this device's, of what arrives from each device."""
        at = start + _iota(size)
        return jnp.sum(self.until[:, None, :] <= at[None, :, None], -1, dtype=jnp.int32)


def _iota(size: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def _rounds(fullest: jax.Array, even: int, late: int) -> jax.Array:
    return (jnp.maximum(fullest - even, 0) + late - 1) // late


def _ship(
    fn: Fn, params: Any, rows: jax.Array, ids: jax.Array, *, over: Axes, operands: Any
) -> jax.Array:
    """rows [n, size, embed] to their experts and back."""
    devices, size, _ = rows.shape
    arrived = _swap(rows, over, 0, 0, operands).reshape(devices * size, -1)
    out = grouped(fn, params, arrived, ids.reshape(-1))
    return _swap(out.reshape(devices, size, -1), over, 0, 0, None, operands)


def _follow(ship, even: int, late: int, params, rows, out, plan: _Plan) -> jax.Array:
    """`out` [choices, embed], with the rows that the first shipment had no place for.

    A loop of rounds that are known only when it runs; each is shipped again in the backward pass.
    """
    copies = out.shape[0] // rows.shape[0]

    def load(array, choices, each):
        return jnp.take(array, choices // each, axis=0, mode="fill", fill_value=0)

    def turn(r, plan):
        start = even + r * late
        return plan.copies(start, late), plan.ids(start, late)

    @jax.custom_vjp
    def follow(params, rows, out, plan):
        def body(r, out):
            choices, ids = turn(r, plan)
            new = ship(params, load(rows, choices, copies), ids)
            return out.at[choices].set(new, mode="drop")

        return lax.fori_loop(0, _together(plan.rounds), body, out)

    def backward(saved, g):
        params, rows, plan = saved

        def body(r, sums):
            choices, ids = turn(r, plan)
            sent = load(rows, choices, copies)
            back = jax.vjp(lambda params, sent: ship(params, sent, ids), params, sent)[1]
            g_params, g_sent = back(load(g, choices, 1))
            total = jax.tree.map(jnp.add, sums[0], g_params)
            return total, sums[1].at[choices].set(g_sent, mode="drop")

        zero = jax.tree.map(jnp.zeros_like, params)
        each = jnp.zeros((copies * rows.shape[0], rows.shape[1]), rows.dtype)
        g_params, each = lax.fori_loop(0, _together(plan.rounds), body, (zero, each))
        return g_params, each.reshape(-1, copies, rows.shape[1]).sum(1), g, None

    follow.defvjp(
        lambda params, rows, out, plan: (follow(params, rows, out, plan), (params, rows, plan)),
        backward,
    )
    return follow(params, rows, out, plan)


@custom_vmap
def _together(rounds: jax.Array) -> jax.Array:
    """One number of rounds for all that a `jax.vmap` maps over: a loop stays a loop."""
    return rounds


@_together.def_vmap
def _(_size, _batched, rounds):  # pyright: ignore[reportUnusedFunction]
    return _together(jnp.max(rounds)), False


def _swap(
    x: jax.Array, over: Axes, split: int, join: int, there: Any = None, back: Any = None
) -> jax.Array:
    """An all-to-all of x in the dtype `there`, of its gradient in the dtype `back`."""
    return _exchange(x, tuple(over), (split, join), (there, back)) if over else x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _exchange(x, over, dims, dtypes):
    return moved(lambda x: lax.all_to_all(x, over, *dims, tiled=True), x, dtypes[0])


_exchange.defvjp(
    lambda x, *static: (_exchange(x, *static), None),
    lambda over, dims, dtypes, _, g: (_exchange(g, over, dims[::-1], dtypes[::-1]),),
)


def _copies(rows: jax.Array, k: int) -> jax.Array:
    """[n, embed] → [n · k, embed], each row k times."""
    return jnp.broadcast_to(rows[:, None], (rows.shape[0], k, rows.shape[1])).reshape(
        -1, rows.shape[1]
    )


def _weighted(out: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
    """Σᵢ weightᵢ · outᵢ, out [tokens · k, embed], in the wider dtype of the two."""
    out = out.reshape(*weights.shape, -1)
    wide = np.promote_types(out.dtype, weights.dtype)
    return jnp.sum(out.astype(wide) * weights[..., None].astype(wide), -2).astype(x.dtype)
