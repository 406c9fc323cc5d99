"""A contract that a compiled program must keep, for tests and continuous integration.

Layouts rot silently: a new parameter that no rule cuts, a constraint that the compiler answers by
gathering everything. `contract` states what may travel and what may be held twice, and its failure
names the parameter and the rule to change.
"""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.sharding import Mesh

from sharding.errors import ShardingError, nearest
from sharding.layout import check_rank, is_names, paths
from sharding.program.collectives import KINDS, Collective
from sharding.program.report import Parameter, Report, human, inspect
from sharding.rules import Names, Rules, Target, mesh_axes

COPIES = ("data", "sequence")
"""Mesh axes along which every device holds the whole model by intention."""

_SHOWN = 3


class ContractError(ShardingError, AssertionError):
    """A program that breaks its contract; an AssertionError as well, for it is raised in tests.

    Attributes:
        violations: one sentence each.
        report: what the compiler did.
    """

    def __init__(self, violations: tuple[str, ...], report: Report) -> None:
        self.violations = violations
        self.report = report
        count = f"{len(violations)} violation{'s' if len(violations) > 1 else ''} of the contract"
        super().__init__("\n- ".join((f"{count}:", *violations)))


def contract(
    compiled: jax.stages.Compiled | Report,
    *,
    mesh: Mesh | None = None,
    allowed: Collection[str] | Mapping[str, Collection[str]] | None = None,
    max_replicated: int | Mapping[str, int] | None = None,
    max_wire: int | Mapping[str, int] | None = None,
    max_memory: int | None = None,
    full_remat: bool = False,
    axes: Any = None,
    rules: Rules | None = None,
    parameters: str = "*",
) -> Report:
    """Hold a compiled program to what it may move and keep. What is left out is not checked.

    Involuntary full rematerialisation is checked unless it is allowed. The partitioner warns of it
    on stderr when it finds no way from one sharding to another but to gather the whole array and
    cut it anew; whether later passes mend that, only the program tells. Found are all-gathers, not
    written as such by the user, whose result is used for nothing but slices at an offset that
    depends on the device. Where the compiler slices first and gathers less, nothing is found.

    Args:
        compiled: what `jax.jit(f).lower(*args).compile()` gives, or a report of it.
        mesh: as for `inspect`.
        allowed: the mesh axes along which collectives may run; or, by axis, their kinds.
        max_replicated: bytes that a device may hold of one parameter while others hold the same.
            By mesh axis; one number stands for all axes but `COPIES`.
        max_wire: bytes that a device may send in a step, as `Collective.wire_bytes` counts; or by
            mesh axis, where a collective along several counts for each.
        max_memory: bytes that a device may need, `Memory.peak`.
        full_remat: whether involuntary full rematerialisation is allowed.
        axes: a tree with a tuple of logical names a parameter. Only arguments whose path ends with
            one of its paths count as parameters (so do the moments of an optimizer); without it,
            all arguments do, a batch among them.
        rules: where the names go; a failure then says which rule to change.
        parameters: a pattern, as `"params/*"`, that paths of parameters must match.

    Returns:
        The report.

    Raises:
        ContractError: with every violation.
        ShardingError: what `inspect` raises; an unknown axis or kind; no parameter to check.

    >>> from sharding import make_mesh
    >>> where = jax.NamedSharding(make_mesh("data=1"), jax.P())
    >>> x = jax.ShapeDtypeStruct((4,), "float32", sharding=where)
    >>> compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    >>> contract(compiled, allowed=(), max_wire=0, max_memory=1024).wire
    0
    >>> contract(compiled, max_memory=16)
    Traceback (most recent call last):
    ...
    sharding.program.contract.ContractError: 1 violation of the contract:
    - a device needs 32 B, more than max_memory=16 B: arguments 16 B, outputs 16 B, aliased 0 B...
    """
    report = compiled if isinstance(compiled, Report) else inspect(compiled, mesh=mesh)
    violations: list[str] = []
    if allowed is not None:
        violations += _forbidden(report, allowed, rules)
    if max_replicated is not None:
        chosen = _chosen(report, axes, parameters)
        trees = [] if axes is None else jax.tree.leaves(axes, is_leaf=is_names)
        violations += _replicated(report, max_replicated, chosen, rules, trees)
    if max_wire is not None:
        violations += _wire(report, max_wire)
    if max_memory is not None:
        violations += _memory(report, max_memory)
    if not full_remat:
        violations += [_remat(one) for one in report.collectives if one.resharding]
    if violations:
        raise ContractError(tuple(violations), report)
    return report


