"""Tasks beyond one label a word or text: from files to answers, against other people's code."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from scipy import stats as scipy_stats
from sklearn import metrics as sk

import fw
from fw import data, hub, run
from fw.cli import main
from fw.data import Answer, Question, pack, passages, read_records
from fw.errors import FwError
from fw.metrics import regression_report, squad_scores
from fw.recipe import TASKS, Finetune
from fw.tasks import make_task, sigmoid_cross_entropy, span_loss, squared_error
from sharding import make_mesh, rules
from tests import tiny
from tests.marks import fast_are, slow

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MANY, NUMBERS = "multi_label_classification", "regression"
ONE, EIGHT = "data=1", "data=2,fsdp=2,tensor=2"
COMMON = ("--length", "32", "--learning-rate", "1e-2", "--precision", "f32", "--batch", "8")
OPTIONS = {
    "regress": ("--columns", "text,valence,hours", "--steps", "320", "--evaluate-every", "160"),
    "multilabel": ("--columns", "text,topics", "--steps", "480", "--evaluate-every", "160"),
    "qa": ("--steps", "400", "--length", "24", "--evaluate-every", "100"),
    "mlm": ("--steps", "320", "--evaluate-every", "160"),
    "lm": ("--steps", "60", "--evaluate-every", "30"),
}
MAKE = {
    "regress": tiny.make_ratings,
    "multilabel": tiny.make_topics,
    "qa": tiny.make_questions,
    "mlm": tiny.make_lines,
    "lm": tiny.make_conversations,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the model and the data of every task."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_model(root / "model", seed=1)
    tiny.make_decoder(root / "decoder")
    for task, make in MAKE.items():
        make(root / task)
    return root


@pytest.fixture(scope="module")
def runs(world):
    """A function of a task: a finished run; each is made once."""
    made = {}

    def get(task):
        if task not in made:
            made[task] = finish(world, task, world / f"{task}-run")
        return made[task]

    return get


def finish(world, task, folder, *more):
    """Trains by the options of the task; `more` overrides them."""
    model = world / ("decoder" if task == "lm" else "model")
    where = ("--model", model, "--data", world / task, "--run", folder)
    words = ("finetune", "--task", task, *COMMON, *OPTIONS[task], *where, *more)
    assert main([str(word) for word in words]) == 0
    return folder


def answers(folder, world, task, capsys, variant="f32"):
    """The test split's records, and what the exported artifact says of each."""
    if variant == "int8":
        assert main(["compress", str(folder)]) == 0
    artifact = folder / f"artifact-{variant}"
    assert main(["export", str(folder), "--variant", variant, "--output", str(artifact)]) == 0
    columns = tuple(OPTIONS[task][1].split(","))
    records = data.load_splits(world / task, TASKS[task], columns=columns)["test"]
    file = folder / "texts.txt"
    file.write_text("\n".join(record.text for record in records))
    capsys.readouterr()
    assert main(["predict", str(artifact), "--file", str(file), "--jsonl"]) == 0
    return records, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- regression -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["f32", slow("int8")])
def test_numbers_are_learnt_and_judged_as_numpy_and_scipy_do(runs, world, capsys, variant):
    folder = runs("regress")
    records, said = answers(folder, world, "regress", capsys, variant)
    gold = np.array([[r.numbers[n] for n in ("valence", "hours")] for r in records])
    found = np.array([[a["numbers"][n] for n in ("valence", "hours")] for a in said])
    want = {
        "mse": sk.mean_squared_error(gold, found),
        "mae": sk.mean_absolute_error(gold, found),
        "pearson": np.mean(
            [scipy_stats.pearsonr(a, b)[0] for a, b in zip(gold.T, found.T, strict=True)]
        ),
        "spearman": np.mean(
            [scipy_stats.spearmanr(a, b)[0] for a, b in zip(gold.T, found.T, strict=True)]
        ),
    }
    assert want["pearson"] > 0.9
    if variant == "f32":
        figures = run.read_json(folder / run.RESULT)["splits"]["test"]
        assert figures["numbers"].keys() == {"valence", "hours"}
        for name, value in want.items():
            assert figures[name] == pytest.approx(value, abs=1e-5), name
        assert "pearson" in (folder / run.REPORT).read_text()


