"""What models of tables share: columns of categories as vectors, and what is checked.

A batch is what `fw.data.Columns` makes: `numbers` and `missing` f32[B, N], `categories` i32[B, K],
each where the table has such columns. The output is [B, labels], logits or numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fw.data.columns import TASKS
from fw.errors import FwError
from fw.models.checks import at_least, one_of, rates
from fw.models.layers import Embedding


class Categories(nnx.Module):
    """A vector for each category of each column, ids [B, K] → [B, K, size].

    The columns' tables lie end to end in one, so there is one look-up.
    """

    def __init__(self, rows: tuple[int, ...], size: int, *, std: float, rngs: nnx.Rngs):
        self.table = Embedding(sum(rows), size, ("vocab", "embed"), std=std, rngs=rngs)
        self.rows = rows

    def __call__(self, ids: jax.Array) -> jax.Array:
        first = np.cumsum([0, *self.rows[:-1]])
        return self.table(ids + jnp.asarray(first, ids.dtype))


def check(config: Any, *sizes: str) -> None:
    """Raises FwError for a config that the arithmetic cannot follow; `sizes` are 1 or more."""
    one_of(config, task=TASKS)
    at_least(config, 1, "num_labels", *sizes)
    rates(config, "dropout")
    if config.numbers < 0 or not (config.numbers or config.categories):
        raise FwError(f"numbers is {config.numbers}; expected columns, of numbers or categories")
    if any(rows < 1 for rows in config.categories):
        raise FwError(f"categories is {config.categories}; expected the rows of each one's table")
