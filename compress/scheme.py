"""What to make of one array: a `Scheme`, and `fit`, which does it by rounding to nearest.

    scale = max |w| / largest,   code = round(w / scale)        symmetric
    scale = (max w − min w) / (high − low),   zero = low − round(min w / scale)        asymmetric

per tensor, channel or group. The role of an array says which of its axes are inputs, over which
products sum: along these a channel shares its scale. Every scale is a maximum, which no order of
evaluation changes, so that compressing and sharding may go in either order, bit for bit.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.arrays import Quantized, is_compressed
from compress.blocks import blocked, spread, within
from compress.formats import (
    FLOAT,
    FORMATS,
    Format,
    bounds,
    decode,
    decode_scale,
    encode,
    encode_scale,
    pack,
)
from compress.histogram import parse_method

TINY = np.float32(1e-30)
"""Smallest range a scale is made from: keeps 127 / range finite, and zeros zero."""

CLIPS = tuple(np.float32(1 - i / 50) for i in range(20))
"""Parts of the range that "mse" tries, the whole first."""

SPATIAL = {"conv1d": 1, "conv2d": 2, "conv3d": 3}

ROLES = ("kernel", "table", *SPATIAL)
"""kernel [..., in, out], table [..., rows, features], conv2d [..., height, width, in, out]."""


@dataclass(frozen=True)
class Scheme:
    """How an array is quantised.

    Attributes:
        format: of `compress.formats.FORMATS`.
        per: what shares a scale: "tensor", "channel" (an output of a kernel, a row of a table), or
            a number: so many neighbours along the input axis. None for the format's usual.
        symmetric: False gives integers a zero point, and with it the whole range of codes.
        activations: "dynamic" rounds what the array is multiplied with, one scale per row; "static"
            by a scale found in calibration; "float" leaves it. None for the format's usual.
        calibration: how a static scale is found: see `compress.threshold`.
        clip: "absmax" for the whole range of values, "mse" for the part of it that has the least
            squared error.
        role: of `ROLES`; None finds it out from path and shape, see `role_of`.

    >>> Scheme("int4").per, Scheme("int8").activations
    (128, 'dynamic')
    """

    format: str = "int8"
    per: str | int | None = None
    symmetric: bool = True
    activations: str | None = None
    calibration: str = "absmax"
    clip: str = "absmax"
    role: str | None = None

    def __post_init__(self) -> None:
        """Fill in what the format has, and check the rest."""
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r}: expected one of {', '.join(FORMATS)}")
        row = FORMATS[self.format]
        _default(self, "per", row.per)
        _default(self, "activations", "float" if row.activations == FLOAT else "dynamic")
        group = type(self.per) is int and self.per > 0
        if not group and self.per not in ("tensor", "channel"):
            raise ValueError(f"per={self.per!r}: expected 'tensor', 'channel' or a group's size")
        if row.scales != "float32" and self.per != row.per:
            raise ValueError(f"per={self.per!r}: {self.format} has groups of {row.per}")
        if self.activations not in ("float", "dynamic", "static"):
            raise ValueError(
                f"activations={self.activations!r}: expected 'float', 'dynamic' or 'static'"
            )
        if self.activations != FLOAT and row.activations == FLOAT:
            raise ValueError(f"activations={self.activations!r}: {self.format} keeps them 'float'")
        method, _ = parse_method(self.calibration)
        equal_steps = method in ("mse", "entropy")
        if equal_steps and self.activations == "static" and row.activations != "int8":
            raise ValueError(
                f"calibration={self.calibration!r}: it weighs equal steps, and {self.format} "
                f"rounds activations to {row.activations}; use 'absmax' or 'percentile'"
            )
        if self.activations != FLOAT and group:
            raise ValueError(
                f"activations={self.activations!r} with groups of {self.per}: a sum of integers "
                "has one scale; use per='channel', or activations='float'"
            )
        if type(self.symmetric) is not bool:
            raise ValueError(f"symmetric={self.symmetric!r}: expected true or false")
        if not self.symmetric and not row.integer:
            raise ValueError(f"symmetric=False: {self.format} has no zero point; int8 and int4 do")
        if self.clip not in ("absmax", "mse"):
            raise ValueError(f"clip={self.clip!r}: expected 'absmax' or 'mse'")
        if self.role not in (None, *ROLES):
            raise ValueError(f"role={self.role!r}: expected one of {', '.join(ROLES)}")

    @property
    def row(self) -> Format:
        """Its format's row of the table."""
        return FORMATS[self.format]

    def __str__(self) -> str:
        """Short, for reports.

        >>> print(Scheme("int8"), "|", Scheme("int4", per=64, symmetric=False))
        int8 | int4 per 64 asymmetric
        """
        words = [self.format]
        if self.per != self.row.per:
            words.append(f"per {self.per}")
        if not self.symmetric:
            words.append("asymmetric")
        if self.activations != (FLOAT if self.row.activations == FLOAT else "dynamic"):
            words.append(f"{self.activations} activations")
        if self.clip != "absmax":
            words.append(f"clipped by {self.clip}")
        return " ".join(words)


