"""Convolutions of images, [batch, height, width, channels]: the one place that computes them."""

from collections.abc import Sequence

import jax
from jax import lax


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> jax.Array:
    """A two-dimensional convolution, as deep learning has it: the kernel is not turned round.

    Args:
      x: [B, H, W, in].
      kernel: [height, width, in / groups, out].
      strides: places from one window to the next, down and across.
      padding: zeros before and after, down and across.
      groups: channels are cut into so many groups, each of which sees itself alone.

    Returns:
      [B, H', W', out].

    >>> import jax.numpy as jnp
    >>> conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), padding=[(1, 1), (1, 1)]).shape
    (1, 4, 4, 5)
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
