"""Activations in bfloat16, and products as only programs for TPUs have them: the same numbers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw import precision
from fw.model import Model
from fw.models.bert import BertConfig, bert
from fw.models.experts import mlp, mlps
from fw.models.layers import layer_norm, swiglu
from fw.models.llama import LlamaConfig, llama
from fw.models.modernbert import ModernBertConfig, modernbert
from fw.models.pixels import normalised
from fw.models.resnet import ResNetConfig, resnet
from fw.models.vit import vit
from fw.models.vit_config import ViTConfig
from sharding import constrain, inspect, linear, make_mesh, put, rules, scope, word_losses
from sharding import shardings as where
from sharding.parallel.linear import _by_heads, _kernel_first
from sharding.parallel.rows import Expert, grouped
from sharding.plan import hardware
from sharding.plan.program import abstract_mesh
from sharding.plan.survey import _inner

LABELS = {"num_labels": 3, "task": "token_classification"}
IMAGES = {"num_labels": 3, "task": "image_classification"}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
NET = {"embedding_size": 8, "hidden_sizes": (8, 16), "depths": (1, 1), "layer_type": "basic"}
FAMILIES = {
    "llama": lambda: llama(LlamaConfig(48, 32, 2, 4, 64, num_key_value_heads=2)),
    "bert": lambda: bert(BertConfig(48, 32, 2, 4, 64, max_position_embeddings=16, **LABELS)),
    "modernbert": lambda: modernbert(ModernBertConfig(48, 32, 2, 4, 64, **LABELS)),
    "vit": lambda: vit(ViTConfig(image_size=16, patch_size=4, **SIZES, **IMAGES)),
    "resnet": lambda: resnet(ResNetConfig(**NET, **IMAGES)),
}


def case(name: str) -> tuple[Model, dict, dict]:
    model, rng = FAMILIES[name](), np.random.default_rng(len(name))
    variables = jax.tree.map(
        lambda x: (
            x + rng.normal(0, 0.1, x.shape).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        model.init(jax.random.key(0)),
    )
    variables["state"] = jax.tree.map(jnp.abs, variables["state"])  # variances among it
    if name in ("vit", "resnet"):
        return model, variables, {"pixel_values": rng.normal(size=(4, 16, 16, 3)).astype("float32")}
    ids = rng.integers(1, 48, (4, 16)).astype(np.int32)
    places = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    batch = {"input_ids": ids, "position_ids": places, "segment_ids": np.ones_like(ids)}
    return model, variables, batch | ({"targets": ids[:, ::-1]} if name == "llama" else {})


def off(got, expected) -> float:
    """The norm of what differs, of the norm of what is expected; of all leaves together."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    total = sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)
    return (total / sum(float(jnp.sum(jnp.square(b))) for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_and_its_gradient_are_those_of_float32_to_bfloat16s_digits(name):
    model, variables, batch = case(name)
    weights = np.random.default_rng(1)

    def loss(params, policy, own):
        out, state = precision.apply(model.apply, policy)(
            {**variables, "params": params}, batch, train=name == "resnet"
        )
        out = out["losses"] if isinstance(out, dict) else out
        assert out.dtype == np.float32
        return jnp.sum(out * own), (out, state["state"])

    shape = jax.eval_shape(lambda v: model.apply(v, batch)[0], variables)
    shape = shape["losses"].shape if isinstance(shape, dict) else shape.shape
    own = weights.normal(size=shape).astype(np.float32)
    of = jax.value_and_grad(loss, has_aux=True)
    (_, (y, state)), grads = jax.jit(of, static_argnums=1)(variables["params"], "f32", own)
    narrow = jax.jit(of, static_argnums=1)(variables["params"], "bf16_activations", own)
    (_, (y_narrow, state_narrow)), grads_narrow = narrow
    # bfloat16 keeps 8 bits, 0.4 %: a dozen roundings that do not add up.
    assert 1e-4 < off(y_narrow, y) < 0.03
    # A batch norm takes away what all rows have in common, but not its roundings: products alone in
    # bfloat16 are 6 % off there.
    assert 1e-4 < off(grads_narrow, grads) < (0.2 if name == "resnet" else 0.06)
    assert [g.dtype for g in jax.tree.leaves(grads_narrow)] == [
        g.dtype for g in jax.tree.leaves(grads)
    ]
    for a, b in zip(jax.tree.leaves(state_narrow), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype  # averages stay what they are, and are not rounded
    if name == "resnet":
        assert off(state_narrow, state) < 0.02


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([(3,), (2, 5)]))
def test_swiglu_and_its_derivative_are_those_of_its_parts(seed, shape):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        gate, up, g = (jnp.asarray(rng.normal(0, 3, shape)) for _ in range(3))
        expected, pull = jax.vjp(lambda a, b: jax.nn.silu(a) * b, gate, up)
        got, own = jax.vjp(swiglu, gate, up)
        np.testing.assert_allclose(got, expected, atol=1e-12)
        for a, b in zip(own(g), pull(g), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_sums_are_in_float32_whatever_flows():
    rng = np.random.default_rng(0)
    wide = (100 + rng.normal(size=(4, 4096))).astype(np.float32)
    x = jnp.asarray(wide, jnp.bfloat16)
    ones = jnp.ones(4096, jnp.bfloat16)
    got = layer_norm(x, ones, 0 * ones, 1e-6).astype(np.float32)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(
        got, exact, atol=0.02
    )  # in bfloat16 the mean alone would be off by 0.25

    x, table = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 16), (40, 16)))
    targets = jnp.asarray(rng.integers(0, 40, (2, 8)), jnp.int32)
    narrow = word_losses(jnp.bfloat16(x), jnp.bfloat16(table), targets)[0]
    exact = word_losses(jnp.float32(jnp.bfloat16(x)), jnp.float32(jnp.bfloat16(table)), targets)[0]
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, exact, atol=1e-5)


