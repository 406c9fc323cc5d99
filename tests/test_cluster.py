"""Several processes: found by every launcher, one program, none left waiting for a lost one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fw import run
from fw.cli import main
from sharding import ShardingError
from sharding.processes import cluster
from sharding.processes.find import Settings, find
from sharding.processes.meet import EXIT, Meeting
from sharding.processes.watch import COMPILING, DONE, FAILED, PAUSED, Member, Verdict, judge
from tests import tiny

ROOT = Path(__file__).parents[1]
WORKER = [sys.executable, str(ROOT / "tests" / "workers.py")]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="no mpirun here: apt install openmpi-bin"
)

# --- found ----------------------------------------------------------------------------------------

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "n0:9", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
MPI4 = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_NAMESPACE": "778633217",
    "OMPI_MCA_orte_hnp_uri": "778633216.0;tcp://10.9.0.2,10.8.0.2:51783;tcp6://[fd00::2]:45345",
}  # fmt: skip
MPI5 = {k: v for k, v in MPI4.items() if k != "OMPI_MCA_orte_hnp_uri"}
SLURM = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-04],z1",
    "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "12",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}  # fmt: skip
POD = {"JOB_COMPLETION_INDEX": "2", "JAX_COORDINATOR_ADDRESS": "t-0.t:8476",
       "JAX_NUM_PROCESSES": "4"}  # fmt: skip
PORT = {"JAX_COORDINATOR_PORT": "77"}


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({}, None),
        (EXPLICIT, Settings("explicit", "n0:9", 4, 3)),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "1"}, None),
        ({**MPI4, **PORT}, Settings("openmpi", "10.9.0.2:77", 4, 1, 1)),
        ({**MPI4, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({**MPI4, **PORT, "OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fd00::2,fd00::3]:4"},
         Settings("openmpi", "[fd00::2]:77", 4, 1, 1)),
        ({**MPI4, **PORT, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
         Settings("openmpi", "127.0.0.1:77", 4, 1, 1)),
        ({**MPI4, **PORT, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
         Settings("openmpi", "10.9.0.2:77", 4, 1, None)),
        ({**MPI4, **PORT, "CUDA_VISIBLE_DEVICES": "3"},
         Settings("openmpi", "10.9.0.2:77", 4, 1, None)),
        ({**MPI5, "JAX_COORDINATOR_ADDRESS": "n0:9"}, Settings("openmpi", "n0:9", 4, 1, 1)),
        ({**SLURM, **PORT}, Settings("slurm", "gpu03:77", 6, 5, 1)),
        ({**SLURM, **PORT, **MPI4}, Settings("openmpi", "10.9.0.2:77", 4, 1, 1)),
        ({**SLURM, **PORT, "SLURM_STEP_NUM_NODES": "1"},
         Settings("slurm", "127.0.0.1:77", 6, 5, 1)),
        ({**SLURM, **PORT, "SLURM_STEP_TASKS_PER_NODE": "1(x6)"},
         Settings("slurm", "gpu03:77", 6, 5, None)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "71", "SLURM_NTASKS": "6", "SLURM_PROCID": "0"}, None),  # a batch script
        (POD, Settings("kubernetes", "t-0.t:8476", 4, 2)),
        ({**POD, "JAX_NUM_PROCESSES": "1"}, None),
    ],
)  # fmt: skip
def test_every_launcher_is_understood(env, want):
    assert find(env) == want


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "n0:9"}, r"\(address n0:9\).*set JAX_NUM_PROCESSES, JAX_PROC"),
        ({**EXPLICIT, "JAX_PROCESS_ID": ""}, "its rank is not known: set JAX_PROCESS_ID$"),
        ({"JOB_COMPLETION_INDEX": "2"}, r"\(kubernetes\).*JAX_NUM_PROCESSES=1 if it works alone"),
        (MPI5, r"\(openmpi\).*address is not known: set JAX_COORDINATOR_ADDRESS$"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "4"}, "rank 4 of 4 processes; expected 0 to 3"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID: expected a number from 0, got 'x'"),
        ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "n0"}, "'n0': expected host:port"),
    ],
)
def test_half_of_a_cluster_is_refused(env, message):
    with pytest.raises(ShardingError, match=message):
        find(env)


def test_arguments_come_first_and_jobs_of_one_host_do_not_meet():
    assert find(EXPLICIT, address="n1:8", rank=0) == Settings("explicit", "n1:8", 4, 0)
    jobs = [{**SLURM, "SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)} for j, s in
            ((1, 0), (1, 1), (2, 0))]  # fmt: skip
    ports = {int(str(found.address).split(":")[1]) for found in map(find, jobs) if found}
    assert len(ports) == 3
    assert all(61440 <= port < 65536 for port in ports)


def test_a_tpu_pod_is_found_by_jax(monkeypatch):
    """Of hosts that are named in the environment, as on GKE; the chips are pretended."""
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,localhost")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    for name in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS"):
        monkeypatch.setenv(f"MEGASCALE_{name}", "")  # or the machine's metadata would be asked
    found = find(os.environ, tpu=cluster._tpu)
    assert found is not None
    assert (found.found, found.processes, found.rank) == ("tpu", 2, 1)
    assert str(found.address).startswith("localhost:")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert find(os.environ, tpu=cluster._tpu) is None


def test_jax_must_not_have_been_used(monkeypatch):
    monkeypatch.setattr(cluster, "_started", [])
    jax.devices()
    with pytest.raises(ShardingError, match="JAX has been used already"):
        cluster.start("127.0.0.1:1", 2, 0)


# --- met ------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def meeting(address, processes, rank, within=0.5):
    return Meeting(address, processes, rank, timeout=5, stall=5, interval=0.1, within=within)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_nobody_at_the_address(host):
    address = f"{host}:{free_port()}"
    with pytest.raises(ShardingError, match=rf"rank 1: {address} did not answer within 0.5 s"):
        meeting(address, 2, 1).join()


def test_who_did_not_come_is_named():
    address = f"127.0.0.1:{free_port()}"
    joined: list[BaseException] = []

    def come():
        try:
            meeting(address, 4, 2, within=10).join()
        except ShardingError as error:
            joined.append(error)

    other = threading.Thread(target=come)
    other.start()
    with pytest.raises(ShardingError, match=r"rank 1, 3 of 4 did not come to .* within 1.5 s"):
        meeting(address, 4, 0, within=1.5).join()
    other.join()
    assert "closed the connection: rank 0 has ended" in str(joined)


def test_who_does_not_belong_is_refused_and_a_stranger_does_no_harm():
    address = f"127.0.0.1:{free_port()}"
    errors: list[BaseException] = []

    def host():
        try:
            meeting(address, 3, 0, within=4).join()
        except ShardingError as error:
            errors.append(error)

    zero = threading.Thread(target=host)
    zero.start()
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", int(address.split(":")[1]))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(10) == b""
    with pytest.raises(ShardingError, match="rank 1 counts 2 processes, rank 0 3"):
        meeting(address, 2, 1).join()
    for _ in range(2):  # who gives up may come again
        with pytest.raises(ShardingError, match="did not answer"):
            meeting(address, 3, 1, within=0.3).join()
    with pytest.raises(ShardingError, match="rank 0 is there already, as pid"):
        # As a second process with the same rank would.
        twin = meeting(address, 3, 1, within=3)
        twin.rank = 0
        twin._host = twin._visit
        twin.join()
    with pytest.raises(ShardingError, match=r"rank 0 cannot listen at port \d+ of .*in use"):
        meeting(address, 3, 0).join()
    zero.join()
    assert "rank 1, 2 of 3 did not come" in str(errors)


# --- judged ---------------------------------------------------------------------------------------


def member(rank, *, beats=9, heard=100.0, moved=100.0, **more):
    return Member(rank, "h", rank, step=5, beats=beats, heard=heard, moved=moved, **more)


BROKEN = {"state": FAILED, "note": "ValueError: UNKNOWN: Gloo", "own": False}


@pytest.mark.parametrize(
    ("members", "want"),
    [
        ([member(0), member(1)], None),
        ([member(0), member(1, gone=True)], Verdict(1, "died")),
        ([member(0, **BROKEN), member(1, gone=True)], Verdict(1, "died")),
        ([member(0), member(1, gone=True, state=DONE)], None),
        ([member(0), member(1, heard=69)], Verdict(1, "does not answer; it died, was stopped or is "
                                                      "stuck")),
        ([member(0), member(1, heard=71)], None),
        # One a beat behind and at a stand while another waits.
        ([member(0, moved=54), member(1, beats=8, moved=54, at="a.py:1 (f)")],
         Verdict(1, "hangs in a.py:1 (f)")),
        ([member(0, moved=56), member(1, beats=8, moved=54)], None),
        ([member(0, moved=54), member(1, beats=8, moved=56)], None),
        ([member(0, moved=0), member(1, moved=0)], None),  # all compile, evaluate or save
        ([member(0, moved=0), member(1, beats=8, moved=0, state=COMPILING)], None),
        ([member(0, moved=0), member(1, beats=8, moved=0, state=PAUSED)], None),
        ([member(0, moved=0), member(1, moved=0, beats=8, state=PAUSED),
          member(2, beats=8, moved=0)], None),
        ([member(0, moved=0), member(1, beats=8, moved=0, waits=True),
          member(2, beats=8, moved=0, at="b.py:2 (g)")], Verdict(2, "hangs in b.py:2 (g)")),
        ([member(0, moved=0), member(1, beats=8, moved=0, state=DONE)],
         Verdict(1, "ended before the others")),
        # Failures: one's own soon, a broken collective only when no loss explains it in time.
        ([member(0), member(1, state=FAILED, note="KeyError: 1", moved=98)],
         Verdict(1, "failed: KeyError: 1")),
        ([member(0), member(1, state=FAILED, note="KeyError: 1", moved=99)], None),
        ([member(0, moved=90), member(1, moved=90, **BROKEN)], None),
        ([member(0), member(1, moved=69, **BROKEN)],
         Verdict(1, "failed: ValueError: UNKNOWN: Gloo")),
        ([member(0, moved=60, **BROKEN), member(1, state=FAILED, note="KeyError: 1", moved=65),
          member(2)], Verdict(1, "failed: KeyError: 1")),
        ([member(0, moved=69, **BROKEN), member(1, moved=69, state=DONE)],
         Verdict(1, "ended before the others")),
        ([member(0, moved=0, **BROKEN), member(1, moved=0, **BROKEN)], None),
    ],
)  # fmt: skip
def test_who_is_lost(members, want):
    assert judge(members[::-1], 100.0, timeout=30, stall=45) == want


def test_one_that_was_stuck_itself_blames_nobody():
    stuck = meeting("127.0.0.1:1", 2, 0)
    now = time.monotonic()
    stuck.members = {r: member(r, heard=now - 9, moved=now - 9) for r in (0, 1)}
    stuck._judged = now - 9  # a C extension has held the interpreter since
    stuck._judge()
    assert not stuck._settled
    assert all(m.heard > now - 1 for m in stuck.members.values())


# --- for real -------------------------------------------------------------------------------------


def environment(**more):
    """Of a child: without this test's devices and launcher."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COORDINATOR_PORT")}
    return {**env, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}


