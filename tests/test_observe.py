"""observe: what parameters met, against numpy on whole numbers, where every sum is exact."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import compress
from compress.arrays import Quantized
from compress.histogram import BINS, EDGES, counts, lane_of
from compress.observed import measure, measure_groups
from compress.observing import check, merge, observe, threshold
from compress.transform import named_leaves
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama
from fw.models.resnet import ResNetConfig, resnet

FAST = settings(max_examples=15, deadline=None, derandomize=True)


def whole(seed, *shape) -> Any:
    """Whole numbers of float32: sums of their products are exact in any order."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def histogram_np(x):
    mantissa, exponent = np.frexp(np.abs(x).astype(np.float64))
    place = (exponent - 1 + 40) * 16 + np.floor((2 * mantissa - 1) * 16)
    place = np.where(x == 0, 0, np.clip(place, 0, BINS - 1))
    return np.bincount(place.astype(int).reshape(-1), minlength=BINS)


def seen_np(rows):
    """The definition, of rows [*stack, R, K]."""
    stack = rows.shape[:-2]
    flat = rows.reshape(-1, *rows.shape[-2:])
    return {
        "rows": np.full(stack, rows.shape[-2]),
        "absmax": np.abs(rows).max(-2),
        "abssum": np.abs(rows).sum(-2),
        "histogram": np.stack([histogram_np(r) for r in flat]).reshape(*stack, BINS),
        "nonfinite": np.zeros(stack, int),
        "hessian": np.swapaxes(rows, -1, -2) @ rows,
    }


def equal(seen, want):
    for name, array in want.items():
        got = np.asarray(getattr(seen, name))
        assert got.shape == array.shape, name
        np.testing.assert_array_equal(got, array, err_msg=name)


def seen_in(fn, params, *args, hessians=()):
    """The statistics, and the assurance that the output is fn's."""
    run = jax.jit(lambda *given: (fn(*given), observe(fn, hessians=hessians)(*given)))
    want, (got, stats) = run(params, *args)
    np.testing.assert_array_equal(want, got)
    return stats


def same_bits(fn, params, *args, hessians=()):
    """The same of numbers that are not whole, for which the programs have to be two."""
    want = jax.jit(fn)(params, *args)
    got, stats = jax.jit(observe(fn, hessians=hessians))(params, *args)
    np.testing.assert_array_equal(want, got)
    return stats


# --- products -------------------------------------------------------------------------------------

X = whole(0, 5, 6)


@jax.custom_vjp
def own_backward(x, w):
    return x @ w


own_backward.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def own_tangent(x, w):
    return x @ w


own_tangent.defjvp(lambda p, t: (own_tangent(*p), own_tangent(t[0], p[1])))

