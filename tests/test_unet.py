"""U-Net against itself written again with one function a line, on one device and on meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fw.errors import FwError
from fw.models.unet import UNetConfig, unet
from fw.tasks import cross_entropy
from sharding import ShardingError, create, inspect, make_mesh, put, rules, scope, shardings

RULES = rules()
NAMES = {"pixel_values": ("batch", "height", "width", None), "labels": ("batch", "height", "width")}

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def draw(seed, *shape, labels=3, dtype: Any = np.float32):
    """A batch; some pixels are not counted."""
    rng = np.random.default_rng(seed)
    return {
        "pixel_values": rng.normal(size=shape).astype(dtype),
        "labels": rng.integers(-1, labels, shape[:3]).astype(np.int32),
    }


def close(got, expected, tolerance):
    """Every array, up to a share of its largest number."""

    def near(path, one, other):
        largest = float(np.abs(other).max())
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest, err_msg=where)

    jax.tree_util.tree_map_with_path(near, got, expected)


def again(params, x, depth):
    """The logits of training, in batch statistics, with lax's own functions."""

    def conv(x, p):
        y = lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + p.get("bias", jnp.zeros((), y.dtype))

    def block(x, p):
        for i in ("0", "1"):
            x = conv(x, p["convs"][i])
            if "norms" in p:
                mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
                x = (x - mean) / jnp.sqrt(var + jnp.asarray(1e-5, x.dtype))
                x = x * p["norms"][i]["scale"] + p["norms"][i]["bias"]
            x = jnp.maximum(x, jnp.zeros((), x.dtype))
        return x

    def rise(x, p):
        # The gradient of a convolution with stride 2: zeros between pixels, a kernel turned round.
        y = lax.conv_general_dilated(
            x, p["kernel"][::-1, ::-1], (1, 1), [(1, 1), (1, 1)], lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + p["bias"]

    kept = []
    for level in range(depth):
        kept.append(block(x, params["downs"][str(level)]))
        B, H, W, C = kept[-1].shape
        x = jnp.max(kept[-1].reshape(B, H // 2, 2, W // 2, 2, C), (2, 4))
    x = block(x, params["downs"][str(depth)])
    for level in reversed(range(depth)):
        up = rise(x, params["rises"][str(level)])
        x = block(jnp.concatenate([kept[level], up], 3), params["ups"][str(level)])
    return conv(x, params["classifier"])


def gradients(model, key=None):
    """Loss, new running averages, logits, and gradients of the parameters and of the image."""

    def loss(params, pixels, state, labels):
        variables, batch = {"params": params, "state": state}, {"pixel_values": pixels}
        logits, after = model.apply(variables, batch, train=True, key=key)
        total, weight = cross_entropy(logits, {"labels": labels})
        return total / weight, (after["state"], logits)

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    return lambda variables, batch: step(
        variables["params"], batch["pixel_values"], variables["state"], batch["labels"]
    )


def wide(model):
    """New variables in float64."""
    variables = jax.jit(model.init)(jax.random.key(0))
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), variables
    )


def on_mesh(spec, model, variables, batch, layout=RULES, fn=None):
    mesh = make_mesh(spec)
    lie = shardings(model.axes, variables, mesh, layout)
    with scope(mesh, layout, differentiate=True):
        placed = create(lambda: variables, shardings=lie)
        args = placed, put(batch, mesh, layout, NAMES)
        out = (None, (lie["params"], None))
        compiled = jax.jit(fn or gradients(model), out_shardings=out).lower(*args).compile()
    return compiled, compiled(*args)


@pytest.mark.parametrize(("norm", "depth"), [("batch", 2), ("none", 1)])
def test_it_is_what_its_paper_draws(norm, depth):
    model = unet(UNetConfig(3, num_channels=2, width=4, depth=depth, norm=norm))
    variables, batch = jax.jit(model.init)(jax.random.key(0)), draw(0, 2, 16, 8, 2)

    def loss(params):
        logits = again(params, batch["pixel_values"], depth)
        total, weight = cross_entropy(logits, batch)
        return total / weight, logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    (found, (state, own)), (own_grads, _) = jax.jit(gradients(model))(variables, batch)
    close((found, own, own_grads), (value, logits, grads), 1e-4)
    assert (norm == "batch") == bool(jax.tree.leaves(state))


MESHES = {
    "sequence=4": RULES,
    "sequence=2,tensor=2": rules("fsdp", width="tensor"),
    "fsdp=2,sequence=2,tensor=2": RULES,
    "data=2,fsdp=2,tensor=2": RULES,
}


@pytest.fixture(scope="module")
def one_device():
    """A model with dropout, a batch in float64, and what one device makes of it."""
    model = unet(UNetConfig(4, num_channels=2, width=4, depth=1, dropout=0.2))
    variables, batch = wide(model), draw(1, 4, 16, 8, 2, labels=4, dtype=np.float64)
    with jax.enable_x64(True):
        fn = gradients(model, jax.random.key(1))
        return model, variables, batch, fn, jax.jit(fn)(variables, batch)


@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.slow if i % 3 == 0 else ()) for i, s in enumerate(MESHES)],
)
def test_every_mesh_gives_the_numbers_of_one_device(spec, one_device):
    model, variables, batch, fn, expected = one_device
    with jax.enable_x64(True):
        close(on_mesh(spec, model, variables, batch, MESHES[spec], fn)[1], expected, 1e-9)


