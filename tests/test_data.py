"""fw.data against small independent references, on random data and on the real files."""

import itertools
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fw.data import (
    IGNORE,
    SPLITS,
    Batches,
    Encoded,
    Labelled,
    Tagged,
    best_fit_decreasing,
    count_tokens,
    encode_labelled,
    encode_tagged,
    eval_batches,
    feed,
    hold_out,
    iob1_to_bio,
    label_names,
    load_splits,
    load_tokenizer,
    pack,
    prefetch,
    read_conll,
    read_json_lines,
    read_records,
    read_table,
    read_vader,
    split_by_hash,
    unpack_texts,
    unpack_words,
)
from fw.errors import FwError
from sharding import make_mesh, rules

DATA = Path(__file__).parents[2] / "shared" / "data"
TOKENS, SEQUENCES = "token_classification", "sequence_classification"
NAMES = ("O", "B-a", "I-a", "B-b", "I-b")

seeded = settings(derandomize=True, deadline=None, max_examples=60)


# Records and readers --------------------------------------------------------------------------


@st.composite
def bio_tags(draw, length):
    """Valid BIO, and the same in IOB1 by its definition: B- only to part equal neighbours."""
    kinds = draw(st.lists(st.sampled_from(["O", "a", "b"]), min_size=length, max_size=length))
    joined = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    bio, iob1 = [], []
    for i, kind in enumerate(kinds):
        same = i > 0 and kinds[i - 1] == kind
        if kind == "O":
            bio.append("O")
            iob1.append("O")
        else:
            bio.append(f"{'I' if same and joined[i] else 'B'}-{kind}")
            iob1.append(f"{'B' if same and not joined[i] else 'I'}-{kind}")
    return tuple(bio), tuple(iob1)


WORD = st.text(
    st.characters(codec="utf-8", exclude_characters=" \t\r\n\ufeff"), min_size=1, max_size=6
)


@st.composite
def sentences(draw):
    found = []
    for words in draw(st.lists(st.lists(WORD, min_size=1, max_size=6), min_size=1, max_size=5)):
        found.append((tuple(words), *draw(bio_tags(len(words)))))
    return found


@seeded
@given(sentences(), st.sampled_from(["\t", " ", "  "]), st.sampled_from(["\n", "\r\n"]), st.data())
def test_conll_round_trip(tmp_path_factory, rows, gap, end, data):
    scheme = data.draw(st.sampled_from(["bio", "iob1"]))
    declared = data.draw(st.sampled_from(["auto", scheme]))
    bom, middle = data.draw(st.sampled_from(["", "\ufeff"])), data.draw(st.booleans())
    gap = f"{gap}x{gap}" if middle else gap
    text = f"-DOCSTART-{gap}O{end}{end}"
    for words, bio, iob1 in rows:
        tags = bio if scheme == "bio" else iob1
        text += "".join(f"{w}{gap}{t}{end}" for w, t in zip(words, tags, strict=True)) + end
    path = tmp_path_factory.mktemp("conll") / "a.conll"
    path.write_bytes((bom + text).encode())

    records = read_conll(path, scheme=declared)
    assert [(r.words, r.tags) for r in records] == [(words, bio) for words, bio, _ in rows]
    assert records[0].source == f"{path}:3"


@seeded
@given(st.integers(1, 12).flatmap(bio_tags))
def test_iob1_becomes_bio_and_bio_stays(tags):
    bio, iob1 = tags
    assert iob1_to_bio(iob1) == bio == iob1_to_bio(bio)


