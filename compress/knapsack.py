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

WIDTHS = (64, 4096, 262_144)
"""How many partial choices the sweeps keep, one after another."""

SLACK = 1e-9
"""Relative: bounds, which are rounded, rule nothing out that comes as close as this."""


def solve(
    value: np.ndarray, costs: np.ndarray, budgets: np.ndarray, tolerance: float = 0.0
) -> np.ndarray | None:
    """The best choice, or None if the budgets allow none.

    Args:
        value: float64 [lists, choices], infinite where a list has no such choice.
        costs: float64 [budgets, lists, choices], finite where there is a choice.
        budgets: float64 [budgets], two at most.
        tolerance: accept a value that is larger than the least one by this part of it.

    Returns:
        int [lists].

    Raises:
        ValueError: the best one found is not proven so close with as many partial choices as fit
            into memory, which takes hundreds of lists that hardly differ, and two tight budgets.

    >>> value, cost = np.array([[0.0, 5.0], [0.0, 1.0]]), np.array([[4.0, 1.0], [4.0, 1.0]])
    >>> solve(value, cost[None], np.array([5.0]))
    array([0, 1])
    """
    there = np.isfinite(value)
    costs = np.where(there, costs, 0.0)
    rows = [*np.eye(len(costs))]
    if len(costs) == 2:
        rows.append(_mixed(there, costs, budgets))
    checks = np.array(rows).reshape(len(rows), len(costs))
    cheapest = np.array([
        _after(np.where(there, np.tensordot(row, costs, 1), np.inf).min(1)) for row in checks
    ]).reshape(len(checks), len(value) + 1)  # fmt: skip
    limits = checks @ (budgets + SLACK * np.abs(costs).max((1, 2), initial=0.0))
    if (cheapest[:, 0] > limits).any():
        return None
    bound, prices = _dual(value, costs, budgets)
    best, upper = None, math.inf
    for width in WIDTHS:
        # If none is up to the aim, then upper ≤ (1 + tolerance) · least, least being positive.
        aim = upper / (1 + tolerance) if upper > 0 else upper + tolerance * upper
        found, total, complete = _sweep(
            value, costs, budgets, prices, (checks, cheapest, limits), aim, width
        )
        if total < upper:
            best, upper = found, total
        if complete:
            return best
    within = f"not proven optimal with {WIDTHS[-1]} partial choices kept"
    if best is None:
        raise ValueError(f"{within}, nor any found: loosen a budget a little")
    gap = (upper - bound) / (abs(upper) or 1.0)
    raise ValueError(f"{within}; the best found is {gap:.1e} off at most: accept it by tolerance")


def _sweep(
    value: np.ndarray,
    costs: np.ndarray,
    budgets: np.ndarray,
    prices: np.ndarray,
    checks: tuple[np.ndarray, np.ndarray, np.ndarray],
    aim: float,
    width: int,
) -> tuple[np.ndarray | None, float, bool]:
    """The best choice of those kept, its value, and whether nothing was left out.

    Args:
        checks: combinations of costs, the least that each comes to from every list on, and limits.
        aim: only values up to this are of interest.
        width: how many partial choices are kept.
    """
    there = np.isfinite(value)
    later = _after((value + np.tensordot(prices, costs, 1)).min(1))
    limit = aim + SLACK * np.abs(value[there]).max()
    rows, cheapest, limits = checks
    values, spent = np.zeros(1), np.zeros((len(costs), 1))
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    complete = True
    for i in range(len(value)):
        own = np.flatnonzero(there[i])
        values = (values[:, None] + value[i, own]).reshape(-1)
        spent = (spent[:, :, None] + costs[:, i][:, own][:, None]).reshape(len(costs), len(values))
        bound = values + prices @ spent + (later[i + 1] - prices @ budgets)
        fits = (rows @ spent + cheapest[:, i + 1, None] <= limits[:, None]).all(0)
        kept = np.flatnonzero(fits & (bound <= limit))
        kept = kept[_unbeaten(values[kept], spent[:, kept])]
        if len(kept) > width:
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


def _mixed(there: np.ndarray, costs: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Weights of two costs with which it is hardest to keep the budgets, together one."""
    unit = 1 / np.array([np.ptp(c[there]) or 1.0 for c in costs])

    def over(part: float) -> float:
        weights = unit * (1 - part, part)
        least = np.where(there, np.tensordot(weights, costs, 1), np.inf).min(1).sum()
        return float(least - weights @ budgets)

    low, high = 0.0, 1.0
    for _ in range(SECTIONS):  # concave
        left, right = _inside(low, high)
        low, high = (low, right) if over(left) > over(right) else (left, high)
    part = max((0.0, low, 1.0), key=over)
    return unit * (1 - part, part)


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
