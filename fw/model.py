"""A model is a value of pure functions: the one record that everything else takes.

`Model` holds a config, `init`, `apply` and the logical axes of every parameter. A Flax NNX module
enters through `from_nnx`; a linen or equinox module or a bare function by filling in the record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

Variables = dict[str, Any]
Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Model:
    """A model as pure functions over plain trees.

    Attributes:
      config: what the model was made from; a frozen dataclass.
      init: `init(key) -> variables`, {"params": nested dict of arrays, "state": nested dict}.
      apply: `apply(variables, batch, *, key=None, train=False) -> (outputs, variables)`; `key`
        drives dropout, the returned variables carry updated state (batch-norm averages).
      axes: a tree like `variables`; for each leaf, a tuple with the logical name of each axis.
      cache: `cache(batch, slots, dtype) -> tree` for a model that generates: what it has read,
        which is nothing yet; goes into a batch and comes out of `apply`. None for others.
      tables: by the path of a parameter [count, size], as "items/table": `ids(batch)`, int32
        [B, ...], the rows of it that the model needs. A step of training brings them in the batch
        and changes only them; see `fw.models.table`.
    """

    config: Any
    init: Callable[[jax.Array], Variables]
    apply: Callable[..., tuple[Any, Variables]]
    axes: Variables
    cache: Callable[..., Any] | None = None
    tables: Mapping[str, Callable[[Batch], jax.Array]] = field(default_factory=dict)


FROZEN = "frozen"
"""The collection of variables that is neither differentiated nor changed, where a model has one:
`fw.adaptation` makes models that do."""

ROWS = "rows_of_tables"
"""The entry of a batch of training that holds the rows of tables: [B, ..., size] by path."""


def from_nnx(config: Any, build: Callable[[nnx.Rngs], nnx.Module], forward: Callable) -> Model:
    """Makes a `Model` of a Flax NNX module.

    Args:
      config: kept in the record.
      build: makes the module; every `nnx.Variable` in it is given `axes=` names. A parameter that
        is given `ids=`, too, becomes one of `Model.tables`; its metadata is told its `path`.
      forward: `forward(module, batch, key, train) -> outputs`.

    Returns:
      The record. The module itself lives only while one of its functions is traced.

    >>> class Scale(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.gain = nnx.Param(jax.numpy.ones(3), axes=("embed",))
    >>> model = from_nnx(None, Scale, lambda module, batch, key, train: batch["x"] * module.gain)
    >>> variables = model.init(jax.random.key(0))
    >>> model.axes["params"], model.apply(variables, {"x": 2.0})[0]
    ({'gain': ('embed',)}, Array([2., 2., 2.], dtype=float32))
    """
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    tables = _tables_of(module)
    graph, *abstract = nnx.split(module, nnx.Param, ...)
    axes = [jax.tree.map(_axes_of, state, is_leaf=_is_variable) for state in abstract]

    def init(key: jax.Array) -> Variables:
        _, *states = nnx.split(build(nnx.Rngs(params=key)), nnx.Param, ...)
        return _pack(states)

    def apply(
        variables: Variables, batch: Batch, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, Variables]:
        states = (nnx.State(_int_keys(variables[kind])) for kind in ("params", "state"))
        module = nnx.merge(graph, *states)
        outputs = forward(module, batch, key if train else None, train)
        state = nnx.state(module, nnx.Not(nnx.Param))
        return outputs, {**variables, "state": _str_keys(nnx.to_pure_dict(state))}

    return Model(config, init, apply, _pack(axes), tables=tables)


def _tables_of(module: nnx.Module) -> dict[str, Callable[[Batch], jax.Array]]:
    tables = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if "ids" in variable.get_metadata():
            name = "/".join(map(str, path))
            tables[name] = variable.get_metadata()["ids"]
            variable.set_metadata(path=name)
    return tables


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _axes_of(variable: nnx.Variable) -> tuple[str, ...]:
    axes = variable.get_metadata().get("axes")
    rank = len(variable.get_value().shape)
    if axes is None or len(axes) != rank:
        raise TypeError(f"a variable of rank {rank} names {axes} as its axes; give each one a name")
    return tuple(axes)


def _pack(states) -> Variables:
    params, state = (_str_keys(nnx.to_pure_dict(s)) for s in states)
    return {"params": params, "state": state}


def _str_keys(tree):
    """Lists become dicts with "0", "1" … as keys: every path is then a plain string."""
    return {str(k): _str_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _int_keys(tree):
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _int_keys(v) for k, v in tree.items()}
