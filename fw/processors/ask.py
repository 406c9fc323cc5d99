"""Questions become answers: windows of the text, logits, the passage that fits best.

The neighbour of `answers`, which calls it for question answering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fw.data.pack import Packed, pack, unpack_words
from fw.data.questions import Question
from fw.data.tokenizer import Tokenizer
from fw.data.windows import encode_questions, passages
from fw.metrics.probabilities import softmax

if TYPE_CHECKING:
    from fw.processors.text import Text


def ask(
    processor: Text,
    asked: Sequence[Mapping[str, Any]],
    row_length: Callable[[int, int], int],
    run: Callable[[Packed], np.ndarray],
) -> Iterator[dict[str, Any]]:
    """Answer questions in their order.

    Args:
        processor: has the tokenizer.
        asked: {"question", "context"} each.
        row_length: `(pieces, length) -> tokens of a row`.
        run: packed rows to their logits.

    Yields:
        {"question", "answer", "no_answer_score"}: the answer is {"text", "start", "end", "score"},
        with offsets in characters of the context, or None if the context has no piece. Scores are
        probabilities among the best passages and no answer.
    """
    records = [Question(one["question"], one["context"]) for one in asked]
    packed = pack_questions(processor.tokenizer, records, processor.length, row_length)
    assert packed.windows is not None
    for record, (best, null) in zip(
        records, passages(packed.windows, unpack_words(packed, run(packed))), strict=True
    ):
        sums = np.array([null, *(passage.score for passage in best)])
        scores = softmax(sums).tolist()
        answer = None
        if best:
            start, end = best[0].start, best[0].end
            text = record.context[start:end]
            start += len(text) - len(text.lstrip())  # some tokenizers count it to a word
            text = text.strip()
            answer = {"text": text, "start": start, "end": start + len(text), "score": scores[1]}
        yield {"question": record.question, "answer": answer, "no_answer_score": scores[0]}


def pack_questions(
    tokenizer: Tokenizer,
    records: Sequence[Question],
    length: int,
    row_length: Callable[[int, int], int],
) -> Packed:
    """The windows of some questions in rows as long as the longest of them wants."""
    encoded = encode_questions(tokenizer, records, max_length=length)
    return pack(encoded, row_length(int(encoded.lengths.max()), length))
