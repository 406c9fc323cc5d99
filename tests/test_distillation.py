"""A student learns what its teacher says: the loss by hand, and training with it, on any mesh."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from fw import run
from fw.cli import main
from fw.distillation import distilled, divergence
from fw.errors import FwError
from fw.labels import IGNORE
from fw.models.bert import BertConfig, bert
from fw.recipe import Finetune
from fw.step import initial_state, make_step
from fw.tasks import cross_entropy
from sharding import make_mesh, put, rules, shardings
from tests import tiny

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STUDENT, TEACHER = (
    bert(
        BertConfig(
            16, 8 * n, n, 2, 16, 3, "token_classification", hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.0, initializer_range=0.5,
        )
    )
    for n in (1, 2)
)  # fmt: skip


def batch(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 16, (8, 6)).astype(np.int32)
    wanted = rng.integers(0, 3, ids.shape).astype(np.int32)
    wanted[:, -2:] = IGNORE
    places = np.broadcast_to(np.arange(6, dtype=np.int32), ids.shape).copy()
    return {"input_ids": ids, "segment_ids": np.ones_like(ids), "position_ids": places,
            "labels": wanted}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_formula_over_labels_that_count(temperature):
    rng = np.random.default_rng(1)
    said, taught = rng.standard_normal((2, 4, 5, 7)).astype(np.float32) * 3
    labels = np.where(rng.random((4, 5)) < 0.5, IGNORE, 0).astype(np.int32)
    p, q = (log_softmax(x.astype(np.float64) / temperature, -1) for x in (taught, said))
    want = temperature**2 * (np.exp(p) * (p - q)).sum(-1)[labels != IGNORE].sum()
    total, count = divergence(jnp.array(said), jnp.array(taught), {"labels": labels}, temperature)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert int(count) == (labels != IGNORE).sum()


def train(mesh, options, steps):
    mesh, own = make_mesh(mesh), rules()
    taught, loss = distilled(STUDENT, TEACHER, cross_entropy, **options)
    tx = optax.adam(3e-2)
    variables = STUDENT.init(jax.random.key(0))
    state = initial_state(
        jax.device_put(variables, shardings(STUDENT.axes, variables, mesh, own)), tx, mesh
    )
    teacher = TEACHER.init(jax.random.key(1))
    teacher = jax.device_put(teacher, shardings(TEACHER.axes, teacher, mesh, own))
    before = jax.tree.map(np.asarray, teacher)
    step = make_step(taught, loss, tx, mesh=mesh, rules=own)
    losses = []
    for i in range(steps):
        state, metrics = step(state, put(batch(i % 4), mesh, own), teacher)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, teacher))
    return losses, state.variables, teacher


def test_a_student_comes_to_say_what_its_teacher_says():
    """With no weight on the labels, which are chance."""
    losses, variables, teacher = train("data=1", {"weight": 1.0}, 200)
    assert losses[-1] < 0.15 * losses[0]
    said, _ = STUDENT.apply(variables, batch(0))
    taught, _ = TEACHER.apply(teacher, batch(0))
    assert (said.argmax(-1) == taught.argmax(-1)).mean() > 0.9


def test_eight_devices_learn_as_one():
    one, *_ = train("data=1", {}, 5)
    eight, *_ = train("data=2,fsdp=2,tensor=2", {}, 5)
    np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_without_weight_the_loss_is_that_of_labels():
    taught, loss = distilled(STUDENT, TEACHER, cross_entropy, weight=0.0)
    variables = STUDENT.init(jax.random.key(0)) | {"frozen": TEACHER.init(jax.random.key(1))}
    outputs, _ = taught.apply(variables, batch(0))
    got, want = loss(outputs, batch(0)), cross_entropy(outputs[0], batch(0))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_does_not_fit_is_told():
    other = bert(BertConfig(16, 8, 1, 2, 16, 4, "token_classification"))
    taught, loss = distilled(STUDENT, other, cross_entropy)
    variables = STUDENT.init(jax.random.key(0)) | {"frozen": other.init(jax.random.key(1))}
    with pytest.raises(FwError, match=r"logits are \[8, 6, 3\], the teacher's \[8, 6, 4\]"):
        loss(taught.apply(variables, batch(0))[0], batch(0))


REFUSED = {
    "cold": ({"teacher": "runs/a", "temperature": 0.0}, "temperature is 0.0; expected more than 0"),
    "too much": ({"teacher": "runs/a", "teacher_weight": 2.0}, "teacher_weight is 2.0; expected 0"),
    "alone": ({"temperature": 3.0}, "temperature is for distillation; give --teacher a run"),
    "adapters": (
        {"teacher": "runs/a", "lora": 4},
        "a teacher is for models that are trained whole",
    ),
    "task": (
        {"teacher": "runs/a", "task": "regress"},
        "a teacher is for ner, classify, not regress",
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
