"""compress: sensitivity, latency and the search, against numpy and against trying everything."""

import dataclasses
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import Scheme, apply, recipe
from compress.arrays import Quantized
from compress.choice import search
from compress.damage import Sensitivity, sensitivity
from compress.knapsack import solve
from compress.latency import Times, measure
from compress.meetings import meetings
from compress.observing import observe
from compress.transform import chain, size
from compress.verified import verify

FAST = settings(max_examples=150, deadline=None, derandomize=True)


def normal(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- sensitivity ----------------------------------------------------------------------------------

MLP = {"up": {"kernel": normal(0, 16, 32)}, "down": {"kernel": normal(1, 32, 4)}}
X = normal(2, 8, 16)


def mlp(params, x):
    return jnp.maximum(x @ params["up"]["kernel"], 0) @ params["down"]["kernel"]


def mlp_np(up, down, x=X):
    return np.maximum(x.astype(float) @ up, 0) @ down


def rounded_np(w, largest, group):
    """Symmetric rounding to nearest, one scale for each output and group of inputs."""
    blocks = w.reshape(-1, group, w.shape[1])
    scale = np.abs(blocks).max(1, keepdims=True) / largest
    return (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(w.shape)


def damage_np(y, other):
    return ((y - other) ** 2).sum() / (y**2).sum()


def test_damage_is_that_of_one_rounded_leaf():
    calls = []

    def fn(params, x):
        calls.append(1)
        return mlp(params, x)

    seen = []
    candidates = {
        "int8": "int8",
        "int4": Scheme("int4", per=8),
        "wide": Scheme("int4", per=32),
        "keep": "keep",
    }
    t: Any = sensitivity(
        fn, MLP, X, candidates=candidates, progress=lambda done, total: seen.append((done, total))
    )
    up, down = MLP["up"]["kernel"], MLP["down"]["kernel"]
    y = mlp_np(up, down)
    want = {
        "down/kernel": [
            damage_np(y, mlp_np(up, rounded_np(down, 127, 32))),
            damage_np(y, mlp_np(up, rounded_np(down, 7, 8))),
            damage_np(y, mlp_np(up, rounded_np(down, 7, 32))),
            0,
        ],
        "up/kernel": [
            damage_np(y, mlp_np(rounded_np(up, 127, 16), down)),
            damage_np(y, mlp_np(rounded_np(up, 7, 8), down)),
            None,
            0,
        ],
    }
    assert t.paths == tuple(want)
    # y − y' is 1e-3 of y at least, of which float32 leaves four digits.
    got, want = (np.array(rows, float) for rows in (t.damage, list(want.values())))
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert t.sizes == (
        (32 * 4 + 4 * 4, 32 * 4 // 2 + 4 * 4 * 4, 32 * 4 // 2 + 4 * 4, 32 * 4 * 4),
        (16 * 32 + 32 * 4, 16 * 32 // 2 + 2 * 32 * 4, None, 16 * 32 * 4),
    )
    assert t.bytes == size(MLP)
    assert len(calls) == 1  # one program for all leaves and candidates
    assert seen == [(i + 1, 5) for i in range(5)]


def test_exact_rounds_activations_too():
    t: Any = sensitivity(mlp, MLP, X, candidates=["int8"], rules="down/kernel", exact=True)
    up, down = MLP["up"]["kernel"], MLP["down"]["kernel"]
    y = mlp_np(up, down)
    h = np.maximum(X @ up, 0)
    scale = h.max(1, keepdims=True) / 127
    other = (np.rint(h / scale) * scale) @ rounded_np(down, 127, 32)
    # Where h / scale is half-way, another rounding of it is as good: a step of 127 in few of 256.
    np.testing.assert_allclose(t.damage[0][0], damage_np(y, other), rtol=0.05)
    assert t.damage[0][0] > 1.3 * damage_np(y, h @ rounded_np(down, 127, 32))


def test_prepared_leaves_keep_what_prepares_their_inputs():
    """w = s · v: the values v are rounded, the inputs scaled, with the program of before."""
    down = MLP["down"]["kernel"]
    s = np.exp(normal(3, 32, 1))
    held = Quantized(
        jnp.asarray(down / s), input_scale=jnp.asarray(s), format="float", as_dtype=down.dtype
    )
    params = {**MLP, "down": {"kernel": held}}
    t: Any = sensitivity(mlp, params, X, candidates=["int8"], rules="down/kernel")
    up = MLP["up"]["kernel"]
    want = damage_np(mlp_np(up, down), mlp_np(up, s * rounded_np(down / s, 127, 32)))
    np.testing.assert_allclose(t.damage[0][0], want, rtol=1e-3)


def test_a_metric_may_be_a_loss():
    labels = np.arange(8) % 4

    def loss(_, outputs):
        p = np.asarray(jax.nn.log_softmax(outputs))
        return -p[np.arange(8), labels].mean()

    t: Any = sensitivity(mlp, MLP, X, candidates=["int8"], rules="up/*", metric=loss)
    up, down = MLP["up"]["kernel"], MLP["down"]["kernel"]
    want = loss(None, mlp_np(rounded_np(up, 127, 16), down)) - loss(None, mlp_np(up, down))
    np.testing.assert_allclose(t.damage[0][0], want, rtol=1e-2, atol=1e-5)


def residual(params, x):
    for layer in params:
        x = x + jnp.tanh(x @ layer["kernel"])
    return x


def planted(seed=0, which=2):
    """Layers alike, but for an outlier in every channel of one, which takes the range.

    It meets input 3, to which nothing is written.
    """
    layers = [{"kernel": normal(seed + i, 32, 32) / 8} for i in range(5)]
    layers[which]["kernel"][3] = 20.0
    for layer in layers:
        layer["kernel"][:, 3] = 0
    return layers


def test_a_planted_layer_is_found_and_kept():
    params, x = planted(), normal(9, 16, 32)
    x[:, 3] = 0
    t: Any = sensitivity(
        residual, params, x, candidates={"int4": Scheme("int4", per=32), "keep": "keep"}
    )
    damage = [row[0] for row in t.damage]
    assert damage[2] > 3 * max(d for i, d in enumerate(damage) if i != 2)
    one_kept = t.bytes - 4 * (t.sizes[0][1] - t.sizes[0][0])
    choice = search(t, max_bytes=one_kept)
    assert [c for _, c in choice.chosen] == ["int4", "int4", "keep", "int4", "int4"]


def test_stacked_leaves_are_one_leaf():
    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["kernel"])[0]

    layers = planted()
    params = {"layers": {"kernel": np.stack([layer["kernel"] for layer in layers])}}
    x = normal(9, 16, 32)
    t: Any = sensitivity(lambda p, x: scanned(p["layers"], x), params, x, candidates=["int8"])
    together = [{"kernel": rounded_np(layer["kernel"], 127, 32)} for layer in layers]
    want = damage_np(np.asarray(residual(layers, x)), np.asarray(residual(together, x)))
    assert t.paths == ("layers/kernel",)
    np.testing.assert_allclose(t.damage[0][0], want, rtol=1e-2)


def test_sharded_leaves_give_the_same_table():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.NamedSharding(mesh, jax.P("x", None))
    one = sensitivity(mlp, MLP, X, candidates=["int8", "keep"])
    many = sensitivity(mlp, jax.device_put(MLP, where), X, candidates=["int8", "keep"])
    assert many.sizes == one.sizes
    got, want = np.array(many.damage, float), np.array(one.damage, float)
    np.testing.assert_allclose(got, want, rtol=1e-3)


def nothing(params, x):
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": "**/kernels"}, r"rule '\*\*/kernels' matches no path; nearest are .*kernel"),
        ({"rules": ()}, "no rules"),
        ({"candidates": {}}, "no candidates"),
        ({"candidates": {"a": "int3"}}, "candidate 'a': format 'int3'"),
        ({"candidates": ["int8", "int8"]}, "candidate 'int8' is there twice"),
        ({"candidates": ["int4", "keep"]}, "candidate 'int4' fits no leaf: down/kernel: .*groups"),
        ({"candidates": [Scheme("int4", per=32)]}, "up/kernel: no candidate fits.*32.*'keep'"),
        ({"candidates": [Scheme(activations="static")]}, "down/kernel: .*needs statistics"),
        ({"metric": lambda a, b: math.nan}, "the parameters as they are: damage nan"),
        (
            {"metric": lambda a, b: 0.0 if a is b else math.nan},
            "down/kernel: as int8: damage nan",
        ),
        (
            {"params": {"kernel": np.full((4, 4), np.nan, np.float32)}, "fn": nothing},
            "kernel: .*NaN",
        ),
        ({"fn": lambda p, x: x.astype(np.int32)}, "no floating outputs"),
    ],
)
def test_what_cannot_be_measured_is_named(change, message):
    usual: dict[str, Any] = {"fn": mlp, "params": MLP, "candidates": ["int8", "keep"]}
    usual |= change
    fn, params = usual.pop("fn"), usual.pop("params")
    with pytest.raises(ValueError, match=message):
        sensitivity(fn, params, X, **usual)


def test_exact_names_the_leaf_that_no_compressed_array_can_be():
    with pytest.raises(NotImplementedError, match="up/kernel: as int8: no rule"):
        sensitivity(
            lambda p, x: mlp(jax.tree.map(jnp.abs, p), x), MLP, X,
            candidates=["int8"], rules="up/kernel", exact=True,
        )  # fmt: skip


# --- search ---------------------------------------------------------------------------------------


def problem(sizes, damage, seconds, rest=0, whole=0.0) -> Any:
    """A table of integers, None where a candidate does not fit, and times."""
    paths = tuple(f"layer{i}" for i in range(len(sizes)))
    candidates = tuple((f"c{j}", Scheme("int4", per=j + 1)) for j in range(len(sizes[0])))
    t = Sensitivity(paths, candidates, sizes, damage, (0,) * len(sizes), rest)
    return t, Times(paths, candidates, seconds, (0.0,) * len(sizes), whole)


@st.composite
def problems(draw):
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    fits = draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=n, max_size=n))
    for row in fits:
        row[draw(st.integers(0, m - 1))] = True

    def figures(low, high):
        number = st.integers(low, high)
        return tuple(tuple(draw(number) if ok else None for ok in row) for row in fits)

    t, times = problem(
        figures(0, 9),
        figures(-3, 9),
        figures(0, 9),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 9)),
    )
    limit = st.none() | st.integers(0, 9 * n)
    limits = {name: draw(limit) for name in ("max_bytes", "max_seconds", "max_damage")}
    if all(v is None for v in limits.values()):
        limits["max_bytes"] = 4 * n
    return t, times, limits


