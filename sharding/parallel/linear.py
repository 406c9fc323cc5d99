"""Products with stored parameters, and look-ups in them, their communication written out.

Left alone, the compiler cuts a program well on the way forward. On the way back some backends
all-reduce a whole weight gradient of which each device keeps a part, all-reduce one by one the
input gradients of several products of one input, or gather a whole table to look up a few rows.
`linear` and `lookup` say which collectives there are, so there are no others on any platform:
a kernel is gathered over the axes that cut it only where it is stored, and its gradient is
reduce-scattered to there; what several products owe their common input is summed, then all-reduced;
rows of tables that are cut along their length travel to those who asked, not the tables.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from sharding.errors import ShardingError
from sharding.mesh import AXES, platform
from sharding.parallel.cuts import Cuts, summable, vary, whole
from sharding.rules import Names, mesh_axes

ROWS: Names = ("batch", "length")

PRODUCT = "product"
"""What the policies of `jax.checkpoint` may call the results of `linear`."""


def linear(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    names: Names,
    *,
    rows: Names = ROWS,
    out_rows: Names | None = None,
    head: int | None = None,
) -> list[jax.Array]:
    """x · kernel for each kernel: the products of a dense layer, or of several that share x.

    In a `scope` for differentiation whose mesh cuts x or the kernels, as Megatron-LM (Shoeybi et
    al. 2019, arXiv:1909.08053) and ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) have it.
    Everywhere else, and where kernels are cut over axes that cut neither x nor the products, which
    is then the compiler's to solve, `jnp.matmul`.

    Args:
        x: [..., K].
        kernels: [K, N] each.
        names: the two logical axes of every kernel.
        rows: the names of the leading axes of x.
        out_rows: those of the products, where they are cut otherwise: what cuts x alone is
            gathered before, what cuts the products alone is scattered as they are summed
            (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
        head: the size of a head, where an axis named "heads" holds the elements of one after
            another. A TPU's product then has an axis of heads, and its compiler writes each head
            as attention reads it; written flat, each is copied.

    Returns:
        [..., N] each, which policies of `jax.checkpoint` may keep by the name `PRODUCT`.

    Raises:
        ShardingError: ranks that differ from the names, or sizes that the mesh does not divide.

    >>> x, w = jnp.ones((2, 3, 4)), jnp.ones((4, 8))
    >>> [y.shape for y in linear(x, [w, w], ("embed", "heads"))]
    [(2, 3, 8), (2, 3, 8)]
    """
    if len(names) != 2 or len(rows) != x.ndim - 1:
        raise ShardingError(
            f"linear: x has rank {x.ndim}, kernels have rank 2: expected {x.ndim - 1} names of "
            f"rows and two of a kernel's axes, got {rows} and {names}"
        )
    ys = _products(x, kernels, names, rows, out_rows or rows, head)
    return [checkpoint_name(y, PRODUCT) for y in ys]


def _products(
    x: jax.Array, kernels: Sequence[jax.Array], names: Names, rows: Names, out_rows: Names,
    head: int | None,
) -> list[jax.Array]:  # fmt: skip
    cuts = Cuts.differentiated()
    if cuts is None:
        return [jnp.matmul(x, kernel) for kernel in kernels]
    inner, outer = names
    where_x = cuts.flown((*rows, inner), x.shape, "linear: x")
    where_ys = [
        cuts.flown((*out_rows, outer), (*x.shape[:-1], kernel.shape[1]), "linear: y")
        for kernel in kernels
    ]
    stored = [cuts.stored(names, kernel.shape, "linear: kernel") for kernel in kernels]
    axes = cuts.of(where_x, *where_ys)
    multiply = jnp.matmul
    if platform(cuts.mesh) == "tpu":
        multiply = _by_heads(names, head) if head else multiply
        if x.dtype == jnp.bfloat16 and inner == "mlp":
            multiply = partial(_kernel_first, multiply)
    # By axis of the rows: what cuts x alone, and the products alone.
    gathers = [_but(e, mesh_axes(o)) for e, o in zip(where_x, where_ys[0], strict=True)][:-1]
    scatters = [_but(o, mesh_axes(e)) for e, o in zip(where_x, where_ys[0], strict=True)][:-1]
    inside = mesh_axes(where_x[-1])  # over these, a product of parts is a part of the sum
    apart = [
        (lies, (inside, mesh_axes(goes[-1]))) for lies, goes in zip(stored, where_ys, strict=True)
    ]
    nested = all(_nested(*pair) for lies, kept in apart for pair in zip(lies, kept, strict=True))
    # Whole, or kernels cut where no row is, or in an order that no gathering undoes: unusual.
    summed = {axis for place in scatters for axis in place} <= {*inside}
    if not axes or cuts.of(*stored) - axes or not nested or not summed:
        return [jnp.matmul(x, kernel) for kernel in kernels]

    def body(x: jax.Array, *kernels: jax.Array) -> list[jax.Array]:
        x = vary(x, where_x, axes)
        for place, over in enumerate(gathers):
            x = whole(x, over, place)
        ys = []
        for part, lies, goes in zip(kernels, stored, where_ys, strict=True):
            kernel = whole(vary(part, lies, axes), _but(lies[0], inside), 0)
            kernel = whole(kernel, _but(lies[1], mesh_axes(goes[-1])), 1)
            y = multiply(x, kernel)
            for place, over in enumerate(scatters):
                if over:
                    scatter = partial(
                        lax.psum_scatter, axis_name=over, scatter_dimension=place, tiled=True
                    )
                    y = summable(scatter, y)
            rest = tuple(a for a in inside if all(a not in over for over in scatters))
            ys.append(summable(partial(lax.psum, axis_name=rest), y) if rest else y)
        return ys

    return cuts.shard_map(body, (where_x, *stored), where_ys, axes)(x, *kernels)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_first(multiply, x, kernel):
    """A product whose kernel's gradient is computed before that of x.

    Then it is on its way to where it is stored while the other is computed, and x is free; left
    alone, a TPU's compiler computes kernels' gradients last, and holds all that they need.
    """
    return multiply(x, kernel)


def _kernel_first_bwd(multiply, saved, g):
    x, kernel = saved
    (dkernel,) = jax.vjp(lambda kernel: multiply(x, kernel), kernel)[1](g)
    dkernel, g = lax.optimization_barrier((dkernel, g))
    (dx,) = jax.vjp(lambda x: multiply(x, kernel), x)[1](g)
    return dx, dkernel


_kernel_first.defvjp(lambda multiply, x, k: (multiply(x, k), (x, k)), _kernel_first_bwd)


def _by_heads(names: Names, head: int):
    """`jnp.matmul` with an axis of heads in the product; see `linear`."""

    def out(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = jnp.einsum("...k,khd->...hd", x, kernel.reshape(kernel.shape[0], -1, head))
        return y.reshape(*x.shape[:-1], kernel.shape[1])

    def into(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-1], -1, head)
        return jnp.einsum("...hd,hdn->...n", x, kernel.reshape(-1, head, kernel.shape[1]))

    if names[1] == "heads":
        return out
    return into if names[0] == "heads" else jnp.matmul


def lookup(
    tables: Sequence[jax.Array],
    ids: Sequence[jax.Array],
    names: Sequence[Names],
    *,
    rows: Names = ROWS,
) -> jax.Array:
    """Σ table[id] over one or several tables: an embedding, or a sum of embeddings.

    In a `scope` for differentiation: each device looks up its part of the columns for all rows of
    those who hold the other parts, the tables' rows are summed, and one all-to-all brings rows
    and whole columns together. A table cut along its ids adds an all-reduce, as in Megatron-LM.
    Everywhere else, and for tables cut unlike each other or over axes that cut ids, `jnp.take`. Ids
    out of range take the nearest row.

    Args:
        tables: [count, size] each, of one size.
        ids: int, `rows` each, or a scalar for one row everywhere.
        names: the two logical axes of each table.
        rows: the names of the axes of ids.

    Returns:
        [*rows, size].

    Raises:
        ShardingError: as `linear`.

    >>> lookup([jnp.eye(3), jnp.ones((1, 3))], [jnp.array([[2, 0]]), jnp.array(0)],
    ...        [("vocab", "embed"), ("types", "embed")])
    Array([[[1., 1., 2.],
            [2., 1., 1.]]], dtype=float32)
    """
    cuts = Cuts.differentiated()
    if cuts is None:
        return _sum([_take(table, i, ()) for table, i in zip(tables, ids, strict=True)])
    shape = max((i.shape for i in ids), key=len)
    size = tables[0].shape[1]
    where_ids = [cuts.flown(rows if i.ndim else (), i.shape, "lookup: ids") for i in ids]
    where_y = cuts.flown((*rows, names[0][1]), (*shape, size), "lookup: rows")
    stored = [cuts.stored(n, t.shape, "lookup: table") for n, t in zip(names, tables, strict=True)]
    axes = cuts.of(*where_ids, where_y)
    columns = {mesh_axes(lies[1]) for lies in stored}
    travel = _but(stored[0][1], mesh_axes(where_y[-1]))
    by_ids = cuts.of(*[PartitionSpec(lies[0]) for lies in stored])
    usual = (
        len(columns) == 1
        and len({mesh_axes(lies[0]) for lies in stored if lies[0]}) <= 1
        and mesh_axes(where_y[-1]) == ()
        and {*travel} <= {*mesh_axes(where_y[0])}
        and not by_ids & axes  # ids are the same on all who hold other rows of a table
    )
    if not usual or not axes | by_ids:
        return _sum([_take(table, i, ()) for table, i in zip(tables, ids, strict=True)])
    axes |= by_ids

    def body(*args: jax.Array) -> jax.Array:
        here, apart = [], []  # rows that every device finds, and rows that one of several does
        for lies, where, table, own in zip(
            stored, where_ids, args[: len(tables)], args[len(tables) :], strict=True
        ):
            cut = mesh_axes(lies[0])
            over = axes if cut else axes - by_ids
            i = whole(vary(own, where, over), travel if own.ndim else (), 0)
            found = _take(vary(table, lies, over), i, cut)
            (apart if cut else here).append(found)
        if apart:
            over = tuple(a for a in AXES if a in by_ids)
            here.append(summable(partial(lax.psum, axis_name=over), _sum(apart)))
        y = _sum(here)
        if travel:
            y = lax.all_to_all(y, travel, split_axis=0, concat_axis=y.ndim - 1, tiled=True)
        return y

    return cuts.shard_map(body, (*stored, *where_ids), where_y, axes)(*tables, *ids)


def _sum(parts: list[jax.Array]) -> jax.Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _take(table: jax.Array, ids: jax.Array, cut: tuple[str, ...]) -> jax.Array:
    """Rows of a table; zeros for the ids of others, where `cut` says who holds which."""
    if not cut:
        return jnp.take(table, ids, axis=0, mode="clip")
    count = table.shape[0]
    ids = jnp.clip(ids, 0, count * lax.axis_size(cut) - 1) - lax.axis_index(cut) * count
    mine = (ids >= 0) & (ids < count)
    rows = jnp.take(table, jnp.where(mine, ids, 0), axis=0, mode="clip")
    return jnp.where(mine[..., None], rows, jnp.zeros((), rows.dtype))


def _nested(entry, kept: tuple[str, ...]) -> bool:
    """Whether what is cut over other axes lies within the parts that stay: then they are gathered.

    >>> _nested(("tensor", "fsdp"), ("tensor",)), _nested(("fsdp", "tensor"), ("tensor",))
    (True, False)
    """
    stays = tuple(axis for axis in mesh_axes(entry) if axis in kept)
    return mesh_axes(entry)[: len(stays)] == stays


def _but(entry, kept: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in mesh_axes(entry) if axis not in kept)
