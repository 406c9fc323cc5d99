"""Fine-tuning from end to end: a pretrained folder and a data set become a run folder.

`fw.recipe.Finetune` is the whole recipe as data; `finetune` reads, packs, trains, evaluates and
writes. What it does is in the order of the flow, each line a function of the public API, so this
file is also the example to copy where a recipe does not fit.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import jax
import numpy as np
import optax
from filelock import FileLock, Timeout
from jax.sharding import Mesh

from fw import assets, data, hub, precision, report, run
from fw.adaptation import Adapted, adapt, coded, transform
from fw.checkpoint import Checkpoints
from fw.compression import calibrated
from fw.data.rows import AnyRows
from fw.distillation import Loss, distilled
from fw.errors import FwError
from fw.evaluate import Forward, evaluate, make_counter
from fw.exchange import with_exchange
from fw.json_files import is_writer
from fw.model import Model
from fw.optimizer import learning_rate, optimizer
from fw.processors import Change, Processor, Text, processor_of
from fw.recipe import NEW, Finetune, locate
from fw.sparsity import all_gone, sparsified
from fw.step import Optimizer, initial_state, make_step
from fw.table_optimizer import row_optimizer, with_tables
from fw.tasks import Summary, Task
from fw.train import Progress, train
from sharding import Rules, make_mesh, put, scope
from sharding import rules as make_rules
from sharding.parallel.averages import workers

MODEL = "model"
"""The folder in a run with its best parameters, as transformers reads those it knows."""

CALIBRATION = 24
"""Batches of training that show an adapter what its kernel meets, if it asks."""

ADAPTER = "adapter"
"""The folder with the adapter alone, as PEFT reads it, of a run that trained one."""

# What a resumed run may do differently: none of it changes a number but in its last digits.
MAY_CHANGE = ("run", "mesh", "rules", "remat", "log_every", "keep_last", "keep_best")


@dataclass(frozen=True)
class Data:
    """A data set ready for a model.

    Attributes:
      processor: made of its records.
      records: by split.
      rows: the same as arrays, but for test.
      labels: the classes by id.
      skipped: the messages of the rows that could not be read.
      cut: tokens that were too many for their text's row.
      change: what is done to the rows of a training step; None for most tasks.
    """

    processor: Processor
    records: Mapping[str, Sequence]
    rows: Mapping[str, AnyRows]
    labels: tuple[str, ...]
    skipped: tuple[str, ...]
    cut: int
    change: Change | None = None


def finetune(recipe: Finetune, *, resume: bool = False) -> Path:
    """Runs a recipe and returns the run's folder.

    Args:
      recipe: what to do.
      resume: go on from the last checkpoint of `recipe.run`; the parameters become bit for bit
        those of a run that was never interrupted. The mesh may be another one.

    Raises:
      FwError: bad input; nothing that was there is lost.
      sharding.ShardingError: a mesh that the machine, the batch or the model does not fit.
    """
    began = time.perf_counter()
    mesh, rules = make_mesh(recipe.mesh), make_rules(recipe.rules)
    # Refuses now what the first step would, after the data is read and the run's folder is made.
    computed = recipe.computed(mesh)
    factors = {"accumulate": recipe.accumulate, "microbatches": computed["microbatches"]}
    name = " / ".join(["batch", *(factor for factor, size in factors.items() if size > 1)])
    put({name: np.zeros(recipe.batch // math.prod(factors.values()), np.int8)}, mesh, rules)
    source = None if recipe.model in NEW else assets.fetch(recipe.model)
    prepared = prepare(recipe, locate(recipe.data), source)
    processor = prepared.processor
    task = processor.task(recipe, prepared.labels)
    loaded = bring(recipe, prepared, source, mesh, rules, **computed)
    batches = data.Batches(
        prepared.rows["train"].arrays, recipe.batch, recipe.seed, prepared.change
    )
    # All of it is trained, or adapters of it.
    adapted = _adapt(loaded, recipe, processor, batches, mesh, rules) if recipe.lora else None
    learnt = loaded if adapted is None else adapted.trained
    model = processor.adapt(learnt.model)
    steps = recipe.steps or max(1, round(recipe.epochs * batches.steps_per_epoch))
    every = recipe.evaluate_every or min(batches.steps_per_epoch, steps)

    settings = {
        **asdict(recipe),
        "labels": list(task.labels),
        "records": {split: len(items) for split, items in prepared.records.items()},
        "steps": steps, "evaluate_every": every, "microbatches": computed["microbatches"],
        "new_parameters": list(loaded.fresh), "unused_tensors": list(loaded.unused),
        "skipped_rows": len(prepared.skipped), "cut_tokens": prepared.cut,
        **({} if adapted is None else {"trainable_share": adapted.share}),
    }  # fmt: skip
    tx = _optimizer(recipe, steps, model, learnt.variables["params"], mesh)
    step = _step(model, task, tx, recipe, prepared, adapted, batches, mesh, rules)
    with _alone(Path(recipe.run)):
        folder = run.create(recipe.run, settings, resume=resume, may_change=MAY_CHANGE)
        progress = Progress(steps)
        _announce(progress, prepared, loaded, batches.steps_per_epoch, recipe, adapted)

        state = initial_state(learnt.variables, tx, mesh)
        counter = make_counter(forward(model, recipe.precision), task)

        def score(variables: Any) -> Summary:
            rows = prepared.rows["dev"]
            variables = variables if adapted is None else adapted.whole(variables)
            return evaluate(counter, variables, rows, size=recipe.batch, mesh=mesh, rules=rules)

        with Checkpoints(
            folder / run.CHECKPOINTS, metric=task.metric, keep_last=recipe.keep_last,
            keep_best=recipe.keep_best, since=all_gone(recipe, steps),
        ) as checkpoints:  # fmt: skip
            if resume:
                if checkpoints.latest is not None:
                    state = checkpoints.restore(state, checkpoints.latest)
                run.trim(folder, int(state.step) + 1)
                progress.say(f"resumed at step {int(state.step)}")
            ready = time.perf_counter()
            state = train(
                folder, state, step, batches, steps=steps, evaluate=score,
                checkpoints=checkpoints, mesh=mesh, rules=rules,
                learning_rate=learning_rate(recipe, steps), evaluate_every=every,
                log_every=recipe.log_every,
            )  # fmt: skip
            trained = time.perf_counter()
            checkpoints.wait()
            best = checkpoints.best
            kept = checkpoints.restore(state, best)
            kept_steps = checkpoints.steps()
        tuned = adapted.tuned if adapted else lambda own: replace(loaded, variables=own)
        _save(folder, tuned(kept.variables), recipe, processor, source)
        news = {
            "task": recipe.task,
            "splits": {"dev": dict(score(kept.variables).figures)},
            "best_step": best,
            "checkpoints": kept_steps,
            "stages": {"prepare": ready - began, "train": trained - ready,
                       "save": time.perf_counter() - trained},
        }  # fmt: skip
        record(folder, news)
    return folder


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


def _step(
    model: Model, task: Task, tx: Optimizer, recipe: Finetune, prepared: Data,
    adapted: Adapted | None, batches: data.Batches, mesh: Mesh, rules: Rules,
) -> Callable[..., Any]:  # fmt: skip
    """`(state, batch) -> (state, metrics)`, beside what is frozen: a base, or a teacher."""
    loss, frozen = task.loss, None
    if adapted is not None:
        _try(model, adapted, put(batches(0), mesh, rules), mesh, rules)
        frozen = adapted.frozen
    elif recipe.teacher:
        model, loss, frozen = _taught(model, task, recipe, prepared, mesh, rules)
    step = make_step(
        model, loss, tx, mesh=mesh, rules=rules, precision=recipe.precision,
        accumulate=recipe.accumulate, seed=recipe.seed,
    )  # fmt: skip
    return step if frozen is None else partial(step, frozen=frozen)


def _taught(
    student: Model, task: Task, recipe: Finetune, prepared: Data, mesh: Mesh, rules: Rules
) -> tuple[Model, Loss, Any]:
    """A model that asks its teacher, too, the loss of both, and the teacher's variables.

    Raises:
      FwError: no such teacher, or one of other classes or tokens.
    """
    folder = Path(recipe.teacher)
    folder = folder / MODEL if (folder / MODEL).is_dir() else assets.fetch(recipe.teacher)
    where = {"mesh": mesh, "rules": rules, **recipe.computed(mesh)}
    teacher = hub.load(folder, task=recipe.long_task, **where)
    if teacher.fresh or teacher.labels != task.labels:
        raise FwError(
            f"{folder}: its classes are {shown(teacher.labels)}, those of the data "
            f"{shown(task.labels)}; a teacher knows the same, in this order"
        )
    processor = prepared.processor.load(folder, asdict(recipe))
    assert isinstance(processor, Text)  # the tasks that are taught are of texts
    assert isinstance(prepared.processor, Text)
    if processor.tokenizer.fast.get_vocab() != prepared.processor.tokenizer.fast.get_vocab():
        raise FwError(f"{folder}: its tokens are others than the model's; both read the same texts")
    model, loss = distilled(
        student, processor.adapt(teacher.model), task.loss, temperature=recipe.temperature,
        weight=recipe.teacher_weight,
    )  # fmt: skip
    return model, loss, teacher.variables


def _save(
    folder: Path, tuned: hub.Loaded, recipe: Finetune, processor: Processor, source: Path | None
) -> None:
    """Writes the best model, and of a run with adapters these alone, too."""
    if is_writer():  # of an earlier end of this run
        for name in (MODEL, ADAPTER):
            shutil.rmtree(folder / name, ignore_errors=True)
    if recipe.lora:
        hub.save_adapter(folder / ADAPTER, *hub.detach(tuned, base=recipe.model))
    more = None if isinstance(processor, Text) else processor.save
    hub.save(folder / MODEL, tuned, tokenizer_from=source, more=more)


def record(folder: Path, news: Mapping[str, Any]) -> None:
    """Adds to a run's `result.json`, mapping by mapping, and draws its report again."""

    def merged(old: Any, new: Any) -> Any:
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            return new
        return {**old, **{k: merged(old.get(k), v) for k, v in new.items()}}

    path = folder / run.RESULT
    run.write_json(path, merged(run.read_json(path) if path.exists() else {}, news))
    report.write(folder)


