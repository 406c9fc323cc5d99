"""Vision models: transformers' numbers both ways, batch norm as torch has it and on every mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fw import hub
from fw.errors import FwError
from fw.models.resnet import ResNetConfig, resnet
from fw.models.vision import batch_norm
from fw.models.vit import Dinov2Config, ViTConfig, vit
from fw.step import initial_state, make_step
from fw.tasks.task import cross_entropy
from sharding import create, gather, make_mesh, put, rules, scope, shardings
from tests.test_hub import assert_same_tensors

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
ONE, EIGHT = "data=1", "data=2,fsdp=2,tensor=2"


def normal(seed, *shape, dtype: Any = np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# --- the numbers of transformers ------------------------------------------------------------------


@pytest.fixture(params=["vit_image_classification", "resnet_image_classification"])
def golden(request):
    folder = GOLDEN / request.param
    if not folder.is_dir():
        pytest.skip(f"no reference models in {GOLDEN}")
    return folder


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("spec", [ONE, "data=8", "fsdp=8", "data=4,tensor=2", EIGHT])
def test_golden_both_ways(golden, spec, tmp_path):
    mesh = make_mesh(spec)
    loaded = hub.load(golden, mesh=mesh, rules=rules())
    io = np.load(golden / "io.npz")
    # Eight times the rows: the meshes cut the batch in up to eight.
    pixels = np.concatenate([io["in_pixel_values"].transpose(0, 2, 3, 1)] * 8)
    with scope(mesh, rules()):
        batch = put({"pixel_values": pixels}, mesh, rules())
        logits = np.asarray(jax.jit(loaded.model.apply)(loaded.variables, batch)[0])
    expected = np.concatenate([io["out_logits"]] * 8)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-4)
    assert (loaded.fresh, loaded.unused) == ((), ())
    hub.save(tmp_path / "again", loaded)
    assert_same_tensors(tmp_path / "again", golden)
    assert (tmp_path / "again/config.json").read_bytes() == (golden / "config.json").read_bytes()


# --- batch norm -----------------------------------------------------------------------------------


def batch_norm_np(x, scale, bias, epsilon):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def test_batch_norm_far_from_zero_and_its_derivative():
    x = 3000 + normal(0, 4, 5, 6, 3)
    scale, bias = normal(1, 3), normal(2, 3)
    y, mean, var = jax.jit(batch_norm, static_argnums=3)(x, scale, bias, 1e-5)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(y, batch_norm_np(exact, scale, bias, 1e-5), atol=2e-3)
    with jax.enable_x64(True):
        point = tuple(normal(*s, dtype=np.float64) for s in ((0, 3, 4, 5, 2), (1, 2), (2, 2)))
        g = normal(9, 3, 4, 5, 2, dtype=np.float64)
        loss = lambda *at: (batch_norm(*at, 1e-5)[0] * g).sum()  # noqa: E731
        for i, grad in enumerate(jax.grad(loss, (0, 1, 2))(*point)):
            along, step = normal(20 + i, *grad.shape, dtype=np.float64), 1e-6
            ends = [
                (batch_norm_np(*point[:i], point[i] + s * along, *point[i + 1 :], 1e-5) * g).sum()
                for s in (step, -step)
            ]
            np.testing.assert_allclose((grad * along).sum(), (ends[0] - ends[1]) / 2 / step, 1e-7)


SMALL = ResNetConfig(8, (8, 16), (1, 1), num_labels=4, layer_type="basic", stem="small")


def trained(model, spec, batches, accumulate=1, preset="fsdp_tensor"):
    """The variables after some steps, and their losses."""
    mesh, layout, tx = make_mesh(spec), rules(preset), optax.sgd(0.05, momentum=0.9)
    key = jax.random.key(0)
    places = shardings(model.axes, jax.eval_shape(model.init, key), mesh, layout)
    # Made on one device: what is compared are the steps.
    state = initial_state(jax.device_put(model.init(key), places), tx, mesh)
    step = make_step(model, cross_entropy, tx, mesh=mesh, rules=layout, accumulate=accumulate)
    losses = []
    for batch in batches:
        state, figures = step(state, put(batch, mesh, layout))
        losses.append(float(figures["loss"]))
    return gather(state.variables), losses


@pytest.mark.parametrize(
    ("spec", "accumulate"), [("data=8", 1), (EIGHT, 1), (EIGHT, 2), ("data=2,fsdp=4", 4)]
)
def test_batch_norm_sees_the_global_batch(spec, accumulate):
    model = resnet(SMALL)
    random = np.random.default_rng(0)
    batches = [
        {
            "pixel_values": random.normal(1, 2, (16, 8, 8, 3)).astype(np.float32),
            "labels": random.integers(0, 4, 16).astype(np.int32),
        }
        for _ in range(20)
    ]
    one, losses = trained(model, ONE, batches)
    eight, others = trained(model, spec, batches, accumulate)
    np.testing.assert_allclose(others, losses, rtol=1e-6, atol=1e-6)
    worst = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, eight)
    print(spec, accumulate, max(map(float, jax.tree.leaves(worst))))
    assert max(map(float, jax.tree.leaves(worst))) < 1e-6 
    assert int(eight["state"]["stem"]["norm"]["count"]) == 20
