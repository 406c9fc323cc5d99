"""What training keeps and sends: optimiser states, bytes over `data`, and the loss with fewer.

    .venv/bin/python scripts/bench/states.py                        # bytes; needs no run
    .venv/bin/python scripts/bench/states.py runs/a runs/b          # two runs' losses by step

The states are those of MiniLM with a head of 13 classes; the bytes are those of one training step
of a BERT of 2 layers and 64 features, by the program compiled for 8 CPU devices.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

EXCHANGES = ("float32", "int8", "powersgd:2")


def states() -> str:
    import jax

    from fw import report
    from fw.models.bert import BertConfig, bert
    from fw.optimizer import MOMENTS, AdamW, optimizer

    config = BertConfig(30522, 384, 6, 12, 1536, num_labels=13, task="token_classification")
    params = jax.eval_shape(bert(config).init, jax.random.key(0))["params"]
    sizes = {
        moments: sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(
                jax.eval_shape(optimizer(AdamW(moments=moments), 9).init, params)
            )
        )
        for moments in MOMENTS
    }
    rows = [(m, f"{n / 1e6:.2f}", f"{n / sizes['float32']:.4f}") for m, n in sizes.items()]
    return report.table(rows, ("--moments", "MB of state", "of float32"))


def wire() -> str:
    import numpy as np

    from fw import report
    from fw.exchange import with_exchange
    from fw.models.bert import BertConfig, bert
    from fw.optimizer import AdamW, optimizer
    from fw.step import abstract_state, make_step
    from fw.tasks import cross_entropy
    from sharding import inspect, make_mesh, put, rules

    model = bert(BertConfig(128, 64, 2, 4, 128, num_labels=3, task="token_classification"))
    ids = np.zeros((16, 12), np.int32)
    batch: Any = dict.fromkeys(("input_ids", "segment_ids", "position_ids", "labels"), ids)
    rows = []
    for spec in ("data=8", "data=2,fsdp=2,tensor=2"):
        mesh, sent = make_mesh(spec), {}
        for name in EXCHANGES:
            tx = with_exchange(optimizer(AdamW(), 9), name, mesh)
            step = make_step(model, cross_entropy, tx, mesh=mesh, rules=rules())
            state = abstract_state(model, tx, mesh, rules())
            program = step.lower(state, put(batch, mesh, rules())).compile()
            over = inspect(program).by_axes()
            sent[name] = sum(n for axes, n in over.items() if "data" in str(axes))
            rows.append((spec, name, f"{sent[name]:,}", f"{sent[name] / sent['float32']:.4f}"))
    return report.table(rows, ("mesh", "--exchange", "bytes over data", "of float32"))


def curves(first: str, second: str) -> str:
    from fw import report

    def losses(run: str) -> dict[int, float]:
        lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    a, b = losses(first), losses(second)
    steps = sorted(a.keys() & b.keys())
    off = [abs(b[step] / a[step] - 1) for step in steps]
    last = [statistics.fmean(x[s] for s in steps[-len(steps) // 10 :]) for x in (a, b)]
    rows = [
        ("steps told of", f"{len(steps)}"),
        ("largest difference", f"{100 * max(off):.2f} %"),
        ("mean difference", f"{100 * statistics.fmean(off):.2f} %"),
        (
            "mean of the last tenth",
            f"{last[0]:.4f} {last[1]:.4f} ({100 * (last[1] / last[0] - 1):+.2f} %)",
        ),
    ]
    return report.table(rows, ("losses", f"{second} beside {first}"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="two of them, for their losses")
    options = parser.parse_args()
    if len(options.runs) == 2:
        print(curves(*options.runs))
        return 0
    if options.runs:
        parser.error("give two runs, or none")
    if DEVICES.items() - os.environ.items():  # JAX reads it as it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | DEVICES)
    print(states())
    print(wire())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
