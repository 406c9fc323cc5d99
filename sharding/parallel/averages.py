"""Averages of gradients over `data` that send less than they are: 8 bits, or a low rank.

Left alone, the compiler all-reduces every gradient in float32. These take what each worker found,
[workers, *shape] with a worker's own where it is, and send codes or thin factors of it instead.
What rounding leaves out is kept by the worker and added to its next gradients (error feedback,
Karimireddy et al. 2019, arXiv:1901.09847), so that nothing is lost but time.

    exchange = Int8()
    state = exchange.init(params, workers)
    average, state = exchange(grads, state, shardings)          # shardings of the parameters
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.errors import ShardingError

WORKERS = "data"
"""The mesh axis whose devices average."""

BLOCK = 256
"""Numbers that share a scale on the wire."""

NARROW = 16
"""Rows or columns of which a matrix has fewer, that are not worth thin ones."""

EXACT = lax.Precision.HIGHEST

BUCKET = 2**22
"""Numbers that are sent at once, as a rule: small arrays do not travel alone."""


class Exchange(Protocol):
    """A way to average gradients.

    Its state is a dict; "errors" in it holds what workers have not sent yet, [workers, *shape].
    """

    def init(self, params: Any, workers: int) -> Any:
        """What it keeps from step to step, before the first; `params` may be shapes."""
        ...

    def lie(self, params: Any, shardings: Any) -> Any:
        """A `NamedSharding` for every array of its state, from those of the parameters."""
        ...

    def __call__(self, grads: Any, state: Any, shardings: Any) -> tuple[Any, Any]:
        """The average of gradients over workers, as every one of them gets it, and the new state.

        Args:
            grads: a tree like the parameters, float32 [workers, *shape], cut over `data`.
            state: of the step before.
            shardings: a `NamedSharding` for each parameter.
        """
        ...


def exchange(name: str) -> Exchange:
    """What a name says: "int8", or "powersgd:4" for a rank of 4.

    Raises:
        ShardingError: it says nothing.

    >>> exchange("int8"), exchange("powersgd:2")
    (Int8(), PowerSGD(rank=2))
    """
    kind, _, rank = name.partition(":")
    if kind == "int8" and not rank:
        return Int8()
    if kind == "powersgd" and (not rank or rank.isdecimal()):
        return PowerSGD(int(rank)) if rank else PowerSGD()
    raise ShardingError(f"exchange {name!r}: expected int8, or powersgd:RANK such as powersgd:4")


@dataclass(frozen=True)
class Int8:
    """An average in 8 bits each way: a quarter of what an all-reduce of float32 sends.

    Each worker sends every other its part in codes, averages what it gets for its own part, and
    sends that to all in codes. A block of 256 numbers has a scale, its largest / 127.

    Source: Tang et al. 2021, arXiv:2102.02888, whose two roundings these are, with 8 bits.
    """

    def init(self, params: Any, workers: int) -> Any:
        """See `Exchange.init`."""
        return {"errors": _errors(params, workers)}

    def lie(self, params: Any, shardings: Any) -> Any:
        """See `Exchange.lie`."""
        del params
        return {"errors": jax.tree.map(_first, shardings)}

    def __call__(self, grads: Any, state: Any, shardings: Any) -> tuple[Any, Any]:
        """See `Exchange`."""
        leaves, treedef = jax.tree.flatten(grads)
        kept, where = jax.tree.leaves(state["errors"]), treedef.flatten_up_to(shardings)
        mesh, count = where[0].mesh, len(leaves)
        if mesh.shape[WORKERS] == 1:
            return _alone(grads, state)
        specs = tuple(w.spec for w in where)
        own = tuple(PartitionSpec(WORKERS, *s) for s in specs)

        def body(*parts: jax.Array) -> tuple[jax.Array, ...]:
            given = [(g + e)[0] for g, e in zip(parts[:count], parts[count:], strict=True)]
            means, errors = [], []
            for bucket in _buckets([x.size for x in given]):
                found = _averaged(jnp.concatenate([given[i].ravel() for i in bucket]))
                start = 0
                for i in bucket:
                    stop = start + given[i].size
                    mean, error = (x[start:stop].reshape(given[i].shape) for x in found)
                    means.append(mean)
                    errors.append(error[None])
                    start = stop
            return (*means, *errors)

        out = jax.shard_map(
            body, mesh=mesh, in_specs=(*own, *own), out_specs=(*specs, *own), check_vma=False
        )(*leaves, *kept)
        errors = treedef.unflatten(out[count:])
        return treedef.unflatten(out[:count]), {"errors": errors}


def _buckets(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of arrays that travel together, in order."""
    bucket, held = [], 0
    for i, size in enumerate(sizes):
        if bucket and held + size > BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(i)
        held += size
    yield bucket


