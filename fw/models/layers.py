"""The layers that models are declared with: Flax NNX modules and the functions under them.

They are ordinary mathematics, written for few passes over memory: outside the dots, a transformer
step on a CPU is bound by reading and writing activations. No layer knows a mesh, a dtype policy or
a quantiser. Each parameter names its axes (`axes=`), which is all that `sharding` needs.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fw.models.flash import Seen, by_platform, sees
from fw.taps import tap
from sharding import constrain, current, cutting, linear, lookup
from sharding.mesh import platform
from sharding.noise import dropout_mask
from sharding.parallel.ring import ring_attention

Axes = tuple[str | None, ...]
Rows = tuple[str | None, ...]
ROWS: Rows = ("batch", "length")


class Dense(nnx.Module):
    """y = x · kernel (+ bias), kernel [in, out]."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        axes: Rows,
        *,
        std: float,
        rngs: nnx.Rngs,
        bias: bool = True,
    ):
        normal = jax.random.normal(rngs.params(), (size_in, size_out)) * std
        self.kernel = nnx.Param(normal, axes=axes)
        self.bias = nnx.Param(jnp.zeros(size_out), axes=axes[1:]) if bias else None
        self.axes = axes

    def __call__(
        self, x: jax.Array, rows: Rows = ROWS, *, out: Rows | None = None, head: int | None = None
    ) -> jax.Array:
        return denses(x, [self], rows, out=out, head=head)[0]


def denses(
    x: jax.Array,
    layers: Sequence[Dense],
    rows: Rows = ROWS,
    *,
    out: Rows | None = None,
    head: int | None = None,
):
    """The outputs of dense layers of one input, whose kernels have the same names.

    Args:
      x: [..., in].
      layers: at least one.
      rows: the names of the leading axes of x.
      out: those of the outputs, where they are others.
      head: as in `sharding.linear`.
    """
    kernels = [layer.kernel[...] for layer in layers]
    ys = linear(x, kernels, layers[0].axes, rows=rows, out_rows=out, head=head)
    return [
        y if layer.bias is None else y + layer.bias[...]
        for y, layer in zip(ys, layers, strict=True)
    ]


class Embedding(nnx.Module):
    """Rows of a table [count, size] by integer id."""

    def __init__(self, count: int, size: int, axes: Axes, *, std: float, rngs: nnx.Rngs):
        normal = jax.random.normal(rngs.params(), (count, size)) * std
        self.embedding = nnx.Param(normal, axes=axes)
        self.axes = axes

    def __call__(self, ids: jax.Array) -> jax.Array:
        return embeddings([self], [ids])


def embeddings(tables: Sequence[Embedding], ids: Sequence[jax.Array]) -> jax.Array:
    """The sum of the rows of several tables.

    Args:
      tables: of one size.
      ids: [batch, length] each, or a scalar: one row everywhere.
    """
    return lookup([t.embedding[...] for t in tables], ids, [t.axes for t in tables])


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, *, epsilon: float, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(size), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size), axes=("embed",)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        bias = jnp.zeros_like(scale) if self.bias is None else self.bias[...]
        return layer_norm(x, scale, bias, self.epsilon)


