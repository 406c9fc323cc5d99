"""How often a part of a compiled program runs in one step: trip counts, multiplied."""

import re
from typing import NamedTuple

from sharding.program.flow import Flow, Value
from sharding.program.hlo import Instruction

_LOOP = ("body", "condition")


class Times(NamedTuple):
    """How often a computation runs.

    Attributes:
        count: a loop whose trip count is unknown counts once, a branch as if it were taken.
        known: whether the trip counts of all loops around it are known.
        always: whether it stands in no branch.
    """

    count: int
    known: bool
    always: bool


class Loops:
    """The trip counts of one program."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._times = {flow.program.entry: Times(1, True, True)}

    def times(self, computation: str) -> Times:
        """How often a computation runs in one run of the program."""
        if computation not in self._times:
            total, known, always = 0, True, True
            for caller, key, _ in self.flow.callers[computation]:
                outer = self.times(caller.computation)
                trips = self.trips(caller) if key in _LOOP else 1
                more = 1 if key == "condition" and trips is not None else 0
                total += outer.count * ((1 if trips is None else trips) + more)
                known &= outer.known and trips is not None
                always &= outer.always and caller.opcode != "conditional"
            self._times[computation] = Times(total, known, always)
        return self._times[computation]

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None if the program does not say.

        From `known_trip_count` where the compiler left it, else from the condition: a counter that
        starts at a constant, goes up or down by one, and is compared with one.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text[1])
        if known:
            return int(known[1])
        body, condition = (loop.attributes[key].lstrip("%") for key in ("body", "condition"))
        test = self._settled(self.flow.root(condition, ()))
        if self.flow.at(test).opcode != "compare":
            return None
        left, right = (
            self._settled(Value(test.computation, n)) for n in self.flow.at(test).operands
        )
        direction = self.flow.at(test).attributes["direction"]
        if not self._carried(left, condition):
            left, right = right, left
            direction = direction.translate(str.maketrans("LG", "GL"))
        if not self._carried(left, condition):
            return None
        start = self.flow.constant(Value(loop.computation, loop.operands[0], left.path))
        limit, step = self.flow.constant(right), self._step(body, left.path)
        if start is None or limit is None or not step:
            return None
        return _count(start, limit, step, direction)

    def _settled(self, value: Value) -> Value:
        """Back through fusions and copies, but not out of a loop."""
        while True:
            before = self.flow.sources(value)
            is_carried = any(key in _LOOP for _, key, _ in self.flow.callers[value.computation])
            if len(before) != 1 or (self.flow.at(value).opcode == "parameter" and is_carried):
                return value
            value = before[0]

    def _carried(self, value: Value, computation: str) -> bool:
        return value.computation == computation and self.flow.at(value).opcode == "parameter"

    def _step(self, body: str, path: tuple[int, ...]) -> int | None:
        made = self._settled(self.flow.root(body, path))
        it = self.flow.at(made)
        if it.opcode not in ("add", "subtract"):
            return None
        left, right = (self._settled(Value(made.computation, name)) for name in it.operands)
        if it.opcode == "add" and not (self._carried(left, body) and left.path == path):
            left, right = right, left
        by = self.flow.constant(right)
        if by is None or not self._carried(left, body) or left.path != path:
            return None
        return by if it.opcode == "add" else -by


def _count(start: int, limit: int, step: int, direction: str) -> int | None:
    """How often `start, start + step, …` compares with the limit before it does not."""
    if direction in ("LE", "GE"):
        limit, direction = limit + (1 if direction == "LE" else -1), direction[0] + "T"
    distance = limit - start
    if direction == "NE" and distance % step == 0 and distance // step >= 0:
        return distance // step
    if (direction == "LT" and step > 0) or (direction == "GT" and step < 0):
        return max(0, -(-distance // step))
    return None
