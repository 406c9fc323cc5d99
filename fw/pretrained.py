"""A name or a folder becomes a model on a mesh: `fw.load`, and back, `fw.save`.

`fw.assets` brings the folder, `fw.hub` reads it, `sharding` says where its parts go.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fw import assets, hub
from sharding import Rules, make_mesh
from sharding import rules as make_rules

save = hub.save

FILES = (".gguf", ".pth")
"""Endings of files that are a model by themselves."""


def load(
    source: str | Path,
    *,
    mesh: str | Mesh = "data=1",
    rules: str | Rules = "fsdp_tensor",
    task: str | None = None,
    labels: Sequence[str] | None = None,
    key: jax.Array | None = None,
    dtype: DTypeLike = np.float32,
    adapter: str | Path | None = None,
    **computed: Any,
) -> hub.Loaded:
    """Brings a pretrained model onto a mesh; its family is found from its `config.json`.

    Args:
      source: a model folder, a GGUF or `.pth` file, a name of `fw fetch --list`, or
        `hf:owner/name@revision`.
      mesh: a mesh, or its axes as in "data=2,fsdp=2,tensor=2".
      rules: rules, or the name of a preset.
      task, labels, key, dtype: as in `fw.hub.load`.
      adapter: a folder of PEFT, which is merged into the parameters.
      **computed: its `microbatches`, `remat` and `scan`.

    Raises:
      FwError: no such source, or a folder that is broken, unknown, or does not fit.
      sharding.ShardingError: a mesh that does not fit the machine or the model.

    >>> load("nowhere/model")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: nowhere/model: ...
    """
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    rules = make_rules(rules) if isinstance(rules, str) else rules
    path = Path(source)
    own = path.suffix in FILES and path.is_file()
    folder = path if own else assets.fetch(str(source))
    loaded = hub.load(
        folder, mesh=mesh, rules=rules, task=task, labels=labels, key=key, dtype=dtype, **computed
    )
    return loaded if adapter is None else hub.merge(loaded, hub.load_adapter(adapter, loaded))