def widened(x: jax.Array) -> jax.Array:
    """x in float32 at least: what is summed over, where activations are narrower."""
    return x.astype(np.promote_types(x.dtype, np.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, epsilon):
    """(x - mean) / sqrt(var + epsilon) · scale + bias over the last axis.

    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2), 0.0)
    Array([-1.,  1.], dtype=float32)
    """
    return _layer_norm_fwd(x, scale, bias, epsilon)[0]


def _layer_norm_fwd(x, scale, bias, epsilon):
    wide = widened(x)
    mean = jnp.mean(wide, -1, keepdims=True)
    centred = wide - mean
    inverse = lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + epsilon)
    y = centred * inverse * widened(scale) + widened(bias)
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_bwd(epsilon, saved, g):
    # By hand: two reductions over x, where autodiff of the above makes five.
    x, scale, mean, inverse = saved
    like, g = x.dtype, widened(g)
    unit = (widened(x) - mean) * inverse
    gs = g * widened(scale)
    along = jnp.mean(gs * unit, -1, keepdims=True)
    dx = (gs - jnp.mean(gs, -1, keepdims=True) - unit * along) * inverse
    rows = tuple(range(x.ndim - 1))
    sums = jnp.sum(g * unit, rows), jnp.sum(g, rows)
    return dx.astype(like), *(total.astype(scale.dtype) for total in sums)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x), exact (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    `jax.nn.gelu` computes Φ by `erfc`, with two branches and twice the time on a CPU. The
    derivative, Φ(x) + x φ(x), is computed from x again: reading what autodiff would keep is slower.

    >>> gelu(jnp.array([-1.0, 0.0, 1.0]))
    Array([-0.15865526,  0.        ,  0.8413447 ], dtype=float32)
    """
    return x * _normal_cdf(x)


def _normal_cdf(x):
    return 0.5 * (1 + lax.erf(x * np.asarray(np.sqrt(0.5), x.dtype)))


def _gelu_bwd(x, g):
    density = np.asarray(1 / np.sqrt(2 * np.pi), x.dtype) * jnp.exp(-0.5 * jnp.square(x))
    return (g * (_normal_cdf(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up (Shazeer 2020, arXiv:2002.05202); the derivative is computed from both again.

    >>> swiglu(jnp.array([0.0, 1.0]), jnp.array([3.0, 2.0]))
    Array([0.       , 1.4621172], dtype=float32)
    """
    wide = widened(gate)
    return _once((wide * jax.nn.sigmoid(wide) * widened(up)).astype(gate.dtype))


def _swiglu_bwd(saved, g):
    gate, up = saved
    x, y, dy = widened(gate), widened(up), widened(_once(g))
    s = jax.nn.sigmoid(x)
    dgate, dup = dy * y * s * (1 + x * (1 - s)), dy * x * s
    return _once((dgate.astype(gate.dtype), dup.astype(up.dtype)))


def _once(x):
    """Keeps a TPU's compiler from computing x again within each product that reads it.

    That takes a quarter more cycles of each (scripts/bench/LOG.md).
    """
    here = current()
    on_tpu = here is not None and platform(here[0]) == "tpu"
    return lax.optimization_barrier(x) if on_tpu else x


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_bwd)


HIDDEN, HEADS = "hidden", ("query", "key", "value")
"""What layers name for `fw.taps`: what they return, and what their attention relates."""


def between(x: jax.Array) -> Rows:
    """The names of the rows of what lies between sublayers, [batch, length, embed].

    Where `tensor` cuts heads and neurons, norms and sums would be the same on all of its devices;
    cut along the length, each has its part. Where it does not divide, rows are those of all else.
    """
    over = cutting("stream")
    here = current()
    if over == cutting("length") or here is None:
        return ROWS
    parts = math.prod(here[0].shape[axis] for axis in over)
    return ("batch", "stream") if x.shape[1] % parts == 0 else ROWS