BAD_ROWS = {
    "no tag": ("a.conll", "Ada B-x\n\nAda\nx O\n\ny O\n", ":3: expected a word and a tag", 2),
    "no word": ("a.conll", "\tO\n\ny\tO\n", ":1: expected a word and a tag", 1),
    "columns": ("a.conll", "Ada N O\nwas O\n\ny N O\n", ":2: expected 3 columns as in line 1", 1),
    "tag": ("a.conll", "Ada PER\n\ny O\n", ":1: expected O, B-type or I-type .* got 'PER'", 1),
    "cells": ("a.csv", "text,label\nx\ny,1\n", ":2: expected 2 cells; got 1", 1),
    "no label": ("a.csv", 'text,label\n"a\nb",1\nx,\n', ":4: expected a text and a label", 1),
    "quote": ("a.csv", 'text,label\n"a"b,1\ny,1\n', ":2: expected a row of separated values", 1),
    "no text": ("a.tsv", "text\tlabel\n \t1\ny\t1\n", ":2: expected a text and a label", 1),
    "json": ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', ":2: expected a JSON object", 1),
    "not an object": ("a.jsonl", '[1]\n{"text": "a", "label": "b"}', ":1: expected {", 1),
    "label's type": (
        "a.jsonl",
        '{"text": "a", "label": true}\n{"text": "a", "label": 1}',
        ":1:",
        1,
    ),
    "lengths": (
        "b.jsonl",
        '{"tokens": ["a"], "tags": []}\n{"tokens": ["a"], "tags": ["O"]}',
        ":1",
        1,
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_by_line_or_counted(tmp_path, case):
    name, text, message, good = BAD_ROWS[case]
    task = TOKENS if name in ("a.conll", "b.jsonl") else SEQUENCES
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(FwError, match=re.escape(str(path)) + message):
        read_records(path, task)
    bad = []
    assert len(read_records(path, task, on_bad_row=bad.append)) == good
    assert len(bad) == 1 and re.search(message, bad[0])


def test_a_file_of_two_schemes_must_be_declared(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("Ada B-x\n\nBob I-x\n")
    with pytest.raises(FwError, match=r"a\.conll:3: .*BIO at line 1; declare scheme"):
        read_conll(path)
    with pytest.raises(FwError, match=r"a\.conll:3: expected B-x"):
        read_conll(path, scheme="bio")
    assert [r.tags for r in read_conll(path, scheme="iob1")] == [("B-x",), ("B-x",)]


def test_bytes_that_are_not_utf8_name_their_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nok,1\ncaf\xe9,2\n".encode("latin1"))
    with pytest.raises(FwError, match=r"a\.csv:3: expected UTF-8; got byte 0xe9"):
        read_table(path)


def test_tables_and_json_lines(tmp_path):
    table = tmp_path / "a.csv"
    table.write_bytes('\ufefftext,intent\r\n"one, ""two""\nthree",x\r\nfour,y\r\n'.encode())
    assert read_table(table) == [
        Labelled('one, "two"\nthree', "x", source=f"{table}:2"),
        Labelled("four", "y", source=f"{table}:4"),
    ]
    tabs = tmp_path / "a.tsv"
    tabs.write_text('id\tbody\tkind\n1\t"open quote\tx\n')
    assert read_table(tabs, columns=("body", "kind"))[0].text == '"open quote'
    with pytest.raises(FwError, match="one column named 'text'; got id, body, kind"):
        read_table(tabs)
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"t": ["Ada"], "g": ["I-x"]}\n\n')
    read = read_json_lines(lines, TOKENS, columns=("t", "g"))
    assert read == [Tagged(("Ada",), ("B-x",), f"{lines}:1")]


def test_label_names():
    records = [Tagged(("a", "b"), ("B-y", "O")), Tagged(("a",), ("B-x",))]
    assert label_names(records) == ("O", "B-x", "I-x", "B-y", "I-y")
    assert label_names([Labelled("a", "y"), Labelled("b", "x")]) == ("x", "y")
    with pytest.raises(FwError, match="expected a label"):
        label_names([Labelled("a")])


# Splits ---------------------------------------------------------------------------------------


def test_one_file_is_split_by_its_texts(tmp_path):
    texts = [f"text number {i % 600}" for i in range(1000)]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(json.dumps({"text": t.upper(), "label": 1}) for t in texts))
    splits = load_splits(path, SEQUENCES)
    parts = [{r.text for r in splits[name]} for name in SPLITS]
    assert sum(map(len, splits.values())) == 1000 and sum(map(len, parts)) == 600
    assert len(set.union(*parts)) == 600
    # Binomial, n = 600: five standard deviations around a tenth.
    assert all(23 < len(part) < 97 for part in parts[1:])
    assert all(
        split_by_hash(t.lower()) == name for name in SPLITS for t in parts[SPLITS.index(name)]
    )
    train, dev = hold_out(splits["train"] + splits["dev"])
    assert train == splits["train"] and dev == splits["dev"]


def test_a_folder_is_split_by_its_names(tmp_path):
    def write(name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text,label\na,b\n")

    for name in ("latest.csv", "device.csv", "train/x.csv", "my-validation.csv", "notes.md"):
        write(name)
    splits = load_splits(tmp_path, SEQUENCES)
    assert {k: Path(v[0].source).name for k, v in splits.items()} == {
        "train": "x.csv:2",
        "dev": "my-validation.csv:2",
    }
    with pytest.raises(FwError, match="expected a file for token_classification"):
        load_splits(tmp_path, TOKENS)
    write("train2.csv")
    with pytest.raises(FwError, match=r"one train file; found x\.csv and train2\.csv"):
        load_splits(tmp_path, SEQUENCES)
    with pytest.raises(FwError, match="task: expected one of"):
        load_splits(tmp_path, "ner")


def test_vader(tmp_path):
    folder = tmp_path / "hutto_ICWSM_2014"
    folder.mkdir()
    for i, stem in enumerate(("tweets", "amazonReviewSnippets", "movieReviewSnippets")):
        (folder / f"{stem}_GroundTruth.txt").write_bytes(f"1\t{i - 1}.5\té {stem}\r\n".encode())
    with pytest.raises(FwError, match=r"nytEditorialSnippets_GroundTruth\.txt: missing; unpack"):
        read_vader(tmp_path)
    (folder / "nytEditorialSnippets_GroundTruth.txt").write_text("1\t4.5\ttoo good")
    with pytest.raises(FwError, match=r"nytEditorial.*:1: expected an id, a mean rating in -4…4"):
        read_vader(folder)
    bad = []
    records: Any = read_vader(tmp_path, on_bad_row=bad.append)
    assert len(bad) == 1
    assert [(r.domain, r.label, r.text) for r in records] == [
        ("tweets", "negative", "é tweets"),
        ("products", "neutral", "é amazonReviewSnippets"),
        ("films", "positive", "é movieReviewSnippets"),
    ]
    splits = load_splits(folder, SEQUENCES, on_bad_row=bad.append)
    assert sorted(itertools.chain(*splits.values()), key=records.index) == records


REAL = {
    "wnut17": (TOKENS, (3394, 1009, 1287), (1975, 836, 1079), 13),
    "wikigold/CONLL-format/data/wikigold.conll.txt": (TOKENS, 1696, 3558, 9),
    "sec_filings": (TOKENS, (1164, 0, 303), None, 9),
    "banking77": (SEQUENCES, (10003, 0, 3080), None, 77),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    task, sizes, entities, labels = REAL[name]
    if not (DATA / name).exists():
        pytest.skip(f"needs {DATA / name}, real data that is not part of the project")
    splits = load_splits(DATA / name, task)
    assert len(label_names(splits["train"])) == labels
    found = [len(splits.get(split, ())) for split in SPLITS]
    assert (tuple(found) if isinstance(sizes, tuple) else sum(found)) == sizes
    if entities:
        opened = [sum(tag[0] == "B" for r in splits[split] for tag in r.tags) for split in SPLITS]
        assert (tuple(opened) if isinstance(entities, tuple) else sum(opened)) == entities


# Tokens ---------------------------------------------------------------------------------------

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ab", "##ab", "##a", "a", "b", "##b", "c", "##c"]


def write_vocabulary(folder, **config):
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_vocabulary(tmp_path_factory.mktemp("tokenizer")))


def pieces(word):
    """WordPiece by its definition: the longest known piece first, or unknown for the whole."""
    found, rest = [], word.lower()
    while rest:
        mark = "##" if found else ""
        size = next((n for n in range(len(rest), 0, -1) if mark + rest[:n] in VOCABULARY), 0)
        if not size:
            return [VOCABULARY.index("[UNK]")]
        found.append(VOCABULARY.index(mark + rest[:size]))
        rest = rest[size:]
    return found or [VOCABULARY.index("[UNK]")]


def cut(encoded, values):
    return [values[a:b].tolist() for a, b in itertools.pairwise(encoded.offsets)]


@st.composite
def tagged(draw):
    # A zero-width joiner has no piece of its own; z is unknown; capitals are lowered.
    word = st.one_of(st.text("abcAz", min_size=1, max_size=7), st.just("\u200d"))
    words = draw(st.lists(word, min_size=1, max_size=9))
    tags = draw(st.lists(st.sampled_from(NAMES), min_size=len(words), max_size=len(words)))
    return Tagged(tuple(words), tuple(tags))


@seeded
@given(st.lists(tagged(), min_size=1, max_size=6), st.integers(4, 20))
def test_every_word_is_labelled_once_at_its_first_piece(tokenizer, records, max_length):
    encoded = encode_tagged(tokenizer, records, NAMES, max_length=max_length)
    read = [([], [], []) for _ in records]
    for owner, ids, words, labels in zip(
        encoded.record,
        *(cut(encoded, v) for v in (encoded.input_ids, encoded.words, encoded.labels)),
        strict=True,
    ):
        assert 3 <= len(ids) <= max_length
        assert (ids[0], ids[-1]) == (2, 3)
        assert words[0] == words[-1] == labels[0] == labels[-1] == -1
        assert labels[1] != IGNORE, "a text begins with a word, never inside one"
        for whole, part in zip(read[owner], (ids, words, labels), strict=True):
            whole.extend(part[1:-1])

    lost = 0
    for record, (ids, words, labels) in zip(records, read, strict=True):
        expected = []
        for number, (word, tag) in enumerate(zip(record.words, record.tags, strict=True)):
            kept = pieces(word.replace("\u200d", ""))
            lost += max(len(kept) - (max_length - 2), 0)
            for i, piece in enumerate(kept[: max_length - 2]):
                expected.append((piece, number, NAMES.index(tag) if i == 0 else IGNORE))
        assert list(zip(ids, words, labels, strict=True)) == expected
    assert encoded.cut == lost

    unlabelled = encode_tagged(tokenizer, records, max_length=max_length)
    assert (unlabelled.labels == IGNORE).all()
    np.testing.assert_array_equal(unlabelled.words, encoded.words)


@seeded
@given(st.lists(st.lists(st.text("abcz", min_size=1, max_size=5)), min_size=1), st.integers(3, 9))
def test_long_texts_are_cut_and_counted(tokenizer, texts, max_length):
    records = [Labelled(" ".join(words), NAMES[len(words) % 5]) for words in texts]
    encoded = encode_labelled(tokenizer, records, NAMES, max_length=max_length)
    whole = [[p for word in words for p in pieces(word)] for words in texts]
    room = max_length - 2
    assert cut(encoded, encoded.input_ids) == [[2, *ids[:room], 3] for ids in whole]
    assert encoded.labels.tolist() == [len(words) % 5 for words in texts]
    assert encoded.cut == sum(max(len(ids) - room, 0) for ids in whole)
    assert encoded.cut_texts == sum(len(ids) > room for ids in whole)


def test_tokenizer_files(tmp_path, tokenizer):
    records = [Labelled("ab [SEP] cab AB"), Labelled("a")]
    expected = encode_labelled(tokenizer, records, max_length=64).input_ids
    # The brackets and the letters between them are unknown one by one: nothing forged a separator.
    assert (expected == 3).sum() == 2

    fast = tokenizers.Tokenizer.from_str(tokenizer.fast.to_str())
    fast.enable_padding(length=32)
    fast.enable_truncation(3)
    fast.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    fast.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.prefix, loaded.suffix, loaded.pad, loaded.unknown) == ((2,), (3,), 0, 1)
    np.testing.assert_array_equal(
        encode_labelled(loaded, records, max_length=64).input_ids, expected
    )

    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FwError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FwError, match=r"expected tokenizer\.json or vocab\.txt"):
        load_tokenizer(tmp_path)
    cased = load_tokenizer(write_vocabulary(tmp_path, do_lower_case=False))
    assert cased.fast.encode("AB ab").ids == [2, 1, 4, 3]


