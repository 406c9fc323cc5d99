"""ResNet (He et al. 2015, arXiv:1512.03385): what a block adds to its input.

The numbers are those of Hugging Face's ResNet classes, which stride where torchvision's do: in the
3x3 convolution of a bottleneck ("v1.5").
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import jax
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models import names
from fw.models.checks import at_least, one_of
from fw.models.convolution import global_mean, max_pool
from fw.models.layers import HIDDEN, Dense
from fw.models.names import Name
from fw.models.vision import BatchNorm, Conv, check_images, on_image
from fw.taps import tap
from sharding.parallel.pipeline import REMAT

LAYERS = ("basic", "bottleneck")
STEMS = ("imagenet", "small")
REDUCTION = 4
"""How many times fewer channels the middle of a bottleneck has."""


@dataclass(frozen=True)
class ResNetConfig:
    """The fields of a ResNet `config.json` that change the computation, under their own names.

    And four of our own: `task` and `num_labels`; `stem`, which is "imagenet" (7x7 of stride 2, then
    pooling of stride 2) or "small" (3x3 of stride 1, as the paper has it for CIFAR-10); `remat`,
    with which a block is computed again on the way back, whatever of `sharding.pipeline`'s it is;
    and `inner_sizes`, of every block the channels of its convolutions but the last, where some were
    taken out: transformers knows no such model.
    """

    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    num_labels: int
    task: str = "image_classification"
    num_channels: int = 3
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    stem: str = "imagenet"
    inner_sizes: tuple[tuple[int, ...], ...] | None = None
    remat: str | None = None

    model_type: ClassVar[str] = "resnet"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        one_of(self, task=("image_classification",), layer_type=LAYERS, hidden_act=("relu",))
        one_of(self, stem=STEMS, remat=REMAT)
        at_least(self, 1, "embedding_size", "hidden_sizes", "depths", "num_channels", "num_labels")
        if not self.depths or len(self.depths) != len(self.hidden_sizes):
            raise FwError(
                f"{len(self.depths)} depths for {len(self.hidden_sizes)} hidden_sizes; expected a "
                "pair for each stage"
            )
        units = 1 if self.layer_type == "basic" else 2
        if self.inner_sizes is not None:
            each = {len(sizes) for sizes in self.inner_sizes}
            if len(self.inner_sizes) != sum(self.depths) or each != {units}:
                raise FwError(
                    f"inner_sizes {self.inner_sizes}: expected {units} for each of "
                    f"{sum(self.depths)} blocks"
                )
            return
        odd = [size for size in self.hidden_sizes if size % REDUCTION]
        if odd and self.layer_type == "bottleneck":
            raise FwError(f"hidden_sizes {odd[0]} is not a multiple of {REDUCTION}")

    def inner(self, stage: int, number: int) -> tuple[int, ...]:
        """Channels of a block's convolutions but the last.

        >>> ResNetConfig(8, (8, 16), (1, 2), num_labels=3).inner(1, 0)
        (4, 4)
        """
        if self.inner_sizes is not None:
            return self.inner_sizes[sum(self.depths[:stage]) + number]
        size = self.hidden_sizes[stage]
        return (size,) if self.layer_type == "basic" else (size // REDUCTION,) * 2

    def blocks(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Stage, number in the stage, channels in and out, and stride of every block.

        >>> config = ResNetConfig(8, (8, 16), (1, 2), num_labels=3)
        >>> list(config.blocks())
        [(0, 0, 8, 8, 1), (1, 0, 8, 16, 2), (1, 1, 16, 16, 1)]
        """
        before = self.embedding_size
        for stage, (size, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
            down = 2 if stage or self.downsample_in_first_stage else 1
            for number in range(depth):
                yield stage, number, before, size, 1 if number else down
                before = size


class Unit(nnx.Module):
    """A convolution and its norm, and a rectifier if wanted."""

    def __init__(
        self, size_in: int, size_out: int, window: int, axes: tuple[Any, Any], *,
        rngs: nnx.Rngs, strides: int = 1, out: str = "embed", rectified: bool = True,
    ):  # fmt: skip
        self.conv = Conv(size_in, size_out, window, axes, strides=strides, rngs=rngs)
        self.norm = BatchNorm(size_out, out)
        self.out, self.rectified = out, rectified

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = on_image(self.norm(self.conv(x), train), self.out)
        return jax.nn.relu(y) if self.rectified else y


class Block(nnx.Module):
    """relu(x + f(x)), f of two or three convolutions; x is projected where f changes its shape."""

    def __init__(
        self, config: ResNetConfig, size_in: int, inner: tuple[int, ...], size: int, strides: int,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        rise, fall = ("embed", "mlp"), ("mlp", "embed")
        last = {"rectified": False, "rngs": rngs}
        if config.layer_type == "basic":
            units = [
                Unit(size_in, inner[0], 3, rise, strides=strides, out="mlp", rngs=rngs),
                Unit(inner[0], size, 3, fall, **last),
            ]
        else:
            first = config.downsample_in_bottleneck
            one, two = (strides, 1) if first else (1, strides)
            units = [
                Unit(size_in, inner[0], 1, rise, strides=one, out="mlp", rngs=rngs),
                # A mesh axis cuts one side of a kernel: of mlp x mlp, that which is summed over.
                Unit(inner[0], inner[1], 3, ("mlp", None), strides=two, out="mlp", rngs=rngs),
                Unit(inner[1], size, 1, fall, **last),
            ]
        self.units = nnx.List(units)
        projected = size_in != size or strides != 1
        axes = ("embed", None)
        self.shortcut = Unit(size_in, size, 1, axes, strides=strides, **last) if projected else None

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        for unit in self.units:
            y = unit(y, train)
        x = x if self.shortcut is None else self.shortcut(x, train)
        return tap(jax.nn.relu(y + x), HIDDEN)


class ResNet(nnx.Module):
    """Stem, stages of blocks, and a classifier of the mean over the image."""

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs):
        self.config = config
        channels, size = config.num_channels, config.embedding_size
        window, strides = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.stem = Unit(channels, size, window, (None, "embed"), strides=strides, rngs=rngs)
        stages = [[] for _ in config.depths]
        for stage, number, before, after, stride in config.blocks():
            inner = config.inner(stage, number)
            stages[stage].append(Block(config, before, inner, after, stride, rngs))
        self.stages = nnx.List([nnx.List(blocks) for blocks in stages])
        last = config.hidden_sizes[-1]
        # torch's own for a linear layer is uniform up to 1 / sqrt(in): the same variance.
        std = (3 * last) ** -0.5
        self.classifier = Dense(last, config.num_labels, ("embed", "labels"), std=std, rngs=rngs)

    def __call__(self, batch: Batch, train: bool) -> jax.Array:
        x = batch["pixel_values"]
        check_images(x, self.config.num_channels)
        x = self.stem(x, train)
        if self.config.stem == "imagenet":
            x = on_image(max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))))
        again = nnx.remat(Block.__call__, static_argnums=(2,))
        for blocks in self.stages:
            for block in blocks:
                x = block(x, train) if self.config.remat is None else again(block, x, train)
        return self.classifier(global_mean(x), ("batch",))


