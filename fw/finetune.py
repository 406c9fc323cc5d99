"""Fine-tuning from end to end: a pretrained folder and a data set become a run folder.

`fw.recipe.Finetune` is the whole recipe as data; `finetune` reads, packs, trains, evaluates and
writes. What it does is in the order of the flow, each line a function of the public API, so this
file is also the example to copy where a recipe does not fit.
"""

import math
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from filelock import FileLock, Timeout
from jax.sharding import Mesh

import compress
from compress.transform import Report, Transform
from fw import answers, assets, hub, report, run
from fw.adaptation import coded
from fw.checkpoint import Checkpoints
from fw.compression import LEARNED
from fw.data.batches import Batches
from fw.data.files import OnBadRow
from fw.data.pack import Packed
from fw.data.rows import AnyRows
from fw.data.unlabelled import UNLABELLED, heard, read_unlabelled
from fw.errors import FwError
from fw.evaluate import evaluate, forward, make_counter
from fw.exchange import with_exchange
from fw.export.save import replacing
from fw.json_files import is_writer
from fw.model import Model
from fw.optimizer import learning_rate, optimizer
from fw.planning import AUTO, planned, planned_here
from fw.processors import Change, Processor, Text, processor_of
from fw.recipe import NEW, Finetune, locate
from fw.sparsity import all_gone, sparsified
from fw.step import Optimizer, initial_state
from fw.table_optimizer import row_optimizer, with_tables
from fw.tasks import Summary
from fw.train import Progress, train
from fw.training import Training, begin
from fw.variants import COMPRESSED, fill
from sharding import Rules, gather, make_mesh, put
from sharding import rules as make_rules
from sharding.parallel.averages import workers

# What a resumed run may do differently: none of it changes a number but in its last digits.
MAY_CHANGE = ("run", "mesh", "plan", "rules", "remat", "log_every", "keep_last", "keep_best")


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
      unlabelled: texts among the rows of training that a teacher alone labels.
    """

    processor: Processor
    records: Mapping[str, Sequence]
    rows: Mapping[str, AnyRows]
    labels: tuple[str, ...]
    skipped: tuple[str, ...]
    cut: int
    change: Change | None = None
    unlabelled: int = 0


def finetune(recipe: Finetune, *, resume: bool = False, moved: Collection[str] = ()) -> Path:
    """Runs a recipe and returns the run's folder.

    Args:
      recipe: what to do.
      resume: go on from the last checkpoint of `recipe.run`; the parameters become bit for bit
        those of a run that was never interrupted. The mesh may be another one.
      moved: options that name what may be elsewhere now, the same as it was: such as "data".

    Raises:
      FwError: bad input; nothing that was there is lost.
      sharding.ShardingError: a mesh that the machine, the batch or the model does not fit.
    """
    began = time.perf_counter()
    source = None if recipe.model in NEW else assets.fetch(recipe.model)
    recipe, prepared = _planned(recipe, source, resume)
    mesh, rules = make_mesh(recipe.mesh), make_rules(recipe.rules)
    # Refuses now what the first step would, after the data is read and the run's folder is made.
    computed = recipe.computed(mesh)
    factors = {"accumulate": recipe.accumulate, "microbatches": computed["microbatches"]}
    name = " / ".join(["batch", *(factor for factor, size in factors.items() if size > 1)])
    put({name: np.zeros(recipe.batch // math.prod(factors.values()), np.int8)}, mesh, rules)
    prepared = prepared or prepare(recipe, locate(recipe.data), source)
    processor = prepared.processor
    task = processor.task(recipe, prepared.labels)
    loaded = bring(recipe, prepared, source, mesh, rules, **computed)
    training = begin(
        recipe, loaded, task, processor, prepared.rows["train"], prepared.change, mesh, rules
    )
    batches = training.batches
    steps = recipe.steps or max(1, round(recipe.epochs * batches.steps_per_epoch))
    every = recipe.evaluate_every or min(batches.steps_per_epoch, steps)

    settings = {
        **asdict(recipe),
        "labels": list(task.labels),
        "records": {split: len(items) for split, items in prepared.records.items()},
        "steps": steps, "evaluate_every": every, "microbatches": computed["microbatches"],
        "new_parameters": list(loaded.fresh), "unused_tensors": list(loaded.unused),
        "skipped_rows": len(prepared.skipped), "cut_tokens": prepared.cut,
        **({"unlabelled_texts": prepared.unlabelled} if recipe.unlabelled else {}),
        **({"trainable_share": training.share} if recipe.lora else {}),
    }  # fmt: skip
    tx = _optimizer(recipe, steps, training.model, training.variables["params"], mesh)
    step = training.step(tx, recipe, mesh, rules)
    with _alone(Path(recipe.run)):
        folder = run.create(recipe.run, settings, resume=resume, may_change=(*MAY_CHANGE, *moved))
        progress = Progress(steps)
        _announce(progress, prepared, loaded, batches.steps_per_epoch, recipe, training)
        if recipe.teacher_offline:
            answers.keep(folder, training.answers, prepared.rows["train"], task.labels)

        state = initial_state(training.variables, tx, mesh)
        counter = make_counter(forward(training.judged, recipe.precision), task)

        def score(variables: Any) -> Summary:
            rows = prepared.rows["dev"]
            plain = training.plain(variables)
            return evaluate(counter, plain, rows, size=recipe.batch, mesh=mesh, rules=rules)

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
        _save(folder, training.tuned(kept.variables), recipe, processor, source)
        if training.codes is not None:
            _save_codes(folder, recipe.qat, *training.codes(kept.variables))
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


def _save(
    folder: Path, tuned: hub.Loaded, recipe: Finetune, processor: Processor, source: Path | None
) -> None:
    """Writes the best model, and of a run with adapters these alone, too."""
    if is_writer():  # of an earlier end of this run
        for name in (run.MODEL, run.ADAPTER):
            shutil.rmtree(folder / name, ignore_errors=True)
    if recipe.lora:
        hub.save_adapter(folder / run.ADAPTER, *hub.detach(tuned, base=recipe.model))
    more = None if isinstance(processor, Text) else processor.save
    hub.save(folder / run.MODEL, tuned, tokenizer_from=source, more=more)


def _save_codes(
    folder: Path, format: str, params: Any, report: Report, transform: Transform
) -> None:
    """Writes what was learned as codes, as `fw compress` would, under a name of its own."""
    arrays = compress.to_arrays(gather(params))
    if is_writer():
        with replacing(folder / COMPRESSED / f"{format}{LEARNED}") as part:
            fill(part, arrays, report, transform)


def record(folder: Path, news: Mapping[str, Any]) -> None:
    """Adds to a run's `result.json`, mapping by mapping, and draws its report again."""

    def merged(old: Any, new: Any) -> Any:
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            return new
        return {**old, **{k: merged(old.get(k), v) for k, v in new.items()}}

    path = folder / run.RESULT
    run.write_json(path, merged(run.read_json(path) if path.exists() else {}, news))
    report.write(folder)


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
    unlabelled = _unlabelled(recipe, labels, bad) if recipe.unlabelled else ()
    cut = 0
    for split, items in records.items():
        learn = split == "train"
        if split == "test":
            more = processor.try_rows(recipe, items, labels, bad)
        elif learn and unlabelled:
            given, names = [*items, *unlabelled], (*labels, UNLABELLED)
            own, more = processor.rows(recipe, given, names, learn=True, on_bad_row=bad)
            assert isinstance(own, Packed)  # of texts
            rows[split] = heard(own, labels)
        else:
            rows[split], more = processor.rows(recipe, items, labels, learn=learn, on_bad_row=bad)
        cut += more
    change = processor.change(recipe, rows["train"])
    skipped = (*skipped, *worse)
    return Data(processor, records, rows, labels, skipped, cut, change, len(unlabelled))


