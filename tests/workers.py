"""One process of a cluster: `python tests/workers.py OPTIONS`, run by tests/test_cluster.py.

It adds the numbers of all devices, step by step, until something happens to one of the processes.
OPTIONS are JSON: "devices" each, "start" and "work" for the functions of these names.
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np

from sharding import build, make_mesh
from sharding.processes.cluster import start


def main() -> None:
    options = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", options.get("devices", 1))
    cluster = start(**options.get("start", {}))
    if options.get("guarded", True):
        with cluster.guard():
            work(cluster, **options.get("work", {}))
        cluster.stop()
    else:
        work(cluster, **options.get("work", {}))
    print(f"rank {cluster.rank} ended", flush=True)


def work(cluster, steps=5, victim=-1, at=-1, how="", seconds=0.0, rows=0):
    if rows:
        print(f"rank {cluster.rank} took {taken(rows)}", flush=True)
    mesh = make_mesh("data=-1")
    where = jax.NamedSharding(mesh, jax.P("data"))
    count = len(jax.devices())
    add = jax.jit(lambda x: x.sum())

    def part(index):
        return np.arange(count, dtype=np.float32)[index]

    for step in range(steps):
        if step == at and cluster.rank == victim:
            befall(cluster, how, seconds)
        cluster.beat(step)
        total = add(build(jax.ShapeDtypeStruct((count,), np.float32), where, part))
        cluster.beat()
        assert float(total) == count * (count - 1) / 2, "the processes do not add up"
        if cluster.rank == 0 and step == 0:
            facts = {"found": cluster.found, "processes": jax.process_count(), "devices": count}
            print(json.dumps(facts), flush=True)
        time.sleep(0.05 if at >= 0 else 0)


def taken(rows):
    """Which rows of a batch this process makes."""
    from fw.data import Batches, feed
    from sharding import rules

    asked = []

    class Counted(Batches):
        def take(self, step, rows):
            asked.append((rows.start, rows.stop))
            return super().take(step, rows)

    arrays = {"x": np.arange(5, dtype=np.int32), "y": np.arange(10, dtype=np.int32).reshape(5, 2)}
    counted = Counted(arrays, rows, seed=3)
    assert len(counted.example["x"]) == 1 == len(asked)  # every process makes that one
    asked.clear()
    placed = feed(counted, 4, make_mesh("data=-1"), rules())
    whole = Batches(arrays, rows, seed=3)(4)
    for name, values in placed.items():
        for shard in values.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])
    return sorted(asked)


def befall(cluster, how, seconds):
    print(f"rank {cluster.rank} pid {os.getpid()}", flush=True)
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
    elif how == "loop":
        while True:
            pass
    elif how == "raise":
        raise KeyError("a bug\nof one rank")
    elif how == "exit":
        sys.exit(0)
    elif how == "pause":
        with cluster.pause():
            time.sleep(seconds)


if __name__ == "__main__":
    main()
