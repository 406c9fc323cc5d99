"""From interactions to the rows that a recommender is trained and evaluated on.

A two-tower model trains on `pairs` and is judged by `queries`, which hold the catalogue; a model
of clicks has `clicks` for both. What a user took later is in no feature: a row's history comes
before the event in time. What `seen` leaves out of a ranking the user may have taken at any time.
Both are from events that the caller gives. `requests` has the same for answers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fw.data.interactions import Interactions, is_positive
from fw.data.rows import Rows
from fw.data.vocabulary import NONE, Column, Vocabulary, bags
from fw.errors import FwError
from fw.labels import IGNORE

HISTORY, TARGET, SEEN, LOG_Q = "history", "target", "seen", "log_q"


def pairs(vocabulary: Vocabulary, train: Interactions) -> Rows:
    """A row for every event: the user before it, and the item that was taken.

    Returns:
        Arrays of the user's and the item's columns; `history` i32[R, M], ids of the user's earlier
        items, the latest first; `target` i32[R], the item's place in the catalogue; `log_q` f32[R].
    """
    target = _places(vocabulary, train)
    arrays = {
        **_users(vocabulary, train, train),
        **_items(vocabulary, train),
        TARGET: target,
        LOG_Q: _rows_of(vocabulary.arrays[LOG_Q], target, 0),
    }
    return _filled(arrays)


def queries(vocabulary: Vocabulary, part: Interactions, earlier: Interactions) -> Rows:
    """A row for every event of a part: the user before it, and the item to be found.

    Args:
        vocabulary: of the model.
        part: events of dev, say.
        earlier: the events that are known: those of train, say.

    Returns:
        As `pairs`, without the item and `log_q`; `target` is `len(vocabulary.items)` for an item
        that the catalogue lacks; `seen` i32[R, S], places of what else the user is known to have
        taken, at any time, which is not ranked. Its `catalogue` are the columns of all items.
    """
    known = _before(part, earlier, _places(vocabulary, earlier), always=True)
    target, size = _places(vocabulary, part), len(vocabulary.items)
    taken = [
        [at for at in dict.fromkeys(places.tolist()) if at < size and at != own]
        for places, own in zip(known, target.tolist(), strict=True)
    ]
    arrays = {
        **_users(vocabulary, part, earlier),
        TARGET: target,
        SEEN: bags(taken, max(map(len, taken), default=0) or 1),
    }
    rows = _filled(arrays)
    return Rows(rows.arrays, rows.empty, catalogue(vocabulary))


def clicks(
    vocabulary: Vocabulary,
    part: Interactions,
    earlier: Interactions,
    threshold: float | None = None,
) -> Rows:
    """A row for every event: user, item, event, and whether it was positive.

    Args:
        vocabulary: of the model.
        part: the events.
        earlier: the events that are known, of which the positive ones before an event are its
            history.
        threshold: see `fw.data.interactions.is_positive`.

    Returns:
        Arrays of all columns, `history` as in `pairs`, and `labels` i32[R], 1 or 0.
    """
    taken = earlier.take(is_positive(earlier.events, threshold))
    arrays = {
        **_users(vocabulary, part, taken),
        **_items(vocabulary, part),
        "labels": is_positive(part.events, threshold).astype(np.int32),
    }
    for column in vocabulary.of("event"):
        values = part.events.columns.get(column.name.partition(".")[2])
        if values is None:
            raise FwError(f"interactions: expected a column {column.name!r}, as in training")
        arrays[column.name] = column.encode(values)
    return _filled(arrays)


def catalogue(vocabulary: Vocabulary) -> Rows:
    """All items, in the order of `vocabulary.items`; `item` is `NONE` in an empty row."""
    return _filled({c.name: vocabulary.arrays[c.name] for c in vocabulary.of("item")})


def two_tower_fields(vocabulary: Vocabulary) -> dict[str, Any]:
    """The fields of a `TwoTowerConfig` that the data decide."""
    found: dict[str, Any] = {"history": vocabulary.history > 0}
    for owner in ("user", "item"):
        found |= {f"{owner}_{k}": v for k, v in _fields(vocabulary.of(owner)).items()}
    return found


def dlrm_fields(vocabulary: Vocabulary) -> dict[str, Any]:
    """The fields of a `DLRMConfig` that the data decide."""
    return {"history": vocabulary.history > 0, **_fields(vocabulary.columns)}


def _fields(columns: Sequence[Column]) -> dict[str, Any]:
    named = [column for column in columns if column.kind != "float"]
    return {
        "columns": tuple(column.name for column in named),
        "rows": tuple(column.rows for column in named),
        "numbers": tuple(column.name for column in columns if column.kind == "float"),
    }


def _users(
    vocabulary: Vocabulary, part: Interactions, earlier: Interactions
) -> dict[str, np.ndarray]:
    names = part.events.columns["user"]
    different, which = np.unique(names, return_inverse=True)
    found = vocabulary.encode("user", different.tolist(), part.users)
    latest = []
    if vocabulary.history:
        latest = _before(part, earlier, _places(vocabulary, earlier), vocabulary.history)
    return {name: values[which] for name, values in found.items()} | history_of(vocabulary, latest)


def _items(vocabulary: Vocabulary, part: Interactions) -> dict[str, np.ndarray]:
    different, which = np.unique(part.events.columns["item"], return_inverse=True)
    found = vocabulary.encode("item", different.tolist(), part.items)
    return {name: values[which] for name, values in found.items()}


def history_of(
    vocabulary: Vocabulary, latest: Sequence[Sequence[int]] | Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """`history` i32[R, M], ids of items by their places, one list a row; nothing if M is 0."""
    if not vocabulary.history:
        return {}
    places = bags(latest, vocabulary.history)
    return {HISTORY: _rows_of(vocabulary.arrays["item"], places, NONE)}


def _places(vocabulary: Vocabulary, part: Interactions) -> np.ndarray:
    """Int32 [events]: the items' places in the catalogue, its size for one that it lacks."""
    at, size = vocabulary.item_places, len(vocabulary.items)
    return np.array([at.get(name, size) for name in part.events.columns["item"]], np.int32)


