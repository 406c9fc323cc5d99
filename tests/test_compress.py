"""compress: int8 trees against exact numpy references, under every JAX transformation, sharded."""

import doctest
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import compress
from compress import Scheme
from sharding import make_mesh

README = Path(__file__).parents[1] / "compress" / "README.md"
FAST = settings(max_examples=15, deadline=None, derandomize=True)
LIMIT = np.float32(127)


def quantize_np(x, axis):
    """The definition, in numpy float32: values and scales (axis kept)."""
    absmax = np.abs(x.astype(np.float32)).max(axis, keepdims=True)
    q = np.rint(x * (LIMIT / np.where(absmax == 0, 1, absmax))).astype(np.int64)
    return q, absmax * (np.float32(1) / LIMIT)


def dense_np(x, w):
    """x [M, K] @ w [K, N]: the int8 product with exact integers, and the bound on its error.

    |Σ_k x w − y| ≤ sx sw Σ_k (|qx| + |qw| + 1/2) / 2, for each rounding is off by half at most.
    """
    (qx, sx), (qw, sw) = quantize_np(x, 1), quantize_np(w, 0)
    y = (qx @ qw).astype(np.float32) * sx * sw
    bound = sx * sw * (np.abs(qx).sum(1, keepdims=True) + np.abs(qw).sum(0) + len(w) / 2) / 2
    return y, bound * 1.0001 + 1e-6


def normal(seed, *shape, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def kernel(w) -> Any:  # what stands for an array is none to a type checker
    return compress.fit(w, "int8", "kernel")


def table(w) -> Any:
    return compress.fit(w, "int8", "table")


def int8(**rules):
    """The transform of rules role by path."""
    return compress.quantize({path: Scheme(role=role) for path, role in rules.items()})


def tree_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        # By way of float64, in which alone bfloat16's NaNs count as equal.
        got, want = (np.asarray(v).astype(np.float64) for v in (x, y))
        np.testing.assert_array_equal(got, want)


# --- one array ---------------------------------------------------------------------------------


@FAST
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["kernel", "table"]), st.data())
def test_values_and_scales_are_the_definition(rows, columns, role, data):
    w = normal(data.draw(st.integers(0, 99)), rows, columns)
    w[:, data.draw(st.integers(0, columns - 1))] = 0  # a dead channel stays exactly zero
    small, (record,) = int8(w=role)({"w": w})
    axis = {"kernel": 0, "table": 1}[role]
    q, scale = quantize_np(w, axis)
    np.testing.assert_array_equal(small["w"].values, q)
    np.testing.assert_array_equal(small["w"].scale, np.where(scale == 0, small["w"].scale, scale))
    back = np.asarray(compress.dequantize(small)["w"])
    assert np.all(np.abs(back - w) <= scale * 0.5001)
    norm = np.linalg.norm(w)
    assert record.error == pytest.approx(np.linalg.norm(back - w) / (norm or 1), rel=1e-4, abs=1e-7)


@FAST
@given(st.lists(st.integers(1, 5), max_size=2), st.integers(1, 150), st.integers(1, 20))
def test_dense_equals_the_integer_reference(lead, n_in, n_out):
    x, w = normal(n_in, *lead, n_in), normal(n_out, n_in, n_out)
    y = jax.jit(compress.apply(jnp.matmul))(x, kernel(w))
    want, bound = dense_np(x.reshape(-1, n_in), w)
    np.testing.assert_array_equal(np.asarray(y).reshape(-1, n_out), want)
    assert np.all(np.abs(want - x.reshape(-1, n_in) @ w) <= bound)


@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan])
def test_a_row_of_zeros_is_zero_and_a_broken_row_stays_broken_alone(bad):
    x, w = normal(0, 3, 8), normal(1, 8, 4)
    x[1] = bad
    y = np.asarray(jax.jit(compress.apply(jnp.matmul))(x, kernel(w)))
    np.testing.assert_array_equal(y[[0, 2]], dense_np(x[[0, 2]], w)[0])
    assert np.all(y[1] == 0) if bad == 0 else not np.any(np.isfinite(y[1]))


