"""compress.lowrank: factors against numpy's decompositions, over dots, stacks and convolutions."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.factored import Factored
from compress.ranks import Spectrum, by_budget, by_energy
from tests.test_transforms import KINDS, normal

pytestmark = pytest.mark.usefixtures("quickly_compiled")
FULL = {"dense": 32, "scanned": 64, "conv": 8}


def kernel_of(kind: str) -> tuple[str, np.ndarray]:
    pairs = jax.tree_util.tree_leaves_with_path(KINDS[kind][1])
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in pairs}
    return next((name, w) for name, w in named.items() if name.endswith("kernel"))


def stats_of(kind: str) -> Any:
    fn, params, x, _ = KINDS[kind]
    return jax.jit(compress.observe(fn, hessians=("**/kernel",)))(params, x)[1]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("kind", FULL)
def test_of_full_rank_it_is_the_identity(kind, aware):
    fn, params, x, _ = KINDS[kind]
    stats = stats_of(kind) if aware else None
    small, report = compress.lowrank({"**/kernel": FULL[kind]}, aware=aware)(params, stats)
    assert max(r.error for r in report) < 1e-5
    want = np.asarray(fn(params, x))
    got = np.asarray(jax.jit(compress.apply(fn))(small, x))
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    merged = jax.tree.leaves(compress.merge(small))
    for a, b in zip(merged, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("kind", FULL)
def test_the_error_is_the_least_there_is(kind, rank):
    """Eckart and Young: ‖W − A·B‖² = Σ σ² of what is left out, of every array of a stack."""
    name, w = kernel_of(kind)
    small, _ = compress.lowrank({name: rank})(KINDS[kind][1])
    off = np.asarray(compress.dequantize(small)[name.split("/")[0]]["kernel"]) - w
    n_in = w.size // w.shape[-1] // (w.shape[0] if kind == "scanned" else 1)
    for left, whole in zip(
        off.reshape(-1, n_in, w.shape[-1]), w.reshape(-1, n_in, w.shape[-1]), strict=True
    ):
        rest = np.linalg.svd(whole.astype(np.float64), compute_uv=False)[rank:]
        assert np.sum(left.astype(np.float64) ** 2) == pytest.approx(np.sum(rest**2), rel=1e-4)


def test_by_activations_outputs_lose_the_least_there_is(seed=3, rank=6):
    """‖X·W − X·A·B‖² = Σ σ²(X·W) of what is left out, where inputs are of very different size."""
    x = normal(seed, 200, 24) @ (normal(seed + 1, 24, 24) * np.geomspace(3, 0.01, 24)[:, None])
    w = normal(seed + 2, 24, 40)

    def fn(p: Any, x: Any) -> Any:
        return x @ p["kernel"]

    stats = jax.jit(compress.observe(fn, hessians=("kernel",)))({"kernel": w}, x)[1]
    lost = {}
    for aware in (False, True):
        small, _ = compress.lowrank({"kernel": rank}, aware=aware)({"kernel": w}, stats)
        got = np.asarray(jax.jit(compress.apply(fn))(small, x), np.float64)
        lost[aware] = np.sum((got - x.astype(np.float64) @ w) ** 2)
    rest = np.linalg.svd(x.astype(np.float64) @ w, compute_uv=False)[rank:]
    assert lost[True] == pytest.approx(np.sum(rest**2), rel=1e-3)
    assert lost[True] < 0.5 * lost[False]


def test_what_calibration_did_not_see_stays_at_full_rank(seed=4):
    x = normal(seed, 50, 16) * (np.arange(16) < 5)
    params = {"kernel": normal(seed + 1, 16, 12)}

    def fn(p: Any, x: Any) -> Any:
        return x @ p["kernel"]

    stats = compress.observe(fn, hessians=("kernel",))(params, x)[1]
    report = compress.lowrank({"kernel": 12}, aware=True)(params, stats)[1]
    assert report[0].error < 1e-5
    few = compress.lowrank({"kernel": 5}, aware=True)(params, stats)[0]
    got = np.asarray(jax.jit(compress.apply(fn))(few, x))
    assert np.linalg.norm(got - fn(params, x)) < 1e-2 * np.linalg.norm(fn(params, x))


PRODUCTS: dict[str, Any] = {  # function of x and W [6, 8, 10], shape of x
    "stack": (lambda x, w: jnp.einsum("eti,eio->eto", x, w), (6, 3, 8)),
    "backwards": (lambda x, w: jnp.einsum("eto,eio->eti", x, w), (6, 3, 10)),
    "first": (lambda x, w: jnp.einsum("eio,ti->eot", w, x), (3, 8)),
    "sum of experts": (lambda x, w: jnp.einsum("tei,eio->to", x, w), (3, 6, 8)),
    "all": (lambda x, w: jnp.einsum("teio,eio->t", x, w), (3, 6, 8, 10)),
    "turned": (lambda x, w: x @ w[2].T, (3, 10)),
    "cast": (lambda x, w: x.astype(jnp.bfloat16) @ w[1].astype(jnp.bfloat16), (3, 8)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_derivatives_are_those_of_the_whole(name, seed=7):
    fn, shape = PRODUCTS[name]
    a, b = jnp.asarray(normal(seed, 6, 8, 3)), jnp.asarray(normal(seed + 1, 6, 3, 10))
    w = Factored(a, b)
    x, whole = jnp.asarray(normal(seed + 2, *shape)), w.dense()
    np.testing.assert_allclose(whole, np.asarray(w.a) @ np.asarray(w.b), rtol=1e-5, atol=1e-5)
    want, pull = jax.vjp(fn, x, whole)
    got, mine = jax.vjp(compress.apply(fn), x, w)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    bound = 3e-2 if name == "cast" else 1e-5
    cotangent = jnp.cos(jnp.arange(want.size, dtype=want.dtype)).reshape(want.shape)
    (dx, dw), (my_dx, my_dw) = pull(cotangent), mine(cotangent)
    across = jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2)
    pairs = [(got, want), (my_dx, dx), (my_dw.a, dw @ across[0]), (my_dw.b, across[1] @ dw)]
    for mine, plain in jax.tree.map(lambda x: np.asarray(x, np.float32), pairs):
        np.testing.assert_allclose(mine, plain, rtol=0, atol=bound * np.abs(plain).max())


OPS: dict[str, Any] = {
    "swap": lambda w: jnp.swapaxes(w, -1, -2),
    "move": lambda w: jnp.moveaxis(w, 0, -1),
    "expand": lambda w: w[:, None],
    "squeeze": lambda w: jnp.squeeze(w, tuple(k for k, n in enumerate(w.shape) if n == 1)),
    "half of the last": lambda w: w[..., : w.shape[-1] // 2],
    "second of the first": lambda w: w[w.shape[0] // 2 :],
}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(list(OPS)), min_size=2, max_size=5))
def test_moving_and_cutting_commute_with_merging(names):
    b = jnp.broadcast_to(jnp.asarray(normal(2, 1, 1, 4, 8)), (3, 1, 4, 8))
    w = Factored(jnp.asarray(normal(1, 3, 1, 16, 4)), b)

    def moved(w: Any) -> Any:
        for name in names:
            w = OPS[name](w)
        return w

    got = jax.jit(compress.apply(moved))(w)
    assert isinstance(got, Factored)
    np.testing.assert_allclose(got.dense(), moved(w.dense()), rtol=1e-5, atol=1e-5)


SPECTRA = st.lists(st.floats(0.015625, 1, width=32), min_size=1, max_size=5).map(
    lambda values: np.array([sorted(values, reverse=True)])
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SPECTRA, st.floats(0.1, 1.0))
def test_the_rank_of_an_energy_is_the_least_that_carries_it(energy, part):
    spectrum = Spectrum(energy, step=1, whole=100)
    rank = by_energy(spectrum, part)
    assert rank is not None
    carried = np.cumsum(energy[0]) / energy.sum()
    assert carried[rank - 1] >= part - 1e-5
    assert rank == 1 or carried[rank - 2] < part


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(SPECTRA, min_size=1, max_size=3), st.integers(1, 12))
def test_ranks_under_a_budget_are_the_best_there_are(energies, steps):
    """Where all steps cost alike, against all combinations."""
    spectra = {str(i): Spectrum(e, step=1, whole=10) for i, e in enumerate(energies)}
    budget = (steps + 0.5) / (10 * len(spectra))
    if steps < len(spectra):
        with pytest.raises(ValueError, match="a rank of 1 for each takes"):
            by_budget(spectra, budget)
        return
    ranks = by_budget(spectra, budget)

    def carried(chosen: Any) -> float:
        return sum(s.parts()[0, :r].sum() for s, r in zip(spectra.values(), chosen, strict=True))

    every = itertools.product(*(range(1, s.most + 1) for s in spectra.values()))
    best = max(carried(chosen) for chosen in every if sum(chosen) <= steps)
    assert sum(r or 0 for r in ranks.values()) <= steps
    assert carried(ranks.values()) == pytest.approx(best, abs=1e-9)


def test_a_budget_is_kept_and_replays(seed=11):
    """A steep kernel gets few ranks, a flat one stays whole; the recipe with ranks is data, too."""
    steep = normal(seed, 48, 2) @ normal(seed + 1, 2, 48) + 1e-3 * normal(seed + 2, 48, 48)
    params = {"steep": {"kernel": steep}, "flat": {"kernel": np.eye(48, dtype=np.float32)}}
    transform = compress.lowrank(budget=0.6)
    small, report = transform(params)
    assert [(r.path, r.applied) for r in report] == [
        ("flat/kernel", "kept: no lower rank would do"),
        ("steep/kernel", "rank 4"),
    ]
    assert sum(r.bytes_after for r in report) <= 0.6 * sum(r.bytes_before for r in report)
    exact = transform.ranked(params)
    again = compress.loads(compress.dumps(exact))
    assert again == exact
    assert jax.tree.structure(jax.eval_shape(again, params)[0]) == jax.tree.structure(small)


def test_a_report_says_why_a_leaf_is_kept():
    params = {"a": {"kernel": np.eye(8, dtype="f")}, "b": {"kernel": np.ones(8, "f")}}
    report = compress.lowrank(budget=0.9)(params)[1]
    assert [r.applied[:15] for r in report] == ["rank 3", "kept: shape (8,)"[:15]]
    report = compress.lowrank({"a/kernel": {"energy": 1.0}})(params)[1]
    assert report[0].applied == "kept: no lower rank would do"


def test_factors_go_through_files():
    small, _ = compress.lowrank({"up/kernel": 3})(KINDS["dense"][1])
    arrays = compress.to_arrays(small)
    assert list(arrays) == ["up/bias", "up/kernel:factored.a", "up/kernel:factored.b"]
    back = compress.from_arrays(arrays, like=KINDS["dense"][1])
    assert isinstance(back["up"]["kernel"], Factored)
    a, b, index = np.ones((4, 2), "f"), np.ones((2, 3), "f"), np.ones((1, 2), np.uint8)
    for damaged, message in [
        ({"w:factored.a": a}, r"w:factored: parts a: expected '<path>:factored.a' and"),
        ({"w:factored.a": a, "w:factored.c": b}, "parts a, c"),
        ({"w:factored.a": a, "w:factored.b": b, "w:factored.b:scale": b}, "scales without|given"),
        ({"w:factored.a": a.astype("i1"), "w:factored.b": b}, "of one dtype of float32"),
        ({"w:factored.a": a, "w:factored.b": a}, r"\[4, 2\] and float32\[4, 2\]"),
        ({"w:factored.a": a, "w:factored.b": np.ones((2, 3))}, "float64"),
        ({"w:factored.a": a, "w:packed=2,4.values": a}, "w: given twice"),
        ({"w": a, "w:factored.a": a, "w:factored.b": b}, "w: given twice"),
        ({"w:factored.a:factored.a": a, "w:factored.b": b}, "expected '<path>'"),
        ({"w:packed=2,4.values": a, "w:packed=2,4.index": b}, "uint8 of 4 places"),
        ({"w:packed=2.values": a, "w:packed=2.index": index}, "packed=N,M"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress.from_arrays(damaged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress.lowrank({"**/kernel": 0}), "rank 0: expected"),
        (lambda: compress.lowrank({"**/kernel": {"energy": 1.5}}), "energy 1.5: expected"),
        (lambda: compress.lowrank({"**/kernel": {"rank": 1, "energy": 0.5}}), "one of rank"),
        (lambda: compress.lowrank({"**/kernel": "auto"}), "a budget is for leaves"),
        (lambda: compress.lowrank({"**/kernel": 1}, budget=0.5), "a budget is for leaves"),
        (lambda: compress.lowrank(budget=1.5), "a part between 0 and 1"),
        (lambda: compress.lowrank({"up/*": 3})(KINDS["dense"][1]), "up/bias: lowrank by rule"),
        (lambda: compress.lowrank({"up/kernel": 33})(KINDS["dense"][1]), "64 inputs or 32 outputs"),
        (lambda: compress.lowrank({"up/kernel": 3}, aware=True)(KINDS["dense"][1]), "statistics"),
        (lambda: compress.lowrank(budget=0.01)(KINDS["dense"][1]), "takes 0.0469 of their numbers"),
        (
            lambda: jax.eval_shape(compress.lowrank(budget=0.5), KINDS["dense"][1]),
            "call .ranked",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_groups_of_channels_are_refused():
    small, _ = compress.lowrank({"kernel": 2})({"kernel": normal(0, 3, 3, 4, 16)})
    names = ("NHWC", "HWIO", "NHWC")

    def fn(p: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=names, feature_group_count=4
        )

    with pytest.raises(NotImplementedError, match="no groups"):
        compress.apply(fn)(small, normal(1, 2, 6, 6, 16))
