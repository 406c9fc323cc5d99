"""From the names of an array's axes to the axes of a mesh, and nothing by accident.

A model says what its axes mean (`("embed", "mlp")`); a table of rules says where each meaning goes
(`embed` over `fsdp`, `mlp` over `tensor`). An axis without a rule is an error, and so is a rule of
the user's without an axis: a parameter is replicated only where a rule says `None`. `layout` brings
the rules together with arrays and a mesh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from jax.sharding import PartitionSpec

from sharding.errors import ShardingError, nearest
from sharding.mesh import AXES

Names = tuple[str | None, ...]
"""The logical names of an array's axes; None for an axis that is never cut."""

Target = str | Sequence[str] | None
"""Where a logical axis goes: a mesh axis, several (the first is the outermost), or nowhere."""

BATCH = "batch"
ACTIVATIONS = (BATCH, "length", "stream", "height", "width")
"""The names of the vocabulary that only batches and activations have, no parameter. `stream` is the
length of what lies between sublayers, where no axis but it could be cut over `tensor`."""

_PARAMETERS = ("vocab", "positions", "types", "embed", "heads", "mlp", "pooled", "labels")
_TABLES = ("rows", "columns")  # of embedding tables: see parallel/tables.py
_WHOLE: dict[str, Target] = dict.fromkeys(
    (*ACTIVATIONS, *_PARAMETERS, *_TABLES, "experts", "layers")
)
# Axes that cut nothing unless the mesh has them: no preset need leave them out.
_WIDE = _WHOLE | {
    "length": "sequence",
    "stream": "sequence",
    "height": "sequence",  # of images; an activation has the one or the other
    "experts": "expert",
    "layers": "pipe",
}
_ROWS = ("data", "fsdp", "expert")
_FSDP = _WIDE | {BATCH: _ROWS, "embed": "fsdp"} | dict.fromkeys(_TABLES, _ROWS)

PRESETS: Mapping[str, Mapping[str, Target]] = MappingProxyType(
    {
        "data": _WIDE | {BATCH: ("data", "expert")},
        "fsdp": _FSDP,
        # Not vocab: real vocabularies (30522, 50257) seldom divide.
        "fsdp_tensor": _FSDP
        | {"heads": "tensor", "mlp": "tensor", "stream": ("sequence", "tensor")},
    }
)
"""Complete tables by name: `data` replicates every parameter on purpose but experts and stages,
`fsdp` cuts them along `embed`, and embedding tables over all that cuts the batch, `fsdp_tensor`
cuts `heads` and `mlp` over `tensor` as well."""

DEFAULT = "fsdp_tensor"


