"""Gradients averaged in fewer bytes: nothing is lost but time, on any mesh, through checkpoints."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fw.checkpoint import Checkpoints
from fw.errors import FwError
from fw.exchange import with_exchange
from fw.model import Model
from fw.optimizer import AdamW, optimizer
from fw.recipe import Finetune
from fw.step import abstract_state, initial_state, make_step
from fw.tasks import cross_entropy
from sharding import (
    ShardingError,
    averages,
    constrain,
    create,
    gather,
    inspect,
    make_mesh,
    put,
    rules,
)
from sharding import shardings as shardings_of
from sharding.parallel.averages import Int8, PowerSGD

pytestmark = pytest.mark.usefixtures("quickly_compiled")
RULES = rules()
NAMES = ("int8", "powersgd:2")
STEPS = 24


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- the average ------------------------------------------------------------------------------


def averaged(exchange: Any, grads: list[Any], spec: str, cuts: Any) -> tuple[list[Any], Any]:
    """What every step averages, and the last state."""
    mesh = make_mesh(spec)
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), cuts, is_leaf=lambda x: isinstance(x, P))
    params = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads[0])
    state = jax.device_put(exchange.init(params, mesh.shape["data"]), exchange.lie(params, where))
    step = jax.jit(lambda g, s: exchange(g, s, where))
    found = []
    for g in grads:
        there = jax.tree.map(lambda x, w: NamedSharding(mesh, P("data", *w.spec)), g, where)
        average, state = step(jax.device_put(g, there), state)
        found.append(gather(average))
    return found, gather(state["errors"])


SHAPES = st.sampled_from([(5,), (300,), (24, 16), (3, 17, 9), (40, 24)])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(SHAPES, min_size=1, max_size=4), st.sampled_from([Int8(), PowerSGD(2)]))
def test_what_is_not_sent_comes_later(shapes, exchange):
    """Σ averages + mean of what is kept = Σ means, whatever is rounded."""
    mesh = "data=4"
    grads = [
        {str(i): normal(7 * step + i, 4, *shape) * 10.0**i for i, shape in enumerate(shapes)}
        for step in range(3)
    ]
    grads = jax.tree.map(lambda x: x.astype(np.float32), grads)
    cuts = {str(i): P() for i in range(len(shapes))}
    found, kept = averaged(exchange, grads, mesh, cuts)
    for name in grads[0]:
        sent = sum(np.asarray(f[name], np.float64) for f in found)
        left = np.mean(kept[name], 0) if kept[name] is not None else 0
        want = sum(np.mean(g[name], 0, dtype=np.float64) for g in grads)
        np.testing.assert_allclose(sent + left, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=2,tensor=2", "data=1"])
def test_eight_bits_are_near_at_once(spec):
    grads = {
        "w": normal(0, make_mesh(spec).shape["data"], 64, 32),
        "b": normal(1, make_mesh(spec).shape["data"], 7),
    }
    found, _ = averaged(Int8(), [grads], spec, {"w": P("fsdp", "tensor"), "b": P()})
    # Each of two roundings is off by half of a block's largest / 127 at most; arrays share blocks.
    bound = max(np.abs(g).max() for g in grads.values()) / 127
    for name, g in grads.items():
        np.testing.assert_allclose(found[0][name], g.mean(0), rtol=0, atol=bound)


def test_of_enough_rank_it_is_exact():
    thin = np.einsum("wnr,wmr->wnm", normal(0, 4, 30, 1), normal(1, 4, 20, 1)).astype(np.float32)
    same = np.broadcast_to(thin.mean(0), thin.shape)  # the mean has rank 4; so do all workers'
    found, kept = averaged(PowerSGD(4), [{"w": same}], "data=4", {"w": P()})
    np.testing.assert_allclose(found[0]["w"], same[0], atol=1e-5)
    np.testing.assert_allclose(kept["w"], 0, atol=1e-5)


def test_many_numbers_travel_in_buckets(monkeypatch):
    monkeypatch.setattr(averages, "BUCKET", 1000)
    grads = {str(i): normal(i, 4, 30, 17) for i in range(5)}
    cuts = {name: P() for name in grads}
    found, _ = averaged(Int8(), [grads], "data=4", cuts)
    for name, g in grads.items():
        np.testing.assert_allclose(found[0][name], g.mean(0), atol=np.abs(g).max() / 127)


# --- in a run ---------------------------------------------------------------------------------

SIZES = (64, 512, 3)


def _init(key: jax.Array) -> Any:
    ups = jax.random.split(key, 2)
    layers = {
        name: {"kernel": jax.random.normal(k, (n, m)) / n**0.5, "bias": jnp.zeros(m)}
        for name, k, n, m in zip(("up", "down"), ups, SIZES, SIZES[1:], strict=False)
    }
    return {"params": layers, "state": {}}


def _apply(variables: Any, batch: Any, *, key: Any = None, train: bool = False) -> Any:
    up, down = (variables["params"][name] for name in ("up", "down"))
    x = constrain(batch["x"], "batch", "embed")
    hidden = jnp.tanh(x @ up["kernel"] + up["bias"])
    hidden = constrain(hidden, "batch", "mlp")
    return hidden @ down["kernel"] + down["bias"], variables


MODEL = Model(
    None, _init, _apply,
    {
        "params": {
            "up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
            "down": {"kernel": ("mlp", "labels"), "bias": ("labels",)},
        },
        "state": {},
    },
)  # fmt: skip


def batch_of(step: int) -> Any:
    """Of the rows, only some of the last have labels: workers' means do not count alike."""
    x = normal(step, 32, SIZES[0])
    labels = (x[:, :3] + x[:, 3:6]).argmax(1).astype(np.int32)
    counted = (np.arange(32) < 16) | (np.arange(32) % 4 == 0)
    return {"x": x, "labels": np.where(counted, labels, -1).astype(np.int32)}


