"""What a training step costs by the length of its embedding table: DLRM, the same batch throughout.

A table of 10^4 to 10^7 rows, on one device and on eight virtual ones, whose rows alone are fetched
and changed; and beside it plain optax on the whole table, one device, up to `--dense` rows. Sizes
take turns, step by step, so what else the machine does meets all of them. The ids of a batch are
all different, whatever the length; of the longest table none is in a cache. In place: after all
steps the table and the optimiser's memory of it have the addresses that they had after the first.

    .venv/bin/python scripts/bench/tables.py --json tables.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fw import host, report, run
from fw.errors import FwError
from fw.model import Model
from fw.models.dlrm import DLRMConfig, dlrm
from fw.optimizer import AdamW, optimizer
from fw.options import add_options, read_options
from fw.step import initial_state, make_step
from fw.table_optimizer import BY_NAME, with_tables
from sharding import ShardingError, create, make_mesh, put, rules, shardings

NUMBERS = tuple(f"x{i}" for i in range(13))
DENSE = {"rowwise_adagrad": optax.adagrad, "lazy_adam": optax.adam, "sgd": optax.sgd}
"""What optax has in the place of each."""
TITLES = ("mesh", "optimiser", "changes", "rows", "ms a step", "range", "× fewest rows", "in place")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      rows: of the table, with commas between them.
      size: of a row.
      features: categories of an example, which share the table.
      batch: examples a step.
      meshes: with spaces between them.
      optimizers: of fw.table_optimizer, with commas between them.
      dense: rows up to which optax changes the whole table, for comparison; 0 for never.
      steps: of each, after three that are not counted.
      json: write the figures to this file.
    """

    rows: str = "10000,100000,1000000,10000000"
    size: int = 16
    features: int = 8
    batch: int = 1024
    meshes: str = "data=1 data=8"
    optimizers: str = "rowwise_adagrad,lazy_adam"
    dense: int = 10**6
    steps: int = 20
    json: str = ""

    def __post_init__(self):
        """Checks what would fail only later."""
        if unknown := sorted(set(self.optimizers.split(",")) - set(BY_NAME)):
            raise FwError(f"optimizers: {', '.join(unknown)} is none of {', '.join(BY_NAME)}")
        if not all(number.isdecimal() and int(number) for number in self.rows.split(",")):
            raise FwError(f"rows is {self.rows!r}; expected numbers with commas between them")


@dataclass
class Side:
    """A table's length and how it is changed, while it is measured."""

    rows: int
    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batches: list[Any]
    times: list[float]
    addresses: list[int]

    def turn(self, i: int) -> None:
        began = time.perf_counter()
        self.state, measured = self.step(self.state, self.batches[i % len(self.batches)])
        jax.block_until_ready(measured)
        self.times.append(time.perf_counter() - began)

    def at(self) -> list[int]:
        """Where the long arrays are."""
        return [
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(self.state)
            if leaf.ndim and leaf.shape[0] >= self.rows
            for shard in leaf.addressable_shards
        ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Options)
    try:
        options = read_options(parser.parse_args(), Options)
        host.prepare("data=8")
        found = list(measure(options))
        if options.json:
            run.write_json(options.json, {"options": options, "steps": found})
    except (FwError, ShardingError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    cells = [(*(one[t] for t in TITLES[:4]), *_cells(one)) for one in found]
    print(report.table(cells, TITLES))
    return 0


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    low, high = one["range"]
    return (
        f"{one['ms a step']:.1f}",
        f"{low:.1f}–{high:.1f}",
        f"{one['× fewest rows']:.2f}",
        "yes" if one["in place"] else "no",
    )


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Each mesh, optimiser and way: all lengths of the table in turns."""
    lengths = [int(number) for number in options.rows.split(",")]
    for mesh in options.meshes.split():
        for name in options.optimizers.split(","):
            for whole in (False, True):
                here = [n for n in lengths if not whole or n <= options.dense]
                if not here or (whole and mesh != "data=1"):
                    continue
                sides = [side(options, n, mesh, name, whole) for n in here]
                for i in range(options.steps + 3):
                    for one in sides:
                        one.turn(i)
                        if i == 0:  # the first step copies what it is given for good
                            one.addresses = one.at()
                first = statistics.median(sides[0].times[3:])
                for one in sides:
                    times = [1e3 * t for t in one.times[3:]]
                    yield {
                        "mesh": mesh, "optimiser": name,
                        "changes": "whole table" if whole else "rows", "rows": one.rows,
                        "ms a step": statistics.median(times), "range": (min(times), max(times)),
                        "× fewest rows": statistics.median(times) / 1e3 / first,
                        "in place": one.at() == one.addresses,
                    }  # fmt: skip


def side(options: Options, rows: int, mesh_spec: str, name: str, whole: bool) -> Side:
    """Compiles a step and makes what it needs; all parameters are the same constant."""
    mesh, layout = make_mesh(mesh_spec), rules()
    columns = tuple(f"c{i}" for i in range(options.features))
    share = rows // options.features
    model = dlrm(DLRMConfig(columns, (share,) * options.features, NUMBERS, size=options.size))
    rate, key = 0.01, jax.random.key(0)
    if whole:
        model: Model = replace(model, tables={})
        tx = DENSE[name](rate)
    else:
        dense = optimizer(AdamW(schedule="constant", warmup=0.0), 1)
        tx = with_tables(dense, model, BY_NAME[name](rate))
    shapes = jax.eval_shape(model.init, key)
    variables = create(
        lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes),
        shardings=shardings(model.axes, shapes, mesh, layout),
    )
    rng = np.random.default_rng(0)

    def batch() -> dict[str, np.ndarray]:
        # All different, so that a batch has as many rows of every table.
        ids = {c: rng.choice(share, options.batch, replace=False).astype(np.int32) for c in columns}
        numbers = {c: rng.normal(size=options.batch).astype(np.float32) for c in NUMBERS}
        return {**ids, **numbers, "labels": rng.integers(0, 2, options.batch).astype(np.int32)}

    batches = [put(batch(), mesh, layout) for _ in range(8)]
    step = make_step(model, clicks, tx, mesh=mesh, rules=layout)
    return Side(rows, step, initial_state(variables, tx, mesh), batches, [], [])


def clicks(logits: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Log-loss of clicks."""
    losses = optax.sigmoid_binary_cross_entropy(logits, batch["labels"].astype(logits.dtype))
    return jnp.sum(losses), jnp.asarray(losses.size, losses.dtype)


if __name__ == "__main__":
    sys.exit(main())