# --- any function, any transformation ----------------------------------------------------------

X, W, V = normal(0, 6, 32), normal(1, 32, 16), normal(2, 16, 32)
LAYERS = normal(3, 3, 32, 32) / 6

PRODUCTS = {  # function of (x, w), the shape of x, w
    "leading axes": (lambda x, w: x @ w, (2, 3, 32), kernel(W)),
    "one row": (lambda x, w: x @ w, (1, 32), kernel(W)),
    "vector": (lambda x, w: x @ w, (32,), kernel(W)),
    "transposed": (lambda x, w: x @ w.T, (6, 32), kernel(V)),
    "tied table": (lambda x, w: x @ w.T, (6, 32), table(V)),
    "table as kernel": (lambda x, w: x @ w, (6, 16), table(V)),
    "weight first": (lambda x, w: jnp.einsum("io,bi->ob", w, x), (6, 32), kernel(W)),
    "first axis": (lambda x, w: jnp.einsum("kbt,ko->bto", x, w), (32, 2, 3), kernel(W)),
    "heads": (
        lambda x, w: jnp.einsum("bld,dhk->blhk", x, w.reshape(32, 4, 4)),
        (2, 3, 32),
        kernel(W),
    ),
    "experts": (lambda x, w: jnp.einsum("ebi,eio->ebo", x, w), (3, 6, 32), kernel(LAYERS)),
    "experts, folded": (lambda x, w: jnp.einsum("beo,eio->bei", x, w), (6, 3, 32), kernel(LAYERS)),
    "vmap inside": (jax.vmap(lambda x, w: x @ w), (3, 6, 32), kernel(LAYERS)),
    "vmap, one row": (jax.vmap(lambda x, w: x @ w), (3, 32), kernel(LAYERS)),
    "static index": (lambda x, w: x @ w[2], (6, 32), kernel(LAYERS)),
    "sliced": (lambda x, w: x @ w[:, 3:7], (6, 32), kernel(W)),
    "joined": (lambda x, w: x @ jnp.concatenate([w[:, 4:], w[:, :4]], 1), (6, 32), kernel(W)),
    "bfloat16": (
        lambda x, w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
        (6, 32),
        kernel(W),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_approximate_the_float_product(name):
    fn, shape, w = PRODUCTS[name]
    x = normal(7, *shape)
    y = jax.jit(compress.apply(fn))(x, w)
    want = fn(jnp.asarray(x), compress.dequantize(w))
    assert y.shape == want.shape
    assert y.dtype == want.dtype
    # One rounding per activation: uniform noise of s/√12 per term, s ≈ 3σ/127, six sigmas of it.
    depth = 6 * 3 / 127 / 12**0.5 * np.linalg.norm(compress.dequantize(w)) / w.shape[-1] ** 0.5
    rounding = 2**-7 * jnp.abs(want).max() if name == "bfloat16" else 0
    assert jnp.abs(y - want).max() <= depth + rounding


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_flow_through_the_dequantised_weight(name):
    fn, shape, w = PRODUCTS[name]
    x, out = (
        jnp.asarray(normal(7, *shape)),
        jax.eval_shape(compress.apply(fn), normal(7, *shape), w),
    )
    cotangent = jnp.asarray(normal(8, *out.shape))
    got = jax.jit(jax.grad(lambda x: jnp.vdot(compress.apply(fn)(x, w), cotangent)))(x)
    want = jax.grad(lambda x: jnp.vdot(fn(x, compress.dequantize(w)), cotangent))(x)
    np.testing.assert_allclose(
        got,
        want,
        rtol=2e-2 if name == "bfloat16" else 1e-4,
        atol=1e-1 if name == "bfloat16" else 1e-4,
    )


@jax.custom_vjp
def double(x):
    return x * 2


double.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 3,))  # 3 shows whose derivative ran


@jax.custom_vjp
def custom_dense(x, w):
    return x @ w


