"""Names, shapes, a mesh and rules together: the sharding of every array, checked.

An axes tree is like the tree of parameters, with a tuple of names a parameter. Whatever does not
fit is refused here, by the parameter's path, before anything is computed or read. `rules` says
where names go; `place` and `context` put arrays there.
"""

import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sharding.errors import ShardingError, nearest
from sharding.mesh import format_mesh
from sharding.rules import ACTIVATIONS, Names, Rules, mesh_axes


def paths(tree: Any, is_leaf: Any = None) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`.

    Args:
        tree: any pytree.
        is_leaf: as for `jax.tree.leaves`.

    Returns:
        Keys joined by "/".

    >>> paths({"layers": [{"kernel": 1, "bias": 2}]})
    ['layers/0/bias', 'layers/0/kernel']
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def specs(axes: Any, rules: Rules, *, activations: Collection[str] = ACTIVATIONS) -> Any:
    """The PartitionSpec of every parameter.

    Every override must name an axis of some parameter or one of `activations`. Entries of the
    preset may go unused: a preset covers the whole vocabulary, and no model has all of it.

    Args:
        axes: a tree with a tuple of logical names a parameter, () for a scalar.
        rules: where the names go.
        activations: the names that only batches and activations have.

    Returns:
        The same tree of `PartitionSpec`s.

    Raises:
        ShardingError: what `Rules.spec` raises, or an override that names nothing.

    >>> from sharding import rules
    >>> tree = specs({"kernel": ("embed", "mlp"), "bias": ("mlp",)}, rules("fsdp_tensor"))
    >>> tree == {"kernel": jax.P("fsdp", "tensor"), "bias": jax.P("tensor")}
    True
    """
    used = _used(axes, activations)
    for name, _ in rules.overrides:
        if name not in used:
            raise ShardingError(
                f"rule {name!r} matches no axis of any parameter, activation or batch: "
                f"{nearest(name, used)}"
            )
    found = [rules.spec(names, path=path) for path, names in _axes_by_path(axes).items()]
    return jax.tree.unflatten(jax.tree.structure(axes, is_leaf=is_names), found)


def shardings(
    axes: Any,
    abstract: Any,
    mesh: Mesh,
    rules: Rules,
    *,
    activations: Collection[str] = ACTIVATIONS,
) -> Any:
    """The sharding of every parameter, checked against its shape and the mesh.

    Args:
        axes: a tree with a tuple of logical names a parameter.
        abstract: the parameters or anything with their shapes, as `jax.eval_shape` gives.
        mesh: where they go.
        rules: where the names go.
        activations: the names that only batches and activations have.

    Returns:
        A tree like `abstract` of `NamedSharding`s.

    Raises:
        ShardingError: what `specs` raises; trees with different paths; a rank that differs from
            the number of names; a size that its mesh axes do not divide; a mesh axis larger than
            1 that no rule in use names, whose devices would all repeat the same work.

    >>> from sharding import make_mesh, rules
    >>> tree = shardings({"bias": ("mlp",)}, {"bias": np.zeros(4)}, make_mesh("data=1"), rules())
    >>> tuple(tree["bias"].spec)
    ('tensor',)
    """
    specs(axes, rules, activations=activations)
    used = _used(axes, activations)
    reached = {axis for name in used for axis in mesh_axes(rules.table.get(name))}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in reached:
            meant = sorted(n for n, target in rules.table.items() if axis in mesh_axes(target))
            lacks = f"; the rules map {', '.join(meant)} to it, which the model lacks" * bool(meant)
            raise ShardingError(
                f"mesh axis {axis!r} has size {size}, but rules {rules.preset!r} map no axis of "
                f"the model to it: its devices would repeat the same work{lacks}. Use {axis}=1, or "
                f"map one of {sorted(used)} to it"
            )
    return fit_tree(axes, abstract, mesh, rules)


def fit_tree(
    axes: Any, abstract: Any, mesh: Mesh, rules: Rules, *, activation: bool = False
) -> Any:
    """`fit` for every leaf of `abstract`, with the names at the same path of `axes`.

    Args:
        axes: a tree with a tuple of logical names a leaf.
        abstract: a tree of arrays or shapes.
        mesh: where they go.
        rules: where the names go.
        activation: as for `Rules.spec`.

    Returns:
        A tree like `abstract` of `NamedSharding`s.

    Raises:
        ShardingError: as `fit` does, or trees with different paths.

    >>> from sharding import make_mesh, rules
    >>> fit_tree({"a": ()}, {"b": 1}, make_mesh("data=1"), rules())
    Traceback (most recent call last):
    ...
    sharding.errors.ShardingError: a: has axis names but no array: known are 'b'
    """
    names = _axes_by_path(axes)
    shapes = dict(zip(paths(abstract), map(np.shape, jax.tree.leaves(abstract)), strict=True))
    for path in sorted(shapes.keys() ^ names.keys()):
        if path in names:
            raise ShardingError(f"{path}: has axis names but no array: {nearest(path, shapes)}")
        raise ShardingError(f"{path}: has no axis names: {nearest(path, names)}")
    found = [
        fit(names[path], shape, mesh, rules, activation=activation, path=path)
        for path, shape in shapes.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), found)


def fit(
    names: Names,
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: Rules,
    *,
    activation: bool = False,
    path: str = "array",
) -> NamedSharding:
    """The sharding of one array, checked against its shape and the mesh.

    Args:
        names: one name an axis.
        shape: the array's shape.
        mesh: where it goes.
        rules: where the names go.
        activation: as for `Rules.spec`.
        path: the array's name in error messages.

    Returns:
        Its sharding.

    Raises:
        ShardingError: what `Rules.spec` raises, a rank that differs from the number of names, a
            mesh without one of the axes, or a size that its mesh axes do not divide.

    >>> from sharding import make_mesh, rules
    >>> fit(("embed",), (4, 4), make_mesh("data=1"), rules(), path="dense/kernel")
    Traceback (most recent call last):
    ...
    sharding.errors.ShardingError: dense/kernel: shape (4, 4) has rank 2, but 1 axis names...
    """
    check_rank(names, shape, path)
    spec = rules.spec(names, activation=activation, path=path)
    for name, size, target in zip(names, shape, spec, strict=True):
        axes = mesh_axes(target)
        for axis in axes:
            if axis not in mesh.shape:
                raise ShardingError(
                    f"{path}: axis {name!r} goes to mesh axis {axis!r}, which the mesh "
                    f"{format_mesh(mesh)} lacks; make it with sharding.make_mesh"
                )
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            divisors = [n for n in range(1, mesh.size + 1) if size % n == 0]
            raise ShardingError(
                f"{path}: axis {name!r} has size {size}, which "
                f"{_long(axes, mesh)} does not divide; "
                f"up to {mesh.size} devices, {', '.join(map(str, divisors))} would. Choose such "
                f"a mesh, a multiple of {ways} for {name!r}, or rules with {name!r} mapped to None"
            )
    return NamedSharding(mesh, spec)


def _long(axes: tuple[str, ...], mesh: Mesh) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)


def check_rank(names: Names, shape: tuple[int, ...], path: str) -> None:
    """Raise ShardingError unless there is one name an axis.

    >>> check_rank(("embed", "mlp"), (4, 8), "dense/kernel")
    """
    if len(names) != len(shape):
        raise ShardingError(
            f"{path}: shape {shape} has rank {len(shape)}, but {len(names)} axis names: {names}; "
            f"give one name an axis, None for one that is never cut"
        )


def is_names(node: Any) -> bool:
    """Whether a node of a tree is a leaf of an axes tree: a tuple of names.

    >>> is_names(("embed", None)), is_names(()), is_names([("embed",)])
    (True, True, False)
    """
    # `type`, not isinstance: named tuples are containers, optax states among them.
    return type(node) is tuple and all(name is None or isinstance(name, str) for name in node)


def _axes_by_path(axes: Any) -> dict[str, Names]:
    leaves = jax.tree.leaves(axes, is_leaf=is_names)
    found = dict(zip(paths(axes, is_leaf=is_names), leaves, strict=True))
    for path, names in found.items():
        if not is_names(names):
            raise ShardingError(
                f"{path}: expected a tuple of axis names, as ('embed', 'mlp'), got {names!r}"
            )
    return found


def _used(axes: Any, activations: Collection[str]) -> set[str]:
    named = {name for names in _axes_by_path(axes).values() for name in names if name is not None}
    return named | set(activations)
