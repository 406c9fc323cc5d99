"""What a process must settle about its machine before JAX starts: devices and memory.

The `fw` command and the scripts call `prepare` first. A program that only imports fw decides for
itself.
"""

import math
import os
import platform
import re
import sys

import jax

# XLA allocates a step's temporaries anew each time. glibc gives such blocks back to the kernel and
# faults them in again in pages of 4 KiB: a quarter of a training step's time on a CPU. Kept in the
# process, in huge pages, they cost nothing (scripts/bench/LOG.md). Read only when a process starts.
MALLOC = ":".join(
    [
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=1099511627776",
        "glibc.malloc.top_pad=268435456",
    ]
)
"""The `GLIBC_TUNABLES` that `prepare` sets."""


def prepare(mesh: str = "") -> None:
    """Prepares the process; on Linux with glibc, by starting it once more.

    Call it before anything else. `GLIBC_TUNABLES` set by the user, if only to the empty string, is
    left alone.

    Args:
      mesh: a mesh spec as for `sharding.make_mesh`. If JAX runs on a CPU, it is given as many
        virtual devices as the sizes multiply to.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sizes = [int(n) for n in re.findall(r"=\s*(\d+)", mesh)]
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if math.prod(sizes) > 1 and not forced:
        jax.config.update("jax_num_cpu_devices", math.prod(sizes))
