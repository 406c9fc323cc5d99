"""How much each unit of a dimension matters, and which stay under a budget.

Scores are float64 [layers, units] by a dimension's name; of a stack every layer ranks its own. They
are sums over the leaves that read a unit: what they would lose is what the unit is worth.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.coupling import Couplings, Dimension
from compress.observed import Stats
from compress.scheme import inputs, role_of
from compress.transform import match, named_leaves

Scores = dict[str, np.ndarray]


def magnitude_scores(found: Couplings, params: Any) -> Scores:
    """Σ w² over the kernels that have a unit, each kernel's mean w² being 1.

    So a unit of average weights scores as many as it has, and units of all sizes compare.

    Args:
        found: of `couplings`.
        params: the tree it was found in.

    Source: Li et al. 2017, https://arxiv.org/abs/1608.08710, over groups as Fang et al. 2023,
    https://arxiv.org/abs/2301.12900.

    >>> from compress.coupling import couplings
    >>> p = {"up": jnp.ones((3, 2)), "down": jnp.array([[1.0], [3.0]])}
    >>> found = couplings(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], p, jnp.ones((2, 3)))
    >>> {name: s.round(1).tolist() for name, s in magnitude_scores(found, p).items()}
    {'down:0': [[3.2, 4.8]]}
    """
    leaves = dict(named_leaves(params)[0])
    scores = {}
    for name, d in found.dimensions.items():
        chosen = _kernels(d, leaves)
        parts = []
        for path, axis in chosen:
            square = jnp.square(leaves[path])
            parts.append(_of_units(square / jnp.maximum(square.mean(), 1e-30), d, path, axis))
        scores[name] = np.sum(parts, axis=0)
    return scores


def activation_scores(found: Couplings, params: Any, stats: Stats) -> Scores:
    """Σ mean |x|² · w² over the kernels that read a unit: what their outputs would lose.

    Args:
        found, params: as in `magnitude_scores`.
        stats: of `compress.observe`, of the kernels that read units.

    Raises:
        ValueError: a dimension has no kernel whose inputs were observed.

    Source: the criterion is Wanda's, Sun et al. 2023, https://arxiv.org/abs/2306.11695, summed.
    """
    leaves = dict(named_leaves(params)[0])
    scores = {}
    for name, d in found.dimensions.items():
        parts = []
        for path, axis in d.members:
            leaf, seen = leaves[path], stats.get(path)
            if seen is None:
                continue
            stack = seen.rows.ndim
            if axis >= stack and axis - leaf.ndim not in seen.axes:
                continue  # it puts units out
            mean = seen.abssum / jnp.maximum(seen.rows, 1)[..., None]
            own = [*range(stack), *(leaf.ndim + k for k in seen.axes)]
            mean = mean.reshape([n if k in own else 1 for k, n in enumerate(leaf.shape)])
            parts.append(_of_units(jnp.square(mean * leaf), d, path, axis))
        if not parts:
            raise ValueError(f"{name}: calibration saw no kernel that reads it; use magnitudes")
        scores[name] = np.sum(parts, axis=0)
    return scores


def taylor_scores(
    found: Couplings, loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]
) -> Scores:
    """Σ over batches of (Σ w · ∂loss/∂w)² over the leaves that read a unit.

    The inner sum is the slope of the loss along the unit's gate, first order in its removal.

    Args:
        found, params: as in `magnitude_scores`.
        loss: `(params, batch) -> a number`.
        batches: pytrees for it.

    Source: Molchanov et al. 2019, https://arxiv.org/abs/1906.10771; Michel et al. 2019,
    https://arxiv.org/abs/1905.10650, for heads.

    >>> from compress.coupling import couplings
    >>> p = {"up": jnp.ones((3, 2)), "down": jnp.array([[1.0], [3.0]])}
    >>> fn = lambda p, x: (x @ p["up"]) @ p["down"]
    >>> found = couplings(fn, p, jnp.ones((2, 3)))
    >>> taylor_scores(found, lambda p, x: fn(p, x).mean(), p, [jnp.ones((2, 3))])["down:0"]
    array([[ 9., 81.]])
    """
    leaves, tree = named_leaves(params)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for _, x in leaves]

    @jax.jit
    def products(moving: list[Any], batch: Any) -> list[Any]:
        def of(moving: list[Any]) -> jax.Array:
            given = iter(moving)
            whole = [next(given) if f else x for (_, x), f in zip(leaves, floating, strict=True)]
            return loss(jax.tree.unflatten(tree, whole), batch)

        return jax.tree.map(jnp.multiply, moving, jax.grad(of)(moving))

    moving = [x for (_, x), f in zip(leaves, floating, strict=True) if f]
    names = [path for (path, _), f in zip(leaves, floating, strict=True) if f]
    scores: Scores = {}
    shapes = dict(leaves)
    for batch in batches:
        each = dict(zip(names, products(moving, batch), strict=True))
        for name, d in found.dimensions.items():
            parts = [_of_units(each[p], d, p, axis) for p, axis in _readers(d, shapes)]
            scores[name] = scores.get(name, 0.0) + np.square(np.sum(parts, axis=0))
    return scores


def _kernels(d: Dimension, leaves: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The members that are of kernels or tables, or all if none is."""
    found = [key for key in d.members if role_of(key[0], leaves[key[0]].shape) is not None]
    return found or list(d.members)


