"""Perplexity and size of a decoder by recipe, on a text that it was not calibrated on.

    .venv/bin/python scripts/bench/compress_language.py --text input.txt

Windows of the text's beginning are judged, and windows from its end calibrate. Every recipe starts
from the same float32 parameters; what a recipe adds to float32's perplexity is its cost, and GPTQ's
is told as a part of rounding's.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import compress
import fw
from compress.scheme import Scheme
from fw import data, precision, report
from fw.compression import calibrated, grouped, recipe, tables
from sharding import put, scope


def int4(per: str | int) -> Scheme:
    return Scheme("int4", per=per)


MORE = {
    "int4-awq": lambda params: compress.awq(grouped(params, int4)),
    "int4-rotated": lambda params: compress.chain(
        compress.rotate("auto"), compress.gptq(grouped(params, int4))
    ),
    "nf4": lambda _: compress.quantize(Scheme("nf4")),
    "mxfp4": lambda _: compress.quantize("mxfp4"),
    "nvfp4": lambda _: compress.quantize("nvfp4"),
}
"""Recipes of kernels beside `fw.compression.RECIPES`, whose tables become int8 as theirs do."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="a decoder")
    parser.add_argument("--text", required=True, help="a file of text")
    parser.add_argument("--windows", type=int, default=32, help="judged (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=32, help="windows for statistics")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    usual = ["int8", "int8-weights", "int4-nearest", "int4", *MORE]
    parser.add_argument("--recipes", default=",".join(usual))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    loaded = fw.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        fw.save(Path(folder, "model"), loaded)
        tokenizer = data.load_tokenizer(Path(folder, "model"))
    encoded = data.encode_documents(
        tokenizer, data.read_documents(options.text), max_length=options.window
    )
    whole = encoded.input_ids[: len(encoded.input_ids) // options.window * options.window]
    ids = whole.reshape(-1, options.window)
    judged, shown = ids[: options.windows], ids[-options.calibration :]
    params, mesh, where = loaded.variables["params"], loaded.mesh, loaded.rules
    assert mesh is not None and where is not None
    state = {k: v for k, v in loaded.variables.items() if k != "params"}

    def forward(params: Any, batch: Any) -> Any:
        return loaded.model.apply({"params": params, **state}, batch)[0]

    def batches(ids: np.ndarray) -> Iterator[Any]:
        for i in range(0, len(ids), 4):
            yield put(batch_of(ids[i : i + 4]), mesh, where)

    def perplexity(params: Any) -> float:
        call = jax.jit(precision.apply(compress.apply(forward), "f32"))
        with scope(mesh, where):
            total = sum(
                float(np.asarray(call(params, b)["losses"], np.float64).sum())
                for b in batches(judged)
            )
        return math.exp(total / (judged.size - len(judged)))

    rows = [("f32", size(params), perplexity(params), 0.0, 0.0)]
    print(*rows[-1], file=sys.stderr)
    rest = compress.quantize(tables(params, Scheme("int8", activations="float")))
    for name in options.recipes.split(","):
        began = time.perf_counter()
        if name in MORE:
            transform = compress.chain(MORE[name](params), rest)
        else:
            transform = recipe(name, params)[1]
        with scope(mesh, where):
            stats = calibrated(transform, forward, params, batches(shown))
        small, told = transform(params, stats)
        seconds = time.perf_counter() - began
        found = perplexity(small)
        rows.append((name, size(small), found, found - rows[0][2], seconds))
        print(*rows[-1], f"{sum(r.error > 0 for r in told)} arrays", file=sys.stderr)
    head = ("recipe", "MB", "perplexity", "more", "seconds to make")
    print(report.table([[n, *(f"{x:.3f}" for x in r)] for n, *r in rows], head))
    by = {row[0]: row[3] for row in rows}
    if {"int4", "int4-nearest"} <= by.keys():
        print(f"GPTQ adds {by['int4'] / by['int4-nearest']:.3f} of what rounding to nearest does")
    if options.json:
        options.json.write_text(json.dumps([dict(zip(head, r, strict=True)) for r in rows]))
    return 0


def size(params: Any) -> float:
    return sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6


def batch_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    targets = np.full_like(ids, data.IGNORE)
    targets[:, :-1] = ids[:, 1:]
    place = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return {"input_ids": ids, "segment_ids": np.ones_like(ids), "position_ids": place,
            "targets": targets}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
