"""Host memory that saving a checkpoint and restoring it on other meshes take beside the state.

Every measurement is a process of its own (several, for a mesh over several), with virtual CPU
devices, so that all devices' parts lie in the host's memory, too. The peak is the kernel's, reset
right before; malloc is told to give blocks back at once, so that it counts what is in use. Linux.

    .venv/bin/python scripts/bench/restore.py --gb 2 --mesh "fsdp=8 tensor=2 fsdp=8@2"
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sides
from apart import TUNABLES, apart, main, memory, reset

from fw import report, run
from fw.checkpoint import Checkpoints
from fw.errors import FwError
from fw.step import TrainState
from sharding import build, make_mesh, rules, shardings
from sharding.processes.cluster import start

DEVICES = 8
MB = 10**6
WIDTH = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      gb: of the state, random float32 that hardly compresses.
      leaves: arrays it consists of.
      saved: the mesh that it is saved on.
      mesh: those that it is restored on, with spaces between; `fsdp=8@2` is over 2 processes.
      json: write the figures to this file.
    """

    gb: float = 1.0
    leaves: int = 8
    saved: str = "data=4,fsdp=2"
    mesh: str = "fsdp=8 tensor=2 sequence=2,tensor=2 data=1 fsdp=8@2"
    json: str = ""

    def __post_init__(self):
        """Checks what would fail only later."""
        if self.rows < 1:
            raise FwError(
                f"gb is {self.gb}; expected {4e-9 * self.leaves * WIDTH * DEVICES:.1g} or more"
            )

    @property
    def rows(self) -> int:
        """Of each leaf, a multiple of the devices."""
        return round(self.gb * 1e9 / self.leaves / WIDTH / 4 / DEVICES) * DEVICES


def compare(options: Options) -> None:
    """Saves, restores on every mesh, and prints the table."""
    machine, runs = sides.machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for what in ("save and step", "save"):  # the second lies where it is restored from
            place = str(Path(folder, what))
            one = {"what": what, "mesh": options.saved, "folder": place}
            runs += apart(__file__, options, 1, TUNABLES, **one)
        for mesh in options.mesh.split():
            spec, _, processes = mesh.partition("@")
            one = {"what": "restore", "mesh": spec, "folder": place}
            runs += apart(__file__, options, int(processes or 1), TUNABLES, **one)
    if options.json:
        run.write_json(options.json, {"options": options, "machine": machine, "runs": runs})
    cells = [
        (
            row["what"],
            row["mesh"],
            f"{row['rank']} of {row['processes']}",
            *(f"{row[name] / MB:,.0f}" for name in ("part", "peak")),
            f"{row['peak'] / row['part']:.2f}",
        )
        for row in runs
    ]
    titles = ("what", "mesh", "process", "its part MB", "peak MB above before", "× part")
    print(report.table(cells, titles))


def measure(
    options: Options, *, what: str, mesh: str, folder: str, rank: int, processes: int, address: str
) -> dict[str, Any]:
    """Saves or restores in this process.

    Returns:
      `part`, the bytes of the state that this process reads for its devices, or writes; and `peak`,
      the most that it came to hold at work above what it held before, when saving the state.
    """
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        start(address, processes, rank)
    like = abstract_state(options, mesh)
    with Checkpoints(Path(folder), metric="none") as checkpoints:
        if what == "restore":
            before = reset()
            state = jax.block_until_ready(checkpoints.restore(like, 0))
        else:
            state = random_state(like)
            before = reset()
            checkpoints.save(state, {"none": 0.0})
            if what == "save and step":
                state = jax.block_until_ready(grow(state))
            checkpoints.wait()
        peak = memory("VmHWM") - before
    shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards]
    part = sum(s.data.nbytes for s in shards if what == "restore" or s.replica_id == 0)
    return {"what": what, "mesh": mesh, "rank": rank, "processes": processes,
            "part": part, "peak": peak}  # fmt: skip


def abstract_state(options: Options, mesh: str) -> TrainState:
    """Where it would lie on a mesh."""
    on = make_mesh(mesh)
    axes = {f"{i}": ("embed", "mlp") for i in range(options.leaves)}
    leaf = jax.ShapeDtypeStruct((options.rows, WIDTH), np.float32)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=jax.NamedSharding(on, jax.P()))
    lie = shardings(axes, dict.fromkeys(axes, leaf), on, rules())
    params = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lie[name]) for name in axes
    }
    return TrainState(step, {"params": params, "state": {}}, {})


def random_state(like: TrainState) -> TrainState:
    """Random numbers, made part by part."""
    random = np.random.default_rng(0)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return random.standard_normal([s.stop - s.start for s in index], np.float32)

    params = {k: build(x, x.sharding, part) for k, x in like.variables["params"].items()}
    zero = jax.device_put(jnp.zeros((), jnp.int32), like.step.sharding)
    return jax.block_until_ready(TrainState(zero, {"params": params, "state": {}}, {}))


@jax.jit(donate_argnums=0)
def grow(state: TrainState) -> TrainState:
    """A step that writes every parameter."""
    params = jax.tree.map(lambda x: x * jnp.float32(1.5), state.variables["params"])
    return state._replace(variables={"params": params, "state": {}})


if __name__ == "__main__":
    sys.exit(main(__doc__, Options, measure, compare))
