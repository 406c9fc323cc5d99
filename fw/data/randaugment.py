"""RandAugment and changes of colour: what Pillow does to one picture, given the random numbers.

What comes in from outside the picture is black.

Source: Cubuk et al. 2019 (arXiv:1909.13719), with the fourteen operations and, of 31 steps, the
magnitudes that are usual; colours as in Krizhevsky et al. 2012 and later practice.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

STEPS = 30
"""The largest magnitude."""


def _enhance(kind: Callable) -> Callable:
    return lambda image, share, sign: kind(image).enhance(1 + sign * 0.9 * share)


def _affine(*matrix: Callable[[float, Image.Image], float]) -> Callable:
    def change(image: Image.Image, share: float, sign: int) -> Image.Image:
        data = tuple(entry(sign * share, image) for entry in matrix)
        return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)

    return change


def _same(x: float, image: Image.Image) -> float:
    return 1.0


def _none(x: float, image: Image.Image) -> float:
    return 0.0


# Each takes a picture, the magnitude as a share of the largest, and a sign.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, share, sign: image,
    "shear x": _affine(_same, lambda x, _: 0.3 * x, _none, _none, _same, _none),
    "shear y": _affine(_same, _none, _none, lambda x, _: 0.3 * x, _same, _none),
    "translate x": _affine(
        _same, _none, lambda x, image: 150 / 331 * x * image.width, _none, _same, _none
    ),
    "translate y": _affine(
        _same, _none, _none, _none, _same, lambda x, image: 150 / 331 * x * image.height
    ),
    "rotate": lambda image, share, sign: image.rotate(30 * share * sign, Image.Resampling.BILINEAR),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, share, sign: ImageOps.posterize(image, 8 - round(4 * share)),
    "solarize": lambda image, share, sign: ImageOps.solarize(image, round(255 * (1 - share))),
    "autocontrast": lambda image, share, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, share, sign: ImageOps.equalize(image),
}


def randaugment(
    image: Image.Image, magnitude: int, numbers: Sequence[float] | np.ndarray
) -> Image.Image:
    """Do a few of `OPERATIONS`, any of them, one after the other.

    Args:
        image: "L" or "RGB".
        magnitude: of each, in 0 … `STEPS`.
        numbers: two for each operation, in [0, 1): which, and its sign.

    Returns:
        A picture of the same size and mode.

    >>> image = Image.new("L", (4, 4), 100)
    >>> np.asarray(randaugment(image, 30, [6 / 14, 0.0])).max()  # brightness, nearly all taken
    np.uint8(10)
    """
    every = list(OPERATIONS.values())
    for which, sign in zip(numbers[::2], numbers[1::2], strict=True):
        image = every[int(which * len(every))](image, magnitude / STEPS, 1 if sign >= 0.5 else -1)
    return image


def recolour(
    image: Image.Image, ranges: Sequence[float], numbers: Sequence[float] | np.ndarray
) -> Image.Image:
    """Change brightness, contrast, saturation and hue.

    Args:
        image: "L" or "RGB"; grey has no saturation and no hue.
        ranges: how far each may go: a factor in 1 ± range for the first three; the hue turns by at
            most that share of the circle.
        numbers: one for each, in [0, 1).

    >>> np.asarray(recolour(Image.new("L", (1, 1), 100), (0.5, 0, 0, 0), (0.0, 0, 0, 0)))
    array([[50]], dtype=uint8)
    """
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, reach, number in zip(kinds, ranges[:3], numbers[:3], strict=True):
        if reach and (image.mode == "RGB" or kind is not ImageEnhance.Color):
            image = kind(image).enhance(1 + reach * (2 * number - 1))
    if ranges[3] and image.mode == "RGB":
        hue, saturation, value = image.convert("HSV").split()
        turn = round(256 * ranges[3] * (2 * numbers[3] - 1))
        hue = hue.point([(level + turn) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image
