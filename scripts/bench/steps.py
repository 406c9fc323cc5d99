"""Training steps of fw, compiled for 8 devices of any platform from shapes alone.

No array is made and no chip is needed: the TPU's and the GPU's compilers are told of devices that
are not here. `collectives.py` reads what they made of the steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from minimum import Parameter, Step

from fw.model import Batch, Model, from_nnx
from fw.models.bert import BertConfig, Embeddings, bert
from fw.models.experts import Experts, ExpertsConfig
from fw.models.layers import Dense, LayerNorm, visible
from fw.models.postnorm import Attention
from fw.optimizer import AdamW, optimizer
from fw.step import abstract_state, make_step
from fw.tasks import cross_entropy
from sharding import rules
from sharding.layout import fit, is_names
from sharding.plan import hardware
from sharding.plan.worker import TPU
from sharding.plan.worker import devices as told

DEVICES = 8
LOWERED = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}
"""By platform: what JAX calls it when it lowers a program."""

ENVIRONMENT = TPU | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
"""For the process that compiles, before it starts."""

_MACHINES = {"tpu": "v5e:2x4", "gpu": f"h100:1x{DEVICES}"}


@dataclass(frozen=True)
class Sizes:
    """The batch and the model.

    Attributes:
      rows: of a batch.
      length: tokens of a row.
      hidden: size of a token; four times as much within an MLP or an expert.
      heads: of attention.
      layers: of the encoder.
      vocabulary: rows of the largest table.
      experts: a layer, where the layout has an axis for them.
      chosen: experts a token.
    """

    rows: int = 512
    length: int = 128
    hidden: int = 512
    heads: int = 8
    layers: int = 2
    vocabulary: int = 30_528
    experts: int = 8
    chosen: int = 2


def devices(platform: str) -> Sequence[Any]:
    """Of this machine, or those that a compiler is told of: v5e, 2 x 4; 8 H100 of one machine."""
    return jax.devices() if platform == "cpu" else told(hardware(_MACHINES[platform]))


def compiled(
    sizes: Sizes, mesh: Mesh, precision: str, platform: str
) -> tuple[jax.stages.Compiled, Step]:
    """A step for the devices of a mesh, and what of it communicates.

    Layouts with an `expert` axis have experts in place of MLPs.
    """
    config = BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.hidden,
        num_labels=8,
        task="token_classification",
    )
    sparse = mesh.shape["expert"] > 1
    model = _with_experts(config, sizes) if sparse else bert(config)
    where, tx, shape = rules(), optimizer(AdamW(), 10), (sizes.rows, sizes.length)
    step = make_step(
        model, _loss if sparse else cross_entropy, tx, mesh=mesh, rules=where, precision=precision
    )
    state = abstract_state(model, tx, mesh, where)
    lies = fit(("batch", None), shape, mesh, where, activation=True, path="batch")
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lies)
    batch = dict.fromkeys(("input_ids", "segment_ids", "position_ids", "labels"), integers)
    lowered = step.trace(state, batch).lower(lowering_platforms=(LOWERED[platform],))
    names = jax.tree.leaves(model.axes["params"], is_leaf=is_names)
    shapes = [x.shape for x in jax.tree.leaves(state.variables["params"])]
    return lowered.compile(), Step(
        parameters=tuple(map(Parameter, names, shapes)),
        tokens=sizes.rows * sizes.length,
        size=sizes.hidden,
        heads=sizes.heads,
        layers=sizes.layers,
        chosen=sizes.chosen if sparse else 0,
        kernel_bytes=2 if precision == "bf16" else 4,
        visitor_bytes=2 if (precision, platform) == ("bf16", "tpu") else 4,
    )


class _Layer(nnx.Module):
    """Attention, then experts, each added to its normalised input."""

    def __init__(self, config: BertConfig, sizes: Sizes, rngs: nnx.Rngs):
        size = config.hidden_size
        self.norms = nnx.List([LayerNorm(size, epsilon=config.layer_norm_eps) for _ in range(2)])
        self.attention = Attention(config.shape, rngs)
        inner = config.intermediate_size
        self.experts = Experts(ExpertsConfig(sizes.experts, sizes.chosen, size, inner), rngs)

    def __call__(self, x: jax.Array, seen: Any, mask: jax.Array, key: jax.Array | None):
        x = x + self.attention(self.norms[0](x), seen, key)
        y, aux = self.experts(self.norms[1](x), mask)
        return x + y, aux.balance


class _Encoder(nnx.Module):
    def __init__(self, config: BertConfig, sizes: Sizes, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List([_Layer(config, sizes, rngs) for _ in range(sizes.layers)])
        names = ("embed", "labels")
        self.classifier = Dense(sizes.hidden, config.num_labels, names, std=0.02, rngs=rngs)

    def __call__(self, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        x, balance = self.embeddings(batch), jnp.zeros((), jnp.float32)
        segments = batch["segment_ids"]
        seen = visible(segments, x.dtype)
        for index, layer in enumerate(self.layers):
            own = None if key is None else jax.random.fold_in(key, index)
            x, more = layer(x, seen, segments > 0, own)
            balance = balance + more
        return self.classifier(x), balance


def _with_experts(config: BertConfig, sizes: Sizes) -> Model:
    return from_nnx(
        config,
        lambda rngs: _Encoder(config, sizes, rngs),
        lambda module, batch, key, _: module(batch, key),
    )


def _loss(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits, balance = outputs
    total, weight = cross_entropy(logits, batch)
    return total + 0.01 * balance * weight, weight