custom_dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def step(x, w):
    return jax.nn.softmax(jax.nn.gelu(x @ w)) + jax.nn.relu(x)


def layers_scan(x, ws):
    return jax.lax.scan(lambda x, w: (step(x, w), x.sum()), x, ws)[0]


BODIES = {  # all the same function of x and stacked kernels
    "loop": lambda x, ws: functools.reduce(step, [ws[i] for i in range(3)], x),
    "scan": layers_scan,
    "checkpointed scan": lambda x, ws: jax.lax.scan(
        lambda x, w: (jax.checkpoint(step)(x, w), None), x, ws
    )[0],
    "checkpoint": jax.checkpoint(layers_scan),
    "nested jit": jax.jit(layers_scan),
    "vmap": jax.vmap(layers_scan, in_axes=(0, None)),
    "fori_loop": lambda x, ws: jax.lax.fori_loop(
        0, 3, lambda i, x: step(x, jax.lax.dynamic_index_in_dim(ws, i, keepdims=False)), x
    ),
    "cond": lambda x, ws: jax.lax.cond(
        ws.shape[0] == 3, layers_scan, lambda x, ws: x + ws.shape[0], x, ws
    ),
}


@functools.cache
def of_the_loop():
    """Value and gradient (of the variance) of the plain loop, the standard for the others."""
    ws, fn = kernel(LAYERS), compress.apply(BODIES["loop"])
    x = jnp.asarray(X)
    return jax.jit(fn)(x, ws), np.asarray(jax.jit(jax.grad(lambda x: fn(x, ws).var()))(x))


@pytest.mark.parametrize(
    ("name", "outer"),
    [*((name, jax.jit) for name in BODIES), ("scan", lambda f: f), ("scan", jax.checkpoint)],
)
def test_structures_agree(name, outer):
    got = outer(compress.apply(BODIES[name]))(jnp.asarray(X), kernel(LAYERS))
    # A last bit of float32 can turn one activation's rounding: a step of s/127 of one term.
    np.testing.assert_allclose(got, of_the_loop()[0], atol=2e-3)


@pytest.mark.parametrize("name", ["scan", "checkpointed scan", "checkpoint", "vmap", "cond"])
def test_gradients_agree_across_structures_inside_and_outside(name):
    x, ws, fn = jnp.asarray(X), kernel(LAYERS), BODIES[name]
    want = of_the_loop()[1]
    outside = jax.jit(jax.grad(lambda x: compress.apply(fn)(x, ws).var()))(x)
    inside = jax.jit(compress.apply(jax.grad(lambda x, ws: fn(x, ws).var())))(x, ws)
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(outside, want, atol=0.005 * np.abs(want).max())
    np.testing.assert_allclose(inside, want, atol=0.02 * np.abs(want).max())


def test_custom_vjp_keeps_its_derivative_on_plain_operands():
    x, w = jnp.asarray(X), kernel(W)
    loss = lambda x, w: (double(x) @ w).sum()  # noqa: E731
    want = np.asarray(3 * compress.dequantize(w).sum(1) * jnp.ones_like(x))
    outside, inside = jax.grad(compress.apply(loss)), compress.apply(jax.grad(loss))
    np.testing.assert_allclose(jax.jit(outside)(x, w), want, rtol=1e-4, atol=1e-4)
    # Inside, the backward pass is a product with a compressed weight like any other.
    np.testing.assert_allclose(jax.jit(inside)(x, w), want, atol=0.02 * np.abs(want).max())


def test_custom_vjp_is_interpreted_on_compressed_operands():
    x, w = jnp.asarray(X), kernel(W)
    tree_equal(compress.apply(custom_dense)(x, w), compress.apply(jnp.matmul)(x, w))
    grad = jax.grad(lambda x: compress.apply(custom_dense)(x, w).sum())(x)
    want = compress.dequantize(w).sum(1) * jnp.ones_like(x)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4)


@jax.custom_jvp
def jvp_dense(x, w):
    return x @ w


jvp_dense.defjvp(lambda p, t: (jvp_dense(*p), t[0] @ p[1] + p[0] @ t[1]))


