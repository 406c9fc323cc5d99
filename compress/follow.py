"""Where the axes of a value lie in the parameter that it was made of.

A kernel seldom meets activations as it is stored: layers are cut out of a stack, heads are split
from features, axes are moved. A `Link` says of every axis of such a value along which of the leaf's
axes it runs, and which of their entries it has. `follow` carries links through the primitives that
only rearrange; after any other, a value is no parameter any more.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


@dataclass(frozen=True)
class Part:
    """A factor of one of the leaf's axes: entry e of it is (e // inner) % size of the axis."""

    axis: int
    size: int
    inner: int = 1


Parts = tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """What an axis of a value runs along.

    Attributes:
        size: of the axis.
        parts: of the leaf's axes, the outermost first; none for an axis that the leaf has not.
        at: which entries of the parts it has: None for all, int [size], traced or not. Where the
            axis is gone, a scalar, or the `Loop` whose iterations each have one.
    """

    size: int
    parts: Parts
    at: Any = None

    def take(self, index: Any, size: int) -> "Run":
        """Some of its entries, int [size]."""
        if not self.parts:
            return Run(size, ())
        return Run(size, self.parts, index if self.at is None else _at(self.at, index))

    def one(self, index: Any) -> "Run":
        """One of its entries, as an axis that is gone."""
        return Run(1, self.parts, index if self.at is None else _at(self.at, index))

    @property
    def traced(self) -> bool:
        """Whether data say which entries it has."""
        return isinstance(self.at, jax.Array)


@dataclass(frozen=True, eq=False)
class Loop:
    """A scan over an axis: it stands for the entry that an iteration has."""

    run: Run


@dataclass(frozen=True, eq=False)
class Link:
    """How a value is made of a leaf.

    Attributes:
        path: of the leaf.
        shape: of the leaf.
        runs: one for each axis of the value.
        gone: axes of which the value has one entry and that it lacks.
    """

    path: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    gone: tuple[Run, ...] = ()

    @classmethod
    def to(cls, path: str, shape: Sequence[int]) -> "Link":
        """That of the leaf itself."""
        return cls(path, tuple(shape), tuple(Run(n, (Part(i, n),)) for i, n in enumerate(shape)))

    def without(self, axes: Iterable[int]) -> "Link":
        """Without axes of size 1."""
        dropped = set(axes)
        lost = [run.one(0) for i, run in enumerate(self.runs) if i in dropped and run.parts]
        kept = tuple(run for i, run in enumerate(self.runs) if i not in dropped)
        return replace(self, runs=kept, gone=(*self.gone, *lost))

    def changed(self, axis: int, run: Run) -> "Link":
        """With another run for an axis."""
        return replace(self, runs=(*self.runs[:axis], run, *self.runs[axis + 1 :]))


def follow(eqn: Any, values: Sequence[Any], links: Sequence[Link | None]) -> list[Link | None]:
    """The links of an equation's results.

    Args:
        eqn: of a jaxpr.
        values: its operands.
        links: of the operands, None for what is no parameter.

    Returns:
        One for each result.
    """
    name, results = eqn.primitive.name, len(eqn.outvars)
    if name == "optimization_barrier":
        return list(links)
    rule, link = _RULES.get(name), links[0]
    if rule is None or link is None or any(other is not None for other in links[1:]):
        return [None] * results
    out = rule(link, eqn, *values[1:])
    return out if isinstance(out, list) else [out] * results


def _same(link: Link, eqn: Any, *_: Any) -> Link | None:
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return link if floating else None


def _transpose(link: Link, eqn: Any) -> Link:
    return replace(link, runs=tuple(link.runs[i] for i in eqn.params["permutation"]))


def _squeeze(link: Link, eqn: Any) -> Link:
    return link.without(i % len(link.runs) for i in eqn.params["dimensions"])


def _slice(link: Link, eqn: Any) -> Link:
    p = eqn.params
    strides = p["strides"] or [1] * len(link.runs)
    for axis, ends in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        index = np.arange(*ends)
        if len(index) < link.runs[axis].size:
            link = link.changed(axis, link.runs[axis].take(index, len(index)))
    return link


def _split(link: Link, eqn: Any) -> list[Link | None]:
    axis, start, out = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        index = np.arange(start, start + size)
        out.append(link.changed(axis, link.runs[axis].take(index, len(index))))
        start += size
    return out


def _reverse(link: Link, eqn: Any) -> Link:
    for axis in eqn.params["dimensions"]:
        run = link.runs[axis]
        link = link.changed(axis, run.take(np.arange(run.size)[::-1], run.size))
    return link


def _dynamic_slice(link: Link, eqn: Any, *starts: Any) -> Link:
    for axis, (size, start) in enumerate(zip(eqn.params["slice_sizes"], starts, strict=True)):
        run = link.runs[axis]
        if size < run.size:
            first = jnp.clip(jnp.asarray(start), 0, run.size - size)
            index = first + jnp.arange(size, dtype=first.dtype)
            link = link.changed(axis, run.take(index, size))
    return link


