"""Arrays come into being where they belong, and go back to the host.

Four ways there and one back: computed (`create`), read slice by slice (`build`) or all at once
(`fill`), a batch from the host (`put`), and to the host (`gather`). On the way there no device is
given more than its part.
The shardings come from `layout`. With several processes, all of them make the same calls in the
same order, for every array belongs to all.
"""

import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from sharding.errors import ShardingError
from sharding.layout import fit_tree, is_names, paths
from sharding.rules import BATCH, Rules

Slices = tuple[slice, ...]
"""A part of an array: one slice an axis, with start and stop."""

_LARGE = 2**22
"""Bytes from which NumPy asks for huge pages, which a virtual machine may be four times slower to
bring than small ones (scripts/bench/LOG.md)."""


def create(fn: Callable[..., Any], *args: Any, shardings: Any) -> Any:
    """Compute `fn(*args)` so that its result is born in parts, never whole on one device.

    Args:
        fn: a pure function of arrays, such as a model's `init`.
        *args: its arguments, such as a key; the same on every process.
        shardings: a tree of shardings like the result, or a prefix of it.

    Returns:
        The result. Random bits do not depend on the shardings; floats that are computed from them
        may, in the last digit, for compilers round parts of other shapes differently.

    >>> from sharding import make_mesh, rules, shardings
    >>> init = lambda key: {"kernel": jax.random.normal(key, (4, 8))}
    >>> key = jax.random.key(0)
    >>> where = shardings(
    ...     {"kernel": ("embed", "mlp")}, jax.eval_shape(init, key), make_mesh("data=1"), rules())
    >>> create(init, key, shardings=where)["kernel"].shape
    (4, 8)
    """
    return jax.jit(fn, out_shardings=shardings)(*args)


def build(
    abstract: jax.ShapeDtypeStruct,
    sharding: Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
    *,
    path: str = "array",
) -> jax.Array:
    """Make an array of slices that are read from a file, or from anywhere.

    Each process reads only what its own devices hold, and each distinct slice once.

    Args:
        abstract: the array's whole shape and dtype.
        sharding: where it goes.
        read: given one slice an axis, with start and stop, returns that part of the array. It is
            copied, so its buffer may be used again.
        path: the array's name in error messages.

    Returns:
        The array, of the dtype asked for.

    Raises:
        ShardingError: a part with another shape or dtype than asked for.

    >>> from sharding import make_mesh
    >>> whole = np.arange(6, dtype=np.int32).reshape(2, 3)
    >>> where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> x = build(jax.ShapeDtypeStruct((2, 3), np.int32), where, lambda index: whole[index])
    >>> np.testing.assert_array_equal(x, whole)
    """

    def write(parts: Mapping[Slices, np.ndarray]) -> None:
        for index, part in parts.items():
            block = np.asarray(read(index))
            if block.shape != part.shape or block.dtype != part.dtype:
                where = ", ".join(f"{axis.start}:{axis.stop}" for axis in index)
                raise ShardingError(
                    f"{path}: expected shape {part.shape} and dtype {part.dtype} for [{where}], "
                    f"but the reader gave {block.shape} and {block.dtype}"
                )
            part[...] = block

    return fill(abstract, sharding, write)


def fill(
    abstract: jax.ShapeDtypeStruct,
    sharding: Sharding,
    write: Callable[[Mapping[Slices, np.ndarray]], None],
) -> jax.Array:
    """Make an array of parts that are written in place.

    For readers to whom one pass over a file brings what several devices need. On CPU the buffers
    become the devices' memory; elsewhere they are free once the array is ready.

    Args:
        abstract: the array's whole shape and dtype.
        sharding: where it goes.
        write: given a buffer for each distinct part that this process's devices hold, by one slice
            an axis with start and stop; it fills all of them, and keeps none.

    Returns:
        The array.

    >>> whole = np.arange(6, dtype=np.int32).reshape(2, 3)
    >>> where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> def write(parts):
    ...     for index, part in parts.items():
    ...         part[...] = whole[index]
    >>> x = fill(jax.ShapeDtypeStruct((2, 3), np.int32), where, write)
    >>> np.testing.assert_array_equal(x, whole)
    """

    def slices(index: tuple[slice, ...] | None) -> Slices:
        bounds = (s.indices(n)[:2] for s, n in zip(index or (), abstract.shape, strict=True))
        return tuple(slice(*bound) for bound in bounds)

    here = sharding.addressable_devices_indices_map(abstract.shape).values()
    parts = {index: _empty(index, abstract.dtype) for index in dict.fromkeys(map(slices, here))}
    write(parts)
    return jax.make_array_from_callback(
        abstract.shape, sharding, lambda index: parts[slices(index)], abstract.dtype
    )


