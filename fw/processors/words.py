"""What a language model says of texts: the likeliest words for those hidden, or how a text goes on.

The neighbour of `answers`, which calls it for language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import batched
from typing import TYPE_CHECKING, Any

import numpy as np

from fw.data.encode import Encoded
from fw.data.pack import Packed, pack, unpack_words
from fw.errors import FwError
from fw.labels import IGNORE

if TYPE_CHECKING:
    from fw.export.load import Artifact
    from fw.processors.text import Text

GUESSES = 5
"""How many words are named for a place."""

LOGITS = 2**26
"""Logits held at once: those of every token over the whole vocabulary are many."""


def say_words(
    processor: Text,
    artifact: Artifact,
    texts: Sequence[str],
    row_length: Callable[[int, int], int],
    run: Callable[[Packed], np.ndarray],
) -> Iterator[dict[str, Any]]:
    """Say of each text, in order, what a language model makes of it.

    Args:
        processor: has the tokenizer.
        artifact: of a masked language model, whose mask the texts spell where a word is hidden, as
            in "Paris is in [MASK]."; or of a causal one.
        texts: each has a piece.
        row_length: `(pieces, length) -> tokens of a row`.
        run: packed rows to their logits.

    Yields:
        {"text", "masks"}: for each mask of the text, in order, the likeliest pieces,
        [{"token", "score"}, …], best first. Of a causal model {"text", "next", "log_likelihood",
        "tokens"}: the likeliest pieces after it, and the sum of the log-likelihoods, in nats, of so
        many of its pieces, which are those that have one before them.

    Raises:
        FwError: a text is longer than a row, or has no piece.
    """
    masked = artifact.task == "masked_lm"
    ids = [_pieces(processor, text) if masked else _beginning(processor, text) for text in texts]
    for text, own in zip(texts, ids, strict=True):
        if not 0 < len(own) <= processor.length:
            raise FwError(
                f"a text of {len(own)} pieces; expected 1 to {processor.length}: {text[:60]!r}"
            )
    row = row_length(max(map(len, ids)), processor.length)
    vocabulary = artifact.manifest["signature"]["logits"]["shape"][-1]
    count = max(1, LOGITS // (row * vocabulary))
    for some in batched(zip(texts, ids, strict=True), count):
        packed = _pack([own for _, own in some], processor.tokenizer.pad, row)
        for (text, own), logits in zip(some, unpack_words(packed, run(packed)), strict=True):
            if masked:
                places = [i for i, piece in enumerate(own) if piece == processor.tokenizer.mask]
                guesses = [_guesses(processor, _shares(logits[i])) for i in places]
                yield {"text": text, "masks": guesses}
                continue
            shares = _shares(logits)
            likelihood = shares[np.arange(len(own) - 1), own[1:]].sum()
            yield {
                "text": text,
                "next": _guesses(processor, shares[-1]),
                "log_likelihood": float(likelihood),
                "tokens": len(own) - 1,
            }


def _beginning(processor: Text, text: str) -> list[int]:
    """The pieces of a text that is to go on."""
    tokenizer = processor.tokenizer
    return [*tokenizer.prefix, *tokenizer.fast.encode(text, add_special_tokens=False).ids]


def _pieces(processor: Text, text: str) -> list[int]:
    """The pieces of a text, with the mask where it is spelled."""
    tokenizer = processor.tokenizer
    if tokenizer.mask is None:
        raise FwError("tokenizer: has no mask token")
    found: list[int] = []
    for number, part in enumerate(text.split(str(tokenizer.fast.id_to_token(tokenizer.mask)))):
        found += [tokenizer.mask] if number else []
        # A mask takes the white space before it, as it would before a word.
        found += tokenizer.fast.encode(part.rstrip(), add_special_tokens=False).ids
    return [*tokenizer.prefix, *found, *tokenizer.suffix]


def _pack(ids: list[list[int]], pad: int, row: int) -> Packed:
    lengths = np.array([len(own) for own in ids], np.int64)
    flat = np.concatenate(ids).astype(np.int32)
    encoded = Encoded(
        input_ids=flat,
        # Every piece is a "word" of its own, so that its logits come back.
        words=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        labels=np.full(len(flat), IGNORE, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        record=np.arange(len(ids), dtype=np.int32),
        records=len(ids),
        pad=pad,
        per_word=True,
    )
    return pack(encoded, row)


def _shares(logits: np.ndarray) -> np.ndarray:
    """log softmax, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _guesses(processor: Text, shares: np.ndarray) -> list[dict[str, Any]]:
    best = np.argsort(-shares, kind="stable")[:GUESSES].tolist()
    fast = processor.tokenizer.fast
    return [{"token": fast.id_to_token(i) or "", "score": float(np.exp(shares[i]))} for i in best]
