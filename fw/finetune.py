"""Fine-tuning from end to end: a pretrained folder and a data set become a run folder.

`Finetune` is the whole recipe as data; `finetune` reads, packs, trains, evaluates and writes. What
it does is in the order of the flow, each line a function of the public API, so this file is also
the example to copy where a recipe does not fit.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fw import assets, data, hub, precision, report, run
from fw.checkpoint import Checkpoints
from fw.data import Packed
from fw.errors import FwError
from fw.evaluate import evaluate, make_counter
from fw.optimizer import AdamW, learning_rate, optimizer
from fw.step import initial_state, make_step
from fw.tasks import Summary, Task, make_task
from fw.train import Progress, train
from sharding import Rules, make_mesh
from sharding import rules as make_rules

TASKS = {"ner": "token_classification", "classify": "sequence_classification"}


@dataclasses.dataclass(frozen=True)
class Finetune(AdamW):
    """The recipe of a fine-tuning run; every field is an option of `fw finetune`.

    Attributes:
      task: "ner" (a tag for each word) or "classify" (a class for each text).
      model: a name of `fw fetch --list`, or a Hugging Face model folder.
      data: a file, or a folder with train, dev and test files (CoNLL, CSV, TSV, JSON lines), or a
        name of `fw fetch --list`.
      run: the run's folder, made by it.
      epochs: passes over the training data.
      steps: optimiser steps; 0 for as many as the epochs take.
      batch: rows a step; a packed row holds several texts.
      length: tokens a row.
      packed: several texts share a row, none sees another; off: one text a row.
      texts: texts a row may hold; 0 for length / 8.
      mesh: devices by axis, as in data=2,fsdp=2,tensor=2; one size may be -1.
      rules: preset that says which array axis goes to which mesh axis: data, fsdp, fsdp_tensor.
      precision: of the dots: bf16 (bfloat16 operands, float32 sums) or f32.
      accumulate: microbatches whose gradients make one step.
      seed: of the new head, the order of the data and dropout.
      evaluate_every: steps between evaluations and checkpoints; 0 for once an epoch.
      log_every: steps between lines of progress.
      keep_last: how many of the latest checkpoints stay.
      keep_best: how many of the best checkpoints stay.
      columns: names of input and target column, as in text,label; for tables and JSON lines.
      scheme: of the tags in the files: auto, bio or iob1.
      skip_bad_rows: count rows that cannot be read instead of stopping at the first.
    """

    task: str = "ner"
    model: str = "all-MiniLM-L6-v2"
    data: str = ""
    run: str = "runs/latest"
    epochs: float = 3.0
    steps: int = 0
    batch: int = 8
    length: int = 128
    packed: bool = True
    texts: int = 0
    mesh: str = "data=1"
    rules: str = "fsdp_tensor"
    precision: str = "bf16"
    accumulate: int = 1
    seed: int = 0
    evaluate_every: int = 0
    log_every: int = 10
    keep_last: int = 1
    keep_best: int = 1
    columns: str = ""
    scheme: str = "auto"
    skip_bad_rows: bool = False

    def __post_init__(self):
        """Checks what can be checked before anything is read."""
        super().__post_init__()
        if self.task not in TASKS:
            raise FwError(f"task {self.task!r} is unknown; choose one of {', '.join(TASKS)}")
        if not self.data:
            raise FwError("data is missing; give --data a file or a folder")
        precision.policy(self.precision)
        for name in ("batch", "length", "accumulate", "log_every", "keep_last", "keep_best"):
            if getattr(self, name) < 1:
                raise FwError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.columns and self.columns.count(",") != 1:
            raise FwError(f"columns is {self.columns!r}; expected two names, as in text,label")


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set ready for a model: records, and their rows, by split."""

    records: Mapping[str, list]
    rows: Mapping[str, Packed]
    labels: tuple[str, ...]
    skipped: tuple[str, ...]
    cut: int


