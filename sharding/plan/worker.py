"""The process that compiles: `python -m sharding.plan.worker FOLDER`.

It reads `job.json` and `program.bin` there and writes `result.json` and `program.hlo`. Compilers of
chips that are not here take locks, print and sometimes abort, so each program has a process of its
own; `compiler` starts it, with the environment that they want, and stops it in time.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

JOB, CODE, RESULT, TEXT = "job.json", "program.bin", "result.json", "program.hlo"

TPU = {
    "JAX_PLATFORMS": "cpu",
    # A TPU's compiler is not to look for a TPU, nor to keep others from it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""For a process that compiles for chips that are not there."""


def main(folder: str) -> int:
    """Compiles the job of a folder."""
    where = Path(folder)
    job = json.loads((where / JOB).read_text())
    try:
        found = _compiled(where, job)
    except Exception as error:  # whatever a compiler raises is the job's result
        found = {"error": _short(error), "needed": _needed(str(error))}
    partial = where / (RESULT + ".partial")
    partial.write_text(json.dumps(found))
    partial.replace(where / RESULT)
    return 0


def _compiled(where: Path, job: dict[str, Any]) -> dict[str, Any]:
    import jax

    from sharding import inspect, make_mesh
    from sharding.plan.hardware import hardware

    machine = hardware(job["machine"])
    mesh = make_mesh(job["mesh"], devices(machine))
    exported = jax.export.deserialize(bytearray((where / CODE).read_bytes()))
    shardings = exported.in_shardings_jax(mesh)
    args, _ = jax.tree.unflatten(
        exported.in_tree,
        [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
            for a, s in zip(exported.in_avals, shardings, strict=True)
        ],
    )
    given = args[0]
    gone = {n: given[n] for n, is_gone in zip(job["names"], job["donated"], strict=True) if is_gone}
    kept = {n: x for n, x in given.items() if n not in gone}

    def run(gone: dict[str, Any], kept: dict[str, Any]) -> list[Any]:
        return jax.tree.leaves(exported.call({**gone, **kept}))

    target = "cuda" if machine.chip.platform == "gpu" else machine.chip.platform
    out = list(exported.out_shardings_jax(mesh))
    jitted = jax.jit(run, donate_argnums=0, out_shardings=out)
    begin = time.perf_counter()
    lowered = jitted.trace(gone, kept).lower(lowering_platforms=(target,))
    compiled = lowered.compile(compiler_options=job["options"] or None)
    seconds = time.perf_counter() - begin
    (where / TEXT).write_text(compiled.as_text() or "")
    report = inspect(compiled, mesh=mesh)
    return {
        "seconds": seconds,
        "coords": [_place(d, machine) for d in mesh.devices.flat],
        "report": _own_paths(report.to_dict()),
    }


def _own_paths(found: Any) -> Any:
    """A report that names arguments as their owner does, not as `run` is given them."""
    if isinstance(found, dict):
        return {key: _own_paths(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_own_paths(value) for value in found]
    if isinstance(found, str):
        return re.sub(r"^(?:gone|kept)/", "", found)
    return found


def devices(machine: Any) -> list[Any]:
    """JAX's devices of a machine that need not be here."""
    import jax
    from jax.experimental import topologies

    chip, shape = machine.chip, machine.shape
    if chip.platform == "cpu":
        return jax.devices("cpu")[: machine.devices]
    if chip.platform == "gpu":
        topology = f"1x{shape[0]}x{shape[1]}"
        found = topologies.get_topology_desc(
            chip.name, "cuda", topology=topology, target_config=target(chip)
        )
        return list(found.devices)
    options: dict[str, Any] = {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"
    hosted = (2, 2, 1) if all(n > 1 for n in shape[:2]) else (*shape, 1)[:3]
    options["chips_per_host_bounds"] = hosted
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


def target(chip: Any) -> str:
    """What XLA's compiler for GPUs wants to know of a GPU: a `GpuTargetConfigProto`, as text."""
    t = chip.target
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": t["shared"],
        "threads_per_core_limit": 2048,
        "core_count": t["cores"],
        "fpus_per_core": t["lanes"],
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(chip.hbm),
        "l2_cache_size": t["l2"],
        "clock_rate_ghz": t["clock"],
        "device_memory_size": t["memory"],
        "shared_memory_per_block_optin": t["block"],
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    info = "\n".join(f"  {key}: {value}" for key, value in fields.items())
    return (
        f"gpu_device_info {{\n{info}\n"
        f"  cuda_compute_capability {{ major: {t['major']} minor: 0 }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 8 patch: 0 }\n'
        f'device_description_str: "{chip.kind}"\n'
    )


def _place(device: Any, machine: Any) -> list[int]:
    if machine.chip.dims:
        axes = list(device.coords)[: machine.chip.dims]
        return [getattr(device, "slice_index", None) or 0, *axes, device.core_on_chip or 0]
    each = machine.shape[-1] if machine.chip.platform == "gpu" else 1
    return [0, device.id // each, device.id % each, 0]


def _needed(text: str) -> int | None:
    """Bytes that a program would have taken, as the compiler says it refused."""
    found = re.search(r"(?:required|needed|Used)\D*?(\d+(?:\.\d+)?)\s*([KMGT])", text)
    return None if found is None else int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:500] if str(error) else ''}"


if __name__ == "__main__":
    os.environ.update({k: v for k, v in TPU.items() if k not in os.environ})
    sys.exit(main(sys.argv[1]))