def _averaged(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The average of workers' x [n], in a `shard_map`, and what of this worker's was left out."""
    workers, n = lax.axis_size(WORKERS), x.size
    size = -(-n // (workers * BLOCK)) * BLOCK
    rows = jnp.pad(x, (0, workers * size - n)).reshape(workers, size)
    sent = _packed(rows)
    error = rows - _unpacked(sent)
    came = lax.all_to_all(sent, WORKERS, 0, 0, tiled=True)
    part = jnp.mean(_unpacked(came), 0)
    again = _packed(part[None])
    # What the second rounding leaves out, this worker makes up for on behalf of all.
    mine = jnp.arange(workers) == lax.axis_index(WORKERS)
    owed = (part - _unpacked(again)[0]) * np.float32(workers)
    error = error + jnp.where(mine[:, None], owed, np.float32(0))
    whole = _unpacked(lax.all_gather(again[0], WORKERS))
    return whole.reshape(-1)[:n], error.reshape(-1)[:n]


def _packed(rows: jax.Array) -> jax.Array:
    """Codes and scales of rows [k, n] in one message each, int8 [k, n + 4·n/256]."""
    blocks = rows.reshape(len(rows), -1, BLOCK)
    scale = jnp.max(jnp.abs(blocks), -1, keepdims=True) * np.float32(1 / 127)
    over = jnp.where(scale == 0, np.float32(1), scale)
    codes = jnp.round(blocks / over).astype(jnp.int8).reshape(len(rows), -1)
    scales = lax.bitcast_convert_type(scale[..., 0], jnp.int8).reshape(len(rows), -1)
    return jnp.concatenate([codes, scales], 1)


def _unpacked(messages: jax.Array) -> jax.Array:
    k, width = messages.shape
    n = width * BLOCK // (BLOCK + 4)
    scales = lax.bitcast_convert_type(messages[:, n:].reshape(k, -1, 4), jnp.float32)
    codes = messages[:, :n].reshape(k, -1, BLOCK).astype(jnp.float32)
    return (codes * scales[..., None]).reshape(k, n)


@dataclass(frozen=True)
class PowerSGD:
    """An average of low rank: of a matrix [n, m] two thin ones are all-reduced, r·(n + m) numbers.

        P = orthonormal(mean of M·Q),   Q ← mean of Mᵀ·P,   average = P·Qᵀ

    Q goes on from step to step, a power iteration. Leading axes are a stack of matrices. Arrays of
    one axis, narrow ones, and those of which thin ones would be no smaller are averaged as they
    are.

    Attributes:
        rank: r.

    Source: Vogels et al. 2019, arXiv:1905.13727.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        """Check it."""
        if self.rank < 1:
            raise ShardingError(f"exchange: rank {self.rank}; expected 1 or more")

    def thin(self, shape: Sequence[int]) -> bool:
        """Whether an array's average goes by thin ones."""
        wide = len(shape) > 1 and min(shape[-2:]) >= NARROW  # not the biases of a stack of layers
        return wide and self.rank * sum(shape[-2:]) < math.prod(shape[-2:])

    def init(self, params: Any, workers: int) -> Any:
        """See `Exchange.init`."""
        leaves, treedef = jax.tree.flatten(params)
        key = jax.random.key(0, impl="threefry2x32")
        factors = [
            jax.random.normal(jax.random.fold_in(key, i), (*p.shape[:-2], p.shape[-1], self.rank))
            for i, p in enumerate(leaves)
            if self.thin(p.shape)
        ]
        thin = [p if self.thin(p.shape) else None for p in leaves]
        return {
            "factors": factors,
            "errors": _errors(jax.tree.unflatten(treedef, thin), workers),
        }

    def lie(self, params: Any, shardings: Any) -> Any:
        """See `Exchange.lie`."""
        leaves, treedef = jax.tree.flatten(params)
        where = treedef.flatten_up_to(shardings)
        thin = [(p, w) for p, w in zip(leaves, where, strict=True) if self.thin(p.shape)]
        factors = [NamedSharding(w.mesh, self._columns(w, p.ndim)) for p, w in thin]
        kept = [
            _first(w) if self.thin(p.shape) else None for p, w in zip(leaves, where, strict=True)
        ]
        return {"factors": factors, "errors": jax.tree.unflatten(treedef, kept)}

    def _columns(self, where: NamedSharding, ndim: int) -> PartitionSpec:
        entries = (*where.spec, *[None] * (ndim - len(where.spec)))
        return PartitionSpec(*entries[:-2], entries[-1], None)

    def __call__(self, grads: Any, state: Any, shardings: Any) -> tuple[Any, Any]:
        """See `Exchange`."""
        leaves, treedef = jax.tree.flatten(grads)
        mesh = jax.tree.leaves(shardings)[0].mesh
        if mesh.shape[WORKERS] == 1:
            return _alone(grads, state)
        errors = treedef.flatten_up_to(state["errors"])
        thin = [i for i, e in enumerate(errors) if e is not None]

        def body(grads: list[jax.Array], errors: list[jax.Array], factors: list[jax.Array]) -> Any:
            """Over `data` alone: what else cuts a matrix, the compiler sums over."""
            means = [g if i in thin else lax.pmean(g[0], WORKERS) for i, g in enumerate(grads)]
            left, new = [], []
            for i, e, q in zip(thin, errors, factors, strict=True):
                m = (grads[i] + e)[0]
                p = lax.pmean(jnp.matmul(m, q, precision=EXACT), WORKERS)
                p, _ = jnp.linalg.qr(p)
                across = jnp.swapaxes(m, -1, -2)
                new.append(lax.pmean(jnp.matmul(across, p, precision=EXACT), WORKERS))
                means[i] = jnp.matmul(p, jnp.swapaxes(new[-1], -1, -2), precision=EXACT)
                left.append((m - means[i])[None])
            return means, left, new

        own, whole = PartitionSpec(WORKERS), PartitionSpec()
        means, left, new = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(own, own, whole),
            out_specs=(whole, own, whole),
            axis_names={WORKERS},
        )(leaves, [errors[i] for i in thin], state["factors"])
        for i, e in zip(thin, left, strict=True):
            errors[i] = e
        return treedef.unflatten(means), {"factors": new, "errors": treedef.unflatten(errors)}


def _alone(grads: Any, state: Any) -> tuple[Any, Any]:
    """Of one worker, what it found, and what it has not sent yet when it was one of several."""
    leaves, treedef = jax.tree.flatten(grads)
    kept = treedef.flatten_up_to(state["errors"])
    means = [g[0] if e is None else (g + e)[0] for g, e in zip(leaves, kept, strict=True)]
    nothing = jax.tree.map(jnp.zeros_like, state["errors"])
    return treedef.unflatten(means), {**state, "errors": nothing}


def _errors(params: Any, workers: int) -> Any:
    return jax.tree.map(lambda p: jnp.zeros((workers, *p.shape), jnp.float32), params)


def _first(where: NamedSharding) -> NamedSharding:
    """A worker's own, which lie on its devices as the parameter does."""
    return NamedSharding(where.mesh, PartitionSpec(WORKERS, *where.spec))


def workers(mesh: Mesh) -> int:
    """How many average on a mesh."""
    return mesh.shape[WORKERS]
