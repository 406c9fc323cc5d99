"""See where everything lies: `print(visualize(params))`, or save it as a picture.

Only shapes and shardings are read, never values: it is instant, works on shapes that were never
allocated, and on every process of a large run alike.
"""

import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, Sharding

from sharding.errors import ShardingError, nearest
from sharding.layout import check_rank, is_names, paths
from sharding.names import unboxed
from sharding.rules import Names
from sharding.visualize import svg_grid, svg_table, terminal
from sharding.visualize.facts import Leaf
from sharding.visualize.table import Table

# What a terminal would obey and XML cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, repr=False)
class Picture:
    """An array or a tree as it lies on its devices; made by `visualize`.

    `print` it, `save` it, or leave it as the last line of a notebook's cell.

    Attributes:
        of: what is drawn, as numbers: `of.total`, `of.per_device`; of an array, `of.blocks`.
        color: colour codes in the text: yes, no, or None for "if it goes to a terminal".
    """

    of: Leaf | Table
    color: bool | None = None

    def __str__(self) -> str:
        """The drawing as text."""
        colour = self.color
        if colour is None:
            colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if isinstance(self.of, Leaf):
            return terminal.grid(self.of, colour=colour)
        return terminal.table(self.of, colour=colour)

    __repr__ = __str__

    @cached_property
    def svg(self) -> str:
        """The drawing as one <svg>, which needs no other file and follows a dark page."""
        return svg_grid.grid(self.of) if isinstance(self.of, Leaf) else svg_table.table(self.of)

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the SVG; a file of that name is replaced whole or not at all.

        Args:
            path: such as "layout.svg".

        Raises:
            OSError: the folder does not exist or cannot be written to.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            part.write_text(self.svg, encoding="utf-8")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def visualize(
    tree: Any,
    where: Any = None,
    *,
    names: Any = None,
    order: Literal["tree", "bytes"] = "tree",
    color: bool | None = None,
) -> Picture:
    """Draw how an array, or every array of a tree, lies on the mesh.

    One array is drawn as a grid of its blocks, each with the devices that hold it. A tree becomes
    a table with a row for every array: its sharding, the bytes on each device, a bar. Layers that
    look alike share a row, `layers/{0..5}/kernel ×6`, with the bytes of all of them; arrays of one
    hundredth of a device's bytes or more that every device holds whole are marked.

    Args:
        tree: an array or `jax.ShapeDtypeStruct`, or any tree of them. What is neither (a number
            of Python's, a function) is left out.
        where: the shardings, a tree like `tree`, if the arrays do not have them yet.
        names: the names of the axes, for an array a tuple, for a tree a tree of tuples as `names`
            makes; shardings then read `embed→fsdp` instead of `P('fsdp')`.
        order: of the rows: the tree's, or the most bytes on a device first.
        color: colour codes in the text; None means if standard output is a terminal and the
            environment does not say NO_COLOR.

    Returns:
        The picture: print it, `save` it, or show it in a notebook.

    Raises:
        ShardingError: an array without a sharding, or one that its sharding does not fit; an
            array that `where` or `names` lack; a wrong number of names.

    >>> from sharding import make_mesh, rules, shardings
    >>> axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    >>> import numpy as np
    >>> shapes = {"kernel": np.zeros((4, 8), np.float32), "bias": np.zeros(8, np.float32)}
    >>> where = shardings(axes, shapes, make_mesh("data=1"), rules())
    >>> print(visualize(shapes, where, names=axes, color=False))
    mesh data=1: 1 device
    <BLANKLINE>
    array   shape  dtype    sharding    total  per device
    ──────  ─────  ───────  ──────────  ─────  ──────────
    bias    8      float32  mlp          32 B        32 B  ███
    kernel  4×8    float32  embed, mlp  128 B       128 B  ████████████
    <BLANKLINE>
    160 B on 1 device, 160 B in all
    """
    if order not in ("tree", "bytes"):
        raise ShardingError(f"unknown order {order!r}: {nearest(str(order), ['tree', 'bytes'])}")
    tree = unboxed(tree)
    arrays = {
        path: leaf
        for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }
    placed = _by_path(where, arrays, "sharding", lambda node: isinstance(node, Sharding))
    named = _by_path(names, arrays, "names", is_names)
    leaves = [_leaf(path, x, placed.get(path), named.get(path)) for path, x in arrays.items()]
    alone = [*arrays] == [""]
    return Picture(leaves[0] if alone else Table(tuple(leaves), order == "bytes"), color)


def _by_path(given: Any, arrays: dict[str, Any], what: str, is_leaf: Any) -> dict[str, Any]:
    """The leaves of a tree beside the arrays, one an array."""
    if given is None:
        return {}
    given = unboxed(given)
    leaves = jax.tree.leaves(given, is_leaf=is_leaf)
    found = dict(zip(paths(given, is_leaf=is_leaf), leaves, strict=True))
    for path in arrays:
        if path not in found:
            raise ShardingError(f"{path or 'array'}: has no {what}: {nearest(path, found)}")
        if not is_leaf(found[path]):
            raise ShardingError(f"{path or 'array'}: expected {what}, got {found[path]!r}")
    return found


def _leaf(path: str, x: Any, where: Sharding | None, axes: Names | None) -> Leaf:
    shown = path or "array"
    where = getattr(x, "sharding", None) if where is None else where
    if not isinstance(where, Sharding):
        raise ShardingError(
            f"{shown}: a {type(x).__name__} that lies on no device; place it, or give its "
            f"sharding: visualize(tree, shardings(axes, tree, mesh, rules))"
        )
    if isinstance(where, NamedSharding) and not isinstance(where.mesh, jax.sharding.Mesh):
        raise ShardingError(f"{shown}: its mesh is abstract and has no devices to draw")
    shape = tuple(x.shape)
    if axes is not None:
        check_rank(axes, shape, shown)
    try:
        where.shard_shape(shape)
    except (ValueError, IndexError) as error:
        raise ShardingError(f"{shown}: shape {shape} does not fit {where}: {error}") from error
    clean = _UNPRINTABLE.sub("\ufffd", path)
    if axes is not None:
        axes = tuple(name and _UNPRINTABLE.sub("\ufffd", name) for name in axes)
    return Leaf(clean, shape, str(x.dtype), x.dtype.itemsize, where, axes)
