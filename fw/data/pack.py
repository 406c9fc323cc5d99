"""Several texts share a row, and nothing of one reaches another.

A row of a fixed length filled by one short text is mostly padding. Packing lays texts side by
side; `segment_ids` tell attention which belong together, and positions restart with every text, so
a packed batch computes what one text a row would. `Packed` keeps where everything went, and
`unpack_texts` and `unpack_words` bring outputs back to the order of the records. `batches` deals
the rows out.

Source: Krell et al., Efficient Sequence Packing without Cross-contamination, 2021.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fw.data.encode import Encoded, Windows
from fw.errors import FwError
from fw.labels import IGNORE

# Without a cap of the caller's: texts of eight pieces would just fill a row.
PIECES_PER_TEXT = 8


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of texts, and the way back.

    Args:
        arrays: int32, leading axis rows: `input_ids`, `segment_ids`, `position_ids` [R, L];
            `labels` [R, L] for words, `targets` for a language model's, or `first` and `labels`
            [R, S] for texts; labels of several classes are [R, S, C], and those that are numbers
            float32; for questions `labels` [R, S, 2] and `token_type_ids` [R, L].
        empty: what each array holds where there is nothing; `input_ids` the pad id, `labels`
            `IGNORE` or NaN, 0 elsewhere.
        slots: [N] int64, place of each text in the flattened [R, S].
        pieces: [W] int64, place of each word's first piece in the flattened [R, L], in the order
            of records and words; empty for texts.
        words: [records] int64, words in each record.
        windows: what texts with questions were cut into.
    """

    arrays: dict[str, np.ndarray]
    empty: dict[str, float]
    slots: np.ndarray
    pieces: np.ndarray
    words: np.ndarray
    windows: Windows | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.arrays["input_ids"])

    @property
    def efficiency(self) -> float:
        """The fraction of places that hold a token of a text rather than padding."""
        return float(np.count_nonzero(self.arrays["segment_ids"])) / max(
            self.arrays["segment_ids"].size, 1
        )


