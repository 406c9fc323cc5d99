"""A tiny random BERT and small data that it can learn in seconds: what runs are tested with."""

import json
import random
from pathlib import Path

import jax

from fw import hub
from fw.data import load_tokenizer
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama

NAMES, PLACES = ("ada", "grace", "alan", "mary"), ("london", "paris", "oslo", "rome")
GOOD, BAD = ("lovely", "great", "fine", "good"), ("awful", "poor", "bad", "sad")
OTHER = ("the", "film", "was", "went", "to", "in", "and", "wrote", "a", "letter", ".", "##s")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *NAMES, *PLACES, *GOOD, *BAD, *OTHER, "[MASK]")


def make_model(folder: Path, *, layers: int = 1, seed: int = 0) -> Path:
    """A model folder as transformers reads it, head and all."""
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=32, num_labels=2, task="sequence_classification",
        max_position_embeddings=48, initializer_range=0.2,
    )  # fmt: skip
    model = bert(config)
    vocabulary = folder.with_name(f"{folder.name}-vocabulary")
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("\n".join(WORDS))
    loaded = hub.Loaded(model, model.init(jax.random.key(seed)), ("no", "yes"))
    hub.save(folder, loaded, tokenizer_from=vocabulary)
    return folder


TEMPLATE = "{% for m in messages %}{{ m['content'] }} [SEP] {% endfor %}"


def make_decoder(folder: Path) -> Path:
    """The folder of a language model that spells as that one does; [SEP] ends what anybody says."""
    config = LlamaConfig(40, 16, 2, 2, 32, num_key_value_heads=2, initializer_range=0.2)
    model = llama(config)
    vocabulary = folder.with_name(f"{folder.name}-vocabulary")
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("\n".join(WORDS))
    fast = load_tokenizer(vocabulary).fast
    fast.add_special_tokens(["[SEP]"])
    fast.save(str(vocabulary / "tokenizer.json"))
    settings = {"eos_token": "[SEP]", "chat_template": TEMPLATE}
    (vocabulary / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = hub.Loaded(model, model.init(jax.random.key(0)), ())
    hub.save(folder, loaded, tokenizer_from=vocabulary)
    return folder


def make_conversations(folder: Path, sizes: tuple[int, int, int] = (96, 24, 24)) -> Path:
    """train, dev and test in JSON lines: where somebody was, whom a word or two describes."""
    rng = random.Random(6)
    folder.mkdir()
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        lines = []
        for number in range(size):
            i, word = rng.randrange(len(NAMES)), rng.choice(GOOD)
            asked, answer = f"the {word} {NAMES[i]} went to", f"{PLACES[i]} ."
            talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            document = {"text": f"{asked} {answer}"}
            lines.append(json.dumps({"messages": talk} if number % 3 else document))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def make_ner(folder: Path, sizes: tuple[int, int, int] = (96, 24, 24)) -> Path:
    """train, dev and test in CoNLL columns: who went where."""
    rng = random.Random(0)
    folder.mkdir()
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        lines = []
        for _ in range(size):
            who, where = rng.choice(NAMES), rng.choice(PLACES)
            words = rng.choice(
                [f"{who} went to {where} .", f"in {where} {who} wrote a letter", f"the {who} film"]
            )
            tag = {who: "B-PER", where: "B-LOC"}
            lines += [*(f"{word} {tag.get(word, 'O')}" for word in words.split()), ""]
        (folder / f"{split}.conll").write_text("\n".join(lines))
    return folder


def make_ratings(folder: Path, sizes: tuple[int, int, int] = (96, 24, 24)):
    """train, dev and test in TSV: how good a film was, from -2 to 2, and how long, in hours."""
    rng = random.Random(2)
    folder.mkdir()
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        rows = ["id\tvalence\ttext\thours"]
        for i in range(size):
            word, who = rng.choice(GOOD + BAD), rng.randrange(len(NAMES))
            value = 2 - GOOD.index(word) / 4 if word in GOOD else BAD.index(word) / 4 - 2
            rows.append(f"{i}\t{value}\tthe {NAMES[who]} film was {word}\t{1 + who}")
        (folder / f"{split}.tsv").write_text("\n".join(rows))
    return folder


def make_topics(folder: Path, sizes: tuple[int, int, int] = (96, 24, 24)):
    """train, dev and test in JSON lines: the places and whether one wrote, none of them or all."""
    rng = random.Random(3)
    folder.mkdir()
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        rows = []
        for _ in range(size):
            places = rng.sample(PLACES, rng.randrange(3))
            wrote = rng.random() < 0.5
            words = [rng.choice(NAMES), *(["wrote"] if wrote else ["went"]), "to", *places]
            row = {"text": " ".join(words), "topics": [*places, *(["letters"] if wrote else [])]}
            rows.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def make_lines(folder: Path, sizes: tuple[int, int, int] = (96, 24, 24)):
    """train, dev and test in JSON lines; whoever writes, writes from a place of theirs."""
    rng = random.Random(5)
    folder.mkdir()
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        lines = []
        for _ in range(size):
            i = rng.randrange(len(NAMES))
            who, where = NAMES[i], PLACES[i]
            text = f"in {where} {who} wrote a letter to {who} in {where} ."
            lines.append(json.dumps({"text": text}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def make_questions(folder: Path, sizes: tuple[int, int, int] = (96, 24, 24)):
    """train and dev in JSON lines, test in SQuAD's JSON: who, or where; some unanswerable."""
    rng = random.Random(4)
    folder.mkdir()
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        rows = []
        for i in range(size):
            who, where = rng.choice(NAMES), rng.choice(PLACES)
            other = " ".join(rng.choice(("film", "letter", "lovely", "the")) for _ in range(i % 40))
            context = f"{who.title()} went to {where.title()} . {other}".strip()
            kind = rng.choice(("went", "in", "was"))  # who, where, and what nothing answers
            text = {"went": who, "in": where, "was": ""}[kind].title()
            answer = [{"text": text, "answer_start": context.index(text)}] if text else []
            rows.append({"id": str(i), "question": kind, "answers": answer, "context": context})
        if split == "test":
            paragraphs = [{"context": r.pop("context"), "qas": [r]} for r in rows]
            squad = {"version": "2.0", "data": [{"title": "x", "paragraphs": paragraphs}]}
            (folder / "test.json").write_text(json.dumps(squad))
        else:
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make_reviews(folder: Path, sizes: tuple[int, int, int] = (96, 24, 24), flip: bool = False):
    """train, dev and test in CSV: whether a film was liked. `flip` swaps the classes of dev."""
    rng = random.Random(1)
    folder.mkdir()
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        rows = ["text,liked"]
        for _ in range(size):
            liked = rng.random() < 0.5
            word = rng.choice(GOOD if liked else BAD)
            label = "yes" if liked != (flip and split == "dev") else "no"
            rows.append(f'"the {rng.choice(NAMES)} film was {word}, {rng.choice(OTHER)}",{label}')
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return folder
