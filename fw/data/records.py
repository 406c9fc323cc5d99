"""Texts and pictures as frozen records: one kind for each task.

`Tagged` has a label for every word; `Labelled` one for the whole text, `MultiLabelled` any number
of them, `Rated` numbers; `Picture` one for a picture. `readers` and `image_folders` make them from
files, `splits` deals them out to training and testing, `encode` turns them into numbers. Tags are
BIO from here on, whatever the file used.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fw.data.questions import Question
from fw.errors import FwError


@dataclass(frozen=True)
class Tagged:
    """A sentence: its words and a BIO tag for each; no tags at all when they are to be predicted.

    >>> Tagged(("Ada", "wrote"), ("B-person", "O")).tags
    ('B-person', 'O')
    """

    words: tuple[str, ...]
    tags: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a sentence whose words and tags do not pair up."""
        if not self.words:
            raise FwError(f"{self.source or 'Tagged'}: expected at least one word; got none")
        if self.tags and len(self.tags) != len(self.words):
            raise FwError(
                f"{self.source or 'Tagged'}: expected a tag for each of {len(self.words)} words; "
                f"got {len(self.tags)} tags"
            )

    @property
    def text(self) -> str:
        """The words with a space between them."""
        return " ".join(self.words)


@dataclass(frozen=True)
class Labelled:
    """A text and its class; an empty label when it is to be predicted.

    >>> Labelled("Where is my card?", "card_arrival").label
    'card_arrival'
    """

    text: str
    label: str = ""
    domain: str = ""
    source: str = ""


@dataclass(frozen=True)
class MultiLabelled:
    """A text and its labels, of which it may have none; None when they are to be predicted.

    >>> MultiLabelled("Late, and broken.", ("delivery", "quality")).labels
    ('delivery', 'quality')
    """

    text: str
    labels: tuple[str, ...] | None = None
    domain: str = ""
    source: str = ""


@dataclass(frozen=True)
class Rated:
    """A text and its numbers by name; none when they are to be predicted.

    >>> Rated("It was fine.", {"valence": 1.5}).numbers
    {'valence': 1.5}
    """

    text: str
    numbers: Mapping[str, float] = MappingProxyType({})
    domain: str = ""
    source: str = ""


@dataclass(frozen=True)
class Document:
    """A text, and nothing said of it.

    >>> Document("Once upon a time").text
    'Once upon a time'
    """

    text: str
    source: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, {"role": "user", "content": "text"} each; what "assistant" says is learnt.

    >>> Conversation(({"role": "assistant", "content": "Hello"},)).text
    'Hello'
    """

    messages: tuple[Mapping[str, str], ...]
    source: str = ""

    @property
    def text(self) -> str:
        """What was said, a line a message."""
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and its class; an empty label when it is to be predicted.

    `image` is a path, or pixels: uint8 [H, W] or [H, W, C].

    >>> Picture("train/cat/1.jpg", "cat").label
    'cat'
    """

    image: str | os.PathLike[str] | np.ndarray
    label: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """A digest of the file or the pixels, for `splits`: two copies have the same.

        Raises:
            FwError: the file cannot be read.
        """
        if isinstance(self.image, np.ndarray):
            digest = hashlib.blake2b(str(self.image.shape).encode(), digest_size=16)
            digest.update(np.ascontiguousarray(self.image))
            return digest.hexdigest()
        try:
            with Path(self.image).open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise FwError(f"{self.image}: cannot be read: {error.strerror}") from error


Record = Picture | Document | Conversation | Tagged | Labelled | MultiLabelled | Rated | Question


def label_names(records: Sequence[Record]) -> tuple[str, ...]:
    """Every label the records use, in the order of the model's output classes.

    Args:
        records: all of one kind.

    Returns:
        the sorted labels; for tags "O" first, then B- and I- of every type, seen or not, so that
        a type seen only in one-word entities can still be predicted over two words; for numbers
        their names, in the order of the first record; for questions, documents and
        conversations none.

    Raises:
        FwError: a record has no label, none has one, or numbers of other names than the first.

    >>> label_names([Tagged(("Ada", "wrote"), ("B-person", "O"))])
    ('O', 'B-person', 'I-person')
    """
    if all(isinstance(record, Question | Document | Conversation) for record in records):
        return ()
    names: dict[str, None] = {}
    for record in records:
        match record:
            case Tagged():
                own = record.tags
            case Labelled() | Picture():
                own = (record.label,) if record.label else ()
            case MultiLabelled():
                own = record.labels
            case Rated():
                own = tuple(record.numbers)
            case Question() | Document() | Conversation():
                own = ()
        # A text may have none of many labels, but the others have one at least.
        if not own and not (isinstance(record, MultiLabelled) and own is not None):
            raise FwError(f"{record.source or record}: expected a label to learn from; got none")
        if isinstance(record, Rated) and names and set(own) != set(names):
            raise FwError(
                f"{record.source or record}: expected numbers for {', '.join(names)}; got "
                f"{', '.join(own)}"
            )
        names |= dict.fromkeys(own)
    if not names:
        raise FwError("records: expected a label to learn from; none has any")
    if isinstance(records[0], Rated):
        return tuple(names)
    if isinstance(records[0], Tagged):
        types = sorted({tag[2:] for tag in names} - {""})
        return ("O", *(f"{mark}-{kind}" for kind in types for mark in "BI"))
    return tuple(sorted(names))


def iob1_to_bio(tags: Sequence[str]) -> tuple[str, ...]:
    """Mark the first word of every entity with B-; tags that are BIO already stay as they are.

    In IOB1, B- only parts two touching entities of one type, and every other word of an entity
    has I-.

    Args:
        tags: the tags of one sentence.

    Returns:
        as many tags, in BIO.

    >>> iob1_to_bio(["I-ORG", "I-ORG", "B-ORG", "I-PER", "O"])
    ('B-ORG', 'I-ORG', 'B-ORG', 'B-PER', 'O')

    Source: Ramshaw and Marcus, 1995; Tjong Kim Sang and Veenstra, 1999 (the names IOB1, IOB2).
    """
    return tuple(
        f"B-{tag[2:]}" if opens_with_i(before, tag) else tag
        for before, tag in zip(("O", *tags), tags, strict=False)
    )


def opens_with_i(before: str, tag: str) -> bool:
    """Whether a tag opens an entity with I-, as IOB1 does, given the tag before it.

    >>> opens_with_i("O", "I-PER"), opens_with_i("B-PER", "I-PER")
    (True, False)
    """
    return tag.startswith("I-") and before[2:] != tag[2:]
