"""Records become numbers, and every number remembers the word it came from.

`encode_tagged` lays the pieces of all sentences end to end in one `Encoded`, which `pack` then cuts
into rows; `encode_texts` does so for texts that are judged whole.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched

import numpy as np

from fw.data.questions import Question
from fw.data.records import Record, Tagged
from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.labels import IGNORE

# Texts given to the tokenizer's threads at once: bounds the memory of its per-piece objects.
CHUNK = 4096

LABELS, TARGETS = "labels", "targets"
"""What the rows call labels, and call words that the model itself makes the losses of."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the windows of questions come from.

    Args:
        questions: the records.
        question: [N] int32, which one a window belongs to.
        first: [N] int32, the place in the window of its first piece of the context.
        spans: [n, 2] int32 for each window: where its pieces of the context start and end in it.
    """

    questions: tuple[Question, ...]
    question: np.ndarray
    first: np.ndarray
    spans: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The pieces of N texts, end to end: text n is `offsets[n]:offsets[n + 1]`.

    A sentence too long for one text is several, in order; `record` says whose.

    Args:
        input_ids: [T] int32, special tokens included.
        words: [T] int32, which word of its record a piece belongs to; -1 for special tokens, and
            throughout for texts that were not given as words.
        labels: [T] int32 for words, [N] int32 for texts, [N, C] int32 for several labels of a text,
            [N, C] float32 for numbers; `IGNORE`, or NaN, where there is none.
        offsets: [N + 1] int64.
        record: [N] int32.
        records: how many records there were.
        pad: the tokenizer's id for padding.
        per_word: whether words are labelled rather than texts.
        cut: how many pieces were cut off for length.
        cut_texts: from how many records.
        types: [T] int32, which of two texts a piece belongs to, where there are two.
        windows: what texts with questions were cut into.
        called: what the rows are to call the labels, `LABELS` or `TARGETS`.
    """

    input_ids: np.ndarray
    words: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    record: np.ndarray
    records: int
    pad: int
    per_word: bool
    cut: int = 0
    cut_texts: int = 0
    types: np.ndarray | None = None
    windows: Windows | None = None
    called: str = LABELS

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: pieces in each text, special tokens included."""
        return np.diff(self.offsets)


def encode_tagged(
    tokenizer: Tokenizer,
    records: Sequence[Tagged],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Encoded:
    """Encode sentences word by word; the first piece of a word carries its label.

    A sentence of more than `max_length` pieces goes on in further texts, parted between words, so
    that every word has its label and its prediction once. A word that the tokenizer drops (a
    zero-width character) becomes the unknown token for the same reason. Only a single word longer
    than a whole text is cut.

    Args:
        tokenizer: from `load_tokenizer`.
        records: the sentences.
        names: the labels, in the order of the model's classes; None to leave all `IGNORE`.
        max_length: most pieces in a text, special tokens included.

    Returns:
        the pieces, `labels` [T].

    Raises:
        FwError: a tag that is not in `names`, or `max_length` without room for a piece.

    >>> from tokenizers import Tokenizer as Fast, models
    >>> fast = Fast(models.WordPiece({"[UNK]": 0, "ada": 1, "##s": 2}, unk_token="[UNK]"))
    >>> tokenizer = Tokenizer(fast, prefix=(3,), suffix=(4,), pad=0, unknown=0)
    >>> records = [Tagged(("see", "adas"), ("O", "B-name"))]
    >>> encoded = encode_tagged(tokenizer, records, ("O", "B-name", "I-name"), max_length=8)
    >>> encoded.input_ids.tolist(), encoded.labels.tolist()
    ([3, 0, 1, 2, 4], [-1, 0, 1, -1, -1])
    """
    ids_of = None if names is None else {name: i for i, name in enumerate(names)}
    room = space(tokenizer, max_length)
    input_ids, words, labels = array("i"), array("i"), array("i")
    lengths, record_of = array("i"), array("i")
    cut = cut_texts = 0
    before, after = len(tokenizer.prefix), len(tokenizer.suffix)

    for number, (record, pieces) in enumerate(_pieces_of_words(tokenizer, records)):
        ids, word_of = pieces
        tags = [IGNORE] * len(record.words) if ids_of is None else _tag_ids(record, ids_of)
        starts = [i for i, word in enumerate(word_of) if i == 0 or word != word_of[i - 1]]
        kept = 0
        for start, stop in _windows(starts, len(ids), room):
            input_ids.extend((*tokenizer.prefix, *ids[start:stop], *tokenizer.suffix))
            words.extend((*[-1] * before, *word_of[start:stop], *[-1] * after))
            labels.extend([IGNORE] * before)
            labels.extend(
                tags[word_of[i]] if i == start or word_of[i] != word_of[i - 1] else IGNORE
                for i in range(start, stop)
            )
            labels.extend([IGNORE] * after)
            lengths.append(stop - start + before + after)
            record_of.append(number)
            kept += stop - start
        cut += len(ids) - kept
        cut_texts += len(ids) > kept
    return Encoded(
        input_ids=int32(input_ids),
        words=int32(words),
        labels=int32(labels),
        offsets=offsets(lengths),
        record=int32(record_of),
        records=len(records),
        pad=tokenizer.pad,
        per_word=True,
        cut=cut,
        cut_texts=cut_texts,
    )


def _pieces_of_words(
    tokenizer: Tokenizer, records: Sequence[Tagged]
) -> Iterator[tuple[Tagged, tuple[list[int], list[int]]]]:
    """Each sentence with the ids of its pieces and the word of each; no word without a piece."""
    for chunk in batched(records, CHUNK):
        encodings = tokenizer.fast.encode_batch(
            [tokenizer.words(record.words) for record in chunk],
            is_pretokenized=True,
            add_special_tokens=False,
        )
        for record, encoding in zip(chunk, encodings, strict=True):
            ids, word_of = encoding.ids, [word for word in encoding.word_ids if word is not None]
            missing = set(range(len(record.words))).difference(word_of)
            if missing:
                if tokenizer.unknown is None:
                    raise FwError(
                        f"{record.source}: word {min(missing) + 1} has no piece, and the "
                        "vocabulary has no unknown token to stand for it; take the word out"
                    )
                pairs = [
                    *zip(word_of, ids, strict=True),
                    *((w, tokenizer.unknown) for w in missing),
                ]
                pairs.sort(key=lambda pair: pair[0])
                word_of, ids = (list(column) for column in zip(*pairs, strict=True))
            yield record, (ids, word_of)


def _windows(starts: list[int], total: int, room: int) -> Iterator[tuple[int, int]]:
    """Cut [0, total) before words into pieces of at most `room`; cut a word only if it must."""
    start = 0
    while start < total:
        if total - start <= room:
            yield start, total
            return
        stop = starts[bisect_right(starts, start + room) - 1]
        if stop > start:
            yield start, stop
            start = stop
        else:
            yield start, start + room
            following = bisect_right(starts, start)
            start = starts[following] if following < len(starts) else total


def _tag_ids(record: Tagged, ids_of: dict[str, int]) -> list[int]:
    if not record.tags:
        raise FwError(f"{record.source or 'Tagged'}: expected tags to learn from; got none")
    return [label_id(tag, record, ids_of) for tag in record.tags]


def label_id(label: str, record: Record, ids_of: Mapping[str, int]) -> int:
    """The id of a record's label; `FwError` if the training data does not have it."""
    if label not in ids_of:
        known = ", ".join(list(ids_of)[:20])
        raise FwError(
            f"{record.source or 'record'}: expected a label of the training data ({known}"
            f"{', …' if len(ids_of) > 20 else ''}); got {label!r}"
        )
    return ids_of[label]


def space(tokenizer: Tokenizer, max_length: int) -> int:
    """How many pieces a text may have beside the special tokens; `FwError` if none."""
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    if max_length <= special:
        raise FwError(
            f"max_length: expected more than the {special} special tokens; got {max_length}"
        )
    return max_length - special


def int32(numbers: array) -> np.ndarray:
    """The numbers without a copy."""
    return np.frombuffer(numbers, np.int32) if len(numbers) else np.zeros(0, np.int32)


def offsets(lengths: array) -> np.ndarray:
    """Where each of some texts begins, and the last ends: [N + 1] int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(int32(lengths), dtype=np.int64)])
