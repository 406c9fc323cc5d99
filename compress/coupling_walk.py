"""A walk through a traced program that gives every axis of every value its numbers.

Primitives do to numbers what `compress.coupling_rules` says; programs within are walked in place, a
scan along parameters layer by layer, so that each layer's entries have numbers of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core

from compress.classes import FIXED, Classes, Numbers
from compress.coupling_rules import RULES, Axes, fix, fixed, same

LARGEST = 1 << 20
"""Elements of a constant that is computed to see along which axes it is the same."""


@dataclass(frozen=True, eq=False)
class Event:
    """Something that a program did.

    Attributes:
        layers: numbers of the layers of stacks that it was in.
        kind: "value" that was made, or "cut" of entries of an axis.
        axes: of the value, or the entries.
    """

    layers: tuple[Numbers, ...]
    kind: str
    axes: Axes


Sized = tuple[Numbers | None, int]
"""An axis of a product: its numbers, and its size."""


@dataclass(eq=False)
class Value:
    """What is known of a value: numbers of its axes, made when asked for."""

    shape: tuple[int, ...]
    axes: Axes | None = None
    leaf: "Leaf | None" = None
    known: Any = None


class Leaf:
    """A parameter: as a whole, or each entry of its first axis on its own, or both."""

    def __init__(self, walk: "Walk", path: str, shape: tuple[int, ...]):
        self.walk, self.path, self.shape = walk, path, shape
        self.first: Numbers | None = None
        self.rest: Axes | None = None
        self.entries: dict[int, Axes] = {}

    def rows(self) -> Numbers:
        """Numbers of its first axis."""
        if self.first is None:
            self.first = self.walk.name(self, -1, 0, self.shape[0])
        return self.first

    def stay(self) -> None:
        """No entry of its first axis may go."""
        self.walk.classes.fix(self.rows())

    def whole(self) -> Axes:
        """Numbers of all axes."""
        if not self.shape:
            return ()
        if self.rest is None:
            self.rest = tuple(
                self.walk.name(self, -1, i, n) for i, n in enumerate(self.shape[1:], start=1)
            )
        return (self.rows(), *self.rest)

    def entry(self, i: int) -> Axes:
        """Numbers of the axes of one entry."""
        if i not in self.entries:
            self.entries[i] = tuple(
                self.walk.name(self, i, k, n) for k, n in enumerate(self.shape[1:], start=1)
            )
        return self.entries[i]

    def close(self) -> None:
        """Once all is seen: entries that nothing read are like those that were, being one array."""
        walk = self.walk
        if not self.entries:
            return
        first, *others = self.entries.values()
        alike = all(
            np.array_equal(walk.classes.of(a), walk.classes.of(b))
            for other in others
            for a, b in zip(map(_numbers, first), map(_numbers, other), strict=True)
        )
        for i in set(range(self.shape[0])) - set(self.entries):
            self._join(self.entry(i), first) if alike else fix(walk, self.entry(i))
        if self.rest is not None:
            for entry in self.entries.values():
                self._join(self.rest, entry)

    def _join(self, first: Axes, second: Axes) -> None:
        for a, b in zip(first, second, strict=True):
            same(self.walk, a, b)


def _numbers(numbers: Numbers | None) -> Numbers:
    assert numbers is not None  # a leaf's own are there
    return numbers


class Walk:
    """A walk through a program that gives every axis its numbers; the `Book` of the rules."""

    def __init__(self, leaves: Sequence[tuple[str, tuple[int, ...]]], tried: dict[int, int]):
        self.classes, self.opaque = Classes(), set[str]()
        self.leaves = [Leaf(self, path, shape) for path, shape in leaves]
        self.tried, self.asked = tried, dict[int, tuple[int, list[Numbers]]]()
        self.cuts: list[Numbers] = []
        self.log: list[Event] = []
        self.used: list[Numbers] = []
        self.layer: tuple[Sized, ...] = ()
        self.times = 1.0
        self.products: list[tuple[float, tuple[Sized, ...]]] = []
        self.named: list[tuple[int, int, Leaf, int, int]] = []

    def name(self, leaf: Leaf, entry: int, axis: int, size: int) -> Numbers:
        """Numbers of an axis of a leaf."""
        numbers = self.classes.new(size)
        self.named.append((int(numbers[0]) if size else 0, size, leaf, entry, axis))
        return numbers

    def use(self, numbers: Numbers | None) -> None:
        """See `Book`."""
        if numbers is not None:
            self.used.append(numbers)

    def product(self, *axes: Sized) -> None:
        """See `Book`."""
        self.products.append((self.times, (*self.layer, *axes)))

    def cut(self, numbers: Numbers, part: Numbers) -> None:
        """See `Book`."""
        self.cuts.append(numbers)
        self.log.append(Event(self._layers(), "cut", (part,)))

    def choice(self, eqn: Any, options: Sequence[int]) -> int:
        """See `Book`: the outermost, unless that was of no avail before."""
        tried = min(self.tried.get(id(eqn), 0), len(options) - 1)
        self.asked.setdefault(id(eqn), (len(options), []))
        return options[tried]

    def chosen(self, eqn: Any, numbers: Numbers) -> None:
        """See `Book`."""
        self.asked[id(eqn)][1].append(numbers)

    def again(self) -> bool:
        """Whether other choices might let more go: an axis that stays, or is cut up, was none."""
        cut = np.unique(np.concatenate([np.zeros(0, np.int64), *self.cuts]))
        changed = False
        for key, (count, many) in self.asked.items():
            numbers = np.concatenate(many)
            stays = bool((self.classes.of(numbers) == FIXED).all())
            if (stays or np.isin(numbers, cut).any()) and self.tried.get(key, 0) + 1 < count:
                self.tried[key] = self.tried.get(key, 0) + 1
                changed = True
        return changed

    # --- programs ---

    def run(self, closed: Any, given: int) -> None:
        """Walk a whole program, whose results and other arguments stay."""
        jaxpr = closed.jaxpr
        values = [Value(leaf.shape, leaf=leaf) for leaf in self.leaves]
        values += [Value(v.aval.shape, every(v.aval.shape)) for v in jaxpr.invars[-given:] if given]
        out = self.walk(jaxpr, closed.consts, values)
        fix(self, *map(self.axes, out))
        for value in out:  # axes without numbers, too, for their sizes are those of results
            self.log.append(Event((), "value", every(value.shape)))
        for leaf in self.leaves:
            leaf.close()

    def walk(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
        """A program in place."""
        env: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = const if isinstance(const, Value) else _constant(const)

        def read(atom: Any) -> Value:
            return _constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            own = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, own), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, own: list[Value]) -> list[Value]:
        """The results of an equation."""
        name, shapes = eqn.primitive.name, [v.aval.shape for v in eqn.outvars]
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, own)
        if (done := _folded(eqn, own)) is not None:
            return done
        if name in _AS_IT_IS and own[0].leaf is not None:
            return [Value(own[0].shape, leaf=own[0].leaf)]
        if (entries := _entries(eqn, own)) is not None:
            return entries
        axes = [self.axes(value) for value in own]
        rule = RULES.get(name)
        if rule is None:
            if not name.startswith(("random_", "threefry")):
                self.opaque.add(name)
            fix(self, *axes)
            out = [every(s) for s in shapes]
        else:
            out = rule(self, eqn, axes)
        self.log += [Event(self._layers(), "value", a) for a in out]
        return [Value(s, a) for s, a in zip(shapes, out, strict=True)]

    def _layers(self) -> tuple[Numbers, ...]:
        return tuple(numbers for numbers, _ in self.layer if numbers is not None)

    def axes(self, value: Value) -> Axes:
        """The numbers of a value."""
        if value.leaf is not None:
            return value.leaf.whole()
        if value.axes is None:
            value.axes = _like(value.known)
        return value.axes


def every(shape: Sequence[int]) -> Axes:
    """Numbers of a value all of whose entries stay."""
    return tuple(map(fixed, shape))


def _constant(value: Any) -> Value:
    return Value(np.shape(value), known=value)


def _like(value: Any) -> Axes:
    """Of a constant: axes along which it is the same may shrink, for it is one number."""
    if not np.shape(value):
        return ()
    if np.size(value) > LARGEST or not hasattr(value, "dtype"):
        return every(np.shape(value))
    array = np.asarray(value)
    out: list[Numbers | None] = []
    for axis, size in enumerate(array.shape):
        alike = bool(np.all(array == array.take([0], axis))) if size else False
        out.append(None if alike else fixed(size))
    return tuple(out)


def _folded(eqn: Any, own: Sequence[Value]) -> list[Value] | None:
    """An equation of constants, computed: so indices that are written in the function are known."""
    sizes = [int(np.prod(v.aval.shape)) for v in eqn.outvars]
    if any(value.known is None for value in own) or max(sizes, default=0) > LARGEST:
        return None
    if eqn.effects or eqn.primitive.name.startswith("random"):
        return None
    out = eqn.primitive.bind(*(value.known for value in own), **eqn.params)
    return [_constant(x) for x in (out if eqn.primitive.multiple_results else [out])]


def _entries(eqn: Any, own: Sequence[Value]) -> list[Value] | None:
    """A leaf's entries that are cut out at indices that are known, as a stack's layers are."""
    value = own[0] if own else None
    if value is None or value.leaf is None or len(value.shape) < 2:
        return None
    p, name, shape = eqn.params, eqn.primitive.name, value.shape
    if name == "unstack" and p["axis"] == 0 and shape[0] > 1:
        value.leaf.stay()
        return [Value(shape[1:], value.leaf.entry(i)) for i in range(shape[0])]
    if name == "slice":
        start, sizes = p["start_indices"], eqn.outvars[0].aval.shape
    elif name == "dynamic_slice":
        start, sizes = [v.known for v in own[1:]], p["slice_sizes"]
    elif name == "gather":
        d, sizes, at = p["dimension_numbers"], p["slice_sizes"], own[1].known
        if d.start_index_map != (0,) or at is None or np.shape(at) != (1,):
            return None
        start = [np.reshape(at, ())]
    else:
        return None
    if sizes[0] != 1 or tuple(sizes[1:]) != shape[1:] or start[0] is None or shape[0] == 1:
        return None
    i = int(np.clip(int(start[0]), 0, shape[0] - 1))
    value.leaf.stay()  # it is read by its place
    row, rest = value.leaf.rows()[i : i + 1], value.leaf.entry(i)
    result = eqn.outvars[0].aval.shape
    return [Value(result, rest if len(result) < len(shape) else (row, *rest))]


# --- programs in programs -------------------------------------------------------------------------


def _inner(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _call(walk: Walk, eqn: Any, own: list[Value]) -> list[Value]:
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "call") if k in eqn.params)
    return walk.walk(*_inner(inner), own)


def _scan(walk: Walk, eqn: Any, own: list[Value]) -> list[Value]:
    """Layer by layer if it runs along leaves, so that each has numbers of its own."""
    p = eqn.params
    if "num_consts" in p:  # jax 0.11
        consts, carried = p["num_consts"], p["num_carry"]
    else:
        consts, carried = (len(group) for group in p["ft_in"].unpack()[:2])
    body, held, length = *_inner(p["jaxpr"]), p["length"]
    fixed_values, carry, stacks = (
        own[:consts],
        own[consts : consts + carried],
        own[consts + carried :],
    )
    read = {atom for eqn in body.eqns for atom in eqn.invars if not isinstance(atom, core.Literal)}
    read |= {atom for atom in body.outvars if not isinstance(atom, core.Literal)}
    needed = [var in read for var in body.invars[consts + carried :]]  # a counter may not be
    own_layers = any(v.leaf and need for v, need in zip(stacks, needed, strict=True))
    rows = same(walk, *(
        v.leaf.rows() if v.leaf else walk.axes(v)[0]
        for v, need in zip(stacks, needed, strict=True) if need
    ))  # fmt: skip
    if own_layers:
        walk.use(rows)
    if rows is not None and _counts(body, consts, carried, needed):
        walk.classes.fix(rows)
    outside, done, seen = walk.layer, len(walk.products), len(walk.log)
    outs: list[list[Value]] = []
    for i in range(length if own_layers else len(carry) + 2):
        if own_layers:  # each layer's products are there once, and if the layer is
            assert rows is not None
            walk.layer = (*outside, (rows[i : i + 1], 1))
        else:  # those of the last round count
            del walk.products[done:], walk.log[seen:], outs[:]
            walk.layer = (*outside, (rows, length))
        before = walk.classes.merged, [walk.axes(value) for value in carry]
        each = [
            Value(v.shape[1:], v.leaf.entry(i) if own_layers and v.leaf else walk.axes(v)[1:])
            for v in stacks
        ]
        out = walk.walk(body, held, [*fixed_values, *carry, *each])
        carry = _alike(walk, carry, out[:carried])
        outs.append(out[carried:])
        if not own_layers and not _moved(walk, before, carry):
            break
    walk.layer = outside
    ys = []
    for column in zip(*outs, strict=True):
        y = column[0]
        for other in column[1:]:
            (y,) = _alike(walk, [y], [other])
        along = fixed(length) if rows is None else rows
        ys.append(Value((length, *y.shape), (along, *walk.axes(y))))
    return [*carry, *ys]


def _moved(walk: Walk, before: tuple[int, list[Axes]], carry: Sequence[Value]) -> bool:
    """Whether a round of a loop brought anything new."""
    merged, axes = before
    had = [[n is None for n in each] for each in axes]
    have = [[n is None for n in walk.axes(value)] for value in carry]
    return merged != walk.classes.merged or had != have


def _counts(body: Any, consts: int, carried: int, needed: Sequence[bool]) -> bool:
    """Whether a loop carries what changes without its layers, such as a counter, and reads it."""

    def reached(of: set[Any]) -> set[Any]:
        for eqn in body.eqns:
            if any(not isinstance(atom, core.Literal) and atom in of for atom in eqn.invars):
                of = of | set(eqn.outvars)
        return of

    ins, outs = body.invars[consts : consts + carried], body.outvars[:carried]
    layers = {v for v, need in zip(body.invars[consts + carried :], needed, strict=True) if need}
    for _ in range(carried + 1):
        of_layers = reached(layers)
        layers |= {a for a, b in zip(ins, outs, strict=True) if _in(b, of_layers)}
    for own, after in zip(ins, outs, strict=True):
        if own in layers or after is own:
            continue
        reads = reached({own})
        if any(_in(b, reads) for b in body.outvars if b is not after):
            return True
    return False


def _in(atom: Any, variables: set[Any]) -> bool:
    return not isinstance(atom, core.Literal) and atom in variables


def _alike(walk: Walk, first: Sequence[Value], second: Sequence[Value]) -> list[Value]:
    """Values that stand in one place, with the numbers that either has."""
    out = []
    for a, b in zip(first, second, strict=True):
        axes = zip(walk.axes(a), walk.axes(b), strict=True)
        out.append(Value(a.shape, tuple(same(walk, x, y) for x, y in axes)))
    return out


def _while(walk: Walk, eqn: Any, own: list[Value]) -> list[Value]:
    """FLOPs of one round count: nobody knows how many there are."""
    p, done, seen = eqn.params, len(walk.products), len(walk.log)
    n, m = p["cond_nconsts"], p["body_nconsts"]
    carry = own[n + m :]
    for _ in range(len(carry) + 2):
        del walk.products[done:], walk.log[seen:]
        before = walk.classes.merged, [walk.axes(value) for value in carry]
        walk.walk(*_inner(p["cond_jaxpr"]), [*own[:n], *carry])
        out = walk.walk(*_inner(p["body_jaxpr"]), [*own[n : n + m], *carry])
        carry = _alike(walk, carry, out)
        if not _moved(walk, before, carry):
            break
    return carry


def _cond(walk: Walk, eqn: Any, own: list[Value]) -> list[Value]:
    """Any branch may run, as likely as others; of branches by platform, that of this one."""
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms is not None:
        here, pairs = jax.default_backend(), list(zip(branches, platforms, strict=True))
        branches = [b for b, p in pairs if here in (p or ())] or [b for b, p in pairs if p is None]
    times, walk.times = walk.times, walk.times / len(branches)
    out, *others = [walk.walk(*_inner(branch), own[1:]) for branch in branches]
    walk.times = times
    for other in others:
        out = _alike(walk, out, other)
    return out


_AS_IT_IS = ("convert_element_type", "copy", "copy_p", "sharding_constraint", "stop_gradient")
"""After these a parameter is one still, each of whose layers has its own numbers."""

_CONTROL: dict[str, Callable[..., list[Value]]] = {"scan": _scan, "while": _while, "cond": _cond}
_CONTROL |= dict.fromkeys(
    (
        "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
        "custom_vmap_call", "jit", "pjit", "remat", "remat2",
    ),
    _call,
)  # fmt: skip
