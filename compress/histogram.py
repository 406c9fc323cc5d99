"""Histograms of magnitudes, and the thresholds that calibration finds in them.

Everybody has the same bins, so histograms of batches, devices and layers add. A bin is an exponent
and the first four bits of the mantissa: 16 bins an octave, each 3 to 6 % wide, from 2⁻⁴⁰ to 2²⁴.
Which bin a float is in are bits that it has, not a logarithm that platforms round differently. All
that fits float16, and any activation worth eight bits, lies between; smaller values and zeros are
in the first bin, larger ones in the last.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MANTISSA = 4
"""Bits of the mantissa that tell bins apart: 2⁴ bins an octave."""

LOWEST, HIGHEST = -40, 24
"""Exponents of two between which bins lie."""

BINS = (HIGHEST - LOWEST) << MANTISSA
"""Bins of a histogram: 1024."""

LINEAR, STRIDE = 2048, 8
"""Bins of equal width between which "entropy" chooses, and how many it moves on at a time."""

EXACT = 1 << 24
"""How far a float32 counts. Beyond, partial histograms ("lanes") each count a part."""

_LANES = 32  # at least: they also spread what is added to the same bin at once


def _edges() -> np.ndarray:
    steps = np.arange(BINS + 1)
    within = 1 + (steps % (1 << MANTISSA)) / (1 << MANTISSA)
    edges = within * 2.0 ** (LOWEST + (steps >> MANTISSA))
    edges[0] = 0
    return edges.astype(np.float32)


EDGES = _edges()
"""float32 [BINS + 1]: bin b holds EDGES[b] ≤ |x| < EDGES[b + 1]."""


def bin_of(magnitude: jax.Array) -> jax.Array:
    """The number of each magnitude's bin, int32.

    >>> bin_of(jnp.array([0.0, 2.0**-40, 1.0, 1.07, 1e30])).tolist()
    [0, 0, 640, 641, 1023]
    """
    bits = lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)
    first = (127 + LOWEST) << MANTISSA
    return jnp.clip((bits >> (23 - MANTISSA)) - first, 0, BINS - 1)


def lane_of(shape: Sequence[int], lanes: int) -> jax.Array:
    """Each element's number modulo lanes, int32: each lane has as many elements, but for one.

    From the elements' indices by axis, not of the flattened array, which a mesh would have to
    gather.

    >>> lane_of((2, 3), 4).tolist()
    [[0, 1, 2], [3, 0, 1]]
    """
    lane = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % lanes if lanes else 0
        if stride:
            index = lax.broadcasted_iota(jnp.int32, shape, axis)
            lane += index % np.int32(lanes) * np.int32(stride)
    return lane % np.int32(max(lanes, 1))


def parse_method(method: str) -> tuple[str, float | None]:
    """A calibration method's name and its percentage, if it has one.

    Raises:
        ValueError: an unknown method, or a percentage that is none.

    >>> parse_method("percentile:99.9"), parse_method("percentile"), parse_method("mse")
    (('percentile', 99.9), ('percentile', 99.99), ('mse', None))
    """
    if isinstance(method, str):
        name, colon, number = method.partition(":")
        if name == "percentile":
            return name, _percent(method, number if colon else "99.99")
        if method in ("absmax", "mse", "entropy"):
            return method, None
    raise ValueError(
        f"calibration method {method!r} is unknown; expected 'absmax', 'percentile:99.99', "
        "'mse' or 'entropy'"
    )


def counts(magnitude: jax.Array, stack: int = 0) -> jax.Array:
    """Histograms of magnitudes.

    Args:
        magnitude: float32 ≥ 0 and finite, any shape.
        stack: how many leading axes have histograms of their own.

    Returns:
        float32 [*stack, BINS].

    >>> seen = counts(jnp.array([1.0, 1.0, 3.0]))
    >>> seen[640], seen.sum()
    (Array(2., dtype=float32), Array(3., dtype=float32))
    """
    if stack:
        return jax.vmap(lambda m: counts(m, stack - 1))(magnitude)
    magnitude = jnp.atleast_1d(magnitude)
    lanes = max(min(_LANES, magnitude.size), -(-magnitude.size // EXACT))
    lane = lane_of(magnitude.shape, lanes)
    # Of float32: XLA:CPU scatters integers ten times more slowly.
    each = jnp.zeros((lanes, BINS), jnp.float32).at[lane, bin_of(magnitude)].add(np.float32(1))
    return jnp.sum(each, 0)


def threshold(observed: Any, method: str, *, levels: int = 127) -> jax.Array:
    """The magnitude that should become the largest code of quantised activations.

    "absmax": the largest that came. "percentile:p" (99.99 without p): the one below which p percent
    of all lie. "mse": that of the least expected squared error of rounding, ∫ (x − Q(x))² dx.
    "entropy": that of the least Kullback-Leibler divergence Σ P log (P / Q) between what came and
    what is left of it. The last two take values to be spread evenly within a bin.

    Args:
        observed: an `Observed`, or what else has a `histogram` [*stack, BINS] and `absmax`
            [*stack, K].
        method: of those.
        levels: codes above zero, 127 of int8.

    Returns:
        float32 [*stack]; 0 where nothing came but zeros.

    Raises:
        ValueError: an unknown method, or a percentage that is none.

    Source: "entropy", Migacz 2017, "8-bit inference with TensorRT", GTC; all of them, Wu et al.
    2020, https://arxiv.org/abs/2004.09602.

    >>> from types import SimpleNamespace
    >>> x = jnp.linspace(0, 1, 1001)
    >>> seen = SimpleNamespace(histogram=counts(x), absmax=jnp.ones(1))
    >>> threshold(seen, "absmax"), threshold(seen, "percentile:50").round(2)
    (Array(1., dtype=float32), Array(0.5, dtype=float32))
    """
    absmax = jnp.max(observed.absmax, -1)
    histogram = observed.histogram
    name, percent = parse_method(method)
    if name == "absmax":
        return absmax
    if percent is not None:
        return jnp.minimum(percentile(histogram, percent), absmax)
    if name == "mse":
        return least_error(histogram, absmax, levels)
    one = lambda h, m: least_divergence(h, m, levels)  # noqa: E731
    return _each(one, histogram.ndim - 1)(histogram, absmax)


def _percent(method: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise ValueError(f"calibration method {method!r}: expected a number above 0 and up to 100")
    return value


def _each(fn: Callable, stack: int) -> Callable:
    for _ in range(stack):
        fn = jax.vmap(fn)
    return fn


def _above(histogram: jax.Array) -> jax.Array:
    """How many lie at or above each edge, [..., BINS + 1]."""
    # Summed from the top: the few large ones, which decide, are not lost among the many.
    above = jnp.flip(jnp.cumsum(jnp.flip(histogram, -1), -1), -1)
    return jnp.concatenate([above, jnp.zeros_like(above[..., :1])], -1)


def percentile(histogram: jax.Array, percent: float) -> jax.Array:
    """The magnitude below which so many percent lie, to a bin's width.

    Args:
        histogram: [*stack, BINS].
        percent: above 0, up to 100.

    Returns:
        float32 [*stack].

    >>> percentile(counts(jnp.arange(1.0, 101.0)), 90.0).round()
    Array(91., dtype=float32)
    """
    above = _above(histogram)
    beyond = above[..., :1] * np.float32(1 - percent / 100)
    b = jnp.sum(above > beyond, -1, keepdims=True) - 1
    b = jnp.clip(b, 0, BINS - 1)
    inside = jnp.take_along_axis(histogram, b, -1)
    more = jnp.take_along_axis(above, b, -1) - beyond
    part = jnp.clip(more / jnp.maximum(inside, np.float32(1e-30)), 0, 1)
    edges = jnp.asarray(EDGES)
    return jnp.squeeze(edges[b] + part * (edges[b + 1] - edges[b]), -1)


def least_error(histogram: jax.Array, absmax: jax.Array, levels: int) -> jax.Array:
    """The threshold with the least expected squared error, among all edges and the maximum.

    With steps s = T / levels, values up to T are off by at most s / 2 and larger ones by x − T. For
    x = a … b spread evenly the first is s² (F(b/s) − F(a/s)) / (b/s − a/s) on average, with
    F(v) = ∫₀ᵛ (t − round t)² dt = round(v) / 12 + (v − round v)³ / 3.

    Args:
        histogram: [*stack, BINS].
        absmax: [*stack].
        levels: codes above zero.

    Returns:
        float32 [*stack].

    >>> x = jnp.append(jnp.linspace(0, 1, 9999), 5.0)  # a step five times as wide, for one value?
    >>> least_error(counts(x), jnp.float32(5.0), 127) < 5
    Array(True, dtype=bool)
    """
    top = jnp.expand_dims(absmax, -1)
    low, high = (jnp.minimum(jnp.asarray(e), top) for e in (EDGES[:-1], EDGES[1:]))
    third, twelfth, tiny = (np.float32(v) for v in (1 / 3, 1 / 12, 1e-30))
    share = histogram / jnp.maximum(jnp.sum(histogram, -1, keepdims=True), 1)

    def error(edge: jax.Array) -> tuple[jax.Array, jax.Array]:
        end = jnp.minimum(edge, top)
        step = jnp.maximum(end / levels, tiny)

        def integral(v: jax.Array) -> jax.Array:
            nearest = jnp.round(v)
            return nearest * twelfth + (v - nearest) ** 3 * third

        # A bin lies on one side of every candidate, for all of them are edges.
        a, b = (jnp.minimum(v, end) / step for v in (low, high))
        rounded = jnp.where(b > a, (integral(b) - integral(a)) / jnp.maximum(b - a, tiny), 0)
        a, b = (jnp.maximum(v - end, 0) for v in (low, high))
        clipped = (a * a + a * b + b * b) * third
        squared = jnp.where(low < end, rounded * step * step, clipped)
        return jnp.sum(share * squared, -1), jnp.squeeze(end, -1)

    errors, ends = lax.map(error, jnp.asarray(EDGES[1:]))
    best = jnp.argmin(errors, 0, keepdims=True)
    return jnp.squeeze(jnp.take_along_axis(ends, best, 0), 0)


def least_divergence(histogram: jax.Array, absmax: jax.Array, levels: int) -> jax.Array:
    """The threshold after which the distribution is most like the one before, of one histogram.

    Of 2048 bins up to the maximum, P is the first i, the last of which takes all larger values, and
    Q is what is left of the first i when each group of i / (levels + 1) is one level. The first
    bin counts as the second: what is zero stays zero, wherever the threshold is.

    Args:
        histogram: [BINS].
        absmax: a scalar.
        levels: codes above zero.

    Returns:
        A float32 scalar.

    >>> x = jax.random.normal(jax.random.key(0), (9999,))
    >>> t = least_divergence(counts(jnp.abs(x)), jnp.abs(x).max(), 127)
    >>> bool(jnp.percentile(jnp.abs(x), 95) < t) and bool(t <= jnp.abs(x).max())
    True
    """
    groups, edges = levels + 1, jnp.asarray(EDGES)
    at = absmax * np.linspace(0, 1, LINEAR + 1, dtype=np.float32)
    b = bin_of(at)
    low, high = edges[b], jnp.minimum(edges[b + 1], absmax)
    part = jnp.clip((high - at) / jnp.maximum(high - low, np.float32(1e-30)), 0, 1)
    above = _above(histogram)[b + 1] + histogram[b] * part
    linear = above[:-1] - above[1:]
    linear = linear.at[0].set(linear[1])
    j = jnp.arange(LINEAR)

    def divergence(i: jax.Array) -> jax.Array:
        kept = jnp.where(j < i, linear, 0)
        level = jnp.minimum(j * groups // i, groups - 1)
        there, zeros = kept > 0, jnp.zeros(groups, jnp.float32)
        sums, sizes = (zeros.at[level].add(v) for v in (kept, there.astype(jnp.float32)))
        left = jnp.where(there, (sums / jnp.maximum(sizes, 1))[level], 0)
        came = kept.at[i - 1].add(above[i])
        came, left = (v / jnp.maximum(jnp.sum(v), np.float32(1e-30)) for v in (came, left))
        ratio = jnp.where(came > 0, came / left, 1)  # infinite where nothing is left
        return jnp.sum(jnp.where(came > 0, came * jnp.log(ratio), 0))

    tried = jnp.arange(groups, LINEAR + 1, STRIDE)
    found = lax.map(divergence, tried)
    best = tried.shape[0] - 1 - jnp.argmin(jnp.flip(found))  # of equals the largest
    return at[tried[best]]
