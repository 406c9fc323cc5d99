"""The bytes that a training step moves in each layout, against the fewest that it could move.

A step of fw (BERT, AdamW, clipping) is compiled for 8 devices of each platform; `sharding.inspect`
reads what the compiler made of it. `minimum.py` has the minimum, its derivation and its sources,
`steps.py` what is compiled. No chip is needed, and nothing runs.

    .venv/bin/python scripts/bench/collectives.py --platforms cpu,tpu,gpu --json collectives.json
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import steps
from minimum import minimum

from fw import report, run
from fw.errors import FwError
from fw.options import add_options, read_options
from sharding import ShardingError, inspect, make_mesh

COMPILERS: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "tpu": ("libtpu",),
    "gpu": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
}
"""By platform: the modules of which one must be there."""
LAYOUTS = (
    "data=8 fsdp=8 tensor=8 sequence=8 expert=8 "
    "data=2,fsdp=4 data=2,fsdp=2,tensor=2 data=2,fsdp=2,expert=2"
)
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class Options(steps.Sizes):
    """What is compiled.

    Attributes:
      platforms: some of cpu, tpu and gpu, with commas between them.
      layouts: meshes of 8 devices, with spaces between them.
      precisions: f32 or bf16 or both, with a comma between them.
      json: write the figures, every collective among them, to this file.
    """

    platforms: str = ",".join(COMPILERS)
    layouts: str = LAYOUTS
    precisions: str = ",".join(PRECISIONS)
    json: str = ""

    def __post_init__(self):
        """Checks what would fail only later, compilers that are not there among it."""
        for name, known in (("platforms", COMPILERS), ("precisions", PRECISIONS)):
            if unknown := sorted(set(getattr(self, name).split(",")) - set(known)):
                raise FwError(f"{name}: {', '.join(unknown)} is none of {', '.join(known)}")
        for platform in self.platforms.split(","):
            modules = COMPILERS[platform]
            if modules and not any(map(_there, modules)):
                raise FwError(
                    f"platforms: the compiler for {platform} is missing (no module "
                    f"{' or '.join(modules)}); pip install '.[plan]', or leave {platform} out"
                )


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Options)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a platform, in this process
    arguments = parser.parse_args()
    try:
        options = read_options(arguments, Options)
        if arguments.one:
            for found in measure(options, arguments.one):
                print(json.dumps(found), flush=True)
        else:
            compare(options)
    except (FwError, ShardingError) as error:
        print(f"collectives: {error}", file=sys.stderr)
        return 1
    return 0


def compare(options: Options) -> None:
    """Measures every platform and prints the table."""
    found = [one for platform in options.platforms.split(",") for one in apart(options, platform)]
    if options.json:
        run.write_json(options.json, {"options": options, "steps": found})
    titles = (
        "platform",
        "precision",
        "layout",
        "MB sent",
        "minimum",
        "ratio",
        "state · fsdp / total",
    )
    print(report.table([_cells(one) for one in found], titles))


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        found["platform"],
        found["precision"],
        found["layout"],
        f"{found['sent'] / 1e6:.2f}",
        f"{found['minimum'] / 1e6:.2f}",
        f"{found['sent'] / found['minimum']:.3f}",
        "" if found["state"] is None else f"{found['state']:.4f}",
    )


def apart(options: Options, platform: str) -> Iterator[dict[str, Any]]:
    """`measure` in a process of its own: libtpu takes a lock and writes to stderr."""
    given = [
        f"--{field.name}={getattr(options, field.name)}"
        for field in fields(options)
        if field.name not in ("platforms", "json")
    ]
    command = [sys.executable, __file__, f"--one={platform}", f"--platforms={platform}", *given]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            env=os.environ | steps.ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            print(" ".join(_cells(found)), file=sys.stderr)
            yield found
        if process.wait():
            errors.seek(0)
            raise FwError(f"{platform}: {errors.read().strip() or process.returncode}")


def measure(options: Options, platform: str) -> Iterator[dict[str, Any]]:
    """Every layout and precision on a platform, in this process."""
    devices = steps.devices(platform)
    for layout in options.layouts.split():
        mesh = make_mesh(layout, devices)
        for precision in options.precisions.split(","):
            program, step = steps.compiled(options, mesh, precision, platform)
            found, least = inspect(program), minimum(step, mesh.shape)
            # Loops of unknown length send what is more than balanced choices of experts.
            sent: dict[str, int] = {}
            for one in found.collectives:
                if not one.known and not step.chosen:
                    raise FwError(f"{layout}: {one.source} runs nobody knows how often")
                if one.known:
                    sent[one.along] = sent.get(one.along, 0) + one.step_bytes
            state = [p for p in found.parameters if p.path.startswith("state/")]
            parts = mesh.shape["fsdp"]
            alone = parts > 1 and mesh.shape["tensor"] == mesh.shape["expert"] == 1
            share = sum(p.device_bytes for p in state) / sum(p.bytes for p in state)
            yield {
                "platform": platform,
                "precision": precision,
                "layout": layout,
                "sent": sum(sent.values()),
                "minimum": sum(least.values()),
                "sent_by_axes": sent,
                "minimum_by_axes": least,
                "state": parts * share if alone else None,  # 1: a device has total / fsdp
                "collectives": found.to_dict()["collectives"],
            }


if __name__ == "__main__":
    sys.exit(main())
