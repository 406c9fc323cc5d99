"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): an image is a text of patches.

And what came of it: DeiT (Touvron et al. 2020, arXiv:2012.12877) with a token that learns from a
teacher, and DINOv2 (Oquab et al. 2023, arXiv:2304.07193) with scaled sublayers, which takes images
of any size. The numbers are those of Hugging Face's classes.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models import names
from fw.models.layers import HIDDEN, Dense, LayerNorm, all_visible, dropout, gelu
from fw.models.names import Name
from fw.models.postnorm import Attention
from fw.models.stack import Stack
from fw.models.vision import Conv, bicubic, check_images
from fw.models.vit_config import DeiTConfig, Dinov2Config, Patches
from fw.taps import tap
from sharding import constrain
from sharding.noise import dropout_mask


class Layer(nnx.Module):
    """Attention and MLP of what is normalised before; each is added to its input.

    In DINOv2 what is added is scaled (Touvron et al. 2021, arXiv:2103.17239), and left out of some
    images (Huang et al. 2016, arXiv:1603.09382).
    """

    def __init__(self, config: Patches, rngs: nnx.Rngs):
        shape = config.shape
        size, inner, std = shape.size, shape.inner, shape.std
        self.norm1 = LayerNorm(size, epsilon=shape.epsilon)
        self.attention = Attention(shape, rngs, bias=config.qkv_bias)
        self.norm2 = LayerNorm(size, epsilon=shape.epsilon)
        self.up = Dense(size, inner, ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Dense(inner, size, ("mlp", "embed"), std=std, rngs=rngs)
        if config.scale is not None:
            self.scale1 = nnx.Param(jnp.full(size, config.scale), axes=("embed",))
            self.scale2 = nnx.Param(jnp.full(size, config.scale), axes=("embed",))
        self.scaled, self.rates = config.scale is not None, config.rates

    def __call__(self, x: jax.Array, seen: Any, key: jax.Array | None) -> jax.Array:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = x + self._kept(self.attention(self.norm1(x), seen, keys[0]), 1, keys[1])
        inner = constrain(gelu(self.up(self.norm2(x))), "batch", "length", "mlp")
        x = x + self._kept(self.down(inner), 2, keys[2])
        return tap(constrain(x, "batch", "length", "embed"), HIDDEN)

    def _kept(self, y: jax.Array, number: int, key: jax.Array | None) -> jax.Array:
        """What of a sublayer is added."""
        if self.scaled:
            y = y * (self.scale1 if number == 1 else self.scale2)[...]
        numbers, images = self.rates
        if key is not None and images:
            y = y * dropout_mask(key, images, (y.shape[0], 1, 1), y.dtype)
        return dropout(y, numbers, key)


class VisionTransformer(nnx.Module):
    """Patches and their places, a stack of layers, and one classifier or two."""

    def __init__(self, config: Patches, rngs: nnx.Rngs):
        self.config = config
        size, std, (down, across) = config.hidden_size, config.initializer_range, config.patch

        def table(rows: int, name: str | None) -> nnx.Param:
            normal = jax.random.normal(rngs.params(), (1, rows, size)) * std
            return nnx.Param(normal, axes=(None, name, "embed"))

        window = (down, across)
        self.patches = Conv(
            config.num_channels, size, window, (None, "embed"), strides=window,
            padding=((0, 0), (0, 0)), bias=True, std=std, rngs=rngs,
        )  # fmt: skip
        self.first = table(1, None)
        if config.tokens == 2:
            self.distilled = table(1, None)
        self.position = table(config.positions, "positions")
        if isinstance(config, Dinov2Config) and config.use_mask_token:  # of no use but in training
            self.mask = nnx.Param(jnp.zeros((1, size)), axes=(None, "embed"))
        self.stack = Stack(
            lambda rngs: Layer(config, rngs),
            config.num_hidden_layers,
            microbatches=config.microbatches,
            remat=config.remat,
            scan=config.scan,
            rngs=rngs,
        )
        self.norm = LayerNorm(size, epsilon=config.layer_norm_eps)
        both = 2 if isinstance(config, Dinov2Config) else 1
        axes, labels = ("embed", "labels"), config.num_labels
        self.classifier = Dense(both * size, labels, axes, std=std, rngs=rngs)
        if _taught(config):
            self.second = Dense(size, labels, axes, std=std, rngs=rngs)

    def __call__(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        config, x = self.config, batch["pixel_values"]
        position = self._positions(x)
        keys = (None,) * 2 if key is None else jax.random.split(key)
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        tokens = [self.first[...], self.distilled[...]] if config.tokens == 2 else [self.first[...]]
        tokens = [jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])) for token in tokens]
        x = jnp.concatenate([*tokens, x], axis=1) + position
        x = constrain(dropout(x, config.hidden_dropout_prob, keys[0]), "batch", "length", "embed")
        x = self.norm(self.stack(x, all_visible(x), key=keys[1]))
        rows = ("batch",)
        if isinstance(config, Dinov2Config):
            both = jnp.concatenate([x[:, 0], jnp.mean(x[:, 1:], 1)], axis=-1)
            return self.classifier(both, rows)
        logits = self.classifier(x[:, 0], rows)
        if _taught(config):
            logits = (logits + self.second(x[:, 1], rows)) * np.asarray(0.5, logits.dtype)
        return logits

    def _positions(self, x: jax.Array) -> jax.Array:
        """The places of an image's tokens; of another size, between those that were learnt."""
        config, position = self.config, self.position[...]
        if not isinstance(config, Dinov2Config) or x.shape[1:3] == config.image:
            check_images(x, config.num_channels, config.image)
            return position
        check_images(x, config.num_channels)
        old, new = (
            (size[0] // config.patch[0], size[1] // config.patch[1])
            for size in (config.image, x.shape[1:3])
        )
        if 0 in new:
            raise FwError(
                f"pixel_values: images of {x.shape[1]} x {x.shape[2]}; expected at least a patch, "
                f"{config.patch[0]} x {config.patch[1]}"
            )
        patches = position[0, config.tokens :].reshape(*old, -1)
        patches = bicubic(patches, new).reshape(1, -1, patches.shape[-1])
        return jnp.concatenate([position[:, : config.tokens], patches], axis=1)


def _taught(config: Patches) -> bool:
    return isinstance(config, DeiTConfig) and config.teacher


def vit(config: Patches) -> Model:
    """The model record of a ViT, DeiT or DINOv2.

    `apply` takes `pixel_values`, float32 [B, height, width, channels], and returns logits
    [B, labels].

    >>> from fw.models.vit_config import ViTConfig
    >>> config = ViTConfig(
    ...     image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     intermediate_size=16, num_labels=3)
    >>> model = vit(config)
    >>> variables = model.init(jax.random.key(0))
    >>> model.apply(variables, {"pixel_values": jnp.ones((2, 8, 8, 3))})[0].shape
    (2, 3)
    """
    build = lambda rngs: VisionTransformer(config, rngs)  # noqa: E731
    return from_nnx(config, build, lambda module, batch, key, _: module(batch, key))


def hf_names(config: Patches) -> Iterator[Name]:
    """How transformers calls the parameters."""
    prefix = config.model_type
    into = f"{prefix}.embeddings"
    yield from names.conv("patches", f"{into}.patch_embeddings.projection")
    yield Name("first", f"{into}.cls_token")
    if config.tokens == 2:
        yield Name("distilled", f"{into}.distillation_token")
    yield Name("position", f"{into}.position_embeddings")
    if isinstance(config, Dinov2Config) and config.use_mask_token:
        yield Name("mask", f"{into}.mask_token")
    for i in range(config.num_hidden_layers):
        theirs = f"{prefix}.encoder.layer.{i}"
        ours, at = names.of_layer(i, scan=config.scan)
        for name in ("query", "key", "value"):
            lin = f"{theirs}.attention.attention.{name}"
            yield from names.dense(f"{ours}/attention/{name}", lin, bias=config.qkv_bias, **at)
        yield from names.dense(f"{ours}/attention/out", f"{theirs}.attention.output.dense", **at)
        for name in ("norm1", "norm2"):
            yield from names.norm(f"{ours}/{name}", f"{theirs}.{config.paths[name]}", **at)
        for name in ("up", "down"):
            yield from names.dense(f"{ours}/{name}", f"{theirs}.{config.paths[name]}", **at)
        for number in (1, 2) if config.scale is not None else ():
            scale = f"{theirs}.layer_scale{number}.lambda1"
            yield Name(f"{ours}/scale{number}", scale, **at)
    yield from names.norm("norm", f"{prefix}.layernorm")
    yield from names.dense("classifier", "cls_classifier" if _taught(config) else "classifier")
    if _taught(config):
        yield from names.dense("second", "distillation_classifier")
