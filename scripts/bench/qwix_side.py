"""Qwix beside fw's own compression: a plain Flax model, in float32 and in int8, of the same folder.

    .venv/bin/python scripts/bench/qwix_side.py --model DIR --task ner --data wnut17/

The models are written as Flax's own layers suggest, for Qwix finds a weight by the layer that holds
it, and replaces it there; fw's, whose layers are functions' arguments, it would quantise anew at
every call. `qwix` is its post-training quantisation of linear layers and convolutions: int8 weights
per channel, int8 activations with a scale for each row (of images for each image), found as they
come. Attention's own products, norms and embeddings stay float32.

It needs qwix beside what .venv has. Options and what is printed are `peer_compress.py`'s.
"""
# pyright: reportMissingImports=false
# (qwix is in no lock)

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peer_turns
from peer_inputs import Batch
from peer_turns import Side

SIDES = ("flax", "qwix")
PACKAGES = ("jax", "flax", "qwix")
OPS = ("dot_general", "conv_general_dilated")
"""What is quantised; attention's products are einsums."""

Tensors = Mapping[str, Any]  # arrays of JAX, by the names of transformers


def main() -> None:
    peer_turns.main(__doc__ or "", SIDES, lambda _: None, load, PACKAGES)


def load(options: argparse.Namespace, side: str) -> Side:
    """Opens a side; XLA takes a thread for each core that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import jax
    import safetensors.numpy
    from flax import nnx

    path = options.model / "model.safetensors"
    source = json.loads((options.model / "config.json").read_text())
    tensors = jax.device_put(safetensors.numpy.load_file(path))
    make = {"images": resnet, "lm": llama}.get(options.task, bert)
    model, how = make(source, tensors, options.task), "float32"
    if side == "qwix":
        model, how = quantized(model, options), "PTQ, int8 per channel, scales of rows as they come"
        path = options.work / "qwix.safetensors"
    graph, state = nnx.split(model)
    if side == "qwix":
        save(path, state)
    answer = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))

    def predict(batch: Batch) -> np.ndarray:
        return np.asarray(answer(state, given(batch)))

    return Side(predict, path.stat().st_size, how)


def given(batch: Batch) -> Any:
    """A batch as JAX takes it: int32, and channels last."""
    import jax

    return jax.device_put(
        {
            name: x.transpose(0, 2, 3, 1) if name == "pixel_values" else x.astype(np.int32)
            for name, x in batch.items()
        }
    )


def quantized(model: Any, options: argparse.Namespace) -> Any:
    """The model with int8 in place of its kernels."""
    import peer_inputs
    import qwix

    rule = qwix.QuantizationRule(op_names=OPS, weight_qtype="int8", act_qtype="int8")
    batch = given(peer_inputs.timed(options))
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), batch)


def save(path: Path, state: Any) -> None:
    """Writes every array of a state, to be weighed."""
    import jax
    import safetensors.numpy

    named = {
        jax.tree_util.keystr(where, simple=True, separator="."): np.ascontiguousarray(leaf)
        for where, leaf in jax.tree.leaves_with_path(state)
    }
    safetensors.numpy.save_file(named, path)


# Layers with the parameters of a folder.


def linear(tensors: Tensors, name: str) -> Any:
    from flax import nnx

    weight, bias = tensors[f"{name}.weight"].T, tensors.get(f"{name}.bias")
    layer = nnx.Linear(*weight.shape, use_bias=bias is not None, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(weight)
    if bias is not None:
        layer.bias = nnx.Param(bias)
    return layer


def embedding(tensors: Tensors, name: str) -> Any:
    from flax import nnx

    table = tensors[f"{name}.weight"]
    layer = nnx.Embed(*table.shape, rngs=nnx.Rngs(0))
    layer.embedding = nnx.Param(table)
    return layer


def layer_norm(tensors: Tensors, name: str, epsilon: float) -> Any:
    from flax import nnx

    scale, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    layer = nnx.LayerNorm(len(scale), epsilon=epsilon, rngs=nnx.Rngs(0))
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(bias)
    return layer


def conv_norm(tensors: Tensors, name: str, stride: int = 1) -> Any:
    """A convolution and its batch norm, of running averages."""
    from flax import nnx

    kernel = tensors[f"{name}.convolution.weight"].transpose(2, 3, 1, 0)
    window, _, size_in, size_out = kernel.shape
    conv = nnx.Conv(
        size_in, size_out, (window, window), strides=stride, padding=window // 2,
        use_bias=False, rngs=nnx.Rngs(0),
    )  # fmt: skip
    conv.kernel = nnx.Param(kernel)
    norm = nnx.BatchNorm(size_out, use_running_average=True, epsilon=1e-5, rngs=nnx.Rngs(0))
    of = f"{name}.normalization"
    norm.scale, norm.bias = (nnx.Param(tensors[f"{of}.{what}"]) for what in ("weight", "bias"))
    means, variances = (tensors[f"{of}.running_{what}"] for what in ("mean", "var"))
    norm.mean, norm.var = nnx.BatchStat(means), nnx.BatchStat(variances)
    return nnx.Sequential(conv, norm)


# Models.


def bert(source: Mapping[str, Any], tensors: Tensors, task: str) -> Any:
    """BERT for `ner` or `classify`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    epsilon, heads = source["layer_norm_eps"], source["num_attention_heads"]

    class Layer(nnx.Module):
        def __init__(self, name: str):
            inner = f"{name}.attention"
            self.query, self.key, self.value = (
                linear(tensors, f"{inner}.self.{what}") for what in ("query", "key", "value")
            )
            self.out = linear(tensors, f"{inner}.output.dense")
            self.attention_norm = layer_norm(tensors, f"{inner}.output.LayerNorm", epsilon)
            self.up = linear(tensors, f"{name}.intermediate.dense")
            self.down = linear(tensors, f"{name}.output.dense")
            self.norm = layer_norm(tensors, f"{name}.output.LayerNorm", epsilon)

        def __call__(self, x, bias):
            split = (*x.shape[:2], heads, x.shape[-1] // heads)
            q, k, v = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * split[-1] ** -0.5 + bias
            mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
            x = self.attention_norm(x + self.out(mixed.reshape(x.shape)))
            return self.norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))

    class Bert(nnx.Module):
        def __init__(self):
            name = "bert.embeddings"
            self.words = embedding(tensors, f"{name}.word_embeddings")
            self.places = embedding(tensors, f"{name}.position_embeddings")
            self.types = embedding(tensors, f"{name}.token_type_embeddings")
            self.norm = layer_norm(tensors, f"{name}.LayerNorm", epsilon)
            layers = range(source["num_hidden_layers"])
            self.layers = nnx.List([Layer(f"bert.encoder.layer.{i}") for i in layers])
            if task == "classify":
                self.pooler = linear(tensors, "bert.pooler.dense")
            self.classifier = linear(tensors, "classifier")

        def __call__(self, batch):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            places = jnp.arange(ids.shape[1])
            x = self.words(ids) + self.places(places) + self.types(jnp.zeros_like(ids))
            x = self.norm(x)
            bias = jnp.where(mask[:, None, None] == 1, 0.0, -1e9)
            for layer in self.layers:
                x = layer(x, bias)
            return self.classifier(x if task == "ner" else jnp.tanh(self.pooler(x[:, 0])))

    return Bert()