def stream_loss(params, x, out_rows):
    """As a decoder's MLP: rows cut over `tensor` as well, before and after, or not."""
    rows = ("batch", out_rows)
    x = constrain(x, *rows, "embed")
    [up] = linear(x, [params["up"]], ("embed", "mlp"), rows=rows, out_rows=("batch", "length"))
    hidden = constrain(jnp.tanh(up), "batch", "length", "mlp")
    [y] = linear(hidden, [params["down"]], ("mlp", "embed"), out_rows=rows)
    return jnp.mean(jnp.sin(x + constrain(y, *rows, "embed")))


@pytest.mark.parametrize("spec", ["tensor=8", "fsdp=2,tensor=4", "data=2,sequence=2,tensor=2"])
def test_rows_in_parts_over_tensor_change_no_number_and_sum_nothing_whole(spec):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {"up": rng.normal(size=(16, 32)) / 4, "down": rng.normal(size=(32, 16)) / 4}
        x = rng.normal(size=(8, 16, 16))
        expected = jax.value_and_grad(
            lambda p: jnp.mean(jnp.sin(x + jnp.tanh(x @ p["up"]) @ p["down"]))
        )(params)
        mesh, layout = make_mesh(spec), rules()
        names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
        lies = where(names, params, mesh, layout)
        placed, rows = jax.device_put(params, lies), put(x, mesh, layout)
        kinds = {}
        for name in ("length", "stream"):
            with scope(mesh, layout, differentiate=True):
                step = jax.jit(
                    jax.value_and_grad(partial(stream_loss, out_rows=name)),
                    out_shardings=(None, lies),
                ).lower(placed, rows)
            compiled = step.compile()
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13),
                compiled(placed, rows), expected,
            )  # fmt: skip
            kinds[name] = [
                c
                for c in inspect(compiled).collectives
                if c.axes == ("tensor",) and c.wire_bytes > 64
            ]
    assert {c.kind for c in kinds["stream"]} == {"all-gather", "reduce-scatter"}
    assert "all-reduce" in {c.kind for c in kinds["length"]}