def test_custom_jvp_is_interpreted_on_compressed_operands():
    x, w = jnp.asarray(X), kernel(W)
    tree_equal(compress.apply(jvp_dense)(x, w), compress.apply(jnp.matmul)(x, w))
    grad = jax.jit(jax.grad(lambda x: compress.apply(jvp_dense)(x, w).sum()))(x)
    want = compress.dequantize(w).sum(1) * jnp.ones_like(x)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-4)


def test_vmap_around_and_forward_mode():
    x, ws = jnp.asarray(normal(4, 3, 6, 32)), kernel(LAYERS)
    got = jax.jit(jax.vmap(compress.apply(jnp.matmul)))(x, ws)
    want = jnp.stack([compress.apply(jnp.matmul)(x[i], kernel(LAYERS[i])) for i in range(3)])
    np.testing.assert_array_equal(got, want)
    w = kernel(W)
    _, tangent = jax.jvp(lambda x: compress.apply(jnp.matmul)(x, w), (x[0],), (x[1],))
    np.testing.assert_allclose(tangent, x[1] @ compress.dequantize(w), rtol=1e-4, atol=1e-4)


LOOKUPS = {
    "take": lambda w, i: jnp.take(w, i, axis=0),
    "take, filled": lambda w, i: jnp.take(w, i + 15, axis=0, mode="fill", fill_value=7.0),
    "take, out of bounds": lambda w, i: jnp.take(w, i + 15, axis=0),
    "index": lambda w, i: w[i],
    "vmap": lambda w, i: jax.vmap(jax.vmap(lambda j: w[j]))(i),
}


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_lookups_equal_the_dequantised_rows(name, dtype):
    ids = jnp.array([[0, 3, 3], [15, 1, 2]])
    w = table(V.astype(dtype))
    got = jax.jit(compress.apply(LOOKUPS[name]))(w, ids)
    want = LOOKUPS[name](compress.dequantize(w), ids)
    tree_equal(got, want)


REFUSED = {
    "add": (lambda w: w + 1.0, "'add'"),
    "sum": (jnp.sum, "'reduce_sum'"),
    "elementwise": (jnp.sin, "'sin'"),
    "in scan": (lambda w: jax.lax.scan(lambda c, r: (c + r, None), jnp.zeros(16), w), "'add'"),
    "to integers": (lambda w: w.astype(jnp.int32), "floating dtype"),
    "merging the shared axis": (lambda w: w.reshape(-1), "merges or splits"),
    "integer activations": (lambda w: jax.lax.dot(jnp.ones((2, 32), jnp.int8), w), "floating"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name):
    fn, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message) as error:
        jax.jit(compress.apply(fn))(kernel(W))
    assert "Quantized(int8 for" in str(error.value)


def test_a_compressed_leaf_passes_through_untouched():
    w = kernel(W)
    y, same = jax.jit(compress.apply(lambda x, w: (x @ w, {"w": w})))(X, w)
    assert y.shape == (6, 16)
    tree_equal(same, {"w": w})


# --- what the compiler makes of it -------------------------------------------------------------


