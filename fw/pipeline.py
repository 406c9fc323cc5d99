"""A recipe of stages: from a finished run to a small artifact, evaluated on the way, and resumable.

    [[stages]]
    stage = "prune"           # as `fw prune`
    flops = 0.5
    multiple = 16

    [[stages]]
    stage = "distil"          # as `fw finetune --teacher RUN`, the run's options but for these
    epochs = 8
    learning_rate = 3e-4

    [[stages]]
    stage = "compress"        # as `fw compress --recipe`
    recipe = "int8"

    [[stages]]
    stage = "export"

`fw compress RUN --recipe small.toml` runs it in RUN/pipelines/small/, a folder for each stage that
is a run again. `pipeline.json` there says what was done; a stage is done once, and what was killed
goes on, to the same bits.
"""

import dataclasses
import shutil
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fw import hub, run, stages
from fw.adaptation import LoraOptions
from fw.compression import LIMIT, RECIPES
from fw.distillation import Distil
from fw.errors import FwError
from fw.export.save import replacing
from fw.finetune import MODEL, finetune
from fw.hub.files import WEIGHTS
from fw.recipe import Finetune, read_recipe
from fw.sparsity import Sparse
from sharding import make_mesh
from sharding import rules as make_rules

FOLDER, STATE = "pipelines", "pipeline.json"
"""In a run, where pipelines are; in one of them, what was done."""

PRUNE = {"parameters": float, "flops": float, "by": str, "among": str, "multiple": int}
COMPRESS = {"recipe": str}
OWN = ("task", "model", "data", "run", "teacher")
"""Options of `Finetune` that a stage does not choose."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
      kind: "prune", "distil", "finetune", "compress" or "export".
      options: of that.
    """

    kind: str
    options: Mapping[str, Any]

    def spec(self) -> dict[str, Any]:
        """As its file has it."""
        return {"stage": self.kind, **self.options}


@dataclass(frozen=True)
class Place:
    """Where a pipeline is after some stages.

    Attributes:
      folder: the run.
      variant: of it.
    """

    folder: Path
    variant: str = "f32"


