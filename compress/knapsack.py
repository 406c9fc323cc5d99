"""One choice from each of several lists, of least total value, within budgets: solved exactly.

    minimise Σ value[i, choice_i]   subject to   Σ cost_k[i, choice_i] ≤ budget_k

The multiple-choice knapsack. Lists are taken one after another. Of the choices so far those are
kept that no other one beats in value and in every cost, and that could still become better than the
best whole choice known. What one could become is bounded from below by Lagrangian duality: with
prices λ ≥ 0 on the costs instead of budgets, every list has its own minimum. Sweeps that keep only
the most promising find good whole choices; the first that left nothing out proves the best optimal.

Source: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11.
"""

import bisect
import math

import numpy as np

WIDTHS = (64, 4096, 262_144, None)
"""How many partial choices the sweeps keep, one after another; the last one keeps all."""

SLACK = 1e-9
"""Relative: bounds, which are rounded, rule nothing out that comes as close as this."""


def solve(value: np.ndarray, costs: np.ndarray, budgets: np.ndarray) -> np.ndarray | None:
    """The best choice, or None if the budgets allow none.

    Args:
        value: float64 [lists, choices], infinite where a list has no such choice.
        costs: float64 [budgets, lists, choices], finite where there is a choice.
        budgets: float64 [budgets]; two at most are practical.

    Returns:
        int [lists].

    >>> value, cost = np.array([[0.0, 5.0], [0.0, 1.0]]), np.array([[4.0, 1.0], [4.0, 1.0]])
    >>> solve(value, cost[None], np.array([5.0]))
    array([0, 1])
    """
    there = np.isfinite(value)
    least = np.where(there, costs, np.inf).min(2).sum(1)
    if (least > budgets).any():
        return None
    costs = np.where(there, costs, 0.0)
    _, prices = _dual(value, costs, budgets)
    best, upper = None, math.inf
    for width in WIDTHS:
        found, total, complete = _sweep(value, costs, budgets, prices, upper, width)
        if total < upper:
            best, upper = found, total
        if complete:
            break
    return best


def _sweep(
    value: np.ndarray,
    costs: np.ndarray,
    budgets: np.ndarray,
    prices: np.ndarray,
    upper: float,
    width: int | None,
) -> tuple[np.ndarray | None, float, bool]:
    """The best choice of those kept, its value, and whether nothing was left out.

    Args:
        upper: a value that is known to be reached.
        width: how many partial choices are kept.
    """
    there = np.isfinite(value)
    later = _after((value + np.tensordot(prices, costs, 1)).min(1))
    cheapest = np.array([_after(np.where(there, c, np.inf).min(1)) for c in costs])
    limit = upper + SLACK * np.abs(value[there]).max()
    limits = budgets + SLACK * np.abs(costs).max((1, 2), initial=0.0)
    values, spent = np.zeros(1), np.zeros((len(costs), 1))
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    complete = True
    for i in range(len(value)):
        own = np.flatnonzero(there[i])
        values = (values[:, None] + value[i, own]).reshape(-1)
        spent = (spent[:, :, None] + costs[:, i][:, own][:, None]).reshape(len(costs), -1)
        bound = values + prices @ spent + (later[i + 1] - prices @ budgets)
        fits = (spent + cheapest[:, i + 1, None] <= limits[:, None]).all(0)
        kept = np.flatnonzero(fits & (bound <= limit))
        kept = kept[_unbeaten(values[kept], spent[:, kept])]
        if width is not None and len(kept) > width:
            kept, complete = kept[np.argsort(bound[kept], kind="stable")[:width]], False
        values, spent = values[kept], spent[:, kept]
        trail.append((kept // len(own), own[kept % len(own)]))
    ends = np.flatnonzero((spent <= budgets[:, None]).all(0))
    if not len(ends):
        return None, math.inf, complete
    at = ends[np.argmin(values[ends])]
    total, choice = float(values[at]), []
    for parent, taken in reversed(trail):
        choice.append(taken[at])
        at = parent[at]
    return np.array(choice[::-1]), total, complete


def _after(x: np.ndarray) -> np.ndarray:
    """Σ of x[i:], for each i and for none left."""
    return np.append(np.cumsum(x[::-1])[::-1], 0.0)


def _unbeaten(values: np.ndarray, spent: np.ndarray) -> np.ndarray:
    """Indices of those that no other one equals or beats in value and all costs."""
    order = np.lexsort((values, *spent[::-1])) if len(spent) else np.argsort(values, kind="stable")
    v = values[order]
    if len(spent) <= 1:
        if not len(spent):
            return order[:1]
        before = np.append(np.inf, np.minimum.accumulate(v)[:-1])
        return order[v < before]
    if len(spent) > 2:
        return order
    # In order of the first cost: of those before, only the least value for each second cost counts.
    kept, seconds, least = [], [], []
    for j, c, x in zip(order.tolist(), spent[1, order].tolist(), v.tolist(), strict=True):
        at = bisect.bisect_right(seconds, c)
        if at and least[at - 1] <= x:
            continue
        end = at
        while end < len(seconds) and least[end] >= x:
            end += 1
        if at and seconds[at - 1] == c:
            at -= 1
        seconds[at:end], least[at:end] = [c], [x]
        kept.append(j)
    return np.array(kept, int)


def _dual(value: np.ndarray, costs: np.ndarray, budgets: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest lower bound that prices give, and the prices; any ≥ 0 would do.

    It is concave in them: each is found by golden section, with the best of those before it.
    """
    if not len(costs):
        return float(value.min(1).sum()), np.zeros(0)

    def at(price: float) -> tuple[float, np.ndarray]:
        bound, others = _dual(value + price * costs[-1], costs[:-1], budgets[:-1])
        return bound - price * budgets[-1], np.append(others, price)

    there = np.isfinite(value)
    unit = np.ptp(value[there]) / (np.ptp(costs[-1][there]) or 1.0)
    low, high = -DECADES, DECADES
    left, right = (at(unit * 10.0**e) for e in _inside(low, high))
    best = max(at(0.0), left, right, key=_first)
    for _ in range(SECTIONS):
        if left[0] > right[0]:  # equal ones are on the flat side, where prices are next to nothing
            high, right = _inside(low, high)[1], left
            left = at(unit * 10.0 ** _inside(low, high)[0])
        else:
            low, left = _inside(low, high)[0], right
            right = at(unit * 10.0 ** _inside(low, high)[1])
        best = max(best, left, right, key=_first)
    return best


DECADES, SECTIONS = 8.0, 44
"""Prices searched around the ratio of the ranges, and how often: to nine digits."""


def _inside(low: float, high: float) -> tuple[float, float]:
    step = (high - low) * (math.sqrt(5) - 1) / 2
    return high - step, low + step


def _first(found: tuple[float, np.ndarray]) -> float:
    return found[0]
