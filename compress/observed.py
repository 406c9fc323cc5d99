"""What met a parameter: sums over the rows of activations that it was multiplied with.

`measure` takes them of one product, `compress.observe` of every product in a function. They are
sums and maxima, so those of batches add: `merge`. `check` refuses what nothing can be learnt from.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.arrays import Quantized
from compress.histogram import BINS, EXACT, bin_of, counts, lane_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "absmax", "abssum", "histogram", "nonfinite", "hessian"],
    meta_fields=["kind", "axes", "prepared"],
)
@dataclass(frozen=True)
class Observed:
    """Statistics of the activations x that met one leaf, over rows: what was contracted with it.

    K numbers the input channels: the entries of the leaf's contracted axes, in the leaf's order.
    Values that are NaN or infinite are counted, and count as zeros everywhere else.

    Attributes:
        rows: float32 [*stack], how many rows came.
        absmax: float32 [*stack, K], max |x| of each channel.
        abssum: float32 [*stack, K], Σ |x|; over `rows` it is the mean.
        histogram: float32 [*stack, BINS], how many |x| are in each bin of `compress.histogram`.
        nonfinite: int32 [*stack], how many values are NaN or infinite.
        hessian: float32 [*stack, K, K], Σ x xᵀ, or None.
        kind: "dot" or "conv".
        axes: of the leaf that were contracted, negative, ascending.
        prepared: "" if x are the leaf's own inputs. If they came by way of a leaf that `smooth` or
            `rotate` had prepared, as what meets its values: how, as `preparation` says it.
    """

    rows: jax.Array
    absmax: jax.Array
    abssum: jax.Array
    histogram: jax.Array
    nonfinite: jax.Array
    hessian: jax.Array | None
    kind: str = field(metadata={"static": True})
    axes: tuple[int, ...] = field(metadata={"static": True})
    prepared: str = field(default="", metadata={"static": True})

    def map(self, change: Callable[[jax.Array, str], jax.Array]) -> "Observed":
        """Each array changed, given with its name."""
        new = {name: change(a, name) for name in _FIELDS if (a := getattr(self, name)) is not None}
        return replace(self, **new)

    def over(self, stack: Sequence[int]) -> "Observed":
        """With the leading axes that a role gives the leaf.

        Axes of size 1 come and go, and what is the same for all entries is repeated for each.

        Args:
            stack: sizes.

        Raises:
            ValueError: the statistics are of other entries.

        >>> seen = measure(jnp.ones((5, 3)), channels=1)
        >>> seen.over((1, 2)).absmax.shape
        (1, 2, 3)
        """
        own = [n for n in self.rows.shape if n != 1]
        wanted = [n for n in stack if n != 1]
        if own and own != wanted:
            raise ValueError(f"statistics of a stack {list(self.rows.shape)}, not {list(stack)}")

        def change(a: jax.Array, _: str) -> jax.Array:
            rest = a.shape[self.rows.ndim :]
            lead = tuple(stack) if own else (1,) * len(stack)
            return jnp.broadcast_to(a.reshape(*lead, *rest), (*stack, *rest))

        return self.map(change)

    def __add__(self, other: "Observed") -> "Observed":
        """Of the rows of both."""
        return self.map(lambda a, name: combine(name)(a, getattr(other, name)))


_FIELDS = ("rows", "absmax", "abssum", "histogram", "nonfinite", "hessian")

Stats = dict[str, Observed]
"""By the path of the leaf, as `compress.transform.named_leaves` spells it."""


def preparation(leaf: Any) -> str:
    """How a leaf's values meet other inputs than the leaf does, in words, or "".

    >>> w = Quantized(jnp.eye(4), input_scale=jnp.ones((4, 1)), format="float", hadamard=(-2, 4))
    >>> preparation(w), preparation(jnp.eye(4))
    ('scaled, rotated by 4 along axis -2', '')
    """
    if not isinstance(leaf, Quantized):
        return ""
    words = ["scaled"] if leaf.input_scale is not None else []
    if leaf.hadamard is not None:
        words.append("rotated by {1} along axis {0}".format(*leaf.hadamard))
    return ", ".join(words)


def combine(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """How a field of two batches becomes that of both."""
    return jnp.maximum if name == "absmax" else jnp.add


def measure(
    x: jax.Array,
    *,
    channels: int,
    stack: int = 0,
    hessian: bool = False,
    axes: tuple[int, ...] = (),
) -> Observed:
    """Statistics of one array of activations.

    Args:
        x: [*stack, *rows, *channels], floating.
        channels: how many of its last axes are channels.
        stack: how many of its first axes have statistics of their own.
        hessian: whether Σ x xᵀ is wanted; float32 products at the highest precision.
        axes: of the leaf; by default those of a kernel [*stack, *channels, out].

    Returns:
        Statistics of a dot.

    >>> seen = measure(jnp.array([[1.0, -2.0], [3.0, jnp.inf]]), channels=1, hessian=True)
    >>> seen.absmax, seen.nonfinite, seen.hessian.tolist()
    (Array([3., 2.], dtype=float32), Array(1, dtype=int32), [[10.0, -2.0], [-2.0, 4.0]])
    """
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, 0)
    lead, over = x.shape[:stack], tuple(range(stack, x.ndim - channels))
    every = tuple(range(stack, x.ndim))
    K = math.prod(x.shape[x.ndim - channels :])
    magnitude = jnp.abs(x)
    return Observed(
        rows=jnp.full(lead, math.prod(x.shape[i] for i in over), jnp.float32),
        absmax=jnp.max(magnitude, over, initial=0).reshape(*lead, K),
        abssum=jnp.sum(magnitude, over).reshape(*lead, K),
        histogram=counts(magnitude, stack),
        nonfinite=jnp.sum(~finite, every, dtype=jnp.int32),
        hessian=products(x, channels, stack) if hessian else None,
        kind="dot",
        axes=axes or tuple(range(-channels - 1, -1)),
    )


def products(x: jax.Array, channels: int, stack: int = 0) -> jax.Array:
    """Σ x xᵀ over rows, in float32 at the highest precision: `hessian` of `Observed`.

    Args:
        x: [*stack, *rows, *channels], float32.
        channels, stack: as in `measure`.

    Returns:
        [*stack, K, K].

    >>> products(jnp.array([[1.0, 2.0], [0.0, 1.0]]), 1)
    Array([[1., 2.],
           [2., 5.]], dtype=float32)
    """
    rows, each = tuple(range(stack, x.ndim - channels)), tuple(range(stack))
    out = lax.dot_general(
        x, x, ((rows, rows), (each, each)), precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    K = math.prod(x.shape[x.ndim - channels :])
    return out.reshape(*x.shape[:stack], K, K)


def measure_groups(x: jax.Array, sizes: jax.Array, *, hessian: bool = False) -> Observed:
    """Statistics of rows that lie in groups, one after another, as `lax.ragged_dot` has them.

    Args:
        x: [rows, K].
        sizes: int [groups], rows in each group; rows after the last group are left out.
        hessian: as in `measure`.

    Returns:
        Statistics with a stack of groups.

    >>> measure_groups(jnp.eye(3), jnp.array([2, 1])).absmax
    Array([[1., 1., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, 0)
    groups, m = sizes.shape[0], len(x)
    ends = jnp.cumsum(sizes)
    group = jnp.sum(ends <= jnp.arange(m, dtype=ends.dtype)[:, None], 1)  # groups: none

    def spread(a: jax.Array, name: str = "") -> jax.Array:
        return scatter(a, group, groups, name)

    squares = None
    if hessian:
        squares = lax.ragged_dot_general(
            x, x, sizes, _RAGGED_ROWS, precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
    magnitude = jnp.abs(x)
    lanes = max(-(-x.size // EXACT), 1)  # no more than counts need: groups may be many
    at = group[:, None], lane_of(x.shape, lanes), bin_of(magnitude)
    bins = jnp.zeros((groups, lanes, BINS), jnp.float32).at[at].add(np.float32(1), mode="drop")
    return Observed(
        rows=spread(jnp.ones(m, jnp.float32)),
        absmax=spread(magnitude, "absmax"),
        abssum=spread(magnitude),
        histogram=jnp.sum(bins, 1),
        nonfinite=spread(jnp.sum(~finite, 1, dtype=jnp.int32)),
        hessian=squares,
        kind="dot",
        axes=(-2,),
    )


_RAGGED_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def scatter(a: jax.Array, index: jax.Array | int, size: int, name: str) -> jax.Array:
    """Entries [n, ...] of a field, or one of them, at their places in an axis [size, ...]."""
    one = jnp.ndim(index) == 0
    index, a = (jnp.asarray(index)[None], a[None]) if one else (index, a)
    at = jnp.zeros((size, *a.shape[1:]), a.dtype).at[index]
    return (at.max if name == "absmax" else at.add)(a, mode="drop")


def merge(*stats: Mapping[str, Observed]) -> Stats:
    """The statistics of several batches together.

    Counts and sums are added, maxima compared, so the order does not matter but for rounding, and
    it may run under `jit`, on any mesh.

    Raises:
        ValueError: none are given; or leaves, shapes or contracted axes differ.

    >>> seen = measure(jnp.ones((5, 3)), channels=1)
    >>> merge({"w": seen}, {"w": seen})["w"].rows
    Array(10., dtype=float32)
    """
    if not stats:
        raise ValueError("merge of no statistics: give those of one batch at least")
    first, *others = stats
    for other in others:
        if odd := sorted(set(first) ^ set(other)):
            raise ValueError(
                f"{odd[0]}: observed in some batches and not in others; statistics that are merged "
                "are those of one function"
            )
        for path, seen in first.items():
            if (a := _signature(seen)) != (b := _signature(other[path])):
                raise ValueError(f"{path}: observed as {a} and as {b}, which do not merge")
    return {path: sum((o[path] for o in others), seen) for path, seen in first.items()}


def _signature(seen: Observed) -> str:
    hessian = "with" if seen.hessian is not None else "without"
    return (
        f"a {seen.prepared and seen.prepared + ' '}{seen.kind} over axes {seen.axes}, "
        f"{list(seen.absmax.shape)} channels, {hessian} Hessian"
    )


def check(stats: Mapping[str, Observed], *, allow_empty: bool = False) -> None:
    """Refuse statistics that nothing can be learnt from.

    Args:
        stats: concrete.
        allow_empty: accept entries of a stack that no row met, such as experts that no token
            chose, as long as others were met.

    Raises:
        ValueError: there are none; or a leaf, which is named, met no rows, or NaN or infinity.

    >>> check({"w": measure(jnp.array([[1.0, jnp.nan]]), channels=1)})
    Traceback (most recent call last):
    ValueError: w: 1 of the activations that met it in calibration are NaN or infinite; ...
    """
    if not stats:
        raise ValueError("no statistics: calibrate on one batch at least, of a function with dots")
    for path, seen in stats.items():
        rows, bad = np.asarray(seen.rows), int(np.sum(seen.nonfinite))
        empty = int(np.sum(rows == 0))
        if empty == rows.size:
            raise ValueError(f"{path}: met no rows in calibration; give it data")
        if empty and not allow_empty:
            raise ValueError(
                f"{path}: {empty} of {rows.size} entries of its stack met no rows in calibration; "
                "calibrate on more data, or accept it with allow_empty=True"
            )
        if bad:
            raise ValueError(
                f"{path}: {bad} of the activations that met it in calibration are NaN or infinite; "
                "look at the data, or at the layers before"
            )
