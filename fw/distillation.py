"""Distillation: a student learns what a teacher says of the data, beside the labels.

    taught, loss = distilled(student.model, teacher.model, task.loss, temperature=2.0)
    step = make_step(taught, loss, tx, mesh=mesh, rules=rules)
    state, metrics = step(state, batch, teacher.variables)

The teacher's variables are the third collection, "frozen": they lie on the mesh beside the
student's, nothing is differentiated with respect to them, and checkpoints do not hold them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fw.errors import FwError
from fw.labels import IGNORE
from fw.model import FROZEN, Batch, Model, Variables

Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Distil:
    """Who teaches a student, and how much it heeds that.

    Attributes:
      teacher: a run or a model folder, of the same classes and tokens; its logits are learned
        beside the labels.
      temperature: what the logits of both are divided by; more of it shows more of what the teacher
        holds for possible.
      teacher_weight: of the teacher's part of the loss, 0 to 1; the labels have the rest.
    """

    teacher: str = ""
    temperature: float = 2.0
    teacher_weight: float = 0.9

    def __post_init__(self):
        """Checks them."""
        for name in ("temperature", "teacher_weight"):
            if not self.teacher and getattr(self, name) != getattr(Distil, name):
                raise FwError(f"{name} is for distillation; give --teacher a run, too")
        if not self.temperature > 0:
            raise FwError(f"temperature is {self.temperature}; expected more than 0")
        if not 0 <= self.teacher_weight <= 1:
            raise FwError(f"teacher_weight is {self.teacher_weight}; expected 0 to 1")


def divergence(
    logits: jax.Array, taught: jax.Array, batch: Batch, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """T² · Σ KL(softmax(taught / T) ‖ softmax(logits / T)) where labels count, and how many do.

    T² keeps the gradients as large as those of labels, whatever T is.

    Args:
      logits: [..., C], of the student.
      taught: [..., C], of the teacher.
      batch: holds `labels` i32[...], `IGNORE` where there is none.
      temperature: T.

    Source: Hinton et al. 2015, arXiv:1503.02531.

    >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    >>> batch = {"labels": jnp.array([0, IGNORE])}
    >>> total, count = divergence(logits, logits[::-1], batch, temperature=1.0)
    >>> f"{total:.4f} of {count:.0f}"
    '0.3681 of 1'
    """
    counted = batch["labels"] != IGNORE
    t = jnp.asarray(temperature, logits.dtype)
    ours, theirs = (jax.nn.log_softmax(x / t, axis=-1) for x in (logits, taught))
    apart = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    zero = jnp.zeros((), logits.dtype)
    return t * t * jnp.sum(jnp.where(counted, apart, zero)), jnp.sum(counted, dtype=logits.dtype)


def distilled(
    student: Model,
    teacher: Model,
    loss: Loss,
    *,
    temperature: float = Distil.temperature,
    weight: float = Distil.teacher_weight,
) -> tuple[Model, Loss]:
    """A model that asks both, and the loss of what they answer.

        L = (1 − w) · loss(student) + w · T² · KL(teacher ‖ student)

    Args:
      student: its parameters are the model's.
      teacher: of logits of the same classes, for the same batches; it is asked as in evaluation.
      loss: of the student's logits and labels, a mean over labels that count.
      temperature: T.
      weight: w.

    Returns:
      The model, whose `apply` takes variables with the collection `frozen`, the teacher's, and
      gives (student's outputs, teacher's outputs); and the loss of these, for `fw.step.make_step`.

    >>> from fw.models.bert import BertConfig, bert
    >>> from fw.tasks import cross_entropy
    >>> small, large = (
    ...     bert(BertConfig(9, 4 * n, n, n, 8, num_labels=2, task="token_classification"))
    ...     for n in (1, 2)
    ... )
    >>> taught, loss = distilled(small, large, cross_entropy)
    >>> ids = jnp.ones((2, 3), jnp.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids, "labels": ids}
    >>> variables = small.init(jax.random.key(0)) | {FROZEN: large.init(jax.random.key(1))}
    >>> total, count = loss(taught.apply(variables, batch)[0], batch)
    >>> float(count)
    6.0
    """

    def apply(
        variables: Variables, batch: Any, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, Variables]:
        given = {name: x for name, x in variables.items() if name != FROZEN}
        said, new = student.apply(given, batch, key=key, train=train)
        taught, _ = teacher.apply(variables[FROZEN], batch)
        return (said, jax.lax.stop_gradient(taught)), {**variables, **new}

    def of_both(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        said, taught = outputs
        if jnp.shape(said) != jnp.shape(taught):
            raise FwError(
                f"the student's logits are {list(jnp.shape(said))}, the teacher's "
                f"{list(jnp.shape(taught))}; expected the same classes"
            )
        hard, count = loss(said, batch)
        soft, _ = divergence(said, taught.astype(said.dtype), batch, temperature)
        w = jnp.asarray(weight, said.dtype)
        return (1 - w) * hard + w * soft, count

    return dataclasses.replace(student, apply=apply), of_both
