"""Convolutions of 3x3 windows with 16 products where a window has 36: F(2x2, 3x3).

Squares of 4x4 places of x, and the kernel, are transformed by sums; the transforms multiply place
by place, which is 16 dots over channels; and sums make 2x2 places of the result. The kernel's
gradient goes the same way backwards. Rounding errors are two or three times those of the plain sum.
On CPUs it pays where an image is small and has many channels, and there `fw.convolve` calls it.

Source: Lavin & Gray 2015 (arXiv:1509.09308).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Matrix = Sequence[Sequence[float]]

X: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
"""Four places of x, in one direction, to their transform."""

KERNEL: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
"""Three of the kernel to theirs."""

Y: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))
"""Four products to two places of the result."""


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    padding: tuple[tuple[int, int], tuple[int, int]],
    precision: lax.Precision | None = None,
) -> jax.Array:
    """The convolution with stride 1.

    Args:
      x: [B, H, W, in], floating.
      kernel: [3, 3, in, out] of that dtype.
      padding: zeros before and after, down and across.
      precision: of products.

    Returns:
      [B, H', W', out], H' = H + padding - 2.

    >>> convolution(jnp.ones((1, 4, 5, 2)), jnp.ones((3, 3, 2, 1)), ((0, 0), (0, 0)))[0, :, :, 0]
    Array([[18., 18., 18.],
           [18., 18., 18.]], dtype=float32)
    """
    squares, (high, wide) = _squares(x, padding)
    u = _transformed(KERNEL, [list(row) for row in kernel])
    m = lax.dot_general(
        _stacked(squares), _stacked(u), (((2,), (1,)), ((0,), (0,))), precision=precision
    )
    m = m.reshape(4, 4, *squares[0][0].shape[:3], kernel.shape[3])
    y = _transformed(Y, [list(row) for row in m])
    y = jnp.stack([jnp.stack(row, 3) for row in y], 2)  # [B, H'/2, 2, W'/2, 2, out]
    return y.reshape(x.shape[0], 2 * y.shape[1], 2 * y.shape[3], -1)[:, :high, :wide]


def kernel_gradient(
    x: jax.Array,
    g: jax.Array,
    padding: tuple[tuple[int, int], tuple[int, int]],
    row_major: Callable[[jax.Array], jax.Array],
    precision: lax.Precision | None = None,
) -> jax.Array:
    """The gradient with respect to the kernel.

    Args:
      x, padding, precision: as for `convolution`.
      g: [B, H', W', out], the gradient with respect to its result.
      row_major: lays an array out as its axes say.

    Returns:
      [3, 3, in, out].
    """
    squares, _ = _squares(x, padding)
    more = [(0, n % 2, 0) for n in g.shape[1:3]]
    g = lax.pad(g, np.zeros((), g.dtype), [(0, 0, 0), *more, (0, 0, 0)])
    parts = [[g[:, i::2, j::2] for j in range(2)] for i in range(2)]
    left = row_major(jnp.swapaxes(_stacked(squares), 1, 2))  # dots are slow that sum first axes
    right = _stacked(_transformed(_turned(Y), parts))
    u = lax.dot_general(left, right, (((2,), (1,)), ((0,), (0,))), precision=precision)
    found = _transformed(_turned(KERNEL), [list(row) for row in u.reshape(4, 4, *u.shape[1:])])
    return jnp.stack([jnp.stack(row) for row in found])


def _squares(x: jax.Array, padding: Any) -> tuple[list[list[jax.Array]], tuple[int, int]]:
    """The transform of x, [4][4] of [B, H'/2, W'/2, in], and H' and W'."""
    sizes = [
        n + before + after - 2 for n, (before, after) in zip(x.shape[1:3], padding, strict=True)
    ]
    halves = [-(-n // 2) for n in sizes]
    more = [
        (before, 2 * half + 2 - n - before, 0)
        for n, half, (before, _) in zip(x.shape[1:3], halves, padding, strict=True)
    ]
    x = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *more, (0, 0, 0)])
    high, wide = (2 * half - 1 for half in halves)
    places = [[x[:, i : i + high : 2, j : j + wide : 2] for j in range(4)] for i in range(4)]
    return _transformed(X, places), (sizes[0], sizes[1])


def _transformed(matrix: Matrix, parts: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    """matrix · parts · matrixᵀ, of arrays."""
    down = zip(*(_times(matrix, column) for column in zip(*parts, strict=True)), strict=True)
    return [_times(matrix, row) for row in down]


def _times(matrix: Matrix, parts: Iterable[jax.Array]) -> list[jax.Array]:
    parts = list(parts)
    return [
        functools.reduce(jnp.add, [_scaled(p, c) for c, p in zip(row, parts, strict=True) if c])
        for row in matrix
    ]


def _scaled(x: jax.Array, by: float) -> jax.Array:
    return x if by == 1 else -x if by == -1 else x * np.asarray(by, x.dtype)


def _turned(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _stacked(parts: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """[16, places, channels]."""
    flat = [part for row in parts for part in row]
    return jnp.stack(flat).reshape(len(flat), -1, flat[0].shape[-1])
