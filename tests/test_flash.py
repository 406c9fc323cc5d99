"""Kernels of attention: each where it serves, with the numbers of plain attention."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fw import precision
from fw.models import flash, layers
from fw.models.llama import LlamaConfig, llama
from fw.models.modernbert import ModernBertConfig, modernbert
from sharding import make_mesh, rules, scope

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LENGTH = 384
"""Three blocks of splash attention, some of which a window skips."""
CASES: dict[str, dict[str, Any]] = {
    "texts": {},
    "causal": {"causal": True},
    "window": {"window": 40},
    "causal window": {"causal": True, "window": 40},
}


def arrays(size=64, key_heads=2, heads=2):
    """Queries, keys, values, segments with padding (0), and the output's gradient."""
    rng = np.random.default_rng(key_heads)
    q, g = rng.normal(size=(2, 2, LENGTH, heads, size)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, LENGTH, key_heads, size)).astype(np.float32)
    texts = np.repeat(np.array([[1, 1, 2, 3], [1, 2, 2, 0]], np.int32), LENGTH // 4, 1)
    return q, k, v, np.roll(texts, -5, 1), g


def results(run, q, k, v, segments, g):
    """Output and the gradients of queries, keys and values."""
    out, back = jax.vjp(lambda q, k, v: run(q, k, v, layers.visible(segments, q.dtype)), q, k, v)
    return out, *back(g)


def plain(q, k, v, segments, g, **case):
    def run(q, k, v, seen):
        return layers.attend(q, k, v, layers.segment_bias(seen.segments, q.dtype, **case))

    return jax.jit(functools.partial(results, run))(q, k, v, segments, g)


def by_kernel(kernel, given, case, spec="data=1"):
    run = jax.jit(functools.partial(results, functools.partial(flash.flash, kernel, **case)))
    # JAX's own attention promotes dtypes in its backward pass.
    with scope(make_mesh(spec), rules()), jax.numpy_dtype_promotion("standard"):
        return run(*given)


@pytest.fixture
def anywhere(monkeypatch):
    """Kernels that run on a CPU: Pallas' interpreted, and what JAX has for cuDNN's arguments."""
    splash = functools.partial(flash.splash_attention, interpret=True)
    monkeypatch.setattr(flash, "splash_attention", splash)
    attention = jax.nn.dot_product_attention

    def same_arguments(*args, implementation, **options):
        assert implementation == "cudnn"
        return attention(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", same_arguments)


@pytest.mark.parametrize(
    ("kernel", "case", "size", "key_heads"),
    [
        ("cudnn", "causal", 64, 1),
        ("cudnn", "window", 64, 2),
        ("cudnn", "causal window", 64, 2),
        ("splash", "texts", 64, 2),
        ("splash", "causal", 128, 1),
        ("splash", "window", 64, 2),
    ],
)
def test_a_kernel_has_the_numbers_of_plain_attention(
    kernel, case, size, key_heads, anywhere, monkeypatch
):
    monkeypatch.setattr(flash, "DTYPE", "float32")
    given = arrays(size, key_heads)
    expected = plain(*given, **CASES[case])
    for a, b in zip(by_kernel(kernel, given, CASES[case]), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("kernel", "case"), [("cudnn", "texts"), ("splash", "causal window")])
def test_a_kernel_in_bfloat16_on_a_mesh(kernel, case, anywhere):
    given, case = arrays(64, 2, heads=4), CASES[case]
    expected = plain(*given, **case)
    for a, b in zip(by_kernel(kernel, given, case, "data=2,tensor=2"), expected, strict=True):
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()  # bfloat16 has 8 bits


@pytest.mark.slow
def test_a_model_with_kernels_in_stages(anywhere, monkeypatch):
    """A training step's numbers where stages are mapped, rows are cut, and layers scanned."""
    monkeypatch.setattr(flash, "DTYPE", "float32")
    model = llama(LlamaConfig(30, 64, 2, 2, 32, num_key_value_heads=2, microbatches=2))
    variables = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30, (4, 128)).astype(np.int32)
    place = np.arange(128, dtype=np.int32)
    batch = {
        "input_ids": ids,
        "segment_ids": np.broadcast_to(1 + place // 50, ids.shape),
        "position_ids": np.broadcast_to(place % 50, ids.shape),
    }

    def loss(params):
        logits, _ = model.apply({"params": params, "state": {}}, batch)
        return jnp.mean(jnp.square(logits))

    with scope(make_mesh("pipe=2,data=2"), rules()):
        expected = jax.jit(jax.value_and_grad(loss))(variables["params"])
    chosen = flash.Choice("splash", "the test")
    monkeypatch.setattr(flash, "attention_kernel", lambda *_, **__: chosen)
    with scope(make_mesh("pipe=2,data=2"), rules()):
        program = jax.jit(jax.value_and_grad(loss))
        assert "splash_mha_dkv" in str(program.trace(variables["params"]).jaxpr)
        found = program(variables["params"])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), found, expected
    )


