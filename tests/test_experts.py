"""Experts: against a loop over tokens in float64, the same on every mesh, lean on the wire."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fw import precision
from fw.errors import FwError
from fw.model import from_nnx
from fw.models.experts import Experts, ExpertsConfig, mlp, router_logits
from sharding import ShardingError, create, gather, inspect, make_mesh, put, rules, scope, shardings
from sharding.parallel.experts import experts
from sharding.parallel.routing import balance_loss, queue, route, z_loss
from sharding.parallel.rows import Expert, grouped
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

NUMBER, K, SIZE, INNER = 8, 2, 6, 8
AXES = {"up": ("experts", "embed", None, "mlp"), "down": ("experts", "mlp", "embed")}
few = settings(derandomize=True, deadline=None, max_examples=20)
seeds = st.integers(0, 2**32 - 1)

routed = jax.jit(route, static_argnames=("k", "renormalize"))
queued = jax.jit(queue, static_argnames="priority")


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def parameters(seed, number=NUMBER, parts=2):
    up = normal(seed, number, SIZE, parts, INNER, scale=0.5)
    return {"up": up, "down": normal(seed + 1, number, INNER, SIZE, scale=0.5)}


def expert_np(params, e, x):
    """SwiGLU of one token, in numpy."""
    gate, value = np.einsum("d,dpf->pf", x, params["up"][e])
    return (gate / (1 + np.exp(-gate)) * value) @ params["down"][e]


def softmax_np(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def choose_np(logits, k):
    """The k largest, of equal ones the lower."""
    return np.argsort(-logits, axis=-1, kind="stable")[..., :k]


def kept_np(chosen, weights, group, most, priority, number):
    """Who finds a place, one choice after another."""
    batch, length, k = chosen.shape
    kept = np.zeros(chosen.shape, bool)
    for b in range(batch):
        for start in range(0, length, group):
            line = [(r, t) for r in range(k) for t in range(start, start + group)]
            if priority == "weight":
                line.sort(key=lambda rt: -weights[b, rt[1], rt[0]])
            taken = np.zeros(number + 1, int)
            for r, t in line:
                e = chosen[b, t, r]
                kept[b, t, r] = e < number and taken[e] < most
                taken[e] += 1
    return kept


def layer_np(params, x, logits, k, *, capacity=None, group=None, priority="order", mask=None):
    """The whole layer as loops over tokens and their choices."""
    number, group = logits.shape[-1], group or x.shape[1]
    chosen = choose_np(logits, k)
    weights = np.take_along_axis(softmax_np(logits), chosen, -1)
    weights /= weights.sum(-1, keepdims=True)
    if mask is not None:
        chosen = np.where(mask[..., None], chosen, number)
    most = group if capacity is None else math.ceil(k * group / number * capacity)
    kept = kept_np(chosen, weights, group, most, priority, number)
    y = np.zeros_like(x)
    for b, t, r in np.argwhere(kept):
        y[b, t] += weights[b, t, r] * expert_np(params, chosen[b, t, r], x[b, t])
    return y, kept


# --- routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "k"), [(1, 1), (4, 4), (9, 3)])
@few
@given(seeds)
def test_route_takes_the_largest_and_of_equal_ones_the_lower(number, k, seed):
    # Few distinct values, so that many are equal.
    logits = np.random.default_rng(seed).integers(-2, 3, (3, 5, number)).astype(np.float32)
    mask: Any = np.random.default_rng(seed).random((3, 5)) < 0.7
    chosen, p = choose_np(logits, k), softmax_np(logits.astype(np.float64))
    weights = np.take_along_axis(p, chosen, -1)
    plain = routed(logits, k, renormalize=False)
    masked = routed(logits, k, mask=mask)
    np.testing.assert_array_equal(plain.experts, chosen)
    np.testing.assert_allclose(plain.weights, weights, rtol=1e-6)
    np.testing.assert_array_equal(masked.experts, np.where(mask[..., None], chosen, number))
    expected = weights / weights.sum(-1, keepdims=True) * mask[..., None]
    np.testing.assert_allclose(masked.weights, expected, rtol=1e-6)
    assert masked.weights.dtype == np.float32
    assert masked.experts.dtype == np.int32


@pytest.mark.parametrize("k", [1, 2])
def test_losses_and_their_derivatives(k):
    logits = normal(0, 3, 7, 5)
    mask: Any = np.random.default_rng(1).random((3, 7)) < 0.8
    share = np.bincount(choose_np(logits, k)[mask].ravel(), minlength=5) / (mask.sum() * k)

    def balance(logits):
        return 5 * share @ softmax_np(logits)[mask].mean(0)

    def z(logits):
        return np.mean(np.log(np.exp(logits).sum(-1))[mask] ** 2)

    with jax.enable_x64(True):
        for ours, theirs in ((balance_loss, balance), (z_loss, z)):
            f = lambda logits, ours=ours: ours(route(logits, k, mask=mask))  # noqa: E731
            value, gradient = jax.value_and_grad(f)(logits)
            along = normal(2, *logits.shape)
            slope = (theirs(logits + 1e-6 * along) - theirs(logits - 1e-6 * along)) / 2e-6
            np.testing.assert_allclose(value, theirs(logits), rtol=1e-13)
            # A difference of numbers about 1 is as far off as their last bit by the step.
            np.testing.assert_allclose(np.sum(gradient * along), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("priority", ["order", "weight"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 12, 5, 2), (3, 4, 3, 3)])
@few
@given(seeds)
def test_queue_gives_each_choice_its_place(shape, priority, seed):
    groups, tokens, number, k = shape
    random = np.random.default_rng(seed)
    chosen = choose_np(random.normal(size=(groups, tokens, number)), k).astype(np.int32)
    weights = random.integers(0, 4, chosen.shape).astype(np.float32)
    place = np.asarray(queued(chosen, weights, priority))
    for most in range(tokens + 1):
        expected = kept_np(chosen, weights, tokens, most, priority, number)
        np.testing.assert_array_equal(place < most, expected)


# --- rows -----------------------------------------------------------------------------------------


def tanh_expert(w, x):
    return jnp.tanh(x @ w)


def tanh_experts(w, x, sizes):
    in_groups = jnp.arange(len(x))[:, None] < jnp.sum(
        sizes
    )  # elsewhere, kernels leave what was there
    return jnp.where(in_groups, jnp.tanh(jax.lax.ragged_dot(x, w, sizes)), jnp.nan)


WAYS = {"blocks": tanh_expert, "ragged": Expert(tanh_expert, tanh_experts)}


@partial(jax.jit, static_argnums=0)
def grouped_and_gradients(way, w, x, ids, c):
    y, back = jax.vjp(lambda w, x: grouped(WAYS[way], w, x, ids), w, x)
    return y, *back(c)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "number"), [(1, 3), (40, 1), (40, 4), (7, 9)])
@few
@given(seeds)
def test_grouped_applies_to_each_row_its_own_expert(rows, number, way, seed):
    random = np.random.default_rng(seed)
    x, w = random.normal(size=(rows, 3)), random.normal(size=(number, 3, 2))
    # From all rows of one expert to all kinds; some rows of none.
    ids = random.integers(0, random.integers(1, number + 1) + 1, rows).astype(np.int32)
    c = random.normal(size=(rows, 2))
    whole = np.concatenate([w, np.zeros((1, 3, 2))])[ids]
    with jax.enable_x64(True):
        y, dw, dx = grouped_and_gradients(way, w, x, ids, c)
    expected = np.tanh(np.einsum("nd,ndf->nf", x, whole))
    np.testing.assert_allclose(y, expected, atol=1e-14)
    inner = c * (1 - expected**2) * (ids < number)[:, None]
    np.testing.assert_allclose(dx, np.einsum("nf,ndf->nd", inner, whole), atol=1e-13)
    for e in range(number):
        mine = ids == e
        np.testing.assert_allclose(dw[e], x[mine].T @ inner[mine], atol=1e-13)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_grouped_is_one_call_under_vmap(own):
    w, x = normal(0, 2, 3, 4, 3, 2), normal(1, 2, 3, 10, 3)
    ids = np.random.default_rng(2).integers(0, 5, (2, 3, 10)).astype(np.int32)
    w = w if own else w[0, 0]
    blocks = []

    def fn(w, x):
        blocks.append(x.shape[0])
        return jnp.tanh(x @ w)

    def plain(w, x, ids):
        every = jnp.tanh(jnp.einsum("nd,edf->nef", x, w))
        return jnp.einsum("nef,ne->nf", every, jax.nn.one_hot(ids, 4, dtype=x.dtype))

    def loss(call, w, x):
        for _ in range(2):
            call = jax.vmap(call, (0 if own else None, 0, 0))
        return jnp.sum(call(w, x, ids) ** 2)

    with jax.enable_x64(True):
        found, expected = (
            jax.jit(jax.value_and_grad(partial(loss, call), (0, 1)))(w, x)
            for call in (partial(grouped, fn), plain)
        )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), found, expected)
    # Half of what an expert gets on average, of all 60 rows: of 10 it would be 2.
    assert own or max(blocks) == 8


# --- the layer on one device ----------------------------------------------------------------------


ONE = {
    "all": ((2, 8), 2, {}),
    "all of one each": ((3, 1), 3, {"capacity": 1.0}),
    "row": ((2, 8), 2, {"capacity": 0.5}),
    "group": ((1, 9), 1, {"capacity": 1.1, "group": 3}),
    "weight": ((2, 8), 2, {"capacity": 1.0, "group": 4, "priority": "weight"}),
    "room for all": ((2, 8), 2, {"capacity": 100.0}),
}


@pytest.mark.parametrize("case", ONE)
@settings(few, max_examples=8)
@given(seeds)
def test_one_device_against_loops(case, seed):
    shape, k, options = ONE[case]
    number = 5
    params, x = parameters(seed, number), normal(seed + 2, *shape, SIZE)
    logits = normal(seed + 3, *shape, number, scale=2.0)
    mask = np.random.default_rng(seed).random(shape) < 0.7
    with jax.enable_x64(True):
        y, load = one_device(params, x, logits, mask, k, **options)
    expected, kept = layer_np(params, x, logits, k, mask=mask, **options)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_array_equal(load.kept, kept)
    np.testing.assert_array_equal(
        load.tokens, np.bincount(choose_np(logits, k)[kept], minlength=number)
    )
    total = mask.sum() * k
    np.testing.assert_allclose(load.dropped, (total - kept.sum()) / max(total, 1), atol=1e-15)


@partial(jax.jit, static_argnums=4, static_argnames=("capacity", "group", "priority"))
def one_device(params, x, logits, mask, k, **options):
    return experts(mlp, params, x, route(logits, k, mask=mask), **options)


# --- on every mesh --------------------------------------------------------------------------------

MODES = {
    "all": {},
    "row": {"capacity": 1.25},
    "group": {"capacity": 1.0, "group": 4, "priority": "weight"},
}
BATCH, LENGTH = 8, 16
X, C = normal(2, BATCH, LENGTH, SIZE), normal(4, BATCH, LENGTH, SIZE)
ROUTER = normal(3, SIZE, NUMBER)
FIRST = np.eye(1, NUMBER)[0]  # times a skew, it sends every token to the first expert


def loss(params, x, router, skew, c: Any = C, **options):
    """Everything that has a gradient."""
    routing = route(router_logits(x, router) + (skew * FIRST).astype(x.dtype), K)
    y, load = experts(mlp, params, x, routing, axes=AXES, **options)
    return jnp.sum(y * c) + balance_loss(routing) + z_loss(routing), (y, load)


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def dense(params, x, router, skew, chosen, kept):
    """The same by every expert on every token, with the choices that were made and kept."""
    p = jax.nn.softmax(logits := x @ router + skew * FIRST)
    chosen = jax.nn.one_hot(chosen, NUMBER, dtype=x.dtype)
    top = jnp.einsum("blke,ble->blk", chosen, p)
    weights = jnp.einsum("blke,blk->ble", chosen, top / top.sum(-1, keepdims=True) * kept)
    h = jnp.einsum("bld,edpf->blepf", x, params["up"])
    every = jnp.einsum("blef,efd->bled", jax.nn.silu(h[..., 0, :]) * h[..., 1, :], params["down"])
    y = jnp.einsum("bled,ble->bld", every, weights)
    balance = NUMBER * jnp.sum(chosen.mean((0, 1, 2)) * p.mean((0, 1)))
    z = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    return jnp.sum(y * C) + balance + z, y


def expected(params, skew, options, x=X):
    """(value, y, kept, gradients) of `loss`: choices by numpy, the rest by `dense`."""
    logits = x @ ROUTER + skew * FIRST
    _, kept = layer_np(params, x, logits, K, **options)
    (value, y), gradients = dense(params, x, ROUTER, skew, choose_np(logits, K), kept * 1.0)
    return value, y, kept, gradients


def on_mesh(spec, params, x: Any = X, router: Any = ROUTER):
    """(mesh, rules) and the arrays where they belong."""
    mesh, layout = make_mesh(spec), rules()
    tree = {"experts": params, "router": router}
    where = shardings({"experts": AXES, "router": ("embed", None)}, tree, mesh, layout)
    placed = jax.device_put(tree, where)
    x = put(x, mesh, layout, ("batch", "length", None))
    return (mesh, layout), placed["experts"], x, placed["router"]


def assert_close(found, wanted, tolerance=1e-11):
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, gather(found), gather(wanted))


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        ("data=1", "all"),
        ("expert=4", "row"),
        ("expert=8", "all"),
        ("expert=8", "group"),
        ("data=2,expert=2,tensor=2", "all"),
        slow("fsdp=2,expert=2,sequence=2", "all"),
        ("fsdp=2,expert=2,sequence=2", "row"),
        slow("fsdp=2,expert=2,tensor=2", "all"),
        ("data=2,sequence=2,tensor=2", "group"),
    ],
)
def test_the_mesh_never_changes_the_result(spec, mode):
    params, options = parameters(0), MODES[mode]
    with jax.enable_x64(True):
        place, *args = on_mesh(spec, params)
        step = jax.jit(jax.value_and_grad(partial(loss, **options), (0, 1, 2), has_aux=True))
        for skew in (0.0, 50.0):
            with scope(*place):
                (value, (y, load)), gradients = step(*args, skew)
            value_0, y_0, kept, gradients_0 = expected(params, skew, options)
            np.testing.assert_array_equal(load.kept, kept)
            assert kept.all() == (mode == "all")
            assert int(load.tokens.sum()) == kept.sum()
            assert skew == 0 or int(load.tokens[0]) == kept[..., 0].sum()
            assert_close((value, y, gradients), (value_0, y_0, gradients_0))


@pytest.mark.parametrize("mode", ["all", "group"])
def test_a_group_may_lie_across_devices(mode):
    # Groups of 12 where devices hold 8 tokens of a row of 24.
    options = MODES[mode] | ({} if mode == "all" else {"group": 12})
    params, x = parameters(0), normal(2, 2, 24, SIZE)
    with jax.enable_x64(True):
        place, *args = on_mesh("expert=2,sequence=3", params, x)
        with scope(*place):
            _, (y, load) = jax.jit(partial(loss, **options))(*args, 0.0, 1.0)
    y_0, kept = layer_np(params, x, x @ ROUTER, K, **options)
    np.testing.assert_array_equal(load.kept, kept)
    assert_close(y, y_0)


def turns(f):
    """The mean of two turns of a loop, each computed again in the backward pass."""
    f = jax.checkpoint(f)
    return lambda *a: jax.lax.scan(lambda t, _: (t + f(*a), None), 0.0, None, 2)[0] / 2


def rows(f):
    """The mean over a mapped axis, with shared experts: microbatches."""
    return lambda p, x: jax.vmap(f, (None, 0))(p, jnp.stack([x, x])).mean()


@pytest.mark.parametrize(("wrap", "mode"), [slow(turns, "all"), slow(rows, "all"), (rows, "row")])
def test_under_transforms(wrap, mode):
    params, skew = parameters(0), 2.0
    with jax.enable_x64(True):
        place, params_on, x_on, _ = on_mesh("expert=4", params)
        f = lambda params, x: loss(params, x, ROUTER, skew, **MODES[mode])[0]  # noqa: E731
        with scope(*place):
            found = jax.jit(jax.value_and_grad(wrap(f), (0, 1)))(params_on, x_on)
        value, _, _, gradients = expected(params, skew, MODES[mode])
        assert_close(found, (value, gradients[:2]))


@pytest.mark.parametrize("mode", [slow("all"), "row"])
def test_stages_of_a_pipeline(mode):
    """`vmap` over stages that lie on `pipe`, as the pipeline does it: each has its own experts."""
    stages = [parameters(10 * s) for s in range(2)]
    params, x = jax.tree.map(lambda *leaves: np.stack(leaves), *stages), np.stack([X, X[::-1]])
    # The first stage's tokens are uneven, so it needs more rounds than the second.
    skews = np.array([50.0, 0.0])

    def total(params, x):
        f = jax.checkpoint(lambda p, x, skew: loss(p, x, ROUTER, skew, **MODES[mode])[0])
        return jax.vmap(f, spmd_axis_name="pipe")(params, x, skews).sum()

    mesh, layout = make_mesh("pipe=2,expert=2,tensor=2"), rules()
    axes = jax.tree.map(lambda names: ("layers", *names), AXES, is_leaf=lambda a: type(a) is tuple)
    with jax.enable_x64(True):
        placed = jax.device_put(params, shardings(axes, params, mesh, layout))
        x_on = put(x, mesh, layout, ("layers", "batch", "length", None))
        with scope(mesh, layout, mapped=["pipe"]):
            step = jax.jit(jax.value_and_grad(total, (0, 1))).lower(placed, x_on).compile()
        value, (g_params, g_x) = gather(step(placed, x_on))
        alone = [expected(stages[s], skews[s], MODES[mode], x[s]) for s in range(2)]
        assert_close(value, sum(one[0] for one in alone))
        for s, one in enumerate(alone):
            assert_close((jax.tree.map(lambda g: g[s], g_params), g_x[s]), one[3][:2])  # noqa: B023
    along = [c for c in collectives(step.as_text()) if "pipe" in c["axes"]]
    assert all(c["kind"] == "all-reduce" and c["bytes"] <= 16 for c in along)  # the total


# --- on the wire ----------------------------------------------------------------------------------

BYTES = {"f32": 4, "s32": 4, "pred": 1}


def collectives(text):
    """The collectives of a compiled program on 4 or 8 devices: kind, axes, bytes of the result."""
    found = []
    for line in text.splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)"
            r"(?:-start)?\(.*?replica_groups=(?:mesh\[(.*?)\] \{(.*?)\}|\S+)",
            line,
        )
        if match is None:
            continue
        shapes = re.findall(r"(f64|f32|s32|pred)\[([\d,]*)\]", match[1])
        size = sum(
            BYTES.get(kind, 8) * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in shapes
        )
        loop = "/while/" in line.partition("op_name=")[2]
        found.append({"kind": match[2], "axes": match[4] or "", "bytes": size, "loop": loop})
    return found


@pytest.mark.parametrize(("capacity", "factor"), [(None, 1.0), (1.25, 1.25)])
def test_only_tokens_travel_and_no_more_than_must(capacity, factor):
    batch, length, size, inner, devices = 8, 64, 32, 48, 4
    params = {
        "up": normal(0, NUMBER, size, 2, inner).astype(np.float32),
        "down": normal(1, NUMBER, inner, size).astype(np.float32),
    }
    x, router = normal(2, batch, length, size), normal(3, size, NUMBER)
    place, *args = on_mesh("expert=4", params, x.astype(np.float32), router.astype(np.float32))
    with scope(*place):
        one = np.float32(1)

        def f(params, x, router):
            return loss(params, x, router, 0 * one, one, capacity=capacity)[0]

        step = jax.grad(f, (0, 1, 2))
        text = jax.jit(step).lower(*args).compile().as_text()
    found = collectives(text)
    # Every choice of a device's tokens, a row each; a share of 1 / n stays where it is.
    least = factor * K * batch * length // devices * size * 4 * (devices - 1) / devices
    sent = [
        c["bytes"] * (devices - 1) / devices
        for c in found
        if c["kind"] == "all-to-all" and not c["loop"]
    ]
    assert len(sent) == 4  # there and back, forward and backward
    assert least <= sum(sent) / 4 <= 1.05 * least
    in_rounds = [c["bytes"] for c in found if c["loop"]]
    assert len(in_rounds) == (0 if capacity else 5)
    assert all(8 * n * (devices - 1) / devices <= 1.05 * least for n in in_rounds)
    # Beside them the counts, the scalars of the losses and the router's gradient: no tokens and
    # no experts.
    other = [c for c in found if c["kind"] != "all-to-all"]
    assert all(c["bytes"] <= 2 * router.size * 4 for c in other)
    assert not any(c["kind"] == "reduce-scatter" for c in other)


def test_parameters_travel_once_each_way_and_only_over_fsdp():
    wide = {"up": normal(0, NUMBER, SIZE, 2, 32), "down": normal(1, NUMBER, 32, SIZE)}
    narrow = jax.tree.map(lambda a: a.astype(np.float32), (wide, X, ROUTER))
    place, *args = on_mesh("fsdp=2,expert=2,tensor=2", *narrow)
    where = jax.tree.map(lambda a: a.sharding, tuple(args))

    def f(params, x, router):
        return loss(params, x, router, np.float32(0), np.float32(1), capacity=1.0)[0]

    with scope(*place):
        step = jax.jit(jax.grad(f, (0, 1, 2)), out_shardings=where)
        found = collectives(step.lower(*args).compile().as_text())
    large = [c for c in found if c["bytes"] > ROUTER.size * 4]
    whole = sorted(leaf.size * 4 // 4 for leaf in jax.tree.leaves(narrow[0]))  # of one device
    sizes = {
        kind: sorted(c["bytes"] for c in large if c["kind"] == kind and c["axes"] == "'fsdp'")
        for kind in ("all-gather", "reduce-scatter")
    }
    assert sizes == {"all-gather": whole, "reduce-scatter": [n // 2 for n in whole]}
    # Beside them tokens, to experts and back, and the sums of a product that `tensor` cuts.
    others = [c for c in large if c["axes"] != "'fsdp'"]
    assert {c["kind"] for c in others} == {"all-to-all", "all-reduce"}
    exchanges = [c["bytes"] for c in others if c["kind"] == "all-to-all"]
    assert len(exchanges) == 4
    assert len(set(exchanges)) == 1
    # One sum forward and one backward, which the compiler may make into one collective.
    sums = sum(c["bytes"] for c in others if c["kind"] == "all-reduce")
    assert sums == 2 * exchanges[0]


def test_parameters_in_bfloat16_are_reduced_in_float32():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), parameters(0))
    x, router = X.astype(jnp.bfloat16), ROUTER
    router = router.astype(np.float32)
    place, *args = on_mesh("fsdp=2,expert=2,sequence=2", params, x, router)

    def f(params, x, router):
        y, _ = experts(mlp, params, x, route(router_logits(x, router), K), axes=AXES, capacity=2.0)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    with scope(*place):
        found = gather(jax.jit(jax.grad(f))(*args))
    wide = jax.tree.map(lambda a: a.astype(np.float32), (params, x))
    exact = jax.jit(jax.grad(f))(*wide, router)
    for name, gradient in found.items():
        assert gradient.dtype == jnp.bfloat16
        error = np.abs(gradient.astype(np.float32) - exact[name]).max()
        assert error < 0.03 * np.abs(exact[name]).max()


# --- the model's layer ----------------------------------------------------------------------------

CONFIG = ExpertsConfig(number=NUMBER, chosen=K, size=SIZE, inner_size=INNER, std=0.5)


def as_model(config):
    return from_nnx(
        config,
        lambda rngs: Experts(config, rngs),
        lambda module, batch, key, train: module(batch["x"], batch.get("mask")),
    )


def test_the_layer_names_its_axes_and_is_the_same_on_a_mesh():
    model = as_model(ExpertsConfig(**{**vars(CONFIG), "capacity": 1.0}))
    assert model.axes["params"] == {
        "router": ("embed", None),
        "up": ("experts", "embed", None, "mlp"),
        "down": ("experts", "mlp", "embed"),
    }
    mask = np.random.default_rng(0).random((BATCH, LENGTH)) < 0.8
    batch = {"x": X, "mask": mask}
    mesh, layout = make_mesh("fsdp=2,expert=2,tensor=2"), rules()
    with jax.enable_x64(True):
        key = jax.random.key(0)
        where = shardings(model.axes, jax.eval_shape(model.init, key), mesh, layout)
        with scope(mesh, layout):
            variables = create(model.init, key, shardings=where)
            (y, aux), _ = jax.jit(model.apply)(variables, put(batch, mesh, layout))
    p = gather(variables)["params"]
    logits = X @ p["router"]
    y_0, kept = layer_np(p, X, logits, K, capacity=1.0, mask=mask)
    assert_close(y, y_0)
    np.testing.assert_array_equal(aux.load.kept, kept)
    assert not gather(y)[~mask].any()
    share = np.bincount(choose_np(logits, K)[mask].ravel(), minlength=NUMBER) / mask.sum() / K
    assert_close(aux.balance, NUMBER * share @ softmax_np(logits)[mask].mean(0))
    assert_close(aux.z, np.mean(np.log(np.exp(logits[mask]).sum(-1)) ** 2))


def test_gelu_experts_chosen_one_a_token():
    """The Switch Transformer's: one expert, weighted by its probability."""
    change = {"activation": "gelu", "chosen": 1, "renormalize": False}
    with jax.enable_x64(True):
        layer = Experts(ExpertsConfig(**{**vars(CONFIG), **change}), nnx.Rngs(0))
        y, _ = jax.jit(layer.__call__)(X)
        up, down = np.asarray(layer.up[...])[:, :, 0], np.asarray(layer.down[...])
        p = softmax_np(X @ np.asarray(layer.router[...]))
    best = p.argmax(-1)
    hidden = np.einsum("bld,bldf->blf", X, up[best])
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    assert_close(y, np.einsum("blf,blfd->bld", hidden, down[best]) * p.max(-1)[..., None], 1e-12)


