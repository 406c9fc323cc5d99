"""Byte-level BPE, as RoBERTa and ModernBERT have it: words, pieces, and a run from end to end."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fw import data, hub, run
from fw.cli import main
from fw.models.modernbert import ModernBertConfig, modernbert
from fw.models.roberta import RobertaConfig, roberta
from fw.processors.answers import read_items
from tests import tiny
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KINDS = ("roberta", "modernbert")
SPECIAL = {
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "modernbert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
}
TEXTS = [
    "ada went to rome .",
    "in oslo grace wrote a letter",
    "the mary film was fine",
    "Zoë's café",
]


def byte_level(kind, *, prefix_space=False):
    """A tokenizer of that kind, trained on a few texts."""
    first, _, last, _, _ = special = SPECIAL[kind]
    fast = tokenizers.Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC() if kind == "modernbert" else None
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    words = [*tiny.NAMES, *tiny.PLACES, *tiny.GOOD, *tiny.OTHER[:10]]
    fast.train_from_iterator([*TEXTS * 4, *(f"the {word}" for word in words * 4)], trainer)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    ids: Any = [(token, fast.token_to_id(token)) for token in (last, first)]
    if kind == "roberta":
        fast.post_processor = processors.RobertaProcessing(
            *ids, trim_offsets=True, add_prefix_space=prefix_space
        )
    else:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair=f"{first} $A {last} $B {last}", special_tokens=ids
        )
    fast.decoder = decoders.ByteLevel()
    return fast


def make_model(folder, kind):
    """A tiny random folder of the family, with that tokenizer."""
    fast = byte_level(kind)
    words = folder.with_name(f"{folder.name}-words")
    words.mkdir()
    fast.save(str(words / "tokenizer.json"))
    shape = (fast.get_vocab_size(), 16, 1, 2, 32)
    options = {"num_labels": 2, "task": "embedding", "max_position_embeddings": 48,
               "initializer_range": 0.2}  # fmt: skip
    model = (
        roberta(RobertaConfig(*shape, **options))
        if kind == "roberta"
        else modernbert(ModernBertConfig(*shape, **options))
    )
    made = hub.Loaded(model, model.init(jax.random.key(0)), ())
    hub.save(folder, made, tokenizer_from=words)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_words_get_the_pieces_of_a_tokenizer_that_adds_the_space(tmp_path, kind):
    """transformers wants `add_prefix_space=True` for words: that tokenizer is the reference."""
    byte_level(kind).save(str(tmp_path / "tokenizer.json"))
    tokenizer, reference = data.load_tokenizer(tmp_path), byte_level(kind, prefix_space=True)
    assert tokenizer.spaced
    first, pad, last, unknown, mask = (reference.token_to_id(t) for t in SPECIAL[kind])
    assert (tokenizer.prefix, tokenizer.suffix) == ((first,), (last,))
    assert (tokenizer.pad, tokenizer.unknown, tokenizer.mask) == (pad, unknown, mask)

    rng = np.random.default_rng(0)
    every = [*" ".join(TEXTS).split(), "Zoë's", "U.N.", "naïve", "日本", "a\u200bb", "😀"]
    for _ in range(30):
        words = tuple(str(w) for w in rng.choice(every, int(rng.integers(1, 9))))
        encoded = data.encode_tagged(tokenizer, [data.Tagged(words)], max_length=200)
        want = reference.encode(list(words), is_pretokenized=True)
        assert encoded.input_ids.tolist() == want.ids
        assert encoded.words.tolist() == [-1 if w is None else w for w in want.word_ids]
        # And what predicting does with words counts as many.
        assert read_items(tokenizer, [list(words)])[0].pieces == len(want.ids)
    # A word behind another has the pieces that it has in running text.
    running = tokenizer.fast.encode("ada went").ids[1:-1]
    own = data.encode_tagged(tokenizer, [data.Tagged(("ada", "went"))], max_length=20)
    assert own.input_ids[1:-1].tolist()[-1] == running[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_of_a_text_are_found_in_their_places(tmp_path, kind):
    byte_level(kind).save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.load_tokenizer(tmp_path)
    text = " Zoë went  to Oslo, café."
    assert read_items(tokenizer, [text])[0].words == ("Zoë", "went", "to", "Oslo", ",", "café", ".")


def test_a_tokenizer_that_adds_the_space_itself_gets_none_from_us(tmp_path):
    byte_level("roberta", prefix_space=True).save(str(tmp_path / "tokenizer.json"))
    assert not data.load_tokenizer(tmp_path).spaced


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (kind, task) if (i, j) == (0, 1) else slow(kind, task)
        for i, kind in enumerate(KINDS)
        for j, task in enumerate(["ner", "classify"])
    ],
)
def test_a_run_from_data_to_answers(tmp_path, kind, task, capsys):
    model, folder = make_model(tmp_path / "model", kind), tmp_path / "run"
    make, columns = {
        "ner": (tiny.make_ner, ()),
        "classify": (tiny.make_reviews, ("--columns", "text,liked")),
    }[task]
    words = ("finetune", "--task", task, *columns, "--precision", "f32", "--length", "40",
             "--learning-rate", "1e-2", "--steps", "40", "--evaluate-every", "20",
             "--model", model, "--data", make(tmp_path / "data"), "--run", folder)  # fmt: skip
    assert main([str(word) for word in words]) == 0
    metric = "f1" if task == "ner" else "macro_f1"
    assert run.read_json(folder / run.RESULT)["splits"]["test"][metric] > 0.9
    assert main(["export", str(folder)]) == 0
    text = {"ner": "ada went to rome .", "classify": "the ada film was lovely, a"}[task]
    capsys.readouterr()
    assert main(["predict", str(folder / "artifact"), text, "--jsonl"]) == 0
    answer = json.loads(capsys.readouterr().out)
    if task == "ner":
        found = [(e["type"], e["text"], e["start"]) for e in answer["entities"]]
        assert found == [("PER", "ada", 0), ("LOC", "rome", 12)]
    else:
        assert answer["label"] == "yes"
