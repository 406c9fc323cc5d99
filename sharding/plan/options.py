"""The compilers' options by chip: what overlaps communication with computation.

Only what was measured to help is here; `scripts/bench/LOG.md` has the rest.
"""

from collections.abc import Mapping
from types import MappingProxyType

OPTIONS: Mapping[str, dict[str, str]] = MappingProxyType(
    {
        "h100": {"xla_gpu_enable_latency_hiding_scheduler": "true"},
        "h200": {"xla_gpu_enable_latency_hiding_scheduler": "true"},
        "a100": {"xla_gpu_enable_latency_hiding_scheduler": "true"},
        "b200": {"xla_gpu_enable_latency_hiding_scheduler": "true"},
    }
)
"""`compiler_options` of `jax.stages.Lowered.compile`, by the chip's name."""
