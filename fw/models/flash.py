"""Attention whose scores are never stored: whose kernel computes it, why, and the call of each.

A flash kernel (Dao et al. 2022, arXiv:2205.14135) goes through keys block by block and keeps only
what the softmax divides by. JAX brings one for TPUs, in Pallas, which skips blocks that nobody
sees, and cuDNN has NVIDIA's. `attention_kernel` says which serves where; everywhere else attention
is the plain JAX of `layers`. Compilers do not cut a kernel over a mesh: `flash` does.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from fw import precision
from sharding import current, cutting
from sharding.context import batched
from sharding.mesh import platform as platform_of

type Kernel = Literal["xla", "cudnn", "splash"]

DTYPE = "bfloat16"
"""Of the kernels' operands; their sums are in float32."""

_PLATFORMS = ("tpu", "cuda")
_BLOCKS = (512, 256, 128)
_LANES = 128

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A kernel, and why it is this one."""

    kernel: Kernel
    reason: str


class Seen(NamedTuple):
    """What keeps the texts of a row apart: for kernels, and for plain sums.

    Attributes:
      segments: int [batch, length].
      bias: [batch, 1, length, length], added to scores.
    """

    segments: jax.Array
    bias: jax.Array


def attention_kernel(
    platform: str,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    dtype: str,
    *,
    rate: float = 0.0,
    batched: bool = False,
) -> Choice:
    """Whose kernel computes an attention, and why.

    Kernels serve where scores outweigh queries, keys, values and output together: from a length of
    4 head_dim. Below, they save no memory traffic. What was chosen is logged, at level INFO, as a
    program is traced.

    Args:
      platform: "cpu", "tpu", "cuda" or "rocm".
      queries, keys: shapes [batch, length, heads, head_dim].
      dtype: of the products' operands.
      rate: of dropout of the weights.
      batched: whether a `jax.vmap` is around it.

    >>> shape = (8, 2048, 16, 128)
    >>> attention_kernel("tpu", shape, shape, "bfloat16").kernel
    'splash'
    >>> attention_kernel("tpu", shape, shape, "float32")
    Choice(kernel='xla', reason='operands are float32, a kernel takes bfloat16')
    >>> attention_kernel("tpu", shape, shape, "bfloat16", rate=0.1).reason
    'weights are dropped, which no kernel does'
    """
    why = next(_against(platform, queries, keys, dtype, rate, batched), None)
    if why is not None:
        return Choice("xla", why)
    return Choice("splash" if platform == "tpu" else "cudnn", "it serves")


def _against(platform, queries, keys, dtype, rate, batched) -> Iterator[str]:
    """Why there is no kernel; only the first reason need make sense."""
    _, length, _, size = queries
    if platform not in _PLATFORMS:
        yield f"there is no kernel for {platform}"
    if not all(isinstance(n, int) for n in (*queries, *keys)):
        yield "a size is symbolic, a kernel is made for one"
    if rate:
        yield "weights are dropped, which no kernel does"
    if dtype != DTYPE:
        yield f"operands are {dtype}, a kernel takes {DTYPE}"
    if length != keys[1]:
        yield f"{length} queries see {keys[1]} keys; expected as many"
    if length < 4 * size:
        yield f"a length of {length} is less than 4 x {size}, the size of a head: no gain"
    if platform == "tpu":
        if length % _BLOCKS[-1]:
            yield f"a length of {length} is not a multiple of {_BLOCKS[-1]}"
        if size % 64:
            yield f"a head of {size} is not a multiple of 64"
        return
    if length % 2 or size % 8 or size > 128:
        yield f"cuDNN takes even lengths and heads of 8, 16 ... 128; these are {length}, {size}"
    if batched:
        yield "JAX cannot map cuDNN's kernel over microbatches or stages"
    if not has_cudnn():
        yield "JAX finds no cuDNN in this process"


@functools.cache
def has_cudnn() -> bool:
    """Whether JAX finds a cuDNN in this process, which it asks for before it traces the kernel."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), DTYPE)
    try:
        jax.eval_shape(cudnn, x, x, x, jax.ShapeDtypeStruct((1, 1, 8, 8), np.bool_))
    except RuntimeError:  # "cuDNN is not detected", "cuDNN not found"
        return False
    return True


