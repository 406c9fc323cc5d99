"""Words are hidden, so that a model learns to guess them from both sides.

`encode_maskable` marks every piece that may be hidden: its label is itself. `Masking` then chooses
some anew each time a row is taken, hides them and forgets the other labels. What it chooses is a
function of the seed and of the row's place in the endless stream of `batches`, so of (seed, step):
no mesh and no number of processes can change it.

Source: Devlin et al. 2019 (arXiv:1810.04805); masks that change every epoch are RoBERTa's, Liu et
al. 2019 (arXiv:1907.11692).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched

import numpy as np

from fw.data.encode import CHUNK, TARGETS, Encoded, space
from fw.data.language import Pieces, in_texts
from fw.data.records import Conversation, Document
from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.labels import IGNORE

RATE, MASKED, RANDOM = 0.15, 0.8, 0.1
"""The share of pieces that are to be guessed; of these, how many are hidden, how many replaced by
any word. The others stay as they are, so that a model has to have an opinion on every piece."""


def encode_maskable(
    tokenizer: Tokenizer,
    records: Sequence[Document | Conversation],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Encoded:
    """Encode documents; one too long for a text goes on in further texts.

    Args:
        tokenizer: from `load_tokenizer`.
        records: the documents; of conversations, what was said.
        names: has no meaning here.
        max_length: most pieces in a text, special tokens included.

    Returns:
        the pieces; `labels` [T] are the pieces themselves, `IGNORE` for special tokens.

    Raises:
        FwError: `max_length` without room for a piece.

    >>> from tokenizers import Tokenizer as Fast, models
    >>> fast = Fast(models.WordPiece({"[UNK]": 0, "ada": 1, "##s": 2}, unk_token="[UNK]"))
    >>> tokenizer = Tokenizer(fast, prefix=(3,), suffix=(4,), pad=0, unknown=0)
    >>> encoded = encode_maskable(tokenizer, [Document("adass")], max_length=4)
    >>> encoded.input_ids.tolist(), encoded.labels.tolist()
    ([3, 1, 2, 4, 3, 2, 4], [-1, 1, 2, -1, -1, 2, -1])
    """
    room = space(tokenizer, max_length)

    def pieces() -> Iterator[Pieces]:
        for chunk in batched(records, CHUNK):
            texts = [document.text for document in chunk]
            for encoding in tokenizer.fast.encode_batch_fast(texts, add_special_tokens=False):
                yield encoding.ids, encoding.ids, True

    return in_texts(pieces(), room, tokenizer.pad, tokenizer.prefix, tokenizer.suffix)


@dataclass(frozen=True)
class Masking:
    """Hides pieces of rows; give it to `Batches` as `change`.

    Args:
        mask: the id that hides a piece.
        words: ids are in 0 … words - 1.
        seed: of the choice.

    >>> rows = {"input_ids": np.full((1, 10**5), 7)}
    >>> rows["targets"] = rows["input_ids"]
    >>> rows = Masking(mask=1, words=100)(rows, np.array([5]))
    >>> chosen = rows["targets"] != IGNORE
    >>> f"{chosen.mean():.2f} chosen, {(rows['input_ids'][chosen] == 1).mean():.1f} of them masked"
    '0.15 chosen, 0.8 of them masked'
    """

    mask: int
    words: int
    seed: int = 0

    def __call__(
        self, arrays: Mapping[str, np.ndarray], places: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Hide some pieces.

        Args:
            arrays: `input_ids` and `targets` int32 [R, L], from `encode_maskable` and `pack`, and
                others.
            places: [R] int64, the place of each row in the stream.

        Returns:
            the same arrays, with some ids changed and all targets but theirs `IGNORE`.
        """
        ids, labels = arrays["input_ids"], arrays[TARGETS]
        choice, fate, word = np.stack([self._draw(int(p), ids.shape[1]) for p in places], 1)
        chosen = (labels != IGNORE) & (choice < RATE)
        other = np.where(fate < MASKED, self.mask, (word * self.words).astype(np.int32))
        hidden = chosen & (fate < MASKED + RANDOM)
        return {
            **arrays,
            "input_ids": np.where(hidden, other, ids).astype(ids.dtype),
            TARGETS: np.where(chosen, labels, IGNORE).astype(labels.dtype),
        }

    def _draw(self, place: int, length: int) -> np.ndarray:
        """Three uniform numbers in [0, 1) for each token of a row: [3, L] float64."""
        # From the upper half of the counter: `batches` shuffles with the lower one.
        key = np.array([self.seed, place], np.uint64)
        raw = np.random.Philox(key=key, counter=1 << 255).random_raw(3 * length)
        return (raw >> np.uint64(11)).reshape(3, length) * 2.0**-53


def masking(tokenizer: Tokenizer, seed: int) -> Masking:
    """The masking of a tokenizer's words.

    Raises:
        FwError: the tokenizer has no token for it.
    """
    if tokenizer.mask is None:
        raise FwError("the tokenizer has no mask token; take a masked language model's")
    return Masking(tokenizer.mask, max(tokenizer.fast.get_vocab().values()) + 1, seed)
