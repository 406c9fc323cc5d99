"""GPTQ, AWQ, SmoothQuant and rotations: against numpy, on real statistics, sharded, refused."""

import functools
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compress import Scheme, apply, chain, quantize
from compress.awq_scales import awq, search, weighed
from compress.calibrated import met, stats_specs, unmet
from compress.formats import NF4
from compress.gptq_solver import factor, gptq, solve
from compress.hadamard import matrix
from compress.histogram import BINS
from compress.observed import Observed, measure
from compress.observing import observe
from compress.prepare import rotate, smooth
from compress.scheme import grid, snapped

FAST = settings(max_examples=12, deadline=None, derandomize=True)
INT4 = {"format": "int4", "per": 16}


@pytest.fixture(autouse=True)
def _quickly(quickly_compiled):
    pass


def problem(seed, inputs=96, outputs=24, rows=400):
    """Correlated inputs with a few large channels, and weights."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(inputs // 6, inputs))
    x = rng.normal(size=(rows, inputs // 6)) @ basis / 4 + 0.3 * rng.normal(size=(rows, inputs))
    x *= np.exp(0.7 * rng.normal(size=inputs))
    return x.astype(np.float32), (0.05 * rng.normal(size=(inputs, outputs))).astype(np.float32)


def seen(x):
    """What `compress.observe` finds of a dense kernel that met x, by numpy."""
    fields: dict[str, Any] = {
        "rows": np.float32(len(x)),
        "absmax": np.abs(x).max(0),
        "abssum": np.abs(x).sum(0),
        "histogram": np.zeros(BINS, np.float32),
        "nonfinite": np.int32(0),
        "hessian": x.T @ x,
    }
    arrays: Any = {k: jnp.asarray(v) for k, v in fields.items()}
    return Observed(**arrays, kind="dot", axes=(-2,))


def nearest(leaf, scheme):
    """The leaf as `quantize` has it."""
    return quantize({"kernel": scheme})({"kernel": leaf})[0]["kernel"]


floats = jax.jit(lambda array: array.dense())
solved = jax.jit(solve, static_argnames=("scheme", "damping", "order"))


def loss(w, new, x):
    """‖x (w − w')‖² in float64."""
    off = np.asarray(floats(new), np.float64) - w
    return float(np.sum((x.astype(np.float64) @ off) ** 2))


# --- GPTQ ----------------------------------------------------------------------------------------


def levels(rows, kind):
    """Scales, zero points and the values of codes of some rows of a group, in numpy float32."""
    if kind == "asymmetric":
        top, low = np.maximum(rows.max(0), 0), np.minimum(rows.min(0), 0)
        scale = (top - low) / np.float32(15)
        return scale, -8 - np.rint(low / scale), np.arange(-8, 8)
    largest, values = {"int4": (7, np.arange(-7, 8)), "nf4": (1, np.array(NF4))}[kind]
    return np.abs(rows).max(0) / np.float32(largest), 0, values


def gptq_np(w, hessian, kind, g, order, damping=0.01):
    """One row at a time, the inverse Hessian of the rows left brought up to date (OBQ), float64."""
    w, K = w.astype(np.float64), len(w)
    h = hessian.astype(np.float64)
    static = [levels(w[i : i + g].astype(np.float32), kind) for i in range(0, K, g)]
    perm = np.argsort(-np.diag(h), kind="stable") if order == "activation" else np.arange(K)
    h = h + damping * np.mean(np.diag(h)) * np.eye(K)
    inverse = np.linalg.inv(h[perm][:, perm])
    rows, out, near, scales = w[perm], np.zeros_like(w), np.zeros(w.shape, bool), []
    for k in range(K):
        if order == "given" and k % g == 0:
            static[k // g] = levels(rows[k : k + g].astype(np.float32), kind)
        scale, zero, values = static[perm[k] // g]
        distance = np.abs(rows[k] / scale + zero - values[:, None])
        two = np.sort(distance, 0)[:2]
        near[perm[k]] = two[1] - two[0] < 3e-4  # a tie that float32 may break the other way
        q = (values[np.argmin(distance, 0)] - zero) * scale
        out[perm[k]] = q
        rows = rows - np.outer(inverse[:, k] / inverse[k, k], rows[k] - q)
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        scales.append(scale)
    return out, near


@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("kind", ["int4", "asymmetric", "nf4"])
def test_gptq_is_the_loop_over_single_rows(kind, order):
    x, w = problem(1, 160)  # two blocks, the second of them not full
    x[:, 3] = 0
    x[:, 3] += 1e-3 * np.arange(len(x))  # hardly seen
    scheme = Scheme("nf4" if kind == "nf4" else "int4", per=32, symmetric=kind != "asymmetric")
    new, (record,) = gptq({"kernel": scheme}, order=order)(
        {"kernel": jnp.asarray(w)}, {"kernel": seen(x)}
    )
    want, near = gptq_np(w, x.T @ x, kind, 32, order)
    got = np.asarray(floats(new["kernel"]))
    # What follows a tie in its column may differ, too.
    clear = ~near.any(0)
    assert clear.sum() >= 6 and record.applied == f"{scheme} by GPTQ"
    same = np.isclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(w).max())
    assert same[:, clear].mean() > 0.995
    assert same.mean() > 0.9


@pytest.mark.parametrize(
    ("scheme", "order"),
    [
        (Scheme("int4", per=32), "activation"),
        (Scheme("int4", per=32), "given"),
        (Scheme("int4", per=32, symmetric=False, clip="mse"), "given"),
        (Scheme("int4", per="channel"), "activation"),
        (Scheme("int8", per="tensor"), "given"),
        (Scheme("nf4", per=32), "activation"),
        (Scheme("mxfp4"), "given"),
        (Scheme("nvfp4"), "given"),
        (Scheme("e4m3"), "activation"),
    ],
    ids=str,
)
def test_gptq_loses_less_than_rounding(scheme, order):
    x, w = problem(2)
    params, stats = {"kernel": jnp.asarray(w)}, {"kernel": seen(x)}
    plain = nearest(params["kernel"], scheme)
    new = gptq({"kernel": scheme}, order=order)(params, stats)[0]["kernel"]
    assert loss(w, new, x) < 0.6 * loss(w, plain, x)
    for (name, a), (_, b) in zip(new.parts(), plain.parts(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    if order == "activation":  # scales are those of the array as it was
        np.testing.assert_array_equal(np.asarray(new.scale), np.asarray(plain.scale))


def test_inputs_that_were_not_seen_are_rounded_to_nearest():
    x, w = problem(3)
    x[:, 16:32] = 0
    scheme = Scheme("int4", per=16)
    plain = nearest(jnp.asarray(w), scheme).codes()
    codes, _ = solved(
        jnp.asarray(w), jnp.asarray(x.T @ x), scheme, damping=0.01, order="activation"
    )
    np.testing.assert_array_equal(codes[16:32], plain[16:32])
    assert (codes[:16] != plain[:16]).any()
    nothing = jnp.zeros((96, 96))  # an expert that no token chose
    for order in ("activation", "given"):
        codes, _ = solved(jnp.asarray(w), nothing, scheme, damping=0.01, order=order)
        np.testing.assert_array_equal(codes, plain)


def test_damping_is_raised_until_the_hessian_can_be_factored():
    h = np.ones((32, 32), np.float32)  # of rank 1: no damping that float32 loses is enough
    u, finite = jax.jit(factor)(jnp.asarray(h), jnp.float32(1e-12))
    assert finite
    inverse = np.asarray(u.T @ u, np.float64)
    d = 1 / np.linalg.eigvalsh(inverse).max()
    assert 1e-12 < d <= 1e-6
    h[0, 0] = np.nan
    assert not jax.jit(factor)(jnp.asarray(h), jnp.float32(0.01))[1]


def test_stacks_and_convolutions_are_their_matrices():
    x, w = problem(4, 72)
    other = np.roll(x, 7, 1)
    scheme = Scheme("int4", per=8)
    alone = [
        gptq({"kernel": scheme})({"kernel": jnp.asarray(w)}, {"kernel": seen(a)})[0]["kernel"]
        for a in (x, other)
    ]
    both = jax.tree.map(lambda *a: jnp.stack(a), seen(x), seen(other))
    stacked, _ = gptq({"**/kernel": scheme})(
        {"layers": {"kernel": jnp.stack([w, w])}}, {"layers/kernel": both}
    )
    for i in range(2):
        for (name, a), (_, b) in zip(
            stacked["layers"]["kernel"].parts(), alone[i].parts(), strict=True
        ):
            np.testing.assert_array_equal(a[i], b, err_msg=name)

    windows = replace(seen(x), kind="conv", axes=(-4, -3, -2))
    conv, _ = gptq({"kernel": scheme})(
        {"kernel": jnp.asarray(w.reshape(3, 3, 8, 24))}, {"kernel": windows}
    )
    assert conv["kernel"].scale.shape == (3, 3, 1, 24)
    np.testing.assert_array_equal(floats(conv["kernel"]).reshape(72, 24), floats(alone[0]))


def test_gptq_of_prepared_leaves_weighs_what_meets_them():
    x, w = problem(5)
    params, stats = {"kernel": jnp.asarray(w)}, {"kernel": seen(x)}
    ready, _ = chain(smooth({"kernel": 0.5}), rotate({"kernel": 16}))(params, stats)
    kernel = ready["kernel"]
    into = x * np.asarray(kernel.input_scale)[:, 0]
    into = (into.reshape(-1, 6, 16) @ matrix(16)).reshape(x.shape)
    np.testing.assert_allclose(
        np.asarray(met(kernel, stats["kernel"], "kernel").hessian),
        into.T @ into,
        rtol=1e-4,
        atol=1e-2,
    )
    scheme = Scheme("int4", per=16)
    want, _ = solved(kernel.values, jnp.asarray(into.T @ into), scheme, damping=0.01,
                    order="activation")  # fmt: skip
    new = gptq({"kernel": scheme})(ready, stats)[0]["kernel"]
    assert (np.asarray(new.codes()) == np.asarray(want)).mean() > 0.97
    assert loss(w, new, x) < 0.6 * loss(w, nearest(kernel, scheme), x)


# --- AWQ -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=3)
def _awq_losses(w, mean, metric, scheme):
    s = search(w, mean, metric, scheme, 10)[:, None]
    plain = snapped(w, grid(w, scheme, "kernel"), scheme) - w
    best = snapped(w * s, grid(w * s, scheme, "kernel"), scheme) / s - w
    return weighed(plain, metric), weighed(best, metric), s


@FAST
@given(st.integers(0, 999), st.booleans())
def test_awq_is_never_worse_than_rounding_in_what_it_weighs(seed, diagonal):
    x, w = problem(seed, 64, 16, rows=100)
    x[:, seed % 64] = 0
    mean = np.abs(x).mean(0)
    metric = np.diag(mean**2) if diagonal else x.T @ x
    plain, best, s = _awq_losses(w, mean, metric, Scheme("int4", per=16))
    assert best <= plain * 1.00001
    assert s[seed % 64] == 1 and np.isfinite(s).all()


def test_awq_is_the_best_of_its_exponents():
    x, w = problem(6)
    params = {"kernel": jnp.asarray(w)}
    for stats in (seen(x), replace(seen(x), hessian=None)):
        new = awq({"kernel": INT4}, steps=8)(params, {"kernel": stats})[0]["kernel"]
        mean = np.abs(x).mean(0, dtype=np.float64)
        h = x.T.astype(np.float64) @ x if stats.hessian is not None else np.diag(mean**2)
        losses, all_s = [], []
        for i in range(8):
            s = np.maximum(mean ** (i / 8), 1e-4)
            s = (s / np.sqrt(s.max() * s.min()))[:, None]
            blocks = (s * w).reshape(6, 16, 24)
            scale = np.abs(blocks).max(1, keepdims=True) / 7
            off = (np.rint(blocks / scale) * scale).reshape(w.shape) / s - w
            losses.append(np.sum(off * (h @ off)))
            all_s.append(s)
        best = int(np.argmin(losses))
        assert best > 0
        np.testing.assert_allclose(new.input_scale, 1 / all_s[best], rtol=1e-4)
        off = np.asarray(floats(new), np.float64) - w
        assert np.isclose(np.sum(off * (h @ off)), losses[best], rtol=1e-2)
        assert losses[best] < 0.9 * losses[0]


def test_awq_of_a_convolution_scales_channels():
    x, w = problem(7, 72)
    x *= np.tile(np.exp(np.linspace(-2, 2, 8)), 9).astype(np.float32)
    windows = replace(seen(x), kind="conv", axes=(-4, -3, -2))
    params = {"kernel": jnp.asarray(w.reshape(3, 3, 8, 24))}
    scheme = Scheme("int4", per="channel")
    new = awq({"kernel": scheme})(params, {"kernel": windows})[0]["kernel"]
    assert new.input_scale.shape == (1, 1, 8, 1) and np.ptp(new.input_scale) > 0.1
    off = [np.asarray(floats(a)).reshape(w.shape) - w
           for a in (new, nearest(params["kernel"], scheme))]  # fmt: skip
    assert np.sum((x @ off[0]) ** 2) < np.sum((x @ off[1]) ** 2)


# --- smooth and rotate ---------------------------------------------------------------------------


def dense_model(p, x):
    return jnp.tanh(x @ p["first"]["kernel"]) @ p["second"]["kernel"]


def scanned_model(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"]["kernel"])[0]


def conv_model(p, x):
    where = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, p["stem"]["kernel"], (2, 2), "SAME",
                                        dimension_numbers=where)  # fmt: skip


def case(kind):
    rng = np.random.default_rng(8)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])), jnp.float32)

    if kind == "dense":
        params = {"first": {"kernel": normal(32, 24) / 9}, "second": {"kernel": normal(24, 8)}}
        return dense_model, params, normal(64, 32)
    if kind == "scanned":
        return scanned_model, {"layers": {"kernel": normal(3, 32, 32) / 9}}, normal(64, 32)
    return conv_model, {"stem": {"kernel": normal(3, 3, 8, 6)}}, normal(4, 9, 9, 8)


