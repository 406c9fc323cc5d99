"""Equal layers as one module, whose parameters are stacked along a first axis `layers`.

One layer is compiled, however many there are. With `scan=False` each keeps parameters of its own,
which a CPU need not copy out of a stack, nor gradients into one; each is compiled. The numbers are
the same, dropout masks included. On a mesh with `pipe` > 1 each stage of the mesh holds and
computes its own layers (`sharding.pipeline`). A model says into how many microbatches its batch is
cut, which decides what a layer sees at once and its dropout masks; it never says how many stages
there are.
"""

from collections.abc import Callable, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fw import precision
from fw.errors import FwError
from sharding.parallel.pipeline import LAYERS, in_turn, pipeline, stage_count


class Stack(nnx.Module):
    """`count` layers of one kind, one after another.

    Entry i of each parameter of `layers` is layer i's. With `rounds` > 1 the parameters are
    [rounds, count / rounds, ...], layer by layer in this order.

    >>> from fw.models.layers import Dense
    >>> class Layer(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.dense = Dense(8, 8, ("embed", "mlp"), std=0.1, rngs=rngs)
    ...     def __call__(self, x, key):
    ...         return x + self.dense(x)
    >>> stack = Stack(Layer, 6, microbatches=2, rngs=nnx.Rngs(0))
    >>> stack.layers.dense.kernel.shape, stack(jax.numpy.ones((4, 3, 8))).shape
    ((6, 8, 8), (4, 3, 8))
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        count: int,
        *,
        rngs: nnx.Rngs,
        microbatches: int = 8,
        rounds: int = 1,
        remat: str | None = None,
        has_aux: bool = False,
        scan: bool = True,
    ):
        """Makes the layers, each of its own key.

        Args:
          make: makes one layer, `layer(x, *extras, key, **own) -> x`, that holds parameters only.
          count: of layers.
          rngs: its stream `params` gives the layers' keys.
          microbatches, rounds, remat, has_aux: as in `sharding.pipeline`.
          scan: False keeps the layers apart: `layers` is a list, and no stages.
        """
        if count < 1 or rounds < 1 or count % rounds:
            raise FwError(f"{count} layers do not divide into {rounds} rounds")

        def parameters(key: jax.Array) -> nnx.State:
            _, params, others = nnx.split(make(nnx.Rngs(params=key)), nnx.Param, ...)
            for path, variable in nnx.to_flat_state(others):
                raise FwError(
                    f"a layer of a stack holds parameters only, but {_joined(path)!r} is a "
                    f"{type(variable).__name__}; dropout takes its key as an argument"
                )
            return params

        graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), count)
        self.microbatches = microbatches
        self.rounds = rounds
        self.remat = remat
        self.has_aux = has_aux
        if not scan:
            self.layers = nnx.List([nnx.merge(graph, parameters(key)) for key in keys])
            return
        params = jax.vmap(parameters)(keys)
        lead = (LAYERS,) if rounds == 1 else (None, LAYERS)
        if rounds > 1:
            params = jax.tree.map(lambda p: p.reshape(rounds, -1, *p.shape[1:]), params)
        for path, variable in nnx.to_flat_state(params):
            if (axes := variable.get_metadata().get("axes")) is None:
                raise FwError(f"{_joined(path)!r} names no axes; give the Param axes=(...)")
            variable.set_metadata(axes=(*lead, *axes))
        self.layers = nnx.merge(graph, params)

    def __call__(
        self,
        x: Any,
        *extras: Any,
        key: jax.Array | None = None,
        own: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> Any:
        """Applies the layers.

        Args:
          x: a tree of arrays [batch, ...].
          *extras: trees of arrays [batch, ...] or None, which every layer is given.
          key: of dropout; every layer and microbatch is given its own.
          own: arrays [layers], by name: of which every layer is given its entry, which is traced
            where layers are stacked, and known where they are apart.

        Returns:
          x after the last layer; with `has_aux`, also aux, summed over layers and averaged over
          microbatches.
        """
        options: Any = {"microbatches": self.microbatches, "remat": self.remat}
        options |= {"extra": extras, "key": key, "has_aux": self.has_aux}
        if isinstance(self.layers, nnx.List):
            graphs, params = zip(*[_parts(layer) for layer in self.layers], strict=True)

            def alone(number):
                mine = {name: values[number] for name, values in own.items()}
                return lambda params, x, extras, key: nnx.merge(graphs[number], nnx.State(params))(
                    x, *extras, key, **mine
                )

            return in_turn([alone(i) for i in range(len(params))], params, x, **options)
        graph, params = _parts(self.layers)
        lead = jax.tree.leaves(params)[0].shape[: 1 if self.rounds == 1 else 2]
        entries = {name: jnp.reshape(values, lead) for name, values in own.items()}

        def layer(entry, x, extras, key):
            params, mine = entry
            return nnx.merge(graph, nnx.State(params))(x, *extras, key, **mine)

        return pipeline(
            precision.here(layer) if stage_count() > 1 else layer,  # stages are mapped
            (params, entries),
            x,
            rounds=self.rounds,
            **options,
        )

    def extend(self, x: Any, cache: Any, *extras: Any) -> tuple[Any, Any]:
        """Applies layers that read and extend a cache, one after another on every device.

        Args:
          x: as above.
          cache: a tree of arrays, given to every layer with the layer's number, which returns it.
            Layers that are apart come as they are for the one token of a text that is generated,
            and stacked for more: a program with many layers takes long to compile.
          *extras: as above.

        Returns:
          x after the last layer, and the cache.
        """
        if isinstance(self.layers, nnx.List) and jax.tree.leaves(x)[0].shape[1] == 1:
            for number, layer in enumerate(self.layers):
                x, cache = layer(x, *extras, cache=(cache, jnp.int32(number)))
            return x, cache
        graph, params = self._stacked()
        if self.rounds > 1:
            params = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), params)
        count = len(jax.tree.leaves(params)[0])

        def layer(carry, entry):
            params, number = entry
            x, cache = carry
            return nnx.merge(graph, nnx.State(params))(x, *extras, cache=(cache, number)), None

        carry, _ = lax.scan(layer, (x, cache), (params, jnp.arange(count, dtype=jnp.int32)))
        return carry

    def _stacked(self) -> tuple[Any, Any]:
        """One layer's structure, and the parameters of all, stacked."""
        if not isinstance(self.layers, nnx.List):
            return _parts(self.layers)
        graphs, layers = zip(*[_parts(layer) for layer in self.layers], strict=True)
        return graphs[0], jax.tree.map(_stack, *layers)


def _parts(layer: nnx.Module) -> tuple[Any, Any]:
    """Structure and parameters."""
    graph, state = nnx.split(layer)
    return graph, nnx.to_pure_dict(state)


def _stack(*leaves: jax.Array) -> jax.Array:
    # In two steps that compressed leaves know.
    return lax.concatenate([lax.reshape(leaf, (1, *leaf.shape)) for leaf in leaves], 0)


def apart(params: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The parameters of a stack's layers as `scan=False` has them.

    Args:
      params: of `layers`; compressed leaves are cut like others.
      count: of layers.

    >>> apart({"kernel": jnp.ones((2, 3))}, 2)["1"]["kernel"].shape
    (3,)
    """
    return {str(i): jax.tree.map(itemgetter(i), dict(params)) for i in range(count)}


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
