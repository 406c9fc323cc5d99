"""Evaluation: every row once, counted on the mesh, added up on the host.

The one loop for all variants of a model: `apply` may be the plain function, one under a precision
policy, or one that understands compressed leaves. Where every row is ranked among the items of a
catalogue (`Task.index`), these are computed first, once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fw import metrics, precision
from fw.data import eval_batches
from fw.data.rows import AnyRows
from fw.errors import FwError
from fw.model import Batch, Model
from fw.tasks import CATALOGUE, Summary, Task
from sharding import Rules, constrain, put, scope
from sharding.processes.cluster import beat

Forward = Callable[[Any, Batch], jax.Array]


@dataclass(frozen=True)
class Counter:
    """`call(variables, batch) -> (counts, logits)`, compiled; logits only for a task that judges.

    Attributes:
      call: the function.
      task: what is counted.
      index: `index(variables, rows of a catalogue)`, compiled; None for a task without.
    """

    call: Callable[[Any, Batch], tuple[Any, jax.Array | None]]
    task: Task
    index: Callable[[Any, Batch], Any] | None = None


def forward(model: Model, policy: str) -> Forward:
    """`(variables, batch) -> logits` of a model under a precision policy, for evaluation."""
    apply = precision.apply(model.apply, policy)
    return lambda variables, batch: apply(variables, batch)[0]


def make_counter(forward: Forward, task: Task) -> Counter:
    """Compiles the counting of a batch; one for all evaluations of a run.

    Args:
      forward: `forward(variables, batch) -> logits`.
      task: says what is counted.
    """

    def call(variables: Any, batch: Batch) -> Any:
        logits = forward(variables, batch)
        kept = None if task.judge is None else logits
        if kept is not None and task.kept is not None:
            kept = task.kept(logits)
        found = task.count(logits, batch), kept
        # Whole on every device, so that every process can read them.
        return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), found)

    def index(variables: Any, batch: Batch) -> Any:
        assert task.index is not None
        return task.index(forward(variables, batch), batch)

    return Counter(jax.jit(call), task, None if task.index is None else jax.jit(index))


def count(
    counter: Counter,
    variables: Any,
    rows: AnyRows,
    *,
    size: int,
    mesh: Mesh,
    rules: Rules,
) -> Any:
    """The counts of a whole data set on the host: of batches, and of the whole if it is judged.

    Args:
      counter: from `make_counter`.
      variables: where training or loading put them.
      rows: of the data set; with a `catalogue` if the task has an index.
      size: rows in a batch; must divide over the mesh's batch axes.
      mesh, rules: where the batch goes.

    Raises:
      FwError: rows without the catalogue that the task is to rank.
    """
    counts = []
    with scope(mesh, rules):
        items = _catalogue(counter, variables, rows, size, mesh, rules)
        for batch in eval_batches(rows.arrays, size, empty=rows.empty):
            there = put(batch, mesh, rules)
            beat()
            found, kept = counter.call(variables, {**there, **items})
            # To the host at once: of images, all together are more than a device holds.
            counts.append((found, None if kept is None else np.asarray(kept)))
    beat()
    total, judge = metrics.merge(*(found for found, _ in counts)), counter.task.judge
    if judge is not None:
        total |= judge(rows, np.concatenate([kept for _, kept in counts]))
    return total


def _catalogue(
    counter: Counter,
    variables: Any,
    rows: AnyRows,
    size: int,
    mesh: Mesh,
    rules: Rules,
) -> dict[str, Any]:
    """`{CATALOGUE: what the task ranks}`, cut as a batch is; nothing for other tasks."""
    if counter.index is None:
        return {}
    catalogue = getattr(rows, "catalogue", None)
    if catalogue is None:
        raise FwError(f"{counter.task.name}: the rows have no catalogue to rank")
    parts = []
    for batch in eval_batches(catalogue.arrays, size, empty=catalogue.empty):
        beat()
        parts.append(counter.index(variables, put(batch, mesh, rules)))

    def join(*parts: jax.Array) -> jax.Array:
        return constrain(jnp.concatenate(parts), "batch", *[None] * (parts[0].ndim - 1))

    return {CATALOGUE: jax.jit(lambda parts: jax.tree.map(join, *parts))(parts)}


def evaluate(
    counter: Counter,
    variables: Any,
    rows: AnyRows,
    *,
    size: int,
    mesh: Mesh,
    rules: Rules,
) -> Summary:
    """Counts a data set and summarises it."""
    return counter.task.summarise(
        count(counter, variables, rows, size=size, mesh=mesh, rules=rules)
    )
