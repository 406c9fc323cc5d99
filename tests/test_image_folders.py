"""fw.data.image_folders and pixel_tables: the usual layouts, and what strange ones are told."""

import gzip
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fw.data import SPLITS, hold_out, label_names
from fw.data.image_folders import encode_pictures, load_pictures, read_listed
from fw.data.pictures import Decoded, decode
from fw.data.pixel_tables import read_digits, read_idx
from fw.data.preprocess import Preprocessor
from fw.data.records import Picture
from fw.errors import FwError
from fw.labels import IGNORE

FASHION = Path(__file__).parents[2] / "shared" / "data" / "fashion_mnist"
seeded = settings(derandomize=True, deadline=None, max_examples=60)
SMALL = Preprocessor((4, 5))


def write(path, shade=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade % 256, shade // 256, 0)).save(path)


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def told(splits):
    return {
        split: [(p.label, int(decode(p.image)[0, 0, 0])) for p in part]
        for split, part in splits.items()
    }


# Folders --------------------------------------------------------------------------------------


def test_a_folder_for_each_split_and_class(tmp_path):
    for shade, name in enumerate(
        ("train/dog/1.png", "train/dog/more/2.png", "train/train/1.PNG", "valid/dog/9.png",
         "test/cat/1.png", ".cache/dog/1.png", "train/.hidden/1.png", "cover.png")
    ):  # fmt: skip
        write(tmp_path / name, shade)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no picture")
    assert told(load_pictures(tmp_path)) == {
        "train": [("dog", 0), ("dog", 1), ("train", 2)],
        "dev": [("dog", 3)],
        "test": [("cat", 4)],
    }
    write(tmp_path / "bird" / "1.png")
    with pytest.raises(FwError, match=r"expected folders of classes, or of splits .*bird/1\.png"):
        load_pictures(tmp_path)


def test_without_splits_the_bytes_decide_and_copies_stay_together(tmp_path):
    for i in range(300):
        for copy in "ab":
            write(tmp_path / f"class{i % 3}" / f"{copy}{i}.png", i)
    splits = load_pictures(tmp_path)
    assert list(splits) == list(SPLITS) and sum(map(len, splits.values())) == 600
    digests = [{p.text for p in part} for part in splits.values()]
    assert len(set.union(*digests)) == sum(map(len, digests)) == 300
    assert all(10 < len(d) < 55 for d in digests[1:])  # a tenth: 30 ± 5 standard deviations
    assert label_names(splits["train"]) == ("class0", "class1", "class2")
    # Pixels in memory have a digest, too, and a picture is found again by it.
    pixels = [Picture(np.full((2, 2), i % 250, np.uint8), "a") for i in range(500)]
    train, dev = hold_out(pixels)
    assert len(train) + len(dev) == 500 and not {p.text for p in train} & {p.text for p in dev}


# Tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_name_files_beside_them(tmp_path, suffix):
    for i in range(4):
        write(tmp_path / "pictures" / f"{i}.png", i)
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        rows = [(f"pictures/{i}.png", f"class{i % 2}") for i in numbers]
        mark = "\t" if suffix == ".tsv" else ","
        text = "\n".join(mark.join(row) for row in [("image", "label"), *rows])
        if suffix == ".jsonl":
            text = "\n".join(json.dumps({"image": a, "label": b}) for a, b in rows)
        (tmp_path / f"{split}{suffix}").write_text(text)
    assert told(load_pictures(tmp_path)) == {
        "train": [("class0", 0), ("class1", 1)],
        "dev": [("class0", 2)],
        "test": [("class1", 3)],
    }
    one = load_pictures(tmp_path / f"train{suffix}")
    assert sorted(p.label for part in one.values() for p in part) == ["class0", "class1"]


OUTSIDE = (
    "../secret.png",
    "/etc/passwd",
    "link/secret.png",
    "loop",
    "gone.png",
    "",
    "a\0b",
    "x" * 5000,
    "..",
)


def test_a_table_leads_nowhere_else(tmp_path):
    folder = tmp_path / "data"
    write(tmp_path / "secret.png")
    write(folder / "good.png")
    (folder / "link").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    (folder / "inside.png").symlink_to("good.png")
    path, bad = folder / "train.jsonl", []
    names = [*OUTSIDE, "good.png", "inside.png"]
    path.write_text("\n".join(json.dumps({"image": name, "label": 1}) for name in names))
    pictures = read_listed(path, on_bad_row=bad.append)
    assert [Path(str(p.image)).name for p in pictures] == ["good.png", "inside.png"]
    assert len(bad) == len(OUTSIDE)
    assert {m.split(" ")[0] for m in bad} == {f"{path}:{i + 1}:" for i in range(len(OUTSIDE))}
    path.write_text(json.dumps({"image": OUTSIDE[0], "label": 1}))
    with pytest.raises(FwError, match=r"train\.jsonl:1: .*'\.\./secret\.png' lies outside"):
        read_listed(path)
    # A table in a folder of its own may name files of the whole data set, and no others.
    write(folder / "pictures" / "1.png")
    (folder / "lists").mkdir()
    (folder / "lists" / "train.csv").write_text("image,label\n../pictures/1.png,a\n")
    path.unlink()
    assert len(load_pictures(folder)["train"]) == 1


# Numbers --------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@seeded
@given(shapes, st.booleans(), st.integers(0, 255))
def test_idx_round_trip(tmp_path_factory, shape, squeezed, first):
    array = (np.arange(math.prod(shape)) + first).astype(np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / "a"
    path.write_bytes(gzip.compress(idx(array)) if squeezed else idx(array))
    np.testing.assert_array_equal(read_idx(path), array)


@seeded
@given(shapes, st.booleans(), st.data())
def test_damaged_idx_is_refused_by_name_or_read(tmp_path_factory, shape, squeezed, data):
    file = idx(np.zeros(shape, np.uint8))
    damaged = bytearray(gzip.compress(file, 1, mtime=0) if squeezed else file)
    where = st.integers(0, len(damaged) - 1)
    for at, byte in data.draw(st.dictionaries(where, st.integers(0, 255), max_size=3)).items():
        damaged[at] = byte
    path = tmp_path_factory.mktemp("idx") / "a"
    path.write_bytes(damaged[: data.draw(where) + 1] if data.draw(st.booleans()) else damaged)
    try:
        read_idx(path)
    except FwError as error:
        assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "expected an IDX file of bytes"),
        (idx(np.zeros(3, np.uint8)) + b"x", "expected 3 bytes, .* it has more"),
        (idx(np.zeros(3, np.uint8))[:-1], "expected 3 bytes, .* it has 2"),
        (gzip.compress(idx(np.zeros(3, np.uint8))[:-1], mtime=0), "expected 3 bytes, .* it has 2"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "more than the file can hold"),
        (gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12, mtime=0), "more than the file can hold"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), "expected an IDX file of bytes"),
        (gzip.compress(idx(np.zeros(3, np.uint8)), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_hostile_idx(tmp_path, file, message):
    (tmp_path / "a").write_bytes(file)
    with pytest.raises(FwError, match=f"a: .*{message}"):
        read_idx(tmp_path / "a")


def test_a_folder_of_idx_files(tmp_path):
    pixels = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)
    for split, end in (("train", ".gz"), ("t10k", "")):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(5, dtype=np.uint8))):
            file = gzip.compress(idx(array)) if end else idx(array)
            (tmp_path / f"{split}-{kind}-ubyte{end}").write_bytes(file)
    splits = load_pictures(tmp_path)
    assert list(splits) == ["train", "test"]
    assert [p.label for p in splits["test"]] == list("01234")
    assert all((p.image == pixels[i]).all() for i, p in enumerate(splits["train"]))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(4, np.uint8)))
    with pytest.raises(FwError, match="expected 5 labels"):
        load_pictures(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FwError, match=r"expected train-labels-idx1-ubyte\.gz beside it"):
        load_pictures(tmp_path)


