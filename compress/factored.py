"""Arrays as a product of two thin ones: fewer numbers and fewer operations.

    x · W ≈ (x · A) · B          A [*stack, *space, in, r], B [*stack, 1 …, r, out]

A convolution becomes one with r channels and one without a window. `compress.lowrank` makes them of
a tree's leaves; both factors are ordinary floats, which train, and `compress.quantize` makes codes
of them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from compress.arrays import Quantized, describe, sharding_of
from compress.backends import Conv
from compress.parted import Parted, einsum, floats, kind, letters, lie


class Factored(Parted):
    """An array W = A · B, of any orientation.

    Attributes:
        a: A, floats or `Quantized`, with the array's rank and r entries along its output axis.
        b: B, with r entries along the input axis, and one along axes of a window.
        input, output: the array's axes, negative.

    >>> w = Factored(jnp.ones((3, 1)), jnp.array([[1.0, 2.0]]))
    >>> w.shape, w.dense()[0]
    ((3, 2), Array([1., 2.], dtype=float32))
    """

    a: jax.Array | Quantized
    b: jax.Array | Quantized
    coded: ClassVar[tuple[str, ...]] = ("a", "b")
    input: int = field(default=-2, metadata={"static": True})
    output: int = field(default=-1, metadata={"static": True})

    @property
    def rank(self) -> int:
        """How many columns A has."""
        return self.a.shape[self.output]

    def aval(self) -> Any:
        """See `quax.Value`."""
        shape = list(self.a.shape)
        shape[self.output] = self.b.shape[self.output]
        return kind(self.a).update(shape=tuple(shape))

    def dense(self) -> jax.Array:
        """A · B, computed in float32 at least."""
        a, b = (
            jnp.moveaxis(floats(x), (self.input, self.output), (-2, -1)) for x in (self.a, self.b)
        )
        w = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        return jnp.moveaxis(w, (-2, -1), (self.input, self.output)).astype(self.a.dtype)

    def ends(self) -> tuple[int, int]:
        """See `Parted.ends`."""
        return self.input, self.output

    def map(
        self,
        base: Callable[[Any], Any],
        part: Callable[[Any, tuple[int, ...]], Any],
        **static: Any,
    ) -> "Factored":
        """See `Parted.map`; there is no base."""
        del base
        shape, new = self.aval().shape, {}
        for name, inner in (("a", self.output), ("b", self.input)):
            array = getattr(self, name)
            ranks = len(shape) + inner
            axes = [k for k, n in enumerate(array.shape) if n == shape[k] and k != ranks]
            new[name] = part(array, tuple(axes))
        return dataclasses.replace(self, **new, **static)

    def place(self, spec: Any) -> "Factored":
        """See `Compressed.place`: A lies with the array's inputs, B with its outputs."""
        return self.map(lambda none: none, lie(self.aval().shape, spec))

    def lies(self) -> NamedSharding | None:
        """See `Compressed.lies`: along its inputs with A, along its outputs with B."""
        a, b = sharding_of(self.a), sharding_of(self.b)
        if a is None or b is None:
            return None
        spec, other = ([*s.spec, *[None] * (self.ndim - len(s.spec))] for s in (a, b))
        spec[self.output] = other[self.output]
        return NamedSharding(a.mesh, PartitionSpec(*spec))

    def cast(self, base: Callable[[Any], Any], dtype: Any) -> "Factored":
        """See `Parted.cast`."""
        del dtype
        return dataclasses.replace(self, a=base(self.a), b=base(self.b))

    def dot(self, x: jax.Array, dims: Any, *, dtype: Any, precision: Any) -> jax.Array:
        """See `Parted.dot`; whichever factor shares more with x comes first."""
        of_w, of_x, of_y = letters(self, x, dims)
        summed = dims[0][1]
        result = dtype or np.promote_types(x.dtype, self.a.dtype)
        wide = np.promote_types(x.dtype, np.float32)
        sides = []
        for array, inner in ((self.a, self.output), (self.b, self.input)):
            ranks = len(of_w) + inner
            names = ["r" if k == ranks else name for k, name in enumerate(of_w)]
            # Along a window B has one entry for all.
            one = [k for k, n in enumerate(array.shape) if n == 1 != self.shape[k] and k != ranks]
            names = [name for k, name in enumerate(names) if k not in one]
            thin = quax.quaxify(lambda array, one=one: lax.squeeze(array, one))(array)
            sides.append((thin, names))
        if self.ndim + self.output in summed and self.ndim + self.input not in summed:
            sides.reverse()
        (first, of_first), (second, of_second) = sides
        of_u = [n for n in dict.fromkeys((*of_x, *of_first)) if n in (*of_y, *of_second, "r")]
        u = einsum(x, of_x, first, of_first, of_u, wide, precision).astype(x.dtype)
        return einsum(u, of_u, second, of_second, of_y, wide, precision).astype(result)

    def convolve(self, x: jax.Array, how: Conv, *, dtype: Any, precision: Any) -> jax.Array:
        """`lax.conv_general_dilated(x, self)`: the window with A, then B at every place.

        Raises:
            NotImplementedError: channels are in groups, or the kernel's axes are not its own.
        """
        out, into = how.dimension_numbers.rhs_spec[:2]
        own = (self.ndim + self.output, self.ndim + self.input)
        if (out, into) != own or how.feature_group_count * how.batch_group_count > 1:
            raise NotImplementedError(
                f"conv_general_dilated of {describe(self)}: expected its own input and output axis "
                f"and no groups, got {how}; leave this leaf out of the rules ('keep')"
            )
        result = dtype or np.promote_types(x.dtype, self.a.dtype)
        wide = np.promote_types(x.dtype, np.float32)
        kinds: Any = {"precision": precision, "preferred_element_type": wide}
        space = len(how.window_strides)
        point: Any = {
            "window_strides": (1,) * space,
            "padding": ((0, 0),) * space,
            "dimension_numbers": how.dimension_numbers,
        }

        def both(a: Any, b: Any) -> jax.Array:
            u = lax.conv_general_dilated(x, a.astype(x.dtype), **how._asdict(), **kinds)
            return lax.conv_general_dilated(u.astype(x.dtype), b.astype(x.dtype), **point, **kinds)

        return quax.quaxify(both)(self.a, self.b).astype(result)
