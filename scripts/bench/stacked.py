"""What a stack of layers costs on this machine: steps and inference, layers stacked and apart.

A BERT as wide as BERT-base, from random parameters, in one process: the two take turns, call by
call, so what else the machine does meets both. Processor time is told beside the clock's. The
losses of both are compared: the parameters and the dropout are the same.

    .venv/bin/python scripts/bench/stacked.py
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fw import host, precision, report
from fw.models.bert import BertConfig, bert
from fw.models.stack import apart
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import create, make_mesh, put, rules, scope, shardings

VOCABULARY, LABELS = 8192, 9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", default="f32")
    parser.add_argument(
        "--calls", type=int, default=15, help="of each, after two that are not counted"
    )
    arguments = parser.parse_args()
    host.prepare()
    rng, shape = np.random.default_rng(0), (arguments.rows, arguments.length)
    batch = {
        "input_ids": rng.integers(0, VOCABULARY, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "position_ids": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "labels": rng.integers(0, LABELS, shape, np.int32),
    }
    rows, losses = [], []
    for kind, prepare in (("training", training), ("inference", inference)):
        sides = {scan: prepare(arguments, scan, batch) for scan in (True, False)}
        times: dict[bool, list[tuple[float, float]]] = {scan: [] for scan in sides}
        said: dict[bool, list[Any]] = {scan: [] for scan in sides}
        for call in range(arguments.calls + 2):
            for scan, run in sides.items():
                wall, busy = time.perf_counter(), time.process_time()
                said[scan].append(jax.block_until_ready(run()))
                if call >= 2:
                    spent = (time.perf_counter() - wall, time.process_time() - busy)
                    times[scan].append(spent)
        losses.append(np.max(np.abs(np.asarray(said[True]) - np.asarray(said[False]))))
        pairs = list(zip(times[True], times[False], strict=True))
        cells = [1e3 * statistics.median(t[i] for t in times[s]) for i in (0, 1) for s in times]
        ratios = [statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1)]
        rows.append((kind, *(f"{c:.0f}" for c in cells), *(f"{r:.3f}" for r in ratios)))
    titles = ("", "stacked, ms", "apart, ms", "stacked, CPU ms", "apart, CPU ms", "ratio", "of CPU")
    print(report.table(rows, titles))
    print(f"largest difference of losses {losses[0]:.1e}, of logits {losses[1]:.1e}")
    return 0


def made(arguments: Any, scan: bool) -> tuple[Any, Any, Any]:
    """The model, its parameters, the mesh: the same parameters, stacked or apart."""
    config = BertConfig(VOCABULARY, 768, arguments.layers, 12, 3072, LABELS, "token_classification")
    model, mesh = bert(config), make_mesh("data=1")
    key = jax.random.key(0)
    lie = shardings(model.axes, jax.eval_shape(model.init, key), mesh, rules())
    variables = create(model.init, key, shardings=lie)
    if not scan:
        stack = {"layers": apart(variables["params"]["stack"]["layers"], arguments.layers)}
        variables = {**variables, "params": {**variables["params"], "stack": stack}}
        model = bert(dataclasses.replace(config, scan=False))
        lie = shardings(model.axes, variables, mesh, rules())
    return model, jax.device_put(variables, lie), mesh


def training(arguments: Any, scan: bool, batch: Any) -> Callable[[], Any]:
    """A step, which returns its loss."""
    model, variables, mesh = made(arguments, scan)
    tx = optimizer(AdamW(), 100)
    step = make_step(
        model, cross_entropy, tx, mesh=mesh, rules=rules(), precision=arguments.precision
    )
    state, given = [initial_state(variables, tx, mesh)], put(batch, mesh, rules())

    def run() -> jax.Array:
        state[0], figures = step(state[0], given)
        jax.block_until_ready(state[0])
        return figures["loss"]

    return run


def inference(arguments: Any, scan: bool, batch: Any) -> Callable[[], Any]:
    """Logits."""
    model, variables, mesh = made(arguments, scan)
    apply = jax.jit(lambda v, b: precision.apply(model.apply, arguments.precision)(v, b)[0])
    given = put({k: v for k, v in batch.items() if k != "labels"}, mesh, rules())

    def run() -> jax.Array:
        with scope(mesh, rules()):
            return apply(variables, given)

    return run


if __name__ == "__main__":
    sys.exit(main())