@pytest.mark.parametrize("capacity", [slow(None), 1.0])
def test_a_precision_policy_rounds_the_experts_and_not_the_router(capacity):
    """Mapped over experts, a product has a batch axis; rounded it is as that of one expert."""
    model = as_model(ExpertsConfig(**{**vars(CONFIG), "capacity": capacity}))
    variables, batch = model.init(jax.random.key(0)), {"x": X.astype(np.float32)}
    p, x = variables["params"], batch["x"]
    (y, aux), _ = jax.jit(model.apply)(variables, batch)
    with scope(make_mesh("expert=4"), rules()):
        (low, aux_low), _ = jax.jit(precision.apply(model.apply, "bf16"))(variables, batch)
    np.testing.assert_array_equal(aux_low.load.kept, aux.load.kept)
    assert_close((aux_low.balance, aux_low.z), (aux.balance, aux.z), 1e-6)
    rounded = jax.jit(precision.apply(mlp, "bf16"))
    outs = [
        rounded({"up": p["up"][e], "down": p["down"][e]}, x.reshape(-1, SIZE)) for e in range(8)
    ]
    routing = route(router_logits(x, p["router"]), K, renormalize=CONFIG.renormalize)
    share = (
        jax.nn.one_hot(routing.experts, NUMBER)
        * jnp.where(aux.load.kept, routing.weights, 0.0)[..., None]
    )
    expected = jnp.einsum("blke,eblf->blf", share, jnp.stack(outs).reshape(NUMBER, *x.shape))
    assert_close(low, expected, 1e-5)
    assert np.abs(low - y).max() > 1e-3


