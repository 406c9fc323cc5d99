"""What methods that learn from calibration share: the statistics of a leaf as its values meet them.

Statistics are of a leaf's own inputs x. If it was prepared, x meets w = input_scale · H(values) by
way of x' = H(x · input_scale), and what is to be known of x' follows from what is known of x:

    max |x'| = max |x| · input_scale,   Σ x' x'ᵀ = H (input_scale · Σ x xᵀ · input_scale) H

The largest values of a rotated x' do not follow from those of x. K numbers the channels of x: the
inputs of a kernel, and of a convolution every place of its window with every channel.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from compress.arrays import Quantized
from compress.hadamard import rotate
from compress.histogram import EDGES, parse_method, threshold
from compress.observed import preparation
from compress.observing import Observed, Stats
from compress.scheme import Scheme, core, inputs, unfit
from compress.transform import KEEP, Leafwise


class Calibrated(Leafwise):
    """A transform of one leaf at a time that needs statistics of every leaf it is applied to.

    Its options have a `role`.
    """

    local: ClassVar[bool] = False  # sums and powers have other bits where parts are computed

    second: ClassVar[bool] = False
    """Whether Hessians are wanted, too."""

    def needs(self, option: Any) -> bool:
        """See `Leafwise.needs`."""
        return True

    def hessians(self) -> tuple[str, ...]:
        """See `Transform.hessians`."""
        return tuple(pattern for pattern, option in self.rules if self.second and option != KEEP)

    def unmet(self, leaf: Any, option: Any, observed: Observed) -> str:
        """Why statistics are not enough for a leaf, in words, or ""."""
        return not_enough(leaf, option, observed)

    def _observed(
        self, path: str, leaf: Any, option: Any, stats: Mapping[str, Any] | None
    ) -> Observed:
        observed = super()._observed(path, leaf, option, stats)
        if why := self.unmet(leaf, option, observed):
            raise ValueError(f"{path}: {self.name}: {why}")
        return observed


def not_enough(leaf: Any, option: Any, observed: Observed) -> str:
    """Why statistics are not enough for a leaf and its option, which has a `role`, or ""."""
    why = unmet(leaf, option.role, observed)
    return why or (unscaled(leaf, option, observed) if isinstance(option, Scheme) else "")


def unmet(leaf: Any, role: str, observed: Observed) -> str:
    """Why statistics are not those of a leaf of a role, in words, or "".

    >>> from compress.observed import measure
    >>> unmet(jnp.ones((4, 2)), "kernel", measure(jnp.ones((5, 3)), channels=1))
    'its statistics are of 3 channels, and a kernel of (4, 2) has 4; observe the function that ...'
    """
    if observed.prepared and observed.prepared != (own := preparation(leaf)):
        return (
            f"its statistics are of a leaf that was {observed.prepared}, and it is "
            f"{own or 'not prepared'}; observe the function with this one, or with the original"
        )
    K, channels = _channels(leaf.shape, role), observed.absmax.shape[-1]
    if observed.axes and tuple(observed.axes) != inputs(role):
        return (
            f"calibration saw products over its axes {tuple(observed.axes)}, and a {role}'s inputs "
            f"are {inputs(role)}; use quantize without static activations, or keep this leaf"
        )
    if channels != K:
        return (
            f"its statistics are of {channels} channels, and a {role} of {tuple(leaf.shape)} has "
            f"{K}; observe the function that it is a parameter of"
        )
    try:
        observed.over(leaf.shape[: -core(role)])
    except ValueError as error:
        return str(error)
    if not isinstance(observed.rows, Tracer) and not bool(jnp.any(observed.rows > 0)):
        return "it met no rows in calibration; give it data"
    return ""


def unweighed(leaf: Any, role: str, observed: Observed) -> str:
    """Why statistics do not weigh a leaf's inputs by pairs, in words, or "".

    >>> from compress.observed import measure
    >>> unweighed(jnp.ones((4, 2)), "kernel", measure(jnp.ones((5, 4)), channels=1))
    'its statistics have no Hessian; ask for it: observe(fn, hessians=[its path])'
    """
    if observed.hessian is None:
        return "its statistics have no Hessian; ask for it: observe(fn, hessians=[its path])"
    return unmet(leaf, role, observed)


def unscaled(leaf: Any, scheme: Scheme, observed: Observed) -> str:
    """Why a static scale of activations cannot be told from statistics, in words, or "".

    Every array of a stack has its own, which its own rows tell. Where statistics are traced nobody
    knows their values: there `compress.quantize.static_scale` keeps to what is positive.

    >>> from compress.observed import measure
    >>> seen = measure(jnp.array([[[1.0, 2.0]], [[0.0, 0.0]]]), channels=1, stack=1)
    >>> unscaled(jnp.ones((2, 2, 3)), Scheme(activations="static", role="kernel"), seen)
    "1 of 2 arrays of its stack met no rows in calibration, or zeros only, so that their static ..."
    """
    if scheme.activations != "static" or isinstance(observed.absmax, Tracer):
        return ""
    assert scheme.role is not None
    seen = observed.over(leaf.shape[: -core(scheme.role)])
    zero = jnp.max(seen.absmax, -1) == 0
    name, percent = parse_method(scheme.calibration)
    if name == "percentile":  # the first bin is that of zeros
        zero |= threshold(seen, f"percentile:{percent}") < EDGES[1]
    empty = int(jnp.sum(zero))
    if not empty:
        return ""
    return (
        f"{empty} of {zero.size} arrays of its stack met no rows in calibration, or zeros only, so "
        "that their static scale of activations is not known; calibrate on more data, or use "
        "activations='dynamic'"
    )


def fixed(observed: Observed, name: str) -> str:
    """Why what changes `input_scale` cannot use statistics of a prepared leaf, or ""."""
    if not observed.prepared:
        return ""
    return (
        f"its statistics are of what meets a leaf that is {observed.prepared}, which {name} "
        "changes; give it those of the original leaf"
    )


def unfit_method(leaf: Any, scheme: Scheme, role: str | None) -> str:
    """Why a leaf cannot have a scheme by a method that weighs inputs, in words, or "".

    Beyond `compress.scheme.unfit`: it is a table, or its static scale of activations is not to be
    known from statistics of its own inputs.
    """
    if why := unfit(leaf, scheme, role):
        return why
    if role == "table":
        return "rows of a table are looked up and meet no activations; use quantize"
    if isinstance(leaf, Quantized) and leaf.hadamard and leaf.hadamard[0] != inputs(role or "")[-1]:
        return f"it was rotated along axis {leaf.hadamard[0]}, which is no input of a {role}"
    return unknown_scale(leaf, scheme)


def unknown_scale(leaf: Any, scheme: Scheme, *, scaled: bool = False) -> str:
    """Why a static scale of a prepared leaf's activations cannot be found, in words, or "".

    Args:
        leaf: an array, or one prepared.
        scheme: what it is to have.
        scaled: whether its inputs will be scaled by channel besides.

    >>> w = Quantized(jnp.eye(4), format="float", hadamard=(-2, 4))
    >>> unknown_scale(w, Scheme("int8", activations="static"))
    "it is rotated, and statistics are of inputs before; use activations='dynamic'"
    """
    if scheme.activations != "static":
        return ""
    prepared = isinstance(leaf, Quantized)
    if prepared and leaf.hadamard is not None:
        return "it is rotated, and statistics are of inputs before; use activations='dynamic'"
    scaled |= prepared and leaf.input_scale is not None
    if scaled and scheme.calibration != "absmax":
        return (
            f"calibration={scheme.calibration!r}: its inputs are scaled by channel, and only the "
            "maximum is known by channel; use calibration='absmax' or activations='dynamic'"
        )
    return ""


def met(leaf: Any, observed: Observed, role: str) -> Observed:
    """Statistics with the leaf's stack in front, of what meets its values.

    Args:
        leaf: an array, or one prepared.
        observed: of its own inputs.
        role: of `compress.scheme.ROLES`.

    Returns:
        Statistics of x · input_scale, or as they are if they were taken there; of a rotated leaf
        `hessian` alone is rotated. `histogram` is as it was.

    >>> from compress.observed import measure
    >>> w = Quantized(jnp.ones((2, 3)), input_scale=jnp.array([[2.0], [1.0]]), format="float")
    >>> seen = met(w, measure(jnp.ones((5, 2)), channels=1, hessian=True), "kernel")
    >>> seen.absmax, seen.hessian.tolist()
    (Array([2., 1.], dtype=float32), [[20.0, 10.0], [10.0, 5.0]])
    """
    seen = observed.over(leaf.shape[: -core(role)])
    if not isinstance(leaf, Quantized) or observed.prepared:
        return seen
    s = None if leaf.input_scale is None else to_channels(leaf.input_scale, leaf.shape, role)

    def change(a: jax.Array, name: str) -> jax.Array:
        if s is not None and name in ("absmax", "abssum"):
            return a * s
        if name != "hessian":
            return a
        if s is not None:
            a = a * s[..., :, None] * s[..., None, :]
        if leaf.hadamard is not None:
            block = leaf.hadamard[1]
            a = rotate(rotate(a, -1, block), -2, block)
        return a

    return seen.map(change)


def _channels(shape: tuple[int, ...], role: str) -> int:
    return math.prod(shape[axis] for axis in inputs(role))


def to_channels(part: jax.Array, shape: tuple[int, ...], role: str) -> jax.Array:
    """A part along a leaf's input axis, [*stack, 1 …, in, 1], as [*stack, K].

    >>> to_channels(jnp.array([[1.0], [2.0]]), (3, 2, 5), "conv1d")
    Array([1., 2., 1., 2., 1., 2.], dtype=float32)
    """
    stack = shape[: -core(role)]
    part = jnp.broadcast_to(part, (*shape[:-1], 1))
    return part.reshape(*stack, _channels(shape, role))


def of_channels(seen: jax.Array, shape: tuple[int, ...], role: str, reduce: Any) -> jax.Array:
    """Statistics [*stack, K] as a part along the input axis, reduced over a window's places.

    >>> of_channels(jnp.array([1.0, 2.0, 5.0, 0.0]), (2, 2, 3), "conv1d", jnp.max).shape
    (1, 2, 1)
    """
    places = inputs(role)[:-1]
    part = seen.reshape(*shape[:-1], 1)
    return reduce(part, axis=places, keepdims=True) if places else part


def matrices(w: jax.Array, role: str) -> jax.Array:
    """A stack of arrays as [L, K, out]."""
    return w.reshape(-1, _channels(w.shape, role), w.shape[-1])


def stats_specs(stats: Mapping[str, Any], specs: Any) -> Stats:
    """Where statistics live, from where the leaves live: nothing is whole that its leaf is not.

    Leading axes are cut as the leaf's stack is, and the first K axis of each field over the mesh
    axes of the leaf's inputs, so that a device holds K / shards rows of a Hessian.

    Args:
        stats: statistics, or their `jax.eval_shape`.
        specs: the tree of `PartitionSpec` or `NamedSharding` of the original leaves.

    Returns:
        Statistics with a spec for each array, for `jax.device_put` or the `out_shardings` of `jit`.

    Raises:
        ValueError: a leaf's spec is missing or neither of the two.

    >>> from compress.observed import measure
    >>> seen = {"w": measure(jnp.ones((5, 4)), channels=1, hessian=True)}
    >>> stats_specs(seen, {"w": PartitionSpec("x", "y")})["w"].hessian
    P('x', None)
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        specs, is_leaf=lambda s: isinstance(s, PartitionSpec | Sharding)
    )
    known = {jax.tree_util.keystr(p, simple=True, separator="/"): spec for p, spec in pairs}
    return {path: _placed(path, seen, known.get(path)) for path, seen in stats.items()}


def _placed(path: str, seen: Observed, spec: Any) -> Observed:
    if not isinstance(spec, PartitionSpec | NamedSharding):
        raise ValueError(f"{path}: expected its PartitionSpec or NamedSharding, got {spec!r}")
    entries = tuple(spec.spec if isinstance(spec, NamedSharding) else spec)
    depth = seen.rows.ndim
    # Leading axes of the statistics are those of the leaf, whose rank the contracted axes tell.
    ndim = max(len(entries), depth - min(seen.axes, default=-2))
    entries += (None,) * (ndim - len(entries))
    over: list[str] = []
    for axis in seen.axes:
        entry = entries[axis]
        over += (entry,) if isinstance(entry, str) else entry or ()
    first = None if not over else over[0] if len(over) == 1 else tuple(over)

    def place(a: jax.Array, name: str) -> Any:
        wide = name in ("absmax", "abssum", "hessian")
        rest = [first if wide else None, *[None] * (a.ndim - depth - 1)] if a.ndim > depth else []
        new = PartitionSpec(*entries[:depth], *rest)
        return NamedSharding(spec.mesh, new) if isinstance(spec, NamedSharding) else new

    return seen.map(place)