def _forbidden(
    report: Report, allowed: Collection[str] | Mapping[str, Collection[str]], rules: Rules | None
) -> list[str]:
    if isinstance(allowed, str):
        raise ShardingError(f"allowed={allowed!r}: expected axes, as [{allowed!r}]")
    _check(report, allowed)
    kinds = dict(allowed) if isinstance(allowed, Mapping) else dict.fromkeys(allowed, KINDS)
    for kind in (kind for some in kinds.values() for kind in some):
        if kind not in KINDS:
            raise ShardingError(f"unknown kind of collective {kind!r}: {nearest(kind, KINDS)}")
    found = []
    for one in report.collectives:
        wrong = [axis for axis in one.axes if one.kind not in kinds.get(axis, ())]
        if wrong:
            may = {axis: some for axis, some in kinds.items() if axis in one.axes}
            text = "; ".join(f"{axis}: {', '.join(some)}" for axis, some in may.items())
            if not text or not isinstance(allowed, Mapping):
                text = f"collectives may run along {', '.join(kinds) or 'no axis'}"
            found.append(f"{_said(one)}: not allowed along {', '.join(wrong)} ({text})")
            found[-1] += _mapped(wrong, rules)
    return found


def _mapped(axes: Collection[str], rules: Rules | None) -> str:
    """Which rules bring arrays to these mesh axes."""
    if rules is None:
        return ""
    names = [n for n, target in rules.table.items() if set(mesh_axes(target)) & set(axes)]
    entries = ", ".join(f"{name}={rules.table[name]!r}" for name in names)
    return f"; the rules that cut along it: {entries or 'none'}"


def _chosen(report: Report, axes: Any, pattern: str) -> list[tuple[Parameter, Names | None]]:
    """The parameters to check, with the names of their axes."""
    trees = () if axes is None else (paths(axes, is_names), jax.tree.leaves(axes, is_leaf=is_names))
    by_path: dict[str, Names] = dict(zip(*trees, strict=True)) if trees else {}
    found: list[tuple[Parameter, Names | None]] = []
    for one in report.parameters:
        if not fnmatchcase(one.path, pattern):
            continue
        ends = [path for path in by_path if f"/{one.path}".endswith(f"/{path}")]
        names = by_path[max(ends, key=len)] if ends else None
        if names is not None:
            check_rank(names, one.shape, one.path)
        if axes is None or names is not None:
            found.append((one, names))
    if not found:
        some = ", ".join(one.path for one in report.parameters[:_SHOWN]) or "none"
        raise ShardingError(
            f"contract: no parameter to check: no argument matches {pattern!r} and, if axes are "
            f"given, ends with one of their paths; arguments are {some} …"
        )
    return found


def _replicated(
    report: Report,
    limit: int | Mapping[str, int],
    chosen: list[tuple[Parameter, Names | None]],
    rules: Rules | None,
    trees: list[Names],
) -> list[str]:
    if isinstance(limit, Mapping):
        _check(report, limit)
        limits = dict(limit)
    else:
        limits = {axis: limit for axis in report.mesh if axis not in COPIES}
    found = []
    for one, names in chosen:
        over = [a for a in one.copied if a in limits and one.device_bytes > limits[a]]
        if over:
            named = f" ({', '.join(map(str, names))})" if names is not None else ""
            least = human(min(limits[axis] for axis in over))
            found.append(
                f"{one.path}{named} is replicated over {', '.join(over)}: every device holds "
                f"{human(one.device_bytes)} of its {human(one.bytes)}, max_replicated is {least}; "
                f"{_remedy(one, names, over, report, rules, trees)}"
            )
    return found


