"""Embedding tables of any length: `Table`, and what a model with one agrees on with the step.

1. A table is made with the function that takes its ids from a batch: `Table(count, size, ids)`,
   `ids(batch)` int32 [B] or [B, ...], negative for none. Nothing else has to be declared:
   `from_nnx` finds it, and `Model.tables` has `ids` by the path of its parameter.
2. In training, `fw.step` calls `ids` on the whole batch, fetches the rows (`sharding.tables`), and
   puts them into the batch, `batch[ROWS][path]`, [B, ..., size]. The table is then called with the
   batch and gives them; everywhere else it looks them up. So it must be called with the batch,
   once or often, and ids must be a function of the batch alone: what the model computes cannot be
   looked up. For several sets of ids of one table, let `ids` concatenate them, and cut the rows.
3. Gradients are those by the rows: the step adds up those of one row, over the whole batch and all
   microbatches, and changes the row once, by a `RowOptimizer`:
   `tx = with_tables(optimizer(config, steps), model, row_optimizer(options, config, steps))`.
   `make_step`, `initial_state` and `abstract_state` take such a `tx` where they take optax's.

All features of one size are best rows of one table, at offsets: one exchange then serves them all.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fw.errors import FwError
from fw.model import ROWS, Batch
from sharding.parallel.tables import MULTIPLE, fetch, placement
from sharding.rules import Names

MOST = 2**31 - 1 - MULTIPLE
"""Rows that ids int32 can number, and leave some that number none."""


class Table(nnx.Module):
    """An embedding of ids, or of bags of ids.

    Attributes:
      table: [count, size]; where it is cut by rows, `count` is rounded up to a multiple of
        `sharding.tables.MULTIPLE`, so that the parameter is the same on every mesh.

    >>> from fw.model import from_nnx
    >>> build = lambda rngs: Table(5, 2, lambda batch: batch["items"], bag="sum", rngs=rngs)
    >>> model = from_nnx(None, build, lambda table, batch, key, train: table(batch))
    >>> sorted(model.tables), model.axes["params"]
    (['table'], {'table': (None, None)})
    >>> batch = {"items": jnp.array([[3, -1, 3], [-1, -1, -1]], jnp.int32)}
    >>> variables = {"params": {"table": jnp.arange(10.0).reshape(5, 2)}, "state": {}}
    >>> model.apply(variables, batch)[0]
    Array([[12., 14.],
           [ 0.,  0.]], dtype=float32)
    """

    def __init__(
        self,
        count: int,
        size: int,
        ids: Callable[[Batch], jax.Array],
        *,
        bag: Literal["sum", "mean"] | None = None,
        names: Names | None = None,
        init: Callable[..., jax.Array] | None = None,
        rngs: nnx.Rngs,
    ):
        """A new table.

        Args:
          count: of ids, from 0.
          size: of an embedding.
          ids: of a batch, int32 [B, ...]; negative for none, whose embedding is 0.
          bag: what becomes of the last axis of ids: the embeddings' sum, or their mean over those
            that are not negative; None for ids that are no bags.
          names: of the table's axes: see `sharding.tables`; None for what `placement` says.
          init: an initialiser of NNX; None for uniform(-1, 1) / √count, as DLRM has it (Naumov et
            al. 2019, arXiv:1906.00091).
          rngs: of `init`.

        Raises:
          FwError: more than `MOST` rows.
        """
        names = placement(count, size).names if names is None else names
        rows = -(-count // MULTIPLE) * MULTIPLE if names[0] else count
        if rows > MOST:
            raise FwError(
                f"a table of {rows} rows: ids are int32, expected at most {MOST}; hash the ids to "
                "fewer rows, or part the columns into several tables"
            )
        if init is None:
            init = nnx.initializers.uniform(2 * count**-0.5)
            value = init(rngs.params(), (rows, size)) - count**-0.5
        else:
            value = init(rngs.params(), (rows, size))
        self.bag = bag
        self.table = nnx.Param(value, axes=names, ids=ids)

    def __call__(self, batch: Batch) -> jax.Array:
        """The embeddings of the batch's ids, [B, ..., size]; of bags, [B, ..., size] without M."""
        known = self.table.get_metadata()
        ids = known["ids"](batch)
        rows = batch.get(ROWS, {}).get(known.get("path"))
        if rows is None:
            rows = fetch(self.table[...], ids, names=known["axes"])
        if self.bag is None:
            return rows
        total = jnp.sum(rows, axis=-2)
        if self.bag == "sum":
            return total
        number = jnp.sum(ids >= 0, axis=-1, dtype=rows.dtype)
        return total / jnp.maximum(number, 1)[..., None]
