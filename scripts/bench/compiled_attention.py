"""What a training step's attention compiles to on TPUs and H100s: the kernels, and what they save.

Steps of fw (a Llama, and a BERT without dropout of attention) in bf16, compiled for 8 devices that
are not here, with kernels and without. Printed: the kernels in the program, its temporary memory,
and its copies and transposes of 1 MB or more, of which a loop's count once. For CUDA, cuDNN must be
found (`pip install nvidia-cudnn-cu12`, its `lib` in LD_LIBRARY_PATH); no GPU is needed.

    .venv/bin/python scripts/bench/compiled_attention.py --platform tpu
"""

import argparse
import math
import os
import re
import sys
from collections import Counter

import steps
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fw import report
from fw.errors import FwError
from fw.model import Model
from fw.models import flash, layers
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama
from fw.optimizer import AdamW, optimizer
from fw.step import abstract_state, make_step
from fw.tasks import cross_entropy
from sharding import ShardingError, make_mesh, rules
from sharding.layout import fit

MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2")
ROWS, LENGTH, VOCABULARY = 16, 2048, 32_000
KERNELS = {"tpu": r"splash_m[a-z_]+", "gpu": r"__cudnn\$fmha\w+"}
"""By platform: what the lines that call one hold."""
LARGE = 1e6
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}


def models() -> dict[str, Model]:
    """Of 4 layers, so that a compilation takes seconds."""
    return {
        "llama": llama(
            LlamaConfig(VOCABULARY, 1024, 4, 8, 2816, num_key_value_heads=4, remat="layer")
        ),
        "bert": bert(
            BertConfig(
                VOCABULARY, 1024, 4, 16, 4096, 8, "token_classification", LENGTH,
                attention_probs_dropout_prob=0.0,
            )
        ),
    }  # fmt: skip


def compiled(model: Model, mesh: Mesh, platform: str) -> jax.stages.Compiled:
    """A training step for the devices of a mesh."""
    where, tx, shape = rules(), optimizer(AdamW(), 10), (ROWS, LENGTH)
    step = make_step(model, cross_entropy, tx, mesh=mesh, rules=where, precision="bf16")
    lies = fit(("batch", None), shape, mesh, where, activation=True, path="batch")
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lies)
    batch = dict.fromkeys(("input_ids", "segment_ids", "position_ids", "labels"), integers)
    state = abstract_state(model, tx, mesh, where)
    target = steps.LOWERED[platform]
    return step.trace(state, batch).lower(lowering_platforms=(target,)).compile()


def figures(program: jax.stages.Compiled, platform: str) -> tuple[Counter[str], float, int]:
    """Kernels by name, megabytes of temporaries, and large copies and transposes."""
    text = program.as_text() or ""
    kernels = Counter(
        found[0]
        for line in text.splitlines()
        if " custom-call(" in line and (found := re.search(KERNELS[platform], line))
    )
    moved = 0
    for kind, sizes in re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:copy|transpose)\(", text):
        size = BYTES.get(kind, 8) * math.prod(int(n) for n in sizes.split(",") if n)
        moved += size >= LARGE
    return kernels, program.memory_analysis().temp_size_in_bytes / 1e6, moved


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=KERNELS, default="tpu")
    platform = parser.parse_args().platform
    if steps.ENVIRONMENT.items() - os.environ.items():  # JAX reads it as it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | steps.ENVIRONMENT)
    try:
        if platform == "gpu" and not flash.has_cudnn():
            raise FwError("no cuDNN found; pip install nvidia-cudnn-cu12, and see --help")
        rows = []
        for spec in MESHES:
            mesh = make_mesh(spec, steps.devices(platform))
            for name, model in models().items():
                for way in ("xla", "flash"):
                    # Nothing in the library turns kernels off, so this script does.
                    layers.kernel_for = (
                        flash.kernel_for if way == "flash" else lambda *_, **__: "xla"
                    )
                    kernels, memory, moved = figures(compiled(model, mesh, platform), platform)
                    found = " ".join(f"{k} ×{n}" for k, n in kernels.items()) or "none"
                    rows.append((spec, name, way, found, f"{memory:,.0f}", str(moved)))
                    print(*rows[-1], file=sys.stderr, flush=True)
        titles = ("mesh", "model", "attention", "kernels", "MB temporary", "large copies")
        print(report.table(rows, titles))
    except (FwError, ShardingError) as error:
        print(f"compiled_attention: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
