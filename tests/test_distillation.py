"""A student learns what its teacher says: lessons by hand, and training with them, anywhere."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from PIL import Image
from scipy.special import expit, log_softmax

from fw import answers, lessons, run
from fw.cli import main
from fw.data.rows import Rows
from fw.data.unlabelled import read_unlabelled
from fw.distillation import ANSWERS, Lessons, distilled
from fw.errors import FwError
from fw.labels import IGNORE, TAUGHT
from fw.models.bert import BertConfig, bert
from fw.models.llama import LlamaConfig, llama
from fw.models.modernbert import ModernBertConfig, modernbert
from fw.models.resnet import ResNetConfig, resnet
from fw.models.vit import vit
from fw.models.vit_config import ViTConfig
from fw.recipe import Finetune
from fw.step import initial_state, make_step
from fw.taps import taken, tap
from fw.tasks import cross_entropy, word_loss
from fw.tensors import write_tensors
from sharding import make_mesh, put, rules, shardings
from tests import tiny
from tests.marks import fast_are

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def encoder(n, task="token_classification", hidden=0.1):
    return bert(
        BertConfig(
            16, 8 * n, n, 2, 16, 3, task, hidden_dropout_prob=hidden,
            attention_probs_dropout_prob=0.0, initializer_range=0.5,
        )
    )  # fmt: skip


STUDENT, TEACHER = encoder(1), encoder(2)


def batch(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 16, (8, 6)).astype(np.int32)
    wanted = rng.integers(0, 3, ids.shape).astype(np.int32)
    wanted[:, -2:] = IGNORE
    places = np.broadcast_to(np.arange(6, dtype=np.int32), ids.shape).copy()
    return {"input_ids": ids, "segment_ids": np.ones_like(ids), "position_ids": places,
            "labels": wanted}  # fmt: skip


# --- what is taken --------------------------------------------------------------------------------


def looped(x, kernels):
    """Named in a loop, in what is computed again, in a call, and outside."""

    def layer(x, w):
        x = jax.checkpoint(lambda x: tap(jnp.sin(x @ w), "hidden"))(x)
        return jax.jit(lambda x: tap(2 * x, "twice"))(x), None

    return tap(lax.scan(layer, x, kernels)[0].sum(), "hidden")


def test_values_are_taken_where_they_are_computed_and_differentiated():
    rng = np.random.default_rng(0)
    x, kernels = rng.standard_normal((2, 3)), rng.standard_normal((4, 3, 3))
    (y, seen), want, at = taken(looped, ("hidden",), last=("twice",))(x, kernels), [], x
    for w in kernels:
        want.append(np.sin(at @ w))
        at = 2 * want[-1]
    for got, state in zip(seen["hidden"], [*want, at.sum()], strict=True):
        np.testing.assert_allclose(got, state, rtol=1e-5, atol=1e-6)
    assert len(seen["twice"]) == 1
    np.testing.assert_allclose(seen["twice"][0], at, rtol=1e-5, atol=1e-6)
    assert y == looped(x, kernels)

    def of_taken(w):
        seen = taken(looped, ("hidden",), last=("twice",))(x, w)[1]
        return jnp.sum(seen["hidden"][1] ** 2) + jnp.sum(seen["twice"][0])

    def by_hand(w):
        second = jnp.sin(2 * jnp.sin(x @ w[0]) @ w[1])
        return jnp.sum(second**2) + jnp.sum(2 * jnp.sin(2 * jnp.sin(2 * second @ w[2]) @ w[3]))

    got, want = jax.jit(jax.grad(of_taken))(kernels), jax.grad(by_hand)(kernels)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_taken_is_told():
    branch = lambda x: lax.cond(x > 0, lambda x: tap(x, "a"), lambda x: x, x)  # noqa: E731
    assert taken(branch, ("b",))(1.0)[1] == {"b": []}
    with pytest.raises(FwError, match="'a' is named inside of cond"):
        taken(branch, ("a",))(1.0)


# --- lessons by hand ------------------------------------------------------------------------------


def pair(*shape):
    return np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32) * 3


def kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def of_classes(said, taught, labels, t):
    p, q = (log_softmax(x.astype(np.float64) / t, -1) for x in (taught, said))
    return t**2 * kl(p, q)[labels != IGNORE].sum()


def of_labels(said, taught, labels, t):
    p, q = (np.log(expit(x.astype(np.float64) / t)) for x in (taught, said))
    p1, q1 = (np.log(expit(-x.astype(np.float64) / t)) for x in (taught, said))
    far = t**2 * (np.exp(p) * (p - q) + np.exp(p1) * (p1 - q1))
    return far[labels != IGNORE].sum()


def of_spans(said, taught, labels, t):
    total = 0.0
    for row, segments in enumerate(SEGMENTS):
        for text in range(labels.shape[1]):
            own = np.flatnonzero(segments == text + 1)
            for end in range(2):
                if labels[row, text, end] != IGNORE:
                    p, q = (log_softmax(x[row, own, end] / t) for x in (taught, said))
                    total += t**2 * kl(p, q) / 2
    return total


SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]], np.int32)
BY_HAND = {"classify": ((2, 6, 4), (2, 6), of_classes), "rank": ((2, 6), (2, 6), of_labels),
           "multilabel": ((2, 6, 4), (2, 6, 4), of_labels),
           "qa": ((2, 6, 2), (2, 2, 2), of_spans)}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("task", BY_HAND)
def test_answers_are_as_far_apart_as_the_formula_says(task, temperature):
    shape, of, formula = BY_HAND[task]
    said, taught = pair(*shape)
    labels = np.random.default_rng(2).integers(IGNORE, 2, of).astype(np.int32)
    given = {"labels": labels, "segment_ids": SEGMENTS}
    got = lessons.SOFT[task](said, taught, given, temperature)
    np.testing.assert_allclose(got, formula(said, taught, labels, temperature), rtol=1e-5)


def test_numbers_are_as_far_apart_as_they_are():
    said, taught = pair(4, 3)
    labels = np.where(np.arange(4)[:, None] < 2, np.nan, taught)
    total = lessons.SOFT["regress"](said, taught, {"labels": labels}, 2.0)
    np.testing.assert_allclose(total, ((said - taught) ** 2)[2:].sum(), rtol=1e-5)


def test_words_are_compared_without_all_logits(monkeypatch):
    """Some places at a time, of other sizes, with and without a bias; and their gradients."""
    monkeypatch.setattr(lessons, "MOST_LOGITS", 2 * 2 * 11)  # two places of six at once
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.array(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    ours = lessons.Words(draw(2, 6, 4), draw(11, 4), draw(11))
    theirs = lessons.Words(draw(2, 6, 3), draw(11, 3), None)
    targets = jnp.array(rng.integers(IGNORE, 11, (2, 6)), jnp.int32)

    def plain(ours):
        said = ours.x @ ours.table.T + ours.bias
        given = {"labels": targets}
        return lessons.divergence(said, theirs.x @ theirs.table.T, given, 2.0)

    def parts(ours):
        return lessons.word_divergence(ours, theirs, {"targets": targets}, 2.0)

    for got, want in zip(
        jax.tree.leaves(jax.value_and_grad(parts)(ours)),
        jax.tree.leaves(jax.value_and_grad(plain)(ours)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(FwError, match="the student knows 11 words, the teacher 9"):
        other = lessons.Words(theirs.x, theirs.table[:9], None)
        lessons.word_divergence(ours, other, {"targets": targets}, 1.0)


def test_states_are_compared_relative_to_the_teachers():
    rng = np.random.default_rng(4)
    ours: Any = [rng.standard_normal((2, 6, 4)).astype(np.float32) for _ in range(2)]
    theirs: Any = [rng.standard_normal((2, 6, 3)).astype(np.float32) * 10**i for i in range(4)]
    w: Any = {str(i): rng.standard_normal((4, 3)).astype(np.float32) for i in range(2)}
    real = SEGMENTS > 0
    want = np.mean([
        np.sum((x @ w[str(i)] - y)[real] ** 2) / np.sum(y[real] ** 2)
        for i, (x, y) in enumerate(zip(ours, theirs[1::2], strict=True))
    ])  # fmt: skip
    got = lessons.apart(ours, theirs, w, {"segment_ids": SEGMENTS})
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_compared_in_heads_formed_anew(causal):
    """Of three heads of 4 numbers and two of 3: twelve and six numbers, in two heads each."""
    rng = np.random.default_rng(5)
    ours: Any = [rng.standard_normal((2, 6, 3, 4)).astype(np.float32) for _ in range(3)]
    theirs: Any = [rng.standard_normal((2, 6, 2, 3)).astype(np.float32) for _ in range(3)]
    found = []
    for x, y in zip(ours, theirs, strict=True):
        for row, segments in enumerate(SEGMENTS):
            for head in range(2):
                a, b = (z[row].reshape(6, 2, -1)[:, head].astype(np.float64) for z in (x, y))
                for i in np.flatnonzero(segments):
                    sees = segments == segments[i]
                    if causal:
                        sees &= np.arange(6) <= i
                    q, p = (log_softmax(z[i] @ z[sees].T / np.sqrt(z.shape[1])) for z in (a, b))
                    found.append(kl(p, q))
    got = lessons.relations(ours, theirs, {"segment_ids": SEGMENTS}, causal=causal)
    np.testing.assert_allclose(got, np.mean(found), rtol=1e-4)


# --- training -------------------------------------------------------------------------------------


def train(mesh, how, steps, example=batch, loss=cross_entropy, models=(STUDENT, TEACHER), **more):
    (student, teacher), mesh, own = models, make_mesh(mesh), rules()
    taught = distilled(student, teacher, loss, Lessons(**how), example=example(0), **more)
    tx = optax.adam(3e-2)
    variables = taught.variables(student.init(jax.random.key(0)), jax.random.key(2))
    state = initial_state(
        jax.device_put(variables, shardings(taught.model.axes, variables, mesh, own)), tx, mesh
    )
    known = teacher.init(jax.random.key(1))
    known = jax.device_put(known, shardings(teacher.axes, known, mesh, own))
    before = jax.tree.map(np.asarray, known)
    step = make_step(taught.model, taught.loss, tx, mesh=mesh, rules=own, precision="f32")
    losses = []
    for i in range(steps):
        state, metrics = step(state, put(example(i % 4), mesh, own), known)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, known))
    return losses, taught.student(state.variables), known


def test_a_student_comes_to_say_what_its_teacher_says():
    """With no weight on the labels, which are chance."""
    losses, variables, teacher = train("data=1", {"weight": 1.0}, 200)
    assert losses[-1] < 0.15 * losses[0]
    said, _ = STUDENT.apply(variables, batch(0))
    taught, _ = TEACHER.apply(teacher, batch(0))
    assert (said.argmax(-1) == taught.argmax(-1)).mean() > 0.9


ALL = {"hidden": 0.5, "attention": 0.5}


def words(seed):
    given = batch(seed)
    return {**given, "targets": np.where(given["labels"] == IGNORE, IGNORE, given["input_ids"])}


def pictures(seed):
    rng = np.random.default_rng(seed)
    return {"pixel_values": rng.standard_normal((8, 8, 8, 1)).astype(np.float32),
            "labels": rng.integers(0, 3, 8).astype(np.int32)}  # fmt: skip


def decoder(n):
    return llama(LlamaConfig(16, 8 * n, n, 4, 16, num_key_value_heads=2, initializer_range=0.5))


def modern(n):
    return modernbert(ModernBertConfig(16, 8 * n, 2 * n, 2, 16, 3, "token_classification",
                                       initializer_range=0.5))  # fmt: skip


def patches(n):
    return vit(ViTConfig(num_labels=3, hidden_size=8 * n, num_hidden_layers=n, image_size=8,
                         num_attention_heads=2, intermediate_size=16, patch_size=4,
                         num_channels=1, initializer_range=0.5))  # fmt: skip


def convolutions(n):
    return resnet(ResNetConfig(num_labels=3, num_channels=1, embedding_size=4 * n,
                               hidden_sizes=(4 * n, 8 * n), depths=(n, n), layer_type="basic",
                               stem="small"))  # fmt: skip


KINDS = {
    "bert": (encoder, batch, cross_entropy, ALL, {}),
    "bert, words": (lambda n: encoder(n, "masked_lm"), words, word_loss, ALL, {"soft": None}),
    "llama": (decoder, words, word_loss, ALL, {"soft": None, "causal": True}),
    "modernbert": (modern, batch, cross_entropy, ALL, {}),
    "vit": (patches, pictures, cross_entropy, ALL, {}),
    "resnet": (convolutions, pictures, cross_entropy, {"hidden": 0.5}, {}),
}


@pytest.mark.parametrize("kind", fast_are(["bert", "llama"], KINDS))
def test_eight_devices_learn_as_one_and_learn(kind):
    """All lessons of a family; twenty steps on a few batches."""
    make, example, loss, how, more = KINDS[kind]
    given = {"example": example, "loss": loss, "models": (make(1), make(2)), **more}
    one, *_ = train("data=1", how, 20, **given)
    eight, *_ = train("data=2,fsdp=2,tensor=2", how, 3, **given)
    np.testing.assert_allclose(eight, one[:3], rtol=1e-4)
    assert np.mean(one[-4:]) < 0.9 * np.mean(one[:4])


def test_without_weight_the_loss_is_that_of_labels():
    taught = distilled(STUDENT, TEACHER, cross_entropy, Lessons(weight=0.0))
    variables = STUDENT.init(jax.random.key(0)) | {"frozen": TEACHER.init(jax.random.key(1))}
    outputs, _ = taught.model.apply(variables, batch(0))
    got, want = taught.loss(outputs, batch(0)), cross_entropy(outputs[0], batch(0))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_teachers_answers_in_the_batch_are_as_good_as_the_teacher():
    taught = distilled(STUDENT, TEACHER, cross_entropy)
    own, known = STUDENT.init(jax.random.key(0)), TEACHER.init(jax.random.key(1))
    asked = taught.loss(taught.model.apply(own | {"frozen": known}, batch(0))[0], batch(0))
    read = batch(0) | {ANSWERS: TEACHER.apply(known, batch(0))[0]}
    np.testing.assert_allclose(taught.loss(taught.model.apply(own, read)[0], read), asked)


def test_where_there_is_no_label_the_teacher_alone_is_heard():
    """Half of the places are unlabelled: labels weigh as before, and the teacher on all."""
    taught = distilled(STUDENT, TEACHER, cross_entropy, Lessons(weight=0.5), heard=2.0)
    variables = STUDENT.init(jax.random.key(0)) | {"frozen": TEACHER.init(jax.random.key(1))}
    given = half_labelled(np.arange(6) < 2)
    outputs, _ = taught.model.apply(variables, given)
    said, taught_by = outputs[0], TEACHER.apply(variables["frozen"], batch(0))[0]
    hard, labelled = cross_entropy(said, given)
    soft = lessons.divergence(said, taught_by, batch(0), 2.0)
    places = np.float32((batch(0)["labels"] != IGNORE).sum())
    total, count = taught.loss(outputs, given)
    np.testing.assert_allclose(total / count, (hard / labelled + soft / places) / 2, rtol=1e-5)
    assert count == places == 2 * labelled


def test_experts_are_kept_in_use_whatever_a_teacher_weighs():
    """Their auxiliary loss is of no label: it counts whole."""
    given = words(0)
    counted = given["targets"] != IGNORE
    losses = np.where(counted, 1.5, 0.0).astype(np.float32)
    outputs = {"losses": losses, "aux": jnp.float32(0.25)}, jnp.float32(3.0), jnp.zeros(())
    for weight in (0.0, 0.9, 1.0):
        taught = distilled(decoder(1), decoder(2), word_loss, Lessons(weight=weight), soft=None)
        total, count = taught.loss(outputs, given)
        want = (1 - weight) * 1.5 + weight * 3.0 / counted.sum() + 0.25
        np.testing.assert_allclose(total / count, want, rtol=1e-5)


def test_a_students_communication_is_written_out_beside_its_teacher():
    """As without one: its gradients are scattered as they are summed."""
    mesh, own = make_mesh("fsdp=2,tensor=2,data=2"), rules()
    taught, tx = distilled(encoder(1), encoder(2), cross_entropy), optax.adam(1e-2)

    def placed(model):
        variables = model.init(jax.random.key(0))
        return jax.device_put(variables, shardings(model.axes, variables, mesh, own))

    scattered, teacher = [], placed(encoder(2))
    for model, loss, more in (
        (encoder(1), cross_entropy, ()),
        (taught.model, taught.loss, (teacher,)),
    ):
        step = make_step(model, loss, tx, mesh=mesh, rules=own, precision="f32")
        state = initial_state(placed(encoder(1)), tx, mesh)
        program = step.lower(state, put(batch(0), mesh, own), *more).compile().as_text()
        scattered.append(program.count(" reduce-scatter("))
    assert scattered[0] == scattered[1] > 0


def half_labelled(where):
    """A batch whose labels are where it says alone."""
    given = batch(0)
    heard = given["labels"] != IGNORE
    return {**given, TAUGHT: heard, "labels": np.where(where, given["labels"], IGNORE)}


def test_a_batch_in_parts_is_the_batch_where_one_part_has_all_labels():
    student, teacher = encoder(1, hidden=0.0), encoder(2)
    taught = distilled(student, teacher, cross_entropy, Lessons(weight=0.5), heard=4.0)
    given = half_labelled(np.arange(8)[:, None] % 4 == 1)  # of four parts, the second's rows
    mesh, own, known = make_mesh("data=1"), rules(), teacher.init(jax.random.key(1))
    found = []
    for parts in (1, 4):
        tx = optax.sgd(0.1)
        state = initial_state(student.init(jax.random.key(0)), tx, mesh)
        step = make_step(taught.model, taught.loss, tx, mesh=mesh, rules=own, precision="f32",
                         accumulate=parts)  # fmt: skip
        state, metrics = step(state, put(given, mesh, own), known)
        found.append((metrics["loss"], state.variables["params"]))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_what_does_not_fit_is_told():
    other = bert(BertConfig(16, 8, 1, 2, 16, 4, "token_classification"))
    taught = distilled(STUDENT, other, cross_entropy)
    variables = STUDENT.init(jax.random.key(0)) | {"frozen": other.init(jax.random.key(1))}
    with pytest.raises(FwError, match=r"outputs are \[8, 6, 3\], the teacher's \[8, 6, 4\]"):
        taught.model.apply(variables, batch(0))
    nets, given = (convolutions(1), convolutions(2)), pictures(0)
    taught = distilled(*nets, cross_entropy, Lessons(attention=1.0))
    variables = nets[0].init(jax.random.key(0)) | {"frozen": nets[1].init(jax.random.key(1))}
    with pytest.raises(FwError, match="which ResNetConfig names nowhere"):
        taught.model.apply(variables, given)


REFUSED = {
    "cold": ({"teacher": "runs/a", "temperature": 0.0}, "temperature is 0.0; expected more than 0"),
    "too much": ({"teacher": "runs/a", "teacher_weight": 2.0}, "teacher_weight is 2.0; expected 0"),
    "alone": ({"temperature": 3.0}, "temperature is for distillation; give --teacher a run"),
    "adapters": (
        {"teacher": "runs/a", "lora": 4},
        "a teacher is for models that are trained whole",
    ),
    "task": (
        {"teacher": "runs/a", "task": "retrieve"},
        "a teacher is for ner, classify, .*, mlm, lm, not retrieve",
    ),
    "negative": ({"teacher": "runs/a", "teacher_hidden": -1.0}, "teacher_hidden is -1.0"),
    "asked once": (
        {"teacher": "runs/a", "teacher_offline": True, "teacher_hidden": 1.0},
        "are of a teacher that is asked in every step",
    ),
    "changing rows": (
        {"teacher": "runs/a", "teacher_offline": True, "task": "mlm"},
        "teacher_offline is for ner, .*, not mlm",
    ),
    "unlabelled, unheard": (
        {"teacher": "runs/a", "unlabelled": "more", "teacher_weight": 0.0},
        "unlabelled is for a teacher that is heard",
    ),
    "a file, asked": (
        {"teacher": "kept/teacher.safetensors", "teacher_offline": True},
        "is a file of answers; leave teacher_offline away",
    ),
    "warm numbers": (
        {"teacher": "runs/a", "temperature": 3.0, "task": "regress"},
        "temperature is for ner, .*, not regress",
    ),
    "unlabelled numbers": (
        {"teacher": "runs/a", "unlabelled": "more", "task": "regress"},
        "unlabelled is for ner, classify, not regress",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_are_refused(case):
    options, said = REFUSED[case]
    with pytest.raises(FwError, match=said):
        Finetune(data="somewhere", **options)


COMMON = ("--task", "classify", "--length", "32", "--learning-rate", "1e-2", "--precision", "f32",
          "--log-every", "1")  # fmt: skip


def fw(where, folder, *more, status=0):
    words = [w for name, path in where.items() for w in (f"--{name}", path)]
    assert main([str(w) for w in ("finetune", *COMMON, *words, "--run", folder, *more)]) == status


@pytest.mark.slow
def test_a_run_learns_from_a_run_and_resumes_to_the_same_bits(tmp_path):
    where = {"model": tiny.make_model(tmp_path / "model", layers=2, seed=1),
             "data": tiny.make_reviews(tmp_path / "data")}  # fmt: skip
    fw(where, tmp_path / "teacher", "--steps", "30")
    more = ("--teacher", tmp_path / "teacher", "--steps", "8", "--evaluate-every", "4",
            "--temperature", "3")  # fmt: skip
    fw(where, tmp_path / "one", *more)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/8")
    fw(where, tmp_path / "two", *more, "--resume")
    for name in ("model/model.safetensors", "model/config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # The teacher is heard: with labels alone the first loss is another.
    hard = tmp_path / "hard"
    fw(where, hard, "--steps", "8", "--evaluate-every", "4")
    first = [next(r["loss"] for r in run.metrics(f) if r["kind"] == "train")
             for f in (tmp_path / "one", hard)]  # fmt: skip
    assert first[0] != first[1]


def test_teachers_that_do_not_fit_are_told(tmp_path, capsys):
    model = tiny.make_model(tmp_path / "model")
    where = {"model": model, "data": tiny.make_reviews(tmp_path / "data")}
    turned, strange = (shutil.copytree(model, tmp_path / name) for name in ("turned", "strange"))
    config = json.loads((turned / "config.json").read_text())
    config |= {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    (turned / "config.json").write_text(json.dumps(config))
    words = (strange / "vocab.txt").read_text().split("\n")
    (strange / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    for teacher, said in (
        (tmp_path / "nothing", "nothing"),
        (turned, "its classes are"),
        (strange, "its tokens are others"),
    ):
        fw(where, tmp_path / "run", "--teacher", teacher, "--steps", "2", status=1)
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# --- runs -----------------------------------------------------------------------------------------


def ner(where, folder, *more, status=0):
    words = ("finetune", "--task", "ner", "--length", "32", "--learning-rate", "1e-2",
             "--precision", "f32", "--model", where / "model", "--data", where / "data",
             "--run", folder, "--steps", "6", "--evaluate-every", "3", *more)  # fmt: skip
    assert main([str(w) for w in words]) == status


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher of entities, and texts without labels."""
    root = tmp_path_factory.mktemp("taught")
    tiny.make_model(root / "model", layers=2, seed=1)
    tiny.make_ner(root / "data")
    (root / "more.txt").write_text("ada went to rome .\n\nthe film was great .\n" * 20)
    ner(root, root / "teacher")
    return root


