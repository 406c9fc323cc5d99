"""A mixture of experts whose tokens travel: each expert lies on one device of the axis `expert`.

Tokens are sent to their experts by an all-to-all, computed, and sent back by another; the backward
pass does the same in reverse. Nothing else passes between devices but a few integers: every device
routes its own tokens, and each decides from its own group of them whom to drop. `routing` chooses
the experts, `rows` moves tokens within a device; outside a scope there is nothing more to do.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from sharding.context import current, mapped
from sharding.errors import ShardingError
from sharding.layout import fit, is_names, paths
from sharding.mesh import platform
from sharding.parallel.collect import collect
from sharding.parallel.exchange import everything, some
from sharding.parallel.routing import Load, Priority, Routing, counts
from sharding.parallel.rows import Expert, Fn, Together
from sharding.rules import BATCH, Names, Rules, mesh_axes

EXPERTS, LENGTH = "experts", "length"


def experts(
    fn: Fn,
    params: Any,
    x: jax.Array,
    routing: Routing,
    *,
    axes: Any = None,
    capacity: float | None = None,
    group: int | None = None,
    priority: Priority = "order",
    operands: DTypeLike | None = None,
    together: Together | None = None,
) -> tuple[jax.Array, Load]:
    """y = Σᵢ weightᵢ · fn(params of expertᵢ, x), over the k experts of each token.

    Without a `capacity`, every choice is computed, however uneven they are. With one, of each
    group of tokens an expert takes at most ⌈k · group / experts · capacity⌉ and the others
    contribute nothing (GShard, Lepikhin et al. 2020, arXiv:2006.16668; Switch Transformer, Fedus et
    al. 2021, arXiv:2101.03961). Groups belong to the program, not to the mesh, so the same tokens
    are dropped on every mesh.

    Over an `expert` axis of n devices with T tokens each, an all-to-all sends k T (n - 1) / n rows
    from every device, `capacity` times as many with one; there are two in the forward pass and two
    in the backward pass. Without a capacity, that is what balanced choices need; what is more than
    balanced for any pair of devices follows in rounds of an eighth, as many as it takes.

    Args:
        fn: one expert, `fn(its parameters, rows [n, embed]) -> [n, embed]`, each row for itself.
            It may hold no arrays that need gradients, and is called on rows of zeros as well.
        params: a tree with leaves [experts, ...].
        x: [batch, length, embed].
        routing: of `route`, for the logits [batch, length, experts].
        axes: a tree of names like `params`, each beginning with "experts"; what `fsdp` cuts is then
            gathered here, and its gradient reduced and scattered. By default only the first axis
            has a name.
        capacity: how many times its even share an expert takes; None drops nothing.
        group: tokens a group, a divisor of the length; a whole row by default. A capacity wants
            groups of many more than experts / k tokens, for it is rounded up; and groups that lie
            on one device where `length` is cut, else room for a whole group is sent from each.
        priority: who is dropped last: see `Priority`.
        operands: the dtype to which `fn` rounds the operands of its products, its own gradients'
            among them. So tokens, gradients and parameters [experts, in, out, ...] are rounded
            before they travel to it, and not after; what it returns travels as it is.
        together: all experts at once, `together(params, rows [n, embed], sizes int32 [experts])`,
            the first rows the first expert's, as `lax.ragged_dot` takes them. It is called in place
            of `fn` where no capacity is and such products are fast: on TPUs, unless a mesh axis
            cuts the experts' own products.

    Returns:
        y [batch, length, embed] of x's dtype, and the load.

    Raises:
        ShardingError: shapes that disagree, a group that does not divide the length; experts, rows
            or lengths that the mesh does not divide; rules that cut experts over an axis that
            does not cut the batch.

    >>> from sharding.parallel.routing import route
    >>> x = jnp.ones((1, 4, 2))
    >>> routing = route(jnp.array([[[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]]), 1)
    >>> fn = lambda scale, rows: rows * scale
    >>> y, load = experts(fn, jnp.array([2.0, 3.0]), x, routing)
    >>> y[0, :, 0], load.tokens
    (Array([2., 2., 2., 3.], dtype=float32), Array([3, 1], dtype=int32))
    >>> y, load = experts(fn, jnp.array([2.0, 3.0]), x, routing, capacity=1.0)
    >>> y[0, :, 0], load.dropped
    (Array([2., 2., 0., 3.], dtype=float32), Array(0.25, dtype=float32))
    """
    length = x.shape[1] if x.ndim == 3 else 0
    group = length if group is None else group
    _check(params, x, routing, capacity, group)
    number, k = routing.number, routing.experts.shape[-1]
    run: Any = partial(everything, operands=operands)
    if capacity is not None:
        # Rounded first: 1.1 · 10 is no 12.
        most = math.ceil(round(k * group / number * capacity, 6))
        if most < group:  # an expert is chosen once a token, so more would drop nothing
            run = partial(some, most=most, group=group, priority=priority, operands=operands)
    names = _names(params, axes)
    place = _place(params, names, x)
    if together is not None and capacity is None and _ragged(place):
        fn = Expert(fn, together)
    if place is None:
        y, kept = run(fn, params, x, routing.experts, routing.weights, number, (), ())
    else:
        y, kept = _on_mesh(run, fn, params, x, routing, place, operands)
    real = counts(routing.experts, number)
    tokens = counts(routing.experts, number, kept)
    total = jnp.maximum(jnp.sum(real), 1).astype(routing.weights.dtype)
    dropped = jnp.sum(real - tokens).astype(total.dtype) / total
    return y, Load(tokens, dropped, kept)


class _Place(NamedTuple):
    """How a scope cuts the arrays of `experts`, over the axes that are cut by hand."""

    mesh: Mesh
    manual: tuple[str, ...]
    rows: PartitionSpec  # of [batch, length, ...]
    params: Any  # a PartitionSpec a leaf, as they are stored
    over: tuple[str, ...]  # the axes of experts
    along: tuple[str, ...]  # the axes of the length


def _place(params: Any, names: Sequence[Names], x: jax.Array) -> _Place | None:
    """None outside a scope, and where nothing but single experts is cut."""
    found = current()
    if found is None:
        return None
    mesh, rules = found
    where = fit((BATCH, LENGTH, None), x.shape, mesh, rules, activation=True, path="experts: x")
    leaves, structure = jax.tree.flatten(params)
    stored = [
        fit(own, leaf.shape, mesh, rules, path=f"experts: {path}").spec
        for path, own, leaf in zip(paths(params), names, leaves, strict=True)
    ]

    def cutting(entry: Any) -> tuple[str, ...]:
        return tuple(axis for axis in mesh_axes(entry) if mesh.shape[axis] > 1)

    batch, along = cutting(where.spec[0]), cutting(where.spec[1])
    over = cutting(rules.spec((EXPERTS,))[0])
    _check_over(over, batch, mesh, rules)
    # Sorting and counting are by hand over all that cuts tokens, so that no device waits.
    manual = tuple(dict.fromkeys((*batch, *along, *over)))
    if not manual:
        return None

    rows = PartitionSpec(batch or None, along or None)
    return _Place(mesh, manual, rows, structure.unflatten(stored), over, along)


def _ragged(place: _Place | None) -> bool:
    """Whether products of uneven groups are fast where the scope's mesh is, and whole there."""
    found = current()
    if found is None or platform(found[0]) != "tpu":
        return False
    manual = () if place is None else place.manual
    return all(size == 1 for axis, size in found[0].shape.items() if axis not in manual)


def _on_mesh(
    run: Any, fn: Fn, params: Any, x: jax.Array, routing: Routing, place: _Place, operands: Any
) -> Any:
    """`run` on every device's own tokens and experts."""
    copies, doors = collect(params, place.params, place.mesh, place.manual, place.over, operands)

    def local(params, x, chosen, weights):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        return run(fn, params, x, chosen, weights, routing.number, place.over, place.along)

    return jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(doors, place.rows, place.rows, place.rows),
        out_specs=(place.rows, place.rows),
        axis_names={*place.manual, *mapped()},
        check_vma=False,
    )(copies, x, routing.experts, routing.weights)


