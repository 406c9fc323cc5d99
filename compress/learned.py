"""Quantisation-aware training: weights learn to be rounded, and scales how far to step.

    ŵ = s · round(clip(w / s)),   s = exp(log_scale)

`qat` makes a `Learned` of each chosen leaf: the floats w, and a scale for each tensor, channel or
group of them. Under `compress.apply` a function sees ŵ, and `jax.grad` trains both: rounding counts
as the identity for w, and s has the gradient of LSQ. `harden` keeps the codes alone. A `Learned`
takes the primitives that a `Quantized` takes, by the same rules, so what trains also runs hardened.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.extend.core.primitives import sharding_constraint_p, stop_gradient_p
from jax.typing import ArrayLike

from compress.arrays import Compressed, Quantized, describe, is_compressed, place_part
from compress.blocks import spread
from compress.formats import FLOAT
from compress.nearest import USUAL, Quantize
from compress.products import rounded
from compress.scheme import TINY, Grid, Scheme, assemble, coded, grid
from compress.transform import Leafwise, Rules


class Learned(Compressed):
    """An array of floats that is seen rounded, with a scale that is learned.

    Both arrays are float32 and trainable. An optimiser may do what it will with the logarithm: the
    scale stays positive, and a step of Adam changes it by a part of itself, however small it is.
    Decay the weights, not the logarithms.

    Attributes:
        weight: w, of the array's shape.
        log_scale: log s, one entry for each part of the array that shares a scale.
        scheme: how it is rounded, with its role; without, once a function rearranged it.
        as_dtype: the floating dtype this array stands for.

    >>> w = Learned(jnp.full((1, 2), 0.6), jnp.zeros((1, 1)), Scheme("int8"))
    >>> w.dense()
    Array([[1., 1.]], dtype=float32)
    """

    weight: jax.Array
    log_scale: jax.Array
    scheme: Scheme = field(metadata={"static": True})
    as_dtype: np.dtype = field(default=np.dtype("float32"), metadata={"static": True})

    def aval(self) -> Any:
        """What JAX sees."""
        return jax.typeof(self.weight).update(dtype=self.as_dtype)

    def dense(self) -> jax.Array:
        """ŵ in the array's own dtype."""
        return fake_quantise(self.weight, self.log_scale, self.scheme.row.largest).astype(
            self.as_dtype
        )

    def grid(self) -> Grid:
        """Where its codes lie now."""
        scale = jnp.exp(self.log_scale)
        return Grid(scale, None, None, scale)

    def codes(self) -> Quantized:
        """The quantised array that it is now, not packed."""
        kind = FLOAT if self.scheme.activations == FLOAT else self.scheme.row.activations
        found = self.grid()
        return Quantized(
            coded(self.weight, found, self.scheme),
            found.scale,
            format=self.scheme.format,
            as_dtype=self.as_dtype,
            activations=kind,
        )

    def place(self, spec: Any) -> "Learned":
        """See `Compressed.place`."""
        return dataclasses.replace(
            self,
            weight=place_part(self.weight, self.weight.shape, spec, "values"),
            log_scale=place_part(self.log_scale, self.weight.shape, spec),
        )


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def fake_quantise(w: jax.Array, log_scale: jax.Array, largest: float) -> jax.Array:
    """Round floats to multiples of a scale, with gradients for both.

    ŵ = s · c(v),   c(v) = round(clip(v, −Q, Q)),   v = w / s,   s = exp(log_scale)

    ∂ŵ/∂w = 1 where |v| < Q, else 0;   ∂ŵ/∂s = c(v) − v where |v| < Q, else ±Q

    The gradient of log s is that of s times 1 / (s √(N Q)), N being the elements that share it. The
    root is LSQ's; 1 / s instead of the derivative s makes a small step of gradient descent on log s
    the same as LSQ's on s. It is no derivative of a loss, and forward mode has it, too. Nothing of
    the weights' size is kept for the backward pass.

    Args:
        w: float32.
        log_scale: float32, a part of w (see `compress.blocks`).
        largest: Q, the largest code.

    Returns:
        float32, of the shape of w.

    Source: Esser et al. 2020, https://arxiv.org/abs/1902.08153. Steps in the logarithm: Jain et al.
    2020, https://arxiv.org/abs/1903.08066.

    >>> slope = jax.grad(lambda *a: fake_quantise(*a, 7).sum(), (0, 1))
    >>> slope(jnp.array([0.25, 9.0]), jnp.zeros(1))  # (0 − 0.25 + 7) / √(2 · 7)
    (Array([1., 0.], dtype=float32), Array([1.8040134], dtype=float32))
    """
    scale = _step(log_scale, 1 / math.sqrt(w.size / log_scale.size * largest))
    v = w * spread(1 / scale, w.shape)  # as `coded`
    codes = _nearest(lax.clamp(jnp.float32(-largest), v, jnp.float32(largest)))
    return codes * spread(scale, w.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _step(log_scale: jax.Array, rate: float) -> jax.Array:
    return jnp.exp(log_scale)


@_step.defjvp
def _step_jvp(rate: float, primals: tuple, tangents: tuple) -> tuple:
    scale = jnp.exp(primals[0])
    return scale, tangents[0] * (rate / scale)


@jax.custom_jvp
def _nearest(x: jax.Array) -> jax.Array:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


_nearest.defjvp(lambda primals, tangents: (_nearest(*primals), *tangents))


# --- what primitives do ------------------------------------------------------------------------


def _product(primitive: Any, operands: tuple, axes: tuple[int, ...], params: Any) -> jax.Array:
    """A product or convolution of a learned array with x, whose scale would be shared over axes."""
    first = isinstance(operands[0], Learned)
    x, w = operands[::-1] if first else operands
    x = jnp.asarray(x)

    def run(x: Any, w: Any) -> jax.Array:
        return quax.quaxify(primitive.bind)(*((w, x) if first else (x, w)), **params)

    if w.scheme.activations == FLOAT:
        return run(x, w.dense())
    return _straight(run, axes, x, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight(run: Callable, axes: tuple[int, ...], x: jax.Array, w: Learned) -> jax.Array:
    """What the hardened array computes; its derivative is that of floats with the same values."""
    return run(x, w.codes())


@_straight.defjvp
def _straight_jvp(run: Callable, axes: Any, primals: tuple, tangents: tuple) -> tuple:
    x, w = primals
    q, scale = rounded(x.astype(jnp.float32), None, axes, w.scheme.row.activations)
    seen = (q.astype(jnp.float32) * scale).astype(x.dtype)
    _, moved = jax.jvp(lambda x, w: run(x, w.dense().astype(x.dtype)), (seen, w), tangents)
    y = _straight(run, axes, x, w)
    return y, moved.astype(y.dtype)


@quax.register(lax.dot_general_p)
def _dot(x: ArrayLike, w: Learned, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    params["dimension_numbers"] = dimension_numbers
    return _product(lax.dot_general_p, (x, w), tuple(dimension_numbers[0][0]), params)


@quax.register(lax.dot_general_p)
def _dot_swapped(w: Learned, x: ArrayLike, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    params["dimension_numbers"] = dimension_numbers
    return _product(lax.dot_general_p, (w, x), tuple(dimension_numbers[0][1]), params)


@quax.register(lax.conv_general_dilated_p)
def _conv(x: ArrayLike, w: Learned, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    params["dimension_numbers"] = dimension_numbers
    axes = tuple(dimension_numbers.lhs_spec[1:])
    return _product(lax.conv_general_dilated_p, (x, w), axes, params)


@quax.register(lax.gather_p)
def _gather(w: Learned, indices: ArrayLike, **params: Any) -> jax.Array:
    return lax.gather_p.bind(w.dense(), indices, **params)


@quax.register(stop_gradient_p)
def _stopped(w: Learned, **_: Any) -> Learned:
    return jax.tree.map(lax.stop_gradient, w)


def _rearrange(primitive: Any, *, keeps_role: bool = False) -> None:
    """A learned array is rearranged as the quantised one is: the weight as codes are."""

    @quax.register(primitive)
    def rule(w: Learned, *rest: ArrayLike | Learned, **params: Any) -> Any:
        def to(x: Any) -> Any:
            if not isinstance(x, Learned):
                return x
            return Quantized(x.weight, x.log_scale, format=x.scheme.format, as_dtype=x.as_dtype)

        def back(x: Quantized) -> Learned:
            role = w.scheme.role if keeps_role else None
            scheme = dataclasses.replace(w.scheme, role=role)
            return Learned(x.values, x.scale, scheme, x.as_dtype)  # type: ignore[arg-type] # as `to` made it

        moved = quax.quaxify(functools.partial(primitive.bind, **params))(to(w), *map(to, rest))
        return jax.tree.map(back, moved, is_leaf=is_compressed)


for _primitive in (lax.convert_element_type_p, lax.copy_p, sharding_constraint_p):
    _rearrange(_primitive, keeps_role=True)
for _primitive in (
    lax.transpose_p, lax.squeeze_p, lax.broadcast_in_dim_p, lax.reshape_p, lax.slice_p,
    lax.split_p, lax.dynamic_slice_p, lax.concatenate_p,
):  # fmt: skip
    _rearrange(_primitive)


# --- transforms --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Qat(Quantize):
    """See `qat`, which makes it."""

    name: ClassVar[str] = "qat"

    def parse(self, option: Any) -> Scheme:
        """See `Leafwise.parse`."""
        scheme = super().parse(option)
        if not (scheme.row.integer and scheme.symmetric and scheme.activations != "static"):
            raise ValueError(
                f"{scheme}: scales are learned of int8 and int4, symmetric, with activations "
                "'dynamic' or 'float'"
            )
        return scheme

    def unfit(self, leaf: Any, option: Scheme) -> str:
        """See `Leafwise.unfit`."""
        if is_compressed(leaf):
            return f"it is {describe(leaf)}; floats are trained, so qat comes first"
        return super().unfit(leaf, option)

    def leaf(self, leaf: Any, option: Scheme, observed: Any) -> Any:
        """See `Leafwise.leaf`."""
        assert option.role is not None
        w = leaf.astype(jnp.float32)
        scale = grid(w, option, option.role).multiplier
        # Channels of zeros must be able to leave them: they start with the largest scale.
        dead = scale < TINY
        scale = jnp.where(dead, jnp.where(jnp.all(dead), np.float32(1), jnp.max(scale)), scale)
        return Learned(w, jnp.log(scale), option, np.dtype(leaf.dtype))

    def describe(self, option: Scheme) -> str:
        """See `Leafwise.describe`."""
        return f"learned {option}"


def qat(rules: Rules | Scheme | str = "int8") -> Qat:
    """A transform that makes chosen leaves trainable as what `quantize` would make of them.

    Scales begin where `quantize` has them, so that training begins with what rounding to nearest
    gives. LSQ begins with 2 · mean |w| / √Q, which costs normal weights in int4 1.5 times the error
    of the maximum's and in int8 six times; `clip="mse"` has the least.

    Args:
        rules: as of `compress.quantize`: schemes of int8 or int4, symmetric, with activations
            "dynamic" or "float".

    Returns:
        The transform; its call raises as `Transform` says. Chosen leaves become `Learned`: float32
        pytrees, for any optimiser.

    Raises:
        ValueError: a rule's scheme is none that can be learned.

    Source: LSQ, https://arxiv.org/abs/1902.08153.

    >>> from compress import apply
    >>> params, _ = qat(Scheme("int4", per="channel"))({"kernel": jnp.eye(4)})
    >>> loss = apply(lambda params: (jnp.ones(4) @ params["kernel"]).sum())
    >>> slope = jax.grad(loss)(params)["kernel"]
    >>> slope.weight.shape, slope.log_scale.shape
    ((4, 4), (1, 4))
    >>> small, report = harden()(params)
    >>> type(small["kernel"]).__name__, report[0].applied
    ('Quantized', 'int4 per channel')
    """
    if isinstance(rules, str | Scheme):
        return Qat(((USUAL, rules),), strict=False)
    return Qat(rules)  # type: ignore[arg-type] # becomes pairs


HARDEN = "harden"
"""What a rule of `harden` says of leaves to harden."""


@dataclass(frozen=True)
class Harden(Leafwise):
    """See `harden`, which makes it."""

    name: ClassVar[str] = "harden"

    def parse(self, option: Any) -> Any:
        """See `Leafwise.parse`."""
        if option != HARDEN:
            raise ValueError(f"{option!r}: expected 'harden' or 'keep'")
        return option

    def resolve(self, path: str, leaf: Any, option: Any) -> Any:
        """See `Leafwise.resolve`."""
        return leaf.scheme if isinstance(leaf, Learned) else option

    def unfit(self, leaf: Any, option: Any) -> str:
        """See `Leafwise.unfit`."""
        if not isinstance(leaf, Learned):
            return "it is not Learned; qat makes such leaves"
        return "" if option.role else "it was transposed or cut; harden the tree that was trained"

    def leaf(self, leaf: Any, option: Any, observed: Any) -> Quantized:
        """See `Leafwise.leaf`."""
        found = leaf.grid()
        return assemble(coded(leaf.weight, found, option), found, option, option.role, leaf)


def harden(rules: Rules | None = None) -> Harden:
    """A transform that makes `Quantized` of `Learned`: codes and the learned scales, same function.

    Args:
        rules: glob pattern -> "harden" or "keep"; None for every `Learned`.

    >>> tree = {"kernel": jnp.eye(2), "bias": jnp.ones(2)}
    >>> small, _ = harden()(qat("int8")(tree)[0])
    >>> small["kernel"].values
    Array([[127,   0], [  0, 127]], dtype=int8)
    """
    if rules is None:
        return Harden((("**", HARDEN),), strict=False)
    return Harden(rules)  # type: ignore[arg-type] # becomes pairs