def _planned(recipe: Finetune, source: Path | None, resume: bool) -> tuple[Finetune, Data | None]:
    """The recipe on the layout that its plan says; for `auto` by its data, which is read then."""
    if recipe.plan != AUTO:
        return planned(recipe), None
    prepared = prepare(recipe, locate(recipe.data), source)
    labels, rows = prepared.labels, prepared.rows["train"].arrays
    config = None
    if source is None:
        config = prepared.processor.config(recipe, recipe.long_task, labels)
    example = Batches(rows, recipe.batch, recipe.seed, prepared.change).example
    # A resumed run keeps what its numbers depend on.
    begun = resume and (Path(recipe.run) / run.CONFIG).is_file()
    old = run.config(recipe.run)["accumulate"] if begun else None
    return planned_here(recipe, config, labels, example, old), prepared


def _unlabelled(recipe: Finetune, labels: tuple[str, ...], bad: OnBadRow) -> Sequence[Any]:
    if UNLABELLED in labels:
        raise FwError(f"{recipe.data}: {UNLABELLED!r} is what has no class; rename that class")
    where, column = locate(recipe.unlabelled, "unlabelled"), (recipe.names or ("text",))[0]
    return read_unlabelled(where, recipe.long_task, column=column, on_bad_row=bad)


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
    training: Training,
) -> None:  # fmt: skip
    processor = prepared.processor
    texts = len(prepared.records["train"]) + prepared.unlabelled
    counts = ", ".join(f"{len(r)} {s}" for s, r in prepared.records.items())
    progress.say(
        f"{recipe.model}: {counts} records, {len(prepared.labels)} labels; "
        f"{processor.summary(recipe, prepared.rows['train'])}; {epoch} steps an epoch of "
        f"{texts / max(epoch, 1):.0f} {processor.item}s each"
    )
    if prepared.unlabelled:
        progress.say(f"{prepared.unlabelled} {processor.item}s more, for the teacher alone")
    if loaded.folder is None:
        count = sum(x.size for x in jax.tree.leaves(loaded.variables["params"]))
        progress.say(f"a new {recipe.model} of {count:,} parameters")
    if recipe.exchange != "float32" and workers(make_mesh(recipe.mesh)) == 1:
        progress.say(f"exchange {recipe.exchange}: data is 1, so that no gradients are exchanged")
    if recipe.lora:
        progress.say(f"{100 * training.share:.2f} % of the parameters are trained")
        for message in training.left:
            progress.say(message)
    for path in loaded.fresh if loaded.folder is not None else ():
        progress.say(f"new, not in the checkpoint: {path}")
    for message in prepared.skipped[:3]:
        progress.say(f"skipped: {message}")
    if prepared.skipped:
        progress.say(f"{len(prepared.skipped)} bad rows skipped")
    if prepared.cut:
        progress.say(f"{prepared.cut} tokens cut from texts longer than {recipe.length}")
