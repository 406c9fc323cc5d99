"""Mixed precision: one candidate for each leaf, of least damage, within a budget.

    minimise Σ damage[leaf, choice]   subject to   Σ bytes ≤ max_bytes,   Σ seconds ≤ max_seconds

The sum is a model: leaves that are compressed together could do more or less than alone, which
`compress.verify` measures. Within the model the choice is optimal (`compress.knapsack`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from compress.candidates import Figures, exactly, table
from compress.damage import Sensitivity
from compress.knapsack import solve
from compress.latency import Times
from compress.nearest import Quantize
from compress.transform import Report, Transform


@dataclass(frozen=True)
class Choice(Transform):
    """A candidate for each leaf, and what they come to; as a transform, it quantises by them.

    A recipe of it is that of its `transform`, which has the paths of leaves as rules.

    Attributes:
        transform: what it applies.
        chosen: pairs (path, candidate's name).
        bytes: of the whole tree after it.
        damage: the sum over leaves.
        seconds: of the whole function, if there were times.
    """

    transform: Quantize
    chosen: tuple[tuple[str, str], ...]
    bytes: int
    damage: float
    seconds: float | None = None

    name: ClassVar[str] = Quantize.name

    def __call__(self, params: Any, stats: Mapping[str, Any] | None = None) -> tuple[Any, Report]:
        """See `Transform`."""
        return self.transform(params, stats)

    def data(self) -> dict[str, Any]:
        """See `Transform.data`."""
        return self.transform.data()

    def __str__(self) -> str:
        """One line per leaf, and the sums."""
        seconds = "" if self.seconds is None else f", {_say(self.seconds, 'seconds')}"
        sums = f"{_say(self.bytes, 'bytes')}, {_say(self.damage, 'damage')}{seconds}"
        return table(["leaf", "choice"], self.chosen) + "\n" + sums


def search(
    sensitivities: Sensitivity,
    *,
    max_bytes: float | None = None,
    max_seconds: float | None = None,
    times: Times | None = None,
    max_damage: float | None = None,
    tolerance: float = 0.0,
) -> Choice:
    """Choose a candidate for each leaf: of least damage within budgets of size and time.

        bytes = rest + Σ bytes[leaf, choice]
        seconds = whole − Σ keep[leaf] + Σ seconds[leaf, choice]

    With `max_damage` alone, the smallest is chosen, or the fastest if there are `times`.

    Args:
        sensitivities: of `compress.sensitivity`.
        max_bytes: of the whole tree after compression, its other leaves included.
        max_seconds: of the whole function, as `times` predict it.
        times: of `compress.measure`, with the table's leaves and candidates.
        max_damage: Σ damage.
        tolerance: accept a sum that is larger than the least one by this part of it, for searches
            that are not done in reasonable time.

    Raises:
        ValueError: there is no budget, or no choice keeps it: the message has the least figures
            that there are; or times are missing, or of other leaves or candidates.

    Source: the additive model is that of Cai et al. 2020 (ZeroQ),
    https://arxiv.org/abs/2001.00281.

    >>> t = Sensitivity(
    ...     ("a", "b"), (("int8", "int8"), ("keep", "keep")),
    ...     ((16, 64), (16, 64)), ((0.1, 0.0), (0.3, 0.0)), (64, 64), 0,
    ... )
    >>> choice = search(t, max_bytes=80)
    >>> choice.chosen, choice.bytes, choice.damage
    ((('a', 'int8'), ('b', 'keep')), 80, 0.1)
    """
    t = sensitivities
    figures = {"damage": (_array(t.damage), 0.0), "bytes": (_array(t.sizes), float(t.rest))}
    if times is not None:
        figures["seconds"] = _seconds(t, times)
    limits = {"bytes": max_bytes, "seconds": max_seconds, "damage": max_damage}
    limits = {name: float(limit) for name, limit in limits.items() if limit is not None}
    if not limits:
        raise ValueError("no budget: give max_bytes, max_seconds or max_damage")
    if "seconds" in limits and times is None:
        raise ValueError("max_seconds needs times: those of compress.measure")
    aim = "damage"
    if list(limits) == ["damage"]:
        aim = "bytes" if times is None else "seconds"
    hard = {name: limit for name, limit in limits.items() if name != aim}
    best = _best(figures, aim, hard, tolerance)

    def over() -> bool:
        return best is None or (aim in limits and _total(figures[aim], best) > limits[aim])

    if tolerance and best is not None and over():  # the least may keep what this one does not
        best = _best(figures, aim, hard, 0.0)
    if best is None or over():
        raise ValueError(_infeasible(figures, limits, tolerance))
    rules = tuple(
        (exactly(path), t.candidates[c][1]) for path, c in zip(t.paths, best, strict=True)
    )
    return Choice(
        Quantize(rules),
        tuple((path, t.candidates[c][0]) for path, c in zip(t.paths, best, strict=True)),
        round(_total(figures["bytes"], best)),
        _total(figures["damage"], best),
        _total(figures["seconds"], best) if times is not None else None,
    )


Figure = tuple[np.ndarray, float]
"""[leaves, candidates], infinite where one does not fit, and what the rest has."""


def _array(rows: Figures) -> np.ndarray:
    return np.array([[math.inf if x is None else x for x in row] for row in rows], np.float64)


def _seconds(t: Sensitivity, times: Times) -> Figure:
    where = {path: i for i, path in enumerate(times.paths)}
    names = dict(times.candidates)
    for path in t.paths:
        if path not in where:
            raise ValueError(f"{path}: not in times; measure with the rules of the table")
    for name, option in t.candidates:
        if names.get(name) != option:
            raise ValueError(f"candidate {name!r}: not in times; measure with those of the table")
    rows, columns = (
        [where[path] for path in t.paths],
        [list(names).index(n) for n, _ in t.candidates],
    )
    seconds = _array(times.seconds)[np.ix_(rows, columns)]
    for path, row, other in zip(t.paths, seconds, _array(t.sizes), strict=True):
        if (np.isfinite(row) != np.isfinite(other)).any():
            raise ValueError(f"{path}: other candidates fit it in times; measure the same params")
    # Products alone may be slower than within the function: what is left of it is not negative.
    return seconds, max(times.whole - math.fsum(times.keep[i] for i in rows), 0.0)


def _best(
    figures: Mapping[str, Figure], aim: str, limits: Mapping[str, float], tolerance: float
) -> np.ndarray | None:
    value = figures[aim][0]
    costs = np.array([figures[name][0] for name in limits]).reshape(-1, *value.shape)
    budgets = np.array([limit - figures[name][1] for name, limit in limits.items()])
    return solve(value, costs, budgets, tolerance)


def _total(figure: Figure, choice: np.ndarray) -> float:
    array, rest = figure
    return float(np.cumsum([array[i, c] for i, c in enumerate(choice)])[-1] + rest)


def _infeasible(
    figures: Mapping[str, Figure], limits: Mapping[str, float], tolerance: float
) -> str:
    """The least that each budget could be: alone, or else with the others."""

    def least(name: str, others: Mapping[str, float], tolerance: float) -> float:
        best = _best(figures, name, others, tolerance)
        return math.inf if best is None else _total(figures[name], best)

    alone = {name: least(name, {}, 0.0) for name in limits}
    said = [
        f"max_{name}={limit:g} is not to be had: the least is {_say(alone[name], name)}"
        for name, limit in limits.items()
        if alone[name] > limit
    ]
    for name in limits if not said else ():
        others = {other: limit for other, limit in limits.items() if other != name}
        if math.isfinite(figure := least(name, others, tolerance)):
            given = " and ".join(f"max_{other}={limit:g}" for other, limit in others.items())
            near = f" (found to within {tolerance:g} of it)" if tolerance else ""
            said.append(f"with {given} the least is {_say(figure, name)}{near}")
    budgets = ", ".join(f"max_{name}={limit:g}" for name, limit in limits.items())
    return f"no choice keeps {budgets}: {'; '.join(said) or 'loosen two of them'}"


def _say(figure: float, name: str) -> str:
    if name == "damage":
        return f"damage {figure:.3g}"
    return f"{figure:,.0f} bytes" if name == "bytes" else f"{figure:.3g} seconds"
