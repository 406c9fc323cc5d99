"""Recommenders on MovieLens-100k beside what is hard to beat, in the same split.

    python scripts/bench/recommend.py             # both tables, the settings that dev has chosen
    python scripts/bench/recommend.py --search    # how dev chooses among settings

Retrieval: a user's last film is for the test, the one before for dev; each is ranked among all
films that the user has not rated before. Beside the two-tower model and a DLRM that scores every
film stand the most popular films and iALS (Hu, Koren & Volinsky 2008, doi:10.1109/ICDM.2008.22; with
the scaled regularisation and settings of Rendle et al. 2021, arXiv:2110.14037), its vectors of users
solved anew with what is known at the time of the test. Clicks: whether a rating is 4 or more, pairs
split by a hash; beside DLRM a logistic regression on the same columns, one-hot.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from fw import metrics
from fw.data import Batches
from fw.data.interactions import Interactions
from fw.data.rows import Rows
from fw.data.vocabulary import Vocabulary
from fw.evaluate import evaluate, make_counter
from fw.model import Model
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.table_optimizer import TableOptions, row_optimizer, with_tables
from fw.tasks import Task
from sharding import create, make_mesh, put, rules, shardings

FEATURES = (
    "user.age", "user.gender", "user.occupation", "item.release_year", "item.class",
)  # fmt: skip
TOWERS = {"size": 64, "temperature": 0.1, "dropout": 0.2}
TOWERS_FIT = {"epochs": 15, "rate": 3e-3}
IALS = {"size": 64, "alpha": 0.1, "decay": 0.003}
MESH, LAYOUT = make_mesh("data=1"), rules("data")


def fit(model: Model, task: Task, batches: Batches, *, epochs: float, rate: float) -> Any:
    """The variables after so many epochs, and the last loss."""
    steps = round(epochs * batches.steps_per_epoch)
    config = AdamW(learning_rate=rate, schedule="linear", warmup=0.05)
    rows = row_optimizer(TableOptions("lazy_adam", rate), config, steps)
    tx = with_tables(optimizer(config, steps), model, rows)
    key = jax.random.key(0)
    where = shardings(model.axes, jax.eval_shape(model.init, key), MESH, LAYOUT)
    state = initial_state(create(model.init, key, shardings=where), tx, MESH)
    step = make_step(model, task.loss, tx, mesh=MESH, rules=LAYOUT)
    for i in range(steps):
        state, figures = step(state, put(batches(i), MESH, LAYOUT))
    return state.variables, float(figures["loss"])


def judge(model: Model, task: Task, variables: Any, rows: Rows) -> Mapping[str, float]:
    counter = make_counter(lambda variables, batch: model.apply(variables, batch)[0], task)
    return evaluate(counter, variables, rows, size=512, mesh=MESH, rules=LAYOUT).figures


def of_scores(rows: Rows, score: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """The figures of a ranking by `score(places of queries) -> [queries, items]`."""
    counts = []
    for some in np.array_split(np.arange(rows.rows), 8):
        own = {name: jnp.asarray(rows.arrays[name][some]) for name in ("target", "seen")}
        scores = jnp.asarray(score(some), jnp.float32)
        found = metrics.ranks(scores, own["target"], own["seen"])
        counts.append(metrics.rank_means(found, own["target"] >= 0))
    return {name: metrics.mean_value(value) for name, value in metrics.merge(*counts).items()}


def ials(
    known: np.ndarray, *, size: int, alpha: float, decay: float, rounds: int = 16, seed: int = 0
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Vectors of items, and what solves those of users for what is known of them.

    Minimises Σ over known (u · v - 1)² + α Σ over all (u · v)² + λ Σ (n + α N) |·|², n the number
    known of a user or item and N that of the other side.

    Args:
        known: float [users, items], 1 where a user took an item.
        size: of a vector.
        alpha, decay: α and λ.
        rounds: how often both sides are solved.
        seed: of the first vectors.
    """

    def solve(known: np.ndarray, other: np.ndarray) -> np.ndarray:
        products = (other[:, :, None] * other[:, None]).reshape(len(other), -1)
        left = (known @ products).reshape(-1, size, size) + alpha * other.T @ other
        scale = decay * (known.sum(1) + alpha * len(other))
        left += scale[:, None, None] * np.eye(size, dtype=np.float32)
        return np.linalg.solve(left, (known @ other)[..., None])[..., 0]

    deviation = 0.1 / np.sqrt(size)
    items = np.random.default_rng(seed).normal(0, deviation, (known.shape[1], size))
    items = items.astype(np.float32)
    for _ in range(rounds):
        users = solve(known, items)
        items = solve(known.T, users)
    return items, lambda known: solve(known, items)


def matrix(vocabulary: Vocabulary, data: Interactions) -> np.ndarray:
    known = np.zeros((len(vocabulary.users), len(vocabulary.items)), np.float32)
    users = [vocabulary.user_places[name] for name in data.events.columns["user"]]
    known[users, [vocabulary.item_places[name] for name in data.events.columns["item"]]] = 1
    return known


def with_negatives(rows: Rows, items: Rows, share: float, seed: int = 0) -> Batches:
    """Batches of pairs in which so many rows have another item, any of the catalogue, and label 0."""

    def change(taken: dict[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
        bits = _mixed(places.astype(np.uint64) + np.uint64(seed << 40))
        wrong = (bits >> np.uint64(40)) < np.uint64(share * 2**24)
        other = (bits & np.uint64(2**32 - 1)) % np.uint64(items.rows)
        for name, values in items.arrays.items():
            taken[name] = taken[name].copy()
            taken[name][wrong] = values[other[wrong].astype(np.int64)]
        return {**taken, "labels": np.where(wrong, 0, 1).astype(np.int32)}

    return Batches(rows.arrays, 2048, seed, change)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Random bits of each number (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def one_hot(vocabulary: Vocabulary, rows: Rows) -> scipy.sparse.csr_matrix:
    """All columns side by side; a bag as its mean."""
    blocks = []
    for column in vocabulary.columns:
        values = rows.arrays[column.name]
        if column.kind == "float":
            blocks.append(scipy.sparse.csr_matrix(values[:, None]))
            continue
        ids = values.reshape(len(values), -1)
        there = ids >= 0
        weight = there / np.maximum(there.sum(1, keepdims=True), 1)
        row = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
        shape = (len(ids), column.rows)
        entries = (weight[there], (row[there], ids[there]))
        blocks.append(scipy.sparse.csr_matrix(entries, shape=shape))
    return scipy.sparse.hstack(blocks).tocsr()