@FAST
@given(problems())
def test_search_is_as_good_as_trying_everything(case):
    t, times, limits = case
    by_damage = limits["max_bytes"] is not None or limits["max_seconds"] is not None
    best = math.inf
    for choice in itertools.product(*(range(len(t.candidates)) for _ in t.paths)):
        if any(t.sizes[i][c] is None for i, c in enumerate(choice)):
            continue
        figures = {
            "max_bytes": t.rest + sum(t.sizes[i][c] for i, c in enumerate(choice)),
            "max_seconds": times.whole + sum(times.seconds[i][c] for i, c in enumerate(choice)),
            "max_damage": sum(t.damage[i][c] for i, c in enumerate(choice)),
        }
        if all(v is None or figures[name] <= v for name, v in limits.items()):
            best = min(best, figures["max_damage" if by_damage else "max_seconds"])
    if best == math.inf:
        with pytest.raises(ValueError, match="no choice keeps"):
            search(t, times=times, **limits)
        return
    found = search(t, times=times, **limits)
    picked = [
        next(c for c, (n, _) in enumerate(t.candidates) if n == name) for _, name in found.chosen
    ]
    assert found.damage == sum(t.damage[i][c] for i, c in enumerate(picked))
    assert found.bytes == t.rest + sum(t.sizes[i][c] for i, c in enumerate(picked))
    assert found.seconds == times.whole + sum(times.seconds[i][c] for i, c in enumerate(picked))
    assert (found.damage if by_damage else found.seconds) == best
    reached = {"max_bytes": found.bytes, "max_seconds": found.seconds, "max_damage": found.damage}
    assert all(v is None or reached[name] <= v for name, v in limits.items())


