"""EfficientNet-Lite: EfficientNet (Tan & Le 2019, arXiv:1905.11946) for small devices.

No squeeze-and-excitation, ReLU6 for swish; stem and head are not scaled. The numbers and names are
those of the package efficientnet-lite-pytorch, whose padding is TensorFlow's, computed for images
of the size that the model was made for.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models import names
from fw.models.checks import at_least, one_of, rates
from fw.models.convolution import Padding, global_mean
from fw.models.layers import Dense, dropout
from fw.models.names import Name
from fw.models.vision import BatchNorm, Conv, check_images, on_image
from sharding.noise import dropout_mask

STAGES = (
    # window, stride, times wider inside, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM, HEAD, DIVISOR = 32, 1280, 8

LITE = (
    {"width": 1.0, "depth": 1.0, "image_size": 224, "dropout": 0.2},
    {"width": 1.0, "depth": 1.1, "image_size": 240, "dropout": 0.2},
    {"width": 1.1, "depth": 1.2, "image_size": 260, "dropout": 0.3},
    {"width": 1.2, "depth": 1.4, "image_size": 280, "dropout": 0.3},
    {"width": 1.4, "depth": 1.8, "image_size": 300, "dropout": 0.3},
)
"""The numbers of Lite0 to Lite4."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the red, green and blue from 0 to 1 by which the package normalises images."""


