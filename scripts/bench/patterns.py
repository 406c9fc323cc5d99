"""What zeros gain: a dense layer with its weight pruned, packed, of low rank, or half as wide.

    .venv/bin/python scripts/bench/patterns.py                   # times on this CPU, in turns
    .venv/bin/python scripts/bench/patterns.py --platform tpu    # what its compiler makes of it

Times are medians, as ratios to the dense layer's; for compilers without their chip, the table shows
the products, and whether the whole weight is written out in floats.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import steps
from compiled_compress import compiled, found

import compress
from fw import report

ROWS, IN, OUT = 1024, 384, 1536
"""A layer of MiniLM, for a batch of 16 × 64 tokens."""


def sides(dtype: Any) -> dict[str, Any]:
    """Weights by name: of one layer, pruned in different ways."""
    w = jax.random.normal(jax.random.key(0), (IN, OUT), dtype) / 20
    made = {
        "dense": None,
        "0.8 zeros, anywhere": compress.prune({"kernel": 0.8}),
        "0.8 zeros, blocks of 16x16": compress.prune({"kernel": {"part": 0.8, "pattern": "16x16"}}),
        "2:4, packed": compress.prune({"kernel": "2:4"}),
        "1:4, packed": compress.prune({"kernel": "1:4"}),
        "rank 96": compress.lowrank({"kernel": 96}),
        "rank 48": compress.lowrank({"kernel": 48}),
    }
    found = {n: w if t is None else t({"kernel": w})[0]["kernel"] for n, t in made.items()}
    return found | {"half of the outputs": w[:, : OUT // 2]}


def timed(rounds: int) -> str:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, IN)).astype(np.float32))
    calls = {}
    for name, w in sides(jnp.float32).items():
        call = jax.jit(compress.apply(lambda w, x: jnp.tanh(x @ w)))
        call(w, x).block_until_ready()
        calls[name] = (call, w)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, w) in calls.items():
            begin = time.perf_counter()
            for _ in range(5):
                call(w, x).block_until_ready()
            times[name].append((time.perf_counter() - begin) / 5)
    middle = {name: statistics.median(each) for name, each in times.items()}
    rows = [
        (name, f"{1e3 * t:.2f}", f"{t / middle['dense']:.2f}", f"{size(calls[name][1]):.2f}")
        for name, t in middle.items()
    ]
    return report.table(rows, ("weight", "ms", "of dense", "bytes, of dense"))


def size(w: Any) -> float:
    """Bytes, of those of the dense weight."""
    return sum(x.nbytes for x in jax.tree.leaves(w)) / (IN * OUT * 4)


def shown(platform: str) -> str:
    device, dtype = steps.devices(platform)[0], jnp.bfloat16
    x = jax.ShapeDtypeStruct((ROWS, IN), dtype)
    rows = []
    for name, w in jax.eval_shape(lambda: sides(dtype)).items():
        program = compiled(compress.apply(lambda w, x: jnp.tanh(x @ w)), (w, x), device, platform)
        memory = program.memory_analysis()
        temporary = (memory.temp_size_in_bytes if memory else float("nan")) / 1e6
        rows.append((name, *found(program.as_text() or "", IN * OUT), f"{temporary:.2f}"))
    return report.table(rows, ("weight", "products", "whole in floats", "MB temporary"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=steps.LOWERED, default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    if options.platform == "cpu":
        print(timed(options.rounds))
        return 0
    if steps.ENVIRONMENT.items() - os.environ.items():  # JAX reads it as it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | steps.ENVIRONMENT)
    print(shown(options.platform))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
