"""Texts that lie alone in a row or share one, and what a model says of each."""

import jax
import numpy as np

from fw.labels import PROBLEMS
from sharding import gather, make_mesh, put, rules, scope, shardings

LENGTHS, LENGTH = (9, 5, 7, 3, 16, 11), 16
ROWS = ((0, 1), (2, 3), (4,), (5,))  # the texts that share a row


def batch_of(rows):
    """The texts in these rows, each text the same wherever it lies; and where each one is."""
    found: dict[str, np.ndarray] = {
        name: np.zeros((len(rows), LENGTH), np.int32)
        for name in ("input_ids", "segment_ids", "position_ids")
    }
    found["first"] = np.zeros((len(rows), max(map(len, rows))), np.int32)
    places = {}
    for row, texts in enumerate(rows):
        start = 0
        for slot, text in enumerate(texts):
            part, size = slice(start, start + LENGTHS[text]), LENGTHS[text]
            found["input_ids"][row, part] = np.random.default_rng(text).integers(1, 60, size)
            found["segment_ids"][row, part] = slot + 1
            found["position_ids"][row, part] = np.arange(size)
            found["first"][row, slot] = start
            places[text] = row, slot, part
            start += size
    return found, places


def outputs(made, rows, spec="data=1"):
    """What the model says of every text."""
    mesh, layout, (batch, places) = make_mesh(spec), rules(), batch_of(rows)
    where = shardings(made.model.axes, made.variables, mesh, layout)
    variables = jax.device_put(made.variables, where)
    with scope(mesh, layout):
        y = jax.jit(made.model.apply)(variables, put(batch, mesh, layout))[0]
    y, of_texts = gather(y), made.model.config.task in (*PROBLEMS, "embedding")
    return [
        y[row, slot] if of_texts else y[row, part]
        for _, (row, slot, part) in sorted(places.items())
    ]