def forward(model: Model, policy: str) -> Forward:
    """`(variables, batch) -> logits` of a model under a precision policy, for evaluation."""
    apply = precision.apply(model.apply, policy)
    return lambda variables, batch: apply(variables, batch)[0]


def prepare(recipe: Finetune, dataset: Path, source: Path | None) -> Data:
    """Reads a data set and makes rows of it.

    Those of the test are tried as well: a bad one should show before the training.

    Args:
      recipe: how.
      dataset: a file or folder.
      source: the folder of a pretrained model; None for a new one.

    Raises:
      FwError: a bad row, or nothing to train on or to choose the best parameters by.
    """
    kind = processor_of(recipe.long_task)
    records, skipped = kind.read(recipe, dataset)
    for split in ("train", "dev"):
        if split not in records:
            raise FwError(
                f"{dataset}: no {kind.item} for {split}; without files of their own, dev and test "
                f"get a tenth of the {kind.item}s each, by hash: give more {kind.item}s, or files "
                "for each split where their format has them"
            )
    processor = kind.fit(recipe, records, source)
    labels = processor.labels(records["train"])
    rows: dict[str, AnyRows] = {}
    worse: list[str] = []
    bad = worse.append if recipe.skip_bad_rows else None
    cut = 0
    for split, items in records.items():
        if split == "test":
            more = processor.try_rows(recipe, items, labels, bad)
        else:
            learn = split == "train"
            rows[split], more = processor.rows(recipe, items, labels, learn=learn, on_bad_row=bad)
        cut += more
    change = processor.change(recipe, rows["train"])
    return Data(processor, records, rows, labels, (*skipped, *worse), cut, change)


