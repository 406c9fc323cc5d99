"""Low rank: a kernel becomes two thin ones, by the directions of its outputs that carry most.

    W ≈ (W·V)·Vᵀ = A·B          V [out, r]: right singular vectors of S·W

Without statistics S = 1 and ‖W − A·B‖ is the least there is (Eckart and Young 1936). With them
SᵀS = Σ x xᵀ, so that the error of outputs ‖X·(W − A·B)‖ is; V alone carries the weighting, and
nothing is inverted. A convolution's inputs are every place of its window with every channel.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from compress.arrays import describe, is_compressed, sharding_of
from compress.calibrated import matrices, met, unweighed
from compress.factored import Factored
from compress.nearest import USUAL
from compress.ranks import Spectrum, by_budget, by_energy
from compress.scheme import SPATIAL, core, inputs, role_of
from compress.transform import KEEP, Leafwise, Report, Rules, named_leaves

AUTO = "auto"
"""What a rule says of leaves among which a budget chooses."""

DAMPING = 1e-5
"""Part of the mean of Σ x xᵀ's diagonal that is added to it: directions that calibration did not
see come last, and not in any order."""

ROLES = ("kernel", *SPATIAL)

HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Rank:
    """What a rule says of a kernel: one of the first three.

    Attributes:
        rank: r.
        energy: the least part of Σ σ² that r directions carry.
        auto: that the transform's budget chooses.
        role: "kernel", "conv1d" …; None finds it out from path and shape.
    """

    rank: int | None = None
    energy: float | None = None
    auto: bool = False
    role: str | None = None

    def __post_init__(self) -> None:
        """Check."""
        if (self.rank is not None) + (self.energy is not None) + (self.auto is True) != 1:
            raise ValueError(f"{self}: expected one of rank, energy and auto")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank {self.rank!r}: expected a whole number of 1 or more")
        e = self.energy
        if e is not None and not (isinstance(e, Real) and 0 < float(e) <= 1):
            raise ValueError(f"energy {e!r}: expected a number above 0 and up to 1")
        if self.role not in (None, *ROLES):
            raise ValueError(f"role {self.role!r}: expected one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Lowrank(Leafwise):
    """See `lowrank`, which makes it."""

    aware: bool = False
    budget: float | None = None
    multiple: int = 1
    name: ClassVar[str] = "lowrank"
    local: ClassVar[bool] = False  # sums have other bits where parts are computed

    def __post_init__(self) -> None:
        """Check, and parse the rules."""
        super().__post_init__()
        b, m = self.budget, self.multiple
        if type(self.aware) is not bool:
            raise ValueError(f"lowrank: aware={self.aware!r}: expected true or false")
        if b is not None and not (isinstance(b, Real) and 0 < float(b) < 1):
            raise ValueError(f"lowrank: budget={b!r}: expected a part between 0 and 1")
        if type(m) is not int or m < 1:
            raise ValueError(f"lowrank: multiple={m!r}: expected a whole number of 1 or more")
        if (b is None) == any(option != KEEP and option.auto for _, option in self.rules):
            raise ValueError(
                "lowrank: a budget is for leaves whose rule is 'auto', and they for it"
            )

    def parse(self, option: Any) -> Rank:
        """See `Leafwise.parse`."""
        if isinstance(option, Rank):
            return option
        if isinstance(option, Mapping):
            return Rank(**option)
        return Rank(auto=True) if option == AUTO else Rank(rank=option)

    def resolve(self, path: str, leaf: Any, option: Rank) -> Rank:
        """See `Leafwise.resolve`."""
        return dataclasses.replace(option, role=option.role or role_of(path, leaf.shape))

    def needs(self, option: Any) -> bool:
        """See `Leafwise.needs`."""
        return self.aware

    def hessians(self) -> tuple[str, ...]:
        """See `Transform.hessians`."""
        return tuple(p for p, option in self.rules if option != KEEP and self.aware)

    def unfit(self, leaf: Any, option: Rank) -> str:
        """See `Leafwise.unfit`."""
        if is_compressed(leaf):
            return f"it is {describe(leaf)}; low rank is for floats, and comes first in a chain"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return f"{leaf.dtype} is not floating"
        if option.role not in ROLES:
            return (
                f"shape {tuple(leaf.shape)} is that of {option.role or 'no usual role'}; if it is "
                f"one, give it a role of {', '.join(ROLES)}"
            )
        if len(leaf.shape) < core(option.role) or not all(leaf.shape):
            return (
                f"shape {tuple(leaf.shape)}: a {option.role} has {core(option.role)} axes or more"
            )
        n_in = math.prod(leaf.shape[axis] for axis in inputs(option.role))
        if option.rank is not None and option.rank > min(n_in, leaf.shape[-1]):
            return f"rank {option.rank} is more than {n_in} inputs or {leaf.shape[-1]} outputs"
        return ""

    def _observed(self, path: str, leaf: Any, option: Any, stats: Any) -> Any:
        observed = super()._observed(path, leaf, option, stats)
        if observed is None:
            return None
        if why := unweighed(leaf, option.role, observed):
            raise ValueError(f"{path}: lowrank: {why}")
        return observed

    def leaf(self, leaf: Any, option: Rank, observed: Any) -> Factored:
        """See `Leafwise.leaf`."""
        role, r = option.role, option.rank
        assert role is not None
        assert r is not None
        w = matrices(leaf.astype(jnp.float32), role)
        a, b = jax.lax.map(
            lambda pair: _factors(pair[0], pair[1], r), (w, _weights(leaf, role, observed))
        )
        stack, space = leaf.shape[: -core(role)], (1,) * (core(role) - 2)
        return Factored(
            a.reshape(*leaf.shape[:-1], r).astype(leaf.dtype),
            b.reshape(*stack, *space, r, leaf.shape[-1]).astype(leaf.dtype),
        )

    def describe(self, option: Rank) -> str:
        """See `Leafwise.describe`."""
        return f"rank {option.rank}" + (" by activations" if self.aware else "")

    def __call__(self, params: Any, stats: Mapping[str, Any] | None = None) -> tuple[Any, Report]:
        """See `Transform`."""
        if all(option == KEEP or option.rank is not None for _, option in self.rules):
            return super().__call__(params, stats)
        exact, whole = self._ranked(params, stats)
        new, report = exact.__call__(params, stats)
        told = (dataclasses.replace(r, applied=whole.get(r.path, r.applied)) for r in report)
        return new, tuple(told)

    def ranked(self, params: Any, stats: Mapping[str, Any] | None = None) -> "Lowrank":
        """The same transform with a rank for each leaf instead of parts of energy and a budget.

        Leaves of which no rank within reason is smaller than the whole are kept.

        Args:
            params, stats: as the transform takes them; concrete, for ranks are of their values.

        Raises:
            ValueError: as the transform's call does; values are traced; the budget is too small.
        """
        return self._ranked(params, stats)[0]

    def _ranked(self, params: Any, stats: Any) -> tuple["Lowrank", dict[str, str]]:
        """See `ranked`; and of leaves that it keeps, why."""
        leaves, _ = named_leaves(params)
        rules = self._choose(leaves)
        why_kept: dict[str, str] = {}
        spectra: dict[str, Spectrum] = {}
        options: dict[str, Rank] = {}
        for (path, leaf), rule in zip(leaves, rules, strict=True):
            if rule is None or rule[1] == KEEP or rule[1].rank is not None:
                continue
            option = self.resolve(path, leaf, rule[1])
            if why := self.unfit(leaf, option):
                if self.strict:
                    raise ValueError(f"{path}: lowrank by rule {rule[0]!r}: {why}")
                why_kept[path] = f"kept: {why}"
                continue
            observed = self._observed(path, leaf, option, stats)
            if any(isinstance(x, Tracer) for x in jax.tree.leaves((leaf, observed))):
                raise ValueError(
                    f"{path}: its rank is to be found from values, and they are traced; "
                    "call .ranked(params, stats) before, outside of jit and eval_shape"
                )
            options[path] = option
            spectra[path] = _spectrum(leaf, option.role, observed)
        if not options:
            raise ValueError(f"lowrank: there is no leaf that {dict(self.rules)} can be applied to")
        found: dict[str, int | None] = {
            path: by_energy(spectra[path], option.energy, self.multiple)
            for path, option in options.items()
            if option.energy is not None
        }
        if self.budget is not None:
            chosen = {path: s for path, s in spectra.items() if options[path].auto}
            try:
                found |= by_budget(chosen, self.budget, self.multiple)
            except ValueError as error:
                raise ValueError(f"lowrank: {error}") from None
        exact = [
            (path, KEEP if found[path] is None else Rank(found[path], role=option.role))
            for path, option in options.items()
        ]
        used = {
            rule[0] for (p, _), rule in zip(leaves, rules, strict=True) if rule and p not in options
        }
        kept = [(pattern, option) for pattern, option in self.rules if pattern in used]
        kept = [(pattern, option) for pattern, option in kept if option == KEEP or option.rank]
        for path, rank in found.items():
            if rank is None:
                why_kept[path] = "kept: no lower rank would do"
        return dataclasses.replace(self, rules=(*exact, *kept), budget=None), why_kept


def lowrank(
    rules: Rules | int | None = None,
    *,
    aware: bool = False,
    budget: float | None = None,
    multiple: int = 1,
) -> Lowrank:
    """A transform that makes kernels and convolutions products of two thin arrays.

    Args:
        rules: glob pattern -> a rank; {"energy": 0.9}, the least part of Σ σ² to keep; "auto",
            whose ranks the budget chooses; or "keep". A rank alone, or None with a budget, is for
            every leaf whose path ends in "kernel" and that it fits. Arrays of a stack have the
            largest rank that one of them needs. A rank that is given may take more numbers than the
            leaf has; one that is chosen does not.
        aware: weigh directions by what meets the leaf, for the least error of outputs; needs
            statistics with Hessians.
        budget: part of the numbers of "auto" leaves that may stay, 0 to 1. Ranks go where a step
            carries most of its leaf's Σ σ² for the numbers that it takes.
        multiple: of ranks, where they are chosen: 128 fits a TPU's lanes.

    Returns:
        The transform. Which ranks it takes by energy or budget, its `ranked` says.

    Raises:
        ValueError: an option is none, or a budget comes without leaves for it.

    Source: Eckart and Young 1936; weighted by activations as SVD-LLM, Wang et al. 2024,
    https://arxiv.org/abs/2403.07378; convolutions as Zhang et al. 2015,
    https://arxiv.org/abs/1505.06798.

    >>> w = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
    >>> params, report = lowrank({"w": {"energy": 0.99}})({"w": w})
    >>> report[0].applied, report[0].bytes_before, report[0].bytes_after
    ('rank 1', 48, 28)
    """
    more: Any = {"aware": aware, "budget": budget, "multiple": multiple}
    if rules is None or isinstance(rules, int):
        option = Rank(auto=True) if rules is None else Rank(rules)
        return Lowrank(((USUAL, option),), strict=False, **more)
    return Lowrank(rules, **more)  # type: ignore[arg-type] # becomes pairs


def _weights(leaf: Any, role: str, observed: Any) -> jax.Array | None:
    """Σ x xᵀ of every array of a stack, damped, [L, K, K]; None if all inputs weigh alike."""
    if observed is None:
        return None
    seen = met(leaf, observed, role)
    assert seen.hessian is not None
    h = seen.hessian.reshape(-1, *seen.hessian.shape[-2:])
    mean = jnp.trace(h, axis1=-2, axis2=-1)[:, None, None] / h.shape[-1]
    # An array of a stack that met nothing weighs all alike.
    return h + jnp.where(mean == 0, np.float32(1), np.float32(DAMPING) * mean) * jnp.eye(
        h.shape[-1], dtype=h.dtype
    )


def _directions(w: jax.Array, h: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """σ and Vᵀ of S·W, falling, with SᵀS = h; [min(K, out)] and [min(K, out), out]."""
    if h is not None:
        values, vectors = jnp.linalg.eigh(h)
        root = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
        w = jnp.matmul(root, w, precision=HIGHEST)
    _, sigma, v = jnp.linalg.svd(w, full_matrices=False)
    return sigma, v


def _factors(w: jax.Array, h: jax.Array | None, rank: int) -> tuple[jax.Array, jax.Array]:
    """A [K, r] and B [r, out], whose columns and rows are of one length: they train alike."""
    v = _directions(w, h)[1][:rank]
    a = jnp.matmul(w, v.T, precision=HIGHEST)
    root = jnp.sqrt(jnp.linalg.norm(a, axis=0))
    root = jnp.where(root == 0, np.float32(1), root)
    return a / root, v * root[:, None]


@functools.partial(jax.jit, static_argnums=1)
def _sigmas(leaf: Any, role: str, observed: Any) -> jax.Array:
    stack = matrices(leaf.astype(jnp.float32), role), _weights(leaf, role, observed)
    return jax.lax.map(lambda pair: _directions(*pair)[0], stack)


def _spectrum(leaf: Any, role: str | None, observed: Any) -> Spectrum:
    assert role is not None
    if (where := sharding_of(leaf)) is not None:  # the same bits on every mesh, as in the leaf's
        leaf, observed = jax.device_put(
            (leaf, observed), NamedSharding(where.mesh, PartitionSpec())
        )
    sigma = np.asarray(_sigmas(leaf, role, observed), np.float64)
    count, n_out = sigma.shape[0], leaf.shape[-1]
    n_in = leaf.size // count // n_out
    return Spectrum(sigma**2, count * (n_in + n_out), leaf.size)