@pytest.mark.parametrize("names", [("embed", "heads"), ("heads", "embed"), ("embed", "mlp")])
def test_products_as_tpus_take_them(names):
    """By heads, and with the kernel's gradient first: on no CPU, so they are called by name."""
    rng = np.random.default_rng(0)
    x, kernel, g = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 5, 24), (24, 24), (2, 5, 24))
    )
    expected, pull = jax.vjp(jnp.matmul, x, kernel)
    got, own = jax.vjp(partial(_kernel_first, _by_heads(names, 8)), x, kernel)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for a, b in zip(own(g), pull(g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_bytes_of_images_become_bfloat16(name):
    model, variables, batch = case(name)
    model = normalised(model, [0.5], [0.5])
    images = {"images": (100 * np.abs(batch["pixel_values"])).clip(0, 255).astype(np.uint8)}
    narrow, wide = (
        precision.apply(model.apply, policy)(variables, images)[0]
        for policy in ("bf16_activations", "f32")
    )
    assert off(narrow, wide) < 0.02


def test_stages_hand_on_bfloat16():
    config = LlamaConfig(48, 32, 4, 4, 64, num_key_value_heads=2, microbatches=2)
    model, mesh, table = llama(config), make_mesh("pipe=2", jax.devices()[:2]), rules()
    variables, (_, _, batch) = model.init(jax.random.key(3)), case("llama")
    wide = model.apply(variables, batch)[0]["losses"]
    with scope(mesh, table, differentiate=True):
        run = jax.jit(lambda v, b: precision.apply(model.apply, "bf16_activations")(v, b)[0])
        there = jax.device_put(variables, where(model.axes, variables, mesh, table))
        narrow = run(there, batch)["losses"]
    assert off(narrow, wide) < 0.02


@pytest.mark.parametrize("policy", precision.POLICIES)
def test_products_of_all_experts_at_once_are_those_of_each(policy):
    rng = np.random.default_rng(4)
    number, size, inner, rows = 3, 16, 24, 40
    params = {
        "up": rng.normal(0, 0.2, (number, size, 2, inner)).astype(np.float32),
        "down": rng.normal(0, 0.2, (number, inner, size)).astype(np.float32),
    }
    x = rng.normal(size=(rows, size)).astype(np.float32)
    ids = jnp.asarray(rng.integers(0, number + 1, rows), jnp.int32)  # some rows of none
    own = rng.normal(size=(rows, size)).astype(np.float32)

    def run(params, x, at_once):
        def layer(params, x):
            one, all_of_them = precision.here(mlp), precision.here(mlps)
            return grouped(Expert(one, all_of_them) if at_once else one, params, x, ids)

        return jnp.sum(precision.apply(layer, policy)(params, x) * own)

    each, all_of_them = (
        jax.jit(jax.value_and_grad(partial(run, at_once=way), argnums=(0, 1)))(params, x)
        for way in (False, True)
    )
    assert off(all_of_them, each) < (1e-2 if policy == "bf16_activations" else 1e-6)


def products(jaxpr):
    """Of a program, the operands' dtypes of each product with a kernel."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and not any(eqn.params["dimension_numbers"][1]):
            yield {str(v.aval.dtype) for v in eqn.invars}
        yield from (one for inner in _inner(eqn) for one in products(inner))


def test_a_gpu_multiplies_gradients_of_float32_in_bfloat16_too():
    model, variables, batch = case("llama")
    narrow, machine = precision.apply(model.apply, "bf16_activations"), hardware("h100:1x1")

    def loss(params):
        return jnp.mean(narrow({**variables, "params": params}, batch)[0]["losses"])

    mesh: Any = abstract_mesh("data=1", machine)
    with scope(mesh, rules(), differentiate=True):
        found = list(products(jax.make_jaxpr(jax.grad(loss))(variables["params"]).jaxpr))
    assert len(found) > 10 and all(dtypes == {"bfloat16"} for dtypes in found), found
