"""The training loop: steps, a line of progress, evaluations, checkpoints. It knows no task.

Everything that decides a number is an argument; the loop only calls `step` on `batches(i)` in
order. So a run that is killed and resumed takes the same steps as one that was not.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from fw import run
from fw.checkpoint import Checkpoints
from fw.data import feed, prefetch
from fw.errors import FwError
from fw.step import TrainState
from fw.tasks import Summary
from sharding import Rules
from sharding.processes.cluster import beat


@dataclass
class Progress:
    """One line on a terminal that is written over, or a line now and then in a log file.

    Attributes:
      total: the last step.
      first: the step it starts from.
      stream: where to.
      began: when `first` was, by `time.perf_counter`.
    """

    total: int
    first: int = 0
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    began: float = field(default_factory=time.perf_counter)
    _compiled: bool = False

    def show(self, step: int, loss: float, rate: float, unit: str = "tokens") -> None:
        """Says how far the run is and when it will be done.

        Args:
          step: steps taken.
          loss: of the last ones.
          rate: of tokens, padding not counted, or of examples, a second.
          unit: which.
        """
        now = time.perf_counter()
        left = (now - self.began) / max(step - self.first, 1) * (self.total - step)
        if not self._compiled:  # the first steps compile: those after them tell the rate
            self.began, self.first, self._compiled = now, step, True
        self.line(f"step {step}/{self.total}  loss {loss:.4f}  {rate:,.0f} {unit}/s", left)

    def line(self, text: str, left: float) -> None:
        """Shows how far something is, and when it will be done.

        Args:
          text: how far.
          left: seconds.
        """
        line = f"{text}  ETA {duration(left)}"
        self._write(f"\r\x1b[2K{line}" if self.stream.isatty() else f"{line}\n")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._write(f"\r\x1b[2K{text}\n" if self.stream.isatty() else f"{text}\n")

    def close(self) -> None:
        """Ends the line that is written over, so that what others print has its own."""
        if self.stream.isatty():
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        """Only one process of several speaks."""
        if jax.process_index() == 0:
            self.stream.write(text)
            self.stream.flush()


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(59.6), duration(61), duration(7322)
    ('1m00s', '1m01s', '2h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def train(
    folder: Path,
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]],
    batches: Callable[[int], Mapping[str, Any]],
    *,
    steps: int,
    evaluate: Callable[[Any], Summary],
    checkpoints: Checkpoints,
    mesh: Mesh,
    rules: Rules,
    learning_rate: Callable[[int], Any],
    evaluate_every: int,
    log_every: int = 10,
) -> TrainState:
    """Trains from `state.step` up to `steps`.

    Args:
      folder: the run's, for `metrics.jsonl`.
      state: at its step; its buffers are donated.
      step: from `fw.step.make_step`.
      batches: `batches(i)` is the host batch of step i; of `fw.data.Batches`, each process takes
        only its rows.
      steps: the last step.
      evaluate: `evaluate(variables) -> Summary`, called with a checkpoint every `evaluate_every`
        steps and after the last.
      checkpoints: an open `Checkpoints`.
      mesh, rules: where batches go.
      learning_rate: by step, for the record.
      evaluate_every, log_every: in steps.

    Returns:
      The state after the last step.

    Raises:
      FwError: a loss, gradient or evaluation is not finite; such a state is never saved.
    """
    first = int(state.step)
    progress = Progress(steps, first)
    pending: list[Mapping[str, jax.Array]] = []
    mark = time.perf_counter()
    try:
        for index, batch in zip(
            range(first, steps), _on_devices(batches, first, steps, mesh, rules), strict=True
        ):
            now = index + 1
            beat(now)  # if the other processes wait below, the one they wait for is above
            state, measured = step(state, batch)
            pending.append(measured)
            rows = len(jax.tree.leaves(batch)[0])
            due = now % evaluate_every == 0 or now == steps
            if now % log_every and not due:
                continue
            beat()
            host = jax.device_get(pending)  # waits for the devices
            record, unit = _interval(host, now, time.perf_counter() - mark, rows)
            run.log(folder, {**record, "learning_rate": float(learning_rate(index))})
            progress.show(now, record["loss"], record[f"{unit}_per_second"], unit)
            for at, measured in enumerate(host, now - len(host) + 1):
                _check_finite(folder, at, measured, ("loss", "grad_norm"), checkpoints)
            if due:
                summary = evaluate(state.variables)
                figures = {k: v for k, v in summary.figures.items() if isinstance(v, float)}
                _check_finite(folder, now, figures, figures, checkpoints)
                run.log(folder, {"kind": "eval", "step": now, "split": "dev", **figures,
                                 "metric": summary.metric, "value": summary.value})  # fmt: skip
                beat()
                checkpoints.save(state, figures)
                progress.say(f"step {now}/{steps}  dev {summary.metric} {summary.value:.4f}")
            pending, mark = [], time.perf_counter()
    finally:
        progress.close()
    return state


def _on_devices(batches, first: int, stop: int, mesh: Mesh, rules: Rules) -> Iterator[Any]:
    return prefetch(lambda i: feed(batches, i, mesh, rules), first, stop=stop)


def _interval(
    host: Sequence[Mapping[str, Any]], now: int, seconds: float, rows: int
) -> tuple[dict[str, Any], str]:
    """Averages over the steps since the last line, and whether it counts tokens or examples."""
    tokens = sum(int(m["tokens"]) for m in host)
    unit, count = ("tokens", tokens) if tokens else ("examples", rows * len(host))
    record = {
        "kind": "train",
        "step": now,
        "loss": sum(float(m["loss"]) for m in host) / len(host),
        "grad_norm": float(host[-1]["grad_norm"]),
        unit: count,
        f"{unit}_per_second": count / seconds,
        "seconds": seconds,
    }
    return record, unit


def _check_finite(
    folder: Path,
    step: int,
    figures: Mapping[str, Any],
    names: Iterable[str],
    checkpoints: Checkpoints,
) -> None:
    for name in names:
        if not math.isfinite(figures[name]):
            last = checkpoints.latest
            kept = "there is no checkpoint yet" if last is None else f"that of step {last} is good"
            raise FwError(
                f"{folder}: {name} is {float(figures[name])} at step {step}; {kept}. In another "
                "folder, start with a lower --learning-rate, with --clip 1 or --precision f32"
            )