def bring(
    recipe: Finetune, prepared: Data, source: Path | None, mesh: Mesh, rules: Rules, **computed: Any
) -> hub.Loaded:
    """The model that a recipe begins with: a pretrained one with a head for the data, or a new one.

    Raises:
      FwError: a folder that is broken, a model that the data does not fit, or microbatches for one
        without stages.
      sharding.ShardingError: a mesh that it does not fit.
    """
    processor, labels = prepared.processor, prepared.labels
    key, where = jax.random.key(recipe.seed), {"mesh": mesh, "rules": rules}
    if source is None:
        config = processor.config(recipe, recipe.long_task, labels)
        loaded = hub.new(config, labels, key=key, **where, **computed)
    else:
        loaded = hub.load(
            source,
            task=recipe.long_task,
            labels=labels,
            key=key,
            become=coded(recipe),
            **where,
            **computed,
        )
    if recipe.microbatches > 1 and not hasattr(loaded.model.config, "microbatches"):
        raise FwError(f"microbatches: {recipe.model} has no layers of one kind to lay in stages")
    processor.check(recipe, prepared.rows, loaded.model.config)
    return loaded


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


def _optimizer(recipe: Finetune, steps: int, model: Model, params: Any, mesh: Mesh) -> Optimizer:
    """What a recipe trains by: its optimiser, what it prunes, and how gradients are averaged.

    Raises:
      FwError: a rule of pruning matches nothing, or does not fit, or an exchange is not for tables.
    """
    tx = optimizer(recipe, steps)
    if recipe.sparse:
        tx = optax.chain(tx, sparsified(recipe, steps))
        try:
            jax.eval_shape(tx.init, params)
        except ValueError as error:
            raise FwError(str(error)) from error
    tx = with_tables(tx, model, row_optimizer(recipe, recipe, steps))
    return with_exchange(tx, recipe.exchange, mesh)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second process from resuming a run that is going on; a killed one holds nothing."""
    if not is_writer():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise FwError(f"{folder}: another process is training this run; wait for it") from error
    except OSError as error:
        raise FwError(f"{folder}: cannot be made: {error.strerror}") from error
    with held:
        yield


def _announce(
    progress: Progress, prepared: Data, loaded: Any, epoch: int, recipe: Finetune,
    adapted: Adapted | None,
) -> None:  # fmt: skip
    processor = prepared.processor
    counts = ", ".join(f"{len(r)} {s}" for s, r in prepared.records.items())
    progress.say(
        f"{recipe.model}: {counts} records, {len(prepared.labels)} labels; "
        f"{processor.summary(recipe, prepared.rows['train'])}; {epoch} steps an epoch of "
        f"{len(prepared.records['train']) / max(epoch, 1):.0f} {processor.item}s each"
    )
    if loaded.folder is None:
        count = sum(x.size for x in jax.tree.leaves(loaded.variables["params"]))
        progress.say(f"a new {recipe.model} of {count:,} parameters")
    if recipe.exchange != "float32" and workers(make_mesh(recipe.mesh)) == 1:
        progress.say(f"exchange {recipe.exchange}: data is 1, so that no gradients are exchanged")
    if adapted is not None:
        progress.say(f"{100 * adapted.share:.2f} % of the parameters are trained")
        for message in adapted.left:
            progress.say(message)
    for path in loaded.fresh if loaded.folder is not None else ():
        progress.say(f"new, not in the checkpoint: {path}")
    for message in prepared.skipped[:3]:
        progress.say(f"skipped: {message}")
    if prepared.skipped:
        progress.say(f"{len(prepared.skipped)} bad rows skipped")
    if prepared.cut:
        progress.say(f"{prepared.cut} tokens cut from texts longer than {recipe.length}")
