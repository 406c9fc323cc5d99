"""A run moves to another mesh, or to other processes, and goes on as if it had not."""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fw.checkpoint import Checkpoints
from fw.data import Batches, feed
from fw.models.bert import BertConfig, bert
from fw.optimizer import AdamW, optimizer, state_shardings
from fw.step import TrainState, initial_state, make_step
from fw.tasks import cross_entropy
from sharding import ShardingError, create, gather, make_mesh, paths, rules, shardings
from sharding.processes.cluster import start

ROOT = Path(__file__).parents[1]
RULES = rules()
HOME, BEFORE, STEPS = "data=4,fsdp=2", 10, 30
MESHES = (HOME, "tensor=2", "fsdp=8", "data=1", "sequence=2,tensor=2", "data=2,expert=2")
ROWS, SIZE, LENGTH = 44, 8, 16
MODEL = bert(
    BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, num_labels=3, task="token_classification",
        max_position_embeddings=LENGTH,
    )
)  # fmt: skip
TX = optimizer(AdamW(learning_rate=3e-3), STEPS)


def make_batches():
    """Rows that carry their number; they fill five batches and a half."""
    random = np.random.default_rng(5)
    ids = random.integers(0, 48, (ROWS, LENGTH), dtype=np.int32)
    filled = np.arange(LENGTH) < random.integers(4, LENGTH + 1, (ROWS, 1))
    rows = {
        "input_ids": ids,
        "segment_ids": filled.astype(np.int32),
        "position_ids": np.where(filled, np.arange(LENGTH), 0).astype(np.int32),
        "labels": np.where(filled, ids % 3, -1).astype(np.int32),
        "row": np.arange(ROWS, dtype=np.int32),
    }
    return Batches(rows, SIZE, seed=3)


def abstract_state(mesh):
    """What a state looks like on a mesh, with no array made."""
    abstract = jax.eval_shape(MODEL.init, jax.random.key(0))
    lie = shardings(MODEL.axes, abstract, mesh, RULES)
    moments = state_shardings(TX, abstract["params"], lie["params"], mesh)
    everywhere = jax.NamedSharding(mesh, jax.P())
    first = jax.ShapeDtypeStruct((), np.int32)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        TrainState(first, abstract, jax.eval_shape(TX.init, abstract["params"])),
        TrainState(everywhere, lie, moments),
    )


@functools.cache
def step_on(mesh):
    return make_step(MODEL, cross_entropy, TX, mesh=mesh, rules=RULES)


def go_on(state, mesh, stop):
    """Steps up to `stop`: the state, the losses, and for each step {place in the batch: row}."""
    step, batches, losses, rows = step_on(mesh), make_batches(), [], []
    for index in range(int(state.step), stop):
        batch = feed(batches, index, mesh, RULES)
        rows.append(
            {
                place: int(row)
                for shard in batch["row"].addressable_shards
                for place, row in zip(
                    range(SIZE)[shard.index[0]], np.asarray(shard.data), strict=True
                )
            }
        )
        state, measured = step(state, batch)
        losses.append(float(measured["loss"]))
    return state, losses, rows


def in_order(rows):
    return [step[place] for step in rows for place in range(SIZE)]


def copied(state):
    """{path: array}, apart from the devices' memory."""
    return dict(zip(paths(state), map(np.array, jax.tree.leaves(gather(state))), strict=True))


def assert_same_bits(state, expected):
    for path, leaf in zip(paths(state), jax.tree.leaves(state), strict=True):
        assert leaf.dtype == expected[path].dtype, path
        for shard in leaf.addressable_shards:
            part = expected[path][shard.index]
            assert np.asarray(shard.data).tobytes() == part.tobytes(), (path, shard.index)


class Run:
    """A run of `STEPS` on `HOME` that saved its state after `BEFORE`."""

    def __init__(self, folder, rtol):
        self.rtol = rtol  # of losses whose terms are added in another order
        mesh = make_mesh(HOME)
        lie = jax.tree.map(lambda x: x.sharding, abstract_state(mesh)).variables
        state = initial_state(create(MODEL.init, jax.random.key(1), shardings=lie), TX, mesh)
        state, first, self.rows_before = go_on(state, mesh, BEFORE)
        self.folder, self.at_move = folder, copied(state)
        with Checkpoints(folder, metric="f1") as checkpoints:
            checkpoints.save(state, {"f1": 0.5})
            # The next steps are given the buffers that are still being written.
            state, second, rows = go_on(state, mesh, STEPS)
        self.losses, self.rows = first + second, in_order(self.rows_before + rows)
        self.at_end = copied(state)


@contextlib.contextmanager
def precision(x64):
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    with jax.enable_x64(x64):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(
    scope="module",
    params=[pytest.param(True, id="f64"), pytest.param(False, id="f32", marks=pytest.mark.slow)],
)
def run(request, tmp_path_factory):
    with precision(request.param):
        folder = tmp_path_factory.mktemp("run") / "checkpoints"
        yield Run(folder, rtol=1e-9 if request.param else 1e-4)