def test_unknown_labels_and_short_rows_are_refused(tokenizer):
    record = Tagged(("a",), ("B-z",), source="a.conll:7")
    with pytest.raises(FwError, match=r"a\.conll:7: expected a label .*\(O, B-a, .*got 'B-z'"):
        encode_tagged(tokenizer, [record], NAMES, max_length=8)
    with pytest.raises(FwError, match="more than the 2 special tokens; got 2"):
        encode_labelled(tokenizer, [Labelled("a")], max_length=2)


# Rows -----------------------------------------------------------------------------------------


def random_texts(seed, sizes, per_word):
    """Texts of the given lengths, every token different, some records over several texts."""
    random = np.random.default_rng(seed)
    sizes = np.asarray(sizes, np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    total = int(offsets[-1])
    record = np.cumsum(random.random(len(sizes)) < 0.7 if per_word else np.ones(len(sizes)))
    record = (record - record[:1]).astype(np.int32)
    words = np.full(total, -1, np.int32)
    if per_word:
        words = np.cumsum(random.random(total) < 0.6).astype(np.int32)
        if seed % 2:
            words[offsets[:-1]] = -1  # [CLS], which not every tokenizer has
    labels = random.integers(0, 5, total if per_word else len(sizes)).astype(np.int32)
    ids = np.arange(1, total + 1, dtype=np.int32)
    records = int(record[-1]) + 1
    return Encoded(ids, words, labels, offsets, record, records, pad=0, per_word=per_word)


@seeded
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(2, 16), min_size=1, max_size=40),
    length=st.integers(16, 40),
    max_texts=st.integers(1, 5),
    packed=st.booleans(),
    per_word=st.booleans(),
)
def test_rows_hold_every_token_once(*, seed, sizes, length, max_texts, packed, per_word):
    encoded = random_texts(seed, sizes, per_word)
    rows = pack(encoded, length, max_texts=max_texts, packed=packed)
    slots = max_texts if packed else 1
    ids, segments, positions = (
        rows.arrays[name] for name in ("input_ids", "segment_ids", "position_ids")
    )
    assert all(a.dtype == np.int32 and len(a) == rows.rows for a in rows.arrays.values())
    assert ids.shape == (rows.rows, length)
    assert rows.efficiency == sum(sizes) / ids.size

    texts = cut(encoded, encoded.input_ids)
    seen = []
    for row in range(rows.rows):
        end = 0
        runs = [(k, len(list(g))) for k, g in itertools.groupby(segments[row].tolist())]
        used = [(k, n) for k, n in runs if k]
        assert [k for k, _ in used] == list(range(1, len(used) + 1)) and 1 <= len(used) <= slots
        assert runs[len(used) :] in ([], [(0, length - sum(n for _, n in used))])
        for number, size in used:
            seen.append(ids[row, end : end + size].tolist())
            assert positions[row, end : end + size].tolist() == list(range(size))
            if not per_word:
                assert rows.arrays["first"][row, number - 1] == end
            end += size
        assert not ids[row, end:].any() and not positions[row, end:].any()
    assert sorted(seen) == texts and (packed or seen == texts)

    if per_word:
        labels = rows.arrays["labels"]
        assert (labels[segments == 0] == IGNORE).all()
        np.testing.assert_array_equal(
            labels[segments > 0][np.argsort(ids[segments > 0])], encoded.labels
        )
        firsts = [[] for _ in range(encoded.records)]
        for owner, text, words in zip(
            encoded.record, texts, cut(encoded, encoded.words), strict=True
        ):
            for i, word in enumerate(words):
                if word >= 0 and (i == 0 or words[i - 1] != word):
                    firsts[owner].append(text[i])
        assert [part.tolist() for part in unpack_words(rows, ids)] == firsts
        assert unpack_words(rows, np.zeros((rows.rows + 3, length, 7)))[0].shape[1:] == (7,)
    else:
        assert rows.arrays["labels"].shape == (rows.rows, slots)
        assert np.count_nonzero(rows.arrays["labels"] != IGNORE) == len(sizes)
        np.testing.assert_array_equal(unpack_texts(rows, rows.arrays["labels"]), encoded.labels)


