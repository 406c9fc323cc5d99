"""Convolutions of images as each platform computes them fast, and their gradients.

`fw.precision` puts `convolve` where a function has a convolution, as it does with its own products
for dots. GPUs and TPUs get JAX's convolutions. So does, as a rule, the way forward on a CPU, which
XLA gives to YNNPACK; the way back is another matter:

- a kernel's gradient is, to XLA, a convolution whose window is a whole image and whose output is as
  wide as the kernel, where YNNPACK likes wide outputs. Here channels take the place of columns: for
  each column of the kernel, the gradient, transposed, is convolved with the strip of x under it,
  row by row. A few images at a time, which stay in the cache;
- an input's gradient under strides is, to XLA, a convolution of an image spread out by zeros. Here
  each phase of the stride is a convolution with its own part of the kernel;
- small images of many channels go by `fw.winograd`, both ways.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from fw import winograd

Pair = tuple[int, int]

CHUNK = 2**19
"""Bytes of the larger operand of a kernel's gradient that are worked on at a time."""

NARROW = 8
"""Results of fewer columns are computed otherwise: YNNPACK takes several columns at once."""

FEW = 4
"""Channels of an image, rather than of an activation."""

SHORT = 9
"""Places of a window of a grey image: too few for a dot."""

MANY = 64
"""Channels of which products, in and out, weigh more than copies of x."""


class How(NamedTuple):
    """What a convolution is besides its operands.

    Attributes:
      strides, padding, groups: as in `fw.models.convolution.conv`.
      dtype: what operands are rounded to; None leaves them.
      precision: of products, where operands keep their dtype.
    """

    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    groups: int = 1
    dtype: str | None = None
    precision: lax.Precision | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, how: How) -> jax.Array:
    """The convolution of `fw.models.convolution.conv`.

    Args:
      x: [B, H, W, in], floating.
      kernel: [height, width, in / groups, out].
      how: the rest.

    Returns:
      [B, H', W', out] in float32 at least.

    >>> convolve(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), How())[0, 0, 0]
    Array([18., 18., 18., 18., 18.], dtype=float32)
    """
    return _convolve_fwd(x, kernel, how)[0]


def _convolve_fwd(x, kernel, how):
    like = (jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype))
    x, kernel = (a if how.dtype is None else a.astype(how.dtype) for a in (x, kernel))
    return _by_platform(_forward, _plain)(x, kernel, how), (x, kernel, like)


def _convolve_bwd(how, saved, g):
    x, kernel, like = saved
    g = g if how.dtype is None else g.astype(how.dtype)
    dx = _by_platform(_input_gradient, _plain_input_gradient)(x, kernel, g, how)
    dk = _by_platform(_kernel_gradient, _plain_kernel_gradient)(x, kernel, g, how)
    return dx.astype(like[0].dtype), dk.astype(like[1].dtype)


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _by_platform(cpu: Callable, default: Callable) -> Callable:
    def chosen(*args: Any) -> jax.Array:
        *arrays, how = args
        # Products of two bfloat16 are exact in float32: the same numbers on a CPU.
        return lax.platform_dependent(
            *arrays, cpu=lambda *a: cpu(*map(_widened, a), how), default=lambda *a: default(*a, how)
        )

    return chosen


def _widened(x):
    return x.astype(_wide(x))


def _wide(x):
    return np.promote_types(x.dtype, np.float32)


# XLA's convolutions.


def _plain(x, kernel, how, **dilation):
    return lax.conv_general_dilated(
        x,
        kernel,
        how.strides,
        how.padding,
        **dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=how.groups,
        precision=how.precision,
        preferred_element_type=_wide(x),
    )


def _plain_input_gradient(x, kernel, g, how):
    h, w, size_in, _ = kernel.shape
    turned = kernel[::-1, ::-1].reshape(h, w, size_in, how.groups, -1)
    turned = jnp.swapaxes(turned, 2, 4).reshape(h, w, -1, x.shape[3])
    padding = []
    for size, out, window, stride, (before, _) in _sides(x, kernel, g, how):
        left = window - 1 - before
        padding.append((left, size + window - 1 - (out - 1) * stride - 1 - left))
    back = how._replace(strides=(1, 1), padding=tuple(padding))
    return _plain(g, turned, back, lhs_dilation=how.strides)


