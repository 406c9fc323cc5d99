"""Recommenders on MovieLens-100k beside what is hard to beat, in the same split.

    python scripts/bench/recommend.py             # both tables, the settings that dev has chosen
    python scripts/bench/recommend.py --search    # how dev chooses among settings

Retrieval: a user's last film is for the test, the one before for dev; each is ranked among all
films that the user has not rated before. Beside the two-tower model and a DLRM that scores every
film stand the most popular films and iALS (Hu, Koren & Volinsky 2008, doi:10.1109/ICDM.2008.22,
with the scaled regularisation of Rendle et al. 2021, arXiv:2110.14037), its vectors of users solved
anew with what is known at the time of the test. Clicks: whether a rating is 4 or more, pairs split
by a hash; beside DLRM a logistic regression on the same columns, one-hot, but for the history.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from fw import assets, host, metrics
from fw.data import Batches
from fw.data.interactions import (
    Interactions,
    concatenate,
    leave_last_out,
    load_interactions,
    split_pairs,
)
from fw.data.recommend import catalogue, clicks, dlrm_fields, pairs, queries, two_tower_fields
from fw.data.rows import Rows
from fw.data.vocabulary import Vocabulary, fit_vocabulary
from fw.evaluate import evaluate, make_counter
from fw.model import Model
from fw.models.dlrm import DLRMConfig, dlrm
from fw.models.two_tower import TwoTowerConfig, two_tower
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.table_optimizer import TableOptions, row_optimizer, with_tables
from fw.tasks import Task, ranking, retrieval
from sharding import create, make_mesh, put, rules, shardings

FEATURES = (
    "user.age", "user.gender", "user.occupation", "item.release_year", "item.class",
)  # fmt: skip
SIDES = ("popular", "ials", "two_tower", "dlrm", "clicks")
HISTORY = 20
"""Films of a user that are a feature of his."""

TOWERS = {"size": 64, "temperature": 0.1, "dropout": 0.3}
TOWERS_FIT = {"epochs": 5, "rate": 5e-3}
IALS = {"size": 128, "alpha": 1.0, "decay": 0.003}
RANKER = {"size": 32, "bottom": (), "top": (64, 32), "dropout": 0.2}
RANKER_FIT = {"epochs": 15, "rate": 5e-3}
CLICKS = {"size": 16, "top": (64, 32), "dropout": 0.3}
CLICKS_FIT = {"epochs": 2, "rate": 2e-3}
NEGATIVES = 0.8
"""The share of the ranker's rows that have any film, and label 0."""

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
    """Batches in which a share of the rows has another item, any of the catalogue, and label 0."""

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


def one_hot(vocabulary: Vocabulary, rows: Rows) -> Any:
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


class Films:
    """One split of the data, and how each side ranks the events of a part of it."""

    def __init__(self, data: Interactions):
        self.parts = leave_last_out(data)
        self.vocabulary = fit_vocabulary(self.parts["train"], features=FEATURES, history=HISTORY)
        self.known = matrix(self.vocabulary, self.parts["train"])

    def queries(self, part: str) -> Rows:
        """What is known at the time of the test includes the film of dev."""
        names = ["train"] if part == "dev" else ["train", "dev"]
        earlier = concatenate([self.parts[name] for name in names])
        return queries(self.vocabulary, self.parts[part], earlier)

    def popular(self, rows: Rows) -> dict[str, float]:
        log_q = self.vocabulary.arrays["log_q"]
        return of_scores(rows, lambda some: np.broadcast_to(log_q, (len(some), len(log_q))))

    def ials(self, rows: Rows, **settings: Any) -> dict[str, float]:
        items, solve = ials(self.known, **settings)
        known = np.zeros((rows.rows, len(items)), np.float32)
        for row, seen in zip(known, rows.arrays["seen"], strict=True):
            row[seen[seen >= 0]] = 1
        users = solve(known)
        return of_scores(rows, lambda some: users[some] @ items.T)

    def towers(self, rows: Rows, fitted: Mapping[str, Any], **settings: Any) -> dict[str, float]:
        model, task = (
            two_tower(TwoTowerConfig(**two_tower_fields(self.vocabulary), **settings)),
            retrieval(),
        )
        batches = Batches(pairs(self.vocabulary, self.parts["train"]).arrays, 1024, seed=0)
        variables, _ = fit(model, task, batches, **fitted)
        return dict(judge(model, task, variables, rows))

    def ranker(self, rows: Rows, fitted: Mapping[str, Any], **settings: Any) -> dict[str, float]:
        model = dlrm(DLRMConfig(**dlrm_fields(self.vocabulary), **settings))
        train, items = pairs(self.vocabulary, self.parts["train"]), catalogue(self.vocabulary)
        batches = with_negatives(train, items, NEGATIVES)
        variables, _ = fit(model, ranking(), batches, **fitted)
        columns = {*items.arrays, *(c.name for c in self.vocabulary.of("user")), "history"}

        @jax.jit
        def score(user: dict[str, jax.Array]) -> jax.Array:
            every = {k: jnp.repeat(x[None], items.rows, 0) for k, x in user.items()}
            own = {k: jnp.asarray(x) for k, x in items.arrays.items()}
            return model.apply(variables, {**every, **own})[0]

        def scores(some: np.ndarray) -> np.ndarray:
            users = ({k: rows.arrays[k][i] for k in columns if k in rows.arrays} for i in some)
            return np.stack([np.asarray(score(user)) for user in users])

        return of_scores(rows, scores)


