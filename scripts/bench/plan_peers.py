"""Our compiled step beside MaxText's own, for a TPU v5e-256: cycles and memory, by one compiler.

MaxText's `train_compile` runs without a TPU. `--maxtext PYTHON` names the interpreter of an
environment that has it (`pip install --no-deps maxtext`, then what it imports; a package
`pathwaysutils` with `is_pathways_backend_used`, `initialize` and `elastic` will do as a stub). Both
steps are compiled by the libtpu of their environment: take the same version. Cycles are those that
the compiler estimates, loops' turns multiplied; kernels of attention, the same in both, have none.

    .venv/bin/python scripts/bench/plan_peers.py --maxtext ../maxtext/bin/python
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import plan_truth

from fw import report
from fw.planning import build
from fw.work import source_of
from sharding.plan import hardware
from sharding.plan.compiler import Compiled, compile_all
from sharding.plan.program import lowered_mesh, program
from sharding.plan.worker import TPU
from sharding.program.flow import Flow
from sharding.program.hlo import read
from sharding.program.loops import Loops

DRIVER = """
import json, os, sys
os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"
import jax
jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as train_compile has it
import maxtext
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train, train_compile as tc
from maxtext.utils import max_utils, maxtext_utils, sharding
base = os.path.join(os.path.dirname(maxtext.__file__), "configs/base.yml")
c = pyconfig.initialize(["train_compile", base, *sys.argv[2:]])
mesh = tc.get_topology_mesh(c)
args, kwargs, shardings, _, model = tc.get_shaped_inputs(mesh, c)
params, shardings = sharding.maybe_update_params_sharding_with_opt(c, shardings)
states = sharding.build_zero1_input_state_mesh_shardings(c, shardings, params)
data = sharding.get_input_data_sharding(c, mesh)
step, ins, outs, static, donated = maxtext_utils.get_functional_train_with_signature(
    train.train_step, data, states, model, c, params)
with jax.set_mesh(mesh), logical_axis_rules(c.logical_axis_rules):
    jitted = jax.jit(step, in_shardings=ins, out_shardings=outs, static_argnums=static,
                     donate_argnums=donated)
    lowered = jitted.lower(*args, **kwargs)
made = lowered.compile(compiler_options=max_utils.parse_libtpu_flags_to_dict(c.compile_xla_flags))
found = made.memory_analysis()
open(sys.argv[1], "w").write(made.as_text())
names = ("argument", "output", "alias", "temp")
memory = {n: getattr(found, n + "_size_in_bytes") for n in names}
memory["peak"] = found.peak_memory_in_bytes
open(sys.argv[1] + ".json", "w").write(json.dumps(memory))
"""


def cycles(text: str) -> int:
    """All that the compiler estimates, what is in loops as often as it runs."""
    program = read(text)
    loops = Loops(Flow(program))
    inside = {name for body in program.computations.values() for it in body.values()
              if it.opcode == "fusion" for _, name in it.called}  # fmt: skip
    total = 0
    for name, body in program.computations.items():
        if name not in inside:
            count = loops.times(name).count
            for it in body.values():
                found = re.search(r'"estimated_cycles":"?(\d+)', it.text[1])
                total += count * int(found[1]) if found else 0
    return total


def ours(row: plan_truth.Row) -> tuple[int, int, int]:
    machine, work = hardware(row.machine), plan_truth.work_of(row)
    choices = {"remat": row.remat, "accumulate": "1", "moments": "float32"}
    fn, args = build(work, source_of(work), choices)(lowered_mesh(row.mesh, machine))
    [(_, made)] = compile_all([program(fn, args, machine, row.mesh)], limit=1800)
    assert isinstance(made, Compiled), made.reason
    text = (made.folder / "program.hlo").read_text()
    return cycles(text), made.memory.temporaries, made.memory.live


def theirs(row: plan_truth.Row, python: str, stubs: str) -> tuple[int, int, int]:
    config: dict[str, Any] = {
        "run_name": "x", "base_output_directory": tempfile.gettempdir(),
        "enable_checkpointing": "false", "dataset_type": "synthetic",
        "compile_topology": "v5e-256", "compile_topology_num_slices": 1,
        "per_device_batch_size": row.rows, "max_target_length": row.length,
        "remat_policy": "full", "ici_fsdp_parallelism": 256, "attention": "flash",
        "base_emb_dim": row.config["hidden_size"], "head_dim": 128, "scan_layers": "true",
        "base_num_query_heads": row.config["num_attention_heads"],
        "base_num_kv_heads": row.config["num_attention_heads"],
        "base_mlp_dim": row.config["intermediate_size"],
        "base_num_decoder_layers": row.config["num_hidden_layers"], "vocab_size": 32_000,
    }  # fmt: skip
    environment = os.environ | TPU | {"DECOUPLE_GCLOUD": "TRUE", "PYTHONPATH": stubs}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.hlo")
        overrides = [f"{key}={value}" for key, value in config.items()]
        subprocess.run(
            [python, "-c", DRIVER, str(out), *overrides], env=environment, check=True,
            stdout=sys.stderr,
        )  # fmt: skip
        memory = json.loads(Path(f"{out}.json").read_text())
        return cycles(out.read_text()), memory["temp"], memory["peak"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxtext", required=True, help="the Python that has MaxText")
    parser.add_argument("--stubs", default="", help="a folder of modules that it lacks")
    options = parser.parse_args()
    rows = []
    for row in plan_truth.ROWS[:2]:
        mine, peer = ours(row), theirs(row, options.maxtext, options.stubs)
        for name, own in (("fw", mine), ("MaxText", peer)):
            ratios = [f"{a / b:.3f}" for a, b in zip(own, peer, strict=True)]
            figures = (f"{own[0]:.4e}", f"{own[1] / 1e9:.2f}", f"{own[2] / 1e9:.2f}")
            rows.append((f"{row.name} {name}", *figures, " ".join(ratios)))
            print(*rows[-1], file=sys.stderr, flush=True)
    head = ("step", "cycles", "GB of temporaries", "GB at most alive", "of MaxText's")
    print(report.table(rows, head))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
