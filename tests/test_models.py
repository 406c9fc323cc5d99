"""Layers against numpy in float64, dropout against statistics, and the model record."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fw.errors import FwError
from fw.model import from_nnx
from fw.models.bert import BertConfig, bert
from fw.models.layers import attention, dropout, gelu, layer_norm, segment_bias
from sharding import make_mesh, put, rules

few = settings(derandomize=True, deadline=None, max_examples=12)
seeds = st.integers(0, 2**32 - 1)


def normal(seed, *shape, dtype: Any = np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def slope(f, x, direction, step=1e-6):
    """The derivative of a numpy function along a direction, by central differences."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


# --- mathematics ----------------------------------------------------------------------------------


def gelu_np(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-7), ("float64", 1e-15)])
def test_gelu_and_its_derivative(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x = np.concatenate([normal(0, 500) * 3, [0.0, -0.0, 40.0, -40.0, 1e-30]]).astype(dtype)
        exact = x.astype(np.float64)
        y, d = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(x)
        assert y.dtype == d.dtype == dtype
        assert np.all(abs(y - gelu_np(exact)) <= tolerance * np.maximum(1, abs(exact)))
        np.testing.assert_allclose(d, slope(gelu_np, exact, 1.0), atol=max(tolerance * 4, 1e-8))


def layer_norm_np(x, scale, bias, epsilon):
    x = x.astype(np.float64)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


@few
@given(
    st.lists(st.integers(1, 4), max_size=3), st.integers(2, 96),
    st.tuples(st.sampled_from([0.0, 3.0, 300.0]), st.sampled_from([0.01, 1.0, 100.0])),
    st.sampled_from([1e-12, 1e-5]), seeds,
)  # fmt: skip
def test_layer_norm(shape, size, moments, epsilon, seed):
    x = moments[0] + moments[1] * normal(seed, *shape, size)
    scale, bias = normal(seed + 1, size), normal(seed + 2, size)
    y = jax.jit(layer_norm, static_argnums=3)(x, scale, bias, epsilon)
    # An error of half a unit in x or in its mean is divided by the standard deviation.
    unit = 2.0**-23 * np.abs(x).max(-1, keepdims=True) / x.std(-1, keepdims=True, dtype=np.float64)
    error = np.abs(y - layer_norm_np(x, scale, bias, epsilon))
    assert np.all(error <= 4 * (unit + 1e-6) * np.maximum(1, np.abs(scale)) * (1 + np.abs(y)))


def test_derivatives_of_layer_norm():
    with jax.enable_x64(True):
        point = tuple(normal(*s, dtype=np.float64) for s in ((0, 3, 4, 6), (1, 6), (2, 6)))
        g = normal(9, 3, 4, 6, dtype=np.float64)
        loss = lambda x, scale, bias: (layer_norm(x, scale, bias, 1e-5) * g).sum()  # noqa: E731
        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*point)
        for i, grad in enumerate(grads):
            direction = normal(20 + i, *grad.shape, dtype=np.float64)

            def at(value, i=i):
                x, scale, bias = (*point[:i], value, *point[i + 1 :])
                return (layer_norm_np(x, scale, bias, 1e-5) * g).sum()

            np.testing.assert_allclose(
                (grad * direction).sum(), slope(at, point[i], direction), rtol=1e-7
            )


