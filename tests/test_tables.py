"""Embedding tables: rows and optimisers against numpy, what travels, and steps on every mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fw.model import Model, from_nnx
from fw.models.table import Table
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.table_optimizer import (
    TableOptions,
    lazy_adam,
    row_optimizer,
    rowwise_adagrad,
    sgd,
    with_tables,
)
from sharding import create, gather, make_mesh, put, rules, scope, shardings, tables
from sharding.layout import fit

RULES = rules()
MESHES = ("data=8", "data=2,fsdp=4", "data=4,tensor=2")
CUTS = {"rows": tables.BY_ROWS, "columns": tables.BY_COLUMNS, "whole": tables.WHOLE}
COUNT, SIZE, STEPS = 64, 16, 4


def batches(kind: str):
    """Ids [16, 6] and gradients: many of few, all of one owner, or none but some."""
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


def run(kind: str, start: np.ndarray, steps, names, mesh=None):
    """Fetches and updates; rows as fetched, the table and the state afterwards, on the host."""
    optimiser = OPTIMISERS[kind](0.1)

    def both(table, state, ids, grads, step):
        rows = tables.fetch(table, ids, names=names)
        rule = lambda rows, state, grads: optimiser.update(rows, state, grads, step)  # noqa: E731
        return rows, *tables.update(table, state, ids, grads, rule, names=names)

    table, call, seen = jnp.asarray(start), jax.jit(both), []
    if mesh is not None:
        table = jax.device_put(start, fit(names, start.shape, mesh, RULES))
    state = optimiser.init(table)
    for step, (ids, grads) in enumerate(steps):
        with scope(mesh, RULES) if mesh is not None else jax.named_scope("alone"):
            rows, table, state = call(table, state, ids, grads, jnp.int32(step))
        seen.append(gather(rows))
    return seen, gather(table), gather(state)


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("load", ["hot", "one owner", "of one device", "even"])
def test_rows_are_fetched_and_changed_as_in_numpy(kind, load):
    start = np.random.default_rng(0).normal(size=(COUNT, SIZE)).astype(np.float32)
    steps = list(batches(load))
    expected, remembered = dense(kind, start, steps)
    cases: list[Any] = [(None, tables.BY_ROWS), (make_mesh(MESHES[0]), tables.BY_ROWS)]
    if load == "hot":
        cases += [(make_mesh(m), names) for m in MESHES for names in CUTS.values()][1:]
    for mesh, names in cases:
        seen, table, state = run(kind, start, steps, names, mesh)
        ids = steps[0][0]
        first = np.where(ids[..., None] < 0, 0, start[ids])
        np.testing.assert_array_equal(seen[0], first)
        np.testing.assert_allclose(table, expected, rtol=1e-6, atol=1e-6)
        for name, value in state.items():
            np.testing.assert_allclose(value, remembered[name], rtol=1e-6, atol=1e-6)


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


def train(model, mesh, steps=10, kind="rowwise_adagrad", **options):
    mesh, config = make_mesh(mesh), AdamW(learning_rate=1e-2, weight_decay=0.0)
    rows = row_optimizer(TableOptions(kind, 0.1), config, steps)
    tx = with_tables(optimizer(config, steps), model, rows)
    step = make_step(model, squared, tx, mesh=mesh, rules=RULES, **options)
    state, losses = begin(model, tx, mesh), []
    for i in range(steps):
        state, measured = step(state, put(ratings(i), mesh, RULES))
        losses.append(float(measured["loss"]))
    return state, losses


def test_losses_are_the_same_on_every_mesh_and_in_microbatches():
    model = pairs()
    assert sorted(model.tables) == ["items/table", "tags/table", "users/table"]
    alone = train(model, "data=1")[1]
    assert np.mean(alone[-3:]) < 0.9 * np.mean(alone[:3])
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        np.testing.assert_allclose(train(model, mesh)[1], alone, rtol=1e-5)
    np.testing.assert_allclose(train(model, "data=2", accumulate=4)[1], alone, rtol=1e-5)
