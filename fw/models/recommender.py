"""A trained two-tower model and its catalogue as one: a user goes in, the best items come out.

The items' vectors are parameters of it, computed once; the item's tower is left behind. So it
answers without knowing an item's features, and a catalogue that a mesh cuts by rows stays where it
is (`sharding.top_k`). The artifact of a run (`Retrieval.exported`) gives the scores of all items on
one device, for a catalogue that fits it; this is for one that does not, or to serve on a mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import precision
from fw.data.batches import eval_batches
from fw.data.rows import Rows
from fw.errors import FwError
from fw.model import Batch, Model, Variables
from fw.models.two_tower import ITEM, USER
from sharding import top_k
from sharding.parallel.tables import MULTIPLE, placement

CATALOGUE = "catalogue"
"""The parameter that holds the items' vectors."""


def recommender(
    model: Model, variables: Variables, catalogue: Rows, k: int = 10, *, size: int = 4096
) -> tuple[Model, Variables]:
    """The model that answers with the k best items of a catalogue, and its parameters.

    Args:
      model: of `two_tower`.
      variables: trained.
      catalogue: the items, of `fw.data.recommend.catalogue`.
      k: how many to recommend.
      size: items whose vectors are computed at a time.

    Returns:
      A model and its variables. `apply` takes the user's columns and `seen` i32[B, S], places in
      the catalogue that are not recommended, -1 for none, as `fw.data.requests.user_inputs` makes
      them. It gives {"items": i32[B, k], "scores": f32[B, k]}, places and their scores, the best
      first; -1 and -inf where no item is left.

    Raises:
      FwError: more items are wanted than there are.
    """
    if not 1 <= k <= catalogue.rows:
        raise FwError(f"k is {k}; expected 1 … {catalogue.rows}, the items of the catalogue")
    vectors = item_vectors(model, variables, catalogue, size)
    names = placement(*vectors.shape).names
    names = names if names[1] is None else (None, None)  # a search wants whole vectors
    rows = -(-len(vectors) // MULTIPLE) * MULTIPLE if names[0] else len(vectors)
    vectors = np.pad(vectors, ((0, rows - len(vectors)), (0, 0)))
    # A module is put together from all of its leaves; of the item's tower it reads none.
    axes, is_axes = model.axes["params"], lambda x: isinstance(x, tuple)
    tower = {name: jax.tree.map(lambda _: np.float32(0), axes[name], is_leaf=is_axes)
             for name in axes if name == ITEM}  # fmt: skip

    def replaced(params: Any, catalogue: Any) -> dict[str, Any]:
        return {**{name: x for name, x in params.items() if name != ITEM}, CATALOGUE: catalogue}

    def init(key: jax.Array) -> Variables:
        own = model.init(key)
        return {**own, "params": replaced(own["params"], jnp.zeros_like(vectors))}

    def apply(
        variables: Variables, batch: Batch, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, Variables]:
        params = {**variables["params"], **tower}
        items = params.pop(CATALOGUE)
        user = {name: x for name, x in batch.items() if name.partition(".")[0] != ITEM}
        outputs, _ = model.apply({**variables, "params": params}, user)
        scores, places = top_k(
            outputs[USER], items, k, count=catalogue.rows, exclude=batch["seen"], names=names
        )
        return {"items": places, "scores": scores}, variables

    params = replaced(variables["params"], jnp.asarray(vectors))
    axes = {**model.axes, "params": replaced(axes, names)}
    return Model(model.config, init, apply, axes), {**variables, "params": params}


def item_vectors(
    model: Model, variables: Variables, catalogue: Rows, size: int = 4096
) -> np.ndarray:
    """The vectors of all items of a catalogue, f32[items, D], of products in float32.

    Args:
      model, variables: of `two_tower`, trained.
      catalogue: the items.
      size: how many are computed at a time.
    """

    def vectors(variables: Variables, batch: Batch) -> jax.Array:
        return model.apply(variables, batch)[0][ITEM]

    compute = jax.jit(precision.apply(vectors, "f32"))
    batches = eval_batches(catalogue.arrays, min(size, catalogue.rows), empty=catalogue.empty)
    parts = [np.asarray(compute(variables, batch)) for batch in batches]
    return np.concatenate(parts)[: catalogue.rows]
