"""Precision: each dot under a policy, against numpy on operands rounded by ml_dtypes."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from fw.errors import FwError
from fw.models.bert import BertConfig, bert
from fw.optimizer import AdamW, optimizer
from fw.precision import apply
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import create, make_mesh, rules, shardings
from tests.marks import slow

# A failure shows its sizes as they are: to shrink them means to compile for minutes.
few = settings(derandomize=True, deadline=None, max_examples=3, phases=[Phase.generate])

DENSE = (
    "ik,kj->ij", "ki,kj->ij", "ik,jk->ij", "ki,jk->ji", "bik,kj->bij", "bki,jkl->bijl",
    "k,kj->j", "ik,k->i", "k,k->",
    "ikl,klj->ij", "bilk,jkl->bij", "kl,kl->",
)  # fmt: skip
BATCHED = (
    "bik,bkj->bij", "bik,bjk->bij", "bki,bkj->bij", "ibk,bkj->bij", "bk,bkj->bj", "bk,bk->b",
    "bihk,bjhk->bhij", "bhik,bkhj->bihj",
)  # fmt: skip


def rounded(x):
    return x.astype(ml_dtypes.bfloat16)


def kept(x):
    return x


def draw(subscripts, sizes, seed, dtype: Any = np.float32):
    """Random operands and a random cotangent of an einsum."""
    rng = np.random.default_rng(seed)
    terms = re.split(r",|->", subscripts)
    return [rng.normal(size=[sizes[c] for c in term]).astype(dtype) for term in terms]


def reference(subscripts, x, w, g, to):
    """The einsum and its two gradients in float64, and Σ |a| |b| of each for the error's bound."""
    a, b, out = re.split(r",|->", subscripts)
    x, w, g = (to(v).astype(np.float64) for v in (x, w, g))
    dots = ((subscripts, x, w), (f"{out},{b}->{a}", g, w), (f"{a},{out}->{b}", x, g))
    return [(np.einsum(s, p, q), np.einsum(s, abs(p), abs(q))) for s, p, q in dots]


def value_and_gradients(f, x, w, g):
    def run(x, w, g):
        out, pull = jax.vjp(f, x, w)
        return out, *pull(g)

    return jax.jit(run)(x, w, g)


def check(got, expected, terms, unit=2.0**-24):
    """Products are exact; a sum of n terms is off by n units in the last place at most."""
    for value, (exact, scale) in zip(got, expected, strict=True):
        assert value.shape == exact.shape
        assert np.all(np.abs(np.asarray(value, np.float64) - exact) <= (terms + 2) * unit * scale)


def dots(program):
    """All dots of a program and of the programs in it."""
    if isinstance(program, tuple | list):
        for part in program:
            yield from dots(part)
    program = getattr(program, "jaxpr", program)
    for eqn in getattr(program, "eqns", ()):
        if eqn.primitive.name == "dot_general":
            yield eqn
        yield from dots([*eqn.params.values()])


# --- one dot --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "subscripts", "to"),
    [
        *[("bf16", s, rounded) for s in DENSE],
        *[("bf16", s, kept) for s in BATCHED],
        *[("f32", s, kept) for s in (DENSE[0], DENSE[4], BATCHED[0], BATCHED[1], BATCHED[-1])],
    ],
)
@few
@given(st.lists(st.integers(1, 9), min_size=6, max_size=6), st.integers(0, 2**32 - 1))
def test_a_dot_and_its_gradients(policy, subscripts, to, sizes, seed):
    sizes = dict(zip("bhijkl", sizes, strict=True))
    x, w, g = draw(subscripts, sizes, seed)
    f = apply(lambda x, w: jnp.einsum(subscripts, x, w), policy)
    got = value_and_gradients(f, x, w, g)
    assert {v.dtype for v in got} == {np.dtype("float32")}
    check(got, reference(subscripts, x, w, g, to), terms=np.prod(sorted(sizes.values())[-4:]))


