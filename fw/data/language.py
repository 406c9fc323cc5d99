"""What a language model learns: the next word of documents, and of answers in conversations.

Both are read from files by `read_documents`; `encode_documents` lays their pieces end to end in an
`Encoded` whose labels are the pieces that come next. Rows call those `targets`: a model that is
given them makes the losses itself, and no logits.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from fw.data.chat import ANSWER, Chat
from fw.data.encode import CHUNK, TARGETS, Encoded, int32, offsets
from fw.data.files import OnBadRow, json_lines, read_text, refuse
from fw.data.records import Conversation, Document
from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.labels import IGNORE

TEXT, MESSAGES = "text", "messages"
"""The keys of a document and of a conversation in JSON lines."""

Ids = Sequence[int]
Pieces = tuple[Ids, Ids, bool]
"""A record's pieces, the label of each, and whether all are kept, in further texts if need be."""

_EXPECTED = (
    f'expected {{"{TEXT}": a text}}, or {{"{MESSAGES}": [{{"role": "user", "content": a text}}, '
    f"...]}} with an answer of {ANSWER!r}"
)


def read_documents(
    path: str | Path, *, on_bad_row: OnBadRow = None
) -> list[Document | Conversation]:
    """Read a text file as one document, or JSON lines with a document or a conversation each.

    Args:
        path: the file, UTF-8. In `.jsonl` and `.ndjson` a line is `{"text": "Once"}` or
            `{"messages": [{"role": "user", "content": "Hi"}, ...]}`; all else is one document.
        on_bad_row: gets the message of each line left out; None raises instead.

    Returns:
        the records in the order of the file; no document is empty, each conversation has an answer.

    Raises:
        FwError: the file cannot be read, or has a bad line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_text("Once upon a time\\n")
    ...     read_documents(Path(folder, "a.txt"))[0].text
    'Once upon a time\\n'
    """
    if Path(path).suffix.lower() not in (".jsonl", ".ndjson"):
        text = read_text(path)
        return [Document(text, str(path))] if text.strip() else []
    found: list[Document | Conversation] = []
    for number, row in json_lines(path, on_bad_row):
        where = f"{path}:{number}"
        own: dict[str, Any] = row if isinstance(row, dict) else {}
        text, messages = own.get(TEXT), own.get(MESSAGES, [])
        if isinstance(text, str) and text.strip():
            found.append(Document(text, where))
        elif _answers(messages):
            found.append(Conversation(tuple(messages), where))
        else:
            refuse(f"{where}: {_EXPECTED}; got {json.dumps(row)[:200]}", on_bad_row)
    return found


def encode_documents(
    tokenizer: Tokenizer,
    records: Sequence[Document | Conversation],
    names: Sequence[str] | None = None,
    *,
    max_length: int,
) -> Encoded:
    """The pieces of documents and conversations, each with the one that comes next.

    The token that ends a text follows each document, and a long one goes on in further texts, whose
    last piece knows what comes next. A conversation is spelled by the tokenizer's template; only
    its answers are learnt, and what is too long is cut.

    Args:
        tokenizer: from `load_tokenizer`.
        records: to learn from.
        names: has no meaning here.
        max_length: most pieces in a text.

    Returns:
        the pieces; `labels` [T] are their successors, `IGNORE` where there is none to learn.

    Raises:
        FwError: `max_length` below 1; no template, or a conversation that it refuses, with its
            file and line.
    """
    if max_length < 1:
        raise FwError(f"max_length: expected 1 or more; got {max_length}")
    return in_texts(_successors(tokenizer, records), max_length, tokenizer.pad)


def in_texts(
    found: Iterable[Pieces], room: int, pad: int, before: Ids = (), after: Ids = ()
) -> Encoded:
    """The pieces of records in texts of so many at most; a long record goes on in further texts.

    Args:
        found: of each record.
        room: pieces in a text.
        pad: the tokenizer's id for padding.
        before, after: special tokens around each text, for which there are no labels.

    Returns:
        the pieces; their labels are to be called `TARGETS`.
    """
    input_ids, labels, lengths, record = array("i"), array("i"), array("i"), array("i")
    cut = cut_texts = records = 0
    for number, (ids, own, whole) in enumerate(found):
        last = len(ids) if whole else min(len(ids), room)
        for start in range(0, last, room):
            part = slice(start, min(start + room, last))
            input_ids.extend((*before, *ids[part], *after))
            labels.extend((*[IGNORE] * len(before), *own[part], *[IGNORE] * len(after)))
            lengths.append(len(before) + part.stop - part.start + len(after))
            record.append(number)
        cut += len(ids) - last
        cut_texts += last < len(ids)
        records = number + 1
    return Encoded(
        input_ids=int32(input_ids),
        words=np.full(len(input_ids), -1, np.int32),
        labels=int32(labels),
        offsets=offsets(lengths),
        record=int32(record),
        records=records,
        pad=pad,
        per_word=True,
        cut=cut,
        cut_texts=cut_texts,
        called=TARGETS,
    )


def _successors(
    tokenizer: Tokenizer, records: Sequence[Document | Conversation]
) -> Iterator[Pieces]:
    chat, end = Chat(tokenizer), tokenizer.end
    ends = [] if end is None else [end]
    for chunk in batched(records, CHUNK):
        texts = [one.text for one in chunk if isinstance(one, Document)]
        encodings = iter(tokenizer.fast.encode_batch_fast(texts, add_special_tokens=False))
        for one in chunk:
            if isinstance(one, Document):
                ids = [*tokenizer.prefix, *next(encodings).ids, *ends]
                yield ids, [*ids[1:], IGNORE], True
                continue
            try:
                ids, learnt = chat.example(one.messages)
            except FwError as error:
                raise FwError(f"{one.source or 'conversation'}: {error}") from error
            yield ids.tolist(), [*np.where(learnt, ids, IGNORE)[1:].tolist(), IGNORE], False


def _answers(messages: Any) -> bool:
    """Whether something is messages with an answer among them."""
    return (
        isinstance(messages, list)
        and all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in messages
        )
        and any(m["role"] == ANSWER for m in messages)
    )
