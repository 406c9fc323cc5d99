"""Images a second of a ResNet on small images, in training and inference: fw and torch.

The model of `MODEL`, whose test accuracy on Fashion-MNIST `--fit` finds, from the same parameters
and with the same batches, loss, clipping and AdamW. The sides take turns, round after round; torch
runs eagerly, with channels first and last, and once more with the malloc settings that fw gives to
itself. Losses of the first steps are compared.

    .venv/bin/python scripts/bench/images.py
    .venv/bin/python scripts/bench/images.py --fit fashion_mnist    # a folder with the four files
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fw import host, precision, report
from fw.data.augment import Augment
from fw.data.batches import Batches
from fw.data.pixel_tables import read_idx
from fw.data.rows import Rows
from fw.model import Model
from fw.models.pixels import normalised
from fw.models.resnet import ResNetConfig, resnet
from fw.optimizer import AdamW, optimizer
from fw.step import TrainState, initial_state, make_step
from fw.tasks.image_classification import mixed_cross_entropy
from sharding import create, make_mesh, put, rules, shardings

BENCH = Path(__file__).parent
SIZE, LABELS = 28, 10


# How Fashion-MNIST is learnt.
MODEL = ResNetConfig(
    embedding_size=32,
    hidden_sizes=(64, 128, 256),
    depths=(1, 1, 1),
    num_labels=LABELS,
    num_channels=1,
    layer_type="basic",
    stem="small",
    downsample_in_first_stage=True,
)
ADAM = AdamW(learning_rate=5e-3, schedule="cosine", warmup=0.1, weight_decay=0.05, b2=0.99)
EPOCHS, BATCH = 6, 128
AUGMENT, SMOOTHING = Augment(flip=True), 0.1
MEAN, STD = 0.2860, 0.3530
"""Of the pixels of the training images, scaled to 1."""

MESH, RULES = "data=1", "data"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of each side in a round")
    parser.add_argument(
        "--peer", default=f"{BENCH / 'peer'} peer_images.py", help="the command that runs torch"
    )
    parser.add_argument("--fit", metavar="FOLDER", help="of the IDX files: learn them instead")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    host.prepare(MESH)
    found = fit(Path(arguments.fit)) if arguments.fit else compare(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))
    return 0


def training(
    model: Model, adam: AdamW, steps: int, smoothing: float = 0.0
) -> tuple[TrainState, Callable[..., Any]]:
    """A state and the step that moves it."""
    mesh, layout = make_mesh(MESH), rules(RULES)
    key = jax.random.key(0)
    lie = shardings(model.axes, jax.eval_shape(model.init, key), mesh, layout)
    tx = optimizer(adam, steps)
    loss = partial(mixed_cross_entropy, smoothing=smoothing)
    step = make_step(model, loss, tx, mesh=mesh, rules=layout)
    state = initial_state(create(model.init, key, shardings=lie), tx, mesh)
    return state, lambda state, batch: step(state, put(batch, mesh, layout))


# Side by side.

CONSTANT = dataclasses.replace(ADAM, schedule="constant", warmup=0.0)
"""What both sides step by."""


def compare(arguments: Any) -> dict[str, Any]:
    rng, count = np.random.default_rng(0), 4
    shape = (count, BATCH, SIZE, SIZE, 1)
    batches = {
        "pixel_values": rng.normal(size=shape).astype(np.float32),
        "labels": rng.integers(0, LABELS, shape[:2], np.int32),
    }
    ours = Ours(batches)
    times: dict[str, dict[str, list[float]]] = {"train": {}, "infer": {}}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), ours.state, batches)
        peers = {
            "torch": Peer(arguments.peer, folder, "first"),
            "torch, channels last": Peer(arguments.peer, folder, "last"),
            "torch, channels last, fw's malloc": Peer(arguments.peer, folder, "last", host.MALLOC),
        }
        sides: dict[str, Any] = {"fw": ours, **peers}
        first = {name: side.do("train", 2)["loss"] for name, side in sides.items()}
        for side in sides.values():
            side.do("infer", 2)
        for _ in range(arguments.rounds):
            for kind, spent in times.items():
                for name, side in sides.items():
                    seconds = side.do(kind, arguments.steps)["seconds"]
                    spent.setdefault(name, []).append(arguments.steps * BATCH / seconds)
        for peer in peers.values():
            peer.end()
    for kind, spent in times.items():
        rows = []
        for name, rates in spent.items():
            ratio = statistics.median(a / b for a, b in zip(spent["fw"], rates, strict=True))
            middle, low, high = statistics.median(rates), min(rates), max(rates)
            rows.append((name, f"{middle:.0f}", f"{low:.0f}–{high:.0f}", f"{ratio:.2f}"))
        titles = (f"images a second, {kind}", "median", "range", "fw is so many times faster")
        print(report.table(rows, titles), end="\n\n")
    print("losses of the second step:", ", ".join(f"{name} {x:.6f}" for name, x in first.items()))
    return {"images a second": times, "losses": first}


class Ours:
    """fw's side: steps and inference, compiled."""

    def __init__(self, batches: dict[str, np.ndarray]):
        model = resnet(MODEL)
        self.batches = [
            {name: x[i] for name, x in batches.items()} for i in range(len(batches["labels"]))
        ]
        self.state, self.step = training(model, CONSTANT, 1)
        apply = precision.apply(model.apply, "f32")
        self.infer = jax.jit(lambda variables, batch: apply(variables, batch)[0])
        self.at = 0

    def do(self, kind: str, count: int) -> dict[str, float]:
        """Takes so many steps, or answers so many batches; seconds, and the last loss."""
        began = time.perf_counter()
        for _ in range(count):
            batch = self.batches[self.at % len(self.batches)]
            self.at += 1
            if kind == "train":
                self.state, figures = self.step(self.state, batch)
                last = figures["loss"]
            else:
                last = self.infer(self.state.variables, batch).mean()
        return {"loss": float(last), "seconds": time.perf_counter() - began}


