"""Pipelines against a plain loop over layers: the same numbers on every mesh; what is sent."""

import contextlib
import functools
import math
import re
from functools import partial

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
from fw.models.layers import Dense, LayerNorm, attention, dropout, gelu, visible
from fw.models.stack import Stack
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import (
    ShardingError,
    constrain,
    create,
    gather,
    make_mesh,
    put,
    rules,
    scope,
    shardings,
)
from sharding.parallel.pipeline import bubble, pipeline
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

L, E, F, B, T = 8, 4, 6, 16, 2
NAMES = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
WIDE_ROWS = rules(batch=("data", "fsdp", "expert", "pipe"))


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def layer(params, x, extra, key):
    """Rows see each other, and so which of them make a microbatch."""
    hidden = constrain(jnp.tanh(x @ params["up"] + extra[..., None]), "batch", "length", "mlp")
    hidden = dropout(hidden, 0.2, key)
    out = x + hidden @ params["down"] + 0.1 * jnp.mean(hidden, (0, 2))[:, None]
    return constrain(out, "batch", "length", "embed"), {"square": jnp.mean(hidden) ** 2}


def arguments():
    keys = jax.random.split(jax.random.key(1), 5)
    params = {
        "up": jax.random.normal(keys[0], (L, E, F)) / 2,
        "down": jax.random.normal(keys[1], (L, F, E)) / 2,
    }
    return params, jax.random.normal(keys[2], (B, T, E)), jax.random.normal(keys[3], (B, T))


def rounded(params, rounds):
    """[layers, ...] → [rounds, layers / rounds, ...]."""
    if rounds == 1:
        return params
    return jax.tree.map(lambda p: p.reshape(rounds, -1, *p.shape[1:]), params)


