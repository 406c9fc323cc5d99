"""How long products with compressed leaves take, on the device that is there.

Each product that a leaf takes part in (`compress.meetings`) is a program of its own, with the leaf
by each candidate and random activations, and is timed; equal programs are timed once. What
surrounds products, fuses with them or is shared between them is not seen: `compress.verify`
measures the whole function.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.candidates import (
    Candidates,
    Figures,
    Pairs,
    as_candidates,
    compressed,
    fields_of,
    fitting,
    matched,
    of_fields,
    table,
)
from compress.interpreter import apply
from compress.meetings import Meeting, meetings
from compress.scheme import role_of
from compress.transform import KEEP, named_leaves

TICK = 1e-9
"""Seconds: the least a product is said to take."""


@dataclass(frozen=True)
class Times:
    """Seconds that the products of each leaf take by each candidate; data.

    Attributes:
        paths: of the leaves.
        candidates: pairs (name, scheme or "keep").
        seconds: [leaf][candidate] in one call of the function; None where a candidate does not fit.
        keep: of each leaf as it is.
        whole: of the function with all leaves as they are.

    >>> t = Times(("w",), (("keep", "keep"),), ((0.1,),), (0.2,), 0.5)
    >>> Times.of_data(t.data()) == t
    True
    """

    paths: tuple[str, ...]
    candidates: Pairs
    seconds: Figures
    keep: tuple[float, ...]
    whole: float

    def data(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        return fields_of(self)

    @classmethod
    def of_data(cls, fields: Mapping[str, Any]) -> "Times":
        """The table of such fields; the reverse of `data`."""
        return of_fields(cls, fields)

    def __str__(self) -> str:
        """One line per leaf: milliseconds as it is, and by each candidate."""

        def cell(seconds: float | None) -> str:
            return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"

        rows = zip(self.paths, self.keep, self.seconds, strict=True)
        return table(
            ["leaf", "as it is", *(name for name, _ in self.candidates)],
            [[path, *map(cell, (keep, *seconds))] for path, keep, seconds in rows]
            + [["whole function", cell(self.whole), *("" for _ in self.candidates)]],
        )


def measure(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    candidates: Candidates,
    rules: str | Sequence[str] = ("**/kernel",),
    stats: Mapping[str, Any] | None = None,
    rounds: int = 20,
    progress: Callable[[int, int], Any] | None = None,
) -> Times:
    """Time the products of each leaf by each candidate, on the default device.

    A leaf's seconds are those of all its products in one call: a kernel in a scan over layers
    counts as often as there are layers. Each is the median of `rounds`, interleaved over candidates
    after one call to warm up, less what an empty program takes.

    Args:
        fn: `(params, *args) -> outputs`, pure; its arguments are pytrees of arrays.
        params: any pytree; leaves that `smooth` or `rotate` prepared may be among them.
        args: a batch, and what else `fn` takes; of its shapes are the products.
        candidates: name -> scheme, its format's name or "keep".
        rules: patterns of the leaves' paths.
        stats: of `compress.observe`, for candidates with static activations.
        rounds: how often each program is timed.
        progress: called as `progress(done, total)` after each of the distinct products.

    Raises:
        ValueError: as `compress.sensitivity`; or a leaf takes part in no product that is found.
        NotImplementedError: `fn` uses a leaf as no compressed array can be used.

    >>> params = {"kernel": jnp.ones((64, 64))}
    >>> t = measure(lambda p, x: x @ p["kernel"], params, jnp.ones((8, 64)), candidates=["int8"])
    >>> t.seconds[0][0] > 0 and t.whole > 0
    True
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected 1 or more")
    chosen = as_candidates(candidates)
    every, _ = named_leaves(params)
    leaves = [every[i] for i in matched(every, rules)]
    fits = fitting(leaves, chosen)
    where = {path: i for i, (path, _) in enumerate(leaves)}
    groups: dict[Any, list[Meeting]] = {}
    for meeting in meetings(fn, params, *args):
        if meeting.path in where:
            i = where[meeting.path]
            groups.setdefault(_key(meeting, leaves[i][1], fits[i]), []).append(meeting)
    met = {meeting.path for group in groups.values() for meeting in group}
    for path, _ in leaves:
        if path not in met:
            raise ValueError(
                f"{path}: takes part in no dot, convolution or look-up that can be timed; leave it "
                "out of the rules"
            )
    keep = [0.0] * len(leaves)
    seconds = [[0.0 if ok else None for ok in row] for row in fits]
    for done, group in enumerate(groups.values(), 1):
        first = where[group[0].path]
        own, others = _time(group[0], leaves[first], chosen, fits[first], stats, rounds)
        for meeting in group:
            i = where[meeting.path]
            keep[i] += own * meeting.times
            for c, took in enumerate(others):
                if took is not None:
                    seconds[i][c] = (seconds[i][c] or 0.0) + took * meeting.times
        if progress is not None:
            progress(done, len(groups))
    run = jax.jit(apply(fn))
    (whole,) = medians([lambda: run(params, *args)], rounds)
    paths = tuple(path for path, _ in leaves)
    return Times(paths, chosen, tuple(map(tuple, seconds)), tuple(keep), whole)


def _key(meeting: Meeting, leaf: Any, fits: Sequence[bool]) -> Any:
    """Meetings with the same one take the same time."""
    given = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in meeting.operands]
    parts, tree = jax.tree.flatten(leaf)
    shapes = tuple((x.shape, str(x.dtype)) for x in parts)
    program = jax.make_jaxpr(apply(meeting.program))(leaf, *given)
    below = tuple(o.below for o in meeting.operands)
    return str(program), tree, shapes, below, tuple(fits), role_of(meeting.path, leaf.shape)


def _time(
    meeting: Meeting,
    named: tuple[str, Any],
    candidates: Pairs,
    fits: Sequence[bool],
    stats: Mapping[str, Any] | None,
    rounds: int,
) -> tuple[float, list[float | None]]:
    """Seconds of one product with the leaf as it is, and by each candidate."""
    path, leaf = named
    rng = np.random.default_rng(0)
    operands = [operand.draw(rng) for operand in meeting.operands]
    run = jax.jit(apply(meeting.program))
    runs: list[Callable[[], Any]] = [jax.jit(lambda: jnp.zeros(())), lambda: run(leaf, *operands)]
    for (name, option), ok in zip(candidates, fits, strict=True):
        if ok and option != KEEP:
            new = compressed(path, leaf, option, stats)
            try:
                jax.block_until_ready(run(new, *operands))
            except NotImplementedError as error:
                raise NotImplementedError(f"{path}: as {name}: {error}") from None
            runs.append(lambda new=new: run(new, *operands))
    empty, own, *others = medians(runs, rounds)
    net, keep = iter([max(x - empty, TICK) for x in others]), max(own - empty, TICK)
    each: list[float | None] = []
    for (_, option), ok in zip(candidates, fits, strict=True):
        each.append(None if not ok else keep if option == KEEP else next(net))
    return keep, each


def medians(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds that each of several functions takes until its arrays are there, interleaved.

    >>> len(medians([lambda: jnp.ones(2), lambda: jnp.ones(3)], rounds=3))
    2
    """
    for run in runs:
        jax.block_until_ready(run())
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
