"""Predicted step times beside published ones: what `fw plan` says of runs that others measured.

MaxText publishes what its steps reached on TPU slices. For each, our step of the same model, batch
and layout is compiled for the same slice by the TPU's own compiler (no TPU is needed; `pip install
'fw[plan]'`), timed by `sharding.plan`, and its MFU set beside the published one. `--best` also asks
the planner, free in its layout, whether it finds one at least as fast.

    .venv/bin/python scripts/bench/plan_truth.py --best
"""

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax

from fw import report
from fw.planning import build, model_flops, plan_training
from fw.work import Work, source_of
from sharding.mesh import sizes_of
from sharding.plan import Candidate, Layout, Variant, hardware
from sharding.plan.analytic import estimate
from sharding.plan.compiler import compile_all
from sharding.plan.layouts import judged, program_of
from sharding.plan.plan import surveyed

WIDE = 8192


def decoder(width: int, heads: int, mlp: int, layers: int) -> dict[str, Any]:
    """The config of one of MaxText's own sizes."""
    return {
        "vocab_size": 32_000, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": 128, "intermediate_size": mlp,
        "num_hidden_layers": layers,
    }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A published run.

    Attributes:
      name: of the model.
      config: of it, over that of `model`.
      machine, mesh: as `fw plan` has them.
      rows: of a device.
      length: tokens.
      remat: as in `fw.recipe.Finetune`; the published policy, or the nearest.
      mfu: published.
      causal_half: whether that counts half of attention.
      model: whose config is changed.
    """

    name: str
    config: dict[str, Any]
    machine: str
    mesh: str
    rows: int
    length: int
    remat: str
    mfu: float
    causal_half: bool = False
    model: str = "llama-2-7b"


MID = decoder(4096, 64, 28_672, 32)
LARGE = decoder(WIDE, 64, 28_672, 32)
HUGE = decoder(WIDE, 128, 57_344, 64)
WIDER = LARGE | {"num_hidden_layers": 64}
GIANT = decoder(2 * WIDE, 128, 57_344, 64)
TALLER = GIANT | {"num_hidden_layers": 128}
LLAMA_70 = "llama-3.1-70b"
MIXTRAL = "mixtral-8x7b"
LLAMA_3 = "llama-3.1-8b"
ROWS = (
    Row("16B", MID, "v5e:16x16", "fsdp=256", 6, 2048, "layer", 0.611),
    Row("32B", LARGE, "v5e:16x16", "fsdp=256", 4, 2048, "layer", 0.669),
    Row("32B", LARGE, "v5p:4x4x4", "fsdp=16,tensor=4", 6, 2048, "dots", 0.715),
    Row("128B", HUGE, "v5p:4x4x8", "fsdp=16,tensor=8", 1, 2048, "dots", 0.687),
    Row("Llama-2-70B", {}, "v5p:8x8x8", "fsdp=512", 4, 4096, "layer", 0.654, True, "llama-2-70b"),
    Row("Llama-3.1-8B", {}, "v6e:16x16", "fsdp=256", 3, 8192, "layer", 0.455, True, LLAMA_3),
    Row("64B", WIDER, "v5e:16x16", "fsdp=256", 2, 2048, "layer", 0.599),
    Row("16B", MID, "2*v5e:16x16", "dcn.data=2,fsdp=256", 6, 2048, "layer", 0.594),
    Row("64B", WIDER, "v5p:4x4x4", "fsdp=16,tensor=4", 3, 2048, "dots", 0.703),
    Row("32B", LARGE, "2*v5p:4x4x4", "dcn.data=2,fsdp=16,tensor=4", 6, 2048, "dots", 0.694),
    Row("256B", GIANT, "v5p:8x8x8", "fsdp=64,tensor=8", 1, 2048, "dots", 0.671),
    Row("512B", TALLER, "v5p:8x8x8", "fsdp=64,tensor=8", 2, 2048, "layer", 0.640),
    Row("Llama-2-70B", {}, "v6e:16x16", "fsdp=256", 4, 4096, "layer", 0.438, False, "llama-2-70b"),
    Row("Llama-3.1-70B", {}, "v6e:16x16", "fsdp=256", 1, 8192, "layer", 0.503, False, LLAMA_70),
    Row("Mixtral-8x7B", {}, "v5p:4x4x8", "fsdp=128", 8, 4096, "layer", 0.526, False, MIXTRAL),
)  # fmt: skip


def work_of(row: Row, **options: Any) -> Work:
    batch = row.rows * hardware(row.machine).devices
    return Work(
        row.model, batch, row.length, config=row.config, causal_half=row.causal_half, **options
    )


def layout_of(row: Row) -> Layout:
    """The row's own layout, compiled and timed."""
    machine, work = hardware(row.machine), work_of(row)
    source = source_of(work)
    choices = {"remat": row.remat, "accumulate": "1", "moments": "float32"}
    variant = Variant(build(work, source, choices), choices)
    [(_, found)] = surveyed([variant], machine, lambda text, left: None)
    sizes = sizes_of(row.mesh, machine.devices)
    one = Candidate(row.mesh, sizes, variant, estimate(found, sizes, machine))
    flops = model_flops(work, source)
    [(_, result)] = compile_all([program_of(one, machine)], limit=1200)
    return judged(one, result, machine, work.batch * work.length, flops)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose model and machine hold this")
    parser.add_argument("--best", action="store_true", help="let the planner look for a better one")
    parser.add_argument("--compile", type=int, default=4, help="layouts it compiles")
    options = parser.parse_args()
    rows = []
    for row in ROWS:
        if options.only not in f"{row.name} {row.machine}":
            continue
        begin = time.perf_counter()
        one = layout_of(row)
        own = one.prediction
        off = own.mfu / row.mfu - 1
        best = ""
        if options.best:
            found = plan_training(
                work_of(row, accumulate=(1,)), row.machine, compile=options.compile, seconds=1200.0
            ).best
            best = f"{found} {found.prediction.mfu:.1%}"
        waits = f"{own.exposed / own.seconds:.0%}"
        held = f"{own.memory.peak / 2**30:.2f} of {own.memory.capacity / 2**30:.2f}"
        rows.append(
            (
                row.name, row.machine, f"{row.mesh} {row.remat}", f"{row.mfu:.1%}",
                f"{own.mfu:.1%}", f"{off:+.1%}", f"{own.seconds:.2f}", waits, held, best,
            )
        )  # fmt: skip
        took = time.perf_counter() - begin
        print(*rows[-1], one.refused or "", f"{took:.0f} s", file=sys.stderr, flush=True)
    head = (
        "model", "hardware", "layout", "published MFU", "predicted", "off", "s a step", "waits",
        "GiB", "best found",
    )  # fmt: skip
    print(report.table(rows, head))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