def write(root: Path, state: TrainState, batches: dict[str, np.ndarray]) -> None:
    """What the peer starts from."""
    told = dataclasses.asdict(MODEL)
    told |= {"blocks": list(MODEL.blocks()), "threads": os.cpu_count()}
    told |= dataclasses.asdict(CONSTANT)
    (root / "model.json").write_text(json.dumps(told))
    leaves = jax.tree.leaves_with_path(state.variables["params"])
    named: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves
    }
    np.savez(root / "model.npz", **named)
    arrays: dict[str, Any] = dict(batches)
    np.savez(root / "batches.npz", **arrays)


class Peer:
    """torch's side, in a process of its own that waits for its turn."""

    def __init__(self, command: str, folder: str, layout: str, tunables: str = ""):
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        if tunables:
            environment["GLIBC_TUNABLES"] = tunables
        pipe, words = subprocess.PIPE, [*shlex.split(command), folder]
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.do("layout", layout)

    def do(self, kind: str, value: Any) -> dict[str, float]:
        """As `Ours.do`."""
        print(kind, value, file=self.process.stdin, flush=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with status {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        """Lets the process go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# Fashion-MNIST.


def fit(folder: Path) -> dict[str, Any]:
    rows, tests = read(folder, "train"), read(folder, "t10k")
    model = normalised(resnet(MODEL), [MEAN], [STD])
    batches = Batches(rows.arrays, BATCH, change=AUGMENT.change(rows, seed=0))
    epoch = batches.steps_per_epoch
    state, step = training(model, ADAM, EPOCHS * epoch, SMOOTHING)
    apply = precision.apply(model.apply, "f32")
    predict = jax.jit(lambda variables, images: apply(variables, {"images": images})[0].argmax(-1))
    table, began, accuracy = [], time.perf_counter(), 0.0
    for number in range(EPOCHS):
        for i in range(number * epoch, (number + 1) * epoch):
            state, _ = step(state, batches(i))
        parts = [predict(state.variables, x) for x in np.split(tests.arrays["images"], 20)]
        accuracy = float(np.mean(np.concatenate(parts) == tests.arrays["labels"]))
        seconds = time.perf_counter() - began
        table.append((number + 1, f"{100 * accuracy:.2f}", f"{seconds:.0f}"))
        print(*table[-1], flush=True)
    print(report.table(table, ("epoch", "test accuracy, %", "seconds")))
    return {"accuracy": accuracy, "seconds": time.perf_counter() - began}


def read(folder: Path, split: str) -> Rows:
    """Images u8 [N, 28, 28, 1] and labels i32 [N]."""
    images, labels = (
        read_idx(folder / f"{split}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1")
    )
    return Rows({"images": images[..., None], "labels": labels.astype(np.int32)}, {})


if __name__ == "__main__":
    sys.exit(main())