@partial(jax.jit, static_argnums=0)
def plain_layer(microbatches, i, m, params, x, extra, key):
    own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, i), m)
    rows = m + microbatches * jnp.arange(B // microbatches)
    return layer(jax.tree.map(lambda p: p[i], params), x, extra[rows], own)


def plain(params, x, extra, key, microbatches):
    """A Python loop over microbatches and layers."""
    parts, aux = list(jnp.swapaxes(x.reshape(-1, microbatches, T, E), 0, 1)), 0.0
    for m in range(microbatches):
        for i in range(L):
            parts[m], more = plain_layer(microbatches, i, m, params, parts[m], extra, key)
            aux += more["square"] / microbatches
    return jnp.stack(parts, 1).reshape(x.shape), aux


def graded(fn):
    """`fn(...) -> (y, aux)` with the gradients of something nonlinear of both."""

    def loss(params, x, extra):
        y, aux = fn(params, x, extra)
        return jnp.sum(jnp.sin(y)) + 3 * aux, (y, aux)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


CASES = [
    # mesh, microbatches, rounds, remat, dropout
    (None, 2, 2, "stage", True),
    slow("pipe=4", 8, 1, "layer", True),
    ("pipe=8", 8, 1, "stage", False),
    ("pipe=2", 4, 4, None, True),
    ("data=2,pipe=4", 4, 2, None, True),
    ("pipe=2,fsdp=2,tensor=2", 4, 2, "stage", True),
    ("pipe=2,data=2,sequence=2", 4, 1, "dots", True),
]


@functools.cache
def expected(microbatches, drops):
    key = jax.random.key(7) if drops else None
    return graded(partial(plain, key=key, microbatches=microbatches))(*arguments())


@pytest.mark.parametrize(("mesh", "microbatches", "rounds", "remat", "drops"), CASES)
def test_as_a_plain_loop(mesh, microbatches, rounds, remat, drops):
    def piped(params, x, extra):
        y, aux = pipeline(
            layer, rounded(params, rounds), x, extra=extra, microbatches=microbatches,
            rounds=rounds, remat=remat, has_aux=True, key=jax.random.key(7) if drops else None,
        )  # fmt: skip
        return y, aux["square"]

    with scope(make_mesh(mesh), rules()) if mesh else contextlib.nullcontext():
        found = jax.jit(graded(piped))(*arguments())
    jax.tree.map(close, found, expected(microbatches, drops))


def test_x_is_a_tree_and_integers_travel():
    def layer(p, x, extra, key):
        assert extra is key is None
        values, count = x
        return values * p + count[:, None].astype(values.dtype), count + 1

    p, x = jnp.arange(1.0, 5), (jnp.ones((4, 3)), jnp.arange(4))
    with scope(make_mesh("pipe=2"), rules()):
        values, count = jax.jit(lambda p, x: pipeline(layer, p, x, microbatches=2))(p, x)
    expected = np.ones((4, 3))
    for i in range(4):
        expected = expected * (i + 1) + (np.arange(4) + i)[:, None]
    close(values, expected)
    np.testing.assert_array_equal(count, np.arange(4) + 4)


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_idle_stages_compute_is_never_seen(rounds):
    """Of a stage's input that has not been through the first layer, the second makes NaN."""
    p = jnp.array([-1.0, 1, 1, 1])
    x = -jnp.arange(1.0, 9)[:, None]

    def run(p, x):
        square_root = lambda p, x, extra, key: (jnp.sqrt(p * x), jnp.sum(jnp.sqrt(p * x)))  # noqa: E731
        y, aux = pipeline(
            square_root, rounded(p, rounds), x, microbatches=4, rounds=rounds, has_aux=True
        )
        return jnp.sum(y) + aux

    with scope(make_mesh("pipe=2"), rules()):
        found = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(p, x)
    jax.tree.map(close, found, jax.value_and_grad(run, argnums=(0, 1))(p, x))
    assert np.isfinite(found[0])


# --- time -----------------------------------------------------------------------------------------


def simulated(stages, microbatches, rounds):
    """Ticks until all is done, when every stage takes the first piece of work that is ready."""
    order = [
        (group + member, turn)
        for group in range(0, microbatches, stages)
        for turn in range(rounds)
        for member in range(stages)
    ]
    waiting = [list(order) for _ in range(stages)]
    done, tick = {}, 0
    while any(waiting):
        for stage, work in enumerate(waiting):
            for piece in work:
                microbatch, turn = piece
                before = (stage - 1, piece) if stage else (stages - 1, (microbatch, turn - 1))
                if (stage == turn == 0) or done.get(before, tick) < tick:
                    done[stage, piece] = tick
                    work.remove(piece)
                    break
        tick += 1
    return tick


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_bubble_is_that_of_a_simulation(stages, groups, rounds):
    microbatches = stages * groups
    ticks = simulated(stages, microbatches, rounds)
    assert bubble(stages, microbatches, rounds) == pytest.approx(1 - rounds * microbatches / ticks)


@pytest.mark.parametrize(("stages", "microbatches", "rounds"), [(4, 8, 1), (4, 4, 2), (2, 8, 4)])
def test_the_program_takes_these_ticks_and_keeps_no_weights_of_a_tick(stages, microbatches, rounds):
    def loss(params, x, extra):
        y, _ = pipeline(
            layer, rounded(params, rounds), x, extra=extra,
            microbatches=microbatches, rounds=rounds, has_aux=True,
        )  # fmt: skip
        return jnp.sum(y**2)

    with scope(make_mesh(f"pipe={stages}"), rules()):
        program = jax.make_jaxpr(jax.grad(loss))(*arguments())
    loops = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
    ticks = simulated(stages, microbatches, rounds)
    assert [eqn.params["length"] for eqn in loops] == [ticks, ticks]  # forward, backward
    kept = [np.shape(v.aval) for v in loops[0].outvars]  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert any(shape[0] == ticks for shape in kept)
    assert not [s for s in kept if s[0] == ticks and s[-2:] in [(E, F), (F, E)]]


# --- what is sent ---------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<op>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def compiled(mesh, layout, rounds, microbatches):
    """The collectives of a step of a mesh of stages alone: (op, elements, how often)."""
    mesh = make_mesh(mesh)
    params, x, extra = arguments()
    params = rounded(params, rounds)
    names = {k: v if rounds == 1 else (None, *v) for k, v in NAMES.items()}

    def loss(params, x, extra):
        y = pipeline(
            lambda *a: layer(*a)[0], params, x, extra=extra,
            microbatches=microbatches, rounds=rounds,
        )  # fmt: skip
        return jnp.sum(constrain(y, "batch", "length", "embed") ** 2)

    lie = shardings(names, params, mesh, layout)
    rows = jax.NamedSharding(mesh, layout.spec(("batch",), activation=True))
    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        in_shardings=(lie, rows, rows),
        out_shardings=(None, (lie, rows)),
    )
    with scope(mesh, layout):
        text = step.lower(params, x, extra).compile().as_text() or ""
    ticks = simulated(mesh.size, microbatches, rounds)
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    branches = set(re.findall(r"%?([\w.-]+)", " ".join(re.findall(r"branch_\w+=\{(.*?)\}", text))))
    found, where, main = [], "", False
    for line in text.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            main, where = bool(begins[1]), begins[2]
        if sends := COLLECTIVE.search(line):
            times = 1 if main else ticks if where in bodies else 0
            assert times or where in branches, line  # of a condition: counted by the test
            sizes = re.findall(r"\[([\d,]*)\]", sends["shapes"])
            elements = sum(math.prod(map(int, filter(None, s.split(",")))) for s in sizes)
            found.append((sends["op"], elements, times))
    return found