class Processes:
    """A cluster of processes that are told who they are, each with its log."""

    def __init__(self, folder, count, command):
        address = f"127.0.0.1:{free_port()}"
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(count)]
        self.children = []
        for rank, log in enumerate(self.logs):
            env = environment(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count),
                              JAX_PROCESS_ID=str(rank))  # fmt: skip
            with log.open("wb") as file:
                self.children.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=ROOT)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.kill()
            child.wait()

    def wait(self, seconds=240, besides=()):
        """The exit statuses by rank; of all that are not in `besides`."""
        deadline = time.monotonic() + seconds
        waited = [r for r in range(len(self.children)) if r not in besides]
        try:
            for rank in waited:
                self.children[rank].wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(log.read_text() for log in self.logs))
        return {rank: self.children[rank].returncode for rank in waited}

    def lines(self, rank):
        """What it said, without gloo."""
        return [x for x in self.logs[rank].read_text().splitlines() if not x.startswith("[Gloo]")]


def worker(**options):
    return [*WORKER, json.dumps(options)]


SOON = {"timeout": 4.0, "stall": 4.0, "interval": 0.2}


def assert_all_add_up(text, found, processes, devices):
    facts = {"found": found, "processes": processes, "devices": devices}
    assert json.loads(next(x for x in text.splitlines() if x.startswith("{"))) == facts
    assert sorted(re.findall(r"rank (\d) ended", text)) == [str(r) for r in range(processes)]


