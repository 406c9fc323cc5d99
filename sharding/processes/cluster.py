"""Several processes as one program: found, joined, and none left waiting for one that is lost.

Call `start` first. It finds the cluster (`find`), meets the others (`meet`), and starts JAX's
runtime; alone, it does nothing. From then on the processes watch each other: if one dies or hangs,
all others say which, where and after what step, and end within a minute, for an SPMD program cannot
go on without it. Train under `guard`, and call `beat` as you go:

    cluster = sharding.start()
    with cluster.guard():
        for step in range(steps):
            batch = batches(step)
            sharding.beat(step)  # right before the call in which one may wait for the others
            state = train_step(state, batch)

`mpirun -n 4 python train.py`, `srun python train.py`, a Kubernetes Job or a TPU pod need no more;
everywhere else, three environment variables do. See `find`.
"""

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from sharding.errors import ShardingError
from sharding.processes import watch
from sharding.processes.find import Settings, find
from sharding.processes.meet import LOOPBACK, Meeting, end

_NO_PROXY = ("no_grpc_proxy", "no_proxy", "NO_PROXY")  # gRPC reads the first that is set
_FAR = 600  # seconds; JAX's own watch, which ends a process from C++, must come after this one


@dataclass(frozen=True)
class Cluster:
    """The processes that run this program together.

    Attributes:
        rank: this process, from 0.
        processes: how many there are.
        host: this process's.
        found: how: "alone", "explicit", "openmpi", "slurm", "kubernetes" or "tpu".
    """

    rank: int
    processes: int
    host: str
    found: str
    _meeting: Meeting | None = field(default=None, repr=False, compare=False)

    def beat(self, step: int | None = None) -> None:
        """Says that this process goes on; costs nothing.

        All processes make the same calls in the same order, one right before each call in which
        they may wait for each other: a step, the fetching of its results, a checkpoint. One that
        hangs is then a beat behind those that wait, and after `stall` seconds of that it is lost.

        Args:
            step: the step it is at, to be named should it be lost; None leaves it.
        """
        if self._meeting is not None:
            if step is not None:
                self._meeting.me.step = step
            self._meeting.me.beats += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it, this process may take its time while the others wait, say for a report.

        >>> with start().pause():
        ...     pass
        """
        if self._meeting is None:
            yield
            return
        me = self._meeting.me
        before, me.state = me.state, watch.PAUSED
        try:
            yield
        finally:
            if me.state == watch.PAUSED:
                me.state = before

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around the program's work: an exception in one process ends the others too.

        Whoever has lost a peer learns it as a broken collective, a moment before it is known whose
        fault that is. So an exception waits here until it is. A peer's fault ends this process with
        a line that names the peer. Its own fault, and one that all have alike, is raised as it is;
        of those that have the same, only rank 0 raises and the others end in silence.

        >>> with start().guard():
        ...     raise KeyError("alone, an exception passes")
        Traceback (most recent call last):
        ...
        KeyError: 'alone, an exception passes'
        """
        try:
            yield
        except BaseException as error:
            passes = isinstance(error, GeneratorExit) or (
                isinstance(error, SystemExit) and not error.code
            )
            if self._meeting is not None and not passes:
                _fail(self._meeting, error)
            raise

    def stop(self) -> None:
        """Ends it before the process ends, which does it too; waits for the others."""
        if self._meeting is not None:
            _done(self._meeting)
            jax.distributed.shutdown()


_started: list[Cluster] = []  # one at most: JAX's runtime is one per process, too


