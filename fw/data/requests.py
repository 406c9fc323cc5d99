"""From a request, such as {"user": "42"}, to what a recommender is given, and from that to answers.

A user whom training knew has the features and the history of then, unless the request says others;
anyone else's id is hashed, and a history makes him known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fw.data.cells import IN_BOUND, as_bounded
from fw.data.recommend import HISTORY, SEEN, history_of
from fw.data.vocabulary import NONE, Column, Vocabulary, bags
from fw.errors import FwError
from fw.metrics.probabilities import sigmoid

Request = Mapping[str, Any]

_WANTED = {"token": "a name", "token_seq": "a list of names", "float": IN_BOUND}


def user_inputs(vocabulary: Vocabulary, requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """What a two-tower model is given for requests.

    Args:
        vocabulary: of the model.
        requests: `{"user": id}`, perhaps with "history", items in order of time, in place of what
            the user took in training, and with features such as "user.age". An id is a string, or
            a whole number, which is its digits.

    Returns:
        The user's columns, `history` i32[n, M], and `seen` i32[n, S], places of items that are not
        to be recommended: the history.

    Raises:
        FwError: no user, an unknown key, or a value of another kind.
    """
    requests = _checked(vocabulary, requests, pair=False)
    latest = [_latest(vocabulary, request) for request in requests]
    longest = max(map(len, latest), default=1) or 1
    return {
        **_entities(vocabulary, "user", requests),
        **history_of(vocabulary, latest),
        SEEN: bags(latest, longest),
    }


def pair_inputs(vocabulary: Vocabulary, requests: Sequence[Request]) -> dict[str, np.ndarray]:
    """What a model of clicks is given for requests.

    Args:
        vocabulary: of the model.
        requests: `{"user": id, "item": id}` with the features of the event, such as "event.hour",
            and perhaps with "history" and features of user and item, as in `user_inputs`.

    Returns:
        All columns, and `history`.

    Raises:
        FwError: as `user_inputs`.
    """
    requests = _checked(vocabulary, requests, pair=True)
    events = vocabulary.of("event")
    return {
        **_entities(vocabulary, "user", requests),
        **_entities(vocabulary, "item", requests),
        **history_of(vocabulary, [_latest(vocabulary, request) for request in requests]),
        **{c.name: c.encode([request[c.name] for request in requests]) for c in events},
    }


def problem(vocabulary: Vocabulary, request: Any, *, pair: bool) -> str:
    """Why a request is refused; nothing if it is fine.

    Args:
        vocabulary: of the model.
        request: for `pair_inputs` if it is of a pair, else for `user_inputs`.
        pair: which.
    """
    if not isinstance(request, Mapping):
        return f"expected an object; got {request!r}"
    allowed = _allowed(vocabulary, pair)
    needed = ("user", "item", *(c.name for c in vocabulary.of("event"))) if pair else ("user",)
    if missing := [name for name in needed if name not in request]:
        return f"expected {missing[0]!r}; got {', '.join(map(str, request))}"
    if odd := [name for name in request if name not in allowed]:
        return f"unknown {odd[0]!r}; expected {', '.join(allowed)}"
    for name, value in request.items():
        if _value(allowed[name], value) is None:
            return f"expected {_WANTED[allowed[name].kind]} as {name!r}; got {value!r}"
    return ""


def best_items(
    vocabulary: Vocabulary, places: np.ndarray, scores: np.ndarray
) -> list[list[dict[str, Any]]]:
    """The answers to `user_inputs`.

    Args:
        vocabulary: of the model.
        places: int [n, k], places in the catalogue, the best first; `NONE` for no more.
        scores: [n, k].

    Returns:
        `[{"item": id, "score": number}, ...]` for each request.
    """
    return [
        [
            {"item": vocabulary.items[at], "score": score}
            for at, score in zip(row, of_row, strict=True)
            if at != NONE
        ]
        for row, of_row in zip(places.tolist(), scores.tolist(), strict=True)
    ]


def probabilities(logits: np.ndarray) -> list[dict[str, float]]:
    """The answers to `pair_inputs`: `{"probability": number}` for each logit [n].

    >>> probabilities(np.array([0.0]))
    [{'probability': 0.5}]
    """
    return [{"probability": p} for p in sigmoid(logits).tolist()]


def _latest(vocabulary: Vocabulary, request: Request) -> list[int]:
    """Places of what the user took, the latest first; what no catalogue has is left out."""
    if HISTORY in request:
        at = vocabulary.item_places
        return [at[name] for name in reversed(request[HISTORY]) if name in at]
    user = vocabulary.user_places.get(request["user"])
    if user is None:
        return []
    begin, end = vocabulary.arrays["begins"][user : user + 2]
    return vocabulary.arrays["taken"][begin:end][::-1].tolist()


def _entities(
    vocabulary: Vocabulary, owner: str, requests: Sequence[Request]
) -> dict[str, np.ndarray]:
    """The columns of users or items: those of training, and what a request says over them."""
    names = [request[owner] for request in requests]
    known = vocabulary.user_places if owner == "user" else vocabulary.item_places
    found = vocabulary.encode(owner, names, None)
    for column in vocabulary.of(owner):
        for i, (name, request) in enumerate(zip(names, requests, strict=True)):
            if column.name in request:
                found[column.name][i] = column.encode([request[column.name]])[0]
            elif name in known:
                found[column.name][i] = vocabulary.arrays[column.name][known[name]]
    return found


def _allowed(vocabulary: Vocabulary, pair: bool) -> dict[str, Column]:
    """What a request may have."""
    owners = ("user", "item", "event") if pair else ("user",)
    allowed = {column.name: column for owner in owners for column in vocabulary.of(owner)}
    return allowed | ({HISTORY: Column(HISTORY, "token_seq")} if vocabulary.history else {})


def _checked(
    vocabulary: Vocabulary, requests: Sequence[Request], *, pair: bool
) -> list[dict[str, Any]]:
    """Requests whose every value is as a table has it."""
    for i, request in enumerate(requests):
        if why := problem(vocabulary, request, pair=pair):
            raise FwError(f"request {i}: {why}")
    allowed = _allowed(vocabulary, pair)
    return [{name: _value(allowed[name], value) for name, value in r.items()} for r in requests]


def _value(column: Column, value: Any) -> Any:
    """A value as a table has it; None for one of another kind."""
    if column.kind == "float":
        return as_bounded(value) if type(value) in (int, float) else None
    if column.kind == "token":
        return _name(value) or None
    names = tuple(map(_name, value)) if isinstance(value, list) else ("",)
    return names if all(names) else None


def _name(value: Any) -> str:
    return str(value) if type(value) in (str, int) else ""
