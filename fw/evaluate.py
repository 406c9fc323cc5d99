"""Evaluation: every row once, counted on the mesh, added up on the host.

The one loop for all variants of a model: `apply` may be the plain function, one under a precision
policy, or one that understands compressed leaves.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from fw import metrics
from fw.data import Packed, eval_batches
from fw.model import Batch
from fw.tasks import Summary, Task
from sharding import Rules, constrain, put, scope
from sharding.processes.cluster import beat

Forward = Callable[[Any, Batch], jax.Array]


def make_counter(forward: Forward, task: Task) -> Callable[[Any, Batch], Any]:
    """Compiles `(variables, batch) -> counts`; one for all evaluations of a run.

    Args:
      forward: `forward(variables, batch) -> logits`.
      task: says what is counted.
    """

    def counter(variables: Any, batch: Batch) -> Any:
        counts = task.count(forward(variables, batch), batch)
        # Whole on every device, so that every process can read them.
        return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), counts)

    return jax.jit(counter)


def count(
    counter: Callable[[Any, Batch], Any],
    variables: Any,
    rows: Packed,
    *,
    size: int,
    mesh: Mesh,
    rules: Rules,
) -> Any:
    """The counts of a whole data set, as numpy arrays on the host.

    Args:
      counter: from `make_counter`.
      variables: where training or loading put them.
      rows: packed texts.
      size: rows in a batch; must divide over the mesh's batch axes.
      mesh, rules: where the batch goes.
    """
    counts = []
    with scope(mesh, rules):
        for batch in eval_batches(rows.arrays, size, empty=rows.empty):
            there = put(batch, mesh, rules)
            beat()
            counts.append(counter(variables, there))
    beat()
    return metrics.merge(*counts)


def evaluate(
    counter: Callable[[Any, Batch], Any],
    variables: Any,
    rows: Packed,
    task: Task,
    *,
    size: int,
    mesh: Mesh,
    rules: Rules,
) -> Summary:
    """Counts a data set and summarises it."""
    return task.summarise(count(counter, variables, rows, size=size, mesh=mesh, rules=rules))