def _default(scheme: Scheme, name: str, value: Any) -> None:
    if getattr(scheme, name) is None:
        object.__setattr__(scheme, name, value)


def as_scheme(value: Scheme | str | Mapping[str, Any]) -> Scheme:
    """A scheme from its format's name or from a mapping of its fields, as recipes have them.

    Raises:
        ValueError: an unknown field or value.

    >>> as_scheme("int4") == as_scheme({"format": "int4", "per": 128}) == Scheme("int4")
    True
    """
    if isinstance(value, Scheme):
        return value
    fields: dict[str, Any] = {"format": value} if isinstance(value, str) else dict(value)
    known = [f.name for f in dataclasses.fields(Scheme)]
    if strange := sorted(set(fields) - set(known)):
        raise ValueError(f"scheme: unknown field {strange[0]!r}; expected {', '.join(known)}")
    return Scheme(**fields)


def role_of(path: str, shape: Sequence[int]) -> str | None:
    """The role that a leaf's path and shape speak of, or None.

    Its last key tells a table ("embedding", "table") from a kernel; a kernel of a convolution has
    an axis more for each of space, and one of a stack of layers (a key "layers" that no number
    follows) another in front. Three axes may be anything: they have none.

    >>> role_of("stack/layers/query/kernel", (12, 64, 64)), role_of("stem/kernel", (3, 3, 3, 16))
    ('kernel', 'conv2d')
    >>> role_of("words/embedding", (100, 64)), role_of("norm/scale", (64,))
    ('table', None)
    """
    ndim, last = len(shape) - in_stack(path), path.rpartition("/")[-1]
    if last in ("embedding", "table") and ndim == 2:
        return "table"
    if ndim == 2:
        return "kernel"
    return f"conv{ndim - 2}d" if ndim in (4, 5) and last == "kernel" else None


def in_stack(path: str) -> bool:
    """Whether a leaf's path says that its first axis is that of layers.

    >>> in_stack("stack/layers/query/kernel"), in_stack("layers/0/query/kernel")
    (True, False)
    """
    return any(
        key == "layers" and not following.isdigit()
        for key, following in itertools.pairwise(path.split("/"))
    )


def inputs(role: str) -> tuple[int, ...]:
    """The axes of a role that are inputs, negative; the last is the one that groups cut.

    >>> inputs("kernel"), inputs("table"), inputs("conv2d")
    ((-2,), (-1,), (-4, -3, -2))
    """
    if role in SPATIAL:
        return tuple(range(-2 - SPATIAL[role], -1))
    return (-2,) if role == "kernel" else (-1,)


def core(role: str) -> int:
    """How many of the last axes belong to one array; those before are a stack of such."""
    return 2 + SPATIAL.get(role, 0)


