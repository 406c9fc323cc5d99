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
    stage = "qat"             # the same, through the rounding
    format = "int8"           # or, without training, stage = "compress" with a recipe

    [[stages]]
    stage = "export"

`fw compress RUN --recipe small.toml` runs it in RUN/pipelines/small/, a folder for each stage that
is a run again. `pipeline.json` there says what was done; a stage is done once, and what was killed
goes on, to the same bits.
"""

import dataclasses
import hashlib
import shutil
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fw import pruning, run, stages
from fw.adaptation import LoraOptions
from fw.compression import LEARNED, LIMIT, RECIPES
from fw.compression import recipe as named_recipe
from fw.distillation import Distil
from fw.errors import FwError
from fw.export.save import replacing
from fw.finetune import finetune
from fw.qat import FORMATS, QatOptions
from fw.recipe import NEW, Finetune, read_recipe
from fw.sparsity import Sparse
from fw.variants import COMPRESSED

MODEL_FILES = "model*.safetensors"
"""Files of a model or a variant, not what its processor keeps."""

FOLDER, STATE = "pipelines", "pipeline.json"
"""In a run, where pipelines are; in one of them, what was done."""

PRUNE = {
    "parameters": float, "flops": float, "latency": float, "layers": int, "by": str, "among": str,
    "multiple": int,
}  # fmt: skip
COMPRESS = {"recipe": str}
OWN = ("task", "model", "data", "run", "teacher")
"""Options of `Finetune` that a stage does not choose."""

MOVED = ("data", "model", "teacher", "unlabelled")
"""Options whose paths may change between two starts of a stage."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
      kind: "prune", "distil", "qat", "finetune", "compress" or "export".
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
    kinds = [stage.kind for stage in found]
    for number, kind in enumerate(kinds, 1):
        if kind == "export" and number < len(kinds):
            raise FwError(f"{path}: stage {number}: export is the last stage")
        for last in {"compress", "qat"} & {*kinds[: number - 1]}:
            if kind != "export":
                raise FwError(
                    f"{path}: stage {number}: {kind} comes after {last}, which ends floats"
                )
    return tuple(found)


@dataclass(frozen=True)
class Given:
    """What a pipeline is run with.

    Attributes:
      run: the finished run.
      base: its recipe.
      beside: the folder of the pipeline's recipe, where files that it names are.
      split: what is evaluated on.
      mesh: devices by axis; training has the recipe's own.
      data: where the run's data is now, if it has moved.
    """

    run: Path
    base: Finetune
    beside: Path
    split: str = "dev"
    mesh: str = "data=1"
    data: str = ""