@pytest.mark.parametrize(("stages", "microbatches"), [(4, 4), (4, 8), (2, 8)])
def test_only_neighbours_are_sent_to(stages, microbatches):
    found = compiled(f"pipe={stages}", rules(), 1, microbatches)
    microbatch = B // microbatches * T * E
    sends = [(elements, times) for op, elements, times in found if op == "collective-permute"]
    assert {elements for elements, _ in sends} == {microbatch}
    # Forward M + S to the next stage and M + S in the queue, and as many backward.
    assert sum(times for _, times in sends) == 4 * (microbatches + stages)
    # The output, and the gradient of the input: on all stages, as the rules have it.
    rest = sorted((op, elements) for op, elements, _ in found if op != "collective-permute")
    assert rest == [("all-gather", B * T * E)] * 2


def test_no_more_is_sent_with_rounds():
    found = compiled("pipe=2", rules(), 4, 4)
    sends = [(elements, times) for op, elements, times in found if op == "collective-permute"]
    assert {elements for elements, _ in sends} == {B // 4 * T * E}
    # R M + S to the next stage, forward and backward; the queue moves in branches.
    assert sum(times for _, times in sends) == 2 * (4 * 4 + 2)
    rest = sorted((op, elements) for op, elements, _ in found if op != "collective-permute")
    assert rest == [("all-gather", B * T * E)] * 2


def test_rows_may_be_cut_over_stages_around_the_stack():
    """Then nothing is gathered, but what all stages read."""
    found = compiled("pipe=2", WIDE_ROWS, 1, 4)
    rest = {(op, elements) for op, elements, _ in found if op != "collective-permute"}
    assert {op for op, elements in rest if elements > B * T} == {"all-to-all"}
    assert max(elements for _, elements in rest) <= B * T * E // 2

    def piped(params, x, extra):
        x = constrain(x, "batch", "length", "embed")
        y, aux = pipeline(layer, params, x, extra=extra, microbatches=4, has_aux=True)
        return constrain(y, "batch", "length", "embed"), aux["square"]

    with scope(make_mesh("pipe=2,data=2"), WIDE_ROWS):
        jax.tree.map(close, jax.jit(graded(piped))(*arguments()), expected(4, False))


# --- what does not fit ----------------------------------------------------------------------------

REFUSED = {
    "do not divide into microbatches=3; 1, 2, 4, 8, 16 would": ("data=1", {"microbatches": 3}),
    "2 microbatches do not divide into groups of pipe=4": ("pipe=4", {"microbatches": 2}),
    "use a multiple of 4, or pipe = 1, 2": ("pipe=4", {"microbatches": 2}),
    "8 layers do not divide into rounds=1 x pipe=3": ("pipe=3", {"microbatches": 3}),
    "use a multiple of 8, or pipe = 1, 2": ("pipe=4", {"rounds": 2, "layers": 4}),
    "leave 2 for each, which the 4 devices": ("data=4,pipe=2", {"microbatches": 8}),
    "multiple of 32 rows, or microbatches = 1, 2, 4": ("data=4,pipe=2", {"microbatches": 8}),
    "but the first axis of 'down' is 8": ("data=1", {"rounds": 4, "flat": True}),
    "remat 'all' is unknown": ("data=1", {"remat": "all"}),
    "axis 0 is that of rows; 'x' is (16, 2, 4), but 'extra' is (8, 2)": ("data=1", {"rows": 8}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    mesh, options = REFUSED[message]
    options = {"microbatches": 4, **options}
    params, x, extra = arguments()
    rounds = options.get("rounds", 1)
    if not options.pop("flat", False):
        params = rounded(params, rounds)
        if count := options.pop("layers", None):
            params = jax.tree.map(lambda p: p[:, : count // rounds], params)
    extra = extra[: options.pop("rows", B)]
    if "pipe=3" in mesh:
        x, extra = x[:15], extra[:15]
    with scope(make_mesh(mesh), rules()), pytest.raises(ShardingError, match=re.escape(message)):
        pipeline(layer, params, x, extra=extra, has_aux=True, **options)


# --- modules --------------------------------------------------------------------------------------


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, rngs):
        dense = partial(Dense, std=0.2, rngs=rngs)
        self.norms = nnx.List([LayerNorm(8, epsilon=1e-6) for _ in range(2)])
        self.qkv = nnx.List([dense(8, 8, ("embed", "heads")) for _ in range(3)])
        self.out = dense(8, 8, ("heads", "embed"))
        self.up = dense(8, 16, ("embed", "mlp"))
        self.down = dense(16, 8, ("mlp", "embed"))

    def __call__(self, x, segments, key):
        keys = (None,) * 2 if key is None else jax.random.split(key)
        h = self.norms[0](x)
        split = (*x.shape[:2], 2, 4)
        q, k, v = (
            constrain(f(h).reshape(split), "batch", "length", "heads", None) for f in self.qkv
        )
        seen = visible(segments, x.dtype)
        h = self.out(attention(q, k, v, seen, rate=0.1, key=keys[0]).reshape(x.shape))
        x = constrain(x + h, "batch", "length", "embed")
        h = constrain(gelu(self.up(self.norms[1](x))), "batch", "length", "mlp")
        return constrain(x + dropout(self.down(h), 0.1, keys[1]), "batch", "length", "embed")


class Tagger(nnx.Module):
    def __init__(self, rngs, **options):
        self.embed = Dense(3, 8, ("pooled", "embed"), std=0.5, rngs=rngs)
        self.stack = Stack(Block, 8, rngs=rngs, **options)
        self.head = Dense(8, 3, ("embed", "labels"), std=0.5, rngs=rngs)

    def __call__(self, batch, key):
        x = constrain(self.embed(batch["x"]), "batch", "length", "embed")
        return self.head(self.stack(x, batch["segment_ids"], key=key))


def tagger(**options):
    return from_nnx(
        None, lambda rngs: Tagger(rngs, **options), lambda module, batch, key, _: module(batch, key)
    )


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_stack_is_its_layers(rounds):
    stack = Stack(Block, 4, rngs=nnx.Rngs(3), microbatches=2, rounds=rounds)
    keys = jax.random.split(nnx.Rngs(3).params(), 4)
    layers = [Block(nnx.Rngs(params=key)) for key in keys]
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    segments = jnp.ones((4, 6), jnp.int32)
    y = x
    for one in layers:
        y = one(y, segments, None)
    close(stack(x, segments), y)
    kernel: nnx.Param = nnx.state(stack)["layers"]["up"]["kernel"]  # pyright: ignore[reportAssignmentType]
    lead = (4,) if rounds == 1 else (2, 2)
    close(kernel[...], jnp.stack([one.up.kernel[...] for one in layers]).reshape(*lead, 8, 16))
    assert kernel.get_metadata()["axes"] == (None, "layers", "embed", "mlp")[2 - rounds :]


def test_a_precision_policy_reaches_the_stages():
    """Mapped over stages, a dense layer's product has a batch axis; rounded it is all the same."""
    with jax.enable_x64(False):
        model, rng, found = tagger(microbatches=4), np.random.default_rng(0), {}
        draw = lambda shape: (rng.normal(size=shape) * 0.5).astype(np.float32)  # noqa: E731
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        variables = jax.tree.map(lambda s: draw(s.shape), shapes)
        batch = {"x": draw((16, 4, 3)), "segment_ids": np.ones((16, 4), np.int32)}
        for policy in ("f32", "bf16"):
            for spec in ("data=1", "pipe=2"):
                with scope(make_mesh(spec), rules()):
                    run = jax.jit(precision.apply(model.apply, policy))
                    found[policy, spec] = np.asarray(run(variables, batch)[0])
        np.testing.assert_allclose(found["f32", "pipe=2"], found["f32", "data=1"], atol=1e-5)
        away = np.abs(found["bf16", "data=1"] - found["f32", "data=1"]).max()
        assert away > 1e-3
        apart = np.abs(found["bf16", "pipe=2"] - found["bf16", "data=1"]).max()
        assert apart < away / 10


def test_a_stack_is_born_in_stages():
    mesh, layout = make_mesh("pipe=2,fsdp=2"), rules()
    model = from_nnx(
        None,
        lambda rngs: Stack(
            lambda rngs: Dense(4, 6, ("embed", "mlp"), std=1.0, rngs=rngs), 4, rngs=rngs
        ),
        lambda *_: None,
    )
    key = jax.random.key(0)
    lie = shardings(model.axes, jax.eval_shape(model.init, key), mesh, layout)
    born = create(model.init, key, shardings=lie)
    kernel = born["params"]["layers"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 2, 6)
    jax.tree.map(close, gather(born), model.init(key))


def test_a_stack_refuses():
    class Averages(nnx.Module):
        def __init__(self, rngs):
            self.mean = nnx.BatchStat(jnp.zeros(3), axes=("embed",))

    with pytest.raises(FwError, match="holds parameters only, but 'mean' is a BatchStat"):
        Stack(Averages, 2, rngs=nnx.Rngs(0))
    with pytest.raises(FwError, match="5 layers do not divide into 2 rounds"):
        Stack(Block, 5, rngs=nnx.Rngs(0), rounds=2)


def train(mesh, steps, **options):
    mesh, layout, model = make_mesh(mesh), rules(), tagger(**options)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape) * 0.3, shapes)
    tx = optimizer(AdamW(learning_rate=1e-2), steps)
    step = make_step(model, cross_entropy, tx, mesh=mesh, rules=layout)
    variables = jax.device_put(variables, shardings(model.axes, shapes, mesh, layout))
    state, losses = initial_state(variables, tx, mesh), []
    for _ in range(steps):
        labels = rng.integers(0, 3, (16, 4)).astype(np.int32)
        batch = {
            "x": rng.normal(size=(16, 4, 3)) + np.eye(3)[labels],
            "labels": labels,
            "segment_ids": np.tile(np.array([1, 1, 2, 2], np.int32), (16, 1)),
        }
        state, metrics = step(state, put(batch, mesh, layout))
        losses.append(metrics["loss"])
    stage = state.variables["params"]["stack"]["layers"]["up"]["kernel"]
    assert stage.sharding.shard_shape(stage.shape)[-3] == stage.shape[-3] // mesh.shape["pipe"]
    return np.array(losses), gather(state.variables["params"])


@pytest.mark.slow
def test_fifty_steps_are_the_same_on_every_mesh():
    options = {"microbatches": 4, "rounds": 2, "remat": "layer"}
    losses, params = train("data=1", 50, **options)
    assert losses[-5:].mean() < 0.8 * losses[0]
    for mesh in ("pipe=4", "pipe=2,data=2,tensor=2"):
        found, others = train(mesh, 50, **options)
        np.testing.assert_allclose(found, losses, rtol=0, atol=1e-9)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-9), others, params)
