"""The stages after training, each a function from a run folder to more in it.

`evaluate_run`, `compress_run` and `export_run` read the run's `model/`, never a checkpoint, so
they run anywhere the folder is copied to. `fw eval`, `fw compress` and `fw export` are these
functions; `fw.compare` times what they leave.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import compress
from compress.transform import named_leaves
from fw import export, hub, pruning, run
from fw.compare import compare, sizes
from fw.compression import calibrated
from fw.compression import recipe as named_recipe
from fw.data import eval_batches
from fw.data.files import OnBadRow
from fw.data.rows import AnyRows
from fw.errors import FwError, UnfitError
from fw.evaluate import Forward, count, forward, make_counter
from fw.export.save import replacing
from fw.finetune import record
from fw.hub.files import WEIGHTS
from fw.metrics import merge
from fw.model import Model
from fw.models.stack_layout import default_microbatches, layer_of, relayout
from fw.processors import Processor, Text, processor_of
from fw.recipe import Finetune, locate, read_recipe
from fw.tasks import Summary, Task
from fw.tensors import read_tensors
from fw.variants import COMPRESSED, RECIPE, REPORT, fill
from sharding import Rules, gather, make_mesh, put, scope
from sharding import rules as make_rules

VARIANTS = ("f32", "bf16", "int8")
"""What a table of variants usually has; `compress_run` makes others, too."""

PLAIN = ("f32", "bf16")
"""Variants that need no compressed parameters: policies of `fw.precision`."""

QUALITY = ("accuracy", "micro_f1", "exact_match", "mse", "spearman", "perplexity")
"""Figures of a summary that a table of variants or domains shows beside the task's own metric."""

CALIBRATION = 256
"""Examples of the training split that a recipe is calibrated on, if it is."""


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


