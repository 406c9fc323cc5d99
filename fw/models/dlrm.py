"""DLRM: a click's logit from the products of all pairs of features (Naumov et al. 2019).

arXiv:1906.00091. Numbers go through the bottom MLP, categories and bags are looked up; the pairwise
products of these vectors of one size, and the bottom's own, go through the top MLP.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.model import Batch, Model, from_nnx
from fw.models.features import MLP, Features, check_columns, numbers
from fw.models.layers import Dense, dropout
from sharding import constrain


@dataclass(frozen=True)
class DLRMConfig:
    """What a DLRM is made of.

    Attributes:
      columns: of the batch: ids int32 [B], or bags [B, M], -1 for none.
      rows: how many ids each of them has.
      numbers: columns of the batch, float32 [B].
      history: whether the batch has `history` [B, M], ids of items whose rows are those of "item".
      size: of an embedding.
      bottom: sizes of the bottom MLP's hidden layers; its last has `size`.
      top: sizes of the top MLP's hidden layers; its last has one.
      dropout: of the top MLP's input.
      task: what it is for.
    """

    columns: tuple[str, ...]
    rows: tuple[int, ...]
    numbers: tuple[str, ...] = ()
    history: bool = False
    size: int = 16
    bottom: tuple[int, ...] = (64,)
    top: tuple[int, ...] = (64, 32)
    dropout: float = 0.0
    task: str = "ranking"

    model_type: ClassVar[str] = "dlrm"

    def __post_init__(self):
        """Checks what the arithmetic relies on."""
        check_columns("dlrm", self.columns, self.rows, self.numbers)
        if not self.columns or self.features < 2:
            raise FwError(
                f"dlrm: columns {self.columns}, numbers {self.numbers}: expected a column of ids, "
                "and another, numbers or a history to take its product with"
            )
        if min((self.size, *self.bottom, *self.top)) < 1 or not 0 <= self.dropout < 1:
            raise FwError("dlrm: expected sizes from 1, and dropout in [0, 1)")
        if self.history and "item" not in self.columns:
            raise FwError("dlrm: a history shares the rows of a column 'item', which is missing")
        if self.task != "ranking":
            raise FwError(f"dlrm: task {self.task!r} is unknown; expected 'ranking'")

    @property
    def features(self) -> int:
        """The vectors whose products are taken."""
        return len(self.columns) + self.history + bool(self.numbers)


class DLRM(nnx.Module):
    """The module; its axes' names are those of its parts."""

    def __init__(self, config: DLRMConfig, rngs: nnx.Rngs):
        self.config = config
        like = (("history", "item"),) if config.history else ()
        self.features = Features(config.columns, config.rows, config.size, like=like, rngs=rngs)
        own, count = config.size if config.numbers else 0, config.features
        if config.numbers:
            sizes = (*config.bottom, config.size)
            self.bottom = MLP(len(config.numbers), sizes, last_relu=True, rngs=rngs)
        size_in = own + count * (count - 1) // 2
        self.top = MLP(size_in, config.top, last_relu=True, rngs=rngs)
        size_in = config.top[-1] if config.top else size_in
        inner = self.top.layers[-1].axes[1] if config.top else None
        self.logit = Dense(size_in, 1, (inner, "labels"), std=size_in**-0.5, rngs=rngs)

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        dense = [self.bottom(x) for x in numbers(batch, self.config.numbers)]
        vectors = jnp.stack([*dense, *self.features(batch).values()], axis=1)
        products = constrain(interactions(vectors), "batch", None)
        x = jnp.concatenate([*dense, products], axis=1)
        x = self.top(dropout(x, self.config.dropout, key))
        return self.logit(x, rows=("batch",))[:, 0]


def interactions(vectors: jax.Array) -> jax.Array:
    """The products of all pairs of different vectors: [B, F, D] → [B, F (F - 1) / 2].

    >>> interactions(jnp.array([[[1.0], [2.0], [3.0]]]))
    Array([[2., 3., 6.]], dtype=float32)
    """
    products = jnp.einsum("bfd,bgd->bfg", vectors, vectors)
    # By slices: a CPU would turn what was picked by numbers round, and take the next dot off its
    # path, where a bfloat16 dot fails; and a TPU is slow to pick.
    return jnp.concatenate([products[:, i, :i] for i in range(1, vectors.shape[1])], axis=1)


def dlrm(config: DLRMConfig) -> Model:
    """The model: `apply` gives logits [B].

    >>> model = dlrm(DLRMConfig(("user", "item"), (3, 5), size=4))
    >>> batch = {"user": jnp.array([0, 2]), "item": jnp.array([4, -1])}
    >>> model.apply(model.init(jax.random.key(0)), batch)[0].shape
    (2,)
    """
    return from_nnx(
        config,
        lambda rngs: DLRM(config, rngs),
        lambda module, batch, key, train: module(batch, key),
    )