@pytest.mark.parametrize("capacity", [slow(None), 1.0])
def test_what_is_rounded_travels_rounded(capacity):
    """To the experts, and its gradient from them; the result is what it is on one device."""
    model = as_model(ExpertsConfig(**{**vars(CONFIG), "capacity": capacity}))
    start, x = model.init(jax.random.key(0)), X.astype(np.float32)
    mesh, layout = make_mesh("fsdp=2,expert=4"), rules()

    def loss(variables, x):
        return jnp.sum(jnp.square(model.apply(variables, {"x": x})[0][0]))

    def graded(policy, *args):
        return jax.jit(jax.grad(precision.apply(loss, policy), (0, 1))).lower(*args).compile()

    exact, rounded = (graded(policy, start, x)(start, x) for policy in ("f32", "bf16"))
    placed = jax.device_put(start, shardings(model.axes, start, mesh, layout)), put(x, mesh, layout)
    with scope(mesh, layout, differentiate=True):
        step = graded("bf16", *placed)
    for one, alone, best in zip(
        *map(jax.tree.leaves, (step(*placed), rounded, exact)), strict=True
    ):
        away = np.abs(alone - best).max()
        assert away > 0 and np.abs(one - alone).max() < away / 3
    found = [c for c in inspect(step).collectives if c.known]  # others: rounds for uneven choices
    exchanged = sorted(c.dtype for c in found if c.kind == "all-to-all")
    assert exchanged == ["f32", "f32", "u16", "u16"]  # there, back; and so do gradients
    assert sum((c.kind, c.dtype) == ("all-gather", "u16") for c in found) == 2  # up and down