def open_run(folder: str | Path, mesh: str = "data=1", *, scan: bool | None = None) -> Opened:
    """Loads the best model of a run onto a mesh.

    Args:
      folder: the run.
      mesh: devices by axis; need not be that of the training.
      scan: whether layers are in a stack; None as `fw.hub.load` has it.

    Raises:
      FwError: no run there, or its training has not ended.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    if not (folder / run.MODEL).is_dir():
        raise FwError(f"{folder / run.MODEL}: not there yet; finish the run with --resume first")
    where, rules = make_mesh(mesh), make_rules(recipe.rules)
    parts = default_microbatches(where)
    loaded = hub.load(folder / run.MODEL, mesh=where, rules=rules, microbatches=parts, scan=scan)
    kind = processor_of(recipe.long_task)
    processor = kind.load(folder / run.MODEL, dataclasses.asdict(recipe))
    task = processor.task(recipe, loaded.labels)
    return Opened(folder, recipe, loaded, processor, task, where, rules)


def variant(opened: Opened, name: str) -> tuple[Any, Forward]:
    """A run's model as "f32", "bf16" or what a recipe made: its variables, and their function.

    Raises:
      FwError: a name that `compress_run` has made nothing of, or a damaged file of it.
    """
    model, variables = opened.model, opened.loaded.variables
    if name in PLAIN:
        return variables, forward(model, name)
    made = sorted(p.parent.name for p in (opened.folder / COMPRESSED).glob(f"*/{WEIGHTS}"))
    if name not in made:
        raise FwError(
            f"variant {name!r} is not there; there are {', '.join((*PLAIN, *made))}; others are "
            f"made with: fw compress {opened.folder} --recipe NAME"
        )
    path, params = opened.folder / COMPRESSED / name / WEIGHTS, variables["params"]
    try:
        arrays = _relayout(read_tensors(path), [path for path, _ in named_leaves(params)[0]])
        host = compress.from_arrays(arrays, like=params)
    except ValueError as error:
        raise FwError(f"{path}: {error}; make it again with: fw compress") from error
    where = compress.specs(host, jax.tree.map(lambda x: x.sharding, params))
    return {**variables, "params": jax.device_put(host, where)}, forward(_compressed(model), "f32")


def _relayout(arrays: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Layers joined in stacks or taken apart as `paths` have them, each part of a leaf alike."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        path, _, kind = name.partition(":")
        kinds.setdefault(kind, {})[path] = array
    _check_stacks(kinds, paths)
    found = {}
    for kind, parts in kinds.items():
        stacks = {layer[1] for path in parts if (layer := layer_of(path))}
        wanted = [
            path
            for path in paths
            if path in parts
            or path in stacks
            or ((layer := layer_of(path)) is not None and layer[1] in parts)
        ]
        moved = relayout(parts, wanted)
        found |= {f"{path}:{kind}" if kind else path: x for path, x in moved.items()}
    return found


def _check_stacks(kinds: Mapping[str, Mapping[str, Any]], paths: Sequence[str]) -> None:
    """Refuses to join layers that are compressed in different ways.

    Raises:
      ValueError: with the path of the stack.
    """
    layers = [
        (kind, layer) for kind, parts in kinds.items() for p in parts if (layer := layer_of(p))
    ]
    for path in paths:
        of = [(kind, number) for kind, (number, stack) in layers if stack == path]
        each = {kind: sum(k == kind for k, _ in of) for kind, _ in of}
        if each and set(each.values()) != {len({number for _, number in of})}:
            raise ValueError(
                f"{path}: its layers are compressed in different ways and are to be one array "
                "here; open it where layers are apart, as on a CPU"
            )


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
      name: "f32", "bf16", or of what `compress_run` has made.
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
    folder: str | Path,
    recipe: str = "int8",
    *,
    split: str = "dev",
    mesh: str = "data=1",
    data: str = "",
) -> str:
    """Makes a smaller variant of a run by a recipe and says what it cost.

    Writes `model.safetensors`, `recipe.json` and `report.json` (bytes and error of every leaf) to
    `RUN/compressed/NAME/`, and sizes and figures, before and after, to `result.json`. A recipe that
    needs calibration gets `CALIBRATION` examples of the training split.

    Args:
      folder: the run.
      recipe: a name of `fw.compression.RECIPES`, or a TOML or JSON file, whose stem is the name.
      split: what it is evaluated on, before and after.
      mesh: devices by axis.
      data: where the run's data is now, if it has moved.

    Returns:
      Lines for the terminal: bytes, error, quality before and after on `split`.

    Raises:
      FwError: as `evaluate_run` and `fw.compression.recipe` do, the recipe does not fit the model,
        or the folder cannot be written; what was there stays.
    """
    _one_process("compress")
    opened = open_run(folder, mesh)
    rows_by_domain = _rows_by_domain(opened, split, data)
    line, arrays = _make(opened, recipe, rows_by_domain, data)
    lines, variants = [line], []
    for name, tensors in arrays.items():
        summary = _evaluate(opened, split, name, rows_by_domain)
        lines.append(f"{name:<5} {split} {summary.metric} {summary.value:.4f}")
        variants.append({"name": name, **sizes(tensors), **_quality(summary), "split": split})
    record(opened.folder, {"variants": variants})
    return "\n".join(lines)


def make_variant(
    folder: str | Path,
    recipe: str = "int8",
    *,
    split: str = "dev",
    mesh: str = "data=1",
    data: str = "",
) -> str:
    """Makes a smaller variant of a run, as `compress_run` does, for whoever evaluates it.

    Args:
      folder: the run.
      recipe: as there.
      split: whose rows it must be able to take.
      mesh: devices by axis.
      data: where the run's data is now, if it has moved.

    Returns:
      A line for the terminal: bytes and error.

    Raises:
      FwError: as `compress_run` does.
    """
    _one_process("compress")
    opened = open_run(folder, mesh)
    return _make(opened, recipe, _rows_by_domain(opened, split, data), data)[0]


def _make(
    opened: Opened, recipe: str, rows_by_domain: Mapping[str, AnyRows], data: str
) -> tuple[str, dict[str, dict[str, Any]]]:
    """What `make_variant` says; and the arrays of the model and of what was made of it, by name."""
    params = opened.loaded.variables["params"]
    variant_name, transform = named_recipe(recipe, params)
    stats = calibrated(transform, _outputs(opened), params, _examples(opened, transform, data))
    with replacing(opened.folder / COMPRESSED / variant_name) as part:
        try:
            small, leaves = transform(params, stats)
            changed = [leaf for leaf in leaves if not leaf.applied.startswith("kept")]
            if not changed:
                raise ValueError("it changes no leaf")
            trees = {"f32": params, variant_name: small}
            arrays = {name: compress.to_arrays(gather(tree)) for name, tree in trees.items()}
            _try(opened, small, rows_by_domain)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UnfitError(f"{opened.folder / run.MODEL}: recipe {recipe}: {error}") from error
        fill(part, arrays[variant_name], leaves, transform)

    before, after = (sum(getattr(r, f"bytes_{k}") for r in changed) for k in ("before", "after"))
    worst = max(float(leaf.error) for leaf in changed)
    shrunk = f"{before / 1e6:.2f} MB → {after / 1e6:.2f} MB ({after / before:.3f})"
    return f"{len(changed)} arrays: {shrunk}, largest relative error {worst:.4f}", arrays


def _outputs(opened: Opened) -> Callable[[Any, Any], Any]:
    """What calibration watches: `(params, batch) -> outputs`."""
    rest = {k: v for k, v in opened.loaded.variables.items() if k != "params"}
    return lambda params, batch: opened.model.apply({"params": params, **rest}, batch)[0]


def _try(opened: Opened, small: Any, rows_by_domain: Mapping[str, AnyRows]) -> None:
    """Traces the function with the compressed parameters, before they take anyone's place."""
    rows = next(iter(rows_by_domain.values()))
    batch = next(iter(eval_batches(rows.arrays, opened.recipe.batch, empty=rows.empty)))
    with scope(opened.mesh, opened.rules):
        jax.eval_shape(
            compress.apply(_outputs(opened)), small, put(batch, opened.mesh, opened.rules)
        )


