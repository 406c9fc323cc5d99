"""Embedding tables: rows and optimisers against numpy, what travels, and steps on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fw.table_optimizer import lazy_adam, rowwise_adagrad, sgd
from sharding import ShardingError, gather, make_mesh, rules, scope, tables
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
