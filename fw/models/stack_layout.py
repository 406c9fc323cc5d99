"""How the layers of a `Stack` lie: which way suits a mesh, and from one way to the other.

Folders of transformers know neither. Checkpoints and compressed parameters are kept as they were
when they were made, and read as the mesh at hand wants them.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sharding.mesh import platform
from sharding.parallel.pipeline import PIPE

_LAYER = re.compile(r"((?:.+/)?stack/layers/)(\d+)/(.+)")


def scans(mesh: Mesh) -> bool:
    """Whether layers are stacked where nobody says: on CPUs, only for the sake of stages.

    >>> from sharding import make_mesh
    >>> scans(make_mesh("data=1"))
    False
    """
    return platform(mesh) != "cpu" or stages_of(mesh) > 1


def default_microbatches(mesh: Mesh) -> int:
    """Two for each stage, so that stages wait a third of the time or less; else the whole batch."""
    stages = stages_of(mesh)
    return 1 if stages == 1 else 2 * stages


def stages_of(mesh: Mesh) -> int:
    """How many stages a mesh has room for."""
    return mesh.shape.get(PIPE, 1)


def relayout(
    arrays: Mapping[str, Any],
    wanted: Collection[str],
    join: Callable[[list[Any]], Any] = np.stack,
) -> dict[str, Any]:
    """Arrays by path, with the layers of a stack apart, or stacked, as other paths have them.

    Args:
      arrays: as they are.
      wanted: the paths as they should be.
      join: stacks layers.

    Returns:
      Those of `wanted`; the arrays as they are if it asks for what they do not have.

    >>> layers = {f"stack/layers/{i}/up": np.full(2, i) for i in (0, 1)}
    >>> stacked = relayout(layers, ["stack/layers/up"])
    >>> stacked["stack/layers/up"].tolist(), relayout(stacked, ["stack/layers/1/up"])
    ([[0, 0], [1, 1]], {'stack/layers/1/up': array([1, 1])})
    """
    layers: dict[str, list[Any]] = {}
    for path in sorted(arrays, key=lambda path: (layer_of(path) or (0, ""))[0]):
        if layer := layer_of(path):
            layers.setdefault(layer[1], []).append(arrays[path])
    found = {}
    for path in wanted:
        if path in arrays:
            found[path] = arrays[path]
        elif (layer := layer_of(path)) and layer[1] in arrays:
            found[path] = arrays[layer[1]][layer[0]]
        elif path in layers:
            found[path] = join(layers[path])
        else:
            return dict(arrays)
    return found


def layer_of(path: str) -> tuple[int, str] | None:
    """The layer of a parameter whose layers are apart, and its path in the stack.

    >>> layer_of("params/stack/layers/3/up/kernel"), layer_of("params/stack/layers/up/kernel")
    ((3, 'params/stack/layers/up/kernel'), None)
    """
    found = _LAYER.fullmatch(path)
    return found and (int(found[2]), f"{found[1]}{found[3]}")