def unfit(leaf: Any, scheme: Scheme, role: str | None) -> str:
    """Why a leaf cannot have a scheme, in words, or "".

    >>> unfit(jnp.ones((100, 4)), Scheme("int4"), "kernel")
    "its input axis has 100 elements, which groups of 128 do not divide; groups of 100 or 50 ..."
    """
    shape = tuple(leaf.shape)
    if is_compressed(leaf) and not (isinstance(leaf, Quantized) and leaf.format == FLOAT):
        why = "it is compressed already"
    elif not jnp.issubdtype(leaf.dtype, jnp.floating):
        why = f"{leaf.dtype} is not floating"
    elif len(shape) < 2:
        why = f"shape {shape}: quantised arrays have 2 axes or more"
    elif role is None:
        why = f"shape {shape} has no usual role; give its scheme one of {', '.join(ROLES)}"
    elif len(shape) < core(role):
        why = f"a {role} has {core(role)} axes or more, not {len(shape)}"
    elif not all(shape):
        why = f"shape {shape} has an axis of size 0"
    else:
        why = _undivided(shape[inputs(role)[-1]], scheme)
    return why


def _undivided(size: int, scheme: Scheme) -> str:
    per, even = scheme.per, scheme.row.bits == 4
    if isinstance(per, int) and size % per:
        why = f"its input axis has {size} elements, which groups of {per} do not divide; "
        if scheme.row.scales != "float32":
            return why + "keep it, or take int8 or int4"
        divisors = [d for d in range(1, size + 1) if size % d == 0 and not (even and d % 2)]
        near = sorted(divisors, key=lambda d: abs(d - per))[:2]
        groups = f"groups of {' or '.join(map(str, near))} would, or " if near else "take "
        return f"{why}{groups}per='channel'"
    odd = size if size % 2 else per if isinstance(per, int) else 0
    if even and odd % 2:
        return f"{odd} elements along its input axis, or a group: two codes of 4 bits share a byte"
    return ""


