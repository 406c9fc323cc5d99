"""Layouts that are known something of, and a plan: them ranked, printed, saved, read again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sharding.errors import ShardingError
from sharding.plan.analytic import FOR_A_TIME
from sharding.plan.compiler import Compiled, Refused
from sharding.plan.hardware import Hardware
from sharding.plan.options import OPTIONS
from sharding.plan.prediction import Held, Prediction, predict
from sharding.plan.program import Program, lowered_mesh, program
from sharding.plan.schedule import Schedule
from sharding.plan.search import Candidate, Variant
from sharding.plan.survey import Survey
from sharding.plan.terminal import table

VERSION = 1
"""Of `plan.json`."""


@dataclass(frozen=True)
class Layout:
    """A candidate, and what is known of it.

    Attributes:
        candidate: the mesh and the variant.
        prediction: by the compiled program; by the estimate alone where `compiled` is False.
        compiled: whether a compiler made it.
        refused: why there is no program, where a compiler was asked in vain.
        table: the timetable of the compiled program.
    """

    candidate: Candidate
    prediction: Prediction
    compiled: bool = False
    refused: str | None = None
    table: Schedule | None = None

    @property
    def works(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.refused is None and self.prediction.fits

    def __str__(self) -> str:
        """As the candidate."""
        return str(self.candidate)


@dataclass
class Plan:
    """Layouts of a step, the best first.

    Attributes:
        machine: what they are for.
        layouts: those that were compiled, then those that were estimated alone.
        considered: how many were estimated.
        lacking: what would have to be installed for a compiler to decide; None if one did.
        surveys: of each variant.
        tokens, flops: of a step.
        unit: what those are that `tokens` counts.
        about: what the step is of, for whoever trains by the plan.
        notes: what whoever reads the figures should know.
    """

    machine: Hardware
    layouts: list[Layout]
    considered: int
    lacking: str | None = None
    surveys: list[tuple[Variant, Survey]] = field(default_factory=list)
    tokens: int = 0
    flops: float = 0.0
    unit: str = "tokens"
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Layout:
        """The fastest that works.

        Raises:
            ShardingError: none does.
        """
        for one in self.layouts:
            if one.works:
                return one
        least = min(self.layouts, key=lambda one: one.prediction.memory.peak)
        over = least.prediction.memory.over
        why = f"lacks {over / 2**30:.1f} GiB of a device" if over > 0 else f"was: {least.refused}"
        raise ShardingError(
            f"none of {len(self.layouts)} layouts that were tried works on {self.machine}; the "
            f"least, {least}, {why}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As `plan.json` has it."""
        return {
            "version": VERSION,
            "hardware": str(self.machine),
            "devices": self.machine.devices,
            "considered": self.considered,
            "lacking": self.lacking,
            "unit": self.unit,
            "about": dict(self.about),
            "notes": self.notes,
            "best": _entry(self.best),
            "layouts": [_entry(one) for one in self.layouts],
        }

    def save(self, path: str | Path) -> None:
        """Writes `plan.json`."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        partial.replace(path)

    def __str__(self) -> str:
        """The ranked table."""
        return table(self)


def _entry(one: Layout) -> dict[str, Any]:
    return {
        "mesh": one.candidate.mesh,
        "choices": dict(one.candidate.variant.choices),
        "compiled": one.compiled,
        "refused": one.refused,
        "works": one.works,
        "prediction": one.prediction.to_dict(),
    }


def program_of(one: Candidate, machine: Hardware) -> Program:
    """The program of a candidate, traced for its mesh."""
    fn, args = one.variant.build(lowered_mesh(one.mesh, machine))
    return program(fn, args, machine, one.mesh, dict(OPTIONS.get(machine.chip.name, {})))


def judged(
    one: Candidate, result: Compiled | Refused, machine: Hardware, tokens: int, flops: float
) -> Layout:
    """What a compiler's result says of a candidate."""
    rough = rough_prediction(one, machine, tokens, flops)
    if isinstance(result, Refused):
        if result.needed is None:
            return Layout(one, rough, refused=result.reason)
        memory = replace(rough.memory, peak=max(result.needed, rough.memory.capacity + 1))
        return Layout(one, replace(rough, memory=memory), compiled=True, refused=result.reason)
    found, table = predict(
        result, machine, tokens=tokens, flops=one.variant.flops or flops,
        roofline=one.estimate.seconds, kinds=one.variant.kinds,
    )  # fmt: skip
    return Layout(one, found, compiled=True, table=table)


def rough_prediction(one: Candidate, machine: Hardware, tokens: int, flops: float) -> Prediction:
    """A prediction by the estimate alone."""
    own = one.estimate
    short = {k: v for k, v in own.held.items() if k not in FOR_A_TIME and v}
    for_a_time = sum(own.held[k] for k in FOR_A_TIME)
    held = Held(short, for_a_time, own.peak, machine.chip.memory, own.largest)
    return Prediction(
        own.seconds, tokens, one.variant.flops or flops, machine, held, own.compute, own.exposed,
        own.sent, {}, {}, {}, own.seconds, {"seconds": "an estimate; no compiler was asked"},
    )  # fmt: skip


def load(path: str | Path) -> dict[str, Any]:
    """The best layout of a `plan.json`, as `_entry` wrote it, with `hardware` and `about`.

    Raises:
        ShardingError: no plan, or of another version.
    """
    try:
        found = json.loads(Path(path).read_text())
        known = found["version"], found["best"]["mesh"], found["best"]["choices"]
        more = {name: found[name] for name in ("hardware", "devices")}
        more["about"] = dict(found.get("about", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardingError(f"{path}: cannot be read as a plan: {error}") from error
    if known[0] != VERSION:
        raise ShardingError(f"{path}: a plan of version {known[0]}, expected {VERSION}")
    return {**found["best"], **more}
