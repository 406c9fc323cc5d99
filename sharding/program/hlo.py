"""A small, strict reader of the text of a compiled program (HLO).

`compiled.as_text()` becomes computations of instructions with shapes, operands and attributes, and
the tables of source lines. Nothing is evaluated and nothing is skipped: a line that cannot be read
raises with its number. `flow` follows values through the computations, `groups` says which devices
talk to each other, `collectives` what they say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sharding.errors import ShardingError
from sharding.program.shapes import Shape, close, read_shape, split, unreadable


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        opcode: as `all-gather-start`.
        computation: the computation it stands in.
        operands: names of instructions of the same computation.
        literal: what stands in the parentheses: a constant's value, a parameter's number.
        root: whether it is the computation's result.
        line: its number in the text, from 1.
        text: its shape and its attributes, not yet read.
    """

    name: str
    opcode: str
    computation: str
    operands: tuple[str, ...]
    literal: str
    root: bool
    line: int
    text: tuple[str, str]

    @cached_property
    def shape(self) -> Shape:
        """The shape of its result."""
        return read_shape(self.text[0], self.line)

    @cached_property
    def attributes(self) -> dict[str, str]:
        """Its attributes as text by name."""
        return _attributes(self.text[1])

    @cached_property
    def metadata(self) -> dict[str, str]:
        """`op_name`, `stack_frame_id` and the like, without quotes."""
        found = re.findall(
            r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s}]+)', self.attributes.get("metadata", "")
        )
        return {key: _unquoted(value) for key, value in found}

    @cached_property
    def called(self) -> tuple[tuple[str, str], ...]:
        """The computations that it calls, each with the attribute that names it."""
        found = []
        if not _CALL.search(self.text[1]):  # most have none: their attributes are not read
            return ()
        for key in _CALLS:
            names = re.findall(r"%?([\w.\-]+)", self.attributes.get(key, ""))
            found += [(key, name) for name in names]
        return tuple(found)

    def frontend(self, key: str) -> str | None:
        """One of its `frontend_attributes`, None if it has not got it."""
        found = re.search(
            rf'[{{,]\s*{re.escape(key)}="((?:[^"\\]|\\.)*)"',
            self.attributes.get("frontend_attributes", ""),
        )
        return None if found is None else found[1]


_CALLS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)
_CALL = re.compile(rf"(?:{'|'.join(_CALLS)})=")


