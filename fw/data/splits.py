"""Which text is for training, which for choosing, which for the final figure.

Published files keep their published split, found by the words train, dev (validation) and test in
their names. Where there is only one file, the text itself decides, by a hash: so the split needs
no seed, no order and no second file, and a text that occurs twice is never in two splits.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from fw.data.formats import FORMATS, Options
from fw.data.records import Document, Record
from fw.data.vader import is_vader, read_vader
from fw.errors import FwError

TASKS = tuple(FORMATS)
SPLITS = ("train", "dev", "test")

_WORDS = {
    "train": "train|training",
    "dev": "dev|devel|development|val|valid|validation",
    "test": "test|testing",
}
# Letters may not touch the word, so that "latest" and "device" are no split; digits may ("wnut17").
_IN_NAME = {split: re.compile(f"(?<![a-z])(?:{words})(?![a-z])") for split, words in _WORDS.items()}


def split_by_hash(text: str) -> str:
    """The split of a text: eight tenths train, one tenth dev, one tenth test.

    Case and spacing do not count, so that near-identical copies share a split.

    Args:
        text: any text.

    Returns:
        "train", "dev" or "test".

    >>> split_by_hash("Hello  World") == split_by_hash("hello world\\n")
    True
    """
    normal = " ".join(text.casefold().split())
    # JSON may hold half a surrogate pair, which UTF-8 proper cannot.
    data = normal.encode("utf-8", "surrogatepass")
    tenth = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") % 10
    return {0: "test", 1: "dev"}.get(tenth, "train")


def split_named(name: str) -> str | None:
    """The split whose word stands in the name of a file or folder; None for none.

    >>> split_named("dev-2.csv"), split_named("latest")
    ('dev', None)
    """
    return next((split for split in SPLITS if _IN_NAME[split].search(name.lower())), None)


def split_of(names: Sequence[str]) -> str | None:
    """The split that stands in a file's name, or else in those of the folders above it.

    Args:
        names: the parts of its path, its own name last.

    >>> split_of(("Training", "dogs.csv")), split_of(("latest.csv",))
    ('train', None)
    """
    return next(filter(None, map(split_named, reversed(names))), None)


def split_records(records: Sequence[Record]) -> dict[str, list]:
    """Give every record to the split of its text, and of one document alone its parts.

    Args:
        records: any records.

    Returns:
        {"train": [...], "dev": [...], "test": [...]}, each in the given order.

    >>> from fw.data.records import Labelled
    >>> {name: len(part) for name, part in split_records([Labelled("Hello", "a")]).items()}
    {'train': 0, 'dev': 1, 'test': 0}
    """
    splits: dict[str, list] = {name: [] for name in SPLITS}
    if alone := _alone(records):
        return _parts(alone, {"train": 8, "dev": 1, "test": 1})
    for record in records:
        splits[split_by_hash(record.text)].append(record)
    return splits


def hold_out(records: Sequence[Record]) -> tuple[list, list]:
    """Part a training set that was published without a dev set.

    Args:
        records: the training records.

    Returns:
        (train, dev): dev holds the tenth of the texts that `split_by_hash` calls "dev", or the last
        tenth of one document alone.

    >>> from fw.data.records import Labelled
    >>> train, dev = hold_out([Labelled(str(i), "a") for i in range(1000)])
    >>> len(train) + len(dev), 70 < len(dev) < 130
    (1000, True)
    """
    if alone := _alone(records):
        parts = _parts(alone, {"train": 9, "dev": 1})
        return parts["train"], parts["dev"]
    dev = [split_by_hash(record.text) == "dev" for record in records]
    return (
        [record for record, held in zip(records, dev, strict=True) if not held],
        [record for record, held in zip(records, dev, strict=True) if held],
    )


def read_records(path: str | Path, task: str, **options: Any) -> list[Any]:
    """Read one file by the reader its suffix asks for.

    Args:
        path: `.jsonl`, `.ndjson`; `.csv`, `.tsv` for whole texts; CoNLL columns for tokens.
        task: one of `TASKS`.
        options: fields of `fw.data.formats.Options`.

    Returns:
        the records in the order of the file.

    Raises:
        FwError: unknown task or suffix, no record at all, or what the reader refuses.

    >>> read_records("notes.pdf", "sequence_classification")
    Traceback (most recent call last):
    ...
    fw.errors.FwError: notes.pdf: expected .csv .tsv .jsonl .ndjson for sequence_classification
    """
    _check_task(task)
    read = FORMATS[task].readers.get(Path(path).suffix.lower())
    if read is None:
        raise FwError(f"{path}: expected {' '.join(FORMATS[task].readers)} for {task}")
    records = read(Path(path), task, Options(**options))
    if not records:
        raise FwError(f"{path}: expected at least one record for {task}; found none")
    return records


def load_splits(path: str | Path, task: str, **options: Any) -> dict[str, list]:
    """Read a data set: a folder with files for train, dev and test, or one file.

    The word of the split stands in a file's name, or in the name of a folder above it. A folder
    without a dev file gives no "dev": see `hold_out`. One file, and the folder of `read_vader`,
    are split by `split_by_hash`.

    Args:
        path: the folder or file.
        task: one of `TASKS`.
        options: fields of `fw.data.formats.Options`.

    Returns:
        the records of each split that is there.

    Raises:
        FwError: nothing there, no training file, two files for one split, or a bad row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for split in ("train", "test"):
    ...         _ = Path(folder, f"{split}.csv").write_text("text,label\\nHello,greeting\\n")
    ...     list(load_splits(folder, "sequence_classification"))
    ['train', 'test']
    """
    _check_task(task)
    path = Path(path)
    if task in ("sequence_classification", "regression") and is_vader(path):
        return split_records(read_vader(path, task, on_bad_row=Options(**options).on_bad_row))

    def read(file: Path) -> list:
        return read_records(file, task, **options)

    return load_files(path, read, FORMATS[task].readers, task)


def load_files(
    path: Path,
    read: Callable[[Path], list],
    suffixes: Collection[str],
    what: str,
    *,
    alone: bool = False,
) -> dict[str, list]:
    """`load_splits` by a reader of one's own.

    Args:
        path: the folder or file.
        read: gives the records of a file.
        suffixes: of the files that it reads.
        what: the data are for, for messages.
        alone: a folder's only file may have any name, and is split by its records.

    Raises:
        FwError: no training file, two files for one split, or what `read` refuses.
    """
    if path.is_dir() and alone:
        every = [file for file in path.rglob("*") if file.suffix.lower() in suffixes]
        if len(every) == 1 and not split_of(every[0].relative_to(path).parts):
            return split_records(read(every[0]))
    if path.is_dir():
        files = _find_files(path, suffixes, what)
        return {split: read(file) for split, file in files.items()}
    return split_records(read(path))


def _find_files(folder: Path, suffixes: Collection[str], what: str) -> dict[str, Path]:
    """The one file of each split; the file's own name is asked first, then the folders above."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        names = file.relative_to(folder).parts
        if file.suffix.lower() not in suffixes or not file.is_file():
            continue
        split = split_of(names)
        if split is None:
            continue
        if split in found:
            raise FwError(
                f"{folder}: expected one {split} file; found {found[split].name} and {file.name}; "
                "keep one, or give the path of a single file"
            )
        found[split] = file
    if "train" not in found:
        raise FwError(
            f"{folder}: expected a file for {what} with 'train' in its name "
            f"({' '.join(suffixes)}); found {', '.join(found) or 'none'}; "
            "a single file can be given by its own path"
        )
    return {split: found[split] for split in SPLITS if split in found}


def _alone(records: Sequence[Record]) -> Document | None:
    """The one record, if it is a document: a book, say."""
    [first, *others] = records or [None]
    return first if isinstance(first, Document) and not others else None


def _parts(document: Document, tenths: dict[str, int]) -> dict[str, list]:
    """A document cut at ends of lines, as near to so many tenths as these allow; none is empty."""
    text, start, share = document.text, 0, 0
    parts: dict[str, list] = {}
    for split, size in tenths.items():
        share += size
        stop = text.find("\n", len(text) * share // 10 - 1) + 1 if share < 10 else len(text)
        part = text[start : stop or len(text)]
        parts[split] = [dataclasses.replace(document, text=part)] if part.strip() else []
        start += len(part)
    return parts


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise FwError(f"task: expected one of {', '.join(TASKS)}; got {task!r}")