@seeded
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 50))
def test_best_fit_is_the_slow_best_fit(sizes, length):
    free = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, space in enumerate(free) if space >= size]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= size
        else:
            free.append(length - size)
    rows = best_fit_decreasing(sizes, length, max_texts=len(sizes))
    used = np.bincount(rows, weights=sizes)
    assert sorted(length - used) == sorted(free)


def test_packing_scales_to_many_texts():
    sizes = np.random.default_rng(0).geometric(0.04, 100_000).clip(3, 128)
    rows = best_fit_decreasing(sizes, 128, max_texts=16)
    assert np.bincount(rows, weights=sizes).max() <= 128 and np.bincount(rows).max() <= 16
    fewest = max(sizes.sum() / 128, len(sizes) / 16)
    assert rows.max() + 1 < 1.05 * fewest


def test_no_texts_make_no_rows(tokenizer):
    for encoded, width in (
        (encode_tagged(tokenizer, [], max_length=8), 16),
        (encode_labelled(tokenizer, [], max_length=8), 2),
    ):
        rows = pack(encoded, 16)
        assert rows.rows == 0 and rows.arrays["labels"].shape == (0, width)
        assert unpack_words(rows, np.zeros((0, 16))) == []


def test_a_text_longer_than_a_row_is_refused():
    with pytest.raises(FwError, match=r"of 3…9 tokens; got 8; encode with max_length=8"):
        pack(random_texts(0, [3, 9], per_word=False), 8)