@pytest.mark.parametrize("size", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_a_large_image_over_eight_devices(size):
    """Loss, logits, running averages, gradients of kernels and of every pixel; and nothing goes by
    but halos and sums. In float64: in float32, one activation in millions is rounded to the other
    side of a rectifier, and the gradients around it are others."""
    model = unet(UNetConfig(2, width=2, depth=2 if size == 256 else 3))
    variables, batch = wide(model), draw(2, 1, size, size, 1, labels=2, dtype=np.float64)
    if size == 2048:  # machine code that was compiled quickly is slow
        jax.config.update("jax_disable_most_optimizations", False)
    with jax.enable_x64(True):
        expected = jax.jit(gradients(model))(variables, batch)
        compiled, got = on_mesh("sequence=8", model, variables, batch)
        close(got, expected, 1e-9)
    report = inspect(compiled)
    assert set(report.by_kind()) == {"collective-permute", "all-reduce"}
    assert set(report.by_axes()) == {"sequence"}
    # A row to either side at the entrance of each 3x3 convolution, there and back. A level has half
    # the columns of the one above.
    entrances = [(level, conv.shape[2]) for level, conv in kernels(variables["params"])]
    rows = sum(size // 2**level * channels * 8 for level, channels in entrances)
    assert report.by_kind()["collective-permute"] == 2 * 2 * rows


def kernels(params):
    """The level and kernel of every 3x3 convolution."""
    for half in ("downs", "ups"):
        for level, block in params[half].items():
            yield from ((int(level), conv["kernel"]) for conv in block["convs"].values())


def test_images_that_do_not_halve_are_refused():
    model = unet(UNetConfig(2, width=2, depth=3))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(FwError, match=r"images of 8 x 12; .* depth 3 .* multiples of 8"):
        jax.eval_shape(model.apply, variables, {"pixel_values": jnp.zeros((1, 8, 12, 1))})
    with scope(make_mesh("sequence=8"), RULES), pytest.raises(ShardingError, match="height"):
        jax.eval_shape(model.apply, variables, {"pixel_values": jnp.zeros((1, 16, 16, 1))})


@pytest.mark.parametrize(("change", "said"), [
    ({"depth": 0}, "depth is 0; expected 1 or more"),
    ({"norm": "layer"}, "norm 'layer' is unknown; choose one of batch, none"),
    ({"dropout": 1.0}, "dropout 1.0 is no rate"),
])  # fmt: skip
def test_configs_that_make_no_unet_are_refused(change, said):
    with pytest.raises(FwError, match=said):
        UNetConfig(2, **change)