def _names(params: Any, axes: Any) -> list[Names]:
    """The names of each leaf, checked."""
    leaves = jax.tree.leaves(params)
    if axes is None:
        return [(EXPERTS, *[None] * (leaf.ndim - 1)) for leaf in leaves]
    if jax.tree.structure(axes, is_leaf=is_names) != jax.tree.structure(params):
        raise ShardingError(
            f"experts: axes {jax.tree.structure(axes, is_leaf=is_names)} are not those of the "
            f"parameters {jax.tree.structure(params)}; give one tuple of names a leaf"
        )
    names = jax.tree.leaves(axes, is_leaf=is_names)
    for path, own in zip(paths(params), names, strict=True):
        if own[:1] != (EXPERTS,):
            raise ShardingError(
                f"experts: {path} has the axes {own}; expected {EXPERTS!r} first, for each expert "
                f"has its own"
            )
    return names


def _check(params: Any, x: jax.Array, routing: Routing, capacity: float | None, group: int) -> None:
    number = routing.number
    if x.ndim != 3 or routing.experts.shape[:-1] != x.shape[:2]:
        raise ShardingError(
            f"experts: x {x.shape} and routing for tokens {routing.experts.shape[:-1]}; expected "
            f"x [batch, length, embed] and logits [batch, length, experts] of the same tokens"
        )
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if leaf.shape[:1] != (number,):
            raise ShardingError(
                f"experts: {path} has shape {leaf.shape}, but the router chooses among {number} "
                f"experts; expected [{number}, ...]"
            )
    if capacity is not None and not capacity > 0:
        raise ShardingError(f"experts: capacity {capacity}; expected more than 0, or None")
    if not (group > 0 and x.shape[1] % group == 0):
        raise ShardingError(
            f"experts: groups of {group} tokens do not divide the length {x.shape[1]}; use a "
            f"divisor of it"
        )


def _check_over(over: Sequence[str], batch: Sequence[str], mesh: Mesh, rules: Rules) -> None:
    for axis in over:
        if axis not in batch:
            raise ShardingError(
                f"experts: rules cut {EXPERTS!r} over {axis}={mesh.shape[axis]}, but {BATCH!r} "
                f"over {rules.table[BATCH]!r}: tokens must lie on the devices of {axis!r} to be "
                f"exchanged among them. Map {BATCH!r} to {axis!r} too, or {EXPERTS!r} elsewhere"
            )
