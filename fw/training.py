"""What a run trains: a model whole, adapters or roundings of it; and perhaps beside a teacher.

`fw.finetune` makes a `Training` and need not know which of them it is.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import compress
from compress.transform import Report, Transform
from fw import answers, assets, data, hub, run
from fw.adaptation import Adapted, adapt, transform
from fw.compression import calibrated
from fw.data.rows import AnyRows
from fw.distillation import ANSWERS, Loss, Taught, distilled
from fw.errors import FwError
from fw.evaluate import forward
from fw.json_files import is_writer
from fw.labels import IGNORE, TAUGHT
from fw.lessons import SOFT
from fw.model import FROZEN, Model
from fw.models.stack_layout import stages_of
from fw.processors import Change, Processor, Text
from fw.qat import learned
from fw.recipe import Finetune
from fw.step import Optimizer, make_step
from fw.tasks import Task
from fw.train import Progress
from sharding import Rules, put, scope, shardings
from sharding.parallel.pipeline import PIPE
from sharding.plan import options_of

CALIBRATION = 24
"""Batches of training that show an adapter what its kernel meets, if it asks."""


@dataclass(frozen=True)
class Training:
    """What is trained: a model whole, adapters or roundings of it; and perhaps beside a teacher.

    Attributes:
      model: what steps are taken with.
      loss: of its outputs.
      variables: what it begins with.
      judged: the model that is evaluated.
      plain: what that takes, of variables of training.
      tuned: what is saved, of variables of training.
      batches: what it learns from, by step.
      frozen: the third collection of variables; None without one.
      answers: of a teacher who was asked once, for all rows.
      share: of all numbers, those that are trained.
      left: kernels that adapters do not fit, in words.
      codes: a variant's parameters, report and transform, of variables of training; None without.
    """

    model: Model
    loss: Loss
    variables: Any
    judged: Model
    plain: Callable[[Any], Any]
    tuned: Callable[[Any], hub.Loaded]
    batches: data.Batches
    frozen: Any = None
    answers: np.ndarray | None = None
    share: float = 1.0
    left: tuple[str, ...] = ()
    codes: Callable[[Any], tuple[Any, Report, Transform]] | None = None

    def step(self, tx: Optimizer, recipe: Finetune, mesh: Mesh, rules: Rules) -> Callable[..., Any]:
        """`(state, batch) -> (state, metrics)`, compiled."""
        step = make_step(
            self.model, self.loss, tx, mesh=mesh, rules=rules, precision=recipe.precision,
            accumulate=recipe.accumulate, seed=recipe.seed, compiler_options=options_of(mesh),
        )  # fmt: skip
        return step if self.frozen is None else partial(step, frozen=self.frozen)


def begin(
    recipe: Finetune, loaded: hub.Loaded, task: Task, processor: Processor, rows: AnyRows,
    change: Change | None, mesh: Mesh, rules: Rules,
) -> Training:  # fmt: skip
    """What a recipe trains, and on what.

    Args:
      recipe: says which.
      loaded: the model that it begins with.
      task: of its loss.
      processor, rows, change: of the training data.
      mesh, rules: where all lies.

    Raises:
      FwError: no kernel takes adapters, or a teacher is there not, or of other classes or inputs.
    """
    batches = data.Batches(rows.arrays, recipe.batch, recipe.seed, change)
    if recipe.lora:
        return _adapters(recipe, loaded, task, processor, batches, mesh, rules)
    whole = _rounded if recipe.qat else _whole
    training = whole(recipe, loaded, task, processor, batches, mesh, rules)
    if recipe.teacher:
        return _student(recipe, training, task, processor, rows, mesh, rules)
    return training


def _whole(
    recipe: Finetune, loaded: hub.Loaded, task: Task, processor: Processor, batches: data.Batches,
    mesh: Mesh, rules: Rules,
) -> Training:  # fmt: skip
    model = processor.adapt(loaded.model)
    return Training(
        model, task.loss, loaded.variables, model, lambda own: own,
        lambda own: replace(loaded, variables=own), batches,
    )  # fmt: skip


def _rounded(
    recipe: Finetune, loaded: hub.Loaded, task: Task, processor: Processor, batches: data.Batches,
    mesh: Mesh, rules: Rules,
) -> Training:  # fmt: skip
    plain = processor.adapt(loaded.model)
    learning = learned(plain, loaded.variables["params"], recipe.qat)
    where = shardings(learning.model.axes["params"], learning.params, mesh, rules)
    variables = {**loaded.variables, "params": jax.device_put(learning.params, where)}
    # Neither holds the floats that it began with: a step is donated them.
    bare, learning = replace(loaded, variables={}), replace(learning, params={})

    def hard(own: Any) -> Any:
        return {**own, "params": learning.harden(own["params"])[0]}

    return Training(
        learning.model, task.loss, variables, replace(plain, apply=compress.apply(plain.apply)),
        hard, lambda own: replace(bare, variables=hard(own)), batches,
        codes=lambda own: (*learning.harden(own["params"]), learning.harder),
    )  # fmt: skip


def _adapters(
    recipe: Finetune, loaded: hub.Loaded, task: Task, processor: Processor, batches: data.Batches,
    mesh: Mesh, rules: Rules,
) -> Training:  # fmt: skip
    adapted = _adapt(loaded, recipe, processor, batches, mesh, rules)
    model, variables = processor.adapt(adapted.trained.model), adapted.trained.variables
    _try(model, adapted, put(batches(0), mesh, rules), mesh, rules)
    return Training(
        model, task.loss, variables, model, adapted.whole, adapted.tuned, batches, adapted.frozen,
        share=adapted.share, left=adapted.left,
    )  # fmt: skip


def _student(
    recipe: Finetune, own: Training, task: Task, processor: Processor, rows: AnyRows, mesh: Mesh,
    rules: Rules,
) -> Training:  # fmt: skip
    """What is trained anyhow, beside a teacher."""
    whole = recipe.computed(mesh)["microbatches"] == stages_of(mesh) == 1
    if (recipe.teacher_hidden or recipe.teacher_attention) and not whole:
        raise FwError(
            "teacher_hidden and teacher_attention are of layers that see a batch whole; leave "
            f"microbatches, {PIPE} in the mesh, or them away"
        )
    batches, told = own.batches, None
    if recipe.offline:
        told = _answered(recipe, processor, rows, task.labels, mesh, rules)
        batches = replace(batches, arrays={**batches.arrays, ANSWERS: told})
        frozen, asked = own.frozen, own.model
    else:
        teacher = _teacher(recipe, processor, rows, task.labels, mesh, rules)
        frozen, asked = teacher.variables, processor.adapt(teacher.model)
    taught = distilled(
        own.model, asked, task.loss, recipe.lessons, soft=SOFT.get(recipe.task),
        causal=recipe.task == "lm", heard=_heard(rows), example=own.batches.example,
    )  # fmt: skip
    codes, variables = own.codes, _projected(taught, own.variables, recipe.seed, mesh, rules)
    # Refuses now what the first step would, after the run's folder is made.
    batch, asked_of = put(batches(0), mesh, rules), {} if told is not None else {FROZEN: frozen}
    with scope(mesh, rules):
        jax.eval_shape(taught.model.apply, {**variables, **asked_of}, batch)
    return replace(
        own, model=taught.model, loss=taught.loss, batches=batches, frozen=frozen, answers=told,
        variables=variables,
        plain=lambda variables: own.plain(taught.student(variables)),
        tuned=lambda variables: own.tuned(taught.student(variables)),
        codes=codes and (lambda variables: codes(taught.student(variables))),
    )  # fmt: skip


def _heard(rows: AnyRows) -> float:
    """How often a teacher is heard for each label."""
    taught = rows.arrays.get(TAUGHT)
    if taught is None:
        return 1.0
    return float(np.sum(taught)) / max(int(np.sum(rows.arrays["labels"] != IGNORE)), 1)


def _projected(taught: Taught, variables: Any, seed: int, mesh: Mesh, rules: Rules) -> Any:
    """A student's variables, and projections where the mesh has them."""

    def new(key: jax.Array) -> Any:
        return taught.variables({"params": {}}, key)["params"]

    key = jax.random.fold_in(jax.random.key(seed), 1)
    if not (shapes := jax.eval_shape(new, key)):
        return variables
    whole = {**variables["params"], **shapes}
    where = shardings(taught.model.axes["params"], whole, mesh, rules)
    made = jax.jit(new, out_shardings={name: where[name] for name in shapes})(key)
    return {**variables, "params": {**variables["params"], **made}}


