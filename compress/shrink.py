"""Smaller arrays: units of dimensions are taken out, and what is left is ordinary.

    found = couplings(fn, params, batch)                    # what must shrink together
    scores = magnitude_scores(found, params)                # how much each unit matters
    kept = choose_units(found, scores, parameters=0.5)
    small, report = shrink(found, kept)(params)

`Shrink` is data: for every axis of every leaf that becomes shorter, the entries that stay.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress.arrays import describe, is_compressed, place_part, sharding_of
from compress.coupling import Couplings, Dimension, Place, Trace, couplings
from compress.transform import Record, Report, Transform, named_leaves, size

Kept = Mapping[str, np.ndarray]
"""By a dimension's name, int [layers, kept]: the units that stay, ascending."""


@dataclass(frozen=True)
class Cut:
    """The entries of one axis of one leaf that stay.

    Attributes:
        path: of the leaf.
        axis: of it, from 0.
        size: of that axis before.
        entries: ascending; one tuple, or one for each entry of the leaf's first axis.
    """

    path: str
    axis: int
    size: int
    entries: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check."""
        object.__setattr__(self, "entries", tuple(tuple(map(int, row)) for row in self.entries))
        rows = self.entries
        if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
            raise ValueError(f"{self.path} axis {self.axis}: expected rows of the same length > 0")
        if len(rows) > 1 and self.axis == 0:
            raise ValueError(f"{self.path}: its first axis cannot differ between its own entries")
        for row in rows:
            if any(b <= a for a, b in itertools.pairwise(row)):
                raise ValueError(f"{self.path} axis {self.axis}: entries {row} do not ascend")
            if row[0] < 0 or row[-1] >= self.size or self.axis < 0:
                raise ValueError(f"{self.path} axis {self.axis}: entries {row} of {self.size}")

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """What stays of the leaf."""
        if len(self.entries) == 1:
            return jnp.take(leaf, np.array(self.entries[0]), axis=self.axis)
        index = np.array(self.entries)
        shape = [1] * leaf.ndim
        shape[0], shape[self.axis] = index.shape
        return jnp.take_along_axis(leaf, jnp.asarray(index.reshape(shape)), axis=self.axis)


@dataclass(frozen=True)
class Shrink(Transform):
    """See `shrink`, which makes it.

    Attributes:
        cuts: what stays.
    """

    cuts: tuple[Cut, ...]
    name: ClassVar[str] = "shrink"

    def __post_init__(self) -> None:
        """Check, and parse."""
        cuts = tuple(c if isinstance(c, Cut) else Cut(**c) for c in self.cuts)
        if len({(c.path, c.axis) for c in cuts}) < len(cuts):
            raise ValueError("shrink: an axis has two cuts")
        # A stack's own axis last: the other cuts have rows for all of its entries.
        cuts = tuple(sorted(cuts, key=lambda c: (c.path, -c.axis)))
        object.__setattr__(self, "cuts", cuts)

    def __call__(self, params: Any, stats: Mapping[str, Any] | None = None) -> tuple[Any, Report]:
        """See `Transform`."""
        leaves, tree = named_leaves(params)
        by_path: dict[str, list[Cut]] = {}
        for cut in self.cuts:
            by_path.setdefault(cut.path, []).append(cut)
        known = {path for path, _ in leaves}
        for path in by_path:
            if path not in known:
                raise ValueError(f"shrink: {path} is no leaf; was it made for another model?")
        new, report = [], []
        for path, leaf in leaves:
            small, error, applied = leaf, 0.0, "kept: no rule"
            if path in by_path:
                small, error = _cut(path, leaf, by_path[path])
                applied = f"{_shape(leaf)} to {_shape(small)}"
            new.append(small)
            report.append(Record(path, tuple(small.shape), size(leaf), size(small), applied, error))
        return jax.tree.unflatten(tree, new), tuple(report)

    def data(self) -> dict[str, Any]:
        """See `Transform.data`."""
        return {"transform": self.name, "cuts": [dataclasses.asdict(c) for c in self.cuts]}


def _shape(leaf: Any) -> str:
    return "×".join(map(str, leaf.shape))


def _cut(path: str, leaf: Any, cuts: Sequence[Cut]) -> tuple[Any, Any]:
    if is_compressed(leaf):
        raise ValueError(f"{path}: it is {describe(leaf)}; shrink floats, and compress then")
    small = leaf
    for cut in cuts:
        if cut.axis >= leaf.ndim or leaf.shape[cut.axis] != cut.size:
            raise ValueError(
                f"{path}: shape {tuple(leaf.shape)}, and {cut.size} entries were expected along "
                f"axis {cut.axis}; was the recipe made for another model?"
            )
        if len(cut.entries) not in (1, leaf.shape[0]):
            raise ValueError(f"{path}: {leaf.shape[0]} layers, and cuts for {len(cut.entries)}")
        small = cut(small)
    where = sharding_of(leaf)
    if where is not None and not isinstance(small, Tracer):
        # As the leaf lay, but for axes that the mesh no longer divides.
        small = jax.device_put(small, place_part(small, leaf.shape, where, "values"))
    error = _removed(leaf, small)
    return small, error if isinstance(error, Tracer) else float(error)


@jax.jit
def _removed(before: jax.Array, after: jax.Array) -> jax.Array:
    """Of the norm, the part that was taken out."""
    a, b = (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in (before, after))
    return jnp.sqrt(jnp.maximum(a - b, 0) / jnp.where(a == 0, np.float32(1), a))


def shrink(found: Couplings, kept: Kept) -> Shrink:
    """A transform that takes units out of dimensions, in all leaves that have them.

    Args:
        found: of `couplings`.
        kept: by a dimension's name, the units that stay.

    Raises:
        ValueError: a name is unknown, a unit is not there, or nothing stays.

    >>> from compress.coupling import couplings
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> p = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 3))}
    >>> found = couplings(fn, p, jnp.ones((2, 3)))
    >>> small, report = shrink(found, {"down:0": np.array([[0, 2, 5]])})(p)
    >>> [(r.path, r.applied) for r in report]
    [('down', '8×3 to 3×3'), ('up', '3×8 to 3×3')]
    """
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for name, left in kept.items():
        if name not in found.dimensions:
            known = ", ".join(found.dimensions)
            raise ValueError(f"shrink: dimension {name!r} is unknown; there are {known}")
        dimension, units = found.dimensions[name], np.atleast_2d(np.asarray(left))
        layers = dimension.layers or 1
        if len(units) != layers:
            raise ValueError(f"shrink: {name}: units of {len(units)} layers; expected {layers}")
        if units.size and not (units.min() >= 0 and units.max() < dimension.units):
            raise ValueError(f"shrink: {name}: units are 0 to {dimension.units - 1}; got {units}")
        for key, entries in dimension.members.items():
            gone.setdefault(key, []).append(
                np.stack([
                    np.delete(of, row, axis=0).reshape(-1)
                    for of, row in zip(entries, units, strict=True)
                ])
            )  # fmt: skip
    cuts = []
    for (path, axis), parts in gone.items():
        # An axis may have units of several dimensions, some of a layer and some of all.
        layers, size = max(map(len, parts)), found.shapes[path][axis]
        rows = np.concatenate([np.broadcast_to(p, (layers, p.shape[1])) for p in parts], axis=1)
        stay = [np.delete(np.arange(size), row).tolist() for row in rows]
        cuts.append(Cut(path, axis, size, tuple(map(tuple, stay))))
    return Shrink(tuple(cuts))


def check_shrunk(
    found: Couplings, transform: Shrink, fn: Callable[..., Any], small: Any, *args: Any
) -> None:
    """Check that a function reads what is left of its parameters as it read the whole.

    The program is traced again, and has to couple the same entries: a size or a place that is
    written in the function, and not taken from the shapes of its parameters, shows.

    Args:
        found: of `couplings`, of the whole.
        transform: of `shrink`.
        fn, args: as in `couplings`.
        small: what the transform left, or its `jax.eval_shape`.

    Raises:
        ValueError: it does not run, couples other entries, or makes values of other sizes; or one
            unit is left of a dimension.

    >>> fn = lambda p, x: (x @ p["up"]).reshape(-1, 4, 2).sum(-1) @ p["down"]
    >>> p = {"up": jnp.ones((3, 8)), "down": jnp.ones((4, 3))}
    >>> found = couplings(fn, p, jnp.ones((2, 3)))
    >>> recipe = shrink(found, {"down:0": np.array([[0, 2]])})
    >>> check_shrunk(found, recipe, fn, recipe(p)[0], jnp.ones((2, 3)))
    Traceback (most recent call last):
    ...
    ValueError: shrink: the function does not run on what is left; is a size written in it? ...
    """
    try:
        again = couplings(fn, small, *args)
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"shrink: the function does not run on what is left; is a size written in it? {error}"
        ) from error
    stays = {(cut.path, cut.axis): cut.entries for cut in transform.cuts}
    left: dict[str, list[list[int]]] = {}
    for name, dimension in found.dimensions.items():
        wanted = {
            (path, axis): _renumbered(dimension, stays, path, axis, found.shapes[path][axis])
            for path, axis in dimension.members
        }
        left[name] = _units_left(dimension, stays)
        if max(map(len, left[name])) < 2:
            raise ValueError(
                f"shrink: {name}: one unit is left, which programs treat in their own way: what "
                "is written in one cannot be told; check with two"
            )
        own = again.dimensions.get(name)
        if own is None or {k: v.tolist() for k, v in own.members.items()} != wanted:
            raise ValueError(
                f"shrink: {name}: what is left is coupled otherwise than it was; is a size or a "
                "place written in the function?"
            )
    expected, got = list(_expected(found.trace, left, again)), list(_events(again.trace))
    if len(expected) != len(got) or not all(map(_same, expected, got)):
        raise ValueError(
            "shrink: the function makes other values of what is left, or cuts other entries out; "
            "is a size or a place written in it?"
        )


def _same(expected: Sequence[Any], got: Sequence[Any]) -> bool:
    """Whether an event is as expected; the size of an axis without numbers may be any."""
    if isinstance(expected, list):
        return expected == got
    return len(expected) == len(got) and all(
        a is None or b is None or a == b for a, b in zip(expected, got, strict=True)
    )


def _units_left(dimension: Dimension, stays: Mapping[tuple[str, int], Any]) -> list[list[int]]:
    """The units that stay, of each layer: none of a layer that goes."""
    (path, axis), entries = next(iter(dimension.members.items()))
    rows = stays.get((path, axis))
    layers = _layers_left(dimension, stays, path)
    found: list[list[int]] = [[] for _ in entries]
    for i in layers:
        kept = None if rows is None else set(rows[i % len(rows)])
        found[i] = [u for u, of in enumerate(entries[i]) if kept is None or int(of[0]) in kept]
    return found


def _layers_left(
    dimension: Dimension, stays: Mapping[tuple[str, int], Any], path: str
) -> Sequence[int]:
    if dimension.layers and (path, 0) in stays:
        return stays[path, 0][0]
    return range(dimension.layers or 1)


def _events(trace: Trace) -> Iterator[Any]:
    """The sizes of all values of a program in its order, and the places of what it cuts out."""
    for event in trace.walk.log:
        if event.kind == "cut":
            (part,) = event.axes
            assert part is not None
            yield [trace.places.get(number) for number in trace.walk.classes.of(part).tolist()]
        else:
            yield tuple(None if axis is None else len(axis) for axis in event.axes)


def _expected(trace: Trace, left: Mapping[str, list[list[int]]], again: Couplings) -> Iterator[Any]:
    """The same of what is left, from the program of the whole."""
    classes = trace.walk.classes
    place: dict[int, Place | None] = {}
    gone = np.zeros(len(classes), bool)
    for number, (name, layer, unit) in trace.places.items():
        if unit not in left[name][layer]:
            gone[number] = True
        elif name in again.dimensions:
            before = sum(not units for units in left[name][:layer])
            place[number] = (name, layer - before, left[name][layer].index(unit))
    for event in trace.walk.log:
        if any(gone[classes.of(numbers)].all() for numbers in event.layers):
            continue
        if event.kind == "cut":
            (part,) = event.axes
            assert part is not None
            of = classes.of(part)
            yield [place.get(number) for number in of[~gone[of]].tolist()]
        else:
            yield tuple(
                None if axis is None else int((~gone[classes.of(axis)]).sum())
                for axis in event.axes
            )


def _renumbered(
    dimension: Dimension, stays: Mapping[tuple[str, int], Any], path: str, axis: int, size: int
) -> list[list[list[int]]]:
    """A member of a dimension after cuts: its layers and units that are left, in new places."""
    entries = dimension.members[path, axis]
    rows = stays.get((path, axis), (tuple(range(size)),))
    found = []
    for i in _layers_left(dimension, stays, path):
        place = {old: new for new, old in enumerate(rows[i % len(rows)])}
        units = [unit for unit in entries[i].tolist() if any(entry in place for entry in unit)]
        if not all(entry in place for unit in units for entry in unit):
            raise ValueError(f"shrink: {path} axis {axis}: a part of a unit goes, and a part stays")
        found.append([[place[entry] for entry in unit] for unit in units])
    return found
