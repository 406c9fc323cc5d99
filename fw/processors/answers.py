"""Texts become answers: tokens, packed rows, logits, and back to the characters of each text.

The same encoding and packing as in training (`fw.data`), so a text gets the same pieces. Texts are
sorted by length into few row lengths: hardly any padding, few shapes to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fw.data import questions
from fw.data.batches import eval_batches
from fw.data.encode import LABELS, TARGETS, encode_tagged
from fw.data.encode_texts import encode_labelled
from fw.data.pack import Packed, pack, unpack_texts, unpack_words
from fw.data.records import Labelled, Tagged
from fw.data.tokenizer import Tokenizer
from fw.metrics.entities import entity_spans
from fw.metrics.multi_label import THRESHOLD
from fw.metrics.probabilities import one_label, sigmoid, softmax
from fw.processors.ask import ask
from fw.processors.words import say_words

if TYPE_CHECKING:
    from fw.export.load import Artifact
    from fw.processors.text import Text

SHORTEST_ROW, ROW_FACTOR = 32, 4
"""Row lengths are 32, 128, 512 … tokens: each is one more program to compile, and packing fills
the longer rows."""


@dataclass(frozen=True)
class Item:
    """A text with its words, by their place in it, and how many pieces it has."""

    text: str
    spans: tuple[tuple[int, int], ...]
    pieces: int

    @property
    def words(self) -> tuple[str, ...]:
        """The words themselves."""
        return tuple(self.text[start:end] for start, end in self.spans)


def problem(text: Any, task: str) -> str:
    """Say what is wrong with an item that is to be answered; nothing if it is fine.

    >>> problem("Ada", "token_classification"), problem(["Ada"], "sequence_classification")
    ('', 'expected a text; got list')
    """
    if task == "question_answering":
        return questions.problem(text)
    tagged = task == "token_classification"
    words = [text] if isinstance(text, str) else text
    if not (isinstance(text, str) or (tagged and isinstance(text, list | tuple))):
        return (
            f"expected a text{' or a list of words' if tagged else ''}; got {type(text).__name__}"
        )
    if not all(isinstance(word, str) and (word.strip() or word is text) for word in words):
        return "expected words that are texts and not blank"
    try:
        "".join(words).encode()
    except UnicodeEncodeError as error:
        return f"expected Unicode text; half a surrogate pair at character {error.start + 1}"
    return ""


def read_items(tokenizer: Tokenizer, texts: Sequence[str | Sequence[str]]) -> list[Item]:
    """Find the words of each text and count its pieces, special tokens included.

    >>> from tokenizers import Tokenizer as Fast, models, pre_tokenizers
    >>> fast = Fast(models.WordPiece({"[UNK]": 0, "ada": 1, "##s": 2}, unk_token="[UNK]"))
    >>> fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    >>> tokenizer = Tokenizer(fast, prefix=(3,), suffix=(4,), pad=0, unknown=0)
    >>> read_items(tokenizer, ["see adas.", ["see", "adas."]])[0].words
    ('see', 'adas', '.')
    """
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    items: dict[int, Item] = {}
    whole = [i for i, text in enumerate(texts) if isinstance(text, str)]
    found = tokenizer.fast.encode_batch([texts[i] for i in whole], add_special_tokens=False)
    for i, encoding in zip(whole, found, strict=True):
        text, places = str(texts[i]), {}
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            first, last = places.get(word, (start, end))
            places[word] = min(first, start), max(last, end)
        spans = (_strip(text, *place) for place in places.values())
        items[i] = Item(text, tuple(s for s in spans if s[0] < s[1]), special + len(encoding.ids))
    parted = [i for i in range(len(texts)) if i not in items]
    found = tokenizer.fast.encode_batch(
        [tokenizer.words(texts[i]) for i in parted], is_pretokenized=True, add_special_tokens=False
    )
    for i, encoding in zip(parted, found, strict=True):
        ends = np.cumsum([len(word) + 1 for word in texts[i]]) - 1
        spans = tuple((int(e) - len(w), int(e)) for w, e in zip(texts[i], ends, strict=True))
        items[i] = Item(" ".join(texts[i]), spans, special + len(encoding.ids))
    return [items[i] for i in range(len(texts))]


def pack_items(tokenizer: Tokenizer, items: Sequence[Item], task: str, row: int) -> Packed:
    """Lay texts out in rows of `row` tokens; for token classification each has a word at least."""
    if task == "token_classification":
        tagged = [Tagged(item.words) for item in items]
        return pack(encode_tagged(tokenizer, tagged, max_length=row), row)
    labelled = [Labelled(item.text) for item in items]
    return pack(encode_labelled(tokenizer, labelled, max_length=row), row)


def inputs(packed: Packed) -> dict[str, np.ndarray]:
    """The arrays of packed rows that the exported function takes."""
    return {name: array for name, array in packed.arrays.items() if name not in (LABELS, TARGETS)}


def row_length(pieces: int, length: int) -> int:
    """The row that a text of so many pieces goes into.

    >>> [row_length(pieces, 256) for pieces in (3, 33, 200, 1000)]
    [32, 128, 256, 256]
    """
    row = SHORTEST_ROW
    while row < pieces and row < length:
        row *= ROW_FACTOR
    return min(row, length)


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """A place without the white space at its ends, which some tokenizers count to a word."""
    word = text[start:end]
    start += len(word) - len(word.lstrip())
    return start, start + len(word.strip())


def answer(
    processor: Text, artifact: Artifact, texts: Sequence[Any], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Answer texts in their order.

    Token classification: the words of a text are what the tokenizer parts before it makes pieces
    (for BERT, at white space and punctuation), or the given ones; a word has the label of its first
    piece, and words make entities as in evaluation. A text longer than a row goes on in the next.
    Whole texts: what is longer than a row is cut at its end, and "truncated" says so.

    Args:
        processor: has the tokenizer.
        artifact: has the function.
        texts: without a `problem`.
        batch_size: the most rows computed at once.

    Yields:
        what `Artifact.predict` says.
    """
    tokenizer, length = processor.tokenizer, processor.length

    def run(packed: Packed) -> np.ndarray:
        # A power of two: texts that come one by one share a few compiled programs.
        size = min(batch_size, 1 << (packed.rows - 1).bit_length())
        batches = eval_batches(inputs(packed), size, empty=packed.empty)
        return np.concatenate([artifact.logits(batch) for batch in batches])

    if artifact.task == "question_answering":
        yield from ask(processor, texts, row_length, run)
        return
    if artifact.task in ("masked_lm", "causal_lm"):
        yield from say_words(processor, artifact, texts, row_length, run)
        return
    items = read_items(tokenizer, texts)
    tagged = artifact.task == "token_classification"
    groups: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        if item.spans or not tagged:
            groups.setdefault(row_length(item.pieces, length), []).append(i)

    logits: dict[int, np.ndarray] = {}
    for row, group in sorted(groups.items()):
        packed = pack_items(tokenizer, [items[i] for i in group], artifact.task, row)
        outputs = run(packed)
        unpacked = unpack_words(packed, outputs) if tagged else unpack_texts(packed, outputs)
        logits.update(zip(group, unpacked, strict=True))

    for i, item in enumerate(items):
        own = logits.get(i, np.zeros((0, len(artifact.labels))))
        if tagged:
            yield {"text": item.text, "entities": _entities(item, softmax(own), artifact.labels)}
        else:
            said = _SAY[artifact.task](own, artifact.labels)
            yield {"text": item.text, **said, "truncated": item.pieces > length}


