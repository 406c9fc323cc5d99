"""Which rank each array gets: by the part of its energy that is to stay, or under one budget."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spectrum:
    """What is known of a stack of arrays before its rank is.

    Attributes:
        energy: σ², falling, of every array, float [L, min(in, out)].
        step: numbers that a rank takes, L · (in + out).
        whole: numbers of the arrays as they are, L · in · out.
    """

    energy: np.ndarray
    step: int
    whole: int

    @property
    def most(self) -> int:
        """The full rank."""
        return self.energy.shape[-1]

    def parts(self) -> np.ndarray:
        """What each direction carries of all that its array has, [L, min(in, out)]."""
        total = self.energy.sum(-1, keepdims=True)
        return self.energy / np.maximum(total, np.finfo(np.float64).tiny)


def by_energy(spectrum: Spectrum, part: float, multiple: int = 1) -> int | None:
    """The least rank that carries a part of every array's energy; None if the whole is smaller.

    >>> by_energy(Spectrum(np.array([[6.0, 3.0, 1.0]]), 13, 30), 0.9)
    2
    """
    carried = np.cumsum(spectrum.parts(), axis=-1)
    enough = carried >= part * carried[:, -1:] * (1 - min(1e-6, 1 - part))
    rank = int(np.max(np.argmax(enough, axis=-1))) + 1
    rank = min(-(-rank // multiple) * multiple, spectrum.most)
    return rank if rank * spectrum.step < spectrum.whole else None


def by_budget(
    spectra: Mapping[str, Spectrum], budget: float, multiple: int = 1
) -> dict[str, int | None]:
    """Ranks of the largest sum of parts that stay, None where the whole array is worth its numbers.

    One step after another, of the most gain for its numbers: what steps of one array gain falls, so
    that this is the best, up to the last step and those from factors to the whole.

    Args:
        spectra: by path.
        budget: part of all their numbers that may stay.
        multiple: of ranks.

    Raises:
        ValueError: one step for each is too much.

    >>> flat, steep = np.array([[1.0, 1.0]]), np.array([[9.0, 1.0]])
    >>> spectra = {"flat": Spectrum(flat, 20, 100), "steep": Spectrum(steep, 20, 100)}
    >>> by_budget(spectra, 0.3)
    {'flat': 2, 'steep': 1}
    """
    left = budget * sum(s.whole for s in spectra.values())
    parts = {path: s.parts().sum(0) for path, s in spectra.items()}

    def to(path: str, rank: int | None) -> int:
        return spectra[path].whole if rank is None else rank * spectra[path].step

    def step(path: str, rank: int) -> tuple[float, str, int | None, int]:
        after: int | None = min(rank + multiple, spectra[path].most)
        if to(path, after) >= spectra[path].whole or after == rank:
            after = None
        cost = max(to(path, after) - to(path, rank), 1)
        return -float(parts[path][rank:after].sum()) / cost, path, after, cost

    ranks: dict[str, int | None] = {}
    steps = [step(path, 0) for path in spectra]
    least = sum(cost for *_, cost in steps)
    if least > left:
        raise ValueError(
            f"a budget of {budget:g}: a rank of {multiple} for each takes "
            f"{budget * least / left:.3g} of their numbers; give more, or keep some"
        )
    left -= least
    for _, path, after, _ in steps:
        ranks[path] = after
    steps = [step(path, rank) for path, rank in ranks.items() if rank is not None]
    heapq.heapify(steps)
    while steps:
        _, path, after, cost = heapq.heappop(steps)
        if cost <= left:  # a cheaper step of another array may still fit
            left, ranks[path] = left - cost, after
            if after is not None:
                heapq.heappush(steps, step(path, after))
    return ranks
