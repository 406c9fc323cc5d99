"""Each process makes only its own share of a batch.

A batch is a function of (seed, step) on every process alike, and so are its rows one by one: those
that the devices of this process hold are taken, the others never exist here.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fw.data.batches import Batches
from fw.errors import FwError
from sharding import Rules, build, put
from sharding.layout import fit


def feed(
    batches: Batches | Callable[[int], Mapping[str, Any]], step: int, mesh: Mesh, rules: Rules
) -> dict[str, jax.Array]:
    """Bring the batch of a step to the devices.

    Args:
        batches: `Batches`, of which only this process's rows are taken; or any function of a step,
            whose whole batch is made and of which this process's rows are transferred.
        step: from 0.
        mesh, rules: where it goes, cut along its first axis.

    Returns:
        The batch as global arrays.

    Raises:
        FwError: a dtype that JAX lacks, or would silently narrow.
        sharding.ShardingError: a size that the mesh does not divide.

    >>> from sharding import make_mesh, rules
    >>> batches = Batches({"x": np.arange(4, dtype=np.int32)}, size=4)
    >>> batch = feed(batches, 0, make_mesh("data=1"), rules())
    >>> np.asarray(batch["x"]).tolist() == batches(0)["x"].tolist()
    True
    """
    if not isinstance(batches, Batches):
        return put(dict(batches(step)), mesh, rules)
    take = cache(lambda start, stop: batches.take(step, slice(start, stop)))
    placed = {}
    for name, values in batches.example.items():
        if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
            raise FwError(f"{name}: JAX has no {values.dtype} of its own here; cast it on the host")

        def read(index: tuple[slice, ...], name: str = name) -> np.ndarray:
            rows, *rest = index
            return take(rows.start, rows.stop)[name][(slice(None), *rest)]

        shape = (batches.size, *values.shape[1:])
        names = ("batch", *[None] * (values.ndim - 1))
        where = fit(names, shape, mesh, rules, activation=True, path=name)
        placed[name] = build(jax.ShapeDtypeStruct(shape, values.dtype), where, read, path=name)
    return placed