def llama(source: Mapping[str, Any], tensors: Tensors, task: str) -> Any:
    """A Llama whose table gives the scores, too; the loss of each next token."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    heads, groups = source["num_attention_heads"], source["num_key_value_heads"]
    size, epsilon = source["head_dim"], source["rms_norm_eps"]
    usual = source.get("rope_parameters", {}).get("rope_type") == "default"
    if source["model_type"] != "llama" or not source["tie_word_embeddings"] or not usual:
        raise SystemExit("qwix_side: expected a Llama that fw.save wrote, with one table")
    rates = source["rope_parameters"]["rope_theta"] ** (-jnp.arange(0, size, 2) / size)

    def turned(x):
        angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None]
        a, b = jnp.split(x, 2, -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def norm(name: str) -> Any:
        scale = tensors[f"{name}.weight"]
        layer = nnx.RMSNorm(len(scale), epsilon=epsilon, rngs=nnx.Rngs(0))
        layer.scale = nnx.Param(scale)
        return layer

    class Layer(nnx.Module):
        def __init__(self, name: str):
            self.query, self.key, self.value, self.out = (
                linear(tensors, f"{name}.self_attn.{what}_proj") for what in "qkvo"
            )
            self.gate, self.up, self.down = (
                linear(tensors, f"{name}.mlp.{what}_proj") for what in ("gate", "up", "down")
            )
            self.before = norm(f"{name}.input_layernorm")
            self.between = norm(f"{name}.post_attention_layernorm")

        def __call__(self, x, bias):
            y = self.before(x)
            q, k, v = (
                layer(y).reshape(*x.shape[:2], -1, size)
                for layer in (self.query, self.key, self.value)
            )
            q, k = turned(q), turned(k)
            k, v = (jnp.repeat(part, heads // groups, 2) for part in (k, v))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * size**-0.5 + bias
            mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
            x = x + self.out(mixed.reshape(*x.shape[:2], -1))
            y = self.between(x)
            return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))

    class Llama(nnx.Module):
        def __init__(self):
            self.words = embedding(tensors, "model.embed_tokens")
            layers = range(source["num_hidden_layers"])
            self.layers = nnx.List([Layer(f"model.layers.{i}") for i in layers])
            self.norm = norm("model.norm")

        def __call__(self, batch):
            ids = batch["input_ids"]
            ahead = jnp.triu(jnp.ones((ids.shape[1],) * 2, bool), 1)
            bias = jnp.where(ahead, -1e9, 0.0)
            x = self.words(ids)
            for layer in self.layers:
                x = layer(x, bias)
            scores = self.words.attend(self.norm(x))[:, :-1]
            right = jnp.take_along_axis(scores, ids[:, 1:, None], -1)[..., 0]
            return jax.nn.logsumexp(scores, -1) - right

    return Llama()


def resnet(source: Mapping[str, Any], tensors: Tensors, task: str) -> Any:
    """ResNet, as transformers has it, or with fw's stem for small images."""
    import jax
    from flax import nnx

    small = source.get("stem") == "small"
    around: Any = ((1, 1), (1, 1))
    basic = source["layer_type"] == "basic"

    class Block(nnx.Module):
        def __init__(self, name: str, stride: int):
            strides = (stride, 1) if basic else (1, stride, 1)
            if not basic and source["downsample_in_bottleneck"]:
                strides = (stride, 1, 1)
            self.units = nnx.List(
                [conv_norm(tensors, f"{name}.layer.{i}", s) for i, s in enumerate(strides)]
            )
            projected = f"{name}.shortcut.convolution.weight" in tensors
            self.shortcut = conv_norm(tensors, f"{name}.shortcut", stride) if projected else None

        def __call__(self, x):
            y = x
            for unit in self.units[:-1]:
                y = jax.nn.relu(unit(y))
            y = self.units[-1](y)
            return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))

    class ResNet(nnx.Module):
        def __init__(self):
            self.stem = conv_norm(tensors, "resnet.embedder.embedder", 1 if small else 2)
            blocks = []
            for stage, depth in enumerate(source["depths"]):
                first = 2 if stage or source["downsample_in_first_stage"] else 1
                for i in range(depth):
                    name = f"resnet.encoder.stages.{stage}.layers.{i}"
                    blocks.append(Block(name, 1 if i else first))
            self.blocks = nnx.List(blocks)
            self.classifier = linear(tensors, "classifier.1")

        def __call__(self, batch):
            x = jax.nn.relu(self.stem(batch["pixel_values"]))
            if not small:
                x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=around)
            for block in self.blocks:
                x = block(x)
            return self.classifier(x.mean((1, 2)))

    return ResNet()


if __name__ == "__main__":
    main()
