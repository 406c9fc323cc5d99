"""The loss over a vocabulary: what full logits give, on any mesh, and no logits anywhere."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fw import precision
from sharding import ShardingError, create, make_mesh, put, rules, scope, word_losses
from sharding import shardings as where

B, L, D, V = 8, 12, 16, 48
AXES = {"table": ("vocab", "embed"), "bias": ("vocab",)}


def case(dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, L, D)).astype(dtype)
    params = {"table": rng.normal(size=(V, D)), "bias": rng.normal(size=V)}
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    targets = rng.integers(-1, V, (B, L)).astype(np.int32)
    best = np.argmax(x @ params["table"].T + params["bias"], -1)
    return x, params, np.where(rng.random((B, L)) < 0.3, best, targets).astype(np.int32)


def reference(x, params, targets):
    """From all logits at once."""
    logits = x @ params["table"].T + params["bias"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None] % V, -1)[..., 0]
    counted = targets >= 0
    losses = jnp.where(counted, losses, jnp.zeros((), x.dtype))
    return losses, counted & (jnp.argmax(logits, -1).astype(np.int32) == targets)


def total(losses_of, chunk=10):
    def fn(x, params, targets):
        if losses_of is reference:
            losses, hits = reference(x, params, targets)
        else:
            losses, hits = word_losses(x, params["table"], targets, params["bias"], chunk=chunk)
        weight = jnp.linspace(0.5, 1.5, L, dtype=x.dtype)  # so that no two losses count alike
        return jnp.sum(losses * weight), (losses, hits)

    return jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("chunk", [1, 10, 512])
def test_it_is_cross_entropy_of_all_logits(chunk):
    with jax.enable_x64():
        arguments = case(np.float64)
        found, expected = total(word_losses, chunk)(*arguments), total(reference)(*arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected
    )
    assert 0.1 < np.mean(found[0][1][1]) < 0.9


MESHES = (
    "data=8", "fsdp=8", "tensor=8", "sequence=4", "data=2,fsdp=2,tensor=2",
    "fsdp=2,sequence=2,tensor=2", "data=2,fsdp=2,expert=2",
)  # fmt: skip


@pytest.mark.parametrize("spec", MESHES)
def test_every_mesh_gives_the_same(spec):
    x, params, targets = case(np.float32, seed=1)
    layout = rules(vocab="tensor" if "tensor" in spec else None)
    expected = total(reference)(x, params, targets)
    found = on_mesh(spec, layout)
    # f32 sums in another order, of up to B * L terms.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )


def on_mesh(spec, layout, text=False) -> Any:
    x, params, targets = case(np.float32, seed=1)
    mesh = make_mesh(spec)
    params = create(lambda: params, shardings=where(AXES, params, mesh, layout))
    batch = put({"x": x, "t": targets}, mesh, layout)
    with scope(mesh, layout, differentiate=True):
        step = jax.jit(total(word_losses))
        lowered = step.lower(batch["x"], params, batch["t"])
        return lowered.compile().as_text() if text else step(batch["x"], params, batch["t"])


def test_no_array_of_the_program_holds_the_logits():
    text = on_mesh("data=2", rules(), text=True)
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert max(sizes) <= max(B * L * D, V * D)  # the logits would be B * L * V / 2


def test_a_table_is_gathered_once_and_its_gradient_scattered_once():
    text = on_mesh("fsdp=8", rules(), text=True)
    gathers = re.findall(r"= f32\[48,16\]\S* all-gather\(", text)
    assert len(gathers) == 1
    assert len(re.findall(r"= f32\[48,2\]\S* reduce-scatter\(", text)) == 1


def test_bfloat16_rounds_the_operands():
    x, params, targets = case(np.float32)
    rounded = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16).astype(np.float32), (x, params["table"])
    )
    expected, _ = reference(rounded[0], {**params, "table": rounded[1]}, targets)
    found = precision.apply(lambda *a: word_losses(*a)[0], "bf16")(
        x, params["table"], targets, params["bias"]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    x, params, targets = case(np.float32)
    with pytest.raises(ShardingError, match=r"got \(8, 12, 16\), \(8, 11\) and \(48, 16\)"):
        word_losses(jnp.array(x), jnp.array(params["table"]), jnp.array(targets[:, 1:]))
