"""A compiled program as a timetable: what computes when, what travels beside it, what must wait.

A compiled program is a sequence; this walks through it once, loop bodies once each. Computation
takes the cycles that the compiler estimates for it, where it does (TPUs), else the longer of its
products at the chip's rate and its bytes at the memory's. Collectives take what `network` says;
those that the compiler started in the background travel while the program goes on, one after
another, and hold it up only where it waits for them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from sharding.plan.hardware import Hardware
from sharding.plan.network import NETWORK, Way, carried, seconds, way
from sharding.plan.survey import SEES, ragged_flops
from sharding.program.collectives import ACROSS, Collective
from sharding.program.flow import Flow
from sharding.program.groups import members
from sharding.program.hlo import Instruction, Program
from sharding.program.loops import Loops
from sharding.program.shapes import Array, leaves, read_shape

MEMORY_SHARE = 0.75
"""Of a memory's peak rate, what large arrays read and written one after another reach. libtpu
counts 2.5 times the cycles that the peak would need, on every generation; these count by this."""

PRODUCT_SHARE = 0.7
"""Of a peak rate, what products reach where the compiler counts no cycles: GPUs and CPUs."""

RAGGED_SHARE = 0.85
"""Of a TPU's peak rate, what its kernel for products of uneven groups reaches, of which its
compiler counts nothing: a large product's share, and a tile of each group that is half empty."""

COMPUTE, KERNEL, SEND = "compute", "kernel", "send"

