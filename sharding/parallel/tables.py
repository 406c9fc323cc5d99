"""Embedding tables larger than a device: ids go to the rows' owners, rows come back, and only they.

A table [count, size] is cut by rows, by columns, or not at all; `placement` says which by its size.
`fetch` reads the rows of a batch's ids, `update` changes them by their gradients: both touch as
many rows as the batch has, however long the table is, and no array of the table's size is made.
They are plain functions on one device, and the same numbers on any mesh.

Rows that many ask for travel once to each device. What is sent has a fixed size, a little more than
an even share of all rows for each owner; what does not fit goes in further rounds, as many as it
takes. `linear.lookup` is for tables that are used whole elsewhere, too, such as those of words;
`topk` finds the best rows of a whole table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding import context
from sharding.errors import ShardingError
from sharding.parallel.cuts import Cuts
from sharding.parallel.rows import sort, starts
from sharding.rules import Names, mesh_axes

BY_ROWS: Names = ("rows", None)
BY_COLUMNS: Names = (None, "columns")
WHOLE: Names = (None, None)

SMALL = 2**18
"""Bytes up to which a table is whole on every device."""
FEW = 256
"""Rows a device below which a table that is not small is cut by columns, if it can be."""
NARROW = 4
"""Columns that a device has at least."""
MULTIPLE = 1024
"""Tables that are cut by rows have a multiple of so many, for every mesh that divides it."""

_NONE = jnp.iinfo(jnp.int32).max  # sorts behind all ids

Rule = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
"""An optimiser of rows: `rule(rows [n, size], their state, gradients [n, size]) -> (rows, state)`,
each row for itself."""


class Placement(NamedTuple):
    """How a table should be cut.

    Attributes:
        names: of its two axes.
        reason: why, for a person.
    """

    names: Names
    reason: str


def placement(count: int, size: int, devices: int = 8) -> Placement:
    """Chooses by its size how a float32 table is cut.

    Small ones are whole: no row has to travel before it is used. Large ones are cut by rows, so
    that each device sends and keeps the fewest bytes. Between them are tables of few, long rows:
    by rows, a popular one would keep its owner busy while the others wait, and by columns all
    devices share each row.

    Args:
        count: rows.
        size: columns.
        devices: on which it will lie at least; a model need not know how many there will be.

    >>> placement(10**7, 16).names, placement(1000, 16).names, placement(1000, 512).names
    (('rows', None), (None, None), (None, 'columns'))
    >>> placement(1000, 16).reason
    'whole: 62 KiB on every device are less trouble than sending rows'
    """
    amount = 4 * count * size
    if amount <= SMALL:
        trouble = "on every device are less trouble than sending rows"
        return Placement(WHOLE, f"whole: {amount // 1024} KiB {trouble}")
    if count < FEW * devices and size % devices == 0 and size // devices >= NARROW:
        few = f"{count} rows are too few for {devices} devices to be asked for equally often"
        return Placement(BY_COLUMNS, f"by columns: {few}")
    return Placement(BY_ROWS, f"by rows: {amount / 2**20:.1f} MiB are shared by all devices")


def fetch(table: jax.Array, ids: jax.Array, *, names: Names = BY_ROWS) -> jax.Array:
    """The rows of a table.

    By rows: each device sorts out its different ids, sends each to its owner and gets a row back,
    both by all-to-all over the mesh axes that cut the batch. For m ids a device on n devices, a
    round has room for 1.25 m / n ids an owner: a device sends 1.25 m (n - 1) / n ids and as many
    rows. If all different ids of a device have one owner, there are n / 1.25 rounds of that.
    By columns: all ids go to all, and one all-to-all brings back the columns of m rows.
    Whole: nothing travels.

    On a mesh that cuts the batch there is no gradient by the table, which would be as large: take
    it by the rows, and give it to `update`.

    Args:
        table: [count, size].
        ids: int32 [batch, ...]; negative, or `count` and more, for no row.
        names: the logical axes of the table.

    Returns:
        [*ids.shape, size], zeros for no row.

    Raises:
        ShardingError: shapes that do not fit, a table cut over other axes than the batch is, or a
            gradient by a table that is cut.

    >>> fetch(jnp.eye(3), jnp.array([[2, -1]], jnp.int32))
    Array([[[0., 0., 1.],
            [0., 0., 0.]]], dtype=float32)
    """
    cut = _cut("fetch", table, ids, names)
    if cut is None or not (cut.rows or cut.columns):
        return _take(table, ids)

    def body(table: jax.Array, ids: jax.Array) -> jax.Array:
        flat = ids.reshape(-1)
        if cut.columns:
            rows = _take(table, lax.all_gather(flat, cut.columns, tiled=True))
            rows = lax.all_to_all(rows, cut.columns, split_axis=0, concat_axis=1, tiled=True)
        else:
            rows = _ask(table, flat, cut.rows)
        return rows.reshape(*ids.shape, -1)

    def refuse(_, __):
        raise ShardingError(
            f"fetch: a gradient by a table {names} that the mesh cuts; differentiate by its rows, "
            "and give their gradient to tables.update"
        )

    out = PartitionSpec(*cut.ids, None)
    call = _mapped(cut, body, (cut.table, cut.ids), out)
    there = jax.custom_vjp(call)
    there.defvjp(lambda *args: (call(*args), None), refuse)
    return there(table, ids)


def update(
    table: jax.Array,
    state: Any,
    ids: jax.Array,
    grads: jax.Array,
    rule: Rule,
    *,
    names: Names = BY_ROWS,
) -> tuple[jax.Array, Any]:
    """Changes the rows of a table by the gradients of what `fetch` gave.

    Gradients of one row are added up, first on each device, then where the row is, and the rule is
    applied once. They go the way of `fetch`: by rows, each device sends 1.25 m (n - 1) / n ids and
    gradients a round; a round ends with the rows of which all gradients are there, so the rest goes
    in further rounds, up to n / 1.25 where one device's ids have one owner, and n times as many
    where no two devices' do and all ids have one owner.
    By columns, m gradients are exchanged. A table that is whole over some of the batch's axes gets
    the gradients of all devices along those.

    Args:
        table: [count, size]; donate it and its state, and they are changed in place.
        state: a tree of arrays [count, ...]; those with a second axis are cut as the table is.
        ids: int32 [batch, ...], as for `fetch`.
        grads: [*ids.shape, size].
        rule: the optimiser.
        names: the logical axes of the table. If it is cut by columns, the rule sees its part of the
            columns: what it computes of a whole row must go through `row_mean`.

    Returns:
        table and state.

    Raises:
        ShardingError: as `fetch`.

    >>> sgd = lambda rows, state, grads: (rows - grads, state)
    >>> ids, grads = jnp.array([2, 0, 2], jnp.int32), jnp.ones((3, 1))
    >>> update(jnp.zeros((4, 1)), {}, ids, grads, sgd)[0].ravel()
    Array([-1.,  0., -2.,  0.], dtype=float32)
    """
    if grads.shape != (*ids.shape, table.shape[1]):
        raise ShardingError(
            f"update: expected gradients {(*ids.shape, table.shape[1])}, got {grads.shape}"
        )
    cut = _cut("update", table, ids, names)
    if cut is None:
        return _apply(table, state, ids.reshape(-1), grads.reshape(-1, grads.shape[-1]), rule, 0)
    where_state = jax.tree.map(lambda x: PartitionSpec(*cut.table[: x.ndim]), state)

    def body(table, state, ids, grads):
        ids, grads = ids.reshape(-1), grads.reshape(-1, grads.shape[-1])
        if cut.columns:
            ids = lax.all_gather(ids, cut.columns, tiled=True)
            grads = lax.all_to_all(grads, cut.columns, split_axis=1, concat_axis=0, tiled=True)
        if cut.rest:
            ids, grads = lax.all_gather(_summed(ids, grads), cut.rest, tiled=True)
        if cut.rows:
            return _tell(table, state, ids, grads, rule, cut.rows)
        with _columns(cut.columns):
            return _apply(table, state, ids, grads, rule, 0)

    places = (cut.table, where_state)
    specs = (*places, cut.ids, PartitionSpec(*cut.ids, None))
    return _mapped(cut, body, specs, places)(table, state, ids, grads)


# The mesh axes that cut the columns that a rule sees.
_columns = jax.make_user_context(())


def row_mean(x: jax.Array) -> jax.Array:
    """The mean of each row, for rules: over all its columns, wherever they are.

    >>> row_mean(jnp.array([[1.0, 3.0]]))
    Array([2.], dtype=float32)
    """
    mean = jnp.mean(x, axis=-1)
    return lax.pmean(mean, _columns.value) if _columns.value else mean


class _Cut(NamedTuple):
    """How the scope's mesh cuts a table and ids: the specs, and the mesh axes by what they cut."""

    table: PartitionSpec
    ids: PartitionSpec
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    rest: tuple[str, ...]  # cut the batch, and not the table
    cuts: Cuts


