"""Whether a choice does what was predicted of it: bytes, damage and seconds, measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from compress.candidates import table
from compress.choice import Choice
from compress.damage import damage_by
from compress.interpreter import apply
from compress.latency import medians


@dataclass(frozen=True)
class Verified:
    """Figures of a choice that was carried out.

    Attributes:
        choice: with what was predicted.
        bytes: of the tree.
        damage: to the outputs, all leaves compressed together and activations rounded.
        seconds: of the function.
        before: seconds of the function with the parameters as they were.
    """

    choice: Choice
    bytes: int
    damage: float
    seconds: float
    before: float

    def __str__(self) -> str:
        """Prediction and measurement side by side."""
        said = self.choice
        predicted = "-" if said.seconds is None else f"{said.seconds * 1e3:.3f} ms"
        return table(
            ["", "predicted", "measured"],
            [
                ["bytes", f"{said.bytes:,}", f"{self.bytes:,}"],
                ["damage", f"{said.damage:.2e}", f"{self.damage:.2e}"],
                ["latency", predicted, f"{self.seconds * 1e3:.3f} ms"],
                ["before", "", f"{self.before * 1e3:.3f} ms"],
            ],
        )


def verify(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    choice: Choice,
    metric: Callable[[Any, Any], Any] | None = None,
    stats: Mapping[str, Any] | None = None,
    rounds: int = 20,
) -> Verified:
    """Carry a choice out and measure what `compress.search` predicted of it.

    Args:
        fn, params, args, metric, stats: as they were given to `compress.sensitivity`.
        choice: of `compress.search`.
        rounds: how often the function is timed, before and after in turn; medians count.

    Raises:
        ValueError: as the choice's call, or the damage is not finite.
        NotImplementedError: `fn` uses a leaf as no compressed array can be used.

    >>> import jax.numpy as jnp
    >>> from compress.choice import search
    >>> from compress.damage import sensitivity
    >>> params, x = {"kernel": jnp.eye(64)}, jnp.ones((8, 64))
    >>> fn = lambda p, x: x @ p["kernel"]
    >>> choice = search(sensitivity(fn, params, x, candidates=["int8", "keep"]), max_bytes=5000)
    >>> print(verify(fn, params, x, choice=choice))
               predicted  measured
    bytes          4,352     4,352
    damage  ...
    """
    small, report = choice(params, stats)
    run = jax.jit(apply(fn))
    damage = damage_by(metric, run(params, *args))(run(small, *args), "the choice")
    before, after = medians([lambda: run(params, *args), lambda: run(small, *args)], rounds)
    return Verified(choice, sum(r.bytes_after for r in report), damage, after, before)