def say(answer: Mapping[str, Any]) -> str:
    """An answer for people.

    >>> print(say({"text": "Good.", "label": "good", "score": 0.987, "truncated": False}))
    good 0.99  Good.
    """
    if "question" in answer:
        found = answer["answer"] or {"text": "–", "score": 0.0}
        unsure = f"  (no answer {answer['no_answer_score']:.2f})"
        return f"{found['text']} {found['score']:.2f}{unsure}  {answer['question']}"
    if "next" in answer:
        guesses = " ".join(f"{g['token']} {g['score']:.2f}" for g in answer["next"])
        mean = answer["log_likelihood"] / max(answer["tokens"], 1)
        return f"{answer['text']}\n  {guesses}  (log likelihood {mean:.3f} a token)"
    if "masks" in answer:
        guesses = (" ".join(f"{g['token']} {g['score']:.2f}" for g in m) for m in answer["masks"])
        return "\n  ".join((answer["text"], *guesses))
    if "entities" not in answer:
        cut = "  (cut for length)" if answer["truncated"] else ""
        if "numbers" in answer:
            said = ", ".join(f"{name} {value:.4g}" for name, value in answer["numbers"].items())
        elif "labels" in answer:
            scores = answer["scores"]
            said = ", ".join(f"{name} {scores[name]:.2f}" for name in answer["labels"]) or "–"
        else:
            said = f"{answer['label']} {answer['score']:.2f}"
        return f"{said}  {answer['text']}{cut}"
    found = (
        f"  {e['type']} {e['score']:.2f}  {e['text']}  [{e['start']}:{e['end']}]"
        for e in answer["entities"]
    )
    return "\n".join((answer["text"], *found))


def _many_labels(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    scores = sigmoid(logits)
    given = [name for name, score in zip(labels, scores, strict=True) if score > THRESHOLD]
    return {"labels": given, "scores": dict(zip(labels, scores.tolist(), strict=True))}


def _numbers(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    return {"numbers": dict(zip(labels, logits.tolist(), strict=True))}


_SAY = {
    "sequence_classification": one_label,
    "multi_label_classification": _many_labels,
    "regression": _numbers,
}
"""What the logits [C] of a whole text say."""


def _entities(item: Item, scores: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The entities of one text; an entity's score is the mean of its words'."""
    best = scores.argmax(axis=-1)
    entities = []
    for kind, first, after in entity_spans([labels[int(i)] for i in best]):
        start, end = item.spans[first][0], item.spans[after - 1][1]
        score = float(scores.max(axis=-1)[first:after].mean())
        text = item.text[start:end]
        entities.append({"type": kind, "text": text, "start": start, "end": end, "score": score})
    return entities
