"""Pictures on a disk become records by split, whichever of the usual ways they lie there.

A folder for each class (`train/dog/1.jpg`); a table or JSON lines that name each picture's file and
class; IDX files, as MNIST has them; scikit-learn's digits. The splits are found by the words in
names, as `splits` does it, and without any each picture's bytes decide.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fw.data.encode import label_id
from fw.data.files import OnBadRow, refuse
from fw.data.pictures import BAD, HELD, Decoded, read_all
from fw.data.pixel_tables import DIGITS, IDX, read_digits, read_idx_pictures
from fw.data.preprocess import Preprocessor
from fw.data.records import Picture
from fw.data.rows import Rows
from fw.data.splits import SPLITS, read_records, split_of, split_records
from fw.errors import FwError
from fw.labels import IGNORE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pbm")
"""Files of a folder that are taken for pictures; what they are is seen when they are decoded."""

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")

COLUMNS = ("image", "label")
"""The names of a table's columns, or of the keys of JSON lines."""


def load_pictures(
    path: str | Path,
    *,
    columns: tuple[str, ...] | None = None,
    on_bad_row: OnBadRow = None,
) -> dict[str, list[Picture]]:
    """Read a data set for image classification.

    Args:
        path: a folder that holds, for train and maybe dev (valid) and test: a folder of each
            split with a folder of pictures for each class, or a table for each split, or IDX files
            `train-images-idx3-ubyte.gz`, `train-labels-…` (`t10k` for test); or a folder for each
            class; or a single table, or `digits.csv.gz`.
        columns: other names for `COLUMNS`.
        on_bad_row: gets the message of each row left out; None raises instead.

    Returns:
        the pictures of each split that is there; a folder without a dev split gives none, see
        `hold_out`; what has no splits at all is dealt out by `split_by_hash`.

    Raises:
        FwError: nothing there, a bad row, two files for a split, or none to train on.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("train/cat", "train/dog", "test/dog"):
    ...         Path(folder, name).mkdir(parents=True)
    ...         Image.new("L", (2, 2)).save(Path(folder, name, "1.png"))
    ...     {split: [p.label for p in found] for split, found in load_pictures(folder).items()}
    {'train': ['cat', 'dog'], 'test': ['dog']}
    """
    path = Path(path)
    if path.name == DIGITS:
        return _dealt(read_digits(path), path)
    if path.suffix.lower() in TABLES:
        return _dealt(read_listed(path, columns=columns, on_bad_row=on_bad_row), path)
    if not path.is_dir():
        raise FwError(
            f"{path}: expected a folder of pictures, a table ({' '.join(TABLES)}) or {DIGITS}"
        )
    if (path / DIGITS).is_file():
        return _dealt(read_digits(path / DIGITS), path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = {file: file.relative_to(path).parts for file in files}
    files = [file for file in files if not any(part.startswith(".") for part in names[file])]
    idx = [file for file in files if file.name.endswith(IDX) and "images" in file.name]
    if idx:
        return {
            split: read_idx_pictures(file, _labels_of(file))
            for split, file in _one_each(path, idx, names).items()
        }
    tables = [f for f in files if f.suffix.lower() in TABLES and split_of(names[f])]
    if tables:
        return {
            split: read_listed(file, path, columns=columns, on_bad_row=on_bad_row)
            for split, file in _one_each(path, tables, names).items()
        }
    return _by_class(path, [file for file in files if file.suffix.lower() in SUFFIXES])


def read_listed(
    path: str | Path,
    folder: str | Path | None = None,
    *,
    columns: tuple[str, ...] | None = None,
    on_bad_row: OnBadRow = None,
) -> list[Picture]:
    """Read a table or JSON lines with the file and the class of each picture.

    Args:
        path: `.csv`, `.tsv`, `.jsonl` or `.ndjson`; files are named relative to it.
        folder: that no file may lie outside of, links followed; the table's own, if None.
        columns: other names for `COLUMNS`.
        on_bad_row: gets the message of each row left out; None raises instead.

    Raises:
        FwError: a row that `read_table` refuses, or a file that is not there or lies outside.
    """
    path = Path(path)
    inside = Path(folder or path.parent).resolve()
    rows = read_records(
        path, "sequence_classification", columns=columns or COLUMNS, on_bad_row=on_bad_row
    )
    pictures = []
    for row in rows:
        if why := _not_inside(path.parent, row.text, inside):
            refuse(f"{row.source}: {why}", on_bad_row)
        else:
            pictures.append(Picture(path.parent / row.text, row.label, row.source))
    if not pictures:
        raise FwError(f"{path}: expected at least one picture; found none")
    return pictures


def encode_pictures(
    preprocessor: Preprocessor,
    records: Sequence[Picture],
    names: Sequence[str] | None = None,
    *,
    on_bad: OnBadRow = None,
    most: float = BAD,
    held: int = HELD,
) -> Rows:
    """Make pictures of one size: every one is decoded once, in threads, and so is known to be good.

    Args:
        preprocessor: whose `shape` they get.
        records: the pictures.
        names: the labels, in the order of the model's classes; None to leave all `IGNORE`.
        on_bad: gets the message of each picture left out; None raises instead.
        most: the share of pictures that may be left out.
        held: bytes kept in memory. A larger data set is decoded again as it is asked for: see
            `Decoded`.

    Returns:
        `images` uint8 [R, H, W, C] and `labels` int32 [R].

    Raises:
        FwError: a bad picture, more than may be or nothing but bad ones; a label that is not in
            `names`.

    >>> record = Picture(np.zeros((9, 9), np.uint8), "b")
    >>> rows = encode_pictures(Preprocessor((2, 2)), [record], ("a", "b"))
    >>> rows.arrays["images"].shape, rows.arrays["labels"]
    ((1, 2, 2, 3), array([1], dtype=int32))
    """
    labels = np.full(len(records), IGNORE, np.int32)
    if names is not None:
        ids = {name: i for i, name in enumerate(names)}
        labels[:] = [label_id(record.label, record, ids) for record in records]
    shape, sources = preprocessor.shape, [record.image for record in records]
    fits = len(records) * int(np.prod(shape)) <= held
    images: Any = np.empty((len(records) if fits else 0, *shape), np.uint8)
    kept = []
    for at, pixels in read_all(sources, preprocessor.pixels, on_bad=on_bad, most=most):
        if fits:
            images[len(kept)] = pixels
        kept.append(at)
    if not kept:
        raise FwError("pictures: expected at least one; there is none, or none is good")
    if fits:
        images = images[: len(kept)]
    else:
        images = Decoded([sources[at] for at in kept], preprocessor.pixels, shape, held)
    return Rows({"images": images, "labels": labels[kept]}, {"images": 0, "labels": IGNORE})


def _by_class(folder: Path, files: Sequence[Path]) -> dict[str, list[Picture]]:
    """By the folder that a picture lies in, below that of its split."""
    found: dict[str, list[Picture]] = {}
    for file in files:
        first, *others = file.relative_to(folder).parts[:-1] or ("",)
        split = split_of((first,)) if others else None
        label = others[0] if split else first
        if label:
            found.setdefault(split or "", []).append(Picture(file, label, str(file)))
    alone = found.pop("", [])
    if alone and found:
        raise FwError(
            f"{folder}: expected folders of classes, or of splits with folders of classes; found "
            f"both: {', '.join(found)} and {alone[0].source}"
        )
    return _dealt(alone, folder) if alone else _with_train(folder, found)


def _one_each(
    folder: Path, files: Sequence[Path], names: dict[Path, tuple[str, ...]]
) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        split = "test" if file.name.startswith("t10k") else split_of(names[file])
        if split in found:
            raise FwError(
                f"{folder}: expected one {split} file; found {found[split].name} and {file.name}"
            )
        if split:
            found[split] = file
    return _with_train(folder, found)


def _with_train[T](folder: Path, found: dict[str, T]) -> dict[str, T]:
    if "train" not in found:
        raise FwError(
            f"{folder}: expected pictures to train on: train/CLASS/NAME.jpg, CLASS/NAME.jpg, a "
            f"table with 'train' in its name, or train-images-idx3-ubyte.gz; found "
            f"{', '.join(found) or 'none'}"
        )
    return {split: found[split] for split in SPLITS if split in found}


def _dealt(pictures: list[Picture], path: Path) -> dict[str, list[Picture]]:
    if not pictures:
        raise FwError(f"{path}: expected at least one picture; found none")
    return {split: part for split, part in split_records(pictures).items() if part}


def _labels_of(images: Path) -> Path:
    name = images.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    for other in (name, name.removesuffix(".gz"), f"{name}.gz"):
        if (images.parent / other).is_file():
            return images.parent / other
    raise FwError(f"{images}: expected {name} beside it; it is missing")


def _not_inside(folder: Path, name: str, inside: Path) -> str:
    """What is wrong with the name of a file in a table; nothing if it lies where it should."""
    try:
        file = (folder / name).resolve()
        if not file.is_relative_to(inside):
            return f"expected a file in {inside}; {name[:200]!r} lies outside"
        return "" if file.is_file() else f"expected a file; {name[:200]!r} is not there"
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links, a name too long
        return f"expected a file; {name[:200]!r} cannot be one"
