"""Questions with their texts become pieces, and logits of pieces become passages of the texts.

A text too long for a row is read in windows that overlap, each behind the question. Training wants
the answer's first and last piece in each window; where a window does not hold the whole answer,
both are the window's first piece (Devlin et al. 2018 for texts without an answer). `questions` has
the records, `encode` the neighbours that do without windows.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched

import numpy as np

from fw.data.encode import CHUNK, Encoded, Windows, int32, offsets
from fw.data.questions import Question
from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.labels import IGNORE

OVERLAP = 3
"""Windows share one piece in so many of a row: 128 of 384, as is usual for SQuAD."""

LONGEST_ANSWER = 30
"""Pieces of an answer."""

N_BEST = 20
"""Passages of a question that are compared."""


@dataclass(frozen=True)
class Passage:
    """A passage of a context, and the sum of its first and last piece's logits."""

    start: int
    end: int
    score: float


def encode_questions(
    tokenizer: Tokenizer,
    records: Sequence[Question],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Encoded:
    """Encode each question with the windows of its context, by the tokenizer's template for pairs.

    Args:
        tokenizer: from `load_tokenizer`.
        records: the questions.
        names: anything, to learn from the first answer of each; None to leave all `IGNORE`.
        max_length: most pieces in a window; a question has at most half of them, what is more is
            cut and counted.

    Returns:
        the pieces: `labels` [N, 2], the places in a window of the answer's first and last piece;
        `types`; every piece is a "word" of its own; `windows`.

    Raises:
        FwError: `max_length` leaves no room, or an answer without a piece.

    >>> from tokenizers import Tokenizer as Fast, models, pre_tokenizers
    >>> fast = Fast(models.WordLevel({"who": 1, "ada": 2, "wrote": 3}, unk_token="who"))
    >>> fast.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = Tokenizer(fast, prefix=(), suffix=(), pad=0, unknown=1)
    >>> from fw.data.questions import Answer
    >>> asked = Question("who", "who wrote ada wrote", (Answer("ada", 10),))
    >>> encoded = encode_questions(tokenizer, [asked], (), max_length=4)
    >>> encoded.input_ids.tolist(), encoded.lengths.tolist(), encoded.labels.tolist()
    ([1, 1, 3, 2, 1, 2, 3], [4, 3], [[3, 3], [1, 1]])
    """
    template = _template(tokenizer)
    room = max_length - sum(len(ids) for ids, _ in template.special)
    if room < 2:
        raise FwError(f"max_length: {max_length} leaves no room for a question and a text")
    columns = {name: array("i") for name in ("ids", "types", "words", "labels")}
    lengths, question, firsts = array("i"), array("i"), array("i")
    spans, cut, cut_texts = [], 0, 0
    for number, (record, asked, context) in enumerate(_encodings(tokenizer, records)):
        ids = asked.ids[: max(1, room // 2)]
        cut, cut_texts = cut + len(asked.ids) - len(ids), cut_texts + (len(ids) < len(asked.ids))
        places = np.array(context.offsets, np.int32).reshape(-1, 2)
        answer = None if names is None else _pieces(record, places)
        for start, stop in _cut(len(places), room - len(ids), max_length // OVERLAP):
            (before, a), (between, b), (after, c) = template.special
            own = (*before, *ids, *between, *context.ids[start:stop], *after)
            first = len(before) + len(ids) + len(between)
            columns["ids"].extend(own)
            columns["types"].extend(
                (*a, *[template.types[0]] * len(ids), *b, *[template.types[1]] * (stop - start), *c)
            )
            columns["words"].extend(range(len(own)))
            inside = answer is not None and start <= answer[0] and answer[1] < stop
            label = [first + i - start for i in answer] if inside and answer else [0, 0]
            columns["labels"].extend([IGNORE, IGNORE] if names is None else label)
            lengths.append(len(own))
            question.append(number)
            firsts.append(first)
            spans.append(places[start:stop])
    return Encoded(
        input_ids=int32(columns["ids"]),
        words=int32(columns["words"]),
        labels=int32(columns["labels"]).reshape(-1, 2),
        offsets=offsets(lengths),
        record=np.arange(len(lengths), dtype=np.int32),
        records=len(lengths),
        pad=tokenizer.pad,
        per_word=False,
        cut=cut,
        cut_texts=cut_texts,
        types=int32(columns["types"]),
        windows=Windows(tuple(records), int32(question), int32(firsts), tuple(spans)),
    )


def passages(windows: Windows, logits: Sequence[np.ndarray]) -> list[tuple[list[Passage], float]]:
    """The best passages of each question's context, and how well no answer fits.

    Args:
        windows: from `encode_questions`.
        logits: [pieces, 2] of each window, from `unpack_words`.

    Returns:
        for each question at most `N_BEST` different passages, best first, of at most
        `LONGEST_ANSWER` pieces; and the least sum of the first piece's logits over the windows,
        which is what no answer scores.

    >>> asked = Question("who", "ada wrote")
    >>> spans = (np.array([[0, 3], [4, 9]]),)
    >>> windows = Windows((asked,), np.array([0]), np.array([1]), spans)
    >>> [(best, *_), null] = passages(windows, [np.array([[0, 0], [1, 0], [0, 3.0]])])[0]
    >>> best, null
    (Passage(start=0, end=9, score=4.0), 0.0)
    """
    found: list[dict[tuple[int, int], float]] = [{} for _ in windows.questions]
    null = [np.inf] * len(found)
    for number, first, spans, own in zip(
        windows.question.tolist(), windows.first.tolist(), windows.spans, logits, strict=True
    ):
        null[number] = min(null[number], float(own[0].sum()))
        start, end = own[first : first + len(spans)].astype(np.float64).T
        if not start.size:  # a context without a piece
            continue
        # Of every length d + 1 and first piece: how well both ends fit, -∞ past the window's end.
        sums = np.full((min(LONGEST_ANSWER, len(start)), len(start)), -np.inf)
        for d in range(len(sums)):
            sums[d, : len(start) - d] = start[: len(start) - d] + end[d:]
        best = np.argpartition(-sums, min(N_BEST, sums.size) - 1, axis=None)[:N_BEST]
        for i in best.tolist():
            d, at = divmod(i, len(start))
            if np.isfinite(sums[d, at]):
                place = int(spans[at, 0]), int(spans[at + d, 1])
                score = float(sums[d, at])
                found[number][place] = max(score, found[number].get(place, -np.inf))
    return [
        (sorted((Passage(*k, v) for k, v in own.items()), key=lambda p: -p.score)[:N_BEST], n)
        for own, n in zip(found, null, strict=True)
    ]


@dataclass(frozen=True)
class _Template:
    """How a tokenizer joins two texts: special ids before, between and after, types of all."""

    special: tuple[tuple[list[int], list[int]], ...]
    types: tuple[int, int]


def _template(tokenizer: Tokenizer) -> _Template:
    probe = tokenizer.fast.encode("a", "a")
    of = probe.sequence_ids
    one, two = ([i for i, which in enumerate(of) if which == text] for text in (0, 1))
    if not (one and two):
        raise FwError("tokenizer: makes nothing of a pair of the letter 'a'")
    parts = (slice(one[0]), slice(one[-1] + 1, two[0]), slice(two[-1] + 1, None))
    return _Template(
        tuple((probe.ids[part], probe.type_ids[part]) for part in parts),
        (probe.type_ids[one[0]], probe.type_ids[two[0]]),
    )


def _encodings(tokenizer: Tokenizer, records: Sequence[Question]) -> Iterator[tuple]:
    for chunk in batched(records, CHUNK):
        asked, contexts = (
            tokenizer.fast.encode_batch(texts, add_special_tokens=False)
            for texts in ([r.question.strip() for r in chunk], [r.context for r in chunk])
        )
        yield from zip(chunk, asked, contexts, strict=True)


def _cut(total: int, room: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Windows of [0, total), at least one, of at most `room`, that share some with the next."""
    step = room - min(overlap, room // 2)
    for start in range(0, max(total, 1), step):
        yield start, min(start + room, total)
        if start + room >= total:
            return


def _pieces(record: Question, places: np.ndarray) -> tuple[int, int] | None:
    """The first and last piece that the answer has a character of."""
    if not record.answers:
        return None
    answer = record.answers[0]
    touched = (places[:, 0] < answer.start + len(answer.text)) & (places[:, 1] > answer.start)
    found = np.flatnonzero(touched)
    if not found.size:
        raise FwError(f"{record.source or 'Question'}: the tokenizer drops {answer.text!r}")
    return int(found[0]), int(found[-1])