def best_fit_decreasing(lengths: ArrayLike, length: int, max_texts: int) -> np.ndarray:
    """Assign texts to rows: longest first, each to the row it fills best.

    Rows are kept by their free space, and the free spaces in use as the bits of one integer, so
    a text costs a shift and a lookup, whatever the number of rows.

    Args:
        lengths: [N] tokens of each text, each in 1…length.
        length: tokens a row holds.
        max_texts: texts a row holds.

    Returns:
        [N] int64 row numbers, from 0, none left out.

    Raises:
        FwError: a text is longer than a row.

    >>> best_fit_decreasing([5, 3, 6, 2], length=8, max_texts=2).tolist()
    [1, 1, 0, 0]

    Source: Johnson, Near-optimal bin packing algorithms, 1973.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= length:
        raise FwError(
            f"length: expected room for every text, of {sizes.min()}…{sizes.max()} tokens; "
            f"got {length}; encode with max_length={length}"
        )
    order = np.argsort(-sizes, kind="stable").tolist()
    size_of = sizes.tolist()
    rows = np.empty(len(sizes), np.int64)
    free_rows: list[list[int]] = [[] for _ in range(length + 1)]
    in_use = 0
    held: list[int] = []
    for text in order:
        size = size_of[text]
        fitting = in_use >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = free_rows[free].pop()
            if not free_rows[free]:
                in_use ^= 1 << free
        else:
            free, row = length, len(held)
            held.append(0)
        rows[text] = row
        held[row] += 1
        if held[row] < max_texts:
            free_rows[free - size].append(row)
            in_use |= 1 << (free - size)
    return rows


def pack(
    encoded: Encoded, length: int, *, max_texts: int | None = None, packed: bool = True
) -> Packed:
    """Lay encoded texts out in rows.

    Args:
        encoded: from `encode_tagged` or `encode_labelled`.
        length: L, tokens a row holds.
        max_texts: S, texts a row holds; None for L / `PIECES_PER_TEXT`. It is a shape of the
            arrays of text classification, so training and evaluation need the same.
        packed: False for one text a row, in order, S = 1.

    Returns:
        the rows and the way back.

    Raises:
        FwError: a text is longer than a row, or `max_texts` is below 1.

    >>> ids = np.array([2, 7, 3, 2, 8, 3], np.int32)
    >>> texts = Encoded(ids, np.full(6, -1, np.int32), np.array([0, 1], np.int32),
    ...                 np.array([0, 3, 6]), np.array([0, 1], np.int32), records=2, pad=0,
    ...                 per_word=False)
    >>> rows = pack(texts, length=8, max_texts=2)
    >>> rows.arrays["segment_ids"].tolist(), rows.arrays["first"].tolist()
    ([[1, 1, 1, 2, 2, 2, 0, 0]], [[0, 3]])
    """
    if max_texts is None:
        max_texts = max(1, length // PIECES_PER_TEXT)
    if not packed:
        max_texts = 1
    if max_texts < 1:
        raise FwError(f"max_texts: expected at least 1; got {max_texts}")
    sizes, texts = encoded.lengths, len(encoded.record)
    row = best_fit_decreasing(sizes, length, max_texts)
    if not packed:
        row = np.arange(texts, dtype=np.int64)
    rows = int(row.max()) + 1 if texts else 0
    slot, start = _within_rows(row, sizes)

    # Of every piece: its position in its text, and its place in the flattened rows.
    position = np.arange(len(encoded.input_ids)) - np.repeat(encoded.offsets[:-1], sizes)
    place = np.repeat(row * length + start, sizes) + position

    def lay(values: np.ndarray, where: np.ndarray, width: int, fill: float) -> np.ndarray:
        numbers = np.float32 if values.dtype.kind == "f" else np.int32
        flat = np.full((rows * width, *values.shape[1:]), fill, numbers)
        flat[where] = values
        return flat.reshape(rows, width, *values.shape[1:])

    empty: dict[str, float] = {"input_ids": encoded.pad, "segment_ids": 0, "position_ids": 0}
    empty[encoded.called] = np.nan if encoded.labels.dtype.kind == "f" else IGNORE
    arrays = {
        "input_ids": lay(encoded.input_ids, place, length, encoded.pad),
        "segment_ids": lay(np.repeat(slot + 1, sizes), place, length, 0),
        "position_ids": lay(position, place, length, 0),
    }
    slots = row * max_texts + slot
    if encoded.per_word:
        arrays[encoded.called] = lay(encoded.labels, place, length, empty[encoded.called])
    elif encoded.types is not None:
        arrays["token_type_ids"] = lay(encoded.types, place, length, 0)
        arrays[encoded.called] = lay(encoded.labels, slots, max_texts, empty[encoded.called])
        empty["token_type_ids"] = 0
    else:
        arrays["first"] = lay(start, slots, max_texts, 0)
        arrays[encoded.called] = lay(encoded.labels, slots, max_texts, empty[encoded.called])
        empty["first"] = 0

    opens = encoded.words >= 0
    opens[1:] &= (encoded.words[1:] != encoded.words[:-1]) | (position[1:] == 0)
    record_of = np.repeat(encoded.record, sizes)
    words = np.bincount(record_of[opens], minlength=encoded.records)
    return Packed(
        arrays, empty, slots=slots, pieces=place[opens], words=words, windows=encoded.windows
    )


def unpack_texts(packed: Packed, outputs: np.ndarray) -> np.ndarray:
    """Outputs of every text, in the order of the records.

    Args:
        packed: what was evaluated.
        outputs: [R', S, ...] with R' ≥ R: further rows, as evaluation adds, are ignored.

    Returns:
        [N, ...].

    >>> row_outputs = np.array([[10, 20]])
    >>> unpack_texts(Packed({}, {}, np.array([1, 0]), np.array([]), np.array([])), row_outputs)
    array([20, 10])
    """
    return _flat(outputs)[packed.slots]


def unpack_words(packed: Packed, outputs: np.ndarray) -> list[np.ndarray]:
    """Outputs at the first piece of every word, one array a record, in the records' order.

    Args:
        packed: what was evaluated.
        outputs: [R', L, ...] with R' ≥ R: further rows, as evaluation adds, are ignored.

    Returns:
        for each record [words of the record, ...].

    >>> places = Packed({}, {}, np.array([0]), np.array([1, 3]), np.array([1, 1]))
    >>> unpack_words(places, np.array([[10, 11, 12, 13]]))
    [array([11]), array([13])]
    """
    parts = np.split(_flat(outputs)[packed.pieces], np.cumsum(packed.words))
    return parts[:-1]


def _within_rows(row: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every text: its number in its row, from 0, and the place in the row where it starts."""
    order = np.argsort(row, kind="stable")
    in_order = row[order]
    opens = np.flatnonzero(np.diff(in_order, prepend=-1))
    repeats = np.diff(opens, append=len(row))
    ends = np.cumsum(sizes[order])
    starts = ends - sizes[order]
    slot, start = np.empty_like(row), np.empty_like(row)
    slot[order] = np.arange(len(row)) - np.repeat(opens, repeats)
    start[order] = starts - np.repeat(starts[opens], repeats)
    return slot, start


def _flat(outputs: np.ndarray) -> np.ndarray:
    outputs = np.asarray(outputs)
    return outputs.reshape(-1, *outputs.shape[2:])
