"""Sides of a benchmark, processes that take turns: none finds another's memory or threads.

A program gives `main` two functions: `prepare` makes the files of its sides in a folder, `load`
opens one of them as a `Side`. Each side is then a process; all wait while one works. The program
prints one line of JSON: quality on the test split, bytes on disk and the latency of a batch.

With `--serve` it goes on: it reads the name of a side a line and answers each with the seconds that
one batch took, so that another program can take turns with it; `quit`, or the end of the input,
ends it. Every turn is a call that nobody times, which wakes threads and caches, and one that is.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import peer_inputs

WARM = 3
"""Calls that nobody times, when a side is ready."""


@dataclass(frozen=True)
class Side:
    """One of those that are compared.

    Attributes:
      predict: logits of a batch, or of a decoder the loss of each next token.
      bytes: of its model's files.
      how: what was done to the model, in words.
    """

    predict: Callable[[peer_inputs.Batch], np.ndarray]
    bytes: int
    how: str


Prepare = Callable[[argparse.Namespace], None]
Load = Callable[[argparse.Namespace, str], Side]


def main(
    description: str, known: Sequence[str], prepare: Prepare, load: Load, packages: Sequence[str]
) -> None:
    """Runs the program of these sides.

    Args:
      description: of the program.
      known: names of its sides.
      prepare: writes into `options.work` what `load` needs for `options.sides`.
      load: opens a side; called in a process of its own.
      packages: whose versions are told.
    """
    options = parse(description, known)
    if options.one:
        child(options, prepare, load)
        return
    with folder(options.work) as place, contextlib.ExitStack() as stack:
        options.work = place
        with Worker(options, "prepare") as first:
            first.ask()
        workers = {side: stack.enter_context(Worker(options, side)) for side in options.sides}
        told = {side: worker.ask() for side, worker in workers.items()}
        if not options.latency_only:
            for side, worker in workers.items():
                told[side] |= worker.ask("quality")
        seconds: dict[str, list[float]] = {side: [] for side in workers}
        for number in range(options.rounds):
            turn = number % len(workers)
            for side in [*options.sides[turn:], *options.sides[:turn]]:
                seconds[side].append(workers[side].ask("time")["seconds"])
        for side, own in seconds.items():
            told[side]["latency_ms"] = 1e3 * statistics.median(own) if own else None
            told[side]["seconds"] = own
        kept = ("task", "batch", "length", "threads", "rounds", "calibration", "limit")
        versions = {name: importlib.metadata.version(name) for name in packages}
        asked = {name: getattr(options, name) for name in kept}
        print(json.dumps({**asked, "sides": told, "versions": versions}), flush=True)
        if options.serve:
            serve(workers)


def parse(description: str, known: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peer_inputs.add_arguments(parser)
    add = parser.add_argument
    add("--sides", default=",".join(known), help="with commas between (default: %(default)s)")
    add("--rounds", type=int, default=20, help="timed batches of each (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="default: %(default)s")
    add("--latency-only", action="store_true", help="judge no answers")
    add("--serve", action="store_true", help="after that, time a batch of the side of each line")
    add("--work", type=Path, help="keep the models in this folder, which must be new")
    add("--one", help=argparse.SUPPRESS)  # a side in this process, or "prepare"
    options = parser.parse_args()
    options.sides = options.sides.split(",")
    if unknown := [side for side in options.sides if side not in known]:
        parser.error(f"--sides: {', '.join(unknown)}: choose from {', '.join(known)}")
    return options


@contextlib.contextmanager
def folder(kept: Path | None) -> Iterator[Path]:
    """A folder that was not there before, and goes unless it is to be kept."""
    if kept:
        kept.mkdir(parents=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def serve(workers: dict[str, "Worker"]) -> None:
    """Answers each line, the name of a side, with seconds."""
    for line in sys.stdin:
        if (side := line.strip()) == "quit":
            return
        if side not in workers:
            sys.exit(f"{side!r}: expected one of {', '.join(workers)}, quit")
        print(workers[side].ask("time")["seconds"], flush=True)


class Worker:
    """This program again, for one side, in a process that waits for its turn."""

    def __init__(self, options: argparse.Namespace, one: str):
        self.one = one
        words = [sys.executable, sys.argv[0], f"--one={one}"]
        for name, value in vars(options).items():
            if name == "sides":
                words.append(f"--sides={','.join(value)}")
            elif not isinstance(value, bool) and value is not None:
                words.append(f"--{name.replace('_', '-')}={value}")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)

    def ask(self, what: str = "") -> dict[str, Any]:
        """The answer to a question; to none, what it says by itself when it is ready."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if what:
            with contextlib.suppress(BrokenPipeError):  # it has ended: the empty line tells
                print(what, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.one}: ended with status {self.process.wait()}; see above")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def child(options: argparse.Namespace, prepare: Prepare, load: Load) -> None:
    """A worker's side of `Worker`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if options.one == "prepare":
        prepare(options)
        tell(answers, {})
        return
    side, batch = load(options, options.one), peer_inputs.timed(options)
    for _ in range(WARM):
        side.predict(batch)
    tell(answers, {"bytes": side.bytes, "how": side.how, "quality": None})
    for line in sys.stdin:
        if line.strip() == "quality":
            test = peer_inputs.inputs(options)
            quality = test.quality(side.predict, options.batch)
            tell(answers, {"quality": quality, "examples": test.examples})
        else:
            side.predict(batch)
            began = time.perf_counter()
            side.predict(batch)
            tell(answers, {"seconds": time.perf_counter() - began})


def tell(answers: TextIO, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=answers, flush=True)
