"""Two pictures become one, and how much of the first there is in it: mixup and cutmix.

Sources: Zhang et al. 2018 (arXiv:1710.09412); Yun et al. 2019 (arXiv:1905.04899).
"""

import numpy as np

TRIES = 20
"""Of a share that is drawn: at α = 1 one in a million needs more, and is none the worse."""


def blend(
    images: np.ndarray, others: np.ndarray, where: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Every pixel a mean: mixup, in place.

    Args:
        images, others: uint8 [B, H, W, C].
        where: [B] of bools, which ones.
        share: [B] of the first.

    Returns:
        The shares, float32, of those where `where`: in 256ths, so that bytes are mixed as integers.

    >>> images = np.full((1, 1, 1, 1), 200, np.uint8)
    >>> blend(images, images // 2, np.array([True]), np.array([0.25])), images.item()
    (array([0.25], dtype=float32), 125)
    """
    part = np.rint(256 * share[where]).astype(np.uint32)
    first = part[:, None, None, None]
    images[where] = (images[where] * first + others[where] * (256 - first) + 128) >> 8
    return (part / 256).astype(np.float32)


def paste(
    images: np.ndarray,
    others: np.ndarray,
    where: np.ndarray,
    share: np.ndarray,
    y: np.ndarray,
    x: np.ndarray,
) -> np.ndarray:
    """A rectangle of the other: cutmix, in place.

    Args:
        images, others, where, share: as for `blend`; the share of the area.
        y, x: [B] in [0, 1), the middle of the rectangle; what is outside the picture is cut off.

    Returns:
        The shares, float32, that are left where `where`.

    >>> images = np.zeros((1, 4, 4, 1), np.uint8)
    >>> middle = np.array([0.5])
    >>> paste(images, images + 1, np.array([True]), np.array([0.75]), middle, middle)
    array([0.75], dtype=float32)
    >>> int(images.sum())
    4
    """
    (high, wide), left_over = images.shape[1:3], []
    for i in np.flatnonzero(where):
        side = np.sqrt(1 - share[i])
        top, bottom = _within(y[i], side, high)
        left, right = _within(x[i], side, wide)
        images[i, top:bottom, left:right] = others[i, top:bottom, left:right]
        left_over.append(1 - (bottom - top) * (right - left) / (high * wide))
    return np.array(left_over, np.float32)


def beta(draws: np.ndarray, alpha: float) -> np.ndarray:
    """Shares of Beta(α, α), for α up to 1, by rejection (Jöhnk 1964).

    NumPy's own may change from one version to another.

    Args:
        draws: [B, 2 · `TRIES`] in [0, 1).
        alpha: α above 0.

    Returns:
        [B] float64.

    >>> shares = beta(np.random.default_rng(0).random((10**4, 40)), 0.5)
    >>> f"{shares.mean():.1f} {shares.var():.2f}"  # 1 / (4 (2 α + 1))
    '0.5 0.12'
    """
    u, v = draws.reshape(len(draws), 2, TRIES).transpose(1, 0, 2)
    # In logarithms, for a small α leaves nothing of most numbers.
    with np.errstate(divide="ignore"):
        u, v = np.log(u) / alpha, np.log(v) / alpha
    good = np.logaddexp(u, v) <= 0
    first = np.arange(len(u)), good.argmax(1)
    return 1 / (1 + np.exp(np.clip(v[first] - u[first], -500, 500)))


def _within(centre: float, share: float, size: int) -> tuple[int, int]:
    """Where a part of a line begins and ends, the centre anywhere: what is outside is cut off."""
    middle, half = int(centre * size), int(share * size) // 2
    return max(middle - half, 0), min(middle + half, size)
