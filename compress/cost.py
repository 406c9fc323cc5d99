"""What a function costs, as a formula of how many units of each dimension stay.

Every array, and every product of a program, has axes whose sizes are sums of units that stay and
entries that nothing takes away; its cost is their product.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """The size of an axis: `rest` + Σ units · entries of each unit.

    Attributes:
        rest: entries that stay.
        units: pairs of a dimension's name and how many entries of this axis a unit of it has.
    """

    rest: float
    units: tuple[tuple[str, float], ...] = ()

    def size(self, left: Mapping[str, float]) -> float:
        """Its size where so many units of each dimension stay."""
        return self.rest + sum(left[name] * entries for name, entries in self.units)


@dataclass(frozen=True)
class Cost:
    """A sum of products of sizes.

    Attributes:
        terms: pairs of a factor and axes.

    >>> cost = Cost(((2.0, (Axis(3), Axis(0, (("mlp", 1.0),)))),))
    >>> cost({"mlp": 8}), cost({"mlp": 4})
    (48.0, 24.0)
    """

    terms: tuple[tuple[float, tuple[Axis, ...]], ...]

    def __call__(self, left: Mapping[str, float]) -> float:
        """The cost where so many units of each dimension stay (in each layer of a stack)."""
        return sum(
            factor * math.prod(axis.size(left) for axis in axes) for factor, axes in self.terms
        )
