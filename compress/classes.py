"""Numbers that stand for entries of axes, and which of them are one.

Every entry of an axis has a number. Entries that must stay or go together (what a kernel puts out
and what the next one takes in) have numbers of one class, and class `FIXED` is of those that stay.
"""

import numpy as np

FIXED = 0
"""The number, and the class, of entries that nothing can take away."""

Numbers = np.ndarray


class Classes:
    """Disjoint sets of numbers; a set's smallest number names it.

    >>> classes = Classes()
    >>> a, b = classes.new(3), classes.new(3)
    >>> classes.join(a[:2], b[:2])
    >>> classes.join(b[:1], np.array([FIXED]))
    >>> classes.of(a), classes.of(b)
    (array([0, 2, 3]), array([0, 2, 6]))
    """

    def __init__(self) -> None:
        self._above = np.zeros(1, np.int64)
        self.merged = 0
        """How often classes were made one: the same before and after, nothing was."""

    def __len__(self) -> int:
        """How many numbers there are."""
        return len(self._above)

    def new(self, count: int) -> Numbers:
        """Numbers that nothing has yet, int64 [count], each a class of its own."""
        first = len(self._above)
        numbers = np.arange(first, first + count)
        self._above = np.concatenate([self._above, numbers])
        return numbers

    def of(self, numbers: Numbers) -> Numbers:
        """The classes of some numbers, of the same shape."""
        found = self._above[numbers]
        while True:
            above = self._above[found]
            if np.array_equal(above, found):
                break
            found = above
        self._above[numbers] = found
        return found

    def join(self, a: Numbers, b: Numbers) -> None:
        """Make each pair of entries of two arrays, which broadcast, one class."""
        a, b = np.broadcast_arrays(a, b)
        while True:
            first, second = self.of(a), self.of(b)
            differ = first != second
            if not differ.any():
                return
            self.merged += 1
            low = np.minimum(first, second)[differ]
            high = np.maximum(first, second)[differ]
            # Of several pairs with one `high` the last is taken; the others come again.
            self._above[high] = low

    def fix(self, numbers: Numbers) -> None:
        """Say that they stay."""
        self.join(numbers, np.array(FIXED))