ROWS = {  # (leaf's shape, shape of x, function, rows of x [*stack, R, K], contracted axes)
    "dot": ((6, 4), (2, 5, 6), lambda w, x: x @ w, lambda x: x.reshape(10, 6), (-2,)),
    "vector": ((6, 4), (6,), lambda w, x: x @ w, lambda x: x[None], (-2,)),
    "transposed": ((4, 6), (5, 6), lambda w, x: x @ w.T, lambda x: x, (-1,)),
    "leaf first": ((6, 4), (5, 6), lambda w, x: jnp.einsum("io,bi->ob", w, x), lambda x: x, (-2,)),
    "cast": (
        (6, 4),
        (5, 6),
        lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
        lambda x: x,
        (-2,),
    ),
    "heads out of features": (
        (6, 4),
        (5, 6),
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(6, 2, 2)),
        lambda x: x,
        (-2,),
    ),
    "heads into features": (
        (6, 4),
        (5, 3, 2),
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w.reshape(3, 2, 4)),
        lambda x: x.reshape(5, 6),
        (-2,),
    ),
    "two axes, the last first": (
        (2, 3, 4),
        (5, 3, 2),
        lambda w, x: jnp.einsum("bkh,hkd->bd", x, w),
        lambda x: np.swapaxes(x, 1, 2).reshape(5, 6),
        (-3, -2),
    ),
    "split and turned": (
        (6, 4),
        (5, 2, 3),
        lambda w, x: jnp.einsum("bkh,khd->bd", x, w.reshape(3, 2, 4).swapaxes(0, 1)),
        lambda x: np.swapaxes(x, 1, 2).reshape(5, 6),
        (-2,),
    ),
    "parts of a fused kernel": (
        (6, 3, 4),
        (5, 6),
        lambda w, x: (x @ w[:, 0]) * (x @ w[:, 2, 1:3]).sum(),
        lambda x: np.concatenate([x, x]),
        (-3,),
    ),
    "split along the output": (
        (6, 8),
        (5, 6),
        lambda w, x: sum(x @ part for part in jnp.split(w, 2, axis=1)),
        lambda x: np.concatenate([x, x]),
        (-2,),
    ),
    "used twice": (
        (6, 6),
        (5, 6),
        lambda w, x: x @ w @ w,
        lambda x: np.concatenate([x, x @ whole(1, 6, 6)]),
        (-2,),
    ),
    "no derivative, a barrier": (
        (6, 4),
        (5, 6),
        lambda w, x: x @ lax.optimization_barrier((lax.stop_gradient(w), x))[0],
        lambda x: x,
        (-2,),
    ),
    "jit": ((6, 4), (5, 6), jax.jit(lambda w, x: x @ w), lambda x: x, (-2,)),
    "checkpoint": ((6, 4), (5, 6), jax.checkpoint(lambda w, x: x @ w), lambda x: x, (-2,)),
    "custom_vjp": ((6, 4), (5, 6), lambda w, x: own_backward(x, w), lambda x: x, (-2,)),
    "custom_jvp": ((6, 4), (5, 6), lambda w, x: own_tangent(x, w), lambda x: x, (-2,)),
    "vmap over rows": (
        (6, 4),
        (3, 5, 6),
        lambda w, x: jax.vmap(lambda x: x @ w)(x),
        lambda x: x.reshape(15, 6),
        (-2,),
    ),
    "one kernel for all": (
        (6, 4),
        (3, 5, 6),
        lambda w, x: jnp.einsum("nbi,nio->nbo", x, jnp.broadcast_to(w, (3, 6, 4))),
        lambda x: x.reshape(15, 6),
        (-2,),
    ),
    "vmap over a stack": (
        (3, 6, 4),
        (3, 5, 6),
        lambda w, x: jax.vmap(jnp.matmul)(x, w),
        lambda x: x,
        (-2,),
    ),
    "a batch axis after": (
        (6, 3, 4),
        (3, 5, 6),
        lambda w, x: jnp.einsum("nbi,ino->nbo", x, w),
        lambda x: x.reshape(15, 6),
        (-3,),
    ),
    "a stack cut in two": (
        (4, 6, 4),
        (2, 2, 5, 6),
        lambda w, x: jnp.einsum("npbi,npio->npbo", x, w.reshape(2, 2, 6, 4)),
        lambda x: x.reshape(4, 5, 6),
        (-2,),
    ),
    "some of a stack": (
        (4, 6, 4),
        (2, 5, 6),
        lambda w, x: jax.vmap(jnp.matmul)(x, w[1:4:2]),
        lambda x: np.stack([0 * x[0], x[0], 0 * x[0], x[1]]),
        (-2,),
    ),
    "in reverse": (
        (3, 6, 4),
        (3, 5, 6),
        lambda w, x: jax.vmap(jnp.matmul)(x, w[::-1]),
        lambda x: x[::-1],
        (-2,),
    ),
    "picked": (
        (4, 6, 4),
        (4, 5, 6),
        lambda w, x: jax.vmap(jnp.matmul)(
            x, jnp.take(w, jnp.argsort(jnp.arange(4) * -1), 0, mode="clip")
        ),
        lambda x: x[::-1],
        (-2,),
    ),
    "picked one by one": (
        (4, 6, 4),
        (4, 5, 6),
        lambda w, x: jax.vmap(lambda x, i: x @ w[i])(x, jnp.argsort(jnp.arange(4) * -1)),
        lambda x: x[::-1],
        (-2,),
    ),
    "ragged": (
        (3, 6, 4),
        (6, 6),
        lambda w, x: lax.ragged_dot(x, w, jnp.full(3, 2, jnp.int32)),
        lambda x: x.reshape(3, 2, 6),
        (-2,),
    ),
    "platform_dependent": (
        (6, 4),
        (5, 6),
        lambda w, x: lax.platform_dependent(
            w, x, cpu=lambda w, x: x @ w, default=lambda w, x: x @ (w + 1)
        ),
        lambda x: x,
        (-2,),
    ),
    "cond": (
        (2, 6, 6),
        (5, 6),
        lambda w, x: lax.cond(
            x.sum() < np.inf, lambda w, x: (x @ w[0]) @ w[1], lambda w, x: x @ w[1], w, x
        ),
        lambda x: np.stack([x, x @ whole(1, 2, 6, 6)[0]]),
        (-2,),
    ),
}


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", ROWS)
def test_a_product_is_seen_as_the_rows_that_it_contracts(name):
    shape, shape_x, fn, rows, axes = ROWS[name]
    w, x = whole(1, *shape), whole(0, *shape_x)
    seen = seen_in(lambda p, x: fn(p["w"], x), {"w": jnp.asarray(w)}, x, hessians=["w"])["w"]
    assert seen.axes == axes
    assert seen.kind == "dot"
    want = seen_np(np.asarray(rows(x)))
    if name == "some of a stack":  # of what nobody met, there is nothing
        unmet = np.array([0, 2])
        want["rows"][unmet] = 0
        want["histogram"][unmet] = 0
    equal(seen, want)


