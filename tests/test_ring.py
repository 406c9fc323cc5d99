"""Ring attention against softmax written out in numpy, and what it sends against what it must."""

import math
import re
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fw import precision
from fw.models.bert import BertConfig, bert
from fw.models.layers import dropout
from sharding import ShardingError, constrain, make_mesh, put, rules, scope
from sharding.noise import dropout_mask, positional_bits
from sharding.parallel.ring import ring_attention

RULES = rules()
NAMES = ("batch", "length", "heads", None)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


# --- random bits ----------------------------------------------------------------------------------


def hash_np(key, shape):
    """`positional_bits` one element at a time, in Python's integers; axes are counted apart from
    each other as soon as 32 bits do not count them together."""

    def mix(x, before, within):
        x ^= before
        x = ((x ^ (x >> 16)) * 0x7FEB352D + within) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    first, last = map(int, np.asarray(jax.random.key_data(key)).reshape(-1)[[0, -1]])
    before = mix(first, last, last)
    within = mix(last, before, before)
    inner = len(shape)
    while inner and math.prod(shape[inner - 1 :]) <= 2**32:
        inner -= 1

    def at(*index):
        found = before
        for axes in ([*range(inner)] if inner else None, [*range(inner, len(shape))]):
            if axes is not None:
                position = np.ravel_multi_index([index[a] for a in axes], [shape[a] for a in axes])
                found = mix(int(position), found, within)
        return found

    return at


@settings(derandomize=True, deadline=None, max_examples=8)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)), max_size=4),
    st.integers(0, 2**31 - 1),
)
def test_bits_are_a_function_of_the_global_position(axes, seed):
    size, start, behind = (tuple(a[i] for a in axes) for i in range(3))
    whole = tuple(map(sum, axes))
    key, expected = jax.random.key(seed), hash_np(jax.random.key(seed), whole)
    part = jax.jit(lambda key, start: positional_bits(key, size, start=start, whole=whole))
    got = np.asarray(part(key, [np.int32(n) for n in start]))
    assert got.shape == size and got.dtype == np.uint32
    for index in np.ndindex(size):
        assert got[index] == expected(*np.add(index, start)), (index, behind)


def test_more_positions_than_32_bits_can_count():
    """Of weights [2, 3, 65536, 65536], the same place in every head of every row."""
    key, whole = jax.random.key(3), (2, 3, 2**16, 2**16)
    got = np.asarray(positional_bits(key, (2, 3, 2, 2), start=(0, 0, 2**16 - 2, 5), whole=whole))
    expected = hash_np(key, whole)
    for b, h, i, j in np.ndindex(got.shape):
        assert got[b, h, i, j] == expected(b, h, 2**16 - 2 + i, 5 + j)
    assert len({*got.ravel().tolist()}) == got.size


def test_masks_are_those_that_were_always_drawn():
    """Golden: a seed means the same in every version, or old runs could not be repeated."""
    bits = positional_bits(jax.random.key(7), (2, 3))
    assert np.asarray(bits).tolist() == GOLDEN
    kept = dropout(jnp.ones((2, 3)), 0.25, jax.random.key(7)) > 0
    np.testing.assert_array_equal(kept, np.array(GOLDEN) >= 2**30)


GOLDEN = [[607133655, 849784148, 1811971130], [3139514478, 163458168, 3938678447]]


# --- the numbers ----------------------------------------------------------------------------------

ROWS, LENGTH, HEADS, SIZE = 2, 16, 4, 8


