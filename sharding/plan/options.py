"""The compilers' options by chip: what lets communication run beside computation.

A v5e's compiler does so by itself, by fusions that it refuses for other TPUs. Those of a v5p and a
tpu7x have sparse cores, which send while the others compute if they are told to: what a 70B model's
step on 512 v5p waits falls from 6 % to nothing (`scripts/bench/LOG.md`; Google's recipes for tpu7x
do the same). GPUs' compiler has a scheduler for it, which newer versions take unasked.
"""

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh

from sharding.plan.chips import CHIPS

_GPU = MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": True})

_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_KINDS = (
    *("all_gather", "2d_all_gather", "3d_all_gather"),
    *("reduce_scatter", "nd_reduce_scatter", "all_reduce"),
)
_SPARSE = MappingProxyType(
    {_OFFLOAD + kind: True for kind in _KINDS}
    # A gather over a whole slice is else a sum of zeros, with twice the bytes.
    | {"xla_tpu_prefer_async_allgather_to_allreduce": True}
)

OPTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {chip.name: _GPU for chip in CHIPS.values() if chip.platform == "gpu"}
    | {"v5p": _SPARSE, "tpu7x": _SPARSE}
)
"""`compiler_options` of `jax.jit`, by the chip's name; no entry, no options."""


def options_of(mesh: Mesh) -> dict[str, bool] | None:
    """Those of a mesh's devices; None where there are none.

    >>> from sharding import make_mesh
    >>> options_of(make_mesh("data=1")) is None
    True
    """
    kind = mesh.devices.flat[0].device_kind
    names = [chip.name for chip in CHIPS.values() if chip.kind == kind]
    return dict(OPTIONS[names[0]]) if names and names[0] in OPTIONS else None
