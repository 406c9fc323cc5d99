"""Windows over images, [batch, height, width, channels]: the one place that computes them.

Convolutions, and the pooling that goes with them. `fw.models.vision` has the layers; where the mesh
cuts images by their height, `sharding.parallel.halo` brings each part the rows that it lacks.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import current, cutting
from sharding.parallel.halo import windowed

Padding = Sequence[tuple[int, int]]
"""Places before and after, down and across."""

NO_PADDING: Padding = ((0, 0), (0, 0))


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = NO_PADDING,
    groups: int = 1,
    axes: tuple[str | None, str | None] | None = None,
) -> jax.Array:
    """A two-dimensional convolution, as deep learning has it: the kernel is not turned round.

    Args:
      x: [B, H, W, in].
      kernel: [height, width, in / groups, out].
      strides: places from one window to the next, down and across.
      padding: zeros before and after, down and across.
      groups: channels are cut into so many groups, each of which sees itself alone.
      axes: the names of the kernel's channels, in and out, if it is a parameter: then its part of
        the communication is written out, as that of dense layers is.

    Returns:
      [B, H', W', out].

    Raises:
      ShardingError: a height or width that the mesh cuts into parts that do not fit.

    >>> conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), padding=[(1, 1), (1, 1)]).shape
    (1, 4, 4, 5)
    """
    return windowed(
        partial(_conv, strides=strides),
        x,
        kernel,
        window=kernel.shape[:2],
        strides=strides,
        padding=padding,
        channels=_channels(axes, groups),
        names=[(None, None, *(axes or (None, None)))],
    )


def _conv(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // kernel.shape[2],  # of a part of the channels, its groups
    )


def _channels(axes, groups) -> tuple[str | None, str | None] | None:
    """The names of channels in and out: those of groups are cut alike, between groups or not."""
    here = current()
    if here is None or axes is None or groups == 1:
        return axes
    ways = math.prod(here[0].shape[a] for a in cutting(axes[1])) if axes[1] else 1
    return (axes[1], axes[1]) if groups % ways == 0 else (None, None)


def max_pool(
    x: jax.Array,
    window: tuple[int, int],
    *,
    strides: tuple[int, int] | None = None,
    padding: Padding = NO_PADDING,
) -> jax.Array:
    """The largest number of every window of every channel; padding is less than any.

    Args:
      x: [B, H, W, C], floating.
      window: its height and width.
      strides: as in `conv`; None lays the windows side by side.
      padding: as in `conv`, of less than a window.

    Returns:
      [B, H', W', C].

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    return _pool(x, -np.inf, lax.max, window, strides, padding)


def avg_pool(
    x: jax.Array,
    window: tuple[int, int],
    *,
    strides: tuple[int, int] | None = None,
    padding: Padding = NO_PADDING,
) -> jax.Array:
    """The mean of every window of every channel; padding counts as zeros, as in torch.

    Args:
      x, window, strides, padding: as in `max_pool`.

    Returns:
      [B, H', W', C].

    >>> avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, :, :, 0]
    Array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    total = _pool(x, 0.0, lax.add, window, strides, padding)
    return total * np.asarray(1 / (window[0] * window[1]), x.dtype)


def _pool(x, start, combine, window, strides, padding):
    strides = window if strides is None else strides

    def pool(x, padding):
        around = [(0, 0), *padding, (0, 0)]
        first = np.asarray(start, x.dtype)
        return lax.reduce_window(x, first, combine, (1, *window, 1), (1, *strides, 1), around)

    return windowed(pool, x, window=window, strides=strides, padding=padding, fill=start)


def global_mean(x: jax.Array) -> jax.Array:
    """The mean of every channel over its whole image: [B, H, W, C] → [B, C].

    >>> global_mean(jnp.arange(4.0).reshape(1, 2, 2, 1))
    Array([[1.5]], dtype=float32)
    """
    return jnp.mean(x, (1, 2))