def _remedy(
    one: Parameter,
    names: Names | None,
    over: list[str],
    report: Report,
    rules: Rules | None,
    every: list[Names],
) -> str:
    """Which rule to change so that one more axis cuts a parameter, and all others still fit."""
    fits = []
    for axis in over:
        for i, (size, cut) in enumerate(zip(one.shape, one.spec, strict=True)):
            ways = math.prod(report.mesh[other] for other in (*cut, axis))
            name = None if names is None else names[i]
            target: Target = (*cut, axis) if cut else axis
            if size and size % ways == 0 and (names is None or _suits(name, target, rules, every)):
                fits.append((over.index(axis), len(cut), -size, i, name, target))
    if not fits:
        return (
            f"no rule can be changed so that {' or '.join(over)} cuts its shape {one.shape} and "
            f"every other parameter still fits: allow it, or change the model's sizes"
        )
    *_, i, name, target = min(fits, key=lambda fit: fit[:4])
    if names is None:
        return f"cut axis {i} of {one.shape} over {target!r}; pass axes= to be told the rule"
    rule = f"rule {name}={rules.table[str(name)]!r}; " if rules is not None else ""
    return f"{rule}map it with rules({name}={target!r})"


def _suits(name: str | None, target: Target, rules: Rules | None, every: list[Names]) -> bool:
    """Whether a rule can be changed without one mesh axis cutting two axes of a parameter."""
    if name is None or rules is None:
        return name is not None
    changed = Rules(rules.preset, (*rules.overrides, (name, target)))
    try:
        for names in every:
            changed.spec(names)
    except ShardingError:
        return False
    return True


def _wire(report: Report, limit: int | Mapping[str, int]) -> list[str]:
    found = [
        f"{_said(one)} stands in a loop whose trip count the program does not say, so the bytes of "
        f"a step are unknown: use a lax.scan, or a lax.fori_loop between constants"
        for one in report.collectives
        if not one.known
    ]
    limits: dict[str | None, int] = {None: limit} if isinstance(limit, int) else {**limit}
    _check(report, [axis for axis in limits if axis is not None])
    for axis, most in limits.items():
        counted = [one for one in report.collectives if axis is None or axis in one.axes]
        total = sum(one.step_bytes for one in counted)
        if total > most:
            along = "" if axis is None else f" along {axis}"
            largest = "; ".join(map(_said, counted[:_SHOWN]))
            found.append(
                f"a device sends {human(total)} a step{along}, more than max_wire={human(most)}; "
                f"the most: {largest}"
            )
    return found


def _memory(report: Report, limit: int) -> list[str]:
    memory = report.memory
    if memory is None:
        return ["this backend does not say how much memory the program needs: drop max_memory"]
    if memory.peak <= limit:
        return []
    largest = sorted(report.parameters, key=lambda one: -one.device_bytes)[:_SHOWN]
    named = ", ".join(f"{one.path} {human(one.device_bytes)}" for one in largest)
    text = (
        f"a device needs {human(memory.peak)}, more than max_memory={human(limit)}: arguments "
        f"{human(memory.arguments)}, outputs {human(memory.outputs)}, aliased "
        f"{human(memory.aliased)}, temporaries {human(memory.temporaries)}; largest arguments: "
        f"{named or 'none'}"
    )
    return [text]


def _remat(one: Collective) -> str:
    return (
        f"{_said(one)}: the whole array is gathered only to be sliced again by device (involuntary "
        f"full rematerialisation); shard what comes before and after it alike, or constrain it "
        f"in between to axes that both have"
    )


def _said(one: Collective) -> str:
    """A collective in words."""
    times = f"{one.count} x " if one.count > 1 else ""
    place = f", {one.source}" if one.source and one.source != one.cause else ""
    sent = f"{times}{human(one.wire_bytes)}"
    return f"{one.kind} of {one.shape} over {one.along} ({sent}, {one.cause}{place})"


def _check(report: Report, axes: Collection[str]) -> None:
    for axis in axes:
        if report.mesh and axis not in report.mesh:
            raise ShardingError(f"unknown mesh axis {axis!r}: {nearest(axis, report.mesh)}")
