"""fw's sides of the comparison of compressed models: a fine-tuned folder by precision and recipe.

    .venv/bin/python scripts/bench/compress_side.py --model DIR --task ner --data wnut17/ \
        --sides f32,bf16,int8,int8-static

A side is "f32", "bf16" or a recipe of `fw.compression`. Bytes are those of the tensors' file;
statistics are of `--calibration` training batches. Options and what is printed are
`peer_compress.py`'s.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import peer_inputs
import peer_turns
from peer_inputs import Batch
from peer_turns import Side

from fw.compression import RECIPES
from fw.data import IGNORE

SIDES = ("f32", "bf16", *RECIPES)
TASKS = {
    "ner": "token_classification",
    "classify": "sequence_classification",
    "images": "image_classification",
    "lm": "causal_lm",
}


def main() -> None:
    peer_turns.main(__doc__ or "", SIDES, lambda _: None, load, ("jax", "flax", "quax"))


def load(options: argparse.Namespace, side: str) -> Side:
    """Opens a side; XLA takes a thread for each core that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import jax

    import compress
    from fw import hub, precision
    from fw.compression import calibrated, recipe
    from fw.tensors import write_tensors
    from sharding import make_mesh, rules

    loaded = hub.load(
        options.model, mesh=make_mesh("data=1"), rules=rules(), task=TASKS[options.task]
    )
    params, state = loaded.variables["params"], loaded.variables["state"]
    policy, how = side if side in ("f32", "bf16") else "f32", side

    def forward(params: Any, batch: Any) -> Any:
        answer = loaded.model.apply({"params": params, "state": state}, batch)[0]
        return answer["losses"][:, :-1] if options.task == "lm" else answer

    if side not in ("f32", "bf16"):
        name, transform = recipe(side, params)
        batches = (given(batch) for batch in peer_inputs.calibration(options))
        params, report = transform(params, calibrated(transform, forward, params, batches))
        how = f"{name}: {len([r for r in report if r.error])} arrays"
    call = jax.jit(precision.apply(compress.apply(forward), policy))
    arrays = compress.to_arrays(params)
    if side == "bf16":
        arrays = {
            n: np.asarray(x).astype(jax.numpy.bfloat16) if n.endswith("kernel") else x
            for n, x in arrays.items()
        }
    path = Path(options.work, f"{side}.safetensors")
    write_tensors(path, {name: np.asarray(x) for name, x in arrays.items()})

    def predict(batch: Batch) -> np.ndarray:
        logits = np.asarray(call(params, given(batch)))
        return logits[:, 0] if options.task == "classify" else logits  # one text a row

    return Side(predict, path.stat().st_size, how)


def given(batch: Batch) -> dict[str, np.ndarray]:
    """A batch as fw has it: int32, channels last, positions."""
    if "pixel_values" in batch:
        return {"pixel_values": np.ascontiguousarray(batch["pixel_values"].transpose(0, 2, 3, 1))}
    ids = batch["input_ids"].astype(np.int32)
    mask = batch.get("attention_mask", np.ones_like(ids)).astype(np.int32)
    places = np.arange(mask.shape[1], dtype=np.int32)
    return {
        "input_ids": ids,
        "targets": np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], IGNORE)], 1),
        "segment_ids": mask,
        "position_ids": np.tile(places, (len(mask), 1)),
        "token_type_ids": np.zeros_like(mask),
        "first": np.zeros((len(mask), 1), np.int32),
    }


if __name__ == "__main__":
    main()
