"""Low-rank adaptation: few floats are trained, on leaves that may be codes already.

    adapt = chain(quantize({"**/kernel": "nf4"}), lora({"**/query/kernel": 8, "head/**": "train"}))
    params, report = adapt(params)
    trainable, frozen = partition(params)        # an optimiser's state exists for the first only
    loss = lambda trainable, batch: loss_fn(apply(model), combine(trainable, frozen), batch)

`lora` makes `LoRA` and `Trained` leaves (`compress.adapters`), `partition` parts a tree by them and
`combine` joins it. `compress.merge` makes plain arrays of it; `compress.adapter_trees` keeps
adapters apart from their base.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from compress.adapters import LoRA, Trained
from compress.arrays import Quantized, describe, is_compressed
from compress.calibrated import met, unweighed
from compress.learned import Learned
from compress.nearest import USUAL
from compress.observed import Observed
from compress.scheme import role_of
from compress.transform import KEEP, Leafwise, Rules, named_leaves

INITS = ("uniform", "eva")
"""How A begins."""

TRAIN = "train"
"""What a rule says of leaves that are trained whole."""


@dataclass(frozen=True)
class LowRank:
    """What a rule says of a kernel.

    Attributes:
        rank: r.
        alpha: s = alpha / r, or alpha / √r; None for the transform's.
        role: "kernel" for [*stack, in, out]; None finds it out from path and shape.
        salt: of the leaf's random numbers, from its path.
    """

    rank: int
    alpha: float | None = None
    role: str | None = None
    salt: int | None = None

    def __post_init__(self) -> None:
        """Check."""
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank {self.rank!r}: expected a whole number of 1 or more")
        _check_alpha(self.alpha)


def _check_alpha(alpha: Any) -> None:
    if alpha is not None and not (isinstance(alpha, Real) and 0 < float(alpha) < math.inf):
        raise ValueError(f"alpha {alpha!r}: expected a finite number of more than 0")


@dataclass(frozen=True)
class Lora(Leafwise):
    """See `lora`, which makes it."""

    alpha: float | None = None
    seed: int = 0
    dora: bool = False
    rslora: bool = False
    init: str = "uniform"
    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        """Check, and parse the rules."""
        try:
            _check_alpha(self.alpha)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if self.init not in INITS:
            raise ValueError(f"lora: init={self.init!r}: expected one of {', '.join(INITS)}")
        super().__post_init__()

    @property
    def local(self) -> bool:  # type: ignore[override] # of the options, elsewhere of the class
        """Magnitudes and eigenvectors are of sums, whose bits depend on the order."""
        return not self.dora and self.init == "uniform"

    def needs(self, option: Any) -> bool:
        """See `Leafwise.needs`."""
        return self.init == "eva" and option != TRAIN

    def hessians(self) -> tuple[str, ...]:
        """See `Transform.hessians`."""
        return tuple(p for p, option in self.rules if option != KEEP and self.needs(option))

    def parse(self, option: Any) -> Any:
        """See `Leafwise.parse`."""
        if option == TRAIN or isinstance(option, LowRank):
            return option
        fields = dict(option) if isinstance(option, Mapping) else {"rank": option}
        if "rank" not in fields or set(fields) - {"rank", "alpha", "role"}:
            raise ValueError(
                f"{option!r}: expected a rank, 'train', 'keep', or a mapping of rank, alpha, role"
            )
        if fields.get("role") not in (None, "kernel"):
            raise ValueError(f"role {fields['role']!r}: a low-rank change is for a 'kernel'")
        return LowRank(**fields)

    def resolve(self, path: str, leaf: Any, option: Any) -> Any:
        """See `Leafwise.resolve`."""
        if option == TRAIN:
            return option
        alpha = self.alpha if option.alpha is None else option.alpha
        return dataclasses.replace(
            option,
            alpha=float(option.rank if alpha is None else alpha),
            role=option.role or role_of(path, leaf.shape),
            salt=zlib.crc32(path.encode()),
        )

    def unfit(self, leaf: Any, option: Any) -> str:
        """See `Leafwise.unfit`."""
        codes = isinstance(leaf, Quantized)
        why = ""
        if is_compressed(leaf) and not (codes and option != TRAIN):
            why = f"it is {describe(leaf)}, which is not trained whole, nor adapted twice"
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            why = f"{leaf.dtype} is not floating"
        elif option != TRAIN and option.role != "kernel":
            why = (
                f"shape {tuple(leaf.shape)} is that of {option.role or 'no usual role'}, and a "
                'low-rank change is for a kernel; if it is one, say {"rank": r, "role": "kernel"}'
            )
        elif option != TRAIN and len(leaf.shape) < 2:
            why = f"shape {tuple(leaf.shape)}: a kernel has 2 axes or more"
        elif option != TRAIN and option.rank > min(leaf.shape[-2:]):
            why = (
                f"rank {option.rank} is more than the smaller side of {list(leaf.shape[-2:])}; "
                "take a smaller one, or 'train' it whole"
            )
        elif codes and self.needs(option):
            why = f"it is {describe(leaf)}; calibration does not see what meets it, as eva needs"
        return why

    def leaf(self, leaf: Any, option: Any, observed: Any) -> Any:
        """See `Leafwise.leaf`; `observed` is the random key, and statistics if it needs them."""
        if option == TRAIN:
            return Trained(leaf)
        key, seen = observed
        *stack, n_in, n_out = leaf.shape
        dtype, rank = np.promote_types(leaf.dtype, np.float32), option.rank
        bound = 1 / math.sqrt(n_in)
        a = jax.random.uniform(key, (*stack, n_in, rank), dtype, -bound, bound)
        if seen is not None:
            a = _principal(met(leaf, seen, "kernel"), a)
        root = math.sqrt(rank) if self.rslora else rank
        new = LoRA(
            leaf,
            a,
            jnp.zeros((*stack, rank, n_out), dtype),
            jnp.full((*stack, 1, 1), option.alpha / root, jnp.float32),
        )
        return dataclasses.replace(new, magnitude=new.norm()) if self.dora else new

    def error(self, leaf: Any, new: Any) -> jax.Array:
        """0, for B is: nothing of the kernel's size is computed. NaN as `Leafwise.error` says."""
        arrays = jax.tree.leaves((leaf, new.a if isinstance(new, LoRA) else ()))
        parts = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
        finite = jnp.array([jnp.isfinite(x).all() for x in parts]).all()
        return jnp.where(finite, np.float32(0), np.float32(np.nan))

    def _observed(self, path: str, leaf: Any, option: Any, stats: Any) -> Any:
        observed = super()._observed(path, leaf, option, stats)
        if observed is None:
            return None
        if why := unweighed(leaf, "kernel", observed):
            raise ValueError(f"{path}: lora: {why}")
        return observed

    def describe(self, option: Any) -> str:
        """See `Leafwise.describe`."""
        return (
            "trained" if option == TRAIN else f"{'DoRA' if self.dora else 'LoRA'} r={option.rank}"
        )

    def _compute(self, leaf: Any, option: Any, observed: Any) -> tuple[Any, Any]:
        key = None
        if option != TRAIN:
            # Threefry: the same numbers on every mesh. As data, one program serves all leaves.
            key = jax.random.key(self.seed, impl="threefry2x32")
            key = jax.random.fold_in(key, np.uint32(option.salt))
            option = dataclasses.replace(option, salt=None)
        new, error = super()._compute(leaf, option, (key, observed))
        # The leaf itself, not what a program returned of it, which may be a copy.
        return dataclasses.replace(new, **{"array" if option == TRAIN else "base": leaf}), error


