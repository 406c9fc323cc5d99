"""Distillation: a student learns what a teacher says of the data, beside the labels.

    lessons = Lessons(temperature=2.0, hidden=1.0)
    taught = distilled(student.model, teacher.model, task.loss, lessons, example=batch)
    variables = taught.variables(student.variables, jax.random.key(0))
    step = make_step(taught.model, taught.loss, tx, mesh=mesh, rules=rules)
    state, metrics = step(initial_state(variables, tx, mesh), batch, teacher.variables)
    student = taught.student(state.variables)

The teacher's variables are the third collection, "frozen": they lie on the mesh beside the
student's, nothing is differentiated with respect to them, and checkpoints do not hold them. What
the student's states are projected by is trained beside its parameters, and left off afterwards.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fw.errors import FwError
from fw.labels import TAUGHT
from fw.lessons import (
    Soft,
    Words,
    apart,
    divergence,
    partner,
    relations,
    word_divergence,
)
from fw.model import FROZEN, ROWS, Batch, Model, Variables
from fw.models.heads import BIAS, TABLE, WORDS
from fw.models.layers import HEADS, HIDDEN
from fw.taps import Taken, taken
from sharding import undifferentiated

Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]

ANSWERS = "teacher_outputs"
"""The entry of a batch that holds what a teacher said of its rows, instead of the teacher."""

PROJECTIONS = "projections"
"""The entry of the parameters that projects a student's states."""


@dataclass(frozen=True)
class Distil:
    """Who teaches a student, and how much it heeds that.

    Attributes:
      teacher: a run or a model folder, of the same classes and inputs; its answers are learned
        beside the labels. Or a file of answers that another run kept, see teacher_offline.
      temperature: what the logits of both are divided by; more of it shows more of what the teacher
        holds for possible.
      teacher_weight: of the teacher's part of the loss, 0 to 1; the labels have the rest.
      teacher_hidden: how much is added of the distance between the states of their layers.
      teacher_attention: how much is added of the divergence of their last layers' attention.
      teacher_offline: ask the teacher once for all rows, before training; its answers are kept in
        the run as teacher.safetensors.
      unlabelled: a file or folder of texts that the teacher alone labels, read as data is.
    """

    teacher: str = ""
    temperature: float = 2.0
    teacher_weight: float = 0.9
    teacher_hidden: float = 0.0
    teacher_attention: float = 0.0
    teacher_offline: bool = False
    unlabelled: str = ""

    def __post_init__(self):
        """Checks them."""
        for field in dataclasses.fields(Distil):
            if not self.teacher and getattr(self, field.name) != field.default:
                raise FwError(f"{field.name} is for distillation; give --teacher a run, too")
        if self.offline and (self.teacher_hidden or self.teacher_attention):
            raise FwError(
                "teacher_hidden and teacher_attention are of a teacher that is asked in every "
                "step; leave teacher_offline, or them, away"
            )
        if self.teacher_offline and self.teacher.endswith(".safetensors"):
            raise FwError(
                f"teacher {self.teacher!r} is a file of answers; leave teacher_offline away, which "
                "asks a model for them"
            )
        self.lessons.check()

    @property
    def offline(self) -> bool:
        """Whether its answers are read, not asked for."""
        return self.teacher_offline or self.teacher.endswith(".safetensors")

    @property
    def lessons(self) -> "Lessons":
        """How much is heeded of what."""
        return Lessons(
            self.temperature, self.teacher_weight, self.teacher_hidden, self.teacher_attention
        )


@dataclass(frozen=True)
class Lessons:
    """How much a student heeds of what.

        L = (1 - w) · loss(student) + w · T² · KL(teacher ‖ student) + a · states + b · attention

    Attributes:
      temperature: T.
      weight: w.
      hidden: a, of `fw.lessons.apart`, of what layers name `HIDDEN`.
      attention: b, of `fw.lessons.relations`, of what the last layer names `HEADS`.

    The last two are means over the rows that are computed together: where a batch is cut, into
    microbatches or by workers that exchange gradients, over each part's, weighted by its labels.
    """

    temperature: float = Distil.temperature
    weight: float = Distil.teacher_weight
    hidden: float = 0.0
    attention: float = 0.0

    def check(self) -> None:
        """Raises FwError for what is out of range, named as options are."""
        if not self.temperature > 0:
            raise FwError(f"temperature is {self.temperature}; expected more than 0")
        if not 0 <= self.weight <= 1:
            raise FwError(f"teacher_weight is {self.weight}; expected 0 to 1")
        for name in ("hidden", "attention"):
            if not getattr(self, name) >= 0:
                raise FwError(f"teacher_{name} is {getattr(self, name)}; expected 0 or more")