# Batches --------------------------------------------------------------------------------------


@seeded
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**64 - 1), st.randoms())
def test_a_batch_depends_on_seed_and_step_alone(rows, size, seed, random):
    arrays = {"x": np.arange(rows, dtype=np.int32), "y": np.arange(rows * 2).reshape(rows, 2)}
    steps = list(range(2 * rows))
    in_order = [Batches(arrays, size, seed)(step) for step in steps]
    assert all(b["x"].shape == (size,) and (b["y"][:, 0] == 2 * b["x"]).all() for b in in_order)
    # The stream is a row of permutations: 2·rows batches are 2·size epochs.
    stream = np.concatenate([batch["x"] for batch in in_order]).reshape(2 * size, rows)
    assert (np.sort(stream, axis=1) == np.arange(rows)).all()

    random.shuffle(steps)
    again = Batches(arrays, size, seed)
    assert all(again(step)["x"].tobytes() == in_order[step]["x"].tobytes() for step in steps)

    part = slice(*sorted(random.choices(range(size + 1), k=2)))
    for step in steps[:5]:
        for name, values in again.take(step, part).items():
            np.testing.assert_array_equal(values, in_order[step][name][part])


def test_the_order_is_kept_across_versions():
    """Golden: a change here makes every old run impossible to resume."""
    batches = Batches({"x": np.arange(8, dtype=np.int32)}, size=8, seed=7)
    assert [batches(step)["x"].tolist() for step in (0, 1, 10**9)] == GOLDEN
    assert batches.steps_per_epoch == 1


