"""Which axes of which leaves must shrink together: found in the traced program.

What one kernel puts out the next takes in, with the biases, norms and residuals on the way: these
axes are one `Dimension`, and their entries, unit by unit, stay or go together. Heads split from
features are units of several entries; a stack that a scan runs along has as many units in every
layer, each layer's its own; and its layers are units themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from compress.arrays import describe, is_compressed
from compress.classes import FIXED
from compress.cost import Axis, Cost
from compress.coupling_walk import Walk
from compress.transform import named_leaves


@dataclass(frozen=True)
class Dimension:
    """Axes of leaves whose entries stay or go together.

    Attributes:
        units: how many there are, in each layer if they are of a stack.
        members: (path, axis) -> int [layers, units, entries]: the entries of each unit along that
            axis of that leaf. One layer means all, unless there is a stack.
        layers: of a stack whose layers have units of their own; else None.
    """

    units: int
    members: dict[tuple[str, int], np.ndarray]
    layers: int | None = None

    @property
    def name(self) -> str:
        """The first of its axes, as "path:axis"."""
        path, axis = min(self.members)
        return f"{path}:{axis}"


@dataclass(frozen=True)
class Couplings:
    """What can be taken out of a function's parameters.

    Attributes:
        dimensions: by name.
        shapes: of the leaves, by path.
        parameters: numbers in all leaves, by how many units of each dimension stay.
        flops: of the products in the program, two for each multiplication.
        opaque: primitives that no rule is known of; what they touch stays.
        trace: how it was found, for `compress.check_shrunk`.
    """

    dimensions: dict[str, Dimension]
    shapes: dict[str, tuple[int, ...]]
    parameters: Cost
    flops: Cost
    opaque: tuple[str, ...]
    trace: "Trace" = field(repr=False)

    @property
    def units(self) -> dict[str, int]:
        """How many units there are of each dimension."""
        return {name: d.units for name, d in self.dimensions.items()}


Place = tuple[str, int, int]
"""A dimension's name, a layer, and a unit."""


@dataclass(frozen=True)
class Trace:
    """How couplings were found.

    Attributes:
        walk: through the program.
        places: of classes, by their number; those without stay.
    """

    walk: Walk
    places: dict[int, Place]


def couplings(fn: Callable[..., Any], params: Any, *args: Any) -> Couplings:
    """Find what can be taken out of a function's parameters, from its program alone.

    Args:
        fn: `(params, *args) -> anything`; its arguments and results keep their shapes.
        params: a pytree of arrays, or its `jax.eval_shape`; state such as running means, too.
        args: pytrees of arrays or of their shapes.

    Returns:
        The dimensions of which more than one unit may go, and what everything costs.

    Raises:
        ValueError: a leaf is compressed already.

    Source: groups of coupled layers as in Fang et al. 2023 (DepGraph),
    https://arxiv.org/abs/2301.12900, here from JAX's own program.

    >>> import jax.numpy as jnp
    >>> def fn(p, x):
    ...     return x + jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]
    >>> p = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 3))}
    >>> found = couplings(fn, p, jnp.ones((2, 3))).dimensions
    >>> [(d.units, sorted(d.members)) for d in found.values()]
    [(8, [('bias', 0), ('down', 0), ('up', 1)])]
    """
    leaves = []
    for path, leaf in named_leaves(params)[0]:
        if is_compressed(leaf):
            raise ValueError(f"{path}: it is {describe(leaf)}; shrink floats, and compress then")
        leaves.append((path, tuple(np.shape(leaf))))
    closed = jax.make_jaxpr(fn)(params, *args)
    tried: dict[int, int] = {}
    while True:
        walk = Walk(leaves, tried)
        walk.run(closed, len(jax.tree.leaves(args)))
        if not walk.again():
            break
    found, places = _dimensions(walk)
    names = {number: name for number, (name, *_) in places.items()}
    return Couplings(
        found, dict(leaves), _parameters(walk, found), _flops(walk, found, names),
        tuple(sorted(walk.opaque)), Trace(walk, places),
    )  # fmt: skip


_Unit = dict[tuple[int, int, int], list[int]]
"""(leaf, axis, entry of a stack or -1) -> entries along the axis."""


def _dimensions(walk: Walk) -> tuple[dict[str, Dimension], dict[int, Place]]:
    """What may go, and where each class is in it."""
    none = np.zeros(0, np.int64)
    numbers = np.concatenate([none, *(np.arange(f, f + n) for f, n, *_ in walk.named)])
    where = np.repeat(np.arange(len(walk.named)), [n for _, n, *_ in walk.named])
    places = np.concatenate([none, *(np.arange(n) for _, n, *_ in walk.named)])
    classes = walk.classes.of(numbers)
    alive = np.unique(walk.classes.of(np.concatenate([none, *walk.used])))
    order = {id(leaf): i for i, leaf in enumerate(walk.leaves)}
    units: dict[int, _Unit] = {}
    for i in np.flatnonzero(np.isin(classes, alive) & (classes != FIXED)):
        _, _, leaf, entry, axis = walk.named[where[i]]
        if leaf.entries and entry < 0 and axis > 0:
            continue  # its entries stand for it
        unit = units.setdefault(int(classes[i]), {})
        unit.setdefault((order[id(leaf)], axis, entry), []).append(int(places[i]))
    blocks: dict[tuple[Any, ...], dict[int, _Unit]] = {}
    for number, unit in units.items():
        alike = tuple((k, len(at)) for k, at in sorted(unit.items()))
        blocks.setdefault(alike, {})[number] = unit
    found, of_class = {}, {}
    for layers, stacked in _stacks(walk, blocks):
        dimension = _dimension(walk, layers, stacked)
        if dimension.units > 1:
            found[dimension.name] = dimension
            for layer, block in enumerate(layers):
                for i, number in enumerate(_ordered(block)):
                    of_class[number] = (dimension.name, layer, i)
    return dict(sorted(found.items())), of_class


