"""Attention among the tokens of texts that are cut along their length: an exact ring.

Every device has a part of each text. Keys and values travel from neighbour to neighbour round the
ring of devices, while those at hand are computed with (Liu et al. 2023, arXiv:2310.01889). In the
backward pass the lighter half of a pair travels, with its gradients: queries, or keys where several
heads share them. Nobody ever holds the whole length, and nothing goes further than it must: a part
makes n - 1 steps, and its gradient as many. `pair` has the arithmetic.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from sharding.context import current, cutting, mapped
from sharding.errors import ShardingError
from sharding.layout import fit
from sharding.parallel.pair import Pairs, Place, by_group, by_token, wide


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √head_dim) v, among the tokens of one text, on any mesh.

    Inside a `scope` whose rules cut "length", parts travel in a ring over those mesh axes; other
    mesh axes may cut batch and heads. Elsewhere the same is computed in one part. The numbers do
    not depend on the mesh but for rounding, and the dropped weights not at all.

    A device holds the weights of one pair of parts at a time, [batch, heads, length/n, length/n].
    With `causal`, pairs wholly in the future are skipped, but parts are contiguous, so the device
    with the end of the texts skips none, and the others wait for it: causal attention takes the
    time of bidirectional. Texts dealt out in stripes would take half of it (Brandon et al. 2023,
    arXiv:2311.09431). Let key heads be a multiple of what cuts heads: devices that share one sum
    its gradient in every round.

    Args:
        q: queries [batch, length, heads, head_dim], floating.
        k: keys [batch, length, key heads, head_dim]; each serves heads / key heads neighbouring
            heads of queries (Ainslie et al. 2023, arXiv:2305.13245).
        v: values, like the keys.
        segments: integers [batch, length], the number of each token's text in its row; a token
            sees only its own text. None: a row is one text.
        causal: whether a token sees only itself and those before it.
        window: how many places away a token sees, itself not counted; None for all. Pairs of parts
            that are farther from each other are skipped.
        rate: of the dropout of attention weights, in [0, 1).
        key: of the dropout; None drops nothing (evaluation).

    Returns:
        [batch, length, heads, head_dim], of the dtype of `q`. Softmax and sums are in float32 or
        wider, and dots of float32 are that on every backend, unless
        `jax.default_matmul_precision` says otherwise.

    Raises:
        ShardingError: arrays that do not fit each other, or a length that the mesh does not divide.

    >>> q = k = v = jnp.array([1.0, 3.0, 5.0]).reshape(1, 3, 1, 1)
    >>> ring_attention(0 * q, k, v, jnp.array([[1, 1, 2]]))[0, :, 0, 0]
    Array([2., 2., 5.], dtype=float32)
    >>> ring_attention(0 * q, k, v, causal=True)[0, :, 0, 0]
    Array([1., 2., 3.], dtype=float32)
    """
    _check(q, k, v, segments)
    axes, scope = cutting("length"), current()
    mesh, size = None, 1
    if axes and scope is not None:
        mesh, rules = scope
        size = math.prod(mesh.shape[axis] for axis in axes)
        names = (None, "length", None, None)
        fit(names, q.shape, mesh, rules, activation=True, path="ring_attention: queries")
    precision = jax.config.jax_default_matmul_precision or "highest"
    ring = _Ring(mesh, axes, mapped(), Pairs(size, causal, rate, precision, window))
    return _attention(ring, q, k, v, segments, key if rate else None)