def test_regression_report_equals_scipy_on_random_numbers_with_ties():
    for labels in ([3.0, 3.0, 3.0], [1.0, 2.0, 3.0]):
        for predictions in (labels, [1.0, 3.0, 5.0]):
            found = regression_report(np.array(labels), np.array(predictions))
            assert found["r2"] == pytest.approx(sk.r2_score(labels, predictions))
    rng = np.random.default_rng(0)
    for scale, mean in ((1.0, 0.0), (1e-3, 1e4)):
        y = mean + scale * np.round(rng.normal(size=200), 1)
        x = mean + scale * np.round(rng.normal(size=200), 1)
        found = regression_report(y, x)
        assert found["pearson"] == pytest.approx(scipy_stats.pearsonr(y, x)[0], abs=1e-9)
        assert found["spearman"] == pytest.approx(scipy_stats.spearmanr(y, x)[0], abs=1e-12)
        assert found["mse"] == pytest.approx(sk.mean_squared_error(y, x), rel=1e-12)
        assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, x), rel=1e-12)


# --- many labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["f32", slow("int8")])
def test_labels_are_learnt_and_judged_as_scikit_learn_does(runs, world, capsys, variant):
    folder = runs("multilabel")
    records, said = answers(folder, world, "multilabel", capsys, variant)
    names = run.config(folder)["labels"]
    assert names == sorted({*tiny.PLACES, "letters"})
    gold, found = (
        np.array([[name in labels for name in names] for labels in every])
        for every in ([r.labels for r in records], [a["labels"] for a in said])
    )
    assert not gold.any(1).all()  # some texts have no label
    for answer in said:
        assert [n for n in names if answer["scores"][n] > 0.5] == answer["labels"]
    kinds = {"zero_division": 0, "output_dict": True, "target_names": names}
    want: Any = sk.classification_report(gold, found, **kinds)
    assert want["macro avg"]["f1-score"] > 0.8
    if variant == "f32":
        figures = run.read_json(folder / run.RESULT)["splits"]["test"]
        for name in (*names, "micro avg", "macro avg", "weighted avg"):
            assert figures["report"][name] == pytest.approx(want[name])
        assert figures["macro_f1"] == pytest.approx(want["macro avg"]["f1-score"])
        assert figures["micro_f1"] == pytest.approx(want["micro avg"]["f1-score"])
        assert figures["exact_match"] == pytest.approx(sk.accuracy_score(gold, found))


# --- questions ------------------------------------------------------------------------------------