def _cut(what: str, table: jax.Array, ids: jax.Array, names: Names) -> _Cut | None:
    if table.ndim != 2 or ids.ndim < 1 or ids.dtype != jnp.int32:
        raise ShardingError(
            f"{what}: expected a table [count, size] and ids int32 [batch, ...], got "
            f"{table.shape} and {ids.dtype}{list(ids.shape)}"
        )
    cuts = Cuts.current()
    if cuts is None:
        return None
    stored = cuts.stored(names, table.shape, f"{what}: table")
    where = cuts.flown(("batch", *[None] * (ids.ndim - 1)), ids.shape, f"{what}: ids")
    rows, columns, batch = map(mesh_axes, (*stored, where[0]))
    if (rows and columns) or {*rows, *columns} - {*batch}:
        raise ShardingError(
            f"{what}: the mesh cuts a table {names} as {tuple(stored)} and the batch over {batch}; "
            "a table is cut by rows or by columns, over axes that cut the batch: change the rules"
        )
    rest = tuple(axis for axis in batch if axis not in rows + columns)
    found = _Cut(stored, where, rows, columns, rest, cuts)
    return found if batch else None


def _mapped(cut: _Cut, body: Any, in_specs: Any, out_specs: Any) -> Any:
    # Over all axes: along those that cut nothing, devices do the same. Nothing is differentiated
    # here, so nobody needs to know what varies over which.
    mapped = context.mapped()
    axes = {*cut.cuts.mesh.axis_names, *mapped}
    return jax.shard_map(
        body,
        mesh=cut.cuts.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes,
        check_vma=False,
    )


