"""Adafactor: of the mean of squared gradients, what a row and what a column has of it.

    R ← β·R + (1 − β)·mean over columns of g²,   C ← β·C + (1 − β)·mean over rows of g²
    V = R·C / mean(R),   u = g / √V,   update = u / max(1, RMS(u) / d),   β = 1 − t^−0.8

So a matrix of n × m numbers keeps n + m, and there is no mean of gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress.adam import GradientTransformation
from compress.arrays import Compressed, is_compressed, place_part
from compress.moments import SMALL
from compress.scheme import in_stack
from compress.transform import path_name


class RowsColumns(Compressed):
    """A mean of squares of a parameter [..., n, m], as the product of its rows' and columns' means.

    Attributes:
        rows: float32 [..., n, 1].
        columns: float32 [..., 1, m].
    """

    rows: jax.Array
    columns: jax.Array

    def aval(self) -> Any:
        """See `quax.Value`."""
        shape = (*self.rows.shape[:-1], self.columns.shape[-1])
        return jax.typeof(self.rows).update(shape=shape)

    def dense(self) -> jax.Array:
        """See `Compressed.dense`."""
        return self.rows * self.columns / jnp.mean(self.rows, -2, keepdims=True)

    def place(self, spec: Any) -> "RowsColumns":
        """See `Compressed.place`."""
        shape = self.aval().shape
        return RowsColumns(
            place_part(self.rows, shape, spec), place_part(self.columns, shape, spec)
        )


class AdafactorState(NamedTuple):
    """What is kept of the gradients.

    Attributes:
        count: int32, steps taken.
        nu: a tree like the parameters, of `RowsColumns` and, where they are small, float32.
    """

    count: jax.Array
    nu: Any


def scale_by_adafactor(decay: float = 0.8, epsilon: float = 1e-30, clip: float = 1.0) -> Any:
    """An optax transformation: gradients divided by roots of factored means of their squares.

    It chains, checkpoints and shards as any: rows and columns have the parameter's rank and lie as
    its axes do. Layers are the same, stacked or apart.

    Args:
        decay: β is 1 − t^−decay at step t.
        epsilon: what is added to squares.
        clip: the largest root mean square of a parameter's update.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, algorithm 4.

    >>> tx = scale_by_adafactor()
    >>> params = {"w": jnp.zeros((64, 256)), "b": jnp.zeros(256)}
    >>> state = tx.init(params)
    >>> sum(x.size for x in jax.tree.leaves(state.nu["w"]))
    320
    >>> updates, state = tx.update(jax.tree.map(lambda p: p + 2, params), state)
    >>> updates["w"][0, 0]
    Array(1., dtype=float32)
    """

    def init(params: Any) -> AdafactorState:
        nu = jax.tree_util.tree_map_with_path(
            lambda path, p: _zeros(p.shape, in_stack(path_name(path))), params
        )
        return AdafactorState(jnp.zeros((), jnp.int32), nu)

    def update(updates: Any, state: AdafactorState, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        beta = 1 - count.astype(jnp.float32) ** np.float32(-decay)

        def one(path: Any, g: jax.Array, v: Any) -> tuple[jax.Array, Any]:
            wide = g.astype(jnp.float32)
            square = jnp.square(wide) + np.float32(epsilon)
            if is_compressed(v):
                v = RowsColumns(
                    beta * v.rows + (1 - beta) * jnp.mean(square, -1, keepdims=True),
                    beta * v.columns + (1 - beta) * jnp.mean(square, -2, keepdims=True),
                )
                row = v.rows / jnp.mean(v.rows, -2, keepdims=True)
                u = wide * jax.lax.rsqrt(row) * jax.lax.rsqrt(v.columns)
            else:
                v = beta * v + (1 - beta) * square
                u = wide * jax.lax.rsqrt(v)
            own = tuple(range(in_stack(path_name(path)), u.ndim))
            rms = jnp.sqrt(jnp.mean(jnp.square(u), own, keepdims=True))
            return (u / jnp.maximum(1, rms / np.float32(clip))).astype(g.dtype), v

        pairs, treedef = jax.tree_util.tree_flatten_with_path(updates)
        kept = treedef.flatten_up_to(state.nu)
        new = [one(path, g, v) for (path, g), v in zip(pairs, kept, strict=True)]
        out, nu = (jax.tree.unflatten(treedef, [x[k] for x in new]) for k in range(2))
        return out, AdafactorState(count, nu)

    return GradientTransformation(init, update)


def _zeros(shape: tuple[int, ...], stacked: bool) -> Any:
    own = shape[stacked:]
    if len(own) < 2 or np.prod(own) < SMALL:
        return jnp.zeros(shape, jnp.float32)
    rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
    return RowsColumns(jnp.zeros(rows, jnp.float32), jnp.zeros(columns, jnp.float32))
