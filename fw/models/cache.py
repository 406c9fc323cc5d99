"""Keys and values of the tokens that a decoder has read, so that it reads each once.

It goes into a model as `batch["cache"]` and comes out with more in it. All rows of a batch write to
the same slots, so shorter texts begin with empty ones, and every slot says which position of its
row's text it holds.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sharding import constrain

EMPTY = -1
"""The position of a slot, or of a token, that is of no text."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What a decoder has read.

    Attributes:
      key, value: [layers, batch, slots, key heads, head_dim].
      positions: int32 [batch, slots], each slot's in its text, or `EMPTY`.
      filled: int32 scalar: slots before it are written.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    filled: jax.Array

    def begin(self, positions: jax.Array) -> "Cache":
        """Takes the positions [batch, length] of tokens that come next."""
        where = (jnp.zeros((), jnp.int32), self.filled)
        return dataclasses.replace(
            self, positions=lax.dynamic_update_slice(self.positions, positions, where)
        )

    def bias(
        self, positions: jax.Array, dtype: jax.typing.DTypeLike, window: int | None
    ) -> jax.Array:
        """What to add to the scores of these tokens and all slots: [batch, 1, length, slots].

        A token sees itself and what comes before it in its text, `window` places back if given.
        """
        back = positions[:, :, None] - self.positions[:, None, :]
        seen = (self.positions != EMPTY)[:, None, :] & (back >= 0)
        if window is not None:
            seen &= back <= window
        low = jnp.asarray(jnp.finfo(dtype).min / 2, dtype)
        return jnp.where(seen, jnp.zeros((), dtype), low)[:, None]

    def extend(
        self, layer: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array, "Cache"]:
        """Writes a layer's keys and values of the tokens of `begin`.

        Args:
          layer: its number, an int32 scalar.
          key, value: [batch, length, key heads, head_dim].

        Returns:
          All keys and values of the layer, [batch, slots, key heads, head_dim] each, and the cache.
        """
        zero = jnp.zeros((), jnp.int32)
        where = (layer, zero, self.filled, zero, zero)
        keys, values = (
            lax.dynamic_update_slice(whole, new[None].astype(whole.dtype), where)
            for whole, new in ((self.key, key), (self.value, value))
        )
        own = (lax.dynamic_index_in_dim(whole, layer, 0, False) for whole in (keys, values))
        return *own, dataclasses.replace(self, key=keys, value=values)

    def end(self, length: int) -> "Cache":
        """Goes on to the slots behind `length` tokens."""
        return dataclasses.replace(self, filled=self.filled + jnp.int32(length))


def empty_cache(
    layers: int,
    batch: int,
    slots: int,
    heads: int,
    size: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Cache:
    """A cache that holds nothing, sharded as keys and values are.

    >>> cache = empty_cache(layers=2, batch=1, slots=4, heads=1, size=8)
    >>> cache.key.shape, cache.positions.tolist()
    ((2, 1, 4, 1, 8), [[-1, -1, -1, -1]])
    """
    shape = (layers, batch, slots, heads, size)
    key, value = (
        constrain(jnp.zeros(shape, dtype), None, "batch", None, "heads", None) for _ in range(2)
    )
    positions = jnp.full((batch, slots), EMPTY, jnp.int32)
    return Cache(key, value, constrain(positions, "batch", None), jnp.zeros((), jnp.int32))