def click_table(data: Interactions) -> None:
    parts = split_pairs(data)
    vocabulary = fit_vocabulary(parts["train"], features=FEATURES, history=HISTORY)
    rows = {name: clicks(vocabulary, part, parts["train"], 4.0) for name, part in parts.items()}
    print("\n| clicks | AUC | log-loss | calibration error | s |\n| --- | --- | --- | --- | --- |")
    start = time.perf_counter()
    columns = {name: one_hot(vocabulary, part) for name, part in rows.items()}
    labels = {name: part.arrays["labels"] for name, part in rows.items()}
    best = (np.inf, 0.0, np.zeros(0))
    for strength in (0.03, 0.1, 0.3, 1.0):
        found = LogisticRegression(C=strength, max_iter=300).fit(columns["train"], labels["train"])
        lost = metrics.log_loss(labels["dev"], found.predict_proba(columns["dev"])[:, 1])
        best = min(best, (lost, strength, found.decision_function(columns["test"])), key=first)
    report = metrics.binary_report(labels["test"], best[2])
    show_clicks(f"logistic regression, C {best[1]}", report, start)
    start = time.perf_counter()
    model = dlrm(DLRMConfig(**dlrm_fields(vocabulary), **CLICKS))
    variables, _ = fit(model, ranking(), Batches(rows["train"].arrays, 1024), **CLICKS_FIT)
    show_clicks("DLRM", judge(model, ranking(), variables, rows["test"]), start)


def first(values: tuple[Any, ...]) -> Any:
    return values[0]


def show_clicks(side: str, figures: Mapping[str, float], start: float) -> None:
    numbers = [figures[name] for name in ("auc", "log_loss", "calibration_error")]
    cells = " | ".join(f"{x:.4f}" for x in numbers)
    print(f"| {side} | {cells} | {time.perf_counter() - start:.0f} |", flush=True)


def show(side: str, make: Callable[[], Mapping[str, float]]) -> None:
    start = time.perf_counter()
    figures = make()
    cells = " | ".join(f"{figures[name]:.4f}" for name in ("hr@10", "ndcg@10", "mrr"))
    print(f"| {side} | {cells} | {time.perf_counter() - start:.0f} |", flush=True)


def search(films: Films) -> None:
    """Each setting's figures on dev."""
    rows = films.queries("dev")
    for size, alpha, decay in itertools.product((64, 128), (0.3, 1.0, 3.0), (0.001, 0.003, 0.01)):
        own = {"size": size, "alpha": alpha, "decay": decay}
        show(f"iALS {own}", lambda own=own: films.ials(rows, **own))
    for more in ({}, {"temperature": 0.05}, {"temperature": 0.2}, {"dropout": 0.1}, {"size": 128}):
        own = {**TOWERS, **more}
        show(f"two-tower {own}", lambda own=own: films.towers(rows, TOWERS_FIT, **own))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--search", action="store_true", help="figures of settings on dev")
    parser.add_argument("--only", choices=SIDES, nargs="+", default=SIDES, help="which rows")
    parser.add_argument("--data", type=Path, help="a folder of atomic files in MovieLens's place")
    args = parser.parse_args()
    host.prepare("data=1")
    data = load_interactions(args.data or assets.fetch("movielens-100k"))
    films = Films(data)
    part = "dev" if args.search else "test"
    rows = films.queries(part)
    what = f"{part}, {rows.rows} users, {len(films.vocabulary.items)} films"
    print(f"| {what} | HR@10 | NDCG@10 | MRR | s |")
    print("| --- | --- | --- | --- | --- |")
    if args.search:
        search(films)
        return
    sides = {
        "popular": lambda: films.popular(rows),
        "ials": lambda: films.ials(rows, **IALS),
        "two_tower": lambda: films.towers(rows, TOWERS_FIT, **TOWERS),
        "dlrm": lambda: films.ranker(rows, RANKER_FIT, **RANKER),
    }
    for side in (name for name in sides if name in args.only):
        show(side, sides[side])
    if "clicks" in args.only:
        click_table(data)


if __name__ == "__main__":
    main()
