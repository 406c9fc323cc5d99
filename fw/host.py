"""What a process must settle before JAX starts: memory, the other processes, devices.

The `fw` command and the scripts call `prepare` first. A program that only imports fw decides for
itself.
"""

import math
import os
import platform
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports JAX, which would be in vain before `restart`
    from sharding.processes.cluster import Cluster

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


def prepare(mesh: str = "") -> "Cluster":
    """Prepares the process: `restart` for memory, `join` for the others and the mesh.

    Args:
      mesh: a mesh spec as for `sharding.make_mesh`.

    Returns:
      The cluster; what follows belongs under its `guard`.

    Raises:
      sharding.ShardingError: as `join` does.
    """
    restart()
    return join(mesh)


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


def join(mesh: str = "") -> "Cluster":
    """Joins the other processes that a launcher has started, if any; then only rank 0 prints.

    Args:
      mesh: a mesh spec as for `sharding.make_mesh`, over the devices of all.

    Raises:
      sharding.ShardingError: there are others, but they cannot be joined.
    """
    from sharding.processes.cluster import start

    cluster = start()
    virtual_devices(mesh, cluster.processes)
    if cluster.processes > 1:
        _hush(cluster.rank)
    return cluster


def virtual_devices(mesh: str, processes: int = 1) -> None:
    """If JAX runs on a CPU, gives it as many devices as a mesh has places.

    Call it before JAX is first used. A number of devices that the user has set stays.

    Args:
      mesh: a mesh spec as for `sharding.make_mesh`.
      processes: how many share the mesh.
    """
    import jax

    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    needed = math.prod(int(n) for n in re.findall(r"=\s*(\d+)", mesh)) // processes
    if needed > 1 and not forced and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", needed)


def _hush(rank: int) -> None:
    """Leaves stdout to what rank 0 prints in Python; gloo writes there from C++, in every rank."""
    sys.stdout.flush()
    if rank == 0:
        old = sys.stdout
        sys.stdout = os.fdopen(
            os.dup(1), "w", encoding=old.encoding, errors=old.errors,
            buffering=1 if old.isatty() else -1,
        )  # fmt: skip
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
