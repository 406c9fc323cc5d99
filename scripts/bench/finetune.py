"""Real tokens per second of fine-tuning for named entities: fw against its peer (peer_ner.py).

End to end over the timed steps: making batches, forward, backward, clipping, AdamW. Compilation and
the first steps are not timed, nor is reading and tokenising. Real tokens are pieces of sentences,
padding not counted. The sides take turns, round after round, each measurement a process of its own.

    .venv/bin/python scripts/bench/finetune.py --data wnut17/ --json finetune.json
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import sides

from fw import data, host, hub, report, run
from fw.errors import FwError
from fw.finetune import prepare
from fw.optimizer import optimizer
from fw.options import add_options, read_options
from fw.recipe import TASKS
from fw.step import initial_state, make_step
from fw.tasks import make_task
from sharding import make_mesh, put, rules

SIDES = {
    "fw-bf16": ("bf16",),
    "fw-f32": ("f32",),
    "peer-f32": (),
    "peer-f32-grouped": ("--group-by-length",),
    "peer-bf16": ("--bf16",),
    "peer-bf16-grouped": ("--bf16", "--group-by-length"),
}
"""By name: fw's precision, or the peer's arguments; grouped: sentences of like length together."""


@dataclasses.dataclass(frozen=True)
class Options(sides.Training):
    """What is measured.

    Attributes:
      steps: timed.
      untimed: steps before the clock starts: both sides compile for new shapes.
      rounds: measurements of each side.
      only: some of the sides, with commas between them.
      json: write the figures to this file.
    """

    steps: int = 40
    untimed: int = 10
    rounds: int = 5
    only: str = ",".join(SIDES)
    json: str = ""

    def __post_init__(self):
        """Checks what would fail only later."""
        super().__post_init__()
        if unknown := sorted(set(self.names) - SIDES.keys()):
            raise FwError(f"only: {', '.join(unknown)} is none of {', '.join(SIDES)}")
        for name in ("steps", "untimed", "rounds"):
            if getattr(self, name) < 1:
                raise FwError(f"{name} is {getattr(self, name)}; expected 1 or more")

    @property
    def names(self) -> list[str]:
        """The sides, in the order of their turns."""
        return self.only.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Options)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement of fw, in this process
    arguments = parser.parse_args()
    try:
        options = read_options(arguments, Options)
        if arguments.one:
            host.prepare()
            print(json.dumps(measure(options, arguments.one)))
        else:
            compare(options)
    except FwError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    return 0


def compare(options: Options) -> None:
    """Measures all sides in turn and prints the table."""
    machine = sides.machine()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = sides.prepare(options, Path(folder))
        print(f"{machine['processor']}, {machine['cores']} cores; "
              f"fw {prepared.rows} rows × {options.length}, peer {options.batch} sentences a step",
              file=sys.stderr)  # fmt: skip
        for turn in range(options.rounds):
            for name in options.names:
                found = {"side": name, "round": turn, **measure_apart(prepared, name)}
                runs.append(found)
                print(f"{turn} {name}: {found['real_tokens_per_second']:,.0f} tokens/s",
                      file=sys.stderr)  # fmt: skip
    rows = summarise(runs)
    if options.json:
        run.write_json(
            options.json,
            {"options": options, "rows": prepared.rows, "machine": machine, "table": rows,
             "runs": runs},
        )  # fmt: skip
    cells = [
        (
            row["side"],
            *(f"{row[k]:,.0f}" for k in ("median", "min", "max")),
            report.percent(row["real_share"]),
            f"{row['against_best_peer']:.2f}" if row["against_best_peer"] else "",
        )
        for row in rows
    ]
    titles = ("side", "real tokens/s", "min", "max", "not padding", "× best peer")
    print(report.table(cells, titles))


def measure_apart(options: Options, name: str) -> dict[str, Any]:
    """One measurement of a side in a process of its own."""
    if name.startswith("peer"):
        timed = (f"--steps={options.steps}", f"--warmup-steps={options.untimed}")
        return sides.peer(options, *timed, *SIDES[name])
    return sides.process(
        [sys.executable, __file__, f"--one={SIDES[name][0]}", *sides.arguments(options)]
    )


def measure(options: Options, precision: str) -> dict[str, Any]:
    """Steps of fw in this process, made and fed as `fw.finetune` does."""
    recipe = sides.recipe(options, precision=precision)
    total = options.untimed + options.steps
    source = Path(options.model)
    mesh, where = make_mesh(recipe.mesh), rules(recipe.rules)
    began = time.perf_counter()
    prepared = prepare(recipe, Path(options.data), source)
    seconds_prepare = time.perf_counter() - began
    task = make_task(TASKS[recipe.task], prepared.labels)
    loaded = hub.load(
        source, task=task.name, labels=task.labels, mesh=mesh, rules=where,
        key=jax.random.key(recipe.seed),
    )  # fmt: skip
    tx = optimizer(recipe, total)
    step = make_step(
        loaded.model, task.loss, tx, mesh=mesh, rules=where, precision=precision, seed=recipe.seed
    )
    state = initial_state(loaded.variables, tx, mesh)
    batches = data.Batches(prepared.rows["train"].arrays, recipe.batch, recipe.seed)

    measured = []
    started = time.perf_counter()
    stream = data.prefetch(lambda i: put(batches(i), mesh, where), stop=total)
    for index, batch in enumerate(stream):
        if index == options.untimed:
            jax.block_until_ready(state)
            started = time.perf_counter()
        state, figures = step(state, batch)
        measured.append(figures)
    jax.block_until_ready((state, measured))
    seconds = time.perf_counter() - started
    tokens = sum(int(figures["tokens"]) for figures in measured[options.untimed :])
    return {
        "real_tokens_per_second": tokens / seconds,
        "padded_tokens_per_second": recipe.batch * recipe.length * options.steps / seconds,
        "seconds_train": seconds,
        "seconds_prepare": seconds_prepare,
        "steps": options.steps,
        "loss": float(measured[-1]["loss"]),
        "precision": precision,
        "jax": jax.__version__,
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each side: median, extremes, and the ratio of medians to the fastest peer's."""
    by_side: dict[str, list[dict[str, Any]]] = {}
    for found in runs:
        by_side.setdefault(found["side"], []).append(found)
    speeds = {s: [r["real_tokens_per_second"] for r in found] for s, found in by_side.items()}
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    best = max((m for side, m in medians.items() if side.startswith("peer")), default=None)
    return [
        {
            "side": side,
            "median": medians[side],
            "min": min(speeds[side]),
            "max": max(speeds[side]),
            "real_share": statistics.median(
                r["real_tokens_per_second"] / r["padded_tokens_per_second"] for r in found
            ),
            "against_best_peer": medians[side] / best if best else None,
        }
        for side, found in by_side.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
