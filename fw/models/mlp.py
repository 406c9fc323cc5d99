"""A multilayer perceptron over the columns of a table (Gorishniy et al. 2021, arXiv:2106.11959).

Numbers go in as they are, categories as vectors; then layers of relu and dropout.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from fw.model import Batch, Model, from_nnx
from fw.models.layers import Dense, dropout
from fw.models.tabular import Categories, check
from sharding import constrain

ROWS = ("batch",)


@dataclass(frozen=True)
class MLPConfig:
    """The numbers of the network, and what it is for.

    Attributes:
      numbers: columns of numbers.
      categories: rows of each category's table, `Columns.cardinalities`.
      num_labels: outputs: classes, or one number.
      task: "tabular_classification" or "tabular_regression".
      hidden_size: of the layers.
      num_hidden_layers: how many.
      dropout: after each.
      category_size: of a category's vector.
    """

    numbers: int = field(metadata={"signed": True})  # there may be none
    categories: tuple[int, ...]
    num_labels: int
    task: str
    hidden_size: int = 256
    num_hidden_layers: int = 2
    dropout: float = 0.1
    category_size: int = 8

    model_type: ClassVar[str] = "mlp"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        object.__setattr__(self, "categories", tuple(self.categories))
        check(self, "hidden_size", "num_hidden_layers", "category_size")


class MLP(nnx.Module):
    """The network."""

    def __init__(self, config: MLPConfig, rngs: nnx.Rngs):
        self.config, size, numbers = config, config.hidden_size, config.numbers
        width = numbers + len(config.categories) * config.category_size
        std = (2 / width) ** 0.5  # of all that goes in: the inputs are one, their kernels are not
        if numbers:
            self.numbers = Dense(numbers, size, (None, "mlp"), std=std, bias=False, rngs=rngs)
            # From 0: a column that never lacked a number has nothing to say if it does.
            self.missing = Dense(numbers, size, (None, "mlp"), std=0, bias=False, rngs=rngs)
        if config.categories:
            vector, many = config.category_size, len(config.categories)
            self.vectors = Categories(config.categories, vector, std=1, rngs=rngs)
            self.categories = Dense(
                many * vector, size, ("embed", "mlp"), std=std, bias=False, rngs=rngs
            )
        self.bias = nnx.Param(jnp.zeros(size), axes=("mlp",))
        # Names alternate, so that what one layer cuts over `tensor` the next one sums up.
        names = [("mlp", "embed"), ("embed", "mlp")]
        count = config.num_hidden_layers - 1
        layers = [
            Dense(size, size, names[i % 2], std=(2 / size) ** 0.5, rngs=rngs) for i in range(count)
        ]
        self.layers = nnx.List(layers)
        last = (names[count % 2][0], "labels")
        self.classifier = Dense(size, config.num_labels, last, std=size**-0.5, rngs=rngs)

    def __call__(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        x = self.bias[...]
        if self.config.numbers:
            x = x + self.numbers(batch["numbers"], ROWS) + self.missing(batch["missing"], ROWS)
        if self.config.categories:
            vectors = self.vectors(batch["categories"])
            x = x + self.categories(vectors.reshape(vectors.shape[0], -1), ROWS)
        x, name = constrain(x, "batch", "mlp"), "mlp"
        for i, layer in enumerate([None, *self.layers]):
            if layer is not None:
                name = layer.axes[1]
                x = constrain(layer(x, ROWS), "batch", name)
            own = None if key is None else jax.random.fold_in(key, i)
            x = dropout(jax.nn.relu(x), self.config.dropout, own)
        return self.classifier(x, ROWS)


def mlp(config: MLPConfig) -> Model:
    """The model; `apply` takes what `fw.data.Columns` makes and gives [B, labels].

    >>> model = mlp(MLPConfig(2, (4, 3), 2, "tabular_classification"))
    >>> batch = {"numbers": jnp.zeros((5, 2)), "missing": jnp.zeros((5, 2)),
    ...          "categories": jnp.zeros((5, 2), jnp.int32)}
    >>> variables = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, batch)[0].shape
    (5, 2)
    """
    return from_nnx(
        config,
        lambda rngs: MLP(config, rngs),
        lambda module, batch, key, train: module(batch, key),
    )