@pytest.mark.parametrize("seed", range(3))
def test_forty_leaves_are_solved_as_by_a_table_of_all_sizes(seed):
    """The textbook's dynamic program: least damage for every number of bytes."""
    rng = np.random.default_rng(seed)
    value, cost = rng.random((40, 4)), rng.integers(1, 40, (40, 4))
    budget = int(cost.min(1).sum() * 1.7)
    least = np.full(budget + 1, np.inf)
    least[0] = 0
    for v, c in zip(value, cost, strict=True):
        new = np.full_like(least, np.inf)
        for x, n in zip(v, c, strict=True):
            new[n:] = np.minimum(new[n:], least[: budget + 1 - n] + x)
        least = new
    got = solve(value, cost[None].astype(float), np.array([float(budget)]))
    assert got is not None
    each = np.arange(40)
    assert cost[each, got].sum() <= budget
    np.testing.assert_allclose(value[each, got].sum(), least.min(), rtol=1e-12)
    # The same budget twice changes nothing, and a tolerance is kept to.
    twice = np.stack([cost, cost]).astype(float)
    both = solve(value, twice, np.array([budget, budget], float))
    assert both is not None and value[each, both].sum() == value[each, got].sum()
    near = solve(value, cost[None].astype(float), np.array([float(budget)]), tolerance=0.1)
    assert near is not None and cost[each, near].sum() <= budget
    assert value[each, near].sum() <= 1.1 * least.min()