def call(number=NUMBER, *, axes=AXES, shape=(BATCH, LENGTH), k=K, tokens=None, **options):
    routing = route(jnp.zeros((*(tokens or shape), NUMBER)), k)
    return experts(
        mlp, parameters(0, number), jnp.zeros((*shape, SIZE)), routing, axes=axes, **options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 6}, r"down has shape \(6, 8, 6\), but the router chooses among 8 experts"),
        ({"tokens": (BATCH, 3)}, r"routing for tokens \(8, 3\)"),
        ({"shape": (BATCH,)}, r"expected x \[batch, length, embed\]"),
        ({"capacity": 0.0}, "capacity 0.0; expected more than 0, or None"),
        ({"capacity": 1.0, "group": 3}, "groups of 3 tokens do not divide the length 16"),
        ({"capacity": 1.0, "priority": "first"}, "priority 'first': expected 'order' or 'weight'"),
        ({"k": 9}, "k=9 of 8 experts; expected from 1 to 8"),
        ({"axes": {"up": AXES["up"]}}, "give one tuple of names a leaf"),
        ({"axes": AXES | {"down": ("mlp", "embed", None)}}, "down has the axes.*'experts' first"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ShardingError, match=message):
        call(**options)


@pytest.mark.parametrize(
    ("spec", "changes", "options", "message"),
    [
        ("expert=3", {}, {"shape": (6, 4)}, "down: axis 'experts' has size 8, which expert=3 does"),
        (
            "expert=4",
            {},
            {"shape": (6, 4)},
            "x: axis 'batch' has size 6, which expert=4",
        ),
        ("sequence=3", {}, {}, "x: axis 'length' has size 16, which sequence=3 does not"),
        ("tensor=2", {"experts": "tensor", "mlp": None}, {}, "Map 'batch' to 'tensor' too"),
        ("expert=2", {"batch": "data"}, {}, "'batch' over 'data': tokens must lie on the devices"),
    ],
)
def test_refuses_on_a_mesh(spec, changes, options, message):
    with scope(make_mesh(spec), rules(**changes)), pytest.raises(ShardingError, match=message):
        call(**options)


@pytest.mark.parametrize(
    "change",
    [{"chosen": 9}, {"activation": "relu"}, {"capacity": -1.0}],
    ids=lambda c: next(iter(c)),
)
def test_a_config_that_cannot_be(change):
    with pytest.raises(FwError, match=str(next(iter(change.values())))):
        ExpertsConfig(**{**vars(CONFIG), **change})