@pytest.mark.parametrize("subscripts", [DENSE[0], DENSE[2], BATCHED[0], BATCHED[1], BATCHED[-1]])
def test_float64_under_f32_stays_exact(subscripts):
    sizes = dict(zip("bhijkl", (2, 3, 5, 7, 32, 3), strict=True))
    with jax.enable_x64(True):
        x, w, g = draw(subscripts, sizes, 1, np.float64)
        got = value_and_gradients(apply(lambda *a: jnp.einsum(subscripts, *a), "f32"), x, w, g)
        assert {v.dtype for v in got} == {np.dtype("float64")}
    check(got, reference(subscripts, x, w, g, kept), terms=32, unit=2.0**-53)


@pytest.mark.parametrize("policy", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", ["int8", "int32", "bool", "complex64"])
def test_a_dot_that_is_not_of_floats_is_left_alone(policy, dtype):
    def f(x, w):
        wide = jnp.int32 if dtype == "int8" else None
        return jnp.dot(x, w, preferred_element_type=wide) if dtype != "bool" else x[0] & w[:, 0]

    rng = np.random.default_rng(0)
    x, w = (rng.integers(-9, 9, s).astype(dtype) for s in ((5, 5), (5, 5)))
    with jax.default_matmul_precision({"f32": "highest", "bf16": "default"}[policy]):
        plain = str(jax.make_jaxpr(f)(x, w))
    assert str(jax.make_jaxpr(apply(f, policy))(x, w)) == plain
    np.testing.assert_array_equal(apply(f, policy)(x, w), f(x, w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtypes_of_results_and_gradients_are_those_of_the_function(dtype):
    x, w = jnp.full((3, 4), 0.3, dtype), jnp.full((4, 5), 0.7, dtype)
    for policy in ("f32", "bf16"):
        got = value_and_gradients(apply(jnp.matmul, policy), x, w, jnp.ones((3, 5), dtype))
        assert [v.dtype for v in got] == [np.dtype(dtype)] * 3


@pytest.mark.parametrize(("i", "k", "j"), [(2, 0, 3), (0, 2, 3), (3, 2, 0)])
def test_an_empty_dot(i, k, j):
    x, w, g = draw("ik,kj->ij", {"i": i, "k": k, "j": j}, 0)
    got = value_and_gradients(apply(jnp.matmul, "bf16"), x, w, g)
    check(got, reference("ik,kj->ij", x, w, g, rounded), terms=k)


# --- dots inside other things ---------------------------------------------------------------------


def in_scan(f):
    return lambda x, w: lax.scan(lambda total, row: (total + 1, f(row, w)), 0, x)[1]


def in_cond(f):
    return lambda x, w: lax.cond(x[0, 0] > 1e9, lambda: jnp.zeros((4, 5)), lambda: f(x, w))


def in_switch(f):
    none = lambda x, w: jnp.zeros((4, 5))  # noqa: E731 a branch
    return lambda x, w: lax.switch(jnp.argmax(x) * 0 + 1, (none, f, none), x, w)


def in_while(f):
    """Forward only, as `while_loop` is."""

    def run(x, w):
        turn = lambda c: (c[0] + 1, f(x, w))  # noqa: E731 the body
        return lax.while_loop(lambda c: c[0] < 2, turn, (0, jnp.zeros((4, 5))))[1]

    return run


def in_shard_map(f):
    """Rows over four devices, and a collective, for which the mesh's axis must be bound."""

    def part(x, w):
        assert lax.axis_size("data") == 4
        return lax.psum(f(x, w), "tensor")

    mesh, rows = make_mesh("data=4"), jax.P("data")
    return jax.shard_map(part, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows)


INSIDE = {
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "checkpoint": jax.checkpoint,
    "scan": in_scan,
    "cond": in_cond,
    "switch": in_switch,
    "while": in_while,
    "shard_map": in_shard_map,
    "jit in scan in checkpoint": lambda f: jax.checkpoint(in_scan(jax.jit(f))),
    "scan in cond in jit": lambda f: jax.jit(in_cond(in_scan(f))),
}


@pytest.mark.parametrize("order", ["policy outside", "policy inside"])
@pytest.mark.parametrize("inside", INSIDE)
def test_dots_are_found_inside(inside, order):
    around = INSIDE[inside]
    x, w, g = draw("ik,kj->ij", {"i": 4, "k": 6, "j": 5}, 2)
    dot = jnp.dot
    f = apply(around(dot), "bf16") if order == "policy outside" else around(apply(dot, "bf16"))
    expected = reference("ik,kj->ij", x, w, g, rounded)
    if inside == "while":
        check([jax.jit(f)(x, w)], expected[:1], terms=6)
        return
    check(value_and_gradients(f, x, w, g), expected, terms=6)
    again = jax.checkpoint(lambda x, w: (f(x, w) * g).sum())
    check(jax.jit(jax.grad(again, (0, 1)))(x, w), expected[1:], terms=6)


def test_a_gradient_taken_inside_is_transformed_too():
    x, w, g = draw("ik,kj->ij", {"i": 4, "k": 6, "j": 5}, 3)
    inside = apply(jax.jit(jax.grad(lambda x, w: (jnp.dot(x, w) * g).sum(), (0, 1))), "bf16")
    check(inside(x, w), reference("ik,kj->ij", x, w, g, rounded)[1:], terms=6)


def test_an_operand_that_the_compiler_would_turn_round_runs():
    """Folded into a bfloat16 dot, the transpose in this gather fails at run time on a CPU."""
    rng = np.random.default_rng(0)
    vectors, kernel = rng.normal(size=(64, 10, 8)), rng.normal(size=(45, 16))
    first, second = np.tril_indices(10, -1)

    def fn(vectors, kernel):
        pairs = jnp.einsum("bfd,bgd->bfg", vectors, vectors)[:, first, second]
        return jnp.sum(jnp.square(jax.nn.relu(pairs) @ kernel))

    args = vectors.astype(np.float32), kernel.astype(np.float32)
    want = jax.grad(fn, (0, 1))(*args)
    got = jax.jit(jax.grad(apply(fn, "bf16"), (0, 1)))(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def test_vmap_of_gradients():
    x, w, g = draw("ik,kj->ij", {"i": 4, "k": 6, "j": 5}, 4)
    f = lambda row, w: (apply(jnp.dot, "bf16")(row, w) * g[0]).sum()  # noqa: E731
    each = jax.jit(jax.vmap(jax.grad(f, 1), (0, None)))(x, w)
    exact = rounded(x).astype(np.float64)[:, :, None] * rounded(g[0]).astype(np.float64)
    np.testing.assert_allclose(each, exact, rtol=2.0**-22)


def test_arguments_by_keyword_static_ones_and_closures():
    x, w, g = draw("ik,kj->ij", {"i": 4, "k": 6, "j": 5}, 5)
    expected = reference("ik,kj->ij", x, w, g, rounded)

    def f(tree, *, kernel, mode, none=None):
        assert none is None
        return {"out": tree["x"] @ kernel, "mode": jnp.ones(())} if mode == "train" else None

    out = apply(f, "bf16")({"x": jnp.asarray(x)}, kernel=jnp.asarray(w), mode="train")
    assert out is not None
    check([out["out"]], expected[:1], terms=6)
    assert apply(f, "bf16")({"x": jnp.asarray(x)}, kernel=jnp.asarray(w), mode="eval") is None

    def closed_over(w):  # the tracer of w enters as a constant of the traced function
        return (apply(lambda x: in_scan(jnp.dot)(x, w), "bf16")(x) * g).sum()

    check([jax.jit(jax.grad(closed_over))(w)], expected[2:], terms=6)


@jax.custom_vjp
def own(x, w):
    return x @ w


own.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, _: (jnp.full_like(saved[0], 7.0), jnp.full_like(saved[1], 3.0)),
)


@pytest.mark.parametrize("inside", ["jit", "checkpoint", "cond"])
def test_a_derivative_written_by_hand_is_kept(inside):
    x, w, g = draw("ik,kj->ij", {"i": 4, "k": 6, "j": 5}, 6)
    out, dx, dw = value_and_gradients(apply(INSIDE[inside](own), "bf16"), x, w, g)
    check([out], reference("ik,kj->ij", x, w, g, kept)[:1], terms=6)
    assert np.all(dx == 7) and np.all(dw == 3)


@pytest.mark.parametrize("f", [jax.nn.relu, jax.nn.silu, jax.nn.gelu, jax.nn.softmax])
def test_functions_with_a_custom_jvp_have_their_gradient(f):
    x, w, g = draw("ik,kj->ij", {"i": 4, "k": 6, "j": 5}, 7)
    got = value_and_gradients(apply(lambda x, w: f(x @ w), "f32"), x, w, g)
    for a, b in zip(got, value_and_gradients(lambda x, w: f(x @ w), x, w, g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_unknown_policy_is_refused():
    with pytest.raises(FwError, match=r"'fp8' is unknown; choose one of f32, bf16"):
        apply(jnp.dot, "fp8")


# --- programs -------------------------------------------------------------------------------------

# 16 labels: a product over three of them is too small for XLA to leave it in bfloat16.
CONFIG = BertConfig(64, 64, 1, 4, 128, num_labels=16, task="token_classification")
DENSE_LAYERS = 6 * CONFIG.num_hidden_layers + 1


def abstract_batch(rows, length):
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return dict.fromkeys(("input_ids", "segment_ids", "position_ids", "labels"), ids)


def test_f32_asks_for_the_highest_precision_in_forward_and_backward():
    model = bert(CONFIG)
    forward = apply(jax.checkpoint(functools.partial(model.apply, train=True)), "f32")
    loss = lambda v, batch, key: forward(v, batch, key=key)[0].sum()  # noqa: E731
    variables, key = jax.eval_shape(model.init, jax.random.key(0)), jax.random.key(0)
    program = jax.make_jaxpr(jax.grad(loss))(variables, abstract_batch(4, 8), key)
    found = [eqn.params["precision"] for eqn in dots(program)]
    assert len(found) >= 3 * DENSE_LAYERS - 1
    assert set(found) == {(lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_layouts_are_pinned_on_a_cpu_only(platform):
    f = jax.jit(jax.grad(lambda w, x: (apply(jnp.matmul, "bf16")(x, w)).sum()))
    lowered = f.trace(jnp.ones((6, 5)), jnp.ones((4, 6)))
    assert "LayoutConstraint" in lowered.lower(lowering_platforms=("cpu",)).as_text()
    assert "LayoutConstraint" not in lowered.lower(lowering_platforms=(platform,)).as_text()


def hlo_dots(text):
    """(operand dtypes, result dtype, has batch axes, in a YNNPACK fusion, name) of every dot."""
    fast = set(re.findall(r'fusion\(.*calls=%([\w.]+),.*"kind":"__ynn_fusion"', text))
    for computation in re.split(r"\n(?=\S)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.-]+)", computation)
        types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", computation))
        dot = r"= (\w+)\[\S* dot\(%([\w.-]+), %([\w.-]+)\)(.*)"
        for out, lhs, rhs, rest in re.findall(dot, computation):
            batched = "lhs_batch_dims" in rest
            op_name = re.findall(r'op_name="([^"]*)"', rest)[0]
            yield (types[lhs], types[rhs]), out, batched, name and name[1] in fast, op_name


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its CPU compiler lacks these dots")
@pytest.mark.parametrize("mesh", [slow("data=1"), "data=2,fsdp=2,tensor=2"])
def test_the_compiled_bf16_step_runs_its_dots_on_the_fast_path(mesh):
    mesh, table = make_mesh(mesh), rules()
    model, key = bert(CONFIG), jax.random.key(0)
    where = shardings(model.axes, jax.eval_shape(model.init, key), mesh, table)
    tx = optimizer(AdamW(), 10)
    state = initial_state(create(model.init, key, shardings=where), tx, mesh)
    step = make_step(model, cross_entropy, tx, mesh=mesh, rules=table, precision="bf16")
    lowered = step.lower(state, abstract_batch(16, 32))
    quick = {"xla_backend_optimization_level": "0"}  # of the machine code, which nobody reads here
    found = list(hlo_dots(lowered.compile(compiler_options=quick).as_text()))
    weights = [(types, out) for types, out, batched, *_ in found if not batched]
    backward = [name for *_, batched, _, name in found if not batched and "transpose(" in name]
    # Each layer has one product forward and two backward; all of them multiply bf16 into f32.
    assert set(weights) == {(("bf16", "bf16"), "f32")}
    assert (len(weights), len(backward)) == (3 * DENSE_LAYERS, 2 * DENSE_LAYERS)
    slow = [name for *_, fast, name in found if not fast]
    assert not slow
