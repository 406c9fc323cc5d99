"""The stages after training, each a function from a run folder to more in it.

`evaluate_run`, `compress_run` and `export_run` read the run's `model/`, never a checkpoint, so
they run anywhere the folder is copied to; `compare` sets artifacts side by side. `fw eval`,
`fw compress` and `fw export` are these functions.
"""

import dataclasses
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

import compress
from fw import data, export, hub, precision, run
from fw.errors import FwError
from fw.export.tensors import read_tensors
from fw.evaluate import Forward, count, make_counter
from fw.finetune import MODEL, TASKS, Finetune, find_data, forward, record
from fw.metrics import merge
from fw.model import Model
from fw.tasks import Summary, Task, make_task
from sharding import Rules, make_mesh
from sharding import rules as make_rules

VARIANTS = ("f32", "bf16", "int8")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A finished run on a mesh."""

    folder: Path
    recipe: Finetune
    loaded: hub.Loaded
    task: Task
    mesh: Mesh
    rules: Rules


def open_run(folder: str | Path, mesh: str = "data=1") -> Opened:
    """Loads the best model of a run onto a mesh.

    Raises:
      FwError: no run there, or its training has not ended.
    """
    folder = Path(folder)
    options = run.config(folder)
    known = {field.name for field in dataclasses.fields(Finetune)}
    recipe = Finetune(**{k: v for k, v in options.items() if k in known})
    if not (folder / MODEL).is_dir():
        raise FwError(f"{folder / MODEL}: not there yet; finish the run with --resume first")
    where, rules = make_mesh(mesh), make_rules(recipe.rules)
    loaded = hub.load(folder / MODEL, mesh=where, rules=rules)
    task = make_task(TASKS[recipe.task], loaded.labels)
    return Opened(folder, recipe, loaded, task, where, rules)


def variant(opened: Opened, name: str) -> tuple[Any, Forward]:
    """A run's model as "f32", "bf16" or "int8": its variables, and the function for them.

    Raises:
      FwError: another name, or int8 before `compress_run`.
    """
    model, variables = opened.loaded.model, opened.loaded.variables
    if name not in VARIANTS:
        raise FwError(f"variant {name!r} is unknown; choose one of {', '.join(VARIANTS)}")
    if name != "int8":
        return variables, forward(model, name)
    path = opened.folder / name / "model.safetensors"
    if not path.is_file():
        raise FwError(f"{path}: not there; make it with: fw compress {opened.folder}")
    shapes = jax.eval_shape(lambda p: compress.quantize(p)[0], variables["params"])
    where = compress.specs(shapes, jax.tree.map(lambda x: x.sharding, variables["params"]))
    host = compress.from_arrays(read_tensors(path), like=shapes)
    return {**variables, "params": jax.device_put(host, where)}, forward(_compressed(model), "f32")


def _compressed(model: Model) -> Model:
    return dataclasses.replace(model, apply=compress.apply(model.apply))


def evaluate_run(
    folder: str | Path, split: str = "test", *, name: str = "f32", mesh: str = "data=1"
) -> Summary:
    """Evaluates a variant of a run on a split of its data, and by domain where records have one.

    Writes the figures to `result.json`: the split's for "f32", and the variant's row for all.
    """
    opened = open_run(folder, mesh)
    return _evaluate(opened, split, name)


def _evaluate(opened: Opened, split: str, name: str) -> Summary:
    recipe, task = opened.recipe, opened.task
    variables, fn = variant(opened, name)
    counter = make_counter(fn, task)
    counts = {}
    for domain, rows in _rows_by_domain(opened, split).items():
        counts[domain] = count(
            counter, variables, rows, size=recipe.batch, mesh=opened.mesh, rules=opened.rules
        )
    summary = task.summarise(merge(*counts.values()))
    figures = dict(summary.figures)
    if len(counts) > 1:
        by_domain = {domain: task.summarise(c) for domain, c in counts.items()}
        figures["domains"] = {d: dict(s.figures) for d, s in by_domain.items()}
        lines = [
            f"{d:<12} {s.metric} {s.value:.4f}  accuracy {s.figures['accuracy']:.4f}"
            for d, s in by_domain.items()
        ]
        summary = Summary(summary.metric, figures, "\n".join([summary.text, "", *lines]))
    if name == "f32":
        record(opened.folder, {"splits": {split: figures}})
    return summary


def _rows_by_domain(opened: Opened, split: str) -> dict[str, data.Packed]:
    recipe = opened.recipe
    records = data.load_splits(
        find_data(recipe.data), TASKS[recipe.task], scheme=recipe.scheme,
        columns=tuple(recipe.columns.split(",")) if recipe.columns else None,
        on_bad_row=[].append if recipe.skip_bad_rows else None,
    )  # fmt: skip
    if split == "dev" and "dev" not in records:
        records["dev"] = data.hold_out(records["train"])[1]
    if split not in records:
        raise FwError(f"{recipe.data}: has no {split} split; it has {', '.join(records)}")
    tokenizer = data.load_tokenizer(opened.folder / MODEL)
    encode = data.encode_tagged if recipe.task == "ner" else data.encode_labelled
    groups: dict[str, list] = {}
    for item in records[split]:
        groups.setdefault(getattr(item, "domain", ""), []).append(item)
    return {
        domain: data.pack(
            encode(tokenizer, group, opened.task.labels, max_length=recipe.length),
            recipe.length, max_texts=recipe.texts or None, packed=recipe.packed,
        )
        for domain, group in sorted(groups.items())
    }  # fmt: skip


def compress_run(folder: str | Path, *, split: str = "dev", mesh: str = "data=1") -> str:
    """Makes the int8 variant of a run and says what it cost.

    Writes `RUN/int8/model.safetensors` and `report.json` (bytes and error of every leaf).

    Returns:
      A table for the terminal: bytes, error, quality before and after on `split`.
    """
    opened = open_run(folder, mesh)
    params, leaves = compress.quantize(opened.loaded.variables["params"])
    target, part = opened.folder / "int8", opened.folder / "int8.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    arrays = {k: np.asarray(v) for k, v in compress.to_arrays(params).items()}
    save_file(arrays, part / "model.safetensors")
    rows = [{**dataclasses.asdict(leaf), "error": float(leaf.error)} for leaf in leaves]
    run.write_json(part / "report.json", {"recipe": {"quantize": "int8"}, "leaves": rows})
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    changed = [row for row in rows if not row["applied"].startswith("kept")]
    before, after = (sum(r[k] for r in changed) for k in ("bytes_before", "bytes_after"))
    lines = [
        f"{len(changed)} kernels: {before / 1e6:.2f} MB → {after / 1e6:.2f} MB "
        f"({after / before:.3f}), largest relative error {max(r['error'] for r in changed):.4f}"
    ]
    for name in ("f32", "int8"):
        summary = _evaluate(opened, split, name)
        lines.append(f"{name:<5} {split} {summary.metric} {summary.value:.4f}")
    return "\n".join(lines)


def export_run(folder: str | Path, *, name: str = "f32", output: str | Path | None = None) -> Path:
    """Writes a variant of a run as an artifact; see `fw.export.save`.

    Args:
      folder: the run.
      name: "f32", "bf16" or "int8" (after `compress_run`).
      output: where to; None for `RUN/artifact`.
    """
    opened = open_run(folder)
    variables, _ = variant(opened, name)
    leaves = run.read_json(opened.folder / "int8" / "report.json")["leaves"] if name == "int8" else ()
    return export.save(
        Path(output) if output else opened.folder / run.ARTIFACT,
        model=opened.loaded.model,
        variables=variables,
        task=opened.task.name,
        labels=opened.task.labels,
        tokenizer=opened.folder / MODEL,
        length=opened.recipe.length,
        precision="f32" if name == "int8" else name,
        report=[compress.Record(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in leaves],
        provenance={"run": opened.folder.name, **run.config(opened.folder)},
    )


def compare(
    artifacts: Mapping[str, str | Path], *, batch: int = 16, length: int = 64, repeats: int = 20
) -> list[dict[str, Any]]:
    """Size and latency of artifacts side by side: interleaved, medians.

    Args:
      artifacts: folders by name.
      batch, length: of the rows timed: full, one text each.
      repeats: timed calls of each.

    Returns:
      One row each: name, bytes (all weights), encoder_bytes (the layers' kernels), latency_ms.
    """
    loaded = {name: export.load(folder) for name, folder in artifacts.items()}
    generator = np.random.default_rng(0)
    rows = {
        "input_ids": generator.integers(1000, 20000, (batch, length), np.int32),
        "segment_ids": np.ones((batch, length), np.int32),
        "position_ids": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for repeat in range(repeats + 2):  # the first two warm up
        for name, artifact in loaded.items():
            extra = {"first": np.zeros((batch, 1), np.int32)}
            given = {**rows, **(extra if artifact.task == "sequence_classification" else {})}
            began = time.perf_counter()
            artifact.logits(given)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - began)
    return [
        {
            "name": name,
            **_weights(Path(folder)),
            "latency_ms": 1e3 * statistics.median(seconds[name]),
            "batch": batch,
            "length": length,
        }
        for name, folder in artifacts.items()
    ]


def _weights(folder: Path) -> dict[str, int]:
    arrays = read_tensors(folder / "model.safetensors")
    kernels = [x.nbytes for n, x in arrays.items() if "/layers/" in f"/{n}" and "kernel" in n]
    return {"bytes": sum(x.nbytes for x in arrays.values()), "encoder_bytes": sum(kernels)}


def summary_rows(
    folder: str | Path, artifacts: Mapping[str, str | Path], *, split: str = "test",
    names: Sequence[str] = VARIANTS,
) -> list[dict[str, Any]]:  # fmt: skip
    """The table of a run: size, latency and quality of each variant; kept in `result.json`."""
    rows = compare(artifacts)
    opened = open_run(folder)
    for row in rows:
        figures = _evaluate(opened, split, row["name"]).figures
        row.update({k: figures[k] for k in ("accuracy", "macro_f1", "f1") if k in figures})
    record(opened.folder, {"variants": rows})
    return rows