def attention_np(q, k, v, segments, g, *, causal=False, window=None, mask: Any = 1.0):
    """The output and, for its gradient g, those of q, k and v, with all weights in one array."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    share, scale = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3])
    k, v = (np.repeat(x, share, axis=2) for x in (k, v))
    scores = np.einsum("blhd,bmhd->bhlm", q, k) * scale
    hidden = np.zeros(scores.shape, bool)
    if segments is not None:
        hidden |= (segments[:, :, None] != segments[:, None, :])[:, None]
    if causal:
        hidden |= np.triu(np.ones(scores.shape[2:], bool), 1)
    if window is not None:
        place = np.arange(scores.shape[3])
        hidden |= abs(place[:, None] - place) > window
    scores[hidden] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhlm,bmhd->blhd", weights * mask, v)
    dv = np.einsum("bhlm,blhd->bmhd", weights * mask, g)
    dweights = np.einsum("blhd,bmhd->bhlm", g, v) * mask
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dq = np.einsum("bhlm,bmhd->blhd", dscores, k)
    dk = np.einsum("bhlm,blhd->bmhd", dscores, q)
    dk, dv = (x.reshape(*x.shape[:2], -1, share, x.shape[3]).sum(3) for x in (dk, dv))
    return out, dq, dk, dv


def draw(seed, key_heads=HEADS, dtype: Any = np.float64, shape: Any = (ROWS, LENGTH)) -> Any:
    """q, k, v, segments in no order, and a gradient of the output; [*shape, heads, size]."""
    rng = np.random.default_rng(seed)
    q, g = rng.normal(size=(2, *shape, HEADS, SIZE)).astype(dtype)
    k, v = rng.normal(size=(2, *shape, key_heads, SIZE)).astype(dtype)
    return q, k, v, rng.integers(0, 3, shape, dtype=np.int32), g


def outputs(f, g):
    """`(q, k, v) -> (out, dq, dk, dv)` of `f`."""

    def run(q, k, v):
        out, back = jax.vjp(f, q, k, v)
        return out, *back(g)

    return run


def close(got, expected, tolerance):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


MESHES = {
    "data=1": RULES,
    "sequence=8": RULES,
    "data=2,sequence=2,tensor=2": RULES,
    "fsdp=2,sequence=2,tensor=2": rules(length=("sequence", "tensor"), heads=None, mlp=None),
    "sequence=2": RULES,
    "sequence=4": RULES,
}
CASES = [*product((False, True), (False, True), (0.0, 0.3), (HEADS, 2))]


def fraction(number):
    """A quarter of the cases; four numbers in a row have them all."""
    for causal, packed, rate, key_heads in CASES:
        odd = (causal ^ packed ^ (rate > 0), packed ^ (key_heads < HEADS))
        if odd == (number % 2, number // 2 % 2):
            yield causal, packed, rate, key_heads


@pytest.mark.parametrize(
    ("mesh", "case"),
    [
        pytest.param(mesh, case, marks=() if i < 4 and case in {*fraction(i)} else pytest.mark.slow)
        for i, mesh in enumerate(MESHES)
        for case in CASES
    ],
    ids=str,
)
def test_a_ring_is_softmax_attention_forward_and_backward(mesh, case):
    causal, packed, rate, key_heads = case
    layout, mesh, key = MESHES[mesh], make_mesh(mesh), jax.random.key(5)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5))[: 1 + (causal and packed)]:
        with jax.enable_x64(dtype == np.float64), scope(mesh, layout):
            q, k, v, segments, g = draw(0, key_heads, dtype)
            segments = segments if packed else None
            mask: Any = 1.0
            if rate:
                mask = dropout_mask(key, rate, (ROWS, HEADS, LENGTH, LENGTH), dtype)
                assert 0.2 < np.mean(mask == 0) < 0.4
            f = lambda q, k, v, s=segments: ring_attention(  # noqa: E731 what is differentiated
                q, k, v, s, causal=causal, rate=rate, key=key
            )
            got = jax.jit(outputs(f, g))(*(put(x, mesh, layout, NAMES) for x in (q, k, v)))
            assert {x.dtype for x in got} == {np.dtype(dtype)}
            expected = attention_np(q, k, v, segments, g, causal=causal, mask=np.asarray(mask))
            close(got, expected, tolerance)


@pytest.mark.parametrize("window", [1, 4, 7, 15])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window(window, causal):
    """Within a part of 4 tokens, reaching into one neighbour, into two, over all."""
    q, k, v, segments, g = draw(7, 2)
    f = lambda q, k, v: ring_attention(q, k, v, segments, causal=causal, window=window)  # noqa: E731
    expected = attention_np(q, k, v, segments, g, causal=causal, window=window)
    for mesh in ("data=1", "sequence=4"):
        with jax.enable_x64(True), scope(make_mesh(mesh), RULES):
            close(jax.jit(outputs(f, g))(q, k, v), expected, 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_that_see_nobody_but_themselves(causal):
    """Rows without a visible key in most pairs of parts, and scores beyond what exp can take."""
    q, k, v, _, g = draw(1, dtype=np.float32)
    alone: Any = np.random.default_rng(0).permutation(ROWS * LENGTH).reshape(ROWS, LENGTH)
    f = lambda q, k, v: ring_attention(  # noqa: E731 what is differentiated
        q, k, v, alone.astype(np.int32), causal=causal
    )
    with scope(make_mesh("sequence=4"), RULES):
        out, dq, dk, dv = jax.jit(outputs(f, g))(1e3 * q, 1e3 * k, v)
    np.testing.assert_array_equal(out, v)
    np.testing.assert_array_equal(dv, g)
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-3  # of terms of 1e3, where f32 has 6e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_half_precision_sums_in_float32(dtype, key_heads):
    q, k, v, segments, g = draw(2, key_heads, np.float32)
    q, k, v, g = (jnp.asarray(x, dtype) for x in (q, k, v, g))
    f = lambda q, k, v: ring_attention(q, k, v, segments, causal=True)  # noqa: E731
    with scope(make_mesh("sequence=8"), RULES):
        got = jax.jit(outputs(f, g))(q, k, v)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    exact = attention_np(q, k, v, segments, g, causal=True)
    close([np.asarray(x, np.float64) for x in got], exact, 3 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("precision_", [None, "bfloat16"])
def test_float32_is_float32_unless_jax_is_told_otherwise(precision_):
    q, k, v, segments, g = draw(3, dtype=np.float32)
    f = lambda q, k, v: ring_attention(q, k, v, segments)  # noqa: E731
    with jax.default_matmul_precision(precision_), scope(make_mesh("sequence=2"), RULES):
        traced = jax.make_jaxpr(outputs(f, g))(q, k, v)
    dots = [eqn for eqn, _ in equations(traced.jaxpr) if eqn.primitive.name == "dot_general"]
    expected = lax.Precision.DEFAULT if precision_ else lax.Precision.HIGHEST
    assert len(dots) == 2 * 2 + 2 * 5
    assert {dot.params["precision"] for dot in dots} == {(expected, expected)}
    assert {dot.params["preferred_element_type"] for dot in dots} == {np.dtype(np.float32)}


# --- under the transforms of JAX ------------------------------------------------------------------


def in_a_loop(f):
    return lambda *args: lax.scan(lambda _, x: (None, f(*x)), None, args)[1]


def one_more(wrap, axis):
    """`wrap` around an axis of size 1 outside (axis 0) or inside (axis 1) of the mapped one."""
    return lambda *args: wrap(*(jnp.expand_dims(x, axis) for x in args)).squeeze(axis)


def staged(f):
    return jax.vmap(f, spmd_axis_name="pipe")


TRANSFORMS = {
    "stages of checkpoints": lambda f: staged(jax.checkpoint(f)),
    "a checkpoint of stages": lambda f: jax.checkpoint(staged(f)),
    "a loop of stages of vmaps": lambda f: one_more(
        in_a_loop(jax.checkpoint(one_more(staged(jax.vmap(f)), 1))), 0
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_mapped_over_stages_of_a_pipeline(name):
    mesh, number = make_mesh("pipe=2,sequence=2,tensor=2"), 2
    keys = jax.random.split(jax.random.key(0), number)
    with jax.enable_x64(True), scope(mesh, RULES, mapped=["pipe"]):
        q, k, v, segments, g = draw(4, 2, shape=(number, ROWS, LENGTH))

        def one(q, k, v, segments, key):
            q, k, v = (constrain(x, *NAMES) for x in (q, k, v))
            return ring_attention(q, k, v, segments, causal=True, rate=0.3, key=key)

        wrapped = TRANSFORMS[name](one)
        run = jax.jit(outputs(lambda q, k, v: wrapped(q, k, v, segments, keys), g))
        got = run(q, k, v)
        for i, key in enumerate(keys):
            mask = dropout_mask(key, 0.3, (ROWS, HEADS, LENGTH, LENGTH), np.float64)
            expected = attention_np(
                q[i], k[i], v[i], segments[i], g[i], causal=True, mask=np.asarray(mask)
            )
            close([x[i] for x in got], expected, 1e-12)
        if name == "stages of checkpoints":  # each has its own arrays, and gives them to no other
            text = run.lower(q, k, v).compile().as_text() or ""
            sent = re.findall(r"= f64\[([\d,]+)\]\S* collective-permute", text)
            assert sent and all(shape.startswith("1,") for shape in sent)


def test_arguments_that_are_not_mapped():
    with jax.enable_x64(True), scope(make_mesh("pipe=2,sequence=2"), RULES, mapped=["pipe"]):
        q, k, v, _, g = draw(6, shape=(2, ROWS, LENGTH))
        k, v = k[0], v[0]
        f = lambda q, k, v: staged(lambda q: ring_attention(q, k, v))(q)  # noqa: E731
        out, dq, dk, dv = jax.jit(outputs(f, g))(q, k, v)
    first, second = (attention_np(q[i], k, v, None, g[i]) for i in range(2))
    close((out[0], out[1], dq[0], dq[1]), (first[0], second[0], first[1], second[1]), 1e-12)
    close((dk, dv), (first[2] + second[2], first[3] + second[3]), 1e-12)


@pytest.mark.slow
def test_without_jit_and_with_the_way_back_outside_the_scope():
    with jax.enable_x64(True):
        q, k, v, segments, g = draw(7)
        with scope(make_mesh("sequence=4"), RULES):
            out, back = jax.vjp(lambda q, k, v: ring_attention(q, k, v, segments), q, k, v)
        close((out, *back(g)), attention_np(q, k, v, segments, g), 1e-12)


# --- the wire -------------------------------------------------------------------------------------


def equations(jaxpr, times=1):
    """Every equation of a program and how often it runs."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        more = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner, more)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("ring", [2, 4, 8])
