"""Arrays with a low-rank change that is trained, and arrays that are trained whole.

    x·W' = (x·W + (x·A)·s·B) · m / n        n = ‖W + s·A·B‖ per output; without m: m / n = 1

`LoRA` stands for W'. It keeps W as it is, floats or codes, and never adds to it: a product with it
is one with W and two thin ones (Hu et al. 2021, https://arxiv.org/abs/2106.09685; with magnitudes
m, DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353). `compress.lora` makes them of a tree's
leaves, and `compress.parted_rules` says what primitives do with them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress import products
from compress.arrays import Compressed, Quantized, describe, is_compressed, place_part
from compress.backends import Dims
from compress.parted import Parted, einsum, floats, letters, lie

TINY = np.float32(1e-30)
"""The least squared norm: a column of zeros stays one, and is not divided by zero."""

EXACT = lax.Precision.HIGHEST


class Trained(Compressed):
    """A plain array that is trained whole, such as a head or a bias, and says so.

    For functions under `compress.apply` it is the array itself. Marks in the tree are what lets
    `compress.partition` need nothing else, and no leaf be frozen because a list was forgotten.
    """

    array: jax.Array

    def aval(self) -> Any:
        """See `quax.Value`."""
        return jax.typeof(self.array)

    def dense(self) -> jax.Array:
        """See `Compressed.dense`."""
        return self.array

    def place(self, spec: Any) -> "Trained":
        """See `Compressed.place`."""
        return Trained(spec)


def bare(tree: Any) -> Any:
    """A tree with the arrays of `Trained` leaves in their place."""
    return jax.tree.map(
        lambda x: x.array if isinstance(x, Trained) else x, tree, is_leaf=is_compressed
    )


class LoRA(Parted):
    """A kernel W [*stack, in, out] and its low-rank change; several changes, one for each row.

    Every array in it has the kernel's rank, so that a stack of layers is scanned, sliced and cut
    over devices like any other. Where the kernel is transposed, all of them are.

    Attributes:
        base: W, floats or `Quantized`.
        a: A [*stack, in, r], floats; of n adapters [*stack, in, n·r].
        b: B [*stack, r, out], floats; of n adapters [*stack, n·r, out].
        scaling: s, float32 [*stack, 1, 1]; 0 for layers of a stack that are not adapted, which keep
            the lengths that they have: no gradient reaches their A, B and m.
        magnitude: m, float32 [*stack, 1, out], or None. Of n adapters, which are not trained,
            m / n [*stack, n, out].
        ids: int32 [*stack, 1, batch], the adapter of every row of activations, -1 for none.
        adapters: how many.
        input, output: the axes of the kernel, negative.

    >>> w = LoRA(jnp.eye(3), jnp.ones((3, 1)), jnp.ones((1, 3)), jnp.full((1, 1), 2.0))
    >>> w.shape, w.dense()[0]
    ((3, 3), Array([3., 2., 2.], dtype=float32))
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scaling: jax.Array
    magnitude: jax.Array | None = None
    ids: jax.Array | None = None
    adapters: int = field(default=1, metadata={"static": True})
    input: int = field(default=-2, metadata={"static": True})
    output: int = field(default=-1, metadata={"static": True})

    def aval(self) -> Any:
        """The base's."""
        return self.base.aval() if is_compressed(self.base) else jax.typeof(self.base)

    def kernel(self, part: jax.Array) -> jax.Array:
        """A part with the input and the output axis as the last two."""
        return jnp.moveaxis(part, (self.input, self.output), (-2, -1))

    def turned(self, part: jax.Array) -> jax.Array:
        """The reverse of `kernel`."""
        return jnp.moveaxis(part, (-2, -1), (self.input, self.output))

    def scaled(self) -> jax.Array:
        """s·B, float32 at least."""
        b = floats(self.b)
        return b * self.scaling.astype(b.dtype)

    def wide(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """W, A and s·B in one dtype, float32 at least."""
        w, a, b = floats(self.base), floats(self.a), self.scaled()
        dtype = np.result_type(w.dtype, a.dtype, b.dtype)
        return w.astype(dtype), a.astype(dtype), b.astype(dtype)

    def norm(self) -> jax.Array:
        """‖W + s·A·B‖ over the input axis, float32, without a gradient (section 4.3 of DoRA).

        n² = Σ W² + Σ_r B'·(2·AᵀW + AᵀA·B') with B' = s·B: as many multiplications as A·B takes,
        but no array of the kernel's size.
        """
        w, a, b = (self.kernel(x) for x in self.wide())
        across = jnp.swapaxes(a, -1, -2)
        mixed = 2 * jnp.matmul(across, w, precision=EXACT)
        gram = jnp.matmul(across, jnp.swapaxes(across, -1, -2), precision=EXACT)
        mixed = mixed + jnp.matmul(gram, b, precision=EXACT)
        square = jnp.sum(w * w, -2, keepdims=True) + jnp.sum(b * mixed, -2, keepdims=True)
        return lax.stop_gradient(self.turned(jnp.sqrt(jnp.maximum(square, TINY))))

    def gain(self) -> jax.Array | None:
        """m / n, float32, of every adapter along the input axis; None where it is 1.

        1 for layers of a stack with scaling 0, whatever m is.
        """
        if self.magnitude is None or self.adapters > 1:
            return self.magnitude
        return jnp.where(self.scaling == 0, np.float32(1), self.magnitude / self.norm())

    def merged(self) -> jax.Array:
        """W' = (W + s·A·B) · m / n, float32.

        Raises:
            ValueError: it holds several adapters, or rows have chosen.
        """
        if self.adapters > 1 or self.ids is not None:
            raise ValueError(
                f"{describe(self)} stands for another array for every row; merge the tree of one "
                "adapter, as it was before compress.stack_adapters and compress.choose"
            )
        w, a, b = self.wide()
        w = w + self.turned(jnp.matmul(self.kernel(a), self.kernel(b), precision=EXACT))
        if self.magnitude is None:
            return w
        square = jnp.sum(w * w, self.input, keepdims=True)
        gain = self.magnitude / jnp.sqrt(jnp.maximum(square, TINY))
        return w * jnp.where(self.scaling == 0, np.float32(1), gain)

    def dense(self) -> jax.Array:
        """See `Compressed.dense`."""
        return self.merged().astype(self.aval().dtype)

    def ends(self) -> tuple[int, int]:
        """See `Parted.ends`."""
        return self.input, self.output

    def map(
        self,
        base: Callable[[Any], Any],
        part: Callable[[jax.Array, tuple[int, ...]], Any],
        **static,
    ) -> "LoRA":
        """See `Parted.map`."""
        ndim = self.aval().ndim
        core = (ndim + self.input, ndim + self.output)
        new = {}
        for name, own in (("a", 0), ("b", 1), ("scaling", None), ("magnitude", 1), ("ids", None)):
            if (array := getattr(self, name)) is not None:
                axes = [k for k in range(ndim) if k not in core or core.index(k) == own]
                new[name] = part(array, tuple(axes))
        return dataclasses.replace(self, base=base(self.base), **new, **static)

    def place(self, spec: Any) -> "LoRA":
        """See `Compressed.place`: A lies with the kernel's inputs, B and m with its outputs."""
        shape = self.aval().shape
        whole = place_part(jax.ShapeDtypeStruct(shape, jnp.float32), shape, spec, "values")
        return self.map(lambda w: w.place(spec) if is_compressed(w) else whole, lie(shape, spec))

    def cast(self, base: Callable[[Any], Any], dtype: Any) -> "LoRA":
        """See `Parted.cast`; scales and magnitudes stay float32."""
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        return dataclasses.replace(self, base=base(self.base), a=a, b=b)

    def dot(self, x: jax.Array, dims: Any, *, dtype: Any, precision: Any) -> jax.Array:
        """See `Parted.dot`."""
        return dot(x, self, dims, dtype=dtype, precision=precision)

    def check_cut(self, sizes: Sequence[int]) -> None:
        """See `Parted.check_cut`."""
        if self.magnitude is not None and sizes[self.input] != self.shape[self.input]:
            raise NotImplementedError(
                f"a slice of {describe(self)} cuts the axis that its norms are of; merge it before"
            )


# --- products ---------------------------------------------------------------------------------


def dot(
    x: jax.Array, w: LoRA, dims: Dims, *, dtype: Any = None, precision: Any = None
) -> jax.Array:
    """`lax.dot_general(x, w)` without making W' of it.

    Where rows have chosen, the first axis of x that is neither summed over nor shared with w is
    that of rows: each takes A and B of its own, gathered, at the cost of one adapter.

    Args:
        x: floats.
        w: of any orientation; the product sums over its inputs or over its outputs.
        dims: dimension numbers.
        dtype: of the result; None for what x and w promote to.
        precision: of all products of floats.
    """
    ((contract, contract_w), (batch, batch_w)) = dims
    inner, outer = w.ndim + w.input, w.ndim + w.output
    if outer in contract_w:
        inner, outer = outer, inner
    if inner not in contract_w or outer in (*contract_w, *batch_w):
        raise NotImplementedError(
            f"dot_general of {describe(w)}: it can sum over its inputs or its outputs, the other "
            f"axis being free; got contraction over {list(contract_w)}, batch {list(batch_w)}"
        )
    shared = (*contract, *batch)
    of_w, of_x, of_y = letters(w, x, dims)
    row = _row(x, w, [k for k in range(x.ndim) if k not in shared], of_x)

    wide = np.promote_types(x.dtype, np.float32)
    forward = inner == w.ndim + w.input
    gain, of_gain = _gain(w, of_w, row)
    if not {*of_gain} <= {*(of_y if forward else of_x)}:
        raise NotImplementedError(
            f"dot_general of {describe(w)}: its magnitudes change along an axis of the stack that "
            "the product sums over, or does not share; merge it before"
        )
    if gain is not None and not forward:
        x = (x.astype(wide) * _along(gain, of_gain, of_x)).astype(x.dtype)
    y = _base_dot(x, w.base, dims, dtype=dtype, precision=precision)

    a, of_a = _chosen(w, w.a.astype(x.dtype), w.output, of_w, row)
    b, of_b = _chosen(w, w.scaled().astype(x.dtype), w.input, of_w, row)
    first, second = ((a, of_a), (b, of_b)) if forward else ((b, of_b), (a, of_a))
    of_u = [n for n in of_x if n != of_w[inner]]
    of_u += [n for n in first[1] if n not in (*of_x, "r")] + ["r"]
    u = einsum(x, of_x, *first, of_u, wide, precision).astype(x.dtype)
    total = y.astype(wide) + einsum(u, of_u, *second, of_y, wide, precision)
    if gain is not None and forward:
        total = total * _along(gain, of_gain, of_y)
    return total.astype(y.dtype)


def _base_dot(x: jax.Array, base: Any, dims: Dims, *, dtype: Any, precision: Any) -> jax.Array:
    if isinstance(base, Quantized):
        return products.dot(x, base, dims, dtype=dtype, precision=precision)
    return lax.dot_general(x, base, dims, precision=precision, preferred_element_type=dtype)


def _row(x: jax.Array, w: LoRA, free: Sequence[int], of_x: Sequence[str]) -> str | None:
    """The letter of the axis of rows, if rows have chosen."""
    if w.ids is None:
        if w.adapters > 1:
            raise ValueError(
                f"{describe(w)} holds {w.adapters} adapters; say which each row of the batch "
                "takes: compress.choose(params, ids)"
            )
        return None
    count = w.ids.shape[w.output]
    if not free or x.shape[free[0]] != count:
        raise ValueError(
            f"{describe(w)}: adapters were chosen for {count} rows, and the activations are "
            f"{list(x.shape)}; the first axis that is not summed over must be that of rows"
        )
    return of_x[free[0]]


def _taken(w: LoRA, part: jax.Array, axis: int, none: float) -> jax.Array:
    """The entries of each row's adapter along an axis of adapters, in place of it.

    Rows without an adapter get `none`, those of one that is not there NaN.
    """
    assert w.ids is not None
    # The same in every layer of a stack.
    ids = jnp.moveaxis(w.ids, w.output, -1).reshape(-1, w.ids.shape[w.output])[0]
    found = jnp.take(part, jnp.maximum(ids, 0), axis=axis, mode="fill")
    absent = (ids < 0).reshape([-1 if k == axis else 1 for k in range(part.ndim)])
    return jnp.where(absent, np.asarray(none, part.dtype), found)


def _chosen(
    w: LoRA, side: jax.Array, axis: int, of_w: Sequence[str], row: str | None
) -> tuple[jax.Array, list[str]]:
    """A or B with their letters; `axis` is that of ranks."""
    k = side.ndim + axis
    if row is None:
        return side, [*of_w[:k], "r", *of_w[k + 1 :]]
    shape = (*side.shape[:k], w.adapters, side.shape[k] // w.adapters, *side.shape[k + 1 :])
    return _taken(w, side.reshape(shape), k, 0), [*of_w[:k], row, "r", *of_w[k + 1 :]]


def _gain(w: LoRA, of_w: Sequence[str], row: str | None) -> tuple[jax.Array | None, list[str]]:
    gain, k = w.gain(), w.ndim + w.input
    if gain is None:
        return None, []
    if row is None:
        return jnp.squeeze(gain, k), [*of_w[:k], *of_w[k + 1 :]]
    return _taken(w, gain, k, 1), [*of_w[:k], row, *of_w[k + 1 :]]


def _along(part: jax.Array, names: Sequence[str], onto: Sequence[str]) -> jax.Array:
    """A part with its axes in another's order, and axes of size 1 for those that it lacks."""
    order = sorted(range(len(names)), key=lambda k: onto.index(names[k]))
    return jnp.expand_dims(
        lax.transpose(part, order), [k for k, n in enumerate(onto) if n not in names]
    )