@dataclass(frozen=True)
class Frame:
    """A line of source that led to an instruction."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """As "file:line function"."""
        return f"{self.file}:{self.line} {self.function}".strip()


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled program.

    Attributes:
        computations: instructions by name, by computation; operands stand before their users.
        entry: the computation that runs.
        header: the attributes of the module, such as `num_partitions`.
        tables: `FileNames` and the like, lines by number.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    header: dict[str, str]
    tables: dict[str, dict[int, str]]

    @cached_property
    def roots(self) -> dict[str, Instruction]:
        """The result of every computation."""
        return {
            name: next(i for i in body.values() if i.root)
            for name, body in self.computations.items()
        }

    @cached_property
    def parameters(self) -> dict[str, dict[int, Instruction]]:
        """The parameters of every computation, by number."""
        return {
            name: {int(i.literal): i for i in body.values() if i.opcode == "parameter"}
            for name, body in self.computations.items()
        }

    @property
    def devices(self) -> int:
        """How many devices run it."""
        return self.partitions * self.replicas

    @property
    def partitions(self) -> int:
        """How many parts its arrays are cut into."""
        return int(self.header.get("num_partitions", 1))

    @property
    def replicas(self) -> int:
        """How many copies of it run (`jax.pmap` only)."""
        return int(self.header.get("replica_count", 1))

    def frames(self, instruction: Instruction) -> list[Frame]:
        """The source lines that led to an instruction, the innermost first."""
        metadata = instruction.metadata
        if "source_file" in metadata:
            return [Frame(metadata["source_file"], int(metadata.get("source_line", 0)), "")]
        key, found = int(metadata.get("stack_frame_id", 0)), []
        stack, places = self.tables.get("StackFrames", {}), self.tables.get("FileLocations", {})
        # Parents are printed one too high, so that the outermost frame names itself.
        shift = _field(stack[1], "parent_frame_id") if 1 in stack else 0
        while key in stack:
            place = places[_field(stack[key], "file_location_id")]
            names = [_unquoted(self.tables[t][_field(place, field)]) for t, field in _NAMES]
            found.append(Frame(names[0], _field(place, "line"), names[1]))
            key = _field(stack[key], "parent_frame_id") - shift
        return found


_NAMES = (("FileNames", "file_name_id"), ("FunctionNames", "function_name_id"))
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")


def read(text: str) -> Program:
    """Read the text of a program.

    Args:
        text: what `jax.stages.Compiled.as_text` gives.

    Returns:
        The program.

    Raises:
        ShardingError: a line that cannot be read, or no entry.

    >>> program = read('''HloModule m, num_partitions=2
    ...
    ... ENTRY %main (x: f32[4]) -> f32[8] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}
    ... }''')
    >>> program.roots["main"].shape, program.partitions
    (Array(dtype='f32', dims=(8,)), 2)
    """
    computations: dict[str, dict[str, Instruction]] = {}
    tables: dict[str, dict[int, str]] = {}
    header: dict[str, str] = {}
    entry, inside, table = None, None, None
    for number, line in _lines(text):
        if inside is not None:
            if line.startswith("}"):
                inside = None
            elif line.strip():
                instruction = _instruction(line, number, inside)
                computations[inside][instruction.name] = instruction
        elif line.startswith("HloModule"):
            header = _attributes(line.partition(",")[2])
        elif line.strip() in _TABLES:
            table = tables.setdefault(line.strip(), {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
        elif found := _COMPUTATION.match(line):
            inside = found[2]
            computations[inside] = {}
            entry = inside if found[1] else entry
        elif line.strip():
            raise unreadable(line, number)
    if entry is None or not all(any(i.root for i in c.values()) for c in computations.values()):
        raise ShardingError(
            "this is not the text of a compiled program: it has no ENTRY computation, or one of "
            "its computations has no ROOT; expected what jax.jit(f).lower(*args).compile() gives"
        )
    return Program(computations, entry, header, tables)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines and their numbers; what a custom kernel tells of itself may break one, and is joined.

    >>> [*_lines("  %x = f32[] custom-call(), frontend_attributes={a={\\n'b':'c'\\n}}\\n}")]
    [(1, "  %x = f32[] custom-call(), frontend_attributes={a={'b':'c'}}"), (4, '}')]
    """
    number, held = 0, ""
    for at, line in enumerate(text.splitlines(), 1):
        begins, ends = _INSTRUCTION.match(line), line.startswith("}") and line[:2] != "}}"
        if held and line.strip() and not begins and not ends:
            held += line
            continue
        if held:
            yield number, held
            held = ""
        if begins:
            number, held = at, line
        else:
            yield at, line
    if held:
        yield number, held


def _instruction(line: str, number: int, computation: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    if start is None:
        raise unreadable(line, number)
    rest = line[start.end() :]
    end = close(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    opening = rest.find("(", end)
    closing = close(rest, opening) if opening >= 0 else -1
    if end < 0 or closing < 0 or not re.fullmatch(r"[\w\-]+", opcode):
        raise unreadable(line, number)
    literal = rest[opening + 1 : closing - 1]
    operands = () if opcode in ("constant", "parameter") else tuple(split(literal))
    return Instruction(
        name=start[2],
        opcode=opcode,
        computation=computation,
        operands=tuple(operand.split()[-1].lstrip("%") for operand in operands),
        literal=literal,
        root=start[1] is not None,
        line=number,
        text=(rest[:end], rest[closing:].lstrip(", ")),
    )


def _attributes(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in split(text))
    return {key: value for key, _, value in pairs}


def _field(text: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", text)
    return 0 if found is None else int(found[1])


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text