def test_the_digits_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    table = np.column_stack([digits.data, digits.target]).astype(int)
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, r)) for r in table).encode()))
    pictures = read_digits(path)
    assert [int(p.label) for p in pictures] == digits.target.tolist()
    images = np.stack([np.asarray(p.image) for p in pictures])
    np.testing.assert_allclose(images, digits.images * 255 / 16, atol=0.5)
    assert sum(map(len, load_pictures(tmp_path).values())) == 1797
    for line in ("1,2", ",".join(["17"] + ["0"] * 64), ",".join(["x"] * 65)):
        path.write_bytes(gzip.compress(line.encode()))
        with pytest.raises(FwError, match=r"digits\.csv\.gz:1: expected"):
            read_digits(path)
    path.write_bytes(gzip.compress(b"1," * 10**6))
    with pytest.raises(FwError, match=r"digits\.csv\.gz:1: expected a line of under"):
        read_digits(path)


def test_fashion_mnist():
    if not FASHION.is_dir():
        pytest.skip(f"needs {FASHION}, real data that is not part of the project")
    splits = load_pictures(FASHION)
    assert {split: len(part) for split, part in splits.items()} == {"train": 60000, "test": 10000}
    assert np.bincount([int(p.label) for p in splits["test"]]).tolist() == [1000] * 10


