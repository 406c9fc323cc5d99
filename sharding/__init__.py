"""Where arrays live: meshes, rules, placement. Useful with any JAX program; see README.md."""

from sharding.context import constrain, current, cutting, scope, undifferentiated
from sharding.errors import ShardingError
from sharding.layout import paths, shardings, specs
from sharding.mesh import AXES, format_mesh, make_mesh
from sharding.names import names, unboxed
from sharding.parallel import averages, tables
from sharding.parallel.experts import experts
from sharding.parallel.halo import windowed
from sharding.parallel.linear import linear, lookup
from sharding.parallel.pipeline import bubble, pipeline
from sharding.parallel.ring import ring_attention
from sharding.parallel.routing import balance_loss, route, usage, z_loss
from sharding.parallel.topk import top_k
from sharding.parallel.words import word_losses
from sharding.place import build, create, fill, gather, put
from sharding.plan.plan import plan
from sharding.processes.cluster import Cluster, beat, start
from sharding.program import Collective, ContractError, Memory, Report, contract, inspect
from sharding.rules import ACTIVATIONS, PRESETS, Rules, rules
from sharding.shard import Sharded, shard
from sharding.visualize import Picture, visualize

__all__ = [
    "ACTIVATIONS",
    "AXES",
    "PRESETS",
    "Cluster",
    "Collective",
    "ContractError",
    "Memory",
    "Picture",
    "Report",
    "Rules",
    "Sharded",
    "ShardingError",
    "averages",
    "balance_loss",
    "beat",
    "bubble",
    "build",
    "constrain",
    "contract",
    "create",
    "current",
    "cutting",
    "experts",
    "fill",
    "format_mesh",
    "gather",
    "inspect",
    "linear",
    "lookup",
    "make_mesh",
    "names",
    "paths",
    "pipeline",
    "plan",
    "put",
    "ring_attention",
    "route",
    "rules",
    "scope",
    "shard",
    "shardings",
    "specs",
    "start",
    "tables",
    "top_k",
    "unboxed",
    "undifferentiated",
    "usage",
    "visualize",
    "windowed",
    "word_losses",
    "z_loss",
]
