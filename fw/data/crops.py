"""Batches of pictures cut, moved and turned: arrays [B, H, W, ...], and numbers that say how.

Pictures and maps of classes alike; `augment` draws the numbers.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from fw.data.pictures import THREADS, in_threads

TRIES = 10
"""Of a part that must fit into the picture."""


def each(work: Callable[[int], np.ndarray], out: np.ndarray) -> None:
    """Set each entry to what is made of its number, a few in every thread.

    >>> out = np.zeros(3)
    >>> each(lambda i: np.array(i * i), out)
    >>> out
    array([0., 1., 4.])
    """

    def some(numbers: np.ndarray) -> None:
        for i in numbers.tolist():
            out[i] = work(i)

    list(in_threads(some, np.array_split(np.arange(len(out)), THREADS)))


def boxes(numbers: np.ndarray, least: float, high: int, wide: int) -> np.ndarray:
    """Parts of a picture for `resized`, of any area and with sides 3/4 … 4/3.

    Args:
        numbers: [B, 4 · `TRIES`] in [0, 1).
        least: the smallest share of the area.
        high, wide: of the picture.

    Returns:
        [B, 4] left, top, right, bottom in pixels; the whole where no try fits.

    >>> boxes(np.full((1, 40), 0.5), 0.5, 8, 8)
    array([[1., 1., 8., 8.]])
    """
    area, form, x, y = numbers.reshape(len(numbers), 4, TRIES).transpose(1, 0, 2)
    area = high * wide * (least + (1 - least) * area)
    proportion = np.exp(np.log(4 / 3) * (2 * form - 1))
    w, h = np.rint(np.sqrt(area * proportion)), np.rint(np.sqrt(area / proportion))
    fits = (w >= 1) & (w <= wide) & (h >= 1) & (h <= high)
    left, top = np.floor(x * (wide - w + 1)), np.floor(y * (high - h + 1))
    found = np.stack([left, top, left + w, top + h], -1)
    chosen = found[np.arange(len(found)), fits.argmax(1)]
    chosen[~fits.any(1)] = (0, 0, wide, high)
    return chosen


def resized(arrays: np.ndarray, boxes: np.ndarray, how: Image.Resampling) -> np.ndarray:
    """A part of each, [B, 4], resized to the whole.

    >>> arrays = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    >>> resized(arrays, np.array([[0, 1, 1, 2]]), Image.Resampling.NEAREST).ravel().tolist()
    [2, 2, 2, 2]
    """
    out, (high, wide) = np.empty_like(arrays), arrays.shape[1:3]

    def resize(i: int) -> np.ndarray:
        pixels = arrays[i].squeeze(-1) if arrays.shape[3:] == (1,) else arrays[i]
        image = Image.fromarray(pixels).resize((wide, high), how, tuple(boxes[i]))
        return np.asarray(image).reshape(arrays.shape[1:])

    each(resize, out)
    return out


def shifted(arrays: np.ndarray, shifts: np.ndarray, empty: int) -> np.ndarray:
    """Each moved down and to the right, [B, 2], with a value where nothing comes in.

    >>> shifted(np.array([[[1, 2], [3, 4]]]), np.array([[1, 0]]), -1).tolist()
    [[[-1, -1], [1, 2]]]
    """
    out, (high, wide) = np.full_like(arrays, empty), arrays.shape[1:3]
    for i, (y, x) in enumerate(shifts.tolist()):
        there = slice(max(y, 0), high + min(y, 0)), slice(max(x, 0), wide + min(x, 0))
        here = slice(max(-y, 0), high - max(y, 0)), slice(max(-x, 0), wide - max(x, 0))
        out[i][there] = arrays[i][here]
    return out


def mirror(arrays: np.ndarray, which: np.ndarray) -> None:
    """Mirrors some, bool [B], in place: left becomes right.

    >>> arrays = np.array([[[1, 2]], [[3, 4]]])
    >>> mirror(arrays, np.array([False, True]))
    >>> arrays.tolist()
    [[[1, 2]], [[4, 3]]]
    """
    back = np.arange(arrays.shape[2])[::-1]
    for i in np.flatnonzero(which).tolist():  # a slice of step -1 copies pixel by pixel, slowly
        arrays[i] = arrays[i].take(back, axis=1)


def turn(arrays: np.ndarray, numbers: np.ndarray) -> None:
    """Puts each, in place, in one of the eight places of a square, by a number in 0 … 7.

    >>> arrays = np.array([[[1, 2], [3, 4]]])
    >>> turn(arrays, np.array([4]))  # transposed
    >>> arrays.tolist()
    [[[1, 3], [2, 4]]]
    """
    for bit, mirror in ((1, np.s_[:, ::-1]), (2, np.s_[:, :, ::-1])):
        chosen = (numbers & bit) > 0
        arrays[chosen] = arrays[chosen][mirror]
    chosen = (numbers & 4) > 0
    arrays[chosen] = arrays[chosen].swapaxes(1, 2)