def _check(q: Any, k: Any, v: Any, segments: Any) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape != (*q.shape[:2], *k.shape[2:3], q.shape[3]):
        raise ShardingError(
            f"ring_attention: queries {q.shape}, keys {k.shape} and values {v.shape}; expected "
            f"[batch, length, heads, head_dim] of one batch, length and head_dim"
        )
    if q.shape[2] % k.shape[2]:
        raise ShardingError(
            f"ring_attention: {q.shape[2]} heads of queries cannot share {k.shape[2]} of keys; "
            f"expected a divisor of {q.shape[2]}"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ShardingError(
            f"ring_attention: queries, keys and values of {q.dtype}, {k.dtype} and {v.dtype}; "
            f"expected one floating dtype"
        )
    if segments is not None and (
        segments.shape != q.shape[:2] or not jnp.issubdtype(segments.dtype, jnp.integer)
    ):
        raise ShardingError(
            f"ring_attention: segments of {segments.dtype} {segments.shape}; expected integers "
            f"{q.shape[:2]}, the number of each token's text, and no bias made of them"
        )


@dataclass(frozen=True)
class _Ring:
    """The devices of a ring and what they compute; no arrays."""

    mesh: Mesh | None
    axes: tuple[str, ...]
    mapped: tuple[str, ...]
    pairs: Pairs

    @property
    def size(self) -> int:
        return self.pairs.parts

    def round(self, step: int | jax.Array) -> tuple[Any, Any, bool]:
        """The part that lives here, the one that visits, and whether they are known to be one."""
        here = lax.axis_index(self.axes) if self.axes else jnp.int32(0)
        before = here - jnp.asarray(step, jnp.int32)
        visitor = jnp.where(before < 0, before + jnp.int32(self.size), before)
        return here, visitor, isinstance(step, int) and step == 0

    def pass_on(self, tree: Any) -> Any:
        """To the next device, from the one before."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, ring), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring, q, k, v, segments, key):
    return _forward(ring, q, k, v, segments, key)[0]


def _attention_fwd(ring, q, k, v, segments, key):
    out, norm = _forward(ring, q, k, v, segments, key)
    return out, (q, k, v, segments, key, out, norm)


def _attention_bwd(ring, saved, dout):
    return *_backward(ring, *saved, dout), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# Which axis is the length: of q, k, v, segments and gradients; of `norm`; of a key.
_TEXT, _NORM, _NONE = 1, 3, None


def _forward(ring, *args):
    """The output, and the logarithm of the sum that the softmax divides by."""
    return _on(ring, _forward_parts, [_TEXT] * 4 + [_NONE], (_TEXT, _NORM))(*args)


def _backward(ring, *args):
    """The gradients of q, k and v."""
    ins = [*[_TEXT] * 4, _NONE, _TEXT, _NORM, _TEXT]
    return _on(ring, _backward_parts, ins, (_TEXT,) * 3)(*args)


def _on(ring, fn, ins, outs):
    fn = functools.partial(fn, ring)
    if ring.mesh is None:
        return fn

    def spec(axis):
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, ring.axes)

    return jax.shard_map(
        fn,
        mesh=ring.mesh,
        in_specs=tuple(map(spec, ins)),
        out_specs=tuple(map(spec, outs)),
        axis_names={*ring.axes, *ring.mapped},
        check_vma=False,
    )


# Below, arrays are one device's parts. The rounds in the middle are a loop, so that a ring of 256
# compiles as fast as one of 4. What a round sends on does not depend on what it computes: the
# compiler has the two overlap.


def _forward_parts(ring, q, k, v, segments, key):
    mine = by_group(q * _scale(q), k.shape[2])

    def visit(step, state, keys):
        return ring.pairs.add(state, Place(*ring.round(step)), mine, segments, keys, key)

    def turn(step, carry):
        state, keys = carry
        coming = ring.pass_on(keys)
        return visit(step, state, keys), coming

    keys = (_by_head(k), _by_head(v), segments)
    state = visit(0, ring.pairs.start(mine), keys)
    if ring.size > 1:
        carry = state, ring.pass_on(keys)
        if ring.size > 2:
            carry = lax.fori_loop(1, ring.size - 1, turn, carry)
        state = visit(ring.size - 1, *carry)
    out = by_token(state.out / state.total[..., None])
    return out.astype(q.dtype), state.highest + jnp.log(state.total)


def _backward_parts(ring, q, k, v, segments, key, out, norm, dout):
    sums, scale = wide(q.dtype), _scale(q)
    of_queries, out, dout = (by_group(x, k.shape[2]) for x in (q * scale, out, dout))
    share = jnp.sum(dout.astype(sums) * out.astype(sums), -1)
    queries = (of_queries, dout, norm, share, segments)
    keys = (_by_head(k), _by_head(v), segments)
    keys_go = _travels(keys, (k, v), sums) <= _travels(queries, (q,), sums)
    stay, go = (queries, keys) if keys_go else (keys, queries)

    def visit(step, go):
        """What this round's pair adds to the gradients of the half that stays and of the other."""
        here, visitor, same = ring.round(step)
        if keys_go:
            return ring.pairs.gradients(Place(here, visitor, same), stay, go, key)
        return ring.pairs.gradients(Place(visitor, here, same), go, stay, key)[::-1]

    def turn(step, carry, last=False):
        d_stay, d_go, go = carry
        coming, so_far = go if last else ring.pass_on(go), ring.pass_on(d_go)
        more, added = visit(step, go)
        return _add(d_stay, more), _add(so_far, added), coming

    d_stay, d_own = visit(0, go)
    if ring.size > 1:
        # The gradients that travel set out in round 1 and end where they are at home. What round 0
        # adds to them waits there.
        go = ring.pass_on(go)
        more, d_go = visit(1, go)
        d_stay = _add(d_stay, more)
        if ring.size > 2:
            carry = (d_stay, d_go, ring.pass_on(go))
            carry = lax.fori_loop(2, ring.size - 1, turn, carry)
            d_stay, d_go, _ = turn(ring.size - 1, carry, last=True)
        d_own = _add(d_own, ring.pass_on(d_go))
    (dq,), (dk, dv) = (d_stay, d_own) if keys_go else (d_own, d_stay)
    gradients = by_token(dq) * scale.astype(sums), _by_head(dk), _by_head(dv)
    return tuple(gradient.astype(q.dtype) for gradient in gradients)


def _travels(half, derived, sums) -> int:
    """Bytes that a half and its gradients send in a round."""
    arrays = jax.tree.leaves(half)
    return sum(x.size * x.dtype.itemsize for x in arrays) + sum(
        x.size * sums.itemsize for x in derived
    )


def _scale(q):
    return np.asarray(1 / np.sqrt(q.shape[-1]), q.dtype)


def _by_head(x):
    """[batch, part, heads, head_dim] → [batch, heads, part, head_dim], and back."""
    return jnp.swapaxes(x, 1, 2)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)
