"""Networks over tables against gradient boosting: AUC in the same stratified folds.

For each data set every fold is held out once. fw's columns are fitted on the other folds, its
models trained on them for a fixed number of epochs by the step that `fw finetune` takes, and all
are judged by scikit-learn's `roc_auc_score`. scikit-learn's own models are as they come; they get
the same categories, as such or one-hot.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench/tabular.py --data german-credit
"""

import argparse
import dataclasses
import functools
import sys
import time
from typing import Any

import jax
import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from fw import assets, data, report
from fw.data.cells import number_table
from fw.data.columns import CLASSES
from fw.metrics import roc_auc
from fw.models.ft_transformer import FTTransformerConfig, ft_transformer
from fw.models.mlp import MLPConfig, mlp
from fw.optimizer import AdamW, optimizer
from fw.step import initial_state, make_step
from fw.tasks import make_task
from sharding import create, make_mesh, put, rules, shardings

SETS = {
    "german-credit": ("germancredit.csv", "creditability", ("good", "bad")),
    "breast-cancer": ("breast_cancer.csv", "target", ("benign", "malignant")),
}
MESH = make_mesh("data=1")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained, whatever the data: small, and with much decay and dropout.

    Attributes:
      config: of the model.
      network: its numbers.
      batch: rows a step.
      epochs: of the training rows; no early stopping, for which there are too few.
      adam: the optimiser.
    """

    config: Any
    network: dict[str, Any]
    batch: int
    epochs: int
    adam: AdamW


RECIPES = {
    "mlp": Recipe(
        MLPConfig,
        {"hidden_size": 64, "num_hidden_layers": 1, "category_size": 2, "dropout": 0.5},
        64, 30, AdamW(learning_rate=5e-3, weight_decay=1.0),
    ),
    "ft_transformer": Recipe(
        FTTransformerConfig,
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 32, "dropout": 0.4, "attention_dropout": 0.4},
        32, 15, AdamW(learning_rate=3e-3, weight_decay=1.0),
    ),
}  # fmt: skip
PEERS = ("HistGradientBoosting", "GradientBoosting", "logistic regression")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=SETS, default="german-credit")
    parser.add_argument("--models", default="mlp,ft_transformer")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="with other folds each")
    arguments = parser.parse_args()
    name, target, classes = SETS[arguments.data]
    entries = data.read_entries(assets.fetch(arguments.data) / name)
    gold = np.array([entry.cells[target] == classes[1] for entry in entries], np.int64)
    names = (*arguments.models.split(","), *PEERS)
    found: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    for seed in range(arguments.repeats):
        for train, test in StratifiedKFold(arguments.folds, shuffle=True, random_state=seed).split(
            np.zeros(len(gold)), gold
        ):
            learnt, held = ([entries[i] for i in places] for places in (train, test))
            columns = data.fit_columns(learnt, target, classes=classes)
            for name in names:
                began, run = time.perf_counter(), peer if name in PEERS else ours
                scores = run(name, columns, learnt, held, seed)
                spent[name] += time.perf_counter() - began
                found[name].append(float(roc_auc_score(gold[test], scores)))
                assert abs(roc_auc(gold[test], scores) - found[name][-1]) < 1e-12
    best = max((np.mean(found[name]), name) for name in PEERS[:2])[1]
    rows = []
    for name, values in found.items():
        apart = 100 * (np.array(values) - found[best])
        error = apart.std(ddof=1) / len(apart) ** 0.5
        rows.append(
            (name, f"{np.mean(values):.4f}", f"{np.std(values, ddof=1):.4f}",
             f"{apart.mean():+.2f} ± {error:.2f}", f"{spent[name] / len(values):.1f}")
        )  # fmt: skip
    titles = ("model", "AUC", "deviation of folds", f"points above {best}", "s a fold")
    print(arguments.data, report.table(rows, titles), sep="\n", flush=True)
    return 0


def ours(name: str, columns: data.Columns, train: Any, test: Any, seed: int) -> np.ndarray:
    """The scores of the second class, by fw."""
    sizes = (len(columns.numbers), columns.cardinalities, len(columns.labels), CLASSES)
    recipe = RECIPES[name]
    batches = data.Batches(columns.encode(train).arrays, recipe.batch, seed)
    steps = recipe.epochs * batches.steps_per_epoch
    config = recipe.config(*sizes, **recipe.network)
    model, tx, step = compiled(config, recipe.adam, steps, seed)
    key = jax.random.key(seed)
    lie = shardings(model.axes, jax.eval_shape(model.init, key), MESH, rules())
    state = initial_state(create(model.init, key, shardings=lie), tx, MESH)
    for i in range(steps):
        state, _ = step(state, put(batches(i), MESH, rules()))
    inputs = columns.inputs([{**entry.cells} for entry in test])
    logits, _ = jax.jit(model.apply)(state.variables, inputs)
    return np.array([answer["scores"][columns.labels[1]] for answer in columns.answers(logits)])


@functools.cache
def compiled(config: Any, adam: AdamW, steps: int, seed: int) -> Any:
    """Model, optimiser and step, once for folds with the same categories."""
    model = mlp(config) if isinstance(config, MLPConfig) else ft_transformer(config)
    tx, loss = optimizer(adam, steps), make_task(CLASSES, ("no", "yes")).loss
    return model, tx, make_step(model, loss, tx, mesh=MESH, rules=rules(), seed=seed)


def peer(name: str, columns: data.Columns, train: Any, test: Any, seed: int) -> np.ndarray:
    """The same by scikit-learn."""

    def table(entries: Any) -> np.ndarray:
        rows = [entry.cells for entry in entries]
        numbers = number_table(rows, columns.numbers, columns.missing)
        ids = columns.inputs(rows).get("categories", np.zeros((len(rows), 0)))
        return np.concatenate([numbers, ids], 1)

    count = len(columns.numbers)
    numbers, ids = slice(0, count), slice(count, count + len(columns.categories))
    made: Any
    if name == PEERS[0]:
        own: Any = [i >= count for i in range(ids.stop)]
        made = HistGradientBoostingClassifier(categorical_features=own, random_state=seed)
    else:
        last: Any = GradientBoostingClassifier(random_state=seed)
        if name == PEERS[2]:
            last = LogisticRegression(max_iter=2000)
        kinds = [(StandardScaler(), numbers), (OneHotEncoder(handle_unknown="ignore"), ids)]
        kinds = [(one, part) for one, part in kinds if part.start < part.stop]
        made = make_pipeline(make_column_transformer(*kinds, sparse_threshold=0), last)
    label = [columns.classes.index(str(entry.cells[columns.target])) for entry in train]
    return made.fit(table(train), label).predict_proba(table(test))[:, 1]


if __name__ == "__main__":
    sys.exit(main())
