"""GPTQ: each input's weights are rounded in turn, and those still to come make up for its error.

The error that counts is that of outputs over the calibration data,

    ‖X (W − W')‖² = tr((W − W')ᵀ H (W − W')),   H = Σ x xᵀ.

With H⁻¹ = Uᵀ U, U upper triangular, row k is rounded to q and the rows after it corrected:

    e = (w_k − q) / U_kk,   w_j ← w_j − U_kj · e   for j > k

Rows go in blocks, whose corrections reach the rows beyond as one product. U comes of one Cholesky
factor: H = R Rᵀ with R upper triangular, and U = R⁻¹.

Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.arrays import Quantized
from compress.calibrated import Calibrated, matrices, met, unfit_method, unweighed
from compress.nearest import ByScheme, finished
from compress.prepare import usual
from compress.scheme import (
    Grid,
    Scheme,
    assemble,
    coded,
    floats,
    grid,
    part_shape,
    snapped,
)
from compress.transform import Rules

BLOCK = 128
"""Rows whose corrections reach the rest at once."""

RAISES, RAISE = 5, 10
"""How often damping is multiplied, and by what, until the Hessian can be factored."""

ORDERS = ("activation", "given")

HIGHEST = lax.Precision.HIGHEST


@dataclass(frozen=True)
class Gptq(ByScheme, Calibrated):
    """See `gptq`, which makes it."""

    damping: float = 0.01
    order: str = "activation"
    name: ClassVar[str] = "gptq"
    second: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check it."""
        super().__post_init__()
        d = self.damping
        if isinstance(d, bool) or not isinstance(d, int | float) or not d > 0:
            raise ValueError(f"gptq: damping={d!r}: expected a number above 0")
        if self.order not in ORDERS:
            raise ValueError(f"gptq: order={self.order!r}: expected one of {', '.join(ORDERS)}")

    def unfit(self, leaf: Any, option: Scheme) -> str:
        """See `Leafwise.unfit`."""
        return unfit_method(leaf, option, option.role)

    def unmet(self, leaf: Any, option: Scheme, observed: Any) -> str:
        """See `Calibrated.unmet`."""
        assert option.role is not None
        return unweighed(leaf, option.role, observed) or super().unmet(leaf, option, observed)

    def leaf(self, leaf: Any, option: Scheme, observed: Any) -> Quantized:
        """See `Leafwise.leaf`."""
        role = option.role
        assert role is not None
        w, seen = floats(leaf), met(leaf, observed, role)
        stack = matrices(w, role)
        assert seen.hessian is not None
        hessians = seen.hessian.reshape(len(stack), *seen.hessian.shape[-2:])

        def one(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Grid]:
            w, h = pair
            return solve(w, h, option, damping=self.damping, order=self.order)

        # One after another: memory is that of one Hessian's factors.
        codes, at = lax.map(one, (stack, hessians))
        return finished(
            assemble(codes.reshape(w.shape), as_parts(at, w.shape, option), option, role, leaf),
            option,
            observed,
        )

    def describe(self, option: Scheme) -> str:
        """See `Leafwise.describe`."""
        return f"{option} by GPTQ"


def gptq(
    rules: Rules | Scheme | str = "int4", *, damping: float = 0.01, order: str = "activation"
) -> Gptq:
    """A transform that quantises as `quantize` does, with the least error of outputs it can find.

    It needs statistics with Hessians, of a leaf's own inputs, also where `smooth` or `rotate` came
    before. Inputs that calibration saw no activation of are rounded to nearest, and so is an array
    of a stack that met nothing, such as an expert that no token chose.

    Args:
        rules: as in `quantize`; kernels and convolutions, any format.
        damping: part of the mean of H's diagonal that is added to it; where H cannot be factored,
            ten times as much, up to five times over.
        order: "activation" begins with inputs of the largest H_kk, with scales of the array as it
            was; "given" keeps the order, and scales of groups are found when they are reached.

    Returns:
        The transform; its call raises as `Transform` says.

    Raises:
        ValueError: an option is none.

    Source: https://arxiv.org/abs/2210.17323; "activation" with such scales is the "static" order of
    llm-compressor.

    >>> from compress.observing import observe
    >>> params = {"kernel": jnp.array([[0.9, 0.1], [0.2, 1.0]])}
    >>> x = jnp.array([[1.0, 0.9], [0.8, 1.0], [1.0, 1.0]])
    >>> _, stats = observe(lambda p, x: x @ p["kernel"], hessians=["kernel"])(params, x)
    >>> small, report = gptq({"kernel": "int8"})(params, stats)
    >>> report[0].applied, small["kernel"].values.tolist()
    ('int8 by GPTQ', [[127, 13], [28, 127]])
    """
    return Gptq(*usual(rules), damping=damping, order=order)


