"""A batch is a pure function of (seed, step).

Rows are shuffled anew every epoch by random numbers that are themselves a function, of seed and
epoch; step s takes the rows at places s·B … (s+1)·B of the endless stream of epochs. So resuming
costs nothing, no row is dropped, and neither a mesh nor a number of processes can change what is
read: whoever holds a part of the batch takes that part, see `feed`. Any arrays with a common
leading axis will do; `pack` makes those of text.

Grain's MapDataset offers the same random access, one element at a time in Python and with an
iterator's state to keep; the rows here are arrays already, and one fancy index takes them all.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count, islice

import numpy as np

from fw.errors import FwError


@dataclass(frozen=True, eq=False)
class Batches:
    """The endless stream of shuffled batches over rows in memory.

    Args:
        arrays: [R, ...] each.
        size: B, rows in a batch; more than R is allowed, the next epochs fill it.
        seed: of the order, in 0 … 2⁶⁴ - 1.
        change: makes of the rows of a batch, and their places in the stream, other arrays; each
            row's by itself and its place alone, so that parts can be made.

    Raises:
        FwError: no rows, unequal numbers of rows, or a size or seed out of range.

    >>> batches = Batches({"x": np.arange(5, dtype=np.int32)}, size=2, seed=0)
    >>> two_epochs = np.concatenate([batches(step)["x"] for step in range(5)])
    >>> batches.steps_per_epoch, np.bincount(two_epochs).tolist()
    (3, [2, 2, 2, 2, 2])
    """

    arrays: Mapping[str, np.ndarray]
    size: int
    seed: int = 0
    change: Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]] | None = None

    def __post_init__(self) -> None:
        """Refuse what no batch can be made of."""
        _count_rows(self.arrays)
        if self.size < 1:
            raise FwError(f"size: expected at least one row in a batch; got {self.size}")
        if not 0 <= self.seed < 2**64:
            raise FwError(f"seed: expected 0 … 2⁶⁴ - 1; got {self.seed}")

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return _count_rows(self.arrays)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been seen: ⌈R / B⌉."""
        return -(-self.rows // self.size)

    @cached_property
    def example(self) -> dict[str, np.ndarray]:
        """One row as batches have it: [1, ...] each, for names, shapes and dtypes."""
        return self.take(0, slice(1))

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step.

        Args:
            step: from 0.

        Returns:
            each array's [B, ...] for this step.

        Raises:
            FwError: a negative step.
        """
        return self.take(step, slice(None))

    def take(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        """Some rows of the batch of a step; no others are made.

        Args:
            step: from 0.
            rows: which of the batch's.

        Returns:
            what `self(step)[name][rows]` is, for each array.

        Raises:
            FwError: a negative step.
        """
        if step < 0:
            raise FwError(f"step: expected 0 or more; got {step}")
        places = step * self.size + np.arange(self.size)[rows]
        epoch, place = divmod(places, self.rows)
        chosen = np.empty_like(place)
        for e in np.unique(epoch):
            chosen[epoch == e] = _order(self.seed, int(e), self.rows)[place[epoch == e]]
        taken = {name: values[chosen] for name, values in self.arrays.items()}
        return taken if self.change is None else self.change(taken, places)


def eval_batches(
    arrays: Mapping[str, np.ndarray], size: int, *, empty: Mapping[str, float]
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order; the last batch is filled up with empty rows.

    Args:
        arrays: [R, ...] each.
        size: B, rows in a batch.
        empty: the value that fills an empty row of each array; see `Packed.empty`.

    Yields:
        ⌈R / B⌉ batches of each array's [B, ...].

    Raises:
        FwError: no rows, unequal numbers of rows, a size below 1, or an array without a filling.

    >>> rows = {"labels": np.array([4, 5, 6], np.int32)}
    >>> [batch["labels"].tolist() for batch in eval_batches(rows, 2, empty={"labels": -1})]
    [[4, 5], [6, -1]]
    """
    rows = _count_rows(arrays)
    if size < 1:
        raise FwError(f"size: expected at least one row in a batch; got {size}")
    if missing := set(arrays) - set(empty):
        raise FwError(f"empty: expected a value for {', '.join(sorted(missing))}; got none")
    for start in range(0, rows, size):
        batch = {name: values[start : start + size] for name, values in arrays.items()}
        short = start + size - rows
        if short > 0:
            batch = {
                name: np.pad(
                    values,
                    ((0, short), *[(0, 0)] * (values.ndim - 1)),
                    constant_values=empty[name],
                )
                for name, values in batch.items()
            }
        yield batch


def count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Tokens of texts in a batch, padding not counted.

    >>> count_tokens({"segment_ids": np.array([[1, 1, 2, 0]])})
    3
    """
    return int(np.count_nonzero(batch["segment_ids"]))


def prefetch[T](
    make: Callable[[int], T], start: int = 0, *, stop: int | None = None, depth: int = 2
) -> Generator[T]:
    """Make the items of the coming steps in a thread while this one is being used.

    What `make` raises is raised here, at the step it belongs to. Closing the iterator, or
    dropping it, cancels what has not begun and waits for what has.

    Args:
        make: the item of a step, say a `Batches`.
        start: first step.
        stop: step to end before; None for no end.
        depth: items made ahead, at most.

    Yields:
        make(start), make(start + 1), …

    Raises:
        FwError: a depth below 1.

    >>> list(prefetch(lambda step: step * step, 2, stop=5))
    [4, 9, 16]
    """
    if depth < 1:
        raise FwError(f"depth: expected at least 1; got {depth}")
    steps = iter(count(start) if stop is None else range(start, stop))
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(make, step) for step in islice(steps, depth))
        while ahead:
            item = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in islice(steps, 1))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The rows of an epoch, shuffled.

    From raw Philox bits, whose stream NumPy keeps across versions; Generator.permutation's it
    may change (NEP 19), and an old run could not be resumed.
    """
    key = np.array([seed, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(rows), kind="stable")
    order.flags.writeable = False
    return order


def _count_rows(arrays: Mapping[str, np.ndarray]) -> int:
    rows = {name: len(values) for name, values in arrays.items()}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        raise FwError(f"arrays: expected the same number of rows in each, at least one; got {rows}")
    return next(iter(rows.values()))
