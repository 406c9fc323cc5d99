"""Embedding tables: rows and optimisers against numpy, what travels, and steps on every mesh."""

import contextlib
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fw import metrics
from fw.checkpoint import Checkpoints
from fw.errors import FwError
from fw.model import Model, from_nnx
from fw.models.table import Table
from fw.optimizer import AdamW, learning_rate, optimizer
from fw.step import abstract_state, initial_state, make_step
from fw.table_optimizer import (
    TableOptions,
    lazy_adam,
    row_optimizer,
    rowwise_adagrad,
    sgd,
    with_tables,
)
from sharding import (
    ShardingError,
    create,
    gather,
    inspect,
    make_mesh,
    put,
    rules,
    scope,
    shardings,
    tables,
    top_k,
)
from sharding.layout import fit
from tests.marks import slow

RULES = rules()
CUTS = {"rows": tables.BY_ROWS, "columns": tables.BY_COLUMNS, "whole": tables.WHOLE}
COUNT, SIZE, STEPS = 64, 16, 4


LOADS = ("hot", "one owner", "of one device", "even")


def batches(kind: str):
    """Ids [16, 6] and gradients: popular ones, all of one owner, those of one device, or any."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        ids = {
            "hot": np.minimum(rng.geometric(0.3, (16, 6)) - 1, COUNT - 1),
            "one owner": rng.integers(0, COUNT // 8, (16, 6)),
            "of one device": np.where(np.arange(16)[:, None] < 2, rng.integers(0, 8, (16, 6)), -1),
            "even": rng.integers(0, COUNT, (16, 6)),
        }[kind]
        ids = np.where(rng.random((16, 6)) < 0.2, -1, ids).astype(np.int32)
        yield ids, rng.normal(size=(16, 6, SIZE)).astype(np.float32)


def dense(kind: str, table: np.ndarray, steps, rate=0.1):
    """The same over the whole table in float64, as the papers have it, rows of no id left out."""
    table = table.astype(np.float64)
    total, mean, square = np.zeros(COUNT), np.zeros_like(table), np.zeros_like(table)
    for t, (ids, grads) in enumerate(steps, 1):
        g = np.zeros_like(table)
        np.add.at(g, ids[ids >= 0], grads[ids >= 0])
        here = np.isin(np.arange(COUNT), ids)
        if kind == "sgd":
            table = table - rate * g
        elif kind == "rowwise_adagrad":
            total = total + (g**2).mean(1)
            table[here] -= rate * g[here] / (np.sqrt(total[here])[:, None] + 1e-8)
        else:
            mean[here] = 0.9 * mean[here] + 0.1 * g[here]
            square[here] = 0.999 * square[here] + 0.001 * g[here] ** 2
            step = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
            table[here] -= rate * step[here]
    return table, {"sum": total, "mean": mean, "square": square}


OPTIMISERS = {"sgd": sgd, "rowwise_adagrad": rowwise_adagrad, "lazy_adam": lazy_adam}


def caller(names):
    """Fetches rows, then changes the table by every optimiser in turn, each from where it was."""

    def both(own, ids, grads, step):
        rows, new = {}, {}
        for kind, (table, state) in own.items():
            change = OPTIMISERS[kind](0.1).update
            rule = lambda rows, state, grads, change=change: change(rows, state, grads, step)  # noqa: E731
            rows[kind] = tables.fetch(table, ids, names=names)
            new[kind] = tables.update(table, state, ids, grads, rule, names=names)
        return rows, new

    return jax.jit(both, donate_argnums=0)


@pytest.mark.parametrize(
    ("mesh", "cut"),
    [
        ("", "rows"),
        slow("data=8", "rows"), ("data=8", "columns"), ("data=8", "whole"),
        ("data=2,fsdp=4", "rows"),
        slow("data=4,tensor=2", "rows"), ("data=4,tensor=2", "columns"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("quickly_compiled")
def test_rows_are_fetched_and_changed_as_in_numpy(mesh, cut):
    names, call = CUTS[cut], caller(CUTS[cut])
    start = np.random.default_rng(0).normal(size=(COUNT, SIZE)).astype(np.float32)
    for load in LOADS:
        own = {}
        for kind, optimiser in OPTIMISERS.items():
            table: Any = jnp.array(start)
            if mesh:
                table = jax.device_put(start, fit(names, start.shape, make_mesh(mesh), RULES))
            own[kind] = table, optimiser(0.1).init(table)
        steps = list(batches(load))
        for step, (ids, grads) in enumerate(steps):
            with scope(make_mesh(mesh), RULES) if mesh else contextlib.nullcontext():
                before = gather({kind: table for kind, (table, _) in own.items()})
                rows, own = call(own, ids, grads, jnp.int32(step))
            for kind, table in before.items():
                wanted = np.where(ids[..., None] < 0, 0, table[ids])
                np.testing.assert_array_equal(rows[kind], wanted, err_msg=f"{load} {kind}")
        for kind, (table, state) in gather(own).items():
            expected, remembered = dense(kind, start, steps)
            np.testing.assert_allclose(table, expected, rtol=1e-6, atol=1e-6, err_msg=load)
            for name, value in state.items():
                np.testing.assert_allclose(value, remembered[name], rtol=1e-6, atol=1e-6)


def test_rows_that_ids_cannot_number_are_refused():
    def shape(count, names):
        make = lambda: Table(count, 1, lambda batch: batch["ids"], names=names, rngs=nnx.Rngs(0))  # noqa: E731
        return nnx.eval_shape(make).table.shape

    most = 2**31 - 1 - tables.MULTIPLE
    assert shape(most, tables.WHOLE) == (most, 1)
    with pytest.raises(FwError, match=f"expected at most {most}; hash the ids"):
        shape(most + 1, tables.WHOLE)
    with pytest.raises(FwError, match=f"a table of {2**31 - 1024} rows"):
        shape(most - 1, tables.BY_ROWS)  # rounded up


def test_how_a_table_is_cut():
    said = {
        (943, 32): "whole", (1682, 16): "whole", (10**6, 16): "by rows", (1000, 512): "by columns",
        (1000, 500): "by rows",
    }  # fmt: skip
    for (count, size), cut in said.items():
        assert tables.placement(count, size).reason.startswith(cut)
    ids = jnp.zeros(8, jnp.int32)
    beside = pytest.raises(ShardingError, match="over axes that cut the batch: change the rules")
    with beside, scope(make_mesh("data=4,tensor=2"), rules(rows="tensor")):
        tables.fetch(jnp.ones((8, 2)), ids)
    gradient = jax.grad(lambda table: tables.fetch(table, ids).sum())
    by_table = pytest.raises(ShardingError, match="differentiate by its rows")
    with by_table, scope(make_mesh("data=8"), RULES):
        jax.eval_shape(gradient, jnp.ones((8, 2)))
    with pytest.raises(ShardingError, match=r"expected a table \[count, size\] and ids int32"):
        tables.fetch(jnp.ones((8, 2)), jnp.zeros(4))


@pytest.mark.parametrize("mesh", ["", "data=8", "data=2,fsdp=4", "data=4,tensor=2"])
def test_the_best_of_a_catalogue_are_those_of_a_stable_sort(mesh):
    """Of 10^5 items and no products that round, so that very many are equal."""
    rng, k, rows, count = np.random.default_rng(5), 20, 100_352, 100_000
    items = rng.integers(-2, 3, (rows, 8)).astype(np.float32)
    queries = rng.integers(-2, 3, (16, 8)).astype(np.float32)
    scores = queries @ items[:count].T
    seen = np.argsort(-scores, axis=1, kind="stable")[:, :30:3].astype(np.int32)  # of the best
    seen[:, 5:] = np.where(rng.random((16, 5)) < 0.5, -1, seen[:, 5:])
    seen[0] = -1
    for row, ids in enumerate(seen):
        scores[row, ids[ids >= 0]] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    call = jax.jit(partial(top_k, k=k, count=count))
    given: Any = queries, items
    if mesh:
        where = make_mesh(mesh)
        placed = jax.device_put(items, fit(tables.BY_ROWS, items.shape, where, RULES))
        given = put(queries, where, RULES), placed
    with scope(where, RULES) if mesh else contextlib.nullcontext():
        exclude = put(seen, where, RULES) if mesh else seen
        lowered = call.lower(*given, exclude=exclude)
        compiled = lowered.compile()
        found, ids = compiled(*given, exclude=exclude)
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, best, 1))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < scores.nbytes / 4


def test_a_catalogue_that_ends():
    """Fewer items are left than are asked for; others, whose rows are padding, do not come up."""
    call = partial(top_k, jnp.ones((8, 1)), jnp.arange(16.0)[:, None], 3, count=3)
    exclude = jnp.array([[0, 2]] * 8, jnp.int32)
    with scope(make_mesh("data=8"), RULES):
        scores, ids = jax.jit(call)(exclude=exclude)
    np.testing.assert_array_equal(ids, [[1, -1, -1]] * 8)
    np.testing.assert_array_equal(scores, [[1, -np.inf, -np.inf]] * 8)
    with pytest.raises(ShardingError, match="k=4 of 3 items in 16 rows"):
        top_k(jnp.ones((8, 1)), jnp.ones((16, 1)), 4, count=3)
    for one, other in ((jnp.bfloat16, jnp.float32), (jnp.int32, jnp.int32)):
        with pytest.raises(ShardingError, match="one floating dtype"):
            top_k(jnp.ones((8, 1), one), jnp.ones((8, 1), other), 4)


def test_an_item_without_a_score_does_not_come_up():
    """As `fw.metrics.ranks` has it behind all others."""
    items = jnp.array([1.0, jnp.nan, 3.0, 2.0, -jnp.nan])[:, None]
    scores, ids = top_k(jnp.ones((1, 1)), items, 5)
    np.testing.assert_array_equal(ids, [[2, 3, 0, -1, -1]])
    np.testing.assert_array_equal(scores, [[3, 2, 1, -np.inf, -np.inf]])
    nobody, ones = jnp.full((3, 1), -1), jnp.ones((3, 1))
    ranks = metrics.ranks(ones @ items.T, jnp.array([2, 3, 0]), nobody)
    np.testing.assert_array_equal(ranks, [0, 1, 2])


# --- the step -------------------------------------------------------------------------------------


class Pairs(nnx.Module):
    """Ratings of items by users, with a bag of tags: three tables, and a dense layer."""

    def __init__(self, rngs, count=64, names=tables.BY_ROWS):
        make = partial(Table, size=SIZE, rngs=rngs, init=nnx.initializers.normal(0.5))
        self.items = make(count, ids=lambda batch: batch["item"], names=names)
        self.users = make(32, ids=lambda batch: batch["user"], names=tables.WHOLE)
        self.tags = make(20, ids=lambda batch: batch["tags"], bag="mean", names=tables.BY_COLUMNS)
        self.out = nnx.Linear(
            SIZE, 1, rngs=rngs, kernel_metadata={"axes": ("mlp", "labels")},
            bias_metadata={"axes": ("labels",)},
        )  # fmt: skip

    def __call__(self, batch):
        item = self.items(batch) + self.tags(batch)
        return self.out(item * self.users(batch))[:, 0]


def pairs(**options) -> Model:
    build = lambda rngs: Pairs(rngs, **options)  # noqa: E731
    return from_nnx(None, build, lambda module, batch, key, train: module(batch))


def ratings(step, rows=32, count=64):
    rng = np.random.default_rng((3, step))
    tags = np.where(rng.random((rows, 3)) < 0.3, -1, rng.integers(0, 20, (rows, 3)))
    batch = {"item": rng.zipf(1.5, rows) % count, "user": rng.integers(0, 32, rows), "tags": tags}
    batch = {name: ids.astype(np.int32) for name, ids in batch.items()}
    return {**batch, "rating": ((batch["item"] + batch["user"]) % 2).astype(np.float32)}


def squared(outputs, batch):
    return jnp.sum((outputs - batch["rating"]) ** 2), jnp.asarray(outputs.size, outputs.dtype)


def begin(model, tx, mesh):
    key = jax.random.key(0)
    where = shardings(model.axes, jax.eval_shape(model.init, key), mesh, RULES)
    return initial_state(create(model.init, key, shardings=where), tx, mesh)


def trainer(model, mesh, steps=10, kind="rowwise_adagrad", **options):
    """A new state, and `train(state) -> (state, losses)` over the steps that are left until one."""
    mesh, config = make_mesh(mesh), AdamW(learning_rate=1e-2, weight_decay=0.0)
    rows = row_optimizer(TableOptions(kind, 0.1), config, steps)
    tx = with_tables(optimizer(config, steps), model, rows)
    step = make_step(model, squared, tx, mesh=mesh, rules=RULES, **options)

    def train(state, until=steps):
        losses = []
        for i in range(int(state.step), until):
            state, measured = step(state, put(ratings(i), mesh, RULES))
            losses.append(float(measured["loss"]))
        return state, losses

    return begin(model, tx, mesh), train


@pytest.mark.usefixtures("quickly_compiled")
def test_losses_are_the_same_on_every_mesh_and_a_run_goes_on_on_another(tmp_path):
    model = pairs()
    assert sorted(model.tables) == ["items/table", "tags/table", "users/table"]
    state, train = trainer(model, "data=1")
    alone = train(state)[1]
    assert np.mean(alone[-3:]) < 0.9 * np.mean(alone[:3])
    with Checkpoints(tmp_path, metric="score") as checkpoints:
        state, train = trainer(model, "data=8")
        state, first = train(state, until=5)
        checkpoints.save(state, {"score": 1.0})
        checkpoints.wait()
        np.testing.assert_allclose(first + train(state)[1], alone, rtol=1e-5)
        like, train = trainer(model, "data=2,fsdp=2,tensor=2")
        state = checkpoints.restore(like, 5)
    known = state.optimizer["tables"]["items"]["table"]["sum"]
    assert known.sharding == like.optimizer["tables"]["items"]["table"]["sum"].sharding
    assert len({str(shard.index) for shard in known.addressable_shards}) == 4
    np.testing.assert_allclose(train(state)[1], alone[5:], rtol=1e-5)
    np.testing.assert_allclose(train(like)[1], alone, rtol=1e-5)


NAMES = {"items": "item", "users": "user", "tags": "tags"}


def _where(here, new, old):
    return jnp.where(here.reshape(-1, *[1] * (new.ndim - 1)), new, old)


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(("kind", "parts"), [slow("rowwise_adagrad", 4), ("lazy_adam", 1)])
def test_a_step_is_that_of_autodiff_over_whole_tables(kind, parts):
    """Of three steps, in microbatches or not; optax's clipping and moments know no table."""
    model, steps = pairs(), 3
    state, train = trainer(model, "data=2", kind=kind, accumulate=parts)
    end = gather(train(state, until=steps)[0].variables["params"])
    params: Any = model.init(jax.random.key(0))["params"]
    config, dense = AdamW(learning_rate=1e-2, weight_decay=0.0), {"out": params["out"]}
    tx, rate = optimizer(config, 10), learning_rate(replace(config, learning_rate=0.1), 10)
    moments = tx.init(dense)
    known = {name: OPTIMISERS[kind](1.0).init(params[name]["table"]) for name in NAMES}

    @jax.jit
    def gradient(params, batch):
        def mean(params):
            outputs, _ = model.apply({"params": params, "state": {}}, batch)
            return jnp.divide(*squared(outputs, batch))

        return jax.grad(mean)(params)

    for step in range(steps):
        batch = ratings(step)
        grads = gradient(params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = tx.update({"out": grads["out"]}, moments, dense)
        dense: Any = optax.apply_updates(dense, updates)
        params["out"] = dense["out"]
        for name, column in NAMES.items():
            table = params[name]["table"]
            here = np.isin(np.arange(len(table)), batch[column])
            new = OPTIMISERS[kind](rate).update(table, known[name], grads[name]["table"], step)
            old = table, known[name]
            table, known[name] = jax.tree.map(partial(_where, here), new, old)
            params[name] = {"table": table}
    same = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    jax.tree.map(same, end, params)


def test_rows_travel_and_the_table_stays_where_it_is():
    """The program of a step on 8 devices: what its collectives and its temporaries hold."""
    count, rows = 2**17, 64
    model, config, mesh = pairs(count=count), AdamW(), make_mesh("data=8")
    tx = with_tables(
        optimizer(config, 9), model, row_optimizer(TableOptions("lazy_adam"), config, 9)
    )
    step = make_step(model, squared, tx, mesh=mesh, rules=RULES)
    batch = put(ratings(0, rows), mesh, RULES)
    state = abstract_state(model, tx, mesh, RULES)
    compiled = step.lower(state, batch).compile()
    part = count // 8 * SIZE * 4  # bytes of the table, of each moment, on a device
    # Ids out, rows back; ids and gradients out.
    found = inspect(compiled).collectives
    sent = [one for one in found if one.kind == "all-to-all" and one.axes == ("data",)]
    assert {"s32", "f32"} <= {one.dtype for one in sent}
    assert max(one.step_bytes for one in found) < part / 20
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < part / 5
    assert memory.alias_size_in_bytes > 3 * part  # the table and both of its moments
    made = re.findall(rf"= f32\[{count // 8},{SIZE}\]\S* ([a-z-]+)\(", compiled.as_text())
    assert {"scatter"} < {*made} <= {"scatter", "fusion", "parameter", "get-tuple-element"}


def test_an_optimiser_that_would_change_all_rows_is_refused():
    with pytest.raises(FwError, match=r"has the tables \['items/table', .*with_tables"):
        make_step(pairs(), squared, optimizer(AdamW(), 1), mesh=make_mesh("data=1"), rules=RULES)
    with pytest.raises(FwError, match="table_optimizer 'adam' is unknown; choose one of rowwise"):
        TableOptions("adam")
    with pytest.raises(FwError, match="table_learning_rate is -1; expected 0 or more"):
        TableOptions(table_learning_rate=-1)
