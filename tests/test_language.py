"""Documents and conversations: what is learnt of them, and a template that reaches nothing else."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from fw import data, tasks
from fw.data import IGNORE, Conversation, Document, Tokenizer
from fw.errors import FwError
from fw.evaluate import evaluate, make_counter
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama
from fw.models.modernbert import ModernBertConfig, modernbert
from sharding import make_mesh, rules

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<end>", "<|user|>", "<|assistant|>", "<|system|>")
TALK = (
    {"role": "user", "content": "hi you"},
    {"role": "assistant", "content": "oh no"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "ah"},
)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def make(template=TEMPLATE):
    """A tokenizer of bytes, whose ids can be read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast.encode_special_tokens = True
    settings = {"chat_template": template, "eos_token": "<end>"}
    return Tokenizer(fast, (), (), 0, None, settings=settings)


def spell(tokenizer, ids):
    return tokenizer.fast.decode(list(ids), skip_special_tokens=False)


def test_only_answers_are_learnt_and_what_ends_them():
    tokenizer = make()
    ids, learnt = data.Chat(tokenizer).example(TALK)
    assert spell(tokenizer, ids) == (
        "<|user|>hi you<end><|assistant|>oh no<end><|user|>why<end><|assistant|>ah<end>"
    )
    assert spell(tokenizer, ids[learnt]) == "oh no<end>ah<end>"
    assert spell(tokenizer, data.Chat(tokenizer).prompt(TALK[:1])) == (
        "<|user|>hi you<end><|assistant|>"
    )
    encoded = data.encode_documents(tokenizer, [Conversation(TALK)], max_length=18)
    counted = encoded.labels != IGNORE
    assert spell(tokenizer, encoded.labels[counted]) == "oh no<end>"  # the rest is cut
    np.testing.assert_array_equal(encoded.labels[:-1][counted[:-1]],
                                  encoded.input_ids[1:][counted[:-1]])  # fmt: skip
    assert (encoded.cut, encoded.cut_texts) == (len(ids) - 18, 1)


def test_a_long_document_goes_on_and_every_piece_has_its_successor():
    tokenizer = make()
    texts = [Document("abcdefghij"), Document("xy")]
    encoded = data.encode_documents(tokenizer, texts, max_length=4)
    assert spell(tokenizer, encoded.input_ids) == "abcdefghij<end>xy<end>"
    assert encoded.lengths.tolist() == [4, 4, 3, 3]
    whole = [*tokenizer.fast.encode("abcdefghij").ids, tokenizer.end]
    assert encoded.labels[:11].tolist() == [*whole[1:], IGNORE]
    rows = data.pack(encoded, 8)
    assert set(rows.arrays) == {"input_ids", "segment_ids", "position_ids", "targets"}
    assert (rows.arrays["targets"][rows.arrays["segment_ids"] == 0] == IGNORE).all()
    assert np.sum(rows.arrays["targets"] != IGNORE) == 10 + 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "more than 4000000 characters"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% for %}", "line 1"),
        (None, "has no chat_template"),
        ("{{ messages | length }}", "reads otherwise"),
    ],
)
def test_a_template_that_does_more_than_spell_is_refused(template, message):
    with pytest.raises(FwError, match=message):
        data.Chat(make(template)).example(TALK)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "<end>now"}], "message 0: spells the special token '<end>'"),
        ([{"role": "<end>", "content": "now"}], "spells the special token"),
        ([{"role": "user"}], "expected 'content'"),
        ([{"content": "x"}], "expected an object with a 'role'"),
        ([{"role": "user", "content": "x"}], "nothing to learn"),
    ],
)
def test_messages_that_forge_or_lack_are_refused(messages, message):
    with pytest.raises(FwError, match=message):
        data.Chat(make()).example(messages)
    with pytest.raises(FwError, match=r"lines\.jsonl:3"):
        bad = Conversation(tuple(messages), "lines.jsonl:3")
        data.encode_documents(make(), [bad], max_length=9)


