"""Attention whose scores are never stored: whose kernel computes it, and the call of each.

A flash kernel (Dao et al. 2022, arXiv:2205.14135) goes through keys block by block and keeps only
what the softmax divides by. TPUs have JAX's Pallas kernel, which skips blocks that nobody sees;
NVIDIA's GPUs have cuDNN's. `kernel_for` says where each serves; elsewhere, and on CPUs, `attention`
in `layers` is plain JAX. Compilers do not cut kernels over a mesh, so that is written out here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from fw import precision
from sharding import current, cutting

type Kernel = Literal["xla", "cudnn", "splash"]

DTYPE = "bfloat16"
"""Of the kernels' operands; their sums are in float32."""

_BLOCKS = (512, 256, 128)


class Seen(NamedTuple):
    """What keeps the texts of a row apart: for kernels, and for plain sums.

    Attributes:
      segments: int [batch, length].
      bias: [batch, 1, length, length], added to scores.
    """

    segments: jax.Array
    bias: jax.Array


def kernel_for(
    platform: str,
    queries: tuple[Any, ...],
    keys: tuple[Any, ...],
    dtype: str,
    *,
    rate: float = 0.0,
    cudnn: bool = True,
) -> Kernel:
    """Whose kernel computes an attention.

    A kernel serves where scores outweigh queries, keys, values and output together: a length of 4
    head_dim or more. Below, it saves no memory traffic.

    Args:
      platform: "cpu", "tpu", "cuda", "rocm".
      queries, keys: shapes [batch, length, heads, head_dim].
      dtype: of the products' operands.
      rate: of dropout of the weights; the kernels have none.
      cudnn: whether there is a cuDNN.

    >>> shape = (8, 2048, 16, 128)
    >>> [kernel_for(p, shape, shape, "bfloat16") for p in ("cpu", "tpu", "cuda")]
    ['xla', 'splash', 'cudnn']
    >>> kernel_for("tpu", shape, shape, "float32"), kernel_for("tpu", shape, shape, DTYPE, rate=0.1)
    ('xla', 'xla')
    """
    length, size = queries[1], queries[3]
    # For a symbolic size, of an export, no kernel can be made.
    known = all(isinstance(n, int) for n in queries) and length == keys[1]
    if not known or rate or dtype != DTYPE or length < 4 * size:
        return "xla"
    if platform == "tpu" and length % _BLOCKS[-1] == 0:
        return "splash"
    # cuDNN's own limits, for GPUs before Hopper as well.
    if platform == "cuda" and cudnn and size % 8 == 0 and size <= 128 and length % 2 == 0:
        return "cudnn"
    return "xla"


def operands(dtype: Any) -> str:
    """The dtype of an attention's operands, under the precision policy that is being applied."""
    return precision.operands() or str(np.dtype(dtype))


@functools.cache
def has_cudnn() -> bool:
    """Whether JAX finds a cuDNN in this process, which it asks for before it traces the kernel."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), DTYPE)
    try:
        jax.eval_shape(cudnn, x, x, x, jax.ShapeDtypeStruct((1, 1, 8, 8), np.float32))
    except RuntimeError:  # "cuDNN is not detected", "cuDNN not found"
        return False
    return True


def platform() -> str | None:
    """What the scope's mesh is made of; None outside, where nobody knows before the compiler.

    >>> platform() is None
    True
    """
    here = current()
    if here is None:
        return None
    name = here[0].devices.flat[0].platform
    return "cuda" if name == "gpu" and has_cudnn() else name


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
      q, k, v: as in `attention`, with a length that is a multiple of 128.
      segments: int [batch, length].
      causal, window: as in `attention`.
    """
    length, heads = q.shape[1], q.shape[2]
    shape = (length, length)
    if window is not None:
        mask: Any = masks.LocalMask(shape, (window, 0 if causal else window), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    block = next(b for b in _BLOCKS if length % b == 0)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{size}": block for size in sizes}
    kernel: Any = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**blocks),
        interpret=interpret,
    )

    def row(q, k, v, segments):
        return kernel(q, k, v, splash.SegmentIds(segments, segments))

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(row)(q, k, v, segments), 1, 2)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """softmax(q kᵀ + bias) v by cuDNN's kernel; the bias is [batch, 1, length, length].

    What is causal, windowed and of another text is all in the bias. cuDNN knows of packed texts,
    too, but only if told how many a row can hold.
    """
    seen = bias > jnp.finfo(bias.dtype).min / 4  # a mask, unlike a bias, asks for no gradient
    return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=1.0, implementation="cudnn")


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
      q, k, v: as in `attention`; rounded to bfloat16, queries after they are scaled.
      seen, causal, window: as in `attention`.
    """

    def parts(q, k, v, segments, bias) -> jax.Array:
        if kernel == "cudnn":
            return cudnn(q, k, v, bias)
        return splash_attention(q, k, v, segments, causal=causal, window=window)

    rows, heads = cutting("batch") or None, cutting("heads") or None
    run: Callable[..., jax.Array] = parts
    here = current()
    if here is not None and math.prod(here[0].shape.values()) > 1:
        of_heads = PartitionSpec(rows, None, heads, None)
        run = jax.shard_map(
            parts,
            mesh=here[0],
            in_specs=(of_heads, of_heads, of_heads, PartitionSpec(rows), PartitionSpec(rows)),
            out_specs=of_heads,
            check_vma=False,
        )
    scale = np.asarray(1 / np.sqrt(q.shape[-1]), q.dtype)
    small = (x.astype(DTYPE) for x in (q * scale, k, v))
    return run(*small, seen.segments, seen.bias).astype(q.dtype)