def solve(
    w: jax.Array, hessian: jax.Array, scheme: Scheme, *, damping: float, order: str
) -> tuple[jax.Array, Grid]:
    """Codes and grid of one array.

    Args:
        w: float32 [K, out].
        hessian: float32 [K, K], Σ x xᵀ of what meets it, times anything.
        scheme: of which granularity counts as a kernel's.
        damping, order: of `gptq`.

    Returns:
        Codes [K, out], not packed, and their grid. Scales are NaN (or infinite, where they are
        exponents) if the Hessian could not be factored.

    >>> codes, at = solve(jnp.eye(2), jnp.eye(2), Scheme("int8"), damping=0.01, order="given")
    >>> codes.tolist()
    [[127, 0], [0, 127]]
    """
    K, g = len(w), scheme.per if isinstance(scheme.per, int) else len(w)
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    unseen = diagonal == 0
    # In units of its mean; what was not seen is bound to nothing, and so rounded to nearest.
    h = hessian / jnp.where(mean == 0, 1, mean) + jnp.diag(unseen.astype(jnp.float32))
    # nvfp4 has a scale of all scales, which is that of the array as it was.
    reached = order == "given" and g < K and scheme.row.scales != "e4m3"
    if order == "activation":
        first = jnp.argsort(-diagonal, stable=True)
        h, w_in_order = h[first][:, first], w[first]
    else:
        first, w_in_order = jnp.arange(K), w
    u, finite = factor(h, damping)
    if reached:
        codes, at = _blocks(w_in_order, u, scheme, g, _as_reached(scheme))
    else:
        at = grid(w, scheme, "kernel")
        codes, _ = _blocks(w_in_order, u, scheme, 1, _as_found(at, first // g))
    if order == "activation":
        codes = codes[jnp.argsort(first)]
    bad = np.uint8(255) if at.scale.dtype == jnp.uint8 else jnp.asarray(np.nan, at.scale.dtype)
    return codes, replace(at, scale=jnp.where(finite, at.scale, bad))


def factor(h: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """U upper triangular with (H + d·I)⁻¹ = Uᵀ U, and whether it is finite.

    Args:
        h: float32 [K, K], whose diagonal has a mean near 1.
        damping: d to begin with; multiplied until the Cholesky factor is finite.

    >>> u, finite = factor(jnp.array([[1.0, 1.0], [1.0, 1.0]]), 0.5)
    >>> (u.T @ u)[0].round(3), bool(finite)
    (Array([ 1.2, -0.8], dtype=float32), True)
    """
    eye = jnp.eye(len(h), dtype=h.dtype)
    flipped = h[::-1, ::-1]

    def again(state: Any) -> jax.Array:
        tries, _, low = state
        return (tries <= RAISES) & ~jnp.all(jnp.isfinite(low))

    def attempt(state: Any) -> Any:
        tries, d, _ = state
        return tries + 1, d * RAISE, jnp.linalg.cholesky(flipped + d * eye)

    start = (jnp.int32(0), jnp.float32(damping), jnp.full_like(h, np.nan))
    _, _, low = lax.while_loop(again, attempt, start)
    inverse = lax.linalg.triangular_solve(low, eye, left_side=True, lower=True)
    u = inverse[::-1, ::-1]
    return u, jnp.all(jnp.isfinite(u))


def _as_found(at: Grid, group: jax.Array) -> Callable:
    """The grid of row k: that of the group which it is in, in the array as it was."""
    whole = at.multiplier.shape[0] == 1

    def of_row(_: jax.Array, k: jax.Array) -> Grid:
        i = jnp.zeros_like(k) if whole else group[jnp.minimum(k, len(group) - 1)]
        zero = None if at.zero is None else lax.dynamic_slice_in_dim(at.zero, i, 1)
        scale = lax.dynamic_slice_in_dim(at.multiplier, i, 1)
        return Grid(scale, zero, None, scale)

    return of_row


def _as_reached(scheme: Scheme) -> Callable:
    """The grid of a group of rows as they are now."""
    return lambda rows, _: grid(rows, scheme, "kernel")


def _blocks(
    w: jax.Array, u: jax.Array, scheme: Scheme, g: int, grid_of: Callable
) -> tuple[jax.Array, Grid]:
    """Round all rows, in runs of g that share a grid.

    Args:
        w: [K, out], in the order of rounding.
        u: [K, K].
        scheme: of the codes.
        g: rows of a run, a divisor of K.
        grid_of: the grid of a run, from its rows as they are now and the number of the first.

    Returns:
        Codes [K, out], and the grids of all runs, their leading axes joined.
    """
    K, N = w.shape
    B = min(max(BLOCK // g, 1) * g, K)
    blocks = -(-K // B)
    # Rows of zeros, bound to nothing, fill the last block.
    more = blocks * B - K
    w = jnp.pad(w, ((0, more), (0, 0)))
    u = jnp.pad(u, ((0, more), (0, more))) + jnp.diag((jnp.arange(K + more) >= K).astype(u.dtype))

    def block(w: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Grid]]:
        start = b * B
        rows = lax.dynamic_slice_in_dim(w, start, B)
        strip = lax.dynamic_slice_in_dim(u, start, B)
        own = lax.dynamic_slice_in_dim(strip, start, B, axis=1)

        def run(carry: Any, r: jax.Array) -> tuple[Any, tuple[jax.Array, Grid]]:
            rows, errors = carry
            at = grid_of(lax.dynamic_slice_in_dim(rows, r * g, g), start + r * g)

            def row(i: jax.Array, carry: Any) -> Any:
                rows, errors, codes = carry
                j = r * g + i
                x = lax.dynamic_slice_in_dim(rows, j, 1)
                after = lax.dynamic_slice_in_dim(own, j, 1)[0]  # zeros before j
                error = (x - snapped(x, at, scheme)) / after[j]
                rows = rows - after[:, None] * error
                codes = lax.dynamic_update_slice_in_dim(codes, coded(x, at, scheme), i, 0)
                return rows, lax.dynamic_update_slice_in_dim(errors, error, j, 0), codes

            codes = jnp.zeros((g, N), scheme.row.storage)
            rows, errors, codes = lax.fori_loop(0, g, row, (rows, errors, codes))
            return (rows, errors), (codes, at)

        (_, errors), out = lax.scan(run, (rows, jnp.zeros_like(rows)), jnp.arange(B // g))
        # Rows of this block change too, but are not read again.
        return w - jnp.matmul(strip.T, errors, precision=HIGHEST), out

    _, (codes, at) = lax.scan(block, w, jnp.arange(blocks))
    codes = codes.reshape(blocks * B, N)[:K]
    return codes, jax.tree.map(lambda p: p.reshape(-1, p.shape[-1])[: K // g], at)


def as_parts(at: Grid, shape: tuple[int, ...], scheme: Scheme) -> Grid:
    """A grid of a stack of matrices as parts of an array."""
    assert scheme.role is not None
    parts = part_shape(shape, scheme.role, scheme.per or scheme.row.per)
    outer = None
    if at.outer is not None:
        outer = at.outer.reshape(part_shape(shape, scheme.role, "tensor"))
    zero = None if at.zero is None else at.zero.reshape(parts)
    return Grid(at.scale.reshape(parts), zero, outer, at.multiplier.reshape(parts))
