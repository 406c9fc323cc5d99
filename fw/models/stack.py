"""Equal layers as one module, whose parameters are stacked along a first axis `layers`.

One layer is compiled, however many there are. On a mesh with `pipe` > 1 each stage of the mesh
holds and computes its own layers (`sharding.pipeline`). A model says into how many microbatches its
batch is cut, which decides what a layer sees at once and its dropout masks; it never says how many
stages there are.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fw import precision
from fw.errors import FwError
from sharding.parallel.pipeline import LAYERS, pipeline, stage_count


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
    ):
        """Makes the layers, each of its own key.

        Args:
          make: makes one layer, `layer(x, *extras, key) -> x`, that holds parameters only.
          count: of layers.
          rngs: its stream `params` gives the layers' keys.
          microbatches, rounds, remat, has_aux: as in `sharding.pipeline`.
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
        params = jax.vmap(parameters)(keys)
        lead = (LAYERS,) if rounds == 1 else (None, LAYERS)
        if rounds > 1:
            params = jax.tree.map(lambda p: p.reshape(rounds, -1, *p.shape[1:]), params)
        for path, variable in nnx.to_flat_state(params):
            if (axes := variable.get_metadata().get("axes")) is None:
                raise FwError(f"{_joined(path)!r} names no axes; give the Param axes=(...)")
            variable.set_metadata(axes=(*lead, *axes))
        self.layers = nnx.merge(graph, params)
        self.microbatches = microbatches
        self.rounds = rounds
        self.remat = remat
        self.has_aux = has_aux

    def __call__(self, x: Any, *extras: Any, key: jax.Array | None = None) -> Any:
        """Applies the layers.

        Args:
          x: a tree of arrays [batch, ...].
          *extras: trees of arrays [batch, ...] or None, which every layer is given.
          key: of dropout; every layer and microbatch is given its own.

        Returns:
          x after the last layer; with `has_aux`, also aux, summed over layers and averaged over
          microbatches.
        """
        graph, params = nnx.split(self.layers)

        def layer(params, x, extras, key):
            return nnx.merge(graph, nnx.State(params))(x, *extras, key)

        return pipeline(
            precision.here(layer) if stage_count() > 1 else layer,  # stages are mapped
            nnx.to_pure_dict(params),
            x,
            extra=extras,
            key=key,
            microbatches=self.microbatches,
            rounds=self.rounds,
            remat=self.remat,
            has_aux=self.has_aux,
        )


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
