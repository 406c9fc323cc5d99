"""The stages after training, each a function from a run folder to more in it.

`evaluate_run`, `compress_run` and `export_run` read the run's `model/`, never a checkpoint, so
they run anywhere the folder is copied to. `fw eval`, `fw compress` and `fw export` are these
functions; `fw.compare` times what they leave.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import compress
from fw import export, hub, run
from fw.compare import compare, sizes
from fw.data.files import OnBadRow
from fw.data.rows import AnyRows
from fw.errors import FwError
from fw.evaluate import Forward, count, make_counter
from fw.export.save import replacing
from fw.finetune import MODEL, forward, record
from fw.hub.files import WEIGHTS
from fw.metrics import merge
from fw.model import Model
from fw.models.stack_layout import default_microbatches, relayout
from fw.processors import Processor, processor_of
from fw.recipe import Finetune, locate, read_recipe
from fw.tasks import Summary, Task
from fw.tensors import read_tensors, write_tensors
from sharding import Rules, gather, make_mesh
from sharding import rules as make_rules

VARIANTS = ("f32", "bf16", "int8")
QUALITY = ("accuracy", "micro_f1", "exact_match", "mse", "spearman", "perplexity")
"""Figures of a summary that a table of variants or domains shows beside the task's own metric."""

INT8, REPORT = "int8", "report.json"
"""The folder in a run with its compressed parameters, and in it what compressing them cost."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A finished run on a mesh.

    Attributes:
      folder: the run.
      recipe: what it was made by.
      loaded: its best model, on the mesh.
      processor: of that model.
      task: over the model's labels.
      mesh, rules: where the model and batches go.
    """

    folder: Path
    recipe: Finetune
    loaded: hub.Loaded
    processor: Processor
    task: Task
    mesh: Mesh
    rules: Rules

    @property
    def model(self) -> Model:
        """The model as rows want it."""
        return self.processor.adapt(self.loaded.model)


