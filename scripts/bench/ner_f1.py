"""Entity F1 on test after fine-tuning: fw in bf16, f32 and int8 against its peer in f32, by seed.

Every side has the same sentences, hyper-parameters and number of sentences a step, is trained for
all epochs, and is scored with the parameters of the last step: nothing is chosen on dev. int8 is
the f32 model, quantised. F1 is that of whole entities, as seqeval counts them.

A result is kept as soon as it is there, so an interrupted benchmark goes on when started again;
results of other options, data or weights are measured anew, those of other code only with --fresh.

    .venv/bin/python scripts/bench/ner_f1.py --data wnut17/ --json ner_f1.json
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

import sides

from fw import host, report, run, stages
from fw.errors import FwError
from fw.finetune import finetune
from fw.options import add_options, read_options

SIDES = {"fw-f32": ("fw-f32", "fw-int8"), "fw-bf16": ("fw-bf16",), "peer-f32": ("peer-f32",)}
"""A training by name, and the figures that come of it."""

ONLY_AT_THE_END = 10**9  # as evaluate_every: the last step is always evaluated


@dataclasses.dataclass(frozen=True)
class Options(sides.Training):
    """What is measured.

    Attributes:
      length: pieces a row of fw, and pieces a sentence is cut to by the peer.
      epochs: passes over the training data.
      seeds: of head, order and dropout, with commas between them.
      only: some of the trainings, with commas between them.
      results: the file that keeps every result.
      fresh: measure again what it has.
      json: write the table to this file.
    """

    length: int = 128
    epochs: int = 3
    seeds: str = "0,1,2"
    only: str = ",".join(SIDES)
    results: str = "runs/bench/ner_f1.json"
    fresh: bool = False
    json: str = ""

    def __post_init__(self):
        """Checks what would fail only later."""
        super().__post_init__()
        if unknown := sorted(set(self.only.split(",")) - SIDES.keys()):
            raise FwError(f"only: {', '.join(unknown)} is none of {', '.join(SIDES)}")
        if not all(seed.isdecimal() for seed in self.seeds.split(",")):
            raise FwError(f"seeds is {self.seeds!r}; expected numbers, as in 0,1,2")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Options)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one training of fw, in this process
    arguments = parser.parse_args()
    try:
        options = read_options(arguments, Options)
        if arguments.one:
            host.prepare()
            print(json.dumps(train(options, arguments.one.removeprefix("fw-"))))
        else:
            compare(options)
    except FwError as error:
        print(f"ner_f1: {error}", file=sys.stderr)
        return 1
    return 0


def compare(options: Options) -> None:
    """Measures what is not known yet and prints the table."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = sides.prepare(options, Path(folder))
        for seed in map(int, options.seeds.split(",")):
            for name in options.only.split(","):
                found.append(measure(prepared, name, seed))
    scores: dict[str, list[float]] = {
        side: [100 * result["f1"][side] for result in found if side in result["f1"]]
        for name in options.only.split(",")
        for side in SIDES[name]
    }
    peer = scores.get("peer-f32")
    rows = [
        {
            "side": side,
            "f1": values,
            "mean": statistics.mean(values),
            "against_peer": statistics.mean(values) - statistics.mean(peer) if peer else None,
        }
        for side, values in scores.items()
    ]
    if options.json:
        run.write_json(options.json, {"options": options, "table": rows, "runs": found})
    cells = [
        (
            row["side"],
            *(f"{value:.2f}" for value in row["f1"]),
            f"{row['mean']:.2f}",
            "" if row["against_peer"] is None else f"{row['against_peer']:+.2f}",
        )
        for row in rows
    ]
    seeds = (f"seed {seed}" for seed in options.seeds.split(","))
    print(report.table(cells, ("test F1", *seeds, "mean", "− peer")))


def measure(options: Options, name: str, seed: int) -> dict[str, Any]:
    """The figures of one training: from the file of results, or measured and put there."""
    path = Path(options.results)
    known = run.read_json(path) if path.exists() else []
    key = {
        "training": name,
        "seed": seed,
        "inputs": sides.digest(options),
        **{
            k: getattr(options, k)
            for k in (
                "epochs",
                "batch",
                "rows",
                "length",
                "learning_rate",
                "weight_decay",
                "warmup",
            )
        },
    }
    same = [result for result in known if result["key"] == key]
    if same and not options.fresh:
        return same[-1]
    began = time.perf_counter()
    figures = peer(options, seed) if name == "peer-f32" else fw(options, name, seed)
    result = {"key": key, "seconds": time.perf_counter() - began, **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_json(path, [*known, result])
    shown = ", ".join(f"{side} {100 * f1:.2f}" for side, f1 in result["f1"].items())
    print(f"seed {seed}: {shown} ({report.seconds(result['seconds'])})", file=sys.stderr)
    return result


def peer(options: Options, seed: int) -> dict[str, Any]:
    """One training of the peer."""
    told = sides.peer(options, f"--epochs={options.epochs}", f"--seed={seed}")
    return {"f1": {"peer-f32": told["f1"]}, "dev_f1": told["dev_f1"], "told": told}


def fw(options: Options, name: str, seed: int) -> dict[str, Any]:
    """One training of fw, in a process of its own."""
    alone = dataclasses.replace(options, seeds=str(seed))
    return sides.process([sys.executable, __file__, f"--one={name}", *sides.arguments(alone)])


def train(options: Options, precision: str) -> dict[str, Any]:
    """One training of fw in this process, and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = sides.recipe(
            options, run=f"{folder}/run", epochs=float(options.epochs), precision=precision,
            seed=int(options.seeds), evaluate_every=ONLY_AT_THE_END,
        )  # fmt: skip
        place = finetune(recipe)
        f1 = {f"fw-{precision}": stages.evaluate_run(place, "test", name=precision).value}
        if precision == "f32":
            stages.compress_run(place)
            f1["fw-int8"] = stages.evaluate_run(place, "test", name="int8").value
        return {
            "f1": f1,
            "dev_f1": run.read_json(place / run.RESULT)["splits"]["dev"]["f1"],
            "told": {"config": run.config(place), "start": run.starts(place)[-1]},
        }


if __name__ == "__main__":
    sys.exit(main())