def hard(seed):
    """Lists for which the first sweep, of one partial choice, is far from the best."""
    rng = np.random.default_rng(seed)
    value, cost = rng.random((7, 4)).round(2) + 0.01, rng.integers(1, 30, (7, 4))
    budget = int(cost.min(1).sum() * 1.6)
    return value, cost, budget


@pytest.mark.parametrize("tolerance", [0.2, 1.0, 3.0])
def test_a_tolerance_is_of_the_least_value(tolerance, monkeypatch):
    monkeypatch.setattr("compress.knapsack.WIDTHS", (1, 262_144))
    off = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        value, cost = np.exp(4 * rng.normal(size=(5, 3))), rng.integers(1, 30, (5, 3))
        budget = int(cost.min(1).sum() * 1.3)
        args = value, cost[None].astype(float), np.array([float(budget)])
        least, near = (solve(*args, tolerance=t) for t in (0.0, tolerance))
        assert least is not None and near is not None
        each = np.arange(5)
        off.append(value[each, near].sum() / value[each, least].sum())
    assert 1 < max(off) <= 1 + tolerance + 1e-9


def test_a_tolerance_does_not_hide_what_keeps_the_budgets(monkeypatch):
    monkeypatch.setattr("compress.knapsack.WIDTHS", (1, 262_144))
    hidden = 0
    for seed in range(40):
        value, cost, budget = hard(seed)
        t, _ = problem(cost.tolist(), value.tolist(), value.tolist())
        least = search(t, max_bytes=budget).damage
        hidden += search(t, max_bytes=budget, tolerance=1.0).damage > least
        kept = search(t, max_bytes=budget, max_damage=least, tolerance=1.0)
        assert kept.damage == least and kept.bytes <= budget
    assert hidden  # there were some


def test_the_faster_is_preferred_under_a_budget_of_time():
    # c1 does the least damage and c0 is the fastest; of layer1 all are as fast.
    t, times = problem(
        ((10, 10), (10, 10)), ((2.0, 1.0), (2.0, 1.0)), ((1.0, 8.0), (4.0, 4.0)), whole=10.0
    )
    times = dataclasses.replace(times, keep=(5.0, 3.0))  # of 10 seconds, 2 are others'
    slow, fast = search(t, max_seconds=14, times=times), search(t, max_seconds=13.5, times=times)
    assert [c for _, c in slow.chosen] == ["c1", "c1"] and slow.seconds == 14
    assert [c for _, c in fast.chosen] == ["c0", "c1"] and fast.seconds == 7
    assert search(t, max_damage=4, times=times).seconds == 7


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "no budget"),
        ({"max_seconds": 3, "times": None}, "max_seconds needs times"),
        ({"max_bytes": 10}, "max_bytes=10 is not to be had: the least is 11 bytes"),
        ({"max_seconds": 1}, "max_seconds=1 is not to be had: the least is 2 seconds"),
        (
            {"max_bytes": 14, "max_seconds": 3},
            "with max_seconds=3 the least is 20 bytes; with max_bytes=14 the least is 5 seconds",
        ),
        ({"max_bytes": 14, "max_damage": 1}, "with max_bytes=14 the least is damage 3"),
    ],
)
def test_budgets_that_cannot_be_kept_say_what_can(limits, message):
    # Smaller is slower, and does more damage.
    t, times = problem(((2, 5), (2, 8)), ((2, 0), (3, 0)), ((3, 1), (4, 1)), rest=7)
    with pytest.raises(ValueError, match=message):
        search(t, **{"times": times, **limits})


def test_times_of_something_else_are_refused():
    t, times = problem(((2, 5),), ((2, 0),), ((3, 1),))
    with pytest.raises(ValueError, match="layer0: not in times"):
        search(t, max_seconds=1, times=dataclasses.replace(times, paths=("other",)))
    other = (("c0", Scheme("int8")), times.candidates[1])
    with pytest.raises(ValueError, match="candidate 'c0': not in times"):
        search(t, max_seconds=1, times=dataclasses.replace(times, candidates=other))
    with pytest.raises(ValueError, match="layer0: other candidates fit"):
        search(t, max_seconds=1, times=dataclasses.replace(times, seconds=((None, 1.0),)))


