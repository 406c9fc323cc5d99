"""Images of any size through a function of one size: tiles that overlap, joined without a seam.

A network of windows sees only so far. Within its reach of a cut, a tile's answer lacks what lies
beyond; so neighbouring tiles overlap, and each pixel is taken where it is far from the cuts: from
one tile (`"centre"`, which is exact as soon as half the overlap is as far as the network sees), or
from all that have it, with weights that sum to one (`"blend"`). `fw.metrics.segmentation` judges
the answer; `UNetConfig.reach` and `.multiple` say how far it sees, and where tiles may begin.
"""

import itertools
from collections.abc import Callable

import numpy as np

from fw.errors import FwError

JOINS = ("blend", "centre")


def tiled(
    fn: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    *,
    size: tuple[int, int],
    overlap: int,
    multiple: int = 1,
    join: str = "blend",
    batch_size: int = 4,
) -> np.ndarray:
    """fn of a whole image, computed tile by tile.

    An image that is smaller than a tile, or no multiple of `multiple`, is reflected at its lower
    and right edges and cut to its size afterwards.

    Args:
        fn: [B, h, w, C] → [B, h, w, K], always of `batch_size` tiles: logits or, to blend them,
            probabilities.
        image: [H, W, C].
        size: height and width of a tile.
        overlap: by how many pixels neighbouring tiles overlap, at least.
        multiple: tiles begin at multiples of this, where windows of windows fall as in the whole.
        join: one of `JOINS`.
        batch_size: tiles computed at once.

    Returns:
        [H, W, K] float32.

    Raises:
        FwError: an image of another rank or without a pixel; tiles that are no multiple of
            `multiple`, or that overlap too far to get on; an unknown join; an answer of fn of
            another size.

    >>> image = np.arange(35.0, dtype=np.float32).reshape(5, 7, 1)
    >>> found = tiled(lambda x: 2 * x, image, size=(4, 4), overlap=2)
    >>> found.shape, float(np.abs(found - 2 * image).max()) < 1e-5
    ((5, 7, 1), True)
    """
    if image.ndim != 3 or 0 in image.shape:
        raise FwError(f"image: expected [height, width, channels], got {image.shape}")
    if join not in JOINS:
        raise FwError(f"join {join!r} is unknown; choose one of {', '.join(JOINS)}")
    if batch_size < 1 or overlap < 0 or multiple < 1:
        raise FwError(
            f"batch_size {batch_size}, overlap {overlap}, multiple {multiple}: expected at least "
            "1, 0 and 1"
        )
    whole = [max(t, -(-n // multiple) * multiple) for n, t in zip(image.shape, size, strict=False)]
    grown = [(0, w - n) for n, w in zip(image.shape, whole, strict=False)]
    padded = np.pad(image, [*grown, (0, 0)], mode="reflect")
    rows, columns = (starts(n, t, overlap, multiple) for n, t in zip(whole, size, strict=True))
    down, across = (
        shares(at, t, join == "blend") for at, t in zip((rows, columns), size, strict=True)
    )
    places = list(itertools.product(range(len(rows)), range(len(columns))))
    total: np.ndarray | None = None
    for chunk in itertools.batched(places, batch_size):
        corners = [(rows[i], columns[j]) for i, j in chunk]
        tiles = [padded[top : top + size[0], left : left + size[1]] for top, left in corners]
        tiles += tiles[-1:] * (batch_size - len(tiles))
        answers = np.asarray(fn(np.stack(tiles)))
        if answers.ndim != 4 or answers.shape[:3] != (batch_size, *size):
            raise FwError(
                f"tiles of {size}: expected an answer [{batch_size}, {size[0]}, {size[1]}, ...], "
                f"got {answers.shape}"
            )
        if total is None:
            total = np.zeros((*whole, answers.shape[3]), np.float32)
        for (i, j), (top, left), answer in zip(chunk, corners, answers, strict=False):
            share = down[i][:, None, None] * across[j][:, None]
            total[top : top + size[0], left : left + size[1]] += share * answer
    assert total is not None
    return total[: image.shape[0], : image.shape[1]]


def starts(length: int, tile: int, overlap: int, multiple: int = 1) -> list[int]:
    """Where tiles begin so that they cover a length; the last one ends with it.

    Raises:
        FwError: tiles that are no multiple of `multiple`, or overlap by too much.

    >>> starts(20, 8, 2, 2), starts(8, 8, 2)
    ([0, 6, 12], [0])
    """
    if tile % multiple:
        raise FwError(f"tiles of {tile} pixels: expected a multiple of {multiple}")
    step = (tile - overlap) // multiple * multiple
    if step < 1 and length > tile:
        raise FwError(
            f"tiles of {tile} pixels that overlap by {overlap} do not get on in steps of "
            f"{multiple}; choose larger tiles or an overlap of at most {tile - multiple}"
        )
    return [*range(0, length - tile, step), length - tile] if length > tile else [0]


def shares(begins: list[int], tile: int, blend: bool) -> np.ndarray:
    """Each tile's share of the pixels that it covers; those of all tiles sum to one at each pixel.

    Args:
        begins: from `starts`.
        tile: pixels of a tile.
        blend: by the distance from a tile's edges; else all to one tile, split in the middle of
            what two share. The edges of the image are no edges.

    Returns:
        [tiles, tile] float32.

    >>> shares([0, 3], 4, True).tolist()
    [[1.0, 1.0, 1.0, 0.5], [0.5, 1.0, 1.0, 1.0]]
    >>> shares([0, 2], 4, False).tolist()
    [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
    """
    end, place = begins[-1] + tile, np.arange(tile)
    weights = np.zeros((len(begins), end))
    for i, start in enumerate(begins):
        before = place + 1 if start else np.full(tile, tile)
        after = tile - place if start + tile < end else np.full(tile, tile)
        weights[i, start : start + tile] = np.minimum(before, after)
    if not blend:
        weights = weights.argmax(0) == np.arange(len(begins))[:, None]
    weights = weights / weights.sum(0)
    return np.stack([w[s : s + tile] for w, s in zip(weights, begins, strict=True)]).astype("f4")
