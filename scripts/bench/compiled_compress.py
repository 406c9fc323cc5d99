"""What products with compressed arrays compile to on a CPU, on H100s and on TPUs v5e.

For every format, a dense layer (512 rows, 4096 → 4096), a convolution and a lookup; no chip is
needed for the others' compilers. The table shows the dtypes that the products are computed in, as
the compiled program has them, and whether the whole weight becomes floats in memory: a result of
its size in a floating dtype that is not inside of a fusion. With --qlora, a training step of QLoRA
of an 8B Llama-class decoder on one TPU v5e and the memory that it needs.

    .venv/bin/python scripts/bench/compiled_compress.py --platform tpu
"""

import argparse
import math
import os
import re
import sys
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import steps
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress
from compress.formats import FORMATS
from compress.scheme import Scheme
from fw import report

ROWS, SIZE, SIDE, CHANNELS = 512, 4096, 28, 128
FLOATS = "f32|bf16|f16"
PRODUCTS = r"dot|convolution|custom-call"
GEMM = r"__cublas\$lt\$matmul\$f8|__cublas\$lt\$matmul|__cublas\$gemm|__cudnn\$conv\w+|__triton\w*"


def cases(dtype: Any) -> dict[str, tuple[Any, Any, Any, dict[str, Any]]]:
    """Function, activations and weight's shape by name, and fields of its scheme."""
    names = ("NHWC", "HWIO", "NHWC")
    return {
        "dense": (jnp.matmul, ((ROWS, SIZE), dtype), (SIZE, SIZE), {}),
        "conv": (
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=names
            ),
            ((16, SIDE, SIDE, CHANNELS), dtype),
            (3, 3, CHANNELS, CHANNELS),
            {"role": "conv2d"},
        ),
        "lookup": (
            lambda i, w: jnp.take(w, i, axis=0),
            ((ROWS,), jnp.int32),
            (SIZE, SIZE),
            {"role": "table"},
        ),
    }


def found(text: str, weight: int) -> tuple[str, str]:
    """Products by the dtypes of their operands, and floating results as large as the weight."""
    kinds: Counter[str] = Counter()
    shapes = dict(re.findall(r"%?([\w.-]+) = (\(?\w+\[[\d,]*\])", text))
    whole: Counter[str] = Counter()
    fused = False
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", line)
        if head:
            fused = "fused" in head[1] or "region" in head[1] or "gemm_fusion" in head[1]
            continue
        made = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((.*?)\)", line)
        if made is None:
            continue
        _, kind, shape, op, operands = made.groups()
        named = re.search(GEMM, line)
        if op in ("dot", "convolution") or (op == "custom-call" and named):
            inner = re.findall(r"%([\w.-]+)", operands)[:2]
            dtypes = [re.sub(r"[\[(].*", "", shapes.get(n, "?").lstrip("(")) for n in inner]
            kinds[f"{' × '.join(dtypes)} → {kind}" + (f" {named[0]}" if named else "")] += 1
        size = math.prod(map(int, shape.split(","))) if shape else 1
        if (
            not fused
            and size in (weight, weight // 2)
            and re.fullmatch(FLOATS, kind)
            and op != "parameter"
        ):
            whole[f"{kind} {op}"] += 1
    show = [
        " ".join(f"{k}" + (f" ×{n}" if n > 1 else "") for k, n in c.items()) for c in (kinds, whole)
    ]
    return show[0] or "–", show[1] or "–"


def compiled(fn: Any, args: Any, device: Any, platform: str) -> jax.stages.Compiled:
    where = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), args)
    target = steps.LOWERED[platform]
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(target,)).compile()


def products(platform: str, only: str) -> str:
    device = steps.devices(platform)[0]
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    rows = []
    for case, (fn, (shape, kind), weight, fields) in cases(dtype).items():
        for name in ("float", *FORMATS):
            if only and only not in f"{case} {name}":
                continue
            options = [{}]
            if name == "int8":
                options.append({"activations": "float"})
            for more in options:
                w: Any = jax.ShapeDtypeStruct(weight, dtype)
                label = name
                if name != "float":
                    scheme = Scheme(name, **fields, **more)
                    label = str(scheme)
                    w = jax.eval_shape(
                        lambda w, s=scheme: compress.fit(w, s, s.role or "kernel"), w
                    )
                x = jax.ShapeDtypeStruct(shape, kind)
                begin = time.perf_counter()
                program = compiled(compress.apply(fn), (x, w), device, platform)
                text = program.as_text() or ""
                memory = program.memory_analysis()
                temporary = (memory.temp_size_in_bytes if memory else math.nan) / 1e6
                seen = found(text, math.prod(weight))
                rows.append((case, label, *seen, f"{temporary:,.1f}"))
                print(*rows[-1], f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return report.table(rows, ("of", "weight", "products", "whole in floats", "MB temporary"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=steps.LOWERED, default="tpu")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    options = parser.parse_args()
    if steps.ENVIRONMENT.items() - os.environ.items():  # JAX reads it as it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | steps.ENVIRONMENT)
    print(products(options.platform, options.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