def pipeline(
    folder: str | Path,
    recipe: str | Path,
    *,
    split: str = "dev",
    mesh: str = "data=1",
    data: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Runs a recipe of stages on a finished run, or goes on with it.

    Args:
      folder: the run.
      recipe: a TOML file; files that it names lie beside it.
      split: what it is evaluated on after every stage.
      mesh: devices by axis, for all but training, which has the run's or the stage's own.
      data: where the run's data is now, if it has moved.
      say: what lines of progress go to.

    Returns:
      The pipeline's folder, `RUN/pipelines/NAME`, with `pipeline.json`.

    Raises:
      FwError: as `read` and the stages do; what was done stays.
    """
    folder, recipe = Path(folder).resolve(), Path(recipe).resolve()
    given = Given(folder, read_recipe(folder), recipe.parent, split, mesh, data)
    listed = tuple(KINDS[s.kind].settle(s, recipe.parent) for s in read(recipe))
    for stage in listed:  # refuses now what would be refused after hours
        KINDS[stage.kind].check(given.base, stage)
    work = folder / FOLDER / recipe.stem
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / ".lock").acquire(timeout=0):
            return _run(work, given, listed, say)
    except Timeout as error:
        raise FwError(f"{work}: another process runs it; wait for it") from error


def _run(work: Path, given: Given, listed: tuple[Stage, ...], say: Callable[[str], None]) -> Path:
    start, place = {"stage": "start", "model": model_digest(given.run)}, Place(given.run)
    done = _done(work, place, start, listed)
    if not done:
        done.append({"spec": start, "figures": _measured(place, given)})
        _write(work, done)
    _measured_again(done[0], place, given)
    say(_line(done[0], done[0]))
    for number, stage in enumerate(listed, 1):
        where, kind = work / f"{number}-{stage.kind}", KINDS[stage.kind]
        if number < len(done):
            place = kind.place(place, where, stage)
            _measured_again(done[number], place, given)
            say(f"{_line(done[number], done[0])}  (done before)")
            continue
        say(f"stage {number} of {len(listed)}: {stage.kind}")
        _write(work, done, going=stage.spec())
        began = time.perf_counter()
        kind.do(given, place, where, stage)
        place = kind.place(place, where, stage)
        figures = {} if stage.kind == "export" else _measured(place, given)
        seconds = time.perf_counter() - began
        made = kind.made(place, where)
        done.append({"spec": stage.spec(), "seconds": seconds, "figures": figures, "made": made})
        _write(work, done)
        say(_line(done[-1], done[0]))
    _write(work, done)
    return work


def model_digest(folder: Path) -> str:
    """What tells a run's model from others, such as what it was before it was trained again."""
    return _digest(folder / run.MODEL)


def _digest(folder: Path) -> str:
    """Of the weights in a folder; "" if there are none."""
    digest, files = hashlib.blake2b(digest_size=16), sorted(folder.glob(MODEL_FILES))
    for file in files:
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "blake2b").digest())
    return digest.hexdigest() if files else ""


def _write(work: Path, done: list[dict[str, Any]], **going: Any) -> None:
    run.write_json(work / STATE, {"stages": done, **going})


def _told(path: Path) -> tuple[list[dict[str, Any]], Any]:
    """What a pipeline's file says was done, and what was under way.

    Raises:
      FwError: it is not such a file.
    """
    if not path.exists():
        return [], None
    told = run.read_json(path)
    stages = told.get("stages") if isinstance(told, dict) else None
    if not isinstance(stages, list) or not all(_is_entry(entry) for entry in stages):
        raise FwError(f"{path}: not what a pipeline writes; remove it")
    return stages, told.get("going")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"spec", "figures"} <= entry.keys():
        return False
    figures, spec = entry["figures"], entry["spec"]
    numbers = {"value", "bytes"}
    return (
        isinstance(spec, dict)
        and isinstance(figures, dict)
        and (not figures or {"metric", "split", *numbers} <= figures.keys())
        and all(isinstance(figures[name], int | float) for name in numbers & figures.keys())
        and isinstance(entry.get("seconds", 0), int | float)
    )


def _done(
    work: Path, place: Place, start: Mapping[str, Any], listed: tuple[Stage, ...]
) -> list[dict[str, Any]]:
    """What was done of these stages, in order; folders of other stages are removed.

    A stage that left nothing, or in whose place another thing is now, was not done, nor what came
    after it.
    """
    before, going = _told(work / STATE)
    done = [entry for entry in before[:1] if entry["spec"] == start and entry["figures"]]
    for number, (stage, entry) in enumerate(zip(listed, before[1:], strict=False), 1):
        where, kind = work / f"{number}-{stage.kind}", KINDS[stage.kind]
        place = kind.place(place, where, stage)
        made = kind.made(place, where)
        if not done or entry["spec"] != stage.spec() or not made or entry.get("made") != made:
            break
        done.append(entry)
    # One more may be under way, if it follows these and is what the recipe still says.
    under_way = bool(done) and len(done) == len(before) <= len(listed)
    under_way = under_way and going == listed[len(done) - 1].spec()
    if len(done) < len(before):  # before anything of it goes
        _write(work, done)
    for old in work.iterdir():
        name, dot, _ = old.name.removeprefix(".").partition(".")  # .1-prune.5f0c: half of a stage
        number, _, kind = name.partition("-")
        if number.isdecimal() and kind in KINDS and (dot or int(number) >= len(done) + under_way):
            shutil.rmtree(old)
    if not any(entry["spec"]["stage"] == "export" for entry in done):
        shutil.rmtree(work / run.ARTIFACT, ignore_errors=True)
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


