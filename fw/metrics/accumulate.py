"""Every metric is a tree of sums, so batches, devices and processes merge by `+`.

The device counts one batch in 32 bits; `merge` adds batches on the host in 64, where neither a
long evaluation nor a large vocabulary overflows. The counts themselves come from
`fw.metrics.classification`, `fw.metrics.entities` and, for scalars such as the loss, `mean` here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
    """A weighted mean that is not divided yet: two additive scalars.

    Attributes:
        total: sum of weight × value, in the value's unit; f32 on device, float64 when merged.
        weight: sum of weights; f32 on device, float64 when merged.
    """

    total: jax.Array | np.ndarray
    weight: jax.Array | np.ndarray


@dataclass(frozen=True, eq=False)
class Sample:
    """What has no sum: the values themselves, on the host; merging lays them end to end.

    Attributes:
        values: [n, ...].
    """

    values: np.ndarray


def mean(values: jax.Array, weights: jax.Array | None = None) -> Mean:
    """Sum values and their weights, ready to be merged and divided later.

    total = Σ wᵢ vᵢ, weight = Σ wᵢ. A value of weight zero is left out altogether, so a NaN in
    padding does no harm.

    Args:
        values: [...] float.
        weights: [...] float, int or bool, the shape of `values`; all ones when None.

    Returns:
        The sums in f32, whatever the dtype of the values.

    Raises:
        ValueError: the shapes differ.

    >>> mean_value(mean(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1, 3, 0])))
    1.75
    """
    if weights is None:
        weights = jnp.ones_like(values, jnp.float32)
    if weights.shape != values.shape:
        raise ValueError(
            f"mean: weights {weights.shape} must have the shape of values "
            f"{values.shape}; broadcast them first"
        )
    weights = weights.astype(jnp.float32)
    weighted = jnp.where(weights != 0, values.astype(jnp.float32) * weights, 0.0)
    return Mean(weighted.sum(), weights.sum())


def mean_value(merged: Mean) -> float:
    """Divide: total / weight.

    Raises:
        ValueError: the weight is zero; a mean over nothing has no value.

    >>> mean_value(Mean(np.array(6.0), np.array(4.0)))
    1.5
    """
    weight = float(merged.weight)
    if weight == 0:
        raise ValueError(
            "mean_value: the weight is 0, nothing was counted; is the data empty "
            "or everything masked?"
        )
    return float(merged.total) / weight


def merge(*trees: Any) -> Any:
    """Add trees of counts leaf by leaf on the host, in int64 or float64.

    It waits for the device, so keep the counts of a few batches as they are and merge them
    together. Inside jit, `jax.tree.map(jnp.add, a, b)` adds without leaving the device.

    Args:
        trees: one or more pytrees of one structure whose leaves are real jax or numpy arrays, or
            a `Sample`.
            In a multi-process program they must be fully replicated, as the counts of a global
            batch under jit are.

    Returns:
        The same structure; integer and bool leaves become int64, floats float64.

    Raises:
        ValueError: no tree was given, or structures or leaf shapes differ.
        TypeError: a leaf is not a real number.

    >>> int(merge(jnp.int32(2**31 - 1), jnp.int32(1)))
    2147483648
    """
    if not trees:
        raise ValueError("merge: needs at least one tree of counts")

    def add(path: Any, *leaves: Any) -> np.ndarray | Sample:
        shapes = {np.shape(leaf) for leaf in leaves if not isinstance(leaf, Sample)}
        if len(shapes) > 1:
            raise ValueError(
                f"merge: leaf {jax.tree_util.keystr(path)!r} has shapes "
                f"{sorted(shapes)}; all must be equal"
            )
        # Added pairwise in 64 bits: a stack of all batches would hold them in memory twice.
        first, *rest = leaves
        if isinstance(first, Sample):
            return Sample(np.concatenate([leaf.values for leaf in leaves]))
        total = _wide(first)
        for leaf in rest:
            total = np.asarray(total + _wide(leaf))
        return total

    return jax.tree_util.tree_map_with_path(add, *trees)


def _wide(leaf: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == np.bool_:
        return array.astype(np.int64)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(np.float64)
    raise TypeError(f"merge: a leaf of dtype {array.dtype} is not a count; expected real numbers")
