"""Evaluation: every row once, counted on the mesh, added up on the host.

The one loop for all variants of a model: `apply` may be the plain function, one under a precision
policy, or one that understands compressed leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fw import metrics
from fw.data import Packed, eval_batches
from fw.data.rows import Rows
from fw.model import Batch
from fw.tasks import Summary, Task
from sharding import Rules, constrain, put, scope
from sharding.processes.cluster import beat

Forward = Callable[[Any, Batch], jax.Array]


@dataclass(frozen=True)
class Counter:
    """`call(variables, batch) -> (counts, logits)`, compiled; logits only for a task that judges.

    Attributes:
      call: the function.
      task: what is counted.
    """

    call: Callable[[Any, Batch], tuple[Any, jax.Array | None]]
    task: Task


def make_counter(forward: Forward, task: Task) -> Counter:
    """Compiles the counting of a batch; one for all evaluations of a run.

    Args:
      forward: `forward(variables, batch) -> logits`.
      task: says what is counted.
    """

    def call(variables: Any, batch: Batch) -> Any:
        logits = forward(variables, batch)
        found = task.count(logits, batch), None if task.judge is None else logits
        # Whole on every device, so that every process can read them.
        return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), found)

    return Counter(jax.jit(call), task)


def count(
    counter: Counter,
    variables: Any,
    rows: Packed | Rows,
    *,
    size: int,
    mesh: Mesh,
    rules: Rules,
) -> Any:
    """The counts of a whole data set on the host: of batches, and of the whole if it is judged.

    Args:
      counter: from `make_counter`.
      variables: where training or loading put them.
      rows: packed texts, or rows of arrays.
      size: rows in a batch; must divide over the mesh's batch axes.
      mesh, rules: where the batch goes.
    """
    counts = []
    with scope(mesh, rules):
        for batch in eval_batches(rows.arrays, size, empty=rows.empty):
            there = put(batch, mesh, rules)
            beat()
            counts.append(counter.call(variables, there))
    beat()
    total, judge = metrics.merge(*(found for found, _ in counts)), counter.task.judge
    if judge is not None:
        total |= judge(rows, np.concatenate([np.asarray(logits) for _, logits in counts]))
    return total


def evaluate(
    counter: Counter,
    variables: Any,
    rows: Packed | Rows,
    *,
    size: int,
    mesh: Mesh,
    rules: Rules,
) -> Summary:
    """Counts a data set and summarises it."""
    return counter.task.summarise(
        count(counter, variables, rows, size=size, mesh=mesh, rules=rules)
    )