@dataclass(frozen=True)
class Taught:
    """A student that asks its teacher.

    Attributes:
      model: whose parameters are the student's and projections; its `apply` takes variables with
        the collection `frozen`, the teacher's, but for a batch that holds `ANSWERS`.
      loss: of its outputs, for `fw.step.make_step`.
    """

    model: Model
    loss: Loss
    _projections: Callable[[jax.Array], Any]

    def variables(self, variables: Variables, key: jax.Array) -> Variables:
        """The student's variables, with new projections among the parameters."""
        new = self._projections(key)
        if not new:
            return variables
        return {**variables, "params": {**variables["params"], PROJECTIONS: new}}

    def student(self, variables: Variables) -> Variables:
        """Variables of training without projections: the student's own."""
        params = {k: x for k, x in variables["params"].items() if k != PROJECTIONS}
        return {**variables, "params": params}


def distilled(
    student: Model,
    teacher: Model,
    loss: Loss,
    lessons: Lessons | None = None,
    *,
    soft: Soft | None = divergence,
    causal: bool = False,
    heard: float = 1.0,
    example: Any = None,
) -> Taught:
    """A student that asks its teacher, and the loss of what they say.

    Args:
      student: its parameters are the model's.
      teacher: of answers to the same batches; it is asked as in evaluation.
      loss: of the student's outputs and labels, a mean over labels that count.
      lessons: what is heeded; None for the answers alone.
      soft: how far answers are apart; None for those of language models, by `word_divergence`.
      causal: whether tokens see only those before them, for lessons of attention.
      heard: of all data, how often a teacher is heard for each label: more than once where some
        has none, and batches say so (`TAUGHT`). Labels weigh as much as if all had one.
      example: a batch or its shapes; lessons of states need it.

    Raises:
      FwError: a lesson that is out of range, or that the models have nothing for.

    >>> from fw.models.bert import BertConfig, bert
    >>> from fw.tasks import cross_entropy
    >>> small, large = (
    ...     bert(BertConfig(9, 4 * n, n, n, 8, num_labels=2, task="token_classification"))
    ...     for n in (1, 2)
    ... )
    >>> ids = jnp.ones((2, 3), jnp.int32)
    >>> batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids, "labels": ids}
    >>> taught = distilled(small, large, cross_entropy, Lessons(hidden=1.0), example=batch)
    >>> variables = taught.variables(small.init(jax.random.key(0)), jax.random.key(1))
    >>> variables["params"]["projections"]["0"].shape
    (4, 8)
    >>> frozen = {"frozen": large.init(jax.random.key(2))}
    >>> total, count = taught.loss(taught.model.apply(variables | frozen, batch)[0], batch)
    >>> float(count)
    6.0
    """
    how = lessons or Lessons()
    how.check()
    ask = partial(_ask, how=how, words=soft is None)
    sizes = _sizes(student, teacher, ask, example) if how.hidden else {}
    names = dict.fromkeys(sizes, ("embed", None))
    axes = {**student.axes["params"], **({PROJECTIONS: names} if names else {})}

    def apply(
        variables: Variables, batch: Any, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, Variables]:
        own = taught.student({k: x for k, x in variables.items() if k != FROZEN})
        plain = {k: x for k, x in batch.items() if k not in (ANSWERS, TAUGHT)}
        (said, new), ours = ask(student)(own, plain, key=key, train=train)
        if ANSWERS in batch:
            answer, theirs = batch[ANSWERS], {}
        else:  # the rows of tables in a batch are the student's
            asked = {k: x for k, x in plain.items() if k != ROWS}
            with undifferentiated():
                found = ask(teacher)(variables[FROZEN], asked)
            (answer, _), theirs = jax.lax.stop_gradient(found)
        far = _answers(said, answer, ours, theirs, batch, how, soft) if how.weight else None
        more = jnp.zeros(())
        if how.hidden:
            projections = variables["params"][PROJECTIONS]
            states = apart(ours[HIDDEN], theirs[HIDDEN], projections, batch)
            more += states.astype(more.dtype) * how.hidden
        if how.attention:
            own, other = ([seen[name][-1] for name in HEADS] for seen in (ours, theirs))
            related = relations(own, other, batch, causal=causal)
            more += related.astype(more.dtype) * how.attention
        return (said, far, more), {**variables, **new, "params": variables["params"]}

    def of_all(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        said, soft, more = outputs
        hard, count = loss(said, batch)
        # What keeps experts in use is of no label, and no teacher has a say in it.
        aux = said.get("aux", 0.0) * count if isinstance(said, Mapping) else 0.0
        hard -= aux
        if TAUGHT in batch:
            count = jnp.sum(batch[TAUGHT], dtype=hard.dtype)
        # Sums over rows, by which batches may be cut: no part of one knows how many are labelled.
        w = jnp.asarray(how.weight, hard.dtype)
        total = (1 - w) * hard * jnp.asarray(heard, hard.dtype) + aux
        if soft is not None:
            total += w * soft
        return total + more.astype(hard.dtype) * count, count

    def projections(key: jax.Array) -> dict[str, jax.Array]:
        return {
            layer: jnp.eye(n) if n == m else jax.random.normal(each, (n, m)) / n**0.5
            for (layer, (n, m)), each in zip(
                sizes.items(), jax.random.split(key, len(sizes) or 1), strict=False
            )
        }

    def init(key: jax.Array) -> Variables:
        return taught.variables(student.init(key), jax.random.fold_in(key, 1))

    model = dataclasses.replace(
        student, init=init, apply=apply, axes={**student.axes, "params": axes}
    )
    taught = Taught(model, of_all, projections)
    return taught


def _ask(model: Model, *, how: Lessons, words: bool) -> Callable[..., Any]:
    """`model.apply`, with what the lessons are about beside its result."""
    names = (HIDDEN,) if how.hidden else ()
    names += (WORDS, TABLE, BIAS) if words and how.weight else ()
    last = HEADS if how.attention else ()
    if not (names or last):
        return lambda *args, **kwargs: (model.apply(*args, **kwargs), {})
    found = taken(model.apply, names, last=last)

    def asked(*args: Any, **kwargs: Any) -> Any:
        out, seen = found(*args, **kwargs)
        for name in {*names, *last} - {BIAS}:
            if not seen[name]:
                raise FwError(
                    f"a lesson is about {name!r}, which {type(model.config).__name__} names "
                    "nowhere; teach by answers alone, or name it with fw.taps.tap"
                )
        return out, seen

    return asked


def _answers(
    said: Any, taught: Any, ours: Taken, theirs: Taken, batch: Batch, how: Lessons,
    soft: Soft | None,
) -> jax.Array:  # fmt: skip
    """How far the answers are apart."""
    if soft is None:
        own, other = (
            Words(seen[WORDS][-1], seen[TABLE][-1], seen[BIAS][-1] if seen[BIAS] else None)
            for seen in (ours, theirs)
        )
        return word_divergence(own, other, batch, how.temperature)
    if jnp.shape(said) != jnp.shape(taught):
        raise FwError(
            f"the student's outputs are {list(jnp.shape(said))}, the teacher's "
            f"{list(jnp.shape(taught))}; expected the same classes"
        )
    return soft(said, taught, batch, how.temperature)


def _sizes(
    student: Model, teacher: Model, ask: Callable[..., Any], example: Any
) -> dict[str, tuple[int, int]]:
    """By number of a student's layer, the sizes of its states and of those it learns of."""
    if example is None:
        raise FwError("lessons of states need an example of a batch")

    def seen(model: Model) -> Sequence[Any]:
        def run(key: jax.Array, batch: Any) -> Any:
            return ask(model)(model.init(key), batch)[1][HIDDEN]

        return jax.eval_shape(run, jax.random.key(0), dict(example))

    ours, theirs = seen(student), seen(teacher)
    chosen = [theirs[partner(i, len(ours), len(theirs))] for i in range(len(ours))]
    return {
        str(i): (x.shape[-1], y.shape[-1])
        for i, (x, y) in enumerate(zip(ours, chosen, strict=True))
    }
