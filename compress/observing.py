"""Calibration: what meets each parameter of a function, without touching the function.

`observe` runs a function equation by equation. Parameters are followed through whatever only
rearranges them (`compress.follow`), and where one is contracted with activations these are measured
(`compress.observed`). Loops and branches are rebuilt so that they return what was seen in them.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.extend import core

from compress.adapters import bare
from compress.arrays import is_compressed
from compress.contractions import Links, Walk, record
from compress.follow import Link, Loop, follow
from compress.histogram import threshold
from compress.observed import Observed, Stats, check, merge, preparation
from compress.places import Found, Place, add, agree, assembled, size_of, spread
from compress.programs import Values, as_closed, run, scan_sizes, traced
from compress.transform import match, named_leaves

__all__ = ["Observed", "Stats", "check", "merge", "observe", "threshold"]


def observe[R](
    fn: Callable[..., R], *, hessians: Sequence[str] = ()
) -> Callable[..., tuple[R, Stats]]:
    """Make a function return, beside its output, statistics of what its parameters met.

    Every `dot_general`, `ragged_dot_general` and `conv_general_dilated` of a floating leaf with
    floating activations counts, inside `jit`, `scan`, `cond`, `checkpoint` and functions with
    derivatives of their own. A leaf is followed through transposing, reshaping, slicing, indexing
    and casting. What it met as a layer of a stack is in that entry of its statistics' leading axes:

        w [layers, in, out], scanned or indexed    ->    absmax [layers, in]
        w [experts, in, out], picked by a router   ->    absmax [experts, in]

    Of compressed leaves, under `compress.apply`, those are observed that hold floats, and `Trained`
    leaves are passed to the function as the arrays that they mark. `rows`, sums and counts have an
    input once for each product that it meets a leaf in: twice if the function multiplies twice.
    Rows that a program pads with zeros count too.

    Not observed, and not in the result, are

    - leaves inside `while_loop` (a `fori_loop` of known length is a scan), `shard_map` and Pallas
      kernels, and leaves of which other arithmetic makes the operand of a product;
    - parts of an input axis, and parts of an output axis that begin where data say
      (`dynamic_slice` or indexing by a traced number);
    - experts that are gathered for each token by indices [tokens, k]; one router's pick for all
      rows, a scan over experts, and `ragged_dot` are observed;
    - kernels of convolutions that `vmap` maps over;
    - floats within `LoRA` and `Learned` leaves;
    - look-ups in a table, which have no activations.

    Of a convolution, K runs over a window's places and channels like the kernel's axes; rows are
    windows, and `hessian` is exact. `absmax` and `abssum` do not tell a window's places apart:
    `absmax` is the channel's maximum over the image, `abssum` its mean times rows. Groups of
    channels are rows of one group.

    Args:
        fn: `fn(params, *args, **kwargs)`, of pytrees; what is no array is static.
        hessians: patterns of paths of leaves for which Σ x xᵀ is wanted, float32 [*stack, K, K].

    Returns:
        `(params, *args, **kwargs) -> (output, Stats)`, to be wrapped in `jax.jit`. The output is
        that of `fn`. On a mesh, statistics are sums over all devices' rows.

    Raises:
        ValueError: when called: a pattern matches no leaf that was observed, or a leaf is
            contracted over different axes in different places.

    Source: the statistics are those of SmoothQuant, https://arxiv.org/abs/2211.10438, GPTQ,
    https://arxiv.org/abs/2210.17323, and Wu et al. 2020, https://arxiv.org/abs/2004.09602.

    >>> model = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> y, stats = jax.jit(observe(model, hessians=["up"]))(params, jnp.ones((5, 3)))
    >>> stats["up"].rows, stats["up"].hessian[0], stats["down"].absmax.shape
    (Array(5., dtype=float32), Array([5., 5., 5.], dtype=float32), (4,))
    """

    @functools.wraps(fn)
    def observing(params: Any, *args: Any, **kwargs: Any) -> tuple[R, Stats]:
        params = bare(params)  # what is marked as trained is a leaf like any other
        program = traced(fn, (params, *args), kwargs)
        links = _links(params)
        links = [*links, *[None] * (len(program.dynamic) - len(links))]
        walk = Walk(lambda path: any(match(pattern, path) for pattern in hessians))
        followed = [link for link, d in zip(links, program.dynamic, strict=True) if d]
        out, _, found = _evaluate(program.closed, program.arrays, followed, walk)
        after = {path: preparation(leaf) for path, leaf in named_leaves(params)[0]}
        stats = {p: replace(s, prepared=after[p]) for p, s in assembled(found).items()}
        for pattern in hessians:
            if not any(match(pattern, path) for path in stats):
                word = pattern.replace("**/", "").replace("*", "")
                near = difflib.get_close_matches(word, list(stats), n=3, cutoff=0.0)
                raise ValueError(
                    f"hessians: {pattern!r} matches no leaf that met activations; nearest are "
                    f"{', '.join(near) or 'none: the function multiplies none of its parameters'}"
                )
        return program.result(out), stats

    return observing


def _links(params: Any) -> list[Link | None]:
    """One for each array in a tree, in its order."""
    links: list[Link | None] = []
    for path, leaf in named_leaves(params)[0]:
        for keys, part in jax.tree_util.tree_flatten_with_path(leaf)[0]:
            name = jax.tree_util.keystr(keys, simple=True)
            held = name == "values" if is_compressed(leaf) else name == ""
            floating = hasattr(part, "dtype") and jnp.issubdtype(part.dtype, jnp.floating)
            links.append(Link.to(path, part.shape) if held and floating else None)
    return links


def _evaluate(
    closed: Any, args: Sequence[Any], links: Links, walk: Walk
) -> tuple[list[Any], list[Link | None], Found]:
    """Run a program; its results, which of them are parameters, and what was seen."""
    jaxpr, found, held = closed.jaxpr, {}, Values(closed, args)
    linked: dict[Any, Link | None] = dict(zip(jaxpr.invars, links, strict=True))

    def link_of(atom: Any) -> Link | None:
        return None if isinstance(atom, core.Literal) else linked.get(atom)

    for eqn in jaxpr.eqns:
        values, own = held.read(eqn.invars), [*map(link_of, eqn.invars)]
        control = _CONTROL.get(eqn.primitive.name) if any(own) else None
        if control is not None:
            out, after, more = control(eqn, values, own, walk)
            for place, seen in more.items():
                add(found, place, seen)
        else:
            out = run(eqn, held)
            after = [None] * len(out)
            if any(own):
                record(eqn, values, own, walk, found)
                after = follow(eqn, values, own)
        held.write(eqn, out)
        linked.update(zip(eqn.outvars, after, strict=True))
    return held.results(), [*map(link_of, jaxpr.outvars)], found


Result = tuple[Sequence[Any], Links, Found]


def _call(eqn: Any, values: Sequence[Any], links: Links, walk: Walk) -> Result:
    """A program that is only called: in place."""
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "call") if k in eqn.params)
    return _evaluate(as_closed(inner), values, links, walk)


class _Traced:
    """A program that was traced with its statistics, to be run where they are rebuilt into."""

    def __init__(self, inner: Any, links: Links, walk: Walk):
        inner = as_closed(inner)

        def seeing(*args: Any) -> tuple[list[Any], list[Observed]]:
            out, self.links, found = _evaluate(inner, args, links, Walk(walk.wants))
            self.places = list(found)
            return out, list(found.values())

        self.links: Links = ()
        self.places: list[Place] = []
        self.closed, shapes = jax.make_jaxpr(seeing, return_shape=True)(*inner.in_avals)
        self.shapes: list[Observed] = shapes[1]
        self.tree = jax.tree.structure(shapes)

    def __call__(self, *args: Any) -> tuple[list[Any], list[Observed]]:
        out = eval_jaxpr(self.closed.jaxpr, self.closed.consts, *args)
        return jax.tree.unflatten(self.tree, out)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _scan(eqn: Any, values: Sequence[Any], links: Links, walk: Walk) -> Result:
    """The same loop, which adds up what constants met and stacks what entries of a stack met."""
    consts, carried = scan_sizes(eqn.params)
    program = as_closed(eqn.params["jaxpr"])
    unchanged = [
        program.jaxpr.outvars[i] is program.jaxpr.invars[consts + i] for i in range(carried)
    ]
    loops, inner = set(), list(links)
    for i, link in enumerate(links):
        if link is None or i < consts:
            continue
        if i < consts + carried:
            inner[i] = link if unchanged[i - consts] else None
            continue
        run, *rest = link.runs
        gone = link.gone
        if run.parts:
            loop = Loop(run)
            loops.add(loop)
            gone = (*gone, replace(run, size=1, at=loop))
        inner[i] = replace(link, runs=tuple(rest), gone=gone)
    body = _Traced(program, inner, walk)
    each = [any(at in loops for _, at in place.fixed) for place in body.places]

    def step(carry: Any, xs: Any) -> Any:
        state, sums = carry
        out, seen = body(*values[:consts], *state, *xs)
        own = [s for s, stack in zip(seen, each, strict=True) if stack]
        shared = [s for s, stack in zip(seen, each, strict=True) if not stack]
        sums = [a + b for a, b in zip(sums, shared, strict=True)]
        return (out[:carried], sums), (out[carried:], own)

    init = list(values[consts : consts + carried])
    zeros = _zeros([s for s, stack in zip(body.shapes, each, strict=True) if not stack])
    (state, sums), (ys, own) = lax.scan(
        step, (init, zeros), list(values[consts + carried :]), length=eqn.params["length"],
        reverse=eqn.params["reverse"], unroll=eqn.params["unroll"],
    )  # fmt: skip
    found: Found = {}
    sums, own = iter(sums), iter(own)
    for place, stack in zip(body.places, each, strict=True):
        if stack:
            add(found, *_left(place, next(own), loops))
        else:
            add(found, place, next(sums))
    kept = [link if u else None for link, u in zip(links[consts:], unchanged, strict=False)]
    return [*state, *ys], [*kept, *[None] * len(ys)], found


def _left(place: Place, seen: Observed, loops: set[Loop]) -> tuple[Place, Observed]:
    """Outside a loop, what an iteration has one of is an axis."""
    (parts, loop) = next(f for f in place.fixed if f[1] in loops)
    assert isinstance(loop, Loop)
    if loop.run.at is not None:
        seen = spread(seen, loop.run.at, size_of(parts))
    fixed = tuple(f for f in place.fixed if f[1] is not loop)
    return replace(place, dims=(parts, *place.dims), fixed=fixed), seen


def _cond(eqn: Any, values: Sequence[Any], links: Links, walk: Walk) -> Result:
    """The same branches, each of which returns what any of them could see."""
    index, *operands = values
    branches = [_Traced(b, links[1:], walk) for b in eqn.params["branches"]]
    shapes: Found = {}
    for branch in branches:
        for place, shape in zip(branch.places, branch.shapes, strict=True):
            agree(place.path, shapes.setdefault(place, shape), shape)

    def returning(branch: _Traced) -> Callable[..., Any]:
        def returned(*args: Any) -> Any:
            out, seen = branch(*args)
            have = dict(zip(branch.places, seen, strict=True))
            return out, [have[p] if p in have else _zeros(s) for p, s in shapes.items()]

        return returned

    runs = [returning(branch) for branch in branches]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        out, seen = lax.switch(index, runs, *operands)
    else:
        known = {p: run for ps, run in zip(platforms, runs, strict=True) for p in ps or ()}
        default = next((r for ps, r in zip(platforms, runs, strict=True) if ps is None), None)
        out, seen = lax.platform_dependent(*operands, default=default, **known)
    return out, [None] * len(out), dict(zip(shapes, seen, strict=True))


_CONTROL: dict[str, Callable[..., Result]] = {"scan": _scan, "cond": _cond}
_CONTROL |= dict.fromkeys(
    (
        "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
        "custom_vmap_call", "jit", "pjit", "remat", "remat2",
    ),
    _call,
)  # fmt: skip
