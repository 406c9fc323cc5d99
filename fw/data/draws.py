"""Random numbers of a row: a function of the seed, its place in the stream, and what they are for.

They are NumPy's raw Philox bits, whose stream it keeps across versions (NEP 19); `batches` shuffles
with the same bits from another part of the counter. A generator for each row would take longer to
make than the row, so `uniform` computes the cipher for many rows at once.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": Philox4x64-10.
"""

import numpy as np

_MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64)
_WEYL = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], np.uint64)
_ROUNDS = 10
_HALF, _LOW = np.uint64(32), np.uint64(2**32 - 1)
_TOP = 3 << 62  # of the counter: `batches` begins at 0, `masking` at 2 << 62


def uniform(seed: int, places: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """A few numbers for each of many places.

    Args:
        seed: in 0 … 2⁶⁴ - 1.
        places: [R], 0 or more.
        count: how many for each.
        stream: numbers for other purposes have another one, in 0 … 2⁶⁴ - 1.

    Returns:
        [R, count] float64 in [0, 1); row by row what `noise` is.

    >>> numbers = uniform(7, np.array([3, 10**12]), 6, stream=1)
    >>> bool((numbers[1] == noise(7, 10**12, 6, stream=1)).all())
    True
    """
    blocks = -(-count // 4)
    shape = (len(places), blocks)
    first = np.broadcast_to(np.arange(1, blocks + 1, dtype=np.uint64), shape)  # as NumPy counts
    fixed = (np.full(shape, n, np.uint64) for n in (stream, 0, _TOP))
    a, b, c, d = first, *fixed
    k = np.full((len(places), 1), seed, np.uint64)
    m = places.astype(np.uint64)[:, None]
    for _ in range(_ROUNDS):
        (high_a, low_a), (high_c, low_c) = _product(a, 0), _product(c, 1)
        a, b, c, d = high_c ^ b ^ k, low_c, high_a ^ d ^ m, low_a
        k, m = k + _WEYL[0], m + _WEYL[1]
    raw = np.stack([a, b, c, d], -1).reshape(len(places), -1)[:, :count]
    return _unit(raw)


def noise(seed: int, place: int, count: int, stream: int = 0) -> np.ndarray:
    """Many numbers for one place: [count] float64 in [0, 1)."""
    key, counter = np.array([seed, place], np.uint64), np.array([0, stream, 0, _TOP], np.uint64)
    return _unit(np.random.Philox(key=key, counter=counter).random_raw(count))


def _unit(raw: np.ndarray) -> np.ndarray:
    return (raw >> np.uint64(11)) * 2.0**-53


def _product(x: np.ndarray, which: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower half of a product of 128 bits."""
    m = _MULTIPLIERS[which]
    xh, xl, mh, ml = x >> _HALF, x & _LOW, m >> _HALF, m & _LOW
    low = xl * ml
    one = xh * ml + (low >> _HALF)
    two = xl * mh + (one & _LOW)
    return xh * mh + (one >> _HALF) + (two >> _HALF), x * m