def test_files_are_read_and_bad_lines_named(tmp_path):
    path = tmp_path / "talk.jsonl"
    good = json.dumps({"messages": TALK})
    path.write_text(f'{good}\n[]\n{{"messages": [{{"role": "user", "content": "x"}}]}}\n{{\n')
    bad: list[str] = []
    assert data.read_documents(path, on_bad_row=bad.append) == [Conversation(TALK, f"{path}:1")]
    assert [line.split(": ")[0] for line in bad] == [f"{path}:{n}" for n in (2, 3, 4)]
    with pytest.raises(FwError, match=r"talk\.jsonl:2: expected \{\"text\": a text\}, or"):
        data.read_documents(path)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert [d.text for d in data.read_documents(tmp_path / "a.txt")] == ["one\ntwo\n"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    with pytest.raises(FwError, match=r"a\.jsonl:2: expected .*a text"):
        data.read_documents(tmp_path / "a.jsonl")


MODELS = {
    "llama": lambda: llama(LlamaConfig(40, 16, 1, 2, 16)),
    "llama, tied": lambda: llama(LlamaConfig(40, 16, 1, 2, 16, tie_word_embeddings=True)),
    "bert": lambda: bert(BertConfig(40, 16, 1, 2, 16, 0, task="masked_lm")),
    "modernbert": lambda: modernbert(ModernBertConfig(40, 16, 1, 2, 16, 0, task="masked_lm")),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_told_its_targets_gives_the_losses_of_its_logits(name):
    model, random = MODELS[name](), np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(x + random.normal(0, 0.3, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    ids = random.integers(0, 40, (2, 9)).astype(np.int32)
    batch = {
        "input_ids": ids,
        "segment_ids": np.ones_like(ids),
        "position_ids": np.tile(np.arange(9, dtype=np.int32), (2, 1)),
    }
    targets = random.integers(-1, 40, (2, 9)).astype(np.int32)
    apply = jax.jit(model.apply)
    logits = np.asarray(apply(variables, batch)[0], np.float64)
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(shares, targets[..., None] % 40, -1)[..., 0]
    counted = targets != IGNORE
    outputs = apply(variables, {**batch, "targets": targets})[0]
    np.testing.assert_allclose(outputs["losses"], np.where(counted, expected, 0), atol=2e-5)
    np.testing.assert_array_equal(outputs["hits"], counted & (logits.argmax(-1) == targets))
    total, weight = tasks.word_loss(outputs, {"targets": targets})
    np.testing.assert_allclose(total / weight, expected[counted].mean(), rtol=1e-5)


def test_a_language_model_is_scored_by_the_likelihood_of_next_words():
    tokenizer, mesh, layout = make(), make_mesh("data=2"), rules()
    model = llama(LlamaConfig(300, 16, 1, 2, 16))
    variables = model.init(jax.random.key(0))
    documents = [Document("the cat sat on the mat"), Document("oh"), Document("a b c d")]
    rows = data.pack(data.encode_documents(tokenizer, documents, max_length=16), 16)
    task = tasks.make_task("causal_lm", ())
    counter = make_counter(lambda v, b: model.apply(v, b)[0], task)
    summary = evaluate(counter, variables, rows, size=2, mesh=mesh, rules=layout)
    total, count, right, apply = 0.0, 0, 0, jax.jit(model.apply)
    for document in documents:
        ids = [*tokenizer.fast.encode(document.text).ids, tokenizer.end]
        for start in range(0, len(ids), 16):
            part = np.array([ids[start : start + 16]], np.int32)
            place = np.arange(part.shape[1], dtype=np.int32)[None]
            batch = {"input_ids": part, "segment_ids": np.ones_like(part), "position_ids": place}
            logits = np.asarray(apply(variables, batch)[0][0], np.float64)
            for row, target in zip(logits, ids[start + 1 : start + 17], strict=False):
                total += np.log(np.exp(row).sum()) - row[target]
                count, right = count + 1, right + int(row.argmax() == target)
    figures = summary.figures
    assert figures["tokens"] == count == 22 + 2 + 7
    np.testing.assert_allclose(figures["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(figures["perplexity"], np.exp(total / count), rtol=1e-5)
    assert figures["accuracy"] == pytest.approx(right / count)
    assert (summary.metric, summary.value) == ("log_likelihood", -figures["loss"])