GOLDEN = [[4, 1, 6, 3, 2, 7, 5, 0], [3, 1, 6, 2, 5, 4, 0, 7], [3, 4, 6, 5, 1, 2, 0, 7]]


def test_batches_refuse_what_they_cannot_deal():
    arrays = {"x": np.arange(3)}
    for make, message in (
        (lambda: Batches({}, 1), "same number of rows"),
        (lambda: Batches({**arrays, "y": np.arange(2)}, 1), "'x': 3, 'y': 2"),
        (lambda: Batches(arrays, 0), "size: expected at least one"),
        (lambda: Batches(arrays, 1, seed=-1), "seed: expected 0"),
        (lambda: Batches(arrays, 1)(-1), "step: expected 0 or more"),
        (
            lambda: feed(Batches({"x": np.arange(4)}, 2), 0, make_mesh("data=1"), rules()),
            "x: JAX has no int64 of its own here; cast it on the host",
        ),
        (lambda: list(eval_batches(arrays, 2, empty={})), "expected a value for x"),
        (lambda: next(prefetch(abs, depth=0)), "depth: expected at least 1"),
    ):
        with pytest.raises(FwError, match=message):
            make()


@pytest.mark.parametrize("per_word", [True, False])
def test_evaluation_sees_every_row_once(per_word):
    encoded = random_texts(3, np.random.default_rng(3).integers(2, 17, 50), per_word)
    rows = pack(encoded, 16, max_texts=4)
    size = next(n for n in (4, 5, 6, 7) if rows.rows % n)
    batches = list(eval_batches(rows.arrays, size, empty=rows.empty))
    assert {a.shape[0] for b in batches for a in b.values()} == {size}
    assert sum(map(count_tokens, batches)) == len(encoded.input_ids)
    whole = {name: np.concatenate([b[name] for b in batches]) for name in rows.arrays}
    for name, values in whole.items():
        np.testing.assert_array_equal(values[: rows.rows], rows.arrays[name])
        assert (values[rows.rows :] == rows.empty[name]).all() and len(values) > rows.rows
    if not per_word:
        np.testing.assert_array_equal(unpack_texts(rows, whole["labels"]), encoded.labels)


def test_prefetch_is_ordered_bounded_and_closes():
    made = []

    def make(step):
        made.append(step)
        if step == 8:
            raise RuntimeError("step 8")
        return step

    items = prefetch(make, 9, depth=2)
    assert [next(items) for _ in range(5)] == [9, 10, 11, 12, 13]
    deadline = time.monotonic() + 10
    while len(made) < 7 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)  # the thread's chance to go further than it may
    assert made == list(range(9, 16))
    items.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]

    got = []
    with pytest.raises(RuntimeError, match="step 8"):
        for item in prefetch(make, 6):
            got.append(item)
    assert got == [6, 7]
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    assert list(prefetch(make, 0, stop=3, depth=9)) == [0, 1, 2]