def part_shape(shape: Sequence[int], role: str, per: str | int) -> tuple[int, ...]:
    """The shape of the scales of an array.

    >>> part_shape((256, 8), "kernel", "channel"), part_shape((256, 8), "kernel", 128)
    ((1, 8), (2, 8))
    """
    parts = list(shape)
    if per == "tensor":
        parts[-core(role) :] = [1] * core(role)
    elif per == "channel":
        for axis in inputs(role):
            parts[axis] = 1
    else:
        parts[inputs(role)[-1]] //= int(per)
    return tuple(parts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """Where the codes of an array lie: what `fit` finds, and GPTQ rounds to.

    Attributes:
        scale: as stored.
        zero, outer: as in `Quantized`.
        multiplier: float32, the scale with all that goes with it.
    """

    scale: jax.Array
    zero: jax.Array | None
    outer: jax.Array | None
    multiplier: jax.Array


def grid(w: jax.Array, scheme: Scheme, role: str) -> Grid:
    """The scales and zero points of an array.

    Args:
        w: float32, of the role's shape.
        scheme: with format, granularity and clipping.
        role: of `ROLES`.
    """
    row = scheme.row
    parts = part_shape(w.shape, role, scheme.per or row.per)
    low, high = bounds(row, scheme.symmetric)
    b = blocked(w, parts)
    axes = within(w.ndim)
    if scheme.symmetric:
        end = jnp.max(jnp.abs(b), axis=axes, initial=TINY)
        start = -end
    else:
        end = jnp.max(b, axis=axes, initial=0.0)
        start = jnp.minimum(jnp.min(b, axis=axes, initial=0.0), end - TINY)

    def at(part: Any) -> Grid:
        if not scheme.symmetric:
            scale = (end - start) * (part / np.float32(high - low))
            # Zero itself has a code, and a range of one sign keeps its whole precision.
            zero = np.float32(low) - jnp.round(start * part / scale)
            return Grid(scale, zero, None, scale)
        if row.scales == "e8m0":
            # The power of two that brings the range's to the format's largest.
            top = np.float32(2.0 ** math.floor(math.log2(row.largest)))
            stored = encode_scale(end * (part / top), "e8m0")
            return Grid(stored, None, None, decode_scale(stored))
        if row.scales == "e4m3":
            whole = tuple(range(w.ndim - core(role), w.ndim))
            outer = jnp.max(end, axis=whole, keepdims=True) * np.float32(1 / (448 * row.largest))
            stored = encode_scale(end * part / (row.largest * outer), "e4m3")
            # A block far below the others would have scale 0.
            stored = jnp.maximum(stored.astype(jnp.float32), np.float32(2.0**-9)).astype(
                stored.dtype
            )
            return Grid(stored, None, outer, decode_scale(stored) * outer)
        # The same product as code(w, …) uses, so that |w| ≤ max |w| bounds the code.
        scale = end * part * np.float32(1 / row.largest)
        return Grid(scale, None, None, scale)

    best = at(np.float32(1))
    if scheme.clip == "absmax":
        return best

    def error(candidate: Grid) -> jax.Array:
        off = w - snapped(w, candidate, scheme)
        return jnp.sum(blocked(off * off, parts), axis=axes)

    least = error(best)
    for part in CLIPS[1:]:
        other = at(part)
        now = error(other)
        better, least = now < least, jnp.minimum(now, least)
        best = jax.tree.map(lambda a, b, better=better: _choose(better, b, a), best, other)
    return best


def _choose(better: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return old if new.shape != better.shape else jnp.where(better, new, old)


def coded(w: jax.Array, grid: Grid, scheme: Scheme) -> jax.Array:
    """The codes of an array on a grid, not packed."""
    x = w * spread(1 / grid.multiplier, w.shape)
    if grid.zero is not None:
        x = x + spread(grid.zero, w.shape)
    return encode(x, scheme.row, scheme.symmetric)


def snapped(w: jax.Array, grid: Grid, scheme: Scheme) -> jax.Array:
    """An array's nearest points on a grid, float32."""
    codes = decode(coded(w, grid, scheme), scheme.row)
    if grid.zero is not None:
        codes = codes - spread(grid.zero, w.shape)
    return codes * spread(grid.multiplier, w.shape)


def assemble(codes: jax.Array, grid: Grid, scheme: Scheme, role: str, leaf: Any) -> Quantized:
    """A quantised array of its codes and grid, standing for `leaf`, whose preparation it keeps."""
    axis = inputs(role)[-1]
    packed = scheme.row.bits == 4
    kept = (
        {"input_scale": leaf.input_scale, "hadamard": leaf.hadamard}
        if isinstance(leaf, Quantized)
        else {}
    )
    return Quantized(
        pack(codes, axis) if packed else codes,
        grid.scale,
        zero=grid.zero,
        outer=grid.outer,
        format=scheme.format,
        as_dtype=np.dtype(leaf.dtype),
        pack=axis if packed else None,
        activations=FLOAT if scheme.activations == FLOAT else scheme.row.activations,
        **kept,
    )


def fit(leaf: Any, scheme: Scheme | str, role: str = "kernel") -> Quantized:
    """Quantise one array, or one prepared by `smooth` or `rotate`, to nearest.

    Args:
        leaf: floats; `unfit` says why it could not be.
        scheme: what to make of it; a static scale of activations is not found here.
        role: of `ROLES`.

    >>> fit(jnp.eye(4), "int8").dense()[0]
    Array([1., 0., 0., 0.], dtype=float32)
    """
    scheme = as_scheme(scheme)
    if why := unfit(leaf, scheme, role):
        raise ValueError(why)
    w = floats(leaf)
    found = grid(w, scheme, role)
    return assemble(coded(w, found, scheme), found, scheme, role, leaf)


def floats(leaf: Any) -> jax.Array:
    """What is to be quantised of a leaf, float32: its values, or those of a prepared array."""
    return (leaf.values if isinstance(leaf, Quantized) else leaf).astype(jnp.float32)
