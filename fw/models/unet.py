"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597): a label for every pixel.

Images are halved and their channels doubled on the way down; on the way up, each level joins what
it had on the way down to what comes from below. Convolutions are padded, so that the answer has the
size of the image, and normalised by the batch (the paper has neither). Nothing in it sees a whole
image: where the mesh cuts height, devices exchange the rows at the edges of their parts.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models.checks import at_least, one_of, rates
from fw.models.convolution import max_pool
from fw.models.layers import dropout
from fw.models.vision import BatchNorm, Conv, check_images, on_image
from sharding import linear

NORMS = ("batch", "none")


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is made from.

    Attributes:
      num_labels: classes of a pixel.
      num_channels: of an image.
      width: channels of the highest level; each one below has twice as many.
      depth: how often images are halved. Their height and width are multiples of 2^depth.
      norm: "batch", or "none": then convolutions have biases.
      dropout: of the two lowest levels, where the paper has it.
      channels: of every level from the highest, where some were taken out: those of its two
        convolutions on the way down; and but for the lowest, of the rise to it and its two on the
        way up.
      task: "segmentation".
    """

    num_labels: int
    num_channels: int = 1
    width: int = 64
    depth: int = 4
    norm: str = "batch"
    dropout: float = 0.0
    channels: tuple[tuple[int, ...], ...] | None = None
    task: str = "segmentation"

    model_type: ClassVar[str] = "unet"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        one_of(self, norm=NORMS, task=("segmentation",))
        at_least(self, 1, "num_labels", "num_channels", "width", "depth")
        rates(self, "dropout")
        if self.channels is not None and [len(c) for c in self.channels] != [5] * self.depth + [2]:
            raise FwError(
                f"channels {self.channels}: expected 5 numbers for each of {self.depth} levels, "
                "and 2 for the lowest"
            )

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """What `channels` says, or the paper.

        >>> UNetConfig(num_labels=2, width=4, depth=1).levels
        ((4, 4, 4, 4, 4), (8, 8))
        """
        if self.channels is not None:
            return self.channels
        sizes = [self.width * 2**level for level in range(self.depth + 1)]
        return (*((size,) * 5 for size in sizes[:-1]), (sizes[-1],) * 2)

    @property
    def multiple(self) -> int:
        """Height and width of images are multiples of this."""
        return 2**self.depth

    @property
    def reach(self) -> int:
        """How many pixels away an output sees, at most: the radius of its receptive field.

        Two 3x3 convolutions a level reach 2 of its pixels, on the way down and again on the way up;
        at the bottom, once. A window of 2x2 is shared by its pixels: up to one more, of each level.
        """
        return sum(5 * 2**level for level in range(self.depth)) + 2 * 2**self.depth


class Block(nnx.Module):
    """Two 3x3 convolutions, each normalised and rectified."""

    def __init__(
        self, config: UNetConfig, size_in: int, sizes: tuple[int, ...], first: Any, rngs: nnx.Rngs
    ):
        normed = config.norm == "batch"
        options = {"bias": not normed, "rngs": rngs}
        self.convs = nnx.List(
            [
                Conv(size_in, sizes[0], 3, (first, "mlp"), **options),
                Conv(sizes[0], sizes[1], 3, ("mlp", "embed"), **options),
            ]
        )
        norms = zip(sizes, ("mlp", "embed"), strict=True)
        self.norms = nnx.List([BatchNorm(size, name) for size, name in norms if normed])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, (conv, name) in enumerate(zip(self.convs, ("mlp", "embed"), strict=True)):
            x = conv(x)
            if self.norms:
                x = self.norms[i](x, train)
            x = on_image(jax.nn.relu(x), name)
        return x


class Rise(nnx.Module):
    """A transposed convolution, 2x2 with stride 2: each pixel becomes a square of four.

    Squares do not overlap: four dense layers of one input, and nothing from a neighbour. The kernel
    is [row, column, in, out].
    """

    def __init__(self, size_in: int, size_out: int, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (2, 2, size_in, size_out)) * size_in**-0.5
        self.kernel = nnx.Param(kernel, axes=(None, None, "embed", None))
        self.bias = nnx.Param(jnp.zeros(size_out), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, _ = x.shape
        kernel = self.kernel[...]
        places = [kernel[row, column] for row in range(2) for column in range(2)]
        ys = linear(x, places, ("embed", None), rows=("batch", "height", "width"))
        pairs = [jnp.stack(ys[i : i + 2], 3) for i in (0, 2)]  # [B, H, W, column, out] of each row
        y = jnp.stack(pairs, 2).reshape(B, 2 * H, 2 * W, -1)
        return on_image(y + self.bias[...])


class UNet(nnx.Module):
    """Blocks down, one at the bottom, and blocks up; then a label for each pixel."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        levels = config.levels
        befores = [config.num_channels, *(level[1] for level in levels[:-1])]
        self.downs = nnx.List(
            [
                Block(config, before, level[:2], "embed" if number else None, rngs)
                for number, (before, level) in enumerate(zip(befores, levels, strict=True))
            ]
        )
        below = [level[-1] for level in levels[1:]]
        self.rises = nnx.List(
            [Rise(size, level[2], rngs) for size, level in zip(below, levels[:-1], strict=True)]
        )
        self.ups = nnx.List(
            [Block(config, level[1] + level[2], level[3:], "embed", rngs) for level in levels[:-1]]
        )
        self.classifier = Conv(
            levels[0][-1], config.num_labels, 1, ("embed", "labels"), bias=True, rngs=rngs
        )

    def __call__(self, batch: Batch, key: jax.Array | None, train: bool) -> jax.Array:
        config, x = self.config, batch["pixel_values"]
        check_images(x, config.num_channels)
        if any(size % config.multiple for size in x.shape[1:3]):
            raise FwError(
                f"pixel_values: images of {x.shape[1]} x {x.shape[2]}; a U-Net of depth "
                f"{config.depth} halves them as often: expected multiples of {config.multiple}"
            )
        keys = (None, None) if key is None else jax.random.split(key)
        x, kept = on_image(x, None), []
        for level, down in enumerate(self.downs):
            if level:
                kept.append(x)
                x = on_image(max_pool(x, (2, 2)))
            x = down(x, train)
            if config.depth - level < 2:
                x = dropout(x, config.dropout, keys[config.depth - level])
        for beside, rise, up in reversed(list(zip(kept, self.rises, self.ups, strict=True))):
            x = up(on_image(jnp.concatenate([beside, rise(x)], 3)), train)
        return on_image(self.classifier(x), "labels")


def unet(config: UNetConfig) -> Model:
    """The model record of a U-Net.

    `apply` takes `pixel_values`, float32 [B, H, W, channels], and returns logits [B, H, W, labels];
    in training, the variables that it returns have the running averages moved.

    >>> model = unet(UNetConfig(num_labels=2, width=4, depth=2))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, {"pixel_values": jnp.ones((1, 8, 16, 1))})[0].shape
    (1, 8, 16, 2)
    """
    return from_nnx(
        config,
        lambda rngs: UNet(config, rngs),
        lambda module, batch, key, train: module(batch, key, train),
    )