def _gather(link: Link, eqn: Any, indices: Any) -> Link | None:
    """Whole slices along one axis, by a vector of indices or a single one."""
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    cut = [i for i, run in enumerate(link.runs) if sizes[i] != run.size]
    if not cut and len(d.start_index_map) == 1:
        cut = [d.start_index_map[0]]  # of an axis of size 1
    indices = jnp.asarray(indices)
    if len(cut) != 1 or sizes[cut[0]] != 1 or d.operand_batching_dims or indices.ndim > 2:
        return None
    axis = cut[0]
    if axis not in d.start_index_map:
        return None
    index = indices[..., d.start_index_map.index(axis)]
    run = link.runs[axis]
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        index = jnp.clip(index, 0, run.size - 1)
    taken = [run.take(index, index.shape[0])] if index.ndim else []
    link = link.changed(axis, Run(1, ()) if taken else run.take(index[None], 1))
    link = link.without(d.collapsed_slice_dims)
    runs = list(link.runs)
    for place in range(len(eqn.outvars[0].aval.shape)):
        if place not in d.offset_dims:
            runs.insert(place, taken.pop())
    return replace(link, runs=tuple(runs))


def _broadcast(link: Link, eqn: Any, *_: Any) -> Link:
    places = eqn.params["broadcast_dimensions"]
    runs = [Run(n, ()) for n in eqn.outvars[0].aval.shape]
    lost = []
    for run, place in zip(link.runs, places, strict=True):
        if run.size == runs[place].size:
            runs[place] = run
        elif run.parts:
            lost.append(run.one(0))
    return replace(link, runs=tuple(runs), gone=(*link.gone, *lost))


def _reshape(link: Link, eqn: Any, *_: Any) -> Link | None:
    new, runs = eqn.outvars[0].aval.shape, link.runs
    if eqn.params.get("dimensions") is not None:
        return None
    old = [run.size for run in runs]
    most = min(len(old), len(new))
    # Axes that stay, before and after those that change: so axes of size 1 keep their place.
    head = next((i for i in range(most) if old[i] != new[i]), most)
    tail = next((i for i in range(most - head) if old[-1 - i] != new[-1 - i]), most - head)
    middle = range(head, len(old) - tail)
    changed = [runs[i] for i in middle if runs[i].size != 1]
    found = _regroup(changed, new[head : len(new) - tail])
    if found is None:
        return None
    kept = link.without(i for i in middle if runs[i].size == 1)
    return replace(kept, runs=(*runs[:head], *found, *runs[len(old) - tail :]))


def _regroup(runs: list[Run], sizes: Sequence[int]) -> list[Run] | None:
    """The same entries in the same order, as axes of other sizes."""
    found, left = [], list(runs)
    for size in sizes:
        if left and left[0].size == size:  # whatever its entries
            found.append(left.pop(0))
            continue
        taken, missing = [], size
        while missing > 1:
            if not left or left[0].at is not None or not left[0].parts:
                return None
            first = left.pop(0)
            if missing % first.size == 0:
                taken += first.parts
                missing //= first.size
                continue
            outer, rest = _cut(first, missing)
            if outer is None:
                return None
            taken += outer
            left.insert(0, rest)
            missing = 1
        found.append(Run(size, joined(taken)))
    return found


def _cut(run: Run, size: int) -> tuple[Parts | None, Run]:
    """The outermost entries of an axis as parts of that size, and the rest of it."""
    outer: list[Part] = []
    for i, part in enumerate(run.parts):
        if size % part.size == 0:
            outer.append(part)
            size //= part.size
            continue
        if part.size % size:
            break
        inner = part.size // size
        if size > 1:
            outer.append(Part(part.axis, size, part.inner * inner))
        rest = (Part(part.axis, inner, part.inner), *run.parts[i + 1 :])
        return tuple(outer), Run(math.prod(p.size for p in rest), rest)
    return None, run


def joined(parts: Iterable[Part]) -> Parts:
    """Parts with neighbours of one axis made one.

    >>> joined([Part(0, 2, 3), Part(0, 3)])
    (Part(axis=0, size=6, inner=1),)
    """
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if last and last.axis == part.axis and last.inner == part.inner * part.size:
            out[-1] = Part(part.axis, last.size * part.size, part.inner)
        else:
            out.append(part)
    return tuple(out)


def _at(have: Any, index: Any) -> Any:
    """have[index], on the host if both are known."""
    if isinstance(have, Tracer | jax.Array) or isinstance(index, Tracer | jax.Array):
        return jnp.asarray(have)[index]
    return have[index]


_RULES: dict[str, Callable[..., Any]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "split": _split,
    "rev": _reverse,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}
_RULES |= dict.fromkeys(
    (
        "convert_element_type", "copy", "copy_p", "device_put", "layout_constraint", "mesh_cast",
        "name", "pcast", "pvary", "reduce_precision", "reshard", "sharding_constraint",
        "stop_gradient",
    ),
    _same,
)  # fmt: skip
