"""Functions of windows on images that are cut by height and width: an exact halo exchange.

A convolution or a pooling computes each row of its output from a window of rows. Where the mesh
cuts an image into bands, the windows at the edges of a band reach into the next one: each device
gets just the rows that it lacks from its neighbours, then computes its own rows of the output as if
it were alone. On the way back, the gradients of these rows return to where the rows came from.

Kernels are gathered and their gradients scattered as in `linear`; the same sums bring together
channels that are cut.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding.context import differentiated
from sharding.errors import ShardingError
from sharding.parallel.cuts import Cuts, summable, vary, whole
from sharding.rules import Names, mesh_axes

IMAGES: Names = ("batch", "height", "width")

Pair = Sequence[int]
"""Two: of the height and of the width, or before and after."""


def windowed(
    fn: Callable[..., jax.Array],
    x: jax.Array,
    *kernels: jax.Array,
    window: Pair,
    strides: Pair = (1, 1),
    padding: Sequence[Pair] = ((0, 0), (0, 0)),
    fill: float = 0.0,
    channels: tuple[str | None, str | None] | None = None,
    names: Sequence[Names] = (),
) -> jax.Array:
    """fn(x, *kernels, padding), of images that the mesh may cut anywhere.

    Where it cuts height or width in a `scope`, n parts exchange halos by permutations over those
    mesh axes: of the padding (t, b), t rows go to the next part and window - stride - t rows to the
    one before, from as many neighbours as a window reaches into. Where it cuts batch, channels or
    kernels alone, the communication is written out in a scope for differentiation, as `linear` does
    it, if `channels` are named; else it is the compiler's to find.

    Args:
        fn: of [B, H, W, C], kernels and `padding=` to [B, H', W', C']; given parts, with less
            padding where rows of others took its place, it computes parts.
        x: [B, H, W, C].
        *kernels: what else fn takes, such as [height, width, C, C'].
        window: rows and columns that an element of the output depends on.
        strides: places from one window to the next.
        padding: rows before and after, columns before and after.
        fill: what they hold, as fn has it.
        channels: the names of the last axes of x and of the output. Where the mesh cuts x along
            channels, but not the output, fn gives summands. None: fn takes each channel by itself,
            or batch, channels and kernels are left to the compiler.
        names: of the axes of every kernel, if `channels` are named.

    Returns:
        [B, H', W', C'].

    Raises:
        ShardingError: a size that the mesh does not divide; parts that are no multiple of a stride;
            a padding with which output and input do not lie alike.

    >>> def total(x, padding):
    ...     sides = [(0, 0), *padding, (0, 0)]
    ...     return lax.reduce_window(x, 0.0, lax.add, (1, 3, 1, 1), (1,) * 4, sides)
    >>> windowed(total, jnp.ones((1, 4, 1, 1)), window=(3, 1), padding=[(1, 1), (0, 0)])[0, :, 0, 0]
    Array([2., 3., 3., 2.], dtype=float32)
    """
    alone = partial(fn, padding=tuple(padding))
    cuts = Cuts.current()
    if cuts is None:
        return alone(x, *kernels)
    inner, outer = channels or (None, None)
    rows: Names = IMAGES if channels else (None, *IMAGES[1:])
    y = jax.eval_shape(alone, x, *kernels)
    where_x = cuts.flown((*rows, inner), x.shape, "windowed: x")
    over = tuple(map(mesh_axes, where_x[1:3]))
    if not any(over) and (channels is None or differentiated() is None):
        return alone(x, *kernels)
    for side in range(2):
        if over[side]:
            parts = cuts.size(over[side])
            _check(IMAGES[1 + side], parts, x.shape[1 + side], y.shape[1 + side],
                   window[side], strides[side], padding[side])  # fmt: skip
    where_y = cuts.flown((*rows, outer), y.shape, "windowed: output")
    axes = cuts.of(where_x, where_y)
    if not axes:
        return alone(x, *kernels)
    named = names if channels else [(None,) * kernel.ndim for kernel in kernels]
    inside = tuple(a for a in mesh_axes(where_x[3]) if a not in mesh_axes(where_y[3]))
    kept = {*mesh_axes(where_x[3]), *mesh_axes(where_y[3])}
    stored = [
        _gathered(cuts.stored(n, kernel.shape, "windowed: kernel"), kept, axes)
        for n, kernel in zip(named, kernels, strict=True)
    ]

    def body(x: jax.Array, *kernels: jax.Array) -> jax.Array:
        x = vary(x, where_x, axes)
        left = list(padding)
        for side in range(2):
            if over[side]:
                before, left[side] = left[side][0], (0, 0)
                after = window[side] - strides[side] - before
                x = _surrounded(x, 1 + side, over[side], before, after, fill)
        parts = []
        for kernel, lies in zip(kernels, stored, strict=True):
            part = vary(kernel, lies, axes)
            for place, entry in enumerate(lies):
                part = whole(part, tuple(a for a in mesh_axes(entry) if a not in kept), place)
            parts.append(part)
        y = fn(x, *parts, padding=tuple(left))
        return summable(partial(lax.psum, axis_name=inside), y) if inside else y

    return cuts.shard_map(body, (where_x, *stored), where_y, axes)(x, *kernels)


def _check(name: Any, parts: int, size: int, out: int, window: int, stride: int, sides: Pair):
    """Raises unless part i of the output starts at the first row of part i of the input."""
    before, after = sides
    if size % (parts * stride):
        raise ShardingError(
            f"windowed: {name} {size} is cut into {parts} parts of {size // parts}, no multiple of "
            f"the stride {stride}; choose a {name} that is a multiple of {parts * stride}, fewer "
            f"devices, or rules with {name!r} mapped to None"
        )
    if out * stride != size or before < 0 or after < 0:
        raise ShardingError(
            f"windowed: {name} {size} becomes {out}, and {parts} parts of it would not lie where "
            f"those of the input do; with window {window} and stride {stride} the padding "
            f"{before} + {after} must be {max(window - stride, 0)} to {window - 1} in all, or "
            f"{name!r} mapped to None"
        )


def _surrounded(
    x: jax.Array, axis: int, over: tuple[str, ...], before: int, after: int, fill: float
) -> jax.Array:
    """A part with the rows before and after it; `fill` beyond the image. `after` < 0 takes away."""
    above = _neighbours(x, axis, over, before, fill, later=False)[::-1]
    below = _neighbours(x, axis, over, after, fill, later=True)
    if after < 0:  # windows with gaps between them
        x = lax.slice_in_dim(x, 0, x.shape[axis] + after, axis=axis)
    return lax.concatenate([*above, x, *below], axis) if above or below else x


def _neighbours(x, axis, over, rows, fill, *, later: bool) -> list[jax.Array]:
    """The nearest `rows` rows of the parts before this one, or of the later ones; nearest first."""
    parts, here, size = lax.axis_size(over), lax.axis_index(over), x.shape[axis]
    found = []
    for hop in range(1, -(-rows // size) + 1):
        count = min(size, rows - (hop - 1) * size)
        start = 0 if later else size - count
        mine = lax.slice_in_dim(x, start, start + count, axis=axis)
        ways = [(i + hop, i) if later else (i, i + hop) for i in range(parts - hop)]
        came = lax.ppermute(mine, over, ways)  # zeros to those that have no such neighbour
        if fill:
            lacks = here >= parts - hop if later else here < hop
            came = jnp.where(lacks, jnp.asarray(fill, x.dtype), came)
        found.append(came)
    return found


def _gathered(spec: PartitionSpec, kept: set[str], axes: set[str]) -> PartitionSpec:
    """A kernel's cuts but for those that its device cannot undo: the compiler does, before.

    They are over mesh axes that cut no image, or outside of those over which channels stay cut.
    """
    entries = []
    for entry in map(mesh_axes, spec):
        known = tuple(axis for axis in entry if axis in axes)
        stays = tuple(axis for axis in known if axis in kept)
        entries.append((known if known[: len(stays)] == stays else stays) or None)
    return PartitionSpec(*entries)
