"""Where arrays live: meshes, rules, placement. Useful with any JAX program; see README.md."""

from sharding.context import constrain, scope
from sharding.errors import ShardingError
from sharding.layout import paths, shardings, specs
from sharding.mesh import AXES, format_mesh, make_mesh
from sharding.place import build, create, gather, put
from sharding.rules import ACTIVATIONS, PRESETS, Rules, rules

__all__ = [
    "ACTIVATIONS",
    "AXES",
    "PRESETS",
    "Rules",
    "ShardingError",
    "build",
    "constrain",
    "create",
    "format_mesh",
    "gather",
    "make_mesh",
    "paths",
    "put",
    "rules",
    "scope",
    "shardings",
    "specs",
]