def test_a_choice_is_a_transform_and_data():
    params = {
        "blocks[0]": {"kernel": normal(0, 16, 8), "bias": normal(1, 8)},
        "b*": {"kernel": normal(2, 8, 8)},
        "by": {"kernel": normal(3, 8, 8)},
    }

    def fn(p, x):
        x = x @ p["blocks[0]"]["kernel"] + p["blocks[0]"]["bias"]
        return x @ p["b*"]["kernel"] @ p["by"]["kernel"]

    x = normal(4, 4, 16)
    t: Any = sensitivity(
        fn, params, x, candidates={"a": "int8", "b": Scheme("int4", per=8), "k": "keep"}
    )
    for part, names in ((0.34, {"a", "b"}), (0.6, {"a", "k"})):
        choice = search(t, max_bytes=part * t.bytes)
        assert {name for _, name in choice.chosen} == names
        small, report = choice(params)
        assert choice.bytes == size(small) == sum(r.bytes_after for r in report) <= part * t.bytes
        for path, name in choice.chosen:
            applied = next(r.applied for r in report if r.path == path)
            assert applied.startswith({"a": "int8", "b": "int4 per 8", "k": "kept"}[name])
        assert recipe.loads(recipe.dumps(choice)) == choice.transform
        assert chain(choice).data()["transforms"] == [choice.transform.data()]
        assert "by/kernel" in str(choice) and f"{choice.bytes:,} bytes" in str(choice)
    seen = verify(fn, params, x, choice=choice, rounds=1)
    assert seen.bytes == choice.bytes and seen.seconds > 0 and seen.before > 0
    want = damage_np(np.asarray(fn(params, x)), np.asarray(jax.jit(apply(fn))(small, x)))
    np.testing.assert_allclose(seen.damage, want, rtol=1e-3)
    assert f"{seen.bytes:,}" in str(seen)


def test_tables_are_data():
    t, times = problem(((2, None), (2, 8)), ((0.5, None), (3, 0)), ((3, None), (4, 1.5)), rest=7)
    for table in (t, times):
        assert type(table).of_data(json.loads(json.dumps(table.data()))) == table
        lines = str(table).splitlines()
        assert lines[1].startswith("layer0") and lines[1].endswith("-") and "c1" in lines[0]
        assert hash(table) == hash(dataclasses.replace(table))


# --- latency --------------------------------------------------------------------------------------


def scan_of(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def nested(w, x):
    return jax.lax.scan(lambda x, w: (scan_of(w, x), None), x, w.reshape(2, 3, 8, 8))[0]


def branched(w, x):
    return jax.lax.switch(
        jnp.int32(x[0, 0]), [lambda x: x @ w, jnp.sin, lambda x: x @ w.T, jnp.cos], x
    )


def here(w, x):
    other = lambda w, x: x @ w @ w  # noqa: E731
    return jax.lax.platform_dependent(w, x, cpu=lambda w, x: x @ w, default=other)


def tied(w, ids):
    return jnp.take(w, ids, axis=0) @ w.T


def heads(w, x):
    return jnp.einsum("be,ehd->bhd", x, w.reshape(8, 2, 4))


def counted(w, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]


def convolved(w, x):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, None))

SQUARE, ROWS = (8, 8), (5, 8)


