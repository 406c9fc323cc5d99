"""What travels between devices in a compiled program: each collective, its axes, bytes and cause.

`groups` knows who takes part, `flow` how often and whose value it is; here they become one record
a collective. `report` prints them, `contract` refuses them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sharding.errors import ShardingError
from sharding.program.flow import Flow, Value
from sharding.program.groups import axes_of, members
from sharding.program.hlo import Instruction, Program
from sharding.program.loops import Loops
from sharding.program.shapes import Array, leaves
from sharding.program.sources import inside, source

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Every kind of collective that XLA has."""


ACROSS = "slices"
"""The axis of what goes from one slice of TPUs to another: whatever `dcn.` cuts."""
_MEGASCALE = "xla_megascale_runtime"


@dataclass(frozen=True)
class Collective:
    """One collective of a program. Bytes are those of one device.

    Attributes:
        kind: one of `KINDS`. The sum and slice that TPUs run as one is a reduce-scatter.
        axes: the smallest set of mesh axes within which it moves data; () if it moves none.
        regular: whether its groups are whole lines, planes … of the mesh along `axes`; half an
            axis, or a few devices of it, are irregular.
        devices: how many devices a group has.
        dtype: the elements' dtype; several are joined by "+".
        shape: the operand's shape on one device; of several the first, and how many more.
        operand_bytes: bytes that go in, in one execution.
        result_bytes: bytes that come out, in one execution.
        wire_bytes: bytes that a device sends, in one execution; see `wire`.
        count: executions a step, the trip counts of loops multiplied.
        known: whether `count` is; a loop of unknown length counts once.
        always: whether it stands in no branch; a branch counts as if it were taken.
        asynchronous: whether the compiler lets it run beside other work.
        parameters: the program's arguments that it moves, when it moves nothing else.
        outputs: what it flows to element by element: donated arguments that it updates, such as a
            gradient's, or outputs.
        source: the line of the user's program that made it, as "file:line function".
        frames: all lines of the traced function that led to it, the innermost first.
        op_name: the operation in the traced program that made it.
        resharding: whether a whole array is gathered only to be sliced again by device, which is
            how an involuntary full rematerialisation looks.
        name: its name in the program's text.
        line: its line there.
    """

    kind: str
    axes: tuple[str, ...]
    regular: bool
    devices: int
    dtype: str
    shape: str
    operand_bytes: int
    result_bytes: int
    wire_bytes: int
    count: int
    known: bool
    always: bool
    asynchronous: bool
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    frames: tuple[str, ...]
    op_name: str
    resharding: bool
    name: str
    line: int

    @property
    def step_bytes(self) -> int:
        """Bytes that a device sends in a step."""
        return self.count * self.wire_bytes

    @property
    def along(self) -> str:
        """The axes as text: "data,fsdp", "irregular(tensor)", "-" for none."""
        text = ",".join(self.axes)
        return (text or "-") if self.regular else f"irregular({text})"

    @property
    def cause(self) -> str:
        """The best answer to why it is there: a parameter, an output, a line, an operation."""
        if self.parameters:
            return _some(self.parameters)
        if self.outputs:
            return f"-> {_some(self.outputs)}"
        return self.source or self.op_name or self.name