def _measured(place: Place, given: Given) -> dict[str, Any]:
    summary = stages.evaluate_run(
        place.folder, given.split, name=place.variant, mesh=given.mesh, data=given.data
    )
    made = place.folder / COMPRESSED / place.variant
    files = (place.folder / run.MODEL if place.variant == "f32" else made).glob(MODEL_FILES)
    size = sum(file.stat().st_size for file in files)
    figures = {"metric": summary.metric, "value": float(summary.value), "bytes": size}
    return {**figures, "split": given.split}


def _measured_again(entry: dict[str, Any], place: Place, given: Given) -> None:
    """On another split, what was done stays done."""
    if entry["figures"] and entry["figures"]["split"] != given.split:
        entry["figures"] = _measured(place, given)


# --- the stages -------------------------------------------------------------------------------


def _no_check(base: Finetune, stage: Stage) -> None:
    """Nothing can be known before."""


def _check_prune(base: Finetune, stage: Stage) -> None:
    try:
        pruning.check_budget(**stage.options)
    except FwError as error:
        raise FwError(f"prune: {error}") from error


def _prune(given: Given, place: Place, where: Path, stage: Stage) -> None:
    """A run with a smaller model, and no training of its own."""
    with replacing(where) as part:
        stages.prune_run(
            place.folder, part / run.MODEL, mesh=given.mesh, data=given.data, **stage.options
        )
        shutil.copy(place.folder / run.CONFIG, part / run.CONFIG)


def _trained(base: Finetune, stage: Stage, **own: Any) -> Finetune:
    """The recipe of a stage that trains: the run's, with the stage's options.

    What a run was that trained adapters, pruned, was taught or began anew is not inherited.
    """
    fresh = {
        field.name: field.default
        for options in (LoraOptions, Distil, Sparse, QatOptions)
        for field in dataclasses.fields(options)
    }
    fresh |= {"steps": 0, "evaluate_every": 0, "config": ""}
    if base.lora or base.model in NEW:
        fresh["learning_rate"] = 0.0  # the usual one of what is trained whole
    return dataclasses.replace(base, **{**fresh, **own, **stage.options})


def _check_distil(base: Finetune, stage: Stage) -> None:
    options = {name: value for name, value in stage.options.items() if name != "digest"}
    _trained(base, Stage(stage.kind, options), model="student", teacher="teacher")


def _check_qat(base: Finetune, stage: Stage) -> None:
    if (named := stage.options.get("format", "int8")) not in FORMATS:
        raise FwError(f"qat: format is {named!r}; expected one of {', '.join(FORMATS)}")
    _check_distil(base, _rounding(stage))


def _rounding(stage: Stage) -> Stage:
    """Its options as `fw finetune` has them."""
    options = {name: value for name, value in stage.options.items() if name != "format"}
    return Stage("distil", {**options, "qat": stage.options.get("format", "int8")})


def _learn_rounding(given: Given, place: Place, where: Path, stage: Stage) -> None:
    _train(given, place, where, _rounding(stage))


def _check_finetune(base: Finetune, stage: Stage) -> None:
    _trained(base, stage, model="model")


def _train(given: Given, place: Place, where: Path, stage: Stage) -> None:
    teacher = {"teacher": str(given.run)} if stage.kind == "distil" else {}
    options = {name: value for name, value in stage.options.items() if name != "digest"}
    if "digest" in stage.options:
        options["unlabelled"] = str(given.beside / options["unlabelled"])
    recipe = _trained(
        given.base, Stage(stage.kind, options), model=str(place.folder / run.MODEL), run=str(where),
        data=given.data or given.base.data, **teacher,
    )  # fmt: skip
    going = (where / run.CONFIG).exists()
    if not going:
        shutil.rmtree(where, ignore_errors=True)
    finetune(recipe, resume=going, moved=MOVED)