def _teacher(
    recipe: Finetune, own: Processor, rows: AnyRows, labels: tuple[str, ...], mesh: Mesh,
    rules: Rules,
) -> hub.Loaded:  # fmt: skip
    """The model that teaches, beside the student, whose processor is `own`."""
    folder = Path(recipe.teacher)
    folder = folder / run.MODEL if (folder / run.MODEL).is_dir() else assets.fetch(recipe.teacher)
    where = {"mesh": mesh, "rules": rules, **recipe.computed(mesh)}
    try:
        teacher = hub.load(folder, task=recipe.long_task, **where)
    except FwError as error:
        raise FwError(f"{error}: as a teacher, a finished run of this task or its model") from error
    if teacher.fresh or teacher.labels != labels:
        raise FwError(
            f"{folder}: its classes are {shown(teacher.labels)}, those of the data "
            f"{shown(labels)}; a teacher knows the same, in this order"
        )
    if not _alike(folder, own.load(folder, asdict(recipe)), own):
        what = "tokens" if isinstance(own, Text) else "inputs"
        raise FwError(f"{folder}: its {what} are others than the model's; both read the same")
    try:
        own.check(recipe, {"train": rows}, teacher.model.config)
    except FwError as error:
        raise FwError(f"the teacher, {folder}, does not fit: {error}") from error
    return teacher


