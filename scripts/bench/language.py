"""A pretrained decoder against transformers: perplexity, and the loss curve of a fine-tune.

The model is read by fw, written as a folder, and read by transformers from there, so both have the
same weights, dequantised by the same package. Perplexity is that of the next token within windows
of a text. The fine-tune trains all parameters with AdamW on the same rows in the same order, here
on a mesh, there on one device.

    .venv/bin/python scripts/bench/language.py --text input.txt
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

import fw
from fw import data, precision, tasks
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from sharding import put, scope

BENCH = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="a decoder")
    parser.add_argument("--text", required=True, help="a file of text")
    parser.add_argument("--windows", type=int, default=64, help="of the perplexity; 0 for none")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    parser.add_argument("--steps", type=int, default=100, help="of the fine-tune; 0 for none")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--mesh", default="fsdp=4", help="of the fine-tune")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        loaded = fw.load(arguments.model, mesh=arguments.mesh)
        fw.save(root / "model", loaded)
        tokenizer = data.load_tokenizer(root / "model")
        documents = data.read_documents(arguments.text)
        if arguments.windows:
            encoded = data.encode_documents(tokenizer, documents, max_length=arguments.window)
            count = arguments.windows * arguments.window
            ids = encoded.input_ids[:count].reshape(-1, arguments.window)
            figures["perplexity"] = perplexity(loaded, root, ids)
        if arguments.steps:
            encoded = data.encode_documents(tokenizer, documents, max_length=arguments.length)
            rows = data.pack(encoded, arguments.length).arrays
            batches = data.Batches(rows, arguments.batch, seed=1)
            figures["training"] = training(loaded, root, batches, arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2))
    return 0


def peer(command: str, root: Path) -> None:
    subprocess.run([BENCH / "peer", "peer_language.py", command, root], check=True)


def perplexity(loaded: Any, root: Path, ids: np.ndarray) -> dict[str, float]:
    """Of the next tokens in each window, by both."""
    apply = jax.jit(precision.apply(loaded.model.apply, "f32"))
    targets = np.full_like(ids, data.IGNORE)
    targets[:, :-1] = ids[:, 1:]
    ones, total = np.ones_like(ids), 0.0
    place = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    size = 4
    for i in range(0, len(ids), size):
        part = slice(i, i + size)
        batch = {"input_ids": ids[part], "segment_ids": ones[part], "position_ids": place[part],
                 "targets": targets[part]}  # fmt: skip
        with scope(loaded.mesh, loaded.rules):
            outputs, _ = apply(loaded.variables, put(batch, loaded.mesh, loaded.rules))
        total += float(np.asarray(outputs["losses"], np.float64).sum())
    count = int((targets != data.IGNORE).sum())
    own = math.exp(total / count)
    np.savez(root / "windows.npz", ids=ids)
    peer("perplexity", root)
    theirs = json.loads((root / "perplexity.json").read_text())
    print(f"perplexity of {count} tokens: fw {own:.6f}, transformers {theirs:.6f}, "
          f"difference {abs(own / theirs - 1):.2e}")  # fmt: skip
    return {"tokens": count, "fw": own, "transformers": theirs}


def training(loaded: Any, root: Path, batches: Any, options: Any) -> dict[str, Any]:
    """The losses of every step by both."""
    recipe = AdamW(learning_rate=options.learning_rate, warmup=0.0, schedule="constant",
                   weight_decay=0.01, clip=1.0)  # fmt: skip
    steps = [batches(i) for i in range(options.steps)]
    rows: Any = {k: np.stack([s[k] for s in steps]) for k in steps[0]}
    np.savez(root / "steps.npz", **rows)
    told = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay,
            "clip": recipe.clip,
            "b1": recipe.b1, "b2": recipe.b2, "eps": recipe.epsilon}  # fmt: skip
    (root / "training.json").write_text(json.dumps(told))
    peer("train", root)
    theirs = json.loads((root / "losses.json").read_text())

    tx = optimizer(recipe, options.steps)
    step = make_step(loaded.model, tasks.word_loss, tx, mesh=loaded.mesh, rules=loaded.rules)
    state, own = initial_state(loaded.variables, tx, loaded.mesh), []
    began = time.perf_counter()
    for number, batch in enumerate(steps):
        state, metrics = step(state, put(batch, loaded.mesh, loaded.rules))
        own.append(float(metrics["loss"]))
        if (number + 1) % 10 == 0:
            left = (time.perf_counter() - began) / (number + 1) * (len(steps) - number - 1)
            print(f"step {number + 1}: fw {own[-1]:.5f}, torch {theirs[number]:.5f}; "
                  f"{left:.0f} s left", file=sys.stderr)  # fmt: skip
    apart = np.abs(np.array(own) / np.array(theirs) - 1)
    print(f"{len(own)} steps on {options.mesh}: loss {own[0]:.4f} to {own[-1]:.4f}; from torch's "
          f"at most {apart.max():.2e}, at the end {apart[-1]:.2e}")  # fmt: skip
    return {"fw": own, "torch": theirs}


if __name__ == "__main__":
    sys.exit(main())