def in_heads(
    x: jax.Array, layers: Sequence["Dense"], size: int, rows: Rows = ROWS
) -> list[jax.Array]:
    """Queries, keys and values.

    Args:
      x: [batch, length, embed].
      layers: the three that make them.
      size: of a head.
      rows: of x; see `between`.

    Returns:
      [batch, length, heads, size] each; how many heads there are is in the kernels.
    """
    shape = (*x.shape[:2], -1, size)
    return [
        tap(constrain(y.reshape(shape), "batch", "length", "heads", None), name)
        for y, name in zip(denses(x, layers, rows, out=ROWS, head=size), HEADS, strict=True)
    ]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate).

    The mask is a pure function of the key and of each element's global position, so it is
    bit-identical on every mesh; see `sharding.noise`.

    Args:
      x: any shape, floating.
      rate: in [0, 1).
      key: a typed PRNG key; None returns x (evaluation).
    """
    if key is None or rate == 0:
        return x
    return x * dropout_mask(key, rate, x.shape, x.dtype)


def segment_bias(
    segments: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """What to add to attention scores so that a token sees only its own text.

    Args:
      segments: int [batch, length], the number of each token's text in its row; padding (0) sees
        padding, so no row is empty.
      dtype: of the scores.
      causal: whether a token sees only itself and those before it.
      window: how many places away a token sees, itself not counted; None for all.

    Returns:
      [batch, 1, length, length]: 0 within a text, else large and negative. Added, not selected:
      the derivative of a sum costs nothing.

    >>> segment_bias(jnp.array([[1, 1, 2]]), jnp.float32)[0, 0] == 0
    Array([[ True,  True, False],
           [ True,  True, False],
           [False, False,  True]], dtype=bool)
    """
    same = sees(segments, causal=causal, window=window)
    return jnp.where(same, jnp.zeros((), dtype), jnp.asarray(jnp.finfo(dtype).min / 2, dtype))


def visible(
    segments: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Seen | jax.Array:
    """What `attention` needs to keep the texts of a row apart; made once for all layers.

    Args:
      segments: int [batch, length], as in `segment_bias`.
      dtype: of the scores.
      causal, window: as in `segment_bias`, and given to `attention` as well.

    Returns:
      Segments and bias, or, where the mesh cuts length and nobody holds all of a row, the segments.
    """
    if cutting("length"):
        return segments
    return Seen(segments, segment_bias(segments, dtype, causal=causal, window=window))


def all_visible(x: jax.Array) -> Seen | jax.Array:
    """What `visible` returns where a row is one text, or one image: every token sees every other.

    Args:
      x: [batch, length, ...].

    >>> all_visible(jnp.ones((2, 5, 8))).bias.shape
    (2, 1, 1, 1)
    """
    segments = jnp.ones(x.shape[:2], jnp.int32)
    if cutting("length"):
        return segments
    return Seen(segments, jnp.zeros((x.shape[0], 1, 1, 1), x.dtype))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen | jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention among the tokens of one text (Vaswani et al. 2017, arXiv:1706.03762).

    By a kernel that stores no scores where `flash.attention_kernel` says so, of the platform that
    the program is for; else, and on every CPU, by `attend`.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, key heads, head_dim]; each serves heads / key heads neighbouring heads
        of queries (Ainslie et al. 2023, arXiv:2305.13245).
      seen: as `visible` returns it, or any bias that broadcasts to [batch, 1, length, length] where
        the mesh does not cut length; for a bias there is no kernel.
      causal, window: those that `visible` was given.
      rate, key: dropout of the attention weights.

    Returns:
      [batch, length, heads, head_dim].
    """
    if cutting("length"):
        assert not isinstance(seen, Seen)  # `visible` gives the segments there
        return ring_attention(q, k, v, seen, causal=causal, window=window, rate=rate, key=key)
    if not isinstance(seen, Seen):
        return attend(q, k, v, seen, rate, key)

    def plain(q, k, v, seen):
        return attend(q, k, v, seen.bias, rate, key)

    drops = 0.0 if key is None else rate
    return by_platform(plain, q, k, v, seen, causal=causal, window=window, rate=drops)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """`attention` on one device, of queries and keys that may differ in number.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, keys, key heads, head_dim].
      bias: added to the scores; broadcasts to [batch, 1, length, keys].
      rate, key: as in `attention`.
    """
    scale = np.asarray(1 / np.sqrt(q.shape[-1]), q.dtype)
    heads, shared = q.shape[2], q.shape[2] // k.shape[2]
    # [batch, heads, length, head_dim] in memory: dots over the last axes need no further copies.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
    if shared > 1:  # the queries of a group are rows of one product
        q = q.reshape(q.shape[0], -1, shared * q.shape[2], q.shape[3])
    scores = jnp.einsum("bhld,bhmd->bhlm", q, k)
    scores = scores.reshape(q.shape[0], heads, -1, k.shape[2]) + bias
    weights = jax.nn.softmax(widened(scores), axis=-1).astype(scores.dtype)
    weights = dropout(weights, rate, key)
    weights = weights.reshape(*q.shape[:3], k.shape[2])
    out = jnp.einsum("bhlm,bhmd->bhld", weights, v)
    return jnp.swapaxes(out.reshape(q.shape[0], heads, -1, v.shape[3]), 1, 2)


class RMSNorm(nnx.Module):
    """x / √(mean x² + epsilon) · scale over the last axis.

    Zhang & Sennrich 2019 (arXiv:1910.07467).
    """

    def __init__(self, size: int, *, epsilon: float, axes: Rows = ("embed",)):
        self.scale = nnx.Param(jnp.ones(size), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widened(x)
        square = jnp.mean(jnp.square(wide), -1, keepdims=True)
        return (wide * lax.rsqrt(square + self.epsilon)).astype(x.dtype) * self.scale[...]


def turns(size: int, theta: float) -> np.ndarray:
    """How fast each pair of a head's elements turns: theta^(-2i / size), [size / 2], float64.

    Su et al. 2021 (arXiv:2104.09864).

    >>> turns(4, 10_000.0)
    array([1.  , 0.01])
    """
    return theta ** (-np.arange(0, size, 2) / size)


def rotary(positions: jax.Array, speed: np.ndarray, dtype: jax.typing.DTypeLike):
    """The cosines and sines by which `rotate` turns, [batch, length, 1, size / 2] each.

    Args:
      positions: int [batch, length].
      speed: radians a position, [size / 2].
      dtype: of the result; angles are in float32 at least.
    """
    wide = np.promote_types(dtype, np.float32)
    angle = positions.astype(wide)[..., None, None] * np.asarray(speed, wide)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns element i of every head with element i + size / 2, as transformers stores them.

    Args:
      x: [batch, length, heads, size].
      turn: of `rotary`.

    >>> turn = rotary(jnp.array([[1]]), np.array([np.pi / 2]), jnp.float32)
    >>> rotate(jnp.array([[[[1.0, 2.0]]]]), turn).round(3)
    Array([[[[-2.,  1.]]]], dtype=float32)
    """
    cos, sin = turn
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
