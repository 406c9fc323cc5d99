"""A transform is a value: a pure function `(params, stats) -> (params, report)`, and data.

Leaves are addressed by path ("encoder/0/query/kernel") and chosen by glob rules: the first match
wins. A rule that matches nothing is an error, and so is a leaf that its rule cannot be applied to:
nothing stays uncompressed in silence. `Leafwise` walks the tree for transforms that are mathematics
on one leaf; `chain` makes one transform of several, as optax does with gradients'.
"""

import dataclasses
import difflib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from compress.arrays import is_compressed, sharding_of

KEEP = "keep"
"""What a rule says of leaves that stay as they are."""

Rules = Mapping[str, Any] | Sequence[tuple[str, Any]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["error"],
    meta_fields=["path", "shape", "bytes_before", "bytes_after", "applied"],
)
@dataclass(frozen=True)
class Record:
    """What a transform did to one leaf; a pytree, so that `jit` and `eval_shape` can return it.

    Attributes:
        path: the leaf's path, its keys joined by "/".
        shape: shape of the array that the leaf stands for.
        bytes_before: size of the leaf that came in, in bytes.
        bytes_after: size of the leaf that went out, in bytes.
        applied: what was done, such as "int8", or "kept" and why.
        error: ‖w − w'‖ / ‖w‖ in the Frobenius norm, 0 for a kept leaf; a tracer under `jit`.
    """

    path: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    applied: str
    error: float | jax.Array


Report = tuple[Record, ...]


def match(pattern: str, path: str) -> bool:
    """Whether a path matches a glob: "**" is any number of keys, "*" and "?" stay within one.

    >>> match("**/kernel", "encoder/0/query/kernel"), match("**/kernel", "kernel")
    (True, True)
    >>> match("encoder/*/kernel", "encoder/0/query/kernel")
    False
    """
    return _match(pattern.split("/"), path.split("/"))


def _match(pattern: Sequence[str], keys: Sequence[str]) -> bool:
    if not pattern:
        return not keys
    if pattern[0] == "**":
        return _match(pattern[1:], keys) or (bool(keys) and _match(pattern, keys[1:]))
    return bool(keys) and fnmatchcase(keys[0], pattern[0]) and _match(pattern[1:], keys[1:])


def path_name(path: Any) -> str:
    """A key path of `jax.tree_util` as "encoder/0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree with their paths, a compressed array being one leaf.

    Returns:
        Pairs (path, leaf) in the tree's order, and the tree's structure.

    >>> [path for path, _ in named_leaves({"layers": [{"kernel": 1.0}]})[0]]
    ['layers/0/kernel']
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return [(path_name(p), x) for p, x in pairs], treedef


class Transform(ABC):
    """A function `(params, stats) -> (params, report)` that is also data.

    Subclasses are frozen dataclasses whose fields JSON can hold, and have a `name` for recipes.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, params: Any, stats: Mapping[str, Any] | None = None) -> tuple[Any, Report]:
        """Apply it.

        Args:
            params: any pytree of arrays, some of them compressed already; concrete, traced or
                sharded.
            stats: what `compress.observe` saw of the leaves, by path, if it is needed.

        Returns:
            The new tree, and one record per leaf in the tree's order.

        Raises:
            ValueError: it cannot be applied to a leaf, which the message names.
        """

    def observes(self) -> bool:
        """Whether it needs `stats`."""
        return False

    def hessians(self) -> tuple[str, ...]:
        """The patterns of leaves whose Hessians it needs in `stats`, for `compress.observe`."""
        return ()

    def data(self) -> dict[str, Any]:
        """Its fields as JSON has them, and its name."""
        assert dataclasses.is_dataclass(self)
        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"transform": self.name, **fields}

    @classmethod
    def of_data(cls, fields: Mapping[str, Any]) -> Self:
        """The transform of such fields; the reverse of `data`."""
        return cls(**fields)


