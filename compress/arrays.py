"""A compressed array is a pytree that stands for an ordinary one.

It claims the shape and dtype of the array that it replaced, so it fits wherever that array did: in
a parameter tree, under `jit`, `scan`, `vmap` and `device_put`. `Compressed` is what all of them
share, `Quantized` the one made of codes and scales. `compress.fit` makes them of floats, and
`compress.rules` says what each JAX primitive does with them.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from compress.blocks import spread
from compress.formats import FLOAT, FORMATS, decode, decode_scale, unpack
from compress.hadamard import rotate


class Compressed(quax.ArrayValue):
    """An array in a smaller or a trainable form, for functions under `compress.apply`.

    A subclass has `aval`, `dense` and `place`, and rules for the primitives it understands.
    """

    @abstractmethod
    def dense(self) -> jax.Array:
        """The floats that it stands for, in its own dtype."""

    @abstractmethod
    def place(self, spec: Any) -> Any:
        """Its own structure with a `PartitionSpec` or `NamedSharding` for each array in it.

        Args:
            spec: that of the array it stands for.
        """

    def lies(self) -> NamedSharding | None:
        """Where the array that it stands for lies on a mesh, if it does: the reverse of `place`."""
        where = getattr(jax.tree.leaves(self)[0], "sharding", None)  # of the values, or the base
        return where if isinstance(where, NamedSharding) else None

    def materialise(self) -> NoReturn:
        """Refuse: compressed arrays become floats only where `compress.dequantize` is written.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{describe(self)} would be turned into floats silently; "
            "call compress.dequantize on it before the function, or leave it out of the rules"
        )

    @staticmethod
    def default(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """Refuse every primitive without a rule in `compress.rules`.

        A primitive that only calls a program (it has a `call_jaxpr`, as those that `grad` of a
        checkpointed scan leaves behind) is interpreted primitive by primitive instead. One that
        lets an array differ between devices does so with each of its parts.

        Raises:
            NotImplementedError: it names the primitive, the array and what to do.
        """
        if "call_jaxpr" in params:
            return quax.quaxify(jaxpr_as_fun(params["call_jaxpr"]))(*values)
        if primitive.name == "pvary":  # within `shard_map`; JAX 0.12 has no public name for it
            return jax.tree.map(lambda part: primitive.bind(part, **params), values[0])
        if primitive.name == "name":  # of `jax.ad_checkpoint.checkpoint_name`
            return values[0]
        leaf = next(v for v in values if isinstance(v, Compressed))
        raise NotImplementedError(
            f"no rule for the primitive '{primitive}' on {describe(leaf)}; compressed arrays can "
            "be multiplied (dot_general), convolved with, looked up (gather), transposed, sliced, "
            "reshaped and cast. Either leave this leaf uncompressed (rules={'its/path': 'keep', "
            "...}) or pass compress.dequantize(leaf) to the function"
        ) from None


class Quantized(Compressed):
    """An array as codes with scales.

    w ≈ input_scale · H((decode(values) − zero) · scale · outer)

    Every part but `values` has the array's rank, and along each axis one entry (size 1), one for
    each element, or one for every group of neighbours: see `compress.blocks`. Parts that are None
    are absent. There is no arithmetic on quantised arrays outside `compress.apply`.

    Attributes:
        values: codes of the format, or floats if it is "float".
        scale: float32, or what the format stores (uint8 exponents, float8).
        zero: float32, whole numbers in units of the code.
        outer: float32, a scale of scales.
        input_scale: float32, along the input axis: values hold the array divided by it, and what
            is multiplied with the array is multiplied with this first.
        act_scale: float32, of the activations it meets: they become round(x / act_scale). Without
            it the scale is found anew for every row of them.
        format: of `compress.formats`.
        as_dtype: the floating dtype this array stands for.
        pack: the axis along which two codes share a byte, negative.
        activations: what they are rounded to in products: "int8", "e4m3", or "float" if not.
        hadamard: the input axis, negative, and the block size of H, which is orthonormal and
            symmetric, so that x·w = (x·H)·(H·w).

    >>> w = Quantized(jnp.ones((4, 2), jnp.int8), jnp.full((1, 2), 0.5), as_dtype=np.dtype("f4"))
    >>> w.shape, w.dtype.name, w.dense()[0]
    ((4, 2), 'float32', Array([0.5, 0.5], dtype=float32))
    """

    values: jax.Array
    scale: jax.Array | None = None
    zero: jax.Array | None = None
    outer: jax.Array | None = None
    input_scale: jax.Array | None = None
    act_scale: jax.Array | None = None
    format: str = field(default="int8", metadata={"static": True})
    as_dtype: np.dtype = field(default=np.dtype("float32"), metadata={"static": True})
    pack: int | None = field(default=None, metadata={"static": True})
    activations: str = field(default="float", metadata={"static": True})
    hadamard: tuple[int, int] | None = field(default=None, metadata={"static": True})

    def aval(self) -> Any:
        """What JAX sees: the shape of the unpacked codes, with the original dtype."""
        shape = list(self.values.shape)
        if self.pack is not None:
            shape[self.pack] *= 2
        return jax.typeof(self.values).update(shape=tuple(shape), dtype=self.as_dtype)

    def codes(self) -> jax.Array:
        """The values, one code each."""
        if self.pack is None:
            return self.values
        return unpack(self.values, self.pack, FORMATS[self.format])

    def multiplier(self) -> jax.Array | None:
        """All scales of the codes as one float32 part; None for floats."""
        if self.scale is None:
            return None
        scale = decode_scale(self.scale)
        return scale if self.outer is None else scale * self.outer

    def prepared(self) -> jax.Array:
        """The float32 array that prepared inputs are multiplied with: codes times scales."""
        if self.format == FLOAT:
            return self.values.astype(jnp.float32)
        codes = decode(self.codes(), FORMATS[self.format])
        if self.zero is not None:
            codes = codes - spread(self.zero, codes.shape)
        scale = self.multiplier()
        return codes if scale is None else codes * spread(scale, codes.shape)

    def dense(self) -> jax.Array:
        """The floats that it stands for, in its own dtype.

        >>> Quantized(jnp.ones((2, 2), jnp.int8), jnp.full((1, 1), 3.0)).dense()[0]
        Array([3., 3.], dtype=float32)
        """
        w = self.prepared()
        if self.hadamard is not None:
            w = rotate(w, *self.hadamard)
        if self.input_scale is not None:
            w = w * spread(self.input_scale, w.shape)
        return w.astype(self.as_dtype)

    def parts(self) -> Iterator[tuple[str, jax.Array]]:
        """Names and arrays of the parts there are, `values` first."""
        for name in PARTS:
            if (part := getattr(self, name)) is not None:
                yield name, part

    def map(self, change: Callable[[str, jax.Array], Any], **static: Any) -> "Quantized":
        """Every part changed, and static fields replaced."""
        new = {name: change(name, part) for name, part in self.parts()}
        return dataclasses.replace(self, **new, **static)

    def place(self, spec: Any) -> "Quantized":
        """See `Compressed.place`: a part is cut as the array is, where it has its own entries.

        Entries of groups, and bytes of two codes, are cut if the mesh divides their number. It is a
        `NamedSharding` that knows; with a `PartitionSpec` they are cut as the array is, and what
        takes it refuses a size that its mesh does not divide.
        """
        return self.map(lambda name, part: place_part(part, self.aval().shape, spec, name))


PARTS = ("values", "scale", "zero", "outer", "input_scale", "act_scale")


def place_part(part: Any, shape: Sequence[int], spec: Any, name: str = "") -> Any:
    """The spec of a part of an array from the array's own.

    Raises:
        TypeError: it is neither a `PartitionSpec` nor a `NamedSharding`.

    >>> place_part(jnp.ones((1, 8)), (4, 8), PartitionSpec("fsdp", "tensor"))
    P(None, 'tensor')
    """
    if isinstance(spec, NamedSharding):
        entries, mesh = tuple(spec.spec), spec.mesh
    elif isinstance(spec, PartitionSpec):
        entries, mesh = tuple(spec), None
    else:
        raise TypeError(
            "expected a PartitionSpec or NamedSharding of the original leaf, "
            f"got {type(spec).__name__}"
        )
    entries += (None,) * (len(shape) - len(entries))
    kept = [
        entry if _own(s, n, entry, mesh, shared=name != "values") else None
        for s, n, entry in zip(part.shape, shape, entries, strict=True)
    ]
    new = PartitionSpec(*kept)
    if isinstance(spec, NamedSharding):
        return NamedSharding(spec.mesh, new, memory_kind=spec.memory_kind)
    return new


def _own(s: int, n: int, entry: Any, mesh: Any, *, shared: bool) -> bool:
    """Whether a part's entries along an axis are cut as the array is; one for all is not."""
    if s == n or (s == 1 and shared):
        return s > 1 or not shared
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return mesh is None or s % math.prod(mesh.shape[axis] for axis in axes) == 0


def describe(array: Compressed) -> str:
    """A compressed array in an error message: its kind, dtype and shape.

    >>> describe(Quantized(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2))))
    'Quantized(int8 for float32[4, 2])'
    """
    aval = array.aval()
    kind = f"{array.format} for " if isinstance(array, Quantized) else ""
    return f"{type(array).__name__}({kind}{aval.dtype}{list(aval.shape)})"


def is_compressed(x: object) -> bool:
    """Whether a tree walk should stop at `x`: the `is_leaf` of every walk over parameters."""
    return isinstance(x, Compressed)


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Where a leaf lies on a mesh, if it does."""
    where = leaf.lies() if is_compressed(leaf) else getattr(leaf, "sharding", None)
    return where if isinstance(where, NamedSharding) else None


def dequantize(params: Any) -> Any:
    """The tree with every compressed leaf as the floats it stands for, in its original dtype.

    >>> dequantize({"w": Quantized(jnp.ones((1, 2), jnp.int8), jnp.full((1, 1), 2.0))})["w"]
    Array([[2., 2.]], dtype=float32)
    """
    return jax.tree.map(
        lambda x: _dense(x) if is_compressed(x) else x, params, is_leaf=is_compressed
    )


def specs(params: Any, specs: Any) -> Any:
    """Where a compressed tree's arrays live, from where the original leaves lived.

    Values keep the original leaf's spec; scales and other parts have it along the axes on which
    they have entries of their own, so each device holds exactly those of its own values.

    Args:
        params: the compressed tree, or its `jax.eval_shape`.
        specs: the tree of `PartitionSpec` or `NamedSharding` of the original leaves.

    Returns:
        A tree of the compressed tree's structure, for `jax.device_put`, `jit` or `shard_map`.

    Raises:
        TypeError: a compressed leaf's spec is neither of the two.

    >>> w = Quantized(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)))
    >>> spec = specs({"kernel": w}, {"kernel": PartitionSpec("fsdp", "tensor")})["kernel"]
    >>> spec.values, spec.scale
    (P('fsdp', 'tensor'), P(None, 'tensor'))
    """

    def of(path: Any, leaf: Any, spec: Any) -> Any:
        if not is_compressed(leaf):
            return spec
        try:
            return leaf.place(spec)
        except TypeError as error:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"{name}: {error}") from None

    return jax.tree_util.tree_map_with_path(of, params, specs, is_leaf=is_compressed)


_dense = jax.jit(lambda array: array.dense())
