"""Which processes belong together, as their launcher tells it: environment in, settings out.

Everything a launcher says is in environment variables, so this file decides and touches nothing;
`cluster` acts on it. What the launcher does not know, or knows wrongly, the user says by arguments
or by the same three variables everywhere:

    JAX_COORDINATOR_ADDRESS   host:port of process 0, the address where all meet
    JAX_NUM_PROCESSES         how many they are
    JAX_PROCESS_ID            which of them this is, from 0

A Kubernetes indexed Job numbers its pods, and needs to be told the rest:

    apiVersion: v1
    kind: Service
    metadata: {name: train}
    spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {job-name: train}}
    ---
    apiVersion: batch/v1
    kind: Job
    metadata: {name: train}
    spec:
      completions: 4
      parallelism: 4
      completionMode: Indexed         # gives each pod its JOB_COMPLETION_INDEX
      backoffLimit: 0
      template:
        spec:
          subdomain: train            # the Service: pod 0 is train-0.train
          restartPolicy: Never
          containers:
          - name: train
            image: ...
            env:
            - {name: JAX_COORDINATOR_ADDRESS, value: "train-0.train:8476"}
            - {name: JAX_NUM_PROCESSES, value: "4"}
"""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sharding.errors import ShardingError

ADDRESS, PROCESSES, RANK = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PORT = "JAX_COORDINATOR_PORT"  # for launchers that tell the host; JAX reads it, too
INDEX = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True)
class Settings:
    """What a process knows of its cluster; None where the launcher does not say.

    Attributes:
        found: "explicit", "openmpi", "slurm", "kubernetes" or "tpu".
        address: host:port where the processes meet.
        processes: how many.
        rank: which this is, from 0.
        device: the one accelerator of this host that is this process's; None for all of them.
    """

    found: str
    address: str | None = None
    processes: int | None = None
    rank: int | None = None
    device: int | None = None


def find(
    env: Mapping[str, str],
    *,
    address: str | None = None,
    processes: int | None = None,
    rank: int | None = None,
    tpu: Callable[[], Settings | None] = lambda: None,
) -> Settings | None:
    """Find the cluster of this process.

    Arguments come before the three variables, and these before what the launcher says: Open MPI,
    Slurm, Cloud TPU, Kubernetes, the first of them that is there.

    Args:
        env: `os.environ`.
        address, processes, rank: as in `Settings`.
        tpu: asks JAX for the TPU pod around it.

    Returns:
        Complete settings (only `device` may be None); None if the process is alone, as a cluster
        of one is.

    Raises:
        ShardingError: some of it is known and the rest is not, or makes no sense.

    >>> find({}) is None
    True
    >>> find({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    Settings(found='explicit', address='a:1', processes=2, rank=1, device=None)
    """
    said = Settings(
        "explicit",
        address if address is not None else env.get(ADDRESS) or None,
        processes if processes is not None else _number(env, PROCESSES),
        rank if rank is not None else _number(env, RANK),
    )
    if said.processes == 1:
        return None
    whole = None not in (said.address, said.processes, said.rank)
    told = None if whole else _openmpi(env) or _slurm(env) or tpu() or _kubernetes(env)
    if told is not None:
        count = told.processes if said.processes is None else said.processes
        if count == 1:
            return None
        said = replace(
            told,
            address=said.address or told.address,
            processes=count,
            rank=told.rank if said.rank is None else said.rank,
        )
    elif said == Settings("explicit"):
        return None
    return _check(said, env)


def _check(said: Settings, env: Mapping[str, str]) -> Settings:
    names = {"address": ADDRESS, "processes": PROCESSES, "rank": RANK}
    missing = [name for name in names if getattr(said, name) is None]
    if missing:
        alone = f"; {PROCESSES}=1 if it works alone" if "processes" in missing else ""
        raise ShardingError(
            f"this process is one of several ({_clue(said, names)}), but its "
            f"{' and '.join(missing)} is not known: set "
            f"{', '.join(names[name] for name in missing)}{alone}"
        )
    assert said.address is not None and said.processes is not None and said.rank is not None
    if not re.fullmatch(r".+:\d{1,5}", said.address):
        raise ShardingError(
            f"address {said.address!r}: expected host:port of process 0, as in node-0:8476"
        )
    if not 0 <= said.rank < said.processes:
        raise ShardingError(
            f"rank {said.rank} of {said.processes} processes; expected 0 to {said.processes - 1}"
        )
    return replace(said, device=None if _confined(env) else said.device)


def _clue(said: Settings, names: Mapping[str, str]) -> str:
    if said.found != "explicit":
        return said.found
    known = (f"{n} {getattr(said, n)}" for n in names if getattr(said, n) is not None)
    return ", ".join(known)


def _openmpi(env: Mapping[str, str]) -> Settings | None:
    """`mpirun`, any version; mpirun's own host must be process 0's, or the address be given."""
    rank = _number(env, "OMPI_COMM_WORLD_RANK")
    if rank is None:
        return None
    count = _number(env, "OMPI_COMM_WORLD_SIZE")
    here = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    # JAX reads the URI, too. It ends with version 4; on one host nothing needs to be known.
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    launcher = re.search(r"tcp://(.+?)[,:]|tcp6://(\[.+?)[,\]]", uri)
    host = None
    if count is not None and here == count:
        host = "127.0.0.1"
    elif launcher is not None:
        host = launcher[1] or f"{launcher[2]}]"
    job = env.get("PMIX_NAMESPACE") or uri
    address = f"{host}:{_port(env, job)}" if host else None
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK") if here != 1 else None
    return Settings("openmpi", address, count, rank, local)


def _slurm(env: Mapping[str, str]) -> Settings | None:
    """A task of `srun`; the script of a batch job is none."""
    nodes, rank = env.get("SLURM_STEP_NODELIST"), _number(env, "SLURM_PROCID")
    if not nodes or rank is None:
        return None
    count = _number(env, "SLURM_STEP_NUM_TASKS")
    if count is None:
        count = _number(env, "SLURM_NTASKS")
    alone = _number(env, "SLURM_STEP_NUM_NODES") == 1
    host = "127.0.0.1" if alone else first_host(nodes)
    # Two steps of one job may run at once.
    job = f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
    here = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    one_each = re.fullmatch(r"1(\(x\d+\))?", here)
    local = None if one_each else _number(env, "SLURM_LOCALID")
    return Settings("slurm", f"{host}:{_port(env, job)}", count, rank, local)


def _kubernetes(env: Mapping[str, str]) -> Settings | None:
    """A pod of an indexed Job; see above."""
    rank = _number(env, INDEX)
    return None if rank is None else Settings("kubernetes", rank=rank)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> first_host("n[007-015,020],m1"), first_host("gpu1,gpu2"), first_host("a[1-2]-ib")
    ('n007', 'gpu1', 'a1-ib')
    """
    first = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if first is None:
        raise ShardingError(f"SLURM_STEP_NODELIST: cannot read {nodes!r}; set {ADDRESS}")
    return "".join(part or "" for part in first.groups())


def _port(env: Mapping[str, str], job: str) -> int:
    """The same for all processes of a job, another one for most jobs; above Linux's ephemeral."""
    given = _number(env, PORT)
    return 61440 + zlib.crc32(job.encode()) % 4096 if given is None else given


def _confined(env: Mapping[str, str]) -> bool:
    """Whether somebody else has chosen the accelerators; one shown alone is number 0."""
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return True
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    return any(name in env and "," not in env[name] for name in names)


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "").strip()
    if text and not text.isdecimal():
        raise ShardingError(f"{name}: expected a number from 0, got {text!r}")
    return int(text) if text else None
