"""A model that begins with random parameters, as `load` gives one that was trained before."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from fw.hub.families import FAMILIES
from fw.hub.folder import Loaded, computed
from fw.models.stack_layout import scans
from sharding import Rules, create, paths, shardings


def new(
    config: Any,
    labels: tuple[str, ...],
    *,
    key: jax.Array,
    mesh: Mesh,
    rules: Rules,
    microbatches: int = 1,
    remat: str | None = None,
) -> Loaded:
    """Makes a model of a config, every parameter born in parts where it belongs.

    Args:
      config: of a family in `FAMILIES`.
      labels: names of the classes by id.
      key: of the parameters.
      mesh, rules: where they go.
      microbatches, remat: as in `load`; whatever the config has.

    Raises:
      FwError: a `remat` for a model that has nothing to compute again.
      sharding.ShardingError: parameters that do not fit the mesh and rules.

    >>> from fw.models.bert import BertConfig
    >>> from sharding import make_mesh, rules
    >>> config = BertConfig(30, 8, 1, 2, 16, num_labels=2, task="token_classification")
    >>> where = {"mesh": make_mesh("data=1"), "rules": rules()}
    >>> made = new(config, ("O", "B-x"), key=jax.random.key(0), **where)
    >>> made.labels, len(made.fresh)
    (('O', 'B-x'), 23)
    """
    family = FAMILIES[config.model_type]
    stacked = family.stacked or scans(mesh)
    how = computed(family, microbatches=microbatches, remat=remat, scan=stacked)
    model = family.model(dataclasses.replace(config, **how))
    shapes = jax.eval_shape(model.init, key)
    variables = create(model.init, key, shardings=shardings(model.axes, shapes, mesh, rules))
    fresh = tuple(path.removeprefix("params/") for path in paths(shapes))
    return Loaded(model, variables, labels, fresh, mesh=mesh, rules=rules)
