"""Loading a checkpoint onto a mesh: time and host memory, against safetensors and `device_put`.

A Llama of random numbers is written in several safetensors files with an index, and loaded by

- fw: `fw.hub.load`, which stacks the layers and turns the kernels about, as the model wants them;
- tensors: `safe_open(...).get_tensor` and `jax.device_put`, cut alike, but as the file has them;
- stacked: the same, stacked and turned with NumPy first: the arrays that fw makes.

Every measurement is a process of its own, or two that share the mesh, with virtual CPU devices, so
that the devices' parts lie in the host's memory, too. The sides take turns. Linux.

    .venv/bin/python scripts/bench/loading.py --gigabytes 2
"""

import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import sides
from apart import TUNABLES, apart, main, memory, reset
from safetensors import safe_open

from fw import report, run
from fw.errors import FwError
from fw.hub import FAMILIES, load
from fw.hub.config import write_config
from fw.hub.files import CONFIG, INDEX
from fw.models.llama import LlamaConfig
from fw.models.names import Name
from fw.tensors import tensor_file
from sharding import make_mesh, paths, rules, shardings
from sharding.processes.cluster import start

DEVICES = 8
MB = 10**6
DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
SIDES = ("fw", "tensors", "stacked")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is loaded, and how often.

    Attributes:
      gigabytes: of the files; the width of the layers' MLPs follows from it.
      layers: of the model.
      hidden: its width.
      vocabulary: its words.
      files: how many.
      stored: dtype of the files, f32 or bf16.
      dtype: of the parameters, f32 or bf16.
      mesh: of 8 devices.
      processes: numbers of processes that share it, with commas between.
      sides: some of fw, tensors and stacked, with commas between.
      rounds: how often each is timed; 0 for memory alone.
      cold: drop the files from the page cache before each is timed.
      json: write the figures to this file.
    """

    gigabytes: float = 2.0
    layers: int = 32
    hidden: int = 1024
    vocabulary: int = 32_000
    files: int = 4
    stored: str = "f32"
    dtype: str = "f32"
    mesh: str = "fsdp=8"
    processes: str = "1,2"
    sides: str = ",".join(SIDES)
    rounds: int = 5
    cold: bool = False
    json: str = ""

    def __post_init__(self):
        """Checks what would fail only later."""
        for name in ("stored", "dtype"):
            if getattr(self, name) not in DTYPES:
                raise FwError(f"{name}: expected one of {', '.join(DTYPES)}")
        if unknown := set(self.sides.split(",")) - set(SIDES):
            raise FwError(f"sides: {', '.join(unknown)} is none of {', '.join(SIDES)}")
        if self.inner < 1:
            raise FwError(f"gigabytes is {self.gigabytes}: less than attention and words take")

    @property
    def inner(self) -> int:
        """The width of an MLP, a multiple of 64."""
        numbers = self.gigabytes * 1e9 / DTYPES[self.stored].itemsize
        layer = (numbers - 2 * self.vocabulary * self.hidden) / self.layers
        return int((layer - 3 * self.hidden**2) / (3 * self.hidden)) // 64 * 64

    @property
    def config(self) -> LlamaConfig:
        """Of the model: half as many key heads as heads, of 64."""
        heads = max(2, self.hidden // 64)
        return LlamaConfig(
            self.vocabulary, self.hidden, self.layers, heads, self.inner,
            num_key_value_heads=heads // 2,
        )  # fmt: skip


def compare(options: Options) -> None:
    """Writes the checkpoint, measures every side, and prints two tables."""
    machine, timed, held = sides.machine(), [], []
    names, counts = options.sides.split(","), list(map(int, options.processes.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        largest = write(options, Path(folder))
        for _ in range(options.rounds):
            for count in counts:
                for side in names:
                    if options.cold:
                        evict(Path(folder))
                    rows = apart(__file__, options, count, side=side, folder=folder, timed=True)
                    seconds = max(row["seconds"] for row in rows)
                    used = sum(row["processor"] for row in rows)
                    one = {"seconds": seconds, "processor": used}
                    timed.append({"side": side, "processes": count, **one})
                    print(f"{side} on {count}: {seconds:.2f} s ({used:.2f})", file=sys.stderr)
        for count in counts:
            for side in names:
                one = {"side": side, "folder": folder, "timed": False}
                held += apart(__file__, options, count, TUNABLES, **one)
    if options.json:
        figures = {"options": options, "machine": machine, "timed": timed, "held": held}
        run.write_json(options.json, figures)
    if timed:
        print(report.table(*_times(timed, names, counts)), end="\n\n")
    cells = [
        (
            row["side"],
            f"{row['rank']} of {row['processes']}",
            *(f"{row[name] / MB:,.1f}" for name in ("part", "peak", "own")),
            f"{(row['peak'] - row['part']) / MB:,.1f}",
            f"{largest / MB:,.1f}",
            f"{row['read'] / MB:,.1f}",
        )
        for row in held
    ]
    titles = (
        "side", "process", "its parts MB", "peak MB above before", "of it not of files",
        "peak less parts", "largest tensor MB", "read MB",
    )  # fmt: skip
    print(report.table(cells, titles))


def _times(
    timed: list[dict[str, Any]], names: list[str], counts: list[int]
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    def of(name: str, side: str, count: int) -> list[float]:
        return [t[name] for t in timed if (t["side"], t["processes"]) == (side, count)]

    cells = []
    for count in counts:
        for side in names:
            seconds, used = of("seconds", side, count), of("processor", side, count)
            middle = statistics.median(seconds)
            cells.append(
                (
                    side,
                    f"{count} × {DEVICES // count}",
                    f"{middle:.2f}",
                    f"{min(seconds):.2f}–{max(seconds):.2f}",
                    f"{middle / statistics.median(of('seconds', names[0], count)):.2f}",
                    f"{statistics.median(used):.2f}",
                )
            )
    return cells, ("side", "devices", "s, median", "range", f"× {names[0]}", "processor s")


def write(options: Options, folder: Path) -> int:
    """Writes the checkpoint; the bytes of its largest tensor."""
    config, dtype, random = options.config, DTYPES[options.stored], np.random.default_rng(0)
    model = FAMILIES["llama"].model(config)
    shapes = _by_path(jax.eval_shape(model.init, jax.random.key(0)))
    names = list(FAMILIES["llama"].names(config))
    like = {
        name.tensor: jax.ShapeDtypeStruct(name.stored(shapes[name.path].shape), dtype)
        for name in names
    }
    each = -(-len(like) // options.files)
    places = {}
    for i in range(options.files):
        file = f"model-{i + 1:05d}-of-{options.files:05d}.safetensors"
        own = dict(list(like.items())[i * each : (i + 1) * each])
        with tensor_file(folder / file, own) as put:
            for name, tensor in own.items():
                put(name, random.standard_normal(tensor.shape, np.float32).astype(dtype))
        places |= dict.fromkeys(own, file)
    run.write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    run.write_json(folder / CONFIG, write_config(config, (), dtype.name, {}))
    os.sync()
    return max(math.prod(tensor.shape) * dtype.itemsize for tensor in like.values())


def evict(folder: Path) -> None:
    """Drops the files from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    options: Options, *, side: str, folder: str, timed: bool, rank: int, processes: int,
    address: str,
) -> dict[str, Any]:  # fmt: skip
    """Loads in this process.

    Returns:
      The `seconds` and those of `processor` time; or `part`, the bytes of the parameters here,
      `peak`, the most that came to be held above what was before, `own`, the same without mapped
      files, sampled, and `read`, the bytes that were read with system calls.
    """
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        start(address, processes, rank)
    mesh = make_mesh(options.mesh)
    side_of = {"fw": load_fw, "tensors": load_tensors, "stacked": load_stacked}
    where = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    jax.block_until_ready(_put(np.zeros(mesh.size, np.float32), where))  # whatever comes first
    if timed:
        began, used = time.perf_counter(), time.process_time()
        _kept = jax.block_until_ready(side_of[side](options, Path(folder), mesh))
        return {
            "seconds": time.perf_counter() - began, "processor": time.process_time() - used
        }  # fmt: skip
    before, file, read = reset(), memory("RssFile"), _read()
    with sampled(lambda: memory("RssAnon") + memory("RssShmem")) as samples:
        arrays = jax.block_until_ready(side_of[side](options, Path(folder), mesh))
    peak = memory("VmHWM") - before
    part = sum(s.data.nbytes for x in jax.tree.leaves(arrays) for s in x.addressable_shards)
    return {
        "side": side, "rank": rank, "processes": processes, "part": part, "peak": peak,
        "own": max(samples) - (before - file), "read": _read() - read,
    }  # fmt: skip


