"""Rows: what a data set is once it is numbers, whatever it was made of.

Texts become `Packed` rows, which hold more; images, rows of tables and pairs of users and items
become these. `Batches`, `eval_batches` and `fw.evaluate` take either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class AnyRows(Protocol):
    """`Rows`, or `fw.data.Packed`."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """[R, ...] each."""
        ...

    @property
    def empty(self) -> Mapping[str, float]:
        """What fills an empty row."""
        ...

    @property
    def rows(self) -> int:
        """How many there are."""
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """Arrays with a common leading axis, an example an entry.

    Attributes:
        arrays: [R, ...] each; anything with `shape`, `dtype` and an index of integers will do, so
            that images can be decoded as they are asked for.
        empty: what fills an array of an empty row, which no metric counts.
        catalogue: what every row is to be ranked among; None for most tasks.

    >>> Rows({"labels": np.array([1, 0], np.int32)}, {"labels": -1}).rows
    2
    """

    arrays: Mapping[str, np.ndarray]
    empty: Mapping[str, float]
    catalogue: "Rows | None" = None

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.arrays.values())))
