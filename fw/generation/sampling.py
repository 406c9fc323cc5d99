"""How the next token is chosen: of each row's logits, by each row's own settings and seed.

A token is a pure function of its logits, the settings, the seed and its place in the text: not of
what else is in the batch, nor of how the logits were computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw.errors import FwError


@dataclass(frozen=True)
class Sampling:
    """The settings of one text.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token, whatever the rest says.
      top_k: only the k likeliest tokens; 0 for all.
      top_p: only the likeliest tokens that together have this probability (nucleus sampling,
        Holtzman et al. 2019, arXiv:1904.09751); 1 for all.
      min_p: only tokens with this share of the likeliest one's probability (Nguyen et al. 2024,
        arXiv:2407.01082); 0 for all.
      repetition_penalty: divides positive logits of tokens that were there, multiplies negative
        ones (Keskar et al. 2019, arXiv:1909.05858); 1 for none.
      seed: texts with the same seed and settings come out the same.

    >>> Sampling(top_p=1.5)
    Traceback (most recent call last):
    ...
    fw.errors.FwError: top_p is 1.5; expected more than 0, at most 1
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        """Checks the ranges."""
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "more than 0"),
            ("seed", 0 <= self.seed < 2**32, "0 to 4294967295"),
        ):
            if not good:
                raise FwError(f"{name} is {getattr(self, name)}; expected {expected}")


_DTYPES = {"top_k": np.int32, "seed": np.uint32}


def controls(settings: Sequence[Sampling]) -> dict[str, np.ndarray]:
    """The settings of a batch, [B] each.

    >>> controls([Sampling(seed=1), Sampling(seed=2)])["seed"]
    array([1, 2], dtype=uint32)
    """
    return {
        f.name: np.array([getattr(s, f.name) for s in settings], _DTYPES.get(f.name, np.float32))
        for f in fields(Sampling)
    }


def choose(
    logits: jax.Array,
    positions: jax.Array,
    control: dict[str, Any],
    seen: jax.Array | None = None,
    *,
    random: bool = True,
) -> jax.Array:
    """The next token of every row.

    Temperature comes first, then top-k, top-p of what that leaves, and min-p, as in transformers.

    Args:
      logits: [B, V], floating.
      positions: int [B], the place of the token to choose in its text.
      control: as `controls` gives it.
      seen: bool [B, V], the tokens that `repetition_penalty` is for; None: no row has any.
      random: False if no row has a temperature.

    Returns:
      int32 [B].

    >>> control = controls([Sampling(), Sampling(temperature=1.0, top_k=1)])
    >>> choose(jnp.array([[1.0, 3.0], [2.0, 1.0]]), jnp.array([4, 4]), control)
    Array([1, 0], dtype=int32)
    """
    logits = logits.astype(jnp.float32)
    if seen is not None:
        penalty = control["repetition_penalty"][:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not random:
        return best
    warm = control["temperature"] > 0
    scaled = logits / jnp.where(warm, control["temperature"], np.float32(1))[:, None]
    scaled = jnp.where(scaled >= _least(scaled, control)[:, None], scaled, -jnp.inf)
    drawn = jax.vmap(_draw)(control["seed"], positions, scaled)
    return jnp.where(warm, drawn, best)


def _draw(seed: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _least(logits: jax.Array, control: dict[str, Any]) -> jax.Array:
    """The least logit that the settings of each row allow, [B]."""
    falling = -jnp.sort(-logits, axis=-1)
    top_k = control["top_k"][:, None]
    place = jnp.arange(logits.shape[1], dtype=jnp.int32)
    among = (top_k == 0) | (place < top_k)
    shares = jax.nn.softmax(jnp.where(among, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    kept = among & (before < control["top_p"][:, None])
    kept &= shares >= control["min_p"][:, None] * shares[:, :1]
    last = jnp.maximum(jnp.sum(kept, axis=-1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(falling, last[:, None], axis=-1)[:, 0]
