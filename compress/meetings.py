"""The products of a function that its parameters take part in, each as a program of its own.

A program is traced, and its parameters are followed through whatever only rearranges them
(`compress.follow`) to every dot, convolution and look-up. Loops count as often as they run, and
branches as if all were equally likely.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from compress.arrays import is_compressed
from compress.follow import Link, follow
from compress.interpreter import apply
from compress.transform import named_leaves

PRODUCTS = ("dot_general", "conv_general_dilated", "gather")
"""Not `ragged_dot_general`: how many rows a group has is in the data, and no compressed array has a
rule for it."""

REARRANGES = (
    "broadcast_in_dim", "convert_element_type", "dynamic_slice", "reshape", "rev", "slice", "split",
    "squeeze", "transpose",
)  # fmt: skip
"""What is done again before the product; other followed primitives place or name values."""


@dataclass(frozen=True)
class Operand:
    """What a program is given besides the leaf.

    Attributes:
        shape, dtype: of it.
        below: integers are below this, along the last axis if there are several.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    below: tuple[int, ...] = (1,)

    def draw(self, rng: np.random.Generator) -> jax.Array:
        """Normal floats, or uniform integers."""
        if jnp.issubdtype(self.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, np.array(self.below), self.shape), self.dtype)
        return jnp.asarray(rng.standard_normal(self.shape, np.float32)).astype(self.dtype)


@dataclass(frozen=True, eq=False)
class Meeting:
    """A product that a leaf takes part in.

    Attributes:
        path: of the leaf.
        program: `(leaf, *operands) -> the product`, for `compress.apply`.
        operands: what else it takes.
        times: how often the function runs it.
    """

    path: str
    program: Callable[..., Any]
    operands: tuple[Operand, ...]
    times: float


@dataclass(frozen=True, eq=False)
class _Step:
    run: Callable[..., Any]
    operands: tuple[Operand, ...] = ()


@dataclass(frozen=True, eq=False)
class _Trail:
    """A value that a leaf was rearranged into."""

    link: Link
    steps: tuple[_Step, ...] = ()

    def then(self, link: Link, *step: _Step) -> "_Trail":
        return _Trail(link, (*self.steps, *step))


Trails = Sequence[_Trail | None]


def meetings(fn: Callable[..., Any], params: Any, *args: Any) -> list[Meeting]:
    """The products of a function that its floating parameters take part in, in order.

    Of a `while_loop`, whose iterations nobody knows before, one is counted; what runs in
    `shard_map`, and `ragged_dot`, are not found.

    Args:
        fn: `(params, *args) -> anything`.
        params: a pytree of arrays, some of them prepared by `smooth` or `rotate`.
        args: pytrees of arrays.

    >>> def fn(w, x):
    ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    >>> (one,) = meetings(fn, jnp.ones((3, 2, 2)), jnp.ones((5, 2)))
    >>> one.times, one.program(jnp.ones((3, 2, 2)), jnp.int32(0), jnp.ones((5, 2))).shape
    (3.0, (5, 2))
    """
    closed = jax.make_jaxpr(apply(fn))(params, *args)
    trails = [None if link is None else _Trail(link) for link in _links(params)]
    trails += [None] * (len(closed.jaxpr.invars) - len(trails))
    found: list[Meeting] = []
    _walk(closed.jaxpr, trails, 1.0, found)
    return found


def _links(params: Any) -> Iterator[Link | None]:
    for path, leaf in named_leaves(params)[0]:
        for keys, part in jax.tree_util.tree_flatten_with_path(leaf)[0]:
            name = jax.tree_util.keystr(keys, simple=True)
            held = name == "values" if is_compressed(leaf) else name == ""
            floating = hasattr(part, "dtype") and jnp.issubdtype(part.dtype, jnp.floating)
            yield Link.to(path, part.shape) if held and floating else None


def _walk(jaxpr: Any, trails: Trails, times: float, found: list[Meeting]) -> Trails:
    """Add the products of a program; the trails of its results."""
    known: dict[Any, _Trail | None] = dict(zip(jaxpr.invars, trails, strict=True))

    def trail_of(atom: Any) -> _Trail | None:
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        own = [trail_of(atom) for atom in eqn.invars]
        if not any(own):
            continue
        name = eqn.primitive.name
        if name in _CONTROL:
            after = _CONTROL[name](eqn, own, times, found)
        elif name in PRODUCTS:
            for i, trail in enumerate(own):
                if trail is not None:
                    found.append(_meeting(trail, _step(eqn, i), times))
            after = ()
        else:
            after = _followed(eqn, own)
        known.update(zip(eqn.outvars, after, strict=False))
    return [trail_of(atom) for atom in jaxpr.outvars]


def _meeting(trail: _Trail, last: _Step, times: float) -> Meeting:
    steps = (*trail.steps, last)

    def program(leaf: Any, *operands: Any) -> Any:
        given = iter(operands)
        for step in steps:
            leaf = step.run(leaf, *(next(given) for _ in step.operands))
        return leaf

    operands = tuple(operand for step in steps for operand in step.operands)
    return Meeting(trail.link.path, program, operands, times)