LAYERS = whole(1, 4, 6, 6)


def step(x, w):
    return x @ w - 3 * x


def chain(x, ws):
    """What each of a chain of layers meets."""
    met = [x]
    for w in ws:
        met.append(met[-1] @ w - 3 * met[-1])
    return np.stack(met[:-1])


LOOPS = {  # all the same function of stacked kernels
    "unrolled": lambda w, x: functools.reduce(step, [w[i] for i in range(4)], x),
    "scan": lambda w, x: lax.scan(lambda x, w: (step(x, w), x.sum()), x, w)[0],
    "scan in reverse": lambda w, x: lax.scan(
        lambda x, w: (step(x, w), None), x, w[::-1], reverse=True
    )[0],
    "checkpointed scan": lambda w, x: lax.scan(
        lambda x, w: (jax.checkpoint(step)(x, w), None), x, w, unroll=2
    )[0],
    "two scans": lambda w, x: functools.reduce(
        lambda x, w: lax.scan(lambda x, w: (step(x, w), None), x, w)[0], [w[:1], w[1:]], x
    ),
    "rounds": lambda w, x: lax.scan(
        lambda x, w: (lax.scan(lambda x, w: (step(x, w), None), x, w)[0], None),
        x,
        w.reshape(2, 2, 6, 6),
    )[0],
    "fori_loop": lambda w, x: lax.fori_loop(0, 4, lambda i, x: step(x, w[i]), x),
    "carried": lambda w, x: lax.scan(
        lambda c, i: ((step(c[0], c[1][i]), c[1]), None), (x, w), jnp.arange(4)
    )[0][0],
}


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", LOOPS)
def test_layers_are_told_apart_in_every_loop(name):
    fn = LOOPS[name]
    stats = seen_in(lambda p, x: fn(p["w"], x), {"w": jnp.asarray(LAYERS)}, X, hessians=["*"])
    equal(stats["w"], seen_np(chain(X, LAYERS)))


@pytest.mark.usefixtures("quickly_compiled")
def test_a_constant_of_a_loop_meets_the_rows_of_all_iterations():
    w, stack = LAYERS[0], LAYERS[1:]

    def fn(p, x):
        return lax.scan(lambda x, w: (step(step(x, p["one"]), w), None), x, p["many"])[0]

    params = {"one": jnp.asarray(w), "many": jnp.asarray(stack)}
    stats = seen_in(fn, params, X, hessians=["one"])
    met = chain(X, np.concatenate([[w, layer] for layer in stack]))
    equal(stats["one"], seen_np(met[::2].reshape(-1, 6)))
    want = seen_np(met[1::2])
    assert stats["many"].hessian is None
    equal(stats["many"], {k: v for k, v in want.items() if k != "hessian"})


@pytest.mark.usefixtures("quickly_compiled")
def test_branches_that_see_different_leaves():
    def fn(p, x):
        return lax.switch(
            (x[0, 0] * 0).astype(jnp.int32) + 1,
            [lambda p, x: x @ p["a"], lambda p, x: x @ p["b"], lambda _, x: x],
            p,
            x,
        )

    stats = seen_in(fn, {"a": jnp.ones((6, 6)), "b": jnp.ones((6, 6))}, X)
    assert (float(stats["a"].rows), float(stats["b"].rows)) == (0, 5)
    np.testing.assert_array_equal(stats["b"].absmax, np.abs(X).max(0))
    np.testing.assert_array_equal(stats["a"].histogram, np.zeros(BINS))


