"""compress.prune and sparsify: which entries stay, against numpy; what the rest makes up for."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import compress
from compress.gradual import Schedule, sparsify
from compress.packed import Packed
from compress.patterns import Pattern, keys, largest, mask
from sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- which entries stay -----------------------------------------------------------------------

FLOATS = st.floats(-8, 8, width=32).map(lambda x: x + 0.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(arrays(np.float32, 12, elements=FLOATS), st.integers(1, 12))
def test_the_largest_are_those_of_a_sort(scores, stay):
    kept = np.asarray(largest(keys(jnp.asarray(scores)), stay, (0,)))
    least = np.sort(scores)[-stay]
    assert kept.sum() == stay
    assert (scores[kept] >= least).all()
    assert kept[scores > least].all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(arrays(np.float32, (2, 16, 3), elements=FLOATS), st.sampled_from(["1:2", "2:4", "3:8"]))
def test_n_of_every_m_stay_and_go_through_bytes(w, text):
    n, m = Pattern(text).group or (0, 0)
    kept = np.asarray(mask(jnp.abs(w), Pattern(text), 0.5, "kernel"))
    groups = kept.reshape(2, 16 // m, m, 3)
    np.testing.assert_array_equal(groups.sum(2), n)
    worth = np.abs(w).reshape(groups.shape)
    np.testing.assert_allclose(
        np.sum(worth * groups, 2), np.sort(worth, 2)[:, :, -n:].sum(2), rtol=1e-6
    )
    if Packed.unfit(16, (n, m)):
        return
    pruned = np.where(kept, w, 0)
    packed = Packed.of(jnp.asarray(pruned), (n, m))
    np.testing.assert_array_equal(packed.dense(), pruned)
    back = compress.from_arrays(compress.to_arrays({"w": packed}))["w"]
    np.testing.assert_array_equal(back.dense(), pruned)


def test_blocks_stay_or_go_whole():
    w = normal(0, 3, 16, 8)
    kept = np.asarray(mask(jnp.abs(w), Pattern("4x2"), 0.75, "kernel"))
    blocks = kept.reshape(3, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(3, 16, 8)
    assert {*blocks.sum(-1).ravel().tolist()} == {0, 8}
    np.testing.assert_array_equal(blocks.any(-1).sum(-1), 4)
    worth = np.abs(w).reshape(3, 4, 4, 4, 2).sum((2, 4)).reshape(3, 16)
    for layer in range(3):
        assert {*worth[layer].argsort()[-4:]} == {*np.flatnonzero(blocks[layer].any(-1))}


# --- at once ----------------------------------------------------------------------------------


def linear(p: Any, x: Any) -> Any:
    return x @ p["kernel"]


def problem(seed: int) -> tuple[Any, Any, Any]:
    """Inputs that are correlated and of unlike size; a kernel; statistics."""
    x = normal(seed + 1, 300, 12) @ normal(seed, 12, 48) + 0.5 * normal(seed + 3, 300, 48)
    sizes = np.geomspace(2, 0.1, 48, dtype=np.float32)
    x = (x * np.random.default_rng(seed).permutation(sizes)).astype(np.float32)
    params = {"kernel": normal(seed + 2, 48, 32)}
    stats = jax.jit(compress.observe(linear, hessians=("kernel",)))(params, x)[1]
    return params, x, stats


@pytest.mark.parametrize("option", [0.5, "2:4"])
def test_what_looks_at_activations_loses_less(option):
    """‖X(W − W')‖: sparsegpt below wanda below magnitude; as many zeros each."""
    params, x, stats = problem(5)
    lost = {}
    for by in ("magnitude", "wanda", "sparsegpt"):
        small, _ = compress.prune({"kernel": option}, by=by)(params, stats)
        dense = np.asarray(compress.dequantize(small)["kernel"])
        assert np.mean(dense == 0) == pytest.approx(0.5, abs=0.01)
        got = np.asarray(jax.jit(compress.apply(linear))(small, x))
        np.testing.assert_allclose(got, x @ dense, rtol=1e-4, atol=1e-3)
        lost[by] = np.linalg.norm(got - x @ params["kernel"])
    assert lost["sparsegpt"] < 0.9 * lost["wanda"]
    assert lost["wanda"] < 0.9 * lost["magnitude"]


def test_wanda_is_its_formula():
    params, x, stats = problem(8)
    small, _ = compress.prune({"kernel": 0.25}, by="wanda")(params, stats)
    worth = np.abs(params["kernel"]) * np.linalg.norm(x.astype(np.float64), axis=0)[:, None]
    gone = worth.argsort(0)[:12]
    want = params["kernel"].copy()
    np.put_along_axis(want, gone, 0, 0)
    np.testing.assert_array_equal(small["kernel"], want)


def test_sparsegpt_solves_for_what_stays():
    """One input goes of two that are nearly the same: the other takes its place."""
    x = normal(0, 100, 1) @ np.ones((1, 2), np.float32) + 1e-3 * normal(1, 100, 2)
    params = {"kernel": np.array([[1.0], [2.0]], np.float32)}
    stats = compress.observe(linear, hessians=("kernel",))(params, x)[1]
    small, _ = compress.prune({"kernel": 0.5}, by="sparsegpt", damping=1e-5)(params, stats)
    np.testing.assert_allclose(np.asarray(small["kernel"]).ravel(), [0, 3], atol=1e-2)


def test_by_scores_that_a_loss_gives():
    params, x, _ = problem(9)
    scores = compress.gradient_scores(lambda p, x: jnp.square(linear(p, x)).mean(), params, [x, x])
    slope = jax.grad(lambda p: 2 * jnp.square(linear(p, x)).mean())(params)["kernel"]
    want = np.abs(params["kernel"] * slope)
    np.testing.assert_allclose(scores["kernel"], want, rtol=1e-4, atol=1e-4 * want.max())
    small, _ = compress.prune({"kernel": 0.5}, by="scores")(params, scores)
    stays = np.asarray(small["kernel"]) != 0
    assert want[stays].min() >= want[~stays].max() * (1 - 1e-4)


def test_as_many_go_as_were_asked_for_where_scores_are_equal():
    """Of equals the first stay: dead inputs are not kept in silence."""
    scores = np.repeat([[1.0], [0.0]], [1, 7], 0).astype(np.float32) * np.ones((1, 4), np.float32)
    small, _ = compress.prune({"w": 0.5}, by="scores")({"w": np.ones((8, 4), "f")}, {"w": scores})
    assert np.sum(np.asarray(small["w"]) == 0) == 16
    with pytest.raises(ValueError, match="hold NaN"):
        compress.prune({"w": 0.5}, by="scores")({"w": np.ones((8, 4))}, {"w": scores * np.nan})


def test_blocks_that_have_gone_do_not_count_their_neighbours():
    """A zero in a block of large entries is no reason to take it out."""
    w = np.full((4, 4), 0.001, np.float32)
    w[:2] = 0.02
    w[0, 0] = w[0, 2] = 0
    tx = sparsify({"w": {"part": 0.5, "pattern": "2x2"}}, Schedule(1, 1))
    params = {"w": jnp.asarray(w)}
    # Past the first step, when zeros are what has gone.
    state = tx.init(params)._replace(count=jnp.int32(0))
    updates, _ = tx.update({"w": jnp.zeros((4, 4))}, state, params)
    np.testing.assert_array_equal(params["w"] + updates["w"], np.where(w >= 0.02, w, 0))


def test_taking_out_zeros_changes_nothing():
    """Half of the kernel is zero already, and that is the half which goes."""
    kept = normal(3, 64, 32) * (np.random.default_rng(4).random((64, 32)) < 0.4)
    params = {"kernel": kept.astype(np.float32)}
    small, report = compress.prune({"kernel": 0.5})(params)
    np.testing.assert_array_equal(small["kernel"], params["kernel"])
    assert report[0].error == 0
    x = normal(5, 200, 64)
    stats = compress.observe(linear, hessians=("kernel",))(params, x)[1]
    new, _ = compress.prune({"kernel": 0.5}, by="sparsegpt")(params, stats)
    np.testing.assert_allclose(new["kernel"], params["kernel"], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: compress.prune({"kernel": 1.5}), "between 0 and 1"),
        (lambda p: compress.prune({"kernel": "4:2"}), "pattern '4:2'"),
        (lambda p: compress.prune({"kernel": "2:"}), "pattern '2:'"),
        (lambda p: compress.prune({"kernel": {"part": 0.5, "pattern": "2:4"}}), "or a pattern N:M"),
        (lambda p: compress.prune(0.5, by="luck"), "expected one of magnitude"),
        (compress.prune({"kernel": "2:5"}), "groups of 5 do not divide"),
        (compress.prune({"kernel": {"part": 0.5, "pattern": "5x1"}}), "do not divide"),
        (compress.prune({"kernel": 0.5}, by="wanda"), "needs statistics"),
        (
            lambda p: compress.prune({"kernel": 0.5}, by="scores")(p, {"kernel": np.ones(3)}),
            r"scores are \[3\], and it is \[48, 32\]",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make({"kernel": normal(0, 48, 32)})


# --- while training ---------------------------------------------------------------------------


def trained(rules: Any, schedule: Schedule, by: str, steps: int, mesh: Any = None) -> Any:
    """A regression of 64 inputs of which 16 matter; its parameters after every step."""
    right = normal(1, 64, 8) * (np.arange(64) < 16)[:, None]
    params: Any = {"w": {"kernel": normal(2, 64, 8) / 8, "bias": np.zeros(8, np.float32)}}
    tx = optax.chain(optax.scale(-0.05), sparsify(rules, schedule, by=by))

    def loss(p: Any, x: Any) -> jax.Array:
        y = x @ p["w"]["kernel"] + p["w"]["bias"]
        return jnp.square(y - x @ right.astype(np.float32)).mean()

    if mesh is not None:
        where = {"kernel": jax.P("fsdp", "tensor"), "bias": jax.P("tensor")}
        lie = {"w": {name: jax.NamedSharding(mesh, spec) for name, spec in where.items()}}
        params = jax.device_put(params, lie)
    state, after = tx.init(params), []

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, normal(10 + i, 64, 64))
        after.append(np.asarray(params["w"]["kernel"]))
    return after, params, loss


@pytest.mark.parametrize("by", ["magnitude", "movement", "gradient"])
def test_entries_go_by_the_schedule_and_stay_away(by):
    schedule = Schedule(begin=20, end=120, every=10)
    after, params, loss = trained({"**/kernel": 0.7}, schedule, by, 160)
    for step, kernel in enumerate(after, 1):
        due = max(schedule.begin, min(step - step % 10, schedule.end))
        part = float(schedule.part(due, 0.7)) if step >= schedule.begin else 0.0
        assert np.mean(kernel == 0) == pytest.approx(part, abs=2 / kernel.size), step
    for before, later in itertools.pairwise(after[20:]):
        assert not (later != 0)[before == 0].any()
    # Three quarters of the inputs do not matter, so that little is lost.
    assert float(loss(params, normal(7, 500, 64))) < 0.05 * 16
    assert (after[-1][:16] != 0).mean() > 0.7


def test_n_of_m_go_at_the_end_and_constant_at_once():
    after, *_ = trained({"**/kernel": "2:4"}, Schedule(5, 30), "magnitude", 40)
    assert (np.sum(after[-1].reshape(16, 4, 8) != 0, 1) == 2).all()
    assert not (after[20] == 0).any()
    after, *_ = trained({"**/kernel": 0.5}, Schedule(5, 30, curve="constant"), "magnitude", 8)
    assert [round(float(np.mean(k == 0)), 2) for k in after] == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]


def test_a_mesh_prunes_the_same():
    schedule = Schedule(begin=2, end=20, every=3)
    rules = {"**/kernel": 0.6}
    alone, *_ = trained(rules, schedule, "movement", 25)
    many, *_ = trained(rules, schedule, "movement", 25, make_mesh("fsdp=4,tensor=2"))
    np.testing.assert_array_equal(alone[-1] == 0, many[-1] == 0)
    np.testing.assert_allclose(alone[-1], many[-1], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(0, 2), "1 ≤ begin ≤ end"),
        (lambda: Schedule(1, 2, curve="steep"), "expected one of cubic"),
        (lambda: sparsify({"w": 0.5}, Schedule(1, 2), by="luck"), "expected one of magnitude"),
        (lambda: sparsify({"v": 0.5}, Schedule(1, 2)).init({"w": jnp.ones((2, 2))}), "matches no"),
        (lambda: sparsify({"w": "2:4"}, Schedule(1, 2)).init({"w": jnp.ones((2, 2))}), "groups of"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