_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "copy-start"),
    *("copy-done", "slice-start", "slice-done", "broadcast", "async-start", "async-done"),
    *("async-update", "call-update", "add-dependency", "domain", "get-dimension-size"),
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that takes time.

    Attributes:
        kind: "compute", "kernel" (that the compiler counts nothing of) or "send".
        name: what it is, as people would say it.
        start: seconds from the beginning of the step, or of the loop's turn.
        duration: seconds.
        waits: of these, how many hold the program up; of computation all.
        times: how often, where it stands for the turns of a loop.
        axes: mesh axes that a collective goes over.
        bytes: sent by one device, of a collective.
        inside: the events of one turn of a loop.
    """

    kind: str
    name: str
    start: float
    duration: float
    waits: float
    times: int = 1
    axes: str = ""
    bytes: int = 0
    inside: tuple["Event", ...] = ()


@dataclass
class Schedule:
    """A step's timetable.

    Attributes:
        seconds: of the step.
        compute: seconds of products and other arithmetic; `counted`, of these by the compiler.
        kernels: seconds of kernels by their own account.
        exposed: seconds in which nothing is computed because a collective must come first.
        sent: seconds that collectives take, exposed or not, by mesh axes and kind.
        waited: of these, exposed.
        links: bytes over each link that a device sends through, by the links' name.
        events: in order; a loop is one.
        known: whether it is known how often every loop turns; one that is not turns once.
    """

    seconds: float = 0.0
    compute: float = 0.0
    counted: float = 0.0
    kernels: float = 0.0
    exposed: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)
    links: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    known: bool = True

    def add(self, turn: "Schedule", times: int, name: str) -> None:
        """Takes in the turns of a loop."""
        start = self.seconds
        self.known &= turn.known
        for key in ("seconds", "compute", "counted", "kernels", "exposed"):
            setattr(self, key, getattr(self, key) + times * getattr(turn, key))
        for name_ in ("sent", "waited", "links"):
            _add(getattr(self, name_), getattr(turn, name_), times)
        if turn.seconds:
            loop = Event(
                "loop", name, start, times * turn.seconds, times * turn.seconds, times,
                inside=tuple(turn.events),
            )  # fmt: skip
            self.events.append(loop)


def _add(mine: dict[str, float], theirs: Mapping[str, float], times: int = 1) -> None:
    for key, value in theirs.items():
        mine[key] = mine.get(key, 0.0) + times * value


class _Sent(NamedTuple):
    collective: Collective
    seconds: float
    links: Mapping[str, float]


def schedule(
    program: Program, found: Sequence[Collective], machine: Hardware, coords: np.ndarray
) -> Schedule:
    """The timetable of a compiled program.

    Args:
        program: its text, read.
        found: its collectives.
        machine: what it was compiled for.
        coords: where each of its partitions is, as in `Hardware.coords`.
    """
    return _Walk(program, found, machine, coords).of(program.entry)


class _Walk:
    def __init__(self, program, found, machine, coords):
        self.program, self.machine, self.chip = program, machine, machine.chip
        self.flow = Flow(program)
        self.loops = Loops(self.flow)
        self.sent = {one.line: self._sent(one, coords) for one in found}
        # Which collectives, by line, a computation that is called has in it.
        self.held = {
            name: [it.line for it in body.values() if it.line in self.sent]
            for name, body in program.computations.items()
        }
        self.turns: dict[str, Schedule] = {}

    def _sent(self, one: Collective, coords: np.ndarray) -> _Sent:
        route = self._route(one, coords)
        if route is None:
            return _Sent(one, 0.0, {})
        what = one.kind, route, one.operand_bytes, one.result_bytes
        links, outer = carried(*what)
        return _Sent(one, seconds(*what), links | ({NETWORK: outer} if outer else {}))

    def _route(self, one: Collective, coords: np.ndarray) -> Way | None:
        """How those reach each other who take part; None if everybody is alone."""
        it = next(
            body[one.name]
            for body in self.program.computations.values()
            if one.name in body and body[one.name].line == one.line
        )
        if one.axes == (ACROSS,):
            return Way(1, 1.0, {}, 0, self.machine.slices, self.chip.dcn, 1.0)
        groups = members(it, one.kind, self.program.partitions, self.program.replicas)
        groups = [group for group in groups if len({*group}) > 1]
        if not groups:
            return None
        if one.kind == "collective-permute":
            return way(self.machine, coords[[*groups[0]]])
        # They are alike; the first and the last stand for all.
        ways = [way(self.machine, coords[[*group]]) for group in (groups[0], groups[-1])]
        return min(ways, key=lambda w: w.rate)

    def of(self, computation: str) -> Schedule:
        """One run of a computation."""
        if computation in self.turns:
            return self.turns[computation]
        found = Schedule()
        free = {False: 0.0, True: 0.0}  # when the network is, inside a slice and across slices
        ends = {}  # when what was started is there
        for it in self.program.computations[computation].values():
            sent = self._collective(it)
            chain = self._chain(it)
            if sent is not None:
                one = sent.collective
                across = one.axes == (ACROSS,)
                began = max(found.seconds, free[across])
                end = free[across] = began + sent.seconds
                key = f"{one.kind} {one.along}"
                found.sent[key] = found.sent.get(key, 0.0) + sent.seconds
                _add(found.links, sent.links)
                if chain is not None or it.opcode.endswith("-start") or it.opcode == "send":
                    ends[chain or _meets(it) or it.name] = (end, key, len(found.events))
                    wait = 0.0
                else:
                    wait = end - found.seconds
                    found.waited[key] = found.waited.get(key, 0.0) + wait
                event = Event(
                    SEND, f"{one.kind} {one.cause}", began, sent.seconds, wait,
                    axes=one.along, bytes=one.wire_bytes,
                )  # fmt: skip
                found.events.append(event)
                found.exposed += wait
                found.seconds += wait
                continue
            if (waited := self._waits_for(it, chain, ends)) is not None:
                end, key, place = ends.pop(waited)
                if (wait := max(0.0, end - found.seconds)) > 0:
                    found.events[place] = replace(found.events[place], waits=wait)
                    found.waited[key] = found.waited.get(key, 0.0) + wait
                    found.exposed += wait
                    found.seconds += wait
                continue
            self._run(it, found)
        self.turns[computation] = found
        return found

    def _run(self, it: Instruction, found: Schedule) -> None:
        if it.opcode == "while":
            trips = self.loops.trips(it)
            body = self.of(it.attributes["body"].lstrip("%"))
            found.known &= trips is not None
            found.add(body, 1 if trips is None else trips, _name(it))
        elif it.opcode == "conditional":
            branches = [self.of(name) for _, name in it.called]
            found.add(max(branches, key=lambda s: s.seconds), 1, _name(it))
        elif it.opcode == "call" and self.chip.platform != "cpu":
            found.add(self.of(it.called[0][1]), 1, _name(it))
        elif it.opcode not in _FREE:
            kind, took, counted = self._compute(it)
            if took:
                found.events.append(Event(kind, _name(it), found.seconds, took, took))
                found.seconds += took
                found.compute += took if kind == COMPUTE else 0.0
                found.kernels += took if kind == KERNEL else 0.0
                found.counted += took if counted else 0.0

    def _collective(self, it: Instruction) -> _Sent | None:
        """What an instruction sends: itself, or what it calls."""
        if it.line in self.sent:
            return self.sent[it.line]
        if it.opcode in ("fusion", "async-start", "call-start"):  # the last on sparse cores
            for _, name in it.called:
                if held := self.held.get(name):
                    return self.sent[held[0]]
        return None

    def _chain(self, it: Instruction) -> str | None:
        """The chain of a TPU's background collective that an instruction starts or waits for."""
        if it.opcode != "fusion" or not it.name.startswith("async-collective"):
            return None
        for _, name in it.called:
            for inner in self.program.computations[name].values():
                if (chain := inner.frontend("chain_id")) is not None:
                    return f"chain {chain}"
        return None

    def _waits_for(self, it: Instruction, chain: str | None, ends: dict) -> str | None:
        if chain is not None and chain in ends:
            return chain
        if it.opcode.endswith("-done"):
            body = self.program.computations[it.computation]
            started = (self._started(body, name) for name in it.operands if name in body)
            known = [_meets(body[name]) or name for name in started]
            return next((name for name in known if name in ends), None)
        return None

    def _started(self, body: dict[str, Instruction], name: str) -> str:
        """What began what a `-done` ends: its operand, behind an `-update` where there is one."""
        return body[name].operands[0] if body[name].opcode.endswith("-update") else name

    # --- computation ---

    def _compute(self, it: Instruction) -> tuple[str, float, bool]:
        """Kind, seconds, and whether the compiler counted them."""
        memory = self._bytes(it) / (MEMORY_SHARE * self.chip.hbm)
        if it.opcode == "custom-call" and (kernel := self._kernel(it)) is not None:
            return KERNEL, max(kernel, memory), False
        cycles = _CYCLES.search(it.text[1])
        if cycles and self.chip.counted:
            own = int(cycles[1]) * self.chip.cycle
            apart = self._products(it) or self._rows(it)  # no large arrays one after another
            return COMPUTE, own if apart else min(own, memory), True
        if self.chip.counted:  # a TPU's compiler counts whatever takes time
            return COMPUTE, 0.0, True
        rate = self.chip.flops["bfloat16" if self._narrow(it) else "float32"]
        flops = sum(product_flops(*product) for product in self._products(it))
        return COMPUTE, max(flops / (PRODUCT_SHARE * rate), memory), False

    def _bytes(self, it: Instruction) -> int:
        """What it reads and writes of the large memory."""
        body = self.program.computations[it.computation]
        texts = [it.text[0], *[body[name].text[0] for name in it.operands if name in body]]
        sliced = "slice" in it.name  # of a large operand it touches as much as its result has
        sizes = [_in_memory(text) for text in texts]
        rows = self._rows(it)
        for place in {place for place, _, _ in rows}:
            own, size = [one for one in rows if one[0] == place], sizes[1 + place]
            if any(changed for _, _, changed in own):  # in place: the result is the operand
                sizes[0] -= min(sizes[0], size)
            sizes[1 + place] = min(size, sum(touched for _, touched, _ in own))
        if sliced and len(sizes) > 1:
            least = min(size for size in sizes if size) if any(sizes) else 0
            return 2 * min(least, sizes[0]) if "update" in it.name else 2 * sizes[0]
        return sum(sizes)

    def _rows(self, it: Instruction) -> list[tuple[int, int, bool]]:
        """Operands of which an instruction reads or changes some rows.

        As place, bytes of these rows, and whether it changes them.
        """
        body, found, whole = {it.name: it}, [], set()
        if it.opcode == "fusion":
            body = self.program.computations[dict(it.called)["calls"]]
        for inner in body.values():
            rows = inner.opcode in ("gather", "scatter")
            first = self._parameter(inner.operands[0], body) if rows and inner is not it else 0
            if rows and first is not None:
                changed, around = (
                    inner.opcode == "scatter", self.program.computations[inner.computation]
                )  # fmt: skip
                touched = around[inner.operands[-1]] if changed else inner  # updates stand last
                size = _in_memory(touched.text[0])
                found.append((first, 2 * size if changed else size, changed))
            if inner is not it and inner.opcode != "bitcast":  # what else reads them reads all
                others = inner.operands[1:] if rows else inner.operands
                whole |= {self._parameter(name, body) for name in others}
        return [one for one in found if one[0] not in whole]

    def _parameter(self, name: str, body: dict[str, Instruction]) -> int | None:
        """The number of the parameter that a name stands for; None if it is of none."""
        it = body[name]
        while it.opcode == "bitcast":
            it = body[it.operands[0]]
        return int(it.literal) if it.opcode == "parameter" else None

    def _products(self, it: Instruction) -> list[tuple[Instruction, dict[str, Instruction]]]:
        """The products in an instruction, each with the instructions around it."""
        if it.opcode in ("dot", "convolution") or _is_gemm(it):
            return [(it, self.program.computations[it.computation])]
        found = []
        for key, name in it.called:
            if key in ("calls", "to_apply", "called_computations") and it.opcode != "reduce":
                for inner in self.program.computations[name].values():
                    found += self._products(inner)
        return found

    def _narrow(self, it: Instruction) -> bool:
        return any(
            "bf16" in body[name].text[0] or "f8" in body[name].text[0]
            for product, body in self._products(it)
            for name in product.operands[:1]
        )

    def _kernel(self, it: Instruction) -> float | None:
        """Seconds of a kernel that is no part of XLA: of attention by its products."""
        target = it.attributes.get("custom_call_target", "")
        name = it.metadata.get("op_name", "") + it.name
        attention = "splash" in name or "flash" in name or "fmha" in target
        if not (attention or "tpu_custom_call" in target):
            return None
        body = self.program.computations[it.computation]
        shapes = [next(leaves(body[n].shape)) for n in it.operands if n in body]
        if "ragged-dot" in name and (out := next(leaves(it.shape))).dtype != "s32":
            flops = ragged_flops(*(a.dims for a in (*shapes[-2:], out)))
            return flops / (RAGGED_SHARE * self.chip.flops["bfloat16"])
        if not attention:
            return 0.0
        large = [s for s in shapes if len(s.dims) == 4 and s.dtype in ("bf16", "f16")]
        if not large:
            return 0.0
        batch, heads, length, size = _attention_dims(large[0])
        seen = SEES.search(name)
        share = float(seen[1]) if seen else 1.0
        backward = 2.5 if "fmha" in target and "ackward" in target else 1.0
        products = 3 if "_dq" in name else 4 if "_dkv" in name else 2 * backward
        flops = 2 * products * batch * heads * length**2 * size * share
        return flops / (self.chip.busy * self.chip.flops["bfloat16"])


