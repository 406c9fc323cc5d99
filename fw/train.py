"""The training loop: steps, a line of progress, evaluations, checkpoints. It knows no task.

Everything that decides a number is an argument; the loop only calls `step` on `batches(i)` in
order. So a run that is killed and resumed takes the same steps as one that was not.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from fw import run
from fw.checkpoint import Checkpoints
from fw.data import prefetch
from fw.errors import FwError
from fw.step import TrainState
from fw.tasks import Summary
from sharding import Rules, put


@dataclass
class Progress:
    """One line on a terminal that is written over, or a line now and then in a log file."""

    total: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    began: float = field(default_factory=time.perf_counter)
    first: int = 0

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Says how far the run is and when it will be done, in seconds from now."""
        done = max(step - self.first, 1)
        left = (time.perf_counter() - self.began) / done * (self.total - step)
        line = (
            f"step {step}/{self.total}  loss {loss:.4f}  "
            f"{tokens_per_second:,.0f} tokens/s  ETA {duration(left)}"
        )
        self.write(f"\r\x1b[2K{line}" if self.stream.isatty() else f"{line}\n")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self.write(f"\r\x1b[2K{text}\n" if self.stream.isatty() else f"{text}\n")

    def write(self, text: str) -> None:
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
      batches: `batches(i)` is the host batch of step i.
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
      FwError: the loss is not finite; the last good checkpoint stays.
    """
    first = int(state.step)
    progress = Progress(steps, first=first)
    pending: list[Mapping[str, jax.Array]] = []
    mark = time.perf_counter()
    for index, batch in zip(
        range(first, steps), _on_devices(batches, first, steps, mesh, rules), strict=True
    ):
        state, measured = step(state, batch)
        pending.append(measured)
        now = index + 1
        due = now % evaluate_every == 0 or now == steps
        if now % log_every and not due:
            continue
        record = _interval(pending, now, mark)
        run.log(folder, {**record, "learning_rate": float(learning_rate(index))})
        progress.show(now, record["loss"], record["tokens_per_second"])
        if not record["loss"] < float("inf"):
            raise FwError(
                f"{folder}: the loss is {record['loss']} at step {now}; lower --learning-rate, "
                "or train with --precision f32; the last checkpoint is good"
            )
        if due:
            summary = evaluate(state.variables)
            figures = {k: v for k, v in summary.figures.items() if isinstance(v, float)}
            run.log(folder, {"kind": "eval", "step": now, "split": "dev", **figures,
                             "metric": summary.metric, "value": summary.value})  # fmt: skip
            checkpoints.save(state, figures)
            progress.say(f"step {now}/{steps}  dev {summary.metric} {summary.value:.4f}")
        pending, mark = [], time.perf_counter()
    return state


def _on_devices(batches, first: int, stop: int, mesh: Mesh, rules: Rules) -> Iterator[Any]:
    return prefetch(lambda i: put(batches(i), mesh, rules), first, stop=stop)


def _interval(pending, now: int, mark: float) -> dict[str, Any]:
    """Averages over the steps since the last line; reading them waits for the devices."""
    host = jax.device_get(pending)
    seconds = time.perf_counter() - mark
    tokens = int(sum(int(m["tokens"]) for m in host))
    return {
        "kind": "train",
        "step": now,
        "loss": float(sum(float(m["loss"]) for m in host) / len(host)),
        "grad_norm": float(host[-1]["grad_norm"]),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }
