"""Arithmetic on codes, as each platform computes it fast; one file for each.

A backend has the functions below with the same signatures and the same results, and a program for
several platforms holds them all: the choice is made where it is lowered.

    int_dot(q, codes, dims)    int8 × int8 → int32, dimension numbers of `lax.dot_general`
    float8_dot(q, codes, dims) float8 × float8 → float32
    int_conv(q, codes, how)    int8 × int8 → float32, convolved
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax import lax

Dims = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


class Conv(NamedTuple):
    """What a convolution is besides its operands, as `lax.conv_general_dilated` has it."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int


def dispatch(name: str, *arrays: jax.Array, **static: Any) -> jax.Array:
    """Call a function of the backend for the platform that the program is lowered for."""
    from compress.backends import cpu, gpu, tpu

    def of(backend: ModuleType) -> Any:
        return lambda *args: getattr(backend, name)(*args, **static)

    return lax.platform_dependent(
        *arrays, cpu=of(cpu), cuda=of(gpu), rocm=of(gpu), tpu=of(tpu), default=of(cpu)
    )
