"""Elastic deformation: a picture and the map of its classes bent by the same smooth field.

Source: Simard et al. 2003, "Best practices for convolutional neural networks applied to visual
document analysis"; for segmentation Ronneberger et al. 2015 (arXiv:1505.04597).
"""

from functools import lru_cache

import numpy as np

REACH = 3.0
"""Standard deviations after which the bell of the smoothing is cut off."""


def smooth_field(numbers: np.ndarray, size: float, smoothness: float) -> np.ndarray:
    """How far each pixel goes: noise, smoothed by a Gaussian.

    Simard et al. multiply what is left by a number; here it is such that the root mean square
    displacement is `size` pixels, whatever the smoothness.

    Args:
        numbers: [2, H, W] in [0, 1).
        size: in pixels.
        smoothness: the Gaussian's standard deviation in pixels.

    Returns:
        [2, H, W] float32: down and to the right.

    >>> numbers = np.random.default_rng(0).random((2, 200, 200))
    >>> field = smooth_field(numbers, 3.0, 5.0)
    >>> f"{field.std():.1f} {np.abs(np.diff(field)).max() < 3}"
    '3.0 True'
    """
    height, width = numbers.shape[1:]
    down, across = _bell(height, smoothness), _bell(width, smoothness)
    field = down @ (numbers.astype(np.float32) - 0.5) @ across.T
    # The variance of uniform noise is 1/12; sums of squares are those of a row in the middle.
    spread = np.sqrt(np.square(down[height // 2]).sum() * np.square(across[width // 2]).sum() / 12)
    return field * np.float32(size / spread)


def warp(pixels: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A bent picture: each pixel is looked up where the field says, between pixels linearly.

    Args:
        pixels: uint8 [H, W, C].
        field: [2, H, W] pixels, down and to the right; beyond the edge stands the edge.

    Returns:
        uint8 [H, W, C].

    >>> warp(np.array([[[0], [100]]], np.uint8), np.full((2, 1, 2), 0.5))[..., 0]
    array([[ 50, 100]], dtype=uint8)
    """
    y, x = _places(field)
    top, left = np.floor(y).astype(np.intp), np.floor(x).astype(np.intp)
    bottom = np.minimum(top + 1, pixels.shape[0] - 1)
    right = np.minimum(left + 1, pixels.shape[1] - 1)
    y, x = (y - top)[..., None], (x - left)[..., None]
    floats = pixels.astype(np.float32)
    above = floats[top, left] * (1 - x) + floats[top, right] * x
    below = floats[bottom, left] * (1 - x) + floats[bottom, right] * x
    return np.rint(above * (1 - y) + below * y).astype(np.uint8)


def warp_labels(labels: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The map of a bent picture: [H, W], each pixel of the class of the nearest."""
    y, x = _places(field)
    return labels[np.rint(y).astype(np.intp), np.rint(x).astype(np.intp)]


def _places(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = field.shape[1:]
    y = np.clip(np.arange(height, dtype=np.float32)[:, None] + field[0], 0, height - 1)
    x = np.clip(np.arange(width, dtype=np.float32) + field[1], 0, width - 1)
    return y, x


@lru_cache(maxsize=8)
def _bell(size: int, smoothness: float) -> np.ndarray:
    """The matrix that smooths a line, at its ends with what is there: [size, size] float32."""
    apart = np.subtract.outer(np.arange(size), np.arange(size)) / smoothness
    bell = np.where(np.abs(apart) <= REACH, np.exp(-np.square(apart) / 2), 0)
    return (bell / bell.sum(1, keepdims=True)).astype(np.float32)