# What there is not ----------------------------------------------------------------------------


def test_what_is_no_data_set_is_told_what_is(tmp_path):
    for path, message in (
        (tmp_path, "expected pictures to train on: train/CLASS/NAME.jpg"),
        (tmp_path / "none", "expected a folder of pictures, a table"),
    ):
        with pytest.raises(FwError, match=message):
            load_pictures(path)
    write(tmp_path / "test" / "dog" / "1.png")
    with pytest.raises(FwError, match=r"to train on.*found test"):
        load_pictures(tmp_path)
    (tmp_path / "train.csv").write_text("image,label\ntest/dog/1.png,a\n")
    (tmp_path / "train2.csv").write_text("image,label\ntest/dog/1.png,a\n")
    with pytest.raises(FwError, match=r"one train file; found train\.csv and train2\.csv"):
        load_pictures(tmp_path)


# Rows -----------------------------------------------------------------------------------------


def test_pictures_become_rows_in_memory_or_as_they_are_asked_for(tmp_path):
    records, bad = [], []
    for i in range(40):
        write(tmp_path / f"{i}.png", i)
        records.append(Picture(tmp_path / f"{i}.png", "ab"[i % 2]))
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "8.png").unlink()
    with pytest.raises(FwError, match=r"3\.png: expected a picture"):
        encode_pictures(SMALL, records, ("a", "b"))
    rows = encode_pictures(SMALL, records, ("a", "b"), on_bad=bad.append)
    assert [Path(m.split(":")[0]).name for m in bad] == ["3.png", "8.png"]
    kept = [i for i in range(40) if i not in (3, 8)]
    assert rows.rows == 38 and rows.arrays["labels"].tolist() == [i % 2 for i in kept]
    assert rows.arrays["images"][:, 0, 0, 0].tolist() == kept
    later = encode_pictures(SMALL, records, ("a", "b"), on_bad=bad.append, held=1000)
    assert isinstance(later.arrays["images"], Decoded)
    np.testing.assert_array_equal(later.arrays["images"][:], rows.arrays["images"])
    np.testing.assert_array_equal(later.arrays["labels"], rows.arrays["labels"])

    unknown = encode_pictures(SMALL, records[:2])
    assert unknown.arrays["labels"].tolist() == [IGNORE] * 2
    with pytest.raises(FwError, match="expected a label of the training data"):
        encode_pictures(SMALL, records, ("a",))
    with pytest.raises(FwError, match="at least one; there is none, or none is good"):
        encode_pictures(SMALL, [records[3]], ("a", "b"), on_bad=bad.append)
