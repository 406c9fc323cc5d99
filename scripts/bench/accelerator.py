"""What a GPU or TPU makes of fw: goldens, and training steps beside torch's of the same models.

Each side runs in a process of its own, fw and torch in turn, on batches that lie on the device; the
figures are medians of rounds. torch and transformers are those of this environment: where they are
not installed, only fw's side is measured. With --goldens, folders that transformers wrote are read
and their logits compared; with --artifact, one that was exported elsewhere answers here. The status
is 1 if a side does not end well, or a golden is further off than BOUND.

    python scripts/bench/accelerator.py --goldens golden/ --models bert,vit,resnet
"""

# pyright: reportMissingImports=false

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that the peak is told

BERT: dict[str, Any] = {
    "vocab_size": 30_528, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
VIT: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072,
}  # fmt: skip
RESNET: dict[str, Any] = {
    "embedding_size": 64, "hidden_sizes": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3),
    "layer_type": "bottleneck",
}  # fmt: skip
LABELS = {"bert": 9, "vit": 1000, "resnet": 1000}
ROWS = {"bert": 64, "vit": 128, "resnet": 128}
LENGTH, SIDE = 128, 224
RATE = 1e-4
BOUND = 1e-5
"""By how much a golden's logits in f32 may differ; 7.2e-07 was the most on an H100 (`LOG.md`)."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="bert,vit,resnet", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="of texts (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--goldens", type=Path, help="a folder of golden models")
    parser.add_argument("--artifact", type=Path, help="an artifact, exported anywhere")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, model = options.side.split(":")
        print(json.dumps(SIDES[side](model, options)))
        return 0
    found: dict[str, Any] = {"steps": {}}
    good = True
    if options.goldens or options.artifact:
        checked = found["checks"] = json.loads(run("checks:", options))
        goldens = checked.get("goldens", {})
        off = [name for name, error in goldens.items() if not error <= BOUND]  # nan is off, too
        good = bool(checked) and not off
        if off:
            print(f"more than {BOUND:.0e} off: {', '.join(off)}", file=sys.stderr)
    sides = ["fw"]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        sides += ["torch", *(["compiled"] if options.compile else [])]
    for model in filter(None, options.models.split(",")):
        found["steps"][model] = {
            side: json.loads(run(f"{side}:{model}", options)) for side in sides
        }
        good &= all(found["steps"][model].values())
        show(model, found["steps"][model])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return 0 if good else 1


def run(side: str, options: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--side", side]
    command += ["--steps", str(options.steps), "--rounds", str(options.rounds)]
    command += ["--length", str(options.length)]
    for name in ("goldens", "artifact"):
        if value := getattr(options, name):
            command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        print(f"{side}: ended with status {done.returncode}", file=sys.stderr)
        return "{}"
    print(*lines[:-1], sep="\n", flush=True)
    return lines[-1]


def show(model: str, sides: dict[str, Any]) -> None:
    peer = sides.get("torch", {}).get("ms")
    for side, one in sides.items():
        if one:
            ratio = f"  {peer / one['ms']:.2f} x torch" if peer else ""
            rate = one["rows"] / one["ms"] * 1e3
            print(
                f"{model:7} {side:9} {one['ms']:8.2f} ms a step  {rate:9,.0f} rows/s  "
                f"{one['peak'] / 2**30:6.2f} GiB  loss {one['loss']:.4f}{ratio}",
                flush=True,
            )


def timed(step: Callable[[], Any], wait: Callable[[Any], Any], steps: int, rounds: int) -> float:
    """The median over rounds of milliseconds a step, warm."""
    for _ in range(5):
        last = step()
    wait(last)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(steps):
            last = step()
        wait(last)
        seconds.append((time.perf_counter() - began) / steps)
    return 1e3 * statistics.median(seconds)


def made(model: str, length: int) -> dict[str, np.ndarray]:
    """The same batch for both sides; of texts as many tokens, whatever their length."""
    rng, rows = np.random.default_rng(0), ROWS[model]
    if model == "bert":
        shape = (rows * LENGTH // length, length)
        return {
            "input_ids": rng.integers(0, BERT["vocab_size"], shape, np.int32),
            "labels": rng.integers(0, LABELS[model], shape, np.int32),
        }
    return {
        "pixel_values": rng.normal(size=(rows, SIDE, SIDE, 3)).astype(np.float32),
        "labels": rng.integers(0, LABELS[model], rows, np.int32),
    }


def fw_side(name: str, options: argparse.Namespace) -> dict[str, Any]:
    import jax

    from fw.models.bert import BertConfig, bert
    from fw.models.resnet import ResNetConfig, resnet
    from fw.models.vit import vit
    from fw.models.vit_config import ViTConfig
    from fw.optimizer import AdamW, optimizer
    from fw.step import initial_state, make_step
    from fw.tasks import cross_entropy
    from sharding import create, make_mesh, put, rules, shardings

    labels, batch = LABELS[name], made(name, options.length)
    model = {
        "bert": lambda: bert(BertConfig(**BERT, num_labels=labels, task="token_classification")),
        "vit": lambda: vit(ViTConfig(**VIT, num_labels=labels)),
        "resnet": lambda: resnet(ResNetConfig(**RESNET, num_labels=labels)),
    }[name]()
    if name == "bert":
        ones = np.ones_like(batch["input_ids"])
        batch |= {"segment_ids": ones, "position_ids": np.cumsum(ones, 1, dtype=np.int32) - ones}
    mesh, where, key = make_mesh("data=1"), rules(), jax.random.key(0)
    places = shardings(model.axes, jax.eval_shape(model.init, key), mesh, where)
    tx = optimizer(AdamW(learning_rate=RATE, schedule="constant", warmup=0.0, clip=0.0), 100)
    step = make_step(model, cross_entropy, tx, mesh=mesh, rules=where, precision="bf16")
    state = [initial_state(create(model.init, key, shardings=places), tx, mesh)]
    there = put(batch, mesh, where)
    began = time.perf_counter()
    text = step.lower(state[0], there).compile().as_text()
    compiled = time.perf_counter() - began
    fused = text.count("__cudnn$fmha"), text.count("__cudnn$conv")
    print(f"fw:{name}: compiled in {compiled:.1f} s; cuDNN attention {fused[0]}, conv {fused[1]}")

    def once() -> Any:
        state[0], metrics = step(state[0], there)
        return metrics["loss"]

    ms = timed(once, jax.block_until_ready, options.steps, options.rounds)
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 0)
    return {"ms": ms, "rows": len(batch["labels"]), "peak": peak, "loss": once().item()}


def torch_side(name: str, options: argparse.Namespace, compile_: bool = False) -> dict[str, Any]:
    import torch
    import transformers as hf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels, batch = LABELS[name], made(name, options.length)
    torch.manual_seed(0)
    model = {
        "bert": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=labels)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=labels)),
        "resnet": lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(**{k: list(v) if isinstance(v, tuple) else v for k, v in
                               RESNET.items()}, num_labels=labels)
        ),
    }[name]()  # fmt: skip
    model = model.to(device).train()
    inputs = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
    inputs["labels"] = inputs["labels"].long()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].permute(0, 3, 1, 2)
    if name == "resnet":  # as NVIDIA's guide has it
        model = model.to(memory_format=torch.channels_last)
        inputs["pixel_values"] = inputs["pixel_values"].to(memory_format=torch.channels_last)
    tx = torch.optim.AdamW(model.parameters(), lr=RATE, fused=device == "cuda")
    forward = torch.compile(model) if compile_ else model

    def once() -> Any:
        with torch.autocast(device, torch.bfloat16):
            loss = forward(**inputs).loss
        loss.backward()
        tx.step()
        tx.zero_grad(set_to_none=True)
        return loss

    ms = timed(once, lambda loss: loss.item(), options.steps, options.rounds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"ms": ms, "rows": len(batch["labels"]), "peak": peak, "loss": once().item()}


def checks(_: str, options: argparse.Namespace) -> dict[str, Any]:
    """Goldens in float32, and an artifact's golden outputs."""
    import jax

    from fw import export, hub, precision
    from sharding import make_mesh, rules

    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(f"{found['device']}, jax {found['jax']}")
    files = sorted(options.goldens.glob("*/io.npz")) if options.goldens else []
    if options.goldens and not files:
        raise SystemExit(f"{options.goldens}: has no folder with io.npz")
    goldens = found["goldens"] = {}
    for folder in files:
        io, name = np.load(folder), folder.parent.name
        loaded = hub.load(folder.parent, mesh=make_mesh("data=1"), rules=rules())
        apply = jax.jit(precision.apply(loaded.model.apply, "f32"))
        mask = np.ones(1)
        if "in_pixel_values" in io:
            batch = {"pixel_values": np.moveaxis(io["in_pixel_values"], 1, -1)}
        else:
            ids = io["in_input_ids"].astype(np.int32)
            mask = io.get("in_attention_mask", np.ones_like(ids)).astype(np.int32)
            batch = {
                "input_ids": ids,
                "segment_ids": mask,
                "position_ids": np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1)),
                "first": np.zeros((len(ids), 1), np.int32),
            }
            if "in_token_type_ids" in io:
                batch["token_type_ids"] = io["in_token_type_ids"].astype(np.int32)
        got, want = np.asarray(apply(loaded.variables, batch)[0]), io["out_logits"]
        got = got.reshape(want.shape) if got.size == want.size else got
        error = np.abs(got - want)
        error = error * mask[..., None] if want.ndim == 3 else error
        goldens[name] = float(error.max())
        print(f"{name:34} {goldens[name]:.1e}", flush=True)
    if options.artifact:
        artifact = export.load(options.artifact)  # which compares its golden outputs
        found["artifact"] = artifact.task
        print(f"artifact of {artifact.task}: golden outputs within tolerance")
    return found


SIDES = {
    "fw": fw_side,
    "torch": torch_side,
    "compiled": lambda *args: torch_side(*args, compile_=True),
    "checks": checks,
}

if __name__ == "__main__":
    sys.exit(main())