CONVOLUTIONS = {  # (shape of x [B, *spatial, C], of the kernel, options)
    "plain": ((2, 5, 6, 3), (2, 3, 3, 4), {}),
    "strides": ((2, 7, 6, 3), (3, 2, 3, 4), {"window_strides": (2, 3), "padding": "SAME"}),
    "dilated": ((2, 7, 6, 3), (2, 2, 3, 4), {"rhs_dilation": (2, 3), "padding": ((1, 0), (2, 1))}),
    "spread": (
        (1, 3, 3, 2),
        (2, 2, 2, 4),
        {"lhs_dilation": (2, 2), "padding": ((1, 0), (1, 1))},
    ),
    "groups": ((2, 5, 5, 6), (3, 3, 2, 9), {"feature_group_count": 3}),
    "depthwise": ((2, 5, 5, 4), (3, 3, 1, 4), {"feature_group_count": 4}),
    "line": ((2, 9, 3), (3, 3, 4), {"window_strides": (2,)}),
}


def windows_np(x, window, strides, pads, spread, dilation, groups):
    """[windows and groups, *window, channels of a group] by cutting them out one by one."""
    B, *size, C = x.shape
    wide = np.zeros((B, *[(n - 1) * s + 1 for n, s in zip(size, spread, strict=True)], C))
    wide[:, *[slice(None, None, s) for s in spread]] = x
    wide = np.pad(wide, [(0, 0), *pads, (0, 0)])
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    out = [(n - r) // s + 1 for n, r, s in zip(wide.shape[1:-1], reach, strides, strict=True)]
    found = []
    for at in np.ndindex(*out):
        where = [
            slice(i * s, i * s + r, d)
            for i, s, r, d in zip(at, strides, reach, dilation, strict=True)
        ]
        patch = wide[:, *where].reshape(B, *window, groups, C // groups)
        found.append(np.moveaxis(patch, -2, 1).reshape(-1, *window, C // groups))
    return np.concatenate(found)


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    ("name", "stored"),
    [*((name, "HWIO") for name in CONVOLUTIONS), ("strides", "OIHW"), ("groups", "OIHW")],
)
def test_a_convolution_is_seen_as_a_product_with_windows(name, stored):
    shape, kernel, options = CONVOLUTIONS[name]
    rank = len(kernel) - 2
    letters = "HW"[:rank]
    spec = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    options = {"window_strides": (1,) * rank, "padding": "VALID"} | options
    x, w = whole(0, *shape), whole(1, *kernel)
    turn = (rank + 1, rank, *range(rank))  # to [out, in, *spatial], as torch keeps it

    def fn(p, x):
        w = (
            p["w"]
            if stored == "HWIO"
            else jnp.transpose(p["w"], tuple(map(turn.index, range(rank + 2))))
        )
        return lax.conv_general_dilated(x, w, dimension_numbers=spec, **options)

    leaf = w if stored == "HWIO" else w.transpose(turn)
    seen = seen_in(fn, {"w": jnp.asarray(leaf)}, x, hessians=["w"])["w"]
    groups = options.get("feature_group_count", 1)
    spread, dilation = (options.get(k, (1,) * rank) for k in ("lhs_dilation", "rhs_dilation"))
    pads = options["padding"]
    if isinstance(pads, str):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=False)]
        sizes = [(n - 1) * s + 1 for n, s in zip(shape[1:], spread, strict=False)]
        pads = lax.padtype_to_pads(sizes, reach, options["window_strides"], pads)
    rows = windows_np(x, kernel[:rank], options["window_strides"], pads, spread, dilation, groups)
    axes = tuple(range(-rank - 2, -1)) if stored == "HWIO" else tuple(range(-rank - 1, 0))
    assert (seen.kind, seen.axes, float(seen.rows)) == ("conv", axes, len(rows))
    order = (*range(1, rank + 1), rank + 1) if stored == "HWIO" else (rank + 1, *range(1, rank + 1))
    flat = rows.transpose(0, *order).reshape(len(rows), -1)
    np.testing.assert_array_equal(seen.hessian, flat.T @ flat)
    grouped = x.reshape(-1, groups, shape[-1] // groups).reshape(-1, shape[-1] // groups)

    def everywhere(channel):
        wide = np.broadcast_to(channel, (*kernel[:rank], len(channel)))
        return wide.transpose([i - 1 for i in order]).reshape(-1)

    np.testing.assert_array_equal(seen.absmax, everywhere(np.abs(grouped).max(0)))
    mean = everywhere(np.abs(grouped).mean(0))
    np.testing.assert_allclose(seen.abssum / seen.rows, mean, rtol=1e-6)
    np.testing.assert_array_equal(seen.histogram, histogram_np(x))


UNSEEN = {
    "made by arithmetic": lambda w, x: x @ (2 * w),
    "half of the inputs": lambda w, x: x[:, :3] @ w[:3],
    "looked up": lambda w, x: x + w[(x[:, 0] * 0).astype(jnp.int32)],
    "while": lambda w, x: lax.while_loop(lambda x: x.sum() < -1e9, lambda x: x @ w, x),
    "integers": lambda w, x: x + (x.astype(jnp.int8) @ w.astype(jnp.int8)).astype(x.dtype),
    "with itself": lambda w, x: x * (w @ w.T).sum(),
}


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", UNSEEN)
def test_what_meets_no_activations_is_not_in_the_statistics(name):
    fn = UNSEEN[name]
    params = {"w": jnp.asarray(LAYERS[0]), "last": jnp.ones((6, 2))}
    stats = seen_in(lambda p, x: fn(p["w"], x) @ p["last"], params, X)
    assert list(stats) == ["last"]


@pytest.mark.usefixtures("quickly_compiled")
def test_a_tied_table_is_seen_where_it_is_multiplied():
    table = jnp.asarray(whole(2, 7, 6))

    def fn(p, ids):
        return (p["table"][ids] @ p["kernel"]) @ p["table"].T

    ids = jnp.array([0, 3, 3])
    stats = seen_in(fn, {"table": table, "kernel": jnp.asarray(LAYERS[0])}, ids, hessians=["*"])
    rows = np.asarray(table)[np.array([0, 3, 3])]
    equal(stats["kernel"], seen_np(rows))
    equal(stats["table"], seen_np(rows @ LAYERS[0]))


@pytest.mark.usefixtures("quickly_compiled")
def test_floats_in_compressed_leaves_are_seen_under_the_name_of_the_leaf():
    half = jnp.full((6, 1), 0.5)
    w = Quantized(jnp.asarray(LAYERS[0]), input_scale=half, format="float")
    params = {"w": w, "b": jnp.ones((6, 2))}
    fn = compress.apply(lambda p, x: (x @ p["w"]) @ p["b"])
    stats = seen_in(fn, params, X, hessians=["w"])
    assert sorted(stats) == ["b", "w"]
    equal(stats["w"], seen_np(X / 2))  # what met the values, not the leaf


# --- models ---------------------------------------------------------------------------------------


def tokens():
    ids = np.random.default_rng(0).integers(1, 40, (4, 12), np.int32)
    one = np.ones_like(ids)
    return {"input_ids": ids, "segment_ids": one, "position_ids": one * np.arange(12, dtype="i4")}


def made(model):
    """Variables, faster than their own initialisation compiles."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    fill = lambda low, high: lambda a: rng.uniform(low, high, a.shape).astype(a.dtype)  # noqa: E731
    params = jax.tree.map(fill(-0.4, 0.4), shapes["params"])
    return {"params": params, "state": jax.tree.map(fill(0.5, 1.5), shapes["state"])}


def calibrated(model, batch, hessians, params=None):
    variables = made(model)
    fn = lambda p, batch: model.apply({**variables, "params": p}, batch)[0]  # noqa: E731
    return same_bits(fn, params or variables["params"], batch, hessians=hessians)


CONFIG = BertConfig(
    40, 16, 2, 2, 32, num_labels=2, task="masked_lm", initializer_range=0.2,
    max_position_embeddings=48,
)  # fmt: skip


@functools.cache
def of_scanned_layers():
    return calibrated(bert(CONFIG), tokens(), ["**/up/kernel"])


def test_an_optimised_model_gives_the_same_bits():
    stats = of_scanned_layers()
    kernels = {path for path, seen in stats.items() if seen.axes == (-2,)}
    params = made(bert(CONFIG))["params"]
    assert kernels == {path for path, _ in named_leaves(params)[0] if path.endswith("kernel")}
    assert stats.keys() - kernels == {"embeddings/word/embedding"}
    assert [p for p, s in stats.items() if s.hessian is not None] == ["stack/layers/up/kernel"]


@pytest.mark.usefixtures("quickly_compiled")
def test_a_scanned_model_meets_what_an_unrolled_one_does():
    one, params = of_scanned_layers(), made(bert(CONFIG))["params"]
    layers = params["stack"]["layers"]
    split = {str(i): jax.tree.map(lambda a, i=i: a[i], layers) for i in range(2)}
    apart = bert(dataclasses.replace(CONFIG, scan=False, microbatches=2))
    alone = {**params, "stack": {"layers": split}}
    two = calibrated(apart, tokens(), ["**/up/kernel"], alone)
    inside = [path for path in one if "/layers/" in path]
    assert len(inside) == 6
    for path in inside:
        for i in range(2):
            seen, other = one[path], two[path.replace("/layers/", f"/layers/{i}/")]
            np.testing.assert_allclose(seen.absmax[i], other.absmax, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(seen.abssum[i], other.abssum, rtol=1e-4)
            if seen.hessian is not None:
                np.testing.assert_allclose(seen.hessian[i], other.hessian, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("quickly_compiled")
def test_experts_meet_together_what_their_router_does():
    config = LlamaConfig(
        40, 16, 1, 2, 32, num_key_value_heads=2, initializer_range=0.2, model_type="mixtral",
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    stats = calibrated(llama(config), tokens(), ["**/mlp/*"])
    router, up = stats["stack/layers/mlp/router"], stats["stack/layers/mlp/up"]
    assert (up.absmax.shape, stats["stack/layers/mlp/down"].hessian.shape) == (
        (1, 4, 16),
        (1, 4, 32, 32),
    )
    np.testing.assert_array_equal(up.absmax.max(1), router.absmax)
    np.testing.assert_allclose(up.abssum.sum(1), 2 * router.abssum, rtol=1e-5)
    np.testing.assert_allclose(up.hessian.sum(1), 2 * router.hessian, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("quickly_compiled")
def test_images():
    config = ResNetConfig(8, (8,), (1,), num_labels=3, layer_type="basic", stem="small")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    stats = calibrated(resnet(config), {"pixel_values": x}, [])
    kinds = {path: seen.kind for path, seen in stats.items()}
    assert kinds.pop("classifier/kernel") == "dot"
    assert list(kinds.values()) == ["conv"] * 3
    want = np.tile(np.abs(x).max((0, 1, 2)), 9)
    np.testing.assert_array_equal(stats["stem/conv/kernel"].absmax, want)


# --- batches and devices --------------------------------------------------------------------------


@FAST
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_batches_merge_into_what_one_batch_would_be(sizes, seed):
    x = whole(seed, sum(sizes), 6)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    stats = [{"w": seen_jit(part)} for part in parts]
    equal(merge(*stats)["w"], seen_np(x))
    equal(functools.reduce(merge, reversed(stats))["w"], seen_np(x))


seen_jit = jax.jit(functools.partial(measure, channels=1, hessian=True))


@pytest.mark.usefixtures("quickly_compiled")
def test_a_mesh_gives_the_same_statistics_and_sends_no_activations():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 32, 32)).astype(np.float32) / 6
    x = rng.normal(size=(16, 5, 32)).astype(np.float32)
    fn = observe(
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], hessians=["w"]
    )
    alone = jax.jit(fn)({"w": w}, x)
    place = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
    given = ({"w": jax.device_put(w, place())}, jax.device_put(x, place("a")))
    plain = jax.jit(fn).lower(*given).compile()
    text = plain.as_text() or ""
    assert "all-reduce" in text
    assert "all-gather" not in text
    out = jax.tree.map(lambda _: place(), jax.eval_shape(fn, *given))
    seen = dataclasses.replace(out[1]["w"], hessian=place(None, "a", "b"))
    cut = jax.jit(fn, out_shardings=(place("a"), {"w": seen}))(*given)
    assert cut[1]["w"].hessian.sharding.spec == P(None, "a", "b")
    for got in (plain(*given), cut):
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------


def test_hessians_of_leaves_that_meet_nothing_are_refused():
    fn = observe(lambda p, x: x @ p["up"]["kernel"] + p["bias"], hessians=["**/kernal"])
    params = {"up": {"kernel": jnp.ones((6, 2))}, "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"'\*\*/kernal' matches no leaf .* up/kernel"):
        jax.eval_shape(fn, params, X)


def test_a_leaf_that_is_used_in_two_ways_is_refused():
    fn = observe(lambda p, x: (x @ p["w"]) @ p["w"].T)
    with pytest.raises(ValueError, match=r"w: met in a dot over its axes \(-2,\) and .* \(-1,\)"):
        jax.eval_shape(fn, {"w": jnp.ones((6, 4))}, X)


def test_branches_that_use_a_leaf_in_two_ways_are_refused():
    fn = observe(lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["w"].T))
    with pytest.raises(ValueError, match=r"w: met in a dot over its axes \(-1,\) and .* \(-2,\)"):
        jax.eval_shape(fn, {"w": jnp.ones((6, 6))}, X)


def test_marked_leaves_are_seen_under_their_own_names():
    params = {"head": compress.Trained(jnp.ones((6, 2)))}
    fn = compress.apply(lambda p, x: x @ p["head"])
    equal(jax.jit(observe(fn, hessians=["head"]))(params, X)[1]["head"], seen_np(X))


@pytest.mark.parametrize("grouped", [False, True])
def test_histograms_count_on_where_one_float_stops(grouped):
    rows, channels = 4097 * 32, 128  # 2²⁴ + 4096 zeros, of one bin
    shape = (rows * channels, 1)
    if grouped:
        sizes = jnp.array([shape[0]], jnp.int32)
        got = jax.jit(lambda: measure_groups(jnp.zeros(shape), sizes).histogram[0, 0])()
    else:
        got = jax.jit(lambda: counts(jnp.zeros(shape))[0])()
    assert float(got) == rows * channels == 16781312


@pytest.mark.parametrize(("shape", "lanes"), [((7, 3, 1), 32), ((5, 40), 32), ((6,), 5)])
def test_lanes_are_equally_long(shape, lanes):
    want = np.arange(np.prod(shape)).reshape(shape) % lanes
    np.testing.assert_array_equal(lane_of(shape, lanes), want)


def test_broken_values_are_counted_and_named():
    x = X.copy()
    x[1, 2], x[3, 4] = np.nan, np.inf
    seen = seen_jit(x)
    want = seen_np(np.where(np.isfinite(x), x, 0))
    equal(seen, {**want, "nonfinite": np.array(2)})
    with pytest.raises(ValueError, match=r"layers/kernel: 2 of the activations .* NaN or infinite"):
        check({"layers/kernel": seen})


def test_empty_calibration_is_refused():
    measured = jax.jit(functools.partial(measure, channels=1, stack=1))
    seen = measured(X[None])
    check({"w": seen})
    with pytest.raises(ValueError, match="no statistics"):
        check({})
    with pytest.raises(ValueError, match="merge of no statistics"):
        merge()
    nothing = measured(X[None, :0])
    with pytest.raises(ValueError, match="w: met no rows"):
        check({"w": nothing})
    half = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), seen, nothing)
    with pytest.raises(ValueError, match="w: 1 of 2 entries of its stack met no rows"):
        check({"w": half})
    check({"w": half}, allow_empty=True)


def test_statistics_of_different_leaves_do_not_merge():
    a, b = (seen_jit(np.ones((2, k), np.float32)) for k in (5, 6))
    with pytest.raises(ValueError, match="v: observed in some batches and not in others"):
        merge({"w": a}, {"w": a, "v": b})
    for other in (b, dataclasses.replace(a, axes=(-1,)), dataclasses.replace(a, kind="conv")):
        with pytest.raises(ValueError, match="w: observed as a dot over axes"):
            merge({"w": a}, {"w": other})


def test_stacks_that_a_role_gives():
    one = seen_jit(X)
    many = one.over((2, 3))
    np.testing.assert_array_equal(many.hessian, np.tile(one.hessian, (2, 3, 1, 1)))
    assert many.rows.shape == (2, 3)
    assert many.over((1, 2, 3)).absmax.shape == (1, 2, 3, 6)
    with pytest.raises(ValueError, match=r"a stack \[2, 3\], not \[3, 2\]"):
        many.over((3, 2))


# --- histograms and thresholds --------------------------------------------------------------------


def test_bins_are_those_of_the_floats():
    x = np.float32(2.0) ** np.linspace(-45, 30, 4001, dtype=np.float32)
    x = np.concatenate([x, EDGES, np.nextafter(EDGES[1:], np.float32(0)), [0.0]]).astype("f4")
    np.testing.assert_array_equal(counts(jnp.asarray(x)), histogram_np(x))
    assert len(EDGES) == BINS + 1


def _magnitudes():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=40_000)
    spiked = np.append(rng.normal(size=40_000), rng.normal(size=40) * 60)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0) * 7e-3,
        "laplace": rng.laplace(size=40_000) * 1e4,
        "log-normal": np.exp(1.5 * normal),
        "uniform": rng.uniform(size=40_000),
        "outliers": spiked,
    }


NOTHING = {"zeros": np.zeros(9, np.float32), "no rows": np.zeros(0, np.float32)}


RAW = {name: np.abs(x).astype(np.float32) for name, x in _magnitudes().items()}


@functools.cache
def seen_of_all():
    """All distributions as a stack of batches."""
    seen = [seen_jit(x[:, None]) for x in (RAW | NOTHING).values()]
    return jax.tree.map(lambda *a: jnp.stack(a), *seen)


@functools.cache
def found(method):
    ends = jax.jit(lambda seen: threshold(seen, method))(seen_of_all())
    return dict(zip(RAW | NOTHING, np.asarray(ends), strict=True))


@pytest.mark.parametrize("percent", [50, 99.9, 100])
@pytest.mark.parametrize("name", RAW)
def test_percentiles_are_those_of_the_data_to_a_bins_width(name, percent):
    got = found(f"percentile:{percent}")[name]
    want = np.percentile(RAW[name], percent)
    # The tail's neighbours lie further apart than bins: between those, either is a percentile.
    near = np.percentile(RAW[name], [percent - 2e-3, min(percent + 2e-3, 100)])
    assert min(near[0], want * (1 - 1 / 16)) <= got <= max(near[1], want * (1 + 1 / 16)) + 1e-12


def error_np(x, end, levels=127):
    step = end / levels
    return np.mean((x - step * np.clip(np.rint(x / step), 0, levels)) ** 2)


@pytest.mark.parametrize("name", RAW)
def test_no_threshold_has_a_much_smaller_squared_error(name):
    x = RAW[name].astype(np.float64)
    tried = [error_np(x, x.max() * 0.99**i) for i in range(500)]
    assert error_np(x, found("mse")[name]) <= 1.03 * min(tried)
    if name in ("log-normal", "outliers"):  # the tail is worth cutting
        assert error_np(x, found("mse")[name]) < 0.97 * error_np(x, x.max())


def divergence_np(bins, i, levels=128):
    """KL(P ‖ Q) of the first i of bins of equal width."""
    came = bins[:i].astype(np.float64)
    level = np.arange(i) * levels // i
    sums, there = np.bincount(level, came), np.bincount(level, came > 0)
    left = np.where(came > 0, (sums / np.maximum(there, 1))[level], 0)
    came[-1] += bins[i:].sum()
    p, q = came / came.sum(), left / left.sum()
    with np.errstate(divide="ignore"):
        return np.sum(p[p > 0] * (np.log(p[p > 0]) - np.log(q[p > 0])))


@pytest.mark.parametrize("name", RAW)
def test_no_threshold_has_a_much_smaller_divergence(name):
    x = RAW[name]
    bins, edges = np.histogram(x, 2048, (0, x.max()))
    bins[0] = bins[1]
    tried = {float(edges[i]): divergence_np(bins, i) for i in range(128, 2049)}
    got = found("entropy")[name]
    # Where the last of the bins is empty by chance, the data's own divergence is infinite.
    near = min(kl for end, kl in tried.items() if abs(end - got) <= 0.02 * got)
    assert near <= 1.15 * min(tried.values())
    if name in ("log-normal", "outliers"):  # the tail is worth cutting
        assert near < 0.1 * tried[float(edges[-1])]


@pytest.mark.parametrize("method", ["absmax", "percentile:99.9", "mse", "entropy"])
def test_thresholds_of_nothing_and_of_zeros_are_zero(method):
    assert [found(method)[name] for name in NOTHING] == [0, 0]


@pytest.mark.parametrize(
    "method", ["max", "percentile:0", "percentile:x", "percentile:101", "mse:2"]
)
def test_unknown_methods_are_refused(method):
    with pytest.raises(ValueError, match=f"calibration method '{method}'"):
        threshold(seen_jit(X[:2]), method)
