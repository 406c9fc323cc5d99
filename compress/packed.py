"""Arrays of which N of every M neighbours along the input axis are kept, with their places.

    values [*stack, in · N / M, out]     index: uint8, 2, 4 or 8 bits for each of them

It is a saving of bytes: no backend of XLA has products of such arrays, so that before one the whole
array is written out, zeros and all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax

from compress.arrays import Quantized, describe, place_part
from compress.backends import Conv
from compress.formats import FLOAT
from compress.parted import Parted, kind, placed


def bits_of(m: int) -> int:
    """Bits for a place among m.

    >>> bits_of(4), bits_of(8), bits_of(32)
    (2, 4, 8)
    """
    return 2 if m <= 4 else 4 if m <= 16 else 8


class Packed(Parted):
    """An array with N of M.

    Attributes:
        values: what stays, in order: floats or `Quantized`.
        index: places of `values` in their groups, several to a byte along the input axis, the first
            in the lowest bits.
        group: (N, M).
        input, output: the array's axes, negative.

    >>> w = Packed.of(jnp.array([[0.0], [3.0], [0.0], [5.0]] * 2), (2, 4))
    >>> w.values.ravel().tolist(), w.index.ravel().tolist(), w.dense().ravel().tolist()[:4]
    ([3.0, 5.0, 3.0, 5.0], [221], [0.0, 3.0, 0.0, 5.0])
    """

    values: jax.Array | Quantized
    index: jax.Array
    coded: ClassVar[tuple[str, ...]] = ("values",)
    group: tuple[int, int] = field(default=(2, 4), metadata={"static": True})
    input: int = field(default=-2, metadata={"static": True})
    output: int = field(default=-1, metadata={"static": True})

    @staticmethod
    def unfit(size: int, group: tuple[int, int]) -> str:
        """Why an input axis cannot be packed, in words, or ""."""
        n, m = group
        per = 8 // bits_of(m)
        if size % m or size // m * n % per:
            return f"{size} inputs: {n} of {m} of them are not whole bytes of {per} places each"
        return ""

    @classmethod
    def of(cls, w: jax.Array, group: tuple[int, int], axis: int = -2) -> "Packed":
        """An array whose groups have N entries other than 0 at most."""
        n, m = group
        at = w.ndim + axis
        parts = w.reshape(*w.shape[:at], -1, m, *w.shape[at + 1 :])
        # The first N of those that are not 0, then of those that are.
        order = jnp.argsort(parts == 0, axis=at + 1, stable=True)
        chosen = jnp.sort(lax.slice_in_dim(order, 0, n, axis=at + 1), axis=at + 1)
        values = jnp.take_along_axis(parts, chosen, axis=at + 1)
        flat = (*w.shape[:at], w.shape[at] // m * n, *w.shape[at + 1 :])
        bits = bits_of(m)
        per = 8 // bits
        places = chosen.astype(jnp.uint8).reshape(*w.shape[:at], -1, per, *w.shape[at + 1 :])
        shift = jnp.arange(per, dtype=jnp.uint8) * np.uint8(bits)
        shift = shift.reshape(-1, *[1] * (w.ndim - at - 1))
        index = jnp.sum(places << shift, at + 1, dtype=jnp.uint8)
        return cls(values.reshape(flat), index, group, axis, -1 if axis != -1 else -2)

    def aval(self) -> Any:
        """See `quax.Value`."""
        n, m = self.group
        shape = list(self.values.shape)
        shape[self.input] = shape[self.input] // n * m
        return kind(self.values).update(shape=tuple(shape))

    def dense(self) -> jax.Array:
        """See `Compressed.dense`."""
        kept = self.values
        if isinstance(kept, Quantized):
            kept = kept.dense()
        return self.spaced(kept)

    def whole(self) -> jax.Array | Quantized:
        """What products are made with: codes, zeros among them, where activations are rounded.

        That is where all inputs share a scale, and 0 is the code of 0; elsewhere floats.
        """
        kept = self.values
        if not isinstance(kept, Quantized) or kept.activations == FLOAT or kept.zero is not None:
            return self.dense()
        if kept.scale is None or kept.scale.shape[self.input] != 1:
            return self.dense()
        return dataclasses.replace(kept, values=self.spaced(kept.codes()))

    def spaced(self, kept: jax.Array) -> jax.Array:
        """The whole array of `kept` at their places, with zeros elsewhere."""
        n, m = self.group
        shape = self.aval().shape
        at = len(shape) + self.input
        bits = bits_of(m)
        per = 8 // bits
        one = [1] * (len(shape) - at - 1)
        shift = (jnp.arange(per, dtype=jnp.uint8) * np.uint8(bits)).reshape(-1, *one)
        places = (jnp.expand_dims(self.index, at + 1) >> shift) & np.uint8(2**bits - 1)
        groups = (*shape[:at], shape[at] // m, n, *shape[at + 1 :])
        places, kept = places.reshape(groups), kept.reshape(groups)
        every = jnp.arange(m, dtype=jnp.uint8).reshape(-1, *one)
        whole = jnp.zeros((), kept.dtype)
        for k in range(n):
            here = lax.slice_in_dim(places, k, k + 1, axis=at + 1) == every
            whole = jnp.where(here, lax.slice_in_dim(kept, k, k + 1, axis=at + 1), whole)
        return whole.reshape(shape)

    def ends(self) -> tuple[int, int]:
        """See `Parted.ends`."""
        return self.input, self.output

    def map(
        self,
        base: Callable[[Any], Any],
        part: Callable[[Any, tuple[int, ...]], Any],
        **static: Any,
    ) -> "Packed":
        """See `Parted.map`; there is no base."""
        del base
        ndim = self.values.ndim
        axes = tuple(k for k in range(ndim) if k != ndim + self.input)
        new = {name: part(getattr(self, name), axes) for name in ("values", "index")}
        return dataclasses.replace(self, **new, **static)

    def place(self, spec: Any) -> "Packed":
        """See `Compressed.place`: cut along the input axis where the mesh divides it."""
        shape, parts = self.aval().shape, {}
        for name in ("values", "index"):
            part = getattr(self, name)
            where = place_part(jax.ShapeDtypeStruct(part.shape, part.dtype), shape, spec, "values")
            parts[name] = placed(part, where)
        return dataclasses.replace(self, **parts)

    def cast(self, base: Callable[[Any], Any], dtype: Any) -> "Packed":
        """See `Parted.cast`."""
        del dtype
        return dataclasses.replace(self, values=base(self.values))

    def check_cut(self, sizes: Sequence[int]) -> None:
        """See `Parted.check_cut`."""
        if sizes[self.input] != self.shape[self.input]:
            raise NotImplementedError(
                f"a slice of {describe(self)} cuts the axis that is packed; leave this leaf out of "
                "the rules ('keep')"
            )

    def dot(self, x: jax.Array, dims: Any, *, dtype: Any, precision: Any) -> jax.Array:
        """See `Parted.dot`; the whole is made."""
        kinds: Any = {"precision": precision, "preferred_element_type": dtype}
        return quax.quaxify(lambda w: lax.dot_general(x, w, dims, **kinds))(self.whole())

    def convolve(self, x: jax.Array, how: Conv, *, dtype: Any, precision: Any) -> jax.Array:
        """`lax.conv_general_dilated(x, self)`; the whole is made."""
        kinds: Any = {"precision": precision, "preferred_element_type": dtype}
        conv = quax.quaxify(lambda w: lax.conv_general_dilated(x, w, **how._asdict(), **kinds))
        return conv(self.whole())
