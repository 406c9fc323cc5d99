"""What all sides of a comparison of compressed models are given, and how their answers are judged.

Named entities in CoNLL columns, texts with a class in CSV, grey images in IDX files, running text
for decoders: read here without fw, for programs of either environment. Rows have one shape, so that
no side compiles twice and none is spared padding: a row of text is `--length` pieces. Sentences
that are longer go on in a further row, between words; texts with a class are cut.
"""

import argparse
import csv
import gzip
import json
import random
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]
Judge = Callable[[np.ndarray], dict[str, float]]

TASKS = ("ner", "classify", "images", "lm")
SUFFIXES = {"ner": (".conll", ".annotated", ".txt", ".bio"), "classify": (".csv",)}
IDX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Inputs:
    """A split of the data as the models take it.

    Attributes:
      rows: arrays [N, ...]: `input_ids` and `attention_mask` int64 [N, length], of a decoder the
        former alone, or `pixel_values` float32 [N, channels, height, width].
      examples: sentences, texts, images or windows of text.
      judge: figures of what is kept of all rows.
      keep: of the answers of a batch: of logits, the class.
    """

    rows: Batch
    examples: int
    judge: Judge
    keep: Callable[[np.ndarray], np.ndarray] = lambda logits: logits.argmax(-1)

    def batches(self, size: int) -> Iterator[Batch]:
        """Full ones; the last is filled up with the first rows."""
        count = len(next(iter(self.rows.values())))
        for start in range(0, count, size):
            at = np.arange(start, start + size) % count
            yield {name: array[at] for name, array in self.rows.items()}

    def quality(self, predict: Callable[[Batch], np.ndarray], size: int) -> dict[str, float]:
        """Figures of a model that answers batches with logits, or with losses of tokens."""
        count = len(next(iter(self.rows.values())))
        kept = [self.keep(np.asarray(predict(batch))) for batch in self.batches(size)]
        return self.judge(np.concatenate(kept)[:count])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `inputs`, `calibration` and `timed` ask for."""
    add = parser.add_argument
    add("--model", required=True, type=Path, help="folder of a fine-tuned Hugging Face model")
    add("--task", required=True, choices=TASKS)
    add(
        "--data",
        required=True,
        type=Path,
        help="folder of train and test: CoNLL, CSV, IDX; or a text",
    )
    add("--batch", type=int, default=16, help="rows of a batch (default: %(default)s)")
    add("--length", type=int, default=64, help="pieces of a row (default: %(default)s)")
    add("--limit", type=int, default=0, help="judge by so many test examples; 0 for all")
    add("--calibration", type=int, default=64, help="training batches for static scales")


def inputs(options: argparse.Namespace) -> Inputs:
    """The test split, or the first `--limit` examples of it."""
    return _read(options, "test", lambda found: found[: options.limit or None])


def calibration(options: argparse.Namespace) -> list[Batch]:
    """`--calibration` full batches of the training split, drawn with seed 0."""
    most = options.calibration * options.batch
    rng = random.Random(0)
    found = _read(options, "train", lambda e: rng.sample(e, min(most, len(e))))
    batches = [*found.batches(options.batch)][: options.calibration]
    if len(batches) < options.calibration:
        sys.exit(f"{options.data}: has {len(batches)} training batches; lower --calibration")
    return batches


def timed(options: argparse.Namespace) -> Batch:
    """One batch: rows full of drawn pieces, as `fw.compare` draws them, or the first images."""
    if options.task == "images":
        only = argparse.Namespace(**{**vars(options), "limit": options.batch})
        return next(inputs(only).batches(options.batch))
    vocabulary = _tokenizer(options.model).get_vocab_size()
    shape = (options.batch, options.length)
    ids = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
    batch = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(shape, np.int64)}
    return {"input_ids": batch["input_ids"]} if options.task == "lm" else batch


def labels_of(model: Path) -> list[str]:
    """The classes of a model by id."""
    named = json.loads((model / "config.json").read_text())["id2label"]
    return [named[str(i)] for i in range(len(named))]


def _read(options: argparse.Namespace, split: str, choose: Callable[[list], list]) -> Inputs:
    read = {"ner": _entities, "classify": _classes, "images": _images, "lm": _windows}
    return read[options.task](options, split, choose)


# Texts.


def _entities(options: argparse.Namespace, split: str, choose: Callable[[list], list]) -> Inputs:
    import seqeval.metrics

    score: Callable[..., Any] = seqeval.metrics.f1_score
    labels, encode = labels_of(options.model), _Encoder(options)
    sentences = choose(_conll(_file(options, split)))
    rows: list[list[int]] = []
    places: list[tuple[int, int, int]] = []  # of each word that has one: sentence, row, piece
    for number, (words, _) in enumerate(sentences):
        for window in encode.windows(words):
            at = len(encode.before)
            for pieces in window:
                places.append((number, len(rows), at))
                at += len(pieces)
            rows.append([piece for pieces in window for piece in pieces])
    gold = [tags for _, tags in sentences]

    def judge(best: np.ndarray) -> dict[str, float]:
        found: list[list[str]] = [[] for _ in gold]
        for number, row, at in places:
            found[number].append(labels[best[row, at]])
        micro, macro = (float(score(gold, found, average=name)) for name in ("micro", "macro"))
        return {"f1": micro, "macro_f1": macro}

    return Inputs(encode.rows(rows), len(sentences), judge)


def _classes(options: argparse.Namespace, split: str, choose: Callable[[list], list]) -> Inputs:
    import sklearn.metrics

    labels, encode = labels_of(options.model), _Encoder(options)
    path = _file(options, split)
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    header, examples = table[0], choose(table[1:])
    if len(header) != 2 or "text" not in header:
        sys.exit(f"{path}: expected the columns text and another; found {', '.join(header)}")
    text_at = header.index("text")
    ids = {label: i for i, label in enumerate(labels)}
    if unknown := {row[1 - text_at] for row in examples} - ids.keys():
        sys.exit(f"{path}: {sorted(unknown)[0]!r} is no class of {options.model}")
    gold = [ids[row[1 - text_at]] for row in examples]
    rows = [encode.pieces([row[text_at]])[0][: encode.room] for row in examples]

    def judge(best: np.ndarray) -> dict[str, float]:
        _check(best, len(gold))
        return {
            "accuracy": float(np.mean(best == gold)),
            "macro_f1": float(sklearn.metrics.f1_score(gold, best, average="macro")),
        }

    return Inputs(encode.rows(rows), len(examples), judge)


def _windows(options: argparse.Namespace, split: str, choose: Callable[[list], list]) -> Inputs:
    """Of a file of text, cut into rows: the first half is the test split."""
    if not options.data.is_file():
        sys.exit(f"{options.data}: expected a file of text")
    text = options.data.read_text(encoding="utf-8")
    ids = np.array(_tokenizer(options.model).encode(text, add_special_tokens=False).ids, np.int64)
    rows = ids[: len(ids) // options.length * options.length].reshape(-1, options.length)
    half = len(rows) // 2
    own = range(half) if split == "test" else range(half, len(rows))
    at = choose([*own])

    def judge(losses: np.ndarray) -> dict[str, float]:
        if losses.shape != (len(at), options.length - 1):
            raise ValueError(f"losses have shape {losses.shape}; expected one for each next token")
        return {"perplexity": float(np.exp(losses.mean(dtype=np.float64)))}

    return Inputs({"input_ids": rows[at]}, len(at), judge, keep=lambda losses: losses)


class _Encoder:
    """Pieces of words and texts, and rows of them between the model's special tokens."""

    def __init__(self, options: argparse.Namespace):
        self.fast = _tokenizer(options.model)
        one = self.fast.encode("a")
        inside = [i for i, special in enumerate(one.special_tokens_mask) if not special]
        self.before, self.after = one.ids[: inside[0]], one.ids[inside[-1] + 1 :]
        self.length = options.length
        self.room = options.length - len(self.before) - len(self.after)
        source = json.loads((options.model / "config.json").read_text())
        self.pad = source["pad_token_id"]
        self.unknown = json.loads(self.fast.to_str())["model"].get("unk_token")

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text."""
        found = self.fast.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def windows(self, words: Sequence[str]) -> Iterator[list[list[int]]]:
        """The pieces of each word of a sentence, as many words at a time as a row has room for.

        A word without a piece becomes the unknown token, one longer than a row is cut.
        """
        encoding = self.fast.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        found: list[list[int]] = [[] for _ in words]
        for piece, word in zip(encoding.ids, encoding.word_ids, strict=True):
            found[word].append(piece)
        window: list[list[int]] = []
        used = 0
        for own in found:
            pieces = own[: self.room] or [self.fast.token_to_id(self.unknown)]
            if used + len(pieces) > self.room:
                yield window
                window, used = [], 0
            window.append(pieces)
            used += len(pieces)
        if window:
            yield window

    def rows(self, pieces: Sequence[Sequence[int]]) -> Batch:
        """`input_ids` and `attention_mask` of rows."""
        ids = np.full((len(pieces), self.length), self.pad, np.int64)
        mask = np.zeros_like(ids)
        for row, own in enumerate(pieces):
            whole = [*self.before, *own, *self.after]
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        return {"input_ids": ids, "attention_mask": mask}


def _tokenizer(model: Path) -> Any:
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    return fast


def _conll(path: Path) -> list[tuple[list[str], list[str]]]:
    """Words and tags of each sentence: first and last of the columns, blank lines between."""
    with path.open(encoding="utf-8", newline="\n") as file:
        lines = [line.strip(" \t\r\n") for line in file]  # words may be, or hold, other spaces
    sentences = []
    for empty, group in groupby(lines, lambda line: not line):
        cells = [] if empty else [re.split(" *\t *| +", line) for line in group]
        if any(len(row) < 2 for row in cells):
            sys.exit(f"{path}: expected a word and a tag; found {min(cells, key=len)}")
        if cells and cells[0][0] != "-DOCSTART-":
            sentences.append(([row[0] for row in cells], [row[-1] for row in cells]))
    return sentences


def _file(options: argparse.Namespace, split: str) -> Path:
    """The file of a split, whose word no letter touches on its left."""
    endings = SUFFIXES[options.task]
    named = re.compile(rf"(?<![a-z]){split}(?![a-z])")
    files = [p for p in sorted(options.data.iterdir()) if p.suffix in endings]
    if len(found := [p for p in files if named.search(p.name.lower())]) != 1:
        sys.exit(f"{options.data}: expected one {split} file ({' '.join(endings)}); found {found}")
    return found[0]


# Images.


def _images(options: argparse.Namespace, split: str, choose: Callable[[list], list]) -> Inputs:
    pixels, gold = (
        _idx(options.data / f"{IDX[split]}-{name}-ubyte.gz")
        for name in ("images-idx3", "labels-idx1")
    )
    at = choose([*range(len(gold))])
    own = json.loads((options.model / "preprocessor_config.json").read_text())
    mean, std = (np.array(own[f"image_{name}"], np.float32) for name in ("mean", "std"))
    wanted = own.get("size", {}).get("height"), own.get("size", {}).get("width")
    if own.get("do_resize", True) and wanted != pixels.shape[1:]:
        sys.exit(f"{options.model}: takes images of {wanted}; these are {pixels.shape[1:]}")
    scaled = pixels[at].astype(np.float32)[:, None] * np.float32(own["rescale_factor"])
    images = (scaled - mean[:, None, None]) / std[:, None, None]
    classes = np.array([int(label) for label in labels_of(options.model)])

    def judge(best: np.ndarray) -> dict[str, float]:
        _check(best, len(at))
        return {"accuracy": float(np.mean(classes[best] == gold[at]))}

    return Inputs({"pixel_values": images}, len(at), judge)


def _check(best: np.ndarray, count: int) -> None:
    """Answers of another shape would be compared all the same, every one with every label."""
    if best.shape != (count,):
        raise ValueError(f"answers have shape {best.shape}, expected a class for each of {count}")


def _idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file, in its shape."""
    with gzip.open(path) as file:
        data = file.read()
    _, kind, rank = struct.unpack(">HBB", data[:4])
    if kind != 8:
        sys.exit(f"{path}: expected bytes")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
