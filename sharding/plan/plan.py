"""`plan`: which layout a step should have on a machine that need not be here.

Variants are traced once each, thousands of layouts estimated, the best few compiled by the real
compiler; what it made is timed and ranked. Whenever it is stopped, what it knows so far stands.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from sharding.context import scope
from sharding.errors import ShardingError
from sharding.layout import fit, is_names, shardings
from sharding.names import names
from sharding.plan.compiler import LIMIT, Compiled, Refused, at_once, compile_all, missing
from sharding.plan.hardware import Hardware, hardware
from sharding.plan.layouts import Layout, Plan, judged, program_of, rough_prediction
from sharding.plan.program import abstract_mesh
from sharding.plan.search import (
    Build,
    Candidate,
    Variant,
    candidates,
    kind,
    promising,
    shortlist,
)
from sharding.plan.survey import Survey, survey
from sharding.rules import Rules
from sharding.rules import rules as make_rules


def plan(
    step: Callable[..., Any],
    args: Sequence[Any],
    machine: str | Hardware,
    *,
    axes: Sequence[Any],
    rules: Rules | None = None,
    donate: int | Sequence[int] = (),
    **options: Any,
) -> Plan:
    """Find the layout of any function for a machine that need not be here.

    Args:
        step: a function of arrays; what it says with `constrain` about its activations is heard.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
        machine: as `hardware` reads it.
        axes: for each argument the names of its axes: of a tree of parameters, and of what an
            optimiser keeps of them, a tree of names or patterns over paths, as `names` takes them;
            of a batch one tuple for all of its arrays, such as ("batch", None).
        rules: where names go; the preset "fsdp_tensor" by default.
        donate: which arguments the step takes over, as `jax.jit` has it.
        **options: of `plan_variants`.

    Returns:
        The plan.

    Raises:
        ShardingError: as `plan_variants`; axes that do not fit the arguments.

    >>> import jax.numpy as jnp
    >>> def step(params, x):
    ...     loss = lambda params: jnp.mean((x @ params["up"] @ params["down"]) ** 2)
    ...     return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    >>> shape = jax.ShapeDtypeStruct
    >>> params = {"up": shape((512, 2048), "float32"), "down": shape((2048, 512), "float32")}
    >>> names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    >>> found = plan(step, (params, shape((4096, 512), "float32")), "v5e:2x4",
    ...              axes=(names, ("batch", None)), donate=0, compile=0)
    >>> found.considered, found.best.works
    (10, True)
    """
    table = make_rules("fsdp_tensor") if rules is None else rules
    built = placed(step, args, axes=axes, rules=table, donate=donate)
    return plan_variants([Variant(built)], machine, **options)


def placed(
    step: Callable[..., Any], args: Sequence[Any], *, axes: Sequence[Any], rules: Rules,
    donate: int | Sequence[int] = (),
) -> Build:  # fmt: skip
    """What makes a function, with its arguments, for a mesh; arguments as in `plan`.

    Raises:
        ShardingError: not as many axes as arguments.
    """
    if len(axes) != len(args):
        raise ShardingError(f"plan: {len(args)} arguments, but axes of {len(axes)}")

    def built(mesh: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
        found = []
        for number, (arg, named) in enumerate(zip(args, axes, strict=True)):
            if is_names(named):
                where = jax.tree.map(
                    lambda x, own=named, n=number: fit(
                        own, x.shape, mesh, rules, activation=True, path=f"argument {n}"
                    ),
                    arg,
                )
            else:
                own = names(arg, named) if _is_patterns(named) else named
                where = shardings(own, arg, mesh, rules)
            found.append(
                jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arg, where
                )
            )

        def run(*given: Any) -> Any:
            with scope(mesh, rules, differentiate=True):
                return step(*given)

        return jax.jit(run, donate_argnums=donate), found

    return built


def _is_patterns(named: Any) -> bool:
    """Whether these are names by glob over paths, and no tree like the argument."""
    return isinstance(named, Mapping) and any(set("*/?") & set(str(key)) for key in named)


def plan_variants(
    variants: Sequence[Variant],
    machine: str | Hardware,
    *,
    tokens: int = 0,
    flops: float | None = None,
    compile: int = 4,
    seconds: float = 900.0,
    limit: float = LIMIT,
    folder: Path | None = None,
    told: Callable[[str, float], None] | None = None,
) -> Plan:
    """Find the layout of a step that can be written in several ways.

    Args:
        variants: the ways.
        machine: as `hardware` reads it.
        tokens: of a step, for rates and prices.
        flops: that the model needs for a step; counted where not given, what is computed again
            included.
        compile: how many layouts the compiler decides among.
        seconds: after which nothing more is compiled.
        limit: seconds of one program's compilation.
        folder: of what is kept of compilations.
        told: `told(text, seconds left)` now and then.

    Returns:
        The plan, whatever was known when the time was over.

    Raises:
        ShardingError: a machine that does not exist, a step that no mesh of it can cut, a model
            that does not fit however it is cut.
    """
    began = time.monotonic()
    machine = hardware(machine) if isinstance(machine, str) else machine
    say = told or (lambda text, left: None)
    surveys = surveyed(variants, machine, say)
    every = candidates(surveys, machine)
    need = flops or min(s.flops for _, s in surveys)
    chosen = shortlist(every, 8 * max(compile, 1), machine.chip.memory)
    found = Plan(machine, [], len(every), missing(machine), surveys, tokens, need)
    layouts = {id(c): Layout(c, rough_prediction(c, machine, tokens, need)) for c in chosen}
    if found.lacking is None and compile:
        _compile(
            chosen, layouts, machine, compile, began + seconds, limit, folder, say,
            tokens=tokens, flops=need,
        )  # fmt: skip
    done = [one for one in layouts.values() if one.compiled]
    rest = [one for one in layouts.values() if not one.compiled]
    found.layouts = sorted(done, key=_place) + sorted(rest, key=_place)
    return found


def _place(one: Layout) -> tuple[bool, float]:
    return not one.works, one.prediction.seconds


def _compile(
    chosen: Sequence[Candidate], layouts: dict[int, Layout], machine: Hardware, count: int,
    until: float, limit: float, folder: Path | None, say: Callable[[str, float], None],
    *, tokens: int, flops: float,
) -> None:  # fmt: skip
    """Compiles candidates until as many as wanted fit, each round what is most promising.

    What estimates do not know, they do not know of all layouts of a kind: after each round, those
    that wait are expected to be as much slower, or larger, as what was compiled of their kind.
    """
    waiting, good, took = list(chosen), 0, []
    learnt: dict[Any, tuple[float, float]] = {}
    while waiting and good < count and time.monotonic() < until:
        batch = promising(waiting, min(at_once(), count - good), learnt, machine.chip.memory)
        waiting = [one for one in waiting if one not in batch]
        programs, kept = [], []
        for one in batch:
            try:
                programs.append(program_of(one, machine))
                kept.append(one)
            except Exception as error:  # of the user's step; other layouts may well be traced
                layouts[id(one)] = replace(layouts[id(one)], refused=str(error))
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                say(f"not traced {one}: {why[:90]}", 0.0)
        options: dict[str, Any] = {"limit": limit, "folder": folder, "until": until}
        for number, result in compile_all(programs, **options):
            one = kept[number]
            layouts[id(one)] = judged(one, result, machine, tokens, flops)
            if isinstance(result, Compiled):
                took.append(result.seconds)
                said, own = layouts[id(one)].prediction, one.estimate
                slower = said.seconds / own.seconds if own.seconds else 1.0
                learnt[kind(one)] = slower, said.memory.peak / max(own.peak, 1)
            elif isinstance(result, Refused) and result.needed is not None:
                slower = learnt.get(kind(one), (1.0, 1.0))[0]
                learnt[kind(one)] = slower, result.needed / max(one.estimate.peak, 1)
            good += layouts[id(one)].works
            left = (sum(took) / len(took) if took else 60.0) * max(count - good, 0)
            say(f"compiled {one}: {_said(layouts[id(one)])}", min(left, until - time.monotonic()))


def _said(one: Layout) -> str:
    if one.refused:
        return one.refused[:90]
    over = one.prediction.memory.over
    if over > 0:
        return f"{over / 2**30:.1f} GiB too much"
    return f"{one.prediction.seconds:.3g} s a step, MFU {one.prediction.mfu:.1%}"


def surveyed(
    variants: Sequence[Variant], machine: Hardware, say: Callable[[str, float], None]
) -> list[tuple[Variant, Survey]]:
    """Each variant, traced on a mesh of one device of the machine."""
    alone = replace(machine, shape=(1,) * len(machine.shape), slices=1)
    alone = replace(alone, chip=replace(machine.chip, together=1))
    mesh = abstract_mesh("data=1", alone)
    found = []
    for number, variant in enumerate(variants):
        begin = time.monotonic()
        found.append((variant, survey(*variant.build(mesh), variant.kinds)))
        left = (time.monotonic() - begin) * (len(variants) - number - 1)
        say(f"traced variant {number + 1} of {len(variants)}", left)
    return found