def open_run(folder: str | Path, mesh: str = "data=1") -> Opened:
    """Loads the best model of a run onto a mesh.

    Args:
      folder: the run.
      mesh: devices by axis; need not be that of the training.

    Raises:
      FwError: no run there, or its training has not ended.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    if not (folder / MODEL).is_dir():
        raise FwError(f"{folder / MODEL}: not there yet; finish the run with --resume first")
    where, rules = make_mesh(mesh), make_rules(recipe.rules)
    parts = default_microbatches(where)
    loaded = hub.load(folder / MODEL, mesh=where, rules=rules, microbatches=parts)
    kind = processor_of(recipe.long_task)
    processor = kind.load(folder / MODEL, dataclasses.asdict(recipe))
    task = processor.task(recipe, loaded.labels)
    return Opened(folder, recipe, loaded, processor, task, where, rules)


def variant(opened: Opened, name: str) -> tuple[Any, Forward]:
    """A run's model as "f32", "bf16" or "int8": its variables, and the function for them.

    Raises:
      FwError: another name, int8 before `compress_run`, or a damaged file of it.
    """
    model, variables = opened.model, opened.loaded.variables
    if name not in VARIANTS:
        raise FwError(f"variant {name!r} is unknown; choose one of {', '.join(VARIANTS)}")
    if name != INT8:
        return variables, forward(model, name)
    path = opened.folder / INT8 / WEIGHTS
    if not path.is_file():
        raise FwError(f"{path}: not there; make it with: fw compress {opened.folder}")
    shapes = jax.eval_shape(lambda p: compress.quantize(p)[0], variables["params"])
    where = compress.specs(shapes, jax.tree.map(lambda x: x.sharding, variables["params"]))
    try:
        arrays = relayout(read_tensors(path), compress.to_arrays(shapes))
        host = compress.from_arrays(arrays, like=shapes)
    except ValueError as error:
        raise FwError(f"{path}: {error}; make it again with: fw compress") from error
    return {**variables, "params": jax.device_put(host, where)}, forward(_compressed(model), "f32")


def _compressed(model: Model) -> Model:
    return dataclasses.replace(model, apply=compress.apply(model.apply))


def evaluate_run(
    folder: str | Path,
    split: str = "test",
    *,
    name: str = "f32",
    mesh: str = "data=1",
    data: str = "",
) -> Summary:
    """Evaluates a variant of a run on a split of its data, and by domain where records have one.

    Writes the split's figures to `result.json` if the variant is "f32".

    Args:
      folder: the run.
      split: "train", "dev" or "test".
      name: "f32", "bf16" or "int8" (after `compress_run`).
      mesh: devices by axis.
      data: where the run's data is now, if it has moved.

    Raises:
      FwError: as `open_run` and `variant` do; the data or the split is not there.
    """
    opened = open_run(folder, mesh)
    return _evaluate(opened, split, name, _rows_by_domain(opened, split, data))


def _evaluate(
    opened: Opened, split: str, name: str, rows_by_domain: Mapping[str, AnyRows]
) -> Summary:
    task = opened.task
    variables, fn = variant(opened, name)
    counter = make_counter(fn, task)
    where = {"size": opened.recipe.batch, "mesh": opened.mesh, "rules": opened.rules}
    counts = {d: count(counter, variables, rows, **where) for d, rows in rows_by_domain.items()}
    summary = task.summarise(merge(*counts.values()))
    figures = dict(summary.figures)
    if len(counts) > 1:
        by_domain = {domain: task.summarise(c) for domain, c in counts.items()}
        figures["domains"] = {d: dict(s.figures) for d, s in by_domain.items()}
        lines = [
            f"{d:<12} " + "  ".join(f"{name} {value:.4f}" for name, value in _quality(s).items())
            for d, s in by_domain.items()
        ]
        summary = Summary(summary.metric, figures, "\n".join([summary.text, "", *lines]))
    if name == "f32":
        record(opened.folder, {"splits": {split: figures}})
    return summary


def _rows_by_domain(opened: Opened, split: str, moved: str = "") -> dict[str, AnyRows]:
    recipe, processor = opened.recipe, opened.processor
    try:
        records, _ = processor.read(recipe, locate(moved or recipe.data))
    except FwError as error:
        hint = "" if moved else f"; if the data of {opened.folder} has moved, give --data"
        raise FwError(f"{error}{hint}") from error
    if split not in records:
        raise FwError(
            f"{moved or recipe.data}: has no {processor.item}s for {split}; it has "
            f"{', '.join(records)}"
        )
    groups: dict[str, Any] = {}
    if isinstance(records[split], list):
        for item in records[split]:
            groups.setdefault(getattr(item, "domain", ""), []).append(item)
    else:
        groups[""] = records[split]
    return {
        domain: processor.rows(
            recipe, group, opened.task.labels, learn=False, on_bad_row=_ignore(recipe)
        )[0]
        for domain, group in sorted(groups.items())
    }


def _one_process(command: str) -> None:
    """Refuses a stage that writes files which several processes would write over each other."""
    if jax.process_count() > 1:
        raise FwError(f"fw {command} is work for one process; start it without mpirun or srun")


def _ignore(recipe: Finetune) -> OnBadRow:
    """Training has told of bad rows."""
    return (lambda _: None) if recipe.skip_bad_rows else None


def compress_run(
    folder: str | Path, *, split: str = "dev", mesh: str = "data=1", data: str = ""
) -> str:
    """Makes the int8 variant of a run and says what it cost.

    Writes `RUN/int8/model.safetensors` and `report.json` (bytes and error of every leaf), and both
    variants' sizes and figures to `result.json`.

    Args:
      folder: the run.
      split: what it is evaluated on, before and after.
      mesh: devices by axis.
      data: where the run's data is now, if it has moved.

    Returns:
      Lines for the terminal: bytes, error, quality before and after on `split`.

    Raises:
      FwError: as `evaluate_run` does, or the folder cannot be written; what was there stays.
    """
    _one_process("compress")
    opened = open_run(folder, mesh)
    params = opened.loaded.variables["params"]
    with replacing(opened.folder / INT8) as part:
        rows_by_domain = _rows_by_domain(opened, split, data)
        try:
            small, leaves = compress.quantize(params)
        except ValueError as error:  # none of its parameters is a kernel
            raise FwError(f"{opened.folder / MODEL}: nothing to make int8 of: {error}") from error
        arrays = {n: compress.to_arrays(gather(p)) for n, p in (("f32", params), (INT8, small))}
        write_tensors(part / WEIGHTS, arrays[INT8])
        cost = [{**dataclasses.asdict(leaf), "error": float(leaf.error)} for leaf in leaves]
        run.write_json(part / REPORT, {"recipe": {"quantize": INT8}, "leaves": cost})

    changed = [leaf for leaf in leaves if leaf.bytes_after != leaf.bytes_before]
    before, after = (sum(getattr(r, f"bytes_{k}") for r in changed) for k in ("before", "after"))
    worst = max(float(leaf.error) for leaf in changed)
    shrunk = f"{before / 1e6:.2f} MB → {after / 1e6:.2f} MB ({after / before:.3f})"
    lines = [f"{len(changed)} kernels: {shrunk}, largest relative error {worst:.4f}"]
    variants = []
    for name, tensors in arrays.items():
        summary = _evaluate(opened, split, name, rows_by_domain)
        lines.append(f"{name:<5} {split} {summary.metric} {summary.value:.4f}")
        variants.append({"name": name, **sizes(tensors), **_quality(summary), "split": split})
    record(opened.folder, {"variants": variants})
    return "\n".join(lines)


def export_run(folder: str | Path, *, name: str = "f32", output: str | Path | None = None) -> Path:
    """Writes a variant of a run as an artifact; see `fw.export.save`.

    Args:
      folder: the run.
      name: "f32", "bf16" or "int8" (after `compress_run`).
      output: where to; None for `RUN/artifact`.

    Returns:
      The artifact's folder.

    Raises:
      FwError: as `open_run`, `variant` and `fw.export.save` do.
    """
    _one_process("export")
    opened = open_run(folder)
    variables, fn = variant(opened, name)
    model, variables = opened.processor.exported(opened.loaded.model, variables, fn)
    return export.save(
        Path(output) if output else opened.folder / run.ARTIFACT,
        model=model,
        variables=variables,
        task=opened.task.name,
        labels=opened.task.labels,
        processor=opened.processor,
        precision="f32" if name == INT8 else name,
        report=_read_report(opened.folder / INT8 / REPORT) if name == INT8 else (),
        provenance={**run.config(opened.folder), "run": opened.folder.name},
    )


def _read_report(path: Path) -> list[compress.Record]:
    report = run.read_json(path)
    try:
        return [compress.Record(**{**r, "shape": tuple(r["shape"])}) for r in report["leaves"]]
    except (KeyError, TypeError) as error:
        raise FwError(f"{path}: not what fw compress writes ({error}); run it again") from error


def _quality(summary: Summary) -> dict[str, float]:
    names = dict.fromkeys((summary.metric, *QUALITY))
    return {name: summary.figures[name] for name in names if name in summary.figures}


def summary_rows(
    folder: str | Path, artifacts: Mapping[str, str | Path], *, split: str = "test"
) -> list[dict[str, Any]]:
    """The table of a run: size, latency and quality of each variant; kept in `result.json`.

    Args:
      folder: the run.
      artifacts: their folders by variant.
      split: what the quality is measured on.

    Returns:
      The rows of `compare` with the task's metric, and what it has of `QUALITY`.

    Raises:
      FwError: as `compare` and `evaluate_run` do.
    """
    opened = open_run(folder)
    rows_by_domain = _rows_by_domain(opened, split)
    rows = [
        {**row, **_quality(_evaluate(opened, split, row["name"], rows_by_domain)), "split": split}
        for row in compare(artifacts)
    ]
    record(opened.folder, {"variants": rows})
    return rows