def test_the_run_itself_sees_every_row_once_an_epoch(run):
    epochs = np.split(np.array(run.rows), range(ROWS, len(run.rows), ROWS))
    assert len(epochs) == 6 and all(len({*epoch}) == len(epoch) for epoch in epochs)
    assert BEFORE * SIZE % ROWS  # it moves in the middle of an epoch
    assert run.losses[-1] < 0.9 * run.losses[0]
    assert any(k.endswith("kernel") and (v != 0).all() for k, v in run.at_move.items()
               if k.startswith("optimizer"))  # fmt: skip


@pytest.mark.parametrize("spec", MESHES)
def test_a_run_goes_on_on_another_mesh(run, spec):
    mesh = make_mesh(spec)
    with Checkpoints(run.folder, metric="f1") as checkpoints:
        state = checkpoints.restore(abstract_state(mesh), BEFORE)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, abstract_state(mesh)
    )
    assert_same_bits(state, run.at_move)
    state, losses, rows = go_on(state, mesh, STEPS)
    assert in_order(run.rows_before + rows) == run.rows
    if spec == HOME:
        assert losses == run.losses[BEFORE:]
        assert_same_bits(state, run.at_end)
    np.testing.assert_allclose(losses, run.losses[BEFORE:], rtol=run.rtol)
    print(f"{spec}: {np.abs(np.array(losses) / run.losses[BEFORE:] - 1).max():.1e} relative")


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_read():
    said = "axis 'embed' has size 16, which fsdp=3 does not divide.* 1, 2 would"
    with pytest.raises(ShardingError, match=said):
        abstract_state(make_mesh("fsdp=3"))


# --- several processes ----------------------------------------------------------------------------


WORKER = """
import pathlib, sys
from tests.test_elastic import worker
worker(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""


def worker(folder, rank, address):
    """One of two: takes the run over, finishes it, saves it."""
    cluster = start(address, 2, rank)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    with cluster.guard(), Checkpoints(folder / "checkpoints", metric="f1") as checkpoints:
        state = checkpoints.restore(abstract_state(mesh), BEFORE)
        assert not all(x.is_fully_addressable for x in jax.tree.leaves(state))
        assert_same_bits(state, np.load(folder / "at_move.npz"))
        state, losses, rows = go_on(state, mesh, STEPS)
        checkpoints.save(state, {"f1": 0.6})
        whole = copied(state)
    (folder / f"{rank}.json").write_text(json.dumps({"losses": losses, "rows": rows}))
    if rank == 0:
        np.savez(folder / "at_end.npz", allow_pickle=False, **whole)
    cluster.stop()


def test_two_processes_take_over_from_one_and_one_from_two(run, tmp_path):
    x64 = run.rtol < 1e-6
    shutil.copytree(run.folder, tmp_path / "checkpoints")
    np.savez(tmp_path / "at_move.npz", allow_pickle=False, **run.at_move)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_ENABLE_X64": str(int(x64)), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(rank), address],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for each in workers:
            each.kill()
    assert [each.returncode for each in workers] == [0, 0], "\n".join(said)

    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    rows = [{int(k): v for part in step for k, v in part.items()}
            for step in zip(*(f["rows"] for f in found), strict=True)]  # fmt: skip
    assert all(len(part) == SIZE // 2 for f in found for part in f["rows"])
    assert in_order(run.rows_before + rows) == run.rows
    assert found[0]["losses"] == found[1]["losses"]
    np.testing.assert_allclose(found[0]["losses"], run.losses[BEFORE:], rtol=run.rtol)

    with Checkpoints(tmp_path / "checkpoints", metric="f1") as checkpoints:
        assert checkpoints.latest == STEPS
        state = checkpoints.restore(abstract_state(make_mesh("tensor=2")), STEPS)
    assert_same_bits(state, np.load(tmp_path / "at_end.npz"))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_move_takes_the_memory_of_the_parts_that_arrive(tmp_path):
    """From one device, whose checkpoint would be read whole by each of the next eight."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench" / "restore.py", "--gb=0.25", "--leaves=4",
         "--saved=data=1", "--mesh=fsdp=8 tensor=8 fsdp=8@2", f"--json={tmp_path / 'out.json'}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    print(done.stdout)
    state = 0.25e9
    for found in runs:
        part = state / found["processes"]
        assert abs(found["part"] / part - 1) < 0.01, found
        # Beside the parts: chunks being read and unpacked, and what orbax imports, about 10 MB.
        most = {"restore": 1.25 * part, "save": 1.1 * part, "save and step": 2.1 * part}
        assert found["peak"] < most[found["what"]] + 16e6, found


@pytest.mark.slow
def test_an_array_larger_than_what_is_in_flight(tmp_path):
    mesh = make_mesh("fsdp=2")
    rows, everywhere = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    step = jax.device_put(np.int32(0), everywhere)
    big = jax.jit(lambda: jnp.zeros((2200, 10**6), np.int8).at[::7, 5].set(3), out_shardings=rows)()
    with Checkpoints(tmp_path, metric="f1") as checkpoints:
        checkpoints.save(TrainState(step, {"x": big}, {}), {"f1": 0.5})
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        TrainState(step, {"x": big}, {}),
    )
    with Checkpoints(tmp_path, metric="f1") as checkpoints:
        found = checkpoints.restore(like, 0).variables["x"]
    assert found.sharding.is_equivalent_to(rows, 2)
    assert jnp.array_equal(found, big)
    assert int(np.asarray(found[:, 5], np.int64).sum()) == 3 * len(range(0, 2200, 7))
