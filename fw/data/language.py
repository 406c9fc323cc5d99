"""What a language model learns: the next token of documents, and of answers in conversations.

`Document` and `Conversation` are read from files, their ids laid end to end in an `Encoded` whose
labels are the tokens that come next, and `pack_words` puts them in rows with `targets`.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fw.data.chat import ANSWER, Chat
from fw.data.encode import Encoded
from fw.data.files import OnBadRow, read_text, refuse
from fw.data.pack import Packed, pack
from fw.data.tokenizer import Tokenizer
from fw.errors import FwError
from fw.labels import IGNORE


@dataclass(frozen=True)
class Document:
    """A text to go on with.

    >>> Document("Once upon a time").text
    'Once upon a time'
    """

    text: str
    source: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, {"role": "user", "content": "text"} each; what "assistant" says is learnt.

    >>> Conversation(({"role": "assistant", "content": "Hello"},)).messages[0]["role"]
    'assistant'
    """

    messages: tuple[dict[str, Any], ...]
    source: str = ""


def read_documents(
    path: str | Path, *, column: str = "text", on_bad_row: OnBadRow = None
) -> list[Document]:
    """Read a text file as one document, or JSON lines with one each.

    Args:
        path: the file, UTF-8; `.jsonl` or `.json` for JSON lines.
        column: the key of the text there.
        on_bad_row: gets the message of each line left out; None raises instead.

    Returns:
        the documents in the order of the file, none empty.

    Raises:
        FwError: the file cannot be read, or has a bad line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_text("Once upon a time\\n")
    ...     read_documents(Path(folder, "a.txt"))[0].text
    'Once upon a time\\n'
    """
    if Path(path).suffix.lower() not in (".json", ".jsonl"):
        text = read_text(path)
        return [Document(text, str(path))] if text.strip() else []
    found = []
    for where, row in _objects(path, on_bad_row):
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            found.append(Document(text, where))
        else:
            refuse(f'{where}: expected {{"{column}": a text}}; got {str(row)[:200]}', on_bad_row)
    return found


def read_conversations(
    path: str | Path, *, column: str = "messages", on_bad_row: OnBadRow = None
) -> list[Conversation]:
    """Read JSON lines `{"messages": [{"role": "user", "content": "text"}, ...]}`.

    Args:
        path: the file, UTF-8.
        column: the key of the messages.
        on_bad_row: gets the message of each line left out; None raises instead.

    Returns:
        the conversations in the order of the file; each has an answer.

    Raises:
        FwError: the file cannot be read, or has a bad line.
    """
    found = []
    for where, row in _objects(path, on_bad_row):
        messages: Any = row.get(column)
        good = isinstance(messages, list) and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
        if good and any(m["role"] == ANSWER for m in messages):
            found.append(Conversation(tuple(messages), where))
        else:
            refuse(
                f'{where}: expected {{"{column}": [{{"role": "user", "content": a text}}, ...]}} '
                f"with an answer of {ANSWER!r}; got {str(row)[:200]}",
                on_bad_row,
            )
    return found


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document], *, max_length: int
) -> Encoded:
    """The pieces of documents; long ones go on in further texts, which know what comes next.

    Args:
        tokenizer: from `load_tokenizer`; the token that ends a text follows each document.
        documents: to read.
        max_length: most pieces in a text.

    Returns:
        the pieces; `labels` [T], each piece's successor.

    Raises:
        FwError: `max_length` below 1.
    """
    _check(max_length)
    end = tokenizer.end
    whole = tokenizer.fast.encode_batch_fast(
        [document.text for document in documents], add_special_tokens=False
    )
    ends = [] if end is None else [end]
    ids = [[*tokenizer.prefix, *one.ids, *ends] for one in whole]
    texts = []
    for number, own in enumerate(ids):
        following = [*own[1:], IGNORE]
        texts += [
            (number, own[i : i + max_length], following[i : i + max_length])
            for i in range(0, len(own), max_length)
        ]
    return _encoded(tokenizer, texts, len(documents))


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], *, max_length: int
) -> Encoded:
    """The pieces of conversations by the tokenizer's template; what is too long is cut, counted.

    Args:
        tokenizer: from `load_tokenizer`.
        conversations: to learn from.
        max_length: most pieces in a text.

    Returns:
        the pieces; `labels` [T], each piece's successor where that is of an answer, else `IGNORE`.

    Raises:
        FwError: no template, or a conversation that it refuses, with its file and line.
    """
    _check(max_length)
    chat, texts, cut, cut_texts = Chat(tokenizer), [], 0, 0
    for number, one in enumerate(conversations):
        try:
            ids, learnt = chat.example(one.messages)
        except FwError as error:
            raise FwError(f"{one.source or 'conversation'}: {error}") from error
        following = np.full(len(ids), IGNORE, np.int32)
        following[:-1] = np.where(learnt[1:], ids[1:], IGNORE)
        texts.append((number, ids[:max_length], following[:max_length]))
        cut += max(len(ids) - max_length, 0)
        cut_texts += len(ids) > max_length
    encoded = _encoded(tokenizer, texts, len(conversations))
    return replace(encoded, cut=cut, cut_texts=cut_texts)


def pack_words(encoded: Encoded, length: int, *, packed: bool = True) -> Packed:
    """Rows for a language model: `pack`, with the labels as `targets`.

    Args:
        encoded: from `encode_documents` or `encode_conversations`.
        length: L, tokens a row holds.
        packed: several texts a row; off: one.

    Returns:
        arrays `input_ids`, `segment_ids`, `position_ids` and `targets`, int32 [R, L].
    """
    rows = pack(encoded, length, max_texts=length, packed=packed)
    arrays, empty = dict(rows.arrays), dict(rows.empty)
    arrays["targets"], empty["targets"] = arrays.pop("labels"), empty.pop("labels")
    return replace(rows, arrays=arrays, empty=empty)


def _check(max_length: int) -> None:
    if max_length < 1:
        raise FwError(f"max_length: expected 1 or more; got {max_length}")


def _encoded(tokenizer: Tokenizer, texts: list, records: int) -> Encoded:
    ids, labels = array("i"), array("i")
    for _, own, following in texts:
        ids.extend(own)
        labels.extend(following)
    lengths = np.array([len(own) for _, own, _ in texts], np.int64)
    return Encoded(
        input_ids=np.array(ids, np.int32),
        words=np.full(len(ids), -1, np.int32),
        labels=np.array(labels, np.int32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        record=np.array([number for number, _, _ in texts], np.int32),
        records=records,
        pad=tokenizer.pad,
        per_word=True,
    )


def _objects(path: str | Path, on_bad_row: OnBadRow) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            refuse(f"{where}: expected a JSON object; {error}", on_bad_row)
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            refuse(f"{where}: expected a JSON object; got {line[:200]}", on_bad_row)
