"""Entities are compared on the device: a span is its start, its type and the break that ends it.

Tags such as B-PER, I-PER, O become spans by two questions to every counted token, both about the
token before it: does it start an entity, does it go on with one? Cumulative maxima find the token
before, cumulative minima the next break, so nothing loops over the length and only
[types, 3] counts leave the mesh. `entity_spans` asks the same questions on the host, for output.
The semantics are seqeval's (https://github.com/chakki-works/seqeval): mode "default" is
conlleval's leniency, mode "strict" takes the scheme at its word, with seqeval's corner cases.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fw.errors import FwError
from fw.labels import IGNORE
from fw.metrics.report import Report, summarise

type Mode = Literal["default", "strict"]
type Scheme = Literal["bio", "iob1"]

_OUTSIDE = -1  # the kind of a token that no entity holds


class _Table(NamedTuple):
    types: tuple[str, ...]
    kind: np.ndarray  # i32[tags], index into types, _OUTSIDE for O
    begin: np.ndarray  # bool[tags], a B- tag


class _Spans(NamedTuple):
    start: jax.Array  # bool, a whole entity starts here
    kind: jax.Array  # i32, its type
    end: jax.Array  # i32, index of the counted token that breaks it, the length where none does


def entity_types(tags: Sequence[str]) -> tuple[str, ...]:
    """List the entity types of a tag table, sorted: the rows of `entity_counts`.

    Args:
        tags: tag names by id: "O", "B-TYPE", "I-TYPE"; a bare "B" or "I" has the type "_".

    Raises:
        FwError: a tag is of another form, or appears twice.

    >>> entity_types(("O", "B-PER", "I-PER", "I-LOC"))
    ('LOC', 'PER')
    """
    return _table(tuple(tags)).types


def entity_counts(
    labels: jax.Array,
    predictions: jax.Array,
    segment_ids: jax.Array,
    tags: Sequence[str],
    *,
    mode: Mode = "default",
    scheme: Scheme = "bio",
) -> jax.Array:
    """Count per entity type how many were found, predicted and there to find.

    A predicted entity is found (a true positive) where a gold one has its sentence, type, first
    and last token. Positions labelled `IGNORE` are transparent: an entity runs across them from
    one counted token to the next. A sentence ends where the segment changes, and at the row's end.
    Exact under any sharding, on a mesh with axes of type Auto; safe under jit with `tags`, `mode`
    and `scheme` static.

    Args:
        labels: i32[B, L] tag ids, `IGNORE` where there is none.
        predictions: i32[B, L] tag ids; of no consequence at transparent positions.
        segment_ids: i32[B, L], one number a sentence within a row.
        tags: tag names by id, see `entity_types`. Ids must be below their number: under jit
            nothing can raise.
        mode: "default" starts an entity at any token that cannot go on with the one before;
            "strict" only where the scheme says so.
        scheme: "bio" (IOB2, every entity starts with B) or "iob1" (B only between two adjoining
            entities of one type). It matters in strict mode alone.

    Returns:
        i32[T, 3]: true positives, predicted, gold for each type in `entity_types(tags)`.

    Raises:
        FwError: a tag of unknown form.
        ValueError: shapes differ or are not [B, L]; unknown mode or scheme.

    >>> ids = jnp.array([[1, IGNORE, 2, 0]])  # B-PER, its second piece, I-PER, O
    >>> guess = jnp.array([[1, 0, 2, 1]])
    >>> entity_counts(ids, guess, jnp.ones_like(ids), ("O", "B-PER", "I-PER")).tolist()
    [[1, 2, 1]]
    """
    if not labels.shape == predictions.shape == segment_ids.shape or labels.ndim != 2:
        raise ValueError(
            f"entity_counts: labels {labels.shape}, predictions {predictions.shape} "
            f"and segment_ids {segment_ids.shape} must have one shape [rows, length]"
        )
    _check(mode, scheme)
    table = _table(tuple(tags))
    counted = labels != IGNORE
    gold, found = (
        _device_spans(ids, counted, segment_ids, table, mode=mode, scheme=scheme)
        for ids in (labels, predictions)
    )
    hit = gold.start & found.start & (gold.kind == found.kind) & (gold.end == found.end)
    types = jnp.arange(len(table.types), dtype=jnp.int32)

    def tally(flags: jax.Array, kind: jax.Array) -> jax.Array:
        return (flags[..., None] & (kind[..., None] == types)).sum(axis=(0, 1), dtype=jnp.int32)

    columns = (tally(hit, gold.kind), tally(found.start, found.kind), tally(gold.start, gold.kind))
    return jnp.stack(columns, axis=-1)


def entity_spans(
    tags: Sequence[str], *, mode: Mode = "default", scheme: Scheme = "bio"
) -> list[tuple[str, int, int]]:
    """List the entities of one sentence; the host's twin of `entity_counts`.

    Args:
        tags: tag names of the sentence's words, see `entity_types` for their form.
        mode: as for `entity_counts`.
        scheme: as for `entity_counts`.

    Returns:
        (type, start, end) in order of start; the words are `words[start:end]`.

    Raises:
        FwError: a tag of unknown form.
        ValueError: unknown mode or scheme.

    >>> entity_spans(["B-PER", "I-PER", "O", "I-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4)]
    >>> entity_spans(["B-PER", "I-PER", "O", "I-LOC"], mode="strict")
    [('PER', 0, 2)]
    """
    _check(mode, scheme)
    names = sorted(set(tags))
    table = _table(tuple(names))
    ids = np.array([names.index(tag) for tag in tags], np.int64)
    kind, begin = table.kind[ids], table.begin[ids]

    def previous(x: np.ndarray, fill: int | bool) -> np.ndarray:
        return np.append(np.array([fill], x.dtype), x[:-1])[: len(x)]

    start, goes_on, void = _rules(kind, begin, previous, mode, scheme)
    breaks = np.append(np.flatnonzero(~goes_on), len(tags))
    first = np.flatnonzero(start)
    last = breaks[np.searchsorted(breaks, first, side="right")]
    whole = ~np.append(void, False)[last]
    return [
        (table.types[kind[i]], int(i), int(j))
        for i, j in zip(first[whole], last[whole], strict=True)
    ]


def entity_report(counts: np.ndarray | jax.Array, tags: Sequence[str]) -> Report:
    """Score entity counts per type and on average.

    Equal to seqeval's `classification_report` with `zero_division=0`: types that were neither
    there nor predicted are left out.

    Args:
        counts: int[T, 3] from `entity_counts`, merged over batches.
        tags: the tag table that was given to `entity_counts`.

    Returns:
        The report; see `to_text` and `to_dict`.

    Raises:
        FwError: a tag of unknown form.
        ValueError: the counts are not [T, 3].

    >>> entity_report(np.array([[1, 2, 1]]), ("O", "B-PER", "I-PER")).micro.recall
    1.0
    """
    types = entity_types(tags)
    table = np.asarray(counts).astype(np.int64)
    if table.shape != (len(types), 3):
        raise ValueError(
            f"entity_report: counts of shape {table.shape} for {len(types)} types; "
            f"expected {(len(types), 3)}"
        )
    kept = np.flatnonzero(table.any(axis=1))
    return summarise([types[i] for i in kept], *table[kept].T, single_label=False)


def _rules(
    kind: Any, begin: Any, previous: Callable[[Any, int | bool], Any], mode: Mode, scheme: Scheme
) -> tuple[Any, Any, Any]:
    """Say of every token whether it starts an entity, goes on with one, or voids the one before.

    The arrays are jax's or numpy's, of any shape: the rules use operators only, so that device and
    host cannot disagree. `previous(x, fill)` is x at the counted token before, and `fill` where the
    sentence starts.
    """
    inside = (kind != _OUTSIDE) & ~begin
    same = (kind != _OUTSIDE) & (previous(kind, _OUTSIDE) == kind)
    never = begin & ~begin
    if mode == "default":
        return begin | (inside & ~same), inside & same, never
    if scheme == "bio":
        return begin, inside & same, never
    # IOB1: a B starts an entity only right after one of its type. One that stands elsewhere is no
    # start, and seqeval then starts the entity at the I that follows it.
    begun = begin & same
    goes_on = inside & same & (previous(inside, False) | previous(begun, False))
    # seqeval knows no ending between a B and a B of another type, and drops the former.
    void = begin & ~same & previous(begin, False)
    return begun | (inside & ~goes_on), goes_on, void


def _device_spans(
    ids: jax.Array,
    counted: jax.Array,
    segment_ids: jax.Array,
    table: _Table,
    *,
    mode: Mode,
    scheme: Scheme,
) -> _Spans:
    length = ids.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    kind = jnp.where(counted, jnp.asarray(table.kind)[ids], _OUTSIDE)
    begin = counted & jnp.asarray(table.begin)[ids]

    latest = jax.lax.cummax(jnp.where(counted, index, -1), axis=1)
    before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)[:, :length]
    source = jnp.maximum(before, 0)
    joined = (before >= 0) & (jnp.take_along_axis(segment_ids, source, axis=1) == segment_ids)

    def previous(x: jax.Array, fill: int | bool) -> jax.Array:
        return jnp.where(joined, jnp.take_along_axis(x, source, axis=1), fill)

    start, goes_on, void = _rules(kind, begin, previous, mode, scheme)
    coming = jax.lax.cummin(jnp.where(counted & ~goes_on, index, length), axis=1, reverse=True)
    end = jnp.pad(coming, ((0, 0), (0, 1)), constant_values=length)[:, 1:]
    void = jnp.pad(void, ((0, 0), (0, 1)))  # at `length` the row ends, and voids nothing
    return _Spans(start & ~jnp.take_along_axis(void, end, axis=1), kind, end)


@lru_cache(maxsize=64)
def _table(tags: tuple[str, ...]) -> _Table:
    if len(set(tags)) != len(tags):
        raise FwError(f"entity tags: a tag appears twice in {tags}; expected one id a tag")
    kinds: list[str | None] = []
    for tag in tags:
        prefix, dash, kind = tag.partition("-")
        if tag != "O" and (prefix not in ("B", "I") or (dash and not kind)):
            raise FwError(
                f"entity tags: {tag!r} is no tag of BIO or IOB1; expected O, B-TYPE or "
                "I-TYPE. Are these class names? Then use classification_report"
            )
        kinds.append(None if tag == "O" else kind or "_")
    types = tuple(sorted({kind for kind in kinds if kind is not None}))
    kind_ids = [_OUTSIDE if kind is None else types.index(kind) for kind in kinds]
    begin = [tag.startswith("B") for tag in tags]
    return _Table(types, np.array(kind_ids, np.int32), np.array(begin, np.bool_))


def _check(mode: str, scheme: str) -> None:
    for name, value, allowed in (("mode", mode, Mode), ("scheme", scheme, Scheme)):
        if value not in (choices := get_args(allowed.__value__)):
            raise ValueError(f"entities: {name} {value!r} is unknown; expected one of {choices}")
