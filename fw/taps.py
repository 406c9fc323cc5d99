"""What a function computes on its way, as outputs, without touching the function.

    def model(params, x):
        return tap(x @ params["up"], "hidden") @ params["down"]

    y, seen = taken(model, ("hidden",))(params, x)

A value is named where it is computed, which costs nothing (`jax.ad_checkpoint.checkpoint_name`, so
that a policy of rematerialisation knows it by the same name), and taken where it is wanted.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from compress.programs import Values, as_closed, is_program, run, scan_sizes, traced
from fw.errors import FwError

type Taken = dict[str, list[jax.Array]]
"""By name, values in the order in which they are computed."""


def tap(x: jax.Array, name: str) -> jax.Array:
    """x itself, which `taken` finds by this name.

    >>> tap(jnp.ones(2), "hidden")
    Array([1., 1.], dtype=float32)
    """
    return checkpoint_name(x, name)


def taken[R](
    fn: Callable[..., R], names: Collection[str], *, last: Collection[str] = ()
) -> Callable[..., tuple[R, Taken]]:
    """Returns `fn` with the values that it names as outputs beside its own.

    Inside `jit`, `scan` and `checkpoint`, too: a loop's values come one for each iteration. May be
    differentiated with respect to them.

    Args:
      fn: any function of pytrees of arrays that JAX can trace.
      names: of the values that are taken.
      last: of values of which only the last is; a loop keeps no others.

    Returns:
      `(...) -> (fn(...), {name: [value, ...]})`. A name that is met nowhere is an empty list.

    Raises:
      FwError: when called: a value is named where it cannot be taken from, such as in a branch of
        `cond`, a `while` loop or a `shard_map`.

    >>> def stack(x, kernels):
    ...     return lax.scan(lambda x, w: (tap(jnp.tanh(x @ w), "hidden"), None), x, kernels)[0]
    >>> y, seen = taken(stack, ("hidden",))(jnp.ones((1, 2)), jnp.ones((3, 2, 2)))
    >>> len(seen["hidden"]), bool((seen["hidden"][-1] == y).all())
    (3, True)
    """
    wanted = dict.fromkeys((*names, *last))
    most = {name: name in last and name not in names for name in wanted}

    @functools.wraps(fn)
    def taking(*args: Any, **kwargs: Any) -> tuple[R, Taken]:
        program = traced(fn, args, kwargs)
        out, seen = _evaluate(program.closed, program.arrays, most)
        found = {name: [x for n, x in seen if n == name] for name in most}
        found = {name: xs[-1:] if most[name] else xs for name, xs in found.items()}
        return program.result(out), found

    return taking


Seen = list[tuple[str, Any]]


def _evaluate(closed: Any, args: Sequence[Any], most: dict[str, bool]) -> tuple[list[Any], Seen]:
    """Runs a program equation by equation, and gathers what it names; `most`: only the last one."""
    values, seen = Values(closed, args), list[tuple[str, Any]]()
    for eqn in closed.jaxpr.eqns:
        kind = eqn.primitive.name
        if kind == "name" and eqn.params["name"] in most:
            seen.append((eqn.params["name"], values.read(eqn.invars)[0]))
        inside = _named(eqn, most)
        if inside and kind not in _CONTROL:
            raise FwError(f"{inside[0]!r} is named inside of {kind}, from where it cannot be taken")
        if inside:
            out, more = _CONTROL[kind](eqn, values.read(eqn.invars), most)
            seen += more
        else:
            out = run(eqn, values)
        values.write(eqn, out)
    return values.results(), seen


def _named(eqn: Any, most: dict[str, bool]) -> list[str]:
    """What the programs that an equation holds name, of what is wanted."""
    found = []
    for value in jax.tree.leaves(dict(eqn.params), is_leaf=is_program):
        if is_program(value):
            for inner in getattr(value, "jaxpr", value).eqns:
                own = inner.params["name"] if inner.primitive.name == "name" else None
                found += [own] if own in most else _named(inner, most)
    return found


def _call(eqn: Any, values: Sequence[Any], most: dict[str, bool]) -> tuple[list[Any], Seen]:
    """A program that is only called: in place."""
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
    return _evaluate(as_closed(inner), values, most)


def _again(eqn: Any, values: Sequence[Any], most: dict[str, bool]) -> tuple[list[Any], Seen]:
    """A program that the backward pass computes again, but for what is taken of it."""
    names: list[str] = []

    def inner(*args: Any) -> Any:
        out, seen = _evaluate(as_closed(eqn.params["jaxpr"]), args, most)
        names[:] = [name for name, _ in seen]
        return out, [x for _, x in seen]

    keep = {k: eqn.params[k] for k in ("policy", "prevent_cse")}
    out, seen = jax.checkpoint(inner, **keep)(*values)
    return out, list(zip(names, seen, strict=True))


def _scan(eqn: Any, values: Sequence[Any], most: dict[str, bool]) -> tuple[list[Any], Seen]:
    """The same loop, which returns what is named in every iteration, or in the last one."""
    params, names = eqn.params, list[str]()
    consts, carried = scan_sizes(params)
    body, start = as_closed(params["jaxpr"]), list(values[consts : consts + carried])

    def seen_of(*args: Any) -> tuple[list[Any], list[Any]]:
        out, seen = _evaluate(body, args, most)
        names[:] = [name for name, _ in seen]
        return out, [x for _, x in seen]

    shapes = jax.make_jaxpr(seen_of, return_shape=True)(*body.in_avals)[1][1]
    once = [most[name] for name in names]
    zeros = [jnp.zeros(s.shape, s.dtype) for s, o in zip(shapes, once, strict=True) if o]

    def step(carry: Any, xs: Any) -> Any:
        out, seen = seen_of(*values[:consts], *carry[0], *xs)
        kept = [x for x, o in zip(seen, once, strict=True) if o]
        each = [x for x, o in zip(seen, once, strict=True) if not o]
        return (out[:carried], kept), (out[carried:], each)

    (state, kept), (ys, each) = lax.scan(
        step, (start, zeros), list(values[consts + carried :]), length=params["length"],
        reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    several = [name for name, o in zip(names, once, strict=True) if not o]
    steps = range(params["length"])
    order = reversed(steps) if params["reverse"] else steps
    pairs = list(zip(several, each, strict=True))
    found = [(name, x[i]) for i, (name, x) in itertools.product(order, pairs)]
    single = [name for name, o in zip(names, once, strict=True) if o]
    return [*state, *ys], [*found, *zip(single, kept, strict=True)]


_CONTROL: dict[str, Callable[..., tuple[list[Any], Seen]]] = {
    "scan": _scan,
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _again),
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
}
