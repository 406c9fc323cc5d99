"""Which leaves bear being compressed: the damage that each does to a function's outputs, alone.

One leaf at a time is compressed by one candidate, the function is run on a batch, and its outputs
are compared with those of the untouched parameters. `compress.search` chooses by the table.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from compress.arrays import Quantized, is_compressed
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
from compress.transform import KEEP, named_leaves, size


@dataclass(frozen=True)
class Sensitivity:
    """What each candidate costs and does, leaf by leaf; data.

    Attributes:
        paths: of the leaves.
        candidates: pairs (name, scheme or "keep").
        sizes: [leaf][candidate], bytes; None where a candidate does not fit.
        damage: [leaf][candidate].
        before: bytes of each leaf as it is.
        rest: bytes of all leaves of the tree that are not in the table.

    >>> t = Sensitivity(("w",), (("keep", "keep"),), ((16,),), ((0.0,),), (16,), 8)
    >>> t.bytes, Sensitivity.of_data(t.data()) == t
    (24, True)
    """

    paths: tuple[str, ...]
    candidates: Pairs
    sizes: Figures
    damage: Figures
    before: tuple[int, ...]
    rest: int

    @property
    def bytes(self) -> int:
        """Of the whole tree as it is, the leaves outside of the table included."""
        return sum(self.before) + self.rest

    def data(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        return fields_of(self)

    @classmethod
    def of_data(cls, fields: Mapping[str, Any]) -> "Sensitivity":
        """The table of such fields; the reverse of `data`."""
        return of_fields(cls, fields)

    def __str__(self) -> str:
        """One line per leaf: bytes and damage of each candidate."""

        def cell(size: float | None, damage: float | None) -> str:
            return "-" if size is None or damage is None else f"{size:,} B {damage:.1e}"

        return table(
            ["leaf", *(name for name, _ in self.candidates)],
            [
                [path, *map(cell, sizes, damage)]
                for path, sizes, damage in zip(self.paths, self.sizes, self.damage, strict=True)
            ],
        )


def sensitivity(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    candidates: Candidates,
    rules: str | Sequence[str] = ("**/kernel",),
    metric: Callable[[Any, Any], Any] | None = None,
    stats: Mapping[str, Any] | None = None,
    exact: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> Sensitivity:
    """Measure what compressing each leaf alone does to the outputs of a function.

        damage = mean over outputs of  Σ (y − y')² / Σ y²

    The function is compiled once: a leaf is replaced by the floats that its compressed form stands
    for, so the rounding of activations, where a candidate has it, is not in the figure. `exact`
    runs the compressed leaf itself, under `compress.apply`, for one compilation per leaf and
    candidate. A stack of layers in one leaf is one leaf.

    Args:
        fn: `(params, *args) -> outputs`, pure; its arguments are pytrees of arrays.
        params: any pytree; leaves that `smooth` or `rotate` prepared may be among them.
        args: a batch, and what else `fn` takes.
        candidates: name -> scheme, its format's name or "keep".
        rules: patterns of the leaves' paths.
        metric: `(outputs of params, outputs) -> damage`, a number; that of the first outputs given
            twice is subtracted, so it may be a loss that looks at the second alone.
        stats: of `compress.observe`, for candidates with static activations.
        exact: whether compressed leaves are run themselves.
        progress: called as `progress(done, total)` after each of the evaluations.

    Raises:
        ValueError: there are no candidates, or one fits no leaf; a rule matches nothing; a leaf has
            no candidate that fits; outputs or a damage are not finite.
        NotImplementedError: with `exact`, `fn` uses a leaf as no compressed array can be used.

    Source: the figure is that of Dong et al. 2019 (HAWQ), https://arxiv.org/abs/1905.03696,
    measured instead of derived from curvature.

    >>> params = {"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.array([[1.0, 0.3], [0, 1]])}}
    >>> model = lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"]
    >>> t = sensitivity(model, params, jnp.ones((1, 2)), candidates=["int8", "keep"])
    >>> [d[0] > 1e-7 for d in t.damage]
    [False, True]
    """
    chosen = as_candidates(candidates)
    leaves, treedef = named_leaves(params)
    places = matched(leaves, rules)
    fits = fitting([leaves[i] for i in places], chosen)
    run = jax.jit(apply(fn))
    reference = run(params, *args)
    judge = damage_by(metric, reference)
    total = sum(sum(row) for row in fits) - len(places) * sum(s == KEEP for _, s in chosen)
    done, sizes, damage = 0, [], []
    for i, row in zip(places, fits, strict=True):
        path, leaf = leaves[i]
        here: list[tuple[int | None, float | None]] = []
        for ok, (name, scheme) in zip(row, chosen, strict=True):
            if not ok:
                here.append((None, None))
                continue
            if scheme == KEEP:
                here.append((size(leaf), 0.0))
                continue
            new = compressed(path, leaf, scheme, stats)
            changed = [x for _, x in leaves]
            changed[i] = new if exact else _floats(leaf, new)
            try:
                outputs = run(jax.tree.unflatten(treedef, changed), *args)
            except NotImplementedError as error:
                raise NotImplementedError(f"{path}: as {name}: {error}") from None
            here.append((size(new), judge(outputs, f"{path}: as {name}")))
            done += 1
            if progress is not None:
                progress(done, total)
        sizes.append(tuple(s for s, _ in here))
        damage.append(tuple(d for _, d in here))
    before = tuple(size(leaves[i][1]) for i in places)
    rest = sum(size(leaf) for _, leaf in leaves) - sum(before)
    paths = tuple(leaves[i][0] for i in places)
    return Sensitivity(paths, chosen, tuple(sizes), tuple(damage), before, rest)


@jax.jit
def relative_mse(reference: Any, outputs: Any) -> jax.Array:
    """Mean over floating outputs of Σ (y − y')² / Σ y², in float32.

    Args:
        reference: a pytree of arrays y.
        outputs: the same of arrays y'.

    Raises:
        ValueError: none of the outputs is floating.

    >>> relative_mse((jnp.ones(4), jnp.ones(2)), (jnp.zeros(4), jnp.ones(2)))
    Array(0.5, dtype=float32)
    """
    ratios = []
    for pair in zip(jax.tree.leaves(reference), jax.tree.leaves(outputs), strict=True):
        if jnp.issubdtype(pair[0].dtype, jnp.floating):
            y, other = (a.astype(jnp.float32) for a in pair)
            whole = jnp.sum(y * y)
            ratios.append(jnp.sum((y - other) ** 2) / jnp.where(whole == 0, 1, whole))
    if not ratios:
        raise ValueError("the function has no floating outputs; give a metric of those it has")
    return jnp.mean(jnp.stack(ratios))


def damage_by(
    metric: Callable[[Any, Any], Any] | None, reference: Any
) -> Callable[[Any, str], float]:
    """A function of other outputs, and of what made them, that gives the damage.

    Raises:
        ValueError: when either is called: a figure is not finite.

    >>> damage_by(None, jnp.ones(4))(jnp.zeros(4), "zeros")
    1.0
    """
    judge = relative_mse if metric is None else metric

    def number(outputs: Any, what: str) -> float:
        figure = float(judge(reference, outputs))
        if not math.isfinite(figure):
            raise ValueError(f"{what}: damage {figure}; look at the outputs, and at the metric")
        return figure

    base = number(reference, "the parameters as they are")
    return lambda outputs, what: number(outputs, what) - base


def _floats(leaf: Any, new: Quantized) -> Any:
    """What `new` stands for, in an array of `leaf`'s own kind: no new program for `jit`."""
    if is_compressed(leaf):
        return dataclasses.replace(leaf, values=new.prepared().astype(leaf.values.dtype))
    dense = _dense(new)
    where = getattr(leaf, "sharding", None)
    return jax.device_put(dense, where) if isinstance(where, NamedSharding) else dense


_dense = jax.jit(lambda new: new.dense())