@dataclass(frozen=True)
class EfficientNetConfig:
    """The numbers of an EfficientNet-Lite.

    Attributes:
      num_labels: classes.
      task: "image_classification".
      width, depth: times that the smallest one's channels and blocks are taken.
      image_size: height and width of the images that the padding is for.
      num_channels: of an image.
      dropout: before the classifier.
      drop_path: how often the last block is left out of an image; earlier ones are less often.
      momentum, epsilon: of the batch norms.
    """

    num_labels: int
    task: str = "image_classification"
    width: float = 1.0
    depth: float = 1.0
    image_size: int = field(default=224, metadata={"unbounded": True})
    num_channels: int = 3
    dropout: float = 0.2
    drop_path: float = 0.2
    momentum: float = 0.01
    epsilon: float = 1e-3

    model_type: ClassVar[str] = "efficientnet_lite"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        one_of(self, task=("image_classification",))
        at_least(self, 1, "num_labels", "image_size", "num_channels")
        rates(self, "dropout", "drop_path")
        for name in ("width", "depth"):
            if not 0 < getattr(self, name) <= MOST_TIMES:
                raise FwError(
                    f"{name} {getattr(self, name)}: expected more than 0, to {MOST_TIMES}"
                )

    def channels(self, count: int) -> int:
        """Scaled channels: a multiple of 8, at least nine tenths of the exact number.

        >>> [EfficientNetConfig(10, width=w).channels(40) for w in (1.0, 1.1, 1.4)]
        [40, 48, 56]
        """
        exact = count * self.width
        found = max(DIVISOR, int(exact + DIVISOR / 2) // DIVISOR * DIVISOR)
        return found if found >= 0.9 * exact else found + DIVISOR

    def blocks(self) -> Iterator["Shape"]:
        """The shapes of all blocks; the first and the last stage have one each at any depth."""
        before, size = STEM, math.ceil(self.image_size / 2)
        for number, (window, stride, times, channels, count) in enumerate(STAGES):
            ends = number in (0, len(STAGES) - 1)
            for i in range(count if ends else math.ceil(count * self.depth)):
                step, after = stride if i == 0 else 1, self.channels(channels)
                yield Shape(window, step, times, before, after, same(size, window, step))
                before, size = after, math.ceil(size / step)


MOST_TIMES = 16
"""Of width and depth: the largest EfficientNet has 5.3."""


class Shape(NamedTuple):
    """A block: its window, stride, times wider inside, channels in and out, and padding."""

    window: int
    stride: int
    times: int
    before: int
    after: int
    padding: Padding


def same(size: int, window: int, stride: int) -> Padding:
    """TensorFlow's padding, which may be one more behind than before: size / stride places.

    >>> same(224, 3, 2), same(112, 3, 1)
    (((0, 1), (0, 1)), ((1, 1), (1, 1)))
    """
    whole = max((math.ceil(size / stride) - 1) * stride + window - size, 0)
    return ((whole // 2, whole - whole // 2),) * 2


class Unit(nnx.Module):
    """A convolution and its norm."""

    def __init__(
        self, config: EfficientNetConfig, *sizes: Any, out: str, rngs: nnx.Rngs, **how: Any
    ):
        self.conv = Conv(*sizes, rngs=rngs, **how)
        self.norm = BatchNorm(sizes[1], out, momentum=config.momentum, epsilon=config.epsilon)
        self.out = out

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return on_image(self.norm(self.conv(x), train), self.out)


class Block(nnx.Module):
    """Wider, over the image channel by channel, narrower; added to its input if that fits."""

    def __init__(self, config: EfficientNetConfig, shape: Shape, rate: float, rngs: nnx.Rngs):
        inner, how = shape.before * shape.times, {"rngs": rngs}
        rise, fall = ("embed", "mlp"), ("mlp", "embed")
        if shape.times > 1:
            self.expand = Unit(config, shape.before, inner, 1, rise, out="mlp", **how)
        self.depthwise = Unit(
            config, inner, inner, shape.window, (None, "mlp"), out="mlp", strides=shape.stride,
            padding=shape.padding, groups=inner, **how,
        )  # fmt: skip
        self.project = Unit(config, inner, shape.after, 1, fall, out="embed", **how)
        self.wide, self.rate = shape.times > 1, rate
        self.added = shape.stride == 1 and shape.before == shape.after

    def __call__(self, x: jax.Array, key: jax.Array | None, train: bool) -> jax.Array:
        y = jax.nn.relu6(self.expand(x, train)) if self.wide else on_image(x, "mlp")
        y = self.project(jax.nn.relu6(self.depthwise(y, train)), train)
        if not self.added:
            return y
        if key is not None and self.rate:  # Huang et al. 2016, arXiv:1603.09382
            y = y * dropout_mask(key, self.rate, (y.shape[0], 1, 1, 1), y.dtype)
        return x + y


class EfficientNet(nnx.Module):
    """Stem, blocks, head, and a classifier of the mean over the image."""

    def __init__(self, config: EfficientNetConfig, rngs: nnx.Rngs):
        self.config = config
        shapes = list(config.blocks())
        how = {"strides": 2, "padding": same(config.image_size, 3, 2), "rngs": rngs}
        self.stem = Unit(config, config.num_channels, STEM, 3, (None, "embed"), out="embed", **how)
        rates = [config.drop_path * i / len(shapes) for i in range(len(shapes))]
        self.blocks = nnx.List(
            [Block(config, shape, rate, rngs) for shape, rate in zip(shapes, rates, strict=True)]
        )
        last = shapes[-1].after
        self.head = Unit(config, last, HEAD, 1, ("embed", "mlp"), out="mlp", rngs=rngs)
        # As the paper's code draws it: uniform up to 1 / sqrt(labels), by its variance.
        std, axes = (3 * config.num_labels) ** -0.5, ("mlp", "labels")
        self.classifier = Dense(HEAD, config.num_labels, axes, std=std, rngs=rngs)

    def __call__(self, batch: Batch, key: jax.Array | None, train: bool) -> jax.Array:
        count = len(self.blocks)
        keys = (None,) * (count + 1) if key is None else jax.random.split(key, count + 1)
        x = batch["pixel_values"]
        check_images(x, self.config.num_channels)
        x = jax.nn.relu6(self.stem(x, train))
        for block, own in zip(self.blocks, keys[:-1], strict=True):
            x = block(x, own, train)
        x = global_mean(jax.nn.relu6(self.head(x, train)))
        return self.classifier(dropout(x, self.config.dropout, keys[-1]), ("batch",))


def efficientnet(config: EfficientNetConfig) -> Model:
    """The model record of an EfficientNet-Lite.

    `apply` takes `pixel_values`, float32 [B, H, W, channels], and returns logits [B, labels]; in
    training, the variables that it returns have the running averages moved.

    >>> model = efficientnet(EfficientNetConfig(10, **LITE[0]))
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0))
    >>> sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    3383818
    """
    build = lambda rngs: EfficientNet(config, rngs)  # noqa: E731
    return from_nnx(config, build, lambda module, batch, key, train: module(batch, key, train))


def torch_names(config: EfficientNetConfig) -> Iterator[Name]:
    """How the package calls the parameters."""

    def unit(ours: str, conv: str, norm: str) -> Iterator[Name]:
        yield from names.conv(f"{ours}/conv", conv, bias=False)
        yield from names.batch_norm(f"{ours}/norm", norm)

    yield from unit("stem", "_conv_stem", "_bn0")
    for i, shape in enumerate(config.blocks()):
        ours, theirs = f"blocks/{i}", f"_blocks.{i}"
        if shape.times > 1:
            yield from unit(f"{ours}/expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        yield from unit(f"{ours}/depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        yield from unit(f"{ours}/project", f"{theirs}._project_conv", f"{theirs}._bn2")
    yield from unit("head", "_conv_head", "_bn1")
    yield from names.dense("classifier", "_fc")


def described(shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    """The `config.json` of a state dict, by its tensors' shapes; labels are unnamed.

    Raises:
      FwError: it is no EfficientNet-Lite.
    """
    (labels,) = found if len(found := shapes.get("_fc.bias", ())) == 1 else (1,)
    for numbers in LITE:
        config = EfficientNetConfig(labels, **numbers)
        last = len(list(config.blocks())) - 1
        there = {name.split(".")[1] for name in shapes if name.startswith("_blocks.")}
        if there == set(map(str, range(last + 1))) and shapes.get("_conv_head.weight") == (
            HEAD, config.channels(STAGES[-1][3]), 1, 1,
        ):  # fmt: skip
            return {
                "model_type": EfficientNetConfig.model_type,
                "architectures": ["EfficientNet"],
                "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
                **numbers,
            }
    raise FwError(
        f"{file}: its tensors are not those of an EfficientNet-Lite, the one family that is read "
        "from .pth; convert it to a folder with safetensors"
    )