def is_pipeline(name: str) -> bool:
    """Whether a recipe's name is a TOML file with stages."""
    path = Path(name)
    if path.suffix != ".toml" or not path.is_file() or path.stat().st_size > LIMIT:
        return False
    try:
        return "stages" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read(path: str | Path) -> tuple[Stage, ...]:
    """The stages of a recipe's file.

    Raises:
      FwError: it cannot be read, or a stage or an option is none.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FwError(f"{path}: cannot be read: {error}") from error
    listed = data.pop("stages", None)
    if data or not isinstance(listed, list) or not listed:
        raise FwError(f"{path}: expected [[stages]] and nothing else, one of them or more")
    found = []
    for number, entry in enumerate(listed, 1):
        where = f"{path}: stage {number}"
        if not isinstance(entry, dict) or entry.get("stage") not in KINDS:
            raise FwError(f"{where}: expected stage = one of {', '.join(KINDS)}")
        options = {name: value for name, value in entry.items() if name != "stage"}
        known = KINDS[entry["stage"]].options
        for name, value in options.items():
            if name not in known:
                raise FwError(f"{where}: unknown option {name!r}; expected {', '.join(known)}")
            kind = known[name]
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise FwError(f"{where}: {name} is {value!r}; expected {kind.__name__}")
        found.append(Stage(entry["stage"], options))
    for number, stage in enumerate(found, 1):
        if stage.kind == "export" and number < len(found):
            raise FwError(f"{path}: stage {number}: export is the last stage")
    return tuple(found)


def pipeline(folder: str | Path, recipe: str | Path, *, split: str = "dev", data: str = "",
             say: Callable[[str], None] = print) -> Path:  # fmt: skip
    """Runs a recipe of stages on a finished run, or goes on with it.

    Args:
      folder: the run.
      recipe: a TOML file.
      split: what it is evaluated on after every stage.
      data: where the run's data is now, if it has moved.
      say: what lines of progress go to.

    Returns:
      The pipeline's folder, `RUN/pipelines/NAME`, with `pipeline.json`.

    Raises:
      FwError: as `read` and the stages do; what was done stays.
    """
    folder, recipe = Path(folder), Path(recipe)
    listed = read(recipe)
    work = folder / FOLDER / recipe.stem
    base = read_recipe(folder)
    for stage in listed:  # refuses now what would be refused after hours
        KINDS[stage.kind].check(base, stage)
    work.mkdir(parents=True, exist_ok=True)
    done = _done(work, folder, listed)
    place = Place(folder)
    if not done:
        done.append({"spec": {"stage": "start"}, "figures": _measured(place, split, data)})
        _write(work, folder, done)
    say(_line(done[0], done[0]))
    for number, stage in enumerate(listed, 1):
        where, kind = work / f"{number}-{stage.kind}", KINDS[stage.kind]
        if number < len(done):
            place = kind.place(place, where, stage)
            say(f"{_line(done[number], done[0])}  (done before)")
            continue
        say(f"stage {number} of {len(listed)}: {stage.kind}")
        _write(work, folder, done, going=stage.spec())
        began = time.perf_counter()
        kind.do(folder, place, where, stage, data)
        place = kind.place(place, where, stage)
        figures = {} if stage.kind == "export" else _measured(place, split, data)
        seconds = time.perf_counter() - began
        done.append({"spec": stage.spec(), "seconds": seconds, "figures": figures})
        _write(work, folder, done)
        say(_line(done[-1], done[0]))
    return work


def _write(work: Path, folder: Path, done: list[dict[str, Any]], **going: Any) -> None:
    run.write_json(work / STATE, {"run": str(folder.resolve()), "stages": done, **going})


def _done(work: Path, folder: Path, listed: tuple[Stage, ...]) -> list[dict[str, Any]]:
    """What was done of these stages, in order; folders of other stages are removed."""
    told = run.read_json(work / STATE) if (work / STATE).exists() else {}
    if told.get("run") != str(folder.resolve()):
        told = {}
    done = list(told.get("stages", []))[:1]
    for stage, entry in zip(listed, told.get("stages", [])[1:], strict=False):
        if entry["spec"] != stage.spec():
            break
        done.append(entry)
    # One more may be under way, if it follows these and is what the recipe still says.
    under_way = len(done) == len(told.get("stages", [])) <= len(listed)
    under_way = under_way and bool(done) and told.get("going") == listed[len(done) - 1].spec()
    for old in work.glob("[0-9]*-*"):
        if int(old.name.partition("-")[0]) >= len(done) + under_way:
            shutil.rmtree(old)
    return done


def _line(entry: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    name, figures = entry["spec"]["stage"], entry["figures"]
    if not figures:
        return f"{name:<9} {entry['seconds']:.0f} s"
    before = first["figures"]
    return (
        f"{name:<9} {figures['split']} {figures['metric']} {figures['value']:.4f} "
        f"({figures['value'] - before['value']:+.4f})  {figures['bytes'] / 1e6:.2f} MB "
        f"({figures['bytes'] / before['bytes']:.3f})"
    )


def _measured(place: Place, split: str, data: str) -> dict[str, Any]:
    summary = stages.evaluate_run(place.folder, split, name=place.variant, data=data)
    if place.variant == "f32":
        where = {"mesh": make_mesh("data=1"), "rules": make_rules()}
        leaves = jax.tree.leaves(hub.load(place.folder / MODEL, **where).variables)
        size = sum(x.nbytes for x in leaves)
    else:
        size = (place.folder / stages.COMPRESSED / place.variant / WEIGHTS).stat().st_size
    return {"metric": summary.metric, "value": float(summary.value), "bytes": size, "split": split}


# --- the stages -------------------------------------------------------------------------------


def _no_check(base: Finetune, stage: Stage) -> None:
    """Nothing can be known before."""


def _check_prune(base: Finetune, stage: Stage) -> None:
    if ("parameters" in stage.options) == ("flops" in stage.options):
        raise FwError("prune: give parameters or flops, the part that may stay")
    if stage.options.get("by", stages.SCORES[0]) not in stages.SCORES:
        raise FwError(f"prune: by is {stage.options['by']!r}; expected {', '.join(stages.SCORES)}")


def _prune(folder: Path, place: Place, where: Path, stage: Stage, data: str) -> None:
    """A run with a smaller model, and no training of its own."""
    _floats(place, stage)
    shutil.rmtree(where, ignore_errors=True)
    with replacing(where) as part:
        stages.prune_run(place.folder, part / MODEL, data=data, **stage.options)
        shutil.copy(place.folder / run.CONFIG, part / run.CONFIG)


def _trained(base: Finetune, stage: Stage, **own: Any) -> Finetune:
    """The recipe of a stage that trains: the run's, with the stage's options."""
    fresh = {
        field.name: field.default
        for options in (LoraOptions, Distil, Sparse)
        for field in dataclasses.fields(options)
    }
    fresh |= {"steps": 0, "evaluate_every": 0}
    return dataclasses.replace(base, **{**fresh, **own, **stage.options})


def _check_distil(base: Finetune, stage: Stage) -> None:
    _trained(base, stage, model="student", teacher="teacher")


def _check_finetune(base: Finetune, stage: Stage) -> None:
    _trained(base, stage, model="model")


def _train(folder: Path, place: Place, where: Path, stage: Stage, data: str) -> None:
    _floats(place, stage)
    teacher = {"teacher": str(folder)} if stage.kind == "distil" else {}
    base = read_recipe(folder)
    recipe = _trained(
        base, stage, model=str(place.folder / MODEL), run=str(where), data=data or base.data,
        **teacher,
    )  # fmt: skip
    going = (where / run.CONFIG).exists()
    if not going:
        shutil.rmtree(where, ignore_errors=True)
    finetune(recipe, resume=going)


def _floats(place: Place, stage: Stage) -> None:
    if place.variant != "f32":
        raise FwError(f"{stage.kind}: comes after compress, whose codes it cannot change")


def _check_compress(base: Finetune, stage: Stage) -> None:
    name = stage.options.get("recipe", "int8")
    if name not in RECIPES and not Path(name).is_file():
        raise FwError(f"compress: recipe {name!r}: expected {', '.join(RECIPES)}, or a file")


def _compress(folder: Path, place: Place, where: Path, stage: Stage, data: str) -> None:
    _floats(place, stage)
    stages.compress_run(place.folder, stage.options.get("recipe", "int8"), data=data)


def _export(folder: Path, place: Place, where: Path, stage: Stage, data: str) -> None:
    stages.export_run(place.folder, name=place.variant, output=where.parent / run.ARTIFACT)


@dataclass(frozen=True)
class _Kind:
    """What a kind of stage takes and does.

    Attributes:
      options: their types by name.
      check: `check(recipe of the run, stage)`, before anything is done.
      do: `do(run, place, folder of the stage, stage, data)`.
      place: where the pipeline is after it.
    """

    options: Mapping[str, type]
    check: Callable[[Finetune, Stage], None]
    do: Callable[[Path, Place, Path, Stage, str], None]
    place: Callable[[Place, Path, Stage], Place]


def _there(place: Place, where: Path, stage: Stage) -> Place:
    return Place(where)


_OPTIONS: Mapping[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(Finetune)
    if field.name not in OWN
}

KINDS: Mapping[str, _Kind] = {
    "prune": _Kind(PRUNE, _check_prune, _prune, _there),
    "distil": _Kind(_OPTIONS, _check_distil, _train, _there),
    "finetune": _Kind(_OPTIONS, _check_finetune, _train, _there),
    "compress": _Kind(
        COMPRESS, _check_compress, _compress,
        lambda place, _, stage: Place(place.folder, Path(stage.options.get("recipe", "int8")).stem),
    ),
    "export": _Kind({}, _no_check, _export, lambda place, *_: place),
}  # fmt: skip
"""What a stage may be."""