def _stacks(walk: Walk, blocks: dict[Any, dict[int, _Unit]]) -> Iterator[tuple[list[Any], bool]]:
    """Blocks of units that are alike in all but the layer are of one stack."""
    groups: dict[Any, dict[int, dict[int, _Unit]]] = {}
    for block in blocks.values():
        unit = next(iter(block.values()))
        entries = {entry for _, _, entry in unit}
        layer = entries.pop() if len(entries) == 1 else -1
        alike = frozenset(
            (leaf, axis, entry if layer < 0 else 0, len(at))
            for (leaf, axis, entry), at in unit.items()
        )
        groups.setdefault((alike, layer >= 0), {})[layer] = block
    for (alike, stacked), layers in groups.items():
        sizes = {leaf: walk.leaves[leaf].shape[0] for leaf, *_ in alike}
        if stacked:  # as many in every layer
            even = len({len(block) for block in layers.values()}) == 1
            right = even and set(sizes.values()) == {len(layers)}
        else:  # in all layers, if in any
            entries = {leaf: {e for i, _, e, _ in alike if i == leaf} for leaf in sizes}
            right = all(e <= {-1} or len(e - {-1}) == sizes[i] for i, e in entries.items())
            right = right and _even(layers[-1])
        if right:
            yield [layers[i] for i in sorted(layers)], stacked


def _ordered(block: dict[int, _Unit]) -> list[int]:
    """The classes of a block by where their units come first."""
    return sorted(block, key=lambda number: sorted(block[number].items()))


def _even(block: dict[int, _Unit]) -> bool:
    """Whether what runs through all layers has the same entries in each."""
    for unit in block.values():
        seen: dict[tuple[int, int], list[int]] = {}
        for (leaf, axis, _), at in unit.items():
            if seen.setdefault((leaf, axis), at) != at:
                return False
    return True


def _dimension(walk: Walk, layers: list[dict[int, _Unit]], stacked: bool) -> Dimension:
    members: dict[tuple[str, int], list[Any]] = {}
    for block in layers:
        units = [block[number] for number in _ordered(block)]
        for leaf, axis in dict.fromkeys((leaf, axis) for leaf, axis, _ in units[0]):
            # What runs through all layers has the same entries in each (`_even`).
            entry = min(e for a, b, e in units[0] if (a, b) == (leaf, axis))
            rows = [unit[leaf, axis, entry] for unit in units]
            members.setdefault((walk.leaves[leaf].path, axis), []).append(rows)
    return Dimension(
        len(layers[0]), {key: np.array(at) for key, at in members.items()},
        len(layers) if stacked else None,
    )  # fmt: skip


def _parameters(walk: Walk, found: Mapping[str, Dimension]) -> Cost:
    """Numbers in all leaves."""
    terms = []
    for leaf in walk.leaves:
        axes = []
        for axis, size in enumerate(leaf.shape):
            at = [(n, d.members[leaf.path, axis]) for n, d in found.items()
                  if (leaf.path, axis) in d.members]  # fmt: skip
            taken = sum(entries[0].size for _, entries in at)
            axes.append(Axis(size - taken, tuple((n, float(e.shape[2])) for n, e in at)))
        terms.append((1.0, tuple(axes)))
    return Cost(tuple(terms))


def _flops(walk: Walk, found: Mapping[str, Dimension], of_class: Mapping[int, str]) -> Cost:
    """Of all products; those of a stack's layers that cost the same are one term."""
    terms: dict[tuple[Axis, ...], float] = {}
    for times, axes in walk.products:
        sizes, factor = [], 2.0 * times
        for numbers, size in axes:
            counts: dict[str, int] = {}
            if numbers is not None:
                of, many = np.unique(walk.classes.of(numbers), return_counts=True)
                for number, count in zip(of.tolist(), many.tolist(), strict=True):
                    if (name := of_class.get(number)) is not None:
                        counts[name] = counts.get(name, 0) + count
            if not counts:
                factor *= size
                continue
            own = [(n, count / found[n].units) for n, count in sorted(counts.items())]
            sizes.append(Axis(size - sum(counts.values()), tuple(own)))
        key = tuple(sizes)
        terms[key] = terms.get(key, 0.0) + factor
    return Cost(tuple((factor, axes) for axes, factor in terms.items()))