def test_passages_are_learnt_and_found_by_the_artifact(runs, world, capsys):
    folder = runs("qa")
    figures = run.read_json(folder / run.RESULT)["splits"]["test"]
    assert figures["f1"] > 0.9
    assert main(["export", str(folder)]) == 0
    records = data.read_records(world / "qa" / "test.json", "question_answering")
    asked = folder / "asked.jsonl"
    lines = [json.dumps({"question": r.question, "context": r.context}) for r in records]
    asked.write_text("\n".join(lines))
    capsys.readouterr()
    assert main(["predict", str(folder / "artifact"), "--file", str(asked), "--jsonl"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = 0
    for record, one in zip(records, said, strict=True):
        answer = one["answer"]
        assert record.context[answer["start"] : answer["end"]] == answer["text"]
        none = one["no_answer_score"] > answer["score"]
        right += ("" if none else answer["text"]) in ([a.text for a in record.answers] or [""])
    assert right / len(records) == pytest.approx(figures["exact_match"])
    unanswerable = [not r.answers for r in records]
    assert 0 < sum(unanswerable) < len(records)
    assert main(["predict", str(folder / "artifact"), "a text"]) == 1
    assert "expected an object with a question and a context" in capsys.readouterr().err


def test_squad_scores_by_hand():
    for answer, gold, want in (
        ("The Cat!", ["cat"], (1, 1)),
        ("black cat sat", ["the black cat"], (0, 2 * 2 / (3 + 2))),
        ("cat cat", ["cat"], (0, 2 * 1 / (2 + 1))),
        ("dog", ["cat", "a dog"], (1, 1)),
        ("", [], (1, 1)),
        ("cat", [], (0, 0)),
        ("", ["cat"], (0, 0)),
        ("the", ["an"], (1, 1)),  # nothing is left of either
        ("x", ["the", "x y"], (0, 2 * 1 / (1 + 2))),
    ):
        assert squad_scores(answer, gold) == pytest.approx(want), answer


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def pair_tokenizer(kind):
    """A tokenizer with special tokens and types as those of BERT or RoBERTa."""
    words = (*SPECIAL, *"abcdefgh")
    vocabulary = {word: i for i, word in enumerate(words)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special, one = [("<s>", 1), ("</s>", 2)], kind == "bert"
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1" if one else "<s> $A </s> </s> $B:0 </s>:0",
        special_tokens=special,
    )
    return data.Tokenizer(fast, (1,), (2,), pad=0, unknown=3)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_windows_are_those_of_the_tokenizers_library(kind):
    """Its own truncation of pairs, with stride, is the reference: ids, types and offsets."""
    tokenizer, rng = pair_tokenizer(kind), np.random.default_rng(5)
    for _ in range(20):
        asked, context = (" ".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 40, 2))
        asked = asked[:9]
        length = int(rng.integers(18, 30))
        record = Question(asked, context)
        encoded: Any = data.encode_questions(tokenizer, [record], max_length=length)
        special = 3 if kind == "bert" else 4
        room = length - special - len(asked.split())
        overlap = min(length // 3, room // 2)
        reference = tokenizer.fast
        reference.enable_truncation(length, stride=overlap, strategy="only_second")
        whole = reference.encode(asked, context)
        reference.no_truncation()
        want = [whole, *whole.overflowing]
        got = np.split(encoded.input_ids, encoded.offsets[1:-1])
        assert [ids.tolist() for ids in got] == [one.ids for one in want]
        types = np.split(encoded.types, encoded.offsets[1:-1])
        # In its further windows, the library forgets that RoBERTa's template has one type only.
        trusted = len(want) if kind == "bert" else 1
        assert [t.tolist() for t in types][:trusted] == [one.type_ids for one in want[:trusted]]
        assert kind == "bert" or not encoded.types.any()
        for window, one in zip(encoded.windows.spans, want, strict=True):
            inside = [o for o, s in zip(one.offsets, one.sequence_ids, strict=True) if s == 1]
            assert window.tolist() == [list(place) for place in inside]


def test_the_labels_of_windows_spell_the_answer_and_logits_lead_back_to_it():
    tokenizer, rng = pair_tokenizer("bert"), np.random.default_rng(6)
    records = []
    for _ in range(30):
        words = list(rng.choice(list("abcdefgh"), rng.integers(1, 40)))
        first = int(rng.integers(len(words)))
        last = min(first + int(rng.integers(4)), len(words) - 1)
        answer = Answer(" ".join(words[first : last + 1]), 2 * first)
        records.append(Question("a b", " ".join(words), (answer,)))
    encoded: Any = data.encode_questions(tokenizer, records, (), max_length=16)
    windows, whole = encoded.windows, 0
    for ids, label, number in zip(
        np.split(encoded.input_ids, encoded.offsets[1:-1]), encoded.labels, windows.question,
        strict=True,
    ):  # fmt: skip
        if label.any():
            text = tokenizer.fast.decode(ids[label[0] : label[1] + 1].tolist())
            assert text == records[number].answers[0].text
            whole += 1
    assert whole >= len(records)  # every answer is whole in one window at least

    rows = pack(encoded, 16, max_texts=2)
    logits = np.zeros((*rows.arrays["input_ids"].shape, 2), np.float32)
    slot = rows.arrays["segment_ids"] - 1
    for side in (0, 1):
        at = np.take_along_axis(rows.arrays["labels"][..., side], np.maximum(slot, 0), 1)
        right = (slot >= 0) & (rows.arrays["position_ids"] == at)
        logits[..., side] = np.where(right, np.where(at > 0, 9, 1), rng.normal(size=at.shape) / 9)
    for record, (best, null) in zip(
        records, passages(windows, data.unpack_words(rows, logits)), strict=True
    ):
        answer = record.answers[0]
        assert (best[0].start, best[0].end) == (answer.start, answer.start + len(answer.text))
        assert best[0].score == 18 > null


def test_the_best_passages_are_those_of_a_search_over_all():
    rng = np.random.default_rng(7)
    for size in (0, 1, 5, 60):
        spans = np.stack([np.arange(size) * 2, np.arange(size) * 2 + 1], 1)
        own = rng.normal(size=(size + 3, 2))
        windows = data.Windows((Question("q", "c"),), np.array([0]), np.array([3]), (spans,))
        [(best, null)] = passages(windows, [own])
        start, end = own[3:].T
        every = sorted(
            (float(start[i] + end[j]) for i in range(size) for j in range(i, min(size, i + 30))),
            reverse=True,
        )
        np.testing.assert_allclose([p.score for p in best], every[:20])
        assert null == own[0].sum()


@pytest.mark.parametrize("texts", [1, 3])
def test_span_loss_is_that_of_each_text_alone(texts):
    """Each text by itself through a softmax in numpy, however many share a row."""
    rng, length = np.random.default_rng(8), 6
    logits = rng.normal(size=(2, texts * length + 2, 2))
    labels = rng.integers(0, length, (2, texts, 2))
    segments = np.tile(np.r_[np.repeat(np.arange(1, texts + 1), length), [0, 0]], (2, 1))
    positions = np.tile(np.r_[np.tile(np.arange(length), texts), [0, 0]], (2, 1))
    want = 0.0
    for row in range(2):
        for text in range(texts):
            own = logits[row, text * length : (text + 1) * length]
            p = np.exp(own) / np.exp(own).sum(0)
            want -= np.log(p[labels[row, text], [0, 1]]).mean()
    padded = np.concatenate([labels, np.full((2, 1, 2), -1)], 1)
    batch = {"segment_ids": segments, "position_ids": positions, "labels": padded}
    batch = {name: jnp.array(x, jnp.int32) for name, x in batch.items()}
    total, weight = span_loss(jnp.array(logits, jnp.float32), batch)
    assert float(weight) == 2 * texts
    assert float(total) == pytest.approx(want, rel=1e-5)


def test_questions_are_read_in_every_spelling_or_refused(tmp_path):
    whole = {"id": "7", "question": "who", "context": "ada wrote"}
    lists = {"text": ["ada"], "answer_start": [0]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(whole | {"answers": lists}) + "\n" + json.dumps(whole))
    one, two = data.read_questions(path)
    assert (one.answers, two.answers) == ((Answer("ada", 0),), ())
    for row, message in (
        (whole | {"answers": {"text": ["ada"], "answer_start": [1]}}, "'ada' at character 1"),
        (whole | {"answers": [{"text": "ada"}]}, "a text and an answer_start each"),
        (whole | {"context": " "}, "a question and a context"),
        ([], "a question and a context"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(FwError, match=re.escape(f"{path}:1: ") + ".*" + message):
            data.read_questions(path)
        bad = []
        assert data.read_questions(path, on_bad_row=bad.append) == []
        assert len(bad) == 1
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(FwError, match=r"a\.json: expected SQuAD's JSON"):
        data.read_questions(tmp_path / "a.json")


# --- hidden words ---------------------------------------------------------------------------------


def test_hidden_words_are_learnt_and_judged_as_plain_numpy_does(runs, world, capsys):
    folder = runs("mlm")
    figures = run.read_json(folder / run.RESULT)["splits"]["test"]
    # Each is told by three others; what stands between is always the same.
    assert figures["accuracy"] > 0.8 and figures["perplexity"] < 3
    loaded = hub.load(folder / "model", mesh=make_mesh(ONE), rules=rules())
    assert loaded.model.config.task == "masked_lm"
    tokenizer = data.load_tokenizer(folder / "model")
    records = data.read_records(world / "mlm" / "test.jsonl", "masked_lm")
    losses, hits = [], []
    rows = pack(data.encode_maskable(tokenizer, records, max_length=32), 32)
    arrays = data.masking(tokenizer, 0)(rows.arrays, np.arange(rows.rows))
    targets = arrays.pop("targets")  # with which there would be no logits
    logits = np.asarray(loaded.model.apply(loaded.variables, arrays)[0], np.float64)
    hidden = targets >= 0
    for own, target in zip(logits[hidden], targets[hidden], strict=True):
        losses.append(np.log(np.exp(own).sum()) - own[target])
        hits.append(own.argmax() == target)
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert figures["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert figures["accuracy"] == pytest.approx(np.mean(hits))
    assert figures["tokens"] == len(losses)
    assert main(["compress", str(folder)]) == 0
    assert main(["export", str(folder), "--variant", "int8"]) == 0
    text = "in rome mary wrote a [MASK] to mary in [MASK] ."
    capsys.readouterr()
    assert main(["predict", str(folder / "artifact"), text, "[MASK] oslo", "--jsonl"]) == 0
    one, two = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [guesses[0]["token"] for guesses in one["masks"]] == ["letter", "rome"]
    assert len(two["masks"]) == 1

    assert main(["eval", str(folder)]) == 0
    again = run.read_json(folder / run.RESULT)["splits"]["test"]
    assert again == figures  # the same words are hidden every time


def test_masking_is_a_function_of_seed_and_step_with_the_shares_of_the_paper():
    rng, rows, length = np.random.default_rng(9), 40, 50
    ids = rng.integers(10, 100, (rows, length), np.int32)
    free = rng.random((rows, length)) < 0.9
    arrays = {"input_ids": ids, "targets": np.where(free, ids, -1).astype(np.int32)}
    batches = data.Batches(arrays, 16, seed=3, change=data.Masking(mask=1, words=100, seed=3))
    whole = batches(7)
    for start in range(0, 16, 4):  # as four processes would make it
        part = batches.take(7, slice(start, start + 4))
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][start : start + 4])
    assert (batches(8)["targets"] >= 0).sum() != (whole["targets"] >= 0).sum()

    plain = data.Batches(arrays, 16, seed=3)
    counts: Any = dict.fromkeys(("free", "chosen", "masked", "random", "kept"), 0)
    for step in range(60):
        before, after = plain(step), batches(step)
        chosen, changed = after["targets"] >= 0, after["input_ids"] != before["input_ids"]
        assert not (changed & ~chosen).any()
        np.testing.assert_array_equal(after["targets"][chosen], before["input_ids"][chosen])
        assert not (chosen & (before["targets"] < 0)).any()
        counts["free"] += (before["targets"] >= 0).sum()
        counts["chosen"] += chosen.sum()
        counts["masked"] += (after["input_ids"][chosen] == 1).sum()
        counts["kept"] += (chosen & ~changed).sum()
        counts["random"] += (changed & (after["input_ids"] != 1)).sum()
    chosen = counts["chosen"]
    assert chosen / counts["free"] == pytest.approx(0.15, abs=0.01)
    # A random word is that word itself, or the mask, once in a hundred each.
    for name, share in (("masked", 0.8 + 0.001), ("random", 0.1 * 0.98), ("kept", 0.1 + 0.001)):
        assert counts[name] / chosen == pytest.approx(share, abs=0.015), name


# --- next words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [slow("f32"), slow("bf16"), "int8"])
def test_next_words_are_learnt_and_judged_as_plain_numpy_does(
    runs, world, capsys, monkeypatch, variant
):
    folder = runs("lm")
    loaded = hub.load(folder / "model", mesh=make_mesh(ONE), rules=rules())
    number = {word: i for i, word in enumerate(tiny.WORDS)}
    likelihoods, hits, texts = [], [], []
    for line in (world / "lm" / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        said = [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
        words = ["[CLS]"] * ("text" in record) + " [SEP] ".join(said).split() + ["[SEP]"]
        ids = np.array([[number[word] for word in words]], np.int32)
        place = np.arange(ids.shape[1], dtype=np.int32)[None]
        batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "position_ids": place}
        logits = np.asarray(loaded.model.apply(loaded.variables, batch)[0][0], np.float64)
        shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        first = 1 if "text" in record else words.index("[SEP]") + 1  # the first that is learnt
        likelihoods += [shares[i - 1, ids[0, i]] for i in range(first, len(words))]
        hits += [shares[i - 1].argmax() == ids[0, i] for i in range(first, len(words))]
        if "text" in record:
            texts.append((said[0], shares[np.arange(len(words) - 2), ids[0, 1:-1]].sum()))
    figures = run.read_json(folder / run.RESULT)["splits"]["test"]
    assert figures["tokens"] == len(likelihoods)
    assert figures["log_likelihood"] == pytest.approx(np.mean(likelihoods), rel=1e-4)
    assert figures["accuracy"] == pytest.approx(np.mean(hits))
    assert np.mean(hits) > 0.8

    if variant == "int8":
        assert main(["compress", str(folder)]) == 0
    artifact = folder / f"artifact-{variant}"
    assert main(["export", str(folder), "--variant", variant, "--output", str(artifact)]) == 0
    capsys.readouterr()
    asked = [*(text for text, _ in texts), "the lovely ada went to"]
    three = 3 * 32 * len(tiny.WORDS)  # texts' logits at once
    monkeypatch.setattr("fw.processors.words.LOGITS", three)
    assert main(["predict", str(artifact), *asked, "--jsonl"]) == 0
    *found, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert last["next"][0]["token"] == "london" and last["tokens"] == 5
    small = json.loads((artifact / "manifest.json").read_text())["compression"]
    kernels = {"f32": [], "bf16": small["bfloat16"], "int8": small["formats"]}[variant]
    assert sum(name.startswith("params/stack/layers/") for name in kernels) == (
        0 if variant == "f32" else 7  # stacked ones, too
    )
    for (text, likelihood), answer in zip(texts, found, strict=True):
        assert answer["text"] == text
        near = 1e-4 if variant == "f32" else 0.1
        assert answer["log_likelihood"] == pytest.approx(likelihood, rel=near)


def test_a_conversation_is_answered_by_what_it_learnt_from(runs):
    talk = [{"role": "user", "content": "the fine mary went to"}]
    prompt = data.Chat(data.load_tokenizer(runs("lm") / "model")).prompt(talk)
    answer = fw.generate(fw.load(runs("lm") / "model"), prompt, max_tokens=8)
    assert answer.strip() == "rome ."


def test_one_book_is_cut_at_ends_of_lines_into_all_its_splits(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i:03} of the book\n" for i in range(1000)))
    splits = data.load_splits(book, "causal_lm")
    texts = [splits[name][0].text for name in ("train", "dev", "test")]
    assert "".join(texts) == book.read_text()
    assert [text.count("\n") // 10 for text in texts] == [80, 10, 10]
    train, dev = data.hold_out(splits["train"])
    assert train[0].text + dev[0].text == texts[0]
    book.write_text("one line")
    assert [len(part) for part in data.load_splits(book, "causal_lm").values()] == [1, 0, 0]


# --- every task -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", fast_are(["lm"], OPTIONS))
def test_eight_devices_give_the_losses_and_figures_of_one(world, tmp_path, task):
    found = []
    for mesh in (ONE, EIGHT):
        folder = finish(
            world, task, tmp_path / mesh, "--mesh", mesh, "--steps", 6, "--log-every", 1
        )
        records = run.metrics(folder)
        found.append([r["loss"] if r["kind"] == "train" else r["value"] for r in records])
    assert len(found[0]) > 6
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("task", ["regress", "multilabel"])
def test_folders_go_out_and_in_with_their_problem_type(runs, task, tmp_path):
    folder, where = runs(task) / "model", {"mesh": make_mesh(ONE), "rules": rules()}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["problem_type"] == TASKS[task]
    loaded = hub.load(folder, **where)
    assert loaded.model.config.task == TASKS[task]
    kept = hub.load(folder, task=TASKS[task], labels=loaded.labels, **where)
    assert not kept.fresh
    other = {"key": jax.random.key(0), "labels": loaded.labels, **where}
    made = hub.load(folder, task="sequence_classification", **other)
    assert set(made.fresh) == {"classifier/kernel", "classifier/bias"}  # not one for classes
    # Without a problem_type, transformers takes one output for a number.
    config["problem_type"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert hub.load(folder, **where).model.config.task == "sequence_classification"
    config["problem_type"] = TASKS[task]
    (folder / "config.json").write_text(json.dumps(config))


def torch_like(task, logits, labels):
    """The mean loss by its definition, in numpy."""
    if task == NUMBERS:
        return np.mean((logits - labels) ** 2)
    p = 1 / (1 + np.exp(-logits))
    return -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))


@pytest.mark.parametrize("task", [MANY, NUMBERS])
def test_losses_by_their_definition_and_no_gradient_where_nothing_counts(task):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 4, 5))
    labels = rng.normal(size=logits.shape) if task == NUMBERS else rng.integers(0, 2, logits.shape)
    empty = np.zeros((3, 4), bool)
    empty[1, 2:] = True
    batch = labels.astype(np.float32 if task == NUMBERS else np.int32)
    batch[empty] = np.nan if task == NUMBERS else -1

    def mean(logits):
        total, weight = make_task(task, tuple("abcde")).loss(logits, {"labels": jnp.array(batch)})
        return total / weight

    loss, gradient = jax.value_and_grad(mean)(jnp.array(logits, jnp.float32))
    assert float(loss) == pytest.approx(torch_like(task, logits[~empty], labels[~empty]), rel=1e-5)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[empty].any()
    assert {MANY: sigmoid_cross_entropy, NUMBERS: squared_error}[task] is make_task(
        task, ("a",)
    ).loss


GOOD = {
    (MANY, "csv"): ('text,label\n"a","x, y"\nb,\nc,"y,y"\n', [("x", "y"), (), ("y",)]),
    (MANY, "jsonl"): (
        '{"text": "a", "label": ["x", 2]}\n{"text": "b", "label": []}',
        [("x", "2"), ()],
    ),
    (NUMBERS, "csv"): ("text,label\na,1\nb,-2.5e1\n", [{"label": 1.0}, {"label": -25.0}]),
    (NUMBERS, "jsonl"): ('{"text": "a", "label": 3}', [{"label": 3.0}]),
}
BAD = {
    (MANY, "csv"): ('text,label\na,"x,,y"\n', ":2: expected a text and labels; got"),
    (MANY, "jsonl"): ('{"text": "a", "label": "x"}', ":1: expected .*texts or whole numbers"),
    (NUMBERS, "csv"): ("text,label\na,1\nb,nan\n", ":3: expected a text and finite numbers; got"),
    (NUMBERS, "tsv"): ("text\tlabel\na\tinf\n", ":2: expected a text and finite numbers; got"),
    (NUMBERS, "jsonl"): ('{"text": "a", "label": Infinity}', ":1: expected .*a finite number"),
    (NUMBERS, "ndjson"): ('{"text": "a", "label": "1"}', ":1: expected .*a finite number"),
}


@pytest.mark.parametrize(("case", "text"), [(k, v) for s in (GOOD, BAD) for k, v in s.items()])
def test_files_are_read_or_refused_with_file_and_line(tmp_path, case, text):
    task, suffix = case
    content, want = text
    path = tmp_path / f"a.{suffix}"
    path.write_text(content)
    if isinstance(want, str):
        with pytest.raises(FwError, match=re.escape(str(path)) + want):
            read_records(path, task)
    else:
        records = read_records(path, task)
        assert [r.labels if task == MANY else r.numbers for r in records] == want


def test_the_separator_is_as_stated_and_columns_are_as_many_as_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x;y\n")
    assert read_records(path, MANY, separator=";")[0].labels == ("x", "y")
    path.write_text("text,b,a\nt,1,2\n")
    records = read_records(path, NUMBERS, columns=("text", "b", "a"))
    assert data.label_names(records) == ("b", "a")
    rows = pack(data.encode_rated(data.load_tokenizer(tiny_vocabulary(tmp_path)), records,
                                  ("b", "a"), max_length=8), 8)  # fmt: skip
    assert rows.arrays["labels"].dtype == np.float32
    np.testing.assert_array_equal(rows.arrays["labels"], [[[1, 2]]])
    for task, columns in (("classify", "text,a,b"), ("regress", "text"), ("regress", "text,a,a")):
        with pytest.raises(FwError, match="columns is"):
            Finetune(task=task, data="x", columns=columns)


def tiny_vocabulary(folder):
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    return folder


def test_vader_gives_the_ratings_themselves(tmp_path):
    for stem in ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets"):
        (tmp_path / f"{stem}_GroundTruth.txt").write_text(f"1\t-1.25\t{stem} is bad\n")
    splits = data.load_splits(tmp_path, NUMBERS)
    records = [record for split in splits.values() for record in split]
    assert [r.numbers for r in records] == [{"valence": -1.25}] * 4
    assert {r.domain for r in records} == {"tweets", "products", "films", "editorials"}
