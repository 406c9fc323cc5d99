"""compress.qat: gradients against LSQ's formulas in numpy, and training that hardens exactly."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import compress
from compress import Scheme, apply
from compress.learned import Learned, harden, qat
from compress.recipe import dumps, loads
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def normal(seed, *shape, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def learned(w, scheme, *, seed=None):
    """A learned leaf; with a seed, at scales that clip some of it, away from where it began."""
    leaf = qat({"w": scheme})({"w": w})[0]["w"]
    if seed is None:
        return leaf
    off = np.random.default_rng(seed).uniform(-1.2, 0.2, leaf.log_scale.shape)
    return dataclasses.replace(leaf, log_scale=leaf.log_scale + off.astype(np.float32))


def rounded_np(leaf):
    """ŵ, where it is not clipped, and ∂ŵ/∂s, in numpy float64 by the paper's equations 1 to 3."""
    w, s = (np.asarray(x, np.float64) for x in (leaf.weight, np.exp(leaf.log_scale)))
    for axis, (size, n) in enumerate(zip(s.shape, w.shape, strict=True)):
        s = np.repeat(s, n // size if size > 1 else 1, axis)
    q = {"int8": 127, "int4": 7}[leaf.scheme.format]
    v = w / s
    inside = np.abs(v) < q
    return np.rint(np.clip(v, -q, q)) * s, inside, np.where(inside, np.rint(v) - v, np.sign(v) * q)


def gradient_np(leaf, upward):
    """Of the weights and of log s, from that of ŵ."""
    _, inside, slope = rounded_np(leaf)
    part = leaf.log_scale.shape
    blocks = [k for n, s in zip(slope.shape, part, strict=True) for k in (s, n // s)]
    summed = (upward * slope).reshape(blocks).sum(tuple(range(1, len(blocks), 2)))
    q = {"int8": 127, "int4": 7}[leaf.scheme.format]
    root = np.sqrt(slope.size / summed.size * q)
    return upward * inside, summed / root / np.exp(np.float64(leaf.log_scale))


LEAVES = {  # scheme, shape, function of (w, x), shape of x
    "int4 channel": (Scheme("int4", per="channel"), (32, 6), lambda w, x: x @ w, (5, 32)),
    "int4 group": (Scheme("int4", per=8), (32, 6), lambda w, x: x @ w, (5, 32)),
    "int4 tensor": (Scheme("int4", per="tensor"), (32, 6), lambda w, x: x @ w, (5, 32)),
    "int8 weights": (Scheme("int8", activations="float"), (32, 6), lambda w, x: x @ w, (5, 32)),
    "int8": (Scheme("int8"), (32, 6), lambda w, x: x @ w, (5, 32)),
    "transposed": (Scheme("int8"), (6, 32), lambda w, x: w.T.T @ x.T, (5, 32)),
    "heads": (
        Scheme("int8"),
        (32, 6),
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(32, 2, 3)[:, :, :2]),
        (5, 32),
    ),
    "tied table": (Scheme("int8", role="table"), (6, 32), lambda w, x: x @ w.T, (5, 32)),
    "looked up": (
        Scheme("int4", per=8, role="table"),
        (6, 32),
        lambda w, x: jnp.take(w, jnp.array([0, 3, 3]), axis=0) * x[:3],
        (5, 32),
    ),
    "convolved": (
        Scheme("int8", role="conv2d"),
        (3, 3, 4, 6),
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (2, 8, 8, 4),
    ),
    "experts": (
        Scheme("int4", per=4, role="kernel"),
        (3, 8, 6),
        lambda w, x: jnp.einsum("ebi,eio->ebo", x, w),
        (3, 5, 8),
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_gradients_are_lsqs_and_hardening_keeps_the_function(name):
    scheme, shape, fn, x_shape = LEAVES[name]
    leaf, x = learned(normal(0, *shape), scheme, seed=1), normal(2, *x_shape)
    mask = normal(3, *jax.eval_shape(fn, leaf.weight, x).shape)

    @jax.jit
    def run(leaf, x):
        loss = lambda leaf, x: jnp.vdot(apply(fn)(leaf, x), mask)  # noqa: E731
        return apply(fn)(leaf, x), jax.grad(loss, (0, 1))(leaf, x)

    y, (slope, slope_x) = run(leaf, x)

    # What is met: x itself, or rounded row by row, straight-through; an image by its maximum.
    seen = x
    if scheme.activations == "dynamic":
        axes = tuple(range(1, x.ndim))
        end = np.abs(x).max(axes, keepdims=True)
        seen = np.rint(x * (np.float32(127) / end)) * end / 127
    dense, *_ = rounded_np(leaf)
    dense = dense.astype(np.float32)
    float_loss = lambda w, x: jnp.vdot(fn(w, x), mask)  # noqa: E731
    upward, across = jax.grad(float_loss, (0, 1))(jnp.asarray(dense), jnp.asarray(seen))
    weight, log_scale = gradient_np(leaf, np.asarray(upward, np.float64))
    assert 0.01 < np.mean(weight == 0) < 0.9  # some are clipped, and some are not
    np.testing.assert_allclose(slope.weight, weight, rtol=1e-4, atol=1e-4)
    limit = 1e-4 * np.abs(log_scale).max()
    np.testing.assert_allclose(slope.log_scale, log_scale, rtol=1e-3, atol=limit)
    np.testing.assert_allclose(slope_x, across, rtol=1e-4, atol=1e-4)

    hard = harden()({"w": leaf})[0]["w"]
    q = {"int8": 127, "int4": 7}[scheme.format]
    s = np.broadcast_to(np.float64(hard.scale), hard.scale.shape)
    for axis, (size, n) in enumerate(zip(s.shape, shape, strict=True)):
        s = np.repeat(s, n // size if size > 1 else 1, axis)
    np.testing.assert_array_equal(hard.codes(), np.rint(np.clip(leaf.weight / s, -q, q)))
    np.testing.assert_allclose(hard.dense(), leaf.dense(), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(apply(fn))(hard, x), y, rtol=1e-5, atol=1e-5)


def test_training_begins_where_rounding_to_nearest_is():
    rules = {
        "a": Scheme("int4", per=8),
        "b": Scheme("int4", per="channel", clip="mse"),
        "c": "int8",
    }
    params = {k: normal(i, 64, 16) for i, k in enumerate("abc")}
    params["c"][:, 3] = 0
    soft, report = qat(rules)(params)
    small, nearest = compress.quantize(rules)(params)
    hard, hardened = harden()(soft)
    for name in params:
        np.testing.assert_array_equal(hard[name].codes(), small[name].codes())
        np.testing.assert_allclose(hard[name].dense(), small[name].dense(), rtol=3e-6)
        assert jax.tree.structure(hard[name]) == jax.tree.structure(small[name])
    for r, n, h in zip(report, nearest, hardened, strict=True):
        assert r.applied == f"learned {n.applied}" and h.applied == n.applied
        assert r.error == pytest.approx(n.error, rel=1e-5) and h.error < 1e-6
        assert h.bytes_after == n.bytes_after
    # A dead channel has the largest scale: gradients can move it.
    assert soft["c"].log_scale[0, 3] == soft["c"].log_scale.max()


def layers(params, x):
    def body(x, layer):
        return jnp.tanh(x @ layer["kernel"].astype(x.dtype) + layer["bias"]), None

    return jax.lax.scan(body, x, params)[0]


def loop(params, x):
    for i in range(params["bias"].shape[0]):
        x = jnp.tanh(x @ params["kernel"][i].astype(x.dtype) + params["bias"][i])
    return x


@pytest.mark.parametrize(
    "scheme", [Scheme("int8", role="kernel"), Scheme("int4", 8, role="kernel")]
)
def test_scan_checkpoint_and_vmap_train_alike(scheme):
    stack = {"kernel": normal(0, 3, 16, 16) / 4, "bias": normal(1, 3, 16) / 4}
    scheme = dataclasses.replace(scheme, role="kernel")
    params, x = qat({"kernel": scheme})(stack)[0], normal(2, 8, 16)

    def slope(fn):
        return jax.jit(jax.grad(lambda p: jnp.sum(apply(fn)(p, x) ** 2)))(params)

    want = slope(loop)
    assert isinstance(want["kernel"], Learned)
    for fn in (layers, jax.checkpoint(layers)):
        for a, b in zip(jax.tree.leaves(slope(fn)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    outside = jax.jit(jax.vmap(lambda x: apply(layers)(params, x)))(x[:, None])[:, 0]
    np.testing.assert_allclose(outside, jax.jit(apply(layers))(params, x), atol=1e-5)


def test_bfloat16_leaves_train_in_float32():
    leaf = learned(normal(0, 32, 8, dtype=jnp.bfloat16), "int8")
    assert leaf.dtype == jnp.bfloat16 and leaf.weight.dtype == jnp.float32
    x = jnp.asarray(normal(1, 4, 32), jnp.bfloat16)
    y, back = jax.vjp(lambda w: apply(jnp.matmul)(x, w), leaf)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype.name for a in jax.tree.leaves(back(y))} == {"float32"}
    hard = harden()({"w": leaf})[0]["w"]
    np.testing.assert_array_equal(apply(jnp.matmul)(x, hard), y)


@pytest.mark.parametrize(
    "scheme", ["int8", Scheme("int4", per=8), slow(Scheme("int4", per=8, clip="mse"))]
)
def test_sharding_and_transforming_go_in_either_order(scheme):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w, where = normal(0, 64, 24), NamedSharding(mesh, P("fsdp", "tensor"))
    transform = qat({"w": scheme})
    whole, _ = transform({"w": w})
    parts, _ = transform({"w": jax.device_put(w, where)})
    placed = jax.device_put(whole, compress.specs(whole, {"w": where}))
    assert parts["w"].weight.sharding == where
    for a, b, c in zip(*map(jax.tree.leaves, (parts, placed, whole)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(a, c)
    hard, hard_parts = (harden()(p)[0] for p in (whole, parts))
    for a, b in zip(*map(jax.tree.leaves, (hard, hard_parts)), strict=True):
        np.testing.assert_array_equal(a, b)
    x = normal(1, 8, 64)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(apply(lambda p: x @ p["w"])(p) ** 2)))
    for a, b in zip(*map(jax.tree.leaves, (slope(whole), slope(parts))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def fitted(fn, params, x, y, steps, rate):
    """Trained with Adam on all rows, and the losses on the way."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    loss = lambda p: jnp.mean((apply(fn)(p, x) - y) ** 2)  # noqa: E731

    def step(carry, _):
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params)
        updates, state = tx.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps))
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        (params, _), losses = run(params)
    return params, losses


def test_training_in_int4_recovers_what_rounding_costs():
    teacher = [normal(0, 8, 8) / 1.5, normal(1, 8, 1) / 3]
    x, other = normal(2, 1024, 8), normal(3, 2048, 8)
    truth = lambda x: np.tanh(x @ teacher[0]) @ teacher[1]  # noqa: E731

    def fn(p, x):
        return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]

    start = {
        "a": {"kernel": normal(4, 8, 64) / 3, "bias": np.zeros(64, np.float32)},
        "b": {"kernel": normal(5, 64, 1) / 8},
    }
    floats, _ = fitted(fn, start, x, truth(x).astype(np.float32), 800, 1e-2)
    rules = {"**/kernel": Scheme("int4", per="tensor")}
    nearest, _ = compress.quantize(rules)(floats)
    soft, losses = fitted(fn, qat(rules)(floats)[0], x, truth(x).astype(np.float32), 800, 1e-2)
    hard, _ = harden()(soft)

    def loss(params):
        return float(jnp.mean((jax.jit(apply(fn))(params, other) - truth(other)) ** 2))

    best, worst, found = loss(floats), loss(nearest), loss(hard)
    assert worst > 8 * best
    assert worst - found > 0.9 * (worst - best), (best, worst, found)  # on rows not trained on
    assert losses[-1] < losses[0] / 3
    for leaf in (soft["a"]["kernel"], soft["b"]["kernel"]):
        assert np.all(np.asarray(jnp.exp(leaf.log_scale)) > 0)
    moved = qat(rules)(floats)[0]["a"]["kernel"].log_scale - soft["a"]["kernel"].log_scale
    assert np.abs(moved).max() > 0.05  # scales were learned, too


@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_scales_stay_positive_however_large_the_step(rate):
    params = qat({"w": Scheme("int4", per=4)})({"w": normal(0, 8, 3) * 1e-3})[0]
    x = normal(1, 4, 8)
    soft, _ = fitted(lambda p, x: x @ p["w"], params, x, normal(2, 4, 3), 5, rate)
    scale = harden()(soft)[0]["w"].scale
    assert np.all(np.isfinite(scale)) and np.all(scale > 0)


def test_transforms_are_data():
    for t in (
        qat({"**/head": "keep", "**": Scheme("int4", per=64)}),
        qat(),
        harden(),
        harden({"a": "keep", "**": "harden"}),
    ):
        assert loads(dumps(t)) == t
        assert loads(dumps(compress.chain(t, t))) == compress.chain(t, t)


def test_what_cannot_be_learned_is_refused():
    params = {"a": {"kernel": normal(0, 100, 4)}, "b": {"kernel": normal(1, 64, 4)}}
    cases: Any = (
        (
            lambda: qat({"**": "nf4"}),
            "qat: rule '\\*\\*': nf4: scales are learned of int8 and int4",
        ),
        (
            lambda: qat({"**": Scheme("int8", symmetric=False)}),
            "int8 asymmetric: scales are learned",
        ),
        (lambda: qat({"**": Scheme("int8", activations="static")}), "static activations"),
        (lambda: qat({"**/kernel": "int4"})(params), "a/kernel: qat by rule .* 100 elements"),
        (lambda: qat({"b/*": "int8"})(qat()(params)[0]), "b/kernel: .*it is Learned.float32.64, 4"),
        (lambda: qat({"**/table": "int8"})(params), "matches no path; nearest are .*kernel"),
        (lambda: harden()(params), "can be applied to no leaf: a/kernel: it is not Learned"),
        (lambda: harden({"a/kernel": "harden"})(params), "a/kernel: harden by rule .* not Learned"),
        (lambda: harden({"a/kernel": "int8"}), "'int8': expected 'harden' or 'keep'"),
        (
            lambda: harden()(apply(lambda p: {"w": p["b"]["kernel"].T})(qat()(params)[0])),
            "w: it was transposed or cut",
        ),
        (lambda: qat()({"kernel": np.full((4, 4), np.nan, np.float32)}), "kernel: holds NaN"),
    )
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()
    leaf = qat()(params)[0]["b"]["kernel"]
    with pytest.raises(NotImplementedError, match="no rule for the primitive 'add' on Learned"):
        apply(lambda w: w + 1.0)(leaf)