def _principal(seen: Observed, a: jax.Array) -> jax.Array:
    """A's columns as the directions in which a kernel's inputs are largest, Σ x xᵀ's eigenvectors.

    Of unit length, the largest number of each positive. `a`, of the same shape, stays where an
    array of a stack met no rows.
    """
    assert seen.hessian is not None
    vectors = jnp.linalg.eigh(seen.hessian)[1][..., ::-1][..., : a.shape[-1]]
    largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
    vectors = vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=-2))
    return jnp.where((seen.rows > 0)[..., None, None], vectors.astype(a.dtype), a)


def lora(
    rules: Rules | int,
    *,
    alpha: float | None = None,
    seed: int = 0,
    dora: bool = False,
    rslora: bool = False,
    init: str = "uniform",
) -> Lora:
    """A transform that adds a low-rank change to chosen kernels, and marks what is trained.

        W' = W + s·A·B,   A ~ U(−1/√in, 1/√in) [in, r],   B = 0 [r, out],   s = alpha / r

    The function is the same until training moves B. A and B are float32 at least; the leaf itself
    is frozen, be it floats or codes. A leaf's numbers depend on seed, path and shape alone.

    Args:
        rules: glob pattern -> rank, "train" (a plain leaf that is trained whole), "keep", or a
            mapping of rank and alpha. A rank alone is for every leaf whose path ends in "kernel"
            and that it fits. What no rule matches is frozen.
        alpha: None for the rank, so that s = 1 (as PEFT's usual 8 and 8 give).
        seed: of A.
        dora: train the length of every output's column apart from its direction.
        rslora: s = alpha / √r (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        init: of A, "uniform", or "eva": the r directions, of length 1, in which a kernel's inputs
            are largest, eigenvectors of Σ x xᵀ. It needs statistics with Hessians, in² numbers a
            kernel, and a leaf of floats; training needs fewer steps.

    Returns:
        The transform; its call raises as `Transform` says.

    Raises:
        ValueError: a rule's option is none, or alpha is no finite number of more than 0.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, over codes Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314; A as PEFT's (Kaiming's uniform with a = √5). DoRA: Liu et al.
    2024, https://arxiv.org/abs/2402.09353. EVA: Paischer et al. 2024,
    https://arxiv.org/abs/2410.07170, here with one rank for all.

    >>> params = {"query": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}}
    >>> params, report = lora({"**/kernel": 2, "**/bias": "train"})(params)
    >>> [(r.path, r.bytes_before, r.bytes_after, r.applied) for r in report]
    [('query/bias', 16, 16, 'trained'), ('query/kernel', 64, 132, 'LoRA r=2')]
    """
    options = {"alpha": alpha, "seed": seed, "dora": dora, "rslora": rslora, "init": init}
    if isinstance(rules, int):
        return Lora(((USUAL, rules),), strict=False, **options)  # type: ignore[arg-type] # of their names
    return Lora(rules, **options)  # type: ignore[arg-type] # becomes pairs