def by_platform(
    plain: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    *,
    causal: bool = False,
    window: int | None = None,
    rate: float = 0.0,
) -> jax.Array:
    """Attention by a kernel of the platform that the program is for, or by `plain`.

    In a scope the platform is that of the mesh, whose devices may be those of a topology that is
    not here. Outside nobody knows before the program is lowered, as for an export: it is then
    traced for each, and the one that is lowered for is kept.

    Args:
      plain: `plain(q, k, v, seen)`.
      q, k, v, seen, causal, window: as in `layers.attention`.
      rate: of the dropout that `plain` does.
    """
    here = current()
    name = here and platform_of(here[0])
    platforms = _PLATFORMS if name is None else ("cuda" if name == "gpu" else name,)
    dtype = precision.operands() or str(np.dtype(q.dtype))
    kernels = {}
    for platform in platforms:
        choice = attention_kernel(platform, q.shape, k.shape, dtype, rate=rate, batched=batched())
        log.info("%s: attention of %s by %s: %s", platform, q.shape, choice.kernel, choice.reason)
        if choice.kernel != "xla":
            options = {"causal": causal, "window": window}
            kernels[platform] = functools.partial(flash, choice.kernel, **options)
    if not kernels:
        return plain(q, k, v, seen)
    if here is not None:
        return kernels[platforms[0]](q, k, v, seen)
    return lax.platform_dependent(q, k, v, seen, **kernels, default=plain)


def flash(
    kernel: Kernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    *,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Attention by a kernel, on every device's own rows and heads.

    Args:
      kernel: "cudnn" or "splash".
      q, k, v: as in `layers.attention`; rounded to bfloat16, queries after they are scaled.
      seen, causal, window: as there.
    """
    rows, heads = cutting("batch") or None, cutting("heads") or None
    of_rows = PartitionSpec(rows)
    of_heads = PartitionSpec(rows, None, heads, None)
    run: Callable[..., jax.Array]
    if kernel == "splash":
        run = functools.partial(splash_attention, causal=causal, window=window)
        given = seen.segments
    else:
        # cuDNN knows what is causal, and skips it. It knows windows, too, but not beside a mask.
        known = causal and window is None
        run = functools.partial(cudnn, causal=known)
        given = sees(seen.segments, causal=causal and not known, window=window)
    here = current()
    if here is not None and here[0].size > 1:
        run = jax.shard_map(
            run,
            mesh=here[0],
            in_specs=(of_heads, of_heads, of_heads, of_rows),
            out_specs=of_heads,
            check_vma=False,
        )
    scale = np.asarray(1 / np.sqrt(q.shape[-1]), q.dtype)
    out = run((q * scale).astype(DTYPE), k.astype(DTYPE), v.astype(DTYPE), given)
    return out.astype(q.dtype)


def sees(segments: jax.Array, *, causal: bool = False, window: int | None = None) -> jax.Array:
    """Which token sees which: bool [batch, 1, length, length]; arguments as in `segment_bias`.

    >>> sees(jnp.array([[1, 1, 2]]), causal=True)[0, 0]
    Array([[ True, False, False],
           [ True,  True, False],
           [False, False,  True]], dtype=bool)
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    place = jnp.arange(segments.shape[1], dtype=jnp.int32)
    if causal:
        same &= place[:, None] >= place
    if window is not None:
        same &= abs(place[:, None] - place) <= window
    return same


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q kᵀ) v by JAX's Pallas kernel for TPUs; `interpret` runs it anywhere, slowly.

    Args:
      q, k, v: as in `layers.attention`, with a length that is a multiple of 128.
      segments: int [batch, length].
      causal, window: as in `layers.attention`.
    """
    # Half a second that whoever uses no TPU need not wait.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, size = q.shape
    shape = (length, length)
    if window is not None:
        mask: Any = masks.LocalMask(shape, (window, 0 if causal else window), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    block = next(b for b in _BLOCKS if length % b == 0)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    options: Any = {f"block_{size}": block for size in sizes}
    if size % _LANES:  # a head of fewer would be padded to 128 lanes: tokens go along them
        layouts = ("q_layout", "k_layout", "v_layout")
        options |= dict.fromkeys(layouts, splash.QKVLayout.SEQ_MINOR)
    kernel: Any = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**options),
        interpret=interpret,
    )

    def row(q, k, v, segments):
        return kernel(q, k, v, splash.SegmentIds(segments, segments))

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    with jax.named_scope(f"sees_{_seen(length // block, block, causal, window):.3f}"):
        return jnp.swapaxes(jax.vmap(row)(q, k, v, segments), 1, 2)


def _seen(blocks: int, block: int, causal: bool, window: int | None) -> float:
    """The share of pairs of blocks that a kernel does not skip; whoever times it reads it.

    >>> _seen(4, 512, True, None), _seen(4, 512, False, None)
    (0.625, 1.0)
    """
    reach = blocks if window is None else -(-window // block)
    pairs = ((i, j) for i in range(blocks) for j in range(blocks) if not (causal and j > i))
    return sum(abs(i - j) <= reach for i, j in pairs) / blocks**2


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, causal: bool = False
) -> jax.Array:
    """softmax(q kᵀ) v by cuDNN's kernel.

    Args:
      q, k, v: as in `layers.attention`.
      seen: bool [batch, 1, length, length], of which JAX makes a bias in bfloat16. cuDNN knows of
        packed texts without one, but only if told how many a row can hold.
      causal: whether a token sees only itself and those before it, besides.
    """
    return jax.nn.dot_product_attention(
        q, k, v, mask=seen, is_causal=causal, scale=1.0, implementation="cudnn"
    )
