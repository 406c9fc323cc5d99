"""Fine-tuning from end to end: a pretrained folder and a data set become a run folder.

`fw.recipe.Finetune` is the whole recipe as data; `finetune` reads, packs, trains, evaluates and
writes. What it does is in the order of the flow, each line a function of the public API, so this
file is also the example to copy where a recipe does not fit.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

from fw import assets, data, hub, precision, report, run
from fw.checkpoint import Checkpoints
from fw.data import Packed
from fw.errors import FwError
from fw.evaluate import Forward, evaluate, make_counter
from fw.json_files import is_writer
from fw.model import Model
from fw.optimizer import learning_rate, optimizer
from fw.recipe import TASKS, Finetune, locate
from fw.step import initial_state, make_step
from fw.tasks import Summary, make_task
from fw.train import Progress, train
from sharding import make_mesh, put
from sharding import rules as make_rules

MODEL = "model"
"""The folder in a run with its best parameters, as Hugging Face transformers reads it."""

# What a resumed run may do differently: none of it changes a number but in its last digits.
MAY_CHANGE = ("run", "mesh", "rules", "remat", "log_every", "keep_last", "keep_best")


@dataclass(frozen=True)
class Data:
    """A data set ready for a model.

    Attributes:
      records: by split.
      rows: the same, packed.
      labels: the classes by id.
      skipped: the messages of the rows that could not be read.
      cut: tokens that were too many for their text's row.
      change: what is done to the rows of a training step; None for most tasks.
    """

    records: Mapping[str, Sequence]
    rows: Mapping[str, Packed]
    labels: tuple[str, ...]
    skipped: tuple[str, ...]
    cut: int
    change: data.Masking | None = None


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
    source, dataset = assets.fetch(recipe.model), locate(recipe.data)
    prepared = prepare(recipe, dataset, source)
    task = make_task(TASKS[recipe.task], prepared.labels)
    loaded = hub.load(
        source, task=task.name, labels=task.labels, mesh=mesh, rules=rules,
        key=jax.random.key(recipe.seed), **computed,
    )  # fmt: skip
    _check_fit(recipe, prepared, loaded.model.config)
    batches = data.Batches(
        prepared.rows["train"].arrays, recipe.batch, recipe.seed, prepared.change
    )
    steps = recipe.steps or max(1, round(recipe.epochs * batches.steps_per_epoch))
    every = recipe.evaluate_every or min(batches.steps_per_epoch, steps)

    settings = {
        **asdict(recipe),
        "labels": list(task.labels),
        "records": {split: len(items) for split, items in prepared.records.items()},
        "steps": steps, "evaluate_every": every, "microbatches": computed["microbatches"],
        "new_parameters": list(loaded.fresh), "unused_tensors": list(loaded.unused),
        "skipped_rows": len(prepared.skipped), "cut_tokens": prepared.cut,
    }  # fmt: skip
    with _alone(Path(recipe.run)):
        folder = run.create(recipe.run, settings, resume=resume, may_change=MAY_CHANGE)
        progress = Progress(steps)
        _announce(progress, prepared, loaded, batches.steps_per_epoch, recipe)

        tx = optimizer(recipe, steps)
        step = make_step(
            loaded.model, task.loss, tx, mesh=mesh, rules=rules, precision=recipe.precision,
            accumulate=recipe.accumulate, seed=recipe.seed,
        )  # fmt: skip
        state = initial_state(loaded.variables, tx, mesh)
        counter = make_counter(forward(loaded.model, recipe.precision), task)

        def score(variables: Any) -> Summary:
            rows = prepared.rows["dev"]
            return evaluate(counter, variables, rows, size=recipe.batch, mesh=mesh, rules=rules)

        with Checkpoints(
            folder / run.CHECKPOINTS, metric=task.metric, keep_last=recipe.keep_last,
            keep_best=recipe.keep_best,
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
        if is_writer():
            shutil.rmtree(folder / MODEL, ignore_errors=True)  # of an earlier end of this run
        hub.save(folder / MODEL, replace(loaded, variables=kept.variables), tokenizer_from=source)
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


def prepare(recipe: Finetune, dataset: Path, source: Path) -> Data:
    """Reads, encodes and packs a data set for a model.

    Args:
      recipe: how.
      dataset: a file or folder.
      source: the model folder, for its tokenizer.

    Raises:
      FwError: a bad row, or no text to train on or to choose the best parameters by.
    """
    records, skipped = read(recipe, dataset)
    for split in ("train", "dev"):
        if split not in records:
            raise FwError(
                f"{dataset}: no text for {split}; without files of their own, dev and test get a "
                "tenth of the texts each, by hash: give more texts, or a folder with a file for "
                f"{split}"
            )
    labels = data.label_names(records["train"])
    tokenizer = data.load_tokenizer(source)
    packed = {
        split: pack(recipe, tokenizer, items, labels, learn=split == "train")
        for split, items in records.items()
    }
    rows = {split: rows for split, (rows, _) in packed.items()}
    cut = sum(cut for _, cut in packed.values())
    change = data.FORMATS[TASKS[recipe.task]].change
    return Data(records, rows, labels, skipped, cut, change and change(tokenizer, recipe.seed))


def read(recipe: Finetune, dataset: Path) -> tuple[dict[str, list], tuple[str, ...]]:
    """The records of a data set by split, none empty, and the messages of rows left out.

    Args:
      recipe: its task, columns, scheme, separator and skip_bad_rows.
      dataset: a file or folder; where it has no dev split, a part of train becomes that.

    Raises:
      FwError: nothing there, or a bad row.
    """
    skipped: list[str] = []
    records = data.load_splits(
        dataset, TASKS[recipe.task], scheme=recipe.scheme, columns=recipe.names,
        separator=recipe.separator, on_bad_row=skipped.append if recipe.skip_bad_rows else None,
    )  # fmt: skip
    if "dev" not in records:
        records["train"], records["dev"] = data.hold_out(records["train"])
    return {split: items for split, items in records.items() if items}, tuple(skipped)


def pack(
    recipe: Finetune,
    tokenizer: data.Tokenizer,
    records: Sequence,
    labels: tuple[str, ...],
    *,
    learn: bool = False,
) -> tuple[Packed, int]:
    """The rows of some records, and how many tokens were cut off.

    Args:
      recipe: its task, length, texts and packed.
      tokenizer: the model's.
      records: of the task.
      labels: the classes by id.
      learn: rows to learn from, which are changed anew in every batch where the task wants it; off:
        to judge by, which are changed once and for all, whatever the run's seed.
    """
    encode = data.FORMATS[TASKS[recipe.task]].encode
    pieces = encode(tokenizer, records, labels, max_length=recipe.length)
    rows = data.pack(pieces, recipe.length, max_texts=recipe.texts or None, packed=recipe.packed)
    change = None if learn else data.FORMATS[TASKS[recipe.task]].change
    if change is not None and rows.rows:
        arrays = change(tokenizer, 0)(rows.arrays, np.arange(rows.rows))
        rows = replace(rows, arrays=arrays)
    return rows, pieces.cut


def _check_fit(recipe: Finetune, prepared: Data, config: Any) -> None:
    """Refuses ids and positions that the model has no row for; a lookup would take another's."""
    every = prepared.rows.values()
    positions = getattr(config, "positions", recipe.length)
    if recipe.length > positions:
        raise FwError(
            f"length is {recipe.length}, but {recipe.model} has {positions} positions; "
            f"choose {positions} or less"
        )
    types = [int(rows.arrays.get("token_type_ids", np.zeros(1)).max()) for rows in every]
    if max(types) >= getattr(config, "type_vocab_size", max(types) + 1):
        raise FwError(
            f"{recipe.model}: its tokenizer tells {max(types) + 1} types of texts apart, but the "
            f"model knows {config.type_vocab_size}; is it another model's tokenizer?"
        )
    largest = max(int(rows.arrays["input_ids"].max()) for rows in every)
    if prepared.change is not None:
        largest = max(largest, prepared.change.words - 1)
    if largest >= getattr(config, "vocab_size", largest + 1):
        raise FwError(
            f"{recipe.model}: its tokenizer gives the id {largest}, but the model's vocabulary "
            f"ends at {config.vocab_size - 1}; is it another model's tokenizer?"
        )


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


def _announce(progress: Progress, prepared: Data, loaded: Any, epoch: int, recipe: Finetune):
    rows = prepared.rows["train"]
    counts = ", ".join(f"{len(r)} {s}" for s, r in prepared.records.items())
    progress.say(
        f"{recipe.model}: {counts} records, {len(prepared.labels)} labels; {rows.rows} rows of "
        f"{recipe.length} tokens, {rows.efficiency:.1%} real; {epoch} steps an epoch of "
        f"{len(prepared.records['train']) / max(epoch, 1):.0f} texts each"
    )
    for path in loaded.fresh:
        progress.say(f"new, not in the checkpoint: {path}")
    for message in prepared.skipped[:3]:
        progress.say(f"skipped: {message}")
    if prepared.skipped:
        progress.say(f"{len(prepared.skipped)} bad rows skipped")
    if prepared.cut:
        progress.say(f"{prepared.cut} tokens cut from texts longer than {recipe.length}")
