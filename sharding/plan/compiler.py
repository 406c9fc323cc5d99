"""The real compilers, each program in a process with a time limit, what they made kept by content.

A program that was compiled once by the same compiler is not compiled again: the cache's folders are
named by what the result depends on.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sharding.plan.hardware import Hardware
from sharding.plan.program import Program
from sharding.plan.worker import CODE, JOB, RESULT, TEXT, TPU
from sharding.program.collectives import Collective
from sharding.program.hlo import Program as Text
from sharding.program.hlo import read
from sharding.program.report import Memory

LIMIT = 600.0
"""Seconds that one program may take."""
GRACE = 5.0
"""Seconds after the end of the time for all, before those that still compile are stopped."""


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a program.

    Attributes:
        folder: where its text and facts are.
        seconds: that it took; 0 of one that was known.
        memory: of one device.
        parameters: the program's arguments, as in `sharding.Report`.
        collectives: what travels.
        coords: where its partitions are.
    """

    folder: Path
    seconds: float
    memory: Memory
    parameters: tuple[dict[str, Any], ...]
    collectives: tuple[Collective, ...]
    coords: np.ndarray

    @cached_property
    def text(self) -> Text:
        """The program, read."""
        return read((self.folder / TEXT).read_text())


@dataclass(frozen=True)
class Refused:
    """Why there is no program.

    Attributes:
        reason: in the compiler's words, or that it took too long.
        needed: bytes of a device that it would have taken, where it says so.
    """

    reason: str
    needed: int | None = None


def cache() -> Path:
    """Where compiled programs are kept: `$FW_CACHE/plan`, or the user's cache directory."""
    home = os.environ.get("FW_CACHE")
    base = (
        Path(home)
        if home
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fw"
    )
    return base / "plan"


def missing(machine: Hardware) -> str | None:
    """What has to be installed before this machine's compiler runs; None if it is there."""
    platform = machine.chip.platform
    if platform == "tpu" and find_spec("libtpu") is None:
        return "libtpu"
    if platform == "gpu" and find_spec("jax_cuda12_plugin") is None:
        return "jax-cuda12-plugin"
    return None


def at_once() -> int:
    """Programs that are compiled at a time: half the cores, since compilers use several."""
    return max(1, (os.cpu_count() or 2) // 2)


def compile_all(
    programs: Sequence[Program],
    *,
    folder: Path | None = None,
    limit: float = LIMIT,
    workers: int | None = None,
    until: float | None = None,
) -> Iterator[tuple[int, Compiled | Refused]]:
    """Compile programs, some at a time; each is given as soon as it is there.

    Args:
        programs: what to compile, the most promising first.
        folder: of what is kept; `cache()` by default.
        limit: seconds of one program.
        workers: processes at a time; `at_once()` by default.
        until: `time.monotonic` after which nothing more is begun.

    Yields:
        The number of a program, and what became of it.
    """
    folder = cache() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    workers = workers or at_once()
    waiting = []
    for number, program in enumerate(programs):
        known = _read(folder / program.key)
        if known is None:
            waiting.append(number)
        else:
            yield number, known
    running: dict[int, tuple[subprocess.Popen, float]] = {}

    def begin() -> None:
        early = until is None or time.monotonic() < until
        while early and waiting and len(running) < workers:
            number = waiting.pop(0)
            running[number] = (_start(programs[number], folder), time.monotonic())

    try:
        begin()
        while running:
            for number, (process, began) in [*running.items()]:
                now = time.monotonic()
                late = now - began > limit or (until is not None and now > until + GRACE)
                if process.poll() is not None:
                    del running[number]
                    yield number, _finish(programs[number], folder, process)
                elif late:
                    del running[number]
                    _stop(process)
                    shutil.rmtree(_temporary(folder, programs[number]), ignore_errors=True)
                    yield number, Refused(f"the compiler took more than {now - began:.0f} s")
            time.sleep(0.05)
            begin()
    finally:
        for number, (process, _) in running.items():
            _stop(process)
            shutil.rmtree(_temporary(folder, programs[number]), ignore_errors=True)


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def _temporary(folder: Path, program: Program) -> Path:
    return folder / f"{program.key}.{os.getpid()}"


def _start(program: Program, folder: Path) -> subprocess.Popen:
    where = _temporary(folder, program)
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    (where / CODE).write_bytes(program.code)
    job = {
        "machine": program.machine, "mesh": program.mesh, "names": program.names,
        "donated": program.donated, "options": dict(program.options),
    }  # fmt: skip
    (where / JOB).write_text(json.dumps(job))
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    with (where / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "sharding.plan.worker", str(where)],
            env=kept
            | TPU
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **_cpus(program)},
            stdout=log,
            stderr=log,
        )


def _cpus(program: Program) -> dict[str, str]:
    if not program.machine.endswith("cpu"):
        return {}
    count = program.machine.removesuffix("cpu").removesuffix("*") or "1"
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def _finish(program: Program, folder: Path, process: subprocess.Popen) -> Compiled | Refused:
    where, place = _temporary(folder, program), folder / program.key
    if not (where / RESULT).exists():
        tail = (where / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        shutil.rmtree(where, ignore_errors=True)
        return Refused(f"the compiler ended with {process.returncode}: {' '.join(tail)[:300]}")
    (where / CODE).unlink()
    if place.exists():
        shutil.rmtree(where)
    else:
        where.replace(place)
    found = _read(place)
    if isinstance(found, Compiled) or (found is not None and found.needed is not None):
        return found
    shutil.rmtree(place)  # too little memory stays so; whatever else went wrong may go well
    return Refused("the compiler's result cannot be read") if found is None else found


def _read(place: Path) -> Compiled | Refused | None:
    try:
        found = json.loads((place / RESULT).read_text())
    except (OSError, ValueError):
        return None
    if "error" in found:
        return Refused(found["error"], found.get("needed"))
    report = found["report"]
    fields = Collective.__dataclass_fields__
    sent = []
    for one in report["collectives"]:
        own: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}
        sent.append(Collective(**{k: v for k, v in own.items() if k in fields}))
    memory = {k: v for k, v in (report["memory"] or {}).items() if k != "peak"}
    return Compiled(
        place, found["seconds"], Memory(**memory), tuple(report["parameters"]), tuple(sent),
        np.array(found["coords"]),
    )  # fmt: skip