def attention_np(q, k, v, segments):
    """One query at a time, looking only at the tokens of its own text."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        own = np.flatnonzero(segments[b] == segments[b, i])
        scores = k[b, own, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, own, h]
    return out


def attend(q, k, v, segments, **more):
    return attention(q, k, v, segment_bias(segments, q.dtype), **more)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 3), st.integers(1, 8))


@few
@given(shapes, seeds, st.integers(1, 4))
def test_attention(shape, seed, texts):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, *shape)).astype(np.float32)
    segments = rng.integers(0, texts + 1, shape[:2]).astype(np.int32)
    expected = attention_np(q, k, v, segments)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v, segments), expected, rtol=0, atol=5e-6)


def test_nothing_of_one_text_reaches_another():
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(3, 2, 12, 2, 4)).astype(np.float32)
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 3, [1] * 2 + [2] * 9 + [0]], np.int32)
    mine, run = segments == 2, jax.jit(attend)
    wild = np.where(mine[..., None, None], 1e3 * rng.normal(size=(3, *q.shape)), (q, k, v))
    before, after = run(q, k, v, segments), run(*wild.astype(np.float32), segments)
    np.testing.assert_array_equal(before[~mine], after[~mine])
    assert np.all(np.abs(before[mine] - after[mine]).max(-1) > 1)
    others = lambda q, k, v: attend(q, k, v, segments)[~mine].sum()  # noqa: E731 a sum to derive
    reach = jax.jit(jax.grad(others, (0, 1, 2)))(q, k, v)
    for gradient in reach:
        assert not gradient[mine].any()
    assert all(gradient[~mine].any() for gradient in reach)


def test_dropout_of_attention_weights():
    """With the identity for values, attention returns its weights."""
    q, k = normal(6, 2, 4, 16, 2, 16)
    v = np.broadcast_to(np.eye(16, dtype=np.float32)[:, None], q.shape)
    segments, key = np.ones((4, 16), np.int32), jax.random.key(1)
    whole, dropped = attend(q, k, v, segments), attend(q, k, v, segments, rate=0.5, key=key)
    zero = np.asarray(dropped) == 0
    np.testing.assert_allclose(dropped, np.where(zero, 0, whole * 2), rtol=1e-6)
    assert abs(zero.mean() - 0.5) < 5 * 0.5 / math.sqrt(zero.size)


# --- dropout --------------------------------------------------------------------------------------

COUNT = 2**18
RATES = (0.1, 0.5, 0.9)
KEYS = {
    # As a model and a step make them, and as a reader of the docstring would.
    "layers": jax.random.split(jax.random.key(3), 12),
    "steps": jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(12)),
    "seeds": jax.vmap(jax.random.key)(jnp.arange(12)),
}


def dropped(key, rate, shape: tuple[int, ...] = (COUNT,)):
    return jax.jit(lambda key: dropout(jnp.ones(shape), rate, key) == 0)(key)


def standardised(masks, rate):
    return (np.asarray(masks, np.float32) - rate) / math.sqrt(rate * (1 - rate))


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("rate", RATES)
def test_masks_have_their_rate_and_those_of_different_keys_are_independent(rate, keys):
    masks = standardised(jax.vmap(lambda key: dropped(key, rate))(KEYS[keys]), rate)
    # Under independence each of these is a standard normal variable: 5 is one in two million.
    rates, pairs = masks.sum(1) / math.sqrt(COUNT), masks @ masks.T / math.sqrt(COUNT)
    assert np.abs(rates).max() < 5
    assert np.abs(pairs[np.triu_indices(len(masks), 1)]).max() < 5


@pytest.mark.parametrize("rate", RATES)
def test_positions_are_independent(rate):
    mask = standardised(dropped(KEYS["layers"][0], rate, (512, 1024)), rate).reshape(-1)
    # Neighbours along a row, along a column, and powers of two, where hashes are weakest. A
    # correlation of 1 % does no harm to training; noise alone stays below 0.7 %.
    for lag in {*range(1, 17), *(2**i for i in range(18)), 768, 1023, 1025, 1536}:
        assert abs(mask[lag:] @ mask[:-lag]) / len(mask) < 0.01, lag


@pytest.mark.parametrize("shape", [(4096, 64), (64, 4096), (2048, 32, 32)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rows_and_columns_drop_as_many_as_chance_would(rate, shape):
    mask = standardised(dropped(KEYS["layers"][1], rate, shape), rate)
    for axis in range(len(shape)):
        sums = mask.sum(axis).reshape(-1) / math.sqrt(shape[axis])
        assert np.abs(sums).max() < 8  # a row of 32 at rate 0.1 is far from normal
        assert abs(np.square(sums).mean() - 1) < 0.1 + 5 * math.sqrt(2 / sums.size)


def test_dropout_preserves_the_expectation_under_vmap_and_scales_what_it_keeps():
    x = jnp.linspace(-2, 2, 64)
    runs = jax.vmap(lambda key: dropout(x, 0.3, key))(jax.random.split(jax.random.key(2), 4096))
    deviation = np.abs(x) * math.sqrt(0.3 / 0.7 / 4096)
    assert np.all(np.abs(runs.mean(0) - x) <= 5 * deviation)
    np.testing.assert_allclose(runs, np.where(runs == 0, 0, x / 0.7), rtol=1e-6)
    gradient = jax.grad(lambda x: dropout(x, 0.3, jax.random.key(4)).sum())(x)
    np.testing.assert_allclose(gradient * x, dropout(x, 0.3, jax.random.key(4)), rtol=1e-6)


def test_no_key_or_no_rate_is_the_identity():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2"])
def test_masks_do_not_depend_on_the_mesh(mesh):
    x, key = normal(8, 16, 8, 24), jax.random.key(5)
    whole = jax.jit(lambda x: dropout(x, 0.4, key))(x)
    parts = put(x, make_mesh(mesh), rules(), ("batch", None, "mlp"))
    sharded = jax.jit(lambda x: dropout(x, 0.4, key), out_shardings=parts.sharding)(parts)
    assert len({str(s.index) for s in sharded.addressable_shards}) == 8
    np.testing.assert_array_equal(sharded, whole)


# --- the record -----------------------------------------------------------------------------------


class Averaging(nnx.Module):
    """Subtracts a running mean: parameters, state, a list and dropout in one small module."""

    def __init__(self, rngs):
        noise = jax.random.normal(rngs.params(), (2, 3))
        self.gains = nnx.List([nnx.Param(row, axes=("embed",)) for row in noise])
        self.mean = nnx.BatchStat(jnp.zeros(3), axes=("embed",))

    def __call__(self, x, key, train):
        if train:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return dropout((x - self.mean[...]) * self.gains[0][...] * self.gains[1][...], 0.5, key)


def averaging():
    return from_nnx("config", Averaging, lambda m, batch, key, train: m(batch["x"], key, train))


def test_a_module_with_state():
    model, x = averaging(), normal(0, 5, 3)
    variables = model.init(jax.random.key(0))
    assert model.config == "config"
    assert model.axes == {
        "params": {"gains": {"0": ("embed",), "1": ("embed",)}},
        "state": {"mean": ("embed",)},
    }
    apply, expected = jax.jit(model.apply, static_argnames="train"), np.zeros(3)
    changed = variables
    for _ in range(3):
        out, changed = apply(changed, {"x": x}, train=True)
        expected = 0.9 * expected + 0.1 * x.mean(0)
    np.testing.assert_allclose(changed["state"]["mean"], expected, rtol=1e-5)
    gains = variables["params"]["gains"]
    np.testing.assert_allclose(out, (x - expected) * gains["0"] * gains["1"], rtol=1e-4)
    # Nothing was changed in place, evaluation changes nothing, and the structure is kept.
    assert not variables["state"]["mean"].any()
    jax.tree.map(np.testing.assert_array_equal, changed["params"], variables["params"])
    again, same = apply(changed, {"x": x}, train=False)
    np.testing.assert_array_equal(same["state"]["mean"], changed["state"]["mean"])
    np.testing.assert_allclose(again, out, rtol=1e-6)


def test_init_and_dropout_are_functions_of_their_keys():
    model, x = averaging(), {"x": normal(0, 64, 3)}
    one, two = jax.random.split(jax.random.key(0))
    variables = model.init(one)
    jax.tree.map(np.testing.assert_array_equal, variables, model.init(one))
    assert np.any(variables["params"]["gains"]["0"] != model.init(two)["params"]["gains"]["0"])

    def run(key, train):
        return np.asarray(model.apply(variables, x, key=key, train=train)[0])

    np.testing.assert_array_equal(run(one, True), run(one, True))
    assert np.any(run(one, True) != run(two, True))
    np.testing.assert_array_equal(run(one, False), run(None, False))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({}, "a variable of rank 2 names None"),
        ({"axes": ("embed",)}, r"a variable of rank 2 names \('embed',\)"),
        ({"axes": ("a", "b", "c")}, "give each one a name"),
    ],
)
@pytest.mark.parametrize("kind", [nnx.Param, nnx.BatchStat])
def test_every_variable_names_its_axes(kind, names, said):
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.List([kind(jnp.zeros((2, 3)), **names)])

    with pytest.raises(TypeError, match=said):
        from_nnx(None, Module, lambda *_: None)


SIZES = {"vocab": 40, "embed": 8, "heads": 8, "mlp": 16, "pooled": 8, "labels": 3, "types": 2,
         "positions": 12, "layers": 1}  # fmt: skip


def config(**changes: Any) -> BertConfig:
    fields: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "num_labels": 3, "task": "token_classification",
        "max_position_embeddings": 12,
    }  # fmt: skip
    return BertConfig(**{**fields, **changes})


@pytest.mark.parametrize("task", ["token_classification", "sequence_classification"])
def test_berts_axes_have_the_sizes_that_their_names_say(task):
    model = bert(config(task=task))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731 a one-word predicate
    shapes = jax.tree.map(
        lambda names: tuple(SIZES[name] for name in names), model.axes, is_leaf=is_names
    )
    assert shapes == jax.tree.map(lambda x: x.shape, variables)


def test_berts_dropout_and_types():
    model, rng = bert(config()), np.random.default_rng(0)
    ids = rng.integers(0, 40, (2, 12), dtype=np.int32)
    batch = {"input_ids": ids, "segment_ids": ids * 0 + 1, "position_ids": ids * 0 + np.arange(12)}
    batch["position_ids"] = batch["position_ids"].astype(np.int32)
    variables = model.init(jax.random.key(0))
    run = jax.jit(lambda batch, key, train: model.apply(variables, batch, key=key, train=train)[0],
                  static_argnums=2)  # fmt: skip
    plain, one, two = run(batch, None, False), *jax.random.split(jax.random.key(1))
    np.testing.assert_array_equal(plain, run({**batch, "token_type_ids": ids * 0}, one, False))
    assert np.all(plain != run({**batch, "token_type_ids": ids * 0 + 1}, None, False))
    assert np.all(run(batch, one, True) != run(batch, two, True))
    none = bert(config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    same = jax.jit(lambda key: none.apply(variables, batch, key=key, train=True)[0])(one)
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
        ({"task": "translation"}, "task 'translation' is unknown"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; expected 'gelu'"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob 1.0 is no rate"),
        ({"classifier_dropout": -0.1}, "classifier_dropout -0.1 is no rate"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(changes, said):
    with pytest.raises(FwError, match=said):
        config(**changes)