def finetune(recipe: Finetune, *, resume: bool = False) -> Path:
    """Runs a recipe and returns the run's folder.

    Args:
      recipe: what to do.
      resume: go on from the last checkpoint of `recipe.run`; the parameters become bit for bit
        those of a run that was never interrupted. The mesh may be another one.

    Raises:
      FwError: bad input; nothing that was there is lost.
    """
    began = time.perf_counter()
    mesh, rules = make_mesh(recipe.mesh), make_rules(recipe.rules)
    source, dataset = assets.fetch(recipe.model), assets.fetch(recipe.data)
    prepared = prepare(recipe, dataset, source)
    task = make_task(TASKS[recipe.task], prepared.labels)
    loaded = hub.load(
        source, task=task.name, labels=task.labels, mesh=mesh, rules=rules,
        key=jax.random.key(recipe.seed),
    )  # fmt: skip
    batches = data.Batches(prepared.rows["train"].arrays, recipe.batch, recipe.seed)
    steps = recipe.steps or max(1, round(recipe.epochs * batches.steps_per_epoch))
    every = recipe.evaluate_every or min(batches.steps_per_epoch, steps)

    settings = {
        **dataclasses.asdict(recipe),
        "labels": list(task.labels), "steps": steps, "evaluate_every": every,
        "new_parameters": list(loaded.fresh), "unused_tensors": list(loaded.unused),
        "skipped_rows": len(prepared.skipped), "cut_tokens": prepared.cut,
    }  # fmt: skip
    folder = Path(recipe.run)
    if resume:
        _same_recipe(folder, settings)
    else:
        run.create(folder, settings)
    progress = Progress(steps)
    _announce(progress, prepared, loaded, batches.steps_per_epoch, recipe)

    tx = optimizer(recipe, steps)
    step = make_step(
        loaded.model, task.loss, tx, mesh=mesh, rules=rules, precision=recipe.precision,
        accumulate=recipe.accumulate, seed=recipe.seed,
    )  # fmt: skip
    state = initial_state(loaded.variables, tx, mesh)
    counter = make_counter(forward(loaded.model, recipe.precision), task)

    def score(variables: Any, split: str) -> Summary:
        rows = prepared.rows[split]
        return evaluate(
            counter, variables, rows, task, size=recipe.batch, mesh=mesh, rules=rules
        )

    metric = "f1" if recipe.task == "ner" else "macro_f1"
    with Checkpoints(
        folder / "checkpoints", metric=metric, keep_last=recipe.keep_last,
        keep_best=recipe.keep_best,
    ) as checkpoints:  # fmt: skip
        if resume:
            if checkpoints.latest is not None:
                state = checkpoints.restore(state, checkpoints.latest)
            run.trim(folder, int(state.step) + 1)
            progress.say(f"resumed at step {int(state.step)}")
        ready = time.perf_counter()
        state = train(
            folder, state, step, batches, steps=steps, evaluate=lambda v: score(v, "dev"),
            checkpoints=checkpoints, mesh=mesh, rules=rules,
            learning_rate=learning_rate(recipe, steps), evaluate_every=every,
            log_every=recipe.log_every,
        )  # fmt: skip
        trained = time.perf_counter()
        checkpoints.wait()
        best = checkpoints.best
        kept = checkpoints.restore(state, best)
        kept_steps = checkpoints.steps()
    hub.save(
        folder / "model", dataclasses.replace(loaded, variables=kept.variables),
        tokenizer_from=source,
    )  # fmt: skip
    summaries = {s: score(kept.variables, s) for s in ("dev", "test") if s in prepared.rows}
    for split, summary in summaries.items():
        progress.say(f"\n{split}, step {best}\n{summary.text}")
    run.write_json(
        folder / "result.json",
        {
            "task": recipe.task,
            "splits": {s: dict(summary.figures) for s, summary in summaries.items()},
            "best_step": best,
            "checkpoints": kept_steps,
            "stages": {
                "prepare": ready - began,
                "train": trained - ready,
                "evaluate": time.perf_counter() - trained,
            },
        },
    )
    report.write(folder)
    return folder


def forward(model: hub.Model, precision_name: str):
    """`(variables, batch) -> logits` of a model, for evaluation."""
    apply = precision.apply(model.apply, precision_name)
    return lambda variables, batch: apply(variables, batch)[0]


def prepare(recipe: Finetune, dataset: Path, source: Path, labels: tuple[str, ...] = ()) -> Data:
    """Reads, encodes and packs a data set for a model.

    Args:
      recipe: how.
      dataset: a file or folder.
      source: the model folder, for its tokenizer.
      labels: the classes by id; those of the training data if empty.
    """
    skipped: list[str] = []
    records = data.load_splits(
        dataset, TASKS[recipe.task], scheme=recipe.scheme,
        columns=tuple(recipe.columns.split(",")) if recipe.columns else None,
        on_bad_row=skipped.append if recipe.skip_bad_rows else None,
    )  # fmt: skip
    if "dev" not in records:
        records["train"], records["dev"] = data.hold_out(records["train"])
    labels = labels or data.label_names(records["train"])
    tokenizer = data.load_tokenizer(source)
    encode = data.encode_tagged if recipe.task == "ner" else data.encode_labelled
    encoded = {
        split: encode(tokenizer, items, labels, max_length=recipe.length)
        for split, items in records.items()
    }
    rows = {
        split: data.pack(
            pieces, recipe.length, max_texts=recipe.texts or None, packed=recipe.packed
        )
        for split, pieces in encoded.items()
    }
    cut = sum(pieces.cut for pieces in encoded.values())
    return Data(records, rows, labels, tuple(skipped), cut)


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


def _same_recipe(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses to go on with a recipe that would not have led here; the mesh may change."""
    before = run.config(folder)
    free = ("run", "mesh", "rules", "log_every", "keep_last", "keep_best")
    for name, value in settings.items():
        if name not in free and before.get(name) != value:
            raise FwError(
                f"{folder}/config.json: {name} was {before.get(name)!r} and is now {value!r}; "
                "resume with the options the run began with, or start a new run"
            )