def _examples(opened: Opened, transform: compress.Transform, data: str) -> Iterator[Any]:
    """Batches of the training split, if the transform looks at any."""
    if transform.observes() or transform.hessians():
        yield from _training(opened, data)


def _training(opened: Opened, data: str) -> Iterator[Any]:
    """`CALIBRATION` examples of the training split, in batches as evaluation has them."""
    by_domain, size = _rows_by_domain(opened, "train", data), opened.recipe.batch
    each = max(1, CALIBRATION // size // len(by_domain))
    for rows in by_domain.values():
        # From all over the split, and whole batches: what fills one up is no example.
        count = max(1, len(next(iter(rows.arrays.values()))) // size)
        wanted = min(each, count)
        chosen = {i * count // wanted for i in range(wanted)}
        for i, batch in enumerate(eval_batches(rows.arrays, size, empty=rows.empty)):
            if i in chosen:
                with scope(opened.mesh, opened.rules):
                    yield put(batch, opened.mesh, opened.rules)


def prune_run(
    folder: str | Path,
    output: str | Path,
    *,
    parameters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    layers: int | None = None,
    by: str = "taylor",
    among: str = "",
    multiple: int = 1,
    mesh: str = "data=1",
    data: str = "",
) -> str:
    """Takes heads, neurons, channels and layers out of a run's best model, and writes what is left.

    Args:
      folder: the run.
      output: a model folder to make, for `fw finetune --model OUTPUT --teacher RUN`.
      parameters: part of all parameters that may stay.
      flops: part of the products' operations that may stay; instead of `parameters`.
      latency: part of the time of a batch that may stay, measured here; instead.
      layers: how many layers stay, evenly; instead.
      by: how units are judged, one of `fw.pruning.SCORES`; the first two look at training examples.
      among: pattern of dimensions that may shrink, as `compress.couplings` names them; nothing for
        those of layers where the model has a stack of them, else for all.
      multiple: entries of an axis that go at once; see `compress.choose_units`.
      mesh: devices by axis.
      data: where the run's data is now, if it has moved.

    Returns:
      Lines for the terminal: what went, and what is left.

    Raises:
      FwError: as `open_run` does; the budget cannot be met, or no config of the family can say what
        would be left; `output` exists.
    """
    _one_process("prune")
    pruning.check_budget(
        parameters=parameters, flops=flops, latency=latency, layers=layers, by=by, among=among,
        multiple=multiple,
    )  # fmt: skip
    opened = open_run(folder, mesh, scan=True)
    outputs, variables = pruning.outputs(opened.model), opened.loaded.variables
    batches = list(_training(opened, data))

    def loss(variables: Any, batch: Any) -> jax.Array:
        total, weight = opened.task.loss(outputs(variables, batch), batch)
        return total / jax.numpy.maximum(weight, 1)

    try:
        with scope(opened.mesh, opened.rules):
            found = compress.couplings(outputs, variables, batches[0])
            among = among or pruning.usual(found)
            if layers is not None:
                scores = {}
            elif by == "taylor":
                scores = compress.taylor_scores(found, loss, variables, batches)
            elif by == "activation":
                watch = jax.jit(compress.observe(outputs))
                stats = [watch(variables, batch)[1] for batch in batches]
                merged = compress.merge_stats(*stats)
                scores = compress.activation_scores(found, variables, merged)
            else:
                scores = compress.magnitude_scores(found, variables)

            def choose(**budget: Any) -> dict[str, Any]:
                kept = compress.choose_units(
                    found, scores, among=among, multiple=multiple, **budget
                )
                return pruning.tied(found, scores, kept)

            if layers is not None:
                kept = pruning.fewer_layers(found, layers)
            elif latency is not None:
                adapt = opened.processor.adapt
                time_of = functools.partial(
                    pruning.part_of_time, opened.loaded, adapt, found, batches[0]
                )
                kept = pruning.within_time(latency, choose, time_of)
            else:
                kept = choose(parameters=parameters, flops=flops)
    except ValueError as error:
        raise UnfitError(f"{opened.folder / run.MODEL}: {error}") from error
    small = pruning.shrunk(opened.loaded, compress.shrink(found, kept))
    more = None if isinstance(opened.processor, Text) else opened.processor.save
    hub.save(output, small, tokenizer_from=opened.folder / run.MODEL, more=more)
    units = found.units
    left = units | {name: rows.shape[1] for name, rows in kept.items()}
    lines = [f"{name}: {units[name]} → {left[name]}" for name in kept]
    for what, cost in (("parameters", found.parameters), ("FLOPs", found.flops)):
        before, after = cost(units), cost(left)
        lines.append(f"{before:,.0f} → {after:,.0f} {what} ({after / before:.3f})")
    return "\n".join(lines)


def export_run(folder: str | Path, *, name: str = "f32", output: str | Path | None = None) -> Path:
    """Writes a variant of a run as an artifact; see `fw.export.save`.

    Args:
      folder: the run.
      name: "f32", "bf16", or of what `compress_run` has made.
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
        precision=name if name in PLAIN else "f32",
        **({} if name in PLAIN else _made(opened.folder / COMPRESSED / name)),
        provenance={**run.config(opened.folder), "run": opened.folder.name},
    )


def _made(folder: Path) -> dict[str, Any]:
    """The report and the recipe of a compressed variant, as an artifact takes them."""
    path = folder / REPORT
    report = run.read_json(path)
    try:
        leaves = [compress.Record(**{**r, "shape": tuple(r["shape"])}) for r in report["leaves"]]
    except (KeyError, TypeError) as error:
        raise FwError(f"{path}: not what fw compress writes ({error}); run it again") from error
    return {"report": leaves, "recipe": run.read_json(folder / RECIPE)}


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
