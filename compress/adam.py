"""Adam whose moments take a byte each: a quarter of the optimiser's memory.

    m ← b₁·m + (1 − b₁)·g,   v ← b₂·v + (1 − b₂)·g²,   update = m̂ / (√v̂ + ε)

Computed in float32 as ever; only what is kept from one step to the next is in codes
(`compress.moments`), whose blocks lie where the parameter's numbers do.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress.arrays import is_compressed
from compress.moments import chance, coded, start
from compress.scheme import in_stack
from compress.transform import path_name


class GradientTransformation(NamedTuple):
    """What optax takes for one of its own: `optax.chain` and others only call these two.

    What makes one says that it returns `Any`: to a type checker, too, it is optax's.
    """

    init: Any
    update: Any


class Adam8bitState(NamedTuple):
    """What is kept of the gradients.

    Attributes:
        count: int32, steps taken.
        mu, nu: trees like the parameters, of `Moment`s and, where they are small, float32.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam_8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Any:
    """An optax transformation: `optax.scale_by_adam` with moments of 8 bits.

    It chains, checkpoints and shards as any: a moment's codes have the shape of its parameter, its
    scales the parameter's rank, and `Moment.place` says where they lie. Blocks are of up to 256
    neighbours. Rounding by chance depends on step, parameter and place alone.

    Args:
        b1: decay of the mean of the gradients.
        b2: decay of the mean of their squares.
        eps: the term in the denominator.

    Source: Dettmers et al. 2021, https://arxiv.org/abs/2110.02861, with codes that need no table.

    >>> tx = scale_by_adam_8bit()
    >>> params = {"w": jnp.zeros((64, 256)), "b": jnp.zeros(256)}
    >>> state = tx.init(params)
    >>> sum(x.nbytes for x in jax.tree.leaves((state.mu["w"], state.nu["w"]))) / (8 * 64 * 256)
    0.25390625
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, state = tx.update(grads, state)
    >>> updates["w"][0, 0].round(3), state.count.item()
    (Array(1., dtype=float32), 1)
    """

    def init(params: Any) -> Adam8bitState:
        def zeros(positive: bool) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, p: start(
                    p.shape, positive=positive, stacked=in_stack(path_name(path))
                ),
                params,
            )

        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(False), zeros(True))

    def update(updates: Any, state: Adam8bitState, params: Any = None) -> tuple[Any, Adam8bitState]:
        del params
        count = state.count + 1
        steps = count.astype(jnp.float32)
        least = 1 - np.float32(b1) ** steps, 1 - np.float32(b2) ** steps

        def one(path: Any, seed: Any, g: jax.Array, m: Any, v: Any) -> tuple[Any, Any, Any]:
            wide, stacked = g.astype(jnp.float32), in_stack(path_name(path))
            m = np.float32(b1) * _floats(m) + np.float32(1 - b1) * wide
            v = np.float32(b2) * _floats(v) + np.float32(1 - b2) * jnp.square(wide)
            step = (m / least[0]) / (jnp.sqrt(v / least[1]) + np.float32(eps))
            noise = chance(v.shape, seed)
            return (
                step.astype(g.dtype),
                coded(m, stacked=stacked),
                coded(v, noise=noise, stacked=stacked),
            )

        pairs, treedef = jax.tree_util.tree_flatten_with_path(updates)
        seeds = [
            count.astype(jnp.uint32) * np.uint32(65599) + np.uint32(i) for i in range(len(pairs))
        ]
        moments = (treedef.flatten_up_to(x) for x in (state.mu, state.nu))
        new = [
            one(path, seed, g, m, v)
            for (path, g), seed, m, v in zip(pairs, seeds, *moments, strict=True)
        ]
        out, mu, nu = (jax.tree.unflatten(treedef, [x[k] for x in new]) for k in range(3))
        return out, Adam8bitState(count, mu, nu)

    return GradientTransformation(init, update)


def _floats(moment: Any) -> jax.Array:
    return moment.dense() if is_compressed(moment) else moment
