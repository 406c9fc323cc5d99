"""The exported function: what it takes, how it is made of a model, and what it may not hold.

    logits = call(weights, batch)

One trace with the processor's sizes, symbolic where they may differ, lowered for every platform.
`weights` is a flat dict of named arrays, as in the file, so that calling needs none of the classes
that the model or its compressed leaves are made of. `save` makes it, `load` checks it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fw.errors import FwError

if TYPE_CHECKING:
    from fw.model import Model

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

CUSTOM_CALLS = {"shape_assertion"}
"""The only calls out of StableHLO that are let through: the check of t against its maximum. Others
would run whatever code jaxlib has under that name."""


def form(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dtypes and shapes as the manifest spells them; a symbolic size is its name.

    >>> form({"ids": np.zeros((2, 3), np.int32)})
    {'ids': {'dtype': 'int32', 'shape': [2, 3]}}
    """
    return {
        name: {
            "dtype": str(x.dtype),
            "shape": [str(n) if export.is_symbolic_dim(n) else n for n in x.shape],
        }
        for name, x in sorted(arrays.items())
    }


def functional(
    model: "Model", variables: Mapping[str, Any], name: str
) -> tuple[dict[str, np.ndarray], Callable, Callable, str]:
    """Take a model apart into named weights and a function of them.

    Args:
        model: the record.
        variables: on the host; leaves may be compressed.
        name: the precision of products that are not compressed.

    Returns:
        The weights by name; `function(weights, batch) -> logits`, float32; the model's own
        `forward(variables, batch)`, to compare with; and "f32", "bf16" or "int8", whichever rounds
        the most.
    """
    import compress
    from fw.precision import apply, policy

    chosen = policy(name)
    weights = {n: np.asarray(x, order="C") for n, x in compress.to_arrays(variables).items()}
    if not weights:
        raise FwError("variables: hold no array; nothing to export")
    forward = apply(compress.apply(lambda v, b: model.apply(v, b)[0].astype(jnp.float32)), chosen)
    narrow = {
        n
        for n, x in weights.items()
        if chosen.weights == "bfloat16"
        and x.dtype == np.float32
        and x.ndim >= 2  # stacked layers' too
        and n.rpartition("/")[2] == "kernel"
    }
    weights |= {n: weights[n].astype(jnp.bfloat16) for n in narrow}

    def function(weights, batch):
        # Rounded to bfloat16 again by the policy, which the compiler sees through.
        wide = {n: x.astype(jnp.float32) if n in narrow else x for n, x in weights.items()}
        return forward(compress.from_arrays(wide, like=variables), batch)

    rounds = any(":activations=" in n for n in weights)
    kind = "int8" if rounds else "bf16" if chosen.weights == "bfloat16" else "f32"
    return weights, function, forward, kind


def trace(
    function: Callable,
    weights: Mapping[str, np.ndarray],
    batch: Mapping[str, jax.ShapeDtypeStruct],
) -> export.Exported:
    """Trace the function once, for a processor's `specs`, and lower it for every platform."""
    specs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in weights.items()}
    with _no_locations():
        exporter = export.export(jax.jit(function), platforms=PLATFORMS)
        return exporter(specs, dict(batch))


@contextmanager
def _no_locations() -> Iterator[None]:
    """Keep this machine's paths and the caller's line numbers out of the StableHLO."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


def check_function(exported: export.Exported, where: str) -> None:
    """Refuse a function that reaches out of StableHLO or wants more than one device.

    Raises:
        FwError: it does.
    """
    text = exported.mlir_module()
    found = re.findall(r'custom_call @(?:"([^"]*)"|([\w.$]+))', text)
    names = {quoted or plain for quoted, plain in found}
    if len(found) != text.count("custom_call") or names - CUSTOM_CALLS:
        strange = ", ".join(sorted(names - CUSTOM_CALLS)) or "an unnamed one"
        raise FwError(f"{where}: calls {strange}, which is outside StableHLO")
    if exported.disabled_safety_checks or exported.nr_devices != 1:
        raise FwError(
            f"{where}: expected a function of one device with all safety checks; it has "
            f"{exported.nr_devices} and lacks {list(exported.disabled_safety_checks)}"
        )