def start(
    address: str | None = None,
    processes: int | None = None,
    rank: int | None = None,
    *,
    timeout: float = 30.0,
    stall: float = 45.0,
    interval: float = 1.0,
    within: float = 300.0,
) -> Cluster:
    """Join the other processes of this program, before JAX is used.

    On CPUs the processes compute together by gloo. Of the accelerators of a host with several
    processes, each takes the one that the launcher's numbers give it, unless JAX_LOCAL_DEVICE_IDS
    says otherwise. The others reach process 0 at its address and need no other port of it.

    Args:
        address: host:port of process 0.
        processes: how many.
        rank: which this is; None for any of the three asks the environment, see `find`.
        timeout: seconds of silence after which a process is lost.
        stall: seconds for which a process may stand still while another waits; see `Cluster.beat`.
        interval: seconds between signs of life.
        within: seconds for all to come.

    Returns:
        The cluster; a second call returns the first's.

    Raises:
        ShardingError: JAX has been used already; something is known of a cluster but not all; the
            others did not come, or the address is wrong.

    >>> start().found, start().processes
    ('alone', 1)
    """
    if _started:
        return _started[0]
    settings = find(os.environ, address=address, processes=processes, rank=rank, tpu=_tpu)
    if settings is None:
        _started.append(Cluster(0, 1, socket.gethostname(), "alone"))
        return _started[0]
    assert settings.address is not None
    assert settings.processes is not None and settings.rank is not None
    if _jax_is_used():
        raise ShardingError(
            "start: JAX has been used already, so it cannot join the other processes: call it "
            "before the first array, jax.devices() or jax.process_index()"
        )
    meeting = Meeting(
        settings.address, settings.processes, settings.rank,
        timeout=timeout, stall=stall, interval=interval, within=within,
    )  # fmt: skip
    meeting.join()
    # Registered after JAX's own, so it runs before that, which waits for the others.
    atexit.register(_leave, meeting)
    _initialize(settings, meeting.runtime)
    if settings.found == "openmpi":
        _outlive_mpirun()
    _started.append(
        Cluster(settings.rank, settings.processes, meeting.me.host, settings.found, meeting)
    )
    return _started[0]


def beat(step: int | None = None) -> None:
    """`Cluster.beat` of this process's cluster, for libraries; without one, nothing.

    >>> beat(0)
    """
    for cluster in _started:
        cluster.beat(step)


def _initialize(settings: Settings, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_check_proxy_envs", False)
    # Or gRPC would ask a proxy for this host's own loopback, and JAX would hang.
    before = next((os.environ[name] for name in _NO_PROXY if name in os.environ), "")
    os.environ[_NO_PROXY[0]] = f"{before},{LOOPBACK}".lstrip(",")
    jax.distributed.initialize(
        f"{LOOPBACK}:{port}",
        settings.processes,
        settings.rank,
        local_device_ids=None if settings.device is None else [settings.device],
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{LOOPBACK}:{port}",
        heartbeat_timeout_seconds=_FAR,
        initialization_timeout=_FAR,
        shutdown_timeout_seconds=_FAR,
    )


def _outlive_mpirun() -> None:
    """When a process dies, mpirun ends the others in the same moment, before they can say whose
    fault it is. A handler in Python does not run while the program waits for the others, so there
    the watch has the last word; elsewhere it ends the program as always."""

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    usual = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


def _fail(meeting: Meeting, error: BaseException) -> None:
    """Tells the others of an exception; returns if it is to be raised."""
    me = meeting.me
    if me.state == watch.FAILED:
        return
    me.note, me.own = watch.describe(error), watch.is_own(error)
    me.state = watch.FAILED
    meeting.tell()
    try:
        found = meeting.outcome.result(2 * meeting.timeout)
    except TimeoutError:
        return
    if found is None and meeting.rank != 0 and meeting.members[0].note == me.note:
        end("", 1)


def _done(meeting: Meeting) -> None:
    if meeting.me.state != watch.FAILED:
        meeting.me.state = watch.DONE
        meeting.tell()


def _leave(meeting: Meeting) -> None:
    """At exit: in good order, or without waiting for anybody."""
    error = getattr(sys, "last_exc", None)  # what has ended this process, if nobody caught it
    if error is not None:
        _fail(meeting, error)
    _done(meeting)
    if meeting.me.state == watch.FAILED:
        end("", 130 if meeting.me.note.startswith("KeyboardInterrupt") else 1)


def _jax_is_used() -> bool:
    # No public way to ask. jax.distributed.initialize does, but only after all have met.
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _tpu() -> Settings | None:
    """The TPU pod around this process, found by JAX, which alone knows where to ask for it."""
    # No public way to ask without joining at once, which would fail where there is no pod.
    from jax._src import clusters

    for kind in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if kind.is_env_present():
            count = kind.get_process_count()
            if count == 1:
                return Settings("tpu", processes=1)
            address = kind.get_coordinator_address(timeout_secs=300, override_coordinator_port=None)
            return Settings("tpu", address, count, kind.get_process_id())
    return None