def _plain_kernel_gradient(x, kernel, g, how):
    return lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        _reached(x, kernel, g, how),
        rhs_dilation=how.strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),  # channels are its batch
        batch_group_count=how.groups,
        precision=how.precision,
        preferred_element_type=_wide(x),
    )


def _sides(x, kernel, g, how):
    """Down and across: the sizes of x, g and kernel, the stride, the padding."""
    sizes = (x.shape[1:3], g.shape[1:3], kernel.shape[:2])
    return zip(*sizes, how.strides, how.padding, strict=True)


def _reached(x, kernel, g, how):
    """The padding with which windows reach the last row and column; negative beyond them."""
    return [
        (before, (out - 1) * stride + window - size - before)
        for size, out, window, stride, (before, _) in _sides(x, kernel, g, how)
    ]


def _padded(x, padding):
    return lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *[(*p, 0) for p in padding], (0, 0, 0)])


# A CPU's.


def _forward(x, kernel, how):
    (rows, columns), padding = kernel.shape[:2], how.padding
    strided = how.strides != (1, 1)
    width = (x.shape[2] + sum(padding[1]) - columns) // how.strides[1] + 1
    if rows == columns == 1 and strided:
        seen = _padded(x, padding)[:, :: how.strides[0], :: how.strides[1]]
        y = _plain(seen, kernel, how._replace(strides=(1, 1), padding=((0, 0), (0, 0))))
    elif how.groups == 1 and kernel.shape[2] == 1 and rows * columns <= SHORT:
        y = _sum_of_products(x, kernel, how)
    elif how.groups > 1 or columns == 1 or width >= NARROW:
        y = _plain(x, kernel, how)
    elif strided:
        y = (_dot_of_windows if _has_many(kernel) else _plain)(x, kernel, how)
    elif _is_winograd(kernel, how, width):
        y = winograd.convolution(x, kernel, padding, how.precision)
    else:
        y = _rows_end_to_end(x, kernel, how, width)
    return y


def _rows_end_to_end(x, kernel, how, width):
    (rows, columns), x = kernel.shape[:2], _padded(x, how.padding)
    parts = []
    for j in range(columns):
        # The next row of the window is `width` places on.
        flat = x[:, :, j : j + width].reshape(x.shape[0], 1, -1, x.shape[3])
        step = kernel[:, j].reshape(1, rows, *kernel.shape[2:])
        alone = how._replace(padding=((0, 0), (0, 0)))
        parts.append(_plain(flat, step, alone, rhs_dilation=(1, width)))
    y = functools.reduce(jnp.add, parts)
    return y.reshape(x.shape[0], -1, width, kernel.shape[3])


def _has_many(kernel):
    return min(kernel.shape[2:]) >= MANY


def _is_winograd(kernel, how, width):
    alike = kernel.shape[:2] == (3, 3) and how.groups == 1 and how.strides == (1, 1)
    return alike and width < NARROW and _has_many(kernel)


def _windows(x, kernel, how):
    """Of every place in the kernel, down and across, what it meets: [B, H', W', in] each."""
    x, (down, across) = _padded(x, how.padding), how.strides
    rows, columns = kernel.shape[:2]
    high, wide = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    return [
        x[:, i : i + high : down, j : j + wide : across]
        for i in range(rows)
        for j in range(columns)
    ]


def _dot_of_windows(x, kernel, how):
    windows = jnp.concatenate(_windows(x, kernel, how), -1)
    return jnp.dot(windows, kernel.reshape(-1, kernel.shape[3]), precision=how.precision)


def _sum_of_products(x, kernel, how):
    """Of one channel, without a dot: XLA makes one loop of it."""
    parts = zip(_windows(x, kernel, how), kernel.reshape(-1, kernel.shape[3]), strict=True)
    return functools.reduce(jnp.add, [part * k for part, k in parts])


