"""Measurements in processes of their own, one or several that work together, and their memory."""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sides

from fw.errors import FwError
from fw.options import add_options, read_options

TUNABLES = "glibc.malloc.mmap_threshold=65536"
"""Where memory is measured: blocks from here up are mapped, and unmapped when freed."""


def main(
    description: str | None,
    kind: type,
    measure: Callable[..., dict[str, Any]],
    compare: Callable[[Any], None],
) -> int:
    """The command of a script: `compare(options)`, or in a process of `apart` its `measure`.

    Args:
      description: of the script.
      kind: of its options, a dataclass.
      measure: `measure(options, **one)`, what to print as a row of JSON.
      compare: starts the measurements.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, kind)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement, in this process
    arguments = parser.parse_args()
    try:
        options = read_options(arguments, kind)
        if arguments.one:
            print(json.dumps(measure(options, **json.loads(arguments.one))))
        else:
            compare(options)
    except FwError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 1
    return 0


def apart(
    script: str, options: Any, processes: int = 1, tunables: str | None = None, **one: Any
) -> list[dict[str, Any]]:
    """A measurement in new processes of a script; what each says, a row of JSON.

    Args:
      script: is given `--one=` JSON: `one`, the process's `rank`, the number of `processes` and
        their `address`.
      options: a dataclass of its options.
      processes: that begin together.
      tunables: their `GLIBC_TUNABLES`, or none.
      **one: what to measure.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # that of a test would give each process all devices
    environment.pop("GLIBC_TUNABLES", None)
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    workers = []
    for rank in range(processes):
        where = json.dumps({**one, "rank": rank, "processes": processes, "address": address})
        command = [sys.executable, script, f"--one={where}", *sides.arguments(options)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        workers.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        said = [worker.communicate() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, error) in zip(workers, said, strict=True):
        if worker.returncode:
            raise FwError(f"{one}: status {worker.returncode}\n{error[-2000:]}")
    return [json.loads(text.splitlines()[-1]) for text, _ in said]


def memory(name: str) -> int:
    """Bytes of this process: `VmRSS` now, of it `RssAnon`; `VmHWM` at most since `reset`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise FwError(f"/proc/self/status has no {name}")


def reset() -> int:
    """Forgets the peak; the bytes held now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise FwError(f"the peak of memory cannot be reset here: {error}") from error
    return memory("VmRSS")