@pytest.mark.parametrize(
    ("fn", "shape", "x", "want"),
    [
        (lambda w, x: x @ w, SQUARE, ROWS, [(1, (5, 8))]),
        (lambda w, x: jax.jit(jnp.matmul)(x, w.T) + 1, SQUARE, ROWS, [(1, (5, 8))]),
        (lambda w, x: jax.checkpoint(jnp.matmul)(x, w), SQUARE, ROWS, [(1, (5, 8))]),
        (lambda w, x: custom(x, w), SQUARE, ROWS, [(1, (5, 8))]),
        (lambda w, x: x @ w[1] @ w[:2].sum(0), (3, 8, 8), ROWS, [(1, (5, 8))]),
        (lambda w, x: jax.vmap(jnp.matmul)(x, w), (3, 8, 8), (3, 5, 8), [(1, (3, 5, 8))]),
        (lambda w, x: x @ jax.lax.optimization_barrier((x, w))[1], SQUARE, ROWS, [(1, (5, 8))]),
        (here, SQUARE, ROWS, [(1, (5, 8))]),
        (scan_of, (6, 8, 8), ROWS, [(6, (5, 8))]),
        (nested, (6, 8, 8), ROWS, [(6, (5, 8))]),
        (branched, SQUARE, ROWS, [(0.25, (5, 8)), (0.25, (5, 8))]),
        (counted, SQUARE, ROWS, [(1, (5, 8))]),
        (heads, SQUARE, ROWS, [(1, (5, 2, 4))]),
        (tied, (20, 8), np.arange(6), [(1, (6, 8)), (1, (6, 20))]),
        (convolved, (3, 3, 4, 6), (2, 5, 5, 4), [(1, (2, 5, 5, 6))]),
        (lambda w, x: x * w[0], SQUARE, ROWS, []),
        (lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 3])), (2, 8, 8), ROWS, []),
    ],
)
def test_products_are_found_as_often_as_they_run(fn, shape, x, want):
    x = x if isinstance(x, np.ndarray) else normal(1, *x)
    w, rng = normal(0, *shape), np.random.default_rng(0)
    found = meetings(lambda p, x: fn(p["w"], x), {"w": w}, x)
    got = [(m.times, m.program(w, *(o.draw(rng) for o in m.operands)).shape) for m in found]
    assert {m.path for m in found} <= {"w"}
    assert sorted(got) == sorted(want)


def test_a_program_is_the_product_of_the_function():
    """A layer cut out of a stack, transposed, and split in heads."""
    w, x = normal(0, 3, 8, 6), normal(1, 5, 6)

    def fn(w, x):
        return jnp.einsum("bi,hdi->bhd", x, w[1].reshape(2, 4, 6))

    (one,) = meetings(fn, w, x)
    assert [o.shape for o in one.operands] == [(5, 6)]
    got = np.asarray(one.program(w, x))
    want = np.einsum("bi,hdi->bhd", x, w[1].reshape(2, 4, 6))
    # The function transposes the product, which it may have in any order.
    same = [got.transpose(order) for order in itertools.permutations(range(3))]
    assert any(y.shape == want.shape and np.allclose(y, want, atol=1e-5) for y in same)


def test_measured_are_all_leaves_and_candidates_equal_products_once():
    params = {
        "table": normal(0, 20, 8),
        "layers": [{"kernel": normal(i, 8, 8)} for i in range(3)],
        "head": {"kernel": normal(9, 8, 3), "bias": normal(8, 3)},
    }

    def fn(p, ids):
        x = jnp.take(p["table"], ids, axis=0)
        for layer in p["layers"]:
            x = jnp.tanh(x @ layer["kernel"])
        return x @ p["head"]["kernel"] + p["head"]["bias"]

    ids, seen = np.arange(4), []
    stats = jax.jit(observe(fn))(params, ids)[1]
    candidates = {
        "int8": "int8",
        "static": Scheme(activations="static", role="kernel"),
        "keep": "keep",
    }
    t: Any = measure(
        fn, params, ids, candidates=candidates, rules="**/kernel", stats=stats, rounds=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert t.paths == ("head/kernel", *(f"layers/{i}/kernel" for i in range(3)))
    assert all(s > 0 for row in t.seconds for s in row) and t.whole > 0
    assert seen == [(1, 2), (2, 2)]  # the layers' products are the same
    assert t.seconds[1] == t.seconds[2] == t.seconds[3]
    assert all(row[2] == keep for row, keep in zip(t.seconds, t.keep, strict=True))
    table: Any = measure(fn, params, ids, candidates=["int8"], rules="table", rounds=1)
    assert table.seconds[0][0] > 0


def test_leaves_of_no_product_are_named():
    params = {"a": {"kernel": normal(0, 8, 8)}, "b": {"kernel": normal(1, 8, 8)}}
    with pytest.raises(ValueError, match="b/kernel: takes part in no dot"):
        measure(lambda p, x: x @ p["a"]["kernel"], params, X[:, :8], candidates=["int8"])
    with pytest.raises(NotImplementedError, match=r"a/kernel: as int4: .*shares"):
        measure(
            lambda p, x: x[:, :3] @ p["a"]["kernel"][:3], params, X[:, :8],
            candidates={"int4": Scheme("int4", per=8)}, rules="a/*", rounds=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="rounds=0"):
        measure(mlp, MLP, X, candidates=["int8"], rounds=0)
