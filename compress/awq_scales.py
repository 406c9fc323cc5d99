"""AWQ: weights that meet large activations are enlarged before they are rounded.

    s_j = (mean |x_j|)^r / √(max s · min s),   values = Q(s · w),   input_scale = 1 / s

The exponent r is searched for: of r = 0, 1/n … (n − 1)/n, that with the least error of outputs over
the calibration data, tr(Δᵀ H Δ) for Δ = Q(s · w) / s − w. Without a Hessian, its diagonal is taken
to be (mean |x_j|)² and the rest zero. r = 0 is s = 1, so the result is never worse than rounding.

Source: Lin et al. 2023, https://arxiv.org/abs/2306.00978.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.arrays import Quantized
from compress.calibrated import (
    Calibrated,
    fixed,
    matrices,
    met,
    of_channels,
    unfit_method,
    unknown_scale,
)
from compress.gptq_solver import HIGHEST
from compress.nearest import ByScheme, finished
from compress.prepare import scaled, unscalable, usual
from compress.scheme import Scheme, fit, floats, grid, snapped
from compress.transform import Rules

LEAST = np.float32(1e-4)
"""Smallest s before it is normalised."""


@dataclass(frozen=True)
class Awq(ByScheme, Calibrated):
    """See `awq`, which makes it."""

    steps: int = 20
    name: ClassVar[str] = "awq"
    second: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check it."""
        super().__post_init__()
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"awq: steps={self.steps!r}: expected a whole number from 1")

    def unfit(self, leaf: Any, option: Scheme) -> str:
        """See `Leafwise.unfit`."""
        return (
            unfit_method(leaf, option, option.role)
            or unscalable(leaf, self.name)
            or unknown_scale(leaf, option, scaled=True)
        )

    def unmet(self, leaf: Any, option: Scheme, observed: Any) -> str:
        """See `Calibrated.unmet`."""
        return fixed(observed, self.name) or super().unmet(leaf, option, observed)

    def leaf(self, leaf: Any, option: Scheme, observed: Any) -> Quantized:
        """See `Leafwise.leaf`."""
        role = option.role
        assert role is not None
        w, seen = floats(leaf), met(leaf, observed, role)
        stack = matrices(w, role)
        means = seen.abssum / jnp.maximum(seen.rows, 1)[..., None]
        by_input = of_channels(means, w.shape, role, jnp.mean)
        if seen.hessian is None:
            metric = (means * means).reshape(*stack.shape[:2])
        else:
            metric = seen.hessian.reshape(*stack.shape[:2], -1)

        def one(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            w, mean, metric = parts
            return search(w, mean, metric, option, self.steps)

        s = lax.map(one, (stack, by_input.reshape(len(stack), -1), metric))
        prepared = scaled(leaf, s.reshape(by_input.shape))
        return finished(fit(prepared, option, role), option, observed)

    def describe(self, option: Scheme) -> str:
        """See `Leafwise.describe`."""
        return f"{option} by AWQ"


def awq(rules: Rules | Scheme | str = "int4", *, steps: int = 20) -> Awq:
    """A transform that quantises as `quantize` does, after scaling inputs by how large they are.

    It needs statistics; with Hessians it weighs errors by them. Only the error of rounded weights
    is weighed: for formats that round activations too, see `smooth`. A channel in which calibration
    saw zeros only has s = 1. Ranges are clipped as the scheme says.

    Args:
        rules: as in `quantize`; kernels and convolutions, any format.
        steps: how many exponents are tried.

    Returns:
        The transform; its call raises as `Transform` says, for tables and rotated leaves too.

    Raises:
        ValueError: an option is none.

    Source: https://arxiv.org/abs/2306.00978, whose scales go into the layer before; here they stay
    with the array, so that nothing else changes.

    >>> from compress.observing import observe
    >>> params = {"kernel": jnp.array([[0.7, 0.1], [7.0, 7.0]])}
    >>> x = jnp.array([[9.0, 0.1], [8.0, 0.1]])
    >>> _, stats = observe(lambda p, x: x @ p["kernel"])(params, x)
    >>> small, _ = awq({"kernel": {"format": "int4", "per": 2}})(params, stats)
    >>> small["kernel"].input_scale[0] < small["kernel"].input_scale[1]
    Array([ True], dtype=bool)
    """
    return Awq(*usual(rules), steps=steps)


def search(
    w: jax.Array, mean: jax.Array, metric: jax.Array, scheme: Scheme, steps: int
) -> jax.Array:
    """s of one array.

    Args:
        w: float32 [K, out].
        mean: float32 [inputs], mean |x|; K is a multiple of inputs, which run fastest.
        metric: float32 [K, K], or [K] if it is diagonal.
        scheme: of which granularity counts as a kernel's.
        steps: how many exponents are tried.

    Returns:
        float32 [inputs], the first of the best; NaN if no error is finite.

    >>> search(jnp.ones((2, 3)), jnp.ones(2), jnp.ones(2), Scheme("int8"), 4)
    Array([1., 1.], dtype=float32)
    """
    places = len(w) // len(mean)

    def attempt(i: jax.Array, state: Any) -> Any:
        least, best = state
        s = exponential(mean, i.astype(jnp.float32) * np.float32(1 / steps))
        column = jnp.tile(s, places)[:, None]
        changed = w * column
        off = snapped(changed, grid(changed, scheme, "kernel"), scheme) / column - w
        error = weighed(off, metric)
        better = error < least
        return jnp.where(better, error, least), jnp.where(better, s, best)

    start = (jnp.float32(np.inf), jnp.full_like(mean, np.nan))
    return lax.fori_loop(0, steps, attempt, start)[1]


def exponential(mean: jax.Array, r: jax.Array) -> jax.Array:
    """mean^r, normalised to have max s · min s = 1; 1 where the mean is 0.

    >>> exponential(jnp.array([4.0, 0.0, 1.0]), jnp.float32(0.5)).round(4)
    Array([1.4142, 1.    , 0.7071], dtype=float32)
    """
    seen = mean != 0
    s = jnp.maximum(jnp.where(seen, mean, 1) ** r, LEAST)
    top = jnp.max(s, where=seen, initial=LEAST)
    low = jnp.min(s, where=seen, initial=np.inf)
    any_seen = jnp.any(seen)
    return jnp.where(seen, s / jnp.where(any_seen, jnp.sqrt(top * low), 1), 1)


def weighed(off: jax.Array, metric: jax.Array) -> jax.Array:
    """tr(Δᵀ H Δ), H being [K, K] or the diagonal of it [K].

    >>> weighed(jnp.ones((2, 1)), jnp.ones((2, 2))), weighed(jnp.ones((2, 1)), jnp.ones(2))
    (Array(4., dtype=float32), Array(2., dtype=float32))
    """
    if metric.ndim == 1:
        return jnp.sum(metric[:, None] * off * off)
    return jnp.sum(off * jnp.matmul(metric, off, precision=HIGHEST))