def _rows_of(values: np.ndarray, places: np.ndarray, none: float) -> np.ndarray:
    inside = (places >= 0) & (places < len(values))
    return np.where(inside, values[np.where(inside, places, 0)], values.dtype.type(none))


def _before(
    part: Interactions,
    earlier: Interactions,
    values: np.ndarray,
    most: int | None = None,
    *,
    always: bool = False,
) -> list[np.ndarray]:
    """For each event of a part, the values of its user's known events, the latest first.

    Of those before it in time; `always`: of all.
    """
    names = np.concatenate([part.events.columns["user"], earlier.events.columns["user"]])
    _, users = np.unique(names, return_inverse=True)
    own, theirs = users[: part.events.rows], users[part.events.rows :]
    sort = np.lexsort((earlier.order, theirs))
    values, span = values[sort], int(max(part.order.max(), earlier.order.max(initial=0))) + 1
    keys = theirs[sort] * span + earlier.order[sort]
    begin, end = np.searchsorted(keys, own * span), np.searchsorted(keys, own * span + part.order)
    if always:
        end = np.searchsorted(keys, (own + 1) * span)
    if most is not None:
        begin = np.maximum(begin, end - most)
    return [values[b:e][::-1] for b, e in zip(begin, end, strict=True)]


def _filled(arrays: dict[str, np.ndarray]) -> Rows:
    """Rows whose empty ones have no id, and count for nothing."""
    empty = {
        name: 0.0 if values.dtype == np.float32 else NONE if name != "labels" else IGNORE
        for name, values in arrays.items()
    }
    return Rows(arrays, empty)