LONG, SHORT = (2, 2048, 8, 128), (2, 256, 8, 128)
(BATCH,) = jax.export.symbolic_shape("batch")


@pytest.mark.parametrize(
    ("platform", "queries", "keys", "dtype", "more", "kernel", "reason"),
    [
        ("tpu", LONG, (2, 2048, 2, 128), "bfloat16", {}, "splash", "serves"),
        ("cuda", LONG, LONG, "bfloat16", {}, "cudnn", "serves"),
        ("cpu", LONG, LONG, "bfloat16", {}, "xla", "no kernel for cpu"),
        ("rocm", LONG, LONG, "bfloat16", {}, "xla", "no kernel for rocm"),
        ("tpu", LONG, LONG, "float32", {}, "xla", "float32"),
        ("tpu", LONG, LONG, "bfloat16", {"rate": 0.1}, "xla", "dropped"),
        ("tpu", SHORT, SHORT, "bfloat16", {}, "xla", "less than 4 x 128"),
        ("tpu", (2, 1, 8, 128), LONG, "bfloat16", {}, "xla", "1 queries see 2048 keys"),
        ("tpu", (2, 1100, 8, 64), (2, 1100, 8, 64), "bfloat16", {}, "xla", "multiple of 128"),
        ("tpu", (2, 512, 8, 80), (2, 512, 8, 80), "bfloat16", {}, "xla", "multiple of 64"),
        ("tpu", (BATCH, *LONG[1:]), (BATCH, *LONG[1:]), "bfloat16", {}, "xla", "symbolic"),
        ("cuda", (2, 2048, 8, 256), (2, 2048, 8, 256), "bfloat16", {}, "xla", "cuDNN takes"),
        ("cuda", LONG, LONG, "bfloat16", {"batched": True}, "xla", "cannot map"),
    ],
)
def test_whose_kernel_and_why(platform, queries, keys, dtype, more, kernel, reason, monkeypatch):
    monkeypatch.setattr(flash, "has_cudnn", lambda: True)
    choice = flash.attention_kernel(platform, queries, keys, dtype, **more)
    assert choice.kernel == kernel and reason in choice.reason


def test_without_cudnn_there_is_no_cudnn(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(flash, "cudnn", missing)
    flash.has_cudnn.cache_clear()
    try:
        choice = flash.attention_kernel("cuda", LONG, LONG, "bfloat16")
    finally:
        flash.has_cudnn.cache_clear()
    assert choice.kernel == "xla" and "finds no cuDNN" in choice.reason


@pytest.mark.parametrize("policy", ["bf16", "f32"])
def test_a_program_for_tpus_has_the_kernel_and_one_for_cpus_has_not(policy, caplog):
    """Outside a scope the platform is that of the compiler; lowering needs no device."""
    q, k, v, segments, _ = arrays()

    def run(q, k, v):
        return layers.attention(q, k, v, layers.visible(jnp.asarray(segments), q.dtype))

    with caplog.at_level(logging.INFO, flash.__name__):
        traced = jax.jit(precision.apply(run, policy)).trace(q, k, v)
    found = {
        platform: "tpu_custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    assert found == {"cpu": False, "tpu": policy == "bf16"}
    assert f"by {'splash' if policy == 'bf16' else 'xla'}" in caplog.text


def test_on_cpus_models_take_plain_attention(caplog):
    model = modernbert(
        ModernBertConfig(30, 128, 2, 2, 16, num_labels=3, task="token_classification")
    )
    ids = jnp.ones((1, 256), jnp.int32)
    batch = {"input_ids": ids, "segment_ids": ids, "position_ids": ids}
    variables = jax.eval_shape(model.init, jax.random.key(0))
    apply = precision.apply(lambda v: model.apply(v, batch)[0], "bf16")
    with caplog.at_level(logging.INFO, flash.__name__), scope(make_mesh("data=1"), rules()):
        jaxpr = jax.make_jaxpr(apply)(jax.tree.map(lambda x: jnp.zeros(x.shape), variables))
    assert "pallas" not in str(jaxpr) and caplog.text.count("by xla: there is no kernel") == 2
