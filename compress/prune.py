"""Pruning at once: entries of little worth become zero, and what stays may make up for them.

    magnitude   |w|                                        nothing is needed
    wanda       |w| · ‖x‖, of every output's inputs         statistics with Hessians
    sparsegpt   w² / [H⁻¹]², and the rest moves (OBS)       statistics with Hessians
    scores      whatever is given for the leaf, by path    `gradient_scores`, or anybody's

The shape stays, and so does the time of a product on every backend of XLA; `N:M` arrays take fewer
bytes (`compress.packed`). `compress.shrink` takes whole units out, which is faster everywhere.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from compress.arrays import describe, is_compressed
from compress.calibrated import matrices, met, unweighed
from compress.gptq_solver import BLOCK, HIGHEST, factor
from compress.nearest import USUAL
from compress.packed import Packed
from compress.patterns import Pattern, keys, largest, mask
from compress.scheme import ROLES, core, inputs, role_of
from compress.transform import KEEP, Leafwise, Rules, named_leaves

METHODS = ("magnitude", "wanda", "sparsegpt", "scores")


@dataclass(frozen=True)
class Sparsity:
    """What a rule says of an array.

    Attributes:
        part: of the entries that goes, between 0 and 1; None where the pattern says it.
        pattern: of `compress.patterns.Pattern`.
        role: of `compress.scheme.ROLES`; None finds it out from path and shape.
    """

    part: float | None = None
    pattern: str = ""
    role: str | None = None

    def __post_init__(self) -> None:
        """Check."""
        group = Pattern(self.pattern).group
        if (self.part is None) != (group is not None):
            raise ValueError(
                f"part={self.part!r}: expected one, but for a pattern N:M, which has it"
            )
        part = self.part
        if part is not None and not (isinstance(part, Real) and 0 < float(part) < 1):
            raise ValueError(f"part={part!r}: expected a number between 0 and 1")
        if self.role not in (None, *ROLES):
            raise ValueError(f"role={self.role!r}: expected one of {', '.join(ROLES)}")

    @property
    def gone(self) -> float:
        """The part that goes."""
        group = Pattern(self.pattern).group
        return 1 - group[0] / group[1] if group else float(self.part or 0)

    def __str__(self) -> str:
        """As a report has it."""
        return self.pattern if self.part is None else f"{self.part:g} {self.pattern}".strip()


def as_sparsity(option: Any) -> Sparsity:
    """What a rule's option says: a part, a pattern N:M, or a mapping of fields.

    >>> as_sparsity(0.5), as_sparsity("2:4")
    (Sparsity(part=0.5, pattern='', role=None), Sparsity(part=None, pattern='2:4', role=None))
    """
    if isinstance(option, Sparsity):
        return option
    if isinstance(option, Mapping):
        return Sparsity(**option)
    return Sparsity(pattern=option) if isinstance(option, str) else Sparsity(option)


@dataclass(frozen=True)
class Prune(Leafwise):
    """See `prune`, which makes it."""

    by: str = "magnitude"
    damping: float = 0.01
    name: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        """Check, and parse the rules."""
        super().__post_init__()
        if self.by not in METHODS:
            raise ValueError(f"prune: by={self.by!r}: expected one of {', '.join(METHODS)}")
        if not (isinstance(self.damping, Real) and float(self.damping) > 0):
            raise ValueError(f"prune: damping={self.damping!r}: expected a number above 0")

    @property
    def local(self) -> bool:  # type: ignore[override] # of the options, elsewhere of the class
        """Corrections and sums of blocks are sums, whose bits depend on the order."""
        blocks = any(o != KEEP and Pattern(o.pattern).block for _, o in self.rules)
        return self.by != "sparsegpt" and not blocks

    def parse(self, option: Any) -> Sparsity:
        """See `Leafwise.parse`."""
        return as_sparsity(option)

    def resolve(self, path: str, leaf: Any, option: Sparsity) -> Sparsity:
        """See `Leafwise.resolve`."""
        return dataclasses.replace(option, role=option.role or role_of(path, leaf.shape))

    def needs(self, option: Any) -> bool:
        """See `Leafwise.needs`."""
        return self.by != "magnitude"

    def observes(self) -> bool:
        """See `Transform.observes`: scores are not observed, but given."""
        return self.by not in ("magnitude", "scores")

    def hessians(self) -> tuple[str, ...]:
        """See `Transform.hessians`."""
        return tuple(p for p, option in self.rules if option != KEEP and self.observes())

    def unfit(self, leaf: Any, option: Sparsity) -> str:
        """See `Leafwise.unfit`."""
        role, pattern, why = option.role, Pattern(option.pattern), ""
        if is_compressed(leaf):
            why = f"it is {describe(leaf)}; prune floats, and compress then"
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            why = f"{leaf.dtype} is not floating"
        elif role is None or len(leaf.shape) < core(role) or not all(leaf.shape):
            why = f"shape {tuple(leaf.shape)} has no usual role; give it one of {', '.join(ROLES)}"
        elif role == "table" and self.observes():
            why = "rows of a table are looked up and meet no activations; prune it by magnitude"
        elif self.by == "sparsegpt" and pattern.block:
            why = "sparsegpt chooses entries anywhere, or N:M, and no blocks"
        elif self.by == "sparsegpt" and pattern.group and BLOCK % pattern.group[1]:
            why = f"sparsegpt goes by {BLOCK} inputs, which {pattern.group[1]} does not divide"
        else:
            why = pattern.unfit(leaf.shape, role)
            if not why and pattern.group and role != "table":
                why = Packed.unfit(leaf.shape[inputs(role)[-1]], pattern.group)
        return why

    def _observed(self, path: str, leaf: Any, option: Any, stats: Any) -> Any:
        observed = super()._observed(path, leaf, option, stats)
        if self.by == "scores" and np.shape(observed) != np.shape(leaf):
            raise ValueError(
                f"{path}: its scores are {list(np.shape(observed))}, and it is {list(leaf.shape)}"
            )
        if observed is None:
            return None
        if self.by == "scores":
            if not isinstance(observed, Tracer) and bool(jnp.isnan(observed).any()):
                raise ValueError(f"{path}: its scores hold NaN; look at what made them")
            return observed
        if why := unweighed(leaf, option.role, observed):
            raise ValueError(f"{path}: prune: {why}")
        return observed

    def leaf(self, leaf: Any, option: Sparsity, observed: Any) -> Any:
        """See `Leafwise.leaf`: an array with zeros, or a `Packed` one."""
        role, pattern = option.role, Pattern(option.pattern)
        assert role is not None
        w = leaf.astype(jnp.float32)
        if self.by == "sparsegpt":
            new = self._corrected(w, option, met(leaf, observed, role))
        else:
            if self.by == "scores":
                worth = observed
            else:
                worth = jnp.abs(w)
                if self.by == "wanda":
                    seen = met(leaf, observed, role)
                    assert seen.hessian is not None
                    length = jnp.sqrt(jnp.diagonal(seen.hessian, axis1=-2, axis2=-1))
                    worth = worth * length.reshape(*w.shape[:-1], 1)
            kept = mask(worth, pattern, option.gone, role, each_output=self.by == "wanda")
            new = jnp.where(kept, leaf, jnp.zeros((), leaf.dtype))
        new = new.astype(leaf.dtype)
        group = pattern.group if role != "table" else None
        return Packed.of(new, group) if group else new

    def _corrected(self, w: jax.Array, option: Sparsity, seen: Any) -> jax.Array:
        stack = matrices(w, option.role or "")
        hessians = seen.hessian.reshape(len(stack), *seen.hessian.shape[-2:])
        pattern, gone = Pattern(option.pattern), option.gone
        new = lax.map(
            lambda pair: corrected(pair[0], pair[1], pattern, gone, self.damping),
            (stack, hessians),
        )
        return new.reshape(w.shape)

    def describe(self, option: Sparsity) -> str:
        """See `Leafwise.describe`."""
        return f"pruned {option} by {self.by}"


def prune(rules: Rules | float | str, *, by: str = "magnitude", damping: float = 0.01) -> Prune:
    """A transform that makes entries zero at once.

    Args:
        rules: glob pattern -> the part that goes (0.5), "N:M" ("2:4": of four neighbours along the
            input axis two stay), a mapping of part, pattern ("16x16": blocks of inputs × outputs)
            and role, or "keep". One option alone is for every leaf whose path ends in "kernel" and
            that it fits. N:M kernels come out packed; others with zeros in them.
        by: one of `METHODS`; all but the first need `stats`: of `compress.observe` with Hessians,
            or for "scores" an array of the leaf's shape by path, as `gradient_scores` gives.
        damping: of sparsegpt, as `compress.gptq` has it.

    Returns:
        The transform; its call raises as `Transform` says.

    Raises:
        ValueError: an option or a method is none.

    Source: Wanda, Sun et al. 2023, https://arxiv.org/abs/2306.11695; SparseGPT, Frantar & Alistarh
    2023, https://arxiv.org/abs/2301.00774.

    >>> w = jnp.array([[4.0, 1.0], [2.0, 3.0]])
    >>> new, report = prune({"w": 0.5})({"w": w})
    >>> new["w"].tolist(), report[0].applied
    ([[4.0, 0.0], [0.0, 3.0]], 'pruned 0.5 by magnitude')
    """
    if isinstance(rules, float | str | Sparsity):
        return Prune(((USUAL, rules),), strict=False, by=by, damping=damping)
    return Prune(rules, by=by, damping=damping)  # type: ignore[arg-type] # becomes pairs


def gradient_scores(
    loss: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Any]
) -> dict[str, jax.Array]:
    """What taking each entry out would change of a loss, to first order: |w · Σ dL/dw|.

    Args:
        loss: of parameters and a batch.
        params: a tree of floats.
        batches: of examples.

    Returns:
        By path, float32 of the leaf's shape: `stats` of `prune(..., by="scores")`.

    Source: Molchanov et al. 2017, https://arxiv.org/abs/1611.06440.

    >>> p = {"w": jnp.array([1.0, 2.0])}
    >>> gradient_scores(lambda p, x: (p["w"] * x).sum(), p, [jnp.array([3.0, 1.0])])["w"]
    Array([3., 2.], dtype=float32)
    """
    slope, total = jax.jit(jax.grad(loss)), None
    for batch in batches:
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), slope(params, batch))
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    if total is None:
        raise ValueError("gradient_scores: expected a batch or more")
    worth = jax.tree.map(lambda w, g: jnp.abs(w.astype(jnp.float32) * g), params, total)
    return dict(named_leaves(worth)[0])


def corrected(
    w: jax.Array, hessian: jax.Array, pattern: Pattern, gone: float, damping: float
) -> jax.Array:
    """SparseGPT: a matrix with zeros, in which what stays makes up for what went.

    With (H + d·I)⁻¹ = Uᵀ U, inputs are gone through in order, 128 at a time; of these, or of every
    M, those of least w² / U_kk² go, and each that goes is an error that inputs to come correct.

    Args:
        w: float32 [K, out].
        hessian: float32 [K, K], Σ x xᵀ of what meets it, times anything.
        pattern: anywhere, or N:M with M a divisor of 128.
        gone: the part that goes.
        damping: part of the mean of H's diagonal that is added to it.
    """
    K, _ = w.shape
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    h = hessian / jnp.where(mean == 0, 1, mean) + jnp.diag((diagonal == 0).astype(jnp.float32))
    u, finite = factor(h, damping)
    size = pattern.group[1] if pattern.group else BLOCK
    blocks = -(-K // BLOCK)
    more = blocks * BLOCK - K
    w = jnp.pad(w, ((0, more), (0, 0)))
    u = jnp.pad(u, ((0, more), (0, more))) + jnp.diag((jnp.arange(K + more) >= K).astype(u.dtype))

    def choose(rows: jax.Array, pivots: jax.Array, real: jax.Array) -> jax.Array:
        worth = jnp.square(rows / pivots[:, None])
        if pattern.group:
            return mask(worth, pattern, gone, "kernel")
        # What fills the last block is chosen first, and does not count.
        filled = jnp.sum(~real) * np.int32(rows.shape[1])
        count = jnp.sum(real).astype(jnp.float32) * np.float32(rows.shape[1] * (1 - gone))
        stay = jnp.round(count).astype(jnp.int32)
        worth = jnp.where(real[:, None], worth, np.float32(np.inf))
        return largest(keys(worth), jnp.maximum(stay, 1) + filled, (0, 1))

    def block(w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = b * BLOCK
        rows = lax.dynamic_slice_in_dim(w, start, BLOCK)
        strip = lax.dynamic_slice_in_dim(u, start, BLOCK)
        own = lax.dynamic_slice_in_dim(strip, start, BLOCK, axis=1)
        real = start + jnp.arange(BLOCK) < K
        pivots = jnp.diagonal(own)

        def run(carry: Any, r: jax.Array) -> tuple[Any, None]:
            rows, errors = carry
            first = r * size
            here = lax.dynamic_slice_in_dim(rows, first, size)
            kept = choose(
                here,
                lax.dynamic_slice_in_dim(pivots, first, size),
                lax.dynamic_slice_in_dim(real, first, size),
            )

            def row(i: jax.Array, carry: Any) -> Any:
                rows, errors = carry
                j = first + i
                x = lax.dynamic_slice_in_dim(rows, j, 1)
                after = lax.dynamic_slice_in_dim(own, j, 1)[0]  # zeros before j
                stays = lax.dynamic_slice_in_dim(kept, i, 1)
                error = jnp.where(stays, np.float32(0), x) / after[j]
                rows = rows - after[:, None] * error
                # Exactly zero, not what is left of a subtraction.
                x = jnp.where(stays, x, np.float32(0))
                rows = lax.dynamic_update_slice_in_dim(rows, x, j, 0)
                return rows, lax.dynamic_update_slice_in_dim(errors, error, j, 0)

            return lax.fori_loop(0, size, row, (rows, errors)), None

        (rows, errors), _ = lax.scan(run, (rows, jnp.zeros_like(rows)), jnp.arange(BLOCK // size))
        return w - jnp.matmul(strip.T, errors, precision=HIGHEST), rows

    _, new = lax.scan(block, w, jnp.arange(blocks))
    new = new.reshape(blocks * BLOCK, -1)[:K]
    return jnp.where(finite, new, np.float32(np.nan))