# --- what is trained --------------------------------------------------------------------------


def partition(params: Any) -> tuple[Any, Any]:
    """Part a tree into what is trained and the rest.

    Trained are A, B and magnitudes of `LoRA` leaves, and leaves that are `Trained` or `Learned`.

    Args:
        params: as `lora` or `qat` left it.

    Returns:
        Two trees like it, each with None where the other has an array: the first for `jax.grad` and
        an optimiser, the second for what holds still. `combine` joins them.

    Raises:
        ValueError: nothing in it is trained.

    >>> params, _ = lora({"w": 1})({"w": jnp.eye(2), "bias": jnp.zeros(2)})
    >>> trainable, frozen = partition(params)
    >>> sum(x.size for x in jax.tree.leaves(trainable)), trainable["bias"], trainable["w"].base
    (4, None, None)
    """
    leaves, treedef = named_leaves(params)
    halves = [_halves(leaf) for _, leaf in leaves]
    if not any(jax.tree.leaves(trained) for trained, _ in halves):
        raise ValueError("nothing in the tree is trained; compress.lora makes it a tree that is")
    first, second = zip(*halves, strict=True)
    return jax.tree.unflatten(treedef, first), jax.tree.unflatten(treedef, second)


def _halves(leaf: Any) -> tuple[Any, Any]:
    if isinstance(leaf, LoRA):
        # Those of several adapters are divided by norms that no longer move.
        moves = leaf.magnitude if leaf.adapters == 1 else None
        still = None if leaf.adapters == 1 else leaf.magnitude
        return (
            dataclasses.replace(leaf, base=None, scaling=None, magnitude=moves, ids=None),
            dataclasses.replace(leaf, a=None, b=None, magnitude=still),
        )
    if isinstance(leaf, Trained):
        return leaf, Trained(None)  # type: ignore[arg-type] # a hole
    return (leaf, None) if isinstance(leaf, Learned) else (None, leaf)


def combine(trainable: Any, frozen: Any) -> Any:
    """The tree that `partition` parted, with the arrays that the parts hold now.

    >>> params, _ = lora({"w": 1})({"w": jnp.eye(2), "bias": jnp.zeros(2)})
    >>> combine(*partition(params))["w"].shape
    (2, 2)
    """

    def is_none(x: Any) -> bool:
        return x is None

    def join(a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        return jax.tree.map(lambda a, b: b if a is None else a, a, b, is_leaf=is_none)

    return jax.tree.map(join, trainable, frozen, is_leaf=lambda x: x is None or is_compressed(x))


def trainable_share(params: Any) -> float:
    """Trained numbers as a part of all numbers, codes counted one by one.

    >>> params, _ = lora({"w": 1})({"w": jnp.zeros((30, 30))})
    >>> trainable_share(params) == 60 / 960
    True
    """
    trained = whole = 0
    for _, leaf in named_leaves(params)[0]:
        moved = sum(math.prod(x.shape) for x in jax.tree.leaves(_halves(leaf)[0]))
        trained += moved
        still = 0 if isinstance(leaf, Trained) else math.prod(leaf.shape)
        whole += moved if isinstance(leaf, Learned) else moved + still
    return trained / max(whole, 1)