@contextmanager
def sampled(what: Callable[[], int]) -> Iterator[list[int]]:
    """A figure, taken every millisecond by another thread."""
    samples, done = [what()], threading.Event()

    def take() -> None:
        while not done.wait(0.001):
            samples.append(what())

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def load_fw(options: Options, folder: Path, mesh: jax.sharding.Mesh) -> Any:
    """As a user of fw does."""
    return load(folder, mesh=mesh, rules=rules(), dtype=DTYPES[options.dtype]).variables


def load_tensors(options: Options, folder: Path, mesh: jax.sharding.Mesh) -> Any:
    """Every tensor as the files have it, cut as fw cuts the parameter that it belongs to."""
    arrays, places = {}, _places(options, mesh)
    with opened(folder) as get:
        for name in FAMILIES["llama"].names(options.config):
            spec = tuple(places[name.path].spec)[len(name.entry) :]
            where = jax.NamedSharding(mesh, jax.P(*(spec[::-1] if name.transposed else spec)))
            arrays[name.tensor] = _put(get(name).astype(DTYPES[options.dtype], copy=False), where)
    return arrays


def load_stacked(options: Options, folder: Path, mesh: jax.sharding.Mesh) -> Any:
    """The parameters that fw makes."""
    arrays, places = {}, _places(options, mesh)
    named: dict[str, list[Name]] = {}
    for name in FAMILIES["llama"].names(options.config):
        named.setdefault(name.path, []).append(name)
    with opened(folder) as get:
        for path, names in named.items():
            own = [get(name).T if name.transposed else get(name) for name in names]
            whole = np.stack(own) if names[0].entry else own[0]
            whole = whole.astype(DTYPES[options.dtype], copy=False)
            arrays[path] = _put(whole, places[path])
    return arrays


@contextmanager
def opened(folder: Path) -> Iterator[Callable[[Name], np.ndarray]]:
    """Reads a tensor of a folder with safetensors."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(folder / file, "numpy"))
            for file in set(places.values())
        }
        yield lambda name: files[places[name.tensor]].get_tensor(name.tensor)


def _put(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(array, where)
    # device_put would make sure that all processes have the same, which takes them long.
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def _places(options: Options, mesh: jax.sharding.Mesh) -> Mapping[str, Any]:
    model = FAMILIES["llama"].model(options.config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return _by_path(shardings(model.axes, shapes, mesh, rules()))


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = zip(paths(tree), jax.tree.leaves(tree), strict=True)
    return {path.removeprefix("params/"): leaf for path, leaf in leaves}


def _read() -> int:
    line = Path("/proc/self/io").read_text().splitlines()[0]
    return int(line.removeprefix("rchar: "))


if __name__ == "__main__":
    sys.exit(main(__doc__, Options, measure, compare))
