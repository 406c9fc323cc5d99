"""What a process must settle about its machine before JAX starts: devices and memory.

The `fw` command and the scripts call `prepare` first. A program that only imports fw decides for
itself.
"""

import math
import os
import platform
import re
import sys

# XLA allocates a step's temporaries anew each time. glibc gives such blocks back to the kernel and
# faults them in again in pages of 4 KiB: a fifth of a training step's time on a CPU. Kept in the
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
    """Prepares the process: `restart` for memory, `virtual_devices` for the mesh.

    Args:
      mesh: a mesh spec as for `sharding.make_mesh`.
    """
    restart()
    virtual_devices(mesh)


def restart() -> None:
    """On Linux with glibc, starts the process once more with the memory settings of above.

    Call it before anything else, imports included: they are done again. The command line stays as
    it was, and so does `GLIBC_TUNABLES` if the user has set it, if only to the empty string. A
    prompt, or a program that comes through standard input, cannot be started again and goes on.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    if sys.argv[0] in ("", "-"):
        return
    os.environ["GLIBC_TUNABLES"] = MALLOC
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def virtual_devices(mesh: str) -> None:
    """If JAX runs on a CPU, gives it as many devices as a mesh has places.

    Call it before JAX is first used. A number of devices that the user has set stays.

    Args:
      mesh: a mesh spec as for `sharding.make_mesh`.
    """
    import jax

    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    needed = math.prod(int(n) for n in re.findall(r"=\s*(\d+)", mesh))
    if needed > 1 and not forced and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", needed)
