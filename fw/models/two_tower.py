"""Two towers: a vector for a user, one for an item, and their product is the score.

As in Covington et al. 2016 (doi:10.1145/2959100.2959190) and Yi et al. 2019
(doi:10.1145/3298689.3346996): the vectors of a catalogue are computed once, and what a user wants
is a search among them. A batch may hold both sides, or one: the outputs are those of the sides that
it has.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models.features import MLP, Features, check_columns, numbers
from fw.models.layers import dropout
from sharding import constrain

USER, ITEM = "user", "item"


@dataclass(frozen=True)
class TwoTowerConfig:
    """What the towers are made of.

    Attributes:
      user_columns, item_columns: of the batch, "user" and "item" first: ids int32 [B], or bags
        [B, M], -1 for none.
      user_rows, item_rows: how many ids each of them has.
      user_numbers, item_numbers: columns of the batch, float32 [B].
      history: whether the user has `history` [B, M], ids of items whose rows are those of "item".
      size: of an embedding, and of the vectors.
      hidden: sizes of each tower's hidden layers; with none, a tower is the sum of its embeddings,
        and of its numbers through a matrix.
      normalize: vectors to length 1, but for those of zeros.
      temperature: by which a score is divided.
      dropout: of the user's embeddings, and of the item's.
      initializer_range: the deviation of new embeddings.
      task: what it is for.
    """

    user_columns: tuple[str, ...]
    user_rows: tuple[int, ...]
    item_columns: tuple[str, ...]
    item_rows: tuple[int, ...]
    user_numbers: tuple[str, ...] = ()
    item_numbers: tuple[str, ...] = ()
    history: bool = True
    size: int = 64
    hidden: tuple[int, ...] = ()
    normalize: bool = True
    temperature: float = 0.1
    dropout: float = 0.0
    initializer_range: float = 0.05
    task: str = "retrieval"

    model_type: ClassVar[str] = "two_tower"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        check_columns("two_tower", self.user_columns, self.user_rows, self.user_numbers)
        check_columns("two_tower", self.item_columns, self.item_rows, self.item_numbers)
        if USER not in self.user_columns or ITEM not in self.item_columns:
            raise FwError("two_tower: expected 'user' and 'item' among the columns")
        user = {*self.user_columns, *self.user_numbers}
        if user & {*self.item_columns, *self.item_numbers}:
            raise FwError("two_tower: a column cannot be of both user and item")
        if min((self.size, *self.hidden)) < 1 or not 0 <= self.dropout < 1:
            raise FwError("two_tower: expected sizes from 1, and dropout in [0, 1)")
        if self.temperature <= 0:
            raise FwError(f"two_tower: temperature is {self.temperature}; expected more than 0")
        if self.task != "retrieval":
            raise FwError(f"two_tower: task {self.task!r} is unknown; expected 'retrieval'")


class Tower(nnx.Module):
    """Embeddings and numbers of one side → [B, size]."""

    def __init__(self, config: TwoTowerConfig, count: int, names: tuple[str, ...], rngs: nnx.Rngs):
        self.config, self.names = config, names
        size_in = len(names) + (count * config.size if config.hidden else 0)
        sizes = (*config.hidden, config.size)
        self.mlp = MLP(size_in, sizes, last_relu=False, rngs=rngs) if size_in else None

    def __call__(self, vectors: list[jax.Array], batch: Batch, key: jax.Array | None) -> jax.Array:
        config, given = self.config, numbers(batch, self.names)
        x = dropout(jnp.stack(vectors, axis=1), config.dropout, key)
        if self.mlp is None:
            y = jnp.sum(x, axis=1)
        elif config.hidden:
            y = self.mlp(jnp.concatenate([x.reshape(x.shape[0], -1), *given], axis=1))
        else:
            y = jnp.sum(x, axis=1) + self.mlp(*given)
        if config.normalize:
            # Zeros, such as a user's of whom nothing is known, have no direction and no gradient.
            square, least = jnp.sum(jnp.square(y), -1, keepdims=True), np.asarray(1e-24, y.dtype)
            zero = jnp.zeros((), y.dtype)
            y = y * jnp.where(square > least, lax.rsqrt(jnp.maximum(square, least)), zero)
        return constrain(y, "batch", None)


class TwoTower(nnx.Module):
    """The module; history and item share rows."""

    def __init__(self, config: TwoTowerConfig, rngs: nnx.Rngs):
        self.config = config
        self.features = Features(
            (*config.user_columns, *config.item_columns),
            (*config.user_rows, *config.item_rows),
            config.size,
            like=(("history", ITEM),) if config.history else (),
            init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        of_user = len(config.user_columns) + config.history
        self.user = Tower(config, of_user, config.user_numbers, rngs)
        self.item = Tower(config, len(config.item_columns), config.item_numbers, rngs)

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> dict[str, jax.Array]:
        config, found = self.config, self.features(batch)
        keys = (None, None) if key is None else jax.random.split(key)
        outputs = {}
        if USER in batch:
            names = (*config.user_columns, *(["history"] if config.history else []))
            user = self.user([found[name] for name in names], batch, keys[0])
            outputs[USER] = user / np.asarray(config.temperature, user.dtype)
        if ITEM in batch:
            vectors = [found[name] for name in config.item_columns]
            outputs[ITEM] = self.item(vectors, batch, keys[1])
        return outputs


def two_tower(config: TwoTowerConfig) -> Model:
    """The model: `apply` gives {"user": [B, size], "item": [B, size]}, of the sides of the batch.

    Their product is the score; the temperature is in the user's.

    >>> model = two_tower(TwoTowerConfig(("user",), (3,), ("item",), (5,), history=False, size=4))
    >>> variables = model.init(jax.random.key(0))
    >>> {k: v.shape for k, v in model.apply(variables, {"item": jnp.arange(5)})[0].items()}
    {'item': (5, 4)}
    """
    return from_nnx(
        config,
        lambda rngs: TwoTower(config, rngs),
        lambda module, batch, key, train: module(batch, key),
    )
