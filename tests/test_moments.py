"""Optimisers whose states are small: against optax's own, on every mesh, through checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress
from compress.adafactor import RowsColumns
from compress.moments import Moment, chance, coded
from fw.checkpoint import Checkpoints
from fw.errors import FwError
from fw.models.bert import BertConfig, bert
from fw.optimizer import MOMENTS, AdamW, optimizer
from fw.step import abstract_state, initial_state, make_step
from fw.tasks import cross_entropy
from sharding import create, gather, make_mesh, put, rules, shardings
from tests.marks import fast_are
from tests.test_exchange import MODEL, batch_of

SMALL = tuple(m for m in MOMENTS if m != "float32")
RULES = rules()
STEPS = 12


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- the mathematics --------------------------------------------------------------------------


def test_adafactor_is_optaxs():
    """Two implementations of one algorithm, on gradients whose size changes a thousandfold."""
    params = {"w": jnp.zeros((128, 256)), "b": jnp.zeros(256)}
    ours = compress.scale_by_adafactor()
    theirs = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    state, other = ours.init(params), theirs.init(params)
    for step in range(6):
        size = np.float32(10 ** (step % 4 - 2))
        grads = {"w": normal(step, 128, 256) * size, "b": normal(-step % 97, 256) * size}
        got, state = ours.update(grads, state)
        want, other = theirs.update(grads, other, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_layers_have_the_same_state_stacked_and_apart():
    grads = normal(0, 3, 64, 128)
    for make in (compress.scale_by_adafactor, compress.scale_by_adam_8bit):
        tx = make()
        stacked: Any = {"layers": {"kernel": jnp.zeros((3, 64, 128)), "bias": jnp.zeros((3, 2048))}}
        apart: Any = {"layers": [{"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(2048)}] * 3}
        bias = normal(1, 3, 2048)
        one, _ = tx.update({"layers": {"kernel": grads, "bias": bias}}, tx.init(stacked))
        each = [{"kernel": g, "bias": b} for g, b in zip(grads, bias, strict=True)]
        many, _ = tx.update({"layers": each}, tx.init(apart))
        for i in range(3):
            for name in ("kernel", "bias"):
                a, b = one["layers"][name][i], many["layers"][i][name]
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        shapes = [jax.tree.map(jnp.shape, tx.init(p).nu) for p in (stacked, apart)]
        whole, part = (jax.tree.leaves(s, is_leaf=lambda x: isinstance(x, tuple)) for s in shapes)
        assert [s[1:] for s in whole] == part[: len(part) // 3]


def test_codes_are_near_and_means_of_squares_are_right_in_the_mean():
    """A code is off by at most half of what lies between codes, or, by chance, all of it."""
    x = normal(3, 64, 256) * np.geomspace(1e-3, 10, 64, dtype=np.float32)[:, None]
    m = coded(jnp.asarray(x))
    assert isinstance(m, Moment)
    # e4m3 has three bits of mantissa, and 2⁻⁹ / 448 of the largest as its least step.
    bound = np.maximum(np.abs(x) / 16, np.abs(x).max(1, keepdims=True) * 2**-10 / 448) * 1.01
    assert (np.abs(np.asarray(m.dense()) - x) <= bound).all()
    v = np.square(x) + np.float32(1e-30)
    step = 2 ** (32 / 255)
    near = coded(jnp.asarray(v), noise=jnp.full(v.shape, 0.5))
    assert isinstance(near, Moment)
    least = v.max(1, keepdims=True) * 2.0**-32
    apart = np.abs(np.log2(np.asarray(near.dense()) / np.maximum(v, least)))
    assert (apart <= np.log2(step)).all()
    drawn = [coded(jnp.asarray(v), noise=chance(v.shape, jnp.uint32(i))) for i in range(200)]
    mean = np.mean([np.asarray(d.dense()) for d in drawn if isinstance(d, Moment)], axis=0)
    inside = v > v.max(1, keepdims=True) * 2.0**-31
    spread = (step - 1) / 2 / np.sqrt(200)
    np.testing.assert_allclose(mean[inside], v[inside], rtol=6 * spread)


def test_means_of_squares_follow_gradients_that_fall():
    """Of half of a block: rounded to nearest, they would stay where they were.

    A step moves them by a thousandth, and a code is a tenth. A whole block moves with its scale.
    """
    tx, plain = compress.scale_by_adam_8bit(), optax.scale_by_adam()
    params = {"w": jnp.zeros((64, 64))}
    state: Any = tx.init(params)
    other: Any = plain.init(params)
    update, reference = jax.jit(tx.update), jax.jit(plain.update)
    size = 10 ** (normal(0, 64, 64) / 2)
    for step in range(2000):
        falls = np.where(np.arange(64) < 32, 3 if step < 500 else 0.3, 3).astype(np.float32)
        grads = {"w": normal(step + 1, 64, 64) * size * falls}
        got, state = update(grads, state)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an i32 power
            want, other = reference(grads, other)
    ratio = np.asarray(state.nu["w"].dense()) / np.asarray(other.nu["w"])
    assert 0.95 < ratio.mean() < 1.05
    assert np.quantile(ratio, 0.95) < 2
    a, b = np.asarray(got["w"]).ravel(), np.asarray(want["w"]).ravel()
    assert a @ b > 0.97 * np.linalg.norm(a) * np.linalg.norm(b)


def test_what_is_smaller_than_all_else_is_nothing():
    x = jnp.full((64, 64), 1e-36)
    for noise in (None, jnp.zeros(x.shape)):
        moment = coded(x, noise=noise)
        assert isinstance(moment, Moment)
        np.testing.assert_array_equal(moment.dense(), 0)


def test_zeros_stay_and_what_is_not_finite_is_not_hidden():
    tx = compress.scale_by_adam_8bit()
    state = tx.init({"w": jnp.ones((64, 64))})
    updates, state = tx.update({"w": jnp.zeros((64, 64))}, state)
    assert not np.asarray(updates["w"]).any()
    updates, state = tx.update({"w": jnp.zeros((64, 64)).at[3, 5].set(jnp.nan)}, state)
    assert np.isnan(np.asarray(updates["w"])[3, 5])
    assert np.isnan(np.asarray(tx.update({"w": jnp.ones((64, 64))}, state)[0]["w"])[3, 5])


# --- in a run ---------------------------------------------------------------------------------


def started(moments: str, spec: str) -> tuple[Any, Any, Any, Any]:
    mesh = make_mesh(spec)
    tx = optimizer(AdamW(learning_rate=5e-3, moments=moments), STEPS)
    where = shardings(MODEL.axes, jax.eval_shape(MODEL.init, jax.random.key(0)), mesh, RULES)
    variables = create(MODEL.init, jax.random.key(0), shardings=where)
    step = make_step(MODEL, cross_entropy, tx, mesh=mesh, rules=RULES)
    return mesh, tx, step, initial_state(variables, tx, mesh)


def steps(state: Any, step: Any, mesh: Any, numbers: Any) -> tuple[Any, list[float]]:
    losses = []
    for number in numbers:
        state, metrics = step(state, put(batch_of(number), mesh, RULES))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    found = {}
    for moments in MOMENTS:
        mesh, _, step, state = started(moments, "data=1")
        found[moments] = steps(state, step, mesh, range(STEPS))[1]
    return found


@pytest.mark.parametrize("moments", fast_are(["8bit"], SMALL))
def test_a_run_moves_to_another_mesh_and_goes_on(moments, alone, tmp_path):
    """Codes and scales lie with their parameters; losses are those of one device."""
    mesh, _, step, state = started(moments, "data=2,fsdp=2,tensor=2")
    state, losses = steps(state, step, mesh, range(5))
    with Checkpoints(tmp_path, metric="f1") as checkpoints:
        checkpoints.save(state, {"f1": 0.0})
        checkpoints.wait()
        kept = gather(state)
        later, tx, step, _ = started(moments, "fsdp=4")
        again = checkpoints.restore(abstract_state(MODEL, tx, later, RULES), 5)
    for a, b in zip(jax.tree.leaves(gather(again)), jax.tree.leaves(kept), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    parts = [
        leaf
        for leaf in jax.tree.leaves(again.optimizer, is_leaf=compress.is_compressed)
        if isinstance(leaf, Moment | RowsColumns)
    ]
    assert parts
    assert all(
        any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(leaf)) for leaf in parts
    )
    losses += steps(again, step, later, range(5, STEPS))[1]
    np.testing.assert_allclose(losses, alone[moments], rtol=2e-3)


def test_losses_are_near_those_of_float32(alone):
    for moments in SMALL:
        assert alone[moments][-1] < 0.9 * alone[moments][0]
    np.testing.assert_allclose(alone["8bit"], alone["float32"], rtol=0.02)


def test_eight_bits_take_a_quarter():
    """Of MiniLM's state, at most 0.27."""
    model = bert(BertConfig(30522, 384, 6, 12, 1536, num_labels=13, task="token_classification"))
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    states = {m: jax.eval_shape(optimizer(AdamW(moments=m), 9).init, params) for m in MOMENTS}
    sizes = {
        moments: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        for moments, state in states.items()
    }
    assert sizes["8bit"] <= 0.27 * sizes["float32"]
    assert sizes["factored"] < 0.01 * sizes["float32"]


def test_unknown_moments_are_refused():
    with pytest.raises(FwError, match="moments '4bit' are unknown"):
        AdamW(moments="4bit")