def _with_texts(stage: Stage, folder: Path) -> Stage:
    """With a digest of the texts beside the recipe that it names: if they change, so does it."""
    name = stage.options.get("unlabelled", "")
    if not name or not (folder / name).exists():
        return stage
    digest, path = hashlib.blake2b(digest_size=16), folder / name
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    return Stage(stage.kind, {**stage.options, "digest": digest.hexdigest()})


def _beside(stage: Stage, folder: Path) -> Stage:
    """With the contents of a recipe's file in it: if they change, so does the stage."""
    name = stage.options.get("recipe", "int8")
    if name in RECIPES:
        return stage
    path = folder / name
    named_recipe(str(path), None)  # refuses what is no recipe
    return Stage(stage.kind, {"recipe": name, "text": path.read_text(encoding="utf-8")})


def _compress(given: Given, place: Place, where: Path, stage: Stage) -> None:
    name = stage.options.get("recipe", "int8")
    recipe = name if name in RECIPES else str(given.beside / name)
    stages.make_variant(place.folder, recipe, split=given.split, mesh=given.mesh, data=given.data)


def _compressed(place: Place, where: Path, stage: Stage) -> Place:
    name = stage.options.get("recipe", "int8")
    return Place(place.folder, name if name in RECIPES else Path(name).stem)


def _export(given: Given, place: Place, where: Path, stage: Stage) -> None:
    stages.export_run(place.folder, name=place.variant, output=where.parent / run.ARTIFACT)


def _as_it_is(stage: Stage, folder: Path) -> Stage:
    return stage


def _there(place: Place, where: Path, stage: Stage) -> Place:
    return Place(where)


def _folder(place: Place, where: Path) -> str:
    """Nothing but the stage itself writes there."""
    return where.name if where.is_dir() else ""


def _variant(place: Place, where: Path) -> str:
    """Another recipe of the same name would write there, too."""
    return _digest(place.folder / COMPRESSED / place.variant)


def _artifact(place: Place, where: Path) -> str:
    return run.ARTIFACT if (where.parent / run.ARTIFACT).is_dir() else ""


@dataclass(frozen=True)
class _Kind:
    """What a kind of stage takes and does.

    Attributes:
      options: their types by name.
      check: `check(recipe of the run, stage)`, before anything is done.
      do: `do(given, place, folder of the stage, stage)`.
      place: where the pipeline is after it.
      settle: the stage, with what lies in files beside the recipe.
      made: `made(place after it, folder of the stage)`: what tells what it left from another
        thing in its place; "" if nothing is there.
    """

    options: Mapping[str, type]
    check: Callable[[Finetune, Stage], None]
    do: Callable[[Given, Place, Path, Stage], None]
    place: Callable[[Place, Path, Stage], Place]
    settle: Callable[[Stage, Path], Stage] = _as_it_is
    made: Callable[[Place, Path], str] = _folder


_OPTIONS: Mapping[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(Finetune)
    if field.name not in (*OWN, "qat")
}

KINDS: Mapping[str, _Kind] = {
    "prune": _Kind(PRUNE, _check_prune, _prune, _there),
    "distil": _Kind(_OPTIONS, _check_distil, _train, _there, _with_texts),
    "qat": _Kind(
        {**_OPTIONS, "format": str},
        _check_qat,
        _learn_rounding,
        lambda place, where, stage: Place(where, stage.options.get("format", "int8") + LEARNED),
        _with_texts,
    ),
    "finetune": _Kind(_OPTIONS, _check_finetune, _train, _there),
    "compress": _Kind(COMPRESS, _no_check, _compress, _compressed, _beside, _variant),
    "export": _Kind({}, _no_check, _export, lambda place, *_: place, made=_artifact),
}
"""What a stage may be."""
