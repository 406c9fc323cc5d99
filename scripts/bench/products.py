"""What a CPU makes of an int8 product: XLA's, ONNX Runtime's, and both in float32, in turns.

    .venv/bin/python scripts/bench/products.py

The products are those of one layer of MiniLM for a batch of 16 × 64 tokens; the last line is all of
the model's. Beside `compression.py` it tells how much of a model's time its products are.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compress.backends import cpu
from fw import report

ROWS, LAYERS = 16 * 64, 6
SHAPES = {(384, 384): 4, (384, 1536): 1, (1536, 384): 1}
"""Inputs and outputs of a layer's kernels, and how many there are."""

DIMS = (((1,), (0,)), ((), ()))
COUNT = 6
"""Products in one program, of one x and different w."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    peer = [str(Path(__file__).parent / "peer"), "peer_products.py"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(peer, stdin=pipe, stdout=pipe, text=True)
    assert process.stdin is not None and process.stdout is not None
    ours = {shape: sides(*shape) for shape in SHAPES}
    times: dict[tuple[str, tuple[int, int]], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for shape, each in ours.items():
            for name, call in each.items():
                times[name, shape].append(seconds(call))
            print(ROWS, *shape, file=process.stdin, flush=True)
            for name, value in json.loads(process.stdout.readline()).items():
                times[name, shape].append(value)
    process.stdin.close()
    process.wait()
    names = list(dict.fromkeys(name for name, _ in times))
    table = []
    for name in names:
        each = {shape: statistics.median(times[name, shape]) for shape in SHAPES}
        whole = LAYERS * sum(count * each[shape] for shape, count in SHAPES.items())
        speeds = [f"{ROWS * k * n / each[k, n] / 1e9:.0f}" for k, n in SHAPES]
        table.append((name, *speeds, f"{1e3 * whole:.0f}"))
    heads = [f"{k} × {n}, GMAC/s" for k, n in SHAPES]
    print(report.table(table, ("product", *heads, "the model's, ms")))
    return 0


def sides(k: int, n: int) -> dict[str, Any]:
    """Compiled products by name, as `compress` has them on a CPU."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-127, 128, (ROWS, k)), jnp.int8)
    ws = [jnp.asarray(rng.integers(-127, 128, (k, n)), jnp.int8) for _ in range(COUNT)]
    wide = [a.astype(jnp.float32) for a in (x, *ws)]
    integers = jax.jit(lambda x, *ws: [cpu.int_dot(x, w, DIMS) for w in ws])
    floats = jax.jit(lambda x, *ws: [lax.dot_general(x, w, DIMS, precision="highest") for w in ws])
    return {
        "XLA, int8 × int8": lambda: integers(x, *ws),
        "XLA, float32": lambda: floats(*wide),
    }


def seconds(call: Any) -> float:
    """Of one product."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    return (time.perf_counter() - began) / COUNT


if __name__ == "__main__":
    sys.exit(main())