def _step(eqn: Any, at: int, result: int = 0) -> _Step:
    """One of an equation's results as a function of one operand, and of others but literals."""
    params = dict(eqn.params)
    if "out_sharding" in params:
        params["out_sharding"] = None  # it is run on one device
    literal = {i: a.val for i, a in enumerate(eqn.invars) if isinstance(a, core.Literal)}

    def run(value: Any, *others: Any) -> Any:
        given = iter(others)
        operands = [
            value if i == at else literal[i] if i in literal else next(given)
            for i in range(len(eqn.invars))
        ]
        out = eqn.primitive.bind(*operands, **params)
        return out[result] if eqn.primitive.multiple_results else out

    others = [a.aval for i, a in enumerate(eqn.invars) if i != at and i not in literal]
    below = (1,)
    if eqn.primitive.name == "gather" and at == 0:
        numbers, shape = params["dimension_numbers"], eqn.invars[0].aval.shape
        sizes = params["slice_sizes"]
        below = tuple(shape[a] - sizes[a] + 1 for a in numbers.start_index_map)
    return _Step(run, tuple(Operand(a.shape, np.dtype(a.dtype), below) for a in others))


def _followed(eqn: Any, own: Trails) -> Trails:
    """Through what only rearranges."""
    links = [None if trail is None else trail.link for trail in own]
    barrier = eqn.primitive.name == "optimization_barrier"
    out: list[_Trail | None] = []
    for i, link in enumerate(follow(eqn, [*map(_any, eqn.invars)], links)):
        trail = own[i if barrier else 0]
        if link is None or trail is None:
            out.append(None)
        elif eqn.primitive.name in REARRANGES:
            out.append(trail.then(link, _step(eqn, 0, i)))
        else:
            out.append(trail.then(link))
    return out


def _any(atom: Any) -> Any:
    """A number in the place of one: which entries are cut out does not matter here."""
    if isinstance(atom, core.Literal):
        return atom.val
    index = not atom.aval.shape and jnp.issubdtype(atom.aval.dtype, jnp.integer)
    return np.zeros((), atom.aval.dtype) if index else None


# --- programs in programs -------------------------------------------------------------------------


def _inner(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _call(eqn: Any, own: Trails, times: float, found: list[Meeting]) -> Trails:
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "call") if k in eqn.params)
    return _walk(_inner(inner), own, times, found)


def _scan(eqn: Any, own: Trails, times: float, found: list[Meeting]) -> Trails:
    if "num_consts" in eqn.params:  # jax 0.11
        consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    else:
        consts, carried = (len(group) for group in eqn.params["ft_in"].unpack()[:2])
    body, length = _inner(eqn.params["jaxpr"]), eqn.params["length"]
    each = [None if trail is None else _entry(trail, length) for trail in own[consts + carried :]]
    return _loop(body, [*own[: consts + carried], *each], consts, carried, times * length, found)


def _entry(trail: _Trail, length: int) -> _Trail:
    """What an iteration has of a value that a scan runs along."""
    link = trail.link
    run, *rest = link.runs
    gone = (*link.gone, run.one(np.int32(0))) if run.parts else link.gone
    cut = functools.partial(lax.dynamic_index_in_dim, axis=0, keepdims=False)
    index = Operand((), np.dtype("int32"), (length,))
    return trail.then(replace(link, runs=tuple(rest), gone=gone), _Step(cut, (index,)))


def _while(eqn: Any, own: Trails, times: float, found: list[Meeting]) -> Trails:
    skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carried = len(own) - skipped - consts
    return _loop(_inner(eqn.params["body_jaxpr"]), own[skipped:], consts, carried, times, found)


def _loop(
    body: Any, own: Trails, consts: int, carried: int, times: float, found: list[Meeting]
) -> Trails:
    """Trails of what it carries are those of what it leaves as it is."""
    places = range(consts, consts + carried)
    kept = [own[i] if body.outvars[i - consts] is body.invars[i] else None for i in places]
    _walk(body, [*own[:consts], *kept, *own[consts + carried :]], times, found)
    return kept


def _cond(eqn: Any, own: Trails, times: float, found: list[Meeting]) -> Trails:
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms is not None:
        pairs, here = list(zip(branches, platforms, strict=True)), jax.default_backend()
        branches = [b for b, p in pairs if here in (p or ())] or [b for b, p in pairs if p is None]
    for branch in branches:
        _walk(_inner(branch), own[1:], times / len(branches), found)
    return ()


_CONTROL: dict[str, Callable[..., Trails]] = {"scan": _scan, "while": _while, "cond": _cond}
_CONTROL |= dict.fromkeys(
    (
        "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
        "custom_vmap_call", "jit", "pjit", "remat", "remat2",
    ),
    _call,
)  # fmt: skip