def started(name: str, spec: str, **more: Any) -> tuple[Any, Any, Any, Any]:
    mesh = make_mesh(spec)
    tx = with_exchange(optimizer(AdamW(learning_rate=5e-3, warmup=0.2), STEPS), name, mesh)
    where = shardings_of(MODEL.axes, jax.eval_shape(MODEL.init, jax.random.key(0)), mesh, RULES)
    variables = create(MODEL.init, jax.random.key(0), shardings=where)
    step = make_step(MODEL, cross_entropy, tx, mesh=mesh, rules=RULES, **more)
    return mesh, tx, step, initial_state(variables, tx, mesh)


def steps(state: Any, step: Any, mesh: Any, numbers: Any) -> tuple[Any, list[Any]]:
    losses = []
    for number in numbers:
        state, metrics = step(state, put(batch_of(number), mesh, RULES))
        losses.append([float(metrics[k]) for k in ("loss", "grad_norm")])
    return state, losses


@functools.cache
def usual() -> np.ndarray:
    mesh, _, step, state = started("float32", "data=1")
    return np.array(steps(state, step, mesh, range(STEPS))[1])


@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_what_float32_does(name, spec):
    """The first loss is the same; the last is near, and the first gradient's length is."""
    mesh, _, step, state = started(name, spec)
    losses = np.array(steps(state, step, mesh, range(STEPS))[1])
    assert losses[0, 0] == pytest.approx(usual()[0, 0], rel=1e-5)
    assert usual()[-1, 0] < 0.7 * usual()[0, 0]
    if name == "int8":
        assert losses[0, 1] == pytest.approx(usual()[0, 1], rel=1e-2)
        np.testing.assert_allclose(losses[:, 0], usual()[:, 0], rtol=0.03)
    assert losses[-1, 0] < usual()[-1, 0] + 0.1 * usual()[0, 0]


def test_microbatches_change_nothing():
    first = [
        steps(state, step, mesh, [0])[1][0]
        for mesh, _, step, state in (started("int8", "data=4", accumulate=n) for n in (1, 2))
    ]
    np.testing.assert_allclose(*first, rtol=2e-3)


@pytest.mark.parametrize("spec", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_the_compiled_step_sends_a_quarter(spec):
    """Bytes over `data`, by the compiled program; goal: at most 0.27 of float32's."""
    sent = {}
    for name in ("float32", *NAMES):
        mesh, _, step, state = started(name, spec)
        report = inspect(step.lower(state, put(batch_of(0), mesh, RULES)).compile())
        sent[name] = sum(n for axes, n in report.by_axes().items() if "data" in str(axes))
    assert sent["int8"] <= 0.27 * sent["float32"]
    assert sent["powersgd:2"] <= 0.27 * sent["float32"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_moves_to_other_workers_and_goes_on(name, tmp_path):
    """To the same: bit for bit. To others: the mean of what is not sent yet stays."""
    mesh, _, step, state = started(name, "data=8")
    state, _ = steps(state, step, mesh, range(4))
    with Checkpoints(tmp_path, metric="f1") as checkpoints:
        checkpoints.save(state, {"f1": 0.0})
        checkpoints.wait()
        before = gather(state.optimizer["exchange"]["errors"])
        like = jax.tree.map(lambda x: x, state)
        on, _ = steps(checkpoints.restore(like, 4), step, mesh, range(4, 8))
        straight, _ = steps(state, step, mesh, range(4, 8))
        for a, b in zip(
            jax.tree.leaves(gather(on)), jax.tree.leaves(gather(straight)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        for spec in ("data=4", "data=2,fsdp=2", "fsdp=8"):
            there, tx, further, _ = started(name, spec)
            moved = checkpoints.restore(abstract_state(MODEL, tx, there, RULES), 4)
            after = gather(moved.optimizer["exchange"]["errors"])
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
                np.testing.assert_allclose(a.mean(0), b.mean(0), atol=1e-7)
            assert np.isfinite(steps(moved, further, there, range(4, 6))[1]).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ShardingError, match="expected int8, or powersgd:RANK"):
        Finetune(data="x", exchange="int4")
    with pytest.raises(ShardingError, match="rank 0"):
        averages.exchange("powersgd:0")
    mesh = make_mesh("data=4")
    with pytest.raises(FwError, match="has tables"):
        with_exchange((1, 2), "int8", mesh)
    axes = {"params": {}, "state": {"mean": ("embed",)}}
    model = Model(None, lambda key: {}, _apply, axes)
    tx = with_exchange(optimizer(AdamW(), 3), "int8", mesh)
    with pytest.raises(FwError, match="batch norm"):
        make_step(model, cross_entropy, tx, mesh=mesh, rules=RULES)
    there, _, step, state = started("int8", "data=8")
    batch = {name: x[:4] for name, x in batch_of(0).items()}
    with pytest.raises(FwError, match="a batch of 4 rows does not divide into 8 workers"):
        step(state, batch)
    assert there.shape["data"] == 8