def _alike(folder: Path, theirs: Processor, ours: Processor) -> bool:
    """Whether two make the same arrays of the same things; theirs is in a folder."""
    if isinstance(theirs, Text) and isinstance(ours, Text):
        return theirs.tokenizer.fast.get_vocab() == ours.tokenizer.fast.get_vocab()
    if theirs.notes() != ours.notes():
        return False
    same = True
    with tempfile.TemporaryDirectory() as own:
        ours.save(Path(own))
        if is_writer():  # no other process saves
            files = [(folder / name, Path(own) / name) for name in ours.files]
            same = all(a.is_file() and a.read_bytes() == b.read_bytes() for a, b in files)
    if jax.process_count() > 1:
        same = bool(multihost_utils.broadcast_one_to_all(np.int32(same)))
    return same


def _answered(
    recipe: Finetune, processor: Processor, rows: AnyRows, labels: tuple[str, ...], mesh: Mesh,
    rules: Rules,
) -> np.ndarray:  # fmt: skip
    """A teacher's answers to all rows: from a file, or asked for now."""
    if not recipe.teacher_offline:
        return answers.read(Path(recipe.teacher), rows, labels)
    kept = Path(recipe.run) / answers.FILE
    if kept.exists():  # of the same run: it goes on
        return answers.read(kept, rows, labels)
    loaded, progress = _teacher(recipe, processor, rows, labels, mesh, rules), Progress(rows.rows)
    model = processor.adapt(loaded.model)
    try:
        return answers.ask(
            forward(model, recipe.precision), loaded.variables, rows, size=recipe.batch,
            mesh=mesh, rules=rules, say=lambda done, of, left: progress.line(
                f"the teacher answers: {done}/{of} rows", left
            ),
        )  # fmt: skip
    finally:
        progress.close()


def _adapt(
    loaded: hub.Loaded, recipe: Finetune, processor: Processor, batches: data.Batches, mesh: Mesh,
    rules: Rules,
) -> Adapted:  # fmt: skip
    """Adapters, which begin with what their kernels meet if the recipe says so."""
    model = processor.adapt(loaded.model)

    def apply(params: Any, batch: Any) -> Any:
        return model.apply({**loaded.variables, "params": params}, batch)[0]

    placed = (put(batches(step), mesh, rules) for step in range(CALIBRATION))
    try:
        with scope(mesh, rules):
            stats = calibrated(transform(loaded, recipe), apply, loaded.variables["params"], placed)
    except ValueError as error:
        raise FwError(f"lora: {str(error).removeprefix('lora: ')}") from error
    return adapt(loaded, recipe, seed=recipe.seed, stats=stats)


def _try(model: Model, adapted: Adapted, batch: Any, mesh: Mesh, rules: Rules) -> None:
    """Traces the adapted function once, before the run's folder is made.

    Raises:
      FwError: it does with a kernel what no rule of `compress` knows, or PEFT has no file for what
        is trained.
    """
    hub.detach(adapted.tuned(adapted.trained.variables))
    try:
        with scope(mesh, rules):
            jax.eval_shape(model.apply, adapted.whole(adapted.trained.variables), batch)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise FwError(f"lora: the model cannot be adapted on this mesh: {error}") from error
