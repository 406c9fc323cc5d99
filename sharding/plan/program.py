"""A function and its arguments as a program for a mesh of devices that are not here.

It is traced on an abstract mesh and exported as StableHLO, which any process can compile: nothing
is pickled, and the function may come from anywhere, a notebook too.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from sharding.errors import ShardingError
from sharding.layout import paths
from sharding.mesh import AXES, make_mesh, sizes_of
from sharding.plan.hardware import Hardware
from sharding.plan.survey import SEES
from sharding.plan.worker import devices

_LOWERED = {"gpu": "cuda"}
# What a program may call that no library promises to keep: it is compiled at once.
_KERNELS = (
    "LayoutConstraint",
    "tpu_custom_call",
    *(
        f"__cudnn$fmha{masked}Softmax{backward}"
        for masked in ("", "ScaleBias")
        for backward in ("", "Backward")
    ),
)


# Where in the source an operation stands, as MLIR writes it: at its end, and in lines of their own.
_LINES = re.compile(r"^#loc.*\n| ?loc\((?:#loc\d*|unknown)\)", re.MULTILINE)


def abstract_mesh(spec: str, machine: Hardware) -> AbstractMesh:
    """The mesh that `make_mesh` would make of the machine's devices, without devices.

    Args:
        spec: as for `make_mesh`; -1 is what the others leave.
        machine: which devices.

    Raises:
        ShardingError: as `make_mesh`; sizes that do not multiply to the machine's devices.

    >>> from sharding.plan.hardware import hardware
    >>> mesh = abstract_mesh("fsdp=-1,tensor=4", hardware("v5e:16x16"))
    >>> mesh.shape["fsdp"], mesh.abstract_device.platform
    (64, 'tpu')
    """
    sizes = sizes_of(spec, machine.devices)
    chip = machine.chip
    device = AbstractDevice(chip.kind, chip.cores, chip.platform)
    return AbstractMesh(
        tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES),
        abstract_device=device,
    )  # fmt: skip


def lowered_mesh(spec: str, machine: Hardware) -> AbstractMesh | Mesh:
    """The mesh that a program is lowered on: abstract, but of devices for GPUs.

    JAX lowers no kernel of cuDNN without devices; the CUDA plugin describes some that are not here.
    """
    if machine.chip.platform == "gpu" and find_spec("jax_cuda12_plugin") is not None:
        return make_mesh(spec, devices(machine))
    return abstract_mesh(spec, machine)


@dataclass(frozen=True)
class Program:
    """A function that was traced for a mesh, ready to be compiled elsewhere.

    Attributes:
        code: what `jax.export` wrote.
        content: a digest of the code, but for the lines of source that it comes from.
        names: the paths of its arguments.
        donated: whether each is.
        mesh: its spec.
        machine: what it is for, as users write it.
        options: the compiler's, by name.
    """

    code: bytes
    content: str
    names: tuple[str, ...]
    donated: tuple[bool, ...]
    mesh: str
    machine: str
    options: tuple[tuple[str, bool | str], ...] = ()

    @property
    def key(self) -> str:
        """What compiling it depends on, as a name."""
        rest = json.dumps([self.donated, self.mesh, self.machine, self.options, _versions()])
        return hashlib.sha256((self.content + rest).encode()).hexdigest()[:32]


def program(
    fn: Callable[..., Any],
    args: Any,
    machine: Hardware,
    mesh: str,
    options: Mapping[str, bool | str] | None = None,
) -> Program:
    """Trace a function for a mesh of a machine.

    Args:
        fn: jitted, or not; what it donates stays donated.
        args: its arguments, `jax.ShapeDtypeStruct`s whose shardings are of `lowered_mesh`.
        machine: what it is for.
        mesh: the mesh's spec.
        options: of the compiler.

    Raises:
        ShardingError: a function that this platform's kernels cannot be traced for here.
    """
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    args = tuple(args)
    leaves, tree = jax.tree.flatten(args)
    names = paths(args)

    def flat(given: dict[str, Any]) -> list[Any]:
        return jax.tree.leaves(jitted(*jax.tree.unflatten(tree, [given[n] for n in names])))

    platform = _LOWERED.get(machine.chip.platform, machine.chip.platform)
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _KERNELS]
    checks.append(jax.export.DisabledSafetyCheck.platform())
    donated = [bool(x.donated) for x in jax.tree.leaves(jitted.trace(*args).args_info)]
    try:
        exported = jax.export.export(jax.jit(flat), platforms=[platform], disabled_checks=checks)(
            dict(zip(names, leaves, strict=True))
        )
    except RuntimeError as error:
        raise ShardingError(f"cannot trace for {machine}: {error}") from error
    text = exported.mlir_module()
    shares = ",".join(sorted({*SEES.findall(text)}))  # timetables read them off scopes' names
    content = hashlib.sha256((_LINES.sub("", text) + shares).encode()).hexdigest()
    return Program(
        bytes(exported.serialize()), content, tuple(names), tuple(donated), mesh, str(machine),
        tuple(sorted((options or {}).items())),
    )  # fmt: skip


def _versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found
