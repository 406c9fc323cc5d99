"""A search for a recipe that meets a target, and the trade-offs that it found on the way.

    fw compress RUN --target "latency 2x, size 4x, quality -1"

Formats are tried first, which take a minute each; where they are not enough, units go, half of the
products' operations at a time, and what is left learns from the run (`fw.pipeline`), in every
format that was good enough. It ends with the first level that meets the target, or where pruning
costs more than the target allows. All is kept in `RUN/targets/NAME/`, and goes on if it is killed.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from fw import pipeline, run, stages
from fw.compare import rows_to_time
from fw.compression import RECIPES
from fw.errors import FwError, UnfitError
from fw.pipeline import Place, Stage
from fw.recipe import TAUGHT, read_recipe
from fw.report import svg
from fw.report.markup import table, tag
from fw.report.page import document
from fw.train import duration
from fw.variants import COMPRESSED
from sharding import put, scope

FOLDER = "targets"
"""In a run, where searches are."""

TRIALS, CHOSEN, PICTURE = "trials.json", "recipe.toml", "report.html"
"""In one of them: what was tried, what was chosen, and the picture."""

STEP = 0.5
"""The part of the operations that stays from one level to the next."""

LEVELS = 4
"""The most levels of pruning: the last one has a sixteenth of the operations."""

MULTIPLE = 16
"""Entries of an axis that go at once."""

FORMATS = tuple(name for name in RECIPES if name != "int4-nearest")

ROUNDS = 15
"""How often what is timed runs."""

_TIMES = ("latency", "size")
_PART = re.compile(r"(latency|size) +(\d+(?:\.\d+)?)x|(quality) +(-?\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Target:
    """What a variant is to be.

    Attributes:
      latency: how many times faster than the run's model in float32; 0 for no matter.
      size: how many times fewer bytes; 0 for no matter.
      quality: points (hundredths of the task's metric) that it may differ: -1 may lose one.

    >>> Target.of("latency 2x, quality -0.5")
    Target(latency=2.0, size=0.0, quality=-0.5)
    """

    latency: float = 0.0
    size: float = 0.0
    quality: float = -1.0

    @classmethod
    def of(cls, text: str) -> "Target":
        """The target that a text spells.

        Raises:
          FwError: it does not.
        """
        found: dict[str, float] = {}
        for part in filter(None, map(str.strip, text.split(","))):
            match = _PART.fullmatch(part)
            name = match and (match[1] or match[3])
            if not match or not name or name in found:
                raise FwError(
                    f'target {text!r}: {part!r}; expected each of "latency 2x", "size 4x" and '
                    '"quality -1" once at most, parted by commas'
                )
            found[name] = float(match[2] or match[4])
        target = cls(**found)
        if not found.keys() & {"latency", "size"} or min(found.get(n, 2) for n in _TIMES) <= 1:
            raise FwError(f"target {text!r}: expected a latency or a size of more than 1x")
        if target.quality > 0:
            raise FwError(f"target {text!r}: quality is what may be lost; expected 0 or less")
        return target

    def __str__(self) -> str:
        """As `of` reads it."""
        times = [f"{name} {getattr(self, name):g}x" for name in _TIMES if getattr(self, name)]
        return ", ".join([*times, f"quality {self.quality:g}"])

    @property
    def name(self) -> str:
        """That of its folder."""
        parts = [f"{name}-{getattr(self, name):g}x" for name in _TIMES if getattr(self, name)]
        return "-".join([*parts, f"quality{self.quality:g}" if self.quality else "quality-0"])


@dataclass(frozen=True)
class Trial:
    """A variant that was tried.

    Attributes:
      level: how often half of the operations went.
      stages: of its recipe that were run before its format.
      variant: its format.
      latency: times faster than the run's model in float32.
      size: times fewer bytes.
      quality: points more than that, or fewer.
    """

    level: int
    stages: int
    variant: str
    latency: float
    size: float
    quality: float

    @property
    def name(self) -> str:
        """In words."""
        pruned = f"{STEP**self.level:g} of the operations, " if self.level else ""
        return f"{pruned}{self.variant}"

    def meets(self, target: Target, *, but: str = "") -> bool:
        """Whether it is all that the target says, but for one."""
        return all(
            name == but or round(getattr(self, name), 9) >= wanted
            for name, wanted in asdict(target).items()
        )

    def beats(self, other: "Trial") -> bool:
        """Whether it is as good in all, and better in one."""
        mine, theirs = ((t.latency, t.size, t.quality) for t in (self, other))
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other one beats (Pareto), the fastest first.

    >>> of = (("a", 2, 0), ("b", 1, -1), ("c", 3, -1))
    >>> a, b, c = (Trial(0, 0, name, x, 1.0, q) for name, x, q in of)
    >>> [trial.variant for trial in front([a, b, c])]
    ['c', 'a']
    """
    best = [t for t in trials if not any(other.beats(t) for other in trials)]
    return sorted(best, key=lambda t: (-t.latency, -t.quality))


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      trials: all, in order.
      chosen: the best one that meets the target; None if none does.
      folder: `RUN/targets/NAME`.
    """

    trials: tuple[Trial, ...]
    chosen: Trial | None
    folder: Path

    def __str__(self) -> str:
        """A table of what no other beats, and what was chosen."""
        best = front(self.trials)
        if not best:
            return "nothing could be tried: no format is for this model"
        width = max(len(t.name) for t in best)
        lines = [f"{'':{width}}  latency     size  quality"]
        lines += [
            f"{t.name:{width}}  {t.latency:6.2f}x  {t.size:6.2f}x  {t.quality:+7.2f}"
            + ("  chosen" if t == self.chosen else "")
            for t in best
        ]
        return "\n".join(lines)


class _Search:
    """The state of a search: what is asked, what was tried, and what that took."""

    def __init__(self, folder: Path, target: Target, options: Mapping[str, Any], say: Callable):
        self.run, self.target, self.say = folder, target, say
        self.options = dict(options)
        model = pipeline.model_digest(folder)
        self.asked = {"target": asdict(target), **self.options, "model": model}
        self.work = folder / FOLDER / target.name
        self.recipe = self.work / f"{target.name}.toml"
        self.where = folder / pipeline.FOLDER / target.name
        self.dense = stages.open_run(folder)
        self.trials: list[Trial] = []
        self.state: dict[str, Any] = {}
        self.seconds: list[float] = []

    def open(self) -> None:
        """Reads what was tried, if it was with the same options and model.

        Raises:
          FwError: the file is not one of these.
        """
        path = self.work / TRIALS
        told = run.read_json(path) if path.exists() else {}
        try:
            if path.exists() and told["asked"] == self.asked:
                self.trials = [Trial(**fields) for fields in told["trials"]]
                numbers = (n for t in self.trials for n in (t.latency, t.size, t.quality))
                if not all(isinstance(n, int | float) for n in numbers):
                    raise TypeError("a figure is no number")
                self.state = {key: told["dense"][key] for key in ("metric", "quality", "bytes")}
                return
        except (TypeError, KeyError) as error:
            raise FwError(f"{path}: not what a search writes ({error}); remove it") from error
        summary = stages.evaluate_run(self.run, self.options["split"], data=self.options["data"])
        size = self._bytes(Place(self.run))
        self.state = {"metric": summary.metric, "quality": summary.value, "bytes": size}

    def keep(self) -> None:
        """Writes what was tried."""
        told = [asdict(trial) for trial in self.trials]
        told = {"asked": self.asked, "dense": self.state, "trials": told}
        run.write_json(self.work / TRIALS, told)
        run.write_text(self.work / PICTURE, report(self.run.name, self.trials, self.target))

    def try_formats(self, level: int, listed: Sequence[Stage], names: Sequence[str]) -> None:
        """Every format of a level, but those that were tried."""
        folder = self.folder(listed)
        done = {(t.stages, t.variant) for t in self.trials}
        left = [name for name in names if (len(listed), name) not in done]
        for number, name in enumerate(left):
            began = time.perf_counter()
            eta = f"  ETA {duration(self._mean() * (len(left) - number))}" if self.seconds else ""
            self.say(f"level {level}: {name} ({number + 1} of {len(left)}){eta}")
            try:
                trial = self._try(level, len(listed), folder, name)
            except UnfitError as error:  # a format that is not for this model
                self.say(f"  {name}: {error}")
                continue
            self.trials.append(trial)
            self.seconds.append(time.perf_counter() - began)
            self.keep()
            met = "  meets the target" if trial.meets(self.target) else ""
            self.say(
                f"  {trial.latency:.2f}x faster, {trial.size:.2f}x smaller, "
                f"{trial.quality:+.2f} points{met}"
            )

    def _mean(self) -> float:
        return statistics.mean(self.seconds)

    def _try(self, level: int, count: int, folder: Path, name: str) -> Trial:
        split, data = self.options["split"], self.options["data"]
        if name not in stages.PLAIN:
            self.compress(folder, name)
        quality = stages.evaluate_run(folder, split, name=name, data=data).value
        if not math.isfinite(quality):
            raise UnfitError(f"its {self.state['metric']} is {quality}")
        faster = times_faster(self.dense, stages.open_run(folder), name)
        smaller = self.state["bytes"] / self._bytes(Place(folder, name))
        return Trial(level, count, name, faster, smaller, 100 * (quality - self.state["quality"]))

    def compress(self, folder: Path, name: str) -> None:
        """Makes a variant of a run."""
        stages.make_variant(folder, name, split=self.options["split"], data=self.options["data"])

    def _bytes(self, place: Place) -> int:
        made = Path(COMPRESSED, place.variant)
        folder = place.folder / (run.MODEL if place.variant in stages.PLAIN else made)
        return sum(file.stat().st_size for file in folder.glob(pipeline.MODEL_FILES))

    def folder(self, listed: Sequence[Stage]) -> Path:
        """The run that some stages end with."""
        return self.where / f"{len(listed)}-{listed[-1].kind}" if listed else self.run

    def learn(self, level: int, listed: Sequence[Stage]) -> None:
        """Runs the stages of a level that were not run, and says what is left."""
        if self.folder(listed).is_dir() and any(t.stages >= len(listed) for t in self.trials):
            return  # A shorter recipe would remove what comes after these.
        self.say(f"level {level}: units go, and what is left learns; at most {LEVELS - level} more")
        run.write_text(self.recipe, toml(listed))
        pipeline.pipeline(
            self.run, self.recipe, split=self.options["split"], data=self.options["data"],
            say=lambda line: self.say(f"  {line}"),
        )  # fmt: skip


def search(
    folder: str | Path,
    target: Target,
    *,
    split: str = "dev",
    data: str = "",
    epochs: float = 4.0,
    say: Callable[[str], None] = print,
) -> Found:
    """Looks for a variant of a run that meets a target.

    Args:
      folder: the run.
      target: what is wanted.
      split: what quality is measured on; one that the choice may see.
      data: where the run's data is now, if it has moved.
      epochs: what is left learns for, after every level.
      say: what lines of progress go to.

    Returns:
      What was tried, and the best that meets the target: with `recipe.toml`, which
      `fw compress RUN --recipe` makes it by again, and its `artifact`.

    Raises:
      FwError: as `fw.stages` does; what was done stays, and is not done again.
    """
    folder = Path(folder).resolve()
    options = {"split": split, "data": data, "epochs": float(epochs)}
    lesson = Stage("distil", {"epochs": float(epochs)})
    base = read_recipe(folder)
    if not (0 < epochs < math.inf):
        raise FwError(f"epochs is {epochs}; expected more than 0")
    if base.task in TAUGHT:  # refuses now what the first lesson would
        pipeline.KINDS["distil"].check(base, lesson)
    one = _Search(folder, target, options, say)
    one.work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(one.work / ".lock").acquire(timeout=0):
            return _search(one, lesson, LEVELS if base.task in TAUGHT else 0)
    except Timeout as error:
        raise FwError(f"{one.work}: another process searches it; wait for it") from error


def _search(one: _Search, lesson: Stage, levels: int) -> Found:
    """Where it was killed, or had ended, it comes again by what was tried."""
    one.open()
    prune = Stage("prune", {"flops": STEP, "multiple": MULTIPLE})
    enough, listed = Target(quality=one.target.quality), list[Stage]()
    names: Sequence[str] = FORMATS
    while True:
        level = listed.count(prune)
        one.try_formats(level, listed, names)
        if not listed:
            tried = [t for t in one.trials if t.level == 0]
            names = ("f32", *(t.variant for t in tried if t.meets(enough)))
        own = [t for t in one.trials if t.stages == len(listed)]
        if any(t.meets(one.target) for t in own):
            break
        # Fast and small enough, but not good enough: it learns once more.
        near = bool(listed) and any(t.meets(one.target, but="quality") for t in own)
        more = [lesson] if near else [prune, lesson]
        lost = bool(listed) and not any(t.meets(enough) for t in own)
        if (near and listed[-2] == lesson) or (not near and (lost or level == levels)):
            break
        try:
            one.learn(level + (not near), [*listed, *more])
        except UnfitError as error:  # units that cannot go
            one.say(f"level {level + 1}: {error}")
            break
        listed += more
    good = [t for t in one.trials if t.meets(one.target)]
    chosen = max(good, key=lambda t: (t.quality, t.latency)) if good else None
    if chosen is not None:
        _export(one, chosen, listed[: chosen.stages])
    return Found(tuple(one.trials), chosen, one.work)


def _export(one: _Search, chosen: Trial, listed: Sequence[Stage]) -> None:
    folder, made = one.folder(listed), Path(COMPRESSED, chosen.variant)
    if chosen.variant not in stages.PLAIN and not (folder / made).is_dir():
        one.compress(folder, chosen.variant)
    compress = [] if chosen.variant in stages.PLAIN else [
        Stage("compress", {"recipe": chosen.variant})
    ]  # fmt: skip
    run.write_text(one.work / CHOSEN, toml([*listed, *compress, Stage("export", {})]))
    stages.export_run(folder, name=chosen.variant, output=one.work / run.ARTIFACT)


def times_faster(dense: stages.Opened, opened: stages.Opened, name: str) -> float:
    """How many times faster than a run's model in float32 a variant of another is, in turns.

    16 rows of 64 tokens, or 16 images; the median of `ROUNDS`, on the device that is there.
    """
    rows = rows_to_time([(dense.processor, dense.task.name)])

    def ready(of: stages.Opened, name: str) -> Callable[[], Any]:
        variables, forward = stages.variant(of, name)
        with scope(of.mesh, of.rules):
            batch = put(rows, of.mesh, of.rules)
            call = jax.jit(forward).lower(variables, batch).compile()
        return lambda: jax.block_until_ready(call(variables, batch))

    runs, seconds = (ready(dense, "f32"), ready(opened, name)), ([], [])
    for number in range(ROUNDS + 2):  # the first two warm up
        for call, own in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            call()
            if number > 1:
                own.append(time.perf_counter() - began)
    first, second = map(statistics.median, seconds)
    return first / second


def toml(listed: Sequence[Stage]) -> str:
    """A recipe's file of stages.

    >>> print(toml([Stage("prune", {"flops": 0.5})]))
    [[stages]]
    stage = "prune"
    flops = 0.5
    <BLANKLINE>
    """

    def line(name: str, value: Any) -> str:
        return f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"

    return "\n".join(
        "\n".join(["[[stages]]", *(line(*item) for item in stage.spec().items()), ""])
        for stage in listed
    )


def report(name: str, trials: Sequence[Trial], target: Target) -> str:
    """A page: latency and size beside quality of all trials, those that no other beats joined."""
    best = front(trials)

    def drawn(what: str) -> Any:
        lines = [
            svg.Series(
                label, sorted((getattr(t, what), t.quality) for t in own), mark=mark, colour=c
            )
            for label, own, mark, c in (
                ("tried", trials, "loose", "b"),
                ("not beaten", best, "dots", "a"),
            )
        ]
        return svg.chart(what, lines, x="times less", y="points")

    cells = [
        [t.name, f"{t.latency:.2f}x", f"{t.size:.2f}x", f"{t.quality:+.2f}",
         "yes" if t.meets(target) else "no"]
        for t in best
    ]  # fmt: skip
    columns = ("not beaten", "latency", "size", "quality", "meets the target")
    heading = tag(
        "header",
        tag("p", "fw compress", class_="kicker"),
        tag("h1", name),
        tag("p", f"wanted: {target}"),
    )
    shown = tag("section", svg.columns(map(drawn, ("latency", "size"))), table(columns, cells))
    return document(f"{name}: fw compress", tag("main", heading, shown))