@dataclass(frozen=True)
class Rules:
    """A preset and what the user changed in it; made by `rules`, hashable, equal by value.

    Attributes:
        preset: a name in `PRESETS`.
        overrides: the user's own entries, (logical name, target), sorted by name.

    >>> rules("fsdp", mlp=["tensor"])
    Rules(preset='fsdp', overrides=(('mlp', 'tensor'),))
    """

    preset: str = DEFAULT
    overrides: tuple[tuple[str, Target], ...] = ()

    def __post_init__(self) -> None:
        """Check every entry, and bring it to its one form."""
        if self.preset not in PRESETS:
            raise ShardingError(f"unknown rules {self.preset!r}: {nearest(self.preset, PRESETS)}")
        entries = sorted(dict(self.overrides).items())
        checked = tuple((name, _checked(name, target)) for name, target in entries)
        object.__setattr__(self, "overrides", checked)

    @cached_property
    def table(self) -> Mapping[str, Target]:
        """Target by logical name: the preset with the overrides on top."""
        return MappingProxyType({**PRESETS[self.preset], **dict(self.overrides)})

    def spec(self, names: Names, *, activation: bool = False, path: str = "array") -> PartitionSpec:
        """The PartitionSpec of an array whose axes have these names.

        In an activation, the mesh axes of `batch` belong to `batch` alone, and other names leave
        them out. That is what FSDP means: `embed` is cut over `fsdp` where parameters are stored,
        while activations are cut over `fsdp` by rows.

        Args:
            names: one name an axis, None for an axis that is never cut.
            activation: whether the array is an activation (or a batch) rather than a parameter.
            path: the array's name in error messages.

        Returns:
            One entry an axis.

        Raises:
            ShardingError: a name without a rule, or one mesh axis for two axes of the array.

        >>> tuple(rules("fsdp_tensor").spec(("embed", "mlp")))
        ('fsdp', 'tensor')
        >>> tuple(rules("fsdp_tensor").spec(("batch", "length", "embed"), activation=True))
        (('data', 'fsdp', 'expert'), 'sequence', None)
        """
        reserved = mesh_axes(self.table[BATCH]) if activation else ()
        taken: dict[str, str] = {}
        entries: list[Target] = []
        for name in names:
            if name is not None and name not in self.table:
                raise ShardingError(
                    f"{path}: no rule for axis {name!r} of {names}: {nearest(name, self.table)} "
                    f"(a new name needs an override: {name}=None replicates, {name}=axis cuts)"
                )
            axes = () if name is None else mesh_axes(self.table[name])
            if name != BATCH:
                axes = tuple(axis for axis in axes if axis not in reserved)
            for axis in axes:
                if axis in taken:
                    raise ShardingError(
                        f"{path}: mesh axis {axis!r} would cut both {taken[axis]!r} and {name!r} "
                        f"of {names}; map one of them elsewhere, or to None"
                    )
                taken[axis] = str(name)
            entries.append(_entry(axes))
        return PartitionSpec(*entries)

    def without(self, axis: str) -> "Rules":
        """The same rules with a mesh axis left out: for what is mapped over it.

        >>> tuple(rules("data").without("data").spec(("batch",)))
        ('expert',)
        """
        changed = {
            name: tuple(a for a in mesh_axes(target) if a != axis) or None
            for name, target in self.table.items()
            if axis in mesh_axes(target)
        }
        return Rules(self.preset, tuple((dict(self.overrides) | changed).items()))


def rules(
    preset: str = DEFAULT, overrides: Mapping[str, Target] | None = None, /, **more: Target
) -> Rules:
    """A preset of rules, with changes.

    Args:
        preset: a name in `PRESETS`.
        overrides: target by logical name: a mesh axis, several, or None to replicate.
        **more: more overrides.

    Returns:
        The rules as a frozen value.

    Raises:
        ShardingError: an unknown preset or mesh axis, a mesh axis twice in one target, or a
            target of another kind.

    >>> tuple(rules("fsdp", vocab="tensor").spec(("vocab", "embed")))
    ('tensor', 'fsdp')
    >>> rules("fsdp", {"vocab": "tensr"})
    Traceback (most recent call last):
    ...
    sharding.errors.ShardingError: rule 'vocab': unknown mesh axis 'tensr': did you mean 'tensor'?
    """
    return Rules(preset, tuple(dict(overrides or {}, **more).items()))


def mesh_axes(target: Target) -> tuple[str, ...]:
    """A target as a tuple of mesh axes.

    >>> mesh_axes("fsdp"), mesh_axes(("data", "fsdp")), mesh_axes(None)
    (('fsdp',), ('data', 'fsdp'), ())
    """
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else tuple(target)


def _entry(axes: tuple[str, ...]) -> Target:
    """The shortest way to say a target, so that equal rules compare equal."""
    if len(axes) > 1:
        return axes
    return axes[0] if axes else None


def _checked(name: str, target: Target) -> Target:
    if not (target is None or isinstance(target, str | list | tuple)):
        raise ShardingError(
            f"rule {name!r}: expected a mesh axis, a list of them or None, got {target!r}"
        )
    axes = mesh_axes(target)
    for axis in axes:
        if axis not in AXES:
            raise ShardingError(
                f"rule {name!r}: unknown mesh axis {axis!r}: {nearest(str(axis), AXES)}"
            )
    if len(set(axes)) < len(axes):
        raise ShardingError(f"rule {name!r} names a mesh axis twice: {target!r}")
    return _entry(axes)