def _empty(index: Slices, dtype: np.dtype) -> np.ndarray:
    """A buffer for a part. XLA takes those that begin at a multiple of 64 over without a copy."""
    shape = tuple(axis.stop - axis.start for axis in index)
    size = math.prod(shape) * dtype.itemsize
    if size >= _LARGE:
        return np.ndarray(shape, dtype, mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    room = np.empty(size + 64, np.uint8)
    return np.ndarray(shape, dtype, room, -room.ctypes.data % 64)


def put(batch: Any, mesh: Mesh, rules: Rules, names: Any = None) -> Any:
    """Bring a batch from the host to the devices.

    A batch is the same on every process: a function of the seed and the step, not of who asks.
    Each process transfers only the rows of its own devices. Where even making the whole batch on
    each process is too much, `build` takes a function of slices.

    Args:
        batch: a tree of host arrays.
        mesh: where it goes.
        rules: where the names of its axes go.
        names: the axes' names, one tuple for all arrays or a tree of tuples like `batch`;
            by default the first axis is "batch" and the others are never cut.

    Returns:
        The same tree of global arrays. They do not alias the host's.

    Raises:
        ShardingError: as `fit` does, or a dtype that JAX lacks or would silently narrow.

    >>> from sharding import make_mesh, rules
    >>> put({"input_ids": np.zeros((8, 16), np.int32)}, make_mesh("data=1"), rules())[
    ...     "input_ids"].shape
    (8, 16)
    """
    if names is None:
        names = jax.tree.map(lambda leaf: (BATCH, *[None] * np.ndim(leaf))[: np.ndim(leaf)], batch)
    elif is_names(names):
        names = jax.tree.map(lambda _: names, batch)

    def one(path: str, leaf: Any, sharding: Sharding) -> jax.Array:
        host = np.asarray(leaf)
        if host.dtype != np.bool_ and not jax.numpy.issubdtype(host.dtype, np.number):
            raise ShardingError(
                f"{path}: devices hold numbers, not {host.dtype}; leave it out of the batch"
            )
        kept = jax.dtypes.canonicalize_dtype(host.dtype)
        if kept != host.dtype:
            raise ShardingError(
                f"{path}: JAX would turn {host.dtype} into {kept}; cast it on the host"
            )
        abstract = jax.ShapeDtypeStruct(host.shape, host.dtype)
        return build(abstract, sharding, lambda index: host[index], path=path)

    leaves, structure = jax.tree.flatten(batch)
    where = jax.tree.leaves(fit_tree(names, batch, mesh, rules, activation=True))
    return structure.unflatten(map(one, paths(batch), leaves, where))


def gather(tree: Any) -> Any:
    """Bring arrays back to the host, whole, on every process.

    With several processes this is a collective: all must call it, with the same tree. Arrays
    that are cut over processes pass through the devices' memory whole, one after another.

    Args:
        tree: a tree of arrays.

    Returns:
        The same tree of numpy arrays. Treat them as read-only: on CPU they may share the
        devices' memory. Where they do not, they are gone when the caller drops them.

    Raises:
        ShardingError: a key array, which numpy cannot hold.

    >>> gather({"x": jax.numpy.arange(3)})
    {'x': array([0, 1, 2], dtype=int32)}
    """

    def local(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ShardingError(f"{path}: numpy has no keys; gather jax.random.key_data of it")
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            # An array keeps the host's copy of itself; this one does so only until it is read.
            shards = [shard.data for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
        return multihost_utils.process_allgather(leaf, tiled=True)

    leaves, structure = jax.tree.flatten(tree)
    # One device_get for all, so that the copies overlap.
    hosts = jax.device_get([*map(local, paths(tree), leaves)])
    return structure.unflatten(map(np.asarray, hosts))