def hlo(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text() or ""


@pytest.mark.parametrize("shape", [(6, 32), (4, 5, 32), (1, 32)])
def test_the_product_compiles_to_an_int8_dot(shape):
    text = hlo(
        compress.apply(lambda x, w, b: jax.nn.relu(x @ w + b)),
        normal(0, *shape),
        kernel(W),
        normal(1, 16),
    )
    (line,) = re.findall(r"^.* dot\(.*$", text, re.M)
    rows = max(2, int(np.prod(shape[:-1])))
    assert f"s32[{rows},16]" in line
    operands = re.findall(r"%([\w.]+)", line.partition(" dot(")[2])[:2]
    for name, size in zip(operands, (f"{rows},32", "32,16"), strict=True):
        assert re.search(rf"%{re.escape(name)} = s8\[{size}\]", text), text
    assert "f32[32,16]" not in text  # the weight never becomes floats


def test_one_input_is_quantised_once_for_three_projections():
    ws = [kernel(normal(i, 32, 16)) for i in range(3)]
    text = hlo(compress.apply(lambda x, ws: [x @ w for w in ws]), X, ws)
    assert text.count("round-nearest-even(") == 1


# --- trees -------------------------------------------------------------------------------------


def parameters(seed=0):
    return {
        "table": {"embedding": normal(seed, 40, 32)},
        "layers": [
            {"kernel": normal(seed + i, 32, 16, dtype=d), "bias": normal(seed + i, 16)}
            for i, d in enumerate((np.float32, jnp.bfloat16))
        ],
        "conv": {"kernel": normal(seed, 3, 3, 8, 8)},
        "step": np.int32(7),
    }


RULES = {"layers/*/kernel": "int8", "**/kernel": "int8", "**/embedding": "int8"}


def test_the_report_covers_every_leaf_and_the_floats_are_gone():
    params = parameters()
    small, report = compress.quantize(RULES)(params)
    assert {r.path: r.applied for r in report} == {
        "conv/kernel": "int8",
        "layers/0/bias": "kept: no rule",
        "layers/0/kernel": "int8",
        "layers/1/bias": "kept: no rule",
        "layers/1/kernel": "int8",
        "step": "kept: no rule",
        "table/embedding": "int8",
    }
    nbytes = lambda tree: sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert sum(r.bytes_before for r in report) == nbytes(params)
    assert sum(r.bytes_after for r in report) == nbytes(small)
    for r in report:
        assert 1e-3 < r.error < 1e-2 if r.applied.startswith("int8") else r.error == 0
    assert small["layers"][1]["kernel"].dtype == jnp.bfloat16
    shapes = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)  # noqa: E731
    assert shapes(compress.dequantize(small)) == shapes(params)


def test_stacked_layers_have_scales_of_their_own():
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(3, 4, 5)).astype(np.float32) * np.array([[[1]], [[10]], [[100]]])
    params = {"stack": {"layers": {"up": {"kernel": layers}}}, "out": {"kernel": layers[0]}}
    small, report = compress.quantize()(jax.tree.map(np.float32, params))
    assert [r.applied for r in report] == ["int8", "int8"]
    scale = small["stack"]["layers"]["up"]["kernel"].scale
    np.testing.assert_allclose(scale, np.abs(layers).max(1, keepdims=True) / 127, rtol=1e-6)