def wire(kind: str, devices: int, operand_bytes: int, result_bytes: int) -> int:
    """The bytes that one device must send at least.

    Of the algorithms that need the least bandwidth, for n devices (Thakur, Rabenseifner, Gropp:
    Optimization of Collective Communication Operations in MPICH, IJHPCA 19(1), 2005): all-reduce
    2 (n - 1)/n of its operand, reduce-scatter and all-to-all (n - 1)/n of it, all-gather
    (n - 1)/n of its result. A permutation sends its operand, a broadcast passes it on once. A
    ragged all-to-all counts as if its rows were spread evenly: the program does not say how many
    travel.

    Args:
        kind: one of `KINDS`.
        devices: how many exchange data with each other.
        operand_bytes: bytes that go in on one device.
        result_bytes: bytes that come out on one device.

    Returns:
        Bytes, rounded up.

    >>> wire("all-reduce", 4, 100, 100), wire("all-gather", 4, 25, 100)
    (150, 75)
    """
    if devices == 1:
        return 0
    whole = result_bytes if kind == "all-gather" else operand_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return whole
    times = 2 if kind == "all-reduce" else 1
    return -(-times * (devices - 1) * whole // devices)


def collectives(
    program: Program,
    where: np.ndarray,
    axes: Sequence[str],
    argument: Callable[[int, tuple[int, ...]], str],
    output: Callable[[tuple[int, ...]], str],
    slices: int = 1,
) -> tuple[Collective, ...]:
    """Every collective that a program runs, in the order of its text.

    Args:
        program: a compiled program.
        where: the place of every device in the mesh.
        axes: the names of the mesh's axes.
        argument: the name of the entry's parameter with this number, or of a part of it.
        output: the name of the part of the program's result at this path.
        slices: how many slices run the program, each its own copy; what they send each other goes
            over the axes `(ACROSS,)`.

    Returns:
        One record an instruction; an asynchronous pair is one.

    Raises:
        ShardingError: a collective that cannot be read.
    """
    flow = Flow(program)
    loops = Loops(flow)
    found = []
    for it, base in _found(program, flow):
        times = loops.times(it.computation)
        if not times.count:
            continue
        caller = _wrapper(it, flow)
        scattered = _scattered(it, flow)
        result = program.roots[it.computation] if scattered else _finish(it, flow)
        kind = "reduce-scatter" if scattered else base
        across = _across(it) is not None
        groups = () if across else members(it, kind, program.partitions, program.replicas)
        directed = kind == "collective-permute"
        if directed:  # a device that keeps its own part sends nothing
            groups = tuple(pair for pair in groups if pair[0] != pair[1])
        names, regular = axes_of(groups, where, axes, directed)
        width = slices if across else max(map(len, groups), default=1)
        names, regular = ((ACROSS,), True) if across else (names, regular)
        inputs = [program.computations[it.computation][operand] for operand in it.operands]
        if kind == "ragged-all-to-all" or it.opcode == "send":
            inputs = inputs[:1]  # the others are offsets, and a token
        arrays = [array for i in inputs for array in leaves(i.shape)]
        given = sum(array.bytes for array in arrays)
        taken = given if it.opcode == "send" else sum(a.bytes for a in leaves(result.shape))
        described = next((i for i in (it, caller) if i and i.metadata), it)
        op_name = described.metadata.get("op_name", "")
        every = program.frames(described)
        frames = inside(every, op_name)
        line = source(frames, traced=len(frames) < len(every))
        moved = [v for i in inputs for v in flow.arguments(Value(it.computation, i.name))]
        after = _after(it, result, flow)
        updated = [v for a in after for v in flow.results(a)]
        found.append(
            Collective(
                kind=kind,
                axes=names,
                regular=regular,
                devices=width,
                dtype="+".join(dict.fromkeys(a.dtype for a in arrays)),
                shape=_shape(arrays),
                operand_bytes=given,
                result_bytes=taken,
                wire_bytes=wire(kind, width, given, taken),
                count=times.count,
                known=times.known,
                always=times.always,
                asynchronous=_background(it, caller),
                parameters=tuple(
                    dict.fromkeys(argument(int(flow.at(v).literal), v.path) for v in moved)
                ),
                outputs=tuple(dict.fromkeys(output(v.path) for v in updated)),
                source="" if line is None else str(line),
                frames=tuple(map(str, frames)),
                op_name=op_name,
                resharding=kind == "all-gather"
                and not op_name.rpartition("/")[2].startswith("all_gather")
                and any(_only_sliced(value, flow) for value in after),
                name=it.name,
                line=it.line,
            )
        )
    return tuple(found)


def _found(program: Program, flow: Flow) -> Iterator[tuple[Instruction, str]]:
    for body in program.computations.values():
        for it in body.values():
            base = it.opcode
            for end in ("-start", "-update", "-done"):
                base = base.removesuffix(end)
            if it.opcode == "send" and (kind := _across(it)) is not None:
                yield it, kind
            elif it.opcode == "send" and it.attributes.get("is_host_transfer") != "true":
                yield it, "collective-permute"
            elif base in KINDS:
                if not it.opcode.endswith(("-update", "-done")) and not _again(it, flow):
                    yield it, base
            elif it.opcode.startswith(("all-", "collective-", "ragged-", "reduce-scatter")):
                raise ShardingError(
                    f"HLO line {it.line}: {it.opcode!r} is a collective that is not known here; it "
                    f"has to learn how many bytes it moves"
                )


def _across(it: Instruction) -> str | None:
    """The kind of what a slice of TPUs sends to other slices by its host, None if nothing."""
    if it.opcode != "send" or it.frontend("_xla_host_transfer_handler_name") != _MEGASCALE:
        return None
    found = (it.frontend("_xla_megascale_transfer_type") or "").lower().replace("_", "-")
    if found not in KINDS:
        raise ShardingError(
            f"HLO line {it.line}: {it.name} sends {found!r} to other slices; it is not known here"
        )
    return found


def _again(it: Instruction, flow: Flow) -> bool:
    """Whether it is one of the copies that a TPU makes of an asynchronous collective.

    There the collective stands in the fusion that starts it, in every fusion that runs beside it,
    and in the one that waits for it, each with the same `chain_id`; the first counts.
    """
    targets = [user.text[1] for user in flow.users[it.computation, it.name]]
    starts = any("AsyncCollectiveStart" in text for text in targets)
    chained = it.frontend("chain_id") is not None
    if not chained and any("AsyncCollective" in text for text in targets):
        raise ShardingError(
            f"HLO line {it.line}: {it.name} runs in the background but has no chain_id, so its "
            f"copies cannot be told from others like it"
        )
    return chained and not starts


def _wrapper(it: Instruction, flow: Flow) -> Instruction | None:
    """The fusion or asynchronous pair that a collective stands in."""
    callers = [caller for caller, key, _ in flow.callers[it.computation] if key == "calls"]
    return callers[0] if len(callers) == 1 else None


def _background(it: Instruction, caller: Instruction | None) -> bool:
    started = [i for i in (it, caller) if i is not None and i.opcode.endswith("-start")]
    return bool(started) or it.opcode == "send" or it.frontend("chain_id") is not None


def _scattered(it: Instruction, flow: Flow) -> bool:
    """Whether it is the sum of a fused sum and slice, which TPUs run as a reduce-scatter."""
    caller, root = _wrapper(it, flow), flow.program.roots[it.computation]
    if it.opcode != "all-reduce" or caller is None or caller.opcode != "fusion" or root is it:
        return False
    smaller = next(leaves(root.shape)).size < next(leaves(it.shape)).size
    made = flow.origins(Value(it.computation, root.name))
    return smaller and made == {Value(it.computation, it.name)}


def _finish(it: Instruction, flow: Flow) -> Instruction:
    """The instruction whose result is the collective's."""
    if it.opcode == "send" or not it.opcode.endswith("-start"):
        return it
    waiting = flow.users[it.computation, it.name]
    while waiting:
        if waiting[0].opcode.endswith("-done"):
            return waiting[0]
        waiting = flow.users[it.computation, waiting[0].name]
    raise ShardingError(f"HLO line {it.line}: {it.name} starts a collective that nothing waits for")


def _after(it: Instruction, result: Instruction, flow: Flow) -> list[Value]:
    """The arrays of a collective's result; of a TPU's chain, where it is waited for."""
    chain = it.frontend("chain_id")
    if chain is not None:
        for body in flow.program.computations.values():
            for end in body.values():
                if "AsyncCollectiveDone" in end.text[1] and any(
                    body[name].frontend("chain_id") == chain for name in end.operands
                ):
                    return [Value(end.computation, end.name)]
    width = len(result.shape) if isinstance(result.shape, tuple) else 0
    paths = [(number,) for number in range(width)] or [()]
    return [Value(result.computation, result.name, path) for path in paths]


def _only_sliced(value: Value, flow: Flow) -> bool:
    """Whether all that is done with a value is to take the device's own part of it."""
    entry, seen, waiting, sliced = flow.program.entry, {value}, [value], False
    while waiting:
        step = waiting.pop()
        if step.computation == entry and flow.at(step).root:
            return False
        moved = flow.targets(step)
        users = flow.users[step.computation, step.name]
        carried = {user.name for _, user in moved}
        if any(u.name not in carried and u.opcode != "get-tuple-element" for u in users):
            return False
        for to, user in moved:
            if user.opcode == "dynamic-slice" and to.computation == step.computation:
                offsets = (Value(user.computation, name) for name in user.operands[1:])
                if not any(map(flow.by_partition, offsets)):
                    return False
                sliced = True
            elif to not in seen:
                seen.add(to)
                waiting.append(to)
    return sliced


def _shape(arrays: list[Array]) -> str:
    text = f"{arrays[0].dtype}[{','.join(map(str, arrays[0].dims))}]" if arrays else ""
    return f"{text} +{len(arrays) - 1}" if len(arrays) > 1 else text


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (+{len(names) - 1})"
