"""Kernels of attention: each where it serves, with the numbers of plain attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fw import precision
from fw.models import flash, layers
from sharding import make_mesh, rules, scope

LENGTH, SIZE = 256, 32
KINDS: dict[str, dict[str, Any]] = {
    "texts": {},
    "causal": {"causal": True},
    "window": {"window": 40},
    "causal window": {"causal": True, "window": 40},
}


def arrays(key_heads=4):
    rng = np.random.default_rng(key_heads)
    q, g = rng.normal(size=(2, 4, LENGTH, 4, SIZE)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, LENGTH, key_heads, SIZE)).astype(np.float32)
    texts = np.repeat(np.array([[1, 1, 2, 3], [1, 2, 2, 0], [1, 1, 1, 1], [1, 0, 0, 0]]), 64, 1)
    return q, k, v, texts.astype(np.int32), g


def results(kernel, kind, q, k, v, segments, g):
    """Output and the gradients of queries, keys and values."""

    def run(q, k, v):
        seen: Any = layers.visible(segments, q.dtype, **KINDS[kind])
        if kernel == "plain":
            return layers.attention(q, k, v, seen, **KINDS[kind])
        return flash.flash(kernel, q, k, v, seen, **KINDS[kind])

    out, back = jax.vjp(run, q, k, v)
    return out, *back(g)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_splash_has_the_numbers_of_plain_attention_and_its_gradients(kind, key_heads, monkeypatch):
    anywhere = functools.partial(flash.splash_attention, interpret=True)
    monkeypatch.setattr(flash, "splash_attention", anywhere)
    given = arrays(key_heads)
    plain = jax.jit(functools.partial(results, "plain", kind))(*given)
    for spec in ("data=1", "data=2,tensor=2"):
        with scope(make_mesh(spec), rules()):
            found = jax.jit(functools.partial(results, "splash", kind))(*given)
        for a, b in zip(found, plain, strict=True):
            assert np.abs(a - b).max() < 0.02 * np.abs(b).max(), spec  # bfloat16 has 8 bits


def test_splash_in_float32_is_exact(monkeypatch):
    anywhere = functools.partial(flash.splash_attention, interpret=True)
    monkeypatch.setattr(flash, "splash_attention", anywhere)
    monkeypatch.setattr(flash, "DTYPE", "float32")
    plain, found = (
        jax.jit(functools.partial(results, kernel, "causal window"))(*arrays(2))
        for kernel in ("plain", "splash")
    )
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


LONG, SHORT = (2, 2048, 8, 128), (2, 256, 8, 128)


@pytest.mark.parametrize(
    ("platform", "queries", "keys", "dtype", "more", "expected"),
    [
        ("tpu", LONG, LONG, "bfloat16", {}, "splash"),
        ("cuda", LONG, LONG, "bfloat16", {}, "cudnn"),
        ("cuda", LONG, LONG, "bfloat16", {"cudnn": False}, "xla"),
        ("cpu", LONG, LONG, "bfloat16", {}, "xla"),
        ("rocm", LONG, LONG, "bfloat16", {}, "xla"),
        ("tpu", LONG, LONG, "float32", {}, "xla"),
        ("tpu", LONG, LONG, "bfloat16", {"rate": 0.1}, "xla"),
        ("tpu", SHORT, SHORT, "bfloat16", {}, "xla"),
        ("tpu", (2, 1, 8, 128), LONG, "bfloat16", {}, "xla"),  # decoding
        ("tpu", (2, 1100, 8, 128), (2, 1100, 8, 128), "bfloat16", {}, "xla"),
        ("cuda", (2, 2048, 8, 256), (2, 2048, 8, 256), "bfloat16", {}, "xla"),
    ],
)
def test_whose_kernel(platform, queries, keys, dtype, more, expected):
    assert flash.kernel_for(platform, queries, keys, dtype, **more) == expected


@pytest.mark.parametrize("policy", ["bf16", "f32"])
def test_a_program_for_tpus_has_the_kernel_and_one_for_cpus_has_not(policy):
    """Outside a scope the platform is that of the compiler; lowering needs no device."""
    q, k, v, segments, _ = arrays()

    def run(q, k, v):
        return layers.attention(q, k, v, layers.visible(jnp.asarray(segments), q.dtype))

    traced = jax.jit(precision.apply(run, policy)).trace(q, k, v)
    found = {
        platform: "tpu_custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    assert found == {"cpu": False, "tpu": policy == "bf16"}


def test_a_symbolic_batch_has_no_kernel():
    (batch,) = jax.export.symbolic_shape("batch")
    shape = (batch, 2048, 8, 128)
    assert flash.kernel_for("tpu", shape, shape, "bfloat16") == "xla"
    assert jnp.dtype(flash.DTYPE) == jnp.bfloat16
