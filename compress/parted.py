"""Arrays of parts: what low-rank changes, factored and packed arrays share.

Every part has the rank of the array, and its size along each axis but for the input and the output
axis, where a part may have another; so whatever moves, cuts or shards the array does so with each.
`compress.parted_rules` says what primitives do with them.
"""

import dataclasses
import string
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import quax

from compress.arrays import Compressed, Quantized, is_compressed, place_part


class Parted(Compressed):
    """An array [*stack, in, out], of any orientation, in parts."""

    coded: ClassVar[tuple[str, ...]] = ()
    """Names of parts that may be quantised; they have the axes of a leaf of the whole's role."""

    @abstractmethod
    def ends(self) -> tuple[int, int]:
        """The array's input and output axis, negative."""

    @abstractmethod
    def map(
        self,
        base: Callable[[Any], Any],
        part: Callable[[jax.Array, tuple[int, ...]], Any],
        **static: Any,
    ) -> Self:
        """Itself with every array changed, and static fields replaced.

        Args:
            base: of an array of the whole's own shape, if it holds one.
            part: of another array, and of the axes along which that is cut as the whole is.
            **static: fields.
        """

    @abstractmethod
    def cast(self, base: Callable[[Any], Any], dtype: Any) -> Self:
        """Itself for another dtype; `base` casts an array of the whole's shape."""

    @abstractmethod
    def dot(self, x: jax.Array, dims: Any, *, dtype: Any, precision: Any) -> jax.Array:
        """`lax.dot_general(x, self)`."""

    def check_cut(self, sizes: Sequence[int]) -> None:
        """Refuses a cut to `sizes` that would change what it stands for."""


def lie(shape: Sequence[int], spec: Any) -> Callable[[Any, tuple[int, ...]], Any]:
    """Where a part lies, by the axes along which it is cut as the whole is: for `Parted.map`."""

    def at(part: Any, axes: tuple[int, ...]) -> Any:
        kept = [n if k in axes else 1 for k, n in enumerate(shape)]
        return placed(part, place_part(jax.ShapeDtypeStruct(kept, jnp.float32), shape, spec))

    return at


def placed(part: Any, spec: Any) -> Any:
    """Where a part lies, compressed or not, from where its floats would."""
    return part.place(spec) if is_compressed(part) else spec


def kind(part: Any) -> Any:
    """What JAX sees of a part, compressed or not."""
    return part.aval() if is_compressed(part) else jax.typeof(part)


def floats(part: Any) -> jax.Array:
    """What a part stands for, float32 at least; codes are not rounded to a narrower dtype."""
    if isinstance(part, Quantized):
        part = dataclasses.replace(part, as_dtype=np.dtype("float32")).dense()
    return part.astype(np.promote_types(part.dtype, np.float32))


def letters(w: Parted, x: jax.Array, dims: Any) -> tuple[list[str], list[str], list[str]]:
    """A letter for every axis of w, x and their dot, as einsum has them; "r" is left for ranks."""
    ((contract, contract_w), (batch, batch_w)) = dims
    free = list(string.ascii_lowercase.replace("r", ""))
    of_w = [free.pop(0) for _ in range(w.ndim)]
    shared = dict(zip((*contract, *batch), (*contract_w, *batch_w), strict=True))
    of_x = [of_w[shared[k]] if k in shared else free.pop(0) for k in range(x.ndim)]
    free_x = [of_x[k] for k in range(x.ndim) if k not in shared]
    free_w = [n for k, n in enumerate(of_w) if k not in (*contract_w, *batch_w)]
    return of_w, of_x, [*(of_x[k] for k in batch), *free_x, *free_w]


def einsum(
    x: jax.Array, of_x: Sequence[str], w: Any, of_w: Sequence[str], out: Sequence[str],
    dtype: Any, precision: Any,
) -> jax.Array:  # fmt: skip
    """A product with a part, compressed or not, by the letters of their axes."""
    how = f"{''.join(of_x)},{''.join(of_w)}->{''.join(out)}"
    more: Any = {"precision": precision, "preferred_element_type": dtype}
    return quax.quaxify(lambda w: jnp.einsum(how, x, w.astype(x.dtype), **more))(w)
