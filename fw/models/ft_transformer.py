"""FT-Transformer: every column of a table is a token (Gorishniy et al. 2021, arXiv:2106.11959).

A row's columns become vectors, a learnt one is put before them, and a Transformer that normalises
before each sublayer (but not before the first) makes of that one the answer. `fw.models.tabular`
says what a batch is.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models.checks import rates
from fw.models.layers import Dense, LayerNorm, attend, denses, dropout
from fw.models.tabular import Categories, check
from sharding import constrain

TOKENS = ("batch", None)  # a table has few columns, and no mesh cuts them


@dataclass(frozen=True)
class FTTransformerConfig:
    """The numbers of the network, and what it is for; defaults are the paper's.

    Attributes:
      numbers, categories, num_labels, task: as in `MLPConfig`.
      hidden_size: of a token.
      num_hidden_layers: of the Transformer.
      num_attention_heads: of each.
      intermediate_size: of its MLP.
      dropout: in the MLP.
      attention_dropout: of attention weights.
      layer_norm_eps: of the norms.
    """

    numbers: int = field(metadata={"signed": True})  # there may be none
    categories: tuple[int, ...]
    num_labels: int
    task: str
    hidden_size: int = 192
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    intermediate_size: int = 256
    dropout: float = 0.1
    attention_dropout: float = 0.2
    layer_norm_eps: float = 1e-5

    model_type: ClassVar[str] = "ft_transformer"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        object.__setattr__(self, "categories", tuple(self.categories))
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        check(self, *sizes)
        rates(self, "attention_dropout")
        if self.hidden_size % self.num_attention_heads:
            raise FwError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


class Tokens(nnx.Module):
    """[B, 1 + N + K, size]: the first token, then x · weight of numbers and vectors of categories.

    Each column has a bias of its own, and one of numbers a vector that says that it is missing:
    from 0, so that a column that never lacked a number is the median if it does.
    """

    def __init__(self, config: FTTransformerConfig, rngs: nnx.Rngs):
        size, numbers, std = config.hidden_size, config.numbers, (3 * config.hidden_size) ** -0.5

        def vectors(count: int) -> nnx.Param:
            normal = jax.random.normal(rngs.params(), (count, size)) * std
            return nnx.Param(normal, axes=(None, "embed"))

        self.config, self.first = config, vectors(1)
        self.bias = vectors(numbers + len(config.categories))
        if numbers:
            self.weight = vectors(numbers)
            self.missing = nnx.Param(jnp.zeros((numbers, size)), axes=(None, "embed"))
        if config.categories:
            self.categories = Categories(config.categories, size, std=std, rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        tokens = []
        if self.config.numbers:
            x, gone = batch["numbers"][..., None], batch["missing"][..., None]
            tokens.append(x * self.weight[...] + gone * self.missing[...])
        if self.config.categories:
            tokens.append(self.categories(batch["categories"]))
        x = jnp.concatenate(tokens, 1) + self.bias[...]
        first = jnp.broadcast_to(self.first[...], (x.shape[0], *self.first.shape))
        return constrain(jnp.concatenate([first, x], 1), "batch", None, "embed")


class Layer(nnx.Module):
    """Attention and a gated MLP, relu(x · gate) * (x · up), each added to what it normalised."""

    def __init__(self, config: FTTransformerConfig, first: bool, rngs: nnx.Rngs):
        size, inner, epsilon = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        std = size**-0.5
        self.attention_norm = None if first else LayerNorm(size, epsilon=epsilon)
        self.query = Dense(size, size, ("embed", "heads"), std=std, rngs=rngs)
        self.key = Dense(size, size, ("embed", "heads"), std=std, rngs=rngs)
        self.value = Dense(size, size, ("embed", "heads"), std=std, rngs=rngs)
        self.out = Dense(size, size, ("heads", "embed"), std=std, rngs=rngs)
        self.norm = LayerNorm(size, epsilon=epsilon)
        self.gate = Dense(size, inner, ("embed", "mlp"), std=std, rngs=rngs)
        self.up = Dense(size, inner, ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Dense(inner, size, ("mlp", "embed"), std=inner**-0.5, rngs=rngs)
        self.size = size // config.num_attention_heads
        self.rate, self.attention_rate = config.dropout, config.attention_dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = (None,) * 2 if key is None else jax.random.split(key, 2)
        y = x if self.attention_norm is None else self.attention_norm(x)
        q, k, v = (
            constrain(z.reshape(*x.shape[:2], -1, self.size), "batch", None, "heads", None)
            for z in denses(y, [self.query, self.key, self.value], TOKENS)
        )
        y = attend(q, k, v, jnp.zeros((), x.dtype), self.attention_rate, keys[0])
        x = x + self.out(y.reshape(*x.shape[:2], -1), TOKENS)
        gate, up = denses(self.norm(x), [self.gate, self.up], TOKENS)
        inner = constrain(jax.nn.relu(gate) * up, "batch", None, "mlp")
        x = x + self.down(dropout(inner, self.rate, keys[1]), TOKENS)
        return constrain(x, "batch", None, "embed")


class FTTransformer(nnx.Module):
    """Tokens, layers, and the answer from the first token."""

    def __init__(self, config: FTTransformerConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.tokens = Tokens(config, rngs)
        layers = [Layer(config, i == 0, rngs) for i in range(config.num_hidden_layers)]
        self.layers = nnx.List(layers)
        self.norm = LayerNorm(size, epsilon=config.layer_norm_eps)
        self.classifier = Dense(
            size, config.num_labels, ("embed", "labels"), std=size**-0.5, rngs=rngs
        )

    def __call__(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        x = self.tokens(batch)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if key is None else jax.random.fold_in(key, i))
        return self.classifier(jax.nn.relu(self.norm(x[:, 0])), ("batch",))


def ft_transformer(config: FTTransformerConfig) -> Model:
    """The model; `apply` takes what `fw.data.Columns` makes and gives [B, labels].

    >>> config = FTTransformerConfig(2, (4, 3), 2, "tabular_classification", 16, 2, 4, 24)
    >>> model = ft_transformer(config)
    >>> batch = {"numbers": jnp.zeros((5, 2)), "missing": jnp.zeros((5, 2)),
    ...          "categories": jnp.zeros((5, 2), jnp.int32)}
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, batch)[0].shape
    (5, 2)
    """
    return from_nnx(
        config,
        lambda rngs: FTTransformer(config, rngs),
        lambda module, batch, key, train: module(batch, key),
    )
