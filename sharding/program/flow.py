"""Where values of a compiled program come from, where they go, and how often they are computed.

A value is an instruction and a path into its tuple. One step back or forth goes through tuples,
fusions, calls, loops and asynchronous pairs, as if the program were written in one piece.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

from sharding.program.hlo import Instruction, Program
from sharding.program.shapes import Array

# Operations that move their first operand without computing, whole or in part.
_MOVES = {
    *("copy", "convert", "bitcast", "bitcast-convert", "reduce-precision", "optimization-barrier"),
    *("transpose", "reshape", "reverse", "broadcast", "pad", "slice", "dynamic-slice"),
    *("all-gather", "all-to-all", "collective-permute", "collective-broadcast"),
}
_SPREADS = ("broadcast", "pad")  # their result holds more than the operand
_REDUCES = ("all-reduce", "reduce-scatter")
_COMBINED = (*_REDUCES, "all-gather", "all-to-all", "collective-permute")
# Element by element: the result has the operand's shape, and is made of it.
_ELEMENTWISE = {
    *("abs", "add", "atan2", "cbrt", "ceil", "clamp", "cosine", "divide", "erf", "exponential"),
    *("exponential-minus-one", "floor", "log", "log-plus-one", "logistic", "maximum", "minimum"),
    *("multiply", "negate", "power", "remainder", "round-nearest-afz", "round-nearest-even"),
    *("rsqrt", "select", "sign", "sine", "sqrt", "subtract", "tan", "tanh"),
}
_NEUTRAL = ("constant", "iota", "partition-id", "replica-id")


class Value(NamedTuple):
    """The result of an instruction, or the part of it at a path of tuple indices."""

    computation: str
    name: str
    path: tuple[int, ...] = ()


class Flow:
    """Steps between the values of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @cached_property
    def callers(self) -> dict[str, list[tuple[Instruction, str, int]]]:
        """By computation: the instruction that calls it, by which attribute, as which of them."""
        found = defaultdict(list)
        for body in self.program.computations.values():
            for instruction in body.values():
                for position, (key, name) in enumerate(instruction.called):
                    found[name].append((instruction, key, position))
        return found

    @cached_property
    def users(self) -> dict[tuple[str, str], list[Instruction]]:
        """By computation and name: the instructions that have it as an operand."""
        found = defaultdict(list)
        for name, body in self.program.computations.items():
            for instruction in body.values():
                for operand in dict.fromkeys(instruction.operands):
                    found[name, operand].append(instruction)
        return found

    def at(self, value: Value) -> Instruction:
        """The instruction of a value."""
        return self.program.computations[value.computation][value.name]

    # --- back ---

    def sources(self, value: Value) -> list[Value]:
        """The values that this one is a copy, a part or a rearrangement of; [] where it is made."""
        it, path = self.at(value), value.path
        opcode, found = it.opcode, []
        operands = [Value(value.computation, name) for name in it.operands]
        if opcode == "parameter":
            found = self._arguments(value, int(it.literal))
        elif opcode == "get-tuple-element":
            found = [operands[0]._replace(path=(int(it.attributes["index"]), *path))]
        elif opcode == "tuple":
            found = [operands[path[0]]._replace(path=path[1:])] if path else []
        elif opcode == "while":
            found = [operands[0]._replace(path=path), self.root(body_of(it), path)]
        elif opcode in ("fusion", "call", "conditional"):
            found = [self.root(name, path) for _, name in it.called]
        elif opcode.endswith(("-done", "-update")):
            found = [self._finished(operands[0], path)]
        elif opcode.endswith("-start"):
            found = self._started(it, path, operands)
        elif opcode == "concatenate" or (opcode == "custom-call" and _joins(it)):
            found = operands
        elif opcode == "dynamic-update-slice":
            found = operands[:2]
        elif opcode in _COMBINED and len(operands) > 1 and isinstance(it.shape, tuple):
            found = [operands[path[0]]] if path and opcode not in _REDUCES else []
        elif opcode in _MOVES and operands:
            found = [operands[0]._replace(path=path)]
        return found

    def root(self, computation: str, path: tuple[int, ...] = ()) -> Value:
        """The result of a computation, or the part of it at a path."""
        return Value(computation, self.program.roots[computation].name, path)

    def _arguments(self, value: Value, number: int) -> list[Value]:
        found = []
        for caller, key, position in self.callers[value.computation]:
            if caller.opcode == "while":
                start = Value(caller.computation, caller.operands[0], value.path)
                found += [start, self.root(body_of(caller), value.path)]
            elif caller.opcode == "conditional":
                found.append(Value(caller.computation, caller.operands[position + 1], value.path))
            elif key in ("calls", "called_computations") or caller.opcode == "call":
                found.append(Value(caller.computation, caller.operands[number], value.path))
        return found

    def _finished(self, start: Value, path: tuple[int, ...]) -> Value:
        """From the result of `-done` to the part of the result of `-start` that holds it."""
        opcode, shape = self.at(start).opcode, self.at(start).shape
        if opcode == "copy-start":
            return start._replace(path=(0,))
        # (operands, result, …) everywhere but where the result is all there is.
        inner = (1, *path) if isinstance(shape, tuple) and opcode.endswith("-start") else path
        return start._replace(path=inner)

    def _started(
        self, it: Instruction, path: tuple[int, ...], operands: list[Value]
    ) -> list[Value]:
        if "calls" in it.attributes:
            return [self.root(name, path[1:]) for _, name in it.called if path[:1] == (1,)]
        if it.opcode.removesuffix("-start") in _REDUCES:
            return []
        if len(operands) == 1 or it.opcode == "copy-start":
            return operands[:1]
        return [operands[path[1]]] if len(path) > 1 else []

    def origins(self, value: Value) -> set[Value]:
        """The values that this one is made of by copying, cutting and joining alone.

        Args:
            value: where to start.

        Returns:
            Values without sources: parameters of the entry, constants, results of computations.
        """
        found = set()
        for step in _walk(value, self.sources):
            if not self.sources(step):
                found.add(step)
        return found

    def arguments(self, value: Value) -> tuple[Value, ...]:
        """The entry's parameters that a value is made of; () if anything else takes part."""
        made = {o for o in self.origins(value) if not self._neutral(o)}
        entry = self.program.entry
        if all(o.computation == entry and self.at(o).opcode == "parameter" for o in made):
            return tuple(sorted(made, key=lambda o: (int(self.at(o).literal), o.path)))
        return ()

    def _neutral(self, value: Value) -> bool:
        it = self.at(value)
        return it.opcode in _NEUTRAL or "AllocateBuffer" in it.attributes.get(
            "custom_call_target", ""
        )

    def constant(self, value: Value) -> int | None:
        """The integer that a value always is; None if it is not known to be one."""
        made = [self.at(o) for o in self.origins(value)]
        literals = {i.literal if i.opcode == "constant" else "" for i in made}
        text = literals.pop() if len(literals) == 1 else ""
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def by_partition(self, value: Value) -> bool:
        """Whether a value depends on the number of the device."""

        def before(step: Value) -> list[Value]:
            it, moved = self.at(step), self.sources(step)
            operands = [Value(step.computation, name) for name in it.operands]
            return moved if moved and not set(moved) <= set(operands) else operands

        return any(
            self.at(s).opcode in ("partition-id", "replica-id") for s in _walk(value, before)
        )

    # --- forth ---

    def targets(self, value: Value, shaped: bool = False) -> list[tuple[Value, Instruction]]:
        """The values that a value is copied, cut or joined into, and the instruction of each.

        Args:
            value: where to start.
            shaped: also through operations element by element, sums over devices among them.

        Returns:
            (value, user); a user that does anything else with it is not among them.
        """
        comp, path, found = value.computation, value.path, []
        for user in self.users[comp, value.name]:
            for number, name in enumerate(user.operands):
                if name == value.name:
                    found += [(to, user) for to in self._into(value, user, number, shaped)]
        if self.at(value).root:
            for caller, key, _ in self.callers[comp]:
                if key == "body":
                    inside = self.program.parameters[comp][0].name
                    found.append((Value(comp, inside, path), caller))
                if key not in ("condition", "to_apply") or caller.opcode == "call":
                    inner = (1, *path) if caller.opcode.endswith("-start") else path
                    found.append((Value(caller.computation, caller.name, inner), caller))
        return found

    def _into(self, value: Value, user: Instruction, number: int, shaped: bool) -> list[Value]:
        comp, path, opcode = value.computation, value.path, user.opcode
        whole = Value(comp, user.name)
        if opcode == "get-tuple-element":
            fits = path[:1] == (int(user.attributes["index"]),)
            return [whole._replace(path=path[1:])] if fits else []
        if opcode == "tuple":
            return [whole._replace(path=(number, *path))]
        background = opcode.endswith("-start") and "calls" in user.attributes
        if background or opcode in ("while", "fusion", "call", "conditional"):
            return self._called(user, number, path)
        if opcode.endswith("-done"):
            return [whole._replace(path=path[1:])] if path[:1] == (1,) else [whole]
        base = opcode.removesuffix("-start")
        if base in _MOVES or (shaped and base in _REDUCES):
            return self._moved(value, user, number, shaped)
        last = {"concatenate": len(user.operands), "dynamic-update-slice": 2}.get(opcode, 0)
        joins = number < last or (opcode == "custom-call" and _joins(user))
        same = shaped and self._size(user) == self._size(self.at(value))
        predicate = opcode == "select" and number == 0
        return [whole] if joins or (same and opcode in _ELEMENTWISE and not predicate) else []

    def _moved(self, value: Value, user: Instruction, number: int, shaped: bool) -> list[Value]:
        base = user.opcode.removesuffix("-start")
        outer = (1,) if base != user.opcode else ()
        if user.opcode == "copy-start":
            return [Value(user.computation, user.name, (0,))]
        if len(user.operands) > 1 and base in _COMBINED and isinstance(user.shape, tuple):
            return [Value(user.computation, user.name, (*outer, number))]
        spreads = shaped and base in _SPREADS and self._size(user) != self._size(self.at(value))
        if number or spreads:
            return []
        return [Value(user.computation, user.name, outer)]

    def _called(self, user: Instruction, number: int, path: tuple[int, ...]) -> list[Value]:
        found = []
        for position, (_, name) in enumerate(user.called):
            parameters = self.program.parameters[name]
            if user.opcode == "conditional":
                if number == position + 1:
                    found.append(Value(name, parameters[0].name, path))
            elif number in parameters:
                found.append(Value(name, parameters[number].name, path))
        return found

    @staticmethod
    def _size(it: Instruction) -> int | None:
        return it.shape.size if isinstance(it.shape, Array) else None

    def results(self, value: Value) -> tuple[Value, ...]:
        """The parts of the program's result that a value flows to, element by element.

        A sum, a product of matrices or a value spread over a larger one ends the flow, so that a
        gradient is followed to the parameters that it updates and no further.
        """
        entry, root = self.program.entry, self.program.roots[self.program.entry].name
        steps = _walk(value, lambda v: [to for to, _ in self.targets(v, shaped=True)])
        return tuple(sorted(v for v in steps if v.computation == entry and v.name == root))


def body_of(loop: Instruction) -> str:
    """The computation that a `while` repeats."""
    return loop.attributes["body"].lstrip("%")


def _joins(it: Instruction) -> bool:
    return "ConcatBitcast" in it.attributes.get("custom_call_target", "")


def _walk(start: Value, step: Callable[[Value], list[Value]]) -> Iterator[Value]:
    """Every value that can be reached, once."""
    seen, waiting = {start}, [start]
    while waiting:
        value = waiting.pop()
        yield value
        fresh = [v for v in dict.fromkeys(step(value)) if v not in seen]
        seen.update(fresh)
        waiting += fresh
