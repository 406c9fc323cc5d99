"""What `fw plan` says of MiniLM's training step on this CPU, beside what the step takes.

The planner's layouts of a fine-tuning step (named entities, 16 rows of 128 tokens) are run, each in
a process of its own: the median of some steps, and by how much the process grows while it takes one
after it was compiled, beside the temporaries that the compiler had said. The planner's first choice
should be the fastest.

    .venv/bin/python scripts/bench/plan_cpu.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fw import report
from fw.planning import build, plan_training
from fw.work import Work, source_of
from sharding import make_mesh

STATUS = Path("/proc/self/status")


def work_of(options: argparse.Namespace) -> Work:
    return Work(
        options.model, options.rows, options.length, task="token_classification", classes=13,
        precision=options.precision, accumulate=(1, 2, 4),
    )  # fmt: skip


def kilobytes(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def run(options: argparse.Namespace) -> dict[str, float]:
    """One layout's step, here."""
    work = work_of(options)
    step, (state, batch) = build(work, source_of(work), json.loads(options.run))(
        make_mesh("data=1")
    )
    rng = np.random.default_rng(0)

    def made(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 8, x.shape), x.dtype)
        return jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype)

    state, batch = jax.tree.map(made, (state, batch))
    compiled = step.lower(state, batch).compile()
    jax.block_until_ready((state, batch))
    Path("/proc/self/clear_refs").write_text("5")  # the most that was held is what is held now
    before = kilobytes("VmRSS")
    state, _ = jax.block_until_ready(compiled(state, batch))
    grown = kilobytes("VmHWM") - before
    times = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        times.append(time.perf_counter() - begin)
    return {"seconds": float(np.median(times)), "grown": 1024 * grown}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options)))
        return 0
    found = plan_training(work_of(options), "cpu", compile=9)
    rows = []
    for one in (layout for layout in found.layouts if layout.compiled):
        choices = json.dumps(dict(one.candidate.variant.choices))
        command = [sys.executable, *sys.argv, "--run", choices]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        own = json.loads(told.stdout.splitlines()[-1])
        said = one.prediction
        temporary = said.memory.activations
        rows.append(
            (
                str(one), f"{said.seconds:.3f}", f"{own['seconds']:.3f}",
                f"{temporary / 2**20:.0f}", f"{own['grown'] / 2**20:.0f}",
                f"{own['grown'] / temporary - 1:+.1%}",
            )
        )  # fmt: skip
        print(*rows[-1], file=sys.stderr, flush=True)
    fastest = min(rows, key=lambda row: float(row[2]))
    head = ("layout", "predicted s", "s", "MiB of temporaries said", "MiB grown", "off")
    print(report.table(rows, head))
    print(f"planner: {rows[0][0]}; fastest: {fastest[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
