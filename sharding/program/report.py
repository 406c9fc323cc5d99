"""What the compiler made of a program: `inspect` reads it, a `Report` prints it.

Rules say where arrays live; the compiler decides what travels. This is where to look which
parameter or which line of a model causes which traffic, and what a device must hold.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sharding.errors import ShardingError
from sharding.layout import paths
from sharding.mesh import format_mesh
from sharding.program.arguments import Parameter, arguments
from sharding.program.collectives import Collective, collectives
from sharding.program.groups import coordinates
from sharding.program.hlo import Program, read

_ROWS = 40


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as `jax.stages.Compiled.memory_analysis` reports them.

    Attributes:
        arguments: of all arguments.
        outputs: of all outputs.
        aliased: of outputs that take the place of donated arguments.
        temporaries: of the block in which everything in between has its place.
        live: the most that is alive at once, as the compiler counts it, 0 where it does not. On
            CPU temporaries are missing in it; on TPU the fast memory, VMEM, is part of it.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    live: int

    @property
    def peak(self) -> int:
        """What a device needs: arguments + outputs - aliased + temporaries.

        The temporaries are one block that is taken before the program starts, so this, not
        `live`, is what must fit.
        """
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def to_dict(self) -> dict[str, int]:
        """Everything by name, `peak` with it."""
        return {"peak": self.peak, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Report:
    """What a compiled program moves and holds, by device.

    Attributes:
        mesh: sizes by axis.
        collectives: the largest traffic a step first.
        parameters: the arguments that the program uses, in order.
        memory: None where the compiler does not say.

    >>> report = inspect(jax.jit(lambda x: x + 1).lower(np.zeros(4, np.float32)).compile())
    >>> report.collectives, report.parameters[0].path, report.parameters[0].bytes
    ((), 'x', 16)
    """

    mesh: dict[str, int]
    collectives: tuple[Collective, ...]
    parameters: tuple[Parameter, ...]
    memory: Memory | None

    @property
    def wire(self) -> int:
        """Bytes that a device sends in a step; see `collectives.wire`."""
        return sum(one.step_bytes for one in self.collectives)

    @property
    def known(self) -> bool:
        """Whether the trip counts of all loops around collectives are known."""
        return all(one.known for one in self.collectives)

    def by_axes(self) -> dict[str, int]:
        """Bytes that a device sends in a step, by axes as `Collective.along` names them."""
        return _totals(self.collectives, lambda one: one.along)

    def by_kind(self) -> dict[str, int]:
        """Bytes that a device sends in a step, by kind."""
        return _totals(self.collectives, lambda one: one.kind)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, totals with it."""
        one = [
            dataclasses.asdict(c) | {"along": c.along, "step_bytes": c.step_bytes, "cause": c.cause}
            for c in self.collectives
        ]
        return {
            "mesh": self.mesh,
            "wire_bytes": self.wire,
            "known": self.known,
            "by_axes": self.by_axes(),
            "by_kind": self.by_kind(),
            "collectives": one,
            "parameters": [dataclasses.asdict(parameter) for parameter in self.parameters],
            "memory": None if self.memory is None else self.memory.to_dict(),
        }

    def table(self, rows: int | None = None) -> str:
        """The report as text.

        Args:
            rows: how many collectives to print, all by default.

        Returns:
            A table, the largest traffic first, then totals and memory. `?` marks a loop of unknown
            length, `|` a branch, `!` an array that is gathered whole only to be sliced again.
        """
        shown = self.collectives[:rows]
        cells = [("per step", "times", "collective", "axes", "operand", "cause", "line")]
        cells += [_row(one) for one in shown]
        lines = _aligned(cells) if shown else ["no collectives"]
        if rest := self.collectives[len(shown) :]:
            lines.append(f"and {len(rest)} more, {human(sum(c.step_bytes for c in rest))}")
        lines.append("")
        lines.append(f"mesh {_mesh_text(self.mesh)}, sent by each device in a step:")
        for name, totals in (("axes", self.by_axes()), ("kind", self.by_kind())):
            lines.append(f"  by {name}: {_joined(totals)}")
        lines.append(f"  total: {human(self.wire)}{'' if self.known else ' or more (?)'}")
        if self.memory is not None:
            lines.append(f"held by each device: {_joined(self.memory.to_dict())}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The table of the largest collectives."""
        return self.table(_ROWS)


def inspect(compiled: jax.stages.Compiled, *, mesh: Mesh | None = None) -> Report:
    """Read what a compiled program moves between devices, and what a device must hold.

    It sees every collective of XLA, also those that run in the background, inside loops, branches
    and fusions. It does not see what a custom kernel (Pallas) sends by itself.

    Args:
        compiled: what `jax.jit(f).lower(*args).compile()` gives, for any backend. Programs that
            were loaded from a cache of compilations may lack source lines.
        mesh: the mesh whose axes the report names; by default that of the program's arguments and
            outputs.

    Returns:
        The report; print it.

    Raises:
        ShardingError: no mesh or several; a mesh of other devices; text that cannot be read.

    >>> from sharding import make_mesh
    >>> mesh = make_mesh("data=1")
    >>> x = jax.device_put(np.ones((4, 4), np.float32), jax.NamedSharding(mesh, jax.P("data")))
    >>> print(inspect(jax.jit(lambda x: x @ x).lower(x).compile()))
    no collectives
    ...
    """
    if not isinstance(compiled, jax.stages.Compiled):
        raise ShardingError(
            f"inspect: expected a jax.stages.Compiled, as jax.jit(f).lower(*args).compile() gives, "
            f"got {type(compiled).__name__}"
        )
    text = compiled.as_text()
    if text is None:
        raise ShardingError("inspect: this backend does not show the text of its programs")
    program = read(text)
    mesh, where = _places(program, _meshes(compiled), mesh)
    names = mesh.axis_names if mesh is not None else ()
    inputs = arguments(compiled, program, mesh)
    outputs = paths(compiled.out_info)

    def argument(number: int, path: tuple[int, ...]) -> str:
        return inputs[path[0] if path else number][0]

    def output(path: tuple[int, ...]) -> str:
        position = path[0] if path else 0
        return (outputs[position] if position < len(outputs) else "") or f"output {position}"

    slices = 1 if mesh is None else mesh.size // program.devices
    found = collectives(program, where, names, argument, output, slices)
    return Report(
        mesh={} if mesh is None else dict(mesh.shape),
        collectives=tuple(sorted(found, key=lambda one: -one.step_bytes)),
        parameters=tuple(parameter for _, parameter in inputs if parameter is not None),
        memory=_memory(compiled),
    )


def _meshes(compiled: jax.stages.Compiled) -> list[Mesh]:
    every = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    found = (one.mesh for one in every if isinstance(one, NamedSharding))
    return [mesh for mesh in dict.fromkeys(found) if isinstance(mesh, Mesh)]


def _places(
    program: Program, known: list[Mesh], mesh: Mesh | None
) -> tuple[Mesh | None, np.ndarray]:
    """The mesh, and where in it the devices stand; partition i is the i-th of the program's own."""
    if mesh is None and program.devices == 1:
        return None, np.zeros((1, 0), int)
    if mesh is None and len(known) != 1:
        texts = ", ".join(map(format_mesh, known)) or "none"
        raise ShardingError(
            f"inspect: the program runs on {program.devices} devices and its arguments and "
            f"outputs name these meshes: {texts}; pass mesh= the one to name axes of"
        )
    chosen = known[0] if mesh is None else mesh
    devices = list((known[0] if known else chosen).devices.flat)
    slices = len(devices) // program.devices
    if slices > 1 and len({getattr(d, "slice_index", 0) for d in devices}) == slices:
        first = devices[0].slice_index  # each slice runs its own copy of the program
        devices = [d for d in devices if d.slice_index == first]
    if len(devices) != program.devices:
        raise ShardingError(
            f"inspect: the mesh {format_mesh(chosen)} has {len(devices)} devices, the program runs "
            f"on {program.devices}; pass mesh= the mesh it was compiled for"
        )
    return chosen, coordinates(chosen, devices)


def _memory(compiled: jax.stages.Compiled) -> Memory | None:
    found = compiled.memory_analysis()
    if found is None:
        return None
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        live=getattr(found, "peak_memory_in_bytes", 0),
    )


def human(size: int) -> str:
    """Bytes for people.

    >>> human(0), human(1536), human(5 * 2**20)
    ('0 B', '1.5 KiB', '5.0 MiB')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size} B"


def _totals(every: Iterable[Collective], key: Callable[[Collective], str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in every:
        found[key(one)] = found.get(key(one), 0) + one.step_bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _row(one: Collective) -> tuple[str, ...]:
    marks = ((not one.known, "?"), (not one.always, "|"), (one.resharding, "!"))
    times = "".join((str(one.count), *(mark for marked, mark in marks if marked)))
    operation = one.op_name.rpartition("/")[2]
    return (
        human(one.step_bytes),
        times,
        one.kind,
        one.along,
        one.shape,
        one.cause if one.cause != one.source else operation,
        one.source.rpartition("/")[2],
    )


def _aligned(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        numbers = [text.rjust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        words = [text.ljust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(numbers + words).rstrip())
    return lines


def _joined(totals: dict[str, int]) -> str:
    return ", ".join(f"{name} {human(size)}" for name, size in totals.items()) or "nothing"


def _mesh_text(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "of one device"