def test_nothing_is_sent_but_what_a_ring_must(ring, key_heads, causal):
    q, k, v, segments, g = draw(8, key_heads, np.float32)
    f = lambda q, k, v: ring_attention(q, k, v, segments, causal=causal)  # noqa: E731
    mesh, rows = make_mesh(f"sequence={ring}"), ROWS * LENGTH // ring * 4
    with scope(mesh, RULES):
        run = jax.jit(outputs(f, g))
        sent = sum(
            times * eqn.invars[0].aval.size * 4  # pyright: ignore[reportAttributeAccessIssue]
            for eqn, times in equations(jax.make_jaxpr(run)(q, k, v).jaxpr)
            if eqn.primitive.name == "ppermute"
        )
        cut = [put(x, mesh, RULES, NAMES) for x in (q, k, v)]
        text = run.lower(*cut).compile().as_text() if ring == 4 and not causal else None
    # Forward k and v. Backward q, the gradients of q and of the output and two numbers a row, or
    # where keys are fewer k, v and their gradients. Every time the number of a token's text.
    forward, keys = 2 * key_heads * SIZE + 1, 4 * key_heads * SIZE + 1
    backward = min(3 * HEADS * SIZE + 2 * HEADS + 1, keys)
    assert (backward == keys) == (key_heads < HEADS)
    assert sent == (ring - 1) * rows * (forward + backward)
    if text is not None:
        assert "collective-permute" in text
        assert not re.search(r"\b(all-(gather|reduce|to-all)|reduce-scatter)", text)