@jax.custom_jvp
def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of a part of a table, zeros for ids that it has not."""
    there = (ids >= 0) & (ids < table.shape[0])
    rows = jnp.take(table, jnp.where(there, ids, 0), axis=0, mode="clip")
    # As integers: what becomes of rows, such as bfloat16, XLA would else make of the whole table
    # before it reads them (a TPU's, of every table in every step).
    bits = lax.bitcast_convert_type(rows, f"int{8 * table.dtype.itemsize}")
    bits = jnp.where(there[..., None], bits, jnp.zeros((), bits.dtype))
    return lax.bitcast_convert_type(bits, table.dtype)


@_take.defjvp
def _(primals, tangents):
    table, ids = primals
    ids = jnp.where(ids < 0, table.shape[0], ids)
    return _take(*primals), jnp.take(tangents[0], ids, axis=0, mode="fill", fill_value=0)


class _Distinct(NamedTuple):
    """The different ids among some.

    Attributes:
        ids: int32 [m], ascending, then `_NONE`s.
        order: int32 [m], where the ids in ascending order came from.
        place: int32 [m], for each of these its place in `ids`.
    """

    ids: jax.Array
    order: jax.Array
    place: jax.Array


def _distinct(ids: jax.Array) -> _Distinct:
    ordered, order = sort(jnp.where(ids < 0, _NONE, ids))
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    place = jnp.cumsum(new, dtype=jnp.int32) - 1
    different = jnp.full(ids.shape, _NONE, jnp.int32).at[place].min(ordered)
    return _Distinct(different, order, place)


def _summed(ids: jax.Array, grads: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The different ids [m], ascending, and the sum of each one's gradients [m, size]."""
    found = _distinct(ids)
    sums = jax.ops.segment_sum(
        jnp.take(grads, found.order, axis=0), found.place, ids.shape[0], indices_are_sorted=True
    )
    return found.ids, sums


def _apply(table, state, ids, grads, rule: Rule, first):
    """Changes the rows of a part of a table, which begins at row `first`, in place."""
    ids, sums = _summed(ids, grads)
    count, spare = table.shape[0], lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    local = ids - first
    # Those that are nowhere go before row 0, each to a place of its own: behind the end of a table
    # of nearly 2³¹ rows there is none.
    local = jnp.where((ids != _NONE) & (local >= 0) & (local < count), local, -1 - spare)
    old = jax.tree.map(lambda x: jnp.take(x, local, axis=0, mode="clip"), (table, state))
    new = rule(old[0], old[1], sums)

    def put(whole, rows):
        return whole.at[local].set(
            rows, mode="drop", unique_indices=True, wrap_negative_indices=False
        )

    return jax.tree.map(put, (table, state), new)


