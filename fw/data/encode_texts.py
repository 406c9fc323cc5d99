"""Texts that are judged whole become pieces, with a class, several labels or numbers for each.

The pieces are the same whatever the task; only what stands beside a text differs. `encode` has the
record of both, and sentences whose words are judged one by one.
"""

from array import array
from collections.abc import Sequence
from itertools import batched

import numpy as np

from fw.data.encode import CHUNK, Encoded, int32, label_id, offsets, space
from fw.data.records import Labelled, MultiLabelled, Rated
from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.labels import IGNORE


def encode_labelled(
    tokenizer: Tokenizer,
    records: Sequence[Labelled],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Encoded:
    """Encode texts to be classified whole; what is too long is cut at its end, and counted.

    Args:
        tokenizer: from `load_tokenizer`.
        records: the texts.
        names: the labels, in the order of the model's classes; None to leave all `IGNORE`.
        max_length: most pieces in a text, special tokens included.

    Returns:
        the pieces, `labels` [N], `cut` and `cut_texts`.

    Raises:
        FwError: a label that is not in `names`, or `max_length` without room for a piece.

    >>> from tokenizers import Tokenizer as Fast, models
    >>> fast = Fast(models.WordPiece({"[UNK]": 0, "ada": 1, "##s": 2}, unk_token="[UNK]"))
    >>> tokenizer = Tokenizer(fast, prefix=(3,), suffix=(4,), pad=0, unknown=0)
    >>> encoded = encode_labelled(tokenizer, [Labelled("adass", "b")], ("a", "b"), max_length=4)
    >>> encoded.input_ids.tolist(), encoded.labels.tolist(), encoded.cut
    ([3, 1, 2, 4], [1], 1)
    """
    labels = np.full(len(records), IGNORE, np.int32)
    if names is not None:
        ids_of = _ids(names)
        labels[:] = [label_id(record.label, record, ids_of) for record in records]
    return _encode(tokenizer, [record.text for record in records], labels, max_length)


def encode_multi_labelled(
    tokenizer: Tokenizer,
    records: Sequence[MultiLabelled],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Encoded:
    """Encode texts that have any number of labels; as `encode_labelled`, but for these.

    Returns:
        the pieces, and `labels` [N, C]: 1 for each label that a text has, 0 for the others.

    Raises:
        FwError: as `encode_labelled` does, or a record whose labels are to be predicted.

    >>> from tokenizers import Tokenizer as Fast, models
    >>> fast = Fast(models.WordPiece({"[UNK]": 0, "ada": 1, "##s": 2}, unk_token="[UNK]"))
    >>> tokenizer = Tokenizer(fast, prefix=(3,), suffix=(4,), pad=0, unknown=0)
    >>> records = [MultiLabelled("ada", ("b",)), MultiLabelled("adas", ())]
    >>> encode_multi_labelled(tokenizer, records, ("a", "b"), max_length=4).labels.tolist()
    [[0, 1], [0, 0]]
    """
    labels = np.full((len(records), len(names or ())), IGNORE, np.int32)
    if names is not None:
        ids_of = _ids(names)
        labels[:] = 0
        for i, record in enumerate(records):
            if record.labels is None:
                raise FwError(f"{record.source or 'record'}: expected labels to learn from")
            labels[i, [label_id(label, record, ids_of) for label in record.labels]] = 1
    return _encode(tokenizer, [record.text for record in records], labels, max_length)


def encode_rated(
    tokenizer: Tokenizer,
    records: Sequence[Rated],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Encoded:
    """Encode texts that have numbers; as `encode_labelled`, but for these.

    Returns:
        the pieces, and `labels` [N, C] float32, the numbers in the order of `names`.

    Raises:
        FwError: a record without one of the numbers, or `max_length` without room for a piece.

    >>> from tokenizers import Tokenizer as Fast, models
    >>> fast = Fast(models.WordPiece({"[UNK]": 0, "ada": 1, "##s": 2}, unk_token="[UNK]"))
    >>> tokenizer = Tokenizer(fast, prefix=(3,), suffix=(4,), pad=0, unknown=0)
    >>> encode_rated(tokenizer, [Rated("ada", {"x": 0.5})], ("x",), max_length=4).labels.tolist()
    [[0.5]]
    """
    labels = np.full((len(records), len(names or ())), np.nan, np.float32)
    if names is not None:
        for i, record in enumerate(records):
            if missing := [name for name in names if name not in record.numbers]:
                raise FwError(f"{record.source or 'record'}: expected a number for {missing[0]}")
            labels[i] = [record.numbers[name] for name in names]
    return _encode(tokenizer, [record.text for record in records], labels, max_length)


def _encode(
    tokenizer: Tokenizer, texts: Sequence[str], labels: np.ndarray, max_length: int
) -> Encoded:
    most = space(tokenizer, max_length)
    input_ids, lengths = array("i"), array("i")
    cut = cut_texts = 0
    for chunk in batched(texts, CHUNK):
        encodings = tokenizer.fast.encode_batch_fast(list(chunk), add_special_tokens=False)
        for encoding in encodings:
            ids = encoding.ids
            input_ids.extend((*tokenizer.prefix, *ids[:most], *tokenizer.suffix))
            lengths.append(len(tokenizer.prefix) + min(len(ids), most) + len(tokenizer.suffix))
            cut += max(len(ids) - most, 0)
            cut_texts += len(ids) > most
    return Encoded(
        input_ids=int32(input_ids),
        words=np.full(len(input_ids), -1, np.int32),
        labels=labels,
        offsets=offsets(lengths),
        record=np.arange(len(texts), dtype=np.int32),
        records=len(texts),
        pad=tokenizer.pad,
        per_word=False,
        cut=cut,
        cut_texts=cut_texts,
    )


def _ids(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}
