"""The layers that models of images are declared with; `convolution` has the functions under them.

Batch normalisation sees a whole batch: its sums run over an axis that the mesh may cut, and the
compiler adds up what each device has. So its statistics are those of the global batch on any mesh,
and `fw.step` never cuts a batch of such a model into microbatches.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fw.errors import FwError
from fw.models.convolution import Padding, conv
from fw.models.layers import widened
from sharding import constrain

Name = str | None


def on_image(x: jax.Array, channels: Name = "embed") -> jax.Array:
    """Says what the axes of an activation [B, H, W, C] are.

    >>> on_image(jnp.ones((1, 2, 2, 3)), "mlp").shape
    (1, 2, 2, 3)
    """
    return constrain(x, "batch", "height", "width", channels)


class Conv(nnx.Module):
    """A convolution, kernel [height, width, in / groups, out].

    New kernels are normal with variance 2 / (outputs that an input goes to), which keeps the size
    of gradients through rectifiers (He et al. 2015, arXiv:1502.01852, eq. 14).
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        window: int | tuple[int, int],
        axes: tuple[Name, Name],
        *,
        rngs: nnx.Rngs,
        strides: int | tuple[int, int] = 1,
        padding: Padding | None = None,
        groups: int = 1,
        bias: bool = False,
        std: float | None = None,
    ):
        """Makes the kernel, and a bias of zeros.

        Args:
          size_in, size_out: channels.
          window: its height and width, one number for both.
          axes: the names of the kernel's channels, in and out.
          rngs: its stream `params` gives the kernel's key.
          strides: places from one window to the next, down and across.
          padding: as in `conv`; None has half a window on each side.
          groups: as in `conv`.
          bias: whether one is added.
          std: of the kernel, where it is not that of the paper.
        """
        height, width = (window, window) if isinstance(window, int) else window
        if std is None:
            std = math.sqrt(2 * groups / (height * width * size_out))
        shape = (height, width, size_in // groups, size_out)
        kernel = jax.random.normal(rngs.params(), shape) * std
        self.kernel = nnx.Param(kernel, axes=(None, None, *axes))
        self.bias = nnx.Param(jnp.zeros(size_out), axes=axes[1:]) if bias else None
        self.strides = (strides, strides) if isinstance(strides, int) else strides
        self.axes, self.groups = axes, groups
        halves = tuple((n // 2, n // 2) for n in (height, width))
        self.padding = halves if padding is None else tuple(padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        window = {"strides": self.strides, "padding": self.padding, "groups": self.groups}
        y = conv(x, kernel, **window, axes=self.axes)
        return y if self.bias is None else y + self.bias[...]


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167), as torch's BatchNorm2d has it.

    In training by the mean and variance of the batch, of which running averages are kept; these
    take their place otherwise. The running variance is the unbiased one, n / (n - 1) times the
    batch's. `count` says how many batches were seen, as torch's files do.
    """

    def __init__(
        self, size: int, axis: Name = "embed", *, momentum: float = 0.1, epsilon: float = 1e-5
    ):
        """Makes scale 1, bias 0, and averages of mean 0 and variance 1.

        Args:
          size: channels.
          axis: the name of their axis.
          momentum: the share of the new batch in a running average.
          epsilon: added to the variance.
        """
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(size), axes=(axis,))
        self.mean = nnx.BatchStat(jnp.zeros(size), axes=(axis,))
        self.var = nnx.BatchStat(jnp.ones(size), axes=(axis,))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32), axes=())
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises [..., channels]; with `train`, also moves the running averages.

        Raises:
          FwError: `train` with one number a channel, which has no variance.
        """
        scale, bias, epsilon = self.scale[...], self.bias[...], self.epsilon
        if not train:
            return normalised(x, scale, bias, self.mean[...], self.var[...], epsilon)
        count = math.prod(x.shape[:-1])
        if count < 2:
            raise FwError(
                f"batch norm: a batch of {x.shape} has one number a channel, of which there is no "
                "variance; give more images, or larger ones"
            )
        y, mean, var = batch_norm(x, scale, bias, epsilon)
        self.mean[...] = self._moved(self.mean[...], mean)
        self.var[...] = self._moved(self.var[...], var * np.asarray(count / (count - 1), var.dtype))
        self.count[...] = self.count[...] + np.int32(1)
        return y

    def _moved(self, old: jax.Array, new: jax.Array) -> jax.Array:
        share = np.asarray(self.momentum, old.dtype)
        return old * (1 - share) + lax.stop_gradient(new).astype(old.dtype) * share


def normalised(x, scale, bias, mean, var, epsilon):
    """(x - mean) / sqrt(var + epsilon) · scale + bias, statistics in float32 at least.

    >>> one = jnp.ones(1)
    >>> normalised(jnp.array([[5.0]]), 2 * one, one, 3 * one, 4 * one, 0.0)
    Array([[3.]], dtype=float32)
    """
    wide, scale, bias, mean, var = map(widened, (x, scale, bias, mean, var))
    gain = scale * lax.rsqrt(var + np.asarray(epsilon, var.dtype))
    return ((wide - mean) * gain + bias).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(x, scale, bias, epsilon):
    """`normalised` by the statistics of x itself over all axes but the last.

    The derivative is that of the first output; the statistics are for running averages.

    Args:
      x: [..., C].
      scale, bias: [C].
      epsilon: added to the variance.

    Returns:
      y like x, and mean and (biased) variance [C], in float32 at least.

    >>> y, mean, var = batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1), 0.0)
    >>> y[:, 0], mean, var
    (Array([-1.,  1.], dtype=float32), Array([2.], dtype=float32), Array([1.], dtype=float32))
    """
    return _batch_norm_fwd(x, scale, bias, epsilon)[0]


def _batch_norm_fwd(x, scale, bias, epsilon):
    rows = tuple(range(x.ndim - 1))
    wide = widened(x)
    # Around the mean: E[x²] - E[x]² has no digit left where the mean is a thousand deviations
    # away, and takes a CPU as many passes over x.
    mean = jnp.mean(wide, rows)
    var = jnp.mean(jnp.square(wide - mean), rows)
    inverse = lax.rsqrt(var + np.asarray(epsilon, var.dtype))
    y = ((wide - mean) * (inverse * widened(scale)) + widened(bias)).astype(x.dtype)
    return (y, mean, var), (x, scale, mean, inverse)


def _batch_norm_bwd(epsilon, saved, cotangents):
    # By hand: two reductions over x, and x itself is all that is kept of it.
    x, scale, mean, inverse = saved
    g = cotangents[0].astype(mean.dtype)
    rows = tuple(range(x.ndim - 1))
    unit = (x.astype(mean.dtype) - mean) * inverse
    total, along = jnp.sum(g, rows), jnp.sum(g * unit, rows)
    share = np.asarray(1 / math.prod(x.shape[:-1]), mean.dtype)
    dx = (g - total * share - unit * (along * share)) * (widened(scale) * inverse)
    return dx.astype(x.dtype), along.astype(scale.dtype), total.astype(scale.dtype)


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


def bicubic(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """An image of another size, by cubic convolution (Keys 1981) with torch's A = -0.75.

    Not by products with matrices, which a policy might round.

    Args:
      x: [H, W, C].
      size: the new H and W.

    >>> bicubic(jnp.arange(4.0).reshape(2, 2, 1), (1, 1))[0, 0]
    Array([1.5], dtype=float32)
    """
    for axis, (old, new) in enumerate(zip(x.shape, size, strict=False)):
        place = (np.arange(new) + 0.5) * (old / new) - 0.5
        first = np.floor(place).astype(int) - 1
        shape = [new if i == axis else 1 for i in range(3)]
        total = jnp.zeros((), x.dtype)
        for tap in range(4):
            weight = _cubic(np.abs(place - first - tap)).reshape(shape).astype(x.dtype)
            total += jnp.take(x, np.clip(first + tap, 0, old - 1), axis) * weight
        x = total
    return x


def _cubic(d: np.ndarray) -> np.ndarray:
    """The weight of a number at a distance from 0 to 2."""
    near = (1.25 * d - 2.25) * d * d + 1
    far = ((-0.75 * d + 3.75) * d - 6) * d + 3
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def check_images(x: jax.Array, channels: int, size: Sequence[int] | None = None) -> None:
    """Refuses a batch that is not [B, H, W, channels], with H and W of `size` where given.

    Raises:
      FwError: another shape.

    >>> check_images(jnp.ones((1, 3, 32, 32)), 3)
    Traceback (most recent call last):
    ...
    fw.errors.FwError: pixel_values: expected [batch, height, width, 3], got (1, 3, 32, 32)
    """
    wanted = ("height", "width") if size is None else tuple(size)
    if x.ndim != 4 or x.shape[3] != channels or (size and x.shape[1:3] != wanted):
        raise FwError(
            f"pixel_values: expected [batch, {wanted[0]}, {wanted[1]}, {channels}], got {x.shape}"
        )
