"""Any function of parameters, on a mesh: linen, NNX, Equinox or none of them.

`shard` puts together what the other files hold: `names` names the axes of the parameters, `layout`
says where they go, `place` puts parameters and batches there, and `scope` tells the function's own
`constrain`s about the mesh. What comes back is the function, compiled for the mesh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.context import scope
from sharding.layout import shardings
from sharding.names import Patterns, names
from sharding.place import create, put
from sharding.rules import BATCH, Rules


class Sharded:
    """A function on a mesh; made by `shard`.

    Attributes:
        fn: the function.
        mesh: the devices.
        rules: where logical axes go.
        patterns: the names of its parameters' axes by path; None where the model tells them.
    """

    def __init__(
        self, fn: Callable[..., Any], mesh: Mesh, rules: Rules, patterns: Patterns | None
    ) -> None:
        self.fn, self.mesh, self.rules, self.patterns = fn, mesh, rules, patterns
        # Static: what is no array (an activation function, a flag) is a part of the program.
        self._jitted = jax.jit(self._run, static_argnums=0)
        self._known: dict[Any, Any] = {}

    def shardings(self, params: Any) -> Any:
        """Where parameters go.

        Args:
            params: parameters or their shapes, as the function's first argument.

        Returns:
            A tree like it of `NamedSharding`s; None for what is no array.

        Raises:
            ShardingError: as `names` and `sharding.shardings` do.
        """
        arrays = _arrays(params)
        leaves, structure = jax.tree.flatten(arrays)
        key = (structure, tuple(map(np.shape, leaves)))
        if key not in self._known:
            axes = names(arrays, self.patterns)
            self._known[key] = shardings(axes, arrays, self.mesh, self.rules)
        return self._known[key]

    def place(self, params: Any) -> Any:
        """Parameters, each where it belongs; those that are there already are left alone."""
        where = iter(jax.tree.leaves(self.shardings(params)))

        def one(x: Any) -> Any:
            if not _is_array(x):
                return x
            lies = next(where)
            return x if getattr(x, "sharding", None) == lies else jax.device_put(x, lies)

        return jax.tree.map(one, params)

    def create(self, init: Callable[..., Any], *args: Any) -> Any:
        """`init(*args)`, a function of arrays to parameters, born in parts."""
        return create(init, *args, shardings=self.shardings(jax.eval_shape(init, *args)))

    def put(self, batch: Any) -> Any:
        """A batch, cut along the first axis of its arrays; keys and scalars go everywhere."""

        def one(x: Any) -> Any:
            if not _is_array(x):
                return x
            if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
                return x  # placed before, by this function or by another
            if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec()))
            return put({BATCH: x}, self.mesh, self.rules)[BATCH]

        return jax.tree.map(one, batch)

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn(params, *args, **kwargs)` on the mesh."""
        return self._jitted(*self._split(params, args, kwargs))

    def lower(self, params: Any, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program of a call: `lower(...).compile()` is what `inspect` reads."""
        return self._jitted.lower(*self._split(params, args, kwargs))

    def _split(self, params: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What is a part of the program, and the arrays in trees like the arguments."""
        where = self.shardings(params)
        leaves, structure = jax.tree.flatten((self.place(params), *self.put((args, kwargs))))
        own = len(jax.tree.leaves(params))
        # A number in a module is a part of the program; one in an argument is a value.
        dynamic = [_is_array(x) or (i >= own and _is_number(x)) for i, x in enumerate(leaves)]
        rest = tuple(None if d else x for d, x in zip(dynamic, leaves, strict=True))
        arrays = [x if d else None for d, x in zip(dynamic, leaves, strict=True)]
        return _Static(structure, rest, where), *jax.tree.unflatten(structure, arrays)

    def _run(self, static: "_Static", params: Any, args: Any, kwargs: Any) -> Any:
        params, args, kwargs = static.merge(jax.tree.leaves((params, args, kwargs)))
        with scope(self.mesh, self.rules, differentiate=True):
            out = self.fn(params, *args, **kwargs)
        like = partial(_lie_alike, params, static.where)
        return tuple(map(like, out)) if type(out) is tuple else like(out)


def shard(
    fn: Callable[..., Any], mesh: Mesh, rules: Rules, names: Patterns | None = None
) -> Sharded:
    """A function on a mesh.

    Args:
        fn: `fn(params, *args, **kwargs)`, pure; `params` is a tree that holds arrays: a dict, linen
            variables, an NNX or Equinox module, or a whole training state. Axes of other
            arguments' arrays but the first are not cut; `constrain` inside says otherwise.
        mesh: from `make_mesh`.
        rules: where logical axes go.
        names: names by path pattern, as for `sharding.names`; None where the model names them.

    Returns:
        The function, compiled when called. Where a result, or an element of a tuple of results, is
        a tree with the structure and shapes of `params`, such as gradients or a new state, it lies
        as they do; others lie as the compiler likes.

    Raises:
        ShardingError: when called or placed, as `names`, `shardings` and `put` do.

    >>> import jax.numpy as jnp
    >>> from sharding import make_mesh, rules
    >>> apply = shard(lambda p, x: jnp.tanh(x @ p["kernel"]), make_mesh("data=1"), rules(),
    ...               {"kernel": ("embed", "mlp")})
    >>> params = apply.create(lambda: {"kernel": jnp.ones((4, 8))})
    >>> apply(params, np.ones((2, 4), np.float32)).shape
    (2, 8)
    """
    return Sharded(fn, mesh, rules, names)


class _Static:
    """What of a call's arguments is no array, and where its parameters lie; equal by value."""

    def __init__(self, structure: Any, rest: tuple[Any, ...], where: Any) -> None:
        self.structure, self.rest, self.where = structure, rest, where
        self._key = (structure, rest, tuple(jax.tree.leaves(where)))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key

    def merge(self, arrays: Any) -> Any:
        left = iter(arrays)
        leaves = [next(left) if x is None else x for x in self.rest]
        return jax.tree.unflatten(self.structure, leaves)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | complex) and not isinstance(x, bool)


def _arrays(tree: Any) -> Any:
    return jax.tree.map(lambda x: x if _is_array(x) else None, tree)


def _lie_alike(params: Any, where: Any, out: Any) -> Any:
    a, b = _arrays(params), _arrays(out)
    if jax.tree.structure(a) != jax.tree.structure(b) or not jax.tree.leaves(a):
        return out
    if any(np.shape(x) != np.shape(y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)):
        return out
    lies = iter(jax.tree.leaves(where))
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, next(lies)) if _is_array(x) else x, out
    )
