"""Number formats: how a float becomes a code of 8 or 4 bits, and back.

    code = encode(w / scale),   w ≈ decode(code) · scale,   scale = range / largest

`FORMATS` is the whole table. Codes of 4 bits lie two to a byte along one axis: the element of even
index in the low half, its successor in the high one. Codes of floats are the standard's bit
patterns, so that other readers of the file need no more than this table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float, by its three low bits; the fourth is the sign."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution over [−1, 1] (QLoRA, https://arxiv.org/abs/2305.14314)."""


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        name: as schemes and files spell it.
        bits: of one code.
        largest: the magnitude that the end of the range becomes.
        per: what shares a scale unless the scheme says otherwise: "channel", or a group's size.
        scales: the dtype of stored scales: float32, powers of two ("e8m0"), or "e4m3", which a
            second scale of the whole array brings into range.
        activations: the dtype that activations are rounded to in a product, "int8" or "e4m3";
            "float" if they are not.
        storage: of unpacked codes.
    """

    name: str
    bits: int
    largest: float
    per: str | int
    scales: str
    activations: str
    storage: str

    @property
    def integer(self) -> bool:
        """Whether codes are integers: these alone can have zero points."""
        return self.name in ("int8", "int4")


FORMATS = {
    row.name: row
    for row in (
        Format("int8", 8, 127, "channel", "float32", "int8", "int8"),
        Format("int4", 4, 7, 128, "float32", "float", "int8"),
        Format("e4m3", 8, 448, "channel", "float32", "e4m3", "float8_e4m3fn"),
        Format("e5m2", 8, 57344, "channel", "float32", "e4m3", "float8_e5m2"),
        Format("nf4", 4, 1, 64, "float32", "float", "uint8"),
        Format("mxfp8", 8, 448, 32, "e8m0", "float", "float8_e4m3fn"),
        Format("mxfp4", 4, 6, 32, "e8m0", "float", "uint8"),
        Format("nvfp4", 4, 6, 16, "e4m3", "float", "uint8"),
    )
}
"""By name. int8 and int4 leave their least value out of symmetric ranges, as −(−128) is no int8.