BAD = {  # rules, and what is said of them
    "misprint": ({"**/kernal": "int8"}, r"'\*\*/kernal' matches no path; nearest are .*kernel"),
    "shadowed": ({"**/kernel": "int8", "layers/0/kernel": "keep"}, "an earlier rule takes"),
    "a vector": ({"layers/0/*": "int4"}, r"layers/0/bias: quantize .* 2 axes or more"),
    "integers": ({"step": "int8"}, "step: .* int32 is not floating"),
    "odd group": (
        {"**/1/kernel": Scheme("int4", per=24)},
        "layers/1/kernel: .* groups of 16 or 32",
    ),
    "role": ({"**/0/kernel": {"format": "int8", "role": "colum"}}, "role='colum': expected one of"),
    "format": ({"**/kernel": "int7"}, "format 'int7': expected one of int8"),
    "a word for false": ({"**/kernel": {"symmetric": "false"}}, "symmetric='false': expected true"),
    "field": ({"**/kernel": {"formt": "int8"}}, "unknown field 'formt'; expected format, per"),
    "rounding by groups": (
        {"**/kernel": {"format": "int8", "per": 8}},
        "activations='dynamic' with groups of 8",
    ),
    "statistics": (
        {"layers/0/kernel": Scheme(activations="static")},
        "layers/0/kernel: quantize needs statistics",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_rule_cannot_do_is_an_error_that_names_the_leaf(name):
    rules, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        compress.quantize(rules)(parameters())


def test_usual_rules_keep_what_they_cannot_have_and_say_why():
    params = {"a": {"kernel": normal(0, 100, 4)}, "b": {"kernel": normal(1, 128, 4)}}
    _, report = compress.quantize("int4")(params)
    assert [r.applied.split(";")[0] for r in report] == [
        "kept: its input axis has 100 elements, which groups of 128 do not divide",
        "int4",
    ]
    with pytest.raises(
        ValueError, match="can be applied to no leaf: a/kernel: its input axis has 100"
    ):
        compress.quantize("int4")({"a": params["a"]})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_leaf_is_named(bad):
    params = parameters()
    params["layers"][0]["kernel"][3, 4] = bad
    with pytest.raises(ValueError, match="layers/0/kernel: holds NaN or infinity"):
        compress.quantize()(params)


KEYS: Any = st.text("abk_0", min_size=1, max_size=3)


@FAST
@given(
    st.lists(st.one_of(KEYS, st.just("*"), st.just("**"), st.just("a?")), max_size=5),
    st.lists(KEYS, min_size=1, max_size=5),
)
def test_globs_match_as_their_regular_expression(pattern, keys):
    one = {"*": "[^/]+", "a?": "a[^/]"}
    parts = ["(?:/[^/]+)*" if p == "**" else "/" + one.get(p, str(p)) for p in pattern]
    want = re.fullmatch("".join(parts), "/" + "/".join(keys)) is not None
    assert compress.match("/".join(pattern), "/".join(keys)) == (want and bool(pattern))


# --- devices -----------------------------------------------------------------------------------


def test_shard_map_takes_the_specs():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w = normal(0, 8, 32), kernel(W)
    fn = jax.shard_map(
        compress.apply(jnp.matmul),
        mesh=mesh,
        in_specs=(P("a"), compress.specs(w, P(None, "b"))),
        out_specs=P("a", "b"),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(fn)(x, w), dense_np(x, W)[0])


def test_shard_map_cuts_groups_with_what_they_scale():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w = normal(0, 8, 256), compress.fit(normal(1, 256, 8), Scheme("int4", per=32))
    fn = jax.shard_map(
        compress.apply(lambda x, w: jax.lax.psum(x @ w, "a")),
        mesh=mesh,
        in_specs=(P(None, "a"), compress.specs(w, P("a", "b"))),
        out_specs=P(None, "b"),
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(fn)(x, w), x @ np.asarray(w.dense()), rtol=1e-4, atol=1e-4)


CUT = {
    "columns": (P(), P(None, "tensor"), P("tensor"), P(None, "tensor")),
    "rows": (P(None, "tensor"), P("tensor"), P(), P()),
    "whole": (P("data"), P(), P(), P("data")),
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", per=8), Scheme("nf4", per=16)])
def test_a_function_with_a_shard_map_in_it_takes_compressed_arrays(scheme, cut):
    """Each device has the codes of its part, with their scales, and the gradient of it."""
    mesh = make_mesh("data=2,tensor=4")
    x, b = normal(0, 4, 64), normal(1, 16)
    w: Any = compress.fit(normal(2, 64, 16), scheme)
    *specs, out = CUT[cut]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=tuple(specs), out_specs=out)
    def body(x, w, b):
        y = x @ w
        return (jax.lax.psum(y, "tensor") if cut == "rows" else y) + b

    got = jax.jit(compress.apply(body))(x, w, b)
    if cut == "rows" and scheme.format == "int8":  # a device's part of a row has its own scale
        want = sum(compress.apply(jnp.matmul)(x[:, k:k + 16], part) for k, part in (
            (k, jax.tree.map(lambda a, k=k: a[k:k + 16] if a.shape[0] > 1 else a, w))
            for k in range(0, 64, 16))) + b  # fmt: skip
    else:
        want = compress.apply(lambda x, w: x @ w + b)(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    slope = jax.jit(jax.grad(lambda x: compress.apply(body)(x, w, b).sum()))(x)
    np.testing.assert_allclose(slope, np.tile(w.dense().sum(1), (4, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "scheme", [Scheme("int8"), Scheme("int8", role="table"), Scheme("int4", per=16), "nvfp4"]
)
def test_parts_that_are_gathered_are_the_whole(scheme, axis):
    """Of scales, those that devices have of their own; groups of 16 may be one for a device."""
    mesh, x = make_mesh("data=2,tensor=4"), normal(0, 4, 64)
    w: Any = compress.fit(normal(2, 64, 16), scheme, getattr(scheme, "role", None) or "kernel")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P(*[None] * axis, "tensor")),
        out_specs=P("data"),
    )  # fmt: skip
    def body(x, w):
        w = jax.lax.all_gather(w, "tensor", axis=axis, tiled=True)
        return jax.lax.pmean(x @ w, "tensor")

    got = jax.jit(compress.apply(body))(x, w)
    want = compress.apply(jnp.matmul)(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_cut_through_what_shares_a_scale_is_refused():
    w: Any = compress.fit(normal(0, 64, 16), Scheme("int4", per=32))
    mesh = make_mesh("tensor=4")
    body = jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "tensor"), mesh=mesh,
        in_specs=(P(None, "tensor"), P("tensor")), out_specs=P(),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="part what shares a scale; choose smaller"):
        compress.apply(body)(normal(1, 2, 64), w)


UNDONE = {  # what would need other scales, and what it is said to be
    "a strided cut of a rotated axis": (
        lambda w: jax.lax.slice(w, (0, 0), (64, 8), (2, 1)), "int8", "was rotated"),
    "an update within a group": (
        lambda w: jax.lax.dynamic_update_slice(w, jnp.ones((2, 8)), (0, 0)),
        Scheme(per=32, activations="float"), "whole blocks"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDONE)
def test_what_would_need_other_scales_is_refused(name):
    fn, scheme, message = UNDONE[name]
    steps = [compress.rotate({"w": 16})] if "rotated" in name else []
    made = compress.chain(*steps, compress.quantize({"w": scheme}))({"w": normal(0, 64, 8)})[0]
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(compress.apply(lambda w: jnp.ones((2, w.shape[0])) @ fn(w)))(made["w"])


def test_arrays_of_other_groups_are_not_joined():
    a, b = (compress.fit(normal(n, 64, 8), Scheme("int4", per=n)) for n in (32, 16))
    with pytest.raises(NotImplementedError, match="one size of groups"):
        compress.apply(lambda a, b: jnp.ones((2, 64)) @ jnp.concatenate([a, b], 1))(a, b)


def test_vmap_inside_of_a_convolution_over_stacked_kernels():
    conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, w = jnp.asarray(normal(0, 2, 1, 5, 5, 4)), normal(1, 2, 3, 3, 4, 6)
    small: Any = compress.fit(w, Scheme(activations="float"), "conv2d")
    got = jax.jit(compress.apply(jax.vmap(conv)))(x, small)
    np.testing.assert_allclose(got, jax.vmap(conv)(x, small.dense()), rtol=1e-4, atol=1e-4)


def test_errors_of_huge_leaves_are_told():
    w = normal(0, 8, 4) * np.float32(1e25)
    _, (record,) = compress.quantize({"w": "int8"})({"w": w})
    assert 1e-3 < record.error < 1e-2


def test_specs_of_an_abstract_tree_and_their_errors():
    small = jax.eval_shape(lambda p: compress.quantize()(p)[0], parameters())
    where = jax.tree.map(lambda _: P("x", "y"), parameters())
    out = compress.specs(small, where)
    assert out["layers"][0]["kernel"].values == P("x", "y")
    assert out["layers"][0]["kernel"].scale == P(None, "y")
    assert out["table"]["embedding"] == P("x", "y")
    assert jax.tree.structure(out) == jax.tree.structure(small)
    where["layers"][0]["kernel"] = "y"
    with pytest.raises(TypeError, match="layers/0/kernel: expected a PartitionSpec"):
        compress.specs(small, where)


# --- files -------------------------------------------------------------------------------------


def test_arrays_survive_a_safetensors_file_exactly(tmp_path):
    small, _ = compress.quantize(RULES)(parameters())
    arrays = {k: np.asarray(v) for k, v in compress.to_arrays(small).items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for like in (small, parameters(), jax.eval_shape(parameters)):
        tree_equal(compress.from_arrays(read, like=like), small)
    nested = compress.from_arrays(read)
    tree_equal(nested["layers"]["1"]["kernel"], small["layers"][1]["kernel"])


NAME = "a/kernel:int8:float32"
INT8, SCALE = np.ones((4, 3), np.int8), np.ones((1, 3), np.float32)
PACKED, HALVES = np.ones((2, 3), np.uint8), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({NAME: INT8}, "a/kernel:scale' are missing"),
        ({"a/kernel:scale": SCALE}, "scales without values: a/kernel"),
        ({NAME: INT8, "a/kernel:scale": SCALE[0]}, r"scale float32\[3\]: .* the values' rank"),
        ({NAME: INT8, "a/kernel:scale": np.ones((3, 3), np.float32)}, "and parts of"),
        ({NAME: INT8, "a/kernel:scale": np.ones((0, 3), np.float32)}, "and parts of"),
        ({NAME: INT8.astype(np.int32), "a/kernel:scale": SCALE}, "expected int8 values"),
        ({NAME: INT8, "a/kernel:scale": SCALE.astype(np.float16)}, "expected float32"),
        ({"a/kernel:int3:float32": INT8, "a/kernel:scale": SCALE}, "expected '<path>'"),
        ({NAME + ":pack=-2": INT8, "a/kernel:scale": SCALE}, "packed along an axis, others are"),
        ({"a/kernel:int4:float32": PACKED, "a/kernel:scale": HALVES}, "packed along an axis"),
        ({"a/kernel:int4:float32:pack=-3": PACKED, "a/kernel:scale": HALVES}, "axis -3 of 2"),
        ({NAME + ":hadamard=-2,3": INT8, "a/kernel:scale": SCALE}, "blocks of 3 do not divide"),
        ({NAME + ":hadamard=-2,8": INT8, "a/kernel:scale": SCALE}, "blocks of 8 do not divide"),
        (
            {"a/kernel:nf4:float32:activations=int8:pack=-2": PACKED, "a/kernel:scale": HALVES},
            "nf4 has no activations in int8",
        ),
        (
            {
                "a/kernel:int4:float32:pack=-2": PACKED,
                "a/kernel:scale": np.ones((4, 3), np.float32),
            },
            "and parts of",
        ),
        ({NAME: INT8, "a/kernel:scale": SCALE, "a/kernel:zero": SCALE[:, :1]}, "and parts of"),
        ({NAME + ":activations=int3": INT8, "a/kernel:scale": SCALE}, "expected '<path>'"),
        ({"a/kernel:int8:object": INT8, "a/kernel:scale": SCALE}, "a dtype of"),
        ({NAME: INT8, "a/kernel:scale": SCALE, "a/kernel": INT8}, "given twice"),
        ({"a": SCALE, "a/b": SCALE}, "at once"),
        ({"a/b": SCALE, "a": SCALE}, "at once"),
    ],
)
def test_malformed_arrays_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        compress.from_arrays(arrays)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": SCALE, "c": SCALE}, r"missing \['c'\], unknown \['b'\]"),
        ({"a": SCALE, "b": INT8}, r"b: expected int8\[4, 3\], got float32\[1, 3\]"),
    ],
)
def test_arrays_that_do_not_fill_the_tree_are_refused(like, message):
    with pytest.raises(ValueError, match=message):
        compress.from_arrays({"a": SCALE, "b": SCALE}, like=like)


@pytest.mark.parametrize("key", ["a:b", "a/b"])
def test_names_that_could_not_be_read_back_are_refused(key):
    with pytest.raises(ValueError, match="rename it"):
        compress.to_arrays({key: SCALE})


# --- the guide ---------------------------------------------------------------------------------


def test_the_guide_runs():
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testfile(str(README), module_relative=False, optionflags=flags)
    assert result.attempted > 15
    assert result.failed == 0