def _readers(d: Dimension, leaves: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The members along inputs of kernels, or all kernels if none is."""
    found = []
    for path, axis in d.members:
        shape = leaves[path].shape
        role = role_of(path, shape)
        if role is not None and axis - len(shape) == inputs(role)[-1]:
            found.append((path, axis))
    return found or _kernels(d, leaves)


def _of_units(values: jax.Array, d: Dimension, path: str, axis: int) -> np.ndarray:
    """Sums over what belongs to each unit, float64 [layers, units]."""
    entries = d.members[path, axis]
    layers = d.layers or 1
    moved = np.moveaxis(np.asarray(values, np.float64), axis, -1)
    first = moved.shape[0] if layers > 1 else 1
    sums = moved.reshape(first, -1, moved.shape[-1]).sum(1)
    return np.stack([row[at].sum(-1) for row, at in zip(sums, entries, strict=True)])


def choose_units(
    found: Couplings,
    scores: Scores,
    *,
    parameters: float | None = None,
    flops: float | None = None,
    among: str = "**",
    least: int = 2,
    multiple: int = 1,
) -> dict[str, np.ndarray]:
    """The units that stay: those of least score by cost go first, until a budget is met.

    Args:
        found: of `couplings`.
        scores: by dimension; those without are left whole.
        parameters: part of all numbers that may stay, in (0, 1].
        flops: part of the products' operations that may stay; instead of `parameters`.
        among: pattern of names of dimensions that may shrink.
        least: units of a dimension that stay at any rate.
        multiple: entries of an axis that go at once, so that what stays is as even as what was: a
            unit of several counts as so many, and a dimension of fewer goes unit by unit.

    Returns:
        For `compress.shrink`: by name, int [layers, kept].

    Raises:
        ValueError: there is not one budget, no dimension matches, or the budget cannot be met.

    >>> from compress.coupling import couplings
    >>> p = {"up": jnp.ones((3, 2)), "down": jnp.array([[1.0], [3.0]])}
    >>> found = couplings(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], p, jnp.ones((2, 3)))
    >>> choose_units(found, magnitude_scores(found, p), parameters=0.5, least=1)
    {'down:0': array([[1]])}
    """
    limits = [limit for limit in (parameters, flops) if limit is not None]
    if len(limits) != 1 or not 0 < limits[0] <= 1:
        raise ValueError("units: give parameters or flops, the part that may stay, in (0, 1]")
    names = [name for name in found.dimensions if match(among, name) and name in scores]
    if not names:
        near = difflib.get_close_matches(among, list(found.dimensions), n=3, cutoff=0.0)
        raise ValueError(f"units: {among!r} matches no dimension; nearest are {', '.join(near)}")
    for name in names:
        if not np.isfinite(scores[name]).all():
            raise ValueError(f"units: {name}: scores hold NaN or infinity; look at what made them")
    cost = found.flops if parameters is None else found.parameters
    left: dict[str, int] = dict(found.units)
    limit = limits[0] * cost(left)
    sums = {name: np.sort(scores[name], axis=1).sum(0) for name in names}
    steps = {name: _step(found.dimensions[name], multiple) for name in names}
    while (now := cost(left)) > limit:
        best, price = None, np.inf
        for name in names:
            after = left[name] - steps[name]
            if after < least:
                continue
            gone = found.dimensions[name].units - left[name]
            saved = now - cost({**left, name: after})
            loss = float(sums[name][gone : gone + steps[name]].sum())
            if saved > 0 and (ratio := loss / saved) < price:
                best, price = name, ratio
        if best is None:
            raise ValueError(
                f"units: {now / cost(found.units):.3f} is the least part that can stay with at "
                f"least {least} units in each of {', '.join(names)}"
            )
        left[best] -= steps[best]
    kept = {}
    for name in names:
        gone = found.dimensions[name].units - left[name]
        if gone:
            order = np.argsort(scores[name], axis=1, kind="stable")
            kept[name] = np.sort(order[:, gone:], axis=1)
    return kept


def _step(d: Dimension, multiple: int) -> int:
    """How many units of a dimension go at once."""
    entries = max(at.shape[2] for at in d.members.values())
    step = multiple // math.gcd(multiple, entries)
    return step if step < d.units else 1