def plain(value: Any) -> Any:
    """A field as JSON has it: rules as an object, schemes as theirs, without what is usual."""
    if isinstance(value, tuple) and all(isinstance(v, tuple) and len(v) == 2 for v in value):
        return {k: plain(v) for k, v in value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {k: v for k, v in fields.items() if v is not None}
    return value


@dataclass(frozen=True)
class Leafwise(Transform):
    """A transform whose mathematics is of one leaf at a time.

    Attributes:
        rules: glob pattern -> option or "keep", in order.
        strict: a leaf that its rule cannot be applied to is an error; if False it is kept, and the
            report says why, but a rule that can be applied to none is an error all the same.
    """

    rules: tuple[tuple[str, Any], ...]
    strict: bool = True

    local: ClassVar[bool] = True
    """Whether the result has the same bits if devices that hold parts of the leaf compute it."""

    def __post_init__(self) -> None:
        """Parse the rules."""
        if type(self.strict) is not bool:
            raise ValueError(f"{self.name}: strict={self.strict!r}: expected true or false")
        pairs = self.rules.items() if isinstance(self.rules, Mapping) else self.rules
        parsed = []
        for pattern, option in pairs:
            try:
                parsed.append((pattern, option if option == KEEP else self.parse(option)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.name}: rule {pattern!r}: {error}") from None
        object.__setattr__(self, "rules", tuple(parsed))

    def parse(self, option: Any) -> Any:
        """A rule's option, checked; hashable."""
        return option

    def resolve(self, path: str, leaf: Any, option: Any) -> Any:
        """The option for one leaf, with what its path and shape say; hashable."""
        return option

    @abstractmethod
    def unfit(self, leaf: Any, option: Any) -> str:
        """Why a leaf cannot have a resolved option, in words, or ""."""

    @abstractmethod
    def leaf(self, leaf: Any, option: Any, observed: Any) -> Any:
        """The new leaf; jax.numpy all the way."""

    def describe(self, option: Any) -> str:
        """What is applied, for the report."""
        return str(option)

    def error(self, leaf: Any, new: Any) -> jax.Array:
        """‖w − w'‖ / ‖w‖; NaN if the leaf has what is not finite."""
        return relative_error(leaf, new)

    def needs(self, option: Any) -> bool:
        """Whether an option needs statistics of the leaf."""
        return False

    def observes(self) -> bool:
        """See `Transform.observes`."""
        return any(option != KEEP and self.needs(option) for _, option in self.rules)

    def __call__(self, params: Any, stats: Mapping[str, Any] | None = None) -> tuple[Any, Report]:
        """See `Transform`."""
        leaves, treedef = named_leaves(params)
        new_leaves, report, applied_by, reasons = [], [], set(), {}
        for (path, leaf), rule in zip(leaves, self._choose(leaves), strict=True):
            new, applied, error = leaf, "kept: no rule", 0.0
            if rule is not None:
                pattern, option = rule
                option = option if option == KEEP else self.resolve(path, leaf, option)
                why = f"rule {pattern!r}" if option == KEEP else self.unfit(leaf, option)
                if why and self.strict and option != KEEP:
                    raise ValueError(f"{path}: {self.name} by rule {pattern!r}: {why}")
                applied = f"kept: {why}"
                reasons.setdefault(pattern, f"{path}: {why}")
                if option == KEEP or not why:
                    applied_by.add(pattern)
                if not why:
                    observed = self._observed(path, leaf, option, stats)
                    new, error = self._compute(leaf, option, observed)
                    applied = self.describe(option)
                    error = error if isinstance(error, Tracer) else float(error)
                    if isinstance(error, float) and not math.isfinite(error):
                        raise ValueError(f"{path}: {_broken(leaf, observed)}")
            new_leaves.append(new)
            report.append(Record(path, tuple(leaf.shape), size(leaf), size(new), applied, error))
        for pattern, _ in self.rules:
            if pattern not in applied_by:
                raise ValueError(
                    f"{self.name}: rule {pattern!r} can be applied to no leaf: {reasons[pattern]}"
                )
        return jax.tree_util.tree_unflatten(treedef, new_leaves), tuple(report)

    def _choose(self, leaves: Sequence[tuple[str, Any]]) -> list[tuple[str, Any] | None]:
        paths = [path for path, _ in leaves]
        rules = [next((r for r in self.rules if match(r[0], path)), None) for path in paths]
        for rule in self.rules:
            if rule not in rules:
                raise ValueError(f"{self.name}: {_nothing(rule[0], paths)}")
        return rules

    def _observed(self, path: str, leaf: Any, option: Any, stats: Mapping[str, Any] | None) -> Any:
        if not self.needs(option):
            return None
        if not stats:
            raise ValueError(
                f"{path}: {self.name} needs statistics of what meets it; call the transform with "
                "those of compress.observe: transform(params, stats)"
            )
        if path not in stats:
            near = difflib.get_close_matches(path, list(stats), n=3, cutoff=0.0)
            raise ValueError(
                f"{path}: {self.name} needs statistics, and calibration saw no product with it; "
                f"nearest are {', '.join(near)}; keep this leaf, or observe a function that uses it"
            )
        return stats[path]

    def _compute(self, leaf: Any, option: Any, observed: Any) -> tuple[Any, Any]:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((leaf, observed))):
            return _leaf(self, option, leaf, observed)
        where = sharding_of(leaf)
        if where is not None and not self.local:
            whole = NamedSharding(where.mesh, PartitionSpec())
            leaf, observed = jax.device_put((leaf, observed), whole)
        new, error = _leaf_jit(self, option, leaf, observed)
        if where is not None:
            new = jax.device_put(new, new.place(where) if is_compressed(new) else where)
        return new, error


def _leaf(transform: Leafwise, option: Any, leaf: Any, observed: Any) -> tuple[Any, jax.Array]:
    new = transform.leaf(leaf, option, observed)
    return new, transform.error(leaf, new)


_leaf_jit = jax.jit(_leaf, static_argnums=(0, 1))


def _broken(leaf: Any, observed: Any) -> str:
    def finite(tree: Any) -> bool:
        arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
        return all(bool(jnp.isfinite(x).all()) for x in arrays)

    if observed is None or not finite(leaf):
        return "holds NaN or infinity and cannot be compressed"
    if not finite(observed):
        return "its calibration statistics hold NaN or infinity; look at the calibration data"
    if observed.hessian is not None:
        return "its Hessian could not be factored; give more calibration data or more damping"
    return (
        "it and its calibration statistics are finite, but what is made of them is not: it is too "
        "large for float32; look for outliers in both"
    )


def _nothing(pattern: str, paths: Sequence[str]) -> str:
    """The message for a rule that selected nothing."""
    if any(match(pattern, path) for path in paths):
        why = "matches only leaves that an earlier rule takes; put it first or remove it"
    else:
        word = pattern.replace("**/", "").replace("*", "")
        near = difflib.get_close_matches(word, paths, n=3, cutoff=0.0)
        why = "matches no path; nearest are " + (", ".join(near) or "none: the tree is empty")
    return f"rule {pattern!r} {why}; was it made for another model?"


def size(tree: Any) -> int:
    """Bytes of all arrays in a leaf, from their shapes and dtypes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree_util.tree_leaves(tree))


@dataclass(frozen=True)
class Chain(Transform):
    """Several transforms, one after the other, each on what the last one left."""

    transforms: tuple[Transform, ...]
    name: ClassVar[str] = "chain"

    def __call__(self, params: Any, stats: Mapping[str, Any] | None = None) -> tuple[Any, Report]:
        """See `Transform`."""
        first, _ = named_leaves(params)
        whole: list[Record] = []
        for transform in self.transforms:
            params, report = transform(params, stats)
            if not whole:
                whole = list(report)
                continue
            for i, (old, new) in enumerate(zip(whole, report, strict=True)):
                if not new.applied.startswith("kept"):
                    done = [r.applied for r in (old, new) if not r.applied.startswith("kept")]
                    whole[i] = dataclasses.replace(
                        new, bytes_before=old.bytes_before, applied=", ".join(done)
                    )
        last, _ = named_leaves(params)
        for i, ((_, before), (_, after)) in enumerate(zip(first, last, strict=True)):
            if is_compressed(after):
                error = relative_error(before, after)
                error = error if isinstance(error, Tracer) else float(error)
                whole[i] = dataclasses.replace(whole[i], error=error)
        return params, tuple(whole)

    def observes(self) -> bool:
        """See `Transform.observes`."""
        return any(t.observes() for t in self.transforms)

    def hessians(self) -> tuple[str, ...]:
        """See `Transform.hessians`."""
        return tuple(dict.fromkeys(p for t in self.transforms for p in t.hessians()))

    def data(self) -> dict[str, Any]:
        """See `Transform.data`."""
        return {"transform": self.name, "transforms": [t.data() for t in self.transforms]}


@jax.jit
def relative_error(before: Any, after: Any) -> jax.Array:
    """‖before − after‖ / ‖before‖ of arrays, compressed or not, in the Frobenius norm.

    >>> relative_error(jnp.ones(4), jnp.zeros(4))
    Array(1., dtype=float32)
    """
    a, b = ((x.dense() if is_compressed(x) else x).astype(jnp.float32) for x in (before, after))
    # In units of the largest element, so that no square overflows.
    unit = jnp.maximum(jnp.max(jnp.abs(a), initial=0), np.float32(1e-30))
    a, b = a / unit, b / unit
    norm = jnp.linalg.norm(a)
    return jnp.linalg.norm(a - b) / jnp.where(norm == 0, np.float32(1), norm)


def chain(*transforms: Transform) -> Chain:
    """One transform of several: each is applied to what the one before it left.

    The report's bytes and errors are from the first tree to the last.

    >>> from compress import quantize, rotate
    >>> t = chain(rotate({"w": 4}), quantize({"w": "int8"}))
    >>> [r.applied for r in t({"w": jnp.eye(4)})[1]]
    ['rotated by 4, int8']
    """
    return Chain(tuple(transforms))