def test_a_teacher_is_asked_once_and_its_answers_are_kept(world, tmp_path, capsys):
    """They teach as it would, in this run and in another; not of other rows."""
    more = ("--teacher", world / "teacher", "--unlabelled", world / "more.txt")
    ner(world, tmp_path / "asked", *more)
    ner(world, tmp_path / "once", *more, "--teacher-offline")
    kept = tmp_path / "once" / answers.FILE
    again = ("--teacher", kept, "--unlabelled", world / "more.txt")
    ner(world, tmp_path / "read", *again)
    losses = [[r["loss"] for r in run.metrics(tmp_path / name) if r["kind"] == "train"]
              for name in ("asked", "once", "read")]  # fmt: skip
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[2] == losses[1]
    capsys.readouterr()
    ner(world, tmp_path / "other", "--teacher", kept, status=1)
    assert "rows are not the" in capsys.readouterr().err
    ner(world, tmp_path / "other", "--teacher", tmp_path / "no.safetensors", status=1)
    assert "there is no such file" in capsys.readouterr().err
    ner(world, tmp_path / "other", "--teacher", world / "model", status=1)
    assert "as a teacher, a finished run of this task or its model" in capsys.readouterr().err


def test_lessons_of_states_resume_to_the_same_bits(world, tmp_path):
    """What projects them is in the checkpoints, and not in the model."""
    more = ("--teacher", world / "teacher", "--teacher-hidden", "1", "--teacher-attention", "1",
            "--unlabelled", world / "more.txt")  # fmt: skip
    ner(world, tmp_path / "one", *more)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/6")
    ner(world, tmp_path / "two", *more, "--resume")
    for name in ("model/model.safetensors", "model/config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert main(["eval", str(tmp_path / "one")]) == 0


@pytest.mark.parametrize("mesh", ["tensor=2", "pipe=2"])
def test_a_mesh_that_cuts_layers_has_a_teacher_too(mesh, world, tmp_path, capsys):
    """Of lessons that it cannot give, it says so before anything is there."""
    hidden = ("--teacher-hidden", "1")
    more = ("--teacher", world / "teacher", "--mesh", mesh)
    ner(world, tmp_path / "one", *more, *(hidden if mesh == "tensor=2" else ()))
    if mesh == "pipe=2":
        ner(world, tmp_path / "two", *more, *hidden, status=1)
        assert "are of layers that see a batch whole" in capsys.readouterr().err
        assert not (tmp_path / "two").exists()


def images(folder):
    """Grey squares, bright ones and dark ones, in folders of their classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("dev", 8)):
        for name, level in (("bright", 200), ("dark", 50)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                grey = np.clip(rng.normal(level, 20, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(grey).save(folder / split / name / f"{i}.png")
    return folder


SMALL = "patch_size=4,hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=16"


@pytest.mark.slow
def test_images_and_rows_of_tables_are_taught(tmp_path, capsys):
    """A teacher that reads its things otherwise is told; a stage's pipe is, too."""
    (tmp_path / "table.csv").write_text(
        "a,b,target\n" + "".join(f"{i % 7},{i},{'yn'[i % 7 > 3]}\n" for i in range(200))
    )
    common = ("--steps", "4", "--precision", "f32", "--evaluate-every", "2")
    kinds = {
        "image": (("--task", "image", "--model", "vit", "--data", images(tmp_path / "images"),
                   "--config", SMALL), ("--teacher-hidden", "1")),
        "tabular": (("--task", "tabular", "--data", tmp_path / "table.csv"),
                    ("--teacher-offline",)),
    }  # fmt: skip
    for name, (words, more) in kinds.items():
        first = ["finetune", *words, *common, "--run", tmp_path / f"{name}-a"]
        assert main([str(w) for w in first]) == 0
        again = ["finetune", *words, *common, "--run", tmp_path / f"{name}-b", "--teacher",
                 tmp_path / f"{name}-a", *more]  # fmt: skip
        assert main([str(w) for w in again]) == 0
    capsys.readouterr()
    other = ["finetune", *kinds["image"][0], *common, "--size", "12", "--run", tmp_path / "c",
             "--teacher", tmp_path / "image-a"]  # fmt: skip
    assert main([str(w) for w in other]) == 1
    assert "its inputs are others than the model's" in capsys.readouterr().err


FILES = {
    "a.conll": "-DOCSTART-\n\nAda\tNNP\nsang\n",
    "b.csv": 'text,other\n"Ada, hi",1\n',
    "c.jsonl": '{"tokens": ["Ada", "sang"]}\n{"text": "Hi."}\n',
    "d.txt": "Ada sang.\n\nHi\n",
}


def test_texts_that_nobody_labelled_are_read(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    words = [r.words for r in read_unlabelled(tmp_path, "token_classification")]
    assert words == [("Ada", "sang"), ("Ada", ",", "hi"), ("Ada", "sang"), ("Hi", "."),
                     ("Ada", "sang", "."), ("Hi",)]  # fmt: skip
    texts = [r.text for r in read_unlabelled(tmp_path, "sequence_classification")]
    assert texts == ["Ada sang", "Ada, hi", "Ada sang", "Hi.", "Ada sang.", "Hi"]
    (tmp_path / "e.csv").write_text("words\nAda\n")
    with pytest.raises(FwError, match="expected a column 'text' of texts"):
        read_unlabelled(tmp_path / "e.csv", "token_classification")
    (tmp_path / "f.conll").write_text("Ada\n\tO\n")
    with pytest.raises(FwError, match=r"f\.conll:2: expected a word in the first column"):
        read_unlabelled(tmp_path / "f.conll", "token_classification")
    with pytest.raises(FwError, match="expected texts in a file"):
        read_unlabelled(tmp_path / "nowhere", "token_classification")


def test_answers_of_other_rows_are_refused(tmp_path):
    rows = Rows({"x": np.arange(6).reshape(3, 2), "labels": np.zeros(3, np.int32)}, {})
    path, said = tmp_path / "teacher.safetensors", np.ones((3, 2), np.float32)
    answers.write(path, said, rows, ("a", "b"))
    np.testing.assert_array_equal(answers.read(path, rows, ("a", "b")), said)
    with pytest.raises(FwError, match="its classes are"):
        answers.read(path, rows, ("b", "a"))
    for name in ("x", "labels"):
        other = Rows({**rows.arrays, name: rows.arrays[name] + 1}, {})
        with pytest.raises(FwError, match="rows are not the 3 of this run"):
            answers.read(path, other, ("a", "b"))
    flat = {
        "outputs": np.float32(1),
        "rows": np.zeros(32, np.uint8),
        "labels": np.zeros(1, np.uint8),
    }
    write_tensors(path, flat)
    with pytest.raises(FwError, match="holds no teacher's answers"):
        answers.read(path, rows, ("a", "b"))
    path.write_bytes(b"torn")
    with pytest.raises(FwError, match="not tensors that can be read"):
        answers.read(path, rows, ("a", "b"))
