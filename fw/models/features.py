"""The categorical and numeric columns of a batch, for recommenders: embeddings, and numbers.

All columns have their rows in one table, each after the other, so one exchange serves them all
(see `table`). A column is ids int32 [B], or bags int32 [B, M], -1 for none, as is any id that the
column has no row for: its embedding is the mean of those there, and 0 if none is. A column that the
batch lacks is left out, so that users and items can be computed apart.
"""

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.model import Batch
from fw.models.layers import Dense
from fw.models.table import Table


class Features(nnx.Module):
    """Embeddings of columns, by name.

    Attributes:
      table: all rows.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[int],
        size: int,
        *,
        like: tuple[tuple[str, str], ...] = (),
        init=None,
        rngs: nnx.Rngs,
    ):
        """New embeddings.

        Args:
          columns: names.
          rows: how many ids each has.
          size: of an embedding.
          like: pairs of a further column and the one whose rows it shares, ("history", "item").
          init: as in `Table`.
          rngs: of the table.
        """
        starts = accumulate(rows[:-1], initial=0)
        places = dict(zip(columns, zip(starts, rows, strict=True), strict=True))
        places |= {name: places[other] for name, other in like}
        self.places = tuple(places.items())
        self.table = Table(sum(rows), size, self._ids, init=init, rngs=rngs)

    def _columns(self, batch: Batch) -> dict[str, jax.Array]:
        """The rows of each column of the batch, int32 [B, M]; -1 for none."""
        found = {}
        for name, (start, rows) in self.places:
            if name in batch:
                ids = batch[name].reshape(batch[name].shape[0], -1)
                found[name] = jnp.where((ids >= 0) & (ids < rows), ids + start, -1)
        return found

    def _ids(self, batch: Batch) -> jax.Array:
        return jnp.concatenate([*self._columns(batch).values()], axis=1)

    def __call__(self, batch: Batch) -> dict[str, jax.Array]:
        """The embedding of each column of the batch, [B, size]."""
        rows, done, found = self.table(batch), 0, {}
        for name, ids in self._columns(batch).items():
            width = ids.shape[1]
            total = jnp.sum(rows[:, done : done + width], axis=1)
            number = jnp.sum(ids >= 0, axis=1, keepdims=True, dtype=rows.dtype)
            found[name] = total / jnp.maximum(number, jnp.ones((), rows.dtype))
            done += width
        return found


class MLP(nnx.Module):
    """Dense layers, each but the last followed by a ReLU: [B, in] → [B, sizes[-1]]."""

    def __init__(self, size_in: int, sizes: Sequence[int], *, last_relu: bool, rngs: nnx.Rngs):
        self.layers = nnx.List()
        self.last_relu = last_relu
        # The first axis has a name only if it may be cut: any number of features comes in.
        inner: str | None = None
        for i, size in enumerate(sizes):
            outer = "mlp" if i % 2 == 0 else "embed"
            std = (2 / (size_in + size)) ** 0.5  # as DLRM has it
            self.layers.append(Dense(size_in, size, (inner, outer), std=std, rngs=rngs))
            size_in, inner = size, outer

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = layer(x, rows=("batch",))
            if i + 1 < len(self.layers) or self.last_relu:
                x = jax.nn.relu(x)
        return x


def numbers(batch: Batch, names: Sequence[str]) -> list[jax.Array]:
    """The numeric columns float32 [B] as one array [B, N], in a list that is empty without any."""
    return [jnp.stack([batch[name] for name in names], axis=1)] if names else []


RESERVED = ("history", "labels", "target", "log_q", "seen")
"""What a batch of a recommender has beside its columns."""


def check_columns(
    where: str, columns: Sequence[str], rows: Sequence[int], numbers: Sequence[str] = ()
) -> None:
    """Refuses columns that are not as many as their tables, tables without rows, names twice."""
    names = [*columns, *numbers]
    odd = [name for name in names if name in RESERVED or names.count(name) > 1]
    if odd and len({*columns}) == len(columns):
        raise FwError(
            f"{where}: a column cannot be called {odd[0]!r}: the batch has another array so"
        )
    if len(columns) != len(rows) or len({*columns}) != len(columns) or min(rows, default=1) < 1:
        raise FwError(
            f"{where}: expected different columns, each with its number of rows from 1; got "
            f"{', '.join(columns) or 'none'} and {', '.join(map(str, rows)) or 'none'}"
        )
