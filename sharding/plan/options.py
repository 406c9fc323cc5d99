"""The compilers' options by chip: what lets communication run beside computation.

A v5e's compiler does so by itself, by fusions that it refuses for other TPUs. These have sparse
cores, which could send while the others compute; what that gains was seen on no chip yet, and is
not asked for (`scripts/bench/LOG.md`). GPUs' compiler has a scheduler for it, which newer versions
take unasked.
"""

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh

from sharding.plan.chips import CHIPS

_GPU = MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": True})

OPTIONS: Mapping[str, Mapping[str, bool]] = MappingProxyType(
    {chip.name: _GPU for chip in CHIPS.values() if chip.platform == "gpu"}
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
