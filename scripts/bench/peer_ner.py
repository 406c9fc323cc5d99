"""The peer: fine-tunes a Hugging Face encoder for named entities with transformers and torch.

What a competent user writes today, so that fw has something to be measured against: a fast
tokenizer, the first piece of each word labelled, padding to the longest of the batch, fused AdamW
without decay on biases and layer norms, linear warm-up and decay, clipping at 1. It shares no code
with fw, reads its own data, and runs in its own environment (`scripts/bench/peer`, Python 3.11).
It prints one line of JSON.
"""
# pyright: reportMissingImports=false
# (torch and transformers live in the peer's environment only)

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import seqeval.metrics
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100  # what torch's cross entropy leaves out
GROUP = 50  # batches that are sorted by length together, as in transformers' LengthGroupedSampler


def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    splits = {name: read_conll(getattr(args, name)) for name in ("train", "dev", "test")}
    tags = {tag for _, sentence_tags in splits["train"] for tag in sentence_tags} - {"O"}
    labels = ["O", *sorted(tags)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        args.model,
        dtype=torch.float32,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )

    started = time.perf_counter()
    encoded = {
        name: [encode(tokenizer, words, tags, labels, args.max_length) for words, tags in split]
        for name, split in splits.items()
    }
    seconds_encode = time.perf_counter() - started

    result = train(model, encoded["train"], args, pad=tokenizer.pad_token_id)
    result |= {"seconds_encode": round(seconds_encode, 3)}
    if not args.steps:
        for key, name in (("f1", "test"), ("dev_f1", "dev")):
            predicted = predict(model, encoded[name], args, pad=tokenizer.pad_token_id)
            gold = [sentence_tags for _, sentence_tags in splits[name]]
            result[key] = seqeval.metrics.f1_score(gold, predicted)
    result |= {"dtype": "bfloat16" if args.bf16 else "float32", "options": vars(args)}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune for named entities with torch.")
    add = parser.add_argument
    add("--model", required=True, help="folder of a Hugging Face encoder")
    for split in ("train", "dev", "test"):
        add(f"--{split}", required=True, help="CoNLL file: a word and its BIO tag a line")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=32, help="sentences")
    add("--lr", type=float, default=5e-5)
    add("--warmup-ratio", type=float, default=0.1, help="share of the steps the rate rises")
    add("--weight-decay", type=float, default=0.01)
    add("--max-length", type=int, default=128, help="pieces a sentence is cut to")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count())
    add("--bf16", action="store_true", help="train under CPU autocast to bfloat16")
    add("--group-by-length", action="store_true", help="batches of sentences of like length")
    add("--steps", type=int, default=0, help="time so many steps and stop; no evaluation")
    add("--warmup-steps", type=int, default=5, help="with --steps: steps before the clock starts")
    return parser.parse_args()


def read_conll(path: str) -> list[tuple[list[str], list[str]]]:
    """Sentences as (words, tags): first and last column, sentences parted by blank lines."""
    sentences: list[tuple[list[str], list[str]]] = []
    words: list[str] = []
    tags: list[str] = []
    with Path(path).open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate([*lines, "\n"], 1):
            columns = line.rstrip("\r\n").split("\t" if "\t" in line else None)
            if not line.strip():  # WNUT 2017 parts sentences by a lone tab, too
                if words:
                    sentences.append((words, tags))
                words, tags = [], []
            elif len(columns) < 2 or not columns[0].strip():
                sys.exit(f"{path}:{number}: expected a word and a tag, found {line!r}")
            elif columns[0] != "-DOCSTART-":
                words.append(columns[0])
                tags.append(columns[-1])
    return sentences


def encode(tokenizer, words: list[str], tags: list[str], labels: list[str], max_length: int):
    """Piece ids, label ids (first pieces only), and the word each labelled piece begins."""
    encoding = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    words_of = encoding.word_ids()
    starts = [
        None if word == before else word
        for before, word in zip([None, *words_of], words_of, strict=False)
    ]
    index = {label: i for i, label in enumerate(labels)}
    targets = [IGNORE if word is None else index.get(tags[word], IGNORE) for word in starts]
    return {
        "ids": torch.tensor(encoding["input_ids"]),
        "labels": torch.tensor(targets),
        "starts": starts,
        "words": len(words),
    }


def collate(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(row["ids"]) for row in rows])
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True, padding_value=pad)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORE)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def epoch_of_batches(rows: list[dict], size: int, by_length: bool, rng: random.Random):
    order = rng.sample(range(len(rows)), len(rows))
    if by_length:
        chunks = [order[i : i + GROUP * size] for i in range(0, len(order), GROUP * size)]
        order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: -len(rows[i]["ids"]))]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if by_length:
        rng.shuffle(batches)
    return [[rows[i] for i in batch] for batch in batches]


def train(model, rows: list[dict], args: argparse.Namespace, pad: int) -> dict[str, object]:
    decayed = [p for n, p in model.named_parameters() if not is_bias_or_norm(n)]
    others = [p for n, p in model.named_parameters() if is_bias_or_norm(n)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=args.lr,
        fused=True,
    )
    steps = args.steps + args.warmup_steps
    if not args.steps:
        steps = args.epochs * math.ceil(len(rows) / args.batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, math.ceil(args.warmup_ratio * steps), steps
    )
    rng = random.Random(args.seed)
    untimed = args.warmup_steps if args.steps else 0
    model.train()
    step = tokens = padded = 0
    loss = torch.tensor(math.nan)
    started = time.perf_counter()
    while step < steps:
        for batch in epoch_of_batches(rows, args.batch_size, args.group_by_length, rng):
            if step == untimed:
                started, tokens, padded = time.perf_counter(), 0, 0
            inputs = collate(batch, pad)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += int(inputs["attention_mask"].sum())
            padded += inputs["input_ids"].numel()
            step += 1
            if step % 50 == 0:
                print(f"step {step}/{steps} loss {loss.item():.4f}", file=sys.stderr)
            if step == steps:
                break
    seconds = time.perf_counter() - started
    return {
        "f1": None,
        "dev_f1": None,
        "seconds_train": round(seconds, 3),
        "real_tokens_per_second": round(tokens / seconds, 1),
        "padded_tokens_per_second": round(padded / seconds, 1),
        "loss": loss.item(),
        "steps": step - untimed,
    }


def is_bias_or_norm(name: str) -> bool:
    return name.endswith("bias") or "LayerNorm" in name


@torch.inference_mode()
def predict(model, rows: list[dict], args: argparse.Namespace, pad: int) -> list[list[str]]:
    """A tag for every word; words cut off, or of no piece at all, are O."""
    model.eval()
    tags: dict[int, list[str]] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["ids"]))
    for start in range(0, len(order), args.batch_size):
        chosen = order[start : start + args.batch_size]
        inputs = collate([rows[i] for i in chosen], pad)
        del inputs["labels"]
        best = model(**inputs).logits.argmax(-1)
        for i, pieces in zip(chosen, best.tolist(), strict=True):
            tags[i] = ["O"] * rows[i]["words"]
            for piece, word in enumerate(rows[i]["starts"]):
                if word is not None:
                    tags[i][word] = model.config.id2label[pieces[piece]]
    return [tags[i] for i in range(len(rows))]


if __name__ == "__main__":
    main()
