"""Convolutions under a policy: against XLA's own in float64, alone, inside of others, on a mesh."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fw.models.convolution import conv
from fw.precision import apply
from sharding import make_mesh

few = settings(derandomize=True, deadline=None, max_examples=6, phases=[Phase.generate])

CASES = {  # batch, height, width, in, out, kernel, strides, padding, groups
    "3x3": (4, 9, 10, 3, 5, (3, 3), (1, 1), ((1, 1), (1, 1)), 1),
    "grey": (4, 9, 10, 1, 5, (3, 3), (1, 2), ((1, 1), (0, 2)), 1),
    "many channels": (6, 7, 4, 64, 72, (3, 3), (1, 1), ((1, 0), (2, 1)), 1),
    "many channels in chunks": (40, 8, 7, 64, 64, (3, 3), (1, 1), ((1, 1), (1, 1)), 1),
    "many channels, strided": (4, 9, 8, 64, 64, (3, 2), (2, 2), ((1, 1), (1, 1)), 1),
    "narrow": (16, 7, 5, 3, 5, (3, 3), (1, 1), ((1, 1), (1, 1)), 1),
    "strided": (4, 9, 12, 3, 5, (3, 3), (2, 2), ((1, 1), (1, 1)), 1),
    "rows that no window reaches": (2, 8, 9, 3, 4, (1, 1), (2, 2), ((0, 0), (0, 0)), 1),
    "more padding than kernel": (2, 6, 6, 3, 4, (2, 2), (3, 3), ((2, 2), (3, 3)), 1),
    "groups": (2, 8, 8, 4, 8, (3, 3), (2, 2), ((1, 1), (1, 1)), 4),
    "chunks": (64, 32, 32, 16, 2, (3, 3), (1, 1), ((1, 1), (1, 1)), 1),
}


def operands(batch, height, width, size_in, size_out, kernel, strides, padding, groups, seed=0):
    """x, kernel and a cotangent, and the convolution of the first two."""
    rng = np.random.default_rng(seed)
    fn = functools.partial(conv, strides=strides, padding=padding, groups=groups)
    shapes = (batch, height, width, size_in), (*kernel, size_in // groups, size_out)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    g = rng.normal(size=jax.eval_shape(fn, x, w).shape).astype(np.float32)
    return fn, x, w, g


def gradients(fn, x, w, g):
    y, pull = jax.vjp(fn, x, w)
    return y, *pull(g)


def exact(fn, x, w, g):
    """All three in float64, and the bounds that Σ |a| |b| puts on a sum's error."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (x, w, g)]
        run = jax.jit(functools.partial(gradients, fn))
        return jax.device_get((run(*wide), run(*map(jnp.abs, wide))))


def check(found, expected):
    for value, right, scale in zip(found, *expected, strict=True):
        assert value.dtype == np.float32
        assert value.shape == right.shape
        # Of n terms the error is at most n · 2⁻²⁴ · scale; that of an ordinary sum, about √n.
        assert np.all(np.abs(np.asarray(value, np.float64) - right) <= 64 * 2.0**-24 * scale + 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_convolution_in_float64(name):
    fn, *arrays = operands(*CASES[name])
    run = jax.jit(functools.partial(gradients, apply(fn, "f32")))
    check(run(*arrays), exact(fn, *arrays))


@few
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = draw(1, 3)
    kernel, strides = ((draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3)))
    padding = tuple((draw(0, n), draw(0, n)) for n in kernel)
    sizes = (draw(1, 6), draw(4, 14), draw(4, 14), groups * draw(1, 3), groups * draw(1, 3))
    fn, *arrays = operands(*sizes, kernel, strides, padding, groups, draw(0, 99))
    run = jax.jit(functools.partial(gradients, apply(fn, "f32")))
    check(run(*arrays), exact(fn, *arrays))


@pytest.mark.parametrize("name", ["strided", "narrow"])
def test_bf16_rounds_operands_and_nothing_else(name):
    fn, *arrays = operands(*CASES[name])
    rounded = [a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in arrays]
    run = jax.jit(functools.partial(gradients, apply(fn, "bf16")))
    check(run(*arrays), exact(fn, *rounded))


@pytest.mark.parametrize("inside", ["vmap", "scan", "remat", "shard_map"])
def test_inside_of_other_functions(inside):
    fn, x, w, g = operands(8, 6, 6, 4, 4, (3, 3), (1, 1), ((1, 1), (1, 1)), 1)

    def around(x, w):
        if inside == "vmap":
            return jax.vmap(fn, (0, None))(x.reshape(2, 4, *x.shape[1:]), w).reshape(x.shape)
        if inside == "scan":
            return lax.scan(lambda x, w: (fn(x, w), None), x, w[None])[0]
        if inside == "remat":
            return jax.checkpoint(fn)(x, w)
        spec = PartitionSpec("data")
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        return jax.shard_map(fn, mesh=mesh, in_specs=(spec, None), out_specs=spec)(x, w)

    run = jax.jit(functools.partial(gradients, apply(around, "f32")))
    check(run(x, w, g), exact(fn, x, w, g))


@pytest.mark.parametrize("mesh", ["data=8", "tensor=8", "data=4,tensor=2"])
@pytest.mark.parametrize("strides", [1, 2])
def test_on_a_mesh_no_image_travels(mesh, strides):
    sides = ((1, 1), (1, 1))
    fn, x, w, g = operands(64, 16, 16, 8, 8, (3, 3), (strides, strides), sides, 1)
    lies = functools.partial(NamedSharding, make_mesh(mesh))
    image, kernel = (
        lies(PartitionSpec("data")),
        lies(PartitionSpec(None, None, None, "tensor")),
    )
    result = lies(PartitionSpec("data", None, None, "tensor"))
    run = jax.jit(
        functools.partial(gradients, apply(fn, "f32")),
        in_shardings=(image, kernel, result),
        out_shardings=(result, image, kernel),
    )
    program = str(run.lower(x, w, g).compile().as_text())
    assert "all-reduce" in program
    assert not re.findall(r"(all-gather|all-to-all|collective-permute)\(", program)
    check(run(x, w, g), exact(fn, x, w, g))


@pytest.mark.parametrize("policy", ["f32", "bf16"])
def test_convolutions_that_are_not_of_images(policy):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 9), (4, 3, 3)))
    fn: Any = functools.partial(lax.conv_general_dilated, window_strides=(1,), padding="SAME")
    to = ml_dtypes.bfloat16 if policy == "bf16" else np.float32
    right = fn(*[jnp.asarray(a.astype(to).astype(np.float32)) for a in (x, w)])
    np.testing.assert_allclose(apply(fn, policy)(x, w), right, rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(apply(fn, "f32"))(x, w))
    assert "HIGHEST" in text
