"""What a training step's attention compiles to for TPUs v5e and H100s, with kernels and without.

Steps of fw in bf16 (BERT, ModernBERT, Llama: a few layers of the width of the base models), for
devices that are not here. The table shows the kernels, how many arrays of the size of the scores of
all heads are in the program, its temporary memory, and what it moves about attention: copies and
transposes of as many elements as a device's queries, keys or values have. A loop's count once.

For H100s JAX wants a cuDNN, though no GPU: `pip install nvidia-cudnn-cu12`, and its `lib` in
LD_LIBRARY_PATH.

    .venv/bin/python scripts/bench/compiled_attention.py --platform tpu
"""

import argparse
import logging
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import steps
from jax.sharding import Mesh

from fw import report
from fw.errors import FwError
from fw.model import Model
from fw.models import flash
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama
from fw.models.modernbert import ModernBertConfig, modernbert
from fw.optimizer import AdamW, optimizer
from fw.step import abstract_state, make_step
from fw.tasks import cross_entropy
from sharding import ShardingError, make_mesh, rules
from sharding.layout import fit

KERNELS = {"tpu": r"splash_m[a-z]+_[a-z]+|online-softmax", "gpu": r"__cudnn\$fmha\w+"}
"""By platform: names of kernels, XLA's own among them."""
TARGETS = {"tpu": "tpu_custom_call", "gpu": "__cudnn$fmha"}
MESH = "data=2,fsdp=2,tensor=2"
VOCABULARY = 8448
ROWS = 8


@dataclass(frozen=True)
class Case:
    """A model and the shapes of its attention on a device of `MESH`.

    Attributes:
      model: to train.
      length: of a row.
      heads, key_heads, size: of the whole model, as in attention.
    """

    model: Model
    length: int
    heads: int
    key_heads: int
    size: int

    @property
    def scores(self) -> int:
        """Elements of a device's scores."""
        return ROWS // 4 * self.heads // 2 * self.length**2

    @property
    def moved(self) -> set[int]:
        """Elements of a device's queries, and of its keys."""
        each = ROWS // 4 * self.length * self.size // 2
        return {each * self.heads, each * self.key_heads}


def cases(scan: bool) -> dict[str, Case]:
    """Two layers each: ModernBERT's are one that sees all, one a window."""
    task: Any = {"num_labels": 8, "task": "token_classification", "scan": scan}
    sizes = (VOCABULARY, 768, 2, 12)
    return {
        "bert": Case(
            bert(BertConfig(*sizes, 3072, **task, attention_probs_dropout_prob=0.0)),
            512, 12, 12, 64,
        ),
        "modernbert": Case(modernbert(ModernBertConfig(*sizes, 1152, **task)), 1024, 12, 12, 64),
        "llama": Case(
            llama(LlamaConfig(VOCABULARY, 1536, 2, 12, 4096, num_key_value_heads=4, scan=scan)),
            2048, 12, 4, 128,
        ),
    }  # fmt: skip


def compiled(case: Case, mesh: Mesh, platform: str) -> jax.stages.Compiled:
    """A training step for the devices of a mesh."""
    where, tx, shape = rules(), optimizer(AdamW(), 10), (ROWS, case.length)
    step = make_step(case.model, cross_entropy, tx, mesh=mesh, rules=where, precision="bf16")
    lies = fit(("batch", None), shape, mesh, where, activation=True, path="batch")
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lies)
    batch = dict.fromkeys(("input_ids", "segment_ids", "position_ids", "labels"), integers)
    state = abstract_state(case.model, tx, mesh, where)
    target = steps.LOWERED[platform]
    return step.trace(state, batch).lower(lowering_platforms=(target,)).compile()


def figures(text: str, case: Case, platform: str) -> tuple[str, str, str]:
    """Kernels by name, arrays of all scores, and what is moved."""
    kernels: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    scores = 0
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([a-z-]+)\(", line)
        if found is None:
            continue
        shape, op = found.groups()
        if op == "custom-call" and TARGETS[platform] in line:
            named = re.search(KERNELS[platform], line)
            kernels[named[0] if named else TARGETS[platform]] += 1
        shapes = [[*map(int, s.split(","))] for s in re.findall(r"\w+\[([\d,]+)\]", shape)]
        sizes = [math.prod(s) for s in shapes]
        scores += any(
            size == case.scores and s[-1] == case.length
            for s, size in zip(shapes, sizes, strict=True)
        )
        if op in ("copy", "transpose") and len(sizes) == 1 and sizes[0] in case.moved:
            moved[f"{op} {shape.split('[')[0]}"] += 1
    shown = (" ".join(f"{k} ×{n}" for k, n in sorted(c.items())) or "–" for c in (kernels, moved))
    by, moves = shown
    return by, str(scores), moves


def off(*_: Any, **__: Any) -> flash.Choice:
    """In place of `attention_kernel`."""
    return flash.Choice("xla", "turned off")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=KERNELS, default="tpu")
    parser.add_argument("--models", default="bert,modernbert,llama", help="with commas between")
    parser.add_argument("--apart", action="store_true", help="layers apart, not in one loop")
    parser.add_argument("--save", default="", help="write the programs to this folder")
    options = parser.parse_args()
    platform = options.platform
    if steps.ENVIRONMENT.items() - os.environ.items():  # JAX reads it as it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | steps.ENVIRONMENT)
    logging.basicConfig(format="%(message)s")
    flash.log.setLevel(logging.INFO)
    kernels = flash.attention_kernel
    try:
        if platform == "gpu" and not flash.has_cudnn():
            raise FwError("JAX finds no cuDNN; see --help")
        rows = []
        mesh = make_mesh(MESH, steps.devices(platform))
        for name in options.models.split(","):
            case = cases(not options.apart)[name]
            for way in ("xla", "kernels"):
                # Nothing in the library turns kernels off, so this script does.
                flash.attention_kernel = kernels if way == "kernels" else off
                begin = time.perf_counter()
                program = compiled(case, mesh, platform)
                text = program.as_text() or ""
                if options.save:
                    Path(options.save, f"{platform}_{name}_{way}.hlo").write_text(text)
                found = program.memory_analysis()
                memory = (found.temp_size_in_bytes if found else math.nan) / 1e6
                rows.append((name, way, *figures(text, case, platform), f"{memory:,.0f}"))
                print(*rows[-1], f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
        titles = ("model", "attention", "kernels", "all scores", "moved", "MB temporary")
        print(report.table(rows, titles))
    except (FwError, ShardingError) as error:
        print(f"compiled_attention: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