mxfp8, mxfp4: OCP Microscaling Formats 1.0. nvfp4: NVIDIA, https://arxiv.org/abs/2509.25149.
"""

FLOAT = "float"
"""The format of an array whose values stay floats: one that only its inputs are prepared for."""


def bounds(format: Format, symmetric: bool = True) -> tuple[float, float]:
    """The least and the largest code value of a format.

    >>> bounds(FORMATS["int4"]), bounds(FORMATS["int4"], symmetric=False)
    ((-7, 7), (-8, 7))
    """
    low = -format.largest - (1 if format.integer and not symmetric else 0)
    return low, format.largest


def encode(x: jax.Array, format: Format, symmetric: bool = True) -> jax.Array:
    """Round scaled floats to codes, to nearest, ties to even, beyond the range to its end.

    Args:
        x: float32, in units of the scale.
        format: see `FORMATS`.
        symmetric: False lets integers use their least value, too.

    Returns:
        Codes of the format's `storage`, not packed.

    >>> encode(jnp.array([0.4, 2.5, -9.0]), FORMATS["int4"])
    Array([ 0,  2, -7], dtype=int8)
    """
    low, high = bounds(format, symmetric)
    if format.integer:
        q = jnp.clip(lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), low, high)
        # By way of int32: XLA:CPU converts float32 to int8 at once with more instructions.
        return q.astype(jnp.int32).astype(jnp.int8)
    if format.name == "nf4":
        middles = np.add(NF4[1:], NF4[:-1]) / 2
        return _count(x, middles, [False] * len(middles)).astype(jnp.uint8)
    if format.bits == 4:
        middles = np.add(E2M1[1:], E2M1[:-1]) / 2
        # A tie goes to the even mantissa: up where the lower neighbour's is odd.
        code = _count(jnp.abs(x), middles, [i % 2 == 1 for i in range(len(middles))])
        return (code | (jnp.signbit(x).astype(jnp.int32) << 3)).astype(jnp.uint8)
    return jnp.clip(x, low, high).astype(format.storage)


def decode(codes: jax.Array, format: Format) -> jax.Array:
    """The float32 values of unpacked codes, in units of the scale.

    >>> decode(jnp.array([1, 9], jnp.uint8), FORMATS["mxfp4"])
    Array([ 0.5, -0.5], dtype=float32)
    """
    if format.name == "nf4":
        return _select(codes, NF4)
    if format.bits == 4 and not format.integer:
        return _select(codes, (*E2M1, *(-m for m in E2M1)))
    return codes.astype(jnp.float32)


def pack(codes: jax.Array, axis: int) -> jax.Array:
    """Two 4-bit codes to a byte along an axis of even size.

    >>> pack(jnp.array([1, -1, 2, 3], jnp.int8), 0)
    Array([241,  50], dtype=uint8)
    """
    axis %= codes.ndim
    pairs = codes.reshape(*codes.shape[:axis], -1, 2, *codes.shape[axis + 1 :])
    low, high = (
        lax.index_in_dim(pairs, i, axis + 1, keepdims=False).astype(jnp.uint8) for i in (0, 1)
    )
    return (low & np.uint8(15)) | (high << np.uint8(4))


def unpack(packed: jax.Array, axis: int, format: Format) -> jax.Array:
    """Undo `pack`: the codes one to a byte, int8 with their sign for int4, uint8 for the others.

    >>> unpack(jnp.array([241, 50], jnp.uint8), 0, FORMATS["int4"])
    Array([ 1, -1,  2,  3], dtype=int8)
    """
    axis %= packed.ndim
    both = jnp.stack(halves(packed, format), axis + 1)
    return both.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])


def halves(packed: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """The codes of even and of odd index along the packed axis, as `unpack` has them.

    >>> halves(jnp.array([241, 50], jnp.uint8), FORMATS["int4"])
    (Array([1, 2], dtype=int8), Array([-1,  3], dtype=int8))
    """
    if format.integer:  # arithmetic shifts bring the sign along
        signed = lax.bitcast_convert_type(packed, jnp.int8)
        return (signed << np.int8(4)) >> np.int8(4), signed >> np.int8(4)
    return packed & np.uint8(15), packed >> np.uint8(4)


def encode_scale(scale: jax.Array, kind: str) -> jax.Array:
    """Round positive float32 scales to the dtype they are stored in.

    "e8m0" keeps the power of two below, as OCP's conversion does.

    >>> encode_scale(jnp.array([3.0]), "e8m0")
    Array([128], dtype=uint8)
    """
    if kind == "e8m0":
        bits = lax.bitcast_convert_type(scale, jnp.uint32) >> np.uint32(23)
        return jnp.clip(bits, 1, 254).astype(jnp.uint8)
    return scale.astype(jnp.float8_e4m3fn) if kind == "e4m3" else scale


def decode_scale(scale: jax.Array) -> jax.Array:
    """Stored scales as float32; exponents (uint8) are powers of two with a bias of 127.

    >>> decode_scale(jnp.array([128], jnp.uint8))
    Array([2.], dtype=float32)
    """
    if scale.dtype == jnp.uint8:
        return lax.bitcast_convert_type(scale.astype(jnp.uint32) << np.uint32(23), jnp.float32)
    return scale.astype(jnp.float32)


def _count(x: jax.Array, middles: np.ndarray, ties_up: Sequence[bool]) -> jax.Array:
    """Of how many middles x lies above: the index of the nearest entry of a sorted table."""
    above = [
        (x >= np.float32(m)) if up else (x > np.float32(m))
        for m, up in zip(middles, ties_up, strict=True)
    ]
    return sum((a.astype(jnp.int32) for a in above[1:]), start=above[0].astype(jnp.int32))


def _select(codes: jax.Array, table: Sequence[float]) -> jax.Array:
    """table[codes] for 16 entries, as selects: these fuse into what reads them, gathers do not."""
    level = [jnp.float32(v) for v in table]
    for bit in range(4):
        is_set = (codes & np.uint8(1 << bit)) != 0
        level = [jnp.where(is_set, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]