class _Queues(NamedTuple):
    """The different ids of a device in the order of their owners; each has room for some a round.

    Attributes:
        ids: int32 [m], ascending.
        begin: int32 [n + 1], where those of each owner begin.
        room: ids an owner a round.
    """

    ids: jax.Array
    begin: jax.Array
    room: int

    def asked(self, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The places [n, room] of those that go in a round, from `start` [n] on, and their ids."""
        place = start[:, None] + lax.broadcasted_iota(jnp.int32, (1, self.room), 1)
        ids = jnp.take(self.ids, place, mode="clip")
        return place, jnp.where(place < self.begin[1:, None], ids, _NONE)


def _queues(ids: jax.Array, block: int, axes: tuple[str, ...]) -> tuple[_Queues, bool]:
    """The queues of different ids, and whether one round is enough whatever they are."""
    n, m = lax.axis_size(axes), ids.shape[0]
    even = -(-m // n)
    most = min(m, block)
    room = min(even + even // 4 + 1, most)
    begin = starts(jnp.where(ids == _NONE, n, ids // block), n)
    return _Queues(ids, begin, room), room == most


def _ask(table: jax.Array, ids: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The rows [m, size] of ids [m], from the owners along `axes`."""
    block, size = table.shape
    n, first = lax.axis_size(axes), lax.axis_index(axes) * block
    ids = jnp.where((ids >= 0) & (ids < n * block), ids, -1)
    found = _distinct(ids)
    queues, enough = _queues(found.ids, block, axes)
    owner = jnp.minimum(jnp.where(found.ids == _NONE, n, found.ids // block), n)
    place = lax.broadcasted_iota(jnp.int32, ids.shape, 0) - jnp.take(queues.begin, owner)

    def turn(r, rows):
        asked = queues.asked(queues.begin[:-1] + r * queues.room)[1]
        arrived = _swap(asked, axes)
        given = _take(table, jnp.where(arrived == _NONE, -1, arrived - first))
        given = _swap(given, axes).reshape(-1, size)
        at = place - r * queues.room
        here = (at >= 0) & (at < queues.room) & (owner < n)
        new = jnp.take(given, jnp.where(here, owner * queues.room + at, 0), axis=0)
        return jnp.where(here[:, None], new, rows)

    rows = turn(0, jnp.zeros((ids.shape[0], size), table.dtype))
    if not enough:
        rounds = -(-lax.pmax(jnp.max(jnp.diff(queues.begin)), axes) // queues.room)
        rows = lax.fori_loop(1, rounds, turn, rows)
    place = jnp.zeros(ids.shape, jnp.int32).at[found.order].set(found.place, unique_indices=True)
    return jnp.take(rows, place, axis=0)


def _tell(table, state, ids, grads, rule: Rule, axes: tuple[str, ...]):
    """Changes the rows of ids [m] by their gradients [m, size], at the owners along `axes`.

    A rule may not see a row twice, so a round is done with a row when no device has more of it. All
    send in the order of ids. Each says which it will send next, and what comes before all of those
    is done; the rest is sent again.
    """
    block, n = table.shape[0], lax.axis_size(axes)
    first = lax.axis_index(axes) * block
    ids = jnp.where((ids >= 0) & (ids < n * block), ids, -1)
    ids, sums = _summed(ids, grads)
    queues, enough = _queues(ids, block, axes)

    def turn(carry):
        table, state, done = carry
        place, asked = queues.asked(starts_at(done))
        told = jnp.where((asked != _NONE)[..., None], jnp.take(sums, place, axis=0, mode="clip"), 0)
        told = _swap(told, axes).reshape(n * queues.room, -1)
        if enough:
            arrived, until = _swap(asked, axes).reshape(-1), jnp.array(_NONE)
        else:
            last = place[:, -1] + 1
            after = jnp.where(last < queues.begin[1:], jnp.take(ids, last, mode="clip"), _NONE)
            both = _swap(jnp.concatenate([asked, after[:, None]], 1), axes)
            until = jnp.min(both[:, -1])
            arrived = jnp.where(both[:, :-1] < until, both[:, :-1], _NONE).reshape(-1)
        table, state = _apply(table, state, arrived, told, rule, first)
        return table, state, until

    def starts_at(done):
        return jnp.sum(ids < done[:, None], 1, dtype=jnp.int32)

    def again(carry):
        return turn((*carry[:2], lax.all_gather(carry[2], axes)))

    begin = lax.broadcasted_iota(jnp.int32, (n,), 0) * block
    carry = turn((table, state, begin))
    if not enough:
        more = lambda carry: lax.pmin(carry[2], axes) != _NONE  # noqa: E731
        carry = lax.while_loop(more, again, carry)
    return carry[:2]


def _swap(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)
