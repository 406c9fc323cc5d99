"""Pruning while training: more and more entries become zero, and the rest goes on learning.

`sparsify` is an optax transformation, the last of a chain: it changes updates so that what is
pruned becomes, and stays, exactly zero. By magnitude nothing is kept for it: the zeros of the
parameters are the mask, wherever they lie and whatever reads them back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.adam import GradientTransformation
from compress.patterns import Pattern, mask
from compress.prune import Sparsity, as_sparsity
from compress.scheme import core, in_stack, role_of
from compress.transform import match, path_name

CURVES = ("cubic", "constant")

WORTHS = ("magnitude", "movement", "gradient")


@dataclass(frozen=True)
class Schedule:
    """How much is pruned, by step.

    Attributes:
        begin: the step after which the first entries go, from 1.
        end: the step after which all have gone.
        every: steps between, in which what is left learns.
        curve: "cubic", s · (1 − (1 − t)³) from begin to end, much at first, when much is of no
            worth; "constant", all at `begin`.

    Source: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878.

    >>> [round(float(Schedule(10, 110).part(step, 0.8)), 2) for step in (10, 60, 110, 200)]
    [0.0, 0.7, 0.8, 0.8]
    """

    begin: int
    end: int
    every: int = 20
    curve: str = "cubic"

    def __post_init__(self) -> None:
        """Check it."""
        if not 1 <= self.begin <= self.end or self.every < 1:
            raise ValueError(f"{self}: expected 1 ≤ begin ≤ end, and every of 1 or more")
        if self.curve not in CURVES:
            raise ValueError(f"curve={self.curve!r}: expected one of {', '.join(CURVES)}")

    def part(self, step: Any, last: float) -> jax.Array:
        """The part that is gone after a step."""
        step = jnp.asarray(step, jnp.float32)
        if self.curve == "constant" or self.begin == self.end:
            return jnp.where(step >= self.begin, np.float32(last), np.float32(0))
        t = jnp.clip((step - self.begin) / (self.end - self.begin), 0, 1)
        return np.float32(last) * (1 - (1 - t) ** 3)

    def due(self, step: jax.Array) -> jax.Array:
        """Whether entries go after this step."""
        inside = (step >= self.begin) & (step <= self.end)
        return inside & (((step - self.begin) % self.every == 0) | (step == self.end))


class SparsifyState(NamedTuple):
    """What is kept.

    Attributes:
        count: int32, steps taken.
        worth: a tree like the parameters, of scores; of one entry where none are needed.
    """

    count: jax.Array
    worth: Any


def sparsify(rules: Any, schedule: Schedule, *, by: str = "magnitude") -> Any:
    """An optax transformation that prunes parameters while they are trained; the last of a chain.

    Args:
        rules: glob pattern -> what `compress.prune` takes, or "keep"; the first match decides.
        schedule: when how much goes. Of N:M, all goes at its end.
        by: what is of least worth: "magnitude", |w|; "gradient", Σ |w · u| of the updates u, which
            point against gradients; "movement", Σ w · u, below 0 where an entry was moved to zero.

    Returns:
        `update(updates, state, params)` needs the parameters. It checkpoints and shards as any:
        scores lie as parameters do.

    Raises:
        ValueError: a rule, or `by`, is none; when started, a rule that matches no leaf or does not
            fit.

    Source: movement, Sanh et al. 2020, https://arxiv.org/abs/2005.07683, here of entries that do
    not come back.

    >>> tx = sparsify({"w": 0.5}, Schedule(begin=1, end=1))
    >>> params = {"w": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
    >>> updates, _ = tx.update({"w": jnp.full((2, 2), 0.1)}, tx.init(params), params)
    >>> (params["w"] + updates["w"]).tolist()
    [[0.0, -2.9000000953674316], [2.0999999046325684, 0.0]]
    """
    if by not in WORTHS:
        raise ValueError(f"sparsify: by={by!r}: expected one of {', '.join(WORTHS)}")
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    chosen = [(p, o if o == "keep" else as_sparsity(o)) for p, o in pairs]

    def option(path: str, shape: tuple[int, ...]) -> tuple[Sparsity, str] | None:
        found = next((o for p, o in chosen if match(p, path)), None)
        if found is None or isinstance(found, str):
            return None
        role = found.role or role_of(path, shape)
        if role is None or len(shape) < core(role) or not all(shape):
            raise ValueError(f"{path}: sparsify: shape {shape} has no usual role; give it one")
        if why := Pattern(found.pattern).unfit(shape, role):
            raise ValueError(f"{path}: sparsify: {why}")
        return found, role

    def init(params: Any) -> SparsifyState:
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern, _ in chosen:
            if paths and not any(match(pattern, path) for path in paths):
                raise ValueError(f"sparsify: rule {pattern!r} matches no path")

        def scores(path: Any, p: jax.Array) -> jax.Array:
            if option(path_name(path), p.shape) is not None and by != "magnitude":
                return jnp.zeros(p.shape, jnp.float32)
            return jnp.zeros(_one(path, p.shape), jnp.float32)

        return SparsifyState(
            jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(scores, params)
        )

    def update(updates: Any, state: SparsifyState, params: Any = None) -> tuple[Any, SparsifyState]:
        if params is None:
            raise ValueError("sparsify: update needs the parameters: update(grads, state, params)")
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        count = state.count + 1

        def one(path: str, u: jax.Array, w: jax.Array, worth: jax.Array) -> Any:
            found = option(path, u.shape)
            if found is None:
                return u, worth
            stays = (w != 0) | (count <= schedule.begin)
            if by != "magnitude":
                step = jnp.abs(w * u) if by == "gradient" else w * u
                worth = jnp.where(stays, worth + step, worth)
            value = jnp.abs(w + u) if by == "magnitude" else worth

            def fewer(value: jax.Array, stays: jax.Array) -> jax.Array:
                return stays & _kept(value, stays, *found, count, schedule)

            kept = lax.cond(schedule.due(count), fewer, lambda _, stays: stays, value, stays)
            return jnp.where(kept, u, -w), worth

        each = [treedef.flatten_up_to(tree) for tree in (params, state.worth)]
        new = [one(path_name(path), u, *own) for (path, u), *own in zip(leaves, *each, strict=True)]
        out, worth = (treedef.unflatten([x[k] for x in new]) for k in range(2))
        return out, SparsifyState(count, worth)

    return GradientTransformation(init, update)


def _kept(
    value: jax.Array,
    stays: jax.Array,
    option: Sparsity,
    role: str,
    count: jax.Array,
    schedule: Schedule,
) -> jax.Array:
    """Of the entries that are left, those that stay."""
    pattern = Pattern(option.pattern)
    kept = mask(value, pattern, schedule.part(count, option.gone), role, alive=stays)
    return kept | (count < schedule.end) if pattern.group else kept


def _one(path: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One entry, and one for each layer of a stack, as where layers are apart."""
    stacked = in_stack(path_name(path))
    return (*shape[:stacked], *[1] * (len(shape) - stacked))