def test_two_processes_with_an_address_of_which_one_pauses(tmp_path):
    """For longer than it could hang; each makes its rows only; and they end without `stop`."""
    work = {"steps": 6, "victim": 0, "at": 3, "how": "pause", "seconds": 6, "rows": 16}
    command = worker(devices=4, start=SOON, work=work, guarded=False)
    with Processes(tmp_path, 2, command) as both:
        assert both.wait() == {0: 0, 1: 0}
    assert_all_add_up("\n".join(both.lines(0) + both.lines(1)), "explicit", 2, 8)
    for rank in (0, 1):  # each part once, though two arrays want it
        rows = [(row, row + 2) for row in range(8 * rank, 8 * rank + 8, 2)]
        assert f"rank {rank} took {rows}" in both.lines(rank)


@needs_mpirun
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 1)])
def test_mpirun(processes, devices):
    done = subprocess.run(
        [*MPIRUN, "-n", str(processes), *worker(devices=devices)],
        capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_all_add_up(done.stdout, "openmpi", processes, processes * devices)
    assert done.stderr == ""


@needs_mpirun
def test_mpirun_of_one_is_alone():
    code = "from sharding.processes.cluster import start; print(start().found)"
    done = subprocess.run(
        [*MPIRUN, "-n", "1", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, env=environment(), cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout == "alone\n"


def assert_named(processes, survivors, victim, how):
    for rank in survivors:
        said = [x for x in processes.lines(rank) if not x.startswith("{")]
        assert len(said) == 1, said
        assert re.fullmatch(
            rf"sharding: rank {victim} on {socket.gethostname()} \(pid \d+\) {how}; its last "
            rf"known step was \d+; this is rank {rank} on \S+, at step \d+; ending\. Resume from "
            r"the last checkpoint\.",
            said[0],
        ), said


@pytest.mark.parametrize(
    ("processes", "victim", "what", "how", "status"),
    [
        (4, 2, "SIGKILL", "died", -signal.SIGKILL),
        (3, 0, "SIGKILL", "died", -signal.SIGKILL),
        (3, 1, "SIGSTOP", "does not answer; it died, was stopped or is stuck", None),
        (2, 0, "SIGSTOP", "does not answer; it died, was stopped or is stuck", None),
        (2, 1, "loop", r"hangs in workers\.py:\d+ \(befall\)", EXIT),
        (2, 0, "raise", "failed: KeyError: .*a bug.*of one rank'", 1),
        (2, 1, "exit", "ended before the others", EXIT),
    ],
)
def test_if_one_is_lost_the_others_name_it_and_end(tmp_path, processes, victim, what, how, status):
    command = worker(start=SOON, work={"steps": 500, "victim": victim, "at": 12, "how": what})
    with Processes(tmp_path, processes, command) as several:
        ended = several.wait(besides=() if status is not None else (victim,))
    survivors = [r for r in range(processes) if r != victim]
    assert {rank: ended[rank] for rank in survivors} == dict.fromkeys(survivors, EXIT)
    assert ended.get(victim) == status
    assert_named(several, survivors, victim, how)


def test_an_error_that_all_have_is_told_once(tmp_path):
    command = worker(start=SOON, work={"steps": "not a number"})
    with Processes(tmp_path, 2, command) as both:
        assert both.wait() == {0: 1, 1: 1}
    assert both.lines(0)[-1].startswith("TypeError")
    assert both.lines(1) == []


@needs_mpirun
def test_under_mpirun_the_lost_one_is_named_too():
    work = {"steps": 500, "victim": 1, "at": 40, "how": "SIGKILL"}  # after a sign of life or two
    done = subprocess.run(
        [*MPIRUN, "-n", "3", *worker(work=work)],
        capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(r"^sharding: rank 1 on \S+ \(pid \d+\) died; its last", done.stderr, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["SIGSTOP", "loop"])
@pytest.mark.parametrize("victim", [0, 1])
def test_within_a_minute_by_default(tmp_path, what, victim):
    command = worker(work={"steps": 500, "victim": victim, "at": 40, "how": what})
    with Processes(tmp_path, 2, command) as both:
        while not any("pid" in line for line in both.lines(victim)):
            assert both.children[victim].poll() is None, both.lines(victim)
            time.sleep(0.05)
        assert both.wait(60, besides=(victim,)) == {1 - victim: EXIT}


# --- fine-tuning ----------------------------------------------------------------------------------

FW = [sys.executable, "-c", "import sys; from fw.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster")
    tiny.make_model(root / "model")
    tiny.make_ner(root / "ner", (64, 16, 16))
    return root


def words(world, folder, mesh, *more):
    options = ("--task", "ner", "--length", "32", "--learning-rate", "1e-2", "--precision", "f32",
               "--steps", "24", "--evaluate-every", "8", "--log-every", "1")  # fmt: skip
    where = ("--model", world / "model", "--data", world / "ner", "--run", world / folder)
    return [str(word) for word in ("finetune", *options, *where, "--mesh", mesh, *more)]


@pytest.fixture(scope="module")
def one(world):
    """The run of one process."""
    assert main(words(world, "one", "data=1")) == 0
    return world / "one"


def figures(folder):
    names = ("loss", "grad_norm", "tokens", "value")
    return [
        (record["kind"], record["step"], *(record[n] for n in names if n in record))
        for record in run.metrics(folder)
    ]


def assert_same_figures(folder, other):
    a, b = figures(folder), figures(other)
    assert [row[:2] for row in a] == [row[:2] for row in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x[2:], y[2:], rtol=1e-5, err_msg=str(x[:2]))


@needs_mpirun
def test_finetune_with_mpirun_gives_the_figures_of_one_process(world, one, capsys):
    done = subprocess.run(
        [*MPIRUN, "-n", "2", *FW, *words(world, "two", "data=2")],
        capture_output=True, text=True, timeout=600, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_figures(world / "two", one)
    assert run.starts(world / "two")[0]["devices"]["processes"] == 2
    # One process alone prints: each line of progress once, and nothing of the runtime's.
    steps = re.findall(r"^step (\d+)/24  loss", done.stderr, re.M)
    assert steps == [str(step) for step in range(1, 25)]
    capsys.readouterr()
    assert main(["eval", str(world / "two")]) == 0
    assert done.stdout == f"test\n{capsys.readouterr().out}{world / 'two'}/report.html\n"


@pytest.mark.slow
@needs_mpirun
def test_killed_among_four_and_resumed_by_two(world, one, tmp_path):
    folder = world / "killed"
    with Processes(tmp_path, 4, [*FW, *words(world, "killed", "data=4")]) as four:
        deadline = time.monotonic() + 600
        log = folder / run.METRICS
        while not (log.exists() and '"step": 11,' in log.read_text()):
            assert time.monotonic() < deadline, four.lines(0)
            time.sleep(0.001)
        four.children[3].kill()
        assert four.wait(60) == {0: EXIT, 1: EXIT, 2: EXIT, 3: -signal.SIGKILL}
    for rank in range(3):
        assert sum("sharding: rank 3 on" in line for line in four.lines(rank)) == 1
    assert len(four.lines(1)) == 1
    saved = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()]
    assert 8 <= max(saved) < 24

    done = subprocess.run(
        [*MPIRUN, "-n", "2", *FW, *words(world, "killed", "data=2", "--resume")],
        capture_output=True, text=True, timeout=600, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {max(saved)}" in done.stderr
    assert_same_figures(folder, one)
    assert [s["devices"]["processes"] for s in run.starts(folder)] == [4, 2]


# --- Slurm ----------------------------------------------------------------------------------------

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture
def slurm():
    """A Slurm of one machine, of the test's own."""
    tools = ("munged", "slurmctld", "slurmd", "srun")
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd and munged are started as root")
    # Not tmp_path: a socket's name is short.
    folder = Path("/tmp") / f"slurm-{os.getpid()}"
    for name in ("spool", "state"):
        (folder / name).mkdir(parents=True)
    ports = [free_port(), free_port()]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, ports=ports))
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    env = environment(SLURM_CONF=str(conf), PATH=path)
    munge = [f"--{k}={folder}/munge.{k.split('-')[0]}" for k in ("socket", "pid-file", "log-file",
                                                                 "seed-file")]  # fmt: skip
    commands = (
        ["munged", "--force", "--foreground", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    )
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as log:
                daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            time.sleep(1)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder)


@pytest.mark.slow
def test_srun(slurm):
    done = subprocess.run(
        ["srun", "-n", "2", *worker(devices=2)],
        capture_output=True, text=True, timeout=240, env=slurm, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_all_add_up(done.stdout, "slurm", 2, 4)
