"""What one product tells of the leaf in it.

A product contracts axes of the leaf with activations. Its batch axes, and the axes of which the
operand has one entry, are the leaf's stack as long as they are its first axes, and rows otherwise.
`record` measures a product and puts what it saw in its place (`compress.places`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.follow import Link, Loop, Run
from compress.observed import Observed, measure, measure_groups, products
from compress.places import Found, Place, add, size_of, spread

Links = Sequence[Link | None]


@dataclass
class Walk:
    """What all equations of one program share.

    Attributes:
        wants: whether a leaf's Hessian is wanted.
        cache: by what was made of an array; with the array, so that none takes another's id.
    """

    wants: Callable[[str], bool]
    cache: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def once(self, x: Any, key: Any, make: Callable[[], Any]) -> Any:
        """What is made of an array, once for all products of it."""
        if (id(x), key) not in self.cache:
            self.cache[id(x), key] = (x, make())
        return self.cache[id(x), key][1]

    def apart(self, x: Any) -> Any:
        """The same array, for reading: what reads it does not change how it is computed."""
        return self.once(x, "apart", lambda: lax.optimization_barrier(x))


@dataclass(frozen=True)
class _Use:
    """How a product uses a leaf.

    Attributes:
        axes: of the leaf that are contracted, negative.
        order: where each of the leaf's channels is among those of the product.
        depth: as in `Place`.
        stack: which batch axes of the product are in the stack.
        runs: their runs.
        fixed: runs in the stack that the operand has one entry of.
    """

    axes: tuple[int, ...]
    order: np.ndarray
    depth: int
    stack: tuple[int, ...]
    runs: tuple[Run, ...]
    fixed: tuple[Run, ...]


def _use(link: Link, contracted: Sequence[int], batch: Sequence[int] = ()) -> _Use | None:
    """None if it is not a product of whole input axes."""
    runs = [link.runs[a] for a in contracted]
    parts = [part for run in runs for part in run.parts]
    axes = sorted({part.axis for part in parts})
    whole = all(run.at is None and (run.parts or run.size == 1) for run in runs)
    if not axes or not whole or any(not _covers(parts, link, axis) for axis in axes):
        return None
    if any(run.traced for a, run in enumerate(link.runs) if a not in (*contracted, *batch)):
        return None  # rows that data chose are activations themselves
    order = sorted(range(len(parts)), key=lambda i: (parts[i].axis, -parts[i].inner))
    channels = np.arange(size_of(tuple(parts))).reshape([part.size for part in parts])
    own = [*link.gone, *(link.runs[a] for a in batch)]
    depth = 0
    while depth < axes[0] and _covers([p for run in own for p in run.parts], link, depth):
        depth += 1
    while cut := [r for r in own if any(p.axis < depth for p in r.parts) and not _in(r, depth)]:
        depth = min(part.axis for run in cut for part in run.parts)
    stack = tuple(i for i, a in enumerate(batch) if _in(link.runs[a], depth))
    return _Use(
        axes=tuple(axis - len(link.shape) for axis in axes),
        order=channels.transpose(order).reshape(-1),
        depth=depth,
        stack=stack,
        runs=tuple(link.runs[batch[i]] for i in stack),
        fixed=tuple(run for run in link.gone if _in(run, depth)),
    )


def _in(run: Run, depth: int) -> bool:
    return bool(run.parts) and all(part.axis < depth for part in run.parts)


def _covers(parts: Sequence[Any], link: Link, axis: int) -> bool:
    return math.prod(part.size for part in parts if part.axis == axis) == link.shape[axis]


def _record(found: Found, link: Link, use: _Use, seen: Observed) -> None:
    order = use.order

    def arranged(a: jax.Array, name: str) -> jax.Array:
        if name in ("absmax", "abssum"):
            return a[..., order]
        return a[..., order[:, None], order] if name == "hessian" else a

    if not np.array_equal(order, np.arange(len(order))):
        seen = seen.map(arranged)
    dims, fixed = [run.parts for run in use.runs], []
    for axis, run in enumerate(use.runs):
        if run.at is not None:
            seen = spread(seen, run.at, size_of(run.parts), axis)
    for run in use.fixed:
        if run.traced:
            seen = spread(seen, run.at, size_of(run.parts))
            dims.insert(0, run.parts)
        else:
            fixed.append((run.parts, run.at if isinstance(run.at, Loop) else int(run.at)))
    place = Place(link.path, link.shape, use.depth, tuple(dims), tuple(fixed))
    add(found, place, replace(seen, axes=use.axes))


def _dot(eqn: Any, values: Sequence[Any], links: Links, walk: Walk, found: Found) -> None:
    contracted, batched = eqn.params["dimension_numbers"]
    for side in range(2):
        link, other, x = links[side], links[1 - side], values[1 - side]
        if link is None or not _floating(x) or (other is not None and other.path == link.path):
            continue
        use = _use(link, contracted[side], batched[side])
        if use is None:
            continue
        lead = tuple(batched[1 - side][i] for i in use.stack)
        channels = tuple(contracted[1 - side])
        rows = tuple(i for i in range(x.ndim) if i not in (*lead, *channels))
        hessian = walk.wants(link.path)

        def one(order=(*lead, *rows, *channels), hessian=hessian, x=x) -> Observed:
            there = jnp.transpose(walk.apart(x), order)
            return measure(there, channels=len(channels), stack=len(lead), hessian=hessian)  # noqa: B023  # called within its turn of the loop

        _record(found, link, use, walk.once(x, (lead, channels, hessian), one))


def _convolution(eqn: Any, values: Sequence[Any], links: Links, walk: Walk, found: Found) -> None:
    x, link, p = values[0], links[1], eqn.params
    if link is None or not _floating(x) or p["batch_group_count"] != 1:
        return
    where = p["dimension_numbers"]
    use = _use(link, where.rhs_spec[1:])
    if use is None:
        return
    out, groups = eqn.outvars[0].aval.shape, p["feature_group_count"]
    window = [link.runs[a].size for a in where.rhs_spec[2:]]
    x = jnp.transpose(walk.apart(x), where.lhs_spec)  # [N, channels, *spatial]
    split = jnp.moveaxis(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 2, -1)
    seen = measure(split, channels=1)
    windows = np.float32(math.prod(out) // out[where.out_spec[1]] * groups)
    part = windows / np.float32(split.size // split.shape[-1])

    def everywhere(a: jax.Array, name: str) -> jax.Array:
        if name == "rows":
            return jnp.full_like(a, windows)
        if name not in ("absmax", "abssum"):
            return a
        return jnp.repeat(a * part if name == "abssum" else a, math.prod(window))

    hessian = _of_windows(x, window, groups, p) if walk.wants(link.path) else None
    seen = replace(seen.map(everywhere), kind="conv", hessian=hessian)
    _record(found, link, use, seen)


def _of_windows(x: jax.Array, window: Sequence[int], groups: int, p: Any) -> jax.Array:
    """Σ over windows of x [N, channels, *spatial], with K = [channels of a group, *window]."""
    x = x.astype(jnp.float32)
    patches = lax.conv_general_dilated_patches(
        jnp.where(jnp.isfinite(x), x, 0), window, p["window_strides"], p["padding"],
        p["lhs_dilation"], p["rhs_dilation"], precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    patches = jnp.moveaxis(patches, 1, -1)
    return products(patches.reshape(*patches.shape[:-1], groups, -1), 1)


def _ragged(eqn: Any, values: Sequence[Any], links: Links, walk: Walk, found: Found) -> None:
    x, link, d = values[0], links[1], eqn.params["ragged_dot_dimension_numbers"]
    (inner, own), (lead, _) = d.dot_dimension_numbers
    if link is None or not _floating(x) or lead or x.ndim != 2 or len(inner) != 1:
        return
    if len(d.rhs_group_dimensions) != 1:  # it is the rows that come in groups
        return
    use = _use(link, own, d.rhs_group_dimensions)
    if use is None or not use.stack:
        return
    x = walk.apart(x) if inner[0] == 1 else walk.apart(x).T
    _record(found, link, use, measure_groups(x, values[2], hessian=walk.wants(link.path)))


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


_PRODUCTS: dict[str, Callable[..., None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged,
}


def record(eqn: Any, values: Sequence[Any], links: Links, walk: Walk, found: Found) -> None:
    """Measure what the leaves in an equation met, if it is a product.

    Args:
        eqn: of a jaxpr.
        values: its operands.
        links: of the operands.
        walk: of the program that it is in.
        found: what is added to.
    """
    if (product := _PRODUCTS.get(eqn.primitive.name)) is not None:
        product(eqn, values, links, walk, found)