def _meets(it: Instruction) -> str | None:
    """What the sending and the receiving half of a transfer between slices have in common."""
    return it.frontend("_xla_host_transfer_rendezvous")


def _name(it: Instruction) -> str:
    """What people know it by: the end of the path of functions that made it."""
    parts = it.metadata.get("op_name", "").split("/")
    shown = [p for p in parts if not p.startswith(("jit(", "eval_jaxpr", "shard_map", "call_exp"))]
    return "/".join(shown[-2:]) or it.name


def _in_memory(text: str) -> int:
    """Bytes of a shape's arrays that are not in a TPU's fast memory."""
    total = 0
    for found in re.finditer(r"(\w+\[[\d,]*\])(\{[^{}]*\})?", text):
        if not (found[2] and re.search(r"S\([1-9]\d*\)", found[2])):
            total += sum(array.bytes for array in leaves(read_shape(found[1])))
    return total


def _is_gemm(it: Instruction) -> bool:
    target = it.attributes.get("custom_call_target", "")
    return it.opcode == "custom-call" and ("gemm" in target or "matmul" in target)


def product_flops(it: Instruction, body: dict[str, Instruction]) -> int:
    """Products and sums of one instruction that multiplies arrays.

    A result's element is a sum over what is contracted: the operands' sizes say how many.
    """
    out = max((a.size for a in leaves(it.shape)), default=0)
    sides = [max((a.size for a in leaves(body[n].shape)), default=0) for n in it.operands[:2]]
    if len(sides) < 2 or not out:
        return 0
    if it.opcode == "convolution":
        kernel = next(leaves(body[it.operands[1]].shape))
        labels = re.search(r"dim_labels=\w+_(\w+)->", it.text[1])
        features = kernel.dims[labels[1].index("o")] if labels else kernel.dims[-1]
        return 2 * out * kernel.size // max(features, 1)
    batch = 1
    dims = re.search(r"lhs_batch_dims=\{([\d,]*)\}", it.text[1])
    lhs = next(leaves(body[it.operands[0]].shape))
    if dims and dims[1]:
        batch = math.prod(lhs.dims[int(d)] for d in dims[1].split(","))
    # [batch, m, k] x [batch, k, n] -> [batch, m, n]
    return int(2 * out * math.sqrt(sides[0] * sides[1] / (out * batch)) + 0.5)


def _attention_dims(x: Array) -> tuple[int, int, int, int]:
    """Batch, heads, length and head of an operand, whichever way round they lie."""
    batch, a, b, size = x.dims
    return (batch, a, b, size) if a <= b else (batch, b, a, size)
