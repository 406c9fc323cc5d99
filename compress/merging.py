"""Parted factors become plain arrays, which anything can run, and adapters leave them again."""

import dataclasses
from typing import Any

import jax

from compress.adapter_trees import Adapters, attach
from compress.adapters import LoRA, Trained
from compress.arrays import Quantized, is_compressed, sharding_of
from compress.blocks import spread
from compress.factored import Factored
from compress.formats import FLOAT, FORMATS
from compress.hadamard import rotate
from compress.scheme import Scheme, assemble, coded, grid, inputs
from compress.transform import named_leaves


def merge(params: Any, *, requantize: bool = False) -> Any:
    """The tree without thin factors: W' = (W + s·A·B) · m / n, or A·B, computed in float32.

    Args:
        params: with `LoRA`, `Trained` and `Factored` leaves; others stay as they are.
        requantize: a base of codes becomes codes again, by the scheme that it has, rounded to
            nearest; otherwise floats of the dtype that it stands for. W is what the codes are, not
            what was before them, so that the floats are those that the adapter was trained with.

    Returns:
        A tree of the same paths; each array lies where its base lay.

    Raises:
        ValueError: a leaf holds several adapters.

    >>> from compress.trainable import lora
    >>> params, _ = lora({"w": 1})({"w": jax.numpy.eye(2), "bias": jax.numpy.zeros(2)})
    >>> merge(params)["w"]
    Array([[1., 0.], [0., 1.]], dtype=float32)
    """

    def merged(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Trained):
            return leaf.array
        if not isinstance(leaf, LoRA | Factored):
            return leaf
        try:
            again = requantize and isinstance(leaf, LoRA) and isinstance(leaf.base, Quantized)
            new = (_requantized if again else _dense)(leaf)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        where = sharding_of(leaf)
        if where is None:
            return new
        return jax.device_put(new, new.place(where) if is_compressed(new) else where)

    leaves, treedef = named_leaves(params)
    return jax.tree.unflatten(treedef, [merged(path, leaf) for path, leaf in leaves])


_dense = jax.jit(lambda leaf: leaf.dense())


@jax.jit
def _requantized(leaf: LoRA) -> Quantized:
    """W' in the form of the base: prepared as that is, and on a grid of the same kind."""
    base, w = leaf.base, leaf.merged()
    if base.input_scale is not None:
        w = w / spread(base.input_scale, w.shape)
    if base.hadamard is not None:
        w = rotate(w, *base.hadamard)
    prepared = dataclasses.replace(
        base, values=w, scale=None, zero=None, outer=None, format=FLOAT, pack=None
    )
    if base.format == FLOAT:
        return prepared
    # The input axis of a table of words that gives scores is its last.
    role = "table" if leaf.input > leaf.output else "kernel"
    scheme = scheme_of(base, role)
    found = grid(w, scheme, role)
    new = assemble(coded(w, found, scheme), found, scheme, role, prepared)
    # What meets the kernel is what met it before.
    return dataclasses.replace(new, activations=base.activations, act_scale=base.act_scale)


def scheme_of(w: Quantized, role: str = "kernel") -> Scheme:
    """The scheme of a quantised array, but for how its range and activations were found.

    Args:
        w: of codes.
        role: "kernel" [..., in, out] or "table" [..., out, in].

    >>> from compress import fit
    >>> scheme_of(fit(jax.numpy.ones((256, 8)), "int4")) == Scheme("int4")
    True
    """
    row, scale = FORMATS[w.format], w.scale
    assert scale is not None
    axis = inputs(role)[-1]
    other = -3 - axis
    entries, n_in = scale.shape[axis], w.shape[axis]
    per: str | int = row.per
    if row.scales == "float32":
        per = "channel" if entries == 1 else n_in // entries
        per = "tensor" if entries == 1 != w.shape[other] and scale.shape[other] == 1 else per
    activations = FLOAT if w.activations == FLOAT else "dynamic"
    return Scheme(w.format, per=per, symmetric=w.zero is None, activations=activations)


def unmerge(merged: Any, adapters: Adapters) -> Any:
    """Take what `merge` added out again: W = W' − s·A·B, up to rounding.

    Args:
        merged: floats.
        adapters: as `detach` gave them, of what was merged.

    Returns:
        The tree with the base's floats; leaves trained whole stay, for nothing knows the old ones.

    Raises:
        ValueError: an adapter has magnitudes: W' has lengths m, and the lengths n that it had
            before are not in it; or the merged are codes. Keep the base, as `detach` gives it.

    >>> from compress.adapter_trees import Adapter
    >>> adapters = {"w": Adapter(jax.numpy.ones((2, 1)), jax.numpy.ones((1, 2)))}
    >>> unmerge({"w": jax.numpy.ones((2, 2))}, adapters)["w"][0]
    Array([0., 0.], dtype=float32)
    """
    leaves = dict(named_leaves(attach(merged, adapters))[0])
    for path, leaf in leaves.items():
        if isinstance(leaf, LoRA):
            if leaf.magnitude is not None or is_compressed(leaf.base):
                why = "codes are rounded" if is_compressed(leaf.base) else "it has magnitudes"
                raise ValueError(f"{path}: cannot be unmerged, for {why}; keep the base (detach)")
            leaves[path] = _without(leaf)
        elif isinstance(leaf, Trained):
            leaves[path] = leaf.array
    return jax.tree.unflatten(named_leaves(merged)[1], list(leaves.values()))


@jax.jit
def _without(w: LoRA) -> jax.Array:
    return dataclasses.replace(w, scaling=-w.scaling).dense()
