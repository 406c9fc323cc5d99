"""Hidden words become guesses: the mask's spelling in a text, logits, the likeliest words.

The neighbour of `predict`, which calls it for artifacts of masked language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fw.data.encode import Encoded, space
from fw.data.pack import Packed, pack, unpack_words
from fw.errors import FwError
from fw.labels import IGNORE

if TYPE_CHECKING:
    from fw.export.load import Artifact

GUESSES = 5
"""How many words are named for a place."""


def fill(
    artifact: Artifact,
    texts: Sequence[str],
    row_length: Callable[[int, int], int],
    run: Callable[[Packed], np.ndarray],
) -> Iterator[dict[str, Any]]:
    """Guess the hidden words of texts in their order.

    Args:
        artifact: of a masked language model.
        texts: in which the mask is spelled where a word is hidden, as in "Paris is in [MASK].".
        row_length: `(pieces, length) -> tokens of a row`.
        run: packed rows to their logits.

    Yields:
        {"text", "masks"}: for each mask of the text, in order, the likeliest pieces,
        [{"token", "score"}, …], best first.

    Raises:
        FwError: a text is longer than a row.
    """
    tokenizer = artifact.tokenizer
    if tokenizer.mask is None:
        raise FwError(f"{artifact.folder}: its tokenizer has no mask token")
    spelling = str(tokenizer.fast.id_to_token(tokenizer.mask))
    room = space(tokenizer, artifact.length)
    ids = [_pieces(artifact, text, spelling) for text in texts]
    for text, own in zip(texts, ids, strict=True):
        if len(own) > room:
            raise FwError(f"a text of {len(own)} pieces is longer than {room}: {text[:60]!r}")
    whole = [[*tokenizer.prefix, *own, *tokenizer.suffix] for own in ids]
    lengths = np.array([len(own) for own in whole], np.int64)
    flat = np.array([piece for own in whole for piece in own], np.int32)
    encoded = Encoded(
        input_ids=flat,
        # Every piece is a "word" of its own, so that its logits come back.
        words=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        labels=np.full(len(flat), IGNORE, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        record=np.arange(len(whole), dtype=np.int32),
        records=len(whole),
        pad=tokenizer.pad,
        per_word=True,
    )
    packed = pack(encoded, row_length(int(lengths.max()), artifact.length))
    for text, own, logits in zip(texts, whole, unpack_words(packed, run(packed)), strict=True):
        places = [i for i, piece in enumerate(own) if piece == tokenizer.mask]
        yield {"text": text, "masks": [_guesses(artifact, logits[i]) for i in places]}


def _pieces(artifact: Artifact, text: str, spelling: str) -> list[int]:
    """The pieces of a text, with the mask where it is spelled."""
    tokenizer, found = artifact.tokenizer, []
    for number, part in enumerate(text.split(spelling)):
        found += [tokenizer.mask] if number else []
        # A mask takes the white space before it, as it would before a word.
        found += tokenizer.fast.encode(part.rstrip(), add_special_tokens=False).ids
    return found


def _guesses(artifact: Artifact, logits: np.ndarray) -> list[dict[str, Any]]:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    scores = powers / powers.sum()
    best = np.argsort(-scores, kind="stable")[:GUESSES].tolist()
    fast = artifact.tokenizer.fast
    return [{"token": fast.id_to_token(i) or "", "score": float(scores[i])} for i in best]