def gradient(model, mesh, layout, batch, policy="f32"):
    """Compiles loss and gradients of a BERT over a mesh."""

    def loss(variables, batch, key):
        logits, _ = precision.apply(model.apply, policy)(variables, batch, key=key, train=True)
        return jnp.sum(jnp.square(logits))

    with scope(mesh, layout):
        batch = put(batch, mesh, layout)
        variables, key = jax.jit(model.init)(jax.random.key(0)), jax.random.key(1)
        return (
            jax.jit(jax.value_and_grad(loss))
            .lower(variables, batch, key)
            .compile()(variables, batch, key)
        )


@pytest.mark.parametrize("policy", ["bf16", pytest.param("f32", marks=pytest.mark.slow)])
def test_bert_under_a_precision_policy(policy):
    config = BertConfig(40, 16, 1, 4, 32, num_labels=3, task="sequence_classification")
    rng, model = np.random.default_rng(0), bert(config)
    ids, segments = rng.integers(0, 40, (2, 4, 16), dtype=np.int32)
    batch = {"input_ids": ids, "segment_ids": segments % 3, "position_ids": ids % 16}
    batch["first"] = rng.integers(0, 16, (4, 2), dtype=np.int32)
    one, many = (
        gradient(model, make_mesh(mesh), RULES, batch, policy)
        for mesh in ("data=1", "data=2,sequence=2,tensor=2")
    )
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(one[1]))
    atol = {"f32": 1e-6, "bf16": 1e-3}[policy] * largest
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol)  # noqa: E731
    jax.tree.map(near, many[1], one[1])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v, s: (q[:, :14], k[:, :14], v[:, :14], None),
         "ring_attention: queries: axis 'length' has size 14, which sequence=4 does not divide"),
        (lambda q, k, v, s: (q, k[:, :8], v[:, :8], s), r"keys \(2, 8, 2, 8\).*of one batch"),
        (lambda q, k, v, s: (q, k, v[..., :4], s), r"values \(2, 16, 2, 4\).*and head_dim"),
        (lambda q, k, v, s: (q[:, :, :3], k, v, s), "3 heads of queries cannot share 2 of keys"),
        (lambda q, k, v, s: (q, k, v.astype(np.float16), s), "expected one floating dtype"),
        (lambda q, k, v, s: (q, k, v, s[:, :8]), r"segments of int32 \(2, 8\); expected integers"),
        (lambda q, k, v, s: (q, k, v, s == 1), "segments of bool .*; expected integers"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(change, said):
    q, k, v, segments, _ = draw(9, 2, np.float32)
    with scope(make_mesh("sequence=4"), RULES), pytest.raises(ShardingError, match=said):
        ring_attention(*change(q, k, v, segments))