@functools.cache
def observed_case(kind):
    model, params, x = case(kind)
    y, stats = jax.jit(observe(model, hessians=["**/kernel"]))(params, x)
    return model, params, x, y, stats


PREPARED = {
    "smooth": smooth({"**/kernel": 0.7}),
    "rotate": rotate({"**/kernel": "auto"}),
    "smooth, rotate": chain(smooth({"**/kernel": 0.5}), rotate({"**/kernel": 4})),
    "smooth twice": chain(smooth({"**/kernel": 0.5}), smooth({"**/kernel": 0.5})),
}


@pytest.mark.parametrize("kind", ["dense", "scanned", "conv"])
@pytest.mark.parametrize("name", PREPARED)
def test_preparation_preserves_the_function(name, kind):
    model, params, x, y, stats = observed_case(kind)
    ready, report = PREPARED[name](params, stats)
    for new in jax.tree.leaves(ready, is_leaf=lambda leaf: hasattr(leaf, "dense")):
        assert new.format == "float"
        assert (new.hadamard is not None) == ("rotate" in name)
        assert (new.input_scale is not None) == ("smooth" in name)
    assert all(record.error < 1e-6 for record in report)
    got = jax.jit(apply(model))(ready, x)
    np.testing.assert_allclose(got, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("kind", ["scanned", "conv"])
@pytest.mark.parametrize("make", [gptq, awq])
def test_methods_on_observed_functions(make, kind):
    model, params, x, y, stats = observed_case(kind)
    scheme = {"format": "int4", "per": "channel"}
    errors = []
    for transform in (quantize({"**/kernel": scheme}), make({"**/kernel": scheme})):
        small, _ = transform(params, stats)
        errors.append(np.linalg.norm(jax.jit(apply(model))(small, x) - y))
    assert errors[1] < errors[0]


def test_smooth_is_its_formula():
    x, w = problem(9)
    x[:, 5] = 0
    new = smooth({"kernel": 0.7})({"kernel": jnp.asarray(w)}, {"kernel": seen(x)})[0]["kernel"]
    top = np.abs(x).max(0)
    s = np.where(top, top, 1) ** 0.7 / np.abs(w).max(1) ** 0.3
    s[5] = np.exp(np.log(np.delete(s, 5)).mean())  # not seen: the others' mean
    np.testing.assert_allclose(new.input_scale[:, 0], 1 / s, rtol=1e-5)
    np.testing.assert_allclose(new.values, w * s[:, None], rtol=1e-5)
    half, _ = smooth({"kernel": 0.7})({"kernel": jnp.asarray(w, jnp.bfloat16)}, {"kernel": seen(x)})
    assert half["kernel"].values.dtype == half["kernel"].dtype == jnp.bfloat16


def test_outliers_cost_less_after_preparation():
    x, w = problem(10)
    x[:, 7] *= 30
    params, stats = {"kernel": jnp.asarray(w)}, {"kernel": seen(x)}
    y = x @ w

    def error(*before, activations):
        t = chain(*before, quantize({"kernel": {"format": "int8", "activations": activations}}))
        small, _ = t(params, stats)
        return np.linalg.norm(jax.jit(apply(lambda p, x: x @ p["kernel"]))(small, x) - y)

    plain = error(activations="dynamic")
    assert error(smooth({"kernel": 0.5}), activations="dynamic") < 0.5 * plain
    assert error(rotate({"kernel": 32}), activations="dynamic") < 0.5 * plain
    static = error(activations="static")
    assert error(smooth({"kernel": 0.5}), activations="static") < 0.5 * static


def test_static_scales_are_of_the_inputs_as_they_arrive():
    x, w = problem(11)
    params, stats = {"kernel": jnp.asarray(w)}, {"kernel": seen(x)}
    scheme = {"format": "int8", "activations": "static"}
    for transform in (
        chain(smooth({"kernel": 0.5}), quantize({"kernel": scheme})),
        chain(smooth({"kernel": 0.5}), gptq({"kernel": scheme})),
        awq({"kernel": scheme}),
    ):
        new = transform(params, stats)[0]["kernel"]
        into = np.abs(x * np.asarray(new.input_scale)[:, 0]).max()
        np.testing.assert_allclose(new.act_scale, [[into / 127]], rtol=1e-5)


# --- meshes, recipes, jit ------------------------------------------------------------------------

ALL = {
    "smooth": smooth({"**/kernel": 0.5}),
    "rotate": rotate({"**/kernel": {"block": 8, "role": "kernel"}}),
    "gptq": gptq({"**/kernel": INT4}, damping=0.02),
    "gptq given": gptq({"**/kernel": INT4}, order="given"),
    "awq": awq({"**/kernel": INT4}, steps=6),
    "smooth, rotate, gptq": chain(
        smooth({"**/kernel": {"alpha": 0.6}}), rotate({"**/kernel": 16}), gptq({"**/kernel": INT4})
    ),
}


@pytest.mark.parametrize("name", ["gptq given", "awq", "smooth, rotate, gptq"])
def test_sharded_leaves_and_statistics_give_the_same_bits(name):
    x, w = problem(12, 64, 16)
    params, stats = {"dense": {"kernel": jnp.asarray(w)}}, {"dense/kernel": seen(x)}
    want, _ = ALL[name](params, stats)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    where = {"dense": {"kernel": NamedSharding(mesh, P("x", "y"))}}
    placed = jax.device_put(stats, stats_specs(stats, where))
    assert placed["dense/kernel"].hessian.sharding.spec == P("x", None)
    got, _ = ALL[name](jax.device_put(params, where), placed)
    assert got["dense"]["kernel"].values.sharding.spec == P("x", "y")
    for (part, a), (_, b) in zip(
        got["dense"]["kernel"].parts(), want["dense"]["kernel"].parts(), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=part)


def test_transforms_are_data():
    for t in (smooth(0.6), rotate(), gptq(), awq(), *ALL.values()):
        for one in getattr(t, "transforms", (t,)):
            fields = json.loads(json.dumps(one.data()))
            assert fields.pop("transform") == one.name
            assert type(one).of_data(fields) == one


def test_transforms_run_under_jit():
    t = ALL["smooth, rotate, gptq"]
    x, w = problem(13, 64, 16)
    params, stats = {"dense": {"kernel": jnp.asarray(w)}}, {"dense/kernel": seen(x)}
    new, report = jax.jit(t)(params, stats)
    want, wanted = t(params, stats)
    assert np.isclose(float(report[0].error), wanted[0].error, rtol=1e-2, atol=1e-6)
    a, b = (np.asarray(floats(v["dense"]["kernel"])) for v in (new, want))
    assert np.isclose(a, b, rtol=1e-4, atol=1e-5).mean() > 0.97


def test_specs_of_statistics_follow_their_leaves():
    def shapes(x, **how):
        return jax.eval_shape(functools.partial(measure, hessian=True, **how), x)

    stats = {
        "layers/kernel": shapes(jnp.ones((2, 5, 4)), channels=1, stack=1),
        "stem": shapes(jnp.ones((5, 3, 3, 4)), channels=3),
        "plain": seen(np.ones((5, 4), np.float32)),
    }
    specs = {
        "layers": {"kernel": P("pipe", ("x", "y"), None)},
        "stem": P(None, None, "x"),
        "plain": P(),
    }
    got = stats_specs(stats, specs)
    assert got["layers/kernel"].hessian == P("pipe", ("x", "y"), None)
    assert got["layers/kernel"].rows == P("pipe")
    assert got["stem"].hessian == P("x", None) and got["stem"].absmax == P("x")
    assert got["plain"].hessian == P(None, None)
    with pytest.raises(ValueError, match="stem: expected its PartitionSpec"):
        stats_specs(stats, {**specs, "stem": None})


# --- what is refused -----------------------------------------------------------------------------

X, W = problem(14, 32, 8)
PARAMS, STATS = {"dense": {"kernel": jnp.asarray(W)}}, {"dense/kernel": seen(X)}
SMALL = {"format": "int4", "per": 16}


def but(**changes):
    return {"dense/kernel": replace(STATS["dense/kernel"], **changes)}


@pytest.mark.parametrize(
    ("make", "option"), [(smooth, 0.5), (gptq, SMALL), (awq, SMALL)], ids=["smooth", "gptq", "awq"]
)
def test_bad_statistics_name_the_leaf(make, option):
    t = make({"**/kernel": option})
    bad = np.asarray(STATS["dense/kernel"].hessian).copy()
    bad[3, 3] = np.nan
    broken = but(hessian=jnp.asarray(bad), absmax=jnp.full(32, np.nan))
    with pytest.raises(ValueError, match="dense/kernel: its calibration statistics hold NaN"):
        t(PARAMS, broken)
    for nothing in (None, {}):
        with pytest.raises(ValueError, match=r"dense/kernel: \w+ needs statistics"):
            t(PARAMS, nothing)
    with pytest.raises(ValueError, match=r"dense/kernel: .* saw no product with it"):
        t(PARAMS, {"other": STATS["dense/kernel"]})
    with pytest.raises(ValueError, match=r"dense/kernel: .* met no rows"):
        t(PARAMS, but(rows=jnp.float32(0)))
    with pytest.raises(ValueError, match=r"dense/kernel: .* of 16 channels"):
        t(PARAMS, {"dense/kernel": seen(X[:, :16])})
    with pytest.raises(ValueError, match=r"dense/kernel: .* over its axes"):
        t(PARAMS, but(axes=(-1,)))
    with pytest.raises(ValueError, match=r"dense/kernel: .* of a stack"):
        t(
            PARAMS,
            {"dense/kernel": jax.tree.map(lambda a: jnp.stack([a] * 3), STATS["dense/kernel"])},
        )
    with pytest.raises(ValueError, match=r"norm/kernel: .* 2 axes or more"):
        t({"norm": {"kernel": jnp.ones(32)}}, {"norm/kernel": STATS["dense/kernel"]})
    with pytest.raises(ValueError, match=r"words/embedding: .* looked up"):
        make({"**": option})({"words": {"embedding": jnp.ones((32, 16))}}, {})


def stacked_case():
    """Two kernels, of which the second met zeros only."""
    x, w = problem(15, 32, 8)
    met_rows = jnp.stack([jnp.asarray(x), jnp.zeros_like(x)])
    params = {"experts": {"kernel": jnp.stack([jnp.asarray(w)] * 2)}}
    return params, {"experts/kernel": measure(met_rows, channels=1, stack=1, hessian=True)}


@pytest.mark.parametrize(
    ("make", "calibration"),
    [(quantize, "percentile:99"), (quantize, "mse"), (gptq, "absmax"), (awq, "absmax")],
)
def test_a_static_scale_of_nothing_is_refused(make, calibration):
    params, stats = stacked_case()
    option = {"format": "int8", "role": "kernel", "calibration": calibration}
    t = make({"**/kernel": {**option, "activations": "static"}})
    with pytest.raises(
        ValueError, match=r"experts/kernel: .*1 of 2 arrays of its stack met no rows"
    ):
        t(params, stats)
    make({"**/kernel": option})(params, stats)  # of dynamic ones nothing must be known
    # Of traced statistics nobody can tell: scales are positive.
    scale = jax.jit(lambda s: t(params, s)[0]["experts"]["kernel"].act_scale)(stats)
    assert np.all(np.asarray(scale) > 0)


def test_a_percentile_of_zeros_is_refused():
    x = jnp.zeros((100, 4)).at[0].set(1.0)
    t = quantize({"*": Scheme(activations="static", calibration="percentile:90", role="kernel")})
    with pytest.raises(ValueError, match=r"kernel: .*1 of 1 arrays"):
        t({"kernel": jnp.ones((4, 2))}, {"kernel": measure(x, channels=1)})


def test_static_activations_need_statistics_of_the_leaf():
    t = quantize({"**/kernel": Scheme(activations="static")})
    with pytest.raises(ValueError, match=r"dense/kernel: quantize: .*of 16 channels"):
        t(PARAMS, {"dense/kernel": seen(X[:, :16])})
    with pytest.raises(ValueError, match="dense/kernel: quantize: it met no rows"):
        t(PARAMS, but(rows=jnp.float32(0)))


def test_statistics_of_a_prepared_leaf_are_of_that_preparation():
    def model(p, x):
        return x @ p["dense"]["kernel"]

    def stats_of(params):
        return observe(apply(model), hessians=["**"])(params, jnp.asarray(X))[1]

    rules: Any = {"**/kernel": {"format": "int8", "activations": "static"}}
    scaled, _ = smooth({"**/kernel": 0.5})(PARAMS, STATS)
    turned, _ = rotate({"**/kernel": 16})(scaled)
    of_scaled, of_turned = stats_of(scaled), stats_of(turned)
    assert of_scaled["dense/kernel"].prepared == "scaled"
    assert of_turned["dense/kernel"].prepared == "scaled, rotated by 16 along axis -2"
    assert stats_of(PARAMS)["dense/kernel"].prepared == ""
    # As it was prepared, its scale is the same by either statistics.
    a, b = (quantize(rules)(scaled, s)[0]["dense"]["kernel"] for s in (STATS, of_scaled))
    np.testing.assert_allclose(a.act_scale, b.act_scale, rtol=1e-6)
    gptq({"**/kernel": SMALL})(turned, of_turned)
    other, _ = rotate({"**/kernel": 8})(scaled)
    for params in (turned, PARAMS):
        with pytest.raises(
            ValueError, match=r"dense/kernel: .*of a leaf that was scaled, and it is"
        ):
            gptq({"**/kernel": SMALL})(params, of_scaled)
    with pytest.raises(ValueError, match=r"dense/kernel: .*and it is scaled, rotated by 8"):
        gptq({"**/kernel": SMALL})(other, of_turned)
    for t in (smooth({"**/kernel": 0.5}), awq({"**/kernel": SMALL})):
        with pytest.raises(
            ValueError, match=r"dense/kernel: .*of what meets a leaf that is scaled"
        ):
            t(scaled, of_scaled)


def test_a_hessian_that_cannot_be_factored_is_told_from_broken_statistics():
    # Finite, but indefinite by far more than damping ever adds.
    bad = jnp.diag(jnp.full(32, 1.0)).at[0, 1].set(1e9).at[1, 0].set(1e9)
    with pytest.raises(ValueError, match="dense/kernel: its Hessian could not be factored"):
        gptq({"**/kernel": SMALL})(PARAMS, but(hessian=bad))


def test_what_cannot_follow_what_is_refused():
    turned, _ = rotate({"**/kernel": 16})(PARAMS)
    with pytest.raises(ValueError, match=r"dense/kernel: .*put smooth before rotate"):
        smooth({"**/kernel": 0.5})(turned, STATS)
    with pytest.raises(ValueError, match=r"dense/kernel: .*put awq before rotate"):
        awq({"**/kernel": SMALL})(turned, STATS)
    with pytest.raises(ValueError, match=r"dense/kernel: .*rotated already"):
        rotate({"**/kernel": 16})(turned)
    static = {"format": "int8", "activations": "static"}
    for make in (quantize, gptq):
        with pytest.raises(ValueError, match=r"dense/kernel: .*it is rotated, and statistics"):
            make({"**/kernel": static})(turned, STATS)
    by_part = {**static, "calibration": "percentile:99"}
    with pytest.raises(ValueError, match=r"dense/kernel: .*scaled by channel"):
        chain(smooth({"**/kernel": 0.5}), quantize({"**/kernel": by_part}))(PARAMS, STATS)
    with pytest.raises(ValueError, match=r"dense/kernel: .*scaled by channel"):
        awq({"**/kernel": by_part})(PARAMS, STATS)
    small, _ = quantize({"**/kernel": SMALL})(PARAMS)
    for t in (smooth({"**/kernel": 0.5}), rotate({"**/kernel": 4}), gptq({"**/kernel": SMALL})):
        with pytest.raises(ValueError, match=r"dense/kernel: .*compressed already"):
            t(small, STATS)
    with pytest.raises(ValueError, match=r"dense/kernel: .*no Hessian"):
        gptq({"**/kernel": SMALL})(PARAMS, but(hessian=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: smooth({"a": 1.5}), "rule 'a': alpha=1.5"),
        (lambda: smooth({"a": {"beta": 1}}), "unknown field 'beta'"),
        (lambda: rotate({"a": 12}), "rule 'a': block=12"),
        (lambda: rotate({"a": {"block": 4, "role": "x"}}), "role='x'"),
        (lambda: gptq({"a": "int4"}, damping=0), "damping=0"),
        (lambda: gptq({"a": "int4"}, order="best"), "order='best'"),
        (lambda: awq({"a": "int5"}), "format 'int5'"),
        (lambda: awq({"a": "int4"}, steps=0), "steps=0"),
        (
            lambda: quantize({"a": {"calibration": "percentil:9"}}),
            "method 'percentil:9' is unknown",
        ),
        (lambda: Scheme(calibration="percentile:0"), "above 0 and up to 100"),
        (lambda: Scheme("e4m3", activations="static", calibration="mse"), "rounds .* to e4m3"),
        (lambda: Scheme("e4m3", activations="static", calibration="entropy"), "rounds .* to e4m3"),
        (lambda: rotate({"*/*": 64})(PARAMS), "dense/kernel: .*blocks of 64 do not divide; .*32"),
        (lambda: rotate({"*": "auto"})({"kernel": jnp.ones((7, 2))}), "kernel: .*7 elements"),
    ],
)
def test_options_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_option_is_for_the_usual_leaves():
    params = {**PARAMS, "norm": {"kernel": jnp.ones(32)}}
    for t in (smooth(0.5), rotate(), gptq(Scheme("int4", per=16)), awq(Scheme("int4", per=16))):
        _, report = t(params, STATS)
        assert [r.applied.startswith("kept") for r in report] == [False, True]
    assert unmet(PARAMS["dense"]["kernel"], "kernel", STATS["dense/kernel"]) == ""
