"""Quantise: chosen leaves of a parameter tree become codes with scales, rounded to nearest."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from compress.arrays import Quantized
from compress.calibrated import met, not_enough, unknown_scale
from compress.formats import FORMATS, bounds
from compress.histogram import threshold
from compress.parted import Parted
from compress.scheme import TINY, Scheme, as_scheme, core, fit, role_of, unfit
from compress.transform import KEEP, Leafwise, Rules

USUAL = "**/kernel"
"""The leaves that are quantised where no rules are given."""


class ByScheme(Leafwise):
    """A transform whose options are schemes."""

    def parse(self, option: Any) -> Scheme:
        """See `Leafwise.parse`."""
        return as_scheme(option)

    def resolve(self, path: str, leaf: Any, option: Scheme) -> Scheme:
        """See `Leafwise.resolve`."""
        return with_role(path, leaf, option)


@dataclass(frozen=True)
class Quantize(ByScheme):
    """See `quantize`, which makes it."""

    name: ClassVar[str] = "quantize"

    @property
    def local(self) -> bool:  # type: ignore[override] # of the rules, elsewhere of the class
        """Maxima have the same bits in any order of evaluation, sums of squared errors have not."""
        return all(option == KEEP or option.clip == "absmax" for _, option in self.rules)

    def unfit(self, leaf: Any, option: Scheme) -> str:
        """See `Leafwise.unfit`: of the parts that become codes, where the leaf has such."""
        for name, part in _parts(leaf).items():
            if why := unfit(part, option, option.role):
                return f"its part {name} {list(part.shape)}: {why}"
            if option.activations == "static":
                return f"what meets its part {name} was not observed; leave activations 'dynamic'"
        if _parts(leaf):
            return ""
        return unfit(leaf, option, option.role) or unknown_scale(leaf, option)

    def needs(self, option: Scheme) -> bool:
        """Static scales are found in calibration."""
        return option.activations == "static"

    def _observed(
        self, path: str, leaf: Any, option: Scheme, stats: Mapping[str, Any] | None
    ) -> Any:
        observed = super()._observed(path, leaf, option, stats)
        if observed is not None and (why := not_enough(leaf, option, observed)):
            raise ValueError(f"{path}: {self.name}: {why}")
        return observed

    def leaf(self, leaf: Any, option: Scheme, observed: Any) -> Quantized | Parted:
        """See `Leafwise.leaf`."""
        assert option.role is not None
        if parts := _parts(leaf):
            codes = {name: fit(part, option, option.role) for name, part in parts.items()}
            return dataclasses.replace(leaf, **codes)
        return finished(fit(leaf, option, option.role), option, observed)


def quantize(rules: Rules | Scheme | str = "int8") -> Quantize:
    """A transform that rounds chosen leaves to codes with scales; no float copy is kept.

    Args:
        rules: glob pattern -> scheme, its format's name, or "keep"; first match wins. A scheme
            alone is for every leaf whose path ends in "kernel" and that it fits. Of what `lowrank`
            made, both factors become codes; of what `prune` packed, what stays.

    Returns:
        The transform; its call raises as `Transform` says.

    Raises:
        ValueError: a rule's scheme is none.

    >>> params = {"dense": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}}
    >>> small, report = quantize("int8")(params)
    >>> small["dense"]["kernel"].values.dtype.name
    'int8'
    >>> [(r.path, r.bytes_before, r.bytes_after, r.applied) for r in report]
    [('dense/bias', 16, 16, 'kept: no rule'), ('dense/kernel', 64, 32, 'int8')]
    """
    if isinstance(rules, str | Scheme):
        return Quantize(((USUAL, rules),), strict=False)
    return Quantize(rules)  # type: ignore[arg-type] # becomes pairs


def _parts(leaf: Any) -> dict[str, Any]:
    """The parts of an array of parts that may become codes."""
    return {name: getattr(leaf, name) for name in leaf.coded} if isinstance(leaf, Parted) else {}


def with_role(path: str, leaf: Any, scheme: Scheme) -> Scheme:
    """A scheme with its leaf's role, if it can be told."""
    role = scheme.role or role_of(path, leaf.shape)
    return dataclasses.replace(scheme, role=role)


def finished(new: Quantized, scheme: Scheme, observed: Any) -> Quantized:
    """A fitted array with its static scale of activations, if it is to have one."""
    if scheme.activations != "static":
        return new
    assert scheme.role is not None
    observed = met(new, observed, scheme.role)  # what it was prepared for is done to x first
    return dataclasses.replace(new, act_scale=static_scale(scheme, observed, scheme.role))


def static_scale(scheme: Scheme, observed: Any, role: str) -> jax.Array:
    """The scale of activations that calibration found, [*stack, 1 …], of the leaf's rank.

    It is positive, also where nothing came: activations are divided by it.
    """
    largest = bounds(FORMATS[scheme.row.activations])[1]
    scale = threshold(observed, scheme.calibration) * np.float32(1 / largest)
    scale = jnp.maximum(scale.astype(jnp.float32), TINY)
    return scale.reshape(*scale.shape, *[1] * core(role))
