"""Prepare: leaves stay floats, and become easier to quantise; the function stays the same.

    x · w = (x / s) · (s · w)                 `smooth`: large inputs are shared with the weights
    x · w = (x · H) · (H · w)                 `rotate`: large entries are shared with neighbours

What is done to x is kept with the array, so that nothing else in the function changes: the norm or
layer before need not be found, and inputs that several arrays share may differ for each. `smooth`
comes before `rotate`, and both before what quantises.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from compress.arrays import Quantized
from compress.calibrated import Calibrated, fixed, met, of_channels
from compress.formats import FLOAT
from compress.hadamard import largest_block
from compress.hadamard import rotate as turn
from compress.nearest import USUAL
from compress.scheme import ROLES, Scheme, core, floats, inputs, role_of, unfit
from compress.transform import Leafwise, Rules


@dataclass(frozen=True)
class Smoothing:
    """An option of `smooth`.

    Attributes:
        alpha: between 0 and 1; the part of a large input that moves to the weights.
        role: of `compress.scheme.ROLES`; None finds it out from path and shape.
    """

    alpha: float = 0.5
    role: str | None = None

    def __post_init__(self) -> None:
        """Check it."""
        a = self.alpha
        if isinstance(a, bool) or not isinstance(a, int | float) or not 0 < a < 1:
            raise ValueError(f"alpha={a!r}: expected a number between 0 and 1")
        _check_role(self.role)


@dataclass(frozen=True)
class Rotation:
    """An option of `rotate`.

    Attributes:
        block: a power of two that divides the input axis, or "auto": the largest up to 128.
        role: as in `Smoothing`.
    """

    block: int | str = "auto"
    role: str | None = None

    def __post_init__(self) -> None:
        """Check it."""
        b = self.block
        if b != "auto" and (type(b) is not int or b < 1 or b & (b - 1)):
            raise ValueError(f"block={b!r}: expected a power of two, or 'auto'")
        _check_role(self.role)


def _check_role(role: str | None) -> None:
    if role not in (None, *ROLES):
        raise ValueError(f"role={role!r}: expected one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Smooth(Calibrated):
    """See `smooth`, which makes it."""

    name: ClassVar[str] = "smooth"

    def parse(self, option: Any) -> Smoothing:
        """See `Leafwise.parse`."""
        return _option(Smoothing, option)

    def resolve(self, path: str, leaf: Any, option: Smoothing) -> Smoothing:
        """See `Leafwise.resolve`."""
        return dataclasses.replace(option, role=option.role or role_of(path, leaf.shape))

    def unfit(self, leaf: Any, option: Smoothing) -> str:
        """See `Leafwise.unfit`."""
        if why := unfit(leaf, Scheme(), option.role):
            return why
        if option.role == "table":
            return "rows of a table are looked up and meet no activations"
        return unscalable(leaf, self.name)

    def unmet(self, leaf: Any, option: Smoothing, observed: Any) -> str:
        """See `Calibrated.unmet`."""
        return fixed(observed, self.name) or super().unmet(leaf, option, observed)

    def leaf(self, leaf: Any, option: Smoothing, observed: Any) -> Quantized:
        """See `Leafwise.leaf`."""
        role = option.role
        assert role is not None
        w, seen = floats(leaf), met(leaf, observed, role)
        axis = w.ndim + inputs(role)[-1]
        others = tuple(a for a in range(w.ndim - core(role), w.ndim) if a != axis)
        largest_x = of_channels(seen.absmax, w.shape, role, jnp.max)
        largest_w = jnp.max(jnp.abs(w), axis=others, keepdims=True)
        new = scaled(leaf, smoothing_scale(largest_x, largest_w, option.alpha, axis))
        return dataclasses.replace(new, values=new.values.astype(_dtype(leaf)))

    def describe(self, option: Smoothing) -> str:
        """See `Leafwise.describe`."""
        return f"smoothed by {option.alpha:g}"


@dataclass(frozen=True)
class Rotate(Leafwise):
    """See `rotate`, which makes it."""

    name: ClassVar[str] = "rotate"
    local: ClassVar[bool] = False  # sums

    def parse(self, option: Any) -> Rotation:
        """See `Leafwise.parse`."""
        return _option(Rotation, option)

    def resolve(self, path: str, leaf: Any, option: Rotation) -> Rotation:
        """See `Leafwise.resolve`."""
        role, block = option.role or role_of(path, leaf.shape), option.block
        if role is not None and block == "auto" and len(leaf.shape) >= core(role):
            block = largest_block(leaf.shape[inputs(role)[-1]])
        return Rotation(block, role)

    def unfit(self, leaf: Any, option: Rotation) -> str:
        """See `Leafwise.unfit`."""
        if why := unfit(leaf, Scheme(), option.role):
            return why
        if isinstance(leaf, Quantized) and leaf.hadamard is not None:
            return "it is rotated already"
        assert option.role is not None
        axis, block = inputs(option.role)[-1], option.block
        n = leaf.shape[axis]
        scale = leaf.input_scale if isinstance(leaf, Quantized) else None
        if scale is not None and scale.shape[axis] != n:
            return "its inputs are scaled along another axis than they would be rotated"
        if block == 1:
            return f"its input axis has {n} elements, and blocks of 1 share nothing"
        if n % int(block):
            return (
                f"its input axis has {n} elements, which blocks of {block} do not divide; the "
                f"largest that do are of {largest_block(n, n)}"
            )
        return ""

    def leaf(self, leaf: Any, option: Rotation, observed: Any) -> Quantized:
        """See `Leafwise.leaf`."""
        assert option.role is not None
        axis, block = inputs(option.role)[-1], int(option.block)
        return dataclasses.replace(
            as_prepared(leaf),
            values=turn(floats(leaf), axis, block).astype(_dtype(leaf)),
            hadamard=(axis, block),
        )

    def describe(self, option: Rotation) -> str:
        """See `Leafwise.describe`."""
        return f"rotated by {option.block}"


def smooth(rules: Rules | Smoothing | float = 0.5) -> Smooth:
    """A transform that moves large activations, which are hard to round, into the weights.

        s_j = max |x_j|^α / max |w_j|^(1 − α),   values = s · w,   input_scale = 1 / s

    for each input channel j. A channel in which calibration saw zeros only has the geometric mean
    of the others' s. Values stay in the leaf's dtype. It needs statistics.

    Args:
        rules: glob pattern -> α, a `Smoothing` (or its fields), or "keep"; first match wins. An α
            alone is for every leaf whose path ends in "kernel" and that it fits.

    Returns:
        The transform; its call raises as `Transform` says, for tables and rotated leaves too.

    Source: SmoothQuant, https://arxiv.org/abs/2211.10438, whose α is 0.5, and 0.8 to 0.9 for models
    with stronger outliers.

    >>> from compress.observing import observe
    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> model = lambda p, x: x @ p["kernel"]
    >>> _, stats = observe(model)(params, jnp.array([[4.0, 1.0]]))
    >>> w = smooth({"kernel": 0.5})(params, stats)[0]["kernel"]
    >>> w.values[:, 0], w.input_scale[:, 0]
    (Array([2., 1.], dtype=float32), Array([0.5, 1. ], dtype=float32))
    """
    return Smooth(*usual(rules))


def rotate(rules: Rules | Rotation | int | str = "auto") -> Rotate:
    """A transform that multiplies inputs and weights by block Hadamard matrices.

        values = H · w,   hadamard = (axis, block)

    Sums over a block are of a smaller range than what is summed, so that both weights and the
    activations that H is applied to on the way have fewer outliers. Values stay in the leaf's
    dtype. Blocks are local to a device whose part of the axis they divide.

    Args:
        rules: glob pattern -> a block's size, "auto", a `Rotation` (or its fields), or "keep";
            first match wins. A size alone is for every leaf whose path ends in "kernel" and that
            it fits.

    Returns:
        The transform; its call raises as `Transform` says.

    Source: QuaRot, https://arxiv.org/abs/2404.00456, here with blocks and nothing fused.

    >>> w = rotate({"kernel": 2})({"kernel": jnp.array([[1.0], [1.0]])})[0]["kernel"]
    >>> w.values.round(4)[:, 0], w.dense().round(4)[:, 0]
    (Array([1.4142, 0.    ], dtype=float32), Array([1., 1.], dtype=float32))
    """
    return Rotate(*usual(rules))


def usual(rules: Any) -> tuple[Any, bool]:
    """Rules and strictness: an option alone is for the usual leaves that it fits."""
    if isinstance(rules, Mapping | list | tuple):
        return rules, True
    return ((USUAL, rules),), False


def _option(kind: Any, option: Any) -> Any:
    if isinstance(option, kind):
        return option
    if not isinstance(option, Mapping):
        return kind(option)
    known = [f.name for f in dataclasses.fields(kind)]
    if strange := sorted(set(option) - set(known)):
        raise ValueError(f"unknown field {strange[0]!r}; expected {', '.join(known)}")
    return kind(**option)


def unscalable(leaf: Any, name: str) -> str:
    """Why inputs of a leaf cannot be scaled by channel, in words, or ""."""
    if isinstance(leaf, Quantized) and leaf.hadamard is not None:
        return f"it is rotated, and inputs are scaled before that; put {name} before rotate"
    return ""


def smoothing_scale(
    largest_x: jax.Array, largest_w: jax.Array, alpha: float, axis: int
) -> jax.Array:
    """s of `smooth`, float32 > 0.

    Args:
        largest_x, largest_w: [*stack, 1 …, in, 1], max |x| and max |w| of each input channel.
        alpha: between 0 and 1.
        axis: of the channels.

    >>> x, w = jnp.array([4.0, 0.0, 1.0]), jnp.array([1.0, 1.0, 1.0])
    >>> smoothing_scale(x, w, 0.5, 0).round(4)
    Array([2.    , 1.4142, 1.    ], dtype=float32)
    """
    seen = (largest_x != 0) & (largest_w != 0)
    log = np.float32(alpha) * jnp.log(jnp.where(seen, largest_x, 1))
    log -= np.float32(1 - alpha) * jnp.log(jnp.where(seen, largest_w, 1))
    count = jnp.maximum(jnp.sum(seen, axis, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(seen, log, 0), axis, keepdims=True) / count
    return jnp.exp(jnp.where(seen, log, mean))


def as_prepared(leaf: Any) -> Quantized:
    """A leaf as an array whose values are floats: itself, if it was prepared."""
    if isinstance(leaf, Quantized):
        return leaf
    return Quantized(leaf, format=FLOAT, as_dtype=np.dtype(leaf.dtype))


def scaled(leaf: Any, s: jax.Array) -> Quantized:
    """A leaf with values, float32, times a part along the input axis, and inputs divided by it."""
    old = as_prepared(leaf)
    input_scale = 1 / s if old.input_scale is None else old.input_scale / s
    return dataclasses.replace(old, values=floats(leaf) * s, input_scale=input_scale)


def _dtype(leaf: Any) -> Any:
    return leaf.values.dtype if isinstance(leaf, Quantized) else leaf.dtype