def resnet(config: ResNetConfig) -> Model:
    """The model record of a ResNet.

    `apply` takes `pixel_values`, float32 [B, H, W, channels], and returns logits [B, labels]; in
    training, the variables that it returns have the running averages moved.

    >>> import jax.numpy as jnp
    >>> config = ResNetConfig(8, (8, 16), (1, 1), num_labels=3, layer_type="basic", stem="small")
    >>> model = resnet(config)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> batch = {"pixel_values": jnp.ones((2, 8, 8, 3))}
    >>> logits, after = jax.eval_shape(lambda *at: model.apply(*at, train=True), variables, batch)
    >>> logits.shape, after["state"] == variables["state"]
    ((2, 3), True)
    """
    build = lambda rngs: ResNet(config, rngs)  # noqa: E731
    return from_nnx(config, build, lambda module, batch, _, train: module(batch, train))


def write_config(config: ResNetConfig) -> dict[str, Any]:
    """The keys of its `config.json`, in which transformers knows no `stem` but its own.

    >>> "stem" in write_config(ResNetConfig(8, (8,), (1,), num_labels=3))
    False
    """
    found = asdict(config)
    if config.stem == "imagenet":
        del found["stem"]
    return found


def hf_names(config: ResNetConfig) -> Iterator[Name]:
    """How transformers calls the parameters."""

    def unit(ours: str, theirs: str) -> Iterator[Name]:
        yield from names.conv(f"{ours}/conv", f"{theirs}.convolution", bias=False)
        yield from names.batch_norm(f"{ours}/norm", f"{theirs}.normalization")

    yield from unit("stem", "resnet.embedder.embedder")
    count = 2 if config.layer_type == "basic" else 3
    for stage, number, before, after, stride in config.blocks():
        ours = f"stages/{stage}/{number}"
        theirs = f"resnet.encoder.stages.{stage}.layers.{number}"
        for i in range(count):
            yield from unit(f"{ours}/units/{i}", f"{theirs}.layer.{i}")
        if before != after or stride != 1:
            yield from unit(f"{ours}/shortcut", f"{theirs}.shortcut")
    yield from names.dense("classifier", "classifier.1")