def _input_gradient(x, kernel, g, how):
    if how.groups > 1:
        return _plain_input_gradient(x, kernel, g, how)
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    # Of every phase of rows, and of columns: a part of the turned kernel, and a padding of g.
    down, across = (
        [_phase(phase, *side) for phase in range(side[3])] for side in _sides(x, kernel, g, how)
    )
    sizes = [-(-n // stride) for n, stride in zip(x.shape[1:3], how.strides, strict=True)]
    none = jnp.zeros_like(g, shape=(x.shape[0], *sizes, x.shape[3]))  # where no window reaches
    phases = []
    for i, above in down:
        strips = []
        for j, beside in across:
            part, back = turned[i, j], How(padding=(above, beside), precision=how.precision)
            strips.append(_forward(g, part, back) if part.size else none)
        phases.append(_interleaved(strips, 2))
    return _interleaved(phases, 1)[:, : x.shape[1], : x.shape[2]]


def _phase(phase, size, out, window, stride, padding):
    """Places phase, phase + stride … of x, as many in each phase."""
    first = (phase + padding[0]) % stride  # of those places of the kernel that g gets here by
    count = len(range(first, window, stride))
    left = count - 1 - (phase + padding[0] - first) // stride
    return slice((window - 1 - first) % stride, None, stride), (
        left,
        -(-size // stride) - out + count - 1 - left,
    )


def _interleaved(parts, axis):
    y = jnp.stack(parts, axis + 1)
    return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def _kernel_gradient(x, kernel, g, how):
    if how.groups > 1:
        return _plain_kernel_gradient(x, kernel, g, how)
    batch = x.shape[0]
    image = max(math.prod(a.shape[1:]) * a.dtype.itemsize for a in (x, g))
    # Image i goes to chunk i mod count, and a multiple of the devices to each: where the compiler
    # cuts the batch over them, no image travels.
    most = max(1, min(batch // jax.device_count(), batch * image // CHUNK))
    count = next(n for n in range(most, 0, -1) if batch % (n * jax.device_count()) == 0 or n == 1)
    parts = [a.reshape(batch // count, count, *a.shape[1:]) for a in (x, g)]

    def add(i, total):
        mine, its = (lax.dynamic_index_in_dim(part, i, 1, keepdims=False) for part in parts)
        return total + _chunk_gradient(mine, its, kernel, how)

    return lax.fori_loop(0, count, add, jnp.zeros_like(g, shape=kernel.shape))


def _chunk_gradient(x, g, kernel, how):
    rows, columns, size_in, size_out = kernel.shape
    batch, high, wide, _ = g.shape
    down, across = how.strides
    if _is_winograd(kernel, how, wide):
        return winograd.kernel_gradient(x, g, how.padding, _row_major, how.precision)
    x = _padded(x, _reached(x, kernel, g, how))
    if size_in <= FEW:  # the other way round: all windows of x, transposed, by g
        x = jnp.moveaxis(x, 3, 0)
        windows = [
            x[:, :, i : i + (high - 1) * down + 1 : down, j : j + (wide - 1) * across + 1 : across]
            for i in range(rows)
            for j in range(columns)
        ]
        windows = _row_major(jnp.stack(windows)).reshape(-1, batch * high * wide)
        return jnp.dot(windows, g.reshape(-1, size_out)).reshape(kernel.shape)
    turned = _row_major(jnp.transpose(g, (1, 3, 0, 2))).reshape(1, high, size_out, batch * wide)
    found = [[]] * rows
    for phase in range(min(down, rows)):
        more = len(range(phase, rows, down)) - 1  # places of the kernel in this phase, but one
        band = x[:, phase : phase + (high + more - 1) * down + 1 : down]
        strips = []
        for j in range(columns):
            strip = _row_major(
                jnp.swapaxes(band[:, :, j : j + (wide - 1) * across + 1 : across], 0, 1)
            )
            strip = strip.reshape(high + more, 1, batch * wide, size_in)
            moved = How(padding=((more, more), (0, 0)), precision=how.precision)
            strips.append(_plain(turned, strip, moved)[0, ::-1])  # [more + 1, out, in]
        found[phase::down] = list(jnp.transpose(jnp.stack(strips, 1), (0, 1, 3, 2)))
    return jnp.stack(found)


def _row_major(x):
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
